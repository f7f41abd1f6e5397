//! What happens on a connection: its socket and its lane tell its session, and what the session wants
//! is done.

use std::io;

use super::client::{Client, Input};
use super::connections::{Connection, Connections};
use super::head::{Head, Origin};
use super::lane::{Lanes, Waiting};
use super::limits::counted_as;
use super::poll::Ready;
use super::reader::Ticket;
use super::render;
use super::session::{Action, Event};
use super::settings::Wait;
use super::tls::{Computed, HandshakeStep};
use crate::clock::Now;
use crate::http::Reply;
use crate::problem::Code;

const GO_ON: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// A body up to this size is copied behind its head, so that both are written in one call.
const TOGETHER: usize = 16 * 1024;

impl Connections {
    /// A client's socket is ready.
    pub fn client_ready(
        &mut self,
        at: usize,
        ready: Ready,
        lanes: &mut Lanes,
        buf: &mut [u8],
        now: Now,
    ) {
        if ready.broken {
            return self.close(at);
        }
        if ready.writable {
            self.with_client(at, Client::push);
            if self.is_flushed(at) {
                self.happened(at, Event::Flushed, lanes, now);
            } else {
                self.count_held(at);
            }
        }
        if ready.readable {
            self.read(at, lanes, buf, now);
        }
    }

    /// Reads once from a client that may speak.
    fn read(&mut self, at: usize, lanes: &mut Lanes, buf: &mut [u8], now: Now) {
        let Some(connection) = connection(&mut self.places, at) else { return };
        if !connection.session.reads() {
            return self.with_client(at, Client::pause);
        }
        let mut plain = std::mem::take(&mut self.plain);
        plain.clear();
        let input = connection.client.read(buf, &mut plain);
        match input {
            Ok(Input::Bytes(n)) => {
                let bytes = buf.get(..n).unwrap_or_default();
                self.happened(at, Event::Bytes(bytes), lanes, now);
            }
            input => self.received(at, input, &plain, lanes, now),
        }
        self.plain = plain;
    }

    fn received(
        &mut self,
        at: usize,
        input: io::Result<Input>,
        plain: &[u8],
        lanes: &mut Lanes,
        now: Now,
    ) {
        let event = match input {
            Ok(Input::Decrypted) => Event::Bytes(plain),
            Ok(Input::NotTls) => {
                self.counters.handshakes_failed.add(1);
                Event::Insecure
            }
            Ok(Input::End) => Event::End,
            Ok(Input::Nothing | Input::Bytes(_)) => return self.account(at, lanes, now),
            Ok(Input::Handshake) => return self.lend_tls(at, lanes, now),
            Err(_) => return self.close(at),
        };
        self.happened(at, event, lanes, now);
    }

    /// Has the next step of a TLS handshake computed, if there is room for what it holds meanwhile.
    fn lend_tls(&mut self, at: usize, lanes: &mut Lanes, now: Now) {
        self.account(at, lanes, now);
        let (Some(connection), Some(secure)) = (connection(&mut self.places, at), &self.secure)
        else {
            return;
        };
        if let Some(tls) = connection.client.lend_tls() {
            let step = HandshakeStep { at, serial: connection.serial, tls };
            secure.handshakes.submit(counted_as(connection.peer), step);
        }
    }

    /// Takes back the TLS of a client whose step was computed.
    pub fn handshake_computed(&mut self, computed: Computed, lanes: &mut Lanes, now: Now) {
        let Computed { step: HandshakeStep { at, serial, tls }, plain, outcome } = computed;
        let connection = connection(&mut self.places, at).filter(|c| c.serial == serial);
        let Some(connection) = connection else { return };
        let input = connection.client.return_tls(tls, outcome, &plain);
        if connection.client.is_secured() {
            self.happened(at, Event::Secured, lanes, now);
        }
        self.received(at, input, &plain, lanes, now);
    }

    /// A worker has answered the request with this number.
    pub fn answered(&mut self, number: u64, reply: Reply, lanes: &mut Lanes, now: Now) {
        match lanes.answered(number) {
            Some(waiting) => self.tell(&waiting, Event::Answered(reply), lanes, now),
            None => log::debug!("answer {number} came when its lane was lost"),
        }
    }

    /// What was in a lane that is lost has no answer.
    pub fn lane_lost(
        &mut self,
        lost: impl IntoIterator<Item = Waiting>,
        lanes: &mut Lanes,
        now: Now,
    ) {
        for waiting in lost {
            let event = Event::Refused(Code::ServiceUnavailable);
            self.tell(&waiting, event, lanes, now);
        }
    }

    /// Tells the connection that waits for this answer, if it still does.
    fn tell(&mut self, waiting: &Waiting, event: Event<'_>, lanes: &mut Lanes, now: Now) {
        let Some(at) = waiting.at else { return };
        let waits = |c: &&mut Connection| c.session.works_on() == Some(waiting.number);
        if connection(&mut self.places, at).filter(waits).is_some() {
            self.happened(at, event, lanes, now);
        }
    }

