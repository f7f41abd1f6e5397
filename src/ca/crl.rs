//! The list of revoked certificates (RFC 5280, 5), for brokers and other relying parties.
//!
//! It is valid from a little before it is signed, since a broker whose clock lags would otherwise
//! refuse every device, and a week long, though renewed daily.

use std::collections::HashMap;
use std::path::Path;

use rcgen::{CertificateRevocationListParams, SerialNumber};
use x509_parser::asn1_rs::FromDer as _;
use x509_parser::certificate::X509Certificate;
use x509_parser::revocation_list::{CertificateRevocationList, RevokedCertificate};

use super::issuer::{self, BACKDATE_S, Issuer};
use super::{CaError, der};
use crate::clock::Now;
use crate::files;
use crate::pem;
use crate::serial::Serial;

/// The list in the CA's folder.
pub const FILE: &str = "crl.pem";
/// How long a list is valid.
const LIFETIME_S: u64 = 7 * 86_400;
/// How old a list becomes before it is renewed.
const RENEWED_AFTER_S: u64 = 86_400;

/// A signed list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crl {
    /// In PEM.
    pub pem: String,
    /// In DER.
    pub der: Vec<u8>,
    /// Its number, which only grows.
    pub number: u64,
    /// When it was signed, in seconds since 1970.
    pub made_at: u64,
}

impl Crl {
    /// Signs a list of serial numbers and times of revocation (seconds since 1970). Its number is
    /// the time, or one more than the `last`.
    ///
    /// # Errors
    /// As [`Issuer::sign`].
    pub fn sign(
        issuer: &Issuer,
        revoked: &[(Serial, u64)],
        last: u64,
        now: Now,
    ) -> Result<Self, CaError> {
        issuer.check_dates(now)?;
        let made_at = now.unix_s();
        let number = made_at.max(last.saturating_add(1));
        let params = CertificateRevocationListParams {
            this_update: issuer::date(made_at.saturating_sub(BACKDATE_S))?,
            next_update: issuer::date(made_at.saturating_add(LIFETIME_S))?,
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: issuer.key_identifier(),
        };
        let entries: Vec<u8> = revoked.iter().flat_map(|entry| der_of(entry, made_at)).collect();
        let der = issuer.signed_list(&params, &entries)?;
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

    /// Writes the list for all to read.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), CaError> {
        Ok(files::write_atomic(&dir.join(FILE), self.pem.as_bytes(), 0o644)?)
    }
}

/// The list in the folder, if there is nothing to renew: it is signed by `issuer`, names just what is
/// `revoked`, and is not due. Then a start writes nothing.
pub fn current(dir: &Path, issuer: &Issuer, revoked: &[(Serial, u64)], now: Now) -> Option<Crl> {
    let (pem, der) = read_whole(dir)?;
    let (_, ca) = X509Certificate::from_der(issuer.certificate_der()).ok()?;
    let (_, list) = CertificateRevocationList::from_der(&der).ok()?;
    list.verify_signature(ca.public_key()).ok()?;
    // A CA may be issued anew for the same key; brokers look for the list by its name.
    let ours = list.issuer().as_raw() == ca.subject().as_raw();
    let named = entries(&list);
    let number = u64::try_from(list.crl_number()?).ok()?;
    let made_at = u64::try_from(list.last_update().timestamp()).ok()? + BACKDATE_S;
    let is_named = |(serial, at): &(Serial, u64)| named.get(serial) == Some(at.min(&made_at));
    let same = ours && named.len() == revoked.len() && revoked.iter().all(is_named);
    Some(Crl { pem, der, number, made_at }).filter(|list| same && !list.is_due(now))
}

/// The number of the list in the folder; 0 if there is none that can be read.
pub fn last_number(dir: &Path) -> u64 {
    let number = |list: &CertificateRevocationList<'_>| u64::try_from(list.crl_number()?).ok();
    read(dir, number).flatten().unwrap_or(0)
}

/// What the list in the folder names: serial number and time of revocation, in seconds since 1970.
/// Empty if there is none by this CA.
pub fn listed(dir: &Path, issuer: &Issuer) -> HashMap<Serial, u64> {
    let by_ca = |list: &CertificateRevocationList<'_>| {
        let (_, ca) = X509Certificate::from_der(issuer.certificate_der()).ok()?;
        list.verify_signature(ca.public_key()).ok()?;
        Some(entries(list))
    };
    read(dir, by_ca).flatten().unwrap_or_default()
}

