//! What stands in Redis: exactly the keys of the contract, for exactly as long.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::clock::now_ms;
use crate::support::csr::Csr;
use crate::support::instance::{self, ADMIN_KEY, Device, ONBOARDING_KEY};
use crate::support::proxy::Proxy;
use crate::support::redis::{PASSWORD, Redis, USER, rights};
use crate::support::service::{Service, Setup};
use crate::support::{check_error, token, wait};

const TTL_S: i64 = 300;
const PREFIX: &str = "mqtt-lite:";

#[test]
fn after_onboarding() {
    let redis = Redis::start(&[]);
    let service = with(&redis, &[]);
    let compact = service.token("device-001");
    let (token_key, claim) = (format!("mqtt-lite:token:{compact}"), "mqtt-lite:device:device-001");
    wait_for_keys(&redis, PREFIX, &["mqtt-lite:ca", claim, "mqtt-lite:live", &token_key]);

    let exp_ms = token::claims_of(&compact)["exp"].as_u64().unwrap() * 1000;
    let value: Value = serde_json::from_str(&redis.cli(&["GET", &token_key])).unwrap();
    assert_eq!(value, json!({"deviceId": "device-001", "token": compact, "expiresAt": exp_ms}));
    let raw = redis.cli(&["GET", &token_key]);
    assert_eq!(crate::support::fields(&raw), ["deviceId", "token", "expiresAt"]);
    assert_eq!(redis.cli(&["GET", claim]), compact);
    for key in [&*token_key, claim] {
        let left = redis.pttl(key);
        assert!((TTL_S * 1000 - 5000..=TTL_S * 1000).contains(&left), "{key}: {left} ms");
        let ends = now_ms() + u64::try_from(left).unwrap();
        assert!(
            ends.abs_diff(exp_ms) <= 1500,
            "{key} ends {} ms off the token",
            ends.abs_diff(exp_ms)
        );
    }
    assert_eq!(redis.cli(&["ZRANGE", "mqtt-lite:live", "0", "-1"]), token::live_member(&compact));
    let score: f64 =
        redis.cli(&["ZSCORE", "mqtt-lite:live", &token::live_member(&compact)]).parse().unwrap();
    assert!((score - exp_ms as f64).abs() < 1500.0, "{score} {exp_ms}");

    let der = token::pem_to_der(&service.read("ca/root-ca.crt"));
    let fingerprint = redis.cli(&["GET", "mqtt-lite:ca"]).to_lowercase().replace(':', "");
    assert_eq!(fingerprint, token::sha256_hex(&der));
    assert_eq!(redis.pttl("mqtt-lite:ca"), -1, "for good");
}

#[test]
fn after_use() {
    let redis = Redis::start(&[]);
    let service = with(&redis, &[]);
    let compact = service.token("d");
    wait::for_true("it is counted", || redis.exists("mqtt-lite:live"));
    let signed = service.sign(&compact, &Csr::new("d").make());
    assert_eq!(signed.status, 200, "{}", signed.text());
    let mark = format!("mqtt-lite:{}", token::mark_of(&compact));
    let [value, holder] = CERTIFICATE.map(|name| format!("{PREFIX}{name}"));
    wait_for_keys(&redis, PREFIX, &["mqtt-lite:ca", &mark, &value, &holder]);
    assert_eq!(redis.cli(&["GET", &holder]), signed.field("serial_number"));
    let left = redis.pttl(&holder);
    assert!((595_000..=600_000).contains(&left), "{left} ms");

    let value = redis.cli(&["GET", &mark]);
    let (name, serial) = value.split_once(' ').unwrap();
    assert_eq!(name, instance::id(&service));
    assert!(name.len() >= 22, "128 random bits: {name}");
    assert_eq!(serial.to_lowercase(), signed.field("serial_number"));
    let left = redis.pttl(&mark);
    assert!(((TTL_S + 60) * 1000 - 5000..=(TTL_S + 60) * 1000).contains(&left), "{left} ms");
}

