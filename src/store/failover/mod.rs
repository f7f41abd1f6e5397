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
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::clock::{self, Now};
use crate::config::OutageRedeem;
use crate::device::DeviceId;
use crate::jwt::{Signer, TokenHash};
use crate::mac::MacKey;
use crate::store::ledger::Ledger;
use crate::store::memory::{InRedis, Memory};
use crate::store::{
    Answer, Away, Down, DownKind, Op, Outcome, Rows, Status, StoreError, TokenStore, locked,
};

mod carry;
mod consume;
mod follow_up;
mod issue;
mod kill;
pub mod runs;
mod supervisor;

use consume::Attempt;
use follow_up::FollowUps;
pub use runs::RunFile;

/// A store somewhere else, which can be lost and found again.
pub trait Remote: Send + Sync {
    /// The connections that there are now; others are made by [`Remote::connect`] only.
    fn line(&self) -> u64;

    /// As [`TokenStore::run`], over these connections and no others.
    fn run_on(&self, line: u64, ops: &[Op], now: Now) -> Vec<Answer>;

    /// How the server is.
    fn status(&self) -> Status;

    /// Drops all connections, makes new ones (looking the name up again) and proves that the server
    /// can be written to. Enters the CA's fingerprint unless there is one. Blocks; only the supervisor
    /// calls it.
    fn connect(&self, ca: Option<&OurCa>) -> Result<Hello, StoreError>;

    /// Drops all connections.
    fn disconnect(&self);

    /// Why a part of the keys is out of reach ([`DownKind::Part`]), if one is.
    fn missing(&self) -> Option<String>;

    /// Whether more is in reach than the present connections reach. Blocks, beside those who are served.
    fn can_reach_more(&self) -> Result<bool, StoreError>;

    /// The server has closed a connection while nobody used it. Waits for nothing.
    fn was_cut(&self, now: Now) -> bool;

    /// Asks on each connection that nobody uses whether it still leads to this run of the server,
    /// which also keeps it from being forgotten on the way.
    fn look(&self, run_id: Option<&str>, now: Now) -> Result<(), StoreError>;
}

/// What instances of one CA know each other by.
#[derive(Clone, Debug)]
pub struct OurCa {
    /// SHA-256 of the CA's certificate.
    pub fingerprint: String,
    /// Seals the rows of devices.
    pub mac_key: MacKey,
}

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Changes with every start of the server (of any master: [`runs`]); `None` if it may not be asked.
    pub run_id: Option<String>,
    /// A memory policy that may drop keys.
    pub eviction: Option<String>,
    /// The fingerprint of another CA, entered by another instance.
    pub foreign_ca: Option<String>,
    /// Why the rows of devices cannot be read or written there.
    pub rows_refused: Option<String>,
}

/// The store of a service with Redis.
pub struct Failover {
    remote: Box<dyn Remote>,
    memory: Arc<Memory>,
    ledger: Arc<Ledger>,
    rows: Arc<dyn Rows>,
    signer: Signer,
    rules: Rules,
    /// How many operations a batch of the carry-over holds: as many as the line can bear.
    carry_size: AtomicUsize,
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
    away: Option<Away>,
    /// The latest attempt to connect had no answer from anybody.
    is_silent: bool,
    begun: Begun,
    ca: Option<OurCa>,
    foreign_ca: bool,
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
    pub fn new(
        remote: Box<dyn Remote>,
        memory: Arc<Memory>,
        ledger: Arc<Ledger>,
        rows: Arc<dyn Rows>,
        signer: Signer,
        rules: Rules,
    ) -> Self {
        let state = State {
            mode: Mode::Degraded,
            epoch: 0,
            follow_ups: FollowUps::default(),
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
            stopped: false,
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let (carry_size, catch_up) = (AtomicUsize::new(carry::MOST), OnceLock::new());
        Failover {
            remote,
            memory,
            ledger,
            rows,
            signer,
            rules,
            carry_size,
            state,
            catch_up,
            changed,
        }
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
                self.remote.run_on(sent.line, ops, now)
            } else {
                let remote_ops: Vec<Op> = sent.ops.iter().map(|sent| sent.op.clone()).collect();
                self.remote.run_on(sent.line, &remote_ops, now)
            };
            self.end(&sent, results, now, &mut answers);
        }
        answers.into_iter().map(|answer| answer.unwrap_or(Err(StoreError::Undecided))).collect()
    }

    fn status(&self) -> Status {
        let state = locked(&self.state);
        let redis_serves = matches!(state.mode, Mode::Primary);
        let remote = self.remote.status();
        Status {
            redis_enabled: true,
            redis_serves,
            redis_required: self.rules.required,
            away: state.away.clone(),
            missing: self.remote.missing().filter(|_| redis_serves),
            foreign_ca: state.foreign_ca,
            full: !redis_serves && self.memory.is_full(),
            lacks_replicas: redis_serves && remote.lacks_replicas,
            losses: state.epoch,
            since_ms: Some(state.since_ms),
            round_trip: if redis_serves { remote.round_trip } else { Duration::ZERO },
            clock_is_ahead_ms: remote.clock_is_ahead_ms,
        }
    }
}

