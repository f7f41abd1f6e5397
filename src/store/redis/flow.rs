//! The protocol: for each operation, what is sent in a round trip and what its replies decide.
//!
//! Each function makes one round trip: it lists the commands and says in the same place what becomes of
//! their replies, the next trip or the answer. The order of the commands in a trip matters: the value
//! that decides is read last, after everything that could change it. What each rule of it is good for is
//! shown by `docs/model/`, which tries every order of the commands with and without it.
//!
//! A line is a round trip, in `issue`, `redeem`, `rows` and here; `CAS` is compare-and-set, `CAD`
//! compare-and-delete.
//!
//! ```text
//! Issue ──── SET token · SET lease NX · GET lease · ZADD live · HGET row · GET holder
//!   │ it is blocked ──▶ Remove ─▶ Blocked
//!   │ ours ───────────▶ Issued
//!   │ it is born dead ▶ Reissue ── CAD lease · DEL token · ZREM live · as Issue, for a later token
//!   └ another's ─▶ Contest ── DEL token · ZREM live · EXISTS other · GET, PTTL its mark · PTTL lease
//!       │ it is alive ─▶ AlreadyActive
//!       └ it is stale ─▶ TakeOver ── SET token · ZADD live · CAS lease · SET lease NX · GET lease · HGET row
//!           │   · GET holder
//!           │ ours ───────▶ Issued, or as above if it is born dead
//!           └ another's ──▶ Yield ── DEL token · ZREM live ─▶ AlreadyActive
//!
//! Replace ── Raise (see `rows`) ─▶ TakeOver, and before it in the same trip, of the token that held the
//!              lease: SET its mark killed · DEL its token · ZREM live
//!
//! Consume ── SET mark NX · EXISTS token · HGET row · GET mark      (then WAIT, if replicas must have it)
//!   │ ours, the token is there ─▶ Granted
//!   │ ours, its row says no ─▶ Withdraw ── CAD mark ─▶ Blocked, AlreadyUsed
//!   │ ours, it is not ─▶ Missing ── CAD mark · INFO ─▶ Unknown
//!   │ of a dead attempt of this instance ─▶ TakeMarkOver ── CAS mark, and the rest
//!   │                                         └─▶ as above
//!   └ another's ─▶ AlreadyUsed
//!
//! Look, Kill, Tell (see `rows`)
//! GiveBack ─ CAD mark
//! Finish ─── CAD lease · DEL token · ZREM live      (TakeBack too)
//! Mark ───── GET mark · SET mark · ZREM live · GET lease · DEL token     (then Finish, if leased)
//! Carry ──── SET token · GET mark ─▶ unmarked ── ZADD live · SET lease NX
//! Count ──── ZCOUNT live · TIME
//! Prune ──── ZREM live · ZRANGEBYSCORE live     (with every some issues)
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::command::{Ask, Command, Commands};
use super::issue::Issue;
use super::layout::{Key, Layout};
use super::redeem::{Consume, withdraw};
use super::reply::{Replies, Reply, maybe_done};
use super::rows::{self, Killing, Then};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::{Claims, MAX_LIFETIME_S, Signer, Token, TokenHash};
use crate::mac::MacKey;
use crate::store::ledger::lasts_ms;
use crate::store::{Answer, Kill, Mark, New, Op, Outcome, Rows, Seen, StoreError, locked};

/// Entries of the set of live tokens are kept this long after their end.
const PRUNE_AFTER_MS: u64 = 3_600_000;
/// For so long after the latest redemption that replicas have missed there are too few of them.
const LACKING_MS: u64 = 10_000;

/// What a flow knows besides its own operation.
#[derive(Debug)]
pub(super) struct Context {
    pub layout: Layout,
    pub signer: Signer,
    /// Seals and opens rows; there is none before there is a CA.
    pub mac_key: OnceLock<MacKey>,
    /// Those of this instance.
    pub rows: Option<Arc<dyn Rows>>,
    /// `REDIS_TIMEOUT_MS`: an issue that is still under way is not older than twice this.
    pub patience_ms: u64,
    pub clock: RedisClock,
    pub replicas: Replicas,
    pub ended: Mutex<Ended>,
}

