//! What a batch of operations goes through: begun under the state's lock, asked of Redis without it,
//! settled under it again; or answered from memory.

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};

use super::{Failover, Mode, State};
use crate::clock::Now;
use crate::config::OutageRedeem;
use crate::device::DeviceId;
use crate::jwt::{Token, TokenHash};
use crate::serial::Serial;
use crate::store::ledger::Begin;
use crate::store::memory::{Copy, InRedis};
use crate::store::{Answer, Dead, Down, Kill, Op, Outcome, Status, StoreError, TokenStore, locked};

/// An operation on its way to Redis.
struct Sent<'a> {
    at: usize,
    op: &'a Op,
}

impl TokenStore for Failover {
    fn run(&self, ops: &[Op], now: Now) -> Vec<Answer> {
        let mut answers: Vec<Option<Answer>> = ops.iter().map(|_| None).collect();
        let (sent, epoch) = self.begin(ops, now, &mut answers);
        if !sent.is_empty() {
            let results = if sent.len() == ops.len() {
                self.remote.run(ops, now)
            } else {
                let remote_ops: Vec<Op> = sent.iter().map(|sent| sent.op.clone()).collect();
                self.remote.run(&remote_ops, now)
            };
            self.end(&sent, results, epoch, now, &mut answers);
        }
        answers.into_iter().map(|answer| answer.unwrap_or(Err(StoreError::Undecided))).collect()
    }

    fn status(&self) -> Status {
        let state = locked(&self.state);
        let redis_serves = matches!(state.mode, Mode::Primary);
        let remote = if redis_serves { self.remote.status() } else { Status::default() };
        Status {
            redis_enabled: true,
            redis_serves,
            foreign_ca: state.foreign_ca,
            full: !redis_serves && self.memory.is_full(),
            losses: state.epoch,
            round_trip: remote.round_trip,
        }
    }
}

