//! The rows of devices in Redis, and how a device's past is killed there.
//!
//! ```text
//! Look ────── GET lease · GET the marks of the copies known here · HGET row ─▶ Seen
//! Raise ───── CAS row · then, in the same trip:
//!   │ Kill, Tell: GET, SET mark killed · DEL token · ZREM live · CAD lease ─▶ Killed, Told
//!   │ Replace:    GET mark · PTTL mark      (of the leased token)
//!   │   │ it is being redeemed ─▶ AlreadyActive
//!   │   └ else ─▶ Supplant (see `flow`)
//!   └ the row has changed ─▶ LookAgain ── as Look ─▶ Raise      (Tell begins here)
//! ```
//!
//! A row is merged, never overwritten: it is read, merged here, and set if it still stands as it was
//! read. A row that may not be read or written for lack of a right, or that none of our instances has
//! sealed, counts as absent: it is never why tokens are not served.

use redis::Value;

use super::command::Commands;
use super::flow::{Context, Flow, Issue, Next, Supplant, age_ms, push_kill};
use super::layout::Layout;
use super::reply::{Replies, Reply, is_denied};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::devices::{Row, codec};
use crate::jwt::{Token, TokenHash};
use crate::store::ledger::lasts_ms;
use crate::store::{Dead, Kill, Killed, Look, Outcome, Seen, StoreError};

/// How often a row is read again because others change it at the same time.
const TRIES: u8 = 2;
/// A redemption that has marked its token for so long will not be recorded any more.
const UNDER_WAY_MS: u64 = 30_000;

impl Context {
    /// The row in the reply to [`Layout::get_row`], and the value as it stands there.
    pub fn row_of(&self, device: &DeviceId, reply: Reply) -> Result<(Row, Vec<u8>), StoreError> {
        match reply {
            Ok(Value::BulkString(value)) => {
                let row = self.mac_key.get().and_then(|key| codec::open(key, device, &value));
                Ok((row.unwrap_or_default(), value))
            }
            Err(error @ StoreError::Down(_)) if !is_denied(&error) => Err(error),
            _ => Ok(Default::default()),
        }
    }

    /// What is there of the device, by the replies to [`push_look`].
    fn seen(&self, look: &Look, mut replies: Vec<Reply>) -> Result<Seen, StoreError> {
        let row = replies.pop().unwrap_or(Ok(Value::Nil));
        let mut replies = Replies::all_or_error(replies)?;
        let lease = replies.text()?;
        let mut redeemed_elsewhere = Vec::new();
        for copy in &look.copies {
            let mark = self.redeemed_elsewhere(replies.text()?);
            redeemed_elsewhere.extend(mark.map(|mark| (copy.clone(), mark)));
        }
        let (row, value) = self.row_of(&look.device, row)?;
        let leased = lease.map(|compact| Token {
            hash: TokenHash::of(&compact),
            claims: self.claims_of(&compact, &look.device),
            compact: compact.into(),
        });
        let latest_iat = leased.as_ref().map(|token| token.claims.iat);
        Ok(Seen { row, value, leased, latest_iat, redeemed_elsewhere })
    }

    /// The mark of another instance that has redeemed the token, or is about to.
    fn redeemed_elsewhere(&self, mark: Option<String>) -> Option<String> {
        mark.filter(|mark| self.layout.is_anothers_attempt(mark))
    }
}

fn push_look(look: &Look, layout: &Layout, out: &mut Commands) {
    out.push(&layout.get_lease(&look.device));
    look.copies.iter().for_each(|copy| out.push(&layout.get_mark(&copy.hash)));
    out.push(&layout.get_row(&look.device));
}

/// What is there of the device? And who has redeemed the tokens that are known here: their marks say
/// so for as long as nothing is written over them.
pub(super) struct LookOnce(pub Look);

impl Flow for LookOnce {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        push_look(&self.0, layout, out);
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        let seen = context.seen(&self.0, replies);
        Next::of(seen.and_then(|seen| Next::done(Outcome::Seen(Box::new(seen)))))
    }
}

/// What a raised bound is for.
pub(super) enum Then {
    Kill,
    Tell,
    Replace(Issue),
}

/// A kill under way.
pub(super) struct Killing {
    kill: Kill,
    then: Then,
    now: Now,
    tries: u8,
}

impl Killing {
    pub fn new(kill: Kill, then: Then, now: Now) -> Self {
        Killing { kill, then, now, tries: TRIES }
    }

    /// The trip that raises the bound, if that or anything else is to be done in Redis.
    pub fn raise(self, context: &Context) -> Box<dyn Flow> {
        Box::new(Raise::new(self, context))
    }

    /// The leased token, if the row says that it is dead.
    fn dead(&self) -> Option<&Token> {
        let t = self.kill.row.bound.t;
        self.kill.seen.leased.as_ref().filter(|token| token.claims.iat <= t)
    }

