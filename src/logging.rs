//! The log: one line an event on standard error, for people or for programs.
//!
//! SECURITY: whatever a client manages to get into a message, it cannot begin a line of its own or
//! steer a terminal, as control characters are escaped here and nowhere else has to think of it.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt as _;

use env_logger::{Builder, Target};
use log::kv::{self, Key, Value, VisitSource};
use log::{Level, LevelFilter, Record, SetLoggerError};

use crate::clock;
use crate::config::{Log, LogFormat};
use crate::stderr;

/// What the other crates may log if `RUST_LOG` does not ask for more: their debug lines are about
/// their insides, and nobody has checked what they show.
const OTHERS: LevelFilter = LevelFilter::Warn;

/// Starts the log. `journal_stream` is what systemd sets where standard error goes to its journal.
pub fn init(log: &Log, journal_stream: Option<&OsStr>) -> Result<(), SetLoggerError> {
    let mut builder = Builder::new();
    // It calls the end of each lane's socket an error, which we want (see `server`); all else that it
    // says, it also returns.
    builder.filter_module("tiny_http", LevelFilter::Off);
    match &log.filter {
        Some(filter) => builder.parse_filters(filter),
        None => builder
            .filter_level(OTHERS.min(log.level))
            .filter_module(env!("CARGO_CRATE_NAME"), log.level),
    };
    let style = match (log.format, journal_stream.and_then(OsStr::to_str).is_some_and(is_stderr)) {
        (LogFormat::Json, _) => Style::Json,
        (LogFormat::Text, true) => Style::Journal,
        (LogFormat::Text, false) => Style::Text,
    };
    stderr::init(move |lost| style.lost(lost));
    builder
        .format(move |out, record| style.write(out, record))
        .target(Target::Pipe(Box::new(Lines)))
        .try_init()
}

/// What the crate writes to: it makes each record one write, and `stderr` sees to the rest.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        stderr::write_line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How a line looks.
#[derive(Clone, Copy)]
enum Style {
    Json,
    Journal,
    Text,
}

impl Style {
    fn write(self, out: &mut impl Write, record: &Record<'_>) -> io::Result<()> {
        let unix_ms = clock::now().unix_ms;
        // Made here and written once: a line has many pieces.
        let mut line = String::with_capacity(256);
        let made = match self {
            Style::Json => json(&mut line, record, unix_ms),
            Style::Journal => journal_text(&mut line, record),
            Style::Text => text(&mut line, record, unix_ms),
        };
        made.map_err(io::Error::other)?;
        out.write_all(line.as_bytes())
    }

    /// That lines were lost, as a line.
    fn lost(self, lost: u64) -> Vec<u8> {
        let mut line = Vec::new();
        let mut say = |message| {
            let mut record = Record::builder();
            let record = record.level(Level::Warn).target(module_path!()).args(message).build();
            self.write(&mut line, &record)
        };
        // A vector takes everything.
        let _ = say(format_args!("lines of the log were lost, which nobody took in time: {lost}"));
        line
    }
}

