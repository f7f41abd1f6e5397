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
use super::flow::{Context, Next};
use super::issue::{Issue, Old, age_ms, ask_kill};
use super::layout::Key;
use super::reply::{Replies, Reply, is_denied};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::devices::{Row, codec};
use crate::jwt::{Token, TokenHash};
use crate::store::ledger::lasts_ms;
use crate::store::{Dead, Kill, Outcome, Seen, StoreError, Told};

/// How often a row is read again because others change it at the same time.
const TRIES: u8 = 2;
/// A redemption that has marked its token for so long will not be recorded any more.
const UNDER_WAY_MS: u64 = 30_000;

impl Context {
    /// The row in the reply to [`Layout::get_row`](super::layout::Layout::get_row), and the value as it
    /// stands there.
    pub fn row_of(&self, device: &DeviceId, reply: Reply) -> Result<(Row, Vec<u8>), StoreError> {
        match reply.0 {
            Ok(Value::BulkString(value)) => {
                let opened = self.mac_key.get().map(|key| codec::open(key, device, &value));
                match (&self.rows, &opened) {
                    (Some(rows), Some(None)) => rows.doubt(device),
                    (Some(rows), Some(Some(row))) if row.bound.t > 0 => {
                        rows.hear(device, row.bound)
                    }
                    _ => {}
                }
                Ok((opened.flatten().unwrap_or_default(), value))
            }
            Err(error @ StoreError::Down(_)) if !is_denied(&error) => Err(error),
            _ => Ok(Default::default()),
        }
    }
}

