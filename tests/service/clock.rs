//! A gateway whose clock is not set: it waits, makes and judges nothing, and serves when it is right.

use std::time::Duration;

use serde_json::json;

use crate::support::clock::{FakeClock, now_s, parse_utc};
use crate::support::csr::{self, Csr};
use crate::support::service::{ADMIN_KEY, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::{check_error, token, wait};

/// What the clock of a gateway without a battery shows ten seconds after it was switched on.
const IN_1970: u64 = 10;

#[test]
fn a_first_start_in_1970() {
    let clock = FakeClock::at(IN_1970);
    let service = start(&clock, Setup::new());
    let pid = service.pid();
    check_waits(&service);
    let mut rehearsal = Setup::new().args(&["check-config", "--offline"]);
    for (name, value) in clock.env() {
        rehearsal = rehearsal.env(name, &value);
    }
    let said = rehearsal.run();
    assert!(said.log.contains("warning: the clock is not set"), "{}", said.log);
    let answer = service.http.get("/api/v1/ca");
    check_error(&answer_in_1970(&answer), 503, "CLOCK_NOT_SET", "there is no CA yet");
    assert!(!service.data("ca/root-ca.crt").exists() && !service.data("ca/root-ca.key").exists());

    clock.set_right();
    serves_soon(&service);
    assert_eq!(service.pid(), pid, "without a restart");
    let ca = service.http.get("/api/v1/ca").text();
    let start = parse_utc(&csr::x509_field(&ca, &["-startdate", "-dateopt", "iso_8601"]));
    assert!(
        (now_s() - 86_400).abs_diff(start) <= 30,
        "the CA is dated by the right clock: {start}"
    );
    whole_way(&service, "d");
}

#[test]
fn with_a_ca_already_there() {
    let clock = FakeClock::at(now_s());
    let mut service = start(&clock, Setup::new());
    whole_way(&service, "d");
    let ca = service.read("ca/root-ca.crt");
    service.kill9();
    clock.set(IN_1970);
    service.restart();
    check_waits(&service);
    assert_eq!(service.http.get("/api/v1/ca").text(), ca, "a CA that is there is given out");
    clock.set_right();
    serves_soon(&service);
    assert_eq!(service.read("ca/root-ca.crt"), ca, "it is the same CA");
    let answer = service.sign(&service.token("e"), &Csr::new("e").make());
    assert_eq!(answer.status, 200, "{}", answer.text());
    csr::verify_with_openssl(&ca, &answer.field("certificate")).unwrap();
    let status = service.http.get("/api/v1/certificates/d/status");
    assert_eq!(status.field("status"), "active", "what was signed before is known");
}

#[test]
fn a_clock_before_the_start_of_the_ca() {
    // After the build, but before the CA's notBefore: a clock that is off by weeks.
    let clock = FakeClock::at(now_s() + 60 * 86_400);
    let mut service = start(&clock, Setup::new());
    let ca = service.read("ca/root-ca.crt");
    service.kill9();
    clock.set_right();
    service.restart();
    check_waits(&service);
    // Which of the two clocks was wrong, nobody knows; it names both.
    let reasons = service.http.get("/ready").json()["reasons"].to_string();
    let why = "the clock is not set, or the one that made ";
    assert!(reasons.contains(why) && reasons.contains("root-ca.crt, which begins at"), "{reasons}");
    assert!(service.log().contains(why), "{}", service.log());
    clock.set(now_s() + 61 * 86_400);
    serves_soon(&service);
    assert_eq!(service.read("ca/root-ca.crt"), ca);
}

/// A fast clock before the network is there: the list that it has dated is one of the future, by which
/// a broker refuses everybody.
#[test]
fn a_clock_that_was_ahead() {
    const AHEAD_S: u64 = 2 * 3600;
    let clock = FakeClock::at(now_s() + AHEAD_S);
    let mut service = start(&clock, Setup::new().env("ADMIN_API_KEY", ADMIN_KEY));
    let gone = service.enroll("gone", &Csr::new("gone").make()).field("serial_number");
    assert_eq!(service.revoke("gone").status, 200);
    let made = service.enroll("d", &Csr::new("d").make()).field("serial_number");
    let begins = || {
        let list = service.read("ca/crl.pem");
        let date = csr::openssl(&["crl", "-noout", "-lastupdate", "-dateopt", "iso_8601"], &list);
        parse_utc(date.trim().trim_start_matches("lastUpdate="))
    };
    assert!(begins() > now_s(), "the list is of the future");

    clock.set_right();
    let set = std::time::Instant::now();
    wait::for_true("the list is one of today", || begins() < now_s());
    assert!(set.elapsed() < Duration::from_millis(1500), "{:?}", set.elapsed());
    assert_eq!(service.http.get("/ready").status, 200);
    let list = csr::openssl(&["crl", "-noout", "-text"], &service.read("ca/crl.pem"));
    assert!(list.contains(&gone.to_uppercase()), "{list}");

    let warned = "the clock was ahead when certificates were signed, which nobody takes until then, 2 of them: ";
    let log = service.wait_for_log(warned);
    let line = log.lines().find(|line| line.contains(warned)).unwrap();
    for name in [format!("{made} of d"), format!("{gone} of gone")] {
        assert!(line.contains("WARN") && line.contains(&name), "{line}");
    }
    assert_eq!(log.matches(warned).count(), 1, "said once: {log}");
    // A start says it again, as long as it is so.
    let mark = service.log().len();
    service.kill9();
    service.restart();
    service.wait_for_log_after(mark, warned);
    whole_way(&service, "e");
}

/// A start by the right clock finds what one by a clock that was ahead has left.
#[test]
fn a_start_after_a_clock_that_was_ahead() {
    let clock = FakeClock::at(now_s() + 7200);
    let mut service = start(&clock, Setup::new());
    service.enroll("d", &Csr::new("d").make());
    service.kill9();
    clock.set_right();
    let mark = service.log().len();
    service.restart();
    service.wait_for_log_after(mark, "the clock was ahead when certificates were signed, which nobody takes until then, 1 of them: ");
    let ca = service.data("ca/root-ca.crt").display().to_string();
    let crl = service.data("ca/crl.pem").display().to_string();
    let answer = service.enroll("e", &Csr::new("e").make());
    let dir = TempDir::new();
    let leaf = dir.file("leaf", &answer.field("certificate")).display().to_string();
    csr::openssl(&["verify", "-crl_check", "-CAfile", &ca, "-CRLfile", &crl, &leaf], "");
}

fn start(clock: &FakeClock, setup: Setup) -> Service {
    let env = clock.env();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    setup.envs(&env).env("JWT_SECRET", token::SECRET).start()
}

/// Up, but issues and signs nothing.
#[track_caller]
fn check_waits(service: &Service) {
    assert_eq!(service.http.get("/health").status, 200);
    let answer = service.onboard("d-waits");
    check_error(&answer_in_1970(&answer), 503, "CLOCK_NOT_SET", "onboarding");
    // A token that is good but for the clock: nothing is judged by it, whatever else is wrong.
    let compact = token::sign(token::SECRET, token::HEADER, &token::claims("d", 300).to_string());
    let answer = service.sign(&compact, &Csr::new("d").make());
    check_error(&answer_in_1970(&answer), 503, "CLOCK_NOT_SET", "signing");
    let ready = service.http.get("/ready");
    assert_eq!(ready.status, 503);
    assert!(
        ready.json()["reasons"].to_string().to_lowercase().contains("clock"),
        "{}",
        ready.text()
    );
}

/// The same answer with the right time in it: the time that it says is the clock's, and off.
fn answer_in_1970(answer: &crate::support::http::Response) -> crate::support::http::Response {
    let mut answer = answer.clone();
    let right = crate::support::clock::rfc3339(now_s());
    let wrong = answer.field("timestamp");
    assert_eq!(wrong.len(), 24, "{}", answer.text());
    answer.body = answer.text().replace(&wrong, &right).into_bytes();
    answer
}

#[track_caller]
fn serves_soon(service: &Service) {
    let set = std::time::Instant::now();
    let ready = wait::until(Duration::from_secs(5), || {
        (service.http.get("/ready").status == 200).then_some(())
    });
    assert!(ready.is_some(), "{}\n{}", service.http.get("/ready").text(), service.log());
    println!("ready {:?} after the clock was set", set.elapsed());
    assert!(set.elapsed() < Duration::from_secs(2), "it is noticed within a second");
}

fn whole_way(service: &Service, device: &str) {
    let answer = service.sign(&service.token(device), &Csr::new(device).make());
    assert_eq!(answer.status, 200, "{}", answer.text());
    csr::verify_with_openssl(&answer.field("ca_certificate"), &answer.field("certificate"))
        .unwrap();
    assert_eq!(answer.json()["success"], json!(true));
}
