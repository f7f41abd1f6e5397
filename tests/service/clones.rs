//! A copy of `DATA_DIR`, `instance-id` and all, is started beside its origin (SPEC 3, "Instance"): no
//! token gives two certificates. What reaches a clone of a kill is in `bounds`.

use std::thread;

use crate::support::check_error;
use crate::support::instance::{self, Device, certificates, redeem, refused_as_used, token};
use crate::support::proxy::{Proxy, Stop};
use crate::support::redis::Redis;
use crate::support::service::Service;
use crate::support::token as jwt;

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
