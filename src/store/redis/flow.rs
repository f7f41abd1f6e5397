//! The protocol: for each operation, what is sent in a round trip and what its replies decide.
//!
//! A [`Flow`] is one round trip of one operation; `send` and `receive` stand beside each other, and
//! `receive` names the next trip or the answer. The order of the commands in a trip matters: the
//! value that decides is read last, after everything that could change it. What each rule of it is good
//! for is shown by `docs/model/`, which tries every order of the commands with and without it.
//!
//! A line is a round trip; `CAS` is compare-and-set, `CAD` compare-and-delete.
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

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::command::Commands;
use super::layout::Layout;
use super::name::Whose;
use super::reply::{Info, Replies, Reply, maybe_done, unexpected};
use super::rows::{Killing, LookAgain, LookOnce, Then};
use crate::clock::{self, Now};
use crate::device::DeviceId;
use crate::devices::Row;
use crate::jwt::{Claims, MAX_LIFETIME_S, Signer, Token, TokenHash};
use crate::mac::MacKey;
use crate::serial::Serial;
use crate::store::ledger::lasts_ms;
use crate::store::{
    Answer, Dead, Found, Kill, Mark, New, Op, Outcome, Rows, Seen, StoreError, dated, locked,
};

/// A lease whose token has been marked for this long is not waited for.
const MARKED_LONG_MS: u64 = 30_000;
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
    /// Members of the set of live tokens that have ended long ago and are removed next.
    pub ended: Mutex<Vec<String>>,
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
    /// When there were last too few, by [`Now::mono_ms`]; 0 once there were enough.
    lacked_ms: AtomicU64,
}

impl Replicas {
    /// There were enough, or too few.
    fn note(&self, are_enough: bool, now: Now) {
        let lacked_ms = if are_enough { 0 } else { now.mono_ms.max(1) };
        let before_ms = self.lacked_ms.swap(lacked_ms, Ordering::Relaxed);
        match (before_ms == 0, are_enough) {
            (true, false) => {
                log::warn!("{}: nothing is redeemed until they do", StoreError::Unsafe)
            }
            (false, true) => log::info!("enough replicas have what is redeemed again"),
            _ => {}
        }
    }

