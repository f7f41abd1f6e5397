//! Running a batch of jobs, in fixed phases: [`super::prepare`] → the store, first round → what is to be
//! signed ([`super::sign`]) → if anything was revoked, one new list → the store, second round: what must
//! be given back before the answer → what was signed before for who asks again ([`super::again`]). What
//! can wait until after the answer is returned as [`Batch::after`].

use super::plan::sign;
use super::prepare::Prepared;
use super::{
    Batch, By, Change, Changed, Done, Grant, Issue, Job, Onboarding, Provisioner, Redeem, Revoke,
    RevokeOne, Rewrite, Sign, Work, no_certificate, not_issued,
};
use crate::ca::issuer::Leaf;
use crate::ca::record::Reason;
use crate::clock::{self, Now};
use crate::device::DeviceId;
use crate::devices::enrol::Edit;
use crate::devices::{CLOCKS_APART_S, Row, Terms};
use crate::digits;
use crate::problem::{Code, Problem};
use crate::serial::Serial;
use crate::store::{Answer, Found, Op, Outcome, StoreError};

/// How often a job asks the store after the first time: for a token in place of the one that the device
/// has, and to redeem that.
const MOST_FURTHER: usize = 2;

/// Work that can go on, or why it is refused.
pub(super) type Planned = Result<Work, Problem>;

/// Work on its way through the phases.
pub(super) enum Step {
    Done(Result<Done, Problem>),
    /// The store is to be asked for this, first or further.
    Next(Work),
    /// The certificate is still to be signed.
    Granted(Box<Sign>),
    /// It is signed and entered; whether it is recorded, the commit says.
    Entered(Box<Sign>, Box<Leaf>),
}

impl From<Planned> for Step {
    fn from(planned: Planned) -> Self {
        planned.map_or_else(|problem| Step::Done(Err(problem)), Step::Next)
    }
}

impl Provisioner {
    /// Runs the jobs, each with its own outcome.
    pub fn run(&self, jobs: Vec<Job>, now: Now) -> Batch {
        let mut undo = Vec::new();
        let begin = |job: Job| (Step::from(self.check_dated(job.work, now)), job.again);
        let (mut steps, again): (Vec<_>, Vec<_>) = jobs.into_iter().map(begin).unzip();
        for _ in 0..=MOST_FURTHER {
            if steps.iter().any(|step| matches!(step, Step::Next(_))) {
                steps = self.go_on(steps, &mut undo, now);
            }
        }
        let (mut done, after) = self.record(steps, &mut undo, now);
        self.publish_revoked(&mut done);
        self.publisher.troubles(now);
        self.run_ops(&undo, clock::now);
        self.give_again(&mut done, &again, now);
        Batch { done, after }
    }

    /// What has a date is not done before the clock is set.
    fn check_dated(&self, planned: Planned, now: Now) -> Planned {
        if let Ok(Work::Revoke(_) | Work::RevokeOne(_) | Work::Rewrite(_)) = planned {
            self.ca().check_clock(now)?;
        }
        planned
    }

    /// Prepares the work and asks the store. What of it must be taken back before the answers goes to
    /// `undo`.
    fn ask(&self, works: Vec<Work>, undo: &mut Vec<Op>, now: Now) -> Vec<Step> {
        let mut ops = Vec::new();
        let mut into_ops = |prepared: Prepared| prepared.into_ops(self, now, &mut ops);
        let prepared = self.prepare(works, now).into_iter();
        let asked: Vec<_> = prepared.map(|prepared| prepared.and_then(&mut into_ops)).collect();
        let mut answers = self.run_ops(&ops, || now).into_iter();
        let changed: Vec<DeviceId> =
            asked.iter().flatten().flat_map(Work::tells_of).cloned().collect();
        // Others are told, and what only they know is learnt. Where nothing is shared nobody is left.
        let told = || self.sharing.look_up(&changed) || self.sharing.is_alone();
        let shared = changed.is_empty() || told();
        let decide = |asked| match asked {
            Ok(work) => self.decide(work, &mut answers, shared, undo, now),
            Err(problem) => Step::Done(Err(problem)),
        };
        asked.into_iter().map(decide).collect()
    }

