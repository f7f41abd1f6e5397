//! Running a batch of jobs, in fixed phases: if a device's past is to die, how far, on disk → the
//! store, first round → under the record's lock: check,
//! sign and enter one after the other, then make all durable at once → if anything was revoked, one
//! new list → the store, second round: what must be given back before the answer. What can wait until
//! after the answer is returned as [`Batch::after`].

use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{
    Batch, Done, Issue, Job, Provisioner, Redeem, Renew, Revoke, Signed, no_certificate,
    not_issued, refused,
};
use crate::ca::identity::IdentityError;
use crate::ca::issuer::Leaf;
use crate::ca::record::{Entries, Origin, Reason, RecordError, Redeemed, Renewal};
use crate::clock::{self, Now};
use crate::config::Reenroll;
use crate::device::DeviceId;
use crate::jwt::Token;
use crate::problem::{Code, Problem};
use crate::serial::Serial;
use crate::store::{Answer, Kill, New, Op, Outcome, StoreError};

impl Provisioner {
    /// Runs the jobs, each with its own outcome.
    pub fn run(&self, jobs: Vec<Job>, now: Now) -> Batch {
        let mut kills = self.raise_bounds(&jobs, now).into_iter();
        let (ready, ops): (Vec<_>, Vec<_>) =
            jobs.into_iter().map(|job| self.ready(job, &mut kills, now)).unzip();
        let ops: Vec<Op> = ops.into_iter().flatten().collect();
        let answers = if ops.is_empty() { Vec::new() } else { self.store.run(&ops, now) };
        let mut answers = answers.into_iter();
        let killed: Vec<DeviceId> = ops.iter().filter_map(killed_by).cloned().collect();
        let shared = killed.is_empty() || self.share_kills(&killed);
        let mut follow_up = FollowUp { shared, ..FollowUp::default() };
        let steps: Vec<Step> = ready
            .into_iter()
            .map(|job| self.decide(job, &mut answers, &mut follow_up, now))
            .collect();
        let mut done = self.record(steps, &mut follow_up, now);
        self.publish_revoked(&mut done, &follow_up);
        self.publisher.watch_record(clock::now());
        if !follow_up.give_back.is_empty() {
            self.store.run(&follow_up.give_back, clock::now());
        }
        Batch { done, after: follow_up.after }
    }

    /// The job with what the store is asked for it, if it is asked and the job can be done.
    fn ready(
        &self,
        job: Job,
        kills: &mut impl Iterator<Item = Result<Kill, Problem>>,
        now: Now,
    ) -> (Result<Job, Problem>, Option<Op>) {
        let mut kill = || kills.next().unwrap_or_else(|| Err(Code::InternalError.into()));
        let op = match &job {
            Job::Issue(Issue { device, jti, replaces, client }) => {
                replaces.then(|| kill().map(Box::new)).transpose().map(|replaces| {
                    let token = self.token(device.clone(), *jti, now);
                    Some(Op::Issue(New { token, replaces, subscriber: (*client).into() }))
                })
            }
            Job::Redeem(redeem) => Ok(Some(Op::Consume(redeem.token.clone(), redeem.serial))),
            Job::Renew(_) => Ok(None),
            Job::Count => Ok(Some(Op::Count)),
            Job::Revoke(_) => kill().map(|kill| Some(Op::Kill(Box::new(kill)))),
        };
        match op {
            Ok(op) => (Ok(job), op),
            Err(problem) => (Err(problem), None),
        }
    }

    /// Runs what could wait until after the answers.
    pub fn clean_up(&self, after: &[Op]) {
        if !after.is_empty() {
            self.store.run(after, clock::now());
        }
    }

    /// Reads the store's answer; only what is to be signed has anything left to do.
    fn decide(
        &self,
        job: Result<Job, Problem>,
        answers: &mut impl Iterator<Item = Answer>,
        follow_up: &mut FollowUp,
        now: Now,
    ) -> Step {
        let job = match job {
            Ok(job) => job,
            Err(problem) => return Step::Done(Err(problem)),
        };
        let mut answer = || answers.next().unwrap_or(Err(StoreError::Undecided));
        match job {
            Job::Issue(Issue { device, client, .. }) => {
                Step::Done(self.issued(device, client, answer(), &mut follow_up.give_back, now))
            }
            Job::Redeem(redeem) => match granted(&redeem, answer()) {
                Ok(()) => Step::Granted(Grant::Token(redeem)),
                Err(problem) => Step::Done(Err(problem)),
            },
            Job::Renew(renew) => Step::Granted(Grant::Certificate(renew)),
            Job::Revoke(revoke) => {
                Step::Done(self.revoked(revoke, answer(), follow_up.shared, follow_up))
            }
            Job::Count => Step::Done(match answer() {
                Ok(Outcome::Counted(count)) => Ok(Done::Counted(count)),
                other => Err(unexpected(other)),
            }),
        }
    }

