//! HTTPS from the first start, with a certificate of our own CA that the service makes and renews.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::https::{Https, ask, presented};
use crate::support::clock::{FakeClock, now_s, parse_utc};
use crate::support::csr;
use crate::support::device::Device;
use crate::support::https;
use crate::support::service::{ADMIN_KEY, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::wait;

const DAY: u64 = 86_400;
const NAMES: (&str, &str) = ("TLS_NAMES", "localhost,127.0.0.1");

fn serial(service: &Service) -> String {
    csr::x509_field(&service.read("tls/server.crt"), &["-serial"]).trim().to_owned()
}

/// The serial of what a new client is shown, whose clock shows this.
fn shown(https: &Https, unix_s: u64) -> String {
    let mut stream = https.connect(&https.client_at(unix_s)).unwrap();
    ask(&mut stream).unwrap_or_else(|e| panic!("{e}\n{}", https.service.log()));
    let der = presented(&stream);
    let file = https.service.dir().join("shown.der");
    fs::write(&file, der).unwrap();
    csr::openssl(
        &["x509", "-inform", "DER", "-noout", "-serial", "-in", file.to_str().unwrap()],
        "",
    )
    .trim()
    .replace("serial=", "")
}

#[test]
fn one_command_and_a_device_enrols_by_the_fingerprint() {
    let mut https = Https::auto(Setup::new().envs(&[NAMES, ("ADMIN_API_KEY", ADMIN_KEY)]));
    let fingerprint = {
        let log = https.service.log();
        let line = log.lines().find(|line| line.contains("CA SHA-256 fingerprint")).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    let url = format!("https://localhost:{}", https.service.port());
    let device = Device::new("device-1", &url);
    device.must_enroll(&["--ca-fingerprint", &fingerprint]);
    let key = fs::metadata(https.path("tls/server.key")).unwrap().permissions().mode();
    assert_eq!(key & 0o777, 0o600);
    let first = serial(&https.service);
    let lines = https.service.index_of_servers();
    assert!(lines.len() == 1 && first.ends_with(&lines[0][3]), "{lines:?}");

    https.service.terminate();
    https.service.restart();
    assert_eq!(serial(&https.service), first, "the same after a restart");
    assert_eq!(https.service.index_of_servers().len(), 1);
    assert!(!https.service.log().contains("are no device's"), "{}", https.service.log());
    // A device renews by it.
    let renewed = https::ask(&https.service, "/api/v1/certificates/device-1/status", None, &[]);
    assert_eq!(renewed.status, 200);

    // Other names: another certificate, for the same key.
    let key = https.service.read("tls/server.key");
    https.service.set_env("TLS_NAMES", "localhost, gateway.lan,10.0.0.7");
    https.service.terminate();
    https.service.restart();
    assert_ne!(serial(&https.service), first);
    assert_eq!(https.service.read("tls/server.key"), key);
    let text = csr::x509_text(&https.service.read("tls/server.crt"));
    assert!(text.contains("DNS:localhost, DNS:gateway.lan, IP Address:10.0.0.7\n"), "{text}");
    assert_eq!(https.service.index_of_servers().len(), 2);

    // Revoked: at the next look there is another, with a new key.
    let old = https.service.index_of_servers().remove(1)[3].clone();
    let bearer = format!("Authorization: Bearer {ADMIN_KEY}");
    let path = format!("/api/v1/devices/localhost/certificates/{old}");
    let answer = https::ask(&https.service, &path, None, &["-X", "DELETE", "-H", &bearer]);
    assert_eq!(answer.status, 200, "{}", answer.text());
    https.service.signal("HUP");
    wait::for_true("another is shown", || {
        !serial(&https.service).ends_with(&old) && https.service.read("tls/server.key") != key
    });

    // Something that cannot be used is made anew.
    fs::write(https.path("tls/server.key"), "rubbish").unwrap();
    https.service.terminate();
    https.service.restart();
    assert!(https.service.log().contains("what TLS=auto had made cannot be used"));
    assert_eq!(https::ask(&https.service, "/health", None, &[]).status, 200);
}

#[test]
fn without_names_it_is_for_those_of_the_machine() {
    let https = Https::auto(Setup::new());
    let text = csr::x509_text(&https.service.read("tls/server.crt"));
    assert!(text.contains("DNS:localhost") && text.contains("IP Address:127.0.0.1"), "{text}");
    let check = https.service.data("");
    let setup = Setup::new().env("TLS", "auto").env("DATA_DIR", check.to_str().unwrap());
    let exit = setup.args(&["healthcheck"]).env("PORT", &https.service.port().to_string()).run();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
}

/// However an address is written, and however many names there are: nothing new is asked for.
#[test]
fn the_same_names_make_no_other_certificate() {
    let many: String = (0..70).map(|n| format!(",host-{n}.lan")).collect();
    let mut https = Https::auto(Setup::new().env("TLS_NAMES", "localhost,2001:DB8:0::1"));
    for names in ["localhost,2001:DB8:0::1".to_owned(), format!("localhost{many}")] {
        https.service.set_env("TLS_NAMES", &names);
        let [first, second] = [(); 2].map(|()| {
            https.service.terminate();
            https.service.restart();
            serial(&https.service)
        });
        assert_eq!(first, second, "{names}");
    }
    assert_eq!(https.service.index_of_servers().len(), 2, "{}", https.service.log());
}

#[test]
fn what_it_does_not_go_with() {
    let refused = |env: &[(&str, &str)], why: &str| {
        let exit = Setup::new().envs(env).run();
        assert_eq!(exit.code, Some(2), "{}", exit.log);
        assert!(exit.log.contains(why) && exit.log.lines().count() == 1, "{}", exit.log);
    };
    let files = [("TLS_CERT", "a"), ("TLS_KEY", "b"), ("TLS", "auto")];
    refused(&files, "TLS=\"auto\": must be unset when TLS_CERT is set");
    refused(&[("TLS", "yes")], "TLS=\"yes\": must be auto");
    refused(&[("TLS_NAMES", "a.lan")], "TLS_NAMES: needs TLS=auto");
    let names = [("TLS", "auto"), ("TLS_NAMES", "a.lan, b c")];
    refused(&names, "TLS_NAMES=\"a.lan, b c\": must be DNS names and IP addresses");
}

/// Whether there is HTTPS is settled by the start.
#[test]
fn a_signal_neither_begins_https_nor_ends_it() {
    const SAID: &str = "SIGHUP: TLS has changed, which takes effect at the next start only";
    const METRIC: &str = "\nmqtt_lite_tls_certificate_expiry_timestamp_seconds ";
    let dir = TempDir::new();
    let set = |text: &str| dir.file("environment", text).display().to_string();
    let setup = || Setup::new().args(&["--env-file", &set("")]);
    let plain = setup().start();
    set("TLS=auto\n");
    plain.signal("HUP");
    plain.wait_for_log(SAID);
    assert!(!plain.data("tls").exists(), "{}", plain.log());

    // The variable is there for the test alone: it tells that HTTPS is what is waited for.
    let setup = setup().env("TLS_CERT", "");
    set("TLS=auto\n");
    let service = setup.start();
    set("");
    service.signal("HUP");
    service.wait_for_log(SAID);
    let metrics = https::ask(&service, "/metrics", None, &[]);
    assert!(metrics.text().contains(METRIC), "it is shown still: {}", metrics.text());
}

#[test]
fn by_a_clock_that_is_not_set_what_is_there_is_shown_and_nothing_is_made() {
    let clock = FakeClock::at(10);
    let setup = Setup::new().envs(&[NAMES, ("TLS", "auto")]).env_of(&clock.env());
    let mut service = setup.start();
    assert!(!https::is_served(service.port()) && !service.data("tls").exists());
    let pid = service.pid();
    clock.set_right();
    wait::for_true("HTTPS opens", || https::is_served(service.port()));
    assert_eq!(service.pid(), pid, "without a restart");
    let made = serial(&service);
    service.kill9();
    clock.set(10);
    service.restart();
    wait::for_true("it is shown in 1970", || https::is_served(service.port()));
    // Ended by the right clock, shown by the wrong one, and renewed when that is right.
    clock.set(now_s() + 500 * DAY);
    wait::for_true("it is renewed", || serial(&service) != made);
    assert!(https::is_served(service.port()));
}

#[test]
fn four_hundred_days_under_open_connections() {
    let (start, clock) = (now_s(), FakeClock::at(now_s()));
    let https = Https::auto(Setup::new().envs(&[NAMES]).env_of(&clock.env()));
    let first = shown(&https, start);
    let mut kept = https.connect(&https.client_at(start)).unwrap();
    ask(&mut kept).unwrap();
    for days in [100, 200, 263] {
        clock.set(start + days * DAY);
        assert_eq!(shown(&https, start + days * DAY), first, "day {days}");
        ask(&mut kept).unwrap();
    }
    let (answered, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let client = https.client_at(start + 265 * DAY);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut seen = HashSet::new();
            while !stop.load(Ordering::Relaxed) {
                let mut stream = https.connect(&client).unwrap();
                ask(&mut stream).unwrap_or_else(|e| panic!("a request failed: {e}"));
                seen.insert(presented(&stream));
                answered.fetch_add(1, Ordering::Relaxed);
            }
            seen.len()
        });
        let goes_on = |what: &str| {
            let before = answered.load(Ordering::Relaxed);
            wait::for_true(what, || answered.load(Ordering::Relaxed) > before + 20);
        };
        goes_on("requests go on");
        clock.set(start + 265 * DAY);
        wait::for_true("a new one is shown", || shown(&https, start + 265 * DAY) != first);
        goes_on("requests still go on");
        stop.store(true, Ordering::Relaxed);
        assert_eq!(load.join().unwrap(), 2, "the old and the new one");
    });
    ask(&mut kept).unwrap();
    let second = shown(&https, start + 265 * DAY);
    clock.set(start + 400 * DAY);
    assert_eq!(shown(&https, start + 400 * DAY), second);
    ask(&mut kept).unwrap();
    let pem = https.service.read("tls/server.crt");
    let end = parse_utc(&csr::x509_field(&pem, &["-enddate", "-dateopt", "iso_8601"]));
    assert!(end.abs_diff(start + (265 + 396) * DAY) < 3600);
    let entered = || -> Vec<String> {
        https.service.index_of_servers().into_iter().map(|line| line[3].clone()).collect()
    };
    wait::for_true("both are in the record", || entered() == [first.as_str(), second.as_str()]);
}

