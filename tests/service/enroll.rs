//! `scripts/enroll.sh` as a device runs it: with curl, and under busybox with nothing but its applets
//! and openssl.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use crate::support::clock::FakeClock;
use crate::support::csr::{self, Csr};
use crate::support::device::{Device, Surroundings, script};
use crate::support::https;
use crate::support::port::Port;
use crate::support::proxy::{Proxy, Stop};
use crate::support::service::{ADMIN_KEY, Service, Setup, send_signal};
use crate::support::temp::TempDir;
use crate::support::token::claims_in;
use crate::support::wait;

const BOTH: [Surroundings; 2] = [Surroundings::Full, Surroundings::Busybox];
const API_KEY: &str = "onboarding-key-of-the-tests";

fn http_url(service: &Service) -> String {
    format!("http://127.0.0.1:{}", service.port())
}

fn https_url(service: &Service) -> String {
    format!("https://localhost:{}", service.port())
}

fn fingerprint(service: &Service) -> String {
    csr::x509_field(&service.read("ca/root-ca.crt"), &["-fingerprint", "-sha256"])
}

fn serial(device: &Device) -> String {
    csr::x509_field(&device.read("device.crt"), &["-serial"])
}

/// The files are there, belong together, and are as open as they may be.
#[track_caller]
fn check_files(device: &Device, service: &Service) {
    assert_eq!(device.files(), ["ca.crt", "device.crt", "device.key"]);
    let mode = |name: &str| fs::metadata(device.file(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!([mode("device.key"), mode("device.crt"), mode("ca.crt")], [0o600, 0o644, 0o644]);
    check_pair(device, service);
    csr::verify_with_openssl(&device.read("ca.crt"), &device.read("device.crt")).unwrap();
}

/// Certificate and key belong together, whatever the time is.
#[track_caller]
fn check_pair(device: &Device, service: &Service) {
    let (crt, ca) = (device.read("device.crt"), device.read("ca.crt"));
    assert_eq!(ca.trim(), service.read("ca/root-ca.crt").trim());
    let public = csr::openssl(&["pkey", "-pubout"], &device.read("device.key"));
    assert_eq!(csr::openssl(&["x509", "-noout", "-pubkey"], &crt), public);
    let subject = csr::x509_field(&crt, &["-subject", "-nameopt", "RFC2253"]);
    assert_eq!(subject, format!("CN={}", device.name));
}

#[test]
fn shellcheck_has_nothing_to_say() {
    let output = Command::new("shellcheck").arg(script()).output().unwrap_or_else(|e| {
        panic!("shellcheck is not installed (scripts/test.sh installs it): {e}");
    });
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn enrolled_once_and_then_left_alone() {
    for surroundings in BOTH {
        let service = Setup::new().start();
        let device = Device::new("d:1", &http_url(&service)).surroundings(surroundings);
        let said = device.must_enroll(&[]);
        assert!(said.contains("WARNING"), "an unpinned CA is warned of: {said}");
        check_files(&device, &service);
        let before = (serial(&device), device.read("device.key"));
        for _ in 0..2 {
            let said = device.must_enroll(&[]);
            assert!(!said.contains("WARNING"), "{said}");
            assert_eq!((serial(&device), device.read("device.key")), before, "{surroundings:?}");
        }
        assert_eq!(service.index().len(), 1);
        drop(service);
        device.must_enroll(&[]); // nothing is asked when nothing is to be done
    }
}

#[test]
fn with_a_key_and_a_pinned_ca() {
    for surroundings in BOTH {
        let setup = Setup::new().env("ONBOARDING_API_KEY", API_KEY);
        let service = setup.env("ADMIN_API_KEY", ADMIN_KEY).start();
        let dir = TempDir::new();
        let key = dir.file("key", &format!("{API_KEY}\n")).display().to_string();
        let wrong = dir.file("wrong", "another-key-altogether").display().to_string();
        let pin = fingerprint(&service);
        let device = Device::new("d", &http_url(&service)).surroundings(surroundings);
        let refused = device.enroll(&["--api-key-file", &wrong, "--ca-fingerprint", &pin]);
        assert_eq!(refused.code, Some(4), "{refused:?}");
        assert!(!refused.said.contains("another-key"), "{refused:?}");
        assert_eq!(device.enroll(&["--ca-fingerprint", &pin]).code, Some(4), "without a key");
        let said = device.must_enroll(&["--api-key-file", &key, "--ca-fingerprint", &pin]);
        assert!(!said.contains("WARNING"), "{said}");
        check_files(&device, &service);

        // A token whose answer was lost is replaced, since the key allows it.
        let bearer = format!("Bearer {API_KEY}");
        let body = serde_json::json!({"device_id": "e"});
        let headers = [("Authorization", &*bearer)];
        assert_eq!(service.http.post_with("/api/v1/onboarding", &headers, &body).status, 200);
        let other = Device::new("e", &http_url(&service)).surroundings(surroundings);
        other.must_enroll(&["--api-key-file", &key, "--tries", "3"]);
    }
}

#[test]
fn a_man_in_the_middle_with_another_ca() {
    let pin = fingerprint(&Setup::new().start());
    let (plain, secure) = (Setup::new().start(), https::start(Setup::new()));
    for surroundings in BOTH {
        for url in [http_url(&plain), https_url(&secure)] {
            let device = Device::new("d", &url).surroundings(surroundings);
            let outcome = device.enroll(&["--ca-fingerprint", &pin]);
            assert_eq!(outcome.code, Some(5), "{outcome:?}");
            assert!(!device.folder().exists(), "nothing is written: {:?}", device.files());
        }
        // Once a CA is in the folder it counts, pinned or not.
        let device = Device::new("d", &https_url(&secure)).surroundings(surroundings);
        fs::create_dir(device.folder()).unwrap();
        fs::copy(plain.data("ca/root-ca.crt"), device.file("ca.crt")).unwrap();
        let outcome = device.enroll(&[]);
        assert_eq!(outcome.code, Some(5), "{outcome:?}");
        let mut left = device.files();
        left.retain(|name| name != "device.key.new");
        assert_eq!(left, ["ca.crt"], "{surroundings:?}");
    }
    let issued = plain.log() + &secure.log();
    assert!(!issued.contains("issued for"), "nobody asked for a token: {issued}");
}

#[test]
fn a_server_of_another_name_is_refused() {
    // It listens everywhere, but its certificate names localhost and 127.0.0.1 only.
    let service = https::start(Setup::new().env("HTTP_HOST", "0.0.0.0"));
    for surroundings in BOTH {
        let url = format!("https://127.0.0.2:{}", service.port());
        let device = Device::new("d", &url).surroundings(surroundings);
        let outcome = device.enroll(&[]);
        assert_eq!(outcome.code, Some(5), "{outcome:?}");
        let url = format!("https://127.0.0.1:{}", service.port());
        let name = format!("d-{surroundings:?}");
        Device::new(&name, &url).surroundings(surroundings).must_enroll(&[]);
    }
    assert_eq!(service.index().len(), 2);
}

#[test]
fn exit_codes() {
    let service = Setup::new().start();
    let device = Device::new("d", &http_url(&service));
    for bad in [&["--no-such"][..], &["--tries"], &["--tries", "x"], &["--ca-fingerprint", "12"]] {
        assert_eq!(device.enroll(bad).code, Some(2), "{bad:?}");
    }
    assert_eq!(Device::new("a/b", &http_url(&service)).enroll(&[]).code, Some(2));
    assert_eq!(Device::new("d", "ftp://x").enroll(&[]).code, Some(2));
    let help = device.enroll(&["--help"]);
    assert!(help.code == Some(0) && help.said.contains("exit codes"), "{help:?}");
    assert_eq!(device.enroll(&["--api-key-file", "/no/such"]).code, Some(1));
    assert!(!device.folder().exists());
    for surroundings in BOTH {
        let nobody = Port::any();
        let url = format!("http://127.0.0.1:{}", nobody.number());
        let device = Device::new("d", &url).surroundings(surroundings);
        assert_eq!(device.enroll(&["--tries", "1"]).code, Some(3), "nobody is there");

        let name = format!("taken-{surroundings:?}");
        service.enroll(&name, &Csr::new(&name).make());
        let device = Device::new(&name, &http_url(&service)).surroundings(surroundings);
        let outcome = device.enroll(&[]);
        assert_eq!(outcome.code, Some(4), "{outcome:?}");
        assert!(outcome.said.contains("active certificate"), "{outcome:?}");
    }
}

#[test]
fn why_it_is_tried_again_is_said() {
    let service = Setup::new().env("MEMORY_MAX_TOKENS", "1").start();
    assert_eq!(service.onboard("other").status, 200);
    // busybox's wget does not show the code.
    let answers = [(Surroundings::Full, "503 STORE_FULL"), (Surroundings::Busybox, "503")];
    for (surroundings, answer) in answers {
        let device = Device::new("d", &http_url(&service)).surroundings(surroundings);
        let outcome = device.enroll(&["--tries", "2"]);
        assert_eq!(outcome.code, Some(3), "{outcome:?}");
        for then in ["trying again in", "giving up for now after 2 attempts"] {
            assert!(outcome.said.contains(&format!("enroll: {answer}: {then}")), "{outcome:?}");
        }
    }
    // A token that is live, which has busybox look for a certificate first.
    for (surroundings, answer) in
        [(Surroundings::Full, "409 TOKEN_ALREADY_ACTIVE"), (Surroundings::Busybox, "409")]
    {
        let device = Device::new("other", &http_url(&service)).surroundings(surroundings);
        let outcome = device.enroll(&["--tries", "2"]);
        assert_eq!(outcome.code, Some(3), "{outcome:?}");
        let said = format!("enroll: {answer}: trying again in");
        assert!(outcome.said.contains(&said), "{outcome:?}");
    }
}

#[test]
fn renewal_when_a_third_is_left() {
    for surroundings in BOTH {
        let clock = FakeClock::at(crate::support::clock::now_s());
        let env = clock.env();
        let pairs: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
        let setup = Setup::new().env("DEVICE_CERT_VALIDITY_DAYS", "30").envs(&pairs);
        let service = https::start(setup);
        let device =
            Device::new("d", &https_url(&service)).surroundings(surroundings).env(&clock.env());
        device.must_enroll(&[]);
        check_files(&device, &service);
        let (first, key) = (serial(&device), device.read("device.key"));
        let day = |n: u64| clock.set(crate::support::clock::now_s() + n * 86_400);
        day(19);
        device.must_enroll(&[]);
        assert_eq!(serial(&device), first, "more than a third is left");
        day(21);
        device.must_enroll(&[]);
        assert_ne!(serial(&device), first, "{surroundings:?}: {}", service.log());
        assert_ne!(device.read("device.key"), key, "a new key");
        assert_eq!(service.index().len(), 2);
        assert!(service.log().contains("in renewal of"), "{}", service.log());
        assert_eq!(device.files(), ["ca.crt", "device.crt", "device.key"]);
        let second = serial(&device);
        // Too late for a renewal: a new onboarding.
        day(60);
        device.must_enroll(&[]);
        assert_ne!(serial(&device), second);
        assert_eq!(service.log().matches("in renewal of").count(), 1, "{}", service.log());
    }
}

#[test]
fn a_revoked_device_stays_out() {
    let clock = FakeClock::at(crate::support::clock::now_s());
    let env = clock.env();
    let pairs: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    let setup = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY).envs(&pairs);
    let service = https::start(setup);
    let device = Device::new("d", &https_url(&service)).env(&clock.env());
    device.must_enroll(&[]);
    let before = serial(&device);
    let bearer = format!("Authorization: Bearer {ADMIN_KEY}");
    let args = ["-X", "DELETE", "-H", &bearer];
    let mut curl = Command::new("curl");
    let url = format!("{}/api/v1/certificates/d", https_url(&service));
    assert!(curl.args(["-qsSkf"]).args(args).arg(url).output().unwrap().status.success());
    clock.set(crate::support::clock::now_s() + 70 * 86_400);
    let outcome = device.enroll(&["--tries", "2"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(outcome.said.contains("CLIENT_CERTIFICATE_REVOKED"), "{outcome:?}");
    assert_eq!(serial(&device), before);
}

#[test]
fn a_lost_answer_is_recovered() {
    for surroundings in BOTH {
        for is_killed in [false, true] {
            let service = Setup::new().start();
            let proxy = Proxy::start(service.port());
            let url = format!("http://127.0.0.1:{}", proxy.port());
            let device = Device::new("d", &url).surroundings(surroundings);
            let trap = proxy.trap("/api/v1/sign-csr", Stop::After);
            let mut run = device.begin(&[]);
            trap.wait();
            wait::for_true("the certificate is signed", || service.index().len() == 1);
            if is_killed {
                send_signal(run.id(), "KILL");
            }
            trap.throw_away();
            proxy.reset();
            let ended = run.wait().unwrap();
            assert_eq!(ended.success(), !is_killed, "{surroundings:?}");
            if is_killed {
                assert!(device.files().contains(&"device.key.new".to_owned()));
                device.must_enroll(&[]);
            }
            check_files(&device, &service);
            assert_eq!(service.index().len(), 1, "one certificate, not two: {}", service.log());
        }
    }
}

#[test]
fn a_renewal_that_is_cut_short_is_finished_by_the_next_run() {
    for surroundings in BOTH {
        let clock = FakeClock::at(crate::support::clock::now_s());
        let env = clock.env();
        let pairs: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
        let service = https::start(Setup::new().envs(&pairs));
        let device =
            Device::new("d", &https_url(&service)).surroundings(surroundings).env(&clock.env());
        device.must_enroll(&[]);
        clock.set(crate::support::clock::now_s() + 70 * 86_400);
        let mut run = device.begin(&[]);
        wait::for_true("the new one is signed", || service.index().len() == 2);
        let _ = run.kill();
        let _ = run.wait();
        device.must_enroll(&[]);
        assert_eq!(device.files(), ["ca.crt", "device.crt", "device.key"]);
        check_pair(&device, &service);
        assert_eq!(service.index().len(), 2, "{}", service.log());
        assert_eq!(serial(&device), service.index()[1][3]);
    }
}

#[test]
fn a_replacement_that_a_power_cut_has_halved() {
    let service = Setup::new().start();
    let device = Device::new("d", &http_url(&service));
    device.must_enroll(&[]);
    let whole = serial(&device);
    let rename = |from: &str, to: &str| fs::rename(device.file(from), device.file(to)).unwrap();
    let check = || {
        device.must_enroll(&[]);
        check_files(&device, &service);
        assert_eq!(serial(&device), whole);
    };
    rename("device.crt", "device.crt.new");
    check();
    rename("device.crt", "device.crt.new");
    rename("device.key", "device.key.new");
    check();
    fs::write(device.file("device.crt.new"), "half of a certif").unwrap();
    check();
    assert_eq!(service.index().len(), 1);
}

/// By `flock`; without it, as in the busybox of Debian; and on a file system that has no such locks.
#[test]
fn one_run_at_a_time() {
    let fails = "echo 'flock: 0: No locks available' >&2; exit 71";
    for (surroundings, flock) in [
        (Surroundings::Full, "exec REAL \"$@\""),
        (Surroundings::Busybox, ""),
        (Surroundings::Full, fails),
    ] {
        let service = Setup::new().start();
        let proxy = Proxy::start(service.port());
        let url = format!("http://127.0.0.1:{}", proxy.port());
        let mut device = Device::new("d", &url).surroundings(surroundings);
        if surroundings == Surroundings::Full {
            device = device.program("flock", flock);
        }
        fs::create_dir(device.folder()).unwrap();
        let trap = proxy.trap("/api/v1/sign-csr", Stop::Before);
        let mut run = device.begin(&[]);
        trap.wait();
        let outcome = device.enroll(&[]);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(outcome.said.contains("in progress"), "{outcome:?}");
        trap.release();
        assert!(run.wait().unwrap().success(), "{surroundings:?}");
        assert_eq!(device.files(), ["ca.crt", "device.crt", "device.key"]);
    }
}

/// Who starts it may have closed what it reads and writes, or be gone: it does its work all the same, and
/// leaves nothing behind.
#[test]
fn nobody_has_to_listen() {
    let service = Setup::new().start();
    let gone = r#"exit "$({ { "$@" 2>&1; echo $? >&3; } | :; } 3>&1)""#;
    let ways = [r#"exec "$@" <&- >&- 2>&-"#, r#"exec "$@" >/dev/full 2>&1"#, gone];
    for (n, way) in ways.into_iter().enumerate() {
        for surroundings in BOTH {
            let device = Device::new(&format!("d-{n}-{surroundings:?}"), &http_url(&service));
            let device = device.surroundings(surroundings).wrapper(&["sh", "-c", way, "sh"]);
            let tmp = device.outside().join("tmp");
            fs::create_dir(&tmp).unwrap();
            let device = device.env(&[("TMPDIR", tmp.display().to_string())]);
            let outcome = device.enroll(&["--tries", "1"]);
            assert_eq!(outcome.code, Some(0), "{way}: {outcome:?}");
            check_files(&device, &service);
            assert_eq!(fs::read_dir(tmp).unwrap().count(), 0, "{way}");
        }
    }
}

/// While it waits, too: a shell by itself looks at a signal when what it has begun ends.
#[test]
fn it_ends_when_it_is_told_to() {
    for surroundings in BOTH {
        let device = Device::new("d", "http://127.0.0.1:1").surroundings(surroundings);
        let tmp = device.outside().join("tmp");
        fs::create_dir(&tmp).unwrap();
        let device = device.env(&[("TMPDIR", tmp.display().to_string())]);
        let mut run = device.begin(&["--splay", "100000"]);
        let begun =
            || fs::read_dir(&tmp).unwrap().any(|e| e.unwrap().path().join("store").exists());
        wait::for_true("it has begun", begun);
        send_signal(run.id(), "TERM");
        let ended = wait::until(Duration::from_secs(10), || run.try_wait().unwrap());
        if ended.is_none() {
            run.kill().unwrap();
        }
        assert_eq!(ended.and_then(|status| status.code()), Some(1), "{surroundings:?}");
        assert_eq!(fs::read_dir(tmp).unwrap().count(), 0);
    }
}

/// Into one a file would be moved, key and all, as into its place.
#[test]
fn a_folder_in_the_place_of_a_file() {
    let service = Setup::new().start();
    for name in ["ca.crt", "device.crt", "device.key", "device.key.new"] {
        let device = Device::new("d", &http_url(&service));
        fs::create_dir_all(device.file(name)).unwrap();
        let outcome = device.enroll(&[]);
        assert_eq!(outcome.code, Some(1), "{name}: {outcome:?}");
        assert!(outcome.said.contains(&format!("{name} is a folder")), "{outcome:?}");
        assert_eq!(device.files(), [name]);
    }
    assert!(service.index().is_empty(), "{}", service.log());
}

/// What a power cut leaves names a process that is no more, or is another one by now: in a container,
/// where the first processes have the same ids after each start, there always is one.
#[test]
fn a_lock_that_nobody_holds_any_more() {
    for surroundings in BOTH {
        let service = Setup::new().start();
        let device = Device::new("d", &http_url(&service)).surroundings(surroundings);
        let lock = device.file(".enroll.lock");
        let own_id = std::process::id().to_string();
        for (file, left) in [
            ("pid", "999999".to_owned()),
            ("pid", own_id.clone()),
            ("run", String::new()),
            ("run", format!("{own_id} 0cf4cbd2-27d4-4bc9-8c37-6ad7ac1a3a3b 4711")),
        ] {
            fs::create_dir_all(&lock).unwrap();
            fs::write(lock.join(file), left).unwrap();
            device.must_enroll(&[]);
            check_files(&device, &service);
        }
        // As it is really left, but for the process' id, which a later one has.
        let proxy = Proxy::start(service.port());
        let url = format!("http://127.0.0.1:{}", proxy.port());
        let device = Device::new("e", &url).surroundings(surroundings);
        fs::create_dir(device.folder()).unwrap();
        let trap = proxy.trap("/api/v1/onboarding", Stop::Before);
        let mut run = device.begin(&[]);
        trap.wait();
        let _ = run.kill();
        let _ = run.wait();
        if let Ok(entries) = fs::read_dir(device.file(".enroll.lock")) {
            for path in entries.map(|entry| entry.unwrap().path()) {
                let text = fs::read_to_string(&path).unwrap();
                fs::write(&path, text.replacen(&run.id().to_string(), &own_id, 1)).unwrap();
            }
        }
        trap.throw_away();
        device.must_enroll(&[]);
        check_files(&device, &service);
    }
}

#[test]
fn keys_and_tokens_are_in_no_process_list() {
    let service = https::start(Setup::new().env("ONBOARDING_API_KEY", API_KEY));
    let dir = TempDir::new();
    let key = dir.file("key", API_KEY).display().to_string();
    // Other tests show keys to nobody but the machine: only this test's processes have the variable.
    let spy = "while :; do for at in $(grep -lsa SPIED_UPON= /proc/[0-9]*/environ); do
        cat ${at%environ}cmdline; done; done 2>/dev/null | tr '\\0' ' '";
    for surroundings in BOTH {
        let seen = fs::File::create(dir.path().join("seen")).unwrap();
        let mut spying = Command::new("sh");
        spying.args(["-c", spy]).process_group(0).stdout(seen);
        let mut spying = spying.spawn().unwrap();
        let name = format!("d-{surroundings:?}");
        let spied_upon = [("SPIED_UPON", "yes".to_owned())];
        let device = Device::new(&name, &https_url(&service)).surroundings(surroundings);
        device.env(&spied_upon).must_enroll(&["--api-key-file", &key]);
        let _ = Command::new("sh").args(["-c", &format!("kill -9 -{}", spying.id())]).status();
        let _ = spying.wait();
        let seen =
            String::from_utf8_lossy(&fs::read(dir.path().join("seen")).unwrap()).into_owned();
        assert!(seen.contains(&name), "the spy has seen the script");
        assert!(!seen.contains(API_KEY), "{surroundings:?}");
        // Other tests run beside this one, and show theirs: only a token of this device counts.
        let words = seen.split(|c: char| !c.is_ascii_alphanumeric() && !"-_.".contains(c));
        let mut devices = words.filter_map(claims_in).map(|claims| claims["device_id"].clone());
        assert!(devices.all(|device| device != name.as_str()), "{surroundings:?}");
    }
}
