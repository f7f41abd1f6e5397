//! One record over all instances: what one answers is true of the others within two seconds, whatever
//! happens to Redis meanwhile (SPEC 9). Rows r1 to r25 of the model (`docs/model`) on real servers.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::copies::Stops;
use crate::mosquitto;
use crate::support::device;
use crate::support::history::History;
use crate::support::http::Response;
use crate::support::instance::{
    self, ADMIN_KEY, Device, certificate, cut_off, onboard, reconnect, redeem, revoke, token,
};
use crate::support::load::Fleet;
use crate::support::mosquitto::Broker;
use crate::support::proxy::Proxy;
use crate::support::redis::Redis;
use crate::support::service::Service;
use crate::support::temp::TempDir;
use crate::support::{check_error, csr, https, wait};

/// In so much time an answer is true everywhere.
const SOON: Duration = Duration::from_secs(2);

/// Instances on one Redis with one CA, each with a folder of its own.
fn instances<const N: usize>(url: &str, env: &[(&str, &str)]) -> [Service; N] {
    let mut all = vec![instance::first(url, env)];
    for _ in 1..N {
        let another = instance::another(&all[0], url, env);
        all.push(another);
    }
    all.iter().for_each(wait_until_shared);
    all.try_into().ok().unwrap()
}

/// Instances on one Redis, each behind a proxy of its own.
fn behind_proxies<const N: usize>(redis: &Redis) -> ([Service; N], [Proxy; N]) {
    let proxies: [Proxy; N] = std::array::from_fn(|_| Proxy::start(redis.port()));
    let mut all = vec![instance::first(&proxies[0].url(), &[])];
    for proxy in &proxies[1..] {
        let another = instance::another(&all[0], &proxy.url(), &[]);
        all.push(another);
    }
    all.iter().for_each(wait_until_shared);
    (all.try_into().ok().unwrap(), proxies)
}

fn record(service: &Service) -> Value {
    service.health()["record"].clone()
}

/// Where it stands who shares.
fn share_key(redis: &Redis) -> String {
    redis.keys().into_iter().find(|key| key.starts_with("mqtt-lite:share:")).unwrap()
}

#[track_caller]
fn wait_until_shared(service: &Service) {
    let shared =
        wait::until(Duration::from_secs(15), || (record(service)["shared"] == true).then_some(()));
    assert!(shared.is_some(), "{}\n{}", record(service), service.log());
}

/// Enrols the device at this instance, as soon as its last token is out of the way.
#[track_caller]
fn enrol(service: &Service, device: &Device) -> String {
    let answer = onboard_soon(service, device);
    assert_eq!(answer.status, 200, "{}\n{}", answer.text(), service.log());
    certificate(service, &answer.field("provisioning_token"), device)
}

/// The answer to an onboarding once the lease of the device is free, and it can be decided.
fn onboard_soon(service: &Service, device: &Device) -> Response {
    let answer = wait::until(Duration::from_secs(10), || {
        let answer = onboard(service, device);
        let later = answer.status == 503 || answer.text().contains("TOKEN_ALREADY_ACTIVE");
        (!later).then_some(answer)
    });
    answer.unwrap()
}

/// `active`, `revoked`, `expired`, or nothing.
fn status(service: &Service, device: &str) -> Option<String> {
    let answer = service.http.get(&format!("/api/v1/certificates/{device}/status"));
    (answer.status == 200).then(|| answer.field("status"))
}

/// The serials that the instance's own list names, as OpenSSL reads it.
fn listed(service: &Service) -> BTreeSet<String> {
    let list = service.data("ca/crl.pem").display().to_string();
    let text = csr::openssl(&["crl", "-noout", "-text", "-in", &list], "");
    let serial = |line: &str| Some(line.trim().strip_prefix("Serial Number: ")?.to_lowercase());
    text.lines().filter_map(serial).collect()
}

/// All that the instance knows: serial, device, and whether it is revoked.
fn known(service: &Service) -> BTreeSet<(String, String, bool)> {
    let row = |line: Vec<String>| (line[3].clone(), line[5].clone(), line[0] == "R");
    service.index().into_iter().map(row).collect()
}

#[track_caller]
fn soon(what: &str, services: &[&Service], holds: impl Fn(&Service) -> bool) {
    within(SOON, what, services, holds);
}

#[track_caller]
fn within(limit: Duration, what: &str, services: &[&Service], holds: impl Fn(&Service) -> bool) {
    for (number, service) in services.iter().enumerate() {
        let held = wait::until(limit, || holds(service).then_some(()));
        assert!(held.is_some(), "{number} in {limit:?}: {what}\n{}", service.log());
    }
}