    fn issued(
        &self,
        device: DeviceId,
        client: IpAddr,
        answer: Answer,
        give_back: &mut Vec<Op>,
        now: Now,
    ) -> Result<Done, Problem> {
        let (token, killed) = match answer {
            Ok(Outcome::Issued { token, killed, holder }) => {
                if !self.knows_holder(&device, holder) {
                    give_back.push(Op::TakeBack(token));
                    return Err(not_issued(Code::ServiceUnavailable, &device));
                }
                (token, killed)
            }
            Ok(Outcome::AlreadyActive { expires_at_ms }) => {
                let left_s = expires_at_ms.saturating_sub(now.unix_ms) / 1000;
                return Err(not_issued(Code::TokenAlreadyActive, &device)
                    .field("expiresAt", clock::rfc3339(expires_at_ms))
                    .field("expiresInSeconds", left_s));
            }
            other => return Err(unexpected(other).log_more(format!("device {device}"))),
        };
        // The device may have redeemed another token between the first look and the claim.
        if self.rules.reenroll == Reenroll::Deny && self.ca().record().has_active(&device, now) {
            let problem = not_issued(Code::DeviceHasActiveCertificate, &device);
            give_back.push(Op::TakeBack(token));
            return Err(problem);
        }
        log::info!("token {} issued for {device}, to {client}", token.hash.short());
        self.metrics.tokens_issued.add(1);
        if let Some(old) = killed {
            self.metrics.tokens_killed.add(1);
            log::info!("token {} of {device} killed: replaced, by {client}", old.hash.short());
        }
        Ok(Done::Issued(token))
    }

    /// Tells the other instances of these kills, and learns of certificates that only they know. Where
    /// there is no Redis nobody is left to be told.
    fn share_kills(&self, devices: &[DeviceId]) -> bool {
        self.sharing.look_up(devices) || !self.store.status().redis_enabled
    }

    /// Another instance has signed for the device, which is not in the record yet: it is entered now.
    /// `false` if that is not done in time; where nothing is shared the holder does not count.
    fn knows_holder(&self, device: &DeviceId, holder: Option<Serial>) -> bool {
        let denies = self.rules.reenroll == Reenroll::Deny;
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
        let Revoke { device, client } = revoke;
        let dead = match answer {
            Ok(Outcome::Killed(dead)) => dead,
            other => return Err(unexpected(other)),
        };
        let record = self.ca().record();
        // One whose certificate is recorded was used up; its keys were about to go.
        let dead = dead.filter(|dead| !record.knows_token(&dead.hash));
        if let Some(dead) = &dead {
            self.metrics.tokens_killed.add(1);
            log::info!("token {} of {device} killed, by {client}", dead.hash.short());
        }
        let serials = record.revoke(&device, Reason::Unspecified, clock::now())?;
        follow_up.revoked |= !serials.is_empty();
        self.metrics.certificates_revoked.add(serials.len() as u64);
        for serial in &serials {
            log::info!("certificate {serial} of {device} revoked, by {client}");
        }
        if self.ledger.knows_device(&device) || record.knows_device(&device) {
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
            // Every granted one was entered or refused above.
            Step::Granted(grant) => Err(grant.refused(Code::InternalError.into())),
            Step::Entered(grant, signed) => {
                let result = committed.next().unwrap_or_else(|| Err(not_committed()));
                self.recorded(grant, signed, result, follow_up)
            }
        };
        steps.into_iter().map(&mut end).collect()
    }

