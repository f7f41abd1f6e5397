//! HTTPS with foreign clients, curl and OpenSSL, and with a client that sends what none of them would.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::common::{Served, Xorshift, connect_from, one_response, serve, to_end, until};
use mqtt_publisher_lite::config::certified_key;
use mqtt_publisher_lite::edge::Wait;
use rcgen::generate_simple_self_signed;
use rustls::crypto::cipher::{MessageEncrypter, OutboundChunks, OutboundPlainMessage};
use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, ClientConnection, ConnectionTrafficSecrets, ContentType, ProtocolVersion,
    RootCertStore, StreamOwned,
};

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

    /// An RSA key of this many bits in place of the present one.
    fn with_rsa(self, bits: u32) -> Self {
        let done = Command::new("openssl")
            .args(["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
            .args(["-addext", "subjectAltName=DNS:localhost"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-newkey", &format!("rsa:{bits}"), "-keyout"])
            .arg(self.path("key.pem"))
            .arg("-out")
            .arg(self.path("cert.pem"))
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        self
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

/// A client that knows the certificate and speaks TLS 1.3 with one cipher.
fn client(certificate: &Certificate) -> ClientConnection {
    let provider = CryptoProvider {
        cipher_suites: vec![TLS13_AES_128_GCM_SHA256],
        ..ring::default_provider()
    };
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificate.path("cert.pem")).unwrap()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.enable_secret_extraction = true;
    ClientConnection::new(Arc::new(config), ServerName::try_from("localhost").unwrap()).unwrap()
}

/// The bytes with which it begins.
fn hello(certificate: &Certificate) -> Vec<u8> {
    let mut bytes = Vec::new();
    client(certificate).write_tls(&mut bytes).unwrap();
    bytes
}

type Tls = StreamOwned<ClientConnection, TcpStream>;

fn get(stream: &mut Tls, path: &str) -> u16 {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    one_response(stream, false).0
}

/// A connection after its handshake, of which the test encrypts the records.
struct Raw {
    stream: TcpStream,
    encrypter: Box<dyn MessageEncrypter>,
    sent: u64,
}

impl Raw {
    fn open(served: &Served, certificate: &Certificate) -> Self {
        let mut tls = StreamOwned::new(client(certificate), served.connect());
        assert_eq!(get(&mut tls, "/x"), 200);
        let (connection, stream) = tls.into_parts();
        let (sent, secrets) = connection.dangerous_extract_secrets().unwrap().tx;
        let ConnectionTrafficSecrets::Aes128Gcm { key, iv } = secrets else {
            panic!("another cipher")
        };
        let suite = TLS13_AES_128_GCM_SHA256.tls13().unwrap();
        Raw { stream, encrypter: suite.aead_alg.encrypter(key, iv), sent }
    }

    /// False if the server does not take it any more.
    fn send(&mut self, typ: ContentType, payload: &[u8]) -> bool {
        let payload = OutboundChunks::Single(payload);
        let message = OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload };
        let record = self.encrypter.encrypt(message, self.sent).unwrap();
        self.sent += 1;
        self.stream.write_all(&record.encode()).is_ok()
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
        assert_eq!(plain, "GET /x 127.0.0.1\n 200");
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
        s.http.max_buffer_bytes = 1024 * 1024;
    });
    let streams: Vec<_> = (0..200).map(|_| served.connect()).collect();
    until("all came", || served.counters.accepted.value() == 200);
    assert_eq!(served.counters.open.value(), 128);
    assert!(served.counters.held_bytes.value() <= 512 * 1024);
    let large = "x".repeat(100_000) + " 200";
    assert_eq!(curl(&served, &certificate, "/bytes?100000", &[]), large);
    drop(streams);
}

/// The start of a ClientHello of nearly 64 KiB, in full records, of which so many bytes come.
fn endless_hello(bytes: usize) -> Vec<u8> {
    let mut message = vec![1, 0, 0xff, 0xf0];
    message.resize(bytes, 0);
    message.chunks(16 * 1024).flat_map(record).collect()
}

fn record(part: &[u8]) -> Vec<u8> {
    let [high, low] = (part.len() as u16).to_be_bytes();
    [&[22, 3, 1, high, low], part].concat()
}

/// More than the largest record of a message that is not whole is not kept, in the handshake and
/// after it.
#[test]
fn a_handshake_message_is_bounded() {
    let certificate = Certificate::new("message");
    let served = serve(|s| s.tls = Some(certificate.shown()));
    let mut stream = served.connect();
    let _ = stream.write_all(&endless_hello(48 * 1024));
    let start = Instant::now();
    let _ = stream.read_to_end(&mut Vec::new());
    let mut raw = Raw::open(&served, &certificate);
    // A key update, a message of 1 byte, is taken, also in two parts.
    assert!(raw.send(ContentType::Handshake, &[24, 0]));
    assert!(raw.send(ContentType::Handshake, &[0, 1, 0]));
    raw.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut one = [0];
    while raw.stream.read(&mut one).is_ok_and(|n| n > 0) {}
    let mut raw = Raw::open(&served, &certificate);
    let open = served.counters.open.value();
    let mut parts = vec![vec![24, 0, 0xff, 0xf0]];
    parts.resize(64, vec![0; 1000]);
    let taken = parts.iter().take_while(|part| raw.send(ContentType::Handshake, part)).count();
    until("it is closed", || served.counters.open.value() < open);
    assert!(taken > 2 && start.elapsed() < Duration::from_secs(10), "{taken}");
    assert_eq!(curl(&served, &certificate, "/nothing", &[]), " 204");
}

#[test]
fn unfinished_messages_stay_within_the_budget() {
    const BUDGET: usize = 2 * 1024 * 1024;
    let certificate = Certificate::new("unfinished");
    let served = serve(|s| {
        s.tls = Some(certificate.shown());
        s.http.max_buffer_bytes = BUDGET;
    });
    let held = || {
        let held = served.counters.held_bytes.value() as usize;
        assert!(held <= BUDGET, "{held}");
        held
    };
    let host = |n: u32| Ipv4Addr::from_bits(0x7f00_0002 + n).into();
    let mut connect = (0..).map(|n| connect_from(host(n), served.addr).unwrap());
    let begun = endless_hello(14_000);
    let mut streams: Vec<TcpStream> = connect.by_ref().take(30).collect();
    streams.iter_mut().for_each(|stream| stream.write_all(&begun).unwrap());
    until("they are counted", || held() > 30 * 14_000);
    let mut raw: Vec<Raw> = (0..30).map(|_| Raw::open(&served, &certificate)).collect();
    let before = held();
    let mut message = vec![24, 0, 0xff, 0xf0];
    message.resize(14_000, 0);
    raw.iter_mut().for_each(|raw| assert!(raw.send(ContentType::Handshake, &message)));
    until("those after the handshake too", || held() > before + 30 * 14_000);
    streams.extend(connect.take(200));
    streams.iter_mut().for_each(|stream| {
        // Whoever does not fit is closed while it still sends.
        let _ = stream.write_all(&begun);
        held();
    });
    until("the rest is closed", || served.counters.open.value() < 150 && held() > BUDGET / 4);
    assert_eq!(curl(&served, &certificate, "/nothing", &[]), " 204");
    drop((streams, raw));
    until("nothing is held", || served.counters.open.value() == 0);
    assert_eq!(served.counters.held_bytes.value(), 0);
}

/// Bytes of every kind, cut anywhere, on connections of which some are closed at any time.
#[test]
fn requests_come_through_however_the_records_are_cut() {
    let certificate = Certificate::new("cut");
    let served = serve(|s| s.tls = Some(certificate.shown()));
    let mut random = Xorshift(7);
    for round in 0..60 {
        let mut tls = client(&certificate);
        let mut stream = served.connect();
        stream.set_nodelay(true).unwrap();
        let body = "y".repeat(random.below(60_000));
        let length = body.len();
        write!(tls.writer(), "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n")
            .unwrap();
        let mut rest = body.as_bytes();
        let bound = 1 + random.below(30_000);
        let gives_up = (round % 3 == 0).then(|| random.below(20));
        let mut pieces = 0;
        while tls.wants_write() || !rest.is_empty() {
            if !rest.is_empty() && !tls.is_handshaking() {
                let n = tls.writer().write(rest).unwrap();
                rest = &rest[n..];
            }
            let mut bytes = Vec::new();
            while tls.wants_write() {
                tls.write_tls(&mut bytes).unwrap();
            }
            for piece in bytes.chunks(bound) {
                stream.write_all(piece).unwrap();
                pieces += 1;
            }
            if gives_up.is_some_and(|after| pieces > after) {
                break;
            }
            if tls.is_handshaking() && tls.wants_read() {
                tls.read_tls(&mut stream).unwrap();
                tls.process_new_packets().unwrap();
            }
        }
        if gives_up.is_none() {
            let (status, _, echoed) = one_response(&mut StreamOwned::new(tls, stream), false);
            assert_eq!((status, echoed), (200, format!("POST /x 127.0.0.1\n{body}")), "{round}");
        }
    }
    until("all are gone", || served.counters.open.value() == 0);
    assert_eq!(served.counters.held_bytes.value(), 0);
}

/// Each costs the server a signature with a key that is slow at it. Neither who is connected nor who
/// comes from another address waits for them.
#[test]
fn replayed_hellos_delay_nobody() {
    let certificate = Certificate::new("replay").with_rsa(4096);
    let served = serve(|s| s.tls = Some(certificate.shown()));
    let mut kept = StreamOwned::new(client(&certificate), served.connect());
    assert_eq!(get(&mut kept, "/x"), 200);
    let (hello, answered, stop) = (hello(&certificate), AtomicU32::new(0), AtomicBool::new(false));
    let replay = || {
        let connect = || {
            let mut stream = connect_from([127, 0, 0, 77].into(), served.addr).unwrap();
            stream.write_all(&hello).unwrap();
            stream
        };
        let mut streams: Vec<TcpStream> = (0..200).map(|_| connect()).collect();
        let mut next = 0;
        while !stop.load(Ordering::Relaxed) {
            // The next one whose turn it is, in the order in which they came.
            streams[next].read_exact(&mut [0]).unwrap();
            streams[next] = connect();
            next = (next + 1) % 200;
            answered.fetch_add(1, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let attack = scope.spawn(replay);
        until("it has begun", || answered.load(Ordering::Relaxed) > 0);
        let (mut most_kept, mut most_new) = (0, 0);
        for _ in 0..10 {
            let before = answered.load(Ordering::Relaxed);
            assert_eq!(get(&mut kept, "/x"), 200);
            let between = answered.load(Ordering::Relaxed);
            let mut new = StreamOwned::new(client(&certificate), served.connect());
            assert_eq!(get(&mut new, "/x"), 200);
            most_kept = most_kept.max(between - before);
            most_new = most_new.max(answered.load(Ordering::Relaxed) - between);
        }
        stop.store(true, Ordering::Relaxed);
        attack.join().unwrap();
        println!("signatures meanwhile: {most_kept} and {most_new} at most");
        // In turn with the others, each would have waited for 200 signatures.
        assert!(most_kept < 100 && most_new < 100, "{most_kept}, {most_new}");
    });
}

#[test]
fn a_bad_record_is_no_failed_handshake() {
    let certificate = Certificate::new("record");
    let served = serve(|s| s.tls = Some(certificate.shown()));
    let mut raw = Raw::open(&served, &certificate);
    raw.stream.write_all(b"\x17\x03\x03\x00\x14 twenty bytes of ours").unwrap();
    let mut alert = Vec::new();
    let _ = raw.stream.read_to_end(&mut alert);
    until("it is closed", || served.counters.open.value() == 0);
    assert_eq!(served.counters.handshakes_failed.value(), 0);
}

#[test]
fn whoever_does_not_speak_tls_is_closed_and_disturbs_nobody() {
    let certificate = Certificate::new("garbage");
    let served = serve(|s| {
        s.tls = Some(certificate.shown());
        s.deadlines.set(Wait::Handshake, Duration::from_millis(300));
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
