//! The fault harness: a TCP proxy between the program and Redis that breaks in every way a network
//! does, on command.
//!
//! ```text
//!  program ──▶ reader ──▶ queue ──▶ writer ──▶ Redis      `ToRedis`
//!  program ◀── writer ◀── queue ◀── reader ◀── Redis      `ToService`
//! ```
//!
//! A connection has a pipe in each direction, a pipe has a reader and a writer. Readers always read,
//! so nothing backs up and the end of a connection is always seen; what a fault does with the bytes
//! is decided in one place, [`Shared::fate`], by the writers:
//!
//! * [`Mode`] holds for all connections and is switched by [`Proxy::set`].
//! * A **trap** ([`Proxy::trap`]) stops one connection at one moment: when a command whose bytes
//!   contain a pattern is about to reach Redis ([`Stop::Before`]), has reached it up to the end of the
//!   pattern ([`Stop::Within`]), or has reached it and been answered ([`Stop::After`]). The test waits for it, does its damage (kills the program, lets its
//!   time-out pass, kills Redis …) and then releases it or throws away what is held. Bytes held on
//!   their way to Redis are delivered even if the program has closed or died in the meantime: that
//!   is how a command arrives late.
//! * [`Proxy::cut_after`] closes a connection in the middle of a message.
//!
//! A connection that has lost bytes loses all further ones of that direction until it is closed: a
//! network that lost a part of a stream never delivers the rest.
//!
//! To add a fault, add a `Mode` and say in `fate` what becomes of a chunk.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::port::Port;
use super::wait;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToRedis,
    ToService,
}

/// What the network does to all connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Works.
    Pass,
    /// Works, and each way takes this long: a round trip takes twice as long.
    Delay(Duration),
    /// Works, and so many bytes a second go to Redis on each connection.
    Slow(u32),
    /// Commands reach Redis, its replies are lost.
    SwallowReplies,
    /// Connections are accepted, and nothing goes through.
    Blackhole,
    /// Everything sent to Redis is kept and arrives when the mode changes, also on connections
    /// that the program has closed by then; replies pass.
    HoldCommands,
    /// All connections are closed, new ones refused.
    Refuse,
}

/// Where a trap stops its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Before the command reaches Redis, with all that is sent together with it.
    Before,
    /// When all up to the end of the pattern has reached Redis, and nothing behind it: other clients'
    /// commands come in the middle of what was sent in one go.
    Within,
    /// When Redis has answered, before the answer passes.
    After,
}

/// A running proxy. `Drop` closes it and all its connections.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
}

impl Proxy {
    /// A proxy in front of 127.0.0.1:`target`, which need not run yet.
    pub fn start(target: u16) -> Proxy {
        let port = Port::any();
        let listener = listen_on(&port);
        let shared = Arc::new(Shared {
            port,
            target: AtomicU16::new(target),
            rules: Mutex::new(Rules {
                mode: Mode::Pass,
                traps: vec![],
                cut: None,
                open: vec![],
                closed: false,
            }),
            changed: Condvar::new(),
            bytes: [AtomicU64::new(0), AtomicU64::new(0)],
            accepted: AtomicUsize::new(0),
            transcripts: Mutex::new(vec![]),
        });
        let acceptor = Arc::clone(&shared);
        thread::spawn(move || acceptor.accept(listener));
        Proxy { shared }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.shared.port.number()
    }

