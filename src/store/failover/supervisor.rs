//! The supervisor thread: makes all connections, carries over what Redis does not know, switches back.

use std::fmt;
use std::ops::AddAssign;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::todo::Work;
use super::{Failover, Hello, Mode, State, log_failure};
use crate::clock::{self, Now};
use crate::config::OutageRedeem;
use crate::store::memory::InRedis;
use crate::store::{Down, Op, Outcome, StoreError, locked};

/// After an outage other instances may still be carrying their tokens over: so long an unknown
/// token is answered with 503.
const GRACE_MS: u64 = 10_000;
/// Time between two attempts to connect, doubled up to the second figure, with jitter.
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_MOST: Duration = Duration::from_secs(5);
/// Operations in one batch of the carry-over.
const BATCH: usize = 256;
/// With no more left than this, the last round begins.
const LAST_ROUND: usize = 64;

impl Failover {
    /// The supervisor thread: makes all connections, carries over, switches back. Returns after
    /// [`Failover::stop`].
    pub fn supervise(&self) {
        let mut back_off = BACK_OFF;
        loop {
            let state = locked(&self.state);
            let idle = |state: &mut State| {
                !state.stopped && state.mode == Mode::Primary && state.todo.is_empty()
            };
            let state = self.changed.wait_while(state, idle);
            let state = state.unwrap_or_else(PoisonError::into_inner);
            let (stopped, primary) = (state.stopped, state.mode == Mode::Primary);
            drop(state);
            if stopped {
                return;
            }
            let done = if primary { self.tidy_up() } else { self.bring_back() };
            back_off = match done {
                Ok(()) => BACK_OFF,
                Err(why) => {
                    self.stay_away(&why);
                    self.pause(back_off);
                    (back_off * 2).min(BACK_OFF_MOST)
                }
            };
        }
    }

    /// Does what could not be confirmed before, while Redis serves.
    fn tidy_up(&self) -> Result<(), StoreError> {
        let epoch = locked(&self.state).epoch;
        match self.carry_batch() {
            Ok(_) => Ok(()),
            Err(error) => {
                let mut state = locked(&self.state);
                self.notice(&mut state, &[Err(error)], epoch);
                Ok(())
            }
        }
    }

    /// Connects, carries over, and switches back.
    fn bring_back(&self) -> Result<(), StoreError> {
        let ca = locked(&self.state).ca_fingerprint.clone();
        let hello = self.remote.connect(ca.as_deref())?;
        let full = self.make_lists(&hello);
        let mut tally = Tally::default();
        loop {
            while locked(&self.state).todo.len() > LAST_ROUND {
                tally += self.carry_batch()?;
            }
            if self.last_round(&hello, full, &mut tally)? {
                return Ok(());
            }
        }
    }

    /// Lists what is to be carried over: after an outage, or into a server that may have lost data,
    /// everything; else only what was noted since the connection was lost.
    fn make_lists(&self, hello: &Hello) -> bool {
        let mut state = locked(&self.state);
        let known = hello.run_id.is_some() && hello.run_id == state.run_id;
        let full = state.mode == Mode::Degraded || !known;
        if full {
            let now = clock::now();
            state.todo.list(self.ledger.marked(), self.memory.hashes(now));
            state.run_id = None;
            state.era += 1;
        }
        state.noting = true;
        full
    }

    /// Carries the first operations of the list over. What fails stays listed.
    fn carry_batch(&self) -> Result<Tally, StoreError> {
        let now = clock::now();
        let (works, ops) = self.take_batch(now);
        let sent: Vec<Op> = ops.iter().flatten().cloned().collect();
        let mut results = if sent.is_empty() { Vec::new() } else { self.remote.run(&sent, now) };
        let mut results = results.drain(..);
        let mut tally = Tally::default();
        let mut error = None;
        let mut state = locked(&self.state);
        for (work, op) in works.into_iter().zip(ops) {
            let Some(op) = op else { continue };
            match results.next() {
                Some(Ok(outcome)) => {
                    tally.add(&work);
                    self.carried(&state, work, &op, &outcome);
                }
                Some(Err(StoreError::Failed(why))) => {
                    log::error!("could not be carried over to Redis: {work:?}: {why}");
                }
                Some(Err(down)) => {
                    self.not_sent(&work, &down);
                    state.todo.put_back(work);
                    error = Some(down);
                }
                None => state.todo.put_back(work),
            }
        }
        error.map_or(Ok(tally), Err)
    }

