//! The CA: made once and right, loaded in every form that is allowed, refused in every other.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use crate::support::clock::{now_s, parse_utc};
use crate::support::csr::{self, Csr, openssl, try_openssl};
use crate::support::instance::{self, Device, certificate, token};
use crate::support::redis::Redis;
use crate::support::service::{ADMIN_KEY, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::{check_error, wait};

const CA_EXTENSIONS: &str = "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n\
     subjectKeyIdentifier=hash\n";

#[test]
fn the_one_that_is_made() {
    let mut service = Setup::new().start();
    let ca = service.read("ca/root-ca.crt");
    let text = csr::x509_text(&ca);
    for part in
        ["CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign", "prime256v1", "ecdsa-with-SHA256"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    let date = |which: &str| parse_utc(&csr::x509_field(&ca, &[which, "-dateopt", "iso_8601"]));
    assert!((now_s() - 86_400).abs_diff(date("-startdate")) <= 30, "24 hours back");
    let years = (date("-enddate") - now_s()) as f64 / (365.25 * 86_400.0);
    assert!((years - 10.0).abs() < 0.02, "{years} years");
    let mode = |name: &str| fs::metadata(service.data(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("ca/root-ca.key"), 0o600);
    let key = service.read("ca/root-ca.key");
    service.kill9();
    service.restart();
    assert_eq!(
        (service.read("ca/root-ca.crt"), service.read("ca/root-ca.key")),
        (ca, key),
        "made once"
    );
}

/// Whatever the umask is: our own unit has 0077.
#[test]
fn files_are_as_open_as_the_page_says() {
    let redis = Redis::start(&[]);
    let first = instance::first(&redis.url(), &[]);
    let device = Device::new("d");
    certificate(&first, &token(&first, &device), &device);
    for umask in ["000", "077"] {
        let script = format!("umask {umask}; exec \"$@\"");
        let setup = instance::setup(&redis.url(), &[]).share_ca(&first);
        let service = setup.wrapper(&["sh", "-c", &script, "sh"]).start();
        let others = service.data("ca/certs/others.pem");
        assert!(wait::until(Duration::from_secs(10), || others.exists().then_some(())).is_some());
        for (name, expected) in [
            ("instance-id", 0o600),
            ("devices.txt", 0o600),
            ("run", 0o700),
            ("ca/index.txt", 0o644),
            ("ca/index.txt.attr", 0o644),
            ("ca/crl.pem", 0o644),
            ("ca/certs/others.pem", 0o644),
        ] {
            let mode = fs::metadata(service.data(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, expected, "{name}, umask {umask}");
        }
    }
}

#[test]
fn those_that_are_loaded() {
    for (name, key, form) in [
        ("EC P-256, PKCS#8", "ec:prime256v1", &[][..]),
        ("EC P-256, SEC1", "ec:prime256v1", &["ec"]),
        ("EC P-384, PKCS#8", "ec:secp384r1", &[]),
        ("EC P-384, SEC1", "ec:secp384r1", &["ec"]),
        ("RSA 2048, PKCS#1", "rsa:2048", &["rsa", "-traditional"]),
        ("RSA 2048, PKCS#8", "rsa:2048", &[]),
        ("RSA 4096, PKCS#1", "rsa:4096", &["rsa", "-traditional"]),
        ("Ed25519", "ed25519", &[]),
    ] {
        let setup = Setup::new();
        let key_file = csr::key_file(key).display().to_string();
        let pem = match form {
            [] => fs::read_to_string(&key_file).unwrap(),
            [command, more @ ..] => openssl(&[&[*command, "-in", &key_file], more].concat(), ""),
        };
        put(&setup, &pem, &self_signed(key, "/O=Old Fleet/CN=Old CA", CA_EXTENSIONS));
        let service = setup.start();
        let answer = service.sign(&service.token("d"), &Csr::new("d").make());
        assert_eq!(answer.status, 200, "{name}: {}", answer.text());
        csr::verify_with_openssl(&service.read("ca/root-ca.crt"), &answer.field("certificate"))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

/// Names in which a type stands twice, several attributes make one part, and strings of other types.
#[test]
fn names_of_every_kind() {
    for (subject, mask) in [
        ("/DC=example/DC=org/CN=CA", "utf8only"),
        ("/OU=one/OU=two/CN=CA", "utf8only"),
        ("/O=x+OU=y+CN=CA", "utf8only"),
        ("/O=Alte Firma/CN=CA", "MASK:0x800"),
        ("/O=Alte Firma/CN=CA", "MASK:0x4"),
    ] {
        let setup = Setup::new();
        let key = fs::read_to_string(csr::key_file("ec:prime256v1")).unwrap();
        let mut args = self_signed_args("ec:prime256v1", subject);
        let (_dir, config) = config(&format!("{CA_EXTENSIONS}[req]\nstring_mask={mask}\n"));
        args.extend(["-multivalue-rdn", "-config", &config].map(str::to_owned));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        put(&setup, &key, &openssl(&args, ""));
        let service = setup.start();
        let answer = service.enroll("d", &Csr::new("d").make());
        let ca = service.read("ca/root-ca.crt");
        csr::verify_with_openssl(&ca, &answer.field("certificate")).unwrap();
        let name = |pem: &str, which: &str| {
            csr::x509_field(pem, &[which, "-nameopt", "RFC2253,dump_der,dump_all"])
        };
        assert_eq!(
            name(&answer.field("certificate"), "-issuer"),
            name(&ca, "-subject"),
            "{subject}"
        );
        let said = openssl(
            &[
                "crl",
                "-verify",
                "-noout",
                "-CAfile",
                &service.data("ca/root-ca.crt").display().to_string(),
            ],
            &service.read("ca/crl.pem"),
        );
        assert_eq!(said, "", "{subject}");
    }
}

#[test]
fn those_that_are_refused() {
    let key = fs::read_to_string(csr::key_file("ec:prime256v1")).unwrap();
    let good = self_signed("ec:prime256v1", "/CN=CA", CA_EXTENSIONS);
    let other_key = csr::new_key("ec:prime256v1");
    let check = |what: &str, key: &str, certificate: &str| {
        let setup = Setup::new();
        put(&setup, key, certificate);
        let exit = setup.run();
        assert!(matches!(exit.code, Some(1 | 2)), "{what}: {exit:?}");
        assert!(exit.log.contains("root-ca."), "{what}: names the file: {}", exit.log);
        assert!(!exit.log.contains("PRIVATE KEY"), "{what}: {}", exit.log);
    };
    check("another key", &other_key, &good);
    check("no key in the file", "nothing", &good);
    check("no certificate in the file", &key, "nothing");
    check("an empty key file", "", &good);
    check("key and certificate swapped", &good, &key);
    let extensions = |text: &str| self_signed("ec:prime256v1", "/CN=CA", text);
    check("no CA", &key, &extensions("basicConstraints=critical,CA:FALSE\n"));
    check("no extensions", &key, &extensions("subjectKeyIdentifier=hash\n"));
    let usage = |usage: &str| {
        extensions(&format!(
            "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,{usage}\nsubjectKeyIdentifier=hash\n"
        ))
    };
    check("no cRLSign", &key, &usage("keyCertSign"));
    check("no keyCertSign", &key, &usage("cRLSign"));
    check("expired", &key, &expired());
    check(
        "a stranger behind it",
        &key,
        &[&*good, &self_signed("rsa:2048", "/CN=Other", CA_EXTENSIONS)].concat(),
    );
    check("the key behind it", &key, &[&*good, &key].concat());
    let weak = fs::read_to_string(csr::key_file("rsa:1024")).unwrap();
    check("RSA 1024", &weak, &self_signed("rsa:1024", "/CN=CA", CA_EXTENSIONS));
    let curve = fs::read_to_string(csr::key_file("ec:secp521r1")).unwrap();
    check("P-521", &curve, &self_signed("ec:secp521r1", "/CN=CA", CA_EXTENSIONS));
}

/// An intermediate CA of ours by a root that lies elsewhere: the files' texts, ours first.
pub struct Chain {
    key: String,
    pub certificates: Vec<String>,
}

impl Chain {
    pub fn new(depth: usize) -> Self {
        let dir = TempDir::new();
        let extensions = dir.file("ext", CA_EXTENSIONS).display().to_string();
        let upper = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n";
        let upper = dir.file("upper", upper).display().to_string();
        let mut chain: Vec<(String, String)> = Vec::new();
        for level in 0..depth {
            let key = csr::new_key("ec:prime256v1");
            let key_file = dir.file("key", &key).display().to_string();
            let subject = format!("/O=Fleet/CN=Level {level}");
            let request = openssl(&["req", "-new", "-key", &key_file, "-subj", &subject], "");
            let extensions = if level + 1 == depth { &extensions } else { &upper };
            let by = match chain.first() {
                None => vec!["-signkey".to_owned(), key_file],
                Some((certificate, key)) => {
                    let path = |name: &str, text: &str| dir.file(name, text).display().to_string();
                    let (certificate, key) = (path("ca", certificate), path("ca.key", key));
                    ["-CA", &certificate, "-CAkey", &key, "-set_serial", "7"]
                        .map(str::to_owned)
                        .into()
                }
            };
            let args = ["x509", "-req", "-days", "30", "-extfile", extensions];
            let args: Vec<&str> = args.into_iter().chain(by.iter().map(String::as_str)).collect();
            chain.insert(0, (openssl(&args, &request), key));
        }
        let key = chain[0].1.clone();
        Chain { key, certificates: chain.into_iter().map(|(certificate, _)| certificate).collect() }
    }

    /// Puts the files where the service looks.
    pub fn put(&self, setup: &Setup) {
        self.put_first(self.certificates.len(), setup);
    }

    /// The same, with so many of the certificates.
    pub fn put_first(&self, count: usize, setup: &Setup) {
        put(setup, &self.key, &self.certificates[..count].concat());
    }
}

#[test]
fn a_chain_is_given_to_all() {
    let Chain { key, certificates } = Chain::new(3);
    let root = certificates.last().unwrap();
    for (given, file) in [
        ("up to the root", certificates.concat()),
        ("without the root, which others have", certificates[..2].concat()),
        ("ours alone", certificates[0].clone()),
    ] {
        let setup = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY);
        put(&setup, &key, &format!("some words\n{file}"));
        let service = setup.start();
        let answer = service.enroll("d", &Csr::new("d").make());
        let leaf = answer.field("certificate");
        assert_eq!(answer.field("ca_certificate"), file, "{given}");
        assert_eq!(service.http.get("/api/v1/ca").text(), file, "{given}");
        let download = service.http.get("/api/v1/certificates/d/download");
        assert_eq!(download.json()["ca_certificate"]["content"], file, "{given}");
        let chain = service.http.get("/api/v1/certificates/d/download?format=pem").text();
        assert_eq!(chain, format!("{leaf}{file}"), "{given}");
        // Who has the root only gets the rest from the device.
        let dir = TempDir::new();
        let path = |name: &str, text: &str| dir.file(name, text).display().to_string();
        let (root, leaf) = (path("root", root), path("leaf", &leaf));
        let untrusted = path("untrusted", &[&*chain, &certificates[1]].concat());
        let verify = ["verify", "-x509_strict", "-purpose", "sslclient", "-CAfile"];
        openssl(&[&verify[..], &[&root, "-untrusted", &untrusted, &leaf]].concat(), "");
        // The list is ours alone; a broker checks it for the device's certificate only.
        assert_eq!(service.revoke("d").status, 200);
        let list = service.data("ca/crl.pem").display().to_string();
        let check =
            ["verify", "-crl_check", "-CAfile", &root, "-untrusted", &untrusted, "-CRLfile"];
        let said = try_openssl(&[&check[..], &[&list, &leaf]].concat(), "").unwrap_err();
        assert!(said.contains("certificate revoked"), "{given}: {said}");
    }
}

#[test]
fn https_carries_the_chain() {
    let Chain { key, certificates } = Chain::new(2);
    let setup = Setup::new();
    put(&setup, &key, &certificates.concat());
    let out = setup.data("tls").display().to_string();
    let (exit, folder) =
        setup.args(&["server-certificate", "localhost", "--out", &out]).run_and_keep();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert_eq!(folder.read("tls/ca.crt"), certificates.concat());
    let server = folder.read("tls/server.crt");
    assert!(server.ends_with(&certificates[0]) && server.matches("BEGIN").count() == 2, "{server}");

    let service = Setup::new()
        .env("TLS_CERT", &format!("{out}/server.crt"))
        .env("TLS_KEY", &format!("{out}/server.key"))
        .start();
    let root = folder.data("root").display().to_string();
    fs::write(&root, &certificates[1]).unwrap();
    let url = format!("https://localhost:{}/health", service.port());
    let args = ["-qsS", "--fail", "--max-time", "10", "--capath", "/nonexistent", "--cacert"];
    let asked = Command::new("curl").args(args).args([&root, &url]).output().unwrap();
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
}

/// The record as another program has left it: serial numbers of one byte and below zero, and a line
/// that is no device's.
#[test]
fn a_record_of_another_program() {
    let mut service = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY).start();
    service.enroll("new", &Csr::new("new").make());
    service.kill9();
    let folder = service.data("ca");
    let ca = |name: &str| folder.join(name).display().to_string();
    let old = |serial: &str, name: &str| {
        let by = ["-CA", &ca("root-ca.crt"), "-CAkey", &ca("root-ca.key"), "-set_serial", serial];
        let args = [&["x509", "-req", "-days", "90"][..], &by].concat();
        openssl(&args, &Csr::new(name).make())
    };
    let pems = [("-5", "-05", "negative"), ("1", "01", "short"), ("0x8001", "8001", "lost")]
        .map(|(number, hex, name)| (hex, name, old(number, name)));
    let line = |state: &str, hex: &str, subject: &str| {
        format!(
            "{state}\t301231235959Z\t{}\t{hex}\tunknown\t{subject}\n",
            if state == "R" { "260101000000Z" } else { "" }
        )
    };
    let mut index = line("V", "-05", "/CN=negative") + &line("V", "01", "/CN=short");
    index += &line("V", "8001", "/CN=lost");
    index += &line("R", "-8002", "/C=DE/O=Example/CN=broker.example");
    index += &service.read("ca/index.txt");
    fs::write(service.data("ca/index.txt"), index).unwrap();
    for (hex, name, pem) in &pems {
        // Of one the file is elsewhere.
        if *name != "lost" {
            fs::write(service.data(&format!("ca/certs/{hex}.pem")), pem).unwrap();
        }
    }
    service.restart();
    for (hex, name, pem) in &pems {
        let status = service.http.get(&format!("/api/v1/certificates/{name}/status"));
        assert_eq!((status.status, &*status.field("status")), (200, "active"), "{}", status.text());
        assert_eq!(
            (status.field("serial_number"), status.field("expires_at")),
            ((*hex).to_owned(), "2030-12-31T23:59:59.000Z".to_owned())
        );
        check_error(&service.onboard(name), 409, "DEVICE_HAS_ACTIVE_CERTIFICATE", name);
        for id in [*name, *hex] {
            let download = service.http.get(&format!("/api/v1/certificates/{id}/download"));
            match *name {
                "lost" => check_error(&download, 404, "CERTIFICATE_NOT_FOUND", id),
                _ => assert_eq!(download.json()["certificate"]["content"], **pem, "{id}"),
            }
        }
        let json = status.json();
        let known = *name != "lost";
        assert_eq!(
            (json["fingerprint"].is_string(), json["created_at"].is_string()),
            (known, known)
        );
    }
    let listed = || openssl(&["crl", "-noout", "-text"], &service.read("ca/crl.pem"));
    assert!(listed().contains("Serial Number: -8002"), "{}", listed());
    for (hex, name, pem) in &pems {
        assert_eq!(service.revoke(name).status, 200, "{name}");
        let list = service.data("ca/crl.pem").display().to_string();
        let dir = TempDir::new();
        let leaf = dir.file("leaf", pem).display().to_string();
        let check =
            ["verify", "-crl_check", "-CAfile", &ca("root-ca.crt"), "-CRLfile", &list, &leaf];
        let said = try_openssl(&check, "").unwrap_err();
        assert!(said.contains("certificate revoked"), "{name}: {said}");
        assert!(
            listed().contains(&format!("Serial Number: {}\n", hex.to_uppercase())),
            "{}",
            listed()
        );
    }
    assert_eq!(service.index().iter().filter(|line| line[0] == "R").count(), 4);
    let log = service.log();
    let foreign = "are no device's and no server's, and count for the CRL only: 1\n";
    assert!(log.contains(foreign), "{log}");
}

#[test]
fn half_a_ca_is_not_made_whole() {
    for missing in ["root-ca.crt", "root-ca.key"] {
        let setup = Setup::new();
        let key = fs::read_to_string(csr::key_file("ec:prime256v1")).unwrap();
        put(&setup, &key, &self_signed("ec:prime256v1", "/CN=CA", CA_EXTENSIONS));
        fs::remove_file(setup.data("ca").join(missing)).unwrap();
        let exit = setup.run();
        assert!(matches!(exit.code, Some(1 | 2)), "without {missing}: {exit:?}");
        assert!(exit.log.contains(missing), "names the file: {}", exit.log);
    }
}

#[test]
fn a_folder_of_its_own() {
    let dir = TempDir::new();
    let ca = dir.path().join("elsewhere").display().to_string();
    let service = Service::start(&[("CA_STORAGE_PATH", &ca)]);
    assert!(dir.path().join("elsewhere/root-ca.crt").exists());
    assert!(!service.data("ca").exists());
}

fn put(setup: &Setup, key: &str, certificate: &str) {
    fs::create_dir_all(setup.data("ca")).unwrap();
    fs::write(setup.data("ca/root-ca.key"), key).unwrap();
    fs::write(setup.data("ca/root-ca.crt"), certificate).unwrap();
}

fn self_signed(key: &str, subject: &str, extensions: &str) -> String {
    let args = self_signed_args(key, subject);
    let (dir, config) = config(extensions);
    let args: Vec<&str> = args.iter().map(String::as_str).chain(["-config", &config]).collect();
    let pem = openssl(&args, "");
    drop(dir);
    pem
}

/// Made 400 days ago for one day.
fn expired() -> String {
    let (_dir, config) = config(CA_EXTENSIONS);
    let mut command = Command::new("faketime");
    command.args(["-f", "-400d", "openssl"]).args(self_signed_args("ec:prime256v1", "/CN=CA"));
    let output = command.args(["-days", "1", "-config", &config]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn self_signed_args(key: &str, subject: &str) -> Vec<String> {
    let key = csr::key_file(key).display().to_string();
    ["req", "-x509", "-new", "-key", &key, "-subj", subject, "-extensions", "ca"]
        .map(str::to_owned)
        .to_vec()
}

fn config(extensions: &str) -> (TempDir, String) {
    let dir = TempDir::new();
    let text = format!("[req]\ndistinguished_name=dn\n[dn]\n[ca]\n{extensions}");
    let path = dir.file("ca.cnf", &text).display().to_string();
    (dir, path)
}
