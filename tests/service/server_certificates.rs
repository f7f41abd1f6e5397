//! Servers' certificates: who signs them, how they are renewed, what the record knows of them, and that
//! no route of devices ever shows one.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::clock::{FakeClock, now_s, parse_utc};
use crate::support::csr::{self, Csr};
use crate::support::http::Response;
use crate::support::service::{ADMIN_KEY, Exit, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::wait;

const DAY: u64 = 86_400;

/// `server-certificate` with the CA of `service`, by this clock.
fn command(service: &Service, clock: Option<&FakeClock>, args: &[&str]) -> Exit {
    let args = [&["server-certificate"], args].concat();
    let data = service.data("").display().to_string();
    let setup = Setup::new().env("DATA_DIR", &data).args(&args);
    setup.env_of(&clock.map(FakeClock::env).unwrap_or_default()).run()
}

#[track_caller]
fn must(service: &Service, clock: Option<&FakeClock>, args: &[&str]) -> String {
    let exit = command(service, clock, args);
    assert_eq!(exit.code, Some(0), "{args:?}: {}", exit.log);
    exit.log
}

fn read(dir: &TempDir, name: &str) -> String {
    fs::read_to_string(dir.path().join(name)).unwrap()
}

fn serial(certificate: &str) -> String {
    csr::x509_field(certificate, &["-serial"]).trim().replace("serial=", "")
}

/// Has the service look at once.
fn enter(service: &Service, serial: &str) {
    service.signal("HUP");
    service.wait_for_log(&format!("certificate {} of the server ", serial.to_lowercase()));
    assert!(service.index_of_servers().iter().any(|line| line[3] == serial));
}

fn revoke(service: &Service, path: &str, body: &str) -> Response {
    let bearer = format!("Bearer {ADMIN_KEY}");
    let fields = [("Authorization", &*bearer), ("Content-Type", "application/json")];
    service.http.request("DELETE", path, &fields, body.as_bytes())
}

#[test]
fn a_file_that_is_there_is_overwritten_only_if_asked() {
    let (service, out) = (Service::start(&[]), TempDir::new());
    let dir = out.path().display().to_string();
    must(&service, None, &["broker.lan", "10.0.0.5", "--days", "300", "--out", &dir]);
    let before = ["server.crt", "server.key"].map(|name| read(&out, name));
    let exit = command(&service, None, &["broker.lan", "--out", &dir]);
    assert_eq!(exit.code, Some(1));
    assert!(exit.log.contains("server.crt: exists: --renew DIR renews it"), "{}", exit.log);
    assert_eq!(must(&service, None, &["--renew", &dir]), "", "it is young: nothing to do or say");

    // Two thirds of its life later: a new certificate, for the same key, names and time.
    let clock = FakeClock::at(now_s() + 199 * DAY);
    assert_eq!(must(&service, Some(&clock), &["--renew", &dir]), "");
    assert_eq!(before, ["server.crt", "server.key"].map(|name| read(&out, name)));
    clock.set(now_s() + 201 * DAY);
    let said = must(&service, Some(&clock), &["--renew", &dir]);
    assert!(said.contains("server.crt is renewed until 20") && said.lines().count() == 1, "{said}");
    assert_ne!(read(&out, "server.crt"), before[0]);
    assert_eq!(read(&out, "server.key"), before[1], "the key stays");
    let text = csr::x509_text(&read(&out, "server.crt"));
    assert!(text.contains("DNS:broker.lan, IP Address:10.0.0.5"), "{text}");
    let end = csr::x509_field(&read(&out, "server.crt"), &["-enddate", "-dateopt", "iso_8601"]);
    let end = parse_utc(&end);
    assert!(end.abs_diff(now_s() + 501 * DAY) < 3600, "{end}");
    let pair = csr::openssl(&["x509", "-noout", "-pubkey"], &read(&out, "server.crt"));
    assert_eq!(csr::openssl(&["pkey", "-pubout"], &before[1]), pair);
    assert_eq!(must(&service, Some(&clock), &["--renew", &dir]), "", "once is enough");

    must(&service, Some(&clock), &["--renew", &dir, "--force"]);
    assert_ne!(read(&out, "server.key"), before[1], "and now another key");
    must(&service, None, &["other.lan", "--out", &dir, "--force"]);
    assert!(csr::x509_text(&read(&out, "server.crt")).contains("DNS:other.lan"));

    let stranger = Service::start(&[]);
    let exit = command(&stranger, None, &["--renew", &dir]);
    assert_eq!(exit.code, Some(1));
    assert!(exit.log.contains("not a server's certificate by this CA"), "{}", exit.log);
}

#[test]
fn the_record_and_the_list_know_it_and_no_route_of_devices_does() {
    let mut service = Service::start(&[("ADMIN_API_KEY", ADMIN_KEY), ("REENROLL", "allow")]);
    let out = TempDir::new();
    let dir = out.path().display().to_string();
    // Named like a device.
    must(&service, None, &["broker", "--out", &dir]);
    let server = serial(&read(&out, "server.crt"));
    enter(&service, &server);
    let line = service.index_of_servers().pop().unwrap();
    assert_eq!(
        (&*line[0], &*line[3], &*line[4], &*line[5]),
        ("V", &*server, "server", "/CN=broker")
    );

    let status = |service: &Service| service.http.get("/api/v1/certificates/broker/status");
    let hidden = |service: &Service| {
        let by_serial = format!("/api/v1/certificates/{server}/download");
        assert_eq!(service.http.get(&by_serial).status, 404);
    };
    assert_eq!(status(&service).status, 404);
    hidden(&service);
    assert_eq!(service.revoke("broker").status, 404, "there is no such device");
    assert_eq!(service.onboard("broker").status, 200);
    let device = service.enroll("other", &Csr::new("other").make());
    assert_eq!(device.status, 200);
    service.kill9();
    service.restart();
    assert_eq!(status(&service).status, 404);
    let body = service.http.get("/api/v1/certificates/other/status");
    assert_eq!(body.field("status"), "active");

    // A device of the same name: each is revoked for itself.
    let out2 = TempDir::new();
    must(&service, None, &["other", "--out", &out2.path().display().to_string()]);
    let second = serial(&read(&out2, "server.crt"));
    enter(&service, &second);
    assert_eq!(service.revoke("other").status, 200);
    assert_eq!(status_of(&service, &second), "Valid (V)", "a device's revocation");

    for path in [
        format!("/api/v1/devices/broker/certificates/{second}"),
        format!("/api/v1/devices/broker/certificates/{}", "41".repeat(16)),
        "/api/v1/devices/broker/certificates/x".to_owned(),
    ] {
        assert_eq!(
            revoke(&service, &path, "").header("x-error-code"),
            Some("CERTIFICATE_NOT_FOUND")
        );
    }
    let path = format!("/api/v1/devices/broker/certificates/{}", server.to_lowercase());
    assert_eq!(revoke(&service, &path, r#"{"reason":"boredom"}"#).status, 400);
    assert!(service.http.request("DELETE", &path, &[], b"").status == 403);
    let answer = revoke(&service, &path, r#"{"reason":"keyCompromise"}"#);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.field("serial_number"), server.to_lowercase());
    assert_eq!(revoke(&service, &path, "").status, 200, "again");
    assert_eq!(status_of(&service, &server), "Revoked (R)");
    let list = csr::openssl(&["crl", "-noout", "-text"], &service.read("ca/crl.pem"));
    let entry = list.split(&server).nth(1).unwrap_or_else(|| panic!("{list}"));
    assert!(entry.contains("Key Compromise"), "{list}");
    hidden(&service);

    // A client that checks refuses the one and takes the other.
    let verify = |certificate: &Path| {
        let path = |name: &str| service.data(name).display().to_string();
        let args = ["verify", "-crl_check", "-purpose", "sslserver"];
        let files = ["-CAfile", &path("ca/root-ca.crt"), "-CRLfile", &path("ca/crl.pem")];
        let last = [certificate.to_str().unwrap()];
        csr::try_openssl(&[&args[..], &files, &last].concat(), "")
    };
    assert!(verify(&out.path().join("server.crt")).unwrap_err().contains("revoked"));
    verify(&out2.path().join("server.crt")).unwrap();
}

/// What `openssl ca -status` says.
fn status_of(service: &Service, serial: &str) -> String {
    let config = service.dir().join("ca.cnf");
    let index = service.data("ca/index.txt").display().to_string();
    fs::write(&config, format!("[ca]\ndefault_ca=x\n[x]\ndatabase={index}\n")).unwrap();
    let mut command = Command::new("openssl");
    let output = command.args(["ca", "-status", serial, "-config"]).arg(&config).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = said.lines().find_map(|line| line.strip_prefix(&format!("{serial}=")));
    line.unwrap_or_else(|| panic!("{said}")).to_owned()
}

#[test]
fn its_end_is_told_for_thirty_days_until_it_is_replaced() {
    let (clock, out) = (FakeClock::at(now_s()), TempDir::new());
    let service = Setup::new().env_of(&clock.env()).start();
    let dir = out.path().display().to_string();
    must(&service, None, &["broker.lan", "--days", "100", "--out", &dir]);
    enter(&service, &serial(&read(&out, "server.crt")));
    let ready = || service.http.get("/ready").text();
    assert!(!ready().contains("broker.lan"), "{}", ready());
    clock.set(now_s() + 75 * DAY);
    wait::for_true("it is told", || ready().contains("of the server broker.lan ends in 24 days"));
    clock.set(now_s() + 76 * DAY);
    must(&service, Some(&clock), &["--renew", &dir]);
    enter(&service, &serial(&read(&out, "server.crt")));
    wait::for_true("it is replaced", || !ready().contains("broker.lan"));
}
