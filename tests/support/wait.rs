//! Waiting without sleeping longer than needed, and free ports.

use std::net::TcpListener;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
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

/// A port on 127.0.0.1 that nobody listens on.
///
/// Ports are taken in turn from below the range of outgoing connections: a port from that range
/// (which binding to port 0 gives) can be taken by any client while a server restarts on it.
pub fn free_port() -> u16 {
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 22_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = process::id().wrapping_mul(97);
    for _ in 0..COUNT {
        let turn = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(FIRST + start.wrapping_add(turn) % COUNT).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between {FIRST} and {}", FIRST + COUNT);
}
