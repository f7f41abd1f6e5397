//! A blocking HTTP/1.1 client by hand: what a tool sends is exactly what it says, and reading an
//! answer costs little on the processors that the server needs.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::str;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::Failure;

/// A connection with TLS on it.
pub type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A client certificate, with its chain, and its key.
pub type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// TLS over `stream`, to a server of this name or address.
pub fn tls(
    stream: TcpStream,
    name: &str,
    roots: Arc<RootCertStore>,
    identity: Option<Identity>,
) -> Result<Tls, Failure> {
    Ok(StreamOwned::new(tls_session(name, roots, identity)?, stream))
}

/// A session that has sent nothing yet.
pub fn tls_session(
    name: &str,
    roots: Arc<RootCertStore>,
    identity: Option<Identity>,
) -> Result<ClientConnection, Failure> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let config = match identity {
        Some((chain, key)) => config.with_client_auth_cert(chain, key)?,
        None => config.with_no_client_auth(),
    };
    Ok(ClientConnection::new(Arc::new(config), ServerName::try_from(name.to_owned())?)?)
}

/// A request without a body; `fields` are whole lines.
pub fn get(path: &str, fields: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n")
}

/// A request with a JSON body; `fields` are whole lines.
pub fn post(path: &str, fields: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         {fields}Content-Length: {length}\r\n\r\n{body}"
    )
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    head: String,
    /// As many bytes as `Content-Length` says.
    pub body: String,
}

impl Answer {
    /// The first field of this name.
    pub fn field(&self, name: &str) -> Option<&str> {
        field(&self.head, name)
    }

    /// Whether the server will read no further request.
    pub fn closes(&self) -> bool {
        self.field("Connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

/// A connection on which one request waits for one answer.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    buffer: Vec<u8>,
}

impl<S: Read + Write> Connection<S> {
    /// A connection over what is open already.
    pub fn over(stream: S) -> Self {
        Connection { stream, buffer: Vec::new() }
    }

    /// Sends the request and reads its answer.
    pub fn exchange(&mut self, request: &str) -> Result<Answer, Failure> {
        self.send(request)?;
        self.receive()
    }

    /// Sends the request; its answer is read by [`Connection::receive`].
    pub fn send(&mut self, request: &str) -> Result<(), Failure> {
        self.stream.write_all(request.as_bytes())?;
        Ok(self.stream.flush()?)
    }

    /// Reads an answer. Bytes behind it are an error: nothing that they could answer was sent.
    pub fn receive(&mut self) -> Result<Answer, Failure> {
        self.buffer.clear();
        let mut chunk = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err("the server closed the connection".into()),
                Ok(n) => self.buffer.extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
            if let Some(answer) = whole_answer(&self.buffer)? {
                return Ok(answer);
            }
        }
    }
}

fn whole_answer(bytes: &[u8]) -> Result<Option<Answer>, Failure> {
    const END: &[u8] = b"\r\n\r\n";
    let Some(end) = bytes.windows(END.len()).position(|w| w == END) else { return Ok(None) };
    let (head, body) = bytes.split_at(end + END.len());
    let head = str::from_utf8(head)?.trim_end();
    let length: usize = field(head, "Content-Length").ok_or("no length")?.parse()?;
    if body.len() > length {
        return Err("bytes behind the answer".into());
    }
    if body.len() < length {
        return Ok(None);
    }
    let status = head.split(' ').nth(1).ok_or("no status")?.parse()?;
    Ok(Some(Answer { status, head: head.to_owned(), body: str::from_utf8(body)?.to_owned() }))
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}
