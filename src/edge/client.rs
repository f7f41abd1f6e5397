//! A client's socket, plain or with TLS: bytes in, bytes out, never waiting.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};

use super::poll::{Interest, Watched, is_transient};
use super::tls::{Received, Stream};
use super::unsent::Unsent;

/// One connection's socket.
pub struct Client {
    stream: Watched<TcpStream>,
    tls: Tls,
    /// What the socket did not take yet.
    out: Unsent,
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
    pub fn new(stream: Watched<TcpStream>, tls: Tls) -> Self {
        Client { stream, tls, out: Unsent::default() }
    }

    /// The certificate whose key the client holds, in DER.
    pub fn certificate(&self) -> Option<&[u8]> {
        self.secure()?.client_certificate()
    }

    /// Bytes of memory held: for TLS, and of replies.
    pub fn held(&self) -> (usize, usize) {
        let tls = match &self.tls {
            Tls::None => 0,
            Tls::Here(tls) => tls.held(),
            Tls::Away(held) => *held,
        };
        (tls, self.out.held())
    }

    /// Of these, what the client has sent of a record or message that is not whole.
    pub fn unfinished(&self) -> usize {
        self.secure().map_or(0, Stream::unread)
    }

    /// Nothing is left to write.
    pub fn is_flushed(&self) -> bool {
        self.out.is_empty() && self.secure().is_none_or(Stream::is_flushed)
    }

    fn secure(&self) -> Option<&Stream> {
        match &self.tls {
            Tls::Here(tls) => Some(tls),
            Tls::None | Tls::Away(_) => None,
        }
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
            Tls::None | Tls::Away(_) => Ok(Input::Bytes(n)),
        }
    }

    /// Lends the TLS for a step of the handshake.
    pub fn lend_tls(&mut self) -> Option<Box<Stream>> {
        let held = self.secure()?.held();
        match std::mem::replace(&mut self.tls, Tls::Away(held)) {
            Tls::Here(tls) => Some(tls),
            Tls::None | Tls::Away(_) => None,
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

    /// Whether the TLS handshake is over.
    pub fn is_secured(&self) -> bool {
        self.secure().is_some_and(|tls| !tls.is_handshaking())
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
        self.watch(self.stream.interest().read)
    }

    /// Stops reading until [`Client::resume`]: what comes now waits in the socket.
    ///
    /// # Errors
    /// When the queue refuses.
    pub fn pause(&mut self) -> io::Result<()> {
        self.watch(false)
    }

    /// Reads again.
    ///
    /// # Errors
    /// When the queue refuses.
    pub fn resume(&mut self) -> io::Result<()> {
        self.watch(true)
    }

    fn watch(&mut self, read: bool) -> io::Result<()> {
        let write = !self.is_flushed();
        self.stream.set(Interest { read, write })
    }

    /// Ends the connection from our side; what the client still sends is not decrypted any more.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn linger(&mut self) -> io::Result<()> {
        if let Tls::Here(tls) = &mut self.tls {
            tls.close();
            push_tls(tls, &self.stream, &[])?;
        }
        // The keys are of no use any more.
        self.tls = Tls::None;
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
    if bytes.is_empty() {
        return Ok(0);
    }
    match (&*stream).write(bytes) {
        Err(e) if is_transient(&e) => Ok(0),
        other => other,
    }
}
