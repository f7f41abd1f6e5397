//! Rows of devices that several instances change while they are cut off from each other, and the file
//! in which they stand, torn and copied.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::enrolment::{REGISTERED, admin, block, onboard_with, put, register};
use crate::renewal::Stage;
use crate::support::clock::{FakeClock, now_s};
use crate::support::csr::Csr;
use crate::support::https::{self, Identity};
use crate::support::instance::{cut_off, first, reconnect, setup};
use crate::support::proxy::Proxy;
use crate::support::redis::Redis;
use crate::support::service::{ADMIN_KEY, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::{token, wait};

/// All that a service says of a device, but when it says so.
fn show(service: &Service, device: &str) -> Value {
    let mut shown =
        admin(service, "GET", &format!("/api/v1/devices/{device}"), &Value::Null).json();
    shown.as_object_mut().unwrap().remove("timestamp");
    shown
}

/// The clocks are an hour apart; b's is ahead, and by ten seconds more it would refuse to kill tokens.
#[test]
fn rows_that_both_sides_of_a_partition_change_become_equal() {
    let redis = Redis::start(&[]);
    let (to_a, to_b) = (Proxy::start(redis.port()), Proxy::start(redis.port()));
    let ahead = FakeClock::at(now_s() + 3_590);
    let a = first(&to_a.url(), REGISTERED);
    let b = setup(&to_b.url(), REGISTERED).env_of(&ahead.env()).share_ca(&a).start();
    b.wait_for_storage("redis");
    let devices = ["a-blocks", "b-blocks", "seen", "spent", "replaced", "forgotten"];
    let secrets = devices.map(|device| register(&a, device));
    block(&a, "seen", true);
    let note = |service: &Service, device: &str, text: &str| {
        put(service, device, json!({"note": text}));
    };
    wait::for_true("b knows them", || {
        show(&b, "seen")["state"] == "blocked" && show(&b, "forgotten")["enrolment"] == "open"
    });

    cut_off(&a, &to_a);
    cut_off(&b, &to_b);
    block(&a, "a-blocks", true);
    block(&b, "a-blocks", false);
    block(&b, "b-blocks", true);
    block(&a, "b-blocks", false);
    block(&a, "seen", false);
    note(&b, "seen", "by b");
    let issued = onboard_with(&b, "spent", &secrets[3]).field("provisioning_token");
    assert_eq!(b.sign(&issued, &Csr::new("spent").make()).status, 200, "{}", b.log());
    note(&a, "spent", "by a");
    let by_a = register(&a, "replaced");
    let by_b = register(&b, "replaced");
    note(&b, "forgotten", "by b");
    assert_eq!(admin(&a, "DELETE", "/api/v1/devices/forgotten", &Value::Null).status, 200);
    reconnect(&a, &to_a);
    reconnect(&b, &to_b);

    for device in devices {
        wait::for_true(&format!("{device} is the same here and there"), || {
            show(&a, device) == show(&b, device)
        });
    }
    for device in ["a-blocks", "b-blocks"] {
        assert_eq!(
            show(&a, device)["state"],
            "blocked",
            "who had not seen the block lifts nothing"
        );
    }
    let seen = show(&a, "seen");
    assert_eq!((&seen["state"], &seen["note"]), (&json!("registered"), &json!("by b")));
    let spent = show(&a, "spent");
    assert_eq!((&spent["enrolment"], &spent["state"]), (&json!("spent"), &json!("active")));
    for (service, secret) in [(&a, &secrets[3]), (&b, &secrets[3]), (&a, &by_a), (&b, &by_a)] {
        let device = if *secret == by_a { "replaced" } else { "spent" };
        assert_eq!(onboard_with(service, device, secret).code(), "SECRET_INVALID", "{device}");
    }
    assert_eq!(onboard_with(&a, "replaced", &by_b).status, 200, "the later registration counts");
}

/// A line with a checksum of its own, of a kind that a later version may have.
fn unknown_kind() -> String {
    let text = "quota\td2\t1\t-\t7";
    format!("{text}\t{}\n", &token::sha256_hex(text.as_bytes())[..8])
}

#[test]
fn a_file_of_rows_that_is_torn_anywhere_serves_what_is_whole() {
    let mut service = Service::start(REGISTERED);
    ["d1", "d2", "d3"].iter().for_each(|device| {
        put(&service, device, json!({"register": true, "note": "Halle 3 ä"}));
    });
    block(&service, "d1", true);
    service.kill9();
    let path = service.data("devices.txt");
    let whole = [fs::read(&path).unwrap(), unknown_kind().into_bytes()].concat();
    let ends: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] == b'\n').collect();
    // In the head, and of each line: behind its first byte, in its middle, before and behind its end.
    let lines =
        ends.windows(2).flat_map(|w| [w[0] + 2, (w[0] + w[1]) / 2, w[1] - 1, w[1], w[1] + 1]);
    for cut in [0, 5].into_iter().chain(lines) {
        fs::write(&path, &whole[..cut]).unwrap();
        let from = service.log().len();
        service.restart();
        let log = service.log().get(from..).map(str::to_owned).unwrap_or_default();
        assert_eq!(log.contains("it is empty"), cut < ends[0], "{log}");
        let kept = String::from_utf8_lossy(&whole[..cut]).into_owned();
        let has = |kind: &str, device: &str| {
            let begin = format!("{kind}\t{device}\t");
            let line =
                whole.split(|b| *b == b'\n').find(|l| l.starts_with(begin.as_bytes())).unwrap();
            kept.contains(std::str::from_utf8(line).unwrap())
        };
        for device in ["d1", "d2", "d3"] {
            let state = match device {
                "d1" if has("block", device) => json!("blocked"),
                _ if has("registration", device) => json!("registered"),
                _ => Value::Null,
            };
            let shown = show(&service, device);
            assert_eq!(shown.get("state").cloned().unwrap_or_default(), state, "{device}, {cut}");
        }
        // What is written behind a torn line is a line of its own.
        put(&service, "later", json!({"register": true}));
        service.kill9();
        service.restart();
        assert_eq!(show(&service, "later")["state"], "registered", "cut at {cut}");
        service.kill9();
        let text = fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&text);
        assert_eq!(text.contains(unknown_kind().trim_end()), cut + 1 >= whole.len(), "{cut}");
    }
}

