//! What the integration tests share: the real program, a real Redis, a faulty network between the
//! two, real `openssl`, and a judge for what many clients saw.
//!
//! A test crate says `mod support;` and takes what it needs. Everything here waits by polling with
//! a deadline, fails with a message that shows the program's log, and cleans up after itself by
//! process id. Nothing is skipped: a tool that is missing fails the test (`scripts/test.sh`
//! installs them all).

#![allow(dead_code, reason = "each test crate uses the part that it needs")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a fixture that cannot do its work fails the test"
)]

pub mod clock;
pub mod csr;
pub mod history;
pub mod http;
pub mod load;
pub mod proxy;
pub mod redis;
pub mod service;
pub mod temp;
pub mod token;
pub mod wait;

/// Asserts that `code` is one of `expected`, which separates alternatives by `|`.
#[track_caller]
pub fn check_code(answer: &http::Response, status: u16, expected: &str, what: &str) {
    let code = answer.code();
    let fits = answer.status == status && expected.split('|').any(|e| e == code);
    assert!(
        fits,
        "{what}: {} {code}, expected {status} {expected}\n{}",
        answer.status,
        answer.text()
    );
}
