//! Slow, huge, endless and many: what each is told and when, and that nobody else notices.

use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::{
    Served, Xorshift, connect_from, one_response, serve, serve_in_lanes, statuses, to_end, until,
};
use mqtt_publisher_lite::config::Cidr;
use mqtt_publisher_lite::edge::{Settings, Wait};

/// Deadlines short enough for a test, long enough for a busy machine.
fn hurried(settings: &mut Settings) {
    let d = &mut settings.deadlines;
    d.set(Wait::Head, Duration::from_millis(400));
    d.set(Wait::Body, Duration::from_millis(500));
    d.set(Wait::Write, Duration::from_millis(600));
    d.set(Wait::KeepAlive, Duration::from_millis(700));
    d.set(Wait::Linger, Duration::from_millis(300));
}

fn within(start: Instant, from_ms: u64, to_ms: u64) {
    let took = start.elapsed().as_millis();
    assert!((u128::from(from_ms)..u128::from(to_ms)).contains(&took), "{took} ms");
}

#[test]
fn whoever_is_late_is_told_so() {
    let served = serve(hurried);
    let start = Instant::now();
    let mut silent = served.connect();
    let mut head = served.connect();
    head.write_all(b"GET / HTTP/1.1\r\nHost: a").unwrap();
    let mut body = served.connect();
    body.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc").unwrap();
    let mut idle = served.connect();
    idle.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(one_response(&mut idle, false).0, 200);
    assert_eq!(to_end(&mut silent), "");
    let text = to_end(&mut head);
    assert_eq!(statuses(&text), [408], "{text}");
    within(start, 390, 650);
    assert_eq!(statuses(&to_end(&mut body)), [408]);
    within(start, 490, 900);
    assert_eq!(to_end(&mut idle), "");
    within(start, 690, 1200);
    until("all are gone", || served.counters.open.value() == 0);
    assert_eq!(served.counters.timed_out.value(), 3);
}

#[test]
fn a_trickle_does_not_put_the_deadline_off() {
    let served = serve(hurried);
    for (first, last) in [
        ("GET / HTTP/1.1\r\nX: ", 650),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n", 900),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;", 900),
    ] {
        let start = Instant::now();
        let mut stream = served.connect();
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        stream.write_all(first.as_bytes()).unwrap();
        let mut byte = [0];
        while stream.read(&mut byte).is_err() {
            stream.write_all(b"x").unwrap();
        }
        within(start, 390, last);
        stream.set_read_timeout(None).unwrap();
        assert!(to_end(&mut stream).contains("408"));
    }
}

