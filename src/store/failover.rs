//! Redis while it serves, memory while it does not, and the way back without losing anything.
//!
//! Four modes, and who answers in them:
//!
//! | mode | onboarding | redemption | entered when |
//! |---|---|---|---|
//! | `Primary` | Redis | Redis | everything known here has been carried over |
//! | `Suspect` | memory | 503 | a connection was lost; a fresh one decides what it is |
//! | `Degraded` | memory | memory, for tokens issued here | Redis is away |
//! | `Closing` | waits | waits | the last round of the carry-over |
//!
//! Invariants: what is entered in memory while Redis does not serve is either in `todo` or found
//! again when the lists of a full return are made; the switch to `Primary` is made under the state's
//! lock and only with an empty `todo`; no lock is held while Redis is asked.

use std::collections::HashMap;
use std::fmt;
use std::ops::AddAssign;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::clock::{self, Now};
use crate::config::OutageRedeem;
use crate::device::DeviceId;
use crate::jwt::{Signer, Token, TokenHash};
use crate::serial::Serial;
use crate::store::ledger::{Begin, Ledger};
use crate::store::memory::Memory;
use crate::store::{
    Answer, Dead, Down, DownKind, Kill, Op, Outcome, Status, StoreError, TokenStore, locked,
};

mod todo;

use todo::{Todo, Work};

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

/// A store somewhere else, which can be lost and found again.
pub trait Remote: TokenStore {
    /// Drops all connections, makes new ones (looking the name up again) and proves that the server
    /// can be written to. Enters `ca_fingerprint` unless there is one. Blocks; only the supervisor
    /// calls it.
    ///
    /// # Errors
    /// Why the server cannot be used.
    fn connect(&self, ca_fingerprint: Option<&str>) -> Result<Hello, StoreError>;

    /// Drops all connections.
    fn disconnect(&self);
}

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Changes with every start of the server; `None` if it may not be asked.
    pub run_id: Option<String>,
    /// A memory policy that may drop keys.
    pub eviction: Option<String>,
    /// The fingerprint of another CA, entered by another instance.
    pub foreign_ca: Option<String>,
}

/// The store of a service with Redis.
pub struct Failover {
    remote: Box<dyn Remote>,
    memory: Arc<Memory>,
    ledger: Arc<Ledger>,
    signer: Signer,
    policy: OutageRedeem,
    /// `REDIS_TIMEOUT_MS`: longest time that a request waits for the last round.
    timeout: Duration,
    state: Mutex<State>,
    /// Wakes the supervisor, and whoever waits for the last round or the first connection.
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Primary,
    Suspect,
    Degraded,
    Closing,
}

struct State {
    mode: Mode,
    /// Counts the losses. An answer from before the latest one may be of a server that is gone.
    epoch: u64,
    todo: Todo,
    /// Changes are noted in `todo`; otherwise the lists of the next full return will find them.
    noting: bool,
    /// Onboardings under way in Redis, by device.
    issuing: HashMap<DeviceId, u32>,
    /// The server run whose data is known to hold everything; `None` asks for a full return.
    run_id: Option<String>,
    /// Since when Redis does not serve, by [`Now::mono_ms`].
    lost_ms: u64,
    /// Why, for the log; `None` once it has been logged.
    reason: Option<String>,
    /// Until when an unknown token may yet be carried over by another instance.
    grace_until_ms: u64,
    /// Attempts to connect that have ended.
    attempts: u64,
    /// Redis has served before.
    has_served: bool,
    ca_fingerprint: Option<String>,
    foreign_ca: bool,
    stopped: bool,
}

/// An operation on its way to Redis.
struct Sent<'a> {
    at: usize,
    op: &'a Op,
}

