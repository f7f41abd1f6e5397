//! Consuming and giving back: what Redis has answered, and the answer from memory.

use super::{Failover, Grace, Mode, Turn};
use crate::config::OutageRedeem;
use crate::devices::Row;
use crate::jwt::{Token, TokenHash};
use crate::serial::Serial;
use crate::store::ledger::Begin;
use crate::store::memory::InRedis;
use crate::store::redis::runs;
use crate::store::{Answer, Down, DownKind, Outcome, StoreError};

/// A token with less than this left may have ended in Redis already.
const ABOUT_TO_END_MS: u64 = 2000;
/// So often a lost token makes everything be carried over.
const BETWEEN_RETURNS_MS: u64 = 30_000;

impl Turn<'_> {
    /// Takes the token for this attempt; an answer if Redis need not be asked.
    pub(super) fn begin_consume(&mut self, token: &Token, serial: Serial) -> Option<Answer> {
        let ledger = &self.store.memory.ledger;
        match ledger.begin(token, serial, false, self.now) {
            Begin::Begun if self.may_be_used(token, None) => {
                ledger.release(&token.hash, serial);
                Some(Err(StoreError::Undecided))
            }
            Begin::Begun => None,
            Begin::Spent => Some(Ok(Outcome::AlreadyUsed)),
            Begin::Unknown => Some(Err(StoreError::Undecided)),
            Begin::Deleted => Some(Ok(Outcome::Unknown { lossless_run: None })),
        }
    }

    /// Redis had forgotten something when it returned, and another instance may still have to say that
    /// it has redeemed this token. One that is dated just after its device's past lies ahead, and may be
    /// older than its date says, unless this instance has issued it since. `row`: as Redis has it.
    fn may_be_used(&self, token: &Token, row: Option<&Row>) -> bool {
        let Grace { until_ms, forgot_before_s } = self.state.grace;
        let rows = &self.store.memory.rows;
        let is_dated = || {
            let t = row.map_or_else(|| rows.row(&token.claims.device_id).bound.t, |r| r.bound.t);
            token.claims.iat == t.saturating_add(1)
        };
        let is_ours = || self.in_redis(&token.hash) == Some(InRedis::Confirmed);
        self.store.rules.redeem == OutageRedeem::None
            && self.now.mono_ms < until_ms
            && forgot_before_s
                .is_some_and(|before| token.claims.iat <= before || is_dated() && !is_ours())
    }

    /// Redis has answered. `was_confirmed`: it had confirmed the token when the attempt began.
    pub(super) fn end_consume(
        &mut self,
        token: &Token,
        serial: Serial,
        was_confirmed: bool,
        result: Answer,
    ) -> Answer {
        let (hash, late) = (&token.hash, self.late);
        let ledger = &self.store.memory.ledger;
        if late || !matches!(result, Ok(Outcome::Granted(_))) && self.is_only_here(hash) {
            // While the attempt ran, the token was left out of the lists (`docs/model`, row 34e).
            self.carry_again(hash);
        }
        match result {
            Ok(Outcome::Granted(row)) if self.may_be_used(token, Some(&row)) => {
                ledger.release(hash, serial);
                self.state.follow_ups.withdraw(token, serial);
                Err(StoreError::Undecided)
            }
            Ok(Outcome::Granted(row)) => {
                if !ledger.grant(hash, serial) {
                    return Ok(Outcome::AlreadyUsed); // killed here meanwhile
                }
                if late {
                    self.state.follow_ups.mark(*hash);
                }
                Ok(Outcome::Granted(row))
            }
            // Redis does not have the token, whatever it has of its mark.
            Err(StoreError::Down(Down { kind: DownKind::Part, .. }))
                if self.is_only_here(hash) && !late && !self.store.rules.required =>
            {
                ledger.release(hash, serial);
                self.grant_from_memory(token, serial)
            }
            Err(StoreError::Down(Down { maybe_done: true, .. })) => {
                ledger.lose(hash, serial);
                self.state.follow_ups.withdraw(token, serial);
                Err(StoreError::Undecided)
            }
            Err(error @ (StoreError::Failed(_) | StoreError::Unsafe)) => {
                // Not what Redis answers, but the mark may stand.
                ledger.release(hash, serial);
                self.state.follow_ups.withdraw(token, serial);
                Err(error)
            }
            Ok(Outcome::Unknown { lossless_run }) => {
                ledger.release(hash, serial);
                self.judge_unknown(token, was_confirmed, lossless_run)
            }
            other => {
                ledger.release(hash, serial);
                other
            }
        }
    }

    /// Redis does not know the token. If it has confirmed it to us before and loses nothing by
    /// itself, somebody has deleted it. If memory knows it otherwise, Redis has lost data: everything
    /// is carried over again. Shortly after an outage another instance may still have to carry it
    /// over. And what a Redis says that has been lost meanwhile, by this batch even, decides nothing.
    fn judge_unknown(
        &mut self,
        token: &Token,
        was_confirmed: bool,
        lossless_run: Option<String>,
    ) -> Answer {
        if self.late || self.state.mode != Mode::Primary {
            return Err(StoreError::Undecided);
        }
        let copy = self.store.memory.live(&token.hash, self.now);
        let copy = copy.filter(|copy| copy.left_ms > ABOUT_TO_END_MS).map(|copy| copy.in_redis);
        let known = self.state.follow_ups.run_id();
        let is_known = |run: &String| known.is_some_and(|known| runs::has(known, run));
        // While a part is away, others may have got its keys, without what was there.
        let is_lossless =
            self.store.redis.missing().is_none() && lossless_run.as_ref().is_some_and(is_known);
        match copy {
            Some(InRedis::Confirmed) if was_confirmed && is_lossless => {
                self.note_deleted(token);
                Ok(Outcome::Unknown { lossless_run })
            }
            // It is about to be carried over, or was while the attempt ran.
            Some(InRedis::No | InRedis::Entering) => Err(StoreError::Undecided),
            Some(InRedis::Confirmed) if !was_confirmed => Err(StoreError::Undecided),
            Some(_) if self.store.rules.redeem == OutageRedeem::Own => {
                self.note_lost(&token.hash);
                Err(StoreError::Undecided)
            }
            _ if self.now.mono_ms < self.state.grace.until_ms => Err(StoreError::Undecided),
            _ => Ok(Outcome::Unknown { lossless_run }),
        }
    }

    /// Redis has lost a token, and so perhaps more: everything is carried over again. One that evicts
    /// loses tokens all the time; between two returns they are carried over one by one.
    fn note_lost(&mut self, hash: &TokenHash) {
        let (state, now_ms) = (&mut *self.state, self.now.mono_ms);
        if state.loss_seen_ms.is_some_and(|seen| now_ms < seen + BETWEEN_RETURNS_MS) {
            return state.follow_ups.carry(*hash);
        }
        state.loss_seen_ms = Some(now_ms);
        state.follow_ups.abandon();
        self.store.doubt(state, Mode::Suspect, "Redis has lost a token of this instance");
    }

    /// Dead from now on, and what Redis still has of it (the lease, the count) goes.
    fn note_deleted(&mut self, token: &Token) {
        let (device, hash) = (&token.claims.device_id, token.hash.short());
        log::info!(
            event = "token_killed", device:%;
            "token {hash} of {device} was deleted from Redis, so it is dead"
        );
        let memory = &self.store.memory;
        memory.ledger.delete(token.hash, token.claims.clone(), self.now);
        memory.remove(&token.hash);
        self.state.follow_ups.remove(token.clone());
    }

    /// Redeems a token that was issued here. One that only Redis knows is never guessed at, and
    /// neither is any while it is not decided whether Redis is away.
    pub(super) fn consume_from_memory(&mut self, token: &Token, serial: Serial) -> Answer {
        let Failover { memory, rules, .. } = self.store;
        if memory.ledger.knows_as_spent(&token.hash) {
            return Ok(Outcome::AlreadyUsed);
        }
        if memory.ledger.knows_as_deleted(&token.hash) {
            return Ok(Outcome::Unknown { lossless_run: None });
        }
        // Where a part of a cluster is away, others redeem in the rest of it (`docs/redis.md`).
        let whole_is_away = !rules.is_spread || self.state.is_silent;
        let redeems_own = rules.redeem == OutageRedeem::Own && whole_is_away;
        let in_redis = self.in_redis(&token.hash);
        let is_ours = in_redis.is_some_and(|in_redis| redeems_own || in_redis == InRedis::No);
        if !is_ours || !matches!(self.state.mode, Mode::Degraded | Mode::Returning) {
            return Err(StoreError::Undecided);
        }
        self.grant_from_memory(token, serial)
    }

    /// No other instance grants it.
    fn grant_from_memory(&mut self, token: &Token, serial: Serial) -> Answer {
        let ledger = &self.store.memory.ledger;
        // An attempt whose outcome is not known got no certificate.
        let begun = ledger.begin(token, serial, true, self.now);
        if begun != Begin::Begun || !ledger.grant(&token.hash, serial) {
            return Ok(Outcome::AlreadyUsed);
        }
        self.state.follow_ups.mark(token.hash);
        Ok(Outcome::Granted(Box::default()))
    }

    /// The attempt came to nothing. `withdrawn`: Redis has confirmed that the mark is gone.
    pub(super) fn given_back(&mut self, token: &Token, serial: Serial, withdrawn: bool) -> Answer {
        self.store.memory.ledger.release(&token.hash, serial);
        if !withdrawn {
            self.state.follow_ups.withdraw(token, serial);
        }
        self.carry_again(&token.hash);
        Ok(Outcome::Done)
    }

    fn is_only_here(&self, hash: &TokenHash) -> bool {
        self.in_redis(hash) == Some(InRedis::No)
    }
}
