//! Running a batch of jobs, in fixed phases: [`super::prepare`] → the store, first round → under the record's lock: check,
//! sign and enter one after the other, then make all durable at once → if anything was revoked, one
//! new list → the store, second round: what must be given back before the answer. What can wait until
//! after the answer is returned as [`Batch::after`].

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{
    Batch, By, Change, Changed, Done, Issue, Job, Provisioner, Redeem, Renew, Revoke, Rewrite,
    Signed, no_certificate, not_issued, refused,
};
use crate::ca::identity::IdentityError;
use crate::ca::issuer::Leaf;
use crate::ca::record::{Entries, Origin, RecordError, Redeemed, Renewal, Spent};
use crate::clock::{self, Now};
use crate::device::DeviceId;
use crate::devices::enrol::{Edit, Stage};
use crate::devices::{CLOCKS_APART_S, Row, Terms};
use crate::jwt::Token;
use crate::problem::{Code, Problem};
use crate::serial::Serial;
use crate::store::{Answer, Found, Op, Outcome, StoreError};

impl Provisioner {
    /// Runs the jobs, each with its own outcome.
    pub fn run(&self, jobs: Vec<Job>, now: Now) -> Batch {
        let mut follow_up = FollowUp::default();
        let steps = self.ask(jobs, &mut follow_up, now).into_iter().map(|step| match step {
            Step::Again(issue) => {
                let steps = self.ask(vec![Job::Issue(issue)], &mut follow_up, now);
                steps.into_iter().next().unwrap_or(Step::Done(Err(Code::InternalError.into())))
            }
            step => step,
        });
        let steps = steps.collect();
        let mut done = self.record(steps, &mut follow_up, now);
        self.publish_revoked(&mut done, &follow_up);
        self.publisher.watch_record(clock::now());
        if !follow_up.give_back.is_empty() {
            self.store.run(&follow_up.give_back, clock::now());
        }
        Batch { done, after: follow_up.after }
    }

    /// Prepares the jobs and asks the store.
    fn ask(&self, jobs: Vec<Job>, follow_up: &mut FollowUp, now: Now) -> Vec<Step> {
        let mut ops = Vec::new();
        let mut asked = Vec::new();
        for prepared in self.prepare(jobs, now) {
            let before = ops.len();
            let job = prepared.map(|prepared| prepared.into_ops(self, now, &mut ops));
            asked.push((job, ops.len() - before));
        }
        let answers = if ops.is_empty() { Vec::new() } else { self.store.run(&ops, now) };
        let killed: Vec<DeviceId> = asked
            .iter()
            .flat_map(|(job, _)| job.as_ref().map(Job::kills))
            .flatten()
            .cloned()
            .collect();
        follow_up.shared = killed.is_empty() || self.share_kills(&killed);
        let mut answers = answers.into_iter();
        let decide = |(job, count)| match job {
            Ok(job) => self.decide(job, answers.by_ref().take(count).collect(), follow_up, now),
            Err(problem) => Step::Done(Err(problem)),
        };
        asked.into_iter().map(decide).collect()
    }

    /// Runs what could wait until after the answers: what others have to know of a device, before its
    /// lease is free.
    pub fn clean_up(&self, after: &[Op]) {
        let is_row = |op: &&Op| matches!(op, Op::Tell(..));
        let (rows, rest): (Vec<_>, Vec<_>) = after.iter().cloned().partition(|op| is_row(&op));
        for ops in [rows, rest].iter().filter(|ops| !ops.is_empty()) {
            self.store.run(ops, clock::now());
        }
    }

    /// Reads the store's answers; only what is to be signed has anything left to do.
    fn decide(&self, job: Job, answers: Vec<Answer>, follow_up: &mut FollowUp, now: Now) -> Step {
        let mut answers = answers.into_iter();
        let mut answer = || answers.next().unwrap_or(Err(StoreError::Undecided));
        match job {
            Job::Issue(issue) => self.issued(issue, answer(), &mut follow_up.give_back, now),
            Job::Redeem(redeem) => match granted(*redeem, answer()) {
                Ok(redeem) => Step::Granted(Grant::Token(Box::new(redeem))),
                Err(problem) => Step::Done(Err(problem)),
            },
            Job::Renew(renew) => Step::Granted(Grant::Certificate(renew)),
            Job::Revoke(revoke) => {
                Step::Done(self.revoked(revoke, answer(), follow_up.shared, follow_up))
            }
            Job::Rewrite(rewrite) => Step::Done(Ok(self.rewritten(rewrite, answers, now))),
            Job::Count => Step::Done(match answer() {
                Ok(Outcome::Counted(count)) => Ok(Done::Counted(count)),
                other => Err(unexpected(other)),
            }),
        }
    }

