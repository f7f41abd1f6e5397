//! The rows of devices in Redis, and how a device's past is killed there.
//!
//! ```text
//! Look ────── GET lease · HGET row ─▶ Seen
//! Raise ───── CAS row · then, in the same trip:
//!   │ Kill, Tell: SET mark killed · DEL token · ZREM live · CAD lease ─▶ Killed, Told
//!   │ Replace:    GET mark · PTTL mark      (of the leased token)
//!   │   │ it is being redeemed ─▶ AlreadyActive
//!   │   └ else ─▶ TakeOver (see `flow`)
//!   └ the row has changed ─▶ LookAgain ── as Look ─▶ Raise      (Tell begins here)
//! ```
//!
//! A row is merged, never overwritten: it is read, merged here, and set if it still stands as it was
//! read. A row that may not be read or written for lack of a right, or that none of our instances has
//! sealed, counts as absent: it is never why tokens are not served.

use redis::Value;

use super::command::Commands;
use super::flow::{Context, Flow, Issue, Next, Old, TakeOver, age_ms, push_kill};
use super::layout::Layout;
use super::reply::{Replies, Reply, is_denied};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::devices::{Bound, Row, codec};
use crate::jwt::{Token, TokenHash};
use crate::store::ledger::lasts_ms;
use crate::store::{Dead, Kill, Outcome, Seen, StoreError, Told};

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
                let row = row.unwrap_or_default();
                if let Some(rows) = self.rows.as_ref().filter(|_| row.bound.t > 0) {
                    rows.hear(device, row.bound);
                }
                Ok((row, value))
            }
            Err(error @ StoreError::Down(_)) if !is_denied(&error) => Err(error),
            _ => Ok(Default::default()),
        }
    }

    /// What is there of the device, by the replies to [`push_look`].
    fn seen(&self, device: &DeviceId, mut replies: Vec<Reply>) -> Result<Seen, StoreError> {
        let row = replies.pop().unwrap_or(Ok(Value::Nil));
        let lease = Replies::all_or_error(replies)?.text()?;
        let (row, value) = self.row_of(device, row)?;
        let leased = lease.map(|compact| Token {
            hash: TokenHash::of(&compact),
            claims: self.claims_of(&compact, device),
            compact: compact.into(),
        });
        let latest_iat = leased.as_ref().map(|token| token.claims.iat);
        Ok(Seen { row, value, leased, latest_iat, by_redis: true })
    }
}

fn push_look(device: &DeviceId, layout: &Layout, out: &mut Commands) {
    out.push(&layout.get_lease(device));
    out.push(&layout.get_row(device));
}

/// What is there of the device?
pub(super) struct LookOnce(pub DeviceId);

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
    Tell {
        /// See [`Told`].
        was_lost: bool,
    },
    Replace(Box<Issue>),
}

/// A kill under way.
pub(super) struct Killing {
    kill: Kill,
    then: Then,
    now: Now,
    tries: u8,
    /// The row stands, or did already.
    told: bool,
}

impl Killing {
    pub fn new(kill: Kill, then: Then, now: Now) -> Self {
        Killing { kill, then, now, tries: TRIES, told: true }
    }

    /// The trip that raises the bound; where Redis could not be asked before, it is asked first.
    pub fn begin(self, context: &Context) -> Box<dyn Flow> {
        match self.kill.seen.by_redis {
            true => Box::new(Raise::new(self, context)),
            false => Box::new(LookAgain(self)),
        }
    }

    /// The leased token, if the row says that it is dead.
    fn dead(&self) -> Option<&Token> {
        let t = self.kill.row.bound.t;
        self.kill.seen.leased.as_ref().filter(|token| token.claims.iat <= t)
    }

    /// The row stands; how was it with the leased token?
    fn raised(self, replies: Vec<Reply>) -> Result<Next, StoreError> {
        let replies = Replies::all_or_error(replies)?;
        let dead = self.dead().cloned();
        let Killing { kill, then, now, told, .. } = self;
        match then {
            Then::Replace(issue) => replaced(*issue, dead, now, replies),
            Then::Kill => Next::done(Outcome::Killed { dead: killed(dead, replies)?, told }),
            Then::Tell { was_lost } => {
                let told = Told { row: kill.row, dead: killed(dead, replies)?, was_lost };
                Next::done(Outcome::Told(Box::new(told)))
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
    let Some(old) = old else { return Next::trip(TakeOver { issue, old: None }) };
    let is_attempt = replies.text()?.is_some_and(|mark| !mark.ends_with(" killed"));
    let age = age_ms(lasts_ms(&old.claims, now), replies.number()?);
    if is_attempt && age < UNDER_WAY_MS {
        let expires_at_ms = old.claims.exp.saturating_mul(1000);
        return Next::done(Outcome::AlreadyActive { expires_at_ms });
    }
    Next::trip(TakeOver { issue, old: Some(Old::Replaced(old)) })
}

/// The leased token that has died, if it was live.
fn killed(dead: Option<Token>, mut replies: Replies) -> Result<Option<Dead>, StoreError> {
    let Some(Token { hash, claims, .. }) = dead else { return Ok(None) };
    replies.skip();
    Ok((replies.number()? == 1).then_some(Dead { hash, claims }))
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
        if let Then::Replace(_) = then {
            out.push(&layout.get_mark(&dead.hash));
            out.push(&layout.mark_left(&dead.hash));
        } else {
            push_kill(layout, out, dead, now);
            out.push(&layout.free_lease(&kill.device, &dead.compact));
        }
    }

    fn receive(self: Box<Self>, _: &Context, mut replies: Vec<Reply>) -> Next {
        let Raise { mut killing, news } = *self;
        let merged = match news {
            Some(_) => replies.drain(..1).next().map_or(Ok(true), |reply| {
                killing.told = !reply.as_ref().is_err_and(is_denied);
                stands(reply)
            }),
            None => Ok(true),
        };
        Next::of(merged.and_then(|merged| {
            if merged {
                return killing.raised(replies);
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

/// Another instance has changed the row meanwhile; or Redis was not asked yet.
pub(super) struct LookAgain(pub Killing);

impl Flow for LookAgain {
    fn send(&self, layout: &Layout, _: Now, out: &mut Commands) {
        push_look(&self.0.kill.device, layout, out);
    }

    fn receive(self: Box<Self>, context: &Context, replies: Vec<Reply>) -> Next {
        Next::of(context.seen(&self.0.kill.device, replies).and_then(|seen| {
            let mut killing = self.0;
            let Bound { t, .. } = killing.kill.row.bound;
            let is_told = matches!(killing.then, Then::Tell { .. });
            // The bound was raised without a look, and does not reach this token.
            if !killing.kill.seen.by_redis && !is_told && seen.latest_iat > Some(t) {
                return Err(StoreError::Undecided);
            }
            if let Then::Tell { was_lost } = &mut killing.then {
                *was_lost |=
                    t > seen.row.bound.t && killing.kill.row.bound.is_recent(killing.now.unix_s());
            }
            killing.kill.seen = seen;
            let raise = Raise::new(killing, context);
            if raise.news.is_none() && raise.killing.dead().is_none() {
                return raise.killing.raised(Vec::new());
            }
            Next::trip(raise)
        }))
    }
}
