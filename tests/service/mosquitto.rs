//! From token to MQTT with a real Mosquitto: a device gets in, stays out of other devices' topics, and
//! is shut out when it is revoked.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::ca::Chain;
use crate::support::csr::{Csr, P256, key_file, new_key, openssl, x509_field};
use crate::support::device::Device;
use crate::support::hostile::{Hostile, Reply};
use crate::support::mosquitto::Broker;
use crate::support::port::Port;
use crate::support::service::{ADMIN_KEY, Service, Setup, send_signal};
use crate::support::temp::TempDir;
use crate::support::wait;

/// A service whose hook reloads the broker whose process id stands in `pid`.
fn with_hook(dir: &TempDir, setup: Setup) -> Service {
    setup.env("CRL_HOOK", &reloading_hook(dir)).env("ADMIN_API_KEY", ADMIN_KEY).start()
}

/// A hook that reloads the broker whose process id stands in `pid`, and says in `ran` that it was run.
pub fn reloading_hook(dir: &TempDir) -> String {
    let (pid, ran) = (dir.path().join("pid"), dir.path().join("ran"));
    let text = format!(
        "#!/bin/sh\necho \"$1\" >>{}\n[ ! -s {pid} ] || kill -HUP \"$(cat {pid})\"\n",
        ran.display(),
        pid = pid.display()
    );
    let hook = dir.file("hook", &text);
    assert!(Command::new("chmod").arg("755").arg(&hook).status().unwrap().success());
    hook.display().to_string()
}

#[test]
fn from_enrollment_to_revocation() {
    let dir = TempDir::new();
    let service = with_hook(&dir, Setup::new());
    let broker = Broker::start(&service);
    dir.file("pid", &broker.pid().to_string());
    let url = format!("http://127.0.0.1:{}", service.port());
    let [one, two] = ["device-1", "device-2"].map(|name| Device::new(name, &url));
    one.must_enroll(&[]);
    two.must_enroll(&[]);

    for (device, message) in [(&one, "a"), (&two, "b")] {
        let topic = format!("devices/{}/state", device.name);
        assert_eq!(broker.publish(device, &topic, message), Ok(()), "{}", broker.log());
        assert_eq!(broker.receive(device, &topic), Ok(message.to_owned()), "{}", broker.log());
    }
    let foreign = "devices/device-2/state";
    let said = broker.publish(&one, foreign, "forged").unwrap_err();
    assert!(said.contains("ot authorized"), "{said}");
    // The subscription is taken, but nothing is delivered.
    assert!(broker.receive(&one, foreign).is_err());
    assert_eq!(broker.receive(&two, foreign), Ok("b".to_owned()), "what was forged is not there");

    let mut connected = broker.subscribe(&one, "devices/device-1/#");
    wait::for_true("the subscriber is in", || broker.log().matches("SUBACK").count() >= 5);
    assert_eq!(service.revoke("device-1").status, 200, "{}", service.log());
    broker.refuses_soon(&one);
    assert!(one.read("device.crt").contains("BEGIN CERTIFICATE"));
    assert_eq!(broker.publish(&two, "devices/device-2/state", "c"), Ok(()), "the other one");
    assert_eq!(connected.try_wait().unwrap(), None, "whoever is connected stays so");
    let _ = connected.kill();
    let _ = connected.wait();

    let ran = fs::read_to_string(dir.path().join("ran")).unwrap();
    let list = service.data("ca/crl.pem").display().to_string();
    assert!(ran.lines().all(|line| line == list) && Path::new(&list).is_absolute(), "{ran}");
    assert_eq!(service.revoke("device-1").status, 200, "once more");
}