    /// Only a redemption finds out that there are enough, and an instance that is not ready may be sent
    /// none: so after a while it is worth another try.
    pub fn are_lacking(&self, now: Now) -> bool {
        let lacked_ms = self.lacked_ms.load(Ordering::Relaxed);
        lacked_ms > 0 && now.mono_ms.saturating_sub(lacked_ms) < LACKING_MS
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

/// One round trip of one operation.
pub(super) trait Flow {
    /// Adds this trip's commands.
    fn send(&self, layout: &Layout, now: Now, out: &mut Commands);

    /// Sets a mark that counts only when replicas have it; the reply to one `WAIT` for the whole batch
    /// is then the last.
    fn awaits_replicas(&self) -> bool {
        false
    }

    /// Reads its replies, one for each command.
    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next;
}

/// What comes after a round trip.
pub(super) enum Next {
    Trip(Box<dyn Flow>),
    Done(Answer),
}

impl Next {
    pub fn trip(flow: impl Flow + 'static) -> Result<Next, StoreError> {
        Ok(Next::Trip(Box::new(flow)))
    }

    pub fn done(outcome: Outcome) -> Result<Next, StoreError> {
        Ok(Next::Done(Ok(outcome)))
    }

    pub fn of(result: Result<Next, StoreError>) -> Next {
        result.unwrap_or_else(|error| Next::Done(Err(error)))
    }
}

/// The first trip of an operation.
pub(super) fn of(op: &Op, context: &Context, now: Now) -> Box<dyn Flow> {
    match op {
        Op::Issue(New { token, replaces, .. }) => {
            let issue = Issue::new(token.clone(), context, now);
            match replaces.as_deref() {
                Some(kill) => Killing::new(Kill::clone(kill), Then::Replace(Box::new(issue)), now)
                    .begin(context),
                None => Box::new(issue),
            }
        }
        Op::TakeBack(token) | Op::Finish(token) => {
            Box::new(Remove { token: token.clone(), then: Outcome::Done })
        }
        Op::Consume(token, serial) => Box::new(Consume { token: token.clone(), serial: *serial }),
        Op::GiveBack(token, serial) => {
            Box::new(Withdraw { hash: token.hash, serial: *serial, then: Ok(Outcome::Done) })
        }
        Op::Look(device) => Box::new(LookOnce(device.clone())),
        Op::Kill(kill) => Killing::new(Kill::clone(kill), Then::Kill, now).begin(context),
        Op::Tell(device, row) => {
            let kill = Kill { device: device.clone(), row: row.clone(), seen: Seen::default() };
            Box::new(LookAgain(Killing::new(kill, Then::Tell { was_lost: false }, now)))
        }
        Op::Count => Box::new(Count { now, by_redis_ms: context.clock.at(now) }),
        Op::Mark(hash, mark, claims) => {
            let token = Some(context.signer.sign(claims.clone()));
            Box::new(Enter {
                hash: *hash,
                mark: *mark,
                claims: claims.clone(),
                token: token.filter(|token| token.hash == *hash),
                now,
            })
        }
        Op::Carry(token, left_ms) => {
            let left_ms = (*left_ms).max(1);
            let ends_ms = context.clock.at(now).saturating_add(left_ms);
            Box::new(Carry { token: token.clone(), left_ms, ends_ms })
        }
    }
}

/// Issuing, first trip: token, lease if it is free, and then whose the lease is.
pub(super) struct Issue {
    token: Token,
    left_ms: u64,
    /// By the clock of Redis.
    ends_ms: u64,
    now: Now,
    /// The device's newest certificate, as far as another instance has told lately.
    holder: Option<Serial>,
    /// The token that gave way to it.
    killed: Option<Dead>,
}

impl Issue {
    fn new(token: Token, context: &Context, now: Now) -> Self {
        let left_ms = token.claims.exp.saturating_mul(1000).saturating_sub(now.unix_ms).max(1);
        let ends_ms = context.clock.at(now).saturating_add(left_ms);
        Issue { token, left_ms, ends_ms, now, holder: None, killed: None }
    }

    /// The same token, issued later.
    fn dated(&self, iat: u64, context: &Context) -> Self {
        Issue::new(dated(&self.token, iat, &context.signer), context, self.now)
    }

    /// Asked last, when the lease is ours: who had it before tells of the certificate, and of the
    /// registration that is used up, first.
    fn push_found(&self, layout: &Layout, out: &mut Commands) {
        out.push(&layout.get_row(&self.token.claims.device_id));
        if layout.share_record {
            out.push(&layout.get_holder(&self.token.claims.device_id));
        }
    }

    /// Notes the holder, and gives the row.
    fn found(&mut self, context: &Context, replies: &mut Vec<Reply>) -> Result<Row, StoreError> {
        if context.layout.share_record {
            self.holder = holder_of(replies.pop());
        }
        let row = replies.pop().unwrap_or_else(|| Err(unexpected("no reply")));
        let row = context.row_of(&self.token.claims.device_id, row);
        Ok(row.map_err(|error| maybe_done(error, true))?.0)
    }

    fn issued(self, row: Row) -> Result<Next, StoreError> {
        let found = Box::new(Found { row, holder: self.holder });
        Next::done(Outcome::Issued { token: self.token, killed: self.killed, found })
    }

    /// By the row the device is blocked, or its past was killed by an instance whose word did not reach
    /// us, and the token was born dead.
    fn is_refused_by(&self, row: &Row) -> bool {
        row.block.stands() || self.token.claims.iat <= row.bound.t
    }

    fn refused_by(self, row: &Row, context: &Context) -> Result<Next, StoreError> {
        if row.block.stands() {
            return Next::trip(Remove { token: self.token, then: Outcome::Blocked });
        }
        let mut later = self.dated(row.bound.t.saturating_add(1), context);
        later.killed = self.killed;
        Next::trip(Reissue { dead: self.token, later })
    }

    fn already_active(&self, context: &Context, other: &str, lease_left: i64) -> Outcome {
        let by_lease = self.now.unix_ms + u64::try_from(lease_left).unwrap_or(0);
        let by_token = context.signer.verify_signature(other).map(|claims| claims.exp * 1000);
        Outcome::AlreadyActive { expires_at_ms: by_token.unwrap_or(by_lease) }
    }
}

impl Flow for Issue {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.set_token(&self.token, self.left_ms));
        out.push(&layout.lease_if_free(&self.token, self.left_ms));
        out.push(&layout.get_lease(&self.token.claims.device_id));
        out.push(&layout.add_live(&self.token.hash, self.ends_ms));
        self.push_found(layout, out);
    }

