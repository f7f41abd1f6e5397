//! Errors and methods: JSON for all of them, also for what no handler ever sees.

use serde_json::json;

use crate::support::csr::Csr;
use crate::support::http::Response;
use crate::support::service::Service;
use crate::support::{check_error, check_timestamp, fields};

const JSON: (&str, &str) = ("Content-Type", "application/json");

#[test]
fn unknown_paths() {
    let service = Service::start(&[]);
    for path in [
        "/",
        "/nope",
        "/api/v1",
        "/api/v2/onboarding",
        "/api/v1/onboardings",
        "/api/v1/certificates",
        "/api/v1/certificates/d/unknown",
        "/api/v1/certificates/d/e/status",
        "/health/x",
        "/%2e%2e/etc/passwd",
        "//health",
    ] {
        check_error(&service.http.get(path), 404, "NOT_FOUND", path);
    }
    let answer = service.http.post("/nope", &json!({}));
    check_error(&answer, 404, "NOT_FOUND", "POST /nope");
    assert_eq!(service.http.get("/health?probe=1&x").status, 200, "a query does no harm");
}

#[test]
fn wrong_methods() {
    let service = Service::start(&[]);
    let check = |method: &str, path: &str, allow: &[&str]| {
        let body: &[u8] = if method == "GET" { b"" } else { b"{}" };
        let answer = service.http.request(method, path, &[JSON], body);
        check_error(&answer, 405, "METHOD_NOT_ALLOWED", &format!("{method} {path}"));
        check_allow(&answer, allow);
    };
    for method in ["GET", "PUT", "PATCH", "DELETE"] {
        check(method, "/api/v1/onboarding", &["POST", "OPTIONS"]);
        check(method, "/api/v1/sign-csr", &["POST", "OPTIONS"]);
    }
    for path in ["/health", "/ready", "/api", "/api/v1/ca", "/api/v1/certificates/d/status"] {
        for method in ["POST", "PUT", "DELETE"] {
            check(method, path, &["GET", "HEAD", "OPTIONS"]);
        }
    }
    check("GET", "/api/v1/certificates/d", &["DELETE"]);
    let head = service.http.request("HEAD", "/api/v1/onboarding", &[], b"");
    assert_eq!((head.status, head.body.len()), (405, 0), "HEAD works only where GET does");
}

#[test]
fn options() {
    let service = Service::start(&[]);
    for (path, allow) in [
        ("/api/v1/onboarding", &["POST", "OPTIONS"][..]),
        ("/api/v1/sign-csr", &["POST", "OPTIONS"]),
        ("/health", &["GET", "HEAD", "OPTIONS"]),
        ("/api/v1/ca", &["GET", "HEAD", "OPTIONS"]),
        ("/api/v1/certificates/d", &["DELETE", "OPTIONS"]),
    ] {
        let answer = service.http.request("OPTIONS", path, &[], b"");
        assert_eq!((answer.status, answer.body.len()), (204, 0), "{path}");
        check_allow(&answer, allow);
    }
}

#[test]
fn head_is_get_without_a_body() {
    let service = Service::start(&[]);
    service.sign(&service.token("d"), &Csr::new("d").make());
    for path in [
        "/health",
        "/ready",
        "/api",
        "/api/v1/ca",
        "/api/v1/certificates/d/status",
        "/api/v1/certificates/d/download",
        "/api/v1/certificates/nobody/status",
        "/nope",
    ] {
        let (get, head) = (service.http.get(path), service.http.request("HEAD", path, &[], b""));
        assert_eq!((head.status, head.body.len()), (get.status, 0), "{path}");
        for name in ["Content-Type", "X-Error-Code"] {
            assert_eq!(head.header(name), get.header(name), "{path} {name}");
        }
    }
}

#[test]
fn media_types() {
    let service = Service::start(&[]);
    let post = |path: &str, media: Option<&str>, body: &[u8]| {
        let headers: Vec<(&str, &str)> = media.iter().map(|m| ("Content-Type", *m)).collect();
        service.http.request("POST", path, &headers, body)
    };
    for (n, good) in [
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        "Application/JSON",
    ]
    .into_iter()
    .enumerate()
    {
        let body = json!({"device_id": format!("d{n}")}).to_string();
        assert_eq!(post("/api/v1/onboarding", Some(good), body.as_bytes()).status, 200, "{good}");
    }
    let body = json!({"device_id": "other"}).to_string();
    for bad in [
        Some("application/x-www-form-urlencoded"),
        Some("multipart/form-data; boundary=x"),
        Some("text/plain"),
        Some("text/json"),
        Some("application/jsonp"),
        Some("application/json-patch+json"),
        Some("xapplication/json"),
        Some(""),
        None,
    ] {
        for path in ["/api/v1/onboarding", "/api/v1/sign-csr"] {
            let answer = post(path, bad, body.as_bytes());
            check_error(&answer, 415, "UNSUPPORTED_MEDIA_TYPE", &format!("{path} {bad:?}"));
        }
    }
    let answer = post("/api/v1/onboarding", None, b"");
    check_error(&answer, 400, "INVALID_JSON|DEVICE_ID_REQUIRED", "no body, so no type is needed");
}

