//! A Redis Cluster: nodes die, slots move, and one shard may be away while the others serve.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::outages::{Ends, setup, under_load};
use crate::support::cluster::{Cluster, slot_of};
use crate::support::http::Response;
use crate::support::instance::{
    self, Device, certificates, onboard, redeem, redeem_patiently, refused_as_used, revoke, token,
};
use crate::support::port::Port;
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::{check_error, token as jwt, wait};

const IN_CLUSTER: (&str, &str) = ("REDIS_CLUSTER", "true");

fn first(cluster: &Cluster) -> Service {
    instance::first(&cluster.url(), &[IN_CLUSTER])
}

fn another(of: &Service, cluster: &Cluster) -> Service {
    instance::another(of, &cluster.url(), &[IN_CLUSTER])
}

fn mark_key(token: &str, device: &Device) -> String {
    let hash = jwt::mark_of(token).replace("used:", "");
    format!("mqtt-lite:used:{{{}}}:{hash}", device.name)
}

fn lease_key(device: &Device) -> String {
    format!("mqtt-lite:device:{{{}}}", device.name)
}

/// Where the row of a device is.
fn row_key(device: &Device) -> String {
    format!("mqtt-lite:devices:{}", &jwt::sha256_hex(device.name.as_bytes())[..2])
}

/// How often a server was asked for something.
fn calls(server: &Redis, command: &str) -> u64 {
    let stats = server.cli(&["INFO", "commandstats"]);
    let start = format!("cmdstat_{command}:calls=");
    let of_it = stats.lines().find_map(|line| line.strip_prefix(&start)?.split(',').next());
    of_it.map_or(0, |calls| calls.parse().unwrap())
}

/// A device whose keys a master has.
fn device_at(cluster: &Cluster, master: usize, kind: &str) -> Device {
    let mut names = (0..).map(|n: u32| format!("{kind}{n}"));
    Device::new(&names.find(|name| cluster.master_of(name) == master).unwrap())
}

#[test]
fn the_keys_of_a_device_are_on_one_node() {
    let cluster = Cluster::start();
    let [a, b] = {
        let a = first(&cluster);
        let b = another(&a, &cluster);
        [a, b]
    };
    let device = Device::new("device-001");
    let compact = token(&a, &device);
    assert_eq!(cluster.cli(&["GET", &lease_key(&device)]), compact);
    let key = format!("mqtt-lite:token:{{device-001}}:{compact}");
    assert_eq!(cluster.cli(&["EXISTS", &key]), "1");
    check_error(&onboard(&b, &device), 409, "TOKEN_ALREADY_ACTIVE", "at another instance");
    assert_eq!(a.token_count(), 1);
    assert_eq!(redeem(&b, &compact, &device).status, 200, "{}", b.log());
    refused_as_used(&[&a, &b], &compact, &device);
    let mark = cluster.cli(&["GET", &mark_key(&compact, &device)]);
    assert!(mark.starts_with(&instance::id(&b)), "{mark}");
    wait::for_true("the lease is free", || cluster.cli(&["EXISTS", &lease_key(&device)]) == "0");
    assert_eq!(cluster.cli(&["EXISTS", "mqtt-lite:holder:{device-001}"]), "1");
    let live = cluster.keys().iter().filter(|key| key.contains(":live:")).count();
    assert_eq!(live, 0, "nobody has a token");
    wait::for_true("both have it in the record", || {
        [&a, &b].iter().all(|service| certificates(&[service]) == 1)
    });
    let replaced = token(&a, &device);
    let newer = instance::issued(&b, &instance::replace(&b, &device));
    refused_as_used(&[&a, &b], &replaced, &device);
    assert_eq!(revoke(&a, &device).status, 200);
    refused_as_used(&[&a, &b], &newer, &device);
}

#[test]
fn masters_give_way_to_their_replicas() {
    let cluster = Cluster::start();
    let service = setup().env_of(&cluster.env()).start();
    under_load(&service, |load| {
        for _ in 0..3 {
            let masters = cluster.masters();
            let replica = (0..6).find(|at| !masters.contains(at)).unwrap();
            assert_eq!(cluster.servers[replica].cli(&["CLUSTER", "FAILOVER"]), "OK");
            wait::for_true("it is a master", || cluster.masters().contains(&replica));
            load.wait_for(60);
            cluster.wait_until_whole();
        }
    });
}

/// Until the others have agreed on its death, each batch that needs it would wait for it.
#[test]
fn a_master_hangs() {
    let cluster = Cluster::start();
    let service = setup().env_of(&cluster.env()).start();
    under_load(&service, |load| {
        for _ in 0..2 {
            let hung = cluster.masters()[0];
            let stopped = cluster.servers[hung].stop();
            load.wait_for(200);
            drop(stopped);
            load.wait_for(100);
            cluster.wait_until_whole();
        }
    });
}

