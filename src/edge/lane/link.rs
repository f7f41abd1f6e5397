//! A lane's Unix connection to its worker's server, which is opened, proven, used and lost.
//!
//! Only requests go through it. The worker's side must not write to it: if a byte comes back the lane is
//! given up, as it is when the connection ends.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::edge::poll::{Interest, Poll, Watched, is_transient};

/// The connection.
pub enum Link {
    /// Closed until then.
    Down(u64),
    /// Open; it must answer a request by then before it is used.
    Proving(Watched<UnixStream>, u64),
    /// In use.
    Up(Watched<UnixStream>),
}

impl Link {
    /// Connects. Does not wait: a full backlog is an error like any other.
    pub fn open(path: &Path, poll: &Poll, key: usize) -> io::Result<Watched<UnixStream>> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        poll.watch(UnixStream::from(socket), key, Interest::READ)
    }

    /// Whether it is in use.
    pub fn is_up(&self) -> bool {
        matches!(self, Link::Up(_))
    }

    /// An answer came, so the lane works. Returns true if that was not known until now.
    pub fn proven(&mut self) -> bool {
        match std::mem::replace(self, Link::Down(0)) {
            Link::Proving(stream, _) => {
                *self = Link::Up(stream);
                true
            }
            other => {
                *self = other;
                false
            }
        }
    }

    /// Writes what the socket takes of `bytes`, and waits for room for the rest.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(stream) = self.stream().filter(|_| !bytes.is_empty()) else { return Ok(0) };
        let n = match (&**stream).write(bytes) {
            Ok(n) => n,
            Err(e) if is_transient(&e) => 0,
            Err(e) => return Err(e),
        };
        stream.set(Interest { read: true, write: n < bytes.len() })?;
        Ok(n)
    }

    /// Returns why the connection is lost, if it is; for when its socket is readable.
    pub fn lost(&mut self) -> Option<String> {
        match (&**self.stream()?).read(&mut [0]) {
            Ok(0) => Some("closed by the worker's side".into()),
            Ok(_) => Some("the worker's side wrote to it".into()),
            Err(e) if is_transient(&e) => None,
            Err(e) => Some(e.to_string()),
        }
    }

    fn stream(&mut self) -> Option<&mut Watched<UnixStream>> {
        match self {
            Link::Down(_) => None,
            Link::Proving(stream, _) | Link::Up(stream) => Some(stream),
        }
    }
}
