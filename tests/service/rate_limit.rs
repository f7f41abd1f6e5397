//! `ONBOARDING_RATE_LIMIT` by client address, and whose word is taken for that address.

use serde_json::json;

use crate::support::check_error;
use crate::support::http::Response;
use crate::support::service::Service;

fn onboard(service: &Service, device: &str, forwarded_for: &str) -> Response {
    let headers = [("Content-Type", "application/json"), ("X-Forwarded-For", forwarded_for)];
    let body = json!({ "device_id": device }).to_string();
    service.http.request("POST", "/api/v1/onboarding", &headers, body.as_bytes())
}

#[track_caller]
fn check_limited(answer: &Response) {
    check_error(answer, 429, "RATE_LIMITED", "over the limit");
    let seconds: u64 = answer.header("Retry-After").unwrap().parse().unwrap();
    assert!((1..=30).contains(&seconds), "{seconds}");
}

#[test]
fn a_client_cannot_choose_its_address() {
    let service = Service::start(&[("ONBOARDING_RATE_LIMIT", "2")]);
    assert_eq!(onboard(&service, "a", "192.0.2.1").status, 200);
    assert_eq!(onboard(&service, "b", "192.0.2.2").status, 200);
    check_limited(&onboard(&service, "c", "192.0.2.3"));
    assert!(service.log().contains("RATE_LIMITED, from 127.0.0.1"), "{}", service.log());
    assert_eq!(service.http.get("/health").status, 200, "only onboarding is limited");
}

/// Without a key, or with a wrong one, a client uses up what is left to such clients, and no more.
#[test]
fn those_without_the_key_do_not_count_against_those_with_it() {
    let key = "onboarding-key-0001";
    let service = Service::start(&[("ONBOARDING_RATE_LIMIT", "2"), ("ONBOARDING_API_KEY", key)]);
    let ask = |device: &str, key: Option<&str>| {
        let bearer = key.map(|key| format!("Bearer {key}"));
        let mut headers = vec![("Content-Type", "application/json")];
        headers.extend(bearer.as_deref().map(|bearer| ("Authorization", bearer)));
        let body = json!({ "device_id": device }).to_string();
        service.http.request("POST", "/api/v1/onboarding", &headers, body.as_bytes())
    };
    assert_eq!(ask("a", None).status, 401);
    assert_eq!(ask("a", Some("a-wrong-key-0123456")).status, 401);
    check_limited(&ask("a", None));
    assert_eq!(ask("a", Some(key)).status, 200);
    assert_eq!(ask("b", Some(key)).status, 200);
    check_limited(&ask("c", Some(key)));
    check_limited(&ask("c", None));
}

#[test]
fn behind_a_trusted_proxy_each_client_counts_for_itself() {
    let env = [("ONBOARDING_RATE_LIMIT", "2"), ("TRUSTED_PROXIES", "127.0.0.0/8")];
    let service = Service::start(&env);
    assert_eq!(onboard(&service, "a", "192.0.2.1").status, 200);
    assert_eq!(onboard(&service, "b", "192.0.2.1").status, 200);
    check_limited(&onboard(&service, "c", "203.0.113.1, 192.0.2.1"));
    assert_eq!(onboard(&service, "d", "192.0.2.2").status, 200);
    let log = service.log();
    assert!(log.contains("issued for d, to 192.0.2.2"), "{log}");
}