/// To a master that has slots already, and to a new one that has none.
#[test]
fn a_thousand_slots_move_under_load() {
    let mut cluster = Cluster::start();
    cluster.add_master();
    let service = setup().env_of(&cluster.env()).start();
    under_load(&service, |load| {
        cluster.reshard(0, 1, 500);
        cluster.reshard(2, 6, 500);
        load.wait_for(100);
    });
}

/// Its keys are out of reach, for good; the others are not.
#[test]
fn a_node_that_is_only_reachable_from_the_others() {
    let mut cluster = Cluster::start();
    let nobody = Port::any();
    let hidden = 2;
    let port = nobody.number().to_string();
    cluster.servers[hidden].cli(&["CONFIG", "SET", "cluster-announce-port", &port]);
    wait::for_true("the others say so", || {
        cluster.servers[0].cli(&["CLUSTER", "NODES"]).contains(&format!(":{port}@"))
    });
    cluster.servers.swap(0, 1);
    let service = first(&cluster);
    service.wait_for_log("a part of Redis is lost");
    let log = service.log();
    assert!(log.contains(&format!("127.0.0.1:{port}: connection refused")), "{log}");
    let (mut by_redis, mut by_memory) = (0, 0);
    for n in 0..30 {
        let device = Device::new(&format!("d{n}"));
        let compact = token(&service, &device);
        let answer = redeem_patiently(&service, &compact, &device);
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), service.log());
        let keys: Vec<String> = [0, 1].iter().flat_map(|at| cluster.servers[*at].keys()).collect();
        match keys.contains(&mark_key(&compact, &device)) {
            true => by_redis += 1,
            false => by_memory += 1,
        }
    }
    assert!(by_redis >= 8 && by_memory >= 5, "{by_redis} by Redis, {by_memory} by memory");
}

#[test]
fn slots_move_while_their_keys_are_used() {
    let cluster = Cluster::start();
    let service = first(&cluster);
    let device = device_at(&cluster, 0, "d");
    let compact = token(&service, &device);
    let slot = cluster.slot_of(&device.name);
    // The lease or the token is on its new node by then, the mark is on none.
    cluster.move_slot(slot, 1, || {
        check_error(&onboard(&service, &device), 409, "TOKEN_ALREADY_ACTIVE", "on its way");
        assert_eq!(redeem(&service, &compact, &device).status, 200, "{}", service.log());
    });
    refused_as_used(&[&service], &compact, &device);
    let next = token(&service, &device);
    cluster.move_slot(slot, 2, || {
        let newer = instance::issued(&service, &instance::replace(&service, &device));
        refused_as_used(&[&service], &next, &device);
        assert_eq!(redeem(&service, &newer, &device).status, 200, "{}", service.log());
    });
    let log = service.log();
    assert!(!log.contains("Redis connection lost") && !log.contains("WARN a part"), "{log}");
}

/// Devices that have nothing on this node are served by Redis.
#[track_caller]
fn others_go_on(cluster: &Cluster, service: &Service, without: usize) {
    let names = (0..).map(|n: u32| format!("here{n}"));
    let is_away_from_it = |device: &Device| {
        [row_key(device), device.name.clone()].iter().all(|key| cluster.master_of(key) != without)
    };
    for device in names.map(|name| Device::new(&name)).filter(is_away_from_it).take(5) {
        let compact = wait::until(Duration::from_secs(10), || {
            let answer = onboard(service, &device);
            (answer.status == 200).then(|| answer.field("provisioning_token"))
        });
        let compact = compact.unwrap();
        let answer = redeem_patiently(service, &compact, &device);
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), service.log());
        let mark = mark_key(&compact, &device);
        assert_eq!(cluster.cli(&["EXISTS", &mark]), "1", "by Redis\n{}", service.log());
    }
}

