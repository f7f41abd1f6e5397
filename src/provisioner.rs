//! The domain: issue a token, redeem it for a certificate, renew that, revoke.
//!
//! It knows no HTTP and no Redis. Work comes in batches, which share their round trips to the store
//! and their `fsync`, in fixed phases: what can be refused without the store was refused when the
//! job was planned → the store, first round → under the record's lock: check, sign and enter one
//! after the other → if anything was revoked, one new list → the store, second round: what must be
//! given back before the answer. What can wait until after the answer is returned as
//! [`Batch::after`].

use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::ca::csr::Csr;
use crate::ca::identity::IdentityError;
use crate::ca::issuer::{Issuer, Leaf};
use crate::ca::publisher::Publisher;
use crate::ca::registry::{Entries, Origin, Record, Redeemed, RegistryError, Renewal};
use crate::ca::{Ca, CaError};
use crate::clock::{self, Now};
use crate::config::Reenroll;
use crate::device::DeviceId;
use crate::jwt::{Claims, Signer, Token, TokenHash};
use crate::metrics::Metrics;
use crate::problem::{Code, Problem};
use crate::serial::Serial;
use crate::store::ledger::{Known, Ledger};
use crate::store::{Answer, Dead, Kill, Killed, New, Op, Outcome, Status, StoreError, TokenStore};

/// Issues tokens and redeems them.
pub struct Provisioner {
    store: Arc<dyn TokenStore>,
    ledger: Arc<Ledger>,
    publisher: Arc<Publisher>,
    signer: Signer,
    rules: Rules,
    metrics: Arc<Metrics>,
}

/// What the configuration says of tokens and certificates.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Lifetime of a token in seconds.
    pub token_ttl_s: u64,
    /// May a device that has an active certificate onboard again?
    pub reenroll: Reenroll,
    /// Renewal revokes the certificate that it replaces.
    pub renew_revokes: bool,
    /// For how many days after its expiry a certificate can be renewed.
    pub renew_after_expiry_days: u32,
}

/// A piece of work that has passed all checks that need no store.
#[derive(Debug)]
pub enum Job {
    /// Issue a token.
    Issue(Issue),
    /// Redeem a token for a certificate.
    Redeem(Box<Redeem>),
    /// Sign another certificate for a device that has one.
    Renew(Box<Renew>),
    /// Revoke a device's certificates and kill its token.
    Revoke(Revoke),
    /// Count the live tokens.
    Count,
}

/// A planned onboarding.
#[derive(Debug)]
pub struct Issue {
    token: Token,
    replace: bool,
    client: IpAddr,
}

/// A planned redemption.
#[derive(Debug)]
pub struct Redeem {
    token: Token,
    csr: Csr,
    serial: Serial,
    user_id: Option<String>,
    client: IpAddr,
}

/// A planned renewal.
#[derive(Debug)]
pub struct Renew {
    /// The certificate that the device has shown.
    old: Record,
    csr: Csr,
    serial: Serial,
    client: IpAddr,
}

/// A planned revocation.
#[derive(Debug)]
pub struct Revoke {
    device: DeviceId,
    client: IpAddr,
}

/// What became of a [`Job`].
#[derive(Debug)]
pub enum Done {
    /// A token was issued.
    Issued(Token),
    /// A certificate was signed and recorded.
    Signed(Box<Signed>),
    /// The device's certificates are revoked and its token is dead.
    Revoked(DeviceId),
    /// So many tokens are live.
    Counted(u64),
}

/// A certificate and the CA that signed it.
#[derive(Debug)]
pub struct Signed {
    /// The device's certificate.
    pub leaf: Leaf,
    /// The CA.
    pub issuer: Arc<Issuer>,
    /// It was signed when the device asked for it before.
    again: bool,
}

/// A finished batch.
#[derive(Debug)]
pub struct Batch {
    /// One for each job, in their order.
    pub done: Vec<Result<Done, Problem>>,
    /// To be run by [`Provisioner::clean_up`] after the answers were sent.
    pub after: Vec<Op>,
}

impl Provisioner {
    /// A provisioner over these parts.
    pub fn new(
        store: Arc<dyn TokenStore>,
        ledger: Arc<Ledger>,
        publisher: Arc<Publisher>,
        signer: Signer,
        rules: Rules,
        metrics: Arc<Metrics>,
    ) -> Self {
        Provisioner { store, ledger, publisher, signer, rules, metrics }
    }

