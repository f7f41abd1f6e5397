//! Redis comes back with other data than it had: empty, older, or so quickly that nobody noticed.
//! What is live is carried over, what was used or killed stays dead, and the counts are right (SPEC
//! 3 and 4).

use std::thread;
use std::time::{Duration, Instant};

use crate::support::check_error;
use crate::support::clock::now_s;
use crate::support::instance::{
    self, Device, certificate, certificates, mark_key, onboard, redeem, refused_as_used, token,
};
use crate::support::proxy::{Mode, Proxy, Stop};
use crate::support::redis::Redis;
use crate::support::service::Service;
use crate::support::{token as jwt, wait};

/// What stands before Redis goes: a token of each fate, of devices with these names.
struct Before {
    live: (Device, String),
    used: (Device, String),
    replaced: (Device, String),
    revoked: (Device, String),
    /// The serial of the certificate of `used`.
    serial: String,
}

impl Before {
    /// Everything that can become of a token has become of one; `snapshot` is made while all four
    /// were live.
    fn make(service: &Service, snapshot: impl FnOnce()) -> Before {
        let issue = |name| {
            let device = Device::new(name);
            let compact = token(service, &device);
            (device, compact)
        };
        let (live, used) = (issue("live"), issue("used"));
        let (replaced, revoked) = (issue("replaced"), issue("revoked"));
        snapshot();
        let serial = certificate(service, &used.1, &used.0);
        instance::issued(service, &instance::replace(service, &replaced.0));
        assert_eq!(instance::revoke(service, &revoked.0).status, 200);
        Before { live, used, replaced, revoked, serial }
    }

    /// Once `service` is back: live are the token `live` and the one in place of `replaced`, and
    /// nothing that was used or killed is redeemed by it or by `others`.
    #[track_caller]
    fn check_after(&self, redis: &Redis, service: &Service, others: &[&Service]) {
        wait_for_count(service, 2);
        let all = [&[service], others].concat();
        for (device, compact) in [&self.used, &self.replaced, &self.revoked] {
            refused_as_used(&all, compact, device);
        }
        let mark_of_used = redis.cli(&["GET", &mark_key(&self.used.1)]);
        assert_eq!(mark_of_used, instance::mark(service, &self.serial));
        let (device, compact) = &self.live;
        check_error(&onboard(service, device), 409, "TOKEN_ALREADY_ACTIVE", "it is live");
        certificate(all.last().unwrap(), compact, device);
        refused_as_used(&all, compact, device);
        assert_eq!(certificates(&all), 2);
    }
}

/// How Redis goes and comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Return {
    /// Emptied, and then started again.
    Flushed,
    /// Without persistence.
    Empty,
    /// From a snapshot that was taken before the redemptions.
    Older,
}

/// `noticed`: the outage lasts until both instances have turned to memory.
fn after(how: Return, noticed: bool) {
    let mut redis = Redis::start(&[]);
    let one = instance::first(&redis.url(), &[]);
    let two = instance::another(&one, &redis.url(), &[]);
    let before = Before::make(&one, || {
        if how == Return::Older {
            redis.save();
        }
    });
    wait_for_clean_up(&redis, &before.used.1);
    if how == Return::Flushed {
        redis.cli(&["FLUSHALL"]);
    }
    redis.kill9();
    if noticed {
        for service in [&one, &two] {
            instance::notice_loss(service);
        }
    }
    redis.start_again();
    let _notices_the_loss = (one.health(), two.health());
    for service in [&one, &two] {
        service.wait_for_storage("redis");
    }
    before.check_after(&redis, &one, &[&two]);
    let warned = one.log().matches("Redis is lost").count();
    assert_eq!(warned, usize::from(noticed), "{}", one.log());
}

#[test]
fn flushed_and_restarted() {
    after(Return::Flushed, true);
}

#[test]
fn restarted_without_persistence() {
    after(Return::Empty, true);
}

#[test]
fn restarted_from_an_older_snapshot() {
    after(Return::Older, true);
}

#[test]
fn restarted_between_two_requests_empty() {
    after(Return::Empty, false);
}

#[test]
fn restarted_between_two_requests_from_an_older_snapshot() {
    after(Return::Older, false);
}

/// The request that finds the connection gone is itself a redemption, and nobody is told.
#[test]
fn restarted_between_two_redemptions() {
    for keep in [true, false] {
        let mut redis = Redis::start(&[]);
        let service = instance::first(&redis.url(), &[]);
        let (d, e) = (Device::new("d"), Device::new("e"));
        let (of_d, of_e) = (token(&service, &d), token(&service, &e));
        certificate(&service, &of_d, &d);
        wait_for_clean_up(&redis, &of_d);
        redis.restart(keep);
        refused_as_used(&[&service], &of_d, &d);
        certificate(&service, &of_e, &e);
        refused_as_used(&[&service], &of_e, &e);
        wait_for_count(&service, 0);
        assert!(!service.log().contains("Redis is lost"), "{}", service.log());
    }
}

