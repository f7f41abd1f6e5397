//! Standard error, where the log goes, and which may never stop the service.
//!
//! The reader of the log may be slow, or hang while its pipe is still open. A write would then wait for
//! the reader, and so would the worker that logs, and every other thread at its next line. So nothing
//! is written before there is room, which is waited for within a bound, and lines that are not taken in
//! time are lost: they are counted, and their number is logged when the reader is back. Lines are never
//! mixed: the rest of a line that was cut off is written before anything else.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::os::fd::AsFd;
use std::sync::Mutex;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::clock;
use crate::locks::locked;
use crate::metrics::Counter;

/// How long a line may wait until there is room for it. A reader that is alive reads within this time.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long no line waits after one has.
const IMPATIENCE_MS: u64 = 1000;
/// Bytes written at once: a pipe that is ready takes so many without waiting, and mixes nobody else's
/// into them (PIPE_BUF).
const PIECE: usize = 4096;

thread_local! {
    /// What this thread has logged and is to be written together; `None` if it is written at once.
    static HELD: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

static SINK: Mutex<Option<Sink>> = Mutex::new(None);
static LOST: Counter = Counter::new();

/// From now on what was lost is said by the line that `notice` makes of the number of lines.
pub fn init(notice: impl Fn(u64) -> Vec<u8> + Send + 'static) {
    *locked(&SINK) = Sink::of(io::stderr(), Box::new(notice)).ok();
}

/// Writes a line, its end included, or holds it; see [`together`].
pub fn write_line(line: &[u8]) {
    let is_held = HELD.with_borrow_mut(|held| match held {
        Some(lines) => {
            lines.extend_from_slice(line);
            true
        }
        None => false,
    });
    if !is_held {
        write(line);
    }
}

/// Writes what this thread logs during `work` together when that ends, be it by a panic: a batch of
/// requests is a batch of lines, and a system call for each costs more than making it.
pub fn together<T>(work: impl FnOnce() -> T) -> T {
    let _release = Release;
    HELD.set(Some(Vec::new()));
    work()
}

pub fn lost() -> u64 {
    LOST.value()
}

struct Release;

impl Drop for Release {
    fn drop(&mut self) {
        let lines = HELD.take().unwrap_or_default();
        if !lines.is_empty() {
            write(&lines);
        }
    }
}

fn write(lines: &[u8]) {
    match &mut *locked(&SINK) {
        Some(sink) => sink.write(lines, &LOST),
        // If that fails, there is nowhere left to say so.
        None => drop(io::stderr().lock().write_all(lines)),
    }
}

/// Where lines go.
struct Sink {
    out: File,
    /// The rest of a line that was begun.
    unfinished: Vec<u8>,
    /// Lines that were lost since that was last said.
    unsaid: u64,
    /// When a line may wait again, by the monotonic clock.
    patient_at_ms: u64,
    notice: Box<dyn Fn(u64) -> Vec<u8> + Send>,
}

impl Sink {
    fn of(stderr: impl AsFd, notice: Box<dyn Fn(u64) -> Vec<u8> + Send>) -> io::Result<Self> {
        let out = File::from(stderr.as_fd().try_clone_to_owned()?);
        Ok(Sink { out, unfinished: Vec::new(), unsaid: 0, patient_at_ms: 0, notice })
    }

    fn write(&mut self, lines: &[u8], lost: &Counter) {
        let rest = if self.catch_up() { self.settle(lines) } else { lines };
        let count = rest.iter().filter(|b| **b == b'\n').count() as u64;
        self.unsaid += count;
        lost.add(count);
    }

    /// Finishes the line that was begun, and says what was lost. False if there is no room for more.
    fn catch_up(&mut self) -> bool {
        let begun = mem::take(&mut self.unfinished);
        self.unfinished = begun.split_at(self.put(&begun)).1.to_vec();
        if !self.unfinished.is_empty() || self.unsaid == 0 {
            return self.unfinished.is_empty();
        }
        let notice = (self.notice)(self.unsaid);
        let left = self.settle(&notice).len();
        if left < notice.len() {
            self.unsaid = 0;
        }
        left == 0 && self.unfinished.is_empty()
    }

    /// Writes lines, and returns those that nobody took. The rest of one that was begun is kept.
    fn settle<'l>(&mut self, lines: &'l [u8]) -> &'l [u8] {
        let (out, rest) = lines.split_at(self.put(lines));
        if out.is_empty() || out.ends_with(b"\n") {
            return rest;
        }
        let (begun, rest) = rest.split_at(end_of_line(rest));
        self.unfinished = begun.to_vec();
        rest
    }

    /// Writes as much as is taken in time, in whole lines if possible.
    fn put(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty())
            && (self.has_room(Timespec::default()) || self.wait())
        {
            let most = rest.get(..PIECE).unwrap_or(rest);
            let whole = most.iter().rposition(|b| *b == b'\n').map_or(most.len(), |at| at + 1);
            match self.out.write(most.split_at(whole).0) {
                Ok(n) if n > 0 => taken += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // There is nowhere to say why.
                _ => break,
            }
        }
        taken
    }

    /// Waits for room, unless a line has waited a moment ago.
    fn wait(&mut self) -> bool {
        if clock::now().mono_ms < self.patient_at_ms {
            return false;
        }
        let has_room = self.has_room(PATIENCE);
        self.patient_at_ms = clock::now().mono_ms + IMPATIENCE_MS;
        has_room
    }

    fn has_room(&self, limit: Timespec) -> bool {
        let mut out = [PollFd::new(&self.out, PollFlags::OUT)];
        // An error is found by the write.
        poll(&mut out, Some(&limit)).is_ok_and(|ready| ready > 0)
    }
}

