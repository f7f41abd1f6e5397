//! What a service manager hears: readiness that is true, a status, a pulse, reloads, and the end.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::check_error;
use crate::support::http::Connection;
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::temp::TempDir;

/// The manager's end of the socket.
struct Manager(UnixDatagram);

impl Manager {
    fn at(path: &std::path::Path) -> Self {
        Manager(UnixDatagram::bind(path).unwrap())
    }

    /// The next message, within `limit`.
    fn hear(&self, limit: Duration) -> Option<String> {
        self.0.set_read_timeout(Some(limit.max(Duration::from_millis(1)))).unwrap();
        let mut buf = [0; 4096];
        let length = self.0.recv(&mut buf).ok()?;
        Some(String::from_utf8(buf[..length].to_vec()).unwrap())
    }

    /// Everything up to the first message with this line, within 10 s.
    #[track_caller]
    fn hear_until(&self, line: &str) -> Vec<String> {
        let end = Instant::now() + Duration::from_secs(10);
        let mut heard = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let Some(message) = self.hear(left) else { panic!("no {line:?} in {heard:?}") };
            let found = message.lines().any(|l| l == line);
            heard.push(message);
            if found {
                return heard;
            }
        }
    }

    /// How many of these are heard in this time.
    fn count(&self, line: &str, during: Duration) -> usize {
        let end = Instant::now() + during;
        let mut count = 0;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return count;
            }
            count += usize::from(self.hear(left).is_some_and(|m| m.lines().any(|l| l == line)));
        }
    }
}

fn watched(dir: &TempDir, watchdog_us: &str) -> (Manager, Setup) {
    let path = dir.path().join("notify");
    let setup = Setup::new().env("NOTIFY_SOCKET", path.to_str().unwrap());
    (Manager::at(&path), setup.env("WATCHDOG_USEC", watchdog_us))
}

#[test]
fn ready_when_it_answers_and_stopping_when_it_stops() {
    let dir = TempDir::new();
    let (manager, setup) = watched(&dir, "");
    let mut service = setup.start();
    let heard = manager.hear_until("READY=1");
    assert_eq!(heard, ["STATUS=Tokens are in memory", "READY=1"]);
    assert_eq!(service.onboard("d").status, 200);
    // No watchdog, no pulse.
    assert_eq!(manager.hear(Duration::from_millis(300)), None);
    service.signal("TERM");
    let heard = manager.hear_until("STOPPING=1");
    assert_eq!(heard, ["STOPPING=1\nSTATUS=Finishing what was begun"]);
    assert_eq!(service.wait_exit().code, Some(0));
}

#[test]
fn a_pulse_at_half_of_the_time_or_more_often() {
    let dir = TempDir::new();
    let (manager, setup) = watched(&dir, "400000");
    let service = setup.start();
    manager.hear_until("READY=1");
    let beats = manager.count("WATCHDOG=1", Duration::from_secs(2));
    assert!((8..=11).contains(&beats), "{beats} in 2 s");
    // A process that does not run proves nothing.
    service.signal("STOP");
    let _ = manager.count("WATCHDOG=1", Duration::from_millis(100));
    let beats = manager.count("WATCHDOG=1", Duration::from_secs(1));
    service.signal("CONT");
    assert_eq!(beats, 0);
    manager.hear_until("WATCHDOG=1");
}

#[test]
fn the_pulse_goes_on_under_load() {
    let dir = TempDir::new();
    let (manager, setup) = watched(&dir, "100000");
    let service = setup.env("LOG_LEVEL", "warn").start();
    manager.hear_until("READY=1");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = || {
            let mut connection = Connection::open(&service.http).unwrap();
            let mut answered = 0;
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(connection.request("GET", "/api", &[], b"").unwrap().status, 200);
                answered += 1;
            }
            answered
        };
        let clients: Vec<_> = (0..16).map(|_| scope.spawn(load)).collect();
        let beats = manager.count("WATCHDOG=1", Duration::from_secs(3));
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            assert!(client.join().unwrap() > 0);
        }
        assert!(beats > 20, "{beats} in 3 s");
    });
}

#[test]
fn the_pulse_of_another_process_is_not_ours() {
    let dir = TempDir::new();
    let (manager, setup) = watched(&dir, "200000");
    let _service = setup.env("WATCHDOG_PID", "1").start();
    manager.hear_until("READY=1");
    assert_eq!(manager.count("WATCHDOG=1", Duration::from_secs(1)), 0);
}

