//! Rows of the model in `docs/model/` on a real Redis, 1 to 21 and two later ones: the interleavings
//! that break the obvious way, staged with traps between the program and Redis. The tests are named
//! after the rows.
//!
//! Not staged: 16 is a limit that is known and accepted; the schedules of 5b are in 5 and in
//! `instances.rs` (fifty requests, two instances).

use std::fs;
use std::io;
use std::thread;

use crate::support::clock::{FakeClock, now_s};
use crate::support::http::Response;
use crate::support::instance::{
    Device, another, certificate, certificates, claim_key, cut_off, first, issued, mark, mark_key,
    notice_loss, onboard, reconnect, redeem, redeem_patiently, refused_as_used, replace, revoke,
    token, token_key,
};
use crate::support::load;
use crate::support::proxy::{Mode, Proxy, Stop};
use crate::support::redis::Redis;
use crate::support::service::Service;
use crate::support::{check_error, token as jwt, wait};

/// For a test that holds a command longer than a moment.
const SLOW: &[(&str, &str)] = &[("REDIS_TIMEOUT_MS", "5000"), ("REDIS_CONNECT_TIMEOUT_MS", "5000")];
/// Where an instance is not to learn from the record what another has redeemed.
const UNSHARED: &[(&str, &str)] = &[("SHARE_RECORD", "false")];

/// What a redeeming device gets, also when the program dies meanwhile.
fn try_redeem(
    service: &Service,
    token: &str,
    device: &Device,
) -> impl Fn() -> io::Result<Response> + use<> {
    let (http, token, csr) = (service.http, token.to_owned(), device.csr.clone());
    move || load::sign(&http, &token, &csr)
}

#[test]
fn row_1_a_replaced_token_is_carried_over_by_its_issuer() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let issuer = first(&proxy.url(), &[]);
    let other = another(&issuer, &redis.url(), &[]);
    let d = Device::new("d");
    let old = token(&issuer, &d);
    cut_off(&issuer, &proxy);
    let new = issued(&other, &replace(&other, &d));
    assert_eq!(redis.cli(&["GET", &mark_key(&old)]), mark(&other, "killed"));
    assert!(!redis.exists(&token_key(&old)));
    reconnect(&issuer, &proxy);
    assert!(redis.exists(&token_key(&old)), "the issuer carries its copy over");
    refused_as_used(&[&issuer, &other], &old, &d);
    certificate(&issuer, &new, &d);
    assert_eq!(certificates(&[&issuer, &other]), 1);
}

