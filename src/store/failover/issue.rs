//! Issuing and replacing: what Redis has answered, and the answer from memory.

use super::Turn;
use crate::jwt::{Claims, Token};
use crate::store::memory::InRedis;
use crate::store::{Answer, Dead, Down, New, Outcome, StoreError};

impl Turn<'_> {
    /// Until it has an answer from Redis, memory issues nothing for the same device.
    pub(super) fn begin_issue(&mut self, token: &Token) {
        *self.state.issuing.entry(token.claims.device_id.clone()).or_default() += 1;
    }

    /// Redis has answered.
    pub(super) fn end_issue(&mut self, new: &New, result: Answer) -> Answer {
        self.forget_issue(&new.token);
        let late = self.late;
        match result {
            Ok(Outcome::Issued { token, killed, found }) => {
                let copy = self.kill_replaced(new, late);
                if let Some(dead) = &killed {
                    self.mark_dead(dead, late);
                }
                let in_redis = if late { InRedis::Maybe } else { InRedis::Confirmed };
                let issued = New { token: token.clone(), ..new.clone() };
                self.store.memory.copy(&issued, in_redis, self.now);
                if late {
                    self.state.follow_ups.carry(token.hash);
                }
                Ok(Outcome::Issued { token, killed: killed.or(copy), found })
            }
            Err(StoreError::Down(down)) => self.issue_cut_off(new, &down),
            Err(StoreError::Failed(why)) => {
                // What was carried out of it would keep the device waiting for a token that nobody
                // was given.
                self.state.follow_ups.remove(new.token.clone());
                self.kill_replaced(new, true);
                Err(StoreError::Failed(why))
            }
            Err(StoreError::Undecided) => self.refuse_issue(new),
            other => other,
        }
    }

    /// A token that may be in Redis, or get there yet, is not handed out, but dead from now on.
    fn issue_cut_off(&mut self, new: &New, down: &Down) -> Answer {
        if down.maybe_done {
            self.mark_dead(&Dead::of(&new.token), true);
        }
        match (self.store.rules.required, down.maybe_done) {
            (true, _) => self.refuse_issue(new),
            (false, true) => self.issue_another(new),
            (false, false) => self.issue_from_memory(new),
        }
    }

    /// Nothing is issued without Redis; what is on disk already, Redis is told when it is back.
    pub(super) fn refuse_issue(&mut self, new: &New) -> Answer {
        self.kill_replaced(new, true);
        Err(StoreError::Undecided)
    }

    /// Issues a token that Redis has never heard of in place of this one.
    fn issue_another(&mut self, new: &New) -> Answer {
        let mut jti = [0; 16];
        getrandom::fill(&mut jti).map_err(|_| StoreError::Undecided)?;
        let claims = Claims { jti: Some(jti), ..new.token.claims.clone() };
        let token = self.store.memory.signer.sign(claims);
        self.issue_from_memory(&New { token, ..new.clone() })
    }

    /// Stores the token, of which Redis has never heard, here.
    pub(super) fn issue_from_memory(&mut self, new: &New) -> Answer {
        let replaced = self.kill_replaced(new, true);
        let claims = &new.token.claims;
        // Redis is being asked for another token of this device.
        let asked = self.state.issuing.contains_key(&claims.device_id);
        if asked && new.replaces.is_none() {
            return Ok(Outcome::AlreadyActive { expires_at_ms: claims.exp * 1000 });
        }
        let answer = self.store.memory.issue(new, self.now);
        if let Ok(Outcome::Issued { token, found, .. }) = answer {
            self.state.follow_ups.carry(token.hash);
            return Ok(Outcome::Issued { token, killed: replaced, found });
        }
        answer
    }

    /// Replacing kills what memory has of the device, too. `again`: Redis may not know of it yet.
    fn kill_replaced(&mut self, new: &New, again: bool) -> Option<Dead> {
        let kill = new.replaces.as_deref()?;
        if again {
            self.state.follow_ups.row(kill.device.clone());
        }
        self.kill_copies(&kill.device, kill.row.bound.t)
    }

    fn forget_issue(&mut self, token: &Token) {
        let device = &token.claims.device_id;
        if let Some(count) = self.state.issuing.get_mut(device) {
            *count -= 1;
            if *count == 0 {
                self.state.issuing.remove(device);
            }
        }
    }
}