#[test]
fn the_mark_lives_for_the_whole_lifetime_counted_from_the_mark() {
    let redis = Redis::start(&[]);
    let service = with(&redis, &[("JWT_SECRET", token::SECRET)]);
    let now = crate::support::clock::now_s();
    // Issued 200 s ago for 300 s: 100 s are left, the mark still gets 360.
    let claims =
        json!({"device_id": "d", "type": "provisioning", "iat": now - 200, "exp": now + 100});
    let compact = token::sign(token::SECRET, token::HEADER, &claims.to_string());
    token::plant_token(&redis, "d", &compact, now + 100);
    assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
    let left = redis.pttl(&format!("mqtt-lite:{}", token::mark_of(&compact)));
    assert!((355_000..=360_000).contains(&left), "{left} ms");
}

/// By a clock that was ahead; the token lives until it ends by the right one.
#[test]
fn the_mark_of_a_token_of_the_future_outlives_it() {
    let redis = Redis::start(&[]);
    let service = with(&redis, &[("JWT_SECRET", token::SECRET)]);
    let now = crate::support::clock::now_s();
    let claims =
        json!({"device_id": "d", "type": "provisioning", "iat": now + 600, "exp": now + 900});
    let compact = token::sign(token::SECRET, token::HEADER, &claims.to_string());
    token::plant_token(&redis, "d", &compact, now + 900);
    assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
    let left = redis.pttl(&format!("mqtt-lite:{}", token::mark_of(&compact)));
    assert!((955_000..=960_000).contains(&left), "{left} ms");
}

#[test]
fn after_replacement() {
    const KEY: &str = "onboarding-key-0001";
    let redis = Redis::start(&[]);
    let service = with(&redis, &[("ONBOARDING_API_KEY", KEY)]);
    let issue = |replace: bool| {
        let headers = [("Authorization", &*format!("Bearer {KEY}"))];
        let body = json!({"device_id": "d", "replace": replace});
        service.http.post_with("/api/v1/onboarding", &headers, &body).field("provisioning_token")
    };
    let (old, new) = (issue(false), issue(true));
    let (mark, new_key) =
        (format!("mqtt-lite:{}", token::mark_of(&old)), format!("mqtt-lite:token:{new}"));
    let row = format!("mqtt-lite:devices:{}", &token::sha256_hex(b"d")[..2]);
    wait_for_keys(
        &redis,
        PREFIX,
        &["mqtt-lite:ca", "mqtt-lite:device:d", &row, "mqtt-lite:live", &new_key, &mark],
    );
    assert_eq!((redis.cli(&["HKEYS", &row]), redis.pttl(&row)), ("d".to_owned(), -1));
    assert_eq!(redis.cli(&["GET", "mqtt-lite:device:d"]), new);
    assert_eq!(redis.cli(&["GET", &mark]), instance::mark(&service, "killed"));
    wait::for_true("only the new one is counted", || {
        redis.cli(&["ZRANGE", "mqtt-lite:live", "0", "-1"]) == token::live_member(&new)
    });
}

#[test]
fn expired_keys_leave_by_themselves() {
    let redis = Redis::start(&[]);
    let service = with(&redis, &[("PROVISIONING_TOKEN_TTL", "3")]);
    let compact = service.token("d");
    assert!((1..=3000).contains(&redis.pttl(&format!("mqtt-lite:token:{compact}"))));
    wait::for_true("token and claim are gone", || {
        !redis.keys().iter().any(|k| k.contains(":token:") || k.contains(":device:"))
    });
}

#[test]
fn prefixes() {
    let check = |prefix: &str| {
        let redis = Redis::start(&[]);
        let service = with(&redis, &[("REDIS_KEY_PREFIX", prefix)]);
        let compact = service.token("d");
        let other = service.token("e");
        assert_eq!(service.sign(&other, &Csr::new("e").make()).status, 200);
        let (key, mark) = (format!("token:{compact}"), token::mark_of(&other));
        let names = ["ca", "device:d", "live", &key, &mark, "certs:*", "holder:e"];
        let keys: Vec<String> = names.iter().map(|name| format!("{prefix}{name}")).collect();
        wait_for_keys(&redis, prefix, &keys.iter().map(String::as_str).collect::<Vec<_>>());
    };
    check("mqtt-lite:");
    check("");
    check("site-7/");
}

