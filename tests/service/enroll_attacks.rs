//! `scripts/enroll.sh` against whoever is between it and the service: other CAs, answers of any size,
//! commands for the terminal of whoever reads the log. Run by hand against the script as it was, each
//! of them succeeds.

use std::fs;
use std::process::Command;

use crate::ca::Chain;
use crate::support::csr::{self, openssl};
use crate::support::device::{Device, Surroundings};
use crate::support::hostile::{Hostile, Reply};
use crate::support::http::Client;
use crate::support::https;
use crate::support::service::{Service, Setup};
use crate::support::temp::TempDir;

use Surroundings::{Busybox, Full, Wget};

const API_KEY: &str = "onboarding-key-of-the-tests";

fn fingerprint(service: &Service) -> String {
    csr::x509_field(&service.read("ca/root-ca.crt"), &["-fingerprint", "-sha256"])
}

/// A device that has the CA of `service` already.
fn trusting(service: &Service, url: &str) -> Device {
    let device = Device::new("d", url);
    fs::create_dir(device.folder()).unwrap();
    fs::copy(service.data("ca/root-ca.crt"), device.file("ca.crt")).unwrap();
    device
}

/// Passes a request on to a service, and its answer back.
fn pass(to: u16, request: &str) -> Reply {
    let request = request.replacen("\r\n", "\r\nConnection: close\r\n", 1);
    Reply::Bytes(Client::new(to).raw(request.as_bytes()))
}

/// A folder as OpenSSL wants it, with the CA of `service`.
fn store(service: &Service) -> TempDir {
    let (dir, ca) = (TempDir::new(), service.read("ca/root-ca.crt"));
    let hash = csr::x509_field(&ca, &["-subject_hash"]);
    dir.file(&format!("{}.0", hash.trim()), &ca);
    dir
}

/// The system's store holds hundreds of CAs, and whatever the owner of the network has put there.
#[test]
fn a_ca_of_the_systems_store_is_none() {
    let ours = Setup::new().start();
    // OpenSSL looks into the store only if it has no CA of that name.
    let theirs = Setup::new().env("ONBOARDING_API_KEY", API_KEY);
    Chain::new(1).put(&theirs);
    let theirs = https::start(theirs);
    let store = store(&theirs);
    let dir = TempDir::new();
    let key = dir.file("key", API_KEY).display().to_string();
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let mount = format!(
        "mount --bind {} /etc/ssl/certs && export SSL_CERT_DIR=/etc/ssl/certs && exec \"$@\"",
        store.path().display()
    );
    let unshare = ["unshare", if is_root { "-m" } else { "-rm" }, "sh", "-c", &mount, "sh"];
    let url = format!("https://localhost:{}", theirs.port());
    for surroundings in [Full, Busybox] {
        let device = trusting(&ours, &url).surroundings(surroundings).wrapper(&unshare);
        let outcome = device.enroll(&["--api-key-file", &key]);
        assert_eq!(outcome.code, Some(5), "{surroundings:?}: {outcome:?}");
        assert!(!outcome.said.contains("mount"), "{outcome:?}");
    }
    assert!(!theirs.log().contains("issued for"), "it has our key: {}", theirs.log());
}

/// The CA is the right one by its fingerprint, and what is signed is another's.
#[test]
fn a_certificate_of_another_ca() {
    let theirs = Setup::new();
    Chain::new(1).put(&theirs);
    let theirs = theirs.start();
    let ours = Setup::new().start();
    let (our_port, their_port) = (ours.port(), theirs.port());
    let liar = Hostile::start(move |request| {
        pass(if request.starts_with("GET /api/v1/ca ") { our_port } else { their_port }, request)
    });
    let store = store(&theirs).path().display().to_string();
    // One that says of an error that it is one, then OK, and ends with 0: as old ones do.
    let old = "case $* in verify*) REAL \"$@\" || echo OK; exit 0 ;; *) exec REAL \"$@\" ;; esac";
    for (n, script) in ["exec REAL \"$@\"", old].iter().enumerate() {
        let device = Device::new(&format!("d{n}"), &liar.url()).program("openssl", script);
        let device = device.env(&[("SSL_CERT_DIR", store.clone())]);
        let outcome = device.enroll(&["--ca-fingerprint", &fingerprint(&ours)]);
        assert_eq!(outcome.code, Some(5), "{outcome:?}");
        assert!(outcome.said.contains("not from the CA"), "{outcome:?}");
        assert_eq!(device.files(), ["device.key.new"]);
    }
    assert_eq!(theirs.index().len(), 2, "they were signed");
}

