//! Two instances, one of them cut off from Redis while the other serves: what each may promise (SPEC
//! 4). Redis guarantees single use among those that reach it. One that is cut off redeems only what
//! it issued itself; with `OUTAGE_REDEEM=none` only what it issued since.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::check_error;
use crate::support::history::{History, Op};
use crate::support::http::Client;
use crate::support::instance::{
    self, Device, certificate, certificates, cut_off, issued, mark, mark_key, notice_loss, onboard,
    reconnect, redeem, refused_as_used, replace, revoke, token, token_key,
};
use crate::support::load;
use crate::support::proxy::{Mode, Proxy, Stop, Way};
use crate::support::redis::Redis;
use crate::support::service::Service;

/// `lonely` can be cut off by the proxy; `other` always reaches Redis.
struct Pair {
    redis: Redis,
    proxy: Proxy,
    lonely: Service,
    other: Service,
}

fn pair(outage_redeem: &str) -> Pair {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let env = [("OUTAGE_REDEEM", outage_redeem)];
    let lonely = instance::first(&proxy.url(), &env);
    let other = instance::another(&lonely, &redis.url(), &env);
    Pair { redis, proxy, lonely, other }
}

impl Pair {
    fn both(&self) -> [&Service; 2] {
        [&self.lonely, &self.other]
    }

    fn cut_off(&self) {
        cut_off(&self.lonely, &self.proxy);
    }

    fn reconnect(&self) {
        reconnect(&self.lonely, &self.proxy);
    }
}

#[test]
fn own_redeems_what_it_issued_and_nothing_else() {
    let pair = pair("own");
    let Pair { redis, lonely, other, .. } = &pair;
    let [d, e, f] = ["d", "e", "f"].map(Device::new);
    let (own, foreign) = (token(lonely, &d), token(other, &e));
    pair.cut_off();
    let since = token(lonely, &f);
    let answer = redeem(lonely, &foreign, &e);
    check_error(&answer, 503, "SERVICE_UNAVAILABLE", "only Redis knows it: never a guess");
    let serial = redeem(lonely, &own, &d).field("serial_number");
    assert_eq!(serial.len(), 32, "it redeems its own\n{}", lonely.log());
    check_error(&redeem(lonely, &own, &d), 401, "TOKEN_ALREADY_USED", "once");
    let answer = redeem(other, &since, &f);
    check_error(&answer, 401, "TOKEN_NOT_FOUND", "it has not got through yet");
    certificate(other, &foreign, &e);
    pair.reconnect();
    assert_eq!(redis.cli(&["GET", &mark_key(&own)]), mark(lonely, &serial));
    certificate(other, &since, &f);
    for (compact, device) in [(&own, &d), (&foreign, &e), (&since, &f)] {
        refused_as_used(&pair.both(), compact, device);
    }
    assert_eq!(certificates(&pair.both()), 3);
    assert!(!lonely.log().contains("twice"), "{}", lonely.log());
}

/// What the other has redeemed is carried over by its issuer, who knows nothing of it, and neither
/// counts nor keeps the device waiting.
#[test]
fn what_the_other_redeemed_leaves_no_phantom() {
    let Pair { proxy, lonely, other, .. } = &pair("own");
    let d = Device::new("d");
    let compact = token(lonely, &d);
    cut_off(lonely, proxy);
    certificate(other, &compact, &d);
    reconnect(lonely, proxy);
    for service in [lonely, other] {
        assert_eq!(service.token_count(), 0);
        refused_as_used(&[service], &compact, &d);
    }
    token(other, &d);
}

/// The price of `own`: once by each, no more.
#[test]
fn own_may_redeem_a_token_that_the_other_redeemed() {
    for lonely_is_first in [true, false] {
        let pair = pair("own");
        let Pair { lonely, other, .. } = &pair;
        let d = Device::new("d");
        let compact = token(lonely, &d);
        pair.cut_off();
        let mut order = [lonely, other];
        if !lonely_is_first {
            order.reverse();
        }
        for service in order {
            certificate(service, &compact, &d);
        }
        refused_as_used(&[lonely, other], &compact, &d);
        pair.reconnect();
        refused_as_used(&[lonely, other], &compact, &d);
        assert_eq!(certificates(&[lonely, other]), 2);
    }
}

/// What became of an issue when its reply is lost, or Redis refuses it, nobody knows. What is answered
/// with 200 then is another token, which can be redeemed also where none is that Redis may have.
#[test]
fn an_issue_that_was_cut_off_burns_nothing() {
    let faults = [
        ("lost before Redis", Some(Stop::Before)),
        ("late", Some(Stop::Before)),
        ("reply lost", Some(Stop::After)),
        ("refused", None),
    ];
    for policy in ["none", "own"] {
        for (fault, stop) in faults {
            for replaces in [false, true] {
                cut_off_issue(policy, fault, stop, replaces);
            }
        }
    }
}

