//! Redis while it serves, memory while it does not, and the way back without losing anything.
//!
//! A batch is begun under the state's lock, asked of Redis without it, and what Redis has answered
//! is read under it again; what Redis cannot answer is answered from memory. What each operation
//! does in these three places stands in `issue`, `consume` and `kill`.
//!
//! Six modes, and who answers in them:
//!
//! | mode | onboarding | redemption | entered when |
//! |---|---|---|---|
//! | `Primary` | Redis | Redis | everything known here has been carried over |
//! | `Renewing` | waits | waits | a connection was closed while it was idle |
//! | `Suspect` | memory | 503 | a connection was lost; a fresh one decides what it is |
//! | `Degraded` | memory | memory, for tokens issued here | Redis is away |
//! | `Returning` | memory | memory, for tokens issued here | Redis was found to be another run |
//! | `Closing` | waits | waits | the last round of the carry-over |
//!
//! Of a cluster others may use what is in reach: as long as any of it is, memory redeems those tokens only of
//! which Redis has never heard.
//!
//! Invariants: what is entered in memory while Redis does not serve is either in `follow_ups` or found
//! again when the lists of a full return are made; the switch to `Primary` is made under the state's
//! lock and only with an empty `follow_ups`; no lock is held while Redis is asked.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::clock::{self, Now};
use crate::config::OutageRedeem;
use crate::device::DeviceId;
use crate::jwt::TokenHash;
use crate::store::memory::{InRedis, Memory};
use crate::store::redis::{OurCa, RedisStore, RunFile};
use crate::store::{Answer, Down, DownKind, Op, Outcome, Status, StoreError, TokenStore, locked};

mod carry;
mod consume;
mod follow_up;
mod issue;
mod kill;
mod supervisor;

use follow_up::FollowUps;

/// The store of a service with Redis.
pub struct Failover {
    redis: RedisStore,
    memory: Arc<Memory>,
    rules: Rules,
    state: Mutex<State>,
    /// Waits until what was missed in a long absence is known.
    catch_up: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Wakes the supervisor, and whoever waits for the last round or the first connection.
    changed: Condvar,
}

/// What the configuration says of a Redis that is away.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Keeps the run id of the server that served last.
    pub run_file: RunFile,
    /// Which tokens are redeemed from memory.
    pub redeem: OutageRedeem,
    /// None are, and none issued: memory does not serve.
    pub required: bool,
    /// Redis is a cluster, of which a part may be away.
    pub is_spread: bool,
    /// `REDIS_TIMEOUT_MS`: longest time that a request waits for the last round.
    pub timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Primary,
    Renewing,
    Suspect,
    Degraded,
    Returning,
    Closing,
}

impl Mode {
    /// It will not last, and whoever asks waits for its end.
    fn is_brief(self) -> bool {
        matches!(self, Mode::Renewing | Mode::Closing)
    }
}

struct State {
    mode: Mode,
    /// Counts the losses. An answer from before the latest one may be of a server that is gone.
    epoch: u64,
    /// What Redis is still to be told.
    follow_ups: FollowUps,
    /// How many operations a batch of the carry-over holds: as many as the line can bear.
    carry_size: usize,
    /// Onboardings under way in Redis, by device.
    issuing: HashMap<DeviceId, u32>,
    /// The run of the server that served last, in this process or the one before.
    last_run: Option<String>,
    /// Redis is found to have forgotten something that it knew, by whoever brings it back.
    has_forgotten: bool,
    grace: Grace,
    /// When a token was last found missing and everything was carried over for it, by
    /// [`Now::mono_ms`].
    loss_seen_ms: Option<u64>,
    /// Since when Redis serves, or does not, by `Now::mono_ms`.
    since_ms: u64,
    /// Why, once that is decided.
    away: Option<Down>,
    /// The latest attempt to connect had no answer from anybody.
    is_silent: bool,
    begun: Begun,
    ca: Option<OurCa>,
    foreign_ca: bool,
    /// Of the server that served last.
    warnings: Arc<[String]>,
    stopped: bool,
}

/// After a return other instances may still have to tell Redis what it does not know.
#[derive(Clone, Copy, Debug, Default)]
struct Grace {
    /// Until then an unknown token is not refused yet, by [`Now::mono_ms`].
    until_ms: u64,
    /// When Redis had forgotten something: the time of its return, in seconds since 1970. Tokens that
    /// were issued by then may be used, although nothing there says so.
    forgot_before_s: Option<u64>,
}

