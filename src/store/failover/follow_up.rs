//! What Redis has yet to be told, in the order in which it must be told.
//!
//! Marks go first: a token must not come back before what is known against it (`docs/model`, row 12).
//! Then what was not confirmed (give-backs, deletions, kills), then the live tokens and their leases.

use std::collections::BTreeMap;

use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::{MAX_LIFETIME_S, Token, TokenHash};
use crate::serial::Serial;
use crate::store::Kill;

/// Marks to withdraw that are remembered; more than one outage leaves under any sane load.
const MOST_WITHDRAWALS: usize = 4096;

/// With fewer kills it is not worth looking for those that have ended.
const LEAST_KILLS: usize = 1024;

/// One thing to tell; what exactly is sent is decided when it is sent.
#[derive(Clone, Debug)]
pub(super) enum FollowUp {
    /// Enter what the ledger knows of this token.
    Mark(TokenHash),
    /// Withdraw the mark of an attempt that came to nothing.
    Withdraw(Token, Serial),
    /// Remove a token that is used up or was never handed out.
    Remove(Token),
    /// Kill what the lease of this device names.
    Kill(Kill),
    /// Enter this live token.
    Carry(TokenHash),
}

/// The list.
#[derive(Debug, Default)]
pub(super) struct FollowUps {
    marks: Vec<TokenHash>,
    withdrawals: BTreeMap<(TokenHash, Serial), Token>,
    removals: BTreeMap<TokenHash, Token>,
    kills: BTreeMap<DeviceId, Kill>,
    /// With so many kills, those whose tokens have ended are dropped, so that looking for them is
    /// paid once for many.
    prune_kills_at: usize,
    carries: Vec<TokenHash>,
}

impl FollowUps {
    pub fn len(&self) -> usize {
        let unconfirmed = self.withdrawals.len() + self.removals.len() + self.kills.len();
        self.marks.len() + unconfirmed + self.carries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn mark(&mut self, hash: TokenHash) {
        self.marks.push(hash);
    }

    pub fn carry(&mut self, hash: TokenHash) {
        self.carries.push(hash);
    }

    pub fn remove(&mut self, token: Token) {
        self.removals.insert(token.hash, token);
    }

    /// Notes a mark to withdraw. The oldest go when there are too many: this instance takes its own
    /// dead marks over, and for the others they end with their tokens. One for a token that is granted
    /// to another attempt stays: if that fails as well, no mark goes over this one.
    pub fn withdraw(&mut self, token: &Token, serial: Serial) {
        self.withdrawals.insert((token.hash, serial), token.clone());
        if self.withdrawals.len() > MOST_WITHDRAWALS
            && let Some(oldest) = self.withdrawals.iter().min_by_key(|(_, t)| t.claims.exp)
        {
            let oldest = *oldest.0;
            self.withdrawals.remove(&oldest);
        }
    }

    /// Notes a kill; of two for one device the later one covers both. What is issued from now on
    /// is not meant.
    pub fn note_kill(&mut self, kill: Kill, now: Now) {
        let issued_by_s = kill.issued_by_s.min(now.unix_s());
        let kill = Kill { issued_by_s, ..kill };
        let oldest = now.unix_s().saturating_sub(MAX_LIFETIME_S);
        self.kills.insert(kill.device.clone(), kill);
        if self.kills.len() >= self.prune_kills_at.max(LEAST_KILLS) {
            self.kills.retain(|_, kill| kill.issued_by_s >= oldest);
            self.prune_kills_at = 2 * self.kills.len();
        }
    }

    /// Everything is to be told again: replaces the lists of marks and tokens.
    pub fn list(&mut self, marks: Vec<TokenHash>, carries: Vec<TokenHash>) {
        self.marks = marks;
        self.carries = carries;
    }

    /// Takes up to `most` follow-ups of one kind off the list, the kinds in their order.
    pub fn take(&mut self, most: usize) -> Vec<FollowUp> {
        if !self.marks.is_empty() {
            return take_last(&mut self.marks, most).map(FollowUp::Mark).collect();
        }
        if !self.withdrawals.is_empty() {
            let taken = std::iter::from_fn(|| self.withdrawals.pop_first()).take(most);
            return taken.map(|((_, serial), token)| FollowUp::Withdraw(token, serial)).collect();
        }
        if !self.removals.is_empty() {
            let taken = std::iter::from_fn(|| self.removals.pop_first()).take(most);
            return taken.map(|(_, token)| FollowUp::Remove(token)).collect();
        }
        if !self.kills.is_empty() {
            let taken = std::iter::from_fn(|| self.kills.pop_first()).take(most);
            return taken.map(|(_, kill)| FollowUp::Kill(kill)).collect();
        }
        take_last(&mut self.carries, most).map(FollowUp::Carry).collect()
    }

    /// Not done after all.
    pub fn put_back(&mut self, follow_up: FollowUp) {
        match follow_up {
            FollowUp::Mark(hash) => self.marks.push(hash),
            FollowUp::Withdraw(token, serial) => self.withdraw(&token, serial),
            FollowUp::Remove(token) => self.remove(token),
            FollowUp::Kill(kill) => {
                self.kills.entry(kill.device.clone()).or_insert(kill);
            }
            FollowUp::Carry(hash) => self.carries.push(hash),
        }
    }
}

fn take_last(list: &mut Vec<TokenHash>, most: usize) -> impl Iterator<Item = TokenHash> {
    list.split_off(list.len().saturating_sub(most)).into_iter()
}
