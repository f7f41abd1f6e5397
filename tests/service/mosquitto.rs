//! From token to MQTT with a real Mosquitto: a device gets in, stays out of other devices' topics, and
//! is shut out when it is revoked.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::ca::Chain;
use crate::support::csr::{Csr, P256, key_file};
use crate::support::device::Device;
use crate::support::mosquitto::Broker;
use crate::support::port::Port;
use crate::support::service::{ADMIN_KEY, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::wait;

/// A service whose hook reloads the broker whose process id stands in `pid`.
fn with_hook(dir: &TempDir, setup: Setup) -> Service {
    let (pid, ran) = (dir.path().join("pid"), dir.path().join("ran"));
    let text = format!(
        "#!/bin/sh\necho \"$1\" >>{}\n[ ! -s {pid} ] || kill -HUP \"$(cat {pid})\"\n",
        ran.display(),
        pid = pid.display()
    );
    let hook = dir.file("hook", &text);
    assert!(Command::new("chmod").arg("755").arg(&hook).status().unwrap().success());
    let setup = setup.env("CRL_HOOK", hook.to_str().unwrap());
    setup.env("ADMIN_API_KEY", ADMIN_KEY).start()
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
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let path = std::env::var("PATH").unwrap();
    let script = dir.file("script", &script);
    let output = Command::new("sh")
        .arg(&script)
        .current_dir(dir.path())
        .env_clear()
        .env("PATH", format!("{}:{}:{path}", program.display(), scripts.display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}
