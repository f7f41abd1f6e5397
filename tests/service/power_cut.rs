//! The record through power cuts, torn files and a full disk: what was answered is there, what was
//! revoked stays so.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use mqtt_publisher_lite::ca::Ca;
use mqtt_publisher_lite::clock;
use mqtt_publisher_lite::config;

use crate::support::csr::{self, Csr};
use crate::support::service::{ADMIN_KEY, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::{check_error, token, wait};

fn settings(dir: &Path) -> config::Ca {
    config::Ca { dir: dir.to_owned(), root_validity_years: 10, device_validity_days: 90 }
}

/// What a folder of a CA says after a start: of each certificate serial and status, sorted; and the
/// list that the start publishes.
fn after_a_start(dir: &Path) -> (Vec<(String, bool)>, String) {
    let ca = Ca::open(&settings(dir), clock::now()).unwrap_or_else(|e| panic!("no start: {e}"));
    let list = ca.publish_crl(clock::now()).unwrap();
    let index = fs::read_to_string(dir.join("index.txt")).unwrap();
    assert!(index.is_empty() || index.ends_with('\n'), "{index:?}");
    let mut rows: Vec<(String, bool)> = index.lines().map(row).collect();
    rows.sort();
    let mut files: Vec<String> = fs::read_dir(dir.join("certs"))
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap().replace(".pem", ""))
        .collect();
    files.sort();
    assert!(files.iter().eq(rows.iter().map(|(serial, _)| serial)), "{files:?} {rows:?}");
    (rows, list.pem.clone())
}

/// Serial, and whether it is revoked.
fn row(line: &str) -> (String, bool) {
    let fields: Vec<&str> = line.split('\t').collect();
    (fields[3].to_owned(), fields[0] == "R")
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to.join("certs")).unwrap();
    for folder in ["", "certs"] {
        for entry in fs::read_dir(from.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, to.join(folder).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
}

/// A CA's folder with three active certificates and a revoked one, and then `last`.
fn folder_with(last: impl Fn(&Service)) -> (TempDir, PathBuf) {
    let mut service = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY).start();
    for name in ["a", "b", "c", "gone"] {
        service.enroll(name, &Csr::new(name).make());
    }
    assert_eq!(service.revoke("gone").status, 200);
    last(&service);
    service.kill9();
    let dir = TempDir::new();
    let kept = dir.path().join("kept");
    copy(&service.data("ca"), &kept);
    (dir, kept)
}

fn lists(pem: &str, serial: &str) -> bool {
    csr::openssl(&["crl", "-noout", "-text"], pem).contains(serial)
}

#[test]
fn index_torn_at_every_byte_of_a_new_line() {
    // The last line is one that was being written: its certificate is there, and is entered.
    let (dir, kept) = folder_with(|service| drop(service.enroll("new", &Csr::new("new").make())));
    let index = fs::read_to_string(kept.join("index.txt")).unwrap();
    let lines: Vec<(String, bool)> = index.lines().map(row).collect();
    let start = index.trim_end().rfind('\n').unwrap() + 1;
    let torn = dir.path().join("torn");
    for end in start..=index.len() {
        copy(&kept, &torn);
        fs::write(torn.join("index.txt"), &index[..end]).unwrap();
        let (rows, list) = after_a_start(&torn);
        let mut expected = lines.clone();
        expected.sort();
        assert_eq!(rows, expected, "cut at {end}");
        let revoked = lines.iter().filter(|(_, r)| *r);
        revoked.for_each(|(serial, _)| assert!(lists(&list, serial)));
    }
}

#[test]
fn index_torn_at_every_byte_of_a_revoked_line() {
    let (dir, kept) = folder_with(|service| {
        service.enroll("last", &Csr::new("last").make());
        assert_eq!(service.revoke("last").status, 200);
    });
    let index = fs::read_to_string(kept.join("index.txt")).unwrap();
    let mut expected: Vec<(String, bool)> = index.lines().map(row).collect();
    let (last, is_revoked) = expected.last().unwrap().clone();
    assert!(is_revoked);
    expected.sort();
    let start = index.trim_end().rfind('\n').unwrap() + 1;
    let torn = dir.path().join("torn");
    for end in start..=index.len() {
        copy(&kept, &torn);
        fs::write(torn.join("index.txt"), &index[..end]).unwrap();
        let (rows, list) = after_a_start(&torn);
        assert_eq!(rows, expected, "cut at {end}");
        assert!(lists(&list, &last), "cut at {end}: {last} is revoked still");
    }
    // With the list lost as well, what is left of the line says it.
    for end in [start + 1, start + 10, start + 40, index.len() - 1] {
        copy(&kept, &torn);
        fs::write(torn.join("index.txt"), &index[..end]).unwrap();
        fs::write(torn.join("crl.pem"), "-----BEGIN X509 CRL-----\nMII").unwrap();
        let (rows, list) = after_a_start(&torn);
        assert_eq!(rows, expected, "cut at {end} without a list");
        assert!(lists(&list, &last));
    }
}

