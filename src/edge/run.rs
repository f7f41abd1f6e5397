//! The loop: wait once, then readable clients, answers, new clients, deadlines.
//!
//! In that order, so that the requests of one wake-up are written to each lane together, and those that
//! waited behind an answer follow in a second write.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::sign::CertifiedKey;

use super::connections::Connections;
use super::drive::Driver;
use super::inbox::{Inbox, Sender};
use super::lane::Lanes;
use super::listen::{BACKLOG, KEY, Listener};
use super::poll::Poll;
use super::settings::{LaneAddress, Settings, Wait};
use super::tls::{Acceptor, Computed, Handshakes, STATE_HELD};
use crate::clock::{self, Now};
use crate::http::Reply;

/// Descriptors besides those of clients and lanes: files, Redis.
const OTHER_FILES: usize = 64;
/// Descriptors of a lane: its listener and both ends of its connection.
const LANE_FILES: usize = 3;

/// The edge, before or while it runs.
pub struct Edge {
    poll: Poll,
    inbox: Inbox<Mail>,
    listener: Option<Listener>,
    driver: Driver,
    acceptor: Option<Arc<Acceptor>>,
    local_addr: SocketAddr,
    /// The key of the first place; 0 is the listener's, those between are the lanes'.
    first_client_key: usize,
    /// All lanes have answered once, and clients are let in.
    is_open: bool,
    /// To be told when all lanes have answered.
    proving: Option<Answered>,
}

/// What other threads tell the edge.
enum Mail {
    Answer { number: u64, reply: Reply },
    Handshake(Computed),
    Prove(Answered),
    Stop,
}

/// Who is told, once, that all lanes have answered.
type Answered = Box<dyn FnOnce() + Send>;

/// Takes a worker's answers to the edge: the number of each request, and its reply. The worker waits
/// there while the edge has more answers than it can take.
pub type Outbox = Arc<dyn Fn(Vec<(u64, Reply)>) + Send + Sync>;

/// What other threads may ask of a running edge.
#[derive(Clone)]
pub struct Handle {
    sender: Sender<Mail>,
    acceptor: Option<Arc<Acceptor>>,
}

impl Handle {
    /// No new connections; requests in progress are answered; then [`Edge::run`] returns.
    pub fn shutdown(&self) {
        self.sender.send([Mail::Stop], 0);
    }

    /// Shows another TLS certificate to new connections; those that are open go on. Without TLS
    /// nothing changes.
    /// When TLS cannot be set up with it, the old one stays.
    pub fn replace_certificate(&self, shown: Arc<CertifiedKey>) -> Result<(), rustls::Error> {
        self.acceptor.as_ref().map_or(Ok(()), |acceptor| acceptor.replace(shown))
    }

    /// Has every worker answer a request that goes down its lane like any other; when all have, and
    /// clients are let in, the edge's thread calls `answered`. It is not called while the edge or a
    /// worker hangs; who asks again takes the place of who asked before.
    pub fn prove(&self, answered: impl FnOnce() + Send + 'static) {
        self.sender.send([Mail::Prove(Box::new(answered))], 0);
    }
}

impl Edge {
    /// Listens, and raises the limit on open files to what the connections need; where it cannot
    /// be raised that far, fewer connections are allowed.
    pub fn open(mut settings: Settings, lanes: Vec<LaneAddress>) -> io::Result<Self> {
        let is_tls = settings.tls.is_some() || settings.http.tls.is_some();
        let acceptor = is_tls.then(|| Acceptor::new(settings.tls.take())).transpose();
        let acceptor =
            acceptor.map_err(|e| io::Error::other(format!("no TLS: {e}")))?.map(Arc::new);
        if acceptor.is_some() {
            fit_to_budget(&mut settings);
        }
        fit_to_open_files(&mut settings, OTHER_FILES + LANE_FILES * lanes.len())?;
        let http = &settings.http;
        let places = http.max_connections.min(http.max_connections_per_ip);
        let poll = Poll::new()?;
        let inbox = Inbox::new(poll.waker());
        let handshakes = acceptor.clone().map(|acceptor| {
            let sender = inbox.sender();
            Handshakes::start(acceptor, move |step| sender.send([Mail::Handshake(step)], 0))
        });
        let socket = TcpListener::bind((http.host, http.port))?;
        let local_addr = socket.local_addr()?;
        let first_client_key = KEY + 1 + lanes.len();
        let work_ms = settings.deadlines.length_ms(Wait::Work);
        let lanes = Lanes::open(lanes, KEY + 1, work_ms, &poll, clock::now().mono_ms)?;
        let counters = Arc::clone(&settings.counters);
        let connections = Connections::new(settings, handshakes.transpose()?);
        Ok(Edge {
            listener: Some(Listener::new(socket, &poll, places)?),
            driver: Driver::new(connections, lanes, counters),
            acceptor,
            local_addr,
            first_client_key,
            is_open: false,
            proving: None,
            inbox,
            poll,
        })
    }

    /// Where it listens, the port chosen by the system included.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// For other threads.
    pub fn handle(&self) -> Handle {
        Handle { sender: self.inbox.sender(), acceptor: self.acceptor.clone() }
    }

