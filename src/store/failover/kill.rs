//! Killing: what Redis has answered, and the answer from memory.
//!
//! A kill also finds out whether another instance has redeemed a token of the device, whose
//! certificate nobody here knows of: the token's mark in Redis names who has. That is kept with the
//! token in the ledger, so that a kill that is asked again tells the same.

use std::borrow::Cow;

use super::{Failover, State};
use crate::clock::Now;
use crate::store::memory::InRedis;
use crate::store::{Answer, Dead, Kill, Killed, Op, Outcome, StoreError};

impl Failover {
    /// The same operations; each kill knows the copies that are here, so that Redis is asked for
    /// their marks.
    pub(super) fn with_copies<'a>(&self, ops: &'a [Op], now: Now) -> Cow<'a, [Op]> {
        if !ops.iter().any(|op| matches!(op, Op::Kill(_))) {
            return Cow::Borrowed(ops);
        }
        let with_copies = |op: &Op| match op {
            Op::Kill(kill) => {
                let copies = self.memory.meant_by(kill, now).into_iter().map(|(copy, _)| copy);
                Op::Kill(Kill { copies: copies.collect(), ..kill.clone() })
            }
            other => other.clone(),
        };
        Cow::Owned(ops.iter().map(with_copies).collect())
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
            Err(StoreError::Down(_) | StoreError::Undecided | StoreError::Full) => {
                self.kill_from_memory(state, kill, now)
            }
            other => other,
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
        let copies = self.kill_copies(state, kill, now);
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
        state.follow_ups.note_kill(Kill { copies: Vec::new(), ..kill.clone() }, now);
        let copies = self.kill_copies(state, kill, now);
        for (dead, in_redis) in &copies {
            if *in_redis != InRedis::No {
                self.ledger.note_unsure(&dead.hash);
            }
        }
        let dead = copies.into_iter().next().map(|(dead, _)| dead);
        let known = self.ledger.known_of(&kill.device);
        Ok(Outcome::Killed(Box::new(Killed { dead, known, ..Killed::default() })))
    }

    /// Kills the copies of the device's tokens; returns which those were.
    fn kill_copies(&self, state: &mut State, kill: &Kill, now: Now) -> Vec<(Dead, InRedis)> {
        let killed = self.memory.kill(kill, now);
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