impl Failover {
    /// Answers from memory what memory is to answer, and begins the rest.
    fn begin<'a>(
        &self,
        ops: &'a [Op],
        now: Now,
        answers: &mut [Option<Answer>],
    ) -> (Vec<Sent<'a>>, u64) {
        let mut state = self.wait_out_last_round();
        let mut sent = Vec::new();
        for (at, (op, answer)) in ops.iter().zip(answers).enumerate() {
            *answer = match state.mode {
                Mode::Primary => self.begin_remote(&mut state, op, now),
                _ => Some(self.answer_locally(&mut state, op, now)),
            };
            if answer.is_none() {
                sent.push(Sent { at, op });
            }
        }
        (sent, state.epoch)
    }

    /// In the last round of a carry-over everybody waits, but never long.
    fn wait_out_last_round(&self) -> MutexGuard<'_, State> {
        let state = locked(&self.state);
        let waited = self
            .changed
            .wait_timeout_while(state, self.timeout, |state| state.mode == Mode::Closing);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Notes what is about to be asked of Redis; an answer if it need not be asked.
    fn begin_remote(&self, state: &mut State, op: &Op, now: Now) -> Option<Answer> {
        match op {
            Op::Issue(token) | Op::Replace(token) => {
                *state.issuing.entry(token.claims.device_id.clone()).or_default() += 1;
                None
            }
            Op::Consume(token, serial) => match self.ledger.begin(token, *serial, false, now) {
                Begin::Begun => None,
                Begin::Spent => Some(Ok(Outcome::AlreadyUsed)),
                Begin::Unknown => Some(Err(StoreError::Undecided)),
                Begin::Deleted => Some(Ok(Outcome::Unknown { lossless_run: None })),
            },
            _ => None,
        }
    }

    /// Reads what Redis answered, each operation for itself.
    fn end(
        &self,
        sent: &[Sent<'_>],
        results: Vec<Answer>,
        epoch: u64,
        now: Now,
        answers: &mut [Option<Answer>],
    ) {
        let mut state = locked(&self.state);
        self.notice(&mut state, &results, epoch);
        let late = state.epoch != epoch;
        for (Sent { at, op }, result) in sent.iter().zip(results) {
            let answer = self.settle(&mut state, op, result, late, now);
            if let Some(slot) = answers.get_mut(*at) {
                *slot = Some(answer);
            }
        }
        if !state.todo.is_empty() {
            self.changed.notify_all();
        }
    }

    /// The answer to one operation that went to Redis. `late`: Redis was lost meanwhile, so what it
    /// granted may be in a server that is gone, and is carried over again.
    fn settle(&self, state: &mut State, op: &Op, result: Answer, late: bool, now: Now) -> Answer {
        match op {
            Op::Issue(token) | Op::Replace(token) => {
                release_device(&mut state.issuing, &token.claims.device_id);
                self.settle_issue(state, op, token, result, late, now)
            }
            Op::Consume(token, serial) => {
                self.settle_consume(state, token, *serial, result, late, now)
            }
            Op::Kill(kill) => {
                let killed = self.kill_copies(state, kill, now);
                match result {
                    Ok(Outcome::Killed(dead)) => {
                        if let Some(dead) = &dead {
                            self.bury(state, dead, late, now);
                        }
                        Ok(Outcome::Killed(dead.or(killed)))
                    }
                    Ok(other) => Ok(other),
                    Err(StoreError::Failed(why)) => Err(StoreError::Failed(why)),
                    Err(_) => {
                        state.todo.note_kill(kill.clone(), now);
                        Ok(Outcome::Killed(killed))
                    }
                }
            }
            Op::GiveBack(token, serial) => {
                self.ledger.release(&token.hash, *serial);
                if result.is_err() || late {
                    state.todo.withdraw(token, *serial);
                }
                self.carry_again(state, &token.hash, now);
                Ok(Outcome::Done)
            }
            Op::Finish(token) | Op::TakeBack(token) => {
                self.memory.remove(&token.hash);
                if result.is_err() || late {
                    state.todo.remove(token.clone());
                }
                Ok(Outcome::Done)
            }
            Op::Count => result.or_else(|_| Ok(Outcome::Counted(self.memory.count()))),
            Op::Mark(..) | Op::Carry(..) => result,
        }
    }

    fn settle_issue(
        &self,
        state: &mut State,
        op: &Op,
        token: &Token,
        result: Answer,
        late: bool,
        now: Now,
    ) -> Answer {
        match result {
            Ok(Outcome::Issued { killed }) => {
                if let Some(dead) = &killed {
                    self.bury(state, dead, late, now);
                }
                let in_redis = if late { InRedis::Maybe } else { InRedis::Confirmed(state.era) };
                self.memory.copy(token, in_redis, now);
                if late {
                    state.note_carry(token.hash);
                }
                Ok(Outcome::Issued { killed })
            }
            Err(StoreError::Down(down)) => {
                if let Some(dead) = &down.dying {
                    self.bury(state, dead, true, now);
                }
                let in_redis = if down.maybe_done { InRedis::Maybe } else { InRedis::No };
                self.issue_locally(state, op, token, in_redis, now)
            }
            Err(StoreError::Failed(why)) => {
                // What was carried out of it would keep the device waiting for a token that nobody
                // was given.
                state.todo.remove(token.clone());
                Err(StoreError::Failed(why))
            }
            other => other,
        }
    }

    fn settle_consume(
        &self,
        state: &mut State,
        token: &Token,
        serial: Serial,
        result: Answer,
        late: bool,
        now: Now,
    ) -> Answer {
        let hash = &token.hash;
        if late {
            // While the attempt ran, the token was left out of the lists.
            self.carry_again(state, hash, now);
        }
        match result {
            Ok(Outcome::Granted) => {
                if !self.ledger.grant(hash, serial) {
                    return Ok(Outcome::AlreadyUsed); // killed here meanwhile
                }
                if late {
                    state.note_mark(*hash);
                }
                Ok(Outcome::Granted)
            }
            Err(StoreError::Down(Down { maybe_done: true, .. })) => {
                self.ledger.lose(hash, serial);
                state.todo.withdraw(token, serial);
                Err(StoreError::Undecided)
            }
            Err(StoreError::Failed(why)) => {
                // Not what Redis answers, but the mark may stand.
                self.ledger.release(hash, serial);
                state.todo.withdraw(token, serial);
                Err(StoreError::Failed(why))
            }
            Ok(Outcome::Unknown { lossless_run }) => {
                self.ledger.release(hash, serial);
                self.judge_unknown(state, token, lossless_run, late, now)
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
        token: &Token,
        lossless_run: Option<String>,
        late: bool,
        now: Now,
    ) -> Answer {
        const ABOUT_TO_END_MS: u64 = 2000;
        if late || state.mode != Mode::Primary {
            return Err(StoreError::Undecided);
        }
        let copy = self.memory.live(&token.hash, now);
        let copy = copy.filter(|copy| copy.left_ms > ABOUT_TO_END_MS);
        let confirmed = copy.as_ref().is_some_and(|c| c.in_redis == InRedis::Confirmed(state.era));
        if confirmed && lossless_run.is_some() && lossless_run == state.run_id {
            self.note_deleted(state, token, now);
            return Ok(Outcome::Unknown { lossless_run });
        }
        if copy.is_some() && self.policy == OutageRedeem::Own {
            state.run_id = None;
            self.suspect(state, "Redis has lost a token of this instance".to_owned());
            return Err(StoreError::Undecided);
        }
        if now.mono_ms < state.grace_until_ms {
            return Err(StoreError::Undecided);
        }
        Ok(Outcome::Unknown { lossless_run })
    }

    /// Dead from now on, and what Redis still has of it (the claim, the count) goes.
    fn note_deleted(&self, state: &mut State, token: &Token, now: Now) {
        let device = &token.claims.device_id;
        log::info!(
            "token {} of {device} was deleted from Redis, so it is dead",
            token.hash.short()
        );
        self.ledger.delete(token.hash, token.claims.clone(), now);
        self.memory.remove(&token.hash);
        state.todo.remove(token.clone());
    }

    /// The token is dead, whoever killed it. `again`: Redis may not know yet.
    fn bury(&self, state: &mut State, dead: &Dead, again: bool, now: Now) {
        self.ledger.kill(dead.hash, dead.claims.clone(), now);
        self.memory.remove(&dead.hash);
        if again {
            state.note_mark(dead.hash);
        }
    }

    /// Kills the copies of the device's tokens; answers one of them.
    fn kill_copies(&self, state: &mut State, kill: &Kill, now: Now) -> Option<Dead> {
        let killed = self.memory.kill(kill, now);
        killed.iter().for_each(|dead| state.note_mark(dead.hash));
        killed.into_iter().next()
    }

    /// A token that memory granted and that was given back: its carried mark took it from Redis. Or
    /// one that Redis may have lost while an attempt had it. If it is used after all, it stays here.
    fn carry_again(&self, state: &mut State, hash: &TokenHash, now: Now) {
        if self.memory.live(hash, now).is_some() {
            state.note_carry(*hash);
        }
    }
}

// What memory answers while Redis does not serve.
impl Failover {
    fn answer_locally(&self, state: &mut State, op: &Op, now: Now) -> Answer {
        match op {
            Op::Issue(token) | Op::Replace(token) => {
                self.issue_locally(state, op, token, InRedis::No, now)
            }
            Op::Consume(token, serial) => self.consume_locally(state, token, *serial, now),
            Op::GiveBack(token, serial) => {
                self.ledger.release(&token.hash, *serial);
                state.todo.withdraw(token, *serial);
                self.carry_again(state, &token.hash, now);
                Ok(Outcome::Done)
            }
            Op::Finish(token) | Op::TakeBack(token) => {
                self.memory.remove(&token.hash);
                // The mark takes token and claim with it, and is listed at the return in any case.
                match self.ledger.mark_of(&token.hash) {
                    Some(_) => state.note_mark(token.hash),
                    None => state.todo.remove(token.clone()),
                }
                Ok(Outcome::Done)
            }
            Op::Kill(kill) => {
                state.todo.note_kill(kill.clone(), now);
                Ok(Outcome::Killed(self.kill_copies(state, kill, now)))
            }
            Op::Count => Ok(Outcome::Counted(self.memory.count())),
            Op::Mark(..) | Op::Carry(..) => Err(StoreError::Undecided),
        }
    }

    /// `in_redis`: the token may have reached Redis before the reply was lost.
    fn issue_locally(
        &self,
        state: &mut State,
        op: &Op,
        token: &Token,
        in_redis: InRedis,
        now: Now,
    ) -> Answer {
        let answer = self.enter_locally(state, op, token, in_redis, now);
        match &answer {
            Ok(Outcome::Issued { .. }) => state.note_carry(token.hash),
            _ if in_redis != InRedis::No => state.todo.remove(token.clone()),
            _ => {}
        }
        answer
    }

    fn enter_locally(
        &self,
        state: &mut State,
        op: &Op,
        token: &Token,
        in_redis: InRedis,
        now: Now,
    ) -> Answer {
        let device = &token.claims.device_id;
        if !matches!(op, Op::Replace(_)) {
            if state.issuing.contains_key(device) {
                return Ok(Outcome::AlreadyActive { expires_at_ms: token.claims.exp * 1000 });
            }
            return self.memory.issue(token, in_redis, now);
        }
        let killed = self.memory.replace(token, in_redis, now)?;
        if let Some(dead) = &killed {
            state.note_mark(dead.hash);
        }
        let spare = Some(token.hash);
        let issued_by_s = token.claims.iat;
        state.todo.note_kill(Kill { device: device.clone(), issued_by_s, spare }, now);
        Ok(Outcome::Issued { killed })
    }

    /// Redeems a token that was issued here. One that only Redis knows is never guessed at, and
    /// neither is any while it is not decided whether Redis is away.
    fn consume_locally(
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
        let fits = |copy: &Copy| self.policy == OutageRedeem::Own || copy.in_redis == InRedis::No;
        if !self.memory.live(hash, now).is_some_and(|copy| fits(&copy))
            || state.mode != Mode::Degraded
        {
            return Err(StoreError::Undecided);
        }
        // An attempt whose outcome is not known got no certificate, and no other instance grants it.
        if self.ledger.begin(token, serial, true, now) != Begin::Begun {
            return Ok(Outcome::AlreadyUsed);
        }
        if !self.ledger.grant(hash, serial) {
            return Ok(Outcome::AlreadyUsed);
        }
        state.note_mark(*hash);
        Ok(Outcome::Granted)
    }
}

fn release_device(issuing: &mut HashMap<DeviceId, u32>, device: &DeviceId) {
    if let Some(count) = issuing.get_mut(device) {
        *count -= 1;
        if *count == 0 {
            issuing.remove(device);
        }
    }
}