/// Nothing but the record on disk knows of the redemption in the outage.
#[test]
fn the_service_is_restarted_in_the_outage() {
    for returns in [Return::Older, Return::Empty] {
        let mut redis = Redis::start(&[]);
        let mut one = instance::first(&redis.url(), &[]);
        let two = instance::another(&one, &redis.url(), &[]);
        let (d, e, f) = (Device::new("d"), Device::new("e"), Device::new("f"));
        let (of_d, of_e, of_f) = (token(&one, &d), token(&one, &e), token(&two, &f));
        redis.save();
        certificate(&one, &of_d, &d);
        redis.kill9();
        for service in [&one, &two] {
            instance::notice_loss(service);
        }
        certificate(&one, &of_e, &e);
        assert_eq!(one.terminate().code, Some(0));
        one.restart();
        if returns == Return::Empty {
            redis.forget();
        }
        redis.start_again();
        one.wait_for_storage("redis");
        two.wait_for_storage("redis");
        wait_for_count(&one, 1);
        for (compact, device) in [(&of_d, &d), (&of_e, &e)] {
            refused_as_used(&[&one, &two], compact, device);
        }
        certificate(&one, &of_f, &f);
        assert_eq!(certificates(&[&one, &two]), 3);
    }
}

/// A person or another program has deleted a token, as the older service's way to revoke one was.
#[test]
fn deleted_is_gone() {
    let mut redis = Redis::start(&[]);
    let issuer = instance::first(&redis.url(), &[]);
    let other = instance::another(&issuer, &redis.url(), &[]);
    let (d, e) = (Device::new("d"), Device::new("e"));
    let (of_d, of_e) = (token(&issuer, &d), token(&issuer, &e));
    redis.save();
    redis.cli(&["DEL", &instance::token_key(&of_d)]);
    redis.cli(&["DEL", &instance::claim_key(&d)]);
    let gone = |service: &Service, what| {
        let answer = redeem(service, &of_d, &d);
        check_error(&answer, 401, "TOKEN_NOT_FOUND", what);
    };
    gone(&issuer, "it was there, and nobody but us has used it");
    gone(&issuer, "asked again");
    gone(&other, "it never knew the token");
    wait_for_count(&issuer, 1);
    let log = issuer.log();
    assert!(!log.contains("connection lost"), "Redis serves on:\n{log}");
    assert!(log.contains("was deleted from Redis"), "{log}");
    assert!(!log.contains(&of_d), "{log}");
    certificate(&issuer, &of_e, &e);
    let next = token(&issuer, &d);

    // Redis comes back with data in which it is not deleted yet.
    redis.kill9();
    for service in [&issuer, &other] {
        instance::notice_loss(service);
    }
    redis.start_again();
    issuer.wait_for_storage("redis");
    other.wait_for_storage("redis");
    assert!(!redis.exists(&instance::token_key(&of_d)), "it is not carried over");
    gone(&issuer, "after the return");
    let answer = redeem(&other, &of_d, &d);
    check_error(&answer, 401, "TOKEN_ALREADY_USED", "the other has read that it was killed");
    certificate(&other, &next, &d);
    assert_eq!(certificates(&[&issuer, &other]), 2);
}

/// Tokens that were carried over are confirmed by that; what was deleted while this instance could
/// not see it may as well have been lost.
#[test]
fn deleted_is_gone_also_after_an_outage_but_not_in_it() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let service = instance::first(&proxy.url(), &[]);
    let (d, e) = (Device::new("d"), Device::new("e"));
    let (of_d, of_e) = (token(&service, &d), token(&service, &e));
    instance::cut_off(&service, &proxy);
    redis.cli(&["DEL", &instance::token_key(&of_d)]);
    instance::reconnect(&service, &proxy);
    certificate(&service, &of_d, &d);
    redis.cli(&["DEL", &instance::token_key(&of_e)]);
    check_error(&redeem(&service, &of_e, &e), 401, "TOKEN_NOT_FOUND", "deleted after the return");
}