impl Failover {
    /// A store that begins on memory; [`Failover::supervise`] looks for Redis.
    pub fn new(
        remote: Box<dyn Remote>,
        memory: Arc<Memory>,
        ledger: Arc<Ledger>,
        signer: Signer,
        policy: OutageRedeem,
        timeout: Duration,
    ) -> Self {
        let state = State {
            mode: Mode::Degraded,
            epoch: 0,
            todo: Todo::default(),
            noting: false,
            issuing: HashMap::new(),
            run_id: None,
            lost_ms: clock::now().mono_ms,
            reason: None,
            grace_until_ms: 0,
            attempts: 0,
            has_served: false,
            ca_fingerprint: None,
            foreign_ca: false,
            stopped: false,
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Failover { remote, memory, ledger, signer, policy, timeout, state, changed }
    }

    /// Enters our CA's fingerprint in Redis, now or with the next connection.
    pub fn set_ca_fingerprint(&self, fingerprint: String) {
        let mut state = locked(&self.state);
        if state.mode == Mode::Primary && state.ca_fingerprint.is_none() {
            self.suspect(&mut state, "the CA was made".to_owned());
        }
        state.ca_fingerprint = Some(fingerprint);
    }

    /// Waits until the first attempt to connect has ended, at most `longest`. Answers whether Redis
    /// serves.
    pub fn wait_for_first_attempt(&self, longest: Duration) -> bool {
        let state = locked(&self.state);
        let waited = self.changed.wait_timeout_while(state, longest, |state| {
            state.attempts == 0 && state.mode != Mode::Primary
        });
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        if state.attempts == 0 && state.mode != Mode::Primary {
            log_failure("no connection within REDIS_CONNECT_TIMEOUT_MS");
            state.attempts = 1;
        }
        state.mode == Mode::Primary
    }

    /// Ends the supervisor.
    pub fn stop(&self) {
        locked(&self.state).stopped = true;
        self.changed.notify_all();
    }
}

// What a batch goes through.
impl TokenStore for Failover {
    fn run(&self, ops: &[Op], now: Now) -> Vec<Answer> {
        let mut answers: Vec<Option<Answer>> = ops.iter().map(|_| None).collect();
        let (sent, epoch) = self.begin(ops, now, &mut answers);
        if !sent.is_empty() {
            let remote_ops: Vec<Op> = sent.iter().map(|sent| sent.op.clone()).collect();
            let results = self.remote.run(&remote_ops, now);
            self.end(&sent, results, epoch, now, &mut answers);
        }
        answers.into_iter().map(|answer| answer.unwrap_or(Err(StoreError::Undecided))).collect()
    }

