//! The rows on disk: `devices.txt`, a head line and then one line for each register that changed.
//!
//! ```text
//! mqtt-publisher-lite devices 1
//! bound         ID  VERSION  INSTANCE  T  C  CHECKSUM
//! block         ID  VERSION  INSTANCE  BLOCKED  LIFTED  CHANGED  CHECKSUM
//! registration  ID  VERSION  INSTANCE  MADE_AT  MADE_BY  SECRET  END  CERT_DAYS  NOTE  CHECKSUM
//! forgotten     ID  VERSION  INSTANCE  MADE_AT  MADE_BY  CHECKSUM
//! spent         ID  VERSION  INSTANCE  SECRET  CHECKSUM
//! ```
//!
//! Fields stand between tabs; what is not known is empty. A registration has a version and an instance
//! of its own; the other kinds bear the time of writing in milliseconds, and the instance that made the
//! change, or `-` if it came from another one.
//!
//! Lines are only ever appended, and reading merges them all. So their order and repetition do not
//! matter, a copy taken while one is written lacks that one at most, and a torn line costs only itself.
//! Lines of a kind that this version does not know are kept for the version that wrote them.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::{Block, Bound, Instance, Registration, Row, SecretHash, Terms, Text};
use crate::device::DeviceId;
use crate::files::{self, FilesError};
use crate::jwt::TokenHash;

/// The first line, with the format's version.
const HEAD: &str = "mqtt-publisher-lite devices 1\n";
/// A file smaller than this is not worth rewriting, in bytes.
const LEAST_REWRITTEN: u64 = 64 * 1024;

#[derive(Debug)]
pub(super) struct DevicesFile {
    path: PathBuf,
    /// Whole lines that this version cannot read.
    unknown: Vec<String>,
    /// How long the file was when it was last read or rewritten.
    was: u64,
    is: u64,
}

impl DevicesFile {
    /// Reads the file, or makes an empty one. `enter` is given each line: the device, one register of
    /// its row, and which instance has written it, if it was not another's. A file of a later version is
    /// refused.
    pub fn open(
        path: &Path,
        enter: impl FnMut(DeviceId, Row, Option<Instance>),
    ) -> Result<Self, FilesError> {
        let (length, rest) = load(path, enter)?;
        if length < HEAD.len() {
            files::write_atomic(path, HEAD.as_bytes(), 0o600)?;
        }
        files::warn_if_others_may_read(path);
        if rest.torn > 0 {
            log::warn!("torn lines of {} were left out: {}", path.display(), rest.torn);
        }
        let was = length.max(HEAD.len()) as u64;
        Ok(DevicesFile { path: path.to_owned(), unknown: rest.unknown, was, is: was })
    }

    /// Appends lines and syncs them. If that fails, a part of them may stay: it is taken off if
    /// possible, and does no harm where it is not.
    pub fn append(&mut self, lines: &str) -> Result<(), FilesError> {
        let append = || {
            let file = OpenOptions::new().read(true).append(true).open(&self.path)?;
            let before = file.metadata()?.len();
            let written = write_after(&file, before, lines);
            if written.is_err() {
                let _ = file.set_len(before); // the error that counts is the first
            }
            written?;
            Ok(file.metadata()?.len())
        };
        self.is = append().map_err(FilesError::io("cannot write", &self.path))?;
        Ok(())
    }

    /// It is time to rewrite the file: half of it or more may be lines that others have overtaken.
    pub fn has_doubled(&self) -> bool {
        self.is >= LEAST_REWRITTEN && self.is / 2 >= self.was
    }

    /// Replaces the file with one that holds these lines, and those of unknown kinds. If that fails, the
    /// old file is still there.
    pub fn rewrite(&mut self, mut lines: impl Iterator<Item = String>) -> Result<(), FilesError> {
        self.was = self.is; // Should it fail, it is tried again only when the file has doubled again.
        let mut length = 0;
        files::write_atomic_by(&self.path, 0o600, &mut |file| {
            let mut out = BufWriter::new(file);
            let head = std::iter::once(HEAD.to_owned());
            for line in head.chain(self.unknown.iter().cloned()).chain(lines.by_ref()) {
                length += line.len() as u64;
                out.write_all(line.as_bytes())?;
            }
            out.flush()
        })?;
        (self.was, self.is) = (length, length);
        Ok(())
    }
}