/// Members of one of the sets of live tokens that have ended long ago and are removed next.
#[derive(Debug, Default)]
pub(super) struct Ended {
    set: usize,
    members: Vec<String>,
}

/// The clock that all instances share. By a clock of ours that is wrong, tokens would be counted that
/// have ended, or not counted although they live.
#[derive(Debug, Default)]
pub(super) struct RedisClock {
    /// How far it is ahead of [`Now::mono_ms`]; measured with each greeting and each count, 0 before.
    ahead_ms: AtomicU64,
}

impl RedisClock {
    /// Milliseconds since 1970.
    pub fn at(&self, now: Now) -> u64 {
        self.ahead_ms.load(Ordering::Relaxed).saturating_add(now.mono_ms)
    }

    /// How far our wall clock is ahead of it.
    pub fn ours_is_ahead_ms(&self, now: Now) -> i64 {
        let is_measured = self.ahead_ms.load(Ordering::Relaxed) > 0;
        let ahead = i128::from(now.unix_ms) - i128::from(self.at(now));
        i64::try_from(ahead).unwrap_or_default() * i64::from(is_measured)
    }

    pub fn set(&self, time_ms: u64, now: Now) {
        self.ahead_ms.store(time_ms.saturating_sub(now.mono_ms), Ordering::Relaxed);
    }
}

/// Whether enough replicas have what they must have.
#[derive(Debug, Default)]
pub(super) struct Replicas {
    /// The masters that last had too few, and when that was, by [`Now::mono_ms`].
    lacked_ms: Mutex<BTreeMap<usize, u64>>,
}

impl Replicas {
    /// This master had enough, or too few.
    pub fn note(&self, master: usize, are_enough: bool, now: Now) {
        let mut lacked_ms = locked(&self.lacked_ms);
        let was_lacking = match are_enough {
            true => lacked_ms.remove(&master),
            false => lacked_ms.insert(master, now.mono_ms),
        };
        match (was_lacking.is_some(), are_enough) {
            (false, false) => {
                log::warn!("{}: nothing is redeemed until they do", StoreError::Unsafe)
            }
            (true, true) => log::info!("enough replicas have what is redeemed again"),
            _ => {}
        }
    }

    /// Only a redemption finds out that there are enough, and an instance that is not ready may be sent
    /// none: so after a while it is worth another try.
    pub fn are_lacking(&self, now: Now) -> bool {
        let is_recent = |ms: &u64| now.mono_ms.saturating_sub(*ms) < LACKING_MS;
        locked(&self.lacked_ms).values().any(is_recent)
    }
}

impl Context {
    pub fn new(
        layout: Layout,
        signer: Signer,
        rows: Option<Arc<dyn Rows>>,
        patience_ms: u64,
    ) -> Self {
        Context {
            layout,
            signer,
            mac_key: OnceLock::new(),
            rows,
            patience_ms,
            clock: RedisClock::default(),
            replicas: Replicas::default(),
            ended: Mutex::default(),
        }
    }

    /// The claims of a token found in Redis; of one that is not ours, the little that is known.
    pub fn claims_of(&self, compact: &str, device: &DeviceId) -> Claims {
        self.signer.verify_signature(compact).unwrap_or_else(|_| Claims {
            device_id: device.clone(),
            iat: 0,
            exp: MAX_LIFETIME_S,
            jti: None,
        })
    }
}

/// What comes next in an operation.
pub(super) enum Next {
    /// A round trip, and what reads its replies.
    Trip(Commands, Box<Reading>),
    Done(Answer),
}

type Reading = dyn FnOnce(&Context, Replies) -> Result<Next, StoreError>;

impl Next {
    /// `read` is given replies of which none is an error, but to what may fail.
    pub fn trip(
        commands: Commands,
        read: impl FnOnce(&Context, Replies) -> Result<Next, StoreError> + 'static,
    ) -> Next {
        Next::Trip(commands, Box::new(read))
    }

    pub fn done(outcome: Outcome) -> Result<Next, StoreError> {
        Ok(Next::Done(Ok(outcome)))
    }

