//! A client's socket, plain or with TLS: bytes in, bytes out, never waiting.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};

use super::poll::{Interest, READ, WRITE, Watched, is_transient};
use super::tls::{RECORD, Stream};

pub struct Client {
    stream: Watched<TcpStream>,
    tls: Tls,
    /// What the socket did not take yet, encrypted if it has to be.
    out: VecDeque<u8>,
}

/// What stands between the socket and the requests.
pub enum Tls {
    None,
    Here(Box<Stream>),
    /// A step of its handshake is being computed; so many bytes are held for it.
    Away(usize),
}

pub enum Input {
    Bytes,
    Handshake,
    Nothing,
    /// The client will send no more.
    End,
    /// What came is not the TLS that it should be; the alert that says so is on its way.
    TlsFailed,
}

impl Client {
    pub fn new(stream: Watched<TcpStream>, tls: Tls) -> Self {
        Client { stream, tls, out: VecDeque::new() }
    }

    /// The certificate whose key the client holds, in DER.
    pub fn certificate(&self) -> Option<&[u8]> {
        self.secure()?.client_certificate()
    }

    /// Whether nobody on the way can read what is said.
    pub fn is_encrypted(&self) -> bool {
        !matches!(self.tls, Tls::None)
    }

    /// Bytes of memory held: for TLS, and of replies.
    pub fn held(&self) -> (usize, usize) {
        let tls = match &self.tls {
            Tls::None => 0,
            Tls::Here(tls) => tls.held(),
            Tls::Away(held) => *held,
        };
        (tls, self.out.capacity())
    }

    /// Of these, what the client has sent of a record or message that is not whole.
    pub fn unfinished(&self) -> usize {
        self.secure().map_or(0, Stream::unread)
    }

    pub fn is_flushed(&self) -> bool {
        self.out.is_empty()
    }

    fn secure(&self) -> Option<&Stream> {
        match &self.tls {
            Tls::Here(tls) => Some(tls),
            Tls::None | Tls::Away(_) => None,
        }
    }