/// The device d has a lease that is a hundred seconds old, and its token is gone.
fn plant_stale_lease(redis: &Redis) {
    let (iat, exp) = (now_s() - 100, now_s() + 200);
    let claims = format!(r#"{{"device_id":"d","type":"provisioning","iat":{iat},"exp":{exp}}}"#);
    let stale = jwt::sign(jwt::SECRET, jwt::HEADER, &claims);
    jwt::plant_token(redis, "d", &stale, exp);
    redis.cli(&["DEL", &token_key(&stale)]);
}

#[test]
fn row_2_two_onboardings_meet_a_stale_claim() {
    let redis = Redis::start(&[]);
    let proxies = [Proxy::start(redis.port()), Proxy::start(redis.port())];
    let one = first(&proxies[0].url(), SLOW);
    let two = another(&one, &proxies[1].url(), SLOW);
    let d = Device::new("d");
    plant_stale_lease(&redis);
    let traps = proxies.each_ref().map(|proxy| proxy.trap("EVAL", Stop::Before));
    let answers = thread::scope(|scope| {
        let asked = [&one, &two].map(|service| scope.spawn(|| onboard(service, &d)));
        for trap in &traps {
            trap.wait();
        }
        traps.iter().for_each(crate::support::proxy::Trap::release);
        asked.map(|answer| answer.join().unwrap())
    });
    let (won, lost): (Vec<_>, Vec<_>) = answers.iter().partition(|a| a.status == 200);
    assert_eq!(won.len(), 1, "{answers:?}");
    check_error(lost[0], 409, "TOKEN_ALREADY_ACTIVE", "the other");
    let compact = issued(&one, won[0]);
    assert_eq!(redis.cli(&["GET", &claim_key(&d)]), compact);
    assert_eq!(redis.keys().iter().filter(|k| k.contains(":token:")).count(), 1);
    certificate(&two, &compact, &d);
}

/// One of the two is answered 200. Before the replacement has taken the lease over, its bound has killed
/// the token that holds it, so the onboarding may; after that, the onboarding is 409.
#[test]
fn row_3_replace_against_an_onboarding() {
    for stop in [Stop::Before, Stop::After] {
        let redis = Redis::start(&[]);
        let proxy = Proxy::start(redis.port());
        let one = first(&proxy.url(), SLOW);
        let two = another(&one, &redis.url(), &[]);
        let d = Device::new("d");
        let old = token(&one, &d);
        // The script that sets a key with an end; the row is merged by another.
        let taking_over = proxy.trap("'PX',ARGV[3]", stop);
        let (replaced, onboarded) = thread::scope(|scope| {
            let replacing = scope.spawn(|| replace(&one, &d));
            taking_over.wait();
            if stop == Stop::After {
                wait::for_true("the claim is the new one's", || {
                    redis.cli(&["GET", &claim_key(&d)]) != old
                });
            }
            assert!(redis.pttl(&claim_key(&d)) > 0, "never without an end");
            let onboarded = onboard(&two, &d);
            taking_over.release();
            (replacing.join().unwrap(), onboarded)
        });
        let (won, lost) =
            if stop == Stop::After { (replaced, onboarded) } else { (onboarded, replaced) };
        check_error(&lost, 409, "TOKEN_ALREADY_ACTIVE", "the other was faster");
        let new = issued(&one, &won);
        assert!(redis.pttl(&claim_key(&d)) > 0);
        refused_as_used(&[&one, &two], &old, &d);
        certificate(&two, &new, &d);
    }
}

#[test]
fn row_4_the_reply_to_a_give_back_is_lost() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let one = first(&proxy.url(), SLOW);
    let two = another(&one, &redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&one, &d);
    // Recording fails and leaves nothing behind.
    fs::rename(one.data("ca/certs"), one.data("ca/certs.away")).unwrap();
    let giving_back = proxy.trap("EVAL", Stop::After);
    let greeting = thread::scope(|scope| {
        let failing = scope.spawn(|| redeem(&one, &compact, &d));
        giving_back.wait();
        wait::for_true("it is given back", || !redis.exists(&mark_key(&compact)));
        let greeting = proxy.trap("INFO", Stop::Before);
        giving_back.throw_away();
        check_error(&failing.join().unwrap(), 503, "SERVICE_UNAVAILABLE", "not recorded");
        greeting
    });
    // Before the give-back is sent again, the token is redeemed elsewhere.
    let serial = certificate(&two, &compact, &d);
    greeting.wait();
    greeting.release();
    one.wait_for_storage("redis");
    assert_eq!(redis.cli(&["GET", &mark_key(&compact)]), mark(&two, &serial));
    fs::rename(one.data("ca/certs.away"), one.data("ca/certs")).unwrap();
    refused_as_used(&[&one, &two], &compact, &d);
    assert_eq!(certificates(&[&one, &two]), 1);
}

/// The mark of an attempt without an answer stands; the next attempt is granted from memory under
/// another serial, and fails: the token is free, and to others, too.
#[test]
fn row_4_the_mark_of_an_earlier_attempt_is_withdrawn_too() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let one = first(&proxy.url(), &[]);
    let two = another(&one, &redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&one, &d);
    proxy.set(Mode::SwallowReplies);
    check_error(&redeem(&one, &compact, &d), 503, "SERVICE_UNAVAILABLE", "no answer came");
    assert!(redis.exists(&mark_key(&compact)));
    notice_loss(&one);
    fs::rename(one.data("ca/certs"), one.data("ca/certs.away")).unwrap();
    check_error(&redeem(&one, &compact, &d), 503, "SERVICE_UNAVAILABLE", "not recorded");
    let granted = one.log().matches("could not be recorded").count();
    assert_eq!(granted, 1, "from memory");
    fs::rename(one.data("ca/certs.away"), one.data("ca/certs")).unwrap();
    reconnect(&one, &proxy);
    assert!(!redis.exists(&mark_key(&compact)), "{}", redis.cli(&["GET", &mark_key(&compact)]));
    certificate(&two, &compact, &d);
    refused_as_used(&[&one, &two], &compact, &d);
}

