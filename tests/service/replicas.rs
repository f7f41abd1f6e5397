//! `REDIS_WAIT_REPLICAS`: a redemption counts when replicas have its mark, so that a fail-over forgets
//! no use.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use super::outages::setup;
use crate::support::cluster::Cluster;
use crate::support::history::{History, Op};
use crate::support::instance::{
    self, Device, certificates, mark_key, redeem, redeem_patiently, refused_as_used, token,
};
use crate::support::load::{Fleet, replay_all};
use crate::support::proxy::Proxy;
use crate::support::redis::Redis;
use crate::support::sentinel::Trio;
use crate::support::{check_error, wait};

const WAITING: [(&str, &str); 3] =
    [("REDIS_WAIT_REPLICAS", "1"), ("OUTAGE_REDEEM", "none"), ("SHARE_RECORD", "false")];
const AT_ONCE: [&str; 2] = ["--repl-diskless-sync-delay", "0"];

fn replica_of(master: &Redis) -> Redis {
    let port = master.port().to_string();
    let replica = Redis::start(&[&AT_ONCE[..], &["--replicaof", "127.0.0.1", &port]].concat());
    // It takes the stream a while after it is listed.
    assert_eq!(master.cli(&["SET", "in-step", "yes"]), "OK");
    wait::for_true("the replica is in step", || replica.exists("in-step"));
    replica
}

#[test]
fn a_redemption_waits_for_the_replica() {
    let master = Redis::start(&AT_ONCE);
    let replica = replica_of(&master);
    let service = instance::first(&master.url(), &WAITING);
    let hasty = instance::another(&service, &master.url(), &[]);
    let [d, e] = ["d", "e"].map(Device::new);
    let [first, second] = [&d, &e].map(|device| token(&service, device));
    let stopped = replica.stop();
    let answer = redeem(&service, &first, &d);
    check_error(&answer, 503, "SERVICE_UNAVAILABLE", "the master alone has the mark");
    assert!(!master.exists(&mark_key(&first)), "it is withdrawn");
    let ready = service.http.get("/ready");
    assert!(
        ready.status == 503 && ready.text().contains("REDIS_WAIT_REPLICAS"),
        "{}",
        ready.text()
    );
    check_error(&redeem(&service, &first, &d), 503, "SERVICE_UNAVAILABLE", "still");
    let log = service.log();
    assert_eq!(log.matches("nothing is redeemed until they do").count(), 1, "{log}");
    assert!(!log.contains("ERROR"), "{log}");
    assert_eq!(redeem(&hasty, &second, &e).status, 200, "by default nobody waits");
    drop(stopped);
    assert_eq!(redeem_patiently(&service, &first, &d).status, 200, "{}", service.log());
    assert_eq!(service.http.get("/ready").status, 200);
    refused_as_used(&[&service], &first, &d);
}

/// The others go on, and what is said of them does not hide it.
#[test]
fn one_master_of_a_cluster_lacks_its_replica() {
    let cluster = Cluster::start();
    let [poor, rich] = cluster.masters()[..2] else { panic!("two masters") };
    let cluster_env = [&WAITING[..], &[("REDIS_CLUSTER", "true")]].concat();
    let service = instance::first(&cluster.url(), &cluster_env);
    let at = |master: usize, count: usize| -> Vec<(Device, String)> {
        let devices = (0..).map(|n: u32| Device::new(&format!("d{n}")));
        let devices = devices.filter(|device| cluster.master_of(&device.name) == master);
        devices.take(count).map(|device| (device.clone(), token(&service, &device))).collect()
    };
    let ((waits, unsafe_token), safe) = (at(poor, 1).remove(0), at(rich, 3));
    let stopped = cluster.servers[cluster.replica_of(poor)].stop();
    for (device, compact) in &safe {
        let answer = redeem(&service, &unsafe_token, &waits);
        check_error(&answer, 503, "SERVICE_UNAVAILABLE", "its master alone has the mark");
        assert_eq!(redeem(&service, compact, device).status, 200, "{}", service.log());
        assert_eq!(service.http.get("/ready").status, 503, "one master still lacks it");
    }
    drop(stopped);
    assert_eq!(redeem_patiently(&service, &unsafe_token, &waits).status, 200, "{}", service.log());
    assert_eq!(service.http.get("/ready").status, 200);
    let log = service.log();
    assert_eq!(log.matches("nothing is redeemed until they do").count(), 1, "{log}");
}