#[test]
fn a_database_of_its_own() {
    let redis = Redis::start(&[]);
    let url = format!("{}/3", redis.url());
    let port = redis.port().to_string();
    for env in [
        vec![("REDIS_URL", &*url)],
        vec![("REDIS_HOST", "127.0.0.1"), ("REDIS_PORT", &*port), ("REDIS_DB", "3")],
    ] {
        let service = Setup::new().envs(&env).start();
        service.wait_for_storage("redis");
        service.token("d");
        assert!(redis.keys_of("3").contains(&"mqtt-lite:device:d".to_owned()));
        assert!(redis.keys().is_empty(), "nothing in database 0");
        redis.cli(&["FLUSHALL"]);
    }
}

#[test]
fn only_commands_that_any_redis_allows() {
    const KEY: &str = "onboarding-key-0001";
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let env = [("REDIS_URL", &*proxy.url()), ("ONBOARDING_API_KEY", KEY)];
    let service = Setup::new().envs(&env).start();
    service.wait_for_storage("redis");
    let issue = |replace: bool| {
        let headers = [("Authorization", &*format!("Bearer {KEY}"))];
        let body = json!({"device_id": "d", "replace": replace});
        service.http.post_with("/api/v1/onboarding", &headers, &body).field("provisioning_token")
    };
    let _ = (issue(false), issue(false), service.health());
    let compact = issue(true);
    let csr = Csr::new("d").make();
    assert_eq!(service.sign(&compact, &csr).status, 200);
    check_error(&service.sign(&compact, &csr), 401, "TOKEN_ALREADY_USED", "again");
    wait::for_true("it is cleaned up", || !redis.exists(&format!("mqtt-lite:token:{compact}")));
    let commands = proxy.commands();
    assert!(commands.iter().any(|c| c[0].eq_ignore_ascii_case("SET")), "{commands:?}");
    for words in &commands {
        let name = words[0].to_uppercase();
        let forbidden =
            ["KEYS", "SCAN", "MULTI", "EXEC", "WATCH", "GETDEL", "GETEX", "COPY", "LMPOP"];
        assert!(!forbidden.contains(&&*name), "{name}");
        match &*name {
            "EVAL" | "EVALSHA" => assert_eq!(words[2], "1", "a script names one key: {words:?}"),
            "DEL" | "EXISTS" | "UNLINK" => assert_eq!(words.len(), 2, "one key: {words:?}"),
            _ => {}
        }
    }
}

#[test]
fn a_user_who_may_only_do_what_is_needed() {
    let redis =
        Redis::with_acl("devices", "p4ssw0rd", "~mqtt-lite:* +@all -@dangerous -@admin +eval");
    let port = redis.port().to_string();
    let env = [
        ("REDIS_HOST", "127.0.0.1"),
        ("REDIS_PORT", &*port),
        ("REDIS_USERNAME", "devices"),
        ("REDIS_PASSWORD", "p4ssw0rd"),
    ];
    let service = Setup::new().envs(&env).start();
    service.wait_for_storage("redis");
    let compact = service.token("d");
    assert!(redis.exists("mqtt-lite:device:d"));
    assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
    wait::for_true("it is cleaned up", || !redis.exists(&format!("mqtt-lite:token:{compact}")));
}

/// The line of docs/redis.md, with and without the right of which it says that it may be left out.
#[test]
fn the_rights_that_the_page_names_are_enough() {
    let rules = rights();
    assert!(rules.iter().any(|rule| rule == "+info"), "{rules:?}");
    let without: Vec<String> = rules.iter().filter(|rule| *rule != "+info").cloned().collect();
    for rules in [rules, without] {
        does_its_whole_work(&mut Redis::with_acl(USER, PASSWORD, &rules.join(" ")));
    }
}

