//! Redeeming a token, and giving it back. The trips are drawn in `flow`.

use super::cluster::{Route, slot_of};
use super::command::{Ask, Command, Commands};
use super::flow::{Context, Next};
use super::layout::Key;
use super::name::Whose;
use super::reply::{Info, Replies};
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
        let set = layout.set_mark(self.key(), &ours, lasts_ms).arg("NX");
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
        let set = layout.compare_and_set(self.key(), dead, &ours, lasts_ms);
        self.judged(set, context, move |attempt, (fate, mark), context| match mark {
            // The dead one was withdrawn just now.
            None => Err(StoreError::Undecided),
            Some(mark) if mark == ours => attempt.marked(fate, context),
            // Ours was taken over in its turn, by a kill or by a mark carried over.
            Some(_) => Next::done(Outcome::AlreadyUsed),
        })
    }

    fn key(&self) -> Key<'_> {
        Key::Mark(&self.token.claims.device_id, &self.token.hash)
    }

    fn mark(&self, context: &Context) -> String {
        context.layout.mark(Mark::Serial(self.serial))
    }

    /// Sets the mark, and then asks for what decides. The mark comes last.
    fn judged(
        self,
        set_mark: Command,
        context: &Context,
        then: impl FnOnce(Self, (Fate, Option<String>), &Context) -> Result<Next, StoreError> + 'static,
    ) -> Next {
        let (layout, mut commands) = (&context.layout, Commands::default());
        let device = &self.token.claims.device_id;
        commands.ask_safely(set_mark);
        commands.then();
        let there = commands.ask(layout.on("EXISTS", Key::Token(device, &self.token.compact)));
        let row = commands.try_ask(layout.get_row(device));
        let mark = commands.ask(layout.on("GET", self.key()));
        Next::trip(commands, move |context, mut replies| {
            let mark = replies.take(mark).text()?;
            let fate = self.fate(context, &mut replies, there, row)?;
            then(self, (fate, mark), context)
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
            context.replicas.note(replies.master, is_safe, clock::now());
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
        // Asked is the node that has the device's keys.
        commands.route = Route::Slot(slot_of(self.token.claims.device_id.as_str().as_bytes()));
        let withdrawn = commands.ask(withdrawal(&self.token, self.serial, context));
        let info = Info::ask(&mut commands);
        Next::trip(commands, move |_, mut replies| {
            replies.take(withdrawn).number()?;
            let server = info(&mut replies);
            let lossless = server.keeps_all();
            let run_id = server.run_id.filter(|_| lossless);
            Next::done(Outcome::Unknown { lossless_run: run_id })
        })
    }
}

/// Giving back: the mark is removed if it is still ours (`docs/model`, row 4). A refusal leaves it where
/// it is.
pub(super) fn withdraw(token: &Token, serial: Serial, then: Answer, context: &Context) -> Next {
    let mut commands = Commands::default();
    commands.ask(withdrawal(token, serial, context));
    commands.follow = true;
    Next::trip(commands, move |_, _| Ok(Next::Done(then)))
}

fn withdrawal(token: &Token, serial: Serial, context: &Context) -> Command {
    let layout = &context.layout;
    let mark = layout.mark(Mark::Serial(serial));
    layout.compare_and_delete(Key::Mark(&token.claims.device_id, &token.hash), &mark)
}