    fn receive(mut self: Box<Self>, context: &Context, mut replies: Vec<Reply>) -> Next {
        let row = self.found(context, &mut replies);
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            replies.skip();
            replies.skip();
            let leased = replies.text()?;
            let row = row?;
            if self.is_refused_by(&row) {
                return self.refused_by(&row, context);
            }
            match leased {
                Some(leased) if *leased == *self.token.compact => self.issued(row),
                // An older lease ended between the two commands, just now.
                None => Next::trip(*self),
                Some(other) => Next::trip(Contest { issue: *self, other, t: row.bound.t }),
            }
        }))
    }
}

/// What was told cannot be read for lack of a right, or is none: then nobody holds anything.
fn holder_of(reply: Option<Reply>) -> Option<Serial> {
    let told = Replies::new(vec![reply?]).text().ok().flatten();
    Serial::from_hex(&told?)
}

/// Issuing, next trip: the token that was born dead is taken back, and one is issued that is not.
struct Reissue {
    dead: Token,
    later: Issue,
}

impl Flow for Reissue {
    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        push_removal(layout, out, &self.dead);
        self.later.send(layout, now, out);
    }

    fn receive(self: Box<Self>, context: &Context, mut replies: Vec<Reply>) -> Next {
        let rest = replies.split_off(replies.len().min(3));
        Next::of(
            Replies::all_or_error(replies)
                .map(|_removed| Box::new(self.later).receive(context, rest)),
        )
    }
}

/// Issuing, second trip: another token holds the lease. Ours is taken back; is the other one alive?
struct Contest {
    issue: Issue,
    other: String,
    /// Every token of the device that was issued then or before is dead.
    t: u64,
}

impl Flow for Contest {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        let Issue { token, .. } = &self.issue;
        let other = TokenHash::of(&self.other);
        out.push(&layout.delete_token(&token.compact));
        out.push(&layout.remove_live(&token.hash));
        out.push(&layout.exists_token(&self.other));
        out.push(&layout.get_mark(&other));
        out.push(&layout.mark_left(&other));
        out.push(&layout.lease_left(&token.claims.device_id));
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            replies.skip();
            replies.skip();
            let gone = replies.number()? == 0;
            let mark = replies.text()?;
            let mark_left = replies.number()?;
            let lease_left = replies.number()?;
            let claims = context.claims_of(&self.other, &self.issue.token.claims.device_id);
            // A clock was set: a lease may outlive its token.
            let verified = context.signer.verify_signature(&self.other);
            let ended =
                verified.is_ok_and(|c| c.exp.saturating_mul(1000) <= self.issue.now.unix_ms);
            let age = age_ms(claims.lifetime_s() * 1000, lease_left);
            let is_old = age_ms(lasts_ms(&claims, self.issue.now), mark_left) > MARKED_LONG_MS;
            let marked_long = mark.is_some() && is_old;
            // Whoever has marked it before it was killed may be about to record a certificate, for
            // which a registration is used up: nobody else is to have it meanwhile.
            let is_redeemed = !is_old && mark.is_some_and(|mark| !mark.ends_with(" killed"));
            let killed = (1..=self.t).contains(&claims.iat) && !is_redeemed;
            let stale = ended || killed || age > 2 * context.patience_ms && (gone || marked_long);
            if !stale {
                let outcome = self.issue.already_active(context, &self.other, lease_left);
                return Next::done(outcome);
            }
            Next::trip(TakeOver { issue: self.issue, old: Some(Old::Stale(self.other)) })
        }))
    }
}

/// How old a key is that was set to live for `whole` and has `left` (a reply of `PTTL`). One that is
/// gone or never ends is as old as can be.
pub(super) fn age_ms(whole: u64, left: i64) -> u64 {
    u64::try_from(left).map_or(u64::MAX, |left| whole.saturating_sub(left))
}

