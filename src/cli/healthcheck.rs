//! `healthcheck`: asks the local server for `/health`, for containers and watchdogs that have no curl.

use std::process::ExitCode;
use std::time::Duration;

use super::client::Client;
use super::{Failure, Given, failed};
use crate::config::Http;

/// How long the whole check may take.
const DEADLINE: Duration = Duration::from_secs(3);

/// Never exits with 2, which container engines reserve for themselves.
pub(super) fn run(given: &Given) -> Result<ExitCode, Failure> {
    let http = given.environment().and_then(|vars| Http::from_lookup(|name| vars.get(name)));
    check(&http.map_err(failed)?, DEADLINE)?;
    Ok(ExitCode::SUCCESS)
}

/// Whether the server on this machine, configured as `http` says, answers 200 within `deadline`.
fn check(http: &Http, deadline: Duration) -> Result<(), Failure> {
    let server = Client::local(http, None, deadline)?;
    let request = "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let (head, _) = server.exchange(request)?;
    let status_line = head.lines().next().unwrap_or_default();
    let mut words = status_line.split(' ');
    if (words.next(), words.next()) == (Some("HTTP/1.1"), Some("200")) {
        return Ok(());
    }
    let address = server.address;
    Err(failed(format_args!("{address} is not well, it answers {status_line:?}")))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::thread;

    use rustls::crypto::ring;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
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
        check(&http(port, None), DEADLINE).map_err(|Failure(_, why)| why.replace(&shown, "ADDRESS"))
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
        for foreign in ["SSH-2.0-x\r\n", ""] {
            assert!(outcome(foreign).unwrap_err().starts_with("ADDRESS answers no HTTP; "));
        }
    }

    #[test]
    fn a_silent_server_is_given_up() {
        let port = server(|stream| {
            let _ = (&stream).write(b"HTTP/1.1 200");
            let _ = (&stream).read_to_end(&mut Vec::new());
        });
        let before = clock::now().mono_ms;
        let Failure(_, why) = check(&http(port, None), Duration::from_millis(50)).unwrap_err();
        assert!(why.ends_with("does not answer within 0 s"), "{why}");
        assert!(clock::now().mono_ms - before < 2000);
    }

    #[test]
    fn nobody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let Failure(_, why) = check(&http(port, None), DEADLINE).unwrap_err();
        assert!(why.contains(" does not serve: "), "{why}");
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
        let Failure(_, why) = check(&http(serve(), Some(other)), DEADLINE).unwrap_err();
        assert!(why.contains("certificate"), "{why}");
        let missing = TlsFiles { cert: dir.join("none"), key: PathBuf::new() };
        let Failure(_, why) = check(&http(1, Some(missing)), DEADLINE).unwrap_err();
        assert!(why.ends_with("; is DATA_DIR that of the service?"), "{why}");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
