//! A client's socket: bytes in, bytes out, never waiting.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};

use rustls::ServerConnection;

use super::conn::{Phase, Reader, Request, Step};
use super::head::Origin;
use super::lane::is_transient;
use super::limits::Held;
use super::poll::{Interest, Watched};
use super::proxies::Networks;
use super::unsent::Unsent;
use crate::problem::Code;

/// One connection.
pub struct Client {
    stream: Watched<TcpStream>,
    tls: Option<Box<ServerConnection>>,
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
    /// What the socket did not take yet of the reply.
    out: Unsent,
    /// Bytes that the budget counts for this client.
    pub counted: Held,
    /// Bytes that were read and thrown away since its last reply.
    lingered: usize,
}

/// What an idle TLS connection holds, as measured: 7.6 MB for 1,000.
pub const TLS_HELD: usize = 8 * 1024;

/// What is read after the last reply, so that a client that still sends can read that reply first.
/// More than the rest of any request that we would take; a client that goes on is closed.
const LINGER_BYTES: usize = 1024 * 1024;

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
    /// What came is not TLS; the alert that says so is on its way.
    NotTls,
}

impl Client {
    /// A connection that was just accepted.
    pub fn new(
        stream: Watched<TcpStream>,
        tls: Option<Box<ServerConnection>>,
        peer: IpAddr,
        is_proxy: bool,
    ) -> Self {
        Client {
            stream,
            tls,
            reader: Reader::default(),
            peer,
            is_proxy,
            request: None,
            after: After::KeepAlive,
            is_last: false,
            out: Unsent::default(),
            counted: Held::default(),
            lingered: 0,
        }
    }

    /// Bytes of memory held.
    pub fn held(&self) -> Held {
        let tls = self.tls.as_ref().map_or(0, |tls| TLS_HELD + certificates(tls));
        let (read, unsent) = (self.reader.held(), self.out.held());
        let behind = if self.reader.phase() == Phase::Busy { read } else { 0 };
        Held { all: read + unsent + tls, replies: behind + unsent }
    }

    /// Takes bytes of a request, which has this number; see [`Reader::take`].
    ///
    /// # Errors
    /// Why the request is refused.
    pub fn take(
        &mut self,
        input: &[u8],
        number: u64,
        proxies: &Networks,
        out: &mut Vec<u8>,
    ) -> Result<Step, Code> {
        let chain = self.tls.as_ref().and_then(|tls| tls.peer_certificates());
        let origin = Origin {
            number,
            peer: self.peer,
            proxies: self.is_proxy.then_some(proxies),
            certificate: chain.and_then(|chain| chain.first()).map(|leaf| leaf.as_ref()),
        };
        self.reader.take(input, origin, out)
    }

    /// Nothing is left to write.
    pub fn is_flushed(&self) -> bool {
        self.out.is_empty() && !self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Throws away what waits behind the request in work, which is the last one then: what follows
    /// would begin in the middle of what was thrown away.
    pub fn drop_pending(&mut self) {
        self.is_last = true;
        // The head of the reply may be out already, and promise more than is kept.
        self.after = After::Close;
        self.reader.drop_pending();
    }

    /// Reads once.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<Input> {
        match &mut self.tls {
            Some(tls) if self.after != After::Lingering => {
                let input = read_tls(tls, &self.stream, buf)?;
                self.push()?;
                Ok(input)
            }
            _ => match (&*self.stream).read(buf) {
                Ok(0) => Ok(Input::End),
                Ok(n) => Ok(self.received(n)),
                Err(e) if is_transient(&e) => Ok(Input::Nothing),
                Err(e) => Err(e),
            },
        }
    }

    /// What so many bytes are: input, or what a lingering client may send for a while yet.
    fn received(&mut self, n: usize) -> Input {
        if self.after != After::Lingering {
            return Input::Bytes(n);
        }
        self.lingered += n;
        if self.lingered > LINGER_BYTES { Input::End } else { Input::Nothing }
    }