/// How far the start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begun {
    /// The first attempt to connect has not ended.
    No,
    /// Attempts have failed.
    InMemory,
    /// Redis has served.
    InRedis,
}

impl Failover {
    /// A store that begins on memory; [`Failover::supervise`] looks for Redis.
    pub fn new(redis: RedisStore, memory: Arc<Memory>, rules: Rules) -> Self {
        let state = Mutex::new(State {
            mode: Mode::Degraded,
            epoch: 0,
            follow_ups: FollowUps::default(),
            carry_size: carry::MOST,
            issuing: HashMap::new(),
            last_run: rules.run_file.read(),
            has_forgotten: false,
            grace: Grace::default(),
            loss_seen_ms: None,
            since_ms: clock::now().mono_ms,
            away: None,
            is_silent: false,
            begun: Begun::No,
            ca: None,
            foreign_ca: false,
            warnings: Arc::default(),
            stopped: false,
        });
        let (catch_up, changed) = (OnceLock::new(), Condvar::new());
        Failover { redis, memory, rules, state, catch_up, changed }
    }

    /// Enters our CA in Redis, now or with the next connection.
    pub fn set_ca(&self, ca: OurCa) {
        let mut state = locked(&self.state);
        if state.mode == Mode::Primary && state.ca.is_none() {
            self.doubt(&mut state, Mode::Suspect, "the CA was made");
        }
        state.ca = Some(ca);
    }

    /// Before Redis serves, this is to return.
    pub fn first(&self, catch_up: impl Fn() + Send + Sync + 'static) {
        let _ = self.catch_up.set(Box::new(catch_up)); // it is set once
    }

    /// Waits until the first attempt to connect has ended, at most `longest`; for a Redis that is
    /// required, until it serves. Returns whether it does.
    pub fn wait_for_first_attempt(&self, longest: Duration) -> bool {
        let state = locked(&self.state);
        if self.rules.required {
            let away = |state: &mut State| state.mode != Mode::Primary && !state.stopped;
            let waited = self.changed.wait_while(state, away);
            return waited.unwrap_or_else(PoisonError::into_inner).mode == Mode::Primary;
        }
        let waited =
            self.changed.wait_timeout_while(state, longest, |state| state.begun == Begun::No);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        if state.begun == Begun::No {
            log_failure("no connection within REDIS_CONNECT_TIMEOUT_MS", false);
            state.begun = Begun::InMemory;
        }
        state.mode == Mode::Primary
    }

    /// Ends the supervisor.
    pub fn stop(&self) {
        locked(&self.state).stopped = true;
        self.changed.notify_all();
    }
}

/// Operations on their way to Redis, begun at one moment.
struct Sent<'a> {
    ops: Vec<SentOp<'a>>,
    /// In which epoch, and over which connections: an operation that has to wait for one is not sent
    /// to a server that was found meanwhile (`docs/model`, row 30c).
    epoch: u64,
    line: u64,
}

struct SentOp<'a> {
    at: usize,
    op: &'a Op,
    /// Redis had confirmed the token that is to be consumed (`docs/model`, row 34d).
    is_confirmed: bool,
}

impl TokenStore for Failover {
    fn run(&self, ops: &[Op], now: Now) -> Vec<Answer> {
        let mut answers: Vec<Option<Answer>> = ops.iter().map(|_| None).collect();
        let sent = self.begin(ops, now, &mut answers);
        if !sent.ops.is_empty() {
            let results = if sent.ops.len() == ops.len() {
                self.redis.run_on(sent.line, ops, now)
            } else {
                let remote_ops: Vec<Op> = sent.ops.iter().map(|sent| sent.op.clone()).collect();
                self.redis.run_on(sent.line, &remote_ops, now)
            };
            self.end(&sent, results, now, &mut answers);
        }
        answers.into_iter().map(|answer| answer.unwrap_or(Err(StoreError::Undecided))).collect()
    }