/// Reads the file, if there is one: how long it is, and what of it was not entered.
pub(super) fn load(
    path: &Path,
    enter: impl FnMut(DeviceId, Row, Option<Instance>),
) -> Result<(usize, Rest), FilesError> {
    let found = files::read(path)?;
    if found.as_ref().is_some_and(|bytes| bytes.len() < HEAD.len()) {
        log::warn!("{}: it is empty: what it said of devices is lost here", path.display());
    }
    let bytes = found.unwrap_or_default();
    let rest = read(&bytes, enter).ok_or_else(|| {
        let why = "not a list of devices that this version can read";
        FilesError::io("cannot read", path)(io::Error::other(why))
    })?;
    Ok((bytes.len(), rest))
}

/// Behind a line that was torn a new one is begun.
fn write_after(mut file: &File, before: u64, lines: &str) -> io::Result<()> {
    let mut last = *b"\n";
    if let Some(at) = before.checked_sub(1) {
        file.read_exact_at(&mut last, at)?;
    }
    let begun = if last == *b"\n" { "" } else { "\n" };
    file.write_all([begun, lines].concat().as_bytes())?;
    file.sync_data()
}

/// One line for each register of the row of which something is known. `writer` made the change, at
/// `now_ms`.
pub(super) fn lines(device: &DeviceId, row: &Row, writer: Option<Instance>, now_ms: u64) -> String {
    let Row { bound, block, registration, spent } = row;
    let writer = writer.map_or("-".to_owned(), |own| own.to_string());
    let mut lines = String::new();
    let mut push = |kind: &str, version: u64, instance: &str, fields: &str| {
        let text = format!("{kind}\t{device}\t{version}\t{instance}\t{fields}");
        lines.push_str(&format!("{text}\t{}\n", checksum(&text)));
    };
    if *bound != Bound::default() {
        push("bound", now_ms, &writer, &format!("{}\t{}", bound.t, bound.c));
    }
    if *block != Block::default() {
        let Block { blocked, lifted, changed } = block;
        push("block", now_ms, &writer, &format!("{blocked}\t{lifted}\t{changed}"));
    }
    if let Some(Registration { version, instance, made_at, made_by, terms }) = registration {
        let made = format!("{made_at}\t{}", text(made_by.as_ref()));
        match terms {
            None => push("forgotten", *version, &instance.to_string(), &made),
            Some(terms) => {
                let fields = format!("{made}\t{}", terms_text(terms));
                push("registration", *version, &instance.to_string(), &fields);
            }
        }
    }
    for secret in spent {
        push("spent", now_ms, &writer, &hex(secret));
    }
    lines
}

fn terms_text(Terms { secret, end, cert_days, note }: &Terms) -> String {
    let secret = secret.as_ref().map(hex).unwrap_or_default();
    let days = cert_days.map(|days| days.to_string()).unwrap_or_default();
    format!("{secret}\t{end}\t{days}\t{}", text(note.as_ref()))
}

fn text(text: Option<&Text>) -> &str {
    text.map_or("", Text::as_str)
}

fn hex(SecretHash(bytes): &SecretHash) -> String {
    TokenHash(*bytes).to_string()
}

/// Enough to tell a line from a torn one: the first 32 bits of its SHA-256.
fn checksum(text: &str) -> String {
    TokenHash::of(text).short()
}

/// What was read but not entered.
#[derive(Debug, Default)]
pub(super) struct Rest {
    unknown: Vec<String>,
    torn: usize,
}