    fn issued(&self, issue: Issue, answer: Answer, give_back: &mut Vec<Op>, now: Now) -> Step {
        let Issue { device, client, .. } = &issue;
        let (token, killed, row) = match answer {
            Ok(Outcome::Issued { token, killed, found }) => {
                let Found { row, holder } = *found;
                if !self.knows_holder(device, holder) {
                    give_back.push(Op::TakeBack(token));
                    return Step::Done(Err(not_issued(Code::ServiceUnavailable, device)));
                }
                (token, killed, row)
            }
            // The device has lost its token, or somebody with its secret has it.
            Ok(Outcome::AlreadyActive { .. }) if issue.by_secret && !issue.replace => {
                return Step::Again(Issue { replace: true, ..issue });
            }
            other => return Step::Done(Err(not_issued(not_given(other, now), device))),
        };
        // The device may have redeemed another token between the first look and the claim, or others
        // know what this instance does not.
        let known = self.devices.row(device).merge(row.clone());
        if let Err(code) = issue.judge(&known, self, now) {
            give_back.push(Op::TakeBack(token));
            return Step::Done(Err(not_issued(code, device)));
        }
        self.learn(device, row, now);
        log::info!("token {} issued for {device}, to {client}", token.hash.short());
        self.metrics.tokens_issued.add(1);
        if let Some(old) = killed {
            self.metrics.tokens_killed.add(1);
            log::info!("token {} of {device} killed: replaced, by {client}", old.hash.short());
        }
        Step::Done(Ok(Done::Issued(token)))
    }

    /// Keeps a registration of which only others knew: this instance decides on the redemption, too.
    fn learn(&self, device: &DeviceId, row: Row, now: Now) {
        if row == Row::default() {
            return;
        }
        let news = Row { bound: Default::default(), ..row.news_for(&self.devices.row(device)) };
        if let Err(error) = self.devices.enter(vec![(device.clone(), news)], false, now) {
            log::error!("what Redis says of {device} was not kept: {error}");
        }
    }

    /// Tells the other instances of these kills, and learns of certificates that only they know. Where
    /// there is no Redis nobody is left to be told.
    fn share_kills(&self, devices: &[DeviceId]) -> bool {
        self.sharing.look_up(devices) || !self.store.status().redis_enabled
    }

    /// Another instance has signed for the device, which is not in the record yet: it is entered now.
    /// `false` if that is not done in time; where nothing is shared the holder does not count.
    fn knows_holder(&self, device: &DeviceId, holder: Option<Serial>) -> bool {
        let denies = !self.may_reenroll();
        let unknown = |serial: Serial| denies && self.ca().record().by_serial(&serial).is_none();
        !holder.is_some_and(unknown)
            || self.sharing.look_up(std::slice::from_ref(device))
            || !self.sharing(clock::now()).shared
    }

    fn revoked(
        &self,
        revoke: Revoke,
        answer: Answer,
        shared: bool,
        follow_up: &mut FollowUp,
    ) -> Result<Done, Problem> {
        let Revoke { device, reason, edit, by } = revoke;
        let (dead, shared) = match answer {
            Ok(Outcome::Killed { dead, told }) => (dead, shared && told),
            other => return Err(unexpected(other)),
        };
        let record = self.ca().record();
        // One whose certificate is recorded was used up; its keys were about to go.
        let dead = dead.filter(|dead| !record.knows_token(&dead.hash));
        if let Some(dead) = &dead {
            self.metrics.tokens_killed.add(1);
            log::info!("token {} of {device} killed, {by}", dead.hash.short());
        }
        // Dated as others date what the bound kills: of two dates the earlier counts, and of two reasons
        // of one date the one that says something.
        let bound_ms = self.devices.bound(&device).0.c.saturating_sub(CLOCKS_APART_S) * 1000;
        let now = clock::now();
        let now = Now { unix_ms: now.unix_ms.min(bound_ms), ..now };
        let serials = record.revoke(&device, reason, now)?;
        follow_up.revoked |= !serials.is_empty();
        self.metrics.certificates_revoked.add(serials.len() as u64);
        for serial in &serials {
            log::info!("certificate {serial} of {device} revoked, {by}");
        }
        if edit.is_some() {
            log::info!("device {device} blocked, {by}");
        }
        let is_listed = self.devices.row(&device).is_listed();
        if is_listed || self.ledger.knows_device(&device) || record.knows_device(&device) {
            return Ok(Done::Revoked { device, shared });
        }
        let status = self.store.status();
        if status.redis_enabled && !status.redis_serves {
            // If there is a token, it dies when Redis is back; whether there is, nobody knows.
            let why = format!("device {device}: its token is looked for when Redis is back");
            return Err(Problem::from(Code::ServiceUnavailable).log(why));
        }
        Err(no_certificate())
    }

