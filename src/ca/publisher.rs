//! Keeps the list of revoked certificates published: after each revocation, when it is a day old, and
//! again soon when it could not be written; and has the broker told.
//!
//! Whoever revokes publishes in its own thread, so that the answer comes after the list. The rest is
//! done by one thread that sleeps until it is needed; while the hook runs in it, further changes are
//! noted and make one more run. The same thread tries again what could not be written,
//! revokes what was renewed, and has the record forget what ended long ago.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::crl::Crl;
use super::record::{Certificate, Reason};
use super::retention::Retention;
use super::{Ca, CaError, crl, hook};
use crate::clock::{self, DAY_S, Now};
use crate::locks::locked;
use crate::metrics::Metrics;
use crate::serial::Serial;
use crate::trial::Trial;

/// The longest sleep. The list is renewed daily by the wall clock, which may have gone on while the
/// machine was suspended, so it is looked at more often than that. Whoever sees that the clock was set
/// calls [`Publisher::keep_fresh`].
const LOOK: Duration = Duration::from_secs(3600);
/// The pause before a list that could not be written is tried again; doubled, up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// The pause before what could not be written is tried again.
const TRIAL_MS: u64 = 2000;

/// How long after its renewal a certificate is revoked, if the new one was not shown before.
const SUPERSEDED_AFTER_S: u64 = 3600;
/// Certificates that one warning names.
const NAMED: usize = 16;

/// Publishes the list of one CA.
pub struct Publisher {
    ca: Arc<Ca>,
    /// `CRL_HOOK`
    hook: Option<PathBuf>,
    /// Without one the record keeps all.
    retention: Option<Retention>,
    metrics: Arc<Metrics>,
    /// The record, and what else must be written.
    trials: Vec<Arc<Trial>>,
    /// Held until it is noted whether the last list was written: in the order of the lists.
    publishing: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// A list was written of which the hook does not know.
    hook_due: bool,
    /// There is something to look at.
    woken: bool,
    /// Why the last list could not be published.
    failure: Option<String>,
    /// When what could not be written is to be tried again, by [`Now::mono_ms`].
    trial_at: Option<u64>,
    /// Certificates whose place others have taken and that are to be revoked.
    superseded: Vec<Superseded>,
    /// When the record has last forgotten what ended long ago, by [`Now::mono_ms`].
    forgot_ms: Option<u64>,
}

/// A certificate whose place another has taken. It is revoked when the new one is shown, which proves that the device
/// has it; or after a while, in which a device whose answer was lost can ask again.
#[derive(Clone, Copy, Debug)]
struct Superseded {
    old: Serial,
    new: Serial,
    /// By [`Now::mono_ms`].
    due_ms: u64,
}

impl Publisher {
    /// A publisher that runs `hook` after each new list. Beside the record this is tried, too, when it
    /// could not be written.
    pub fn new(
        ca: Arc<Ca>,
        hook: Option<PathBuf>,
        retention: Option<Retention>,
        trial: Option<Arc<Trial>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let trials = [Arc::clone(ca.record().trial())].into_iter().chain(trial).collect();
        let (publishing, state, changed) = (Mutex::default(), Mutex::default(), Condvar::new());
        Publisher { ca, hook, retention, metrics, trials, publishing, state, changed }
    }

    /// What ended before this second is kept no more, here and wherever instances share it; 0 if all is.
    pub fn ended_before(&self, now: Now) -> u64 {
        let retention = self.retention.as_ref().filter(|_| self.ca.clock_is_plausible(now));
        retention.map_or(0, |retention| retention.ended_before(now))
    }

    /// The CA whose list it is.
    pub fn ca(&self) -> &Arc<Ca> {
        &self.ca
    }

    /// Publishes what is revoked now; the broker is told soon after. What fails is tried again
    /// without being asked.
    pub fn publish(&self, now: Now) -> Result<Arc<Crl>, CaError> {
        let _alone = locked(&self.publishing);
        let published = self.ca.publish_crl(now);
        let mut state = self.lock();
        match &published {
            Ok(_) => {
                state.failure = None;
                self.announce(&mut state);
            }
            Err(error) => {
                let why = format!("the CRL could not be published: {error}");
                if state.failure.as_ref() != Some(&why) {
                    log::error!("{why}");
                }
                // The first failure ends the long sleep; after that the pauses count.
                state.woken |= state.failure.is_none();
                state.failure = Some(why);
            }
        }
        self.changed.notify_all();
        published
    }

