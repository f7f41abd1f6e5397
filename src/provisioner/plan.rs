//! Planning: all that can be refused without the store.

use std::net::IpAddr;

use super::again::{Again, Paid};
use super::batch::Planned;
use super::{
    By, Changed, Grant, Issue, Job, Onboarding, Provisioner, Redeem, Redemption, Revoke, RevokeOne,
    Rewrite, Sign, Work, not_issued, refused,
};
use crate::ca::csr::Csr;
use crate::ca::record::{Certificate, Reason};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::devices::Row;
use crate::devices::enrol::{Edit, Shown};
use crate::jwt::{Claims, Token};
use crate::problem::{Code, Problem};
use crate::serial::Serial;

impl Provisioner {
    /// Plans a new token for a device. It may be refused by what this instance knows and no other can
    /// know better.
    pub fn plan_issue(&self, asked: Onboarding, now: Now) -> Result<Job, Problem> {
        self.issuer(now)?;
        let Onboarding { device, shown, client, csr, .. } = &asked;
        let row = self.devices.row(device);
        let paid = Paid::Secret(*shown);
        let again = |csr| Again { device: device.clone(), csr, paid, client: *client };
        let again = csr.clone().map(again).map(Box::new);
        let look = match self.judge(&asked, &row, now) {
            // A registration of which only others know asks for the secret, or excuses.
            Ok(()) => {
                Ok(matches!(shown, Shown::Secret(_)) && !row.has_shown_secret(shown, now.unix_s()))
            }
            Err(
                Code::SecretInvalid | Code::DeviceNotRegistered | Code::DeviceHasActiveCertificate,
            ) if !self.sharing.is_alone() => Ok(true),
            Err(code) => Err(not_issued(code, device)),
        };
        let work = look.map(|look| Work::Issue(Box::new(Issue { asked, row, look })));
        Ok(Job { work, again })
    }

    /// A token of now, or of the second after the device's past.
    pub(super) fn token(&self, device_id: DeviceId, now: Now) -> Result<Token, Problem> {
        let mut jti = [0; 16];
        getrandom::fill(&mut jti).map_err(|e| Problem::from(Code::ServiceUnavailable).log(e))?;
        let dead_until = self.devices.bound(&device_id).0.t;
        let iat = now.unix_s().max(dead_until.saturating_add(1));
        let exp = iat.saturating_add(self.rules.token_ttl_s);
        Ok(self.signer.sign(Claims { device_id, iat, exp, jti: Some(jti) }))
    }

    /// Checks a token as far as it says itself: signature, type, expiry.
    pub fn check_token(&self, compact: &str, now: Now) -> Result<Token, Problem> {
        let token = self.read_token(compact, now)?;
        match token.claims.exp > now.unix_s() {
            true => Ok(token),
            false => Err(refused(Code::TokenExpired, &token.hash, &token.claims.device_id)),
        }
    }

    /// The same of a token that may have ended, for who may be given a certificate again.
    pub fn read_token(&self, compact: &str, now: Now) -> Result<Token, Problem> {
        self.ca().check_clock(now)?;
        Ok(self.signer.verify(compact, 0)?)
    }

    /// Plans the redemption of a token whose signature was checked. It is refused if this instance knows
    /// already that the token has ended or is spent, or the device has a certificate.
    pub fn plan_redeem(
        &self,
        token: Token,
        asked: Redemption<'_>,
        now: Now,
    ) -> Result<Job, Problem> {
        let Redemption { csr, device, user_id, client, again } = asked;
        let owner = &token.claims.device_id;
        let csr = Csr::parse(csr).map_err(|error| refused(error, &token.hash, owner))?;
        if device.is_some_and(|device| device.trim() != owner.as_str()) {
            return Err(refused(Code::TokenDeviceMismatch, &token.hash, owner));
        }
        csr.belongs_to(owner).map_err(|error| refused(error, &token.hash, owner))?;
        self.issuer(now)?;
        let row = self.devices.row(owner);
        let (device, paid) = (owner.clone(), Paid::Token(token.hash));
        let again = again.then(|| Box::new(Again { device, csr: csr.clone(), paid, client }));
        let looked = self.look(&token, &row, now).map_err(|code| refused(code, &token.hash, owner));
        let work = looked.and_then(|()| {
            let redeem = Redeem { token, user_id, row, spends: None };
            sign(Grant::Token(Box::new(redeem)), csr, client)
        });
        Ok(Job { work, again })
    }