/// A service that has another CA by now: no token is spent on what could not be verified.
#[test]
fn a_service_with_another_ca_gets_no_request_for_a_token() {
    let (ours, theirs) = (Setup::new().start(), Setup::new().start());
    let url = format!("http://127.0.0.1:{}", theirs.port());
    for surroundings in [Full, Busybox, Wget] {
        let device = trusting(&ours, &url).surroundings(surroundings);
        let outcome = device.enroll(&[]);
        assert_eq!(outcome.code, Some(5), "{outcome:?}");
        assert!(outcome.said.contains(&fingerprint(&theirs).replace(':', "").to_lowercase()));
        assert_eq!(device.files(), ["ca.crt"]);
    }
    assert!(!theirs.log().contains("issued for"), "{}", theirs.log());
}

/// The right CA, with another behind it, which the MQTT client would trust.
#[test]
fn a_ca_with_company() {
    let (ours, theirs) = (Setup::new().start(), Setup::new().start());
    let [our_ca, their_ca] = [&ours, &theirs].map(|service| service.read("ca/root-ca.crt"));
    let pin = fingerprint(&ours);
    for body in [format!("{our_ca}{their_ca}"), format!("{our_ca}{their_ca}{our_ca}")] {
        let liar = Hostile::start(move |_| Reply::http("200 OK", "", &body));
        let device = Device::new("d", &liar.url());
        let outcome = device.enroll(&["--ca-fingerprint", &pin]);
        assert_eq!(outcome.code, Some(5), "{outcome:?}");
        assert!(!device.folder().exists(), "{:?}", device.files());
    }
    // Nothing around it is kept, by whatever name openssl would take it for a certificate.
    let other_name = |name: &str| their_ca.replace("CERTIFICATE", name);
    let (x509, trusted) = (other_name("X509 CERTIFICATE"), other_name("TRUSTED CERTIFICATE"));
    let device = [
        format!("\u{1b}[2J\n{our_ca}\u{1b}[31m"),
        format!("{our_ca}{x509}"),
        format!("{our_ca}{trusted}"),
        format!("{our_ca}x-----BEGIN CERTIFICATE-----\n{x509}x-----END CERTIFICATE-----\n"),
    ]
    .map(|body| {
        let port = ours.port();
        let odd = Hostile::start(move |request| {
            let is_ca = request.starts_with("GET /api/v1/ca ");
            if is_ca { Reply::http("200 OK", "", &body) } else { pass(port, request) }
        });
        let device = Device::new(&format!("d{}", ours.index().len()), &odd.url());
        device.must_enroll(&["--ca-fingerprint", &pin]);
        assert_eq!(device.read("ca.crt").trim(), our_ca.trim());
        device
    })
    .into_iter()
    .next_back()
    .unwrap();
    assert_eq!(openssl(&["x509"], &device.read("device.crt")), device.read("device.crt"));
}

