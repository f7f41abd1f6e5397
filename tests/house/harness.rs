//! The fixtures themselves, against a real Redis: a fault that the harness only pretends to make
//! would let every test built on it pass.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::clock::{FakeClock, parse_utc};
use crate::support::command_proxy::{CommandProxy, Fault};
use crate::support::csr::{self, Csr};
use crate::support::history::{History, Op, Rules};
use crate::support::http::Response;
use crate::support::port::Port;
use crate::support::proxy::{Mode, Proxy, Stop, Way};
use crate::support::redis::{Redis, resp};
use crate::support::wait;

/// A client of Redis that does nothing by itself.
struct Wire(TcpStream);

impl Wire {
    fn open(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        Wire(stream)
    }

    fn send(&mut self, words: &[&str]) {
        let mut bytes = vec![];
        resp(&mut bytes, words);
        let _ = self.0.write_all(&bytes); // what became of it, the answer shows
    }

    fn read(&mut self) -> Result<String, ErrorKind> {
        let mut buffer = [0; 4096];
        match self.0.read(&mut buffer) {
            Ok(n) => Ok(String::from_utf8_lossy(&buffer[..n]).into_owned()),
            Err(e) => Err(e.kind()),
        }
    }

    fn ask(&mut self, words: &[&str]) -> Result<String, ErrorKind> {
        self.send(words);
        self.read()
    }
}

fn proxied() -> (Redis, Proxy) {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    (redis, proxy)
}

#[test]
fn a_proxy_passes_and_counts() {
    let (redis, proxy) = proxied();
    let mut wire = Wire::open(proxy.port());
    assert_eq!(wire.ask(&["SET", "a", "1"]), Ok("+OK\r\n".to_owned()));
    assert_eq!(wire.ask(&["GET", "a"]), Ok("$1\r\n1\r\n".to_owned()));
    assert_eq!(redis.cli(&["GET", "a"]), "1");
    assert_eq!(proxy.commands(), [vec!["SET", "a", "1"], vec!["GET", "a"]]);
    assert_eq!(proxy.count("get"), 1);
    assert_eq!(proxy.bytes(Way::ToService), 12);
    assert_eq!((proxy.accepted(), proxy.open()), (1, 1));
    drop(wire);
    wait::for_true("the connection is gone", || proxy.open() == 0);
}

