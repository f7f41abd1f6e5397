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
//! Issue ──── SET token · SET lease NX · GET lease · ZADD live
//!   │ ours ───────────▶ Issued
//!   └ another's ─▶ Contest ── DEL token · ZREM live · EXISTS other · GET, PTTL its mark · PTTL lease
//!       │ it is alive ─▶ AlreadyActive
//!       └ it is stale ─▶ TakeOver ── SET token · ZADD live · CAS lease · SET lease NX · GET lease
//!           │ ours ───────▶ Issued
//!           └ another's ──▶ Yield ── DEL token · ZREM live ─▶ AlreadyActive
//!
//! Replace ── SET token · ZADD live · SET lease NX · GET lease
//!   │ ours ───────────▶ Issued
//!   └ another's ─▶ Supplant ── CAS lease · SET lease NX · GET lease     (again, if it has changed)
//!       │ ours ───────▶ KillOld ── SET its mark killed · DEL its token · ZREM live ─▶ Issued
//!       └ another's ──▶ Yield ── DEL token · ZREM live ─▶ AlreadyActive
//!
//! Consume ── SET mark NX · EXISTS token · GET mark
//!   │ ours, the token is there ─▶ Granted
//!   │ ours, it is not ─▶ Missing ── CAD mark · INFO ─▶ Unknown
//!   │ of a dead attempt of this instance ─▶ TakeMarkOver ── CAS mark · EXISTS token · GET mark
//!   │                                         └─▶ as above
//!   └ another's ─▶ AlreadyUsed
//!
//! Kill ───── GET lease · GET the marks of the copies known here
//!   │ none leased ────▶ Killed
//!   └ a token ────▶ KillLeased ── GET, SET its mark killed · DEL token · ZREM live · CAD lease ─▶ Killed
//! GiveBack ─ CAD mark
//! Finish ─── CAD lease · DEL token · ZREM live      (TakeBack too)
//! Mark ───── GET mark · SET mark · ZREM live · GET lease · DEL token     (then Finish, if leased)
//! Carry ──── SET token · GET mark ─▶ unmarked ── ZADD live · SET lease NX
//! Count ──── ZCOUNT live · TIME
//! Prune ──── ZREM live · ZRANGEBYSCORE live     (with every some issues)
//! ```

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::command::Commands;
use super::layout::Layout;
use super::reply::{Info, Replies, Reply, maybe_done};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::{Claims, MAX_LIFETIME_S, Signer, Token, TokenHash};
use crate::serial::Serial;
use crate::store::ledger::lasts_ms;
use crate::store::{Answer, Dead, Kill, Killed, Mark, New, Op, Outcome, StoreError, locked};

/// A lease whose token has been marked for this long is not waited for.
const MARKED_LONG_MS: u64 = 30_000;
/// How often a replacement tries to take over a lease that others keep changing.
const REPLACE_TRIES: u8 = 3;
/// Entries of the set of live tokens are kept this long after their end.
const PRUNE_AFTER_MS: u64 = 3_600_000;

/// What a flow knows besides its own operation.
#[derive(Debug)]
pub(super) struct Context {
    pub layout: Layout,
    pub signer: Signer,
    /// `REDIS_TIMEOUT_MS`: an issue that is still under way is not older than twice this.
    pub patience_ms: u64,
    pub clock: RedisClock,
    /// Members of the set of live tokens that have ended long ago and are removed next.
    pub ended: Mutex<Vec<String>>,
}

/// The clock that all instances share, for the set of live tokens: by a clock of ours that is wrong,
/// tokens would be counted that have ended, or not counted although they live.
#[derive(Debug, Default)]
pub(super) struct RedisClock {
    /// How far it is ahead of [`Now::mono_ms`]; measured with each greeting and each count.
    ahead_ms: AtomicU64,
}

impl RedisClock {
    /// Milliseconds since 1970.
    pub fn at(&self, now: Now) -> u64 {
        self.ahead_ms.load(Ordering::Relaxed).saturating_add(now.mono_ms)
    }

    pub fn set(&self, time_ms: u64, now: Now) {
        self.ahead_ms.store(time_ms.saturating_sub(now.mono_ms), Ordering::Relaxed);
    }
}

impl Context {
    pub fn new(layout: Layout, signer: Signer, patience_ms: u64) -> Self {
        let (clock, ended) = (RedisClock::default(), Mutex::default());
        Context { layout, signer, patience_ms, clock, ended }
    }

