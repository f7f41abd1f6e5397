//! A kill reaches every token of a device, also one that nobody who kills it knows of; it survives a
//! restart, an older Redis and both together; and what is issued after it lives (SPEC 3, "Bounds").
//! Rows 22 to 28 of the model (`docs/model`), and more.

use crate::support::check_error;
use crate::support::clock::{FakeClock, now_s};
use crate::support::http::Response;
use crate::support::instance::{
    self, Device, certificate, certificates, mark_key, notice_loss, onboard, redeem,
    refused_as_used, replace, revoke, token, token_key,
};
use crate::support::proxy::{Proxy, Stop};
use crate::support::redis::Redis;
use crate::support::service::Service;
use crate::support::{token as jwt, wait};

/// What kills a device's past.
type Kill = fn(&Service, &Device) -> Response;
const KILLS: [(&str, Kill); 2] = [("replaced", replace), ("revoked", revoke)];

#[track_caller]
fn killed(service: &Service, device: &Device, (how, kill): (&str, Kill)) {
    let answer = kill(service, device);
    assert_eq!(answer.status, 200, "{how}: {}\n{}", answer.text(), service.log());
}

/// A token that the instance issues from memory because a connection was reset, once. It is carried
/// over when the trap is released.
fn from_memory(
    service: &Service,
    proxy: &Proxy,
    device: &Device,
) -> (String, crate::support::proxy::Trap) {
    let greeting = proxy.trap("mqtt-lite:ca", Stop::Before);
    proxy.reset();
    let compact = token(service, device);
    greeting.wait();
    (compact, greeting)
}

/// The other instance's token was never in Redis, or came there after the claim of the first.
fn unknown_to_the_killer(killer_env: &[(&str, &str)], kill: (&str, Kill), carried_before: bool) {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let killer = instance::first(&redis.url(), killer_env);
    let other = instance::another(&killer, &proxy.url(), &[("REDIS_CONNECT_TIMEOUT_MS", "9000")]);
    let d = Device::new("d");
    let known = token(&killer, &d);
    let (unknown, greeting) = from_memory(&other, &proxy, &d);
    if carried_before {
        greeting.release();
        wait::for_true("it is carried over", || redis.exists(&token_key(&unknown)));
        killed(&killer, &d, kill);
    } else {
        killed(&killer, &d, kill);
        greeting.release();
    }
    other.wait_for_storage("redis");
    for compact in [&known, &unknown] {
        refused_as_used(&[&killer, &other], compact, &d);
    }
    assert_eq!(certificates(&[&killer, &other]), 0);
}

#[test]
fn a_token_that_another_instance_issued_from_memory_is_killed() {
    for kill in KILLS {
        for carried_before in [true, false] {
            unknown_to_the_killer(&[], kill, carried_before);
        }
    }
}

#[test]
fn also_by_an_instance_whose_clock_lags_three_seconds() {
    let clock = FakeClock::at(now_s() - 3);
    let env = clock.env();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    for kill in KILLS {
        unknown_to_the_killer(&env, kill, false);
    }
}

/// Nobody may be looking at `/ready`.
#[test]
fn a_clock_that_is_off_is_told_in_the_log() {
    let clock = FakeClock::at(now_s() - 4);
    let env = clock.env();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    let redis = Redis::start(&[]);
    let service = instance::first(&redis.url(), &env);
    wait::for_true("it is told", || service.log().contains("s behind that of Redis"));
}

/// Its bound would reach into next month, and every later token of the device be dated after that, for
/// good. What is not killed is not said to be.
#[test]
fn a_clock_that_is_hours_off_kills_nothing() {
    let clock = FakeClock::at(now_s());
    let env = clock.env();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    let redis = Redis::start(&[]);
    let service = instance::first(&redis.url(), &env);
    let d = Device::new("d");
    let old = token(&service, &d);
    let said = |key: &str| service.http.get("/ready").json()[key].to_string();
    for ahead_s in [30 * 86_400, 7200] {
        clock.set(now_s() + ahead_s);
        wait::for_true("/ready tells of it", || {
            said("reasons").contains("s ahead of that of Redis")
        });
        assert_eq!(service.http.get("/ready").status, 503);
        for (how, kill) in KILLS {
            let answer = kill(&service, &d);
            let code = answer.field("code");
            assert_eq!((answer.status, &*code), (503, "SERVICE_UNAVAILABLE"), "{how}");
        }
    }
    assert!(!redis.keys().iter().any(|key| key.contains("devices:")), "{:?}", redis.keys());
    clock.set(now_s() + 30);
    wait::for_true("a warning is enough", || said("warnings").contains("30 s ahead of"));
    assert_eq!(service.http.get("/ready").status, 200);
    clock.set_right();
    wait::for_true("nothing is to be said", || said("warnings") == "null");
    let new = instance::issued(&service, &replace(&service, &d));
    assert!(jwt::claims_of(&new)["iat"].as_u64().unwrap() < now_s() + 20);
    refused_as_used(&[&service], &old, &d);
    certificate(&service, &new, &d);
}

