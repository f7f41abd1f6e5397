//! The carry-over: tells Redis what it does not know, and lets it serve when it knows everything.

use std::fmt;
use std::time::{Duration, Instant};

use super::follow_up::FollowUp;
use super::{Begun, Failover, Grace, Mode, State, Turn};
use crate::clock::{self, Now};
use crate::config::OutageRedeem;
use crate::device::DeviceId;
use crate::devices::Row;
use crate::store::memory::{InRedis, Memory};
use crate::store::redis::{Hello, runs};
use crate::store::{Answer, Down, DownKind, Op, Outcome, StoreError, locked};

/// After an outage other instances may still be carrying their tokens over: so long an unknown
/// token is answered with 503.
const GRACE_MS: u64 = 10_000;
/// Operations that are sent together, if the line is fast enough.
pub(super) const MOST: usize = 256;
/// With no more left than this, the last round begins.
const LAST_ROUND: usize = 64;

impl Failover {
    /// Carries everything over and lets Redis serve.
    pub(super) fn carry_over(&self, hello: &Hello) -> Result<(), StoreError> {
        let mut back = Return { hello, full: self.make_lists(hello), tally: Tally::default() };
        loop {
            while locked(&self.state).follow_ups.len() > LAST_ROUND {
                self.carry_batch(&mut back.tally)?;
            }
            if self.last_round(&mut back)? {
                return Ok(());
            }
        }
    }

    /// Does what could not be confirmed before, while Redis serves. While a part is away there is a pause
    /// before the next time, so what the others are to be told is not to wait for what is set aside.
    pub(super) fn tidy_up(&self) {
        let (epoch, end) = (locked(&self.state).epoch, Instant::now() + self.rules.timeout);
        while !locked(&self.state).follow_ups.is_empty() && Instant::now() < end {
            if let Err(error) = self.carry_batch(&mut Tally::default()) {
                return self.notice(&mut locked(&self.state), &[Err(error)], epoch);
            }
        }
    }

    /// Lists what is to be carried over: after an outage, or into a server that may have lost data,
    /// everything; else only what was noted since the connection was lost.
    fn make_lists(&self, hello: &Hello) -> bool {
        let mut state = locked(&self.state);
        state.follow_ups.take_up();
        let all_listed = state.follow_ups.go_on_with(&hello.run_id);
        let full = state.mode == Mode::Degraded || !all_listed;
        let is_another =
            |last: &String| hello.run_id.as_ref().is_some_and(|now| !runs::are_known(last, now));
        state.has_forgotten |= state.last_run.as_ref().is_some_and(is_another);
        if !all_listed {
            let now = clock::now();
            let same_run = hello.run_id.is_some() && state.last_run == hello.run_id;
            self.memory.doubt_copies(same_run);
            let Memory { rows, ledger, .. } = &*self.memory;
            let (rows, marks) = (rows.to_be_told(now), ledger.marked());
            state.follow_ups.list(&hello.run_id, rows, marks, self.memory.hashes(now));
        }
        if full && state.mode != Mode::Degraded {
            // This may take a while.
            state.mode = Mode::Returning;
            self.changed.notify_all();
        }
        full
    }

    /// Carries the first operations of the list over. What fails stays listed.
    fn carry_batch(&self, tally: &mut Tally) -> Result<(), StoreError> {
        let now = clock::now();
        let tasks = self.take_batch(now);
        let ops: Vec<Op> = tasks.iter().map(|task| task.op.clone()).collect();
        let results = match ops.is_empty() {
            true => Vec::new(),
            false => self.redis.run_on(self.redis.line(), &ops, now),
        };
        let took_ms = clock::now().mono_ms - now.mono_ms;
        let mut turn = Turn { store: self, state: locked(&self.state), now, late: false };
        self.fit_batches(&mut turn.state.carry_size, took_ms, &results);
        let mut results = results.into_iter();
        let mut error = None;
        let mut told = Vec::new();
        for task in tasks {
            match results.next() {
                Some(Ok(outcome)) => {
                    tally.add(&task.follow_up);
                    told.extend(turn.carried(task, outcome));
                }
                Some(Err(StoreError::Failed(why))) => {
                    log::error!("{task} could not be carried over to Redis: {why}");
                }
                Some(Err(StoreError::Down(down))) if down.kind == DownKind::Part => {
                    self.not_sent(&task, &down);
                    turn.state.follow_ups.set_aside(task.follow_up);
                }
                Some(Err(down)) => {
                    if let StoreError::Down(down) = &down {
                        self.not_sent(&task, down);
                    }
                    turn.state.follow_ups.put_back(task.follow_up);
                    error = Some(down);
                }
                None => turn.state.follow_ups.put_back(task.follow_up),
            }
        }
        drop(turn);
        self.memory.rows.learn(told, now);
        error.map_or(Ok(()), Err)
    }

