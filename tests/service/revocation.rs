//! `DELETE /api/v1/certificates/{device_id}`: what it answers is so, whatever is asked and wherever.

use crate::renewal::Stage;
use crate::support::clock::{FakeClock, now_s};
use crate::support::csr::{Csr, openssl};
use crate::support::http::Response;
use crate::support::instance::{
    Device, another, certificates, cut_off, first, issued, onboard, reconnect, redeem, replace,
    revoke, token,
};
use crate::support::proxy::Proxy;
use crate::support::redis::Redis;
use crate::support::service::{ADMIN_KEY, Service};
use crate::support::{check_error, fields, on_both_stores};

/// How the fleet's operator reads an answer: a 200 is the same each time.
fn check_revoked(answer: &Response, device: &str) {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(fields(&answer.text()), ["success", "message", "device_id", "shared", "timestamp"]);
    assert_eq!(answer.field("message"), "Certificate revoked successfully");
    assert_eq!(answer.field("device_id"), device);
}

fn status(service: &Service, device: &str) -> String {
    service.http.get(&format!("/api/v1/certificates/{device}/status")).field("status")
}

#[test]
fn asked_again_it_answers_the_same() {
    on_both_stores(&[("ADMIN_API_KEY", ADMIN_KEY)], |service| {
        service.enroll("d", &Csr::new("d").make());
        for _ in 0..3 {
            check_revoked(&service.revoke("d"), "d");
            assert_eq!(status(service, "d"), "revoked");
        }
        // A device that never had more than a token.
        let compact = service.token("e");
        for _ in 0..3 {
            check_revoked(&service.revoke("e"), "e");
        }
        let answer = service.sign(&compact, &Csr::new("e").make());
        check_error(&answer, 401, "TOKEN_ALREADY_USED", "killed");
        for _ in 0..2 {
            let answer = service.revoke("nobody");
            check_error(&answer, 404, "CERTIFICATE_NOT_FOUND", "nothing is known of it");
            assert_eq!(answer.field("error"), "No certificate found for this device");
        }
        let log = service.log();
        assert_eq!(log.matches(" killed, by ").count(), 1, "only one token was killed: {log}");
        assert_eq!(log.matches(" of d revoked: unspecified, by ").count(), 1, "{log}");
        let metrics = service.http.get("/metrics").text();
        assert!(metrics.contains("mqtt_lite_tokens_total{event=\"killed\"} 1\n"), "{metrics}");
        assert!(metrics.contains("certificates_total{event=\"revoked\"} 1\n"), "{metrics}");
    });
}

/// Certificates that have ended, but that `RENEW_AFTER_EXPIRY_DAYS` would renew, now or once it is set.
#[test]
fn after_a_200_nothing_of_the_device_renews() {
    for late_days in ["30", "0"] {
        let clock = FakeClock::at(now_s());
        let env = clock.env();
        let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
        let more = [("DEVICE_CERT_VALIDITY_DAYS", "10"), ("RENEW_AFTER_EXPIRY_DAYS", late_days)];
        let mut stage = Stage::set(&[&env[..], &more].concat());
        let ended = stage.enroll("ended");
        let first = stage.enroll("d");
        clock.set(now_s() + 8 * 86_400);
        let second = stage.keep(&stage.renew(Some(&first), &Csr::new("d").make()));
        clock.set(now_s() + 12 * 86_400);
        for device in ["ended", "d"] {
            assert_eq!(stage.revoke(device).status, 200, "{device}");
            assert_eq!(stage.revoke(device).status, 200, "{device}, once more");
        }
        assert!(stage.record().iter().all(|(status, _)| status == "R"), "{:?}", stage.record());
        stage.service.set_env("RENEW_AFTER_EXPIRY_DAYS", "365");
        stage.service.kill9();
        stage.service.restart();
        for (who, device) in [(&ended, "ended"), (&first, "d"), (&second, "d")] {
            let answer = stage.renew(Some(who), &Csr::new(device).make());
            assert_eq!((answer.status, &*answer.code()), (401, "CLIENT_CERTIFICATE_REVOKED"));
        }
    }
}