    /// Tells all connections that are past a deadline.
    pub fn expire(&mut self, lanes: &mut Lanes, now: Now) {
        while let Some((at, wait)) = self.timers.expired(now.mono_ms) {
            if !matches!(wait, Wait::KeepAlive | Wait::Linger) {
                self.counters.timed_out.add(1);
            }
            self.happened(at, Event::Late, lanes, now);
        }
    }

    /// Ends all connections that have nothing in progress, and has the others end when they have not; a
    /// request that has just come in is taken first.
    pub fn drain(&mut self, lanes: &mut Lanes, buf: &mut [u8], now: Now) {
        for at in 0..self.places.len() {
            self.read(at, lanes, buf, now);
            self.happened(at, Event::Drain, lanes, now);
        }
    }

    /// Something happened on a connection: does what follows from it.
    fn happened(&mut self, at: usize, event: Event<'_>, lanes: &mut Lanes, now: Now) {
        self.drive(at, event, lanes, now);
        self.account(at, lanes, now);
    }

    /// Holds what the connection holds against the budget; if there is no room, it is refused.
    fn account(&mut self, at: usize, lanes: &mut Lanes, now: Now) {
        if self.count_held(at) && !self.may_hold(at) {
            self.drive(at, Event::Refused(Code::ServiceUnavailable), lanes, now);
            self.count_held(at);
        }
    }

    fn drive(&mut self, at: usize, event: Event<'_>, lanes: &mut Lanes, now: Now) {
        let mut next = Some(event);
        while let Some(event) = next {
            let number = self.next_number();
            let Some(connection) = connection(&mut self.places, at) else { return };
            let origin = Origin {
                number,
                peer: connection.peer,
                proxies: connection.is_proxy.then_some(&self.proxies),
                certificate: connection.client.certificate(),
                classify: self.classify,
            };
            let step = connection.session.on(event, origin, &mut self.request_bytes);
            if let Some(wait) = step.begins {
                self.timers.start(at, wait, now.mono_ms);
            }
            next = self.act(at, step.action, lanes, now);
        }
    }

    /// Does what a session wants; returns what happens by that.
    fn act(
        &mut self,
        at: usize,
        action: Action,
        lanes: &mut Lanes,
        now: Now,
    ) -> Option<Event<'static>> {
        match action {
            Action::Wait => {}
            Action::Continue => self.with_client(at, |client| client.send(GO_ON, 0)),
            Action::Dispatch(ticket) => return self.dispatch(at, &ticket, lanes, now),
            Action::Reply { reply, head, keep_alive } => {
                return self.reply(at, &reply, Some(&head), keep_alive, now);
            }
            Action::Refuse(code, head) => {
                self.counters.refused.add(1);
                let reply = render::refusal(code, head.as_ref(), now);
                return self.reply(at, &reply, head.as_ref(), false, now);
            }
            Action::ReadOn { pending } => {
                self.with_client(at, Client::resume);
                return pending.then_some(Event::Bytes(&[]));
            }
            Action::Linger => self.with_client(at, Client::linger),
            Action::Close => self.close(at),
        }
        None
    }

    fn dispatch(
        &mut self,
        at: usize,
        ticket: &Ticket,
        lanes: &mut Lanes,
        now: Now,
    ) -> Option<Event<'static>> {
        let fits = self.make_room(lanes.held() + self.request_bytes.len());
        if !fits || !lanes.push(ticket, at, &self.request_bytes, now.mono_ms) {
            return Some(Event::Refused(Code::ServiceUnavailable));
        }
        self.counters.requests.add(1);
        self.ages.push_back(0, at);
        None
    }

    fn reply(
        &mut self,
        at: usize,
        reply: &Reply,
        request: Option<&Head>,
        keep_alive: bool,
        now: Now,
    ) -> Option<Event<'static>> {
        let mut bytes = std::mem::take(&mut self.reply_bytes);
        bytes.clear();
        render::write_head(reply, request, keep_alive, self.date.at(now), &mut bytes);
        let body = render::body(reply, request);
        let (together, apart) =
            if body.len() > TOGETHER { ([].as_slice(), body) } else { (body, [].as_slice()) };
        bytes.extend_from_slice(together);
        self.with_client(at, |client| {
            client.send(&bytes, apart.len())?;
            if apart.is_empty() { Ok(()) } else { client.send(apart, 0) }
        });
        self.reply_bytes = bytes;
        self.is_flushed(at).then_some(Event::Flushed)
    }

    fn is_flushed(&mut self, at: usize) -> bool {
        connection(&mut self.places, at).is_some_and(|connection| connection.client.is_flushed())
    }

    /// Does something with a client's socket, and closes it if that fails.
    fn with_client(&mut self, at: usize, act: impl FnOnce(&mut Client) -> io::Result<()>) {
        if let Some(connection) = connection(&mut self.places, at)
            && act(&mut connection.client).is_err()
        {
            self.close(at);
        }
    }
}

fn connection(places: &mut [Option<Connection>], at: usize) -> Option<&mut Connection> {
    places.get_mut(at)?.as_mut()
}