    /// Publishes a list if there is none, it is a day old, or the last could not be written; nothing
    /// as long as there is no CA or the clock is not set. Warns of what
    /// ends soon, at the start and daily.
    pub fn keep_fresh(&self, now: Now) {
        if self.ca.issuer().is_none() || !self.ca.clock_is_plausible(now) {
            return;
        }
        let known = self.ca.crl();
        let is_start = known.is_none();
        if is_start || self.was_ahead(now) {
            self.warn_of_later(now);
        }
        let is_due = known.or_else(|| self.find(now)).is_none_or(|list| list.is_due(now));
        if is_due || self.failure().is_some() {
            // What went wrong is logged and kept there.
            let _ = self.publish(now);
        }
        if is_due || is_start {
            self.warnings(now).iter().for_each(|warning| log::warn!("{warning}"));
        }
    }

    /// Publishes a new list if the clock that dated the last one was ahead: brokers take a list of the
    /// future for none, and refuse everybody. Cheap; to be asked whenever the clock may have been set.
    pub fn check_clock(&self, now: Now) {
        if let Some(retention) = &self.retention {
            retention.is_steady(now);
        }
        if self.was_ahead(now) {
            self.keep_fresh(now);
        }
    }

    /// Not while a list cannot be written: then that is tried again, at its own pace.
    fn was_ahead(&self, now: Now) -> bool {
        self.ca.crl().is_some_and(|list| now.unix_s() < list.made_at) && self.failure().is_none()
    }

    /// Names the certificates that a clock which was ahead has dated.
    fn warn_of_later(&self, now: Now) {
        let later = self.ca.record().begin_later(now);
        if later.is_empty() {
            return;
        }
        let named = |name: &dyn Fn(&Certificate) -> String, between: &str| {
            later.iter().take(NAMED).map(name).collect::<Vec<_>>().join(between)
        };
        let serial = named(&|c| c.serial.to_string(), ",");
        log::warn!(
            serial;
            "the clock was ahead when certificates were signed, which nobody takes until then, {} of \
             them: {}{}",
            later.len(),
            named(&|c| format!("{} of {}", c.serial, c.device), ", "),
            if later.len() > NAMED { " …" } else { "" }
        );
    }

    /// The list that an earlier process published, if it is still right. Whether that one lived to
    /// run the hook nobody knows.
    fn find(&self, now: Now) -> Option<Arc<Crl>> {
        let found = self.ca.find_crl(now)?;
        self.announce(&mut self.lock());
        self.changed.notify_all();
        Some(found)
    }

    fn announce(&self, state: &mut State) {
        state.hook_due |= self.hook.is_some();
        state.woken |= state.hook_due;
    }

    /// Why the last list could not be published, if it could not.
    pub fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// What ends soon: the CA, which no certificate outlives, and servers' certificates.
    pub fn warnings(&self, now: Now) -> Vec<String> {
        let end = self.ca.issuer().and_then(|issuer| now.ends_soon(issuer.not_after));
        let ca = end.map(|soon| format!("the CA {soon}"));
        ca.into_iter().chain(self.ca.record().ending_servers(now)).collect()
    }

    /// Tries the record, at the start.
    pub fn try_record(&self, now: Now) {
        self.ca.record().trial().try_out();
        self.troubles(now);
    }

    fn try_again(&self, now: Now) {
        self.lock().trial_at = None;
        let failed = self.trials.iter().filter(|trial| trial.trouble().is_some());
        failed.for_each(|trial| trial.try_out());
        self.troubles(now);
    }

    /// What cannot be written, and why. To be called after requests for which something had to be, and
    /// whenever somebody asks: it is then tried until it can be written.
    pub fn troubles(&self, now: Now) -> Vec<String> {
        let troubles: Vec<_> = self.trials.iter().filter_map(|trial| trial.trouble()).collect();
        let mut state = self.lock();
        if !troubles.is_empty() && state.trial_at.is_none() {
            state.trial_at = Some(now.mono_ms + TRIAL_MS);
            self.wake(&mut state);
        }
        troubles
    }

    /// Finds the certificates whose place others have taken and that are still to be revoked, at the
    /// start; what was renewed is if `renewals` revoke.
    pub fn load_superseded(&self, renewals: bool, now: Now) {
        let record = self.ca.record();
        for (old, new, since) in record.take_successors(renewals) {
            let waited_s = now.unix_s().saturating_sub(since).min(SUPERSEDED_AFTER_S);
            if record.by_serial(&old).is_some_and(|old| old.revoked_at.is_none()) {
                let due_ms = now.mono_ms + (SUPERSEDED_AFTER_S - waited_s) * 1000;
                self.lock().superseded.push(Superseded { old, new, due_ms });
            }
        }
    }

    /// `new` takes the place of `old`, which is to be revoked.
    pub fn supersede(&self, old: Serial, new: Serial, now: Now) {
        let due_ms = now.mono_ms + SUPERSEDED_AFTER_S * 1000;
        let mut state = self.lock();
        state.superseded.push(Superseded { old, new, due_ms });
        self.wake(&mut state);
    }

