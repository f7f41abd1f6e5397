//! Issuing and replacing: what Redis has answered, and the answer from memory.

use super::{Failover, State};
use crate::clock::Now;
use crate::jwt::{Claims, Token};
use crate::store::memory::InRedis;
use crate::store::{Answer, Dead, Down, Kill, New, Outcome, StoreError};

impl Failover {
    /// Until it has an answer from Redis, memory issues nothing for the same device.
    pub(super) fn begin_issue(state: &mut State, token: &Token) {
        *state.issuing.entry(token.claims.device_id.clone()).or_default() += 1;
    }

    /// Redis has answered. `late`: it was lost meanwhile, so what it granted may be in a server that
    /// is gone, and is carried over again.
    pub(super) fn issue_answered(
        &self,
        state: &mut State,
        new: &New,
        result: Answer,
        late: bool,
        now: Now,
    ) -> Answer {
        let token = &new.token;
        end_issue(state, token);
        match result {
            Ok(Outcome::Issued { instead, killed }) => {
                if let Some(dead) = &killed {
                    self.mark_dead(state, dead, late, now);
                }
                let in_redis = if late { InRedis::Maybe } else { InRedis::Confirmed(state.era) };
                self.memory.copy(new, in_redis, now);
                if late {
                    state.note_carry(token.hash);
                }
                Ok(Outcome::Issued { instead, killed })
            }
            Err(StoreError::Down(down)) => self.issue_cut_off(state, new, &down, now),
            Err(StoreError::Failed(why)) => {
                // What was carried out of it would keep the device waiting for a token that nobody
                // was given.
                state.follow_ups.remove(token.clone());
                Err(StoreError::Failed(why))
            }
            other => other,
        }
    }

    /// A token that may be in Redis, or get there yet, is not handed out, but dead from now on.
    fn issue_cut_off(&self, state: &mut State, new: &New, down: &Down, now: Now) -> Answer {
        if let Some(dead) = &down.dying {
            self.mark_dead(state, dead, true, now);
        }
        if down.maybe_done {
            self.mark_dead(state, &Dead::of(&new.token), true, now);
        }
        match (self.rules.required, down.maybe_done) {
            (true, _) => Err(StoreError::Undecided),
            (false, true) => self.issue_another(state, new, now),
            (false, false) => self.issue_from_memory(state, new, now),
        }
    }

    /// Issues a token that Redis has never heard of in place of this one.
    fn issue_another(&self, state: &mut State, new: &New, now: Now) -> Answer {
        let mut jti = [0; 16];
        getrandom::fill(&mut jti).map_err(|_| StoreError::Undecided)?;
        let token = self.signer.sign(Claims { jti: Some(jti), ..new.token.claims.clone() });
        let another = New { token, ..new.clone() };
        match self.issue_from_memory(state, &another, now)? {
            Outcome::Issued { killed, .. } => {
                Ok(Outcome::Issued { instead: Some(another.token), killed })
            }
            other => Ok(other),
        }
    }

    /// Stores the token, of which Redis has never heard, here.
    pub(super) fn issue_from_memory(&self, state: &mut State, new: &New, now: Now) -> Answer {
        let token = &new.token;
        let answer = if new.replaces {
            self.replace_in_memory(state, new, now)
        } else if state.issuing.contains_key(&token.claims.device_id) {
            // Redis is being asked for another token of this device.
            Ok(Outcome::AlreadyActive { expires_at_ms: token.claims.exp * 1000 })
        } else {
            self.memory.issue(new, now)
        };
        if matches!(answer, Ok(Outcome::Issued { .. })) {
            state.note_carry(token.hash);
        }
        answer
    }

    fn replace_in_memory(&self, state: &mut State, new: &New, now: Now) -> Answer {
        let killed = self.memory.replace(new, now)?;
        let token = &new.token;
        if let Some(dead) = &killed {
            state.note_mark(dead.hash);
        }
        let kill = Kill {
            device: token.claims.device_id.clone(),
            issued_by_s: token.claims.iat,
            spare: Some(token.hash),
            copies: Vec::new(),
        };
        state.follow_ups.note_kill(kill, now);
        Ok(Outcome::Issued { instead: None, killed })
    }
}

fn end_issue(state: &mut State, token: &Token) {
    let device = &token.claims.device_id;
    if let Some(count) = state.issuing.get_mut(device) {
        *count -= 1;
        if *count == 0 {
            state.issuing.remove(device);
        }
    }
}
