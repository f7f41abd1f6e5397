//! What the parts of an onboarding and of a redemption cost alone, on one processor. Needs
//! redis-server.
//!
//! `cargo bench -p tools --bench micro`, with a name to run only those that have it.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a benchmark that cannot run may panic"
)]

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use divan::{Bencher, black_box};
use mqtt_publisher_lite::Metrics;
use mqtt_publisher_lite::ca::csr::Csr;
use mqtt_publisher_lite::ca::issuer::Issuer;
use mqtt_publisher_lite::clock::{self, Now};
use mqtt_publisher_lite::config::Config;
use mqtt_publisher_lite::device::DeviceId;
use mqtt_publisher_lite::devices::{Bound, Row};
use mqtt_publisher_lite::edge::head::{self, Context};
use mqtt_publisher_lite::jwt::{Claims, Signer, Token};
use mqtt_publisher_lite::serial::Serial;
use mqtt_publisher_lite::store::ledger::Ledger;
use mqtt_publisher_lite::store::memory::Memory;
use mqtt_publisher_lite::store::redis::RedisStore;
use mqtt_publisher_lite::store::{New, Op, Rows, TokenStore};
use mqtt_publisher_lite::subscriber::Subscriber;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

const HEAD: &[u8] = b"POST /api/v1/onboarding HTTP/1.1\r\nHost: gateway.example:3002\r\n\
    User-Agent: device/1.0\r\nContent-Type: application/json\r\nContent-Length: 27\r\n\r\n";

fn main() {
    divan::main();
}

fn signer() -> Signer {
    Signer::new(b"0123456789abcdef0123456789abcdef")
}

fn claims(name: &str, now: Now) -> Claims {
    let device_id = DeviceId::parse(name).unwrap();
    Claims { device_id, iat: now.unix_s(), exp: now.unix_s() + 300, jti: Some([7; 16]) }
}

fn token(name: &str, now: Now) -> Token {
    signer().sign(claims(name, now))
}

fn issue(token: Token) -> Op {
    Op::Issue(New { token, replaces: None, subscriber: Subscriber::default() })
}

#[divan::bench]
fn token_sign(bencher: Bencher) {
    let (signer, claims) = (signer(), claims("device-001", clock::now()));
    bencher.bench(|| signer.sign(black_box(claims.clone())));
}

#[divan::bench]
fn token_verify(bencher: Bencher) {
    let now = clock::now();
    let (signer, token) = (signer(), token("device-001", now));
    bencher.bench(|| signer.verify(black_box(&token.compact), now.unix_s()));
}

/// Nothing was ever killed.
#[derive(Debug)]
struct NoRows;

impl Rows for NoRows {
    fn hear(&self, _: &DeviceId, _: Bound) {}

    fn doubt(&self, _: &DeviceId) {}

    fn to_be_told(&self, _: Now) -> Vec<DeviceId> {
        Vec::new()
    }

    fn row(&self, _: &DeviceId) -> Row {
        Row::default()
    }

    fn learn(&self, _: Vec<(DeviceId, Row)>, _: Now) {}
}

/// Issue, consume and finish, with as many other tokens live.
#[divan::bench(args = [0, 100_000])]
fn memory_store(bencher: Bencher, live: usize) {
    let now = clock::now();
    let ledger = Arc::new(Ledger::new(100_000));
    let memory = Memory::new(2 * live + 1, ledger, Arc::new(NoRows), signer());
    for n in 0..live {
        memory.run(&[issue(token(&format!("other-{n}"), now))], now);
    }
    let token = token("device-001", now);
    let serial = Serial::from([0x40; 16]);
    bencher.bench(|| {
        let (issue, finish) = (issue(token.clone()), Op::Remove(token.clone()));
        let back = Op::GiveBack(token.clone(), serial);
        memory.run(&[issue, Op::Consume(token.clone(), serial), back, finish], now)
    });
}

/// A server of our own, ended with the benchmark.
struct Redis(Child, u16);

impl Redis {
    fn start() -> Self {
        let port =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let mut command = Command::new("redis-server");
        command.args(["--save", "", "--appendonly", "no", "--port", &port.to_string()]);
        Redis(command.stdout(Stdio::null()).spawn().unwrap(), port)
    }

    fn store(&self) -> RedisStore {
        let port = self.1.to_string();
        let setting = |name: &str| match name {
            "REDIS_HOST" => Some(OsString::from("127.0.0.1")),
            "REDIS_PORT" => Some(OsString::from(&port)),
            _ => None,
        };
        let config = Config::from_lookup(setting, |path| std::fs::read(path)).unwrap();
        let metrics = Arc::new(Metrics::new(std::iter::empty()));
        let store = RedisStore::new(&config.redis.unwrap(), None, signer(), metrics);
        while store.connect(None).is_err() {
            thread::sleep(Duration::from_millis(20));
        }
        store
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Issues and finishes as many tokens, each half in one batch.
#[divan::bench(args = [1, 16])]
fn redis_store(bencher: Bencher, batch: usize) {
    let now = clock::now();
    let redis = Redis::start();
    let store = redis.store();
    let tokens: Vec<Token> = (0..batch).map(|n| token(&format!("device-{n}"), now)).collect();
    bencher.bench(|| {
        let issue: Vec<Op> = tokens.iter().cloned().map(issue).collect();
        let finish: Vec<Op> = tokens.iter().cloned().map(Op::Remove).collect();
        let line = store.line();
        (store.run_on(line, &issue, now), store.run_on(line, &finish, now))
    });
}

#[divan::bench]
fn head_find_and_rewrite(bencher: Bencher) {
    let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut out = Vec::with_capacity(256);
    bencher.bench_local(|| {
        out.clear();
        let end = head::find_end(black_box(HEAD), 0).unwrap().unwrap();
        head::read(
            &HEAD[..end],
            Context {
                number: 42,
                peer,
                proxies: None,
                is_encrypted: false,
                certificate: None,
                classify: mqtt_publisher_lite::api::classify,
            },
            &mut out,
        )
    });
}

fn csr() -> String {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, "device-001");
    let key = KeyPair::generate().unwrap();
    parameters.serialize_request(&key).unwrap().pem().unwrap()
}

/// Parsing, and the proof of possession.
#[divan::bench]
fn csr_check(bencher: Bencher) {
    let csr = csr();
    bencher.bench(|| Csr::parse(black_box(&csr)).is_ok());
}

#[divan::bench]
fn certificate_sign(bencher: Bencher) {
    let now = clock::now();
    let dir: PathBuf = std::env::temp_dir().join(format!("micro-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let issuer = Issuer::make(&dir, 10, 90, now).unwrap();
    let (csr, device) = (Csr::parse(&csr()).unwrap(), DeviceId::parse("device-001").unwrap());
    bencher.bench(|| {
        issuer.sign(black_box(&csr), &device, Serial::from([0x40; 16]), None, now).is_ok()
    });
    std::fs::remove_dir_all(dir).unwrap();
}