    /// For a worker.
    pub fn outbox(&self) -> Outbox {
        let sender = self.inbox.sender();
        Arc::new(move |answers| {
            let bytes = answers.iter().map(|(_, reply)| reply.body.len()).sum();
            let mail = answers.into_iter().map(|(number, reply)| Mail::Answer { number, reply });
            sender.send(mail, bytes);
        })
    }

    /// Serves until [`Handle::shutdown`] was called and all requests in progress are answered.
    pub fn run(mut self) -> io::Result<()> {
        while self.listener.is_some() || self.driver.connections.open() > 0 {
            let limit = match self.inbox.may_sleep() {
                true => self.next_due_in(self.driver.now),
                false => Some(Duration::ZERO),
            };
            self.poll.wait(limit)?;
            self.inbox.awake();
            self.turn(clock::now());
        }
        Ok(())
    }

    fn turn(&mut self, now: Now) {
        self.driver.now = now;
        let mut accept = self.listener.as_ref().is_some_and(|l| l.is_due(now.mono_ms));
        for ready in self.poll.ready() {
            match ready.key.checked_sub(self.first_client_key) {
                Some(at) => self.driver.client_ready(at, ready),
                None => accept |= ready.key == KEY,
            }
        }
        self.driver.flush_lanes();
        for mail in self.inbox.take() {
            self.read_mail(mail, now);
        }
        // After the answers, or those of a worker that has ended would be lost.
        for ready in self.poll.ready().filter(|ready| ready.key < self.first_client_key) {
            if ready.readable {
                self.driver.lane_readable(ready.key);
            }
        }
        self.driver.tend_lanes(&self.poll);
        self.driver.flush_lanes();
        if accept {
            self.accept(now);
        }
        self.driver.expire();
        self.driver.publish_gauges();
        self.note_proof();
    }

    fn read_mail(&mut self, mail: Mail, now: Now) {
        match mail {
            Mail::Answer { number, reply } => self.driver.answered(number, reply),
            Mail::Handshake(computed) => self.driver.handshake_computed(computed),
            Mail::Prove(answered) => {
                self.proving = Some(answered);
                self.driver.lanes.ask_proofs(self.driver.now.mono_ms);
            }
            Mail::Stop => self.begin_drain(now),
        }
    }

    /// When all lanes have answered: lets clients in, and tells who asked for it.
    fn note_proof(&mut self) {
        if (self.is_open && self.proving.is_none()) || !self.driver.lanes.are_proven() {
            return;
        }
        if let Some(listener) = self.listener.as_mut().filter(|_| !self.is_open) {
            listener.open();
        }
        self.is_open = true;
        if let Some(answered) = self.proving.take() {
            answered();
        }
    }

    fn accept(&mut self, now: Now) -> bool {
        let Some(listener) = &mut self.listener else { return false };
        let (driver, poll, first_client_key) =
            (&mut self.driver, &self.poll, self.first_client_key);
        listener.accept(now.mono_ms, &mut |arrival| driver.arrived(arrival, poll, first_client_key))
    }

    /// Stops accepting. Connections that the system has accepted already are taken over first, or they
    /// would be reset.
    fn begin_drain(&mut self, now: Now) {
        // Bounded, because new ones may come as fast as they are taken.
        let mut rounds = 0..BACKLOG;
        while self.accept(now) && rounds.next().is_some() {}
        self.listener = None;
        self.driver.drain();
    }

    fn next_due_in(&self, now: Now) -> Option<Duration> {
        let listener = self.listener.as_ref().and_then(Listener::due);
        let Driver { connections, lanes, .. } = &self.driver;
        let due = [connections.timers.next_due(), lanes.next_due(), listener];
        let next = due.into_iter().flatten().min()?;
        Some(Duration::from_millis(next.saturating_sub(now.mono_ms)))
    }
}

/// Idle TLS connections may hold half of the budget; the rest is for requests and replies.
fn fit_to_budget(settings: &mut Settings) {
    let (bytes, max) = (settings.http.max_buffer_bytes, &mut settings.http.max_connections);
    let affordable = (bytes / 2 / STATE_HELD).max(1);
    if affordable < *max {
        log::info!("{bytes} bytes for clients allow so many TLS connections: {affordable}");
        *max = affordable;
    }
}

/// Raises the limit on open files to what is needed, as far as that is allowed.
fn fit_to_open_files(settings: &mut Settings, others: usize) -> io::Result<()> {
    let max = &mut settings.http.max_connections;
    let wanted = (*max + others) as u64;
    let limit = getrlimit(Resource::Nofile);
    let allowed = wanted.min(limit.maximum.unwrap_or(u64::MAX));
    if limit.current.is_some_and(|current| current < allowed) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(allowed), maximum: limit.maximum })?;
    }
    if allowed < wanted {
        *max = usize::try_from(allowed).unwrap_or(usize::MAX).saturating_sub(others).max(1);
        log::warn!("open files are limited to {allowed}, and so connections to {max}");
    }
    Ok(())
}