/// A master that answers, but not what it is asked.
#[test]
fn a_shard_that_is_full_or_loading_is_away_alone() {
    // It answers while it reads its file, and takes its time for each key.
    let slow = [
        ["--cluster-require-full-coverage", "no"],
        ["--key-load-delay", "300000"],
        ["--loading-process-events-interval-bytes", "1024"],
        ["--rdbcompression", "no"],
    ];
    let mut cluster = Cluster::of(0, &slow.concat());
    let service = first(&cluster);
    let bad = 1;
    let there = device_at(&cluster, bad, "there");
    let before = token(&service, &there);
    let is_back = |times: usize| {
        wait::for_true("it is back", || {
            service.log().matches("all of Redis is in reach").count() == times
        });
        assert_eq!(redeem_patiently(&service, &before, &there).status, [200, 401][times - 1]);
    };
    assert_eq!(cluster.servers[bad].cli(&["CONFIG", "SET", "maxmemory", "1"]), "OK");
    check_error(&redeem(&service, &before, &there), 503, "SERVICE_UNAVAILABLE", "it is full");
    others_go_on(&cluster, &service, bad);
    service.wait_for_log("OOM");
    assert_eq!(cluster.servers[bad].cli(&["CONFIG", "SET", "maxmemory", "0"]), "OK");
    is_back(1);
    for n in 0..40 {
        cluster.servers[bad].cli(&["SET", &format!("{{{}}}{n}", there.name), &"x".repeat(2000)]);
    }
    cluster.servers[bad].save();
    cluster.servers[bad].kill9();
    cluster.servers[bad].launch();
    let says = |cluster: &Cluster| cluster.servers[bad].try_cli(&["DBSIZE"]);
    wait::for_true("it is loading", || says(&cluster).starts_with("LOADING"));
    check_error(&redeem(&service, &before, &there), 401, "TOKEN_ALREADY_USED", "known here");
    others_go_on(&cluster, &service, bad);
    assert!(says(&cluster).starts_with("LOADING"), "still");
    cluster.servers[bad].cli(&["CONFIG", "SET", "key-load-delay", "0"]);
    is_back(2);
}

