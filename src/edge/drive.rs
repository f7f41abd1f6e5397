//! What happens on the connections: their sockets and lanes tell their sessions, and what a session wants
//! is done.

use std::io;
use std::sync::Arc;

use super::client::{Client, Input};
use super::connections::{Connection, Connections};
use super::head::Head;
use super::lane::{Lanes, Waiting};
use super::listen::Arrival;
use super::poll::{Poll, Ready};
use super::reader::Ticket;
use super::render::{self, Date};
use super::session::{Action, Event};
use super::settings::Wait;
use super::tls::{Computed, HandshakeStep};
use crate::clock::{self, Now};
use crate::http::Reply;
use crate::metrics::EdgeCounters;
use crate::problem::Code;

const GO_ON: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// What one read takes at most; all connections share the buffer.
const READ: usize = 64 * 1024;
/// A body up to this size is copied behind its head, so that both are written in one call.
const TOGETHER: usize = 16 * 1024;

/// The connections and the lanes, and what the requests and replies between them need.
pub struct Driver {
    pub connections: Connections,
    pub lanes: Lanes,
    pub now: Now,
    counters: Arc<EdgeCounters>,
    date: Date,
    /// What is being read, and what it says in the clear.
    read_bytes: Vec<u8>,
    plain_bytes: Vec<u8>,
    /// The request that is being read, and the reply that is being written.
    request_bytes: Vec<u8>,
    reply_bytes: Vec<u8>,
}

impl Driver {
    pub fn new(connections: Connections, lanes: Lanes, counters: Arc<EdgeCounters>) -> Self {
        Driver {
            connections,
            lanes,
            now: clock::now(),
            counters,
            date: Date::default(),
            read_bytes: vec![0; READ],
            plain_bytes: Vec::new(),
            request_bytes: Vec::new(),
            reply_bytes: Vec::new(),
        }
    }

    /// A new client came, or could not be let in.
    pub fn arrived(&mut self, arrival: Arrival, poll: &Poll, first_client_key: usize) {
        match arrival {
            Arrival::Client(stream, peer) => {
                self.connections.enter(stream, peer, poll, first_client_key, self.now);
            }
            Arrival::Shortage => {
                self.counters.accept_pauses.add(1);
                self.connections.shrink();
            }
        }
    }

    pub fn client_ready(&mut self, at: usize, ready: Ready) {
        if ready.broken {
            return self.connections.close(at);
        }
        if ready.writable {
            self.with_client(at, Client::push);
            if self.is_flushed(at) {
                self.handle(at, Event::Flushed);
            } else {
                self.connections.update_held(at);
            }
        }
        if ready.readable {
            self.read(at);
        }
    }

    /// Reads once from a client that may speak.
    fn read(&mut self, at: usize) {
        let Some(connection) = self.connections.get(at) else { return };
        if !connection.session.reads() {
            return self.with_client(at, Client::pause);
        }
        let mut plain = std::mem::take(&mut self.plain_bytes);
        plain.clear();
        let input = connection.client.read(&mut self.read_bytes, &mut plain);
        self.received(at, input, &plain);
        self.plain_bytes = plain;
    }

    fn received(&mut self, at: usize, input: io::Result<Input>, plain: &[u8]) {
        match input {
            Ok(Input::Bytes) => self.handle(at, Event::Bytes(plain)),
            Ok(Input::End) => self.handle(at, Event::End),
            Ok(Input::TlsFailed) => {
                let connection = self.connections.get(at);
                let is_handshake = connection.is_some_and(|c| !c.client.is_secured());
                self.counters.handshakes_failed.add(is_handshake.into());
                self.handle(at, Event::TlsFailed);
            }
            Ok(Input::Nothing) => self.enforce_budget(at),
            // `enforce_budget` has closed the connection if its TLS does not fit; then nothing is lent.
            Ok(Input::Handshake) => {
                self.enforce_budget(at);
                self.connections.lend_tls(at);
            }
            Err(_) => self.connections.close(at),
        }
    }

    pub fn handshake_computed(&mut self, computed: Computed) {
        let Computed { step, plain, output, outcome } = computed;
        let HandshakeStep { at, generation, tls } = step;
        let connection = self.connections.get(at).filter(|c| c.generation == generation);
        let Some(connection) = connection else { return };
        let input = connection.client.return_tls(tls, outcome, &plain, &output);
        if connection.client.is_secured() {
            self.handle(at, Event::Secured);
        }
        self.received(at, input, &plain);
    }

    pub fn answered(&mut self, number: u64, reply: Reply) {
        match self.lanes.answered(number) {
            Some(waiting) => self.deliver(&waiting, Event::Answered(reply)),
            None => log::debug!("answer {number} came when its lane was lost"),
        }
    }

    pub fn lane_readable(&mut self, key: usize) {
        let lost = self.lanes.readable(key, self.now.mono_ms);
        self.unanswered(lost);
    }

    pub fn flush_lanes(&mut self) {
        let lost = self.lanes.flush(self.now.mono_ms);
        self.unanswered(lost);
    }

