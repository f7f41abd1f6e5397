//! For measuring: a load on several instances that share one record, and how soon they agree
//! (`scripts/share-scale.sh`). Devices are called `PREFIX-0` and so on; PORTS are of 127.0.0.1.
//!
//! `share flow PREFIX DEVICES PORT…` takes the devices from onboarding to their certificates, each step
//! at an instance drawn at random. What fails is tried again elsewhere: an instance may be killed
//! meanwhile.
//!
//! `share agree PREFIX DEVICES PORT…` asks every instance for the status of every device, until all
//! give the same for each; prints how many milliseconds that took. The certificates of some are
//! downloaded from each, too.
//!
//! `share revoke PREFIX DEVICES KEY PORT CRL` revokes the devices one after the other at this instance,
//! and prints the milliseconds from each request until the list in this file, another instance's, names
//! the certificate.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::KeyPair;
use serde_json::Value;
use tools::http::{Answer, Connection, get, post};
use tools::{Failure, csr, quantile_ms};

/// Clients of `flow`.
const THREADS: usize = 8;
/// Longest that a device may take, or an agreement, or a list.
const PATIENCE: Duration = Duration::from_secs(60);
/// It was signed, and the instance killed before it answered.
const HAS_ONE: &str = "DEVICE_HAS_ACTIVE_CERTIFICATE";

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["flow", prefix, devices, ref ports @ ..] => flow(prefix, devices.parse()?, &parse(ports)?),
        ["agree", prefix, devices, ref ports @ ..] => {
            agree(prefix, devices.parse()?, &parse(ports)?)
        }
        ["revoke", prefix, devices, key, port, list] => {
            revoke(prefix, devices.parse()?, key, port.parse()?, list)
        }
        _ => Err("usage: share flow|agree|revoke PREFIX DEVICES …".into()),
    }
}

fn parse(ports: &[&str]) -> Result<Vec<u16>, Failure> {
    Ok(ports.iter().map(|port| port.parse()).collect::<Result<_, _>>()?)
}

fn ask(port: u16, request: &str) -> Result<Answer, Failure> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Connection::over(stream).exchange(request)
}

/// A text in the JSON of an answer with 200.
fn text(answer: &Answer, name: &str) -> Option<String> {
    let body: Value = serde_json::from_str(&answer.body).ok()?;
    (answer.status == 200).then(|| body.get(name)?.as_str().map(str::to_owned))?
}

fn flow(prefix: &str, devices: usize, ports: &[u16]) -> Result<(), Failure> {
    let began = Instant::now();
    let clients = (0..THREADS.min(devices)).map(|client| {
        let (prefix, ports) = (prefix.to_owned(), ports.to_vec());
        thread::spawn(move || -> Result<(), Failure> {
            let key = KeyPair::generate()?;
            (client..devices)
                .step_by(THREADS)
                .try_for_each(|n| enrol(&format!("{prefix}-{n}"), n, &key, &ports))
        })
    });
    let clients: Vec<_> = clients.collect();
    for client in clients {
        client.join().map_err(|_| "a client panicked")??;
    }
    let took = began.elapsed().as_secs_f64();
    println!("{devices} devices in {took:.1} s, {:.0} a second", devices as f64 / took);
    Ok(())
}