/// `None` if the file is not one of this version. One that was torn within its head is empty.
fn read(bytes: &[u8], mut enter: impl FnMut(DeviceId, Row, Option<Instance>)) -> Option<Rest> {
    let mut rest = Rest::default();
    let Some(lines) = bytes.strip_prefix(HEAD.as_bytes()) else {
        return HEAD.as_bytes().starts_with(bytes).then_some(rest);
    };
    for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        match whole(line).map(|(line, text)| (line, parse(text))) {
            Some((_, Some((device, row, writer)))) => enter(device, row, writer),
            Some((line, None)) => rest.unknown.push(format!("{line}\n")),
            None => rest.torn += 1,
        }
    }
    Some(rest)
}

/// The line and its text without the checksum, if that is right.
fn whole(line: &[u8]) -> Option<(&str, &str)> {
    let line = std::str::from_utf8(line).ok()?;
    let (text, sum) = line.rsplit_once('\t')?;
    (checksum(text) == sum).then_some((line, text))
}

/// The device, one register of its row, and which instance has written it.
fn parse(text: &str) -> Option<(DeviceId, Row, Option<Instance>)> {
    let fields: Vec<&str> = text.split('\t').collect();
    let [kind, device, version, instance, fields @ ..] = fields.as_slice() else { return None };
    let device = DeviceId::parse(device)?;
    let version = number(version)?;
    let writer = match *instance {
        "-" => None,
        id => Some(Instance::from_hex(id)?),
    };
    let mut row = Row::default();
    match (*kind, fields) {
        ("bound", [t, c]) => row.bound = Bound { t: number(t)?, c: number(c)? },
        ("block", [blocked, lifted, changed @ ..]) => {
            // Lines of older versions lack the last field.
            let changed = match changed {
                [] => 0,
                [changed] => number(changed)?,
                _ => return None,
            };
            row.block = Block { blocked: number(blocked)?, lifted: number(lifted)?, changed };
        }
        ("spent", [secret]) => row.spent = [parse_secret(secret)?].into(),
        ("registration" | "forgotten", [made_at, made_by, terms @ ..]) => {
            row.registration = Some(Registration {
                version,
                instance: writer?,
                made_at: number(made_at)?,
                made_by: optional(made_by, Text::parse)?,
                terms: match (*kind, terms) {
                    ("forgotten", []) => None,
                    ("registration", terms) => Some(parse_terms(terms)?),
                    _ => return None,
                },
            });
        }
        _ => return None,
    }
    Some((device, row, writer))
}

fn parse_terms(fields: &[&str]) -> Option<Terms> {
    let [secret, end, cert_days, note] = fields else { return None };
    Some(Terms {
        secret: optional(secret, parse_secret)?,
        end: number(end)?,
        cert_days: optional(cert_days, number)?,
        note: optional(note, Text::parse)?,
    })
}