    /// `redis://127.0.0.1:<port>`
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port())
    }

    /// Switches the mode; it holds for open connections, too.
    pub fn set(&self, mode: Mode) {
        let mut rules = self.shared.rules();
        if mode == Mode::Refuse {
            rules.close_all();
        }
        let refused = std::mem::replace(&mut rules.mode, mode) == Mode::Refuse;
        drop(rules);
        self.shared.changed.notify_all();
        let refuses = mode == Mode::Refuse;
        if refused != refuses {
            self.shared.wake_acceptor();
            wait::for_true("the proxy listens as it should", || {
                TcpStream::connect(("127.0.0.1", self.port())).is_err() == refuses
            });
        }
    }

    /// Leads to another port from now on, and closes every connection.
    pub fn move_to(&self, port: u16) {
        self.shared.target.store(port, Ordering::SeqCst);
        self.reset();
    }

    /// Closes every connection once; new ones are served.
    pub fn reset(&self) {
        self.shared.rules().close_all();
        self.shared.changed.notify_all();
    }

    /// Closes one connection, once, after `bytes` more have passed this way.
    pub fn cut_after(&self, way: Way, bytes: usize) {
        self.shared.rules().cut = Some((way, bytes));
    }

    /// Stops, once, the connection whose commands contain `pattern`.
    #[must_use]
    pub fn trap(&self, pattern: &str, stop: Stop) -> Trap {
        let state = Arc::new(Mutex::new(TrapState::Armed));
        let shared = Arc::clone(&self.shared);
        let trap = Trap { shared, state: Arc::clone(&state) };
        self.shared.rules().traps.push(Armed { pattern: pattern.as_bytes().to_vec(), stop, state });
        trap
    }

    /// Bytes that have passed this way.
    pub fn bytes(&self, way: Way) -> u64 {
        self.shared.bytes[way as usize].load(Ordering::SeqCst)
    }

    /// Connections accepted until now.
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.shared.rules().open.len()
    }

    /// The commands delivered to Redis, each with its words, connection by connection; of each
    /// connection the first 4 MiB.
    pub fn commands(&self) -> Vec<Vec<String>> {
        self.shared.transcripts.lock().unwrap().iter().flat_map(|t| parse_commands(t)).collect()
    }

    /// How often a command with this name was delivered.
    pub fn count(&self, name: &str) -> usize {
        self.commands().iter().filter(|words| words[0].eq_ignore_ascii_case(name)).count()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut rules = self.shared.rules();
        rules.closed = true;
        rules.close_all();
        drop(rules);
        self.shared.changed.notify_all();
        self.shared.wake_acceptor();
    }
}

/// A trap that was set. Dropping it releases what it holds.
#[derive(Debug)]
pub struct Trap {
    shared: Arc<Shared>,
    state: Arc<Mutex<TrapState>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TrapState {
    Armed,
    /// [`Stop::After`]: the command is on its way to Redis; its reply will spring the trap.
    Answering,
    Sprung,
    Released,
    /// What is held is thrown away and the connection closed.
    Dropped,
}

impl Trap {
    /// Waits until a command ran into it.
    #[track_caller]
    pub fn wait(&self) {
        wait::for_true("a command runs into the trap", || self.is_sprung());
    }

    pub fn is_sprung(&self) -> bool {
        *self.state.lock().unwrap() == TrapState::Sprung
    }

    /// Lets through what is held, and all that follows.
    pub fn release(&self) {
        self.change(TrapState::Released);
    }

    /// Throws away what is held and closes the connection.
    pub fn throw_away(&self) {
        self.change(TrapState::Dropped);
    }

    fn change(&self, to: TrapState) {
        let rules = self.shared.rules(); // so that no writer misses it between its look and its wait
        *self.state.lock().unwrap() = to;
        drop(rules);
        self.shared.changed.notify_all();
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        if !matches!(*self.state.lock().unwrap(), TrapState::Released | TrapState::Dropped) {
            self.release();
        }
    }
}

#[derive(Debug)]
struct Armed {
    pattern: Vec<u8>,
    stop: Stop,
    state: Arc<Mutex<TrapState>>,
}

/// All that is shared by the threads of a proxy.
#[derive(Debug)]
struct Shared {
    port: Port,
    target: AtomicU16,
    rules: Mutex<Rules>,
    changed: Condvar,
    bytes: [AtomicU64; 2],
    accepted: AtomicUsize,
    /// What each connection delivered to Redis.
    transcripts: Mutex<Vec<Vec<u8>>>,
}

#[derive(Debug)]
struct Rules {
    mode: Mode,
    traps: Vec<Armed>,
    cut: Option<(Way, usize)>,
    open: Vec<Arc<Link>>,
    closed: bool,
}

impl Rules {
    fn close_all(&mut self) {
        for link in self.open.drain(..) {
            link.close();
        }
    }
}

/// One connection: both sockets and its two pipes.
#[derive(Debug)]
struct Link {
    number: usize,
    service: TcpStream,
    redis: TcpStream,
    pipes: [Pipe; 2],
    /// The trap that this connection ran into.
    trap: Mutex<Option<(Stop, Arc<Mutex<TrapState>>)>>,
}

#[derive(Debug, Default)]
struct Pipe {
    queue: Mutex<VecDeque<Chunk>>,
    filled: Condvar,
    lossy: Mutex<bool>,
    /// The end of the last chunk: a pattern may lie across two.
    tail: Mutex<Vec<u8>>,
}

/// Bytes with the time when they came; none: the end of the stream.
#[derive(Debug)]
struct Chunk {
    at: Instant,
    bytes: Vec<u8>,
}

impl Link {
    fn close(&self) {
        let _ = self.service.shutdown(Shutdown::Both);
        let _ = self.redis.shutdown(Shutdown::Both);
    }