    /// The commands of the round trip, if it is one.
    pub fn commands(&self) -> Option<&Commands> {
        match self {
            Next::Trip(commands, _) => Some(commands),
            Next::Done(_) => None,
        }
    }

    /// After the round trip, if it was one.
    pub fn read(&mut self, context: &Context, replies: Result<Replies, StoreError>) {
        let Next::Trip(..) = self else { return };
        let trip = std::mem::replace(self, Next::Done(Err(StoreError::Undecided)));
        let Next::Trip(commands, read) = trip else { return };
        let has_changed = replies.as_ref().is_ok_and(|replies| commands.have_changed(replies));
        let mut next = replies.and_then(|replies| commands.judge(replies)).and_then(|replies| {
            read(context, replies).map_err(|error| maybe_done(error, has_changed))
        });
        if let Ok(Next::Trip(commands, _)) = &mut next {
            commands.follow |= has_changed;
        }
        *self = next.unwrap_or_else(|error| Next::Done(Err(error)));
    }

    pub fn into_answer(self) -> Answer {
        match self {
            Next::Done(answer) => answer,
            Next::Trip(..) => Err(StoreError::Undecided),
        }
    }
}

/// The first trip of an operation.
pub(super) fn of(op: &Op, context: &Context, now: Now) -> Next {
    match op {
        Op::Issue(New { token, replaces, .. }) => {
            let issue = Issue::new(token.clone(), context, now);
            match replaces.as_deref() {
                Some(kill) => {
                    Killing::new(kill, Then::Replace(Box::new(issue)), now).begin(context)
                }
                None => issue.begin(context),
            }
        }
        Op::Remove(token) => remove(token, Outcome::Done, context),
        Op::Consume(token, serial) => {
            Consume { token: token.clone(), serial: *serial, now }.begin(context)
        }
        Op::GiveBack(token, serial) => withdraw(token, *serial, Ok(Outcome::Done), context),
        Op::Look(device) => {
            rows::look(device.clone(), context, |seen, _| Next::done(Outcome::Seen(Box::new(seen))))
        }
        Op::Kill(kill) => Killing::new(kill, Then::Kill, now).begin(context),
        Op::Tell(device, row) => {
            let kill = Kill { device: device.clone(), row: row.clone(), seen: Seen::default() };
            Killing::new(&kill, Then::Tell { was_lost: false }, now).begin(context)
        }
        Op::Count => count(context, now),
        Op::Mark(hash, mark, claims) => enter(*hash, *mark, claims.clone(), context, now),
        Op::Carry(token, left_ms) => carry(token.clone(), (*left_ms).max(1), context, now),
    }
}

/// The token is used up, or was never handed out: lease, token and count go.
pub(super) fn remove(token: &Token, then: Outcome, context: &Context) -> Next {
    let mut commands = Commands::default();
    ask_removal(&mut commands, &context.layout, token);
    Next::trip(commands, |_, _| Next::done(then))
}

pub(super) fn ask_removal(out: &mut Commands, layout: &Layout, token: &Token) {
    let Token { claims, compact, hash } = token;
    out.ask(layout.compare_and_delete(Key::Lease(&claims.device_id), compact));
    out.ask(layout.on("DEL", Key::Token(&claims.device_id, compact)));
    out.ask_in_reach(layout.remove_live(hash));
}

/// Counting: by score, so expired entries need no pruning to be left out. A set that is out of reach is.
fn count(context: &Context, now: Now) -> Next {
    let (layout, mut commands) = (&context.layout, Commands::default());
    let now_ms = context.clock.at(now);
    let counts: Vec<Ask> = layout
        .all_live()
        .iter()
        .map(|live| commands.ask_in_reach(layout.count_live(live, now_ms)))
        .collect();
    let time = commands.ask(Command::new("TIME"));
    Next::trip(commands, move |context, mut replies| {
        context.clock.set(replies.take(time).time_ms()?, now);
        let in_reach = counts.into_iter().map(|ask| replies.take(ask));
        let in_reach = in_reach.filter(|reply| reply.error().is_none());
        let counts = in_reach.map(Reply::number);
        let count = counts.sum::<Result<i64, _>>()?;
        Next::done(Outcome::Counted(u64::try_from(count).unwrap_or(0)))
    })
}

