//! What the integration tests share: the real program, a real Redis, a faulty network between the
//! two, real `openssl`, and a judge for what many clients saw.
//!
//! Each test binary takes what it needs. Everything here waits by polling with
//! a deadline, fails with a message that shows the program's log, and cleans up after itself by
//! process id. Nothing is skipped: a tool that is missing fails the test (`scripts/test.sh`
//! installs them all).

#![allow(dead_code, reason = "each test binary uses the part that it needs")]

pub mod browser;
pub mod clock;
pub mod cluster;
pub mod command_proxy;
pub mod csr;
pub mod device;
pub mod engine;
pub mod history;
pub mod hostile;
pub mod http;
pub mod https;
pub mod instance;
pub mod load;
pub mod mosquitto;
pub mod port;
pub mod proxy;
pub mod random;
pub mod redis;
pub mod sentinel;
pub mod service;
pub mod temp;
pub mod token;
pub mod wait;

use engine::Engine;
use http::Response;
use service::{Service, Setup};

/// Asserts that `answer` is an error of the contract with this status and one of these codes
/// (alternatives are separated by `|`).
#[track_caller]
pub fn check_error(answer: &Response, status: u16, codes: &str, what: &str) {
    let (code, text) = (answer.code(), answer.text());
    let fits = answer.status == status && codes.split('|').any(|e| e == code);
    assert!(fits, "{what}: {} {code}, expected {status} {codes}\n{text}", answer.status);
    assert_eq!(answer.header("X-Error-Code"), Some(&*code), "{what}");
    assert_eq!(answer.header("Content-Type"), Some("application/json; charset=utf-8"), "{what}");
    assert_eq!(answer.json()["success"], false, "{what}");
    assert!(!answer.field("error").is_empty(), "{what}: {text}");
    check_timestamp(answer);
    let named = ["success", "error", "code", "timestamp"];
    let order: Vec<String> = fields(&text).into_iter().filter(|f| named.contains(&&**f)).collect();
    assert_eq!(order, named, "{what}: {text}");
    for (status, header) in
        [(401, "WWW-Authenticate"), (405, "Allow"), (429, "Retry-After"), (503, "Retry-After")]
    {
        assert!(answer.status != status || answer.header(header).is_some(), "{what}: {header}");
    }
}

/// Asserts that the body carries the present time, UTC, RFC 3339 with milliseconds.
#[track_caller]
pub fn check_timestamp(answer: &Response) {
    let text = answer.field("timestamp");
    let off = clock::parse_utc(&text).abs_diff(clock::now_s());
    assert!(text.len() == 24 && &text[19..20] == "." && text.ends_with('Z'), "{text:?}");
    assert!(off <= 5, "{text:?} is {off} s off");
}

/// What an answer with a certificate has, in this order.
pub const CERTIFICATE_FIELDS: [&str; 10] = [
    "success",
    "device_id",
    "certificate",
    "ca_certificate",
    "expires_at",
    "serial_number",
    "fingerprint",
    "certificateId",
    "downloadUrl",
    "timestamp",
];

/// The names of the fields of a JSON object, in their order, without those of inner objects.
pub fn fields(json: &str) -> Vec<String> {
    let (mut names, mut depth, mut text) = (vec![], 0, None::<String>);
    let mut last = String::new();
    let mut chars = json.chars();
    while let Some(c) = chars.next() {
        match (&mut text, c) {
            (Some(t), '\\') => t.extend(chars.next()),
            (Some(t), '"') => {
                last = std::mem::take(t);
                text = None;
            }
            (Some(t), _) => t.push(c),
            (None, '"') => text = Some(String::new()),
            (None, '{' | '[') => depth += 1,
            (None, '}' | ']') => depth -= 1,
            (None, ':') if depth == 1 => names.push(last.clone()),
            _ => {}
        }
    }
    names
}

/// Runs `test` against a server with memory only and against one with Redis, of each kind that is asked
/// for, with `env`.
pub fn on_both_stores(env: &[(&str, &str)], test: impl Fn(&Service)) {
    test(&Setup::new().envs(env).start());
    for engine in Engine::asked_for() {
        let servers = engine.start();
        let service = Setup::new().envs(env).env_of(&servers.env()).start();
        service.wait_for_storage("redis");
        test(&service);
    }
}
