//! A copy of `DATA_DIR` that is taken while it serves is a backup: restored, it knows every certificate
//! that was answered before the copy began, whatever order its files were copied in.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::csr::{Csr, openssl};
use crate::support::http::Client;
use crate::support::load;
use crate::support::service::{ADMIN_KEY, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::{check_error, token, wait};

const ENV: [(&str, &str); 3] =
    [("ADMIN_API_KEY", ADMIN_KEY), ("JWT_SECRET", token::SECRET), ("REENROLL", "allow")];

/// Each onboards and signs as fast as it is answered: with the program of a release, 500 a second.
const DEVICES: [&str; 6] = ["d0", "d1", "d2", "d3", "d4", "d5"];

/// What was answered: of each certificate, by its serial, its text, its token and the request.
#[derive(Default)]
struct Answered {
    signed: Mutex<Certificates>,
    /// The devices whose revocation was answered.
    revoked: Mutex<Vec<String>>,
}

type Certificates = BTreeMap<String, (String, String, String)>;

impl Answered {
    fn count(&self) -> usize {
        self.signed.lock().unwrap().len()
    }

    /// All of it until now.
    fn now(&self) -> (Certificates, Vec<String>) {
        (self.signed.lock().unwrap().clone(), self.revoked.lock().unwrap().clone())
    }

    /// Revokes one device after the other, twenty a second, until it is told to stop.
    fn revoke(&self, service: &Service, devices: &[String], stop: &AtomicBool) {
        for device in devices {
            let next = Instant::now() + Duration::from_millis(50);
            if stop.load(Ordering::Relaxed) {
                return;
            }
            assert_eq!(service.revoke(device).status, 200);
            self.revoked.lock().unwrap().push(device.clone());
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }

    /// Onboards and signs, again and again, until it is told to stop.
    fn fill(&self, http: &Client, device: &str, stop: &AtomicBool) {
        let csr = Csr::new(device).make();
        while !stop.load(Ordering::Relaxed) {
            let answer = load::onboard(http, device).unwrap();
            assert_eq!(answer.status, 200, "{}", answer.text());
            let token = answer.field("provisioning_token");
            let answer = load::sign(http, &token, &csr).unwrap();
            assert_eq!(answer.status, 200, "{}", answer.text());
            let known = (answer.field("certificate"), token, csr.clone());
            self.signed.lock().unwrap().insert(answer.field("serial_number"), known);
        }
    }
}

/// A service on the copy knows them all, and what was revoked is revoked still.
fn check(answered: &Certificates, revoked: &[String], copy: &Path, how: &str) {
    let setup = Setup::new().envs(&ENV);
    fs::rename(copy, setup.data("")).unwrap();
    let service = setup.start();
    for (serial, (pem, token, csr)) in answered {
        let download = service.http.get(&format!("/api/v1/certificates/{serial}/download"));
        assert_eq!(download.status, 200, "{how}: {}\n{}", download.text(), service.log());
        assert_eq!(download.json()["certificate"]["content"], **pem, "{how}");
        let again = service.sign(token, csr);
        check_error(&again, 401, "TOKEN_ALREADY_USED", how);
    }
    for device in revoked {
        let status = service.http.get(&format!("/api/v1/certificates/{device}/status"));
        assert_eq!(status.field("status"), "revoked", "{how}: {device}");
    }
    let list = service.read("ca/crl.pem");
    assert_eq!(list, service.http.get("/api/v1/crl").text(), "{how}");
    let index = service.index();
    let lines = index.iter().map(|line| &line[3]);
    assert_eq!(lines.clone().collect::<std::collections::BTreeSet<_>>().len(), index.len());
    let entered = entered(&service);
    let (signed, revoked, known) = (answered.len(), revoked.len(), index.len());
    println!("{how}: {signed} signed, {revoked} revoked, {known} known; {entered}");
}

fn entered(service: &Service) -> String {
    let log = service.log();
    log.lines().find(|l| l.contains("had no line")).unwrap_or("none entered").to_owned()
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    // GNU tar ends with 1 when a file changed while it was read, which is what this is about.
    // So do the others when one has gone that was being written.
    let fits = match (program, output.status.code()) {
        ("tar" | "cp", Some(1)) | ("rsync", Some(24)) => true,
        (_, code) => code == Some(0),
    };
    assert!(fits, "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Copies `from` to `to` in one of the orders in which tools go through a folder.
fn copy(how: &str, from: &Path, to: &Path, more: &dyn Fn()) {
    let path = |path: &Path| path.display().to_string();
    let (source, target) = (path(from), path(to));
    match how {
        "tar" => {
            let archive = format!("{target}.tar");
            run("tar", &["--exclude=run", "-cf", &archive, "-C", &source, "."]);
            fs::create_dir_all(to).unwrap();
            run("tar", &["-xf", &archive, "-C", &target]);
        }
        "cp -r" => run("cp", &["-r", &source, &target]),
        "rsync" => run("rsync", &["-a", "--exclude=/run", &format!("{source}/"), &target]),
        // In other orders that a tool may have: the files of a folder before its folders, by name …
        "files, then folders" => copy_by(from, to, more, &["crl.pem", "index.txt"], true),
        // … and the other way round.
        "folders, then files" => copy_by(from, to, more, &["index.txt", "crl.pem"], false),
        _ => panic!("{how}"),
    }
}

fn copy_by(from: &Path, to: &Path, more: &dyn Fn(), files: &[&str], files_first: bool) {
    fs::create_dir_all(to.join("ca")).unwrap();
    let copy_files = || {
        for name in files.iter().chain(&["root-ca.crt", "root-ca.key", "index.txt.attr"]) {
            fs::copy(from.join("ca").join(name), to.join("ca").join(name)).unwrap();
            more();
        }
    };
    let copy_folder = || {
        let (from, to) = (from.join("ca/certs"), to.join("ca"));
        run("cp", &["-r", &from.display().to_string(), &to.display().to_string()]);
        more();
    };
    if files_first {
        copy_files();
        copy_folder();
    } else {
        copy_folder();
        copy_files();
    }
}

/// Also when the test fails.
pub struct Stops<'a>(pub &'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn copies_taken_while_signing() {
    let dir = TempDir::new();
    let service = Setup::new().envs(&ENV).start();
    let gone: Vec<String> = (0..200).map(|n| format!("gone-{n}")).collect();
    for device in &gone {
        service.enroll(device, &Csr::new(device).make());
    }
    let (answered, stop) = (Answered::default(), AtomicBool::new(false));
    let begun = Instant::now();
    let copies = thread::scope(|scope| {
        let _stops = Stops(&stop);
        for device in DEVICES {
            let (answered, stop, http) = (&answered, &stop, service.http);
            scope.spawn(move || answered.fill(&http, device, stop));
        }
        scope.spawn(|| answered.revoke(&service, &gone, &stop));
        let more = || {
            let goal = answered.count() + 3;
            wait::for_true("more is signed", || answered.count() >= goal);
        };
        let mut copies = Vec::new();
        for how in ["tar", "cp -r", "rsync", "files, then folders", "folders, then files"] {
            for round in 0..3 {
                more();
                let ((before, revoked), to) =
                    (answered.now(), dir.path().join(format!("{round} {how}")));
                copy(how, &service.data(""), &to, &more);
                // What was answered meanwhile is not lost either, if it came along.
                let (mut expected, _) = answered.now();
                let came = |serial: &str| {
                    let file = to.join(format!("ca/certs/{}.pem", serial.to_uppercase()));
                    fs::read_to_string(file).is_ok_and(|text| text.contains("-----END"))
                };
                expected.retain(|serial, _| before.contains_key(serial) || came(serial));
                copies.push((expected, revoked, to, how));
            }
        }
        copies
    });
    let (signed, revoked, took) = (answered.count(), answered.now().1.len(), begun.elapsed());
    println!("{signed} signed and {revoked} revoked in {took:.1?} while it was copied");
    for (answered, revoked, copy, how) in copies {
        check(&answered, &revoked, &copy, how);
    }
}

/// What is newer than the rest in a copy, and what is half there.
#[test]
fn a_certificate_that_is_newer_than_its_record() {
    let mut service = Setup::new().envs(&ENV).start();
    service.enroll("old", &Csr::new("old").make());
    let index = service.read("ca/index.txt");
    let token = service.token("new");
    let new = service.sign(&token, &Csr::new("new").make()).field("serial_number");
    let lost = service.enroll("lost", &Csr::new("lost").make()).field("serial_number");
    let half = service.enroll("half", &Csr::new("half").make()).field("serial_number");
    let path = |serial: &str| format!("ca/certs/{}.pem", serial.to_uppercase());
    service.kill9();
    let lines = service.read("ca/index.txt");
    let line = |serial: &str| {
        lines.lines().find(|line| line.contains(&serial.to_uppercase())).unwrap().to_owned()
    };
    // Of one the line came and the file did not; of one half the file; an editor took the last end.
    fs::write(service.data("ca/index.txt"), format!("{index}{}", line(&lost))).unwrap();
    fs::remove_file(service.data(&path(&lost))).unwrap();
    let text = service.read(&path(&half));
    fs::write(service.data(&path(&half)), &text[..text.len() / 2]).unwrap();
    service.restart();

    let status = |device: &str| service.http.get(&format!("/api/v1/certificates/{device}/status"));
    assert_eq!(status("old").field("status"), "active");
    assert_eq!(status("new").field("serial_number"), new);
    let again = service.sign(&token, &Csr::new("new").make());
    check_error(&again, 401, "TOKEN_ALREADY_USED", "whoever lost the answer fetches it");
    let download = service.http.get("/api/v1/certificates/new/download");
    assert_eq!(download.status, 200);
    let answer = status("lost");
    assert_eq!(
        (answer.field("status"), answer.field("serial_number")),
        ("active".to_owned(), lost.clone())
    );
    check_error(
        &service.http.get("/api/v1/certificates/lost/download"),
        404,
        "CERTIFICATE_NOT_FOUND",
        "no file",
    );
    assert_eq!(service.revoke("lost").status, 200);
    assert!(
        openssl(&["crl", "-noout", "-text"], &service.read("ca/crl.pem"))
            .contains(&lost.to_uppercase())
    );
    check_error(&status("half"), 404, "CERTIFICATE_NOT_FOUND", "it was not answered before");
    let aside = format!("ca/aside/{}.pem", half.to_uppercase());
    assert_eq!(service.read(&aside).len(), text.len() / 2, "and is not deleted");
    assert!(service.read("ca/index.txt").ends_with('\n'));
    let log = service.log();
    for line in [
        "the last line of ",
        "are entered, their tokens as used, 1 of them: ",
        "is no certificate of a device by this CA: moved to ",
    ] {
        assert!(log.contains(line), "{line}: {log}");
    }
    assert_eq!(log.matches("certificates that cannot be read: 1").count(), 1, "{log}");
}
