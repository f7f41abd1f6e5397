//! HTTPS with foreign clients: curl and OpenSSL.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::{Served, serve, to_end, until};
use mqtt_publisher_lite::config::certified_key;
use rcgen::generate_simple_self_signed;
use rustls::sign::CertifiedKey;

/// A folder with `cert.pem` and `key.pem` for `localhost`, removed when dropped.
struct Certificate(PathBuf);

impl Certificate {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("edge-tls-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let made = Certificate(dir);
        made.renew();
        made
    }

    /// Writes another key and certificate in place of the present one.
    fn renew(&self) {
        let made = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(self.path("cert.pem"), made.cert.pem()).unwrap();
        std::fs::write(self.path("key.pem"), made.signing_key.serialize_pem()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn shown(&self) -> Arc<CertifiedKey> {
        let read = |name| std::fs::read(self.path(name)).unwrap();
        certified_key(&read("cert.pem"), &read("key.pem")).unwrap()
    }
}

impl Drop for Certificate {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What curl prints, body and status, for a request with these further arguments.
fn curl(served: &Served, certificate: &Certificate, path: &str, more: &[&str]) -> String {
    let port = served.addr.port();
    let output = Command::new("curl")
        .args(["-sS", "--max-time", "10", "-w", " %{http_code}", "--cacert"])
        .arg(certificate.path("cert.pem"))
        .args(["--resolve", &format!("localhost:{port}:127.0.0.1")])
        .args(more)
        .arg(format!("https://localhost:{port}{path}"))
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Whether OpenSSL finishes a handshake with these arguments; and what it prints.
fn openssl(served: &Served, more: &[&str]) -> (bool, String) {
    let output = Command::new("openssl")
        .args(["s_client", "-connect", &served.addr.to_string(), "-servername", "localhost"])
        .args(more)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn curl_over_tls_1_2_and_1_3() {
    let certificate = Certificate::new("curl");
    let served = serve(|s| s.tls = Some(certificate.shown()));
    let body = "z".repeat(60_000);
    std::fs::write(certificate.path("body"), &body).unwrap();
    let data = format!("@{}", certificate.path("body").display());
    for version in [["--tlsv1.2", "--tls-max", "1.2"], ["--tlsv1.3", "--tls-max", "1.3"]] {
        let plain = curl(&served, &certificate, "/x", &version);
        assert_eq!(plain, "GET /x 127.0.0.1 Accept=*/*\n 200");
        let more = [version.as_slice(), &["--data-binary", &data, "-H", "Accept:"]].concat();
        let posted = curl(&served, &certificate, "/x", &more);
        let kind = "Content-Type=application/x-www-form-urlencoded";
        assert_eq!(posted, format!("POST /x 127.0.0.1 {kind}\n{body} 200"));
        let large = curl(&served, &certificate, "/bytes?3000000", &version);
        assert_eq!(large, "x".repeat(3_000_000) + " 200");
    }
    let old = curl(&served, &certificate, "/x", &["--tls-max", "1.1"]);
    assert!(old.contains(" 000"), "{old}");
}

#[test]
fn openssl_agrees_on_http_1_1_and_resumes() {
    let certificate = Certificate::new("openssl");
    let served = serve(|s| s.tls = Some(certificate.shown()));
    for version in ["-tls1_2", "-tls1_3"] {
        let (done, text) = openssl(&served, &[version, "-alpn", "h2,http/1.1"]);
        assert!(done && text.contains("ALPN protocol: http/1.1"), "{text}");
    }
    assert!(!openssl(&served, &["-alpn", "h2"]).0);
    assert!(!openssl(&served, &["-tls1_1"]).0);
    let (_, text) = openssl(&served, &["-tls1_2", "-reconnect"]);
    assert!(text.contains("Reused"), "{text}");
    until("the failures are counted", || served.counters.handshakes_failed.value() >= 2);
}

#[test]
fn the_budget_limits_tls_connections() {
    let certificate = Certificate::new("budget");
    let served = serve(|s| {
        s.tls = Some(certificate.shown());
        s.max_buffer_bytes = 1024 * 1024;
    });
    let streams: Vec<_> = (0..100).map(|_| served.connect()).collect();
    until("all came", || served.counters.accepted.value() == 100);
    assert_eq!(served.counters.open.value(), 64);
    assert!(served.counters.held_bytes.value() <= 512 * 1024);
    let large = "x".repeat(100_000) + " 200";
    assert_eq!(curl(&served, &certificate, "/bytes?100000", &[]), large);
    drop(streams);
}

#[test]
fn whoever_does_not_speak_tls_is_closed_and_disturbs_nobody() {
    let certificate = Certificate::new("garbage");
    let served = serve(|s| {
        s.tls = Some(certificate.shown());
        s.deadlines.handshake = Duration::from_millis(300);
    });
    let start = Instant::now();
    let mut stalled = served.connect();
    let mut half = served.connect();
    // A record header and the start of a ClientHello.
    half.write_all(b"\x16\x03\x01\x02\x00\x01\x00").unwrap();
    for garbage in [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".as_slice(), &[0; 3000], &[0xff; 20]] {
        let mut stream = served.connect();
        stream.write_all(garbage).unwrap();
        let mut alert = Vec::new();
        let _ = stream.read_to_end(&mut alert);
        assert_eq!(alert.first(), Some(&21), "an alert record answers {garbage:.20?}");
    }
    assert_eq!(curl(&served, &certificate, "/nothing", &[]), " 204");
    assert_eq!(to_end(&mut stalled), "");
    assert_eq!(to_end(&mut half), "");
    assert!(start.elapsed() < Duration::from_secs(3));
    until("all are gone", || served.counters.open.value() == 0);
    assert_eq!(served.counters.timed_out.value(), 2);
}

#[test]
fn the_certificate_is_swapped_under_load() {
    let certificate = Certificate::new("swap");
    let served = serve(|s| s.tls = Some(certificate.shown()));
    let serial = |served: &Served| {
        let (_, text) = openssl(served, &["-showcerts"]);
        let (_, pem) = text.split_once("-----BEGIN CERTIFICATE-----").unwrap();
        pem.split_once("-----END").unwrap().0.to_owned()
    };
    let first = serial(&served);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            for _ in 0..40 {
                let text = curl(&served, &certificate, "/nothing", &["-k"]);
                assert_eq!(text, " 204");
            }
        });
        while !load.is_finished() {
            certificate.renew();
            served.handle.replace_certificate(certificate.shown()).unwrap();
        }
    });
    assert_ne!(first, serial(&served));
}