    /// A token that this instance knows as spent is refused before an active certificate, which is
    /// most likely its own.
    fn look(&self, token: &Token, row: &Row, now: Now) -> Result<(), Code> {
        if row.block.stands() {
            return Err(Code::DeviceBlocked);
        }
        if token.claims.exp <= now.unix_s() {
            return Err(Code::TokenExpired);
        }
        let record = self.ca().record();
        let (is_recorded, has_active) = record.look(&token.hash, &token.claims.device_id, now);
        if is_recorded || self.ledger.knows_as_spent(&token.hash) || self.is_dead(token) {
            return Err(Code::TokenAlreadyUsed);
        }
        let excused = self.rules.reenroll || row.living(now.unix_s()).is_some();
        if has_active && !excused {
            return Err(Code::DeviceHasActiveCertificate);
        }
        Ok(())
    }

    /// Checks the certificate that a client has shown.
    pub fn check_certificate(&self, der: Option<&[u8]>, now: Now) -> Result<Certificate, Problem> {
        let der = der.ok_or(Code::ClientCertificateRequired)?;
        self.issuer(now)?;
        let shown = self.ca().identify(der)?;
        let counts = self.ca().still_counts(&shown, self.rules.renew_after_expiry_days, now);
        let counts = counts.and_then(|()| Ok(self.check_block(&shown.device)?));
        counts.map_err(|problem| not_issued(problem, &shown.device))?;
        self.publisher.is_shown(&shown.serial);
        Ok(shown)
    }

    /// A device that is blocked here gets nothing.
    pub(super) fn check_block(&self, device: &DeviceId) -> Result<(), Code> {
        match self.devices.bound(device).1.stands() {
            true => Err(Code::DeviceBlocked),
            false => Ok(()),
        }
    }

    /// Plans the renewal of the checked certificate `old` for the key in `csr`.
    pub fn plan_renew(&self, old: Certificate, csr: &str, client: IpAddr) -> Result<Job, Problem> {
        let csr = Csr::parse(csr).map_err(|error| not_issued(error, &old.device))?;
        csr.belongs_to(&old.device).map_err(|error| not_issued(error, &old.device))?;
        sign(Grant::Certificate(old), csr, client).map(Job::from)
    }
}

/// What needs the clock, since it has a date: that is checked before it is done.
impl Job {
    /// Revokes what the device has, and blocks it if so wanted.
    pub fn revoke(device: DeviceId, block: bool, reason: Reason, by: By) -> Job {
        let edit = block.then(|| Edit { blocked: Some(true), ..Edit::default() });
        Work::Revoke(Revoke { device, reason, edit, by }).into()
    }

    /// Revokes one certificate of the device, or the server, of this name.
    pub fn revoke_one(of: String, serial: Serial, reason: Reason, by: By) -> Job {
        Work::RevokeOne(RevokeOne { of, serial, reason, by }).into()
    }

    pub fn rewrite(changes: Vec<Changed>, by: By) -> Job {
        Work::Rewrite(Rewrite { changes, by }).into()
    }
}

pub(super) fn sign(grant: Grant, csr: Csr, client: IpAddr) -> Planned {
    let serial = Serial::random();
    let serial = serial.map_err(|e| Problem::from(Code::ServiceUnavailable).log(e))?;
    Ok(Work::Sign(Box::new(Sign { grant, csr, serial, client })))
}