    /// The CA and its record, for what is only read.
    pub fn ca(&self) -> &Ca {
        self.publisher.ca()
    }

    /// The lifetime of a new token in seconds.
    pub fn token_ttl_s(&self) -> u64 {
        self.rules.token_ttl_s
    }

    /// Which store answers.
    pub fn store_status(&self) -> Status {
        self.store.status()
    }

    /// Why tokens cannot be issued or certificates signed now; empty if they can.
    pub fn obstacles(&self, now: Now) -> Vec<String> {
        let mut reasons = Vec::new();
        if let Err(error) = self.issuer(now) {
            reasons.push(error.to_string());
        }
        let trouble = self.ca().registry().trouble();
        reasons.extend(trouble.map(|why| format!("the record cannot be written: {why}")));
        reasons.extend(self.publisher.failure());
        let status = self.store.status();
        if status.full {
            reasons.push(StoreError::Full.to_string());
        }
        if let Some(away) = status.away.filter(|_| status.redis_required) {
            reasons.push(format!("Redis is away: {}", away.why));
        }
        if status.foreign_ca {
            reasons.push("another CA than ours is entered in Redis".to_owned());
        }
        reasons
    }

    /// What is well today and will not be for long.
    pub fn warnings(&self, now: Now) -> Vec<String> {
        let status = self.store.status();
        let lasting = status.away.filter(|away| away.lasting && !status.redis_required);
        let lasting = lasting
            .map(|away| format!("Redis is away and will not be back by itself: {}", away.why));
        self.publisher.warning(now).into_iter().chain(lasting).collect()
    }

    fn issuer(&self, now: Now) -> Result<Arc<Issuer>, CaError> {
        self.ca().check_clock(now)?;
        let issuer = self.ca().issuer().ok_or(CaError::ClockNotSet)?;
        issuer.check_dates(now)?;
        Ok(issuer)
    }
}