/// Issuing, third trip, and replacing, second: the token that held the lease dies if it is replaced, then
/// the new one stands, then it takes the lease over, unless another was faster (`docs/model`, row 2). The
/// row is read again: a kill may have come since the trip before.
pub(super) struct TakeOver {
    pub issue: Issue,
    /// The token that held the lease when it was looked at.
    pub old: Option<Old>,
}

/// A token that gives way to another.
pub(super) enum Old {
    /// It has ended, in one way or another.
    Stale(String),
    Replaced(Token),
}

impl Flow for TakeOver {
    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        let Issue { token, left_ms, ends_ms, .. } = &self.issue;
        if let Some(Old::Replaced(old)) = &self.old {
            push_kill(layout, out, old, now);
        }
        out.push(&layout.set_token(token, *left_ms));
        out.push(&layout.add_live(&token.hash, *ends_ms));
        match &self.old {
            Some(Old::Stale(compact)) => {
                out.push(&layout.take_lease_over(compact, token, *left_ms));
            }
            Some(Old::Replaced(old)) => {
                out.push(&layout.take_lease_over(&old.compact, token, *left_ms));
            }
            None => {}
        }
        out.push(&layout.lease_if_free(token, *left_ms));
        out.push(&layout.get_lease(&token.claims.device_id));
        self.issue.push_found(layout, out);
    }

    fn receive(mut self: Box<Self>, context: &Context, mut replies: Vec<Reply>) -> Next {
        let row = self.issue.found(context, &mut replies);
        let lease = replies.pop().unwrap_or_else(|| Err(unexpected("no reply")));
        Next::of(Replies::all_or_error(replies).and_then(|_| {
            let mut issue = self.issue;
            if let Some(Old::Replaced(old)) = self.old {
                issue.killed = Some(Dead { hash: old.hash, claims: old.claims });
            }
            let holder = Replies::new(vec![lease]).text()?;
            if holder.as_deref() != Some(&*issue.token.compact) {
                return Next::trip(Yield { issue, holder });
            }
            let row = row?;
            match issue.is_refused_by(&row) {
                true => issue.refused_by(&row, context),
                false => issue.issued(row),
            }
        }))
    }
}

/// The lease went to another after all: the new token is removed again.
struct Yield {
    issue: Issue,
    holder: Option<String>,
}

impl Flow for Yield {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.delete_token(&self.issue.token.compact));
        out.push(&layout.remove_live(&self.issue.token.hash));
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|_| {
            let holder = self.holder.unwrap_or_default();
            Next::done(self.issue.already_active(context, &holder, 0))
        }))
    }
}

/// Mark first: an instance that holds a copy might carry the token over (`docs/model`, row 1).
pub(super) fn push_kill(layout: &Layout, out: &mut Commands, token: &Token, now: Now) {
    let mark = layout.mark(Mark::Killed);
    out.push(&layout.set_mark(&token.hash, &mark, lasts_ms(&token.claims, now)));
    out.push(&layout.delete_token(&token.compact));
    out.push(&layout.remove_live(&token.hash));
}

/// Consuming, first trip: our mark if there is none, the token, and then whose the mark is
/// (`docs/model`, row 20b).
struct Consume {
    token: Token,
    serial: Serial,
}

impl Flow for Consume {
    fn awaits_replicas(&self) -> bool {
        true
    }

    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        let Token { hash, claims, .. } = &self.token;
        let mark = layout.mark(Mark::Serial(self.serial));
        out.push(&layout.mark_if_free(hash, &mark, lasts_ms(claims, now)));
        push_judgement(layout, out, &self.token);
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(judgement(context, &self.token, replies).and_then(|(fate, mark)| {
            let Some(mark) = mark else { return Err(StoreError::Undecided) };
            if mark == context.layout.mark(Mark::Serial(self.serial)) {
                return self.marked(fate);
            }
            match context.layout.attempt_of(&mark) {
                Whose::Ours => Next::trip(TakeMarkOver { attempt: *self, dead: mark }),
                Whose::Unknown => Err(StoreError::Undecided),
                Whose::Others => Next::done(Outcome::AlreadyUsed),
            }
        }))
    }
}