    fn status(&self) -> Status {
        let state = locked(&self.state);
        let redis_serves = matches!(state.mode, Mode::Primary);
        let redis = self.redis.status();
        Status {
            redis_serves,
            redis_required: self.rules.required,
            away: state.away.clone(),
            missing: self.redis.missing().filter(|_| redis_serves),
            foreign_ca: state.foreign_ca,
            warnings: Arc::clone(&state.warnings),
            full: !redis_serves && self.memory.is_full(),
            lacks_replicas: redis_serves && redis.lacks_replicas,
            losses: state.epoch,
            since_ms: Some(state.since_ms),
            round_trip: if redis_serves { redis.round_trip } else { Duration::ZERO },
            ..redis
        }
    }
}

// The way of a batch.
impl Failover {
    /// Answers from memory what memory is to answer, and begins the rest.
    fn begin<'a>(&self, ops: &'a [Op], now: Now, answers: &mut [Option<Answer>]) -> Sent<'a> {
        let mut turn = Turn { store: self, state: self.settled(now), now, late: false };
        let mut sent = Sent { ops: Vec::new(), epoch: turn.state.epoch, line: self.redis.line() };
        for (at, (op, answer)) in ops.iter().zip(answers).enumerate() {
            *answer = match turn.state.mode {
                Mode::Primary => turn.begin(op),
                _ => Some(turn.answer_from_memory(op)),
            };
            if answer.is_none() {
                let is_confirmed = matches!(op, Op::Consume(token, _)
                    if turn.in_redis(&token.hash) == Some(InRedis::Confirmed));
                sent.ops.push(SentOp { at, op, is_confirmed });
            }
        }
        sent
    }

    /// The state in which the batch is answered. In the last round of a carry-over, and while idle
    /// connections that were cut are renewed, everybody waits, but never long.
    fn settled(&self, now: Now) -> MutexGuard<'_, State> {
        let mut state = locked(&self.state);
        if state.mode == Mode::Primary && self.redis.was_cut(now) {
            self.doubt(&mut state, Mode::Renewing, "closed while it was idle");
        }
        let brief = |state: &mut State| state.mode.is_brief();
        let waited = self.changed.wait_timeout_while(state, self.rules.timeout, brief);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Reads what Redis has answered, each operation for itself.
    fn end(&self, sent: &Sent<'_>, results: Vec<Answer>, now: Now, answers: &mut [Option<Answer>]) {
        let mut state = locked(&self.state);
        self.notice(&mut state, &results, sent.epoch);
        let late = state.epoch != sent.epoch;
        let mut turn = Turn { store: self, state, now, late };
        for (sent, result) in sent.ops.iter().zip(results) {
            let answer = turn.end(sent, result);
            if let Some(slot) = answers.get_mut(sent.at) {
                *slot = Some(answer);
            }
        }
        if !turn.state.follow_ups.is_empty() {
            self.changed.notify_all();
        }
    }
}

/// What is done under the state's lock at one moment.
struct Turn<'a> {
    store: &'a Failover,
    state: MutexGuard<'a, State>,
    now: Now,
    /// Redis was lost since it was asked: what it has granted may be in a server that is gone, and is
    /// carried over again.
    late: bool,
}

