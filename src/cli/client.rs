//! The HTTP client of the commands: one request over a connection of its own, under one deadline, so
//! that a server that hangs is found out as surely as one that is gone.

use std::fmt;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WantsClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, ConfigBuilder, DigitallySignedStruct,
    RootCertStore, SignatureScheme, Stream, WantsVerifier,
};

use super::{Failure, failed, read_file};
use crate::config::{Http, certificates};
use crate::socket::{TimedSocket, deadline_in, is_late};

/// The largest answer: a page of the list of devices is a quarter of it.
const MAX_ANSWER_BYTES: u64 = 4 << 20;

pub(super) struct Client {
    pub address: SocketAddr,
    /// Whose certificates are trusted, and the name that is looked for in one.
    pub tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    /// How long one request may take.
    pub deadline: Duration,
}

impl Client {
    /// The service on this machine as `http` configures it. Over HTTPS its own certificate is trusted
    /// and none else, or those by `ca`.
    pub fn local(http: &Http, ca: Option<&Path>, deadline: Duration) -> Result<Self, Failure> {
        let address = SocketAddr::new(reachable(http.host), http.port);
        let config = http.tls.as_ref().map(|own| match ca {
            Some(ca) => by_ca(ca),
            None => pinned(&own.cert),
        });
        let name = ServerName::from(address.ip());
        let tls = config.transpose()?.map(|config| (config, name));
        Ok(Client { address, tls, deadline })
    }

    /// Sends a whole request; gives the head and the body of the answer.
    pub fn exchange(&self, request: &str) -> Result<(String, String), Failure> {
        let address = self.address;
        let session = self.tls.as_ref().map(|(config, name)| {
            ClientConnection::new(Arc::clone(config), name.clone()).map_err(no_tls)
        });
        let mut session = session.transpose()?;
        let connect = TimedSocket::connect(&address.into(), deadline_in(self.deadline));
        let answer = connect.and_then(|mut socket| match &mut session {
            Some(session) => talk(&mut Stream::new(session, &mut socket), request),
            None => talk(&mut socket, request),
        });
        match answer {
            Ok((head, _)) if !head.starts_with("HTTP/") => Err(failed(format_args!(
                "{address} answers no HTTP; if the service there has TLS, give this command its \
                 settings (--env-file)"
            ))),
            Ok(answer) => Ok(answer),
            Err(e) if is_late(&e) => {
                let limit_s = self.deadline.as_secs();
                Err(failed(format_args!("{address} does not answer within {limit_s} s")))
            }
            Err(e) => Err(failed(format_args!("{address} does not serve: {e}"))),
        }
    }
}

/// Whoever listens on every address is asked over loopback.
fn reachable(host: IpAddr) -> IpAddr {
    match host {
        IpAddr::V4(v4) if v4.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(v6) if v6.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

pub(super) fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let fields = head.lines().filter_map(|line| line.split_once(':'));
    let mut named = fields.filter(|(field, _)| field.eq_ignore_ascii_case(name));
    named.next().map(|(_, value)| value.trim())
}

fn talk(stream: &mut (impl Read + Write), request: &str) -> io::Result<(String, String)> {
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    let mut reader = BufReader::new(stream.take(MAX_ANSWER_BYTES));
    let mut head = Vec::new();
    while reader.read_until(b'\n', &mut head)? > 2 {}
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut body = Vec::new();
    // Chunks, which a proxy may make, would be lost without a word.
    if field(&head, "Transfer-Encoding").is_some() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let length = field(&head, "Content-Length").map_or(Some(0), |length| length.parse().ok());
    let length: u64 = length.ok_or(io::ErrorKind::InvalidData)?;
    if reader.take(length).read_to_end(&mut body)? as u64 != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((head, String::from_utf8_lossy(&body).into_owned()))
}

/// Trusts certificates by the CAs of this file.
pub(super) fn by_ca(path: &Path) -> Result<Arc<ClientConfig>, Failure> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates_of(path)? {
        roots.add(certificate).map_err(|e| unusable(path, e))?;
    }
    config(|builder, _| builder.with_root_certificates(roots))
}

/// Trusts the first certificate of this file.
fn pinned(path: &Path) -> Result<Arc<ClientConfig>, Failure> {
    let found = certificates_of(path)
        .map_err(|Failure(_, why)| failed(format!("{why}; is DATA_DIR that of the service?")));
    let certificate = found?.swap_remove(0);
    config(|builder, provider| {
        let verifier = Pinned { certificate, provider };
        builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
    })
}

/// The certificates of a file, at least one.
fn certificates_of(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let file = read_file(path).map_err(|e| unusable(path, e))?;
    certificates(&file).map_err(|why| unusable(path, why))
}

fn unusable(path: &Path, why: impl fmt::Display) -> Failure {
    failed(format_args!("{}: {why}", path.display()))
}

fn no_tls(error: rustls::Error) -> Failure {
    failed(format_args!("TLS cannot be set up: {error}"))
}

type Builder<State> = ConfigBuilder<ClientConfig, State>;

fn config(
    trusting: impl FnOnce(Builder<WantsVerifier>, Arc<CryptoProvider>) -> Builder<WantsClientCert>,
) -> Result<Arc<ClientConfig>, Failure> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(no_tls)?;
    Ok(Arc::new(trusting(builder, provider).with_no_client_auth()))
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
    use super::*;

    #[test]
    fn every_address_means_loopback() {
        let check = |host: &str, expected: &str| {
            assert_eq!(reachable(host.parse().unwrap()), expected.parse::<IpAddr>().unwrap());
        };
        check("0.0.0.0", "127.0.0.1");
        check("::", "::1");
        check("10.0.0.1", "10.0.0.1");
    }

    #[test]
    fn an_answer_in_chunks_is_not_an_empty_one() {
        let ask = |answer: &str| {
            let mut stream = std::io::Cursor::new(format!("?{answer}").into_bytes());
            talk(&mut stream, "?").map_err(|e| e.kind())
        };
        let body = |answer: &str| ask(answer).map(|(_, body)| body);
        assert_eq!(body("HTTP/1.1 200 OK\r\ncontent-LENGTH:  2 \r\n\r\nokay").unwrap(), "ok");
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
        assert_eq!(body(chunked), Err(io::ErrorKind::InvalidData));
        let short = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok";
        assert_eq!(body(short), Err(io::ErrorKind::UnexpectedEof));
        assert!(!ask("+PONG\r\n\r\n").unwrap().0.starts_with("HTTP/"), "it is told elsewhere");
    }
}
