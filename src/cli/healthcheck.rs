//! `healthcheck`: asks the local server for `/health`, for containers and watchdogs that have no curl.
//!
//! One deadline covers everything from connecting to the answer, so that a server that hangs is
//! found out as surely as one that is gone.

use std::fmt;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme,
    Stream,
};

use super::{FAILED, Given, done, fail};
use crate::config::{Http, certificates};
use crate::socket::{TimedSocket, deadline_in, is_late};

/// How long the whole check may take.
const DEADLINE: Duration = Duration::from_secs(3);

/// Why the server does not count as well.
#[derive(Debug)]
pub(super) enum HealthError {
    /// No connection, or it broke before the status line.
    Io(SocketAddr, io::Error),
    /// It did not answer in time.
    Timeout(SocketAddr),
    /// It answered with another status than 200, or not in HTTP.
    Answer(SocketAddr, String),
    /// The file with our certificate could not be read.
    Certificate(PathBuf, String),
    /// TLS could not be set up.
    Tls(rustls::Error),
}

impl fmt::Display for HealthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HealthError::Io(address, e) => write!(f, "{address} does not serve /health: {e}"),
            HealthError::Timeout(address) => {
                write!(f, "{address} does not answer within {} s", DEADLINE.as_secs())
            }
            HealthError::Answer(address, line) => {
                write!(f, "{address} is not well, it answers {line:?}")
            }
            HealthError::Certificate(path, why) => write!(f, "{}: {why}", path.display()),
            HealthError::Tls(e) => write!(f, "TLS cannot be set up: {e}"),
        }
    }
}

impl std::error::Error for HealthError {}

/// Never exits with 2, which container engines reserve for themselves.
pub(super) fn run(given: &Given) -> ExitCode {
    let http = given.environment().and_then(|vars| Http::from_lookup(|name| vars.get(name)));
    match http {
        Ok(http) => done(check(&http, DEADLINE)),
        Err(e) => fail(FAILED, e),
    }
}

/// Whether the server on this machine, configured as `http` says, answers 200 within `deadline`.
fn check(http: &Http, deadline: Duration) -> Result<(), HealthError> {
    let address = SocketAddr::new(reachable(http.host), http.port);
    let tls = http.tls.as_ref().map(|tls| tls_session(&tls.cert, address.ip())).transpose()?;
    let status_line = ask(address, tls, deadline).map_err(|e| match is_late(&e) {
        true => HealthError::Timeout(address),
        false => HealthError::Io(address, e),
    })?;
    let mut words = status_line.split(' ');
    if (words.next(), words.next()) == (Some("HTTP/1.1"), Some("200")) {
        return Ok(());
    }
    Err(HealthError::Answer(address, status_line))
}

