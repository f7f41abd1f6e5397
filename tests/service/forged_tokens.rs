//! Tokens that someone else made: each is refused with its code, and none harms the real one.

use serde_json::json;

use crate::support::check_error;
use crate::support::clock::now_s;
use crate::support::csr::Csr;
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::token::{self, HEADER, SECRET, encode, sign};

const FORMAT: &str = "TOKEN_INVALID_FORMAT";
const SIGNATURE: &str = "TOKEN_INVALID_SIGNATURE";

/// A server, a real token of `d` and what checks a forged one.
struct Court {
    service: Service,
    real: String,
    csr: String,
}

impl Court {
    fn open() -> Self {
        let service = Service::start(&[("JWT_SECRET", SECRET)]);
        Court { real: service.token("d"), csr: Csr::new("d").make(), service }
    }

    /// In the header and in the body alike.
    #[track_caller]
    fn check(&self, forged: &str, code: &str, what: &str) {
        check_error(&self.service.sign(forged, &self.csr), 401, code, what);
        let body = json!({"csr": self.csr, "provisioning_token": forged});
        check_error(&self.service.http.post("/api/v1/sign-csr", &body), 401, code, what);
    }

    /// Nothing that was tried has harmed the real token.
    #[track_caller]
    fn close(self) {
        assert_eq!(self.service.index().len(), 0, "something was signed");
        let answer = self.service.sign(&self.real, &self.csr);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

#[test]
fn other_algorithms() {
    let court = Court::open();
    let claims = token::claims("d", 300).to_string();
    for alg in ["none", "None", "NONE", "nOnE", "HS384", "HS512", "RS256", "ES256", "hs256", ""] {
        let header = json!({"alg": alg, "typ": "JWT"}).to_string();
        court.check(&sign(SECRET, &header, &claims), SIGNATURE, alg);
        let unsigned = format!("{}.{}.", encode(&header), encode(&claims));
        court.check(&unsigned, SIGNATURE, &format!("{alg}, unsigned"));
    }
    for header in [r#"{"typ":"JWT"}"#, r#"{"alg":null}"#, r#"{"alg":["HS256"]}"#] {
        court.check(&sign(SECRET, header, &claims), SIGNATURE, header);
    }
    let payload = court.real.split('.').nth(1).unwrap();
    let none = format!("{}.{payload}.", encode(r#"{"alg":"none","typ":"JWT"}"#));
    court.check(&none, SIGNATURE, "the real claims, unsigned");
    let doubled = r#"{"alg":"none","alg":"HS256"}"#;
    court.check(&sign(SECRET, doubled, &claims), FORMAT, "alg twice");
    let critical = r#"{"alg":"HS256","crit":["exp"],"exp":1}"#;
    court.check(&sign(SECRET, critical, &claims), FORMAT, "crit");
    court.close();
}

#[test]
fn broken_signatures() {
    let court = Court::open();
    let (signed, tag) = court.real.rsplit_once('.').unwrap();
    court.check(&format!("{signed}."), SIGNATURE, "stripped");
    court.check(&format!("{signed}.{}", encode([0; 32])), SIGNATURE, "zeros");
    court.check(&format!("{signed}.{}", &tag[..tag.len() - 3]), SIGNATURE, "shortened");
    court.check(&format!("{signed}.{}{tag}", &tag[..40]), SIGNATURE, "longer");
    let claims = token::claims("d", 300).to_string();
    court.check(&sign("another-secret-of-32-bytes-and-so", HEADER, &claims), SIGNATURE, "secret");
    court.check(&sign("", HEADER, &claims), SIGNATURE, "empty secret");
    let default = "mqtt-publisher-lite-secret-key-change-in-production";
    court.check(&sign(default, HEADER, &claims), SIGNATURE, "the older service's default");
    for at in 0..tag.len() {
        let mut bytes = tag.to_owned().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'E' } else { b'A' };
        let flipped = format!("{signed}.{}", String::from_utf8(bytes).unwrap());
        court.check(&flipped, SIGNATURE, &format!("character {at} of the signature"));
    }
    let payload = signed.split_once('.').unwrap().1;
    for at in (0..payload.len()).step_by(5) {
        let mut bytes = payload.to_owned().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        let flipped = String::from_utf8(bytes).unwrap();
        let forged = format!("{}.{flipped}.{tag}", encode(HEADER));
        court.check(
            &forged,
            &format!("{SIGNATURE}|{FORMAT}"),
            &format!("character {at} of the claims"),
        );
    }
    court.close();
}

#[test]
fn other_shapes() {
    let court = Court::open();
    let (signed, tag) = court.real.rsplit_once('.').unwrap();
    let (header, payload) = signed.split_once('.').unwrap();
    for (forged, what) in [
        (format!("{}.{tag}", court.real), "four parts"),
        (format!("{}.", court.real), "a dot behind"),
        (format!(".{}", court.real), "a dot before"),
        (signed.to_owned(), "two parts"),
        (header.to_owned(), "one part"),
        ("..".to_owned(), "dots"),
        (format!("{signed}.{tag}="), "padding"),
        (format!("{header}=.{payload}.{tag}"), "padding in the header"),
        (format!("{signed}.{}", stray_bits(tag)), "stray bits: not canonical"),
        (format!("{header}.{payload}.{}+{}", &tag[..10], &tag[11..]), "plain base64"),
        (format!("{header}. {payload}.{tag}"), "a space"),
        (sign(SECRET, "not json", r#"{"a":1}"#), "a header that is not JSON"),
        (sign(SECRET, "[]", r#"{"a":1}"#), "a header that is no object"),
        ("x".repeat(5000), "five thousand characters"),
        (
            sign(SECRET, HEADER, &format!(r#"{{"x":"{}"}}"#, "x".repeat(4000))),
            "over 4 KiB, well signed",
        ),
    ] {
        court.check(&forged, FORMAT, what);
    }
    court.close();
}

#[test]
fn claims_that_are_not_ours() {
    let court = Court::open();
    let (now, exp) = (now_s(), now_s() + 300);
    let check = |claims: &str, code: &str| court.check(&sign(SECRET, HEADER, claims), code, claims);
    let good =
        |more: &str| format!(r#"{{"device_id":"d","type":"provisioning","iat":{now}{more}}}"#);
    check(&good(&format!(r#","exp":{exp}"#)), "TOKEN_NOT_FOUND");
    check(&good(&format!(r#","exp":{}"#, now - 1)), "TOKEN_EXPIRED|TOKEN_INVALID_FORMAT");
    let past = format!(
        r#"{{"device_id":"d","type":"provisioning","iat":{},"exp":{}}}"#,
        now - 300,
        now - 1
    );
    check(&past, "TOKEN_EXPIRED");
    for kind in ["access", "refresh", "Provisioning", ""] {
        let claims = json!({"device_id": "d", "type": kind, "iat": now, "exp": exp}).to_string();
        check(&claims, "TOKEN_INVALID_TYPE");
    }
    check(&json!({"device_id": "d", "iat": now, "exp": exp}).to_string(), "TOKEN_INVALID_TYPE");
    check(&good(""), FORMAT);
    for bad in ["null", "\"soon\"", "true", "[]", "{}", "1e300", "-1"] {
        check(&good(&format!(r#","exp":{bad}"#)), &format!("{FORMAT}|TOKEN_EXPIRED"));
    }
    check(&good(&format!(r#","exp":{},"exp":{exp}"#, now - 1)), FORMAT);
    check(&good(&format!(r#","exp":{exp},"device_id":"e""#)), FORMAT);
    for device in ["7", "null", "\"a/b\"", "\"\""] {
        let claims =
            format!(r#"{{"device_id":{device},"type":"provisioning","iat":{now},"exp":{exp}}}"#);
        check(&claims, FORMAT);
    }
    check("not json", FORMAT);
    check("[1]", FORMAT);
    check("", FORMAT);
    court.close();
}

#[test]
fn a_hundred_kilobytes() {
    let court = Court::open();
    let huge = sign(SECRET, HEADER, &format!(r#"{{"x":"{}"}}"#, "x".repeat(75_000)));
    assert!(huge.len() > 100_000);
    let body = json!({"csr": court.csr, "provisioning_token": huge});
    let answer = court.service.http.post("/api/v1/sign-csr", &body);
    check_error(
        &answer,
        if answer.status == 413 { 413 } else { 401 },
        "BODY_TOO_LARGE|TOKEN_INVALID_FORMAT",
        "body",
    );
    let answer = court.service.sign(&huge, &court.csr);
    check_error(
        &answer,
        if answer.status == 431 { 431 } else { 401 },
        "HEADERS_TOO_LARGE|TOKEN_INVALID_FORMAT",
        "header",
    );
    court.close();
}

#[test]
fn a_token_of_the_older_service_is_good() {
    let redis = Redis::start(&[]);
    let env = [("JWT_SECRET", SECRET), ("REDIS_URL", &redis.url())];
    let service = Setup::new().envs(&env).start();
    service.wait_for_storage("redis");
    let old = token::plant(&redis, "d", 300);
    assert!(token::claims_of(&old).get("jti").is_none());
    let csr = Csr::new("d").make();
    let answer = service.sign(&old, &csr);
    assert_eq!(answer.status, 200, "{}", answer.text());
    check_error(&service.sign(&old, &csr), 401, "TOKEN_ALREADY_USED", "again");
}

/// The same bytes, but with one of the unused bits of the last character set.
fn stray_bits(tag: &str) -> String {
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let last = tag.chars().last().unwrap();
    let next = alphabet.chars().nth(alphabet.find(last).unwrap() + 1).unwrap();
    format!("{}{next}", &tag[..tag.len() - 1])
}
