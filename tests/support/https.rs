//! The program over HTTPS, with a certificate from its own CA, and curl as its client.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::http::Response;
use super::service::{Service, Setup};

/// A certificate and its key, as files.
#[derive(Clone, Debug)]
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Starts a server for HTTPS on `localhost` and 127.0.0.1. The CA that its certificate is from is
/// made by a first start without.
#[track_caller]
pub fn start(setup: Setup) -> Service {
    let mut service = setup.start();
    server_certificate(&service, &["localhost", "127.0.0.1"], &service.data("tls"));
    assert_eq!(service.terminate().code, Some(0));
    let (certificate, key) = (service.data("tls/server.crt"), service.data("tls/server.key"));
    service.set_env("TLS_CERT", certificate.to_str().unwrap());
    service.set_env("TLS_KEY", key.to_str().unwrap());
    service.restart();
    service
}

/// Has the CA of `service` sign a server's certificate.
#[track_caller]
pub fn server_certificate(service: &Service, names: &[&str], out: &Path) {
    let args = [&["server-certificate"], names, &["--out", out.to_str().unwrap()]].concat();
    let data = service.data("").display().to_string();
    let exit = Setup::new().env("DATA_DIR", &data).args(&args).run();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
}

/// Whether somebody answers HTTPS on this port.
pub fn is_served(port: u16) -> bool {
    let url = format!("https://127.0.0.1:{port}/health");
    let mut curl = Command::new("curl");
    curl.args(["-qsk", "--max-time", "2", "-o", "/dev/null", &url]);
    curl.status().unwrap_or_else(|e| panic!("curl is not installed: {e}")).success()
}

/// Asks with curl, which verifies the server, with these further arguments.
#[track_caller]
pub fn ask(service: &Service, path: &str, who: Option<&Identity>, more: &[&str]) -> Response {
    let url = format!("https://localhost:{}{path}", service.port());
    let ca = service.data("ca/root-ca.crt");
    let mut curl = Command::new("curl");
    curl.args(["-qsSi", "--http1.1", "--max-time", "10", "--cacert"]).arg(ca);
    if let Some(Identity { certificate, key }) = who {
        curl.arg("--cert").arg(certificate).arg("--key").arg(key);
    }
    let output = curl.args(more).arg(url).output().unwrap();
    assert!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
    parse(&output.stdout)
}

/// Posts JSON.
#[track_caller]
pub fn post(
    service: &Service,
    path: &str,
    who: Option<&Identity>,
    json: &serde_json::Value,
    more: &[&str],
) -> Response {
    let body = json.to_string();
    let args = [&["-H", "Content-Type: application/json", "--data-binary", &body], more].concat();
    ask(service, path, who, &args)
}

/// An answer as it stands on the wire.
#[track_caller]
pub fn parse(bytes: &[u8]) -> Response {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("no head");
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).expect("no status");
    let fields = lines.filter_map(|line| line.split_once(':'));
    Response {
        status: status.parse().unwrap(),
        headers: fields.map(|(name, v)| (name.to_owned(), v.trim().to_owned())).collect(),
        body: bytes[end + 4..].to_vec(),
    }
}
