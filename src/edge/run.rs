//! The loop: wait once, then readable clients, answers, new clients, deadlines.
//!
//! In that order, so that the requests of one wake-up are written to each lane together, and those that
//! waited behind an answer follow in a second write.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustls::sign::CertifiedKey;

use super::connections::{Connections, Secure};
use super::inbox::{Inbox, Sender};
use super::lane::Lanes;
use super::limits::raise_open_files;
use super::listen::{BACKLOG, Listener};
use super::poll::{Poll, Ready};
use super::settings::{LaneAddress, Settings};
use super::tls::{Acceptor, Computed, Handshakes, STATE_HELD};
use crate::clock::{self, Now};
use crate::http::Reply;

/// What one read takes at most; all connections share the buffer.
const READ: usize = 64 * 1024;
/// Descriptors besides those of clients: files, Redis, lanes and their servers.
const OTHER_FILES: usize = 64;
/// Where the keys of the lanes begin; 0 is the listener, and clients come after the lanes.
const LANES: usize = 1;

/// The edge, before or while it runs.
pub struct Edge {
    poll: Poll,
    inbox: Inbox<Mail>,
    listener: Option<Listener>,
    lanes: Lanes,
    connections: Connections,
    acceptor: Option<Arc<Acceptor>>,
    local_addr: SocketAddr,
    first_client: usize,
    drain: Duration,
    drained_by_ms: Option<u64>,
    /// All lanes have answered once, and clients are let in.
    is_ready: Arc<AtomicBool>,
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

/// Takes the answers of a worker to whom they are for: the number of a request, and its reply.
#[derive(Clone)]
pub struct Outbox(Arc<Deliver>);

type Deliver = dyn Fn(Vec<(u64, Reply)>) + Send + Sync;

impl Outbox {
    /// To whom they are for is `deliver`'s to say.
    pub fn to(deliver: impl Fn(Vec<(u64, Reply)>) + Send + Sync + 'static) -> Self {
        Outbox(Arc::new(deliver))
    }

    /// Delivers these.
    pub fn send(&self, answers: Vec<(u64, Reply)>) {
        (self.0)(answers);
    }
}

/// Why the edge cannot open.
#[derive(Debug)]
pub enum OpenError {
    /// The address, or what the system has left.
    Io(io::Error),
    /// TLS cannot be set up.
    Tls(rustls::Error),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::Io(why) => why.fmt(f),
            OpenError::Tls(why) => write!(f, "TLS cannot be set up: {why}"),
        }
    }
}

impl Error for OpenError {}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        OpenError::Io(error)
    }
}

impl From<rustls::Error> for OpenError {
    fn from(error: rustls::Error) -> Self {
        OpenError::Tls(error)
    }
}

/// What other threads may ask of a running edge.
#[derive(Clone)]
pub struct Handle {
    sender: Sender<Mail>,
    acceptor: Option<Arc<Acceptor>>,
    is_ready: Arc<AtomicBool>,
}

impl Handle {
    /// No new connections; requests in progress are answered; then [`Edge::run`] returns.
    pub fn shutdown(&self) {
        self.sender.send([Mail::Stop], 0);
    }

    /// Shows another TLS certificate to new connections; those that are open go on. Without TLS
    /// nothing changes.
    ///
    /// # Errors
    /// When TLS cannot be set up with it; then the old one stays.
    pub fn replace_certificate(&self, shown: Arc<CertifiedKey>) -> Result<(), rustls::Error> {
        self.acceptor.as_ref().map_or(Ok(()), |acceptor| acceptor.replace(shown))
    }

    /// Has every worker answer a request that goes down its lane like any other; when all have, and
    /// clients are let in, the edge's thread calls `answered`. It is not called while the edge or a
    /// worker hangs; who asks again takes the place of who asked before.
    pub fn prove(&self, answered: impl FnOnce() + Send + 'static) {
        self.sender.send([Mail::Prove(Box::new(answered))], 0);
    }

    /// All lanes have answered a request at least once.
    pub fn is_ready(&self) -> bool {
        self.is_ready.load(Ordering::Acquire)
    }
}

