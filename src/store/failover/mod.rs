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
//! Invariants: what is entered in memory while Redis does not serve is either in `follow_ups` or found
//! again when the lists of a full return are made; the switch to `Primary` is made under the state's
//! lock and only with an empty `follow_ups`; no lock is held while Redis is asked.

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::{self, Now};
use crate::config::OutageRedeem;
use crate::device::DeviceId;
use crate::jwt::{Signer, TokenHash};
use crate::mac::MacKey;
use crate::store::ledger::Ledger;
use crate::store::memory::Memory;
use crate::store::{
    Answer, Away, Down, DownKind, Op, Outcome, Rows, Status, StoreError, TokenStore, locked,
};

mod carry;
mod consume;
mod follow_up;
mod issue;
mod kill;
mod supervisor;

use follow_up::FollowUps;

/// A store somewhere else, which can be lost and found again.
pub trait Remote: TokenStore {
    /// Drops all connections, makes new ones (looking the name up again) and proves that the server
    /// can be written to. Enters the CA's fingerprint unless there is one. Blocks; only the supervisor
    /// calls it.
    ///
    /// # Errors
    /// Why the server cannot be used.
    fn connect(&self, ca: Option<&OurCa>) -> Result<Hello, StoreError>;

    /// Drops all connections.
    fn disconnect(&self);

    /// The server has closed a connection while nobody used it. Waits for nothing.
    fn was_cut(&self, now: Now) -> bool;

    /// Asks on each connection that nobody uses whether it still leads to this run of the server,
    /// which also keeps it from being forgotten on the way.
    ///
    /// # Errors
    /// When it does not, or there is no answer.
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
    /// Changes with every start of the server; `None` if it may not be asked.
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
    /// Wakes the supervisor, and whoever waits for the last round or the first connection.
    changed: Condvar,
}

/// What the configuration says of a Redis that is away.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Which tokens are redeemed from memory.
    pub redeem: OutageRedeem,
    /// None are, and none issued: memory does not serve.
    pub required: bool,
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
    /// Counts the full returns. What Redis has confirmed in an earlier era it may have lost since.
    era: u32,
    follow_ups: FollowUps,
    /// Changes are noted in `follow_ups`; otherwise the lists of the next full return will find them.
    noting: bool,
    /// Onboardings under way in Redis, by device.
    issuing: HashMap<DeviceId, u32>,
    /// The server run whose data is known to hold everything; `None` asks for a full return.
    run_id: Option<String>,
    /// The server run for which the lists of a full return were made. If it is met again, the return
    /// goes on where it was interrupted.
    listed_for: Option<String>,
    /// When a token was last found missing and everything was carried over for it, by
    /// [`Now::mono_ms`].
    loss_seen_ms: Option<u64>,
    /// Since when Redis does not serve, by `Now::mono_ms`.
    lost_ms: u64,
    /// Until when an unknown token may yet be carried over by another instance.
    grace_until_ms: u64,
    /// Attempts to connect that have ended.
    attempts: u64,
    /// Redis has served before.
    has_served: bool,
    ca: Option<OurCa>,
    foreign_ca: bool,
    /// Why Redis does not serve, once that is decided.
    away: Option<Away>,
    stopped: bool,
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
            era: 0,
            follow_ups: FollowUps::default(),
            noting: false,
            issuing: HashMap::new(),
            run_id: None,
            listed_for: None,
            loss_seen_ms: None,
            lost_ms: clock::now().mono_ms,
            grace_until_ms: 0,
            attempts: 0,
            has_served: false,
            ca: None,
            foreign_ca: false,
            away: None,
            stopped: false,
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let carry_size = AtomicUsize::new(carry::BATCH);
        Failover { remote, memory, ledger, rows, signer, rules, carry_size, state, changed }
    }

    /// Enters our CA in Redis, now or with the next connection.
    pub fn set_ca(&self, ca: OurCa) {
        let mut state = locked(&self.state);
        if state.mode == Mode::Primary && state.ca.is_none() {
            self.suspect(&mut state, "the CA was made");
        }
        state.ca = Some(ca);
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
        let waited = self.changed.wait_timeout_while(state, longest, |state| {
            state.attempts == 0 && state.mode != Mode::Primary
        });
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        if state.attempts == 0 && state.mode != Mode::Primary {
            log_failure("no connection within REDIS_CONNECT_TIMEOUT_MS", false);
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
        let remote = self.remote.status();
        Status {
            redis_enabled: true,
            redis_serves,
            redis_required: self.rules.required,
            away: state.away.clone(),
            foreign_ca: state.foreign_ca,
            full: !redis_serves && self.memory.is_full(),
            losses: state.epoch,
            round_trip: if redis_serves { remote.round_trip } else { Duration::ZERO },
            clock_is_ahead_ms: remote.clock_is_ahead_ms,
        }
    }
}

