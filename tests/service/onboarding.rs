//! `POST /api/v1/onboarding`: one live token a device, on every store.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::clock::{now_ms, parse_utc};
use crate::support::csr::Csr;
use crate::support::http::Response;
use crate::support::port::Port;
use crate::support::service::{Service, Setup};
use crate::support::{check_error, check_timestamp, fields, on_both_stores, token, wait};

const KEY: &str = "onboarding-key-0001";

#[test]
fn the_answer_is_to_the_letter() {
    on_both_stores(&[("JWT_SECRET", token::SECRET)], |service| {
        let answer = service.onboard("device-001");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.header("Content-Type"), Some("application/json; charset=utf-8"));
        assert_eq!(
            fields(&answer.text()),
            ["success", "provisioning_token", "expires_in", "timestamp"]
        );
        let json = answer.json();
        assert_eq!((&json["success"], &json["expires_in"]), (&json!(true), &json!(300)));
        check_timestamp(&answer);

        let compact = answer.field("provisioning_token");
        let (header, claims) = token::open(token::SECRET, &compact);
        assert_eq!(header, token::HEADER);
        assert_eq!(fields(&claims), ["device_id", "type", "iat", "exp", "jti"]);
        let claims = token::claims_of(&compact);
        assert_eq!(
            (&claims["device_id"], &claims["type"]),
            (&json!("device-001"), &json!("provisioning"))
        );
        let (iat, exp) = (claims["iat"].as_u64().unwrap(), claims["exp"].as_u64().unwrap());
        assert_eq!(exp - iat, 300);
        assert!(iat.abs_diff(now_ms() / 1000) <= 5);
        assert_eq!(claims["jti"].as_str().unwrap().len(), 22, "128 bits in base64url");
    });
}

#[test]
fn tokens_of_one_second_differ() {
    let service = Service::start(&[("ONBOARDING_API_KEY", KEY)]);
    let issue = || onboard_with(&service, KEY, &json!({"device_id": "d", "replace": true}));
    let (one, two) = (issue().field("provisioning_token"), issue().field("provisioning_token"));
    assert!(!one.is_empty() && one != two);
}

#[test]
fn device_names() {
    let service = Service::start(&[]);
    let check = |body: Value, status: u16, code: &str| {
        let answer = service.http.post("/api/v1/onboarding", &body);
        match status {
            200 => assert_eq!(answer.status, 200, "{body}: {}", answer.text()),
            _ => check_error(&answer, status, code, &body.to_string()),
        }
    };
    let (longest, too_long) = ("x".repeat(64), "x".repeat(65));
    for good in ["a", "AA:BB:CC_1.2-3", "...", &longest] {
        check(json!({"device_id": good}), 200, "");
    }
    check(json!({"device_id": "b", "unknown": [1, {}]}), 200, "");
    for required in [json!({}), json!({"device_id": ""}), json!({"device_id": " \t\n"})] {
        check(required, 400, "DEVICE_ID_REQUIRED");
    }
    for required in [json!(null), json!(7), json!(["a"]), json!({"a": 1}), json!(true)] {
        check(json!({"device_id": required}), 400, "DEVICE_ID_REQUIRED");
    }
    for invalid in
        [".", "..", "a b", "a/b", "../a", "a+", "#", "$SYS", "ä", "a\0", "a\nb", &too_long]
    {
        check(json!({"device_id": invalid}), 400, "DEVICE_ID_INVALID");
    }
    let text = service.http.post("/api/v1/onboarding", &json!({})).field("error");
    assert_eq!(text, "device_id is required and must be a non-empty string");
}

#[test]
fn white_space_around_a_name_is_trimmed() {
    let service = Service::start(&[]);
    let compact = service.token("  padded\t\n");
    assert_eq!(token::claims_of(&compact)["device_id"], "padded");
    check_error(&service.onboard("padded"), 409, "TOKEN_ALREADY_ACTIVE", "the same device");
}

#[test]
fn a_second_onboarding_says_until_when() {
    on_both_stores(&[("PROVISIONING_TOKEN_TTL", "120")], |service| {
        let first = service.token("d");
        let exp = token::claims_of(&first)["exp"].as_u64().unwrap();
        let answer = service.onboard("d");
        check_error(&answer, 409, "TOKEN_ALREADY_ACTIVE", "second");
        let json = answer.json();
        assert_eq!(json["error"], "A provisioning token for this device is already active.");
        let until = json["expiresAt"].as_str().unwrap();
        assert_eq!((until.len(), parse_utc(until)), (24, exp), "{until}");
        let left = json["expiresInSeconds"].as_u64().unwrap();
        assert!((exp - now_ms() / 1000).abs_diff(left) <= 2, "{left}");
        assert!(!answer.text().contains(&first) && json.get("provisioning_token").is_none());
    });
}