    fn from(&self, way: Way) -> &TcpStream {
        if way == Way::ToRedis { &self.service } else { &self.redis }
    }

    fn to(&self, way: Way) -> &TcpStream {
        if way == Way::ToRedis { &self.redis } else { &self.service }
    }

    fn trapped(&self) -> Option<(Stop, TrapState)> {
        let trap = self.trap.lock().unwrap();
        trap.as_ref().map(|(stop, state)| (*stop, *state.lock().unwrap()))
    }
}

/// What becomes of a chunk.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Forward,
    Wait,
    WaitUntil(Instant),
    Lose,
    /// Forward so many bytes, then close.
    Cut(usize),
    Close,
}

impl Shared {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What becomes of `chunk` now; asked again when the rules change, until it goes or is lost.
    fn fate(&self, rules: &mut Rules, link: &Link, way: Way, chunk: &Chunk) -> Fate {
        let end = chunk.bytes.is_empty();
        match (way, link.trapped()) {
            (_, Some((_, TrapState::Dropped))) => return Fate::Close,
            (Way::ToRedis, Some((Stop::Before | Stop::Within, TrapState::Sprung))) => {
                return Fate::Wait;
            }
            (Way::ToService, Some((Stop::After, state))) => match state {
                TrapState::Answering => {
                    set_trap(link, TrapState::Sprung);
                    return Fate::Wait;
                }
                TrapState::Sprung => return Fate::Wait,
                _ => {}
            },
            _ => {}
        }
        let lossy = *link.pipes[way as usize].lossy.lock().unwrap();
        match rules.mode {
            _ if lossy && end => return Fate::Close,
            Mode::Blackhole => return if end { Fate::Close } else { Fate::Lose },
            Mode::SwallowReplies if way == Way::ToService && !end => return Fate::Lose,
            Mode::HoldCommands if way == Way::ToRedis => return Fate::Wait,
            Mode::Delay(by) if chunk.at.elapsed() < by => return Fate::WaitUntil(chunk.at + by),
            _ if lossy => return Fate::Lose,
            _ => {}
        }
        match rules.cut {
            Some((cut_way, left)) if cut_way == way && !end => {
                if left < chunk.bytes.len() {
                    rules.cut = None;
                    return Fate::Cut(left);
                }
                rules.cut = Some((way, left - chunk.bytes.len()));
                Fate::Forward
            }
            _ => Fate::Forward,
        }
    }

    fn accept(self: Arc<Self>, mut listener: TcpListener) {
        loop {
            while let Ok((service, _)) = listener.accept() {
                let rules = self.rules();
                if rules.closed {
                    return;
                }
                if rules.mode == Mode::Refuse {
                    break;
                }
                drop(rules);
                self.serve(service);
            }
            drop(listener); // from here on connections are refused
            let mut rules = self.rules();
            while rules.mode == Mode::Refuse && !rules.closed {
                rules = self.changed.wait(rules).unwrap();
            }
            if rules.closed {
                return;
            }
            drop(rules);
            listener = listen_on(&self.port);
        }
    }

