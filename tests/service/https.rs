//! HTTPS of the real program, with a certificate from the same CA as the devices': curl, OpenSSL,
//! the health check, and an exchange of the certificate while requests go on.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use time::OffsetDateTime;

use crate::support::clock::{FakeClock, now_s};
use crate::support::https;
use crate::support::service::{Service, Setup};
use crate::support::temp::TempDir;
use crate::support::wait;

/// A server whose CA signed its own certificate. The CA was fetched as devices fetch it.
pub struct Https {
    pub service: Service,
}

impl Https {
    fn start() -> Self {
        Https::start_with(Setup::new())
    }

    fn start_with(setup: Setup) -> Self {
        let mut https = Https { service: setup.start() };
        let service = &https.service;
        fs::write(https.path("known-ca.pem"), service.http.get("/api/v1/ca").body).unwrap();
        https.renew();
        for (variable, file) in [("TLS_CERT", "server.crt"), ("TLS_KEY", "server.key")] {
            let path = https.path(file);
            https.service.set_env(variable, &path);
        }
        assert_eq!(https.service.terminate().code, Some(0));
        https.service.restart();
        https
    }

    /// With a certificate that the service has made for itself.
    pub fn auto(setup: Setup) -> Self {
        let https = Https { service: setup.env("TLS", "auto").start() };
        fs::copy(https.path("ca/root-ca.crt"), https.path("known-ca.pem")).unwrap();
        https
    }

    /// A new key and certificate in place of the present ones.
    fn renew(&self) {
        let out = self.path("");
        let names = ["server-certificate", "localhost", "127.0.0.1", "--force", "--out", &out];
        let output = self.program(&names);
        assert!(output.status.success(), "{}", text(&output));
    }

    fn program(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_mqtt-publisher-lite"))
            .args(args)
            .env_clear()
            .env("HTTP_HOST", "127.0.0.1")
            .env("PORT", self.service.port().to_string())
            .env("DATA_DIR", self.path(""))
            .env("TLS_CERT", self.path("server.crt"))
            .env("TLS_KEY", self.path("server.key"))
            .output()
            .unwrap()
    }

    pub fn path(&self, name: &str) -> String {
        self.service.data(name).display().to_string()
    }

    /// Body, status and HTTP version of `/health` by curl, which trusts the CA that devices know.
    fn curl(&self, host: &str, more: &[&str]) -> String {
        let output = Command::new("curl")
            .args(["-sS", "--max-time", "10", "-w", " %{http_code} %{http_version}"])
            .args(["--cacert", &self.path("known-ca.pem")])
            .args(more)
            .arg(format!("https://{host}:{}/health", self.service.port()))
            .output()
            .unwrap();
        text(&output)
    }

    /// What `openssl s_client` prints; it trusts the same CA and no name but `localhost`.
    fn openssl(&self, more: &[&str]) -> (bool, String) {
        let output = Command::new("openssl")
            .args(["s_client", "-connect", &self.service.http.addr.to_string()])
            .args(["-servername", "localhost", "-verify_hostname", "localhost"])
            .args(["-CAfile", &self.path("known-ca.pem"), "-verify_return_error"])
            .args(more)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.success(), text(&output))
    }

    fn client(&self) -> Arc<ClientConfig> {
        self.client_at(now_s())
    }

    /// A client whose clock shows this.
    pub fn client_at(&self, unix_s: u64) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        let known = CertificateDer::from_pem_file(self.path("known-ca.pem")).unwrap();
        roots.add(known).unwrap();
        let provider = Arc::new(ring::default_provider());
        let config = ClientConfig::builder_with_details(provider, Arc::new(At(unix_s)))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Arc::new(config)
    }

    pub fn connect(&self, client: &Arc<ClientConfig>) -> io::Result<Tls> {
        let socket = TcpStream::connect(self.service.http.addr)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        let name = ServerName::try_from("localhost").unwrap();
        let session = ClientConnection::new(Arc::clone(client), name).map_err(io::Error::other)?;
        Ok(StreamOwned::new(session, socket))
    }
}