    /// Asks the store for all that is to be asked now: one trip.
    fn go_on(&self, steps: Vec<Step>, undo: &mut Vec<Op>, now: Now) -> Vec<Step> {
        let mut further = Vec::new();
        let take = |step| match step {
            Step::Next(work) => {
                further.push(work);
                None
            }
            step => Some(step),
        };
        let steps: Vec<Option<Step>> = steps.into_iter().map(take).collect();
        let mut next = self.ask(further, undo, now).into_iter();
        steps.into_iter().filter_map(|step| step.or_else(|| next.next())).collect()
    }

    pub(super) fn run_ops(&self, ops: &[Op], now: impl FnOnce() -> Now) -> Vec<Answer> {
        if ops.is_empty() { Vec::new() } else { self.store.run(ops, now()) }
    }

    /// Runs what could wait until after the answers: what others have to know of a device, before its
    /// lease is free.
    pub fn clean_up(&self, after: Vec<Op>) {
        let is_row = |op: &Op| matches!(op, Op::Tell(..));
        let (rows, rest): (Vec<_>, Vec<_>) = after.into_iter().partition(is_row);
        self.run_ops(&rows, clock::now);
        self.run_ops(&rest, clock::now);
    }

    /// Reads the store's answers, as many as were asked for the work; only what is to be signed has
    /// anything left to do.
    fn decide(
        &self,
        work: Work,
        answers: &mut impl Iterator<Item = Answer>,
        shared: bool,
        undo: &mut Vec<Op>,
        now: Now,
    ) -> Step {
        let mut answer = || answers.next().unwrap_or(Err(StoreError::Undecided));
        Step::Done(match work {
            Work::Issue(issue) => return self.issued(issue, answer(), undo, now),
            Work::Sign(mut sign) => match sign.is_granted(answer) {
                Ok(()) => return Step::Granted(sign),
                Err(problem) => Err(sign.refused(problem)),
            },
            Work::Revoke(revoke) => self.revoked(revoke, answer(), shared),
            Work::RevokeOne(revoke) => self.revoke_one(revoke, now),
            Work::Rewrite(rewrite) => {
                let asked = rewrite.changes.len();
                let answers = std::iter::repeat_with(answer).take(asked);
                Ok(self.rewritten(rewrite, answers, shared, now))
            }
            Work::Count => match answer() {
                Ok(Outcome::Counted(count)) => Ok(Done::Counted(count)),
                other => Err(unexpected(other)),
            },
        })
    }

    fn issued(&self, mut issue: Box<Issue>, answer: Answer, undo: &mut Vec<Op>, now: Now) -> Step {
        let Onboarding { device, shown, replace, .. } = &mut issue.asked;
        let (token, killed, found) = match answer {
            Ok(Outcome::Issued { token, killed, found }) => (token, killed, *found),
            // The device has lost its token, or somebody with its secret has it.
            Ok(Outcome::AlreadyActive { .. })
                if !*replace && issue.row.has_shown_secret(shown, now.unix_s()) =>
            {
                *replace = true;
                return Step::Next(Work::Issue(issue));
            }
            other => return Step::Done(Err(not_issued(not_given(other, now), device))),
        };
        let Onboarding { device, client, csr, .. } = &issue.asked;
        let row = match self.judge_found(&issue.asked, found, now) {
            Ok(known) => known,
            Err(code) => {
                undo.push(Op::Remove(token));
                return Step::Done(Err(not_issued(code, device)));
            }
        };
        let (hash, to) = (token.hash.short(), digits::address(*client));
        log::info!(
            event = "token_issued", device:%, client = to;
            "token {hash} issued for {device}, to {to}"
        );
        self.metrics.tokens_issued.add(1);
        if let Some(old) = killed {
            self.metrics.tokens_killed.add(1);
            let hash = old.hash.short();
            log::info!(
                event = "token_killed", device:%, client:%;
                "token {hash} of {device} killed: replaced, by {client}"
            );
        }
        let Some(csr) = csr else { return Step::Done(Ok(Done::Issued(token))) };
        let redeem = Redeem { token, user_id: None, row, spends: None };
        let work = sign(Grant::Token(Box::new(redeem)), csr.clone(), *client);
        work.into()
    }