#[test]
fn an_expired_token_makes_room() {
    on_both_stores(&[("PROVISIONING_TOKEN_TTL", "1")], |service| {
        let first = service.token("d");
        let second = wait::until(Duration::from_secs(4), || {
            let answer = service.onboard("d");
            (answer.status == 200).then(|| answer.field("provisioning_token"))
        });
        assert_ne!(second, Some(first));
        assert!(second.is_some(), "the device is locked out");
    });
}

#[test]
fn a_device_with_a_certificate() {
    let certify = |service: &Service| {
        let compact = service.token("d");
        assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
    };
    let service = Service::start(&[]);
    certify(&service);
    let answer = service.onboard("d");
    check_error(&answer, 409, "DEVICE_HAS_ACTIVE_CERTIFICATE", "REENROLL=deny");
    assert_eq!(answer.field("error"), "Device already has an active certificate");
    let service = Service::start(&[("REENROLL", "allow")]);
    certify(&service);
    certify(&service);
    assert_eq!(service.index().len(), 2);
}

#[test]
fn the_api_key() {
    let service = Service::start(&[("ONBOARDING_API_KEY", KEY)]);
    let body = json!({"device_id": "d"});
    for wrong in ["", "x", "onboarding-key-0002", "onboarding-key-000", "onboarding-key-00011"] {
        let answer = onboard_with(&service, wrong, &body);
        check_error(&answer, 401, "API_KEY_REQUIRED", wrong);
        assert_eq!(answer.header("WWW-Authenticate"), Some("Bearer"));
    }
    check_error(&service.onboard("d"), 401, "API_KEY_REQUIRED", "no Authorization");
    assert_eq!(onboard_with(&service, KEY, &body).status, 200);
    let basic = [("Authorization", "Basic b25ib2FyZGluZy1rZXktMDAwMQ==")];
    let answer = service.http.post_with("/api/v1/onboarding", &basic, &body);
    check_error(&answer, 401, "API_KEY_REQUIRED", "Basic");
}

#[test]
fn replacing_needs_the_key() {
    let service = Service::start(&[]);
    service.token("d");
    let answer =
        service.http.post("/api/v1/onboarding", &json!({"device_id": "d", "replace": true}));
    check_error(&answer, 403, "REPLACE_FORBIDDEN", "no key configured");
    service.wait_for_log("refused: REPLACE_FORBIDDEN: device d, from 127.0.0.1");
    let answer =
        service.http.post("/api/v1/onboarding", &json!({"device_id": "e", "replace": false}));
    assert_eq!(answer.status, 200, "not replacing needs no key");
    for odd in [json!("true"), json!(1), json!([])] {
        let body = json!({"device_id": "f", "replace": odd});
        let answer = service.http.post("/api/v1/onboarding", &body);
        check_error(&answer, 400, "BAD_REQUEST", "a value that is not allowed");
        assert_eq!(answer.field("error"), "replace must be true or false");
    }
}

#[test]
fn a_replaced_token_is_dead_and_the_new_one_lives() {
    on_both_stores(&[("ONBOARDING_API_KEY", KEY)], |service| {
        let csr = Csr::new("d").make();
        let issue = |replace: bool| {
            onboard_with(service, KEY, &json!({"device_id": "d", "replace": replace}))
        };
        let old = issue(false).field("provisioning_token");
        check_error(&issue(false), 409, "TOKEN_ALREADY_ACTIVE", "without replace");
        let answer = issue(true);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let new = answer.field("provisioning_token");
        check_error(&service.sign(&old, &csr), 401, "TOKEN_ALREADY_USED", "the old token");
        check_error(&issue(false), 409, "TOKEN_ALREADY_ACTIVE", "the new one is active");
        assert_eq!(service.token_count(), 1);
        assert_eq!(service.sign(&new, &csr).status, 200);
        check_error(&service.sign(&old, &csr), 401, "TOKEN_ALREADY_USED", "the old token, again");
    });
}

#[test]
fn replacing_where_there_is_nothing_to_replace() {
    on_both_stores(&[("ONBOARDING_API_KEY", KEY)], |service| {
        let answer = onboard_with(service, KEY, &json!({"device_id": "fresh", "replace": true}));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let compact = answer.field("provisioning_token");
        assert_eq!(service.sign(&compact, &Csr::new("fresh").make()).status, 200);
    });
}

