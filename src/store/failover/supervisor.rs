//! The supervisor thread: the only one that connects. It looks for Redis for as long as it is away,
//! has everything carried over, and then does what could not be confirmed.

use std::sync::PoisonError;
use std::time::Duration;

use super::{Begun, Failover, Mode, State, log_failure};
use crate::clock;
use crate::store::{Down, DownKind, StoreError, locked};

/// Time between two attempts to connect, doubled up to the second figure, with jitter.
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_MOST: Duration = Duration::from_secs(5);
/// So often Redis is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// With more to tell than this, an interrupted return begins anew: 32 bytes each, most of them.
const FOLLOW_UPS_MOST: usize = 500_000;

impl Failover {
    /// The supervisor thread: makes all connections, carries over, switches back. Returns after
    /// [`Failover::stop`].
    pub fn supervise(&self) {
        let mut back_off = BACK_OFF;
        let mut kept = locked(&self.state).last_run.clone();
        let mut looked_ms = clock::now().mono_ms;
        let mut missed = None;
        loop {
            self.keep_run(&mut kept);
            let state = locked(&self.state);
            let idle = |state: &mut State| {
                let busy = !state.follow_ups.is_empty() || self.redis.missing().is_some();
                !state.stopped && state.mode == Mode::Primary && !busy
            };
            let passed_ms = || clock::now().mono_ms.saturating_sub(looked_ms);
            let left = LOOK_EVERY.saturating_sub(Duration::from_millis(passed_ms()));
            let waited = self.changed.wait_timeout_while(state, left, idle);
            let state = waited.unwrap_or_else(PoisonError::into_inner).0;
            let (stopped, primary) = (state.stopped, state.mode == Mode::Primary);
            drop(state);
            if stopped {
                return;
            }
            if primary {
                if Duration::from_millis(passed_ms()) >= LOOK_EVERY {
                    looked_ms = clock::now().mono_ms;
                    self.look();
                } else {
                    self.tidy_up();
                }
                let missing = self.redis.missing();
                back_off = if missing.is_some() { self.mend(back_off) } else { BACK_OFF };
                log_missing(&mut missed, missing);
                continue;
            }
            back_off = match self.bring_back() {
                Ok(()) => {
                    log_missing(&mut missed, self.redis.missing());
                    BACK_OFF
                }
                Err(error) => {
                    self.stay_away(&error.into_down());
                    self.pause(back_off)
                }
            };
        }
    }

    /// Looks for the part that is out of reach, while the others are served. When it is found, all
    /// connections are made anew, and what it may have lost is carried over. Returns how long to wait
    /// before the next look.
    fn mend(&self, back_off: Duration) -> Duration {
        let epoch = locked(&self.state).epoch;
        match self.redis.can_reach_more() {
            Ok(true) => {
                let mut state = locked(&self.state);
                if state.mode == Mode::Primary {
                    self.doubt(&mut state, Mode::Renewing, "more of it is in reach");
                }
            }
            Ok(false) => {}
            Err(error) => self.notice(&mut locked(&self.state), &[Err(error)], epoch),
        }
        let primary = locked(&self.state).mode == Mode::Primary;
        if primary { self.pause(back_off) } else { back_off }
    }

    /// Keeps the run id on disk, once no grace depends on its being another one than before.
    fn keep_run(&self, kept: &mut Option<String>) {
        let run_id = {
            let state = locked(&self.state);
            let still = state.grace.forgot_before_s.is_some()
                && clock::now().mono_ms < state.grace.until_ms;
            state.last_run.clone().filter(|run_id| !still && kept.as_ref() != Some(run_id))
        };
        let Some(run_id) = run_id else { return };
        if let Err(error) = self.rules.run_file.write(&run_id) {
            log::warn!("{error}");
        }
        *kept = Some(run_id);
    }

    /// Renews the lease of our id. And where nobody asks Redis for a while, nobody would notice that it
    /// was started again, perhaps with older data.
    fn look(&self) {
        let (epoch, run_id) = {
            let mut state = locked(&self.state);
            state.follow_ups.take_up();
            (state.epoch, state.follow_ups.run_id().cloned())
        };
        if let Err(error) = self.redis.look(run_id.as_deref(), clock::now()) {
            self.notice(&mut locked(&self.state), &[Err(error)], epoch);
        }
    }

    /// Connects, carries over, and switches back.
    fn bring_back(&self) -> Result<(), StoreError> {
        let ca = locked(&self.state).ca.clone();
        let hello = self.redis.connect(ca.as_ref())?;
        locked(&self.state).is_silent = false;
        self.catch_up.get().inspect(|catch_up| catch_up());
        self.carry_over(&hello)
    }

    /// The attempt to bring Redis back failed: one warning an outage.
    fn stay_away(&self, down: &Down) {
        let mut state = locked(&self.state);
        if state.begun == Begun::No {
            state.begun = Begun::InMemory;
            log_failure(&down.why, self.rules.required);
        } else if state.mode != Mode::Degraded {
            self.degrade(&mut state, down);
        } else {
            log::debug!("Redis is still away: {}", down.why);
        }
        state.away = Some(down.clone());
        state.is_silent = down.kind == DownKind::Lost;
        state.mode = Mode::Degraded;
        if state.follow_ups.len() > FOLLOW_UPS_MOST {
            state.follow_ups.abandon();
        }
        self.redis.disconnect();
        self.changed.notify_all();
    }

    /// Waits between half the time and the whole, so that instances do not come all at once. Returns how
    /// long the next wait is to be.
    fn pause(&self, back_off: Duration) -> Duration {
        let mut random = [0; 1];
        let jitter = getrandom::fill(&mut random).map_or(0, |()| u32::from(random[0]));
        let wait = back_off / 2 + back_off / 2 * jitter / 255;
        let state = locked(&self.state);
        let mode = state.mode;
        let same = |state: &mut State| !state.stopped && state.mode == mode;
        drop(self.changed.wait_timeout_while(state, wait, same));
        (back_off * 2).min(BACK_OFF_MOST)
    }
}

/// One warning for what is lost of it, and one line when it is back.
fn log_missing(missed: &mut Option<String>, missing: Option<String>) {
    match &missing {
        Some(why) if missed.is_none() => log::warn!(
            "a part of Redis is lost ({why}): what it has waits until it is back, the rest is served"
        ),
        None if missed.is_some() => log::info!("✅ all of Redis is in reach again"),
        _ => {}
    }
    *missed = missing;
}