/// Tokens that are issued, replaced, used and killed, a revocation, and a Redis that comes back empty.
#[track_caller]
fn does_its_whole_work(redis: &mut Redis) {
    let port = redis.port().to_string();
    let env = [
        ("REDIS_HOST", "127.0.0.1"),
        ("REDIS_PORT", &*port),
        ("REDIS_USERNAME", USER),
        ("REDIS_PASSWORD", PASSWORD),
        ("ONBOARDING_API_KEY", ONBOARDING_KEY),
        ("ADMIN_API_KEY", ADMIN_KEY),
        ("JWT_SECRET", token::SECRET),
    ];
    let service = Setup::new().envs(&env).start();
    service.wait_for_storage("redis");
    let [one, two] = ["one", "two"].map(Device::new);
    let first = instance::token(&service, &one);
    check_error(&instance::onboard(&service, &one), 409, "TOKEN_ALREADY_ACTIVE", "a live token");
    let second = instance::issued(&service, &instance::replace(&service, &one));
    let killed = instance::redeem(&service, &first, &one);
    check_error(&killed, 401, "TOKEN_ALREADY_USED", "replaced");
    assert_eq!(instance::redeem(&service, &second, &one).status, 200, "{}", service.log());
    let used = instance::redeem(&service, &second, &one);
    check_error(&used, 401, "TOKEN_ALREADY_USED", "used");
    let kept = instance::token(&service, &two);
    assert_eq!(service.token_count(), 1);

    redis.kill9();
    instance::notice_loss(&service);
    redis.start_again();
    service.wait_for_storage("redis");
    assert!(redis.exists(&format!("mqtt-lite:{}", token::mark_of(&second))), "carried over");
    assert_eq!(instance::redeem_patiently(&service, &kept, &two).status, 200, "{}", service.log());
    for device in [&one, &two] {
        assert_eq!(instance::revoke(&service, device).status, 200, "{}", service.log());
    }
    assert!(!service.log().contains("NOPERM"), "{}", service.log());
}

/// Nothing locks a device out: a claim whose token is gone, or marked for long, is taken over when
/// it is older than twice `REDIS_TIMEOUT_MS`; until then another instance may still be at work.
#[test]
fn claims_that_are_stale_and_claims_that_are_not() {
    let redis = Redis::start(&[]);
    let service = with(&redis, &[("JWT_SECRET", token::SECRET), ("REDIS_TIMEOUT_MS", "400")]);
    let (gone, good) = (token::plant(&redis, "gone", 300), token::plant(&redis, "good", 300));
    let (fresh, old) = (token::plant(&redis, "fresh", 300), token::plant(&redis, "old", 300));
    redis.cli(&["DEL", &format!("mqtt-lite:token:{gone}")]);
    let mark = |compact: &str, left_ms: &str| {
        let key = format!("mqtt-lite:{}", token::mark_of(compact));
        redis.cli(&["SET", &key, "AAAAAAAAAAAAAAAAAAAAAA 4a", "PX", left_ms]);
    };
    mark(&fresh, "355000"); // 5 s ago, of 300 s and 60 s
    mark(&old, "325000"); // 35 s ago
    // `plant` gives whole seconds, so make the claims young.
    for (device, compact) in [("gone", &gone), ("old", &old)] {
        redis.cli(&["SET", &format!("mqtt-lite:device:{device}"), compact, "PX", "300000"]);
        check_error(&service.onboard(device), 409, "TOKEN_ALREADY_ACTIVE", "a young claim");
    }
    for device in ["gone", "old"] {
        let won = wait::until(Duration::from_secs(5), || {
            (service.onboard(device).status == 200).then_some(())
        });
        assert!(won.is_some(), "{device} is locked out: {}", service.onboard(device).text());
    }
    assert_ne!(redis.cli(&["GET", "mqtt-lite:device:gone"]), gone);
    for device in ["good", "fresh"] {
        check_error(&service.onboard(device), 409, "TOKEN_ALREADY_ACTIVE", device);
    }
    assert_eq!(service.sign(&good, &Csr::new("good").make()).status, 200);
    check_error(
        &service.sign(&fresh, &Csr::new("fresh").make()),
        401,
        "TOKEN_ALREADY_USED",
        "marked",
    );
}

/// The older service kept no set of its tokens: they are left out of the count, before and after.
#[test]
fn what_the_older_service_issued_is_not_counted() {
    let redis = Redis::start(&[]);
    let service = with(&redis, &[("JWT_SECRET", token::SECRET)]);
    let old = token::plant(&redis, "old", 300);
    assert_eq!(service.token_count(), 0);
    service.token("new");
    wait::for_true("ours is counted", || service.token_count() == 1);
    check_error(&service.onboard("old"), 409, "TOKEN_ALREADY_ACTIVE", "it is live all the same");
    assert_eq!(service.sign(&old, &Csr::new("old").make()).status, 200);
    wait::for_true("it is cleaned up", || !redis.exists("mqtt-lite:device:old"));
    assert_eq!(service.token_count(), 1);
}