    /// A device has shown this certificate, so it has no more need of the one that this renews.
    pub fn is_shown(&self, new: &Serial) {
        let mut state = self.lock();
        let mut renewed = state.superseded.iter_mut().filter(|s| s.new == *new).peekable();
        if renewed.peek().is_some() {
            renewed.for_each(|superseded| superseded.due_ms = 0);
            self.wake(&mut state);
        }
    }

    /// Revokes what was renewed long enough ago, and publishes one list for all.
    fn revoke_superseded(&self, now: Now) {
        let is_due = |superseded: &mut Superseded| superseded.due_ms <= now.mono_ms;
        if !self.lock().superseded.iter().any(|s| s.due_ms <= now.mono_ms) {
            return;
        }
        let due: Vec<Superseded> = self.lock().superseded.extract_if(.., is_due).collect();
        let old: Vec<Serial> = due.iter().map(|superseded| superseded.old).collect();
        let revoked = match self.ca.check_clock(now) {
            Ok(()) => {
                let record = self.ca.record();
                record.revoke_these(&old, Reason::Superseded, now).map_err(CaError::from)
            }
            Err(error) => Err(error),
        };
        match revoked {
            Ok(revoked) => {
                self.metrics.certificates_revoked.add(revoked.len() as u64);
                let record = self.ca.record();
                for old in revoked.iter().filter_map(|serial| record.by_serial(serial)) {
                    let (serial, device) = (old.serial, old.device);
                    log::info!(
                        event = "certificate_revoked", device:%, serial:%;
                        "certificate {serial} of {device} revoked: superseded"
                    );
                }
                if !revoked.is_empty() {
                    // What went wrong is logged and kept there.
                    let _ = self.publish(now);
                }
            }
            Err(error) => {
                log::error!("what is superseded could not be revoked yet: {error}");
                let due_ms = now.mono_ms + RETRY.1.as_millis() as u64;
                let later = due.into_iter().map(|superseded| Superseded { due_ms, ..superseded });
                self.lock().superseded.extend(later);
            }
        }
    }

    /// Once a day has the record forget what ended long ago.
    fn forget(&self, now: Now) {
        let is_fresh = |forgot_ms| now.mono_ms.saturating_sub(forgot_ms) < DAY_S * 1000;
        let ended_before = self.ended_before(now);
        if ended_before == 0 || self.lock().forgot_ms.is_some_and(is_fresh) {
            return;
        }
        match self.ca.record().prune(ended_before) {
            Ok(gone) => {
                self.lock().forgot_ms = Some(now.mono_ms);
                if !gone.is_empty() {
                    log::info!("certificates that ended long ago are forgotten: {}", gone.len());
                }
            }
            Err(error) => log::error!("what ended long ago could not be forgotten yet: {error}"),
        }
    }

    /// Does what is due, now and whenever it becomes so.
    pub fn work_forever(&self) {
        let mut pause = LOOK;
        loop {
            if self.wait(pause.min(self.until_due(clock::now()))) {
                self.run_hook();
            }
            let now = clock::now();
            if self.lock().trial_at.is_some_and(|at| at <= now.mono_ms) {
                self.try_again(now);
            }
            self.revoke_superseded(now);
            self.keep_fresh(now);
            self.forget(now);
            pause = match self.failure() {
                None => LOOK,
                Some(_) if pause > RETRY.1 => RETRY.0,
                Some(_) => (pause * 2).min(RETRY.1),
            };
        }
    }

    /// How long there is nothing to do but to keep the list fresh.
    fn until_due(&self, now: Now) -> Duration {
        let state = self.lock();
        let superseded = state.superseded.iter().map(|superseded| superseded.due_ms);
        let due_ms = superseded.chain(state.trial_at).min();
        due_ms.map_or(LOOK, |at| Duration::from_millis(at.saturating_sub(now.mono_ms)))
    }

    fn wake(&self, state: &mut State) {
        state.woken = true;
        self.changed.notify_all();
    }

