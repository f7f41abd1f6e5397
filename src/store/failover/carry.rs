//! The carry-over: tells Redis what it does not know, and lets it serve when it knows everything.

use std::fmt;
use std::ops::AddAssign;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::follow_up::FollowUp;
use super::{Failover, Hello, Mode, State};
use crate::clock::{self, Now};
use crate::config::OutageRedeem;
use crate::store::memory::InRedis;
use crate::store::{Answer, Down, Op, Outcome, StoreError, locked};

/// After an outage other instances may still be carrying their tokens over: so long an unknown
/// token is answered with 503.
const GRACE_MS: u64 = 10_000;
/// Operations in one batch of the carry-over, if the line is fast enough.
pub(super) const BATCH: usize = 256;
/// With no more left than this, the last round begins.
const LAST_ROUND: usize = 64;

impl Failover {
    /// Carries everything over and lets Redis serve.
    pub(super) fn carry_over(&self, hello: &Hello) -> Result<(), StoreError> {
        let full = self.make_lists(hello);
        let mut tally = Tally::default();
        loop {
            while locked(&self.state).follow_ups.len() > LAST_ROUND {
                tally += self.carry_batch()?;
            }
            if self.last_round(hello, full, &mut tally)? {
                return Ok(());
            }
        }
    }

    /// Does what could not be confirmed before, while Redis serves.
    pub(super) fn tidy_up(&self) {
        let epoch = locked(&self.state).epoch;
        if let Err(error) = self.carry_batch() {
            self.notice(&mut locked(&self.state), &[Err(error)], epoch);
        }
    }

    /// Lists what is to be carried over: after an outage, or into a server that may have lost data,
    /// everything; else only what was noted since the connection was lost.
    fn make_lists(&self, hello: &Hello) -> bool {
        let mut state = locked(&self.state);
        let is = |run_id: &Option<String>| run_id.is_some() && *run_id == hello.run_id;
        let full = state.mode == Mode::Degraded || !is(&state.run_id);
        if full && !(state.noting && is(&state.listed_for)) {
            let now = clock::now();
            let rows = self.rows.to_be_told(now);
            state.follow_ups.list(rows, self.ledger.marked(), self.memory.hashes(now));
            state.run_id = None;
            state.listed_for.clone_from(&hello.run_id);
            state.era += 1;
        }
        state.noting = true;
        if full && state.mode != Mode::Degraded {
            // This may take a while.
            state.mode = Mode::Returning;
            self.changed.notify_all();
        }
        full
    }

    /// Carries the first operations of the list over. What fails stays listed.
    fn carry_batch(&self) -> Result<Tally, StoreError> {
        let now = clock::now();
        let (follow_ups, ops) = self.take_batch(now);
        let sent: Vec<Op> = ops.iter().flatten().cloned().collect();
        let results = if sent.is_empty() { Vec::new() } else { self.remote.run(&sent, now) };
        self.fit_batches(clock::now().mono_ms - now.mono_ms, &results);
        let mut results = results.into_iter();
        let mut tally = Tally::default();
        let mut error = None;
        let mut told = Vec::new();
        let mut state = locked(&self.state);
        for (follow_up, op) in follow_ups.into_iter().zip(ops) {
            let Some(op) = op else { continue };
            match results.next() {
                Some(Ok(outcome)) => {
                    tally.add(&follow_up);
                    self.carried(&mut state, follow_up, &outcome, now);
                    if let (Op::Tell(device, _), Outcome::Told(answer)) = (op, outcome) {
                        told.push((device, answer.0));
                    }
                }
                Some(Err(StoreError::Failed(why))) => {
                    log::error!("could not be carried over to Redis: {follow_up:?}: {why}");
                }
                Some(Err(down)) => {
                    self.not_sent(&follow_up, &down);
                    state.follow_ups.put_back(follow_up);
                    error = Some(down);
                }
                None => state.follow_ups.put_back(follow_up),
            }
        }
        drop(state);
        self.rows.learn(told, now);
        error.map_or(Ok(tally), Err)
    }

    /// A slow line gets smaller batches: one that always takes too long would never be through.
    fn fit_batches(&self, took_ms: u64, results: &[Answer]) {
        let size = self.carry_size.load(Ordering::Relaxed);
        let down = results.iter().any(|result| matches!(result, Err(StoreError::Down(_))));
        let share = Duration::from_millis(took_ms).as_secs_f64() / self.rules.timeout.as_secs_f64();
        let size = match () {
            () if down || share > 0.5 => size / 2,
            () if share < 0.125 => size * 2,
            () => size,
        };
        self.carry_size.store(size.clamp(1, BATCH), Ordering::Relaxed);
    }

    /// Under the lock, so that no redemption from memory comes between the look whether a token is
    /// spent and the note that it is in Redis: with `OUTAGE_REDEEM=none` it must be one or the other.
    fn take_batch(&self, now: Now) -> (Vec<FollowUp>, Vec<Option<Op>>) {
        let mut state = locked(&self.state);
        let follow_ups = state.follow_ups.take(self.carry_size.load(Ordering::Relaxed));
        let ops = follow_ups.iter().map(|follow_up| self.op_of(follow_up, now)).collect();
        (follow_ups, ops)
    }