/// Carry-over of what is known here as used or killed: whether there is a mark, then ours without `NX`
/// (a foreign one may be tentative and withdrawn), then the token goes (`docs/model`, row 20). Of one
/// that an earlier run of this instance redeemed, only hash and times are known; the lease may still
/// show it whole.
fn enter(hash: TokenHash, mark: Mark, claims: Claims, context: &Context, now: Now) -> Next {
    let (layout, mut commands) = (&context.layout, Commands::default());
    let (device, token) = (&claims.device_id, context.signer.sign(claims.clone()));
    let key = Key::Mark(device, &hash);
    let before = commands.ask(layout.on("GET", key));
    commands.ask(layout.set_mark(key, &layout.mark(mark), lasts_ms(&claims, now)));
    commands.ask_in_reach(layout.remove_live(&hash));
    commands.then();
    let lease = commands.ask(layout.on("GET", Key::Lease(device)));
    if token.hash == hash {
        commands.ask(layout.on("DEL", Key::Token(device, &token.compact)));
    }
    Next::trip(commands, move |context, mut replies| {
        let was_lost = replies.take(before).text()?.is_none() && claims.exp > now.unix_s();
        let then = Outcome::Marked { was_lost };
        match replies.take(lease).text()?.filter(|lease| TokenHash::of(lease) == hash) {
            Some(compact) => {
                Ok(remove(&Token { compact: compact.into(), hash, claims }, then, context))
            }
            None => Next::done(then),
        }
    })
}

/// Carry-over of a live token. One whose row is out of reach could not be redeemed there, so it stays
/// with us for now.
fn carry(token: Token, left_ms: u64, context: &Context, now: Now) -> Next {
    if !context.layout.is_spread {
        return carry_over(&token, left_ms, context, now);
    }
    let mut commands = Commands::default();
    commands.ask(context.layout.get_row(&token.claims.device_id));
    Next::trip(commands, move |context, _| Ok(carry_over(&token, left_ms, context, now)))
}

/// Whatever mark stands does not matter: if it is another's, the token stays refused; if it is
/// tentative, it will be withdrawn.
fn carry_over(token: &Token, left_ms: u64, context: &Context, now: Now) -> Next {
    let (layout, mut commands) = (&context.layout, Commands::default());
    commands.ask(layout.set_token(token, left_ms));
    let key = Key::Mark(&token.claims.device_id, &token.hash);
    let mark = commands.ask(layout.on("GET", key));
    let token = token.clone();
    Next::trip(commands, move |context, mut replies| match replies.take(mark).text()? {
        Some(_) => Next::done(Outcome::Done),
        None => Ok(carry_unmarked(&token, left_ms, context, now)),
    })
}

/// It counts, and its device is leased to it. One that bears a mark does neither, for it is used, most
/// likely.
fn carry_unmarked(token: &Token, left_ms: u64, context: &Context, now: Now) -> Next {
    let (layout, mut commands) = (&context.layout, Commands::default());
    commands
        .ask_in_reach(layout.add_live(&token.hash, context.clock.at(now).saturating_add(left_ms)));
    commands.ask(layout.lease_if_free(token, left_ms));
    Next::trip(commands, |_, _| Next::done(Outcome::Done))
}

