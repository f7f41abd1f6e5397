//! Our end of the lanes: requests go down one Unix connection, answers come back in that order.
//!
//! Requests are appended and written together, once per wake-up, because a wake-up of the worker
//! costs more than a system call. Each answer echoes its request's number; one that does not match
//! the oldest request outstanding closes the lane, so that nobody ever reads another's answer. A
//! lane that was lost is opened again, and used only when it has answered a request of ours.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::answer::{self, Answer};
use super::conn::Request;
use super::poll::{Interest, Poll, Watched};
use super::{LaneAddress, NOBODY, PRIVATE_FIELD};
use crate::http::LaneKind;

/// A head of an answer; the worker's have 300 bytes.
const ANSWER_HEAD_MAX: usize = 16 * 1024;
/// A worker that answers within this time waits for nothing.
const QUICK_MS: u64 = 4;
/// How long a lane has to answer its first request.
const PROOF_MS: u64 = 2_000;
/// The pause before a lost lane is opened again; doubled each time, up to the second.
const RETRY_MS: (u64, u64) = (50, 5_000);
/// Written requests need no memory; beyond this it is given back.
const KEPT: usize = 64 * 1024;

/// All lanes.
pub struct Lanes(Vec<Lane>);

/// One lane.
pub struct Lane {
    address: LaneAddress,
    key: usize,
    link: Link,
    /// What to write, and how much of it is written.
    out: Vec<u8>,
    written: usize,
    queue: VecDeque<Waiting>,
    /// The start of an answer's head that is not complete.
    partial: Vec<u8>,
    /// Bytes of the body that still belong to the oldest request.
    body_left: usize,
    retry_ms: u64,
    /// How long the worker may take for a request.
    work_ms: u64,
    losses: u64,
    /// A proof was asked for and none has been answered since.
    unproven: bool,
}

enum Link {
    /// Closed until then.
    Down(u64),
    /// Open; unproven until the request at the front of the queue is answered by then.
    Proving(Watched<UnixStream>, u64),
    /// In use.
    Up(Watched<UnixStream>),
}

/// A request that is in a lane.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// Who asked; `None` for our own proof.
    pub client: Option<usize>,
    /// What was asked.
    pub number: u64,
    is_head: bool,
    since_ms: u64,
    /// The head of the answer has gone out.
    pub begun: bool,
}

/// A piece of an answer.
pub struct Piece<'a> {
    /// Whose it is.
    pub waiting: Waiting,
    /// The head, if the piece begins with it.
    pub head: &'a [u8],
    /// Some of the body.
    pub body: &'a [u8],
    /// Bytes of the body that are still to come; the answer ends here if there are none.
    pub left: usize,
}

