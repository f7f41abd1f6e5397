//! The CA as a whole, and for the tests of its parts the real `openssl`: whoever checks our certificates
//! is not us.

use std::fs;
use std::process::Command;

use super::*;
use crate::clock;
use crate::files::test_dir::TestDir;

/// Runs `openssl` in a folder, by the words of `line`, and gives what it says on both channels.
/// `Err` if it fails.
pub(super) fn run(dir: &Path, line: &str) -> Result<String, String> {
    run_program(dir, "openssl", line)
}

/// The same for any program.
pub(super) fn run_program(dir: &Path, program: &str, line: &str) -> Result<String, String> {
    let words = line.split_whitespace().map(|w| w.replace('~', " "));
    let words: Vec<String> = words.collect();
    let run = || Command::new(program).args(&words).current_dir(dir).output().unwrap();
    let mut out = run();
    // faketime names what it shares by its process id, and one that was killed left it behind.
    for _ in 0..5 {
        if String::from_utf8_lossy(&out.stderr).contains("sem_open") {
            out = run();
        }
    }
    let mut said = String::from_utf8_lossy(&out.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&out.stderr));
    if out.status.success() { Ok(said) } else { Err(said) }
}

/// Runs what must succeed.
pub(super) fn must(dir: &Path, line: &str) -> String {
    run(dir, line).unwrap_or_else(|e| panic!("openssl {line}: {e}"))
}

fn settings(dir: &Path) -> config::Ca {
    config::Ca { dir: dir.join("ca"), root_validity_years: 10, device_validity_days: 90 }
}

fn open(dir: &Path, now: Now) -> Result<Ca, String> {
    Ca::open(&settings(dir), now).map_err(|e| e.to_string())
}

const NO_CLOCK: Now = Now { unix_ms: 0, mono_ms: 0 };

#[test]
fn a_ca_is_made_when_the_clock_is_right() {
    let dir = TestDir::new();
    let ca = open(&dir, NO_CLOCK).unwrap();
    assert!(ca.issuer().is_none() && !ca.clock_is_plausible(NO_CLOCK));
    assert!(matches!(ca.settle(NO_CLOCK), Ok(false)));
    let now = clock::now();
    assert!(matches!(ca.settle(now), Ok(true)));
    let fingerprint = ca.issuer().unwrap().fingerprint().to_owned();
    assert!(matches!(ca.settle(now), Ok(true)));
    assert!(matches!(ca.settle(NO_CLOCK), Ok(false)), "and a clock may go wrong again");
    drop(ca);
    for now in [now, NO_CLOCK] {
        let again = open(&dir, now).unwrap();
        assert_eq!(again.issuer().unwrap().fingerprint(), fingerprint);
    }
    let before = Now { unix_ms: now.unix_ms - 25 * 3_600_000, ..now };
    assert!(!open(&dir, now).unwrap().clock_is_plausible(before), "before the CA's notBefore");
}

#[test]
fn an_expired_ca_is_judged_by_a_right_clock_only() {
    let dir = TestDir::new();
    let folder = dir.join("ca");
    fs::create_dir(&folder).unwrap();
    must(&folder, "genpkey -algorithm ED25519 -out root-ca.key");
    let req = "req -x509 -key root-ca.key -out root-ca.crt -subj /CN=x -days 30";
    run_program(&folder, "faketime", &format!("2020-01-01~00:00:00 openssl {req}")).unwrap();
    let error = open(&dir, clock::now()).unwrap_err();
    assert!(error.contains("root-ca.crt: the CA expired at 2020-01-31"), "{error}");
    let ca = open(&dir, NO_CLOCK).unwrap();
    let error = ca.settle(clock::now()).unwrap_err().to_string();
    assert!(error.contains("root-ca.crt: the CA expired at 2020-01-31"), "{error}");
    let problem = Problem::from(ca.settle(clock::now()).unwrap_err());
    assert_eq!(problem.code, Code::ServiceUnavailable);
}

#[test]
fn a_record_without_its_ca() {
    let dir = TestDir::new();
    drop(open(&dir, clock::now()).unwrap());
    let line = format!("V\t300101000000Z\t\t{}\tunknown\t/CN=d\n", "41".repeat(16));
    fs::write(dir.join("ca/index.txt"), line).unwrap();
    open(&dir, clock::now()).unwrap();
    for name in [issuer::CERTIFICATE, issuer::KEY] {
        fs::remove_file(dir.join("ca").join(name)).unwrap();
        let error = open(&dir, clock::now()).unwrap_err();
        assert!(error.contains("root-ca.crt: missing"), "{error}");
    }
}

#[test]
fn a_list_is_published() {
    let dir = TestDir::new();
    let ca = open(&dir, NO_CLOCK).unwrap();
    assert!(matches!(ca.publish_crl(clock::now()), Err(CaError::ClockNotSet)));
    ca.settle(clock::now()).unwrap();
    let first = ca.publish_crl(clock::now()).unwrap();
    drop(ca);
    let again = open(&dir, clock::now()).unwrap();
    assert_eq!(again.crl(), None);
    let second = again.publish_crl(clock::now()).unwrap();
    assert!(second.number > first.number);
    assert_eq!(fs::read_to_string(dir.join("ca/crl.pem")).unwrap(), second.pem);
    assert_eq!(again.crl(), Some(second));
}

#[test]
fn many_threads_make_one_ca() {
    let dir = TestDir::new();
    let ca = open(&dir, NO_CLOCK).unwrap();
    std::thread::scope(|scope| {
        (0..8).for_each(|_| drop(scope.spawn(|| ca.settle(clock::now()).unwrap())));
    });
    let on_disk = open(&dir, clock::now()).unwrap().issuer().unwrap();
    assert_eq!(on_disk.fingerprint(), ca.issuer().unwrap().fingerprint());
}