/// Tokens of a slot that moves are redeemed, replaced and revoked at two instances, over and over: each is
/// redeemed once, and none that is dead.
#[test]
fn a_slot_moves_back_and_forth_under_kills_and_redemptions() {
    let cluster = Cluster::start();
    let a = first(&cluster);
    let b = another(&a, &cluster);
    let slot = slot_of("d");
    let names = (0..).map(|n: u32| format!("d{n}")).filter(|name| slot_of(name) == slot);
    let devices: Vec<Device> = names.take(32).map(|name| Device::new(&name)).collect();
    let (rounds, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let soon = |ask: &dyn Fn() -> Response| {
        wait::until(Duration::from_secs(20), || Some(ask()).filter(|answer| answer.status == 200))
    };
    let live = |device: &Device, at: &Service| {
        soon(&|| onboard(at, device)).expect("a token").field("provisioning_token")
    };
    let one_round = |device: &Device, round: usize| {
        let (here, there) = if round.is_multiple_of(2) { (&a, &b) } else { (&b, &a) };
        let compact = live(device, here);
        match round % 3 {
            0 => thread::scope(|scope| {
                let both = [here, there]
                    .map(|at| scope.spawn(|| redeem_patiently(at, &compact, device).status));
                let mut statuses = both.map(|status| status.join().unwrap());
                statuses.sort_unstable();
                assert_eq!(statuses, [200, 401], "{}\n{}\n{}", device.name, a.log(), b.log());
            }),
            1 => {
                let next = soon(&|| instance::replace(there, device)).expect("another");
                let next = next.field("provisioning_token");
                refused_as_used(&[here, there], &compact, device);
                assert_eq!(redeem_patiently(here, &next, device).status, 200, "{}", here.log());
            }
            _ => {
                assert!(soon(&|| revoke(there, device)).is_some(), "{}", there.log());
                refused_as_used(&[here, there], &compact, device);
            }
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    };
    thread::scope(|scope| {
        for devices in devices.chunks(8) {
            let (one_round, stop) = (&one_round, &stop);
            scope.spawn(move || {
                let turns = devices.iter().cycle().enumerate();
                let goes_on = |_: &_| !stop.load(Ordering::Relaxed);
                turns.take_while(goes_on).for_each(|(n, device)| one_round(device, n / 5));
            });
        }
        let _stopped_at_the_end = Ends(&stop);
        for to in [1, 2, 0, 1, 0] {
            let to = cluster.masters()[to];
            if to != cluster.master_of("d") {
                let done = rounds.load(Ordering::Relaxed) + 8;
                cluster.move_slot(slot, to, || {
                    let go_on = || (rounds.load(Ordering::Relaxed) >= done).then_some(());
                    assert!(wait::until(Duration::from_secs(40), go_on).is_some(), "{}", b.log());
                });
            }
        }
    });
    let log = a.log() + &b.log();
    assert!(!log.contains("redeemed twice") && !log.contains("Redis connection lost"), "{log}");
}

/// Its devices wait, or are served from memory; the others do not notice.
#[test]
fn what_does_not_touch_a_lost_shard_goes_on() {
    let mut cluster = Cluster::with(&["--cluster-require-full-coverage", "no"]);
    let service = first(&cluster);
    let lost = cluster.master_of("lost0");
    let there = device_at(&cluster, lost, "lost");
    let before = token(&service, &there);
    let replica = cluster.replica_of(lost);
    cluster.servers[replica].kill9();
    cluster.servers[lost].kill9();
    service.health();
    service.wait_for_log("a part of Redis is lost");
    let ready = service.http.get("/ready");
    assert_eq!(ready.status, 200);
    assert!(ready.text().contains("a part of Redis is away"), "{}", ready.text());
    others_go_on(&cluster, &service, lost);
    check_error(&redeem(&service, &before, &there), 503, "SERVICE_UNAVAILABLE", "it is away");
    let mut names = (0..).map(|n: u32| format!("same{n}"));
    let is_there = |name: &String| slot_of(name) == slot_of(&there.name);
    let mut same = names.by_ref().filter(is_there).map(|name| Device::new(&name));
    let same = same.find(|device| cluster.master_of(&row_key(device)) != lost).unwrap();
    let row_node = &cluster.servers[cluster.master_of(&row_key(&same))];
    let looks = calls(row_node, "hget");
    let from_memory = token(&service, &same);
    // By the onboarding, and by the attempt to carry the token over.
    wait::for_true("that was tried", || calls(row_node, "hget") >= looks + 2);
    let answer = redeem_patiently(&service, &from_memory, &same);
    assert_eq!(answer.status, 200, "{}\n{}", answer.text(), service.log());
    cluster.servers[lost].start_again();
    service.wait_for_log("all of Redis is in reach again");
    refused_as_used(&[&service], &from_memory, &same);
    assert_eq!(redeem_patiently(&service, &before, &there).status, 200, "{}", service.log());
    wait::for_true("it is told of the use", || {
        cluster.cli(&["EXISTS", &mark_key(&from_memory, &same)]) == "1"
    });
}

/// What lies on the others is told and read; the rest is made up for.
#[test]
fn the_record_is_shared_while_a_shard_is_away() {
    const SOON: Duration = Duration::from_secs(10);
    let mut cluster = Cluster::of(0, &["--cluster-require-full-coverage", "no"]);
    let a = first(&cluster);
    let b = another(&a, &cluster);
    let are_shared = || [&a, &b].iter().all(|at| at.health()["record"]["shared"] == true);
    wait::for_true("all is shared", are_shared);
    let stream = cluster.keys().into_iter().find(|key| key.contains(":changes:")).unwrap();
    let home = cluster.master_of(&stream);
    let lost = (0..3).find(|at| *at != home).unwrap();
    let lives = |cluster: &Cluster, key: &str| cluster.master_of(key) != lost;
    let names = (0..60).map(|n| Device::new(&format!("here{n}")));
    let devices: Vec<Device> = names
        .filter(|device| lives(&cluster, &device.name) && lives(&cluster, &row_key(device)))
        .collect();
    let compared = calls(&cluster.servers[home], "hkeys");
    cluster.servers[lost].kill9();
    let bucket = |serial: &str| format!("{}:{}", stream.replace("changes", "certs"), &serial[..2]);
    let (mut told, mut aside) = (vec![], vec![]);
    for device in &devices {
        let compact = wait::until(SOON, || {
            let answer = onboard(&a, device);
            (answer.status == 200).then(|| answer.field("provisioning_token"))
        });
        let serial = instance::certificate(&a, &compact.unwrap(), device);
        match lives(&cluster, &bucket(&serial)) {
            true => told.push((device, serial)),
            false => aside.push(serial),
        }
        if told.len() > 3 && !aside.is_empty() {
            break;
        }
    }
    assert!(told.len() > 3 && !aside.is_empty(), "{} and {}", told.len(), aside.len());
    let knows =
        |serial: &String| b.serials().iter().any(|other| other.eq_ignore_ascii_case(serial));
    let came = wait::until(SOON, || told.iter().all(|(_, serial)| knows(serial)).then_some(()));
    assert!(came.is_some(), "b lacks certificates\n{}\n{}", a.log(), b.log());
    let (device, serial) = &told[0];
    let answer = revoke(&a, device);
    assert_eq!((answer.status, answer.json()["shared"].as_bool()), (200, Some(true)));
    let is_revoked =
        || b.index().iter().any(|line| line[0] == "R" && line[3].to_lowercase() == *serial);
    assert!(wait::until(SOON, || is_revoked().then_some(())).is_some(), "{}", b.log());
    assert!(!aside.iter().any(knows), "they lie on the lost shard");
    assert!(!are_shared(), "it is said");
    // What nobody can know is not denied.
    for (is_there, status) in [(true, 404), (false, 503)] {
        let names = (0..60).map(|n| Device::new(&format!("unknown{n}")));
        let is_it = |device: &Device| {
            let keys = [&device.name, &row_key(device)];
            keys.iter().all(|key| lives(&cluster, key) == is_there)
        };
        let device = names.into_iter().find(is_it).unwrap();
        let answer = revoke(&b, &device);
        assert_eq!(answer.status, status, "{}", answer.text());
    }
    assert_eq!(calls(&cluster.servers[home], "hkeys"), compared, "nothing is compared anew");
    cluster.servers[lost].start_again();
    wait::for_true("all is shared again", || are_shared() && aside.iter().all(knows));
    assert_eq!(a.index().len(), b.index().len());
    for serial in &aside {
        let there = || cluster.cli(&["HEXISTS", &bucket(serial), serial]) == "1";
        wait::for_true("it is put there", there);
    }
}

/// Its nodes say where its slots are, but not by what name.
#[test]
fn a_node_without_a_name_of_its_own_is_where_it_was_asked() {
    let node = Redis::start(&["--cluster-enabled", "yes"]);
    assert_eq!(node.cli(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]), "OK");
    wait::for_true("it serves", || node.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok"));
    let service = instance::first(&node.url(), &[IN_CLUSTER]);
    // To find it, twice, and every five seconds.
    wait::for_true("it was looked at", || calls(&node, "cluster|slots") >= 3);
    assert_eq!(service.token_count(), 0, "it serves");
    let log = service.log();
    assert!(!log.contains("a part of Redis is lost"), "{log}");
}

/// Two instances that tell each other of no use, and many tokens of the first. One of these, on a shard that
/// goes on, the second has redeemed when a master is lost; the first finds out when it next asks.
fn nobody_redeems_again(lose: impl FnOnce(&mut Redis)) -> String {
    let mut cluster = Cluster::with(&["--cluster-require-full-coverage", "no"]);
    let (url, env) = (cluster.url(), [IN_CLUSTER, ("SHARE_RECORD", "false")]);
    let a = instance::first(&url, &env);
    let b = instance::another(&a, &url, &env);
    let masters = cluster.masters();
    let mut devices = (0..).map(|n: u32| Device::new(&format!("here{n}")));
    let is_here = |device: &Device| {
        cluster.master_of(&device.name) == masters[0]
            && cluster.master_of(&row_key(device)) == masters[0]
    };
    let [device, other] = [(); 2].map(|()| devices.find(is_here).unwrap());
    let [compact, unused] = [&device, &other].map(|device| token(&a, device));
    for n in 0..1500 {
        token(&a, &Device { name: format!("another{n}"), csr: String::new() });
    }
    assert_eq!(redeem(&b, &compact, &device).status, 200, "{}", b.log());
    cluster.servers[3..].iter_mut().for_each(Redis::kill9);
    lose(&mut cluster.servers[masters[1]]);
    refused_as_used(&[&a], &compact, &device);
    a.wait_for_log("a part of Redis is lost");
    wait::for_true("what is in reach is counted", || b.token_count() > 500);
    assert_eq!(redeem_patiently(&a, &unused, &other).status, 200, "{}", a.log());
    a.log()
}

#[test]
fn a_lost_master_lets_nobody_redeem_again() {
    let log = nobody_redeems_again(Redis::kill9);
    assert!(!log.contains("Redis is back"), "nothing is carried over to those that stay\n{log}");
}

/// For its first seconds it calls the whole cluster down.
#[test]
fn a_master_that_starts_again_lets_nobody_redeem_again() {
    nobody_redeems_again(|master| {
        master.kill9();
        master.start_again();
    });
}

#[test]
fn a_cluster_without_the_setting_and_the_setting_without_a_cluster() {
    let check = |env: &[(&str, &str)], said: &str| {
        Setup::new().envs(env).start().wait_for_log(said);
    };
    let cluster = Cluster::start();
    let at = format!("127.0.0.1:{}", cluster.servers[0].port());
    let why = "it is a node of a cluster, which needs REDIS_CLUSTER=true";
    check(&[("REDIS_URL", &format!("redis://{at}"))], &format!("{at}: {why}"));
    let plain = Redis::start(&[]);
    let at = format!("127.0.0.1:{}", plain.port());
    let why = "it is no node of a cluster, see REDIS_CLUSTER";
    check(&[IN_CLUSTER, ("REDIS_URL", &plain.url())], &format!("{at}: {why}"));
}