/// True if `device:inode` names what standard error is. systemd leaves the variable to our
/// children and to whatever we redirect, so that it is there alone proves nothing.
fn is_stderr(journal_stream: &str) -> bool {
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|stderr| journal_stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// `2026-01-01T00:00:00.000Z INFO  message`
fn text(out: &mut String, record: &Record<'_>, unix_ms: u64) -> fmt::Result {
    out.push_str(&clock::rfc3339(unix_ms));
    write!(out, " {:<5} ", record.level())?;
    message(out, record)
}

/// `<6>message`: the journal keeps the time itself, and takes the priority from the prefix.
fn journal_text(out: &mut String, record: &Record<'_>) -> fmt::Result {
    let priority = match record.level() {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    write!(out, "<{priority}>")?;
    message(out, record)
}

fn message(out: &mut String, record: &Record<'_>) -> fmt::Result {
    Escaped { out, json: false }.write_fmt(*record.args())?;
    out.write_str("\n")
}

/// `{"timestamp":"…","level":"info","target":"…","message":"…"}`, and behind it what the line names:
/// `event`, `device`, `serial`, `client`, and as `key` the name of an admin key.
fn json(out: &mut String, record: &Record<'_>, unix_ms: u64) -> fmt::Result {
    let level = record.level().as_str().to_ascii_lowercase();
    let timestamp = clock::rfc3339(unix_ms);
    write!(out, r#"{{"timestamp":"{timestamp}","level":"{level}","target":""#)?;
    Escaped { out, json: true }.write_str(record.target())?;
    out.push_str(r#"","message":""#);
    Escaped { out, json: true }.write_fmt(*record.args())?;
    record.key_values().visit(&mut Fields(out)).map_err(|_| fmt::Error)?;
    out.write_str("\"}\n")
}

/// Writes a further field behind the text of the last, whose quote is still open.
struct Fields<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Fields<'_> {
    fn visit_pair(&mut self, name: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        // A line that has a name for something need not have one each time.
        if value.to_borrowed_str() == Some("") {
            return Ok(());
        }
        write!(self.0, "\",\"{name}\":\"")?;
        Ok(write!(Escaped { out: self.0, json: true }, "{value}")?)
    }
}

/// Passes text on with control characters and line separators escaped, in JSON also quotes.
struct Escaped<'a> {
    out: &'a mut String,
    json: bool,
}

impl Escaped<'_> {
    fn must_escape(&self, c: char) -> bool {
        let breaks = c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
        breaks || (self.json && matches!(c, '"' | '\\'))
    }

    fn escape(&mut self, c: char) -> fmt::Result {
        match c {
            '"' | '\\' => write!(self.out, "\\{c}"),
            '\n' => self.out.write_str("\\n"),
            // All that is escaped lies below U+FFFF, so that four digits are enough.
            _ => write!(self.out, "\\u{:04x}", u32::from(c)),
        }
    }
}

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let is_plain = |b: u8| matches!(b, b' '..=b'~') && !matches!(b, b'"' | b'\\');
        // Nearly everything is, and looking for characters takes longer.
        if text.bytes().all(is_plain) {
            return self.out.write_str(text);
        }
        let mut rest = text;
        while let Some(c) = rest.chars().find(|c| self.must_escape(*c)) {
            let (plain, tail) = rest.split_once(c).unwrap_or((rest, ""));
            self.out.push_str(plain);
            self.escape(c)?;
            rest = tail;
        }
        self.out.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NASTY: &str = "a\n2026 INFO  \"b\\\"\r\t\u{1b}[2J\u{9b}\u{7f}\u{2028}⚠️ é";

    fn with(
        message: fmt::Arguments<'_>,
        write: impl Fn(&mut String, &Record<'_>) -> fmt::Result,
    ) -> String {
        let mut out = String::new();
        let record = Record::builder().level(Level::Info).target("t").args(message).build();
        write(&mut out, &record).unwrap();
        out
    }

    #[test]
    fn text_is_one_line() {
        let line = |message| with(message, |out, record| text(out, record, 7));
        assert_eq!(line(format_args!("hello")), "1970-01-01T00:00:00.007Z INFO  hello\n");
        assert_eq!(
            line(format_args!("{NASTY}")),
            "1970-01-01T00:00:00.007Z INFO  a\\n2026 INFO  \"b\\\"\\u000d\\u0009\\u001b[2J\\u009b\
             \\u007f\\u2028⚠️ é\n"
        );
    }

    #[test]
    fn the_journal_gets_a_priority_and_no_time() {
        let line = with(format_args!("{NASTY}"), journal_text);
        assert!(line.starts_with("<6>a\\n2026"));
        assert_eq!(line.lines().count(), 1);
    }

    #[test]
    fn json_is_one_object_a_line() {
        let line = with(format_args!("{NASTY}"), |out, record| json(out, record, 7));
        assert!(line.starts_with(
            r#"{"timestamp":"1970-01-01T00:00:00.007Z","level":"info","target":"t","message":"a\n"#
        ));
        assert_eq!(line.chars().filter(|c| c.is_control()).count(), 1);
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["message"], NASTY);
    }

    #[test]
    fn only_our_own_standard_error_is_the_journal() {
        for other in ["", "1:2", "x", "0:0"] {
            assert!(!is_stderr(other));
        }
        let stderr = std::fs::metadata("/proc/self/fd/2").unwrap();
        assert!(is_stderr(&format!("{}:{}", stderr.dev(), stderr.ino())));
    }
}
