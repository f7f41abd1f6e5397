//! kill -9 of the program, and of the network under it, at the moments that matter: nothing is burnt,
//! nothing is signed twice.

use std::io;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::support::csr::Csr;
use crate::support::history::Op;
use crate::support::http::Response;
use crate::support::load::sign;
use crate::support::proxy::{Mode, Proxy, Stop, Trap};
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::{check_error, history::History, token, wait};

/// A server whose way to Redis can be broken, a token of `d` and a request for it.
struct Stage {
    redis: Redis,
    proxy: Proxy,
    service: Service,
    token: String,
    csr: String,
}

impl Stage {
    fn set(timeout_ms: &str) -> Self {
        let redis = Redis::start(&[]);
        let proxy = Proxy::start(redis.port());
        let setup = Setup::new().env("REDIS_URL", &proxy.url()).env("REDIS_TIMEOUT_MS", timeout_ms);
        let service = setup.env("JWT_SECRET", token::SECRET).start();
        service.wait_for_storage("redis");
        let token = service.token("d");
        Stage { redis, proxy, service, token, csr: Csr::new("d").make() }
    }

    /// One whose program was killed when a redemption ran into this trap.
    fn killed_at(pattern: &str, stop: Stop) -> (Self, Trap) {
        let mut stage = Stage::set("5000");
        let trap = stage.proxy.trap(pattern, stop);
        let client = stage.client();
        trap.wait();
        stage.service.kill9();
        assert!(client.join().unwrap().is_err(), "the client got no answer");
        (stage, trap)
    }

    /// A device that presents the token, once.
    fn client(&self) -> JoinHandle<io::Result<Response>> {
        let (http, token, csr) = (self.service.http, self.token.clone(), self.csr.clone());
        thread::spawn(move || sign(&http, &token, &csr))
    }

    fn mark(&self) -> String {
        format!("mqtt-lite:{}", token::mark_of(&self.token))
    }

    /// The token, asked again until it is decided, gives one certificate, and no second.
    #[track_caller]
    fn check_gives_one(&self) {
        let answer = wait::until(Duration::from_secs(15), || {
            Some(self.service.sign(&self.token, &self.csr)).filter(|a| a.status != 503)
        });
        let answer = answer.unwrap_or_else(|| panic!("503 for good:\n{}", self.service.log()));
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), self.service.log());
        self.check_is_used();
        assert_eq!(self.service.index().len(), 1, "one certificate");
    }

    #[track_caller]
    fn check_is_used(&self) {
        let again = self.service.sign(&self.token, &self.csr);
        check_error(&again, 401, "TOKEN_ALREADY_USED", "once more");
    }

    fn restart(&mut self) {
        self.service.restart();
        self.service.wait_for_storage("redis");
    }
}

#[test]
fn killed_between_the_mark_and_the_record() {
    let (mut stage, trap) = Stage::killed_at("used:", Stop::After);
    assert!(stage.redis.exists(&stage.mark()), "the mark stands in Redis");
    assert!(stage.service.index().is_empty(), "and no certificate exists");
    drop(trap);
    stage.restart();
    stage.check_gives_one();
}

/// The dead mark is taken over by comparing, not by writing: in the moment between the look and the
/// take-over another instance may kill the token.
#[test]
fn a_token_that_is_killed_while_its_dead_mark_is_taken_over() {
    let (mut stage, trap) = Stage::killed_at("used:", Stop::After);
    drop(trap);
    stage.restart();

    let trap = stage.proxy.trap("\r\nEVAL\r\n", Stop::Before);
    let client = stage.client();
    trap.wait();
    let killed = "AAAAAAAAAAAAAAAAAAAAAA killed";
    stage.redis.cli(&["SET", &stage.mark(), killed, "PX", "360000"]);
    trap.release();
    check_error(&client.join().unwrap().unwrap(), 401, "TOKEN_ALREADY_USED", "killed meanwhile");
    assert_eq!(stage.redis.cli(&["GET", &stage.mark()]), killed, "the other's mark stands");
    assert!(stage.service.index().is_empty());
}

#[test]
fn killed_before_the_mark_reaches_redis() {
    let (mut stage, trap) = Stage::killed_at("used:", Stop::Before);
    trap.throw_away();
    stage.restart();
    stage.check_gives_one();
}

#[test]
fn killed_and_the_mark_arrives_after_the_restart() {
    let (mut stage, trap) = Stage::killed_at("used:", Stop::Before);
    stage.restart();
    trap.release();
    wait::for_true("the mark arrives", || stage.redis.exists(&stage.mark()));
    stage.check_gives_one();
}

#[test]
fn killed_after_the_record() {
    let mut stage = Stage::set("5000");
    // The first command of the cleaning up, after the certificate is recorded.
    let trap = stage.proxy.trap("\r\nDEL\r\n", Stop::Before);
    let client = stage.client();
    trap.wait();
    wait::for_true("it is recorded", || stage.service.index().len() == 1);
    stage.service.kill9();
    trap.throw_away();
    println!("the client saw {:?}", client.join().unwrap().map(|a| a.status));
    stage.restart();
    stage.check_is_used();
    assert_eq!(stage.service.index().len(), 1);
    let key = format!("mqtt-lite:token:{}", stage.token);
    wait::for_true("what is left of the token is removed", || !stage.redis.exists(&key));
}

