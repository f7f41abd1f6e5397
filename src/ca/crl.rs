//! The list of revoked certificates (RFC 5280, 5), for brokers and other relying parties.
//!
//! It is valid from a little before it is signed, since a broker whose clock lags would otherwise
//! refuse every device, and a week long, though renewed daily.

use std::path::Path;

use rcgen::{CertificateRevocationListParams, SerialNumber};
use x509_parser::asn1_rs::{FromDer as _, Tag};
use x509_parser::certificate::X509Certificate;
use x509_parser::revocation_list::CertificateRevocationList;
use x509_parser::verify::verify_signature;

use super::CaError;
use super::der::{self, Reader};
use super::issuer::{BACKDATE_S, Issuer};
use super::record::{Reason, Revocation};
use crate::clock::{self, Now};
use crate::files;
use crate::pem;
use crate::serial::Serial;

pub const FILE: &str = "crl.pem";
const LIFETIME_S: u64 = 7 * 86_400;
/// The identifier of the extension that tells the reason (RFC 5280, 5.3.1), in DER.
const REASON_CODE: &[u8] = &[0x06, 0x03, 0x55, 0x1d, 0x15];
/// How old a list becomes before it is renewed.
const RENEWED_AFTER_S: u64 = 86_400;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crl {
    pub pem: String,
    pub der: Vec<u8>,
    /// Its number, which only grows.
    pub number: u64,
    /// When it was signed, in seconds since 1970.
    pub made_at: u64,
}

impl Crl {
    /// Signs a list of what is revoked. Its number is the time, or one more than the `last`.
    pub fn sign(
        issuer: &Issuer,
        revoked: &[Revocation],
        last: u64,
        now: Now,
    ) -> Result<Self, CaError> {
        issuer.check_dates(now)?;
        let made_at = now.unix_s();
        let number = made_at.max(last.saturating_add(1));
        let params = CertificateRevocationListParams {
            this_update: clock::utc(made_at.saturating_sub(BACKDATE_S)),
            next_update: clock::utc(made_at.saturating_add(LIFETIME_S)),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: issuer.key_identifier(),
        };
        let der = issuer.signed_list(&params, &entries_of(revoked, made_at))?;
        Ok(Crl { pem: pem::encode("X509 CRL", &der), der, number, made_at })
    }

    /// Its last second: then whoever reads it refuses everybody. In seconds since 1970.
    pub fn next_update(&self) -> u64 {
        self.made_at.saturating_add(LIFETIME_S)
    }

    /// Whether it is time for a new one; also when the clock was set back before this one.
    pub fn is_due(&self, now: Now) -> bool {
        now.unix_s() < self.made_at || now.unix_s() - self.made_at >= RENEWED_AFTER_S
    }

    pub fn write(&self, dir: &Path) -> Result<(), CaError> {
        Ok(files::write_atomic(&dir.join(FILE), self.pem.as_bytes(), 0o644)?)
    }
}

/// The list in the folder, if there is nothing to renew: it is signed by `issuer`, names just what is
/// `revoked`, and is not due. Then a start writes nothing.
pub fn current(dir: &Path, issuer: &Issuer, revoked: &[Revocation], now: Now) -> Option<Crl> {
    let Found { list, entries, is_by_name } = find(dir, issuer)?;
    let due = list.number == 0 || list.is_due(now);
    (is_by_name && !due && entries == entries_of(revoked, list.made_at)).then_some(list)
}

/// The number of the CA's list in the folder; 0 if there is none that can be read.
pub fn last_number(dir: &Path, issuer: &Issuer) -> u64 {
    find(dir, issuer).map_or(0, |found| found.list.number)
}

/// What the list in the folder names. Empty if there is none by this CA.
pub fn listed(dir: &Path, issuer: &Issuer) -> Vec<Revocation> {
    let entries = find(dir, issuer).map_or_else(Vec::new, |found| found.entries);
    let entries = Reader(&entries).elements().unwrap_or_default();
    entries.into_iter().filter_map(read_entry).collect()
}

/// A list in the folder that the CA has signed.
struct Found {
    list: Crl,
    /// The entries as they stand in it, one behind the other.
    entries: Vec<u8>,
    /// Whether it bears the CA's name. A CA may be issued anew for the same key, and brokers look for
    /// the list by its name.
    is_by_name: bool,
}