/// Row 31c of the model: who has redeemed is gone, too.
#[test]
fn a_fail_over_forgets_no_use() {
    const EACH: usize = 10;
    let mut master = Redis::start(&AT_ONCE);
    let replica = replica_of(&master);
    let proxies = [Proxy::start(master.port()), Proxy::start(master.port())];
    let a = instance::first(&proxies[0].url(), &WAITING);
    let mut b = instance::another(&a, &proxies[1].url(), &WAITING);
    let devices: Vec<Device> = (0..2 * EACH).map(|n| Device::new(&format!("d{n}"))).collect();
    let tokens: Vec<String> = devices.iter().map(|device| token(&a, device)).collect();
    let mut all = tokens.iter().zip(&devices);
    for (token, device) in all.by_ref().take(EACH) {
        assert_eq!(redeem(&b, token, device).status, 200, "{}", b.log());
    }
    let stopped = replica.stop();
    for (token, device) in all {
        assert_eq!(redeem(&b, token, device).status, 503, "{}", b.log());
    }
    b.kill9();
    master.kill9();
    drop(stopped);
    assert_eq!(replica.cli(&["REPLICAOF", "NO", "ONE"]), "OK");
    let _next = replica_of(&replica);
    proxies[0].move_to(replica.port());
    a.wait_for_storage("redis");
    for (n, (token, device)) in tokens.iter().zip(&devices).enumerate() {
        if n < EACH {
            refused_as_used(&[&a], token, device);
        } else {
            assert_eq!(redeem_patiently(&a, token, device).status, 200, "{}", a.log());
        }
    }
    assert_eq!(certificates(&[&a, &b]), 2 * EACH);
}

/// With all replicas awaited and `none`, nothing is redeemed twice, by whichever instance, over fail-overs
/// of a trio: twice, or as often as `TEST_FAIL_OVERS` says. Prints what the waiting costs.
#[test]
fn fail_overs_of_a_trio_redeem_nothing_twice() {
    let rounds = std::env::var("TEST_FAIL_OVERS").map_or(2, |rounds| rounds.parse().unwrap());
    let mut trio = Trio::start();
    let setup = |waits: &str| {
        let env = [("OUTAGE_REDEEM", "none"), ("REDIS_WAIT_REPLICAS", waits)];
        setup().env_of(&trio.env()).envs(&env).env("JWT_SECRET", crate::support::token::SECRET)
    };
    let a = setup("2").start();
    let [b, hasty] = ["2", "0"].map(|waits| setup(waits).share_ca(&a).start());
    [&a, &b, &hasty].iter().for_each(|service| service.wait_for_storage("redis"));
    let (fleet, history, stop) = (Fleet::new(300), History::new(), AtomicBool::new(false));
    let price = |server| {
        let history = History::new();
        let (begin, end) = (Instant::now(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope
                .spawn(|| fleet.run(&[server], &history, 100.0, 1, || end.load(Ordering::Relaxed)));
            history.wait_for(200);
            end.store(true, Ordering::Relaxed);
        });
        [0.5, 0.99].map(|share| history.quantile(Op::Redeem, share, begin, Instant::now()))
    };
    println!("a redemption, median and p99: {:?}, awaited {:?}", price(hasty.http), price(a.http));
    let servers = [a.http, b.http];
    thread::scope(|scope| {
        scope.spawn(|| fleet.run(&servers, &history, 60.0, 4, || stop.load(Ordering::Relaxed)));
        for _ in 0..rounds {
            history.wait_for(60);
            let dead = trio.kill_master();
            history.wait_for(40);
            trio.revive(dead);
            // At the other instance, mostly.
            replay_all(&[b.http, a.http, b.http], &history, &fleet);
        }
        stop.store(true, Ordering::Relaxed);
    });
    [&a, &b].iter().for_each(|service| service.wait_for_storage("redis"));
    replay_all(&[b.http, a.http], &history, &fleet);
    let granted: Vec<String> = history
        .events()
        .into_iter()
        .filter(|event| event.op == Op::Redeem && event.status == 200)
        .map(|event| event.token)
        .collect();
    let distinct: HashSet<&String> = granted.iter().collect();
    println!("{} redeemed over {rounds} fail-overs", granted.len());
    assert_eq!(distinct.len(), granted.len(), "redeemed twice\n{}\n{}", a.log(), b.log());
    assert!(granted.len() > 20 * rounds, "there was work: {}", granted.len());
}