#[test]
fn a_full_memory_refuses_and_evicts_nothing() {
    let service = Service::start(&[("MEMORY_MAX_TOKENS", "3"), ("PROVISIONING_TOKEN_TTL", "3")]);
    let tokens: Vec<String> = (0..3).map(|n| service.token(&format!("d{n}"))).collect();
    check_error(&service.onboard("d3"), 503, "STORE_FULL", "the fourth");
    check_error(&service.onboard("d0"), 409, "TOKEN_ALREADY_ACTIVE", "the first is still there");
    assert_eq!(service.sign(&tokens[0], &Csr::new("d0").make()).status, 200);
    wait::for_true("there is room again", || service.onboard("d3").status == 200);
}

/// An address may hold three times as many tokens in memory as are free: three quarters of all, if
/// it is alone. An IPv6 site is one address.
#[test]
fn one_address_does_not_fill_the_memory_for_all() {
    let nobody = Port::any();
    let away = format!("redis://127.0.0.1:{}", nobody.number());
    for redis in [vec![], vec![("REDIS_URL", &*away)]] {
        let env = [("MEMORY_MAX_TOKENS", "40"), ("TRUSTED_PROXIES", "127.0.0.1")];
        let service = Setup::new().envs(&env).envs(&redis).start();
        let ask = |client: &str, device: String| {
            let headers = [("X-Forwarded-For", client)];
            service.http.post_with("/api/v1/onboarding", &headers, &json!({"device_id": device}))
        };
        let fill = |clients: &[&str], name: &str| {
            let mut answers =
                (0..40).map(|n| ask(clients[n % clients.len()], format!("{name}{n}")));
            let mut tokens = vec![];
            loop {
                let answer = answers.next().unwrap();
                match answer.status {
                    200 => tokens.push(answer.field("provisioning_token")),
                    _ => break check_error(&answer, 429, "RATE_LIMITED", name),
                }
            }
            tokens
        };
        let site = ["2001:db8:0:1::1", "2001:db8:0:1:ffff::2"];
        let greedy = fill(&site, "greedy-");
        assert_eq!(greedy.len(), 30);
        assert_eq!(service.http.get("/ready").status, 200, "others are served");
        assert_eq!(fill(&["192.0.2.1"], "second-").len(), 8, "three quarters of what is left");
        assert_eq!(ask("2001:db8:0:2::1", "another-site".to_owned()).status, 200);
        let csr = Csr::new("greedy-0").make();
        assert_eq!(service.sign(&greedy[0], &csr).status, 200);
        check_error(&ask(site[0], "next".to_owned()), 429, "RATE_LIMITED", "29 of 40, 2 are free");
        assert_eq!(ask("192.0.2.3", "one".to_owned()).status, 200);
        assert_eq!(ask("192.0.2.4", "two".to_owned()).status, 200);
        check_error(&ask("192.0.2.5", "three".to_owned()), 503, "STORE_FULL", "full is full");
        wait::for_true("/ready says so", || service.http.get("/ready").status == 503);
    }
}

#[test]
fn two_at_the_same_moment_one_wins() {
    on_both_stores(&[], |service| {
        for round in 0..100 {
            let device = format!("twin-{round}");
            let barrier = Barrier::new(2);
            let ask = || {
                barrier.wait();
                service.onboard(&device).status
            };
            let mut both = thread::scope(|scope| {
                let (one, two) = (scope.spawn(ask), scope.spawn(ask));
                [one.join().unwrap(), two.join().unwrap()]
            });
            both.sort_unstable();
            assert_eq!(both, [200, 409], "round {round}");
        }
    });
}

#[test]
fn a_token_lives_in_memory_only_as_long_as_the_process() {
    let mut service = Setup::new().start();
    let compact = service.token("d");
    assert_eq!(service.terminate().code, Some(0));
    service.restart();
    let answer = service.sign(&compact, &Csr::new("d").make());
    check_error(&answer, 401, "TOKEN_NOT_FOUND", "the secret was kept, the token was not");
    assert_eq!(answer.field("error"), "Token not found in system");
    service.token("d");
}

fn onboard_with(service: &Service, key: &str, body: &Value) -> Response {
    let bearer = format!("Bearer {key}");
    service.http.post_with("/api/v1/onboarding", &[("Authorization", &bearer)], body)
}
