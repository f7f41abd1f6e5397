//! The end of the real program: what was begun is answered, nobody new is let in, and the process
//! ends by itself with 0. A second process on the same port fails and says why.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::proxy::{Proxy, Stop};
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::wait;

/// The longest drain, and what a machine under load may add to it.
const DRAINED_S: u64 = 10;
const SLACK_S: u64 = 2;

#[test]
fn what_was_begun_is_answered_and_nobody_new_is_let_in() {
    for signal in ["TERM", "INT"] {
        let redis = Redis::start(&[]);
        let proxy = Proxy::start(redis.port());
        let mut service =
            Setup::new().env("REDIS_URL", &proxy.url()).env("REDIS_TIMEOUT_MS", "8000").start();
        service.wait_for_storage("redis");
        let bodies: Vec<TcpStream> = (0..20).map(|n| begin_body(&service, n)).collect();
        let idle = TcpStream::connect(service.http.addr).unwrap();
        let used = ask_and_stay(&service);
        thread::scope(|scope| {
            let trap = proxy.trap("hangs-in-redis", Stop::Before);
            let slow = scope.spawn(|| service.onboard("hangs-in-redis"));
            trap.wait();
            service.signal(signal);
            refuses(&service);
            assert_eq!(rest_of(idle), "", "{signal}: idle connections end");
            assert_eq!(rest_of(used), "", "{signal}: so do those that were served");
            for mut stream in bodies {
                stream.write_all(b"\"}").unwrap();
                let answer = rest_of(stream);
                assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{signal}: {answer}");
                assert!(answer.contains("\r\nConnection: close\r\n"), "{signal}: {answer}");
            }
            trap.release();
            let answer = slow.join().unwrap();
            assert_eq!(answer.status, 200, "{signal}: {}", answer.text());
        });
        let exit = service.wait_exit();
        assert_eq!(exit.code, Some(0), "{signal}: {}", exit.log);
        let said = format!("SIG{signal}: finishing what was begun");
        assert!(exit.log.contains(&said) && exit.log.contains("stopped"), "{}", exit.log);
    }
}

#[test]
fn a_redis_that_hangs_does_not_hold_up_the_end() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let mut service =
        Setup::new().env("REDIS_URL", &proxy.url()).env("REDIS_TIMEOUT_MS", "2000").start();
    service.wait_for_storage("redis");
    let trap = proxy.trap("hung", Stop::Before);
    let start = thread::scope(|scope| {
        let slow = scope.spawn(|| service.onboard("hung"));
        trap.wait();
        service.signal("TERM");
        let start = Instant::now();
        let answer = slow.join().unwrap();
        assert_eq!(answer.status, 200, "from memory, as in any outage: {}", answer.text());
        start
    });
    assert_eq!(service.wait_exit().code, Some(0));
    assert!(start.elapsed() < Duration::from_secs(2 + SLACK_S), "{:?}", start.elapsed());
}

#[test]
fn a_body_that_never_ends_holds_it_up_for_ten_seconds_only() {
    let mut service = Setup::new().start();
    let _stream = begin_body(&service, 0);
    let start = Instant::now();
    let exit = service.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert!(start.elapsed() < Duration::from_secs(DRAINED_S + SLACK_S), "{:?}", start.elapsed());
}

#[test]
fn nothing_to_do_is_no_reason_to_wait() {
    let mut service = Setup::new().start();
    let _idle: Vec<_> = (0..50).map(|_| ask_and_stay(&service)).collect();
    let start = Instant::now();
    assert_eq!(service.terminate().code, Some(0));
    assert!(start.elapsed() < Duration::from_secs(SLACK_S), "{:?}", start.elapsed());
}

#[test]
fn a_second_process_on_the_same_port_fails_and_says_so() {
    let service = Setup::new().start();
    let exit = Setup::new().env("PORT", &service.port().to_string()).run();
    assert_eq!(exit.code, Some(1), "{}", exit.log);
    let said = format!("cannot serve on {}: Address already in use", service.http.addr);
    assert!(exit.log.contains(&said), "{}", exit.log);
    assert_eq!(service.health()["status"], "ok");
}

/// An onboarding of which the last two bytes are still to come.
fn begin_body(service: &Service, n: usize) -> TcpStream {
    let mut stream = TcpStream::connect(service.http.addr).unwrap();
    let body = format!("{{\"device_id\":\"slow-{n}");
    let head = "POST /api/v1/onboarding HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n";
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len() + 2).unwrap();
    stream
}

/// A connection on which one request was answered.
fn ask_and_stay(service: &Service) -> TcpStream {
    let mut stream = TcpStream::connect(service.http.addr).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"}\n") {
        let mut piece = [0; 4096];
        let n = stream.read(&mut piece).unwrap();
        assert_ne!(n, 0, "{}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&piece[..n]);
    }
    stream
}

fn refuses(service: &Service) {
    wait::for_true("new connections are refused", || {
        TcpStream::connect(service.http.addr).is_err()
    });
}

/// What comes until the server ends the connection.
fn rest_of(mut stream: TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}