#[test]
fn row_5_a_crash_between_mark_and_record() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let mut one = first(&proxy.url(), SLOW);
    let two = another(&one, &redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&one, &d);
    let marked = proxy.trap(&jwt::mark_of(&compact), Stop::After);
    let attempt = try_redeem(&one, &compact, &d);
    thread::scope(|scope| {
        let attempt = scope.spawn(attempt);
        marked.wait();
        one.kill9();
        marked.throw_away();
        assert!(attempt.join().unwrap().is_err());
    });
    let dead = redis.cli(&["GET", &mark_key(&compact)]);
    assert!(dead.starts_with(&mark(&one, "")), "{dead}");
    check_error(&redeem(&two, &compact, &d), 401, "TOKEN_ALREADY_USED", "to others it is used");
    one.restart();
    one.wait_for_storage("redis");
    let serial = certificate(&one, &compact, &d);
    assert_ne!(mark(&one, &serial), dead);
    assert_eq!(redis.cli(&["GET", &mark_key(&compact)]), mark(&one, &serial));
    refused_as_used(&[&one, &two], &compact, &d);
    assert_eq!(certificates(&[&one, &two]), 1);
}

#[test]
fn row_6_a_mark_arrives_after_it_was_withdrawn() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let service = first(&proxy.url(), &[]);
    let d = Device::new("d");
    let compact = token(&service, &d);
    let late = proxy.trap(&jwt::mark_of(&compact), Stop::Before);
    check_error(&redeem(&service, &compact, &d), 503, "SERVICE_UNAVAILABLE", "no answer came");
    service.wait_for_log("Redis connection renewed");
    assert!(!redis.exists(&mark_key(&compact)));
    late.release();
    wait::for_true("the mark arrives", || redis.exists(&mark_key(&compact)));
    certificate(&service, &compact, &d);
    refused_as_used(&[&service], &compact, &d);
    assert_eq!(certificates(&[&service]), 1);
}

#[test]
fn row_7_two_workers_at_the_moment_of_loss() {
    for answered in [true, false] {
        let mut redis = Redis::start(&[]);
        let proxy = Proxy::start(redis.port());
        // Two that redeem, beside two for all else.
        let service = first(&proxy.url(), &[SLOW, &[("WORKERS", "4")]].concat());
        let d = Device::new("d");
        let compact = token(&service, &d);
        let marked = proxy.trap(&jwt::mark_of(&compact), Stop::After);
        thread::scope(|scope| {
            let through_redis = scope.spawn(|| redeem(&service, &compact, &d));
            marked.wait();
            redis.kill9();
            notice_loss(&service);
            check_error(&redeem(&service, &compact, &d), 401, "TOKEN_ALREADY_USED", "from memory");
            if answered {
                marked.release();
                assert_eq!(through_redis.join().unwrap().status, 200);
            } else {
                marked.throw_away();
                let answer = through_redis.join().unwrap();
                check_error(&answer, 503, "SERVICE_UNAVAILABLE", "no answer came");
                certificate(&service, &compact, &d);
            }
        });
        refused_as_used(&[&service], &compact, &d);
        redis.start_again();
        service.wait_for_storage("redis");
        assert_eq!(
            redis.cli(&["GET", &mark_key(&compact)]).to_lowercase(),
            mark(&service, &service.index()[0][3]).to_lowercase()
        );
        refused_as_used(&[&service], &compact, &d);
        assert_eq!(certificates(&[&service]), 1);
    }
}

#[test]
fn row_8_the_marker_has_a_clock_that_is_ahead() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let issuer = first(&proxy.url(), &[]);
    let clock = FakeClock::at(now_s() + 250);
    let env = clock.env();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    let ahead = another(&issuer, &redis.url(), &env);
    let d = Device::new("d");
    let compact = token(&issuer, &d);
    cut_off(&issuer, &proxy);
    certificate(&ahead, &compact, &d);
    reconnect(&issuer, &proxy);
    let (mark_left, token_left) =
        (redis.pttl(&mark_key(&compact)), redis.pttl(&token_key(&compact)));
    assert!(token_left > 0, "the issuer carries its copy over");
    assert!(mark_left > token_left, "{mark_left} {token_left}");
    refused_as_used(&[&issuer], &compact, &d);
}

