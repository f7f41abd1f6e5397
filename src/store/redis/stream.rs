//! What a connection runs over: a socket, in plain or by TLS.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::config::RedisTls;
use crate::socket::TimedSocket;

/// A connection, in plain or by TLS.
pub(super) struct Stream {
    socket: TimedSocket,
    tls: Option<Box<ClientConnection>>,
}

impl Stream {
    /// With TLS, it shakes hands with the server that goes by the name `host`.
    pub fn open(mut socket: TimedSocket, tls: Option<&Tls>, host: &str) -> io::Result<Stream> {
        let Some(tls) = tls else { return Ok(Stream { socket, tls: None }) };
        let name = tls.server_name.as_deref().unwrap_or(host).to_owned();
        let server = ServerName::try_from(name).map_err(io::Error::other)?;
        let session = ClientConnection::new(Arc::clone(&tls.config), server);
        let mut session = session.map_err(io::Error::other)?;
        while session.is_handshaking() {
            session.complete_io(&mut socket)?;
        }
        Ok(Stream { socket, tls: Some(Box::new(session)) })
    }

    pub fn set_deadline(&mut self, deadline: Instant) {
        self.socket.set_deadline(deadline);
    }

    /// The other side has closed it, or has sent what nobody asked for. Waits for nothing.
    pub fn has_ended(&mut self) -> bool {
        self.socket.set_waiting(false);
        let found = self.read(&mut [0]);
        self.socket.set_waiting(true);
        !found.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.read(buffer),
            Some(session) => rustls::Stream::new(&mut **session, &mut self.socket).read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.write(bytes),
            Some(session) => rustls::Stream::new(&mut **session, &mut self.socket).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            None => self.socket.flush(),
            Some(session) => rustls::Stream::new(&mut **session, &mut self.socket).flush(),
        }
    }
}

/// What TLS handshakes need to know.
#[derive(Clone)]
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    /// Whom the server's certificate must name, if that is not the host.
    server_name: Option<String>,
}

impl Tls {
    /// Reads the files anew, since certificates are replaced while we run.
    pub fn new(settings: &RedisTls) -> Result<Tls, String> {
        let mut roots = RootCertStore::empty();
        match settings.read_roots()? {
            None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            Some(own) => roots = own,
        }
        let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let client = match settings.read_certificate()? {
            None => client.with_no_client_auth(),
            Some(own) => client.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own))),
        };
        Ok(Tls { config: Arc::new(client), server_name: settings.server_name.clone() })
    }
}
