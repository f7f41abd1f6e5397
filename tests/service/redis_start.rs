//! How Redis is reached, what is said when it is not, and that nobody waits for it meanwhile.

use std::time::{Duration, Instant};

use crate::support::csr::Csr;
use crate::support::port::Port;
use crate::support::proxy::{Mode, Proxy};
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::{check_error, wait};

#[test]
fn ways_in() {
    let check = |redis: &Redis, env: &[(&str, &str)]| {
        let service = Setup::new().envs(env).start();
        let ok = wait::until(Duration::from_secs(5), || {
            (service.health()["storage"] == "redis").then_some(())
        });
        assert!(ok.is_some(), "{env:?}:\n{}", service.log());
        let compact = service.token("d");
        assert!(redis.exists("mqtt-lite:device:d"), "{env:?}");
        assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
        redis.cli(&["FLUSHALL"]);
    };
    let redis = Redis::start(&[]);
    let port = redis.port().to_string();
    check(&redis, &[("REDIS_URL", &redis.url())]);
    check(&redis, &[("REDIS_URI", &redis.url())]);
    check(&redis, &[("REDIS_HOST", "localhost"), ("REDIS_PORT", &port)]);
    check(&redis, &[("REDIS_URL", &redis.url()), ("REDIS_HOST", "192.0.2.1"), ("REDIS_PORT", "1")]);

    // A password is taken as it is: in its own variable nothing needs escaping.
    let password = "p@ss:w/rd%41 #?&";
    let redis = Redis::with_password(password);
    let port = redis.port().to_string();
    check(
        &redis,
        &[("REDIS_HOST", "127.0.0.1"), ("REDIS_PORT", &port), ("REDIS_PASSWORD", password)],
    );
    let file = crate::support::temp::TempDir::new().keep_file("password", &format!("{password}\n"));
    let file = file.path().display().to_string();
    check(
        &redis,
        &[("REDIS_HOST", "127.0.0.1"), ("REDIS_PORT", &port), ("REDIS_PASSWORD_FILE", &file)],
    );
    let url = format!("redis://:p%40ss%3Aw%2Frd%2541%20%23%3F%26@127.0.0.1:{port}");
    check(&redis, &[("REDIS_URL", &url)]);

    let redis = Redis::with_acl("device", "pw-of-device", "~* &* +@all");
    let url = format!("redis://device:pw-of-device@127.0.0.1:{}", redis.port());
    check(&redis, &[("REDIS_URL", &url)]);
}

#[test]
fn by_tls_with_a_private_ca() {
    let redis = Redis::with_tls();
    let (port, ca) = (redis.port().to_string(), redis.tls_ca());
    for env in [
        vec![("REDIS_URL", redis.url()), ("REDIS_TLS_CA", ca.clone())],
        vec![
            ("REDIS_HOST", "localhost".to_owned()),
            ("REDIS_PORT", port),
            ("REDIS_TLS", "true".to_owned()),
            ("REDIS_TLS_CA", ca),
        ],
    ] {
        let env: Vec<(&str, &str)> = env.iter().map(|(n, v)| (*n, &**v)).collect();
        let service = Setup::new().envs(&env).start();
        service.wait_for_storage("redis");
        service.token("d");
        assert!(redis.exists("mqtt-lite:device:d"));
        redis.cli(&["FLUSHALL"]);
    }
}

#[test]
fn what_keeps_it_out_is_said() {
    let plain = Redis::start(&[]);
    let locked = Redis::with_password("right-password");
    let tls = Redis::with_tls();
    let hung = Redis::start(&[]);
    let _stopped = hung.stop();
    let (tls_to_plain, other_ca) =
        (format!("rediss://127.0.0.1:{}", plain.port()), Redis::with_tls());
    let wrong = format!("redis://:wrong-password@127.0.0.1:{}", locked.port());
    let nobody = Port::any();
    let closed = format!("redis://127.0.0.1:{}", nobody.number());
    let (tls_url, tls_ca) = (tls.url(), other_ca.tls_ca());
    let check = |env: &[(&str, &str)], words: &[&str]| {
        let begin = Instant::now();
        let service = Setup::new().envs(env).env("REDIS_CONNECT_TIMEOUT_MS", "700").start();
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(4), "{env:?}: the start waited {took:?}");
        let log = service.wait_for_log("Failed to connect to Redis: ");
        let reason =
            log.split("Failed to connect to Redis: ").nth(1).unwrap().lines().next().unwrap();
        let lower = reason.to_lowercase();
        assert!(words.iter().any(|w| lower.contains(w)), "{env:?}: {reason}");
        assert!(!service.log().contains("wrong-password"), "{}", service.log());
        service.wait_for_log("⚠️  Provisioning tokens will not be persistent");
        service.wait_for_log("(In-Memory)");
        let health = service.health();
        assert_eq!((&health["status"], &health["storage"]), (&"degraded".into(), &"memory".into()));
        assert_eq!(
            (&health["redis"]["enabled"], &health["redis"]["connected"]),
            (&true.into(), &false.into())
        );
        let compact = service.token("d");
        assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
        reason.to_owned()
    };
    let mut reasons = vec![
        check(&[("REDIS_URL", &wrong)], &["wrongpass", "password", "authentication"]),
        check(&[("REDIS_URL", &closed)], &["refused"]),
        check(&[("REDIS_URL", &hung.url())], &["timed out", "timeout", "time-out", "no answer"]),
        check(
            &[("REDIS_URL", "redis://no-such-host.invalid:6379")],
            &["resolve", "lookup", "name", "address"],
        ),
        check(&[("REDIS_URL", &tls_to_plain)], &["tls", "ssl"]),
        check(
            &[("REDIS_URL", &tls_url), ("REDIS_TLS_CA", &tls_ca)],
            &["certificate", "issuer", " ca"],
        ),
    ];
    reasons.sort();
    reasons.dedup();
    assert_eq!(reasons.len(), 6, "each says which of these it is: {reasons:#?}");
}