fn cut_off_issue(policy: &str, fault: &str, stop: Option<Stop>, replaces: bool) {
    let what = format!("{policy}, {fault}, replaces: {replaces}");
    let Pair { redis, proxy, lonely, other } = &pair(policy);
    let d = Device::new("d");
    let old = replaces.then(|| token(lonely, &d));
    let trap = stop.map(|stop| proxy.trap("mqtt-lite:token:", stop));
    if trap.is_none() {
        redis.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    }
    let answer = thread::scope(|scope| {
        scope.spawn(|| {
            if let Some(trap) = trap.as_ref().filter(|_| fault != "late") {
                trap.wait();
                proxy.set(Mode::Refuse);
                trap.throw_away();
            }
        });
        if replaces { replace(lonely, &d) } else { onboard(lonely, &d) }
    });
    let compact = issued(lonely, &answer);
    if fault == "late" {
        lonely.wait_for_storage("redis");
        drop(trap);
    } else {
        notice_loss(lonely);
        assert!(!redis.exists(&token_key(&compact)), "{what}: it was never sent");
        redis.cli(&["CONFIG", "SET", "maxmemory", "0"]);
        reconnect(lonely, proxy);
    }
    check_error(&onboard(other, &d), 409, "TOKEN_ALREADY_ACTIVE", &what);
    if let Some(old) = old {
        refused_as_used(&[lonely, other], &old, &d);
    }
    certificate(other, &compact, &d);
    assert_eq!(certificates(&[lonely, other]), 1, "{what}");
}

/// Memory is full of copies when Redis goes. They give way to what has no other place.
#[test]
fn a_memory_full_of_copies_takes_new_tokens() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let service = instance::first(&proxy.url(), &[("MEMORY_MAX_TOKENS", "20")]);
    let devices: Vec<Device> = (0..24).map(|n| Device::new(&format!("d{n}"))).collect();
    let before: Vec<String> = devices.iter().map(|device| token(&service, device)).collect();
    cut_off(&service, &proxy);
    assert_eq!(service.http.get("/ready").status, 200, "there is room");
    let late = |n| Device { name: format!("late-{n}"), csr: String::new() };
    let since: Vec<String> = (0..15).map(|n| token(&service, &late(n))).collect();
    check_error(
        &onboard(&service, &late(15)),
        429,
        "RATE_LIMITED",
        "three quarters are one's share",
    );
    // The last four were never copied, and some copies gave way.
    let gave_way = |at: &usize| redeem(&service, &before[*at], &devices[*at]).status == 503;
    let gone = (0..20).find(gave_way).expect("a copy that gave way");
    reconnect(&service, &proxy);
    certificate(&service, &before[gone], &devices[gone]);
    let lives = |compact: &String| redis.exists(&token_key(compact));
    assert!(since.iter().all(lives) && before.iter().skip(gone + 1).all(lives), "none is lost");
}

#[test]
fn own_may_redeem_a_token_that_the_other_killed_until_it_is_back() {
    for until in ["its return", "its redemption"] {
        let pair = pair("own");
        let Pair { redis, lonely, other, .. } = &pair;
        let (d, e) = (Device::new("d"), Device::new("e"));
        let (replaced, revoked) = (token(lonely, &d), token(lonely, &e));
        pair.cut_off();
        let new = issued(other, &replace(other, &d));
        assert_eq!(revoke(other, &e).status, 200);
        if until == "its redemption" {
            certificate(lonely, &replaced, &d);
            certificate(lonely, &revoked, &e);
        }
        pair.reconnect();
        for (compact, device) in [(&replaced, &d), (&revoked, &e)] {
            assert!(redis.exists(&mark_key(compact)), "until {until}");
            refused_as_used(&pair.both(), compact, device);
        }
        certificate(lonely, &new, &d);
    }
}

/// What `none` promises: single use, whatever is cut off from what.
#[test]
fn none_redeems_only_what_never_left() {
    let pair = pair("none");
    let Pair { redis, proxy, lonely, other } = &pair;
    let [d, e, f, g] = ["d", "e", "f", "g"].map(Device::new);
    let (own, killed) = (token(lonely, &d), token(lonely, &e));
    let issuing = proxy.trap(&instance::claim_key(&f), Stop::Before);
    let maybe = token(lonely, &f); // no answer came, so memory answered: it may have got through
    issuing.throw_away();
    lonely.wait_for_storage("redis");
    pair.cut_off();
    let since = token(lonely, &g);
    for (compact, device) in [(&own, &d), (&killed, &e), (&maybe, &f)] {
        let answer = redeem(lonely, compact, device);
        check_error(&answer, 503, "SERVICE_UNAVAILABLE", &device.name);
    }
    assert_eq!(redeem(lonely, &since, &g).status, 200, "nobody else can know it");
    certificate(other, &own, &d);
    assert_eq!(revoke(other, &e).status, 200);
    pair.reconnect();
    assert!(!redis.exists(&token_key(&own)) && !redis.exists(&token_key(&killed)));
    for (compact, device) in [(&own, &d), (&killed, &e), (&since, &g)] {
        refused_as_used(&pair.both(), compact, device);
    }
    assert_eq!(certificates(&pair.both()), 2);
    assert!(!lonely.log().contains("twice"), "{}", lonely.log());
}