    /// Under the lock, so that no redemption from memory comes between the look whether a token is
    /// spent and the note that it is in Redis: with `OUTAGE_REDEEM=none` it must be one or the other.
    fn take_batch(&self, now: Now) -> (Vec<Work>, Vec<Option<Op>>) {
        let mut state = locked(&self.state);
        let works = state.todo.take(BATCH);
        let ops = works.iter().map(|work| self.op_of(work, now)).collect();
        (works, ops)
    }

    /// The operation that does a piece of work, judged by what is true now.
    fn op_of(&self, work: &Work, now: Now) -> Option<Op> {
        match work {
            Work::Mark(hash) => {
                let (mark, claims) = self.ledger.mark_of(hash)?;
                Some(Op::Mark(*hash, mark, claims))
            }
            Work::Withdraw(token, serial) => Some(Op::GiveBack(token.clone(), *serial)),
            Work::Remove(token) => Some(Op::Finish(token.clone())),
            Work::Kill(kill) => Some(Op::Kill(kill.clone())),
            Work::Carry(hash) => {
                let copy = self.memory.live(hash, now)?;
                let fit = self.policy == OutageRedeem::Own || copy.in_redis == InRedis::No;
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
    fn not_sent(&self, work: &Work, error: &StoreError) {
        if let (Work::Carry(hash), StoreError::Down(Down { maybe_done: false, .. })) = (work, error)
        {
            self.memory.note_in_redis(hash, InRedis::No);
        }
    }

    fn carried(&self, state: &State, work: Work, op: &Op, outcome: &Outcome) {
        match (work, op, outcome) {
            (Work::Carry(hash), ..) => {
                self.memory.note_in_redis(&hash, InRedis::Confirmed(state.era));
            }
            (Work::Withdraw(token, serial), ..) => self.ledger.release_unknown(&token.hash, serial),
            (_, Op::Mark(hash, _, claims), Outcome::Marked(Some(both))) => {
                log::error!(
                    "token {} of device {} was redeemed twice, as instance and serial: {both}",
                    hash.short(),
                    claims.device_id
                );
            }
            (Work::Kill(_), _, Outcome::Killed(Some(dead))) => {
                self.ledger.kill(dead.hash, dead.claims.clone(), clock::now());
                self.memory.remove(&dead.hash);
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
        let deadline = Instant::now() + self.timeout;
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

    /// Lets Redis serve, unless something was added since the last batch.
    fn switch(&self, hello: &Hello, full: bool, tally: &Tally) -> bool {
        let mut state = locked(&self.state);
        if !state.todo.is_empty() {
            return false;
        }
        state.mode = Mode::Primary;
        state.run_id.clone_from(&hello.run_id);
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

    /// The attempt to bring Redis back failed: one warning an outage.
    fn stay_away(&self, why: &StoreError) {
        let mut state = locked(&self.state);
        if state.attempts == 0 {
            log_failure(&why.to_string());
        } else if state.mode != Mode::Degraded {
            self.degrade(&mut state, &why.to_string());
        } else {
            log::debug!("Redis is still away: {why}");
        }
        state.mode = Mode::Degraded;
        state.noting = false;
        state.attempts += 1;
        self.remote.disconnect();
        self.changed.notify_all();
    }

    /// Waits between half the time and the whole, so that instances do not come all at once.
    fn pause(&self, back_off: Duration) {
        let mut random = [0; 1];
        let jitter = getrandom::fill(&mut random).map_or(0, |()| u32::from(random[0]));
        let wait = back_off / 2 + back_off / 2 * jitter / 255;
        let state = locked(&self.state);
        drop(self.changed.wait_timeout_while(state, wait, |state| !state.stopped));
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
    fn add(&mut self, work: &Work) {
        match work {
            Work::Carry(_) => self.tokens += 1,
            Work::Mark(_) => self.marks += 1,
            Work::Withdraw(..) | Work::Remove(_) | Work::Kill(_) => self.others += 1,
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
        if let Some(foreign) = &hello.foreign_ca {
            log::error!(
                "another CA is entered in this Redis ({foreign}), so devices get certificates of \
                 two CAs; if the CA was changed on purpose, delete the key 'ca'"
            );
        }
    }
}