/// A clock that stands.
#[derive(Debug)]
struct At(u64);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0)))
    }
}

pub type Tls = StreamOwned<ClientConnection, TcpStream>;

/// Asks for `/health`; the connection stays open.
pub fn ask(stream: &mut Tls) -> io::Result<()> {
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"}\n") {
        let mut piece = [0; 4096];
        match stream.read(&mut piece)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => answer.extend_from_slice(&piece[..n]),
        }
    }
    if answer.starts_with(b"HTTP/1.1 200 ") {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned()))
}

fn text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}{err}")
}

#[test]
fn curl_and_openssl_trust_it_by_the_ca_that_devices_know() {
    let https = Https::start();
    for version in ["1.2", "1.3"] {
        let only = [&*format!("--tlsv{version}"), "--tls-max", version];
        for host in ["localhost", "127.0.0.1"] {
            let answer = https.curl(host, &only);
            assert!(answer.contains("\"status\":\"ok\""), "{answer}");
            assert!(answer.ends_with(" 200 1.1"), "{version} {host}: {answer}");
        }
    }
    for (flag, shown) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let (done, text) = https.openssl(&[flag]);
        let verified = text.contains("Verify return code: 0 (ok)") && text.contains(shown);
        assert!(done && verified, "{flag}: {text}");
    }
    let (done, text) = https.openssl(&["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]);
    assert!(!done, "{text}");
    let other_name = https.curl("localhost.localdomain", &["--connect-to", "::127.0.0.1:"]);
    assert!(other_name.contains(" 000 "), "a name that is not in it: {other_name}");
    let stranger = Setup::new().start();
    fs::write(https.path("known-ca.pem"), stranger.http.get("/api/v1/ca").body).unwrap();
    let answer = https.curl("localhost", &[]);
    assert!(answer.contains(" 000 "), "a CA that did not sign it: {answer}");
}

#[test]
fn a_device_is_onboarded_over_https() {
    let https = Https::start();
    let output = Command::new("scripts/smoke.sh")
        .arg(format!("https://localhost:{}", https.service.port()))
        .env("CURL_CA_BUNDLE", https.path("known-ca.pem"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn healthcheck_speaks_https() {
    let mut https = Https::start();
    let output = https.program(&["healthcheck"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(https.service.terminate().code, Some(0));
    let output = https.program(&["healthcheck"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
}

#[test]
fn sighup_swaps_the_certificate_without_a_failed_request() {
    const SWAPS: usize = 5;
    let https = Https::start();
    let client = https.client();
    let (answered, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    // A new connection for each request, or one for all: both must not notice.
    let load = |keeps: bool| {
        let mut seen = HashSet::new();
        let mut kept = None;
        while !stop.load(Ordering::Relaxed) {
            let mut stream = kept.take().unwrap_or_else(|| https.connect(&client).unwrap());
            ask(&mut stream).unwrap_or_else(|e| panic!("a request failed: {e}"));
            seen.insert(presented(&stream));
            answered.fetch_add(1, Ordering::Relaxed);
            kept = keeps.then_some(stream);
        }
        seen
    };
    thread::scope(|scope| {
        let loads = [false, false, true].map(|keeps| scope.spawn(move || load(keeps)));
        for _ in 0..SWAPS {
            let before = answered.load(Ordering::Relaxed);
            wait::for_true("requests go on", || answered.load(Ordering::Relaxed) > before + 30);
            https.renew();
            hang_up(&https, "were read again");
        }
        stop.store(true, Ordering::Relaxed);
        let [seen, _, kept] = loads.map(|load| load.join().unwrap().len());
        assert!(seen > SWAPS / 2, "new connections saw {seen} certificates");
        assert_eq!(kept, 1, "a connection keeps the one that it began with");
    });
}

#[test]
fn bad_new_files_keep_the_old_certificate_and_are_named() {
    let https = Https::start();
    let client = https.client();
    let serves = || {
        let mut stream = https.connect(&client).unwrap();
        ask(&mut stream).unwrap();
        presented(&stream)
    };
    let first = serves();
    let good = ["server.crt", "server.key"].map(|name| fs::read(https.path(name)).unwrap());
    let stays = "everything stays as it was";
    let check = |what: &str, spoil: &dyn Fn(), reason: &str| {
        spoil();
        let line = hang_up(&https, stays);
        assert!(line.contains("ERROR") && line.contains(reason), "{what}: {line}");
        assert_eq!(serves(), first, "{what}");
        for (name, bytes) in ["server.crt", "server.key"].iter().zip(&good) {
            fs::write(https.path(name), bytes).unwrap();
        }
    };
    let write = |name: &str, bytes: &str| fs::write(https.path(name), bytes).unwrap();
    check("no PEM", &|| write("server.crt", "garbage"), "TLS_CERT=\"");
    check("no key", &|| write("server.key", "garbage"), "TLS_KEY=\"");
    check("no file", &|| fs::remove_file(https.path("server.crt")).unwrap(), "TLS_CERT=\"");
    let foreign_key = || {
        https.renew();
        fs::write(https.path("server.crt"), &good[0]).unwrap();
    };
    check("another's key", &foreign_key, "TLS_KEY=\"");
    https.renew();
    hang_up(&https, "were read again");
    assert_ne!(serves(), first);
}

#[test]
fn whoever_does_not_speak_tls_is_closed_and_the_others_are_served() {
    let https = Https::start_with(Setup::new().env("TLS_HANDSHAKE_SECONDS", "3"));
    let client = https.client();
    let start = Instant::now();
    let connect = || {
        let stream = TcpStream::connect(https.service.http.addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
        stream
    };
    let silent = connect();
    let mut stalled = connect();
    // A record's head and the start of a ClientHello.
    stalled.write_all(b"\x16\x03\x01\x02\x00\x01\x00").unwrap();
    let plain = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n".as_slice();
    for garbage in [plain, &[0; 3000], &[0xff; 20], b"\x16\x03\x03\xff\xff"] {
        let mut stream = connect();
        stream.write_all(garbage).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer.first(), Some(&21), "an alert answers {garbage:.20?}: {answer:?}");
        ask(&mut https.connect(&client).unwrap()).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(3), "at once, not at the deadline");
    for mut stream in [silent, stalled] {
        while !is_closed(&mut stream) {
            ask(&mut https.connect(&client).unwrap()).unwrap();
        }
    }
    let took = start.elapsed();
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(6), "{took:?}");
}

/// A device whose handshake takes longer than the pause that is allowed between two requests.
#[test]
fn a_slow_handshake_and_an_idle_connection_have_the_time_that_the_variables_give() {
    let setup = Setup::new().env("TLS_HANDSHAKE_SECONDS", "8").env("KEEP_ALIVE_SECONDS", "1");
    let https = Https::start_with(setup);
    let mut stream = https.connect(&https.client()).unwrap();
    let mut hello = Vec::new();
    stream.conn.write_tls(&mut hello).unwrap();
    let start = Instant::now();
    for piece in hello.chunks(hello.len() / 4 + 1) {
        stream.sock.write_all(piece).unwrap();
        thread::sleep(Duration::from_millis(500));
    }
    ask(&mut stream).unwrap();
    assert!(start.elapsed() > Duration::from_millis(1_900), "longer than a pause between requests");
    let idle = Instant::now();
    let ended = stream.read(&mut [0; 64]);
    assert!(ended.is_err() || ended.is_ok_and(|n| n == 0), "it is closed");
    let took = idle.elapsed();
    assert!(took > Duration::from_millis(900) && took < Duration::from_secs(5), "{took:?}");
}

/// A certificate for `localhost`, that begins in so many hours and ends so many days later, and its key.
fn write_pair(dir: &TempDir, hours: i64, days: i64) {
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.not_before = OffsetDateTime::now_utc() + time::Duration::hours(hours);
    params.not_after = params.not_before + time::Duration::days(days);
    let key = rcgen::KeyPair::generate().unwrap();
    dir.file("server.crt", &params.self_signed(&key).unwrap().pem());
    dir.file("server.key", &key.serialize_pem());
}

#[test]
fn the_end_of_the_certificate_is_a_warning_then_a_reason() {
    let (dir, clock) = (TempDir::new(), FakeClock::at(now_s()));
    write_pair(&dir, -1, 40);
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut setup = Setup::new().env("TLS_CERT", &path("server.crt"));
    setup = setup.env("TLS_KEY", &path("server.key"));
    for (name, value) in clock.env() {
        setup = setup.env(name, &value);
    }
    let service = setup.start();
    let get = |path: &str| https::ask(&service, path, None, &["-k"]);
    let end = || {
        let name = "mqtt_lite_tls_certificate_expiry_timestamp_seconds ";
        let page = get("/metrics").text();
        let value = page.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
        value.parse::<u64>().unwrap().abs_diff(now_s()) / 3600
    };
    assert!(!get("/ready").text().contains("warnings"), "{}", get("/ready").text());
    assert!([958, 959].contains(&end()), "40 days less an hour");

    write_pair(&dir, -1, 2);
    service.signal("HUP");
    service.wait_for_log("WARN  our TLS certificate ends in 1 day, at 2");
    let ready = get("/ready");
    assert_eq!(ready.status, 200);
    assert!(ready.text().contains("\"warnings\":[\"our TLS certificate ends in 1 day, at 2"));
    assert!([46, 47].contains(&end()));

    clock.set(now_s() + 50 * 3600);
    let ready = get("/ready");
    assert_eq!(ready.status, 503);
    assert!(ready.text().contains("our TLS certificate expired at 2"), "{}", ready.text());
    write_pair(&dir, -1, 40);
    service.signal("HUP");
    wait::for_true("the new one counts", || get("/ready").status == 200);
    write_pair(&dir, 60, 40);
    service.signal("HUP");
    wait::for_true("it does not count yet", || {
        get("/ready").text().contains("our TLS certificate begins only at 2")
    });
}

/// Sends SIGHUP and gives the line that it caused.
fn hang_up(https: &Https, expected: &str) -> String {
    let from = https.service.log().len();
    https.service.signal("HUP");
    let log = https.service.wait_for_log_after(from, "SIGHUP:");
    let line = log[from..].lines().find(|line| line.contains("SIGHUP:")).unwrap().to_owned();
    assert!(line.contains(expected), "{line}");
    line
}

pub fn presented(stream: &Tls) -> Vec<u8> {
    stream.conn.peer_certificates().unwrap()[0].to_vec()
}

/// Looks for 50 ms.
fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    match stream.read(&mut [0; 64]) {
        Ok(n) => n == 0,
        Err(e) => !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
    }
}

/// Who replays a ClientHello gets a signature for nothing.
#[test]
fn an_rsa_key_that_is_slow_to_sign_with_is_warned_of() {
    for (kind, warned) in [("rsa:2048", false), ("rsa:4096", true), ("ed25519", false)] {
        let setup = Setup::new().args(&["check-config"]);
        let [cert, key] = ["crt", "key"].map(|name| setup.dir().join(name).display().to_string());
        let made = Command::new("openssl")
            .args(["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
            .args(["-newkey", kind, "-keyout", &key, "-out", &cert])
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", text(&made));
        let exit = setup.env("TLS_CERT", &cert).env("TLS_KEY", &key).run();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        assert_eq!(exit.log.contains("an RSA key of 4096 bits"), warned, "{kind}: {}", exit.log);
    }
}