impl Lanes {
    /// Lanes to these addresses, with the keys from `first_key` on. None is open yet.
    pub fn new(addresses: Vec<LaneAddress>, first_key: usize, work: Duration) -> Self {
        let work_ms = u64::try_from(work.as_millis()).unwrap_or(u64::MAX);
        let lane = |(i, address)| Lane {
            address,
            key: first_key + i,
            link: Link::Down(0),
            out: Vec::new(),
            written: 0,
            queue: VecDeque::new(),
            partial: Vec::new(),
            body_left: 0,
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

    /// Puts a request into a lane of its kind where fewer than `max` wait: the first whose worker is
    /// quick, or else the one with the fewest. A second worker helps while the first waits, for Redis
    /// or the disk; beside one that does not, it only makes smaller batches and more wake-ups.
    pub fn push(
        &mut self,
        request: &Request,
        client: usize,
        bytes: &[u8],
        max: usize,
        now_ms: u64,
    ) -> bool {
        let usable =
            |lane: &&mut Lane| lane.takes(request.head.class.lane) && lane.queue.len() < max;
        let wait = |lane: &&mut Lane| if lane.is_quick(now_ms) { 0 } else { 1 + lane.queue.len() };
        // The first of equals.
        let lane = self.0.iter_mut().filter(usable).min_by_key(wait);
        let Some(lane) = lane else { return false };
        let Request { number, head } = *request;
        lane.queue.push_back(Waiting {
            client: Some(client),
            number,
            is_head: head.is_head,
            since_ms: now_ms,
            begun: false,
        });
        lane.out.extend_from_slice(bytes);
        true
    }

    /// Bytes held for requests that are not written yet.
    pub fn held(&self) -> usize {
        self.0.iter().map(|lane| lane.out.len() - lane.written).sum()
    }

    /// When a lane next needs [`Lane::tend`].
    pub fn next_due(&self) -> Option<u64> {
        self.0.iter().filter_map(Lane::due).min()
    }

    /// How often lanes were lost.
    pub fn lost(&self) -> u64 {
        self.0.iter().map(|lane| lane.losses).sum()
    }

    /// How many cannot be used now.
    pub fn down(&self) -> u64 {
        self.0.iter().filter(|lane| !matches!(lane.link, Link::Up(_))).count() as u64
    }

    /// Every lane has answered a proof since [`Lane::ask_proof`].
    pub fn are_proven(&self) -> bool {
        self.0.iter().all(|lane| !lane.unproven)
    }

    /// Every lane has answered a request.
    pub fn are_up(&self) -> bool {
        self.down() == 0
    }
}

impl Lane {
    fn takes(&self, kind: LaneKind) -> bool {
        self.address.kind == kind && matches!(self.link, Link::Up(_))
    }

    /// Nobody has waited for long.
    fn is_quick(&self, now_ms: u64) -> bool {
        self.queue.front().is_none_or(|oldest| now_ms.saturating_sub(oldest.since_ms) < QUICK_MS)
    }

    fn due(&self) -> Option<u64> {
        match self.link {
            Link::Down(at) | Link::Proving(_, at) => Some(at),
            Link::Up(_) => Some(self.queue.front()?.since_ms.saturating_add(self.work_ms)),
        }
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
        match open(&self.address, poll, self.key) {
            Ok(stream) => self.prove(stream, number, now_ms),
            Err(e) => {
                let why = format!("cannot open {}: {e}", self.address.path.display());
                self.lose(&why, now_ms);
            }
        }
        VecDeque::new()
    }

    fn prove(&mut self, stream: Watched<UnixStream>, number: u64, now_ms: u64) {
        self.link = Link::Proving(stream, now_ms + PROOF_MS);
        self.push_proof(number, now_ms);
    }

    /// Has the worker answer a request of ours behind those that wait; a lane that is not up has one
    /// to answer anyway.
    pub fn ask_proof(&mut self, number: u64, now_ms: u64) {
        if !self.unproven && matches!(self.link, Link::Up(_)) {
            self.push_proof(number, now_ms);
        }
        self.unproven = true;
    }

    fn push_proof(&mut self, number: u64, now_ms: u64) {
        let proof = format!("OPTIONS * HTTP/1.1\r\n{PRIVATE_FIELD}: {number} {NOBODY}\r\n\r\n");
        self.out.extend_from_slice(proof.as_bytes());
        self.queue.push_back(Waiting {
            client: None,
            number,
            is_head: false,
            since_ms: now_ms,
            begun: false,
        });
    }

    /// Closes the lane, to be opened again later; returns what was in it.
    pub fn lose(&mut self, why: &str, now_ms: u64) -> VecDeque<Waiting> {
        log::warn!("lane {} ({:?}) lost: {why}", self.key, self.address.kind);
        self.losses += 1;
        self.link = Link::Down(now_ms + self.retry_ms);
        self.retry_ms = (self.retry_ms * 2).min(RETRY_MS.1);
        self.out = Vec::new();
        self.written = 0;
        self.partial = Vec::new();
        self.body_left = 0;
        std::mem::take(&mut self.queue)
    }

    /// Writes what there is, in one call.
    ///
    /// # Errors
    /// When the lane is lost.
    pub fn flush(&mut self) -> io::Result<()> {
        let (Link::Up(stream) | Link::Proving(stream, _)) = &mut self.link else { return Ok(()) };
        let left = self.out.get(self.written..).unwrap_or_default();
        if left.is_empty() {
            return Ok(());
        }
        match (&**stream).write(left) {
            Ok(n) => self.written += n,
            Err(e) if is_transient(&e) => {}
            Err(e) => return Err(e),
        }
        let all = self.written == self.out.len();
        stream.set(Interest { read: true, write: !all })?;
        if all {
            self.written = 0;
            self.out.clear();
            self.out.shrink_to(KEPT);
        }
        Ok(())
    }

    /// Reads once into `buf` and hands each piece of an answer to `deliver`; `scratch` is for the
    /// rewritten heads.
    ///
    /// # Errors
    /// Why the lane is lost.
    pub fn read(
        &mut self,
        buf: &mut [u8],
        scratch: &mut Vec<u8>,
        deliver: &mut dyn FnMut(Piece<'_>),
    ) -> Result<(), String> {
        let (Link::Up(stream) | Link::Proving(stream, _)) = &mut self.link else { return Ok(()) };
        let n = match (&**stream).read(buf) {
            Ok(0) => return Err("closed by the worker's side".into()),
            Ok(n) => n,
            Err(e) if is_transient(&e) => return Ok(()),
            Err(e) => return Err(e.to_string()),
        };
        let input = buf.get(..n).unwrap_or_default();
        if self.partial.is_empty() {
            let used = self.cut(input, scratch, deliver)?;
            self.partial.extend_from_slice(input.get(used..).unwrap_or_default());
        } else {
            let mut all = std::mem::take(&mut self.partial);
            all.extend_from_slice(input);
            let used = self.cut(&all, scratch, deliver)?;
            all.drain(..used);
            self.partial = all;
        }
        if self.partial.len() > ANSWER_HEAD_MAX { Err("endless head".into()) } else { Ok(()) }
    }

    fn cut(
        &mut self,
        input: &[u8],
        scratch: &mut Vec<u8>,
        deliver: &mut dyn FnMut(Piece<'_>),
    ) -> Result<usize, String> {
        let mut rest = input;
        while !rest.is_empty() {
            let waiting = *self.queue.front().ok_or("an answer to no request")?;
            scratch.clear();
            if !waiting.begun {
                let Some(answer) = answer::read(rest, scratch)? else { break };
                self.body_left = expected_body(&answer, &waiting)?;
                rest = rest.get(answer.used..).unwrap_or_default();
            }
            let (body, tail) = rest.split_at(self.body_left.min(rest.len()));
            rest = tail;
            self.body_left -= body.len();
            let left = self.body_left;
            if let Some(front) = self.queue.front_mut() {
                front.begun = true;
            }
            if left == 0 {
                self.queue.pop_front();
                self.unproven &= waiting.client.is_some();
                self.proven();
            }
            deliver(Piece { waiting, head: scratch, body, left });
        }
        Ok(input.len() - rest.len())
    }

    /// An answer came: whatever came before it, the lane works.
    fn proven(&mut self) {
        if matches!(self.link, Link::Up(_)) {
            return;
        }
        if let Link::Proving(stream, _) = std::mem::replace(&mut self.link, Link::Down(0)) {
            log::debug!("lane {} ({:?}) is open", self.key, self.address.kind);
            self.link = Link::Up(stream);
            self.retry_ms = RETRY_MS.0;
        }
    }
}

fn expected_body(answer: &Answer, waiting: &Waiting) -> Result<usize, String> {
    if answer.number != waiting.number {
        return Err(format!("answer {} where {} was due", answer.number, waiting.number));
    }
    Ok(if waiting.is_head { 0 } else { answer.length })
}

/// Does not wait: a full backlog is an error like any other.
fn open(address: &LaneAddress, poll: &Poll, key: usize) -> io::Result<Watched<UnixStream>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(&address.path)?)?;
    poll.watch(UnixStream::from(socket), key, Interest::READ)
}

/// An error that says "later", not "never".
pub fn is_transient(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