#[test]
fn a_consumption_without_an_answer_is_503_and_burns_nothing() {
    let stage = Stage::set("300");
    let trap = stage.proxy.trap("used:", Stop::After);
    let begin = Instant::now();
    let answer = stage.service.sign(&stage.token, &stage.csr);
    check_error(&answer, 503, "SERVICE_UNAVAILABLE", "the reply is held");
    assert!(begin.elapsed() < Duration::from_millis(1000), "{:?}", begin.elapsed());
    trap.throw_away();
    stage.check_gives_one();
}

#[test]
fn a_mark_that_arrives_late_gives_no_second_certificate() {
    let stage = Stage::set("300");
    let trap = stage.proxy.trap("used:", Stop::Before);
    let answer = stage.service.sign(&stage.token, &stage.csr);
    check_error(&answer, 503, "SERVICE_UNAVAILABLE", "the command is held");
    trap.release();
    wait::until(Duration::from_millis(500), || stage.redis.exists(&stage.mark()).then_some(()));
    stage.check_gives_one();
}

#[test]
fn a_mark_that_arrives_after_the_second_attempt_gives_no_second_certificate() {
    let stage = Stage::set("300");
    let trap = stage.proxy.trap("used:", Stop::Before);
    check_error(&stage.service.sign(&stage.token, &stage.csr), 503, "SERVICE_UNAVAILABLE", "held");
    stage.check_gives_one();
    let commands = stage.proxy.commands().len();
    trap.release();
    wait::for_true("the late command arrives", || stage.proxy.commands().len() > commands);
    stage.check_is_used();
    assert_eq!(stage.service.index().len(), 1);
}

#[test]
fn an_onboarding_without_an_answer_is_answered_from_memory() {
    let stage = Stage::set("300");
    let trap = stage.proxy.trap("device:e", Stop::After);
    let begin = Instant::now();
    let answer = stage.service.onboard("e");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(begin.elapsed() < Duration::from_millis(1000), "{:?}", begin.elapsed());
    trap.throw_away();
    let (compact, csr) = (answer.field("provisioning_token"), Csr::new("e").make());
    let signed = wait::until(Duration::from_secs(15), || {
        Some(stage.service.sign(&compact, &csr)).filter(|a| a.status != 503)
    });
    assert_eq!(signed.map(|a| a.status), Some(200));
    check_error(&stage.service.sign(&compact, &csr), 401, "TOKEN_ALREADY_USED", "once");
}

#[test]
fn replies_that_are_cut_in_the_middle() {
    // Wherever the reply to a consumption breaks off, it is 503 or done, and one certificate.
    for bytes in [0, 1, 4, 9, 20, 45] {
        let stage = Stage::set("300");
        stage.proxy.cut_after(crate::support::proxy::Way::ToService, bytes);
        let answer = stage.service.sign(&stage.token, &stage.csr);
        match answer.status {
            200 => stage.check_is_used(),
            _ => {
                check_error(&answer, 503, "SERVICE_UNAVAILABLE", &format!("after {bytes} bytes"));
                stage.check_gives_one();
            }
        }
    }
}

#[test]
fn killed_at_random_under_load() {
    const KILLS: usize = 6;
    let redis = Redis::start(&[]);
    let env = [("REDIS_URL", &*redis.url()), ("JWT_SECRET", token::SECRET), ("REENROLL", "allow")];
    let mut service = Setup::new().envs(&env).start();
    service.wait_for_storage("redis");
    let fleet = crate::support::load::Fleet::new(60);
    let history = History::new();
    let done = std::sync::atomic::AtomicBool::new(false);
    let http = service.http;
    thread::scope(|scope| {
        scope.spawn(|| {
            fleet.run(&[http], &history, 100.0, 1, || {
                done.load(std::sync::atomic::Ordering::Relaxed)
            });
        });
        for round in 0..KILLS {
            history.wait_for(30 + round * 7919 % 40);
            service.kill9();
            service.restart();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    service.wait_for_storage("redis");
    fleet.redeem_rest(&[http], &history);
    // A device whose onboarding was answered by nobody may still have its token: 409.
    let rules = crate::support::history::Rules {
        onboard: &["200", "409 TOKEN_ALREADY_ACTIVE"],
        redeem: &["200", "401 TOKEN_ALREADY_USED", "503 SERVICE_UNAVAILABLE"],
        unanswered: true,
    };
    history.judge(&rules, &service.serials());
    assert!(history.events().iter().any(|e| e.op == Op::Redeem && e.status == 200));
}

#[test]
fn killed_redis_under_load() {
    let mut redis = Redis::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let env = [("REDIS_URL", &*redis.url()), ("JWT_SECRET", token::SECRET), ("REENROLL", "allow")];
    let service = Setup::new().envs(&env).start();
    service.wait_for_storage("redis");
    let fleet = crate::support::load::Fleet::new(60);
    let history = History::new();
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            fleet.run(&[service.http], &history, 100.0, 200, || {
                done.load(std::sync::atomic::Ordering::Relaxed)
            });
        });
        for _ in 0..2 {
            history.wait_for(70);
            redis.kill9();
            history.wait_for(70);
            redis.start_again();
            service.wait_for_storage("redis");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    fleet.redeem_rest(&[service.http], &history);
    history.judge(&crate::support::history::Rules::OUTAGE, &service.serials());
}

#[test]
fn a_blackhole_is_an_outage_like_any_other() {
    let stage = Stage::set("300");
    stage.proxy.set(Mode::Blackhole);
    assert_eq!(stage.service.onboard("e").status, 200);
    stage.service.wait_for_storage("memory");
    stage.check_gives_one();
    stage.proxy.set(Mode::Pass);
    stage.service.wait_for_storage("redis");
    stage.check_is_used();
    assert!(stage.redis.exists(&stage.mark()), "the mark was carried over");
}