    /// Reads once, by way of `buf`, and appends what comes to `plain`, decrypted.
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
        let bytes = buf.get(..n).unwrap_or_default();
        let Tls::Here(tls) = &mut self.tls else {
            plain.extend_from_slice(bytes);
            return Ok(Input::Bytes);
        };
        tls.put(bytes);
        if tls.is_handshaking() {
            return Ok(Input::Handshake);
        }
        let mut output = Vec::new();
        let received = tls.advance(plain, &mut output);
        self.understood(received, plain, &output)
    }

    pub fn lend_tls(&mut self) -> Option<Box<Stream>> {
        let held = self.secure()?.held();
        match std::mem::replace(&mut self.tls, Tls::Away(held)) {
            Tls::Here(tls) => Some(tls),
            Tls::None | Tls::Away(_) => None,
        }
    }

    /// Takes the TLS back, with what became of the step: what the client sent, and what it gets.
    pub fn return_tls(
        &mut self,
        tls: Box<Stream>,
        outcome: Result<bool, rustls::Error>,
        plain: &[u8],
        output: &[u8],
    ) -> io::Result<Input> {
        self.tls = Tls::Here(tls);
        self.resume()?;
        self.understood(outcome, plain, output)
    }

    pub fn is_tls_away(&self) -> bool {
        matches!(self.tls, Tls::Away(_))
    }

    pub fn is_secured(&self) -> bool {
        self.secure().is_some_and(|tls| !tls.is_handshaking())
    }

    /// Writes what TLS has to say to what it received.
    fn understood(
        &mut self,
        received: Result<bool, rustls::Error>,
        plain: &[u8],
        output: &[u8],
    ) -> io::Result<Input> {
        self.write(output, 0)?;
        Ok(match received {
            Ok(_) if !plain.is_empty() => Input::Bytes,
            Ok(has_ended) => {
                if has_ended {
                    Input::End
                } else {
                    Input::Nothing
                }
            }
            Err(e) => {
                log::debug!("TLS: {e}");
                Input::TlsFailed
            }
        })
    }

    /// Sends `bytes`; `to_come` more will follow.
    pub fn send(&mut self, bytes: &[u8], to_come: usize) -> io::Result<()> {
        if let Tls::None = self.tls {
            return self.write(bytes, to_come);
        }
        let mut to_come = to_come + bytes.len();
        for piece in bytes.chunks(RECORD) {
            let Tls::Here(tls) = &mut self.tls else {
                return Err(io::ErrorKind::NotConnected.into());
            };
            let record = tls.encrypt(piece).map_err(io::Error::other)?;
            to_come -= piece.len();
            self.write(&record, to_come)?;
        }
        Ok(())
    }

    /// Writes `bytes`, keeping what the socket does not take.
    fn write(&mut self, bytes: &[u8], to_come: usize) -> io::Result<()> {
        let taken = if self.out.is_empty() { write(&self.stream, bytes)? } else { 0 };
        keep(&mut self.out, bytes.get(taken..).unwrap_or_default(), to_come);
        self.watch(self.stream.interest() & READ)
    }

    /// Writes what was kept.
    pub fn push(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            let piece = self.out.as_slices().0;
            let (n, most) = (write(&self.stream, piece)?, piece.len());
            give_back(&mut self.out, n);
            if n < most {
                break;
            }
        }
        self.watch(self.stream.interest() & READ)
    }

    /// Stops reading until [`Client::resume`]: what comes now waits in the socket.
    pub fn pause(&mut self) -> io::Result<()> {
        self.watch(Interest::empty())
    }

    pub fn resume(&mut self) -> io::Result<()> {
        self.watch(READ)
    }

    fn watch(&mut self, read: Interest) -> io::Result<()> {
        let write = if self.is_flushed() { Interest::empty() } else { WRITE };
        self.stream.set(read | write)
    }

    /// Ends the connection from our side; what the client still sends is not decrypted any more.
    pub fn linger(&mut self) -> io::Result<()> {
        // The keys are of no use any more.
        if let Tls::Here(mut tls) = std::mem::replace(&mut self.tls, Tls::None) {
            self.write(&tls.close(), 0)?;
        }
        self.stream.shutdown(Shutdown::Write)?;
        self.resume()
    }
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

/// Keeps what the socket did not take; `to_come` more of the reply will follow.
fn keep(out: &mut VecDeque<u8>, bytes: &[u8], to_come: usize) {
    if !bytes.is_empty() {
        out.reserve_exact(bytes.len() + to_come);
        out.extend(bytes);
    }
}

/// So many bytes are out. A client that takes a reply slowly holds less and less.
fn give_back(out: &mut VecDeque<u8>, n: usize) {
    out.drain(..n.min(out.len()));
    if out.len() <= out.capacity() / 2 {
        out.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_is_given_back() {
        let reply: Vec<u8> = (0..150_000).map(|i| (i % 251) as u8).collect();
        let (mut unsent, mut out) = (VecDeque::new(), Vec::new());
        let mut to_come = reply.len();
        for bytes in reply.chunks(10_007) {
            to_come -= bytes.len();
            keep(&mut unsent, bytes, to_come);
            assert_eq!(unsent.capacity(), reply.len(), "nothing is left to doubling");
        }
        while !unsent.is_empty() {
            let left = reply.len() - out.len();
            assert!((left..2 * left).contains(&unsent.capacity()) || unsent.capacity() == left);
            let n = unsent.as_slices().0.len().min(7_001);
            out.extend_from_slice(&unsent.as_slices().0[..n]);
            give_back(&mut unsent, n);
        }
        assert_eq!(unsent.capacity(), 0);
        assert!(out == reply);
        // After all is taken, more can be added.
        keep(&mut unsent, b"ab", 1);
        give_back(&mut unsent, 2);
        keep(&mut unsent, b"c", 0);
        assert_eq!((unsent.as_slices().0, unsent.capacity()), (b"c".as_slice(), 1));
    }
}