    /// The claims of a token found in Redis; of one that is not ours, the little that is known.
    fn claims_of(&self, compact: &str, device: &DeviceId) -> Claims {
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

    /// Reads its replies, one for each command.
    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next;

    /// The token that this trip replaces: it must die even if the trip fails.
    fn dying(&self, _: &Context) -> Option<Box<Dead>> {
        None
    }
}

/// What comes after a round trip.
pub(super) enum Next {
    Trip(Box<dyn Flow>),
    Done(Answer),
}

impl Next {
    fn trip(flow: impl Flow + 'static) -> Result<Next, StoreError> {
        Ok(Next::Trip(Box::new(flow)))
    }

    fn done(outcome: Outcome) -> Result<Next, StoreError> {
        Ok(Next::Done(Ok(outcome)))
    }

    fn of(result: Result<Next, StoreError>) -> Next {
        result.unwrap_or_else(|error| Next::Done(Err(error)))
    }
}

/// The first trip of an operation.
pub(super) fn of(op: &Op, context: &Context, now: Now) -> Box<dyn Flow> {
    match op {
        Op::Issue(New { token, replaces, .. }) => {
            let issue = Issue::new(token.clone(), context, now);
            if *replaces { Box::new(Replace(issue)) } else { Box::new(issue) }
        }
        Op::TakeBack(token) | Op::Finish(token) => {
            Box::new(Remove { token: token.clone(), then: Outcome::Done })
        }
        Op::Consume(token, serial) => Box::new(Consume { token: token.clone(), serial: *serial }),
        Op::GiveBack(token, serial) => Box::new(Withdraw { hash: token.hash, serial: *serial }),
        Op::Kill(kill) => Box::new(FindLease(kill.clone())),
        Op::Count => Box::new(Count { now, by_redis_ms: context.clock.at(now) }),
        Op::Mark(hash, mark, claims) => {
            Box::new(Enter::new(*hash, *mark, claims.clone(), &context.signer))
        }
        Op::Carry(token, left_ms) => {
            let left_ms = (*left_ms).max(1);
            let ends_ms = context.clock.at(now).saturating_add(left_ms);
            Box::new(Carry { token: token.clone(), left_ms, ends_ms })
        }
    }
}

/// Issuing, first trip: token, lease if it is free, and then whose the lease is.
#[derive(Clone)]
struct Issue {
    token: Token,
    left_ms: u64,
    /// By the clock of Redis.
    ends_ms: u64,
    now: Now,
}

impl Issue {
    fn new(token: Token, context: &Context, now: Now) -> Self {
        let left_ms = token.claims.exp.saturating_mul(1000).saturating_sub(now.unix_ms).max(1);
        let ends_ms = context.clock.at(now).saturating_add(left_ms);
        Issue { token, left_ms, ends_ms, now }
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
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            replies.skip();
            replies.skip();
            match replies.text()? {
                Some(holder) if *holder == *self.token.compact => {
                    Next::done(Outcome::Issued { instead: None, killed: None })
                }
                // An older lease ended between the two commands, just now.
                None => Next::trip(*self),
                Some(other) => Next::trip(Contest { issue: *self, other }),
            }
        }))
    }
}

/// Issuing, second trip: another token holds the lease. Ours is taken back; is the other one alive?
struct Contest {
    issue: Issue,
    other: String,
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
            let marked = replies.text()?.is_some();
            let mark_left = replies.number()?;
            let lease_left = replies.number()?;
            let claims = context.claims_of(&self.other, &self.issue.token.claims.device_id);
            // A clock was set: a lease may outlive its token.
            let verified = context.signer.verify_signature(&self.other);
            let ended =
                verified.is_ok_and(|c| c.exp.saturating_mul(1000) <= self.issue.now.unix_ms);
            let age = age_ms(claims.lifetime_s() * 1000, lease_left);
            let whole = lasts_ms(&claims, self.issue.now);
            let marked_long = marked && age_ms(whole, mark_left) > MARKED_LONG_MS;
            let stale = ended || age > 2 * context.patience_ms && (gone || marked_long);
            if !stale {
                let outcome = self.issue.already_active(context, &self.other, lease_left);
                return Next::done(outcome);
            }
            Next::trip(TakeOver { issue: self.issue, stale: self.other })
        }))
    }
}