impl Turn<'_> {
    /// Notes what is about to be asked of Redis; an answer if it need not be asked.
    fn begin(&mut self, op: &Op) -> Option<Answer> {
        match op {
            Op::Issue(new) => {
                self.begin_issue(&new.token);
                None
            }
            Op::Consume(token, serial) => self.begin_consume(token, *serial),
            _ => None,
        }
    }

    /// The answer to one operation that went to Redis.
    fn end(&mut self, sent: &SentOp<'_>, result: Answer) -> Answer {
        let is_done = result.is_ok() && !self.late;
        match sent.op {
            Op::Issue(new) => self.end_issue(new, result),
            Op::Look(device) => self.end_look(device, result),
            Op::Consume(token, serial) => {
                self.end_consume(token, *serial, sent.is_confirmed, result)
            }
            Op::Kill(kill) => self.end_kill(kill, result),
            Op::GiveBack(token, serial) => self.given_back(token, *serial, is_done),
            Op::Remove(token) => {
                self.store.memory.remove(&token.hash);
                if !is_done {
                    self.state.follow_ups.remove(token.clone());
                }
                Ok(Outcome::Done)
            }
            Op::Count => result.or_else(|_| Ok(Outcome::Counted(self.store.memory.count()))),
            Op::Tell(device, _) => {
                if !is_done {
                    self.state.follow_ups.row(device.clone());
                }
                result
            }
            Op::Mark(..) | Op::Carry(..) => result,
        }
    }

    /// The answer to one operation while Redis does not serve.
    fn answer_from_memory(&mut self, op: &Op) -> Answer {
        let Turn { store: Failover { memory, rules, .. }, now, .. } = *self;
        match op {
            Op::Issue(new) if rules.required => self.refuse_issue(new),
            Op::Consume(..) if rules.required => Err(StoreError::Undecided),
            Op::Issue(new) => self.issue_from_memory(new),
            Op::Look(device) => Ok(Outcome::Seen(Box::new(memory.look(device, now)))),
            Op::Consume(token, serial) => self.consume_from_memory(token, *serial),
            Op::Kill(kill) => self.kill_from_memory(kill),
            Op::GiveBack(token, serial) => self.given_back(token, *serial, false),
            Op::Remove(token) => {
                memory.remove(&token.hash);
                // The mark takes token and lease with it, and is listed at the return in any case.
                match memory.ledger.mark_of(&token.hash) {
                    Some(_) => self.state.follow_ups.mark(token.hash),
                    None => self.state.follow_ups.remove(token.clone()),
                }
                Ok(Outcome::Done)
            }
            Op::Count => Ok(Outcome::Counted(memory.count())),
            Op::Tell(device, _) => {
                self.state.follow_ups.row(device.clone());
                Err(StoreError::Undecided)
            }
            Op::Mark(..) | Op::Carry(..) => Err(StoreError::Undecided),
        }
    }

    /// What Redis has of a live token that was issued here.
    fn in_redis(&self, hash: &TokenHash) -> Option<InRedis> {
        self.store.memory.in_redis(hash, self.now)
    }

    /// A token that memory granted and that was given back: its carried mark took it from Redis. Or
    /// one that Redis may have lost while an attempt had it. If it is used after all, it stays here.
    fn carry_again(&mut self, hash: &TokenHash) {
        if self.in_redis(hash).is_some() {
            self.state.follow_ups.carry(*hash);
        }
    }
}

// The turns of the mode.
impl Failover {
    /// Turns the mode if the answers show that Redis does not serve.
    fn notice(&self, state: &mut State, results: &[Answer], epoch: u64) {
        let downs = || {
            results.iter().filter_map(|result| match result {
                Err(StoreError::Down(down)) => Some(down),
                _ => None,
            })
        };
        if downs().any(|down| down.kind == DownKind::Part) {
            self.changed.notify_all();
        }
        let downs = || downs().filter(|d| ![DownKind::Busy, DownKind::Part].contains(&d.kind));
        let worst = downs().find(|down| down.kind == DownKind::Refused).or_else(|| downs().next());
        let Some(down) = worst.filter(|_| state.epoch == epoch && state.mode == Mode::Primary)
        else {
            return;
        };
        match down.kind {
            DownKind::Refused => self.degrade(state, down),
            DownKind::Lost | DownKind::ReadOnly => self.doubt(state, Mode::Suspect, &down.why),
            DownKind::Busy | DownKind::Part => {}
        }
    }

    /// A connection was lost: a fresh one decides whether that is an outage.
    fn doubt(&self, state: &mut State, mode: Mode, why: &str) {
        self.lose(state);
        state.mode = mode;
        log::info!("Redis connection lost ({why}), connecting anew");
    }

    /// Redis is away.
    fn degrade(&self, state: &mut State, down: &Down) {
        if state.mode == Mode::Primary {
            self.lose(state);
        }
        // An interrupted return may go on.
        if state.mode != Mode::Returning {
            state.follow_ups.abandon();
        }
        let then = match self.rules.required {
            true => "nothing is issued or redeemed until it is back",
            false => "serving from memory until it is back",
        };
        log::warn!("Redis is lost ({}): {then}", down.why);
        state.away = Some(down.clone());
        state.mode = Mode::Degraded;
        self.changed.notify_all();
    }

    fn lose(&self, state: &mut State) {
        state.epoch += 1;
        state.since_ms = clock::now().mono_ms;
        self.redis.disconnect();
        self.changed.notify_all();
    }
}

/// The lines that operators know from the older service.
fn log_failure(why: &str, required: bool) {
    log::warn!("Failed to connect to Redis: {why}");
    match required {
        true => log::warn!("REDIS_REQUIRED is set: the start waits for Redis"),
        false => log::warn!("⚠️  Provisioning tokens will not be persistent"),
    }
}
