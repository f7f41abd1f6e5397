//! Revoking one certificate: a device's, whose others go on to count, or a server's, which no other
//! way of revoking finds.

use super::{By, Provisioner};
use crate::ca::record::Reason;
use crate::clock::Now;
use crate::problem::{Code, Problem};
use crate::serial::Serial;

impl Provisioner {
    /// Revokes the certificate of this serial number if it is of the device, or the server, of this
    /// name. It is on disk and in the list when it returns. Returns whether every other instance is told.
    ///
    /// # Errors
    /// When there is none, Redis cannot be asked for one that is unknown here, or it could not be written.
    pub fn revoke_one(
        &self,
        of: &str,
        serial: &Serial,
        reason: Reason,
        by: &By,
        now: Now,
    ) -> Result<bool, Problem> {
        self.ca().check_clock(now)?;
        let record = self.ca().record();
        if !self.is_of(serial, of) {
            let is_asked = record.by_serial(serial).is_some() || self.sharing.look_up_one(*serial);
            if !is_asked && self.store.status().redis_enabled {
                let why = "whether another instance has it is not known now";
                return Err(Problem::from(Code::ServiceUnavailable).log(why));
            }
            if !self.is_of(serial, of) {
                return Err(Code::CertificateNotFound.into());
            }
        }
        for serial in record.revoke_these(&[*serial], reason, now)? {
            self.metrics.certificates_revoked.add(1);
            log::info!("certificate {serial} of {of} revoked: {reason}, {by}");
        }
        let text = "Revoked, but the CRL could not be published yet";
        self.publisher.publish(now).map_err(|error| Problem::from(error).text(text))?;
        let is_told = || self.sharing(now).shared && self.sharing.look_up(&[]);
        Ok(!self.store.status().redis_enabled || is_told())
    }

    /// Whether the certificate is of this device, or server.
    fn is_of(&self, serial: &Serial, of: &str) -> bool {
        let record = self.ca().record();
        record.by_serial(serial).is_some_and(|found| found.device.as_str() == of)
            || record.is_of_server(serial, of)
    }
}
