//! Waiting for what comes true, with a limit.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Asks `probe` every few milliseconds until it answers, at most for `limit`.
pub fn until<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        sleep(Duration::from_millis(5));
    }
}

/// As [`until`], for what must come true; fails the test if it does not within ten seconds.
#[track_caller]
pub fn for_true(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Duration::from_secs(10);
    assert!(
        until(limit, || holds().then_some(())).is_some(),
        "still not so after {limit:?}: {what}"
    );
}