#[test]
fn abstract_sockets_and_a_manager_that_was_started_anew() {
    let name = format!("mqtt-lite-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let manager = Manager(UnixDatagram::bind_addr(&address).unwrap());
    let setup = Setup::new().env("NOTIFY_SOCKET", &format!("@{name}"));
    let service = setup.env("WATCHDOG_USEC", "200000").start();
    manager.hear_until("READY=1");
    drop(manager);
    service.wait_for_log("the service manager cannot be told how we are: ");
    let manager = Manager(UnixDatagram::bind_addr(&address).unwrap());
    manager.hear_until("WATCHDOG=1");
    assert_eq!(service.log().matches("cannot be told").count(), 1);
}

#[test]
fn a_manager_that_cannot_be_reached_stops_nothing() {
    for name in ["relative", "vsock:2:9999", "/nowhere/notify"] {
        let service = Setup::new().env("NOTIFY_SOCKET", name).start();
        service.wait_for_log(if name.starts_with('/') {
            "cannot be told"
        } else {
            "cannot be used"
        });
        assert_eq!(service.onboard("d").status, 200);
    }
}

#[test]
fn the_status_follows_redis() {
    let dir = TempDir::new();
    let (manager, setup) = watched(&dir, "400000");
    let redis = Redis::start(&[]);
    let service = setup.env("REDIS_URL", &redis.url()).start();
    manager.hear_until("STATUS=Tokens are in Redis");
    drop(redis);
    service.onboard("d");
    manager.hear_until("STATUS=Redis is away, tokens are in memory until it is back");
    manager.hear_until("WATCHDOG=1");
}

#[test]
fn a_reload_is_announced_and_ends_with_readiness() {
    let dir = TempDir::new();
    let (manager, setup) = watched(&dir, "");
    let service = setup.start();
    manager.hear_until("READY=1");
    service.signal("HUP");
    let heard = manager.hear_until("READY=1");
    let [begun, ended] = &heard[..] else { panic!("{heard:?}") };
    let since = begun.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
    // The machine's uptime is the same clock, but for the time asleep.
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
    assert!(since.parse::<f64>().unwrap() / 1e6 <= uptime + 1.0, "{since} {uptime}");
    assert_eq!(ended, "READY=1");
}

#[test]
fn api_keys_are_read_again_and_both_or_none_change() {
    let dir = TempDir::new();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let setup = Setup::new()
        .env("ONBOARDING_API_KEY_FILE", &file("onboarding", "first-onboarding-key\n"))
        .env("ADMIN_API_KEY_FILE", &file("admin", "first-administrator-key"))
        .env("JWT_SECRET_FILE", &file("jwt", &"s".repeat(32)));
    let mut service = setup.start();
    let status = |service: &Service, key: &str, method: &str, path: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [("Authorization", &*bearer), ("Content-Type", "application/json")];
        let body = if method == "POST" { br#"{"device_id":"d"}"#.as_slice() } else { b"" };
        service.http.request(method, path, &headers, body).status
    };
    let onboards =
        |service: &Service, key: &str| status(service, key, "POST", "/api/v1/onboarding") != 401;
    let revokes = |service: &Service, key: &str| {
        status(service, key, "DELETE", "/api/v1/certificates/d") != 403
    };
    assert!(onboards(&service, "first-onboarding-key"));
    assert!(!onboards(&service, "second-onboarding-key"));

    // One file is bad: nothing changes, not even by the other.
    file("onboarding", "second-onboarding-key");
    file("admin", "short");
    service.signal("HUP");
    service.wait_for_log("SIGHUP: everything stays as it was: ADMIN_API_KEY: must be");
    assert!(onboards(&service, "first-onboarding-key"));
    assert!(!onboards(&service, "second-onboarding-key"));

    file("admin", "second-administrator-key");
    file("jwt", &"t".repeat(32));
    service.signal("HUP");
    let log = service.wait_for_log("SIGHUP: JWT_SECRET has changed");
    assert!(!log.contains("second-administrator-key") && !log.contains("tttt"), "{log}");
    assert!(onboards(&service, "second-onboarding-key"));
    assert!(!onboards(&service, "first-onboarding-key"));
    assert!(revokes(&service, "second-administrator-key"));
    assert!(!revokes(&service, "first-administrator-key"));
    assert!(!service.log().contains("ONBOARDING_API_KEY is gone"));
    assert_eq!(service.terminate().code, Some(0));
}

/// Who may onboard is then another question, also where nobody but a proxy reaches the port.
#[test]
fn a_key_that_is_gone_is_told() {
    let dir = TempDir::new();
    let path = dir.path().join("environment");
    fs::write(&path, "ONBOARDING_API_KEY=first-onboarding-key\n").unwrap();
    let service = Setup::new().args(&["--env-file", path.to_str().unwrap()]).start();
    check_error(&service.onboard("d"), 401, "API_KEY_REQUIRED", "with a key");
    fs::write(&path, "ONBOARDING_API_KEY=\n").unwrap();
    service.signal("HUP");
    service.wait_for_log("ONBOARDING_API_KEY is gone: whoever reaches the port can onboard");
    assert_eq!(service.onboard("d").status, 200);
}
