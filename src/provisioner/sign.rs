//! What a batch signs: under the record's lock each certificate is checked, signed and entered, one
//! after the other, then all are made durable at once.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::batch::{Step, unexpected};
use super::{Done, Grant, Provisioner, Redeem, Sign, not_issued, refused};
use crate::ca::identity;
use crate::ca::issuer::Leaf;
use crate::ca::record::{Certificate, Entries, Origin, RecordError, Redeemed, Spent};
use crate::clock::{self, Now};
use crate::config::Enrolment;
use crate::device::DeviceId;
use crate::devices::Row;
use crate::devices::enrol::Stage;
use crate::jwt::Token;
use crate::locks::locked;
use crate::problem::{Code, Problem};
use crate::serial::Serial;
use crate::store::{Answer, Op, Outcome};

impl Provisioner {
    /// Signs and records what is granted. The record is locked only if there is any. Returns also what
    /// the store is told after the answers.
    pub(super) fn record(
        &self,
        steps: Vec<Step>,
        undo: &mut Vec<Op>,
        now: Now,
    ) -> (Vec<Result<Done, Problem>>, Vec<Op>) {
        let is_granted = steps.iter().any(|step| matches!(step, Step::Granted(_)));
        let mut entries = is_granted.then(|| self.ca().record().begin());
        let enter = |step| match (step, &mut entries) {
            (Step::Granted(sign), Some(entries)) => self.enter(sign, entries, undo, now),
            (step, _) => step,
        };
        let steps: Vec<Step> = steps.into_iter().map(enter).collect();
        let mut used = Vec::new();
        let mut committed = entries.map(Entries::commit).unwrap_or_default().into_iter();
        let end = |step| match step {
            Step::Done(done) => done,
            // Unreachable: all that was to be asked has been.
            Step::Next(_) => Err(Code::InternalError.into()),
            // Unreachable: every granted one was entered or refused above.
            Step::Granted(sign) => Err(sign.refused(Code::InternalError.into())),
            Step::Entered(sign, leaf) => {
                let result = committed.next().unwrap_or_else(|| Err(not_committed()));
                self.recorded(*sign, leaf, result, undo, &mut used)
            }
        };
        let done = steps.into_iter().map(end).collect();
        (done, self.enter_spent(used, now))
    }

    fn enter(
        &self,
        mut sign: Box<Sign>,
        entries: &mut Entries<'_>,
        undo: &mut Vec<Op>,
        now: Now,
    ) -> Step {
        match self.sign(&mut sign, entries, now) {
            // It was signed before, for an earlier request.
            Ok(leaf) if leaf.serial != sign.serial => Step::Done(Ok(Done::Signed(leaf))),
            Ok(leaf) => {
                entries.add(&leaf, Some(sign.origin()), now);
                Step::Entered(sign, leaf)
            }
            Err(problem) => {
                // A mark without a certificate is good for nothing, a bound's refusal included. One whose
                // token has a certificate, from this attempt or another, stays.
                let withdraws = |token: &Token| !entries.knows_token(&token.hash);
                Step::Done(Err(self.not_signed(&sign, problem, withdraws, undo)))
            }
        }
    }

    /// The last look, then the signature. A panic in it costs this request alone.
    fn sign(&self, sign: &mut Sign, entries: &Entries<'_>, now: Now) -> Result<Box<Leaf>, Problem> {
        let days = match &mut sign.grant {
            Grant::Token(redeem) => {
                self.look_again(redeem, entries, now)?;
                redeem.row.living(now.unix_s()).and_then(|terms| terms.cert_days)
            }
            Grant::Certificate(old) => {
                self.check_block(&old.device)?;
                self.judge_again(old, now)?;
                if let Some(leaf) = entries.judge_renewal(old, sign.csr.key(), now)? {
                    let Certificate { serial: old, device, .. } = old;
                    let (serial, client) = (leaf.serial, sign.client);
                    log::info!(
                        event = "certificate_given_again", device:%, serial:%, client:%;
                        "certificate {serial} of {device} given again in renewal of {old}, by {client}"
                    );
                    self.issuer(now)?;
                    return Ok(Box::new(leaf));
                }
                None
            }
        };
        let issuer = self.issuer(now)?;
        let Sign { csr, serial, .. } = sign;
        let device = sign.grant.device();
        let sign = || issuer.sign(csr, device, *serial, days, now);
        let leaf = catch_unwind(AssertUnwindSafe(sign))
            .map_err(|_| Problem::from(Code::InternalError).log("signing panicked"))??;
        Ok(Box::new(leaf))
    }

