//! The loop: wait once, then readable clients, lanes, new clients, deadlines.
//!
//! In that order, because whatever the clients of one wake-up ask is then written down each lane
//! together, and what the lanes answer lets in what waited behind it.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::sign::CertifiedKey;

use super::hall::{Hall, Secure};
use super::lane::Lanes;
use super::limits::raise_open_files;
use super::listen::{BACKLOG, Listener};
use super::poll::{Poll, Ready, Waker};
use super::tls::{Acceptor, Handshakes, STATE_HELD};
use super::{Counters, LaneAddress, Settings};
use crate::clock::{self, Now};

/// What one read takes at most; all connections share the buffer.
const READ: usize = 64 * 1024;
/// Descriptors besides those of clients: files, Redis, lanes and their servers.
const OTHER_FILES: usize = 64;
/// Where the keys of the lanes begin; 0 is the listener, and clients come after the lanes.
const LANES: usize = 1;

/// The edge, before or while it runs.
pub struct Edge {
    poll: Poll,
    listener: Option<Listener>,
    lanes: Lanes,
    hall: Hall,
    shared: Arc<Shared>,
    local_addr: SocketAddr,
    first_client: usize,
    drain: Duration,
    drained_by_ms: Option<u64>,
    /// To be told when all lanes have answered.
    proving: Option<Answered>,
}

/// Who is told, once, that all lanes have answered.
type Answered = Box<dyn FnOnce() + Send>;

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
    shared: Arc<Shared>,
    waker: Waker,
}

struct Shared {
    stop: AtomicBool,
    ready: AtomicBool,
    asked: AtomicBool,
    /// Who asked last.
    asker: Mutex<Option<Answered>>,
    acceptor: Option<Arc<Acceptor>>,
}