#[test]
fn a_file_of_rows_that_is_copied_while_it_is_written_has_all_that_was_answered() {
    let service = Service::start(REGISTERED);
    put(&service, "d", json!({"register": true}));
    let (answered, copies) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1.. {
                put(&service, "d", json!({"note": n.to_string()}));
                answered.store(n, Ordering::SeqCst);
                if copies.load(Ordering::SeqCst) == 8 {
                    break;
                }
            }
        });
        for n in 1..=8 {
            let next = answered.load(Ordering::SeqCst) + 3;
            wait::for_true("some more", || answered.load(Ordering::SeqCst) >= next);
            let before = answered.load(Ordering::SeqCst);
            let copy = Setup::new().envs(REGISTERED);
            fs::create_dir_all(copy.data("")).unwrap();
            fs::copy(service.data("devices.txt"), copy.data("devices.txt")).unwrap();
            copies.store(n, Ordering::SeqCst);
            let note = show(&copy.start(), "d")["note"].as_str().unwrap().parse::<u64>().unwrap();
            assert!(note >= before, "{note} of {before}");
        }
    });
}

#[test]
fn a_device_that_is_blocked_at_one_instance_renews_at_no_other() {
    let redis = Redis::start(&[]);
    let url = redis.url();
    let env = [("REDIS_URL", &*url), ("JWT_SECRET", token::SECRET)];
    let a = Stage::set(&env);
    let both = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY).envs(&env).share_ca(&a.service);
    let b = Stage { service: https::start(both), dir: TempDir::new() };
    let identity = a.enroll("d");
    let csr = Csr::new("d").make();
    let renew = |stage: &Stage, who: &Identity| stage.renew(Some(who), &csr);
    wait::for_true("b knows the certificate", || renew(&b, &identity).status == 200);
    let bearer = format!("Authorization: Bearer {ADMIN_KEY}");
    let put = |blocked: bool| {
        let more = ["-X", "PUT", "-H", &bearer];
        let body = json!({"blocked": blocked});
        let answer = https::post(&a.service, "/api/v1/devices/d", None, &body, &more);
        assert_eq!(answer.status, 200, "{}", answer.text());
        Instant::now()
    };
    let answered = put(true);
    wait::for_true("b refuses it, too", || renew(&b, &identity).code() == "DEVICE_BLOCKED");
    assert!(answered.elapsed() < Duration::from_secs(2), "{:?}", answered.elapsed());
    assert_eq!(renew(&a, &identity).code(), "DEVICE_BLOCKED");
    put(false);
    wait::for_true("and takes it again", || renew(&b, &identity).status == 200);
}