/// Row 27: the second kill comes in the second of the first, and reaches a token that memory has dated
/// just after that one.
#[test]
fn two_kills_in_one_second_and_a_token_from_memory_between_them() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let killer = instance::first(&redis.url(), &[]);
    let other = instance::another(&killer, &proxy.url(), &[("REDIS_CONNECT_TIMEOUT_MS", "9000")]);
    let d = Device::new("d");
    token(&other, &d);
    killed(&other, &d, KILLS[1]);
    let (between, greeting) = from_memory(&other, &proxy, &d);
    killed(&killer, &d, KILLS[0]);
    greeting.release();
    other.wait_for_storage("redis");
    refused_as_used(&[&killer, &other], &between, &d);
}

#[test]
fn a_token_from_before_a_restart_and_one_from_after_it_are_killed() {
    for kill in KILLS {
        let mut redis = Redis::start(&[]);
        let mut service = instance::first(&redis.url(), &[]);
        let d = Device::new("d");
        let before = token(&service, &d);
        redis.save();
        redis.kill9();
        service.kill9();
        service.restart();
        let after = token(&service, &d);
        redis.start_again();
        service.wait_for_storage("redis");
        wait::for_true("it is carried over", || redis.exists(&token_key(&after)));
        killed(&service, &d, kill);
        for compact in [&before, &after] {
            refused_as_used(&[&service], compact, &d);
        }
    }
}

/// Redis has forgotten the kill, and memory, too.
#[test]
fn a_kill_survives_an_older_redis_and_a_restart() {
    for kill in KILLS {
        let mut redis = Redis::start(&[]);
        let mut one = instance::first(&redis.url(), &[]);
        let two = instance::another(&one, &redis.url(), &[]);
        let d = Device::new("d");
        let compact = token(&one, &d);
        redis.save();
        killed(&one, &d, kill);
        redis.kill9();
        one.kill9();
        notice_loss(&two);
        redis.start_again();
        one.restart();
        one.wait_for_storage("redis");
        two.wait_for_storage("redis");
        refused_as_used(&[&two, &one], &compact, &d);
        assert_eq!(certificates(&[&one, &two]), 0);
    }
}

#[test]
fn a_kill_in_an_outage_survives_a_restart() {
    for kill in KILLS {
        let mut redis = Redis::start(&[]);
        let mut one = instance::first(&redis.url(), &[]);
        let two = instance::another(&one, &redis.url(), &[]);
        let d = Device::new("d");
        let compact = token(&one, &d);
        redis.save();
        redis.kill9();
        notice_loss(&one);
        killed(&one, &d, kill);
        one.kill9();
        one.restart();
        redis.start_again();
        one.wait_for_storage("redis");
        two.health();
        two.wait_for_storage("redis");
        refused_as_used(&[&one, &two], &compact, &d);
    }
}

/// What the clone holds is older than the kill.
#[test]
fn a_kill_reaches_a_clone_of_the_folder() {
    let mut redis = Redis::start(&[]);
    let mut origin = instance::first(&redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&origin, &d);
    assert_eq!(origin.terminate().code, Some(0));
    let clone = instance::setup(&redis.url(), &[]).copy_data(&origin);
    redis.save();
    origin.restart();
    origin.wait_for_storage("redis");
    killed(&origin, &d, KILLS[1]);
    redis.kill9();
    notice_loss(&origin);
    redis.start_again();
    origin.wait_for_storage("redis");
    let clone = clone.start();
    clone.wait_for_storage("redis");
    refused_as_used(&[&clone, &origin], &compact, &d);
}

