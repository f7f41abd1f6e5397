//! A client's socket: bytes in, bytes out, never waiting.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};

use super::conn::{Phase, Reader, Request, Step};
use super::head::Origin;
use super::lane::is_transient;
use super::limits::Held;
use super::poll::{Interest, Watched};
use super::proxies::Networks;
use super::tls::{Received, Stream};
use super::unsent::Unsent;
use crate::http::Classify;
use crate::problem::Code;

/// One connection.
pub struct Client {
    stream: Watched<TcpStream>,
    tls: Tls,
    /// Its requests.
    pub reader: Reader,
    /// The peer, which may be a proxy.
    pub peer: IpAddr,
    /// The peer is a trusted proxy.
    pub is_proxy: bool,
    /// No other connection has had this number.
    pub serial: u64,
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

/// What stands between the socket and the requests.
pub enum Tls {
    /// Nothing.
    None,
    /// TLS.
    Here(Box<Stream>),
    /// A step of its handshake is being computed; so many bytes are held for it.
    Away(usize),
}

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
    /// So many bytes in the buffer.
    Bytes(usize),
    /// Bytes that were encrypted, in the other buffer.
    Decrypted,
    /// A step of the TLS handshake is to be computed.
    Handshake,
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
        tls: Tls,
        peer: IpAddr,
        is_proxy: bool,
        serial: u64,
    ) -> Self {
        Client {
            stream,
            tls,
            reader: Reader::default(),
            peer,
            is_proxy,
            serial,
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
        let tls = match &self.tls {
            Tls::None => 0,
            Tls::Here(tls) => tls.held(),
            Tls::Away(held) => *held,
        };
        let (read, unsent) = (self.reader.held(), self.out.held());
        let behind = if self.reader.phase() == Phase::Busy { read } else { 0 };
        Held { all: read + unsent + tls, replies: behind + unsent }
    }

    /// Of these, what the client has sent of a request that is not whole.
    pub fn unfinished(&self) -> usize {
        match (&self.tls, self.reader.phase()) {
            (_, Phase::Busy) => 0,
            (Tls::Here(tls), _) => self.reader.held() + tls.unread(),
            _ => self.reader.held(),
        }
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
        classify: Classify,
        out: &mut Vec<u8>,
    ) -> Result<Step, Code> {
        let certificate = match &self.tls {
            Tls::Here(tls) => tls.client_certificate(),
            Tls::None | Tls::Away(_) => None,
        };
        let origin = Origin {
            number,
            peer: self.peer,
            proxies: self.is_proxy.then_some(proxies),
            certificate,
            classify,
        };
        self.reader.take(input, origin, out)
    }

    /// Nothing is left to write.
    pub fn is_flushed(&self) -> bool {
        self.out.is_empty() && !matches!(&self.tls, Tls::Here(tls) if !tls.is_flushed())
    }

    /// Throws away what waits behind the request in work, which is the last one then: what follows
    /// would begin in the middle of what was thrown away.
    pub fn drop_pending(&mut self) {
        self.is_last = true;
        // The head of the reply may be out already, and promise more than is kept.
        self.after = After::Close;
        self.reader.drop_pending();
    }

    /// Reads once: into `buf` what is not encrypted, into `plain` what was.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn read(&mut self, buf: &mut [u8], plain: &mut Vec<u8>) -> io::Result<Input> {
        let most = match &self.tls {
            Tls::Here(tls) => tls.takes().min(buf.len()),
            Tls::Away(_) => return self.pause().map(|()| Input::Nothing),
            Tls::None => buf.len(),
        };
        let n = match (&*self.stream).read(buf.get_mut(..most).unwrap_or_default()) {
            Ok(0) => return Ok(Input::End),
            Ok(n) => n,
            Err(e) if is_transient(&e) => return Ok(Input::Nothing),
            Err(e) => return Err(e),
        };
        match &mut self.tls {
            Tls::Here(tls) if tls.is_handshaking() => {
                tls.put(buf.get(..n).unwrap_or_default());
                Ok(Input::Handshake)
            }
            Tls::Here(tls) => {
                let received = tls.receive(buf.get_mut(..n).unwrap_or_default(), plain);
                self.understood(received, plain)
            }
            _ => Ok(self.received(n)),
        }
    }

    /// Gives away the TLS for a step of the handshake.
    pub fn lend_tls(&mut self) -> Option<Box<Stream>> {
        match std::mem::replace(&mut self.tls, Tls::None) {
            Tls::Here(tls) => {
                self.tls = Tls::Away(tls.held());
                Some(tls)
            }
            other => {
                self.tls = other;
                None
            }
        }
    }

    /// Takes the TLS back, with what became of the step.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn return_tls(
        &mut self,
        tls: Box<Stream>,
        outcome: Result<Received, rustls::Error>,
        plain: &[u8],
    ) -> io::Result<Input> {
        self.tls = Tls::Here(tls);
        self.resume()?;
        self.understood(outcome, plain)
    }

    /// Whether the TLS is lent.
    pub fn is_tls_away(&self) -> bool {
        matches!(self.tls, Tls::Away(_))
    }

    /// Writes what TLS has to say to what it received.
    fn understood(
        &mut self,
        received: Result<Received, rustls::Error>,
        plain: &[u8],
    ) -> io::Result<Input> {
        self.push()?;
        Ok(match received {
            Ok(_) if !plain.is_empty() => Input::Decrypted,
            Ok(Received::Taken) => Input::Nothing,
            Ok(Received::End) => Input::End,
            Err(e) => {
                log::debug!("TLS: {e}");
                Input::NotTls
            }
        })
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
        match &self.tls {
            Tls::None => false,
            Tls::Here(tls) => tls.is_handshaking(),
            Tls::Away(_) => true,
        }
    }

    /// Writes `bytes`, keeping what the socket does not take; `to_come` more will follow.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn send(&mut self, bytes: &[u8], to_come: usize) -> io::Result<()> {
        let taken = match &mut self.tls {
            _ if !self.out.is_empty() => 0,
            Tls::None => write(&self.stream, bytes)?,
            Tls::Here(tls) => tls.send(bytes).map_err(io::Error::other)?,
            Tls::Away(_) => return Err(io::ErrorKind::NotConnected.into()),
        };
        self.out.push(rest(bytes, taken), to_come);
        self.push()
    }

    /// Writes what was kept.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn push(&mut self) -> io::Result<()> {
        loop {
            let piece = self.out.first();
            let done = match &mut self.tls {
                Tls::None => write(&self.stream, piece)?,
                Tls::Here(tls) => push_tls(tls, &self.stream, piece)?,
                Tls::Away(_) => 0,
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
        if let Tls::Here(tls) = &mut self.tls {
            tls.close();
            push_tls(tls, &self.stream, &[])?;
        }
        // The handshake's keys are of no use any more.
        self.tls = Tls::None;
        self.after = After::Lingering;
        self.stream.shutdown(Shutdown::Write)?;
        self.resume()
    }
}

/// Encrypts a record at a time, when the last one is out: what waits is held once, in the clear.
/// Returns how many of `bytes` are done with.
fn push_tls(tls: &mut Stream, stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut done = 0;
    loop {
        while !tls.is_flushed() {
            let n = write(stream, tls.output())?;
            if n == 0 {
                return Ok(done);
            }
            tls.advance_output(n);
        }
        let n = tls.send(rest(bytes, done)).map_err(io::Error::other)?;
        if n == 0 {
            return Ok(done);
        }
        done += n;
    }
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