    /// The rows are on disk; has Redis been told of all?
    fn rewritten(&self, rewrite: Rewrite, answers: impl Iterator<Item = Answer>, now: Now) -> Done {
        let Rewrite { changes, by } = rewrite;
        let mut shared = true;
        for answer in answers {
            match answer {
                Ok(Outcome::Killed { dead, told }) => {
                    shared &= told;
                    self.metrics.tokens_killed.add(u64::from(dead.is_some()));
                }
                // It is tried again by itself.
                _ => shared = false,
            }
        }
        self.sharing.wake();
        log_rewritten(&changes, &by, now);
        Done::Rewritten { changes, shared }
    }

    /// Publishes one list for all that the batch has revoked. A revocation that no broker can learn of
    /// is no success; it is tried again by itself.
    fn publish_revoked(&self, done: &mut [Result<Done, Problem>], follow_up: &FollowUp) {
        let is_revocation = |done: &Result<Done, Problem>| matches!(done, Ok(Done::Revoked { .. }));
        if !follow_up.revoked && !done.iter().any(is_revocation) {
            return;
        }
        let Err(error) = self.publisher.publish(clock::now()) else { return };
        let problem = Problem::from(error).text("Revoked, but the CRL could not be published yet");
        let revoked = done.iter_mut().filter(|done| is_revocation(done));
        revoked.for_each(|done| *done = Err(problem.clone()));
    }

    /// Under the record's lock, if anything is to be signed: checks, signs and enters one after the
    /// other, then makes all entries durable at once.
    fn record(
        &self,
        mut steps: Vec<Step>,
        follow_up: &mut FollowUp,
        now: Now,
    ) -> Vec<Result<Done, Problem>> {
        let mut committed = Vec::new();
        if steps.iter().any(|step| matches!(step, Step::Granted(_))) {
            let mut entries = self.ca().record().begin();
            let enter = |step| self.enter(step, &mut entries, follow_up, now);
            steps = steps.into_iter().map(enter).collect();
            committed = entries.commit();
        }
        let mut committed = committed.into_iter();
        let mut end = |step| match step {
            Step::Done(done) => done,
            // All that were to be asked again have been.
            Step::Again(issue) => Err(not_issued(Code::InternalError, &issue.device)),
            // Every granted one was entered or refused above.
            Step::Granted(grant) => Err(grant.refused(Code::InternalError.into())),
            Step::Entered(grant, signed) => {
                let result = committed.next().unwrap_or_else(|| Err(not_committed()));
                self.recorded(grant, signed, result, follow_up)
            }
        };
        let done = steps.into_iter().map(&mut end).collect();
        self.enter_spent(follow_up, now);
        done
    }

    /// The registrations that were used are used up here before anybody is answered, and in Redis
    /// before the devices' leases are free.
    fn enter_spent(&self, follow_up: &mut FollowUp, now: Now) {
        let used = std::mem::take(&mut follow_up.used);
        let device = |used: &Used| used.token.claims.device_id.clone();
        let spent: Vec<(DeviceId, Row)> =
            used.iter().filter_map(|used| Some((device(used), used.spends.clone()?))).collect();
        let entered = self.devices.enter(spent.clone(), true, now);
        if let Err(error) = &entered {
            log::error!("registrations that were used are not marked so on disk: {error}");
        }
        for (device, row) in spent {
            match entered {
                Ok(()) => self.spending.lock().remove(&device),
                Err(_) => self.spending.lock().insert(device, Some(row)),
            };
        }
        for Used { token, serial, spends } in used {
            let device = token.claims.device_id.clone();
            // Where others are told of the record, they are told of the row before the lease goes, if
            // that is on disk.
            let token = self.sharing.free_when_shared(serial, token);
            let told_here = spends.filter(|_| token.is_some() || entered.is_err());
            follow_up.after.extend(told_here.map(|row| Op::Tell(device, row)));
            follow_up.after.extend(token.map(Op::Finish));
        }
    }