fn enrol(name: &str, seed: usize, key: &KeyPair, ports: &[u16]) -> Result<(), Failure> {
    let csr = BASE64.encode(csr(name, key)?);
    let onboarding = post("/api/v1/onboarding", "", &format!(r#"{{"device_id":"{name}"}}"#));
    let body = format!(r#"{{"csr":"{csr}","device_id":"{name}"}}"#);
    let began = Instant::now();
    let mut random = seed as u64 + 1;
    let mut port = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        ports.get((random >> 33) as usize % ports.len()).copied().ok_or("no port")
    };
    while began.elapsed() < PATIENCE {
        let answer = ask(port()?, &onboarding).ok();
        if answer.as_ref().is_some_and(|answer| answer.body.contains(HAS_ONE)) {
            return Ok(());
        }
        if let Some(token) = answer.and_then(|answer| text(&answer, "provisioning_token")) {
            let bearer = format!("Authorization: Bearer {token}\r\n");
            let signed = ask(port()?, &post("/api/v1/sign-csr", &bearer, &body));
            if signed.is_ok_and(|answer| answer.status == 200) {
                return Ok(());
            }
        }
        thread::sleep(Duration::from_millis(100));
    }
    Err(format!("{name} has no certificate").into())
}

fn status(connection: &mut Connection<TcpStream>, name: &str) -> Result<String, Failure> {
    let answer = connection.exchange(&get(&format!("/api/v1/certificates/{name}/status"), ""))?;
    let part = |name| text(&answer, name).unwrap_or_default();
    Ok(format!("{} {} {}", answer.status, part("serial_number"), part("status")))
}

fn agree(prefix: &str, devices: usize, ports: &[u16]) -> Result<(), Failure> {
    let began = Instant::now();
    let mut states: BTreeMap<String, usize> = BTreeMap::new();
    let mut all = Vec::new();
    for port in ports {
        all.push(Connection::over(TcpStream::connect(("127.0.0.1", *port))?));
    }
    for n in 0..devices {
        let name = format!("{prefix}-{n}");
        let state = loop {
            let states = all.iter_mut().map(|connection| status(connection, &name));
            let states: Vec<String> = states.collect::<Result<_, _>>()?;
            match states.split_first() {
                Some((first, rest)) if rest.iter().all(|state| state == first) => {
                    break first.clone();
                }
                _ if began.elapsed() > PATIENCE => {
                    return Err(format!("{name}: {}", states.join(", ")).into());
                }
                _ => thread::sleep(Duration::from_millis(10)),
            }
        };
        let mut words = state.split(' ');
        let (code, serial) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        *states.entry(format!("{code} {}", words.next().unwrap_or(""))).or_default() += 1;
        if n % 20 == 0 {
            let path = format!("/api/v1/certificates/{serial}/download?format=pem");
            let downloads = ports.iter().map(|port| Ok(ask(*port, &get(&path, ""))?.body));
            let mut downloads: Vec<String> = downloads.collect::<Result<_, Failure>>()?;
            downloads.dedup();
            if downloads.len() != 1 {
                return Err(format!("{name}: downloads differ").into());
            }
        }
    }
    println!("agreed after {} ms: {states:?}", began.elapsed().as_millis());
    Ok(())
}

fn revoke(prefix: &str, devices: usize, key: &str, port: u16, list: &str) -> Result<(), Failure> {
    let mut times = Vec::new();
    for n in 0..devices {
        let path = format!("/api/v1/certificates/{prefix}-{n}");
        let serial = text(&ask(port, &get(&format!("{path}/status"), ""))?, "serial_number");
        let serial = u128::from_str_radix(&serial.ok_or("nothing is known of it")?, 16)?;
        let began = Instant::now();
        let request = format!(
            "DELETE {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n"
        );
        let answer = ask(port, &request)?;
        if answer.status != 200 {
            return Err(answer.body.into());
        }
        while !names(list, serial)? {
            if began.elapsed() > PATIENCE {
                return Err(format!("{prefix}-{n} is not in {list}").into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        times.push(began.elapsed());
    }
    times.sort_unstable();
    let longest = quantile_ms(&times, 1.0);
    println!(
        "{devices} revocations: p50 {:.0} ms, longest {longest:.0} ms",
        quantile_ms(&times, 0.5)
    );
    Ok(())
}

/// Whether the list holds the serial number, whose 16 bytes nothing else in it is.
fn names(list: &str, serial: u128) -> Result<bool, Failure> {
    let pem = fs::read_to_string(list)?;
    let base64: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let der = BASE64.decode(base64)?;
    Ok(der.windows(16).any(|bytes| bytes == serial.to_be_bytes()))
}
