//! Killing: what Redis has answered, and the answer from memory.

use super::{Failover, State};
use crate::clock::Now;
use crate::store::{Answer, Dead, Kill, Outcome, StoreError};

impl Failover {
    /// Redis has answered. `late`: it was lost meanwhile, so it may not know any more.
    pub(super) fn kill_answered(
        &self,
        state: &mut State,
        kill: &Kill,
        result: Answer,
        late: bool,
        now: Now,
    ) -> Answer {
        let killed = self.kill_copies(state, kill, now);
        match result {
            Ok(Outcome::Killed(dead)) => {
                if let Some(dead) = &dead {
                    self.mark_dead(state, dead, late, now);
                }
                Ok(Outcome::Killed(dead.or(killed)))
            }
            Ok(other) => Ok(other),
            Err(StoreError::Failed(why)) => Err(StoreError::Failed(why)),
            Err(_) => {
                state.follow_ups.note_kill(kill.clone(), now);
                Ok(Outcome::Killed(killed))
            }
        }
    }

    pub(super) fn kill_from_memory(&self, state: &mut State, kill: &Kill, now: Now) -> Answer {
        state.follow_ups.note_kill(kill.clone(), now);
        Ok(Outcome::Killed(self.kill_copies(state, kill, now)))
    }

    /// Kills the copies of the device's tokens; returns one of them.
    fn kill_copies(&self, state: &mut State, kill: &Kill, now: Now) -> Option<Dead> {
        let killed = self.memory.kill(kill, now);
        killed.iter().for_each(|dead| state.note_mark(dead.hash));
        killed.into_iter().next()
    }

    /// The token is dead, whoever killed it. `again`: Redis may not know yet.
    pub(super) fn mark_dead(&self, state: &mut State, dead: &Dead, again: bool, now: Now) {
        self.ledger.kill(dead.hash, dead.claims.clone(), now);
        self.memory.remove(&dead.hash);
        if again {
            state.note_mark(dead.hash);
        }
    }
}