    /// An `accept` ends only by a connection.
    fn wake_acceptor(&self) {
        let _ = TcpStream::connect(("127.0.0.1", self.port.number()));
    }

    fn serve(self: &Arc<Self>, service: TcpStream) {
        // A target that is away: the connection is accepted and closed, as a forwarder would.
        let Ok(redis) = TcpStream::connect(("127.0.0.1", self.target.load(Ordering::SeqCst)))
        else {
            return;
        };
        let _ = (service.set_nodelay(true), redis.set_nodelay(true));
        let number = self.accepted.fetch_add(1, Ordering::SeqCst);
        self.transcripts.lock().unwrap().push(vec![]);
        let link = Arc::new(Link {
            number,
            service,
            redis,
            pipes: [Pipe::default(), Pipe::default()],
            trap: Mutex::new(None),
        });
        let mut rules = self.rules();
        if rules.closed || rules.mode == Mode::Refuse {
            return;
        }
        rules.open.push(Arc::clone(&link));
        drop(rules);
        for way in [Way::ToRedis, Way::ToService] {
            let (shared, reading) = (Arc::clone(self), Arc::clone(&link));
            thread::spawn(move || reading.read(way));
            let writing = Arc::clone(&link);
            thread::spawn(move || shared.write(&writing, way));
        }
    }

    fn write(&self, link: &Arc<Link>, way: Way) {
        loop {
            match self.deliver(link, way, &link.pipes[way as usize].next()) {
                After::Next => {}
                After::HalfClosed => return, // the other pipe closes when Redis does
                After::Closed => break,
            }
        }
        link.close();
        self.rules().open.retain(|open| !Arc::ptr_eq(open, link));
    }

    /// Does with the chunk what the rules say.
    fn deliver(&self, link: &Link, way: Way, chunk: &Chunk) -> After {
        let mut rules = self.rules();
        let sprung = if way == Way::ToRedis { spring(&mut rules, link, chunk) } else { None };
        let Some(at) = sprung else { return self.deliver_whole(rules, link, way, chunk) };
        let (ahead, rest) = chunk.bytes.split_at(at);
        if !ahead.is_empty() {
            self.send(link, way, ahead);
        }
        self.deliver_whole(rules, link, way, &Chunk { at: chunk.at, bytes: rest.to_vec() })
    }

    fn deliver_whole(
        &self,
        mut rules: MutexGuard<'_, Rules>,
        link: &Link,
        way: Way,
        chunk: &Chunk,
    ) -> After {
        loop {
            if rules.closed {
                return After::Closed;
            }
            match self.fate(&mut rules, link, way, chunk) {
                Fate::Wait => rules = self.changed.wait(rules).unwrap(),
                Fate::WaitUntil(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    rules = self.changed.wait_timeout(rules, left).unwrap().0;
                }
                Fate::Forward => {
                    let mode = rules.mode;
                    drop(rules);
                    if let (Mode::Slow(rate), Way::ToRedis) = (mode, way) {
                        let bytes = u32::try_from(chunk.bytes.len()).unwrap();
                        thread::sleep(Duration::from_secs(1) * bytes / rate);
                    }
                    return self.send(link, way, &chunk.bytes);
                }
                Fate::Lose => {
                    *link.pipes[way as usize].lossy.lock().unwrap() = true;
                    return After::Next;
                }
                Fate::Cut(bytes) => {
                    drop(rules);
                    self.send(link, way, &chunk.bytes[..bytes]);
                    return After::Closed;
                }
                Fate::Close => return After::Closed,
            }
        }
    }

    fn send(&self, link: &Link, way: Way, bytes: &[u8]) -> After {
        let mut to = link.to(way);
        if bytes.is_empty() {
            let _ = to.shutdown(Shutdown::Write);
            return if way == Way::ToRedis { After::HalfClosed } else { After::Closed };
        }
        self.bytes[way as usize].fetch_add(bytes.len() as u64, Ordering::SeqCst);
        if way == Way::ToRedis {
            let mut transcripts = self.transcripts.lock().unwrap();
            let transcript = &mut transcripts[link.number];
            if transcript.len() < 4 << 20 {
                transcript.extend_from_slice(bytes);
            }
        }
        // A program that is gone does not keep Redis from getting what was on its way.
        if to.write_all(bytes).is_ok() || way == Way::ToService {
            After::Next
        } else {
            After::Closed
        }
    }
}

