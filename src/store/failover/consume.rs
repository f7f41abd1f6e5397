//! Consuming and giving back: what Redis has answered, and the answer from memory.

use super::{Failover, Grace, Mode, State, runs};
use crate::clock::Now;
use crate::config::OutageRedeem;
use crate::jwt::{Token, TokenHash};
use crate::serial::Serial;
use crate::store::ledger::Begin;
use crate::store::memory::{Copy, InRedis};
use crate::store::{Answer, Down, DownKind, Outcome, StoreError};

/// A token with less than this left may have ended in Redis already.
const ABOUT_TO_END_MS: u64 = 2000;
/// So often a lost token makes everything be carried over.
const BETWEEN_RETURNS_MS: u64 = 30_000;

/// An attempt to redeem a token, which Redis was asked about.
pub(super) struct Attempt<'a> {
    pub token: &'a Token,
    pub serial: Serial,
    /// Redis had confirmed the token when the attempt began.
    pub is_confirmed: bool,
}

impl Failover {
    /// Takes the token for this attempt; an answer if Redis need not be asked.
    pub(super) fn begin_consume(
        &self,
        state: &State,
        token: &Token,
        serial: Serial,
        now: Now,
    ) -> Option<Answer> {
        match self.ledger.begin(token, serial, false, now) {
            Begin::Begun if self.may_be_used(state, token, now) => {
                self.ledger.release(&token.hash, serial);
                Some(Err(StoreError::Undecided))
            }
            Begin::Begun => None,
            Begin::Spent => Some(Ok(Outcome::AlreadyUsed)),
            Begin::Unknown => Some(Err(StoreError::Undecided)),
            Begin::Deleted => Some(Ok(Outcome::Unknown { lossless_run: None })),
        }
    }

    /// Redis had forgotten something when it returned, and another instance may still have to say that
    /// it has redeemed this token.
    fn may_be_used(&self, state: &State, token: &Token, now: Now) -> bool {
        let Grace { until_ms, forgot_before_s } = state.grace;
        self.rules.redeem == OutageRedeem::None
            && now.mono_ms < until_ms
            && forgot_before_s.is_some_and(|before| token.claims.iat <= before)
    }

    /// Redis has answered. `late`: it was lost meanwhile, so the mark may be in a server that is
    /// gone, and is carried over again.
    pub(super) fn end_consume(
        &self,
        state: &mut State,
        attempt: &Attempt<'_>,
        result: Answer,
        late: bool,
        now: Now,
    ) -> Answer {
        let Attempt { token, serial, .. } = *attempt;
        let hash = &token.hash;
        let is_only_here =
            || self.memory.live(hash, now).is_some_and(|copy| copy.in_redis == InRedis::No);
        if late || !matches!(result, Ok(Outcome::Granted(_))) && is_only_here() {
            // While the attempt ran, the token was left out of the lists (`docs/model`, row 34e).
            self.carry_again(state, hash, now);
        }
        match result {
            Ok(Outcome::Granted(row)) => {
                if !self.ledger.grant(hash, serial) {
                    return Ok(Outcome::AlreadyUsed); // killed here meanwhile
                }
                if late {
                    state.follow_ups.mark(*hash);
                }
                Ok(Outcome::Granted(row))
            }
            // Redis does not have the token, whatever it has of its mark.
            Err(StoreError::Down(Down { kind: DownKind::Part, .. }))
                if is_only_here() && !late && !self.rules.required =>
            {
                self.ledger.release(hash, serial);
                self.grant_from_memory(state, token, serial, now)
            }
            Err(StoreError::Down(Down { maybe_done: true, .. })) => {
                self.ledger.lose(hash, serial);
                state.follow_ups.withdraw(token, serial);
                Err(StoreError::Undecided)
            }
            Err(error @ (StoreError::Failed(_) | StoreError::Unsafe)) => {
                // Not what Redis answers, but the mark may stand.
                self.ledger.release(hash, serial);
                state.follow_ups.withdraw(token, serial);
                Err(error)
            }
            Ok(Outcome::Unknown { lossless_run }) => {
                self.ledger.release(hash, serial);
                self.judge_unknown(state, attempt, lossless_run, late, now)
            }
            other => {
                self.ledger.release(hash, serial);
                other
            }
        }
    }

