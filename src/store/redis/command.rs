//! Commands, packed as they go over the wire (RESP: an array of bulk strings).
//!
//! The crate's own `Cmd` keeps its words in two vectors and is copied on its way; with four commands
//! a token that was a tenth of what an onboarding costs.

use std::ops::Range;
use std::sync::Once;

use super::cluster::Route;
use super::reply::{Replies, Reply, maybe_done};
use crate::digits::decimal_bytes;
use crate::store::StoreError;

/// Commands that only look: they may be sent twice, and one that was carried out has changed nothing.
const LOOKING: [&str; 8] =
    ["GET", "EXISTS", "PTTL", "HGET", "ZCOUNT", "ZRANGEBYSCORE", "TIME", "INFO"];

pub(crate) struct Command {
    words: usize,
    /// The words, each with its length before it.
    packed: Vec<u8>,
    /// Where its key stands among them; empty if it has none.
    key: Range<usize>,
}

impl Command {
    pub fn new(name: &str) -> Self {
        /// Room for the longest of an onboarding: a token in its key and again in its value.
        const USUAL: usize = 768;
        Command { words: 0, packed: Vec::with_capacity(USUAL), key: 0..0 }.arg(name)
    }

    pub fn arg(self, word: &str) -> Self {
        self.joined(&[word])
    }

    /// One word made of pieces.
    pub fn joined(self, pieces: &[&str]) -> Self {
        self.word(pieces.iter().map(|piece| piece.as_bytes()))
    }

    /// The key, made of pieces. No command has two.
    pub fn on(self, pieces: &[&str]) -> Self {
        let mut command = self.joined(pieces);
        let end = command.packed.len() - b"\r\n".len();
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        command.key = end - length..end;
        command
    }

    pub fn key(&self) -> Option<&[u8]> {
        self.packed.get(self.key.clone()).filter(|_| self.key.end > 0)
    }

    /// A word that need not be text.
    pub fn bytes(self, word: &[u8]) -> Self {
        self.word([word].into_iter())
    }

    fn word<'a>(mut self, pieces: impl Iterator<Item = &'a [u8]> + Clone) -> Self {
        let length: usize = pieces.clone().map(<[u8]>::len).sum();
        push_counted(b'$', length as u64, &mut self.packed);
        pieces.for_each(|piece| self.packed.extend_from_slice(piece));
        self.packed.extend_from_slice(b"\r\n");
        self.words += 1;
        self
    }

    pub fn number(self, number: u64) -> Self {
        let mut buffer = [0; 20];
        self.bytes(decimal_bytes(number, &mut buffer))
    }

    /// Its first word.
    pub fn name(&self) -> &str {
        let word = self.packed.split(|byte| *byte == b'\n').nth(1).unwrap_or_default();
        std::str::from_utf8(word).unwrap_or_default().trim_end()
    }

    pub fn only_looks(&self) -> bool {
        LOOKING.contains(&self.name())
    }

    pub fn pack(&self, out: &mut Vec<u8>) {
        push_counted(b'*', self.words as u64, out);
        out.extend_from_slice(&self.packed);
    }
}

#[derive(Default)]
pub(crate) struct Commands {
    asked: Vec<Asked>,
    stage: u8,
    /// Where what is asked from now on goes.
    pub(super) route: Route,
    /// Something was changed by what came before them.
    pub follow: bool,
}

pub(super) struct Asked {
    pub command: Command,
    need: Need,
    /// What it writes counts only when replicas have it.
    pub awaits_replicas: bool,
    pub stage: u8,
    pub route: Route,
}

impl Asked {
    /// What comes in later stages depends on it.
    pub fn must_succeed(&self) -> bool {
        self.need == Need::Must
    }

    /// Whether the trip goes on although this has failed.
    fn may_fail_with(&self, error: &StoreError) -> bool {
        static WARNED: Once = Once::new();
        match (self.need, error) {
            (Need::Must, _) => false,
            (Need::May, _) => true,
            (Need::Count, StoreError::Failed(why)) => {
                WARNED.call_once(|| log::warn!("live tokens are not counted: {why}"));
                true
            }
            (Need::Count, _) => error.is_part(),
        }
    }
}