#[test]
fn row_9_onboarding_while_the_token_is_being_redeemed() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let service = first(&proxy.url(), &[SLOW, &[("REENROLL", "deny")]].concat());
    let d = Device::new("d");
    let compact = token(&service, &d);
    // The onboarding has seen no certificate, and is on its way to the claim.
    let claiming = proxy.trap(&claim_key(&d), Stop::Before);
    thread::scope(|scope| {
        let onboarding = scope.spawn(|| onboard(&service, &d));
        claiming.wait();
        certificate(&service, &compact, &d);
        wait::for_true("the claim is free", || !redis.exists(&claim_key(&d)));
        claiming.release();
        let answer = onboarding.join().unwrap();
        check_error(&answer, 409, "DEVICE_HAS_ACTIVE_CERTIFICATE", "seen after the claim");
    });
    wait::for_true("token and claim are taken back", || {
        !redis.keys().iter().any(|k| k.contains(":token:") || k.contains(":device:"))
    });
}

#[test]
fn row_10_consumed_in_the_outage_then_restarted() {
    let mut redis = Redis::start(&[]);
    let mut one = first(&redis.url(), &[]);
    let two = another(&one, &redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&one, &d);
    redis.save();
    redis.kill9();
    notice_loss(&one);
    let serial = certificate(&one, &compact, &d);
    one.kill9();
    one.restart();
    refused_as_used(&[&one], &compact, &d);
    redis.start_again();
    one.wait_for_storage("redis");
    assert_eq!(redis.cli(&["GET", &mark_key(&compact)]), mark(&one, &serial));
    two.health();
    two.wait_for_storage("redis");
    refused_as_used(&[&one, &two], &compact, &d);
    assert_eq!(certificates(&[&one, &two]), 1);
}

#[test]
fn row_11_the_reply_to_an_issue_is_lost() {
    for stop in [Stop::After, Stop::Before] {
        let redis = Redis::start(&[]);
        let proxy = Proxy::start(redis.port());
        let one = first(&proxy.url(), &[]);
        let two = another(&one, &redis.url(), &[]);
        let d = Device::new("d");
        let issuing = proxy.trap(&claim_key(&d), stop);
        let compact = token(&one, &d); // after REDIS_TIMEOUT_MS, from memory
        one.wait_for_storage("redis");
        issuing.release(); // Before: the commands arrive late
        check_error(&onboard(&two, &d), 409, "TOKEN_ALREADY_ACTIVE", "the claim is there");
        assert_eq!(redis.cli(&["GET", &claim_key(&d)]), compact);
        assert!(redis.exists(&token_key(&compact)), "and so is the token that it names");
        certificate(&two, &compact, &d);
        refused_as_used(&[&one, &two], &compact, &d);
    }
}

#[test]
fn row_12_marks_are_carried_over_before_tokens() {
    let mut redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let one = first(&proxy.url(), SLOW);
    let two = another(&one, &redis.url(), &[]);
    let (used, live) = (Device::new("used"), Device::new("live"));
    let (of_used, of_live) = (token(&one, &used), token(&one, &live));
    cut_off(&one, &proxy);
    redis.restart(false);
    certificate(&one, &of_used, &used);
    two.health();
    two.wait_for_storage("redis");
    let marking = proxy.trap(&jwt::mark_of(&of_used), Stop::Before);
    proxy.set(Mode::Pass);
    marking.wait();
    for (compact, device) in [(&of_used, &used), (&of_live, &live)] {
        assert!(!redis.exists(&token_key(compact)), "before its mark nothing is carried over");
        check_error(&redeem(&two, compact, device), 503, "SERVICE_UNAVAILABLE", "elsewhere");
    }
    marking.release();
    one.wait_for_storage("redis");
    let set_token = |compact: &str| {
        let key = token_key(compact);
        proxy.commands().iter().filter(|c| c[0] == "SET" && c[1] == key).count()
    };
    assert_eq!((set_token(&of_used), set_token(&of_live)), (1, 2), "used: as its mark only");
    refused_as_used(&[&one, &two], &of_used, &used);
    certificate(&two, &of_live, &live);
}