    fn status(&self) -> Status {
        let state = locked(&self.state);
        let redis_serves = matches!(state.mode, Mode::Primary);
        Status {
            redis_enabled: true,
            redis_serves,
            foreign_ca: state.foreign_ca,
            full: !redis_serves && self.memory.is_full(),
            losses: state.epoch,
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

    /// Turns the mode if the answers show that Redis does not serve.
    fn notice(&self, state: &mut State, results: &[Answer], epoch: u64) {
        let downs = || {
            results.iter().filter_map(|result| match result {
                Err(StoreError::Down(down)) => Some(down),
                _ => None,
            })
        };
        let worst = downs().find(|down| down.kind == DownKind::Refused).or_else(|| downs().next());
        let Some(down) = worst.filter(|_| state.epoch == epoch && state.mode == Mode::Primary)
        else {
            return;
        };
        match down.kind {
            DownKind::Refused => self.degrade(state, &down.why),
            DownKind::Lost | DownKind::ReadOnly => self.suspect(state, down.why.clone()),
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
                self.memory.copy(token, now);
                if late {
                    state.note_carry(token.hash);
                }
                Ok(Outcome::Issued { killed })
            }
            Err(StoreError::Down(down)) => {
                if let Some(dead) = &down.dying {
                    self.bury(state, dead, true, now);
                }
                self.issue_locally(state, op, token, down.maybe_done, now)
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
            Ok(Outcome::Unknown) => {
                self.ledger.release(hash, serial);
                self.judge_unknown(state, hash, late, now)
            }
            other => {
                self.ledger.release(hash, serial);
                other
            }
        }
    }

    /// Redis does not know the token. If memory does, Redis has lost data: everything is carried
    /// over again. Shortly after an outage another instance may still have to carry it over. And
    /// what a Redis says that has been lost meanwhile, by this batch even, decides nothing.
    fn judge_unknown(&self, state: &mut State, hash: &TokenHash, late: bool, now: Now) -> Answer {
        const ABOUT_TO_END_MS: u64 = 2000;
        if late || state.mode != Mode::Primary {
            return Err(StoreError::Undecided);
        }
        let copy = self.memory.live(hash, now).filter(|copy| copy.left_ms > ABOUT_TO_END_MS);
        if copy.is_some() && self.policy == OutageRedeem::Own {
            state.run_id = None;
            self.suspect(state, "Redis has lost a token of this instance".to_owned());
            return Err(StoreError::Undecided);
        }
        if now.mono_ms < state.grace_until_ms {
            return Err(StoreError::Undecided);
        }
        Ok(Outcome::Unknown)
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
                self.issue_locally(state, op, token, false, now)
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
        in_redis: bool,
        now: Now,
    ) -> Answer {
        let answer = self.enter_locally(state, op, token, in_redis, now);
        match &answer {
            Ok(Outcome::Issued { .. }) => state.note_carry(token.hash),
            _ if in_redis => state.todo.remove(token.clone()),
            _ => {}
        }
        answer
    }

    fn enter_locally(
        &self,
        state: &mut State,
        op: &Op,
        token: &Token,
        in_redis: bool,
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
        let copy = self
            .memory
            .live(hash, now)
            .filter(|copy| self.policy == OutageRedeem::Own || !copy.in_redis);
        if copy.is_none() || state.mode != Mode::Degraded {
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

// The turns of the mode.
impl Failover {
    /// A connection was lost: a fresh one decides whether that is an outage.
    fn suspect(&self, state: &mut State, why: String) {
        self.lose(state);
        state.mode = Mode::Suspect;
        state.noting = true;
        log::info!("Redis connection lost ({why}), connecting anew");
        state.reason = Some(why);
    }

    /// Redis is away.
    fn degrade(&self, state: &mut State, why: &str) {
        if state.mode == Mode::Primary {
            self.lose(state);
        }
        log::warn!("Redis is lost ({why}): serving from memory until it is back");
        state.mode = Mode::Degraded;
        state.noting = false;
        state.reason = None;
        self.changed.notify_all();
    }

    fn lose(&self, state: &mut State) {
        state.epoch += 1;
        state.lost_ms = clock::now().mono_ms;
        self.remote.disconnect();
        self.changed.notify_all();
    }
}

// The supervisor.
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
                    self.carried(work, &op, &outcome);
                }
                Some(Err(StoreError::Failed(why))) => {
                    log::error!("could not be carried over to Redis: {work:?}: {why}");
                }
                Some(Err(down)) => {
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
                let fit = self.policy == OutageRedeem::Own || !copy.in_redis;
                if !fit || self.ledger.knows_as_spent(hash) {
                    return None;
                }
                let token = self.signer.sign(copy.claims);
                self.memory.note_in_redis(hash);
                Some(Op::Carry(token, copy.left_ms))
            }
        }
    }

    fn carried(&self, work: Work, op: &Op, outcome: &Outcome) {
        match (work, op, outcome) {
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
        state.reason = None;
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
    fn note_carry(&mut self, hash: TokenHash) {
        if self.noting || self.mode == Mode::Primary {
            self.todo.carry(hash);
        }
    }

    fn note_mark(&mut self, hash: TokenHash) {
        if self.noting || self.mode == Mode::Primary {
            self.todo.mark(hash);
        }
    }

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

fn release_device(issuing: &mut HashMap<DeviceId, u32>, device: &DeviceId) {
    if let Some(count) = issuing.get_mut(device) {
        *count -= 1;
        if *count == 0 {
            issuing.remove(device);
        }
    }
}

/// The lines that operators know from the older service.
fn log_failure(why: &str) {
    log::warn!("Failed to connect to Redis: {why}");
    log::warn!("⚠️  Provisioning tokens will not be persistent");
}