#[test]
fn list_torn_at_every_byte() {
    let (dir, kept) = folder_with(|_| ());
    let list = fs::read(kept.join("crl.pem")).unwrap();
    let (rows, _) = after_a_start(&kept);
    let revoked: Vec<&String> = rows.iter().filter(|(_, r)| *r).map(|(s, _)| s).collect();
    assert_eq!(revoked.len(), 1);
    let torn = dir.path().join("torn");
    copy(&kept, &torn);
    for end in 0..=list.len() {
        fs::write(torn.join("crl.pem"), &list[..end]).unwrap();
        let (again, published) = after_a_start(&torn);
        assert_eq!(again, rows, "cut at {end}");
        assert_eq!(fs::read_to_string(torn.join("crl.pem")).unwrap(), published);
        if end % 50 == 0 {
            assert!(lists(&published, revoked[0]), "cut at {end}");
        }
    }
}

/// What clients were told.
#[derive(Default)]
struct Told {
    signed: Mutex<BTreeSet<String>>,
    revoked: Mutex<BTreeSet<String>>,
}

impl Told {
    /// Waits until so many more certificates were answered.
    fn wait_for(&self, more: usize) {
        let signed = || self.signed.lock().unwrap().len();
        let goal = signed() + more;
        wait::for_true("clients get certificates", || signed() >= goal);
    }
}

#[test]
fn killed_at_random_while_issuing_and_revoking() {
    const KILLS: usize = 12;
    let env = [("ADMIN_API_KEY", ADMIN_KEY), ("JWT_SECRET", token::SECRET), ("REENROLL", "allow")];
    let mut service = Setup::new().envs(&env).start();
    let (told, done) = (Told::default(), AtomicBool::new(false));
    let http = service.http;
    let requests: Vec<String> = (0..4).map(|n| Csr::new(&format!("d{n}")).make()).collect();
    thread::scope(|scope| {
        for (n, request) in requests.iter().enumerate() {
            let (told, done) = (&told, &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    live_and_die(&http, &format!("d{n}"), request, told);
                }
            });
        }
        for kill in 0..KILLS {
            told.wait_for(1 + kill * 7919 % 20);
            service.kill9();
            service.restart();
            check_told(&service, &told);
        }
        done.store(true, Ordering::Relaxed);
    });
    check_told(&service, &told);
    let counts = (told.signed.lock().unwrap().len(), told.revoked.lock().unwrap().len());
    println!("{counts:?} signed and revoked, {KILLS} kills");
    assert!(counts.0 > 20 && counts.1 > 10, "{counts:?}");
}

/// One certificate is got and revoked; whatever is answered is noted.
fn live_and_die(http: &crate::support::http::Client, device: &str, request: &str, told: &Told) {
    let body = serde_json::json!({"device_id": device}).to_string();
    let json = ("Content-Type", "application/json");
    let Ok(token) = http.try_request("POST", "/api/v1/onboarding", &[json], body.as_bytes()) else {
        return thread::sleep(Duration::from_millis(5));
    };
    let compact = match token.status {
        200 => token.field("provisioning_token"),
        _ => String::new(),
    };
    let mut got = None;
    if !compact.is_empty()
        && let Ok(answer) = crate::support::load::sign(http, &compact, request)
        && answer.status == 200
    {
        let serial = answer.field("serial_number").to_uppercase();
        told.signed.lock().unwrap().insert(serial.clone());
        got = Some(serial);
    }
    let bearer = format!("Bearer {ADMIN_KEY}");
    let path = format!("/api/v1/certificates/{device}");
    let answer = http.try_request("DELETE", &path, &[("Authorization", &bearer)], b"");
    if let (Ok(answer), Some(serial)) = (answer, got)
        && answer.status == 200
    {
        told.revoked.lock().unwrap().insert(serial);
    }
}

/// All that was told before is so: in the record, in the list.
fn check_told(service: &Service, told: &Told) {
    let (signed, revoked) =
        (told.signed.lock().unwrap().clone(), told.revoked.lock().unwrap().clone());
    let rows: Vec<(String, bool)> = service.read("ca/index.txt").lines().map(row).collect();
    let known: BTreeSet<String> = rows.iter().map(|(serial, _)| serial.clone()).collect();
    let dead: BTreeSet<String> = rows.into_iter().filter(|(_, r)| *r).map(|(s, _)| s).collect();
    assert!(signed.is_subset(&known), "missing: {:?}", signed.difference(&known));
    assert!(revoked.is_subset(&dead), "active again: {:?}", revoked.difference(&dead));
    let list = csr::openssl(&["crl", "-noout", "-text"], &service.read("ca/crl.pem"));
    revoked.iter().for_each(|serial| assert!(list.contains(serial), "{serial} is not listed"));
}