    /// Opens lanes that were lost, and gives up those that do not answer.
    pub fn tend_lanes(&mut self, poll: &Poll) {
        let lost = self.lanes.tend(poll, self.now.mono_ms);
        self.unanswered(lost);
    }

    /// What was in a lane that is lost has no answer.
    fn unanswered(&mut self, lost: Vec<Waiting>) {
        for waiting in lost {
            self.deliver(&waiting, Event::Refused(Code::ServiceUnavailable));
        }
    }

    /// Tells the connection that waits for this answer, if it still does.
    fn deliver(&mut self, waiting: &Waiting, event: Event<'_>) {
        let Some(at) = waiting.at else { return };
        let waits = |c: &&mut Connection| c.session.works_on() == Some(waiting.number);
        if self.connections.get(at).filter(waits).is_some() {
            self.handle(at, event);
        }
    }

    /// Tells all connections that are past a deadline.
    pub fn expire(&mut self) {
        let now_ms = self.now.mono_ms;
        for at in self.connections.timers.expired(now_ms) {
            // Room that was made for one may have closed another.
            let Some(wait) = self.connections.timers.late(at, now_ms) else { continue };
            if !matches!(wait, Wait::KeepAlive | Wait::Linger) {
                self.counters.timed_out.add(1);
            }
            self.handle(at, Event::Late);
        }
    }

    /// Ends all connections that have nothing in progress, and has the others end when they have not; a
    /// request that has just come in is taken first.
    pub fn drain(&mut self) {
        for at in 0..self.connections.places() {
            self.read(at);
            self.handle(at, Event::Drain);
        }
    }

    /// Brings the counters of what is there at this moment up to date.
    pub fn publish_gauges(&self) {
        self.counters.lanes_lost.set(self.lanes.losses());
        self.counters.lanes_down.set(self.lanes.down());
        self.counters.open.set(self.connections.open() as u64);
        self.counters.held_bytes.set(self.connections.budget.held() as u64);
    }

    /// Something happened on a connection: does what follows from it.
    fn handle(&mut self, at: usize, event: Event<'_>) {
        self.run(at, event);
        self.enforce_budget(at);
    }

    /// Updates the budget with what the connection holds; if that has grown and there is no room, the
    /// connection is refused.
    fn enforce_budget(&mut self, at: usize) {
        if self.connections.update_held(at) && !self.connections.keep_or_make_room(at) {
            self.run(at, Event::Refused(Code::ServiceUnavailable));
            self.connections.update_held(at);
        }
    }

    fn run(&mut self, at: usize, event: Event<'_>) {
        let mut next = Some(event);
        while let Some(event) = next {
            let number = self.lanes.next_number();
            let request = &mut self.request_bytes;
            let step = self.connections.on_event(at, event, number, request, self.now);
            next = step.and_then(|step| self.perform(at, step.action));
        }
    }

    /// Does what a session wants; returns what happens by that.
    fn perform(&mut self, at: usize, action: Action) -> Option<Event<'static>> {
        match action {
            Action::Wait => {}
            Action::Continue => self.with_client(at, |client| client.send(GO_ON, 0)),
            Action::Dispatch(ticket) => return self.dispatch(at, &ticket),
            Action::Reply { reply, head, keep_alive } => {
                return self.reply(at, &reply, Some(&head), keep_alive);
            }
            Action::Refuse(code, head) => {
                self.counters.refused.add(1);
                let reply = render::refusal(code, head.as_ref(), self.now);
                return self.reply(at, &reply, head.as_ref(), false);
            }
            Action::ReadOn { pending } => {
                self.with_client(at, Client::resume);
                return pending.then_some(Event::Bytes(&[]));
            }
            Action::Linger => self.with_client(at, Client::linger),
            Action::Close => self.connections.close(at),
        }
        None
    }

    fn dispatch(&mut self, at: usize, ticket: &Ticket) -> Option<Event<'static>> {
        let request = &self.request_bytes;
        let fits = self.connections.make_room(self.lanes.held() + request.len());
        if !fits || !self.lanes.push(ticket, at, request, self.now.mono_ms) {
            return Some(Event::Refused(Code::ServiceUnavailable));
        }
        self.counters.requests.add(1);
        self.connections.note_use(at);
        None
    }

    fn reply(
        &mut self,
        at: usize,
        reply: &Reply,
        request: Option<&Head>,
        keep_alive: bool,
    ) -> Option<Event<'static>> {
        let mut bytes = std::mem::take(&mut self.reply_bytes);
        bytes.clear();
        render::write_head(reply, request, keep_alive, self.date.at(self.now), &mut bytes);
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
        self.connections.get(at).is_some_and(|connection| connection.client.is_flushed())
    }

    /// Does something with a client's socket, and closes it if that fails.
    fn with_client(&mut self, at: usize, act: impl FnOnce(&mut Client) -> io::Result<()>) {
        if let Some(connection) = self.connections.get(at)
            && act(&mut connection.client).is_err()
        {
            self.connections.close(at);
        }
    }
}