#[test]
fn a_delay_takes_its_time_and_keeps_pipelines_whole() {
    let (_redis, proxy) = proxied();
    proxy.set(Mode::Delay(Duration::from_millis(100)));
    let mut wire = Wire::open(proxy.port());
    let begin = Instant::now();
    for _ in 0..4 {
        wire.send(&["PING"]);
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut answers = String::new();
    while answers.len() < 28 {
        answers += &wire.read().unwrap();
    }
    let took = begin.elapsed();
    // One after the other they would take 0.8 s.
    assert!((200..750).contains(&took.as_millis()), "four delayed together took {took:?}");
}

#[test]
fn lost_replies_stay_lost() {
    let (redis, proxy) = proxied();
    let mut wire = Wire::open(proxy.port());
    proxy.set(Mode::SwallowReplies);
    assert!(wire.ask(&["SET", "a", "1"]).is_err());
    assert_eq!(redis.cli(&["GET", "a"]), "1");
    proxy.set(Mode::Pass);
    assert!(wire.ask(&["SET", "a", "2"]).is_err(), "a stream with a hole");
    assert_eq!(Wire::open(proxy.port()).ask(&["GET", "a"]), Ok("$1\r\n2\r\n".to_owned()));
}

#[test]
fn a_blackhole_takes_all_and_gives_nothing() {
    let (redis, proxy) = proxied();
    let mut old = Wire::open(proxy.port());
    proxy.set(Mode::Blackhole);
    assert!(old.ask(&["SET", "a", "1"]).is_err());
    assert!(Wire::open(proxy.port()).ask(&["SET", "a", "1"]).is_err());
    assert!(!redis.exists("a"));
}

#[test]
fn refused_and_back() {
    let (_redis, proxy) = proxied();
    let mut wire = Wire::open(proxy.port());
    proxy.set(Mode::Refuse);
    assert_ne!(wire.ask(&["PING"]), Ok("+PONG\r\n".to_owned()), "open connections are closed");
    assert!(TcpStream::connect(("127.0.0.1", proxy.port())).is_err());
    for _ in 0..3 {
        proxy.set(Mode::Pass);
        assert_eq!(Wire::open(proxy.port()).ask(&["PING"]), Ok("+PONG\r\n".to_owned()));
        proxy.set(Mode::Refuse);
    }
}

#[test]
fn cut_in_the_middle_of_a_message() {
    let (redis, proxy) = proxied();
    proxy.cut_after(Way::ToService, 3);
    let mut wire = Wire::open(proxy.port());
    assert_eq!(wire.ask(&["SET", "a", "1"]), Ok("+OK".to_owned()));
    assert_eq!(wire.read(), Ok(String::new()), "closed");
    assert_eq!(redis.cli(&["GET", "a"]), "1");
    proxy.cut_after(Way::ToRedis, 10);
    let mut wire = Wire::open(proxy.port());
    assert!(!matches!(wire.ask(&["SET", "a", "2"]), Ok(text) if !text.is_empty()));
    assert_eq!(redis.cli(&["GET", "a"]), "1");
    assert_eq!(Wire::open(proxy.port()).ask(&["PING"]), Ok("+PONG\r\n".to_owned()), "once only");
}

#[test]
fn a_trap_before_redis_delivers_late_even_when_the_client_is_gone() {
    let (redis, proxy) = proxied();
    let trap = proxy.trap("used:", Stop::Before);
    let mut other = Wire::open(proxy.port());
    let mut wire = Wire::open(proxy.port());
    assert_eq!(wire.ask(&["SET", "a", "1"]), Ok("+OK\r\n".to_owned()));
    wire.send(&["SET", "used:1", "x"]);
    trap.wait();
    drop(wire);
    assert!(!redis.exists("used:1"));
    assert_eq!(other.ask(&["SET", "used:2", "y"]), Ok("+OK\r\n".to_owned()), "one connection only");
    trap.release();
    wait::for_true("the command arrives late", || redis.exists("used:1"));

    let trap = proxy.trap("used:", Stop::Before);
    other.send(&["SET", "used:3", "z"]);
    trap.wait();
    trap.throw_away();
    assert!(!matches!(other.read(), Ok(text) if !text.is_empty()));
    assert!(!redis.exists("used:3"));
}

#[test]
fn a_trap_after_redis_holds_the_reply() {
    let (redis, proxy) = proxied();
    let trap = proxy.trap("used:1", Stop::After);
    let mut wire = Wire::open(proxy.port());
    // The pattern lies across two pieces.
    wire.0.write_all(b"*3\r\n$3\r\nSET\r\n$6\r\nus").unwrap();
    wait::for_true("the first has arrived", || proxy.bytes(Way::ToRedis) == 19);
    wire.0.write_all(b"ed:1\r\n$1\r\nx\r\n").unwrap();
    trap.wait();
    assert_eq!(redis.cli(&["GET", "used:1"]), "x");
    assert!(wire.read().is_err());
    trap.release();
    assert_eq!(wire.read(), Ok("+OK\r\n".to_owned()));
    assert_eq!(wire.ask(&["PING"]), Ok("+PONG\r\n".to_owned()));
}

#[test]
fn a_command_proxy_strikes_at_one_command_of_three() {
    let redis = Redis::start(&[]);
    let proxy = CommandProxy::start(redis.port());
    let refused = "OOM command not allowed";
    let cases = [
        (Fault::ResetBefore, "+OK\r\n", "1"),
        (Fault::ReplyLost, "+OK\r\n", "2"),
        (Fault::Error(refused), "+OK\r\n-OOM command not allowed\r\n+OK\r\n", "3"),
    ];
    for (fault, answered, last) in cases {
        redis.cli(&["FLUSHALL"]);
        let mut wire = Wire::open(proxy.port());
        assert_eq!(wire.ask(&["PING"]), Ok("+PONG\r\n".to_owned()));
        proxy.arm(2, fault, false);
        let mut sent = vec![];
        for n in ["1", "2", "3"] {
            resp(&mut sent, &["SET", "last", n]);
        }
        wire.0.write_all(&sent).unwrap();
        let mut read = String::new();
        while read.len() < answered.len() {
            read += &wire.read().unwrap();
        }
        assert_eq!(read, answered, "{fault:?}");
        let alive = wire.ask(&["PING"]).is_ok_and(|answer| answer == "+PONG\r\n");
        assert_eq!(alive, fault == Fault::Error(refused));
        assert_eq!(proxy.disarm().as_deref(), Some("SET"));
        assert_eq!(redis.cli(&["GET", "last"]), last, "{fault:?}");
    }
}

#[test]
fn held_commands_arrive_when_released() {
    let (redis, proxy) = proxied();
    proxy.set(Mode::HoldCommands);
    let mut wire = Wire::open(proxy.port());
    assert!(wire.ask(&["SET", "a", "1"]).is_err());
    drop(wire);
    assert!(!redis.exists("a"));
    proxy.set(Mode::Pass);
    wait::for_true("the command arrives", || redis.exists("a"));
}

#[test]
fn a_redis_stops_dies_and_comes_back_with_or_without_its_data() {
    let mut redis = Redis::start(&[]);
    redis.cli(&["SET", "a", "1"]);
    let stopped = redis.stop();
    assert!(Wire::open(redis.port()).ask(&["PING"]).is_err());
    drop(stopped);
    assert_eq!(redis.cli(&["PING"]), "PONG");
    redis.save();
    redis.cli(&["SET", "b", "2"]);
    redis.restart(true);
    assert_eq!(redis.keys(), ["a", "b"]);
    redis.cli(&["SET", "c", "3"]);
    redis.kill9();
    redis.start_again();
    assert_eq!(redis.keys(), ["a", "b"], "the snapshot is older");
    redis.restart(false);
    assert!(redis.keys().is_empty());
}

#[test]
fn redis_with_password_acl_and_tls() {
    let redis = Redis::with_password("se:cr/et");
    assert!(Wire::open(redis.port()).ask(&["GET", "a"]).unwrap().starts_with("-NOAUTH"));
    let redis = Redis::with_acl("device", "pw", "~mqtt-lite:* +@all -@dangerous");
    let mut wire = Wire::open(redis.port());
    assert_eq!(wire.ask(&["AUTH", "device", "pw"]), Ok("+OK\r\n".to_owned()));
    assert!(wire.ask(&["SET", "other", "1"]).unwrap().starts_with("-NOPERM"));
    let redis = Redis::with_tls();
    assert_eq!(redis.cli(&["SET", "a", "1"]), "OK");
    assert!(redis.url().starts_with("rediss://"));
}

#[test]
fn a_pipe_fills_redis() {
    let redis = Redis::start(&[]);
    redis.pipe(|out| (0..10_000).for_each(|n| resp(out, &["SET", &format!("k{n}"), "v"])));
    assert_eq!(redis.cli(&["DBSIZE"]), "10000");
}

#[test]
fn openssl_makes_requests_and_reads_certificates() {
    let csr = Csr::new("d")
        .extensions("subjectAltName = DNS:x")
        .attributes("challengePassword = s3cret")
        .make();
    let text = csr::openssl(&["req", "-noout", "-text", "-verify"], &csr);
    for part in ["CN = d", "DNS:x", "challengePassword", "ecdsa-with-SHA256", "prime256v1"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(
        csr::openssl(&["req", "-noout", "-text"], &Csr::new("d").key("ed25519").digest("-").make())
            .contains("ED25519")
    );
    assert!(csr::verify_with_openssl(&csr, &csr).is_err());
    assert_eq!(parse_utc("2025-11-27T10:00:00.007Z"), 1_764_237_600);
    assert_eq!(parse_utc("2000-02-29 00:00:00Z"), 951_782_400);
}

#[test]
fn a_fake_clock_is_seen_and_can_be_set() {
    let clock = FakeClock::at(10);
    let year = || {
        let mut date = Command::new("date");
        date.args(["-u", "+%Y"]).envs(clock.env());
        String::from_utf8(date.output().unwrap().stdout).unwrap()
    };
    assert_eq!(year().trim(), "1970");
    clock.set(parse_utc("2031-07-01T00:00:00Z"));
    assert_eq!(year().trim(), "2031");
    clock.set_right();
    assert!(year().trim() >= "2026");
}

/// What a clock leaves behind makes the next process with the same id fail.
#[test]
fn a_fake_clock_leaves_nothing_of_a_process_that_was_killed() {
    let clock = FakeClock::at(10);
    let mut date = Command::new("sh");
    date.args(["-c", "date; exec sleep 60"]).envs(clock.env()).stdout(Stdio::piped());
    let mut child = date.spawn().unwrap();
    let _ = child.stdout.take().unwrap().read(&mut [0]).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let shared = format!("/dev/shm/faketime_shm_{}", child.id());
    assert!(Path::new(&shared).exists(), "the library has changed: is this needed still?");
    drop(clock);
    assert!(!Path::new(&shared).exists());
}

#[test]
fn a_port_is_given_once_and_taken_by_who_names_it() {
    let port = Port::any();
    let connect = || TcpStream::connect(("127.0.0.1", port.number()));
    for _ in 0..3 {
        assert!(connect().is_err(), "nobody is there");
        let listener = TcpListener::bind(("127.0.0.1", port.number())).unwrap();
        let _client = connect().unwrap();
        let _server = listener.accept().unwrap();
    }
    let others: Vec<Port> = (0..500).map(|_| Port::any()).collect();
    let numbers: HashSet<u16> = others.iter().map(Port::number).collect();
    assert!(numbers.len() == 500 && !numbers.contains(&port.number()));
}

#[test]
fn the_judge_sees_what_is_wrong() {
    let answer = |status: u16, body: &str| Response { status, headers: vec![], body: body.into() };
    let history = |events: &[(Op, &str, u16, &str)]| {
        let history = History::new();
        for (op, token, status, body) in events {
            history.observe(*op, "d", token, || Ok(answer(*status, body)));
        }
        history
    };
    let guilty = |history: &History, recorded: &[String]| {
        let judge = || history.judge(&Rules::OUTAGE, recorded);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(judge)).is_err()
    };
    let issued = (Op::Onboard, "", 200, r#"{"provisioning_token":"t"}"#);
    let signed = (Op::Redeem, "t", 200, r#"{"serial_number":"4A"}"#);
    let used = (Op::Redeem, "t", 401, r#"{"code":"TOKEN_ALREADY_USED"}"#);
    let failed = (Op::Onboard, "", 500, r#"{"code":"INTERNAL_ERROR"}"#);
    let again = (Op::Redeem, "t", 200, r#"{"serial_number":"4b"}"#);
    let (record, none) = (["4a".to_owned()], ["4c".to_owned()]);
    assert!(!guilty(&history(&[issued, signed, used]), &record));
    assert!(guilty(&history(&[issued, signed, failed]), &record), "a 500");
    assert!(guilty(&history(&[issued, signed, again]), &[]), "twice");
    assert!(guilty(&history(&[issued, used]), &[]), "burnt");
    assert!(guilty(&history(&[issued]), &[]), "never redeemed");
    assert!(guilty(&history(&[issued, issued, signed]), &[]), "one token twice");
    assert!(guilty(&history(&[issued, signed]), &none), "not in the record");
    assert_eq!(history(&[issued]).outstanding(), [("d".to_owned(), "t".to_owned())]);
}