/// How old a key is that was set to live for `whole` and has `left` (a reply of `PTTL`). One that is
/// gone or never ends is as old as can be.
fn age_ms(whole: u64, left: i64) -> u64 {
    u64::try_from(left).map_or(u64::MAX, |left| whole.saturating_sub(left))
}

/// Issuing, third trip: the lease is stale and is taken over, unless another was faster (`docs/model`,
/// row 2).
struct TakeOver {
    issue: Issue,
    stale: String,
}

impl Flow for TakeOver {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        let Issue { token, left_ms, ends_ms, .. } = &self.issue;
        out.push(&layout.set_token(token, *left_ms));
        out.push(&layout.add_live(&token.hash, *ends_ms));
        out.push(&layout.take_lease_over(&self.stale, token, *left_ms));
        out.push(&layout.lease_if_free(token, *left_ms));
        out.push(&layout.get_lease(&token.claims.device_id));
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            (0..4).for_each(|_| replies.skip());
            match replies.text()? {
                Some(holder) if *holder == *self.issue.token.compact => {
                    Next::done(Outcome::Issued { instead: None, killed: None })
                }
                holder => Next::trip(Yield { issue: self.issue, holder }),
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

/// Replacing, first trip: the new token stands before the lease names it.
struct Replace(Issue);

impl Flow for Replace {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.set_token(&self.0.token, self.0.left_ms));
        out.push(&layout.add_live(&self.0.token.hash, self.0.ends_ms));
        out.push(&layout.lease_if_free(&self.0.token, self.0.left_ms));
        out.push(&layout.get_lease(&self.0.token.claims.device_id));
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            (0..3).for_each(|_| replies.skip());
            match replies.text()? {
                Some(holder) if *holder == *self.0.token.compact => {
                    Next::done(Outcome::Issued { instead: None, killed: None })
                }
                None => Next::trip(*self),
                Some(old) => Next::trip(Supplant { issue: self.0, old, tries: REPLACE_TRIES }),
            }
        }))
    }
}

/// Replacing, second trip: take the lease over from the token that holds it.
struct Supplant {
    issue: Issue,
    old: String,
    tries: u8,
}

impl Flow for Supplant {
    fn dying(&self, context: &Context) -> Option<Box<Dead>> {
        let claims = context.claims_of(&self.old, &self.issue.token.claims.device_id);
        Some(Box::new(Dead { hash: TokenHash::of(&self.old), claims }))
    }

    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        let Issue { token, left_ms, .. } = &self.issue;
        out.push(&layout.take_lease_over(&self.old, token, *left_ms));
        out.push(&layout.lease_if_free(token, *left_ms));
        out.push(&layout.get_lease(&token.claims.device_id));
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            let taken = replies.number()? == 1;
            replies.skip();
            let holder = replies.text()?;
            let Supplant { issue, old, tries } = *self;
            if taken || holder.as_deref() == Some(&issue.token.compact) {
                let claims = context.claims_of(&old, &issue.token.claims.device_id);
                return Next::trip(KillOld { old, claims });
            }
            match holder {
                Some(old) if tries > 1 => Next::trip(Supplant { issue, old, tries: tries - 1 }),
                holder => Next::trip(Yield { issue, holder }),
            }
        }))
    }
}

/// Replacing, third trip: the old token dies, and never without a mark.
struct KillOld {
    old: String,
    claims: Claims,
}

impl Flow for KillOld {
    fn dying(&self, _: &Context) -> Option<Box<Dead>> {
        Some(Box::new(Dead { hash: TokenHash::of(&self.old), claims: self.claims.clone() }))
    }

    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        push_kill(layout, now, out, &self.old, &self.claims);
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        let killed = Dead { hash: TokenHash::of(&self.old), claims: self.claims };
        Next::of(
            Replies::all_or_error(replies)
                .and_then(|_| Next::done(Outcome::Issued { instead: None, killed: Some(killed) })),
        )
    }
}

/// Mark first: an instance that holds a copy might carry the token over (`docs/model`, row 1).
fn push_kill(layout: &Layout, now: Now, out: &mut Commands, compact: &str, claims: &Claims) {
    let hash = TokenHash::of(compact);
    out.push(&layout.set_mark(&hash, &layout.mark(Mark::Killed), lasts_ms(claims, now)));
    out.push(&layout.delete_token(compact));
    out.push(&layout.remove_live(&hash));
}

/// Killing, first trip: which token holds the lease? And who has redeemed those that are known here:
/// their marks say so for as long as nothing is written over them.
struct FindLease(Kill);

