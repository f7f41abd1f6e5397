//! `/health` and `/ready`: right counts, quickly, however many tokens are live.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mqtt_publisher_lite::Metrics;
use mqtt_publisher_lite::Provisioner;
use mqtt_publisher_lite::api::{self, Api, Request};
use mqtt_publisher_lite::ca::Ca;
use mqtt_publisher_lite::ca::publisher::Publisher;
use mqtt_publisher_lite::clock;
use mqtt_publisher_lite::config::{self, Config};
use mqtt_publisher_lite::devices::Instance;
use mqtt_publisher_lite::devices::table::Devices;
use mqtt_publisher_lite::http::Method;
use mqtt_publisher_lite::jwt::Signer;
use mqtt_publisher_lite::share::{Mode, Sharing};
use mqtt_publisher_lite::store::ledger::Ledger;
use mqtt_publisher_lite::store::memory::Memory;

use crate::support::clock::now_ms;
use crate::support::csr::Csr;
use crate::support::redis::Redis;
use crate::support::service::{ADMIN_KEY, Service, Setup, as_any_user};
use crate::support::temp::TempDir;
use crate::support::{fields, on_both_stores, wait};

#[test]
fn the_answer_is_to_the_letter() {
    on_both_stores(&[], |service| {
        let answer = service.http.get("/health");
        assert_eq!(answer.status, 200);
        let order =
            ["status", "timestamp", "version", "uptime_seconds", "storage", "redis", "record"];
        assert_eq!(fields(&answer.text()), order);
        crate::support::check_timestamp(&answer);
        let json = answer.json();
        let text = answer.text();
        let inner = &text[text.find("\"redis\":{").unwrap() + 8..];
        let inner = &inner[..=inner.find('}').unwrap()];
        assert_eq!(fields(inner), ["enabled", "connected", "tokenCount", "deviceCount"]);
        assert!(text.contains(r#","record":{"shared":"#), "{text}");
        let keys: Vec<&String> = json["record"].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["behind_seconds", "ignored", "shared"]);
        let redis = json["storage"] == "redis";
        assert_eq!(json["record"]["shared"], redis);
        assert_eq!(json["status"], "ok");
        assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
        assert!(json["uptime_seconds"].as_u64().is_some_and(|s| s < 60), "{json}");
        assert_eq!(json["redis"]["enabled"], redis);
        assert_eq!(json["redis"]["connected"], redis);
        assert_eq!(service.http.get("/ready").status, 200);
    });
}

#[test]
fn counts_rise_and_fall() {
    on_both_stores(&[("PROVISIONING_TOKEN_TTL", "4")], |service| {
        let count = |expected: u64, what: &str| {
            let what = format!("{what}: {expected}\n{}", service.http.get("/health").text());
            let ok = wait::until(Duration::from_millis(1500), || {
                (service.token_count() == expected).then_some(())
            });
            assert!(ok.is_some(), "{what}");
            let health = service.health();
            assert_eq!(health["redis"]["tokenCount"], health["redis"]["deviceCount"]);
        };
        let request = Csr::new("d0").make();
        count(0, "none");
        let tokens: Vec<String> = (0..5).map(|n| service.token(&format!("d{n}"))).collect();
        let issued = Instant::now();
        count(5, "issued");
        let _ = service.onboard("d1");
        assert_eq!(service.sign(&tokens[0], &request).status, 200);
        count(4, "one is used");
        wait::for_true("they expire", || service.token_count() == 0);
        let took = issued.elapsed();
        assert!((3000..6000).contains(&took.as_millis()), "of a life of 4 s: {took:?}");
        count(0, "expired");
    });
}

#[test]
fn a_million_tokens_do_not_slow_it_down() {
    const TOKENS: usize = 1_000_000;
    let (empty, full) = (Redis::start(&[]), Redis::start(&[]));
    let services = [&empty, &full].map(|redis| {
        let service = Setup::new().env("REDIS_URL", &redis.url()).start();
        service.wait_for_storage("redis");
        service
    });
    let [_, service] = &services;
    let begin = Instant::now();
    fill(&full, TOKENS);
    println!("filled in {:?}", begin.elapsed());
    wait::for_true("all are counted", || service.token_count() == TOKENS as u64);
    // In turn: what else the machine does meanwhile, it does to both.
    let mut times = [vec![], vec![]];
    for _ in 0..200 {
        for (service, times) in services.iter().zip(&mut times) {
            let begin = Instant::now();
            assert_eq!(service.http.get("/health").status, 200);
            times.push(begin.elapsed());
        }
    }
    let [none, million] = times.map(|mut times| {
        times.sort();
        times[times.len() / 2]
    });
    println!("/health, median of 200: {none:?} with no token, {million:?} with {TOKENS}");
    assert!(million < none * 2 + Duration::from_millis(1), "{none:?} became {million:?}");
    service.token("one-more");
    wait::for_true("one more is counted", || service.token_count() == TOKENS as u64 + 1);
}

/// Live tokens in the layout of the contract, made by Redis itself; only the tokens are shorter than
/// real ones, and their members of `live` are no digests.
fn fill(redis: &Redis, count: usize) {
    const SCRIPT: &str = r#"
        for n = ARGV[1], ARGV[2] - 1 do
            local token = 'h.' .. n .. '.s'
            local value = string.format('{"deviceId":"m%d","token":"%s","expiresAt":%s}', n, token, ARGV[3])
            redis.call('SET', 'mqtt-lite:token:' .. token, value, 'PX', 3600000)
            redis.call('SET', 'mqtt-lite:device:m' .. n, token, 'PX', 3600000)
            redis.call('ZADD', 'mqtt-lite:live', ARGV[3], string.format('%022d', n))
        end"#;
    let ends = (now_ms() + 3_600_000).to_string();
    for first in (0..count).step_by(100_000) {
        let (first, end) = (first.to_string(), (first + 100_000).to_string());
        redis.cli(&["EVAL", SCRIPT, "0", &first, &end, &ends]);
    }
}

/// A folder that this user may not write to: known at the start, and after a request that failed.
#[test]
fn a_record_that_cannot_be_written_is_a_reason_until_it_can() {
    let mut service = Setup::new().wrapper(as_any_user()).start();
    let certs = service.data("ca/certs");
    let permit = |mode| fs::set_permissions(&certs, Permissions::from_mode(mode)).unwrap();
    let reason = |service: &Service| {
        let ready = service.http.get("/ready");
        let reasons = ready.json()["reasons"].to_string();
        (
            ready.status,
            reasons.contains("the record cannot be written") && reasons.contains("certs"),
        )
    };
    let (token, request) = (service.token("d"), Csr::new("d").make());
    permit(0o555);
    assert_eq!(service.http.get("/ready").status, 200, "nobody was refused yet");
    assert_eq!(service.sign(&token, &request).status, 503);
    assert_eq!(reason(&service), (503, true), "{}", service.log());
    service.terminate();
    service.restart();
    assert_eq!(reason(&service), (503, true), "at the start: {}", service.log());
    permit(0o755);
    wait::for_true("it is tried again", || service.http.get("/ready").status == 200);
    let log = service.wait_for_log("the record can be written again");
    assert_eq!(log.matches("ERROR the record cannot be written").count(), 2, "{log}");
    service.enroll("e", &Csr::new("e").make());
}

/// Nothing can be revoked then, nor blocked, replaced or registered.
#[test]
fn rows_that_cannot_be_written_are_a_reason_until_they_can() {
    let service = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY).start();
    service.enroll("d", &Csr::new("d").make());
    let (file, away) = (service.data("devices.txt"), service.data("away"));
    fs::rename(&file, &away).unwrap();
    fs::create_dir(&file).unwrap();
    assert_eq!(service.http.get("/ready").status, 200, "nobody was refused yet");
    assert_eq!(service.revoke("d").status, 503);
    let ready = service.http.get("/ready");
    let reasons = ready.json()["reasons"].to_string();
    assert_eq!(ready.status, 503);
    assert!(reasons.contains("the list of devices cannot be written"), "{reasons}");
    let log = service.wait_for_log("nothing was changed");
    assert_eq!(log.matches("ERROR the list of devices cannot be written").count(), 1, "{log}");
    fs::remove_dir(&file).unwrap();
    fs::rename(&away, &file).unwrap();
    wait::for_true("it is tried again", || service.http.get("/ready").status == 200);
    service.wait_for_log("the list of devices can be written again");
    assert_eq!(service.revoke("d").status, 200, "{}", service.log());
}

