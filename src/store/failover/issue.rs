//! Issuing and replacing: what Redis has answered, and the answer from memory.

use super::{Failover, State};
use crate::clock::Now;
use crate::jwt::{Claims, Token};
use crate::store::memory::InRedis;
use crate::store::{Answer, Dead, Down, New, Outcome, StoreError};

impl Failover {
    /// Until it has an answer from Redis, memory issues nothing for the same device.
    pub(super) fn begin_issue(state: &mut State, token: &Token) {
        *state.issuing.entry(token.claims.device_id.clone()).or_default() += 1;
    }

    /// Redis has answered. `late`: it was lost meanwhile, so what it granted may be in a server that
    /// is gone, and is carried over again.
    pub(super) fn end_issue(
        &self,
        state: &mut State,
        new: &New,
        result: Answer,
        late: bool,
        now: Now,
    ) -> Answer {
        forget_issue(state, &new.token);
        match result {
            Ok(Outcome::Issued { token, killed, found }) => {
                let copy = self.kill_replaced(state, new, late, now);
                if let Some(dead) = &killed {
                    self.mark_dead(state, dead, late, now);
                }
                let in_redis = if late { InRedis::Maybe } else { InRedis::Confirmed };
                self.memory.copy(&New { token: token.clone(), ..new.clone() }, in_redis, now);
                if late {
                    state.follow_ups.carry(token.hash);
                }
                Ok(Outcome::Issued { token, killed: killed.or(copy), found })
            }
            Err(StoreError::Down(down)) => self.issue_cut_off(state, new, &down, now),
            Err(StoreError::Failed(why)) => {
                // What was carried out of it would keep the device waiting for a token that nobody
                // was given.
                state.follow_ups.remove(new.token.clone());
                self.kill_replaced(state, new, true, now);
                Err(StoreError::Failed(why))
            }
            Err(StoreError::Undecided) => self.refuse_issue(state, new, now),
            other => other,
        }
    }

    /// A token that may be in Redis, or get there yet, is not handed out, but dead from now on.
    fn issue_cut_off(&self, state: &mut State, new: &New, down: &Down, now: Now) -> Answer {
        if down.maybe_done {
            self.mark_dead(state, &Dead::of(&new.token), true, now);
        }
        match (self.rules.required, down.maybe_done) {
            (true, _) => self.refuse_issue(state, new, now),
            (false, true) => self.issue_another(state, new, now),
            (false, false) => self.issue_from_memory(state, new, now),
        }
    }

    /// Nothing is issued without Redis; what is on disk already, Redis is told when it is back.
    pub(super) fn refuse_issue(&self, state: &mut State, new: &New, now: Now) -> Answer {
        self.kill_replaced(state, new, true, now);
        Err(StoreError::Undecided)
    }

    /// Issues a token that Redis has never heard of in place of this one.
    fn issue_another(&self, state: &mut State, new: &New, now: Now) -> Answer {
        let mut jti = [0; 16];
        getrandom::fill(&mut jti).map_err(|_| StoreError::Undecided)?;
        let token = self.signer.sign(Claims { jti: Some(jti), ..new.token.claims.clone() });
        self.issue_from_memory(state, &New { token, ..new.clone() }, now)
    }

    /// Stores the token, of which Redis has never heard, here.
    pub(super) fn issue_from_memory(&self, state: &mut State, new: &New, now: Now) -> Answer {
        let replaced = self.kill_replaced(state, new, true, now);
        let token = &new.token;
        // Redis is being asked for another token of this device.
        let asked = state.issuing.contains_key(&token.claims.device_id);
        if asked && new.replaces.is_none() {
            return Ok(Outcome::AlreadyActive { expires_at_ms: token.claims.exp * 1000 });
        }
        let answer = self.memory.issue(new, now);
        if let Ok(Outcome::Issued { token, found, .. }) = answer {
            state.follow_ups.carry(token.hash);
            return Ok(Outcome::Issued { token, killed: replaced, found });
        }
        answer
    }

    /// Replacing kills what memory has of the device, too. `again`: Redis may not know of it yet.
    fn kill_replaced(&self, state: &mut State, new: &New, again: bool, now: Now) -> Option<Dead> {
        let kill = new.replaces.as_deref()?;
        if again {
            state.follow_ups.row(kill.device.clone());
        }
        let killed = self.kill_copies(state, &kill.device, kill.row.bound.t, now);
        killed.into_iter().next()
    }
}

fn forget_issue(state: &mut State, token: &Token) {
    let device = &token.claims.device_id;
    if let Some(count) = state.issuing.get_mut(device) {
        *count -= 1;
        if *count == 0 {
            state.issuing.remove(device);
        }
    }
}
