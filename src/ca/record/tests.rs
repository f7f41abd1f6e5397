//! The record as a whole, and what the tests of its parts need: a CA of its own and a record in its
//! folder.

use std::fs;
use std::path::Path;

use super::*;
use crate::ca::csr::Csr;
use crate::ca::issuer::{Issuer, Leaf, ServerCertificate};
use crate::ca::key::PublicKey;
use crate::ca::tests::{must, run, run_program};
use crate::clock::{self, DAY_S};
use crate::files::test_dir::TestDir;
use merge::Judge;

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

#[test]
fn what_is_committed_is_read_back_by_the_next_process() {
    let fixture = Fixture::new();
    let record = fixture.open();
    let now = clock::now();
    let (first, second) = (fixture.leaf("device-1"), fixture.leaf("device-1"));
    let other = fixture.leaf("device-2");
    let (live, ended) = (token("live", now.unix_s() + 100), token("ended", now.unix_s() - 1));

    let mut entries = record.begin();
    assert!(!entries.has_active(&device("device-1"), now) && !entries.knows_token(&live.hash));
    entries.add(&first, Some(Origin::Token(live)), now);
    assert!(entries.has_active(&device("device-1"), now) && entries.knows_token(&live.hash));
    assert!(!record.knows_token(&live.hash), "not before the commit");
    entries.add(&other, Some(Origin::Registration(ended)), now);
    entries.add(&second, None, now);
    assert_eq!(entries.commit(), [Ok(()), Ok(()), Ok(())]);

    let check = |record: &Record| {
        assert!(!record.is_empty());
        let newest = record.newest(&device("device-1")).unwrap();
        assert_eq!((newest.serial, newest.expires_at), (second.serial, second.not_after));
        assert_eq!(newest.status(now), "active");
        let later = Now { unix_ms: (second.not_after + 1) * 1000, ..now };
        assert_eq!(newest.status(later), "expired");
        assert!(!record.has_active(&device("device-1"), later));
        assert_eq!(record.by_serial(&first.serial).unwrap().device, device("device-1"));
        assert_eq!(record.newest(&device("device-3")), None);
        let look = record.look(&live.hash, &device("device-3"), now);
        assert_eq!(look, (true, false));
        let stored = record.stored(&first.serial).unwrap();
        assert_eq!((stored.pem, stored.der), (first.pem.clone(), first.der.clone()));
        let origin = Some(Origin::Token(live));
        assert_eq!(
            (stored.created_at, stored.origin),
            (crate::ca::validity(&first.der).unwrap().0 + 300, origin)
        );
        let origin = |leaf: &Leaf| record.stored(&leaf.serial).unwrap().origin;
        assert_eq!(origin(&other), Some(Origin::Registration(ended)));
        assert_eq!((origin(&second), record.older(&second.serial)), (None, vec![first.serial]));
    };
    check(&record);
    let again = fixture.open();
    check(&again);
    let mut spent = again.spent_tokens();
    spent.sort_by_key(|spent| spent.token.exp);
    let expected = [(ended, other.serial, "device-2"), (live, first.serial, "device-1")]
        .map(|(token, serial, name)| Spent { token, serial, device: device(name) });
    assert_eq!(spent, expected, "an ended one may not have, if the clock is ahead");
    let no_clock = Record::open(&fixture.dir, None, None).unwrap();
    assert!(no_clock.knows_token(&ended.hash), "without a clock none has ended");
    must(&fixture.dir, &format!("verify -CAfile root-ca.crt certs/{:X}.pem", first.serial));
}

#[test]
fn revoked_and_read_back() {
    let fixture = Fixture::new();
    let record = fixture.open();
    let leaves = [fixture.leaf("device-1"), fixture.leaf("device-1"), fixture.leaf("device-10")];
    leaves.iter().for_each(|leaf| enter(&record, leaf, None).unwrap());
    let now = clock::now();
    let mut revoked = record.revoke(&device("device-1"), Reason::Unspecified, now).unwrap();
    revoked.sort();
    let mut expected = [leaves[0].serial, leaves[1].serial];
    expected.sort();
    assert_eq!(revoked, expected);
    assert_eq!(record.revoke(&device("device-1"), Reason::Unspecified, now), Ok(vec![]));
    assert_eq!(record.revoke(&device("nobody"), Reason::Unspecified, now), Ok(vec![]));
    for record in [&record, &fixture.open()] {
        assert!(!record.has_active(&device("device-1"), now));
        assert!(record.has_active(&device("device-10"), now));
        let newest = record.newest(&device("device-1")).unwrap();
        assert_eq!(newest.revoked_at, Some(now.unix_s()));
        assert_eq!(newest.status(now), "revoked");
        assert_eq!(record.revoked(now).len(), 2);
        let later = Now { unix_ms: (leaves[1].not_after + 1) * 1000, ..now };
        assert_eq!(record.revoked(later), []);
    }
    fs::write(fixture.dir.join(INDEX), "").unwrap();
    let error = record.revoke(&device("device-10"), Reason::Unspecified, now).unwrap_err();
    assert!(error.to_string().contains("index.txt has lost a line of device-10"), "{error}");
    assert!(record.has_active(&device("device-10"), now));
}