/// The clock of Redis was set back, or ours was corrected: the lease outlives its token.
#[test]
fn a_lease_whose_token_has_ended_is_taken_over() {
    let redis = Redis::start(&[]);
    let service = with(&redis, &[("JWT_SECRET", token::SECRET)]);
    let now = crate::support::clock::now_s();
    let claims =
        json!({"device_id": "d", "type": "provisioning", "iat": now - 400, "exp": now - 100});
    let ended = token::sign(token::SECRET, token::HEADER, &claims.to_string());
    token::plant_token(&redis, "d", &ended, now + 86_000);
    let answer = service.onboard("d");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let compact = answer.field("provisioning_token");
    assert_eq!(redis.cli(&["GET", "mqtt-lite:device:d"]), compact);
    check_error(&service.onboard("d"), 409, "TOKEN_ALREADY_ACTIVE", "the new one is live");
    assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
}

/// Two instances whose clocks are a day apart count alike, by the clock of Redis.
#[test]
fn a_wrong_clock_makes_no_phantoms() {
    let redis = Redis::start(&[]);
    let clock = crate::support::clock::FakeClock::at(crate::support::clock::now_s() + 86_400);
    let fake = clock.env();
    let fake: Vec<(&str, &str)> = fake.iter().map(|(name, value)| (*name, &**value)).collect();
    let right = with(&redis, &[("PROVISIONING_TOKEN_TTL", "3"), ("JWT_SECRET", token::SECRET)]);
    let ahead = Setup::new().envs(&fake).envs(&[
        ("REDIS_URL", &redis.url()),
        ("PROVISIONING_TOKEN_TTL", "3"),
        ("JWT_SECRET", token::SECRET),
    ]);
    let ahead = ahead.share_ca(&right).start();
    ahead.wait_for_storage("redis");
    let issued = std::time::Instant::now();
    right.token("by-the-right-one");
    ahead.token("by-the-one-ahead");
    for service in [&right, &ahead] {
        wait::for_true("both are counted", || service.token_count() == 2);
    }
    assert!(issued.elapsed() < Duration::from_secs(3));
    for service in [&right, &ahead] {
        wait::for_true("both have ended", || service.token_count() == 0);
    }
    assert!(issued.elapsed() < Duration::from_secs(6), "{:?}", issued.elapsed());
}

/// What has ended is pruned at least as fast as tokens come.
#[test]
fn the_set_of_live_tokens_does_not_grow() {
    const OLD: u64 = 4000;
    let redis = Redis::start(&[]);
    let service = with(&redis, &[]);
    let ended = (crate::support::clock::now_ms() - 7_200_000).to_string();
    redis.pipe(|out| {
        for n in 0..OLD {
            let member = format!("{n:022}");
            crate::support::redis::resp(out, &["ZADD", "mqtt-lite:live", &ended, &member]);
        }
    });
    for n in 0..OLD / 2 {
        service.token(&format!("d{n}"));
    }
    let left = || redis.cli(&["ZCOUNT", "mqtt-lite:live", "-inf", &ended]).parse::<u64>().unwrap();
    assert!(left() < OLD / 8, "{} of {OLD} are left", left());
    let young = (crate::support::clock::now_ms() - 1_800_000).to_string();
    redis.cli(&["ZADD", "mqtt-lite:live", &young, "half-an-hour"]);
    (0..300).for_each(|n| drop(service.token(&format!("e{n}"))));
    assert_eq!(redis.cli(&["ZSCORE", "mqtt-lite:live", "half-an-hour"]), young, "it is kept");
}