fn find(dir: &Path, issuer: &Issuer) -> Option<Found> {
    let pem = String::from_utf8(files::read(&dir.join(FILE)).ok()??).ok()?;
    let [pem::Block { der, .. }] = <[_; 1]>::try_from(pem::blocks(&pem)?).ok()?;
    let parts = Reader(der::whole(&der, Tag::Sequence)?).elements()?;
    let [signed, algorithm, signature] = parts.try_into().ok()?;
    let mut parts = Reader(der::whole(signed, Tag::Sequence)?).elements()?;
    // The entries, if there are any, follow the dates. A start may find tens of thousands of them, and
    // x509_parser takes long for each, so it is shown the rest.
    let dates_end = 1 + parts.iter().rposition(|part| matches!(part, [0x17 | 0x18, ..]))?;
    let entries = match parts.get(dates_end) {
        Some([0x30, ..]) => der::whole(parts.remove(dates_end), Tag::Sequence)?.to_vec(),
        _ => Vec::new(),
    };
    let rest = der::tlv(0x30, &[&der::tlv(0x30, &parts.concat()), algorithm, signature].concat());
    let (_, list) = CertificateRevocationList::from_der(&rest).ok()?;
    let (_, ca) = X509Certificate::from_der(issuer.certificate_der()).ok()?;
    let (algorithm, signature) = (&list.signature_algorithm, &list.signature_value);
    verify_signature(ca.public_key(), algorithm, signature, signed).ok()?;
    let is_by_name = list.issuer().as_raw() == ca.subject().as_raw();
    let number = list.crl_number().and_then(|number| u64::try_from(number).ok()).unwrap_or(0);
    let made_at = u64::try_from(list.last_update().timestamp()).ok()? + BACKDATE_S;
    Some(Found { list: Crl { pem, der, number, made_at }, entries, is_by_name })
}

fn read_entry(entry: &[u8]) -> Option<Revocation> {
    let mut parts = Reader(der::whole(entry, Tag::Sequence)?);
    let serial = Serial::from_der(parts.next(Tag::Integer)?)?;
    let at = der::read_time(std::str::from_utf8(parts.any()?.data).ok()?)?;
    let extensions = parts.next(Tag::Sequence).and_then(|all| Reader(all).elements());
    let reason = extensions.unwrap_or_default().into_iter().find_map(read_reason);
    Some(Revocation { serial, at, reason: reason.unwrap_or(Reason::Unspecified) })
}

/// The reason, if the extension tells it.
fn read_reason(extension: &[u8]) -> Option<Reason> {
    let parts = Reader(der::whole(extension, Tag::Sequence)?).elements()?;
    let code = der::whole(parts.last()?, Tag::OctetString)?;
    let is_reason = parts.first() == Some(&REASON_CODE);
    let number = der::whole(code, Tag::Enumerated)?.first().copied();
    number.filter(|_| is_reason).map(Reason::numbered)
}

fn entries_of(revoked: &[Revocation], made_at: u64) -> Vec<u8> {
    revoked.iter().flat_map(|entry| der_of(entry, made_at)).collect()
}