impl Edge {
    /// Listens, and raises the limit on open files to what the connections need; where it cannot
    /// be raised that far, fewer connections are allowed.
    ///
    /// # Errors
    /// When the address is taken, the system has nothing left, or TLS cannot be set up.
    pub fn open(settings: Settings, lanes: Vec<LaneAddress>) -> Result<Self, OpenError> {
        let acceptor = settings.tls.clone().map(Acceptor::new).transpose()?.map(Arc::new);
        let settings = fit_to_open_files(fit_to_budget(settings))?;
        let poll = Poll::new()?;
        let inbox = Inbox::new(poll.waker());
        let secure = acceptor.clone().map(|acceptor| {
            let sender = inbox.sender();
            let done = move |step| sender.send([Mail::Handshake(step)], 0);
            Handshakes::start(done).map(|handshakes| Secure { acceptor, handshakes })
        });
        let secure = secure.transpose()?;
        let socket = TcpListener::bind(settings.listen)?;
        let local_addr = socket.local_addr()?;
        let places = settings.max_connections.min(settings.max_connections_per_ip);
        Ok(Edge {
            listener: Some(Listener::new(socket, &poll, places)?),
            first_client: LANES + lanes.len(),
            lanes: Lanes::new(lanes, LANES, settings.deadlines.work),
            drain: settings.deadlines.drain,
            connections: Connections::new(settings, secure),
            acceptor,
            local_addr,
            drained_by_ms: None,
            is_ready: Arc::default(),
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
        let (acceptor, is_ready) = (self.acceptor.clone(), Arc::clone(&self.is_ready));
        Handle { sender: self.inbox.sender(), acceptor, is_ready }
    }

    /// For a worker, which waits there while the edge has more answers than it can take.
    pub fn outbox(&self) -> Outbox {
        let sender = self.inbox.sender();
        Outbox::to(move |answers| {
            let bytes = answers.iter().map(|(_, reply)| reply.body.len()).sum();
            let mail = answers.into_iter().map(|(number, reply)| Mail::Answer { number, reply });
            sender.send(mail, bytes);
        })
    }

    /// Serves until [`Handle::shutdown`] was called and all requests in progress are answered.
    ///
    /// # Errors
    /// When the readiness queue itself fails.
    pub fn run(mut self) -> io::Result<()> {
        let mut buf = vec![0; READ];
        while !self.is_drained() {
            let limit = match self.inbox.may_sleep() {
                true => self.next_due_in(clock::now()),
                false => Some(Duration::ZERO),
            };
            self.poll.wait(limit)?;
            self.inbox.awake();
            self.turn(&mut buf, clock::now());
        }
        Ok(())
    }

    fn turn(&mut self, buf: &mut [u8], now: Now) {
        let mut accept = false;
        for ready in self.poll.ready() {
            match ready.key.checked_sub(self.first_client) {
                Some(at) => self.connections.client_ready(at, ready, &mut self.lanes, buf, now),
                None => accept |= ready.key < LANES,
            }
        }
        self.flush_lanes(now);
        for mail in self.inbox.take() {
            self.read_mail(mail, buf, now);
        }
        self.check_lanes(now);
        self.tend_lanes(now);
        self.flush_lanes(now);
        if accept || self.listener.as_ref().is_some_and(|l| l.is_due(now.mono_ms)) {
            self.accept(now);
        }
        self.connections.expire(&mut self.lanes, now);
        self.connections.count(&self.lanes);
    }

    fn read_mail(&mut self, mail: Mail, buf: &mut [u8], now: Now) {
        let Edge { connections, lanes, .. } = self;
        match mail {
            Mail::Answer { number, reply } => connections.answered(number, reply, lanes, now),
            Mail::Handshake(computed) => connections.handshake_computed(computed, lanes, now),
            Mail::Prove(answered) => {
                self.proving = Some(answered);
                for lane in lanes.iter_mut() {
                    lane.ask_proof(connections.next_number(), now.mono_ms);
                }
            }
            Mail::Stop => self.begin_drain(buf, now),
        }
    }

    /// Gives up the lanes that have ended, or to which the worker's side has written.
    fn check_lanes(&mut self, now: Now) {
        for Ready { key, readable, .. } in self.poll.ready() {
            if let Some(lane) = self.lanes.by_key(key).filter(|_| readable)
                && let Some(why) = lane.lost()
            {
                let lost = lane.lose(&why, now.mono_ms);
                self.connections.lane_lost(lost, &mut self.lanes, now);
            }
        }
    }

    fn flush_lanes(&mut self, now: Now) {
        let mut lost = Vec::new();
        for lane in self.lanes.iter_mut() {
            if let Err(e) = lane.flush() {
                lost.extend(lane.lose(&e.to_string(), now.mono_ms));
            }
        }
        self.connections.lane_lost(lost, &mut self.lanes, now);
    }

    fn tend_lanes(&mut self, now: Now) {
        if self.lanes.next_due().is_some_and(|at| at <= now.mono_ms) {
            let mut lost = Vec::new();
            for lane in self.lanes.iter_mut() {
                let number = self.connections.next_number();
                lost.extend(lane.tend(&self.poll, number, now.mono_ms));
            }
            self.connections.lane_lost(lost, &mut self.lanes, now);
        }
        if !self.is_ready.load(Ordering::Relaxed) && self.lanes.down() == 0 {
            self.is_ready.store(true, Ordering::Release);
            if let Some(listener) = &mut self.listener {
                listener.open();
            }
        }
        let is_proven = self.is_ready.load(Ordering::Relaxed) && self.lanes.are_proven();
        if let Some(answered) = self.proving.take_if(|_| is_proven) {
            answered();
        }
    }

    fn accept(&mut self, now: Now) -> bool {
        let Some(listener) = &mut self.listener else { return false };
        let (connections, poll, first) = (&mut self.connections, &self.poll, self.first_client);
        listener.accept(now.mono_ms, &mut |found| connections.arrived(found, poll, first, now))
    }

    /// Stops accepting. Connections that the system has accepted already are taken over first, or they
    /// would be reset.
    fn begin_drain(&mut self, buf: &mut [u8], now: Now) {
        if self.drained_by_ms.is_some() {
            return;
        }
        let length = u64::try_from(self.drain.as_millis()).unwrap_or(u64::MAX);
        self.drained_by_ms = Some(now.mono_ms.saturating_add(length));
        // Bounded, because new ones may come as fast as they are taken.
        let mut rounds = 0..BACKLOG;
        while self.accept(now) && rounds.next().is_some() {}
        self.listener = None;
        self.connections.drain(&mut self.lanes, buf, now);
    }

    fn is_drained(&self) -> bool {
        self.drained_by_ms
            .is_some_and(|by| self.connections.is_empty() || by <= clock::now().mono_ms)
    }

    fn next_due_in(&self, now: Now) -> Option<Duration> {
        let listener = self.listener.as_ref().and_then(Listener::due);
        let connections = self.connections.next_due();
        let due = [connections, self.lanes.next_due(), listener, self.drained_by_ms];
        let next = due.into_iter().flatten().min()?;
        Some(Duration::from_millis(next.saturating_sub(now.mono_ms)))
    }
}

/// Idle TLS connections may hold half of the budget; the rest is for requests and replies.
fn fit_to_budget(mut settings: Settings) -> Settings {
    let affordable = (settings.max_buffer_bytes / 2 / STATE_HELD).max(1);
    if settings.tls.is_some() && affordable < settings.max_connections {
        settings.max_connections = affordable;
        log::info!(
            "{} bytes for clients allow {affordable} TLS connections",
            settings.max_buffer_bytes
        );
    }
    settings
}

fn fit_to_open_files(mut settings: Settings) -> io::Result<Settings> {
    let wanted = settings.max_connections + OTHER_FILES;
    let allowed = raise_open_files(wanted as u64)?;
    let allowed = usize::try_from(allowed).unwrap_or(usize::MAX);
    if allowed < wanted {
        settings.max_connections = allowed.saturating_sub(OTHER_FILES).max(1);
        log::warn!(
            "open files are limited to {allowed}: at most {} connections",
            settings.max_connections
        );
    }
    Ok(settings)
}