    /// Notes what the redemption uses up: nobody else may use it until that is known, or not so.
    fn look_again(&self, redeem: &mut Redeem, entries: &Entries<'_>, now: Now) -> Result<(), Code> {
        if !is_in_time(now, clock::now()) {
            return Err(Code::ServiceUnavailable);
        }
        let token = &redeem.token;
        let killed = self.ledger.knows_as_killed(&token.hash) || self.is_dead(token);
        if killed || entries.knows_token(&token.hash) {
            return Err(Code::TokenAlreadyUsed);
        }
        let device = &token.claims.device_id;
        self.check_block(device)?;
        redeem.row = std::mem::take(&mut redeem.row).merge(self.devices.row(device));
        redeem.spends = redeem.row.spend(now.unix_s());
        if redeem.spends.is_none() {
            // Only registered devices enrol: a token is worth nothing once the registration is used.
            let is_closed = self.rules.enrolment == Some(Enrolment::Registered);
            if is_closed && redeem.row.stage(now.unix_s()) == Stage::Spent {
                return Err(Code::TokenAlreadyUsed);
            }
            if !self.rules.reenroll && entries.has_active(device, now) {
                return Err(Code::DeviceHasActiveCertificate);
            }
        } else if !self.begin_spending(device, now) {
            redeem.spends = None;
            return Err(Code::ServiceUnavailable);
        }
        Ok(())
    }

    /// Whether nobody else uses the registration. What could not be written of an earlier one is tried
    /// again.
    fn begin_spending(&self, device: &DeviceId, now: Now) -> bool {
        let mut spending = locked(&self.spending);
        let Some(begun) = spending.get(device) else {
            spending.insert(device.clone(), None);
            return true;
        };
        let unwritten = begun.clone().map(|row| vec![(device.clone(), row)]);
        if unwritten.is_some_and(|rows| self.devices.enter(rows, true, now).is_ok()) {
            spending.remove(device);
        }
        false
    }

    /// It may have been revoked since it was shown; not any more while the record is locked.
    fn judge_again(&self, shown: &Certificate, now: Now) -> Result<(), Problem> {
        let old = self.ca().record().by_serial(&shown.serial);
        let old = old.ok_or_else(|| identity::not_ours("gone from the record"))?;
        self.ca().still_counts(&old, self.rules.renew_after_expiry_days, now)?;
        // The bound of a revocation may have been raised whose turn for the record is still to come.
        let bound = self.devices.bound(&old.device).0.c;
        let is_dead = bound > 0 && self.ca().record().paid(&old.serial) <= bound;
        if is_dead { Err(identity::revoked()) } else { Ok(()) }
    }
    fn recorded(
        &self,
        sign: Sign,
        leaf: Box<Leaf>,
        result: Result<(), RecordError>,
        undo: &mut Vec<Op>,
        used: &mut Vec<(Redeem, Serial)>,
    ) -> Result<Done, Problem> {
        let Leaf { device, serial, .. } = &*leaf;
        if let Err(error) = result {
            let withdraws = !error.left_behind();
            let problem = Problem::from(error);
            log::error!(device:%, serial:%; "certificate {serial} could not be recorded: {problem}");
            return Err(self.not_signed(&sign, problem, |_| withdraws, undo));
        }
        let client = sign.client;
        match sign.grant {
            Grant::Token(redeem) => {
                self.redeemed(&redeem, *serial, client);
                used.push((*redeem, *serial));
            }
            Grant::Certificate(old) => {
                let old = old.serial;
                log::info!(
                    event = "certificate_renewed", device:%, serial:%, client:%;
                    "certificate {serial} signed for {device}, in renewal of {old}, by {client}"
                );
                self.metrics.certificates_renewed.add(1);
                if self.rules.renew_revokes {
                    self.publisher.supersede(old, *serial, clock::now());
                }
            }
        }
        Ok(Done::Signed(leaf))
    }

    fn redeemed(&self, redeem: &Redeem, serial: Serial, client: IpAddr) {
        let Redeem { token, user_id, spends, .. } = redeem;
        let (device, short) = (&token.claims.device_id, token.hash.short());
        let user = user_id.as_ref().map(|user| format!(", user {user:?}")).unwrap_or_default();
        log::info!(
            event = "certificate_signed", device:%, serial:%, client:%;
            "certificate {serial} signed for {device}, token {short} consumed, by {client}{user}"
        );
        self.metrics.tokens_consumed.add(1);
        self.metrics.certificates_issued.add(1);
        if spends.is_some() {
            // Who has enrolled again by a registration needs the older ones no more.
            let older = self.ca().record().older(&serial);
            older.into_iter().for_each(|old| self.publisher.supersede(old, serial, clock::now()));
        }
    }

