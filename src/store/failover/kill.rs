//! Killing a device's past: what Redis has answered, and the answer from memory.
//!
//! The bound is on disk before any of this, and Redis hears of it now or when it is back: whatever is
//! lost on the way, the past stays dead.

use super::Turn;
use crate::device::DeviceId;
use crate::store::{Answer, Dead, Kill, Outcome, Seen, StoreError};

impl Turn<'_> {
    /// What Redis knows of the device, and what memory does.
    pub(super) fn end_look(&self, device: &DeviceId, result: Answer) -> Answer {
        let here = self.store.memory.look(device, self.now);
        match result {
            Ok(Outcome::Seen(seen)) => {
                let latest_iat = seen.latest_iat.max(here.latest_iat);
                Ok(Outcome::Seen(Box::new(Seen { latest_iat, ..*seen })))
            }
            Err(StoreError::Down(_) | StoreError::Undecided) => Ok(Outcome::Seen(Box::new(here))),
            other => other,
        }
    }

    /// Redis has answered.
    pub(super) fn end_kill(&mut self, kill: &Kill, result: Answer) -> Answer {
        match result {
            Ok(Outcome::Killed { dead, told }) => {
                if self.late {
                    self.state.follow_ups.row(kill.device.clone());
                }
                let copy = self.kill_copies(&kill.device, kill.row.bound.t);
                if let Some(dead) = &dead {
                    self.mark_dead(dead, self.late);
                }
                Ok(Outcome::Killed { dead: dead.or(copy), told: told && !self.late })
            }
            Err(StoreError::Down(_) | StoreError::Undecided) => self.kill_from_memory(kill),
            other => {
                self.state.follow_ups.row(kill.device.clone());
                other
            }
        }
    }

    pub(super) fn kill_from_memory(&mut self, kill: &Kill) -> Answer {
        self.state.follow_ups.row(kill.device.clone());
        let dead = self.kill_copies(&kill.device, kill.row.bound.t);
        Ok(Outcome::Killed { dead, told: false })
    }

    /// Kills the copies of the device's tokens that were issued at `until_s` or before; returns one of
    /// them.
    pub(super) fn kill_copies(&mut self, device: &DeviceId, until_s: u64) -> Option<Dead> {
        let killed = self.store.memory.kill(device, until_s, self.now);
        killed.iter().for_each(|dead| self.state.follow_ups.mark(dead.hash));
        killed.into_iter().next()
    }

    /// The token is dead, whoever killed it. `again`: Redis may not know yet.
    pub(super) fn mark_dead(&mut self, dead: &Dead, again: bool) {
        let memory = &self.store.memory;
        memory.ledger.kill(dead.hash, dead.claims.clone(), self.now);
        memory.remove(&dead.hash);
        if again {
            self.state.follow_ups.mark(dead.hash);
        }
    }
}
