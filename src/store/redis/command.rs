//! Commands, packed as they go over the wire (RESP: an array of bulk strings).
//!
//! The crate's own `Cmd` keeps its words in two vectors and is copied on its way; with four commands
//! a token that was a tenth of what an onboarding costs.

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
}

/// Commands packed for one write.
#[derive(Default)]
pub(crate) struct Commands {
    bytes: Vec<u8>,
    /// Where each command begins.
    begins: Vec<usize>,
}

impl Commands {
    pub fn push(&mut self, command: &Command) {
        self.begins.push(self.bytes.len());
        push_counted(b'*', command.words as u64, &mut self.bytes);
        self.bytes.extend_from_slice(&command.packed);
    }

    pub fn count(&self) -> usize {
        self.begins.len()
    }

    /// The name of a command: its first word.
    pub fn name(&self, index: usize) -> &str {
        let begin = self.begins.get(index).copied().unwrap_or_default();
        let bytes = self.bytes.get(begin..).unwrap_or_default();
        let word = bytes.split(|byte| *byte == b'\n').nth(2).unwrap_or_default();
        std::str::from_utf8(word).unwrap_or_default().trim_end()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
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
        let mut commands = Commands::default();
        commands.push(
            &Command::new("SET").joined(&["a:", "", "\u{e4}"]).arg("").number(0).number(u64::MAX),
        );
        let mut cmd = redis::cmd("SET");
        cmd.arg("a:\u{e4}").arg("").arg(0).arg(u64::MAX);
        assert_eq!(commands.bytes(), cmd.get_packed_command());
        commands.push(&Command::new("TIME"));
        assert_eq!(commands.count(), 2);
        assert_eq!([commands.name(0), commands.name(1)], ["SET", "TIME"]);
        assert!(commands.bytes().ends_with(b"*1\r\n$4\r\nTIME\r\n"));
    }
}