#[test]
fn row_13_consumed_from_memory_while_the_carry_over_runs() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let one = first(&proxy.url(), SLOW);
    let two = another(&one, &redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&one, &d);
    // With fewer, the last round begins at once, in which everybody waits.
    for n in 0..80 {
        token(&one, &Device { name: format!("other-{n}"), csr: String::new() });
    }
    cut_off(&one, &proxy);
    let carrying = proxy.trap(&token_key(&compact), Stop::Before);
    proxy.set(Mode::Pass);
    carrying.wait();
    let answer = redeem(&one, &compact, &d);
    assert_eq!(answer.status, 200, "from memory: {}", answer.text());
    carrying.release();
    one.wait_for_storage("redis");
    let serial = answer.field("serial_number");
    assert_eq!(redis.cli(&["GET", &mark_key(&compact)]), mark(&one, &serial));
    assert!(!redis.exists(&token_key(&compact)), "its mark went after it");
    refused_as_used(&[&one, &two], &compact, &d);
    assert_eq!(certificates(&[&one, &two]), 1);
}

#[test]
fn row_14_redis_is_back_with_data_of_a_second_ago() {
    let mut redis = Redis::start(&[]);
    let one = first(&redis.url(), &[]);
    let two = another(&one, &redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&two, &d);
    redis.save();
    let serial = certificate(&one, &compact, &d);
    wait::for_true("it is cleaned up", || !redis.exists(&token_key(&compact)));
    redis.kill9();
    redis.start_again();
    assert!(redis.exists(&token_key(&compact)) && !redis.exists(&mark_key(&compact)));
    one.health();
    wait::for_true("the mark is carried over", || redis.exists(&mark_key(&compact)));
    assert_eq!(redis.cli(&["GET", &mark_key(&compact)]), mark(&one, &serial));
    two.health();
    two.wait_for_storage("redis");
    refused_as_used(&[&one, &two], &compact, &d);
    assert_eq!(certificates(&[&one, &two]), 1);
}

#[test]
fn row_15_with_none_a_token_that_was_in_redis_is_not_carried_over() {
    let mut redis = Redis::start(&[]);
    let proxies = [Proxy::start(redis.port()), Proxy::start(redis.port())];
    let none = &[("OUTAGE_REDEEM", "none")];
    let issuer = first(&proxies[0].url(), none);
    let other = another(&issuer, &proxies[1].url(), none);
    let (d, e, f) = (Device::new("d"), Device::new("e"), Device::new("f"));
    let (used, live) = (token(&issuer, &d), token(&issuer, &e));
    certificate(&other, &used, &d);
    cut_off(&issuer, &proxies[0]);
    cut_off(&other, &proxies[1]);
    let unsent = token(&issuer, &f);
    check_error(&redeem(&issuer, &used, &d), 503, "SERVICE_UNAVAILABLE", "in the outage");
    redis.restart(false);
    reconnect(&issuer, &proxies[0]);
    for compact in [&used, &live] {
        assert!(!redis.exists(&token_key(compact)), "another may have redeemed it");
    }
    assert!(redis.exists(&token_key(&unsent)), "nobody else can have seen this one");
    check_error(&redeem(&issuer, &used, &d), 503, "SERVICE_UNAVAILABLE", "shortly after");
    reconnect(&other, &proxies[1]);
    refused_as_used(&[&issuer, &other], &used, &d);
    certificate(&other, &unsent, &f);
    refused_as_used(&[&issuer, &other], &unsent, &f);
    assert_eq!(certificates(&[&issuer, &other]), 2);
}