    /// The device may have redeemed another token between the first look and the claim, or others know
    /// what this instance does not. Returns the row as it is known now.
    fn judge_found(&self, asked: &Onboarding, found: Found, now: Now) -> Result<Row, Code> {
        let (device, Found { row, holder }) = (&asked.device, found);
        let known = self.devices.row(device).merge(row.clone());
        self.learn(device, row, now);
        if !self.knows_holder(device, holder) {
            return Err(Code::ServiceUnavailable);
        }
        self.judge(asked, &known, now)?;
        Ok(known)
    }

    /// Keeps a registration of which only others knew: this instance decides on the redemption, too.
    pub(super) fn learn(&self, device: &DeviceId, row: Row, now: Now) {
        if row == Row::default() {
            return;
        }
        let news = Row { bound: Default::default(), ..row.news_for(&self.devices.row(device)) };
        if let Err(error) = self.devices.enter(vec![(device.clone(), news)], false, now) {
            log::error!(device:%; "what Redis says of {device} was not kept: {error}");
        }
    }

    /// Another instance has signed for the device, which is not in the record yet: it is entered now.
    /// `false` if that is not done in time; where nothing is shared the holder does not count.
    fn knows_holder(&self, device: &DeviceId, holder: Option<Serial>) -> bool {
        let denies = !self.rules.reenroll;
        let unknown = |serial: Serial| denies && self.ca().record().by_serial(&serial).is_none();
        !holder.is_some_and(unknown)
            || self.sharing.look_up(std::slice::from_ref(device))
            || !self.sharing.status(clock::now()).shared
    }

    fn revoked(&self, revoke: Revoke, answer: Answer, shared: bool) -> Result<Done, Problem> {
        let Revoke { device, reason, edit, by } = revoke;
        let (dead, shared) = match answer {
            Ok(Outcome::Killed { dead, told }) => (dead, shared && told),
            other => return Err(unexpected(other)),
        };
        let record = self.ca().record();
        // One whose certificate is recorded was used up; its keys were about to go.
        if let Some(dead) = dead.filter(|dead| !record.knows_token(&dead.hash)) {
            self.metrics.tokens_killed.add(1);
            let hash = dead.hash.short();
            log::info!(
                event = "token_killed", device:%, key = by.key(), client:% = by.client;
                "token {hash} of {device} killed, {by}"
            );
        }
        // The bound is known to all by now: what cannot be revoked here at once is revoked later.
        let serials = record
            .revoke(&device, reason, self.revoked_at(&device))
            .inspect_err(|_| self.devices.note_killed([device.clone()]))?;
        self.note_revoked(&serials, device.as_str(), reason, &by);
        if edit.is_some() {
            log::info!(
                event = "device_changed", device:%, key = by.key(), client:% = by.client;
                "device {device} blocked, {by}"
            );
        }
        let is_known = self.ledger.knows_device(&device) || record.newest(&device).is_some();
        if is_known || self.devices.row(&device).is_listed() {
            return Ok(Done::Revoked { of: device.as_str().to_owned(), serial: None, shared });
        }
        if !shared {
            // If there is a token, or a certificate of another instance, it dies when that is told;
            // whether there is, nobody knows.
            let why = format!("device {device}: what Redis knows of it is looked for later");
            return Err(Problem::from(Code::ServiceUnavailable).log(why));
        }
        Err(no_certificate())
    }

    /// Dated as others date what the bound kills: of two dates the earlier counts, and of two reasons of
    /// one date the one that says something.
    fn revoked_at(&self, device: &DeviceId) -> Now {
        let bound_ms = self.devices.bound(device).0.c.saturating_sub(CLOCKS_APART_S) * 1000;
        let now = clock::now();
        Now { unix_ms: now.unix_ms.min(bound_ms), ..now }
    }

