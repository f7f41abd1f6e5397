//! Redeeming a token, and giving it back. The trips are drawn in `flow`.

use super::command::{Ask, Command, Commands};
use super::flow::{Context, Next};
use super::name::Whose;
use super::reply::{Info, Replies, maybe_done};
use crate::clock::{self, Now};
use crate::devices::Row;
use crate::jwt::Token;
use crate::serial::Serial;
use crate::store::ledger::lasts_ms;
use crate::store::{Answer, Mark, Outcome, StoreError};

/// An attempt to redeem a token.
pub(super) struct Consume {
    pub token: Token,
    pub serial: Serial,
    pub now: Now,
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

impl Consume {
    /// Our mark if there is none, the token, and then whose the mark is (`docs/model`, row 20b).
    pub fn begin(self, context: &Context) -> Next {
        let layout = &context.layout;
        let (ours, lasts_ms) = (self.mark(context), lasts_ms(&self.token.claims, self.now));
        let set = layout.mark_if_free(&self.token.hash, &ours, lasts_ms);
        self.judged(set, context, move |attempt, (fate, mark), context| match mark {
            None => Err(StoreError::Undecided),
            Some(mark) if mark == ours => attempt.marked(fate, context),
            Some(mark) => match context.layout.attempt_of(&mark) {
                Whose::Ours => Ok(attempt.take_mark_over(&mark, context)),
                Whose::Unknown => Err(StoreError::Undecided),
                Whose::Others => Next::done(Outcome::AlreadyUsed),
            },
        })
    }

    /// The mark is of an attempt of this instance that did not come to an end, and of which the record
    /// holds no certificate (both known to the caller): it is dead and taken over (`docs/model`, row 5,
    /// row 21).
    pub fn take_mark_over(self, dead: &str, context: &Context) -> Next {
        let layout = &context.layout;
        let (ours, lasts_ms) = (self.mark(context), lasts_ms(&self.token.claims, self.now));
        let set = layout.take_mark_over(&self.token.hash, dead, &ours, lasts_ms);
        self.judged(set, context, move |attempt, (fate, mark), context| match mark {
            // The dead one was withdrawn just now.
            None => Err(StoreError::Undecided),
            Some(mark) if mark == ours => attempt.marked(fate, context),
            // Ours was taken over in its turn, by a kill or by a mark carried over.
            Some(_) => Next::done(Outcome::AlreadyUsed),
        })
    }

    fn mark(&self, context: &Context) -> String {
        context.layout.mark(Mark::Serial(self.serial))
    }

    /// Sets the mark, and then asks for what decides. The mark comes last. An error says whether our
    /// mark may stand although there was one.
    fn judged(
        self,
        set_mark: Command,
        context: &Context,
        then: impl FnOnce(Self, (Fate, Option<String>), &Context) -> Result<Next, StoreError> + 'static,
    ) -> Next {
        let (layout, mut commands) = (&context.layout, Commands::default());
        commands.ask(set_mark);
        commands.awaits_replicas = layout.wait_replicas > 0;
        let there = commands.ask(layout.exists_token(&self.token.compact));
        let row = commands.try_ask(layout.get_row(&self.token.claims.device_id));
        let mark = commands.ask(layout.get_mark(&self.token.hash));
        Next::trip(commands, move |context, mut replies| {
            let mark = replies.take(mark).text()?;
            let fate = self.fate(context, &mut replies, there, row);
            then(self, (fate.map_err(|error| maybe_done(error, true))?, mark), context)
        })
    }

    fn fate(
        &self,
        context: &Context,
        replies: &mut Replies,
        there: Ask,
        row: Ask,
    ) -> Result<Fate, StoreError> {
        let wanted = context.layout.wait_replicas;
        let is_safe = replies.replicas >= wanted;
        let (row, _) = context.row_of(&self.token.claims.device_id, replies.take(row))?;
        let there = replies.take(there).number()? == 1;
        let fate = match (self.token.claims.iat <= row.bound.t, there) {
            _ if row.block.stands() => Fate::Blocked,
            (true, _) => Fate::Dead,
            (false, true) if !is_safe => Fate::Unsafe,
            (false, true) => Fate::Live(Box::new(row)),
            (false, false) => Fate::Missing,
        };
        if wanted > 0 && (is_safe || matches!(fate, Fate::Unsafe)) {
            context.replicas.note(is_safe, clock::now());
        }
        Ok(fate)
    }

    /// Our mark stands. Where it is good for nothing it is withdrawn: an instance that still has to
    /// carry the token over would find it burnt.
    fn marked(self, fate: Fate, context: &Context) -> Result<Next, StoreError> {
        let then = match fate {
            Fate::Live(row) => return Next::done(Outcome::Granted(row)),
            Fate::Missing => return Ok(self.missing(context)),
            Fate::Blocked => Ok(Outcome::Blocked),
            Fate::Dead => Ok(Outcome::AlreadyUsed),
            Fate::Unsafe => Err(StoreError::Unsafe),
        };
        Ok(withdraw(&self.token, self.serial, then, context))
    }

    /// The token is not there: our mark is withdrawn, and the server is asked whether it may have
    /// dropped the token by itself.
    fn missing(self, context: &Context) -> Next {
        let mut commands = Commands::default();
        let withdrawn = ask_withdrawal(&mut commands, &self.token, self.serial, context);
        let info = Info::ask(&mut commands);
        Next::trip(commands, move |_, mut replies| {
            withdrawn(&mut replies)?;
            let server = info(&mut replies);
            let lossless = server.keeps_all();
            Next::done(Outcome::Unknown { lossless_run: server.run_id.filter(|_| lossless) })
        })
    }
}

/// Giving back: the mark is removed if it is still ours (`docs/model`, row 4).
pub(super) fn withdraw(token: &Token, serial: Serial, then: Answer, context: &Context) -> Next {
    let mut commands = Commands::default();
    let withdrawn = ask_withdrawal(&mut commands, token, serial, context);
    Next::trip(commands, move |_, mut replies| {
        withdrawn(&mut replies)?;
        Ok(Next::Done(then))
    })
}

/// A refusal leaves the mark where it is.
fn ask_withdrawal(
    out: &mut Commands,
    token: &Token,
    serial: Serial,
    context: &Context,
) -> impl FnOnce(&mut Replies) -> Result<(), StoreError> + use<> {
    let layout = &context.layout;
    let mark = layout.mark(Mark::Serial(serial));
    let ask = out.try_ask(layout.withdraw_mark(&token.hash, &mark));
    move |replies| {
        let done = replies.take(ask).number().map(drop);
        done.map_err(|error| maybe_done(error, true))
    }
}