#[test]
fn using_a_token_does_not_free_the_claim_of_another() {
    let redis = Redis::start(&[]);
    let service = with(&redis, &[("JWT_SECRET", token::SECRET)]);
    let claims = token::claims("d", 299).to_string();
    let one = token::sign(token::SECRET, token::HEADER, &claims);
    token::plant_token(&redis, "d", &one, crate::support::clock::now_s() + 299);
    let two = token::plant(&redis, "d", 300);
    assert_eq!(service.sign(&one, &Csr::new("d").make()).status, 200);
    wait::for_true("it is cleaned up", || !redis.exists(&format!("mqtt-lite:token:{one}")));
    // The claim would have gone ahead of it.
    assert_eq!(redis.cli(&["GET", "mqtt-lite:device:d"]), two);
    assert!(redis.exists(&format!("mqtt-lite:token:{two}")));
}

fn with(redis: &Redis, env: &[(&str, &str)]) -> Service {
    let service = Setup::new().envs(env).env("REDIS_URL", &redis.url()).start();
    service.wait_for_storage("redis");
    service
}

/// What every instance that shares its record has there; the rest of each name is the CA's.
const SHARED: [&str; 3] = ["changes:*", "instance:*", "share:*"];
/// What a certificate adds to that.
const CERTIFICATE: [&str; 2] = ["certs:*", "holder:d"];

/// Waits until exactly these keys are in Redis, and those of the record: what may be done later, is
/// done later.
#[track_caller]
fn wait_for_keys(redis: &Redis, prefix: &str, expected: &[&str]) {
    let of_the_record = SHARED.iter().map(|name| format!("{prefix}{name}"));
    let mut expected: Vec<String> =
        expected.iter().map(|name| (*name).to_owned()).chain(of_the_record).collect();
    expected.sort_unstable();
    let fits = |key: &String, expected: &String| match expected.strip_suffix('*') {
        Some(begin) => key.starts_with(begin),
        None => key == expected,
    };
    let same = wait::until(Duration::from_secs(3), || {
        let keys = redis.keys();
        let fit = keys.iter().zip(&expected).all(|(key, expected)| fits(key, expected));
        (fit && keys.len() == expected.len()).then_some(())
    });
    assert!(same.is_some(), "keys are {:#?}, expected {expected:#?}", redis.keys());
}

/// Of what is only counted it costs the count, also at a start.
#[test]
fn a_key_of_another_type_costs_its_own_request_only() {
    use crate::support::service::ADMIN_KEY;
    let redis = Redis::start(&[]);
    let env = [("REDIS_URL", &*redis.url()), ("ADMIN_API_KEY", ADMIN_KEY)];
    let mut service = Setup::new().envs(&env).start();
    redis.cli(&["SET", "mqtt-lite:live", "x"]);
    for n in [1, 2] {
        let device = format!("counted-{n}");
        service.enroll(&device, &Csr::new(&device).make());
        assert_eq!(service.revoke(&device).status, 200, "{}", service.log());
        let health = service.health();
        assert_eq!(
            (&health["storage"], &health["redis"]["tokenCount"]),
            (&json!("redis"), &json!(0))
        );
        let log = service.log();
        assert_eq!(log.matches("live tokens are not counted: ").count(), n, "{log}");
        service.terminate();
        service.restart();
        service.wait_for_storage("redis");
    }
    redis.cli(&["LPUSH", "mqtt-lite:device:e", "x"]);
    check_error(&service.onboard("e"), 503, "SERVICE_UNAVAILABLE", "the claim is a list");
    let key = format!("Bearer {ADMIN_KEY}");
    let path = "/api/v1/certificates/e";
    let answer = service.http.request("DELETE", path, &[("Authorization", &key)], b"");
    check_error(&answer, 503, "SERVICE_UNAVAILABLE", "whether it has a token is not known");
    let put = |blocked| {
        let headers = [("Authorization", &*key), ("Content-Type", "application/json")];
        let body = json!({"blocked": blocked}).to_string();
        let path = "/api/v1/devices/b";
        let answer = service.http.request("PUT", path, &headers, body.as_bytes());
        (answer.status, answer.json()["shared"].clone())
    };
    assert_eq!(put(true), (200, json!(true)));
    for rows in redis.keys().iter().filter(|key| key.starts_with("mqtt-lite:devices:")) {
        redis.cli(&["DEL", rows]);
        redis.cli(&["LPUSH", rows, "x"]);
    }
    assert_eq!(put(false), (200, json!(false)), "nobody else can read of it");
    assert_eq!(service.health()["storage"], "redis", "one bad key is no outage");
}