/// `FLUSHALL` deletes, too.
#[test]
fn flushed_while_serving() {
    let redis = Redis::start(&[]);
    let one = instance::first(&redis.url(), &[]);
    let two = instance::another(&one, &redis.url(), &[]);
    let before = Before::make(&one, || ());
    redis.cli(&["FLUSHALL"]);
    let (device, compact) = &before.live;
    for service in [&one, &two] {
        check_error(&redeem(service, compact, device), 401, "TOKEN_NOT_FOUND", "flushed");
    }
    let (device, compact) = &before.used;
    refused_as_used(&[&one], compact, device);
    let fresh = token(&one, device);
    certificate(&two, &fresh, device);
    assert_eq!(certificates(&[&one, &two]), 2);
}

/// A Redis that evicts, at the start or by a setting that was changed while it serves.
fn evicting(redis: &Redis) {
    redis.cli(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
}

/// What such a Redis no longer has may have been evicted: it is carried over again. The first
/// redemption shows it.
#[test]
fn evicted_is_not_gone() {
    let redis = Redis::start(&[]);
    let one = instance::first(&redis.url(), &[]);
    let two = instance::another(&one, &redis.url(), &[]);
    evicting(&redis);
    let before = Before::make(&one, || ());
    let e = Device::new("e");
    let of_e = token(&one, &e);
    redis.cli(&["FLUSHALL"]);
    certificate(&one, &of_e, &e);
    refused_as_used(&[&one, &two], &of_e, &e);
    wait_for_count(&one, 2);
    for (device, compact) in [&before.used, &before.replaced, &before.revoked] {
        refused_as_used(&[&one, &two], compact, device);
    }
    let (device, compact) = &before.live;
    certificate(&two, compact, device);
    assert_eq!(certificates(&[&one, &two]), 3);
}

/// The first redemption shows that Redis has lost its data; the second was under way already.
#[test]
fn two_redemptions_meet_a_redis_that_has_evicted_their_tokens() {
    let redis = Redis::start(&[]);
    evicting(&redis);
    let proxy = Proxy::start(redis.port());
    let service = instance::first(&proxy.url(), &[("REDIS_TIMEOUT_MS", "3000")]);
    let (d, e) = (Device::new("d"), Device::new("e"));
    let (of_d, of_e) = (token(&service, &d), token(&service, &e));
    redis.cli(&["FLUSHALL"]);
    let held = proxy.trap(&jwt::mark_of(&of_d), Stop::After);
    thread::scope(|scope| {
        let first = scope.spawn(|| redeem(&service, &of_d, &d));
        held.wait();
        // The redemption asks what kind of Redis this is, too: the greeting is what names the CA.
        let greeting = proxy.trap("mqtt-lite:ca", Stop::Before);
        check_error(&redeem(&service, &of_e, &e), 503, "SERVICE_UNAVAILABLE", "the loss is seen");
        greeting.wait();
        held.release();
        let answer = first.join().unwrap();
        check_error(&answer, 503, "SERVICE_UNAVAILABLE", "it is live, and carried over now");
        greeting.release();
    });
    certificate(&service, &of_d, &d);
    certificate(&service, &of_e, &e);
}

/// While an attempt runs, its token is not carried over; when the attempt comes to nothing, it is.
#[test]
fn the_token_of_an_attempt_that_was_under_way_is_carried_over_too() {
    let mut redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let service = instance::first(&proxy.url(), &[("REDIS_TIMEOUT_MS", "5000")]);
    let d = Device::new("d");
    let compact = token(&service, &d);
    let held = proxy.trap(&jwt::mark_of(&compact), Stop::After);
    thread::scope(|scope| {
        let attempt = scope.spawn(|| redeem(&service, &compact, &d));
        held.wait();
        redis.restart(false);
        let _notices_the_loss = service.health();
        service.wait_for_storage("redis");
        held.throw_away();
        check_error(&attempt.join().unwrap(), 503, "SERVICE_UNAVAILABLE", "no answer came");
    });
    wait_for_count(&service, 1);
    certificate(&service, &compact, &d);
}

/// Between the first connection and the second Redis starts again, empty.
#[test]
fn restarted_while_the_service_connects() {
    let mut redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let service = instance::first(&proxy.url(), &[("REDIS_CONNECT_TIMEOUT_MS", "5000")]);
    let d = Device::new("d");
    let compact = token(&service, &d);
    let greeted = proxy.trap("INFO", Stop::After);
    proxy.reset();
    let _notices_the_loss = service.health();
    greeted.wait();
    redis.restart(false);
    greeted.release();
    wait_for_count(&service, 1);
    certificate(&service, &compact, &d);
}

/// Nobody asks, and Redis is started again with data in which a token is not used yet: the supervisor
/// notices by itself.
#[test]
fn an_idle_instance_notices_a_restart() {
    let mut redis = Redis::start(&[]);
    let service = instance::first(&redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&service, &d);
    redis.save();
    let serial = certificate(&service, &compact, &d);
    wait_for_clean_up(&redis, &compact);
    redis.kill9();
    redis.start_again();
    wait::for_true("the mark is back", || {
        redis.cli(&["GET", &mark_key(&compact)]) == instance::mark(&service, &serial)
    });
    wait::for_true("and the token is gone", || !redis.exists(&instance::token_key(&compact)));
}

/// A line so slow that what is to be carried does not get through in one go.
#[test]
fn a_slow_line_is_used_in_small_pieces() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let service = instance::first(&proxy.url(), &[("REDIS_TIMEOUT_MS", "500")]);
    instance::cut_off(&service, &proxy);
    issue_many(&service, 150);
    proxy.set(Mode::Slow(100_000));
    let back = wait::until(Duration::from_secs(20), || {
        (service.health()["storage"] == "redis").then_some(())
    });
    assert!(back.is_some(), "it never comes back:\n{}", service.log());
    proxy.set(Mode::Pass);
    wait_for_count(&service, 150);
}