    /// Sleeps until there is something to look at; answers whether that is the hook.
    fn wait(&self, pause: Duration) -> bool {
        let state = self.lock();
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, pause, |state| !state.woken)
            .unwrap_or_else(PoisonError::into_inner);
        state.woken = false;
        std::mem::take(&mut state.hook_due)
    }

    fn run_hook(&self) {
        let Some(program) = &self.hook else { return };
        let list = self.ca.dir().join(crl::FILE);
        // The program may start elsewhere than we did.
        let list = std::path::absolute(&list).unwrap_or(list);
        match hook::run(program, &list, hook::LIMIT) {
            Ok(()) => log::debug!("CRL_HOOK {} done", program.display()),
            Err(error) => log::warn!("CRL_HOOK {}: {error}", program.display()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::der;
    use crate::config;
    use crate::files::test_dir::TestDir;
    use std::os::unix::fs::MetadataExt as _;

    fn publisher(dir: &TestDir, years: u32, now: Now) -> Publisher {
        let settings =
            config::Ca { dir: dir.join("ca"), root_validity_years: years, device_validity_days: 9 };
        Publisher::new(Arc::new(Ca::open(&settings, now).unwrap()), None, None, None, metrics())
    }

    fn metrics() -> Arc<Metrics> {
        Arc::new(Metrics::new(std::iter::empty()))
    }

    fn later(now: Now, s: u64) -> Now {
        Now { unix_ms: now.unix_ms + s * 1000, ..now }
    }

    #[test]
    fn a_list_is_renewed_daily() {
        let (dir, now) = (TestDir::new(), clock::now());
        let publisher = publisher(&dir, 1, now);
        let number = |s: u64| {
            publisher.keep_fresh(later(now, s));
            publisher.ca.crl().unwrap().number
        };
        let first = number(0);
        assert_eq!(number(DAY_S - 1), first);
        let second = number(DAY_S);
        assert!(second > first);
        assert_eq!(number(DAY_S + 1), second);
    }

    #[test]
    fn a_start_writes_a_list_only_if_there_is_something_to_say() {
        let (dir, now) = (TestDir::new(), clock::now());
        let written = || std::fs::metadata(dir.join("ca/crl.pem")).unwrap().ino();
        let start = |s: u64| {
            let hooked = Publisher { hook: Some("true".into()), ..publisher(&dir, 1, now) };
            hooked.keep_fresh(later(now, s));
            // Whether the hook was told of the list by whoever wrote it, nobody knows.
            assert!(hooked.wait(Duration::ZERO));
            (hooked.ca.crl().unwrap().number, written())
        };
        let first = start(0);
        assert_eq!(start(DAY_S - 1), first);
        let second = start(DAY_S);
        assert!(second.0 > first.0 && second.1 != first.1);
    }

    #[test]
    fn what_ended_long_ago_is_forgotten_once_a_day() {
        let (dir, now) = (TestDir::new(), clock::now());
        drop(publisher(&dir, 1, now));
        let index = dir.join("ca/index.txt");
        let end = |day: u64| der::time_text(now.unix_s() + day * DAY_S);
        let line = |day: u64| format!("V\t{}\t\t4{day}\tunknown\t/CN=d{day}\n", end(day));
        std::fs::write(&index, [1, 2, 9].map(line).concat()).unwrap();
        let retention = Some(Retention::new(5, || false, now));
        let publisher = Publisher { retention, ..publisher(&dir, 1, now) };
        let left = |hours: u64| {
            let ms = hours * 3_600_000;
            publisher.forget(Now { unix_ms: now.unix_ms + ms, mono_ms: now.mono_ms + ms });
            std::fs::read_to_string(&index).unwrap().lines().count()
        };
        assert_eq!([23, 140, 145, 165, 170, 190].map(left), [3, 3, 3, 2, 2, 1]);
    }

    #[test]
    fn without_a_clock_there_is_no_list_and_no_failure() {
        let dir = TestDir::new();
        let publisher = publisher(&dir, 1, Now { unix_ms: 0, mono_ms: 0 });
        publisher.keep_fresh(Now { unix_ms: 0, mono_ms: 0 });
        assert_eq!((publisher.ca.crl(), publisher.failure()), (None, None));
    }

    #[test]
    fn a_list_that_cannot_be_written_is_tried_again() {
        let (dir, now) = (TestDir::new(), clock::now());
        let publisher = publisher(&dir, 1, now);
        let file = dir.join("ca/crl.pem");
        std::fs::create_dir_all(file.join("in the way")).unwrap();
        assert!(publisher.publish(now).is_err());
        let failure = publisher.failure().unwrap();
        assert!(failure.contains("crl.pem"), "{failure}");
        assert!(!publisher.wait(Duration::ZERO), "the hook is told of new lists only");
        std::fs::remove_dir_all(&file).unwrap();
        publisher.keep_fresh(now);
        assert!(publisher.failure().is_none() && file.is_file());
    }

    #[test]
    fn the_end_of_the_ca_is_warned_of() {
        let (dir, now) = (TestDir::new(), clock::now());
        let publisher = publisher(&dir, 1, now);
        let end = publisher.ca.issuer().unwrap().not_after - now.unix_s();
        assert!(publisher.warnings(later(now, end - 30 * DAY_S)).is_empty());
        let warning = publisher.warnings(later(now, end - 10 * DAY_S)).remove(0);
        assert!(warning.starts_with("the CA ends in 10 days, at 2"), "{warning}");
        assert!(publisher.warnings(later(now, end + 1)).is_empty(), "that is an error then");
    }
}
