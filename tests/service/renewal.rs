//! `POST /api/v1/renew` over real TLS, `GET /api/v1/crl`, and what revocation does to both.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::support::clock::{FakeClock, now_s, parse_utc};
use crate::support::csr::{self, Csr, P256, key_file, openssl};
use crate::support::http::Response;
use crate::support::https::{self, Identity};
use crate::support::service::{ADMIN_KEY, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::{CERTIFICATE_FIELDS, check_error, fields, token, wait};

/// An HTTPS server, and folders for certificates.
pub struct Stage {
    pub service: Service,
    pub dir: TempDir,
}

impl Stage {
    pub fn set(env: &[(&str, &str)]) -> Self {
        let setup = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY).envs(env);
        Stage { service: https::start(setup), dir: TempDir::new() }
    }

    /// A certificate for `device`, by a token.
    #[track_caller]
    pub fn enroll(&self, device: &str) -> Identity {
        let body = json!({"device_id": device});
        let answer = https::post(&self.service, "/api/v1/onboarding", None, &body, &[]);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let token = answer.field("provisioning_token");
        let body = json!({"csr": Csr::new(device).make(), "provisioning_token": token});
        let answer = https::post(&self.service, "/api/v1/sign-csr", None, &body, &[]);
        self.keep(&answer)
    }

    /// The certificate of a good answer as a file.
    #[track_caller]
    pub fn keep(&self, answer: &Response) -> Identity {
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), self.service.log());
        let name = format!("{}.crt", answer.field("serial_number"));
        let certificate = self.dir.file(&name, &answer.field("certificate"));
        Identity { certificate, key: key_file(P256) }
    }

    pub fn renew(&self, who: Option<&Identity>, csr: &str) -> Response {
        https::post(&self.service, "/api/v1/renew", who, &json!({"csr": csr}), &[])
    }

    pub fn revoke(&self, device: &str) -> Response {
        let bearer = format!("Authorization: Bearer {ADMIN_KEY}");
        let path = format!("/api/v1/certificates/{device}");
        https::ask(&self.service, &path, None, &["-X", "DELETE", "-H", &bearer])
    }

    pub fn serial(&self, who: &Identity) -> String {
        let pem = std::fs::read_to_string(&who.certificate).unwrap();
        csr::x509_field(&pem, &["-serial"])
    }

    /// The lines of the record, as status and serial.
    pub fn record(&self) -> Vec<(String, String)> {
        self.service.index().iter().map(|l| (l[0].clone(), l[3].clone())).collect()
    }

    /// The serials that `crl.pem` names.
    fn listed(&self) -> String {
        openssl(&["crl", "-noout", "-text"], &self.service.read("ca/crl.pem"))
    }
}

#[test]
fn a_renewal_is_answered_like_a_redemption() {
    let stage = Stage::set(&[]);
    let old = stage.enroll("d");
    for key in [P256, "ed25519"] {
        let digest = if key == P256 { "sha256" } else { "-" };
        let answer = stage.renew(Some(&old), &Csr::new("d").key(key).digest(digest).make());
        let new = stage.keep(&answer);
        assert_eq!(fields(&answer.text()), CERTIFICATE_FIELDS);
        csr::verify_with_openssl(&answer.field("ca_certificate"), &answer.field("certificate"))
            .unwrap();
        let status = https::ask(&stage.service, "/api/v1/certificates/d/status", None, &[]);
        assert_eq!(status.field("serial_number"), answer.field("serial_number"), "the newest");
        assert_ne!(stage.serial(&new), stage.serial(&old));
    }
    assert!(stage.record().iter().all(|(status, _)| status == "V"), "the old one stays valid");
    let log = stage.service.log();
    assert!(log.contains("in renewal of") && log.contains(&stage.serial(&old).to_lowercase()));
    assert_eq!(
        stage.service.read(&format!("ca/certs/{}.pem", stage.record()[1].1)).find("Prov"),
        None
    );
}