/// As the timer does it: once a third of its life is left, and only then, and who is connected stays so.
#[test]
fn the_brokers_certificate_is_renewed_while_it_runs() {
    let service = Service::start(&[]);
    let broker = Broker::start(&service);
    let folder = broker.folder().display().to_string();
    let renew = || {
        let args = ["server-certificate", "--renew", &folder];
        let data = service.data("").display().to_string();
        let exit = Setup::new().env("DATA_DIR", &data).args(&args).run();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        exit.log
    };
    let shown = || x509_field(&broker.shows(), &["-serial"]);
    let reload = |what: &str, before: &str| {
        send_signal(broker.pid(), "HUP");
        wait::for_true(what, || shown() != before);
    };
    let young = shown();
    assert_eq!(renew(), "", "it is young");
    // Two thirds ago, by OpenSSL, for the same key.
    let path = |name: &str| broker.folder().join(name).display().to_string();
    let request =
        openssl(&["req", "-new", "-key", &path("server.key"), "-subj", "/CN=localhost"], "");
    fs::write(path("request"), request).unwrap();
    fs::write(path("ext"), "subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth\n").unwrap();
    let [ca, ca_key] = ["ca/root-ca.crt", "ca/root-ca.key"].map(|name| service.data(name));
    let mut faketime = Command::new("faketime");
    faketime.args(["-f", "-205d", "openssl", "x509", "-req", "-days", "300", "-CAcreateserial"]);
    faketime.args(["-in", &path("request"), "-extfile", &path("ext"), "-out", &path("server.crt")]);
    let signed = faketime.arg("-CA").arg(ca).arg("-CAkey").arg(ca_key).output().unwrap();
    assert!(signed.status.success(), "{}", String::from_utf8_lossy(&signed.stderr));
    reload("it has an old one", &young);
    let old = shown();

    let url = format!("http://127.0.0.1:{}", service.port());
    let device = Device::new("device-1", &url);
    device.must_enroll(&[]);
    let mut connected = broker.subscribe(&device, "devices/device-1/#");
    wait::for_true("the subscriber is in", || broker.log().contains("SUBACK"));
    let said = renew();
    assert!(said.contains("server.crt is renewed until "), "{said}");
    reload("it has the new one", &old);
    let new = shown();
    assert_eq!(renew(), "", "nothing to do, nothing to reload");
    assert_eq!(broker.publish(&device, "devices/device-1/state", "a"), Ok(()), "{}", broker.log());
    assert_eq!(connected.try_wait().unwrap(), None, "who is connected stays so");
    let _ = connected.kill();
    let mut received = String::new();
    connected.stdout.take().unwrap().read_to_string(&mut received).unwrap();
    let _ = connected.wait();
    assert_eq!(received, "a\n", "over the connection that began with the old one");
    service.signal("HUP");
    wait::for_true("the record has it", || {
        service.index_of_servers().iter().any(|line| new.contains(&line[3]))
    });
}

/// The CA of a company whose root lies in a safe: broker and device have the chain.
#[test]
fn with_an_intermediate_ca() {
    let (dir, setup) = (TempDir::new(), Setup::new());
    Chain::new(3).put(&setup);
    let service = with_hook(&dir, setup);
    let broker = Broker::start(&service);
    dir.file("pid", &broker.pid().to_string());
    let device = Device::new("device-1", &format!("http://127.0.0.1:{}", service.port()));
    let answer = service.enroll("device-1", &Csr::new("device-1").make());
    fs::create_dir(device.folder()).unwrap();
    fs::write(device.file("ca.crt"), answer.field("ca_certificate")).unwrap();
    fs::write(device.file("device.crt"), answer.field("certificate")).unwrap();
    fs::copy(key_file(P256), device.file("device.key")).unwrap();
    let topic = "devices/device-1/state";
    assert_eq!(broker.publish(&device, topic, "a"), Ok(()), "{}", broker.log());
    assert_eq!(broker.receive(&device, topic), Ok("a".to_owned()), "{}", broker.log());
    assert_eq!(service.revoke("device-1").status, 200, "{}", service.log());
    broker.refuses_soon(&device);
}