#[test]
fn bodies_that_are_no_json_object() {
    let service = Service::start(&[]);
    let deep = format!("{{\"a\":{}", "[".repeat(30_000));
    let bodies: [&[u8]; 12] = [
        b"{",
        b"not json",
        b"[]",
        b"\"device-1\"",
        b"null",
        b"7",
        b"{\"device_id\":\"a\"}{}",
        b"{\"device_id\":\"a\",\"device_id\":\"b\"}",
        b"{'device_id':'a'}",
        b"{\"device_id\":\"\xff\"}",
        b"device_id=a",
        deep.as_bytes(),
    ];
    for body in bodies {
        let what = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        let answer = service.http.request("POST", "/api/v1/onboarding", &[JSON], body);
        check_error(&answer, 400, "INVALID_JSON", &what);
        let answer = service.http.request("POST", "/api/v1/sign-csr", &[JSON], body);
        check_error(&answer, 400, "INVALID_JSON", &what);
    }
    assert_eq!(service.onboard("a").status, 200, "nothing was issued");
}

/// Kept, a list of 32,000 empty lists took 8.5 MB.
#[test]
fn fields_that_nobody_reads_cost_nothing() {
    let service = Service::start(&[]);
    service.token("first");
    let before = service.peak_rss_kib();
    for (name, value) in [("x", "[],"), ("device_id", "{\"a\":[]},")] {
        let most = (65_000 / value.len()).min(32_000);
        let body = format!("{{\"{name}\":[{}0]}}", value.repeat(most));
        let answer = service.http.request("POST", "/api/v1/onboarding", &[JSON], body.as_bytes());
        check_error(&answer, 400, "DEVICE_ID_REQUIRED", name);
    }
    let grown = service.peak_rss_kib() - before;
    assert!(grown < 2048, "{grown} KiB for 64 KiB");
}

#[test]
fn bodies_that_are_too_large() {
    let service = Service::start(&[]);
    let body = |device: &str, size: usize| {
        let bare = json!({"device_id": device, "x": ""}).to_string().len();
        json!({"device_id": device, "x": "x".repeat(size - bare)}).to_string()
    };
    let post =
        |body: &str| service.http.request("POST", "/api/v1/onboarding", &[JSON], body.as_bytes());
    assert_eq!(post(&body("largest", 65_536)).status, 200);
    check_error(&post(&body("larger", 65_537)), 413, "BODY_TOO_LARGE", "one byte more");
    check_error(&post(&body("huge", 3_000_000)), 413, "BODY_TOO_LARGE", "3 MB");
    assert_eq!(service.onboard("next").status, 200);
}

#[test]
fn the_admin_endpoint() {
    let delete = |service: &Service, key: Option<&str>| {
        let bearer = key.map(|k| format!("Bearer {k}"));
        let headers: Vec<(&str, &str)> = bearer.iter().map(|b| ("Authorization", &**b)).collect();
        service.http.request("DELETE", "/api/v1/certificates/d", &headers, b"")
    };
    let service = Service::start(&[]);
    check_error(&delete(&service, None), 403, "ADMIN_DISABLED", "unset means disabled");
    check_error(&delete(&service, Some("")), 403, "ADMIN_DISABLED", "an empty key");
    check_error(&delete(&service, Some("anything")), 403, "ADMIN_DISABLED", "any key");
    let service = Service::start(&[
        ("ADMIN_API_KEY", "an-admin-key-0001"),
        ("ONBOARDING_API_KEY", "onboarding-key-0001"),
    ]);
    check_error(&delete(&service, None), 403, "ADMIN_FORBIDDEN", "no key");
    for wrong in ["", "an-admin-key-0002", "an-admin-key-000", "onboarding-key-0001"] {
        check_error(&delete(&service, Some(wrong)), 403, "ADMIN_FORBIDDEN", wrong);
    }
}

#[test]
fn the_list_of_endpoints() {
    let service = Service::start(&[]);
    let answer = service.http.get("/api");
    assert_eq!(answer.status, 200);
    let text = answer.text();
    for part in [
        "mqtt-publisher-lite",
        env!("CARGO_PKG_VERSION"),
        "/api/v1/onboarding",
        "/api/v1/sign-csr",
        "/health",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn the_ca_certificate() {
    let service = Service::start(&[]);
    let answer = service.http.get("/api/v1/ca");
    assert_eq!(answer.status, 200);
    assert!(answer.text().starts_with("-----BEGIN CERTIFICATE-----"));
    assert_eq!(answer.text(), service.read("ca/root-ca.crt"));
    assert!(
        answer.header("Content-Type").is_some_and(|t| t.contains("pem")),
        "{:?}",
        answer.headers
    );
}

#[test]
fn errors_carry_the_time_and_only_what_they_must() {
    let service = Service::start(&[]);
    let answer = service.http.get("/nope");
    assert_eq!(fields(&answer.text()), ["success", "error", "code", "timestamp"]);
    check_timestamp(&answer);
}

#[track_caller]
fn check_allow(answer: &Response, expected: &[&str]) {
    let allow = answer.header("Allow").unwrap_or_default();
    let methods: Vec<&str> = allow.split(',').map(str::trim).collect();
    for method in expected {
        assert!(methods.contains(method), "{method} in {allow:?}");
    }
}