fn entries(list: &CertificateRevocationList<'_>) -> HashMap<Serial, u64> {
    let entry = |r: &RevokedCertificate<'_>| {
        let serial = Serial::from_der(r.raw_serial())?;
        Some((serial, u64::try_from(r.revocation_date.timestamp()).ok()?))
    };
    list.iter_revoked_certificates().filter_map(entry).collect()
}

fn read<T>(dir: &Path, take: impl FnOnce(&CertificateRevocationList<'_>) -> T) -> Option<T> {
    let (_, der) = read_whole(dir)?;
    let (_, list) = CertificateRevocationList::from_der(&der).ok()?;
    Some(take(&list))
}

/// PEM and DER.
fn read_whole(dir: &Path) -> Option<(String, Vec<u8>)> {
    let text = String::from_utf8(files::read(&dir.join(FILE)).ok()??).ok()?;
    let [block] = <[_; 1]>::try_from(pem::blocks(&text)?).ok()?;
    let der = block.der;
    Some((text, der))
}

/// An entry (RFC 5280, 5.1.2.6). One that a clock which was ahead has dated is dated now: some
/// relying parties take a revocation of the future for none.
fn der_of((serial, revoked_at): &(Serial, u64), made_at: u64) -> Vec<u8> {
    let date = der::time(*revoked_at.min(&made_at));
    der::tlv(0x30, &[der::tlv(0x02, serial.der()), date].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::openssl::{must, run};
    use crate::clock;
    use crate::files::test_dir::TestDir;

    #[test]
    fn openssl_reads_the_list() {
        let dir = TestDir::new();
        let now = clock::now();
        let issuer = Issuer::make(&dir, 10, 90, now).unwrap();
        assert_eq!(last_number(&dir), 0);
        let empty = Crl::sign(&issuer, &[], 0, now).unwrap();
        empty.write(&dir).unwrap();
        let text = must(&dir, "crl -in crl.pem -CAfile root-ca.crt -noout -text");
        assert!(text.contains("verify OK") && text.contains("No Revoked Certificates"), "{text}");
        assert!(text.contains("Version 2") && text.contains("Authority Key Identifier"), "{text}");
        assert_eq!((empty.number, last_number(&dir)), (now.unix_s(), now.unix_s()));

        let serial = Serial::random().unwrap();
        let list = Crl::sign(&issuer, &[(serial, 1_700_000_000)], empty.number, now).unwrap();
        list.write(&dir).unwrap();
        assert_eq!((list.number, last_number(&dir)), (now.unix_s() + 1, now.unix_s() + 1));
        let text = must(&dir, "crl -in crl.pem -CAfile root-ca.crt -noout -text");
        assert!(text.contains(&format!("Serial Number: {serial:X}\n")), "{text}");
        assert!(text.contains("Revocation Date: Nov 14 22:13:20 2023 GMT"), "{text}");
        assert!(text.contains("verify OK"), "{text}");

        let at = |s: u64| Now { unix_ms: s * 1000, mono_ms: 0 };
        let revoked = [(serial, 1_700_000_000)];
        let found = |revoked: &[_], at| current(&dir, &issuer, revoked, at);
        assert_eq!(found(&revoked, now), Some(list.clone()));
        assert_eq!(found(&revoked, at(now.unix_s() + 86_400)), None, "it is due");
        assert_eq!(found(&[], now), None);
        assert_eq!(found(&[(serial, 1_700_000_001)], now), None);
        assert_eq!(found(&[revoked[0], (Serial::random().unwrap(), 1)], now), None);
        let other = TestDir::new();
        let other = Issuer::make(&other, 10, 90, now).unwrap();
        assert_eq!(current(&dir, &other, &revoked, now), None, "signed by another CA");
        let is_due = [86_399, 86_400].map(|s| list.is_due(at(now.unix_s() + s)));
        assert_eq!(is_due, [false, true]);
        assert!(list.is_due(at(now.unix_s() - 1)));
        assert!(matches!(Crl::sign(&issuer, &[], 0, at(0)), Err(CaError::ClockNotSet)));
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
            let revoked = [(Serial::from_hex(hex).unwrap(), now.unix_s())];
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
        let revoked = [(serials[0], now.unix_s() + 7200), (serials[1], 1)];
        let list = Crl::sign(&issuer, &revoked, 0, now).unwrap();
        list.write(&dir).unwrap();
        let dates = listed(&dir, &issuer);
        assert_eq!(serials.map(|s| dates.get(&s).copied()), [Some(now.unix_s()), Some(1)]);
        assert_eq!(current(&dir, &issuer, &revoked, now), Some(list));
    }
}