/// What is there of the device?
pub(super) fn look(
    device: DeviceId,
    context: &Context,
    then: impl FnOnce(Seen, &Context) -> Result<Next, StoreError> + 'static,
) -> Next {
    let mut commands = Commands::default();
    let lease = commands.ask(context.layout.on("GET", Key::Lease(&device)));
    let row = commands.try_ask(context.layout.get_row(&device));
    Next::trip(commands, move |context, mut replies| {
        let lease = replies.take(lease).text()?;
        let (row, value) = context.row_of(&device, replies.take(row))?;
        let leased = lease.map(|compact| Token {
            hash: TokenHash::of(&compact),
            claims: context.claims_of(&compact, &device),
            compact: compact.into(),
        });
        let latest_iat = leased.as_ref().map(|token| token.claims.iat);
        then(Seen { row, value, leased, latest_iat, by_redis: true }, context)
    })
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
    pub fn new(kill: &Kill, then: Then, now: Now) -> Self {
        Killing { kill: kill.clone(), then, now, tries: TRIES, told: true }
    }

    /// The trip that raises the bound; where Redis could not be asked before, it is asked first.
    pub fn begin(self, context: &Context) -> Next {
        match self.kill.seen.by_redis {
            true => self.raise(context),
            false => self.look_again(context),
        }
    }

    /// The row is merged into the one that was seen, and what it kills dies.
    fn raise(mut self, context: &Context) -> Next {
        let (layout, mut commands) = (&context.layout, Commands::default());
        let Kill { device, row, seen } = &mut self.kill;
        *row = std::mem::take(row).merge(seen.row.clone());
        let key = context.mac_key.get().filter(|_| *row != seen.row);
        let merged = key.map(|key| {
            let news = codec::seal(key, device, row);
            let (key, field) = (codec::bucket(device), device.as_str());
            commands.try_ask(layout.compare_and_set_field(&key, field, &seen.value, &news))
        });
        // Looked at before the bound is raised, a redemption may come between (`docs/model`, row 29b).
        commands.then();
        let t = row.bound.t;
        let dead = seen.leased.clone().filter(|token| token.claims.iat <= t);
        let then = dead.map(|dead| self.ask_about(&mut commands, dead, context));
        let read = move |context: &Context, mut replies: Replies| {
            if let Some(merged) = merged {
                let reply = replies.take(merged);
                self.told = reply.error().is_none();
                if !stands(reply)? {
                    self.tries = self.tries.checked_sub(1).ok_or(StoreError::Undecided)?;
                    return Ok(self.look_again(context));
                }
            }
            let old = then.map(|then| then(&mut replies)).transpose()?;
            self.raised(old, context)
        };
        match commands.is_empty() {
            true => read(context, Replies::default()).unwrap_or_else(|e| Next::Done(Err(e))),
            false => Next::trip(commands, read),
        }
    }

    /// What is asked of the leased token, which the row says is dead: whether it is being redeemed, if
    /// it is to be replaced; else it dies.
    fn ask_about(
        &self,
        out: &mut Commands,
        dead: Token,
        context: &Context,
    ) -> impl FnOnce(&mut Replies) -> Result<(Token, Was), StoreError> + use<> {
        let layout = &context.layout;
        let now = self.now;
        let is_replaced = matches!(self.then, Then::Replace(_));
        let asked = if is_replaced {
            let mark = Key::Mark(&self.kill.device, &dead.hash);
            ["GET", "PTTL"].map(|command| out.ask(layout.on(command, mark)))
        } else {
            let gone = ask_kill(out, layout, &dead, now);
            let lease = Key::Lease(&self.kill.device);
            [gone, out.ask(layout.compare_and_delete(lease, &dead.compact))]
        };
        move |replies| {
            let [first, second] = asked.map(|ask| replies.take(ask));
            if !is_replaced {
                let was = if first.number()? == 1 { Was::Live } else { Was::Gone };
                return Ok((dead, was));
            }
            let is_attempt = first.text()?.is_some_and(|mark| !mark.ends_with(" killed"));
            let age = age_ms(lasts_ms(&dead.claims, now), second.number()?);
            let is_under_way = is_attempt && age < UNDER_WAY_MS;
            Ok((dead, if is_under_way { Was::UnderWay } else { Was::Live }))
        }
    }

    /// The row stands; how was it with the leased token?
    fn raised(self, old: Option<(Token, Was)>, context: &Context) -> Result<Next, StoreError> {
        let Killing { kill, then, told, .. } = self;
        let dead = |old: Option<(Token, Was)>| {
            old.filter(|(_, was)| *was == Was::Live).map(|(token, _)| Dead::of(&token))
        };
        match (then, old) {
            (Then::Replace(_), Some((old, Was::UnderWay))) => {
                let expires_at_ms = old.claims.exp.saturating_mul(1000);
                Next::done(Outcome::AlreadyActive { expires_at_ms })
            }
            (Then::Replace(issue), old) => {
                let old = old.map(|(token, _)| Old::Replaced(token));
                Ok(issue.take_over(old, context))
            }
            (Then::Kill, old) => Next::done(Outcome::Killed { dead: dead(old), told }),
            (Then::Tell { was_lost }, old) => {
                let told = Told { row: kill.row, dead: dead(old), was_lost };
                Next::done(Outcome::Told(Box::new(told)))
            }
        }
    }

    /// Another instance has changed the row meanwhile; or Redis was not asked yet.
    fn look_again(mut self, context: &Context) -> Next {
        look(self.kill.device.clone(), context, move |seen, context| {
            let t = self.kill.row.bound.t;
            let is_first_look = !self.kill.seen.by_redis;
            match &mut self.then {
                Then::Tell { was_lost } => {
                    let is_recent = self.kill.row.bound.is_recent(self.now.unix_s());
                    *was_lost |= t > seen.row.bound.t && is_recent;
                }
                // The bound was raised without a look, and does not reach this token.
                _ if is_first_look && seen.latest_iat > Some(t) => {
                    return Err(StoreError::Undecided);
                }
                _ => {}
            }
            self.kill.seen = seen;
            Ok(self.raise(context))
        })
    }
}

/// How it was with a leased token that is to die.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Was {
    Live,
    Gone,
    /// It is being redeemed.
    UnderWay,
}

/// Whether the merged row stands, or cannot for lack of a right, by the reply.
fn stands(reply: Reply) -> Result<bool, StoreError> {
    match reply.0 {
        Err(error @ StoreError::Down(_)) if !is_denied(&error) => Err(error),
        Ok(Value::Int(0)) => Ok(false),
        _ => Ok(true),
    }
}