/// Two instances under `none`. `two` has redeemed a token of `one`, and Redis is back from an older
/// file while `two` cannot reach it. `one` is asked, restarted before that or not.
fn an_older_redis(restarts: bool) {
    let mut redis = Redis::start(&[]);
    let proxies = [Proxy::start(redis.port()), Proxy::start(redis.port())];
    let none = &[("OUTAGE_REDEEM", "none")];
    let mut one = first(&proxies[0].url(), none);
    let two = another(&one, &proxies[1].url(), none);
    let (d, e) = (Device::new("d"), Device::new("e"));
    let compact = token(&one, &d);
    redis.save();
    certificate(&two, &compact, &d);
    proxies[1].set(Mode::Refuse);
    redis.kill9();
    redis.start_again();
    assert!(redis.exists(&token_key(&compact)) && !redis.exists(&mark_key(&compact)));
    if restarts {
        one.kill9();
        one.restart();
    }
    // The first look may be what shows that Redis was restarted.
    one.health();
    one.wait_for_storage("redis");
    check_error(&redeem(&one, &compact, &d), 503, "SERVICE_UNAVAILABLE", "shortly after");
    assert!(!redis.exists(&mark_key(&compact)), "and nothing is left of it");
    reconnect(&two, &proxies[1]);
    wait::for_true("a second passes", || {
        now_s() > jwt::claims_of(&compact)["iat"].as_u64().unwrap() + 1
    });
    certificate(&one, &token(&one, &e), &e);
    refused_as_used(&[&one, &two], &compact, &d);
    assert_eq!(certificates(&[&one, &two]), 2);
}

#[test]
fn row_30_redis_is_back_from_an_older_file() {
    an_older_redis(false);
}

#[test]
fn row_30d_the_issuer_is_restarted_after_redis() {
    an_older_redis(true);
}

/// The same Redis, as far as it says, but it has lost what was known here.
#[test]
fn row_30_a_mark_is_missing() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let service = first(&proxy.url(), &[("OUTAGE_REDEEM", "none")]);
    let (d, e) = (Device::new("d"), Device::new("e"));
    let (used, live) = (token(&service, &d), token(&service, &e));
    certificate(&service, &used, &d);
    for mark_is_lost in [false, true] {
        cut_off(&service, &proxy);
        if mark_is_lost {
            redis.cli(&["DEL", &mark_key(&used)]);
        }
        reconnect(&service, &proxy);
        let answer = service.sign(&live, "no request");
        check_error(&answer, 400, "INVALID_CSR", "it is not even looked at");
        if mark_is_lost {
            check_error(&redeem(&service, &live, &e), 503, "SERVICE_UNAVAILABLE", "shortly after");
        }
    }
    assert!(redis.exists(&mark_key(&used)), "entered again");
    assert_eq!(redeem_patiently(&service, &live, &e).status, 200);
}

#[test]
fn row_17_a_dead_mark_is_judged_by_the_hash_of_the_token() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let mut service = first(&proxy.url(), &[]);
    let d = Device::new("d");
    let compact = token(&service, &d);
    proxy.set(Mode::HoldCommands);
    check_error(&redeem(&service, &compact, &d), 503, "SERVICE_UNAVAILABLE", "its mark is late");
    notice_loss(&service);
    let serial = certificate(&service, &compact, &d);
    proxy.set(Mode::Pass); // now the first attempt's mark arrives
    service.wait_for_storage("redis");
    refused_as_used(&[&service], &compact, &d);
    // The late mark over the carried one, and the token there again: the worst that can be.
    assert_ne!(&serial, &"4".repeat(32));
    redis.cli(&["SET", &mark_key(&compact), &mark(&service, &"4".repeat(32)), "EX", "300"]);
    jwt::plant_token(&redis, "d", &compact, now_s() + 300);
    refused_as_used(&[&service], &compact, &d);
    service.kill9();
    service.restart();
    refused_as_used(&[&service], &compact, &d);
    assert_eq!(certificates(&[&service]), 1);
}