    /// Redis does not know the token. If it has confirmed it to us before and loses nothing by
    /// itself, somebody has deleted it. If memory knows it otherwise, Redis has lost data: everything
    /// is carried over again. Shortly after an outage another instance may still have to carry it
    /// over. And what a Redis says that has been lost meanwhile, by this batch even, decides nothing.
    fn judge_unknown(
        &self,
        state: &mut State,
        attempt: &Attempt<'_>,
        lossless_run: Option<String>,
        late: bool,
        now: Now,
    ) -> Answer {
        if late || state.mode != Mode::Primary {
            return Err(StoreError::Undecided);
        }
        let token = attempt.token;
        let copy = self.memory.live(&token.hash, now);
        let copy = copy.filter(|copy| copy.left_ms > ABOUT_TO_END_MS).map(|copy| copy.in_redis);
        let is_confirmed = attempt.is_confirmed && copy == Some(InRedis::Confirmed);
        let known = state.follow_ups.run_id();
        let is_known = |run: &String| known.is_some_and(|known| runs::has(known, run));
        // While a part is away, others may have got its keys, without what was there.
        let is_whole = self.remote.missing().is_none();
        if is_confirmed && is_whole && lossless_run.as_ref().is_some_and(is_known) {
            self.note_deleted(state, token, now);
            return Ok(Outcome::Unknown { lossless_run });
        }
        match copy {
            // It is about to be carried over, or was while the attempt ran.
            Some(InRedis::No | InRedis::Entering) => return Err(StoreError::Undecided),
            Some(InRedis::Confirmed) if !attempt.is_confirmed => {
                return Err(StoreError::Undecided);
            }
            Some(_) if self.rules.redeem == OutageRedeem::Own => {
                self.note_lost(state, &token.hash, now);
                return Err(StoreError::Undecided);
            }
            _ => {}
        }
        if now.mono_ms < state.grace.until_ms {
            return Err(StoreError::Undecided);
        }
        Ok(Outcome::Unknown { lossless_run })
    }

    /// Redis has lost a token, and so perhaps more: everything is carried over again. One that evicts
    /// loses tokens all the time; between two returns they are carried over one by one.
    fn note_lost(&self, state: &mut State, hash: &TokenHash, now: Now) {
        if state.loss_seen_ms.is_some_and(|seen| now.mono_ms < seen + BETWEEN_RETURNS_MS) {
            return state.follow_ups.carry(*hash);
        }
        state.loss_seen_ms = Some(now.mono_ms);
        state.follow_ups.abandon();
        self.doubt(state, Mode::Suspect, "Redis has lost a token of this instance");
    }

    /// Dead from now on, and what Redis still has of it (the lease, the count) goes.
    fn note_deleted(&self, state: &mut State, token: &Token, now: Now) {
        let device = &token.claims.device_id;
        let hash = token.hash.short();
        log::info!(
            event = "token_killed", device:%;
            "token {hash} of {device} was deleted from Redis, so it is dead"
        );
        self.ledger.delete(token.hash, token.claims.clone(), now);
        self.memory.remove(&token.hash);
        state.follow_ups.remove(token.clone());
    }

    /// Redeems a token that was issued here. One that only Redis knows is never guessed at, and
    /// neither is any while it is not decided whether Redis is away.
    pub(super) fn consume_from_memory(
        &self,
        state: &mut State,
        token: &Token,
        serial: Serial,
        now: Now,
    ) -> Answer {
        let hash = &token.hash;
        if self.ledger.knows_as_spent(hash) {
            return Ok(Outcome::AlreadyUsed);
        }
        if self.ledger.knows_as_deleted(hash) {
            return Ok(Outcome::Unknown { lossless_run: None });
        }
        // Where a part of a cluster is away, others redeem in the rest of it (`docs/redis.md`).
        let whole_is_away = !self.rules.is_spread || state.is_silent;
        let redeems_own = self.rules.redeem == OutageRedeem::Own && whole_is_away;
        let fits = |copy: &Copy| redeems_own || copy.in_redis == InRedis::No;
        let ours = self.memory.live(hash, now).is_some_and(|copy| fits(&copy));
        if !ours || !matches!(state.mode, Mode::Degraded | Mode::Returning) {
            return Err(StoreError::Undecided);
        }
        self.grant_from_memory(state, token, serial, now)
    }

    /// No other instance grants it.
    fn grant_from_memory(
        &self,
        state: &mut State,
        token: &Token,
        serial: Serial,
        now: Now,
    ) -> Answer {
        let hash = &token.hash;
        // An attempt whose outcome is not known got no certificate.
        if self.ledger.begin(token, serial, true, now) != Begin::Begun {
            return Ok(Outcome::AlreadyUsed);
        }
        if !self.ledger.grant(hash, serial) {
            return Ok(Outcome::AlreadyUsed);
        }
        state.follow_ups.mark(*hash);
        Ok(Outcome::Granted(Box::default()))
    }

    /// The attempt came to nothing. `withdrawn`: Redis has confirmed that the mark is gone.
    pub(super) fn given_back(
        &self,
        state: &mut State,
        token: &Token,
        serial: Serial,
        withdrawn: bool,
        now: Now,
    ) -> Answer {
        self.ledger.release(&token.hash, serial);
        if !withdrawn {
            state.follow_ups.withdraw(token, serial);
        }
        self.carry_again(state, &token.hash, now);
        Ok(Outcome::Done)
    }
}
