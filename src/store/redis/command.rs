//! Commands, packed as they go over the wire (RESP: an array of bulk strings).
//!
//! The crate's own `Cmd` keeps its words in two vectors and is copied on its way; with four commands
//! a token that was a tenth of what an onboarding costs.

use super::reply::{Replies, maybe_done};
use crate::store::StoreError;

/// Commands that only look: they may be sent twice, and one that was carried out has changed nothing.
const LOOKING: [&str; 8] =
    ["GET", "EXISTS", "PTTL", "HGET", "ZCOUNT", "ZRANGEBYSCORE", "TIME", "INFO"];

/// One command.
pub(crate) struct Command {
    words: usize,
    /// The words, each with its length before it.
    packed: Vec<u8>,
}

impl Command {
    pub fn new(name: &str) -> Self {
        /// Room for the longest of an onboarding: a token in its key and again in its value.
        const USUAL: usize = 768;
        Command { words: 0, packed: Vec::with_capacity(USUAL) }.arg(name)
    }

    pub fn arg(self, word: &str) -> Self {
        self.joined(&[word])
    }

    /// One word made of pieces.
    pub fn joined(self, pieces: &[&str]) -> Self {
        self.word(pieces.iter().map(|piece| piece.as_bytes()))
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
        self.arg(decimal(number, &mut buffer))
    }

    /// Its first word.
    pub fn name(&self) -> &str {
        let word = self.packed.split(|byte| *byte == b'\n').nth(1).unwrap_or_default();
        std::str::from_utf8(word).unwrap_or_default().trim_end()
    }

    fn only_looks(&self) -> bool {
        LOOKING.contains(&self.name())
    }

    pub fn pack(&self, out: &mut Vec<u8>) {
        push_counted(b'*', self.words as u64, out);
        out.extend_from_slice(&self.packed);
    }
}

/// Commands that go out together.
#[derive(Default)]
pub(crate) struct Commands {
    asked: Vec<Asked>,
    /// What was written counts only when replicas have it.
    pub awaits_replicas: bool,
}

struct Asked {
    command: Command,
    /// Without it nothing of the trip counts.
    must_succeed: bool,
}

/// One of the commands, by which its reply is taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask(pub(super) usize);

impl Commands {
    /// What must succeed.
    pub fn ask(&mut self, command: Command) -> Ask {
        self.push(command, true)
    }

    /// What may fail: its reply is judged by whoever takes it.
    pub fn try_ask(&mut self, command: Command) -> Ask {
        self.push(command, false)
    }

    fn push(&mut self, command: Command, must_succeed: bool) -> Ask {
        self.asked.push(Asked { command, must_succeed });
        Ask(self.asked.len() - 1)
    }

    pub fn is_empty(&self) -> bool {
        self.asked.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Command> {
        self.asked.iter().map(|asked| &asked.command)
    }

    /// The replies, if what must succeed did; else its error, and whether others have changed anything.
    pub fn judge(&self, replies: Replies) -> Result<Replies, StoreError> {
        let both = || self.asked.iter().zip(replies.iter());
        let failed = both().find_map(|(asked, reply)| reply.error().filter(|_| asked.must_succeed));
        let Some(error) = failed.cloned() else { return Ok(replies) };
        let has_changed =
            both().any(|(asked, reply)| reply.error().is_none() && !asked.command.only_looks());
        Err(maybe_done(error, has_changed))
    }
}

fn push_counted(kind: u8, count: u64, out: &mut Vec<u8>) {
    let mut buffer = [0; 20];
    out.push(kind);
    out.extend_from_slice(decimal(count, &mut buffer).as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// The digits of `number`, written at the end of `buffer`, which holds those of any.
pub(super) fn decimal(mut number: u64, buffer: &mut [u8; 20]) -> &str {
    let mut first = buffer.len();
    for digit in buffer.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        first -= 1;
        if number == 0 {
            break;
        }
    }
    let digits = buffer.get(first..).unwrap_or_default();
    std::str::from_utf8(digits).unwrap_or_default()
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