/// An operator may revoke the newest alone, by `openssl ca`: an older one is no way around it.
#[test]
fn an_older_certificate_does_not_renew_when_the_newest_is_revoked() {
    let mut stage = Stage::set(&[]);
    let old = stage.enroll("d");
    let new = stage.keep(&stage.renew(Some(&old), &Csr::new("d").make()));
    stage.service.kill9();
    let index = stage.service.read("ca/index.txt");
    let (first, second) = index.trim_end().rsplit_once('\n').unwrap();
    let second = second.replacen("V\t", "R\t", 1).replacen("Z\t\t", "Z\t260101000000Z\t", 1);
    std::fs::write(stage.service.data("ca/index.txt"), format!("{first}\n{second}\n")).unwrap();
    stage.service.restart();
    for who in [&old, &new] {
        let answer = stage.renew(Some(who), &Csr::new("d").make());
        check_error(&answer, 401, "CLIENT_CERTIFICATE_REVOKED", "the newest is revoked");
    }
}

/// While Redis is away the bound is on disk, and the token dies elsewhere when Redis is back.
#[test]
fn what_is_known_here_is_revoked_without_redis() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let lonely = first(&proxy.url(), &[]);
    let other = another(&lonely, &redis.url(), &[]);
    let [d, e] = ["d", "e"].map(Device::new);
    let unused = token(&lonely, &d);
    cut_off(&lonely, &proxy);
    for _ in 0..2 {
        check_revoked(&revoke(&lonely, &d), "d");
        check_error(&revoke(&lonely, &e), 503, "SERVICE_UNAVAILABLE", "nothing is known of it");
    }
    reconnect(&lonely, &proxy);
    let answer = redeem(&other, &unused, &d);
    check_error(&answer, 401, "TOKEN_ALREADY_USED", "killed, when Redis was back");
}

/// Of two kills of one token one is a kill.
#[test]
fn a_kill_is_logged_when_a_token_was_killed() {
    let redis = Redis::start(&[]);
    let one = first(&redis.url(), &[]);
    let two = another(&one, &redis.url(), &[]);
    let d = Device::new("d");
    let old = token(&one, &d);
    let new = issued(&two, &replace(&two, &d));
    check_revoked(&revoke(&two, &d), "d");
    check_revoked(&revoke(&two, &d), "d");
    let killed = |service: &Service| service.log().matches(" killed").count();
    assert_eq!(killed(&two), 2, "replaced, then revoked: {}", two.log());
    for compact in [&old, &new] {
        check_error(&redeem(&one, compact, &d), 401, "TOKEN_ALREADY_USED", "dead");
    }
    assert_eq!(onboard(&one, &d).status, 200, "the device is free");
    assert_eq!(certificates(&[&one, &two]), 0);
}

/// The bound is on disk first: a power cut right behind it, or an older copy of the record, must not bring
/// a certificate back.
#[test]
fn a_bound_that_the_record_does_not_know_yet_is_applied_at_start() {
    let mut service = Service::start(&[("ADMIN_API_KEY", ADMIN_KEY), ("REENROLL", "allow")]);
    let (d, e) = (Csr::new("d").make(), Csr::new("e").make());
    service.enroll("d", &d);
    service.enroll("e", &e);
    let before =
        ["ca/index.txt", "ca/crl.pem"].map(|name| (service.data(name), service.read(name)));
    check_revoked(&service.revoke("d"), "d");
    service.kill9();
    before.iter().for_each(|(path, text)| std::fs::write(path, text).unwrap());
    service.restart();
    assert_eq!(["d", "e"].map(|device| status(&service, device)), ["revoked", "active"]);
    let path = "/api/v1/certificates/d/status";
    let serial = service.http.get(path).field("serial_number").to_uppercase();
    let list = openssl(&["crl", "-noout", "-text"], &service.read("ca/crl.pem"));
    assert!(list.contains(&serial), "{serial}: {list}");
    service.enroll("d", &d);
    service.terminate();
    service.restart();
    assert_eq!(status(&service, "d"), "active", "what came after it counts");
}