impl Consume {
    /// Our mark stands. Where it is good for nothing it is withdrawn: an instance that still has to
    /// carry the token over would find it burnt.
    fn marked(self, fate: Fate) -> Result<Next, StoreError> {
        let (hash, serial) = (self.token.hash, self.serial);
        match fate {
            Fate::Live(row) => Next::done(Outcome::Granted(row)),
            Fate::Blocked => Next::trip(Withdraw { hash, serial, then: Ok(Outcome::Blocked) }),
            Fate::Dead => Next::trip(Withdraw { hash, serial, then: Ok(Outcome::AlreadyUsed) }),
            Fate::Missing => Next::trip(Missing { hash, serial }),
            Fate::Unsafe => Next::trip(Withdraw { hash, serial, then: Err(StoreError::Unsafe) }),
        }
    }
}

/// How it is with a token, whatever its mark says.
enum Fate {
    Live(Box<Row>),
    /// Its device is blocked.
    Blocked,
    /// By the row of its device.
    Dead,
    Missing,
    /// It lives, but a fail-over might forget the mark (`docs/model`, row 31c).
    Unsafe,
}

/// What decides about a token. The mark comes last.
fn push_judgement(layout: &Layout, out: &mut Commands, token: &Token) {
    out.push(&layout.exists_token(&token.compact));
    out.push(&layout.get_row(&token.claims.device_id));
    out.push(&layout.get_mark(&token.hash));
}

/// The replies to a mark that was set and to [`push_judgement`]: the token's fate, and its mark. An
/// error says whether our mark may stand although there was one.
fn judgement(
    context: &Context,
    token: &Token,
    mut replies: Vec<Reply>,
) -> Result<(Fate, Option<String>), StoreError> {
    let maybe_marked = replies.first().is_some_and(Result::is_ok);
    let wanted = context.layout.wait_replicas;
    let is_safe = wanted == 0 || {
        let waited = replies.pop().map(|reply| Replies::new(vec![reply]).number());
        matches!(waited, Some(Ok(have)) if u64::try_from(have).is_ok_and(|have| have >= wanted))
    };
    let row = if replies.len() > 2 { replies.remove(2) } else { Err(unexpected("no reply")) };
    let judge = || {
        let (row, _) = context.row_of(&token.claims.device_id, row)?;
        let mut replies = Replies::all_or_error(replies)?;
        replies.skip();
        let there = replies.number()? == 1;
        let fate = match (token.claims.iat <= row.bound.t, there) {
            _ if row.block.stands() => Fate::Blocked,
            (true, _) => Fate::Dead,
            (false, true) if !is_safe => Fate::Unsafe,
            (false, true) => Fate::Live(Box::new(row)),
            (false, false) => Fate::Missing,
        };
        if wanted > 0 && (is_safe || matches!(fate, Fate::Unsafe)) {
            context.replicas.note(is_safe, clock::now());
        }
        Ok((fate, replies.text()?))
    };
    judge().map_err(|error| maybe_done(error, maybe_marked))
}

/// Consuming, last trip where the token is not there: our mark is withdrawn, and the server is asked
/// whether it may have dropped the token by itself.
struct Missing {
    hash: TokenHash,
    serial: Serial,
}

impl Flow for Missing {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.withdraw_mark(&self.hash, &layout.mark(Mark::Serial(self.serial))));
        Info::ask(out);
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        let mut replies = Replies::new(replies);
        // A refusal leaves the mark where it is.
        Next::of(replies.number().map_err(|error| maybe_done(error, true)).and_then(|_| {
            let server = replies.info();
            let lossless = server.keeps_all();
            Next::done(Outcome::Unknown { lossless_run: server.run_id.filter(|_| lossless) })
        }))
    }
}

/// Consuming, second trip: the mark is of an older attempt of this instance, of which no certificate
/// came and which no longer runs (both known to the caller): it is dead and taken over (`docs/model`,
/// row 5, row 21).
struct TakeMarkOver {
    attempt: Consume,
    dead: String,
}

impl Flow for TakeMarkOver {
    fn awaits_replicas(&self) -> bool {
        true
    }

    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        let Consume { token, serial } = &self.attempt;
        let (mark, lasts_ms) = (layout.mark(Mark::Serial(*serial)), lasts_ms(&token.claims, now));
        out.push(&layout.take_mark_over(&token.hash, &self.dead, &mark, lasts_ms));
        push_judgement(layout, out, token);
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(judgement(context, &self.attempt.token, replies).and_then(|(fate, mark)| {
            match mark {
                Some(mark) if mark == context.layout.mark(Mark::Serial(self.attempt.serial)) => {
                    self.attempt.marked(fate)
                }
                // Ours was taken over in its turn, by a kill or by a mark carried over.
                Some(_) => Next::done(Outcome::AlreadyUsed),
                // The dead one was withdrawn just now.
                None => Err(StoreError::Undecided),
            }
        }))
    }
}

