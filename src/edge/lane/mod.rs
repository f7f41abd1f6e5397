//! Our end of the lanes: requests go down Unix connections, answers come back through the inbox.
//!
//! A lane is a queue of what waits beside the link that it goes through. One that was lost is opened
//! again, and used only when it has answered a request of ours.

mod link;
mod queue;

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use self::link::Link;
use self::queue::Queue;
pub use self::queue::Waiting;
use super::poll::Poll;
use super::reader::Ticket;
use super::settings::{LaneAddress, NOBODY, PRIVATE_FIELD};
use crate::http::LaneKind;

/// How long a lane has to answer its first request.
const PROOF_MS: u64 = 2_000;
/// The pause before a lost lane is opened again; doubled each time, up to the second.
const RETRY_MS: (u64, u64) = (50, 5_000);

/// All lanes.
pub struct Lanes(Vec<Lane>);

/// One lane.
pub struct Lane {
    address: LaneAddress,
    key: usize,
    link: Link,
    queue: Queue,
    retry_ms: u64,
    /// How long the worker may take for a request.
    work_ms: u64,
    losses: u64,
    /// A proof was asked for and none has been answered since.
    unproven: bool,
}

impl Lanes {
    /// Lanes to these addresses, with the keys from `first_key` on. None is open yet.
    pub fn new(addresses: Vec<LaneAddress>, first_key: usize, work: Duration) -> Self {
        let work_ms = u64::try_from(work.as_millis()).unwrap_or(u64::MAX);
        let lane = |(i, address)| Lane {
            address,
            key: first_key + i,
            link: Link::Down(0),
            queue: Queue::default(),
            retry_ms: RETRY_MS.0,
            work_ms,
            losses: 0,
            unproven: false,
        };
        Lanes(addresses.into_iter().enumerate().map(lane).collect())
    }

    /// The lane with this key.
    pub fn by_key(&mut self, key: usize) -> Option<&mut Lane> {
        self.0.iter_mut().find(|lane| lane.key == key)
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Lane> {
        self.0.iter_mut()
    }

    /// Puts a request into a lane of its kind that has room: the first whose worker is quick, or else
    /// the one where the fewest wait. A second worker helps while the first waits, for Redis or the
    /// disk; beside one that does not, it only makes smaller batches and more wake-ups.
    pub fn push(&mut self, ticket: &Ticket, at: usize, bytes: &[u8], now_ms: u64) -> bool {
        let usable = |lane: &&mut Lane| lane.takes(ticket.head.class.lane);
        let wait = |lane: &&mut Lane| match lane.queue.is_quick(now_ms) {
            true => 0,
            false => 1 + lane.queue.len(),
        };
        // The first of equals.
        let lane = self.0.iter_mut().filter(usable).min_by_key(wait);
        let Some(lane) = lane else { return false };
        lane.queue.push(ticket.number, Some(at), bytes, now_ms);
        true
    }

    /// Takes the request with this number out of its lane; `None` if it does not wait any more.
    pub fn answered(&mut self, number: u64) -> Option<Waiting> {
        self.0.iter_mut().find_map(|lane| lane.answered(number))
    }

    /// Bytes held for requests that are not written yet.
    pub fn held(&self) -> usize {
        self.0.iter().map(|lane| lane.queue.unwritten().len()).sum()
    }

    /// When a lane next needs [`Lane::tend`].
    pub fn next_due(&self) -> Option<u64> {
        self.0.iter().filter_map(Lane::due).min()
    }

    /// How often lanes were lost.
    pub fn losses(&self) -> u64 {
        self.0.iter().map(|lane| lane.losses).sum()
    }

    /// How many cannot be used now.
    pub fn down(&self) -> u64 {
        self.0.iter().filter(|lane| !lane.link.is_up()).count() as u64
    }

    /// Every lane has answered a proof since [`Lane::ask_proof`].
    pub fn are_proven(&self) -> bool {
        self.0.iter().all(|lane| !lane.unproven)
    }
}

impl Lane {
    fn takes(&self, kind: LaneKind) -> bool {
        let has_room = self.queue.len() < self.address.max_waiting;
        self.address.kind == kind && self.link.is_up() && has_room
    }

    fn due(&self) -> Option<u64> {
        match self.link {
            Link::Down(at) | Link::Proving(_, at) => Some(at),
            Link::Up(_) => self.queue.due(self.work_ms),
        }
    }

    fn answered(&mut self, number: u64) -> Option<Waiting> {
        let waiting = self.queue.answered(number)?;
        self.unproven &= waiting.at.is_some();
        if self.link.proven() {
            log::debug!("lane {} ({:?}) is open", self.key, self.address.kind);
            self.retry_ms = RETRY_MS.0;
        }
        Some(waiting)
    }

    /// Opens the lane if it is time to, or gives up one that does not answer; `number` is for the
    /// request that proves it. Returns what was in a lane that is given up.
    pub fn tend(&mut self, poll: &Poll, number: u64, now_ms: u64) -> VecDeque<Waiting> {
        if self.due().is_none_or(|at| at > now_ms) {
            return VecDeque::new();
        }
        if !matches!(self.link, Link::Down(_)) {
            return self.lose("it does not answer", now_ms);
        }
        match Link::open(&self.address.path, poll, self.key) {
            Ok(stream) => {
                self.ask(number, now_ms);
                self.link = Link::Proving(stream, now_ms + PROOF_MS);
                VecDeque::new()
            }
            Err(e) => self.lose(&format!("{}: {e}", self.address.path.display()), now_ms),
        }
    }

    /// From now on the lane is not proven until a request of ours has come back, which is asked here
    /// unless one is under way.
    pub fn ask_proof(&mut self, number: u64, now_ms: u64) {
        if !self.unproven && self.link.is_up() {
            self.ask(number, now_ms);
        }
        self.unproven = true;
    }

    fn ask(&mut self, number: u64, now_ms: u64) {
        let proof = format!("OPTIONS * HTTP/1.1\r\n{PRIVATE_FIELD}: {number} {NOBODY}\r\n\r\n");
        self.queue.push(number, None, proof.as_bytes(), now_ms);
    }

    /// Gives the lane up. Returns what was in it.
    pub fn lose(&mut self, why: &str, now_ms: u64) -> VecDeque<Waiting> {
        log::warn!("lane {} ({:?}) lost: {why}", self.key, self.address.kind);
        self.losses += 1;
        self.link = Link::Down(now_ms + self.retry_ms);
        self.retry_ms = (self.retry_ms * 2).min(RETRY_MS.1);
        self.queue.lose()
    }

    /// Writes what there is, in one call.
    ///
    /// # Errors
    /// When the lane is lost.
    pub fn flush(&mut self) -> io::Result<()> {
        let n = self.link.write(self.queue.unwritten())?;
        self.queue.advance(n);
        Ok(())
    }

    /// Returns why the lane is lost, if it is; for when its socket is readable.
    pub fn lost(&mut self) -> Option<String> {
        self.link.lost()
    }
}