// The way of a batch.
impl Failover {
    /// Answers from memory what memory is to answer, and begins the rest.
    fn begin<'a>(
        &self,
        ops: &'a [Op],
        now: Now,
        answers: &mut [Option<Answer>],
    ) -> (Vec<Sent<'a>>, u64) {
        let mut state = self.settled(now);
        let mut sent = Vec::new();
        for (at, (op, answer)) in ops.iter().zip(answers).enumerate() {
            *answer = match state.mode {
                Mode::Primary => self.begin_in_redis(&mut state, op, now),
                _ => Some(self.answer_from_memory(&mut state, op, now)),
            };
            if answer.is_none() {
                sent.push(Sent { at, op });
            }
        }
        (sent, state.epoch)
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
            Op::Consume(token, serial) => self.begin_consume(token, *serial, now),
            _ => None,
        }
    }

    /// Reads what Redis has answered, each operation for itself.
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
            let answer = self.answered(&mut state, op, result, late, now);
            if let Some(slot) = answers.get_mut(*at) {
                *slot = Some(answer);
            }
        }
        if !state.follow_ups.is_empty() {
            self.changed.notify_all();
        }
    }

    /// The answer to one operation that went to Redis. `late`: Redis was lost meanwhile.
    fn answered(&self, state: &mut State, op: &Op, result: Answer, late: bool, now: Now) -> Answer {
        match op {
            Op::Issue(new) => self.issue_answered(state, new, result, late, now),
            Op::Look(device) => self.look_answered(device, result, now),
            Op::Consume(token, serial) => {
                self.consume_answered(state, token, *serial, result, late, now)
            }
            Op::Kill(kill) => self.kill_answered(state, kill, result, late, now),
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
            Op::Tell(..) | Op::Mark(..) | Op::Carry(..) => result,
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
                    Some(_) => state.note_mark(token.hash),
                    None => state.follow_ups.remove(token.clone()),
                }
                Ok(Outcome::Done)
            }
            Op::Count => Ok(Outcome::Counted(self.memory.count())),
            Op::Tell(..) | Op::Mark(..) | Op::Carry(..) => Err(StoreError::Undecided),
        }
    }

    /// A token that memory granted and that was given back: its carried mark took it from Redis. Or
    /// one that Redis may have lost while an attempt had it. If it is used after all, it stays here.
    fn carry_again(&self, state: &mut State, hash: &TokenHash, now: Now) {
        if self.memory.live(hash, now).is_some() {
            state.note_carry(*hash);
        }
    }
}

// The turns of the mode.
impl Failover {
    /// Turns the mode if the answers show that Redis does not serve.
    fn notice(&self, state: &mut State, results: &[Answer], epoch: u64) {
        let downs = || {
            results.iter().filter_map(|result| match result {
                Err(StoreError::Down(down)) if down.kind != DownKind::Busy => Some(down),
                _ => None,
            })
        };
        let worst = downs().find(|down| down.kind == DownKind::Refused).or_else(|| downs().next());
        let Some(down) = worst.filter(|_| state.epoch == epoch && state.mode == Mode::Primary)
        else {
            return;
        };
        match down.kind {
            DownKind::Refused => self.degrade(state, down),
            DownKind::Lost | DownKind::ReadOnly => self.suspect(state, &down.why),
            DownKind::Busy => {}
        }
    }

    /// A connection was lost: a fresh one decides whether that is an outage.
    fn suspect(&self, state: &mut State, why: &str) {
        self.doubt(state, Mode::Suspect, why);
    }

    fn doubt(&self, state: &mut State, mode: Mode, why: &str) {
        self.lose(state);
        state.mode = mode;
        state.noting = true;
        log::info!("Redis connection lost ({why}), connecting anew");
    }

    /// Redis is away.
    fn degrade(&self, state: &mut State, down: &Down) {
        if state.mode == Mode::Primary {
            self.lose(state);
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
        state.noting = false;
        state.lost_ms = clock::now().mono_ms;
        self.remote.disconnect();
        self.changed.notify_all();
    }
}

impl State {
    fn note_carry(&mut self, hash: TokenHash) {
        if self.noting || self.mode == Mode::Primary {
            self.follow_ups.carry(hash);
        }
    }

    fn note_mark(&mut self, hash: TokenHash) {
        if self.noting || self.mode == Mode::Primary {
            self.follow_ups.mark(hash);
        }
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