    /// Revokes a certificate if it is of the device, or the server, of this name; one that is unknown
    /// here is asked for in Redis.
    fn revoke_one(&self, revoke: RevokeOne, now: Now) -> Result<Done, Problem> {
        let RevokeOne { of, serial, reason, by } = revoke;
        let record = self.ca().record();
        let is_of = || {
            let found = record.by_serial(&serial);
            found.is_some_and(|found| found.device.as_str() == of)
                || record.is_of_server(&serial, &of)
        };
        let is_alone = self.sharing.is_alone();
        if !is_of() {
            let is_asked = record.by_serial(&serial).is_some() || self.sharing.look_up_one(serial);
            if !is_asked && !is_alone {
                let why = "whether another instance has it is not known now";
                return Err(Problem::from(Code::ServiceUnavailable).log(why));
            }
            if !is_of() {
                return Err(Code::CertificateNotFound.into());
            }
        }
        let serials = record.revoke_these(&[serial], reason, now)?;
        self.note_revoked(&serials, &of, reason, &by);
        let is_told = || self.sharing.status(now).shared && self.sharing.look_up(&[]);
        let shared = is_alone || is_told();
        Ok(Done::Revoked { of, serial: Some(serial), shared })
    }

    fn note_revoked(&self, serials: &[Serial], of: &str, reason: Reason, by: &By) {
        self.metrics.certificates_revoked.add(serials.len() as u64);
        for serial in serials {
            log::info!(
                event = "certificate_revoked", device = of, serial:%, key = by.key(), client:% = by.client;
                "certificate {serial} of {of} revoked: {reason}, {by}"
            );
        }
    }

    /// The rows are on disk; has Redis been told of all?
    fn rewritten(
        &self,
        rewrite: Rewrite,
        answers: impl Iterator<Item = Answer>,
        mut shared: bool,
        now: Now,
    ) -> Done {
        let Rewrite { changes, by } = rewrite;
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
        log_rewritten(&changes, &by, now);
        Done::Rewritten { changes, shared }
    }

    /// Publishes one list for all that the batch has revoked. A revocation that no broker can learn of
    /// is no success; it is tried again by itself.
    fn publish_revoked(&self, done: &mut [Result<Done, Problem>]) {
        let is_revocation = |done: &Result<Done, Problem>| matches!(done, Ok(Done::Revoked { .. }));
        if !done.iter().any(is_revocation) {
            return;
        }
        let Err(error) = self.publisher.publish(clock::now()) else { return };
        let problem = Problem::from(error).text("Revoked, but the CRL could not be published yet");
        let revoked = done.iter_mut().filter(|done| is_revocation(done));
        revoked.for_each(|done| *done = Err(problem.clone()));
    }
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
    let devices: Vec<&str> = changes.iter().take(NAMED).map(|c| c.device.as_str()).collect();
    log::info!(
        event = "device_changed", device = devices.join(","), key = by.key(), client:% = by.client;
        "device {}{more}, {by}", named.join("; ")
    );
}

