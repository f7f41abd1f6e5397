//! Who a TLS client is, by the certificate that it showed.
//!
//! The edge has seen that the client holds the certificate's key, and nothing else. Whether the
//! certificate means anything is judged here, so that each refusal has a name.

use x509_parser::asn1_rs::FromDer as _;
use x509_parser::certificate::X509Certificate;

use super::Ca;
use super::record::Certificate;
use crate::clock::{DAY_S, Now};
use crate::problem::{Code, Problem};
use crate::serial::Serial;

/// Why the client is nobody: it was not issued to a device by this CA.
pub fn not_ours(why: &str) -> Problem {
    Problem::from(Code::ClientCertificateInvalid).log(format!("client certificate: {why}"))
}

/// The same, if it is revoked.
pub fn revoked() -> Problem {
    Problem::from(Code::ClientCertificateRevoked).log("client certificate is revoked")
}

impl Ca {
    /// The record of the certificate that a client showed, if it is one of ours. Only then can be known
    /// whether it [counts](Ca::still_counts).
    pub fn identify(&self, der: &[u8]) -> Result<Certificate, Problem> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| not_ours("cannot be read"))?;
        let issuer = self.issuer().ok_or_else(|| not_ours("there is no CA yet"))?;
        if !rest.is_empty() || !issuer.has_signed(&certificate) {
            return Err(not_ours("signed by another CA"));
        }
        let serial = Serial::from_der(certificate.raw_serial())
            .ok_or_else(|| not_ours("its serial is too long"))?;
        let known = self.record().by_serial(&serial);
        known.ok_or_else(|| not_ours(&format!("{serial} is not in the record of devices")))
    }

    /// Whether a certificate in the record may be renewed now, if it has not ended more than `late_days`
    /// ago. Not if it or the device's newest is revoked, which is for good: an older one must be no way
    /// around a revocation.
    pub fn still_counts(
        &self,
        certificate: &Certificate,
        late_days: u32,
        now: Now,
    ) -> Result<(), Problem> {
        let newest = self.record().newest(&certificate.device);
        if newest.as_ref().is_none_or(|newest| newest.revoked_at.is_some())
            || certificate.revoked_at.is_some()
        {
            return Err(revoked());
        }
        let last = certificate.expires_at.saturating_add(u64::from(late_days) * DAY_S);
        let expired = Problem::from(Code::ClientCertificateExpired);
        if now.unix_s() > last {
            Err(expired.log("client certificate has expired"))
        } else {
            Ok(())
        }
    }
}