    /// The operation that does it, judged by what is true now.
    fn op_of(&self, follow_up: &FollowUp, now: Now) -> Option<Op> {
        match follow_up {
            FollowUp::Row(device) => Some(Op::Tell(device.clone(), self.rows.row(device))),
            FollowUp::Mark(hash) => {
                let (mark, claims) = self.ledger.mark_of(hash)?;
                Some(Op::Mark(*hash, mark, claims))
            }
            FollowUp::Withdraw(token, serial) => Some(Op::GiveBack(token.clone(), *serial)),
            FollowUp::Remove(token) => Some(Op::Finish(token.clone())),
            FollowUp::Carry(hash) => {
                let copy = self.memory.live(hash, now)?;
                let fit = self.rules.redeem == OutageRedeem::Own || copy.in_redis == InRedis::No;
                if !fit || self.ledger.knows_as_spent(hash) {
                    return None;
                }
                let token = self.signer.sign(copy.claims);
                self.memory.note_in_redis(hash, InRedis::Maybe);
                Some(Op::Carry(token, copy.left_ms))
            }
        }
    }

    /// A token of which nothing was sent is still only here, and may be carried over another time
    /// also with `OUTAGE_REDEEM=none`.
    fn not_sent(&self, follow_up: &FollowUp, error: &StoreError) {
        if let (FollowUp::Carry(hash), StoreError::Down(Down { maybe_done: false, .. })) =
            (follow_up, error)
        {
            self.memory.note_in_redis(hash, InRedis::No);
        }
    }

    fn carried(&self, state: &mut State, follow_up: FollowUp, outcome: &Outcome, now: Now) {
        match (follow_up, outcome) {
            (FollowUp::Carry(hash), _) => {
                self.memory.note_in_redis(&hash, InRedis::Confirmed(state.era));
            }
            (FollowUp::Withdraw(token, serial), _) => {
                self.ledger.release_unknown(&token.hash, serial)
            }
            (FollowUp::Row(device), Outcome::Told(answer)) => {
                let (row, killed) = &**answer;
                if let Some(dead) = killed {
                    self.mark_dead(state, dead, false, now);
                }
                // Another instance may have killed more than is known here.
                self.kill_copies(state, &device, row.bound.t, now);
            }
            _ => {}
        }
    }

    /// With everybody waiting, carries the rest over and switches. `false`: somebody would have
    /// waited too long and was answered from memory, so there is more to carry.
    fn last_round(&self, hello: &Hello, full: bool, tally: &mut Tally) -> Result<bool, StoreError> {
        let before = {
            let mut state = locked(&self.state);
            std::mem::replace(&mut state.mode, Mode::Closing)
        };
        let deadline = Instant::now() + self.rules.timeout;
        let done = loop {
            if self.switch(hello, full, tally) {
                break Ok(true);
            }
            if Instant::now() > deadline {
                break Ok(false);
            }
            match self.carry_batch() {
                Ok(carried) => *tally += carried,
                Err(error) => break Err(error),
            }
        };
        if done != Ok(true) {
            locked(&self.state).mode = before;
        }
        self.changed.notify_all();
        done
    }

    /// Lets Redis serve, unless something was added since the last batch (`docs/model`, row 13).
    fn switch(&self, hello: &Hello, full: bool, tally: &Tally) -> bool {
        let mut state = locked(&self.state);
        if !state.follow_ups.is_empty() {
            return false;
        }
        state.mode = Mode::Primary;
        state.run_id.clone_from(&hello.run_id);
        state.listed_for = None;
        state.away = None;
        state.foreign_ca = hello.foreign_ca.is_some();
        if full && state.attempts > 0 {
            state.grace_until_ms = clock::now().mono_ms + GRACE_MS;
        }
        state.log_return(hello, full, tally);
        state.attempts += 1;
        state.has_served = true;
        self.changed.notify_all();
        true
    }
}

/// What a return has carried over.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    tokens: u64,
    marks: u64,
    others: u64,
}

impl Tally {
    fn add(&mut self, follow_up: &FollowUp) {
        match follow_up {
            FollowUp::Carry(_) => self.tokens += 1,
            FollowUp::Mark(_) => self.marks += 1,
            FollowUp::Row(_) | FollowUp::Withdraw(..) | FollowUp::Remove(_) => self.others += 1,
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, more: Tally) {
        self.tokens += more.tokens;
        self.marks += more.marks;
        self.others += more.others;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { tokens, marks, others } = self;
        write!(f, "{tokens} tokens, {marks} marks and {others} other changes carried over")
    }
}

impl State {
    fn log_return(&self, hello: &Hello, full: bool, tally: &Tally) {
        let after = Duration::from_millis(clock::now().mono_ms.saturating_sub(self.lost_ms));
        if !self.has_served {
            log::info!("✅ Redis connected successfully");
            log::debug!("after {after:.1?}: {tally}");
        } else if full {
            log::info!("✅ Redis is back after {after:.1?}: {tally}");
        } else {
            log::info!("Redis connection renewed after {after:.1?}: {tally}");
        }
        if let Some(policy) = &hello.eviction {
            log::warn!(
                "maxmemory-policy of this Redis is {policy}: it may drop the marks of used tokens, \
                 set it to noeviction"
            );
        }
        if let Some(why) = &hello.rows_refused {
            log::warn!(
                "the rows of devices are not kept in this Redis, so a kill reaches only the tokens \
                 that are known where it is made: {why}"
            );
        }
        if let Some(foreign) = &hello.foreign_ca {
            log::error!(
                "another CA is entered in this Redis ({foreign}), so devices get certificates of \
                 two CAs; if the CA was changed on purpose, delete the key 'ca'"
            );
        }
    }
}