#[test]
fn it_is_found_when_it_comes() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    proxy.set(Mode::Refuse);
    let service = Setup::new().env("REDIS_URL", &proxy.url()).start();
    assert_eq!(service.health()["storage"], "memory");
    let compact = service.token("early");
    proxy.set(Mode::Pass);
    service.wait_for_storage("redis");
    assert_eq!(service.health()["status"], "ok");
    check_error(&service.onboard("early"), 409, "TOKEN_ALREADY_ACTIVE", "it was carried over");
    wait::for_true("it is in Redis", || redis.exists("mqtt-lite:device:early"));
    assert_eq!(service.sign(&compact, &Csr::new("early").make()).status, 200);
}

#[test]
fn losing_it_while_serving_neither_crashes_nor_hangs() {
    let mut redis = Redis::start(&[]);
    let service = with(&redis);
    let (before, csr) = (service.token("before"), Csr::new("before").make());
    let mark = service.log().len();
    redis.kill9();
    for n in 0..20 {
        let begin = Instant::now();
        let answer = service.onboard(&format!("during-{n}"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(begin.elapsed() < Duration::from_millis(1500), "{n}: {:?}", begin.elapsed());
    }
    service.wait_for_storage("memory");
    let answer = wait::until(Duration::from_secs(3), || {
        Some(service.sign(&before, &csr)).filter(|a| a.status == 200)
    });
    assert!(answer.is_some(), "a token of this instance can be consumed during the outage");
    check_error(&service.sign(&before, &csr), 401, "TOKEN_ALREADY_USED", "once");
    let warnings =
        service.log()[mark..].lines().filter(|l| l.contains("WARN") && l.contains("Redis")).count();
    assert_eq!(warnings, 1, "one warning, not one per request: {}", &service.log()[mark..]);
    redis.start_again();
    service.wait_for_storage("redis");
    check_error(&service.sign(&before, &csr), 401, "TOKEN_ALREADY_USED", "after the return");
    check_error(&service.onboard("during-0"), 409, "TOKEN_ALREADY_ACTIVE", "after the return");
}

#[test]
fn a_hung_redis_costs_its_time_out_at_most_and_only_once() {
    let redis = Redis::start(&[]);
    let service = with(&redis);
    let stopped = redis.stop();
    let begin = Instant::now();
    assert_eq!(service.onboard("first").status, 200);
    assert!(begin.elapsed() < Duration::from_millis(1500), "{:?}", begin.elapsed());
    service.wait_for_storage("memory");
    let begin = Instant::now();
    for n in 0..10 {
        assert_eq!(service.onboard(&format!("later-{n}")).status, 200);
    }
    assert!(begin.elapsed() < Duration::from_millis(500), "ten took {:?}", begin.elapsed());
    drop(stopped);
    service.wait_for_storage("redis");
}

#[test]
fn a_policy_that_may_drop_marks_is_warned_of() {
    let redis = Redis::start(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]);
    let service = with(&redis);
    let log = service.log();
    assert!(log.lines().any(|l| l.contains("WARN") && l.contains("noeviction")), "{log}");
    let redis = Redis::start(&[]);
    assert!(!with(&redis).log().contains("noeviction"));
}

#[test]
fn connections_are_few() {
    let redis = Redis::start(&[]);
    let service = with(&redis);
    std::thread::scope(|scope| {
        for n in 0..16 {
            let service = &service;
            scope.spawn(move || service.token(&format!("d{n}")));
        }
    });
    let clients = redis.cli(&["CLIENT", "LIST"]).lines().count() - 1; // without redis-cli's own
    println!("{clients} connections");
    assert!((1..=16).contains(&clients), "managed free tiers allow 30: {clients}");
}

fn with(redis: &Redis) -> Service {
    let service = Setup::new().env("REDIS_URL", &redis.url()).start();
    service.wait_for_storage("redis");
    service
}
