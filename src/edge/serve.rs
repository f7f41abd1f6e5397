//! What is done for a client: read, hand to a lane, answer or refuse, go on or close.

use std::collections::VecDeque;

use super::answer::{end_head, refusal};
use super::client::{After, Client, Input};
use super::conn::{Phase, Request, Step};
use super::hall::Hall;
use super::lane::{Lane, Lanes, Piece, Waiting};
use super::limits::{Budget, Held, counted_as};
use super::poll::Ready;
use super::timers::Wait;
use super::tls::{self, Done};
use crate::clock::Now;
use crate::http::LaneKind;
use crate::problem::Code;

/// Whoever has a request in work gives way to nobody, and what is large is long in work: those who
/// wait for it may not take all the places.
const BULK_WAITING_MAX: usize = 16;

const GO_ON: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

impl Hall {
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
            self.write(at, now);
        }
        if ready.readable {
            self.read(at, lanes, buf, now);
        }
    }

    /// Reads once from a client that may speak.
    pub(super) fn read(&mut self, at: usize, lanes: &mut Lanes, buf: &mut [u8], now: Now) {
        let Some(client) = client(&mut self.clients, at) else { return };
        let phase = client.reader.phase();
        if phase == Phase::Busy && client.after != After::Lingering {
            return self.check(at, Client::pause);
        }
        self.plain.clear();
        match client.read(buf, &mut self.plain) {
            Ok(Input::Bytes(n)) => self.take(at, buf.get(..n).unwrap_or_default(), lanes, now),
            Ok(Input::Handshake) => self.lend_tls(at, now),
            input => self.received(at, input, lanes, now),
        }
    }

    /// Has the next step of a TLS handshake computed, if there is room for what it holds meanwhile.
    fn lend_tls(&mut self, at: usize, now: Now) {
        self.settle(at, now);
        let (Some(client), Some(secure)) = (client(&mut self.clients, at), &self.secure) else {
            return;
        };
        if let Some(tls) = client.lend_tls() {
            let step = tls::Step { at, serial: client.serial, tls };
            secure.handshakes.submit(counted_as(client.peer), step);
        }
    }

    /// Takes back the TLS of those whose steps were computed.
    pub fn handshakes_done(&mut self, lanes: &mut Lanes, now: Now) {
        let Some(secure) = &self.secure else { return };
        for Done { step, plain, outcome } in secure.handshakes.take_done() {
            let tls::Step { at, serial, tls } = step;
            let Some(client) = client(&mut self.clients, at).filter(|c| c.serial == serial) else {
                continue;
            };
            let input = client.return_tls(tls, outcome, &plain);
            if !client.is_handshaking() {
                self.timers.restart(at, Wait::Head, now.mono_ms);
            }
            self.plain = plain;
            self.received(at, input, lanes, now);
        }
    }

    fn received(&mut self, at: usize, input: std::io::Result<Input>, lanes: &mut Lanes, now: Now) {
        let Some(client) = client(&mut self.clients, at) else { return };
        let phase = client.reader.phase();
        match input {
            Ok(Input::Decrypted) => {
                let plain = std::mem::take(&mut self.plain);
                self.take(at, &plain, lanes, now);
                self.plain = plain;
            }
            Ok(Input::NotTls) => {
                self.counters.handshakes_failed.add(1);
                client.reader.stop();
                self.timers.restart(at, Wait::Linger, now.mono_ms);
                self.check(at, Client::linger);
            }
            Ok(Input::Nothing | Input::Bytes(_) | Input::Handshake) => self.settle(at, now),
            Ok(Input::End) if matches!(phase, Phase::Head | Phase::Body) => {
                self.refuse(at, Code::BadRequest, now);
            }
            Ok(Input::End) | Err(_) => self.close(at),
        }
    }

    /// Takes bytes that came in, or those that waited behind the last request.
    fn take(&mut self, at: usize, input: &[u8], lanes: &mut Lanes, now: Now) {
        let number = self.next_number();
        let Some(client) = client(&mut self.clients, at) else { return };
        match client.take(input, number, &self.proxies, self.classify, &mut self.request_bytes) {
            Ok(Step::More) => self.await_rest(at, now),
            Ok(Step::Continue) => {
                self.await_rest(at, now);
                self.check(at, |client| client.send(GO_ON, 0));
            }
            Ok(Step::Whole(request)) => self.dispatch(at, request, lanes, now),
            Err(code) => self.refuse(at, code, now),
        }
        self.settle(at, now);
    }

    fn await_rest(&mut self, at: usize, now: Now) {
        let Some(client) = client(&mut self.clients, at) else { return };
        match client.reader.phase() {
            Phase::Head => self.timers.enter(at, Wait::Head, now.mono_ms),
            Phase::Body => self.timers.enter(at, Wait::Body, now.mono_ms),
            Phase::Idle | Phase::Busy => {}
        }
    }

    fn dispatch(&mut self, at: usize, request: Request, lanes: &mut Lanes, now: Now) {
        let Some(client) = client(&mut self.clients, at) else { return };
        client.request = Some(request);
        let fits = self.make_room(lanes.held() + self.request_bytes.len());
        let bytes = &self.request_bytes;
        let max = match request.head.class.lane {
            LaneKind::Bulk => self.max_waiting.min(BULK_WAITING_MAX),
            LaneKind::Plain | LaneKind::Certificate => self.max_waiting,
        };
        if !fits || !lanes.push(&request, at, bytes, max, now.mono_ms) {
            return self.refuse(at, Code::ServiceUnavailable, now);
        }
        self.counters.requests.add(1);
        self.timers.restart(at, Wait::Work, now.mono_ms);
        self.ages.push_back(0, at);
    }

    /// Answers with a problem and ends the connection.
    pub(super) fn refuse(&mut self, at: usize, code: Code, now: Now) {
        let Some(client) = client(&mut self.clients, at) else { return };
        let request = client.request.take().map(|request| request.head);
        let head = request.or_else(|| client.reader.head());
        client.reader.stop();
        client.after = After::Close;
        self.counters.refused.add(1);
        self.timers.restart(at, Wait::Write, now.mono_ms);
        self.check(at, |client| client.send(&refusal(code, head, now), 0));
        self.replied(at, now);
        self.settle(at, now);
    }

    /// A lane's socket is readable.
    pub fn lane_ready(&mut self, lane: &mut Lane, buf: &mut [u8], now: Now) {
        let mut scratch = std::mem::take(&mut self.answer_head);
        let read = lane.read(buf, &mut scratch, &mut |piece| self.deliver(&piece, now));
        self.answer_head = scratch;
        if let Err(why) = read {
            let lost = lane.lose(&why, now.mono_ms);
            self.lane_lost(lost, now);
        }
    }

    /// What was in a lane that is lost gets an error, or, if its answer had begun, nothing more.
    pub fn lane_lost(&mut self, lost: VecDeque<Waiting>, now: Now) {
        for waiting in lost {
            match self.asker(&waiting) {
                Some(at) if waiting.begun => self.close(at),
                Some(at) => self.refuse(at, Code::ServiceUnavailable, now),
                None => {}
            }
        }
    }

    /// The client that still waits for this answer.
    fn asker(&mut self, waiting: &Waiting) -> Option<usize> {
        let at = waiting.client?;
        let request = client(&mut self.clients, at)?.request?;
        (request.number == waiting.number).then_some(at)
    }

    fn deliver(&mut self, piece: &Piece<'_>, now: Now) {
        let Some(at) = self.asker(&piece.waiting) else { return };
        let Some(client) = client(&mut self.clients, at) else { return };
        let bytes = &mut self.reply_bytes;
        bytes.clear();
        if let Some(request) = client.request.filter(|_| !piece.head.is_empty()) {
            let keep_alive = request.head.keep_alive && !client.is_last && !self.is_draining;
            client.after = if keep_alive { After::KeepAlive } else { After::Close };
            bytes.extend_from_slice(piece.head);
            end_head(self.date.at(now), keep_alive, request.head.is_1_0, bytes);
        }
        bytes.extend_from_slice(piece.body);
        if piece.left == 0 {
            client.request = None;
        }
        match client.send(bytes, piece.left) {
            Ok(()) if piece.left == 0 && client.is_flushed() => self.replied(at, now),
            Ok(()) => self.timers.enter(at, Wait::Write, now.mono_ms),
            Err(_) => self.close(at),
        }
        self.settle(at, now);
    }

    fn write(&mut self, at: usize, now: Now) {
        self.check(at, Client::push);
        self.replied(at, now);
        self.settle(at, now);
    }

    /// If the reply is out: the next request, or the end.
    fn replied(&mut self, at: usize, now: Now) {
        let Some(client) = client(&mut self.clients, at) else { return };
        let is_out = client.is_flushed() && client.request.is_none();
        match client.after {
            _ if !is_out || client.reader.phase() != Phase::Busy => {}
            After::KeepAlive => {
                client.reader.answered();
                if client.reader.has_pending() {
                    self.waiting.push(at);
                }
                self.timers.restart(at, Wait::KeepAlive, now.mono_ms);
                self.check(at, Client::resume);
            }
            After::Close => {
                client.reader.stop();
                self.timers.restart(at, Wait::Linger, now.mono_ms);
                self.check(at, Client::linger);
            }
            After::Lingering => {}
        }
    }

    /// Takes the next request of those who had sent it before they were answered.
    pub fn serve_waiting(&mut self, lanes: &mut Lanes, now: Now) {
        while let Some(at) = self.waiting.pop() {
            self.take(at, &[], lanes, now);
        }
    }

    /// Holds what the client holds against the budget; if that is spent, the client is refused,
    /// or whoever is longest in taking a reply is closed.
    pub(super) fn settle(&mut self, at: usize, now: Now) {
        let Some((before, held)) = self.count_held(at) else { return };
        let Some(client) = client(&mut self.clients, at) else { return };
        match client.reader.phase() {
            _ if held.all <= before.all && held.replies <= before.replies => {}
            _ if client.unfinished() > 0 => {
                // What is small gets in as long as a reply can give way.
                let unfinished = client.unfinished();
                let stays = self.budget.has_room(unfinished)
                    || (Budget::is_small(unfinished) && self.make_room(0));
                if !stays {
                    self.refuse(at, Code::ServiceUnavailable, now);
                }
            }
            _ => {
                let is_over = self.budget.is_over() || self.budget.replies_are_over();
                if is_over && client.reader.has_pending() {
                    client.drop_pending();
                    self.count_held(at);
                }
                self.make_room(0);
            }
        }
    }

    /// What the budget counted for this client, and counts from now on.
    fn count_held(&mut self, at: usize) -> Option<(Held, Held)> {
        let client = client(&mut self.clients, at)?;
        let (before, held) = (client.counted, client.held());
        client.counted = held;
        self.budget.change(before, held);
        Some((before, held))
    }

    /// Makes room for so many bytes more: whoever is longest in taking a reply is closed. False if
    /// nobody is left to close.
    fn make_room(&mut self, more: usize) -> bool {
        while !self.budget.fits(more) || (self.budget.replies_are_over() && self.several_write()) {
            let Some(longest) = self.timers.longest(Wait::Write) else { return false };
            self.close(longest);
        }
        true
    }

    /// One reply alone may be larger than the share of all.
    fn several_write(&self) -> bool {
        self.timers.all(Wait::Write).nth(1).is_some()
    }

    /// Does something with a client's socket, and closes it if that fails.
    fn check(&mut self, at: usize, act: impl FnOnce(&mut Client) -> std::io::Result<()>) {
        if let Some(client) = client(&mut self.clients, at)
            && act(client).is_err()
        {
            self.close(at);
        }
    }
}

fn client(clients: &mut [Option<Client>], at: usize) -> Option<&mut Client> {
    clients.get_mut(at)?.as_mut()
}
