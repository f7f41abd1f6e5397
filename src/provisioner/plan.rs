//! Planning: all that can be refused without the store.

use std::net::IpAddr;

use super::{Issue, Job, Provisioner, Redeem, Renew, Revoke, not_issued, refused};
use crate::ca::csr::Csr;
use crate::ca::record::Certificate;
use crate::clock::Now;
use crate::config::Reenroll;
use crate::device::DeviceId;
use crate::jwt::{Claims, Token, TokenHash};
use crate::problem::{Code, Problem};
use crate::serial::Serial;

impl Provisioner {
    /// Plans a new token for `device`; with `replace` in place of the one that it may have.
    ///
    /// # Errors
    /// When the clock is not set, the CA cannot sign, or the device has an active certificate.
    pub fn plan_issue(
        &self,
        device: DeviceId,
        replace: bool,
        client: IpAddr,
        now: Now,
    ) -> Result<Job, Problem> {
        self.issuer(now)?;
        if self.rules.reenroll == Reenroll::Deny && self.ca().record().has_active(&device, now) {
            return Err(not_issued(Code::DeviceHasActiveCertificate, &device));
        }
        let mut jti = [0; 16];
        getrandom::fill(&mut jti).map_err(|e| Problem::from(Code::ServiceUnavailable).log(e))?;
        Ok(Job::Issue(Issue { device, jti, replaces: replace, client }))
    }

    /// A token of now, or of the second after the device's past.
    pub(super) fn token(&self, device_id: DeviceId, jti: [u8; 16], now: Now) -> Token {
        let dead_until = self.devices.bound(&device_id).0.t;
        let iat = now.unix_s().max(dead_until.saturating_add(1));
        let exp = iat.saturating_add(self.rules.token_ttl_s);
        self.signer.sign(Claims { device_id, iat, exp, jti: Some(jti) })
    }

    /// Checks a token as far as it says itself: signature, type, expiry.
    ///
    /// # Errors
    /// The first of these that fails.
    pub fn check_token(&self, compact: &str, now: Now) -> Result<Token, Problem> {
        self.ca().check_clock(now)?;
        self.signer.verify(compact, now.unix_s()).map_err(|error| {
            // Of a token that has merely expired, the log may say whose it was.
            let claims = self.signer.verify_signature(compact).ok();
            match claims {
                Some(claims) => refused(error, &TokenHash::of(compact), &claims.device_id),
                None => error.into(),
            }
        })
    }

    /// Plans the redemption of a checked token for the key in `csr`. `device` is the device id that
    /// the request names, if it names one.
    ///
    /// # Errors
    /// When the CSR is refused, is not the token's device's, or this instance knows already that
    /// the token is spent or the device has a certificate.
    pub fn plan_redeem(
        &self,
        token: Token,
        csr: &str,
        device: Option<&str>,
        user_id: Option<String>,
        client: IpAddr,
        now: Now,
    ) -> Result<Job, Problem> {
        let owner = &token.claims.device_id;
        let csr = Csr::parse(csr).map_err(|error| refused(error, &token.hash, owner))?;
        if device.is_some_and(|device| device.trim() != owner.as_str()) {
            return Err(refused(Code::TokenDeviceMismatch, &token.hash, owner));
        }
        csr.belongs_to(owner).map_err(|error| refused(error, &token.hash, owner))?;
        self.issuer(now)?;
        self.look(&token, now).map_err(|code| refused(code, &token.hash, owner))?;
        let serial = Serial::random();
        let serial = serial.map_err(|e| Problem::from(Code::ServiceUnavailable).log(e))?;
        Ok(Job::Redeem(Box::new(Redeem { token, csr, serial, user_id, client })))
    }

    /// A token that this instance knows as spent is refused before an active certificate, which is
    /// most likely its own.
    fn look(&self, token: &Token, now: Now) -> Result<(), Code> {
        let look = self.ca().record().look(&token.hash, &token.claims.device_id, now);
        if look.recorded_token || self.ledger.knows_as_spent(&token.hash) || self.is_dead(token) {
            return Err(Code::TokenAlreadyUsed);
        }
        if self.rules.reenroll == Reenroll::Deny && look.active_certificate {
            return Err(Code::DeviceHasActiveCertificate);
        }
        Ok(())
    }

    /// Checks the certificate that a client has shown.
    ///
    /// # Errors
    /// When there is none, it is not one of ours, or it no longer counts.
    pub fn check_certificate(&self, der: Option<&[u8]>, now: Now) -> Result<Certificate, Problem> {
        let der = der.ok_or(Code::ClientCertificateRequired)?;
        self.issuer(now)?;
        let shown = self.ca().identify(der, self.rules.renew_after_expiry_days, now)?;
        self.publisher.is_shown(&shown.serial);
        Ok(shown)
    }

    /// Plans the renewal of the checked certificate `old` for the key in `csr`.
    ///
    /// # Errors
    /// When the CSR is refused or is not the device's.
    pub fn plan_renew(&self, old: Certificate, csr: &str, client: IpAddr) -> Result<Job, Problem> {
        let csr = Csr::parse(csr).map_err(|error| not_issued(error, &old.device))?;
        csr.belongs_to(&old.device).map_err(|error| not_issued(error, &old.device))?;
        let serial = Serial::random();
        let serial = serial.map_err(|e| Problem::from(Code::ServiceUnavailable).log(e))?;
        Ok(Job::Renew(Box::new(Renew { old, csr, serial, client })))
    }

    /// Plans the revocation of what `device` has.
    ///
    /// # Errors
    /// When the clock is not set: a revocation has a date.
    pub fn plan_revoke(&self, device: DeviceId, client: IpAddr, now: Now) -> Result<Job, Problem> {
        self.ca().check_clock(now)?;
        Ok(Job::Revoke(Revoke { device, client }))
    }
}