/// An entry (RFC 5280, 5.1.2.6). One that a clock which was ahead has dated is dated now: some
/// relying parties take a revocation of the future for none. A reason that is not specified is left
/// out, as is asked for there (5.3.1).
fn der_of(Revocation { serial, at, reason }: &Revocation, made_at: u64) -> Vec<u8> {
    let (number, date) = (der::tlv(0x02, serial.der()), der::time(*at.min(&made_at)));
    let extensions = match reason.number() {
        0 => Vec::new(),
        reason => {
            let code = der::tlv(0x04, &der::tlv(0x0a, &[reason]));
            der::tlv(0x30, &der::tlv(0x30, &[REASON_CODE, &code].concat()))
        }
    };
    der::tlv(0x30, &[number, date, extensions].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::tests::{must, run};
    use crate::clock;
    use crate::files::test_dir::TestDir;

    fn revoked(serial: Serial, at: u64) -> Revocation {
        Revocation { serial, at, reason: Reason::Unspecified }
    }

    #[test]
    fn openssl_reads_the_list() {
        let dir = TestDir::new();
        let now = clock::now();
        let issuer = Issuer::make(&dir, 10, 90, now).unwrap();
        assert_eq!(last_number(&dir, &issuer), 0);
        let empty = Crl::sign(&issuer, &[], 0, now).unwrap();
        empty.write(&dir).unwrap();
        let text = must(&dir, "crl -in crl.pem -CAfile root-ca.crt -noout -text");
        assert!(text.contains("verify OK") && text.contains("No Revoked Certificates"), "{text}");
        assert!(text.contains("Version 2") && text.contains("Authority Key Identifier"), "{text}");
        assert_eq!((empty.number, last_number(&dir, &issuer)), (now.unix_s(), now.unix_s()));

        let serial = Serial::random().unwrap();
        let list =
            Crl::sign(&issuer, &[revoked(serial, 1_700_000_000)], empty.number, now).unwrap();
        list.write(&dir).unwrap();
        assert_eq!((list.number, last_number(&dir, &issuer)), (now.unix_s() + 1, now.unix_s() + 1));
        let text = must(&dir, "crl -in crl.pem -CAfile root-ca.crt -noout -text");
        assert!(text.contains(&format!("Serial Number: {serial:X}\n")), "{text}");
        assert!(text.contains("Revocation Date: Nov 14 22:13:20 2023 GMT"), "{text}");
        assert!(text.contains("verify OK") && !text.contains("Reason Code"), "{text}");

        let at = |s: u64| Now { unix_ms: s * 1000, mono_ms: 0 };
        let same = [revoked(serial, 1_700_000_000)];
        let found = |revoked: &[_], at| current(&dir, &issuer, revoked, at);
        assert_eq!(found(&same, now), Some(list.clone()));
        assert_eq!(found(&same, at(now.unix_s() + 86_400)), None, "it is due");
        assert_eq!(found(&[], now), None);
        assert_eq!(found(&[revoked(serial, 1_700_000_001)], now), None);
        assert_eq!(found(&[same[0], revoked(Serial::random().unwrap(), 1)], now), None);
        assert_eq!(found(&[Revocation { reason: Reason::Superseded, ..same[0] }], now), None);
        let other = TestDir::new();
        let other = Issuer::make(&other, 10, 90, now).unwrap();
        assert_eq!(current(&dir, &other, &same, now), None, "signed by another CA");
        let is_due = [86_399, 86_400].map(|s| list.is_due(at(now.unix_s() + s)));
        assert_eq!(is_due, [false, true]);
        assert!(list.is_due(at(now.unix_s() - 1)));
        assert!(matches!(Crl::sign(&issuer, &[], 0, at(0)), Err(CaError::ClockNotSet)));
    }

    #[test]
    fn the_list_gives_reasons() {
        let dir = TestDir::new();
        let now = clock::now();
        let issuer = Issuer::make(&dir, 10, 90, now).unwrap();
        for (reason, name) in [
            (Reason::KeyCompromise, "Key Compromise"),
            (Reason::Superseded, "Superseded"),
            (Reason::CessationOfOperation, "Cessation Of Operation"),
        ] {
            let serial = Serial::random().unwrap();
            let revocation = Revocation { serial, at: 1_700_000_000, reason };
            Crl::sign(&issuer, &[revocation], 0, now).unwrap().write(&dir).unwrap();
            let text = must(&dir, "crl -in crl.pem -CAfile root-ca.crt -noout -text");
            assert!(text.contains("verify OK") && text.contains(name), "{text}");
            assert_eq!(listed(&dir, &issuer), [revocation]);
            assert_eq!(Reason::parse(&reason.to_string()), Some(reason));
        }
    }

    #[test]
    fn serial_numbers_of_every_kind_are_listed() {
        let dir = TestDir::new();
        let now = clock::now();
        let issuer = Issuer::make(&dir, 10, 90, now).unwrap();
        must(&dir, "ecparam -genkey -noout -name prime256v1 -out key.pem");
        must(&dir, "req -new -key key.pem -subj /CN=d -out csr.pem");
        for (serial, hex) in [("-5", "-05"), ("1", "01"), ("0x0080ff", "80ff"), ("-256", "-0100")] {
            let by = format!("-CA root-ca.crt -CAkey root-ca.key -days 9 -set_serial {serial}");
            must(&dir, &format!("x509 -req -in csr.pem {by} -out leaf.pem"));
            let check =
                || run(&dir, "verify -crl_check -CAfile root-ca.crt -CRLfile crl.pem leaf.pem");
            Crl::sign(&issuer, &[], 0, now).unwrap().write(&dir).unwrap();
            assert!(check().is_ok(), "{serial}");
            let revoked = [revoked(Serial::from_hex(hex).unwrap(), now.unix_s())];
            let list = Crl::sign(&issuer, &revoked, 0, now).unwrap();
            list.write(&dir).unwrap();
            let said = check().unwrap_err();
            assert!(said.contains("certificate revoked"), "{serial}: {said}");
            assert_eq!(current(&dir, &issuer, &revoked, now), Some(list));
        }
    }

    /// Some relying parties take a revocation of the future for none.
    #[test]
    fn what_a_clock_that_was_ahead_revoked_is_revoked_now() {
        let dir = TestDir::new();
        let now = clock::now();
        let issuer = Issuer::make(&dir, 10, 90, now).unwrap();
        let serials = [(); 2].map(|()| Serial::random().unwrap());
        let revoked = [revoked(serials[0], now.unix_s() + 7200), revoked(serials[1], 1)];
        let list = Crl::sign(&issuer, &revoked, 0, now).unwrap();
        list.write(&dir).unwrap();
        let mut dates: Vec<u64> = listed(&dir, &issuer).iter().map(|r| r.at).collect();
        dates.sort_unstable();
        assert_eq!(dates, [1, now.unix_s()]);
        assert_eq!(current(&dir, &issuer, &revoked, now), Some(list));
    }
}
