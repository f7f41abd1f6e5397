//! Redis forgets what it had confirmed: it starts again from an older file, or a replica that lags takes
//! over. Two instances, `OUTAGE_REDEEM=none`; one has used tokens, and the other is asked for the same
//! tokens as soon as it is back. While both are alive, no token is redeemed twice (SPEC 4).
//!
//! `cargo test --test service forgetful -- --nocapture` prints the numbers.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::instance::{self, Device, certificate, redeem, token};
use crate::support::port::Port;
use crate::support::proxy::{Mode, Proxy};
use crate::support::redis::Redis;
use crate::support::service::Service;
use crate::support::temp::TempDir;
use crate::support::wait;

const TOKENS: usize = 60;
/// So much later the redeemer is at the new Redis: as long as a master took writes after a planned
/// fail-over.
const LATER: Duration = Duration::from_millis(2700);

/// Two instances, each behind a proxy of its own, and tokens that either has issued.
struct Pair {
    proxies: [Proxy; 2],
    asked: Service,
    redeemer: Service,
    tokens: Vec<(Device, String)>,
}

impl Pair {
    fn on(redis: &Redis) -> Pair {
        let proxies = [Proxy::start(redis.port()), Proxy::start(redis.port())];
        let env = [("OUTAGE_REDEEM", "none")];
        let asked = instance::first(&proxies[0].url(), &env);
        let redeemer = instance::another(&asked, &proxies[1].url(), &env);
        let issued = |n| {
            let device = Device::new(&format!("d{n}"));
            let service = if n % 2 == 0 { &asked } else { &redeemer };
            let first = token(service, &device);
            // One that takes another's place is dated some seconds ahead.
            let compact = match n % 4 {
                0 | 1 => first,
                _ => instance::issued(service, &instance::replace(service, &device)),
            };
            (device, compact)
        };
        let tokens = (0..TOKENS).map(issued).collect();
        Pair { proxies, asked, redeemer, tokens }
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

    /// As above. The asked instance is on the Redis at this port at once, the redeemer some time later.
    fn redeemed_twice_before_both_are_at(&self, port: u16, what: &str) -> usize {
        self.proxies[0].move_to(port);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(LATER);
                self.proxies[1].move_to(port);
                self.proxies[1].set(Mode::Pass);
            });
            self.redeemed_twice(what)
        })
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

#[test]
fn an_older_file_and_the_other_returns_first() {
    let mut redis = Redis::start(&[]);
    let pair = Pair::on(&redis);
    start_again_from_an_older_file(&mut redis, &pair, || pair.proxies[1].set(Mode::Refuse));
    assert_eq!(pair.redeemed_twice_before_both_are_at(redis.port(), "older file"), 0);
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

/// A master, a replica that can lag, and three Sentinels that watch them.
struct Watched {
    master: Redis,
    replica: Redis,
    lag: Proxy,
    sentinels: Vec<Sentinel>,
}

struct Sentinel {
    child: Child,
    port: Port,
    _dir: TempDir,
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sentinel {
    fn start(master: u16) -> Sentinel {
        let (dir, port) = (TempDir::new(), Port::any());
        // A replica that follows another address than the master's is put right after the time-out.
        let lines = format!(
            "port {}\nbind 127.0.0.1\ndir {}\nsentinel monitor mymaster 127.0.0.1 {master} 2\n\
             sentinel down-after-milliseconds mymaster 1000\n\
             sentinel failover-timeout mymaster 60000\n",
            port.number(),
            dir.path().display()
        );
        let file = dir.file("sentinel.conf", &lines);
        let mut command = Command::new("redis-server");
        command.arg(file).arg("--sentinel").stdin(Stdio::null()).stdout(Stdio::null());
        Sentinel { child: command.spawn().unwrap(), port, _dir: dir }
    }

    fn cli(&self, words: &[&str]) -> String {
        let port = self.port.number().to_string();
        let output = Command::new("redis-cli").args(["-p", &port]).args(words).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Watched {
    fn start() -> Watched {
        let master = Redis::start(&[]);
        let lag = Proxy::start(master.port());
        let replica = Redis::start(&[]);
        replica.cli(&["REPLICAOF", "127.0.0.1", &lag.port().to_string()]);
        let sentinels = (0..3).map(|_| Sentinel::start(master.port())).collect();
        let watched = Watched { master, replica, lag, sentinels };
        for sentinel in &watched.sentinels {
            wait::until(Duration::from_secs(30), || {
                let known = sentinel.cli(&["SENTINEL", "MASTER", "mymaster"]);
                let has = |name: &str, value: &str| known.contains(&format!("{name}\n{value}\n"));
                (has("num-slaves", "1") && has("num-other-sentinels", "2")).then_some(())
            })
            .expect("the Sentinels know each other");
        }
        watched
    }

    /// Everything until now is on the replica, too; what comes later takes a while.
    fn let_it_lag(&self) {
        assert_eq!(self.master.cli(&["WAIT", "1", "5000"]), "1");
        self.lag.set(Mode::Delay(Duration::from_secs(30)));
    }

    fn wait_for_promotion(&self) {
        let promoted = self.replica.port().to_string();
        wait::until(Duration::from_secs(30), || {
            let address =
                self.sentinels[0].cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"]);
            address.lines().any(|line| line == promoted).then_some(())
        })
        .expect("the replica is promoted");
    }
}

#[test]
fn a_replica_that_lags_takes_over() {
    let mut watched = Watched::start();
    let pair = Pair::on(&watched.master);
    watched.let_it_lag();
    pair.redeem_all();
    watched.master.kill9();
    watched.wait_for_promotion();
    let twice =
        pair.redeemed_twice_before_both_are_at(watched.replica.port(), "a replica that lags");
    assert_eq!(twice, 0);
}

/// The one instance has heard of the new master, and the other still uses the old one.
#[test]
fn a_planned_fail_over_and_the_old_master_takes_writes() {
    let watched = Watched::start();
    let pair = Pair::on(&watched.master);
    assert_eq!(watched.master.cli(&["WAIT", "1", "5000"]), "1");
    watched.sentinels[0].cli(&["SENTINEL", "FAILOVER", "mymaster"]);
    watched.wait_for_promotion();
    pair.redeem_all();
    let twice = pair.redeemed_twice_before_both_are_at(watched.replica.port(), "planned fail-over");
    assert_eq!(twice, 0);
}
