//! The listening socket. After any error of `accept`, accepting goes on.

use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};

use super::poll::{Interest, Poll, READ, Watched};

pub const KEY: usize = 0;
/// Connections that the system holds for us, if it allows as many; where there is no room, the
/// client's SYN is dropped, and it waits a second before it tries again.
pub const BACKLOG: u16 = 4096;
/// Connections taken in one go, so that those who are in already do not wait for all who come.
const AT_ONCE_MAX: usize = 256;
/// The pause when descriptors or memory are short: the sockets wait in the backlog meanwhile.
const PAUSE_MS: u64 = 100;
/// Pauses come ten a second while it lasts; the log gets one line in so many milliseconds.
const WARN_EVERY_MS: u64 = 60_000;

pub struct Listener {
    socket: Watched<TcpListener>,
    paused_until_ms: Option<u64>,
    next_warning_ms: u64,
    at_once: usize,
}

pub enum Arrival {
    Client(TcpStream, IpAddr),
    /// No descriptor or no memory is left: some connection should be closed.
    Shortage,
}

impl Listener {
    /// Takes the socket. No client is let in before [`Listener::open`]; one that comes earlier waits in
    /// the system's queue. `places` is how many connections there may be: no more than a quarter are
    /// accepted at once, so that no connection has to give way before it was first read.
    pub fn new(socket: TcpListener, poll: &Poll, places: usize) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        // Listening again only lengthens the queue, which the standard library keeps at 128.
        rustix::net::listen(&socket, BACKLOG.into())?;
        let socket = poll.watch(socket, KEY, Interest::empty())?;
        let at_once = (places / 4).clamp(1, AT_ONCE_MAX);
        Ok(Listener { socket, paused_until_ms: None, next_warning_ms: 0, at_once })
    }

    pub fn open(&mut self) {
        self.set(READ);
    }

    /// When accepting goes on after a pause.
    pub fn due(&self) -> Option<u64> {
        self.paused_until_ms
    }

    pub fn is_due(&self, now_ms: u64) -> bool {
        self.paused_until_ms.is_some_and(|until| until <= now_ms)
    }

    /// Accepts the clients that wait, up to the bound. Returns true if more may wait.
    pub fn accept(&mut self, now_ms: u64, arrived: &mut dyn FnMut(Arrival)) -> bool {
        if self.is_due(now_ms) {
            self.paused_until_ms = None;
            self.set(READ);
        }
        if self.paused_until_ms.is_some() {
            return false;
        }
        for _ in 0..self.at_once {
            match self.socket.accept() {
                Ok((stream, peer)) => arrived(Arrival::Client(stream, peer.ip().to_canonical())),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
                Err(e) if is_about_one_client(&e) => {}
                Err(e) => {
                    self.pause(&e, now_ms);
                    arrived(Arrival::Shortage);
                    return false;
                }
            }
        }
        true
    }

    fn pause(&mut self, why: &io::Error, now_ms: u64) {
        if self.next_warning_ms <= now_ms {
            self.next_warning_ms = now_ms + WARN_EVERY_MS;
            log::warn!("accepting no connections for {PAUSE_MS} ms at a time: {why}");
        }
        self.paused_until_ms = Some(now_ms + PAUSE_MS);
        self.set(Interest::empty());
    }

    fn set(&mut self, interest: Interest) {
        if let Err(e) = self.socket.set(interest) {
            log::error!("cannot watch the listener: {e}");
        }
    }
}

/// The connection was gone before it was taken; on Linux also its network errors (accept(2)).
fn is_about_one_client(e: &io::Error) -> bool {
    use io::ErrorKind as K;
    let gone = [
        K::ConnectionAborted,
        K::ConnectionReset,
        K::Interrupted,
        K::NetworkDown,
        K::NetworkUnreachable,
        K::HostUnreachable,
        K::PermissionDenied,
        K::TimedOut,
    ];
    gone.contains(&e.kind())
}