/// Whoever listens on every address is asked over loopback.
pub(super) fn reachable(host: IpAddr) -> IpAddr {
    match host {
        IpAddr::V4(v4) if v4.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(v6) if v6.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

fn ask(
    address: SocketAddr,
    tls: Option<ClientConnection>,
    deadline: Duration,
) -> io::Result<String> {
    let mut socket = TimedSocket::connect(&address.into(), deadline_in(deadline))?;
    match tls {
        Some(mut session) => exchange(&mut Stream::new(&mut session, &mut socket)),
        None => exchange(&mut socket),
    }
}

fn exchange(stream: &mut (impl Read + Write)) -> io::Result<String> {
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    stream.flush()?;
    // More than a status line is not needed, and whoever sends none in 256 bytes is not our server.
    let mut line = Vec::new();
    BufReader::new(stream.take(256)).read_until(b'\n', &mut line)?;
    Ok(String::from_utf8_lossy(line.trim_ascii_end()).into_owned())
}

pub(super) fn tls_session(cert: &Path, ip: IpAddr) -> Result<ClientConnection, HealthError> {
    let unreadable = |why: String| HealthError::Certificate(cert.to_owned(), why);
    let file = fs::read(cert).map_err(|e| unreadable(e.to_string()))?;
    let chain = certificates(&file).map_err(unreadable)?;
    let pinned = chain.into_iter().next().ok_or_else(|| unreadable("it is empty".to_owned()))?;
    let provider = Arc::new(ring::default_provider());
    let verifier = Pinned { certificate: pinned, provider: Arc::clone(&provider) };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(HealthError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    ClientConnection::new(Arc::new(config), ServerName::from(ip)).map_err(HealthError::Tls)
}

/// Trusts the one certificate that the server was given, whatever names and dates it has: the
/// question is whether our server answers, and a certificate past its date does not change that.
#[derive(Debug)]
struct Pinned {
    certificate: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *end_entity == self.certificate {
            return Ok(ServerCertVerified::assertion());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use rustls::pki_types::PrivateKeyDer;
    use rustls::{ServerConfig, ServerConnection};

    use super::*;
    use crate::clock;
    use crate::config::TlsFiles;

    fn http(port: u16, tls: Option<TlsFiles>) -> Http {
        let mut http = Http::from_lookup(|_| None).unwrap();
        (http.port, http.tls) = (port, tls);
        http
    }

    /// Serves one connection with `serve` and gives the port.
    fn server(serve: impl FnOnce(TcpStream) + Send + 'static) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || serve(listener.accept().unwrap().0));
        port
    }

    fn answer(mut stream: impl Read + Write, text: &str) {
        let mut head = [0; 1024];
        let n = stream.read(&mut head).unwrap();
        assert!(head[..n].starts_with(b"GET /health HTTP/1.1\r\nHost: "));
        stream.write_all(text.as_bytes()).unwrap();
        stream.flush().unwrap();
    }

    fn outcome(text: &'static str) -> Result<(), String> {
        let port = server(|stream| answer(stream, text));
        let shown = format!("127.0.0.1:{port}");
        check(&http(port, None), DEADLINE).map_err(|e| e.to_string().replace(&shown, "ADDRESS"))
    }

    #[test]
    fn only_200_is_well() {
        assert_eq!(outcome("HTTP/1.1 200 OK\r\n\r\n"), Ok(()));
        let not_well = |line| Err(format!("ADDRESS is not well, it answers {line:?}"));
        assert_eq!(
            outcome("HTTP/1.1 503 Service Unavailable\r\n\r\n"),
            not_well("HTTP/1.1 503 Service Unavailable")
        );
        assert_eq!(outcome("HTTP/1.1 2000 x\r\n"), not_well("HTTP/1.1 2000 x"));
        assert_eq!(outcome("SSH-2.0-x\r\n"), not_well("SSH-2.0-x"));
        assert_eq!(outcome(""), not_well(""));
    }

    #[test]
    fn a_silent_server_is_given_up() {
        let port = server(|stream| {
            let _ = (&stream).write(b"HTTP/1.1 200");
            let _ = (&stream).read_to_end(&mut Vec::new());
        });
        let before = clock::now().mono_ms;
        let error = check(&http(port, None), Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, HealthError::Timeout(_)), "{error}");
        assert!(clock::now().mono_ms - before < 2000);
    }

    #[test]
    fn nobody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let error = check(&http(port, None), DEADLINE).unwrap_err();
        assert!(matches!(error, HealthError::Io(..)), "{error}");
    }

    #[test]
    fn every_address_means_loopback() {
        let check = |host: &str, expected: &str| {
            assert_eq!(reachable(host.parse().unwrap()), expected.parse::<IpAddr>().unwrap());
        };
        check("0.0.0.0", "127.0.0.1");
        check("::", "::1");
        check("10.0.0.1", "10.0.0.1");
    }

    /// A certificate for another name, which does not matter, and its key.
    fn certificate(
        dir: &Path,
        name: &str,
    ) -> (TlsFiles, CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = rcgen::KeyPair::generate().unwrap();
        let made = rcgen::CertificateParams::new(vec!["x.lan".to_owned()]).unwrap();
        let made = made.self_signed(&key).unwrap();
        let cert = dir.join(name);
        std::fs::write(&cert, made.pem()).unwrap();
        let der = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        (TlsFiles { cert, key: PathBuf::new() }, made.der().clone(), der)
    }

    #[test]
    fn tls_trusts_the_certificate_of_the_server_alone() {
        let dir = std::env::temp_dir().join(format!("healthcheck-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (own, cert, key) = certificate(&dir, "own.crt");
        let (other, ..) = certificate(&dir, "other.crt");
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert], key)
            .unwrap();
        let config = Arc::new(config);
        let serve = || {
            let config = Arc::clone(&config);
            server(move |stream| {
                let session = ServerConnection::new(config).unwrap();
                let mut stream = rustls::StreamOwned::new(session, stream);
                if stream.conn.complete_io(&mut stream.sock).is_ok() {
                    answer(stream, "HTTP/1.1 200 OK\r\n\r\n");
                }
            })
        };
        check(&http(serve(), Some(own)), DEADLINE).unwrap();
        let error = check(&http(serve(), Some(other)), DEADLINE).unwrap_err();
        assert!(error.to_string().contains("certificate"), "{error}");
        let missing = TlsFiles { cert: dir.join("none"), key: PathBuf::new() };
        let error = check(&http(1, Some(missing)), DEADLINE).unwrap_err();
        assert!(matches!(error, HealthError::Certificate(..)), "{error}");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