    /// A slow line gets smaller batches: one that always takes too long would never be through.
    fn fit_batches(&self, size: &mut usize, took_ms: u64, results: &[Answer]) {
        let is_down = |e: &StoreError| matches!(e, StoreError::Down(_)) && !e.is_part();
        let down = results.iter().any(|result| result.as_ref().is_err_and(is_down));
        let share = Duration::from_millis(took_ms).as_secs_f64() / self.rules.timeout.as_secs_f64();
        let fitting = match () {
            () if down || share > 0.5 => *size / 2,
            () if share < 0.125 => *size * 2,
            () => *size,
        };
        *size = fitting.clamp(1, MOST);
    }

    /// Under the lock, so that no redemption from memory comes between the look whether a token is
    /// spent and the note that it is in Redis: with `OUTAGE_REDEEM=none` it must be one or the other.
    /// What need not be told any more is dropped.
    fn take_batch(&self, now: Now) -> Vec<Task> {
        let state = &mut *locked(&self.state);
        let taken = state.follow_ups.take(state.carry_size);
        taken.into_iter().filter_map(|follow_up| self.task_of(follow_up, now)).collect()
    }

    /// The operation that does it, judged by what is true now.
    fn task_of(&self, follow_up: FollowUp, now: Now) -> Option<Task> {
        let Memory { ledger, rows, signer, .. } = &*self.memory;
        let mut is_new_there = false;
        let op = match &follow_up {
            FollowUp::Row(device) => Op::Tell(device.clone(), rows.row(device)),
            FollowUp::Mark(hash) => {
                let (mark, claims) = ledger.mark_of(hash)?;
                Op::Mark(*hash, mark, claims)
            }
            FollowUp::Withdraw(token, serial) => Op::GiveBack(token.clone(), *serial),
            FollowUp::Remove(token) => Op::Remove(token.clone()),
            FollowUp::Carry(hash) => {
                let copy = self.memory.live(hash, now)?;
                // That it was sent to this run before, without an answer, does no harm: this one has
                // the mark of whoever has redeemed it since (`docs/model`, row 32c).
                let fit = self.rules.redeem == OutageRedeem::Own
                    || matches!(copy.in_redis, InRedis::No | InRedis::Entering);
                if !fit || ledger.knows_as_spent(hash) {
                    return None;
                }
                is_new_there = copy.in_redis == InRedis::No;
                if is_new_there {
                    self.memory.note_in_redis(hash, InRedis::Entering);
                }
                Op::Carry(signer.sign(copy.claims), copy.left_ms)
            }
        };
        Some(Task { follow_up, op, is_new_there })
    }

    /// A token of which nothing was sent is still only here, and may be redeemed from memory also with
    /// `OUTAGE_REDEEM=none`.
    fn not_sent(&self, task: &Task, down: &Down) {
        if let (FollowUp::Carry(hash), true, false) =
            (&task.follow_up, task.is_new_there, down.maybe_done)
        {
            self.memory.note_in_redis(hash, InRedis::No);
        }
    }

    /// With everybody waiting, carries the rest over and switches. `false`: somebody would have
    /// waited too long and was answered from memory, so there is more to carry.
    fn last_round(&self, back: &mut Return<'_>) -> Result<bool, StoreError> {
        let before = {
            let mut state = locked(&self.state);
            std::mem::replace(&mut state.mode, Mode::Closing)
        };
        let deadline = Instant::now() + self.rules.timeout;
        let done = loop {
            if self.switch(back) {
                break Ok(true);
            }
            if Instant::now() > deadline {
                break Ok(false);
            }
            if let Err(error) = self.carry_batch(&mut back.tally) {
                break Err(error);
            }
        };
        if done != Ok(true) {
            locked(&self.state).mode = before;
        }
        self.changed.notify_all();
        done
    }