    /// The registrations that were used are used up here before anybody is answered, and in Redis
    /// before the devices' leases are free.
    fn enter_spent(&self, used: Vec<(Redeem, Serial)>, now: Now) -> Vec<Op> {
        let mut after = Vec::new();
        let spends =
            |used: &Redeem| Some((used.token.claims.device_id.clone(), used.spends.clone()?));
        let spent: Vec<(DeviceId, Row)> =
            used.iter().filter_map(|(redeem, _)| spends(redeem)).collect();
        let entered = self.devices.enter(spent.clone(), true, now);
        if let Err(error) = &entered {
            log::error!("registrations that were used are not marked so on disk: {error}");
        }
        for (device, row) in spent {
            match entered {
                Ok(()) => locked(&self.spending).remove(&device),
                Err(_) => locked(&self.spending).insert(device, Some(row)),
            };
        }
        for (Redeem { token, spends, .. }, serial) in used {
            let device = token.claims.device_id.clone();
            // Where others are told of the record, they are told of the row before the lease goes, if
            // that is on disk.
            let token = self.sharing.free_when_shared(serial, token);
            let told_here = spends.filter(|_| token.is_some() || entered.is_err());
            after.extend(told_here.map(|row| Op::Tell(device, row)));
            after.extend(token.map(Op::Remove));
        }
        after
    }

    /// At the start: what the process that ran before has recorded and not brought to its end. A token
    /// of a device that was issued after its registration was begun has used that up.
    pub fn make_up(&self, now: Now) {
        let mut rows = BTreeMap::new();
        for Spent { token, device, .. } in self.ca().record().spent_tokens() {
            let row = self.devices.row(&device);
            // Beginning a registration kills all that was before it.
            if token.iat > row.bound.t {
                rows.extend(row.spend(now.unix_s()).map(|row| (device, row)));
            }
        }
        if let Err(error) = self.devices.enter(rows.into_iter().collect(), true, now) {
            log::error!("registrations that were used are not marked so on disk: {error}");
        }
    }

    /// What was refused: the token's mark is withdrawn where it is good for nothing, and what the
    /// redemption would have used up is free.
    fn not_signed(
        &self,
        sign: &Sign,
        problem: Problem,
        withdraws: impl Fn(&Token) -> bool,
        undo: &mut Vec<Op>,
    ) -> Problem {
        if let Grant::Token(redeem) = &sign.grant {
            let token = &redeem.token;
            if withdraws(token) {
                undo.push(Op::GiveBack(token.clone(), sign.serial));
            }
            if redeem.spends.is_some() {
                locked(&self.spending).remove(&token.claims.device_id);
            }
        }
        sign.refused(problem)
    }
}

impl Grant {
    fn device(&self) -> &DeviceId {
        match self {
            Grant::Token(redeem) => &redeem.token.claims.device_id,
            Grant::Certificate(old) => &old.device,
        }
    }
}

impl Sign {
    /// Reads what the store says of a token: whether this attempt may sign for it.
    pub(super) fn is_granted(&mut self, answer: impl FnOnce() -> Answer) -> Result<(), Problem> {
        let Grant::Token(redeem) = &mut self.grant else { return Ok(()) };
        Err(match answer() {
            Ok(Outcome::Granted(row)) => {
                redeem.row = std::mem::take(&mut redeem.row).merge(*row);
                return Ok(());
            }
            Ok(Outcome::Blocked) => Code::DeviceBlocked.into(),
            Ok(Outcome::AlreadyUsed) => Code::TokenAlreadyUsed.into(),
            Ok(Outcome::Unknown { .. }) => Code::TokenNotFound.into(),
            other => unexpected(other),
        })
    }

    /// What the record will name.
    fn origin(&self) -> Origin {
        match &self.grant {
            Grant::Token(redeem) => {
                let Token { hash, claims, .. } = &redeem.token;
                let token = Redeemed { hash: *hash, iat: claims.iat, exp: claims.exp };
                match redeem.spends {
                    Some(_) => Origin::Registration(token),
                    None => Origin::Token(token),
                }
            }
            Grant::Certificate(old) => Origin::Renewal { old: old.serial, paid: None },
        }
    }

    /// For the log: who was refused.
    pub(super) fn refused(&self, problem: Problem) -> Problem {
        match &self.grant {
            Grant::Token(redeem) => refused(problem, &redeem.token.hash, self.grant.device()),
            Grant::Certificate(old) => not_issued(problem, &old.device),
        }
    }
}

/// Whether a mark that was sent at `sent` or later is still taken for that of an attempt under way:
/// whoever replaces the token waits for one that is younger than 30 s (`docs/model`, row 28c).
fn is_in_time(sent: Now, now: Now) -> bool {
    const MS: u64 = 25_000;
    now.mono_ms.saturating_sub(sent.mono_ms) < MS
}

fn not_committed() -> RecordError {
    RecordError::NotWritten { why: "no result".to_owned(), left_behind: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_that_is_old_is_not_signed_for() {
        let at = |s: u64| Now { unix_ms: 0, mono_ms: s * 1000 };
        for (sent, now, in_time) in [(5, 5, true), (5, 29, true), (5, 30, false), (5, 4, true)] {
            assert_eq!(is_in_time(at(sent), at(now)), in_time, "{sent} {now}");
        }
    }
}