    /// The TLS handshake is not over.
    pub fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// Writes `bytes`, keeping what the socket does not take; `to_come` more will follow.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn send(&mut self, bytes: &[u8], to_come: usize) -> io::Result<()> {
        let taken = match &mut self.tls {
            _ if !self.out.is_empty() => 0,
            Some(tls) if !tls.wants_write() => tls.writer().write(first_record(bytes))?,
            Some(_) => 0,
            None => write(&self.stream, bytes)?,
        };
        let kept = rest(bytes, taken);
        self.out.push(kept, to_come);
        if self.tls.is_some() { self.push() } else { self.arm() }
    }

    /// Writes what was kept.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn push(&mut self) -> io::Result<()> {
        loop {
            let piece = self.out.first();
            let done = match &mut self.tls {
                Some(tls) => push_tls(tls, &self.stream, piece)?,
                None => write(&self.stream, piece)?,
            };
            let whole = done == piece.len();
            self.out.advance(done);
            if !whole || self.out.is_empty() {
                break;
            }
        }
        self.arm()
    }

    /// Stops reading until [`Client::resume`]: what comes now waits in the socket.
    ///
    /// # Errors
    /// When the queue refuses.
    pub fn pause(&mut self) -> io::Result<()> {
        self.stream.set(Interest { read: false, write: !self.is_flushed() })
    }

    /// Reads again.
    ///
    /// # Errors
    /// When the queue refuses.
    pub fn resume(&mut self) -> io::Result<()> {
        self.stream.set(Interest { read: true, write: !self.is_flushed() })
    }

    fn arm(&mut self) -> io::Result<()> {
        let read = self.stream.interest().read;
        self.stream.set(Interest { read, write: !self.is_flushed() })
    }

    /// Ends the connection from our side, so that the client reads the reply to its end. Closing
    /// at once would throw the reply away if the client still sends (RFC 9112, 9.6).
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn linger(&mut self) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            push_tls(tls, &self.stream, &[])?;
        }
        // The handshake's keys are of no use any more.
        self.tls = None;
        self.after = After::Lingering;
        self.stream.shutdown(Shutdown::Write)?;
        self.resume()
    }
}

/// Bytes of the client's certificates, which rustls keeps as long as the connection.
fn certificates(tls: &ServerConnection) -> usize {
    tls.peer_certificates().unwrap_or_default().iter().map(|der| der.len()).sum()
}

/// Taken from the socket at most once, so that nobody keeps the thread for long.
fn read_tls(tls: &mut ServerConnection, stream: &TcpStream, buf: &mut [u8]) -> io::Result<Input> {
    match tls.read_tls(&mut &*stream) {
        Ok(0) => return Ok(Input::End),
        Ok(_) => {}
        Err(e) if is_transient(&e) => return Ok(Input::Nothing),
        Err(e) => return Err(e),
    }
    if let Err(e) = tls.process_new_packets() {
        log::debug!("TLS: {e}");
        return Ok(Input::NotTls);
    }
    let (mut filled, mut ended) = (0, false);
    while let Some(space) = buf.get_mut(filled..).filter(|space| !space.is_empty()) {
        match tls.reader().read(space) {
            Ok(0) => {
                ended = true;
                break;
            }
            Ok(n) => filled += n,
            Err(e) if is_transient(&e) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(match filled {
        0 if ended => Input::End,
        0 => Input::Nothing,
        n => Input::Bytes(n),
    })
}

/// Encrypts a record at a time, when the last one is out: what waits is held once, in the clear.
/// Returns how many of `bytes` are done with.
fn push_tls(tls: &mut ServerConnection, stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut done = 0;
    loop {
        while tls.wants_write() {
            match tls.write_tls(&mut &*stream) {
                Ok(_) => {}
                Err(e) if is_transient(&e) => return Ok(done),
                Err(e) => return Err(e),
            }
        }
        let record = first_record(rest(bytes, done));
        if record.is_empty() {
            return Ok(done);
        }
        done += tls.writer().write(record)?;
    }
}

/// What one TLS record holds.
fn first_record(bytes: &[u8]) -> &[u8] {
    bytes.get(..16 * 1024).unwrap_or(bytes)
}

fn rest(bytes: &[u8], done: usize) -> &[u8] {
    bytes.get(done..).unwrap_or_default()
}

fn write(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    match (&*stream).write(bytes) {
        Err(e) if is_transient(&e) => Ok(0),
        other => other,
    }
}