    /// At the start: what the process that ran before has recorded and not brought to its end. The first
    /// token of a device after its registration was begun has used that up, and the certificates
    /// before it are to be revoked.
    pub fn make_up(&self, now: Now) {
        let mut spent = self.ca().record().spent_tokens();
        spent.sort_by_key(|spent| spent.token.iat);
        let mut used = BTreeMap::new();
        for Spent { token, serial, device } in spent {
            let row = self.devices.row(&device);
            // Beginning a registration kills all that was before it.
            if row.registration.is_some() && token.iat > row.bound.t {
                used.entry(device).or_insert(serial);
            }
        }
        let mut rows = Vec::new();
        for (device, serial) in used {
            let row = self.devices.row(&device);
            if [Stage::Open, Stage::Spent].contains(&row.stage(now.unix_s())) {
                self.supersede_older(&device, serial, now);
            }
            rows.extend(row.spend(now.unix_s()).map(|row| (device, row)));
        }
        if let Err(error) = self.devices.enter(rows, true, now) {
            log::error!("registrations that were used are not marked so on disk: {error}");
        }
    }

    fn not_spent(&self, grant: &Grant) {
        if let Grant::Token(redeem) = grant
            && redeem.spends.is_some()
        {
            self.spending.lock().remove(&redeem.token.claims.device_id);
        }
    }

    /// A device that has enrolled again by a registration needs its older certificates no more.
    fn supersede_older(&self, device: &DeviceId, new: Serial, now: Now) {
        let older = self.ca().record().of_device(device);
        let older = older.iter().skip_while(|newer| newer.serial != new).skip(1);
        for old in older.filter(|old| old.revoked_at.is_none()) {
            self.publisher.supersede(old.serial, new, now);
        }
    }

    fn enter(
        &self,
        step: Step,
        entries: &mut Entries<'_>,
        follow_up: &mut FollowUp,
        now: Now,
    ) -> Step {
        let Step::Granted(mut grant) = step else { return step };
        match self.sign(&mut grant, entries, now) {
            Ok(signed) if signed.again => {
                grant.log_again(&signed.leaf);
                Step::Done(Ok(Done::Signed(Box::new(signed))))
            }
            Ok(signed) => {
                entries.add(&signed.leaf, Some(grant.origin()), now);
                Step::Entered(grant, signed)
            }
            Err(problem) => {
                // A mark without a certificate is good for nothing, a bound's refusal included.
                if !grant.is_recorded(entries) {
                    follow_up.give_back.extend(grant.give_back());
                }
                self.not_spent(&grant);
                Step::Done(Err(grant.refused(problem)))
            }
        }
    }

