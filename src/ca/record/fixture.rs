//! A CA of its own and a record in its folder, for the tests of the record.

use std::fs;
use std::path::Path;

use super::merge::Judge;
use super::{CERTS, INDEX, Origin, Record, RecordError, Redeemed};
use crate::ca::csr::Csr;
use crate::ca::issuer::{Issuer, Leaf, ServerCertificate};
use crate::ca::key::PublicKey;
use crate::ca::openssl::must;
use crate::clock::{self, DAY_S};
use crate::device::DeviceId;
use crate::files::test_dir::TestDir;
use crate::jwt::TokenHash;
use crate::serial::Serial;

/// A folder with a CA and a request of `device-1`, which signs for any device here.
pub(super) struct Fixture {
    pub(super) dir: TestDir,
    issuer: Issuer,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let dir = TestDir::new();
        let issuer = Issuer::make(&dir, 10, 90, clock::now()).unwrap();
        must(&dir, "genpkey -algorithm ED25519 -out key.pem");
        Fixture { dir, issuer }
    }

    pub(super) fn open(&self) -> Record {
        self.try_open().unwrap()
    }

    /// Another instance of the same CA, in a folder of its own.
    pub(super) fn open_other(&self, dir: &Path) -> Record {
        Record::open(dir, Some(&self.issuer), Some(clock::now())).unwrap()
    }

    pub(super) fn judge(&self) -> Judge<'_> {
        Judge { ca: &self.issuer, bound: &|_| 0, ended_before: 0, now: clock::now() }
    }

    pub(super) fn try_open(&self) -> Result<Record, RecordError> {
        Record::open(&self.dir, Some(&self.issuer), Some(clock::now()))
    }

    pub(super) fn issuer(&self) -> &Issuer {
        &self.issuer
    }

    pub(super) fn csr(&self, name: &str) -> Csr {
        must(&self.dir, &format!("req -new -key key.pem -subj /CN={name} -out csr.pem"));
        Csr::parse(&fs::read_to_string(self.dir.join("csr.pem")).unwrap()).unwrap()
    }

    /// One that is valid for so many days.
    pub(super) fn leaf_of(&self, name: &str, days: u32) -> Leaf {
        let issuer = Issuer::load(&self.dir, days).unwrap().unwrap();
        let serial = Serial::random().unwrap();
        issuer.sign(&self.csr(name), &device(name), serial, None, clock::now()).unwrap()
    }

    pub(super) fn leaf(&self, name: &str) -> Leaf {
        let serial = Serial::random().unwrap();
        self.issuer.sign(&self.csr(name), &device(name), serial, None, clock::now()).unwrap()
    }

    /// A server's certificate, for so many days.
    pub(super) fn server(&self, name: &str, days: u64) -> ServerCertificate {
        let key = PublicKey::of(&rcgen::KeyPair::generate().unwrap());
        self.issuer
            .server_certificate(&[name.to_owned()], &key, days * DAY_S, clock::now())
            .unwrap()
    }

    pub(super) fn index(&self) -> String {
        fs::read_to_string(self.dir.join(INDEX)).unwrap()
    }

    pub(super) fn pems(&self) -> usize {
        fs::read_dir(self.dir.join(CERTS)).unwrap().count()
    }
}

pub(super) fn device(name: &str) -> DeviceId {
    DeviceId::parse(name).unwrap()
}

pub(super) fn token(name: &str, exp: u64) -> Redeemed {
    Redeemed { hash: TokenHash::of(name), iat: exp - 300, exp }
}

pub(super) fn enter(
    record: &Record,
    leaf: &Leaf,
    token: Option<Redeemed>,
) -> Result<(), RecordError> {
    let mut entries = record.begin();
    entries.add(leaf, token.map(Origin::Token), clock::now());
    entries.commit().remove(0)
}