/// What the writer of a pipe does after a chunk.
enum After {
    Next,
    HalfClosed,
    Closed,
}

/// Looks whether commands run into a trap that is armed. Answers how much of the chunk is to pass
/// nevertheless, if it is a trap in the middle.
fn spring(rules: &mut Rules, link: &Link, chunk: &Chunk) -> Option<usize> {
    let mut tail = link.pipes[Way::ToRedis as usize].tail.lock().unwrap();
    let before = tail.len();
    tail.extend_from_slice(&chunk.bytes);
    let end_in = |trap: &Armed| {
        let armed = *trap.state.lock().unwrap() == TrapState::Armed;
        let at = tail.windows(trap.pattern.len()).position(|w| armed && w == trap.pattern)?;
        Some((at + trap.pattern.len()).saturating_sub(before))
    };
    let hit = rules.traps.iter().enumerate().find_map(|(n, trap)| Some((n, end_in(trap)?)));
    let mut passes = None;
    if let Some((at, end)) = hit {
        let Armed { stop, state, .. } = rules.traps.remove(at);
        *link.trap.lock().unwrap() = Some((stop, state));
        let next = if stop == Stop::After { TrapState::Answering } else { TrapState::Sprung };
        set_trap(link, next);
        passes = (stop == Stop::Within).then_some(end);
    }
    let keep = rules.traps.iter().map(|trap| trap.pattern.len()).max().unwrap_or_default();
    let cut = tail.len().saturating_sub(keep);
    tail.drain(..cut);
    passes
}

fn set_trap(link: &Link, to: TrapState) {
    if let Some((_, state)) = &*link.trap.lock().unwrap() {
        *state.lock().unwrap() = to;
    }
}

impl Link {
    fn read(&self, way: Way) {
        let mut from = self.from(way);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let n = from.read(&mut buffer).unwrap_or(0);
            self.pipes[way as usize]
                .push(Chunk { at: Instant::now(), bytes: buffer[..n].to_vec() });
            if n == 0 {
                return;
            }
        }
    }
}

impl Pipe {
    fn push(&self, chunk: Chunk) {
        self.queue.lock().unwrap().push_back(chunk);
        self.filled.notify_one();
    }

    /// The next chunk; the last is the end of the stream.
    fn next(&self) -> Chunk {
        let mut queue = self.queue.lock().unwrap();
        loop {
            if let Some(chunk) = queue.pop_front() {
                return chunk;
            }
            queue = self.filled.wait(queue).unwrap();
        }
    }
}

pub(super) fn listen_on(port: &Port) -> TcpListener {
    TcpListener::bind(("127.0.0.1", port.number())).unwrap()
}

/// Reads commands in the protocol's own form; stops at what is not one.
pub(super) fn parse_commands(mut bytes: &[u8]) -> Vec<Vec<String>> {
    fn number(bytes: &mut &[u8], mark: u8) -> Option<usize> {
        let end = bytes.windows(2).position(|w| w == b"\r\n")?;
        let (first, digits) = bytes[..end].split_first()?;
        let n = str::from_utf8(digits).ok()?.parse().ok()?;
        *bytes = &bytes[end + 2..];
        (*first == mark).then_some(n)
    }
    fn command(bytes: &mut &[u8]) -> Option<Vec<String>> {
        let words = number(bytes, b'*')?;
        (0..words)
            .map(|_| {
                let length = number(bytes, b'$')?;
                let word = String::from_utf8_lossy(bytes.get(..length)?).into_owned();
                *bytes = bytes.get(length + 2..)?;
                Some(word)
            })
            .collect()
    }
    let mut all = vec![];
    while let Some(words) = command(&mut bytes).filter(|w| !w.is_empty()) {
        all.push(words);
    }
    all
}
