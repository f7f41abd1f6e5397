//! Killing a device's past: what Redis has answered, and the answer from memory.
//!
//! The bound is on disk before any of this, and Redis hears of it now or when it is back: whatever is
//! lost on the way, the past stays dead.

use super::{Failover, State};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::store::{Answer, Dead, Kill, Outcome, Seen, StoreError};

impl Failover {
    /// What Redis knows of the device, and what memory does.
    pub(super) fn end_look(&self, device: &DeviceId, result: Answer, now: Now) -> Answer {
        let here = self.memory.look(device, now);
        match result {
            Ok(Outcome::Seen(seen)) => {
                let latest_iat = seen.latest_iat.max(here.latest_iat);
                Ok(Outcome::Seen(Box::new(Seen { latest_iat, ..*seen })))
            }
            Err(StoreError::Down(_) | StoreError::Undecided) => Ok(Outcome::Seen(Box::new(here))),
            other => other,
        }
    }

    /// Redis has answered. `late`: it was lost meanwhile, so it may not know any more.
    pub(super) fn end_kill(
        &self,
        state: &mut State,
        kill: &Kill,
        result: Answer,
        late: bool,
        now: Now,
    ) -> Answer {
        match result {
            Ok(Outcome::Killed { dead, told }) => {
                if late {
                    state.follow_ups.row(kill.device.clone());
                }
                let copies = self.kill_copies(state, &kill.device, kill.row.bound.t, now);
                if let Some(dead) = &dead {
                    self.mark_dead(state, dead, late, now);
                }
                let dead = dead.or(copies.into_iter().next());
                Ok(Outcome::Killed { dead, told: told && !late })
            }
            Err(StoreError::Down(_) | StoreError::Undecided) => {
                self.kill_from_memory(state, kill, now)
            }
            other => {
                state.follow_ups.row(kill.device.clone());
                other
            }
        }
    }

    pub(super) fn kill_from_memory(&self, state: &mut State, kill: &Kill, now: Now) -> Answer {
        state.follow_ups.row(kill.device.clone());
        let copies = self.kill_copies(state, &kill.device, kill.row.bound.t, now);
        Ok(Outcome::Killed { dead: copies.into_iter().next(), told: false })
    }

    /// Kills the copies of the device's tokens that were issued at `until_s` or before; returns which
    /// those were.
    pub(super) fn kill_copies(
        &self,
        state: &mut State,
        device: &DeviceId,
        until_s: u64,
        now: Now,
    ) -> Vec<Dead> {
        let killed = self.memory.kill(device, until_s, now);
        killed.iter().for_each(|dead| state.follow_ups.mark(dead.hash));
        killed
    }

    /// The token is dead, whoever killed it. `again`: Redis may not know yet.
    pub(super) fn mark_dead(&self, state: &mut State, dead: &Dead, again: bool, now: Now) {
        self.ledger.kill(dead.hash, dead.claims.clone(), now);
        self.memory.remove(&dead.hash);
        if again {
            state.follow_ups.mark(dead.hash);
        }
    }
}