impl Flow for FindLease {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.get_lease(&self.0.device));
        self.0.copies.iter().for_each(|copy| out.push(&layout.get_mark(&copy.hash)));
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            let lease = replies.text()?;
            let mut killed = Killed::default();
            for copy in &self.0.copies {
                note_redeemed(&mut killed, copy, replies.text()?, context);
            }
            let leased = lease.map(|compact| {
                let claims = context.claims_of(&compact, &self.0.device);
                (Dead { hash: TokenHash::of(&compact), claims }, compact)
            });
            match leased {
                Some((token, compact))
                    if self.0.spare != Some(token.hash)
                        && token.claims.iat <= self.0.issued_by_s =>
                {
                    Next::trip(KillLeased { device: self.0.device, token, compact, killed })
                }
                _ => Next::done(Outcome::Killed(Box::new(killed))),
            }
        }))
    }
}

fn note_redeemed(killed: &mut Killed, token: &Dead, mark: Option<String>, context: &Context) {
    let mark = mark.filter(|mark| context.layout.is_anothers_attempt(mark));
    let noted = killed.redeemed_elsewhere.iter().any(|(noted, _)| noted.hash == token.hash);
    if let Some(mark) = mark.filter(|_| !noted) {
        killed.redeemed_elsewhere.push((token.clone(), mark));
    }
}

/// Killing, second trip: the token dies, then the lease is freed. Who had redeemed it is read first.
struct KillLeased {
    device: DeviceId,
    token: Dead,
    compact: String,
    killed: Killed,
}

impl Flow for KillLeased {
    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        out.push(&layout.get_mark(&self.token.hash));
        push_kill(layout, now, out, &self.compact, &self.token.claims);
        out.push(&layout.free_lease(&self.device, &self.compact));
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            let KillLeased { token, mut killed, .. } = *self;
            note_redeemed(&mut killed, &token, replies.text()?, context);
            replies.skip();
            let was_live = replies.number()? == 1;
            killed.dead = was_live.then_some(token);
            Next::done(Outcome::Killed(Box::new(killed)))
        }))
    }
}

/// Consuming, first trip: our mark if there is none, the token, and then whose the mark is
/// (`docs/model`, row 20b).
struct Consume {
    token: Token,
    serial: Serial,
}

impl Flow for Consume {
    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        let Token { compact, hash, claims } = &self.token;
        let mark = layout.mark(Mark::Serial(self.serial));
        out.push(&layout.mark_if_free(hash, &mark, lasts_ms(claims, now)));
        out.push(&layout.exists_token(compact));
        out.push(&layout.get_mark(hash));
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(marked_or_not(replies).and_then(|mut replies| {
            replies.skip();
            let there = replies.number()? == 1;
            let Some(mark) = replies.text()? else { return Err(StoreError::Undecided) };
            if mark == context.layout.mark(Mark::Serial(self.serial)) {
                return self.marked(there);
            }
            if context.layout.is_own_attempt(&mark) {
                return Next::trip(TakeMarkOver { attempt: *self, dead: mark });
            }
            Next::done(Outcome::AlreadyUsed)
        }))
    }
}

