//! Our end of the lanes: requests go down Unix connections, answers come back through the inbox.
//!
//! A lane is a Unix connection and a queue of the requests that wait for their answers. The worker never
//! writes to the connection: a byte from it, its end, or an answer that takes too long closes the lane.
//! It is opened again, and used when it has answered a request of the edge's own (a proof).

mod queue;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use self::queue::Queue;
pub use self::queue::Waiting;
use super::fields::push_request_line;
use super::poll::{Poll, READ, WRITE, Watched, is_transient};
use super::reader::Ticket;
use super::settings::LaneAddress;

/// How long a lane has to answer its first request.
const PROOF_MS: u64 = 2_000;
/// The pause before a lost lane is opened again; doubled each time, up to the second.
const RETRY_MS: (u64, u64) = (50, 5_000);

pub struct Lanes {
    lanes: Vec<Lane>,
    /// How long a worker may take for a request.
    work_ms: u64,
    /// The number of the latest request.
    number: u64,
    losses: u64,
}

struct Lane {
    address: LaneAddress,
    key: usize,
    /// `None` while it is lost.
    socket: Option<Watched<UnixStream>>,
    /// It has answered since it was opened.
    is_up: bool,
    /// When it is opened again if it is lost, and the pause before that.
    retry_at_ms: u64,
    retry_ms: u64,
    queue: Queue,
    /// A proof was asked for and none has been answered since.
    is_unproven: bool,
}

impl Lanes {
    /// Connects to these addresses. The lanes have the keys from `first_key` on; none is up yet.
    pub fn open(
        addresses: Vec<LaneAddress>,
        first_key: usize,
        work_ms: u64,
        poll: &Poll,
        now_ms: u64,
    ) -> io::Result<Self> {
        let lane = |(i, address)| Lane {
            address,
            key: first_key + i,
            socket: None,
            is_up: false,
            retry_at_ms: 0,
            retry_ms: RETRY_MS.0,
            queue: Queue::default(),
            is_unproven: false,
        };
        let mut lanes: Vec<Lane> = addresses.into_iter().enumerate().map(lane).collect();
        for (number, lane) in (1..).zip(&mut lanes) {
            lane.open(poll, number, now_ms).map_err(io::Error::other)?;
        }
        let number = lanes.len() as u64;
        Ok(Lanes { lanes, work_ms, number, losses: 0 })
    }

    pub fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    /// Puts a request into a lane of its kind that has room: the first whose worker is quick, or else
    /// the one where the fewest wait. A second worker helps while the first waits, for Redis or the
    /// disk; beside one that does not, it only makes smaller batches and more wake-ups.
    pub fn push(&mut self, ticket: &Ticket, at: usize, bytes: &[u8], now_ms: u64) -> bool {
        let usable = |lane: &&mut Lane| {
            let LaneAddress { kind, max_waiting, .. } = lane.address;
            kind == ticket.head.class.lane && lane.is_up && lane.queue.len() < max_waiting
        };
        let wait = |lane: &&mut Lane| match lane.queue.is_quick(now_ms) {
            true => 0,
            false => 1 + lane.queue.len(),
        };
        // The first of equals.
        let lane = self.lanes.iter_mut().filter(usable).min_by_key(wait);
        let Some(lane) = lane else { return false };
        lane.queue.push(ticket.number, Some(at), bytes, now_ms);
        true
    }

    /// Takes the request with this number out of its lane; `None` if it does not wait any more.
    pub fn answered(&mut self, number: u64) -> Option<Waiting> {
        self.lanes.iter_mut().find_map(|lane| lane.answered(number))
    }

    /// Bytes held for requests that are not written yet.
    pub fn held(&self) -> usize {
        self.lanes.iter().map(|lane| lane.queue.unwritten().len()).sum()
    }

    /// Writes what there is, in one call for each lane. Returns what was in lanes that are lost.
    pub fn flush(&mut self, now_ms: u64) -> Vec<Waiting> {
        self.give_up(now_ms, Lane::flush)
    }

    /// The lane with this key is readable. Returns what was in it, for it is lost then.
    pub fn readable(&mut self, key: usize, now_ms: u64) -> Vec<Waiting> {
        self.give_up(now_ms, |lane| if lane.key == key { lane.read() } else { Ok(()) })
    }

    /// Opens the lanes for which it is time to, and gives up those that do not answer. Returns what was
    /// in these.
    pub fn tend(&mut self, poll: &Poll, now_ms: u64) -> Vec<Waiting> {
        if self.next_due().is_none_or(|at| at > now_ms) {
            return Vec::new();
        }
        let (mut number, work_ms) = (self.number, self.work_ms);
        let lost = self.give_up(now_ms, |lane| {
            number += 1;
            match lane.due(work_ms) {
                Some(at) if at <= now_ms => lane.tend(poll, number, now_ms),
                _ => Ok(()),
            }
        });
        self.number = number;
        lost
    }

