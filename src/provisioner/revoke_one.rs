//! Revoking one certificate: a device's, whose others go on to count, or a server's, which no other
//! way of revoking finds.

use std::net::IpAddr;

use super::Provisioner;
use crate::ca::record::Reason;
use crate::clock::Now;
use crate::problem::{Code, Problem};
use crate::serial::Serial;

impl Provisioner {
    /// Revokes the certificate of this serial number if it is of the device, or the server, of this
    /// name. It is on disk and in the list when it returns. Returns whether every other instance is told.
    ///
    /// # Errors
    /// When there is none, or it could not be written.
    pub fn revoke_one(
        &self,
        of: &str,
        serial: &Serial,
        reason: Reason,
        client: IpAddr,
        now: Now,
    ) -> Result<bool, Problem> {
        self.ca().check_clock(now)?;
        let record = self.ca().record();
        let is_devices = record.by_serial(serial).is_some_and(|c| c.device.as_str() == of);
        if !is_devices && !record.is_of_server(serial, of) {
            return Err(Code::CertificateNotFound.into());
        }
        for serial in record.revoke_these(&[*serial], reason, now)? {
            self.metrics.certificates_revoked.add(1);
            log::info!("certificate {serial} of {of} revoked: {reason}, by {client}");
        }
        let text = "Revoked, but the CRL could not be published yet";
        self.publisher.publish(now).map_err(|error| Problem::from(error).text(text))?;
        let is_told = || self.sharing(now).shared && self.sharing.look_up(&[]);
        Ok(!self.store.status().redis_enabled || is_told())
    }
}
