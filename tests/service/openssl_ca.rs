//! After many mixed operations OpenSSL's own tools and our record say the same of each certificate.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::support::csr::{self, Csr, P256, key_file, try_openssl};
use crate::support::http::Response;
use crate::support::https::{self, Identity};
use crate::support::random::Xorshift;
use crate::support::service::{ADMIN_KEY, Service, Setup};

const OPERATIONS: u32 = 200;
const DEVICES: usize = 12;

/// A fleet under random operations, and what should have come of them.
struct Fleet {
    service: Service,
    requests: Vec<String>,
    /// Serial to whether it is revoked.
    expected: BTreeMap<String, bool>,
    /// The newest certificate of each device that is not revoked.
    newest: Vec<Option<String>>,
    random: Xorshift,
    done: [u32; 3],
}

impl Fleet {
    fn new() -> Self {
        let env = [("ADMIN_API_KEY", ADMIN_KEY), ("REENROLL", "allow")];
        Fleet {
            service: https::start(Setup::new().envs(&env)),
            requests: (0..DEVICES).map(|n| Csr::new(&format!("device-{n}")).make()).collect(),
            expected: BTreeMap::new(),
            newest: vec![None; DEVICES],
            random: Xorshift(0x9e37_79b9_7f4a_7c15),
            done: [0; 3],
        }
    }

    fn operate(&mut self) {
        let (device, kind) = (self.random.below(DEVICES), self.random.below(10));
        match (kind, self.newest[device].clone()) {
            (0..4, Some(serial)) => self.renew(device, &serial),
            (4..7, Some(_)) => self.revoke(device),
            _ => self.issue(device),
        }
    }

    fn issue(&mut self, device: usize) {
        let body = json!({"device_id": format!("device-{device}")});
        let answer = https::post(&self.service, "/api/v1/onboarding", None, &body, &[]);
        let token = answer.field("provisioning_token");
        let body = json!({"csr": self.requests[device], "provisioning_token": token});
        let answer = https::post(&self.service, "/api/v1/sign-csr", None, &body, &[]);
        self.signed(device, &answer, 0);
    }

    fn renew(&mut self, device: usize, serial: &str) {
        let certificate = self.pem(serial);
        let who = Identity { certificate, key: key_file(P256) };
        let body = json!({"csr": self.requests[device]});
        let answer = https::post(&self.service, "/api/v1/renew", Some(&who), &body, &[]);
        if answer.status == 429 {
            return self.revoke(device);
        }
        self.signed(device, &answer, 1);
    }

    fn signed(&mut self, device: usize, answer: &Response, kind: usize) {
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), self.service.log());
        let serial = answer.field("serial_number").to_uppercase();
        self.expected.insert(serial.clone(), false);
        self.newest[device] = Some(serial);
        self.done[kind] += 1;
    }

    fn revoke(&mut self, device: usize) {
        let bearer = format!("Authorization: Bearer {ADMIN_KEY}");
        let path = format!("/api/v1/certificates/device-{device}");
        let args = ["-X", "DELETE", "-H", &bearer];
        let answer = https::ask(&self.service, &path, None, &args);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let subject = format!("/CN=device-{device}");
        for line in self.service.index().iter().filter(|line| line[5] == subject) {
            self.expected.insert(line[3].clone(), true);
        }
        self.newest[device] = None;
        self.done[2] += 1;
    }

    fn pem(&self, serial: &str) -> PathBuf {
        self.service.data(&format!("ca/certs/{serial}.pem"))
    }
}

/// Runs `openssl` in the CA's folder, with the configuration that we hand out.
fn in_ca(folder: &Path, line: &str) -> String {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/openssl-ca.cnf");
    let words = line.split(' ').map(|w| if w == "CONFIG" { config } else { w });
    let output = Command::new("openssl").args(words).current_dir(folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    said + &String::from_utf8_lossy(&output.stderr)
}

/// The serials that a list names, sorted.
fn listed(pem: &str) -> Vec<String> {
    let text = csr::openssl(&["crl", "-noout", "-text"], pem);
    let serials = text.lines().filter_map(|l| l.trim().strip_prefix("Serial Number: "));
    let mut serials: Vec<String> = serials.map(str::to_owned).collect();
    serials.sort();
    serials
}

#[test]
fn two_hundred_mixed_operations() {
    let mut fleet = Fleet::new();
    (0..OPERATIONS).for_each(|_| fleet.operate());
    assert!(fleet.done.iter().all(|n| *n >= 20), "{:?} issued, renewed, revoked", fleet.done);
    let folder = fleet.service.data("ca");
    let mut recorded: Vec<String> = fleet.service.serials();
    recorded.sort();
    assert!(recorded.iter().eq(fleet.expected.keys()), "each answered one is recorded, no other");

    for (serial, revoked) in &fleet.expected {
        let said = in_ca(&folder, &format!("ca -config CONFIG -status {serial}"));
        let word = if *revoked { "=Revoked (R)" } else { "=Valid (V)" };
        assert!(said.contains(&format!("{serial}{word}")), "{said}");
    }

    let revoked: Vec<String> =
        fleet.expected.iter().filter(|(_, r)| **r).map(|(s, _)| s.clone()).collect();
    let ours = fs::read_to_string(folder.join("crl.pem")).unwrap();
    assert_eq!(listed(&ours), revoked);
    let said = in_ca(&folder, "crl -noout -verify -CAfile root-ca.crt -in crl.pem");
    assert!(said.contains("verify OK"), "{said}");

    let said = in_ca(&folder, "ca -config CONFIG -gencrl -out theirs.pem");
    assert_eq!(listed(&fs::read_to_string(folder.join("theirs.pem")).unwrap()), revoked, "{said}");

    for (serial, revoked) in &fleet.expected {
        let pem = fleet.pem(serial).display().to_string();
        let path = |name: &str| folder.join(name).display().to_string();
        let (ca, list) = (path("root-ca.crt"), path("crl.pem"));
        let args = ["verify", "-crl_check", "-CAfile", &ca, "-CRLfile", &list, &pem];
        match (try_openssl(&args, ""), revoked) {
            (Ok(_), false) => {}
            (Err(said), true) => assert!(said.contains("certificate revoked"), "{said}"),
            (other, _) => panic!("{serial}, revoked: {revoked}: {other:?}"),
        }
    }
    println!("{:?} issued, renewed, revoked; {} certificates", fleet.done, fleet.expected.len());
}