    fn enter(
        &self,
        step: Step,
        entries: &mut Entries<'_>,
        follow_up: &mut FollowUp,
        now: Now,
    ) -> Step {
        let Step::Granted(grant) = step else { return step };
        match self.sign(&grant, entries, now) {
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
                Step::Done(Err(grant.refused(problem)))
            }
        }
    }

    /// The last look, then the signature. A panic in it costs this request alone.
    fn sign(&self, grant: &Grant, entries: &Entries<'_>, now: Now) -> Result<Signed, Problem> {
        let (csr, device, serial) = match grant {
            Grant::Token(redeem) => {
                self.look_again(redeem, entries, now)?;
                (&redeem.csr, &redeem.token.claims.device_id, redeem.serial)
            }
            Grant::Certificate(renew) => {
                self.judge_again(renew, now)?;
                if let Some(leaf) = renew.judge(entries, now)? {
                    return Ok(Signed { leaf, issuer: self.issuer(now)?, again: true });
                }
                (&renew.csr, &renew.old.device, renew.serial)
            }
        };
        let issuer = self.issuer(now)?;
        let leaf = catch_unwind(AssertUnwindSafe(|| issuer.sign(csr, device, serial, now)))
            .map_err(|_| Problem::from(Code::InternalError).log("signing panicked"))??;
        Ok(Signed { leaf, issuer, again: false })
    }

    fn look_again(&self, redeem: &Redeem, entries: &Entries<'_>, now: Now) -> Result<(), Code> {
        if !is_in_time(now, clock::now()) {
            return Err(Code::ServiceUnavailable);
        }
        let token = &redeem.token;
        let killed = self.ledger.knows_as_killed(&token.hash) || self.is_dead(token);
        if killed || entries.knows_token(&token.hash) {
            return Err(Code::TokenAlreadyUsed);
        }
        let device = &token.claims.device_id;
        if self.rules.reenroll == Reenroll::Deny && entries.has_active(device, now) {
            return Err(Code::DeviceHasActiveCertificate);
        }
        Ok(())
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
                        let held = self.sharing.free_when_shared(redeem.serial, redeem.token);
                        follow_up.after.extend(held.map(Op::Finish));
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
    /// Something was revoked that a new list has to name.
    revoked: bool,
    /// What was killed, the other instances have been told of.
    shared: bool,
}

impl Job {
    /// The device whose past it kills, if it does.
    pub(super) fn kills(&self) -> Option<&DeviceId> {
        match self {
            Job::Issue(Issue { device, replaces: true, .. })
            | Job::Revoke(Revoke { device, .. }) => Some(device),
            _ => None,
        }
    }
}

/// The device whose past the operation has killed, if it does that.
fn killed_by(op: &Op) -> Option<&DeviceId> {
    match op {
        Op::Kill(kill) => Some(&kill.device),
        Op::Issue(New { replaces, .. }) => replaces.as_ref().map(|kill| &kill.device),
        _ => None,
    }
}

/// A job on its way through the phases.
enum Step {
    /// Nothing is left to do.
    Done(Result<Done, Problem>),
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

/// Whether the attempt may sign.
fn granted(redeem: &Redeem, answer: Answer) -> Result<(), Problem> {
    let problem = match answer {
        Ok(Outcome::Granted) => return Ok(()),
        Ok(Outcome::AlreadyUsed) => Problem::from(Code::TokenAlreadyUsed),
        Ok(Outcome::Unknown { .. }) => Problem::from(Code::TokenNotFound),
        other => unexpected(other),
    };
    Err(redeem.refused(problem))
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
    use crate::config;
    use crate::devices::Instance;
    use crate::devices::table::Devices;
    use crate::files::test_dir::TestDir;
    use crate::jwt::{Signer, TokenHash};
    use crate::metrics::Metrics;
    use crate::provisioner::Rules;
    use crate::share::{Mode, Sharing};
    use crate::store::ledger::Ledger;
    use crate::store::{Status, TokenStore};
    use std::net::Ipv4Addr;
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
                Op::Issue(new) => {
                    Ok(Outcome::Issued { token: new.token.clone(), killed: None, holder: None })
                }
                Op::Look(_) => Ok(Outcome::Seen(Box::default())),
                Op::Kill(_) => Ok(Outcome::Killed(None)),
                Op::Consume(..) => Ok(Outcome::Granted),
                Op::GiveBack(token, _) => {
                    self.given_back.lock().unwrap().push(token.hash);
                    Ok(Outcome::Done)
                }
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
            reenroll: Reenroll::Deny,
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
        }
    }

    fn plan_issue(provisioner: &Provisioner, now: Now) -> Job {
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        provisioner.plan_issue(DeviceId::parse("d").unwrap(), false, client, now).unwrap()
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
        let revoke = provisioner.plan_revoke(device, client, now).unwrap();
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
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "d");
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = params.serialize_request(&key).unwrap().pem().unwrap();
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let job = provisioner.plan_redeem(token.clone(), &csr, None, None, client, now).unwrap();
        let bound = crate::devices::Bound { t: token.claims.iat, c: 0 };
        provisioner.devices.raise(&device, bound, now).unwrap();
        let done = provisioner.run(vec![job], now).done.remove(0);
        assert_eq!(done.map_err(|problem| problem.code).unwrap_err(), Code::TokenAlreadyUsed);
        assert_eq!(*store.given_back.lock().unwrap(), [token.hash]);
    }

    #[test]
    fn a_mark_that_is_old_is_not_signed_for() {
        let at = |s: u64| Now { unix_ms: 0, mono_ms: s * 1000 };
        for (sent, now, in_time) in [(5, 5, true), (5, 29, true), (5, 30, false), (5, 4, true)] {
            assert_eq!(is_in_time(at(sent), at(now)), in_time, "{sent} {now}");
        }
    }
}
