//! What Redis has yet to be told, in the order in which it must be told.
//!
//! The rows of devices and the marks go first: a token must not come back before what is known
//! against it (`docs/model`, row 12). Then what was not confirmed (give-backs, deletions), then the
//! live tokens and their leases.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;

use crate::device::DeviceId;
use crate::jwt::{Token, TokenHash};
use crate::serial::Serial;
use crate::store::redis::runs;

/// Marks to withdraw that are remembered; more than one outage leaves under any sane load.
const MOST_WITHDRAWALS: usize = 4096;
/// What is set aside; with more than that everything is listed again.
const MOST_ASIDE: usize = 100_000;

/// One thing to tell; what exactly is sent is decided when it is sent.
#[derive(Clone, Debug)]
pub(super) enum FollowUp {
    /// Merge the row of this device, whose past may be dead.
    Row(DeviceId),
    /// Enter what the ledger knows of this token.
    Mark(TokenHash),
    /// Withdraw the mark of an attempt that came to nothing.
    Withdraw(Token, Serial),
    /// Remove a token that is used up or was never handed out.
    Remove(Token),
    /// Enter this live token.
    Carry(TokenHash),
}

/// The list.
#[derive(Debug, Default)]
pub(super) struct FollowUps {
    lists: Lists,
    rows: BTreeSet<DeviceId>,
    marks: Vec<TokenHash>,
    withdrawals: BTreeMap<(TokenHash, Serial), Token>,
    removals: BTreeMap<TokenHash, Token>,
    carries: Vec<TokenHash>,
    /// What a part of Redis that is out of reach has to be told.
    aside: Vec<FollowUp>,
}

/// What the lists of marks and of live tokens are good for.
#[derive(Debug, Default, PartialEq, Eq)]
enum Lists {
    /// They are made anew when Redis is back, and find then what is not noted until then.
    #[default]
    Incomplete,
    /// With them, this run of the server gets to know everything. One that may not be asked for its id
    /// is never met again.
    For(Option<String>),
}

impl FollowUps {
    /// Whether these runs know everything when they are told what is listed. What is away meanwhile is
    /// then told everything when it is back.
    pub fn go_on_with(&mut self, run_id: &Option<String>) -> bool {
        let known = self.run_id().zip(run_id.as_ref());
        let are_all = known.is_some_and(|(known, runs)| runs::are_known(known, runs));
        if are_all {
            self.lists = Lists::For(run_id.clone());
        }
        are_all
    }

    /// Everything is to be told again: adds these rows, and replaces the lists of marks and tokens.
    pub fn list(
        &mut self,
        run_id: &Option<String>,
        rows: Vec<DeviceId>,
        marks: Vec<TokenHash>,
        carries: Vec<TokenHash>,
    ) {
        self.lists = Lists::For(run_id.clone());
        self.rows.extend(rows);
        self.marks = marks;
        self.carries = carries;
    }

    /// That run, if there is one and it may be asked for its id.
    pub fn run_id(&self) -> Option<&String> {
        match &self.lists {
            Lists::For(run_id) => run_id.as_ref(),
            Lists::Incomplete => None,
        }
    }

    /// Everything is to be listed again before Redis serves.
    pub fn abandon(&mut self) {
        self.lists = Lists::Incomplete;
    }

    pub fn len(&self) -> usize {
        let unconfirmed = self.withdrawals.len() + self.removals.len();
        self.rows.len() + self.marks.len() + unconfirmed + self.carries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn row(&mut self, device: DeviceId) {
        self.rows.insert(device);
    }

    pub fn mark(&mut self, hash: TokenHash) {
        if self.lists != Lists::Incomplete {
            self.marks.push(hash);
        }
    }

    pub fn carry(&mut self, hash: TokenHash) {
        if self.lists != Lists::Incomplete {
            self.carries.push(hash);
        }
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

    /// Takes up to `most` follow-ups of one kind off the list, the kinds in their order.
    pub fn take(&mut self, most: usize) -> Vec<FollowUp> {
        let withdraw = |((_, serial), token)| FollowUp::Withdraw(token, serial);
        let kinds: [&mut dyn FnMut() -> Option<FollowUp>; 5] = [
            &mut || self.rows.pop_first().map(FollowUp::Row),
            &mut || self.marks.pop().map(FollowUp::Mark),
            &mut || self.withdrawals.pop_first().map(withdraw),
            &mut || self.removals.pop_first().map(|(_, token)| FollowUp::Remove(token)),
            &mut || self.carries.pop().map(FollowUp::Carry),
        ];
        let mut taken = kinds.into_iter().map(|next| iter::from_fn(next).take(most).collect());
        taken.find(|taken: &Vec<FollowUp>| !taken.is_empty()).unwrap_or_default()
    }

    /// Tried again after the next [`FollowUps::take_up`]; until then others go on.
    pub fn set_aside(&mut self, follow_up: FollowUp) {
        match self.aside.len() < MOST_ASIDE {
            true => self.aside.push(follow_up),
            false => self.abandon(),
        }
    }

    pub fn take_up(&mut self) {
        std::mem::take(&mut self.aside).into_iter().for_each(|follow_up| self.put_back(follow_up));
    }

    /// Not done after all.
    pub fn put_back(&mut self, follow_up: FollowUp) {
        match follow_up {
            FollowUp::Row(device) => self.row(device),
            FollowUp::Mark(hash) => self.marks.push(hash),
            FollowUp::Withdraw(token, serial) => self.withdraw(&token, serial),
            FollowUp::Remove(token) => self.remove(token),
            FollowUp::Carry(hash) => self.carries.push(hash),
        }
    }
}