/// One for each lane is tiny_http's, and has the program's name; it keeps others for five seconds.
#[test]
fn an_idle_service_has_few_threads() {
    let service = Setup::new().env("RUST_LOG", "info").start();
    let names = || {
        let mut names = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{}/task", service.pid())).unwrap().flatten() {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            *names.entry(name.trim().to_owned()).or_insert(0) += 1;
        }
        names
    };
    let lanes = 4;
    let own = ["clock", "crl", "edge", "reaper", "signals"].map(|name| (name, 1));
    let many = [("mqtt-publisher-", 1 + lanes), ("worker", lanes)];
    let idle = own.into_iter().chain(many).map(|(name, count)| (name.to_owned(), count)).collect();
    let _ = wait::until(Duration::from_secs(10), || (names() == idle).then_some(()));
    assert_eq!(names(), idle);
    assert_eq!(service.onboard("d").status, 200);
    assert_eq!(names(), idle);
    let log = service.log();
    assert!(!log.contains("ERROR") && !log.contains("lane"), "{log}");
}

/// The program cannot be made to lose a lane for good from outside, so this asks the API alone.
#[test]
fn a_worker_that_cannot_be_reached_is_a_reason() {
    let dir = TempDir::new();
    let data = dir.path().to_path_buf();
    let setting = |name: &str| (name == "DATA_DIR").then(|| data.clone().into_os_string());
    let config = Config::from_lookup(setting, |path| std::fs::read(path)).unwrap();
    let settings =
        config::Ca { dir: dir.path().join("ca"), root_validity_years: 1, device_validity_days: 1 };
    std::fs::create_dir_all(&settings.dir).unwrap();
    let ca = Arc::new(Ca::open(&settings, clock::now()).unwrap());
    let ledger = Arc::new(Ledger::new(1));
    let metrics = Arc::new(Metrics::new(api::endpoints()));
    let devices = Devices::open(&dir.path().join("devices.txt"), Instance([0; 16]), clock::now());
    let devices = Arc::new(devices.unwrap());
    let signer = Signer::new(b"a secret of the test");
    let provisioner = Provisioner {
        store: Arc::new(Memory::new(
            1,
            Arc::clone(&ledger),
            Arc::clone(&devices) as _,
            signer.clone(),
        )),
        ledger,
        devices,
        publisher: Arc::new(Publisher::new(ca, None, None, None, Arc::clone(&metrics))),
        sharing: Arc::new(Sharing::new(Mode::Alone)),
        signer,
        rules: config.rules.clone(),
        metrics: Arc::clone(&metrics),
        spending: Default::default(),
    };
    let api = Api::new(Arc::new(provisioner), &config, Arc::clone(&metrics));
    let ready = || {
        let request = Request {
            method: Method::Get,
            path: "/ready".to_owned(),
            query: String::new(),
            authorization: None,
            content_type: None,
            accept: None,
            body: Vec::new(),
            client: [127, 0, 0, 1].into(),
            client_certificate: None,
        };
        let reply = api.answer(&[request]).replies.remove(0);
        (reply.status, String::from_utf8(reply.body).unwrap())
    };
    assert_eq!(ready().0, 200);
    metrics.edge.lanes_down.set(1);
    let (status, body) = ready();
    assert_eq!(status, 503, "{body}");
    assert!(body.contains(r#""reasons":["lanes to workers that cannot be used: 1"]"#), "{body}");
}