// Planning: all that can be refused without the store.
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
        if self.rules.reenroll == Reenroll::Deny && self.ca().registry().has_active(&device, now) {
            return Err(not_issued(Code::DeviceHasActiveCertificate, &device));
        }
        let mut jti = [0; 16];
        getrandom::fill(&mut jti).map_err(|e| Problem::from(Code::ServiceUnavailable).log(e))?;
        let iat = now.unix_s();
        let exp = iat + self.rules.token_ttl_s;
        let token = self.signer.sign(Claims { device_id: device, iat, exp, jti: Some(jti) });
        Ok(Job::Issue(Issue { token, replace, client }))
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
        let look = self.ca().registry().look(&token.hash, &token.claims.device_id, now);
        if look.recorded_token || self.ledger.knows_as_spent(&token.hash) {
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
    pub fn check_certificate(&self, der: Option<&[u8]>, now: Now) -> Result<Record, Problem> {
        let der = der.ok_or(Code::ClientCertificateRequired)?;
        self.issuer(now)?;
        let record = self.ca().identify(der, self.rules.renew_after_expiry_days, now)?;
        self.publisher.is_shown(&record.serial);
        Ok(record)
    }

    /// Plans the renewal of the checked certificate `old` for the key in `csr`.
    ///
    /// # Errors
    /// When the CSR is refused or is not the device's.
    pub fn plan_renew(&self, old: Record, csr: &str, client: IpAddr) -> Result<Job, Problem> {
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

// Running a batch.
impl Provisioner {
    /// Runs the jobs, each with its own outcome.
    pub fn run(&self, jobs: Vec<Job>, now: Now) -> Batch {
        let ops: Vec<Op> = jobs.iter().filter_map(Job::op).collect();
        let answers = if ops.is_empty() { Vec::new() } else { self.store.run(&ops, now) };
        let mut answers = answers.into_iter();
        let mut left = Left::default();
        let decided: Vec<Decided> =
            jobs.into_iter().map(|job| self.decide(job, &mut answers, &mut left, now)).collect();
        let mut done = self.record(decided, &mut left, now);
        self.publish_revoked(&mut done, &left);
        self.publisher.watch_record(clock::now());
        if !left.back.is_empty() {
            self.store.run(&left.back, clock::now());
        }
        Batch { done, after: left.after }
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
        job: Job,
        answers: &mut impl Iterator<Item = Answer>,
        left: &mut Left,
        now: Now,
    ) -> Decided {
        let mut answer = || answers.next().unwrap_or(Err(StoreError::Undecided));
        match job {
            Job::Issue(issue) => Decided::Done(self.issued(issue, answer(), &mut left.back, now)),
            Job::Redeem(redeem) => match granted(&redeem, answer()) {
                Ok(()) => Decided::Granted(Grant::Token(redeem)),
                Err(problem) => Decided::Done(Err(problem)),
            },
            Job::Renew(renew) => Decided::Granted(Grant::Certificate(renew)),
            Job::Revoke(revoke) => Decided::Done(self.revoked(revoke, answer(), left)),
            Job::Count => Decided::Done(match answer() {
                Ok(Outcome::Counted(count)) => Ok(Done::Counted(count)),
                other => Err(unexpected(other)),
            }),
        }
    }

    fn issued(
        &self,
        issue: Issue,
        answer: Answer,
        back: &mut Vec<Op>,
        now: Now,
    ) -> Result<Done, Problem> {
        let Issue { token, client, .. } = issue;
        let device = &token.claims.device_id;
        let (instead, killed) = match answer {
            Ok(Outcome::Issued { instead, killed }) => (instead, killed),
            Ok(Outcome::AlreadyActive { expires_at_ms }) => {
                let left_s = expires_at_ms.saturating_sub(now.unix_ms) / 1000;
                return Err(not_issued(Code::TokenAlreadyActive, device)
                    .field("expiresAt", clock::rfc3339(expires_at_ms))
                    .field("expiresInSeconds", left_s));
            }
            other => return Err(unexpected(other).log_more(format!("device {device}"))),
        };
        let token = instead.unwrap_or(token);
        let device = &token.claims.device_id;
        // The device may have redeemed another token between the first look and the claim.
        if self.rules.reenroll == Reenroll::Deny && self.ca().registry().has_active(device, now) {
            let problem = not_issued(Code::DeviceHasActiveCertificate, device);
            back.push(Op::TakeBack(token));
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

    /// What can be done here is done first, and an error says so beside what it is about.
    fn revoked(&self, revoke: Revoke, answer: Answer, left: &mut Left) -> Result<Done, Problem> {
        let Revoke { device, client } = revoke;
        let Killed { dead, known, .. } = match answer {
            Ok(Outcome::Killed(killed)) => *killed,
            other => return Err(unexpected(other)),
        };
        let registry = self.ca().registry();
        // One whose certificate is recorded was used up; its keys were about to go.
        let dead = dead.filter(|dead| !registry.knows_token(&dead.hash));
        if let Some(dead) = &dead {
            self.metrics.tokens_killed.add(1);
            log::info!("token {} of {device} killed, by {client}", dead.hash.short());
        }
        let serials = registry.revoke(&device, clock::now())?;
        left.revoked |= !serials.is_empty();
        self.metrics.certificates_revoked.add(serials.len() as u64);
        for serial in &serials {
            log::info!("certificate {serial} of {device} revoked, by {client}");
        }
        if !known.redeemed_elsewhere.is_empty() || known.unsure {
            return Err(not_everywhere(&known, &serials, dead.as_ref()));
        }
        if known.any || dead.is_some() || registry.knows_device(&device) {
            return Ok(Done::Revoked(device));
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
    fn publish_revoked(&self, done: &mut [Result<Done, Problem>], left: &Left) {
        let is_revocation = |done: &Result<Done, Problem>| matches!(done, Ok(Done::Revoked(_)));
        if !left.revoked && !done.iter().any(is_revocation) {
            return;
        }
        let Err(error) = self.publisher.publish(clock::now()) else { return };
        let problem = Problem::from(error).text("Revoked, but the CRL could not be published yet");
        let revoked = done.iter_mut().filter(|done| is_revocation(done));
        revoked.for_each(|done| *done = Err(problem.clone()));
    }

    /// Under the record's lock: checks, signs and enters one after the other, then makes all entries
    /// durable at once.
    fn record(
        &self,
        decided: Vec<Decided>,
        left: &mut Left,
        now: Now,
    ) -> Vec<Result<Done, Problem>> {
        if !decided.iter().any(|decided| matches!(decided, Decided::Granted(_))) {
            return decided.into_iter().filter_map(Decided::into_done).collect();
        }
        let mut entries = self.ca().registry().begin();
        let signed: Vec<Recording> =
            decided.into_iter().map(|d| self.enter(d, &mut entries, left, now)).collect();
        let mut committed = entries.commit().into_iter();
        signed
            .into_iter()
            .map(|recording| match recording {
                Recording::Done(done) => done,
                Recording::Entered(grant, signed) => {
                    let result = committed.next().unwrap_or_else(|| Err(not_committed()));
                    self.recorded(grant, signed, result, left)
                }
            })
            .collect()
    }

    fn enter(
        &self,
        decided: Decided,
        entries: &mut Entries<'_>,
        left: &mut Left,
        now: Now,
    ) -> Recording {
        let grant = match decided {
            Decided::Done(done) => return Recording::Done(done),
            Decided::Granted(grant) => grant,
        };
        match self.sign(&grant, entries, now) {
            Ok(signed) if signed.again => {
                grant.log_again(&signed.leaf);
                Recording::Done(Ok(Done::Signed(Box::new(signed))))
            }
            Ok(signed) => {
                entries.add(&signed.leaf, Some(grant.origin()), now);
                Recording::Entered(grant, signed)
            }
            Err(problem) => {
                if problem.code != Code::TokenAlreadyUsed {
                    left.back.extend(grant.give_back());
                }
                Recording::Done(Err(grant.refused(problem)))
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
        let token = &redeem.token;
        if entries.knows_token(&token.hash) || self.ledger.knows_as_killed(&token.hash) {
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
        let record = self.ca().registry().by_serial(&renew.old.serial);
        let record = record.ok_or(IdentityError::NotOurs("gone from the record"))?;
        self.ca().still_counts(&record, self.rules.renew_after_expiry_days, now)
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
        result: Result<(), RegistryError>,
        left: &mut Left,
    ) -> Result<Done, Problem> {
        match result {
            Ok(()) => {
                grant.log_signed(&signed.leaf);
                self.count(&grant);
                match grant {
                    Grant::Token(redeem) => left.after.push(Op::Finish(redeem.token)),
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
                    left.back.extend(grant.give_back());
                }
                let problem = Problem::from(error);
                log::error!("certificate {} could not be recorded: {problem}", signed.leaf.serial);
                Err(grant.refused(problem))
            }
        }
    }
}

/// What a batch leaves to be done.
#[derive(Default)]
struct Left {
    /// Before the answers: what must be given back.
    back: Vec<Op>,
    /// After the answers.
    after: Vec<Op>,
    /// Something was revoked that a new list has to name.
    revoked: bool,
}

impl Job {
    /// What the store is asked for it, if it is asked.
    fn op(&self) -> Option<Op> {
        Some(match self {
            Job::Issue(Issue { token, replace, client }) => Op::Issue(New {
                token: token.clone(),
                replaces: *replace,
                subscriber: (*client).into(),
            }),
            Job::Redeem(redeem) => Op::Consume(redeem.token.clone(), redeem.serial),
            Job::Renew(_) => return None,
            // Whatever its `iat` says: another instance's clock may be ahead.
            Job::Revoke(Revoke { device, .. }) => {
                let device = device.clone();
                Op::Kill(Kill { device, issued_by_s: u64::MAX, spare: None, copies: Vec::new() })
            }
            Job::Count => Op::Count,
        })
    }
}

/// A job after the store's first answer.
enum Decided {
    Done(Result<Done, Problem>),
    /// The certificate is still to be signed.
    Granted(Grant),
}

impl Decided {
    fn into_done(self) -> Option<Result<Done, Problem>> {
        match self {
            Decided::Done(done) => Some(done),
            Decided::Granted(_) => None,
        }
    }
}

/// What entitles to a certificate.
enum Grant {
    /// A token, which is now this attempt's.
    Token(Box<Redeem>),
    /// An earlier certificate.
    Certificate(Box<Renew>),
}

/// A job in the recording phase.
enum Recording {
    Done(Result<Done, Problem>),
    Entered(Grant, Signed),
}

impl Grant {
    /// What the record will name.
    fn origin(&self) -> Origin {
        match self {
            Grant::Token(redeem) => {
                let Token { hash, claims, .. } = &redeem.token;
                Origin::Token(Redeemed { hash: *hash, iat: claims.iat, exp: claims.exp })
            }
            Grant::Certificate(renew) => Origin::Renewal(renew.old.serial),
        }
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
fn unexpected(answer: Answer) -> Problem {
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

fn not_committed() -> RegistryError {
    RegistryError::NotWritten { why: "no result".to_owned(), left_behind: true }
}

/// For the log: which token was refused. The client is told nothing that it did not send.
fn refused(problem: impl Into<Problem>, hash: &TokenHash, device: &DeviceId) -> Problem {
    problem.into().log_more(format!("token {} of {device}", hash.short()))
}

/// Why a revocation is not done: another instance has, or may have, a certificate of the device. With
/// what was done all the same.
fn not_everywhere(known: &Known, revoked: &[Serial], dead: Option<&Dead>) -> Problem {
    let mut text: String = known
        .redeemed_elsewhere
        .iter()
        .filter_map(|mark| mark.split_once(' '))
        .map(|(instance, serial)| {
            format!(
                "Not revoked: instance {instance} has redeemed a token of this device for \
                 certificate {serial}, which only that instance can revoke. "
            )
        })
        .collect();
    if known.unsure {
        text += "Not known while Redis is away: whether another instance has redeemed a token of \
                 this device. ";
    }
    let serials: Vec<String> = revoked.iter().map(|s| format!("certificate {s} revoked")).collect();
    let serials =
        if serials.is_empty() { "no certificate revoked".to_owned() } else { serials.join(", ") };
    let token =
        dead.map_or("no token killed".to_owned(), |d| format!("token {} killed", d.hash.short()));
    let problem = Problem::from(Code::ServiceUnavailable).log(&text);
    problem.text(format!("{text}Done here: {serials}, {token}."))
}

/// The device has none, as far as is recorded here.
pub fn no_certificate() -> Problem {
    Problem::from(Code::CertificateNotFound).text("No certificate found for this device")
}

fn not_issued(problem: impl Into<Problem>, device: &DeviceId) -> Problem {
    problem.into().log_more(format!("device {device}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::files::test_dir::TestDir;
    use std::net::Ipv4Addr;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    /// A store that grants what it is asked.
    struct Willing;

    impl TokenStore for Willing {
        fn run(&self, ops: &[Op], _: Now) -> Vec<Answer> {
            let answer = |op: &Op| match op {
                Op::Issue(_) => Ok(Outcome::Issued { instead: None, killed: None }),
                Op::Count => Ok(Outcome::Counted(1)),
                _ => Err(StoreError::Undecided),
            };
            ops.iter().map(answer).collect()
        }

        fn status(&self) -> Status {
            Status::default()
        }
    }

    #[test]
    fn only_certificates_wait_for_the_disk() {
        let dir = TestDir::new();
        let now = clock::now();
        let settings = config::Ca {
            dir: dir.to_path_buf(),
            root_validity_years: 10,
            device_validity_days: 90,
        };
        let ca = Arc::new(Ca::open(&settings, now).unwrap());
        let rules = Rules {
            token_ttl_s: 300,
            reenroll: Reenroll::Deny,
            renew_revokes: true,
            renew_after_expiry_days: 0,
        };
        let provisioner = Provisioner::new(
            Arc::new(Willing),
            Arc::new(Ledger::new(10)),
            Arc::new(Publisher::new(
                Arc::clone(&ca),
                None,
                Arc::new(Metrics::new(std::iter::empty())),
            )),
            Signer::new(b"a secret of the test"),
            rules,
            Arc::new(Metrics::new(std::iter::empty())),
        );
        // As while another worker's certificates are written.
        let _writing = ca.registry().begin();
        let (sender, done) = mpsc::channel();
        thread::spawn(move || {
            let device = DeviceId::parse("d").unwrap();
            let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let job = provisioner.plan_issue(device, false, client, now).unwrap();
            let issued = provisioner.run(vec![job, Job::Count], now).done;
            let _ = sender.send(issued.iter().filter(|done| done.is_ok()).count());
        });
        assert_eq!(done.recv_timeout(Duration::from_secs(10)), Ok(2));
    }
}