/// What it is for a trip that a command fails.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// The trip fails.
    Must,
    /// The trip fails, unless a part of the keys is out of reach, or this one of another type.
    Count,
    /// Nothing: its reply is judged by whoever takes it.
    May,
}

/// One of the commands, by which its reply is taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask(pub(super) usize);

impl Commands {
    /// What must succeed.
    pub fn ask(&mut self, command: Command) -> Ask {
        self.push(command, Need::Must, false)
    }

    /// What is for the counts only, and must succeed if it is in reach and of their type.
    pub fn ask_in_reach(&mut self, command: Command) -> Ask {
        self.push(command, Need::Count, false)
    }

    /// What may fail.
    pub fn try_ask(&mut self, command: Command) -> Ask {
        self.push(command, Need::May, false)
    }

    /// What must succeed and replicas must have.
    pub fn ask_safely(&mut self, command: Command) -> Ask {
        self.push(command, Need::Must, true)
    }

    fn push(&mut self, command: Command, need: Need, awaits_replicas: bool) -> Ask {
        let (stage, route) = (self.stage, self.route);
        self.asked.push(Asked { command, need, awaits_replicas, stage, route });
        Ask(self.asked.len() - 1)
    }

    /// What is asked from now on is carried out after what was asked before, also where nodes have no
    /// order among each other.
    pub fn then(&mut self) {
        self.stage += 1;
    }

    pub fn is_empty(&self) -> bool {
        self.asked.is_empty()
    }

    pub(super) fn asked(&self) -> &[Asked] {
        &self.asked
    }

    pub fn iter(&self) -> impl Iterator<Item = &Command> {
        self.asked.iter().map(|asked| &asked.command)
    }

    /// The replies, if what must succeed did; else its error, and whether others have changed anything.
    pub fn judge(&self, replies: Replies) -> Result<Replies, StoreError> {
        let failed = |asked: &Asked, error: &StoreError| !asked.may_fail_with(error);
        let Some(error) = self.failure(&replies, failed) else { return Ok(replies) };
        Err(maybe_done(error, self.have_changed(&replies)))
    }

    /// Whether these, or what came before them, have changed anything.
    pub fn have_changed(&self, replies: &Replies) -> bool {
        let has_changed = |(asked, reply): (&Asked, &Reply)| {
            reply.error().is_none() && !asked.command.only_looks()
        };
        self.follow || self.asked.iter().zip(replies.iter()).any(has_changed)
    }

    /// Why nobody can be served by servers that answer so, be a part of the keys out of reach or not.
    pub fn refusal(&self, replies: &Replies) -> Option<StoreError> {
        self.failure(replies, |asked, error| !asked.may_fail_with(error) && !error.is_part())
    }

    fn failure(
        &self,
        replies: &Replies,
        is_failure: impl Fn(&Asked, &StoreError) -> bool,
    ) -> Option<StoreError> {
        let mut both = self.asked.iter().zip(replies.iter());
        both.find_map(|(asked, reply)| reply.error().filter(|error| is_failure(asked, error)))
            .cloned()
    }
}

fn push_counted(kind: u8, count: u64, out: &mut Vec<u8>) {
    let mut buffer = [0; 20];
    out.push(kind);
    out.extend_from_slice(decimal_bytes(count, &mut buffer));
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_packed_as_the_crate_packs_them() {
        let command =
            Command::new("SET").joined(&["a:", "", "\u{e4}"]).arg("").number(0).number(u64::MAX);
        let mut cmd = redis::cmd("SET");
        cmd.arg("a:\u{e4}").arg("").arg(0).arg(u64::MAX);
        let mut packed = vec![];
        command.pack(&mut packed);
        assert_eq!(packed, cmd.get_packed_command());
        assert_eq!((command.name(), Command::new("TIME").name()), ("SET", "TIME"));
        Command::new("TIME").pack(&mut packed);
        assert!(packed.ends_with(b"*1\r\n$4\r\nTIME\r\n"));
    }
}
