//! What `tiny_http` does when it stands on the network alone, and that it is gone behind the edge.
//!
//! Each test shows the failure first; when a release of `tiny_http` no longer has it, the test says
//! so, and a reason for the edge has gone.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::{alone, serve, statuses, until};
use crate::support::wait;
use tiny_http::{Response, Server};

/// `tiny_http` with one worker that reads the body and answers with the target.
fn bare() -> (SocketAddr, Arc<AtomicU64>) {
    let server = Server::http("127.0.0.1:0").unwrap();
    let addr = server.server_addr().to_ip().unwrap();
    let handled = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&handled);
    thread::spawn(move || {
        for mut request in server.incoming_requests() {
            count.fetch_add(1, Ordering::Relaxed);
            let _ = request.as_reader().read_to_end(&mut Vec::new());
            let target = request.url().to_owned();
            let _ = request.respond(Response::from_string(target));
        }
    });
    (addr, handled)
}

/// What comes back within 400 ms.
fn answer(addr: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
    // A refusal may come, and the connection end, before all is written.
    let _ = stream.write_all(bytes);
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

const PROBE: &[u8] = b"GET /probe HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

#[test]
fn a_body_that_does_not_come_stops_a_worker() {
    let slow = b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\n\r\nx";
    let (addr, handled) = bare();
    assert_eq!(statuses(&answer(addr, PROBE)), [200]);
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.write_all(slow).unwrap();
    until("the worker has it", || handled.load(Ordering::Relaxed) == 2);
    assert_eq!(answer(addr, PROBE), "");

    let served = serve(|_| {});
    let mut stream = served.connect();
    stream.write_all(slow).unwrap();
    until("it is in", || served.counters.open.value() == 1);
    assert_eq!(statuses(&answer(served.addr, PROBE)), [200]);
}

#[test]
fn any_transfer_encoding_counts_as_chunked() {
    // CVE-2026-66752. In front of a server that goes by the length, the second request is body.
    let bytes = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\
                  Content-Length: 40\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    let (addr, _) = bare();
    let text = answer(addr, bytes);
    assert!(statuses(&text) == [200, 200] && text.contains("/smuggled"), "{text}");

    let served = serve(|_| {});
    let text = answer(served.addr, bytes);
    assert!(statuses(&text) == [400] && !text.contains("/smuggled"), "{text}");
}

#[test]
fn a_header_line_may_go_on_for_ever() {
    let bytes = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &[b'x'; 8_000_000]].concat();
    let (addr, _) = bare();
    assert_eq!(answer(addr, &bytes), "");

    let served = serve(|_| {});
    assert_eq!(statuses(&answer(served.addr, &bytes)), [431]);
}

#[test]
fn each_connection_costs_a_thread() {
    alone("before::each_connection_costs_a_thread", count_threads);
}

fn count_threads() {
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let (addr, _) = bare();
    let before = threads();
    let enter = |_| {
        let now = threads();
        let stream = TcpStream::connect(addr).unwrap();
        // One after the other: of those who come at once it leaves most without a thread, and unread.
        let _ = wait::until(Duration::from_millis(50), || (threads() > now).then_some(()));
        stream
    };
    let crowd: Vec<_> = (0..100).map(enter).collect();
    assert!(threads() >= before + 80, "{before} threads became {}", threads());
    drop(crowd);

    let served = serve(|_| {});
    let before = threads();
    let crowd: Vec<_> = (0..100).map(|_| served.connect()).collect();
    until("all are in", || served.counters.open.value() == 100);
    assert!(threads() <= before, "{before} threads became {}", threads());
    drop(crowd);
}