#[test]
fn row_18_a_kill_against_a_redemption_that_dies() {
    let redis = Redis::start(&[]);
    let proxies = [Proxy::start(redis.port()), Proxy::start(redis.port())];
    let issuer = first(&proxies[0].url(), &[]);
    let mut redeemer = another(&issuer, &proxies[1].url(), SLOW);
    let killer = another(&issuer, &redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&issuer, &d);
    cut_off(&issuer, &proxies[0]);
    let marked = proxies[1].trap(&jwt::mark_of(&compact), Stop::After);
    let attempt = try_redeem(&redeemer, &compact, &d);
    thread::scope(|scope| {
        let attempt = scope.spawn(attempt);
        marked.wait();
        assert_eq!(revoke(&killer, &d).status, 200);
        redeemer.kill9();
        marked.throw_away();
        assert!(attempt.join().unwrap().is_err());
    });
    assert_eq!(redis.cli(&["GET", &mark_key(&compact)]), mark(&killer, "killed"));
    reconnect(&issuer, &proxies[0]);
    assert!(redis.exists(&token_key(&compact)), "the issuer carries its copy over");
    redeemer.restart();
    redeemer.wait_for_storage("redis");
    refused_as_used(&[&redeemer, &issuer, &killer], &compact, &d);
    assert_eq!(certificates(&[&issuer, &redeemer, &killer]), 0);
}

/// The kill overtakes the redemption on its way, where the mark that is read last is not the
/// attempt's; or comes when it was granted, and before its certificate is signed.
#[test]
fn row_18_a_kill_overtakes_a_redemption() {
    for stop in [Stop::Before, Stop::After] {
        let redis = Redis::start(&[]);
        let proxy = Proxy::start(redis.port());
        let service = first(&proxy.url(), SLOW);
        let d = Device::new("d");
        let compact = token(&service, &d);
        let marking = proxy.trap(&jwt::mark_of(&compact), stop);
        thread::scope(|scope| {
            let attempt = scope.spawn(|| redeem(&service, &compact, &d));
            marking.wait();
            assert_eq!(revoke(&service, &d).status, 200);
            marking.release();
            let what = format!("killed {stop:?}");
            check_error(&attempt.join().unwrap(), 401, "TOKEN_ALREADY_USED", &what);
        });
        assert_eq!(redis.cli(&["GET", &mark_key(&compact)]), mark(&service, "killed"));
        refused_as_used(&[&service], &compact, &d);
        assert_eq!(certificates(&[&service]), 0);
    }
}

#[test]
fn row_19_killed_here_and_presented_here_after_a_restart() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let issuer = first(&proxy.url(), &[]);
    let mut killer = another(&issuer, &redis.url(), &[]);
    let d = Device::new("d");
    let compact = token(&issuer, &d);
    cut_off(&issuer, &proxy);
    let new = issued(&killer, &replace(&killer, &d));
    reconnect(&issuer, &proxy);
    assert!(redis.exists(&token_key(&compact)), "the issuer carries its copy over");
    killer.kill9();
    killer.restart();
    killer.wait_for_storage("redis");
    refused_as_used(&[&killer, &issuer], &compact, &d);
    certificate(&killer, &new, &d);
}

#[test]
fn row_20_a_mark_is_carried_over_a_tentative_one() {
    let mut redis = Redis::start(&[]);
    let proxies = [(); 3].map(|()| Proxy::start(redis.port()));
    let a = first(&proxies[0].url(), UNSHARED);
    let b = another(&a, &proxies[1].url(), &[SLOW, UNSHARED].concat());
    let c = another(&a, &proxies[2].url(), UNSHARED);
    let d = Device::new("d");
    let compact = token(&c, &d);
    let serial = certificate(&a, &compact, &d);
    cut_off(&a, &proxies[0]);
    cut_off(&c, &proxies[2]);
    redis.restart(false);
    b.health();
    b.wait_for_storage("redis");
    // b marks a token that is not there yet, and is about to withdraw.
    let withdrawing = proxies[1].trap("EVAL", Stop::Before);
    thread::scope(|scope| {
        let attempt = scope.spawn(|| redeem(&b, &compact, &d));
        withdrawing.wait();
        assert!(redis.cli(&["GET", &mark_key(&compact)]).starts_with(&mark(&b, "")));
        reconnect(&a, &proxies[0]);
        withdrawing.release();
        check_error(&attempt.join().unwrap(), 503, "SERVICE_UNAVAILABLE", "not there yet");
    });
    assert_eq!(redis.cli(&["GET", &mark_key(&compact)]), mark(&a, &serial));
    reconnect(&c, &proxies[2]);
    assert!(redis.exists(&token_key(&compact)), "c carries its copy over");
    refused_as_used(&[&a, &b, &c], &compact, &d);
    assert_eq!(certificates(&[&a, &b, &c]), 1);
}