    /// The last look, then the signature. A panic in it costs this request alone.
    fn sign(&self, grant: &mut Grant, entries: &Entries<'_>, now: Now) -> Result<Signed, Problem> {
        let (csr, device, serial, days) = match grant {
            Grant::Token(redeem) => {
                self.look_again(redeem, entries, now)?;
                let days = redeem.row.living(now.unix_s()).and_then(|terms| terms.cert_days);
                (&redeem.csr, &redeem.token.claims.device_id, redeem.serial, days)
            }
            Grant::Certificate(renew) => {
                self.check_block(&renew.old.device)?;
                self.judge_again(renew, now)?;
                if let Some(leaf) = renew.judge(entries, now)? {
                    return Ok(Signed { leaf, issuer: self.issuer(now)?, again: true });
                }
                (&renew.csr, &renew.old.device, renew.serial, None)
            }
        };
        let issuer = self.issuer(now)?;
        let sign = || match days {
            Some(days) => issuer.sign_for(csr, device, serial, days, now),
            None => issuer.sign(csr, device, serial, now),
        };
        let leaf = catch_unwind(AssertUnwindSafe(sign))
            .map_err(|_| Problem::from(Code::InternalError).log("signing panicked"))??;
        Ok(Signed { leaf, issuer, again: false })
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
            if self.rules.registered_only && redeem.row.stage(now.unix_s()) == Stage::Spent {
                return Err(Code::TokenAlreadyUsed);
            }
            if !self.may_reenroll() && entries.has_active(device, now) {
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
        let mut spending = self.spending.lock();
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
    fn judge_again(&self, renew: &Renew, now: Now) -> Result<(), IdentityError> {
        let old = self.ca().record().by_serial(&renew.old.serial);
        let old = old.ok_or(IdentityError::NotOurs("gone from the record"))?;
        self.ca().still_counts(&old, self.rules.renew_after_expiry_days, now)?;
        // The bound of a revocation may have been raised whose turn for the record is still to come.
        let bound = self.devices.bound(&old.device).0.c;
        let is_dead = bound > 0 && self.ca().record().paid(&old.serial) <= bound;
        if is_dead { Err(IdentityError::Revoked) } else { Ok(()) }
    }

    fn count(&self, grant: &Grant) {
        match grant {
            Grant::Token(_) => {
                self.metrics.tokens_consumed.add(1);
                self.metrics.certificates_issued.add(1);
            }
            Grant::Certificate(_) => self.metrics.certificates_renewed.add(1),
        }
    }

    fn recorded(
        &self,
        grant: Grant,
        signed: Signed,
        result: Result<(), RecordError>,
        follow_up: &mut FollowUp,
    ) -> Result<Done, Problem> {
        match result {
            Ok(()) => {
                grant.log_signed(&signed.leaf);
                self.count(&grant);
                match grant {
                    Grant::Token(redeem) => {
                        let Redeem { token, serial, spends, .. } = *redeem;
                        if spends.is_some() {
                            let device = &token.claims.device_id;
                            self.supersede_older(device, signed.leaf.serial, clock::now());
                        }
                        follow_up.used.push(Used { token, serial, spends });
                    }
                    Grant::Certificate(renew) if self.rules.renew_revokes => {
                        let new = signed.leaf.serial;
                        self.publisher.supersede(renew.old.serial, new, clock::now());
                    }
                    Grant::Certificate(_) => {}
                }
                Ok(Done::Signed(Box::new(signed)))
            }
            Err(error) => {
                if !error.left_behind() {
                    follow_up.give_back.extend(grant.give_back());
                }
                self.not_spent(&grant);
                let problem = Problem::from(error);
                log::error!("certificate {} could not be recorded: {problem}", signed.leaf.serial);
                Err(grant.refused(problem))
            }
        }
    }
}

/// What follows from the jobs of a batch.
#[derive(Default)]
struct FollowUp {
    /// Before the answers: what must be given back.
    give_back: Vec<Op>,
    /// After the answers.
    after: Vec<Op>,
    /// Tokens that certificates were recorded for.
    used: Vec<Used>,
    /// Something was revoked that a new list has to name.
    revoked: bool,
    /// What was killed, the other instances have been told of.
    shared: bool,
}

impl Job {
    /// The device whose past it kills, if it does.
    fn kills(&self) -> Option<&DeviceId> {
        match self {
            Job::Issue(Issue { device, replace: true, .. })
            | Job::Revoke(Revoke { device, .. }) => Some(device),
            _ => None,
        }
    }
}

/// A token for which a certificate is recorded, and what of the device's row it has used up.
struct Used {
    token: Token,
    serial: Serial,
    spends: Option<Row>,
}

/// A job on its way through the phases.
enum Step {
    /// Nothing is left to do.
    Done(Result<Done, Problem>),
    /// The device has a token, and is entitled to another in its place.
    Again(Issue),
    /// The store has answered: the certificate is still to be signed.
    Granted(Grant),
    /// It is signed and entered; whether it is recorded, the commit says.
    Entered(Grant, Signed),
}

/// What entitles to a certificate.
enum Grant {
    /// A token, which is now this attempt's.
    Token(Box<Redeem>),
    /// An earlier certificate.
    Certificate(Box<Renew>),
}

impl Grant {
    /// What the record will name.
    fn origin(&self) -> Origin {
        match self {
            Grant::Token(redeem) => {
                let Token { hash, claims, .. } = &redeem.token;
                Origin::Token(Redeemed { hash: *hash, iat: claims.iat, exp: claims.exp })
            }
            Grant::Certificate(renew) => Origin::Renewal { old: renew.old.serial, paid: None },
        }
    }

    /// Its token has a certificate, from this attempt or another.
    fn is_recorded(&self, entries: &Entries<'_>) -> bool {
        matches!(self, Grant::Token(redeem) if entries.knows_token(&redeem.token.hash))
    }

    fn give_back(&self) -> Option<Op> {
        let Grant::Token(redeem) = self else { return None };
        Some(Op::GiveBack(redeem.token.clone(), redeem.serial))
    }

    fn log_signed(&self, leaf: &Leaf) {
        match self {
            Grant::Token(redeem) => redeem.log_signed(leaf),
            Grant::Certificate(renew) => log::info!(
                "certificate {} signed for {}, in renewal of {}, by {}",
                leaf.serial,
                leaf.device,
                renew.old.serial,
                renew.client
            ),
        }
    }

    fn log_again(&self, leaf: &Leaf) {
        if let Grant::Certificate(renew) = self {
            let Renew { old, client, .. } = &**renew;
            log::info!(
                "certificate {} of {} given again in renewal of {}, by {client}",
                leaf.serial,
                leaf.device,
                old.serial
            );
        }
    }

    /// For the log: who was refused.
    fn refused(&self, problem: Problem) -> Problem {
        match self {
            Grant::Token(redeem) => redeem.refused(problem),
            Grant::Certificate(renew) => not_issued(problem, &renew.old.device),
        }
    }
}

impl Renew {
    /// The certificate that this device has got for the same key before, if it asks again.
    fn judge(&self, entries: &Entries<'_>, now: Now) -> Result<Option<Leaf>, Problem> {
        match entries.judge_renewal(&self.old, self.csr.key(), now) {
            Renewal::New => Ok(None),
            Renewal::Again(leaf) => Ok(Some(*leaf)),
            Renewal::UnderWay => Err(Code::ServiceUnavailable.into()),
            Renewal::TooMany(wait_s) => {
                let problem = Problem::from(Code::RateLimited);
                Err(Problem { retry_after_s: Some(wait_s), ..problem })
            }
        }
    }
}

impl Redeem {
    fn log_signed(&self, leaf: &Leaf) {
        let user = self.user_id.as_deref().map(|user| format!(", user {user:?}"));
        log::info!(
            "certificate {} signed for {}, token {} consumed, by {}{}",
            leaf.serial,
            leaf.device,
            self.token.hash.short(),
            self.client,
            user.unwrap_or_default()
        );
    }

    fn refused(&self, problem: Problem) -> Problem {
        refused(problem, &self.token.hash, &self.token.claims.device_id)
    }
}

/// Whether a mark that was sent at `sent` or later is still taken for that of an attempt under way:
/// whoever replaces the token waits for one that is younger than 30 s (`docs/model`, row 28c).
fn is_in_time(sent: Now, now: Now) -> bool {
    const MS: u64 = 25_000;
    now.mono_ms.saturating_sub(sent.mono_ms) < MS
}

/// The attempt, if it may sign.
fn granted(redeem: Redeem, answer: Answer) -> Result<Redeem, Problem> {
    let problem = match answer {
        Ok(Outcome::Granted(row)) => return Ok(Redeem { row: redeem.row.merge(*row), ..redeem }),
        Ok(Outcome::Blocked) => Problem::from(Code::DeviceBlocked),
        Ok(Outcome::AlreadyUsed) => Problem::from(Code::TokenAlreadyUsed),
        Ok(Outcome::Unknown { .. }) => Problem::from(Code::TokenNotFound),
        other => unexpected(other),
    };
    Err(redeem.refused(problem))
}

/// Why no token was issued.
fn not_given(answer: Answer, now: Now) -> Problem {
    match answer {
        Ok(Outcome::AlreadyActive { expires_at_ms }) => {
            let left_s = expires_at_ms.saturating_sub(now.unix_ms) / 1000;
            Problem::from(Code::TokenAlreadyActive)
                .field("expiresAt", clock::rfc3339(expires_at_ms))
                .field("expiresInSeconds", left_s)
        }
        Ok(Outcome::Blocked) => Code::DeviceBlocked.into(),
        other => unexpected(other),
    }
}

/// What was done to which devices: one line, however many they are.
fn log_rewritten(changes: &[Changed], by: &By, now: Now) {
    const NAMED: usize = 20;
    let said = |changed: &Changed| match &changed.change {
        Change::Keep => "unchanged".to_owned(),
        Change::Forget => "registration forgotten".to_owned(),
        Change::Edit { edit, .. } => said_of(edit, changed.row.living(now.unix_s())),
    };
    let named: Vec<String> =
        changes.iter().take(NAMED).map(|c| format!("{} {}", c.device, said(c))).collect();
    let more = match changes.len().checked_sub(NAMED).filter(|more| *more > 0) {
        Some(more) => format!(" and {more} more"),
        None => String::new(),
    };
    log::info!("device {}{more}, {by}", named.join("; "));
}

fn said_of(edit: &Edit, living: Option<&Terms>) -> String {
    let end = living.map(|terms| clock::rfc3339(terms.end.saturating_mul(1000)));
    let parts = [
        edit.register.map(|secret| match secret {
            Some(_) => "registered with a secret",
            None => "registered without a secret",
        }),
        edit.register.is_none().then_some("changed"),
        edit.blocked.map(|blocked| if blocked { "blocked" } else { "unblocked" }),
    ];
    let is_block_only = edit.register.is_none() && edit.blocked.is_some();
    let parts = parts.into_iter().flatten().filter(|part| !(is_block_only && *part == "changed"));
    let until = end.filter(|_| edit.register.is_some()).map(|end| format!(", until {end}"));
    parts.collect::<Vec<_>>().join(" and ") + &until.unwrap_or_default()
}

/// What a store answers when it does not do what it was asked.
pub(super) fn unexpected(answer: Answer) -> Problem {
    match answer {
        Err(StoreError::Full) => Code::StoreFull.into(),
        Err(error @ StoreError::ShareFull) => Problem::from(Code::RateLimited).log(error),
        Err(StoreError::Failed(why)) => {
            log::error!("the token store failed: {why}");
            Problem::from(Code::ServiceUnavailable).log(why)
        }
        Err(error) => Problem::from(Code::ServiceUnavailable).log(error),
        Ok(outcome) => Problem::from(Code::InternalError).log(format!("{outcome:?}")),
    }
}

fn not_committed() -> RecordError {
    RecordError::NotWritten { why: "no result".to_owned(), left_behind: true }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::Ca;
    use crate::ca::publisher::Publisher;
    use crate::ca::record::Reason;
    use crate::config;
    use crate::devices::Instance;
    use crate::devices::enrol::{Maker, Shown};
    use crate::devices::table::Devices;
    use crate::files::test_dir::TestDir;
    use crate::jwt::{Signer, TokenHash};
    use crate::metrics::Metrics;
    use crate::provisioner::{Onboarding, Rules, Spending};
    use crate::share::{Mode, Sharing};
    use crate::store::ledger::Ledger;
    use crate::store::{Status, TokenStore};
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::mpsc;
    use std::sync::{Arc, Mutex};
    use std::thread;
    use std::time::Duration;

    /// A store that grants what it is asked.
    #[derive(Default)]
    struct Willing {
        given_back: Mutex<Vec<TokenHash>>,
    }

    impl TokenStore for Willing {
        fn run(&self, ops: &[Op], _: Now) -> Vec<Answer> {
            let answer = |op: &Op| match op {
                Op::Issue(new) => Ok(Outcome::Issued {
                    token: new.token.clone(),
                    killed: None,
                    found: Box::default(),
                }),
                Op::Look(_) => Ok(Outcome::Seen(Box::default())),
                Op::Consume(..) => Ok(Outcome::Granted(Box::default())),
                Op::GiveBack(token, _) => {
                    self.given_back.lock().unwrap().push(token.hash);
                    Ok(Outcome::Done)
                }
                Op::Kill(_) => Ok(Outcome::Killed { dead: None, told: true }),
                Op::Count => Ok(Outcome::Counted(1)),
                _ => Err(StoreError::Undecided),
            };
            ops.iter().map(answer).collect()
        }

        fn status(&self) -> Status {
            Status::default()
        }
    }

    fn provisioner(dir: &TestDir, store: Arc<Willing>, now: Now) -> Provisioner {
        let settings = config::Ca {
            dir: dir.to_path_buf(),
            root_validity_years: 10,
            device_validity_days: 90,
        };
        let rules = Rules {
            token_ttl_s: 300,
            reenroll: config::Reenroll::Deny,
            registered_only: false,
            renew_revokes: true,
            renew_after_expiry_days: 0,
        };
        let metrics = Arc::new(Metrics::new(std::iter::empty()));
        let ca = Arc::new(Ca::open(&settings, now).unwrap());
        let devices = Devices::open(&dir.join("devices.txt"), Instance([1; 16]), now).unwrap();
        Provisioner {
            store,
            ledger: Arc::new(Ledger::new(10)),
            devices: Arc::new(devices),
            publisher: Arc::new(Publisher::new(ca, None, Arc::clone(&metrics))),
            sharing: Arc::new(Sharing::new(Mode::Alone)),
            signer: Signer::new(b"a secret of the test"),
            rules,
            metrics,
            spending: Spending::default(),
        }
    }

    fn plan_issue(provisioner: &Provisioner, now: Now) -> Job {
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let asked = Onboarding {
            device: DeviceId::parse("d").unwrap(),
            replace: false,
            rule: config::Enrolment::Open,
            shown: Shown::Nothing,
            client,
        };
        provisioner.plan_issue(asked, now).unwrap()
    }

    fn plan_redeem(provisioner: &Provisioner, token: Token, now: Now) -> Job {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "d");
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = params.serialize_request(&key).unwrap().pem().unwrap();
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        provisioner.plan_redeem(token, &csr, None, None, client, now).unwrap()
    }

    #[test]
    fn only_certificates_wait_for_the_disk() {
        let dir = TestDir::new();
        let now = clock::now();
        let provisioner = Arc::new(provisioner(&dir, Arc::default(), now));
        // As while another worker's certificates are written.
        let _writing = provisioner.ca().record().begin();
        let (sender, done) = mpsc::channel();
        let worker = Arc::clone(&provisioner);
        thread::spawn(move || {
            let job = plan_issue(&worker, now);
            let issued = worker.run(vec![job, Job::Count], now).done;
            let _ = sender.send(issued.iter().filter(|done| done.is_ok()).count());
        });
        assert_eq!(done.recv_timeout(Duration::from_secs(10)), Ok(2));
    }

    /// The bound of the kill reaches five seconds past the plan.
    #[test]
    fn an_onboarding_in_the_batch_of_a_kill_is_born_alive() {
        let dir = TestDir::new();
        let now = clock::now();
        let provisioner = provisioner(&dir, Arc::default(), now);
        let device = DeviceId::parse("d").unwrap();
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let by = By { name: None, client };
        let revoke = provisioner.plan_revoke(device, false, Reason::Unspecified, by, now).unwrap();
        let issue = plan_issue(&provisioner, now);
        let done = provisioner.run(vec![revoke, issue], now).done;
        let [Err(_nothing_is_known), Ok(Done::Issued(token))] = &done[..] else {
            panic!("{done:?}")
        };
        assert!(!provisioner.is_dead(token), "{:?}", token.claims);
    }

    /// The bound came between the grant and the signature: the mark must not stay for another to meet.
    #[test]
    fn what_a_bound_refuses_is_given_back() {
        let (dir, store, now) = (TestDir::new(), Arc::new(Willing::default()), clock::now());
        let provisioner = provisioner(&dir, Arc::clone(&store), now);
        let device = DeviceId::parse("d").unwrap();
        let token = provisioner.token(device.clone(), [1; 16], now);
        let job = plan_redeem(&provisioner, token.clone(), now);
        let bound = crate::devices::Bound { t: token.claims.iat, c: 0 };
        provisioner.devices.raise(&device, bound, now).unwrap();
        let done = provisioner.run(vec![job], now).done.remove(0);
        assert_eq!(done.map_err(|problem| problem.code).unwrap_err(), Code::TokenAlreadyUsed);
        assert_eq!(*store.given_back.lock().unwrap(), [token.hash]);
    }

    #[test]
    fn a_registration_whose_use_cannot_be_written_is_used_up_all_the_same() {
        let (dir, now) = (TestDir::new(), clock::now());
        let mut provisioner = provisioner(&dir, Arc::default(), now);
        provisioner.rules.registered_only = true;
        let device = DeviceId::parse("d").unwrap();
        let edit = Edit { register: Some(None), ..Edit::default() };
        let maker = Maker { name: None, instance: Instance([1; 16]), now };
        let registered = Row::default().edited(&edit, &maker).unwrap();
        provisioner.devices.enter(vec![(device.clone(), registered)], true, now).unwrap();
        let redeem = |nonce: u8| {
            let token = provisioner.token(device.clone(), [nonce; 16], now);
            let mut batch = provisioner.run(vec![plan_redeem(&provisioner, token, now)], now);
            let code = batch.done.remove(0).map(drop).map_err(|problem| problem.code);
            (code, batch.after.iter().any(|op| matches!(op, Op::Tell(..))))
        };
        let (file, kept) = (dir.join("devices.txt"), dir.join("kept"));
        std::fs::rename(&file, &kept).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert_eq!(redeem(1), (Ok(()), true));
        assert_eq!(redeem(2), (Err(Code::ServiceUnavailable), false));
        std::fs::remove_dir(&file).unwrap();
        std::fs::rename(&kept, &file).unwrap();
        assert_eq!(redeem(3), (Err(Code::ServiceUnavailable), false), "it is written now");
        assert!(provisioner.spending.lock().is_empty());
        assert_eq!(provisioner.devices.row(&device).stage(now.unix_s()), Stage::Spent);
    }

    #[test]
    fn a_mark_that_is_old_is_not_signed_for() {
        let at = |s: u64| Now { unix_ms: 0, mono_ms: s * 1000 };
        for (sent, now, in_time) in [(5, 5, true), (5, 29, true), (5, 30, false), (5, 4, true)] {
            assert_eq!(is_in_time(at(sent), at(now)), in_time, "{sent} {now}");
        }
    }
}