#[test]
fn who_is_refused_and_why() {
    let stage = Stage::set(&[("DEVICE_CERT_VALIDITY_DAYS", "30")]);
    let own = Csr::new("d").make();
    let refused = |who: Option<&Identity>, code: &str, what: &str| {
        check_error(&stage.renew(who, &own), 401, code, what);
    };
    refused(None, "CLIENT_CERTIFICATE_REQUIRED", "no certificate");

    let foreign_ca = openssl_ca(&stage.dir, "Foreign CA");
    let foreign = sign_by(&foreign_ca, &stage.dir, "foreign.crt", "/CN=d");
    refused(Some(&foreign), "CLIENT_CERTIFICATE_INVALID", "a foreign CA");
    let name = csr::x509_field(
        &stage.service.read("ca/root-ca.crt"),
        &["-subject", "-nameopt", "RFC2253"],
    );
    let namesake_ca = openssl_ca(&stage.dir, name.trim_start_matches("CN="));
    let namesake = sign_by(&namesake_ca, &stage.dir, "namesake.crt", "/CN=d");
    refused(Some(&namesake), "CLIENT_CERTIFICATE_INVALID", "a CA of the same name");
    let selfmade = sign_by(&stage.identity_of_nobody(), &stage.dir, "selfmade.crt", "/CN=d");
    refused(Some(&selfmade), "CLIENT_CERTIFICATE_INVALID", "self-made");
    let server = Identity {
        certificate: stage.service.data("tls/server.crt"),
        key: stage.service.data("tls/server.key"),
    };
    refused(Some(&server), "CLIENT_CERTIFICATE_INVALID", "ours, but of a server");
    let serial = stage.serial(&server).trim().to_lowercase();
    stage.service.wait_for_log(&format!("{serial} is not in the record of devices"));

    let other = stage.enroll("other");
    check_error(&stage.renew(Some(&other), &own), 400, "CSR_DEVICE_MISMATCH", "another device's");
    let good = stage.enroll("d");
    check_error(&stage.renew(Some(&good), ""), 400, "CSR_REQUIRED", "no CSR");
    check_error(&stage.renew(Some(&good), "x"), 400, "INVALID_CSR", "garbage");
    assert_eq!(stage.renew(Some(&good), &own).status, 200);
    assert_eq!(stage.revoke("d").status, 200);
    refused(Some(&good), "CLIENT_CERTIFICATE_REVOKED", "revoked");
    stage.service.wait_for_log("refused: CLIENT_CERTIFICATE_REVOKED: device d: client certificate");
    assert_eq!(stage.record().len(), 3, "nothing else was signed");
}

impl Stage {
    /// A key and a certificate of somebody who is no CA.
    fn identity_of_nobody(&self) -> Identity {
        openssl_ca(&self.dir, "d")
    }
}

#[test]
fn late_renewals_are_bounded() {
    let clock = FakeClock::at(now_s());
    let env = clock.env();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    for (late, code) in [("0", Some("CLIENT_CERTIFICATE_EXPIRED")), ("3", None)] {
        clock.set_right();
        let more = [("DEVICE_CERT_VALIDITY_DAYS", "10"), ("RENEW_AFTER_EXPIRY_DAYS", late)];
        let stage = Stage::set(&[&env[..], &more].concat());
        let old = stage.enroll("d");
        clock.set(now_s() + 12 * 86_400);
        let answer = stage.renew(Some(&old), &Csr::new("d").make());
        match code {
            Some(code) => assert_eq!((answer.status, &*answer.code()), (401, code)),
            None => drop(stage.keep(&answer)),
        }
        clock.set(now_s() + 14 * 86_400);
        let answer = stage.renew(Some(&old), &Csr::new("d").make());
        assert_eq!(answer.code(), "CLIENT_CERTIFICATE_EXPIRED", "{late}");
        stage.service.wait_for_log("refused: CLIENT_CERTIFICATE_EXPIRED: device d: client");
    }
}

