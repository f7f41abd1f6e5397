//! What the program writes to its disk, which on a gateway is flash: nothing for a token, and for a
//! certificate two small writes, whose size is printed here and stands in docs/operations.md.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::support::csr::Csr;
use crate::support::http::Connection;
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::{check_error, wait};
use serde_json::json;

const DEVICES: usize = 10_000;
const CLIENTS: usize = 8;

/// What is on disk below `DATA_DIR`, and what the process has given to the file system until now.
#[derive(Debug, PartialEq, Eq)]
struct Disk {
    /// Size, inode, and the times of the last change of content and of anything, in nanoseconds.
    files: BTreeMap<PathBuf, [i128; 4]>,
    /// `write_bytes` of `/proc/PID/io`: whole pages made dirty, whatever the file.
    written: u64,
}

impl Disk {
    fn of(service: &Service) -> Self {
        let mut files = BTreeMap::new();
        enter(&service.data(""), &mut files);
        Disk { files, written: written(service) }
    }
}

fn enter(path: &Path, files: &mut BTreeMap<PathBuf, [i128; 4]>) {
    let seen = fs::symlink_metadata(path).unwrap();
    let at = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
    let (size, inode) = (seen.size().into(), seen.ino().into());
    let changed = [at(seen.mtime(), seen.mtime_nsec()), at(seen.ctime(), seen.ctime_nsec())];
    files.insert(path.to_owned(), [size, inode, changed[0], changed[1]]);
    if seen.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            enter(&entry.unwrap().path(), files);
        }
    }
}

fn written(service: &Service) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/io", service.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: ")).unwrap();
    line.parse().unwrap()
}

/// The kernel counts no writes to memory.
fn is_counted(service: &Service) -> bool {
    let output = Command::new("stat").args(["-f", "-c", "%T"]).arg(service.dir()).output().unwrap();
    !matches!(String::from_utf8(output.stdout).unwrap().trim(), "tmpfs" | "ramfs")
}

fn start(setup: Setup) -> Service {
    let service = setup.log_to_pipe().start();
    wait::for_true("all is made that a start makes", || {
        service.http.get("/ready").status == 200 && service.data("ca/crl.pem").exists()
    });
    service
}

/// As many devices, each onboarded once, over connections that are kept.
fn onboard(service: &Service, devices: usize) {
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                let mut connection = Connection::open(&service.http).unwrap();
                for n in (client..devices).step_by(CLIENTS) {
                    let device = json!({"device_id": format!("device-{n}")});
                    let answer = connection.post("/api/v1/onboarding", &device).unwrap();
                    assert_eq!(answer.status, 200, "{n}: {}", answer.text());
                }
            });
        }
    });
}

/// What else costs no certificate.
fn ask_in_vain(service: &Service) {
    let token = service.token("in-vain");
    check_error(&service.onboard("in-vain"), 409, "TOKEN_ALREADY_ACTIVE", "a live token");
    check_error(&service.sign(&token, "garbage"), 400, "INVALID_CSR", "garbage");
    let foreign = Csr::new("another").make();
    check_error(&service.sign(&token, &foreign), 400, "CSR_DEVICE_MISMATCH", "another's");
    check_error(&service.sign("forged", &foreign), 401, "TOKEN_INVALID_FORMAT", "forged");
    for path in ["/health", "/ready", "/metrics", "/api/v1/ca", "/api/v1/crl"] {
        assert_eq!(service.http.get(path).status, 200, "{path}");
    }
}

#[track_caller]
fn check_that_tokens_write_nothing(setup: Setup) {
    // So that tokens end, too, while this is looking.
    let service = start(setup.env("PROVISIONING_TOKEN_TTL", "5"));
    let before = Disk::of(&service);
    onboard(&service, DEVICES);
    ask_in_vain(&service);
    wait::for_true("all tokens have ended", || service.token_count() == 0);
    assert_eq!(service.log().matches(" issued").count(), DEVICES + 1, "lines of the log");
    assert_eq!(Disk::of(&service), before);

    // The same look sees a certificate.
    service.enroll("one", &Csr::new("one").make());
    let after = Disk::of(&service);
    let changed: Vec<&PathBuf> = after
        .files
        .iter()
        .filter(|(path, seen)| before.files.get(*path) != Some(seen))
        .map(|(path, _)| path)
        .collect();
    assert!(changed.contains(&&service.data("ca/index.txt")), "{changed:?}");
    assert!(after.written > before.written || !is_counted(&service), "{}", after.written);
}

#[test]
fn tokens_in_memory_write_nothing() {
    check_that_tokens_write_nothing(Setup::new());
}

#[test]
fn tokens_in_redis_write_nothing() {
    let redis = Redis::start(&[]);
    let secret = ("JWT_SECRET", crate::support::token::SECRET);
    check_that_tokens_write_nothing(Setup::new().envs(&[("REDIS_URL", &redis.url()), secret]));
}

/// Run it with `--nocapture` for the figures.
#[test]
fn a_certificate_writes_two_pages() {
    const CERTIFICATES: u64 = 200;
    let service = start(Setup::new().env("ADMIN_API_KEY", crate::support::service::ADMIN_KEY));
    let csr = |n| Csr::new(&format!("device-{n:03}")).make();
    let csrs: Vec<String> = (0..CERTIFICATES).map(csr).collect();
    let tokens: Vec<String> =
        (0..CERTIFICATES).map(|n| service.token(&format!("device-{n:03}"))).collect();
    let before = Disk::of(&service);
    let mut each = vec![];
    for (token, csr) in tokens.iter().zip(&csrs) {
        let written_before = written(&service);
        assert_eq!(service.sign(token, csr).status, 200, "{}", service.log());
        each.push(written(&service) - written_before);
    }
    each.sort_unstable();
    let after = Disk::of(&service);

    let size = |disk: &Disk, name: &str| disk.files[&service.data(name)][0] as u64;
    let line = (size(&after, "ca/index.txt") - size(&before, "ca/index.txt")) / CERTIFICATES;
    let new = after.files.iter().filter(|(path, _)| !before.files.contains_key(*path));
    let sizes: Vec<u64> = new.map(|(_, seen)| seen[0] as u64).collect();
    let pem = sizes.iter().sum::<u64>() / CERTIFICATES;
    let pages = (after.written - before.written) / CERTIFICATES;
    println!("a certificate: {pem} bytes in certs/, {line} in index.txt, {pages} written in pages");
    assert_eq!(sizes.len() as u64, CERTIFICATES, "files");
    assert!((600..1500).contains(&pem) && (60..120).contains(&line), "{pem} and {line}");
    // Two pages of 4 KiB; one more when the line goes over the end of a page, and when the kernel has
    // much to write for others on the same file system.
    let common = each[each.len() / 10];
    assert!(common == 2 * 4096 || !is_counted(&service), "{each:?}");
    assert!(pages <= 4 * 4096, "{each:?}");

    assert_eq!(service.revoke("device-000").status, 200);
    let revoked = Disk::of(&service);
    let pages = revoked.written - after.written;
    let (index, list) = (size(&revoked, "ca/index.txt"), size(&revoked, "ca/crl.pem"));
    println!("a revocation: index.txt ({index} bytes) and crl.pem ({list}) anew, {pages} in pages");
}