/// An empty field is none; another must be read.
fn optional<T>(field: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<Option<T>> {
    if field.is_empty() { Some(None) } else { parse(field).map(Some) }
}

fn parse_secret(field: &str) -> Option<SecretHash> {
    SecretHash::from_hex(field)
}

/// Digits only, without a sign.
fn number<N: std::str::FromStr>(field: &str) -> Option<N> {
    field.bytes().all(|b| b.is_ascii_digit()).then(|| field.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::fixture::{block, bound, forgotten, full, registered, registration, spent};
    use crate::devices::merge::random::Random;
    use crate::files::test_dir::TestDir;
    use std::collections::BTreeMap;
    use std::fs;

    const OWN: Instance = Instance([1; 16]);
    const SUM: &str = "0123456789abcdef0123456789abcdef";

    type Rows = BTreeMap<String, Row>;

    fn device(id: &str) -> DeviceId {
        DeviceId::parse(id).unwrap()
    }

    fn enter(rows: &mut Rows, device: &DeviceId, news: Row) {
        let row = rows.entry(device.to_string()).or_default();
        *row = std::mem::take(row).merge(news);
    }

    fn open(path: &Path) -> (DevicesFile, Rows) {
        let mut rows = Rows::new();
        let file = DevicesFile::open(path, |device, news, _| enter(&mut rows, &device, news));
        (file.unwrap(), rows)
    }

    fn rows_of(bytes: &[u8]) -> Rows {
        let mut rows = Rows::new();
        assert!(read(bytes, |device, news, _| enter(&mut rows, &device, news)).is_some());
        rows
    }

    /// A file of lines of every kind, for three devices.
    fn history() -> String {
        let days = Terms { secret: None, end: 7, cert_days: None, note: None };
        let plain = Registration { terms: Some(days), made_by: None, ..registration(3, 0) };
        let rows = [
            ("a", bound(5, 0)),
            ("b", full()),
            ("a", bound(4, 6)),
            ("b", Row { registration: Some(plain), ..block(8, 8) }),
            ("c", registered(2, 9)),
            ("c", spent(9)),
            ("c", forgotten(3)),
        ];
        let lines = rows.iter().map(|(id, row)| lines(&device(id), row, Some(OWN), 1_000));
        [HEAD.to_owned()].into_iter().chain(lines).collect()
    }

    #[test]
    fn the_lines_of_a_row() {
        let text = lines(&device("d"), &full(), None, 1_764_237_600_007);
        let expected = [
            "bound\td\t1764237600007\t-\t1764237600\t1764237500",
            "block\td\t1764237600007\t-\t1764237600007\t1764237600006\t1764237600007",
            "registration\td\t1764237600008\t42424242424242424242424242424242\t1764237600\tadmin\t\
             0909090909090909090909090909090909090909090909090909090909090909\t1772013600\t30\t\
             Halle 3 äöü",
        ];
        for (line, expected) in text.lines().zip(expected) {
            assert_eq!(line.rsplit_once('\t').unwrap().0, expected);
        }
        assert_eq!(text.lines().count(), 5, "and two spent secrets");
        let older =
            |fields| parse(&format!("block\td\t9\t-\t{fields}")).map(|(_, row, _)| row.block);
        assert_eq!(older("7\t6"), Some(Block { changed: 0, ..block(7, 6).block }));
        assert_eq!(older("7\t6\t7\t8"), None);
        let kill =
            lines(&device("device-00001"), &bound(1_764_237_605, 0), Some(OWN), 1_764_237_600_007);
        assert!(kill.lines().count() == 1 && kill.len() == 88, "{}: {kill}", kill.len());
        // `printf 'bound\td\t0\t-\t1\t0' | sha256sum | cut -c -8`
        assert_eq!(lines(&device("d"), &bound(1, 0), None, 0), "bound\td\t0\t-\t1\t0\tbd8c2f98\n");
    }

    #[test]
    fn a_row_reads_back_whatever_the_order_and_however_often() {
        let dir = TestDir::new();
        let path = dir.join("devices.txt");
        let mut random = Random(7);
        let rows: Vec<Row> = (0..2_000).map(|_| random.row()).collect();
        let mut text: Vec<String> =
            rows.iter().map(|row| lines(&device("d"), row, None, 1)).collect();
        let expected = rows.into_iter().fold(Row::default(), Row::merge);
        for _ in 0..3 {
            text.rotate_left(777);
            text.reverse();
            let again = text.last().cloned().unwrap();
            text.push(again);
            fs::write(&path, HEAD.to_owned() + &text.concat()).unwrap();
            assert_eq!(open(&path).1, Rows::from([("d".to_owned(), expected.clone())]));
        }
    }

    #[test]
    fn a_file_that_is_torn_anywhere_loads_and_can_be_written() {
        let dir = TestDir::new();
        let path = dir.join("devices.txt");
        let whole = history();
        let new = lines(&device("z"), &bound(1, 1), None, 0);
        for cut in 0..=whole.len() {
            let kept = &whole.as_bytes()[..cut];
            fs::write(&path, kept).unwrap();
            let (mut file, mut rows) = open(&path);
            // A line counts without its line end: the checksum says that it is whole.
            let ends = whole.as_bytes().get(cut).is_none_or(|next| *next == b'\n');
            let last_end = kept.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            let counts = if ends { cut } else { last_end };
            assert_eq!(rows, rows_of(&whole.as_bytes()[..counts.max(HEAD.len())]), "torn at {cut}");
            if ends || cut % 9 == 0 {
                file.append(&new).unwrap();
                rows.insert("z".to_owned(), bound(1, 1));
                assert_eq!(open(&path).1, rows, "torn at {cut}, then written");
            }
            if cut < HEAD.len() {
                continue; // The head is synced before anything is written behind it.
            }
            // A file system may also have made room for more, and then lost the bytes.
            fs::write(&path, [kept, &[0; 40], b"\n", new.as_bytes()].concat()).unwrap();
            let mut expected = rows_of(&kept[..last_end]);
            expected.insert("z".to_owned(), bound(1, 1));
            assert_eq!(open(&path).1, expected, "bytes lost at {cut}");
        }
    }

    #[test]
    fn what_this_version_does_not_know_stays() {
        let dir = TestDir::new();
        let path = dir.join("devices.txt");
        let lines = [
            format!("quota\td\t1\t{SUM}\t7"),
            format!("bound\td\t1\t{SUM}\t7\t8\t9"),
            format!("registration\td\t1\t{SUM}\t1\tadmin"),
            "forgotten\td\t1\t-\t1\tadmin".to_owned(),
            format!("bound\t..\t1\t{SUM}\t7\t8"),
            format!("bound\td\t1\t{SUM}\t+7\t8"),
            format!("bound\td\t1\t{SUM}\t\t8"),
            format!("bound\td\t1\t{}\t7\t8", &SUM[1..]),
            format!("spent\td\t1\t{SUM}\t{SUM}"),
            format!("registration\td\t1\t{SUM}\t1\ta\u{7f}b\t\t7\t\t"),
            format!("registration\td\t1\t{SUM}\t1\t\t\t7\t4294967296\t"),
            "bound".to_owned(),
            "x\u{e4}".to_owned(),
        ];
        let lines: String =
            lines.iter().map(|line| format!("{line}\t{}\n", checksum(line))).collect();
        let known = super::lines(&device("d"), &bound(7, 8), None, 0);
        let torn = b"\n\nno line\n\xff\n";
        fs::write(&path, [HEAD.as_bytes(), lines.as_bytes(), known.as_bytes(), torn].concat())
            .unwrap();
        let (mut file, rows) = open(&path);
        assert_eq!(rows, Rows::from([("d".to_owned(), bound(7, 8))]));
        file.rewrite([known.clone()].into_iter()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), [HEAD, &lines, &known].concat());
    }

    #[test]
    fn a_file_of_another_kind_is_left_alone() {
        let dir = TestDir::new();
        let path = dir.join("devices.txt");
        for text in ["mqtt-publisher-lite devices 2\n", "x", "\nmqtt-publisher-lite devices 1\n"] {
            fs::write(&path, text).unwrap();
            let error = DevicesFile::open(&path, |_, _, _| ()).unwrap_err().to_string();
            assert!(error.contains("devices.txt: not a list of devices"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        let error = DevicesFile::open(&dir.join("no/devices.txt"), |_, _, _| ()).unwrap_err();
        assert_eq!(error.kind, io::ErrorKind::NotFound);
    }

    #[test]
    fn it_is_rewritten_when_half_of_it_may_be_old() {
        let dir = TestDir::new();
        let path = dir.join("devices.txt");
        let (mut file, _) = open(&path);
        let line = lines(&device("d"), &bound(7, 8), None, 0);
        let many = line.repeat(LEAST_REWRITTEN as usize / line.len());
        file.append(&many[..many.len() - 2 * line.len()]).unwrap();
        assert!(!file.has_doubled(), "too small");
        file.append(&line.repeat(3)).unwrap();
        assert!(file.has_doubled());
        file.rewrite([many.clone()].into_iter()).unwrap();
        file.append(&many).unwrap();
        assert!(!file.has_doubled());
        file.append(&line.repeat(2)).unwrap();
        assert!(file.has_doubled());
        fs::create_dir(dir.join(".devices.txt.new")).unwrap();
        assert!(file.rewrite([line.clone()].into_iter()).is_err());
        assert!(!file.has_doubled(), "it is not tried with every line");
        file.append(&line).unwrap();
        assert_eq!(fs::read(&path).unwrap().len(), HEAD.len() + 2 * many.len() + 3 * line.len());
    }
}