    /// When [`Lanes::tend`] is next needed.
    pub fn next_due(&self) -> Option<u64> {
        self.lanes.iter().filter_map(|lane| lane.due(self.work_ms)).min()
    }

    fn give_up(
        &mut self,
        now_ms: u64,
        mut try_lane: impl FnMut(&mut Lane) -> Result<(), String>,
    ) -> Vec<Waiting> {
        let mut lost = Vec::new();
        for lane in &mut self.lanes {
            if let Err(why) = try_lane(lane) {
                self.losses += 1;
                lost.extend(lane.lose(&why, now_ms));
            }
        }
        lost
    }

    /// From now on a lane is not proven until a request of ours has come back, which is asked here
    /// unless one is under way.
    pub fn ask_proofs(&mut self, now_ms: u64) {
        for lane in &mut self.lanes {
            if !lane.is_unproven && lane.is_up {
                self.number += 1;
                lane.ask(self.number, now_ms);
            }
            lane.is_unproven = true;
        }
    }

    /// Every lane is up and has answered a proof since [`Lanes::ask_proofs`].
    pub fn are_proven(&self) -> bool {
        self.lanes.iter().all(|lane| lane.is_up && !lane.is_unproven)
    }

    pub fn losses(&self) -> u64 {
        self.losses
    }

    pub fn down(&self) -> u64 {
        self.lanes.iter().filter(|lane| !lane.is_up).count() as u64
    }
}

impl Lane {
    fn due(&self, work_ms: u64) -> Option<u64> {
        match (&self.socket, self.is_up) {
            (None, _) => Some(self.retry_at_ms),
            (Some(_), false) => self.queue.due(PROOF_MS),
            (Some(_), true) => self.queue.due(work_ms),
        }
    }

    fn answered(&mut self, number: u64) -> Option<Waiting> {
        let waiting = self.queue.answered(number)?;
        self.is_unproven &= waiting.at.is_some();
        if !self.is_up {
            log::debug!("lane {} ({}) is open", self.key, self.address.kind.name);
            (self.is_up, self.retry_ms) = (true, RETRY_MS.0);
        }
        Some(waiting)
    }

    fn tend(&mut self, poll: &Poll, number: u64, now_ms: u64) -> Result<(), String> {
        if self.socket.is_some() {
            return Err("it does not answer".to_owned());
        }
        self.open(poll, number, now_ms)
    }

    /// Connects, and asks for the answer that proves the lane.
    fn open(&mut self, poll: &Poll, number: u64, now_ms: u64) -> Result<(), String> {
        let connect = || {
            let socket = (self.address.connect)()?;
            socket.set_nonblocking(true)?;
            poll.watch(socket, self.key, READ)
        };
        self.socket = Some(connect().map_err(|e| e.to_string())?);
        self.ask(number, now_ms);
        self.flush()
    }

    /// Has the worker answer a request of the edge's own.
    fn ask(&mut self, number: u64, now_ms: u64) {
        let mut proof = Vec::new();
        push_request_line("OPTIONS", number, None, "*", &mut proof);
        proof.extend_from_slice(b"\r\n");
        self.queue.push(number, None, &proof, now_ms);
    }

    fn lose(&mut self, why: &str, now_ms: u64) -> VecDeque<Waiting> {
        log::warn!("lane {} ({}) lost: {why}", self.key, self.address.kind.name);
        (self.socket, self.is_up) = (None, false);
        self.retry_at_ms = now_ms + self.retry_ms;
        self.retry_ms = (self.retry_ms * 2).min(RETRY_MS.1);
        self.queue.lose()
    }

    /// Writes what the socket takes, and waits for room for the rest.
    fn flush(&mut self) -> Result<(), String> {
        let bytes = self.queue.unwritten();
        let Some(socket) = self.socket.as_mut().filter(|_| !bytes.is_empty()) else {
            return Ok(());
        };
        let n = match (&**socket).write(bytes) {
            Ok(n) => n,
            Err(e) if is_transient(&e) => 0,
            Err(e) => return Err(e.to_string()),
        };
        let watched = socket.set(if n < bytes.len() { READ | WRITE } else { READ });
        self.queue.advance(n);
        watched.map_err(|e| e.to_string())
    }

    fn read(&self) -> Result<(), String> {
        let Some(socket) = &self.socket else { return Ok(()) };
        match (&**socket).read(&mut [0]) {
            Ok(0) => Err("closed by the worker's side".into()),
            Ok(_) => Err("the worker's side wrote to it".into()),
            Err(e) if is_transient(&e) => Ok(()),
            Err(e) => Err(e.to_string()),
        }
    }
}
