//! What clients that keep to the rules get: framing, connections, methods, drain.

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::{field, one_response, serve, statuses, to_end, until};

#[test]
fn a_connection_is_used_again() {
    let served = serve(|_| {});
    let mut stream = served.connect();
    for n in 0..50 {
        write!(stream, "POST /x?{n} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").unwrap();
        let (status, head, body) = one_response(&mut stream, false);
        assert_eq!(status, 200);
        assert_eq!(body, format!("POST /x?{n} 127.0.0.1\nhi"));
        assert_eq!(field(&head, "Connection"), None);
        assert!(field(&head, "Date").unwrap().ends_with(" GMT"));
        assert_eq!(field(&head, "Server"), None);
    }
    assert_eq!(served.counters.accepted.value(), 1);
}

#[test]
fn bodies_of_every_size_come_through() {
    let served = serve(|_| {});
    let mut stream = served.connect();
    for size in [0, 1, 1023, 1024, 1025, 4096, 40_000, 65_535, 65_536] {
        let body = "y".repeat(size);
        write!(stream, "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}")
            .unwrap();
        let (status, _, echoed) = one_response(&mut stream, false);
        assert_eq!((status, echoed), (200, format!("POST /x 127.0.0.1\n{body}")), "{size}");
        write!(stream, "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            .unwrap();
        for chunk in body.as_bytes().chunks(1000) {
            write!(stream, "{:x};ext\r\n", chunk.len()).unwrap();
            stream.write_all(chunk).unwrap();
            stream.write_all(b"\r\n").unwrap();
        }
        stream.write_all(b"0\r\nTrailer: x\r\n\r\n").unwrap();
        let (status, _, echoed) = one_response(&mut stream, false);
        assert_eq!((status, echoed), (200, format!("POST /x 127.0.0.1\n{body}")), "{size}");
    }
}

#[test]
fn replies_of_every_size_come_through() {
    let served = serve(|_| {});
    let mut stream = served.connect();
    for size in [0, 1, 1000, 70_000, 500_000, 5_000_000] {
        write!(stream, "GET /bytes?{size} HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        // The largest does not fit into the sockets; the client comes late for it.
        let is_held = || served.counters.held_bytes.value() > 0;
        until("the edge holds the rest", || size < 5_000_000 || is_held());
        assert_eq!(one_response(&mut stream, false).2.len(), size);
    }
}

#[test]
fn pipelined_requests_wait_their_turn() {
    let served = serve(|_| {});
    let mut stream = served.connect();
    let mut all = String::new();
    for n in 0..200 {
        all += &format!("POST /p?{n} HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n{n:03}");
    }
    stream.write_all(all.as_bytes()).unwrap();
    for n in 0..200 {
        let (status, _, body) = one_response(&mut stream, false);
        assert_eq!((status, body), (200, format!("POST /p?{n} 127.0.0.1\n{n:03}")));
    }
}

#[test]
fn head_has_no_body_and_204_no_length() {
    let served = serve(|_| {});
    let mut stream = served.connect();
    for _ in 0..3 {
        stream.write_all(b"HEAD /bytes?70000 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let (status, head, _) = one_response(&mut stream, true);
        assert_eq!((status, field(&head, "Content-Length")), (200, Some("70000")));
        stream.write_all(b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let (status, head, _) = one_response(&mut stream, false);
        assert_eq!((status, field(&head, "Content-Length")), (204, None));
    }
}

#[test]
fn http_1_0_closes_unless_asked_to_stay() {
    let served = serve(|_| {});
    let text = served.exchange(b"GET /x HTTP/1.0\r\n\r\n");
    assert_eq!(statuses(&text), [200]);
    assert_eq!(field(&text, "Connection"), Some("close"));
    let mut stream = served.connect();
    for _ in 0..2 {
        stream.write_all(b"GET /x HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").unwrap();
        let (status, head, _) = one_response(&mut stream, false);
        assert_eq!((status, field(&head, "Connection")), (200, Some("keep-alive")));
    }
    let two = b"GET /1 HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n";
    let text = served.exchange(two);
    assert_eq!(statuses(&text), [200]);
    assert_eq!(field(&text, "Connection"), Some("close"));
}

#[test]
fn continue_is_said_once_and_only_when_waited_for() {
    let served = serve(|_| {});
    let head = "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-Continue\r\n";
    let mut stream = served.connect();
    write!(stream, "{head}\r\n").unwrap();
    assert_eq!(one_response(&mut stream, false).0, 100);
    stream.write_all(b"h").unwrap();
    served.probe(); // what came before it has been read then
    write!(stream, "i{head}\r\nhi").unwrap();
    assert_eq!(one_response(&mut stream, false).0, 200);
    assert_eq!(one_response(&mut stream, false).0, 200);
    let early = served.exchange(format!("{}\r\n", head.replace(": 2", ": 65537")).as_bytes());
    assert_eq!(statuses(&early), [413]);
}

#[test]
fn a_client_that_ends_its_side_is_answered() {
    let served = serve(|_| {});
    let text = served.exchange_and_end(b"GET /wait?50 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(statuses(&text), [200]);
    let text = served.exchange_and_end(b"GET /wait?50 HTTP/1.1\r\nHost: a\r\n\r\nGET /b");
    assert_eq!(statuses(&text), [200, 400]);
}

#[test]
fn a_panic_costs_its_own_request_only() {
    let served = serve(|_| {});
    let mut stream = served.connect();
    stream.write_all(b"GET /panic HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let (status, head, body) = one_response(&mut stream, false);
    assert_eq!((status, field(&head, "X-Error-Code")), (500, Some("INTERNAL_ERROR")));
    assert!(body.contains("\"code\":\"INTERNAL_ERROR\""), "{body}");
    stream.write_all(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(one_response(&mut stream, false).0, 200);
    assert_eq!(served.counters.lanes_lost.value(), 0);
}

#[test]
fn a_slow_kind_of_request_delays_only_its_own_lane() {
    let served = serve(|_| {});
    let mut slow = served.connect();
    slow.write_all(b"POST /api/v1/renew?1000 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    until("it is in work", || served.handled.load(Ordering::Relaxed) == 1);
    assert!(served.probe() < Duration::from_millis(500));
    assert_eq!(one_response(&mut slow, false).0, 200);
}

#[test]
fn a_drain_answers_what_was_begun_and_closes_the_rest() {
    let served = serve(|_| {});
    let mut busy = served.connect();
    busy.write_all(b"GET /wait?300 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut half = served.connect();
    half.write_all(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab").unwrap();
    let mut idle = served.connect();
    until("all are in", || served.counters.open.value() == 3);
    until("one is in work", || served.handled.load(Ordering::Relaxed) == 1);
    let (addr, handle) = (served.addr, served.handle.clone());
    let finish = std::thread::spawn(move || served.shutdown());
    assert_eq!(to_end(&mut idle), "");
    assert!(std::net::TcpStream::connect(addr).is_err());
    half.write_all(b"cd").unwrap();
    for stream in [&mut half, &mut busy] {
        let text = to_end(stream);
        assert_eq!((statuses(&text), field(&text, "Connection")), (vec![200], Some("close")));
    }
    drop((half, busy));
    finish.join().unwrap();
    handle.shutdown();
}