/// The length of the first line, its end included.
fn end_of_line(bytes: &[u8]) -> usize {
    bytes.iter().position(|b| *b == b'\n').map_or(bytes.len(), |at| at + 1)
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, Read as _, pipe};
    use std::panic;

    use super::*;

    fn held() -> Option<usize> {
        HELD.with_borrow(|held| held.as_ref().map(Vec::len))
    }

    #[test]
    fn what_is_held_is_let_go_at_the_end_and_at_a_panic() {
        assert_eq!(held(), None);
        let result = together(|| {
            write_line(b"a line\n");
            held()
        });
        assert_eq!((result, held()), (Some(7), None));
        let panicked = panic::catch_unwind(|| together(|| panic!("on purpose")));
        assert!(panicked.is_err());
        assert_eq!(held(), None);
    }

    /// A pipe that is never waited for.
    fn piped() -> (Sink, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        let notice = Box::new(|lost| format!("lost {lost}\n").into_bytes());
        let mut sink = Sink::of(&writer, notice).unwrap();
        sink.patient_at_ms = u64::MAX;
        (sink, reader)
    }

    fn line(number: u64, length: usize) -> Vec<u8> {
        format!("{number:0>length$}\n").into_bytes()
    }

    /// Lines of many lengths into a pipe that is read only now and then: each comes whole, in order,
    /// or is counted.
    #[test]
    fn lines_come_whole_or_are_counted() {
        let (mut sink, mut reader) = piped();
        let (lost, mut got) = (Counter::new(), Vec::new());
        for number in 0..4000 {
            sink.write(&line(number, 20 + (number as usize * 7) % 9000), &lost);
            if number % 50 == 49 {
                let mut buf = vec![0; 150_000 + number as usize];
                let n = reader.read(&mut buf).unwrap();
                got.extend_from_slice(&buf[..n]);
            }
        }
        while sink.has_room(Timespec::default()) && !sink.catch_up() {}
        drop(sink);
        reader.read_to_end(&mut got).unwrap();
        let text = String::from_utf8(got).unwrap();
        let (mut next, mut said) = (0, 0);
        for line in text.lines() {
            if let Some(count) = line.strip_prefix("lost ") {
                said += count.parse::<u64>().unwrap();
                continue;
            }
            let number: u64 = line.parse().unwrap();
            assert_eq!(line.len(), 20 + (number as usize * 7) % 9000, "{number} is whole");
            assert_eq!(number, next + said, "all that is missing was said before");
            next += 1;
        }
        assert!(said > 100 && lost.value() >= said, "{said} of {}", lost.value());
    }

    #[test]
    fn a_full_pipe_is_waited_for_once_in_a_while() {
        let (mut sink, _reader) = piped();
        let lost = Counter::new();
        sink.patient_at_ms = 0;
        let before = clock::now().mono_ms;
        (0..1000).for_each(|n| sink.write(&line(n, 100), &lost));
        let took = clock::now().mono_ms - before;
        assert!((100..900).contains(&took), "{took} ms");
        assert!(lost.value() > 300, "{}", lost.value());
    }

    #[test]
    fn a_file_takes_all_and_its_errors_are_counted() {
        let lost = Counter::new();
        let notice = || Box::new(|_| Vec::new());
        let mut full = Sink::of(File::options().write(true).open("/dev/full").unwrap(), notice());
        full.as_mut().unwrap().write(b"a\nb\n", &lost);
        assert_eq!(lost.value(), 2);
        let dir = crate::files::test_dir::TestDir::new();
        let file = File::create(dir.join("log")).unwrap();
        let mut sink = Sink::of(&file, notice()).unwrap();
        let lines: Vec<u8> = (0..1000).flat_map(|n| line(n, 100)).collect();
        sink.write(&lines, &lost);
        assert_eq!(std::fs::read(dir.join("log")).unwrap(), lines);
    }
}