/// Their records are the same, and hold these devices with these states.
#[track_caller]
fn agree(services: &[&Service], expected: &[(&str, &str)]) {
    within(Duration::from_secs(10), "the states", services, |service| {
        expected.iter().all(|(device, state)| status(service, device).as_deref() == Some(state))
    });
    within(Duration::from_secs(10), "one record", services, |service| {
        known(service) == known(services[0])
    });
    let revoked = known(services[0]).iter().filter(|(.., revoked)| *revoked).count();
    soon("one list", services, |service| listed(service) == listed(services[0]));
    assert_eq!(listed(services[0]).len(), revoked);
}

#[test]
fn the_reason_of_a_revocation_stands_in_every_list() {
    let redis = Redis::start(&[]);
    let all: [Service; 2] = instances(&redis.url(), &[]);
    let ask = |service: &Service, path: &str, reason: &str| {
        let bearer = format!("Bearer {ADMIN_KEY}");
        let headers = [("Authorization", &*bearer), ("Content-Type", "application/json")];
        let body = format!(r#"{{"reason":{reason}}}"#);
        service.http.request("DELETE", &format!("/api/v1/{path}"), &headers, body.as_bytes())
    };
    for (n, reason) in ["keyCompromise", "superseded", "cessationOfOperation"].iter().enumerate() {
        for one in [false, true] {
            let d = Device::new(&format!("d{n}{one}"));
            let serial = enrol(&all[0], &d);
            soon("it is known", &[&all[1]], |service| status(service, &d.name).is_some());
            let path = match one {
                true => format!("devices/{}/certificates/{serial}", d.name),
                false => format!("certificates/{}", d.name),
            };
            for wrong in [r#""because""#, "7", "\"\""] {
                let answer = ask(&all[1], &path, wrong);
                check_error(&answer, 400, "BAD_REQUEST", wrong);
                assert!(answer.field("error").starts_with("reason must be keyCompromise, "));
            }
            let answer = ask(&all[1], &path, &format!("{reason:?}"));
            assert_eq!(answer.status, 200, "{}", answer.text());
            soon("the reason", &[&all[1], &all[0]], |service| {
                let list = service.data("ca/crl.pem").display().to_string();
                let list = csr::openssl(&["crl", "-noout", "-text", "-in", &list], "");
                let (_, entry) = list.split_once(&serial.to_uppercase()).unwrap_or_default();
                let words = entry.lines().nth(4).unwrap_or_default().replace(' ', "");
                let line = service.index().into_iter().find(|line| line[5].ends_with(&d.name));
                words.eq_ignore_ascii_case(reason)
                    && line.is_some_and(|line| line[2].ends_with(&format!(",{reason}")))
            });
        }
    }
}

#[test]
fn what_one_signs_and_another_revokes_is_true_of_all() {
    let redis = Redis::start(&[]);
    let all: [Service; 3] = instances(&redis.url(), &[]);
    let every: Vec<&Service> = all.iter().collect();
    let d = Device::new("d");
    let serial = enrol(&all[0], &d);
    soon("its status", &every, |service| status(service, "d").as_deref() == Some("active"));
    let download = format!("/api/v1/certificates/{serial}/download?format=pem");
    let pem = all[0].http.get(&download).text();
    for service in &all {
        assert_eq!(service.http.get(&download).text(), pem);
    }
    let answer = revoke(&all[1], &d);
    assert_eq!((answer.status, answer.json()["shared"].as_bool()), (200, Some(true)));
    soon("its revocation", &every, |s| status(s, "d").as_deref() == Some("revoked"));
    soon("the list", &every, |service| listed(service).contains(&serial));
    agree(&every, &[("d", "revoked")]);
    let again = revoke(&all[2], &d);
    assert_eq!((again.status, again.json()["shared"].as_bool()), (200, Some(true)));
}

#[test]
fn three_instances_agree_after_many_devices_and_a_crash() {
    let redis = Redis::start(&[]);
    let mut all: [Service; 3] = instances(&redis.url(), &[]);
    let devices: Vec<Device> = (0..24).map(|n| Device::new(&format!("d{n}"))).collect();
    for (n, device) in devices.iter().enumerate() {
        enrol(&all[n % 3], device);
        if n == 11 {
            all[1].kill9();
            all[1].restart();
        }
        if n % 3 == 2 {
            assert_eq!(revoke(&all[(n + 1) % 3], &devices[n - 1]).status, 200);
        }
    }
    let state = |n: usize| if n % 3 == 1 { "revoked" } else { "active" };
    let states: Vec<(&str, &str)> =
        devices.iter().enumerate().map(|(n, device)| (&*device.name, state(n))).collect();
    agree(&all.iter().collect::<Vec<_>>(), &states);
}

/// The broker of another instance, which did neither sign nor revoke, while a third has much to do.
#[test]
fn a_broker_of_another_instance_refuses_what_was_revoked() {
    const REVOKED: usize = 3;
    let (redis, dir) = (Redis::start(&[]), TempDir::new());
    let open = ("ONBOARDING_API_KEY", "");
    let [a, b]: [Service; 2] = instances(&redis.url(), &[open]);
    let hook = mosquitto::reloading_hook(&dir);
    let c = instance::another(&a, &redis.url(), &[open, ("CRL_HOOK", &hook)]);
    let broker = Broker::start(&c);
    dir.file("pid", &broker.pid().to_string());
    let url = format!("http://127.0.0.1:{}", a.port());
    let devices = (0..REVOKED).map(|n| device::Device::new(&format!("d{n}"), &url));
    let devices: Vec<device::Device> = devices.collect();
    for device in &devices {
        device.must_enroll(&[]);
        broker.publish(device, &format!("devices/{}/state", device.name), "x").unwrap();
    }
    let (fleet, history, stop) = (Fleet::new(100), History::default(), AtomicBool::new(false));
    let longest = thread::scope(|scope| {
        let _stops = Stops(&stop);
        scope.spawn(|| fleet.run(&[a.http], &history, 500.0, 9, || stop.load(Ordering::Relaxed)));
        let delays = devices.iter().map(|device| {
            let answer = revoke(&b, &Device::new(&device.name));
            assert_eq!(answer.status, 200, "{}", answer.text());
            let answered = Instant::now();
            broker.refuses_soon(device);
            answered.elapsed()
        });
        delays.max()
    });
    println!("a broker refuses {longest:?} after the answer at the latest");
    let requests = history.events().len();
    assert!(requests > 100, "{requests} requests are no load");
}

/// Row r17 of the model.
#[test]
fn a_device_that_another_instance_has_just_enrolled_is_refused() {
    let redis = Redis::start(&[]);
    // Long enough that a slow machine is no outage, in which memory would answer.
    let env = [("REENROLL", "deny"), ("REDIS_TIMEOUT_MS", "10000")];
    let all: [Service; 2] = instances(&redis.url(), &env);
    for n in 0..20 {
        let d = Device::new(&format!("d{n}"));
        enrol(&all[n % 2], &d);
        let answer = onboard_soon(&all[(n + 1) % 2], &d);
        check_error(&answer, 409, "DEVICE_HAS_ACTIVE_CERTIFICATE", &d.name);
    }
}

/// Somebody names a holder that is none (row r16): the device is not locked out.
#[test]
fn a_holder_that_nobody_has_signed_does_not_count() {
    let redis = Redis::start(&[]);
    let [service] = instances(&redis.url(), &[("REENROLL", "deny")]);
    let [d, e] = ["d", "e"].map(Device::new);
    let other = enrol(&service, &e);
    for holder in ["41414141414141414141414141414141", "no serial", &other] {
        redis.cli(&["SET", "mqtt-lite:holder:d", holder]);
        let answer = onboard(&service, &d);
        assert_eq!(answer.status, 200, "{holder}: {}", answer.text());
        assert_eq!(revoke(&service, &d).status, 200);
    }
}

#[test]
fn redis_is_killed_emptied_or_older_while_all_sign_and_revoke() {
    for keeps in ["nothing", "an older file"] {
        let mut redis = Redis::start(&[]);
        let all: [Service; 3] = instances(&redis.url(), &[]);
        let every: Vec<&Service> = all.iter().collect();
        let [a, b, c, d] = ["a", "b", "c", "d"].map(Device::new);
        enrol(&all[0], &a);
        enrol(&all[1], &b);
        soon("b", &every, |service| status(service, "b").is_some());
        if keeps == "an older file" {
            redis.save();
        }
        assert_eq!(revoke(&all[2], &a).status, 200);
        enrol(&all[2], &c);
        redis.kill9();
        all.iter().for_each(instance::notice_loss);
        enrol(&all[0], &d);
        let answer = revoke(&all[1], &b);
        assert_eq!((answer.status, answer.json()["shared"].as_bool()), (200, Some(false)));
        let unknown = revoke(&all[1], &Device::new("nobody"));
        check_error(&unknown, 503, "SERVICE_UNAVAILABLE", "nothing is known of it");
        redis.start_again();
        agree(&every, &[("a", "revoked"), ("b", "revoked"), ("c", "active"), ("d", "active")]);
    }
}

#[test]
fn redis_is_emptied_while_it_runs_and_stands_still_for_a_while() {
    let redis = Redis::start(&[]);
    let all: [Service; 2] = instances(&redis.url(), &[]);
    let every: Vec<&Service> = all.iter().collect();
    let [a, b, c] = ["a", "b", "c"].map(Device::new);
    enrol(&all[0], &a);
    agree(&every, &[("a", "active")]);
    redis.cli(&["FLUSHALL"]);
    // With it, who shares: another instance may start by now, with another setting.
    for key in ["mqtt-lite:certs:", "mqtt-lite:share:"] {
        within(Duration::from_secs(10), "it stands there again", &[&all[0]], |_| {
            redis.keys().iter().any(|found| found.starts_with(key))
        });
    }
    let paused = redis.stop();
    all.iter().for_each(instance::notice_loss);
    enrol(&all[1], &b);
    assert_eq!(revoke(&all[1], &a).status, 200);
    drop(paused);
    enrol(&all[0], &c);
    agree(&every, &[("a", "revoked"), ("b", "active"), ("c", "active")]);
}

#[test]
fn each_in_turn_is_cut_off_for_a_while() {
    let redis = Redis::start(&[]);
    let (all, proxies) = behind_proxies::<3>(&redis);
    let every: Vec<&Service> = all.iter().collect();
    let mut states = Vec::new();
    for (n, proxy) in proxies.iter().enumerate() {
        let names = ["shared", "alone", "elsewhere"].map(|what| format!("{what}-{n}"));
        let [shared, alone, elsewhere] = names.each_ref().map(|name| Device::new(name));
        enrol(&all[n], &shared);
        soon("before", &every, |service| status(service, &shared.name).is_some());
        cut_off(&all[n], proxy);
        enrol(&all[n], &alone);
        enrol(&all[(n + 1) % 3], &elsewhere);
        assert_eq!(revoke(&all[n], &shared).status, 200);
        reconnect(&all[n], proxy);
        let [shared, alone, elsewhere] = names;
        states.extend([(shared, "revoked"), (alone, "active"), (elsewhere, "active")]);
    }
    let states: Vec<(&str, &str)> = states.iter().map(|(name, state)| (&**name, *state)).collect();
    agree(&every, &states);
}

/// Rows r14 and r15 of the model, on a device that is active and one that is revoked.
#[test]
fn what_nobody_of_ours_has_written_changes_nothing_and_is_put_right() {
    let redis = Redis::start(&[]);
    let all: [Service; 2] = instances(&redis.url(), &[]);
    let every: Vec<&Service> = all.iter().collect();
    let [d, e] = ["d", "e"].map(Device::new);
    let serial = enrol(&all[0], &d);
    enrol(&all[0], &e);
    assert_eq!(revoke(&all[0], &e).status, 200);
    agree(&every, &[("d", "active"), ("e", "revoked")]);
    let key = |kind: &str| {
        let begin = format!("mqtt-lite:{kind}");
        redis.keys().into_iter().find(|key| key.starts_with(&begin)).unwrap()
    };
    let (stream, share) = (key("changes:"), key("share:"));
    let fp = share.rsplit(':').next().unwrap();
    let bucket = u8::from_str_radix(&serial[..2], 16).unwrap() & 0x3f | 0x40;
    let certificates = format!("mqtt-lite:certs:{fp}:{bucket:02x}");
    let revocations = format!("mqtt-lite:revoked:{fp}:{bucket:02x}");
    let row = |name: &str| {
        format!("mqtt-lite:devices:{}", &crate::support::token::sha256_hex(name.as_bytes())[..2])
    };
    let right = redis.cli(&["HGET", &certificates, &serial]);
    let right_row = redis.cli(&["HGET", &row("e"), "e"]);
    redis.cli(&["HSET", &revocations, &serial, "forged"]);
    // What is right elsewhere is wrong here.
    let copy = "redis.call('HSET', KEYS[2], ARGV[2], redis.call('HGET', KEYS[1], ARGV[1]))";
    let other = format!("{}00", &serial[..30]);
    redis.cli(&["EVAL", copy, "2", &certificates, &certificates, &serial, &other]);
    redis.cli(&["EVAL", copy, "2", &row("e"), &row("d"), "e", "d"]);
    redis.cli(&["HSET", &row("e"), "e", "forged"]);
    redis.cli(&["HSET", &certificates, &serial, "forged"]);
    let names = [
        "cert", &other, "cert", &serial, "revoked", &serial, "device", "d", "device", "e", "x", "y",
    ];
    redis.cli(&[&["XADD", &stream, "*"], &names[..]].concat());
    let stands = |_: &Service| {
        redis.cli(&["HGET", &certificates, &serial]) == right
            && redis.cli(&["HGET", &row("e"), "e"]) == right_row
    };
    within(Duration::from_secs(5), "the right ones stand there again", &[&all[0]], stands);
    soon("it is counted", &[&all[1]], |service| record(service)["ignored"].as_u64() > Some(3));
    agree(&every, &[("d", "active"), ("e", "revoked")]);
    let warned = "Redis holds values of the record that none of our instances has written";
    for service in &every {
        let log = service.wait_for_log(warned);
        assert_eq!(log.matches(warned).count(), 1, "{log}");
    }
    // One that knows nothing yet.
    let third = instance::another(&all[0], &redis.url(), &[]);
    agree(&[&all[0], &third], &[("d", "active"), ("e", "revoked")]);
}

/// Nobody has announced it; the device that it is of comes.
#[test]
fn a_forged_row_that_only_its_device_meets_is_told_and_put_right() {
    let redis = Redis::start(&[]);
    let [one] = instances(&redis.url(), &[]);
    let d = Device::new("d");
    enrol(&one, &d);
    assert_eq!(revoke(&one, &d).status, 200);
    let hash = crate::support::token::sha256_hex(b"d");
    let key = format!("mqtt-lite:devices:{}", &hash[..2]);
    let row = || redis.cli(&["HGET", &key, "d"]);
    let right = row();
    redis.cli(&["HSET", &key, "d", "forged"]);
    assert_eq!(instance::onboard(&one, &d).status, 200);
    soon("it is counted", &[&one], |service| record(service)["ignored"].as_u64() > Some(0));
    one.wait_for_log("Redis holds values of the record that none of our instances has written");
    soon("the right one stands there again", &[&one], |_| row() != "forged");
    assert_eq!(row(), right);
    // Who replaces the token puts it right by himself.
    redis.cli(&["HSET", &key, "d", "forged"]);
    let counted = record(&one)["ignored"].as_u64();
    assert_eq!(instance::replace(&one, &d).status, 200);
    soon("it is counted, too", &[&one], |service| record(service)["ignored"].as_u64() > counted);
}

/// An empty value is none of ours, and was taken for no value at all: what was told over it was refused
/// again and again, and all else had to wait.
#[test]
fn an_empty_value_ends_nothing() {
    let redis = Redis::start(&[]);
    let [mut one, two] = instances(&redis.url(), &[]);
    let [d, e] = ["d", "e"].map(Device::new);
    let serial = enrol(&one, &d);
    soon("d", &[&two], |service| status(service, "d").is_some());
    let share = share_key(&redis);
    let fp = share.rsplit(':').next().unwrap();
    let bucket = u8::from_str_radix(&serial[..2], 16).unwrap() & 0x3f | 0x40;
    for kind in ["revoked", "certs"] {
        redis.cli(&["HSET", &format!("mqtt-lite:{kind}:{fp}:{bucket:02x}"), &serial, ""]);
    }
    let bearer = format!("Bearer {ADMIN_KEY}");
    let path = format!("/api/v1/devices/d/certificates/{serial}");
    let answer = one.http.request("DELETE", &path, &[("Authorization", &bearer)], b"");
    assert_eq!((answer.status, answer.json()["shared"].as_bool()), (200, Some(true)));
    enrol(&one, &e);
    agree(&[&one, &two], &[("d", "revoked"), ("e", "active")]);
    // Who is started again tells what it knows, over an empty certificate, too.
    one.terminate();
    one.restart();
    wait_until_shared(&one);
    let three = instance::another(&one, &redis.url(), &[]);
    agree(&[&one, &two, &three], &[("d", "revoked"), ("e", "active")]);
}

/// What is forged before anybody else has read it is put right by whoever has signed.
#[test]
fn a_forged_value_keeps_nobody_from_learning_the_right_one() {
    let redis = Redis::start(&[]);
    let [one] = instances(&redis.url(), &[]);
    let d = Device::new("d");
    let serial = enrol(&one, &d);
    let is_there = || redis.keys().into_iter().find(|key| key.starts_with("mqtt-lite:certs:"));
    let key = wait::until(SOON, is_there).unwrap();
    redis.cli(&["HSET", &key, &serial, "forged"]);
    let two = instance::another(&one, &redis.url(), &[]);
    within(Duration::from_secs(5), "it learns", &[&two], |two| status(two, "d").is_some());
}

/// The rights that 0.1 asked for.
#[test]
fn a_user_without_the_rights_for_the_record_serves_tokens() {
    let rules = "~mqtt-lite:token:* ~mqtt-lite:device:* ~mqtt-lite:used:* ~mqtt-lite:live \
                 ~mqtt-lite:ca +set +get +del +exists +pttl +eval +zadd +zrem +zcount \
                 +zrangebyscore +time +info";
    let redis = Redis::with_acl("old", "p4ssw0rd", rules);
    let port = redis.port().to_string();
    let env = [
        ("REDIS_URL", ""),
        ("REDIS_HOST", "127.0.0.1"),
        ("REDIS_PORT", &*port),
        ("REDIS_USERNAME", "old"),
        ("REDIS_PASSWORD", "p4ssw0rd"),
    ];
    let one = instance::first("", &env);
    let two = instance::another(&one, "", &env);
    let d = Device::new("d");
    for (here, there) in [(&one, &two), (&two, &one)] {
        let token = token(here, &d);
        assert_eq!(redeem(there, &token, &d).status, 200, "{}", there.log());
        // It goes after the answer.
        let is_leased = || redis.keys().iter().any(|key| key == "mqtt-lite:device:d");
        wait::for_true("its lease is free", || !is_leased());
    }
    for service in [&one, &two] {
        assert_eq!(record(service)["shared"], false);
        let log = service.log();
        assert_eq!(log.matches("the record is not shared through Redis").count(), 1, "{log}");
        let ready = service.http.get("/ready");
        assert_eq!(ready.status, 200);
        for warned in ["the record is not shared: ", "the rows of devices are not kept"] {
            assert!(ready.text().contains(warned), "{}", ready.text());
        }
    }
    let answer = revoke(&one, &d);
    assert_eq!((answer.status, answer.json()["shared"].as_bool()), (200, Some(false)));
    let e = Device::new("e");
    enrol(&one, &e);
    check_error(&revoke(&two, &e), 503, "SERVICE_UNAVAILABLE", "what one has is not denied");
    assert_eq!(status(&one, "e").as_deref(), Some("active"));
}

/// The row stands in Redis, but a renewal elsewhere does not ask for it.
#[test]
fn a_block_that_cannot_be_announced_is_not_called_shared() {
    let redis = Redis::with_acl("mute", "p4ssw0rd", "~mqtt-lite:* +@all -xadd");
    let port = redis.port().to_string();
    let env = [
        ("REDIS_URL", ""),
        ("REDIS_HOST", "127.0.0.1"),
        ("REDIS_PORT", &*port),
        ("REDIS_USERNAME", "mute"),
        ("REDIS_PASSWORD", "p4ssw0rd"),
    ];
    let one = instance::first("", &env);
    let block = || {
        let key = format!("Bearer {ADMIN_KEY}");
        let headers = [("Authorization", &*key), ("Content-Type", "application/json")];
        let answer = one.http.request("PUT", "/api/v1/devices/d", &headers, br#"{"blocked":true}"#);
        (answer.status, answer.json()["shared"].as_bool())
    };
    assert_eq!(block(), (200, Some(false)));
    redis.cli(&["ACL", "SETUSER", "mute", "+xadd"]);
    wait_until_shared(&one);
    assert_eq!(block(), (200, Some(true)));
}

/// The lease is free at once where nothing is shared, and soon where it is.
#[test]
fn a_device_may_enrol_again_soon() {
    let redis = Redis::start(&[]);
    for mode in ["true", "false"] {
        let service = instance::first(&redis.url(), &[("SHARE_RECORD", mode)]);
        let d = Device::new("d");
        for _ in 0..3 {
            enrol(&service, &d);
            let free = || (!redis.exists("mqtt-lite:device:d")).then_some(());
            assert!(wait::until(Duration::from_millis(400), free).is_some());
        }
        drop(service);
        redis.cli(&["FLUSHALL"]);
    }
}

#[test]
fn share_record_must_be_the_same_everywhere() {
    let redis = Redis::start(&[]);
    let [one] = instances(&redis.url(), &[]);
    let two = instance::another(&one, &redis.url(), &[("SHARE_RECORD", "false")]);
    within(Duration::from_secs(5), "it says so", &[&two], |two| {
        two.http.get("/ready").text().contains("SHARE_RECORD is not what other instances")
    });
    assert_eq!(one.http.get("/ready").status, 200);
    assert_eq!(record(&two)["shared"], false);
    // The other way round, who shares knows that the others do not.
    redis.cli(&["SET", &share_key(&redis), "false"]);
    let three = instance::another(&one, &redis.url(), &[]);
    within(Duration::from_secs(5), "it says so", &[&three], |three| {
        three.http.get("/ready").text().contains("SHARE_RECORD is not what other instances")
    });
    assert_eq!(record(&three)["shared"], false);
}

/// Two instances that are cut off from each other: each certificate stays valid, and the warning says
/// where each was signed.
#[test]
fn who_has_signed_twice_for_a_device_is_said() {
    let (redis, d) = (Redis::start(&[]), Device::new("d"));
    let proxies: [Proxy; 2] = std::array::from_fn(|_| Proxy::start(redis.port()));
    let deny = [("REENROLL", "deny")];
    let one = instance::first(&proxies[0].url(), &deny);
    let two = instance::another(&one, &proxies[1].url(), &deny);
    let all = [one, two];
    all.iter().for_each(wait_until_shared);
    all.iter().zip(&proxies).for_each(|(service, proxy)| cut_off(service, proxy));
    let serials = [0, 1].map(|n| enrol(&all[n], &d).to_lowercase());
    all.iter().zip(&proxies).for_each(|(service, proxy)| reconnect(service, proxy));
    for (n, service) in all.iter().enumerate() {
        let log = service.wait_for_log("device d has several active certificates: ");
        let id = std::fs::read_to_string(service.data("instance-id")).unwrap();
        let id = id.lines().next().unwrap();
        let here = format!("{}, signed here ({id})", serials[n]);
        assert!(log.contains(&here), "{here}: {log}");
        let there = format!("{}, signed at another instance", serials[1 - n]);
        assert!(log.contains(&there), "{there}: {log}");
    }
    assert_eq!(revoke(&all[0], &d).status, 200);
    all[1].wait_for_log(&format!("certificate {} of d revoked, at another inst", serials[0]));
}

/// What is signed while an instance is cut off is not there for it only when Redis has said so.
#[test]
fn a_certificate_that_only_others_know_is_asked_for_before_it_is_not_found() {
    let redis = Redis::start(&[]);
    let (all, proxies) = behind_proxies::<2>(&redis);
    let d = Device::new("d");
    cut_off(&all[1], &proxies[1]);
    let serial = enrol(&all[0], &d);
    let bearer = format!("Bearer {ADMIN_KEY}");
    let path = format!("/api/v1/devices/d/certificates/{serial}");
    let delete =
        |path: &str| all[1].http.request("DELETE", path, &[("Authorization", &bearer)], b"");
    check_error(&delete(&path), 503, "SERVICE_UNAVAILABLE", "nobody can be asked");
    reconnect(&all[1], &proxies[1]);
    soon("revoked", &[&all[1]], |_| {
        let status = delete(&path).status;
        assert!(matches!(status, 200 | 503), "{status}");
        status == 200
    });
    all[1].wait_for_log(&format!(
        "certificate {} of d revoked: unspecified, by admin, from ",
        serial.to_lowercase()
    ));
    let none = format!("/api/v1/devices/d/certificates/{}", "41".repeat(16));
    check_error(&delete(&none), 404, "CERTIFICATE_NOT_FOUND", "nobody has it");
}

/// It is in the record of the instance beside which it was signed only, but in every list.
#[test]
fn a_servers_certificate_that_is_revoked_stands_in_every_list() {
    let redis = Redis::start(&[]);
    let [one, two] = instances(&redis.url(), &[]);
    https::server_certificate(&one, &["d"], &one.dir().join("broker"));
    one.signal("HUP");
    one.wait_for_log("of the server d is entered");
    let serial = one.index_of_servers()[0][3].to_lowercase();
    let path = format!("/api/v1/devices/d/certificates/{serial}");
    let bearer = format!("Bearer {ADMIN_KEY}");
    let answer = one.http.request("DELETE", &path, &[("Authorization", &bearer)], b"");
    assert_eq!((answer.status, answer.json()["shared"].as_bool()), (200, Some(true)));
    soon("listed", &[&one, &two], |service| listed(service).contains(&serial));
    assert_eq!((status(&one, "d"), status(&two, "d")), (None, None));
}

/// Rows are exchanged all the same, and with them revocations of all that a device has.
#[test]
fn without_a_shared_record_a_revocation_still_reaches_everybody() {
    let redis = Redis::start(&[]);
    let one = instance::first(&redis.url(), &[("SHARE_RECORD", "false")]);
    let two = instance::another(&one, &redis.url(), &[("SHARE_RECORD", "false")]);
    let [d, e] = ["d", "e"].map(Device::new);
    enrol(&one, &d);
    enrol(&two, &d);
    enrol(&one, &e);
    let answer = revoke(&two, &d);
    assert_eq!((answer.status, answer.json()["shared"].as_bool()), (200, Some(true)));
    soon("revoked", &[&one, &two], |service| status(service, "d").as_deref() == Some("revoked"));
    assert_eq!((status(&one, "e").as_deref(), status(&two, "e")), (Some("active"), None));
}

/// Row 36 of the model: what is cut off cannot know, and both certificates are told of, once.
/// Behind a balancer the registration after a revocation comes to another instance, which learns of the
/// kill by it and not by the stream.
#[test]
fn what_is_registered_anew_elsewhere_is_revoked_there_all_the_same() {
    let redis = Redis::start(&[]);
    let one = instance::first(&redis.url(), &[("SHARE_RECORD", "false")]);
    let two = instance::another(&one, &redis.url(), &[("SHARE_RECORD", "false")]);
    for n in 0..4 {
        let device = Device::new(&format!("d-{n}"));
        let register = |service: &Service| {
            let path = format!("/api/v1/devices/{}", device.name);
            let bearer = format!("Bearer {ADMIN_KEY}");
            let fields = [("Authorization", &*bearer), ("Content-Type", "application/json")];
            let answer = service.http.request("PUT", &path, &fields, br#"{"register":true}"#);
            assert_eq!(answer.status, 200, "{}", answer.text());
        };
        register(&one);
        let serial = enrol(&two, &device);
        assert_eq!(revoke(&one, &device).json()["shared"], true);
        register(&two);
        soon("it is revoked, and listed", &[&two], |two| {
            status(two, &device.name).as_deref() == Some("revoked") && listed(two).contains(&serial)
        });
    }
}

#[test]
fn a_token_that_was_redeemed_twice_is_told_once() {
    let redis = Redis::start(&[]);
    let (all, proxies) = behind_proxies::<2>(&redis);
    let d = Device::new("d");
    let token = token(&all[0], &d);
    cut_off(&all[0], &proxies[0]);
    let serials = [certificate(&all[0], &token, &d), certificate(&all[1], &token, &d)];
    reconnect(&all[0], &proxies[0]);
    let every = [&all[0], &all[1]];
    agree(&every, &[("d", "active")]);
    for service in every {
        let log = service.log();
        let told: Vec<&str> =
            log.lines().filter(|line| line.contains("was redeemed twice")).collect();
        assert_eq!(told.len(), 1, "{log}");
        assert!(serials.iter().all(|serial| told[0].contains(serial)), "{told:?}");
    }
}

/// A clone of a folder: it has the certificates of its origin, and learns the others.
#[test]
fn a_clone_and_a_new_machine_learn_everything() {
    let redis = Redis::start(&[]);
    let [origin] = instances(&redis.url(), &[]);
    let [a, b, c] = ["a", "b", "c"].map(Device::new);
    enrol(&origin, &a);
    let clone = instance::setup(&redis.url(), &[]).copy_data(&origin).start();
    wait_until_shared(&clone);
    enrol(&origin, &b);
    enrol(&clone, &c);
    assert_eq!(revoke(&clone, &a).status, 200);
    let new = instance::another(&origin, &redis.url(), &[]);
    agree(&[&origin, &clone, &new], &[("a", "revoked"), ("b", "active"), ("c", "active")]);
}

/// Others fill the Redis to the last byte: nothing waits, and all is shared when there is room.
#[test]
fn a_redis_that_is_full_is_no_end_of_sharing() {
    let redis = Redis::start(&["--maxmemory-policy", "noeviction"]);
    let all: [Service; 2] = instances(&redis.url(), &[]);
    let [d, e] = ["d", "e"].map(Device::new);
    let serial = enrol(&all[0], &d);
    soon("d", &[&all[1]], |service| status(service, "d").is_some());
    redis.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    assert_eq!(revoke(&all[0], &d).status, 200);
    enrol(&all[0], &e);
    within(Duration::from_secs(5), "it is noticed", &[&all[0]], |s| record(s)["shared"] == false);
    assert_eq!(status(&all[0], "d").as_deref(), Some("revoked"));
    redis.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    let every = [&all[0], &all[1]];
    within(Duration::from_secs(10), "it is shared again", &every, |service| {
        record(service)["shared"] == true && listed(service).contains(&serial)
    });
    agree(&every, &[("d", "revoked"), ("e", "active")]);
    let log = all[0].log();
    assert_eq!(log.matches("the record is not shared through Redis").count(), 1, "{log}");
    assert_eq!(log.matches("the record is shared through Redis again").count(), 1, "{log}");
}

/// A Redis that the record would fill: tokens go on, and so do revocations.
#[test]
fn a_redis_that_is_nearly_full_takes_no_certificate() {
    let redis = Redis::start(&["--maxmemory", "8mb"]);
    redis.pipe(|out| {
        let value = "x".repeat(1000);
        for n in 0..5000 {
            crate::support::redis::resp(out, &["SET", &format!("other:{n}"), &value]);
        }
    });
    let all: [Service; 2] = instances(&redis.url(), &[]);
    let [d, e] = ["d", "e"].map(Device::new);
    for device in [&d, &e] {
        enrol(&all[0], device);
    }
    let full = "Redis is filling up: certificates are not shared any more, revocations are";
    within(SOON, "it is told", &[&all[0]], |service| service.log().contains(full));
    assert!(!redis.keys().iter().any(|key| key.starts_with("mqtt-lite:certs:")));
    assert_eq!(record(&all[0])["shared"], false);
    let answer = revoke(&all[1], &d);
    assert_eq!(answer.status, 404, "nothing is known of it where it was asked: {}", answer.text());
    within(Duration::from_secs(5), "it is dead all the same", &[&all[0]], |service| {
        status(service, "d").as_deref() == Some("revoked")
    });
    assert_eq!(status(&all[0], "e").as_deref(), Some("active"));
}
