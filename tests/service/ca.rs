//! The CA: made once and right, loaded in every form that is allowed, refused in every other.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use crate::support::clock::{now_s, parse_utc};
use crate::support::csr::{self, Csr, openssl};
use crate::support::service::{Service, Setup};
use crate::support::temp::TempDir;

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
    let weak = fs::read_to_string(csr::key_file("rsa:1024")).unwrap();
    check("RSA 1024", &weak, &self_signed("rsa:1024", "/CN=CA", CA_EXTENSIONS));
    let curve = fs::read_to_string(csr::key_file("ec:secp521r1")).unwrap();
    check("P-521", &curve, &self_signed("ec:secp521r1", "/CN=CA", CA_EXTENSIONS));
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