#[test]
fn the_document_works_as_written() {
    let text =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/mosquitto.md")).unwrap();
    let (mut script, mut inside, mut blocks) = (String::from("set -eu\n"), false, 0);
    for line in text.lines() {
        match line {
            "```sh run" => (inside, blocks) = (true, blocks + 1),
            "```" => inside = false,
            line if inside => script.push_str(&format!("{line}\n")),
            _ => {}
        }
    }
    assert!(blocks >= 4, "{blocks} blocks");
    let dir = TempDir::new();
    let ports = [("3002", Port::any()), ("8883", Port::any())];
    for (written, free) in &ports {
        script = script.replace(written, &free.number().to_string());
    }
    let program = Path::new(env!("CARGO_BIN_EXE_mqtt-publisher-lite")).parent().unwrap().to_owned();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scripts = ["scripts", "contrib/mosquitto"].map(|dir| root.join(dir).display().to_string());
    let path = std::env::var("PATH").unwrap();
    let script = dir.file("script", &script);
    let output = Command::new("sh")
        .arg(&script)
        .current_dir(dir.path())
        .env_clear()
        .env("PATH", format!("{}:{}:{path}", program.display(), scripts.join(":")))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// A list made by `openssl ca` with the key of `service`, or with another one, and dates of its own.
fn list(service: &Service, key: Option<&str>, dates: [&str; 2]) -> String {
    let dir = TempDir::new();
    let path = |name: &str, text: &str| dir.file(name, text).display().to_string();
    let (ca, index) = (service.data("ca/root-ca.crt").display().to_string(), path("index", ""));
    let config = "[ca]\ndefault_ca=x\n[x]\ndatabase=INDEX\ndefault_md=sha256\n";
    let config = path("config", &config.replace("INDEX", &index));
    let (ca, key) = match key {
        None => (ca, service.data("ca/root-ca.key").display().to_string()),
        Some(key) => {
            let key = path("key", key);
            let args = ["x509", "-in", &ca, "-signkey", &key, "-days", "30"];
            (path("ca", &openssl(&args, "")), key)
        }
    };
    let [begin, end] = dates;
    let args = ["ca", "-config", &config, "-gencrl", "-cert", &ca, "-keyfile", &key];
    let dates = ["-crl_lastupdate", begin, "-crl_nextupdate", end];
    openssl(&[&args[..], &dates].concat(), "")
}

/// `openssl crl -verify` ends with 0 for each of those that are refused here.
#[test]
fn a_list_that_is_fetched() {
    const VALID: [&str; 2] = ["20260101000000Z", "20660101000000Z"];
    let setup = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY);
    let chain = Chain::new(3);
    chain.put(&setup);
    let service = setup.start();
    let other = Setup::new().start();
    let dir = TempDir::new();
    let file = dir.path().join("crl.pem");
    let served = Arc::new(Mutex::new(String::new()));
    let serves = Arc::clone(&served);
    let server = Hostile::start(move |_| Reply::http("200 OK", "", &serves.lock().unwrap()));
    // The other CA is one of those that the system believes.
    let other_ca = other.read("ca/root-ca.crt");
    let hash = x509_field(&other_ca, &["-subject_hash"]);
    dir.file(&format!("{}.0", hash.trim()), &other_ca);
    let fetch = |list: &str, shell: &[&str]| {
        list.clone_into(&mut served.lock().unwrap());
        let mut command = Command::new(shell[0]);
        command.args(&shell[1..]).arg("contrib/mosquitto/fetch-crl.sh").arg(server.url());
        command.arg(service.data("ca/root-ca.crt")).arg(&file).args(["echo", "reload"]);
        let output = command.env("SSL_CERT_DIR", dir.path()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    for shell in [&["sh"][..], &["busybox", "sh"]] {
        let _ = fs::remove_file(&file);
        let first = list(&service, None, ["20251231000000Z", "20660101000000Z"]);
        let good = service.read("ca/crl.pem");
        for (list, said) in [(&first, "reload\n"), (&good, "reload\n"), (&good, "")] {
            assert_eq!(fetch(list, shell), (Some(0), said.to_owned(), String::new()), "{shell:?}");
            assert_eq!(fs::read_to_string(&file).unwrap(), *list);
        }
        let key = new_key(P256);
        for (what, list, why) in [
            ("forged", list(&service, Some(&key), VALID), "is no list that the CA has signed"),
            ("another CA's", other.read("ca/crl.pem"), "is no list that the CA has signed"),
            ("an old one again", first, "older than"),
            ("ended", list(&service, None, ["20240101000000Z", "20250101000000Z"]), "has ended"),
            ("no list", "<html></html>".to_owned(), "is no list that the CA has signed"),
            ("nothing", String::new(), "is no list that the CA has signed"),
        ] {
            let (code, out, said) = fetch(&list, shell);
            assert_eq!((code, &*out), (Some(1), ""), "{what}: {said}");
            assert!(said.contains(why), "{what}: {said}");
            assert_eq!(fs::read_to_string(&file).unwrap(), good, "{what}");
        }
        // By a clock that was ahead: the right one is taken all the same.
        fs::write(&file, list(&service, None, ["20600101000000Z", "20660101000000Z"])).unwrap();
        assert_eq!(fetch(&good, shell).0, Some(0));
    }
    assert!(dir.path().read_dir().unwrap().count() == 2, "nothing is left beside it");
}