/// What a log shows is read on terminals.
#[test]
fn commands_to_a_terminal_are_not_logged() {
    let ours = Setup::new().start();
    let ca = ours.read("ca/root-ca.crt");
    for text in [
        "\u{1b}]0;title\u{7}\u{1b}[2Jred",
        "\\\\033[31mred\\\\n\\\\rred",
        "\\\\\\\\033[31mred",
        "\\\\x1b[31m\\\\c red",
        "\\nred: forged\\rred",
        "\u{9b}31mred\u{202e}",
        &"red ".repeat(100_000),
    ] {
        let (ca, body) = (ca.clone(), format!("{{\"success\":false,\"error\":\"{text}\"}}"));
        let liar = Hostile::start(move |request| {
            if request.starts_with("GET /api/v1/ca ") {
                return Reply::http("200 OK", "", &ca);
            }
            let fields = "X-Error-Code: \u{1b}[31mRED\r\nX-Error-Code: RED\u{1b}[31m\r\n";
            Reply::http("418 \u{1b}[31mred", fields, &body)
        });
        for surroundings in [Full, Busybox, Wget] {
            let device = Device::new("d", &liar.url()).surroundings(surroundings);
            let outcome = device.enroll(&["--tries", "1"]);
            assert_eq!(outcome.code, Some(4), "{outcome:?}");
            let plain = |c: char| c == '\n' || c == ' ' || c.is_ascii_graphic();
            assert!(outcome.said.chars().all(plain), "{outcome:?}");
            let lines = outcome.said.lines();
            let is_ours = |line: &str| line.starts_with("enroll: ") && line.len() < 600;
            assert!(lines.clone().all(is_ours) && lines.count() <= 3, "{outcome:?}");
        }
    }
}

/// An answer takes 1 MiB of a device's flash or memory at most, whichever part of it is large.
#[test]
fn answers_without_an_end() {
    let line = format!("X-Field: {}\r\n", "x".repeat(1000)).into_bytes();
    let head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n";
    let body = [&head[..], b"\r\n"].concat();
    for (first, others) in [(body, vec![b'x'; 65_536]), (head.to_vec(), line)] {
        for surroundings in [Full, Busybox, Wget] {
            let (first, others) = (first.clone(), others.clone());
            let flood = Hostile::start(move |_| Reply::Flood(first.clone(), others.clone(), 100));
            let device = Device::new("d", &flood.url()).surroundings(surroundings);
            let outcome = device.enroll(&["--tries", "1"]);
            assert_eq!(outcome.code, Some(3), "{outcome:?}");
            // What is in the kernel's buffers counts as sent.
            assert!(flood.sent() < 24 << 20, "{surroundings:?} took {} bytes", flood.sent());
            assert!(outcome.said.len() < 2_000, "{}", outcome.said);
        }
    }
}

/// What the answer to onboarding says is a token goes into JSON and into a head.
#[test]
fn a_token_that_is_none() {
    let ours = Setup::new().start();
    let ca = ours.read("ca/root-ca.crt");
    let liar = Hostile::start(move |request| {
        if request.starts_with("GET /api/v1/ca ") {
            return Reply::http("200 OK", "", &ca);
        }
        let token = "a\\\\n\\\\042,\\\\042csr\\\\042:\\\\042b";
        Reply::http("200 OK", "", &format!("{{\"provisioning_token\":\"{token}\"}}"))
    });
    let device = Device::new("d", &liar.url());
    assert_eq!(device.enroll(&["--tries", "1"]).code, Some(3));
    assert!(liar.requests().iter().all(|r| !r.contains("sign-csr")), "{:?}", liar.requests());
}

/// Whoever answers must not send the key elsewhere. (busybox cannot be told; it is for plain HTTP only.)
#[test]
fn nobody_is_followed_to_another_server() {
    let ours = Setup::new().start();
    let dir = TempDir::new();
    let key = dir.file("key", API_KEY).display().to_string();
    for surroundings in [Full, Wget] {
        let elsewhere = Hostile::start(|_| Reply::http("200 OK", "", "{}"));
        let (ca, fields) =
            (ours.read("ca/root-ca.crt"), format!("Location: {}/\r\n", elsewhere.url()));
        let liar = Hostile::start(move |request| match request.starts_with("GET /api/v1/ca ") {
            true => Reply::http("200 OK", "", &ca),
            false => Reply::http("307 Temporary Redirect", &fields, ""),
        });
        let device = Device::new("d", &liar.url()).surroundings(surroundings);
        let outcome = device.enroll(&["--tries", "1", "--api-key-file", &key]);
        assert_eq!(outcome.code, Some(4), "{outcome:?}");
        assert!(elsewhere.requests().is_empty(), "{:?}", elsewhere.requests());
    }
}