#[test]
fn a_token_issued_in_the_second_of_a_kill_can_be_redeemed() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let one = instance::first(&proxy.url(), &[]);
    let two = instance::another(&one, &redis.url(), &[]);
    let asked_at = now_s();
    for (name, issuer, redeemer) in [("a", &one, &two), ("b", &two, &one), ("c", &two, &two)] {
        let d = Device::new(name);
        token(&one, &d);
        killed(&one, &d, KILLS[1]);
        let next = token(issuer, &d);
        assert!(jwt::claims_of(&next)["iat"].as_u64().unwrap() > asked_at + 5, "after the bound");
        check_error(&onboard(&one, &d), 409, "TOKEN_ALREADY_ACTIVE", "it is live");
        certificate(redeemer, &next, &d);
    }
    let d = Device::new("replaced");
    token(&one, &d);
    let next = instance::issued(&two, &replace(&two, &d));
    certificate(&one, &next, &d);

    let e = Device::new("in-the-outage");
    token(&one, &e);
    killed(&one, &e, KILLS[1]);
    instance::cut_off(&one, &proxy);
    let next = token(&one, &e);
    instance::reconnect(&one, &proxy);
    certificate(&two, &next, &e);
}

/// Each replacement dates the next token later; a revocation must always be possible.
#[test]
fn replacing_in_a_loop_is_refused() {
    for with_redis in [true, false] {
        let redis = Redis::start(&[]);
        let service = if with_redis {
            instance::first(&redis.url(), &[])
        } else {
            instance::setup("", &[("REDIS_ENABLED", "false")]).start()
        };
        let d = Device::new("d");
        token(&service, &d);
        let refused = (0..30).map(|_| replace(&service, &d)).find(|answer| answer.status != 200);
        let refused = refused.expect("thirty in a loop");
        check_error(&refused, 429, "RATE_LIMITED", "dated over a minute ahead");
        let wait: u64 = refused.header("Retry-After").unwrap().parse().unwrap();
        assert!((1..=60).contains(&wait), "{wait}");
        killed(&service, &d, KILLS[1]);
        let next = token(&service, &d);
        assert!(jwt::claims_of(&next)["iat"].as_u64().unwrap() < now_s() + 90);
        certificate(&service, &next, &d);
    }
}

/// The mark names a serial and is young.
#[test]
fn a_token_that_is_being_redeemed_is_not_replaced() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let one = instance::first(&redis.url(), &[]);
    let two = instance::another(&one, &proxy.url(), &[("REDIS_TIMEOUT_MS", "5000")]);
    let d = Device::new("d");
    let compact = token(&one, &d);
    let marked = proxy.trap(&jwt::mark_of(&compact), Stop::After);
    std::thread::scope(|scope| {
        let attempt = scope.spawn(|| redeem(&two, &compact, &d));
        marked.wait();
        check_error(&replace(&one, &d), 409, "TOKEN_ALREADY_ACTIVE", "under way");
        marked.release();
        assert_eq!(attempt.join().unwrap().status, 200);
    });
    let mark = redis.cli(&["GET", &mark_key(&compact)]);
    assert!(mark.starts_with(&instance::mark(&two, "")) && !mark.contains("killed"), "{mark}");
}

/// Whoever can write to Redis can neither kill nor revive.
#[test]
fn a_row_that_nobody_of_us_has_sealed_counts_as_absent() {
    let redis = Redis::start(&[]);
    let one = instance::first(&redis.url(), &[]);
    let two = instance::another(&one, &redis.url(), &[]);
    let (d, e) = (Device::new("d"), Device::new("e"));
    let row_of = |device: &Device| {
        let digest = jwt::sha256_hex(device.name.as_bytes());
        (format!("mqtt-lite:devices:{}", &digest[..2]), device.name.clone())
    };
    token(&one, &d);
    killed(&one, &d, KILLS[1]);
    let ((key, field), (others_key, other)) = (row_of(&e), row_of(&d));
    assert_eq!(redis.cli(&["HEXISTS", &others_key, &other]), "1", "{:?}", redis.keys());
    let copy = "return redis.call('HSET',KEYS[1],ARGV[1],redis.call('HGET',KEYS[2],ARGV[2]))";
    for planted in ["the other's", "", "x", &"\u{1}".repeat(40)] {
        if planted == "the other's" {
            redis.cli(&["EVAL", copy, "2", &key, &others_key, &field, &other]);
        } else {
            redis.cli(&["HSET", &key, &field, planted]);
        }
        let compact = token(&two, &e);
        let iat = jwt::claims_of(&compact)["iat"].as_u64().unwrap();
        assert!(iat <= now_s(), "nothing is known of it: {planted:?}");
        certificate(&one, &compact, &e);
    }
    wait::for_true("the last is cleaned up", || !redis.exists(&instance::claim_key(&e)));
    killed(&two, &e, KILLS[0]);
    assert_eq!(revoke(&two, &e).status, 200, "over what was planted");
    let next = token(&one, &e);
    assert!(jwt::claims_of(&next)["iat"].as_u64().unwrap() > now_s() + 3, "the row is ours again");
    certificate(&two, &next, &e);
}