fn said_of(edit: &Edit, living: Option<&Terms>) -> String {
    let begun = edit.register.map(|secret| match secret {
        Some(_) => "registered with a secret",
        None => "registered without a secret",
    });
    let block = edit.blocked.map(|blocked| if blocked { "blocked" } else { "unblocked" });
    let said: Vec<&str> = [begun, block].into_iter().flatten().collect();
    let end = begun.and(living).map(|terms| clock::rfc3339(terms.end.saturating_mul(1000)));
    match end {
        _ if said.is_empty() => "changed".to_owned(),
        Some(end) => format!("{}, until {end}", said.join(" and ")),
        None => said.join(" and "),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::Ca;
    use crate::ca::publisher::Publisher;
    use crate::ca::record::Reason;
    use crate::config;
    use crate::devices::Instance;
    use crate::devices::enrol::{Maker, Shown, Stage};
    use crate::devices::table::Devices;
    use crate::files::test_dir::TestDir;
    use crate::jwt::{Claims, Signer, Token, TokenHash};
    use crate::locks::locked;
    use crate::metrics::Metrics;
    use crate::provisioner::Redemption;
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
        let rules = config::Rules {
            token_ttl_s: 300,
            enrolment: None,
            reenroll: false,
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
            publisher: Arc::new(Publisher::new(ca, None, None, None, Arc::clone(&metrics))),
            sharing: Arc::new(Sharing::new(Mode::Alone)),
            signer: Signer::new(b"a secret of the test"),
            rules,
            metrics,
            spending: Default::default(),
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
            csr: None,
        };
        provisioner.plan_issue(asked, now).unwrap()
    }

    fn plan_redeem(provisioner: &Provisioner, token: Token, again: bool, now: Now) -> Job {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, token.claims.device_id.as_str());
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = params.serialize_request(&key).unwrap().pem().unwrap();
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let (device, user_id) = (None, None);
        let asked = Redemption { csr: &csr, device, user_id, client, again };
        provisioner.plan_redeem(token, asked, now).unwrap()
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
            let issued = worker.run(vec![job, Job::COUNT], now).done;
            let _ = sender.send(issued.iter().filter(|done| done.is_ok()).count());
        });
        assert_eq!(done.recv_timeout(Duration::from_secs(10)), Ok(2));
    }

    /// What is asked of the others holds up all that are in the batch.
    #[test]
    fn tokens_that_are_shown_again_are_looked_up_once_a_batch() {
        let (dir, now) = (TestDir::new(), clock::now());
        let mut provisioner = provisioner(&dir, Arc::default(), now);
        provisioner.sharing = Arc::new(Sharing::new(Mode::Record));
        let sharing = Arc::clone(&provisioner.sharing);
        let others = thread::spawn(move || [sharing.answer_next(), sharing.answer_next()]);
        let names = ["b", "a", "c", "a"];
        let jobs = names.map(|name| {
            let device_id = DeviceId::parse(name).unwrap();
            let (iat, exp) = (now.unix_s() - 2, now.unix_s() - 1);
            let token = provisioner.signer.sign(Claims { device_id, iat, exp, jti: None });
            plan_redeem(&provisioner, token, true, now)
        });
        let refused = |done: &Result<Done, Problem>| done.as_ref().unwrap_err().code;
        let codes: Vec<Code> = provisioner.run(jobs.into(), now).done.iter().map(refused).collect();
        assert_eq!(codes, [Code::TokenExpired; 4]);
        provisioner.sharing.look_up(&[]);
        let devices = ["a", "b", "c"].map(|name| DeviceId::parse(name).unwrap());
        assert_eq!(others.join().unwrap(), [devices.to_vec(), vec![]]);
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
        let revoke = Job::revoke(device, false, Reason::Unspecified, by);
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
        let token = provisioner.token(device.clone(), now).unwrap();
        let job = plan_redeem(&provisioner, token.clone(), false, now);
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
        provisioner.rules.enrolment = Some(config::Enrolment::Registered);
        let device = DeviceId::parse("d").unwrap();
        let edit = Edit { register: Some(None), ..Edit::default() };
        let maker = Maker { name: None, instance: Instance([1; 16]), now };
        let registered = Row::default().edited(&edit, &maker).unwrap();
        provisioner.devices.enter(vec![(device.clone(), registered)], true, now).unwrap();
        let redeem = || {
            let token = provisioner.token(device.clone(), now).unwrap();
            let mut batch =
                provisioner.run(vec![plan_redeem(&provisioner, token, false, now)], now);
            let code = batch.done.remove(0).map(drop).map_err(|problem| problem.code);
            (code, batch.after.iter().any(|op| matches!(op, Op::Tell(..))))
        };
        let (file, kept) = (dir.join("devices.txt"), dir.join("kept"));
        std::fs::rename(&file, &kept).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert_eq!(redeem(), (Ok(()), true));
        assert_eq!(redeem(), (Err(Code::ServiceUnavailable), false));
        std::fs::remove_dir(&file).unwrap();
        std::fs::rename(&kept, &file).unwrap();
        assert_eq!(redeem(), (Err(Code::ServiceUnavailable), false), "it is written now");
        assert!(locked(&provisioner.spending).is_empty());
        assert_eq!(provisioner.devices.row(&device).stage(now.unix_s()), Stage::Spent);
    }
}