    /// Lets Redis serve, unless something was added since the last batch (`docs/model`, row 13).
    fn switch(&self, back: &Return<'_>) -> bool {
        let mut state = locked(&self.state);
        if !state.follow_ups.is_empty() {
            return false;
        }
        state.mode = Mode::Primary;
        state.away = None;
        state.foreign_ca = back.hello.foreign_ca.is_some();
        state.warnings = back.hello.warnings.as_slice().into();
        if back.full {
            state.begin_grace(clock::now());
        }
        // Having no run id is no reason to think that Redis has forgotten something.
        if let Some(run_id) = back.hello.run_id.as_ref().filter(|run_id| runs::is_whole(run_id)) {
            state.last_run = Some(run_id.clone());
        }
        state.log_return(back);
        state.since_ms = clock::now().mono_ms;
        state.begun = Begun::InRedis;
        self.changed.notify_all();
        true
    }
}

impl Turn<'_> {
    /// Redis has been told. Returns the row that stands there, if it was one.
    fn carried(&mut self, task: Task, outcome: Outcome) -> Option<(DeviceId, Row)> {
        let (memory, state) = (&self.store.memory, &mut self.state);
        match (task.follow_up, outcome) {
            (FollowUp::Carry(hash), _) => memory.note_in_redis(&hash, InRedis::Confirmed),
            (FollowUp::Withdraw(token, serial), _) => {
                memory.ledger.release_unknown(&token.hash, serial);
            }
            (FollowUp::Mark(_), Outcome::Marked { was_lost }) => state.has_forgotten |= was_lost,
            (FollowUp::Row(device), Outcome::Told(told)) => {
                state.has_forgotten |= told.was_lost;
                if let Some(dead) = &told.dead {
                    self.mark_dead(dead, false);
                }
                // Another instance may have killed more than is known here.
                self.kill_copies(&device, told.row.bound.t);
                return Some((device, told.row));
            }
            _ => {}
        }
        None
    }
}

impl State {
    /// Not where nobody can have been away, at the first start.
    fn begin_grace(&mut self, now: Now) {
        let before = self.grace.forgot_before_s.filter(|_| now.mono_ms < self.grace.until_ms);
        let forgot = std::mem::take(&mut self.has_forgotten).then_some(now.unix_s());
        if self.begun == Begun::No && forgot.is_none() {
            return;
        }
        let until_ms = now.mono_ms + GRACE_MS;
        self.grace = Grace { until_ms, forgot_before_s: forgot.or(before) };
    }
}

/// One thing to tell, and how.
struct Task {
    follow_up: FollowUp,
    op: Op,
    /// A token that Redis has never heard of.
    is_new_there: bool,
}

/// For the log: what it is about.
impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hash, device) = match &self.op {
            Op::Mark(hash, _, claims) => (hash, &claims.device_id),
            Op::GiveBack(token, _) | Op::Remove(token) | Op::Carry(token, _) => {
                (&token.hash, &token.claims.device_id)
            }
            Op::Tell(device, _) => return write!(f, "the row of {device}"),
            _ => return Ok(()),
        };
        write!(f, "token {} of {device}", hash.short())
    }
}

/// A return under way.
struct Return<'a> {
    hello: &'a Hello,
    /// It was an outage, or another run.
    full: bool,
    tally: Tally,
}

/// What a return has carried over.
#[derive(Default)]
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

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { tokens, marks, others } = self;
        write!(f, "tokens carried over: {tokens}, marks: {marks}, other changes: {others}")
    }
}

impl State {
    fn log_return(&self, back: &Return<'_>) {
        let Return { hello, full, tally } = back;
        let after = Duration::from_millis(clock::now().mono_ms.saturating_sub(self.since_ms));
        if self.begun != Begun::InRedis {
            log::info!("✅ Redis connected successfully");
            log::debug!("after {after:.1?}: {tally}");
        } else if *full {
            log::info!("✅ Redis is back after {after:.1?}: {tally}");
        } else {
            log::info!("Redis connection renewed after {after:.1?}: {tally}");
        }
        hello.warnings.iter().for_each(|warning| log::warn!("{warning}"));
        if let Some(foreign) = &hello.foreign_ca {
            log::error!(
                "another CA is entered in this Redis ({foreign}), so devices get certificates of \
                 two CAs; if the CA was changed on purpose, delete the key 'ca'"
            );
        }
    }
}