/// The old certificate counts until the device has shown the new one: its answer may have been lost.
#[test]
fn renewal_may_revoke_what_it_replaces() {
    let stage = Stage::set(&[("RENEW_REVOKES", "true")]);
    let old = stage.enroll("d");
    let lost = stage.renew(Some(&old), &Csr::new("d").make());
    assert_eq!(lost.status, 200, "{}", lost.text());
    let new = stage.keep(&stage.renew(Some(&old), &Csr::new("d").make()));
    let (old_serial, new_serial) = (stage.serial(&old), stage.serial(&new));
    assert_eq!(lost.field("serial_number").to_uppercase(), new_serial, "asked again, the same");
    let states = |a: &str, b: &str| {
        [(a, &old_serial), (b, &new_serial)].map(|(s, n)| (s.to_owned(), n.clone()))
    };
    assert_eq!(stage.record(), states("V", "V"));

    // Whoever shows it, and whatever it is shown for.
    check_error(&stage.renew(Some(&new), ""), 400, "CSR_REQUIRED", "shown");
    wait::for_true("the old one is revoked", || stage.record() == states("R", "V"));
    wait::for_true("and listed", || stage.listed().contains(&old_serial));
    assert!(!stage.listed().contains(&new_serial));
    let again = stage.renew(Some(&old), &Csr::new("d").make());
    check_error(&again, 401, "CLIENT_CERTIFICATE_REVOKED", "the old one");
    assert_eq!(stage.renew(Some(&new), &Csr::new("d").make()).status, 200);
    let metrics = https::ask(&stage.service, "/metrics", None, &[]).text();
    for counted in ["issued\"} 1", "renewed\"} 2", "revoked\"} 1"] {
        let line = format!("mqtt_lite_certificates_total{{event=\"{counted}\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
}

/// A device that never shows the new one: after an hour, also if the service was not there by then.
#[test]
fn what_was_renewed_is_revoked_after_an_hour() {
    let clock = FakeClock::at(now_s());
    let env = clock.env();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    let mut stage = Stage::set(&[&env[..], &[("RENEW_REVOKES", "true")]].concat());
    let old = stage.enroll("d");
    let new = stage.keep(&stage.renew(Some(&old), &Csr::new("d").make()));
    for (passed_s, state) in [(3000, "V"), (3700, "R")] {
        stage.service.kill9();
        clock.set(now_s() + passed_s);
        stage.service.restart();
        if state == "V" {
            let again = stage.renew(Some(&old), &Csr::new("d").make());
            let serial = again.field("serial_number").to_uppercase();
            assert_eq!(serial, stage.serial(&new), "the same also after a restart");
        }
        let expected = [state, "V"].map(str::to_owned);
        let states = || -> Vec<String> { stage.record().into_iter().map(|(s, _)| s).collect() };
        wait::for_true(&format!("{passed_s} s later"), || states() == expected);
    }
    wait::for_true("it is listed", || stage.listed().contains(&stage.serial(&old)));
    assert_eq!(stage.renew(Some(&new), &Csr::new("d").make()).status, 200);
}

#[test]
fn targets_that_pretend_to_be_the_edges_are_no_more_than_targets() {
    let stage = Stage::set(&[]);
    let good = stage.enroll("d");
    let pem = std::fs::read_to_string(&good.certificate).unwrap();
    let der = token::base64_of(&token::pem_to_der(&pem));
    let body = json!({"csr": Csr::new("d").make()});
    for (target, status, code) in [
        (format!("/1,127.0.0.1,{der},/api/v1/renew"), 404, "NOT_FOUND"),
        (format!("/api/v1/renew?1,127.0.0.1,{der},"), 401, "CLIENT_CERTIFICATE_REQUIRED"),
    ] {
        let answer = https::post(&stage.service, &target, None, &body, &[]);
        check_error(&answer, status, code, &target);
    }
    let bare = format!("1,127.0.0.1,{der},/api/v1/renew");
    let answer = https::post(&stage.service, "/", None, &body, &["--request-target", &bare]);
    check_error(&answer, 400, "BAD_REQUEST", "it does not begin with a slash");
    // One who has a certificate cannot pass for another either.
    let other = stage.enroll("other");
    let target = format!("/api/v1/renew?1,127.0.0.1,{der},");
    let answer = https::post(&stage.service, &target, Some(&other), &body, &[]);
    check_error(
        &answer,
        400,
        "CSR_DEVICE_MISMATCH",
        "the certificate shown is the one that counts",
    );

    let plain = Setup::new().start();
    let answer = plain.http.post(&target, &body);
    check_error(&answer, 401, "CLIENT_CERTIFICATE_REQUIRED", "over plain HTTP");
}

#[test]
fn a_resumed_session_still_knows_the_client() {
    let stage = Stage::set(&[]);
    let who = stage.enroll("d");
    for version in ["-tls1_2", "-tls1_3"] {
        let session = stage.dir.path().join(format!("session{version}"));
        let session = session.to_str().unwrap();
        let cert = [who.certificate.to_str().unwrap(), who.key.to_str().unwrap()];
        let with = [version, "-sess_out", session, "-cert", cert[0], "-key", cert[1]];
        let (first, _) = s_client(&stage, &with);
        assert_eq!(first.status, 200, "{}", first.text());
        let (second, said) = s_client(&stage, &[version, "-sess_in", session]);
        assert!(said.contains("Reused, TLS"), "{said}");
        assert_eq!(second.status, 200, "resumed, {version}: {}", second.text());
        let (third, said) = s_client(&stage, &[version]);
        assert!(said.contains("New, TLS"), "{said}");
        check_error(&third, 401, "CLIENT_CERTIFICATE_REQUIRED", "a new session without one");
    }
}

/// A renewal by `openssl s_client`: the answer, and what it said of the connection.
fn s_client(stage: &Stage, more: &[&str]) -> (Response, String) {
    let body = json!({"csr": Csr::new("d").make()}).to_string();
    let request = format!(
        "POST /api/v1/renew HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let request = std::fs::File::open(stage.dir.file("request", &request)).unwrap();
    let output = Command::new("openssl")
        .args(["s_client", "-ign_eof", "-connect", &format!("localhost:{}", stage.service.port())])
        .args(more)
        .stdin(request)
        .stderr(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    // What it says of itself stands before and in between; the answer begins where HTTP does.
    let start = said.find("HTTP/1.1 ").unwrap_or_else(|| panic!("no answer: {said}"));
    let mut answer = https::parse(&said.as_bytes()[start..]);
    let length = answer.header("Content-Length").unwrap().parse().unwrap();
    answer.body.truncate(length);
    (answer, said)
}

#[test]
fn certificates_that_are_too_large_are_not_kept() {
    let stage = Stage::set(&[]);
    let large = openssl_ca(&stage.dir, "large");
    let chain = std::fs::read_to_string(&large.certificate).unwrap().repeat(40);
    let chain = Identity { certificate: stage.dir.file("chain.crt", &chain), key: large.key };
    let url = format!("https://localhost:{}/health", stage.service.port());
    let output = Command::new("curl")
        .args(["-qsSk", "--max-time", "5", &url, "--cert"])
        .arg(&chain.certificate)
        .arg("--key")
        .arg(&chain.key)
        .output()
        .unwrap();
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(https::ask(&stage.service, "/health", None, &[]).status, 200);
}

/// Kinds of which the tests have a key each.
const KEYS: [&str; 6] =
    ["ec:prime256v1", "ed25519", "ec:secp384r1", "rsa:2048", "rsa:3072", "rsa:4096"];

fn request(key: &str) -> String {
    Csr::new("d").key(key).digest(if key == "ed25519" { "-" } else { "sha256" }).make()
}

/// Whether or not what is renewed is revoked.
#[test]
fn renewing_in_a_loop_ends() {
    for revokes in ["true", "false"] {
        let stage = Stage::set(&[("RENEW_REVOKES", revokes)]);
        let who = stage.enroll("d");
        let renew = |key: &str| stage.renew(Some(&who), &request(key));
        let serials: Vec<String> = KEYS[..4]
            .iter()
            .map(|key| {
                let answer = renew(key);
                assert_eq!(answer.status, 200, "{key}: {}", answer.text());
                answer.field("serial_number")
            })
            .collect();
        for key in &KEYS[4..] {
            let answer = renew(key);
            check_error(&answer, 429, "RATE_LIMITED", "four an hour");
            let wait_s: u64 = answer.header("Retry-After").unwrap().parse().unwrap();
            assert!((3500..=3600).contains(&wait_s), "{wait_s}");
        }
        // What is there costs nothing.
        for (key, serial) in KEYS.iter().zip(&serials) {
            assert_eq!(renew(key).field("serial_number"), *serial, "{key}");
        }
        // Nor does it help to go on with the newest.
        let newest = stage.keep(&renew(P256));
        let answer = stage.renew(Some(&newest), &request(P256));
        check_error(&answer, 429, "RATE_LIMITED", "each device, whatever it shows");
        assert_eq!(stage.record().len(), 5);
        // Another device is not concerned.
        let other = stage.enroll("other");
        assert_eq!(stage.renew(Some(&other), &Csr::new("other").make()).status, 200);
    }
}

#[test]
fn renewals_at_once_are_bounded_too() {
    let stage = Stage::set(&[("WORKERS", "4")]);
    let who = stage.enroll("d");
    let at_once = |keys: &[&str]| -> Vec<Response> {
        let requests: Vec<String> = keys.iter().map(|key| request(key)).collect();
        let barrier = Barrier::new(requests.len());
        thread::scope(|scope| {
            let mut all = Vec::new();
            for csr in &requests {
                let (stage, who, barrier) = (&stage, &who, &barrier);
                all.push(scope.spawn(move || {
                    barrier.wait();
                    stage.renew(Some(who), csr)
                }));
            }
            all.into_iter().map(|answer| answer.join().unwrap()).collect()
        })
    };
    let answers = at_once(&[P256; 12]);
    let given: Vec<String> =
        answers.iter().filter(|a| a.status == 200).map(|a| a.field("serial_number")).collect();
    assert!(!given.is_empty() && given.iter().all(|serial| *serial == given[0]), "{given:?}");
    for refused in answers.iter().filter(|a| a.status != 200) {
        check_error(refused, 503, "SERVICE_UNAVAILABLE", "it is being recorded");
    }
    assert_eq!(stage.record().len(), 2);
    for _ in 0..3 {
        at_once(&KEYS);
    }
    assert_eq!(stage.record().len(), 5, "the one enrolled, and four an hour");
}

#[test]
fn the_list_is_there_from_the_start_and_after_each_revocation() {
    let service = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY).start();
    let list = || service.http.get("/api/v1/crl");
    let serials =
        |pem: &str| openssl(&["crl", "-noout", "-text"], pem).matches("Serial Number").count();
    let first = list();
    assert_eq!((first.status, first.header("Content-Type")), (200, Some("application/x-pem-file")));
    assert_eq!(first.text(), service.read("ca/crl.pem"));
    assert_eq!(serials(&first.text()), 0);
    let next = openssl(&["crl", "-noout", "-nextupdate", "-dateopt", "iso_8601"], &first.text());
    let next = parse_utc(next.trim().trim_start_matches("nextUpdate="));
    assert!(next.abs_diff(now_s() + 7 * 86_400) < 60, "{next}");

    let mut revoked = 0;
    for name in ["a", "b"] {
        service.enroll(name, &Csr::new(name).make());
        service.enroll(&format!("{name}-other"), &Csr::new(&format!("{name}-other")).make());
        assert_eq!(service.revoke(name).status, 200);
        revoked += 1;
        let now = list();
        assert_eq!(serials(&now.text()), revoked, "published before the answer");
        assert_eq!(now.text(), service.read("ca/crl.pem"));
        let der = service.http.get("/api/v1/crl?format=der");
        assert_eq!(der.header("Content-Type"), Some("application/pkix-crl"));
        assert_eq!(der.body, token::pem_to_der(&now.text()));
    }
    assert_eq!(service.http.request("HEAD", "/api/v1/crl", &[], b"").status, 200);
    let mode = std::os::unix::fs::MetadataExt::mode(
        &std::fs::metadata(service.data("ca/crl.pem")).unwrap(),
    );
    assert_eq!(mode & 0o777, 0o644, "the broker reads it");
}

#[test]
fn no_list_before_the_clock_is_right_and_one_at_once_after() {
    let clock = FakeClock::at(10);
    let env = clock.env();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    let service = Setup::new().envs(&env).start();
    let answer = service.http.get("/api/v1/crl");
    assert_eq!((answer.status, &*answer.code()), (503, "CLOCK_NOT_SET"));
    assert!(!service.data("ca/crl.pem").exists());
    clock.set_right();
    let listed = wait::until(Duration::from_secs(5), || {
        (service.http.get("/api/v1/crl").status == 200).then_some(())
    });
    assert!(listed.is_some(), "{}", service.log());
    assert!(service.data("ca/crl.pem").exists());
}

#[test]
fn a_list_that_cannot_be_written_shows_and_is_retried() {
    let service = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY).start();
    service.enroll("d", &Csr::new("d").make());
    // A folder of that name with something in it cannot be replaced by a file.
    let path = service.data("ca/crl.pem");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir_all(path.join("in the way")).unwrap();
    let answer = service.revoke("d");
    check_error(&answer, 503, "SERVICE_UNAVAILABLE", "the broker cannot learn of it");
    let ready = service.http.get("/ready");
    assert_eq!(ready.status, 503);
    assert!(ready.json()["reasons"].to_string().contains("crl.pem"), "{}", ready.text());
    assert_eq!(service.http.get("/api/v1/certificates/d/status").field("status"), "revoked");
    check_error(&service.revoke("d"), 503, "SERVICE_UNAVAILABLE", "not a 404: it is still owed");
    std::fs::remove_dir_all(&path).unwrap();
    wait::for_true("it is written by itself", || path.is_file());
    wait::for_true("ready again", || service.http.get("/ready").status == 200);
    assert!(service.log().contains("the CRL could not be published"), "{}", service.log());
}

#[test]
fn the_hook_runs_beside_and_never_twice_at_once() {
    let dir = TempDir::new();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (out, gate) = (path("out"), path("gate"));
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    // Each run ends when the test lets it.
    let text = format!(
        "#!/bin/sh\necho begin >>{out}\nenv >>{out}\nread -r _ <{gate}\necho end >>{out}\nexit 3\n"
    );
    let hook = dir.file("hook", &text);
    assert!(Command::new("chmod").arg("755").arg(&hook).status().unwrap().success());
    let setup = Setup::new().env("CRL_HOOK", hook.to_str().unwrap());
    let setup = setup.env("ADMIN_API_KEY", ADMIN_KEY).env("JWT_SECRET", token::SECRET);
    let service = setup.start();
    let names: Vec<String> = (0..6).map(|n| format!("d{n}")).collect();
    names.iter().for_each(|name| drop(service.enroll(name, &Csr::new(name).make())));
    let read = || std::fs::read_to_string(&out).unwrap_or_default();
    let lines = |line: &str| read().lines().filter(|l| *l == line).count();
    let let_it_end = |run: usize| {
        wait::for_true("it runs", || lines("begin") == run);
        std::fs::write(&gate, "go\n").unwrap();
        wait::for_true("it is over", || lines("end") == run);
    };
    let_it_end(1);
    assert_eq!(service.revoke(&names[0]).status, 200);
    wait::for_true("the second run is under way", || lines("begin") == 2);
    let others = &names[1..5];
    others.iter().for_each(|name| assert_eq!(service.revoke(name).status, 200, "nobody waits"));
    assert_eq!((lines("begin"), lines("end")), (2, 1));
    let_it_end(2);
    let_it_end(3); // one for four lists
    assert_eq!(service.revoke(&names[5]).status, 200);
    let_it_end(4); // and no other came between
    let said = read();
    let order: Vec<&str> = said.lines().filter(|l| ["begin", "end"].contains(l)).collect();
    assert_eq!(order, ["begin", "end"].repeat(4));
    assert!(
        !said.contains(ADMIN_KEY) && !said.contains(token::SECRET) && !said.contains("DATA_DIR")
    );
    let log = service.wait_for_log("exit status: 3");
    assert!(log.lines().any(|l| l.contains("WARN") && l.contains("CRL_HOOK")), "{log}");
}

#[test]
fn the_end_of_the_ca_is_announced() {
    let setup = Setup::new();
    let key = key_file(P256).display().to_string();
    std::fs::create_dir_all(setup.data("ca")).unwrap();
    let config = TempDir::new().keep_file(
        "c.cnf",
        "[req]\ndistinguished_name=dn\n[dn]\n[ca]\nbasicConstraints=critical,CA:TRUE\n\
         keyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n",
    );
    let config = config.path().display().to_string();
    let args = ["req", "-x509", "-new", "-key", &key, "-subj", "/CN=CA", "-days", "20"];
    let more = ["-extensions", "ca", "-config", &config];
    let certificate = openssl(&[&args[..], &more].concat(), "");
    std::fs::write(setup.data("ca/root-ca.crt"), certificate).unwrap();
    std::fs::copy(key_file(P256), setup.data("ca/root-ca.key")).unwrap();
    let mut service = setup.start();
    let ready = service.http.get("/ready");
    assert_eq!(ready.status, 200);
    assert!(ready.json()["warnings"].to_string().contains("the CA ends in"), "{}", ready.text());
    assert!(service.log().contains("the CA ends in "), "{}", service.log());
    // Again at each start, though the list of the first is still right.
    let mark = service.log().len();
    service.terminate();
    service.restart();
    service.wait_for_log_after(mark, "the CA ends in ");
    let young = Setup::new().start().http.get("/ready");
    assert_eq!(fields(&young.text()), ["status", "timestamp"]);
}

/// A CA of our own by openssl, as files.
fn openssl_ca(dir: &TempDir, name: &str) -> Identity {
    let key = dir.file(&format!("{name}.key"), &csr::new_key(P256));
    let args = ["req", "-x509", "-new", "-subj", &format!("/CN={name}"), "-days", "9", "-key"];
    let pem = openssl(&[&args[..], &[key.to_str().unwrap()]].concat(), "");
    Identity { certificate: dir.file(&format!("{name}.crt"), &pem), key }
}

/// A client certificate by another CA, for the tests' own key.
fn sign_by(ca: &Identity, dir: &TempDir, name: &str, subject: &str) -> Identity {
    let request = Csr::new(subject.trim_start_matches("/CN=")).make();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let extensions = dir.file("client.ext", "extendedKeyUsage=clientAuth\n");
    let (ca_crt, ca_key, ext) = (path(&ca.certificate), path(&ca.key), path(&extensions));
    let args = ["x509", "-req", "-CA", &ca_crt, "-CAkey", &ca_key, "-extfile", &ext, "-days", "9"];
    let pem = openssl(&[&args[..], &["-set_serial", "0x4a"]].concat(), &request);
    Identity { certificate: dir.file(name, &pem), key: key_file(P256) }
}
