//! Redis is where sentinels say: who is asked, who is believed, and what a fail-over costs.

use std::thread;
use std::time::Duration;

use crate::support::csr::Csr;
use crate::support::port::Port;
use crate::support::redis::Redis;
use crate::support::sentinel::{MASTER, Sentinel, Trio};
use crate::support::service::Setup;
use crate::support::{check_error, wait};

/// The first in the list is dead, the second names a replica, and both are passed over.
#[test]
fn a_dead_sentinel_and_one_that_is_wrong() {
    let trio = Trio::start();
    let replica = (0..3).find(|at| *at != trio.master()).unwrap();
    // It never has a quorum, and so goes on believing what it was told.
    let wrong = Sentinel::start(MASTER, trio.servers[replica].port(), 9);
    let dead = Port::any();
    let list =
        format!("127.0.0.1:{},{},{}", dead.number(), wrong.address(), trio.sentinels[2].address());
    let env = [("REDIS_SENTINELS", &*list), ("REDIS_SENTINEL_MASTER", MASTER)];
    let service = Setup::new().envs(&env).start();
    service.wait_for_storage("redis");
    service.token("d");
    assert!(trio.servers[trio.master()].exists("mqtt-lite:device:d"));
}

/// Only one is named; when it is dead, the others that it told of are asked.
#[test]
fn the_other_sentinels_are_learnt() {
    let mut trio = Trio::start();
    let env = [
        ("REDIS_SENTINELS", trio.sentinels[0].address()),
        ("REDIS_SENTINEL_MASTER", MASTER.to_owned()),
    ];
    let service = Setup::new().env_of(&env).start();
    service.wait_for_storage("redis");
    let (compact, csr) = (service.token("d"), Csr::new("d").make());
    let dead = trio.master();
    trio.servers[dead].kill9();
    drop(trio.sentinels.remove(0));
    wait::for_true("another is the master", || trio.master() != dead);
    service.wait_for_storage("redis");
    assert_eq!(service.sign(&compact, &csr).status, 200);
    check_error(&service.sign(&compact, &csr), 401, "TOKEN_ALREADY_USED", "after the fail-over");
}

/// The old master takes writes for ten seconds more, until the sentinels make it a replica. Nothing of
/// what it was told is lost by that.
#[test]
fn a_master_that_is_demoted() {
    let trio = Trio::start();
    let service = Setup::new().env_of(&trio.env()).start();
    service.wait_for_storage("redis");
    let old = trio.master();
    assert_eq!(trio.sentinels[0].cli(&["SENTINEL", "FAILOVER", MASTER]), "OK");
    wait::for_true("another is the master", || trio.master() != old);
    let compact = service.token("d");
    let carried = wait::until(Duration::from_secs(30), || {
        trio.servers[trio.master()].exists("mqtt-lite:device:d").then_some(())
    });
    assert!(carried.is_some(), "{}", service.log());
    let csr = Csr::new("d").make();
    wait::for_true("it is redeemed", || service.sign(&compact, &csr).status == 200);
}

/// Each in one line that names the setting.
#[test]
fn what_is_wrong_is_said() {
    let check = |env: &[(&str, &str)], said: &str| {
        let service = Setup::new().envs(env).start();
        service.wait_for_log(said);
        let log = service.log();
        assert!(!log.contains("the record is not shared"), "it is said once: {log}");
    };
    let plain = Redis::start(&[]);
    let sentinel = Sentinel::start(MASTER, plain.port(), 1);
    let at = sentinel.address();
    let why = "it is a sentinel: name it in REDIS_SENTINELS, in place of REDIS_URL or REDIS_HOST";
    check(&[("REDIS_URL", &format!("redis://{at}"))], &format!("{at}: {why}"));
    let why = "it watches no servers that it calls \"mymaster\", see REDIS_SENTINEL_MASTER";
    check(&[("REDIS_SENTINELS", &at)], &format!("sentinel {at}: {why}"));
    let at = format!("127.0.0.1:{}", plain.port());
    let why = "it is no sentinel, see REDIS_SENTINELS";
    check(&[("REDIS_SENTINELS", &at)], &format!("sentinel {at}: {why}"));
    let replica = Redis::start(&["--replicaof", "127.0.0.1", &plain.port().to_string()]);
    let wrong = Sentinel::start("other", replica.port(), 9);
    let env = [("REDIS_SENTINELS", &*wrong.address()), ("REDIS_SENTINEL_MASTER", "other")];
    let said = "a sentinel calls it the master, but its role is \"slave\"";
    check(&env, &format!("127.0.0.1:{}: {said}", replica.port()));
}

/// Its own user and password, which are not those of the servers.
#[test]
fn sentinels_with_a_password() {
    let redis = Redis::with_password("of-the-server");
    let sentinel = Sentinel::start(MASTER, redis.port(), 1);
    sentinel.cli(&["SENTINEL", "SET", MASTER, "auth-pass", "of-the-server"]);
    sentinel.cli(&["CONFIG", "SET", "requirepass", "of-the-sentinel"]);
    sentinel.cli(&["ACL", "SETUSER", "default", ">of-the-sentinel"]);
    let env = [
        ("REDIS_SENTINELS", &*sentinel.address()),
        ("REDIS_SENTINEL_MASTER", MASTER),
        ("REDIS_PASSWORD", "of-the-server"),
    ];
    let setup = || Setup::new().envs(&env);
    let at = sentinel.address();
    thread::scope(|scope| {
        let none = scope.spawn(|| setup().start());
        let right =
            scope.spawn(|| setup().env("REDIS_SENTINEL_PASSWORD", "of-the-sentinel").start());
        right.join().unwrap().wait_for_storage("redis");
        none.join().unwrap().wait_for_log(&format!("sentinel {at}: it wants a password: NOAUTH"));
    });
}