/// Giving back: the mark is removed if it is still ours (`docs/model`, row 4).
struct Withdraw {
    hash: TokenHash,
    serial: Serial,
    then: Answer,
}

impl Flow for Withdraw {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.withdraw_mark(&self.hash, &layout.mark(Mark::Serial(self.serial))));
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        // A refusal leaves the mark where it is.
        let withdrawn = Replies::new(replies).number().map_err(|error| maybe_done(error, true));
        Next::of(withdrawn.map(|_| Next::Done(self.then)))
    }
}

/// The token is used up, or was never handed out: lease, token and count go.
struct Remove {
    token: Token,
    then: Outcome,
}

impl Flow for Remove {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        push_removal(layout, out, &self.token);
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|_| Next::done(self.then)))
    }
}

fn push_removal(layout: &Layout, out: &mut Commands, token: &Token) {
    out.push(&layout.free_lease(&token.claims.device_id, &token.compact));
    out.push(&layout.delete_token(&token.compact));
    out.push(&layout.remove_live(&token.hash));
}

/// Counting: by score, so expired entries need no pruning to be left out.
struct Count {
    now: Now,
    by_redis_ms: u64,
}

impl Flow for Count {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.count_live(self.by_redis_ms));
        out.push(&layout.time());
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            let count = replies.number()?;
            context.clock.set(replies.time_ms()?, self.now);
            Next::done(Outcome::Counted(u64::try_from(count).unwrap_or(0)))
        }))
    }
}

/// Carry-over of what is known here as used or killed: whether there is a mark, then ours without `NX`
/// (a foreign one may be tentative and withdrawn), then the token goes (`docs/model`, row 20).
struct Enter {
    hash: TokenHash,
    mark: Mark,
    claims: Claims,
    /// The token itself, where it can be made again. Of one that an earlier run of this instance
    /// redeemed, only hash and times are known; the lease may still show it whole.
    token: Option<Token>,
    now: Now,
}

impl Flow for Enter {
    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        let (mark, lasts_ms) = (layout.mark(self.mark), lasts_ms(&self.claims, now));
        out.push(&layout.get_mark(&self.hash));
        out.push(&layout.set_mark(&self.hash, &mark, lasts_ms));
        out.push(&layout.remove_live(&self.hash));
        out.push(&layout.get_lease(&self.claims.device_id));
        if let Some(token) = &self.token {
            out.push(&layout.delete_token(&token.compact));
        }
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            let lives = self.claims.exp > self.now.unix_s();
            let then = Outcome::Marked { was_lost: replies.text()?.is_none() && lives };
            replies.skip();
            replies.skip();
            match replies.text()?.filter(|lease| TokenHash::of(lease) == self.hash) {
                Some(compact) => {
                    let token =
                        Token { compact: compact.into(), hash: self.hash, claims: self.claims };
                    Next::trip(Remove { token, then })
                }
                None => Next::done(then),
            }
        }))
    }
}

/// Carry-over of a live token, first trip. Whatever mark stands does not matter: if it is another's,
/// the token stays refused; if it is tentative, it will be withdrawn.
struct Carry {
    token: Token,
    left_ms: u64,
    /// By the clock of Redis.
    ends_ms: u64,
}

impl Flow for Carry {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.set_token(&self.token, self.left_ms));
        out.push(&layout.get_mark(&self.token.hash));
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            replies.skip();
            match replies.text()? {
                Some(_) => Next::done(Outcome::Done),
                None => Next::trip(CarryUnmarked(*self)),
            }
        }))
    }
}

/// Carry-over of a live token, second trip: it counts, and its device is leased to it. One that bears
/// a mark does neither, for it is used, most likely.
struct CarryUnmarked(Carry);

