//! Issuing and replacing: a token, the lease of its device, and what to do with another that holds it.
//! The trips are drawn in `flow`.

use super::command::{Ask, Commands};
use super::flow::{Context, Next, ask_removal, remove};
use super::layout::{Key, Layout};
use super::reply::Replies;
use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::{Token, TokenHash};
use crate::serial::Serial;
use crate::store::ledger::lasts_ms;
use crate::store::{Dead, Found, Mark, Outcome, StoreError, dated};

/// A lease whose token has been marked for this long is not waited for.
const MARKED_LONG_MS: u64 = 30_000;

/// A token that is being issued.
pub(super) struct Issue {
    pub token: Token,
    left_ms: u64,
    /// By the clock of Redis.
    ends_ms: u64,
    now: Now,
    /// The token that gave way to it.
    killed: Option<Dead>,
}

/// A token that gives way to another.
pub(super) enum Old {
    /// It has ended, in one way or another.
    Stale(String),
    Replaced(Token),
}

impl Issue {
    pub fn new(token: Token, context: &Context, now: Now) -> Self {
        let left_ms = token.claims.exp.saturating_mul(1000).saturating_sub(now.unix_ms).max(1);
        let ends_ms = context.clock.at(now).saturating_add(left_ms);
        Issue { token, left_ms, ends_ms, now, killed: None }
    }

    pub fn begin(self, context: &Context) -> Next {
        self.after(Commands::default(), context)
    }

    /// Token, lease if it is free, and then whose the lease is; after other commands of the same trip.
    fn after(self, mut commands: Commands, context: &Context) -> Next {
        let layout = &context.layout;
        commands.ask(layout.set_token(&self.token, self.left_ms));
        commands.ask(layout.lease_if_free(&self.token, self.left_ms));
        let lease = commands.ask(layout.on("GET", Key::Lease(&self.token.claims.device_id)));
        commands.ask_in_reach(layout.add_live(&self.token.hash, self.ends_ms));
        let found = ask_found(&mut commands, layout, &self.token.claims.device_id);
        Next::trip(commands, move |context, mut replies| {
            let found = found(context, &mut replies)?;
            if self.is_refused_by(&found) {
                return Ok(self.refused_by(&found, context));
            }
            match replies.take(lease).text()? {
                Some(leased) if *leased == *self.token.compact => self.issued(found),
                // An older lease ended between the two commands, just now.
                None => Ok(self.begin(context)),
                Some(other) => Ok(self.contest(other, found.row.bound.t, context)),
            }
        })
    }

    fn issued(self, found: Found) -> Result<Next, StoreError> {
        let Issue { token, killed, .. } = self;
        Next::done(Outcome::Issued { token, killed, found: Box::new(found) })
    }

    /// By the row the device is blocked, or its past was killed by an instance whose word did not reach
    /// us, and the token was born dead.
    fn is_refused_by(&self, Found { row, .. }: &Found) -> bool {
        row.block.stands() || self.token.claims.iat <= row.bound.t
    }

    /// A token that was born dead is taken back, and one is issued that is not.
    fn refused_by(self, Found { row, .. }: &Found, context: &Context) -> Next {
        if row.block.stands() {
            return remove(&self.token, Outcome::Blocked, context);
        }
        let mut commands = Commands::default();
        ask_removal(&mut commands, &context.layout, &self.token);
        let later = dated(&self.token, row.bound.t.saturating_add(1), &context.signer);
        Issue { killed: self.killed, ..Issue::new(later, context, self.now) }
            .after(commands, context)
    }

    /// Another token holds the lease. Ours is taken back; is the other one alive? Every token of the
    /// device that was issued at `t` or before is dead.
    fn contest(self, other: String, t: u64, context: &Context) -> Next {
        let (layout, mut commands) = (&context.layout, Commands::default());
        let device = &self.token.claims.device_id;
        let hash = TokenHash::of(&other);
        commands.ask(layout.on("DEL", Key::Token(device, &self.token.compact)));
        commands.ask_in_reach(layout.remove_live(&self.token.hash));
        let there = commands.ask(layout.on("EXISTS", Key::Token(device, &other)));
        let mark = commands.ask(layout.on("GET", Key::Mark(device, &hash)));
        let mark_left = commands.ask(layout.on("PTTL", Key::Mark(device, &hash)));
        let lease_left = commands.ask(layout.on("PTTL", Key::Lease(device)));
        Next::trip(commands, move |context, mut replies| {
            let gone = replies.take(there).number()? == 0;
            let mark = replies.take(mark).text()?;
            let mark_left = replies.take(mark_left).number()?;
            let lease_left = replies.take(lease_left).number()?;
            let claims = context.claims_of(&other, &self.token.claims.device_id);
            // A clock was set: a lease may outlive its token.
            let verified = context.signer.verify_signature(&other);
            let ended = verified.is_ok_and(|c| c.exp.saturating_mul(1000) <= self.now.unix_ms);
            let age = age_ms(claims.lifetime_s() * 1000, lease_left);
            let is_old = age_ms(lasts_ms(&claims, self.now), mark_left) > MARKED_LONG_MS;
            let marked_long = mark.is_some() && is_old;
            // Whoever has marked it before it was killed may be about to record a certificate, for
            // which a registration is used up: nobody else is to have it meanwhile.
            let is_redeemed = !is_old && mark.is_some_and(|mark| !mark.ends_with(" killed"));
            let killed = (1..=t).contains(&claims.iat) && !is_redeemed;
            let stale = ended || killed || age > 2 * context.patience_ms && (gone || marked_long);
            if !stale {
                return Next::done(self.already_active(context, &other, lease_left));
            }
            Ok(self.take_over(Some(Old::Stale(other)), context))
        })
    }

