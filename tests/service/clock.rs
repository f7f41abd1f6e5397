//! A gateway whose clock is not set: it waits, makes and judges nothing, and serves when it is right.

use std::time::Duration;

use serde_json::json;

use crate::support::clock::{FakeClock, now_s, parse_utc};
use crate::support::csr::{self, Csr};
use crate::support::service::{Service, Setup};
use crate::support::{check_error, token, wait};

/// What the clock of a gateway without a battery shows ten seconds after it was switched on.
const IN_1970: u64 = 10;

#[test]
fn a_first_start_in_1970() {
    let clock = FakeClock::at(IN_1970);
    let service = start(&clock, Setup::new());
    let pid = service.pid();
    check_waits(&service);
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
    whole_way(&service);
}

#[test]
fn with_a_ca_already_there() {
    let clock = FakeClock::at(now_s());
    let mut service = start(&clock, Setup::new());
    whole_way(&service);
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
    clock.set(now_s() + 61 * 86_400);
    serves_soon(&service);
    assert_eq!(service.read("ca/root-ca.crt"), ca);
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

fn whole_way(service: &Service) {
    let answer = service.sign(&service.token("d"), &Csr::new("d").make());
    assert_eq!(answer.status, 200, "{}", answer.text());
    csr::verify_with_openssl(&answer.field("ca_certificate"), &answer.field("certificate"))
        .unwrap();
    assert_eq!(answer.json()["success"], json!(true));
}