impl Flow for CarryUnmarked {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        let Carry { token, left_ms, ends_ms } = &self.0;
        out.push(&layout.add_live(&token.hash, *ends_ms));
        out.push(&layout.lease_if_free(token, *left_ms));
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|_| Next::done(Outcome::Done)))
    }
}

/// Pruning the set of live tokens: removes what an earlier trip has found, and finds what the next
/// one is to remove. It needs no trip of its own, and each batch of tokens removes more than it adds.
pub(super) struct Prune {
    remove: Vec<String>,
    until_ms: u64,
    most: u64,
}

impl Prune {
    /// `most`: how many entries are to be found.
    pub fn new(context: &Context, most: u64, now: Now) -> Self {
        let remove = std::mem::take(&mut *locked(&context.ended));
        Prune { remove, until_ms: context.clock.at(now).saturating_sub(PRUNE_AFTER_MS), most }
    }
}

impl Flow for Prune {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.remove_live_members(&self.remove));
        out.push(&layout.oldest_live(self.until_ms, self.most));
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        let mut replies = Replies::new(replies);
        replies.skip();
        Next::of(replies.texts().and_then(|found| {
            *locked(&context.ended) = found;
            Next::done(Outcome::Done)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{Block, Bound, codec};
    use redis::Value;

    fn context() -> Context {
        Context::new(
            Layout { prefix: String::new(), name: None, wait_replicas: 0, share_record: true },
            Signer::new(b"secret"),
            None,
            1000,
        )
    }

    fn attempt() -> Consume {
        let device_id = DeviceId::parse("d").unwrap();
        let claims = Claims { device_id, iat: 1, exp: 301, jti: None };
        Consume { token: Signer::new(b"secret").sign(claims), serial: Serial::from([1; 16]) }
    }

    fn text(text: &str) -> Reply {
        Ok(Value::BulkString(text.as_bytes().to_vec()))
    }

    fn end(flow: impl Flow, replies: Vec<Reply>) -> Answer {
        match Box::new(flow).receive(&context(), replies) {
            Next::Done(answer) => answer,
            Next::Trip(_) => panic!("another trip"),
        }
    }

    /// The lease was another's when it was looked at, and free a moment later, for its device has a
    /// certificate by now.
    #[test]
    fn a_lease_that_is_taken_over_is_not_taken_without_a_look_at_the_holder() {
        let now = Now { unix_ms: 2000, mono_ms: 0 };
        let issue = Issue::new(attempt().token, &context(), now);
        let compact = issue.token.compact.to_string();
        let take_over = TakeOver { issue, old: Some(Old::Stale("another".to_owned())) };
        let mut commands = Commands::default();
        take_over.send(&context().layout, now, &mut commands);
        assert_eq!((commands.count(), commands.name(6)), (7, "GET"), "after the lease");
        let done = || Ok(Value::Int(1));
        let holder = Serial::from([0x41; 16]);
        let replies = vec![
            done(),
            done(),
            done(),
            done(),
            text(&compact),
            Ok(Value::Nil),
            text(&holder.to_string()),
        ];
        let answer = end(take_over, replies);
        let told =
            matches!(&answer, Ok(Outcome::Issued { found, .. }) if found.holder == Some(holder));
        assert!(told, "{answer:?}");
    }

    /// A kill by another instance came between the look at the lease and the take-over.
    #[test]
    fn a_token_that_takes_a_lease_over_is_not_born_dead() {
        let (now, context) = (Now { unix_ms: 2000, mono_ms: 0 }, context());
        let key = MacKey::derive(b"of the CA");
        context.mac_key.set(key.clone()).unwrap();
        let device = DeviceId::parse("d").unwrap();
        let old = Signer::new(b"secret").sign(Claims {
            device_id: device.clone(),
            iat: 1,
            exp: 200,
            jti: None,
        });
        let receive = |row: Row| {
            let issue = Issue::new(attempt().token, &context, now);
            let compact = text(&issue.token.compact);
            let take_over = TakeOver { issue, old: Some(Old::Replaced(old.clone())) };
            let row = Value::BulkString(codec::seal(&key, &device, &row));
            let mut replies: Vec<Reply> = (0..6).map(|_| Ok(Value::Int(1))).collect();
            replies.extend([compact, Ok(row), Ok(Value::Nil)]);
            Box::new(take_over).receive(&context, replies)
        };
        let killed = Row { bound: Bound { t: 50, c: 50 }, ..Row::default() };
        let Next::Trip(again) = receive(killed.clone()) else { panic!("it was born dead") };
        let mut commands = Commands::default();
        again.send(&context.layout, now, &mut commands);
        let later = Issue::new(attempt().token, &context, now).dated(51, &context).token.compact;
        let row = Value::BulkString(codec::seal(&key, &device, &killed));
        let done = || Ok(Value::Int(1));
        let mut replies: Vec<Reply> = (0..5).map(|_| done()).collect();
        replies.extend([text(&later), done(), Ok(row), Ok(Value::Nil)]);
        let Next::Done(Ok(Outcome::Issued { token, killed, .. })) =
            again.receive(&context, replies)
        else {
            panic!("it is issued later")
        };
        assert_eq!((token.claims.iat, killed.map(|dead| dead.hash)), (51, Some(old.hash)));
        let blocked = Row { block: Block { blocked: 1, lifted: 0 }, ..Row::default() };
        let Next::Trip(removal) = receive(blocked) else { panic!("it is blocked") };
        let answer = removal.receive(&context, (0..3).map(|_| done()).collect());
        assert!(matches!(answer, Next::Done(Ok(Outcome::Blocked))));
    }

    /// Between the take-over and the look at the token another instance carried its mark over ours,
    /// and a third its copy of the token.
    #[test]
    fn a_taken_over_mark_must_still_be_ours_when_the_token_was_seen() {
        let take_over = || TakeMarkOver { attempt: attempt(), dead: "a 00".to_owned() };
        let ours = context().layout.mark(Mark::Serial(Serial::from([1; 16])));
        let there = || [Ok(Value::Int(1)), Ok(Value::Nil)];
        let replies = |taken, mark| {
            [Ok(Value::Int(taken))].into_iter().chain(there()).chain([text(mark)]).collect()
        };
        assert_eq!(end(take_over(), replies(1, &ours)), Ok(Outcome::Granted(Box::default())));
        assert_eq!(end(take_over(), replies(1, "b 02")), Ok(Outcome::AlreadyUsed));
        assert_eq!(end(take_over(), replies(0, "b 02")), Ok(Outcome::AlreadyUsed));
        let withdrawn =
            [Ok(Value::Int(0))].into_iter().chain(there()).chain([Ok(Value::Nil)]).collect();
        assert_eq!(end(take_over(), withdrawn), Err(StoreError::Undecided), "nobody used it");
        let mut commands = Commands::default();
        let now = Now { unix_ms: 1000, mono_ms: 0 };
        take_over().send(&context().layout, now, &mut commands);
        assert_eq!(commands.count(), 4);
        assert_eq!(commands.name(3), "GET", "the mark is read, last");
    }

    /// Memory was asked in its place, so the bound need not reach the token that is there.
    #[test]
    fn a_kill_without_a_look_at_redis_begins_with_one() {
        let now = Now { unix_ms: 1000, mono_ms: 0 };
        let begin = |by_redis| {
            let bound = crate::devices::Bound { t: 10, c: 0 };
            let row = crate::devices::Row { bound, ..Default::default() };
            let device = DeviceId::parse("d").unwrap();
            let kill = Kill { device, row, seen: Seen { by_redis, ..Seen::default() } };
            Killing::new(kill, Then::Kill, now).begin(&context())
        };
        let commands = |flow: &dyn Flow| {
            let mut commands = Commands::default();
            flow.send(&context().layout, now, &mut commands);
            (0..commands.count()).map(|n| commands.name(n).to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(commands(&*begin(false)), ["GET", "HGET"]);
        assert!(commands(&*begin(true)).is_empty(), "without a key no row is written");
        let leased = |iat| {
            let claims = Claims { iat, ..attempt().token.claims };
            let lease = text(&Signer::new(b"secret").sign(claims).compact);
            begin(false).receive(&context(), vec![lease, Ok(Value::Nil)])
        };
        let Next::Trip(kills) = leased(10) else { panic!("it is killed") };
        assert_eq!(commands(&*kills), ["SET", "DEL", "ZREM", "EVAL"]);
        assert!(matches!(leased(11), Next::Done(Err(StoreError::Undecided))));
    }
}
