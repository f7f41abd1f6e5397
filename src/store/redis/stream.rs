//! The way to a server: its name looked up, TCP, TLS, all with a deadline.
//!
//! Looking a name up blocks for as long as the system's resolver likes, so it runs on a thread of
//! its own. An answer that comes too late for one attempt is there for the next.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use redis::io::tcp::socket2::{SockRef, TcpKeepalive};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::config;

/// A peer that a dead NAT path hides is noticed after about a minute of silence.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
/// A resolver needs little more than its own buffers.
const LOOKUP_STACK_BYTES: usize = 256 * 1024;

/// A connection, in plain or by TLS.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    pub fn connect(address: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        let socket = TcpStream::connect_timeout(&address, limit)?;
        socket.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_EVERY)
            .with_retries(KEEPALIVE_PROBES);
        SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        Ok(socket)
    }

    /// Shakes hands.
    pub fn secured(socket: TcpStream, tls: &Tls, deadline: Instant) -> io::Result<Stream> {
        let session = ClientConnection::new(Arc::clone(&tls.config), tls.server.clone());
        let mut stream = StreamOwned::new(session.map_err(io::Error::other)?, socket);
        while stream.conn.is_handshaking() {
            let left = Some(time_left(deadline)?);
            stream.sock.set_read_timeout(left)?;
            stream.sock.set_write_timeout(left)?;
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Stream::Tls(Box::new(stream)))
    }

    pub fn socket(&self) -> &TcpStream {
        match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(stream) => &stream.sock,
        }
    }

    /// The other side has closed it, or has sent what nobody asked for. Waits for nothing.
    pub fn has_ended(&mut self) -> bool {
        let nothing_to_read = self.socket().set_nonblocking(true).is_ok()
            && matches!(self.read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        self.socket().set_nonblocking(false).is_err() || !nothing_to_read
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.read(buffer),
            Stream::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.write(bytes),
            Stream::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(socket) => socket.flush(),
            Stream::Tls(stream) => stream.flush(),
        }
    }
}

/// What a TLS handshake needs to know.
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    /// Whom the server's certificate must name.
    server: ServerName<'static>,
}

impl Tls {
    /// `None` where plain is spoken.
    pub fn new(config: &config::Redis) -> Result<Option<Tls>, rustls::Error> {
        if !config.tls {
            return Ok(None);
        }
        let name = config.tls_server_name.as_ref().unwrap_or(&config.host);
        let bad_name = |error| rustls::Error::General(format!("{name}: {error}"));
        let server = ServerName::try_from(name.clone()).map_err(bad_name)?;
        let mut roots = RootCertStore::empty();
        match &config.tls_ca {
            None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            Some(file) => {
                // The configuration has seen that all can be read.
                for root in CertificateDer::pem_slice_iter(&file.pem).flatten() {
                    roots.add(root)?;
                }
            }
        }
        let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Some(Tls { config: Arc::new(client), server }))
    }
}

type Addresses = io::Result<Vec<SocketAddr>>;

/// A name, and the look-up of it that is under way.
pub(super) struct Name {
    host: String,
    port: u16,
    under_way: Option<Receiver<Addresses>>,
}

impl Name {
    pub fn new(host: String, port: u16) -> Self {
        Name { host, port, under_way: None }
    }

    /// All addresses, in the resolver's order.
    pub fn look_up(&mut self, deadline: Instant) -> Addresses {
        if let Ok(address) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, self.port)]);
        }
        let answer = match self.under_way.take() {
            Some(answer) => answer,
            None => self.ask()?,
        };
        match answer.recv_timeout(time_left(deadline)?) {
            Ok(addresses) => addresses,
            Err(RecvTimeoutError::Timeout) => {
                self.under_way = Some(answer);
                Err(io::ErrorKind::TimedOut.into())
            }
            Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the look-up panicked")),
        }
    }

    fn ask(&self) -> io::Result<Receiver<Addresses>> {
        let (answer, answered) = mpsc::sync_channel(1);
        let (host, port) = (self.host.clone(), self.port);
        let thread = thread::Builder::new().name("look-up".to_owned());
        thread.stack_size(LOOKUP_STACK_BYTES).spawn(move || {
            let addresses = (host, port).to_socket_addrs().map(Iterator::collect);
            // Nobody listens any more only if the process is ending.
            drop(answer.send(addresses));
        })?;
        Ok(answered)
    }
}

/// What is left until `deadline`; an error if that is nothing.
pub(super) fn time_left(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))
}