/// What is carried over while b's commands are on their way comes between them.
fn carried_between_the_commands(dead_mark: bool, pattern: &str) {
    let mut redis = Redis::start(&[]);
    let proxies = [(); 3].map(|()| Proxy::start(redis.port()));
    let a = first(&proxies[0].url(), UNSHARED);
    let b = another(&a, &proxies[1].url(), &[SLOW, UNSHARED].concat());
    let c = another(&a, &proxies[2].url(), UNSHARED);
    let d = Device::new("d");
    let compact = token(&c, &d);
    certificate(&a, &compact, &d);
    cut_off(&a, &proxies[0]);
    cut_off(&c, &proxies[2]);
    redis.restart(false);
    b.health();
    b.wait_for_storage("redis");
    if dead_mark {
        redis.cli(&["SET", &mark_key(&compact), &mark(&b, &"4".repeat(32)), "EX", "300"]);
    }
    let between = proxies[1].trap(pattern, Stop::Within);
    thread::scope(|scope| {
        let attempt = scope.spawn(|| redeem(&b, &compact, &d));
        between.wait();
        let tentative = redis.cli(&["GET", &mark_key(&compact)]);
        assert!(tentative.starts_with(&mark(&b, "")) && !tentative.contains("4444"), "{tentative}");
        reconnect(&a, &proxies[0]);
        reconnect(&c, &proxies[2]);
        assert!(redis.exists(&token_key(&compact)), "c carries its copy over");
        between.release();
        check_error(&attempt.join().unwrap(), 401, "TOKEN_ALREADY_USED", "a's mark stands");
    });
    refused_as_used(&[&a, &b, &c], &compact, &d);
    assert_eq!(certificates(&[&a, &b, &c]), 1);
}

#[test]
fn row_20_the_mark_is_read_last() {
    carried_between_the_commands(false, "EXISTS");
}

/// Row 21: b takes its own dead mark over while a's mark is carried, c carries its copy.
#[test]
fn row_21_the_mark_is_read_last_when_a_dead_one_is_taken_over() {
    // The end of the compare-and-set, which no other command has before an EXISTS.
    carried_between_the_commands(true, "360000\r\n*2\r\n$6\r\nEXISTS");
}

/// The bound comes between the look at the lease and the take-over, whose answer is not born dead.
#[test]
fn row_25c_a_kill_before_a_stale_lease_is_taken_over() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let one = first(&proxy.url(), SLOW);
    let two = another(&one, &redis.url(), SLOW);
    let d = Device::new("d");
    plant_stale_lease(&redis);
    let trap = proxy.trap("EVAL", Stop::Before);
    let compact = thread::scope(|scope| {
        let answer = scope.spawn(|| onboard(&one, &d));
        trap.wait();
        assert_eq!(revoke(&two, &d).status, 404, "nothing is known of it, but its past is dead");
        trap.release();
        issued(&one, &answer.join().unwrap())
    });
    assert!(
        jwt::claims_of(&compact)["iat"].as_u64() > Some(now_s() + 2),
        "it is dated after the bound"
    );
    certificate(&two, &compact, &d);
}

/// The replacement has raised the bound and is refused; what it kills is being signed for.
#[test]
fn row_28f_an_onboarding_after_a_replacement_was_refused() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let a = first(&redis.url(), SLOW);
    let b = another(&a, &proxy.url(), SLOW);
    let d = Device::new("d");
    let compact = token(&a, &d);
    let marking = proxy.trap(&jwt::mark_of(&compact), Stop::After);
    thread::scope(|scope| {
        let attempt = scope.spawn(|| redeem(&b, &compact, &d));
        marking.wait();
        for (answer, what) in [(replace(&a, &d), "the replacement"), (onboard(&a, &d), "and then")]
        {
            check_error(&answer, 409, "TOKEN_ALREADY_ACTIVE", what);
        }
        marking.release();
        attempt.join().unwrap();
    });
}