    /// The token that held the lease when it was looked at dies if it is replaced, then the new one
    /// stands, then it takes the lease over, unless another was faster (`docs/model`, row 2). The row is
    /// read again: a kill may have come since the trip before.
    pub fn take_over(mut self, old: Option<Old>, context: &Context) -> Next {
        let (layout, mut commands) = (&context.layout, Commands::default());
        if let Some(Old::Replaced(old)) = &old {
            ask_kill(&mut commands, layout, old, self.now);
            self.killed = Some(Dead::of(old));
        }
        commands.ask(layout.set_token(&self.token, self.left_ms));
        commands.ask_in_reach(layout.add_live(&self.token.hash, self.ends_ms));
        commands.then();
        let from = match &old {
            Some(Old::Stale(compact)) => Some(&**compact),
            Some(Old::Replaced(old)) => Some(&*old.compact),
            None => None,
        };
        if let Some(from) = from {
            let lease = Key::Lease(&self.token.claims.device_id);
            let to = &self.token.compact;
            commands.ask(layout.compare_and_set(lease, from, to, self.left_ms));
        }
        commands.ask(layout.lease_if_free(&self.token, self.left_ms));
        let lease = commands.ask(layout.on("GET", Key::Lease(&self.token.claims.device_id)));
        let found = ask_found(&mut commands, layout, &self.token.claims.device_id);
        Next::trip(commands, move |context, mut replies| {
            let found = found(context, &mut replies)?;
            let holder = replies.take(lease).text()?;
            if holder.as_deref() != Some(&*self.token.compact) {
                return Ok(self.yield_to(holder.unwrap_or_default(), context));
            }
            match self.is_refused_by(&found) {
                true => Ok(self.refused_by(&found, context)),
                false => self.issued(found),
            }
        })
    }

    /// The lease went to another after all: the new token is removed again.
    fn yield_to(self, holder: String, context: &Context) -> Next {
        let (layout, mut commands) = (&context.layout, Commands::default());
        let Token { claims, compact, .. } = &self.token;
        commands.ask(layout.on("DEL", Key::Token(&claims.device_id, compact)));
        commands.ask_in_reach(layout.remove_live(&self.token.hash));
        Next::trip(commands, move |context, _| Next::done(self.already_active(context, &holder, 0)))
    }

    fn already_active(&self, context: &Context, other: &str, lease_left: i64) -> Outcome {
        let by_lease = self.now.unix_ms + u64::try_from(lease_left).unwrap_or(0);
        let by_token = context.signer.verify_signature(other).map(|claims| claims.exp * 1000);
        Outcome::AlreadyActive { expires_at_ms: by_token.unwrap_or(by_lease) }
    }
}

/// Asked last, when the lease is ours: who had it before tells of the certificate, and of the
/// registration that is used up, first. A holder that cannot be read for lack of a right, or is none,
/// holds nothing.
fn ask_found(
    out: &mut Commands,
    layout: &Layout,
    device: &DeviceId,
) -> impl FnOnce(&Context, &mut Replies) -> Result<Found, StoreError> + use<> {
    let row = out.try_ask(layout.get_row(device));
    let holder = layout.share_record.then(|| out.try_ask(layout.on("GET", Key::Holder(device))));
    let device = device.clone();
    move |context, replies| {
        let (row, _) = context.row_of(&device, replies.take(row))?;
        let holder = holder.and_then(|ask| replies.take(ask).text().ok().flatten());
        Ok(Found { row, holder: holder.and_then(|serial| Serial::from_hex(&serial)) })
    }
}

/// Mark first: an instance that holds a copy might carry the token over (`docs/model`, row 1).
/// Returns the deletion of the token.
pub(super) fn ask_kill(out: &mut Commands, layout: &Layout, token: &Token, now: Now) -> Ask {
    let device = &token.claims.device_id;
    let (key, mark) = (Key::Mark(device, &token.hash), layout.mark(Mark::Killed));
    out.ask(layout.set_mark(key, &mark, lasts_ms(&token.claims, now)));
    out.then();
    let deleted = out.ask(layout.on("DEL", Key::Token(device, &token.compact)));
    out.ask_in_reach(layout.remove_live(&token.hash));
    deleted
}

/// How old a key is that was set to live for `whole` and has `left` (a reply of `PTTL`). One that is
/// gone or never ends is as old as can be.
pub(super) fn age_ms(whole: u64, left: i64) -> u64 {
    u64::try_from(left).map_or(u64::MAX, |left| whole.saturating_sub(left))
}