/// While much is being carried over into a server that is not the same any more, what was issued
/// here is redeemed, once.
#[test]
fn a_long_return_does_not_keep_own_tokens_from_being_redeemed() {
    let (before, after) = (Redis::start(&[]), Redis::start(&[]));
    let proxy = Proxy::start(before.port());
    let service = instance::first(&proxy.url(), &[("REDIS_TIMEOUT_MS", "5000")]);
    let d = Device::new("d");
    let compact = token(&service, &d);
    issue_many(&service, 300);
    proxy.set(Mode::Slow(100_000));
    proxy.move_to(after.port());
    let moved = Instant::now();
    certificate(&service, &compact, &d);
    assert!(moved.elapsed() < Duration::from_millis(1500), "{:?}", moved.elapsed());
    assert_eq!(service.health()["storage"], "memory", "the return is still under way");
    proxy.set(Mode::Pass);
    wait_for_count(&service, 300);
    refused_as_used(&[&service], &compact, &d);
    assert!(after.exists(&mark_key(&compact)));
}

/// Each eviction costs one token a moment, not everybody a return.
#[test]
fn a_redis_that_evicts_is_served() {
    let redis = Redis::start(&[]);
    evicting(&redis);
    let service = instance::first(&redis.url(), &[]);
    let devices: Vec<Device> = (0..20).map(|n| Device::new(&format!("d{n}"))).collect();
    let tokens: Vec<String> = devices.iter().map(|device| token(&service, device)).collect();
    let log = service.log().len();
    for (device, compact) in devices.iter().zip(&tokens) {
        redis.cli(&["DEL", &instance::token_key(compact)]);
        certificate(&service, compact, device);
    }
    let log = &service.log()[log..];
    let returns = log.matches("carried over").count();
    assert!(returns <= 1, "{returns} returns:\n{log}");
}

/// An instance whose clock is ahead has issued the token.
#[test]
fn a_token_from_a_clock_that_is_ahead_is_killed() {
    let redis = Redis::start(&[]);
    let service = instance::first(&redis.url(), &[]);
    let d = Device::new("d");
    let (iat, exp) = (now_s() + 30, now_s() + 330);
    let claims = format!(r#"{{"device_id":"d","type":"provisioning","iat":{iat},"exp":{exp}}}"#);
    let compact = jwt::sign(jwt::SECRET, jwt::HEADER, &claims);
    jwt::plant_token(&redis, "d", &compact, exp);
    assert_eq!(instance::revoke(&service, &d).status, 200, "there was a live token");
    assert_eq!(redis.cli(&["GET", &mark_key(&compact)]), instance::mark(&service, "killed"));
    check_error(&redeem(&service, &compact, &d), 401, "TOKEN_ALREADY_USED", "after the kill");
}

/// Issues tokens that nobody will redeem.
#[track_caller]
fn issue_many(service: &Service, count: usize) {
    for n in 0..count {
        let device = Device { name: format!("many-{n}"), csr: String::new() };
        token(service, &device);
    }
}

/// What is done after the answer would notice that Redis is gone.
#[track_caller]
fn wait_for_clean_up(redis: &Redis, compact: &str) {
    wait::for_true("it is cleaned up", || !redis.exists(&instance::token_key(compact)));
}

/// Waits, no longer than a second or so, until `/health` counts this many live tokens.
#[track_caller]
fn wait_for_count(service: &Service, count: u64) {
    service.wait_for_storage("redis");
    let right = wait::until(Duration::from_millis(1500), || {
        (service.health()["storage"] == "redis" && service.token_count() == count).then_some(())
    });
    assert!(right.is_some(), "{} tokens, not {count}\n{}", service.token_count(), service.log());
}