/// A disk that can be filled and emptied.
enum Disk {
    /// A tmpfs of 256 KiB.
    Mounted(PathBuf),
    /// Where nothing may be mounted: the limit on the size of files of one process, which makes its
    /// writes fail as a full disk does (EFBIG in the place of ENOSPC).
    Limited,
}

impl Disk {
    fn new(dir: &TempDir) -> Self {
        let path = dir.path().join("disk");
        fs::create_dir(&path).unwrap();
        let mount = ["-t", "tmpfs", "-o", "size=256k", "none"];
        let mounted = Command::new("mount").args(mount).arg(&path).output();
        match mounted.is_ok_and(|output| output.status.success()) {
            true => Disk::Mounted(path),
            false => Disk::Limited,
        }
    }

    fn setup(&self) -> Setup {
        let setup = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY);
        match self {
            Disk::Mounted(path) => setup.env("CA_STORAGE_PATH", path.to_str().unwrap()),
            // The signal that comes with the error would end the process.
            Disk::Limited => setup.wrapper(&["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]),
        }
    }

    fn fill(&self, service: &Service) {
        match self {
            Disk::Mounted(path) => {
                let mut file = fs::File::create(path.join("filler")).unwrap();
                while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
            }
            Disk::Limited => limit(service, "0:unlimited"),
        }
    }

    fn empty(&self, service: &Service) {
        match self {
            Disk::Mounted(path) => fs::remove_file(path.join("filler")).unwrap(),
            Disk::Limited => limit(service, "unlimited:unlimited"),
        }
    }

    fn folder(&self, service: &Service) -> PathBuf {
        match self {
            Disk::Mounted(path) => path.clone(),
            Disk::Limited => service.data("ca"),
        }
    }
}

fn limit(service: &Service, size: &str) {
    let args = ["--pid", &service.pid().to_string(), &format!("--fsize={size}")];
    assert!(Command::new("prlimit").args(args).status().unwrap().success());
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Disk::Mounted(path) = self {
            let _ = Command::new("umount").arg("-l").arg(path).status();
        }
    }
}

#[test]
fn a_full_disk() {
    let dir = TempDir::new();
    check_full_disk(&Disk::new(&dir));
}

/// The fallback is as good a test, so it is run here too, wherever mounting works.
#[test]
fn a_full_disk_by_a_limit() {
    check_full_disk(&Disk::Limited);
}

fn check_full_disk(disk: &Disk) {
    let service = disk.setup().start();
    let folder = disk.folder(&service);
    let listing = || {
        // Beside the certificates there may be a file by which the service tries the disk.
        let names = fs::read_dir(folder.join("certs")).unwrap().map(|f| f.unwrap().file_name());
        let files = names.filter(|name| !name.to_string_lossy().starts_with('.')).count();
        (files, fs::read_to_string(folder.join("index.txt")).unwrap())
    };
    service.enroll("there", &Csr::new("there").make());
    let (compact, request) = (service.token("d"), Csr::new("d").make());
    let before = listing();

    disk.fill(&service);
    for _ in 0..3 {
        let answer = service.sign(&compact, &request);
        check_error(&answer, 503, "SERVICE_UNAVAILABLE", "the disk is full");
        assert_eq!(listing(), before, "nothing half written");
        let ready = service.http.get("/ready");
        check_error(&ready, 503, "SERVICE_UNAVAILABLE", "as long as nothing can be recorded");
        assert!(ready.text().contains("the record cannot be written"), "{}", ready.text());
    }
    check_error(&service.revoke("there"), 503, "SERVICE_UNAVAILABLE", "the disk is full");
    let status = service.http.get("/api/v1/certificates/there/status");
    assert_eq!(status.field("status"), "active", "not revoked in memory only");
    assert_eq!(listing(), before);
    let crl = fs::read_to_string(folder.join("crl.pem")).unwrap();
    csr::openssl(&["crl", "-noout"], &crl);

    disk.empty(&service);
    wait::for_true("ready", || service.http.get("/ready").status == 200);
    let answer = service.sign(&compact, &request);
    assert_eq!(answer.status, 200, "the token was kept: {}\n{}", answer.text(), service.log());
    assert_eq!(service.revoke("there").status, 200, "{}", service.log());
    assert_eq!(service.http.get("/ready").status, 200);
    assert_eq!(listing().0, 2);
}