/// Pruning the sets of live tokens, one after the other: removes what an earlier trip has found, and
/// finds what the next one is to remove, so many at most. It needs no trip of its own, and each batch of
/// tokens removes more than it adds.
pub(super) fn prune(context: &Context, most: u64, now: Now) -> Next {
    let (layout, mut commands) = (&context.layout, Commands::default());
    let all = layout.all_live();
    let Ended { set, members } = std::mem::take(&mut *locked(&context.ended));
    commands.try_ask(layout.remove_live_members(all.get(set).unwrap_or(&"live"), &members));
    let until_ms = context.clock.at(now).saturating_sub(PRUNE_AFTER_MS);
    let set = (set + 1) % all.len();
    let found = commands.ask(layout.oldest_live(all.get(set).unwrap_or(&"live"), until_ms, most));
    Next::trip(commands, move |context, mut replies| {
        *locked(&context.ended) = Ended { set, members: replies.take(found).read()? };
        Next::done(Outcome::Done)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{Block, Bound, Row, codec};
    use crate::serial::Serial;
    use crate::store::redis::issue::Old;
    use crate::store::{Down, DownKind};
    use redis::Value;

    const NOW: Now = Now { unix_ms: 2000, mono_ms: 0 };

    fn context() -> Context {
        Context::new(
            Layout {
                prefix: String::new(),
                name: None,
                wait_replicas: 0,
                share_record: true,
                is_spread: false,
            },
            Signer::new(b"secret"),
            None,
            1000,
        )
    }

    fn token(iat: u64, exp: u64) -> Token {
        let device_id = DeviceId::parse("d").unwrap();
        Signer::new(b"secret").sign(Claims { device_id, iat, exp, jti: None })
    }

    fn attempt() -> Consume {
        Consume { token: token(1, 301), serial: Serial::from([1; 16]), now: NOW }
    }

    fn text(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn done(count: usize) -> Vec<Value> {
        vec![Value::Int(1); count]
    }

    fn names(next: &Next) -> Vec<String> {
        let commands = next.commands().expect("a round trip");
        commands.iter().map(|command| command.name().to_owned()).collect()
    }

    /// What comes after these replies, one for each command.
    fn after(mut next: Next, context: &Context, replies: Vec<Value>) -> Next {
        assert_eq!(names(&next).len(), replies.len());
        let replies = replies.into_iter().map(|value| Reply(Ok(value))).collect();
        next.read(context, Ok(Replies::new(replies)));
        next
    }

    fn end(next: Next, replies: Vec<Value>) -> Answer {
        let next = after(next, &context(), replies);
        assert!(next.commands().is_none(), "another trip");
        next.into_answer()
    }

    /// The lease was another's when it was looked at, and free a moment later, for its device has a
    /// certificate by now.
    #[test]
    fn a_lease_that_is_taken_over_is_not_taken_without_a_look_at_the_holder() {
        let context = context();
        let issue = Issue::new(token(1, 301), &context, NOW);
        let compact = issue.token.compact.to_string();
        let take_over = issue.take_over(Some(Old::Stale("another".to_owned())), &context);
        assert_eq!(names(&take_over)[6], "GET", "after the lease");
        let holder = Serial::from([0x41; 16]);
        let last = [text(&compact), Value::Nil, text(&holder.to_string())];
        let answer = end(take_over, [done(4), last.into()].concat());
        let told =
            matches!(&answer, Ok(Outcome::Issued { found, .. }) if found.holder == Some(holder));
        assert!(told, "{answer:?}");
    }

    /// Of keys that are just moving, one may be sent to another node while the next is changed at once.
    #[test]
    fn what_must_stand_first_is_a_stage_of_its_own() {
        let context = context();
        let issue = Issue::new(token(1, 301), &context, NOW);
        let take_over = issue.take_over(Some(Old::Replaced(token(1, 200))), &context);
        let asked = take_over.commands().map(Commands::asked).unwrap_or_default();
        let stages = asked.iter().map(|asked| (asked.command.name(), asked.stage));
        let stages: Vec<_> =
            stages.filter(|(name, _)| ["SET", "DEL", "EVAL"].contains(name)).collect();
        let expected = [("SET", 0), ("DEL", 1), ("SET", 1), ("EVAL", 2), ("SET", 2)];
        assert_eq!(stages, expected, "mark, old token, new token, lease");
    }

    /// A kill by another instance came between the look at the lease and the take-over.
    #[test]
    fn a_token_that_takes_a_lease_over_is_not_born_dead() {
        let context = context();
        let key = MacKey::derive(b"of the CA");
        context.mac_key.set(key.clone()).unwrap();
        let (device, old) = (DeviceId::parse("d").unwrap(), token(1, 200));
        let sealed = |row: &Row| Value::BulkString(codec::seal(&key, &device, row));
        let take_over = |row: Row| {
            let issue = Issue::new(token(1, 301), &context, NOW);
            let last = [text(&issue.token.compact), sealed(&row), Value::Nil];
            let next = issue.take_over(Some(Old::Replaced(old.clone())), &context);
            after(next, &context, [done(7), last.into()].concat())
        };
        let killed = Row { bound: Bound { t: 50, c: 50 }, ..Row::default() };
        let again = take_over(killed.clone());
        let later = text(&token(51, 351).compact);
        let last = [later, Value::Int(1), sealed(&killed), Value::Nil];
        let answer = after(again, &context, [done(5), last.into()].concat()).into_answer();
        let Ok(Outcome::Issued { token, killed, .. }) = answer else { panic!("{answer:?}") };
        assert_eq!((token.claims.iat, killed.map(|dead| dead.hash)), (51, Some(old.hash)));
        let blocked = Row { block: Block { blocked: 1, ..Default::default() }, ..Row::default() };
        assert_eq!(end(take_over(blocked), done(3)), Ok(Outcome::Blocked));
    }

    /// Between the take-over and the look at the token another instance carried its mark over ours,
    /// and a third its copy of the token.
    #[test]
    fn a_taken_over_mark_must_still_be_ours_when_the_token_was_seen() {
        let context = context();
        let take_over = || attempt().take_mark_over("a 00", &context);
        let ours = context.layout.mark(Mark::Serial(Serial::from([1; 16])));
        let answer = |taken, mark| {
            end(take_over(), vec![Value::Int(taken), Value::Int(1), Value::Nil, mark])
        };
        assert_eq!(answer(1, text(&ours)), Ok(Outcome::Granted(Box::default())));
        assert_eq!(answer(1, text("b 02")), Ok(Outcome::AlreadyUsed));
        assert_eq!(answer(0, text("b 02")), Ok(Outcome::AlreadyUsed));
        assert_eq!(answer(0, Value::Nil), Err(StoreError::Undecided), "nobody used it");
        assert_eq!(
            names(&take_over()),
            ["EVAL", "EXISTS", "HGET", "GET"],
            "the mark is read, last"
        );
    }

    /// Memory was asked in its place, so the bound need not reach the token that is there.
    #[test]
    fn a_kill_without_a_look_at_redis_begins_with_one() {
        let context = context();
        let begin = |by_redis| {
            let row = Row { bound: Bound { t: 10, c: 0 }, ..Row::default() };
            let device = DeviceId::parse("d").unwrap();
            let kill = Kill { device, row, seen: Seen { by_redis, ..Seen::default() } };
            Killing::new(&kill, Then::Kill, NOW).begin(&context)
        };
        assert_eq!(names(&begin(false)), ["GET", "HGET"]);
        assert!(begin(true).commands().is_none(), "without a key no row is written");
        let leased = |iat| {
            let replies = vec![text(&token(iat, 301).compact), Value::Nil];
            after(begin(false), &context, replies)
        };
        assert_eq!(names(&leased(10)), ["SET", "DEL", "ZREM", "EVAL"]);
        assert_eq!(leased(11).into_answer(), Err(StoreError::Undecided));
    }

    /// Whether an operation that met an error may have left something behind.
    #[test]
    fn what_only_looks_leaves_nothing_behind() {
        let refused = || {
            let why = "OOM".into();
            let down = Down { why, kind: DownKind::Refused, lasting: false, maybe_done: false };
            Reply(Err(StoreError::Down(down)))
        };
        let maybe_done = |mut next: Next, replies: Vec<Reply>| {
            next.read(&context(), Ok(Replies::new(replies)));
            match next.into_answer() {
                Err(StoreError::Down(down)) => down.maybe_done,
                other => panic!("{other:?}"),
            }
        };
        let fine = |value| Reply(Ok(value));
        let consume = || attempt().begin(&context());
        let looks = || vec![fine(Value::Int(1)), fine(Value::Nil), fine(Value::Nil)];
        assert!(!maybe_done(consume(), [vec![refused()], looks()].concat()));
        let marked = vec![fine(Value::Okay), refused(), fine(Value::Nil), fine(Value::Nil)];
        assert!(maybe_done(consume(), marked), "the mark stands");
    }
}
