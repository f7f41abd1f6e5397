//! The supervisor thread: the only one that connects. It looks for Redis for as long as it is away,
//! has everything carried over, and then does what could not be confirmed.

use std::sync::PoisonError;
use std::time::Duration;

use super::{Failover, Mode, State, log_failure};
use crate::store::{StoreError, locked};

/// Time between two attempts to connect, doubled up to the second figure, with jitter.
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_MOST: Duration = Duration::from_secs(5);

impl Failover {
    /// The supervisor thread: makes all connections, carries over, switches back. Returns after
    /// [`Failover::stop`].
    pub fn supervise(&self) {
        let mut back_off = BACK_OFF;
        loop {
            let state = locked(&self.state);
            let idle = |state: &mut State| {
                !state.stopped && state.mode == Mode::Primary && state.follow_ups.is_empty()
            };
            let state = self.changed.wait_while(state, idle);
            let state = state.unwrap_or_else(PoisonError::into_inner);
            let (stopped, primary) = (state.stopped, state.mode == Mode::Primary);
            drop(state);
            if stopped {
                return;
            }
            if primary {
                self.tidy_up();
                continue;
            }
            back_off = match self.bring_back() {
                Ok(()) => BACK_OFF,
                Err(why) => {
                    self.stay_away(&why);
                    self.pause(back_off);
                    (back_off * 2).min(BACK_OFF_MOST)
                }
            };
        }
    }

    /// Connects, carries over, and switches back.
    fn bring_back(&self) -> Result<(), StoreError> {
        let ca = locked(&self.state).ca_fingerprint.clone();
        let hello = self.remote.connect(ca.as_deref())?;
        self.carry_over(&hello)
    }

    /// The attempt to bring Redis back failed: one warning an outage.
    fn stay_away(&self, why: &StoreError) {
        let mut state = locked(&self.state);
        if state.attempts == 0 {
            log_failure(&why.to_string());
        } else if state.mode != Mode::Degraded {
            self.degrade(&mut state, &why.to_string());
        } else {
            log::debug!("Redis is still away: {why}");
        }
        state.mode = Mode::Degraded;
        state.noting = false;
        state.attempts += 1;
        self.remote.disconnect();
        self.changed.notify_all();
    }

    /// Waits between half the time and the whole, so that instances do not come all at once.
    fn pause(&self, back_off: Duration) {
        let mut random = [0; 1];
        let jitter = getrandom::fill(&mut random).map_or(0, |()| u32::from(random[0]));
        let wait = back_off / 2 + back_off / 2 * jitter / 255;
        let state = locked(&self.state);
        drop(self.changed.wait_timeout_while(state, wait, |state| !state.stopped));
    }
}
