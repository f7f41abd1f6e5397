//! A client's socket: bytes in, bytes out, never waiting.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};

use super::conn::{Reader, Request};
use super::lane::is_transient;
use super::poll::{Interest, Watched};

/// One connection.
pub struct Client {
    stream: Watched<TcpStream>,
    /// Its requests.
    pub reader: Reader,
    /// The peer, which may be a proxy.
    pub peer: IpAddr,
    /// The peer is a trusted proxy.
    pub is_proxy: bool,
    /// The request that is in a lane.
    pub request: Option<Request>,
    /// What happens when the present reply is out.
    pub after: After,
    /// No request after this one: what was sent behind it was thrown away.
    pub is_last: bool,
    /// Reply bytes that the socket did not take yet, and how many of them it took since.
    out: Vec<u8>,
    written: usize,
    /// Bytes that the budget counts for this client.
    pub counted: usize,
}

/// What happens when a reply is out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The client may send the next request.
    KeepAlive,
    /// The connection ends.
    Close,
    /// It has ended from our side; what the client still sends is thrown away.
    Lingering,
}

/// What a read gave.
pub enum Input {
    /// So many bytes.
    Bytes(usize),
    /// Nothing yet.
    Nothing,
    /// The client will send no more.
    End,
}

impl Client {
    /// A connection that was just accepted.
    pub fn new(stream: Watched<TcpStream>, peer: IpAddr, is_proxy: bool) -> Self {
        Client {
            stream,
            reader: Reader::default(),
            peer,
            is_proxy,
            request: None,
            after: After::KeepAlive,
            is_last: false,
            out: Vec::new(),
            written: 0,
            counted: 0,
        }
    }

    /// Bytes of memory held.
    pub fn held(&self) -> usize {
        self.reader.held() + self.out.capacity()
    }

    /// Nothing is left to write.
    pub fn is_flushed(&self) -> bool {
        self.out.is_empty()
    }

    /// Reads once.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<Input> {
        match (&*self.stream).read(buf) {
            Ok(0) => Ok(Input::End),
            Ok(n) => Ok(Input::Bytes(n)),
            Err(e) if is_transient(&e) => Ok(Input::Nothing),
            Err(e) => Err(e),
        }
    }

    /// Writes `bytes`, keeping what the socket does not take.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let taken = if self.out.is_empty() { self.write(bytes)? } else { 0 };
        self.out.extend_from_slice(bytes.get(taken..).unwrap_or_default());
        self.arm()
    }

    /// Writes what was kept.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn flush(&mut self) -> io::Result<()> {
        let left = self.out.get(self.written..).unwrap_or_default();
        match (&*self.stream).write(left) {
            Ok(n) => self.written += n,
            Err(e) if is_transient(&e) => {}
            Err(e) => return Err(e),
        }
        if self.written == self.out.len() {
            self.out = Vec::new();
            self.written = 0;
        }
        self.arm()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match (&*self.stream).write(bytes) {
            Ok(n) => Ok(n),
            Err(e) if is_transient(&e) => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// Stops reading until [`Client::resume`]: what comes now waits in the socket.
    ///
    /// # Errors
    /// When the queue refuses.
    pub fn pause(&mut self) -> io::Result<()> {
        self.stream.set(Interest { read: false, write: !self.out.is_empty() })
    }

    /// Reads again.
    ///
    /// # Errors
    /// When the queue refuses.
    pub fn resume(&mut self) -> io::Result<()> {
        self.stream.set(Interest { read: true, write: !self.out.is_empty() })
    }

    fn arm(&mut self) -> io::Result<()> {
        let read = self.stream.interest().read;
        self.stream.set(Interest { read, write: !self.out.is_empty() })
    }

    /// Ends the connection from our side, so that the client reads the reply to its end. Closing
    /// at once would throw the reply away if the client still sends (RFC 9112, 9.6).
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn linger(&mut self) -> io::Result<()> {
        self.after = After::Lingering;
        self.stream.shutdown(Shutdown::Write)?;
        self.resume()
    }
}