/// It was made by `server-certificate`, for `TLS_CERT`.
#[test]
fn a_certificate_of_this_ca_is_renewed_in_its_place() {
    let clock = FakeClock::at(now_s());
    let service = https::start(Setup::new().env_of(&clock.env()));
    let key = service.read("tls/server.key");
    let first = serial(&service);
    clock.set(now_s() + 263 * DAY);
    let ready = || https::ask(&service, "/ready", None, &["-k"]);
    wait::for_true("the list is fresh", || ready().status == 200);
    assert_eq!(serial(&service), first);
    // Whoever has put another one there says so by SIGHUP; until then it is left alone.
    let others = fs::read(service.data("tls/server.crt")).unwrap();
    fs::write(service.data("tls/server.crt"), service.read("ca/root-ca.crt")).unwrap();
    clock.set(now_s() + 265 * DAY);
    wait::for_true("the list is fresh again", || ready().status == 200);
    assert_eq!(service.read("tls/server.crt"), service.read("ca/root-ca.crt"));
    fs::write(service.data("tls/server.crt"), others).unwrap();
    service.signal("HUP");
    service.wait_for_log("our TLS certificate is new, until ");
    assert_ne!(serial(&service), first);
    assert_eq!(service.read("tls/server.key"), key);
    assert_eq!(service.index_of_servers().len(), 2);
}
