//! What the parts of an onboarding and of a redemption cost alone, on one processor, in memory.
//!
//! `cargo bench --bench micro`, with a name to run only those that have it.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a benchmark that cannot run may panic"
)]

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;

use divan::{Bencher, black_box};
use mqtt_publisher_lite::ca::csr::Csr;
use mqtt_publisher_lite::ca::issuer::Issuer;
use mqtt_publisher_lite::clock::{self, Now};
use mqtt_publisher_lite::device::DeviceId;
use mqtt_publisher_lite::edge::head::{self, Origin};
use mqtt_publisher_lite::jwt::{Claims, Signer, Token};
use mqtt_publisher_lite::serial::Serial;
use mqtt_publisher_lite::store::ledger::Ledger;
use mqtt_publisher_lite::store::memory::Memory;
use mqtt_publisher_lite::store::{Op, TokenStore};
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

/// Issue, consume and finish, with as many other tokens live.
#[divan::bench(args = [0, 100_000])]
fn memory_store(bencher: Bencher, live: usize) {
    let now = clock::now();
    let memory = Memory::new(live + 1, Arc::new(Ledger::new(100_000)));
    for n in 0..live {
        memory.run(&[Op::Issue(token(&format!("other-{n}"), now))], now);
    }
    let token = token("device-001", now);
    let serial = Serial([0x40; 16]);
    bencher.bench(|| {
        let (issue, finish) = (Op::Issue(token.clone()), Op::Finish(token.clone()));
        let back = Op::GiveBack(token.clone(), serial);
        memory.run(&[issue, Op::Consume(token.clone(), serial), back, finish], now)
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
            Origin { number: 42, peer, proxies: None, certificate: None },
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
    bencher.bench(|| issuer.sign(black_box(&csr), &device, Serial([0x40; 16]), now).is_ok());
    std::fs::remove_dir_all(dir).unwrap();
}