#[test]
fn whoever_does_not_read_is_closed() {
    let served = serve(|s| {
        hurried(s);
        s.http.max_buffer_bytes = 64 * 1024 * 1024;
    });
    let start = Instant::now();
    let mut streams = from_everywhere(&served, 4);
    for stream in &mut streams {
        stream.write_all(b"GET /bytes?9000000 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    }
    until("all are asked", || served.handled.load(Ordering::Relaxed) == 4);
    until("they are closed", || served.counters.open.value() == 0);
    within(start, 590, 3000);
    assert_eq!(served.counters.timed_out.value(), 4);
    for stream in &mut streams {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        assert!(bytes.len() < 9_000_000);
    }
    served.probe();
}

#[test]
fn a_refusal_is_read_by_a_client_that_still_sends() {
    let served = serve(|_| {});
    for _ in 0..20 {
        let mut stream = served.connect();
        let head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n";
        stream.write_all(&[head.as_slice(), &[b'x'; 1_000_000]].concat()).unwrap();
        assert_eq!(statuses(&to_end(&mut stream)), [413]);
    }
}

/// The bytes on top of what the server reads wait in the sockets' buffers.
#[test]
fn whoever_sends_on_after_a_refusal_is_closed_for_it() {
    const BUFFERS: usize = 12 * 1024 * 1024;
    let served = serve(|s| s.deadlines.set(Wait::Linger, Duration::from_secs(60)));
    for head in
        ["GET /x HTTP/1.1\r\n\r\n", "GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"]
    {
        let mut stream = served.connect();
        stream.write_all(head.as_bytes()).unwrap();
        let mut sent = 0;
        while sent < 64 * 1024 * 1024 && stream.write_all(&[b'x'; 64 * 1024]).is_ok() {
            sent += 64 * 1024;
        }
        assert!(sent < BUFFERS, "{sent} bytes were taken");
    }
    until("they are closed", || served.counters.open.value() == 0);
}

#[test]
fn one_address_cannot_take_all() {
    let served = serve(|s| {
        s.http.max_connections = 20;
        s.http.max_connections_per_ip = 5;
    });
    let mut first = served.connect();
    first.write_all(b"GET /wait?300 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    until("it is in work", || served.handled.load(Ordering::Relaxed) == 1);
    let crowd: Vec<_> = (0..50).map(|_| served.connect()).collect();
    until("all are in", || served.counters.accepted.value() == 51);
    assert_eq!((served.counters.open.value(), served.counters.gave_way.value()), (5, 46));
    // Who was in work is still there, and so is who came last.
    assert_eq!(one_response(&mut first, false).0, 200);
    let mut last = crowd.last().unwrap();
    last.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(one_response(&mut last, false).0, 200);
    let mut other = connect_from([127, 0, 0, 2].into(), served.addr).unwrap();
    other.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(one_response(&mut other, false).0, 200);
    assert_eq!(served.counters.open.value(), 6);
}

#[test]
fn at_the_limit_whoever_was_idle_longest_gives_way() {
    let served = serve(|s| s.http.max_connections = 10);
    let mut old: Vec<_> = (0..10).map(|_| served.connect()).collect();
    until("all are in", || served.counters.open.value() == 10);
    let mut used = old.remove(0);
    used.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(one_response(&mut used, false).0, 200);
    for _ in 0..9 {
        served.probe();
    }
    assert!(served.counters.gave_way.value() >= 1);
    // The first to come had a request answered since, so it stays.
    used.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(one_response(&mut used, false).0, 200);
    assert_eq!(to_end(&mut old[0]), "");
}

/// Those who were idle for longer come from one address each, or through a proxy.
#[test]
fn at_the_limit_the_address_with_the_most_gives_way_first() {
    let from = |n: u8| IpAddr::V4(Ipv4Addr::new(127, 0, 0, n));
    let served = serve(|s| {
        s.http.max_connections = 20;
        s.http.trusted_proxies = vec![Cidr::parse("127.0.0.99").unwrap()];
    });
    let ask = |stream: &mut TcpStream| {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        one_response(stream, false).0
    };
    let enter = |n| {
        let mut stream = connect_from(from(n), served.addr).unwrap();
        assert_eq!(ask(&mut stream), 200);
        stream
    };
    let mut few: Vec<_> = (2..7).chain([99; 5]).map(enter).collect();
    let mut crowd: Vec<_> = [50; 10].into_iter().map(enter).collect();
    let mut late: Vec<_> = (11..20).map(enter).collect();
    for stream in few.iter_mut().chain(&mut late).chain(crowd.last_mut()) {
        assert_eq!(ask(stream), 200);
    }
    for stream in &mut crowd[..9] {
        assert_eq!(to_end(stream), "");
    }
    // Now all have one, and the one that was idle longest goes.
    let _newest = enter(20);
    assert_eq!(to_end(&mut few[0]), "");
    assert_eq!((served.counters.open.value(), served.counters.gave_way.value()), (20, 10));
}

#[test]
fn when_all_are_in_work_the_new_one_is_turned_away() {
    let served = serve(|s| s.http.max_connections = 4);
    let mut busy: Vec<_> = (0..4).map(|_| served.connect()).collect();
    for stream in &mut busy {
        stream.write_all(b"GET /wait?200 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    }
    until("they are in work", || served.counters.requests.value() == 4);
    assert_eq!(to_end(&mut served.connect()), "");
    assert_eq!(served.counters.turned_away.value(), 1);
    for stream in &mut busy {
        assert_eq!(one_response(stream, false).0, 200);
    }
}

/// Its request came longest ago, but it has its reply still to read.
#[test]
fn whoever_reads_a_reply_does_not_give_way() {
    let served = serve(|s| s.http.max_connections = 3);
    let mut reading = from_everywhere(&served, 1).remove(0);
    reading
        .write_all(b"GET /bytes?6000000 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .unwrap();
    until("its reply is under way", || served.counters.held_bytes.value() > 1_000_000);
    let crowd = from_everywhere(&served, 9);
    until("all are in", || served.counters.accepted.value() == 10);
    let text = to_end(&mut reading);
    assert!(text.ends_with(&"x".repeat(6_000_000)), "{} bytes", text.len());
    assert_eq!((served.counters.gave_way.value(), served.counters.turned_away.value()), (7, 0));
    drop(crowd);
}

#[test]
fn a_proxy_is_exempt_and_names_its_clients() {
    let served = serve(|s| {
        s.http.max_connections_per_ip = 2;
        s.http.trusted_proxies = vec![Cidr::parse("127.0.0.3").unwrap()];
    });
    let ask = b"GET /x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 9.9.9.9, 203.0.113.7\r\n\r\n";
    let mut streams: Vec<_> =
        (0..5).map(|_| connect_from([127, 0, 0, 3].into(), served.addr).unwrap()).collect();
    for stream in &mut streams {
        stream.write_all(ask).unwrap();
        assert_eq!(one_response(stream, false).2, "GET /x 203.0.113.7\n");
    }
    let mut direct = served.connect();
    direct.write_all(ask).unwrap();
    assert_eq!(one_response(&mut direct, false).2, "GET /x 127.0.0.1\n");
}

#[test]
fn a_full_lane_answers_503() {
    let served = serve_in_lanes(|lane| lane.max_waiting = 3, |_| {});
    let mut streams: Vec<_> = (0..10).map(|_| served.connect()).collect();
    for stream in &mut streams {
        stream
            .write_all(b"GET /wait?100 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            .unwrap();
        until("the first is at work", || served.handled.load(Ordering::Relaxed) > 0);
    }
    let texts: Vec<_> = streams.iter_mut().map(to_end).collect();
    let busy: Vec<_> = texts.iter().filter(|text| statuses(text) == [503]).collect();
    assert_eq!(texts.iter().filter(|text| statuses(text) == [200]).count() + busy.len(), 10);
    assert!((6..=7).contains(&busy.len()), "{}", busy.len());
    for text in busy {
        assert!(text.contains("\r\nRetry-After: 1\r\n") && text.contains("SERVICE_UNAVAILABLE"));
    }
}

#[test]
fn those_who_wait_for_what_is_large_leave_places_to_others() {
    let served = serve(|s| s.http.max_connections = 40);
    beside_a_probe(&served, 900, || {
        let mut streams = from_everywhere(&served, 60);
        for stream in &mut streams {
            // Whoever had to give way already cannot write.
            let _ = stream.write_all(b"GET /api/v1/crl?20 HTTP/1.1\r\nHost: a\r\n\r\n");
        }
        until("those let in were answered", || served.counters.refused.value() > 20);
        until("and those accepted", || served.handled.load(Ordering::Relaxed) >= 16);
    });
    assert_eq!(served.counters.turned_away.value(), 0);
}

/// A probe every 10 ms from an address of its own, until `stop`; the longest it took.
fn probing(served: &Served, stop: &AtomicBool) -> Duration {
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let mut stream = connect_from([127, 1, 1, 1].into(), served.addr).unwrap();
        // In two packets, so that a head has to be held for it.
        stream.write_all(b"GET /probe HTTP/1.1\r\nHo").unwrap();
        stream.write_all(b"st: a\r\nConnection: close\r\n\r\n").unwrap();
        assert_eq!(statuses(&to_end(&mut stream)), [200]);
        longest = longest.max(start.elapsed());
        std::thread::sleep(Duration::from_millis(10));
    }
    longest
}

/// Connections from addresses all over 127.0.0.0/8.
fn from_everywhere(served: &Served, count: u32) -> Vec<TcpStream> {
    let host = |n: u32| IpAddr::V4(Ipv4Addr::from_bits(0x7f00_0002 + n * 251));
    (0..count).map(|n| connect_from(host(n), served.addr).unwrap()).collect()
}

/// Runs `attack` while a probe runs beside it, which never takes longer than `allowed_ms`.
fn beside_a_probe(served: &Served, allowed_ms: u64, attack: impl FnOnce()) {
    /// Also when the attack fails, or its failure would never be seen.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let probe = scope.spawn(|| probing(served, &stop));
        let end = Stop(&stop);
        attack();
        drop(end);
        let longest = probe.join().unwrap();
        assert!(longest < Duration::from_millis(allowed_ms), "a probe took {longest:?}");
    });
}

#[test]
fn unfinished_bodies_stay_within_the_budget() {
    const BUDGET: usize = 2 * 1024 * 1024;
    let served = serve(|s| s.http.max_buffer_bytes = BUDGET);
    beside_a_probe(&served, 900, || {
        let mut streams = from_everywhere(&served, 300);
        let head = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 65536\r\n\r\n";
        let part = [head.as_slice(), &[b'x'; 63 * 1024]].concat();
        for stream in &mut streams {
            // Whoever does not fit is refused while it still sends.
            let _ = stream.write_all(&part);
            assert!(served.counters.held_bytes.value() <= BUDGET as u64);
        }
        until("the rest is refused", || served.counters.refused.value() > 200);
    });
    until("nothing is held", || served.counters.open.value() == 0);
    assert_eq!(served.counters.held_bytes.value(), 0);
}

/// A reply larger than what the system takes of it; behind it as much as one read takes.
const LARGE: &[u8] = b"GET /bytes?6000000 HTTP/1.1\r\nHost: a\r\n\r\n";
const MANY: usize = 1500;

#[test]
fn replies_that_nobody_reads_stay_within_the_budget() {
    const BUDGET: usize = 8 * 1024 * 1024;
    for request in [LARGE.to_vec(), LARGE.repeat(MANY)] {
        let served = serve(|s| s.http.max_buffer_bytes = BUDGET);
        // 400 MB go through the probe's own lane before it.
        beside_a_probe(&served, 5000, || {
            let mut streams = from_everywhere(&served, 64);
            for stream in &mut streams {
                stream.write_all(&request).unwrap();
                assert!(served.counters.held_bytes.value() <= BUDGET as u64);
            }
            until("all were answered", || {
                assert!(served.counters.held_bytes.value() <= BUDGET as u64);
                served.handled.load(Ordering::Relaxed) >= 64
            });
            until("the longest are closed", || served.counters.open.value() < 20);
            assert!(served.counters.held_bytes.value() <= BUDGET as u64);
        });
    }
}

/// The other half stays for those who still ask, and for what the process needs besides.
#[test]
fn replies_that_nobody_reads_hold_half_of_the_budget() {
    const HALF: u64 = 16 * 1024 * 1024;
    for request in [LARGE.to_vec(), LARGE.repeat(MANY)] {
        let served = serve(|s| s.http.max_buffer_bytes = 2 * HALF as usize);
        let mut streams = from_everywhere(&served, 16);
        for stream in &mut streams {
            stream.write_all(&request).unwrap();
        }
        let most = Cell::new(0);
        until("all are answered, and those closed who do not fit", || {
            most.set(served.counters.held_bytes.value().max(most.get()));
            assert!(most.get() <= HALF, "{most:?}");
            served.handled.load(Ordering::Relaxed) >= 16 && served.counters.open.value() < 8
        });
        assert!(most.get() > HALF / 2 && served.counters.open.value() > 1, "{most:?}");
    }
}

#[test]
fn whoever_takes_a_reply_slowly_holds_less_and_less() {
    let served = serve(|s| s.http.max_buffer_bytes = 24 * 1024 * 1024);
    let mut stream = served.connect();
    stream.write_all(b"GET /bytes?20000000 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let held = || served.counters.held_bytes.value();
    until("it is held but for what the system takes", || held() > 10_000_000);
    let (most, mut bytes) = (held(), vec![0; 100_000]);
    while held() > most / 2 {
        stream.read_exact(&mut bytes).unwrap();
        served.probe(); // the edge has had its turn to write more
    }
    assert!(held() > 0, "it was given back at once");
}

/// What waited behind the request was thrown away, so nothing after it can be understood.
#[test]
fn a_connection_of_which_something_was_thrown_away_ends_with_its_reply() {
    // One of these replies fits, two do not.
    let served = serve(|s| s.http.max_buffer_bytes = 24 * 1024 * 1024);
    let request = b"GET /bytes?20000000 HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut hoarder = served.connect();
    hoarder.write_all(request).unwrap();
    until("it holds much", || served.counters.held_bytes.value() > 10_000_000);
    let start = Instant::now();
    let mut stream = served.connect();
    stream.write_all(&request.repeat(MANY)).unwrap();
    until("the hoarder is closed for it", || served.counters.open.value() == 1);
    let text = to_end(&mut stream);
    assert!(text.len() > 20_000_000 && text.starts_with("HTTP/1.1 200 "), "{} bytes", text.len());
    assert!(text.ends_with('x'), "one answer and no more");
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}

#[test]
fn thousands_of_idle_connections_disturb_nobody() {
    let served = serve(|_| {});
    beside_a_probe(&served, 900, || {
        let streams = from_everywhere(&served, 3000);
        until("all were accepted", || served.counters.accepted.value() >= 3000);
        assert!(served.counters.open.value() <= 1024);
        drop(streams);
    });
}

#[test]
fn nobody_starves() {
    for clients in [1, 8, 64, 256, 1000] {
        for _ in 0..if clients < 100 { 10 } else { 3 } {
            let served = serve(|_| {});
            let mut streams = from_everywhere(&served, clients);
            for stream in &mut streams {
                stream
                    .write_all(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
                    .unwrap();
            }
            for stream in &mut streams {
                assert_eq!(one_response(stream, false).0, 200);
            }
        }
    }
}

#[test]
fn mixed_clients_all_get_their_own_answers() {
    let served = serve(|_| {});
    std::thread::scope(|scope| {
        for n in 0..16_u64 {
            let served = &served;
            scope.spawn(move || one_of_a_mixed_lot(served, n));
        }
    });
    assert_eq!(served.counters.lanes_lost.value(), 0);
}

/// Sends requests in random pieces, sometimes leaves in the middle, and knows its own answers.
fn one_of_a_mixed_lot(served: &Served, n: u64) {
    let mut random = Xorshift(n * 7919 + 1);
    let mut stream = served.connect();
    for i in 0..60 {
        let size = random.below(3000);
        let body = format!("{n}-{i}-").repeat(1 + size / 8);
        let bytes = format!(
            "POST /{n}/{i} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let leaves = random.below(10) == 0;
        let until = if leaves { random.below(bytes.len()) } else { bytes.len() };
        for piece in bytes.as_bytes().get(..until).unwrap().chunks(1 + random.below(2000)) {
            stream.write_all(piece).unwrap();
        }
        if leaves {
            stream = served.connect();
            continue;
        }
        let (status, _, echoed) = one_response(&mut stream, false);
        assert_eq!((status, echoed), (200, format!("POST /{n}/{i} 127.0.0.1\n{body}")));
    }
}