impl Consume {
    /// Our mark stands. Without the token it is withdrawn: an instance that still has to carry the
    /// token over would find it burnt.
    fn marked(self, there: bool) -> Result<Next, StoreError> {
        if there {
            return Next::done(Outcome::Granted);
        }
        Next::trip(Missing { hash: self.token.hash, serial: self.serial })
    }
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

/// The replies; or the error, and whether our mark may stand although there was one.
fn marked_or_not(replies: Vec<Reply>) -> Result<Replies, StoreError> {
    let maybe_marked = replies.first().is_some_and(Result::is_ok);
    Replies::all_or_error(replies).map_err(|error| maybe_done(error, maybe_marked))
}

/// Consuming, second trip: the mark is of an older attempt of this instance, of which no certificate
/// came and which no longer runs (both known to the caller): it is dead and taken over (`docs/model`,
/// row 5, row 21).
struct TakeMarkOver {
    attempt: Consume,
    dead: String,
}

impl Flow for TakeMarkOver {
    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        let Token { compact, hash, claims } = &self.attempt.token;
        let mark = layout.mark(Mark::Serial(self.attempt.serial));
        out.push(&layout.take_mark_over(hash, &self.dead, &mark, lasts_ms(claims, now)));
        out.push(&layout.exists_token(compact));
        out.push(&layout.get_mark(hash));
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(marked_or_not(replies).and_then(|mut replies| {
            replies.skip();
            let there = replies.number()? == 1;
            match replies.text()? {
                Some(mark) if mark == context.layout.mark(Mark::Serial(self.attempt.serial)) => {
                    self.attempt.marked(there)
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
}

impl Flow for Withdraw {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        out.push(&layout.withdraw_mark(&self.hash, &layout.mark(Mark::Serial(self.serial))));
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        // A refusal leaves the mark where it is.
        let withdrawn = Replies::new(replies).number().map_err(|error| maybe_done(error, true));
        Next::of(withdrawn.and_then(|_| Next::done(Outcome::Done)))
    }
}

/// The token is used up, or was never handed out: lease, token and count go.
struct Remove {
    token: Token,
    then: Outcome,
}

impl Flow for Remove {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        let Token { compact, hash, claims } = &self.token;
        out.push(&layout.free_lease(&claims.device_id, compact));
        out.push(&layout.delete_token(compact));
        out.push(&layout.remove_live(hash));
    }

    fn receive(self: Box<Self>, _: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|_| Next::done(self.then)))
    }
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

/// Carry-over of what is known here as used or killed: who has marked it meanwhile, then our mark
/// without `NX` (a foreign one may be tentative and withdrawn), then the token goes (`docs/model`,
/// row 20).
struct Enter {
    hash: TokenHash,
    mark: Mark,
    claims: Claims,
    /// The token itself, where it can be made again. Of one that an earlier run of this instance
    /// redeemed, only hash and times are known; the lease may still show it whole.
    token: Option<Token>,
}

impl Enter {
    fn new(hash: TokenHash, mark: Mark, claims: Claims, signer: &Signer) -> Self {
        let token = Some(signer.sign(claims.clone())).filter(|token| token.hash == hash);
        Enter { hash, mark, claims, token }
    }
}

impl Flow for Enter {
    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        out.push(&layout.get_mark(&self.hash));
        out.push(&layout.set_mark(
            &self.hash,
            &layout.mark(self.mark),
            lasts_ms(&self.claims, now),
        ));
        out.push(&layout.remove_live(&self.hash));
        out.push(&layout.get_lease(&self.claims.device_id));
        if let Some(token) = &self.token {
            out.push(&layout.delete_token(&token.compact));
        }
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(Replies::all_or_error(replies).and_then(|mut replies| {
            let other = replies.text()?.filter(|mark| context.layout.is_anothers_attempt(mark));
            let marked = Outcome::Marked { ours: context.layout.mark(self.mark), other };
            replies.skip();
            replies.skip();
            match replies.text()?.filter(|lease| TokenHash::of(lease) == self.hash) {
                Some(compact) => {
                    let token =
                        Token { compact: compact.into(), hash: self.hash, claims: self.claims };
                    Next::trip(Remove { token, then: marked })
                }
                None => Next::done(marked),
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
    use redis::Value;

    fn context() -> Context {
        Context::new(
            Layout { prefix: String::new(), instance: "a".to_owned() },
            Signer::new(b"secret"),
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

    /// Between the take-over and the look at the token another instance carried its mark over ours,
    /// and a third its copy of the token.
    #[test]
    fn a_taken_over_mark_must_still_be_ours_when_the_token_was_seen() {
        let take_over = || TakeMarkOver { attempt: attempt(), dead: "a 00".to_owned() };
        let ours = context().layout.mark(Mark::Serial(Serial::from([1; 16])));
        let replies = |taken, mark| vec![Ok(Value::Int(taken)), Ok(Value::Int(1)), text(mark)];
        assert_eq!(end(take_over(), replies(1, &ours)), Ok(Outcome::Granted));
        assert_eq!(end(take_over(), replies(1, "b 02")), Ok(Outcome::AlreadyUsed));
        assert_eq!(end(take_over(), replies(0, "b 02")), Ok(Outcome::AlreadyUsed));
        let withdrawn = vec![Ok(Value::Int(0)), Ok(Value::Int(1)), Ok(Value::Nil)];
        assert_eq!(end(take_over(), withdrawn), Err(StoreError::Undecided), "nobody used it");
        let mut commands = Commands::default();
        let now = Now { unix_ms: 1000, mono_ms: 0 };
        take_over().send(&context().layout, now, &mut commands);
        assert_eq!(commands.count(), 3, "the mark is read, last");
    }
}