impl Handle {
    /// No new connections; requests in progress are answered; then [`Edge::run`] returns.
    pub fn shutdown(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Shows another TLS certificate to new connections; those that are open go on. Without TLS
    /// nothing changes.
    ///
    /// # Errors
    /// When TLS cannot be set up with it; then the old one stays.
    pub fn replace_certificate(&self, shown: Arc<CertifiedKey>) -> Result<(), rustls::Error> {
        self.shared.acceptor.as_ref().map_or(Ok(()), |acceptor| acceptor.replace(shown))
    }

    /// Has every worker answer a request that goes down its lane like any other; when all have, and
    /// clients are let in, the edge's thread calls `answered`. It is not called while the edge or a
    /// worker hangs; who asks again takes the place of who asked before.
    pub fn prove(&self, answered: impl FnOnce() + Send + 'static) {
        let mut asker = self.shared.asker.lock().unwrap_or_else(PoisonError::into_inner);
        *asker = Some(Box::new(answered));
        self.shared.asked.store(true, Ordering::Release);
        drop(asker);
        self.waker.wake();
    }

    /// All lanes have answered a request at least once.
    pub fn is_ready(&self) -> bool {
        self.shared.ready.load(Ordering::Acquire)
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
        let socket = TcpListener::bind(settings.listen)?;
        let local_addr = socket.local_addr()?;
        let places = settings.max_connections.min(settings.max_connections_per_ip);
        let listener = Listener::new(socket, &poll, places)?;
        let drain = settings.deadlines.drain;
        let first_client = LANES + lanes.len();
        let secure = acceptor.clone().map(|acceptor| {
            Handshakes::start(poll.waker()).map(|handshakes| Secure { acceptor, handshakes })
        });
        let secure = secure.transpose()?;
        Ok(Edge {
            listener: Some(listener),
            lanes: Lanes::new(lanes, LANES, settings.deadlines.work),
            hall: Hall::new(settings, secure),
            shared: Arc::new(Shared {
                stop: AtomicBool::new(false),
                ready: AtomicBool::new(false),
                asked: AtomicBool::new(false),
                asker: Mutex::new(None),
                acceptor,
            }),
            local_addr,
            first_client,
            drain,
            drained_by_ms: None,
            proving: None,
            poll,
        })
    }

    /// Where it listens, the port chosen by the system included.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// For other threads.
    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.shared), waker: self.poll.waker() }
    }

    /// What the edge counts.
    pub fn counters(&self) -> Arc<Counters> {
        self.hall.counters()
    }

    /// Serves until [`Handle::shutdown`] and everyone is answered.
    ///
    /// # Errors
    /// When the readiness queue itself fails.
    pub fn run(mut self) -> io::Result<()> {
        let mut buf = vec![0; READ];
        while !self.is_drained() {
            let limit = self.next_due_in(clock::now());
            self.poll.wait(limit)?;
            self.turn(&mut buf, clock::now());
        }
        Ok(())
    }

    fn turn(&mut self, buf: &mut [u8], now: Now) {
        let mut accept = false;
        for ready in self.poll.ready() {
            match ready.key.checked_sub(self.first_client) {
                Some(at) => self.hall.client_ready(at, ready, &mut self.lanes, buf, now),
                None => accept |= ready.key < LANES,
            }
        }
        self.hall.handshakes_done(&mut self.lanes, now);
        self.flush_lanes(now);
        self.read_lanes(buf, now);
        self.hall.serve_waiting(&mut self.lanes, now);
        self.tend_lanes(now);
        self.prove_lanes(now);
        self.flush_lanes(now);
        if accept || self.listener.as_ref().is_some_and(|l| l.is_due(now.mono_ms)) {
            self.accept(now);
        }
        self.hall.expire(now);
        if self.shared.stop.load(Ordering::Acquire) {
            self.drain(buf, now);
        }
        self.hall.count(&self.lanes);
    }

    fn read_lanes(&mut self, buf: &mut [u8], now: Now) {
        for Ready { key, readable, .. } in self.poll.ready() {
            if let Some(lane) = self.lanes.by_key(key).filter(|_| readable) {
                self.hall.lane_ready(lane, buf, now);
            }
        }
    }

    fn flush_lanes(&mut self, now: Now) {
        for lane in self.lanes.iter_mut() {
            if let Err(e) = lane.flush() {
                let lost = lane.lose(&e.to_string(), now.mono_ms);
                self.hall.lane_lost(lost, now);
            }
        }
    }

    fn tend_lanes(&mut self, now: Now) {
        if self.lanes.next_due().is_some_and(|at| at <= now.mono_ms) {
            for lane in self.lanes.iter_mut() {
                let lost = lane.tend(&self.poll, self.hall.next_number(), now.mono_ms);
                self.hall.lane_lost(lost, now);
            }
        } else if !self.shared.ready.load(Ordering::Relaxed) && self.lanes.are_up() {
            self.shared.ready.store(true, Ordering::Release);
            if let Some(listener) = &mut self.listener {
                listener.open();
            }
        }
    }

    fn prove_lanes(&mut self, now: Now) {
        if self.shared.asked.load(Ordering::Relaxed) {
            let mut asker = self.shared.asker.lock().unwrap_or_else(PoisonError::into_inner);
            // Both under the lock, as they were set: no one who asks now is overlooked.
            self.shared.asked.store(false, Ordering::Relaxed);
            self.proving = asker.take();
            drop(asker);
            for lane in self.lanes.iter_mut() {
                lane.ask_proof(self.hall.next_number(), now.mono_ms);
            }
        }
        let is_ready = self.shared.ready.load(Ordering::Relaxed);
        if is_ready
            && self.lanes.are_proven()
            && let Some(answered) = self.proving.take()
        {
            answered();
        }
    }

    fn accept(&mut self, now: Now) -> bool {
        let Some(listener) = &mut self.listener else { return false };
        let hall = &mut self.hall;
        let poll = &self.poll;
        let first = self.first_client;
        listener.accept(now.mono_ms, &mut |found| hall.arrived(found, poll, first, now))
    }

    /// The listener closes only when everyone who was let in by the system is let in here.
    fn drain(&mut self, buf: &mut [u8], now: Now) {
        if self.drained_by_ms.is_none() {
            let length = u64::try_from(self.drain.as_millis()).unwrap_or(u64::MAX);
            self.drained_by_ms = Some(now.mono_ms.saturating_add(length));
            // Bounded, because new ones may come as fast as they are taken.
            let mut rounds = 0..BACKLOG;
            while self.accept(now) && rounds.next().is_some() {}
            self.listener = None;
            self.hall.begin_drain();
        }
        self.hall.close_idle(&mut self.lanes, buf, now);
        self.flush_lanes(now);
    }

    fn is_drained(&self) -> bool {
        self.drained_by_ms.is_some_and(|by| self.hall.is_empty() || by <= clock::now().mono_ms)
    }

    fn next_due_in(&self, now: Now) -> Option<Duration> {
        let listener = self.listener.as_ref().and_then(Listener::due);
        let due = [self.hall.next_due(), self.lanes.next_due(), listener, self.drained_by_ms];
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
