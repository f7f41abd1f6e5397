//! Killing a device's past: what Redis has answered, and the answer from memory.
//!
//! The bound is on disk before any of this, and Redis hears of it now or when it is back: whatever is
//! lost on the way, the past stays dead.
//!
//! A kill also finds out whether another instance has redeemed a token of the device, whose
//! certificate nobody here knows of: the token's mark in Redis names who has. That is kept with the
//! token in the ledger, so that a kill that is asked again tells the same.

use std::borrow::Cow;

use super::{Failover, State};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::store::memory::InRedis;
use crate::store::{Answer, Dead, Kill, Killed, Look, Op, Outcome, Seen, StoreError};

impl Failover {
    /// The same operations; each look knows the copies that are here, so that Redis is asked for
    /// their marks.
    pub(super) fn with_copies<'a>(&self, ops: &'a [Op], now: Now) -> Cow<'a, [Op]> {
        if !ops.iter().any(|op| matches!(op, Op::Look(_))) {
            return Cow::Borrowed(ops);
        }
        let with_copies = |op: &Op| match op {
            Op::Look(Look { device, .. }) => {
                let copies = self.memory.tokens_of(device, now).into_iter().map(|(copy, _)| copy);
                Op::Look(Look { device: device.clone(), copies: copies.collect() })
            }
            other => other.clone(),
        };
        Cow::Owned(ops.iter().map(with_copies).collect())
    }

    /// What Redis knows of the device, and what memory does.
    pub(super) fn look_answered(&self, device: &DeviceId, result: Answer, now: Now) -> Answer {
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
    pub(super) fn kill_answered(
        &self,
        state: &mut State,
        kill: &Kill,
        result: Answer,
        late: bool,
        now: Now,
    ) -> Answer {
        match result {
            Ok(Outcome::Killed(killed)) => Ok(self.killed(state, kill, *killed, late, now)),
            Err(StoreError::Down(_) | StoreError::Undecided) => {
                self.kill_from_memory(state, kill, now)
            }
            other => {
                state.follow_ups.row(kill.device.clone());
                other
            }
        }
    }

    fn killed(
        &self,
        state: &mut State,
        kill: &Kill,
        mut killed: Killed,
        late: bool,
        now: Now,
    ) -> Outcome {
        if late {
            state.follow_ups.row(kill.device.clone());
        }
        let copies = self.kill_copies(state, &kill.device, kill.row.bound.t, now);
        if let Some(dead) = &killed.dead {
            self.mark_dead(state, dead, late, now);
        }
        for (token, mark) in &killed.redeemed_elsewhere {
            if !self.ledger.knows_as_killed(&token.hash) {
                self.mark_dead(state, token, late, now);
            }
            self.ledger.note_elsewhere(&token.hash, Some(mark));
        }
        let copies = copies.into_iter().map(|(dead, _)| dead);
        let redeemed = |dead: &Dead| {
            killed.redeemed_elsewhere.iter().any(|(token, _)| token.hash == dead.hash)
        };
        killed.dead = killed.dead.take().into_iter().chain(copies).find(|dead| !redeemed(dead));
        killed.known = self.ledger.known_of(&kill.device);
        Outcome::Killed(Box::new(killed))
    }

    pub(super) fn kill_from_memory(&self, state: &mut State, kill: &Kill, now: Now) -> Answer {
        state.follow_ups.row(kill.device.clone());
        let copies = self.kill_copies(state, &kill.device, kill.row.bound.t, now);
        for (dead, in_redis) in &copies {
            if *in_redis != InRedis::No {
                self.ledger.note_unsure(&dead.hash);
            }
        }
        let dead = copies.into_iter().next().map(|(dead, _)| dead);
        let known = self.ledger.known_of(&kill.device);
        Ok(Outcome::Killed(Box::new(Killed { dead, known, ..Killed::default() })))
    }

    /// Kills the copies of the device's tokens that were issued at `until_s` or before; returns which
    /// those were.
    pub(super) fn kill_copies(
        &self,
        state: &mut State,
        device: &DeviceId,
        until_s: u64,
        now: Now,
    ) -> Vec<(Dead, InRedis)> {
        let killed = self.memory.kill(device, until_s, now);
        killed.iter().for_each(|(dead, _)| state.note_mark(dead.hash));
        killed
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
