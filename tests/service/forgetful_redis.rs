//! Redis forgets what it had confirmed: it starts again from an older file. Two instances,
//! `OUTAGE_REDEEM=none`; one has used tokens, and the other is asked for the same tokens (SPEC 4).
//!
//! `cargo test --test service forgetful -- --nocapture` prints the numbers.

use std::thread;
use std::time::{Duration, Instant};

use crate::support::instance::{self, Device, certificate, redeem, token};
use crate::support::redis::Redis;
use crate::support::service::Service;

const TOKENS: usize = 60;

/// Two instances, and tokens that either has issued.
struct Pair {
    asked: Service,
    redeemer: Service,
    tokens: Vec<(Device, String)>,
}

impl Pair {
    fn on(redis: &Redis) -> Pair {
        let env = [("OUTAGE_REDEEM", "none")];
        let asked = instance::first(&redis.url(), &env);
        let redeemer = instance::another(&asked, &redis.url(), &env);
        let issued = |n| {
            let device = Device::new(&format!("d{n}"));
            let compact = token(if n % 2 == 0 { &asked } else { &redeemer }, &device);
            (device, compact)
        };
        let tokens = (0..TOKENS).map(issued).collect();
        Pair { asked, redeemer, tokens }
    }

    fn redeem_all(&self) {
        for (device, compact) in &self.tokens {
            certificate(&self.redeemer, compact, device);
        }
    }

    /// Presents every token to the other instance until none is answered with 503: how many it
    /// redeems.
    fn redeemed_twice(&self, what: &str) -> usize {
        let begun = Instant::now();
        let mut left: Vec<_> = self.tokens.iter().collect();
        let mut twice = 0;
        while !left.is_empty() {
            left.retain(|(device, compact)| {
                let status = redeem(&self.asked, compact, device).status;
                twice += usize::from(status == 200);
                status == 503
            });
            assert!(begun.elapsed() < Duration::from_secs(30), "503 for ever");
            thread::sleep(Duration::from_millis(20));
        }
        println!("{what}: {twice} of {TOKENS} redeemed twice, known after {:?}", begun.elapsed());
        twice
    }
}

/// The redemptions are not in the file from which Redis starts again. `meanwhile` comes before.
fn start_again_from_an_older_file(redis: &mut Redis, pair: &Pair, meanwhile: impl FnOnce()) {
    redis.save();
    pair.redeem_all();
    meanwhile();
    redis.kill9();
    redis.start_again();
}

#[test]
fn an_older_file_and_the_redeemer_has_entered_its_marks() {
    let mut redis = Redis::start(&[]);
    let pair = Pair::on(&redis);
    start_again_from_an_older_file(&mut redis, &pair, || ());
    let _notices_the_restart = pair.redeemer.health();
    pair.redeemer.wait_for_storage("redis");
    assert_eq!(pair.redeemed_twice("older file, marks entered"), 0);
}

/// The limit that the pages name: nobody is left who could say that the tokens are used.
#[test]
fn an_older_file_and_the_redeemer_is_stopped() {
    let mut redis = Redis::start(&[]);
    let pair = Pair::on(&redis);
    start_again_from_an_older_file(&mut redis, &pair, || pair.redeemer.signal("STOP"));
    pair.redeemed_twice("older file, redeemer stopped");
    pair.redeemer.signal("CONT");
    pair.redeemer.wait_for_storage("redis");
    for (device, compact) in &pair.tokens {
        instance::refused_as_used(&[&pair.asked, &pair.redeemer], compact, device);
    }
}
