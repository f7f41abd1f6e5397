//! Connections that we open: one deadline ends whatever would wait longer.
//!
//! The time-outs of a socket count for each call. Here what is left until the deadline is set before
//! a call, so that a peer that sends a byte now and then cannot hold anybody for longer.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags, recv, send};
pub use socket2::SockAddr;
use socket2::{Domain, Socket, TcpKeepalive, Type};

/// A time-out is set anew when it is off by more than this; setting it for every call would cost a
/// system call each.
const GRAIN: Duration = Duration::from_millis(5);
/// A peer that a dead NAT path hides is noticed after about a minute of silence.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// A connected socket with a deadline.
pub struct TimedSocket {
    socket: Socket,
    deadline: Instant,
    /// False while what would wait is to fail instead.
    waits: bool,
    /// The time-outs that the socket has now.
    read_timeout: Duration,
    write_timeout: Duration,
}

impl TimedSocket {
    /// Connects by TCP or to a Unix socket. The deadline counts until another is set.
    pub fn connect(address: &SockAddr, deadline: Instant) -> io::Result<Self> {
        let socket = Socket::new(address.domain(), Type::STREAM, None)?;
        let left = time_left(deadline)?;
        if address.domain() == Domain::UNIX {
            // Waits only while the other side has taken none of many connections.
            socket.set_write_timeout(Some(left))?;
            socket.connect(address)?;
        } else {
            socket.connect_timeout(address, left)?;
            socket.set_tcp_nodelay(true)?;
            let keepalive = TcpKeepalive::new()
                .with_time(KEEPALIVE_IDLE)
                .with_interval(KEEPALIVE_EVERY)
                .with_retries(KEEPALIVE_PROBES);
            socket.set_tcp_keepalive(&keepalive)?;
        }
        let (read_timeout, write_timeout) = (Duration::ZERO, Duration::ZERO);
        Ok(TimedSocket { socket, deadline, waits: true, read_timeout, write_timeout })
    }

    /// What is read and written from now on has to end before `deadline`.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// Whether what finds nothing to read, or no room, waits for it, or fails with `WouldBlock`.
    pub fn set_waiting(&mut self, waits: bool) {
        self.waits = waits;
    }
}

impl Read for TimedSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.waits {
            return Ok(recv(&self.socket, buffer, RecvFlags::DONTWAIT)?.0);
        }
        let left = time_left(self.deadline)?;
        if self.read_timeout.abs_diff(left) > GRAIN {
            self.socket.set_read_timeout(Some(left))?;
            self.read_timeout = left;
        }
        self.socket.read(buffer)
    }
}

impl Write for TimedSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.waits {
            return Ok(send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?);
        }
        let left = time_left(self.deadline)?;
        if self.write_timeout.abs_diff(left) > GRAIN {
            self.socket.set_write_timeout(Some(left))?;
            self.write_timeout = left;
        }
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

pub fn deadline_in(limit: Duration) -> Instant {
    Instant::now() + limit
}

/// What is left until `deadline`.
/// `TimedOut` if that is nothing.
pub fn time_left(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))
}

/// True if an operation failed because it was not done in time.
pub fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}