/// A device never has to wait for an instance that is cut off: each serves alone.
#[test]
fn both_onboard_the_same_device() {
    for policy in ["own", "none"] {
        let pair = pair(policy);
        let Pair { redis, lonely, other, .. } = &pair;
        let d = Device::new("d");
        pair.cut_off();
        let (here, there) = (token(lonely, &d), token(other, &d));
        check_error(&onboard(lonely, &d), 409, "TOKEN_ALREADY_ACTIVE", "here");
        check_error(&onboard(other, &d), 409, "TOKEN_ALREADY_ACTIVE", "there");
        pair.reconnect();
        // A carry-over never rolls back: both are redeemable, once, and the claim stays.
        assert_eq!(redis.cli(&["GET", &instance::claim_key(&d)]), there);
        assert!(redis.exists(&token_key(&here)));
        certificate(other, &here, &d);
        certificate(lonely, &there, &d);
        for compact in [&here, &there] {
            refused_as_used(&pair.both(), compact, &d);
        }
        assert_eq!(certificates(&pair.both()), 2);
    }
}

/// Every token is presented at both instances at once, while the network does its worst to each of
/// them and Redis is restarted, with its data and without: `none` holds all the same.
#[test]
fn none_grants_nothing_twice_whatever_breaks() {
    let mut redis = Redis::start(&[]);
    let proxies = [Proxy::start(redis.port()), Proxy::start(redis.port())];
    let env = [("OUTAGE_REDEEM", "none"), ("REDIS_TIMEOUT_MS", "200")];
    let one = instance::first(&proxies[0].url(), &env);
    let two = instance::another(&one, &proxies[1].url(), &env);
    let (servers, history, stop) = ([one.http, two.http], History::new(), AtomicBool::new(false));
    thread::scope(|scope| {
        for n in 0..4 {
            let (servers, history, stop) = (&servers, &history, &stop);
            scope.spawn(move || {
                let devices: Vec<Device> =
                    (0..8).map(|k| Device::new(&format!("d-{n}-{k}"))).collect();
                for turn in (0..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    redeem_at_both(servers, history, &devices[turn % 8], turn + n);
                }
            });
        }
        for turn in 0..14 {
            break_something(&proxies[turn % 2], &mut redis, turn);
            history.wait_for(20);
            proxies[turn % 2].set(Mode::Pass);
            history.wait_for(20);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let granted: Vec<String> = history
        .events()
        .into_iter()
        .filter(|event| event.op == Op::Redeem && event.status == 200)
        .map(|event| event.token)
        .collect();
    let distinct: HashSet<&String> = granted.iter().collect();
    println!(
        "{} of {} tokens redeemed",
        distinct.len(),
        history.outstanding().len() + granted.len()
    );
    assert_eq!(distinct.len(), granted.len(), "redeemed twice\n{}\n{}", one.log(), two.log());
    assert_eq!(certificates(&[&one, &two]), granted.len());
    assert!(granted.len() > 50, "there was work");
}

fn redeem_at_both(servers: &[Client; 2], history: &History, device: &Device, turn: usize) {
    let issued = history.observe(Op::Onboard, &device.name, "", || {
        instance::try_replace(&servers[turn % 2], device)
    });
    thread::scope(|scope| {
        for server in servers.iter().filter(|_| issued.status == 200) {
            scope.spawn(|| {
                let present = || {
                    let sign = || load::sign(server, &issued.token, &device.csr);
                    let event = history.observe(Op::Redeem, &device.name, &issued.token, sign);
                    thread::sleep(Duration::from_millis(if event.status == 503 { 50 } else { 0 }));
                    event.status == 503
                };
                let _tries = (0..5).take_while(|_| present()).count();
            });
        }
    });
}

fn break_something(proxy: &Proxy, redis: &mut Redis, turn: usize) {
    match (turn / 2) % 7 {
        0 => proxy.set(Mode::SwallowReplies),
        1 => proxy.set(Mode::HoldCommands),
        2 => redis.restart(true),
        3 => proxy.cut_after(Way::ToService, 1000 + turn * 77),
        4 => proxy.set(Mode::Refuse),
        5 => redis.restart(false),
        _ => proxy.reset(),
    }
}