/// A user of Redis who may touch the older keys only.
#[test]
fn rows_that_may_not_be_read_are_left_out() {
    let keys = ["token", "device", "used", "live", "ca"].map(|kind| format!("~mqtt-lite:{kind}*"));
    let rules =
        format!("{} +@all", keys.join(" ").replace("~mqtt-lite:device*", "~mqtt-lite:device:*"));
    let redis = Redis::with_acl("old", "secret", &rules);
    let url = format!("redis://old:secret@127.0.0.1:{}", redis.port());
    let one = instance::first(&url, &[]);
    let two = instance::another(&one, &url, &[]);
    for kill in KILLS {
        let d = Device::new(kill.0);
        let compact = token(&one, &d);
        killed(&two, &d, kill);
        refused_as_used(&[&one, &two], &compact, &d);
    }
    let e = Device::new("e");
    certificate(&two, &token(&one, &e), &e);
    for service in [&one, &two] {
        let log = service.log();
        assert!(!log.contains("Redis is lost") && !log.contains("connection lost"), "{log}");
    }
}

#[test]
fn a_kill_that_is_not_on_disk_is_not_answered() {
    let redis = Redis::start(&[]);
    for url in [redis.url(), String::new()] {
        let service = if url.is_empty() {
            instance::setup("", &[("REDIS_ENABLED", "false")]).start()
        } else {
            instance::first(&url, &[])
        };
        let d = Device::new("d");
        let compact = token(&service, &d);
        std::fs::rename(service.data("devices.txt"), service.data("devices.away")).unwrap();
        for (how, kill) in KILLS {
            check_error(&kill(&service, &d), 503, "SERVICE_UNAVAILABLE", how);
        }
        std::fs::rename(service.data("devices.away"), service.data("devices.txt")).unwrap();
        certificate(&service, &compact, &d);
    }
}

/// Flash wears: a kill writes one line, a token none.
#[test]
fn a_kill_writes_one_line() {
    let redis = Redis::start(&[]);
    let service = instance::first(&redis.url(), &[]);
    let lines = || service.read("devices.txt").lines().count();
    let empty = lines();
    let (d, e) = (Device::new("d"), Device::new("e"));
    certificate(&service, &token(&service, &e), &e);
    token(&service, &d);
    assert_eq!(lines(), empty);
    for (n, kill) in KILLS.into_iter().enumerate() {
        killed(&service, &d, kill);
        assert_eq!(lines(), empty + n + 1, "{}", service.read("devices.txt"));
    }
}

/// What it has read of the kill is the row in the trip of a redemption; what instances share it may not
/// read.
#[test]
fn what_is_issued_without_redis_is_later_than_a_kill_that_was_read_of() {
    let redis = Redis::with_acl("device", "a-password", "~mqtt-lite:* +@all -xread");
    let proxy = Proxy::start(redis.port());
    let killer = instance::first(&redis.url(), &[]);
    let url = format!("redis://device:a-password@127.0.0.1:{}", proxy.port());
    let other = instance::another(&killer, &url, &[]);
    let d = Device::new("d");
    let compact = token(&other, &d);
    killed(&killer, &d, KILLS[1]);
    check_error(&redeem(&other, &compact, &d), 401, "TOKEN_ALREADY_USED", "it is killed");
    instance::cut_off(&other, &proxy);
    let issued = token(&other, &d);
    instance::reconnect(&other, &proxy);
    certificate(&other, &issued, &d);
}