    /// The row stands; how was it with the leased token?
    fn raised(self, context: &Context, replies: Vec<Reply>) -> Result<Next, StoreError> {
        let replies = Replies::all_or_error(replies)?;
        let dead = self.dead().cloned();
        let Killing { kill, then, now, .. } = self;
        match then {
            Then::Replace(issue) => replaced(issue, dead, now, replies),
            Then::Kill => {
                let killed = killed(kill.seen, dead, replies, context)?;
                Next::done(Outcome::Killed(Box::new(killed)))
            }
            Then::Tell => {
                let killed = killed(kill.seen, dead, replies, context)?;
                Next::done(Outcome::Told(Box::new((kill.row, killed))))
            }
        }
    }
}

/// Replacing: the token that held the lease is on its way out, unless it is being redeemed.
fn replaced(
    issue: Issue,
    old: Option<Token>,
    now: Now,
    mut replies: Replies,
) -> Result<Next, StoreError> {
    let Some(old) = old else { return Next::trip(Supplant { issue, old: None }) };
    let is_attempt = replies.text()?.is_some_and(|mark| !mark.ends_with(" killed"));
    let age = age_ms(lasts_ms(&old.claims, now), replies.number()?);
    if is_attempt && age < UNDER_WAY_MS {
        let expires_at_ms = old.claims.exp.saturating_mul(1000);
        return Next::done(Outcome::AlreadyActive { expires_at_ms });
    }
    Next::trip(Supplant { issue, old: Some(old) })
}

/// What is known of a device's past now that it is dead.
fn killed(
    seen: Seen,
    dead: Option<Token>,
    mut replies: Replies,
    context: &Context,
) -> Result<Killed, StoreError> {
    let mut killed = Killed { redeemed_elsewhere: seen.redeemed_elsewhere, ..Killed::default() };
    let Some(Token { hash, claims, .. }) = dead else { return Ok(killed) };
    let dead = Dead { hash, claims };
    let noted = killed.redeemed_elsewhere.iter().any(|(noted, _)| noted.hash == dead.hash);
    if let Some(mark) = context.redeemed_elsewhere(replies.text()?).filter(|_| !noted) {
        killed.redeemed_elsewhere.push((dead.clone(), mark));
    }
    replies.skip();
    killed.dead = (replies.number()? == 1).then_some(dead);
    Ok(killed)
}

/// The row is merged into the one that was seen, and what it kills dies.
struct Raise {
    killing: Killing,
    /// The merged row as a value, if it says more than the one that was seen.
    news: Option<Vec<u8>>,
}

impl Raise {
    fn new(mut killing: Killing, context: &Context) -> Self {
        let Kill { device, row, seen } = &mut killing.kill;
        *row = std::mem::take(row).merge(seen.row.clone());
        let key = context.mac_key.get().filter(|_| *row != seen.row);
        let news = key.map(|key| codec::seal(key, device, row));
        Raise { killing, news }
    }
}

impl Flow for Raise {
    fn send(&self, layout: &Layout, now: Now, out: &mut Commands) {
        let Killing { kill, then, .. } = &self.killing;
        if let Some(news) = &self.news {
            out.push(&layout.merge_row(&kill.device, &kill.seen.value, news));
        }
        let Some(dead) = self.killing.dead() else { return };
        out.push(&layout.get_mark(&dead.hash));
        if let Then::Replace(_) = then {
            out.push(&layout.mark_left(&dead.hash));
        } else {
            push_kill(layout, out, dead, now);
            out.push(&layout.free_lease(&kill.device, &dead.compact));
        }
    }

    fn receive(self: Box<Self>, context: &Context, mut replies: Vec<Reply>) -> Next {
        let Raise { mut killing, news } = *self;
        let merged = match news {
            Some(_) => replies.drain(..1).next().map_or(Ok(true), stands),
            None => Ok(true),
        };
        Next::of(merged.and_then(|merged| {
            if merged {
                return killing.raised(context, replies);
            }
            killing.tries = killing.tries.checked_sub(1).ok_or(StoreError::Undecided)?;
            Next::trip(LookAgain(killing))
        }))
    }
}

/// Whether the merged row stands, or cannot for lack of a right, by the reply to
/// [`Layout::merge_row`].
fn stands(reply: Reply) -> Result<bool, StoreError> {
    match reply {
        Err(error @ StoreError::Down(_)) if !is_denied(&error) => Err(error),
        Ok(Value::Int(0)) => Ok(false),
        _ => Ok(true),
    }
}

/// Another instance has changed the row meanwhile; or, with a carry-over, it was not looked at yet.
pub(super) struct LookAgain(pub Killing);

impl LookAgain {
    /// Who has redeemed the copies was seen the first time.
    fn look(&self) -> Look {
        Look { device: self.0.kill.device.clone(), copies: Vec::new() }
    }
}

impl Flow for LookAgain {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        push_look(&self.look(), layout, out);
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(context.seen(&self.look(), replies).and_then(|seen| {
            let mut killing = self.0;
            let before = std::mem::take(&mut killing.kill.seen.redeemed_elsewhere);
            killing.kill.seen = Seen { redeemed_elsewhere: before, ..seen };
            let raise = Raise::new(killing, context);
            if raise.news.is_none() && raise.killing.dead().is_none() {
                return raise.killing.raised(context, Vec::new());
            }
            Next::trip(raise)
        }))
    }
}
