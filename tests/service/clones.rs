//! A copy of `DATA_DIR`, `instance-id` and all, is started beside its origin (SPEC 3, "Instance"): no
//! token gives two certificates. What reaches a clone of a kill is in `bounds`.

use std::fs;
use std::thread;
use std::time::Duration;

use crate::support::instance::{self, Device, certificates, redeem, refused_as_used, token};
use crate::support::proxy::{Proxy, Stop};
use crate::support::redis::Redis;
use crate::support::service::Service;
use crate::support::token as jwt;
use crate::support::{check_error, wait};

const SLOW: [(&str, &str); 1] = [("REDIS_TIMEOUT_MS", "5000")];

fn clone_of(origin: &Service, url: &str) -> Service {
    let clone = instance::setup(url, &SLOW).copy_data(origin).start();
    clone.wait_for_storage("redis");
    clone
}

/// Row 35 of the model: a mark of the one must not pass for a dead one of the other.
#[test]
fn a_clone_does_not_take_over_the_mark_of_its_origin() {
    let redis = Redis::start(&[]);
    let proxies = [Proxy::start(redis.port()), Proxy::start(redis.port())];
    let origin = instance::first(&proxies[0].url(), &SLOW);
    let clone = clone_of(&origin, &proxies[1].url());
    let both = [(&origin, &proxies[0], &clone), (&clone, &proxies[1], &origin)];
    for (n, (redeemer, proxy, other)) in both.into_iter().enumerate() {
        let d = Device::new(&format!("d{n}"));
        let compact = token(&origin, &d);
        let marked = proxy.trap(&jwt::mark_of(&compact), Stop::After);
        thread::scope(|scope| {
            let attempt = scope.spawn(|| redeem(redeemer, &compact, &d));
            marked.wait();
            check_error(&redeem(other, &compact, &d), 401, "TOKEN_ALREADY_USED", "under way");
            marked.release();
            assert_eq!(attempt.join().unwrap().status, 200);
        });
        refused_as_used(&[&origin, &clone], &compact, &d);
        assert_eq!(certificates(&[&origin, &clone]), n + 1);
    }
}

#[test]
fn every_token_is_presented_to_a_clone_and_its_origin_at_once() {
    const TOKENS: usize = 40;
    let redis = Redis::start(&[]);
    let origin = instance::first(&redis.url(), &SLOW);
    let clone = clone_of(&origin, &redis.url());
    for n in 0..TOKENS {
        let d = Device::new(&format!("d{n}"));
        let compact = token([&origin, &clone][n % 2], &d);
        let answers = thread::scope(|scope| {
            [&origin, &clone]
                .map(|service| scope.spawn(|| redeem(service, &compact, &d)))
                .map(|answer| answer.join().unwrap().status)
        });
        let granted = answers.iter().filter(|status| **status == 200).count();
        assert_eq!(granted, 1, "{d:?}: {answers:?}");
    }
    assert_eq!(certificates(&[&origin, &clone]), TOKENS);
}

/// Rows 35b and 35d: a copy of a whole disk has the id, and nothing tells it from its origin but the
/// lease in Redis. Until that has been renewed, a mark of the name may be its own from before a crash.
#[test]
fn a_copy_that_cannot_be_known_by_its_file_draws_another_id() {
    let redis = Redis::start(&[]);
    let proxies = [Proxy::start(redis.port()), Proxy::start(redis.port())];
    let origin = instance::first(&proxies[0].url(), &SLOW);
    let lease = format!("mqtt-lite:instance:{}", instance::id(&origin));
    let holder = redis.cli(&["GET", &lease]);
    assert!((25_000..=30_000).contains(&redis.pttl(&lease)), "{}", redis.pttl(&lease));
    let clone = instance::setup(&proxies[1].url(), &SLOW).copy_data(&origin);
    fs::write(clone.data("instance-id"), instance::id(&origin)).unwrap();
    let clone = clone.start();
    clone.wait_for_storage("redis");
    let under_way = |redeemer: &Service, proxy: &Proxy, other: &Service, d: &str, expected| {
        let (d, (status, code)) = (Device::new(d), expected);
        let compact = token(&origin, &d);
        let marked = proxy.trap(&jwt::mark_of(&compact), Stop::After);
        thread::scope(|scope| {
            let attempt = scope.spawn(|| redeem(redeemer, &compact, &d));
            marked.wait();
            check_error(&redeem(other, &compact, &d), status, code, &d.name);
            marked.release();
            assert_eq!(attempt.join().unwrap().status, 200, "{}", redeemer.log());
        });
        refused_as_used(&[redeemer], &compact, &d);
    };
    let used = (401, "TOKEN_ALREADY_USED");
    under_way(&origin, &proxies[0], &clone, "d1", (503, "SERVICE_UNAVAILABLE"));
    under_way(&clone, &proxies[1], &origin, "d2", used);
    let drawn = wait::until(Duration::from_secs(60), || {
        (instance::id(&clone) != instance::id(&origin)).then_some(())
    });
    assert!(drawn.is_some(), "{}", clone.log());
    assert!(clone.log().contains("another instance runs under the id"), "{}", clone.log());
    assert_eq!(redis.cli(&["GET", &lease]), holder, "the origin's, renewed all the time");
    under_way(&origin, &proxies[0], &clone, "d3", used);
    under_way(&clone, &proxies[1], &origin, "d4", used);
    assert_eq!(certificates(&[&origin, &clone]), 4);
}

/// What the process before has left is dead at once, although the lease is there for half a minute yet.
#[test]
fn a_process_that_was_killed_leaves_its_lease_to_the_next() {
    let redis = Redis::start(&[]);
    let mut service = instance::first(&redis.url(), &SLOW);
    let id = instance::id(&service);
    let lease = format!("mqtt-lite:instance:{id}");
    let holders = [(); 3].map(|()| {
        service.kill9();
        service.restart();
        service.wait_for_storage("redis");
        assert_eq!(instance::id(&service), id);
        redis.cli(&["GET", &lease])
    });
    assert!(holders[0] != holders[1] && holders[1] != holders[2], "{holders:?}");
    assert!(!service.log().contains("in use"), "{}", service.log());
}