#[test]
fn single_certificates_are_revoked() {
    let fixture = Fixture::new();
    let record = fixture.open();
    let leaves = [(); 3].map(|()| fixture.leaf("device-1"));
    leaves.iter().for_each(|leaf| enter(&record, leaf, None).unwrap());
    let [first, second, third] = leaves.map(|leaf| leaf.serial);
    let (now, stranger) = (clock::now(), Serial::from([0x41; 16]));
    assert_eq!(record.revoke_these(&[second, stranger], Reason::Superseded, now), Ok(vec![second]));
    assert_eq!(
        record.revoke_these(&[second], Reason::Superseded, now),
        Ok(vec![]),
        "once is enough"
    );
    assert_eq!(record.revoke_these(&[], Reason::Superseded, now), Ok(vec![]));
    for record in [&record, &fixture.open()] {
        let revoked = |s| record.by_serial(&s).unwrap().revoked_at.is_some();
        assert_eq!([first, second, third].map(revoked), [false, true, false]);
        assert_eq!(record.begin().count_active(&device("device-1"), now), 2);
    }
}

#[test]
fn openssl_ca_works_on_it() {
    let fixture = Fixture::new();
    let dir = &fixture.dir;
    let record = fixture.open();
    let leaves = [fixture.leaf("device-1"), fixture.leaf("device-1"), fixture.leaf("device-2")];
    leaves.iter().for_each(|leaf| enter(&record, leaf, None).unwrap());
    record.revoke(&device("device-2"), Reason::KeyCompromise, clock::now()).unwrap();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/openssl-ca.cnf");
    let ca = |line: &str| run(dir, &format!("ca -config {config} {line}"));
    let status = |leaf: &Leaf| ca(&format!("-status {:X}", leaf.serial)).unwrap_or_else(|e| e);
    assert!(status(&leaves[0]).contains("=Valid (V)"), "{}", status(&leaves[0]));
    assert!(status(&leaves[2]).contains("=Revoked (R)"));
    ca("-gencrl -out by-openssl.pem").unwrap();
    let crl = must(dir, "crl -in by-openssl.pem -CAfile root-ca.crt -noout -text");
    assert!(crl.contains("verify OK") && crl.contains(&format!("{:X}", leaves[2].serial)), "{crl}");

    // What an operator does with it while the service is stopped is read at the next start.
    let pem = format!("certs/{:X}.pem", leaves[0].serial);
    ca(&format!("-revoke {pem} -crl_reason keyCompromise")).unwrap();
    assert!(fixture.index().contains("Z,keyCompromise\t"), "{}", fixture.index());
    let now = clock::now();
    let again = fixture.open();
    assert!(again.by_serial(&leaves[0].serial).unwrap().revoked_at.is_some());
    assert!(again.has_active(&device("device-1"), now), "the other one is");
    assert_eq!(
        again.revoke(&device("device-1"), Reason::Unspecified, now),
        Ok(vec![leaves[1].serial])
    );
    assert!(fixture.index().contains("Z,keyCompromise\t"));
    enter(&again, &fixture.leaf("device-3"), None).unwrap();
    run_program(dir, "faketime", &format!("-f +1y openssl ca -config {config} -updatedb")).unwrap();
    assert!(fixture.index().contains("E\t"), "{}", fixture.index());
    assert!(fixture.open().has_active(&device("device-3"), now), "the date decides, not the E");
}

#[test]
fn many_threads_write_and_read() {
    let fixture = Fixture::new();
    let record = fixture.open();
    let leaves: Vec<Leaf> = (0..12).map(|n| fixture.leaf(&format!("device-{}", n % 3))).collect();
    std::thread::scope(|scope| {
        for pair in leaves.chunks(2) {
            let record = &record;
            scope.spawn(move || {
                let mut entries = record.begin();
                pair.iter().for_each(|leaf| entries.add(leaf, None, clock::now()));
                assert_eq!(entries.commit(), [Ok(()), Ok(())]);
                assert!(pair.iter().all(|leaf| record.by_serial(&leaf.serial).is_some()));
            });
        }
    });
    assert_eq!((fixture.index().lines().count(), fixture.pems()), (12, 12));
    let count = |r: &Record| r.read().of_device(&device("device-0")).count();
    assert_eq!((count(&record), count(&fixture.open())), (4, 4));
}