// The way of a batch.
impl Failover {
    /// Answers from memory what memory is to answer, and begins the rest.
    fn begin<'a>(&self, ops: &'a [Op], now: Now, answers: &mut [Option<Answer>]) -> Sent<'a> {
        let mut state = self.settled(now);
        let mut sent = Sent { ops: Vec::new(), epoch: state.epoch, line: self.remote.line() };
        for (at, (op, answer)) in ops.iter().zip(answers).enumerate() {
            *answer = match state.mode {
                Mode::Primary => self.begin_in_redis(&mut state, op, now),
                _ => Some(self.answer_from_memory(&mut state, op, now)),
            };
            if answer.is_none() {
                sent.ops.push(SentOp { at, op, is_confirmed: self.is_confirmed(op, now) });
            }
        }
        sent
    }

    /// Redis is known to have had the token.
    fn is_confirmed(&self, op: &Op, now: Now) -> bool {
        let Op::Consume(token, _) = op else { return false };
        self.memory.live(&token.hash, now).is_some_and(|copy| copy.in_redis == InRedis::Confirmed)
    }

    /// The state in which the batch is answered. In the last round of a carry-over, and while idle
    /// connections that were cut are renewed, everybody waits, but never long.
    fn settled(&self, now: Now) -> MutexGuard<'_, State> {
        let mut state = locked(&self.state);
        if state.mode == Mode::Primary && self.remote.was_cut(now) {
            self.doubt(&mut state, Mode::Renewing, "closed while it was idle");
        }
        let brief = |state: &mut State| state.mode.is_brief();
        let waited = self.changed.wait_timeout_while(state, self.rules.timeout, brief);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Notes what is about to be asked of Redis; an answer if it need not be asked.
    fn begin_in_redis(&self, state: &mut State, op: &Op, now: Now) -> Option<Answer> {
        match op {
            Op::Issue(new) => {
                Failover::begin_issue(state, &new.token);
                None
            }
            Op::Consume(token, serial) => self.begin_consume(state, token, *serial, now),
            _ => None,
        }
    }

    /// Reads what Redis has answered, each operation for itself.
    fn end(&self, sent: &Sent<'_>, results: Vec<Answer>, now: Now, answers: &mut [Option<Answer>]) {
        let mut state = locked(&self.state);
        self.notice(&mut state, &results, sent.epoch);
        let late = state.epoch != sent.epoch;
        for (sent, result) in sent.ops.iter().zip(results) {
            let answer = self.end_one(&mut state, sent, result, late, now);
            if let Some(slot) = answers.get_mut(sent.at) {
                *slot = Some(answer);
            }
        }
        if !state.follow_ups.is_empty() {
            self.changed.notify_all();
        }
    }

    /// The answer to one operation that went to Redis. `late`: Redis was lost meanwhile.
    fn end_one(
        &self,
        state: &mut State,
        sent: &SentOp<'_>,
        result: Answer,
        late: bool,
        now: Now,
    ) -> Answer {
        match sent.op {
            Op::Issue(new) => self.end_issue(state, new, result, late, now),
            Op::Look(device) => self.end_look(device, result, now),
            Op::Consume(token, serial) => {
                let attempt = Attempt { token, serial: *serial, is_confirmed: sent.is_confirmed };
                self.end_consume(state, &attempt, result, late, now)
            }
            Op::Kill(kill) => self.end_kill(state, kill, result, late, now),
            Op::GiveBack(token, serial) => {
                let withdrawn = result.is_ok() && !late;
                self.given_back(state, token, *serial, withdrawn, now)
            }
            Op::Finish(token) | Op::TakeBack(token) => {
                self.memory.remove(&token.hash);
                if result.is_err() || late {
                    state.follow_ups.remove(token.clone());
                }
                Ok(Outcome::Done)
            }
            Op::Count => result.or_else(|_| Ok(Outcome::Counted(self.memory.count()))),
            Op::Tell(device, _) => {
                if result.is_err() || late {
                    state.follow_ups.row(device.clone());
                }
                result
            }
            Op::Mark(..) | Op::Carry(..) => result,
        }
    }

    /// The answer to one operation while Redis does not serve.
    fn answer_from_memory(&self, state: &mut State, op: &Op, now: Now) -> Answer {
        match op {
            Op::Issue(new) if self.rules.required => self.refuse_issue(state, new, now),
            Op::Consume(..) if self.rules.required => Err(StoreError::Undecided),
            Op::Issue(new) => self.issue_from_memory(state, new, now),
            Op::Look(device) => Ok(Outcome::Seen(Box::new(self.memory.look(device, now)))),
            Op::Consume(token, serial) => self.consume_from_memory(state, token, *serial, now),
            Op::Kill(kill) => self.kill_from_memory(state, kill, now),
            Op::GiveBack(token, serial) => self.given_back(state, token, *serial, false, now),
            Op::Finish(token) | Op::TakeBack(token) => {
                self.memory.remove(&token.hash);
                // The mark takes token and lease with it, and is listed at the return in any case.
                match self.ledger.mark_of(&token.hash) {
                    Some(_) => state.follow_ups.mark(token.hash),
                    None => state.follow_ups.remove(token.clone()),
                }
                Ok(Outcome::Done)
            }
            Op::Count => Ok(Outcome::Counted(self.memory.count())),
            Op::Tell(device, _) => {
                state.follow_ups.row(device.clone());
                Err(StoreError::Undecided)
            }
            Op::Mark(..) | Op::Carry(..) => Err(StoreError::Undecided),
        }
    }

    /// A token that memory granted and that was given back: its carried mark took it from Redis. Or
    /// one that Redis may have lost while an attempt had it. If it is used after all, it stays here.
    fn carry_again(&self, state: &mut State, hash: &TokenHash, now: Now) {
        if self.memory.live(hash, now).is_some() {
            state.follow_ups.carry(*hash);
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
        state.away = Some(Away::from(down));
        state.mode = Mode::Degraded;
        self.changed.notify_all();
    }

    fn lose(&self, state: &mut State) {
        state.epoch += 1;
        state.since_ms = clock::now().mono_ms;
        self.remote.disconnect();
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
