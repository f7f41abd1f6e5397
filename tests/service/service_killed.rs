//! The service is killed at any moment under load (SIGKILL, 50 times) while Redis stays up: nothing
//! that was answered is lost, burnt or redeemable twice, and every next start is clean.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::support::history::{History, Op, Rules};
use crate::support::load::{Fleet, replay_all};
use crate::support::random::Xorshift;
use crate::support::redis::Redis;
use crate::support::service::Service;
use crate::support::token;

const KILLS: u64 = 50;

#[test]
fn killed_fifty_times() {
    let redis = Redis::start(&[]);
    let mut service = Service::start(&[
        ("REDIS_URL", &redis.url()),
        ("REENROLL", "allow"),
        ("PROVISIONING_TOKEN_TTL", "600"),
        ("JWT_SECRET", "a-secret-of-at-least-thirty-two-bytes"),
    ]);
    let (fleet, history, stop) = (Fleet::new(400), History::new(), AtomicBool::new(false));
    let servers = [service.http];
    thread::scope(|scope| {
        scope.spawn(|| {
            fleet.run(&servers, &history, 400.0, 12, || stop.load(Ordering::Relaxed));
        });
        let mut random = Xorshift(0x9e37_79b9_7f4a_7c15);
        for _ in 0..KILLS {
            history.wait_for(8 + random.below(72));
            service.kill9();
            service.restart();
        }
        stop.store(true, Ordering::Relaxed);
    });
    service.wait_for_storage("redis");
    fleet.redeem_rest(&servers, &history);
    replay_all(&servers, &history, &fleet);
    let rules = Rules { unanswered: true, ..Rules::OUTAGE };
    history.judge(&rules, &service.serials());
    check_records(&service, &history);
    let log = service.log();
    assert!(!log.contains("ERROR"), "a start was not clean:\n{log}");
}

/// Each token that was answered has exactly one certificate in the record, whether or not the answer
/// with it arrived.
#[track_caller]
fn check_records(service: &Service, history: &History) {
    let mut redeemed: HashMap<String, usize> = HashMap::new();
    for row in service.index() {
        let pem = fs::read_to_string(service.data(&format!("ca/certs/{}.pem", row[3]))).unwrap();
        let line = pem.lines().find_map(|l| l.strip_prefix("Provisioning-Token: ")).unwrap();
        *redeemed.entry(line[..64].to_owned()).or_default() += 1;
    }
    for event in history.events().iter().filter(|e| e.op == Op::Onboard && e.status == 200) {
        let hash = token::sha256_hex(event.token.as_bytes());
        assert_eq!(redeemed.get(&hash), Some(&1), "token {hash} of {}", event.device);
    }
    assert!(redeemed.values().all(|times| *times == 1), "a token has two certificates");
}
