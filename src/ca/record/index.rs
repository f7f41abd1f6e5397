//! `index.txt` as bytes: its lines and their times, as OpenSSL's `ca` writes them, read as a whole
//! and copied line by line. Pure: whose bytes they are, the caller knows.

use std::collections::HashMap;
use std::io::{self, BufRead};

use super::Reason;
use super::rows::{Place, Revoked, Row, Rows};
use crate::ca::der::{read_time, time_text};
use crate::device::DeviceId;
use crate::serial::Serial;

/// The fifth field, which OpenSSL does not read and where it writes `unknown`: of a server's
/// certificate, …
const SERVER: &str = "server";
/// … of one that another instance has signed (where it lies follows), …
const OTHERS: &str = "others.pem+";
/// … and of a revocation whose certificate is not here.
const FORETOLD: &str = "foretold";

/// What stands behind the last whole line.
#[derive(Debug, Default)]
pub(super) struct Tail {
    /// A line without an end, if it reads as one: an editor has left it so, or it was torn in its last
    /// field, the subject.
    pub(super) row: Option<Row>,
    pub(super) bytes: Vec<u8>,
    pub(super) at: usize,
}

enum Line {
    Row(Row),
    /// A certificate that is not here is revoked.
    Foretold(Serial, Revoked),
}

/// What becomes of a line when the database is copied.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// It is revoked then, for this reason.
    Revoked(Revoked),
    /// Its certificate lies elsewhere now; and so many of the device's rows before it are newer, if
    /// that is not as it was.
    Moved(Place, Option<u32>),
    Gone,
}

/// Reads the database, whose last line may be torn. `Err` is the number of a line, counted from 1,
/// and what is wrong with it.
pub(super) fn read_index(bytes: &[u8]) -> Result<(Rows, Tail), (usize, &'static str)> {
    let mut rows = Rows::with_room(bytes.iter().filter(|b| **b == b'\n').count());
    let mut tail = Tail::default();
    for (number, line) in (1..).zip(bytes.split_inclusive(|b| *b == b'\n')) {
        let read = read_line(line);
        if tail.at + line.len() == bytes.len() && is_torn(line) {
            tail.row = match read {
                Ok(Line::Row(row)) if rows.by_serial(&row.serial).is_none() => Some(row),
                _ => None,
            };
            tail.bytes = line.to_vec();
            break;
        }
        match read.map_err(|why| (number, why))? {
            Line::Row(row) => {
                let twice = (number, "the serial number stands twice");
                rows.insert(&row).map(drop).ok_or(twice)?;
            }
            Line::Foretold(serial, revoked) if rows.by_serial(&serial).is_none() => {
                rows.revoke(serial, revoked);
            }
            Line::Foretold(..) => {}
        }
        tail.at += line.len();
    }
    Ok((rows, tail))
}

/// A write that was cut short ends without its line end; a file system may also have made room for
/// it and then lost the bytes.
fn is_torn(line: &[u8]) -> bool {
    !line.ends_with(b"\n") || line.contains(&0)
}

impl Row {
    /// Status, end, revocation, serial, place and subject, as OpenSSL's `ca` writes them.
    pub(super) fn line(&self) -> String {
        let device = self.device.as_ref().map(DeviceId::as_str);
        let name = device.or(self.server.as_deref()).unwrap_or_default();
        let (status, revocation) = match self.revoked {
            Some(revoked) => ('R', revocation(revoked)),
            None => ('V', String::new()),
        };
        let (end, serial) = (time_text(self.expires_at), self.serial);
        let place = place_text(self.place, self.newer);
        format!("{status}\t{end}\t{revocation}\t{serial:X}\t{place}\t/CN={name}\n")
    }
}

/// The line of a revocation whose certificate is not here. It ends with the CA, which no certificate
/// outlives.
pub(super) fn foretold_line(serial: &Serial, revoked: Revoked, ca_ends_at: u64) -> String {
    let (end, revocation) = (time_text(ca_ends_at), revocation(revoked));
    format!("R\t{end}\t{revocation}\t{serial:X}\t{FORETOLD}\t/CN=\n")
}

fn revocation((at, reason): Revoked) -> String {
    match reason {
        Reason::Unspecified => time_text(at),
        reason => format!("{},{reason}", time_text(at)),
    }
}

fn place_text(place: Place, newer: u32) -> String {
    match place {
        Place::Own => "unknown".to_owned(),
        Place::Server => SERVER.to_owned(),
        Place::Others(at) if newer == 0 => format!("{OTHERS}{at}"),
        Place::Others(at) => format!("{OTHERS}{at}-{newer}"),
    }
}

/// The place, and how many of the device's rows before it are newer.
fn read_place(text: &str) -> (Place, u32) {
    let others = |text: &str| {
        let (at, newer) = text.split_once('-').unwrap_or((text, "0"));
        Some((Place::Others(at.parse().ok()?), newer.parse().ok()?))
    };
    match text {
        SERVER => (Place::Server, 0),
        _ => text.strip_prefix(OTHERS).and_then(others).unwrap_or((Place::Own, 0)),
    }
}

fn read_line(line: &[u8]) -> Result<Line, &'static str> {
    let line = std::str::from_utf8(line).ok().filter(|line| !line.contains('\0'));
    let line = line.ok_or("not a line of text")?;
    let line = line.strip_suffix('\n').unwrap_or(line);
    let line = line.strip_suffix('\r').unwrap_or(line);
    let [status, end, revocation, serial, place, subject] = fields(line)?;
    let revoked = match (status, revocation) {
        ("V" | "E", "") => None,
        ("R", text) => Some(read_revocation(text).ok_or("the date of revocation is none")?),
        _ => return Err("the status is none of V, R with a date, and E"),
    };
    let expires_at = read_time(end).ok_or("the date of expiry is none")?;
    let serial = Serial::from_hex(serial)
        .ok_or("the serial number is not 1 to 20 bytes in hexadecimal digits")?;
    if let (Some(revoked), FORETOLD) = (revoked, place) {
        return Ok(Line::Foretold(serial, revoked));
    }
    let (place, newer) = read_place(place);
    let name = subject.strip_prefix("/CN=").filter(|_| place != Place::Server);
    let device = name.and_then(DeviceId::parse);
    Ok(Line::Row(Row { serial, device, server: None, expires_at, revoked, place, newer }))
}

fn fields(line: &str) -> Result<[&str; 6], &'static str> {
    let mut fields = line.split('\t');
    let six = std::array::from_fn(|_| fields.next());
    match (six, fields.next()) {
        ([Some(a), Some(b), Some(c), Some(d), Some(e), Some(f)], None) => Ok([a, b, c, d, e, f]),
        _ => Err("not six fields between tabs"),
    }
}

/// A date, behind which a reason may stand. A clock that was not set may have revoked at 0.
fn read_revocation(text: &str) -> Option<Revoked> {
    let (date, reason) = text.split_once(',').unwrap_or((text, ""));
    Some((read_time(date)?.max(1), Reason::parse(reason).unwrap_or(Reason::Unspecified)))
}

/// The serial number in a torn line that says revoked, as far as it goes; this program appends no such
/// lines, so something else has torn the file.
pub(super) fn torn_revocation(line: &[u8]) -> Option<String> {
    let line = String::from_utf8_lossy(line);
    let mut fields = line.split('\t');
    (fields.next()? == "R").then(|| fields.nth(2).unwrap_or_default().replace('\0', ""))
}

/// Copies the database with these changes; all else stays as it is to the letter, also what
/// `openssl ca` has done meanwhile. Returns a serial that has no line, if there is one.
pub(super) fn copy_changed(
    mut old: impl BufRead,
    mut new: impl io::Write,
    changes: &mut HashMap<Serial, Change>,
) -> io::Result<Option<Serial>> {
    let mut line = Vec::new();
    while old.read_until(b'\n', &mut line)? > 0 {
        match changed_line(&line, changes) {
            Some(changed) => new.write_all(changed.as_bytes())?,
            None => new.write_all(&line)?,
        }
        line.clear();
    }
    Ok(changes.keys().next().copied())
}

/// The line as it is from now on, if there is a change of it, which is then taken from the list.
fn changed_line(line: &[u8], changes: &mut HashMap<Serial, Change>) -> Option<String> {
    let line = std::str::from_utf8(line).ok()?;
    let [status, end, was, serial, place, subject] = fields(line).ok()?;
    match changes.remove(&Serial::from_hex(serial)?)? {
        Change::Gone => Some(String::new()),
        Change::Revoked(revoked) => {
            let is = revocation(revoked);
            Some(format!("R\t{end}\t{is}\t{serial}\t{place}\t{subject}"))
        }
        Change::Moved(to, newer) => {
            let to = place_text(to, newer.unwrap_or_else(|| read_place(place).1));
            Some(format!("{status}\t{end}\t{was}\t{serial}\t{to}\t{subject}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::record::Revocation;
    use crate::ca::record::tests::device;
    use crate::clock::Now;

    fn read_row(line: &str) -> Result<Row, &'static str> {
        match read_line(line.as_bytes())? {
            Line::Row(row) => Ok(row),
            Line::Foretold(..) => Err("foretold"),
        }
    }

    #[test]
    fn lines_of_our_own() {
        let (serial, device) = (Serial::from([0x41; 16]), device("d"));
        let row = Row::new(serial, device, 1_900_000_000);
        for (place, newer) in [(Place::Own, 0), (Place::Others(7), 0), (Place::Others(u32::MAX), 3)]
        {
            for revoked in [None, Some((5, Reason::Superseded)), Some((5, Reason::Unspecified))] {
                let row = Row { place, newer, revoked, ..row.clone() };
                assert_eq!(read_row(&row.line()), Ok(row));
            }
        }
        let server = Row { place: Place::Server, ..row.clone() };
        assert_eq!(read_row(&server.line()), Ok(Row { device: None, ..server }), "no device's");
        let revoked = (1_700_000_000, Reason::KeyCompromise);
        let line = foretold_line(&serial, revoked, 1_900_000_000);
        let rows = read_index(line.as_bytes()).unwrap().0;
        assert_eq!((rows.list.len(), rows.is_foretold(&serial)), (0, Some(revoked)));
        let both = read_index((line + &row.line()).as_bytes()).unwrap().0;
        assert_eq!((both.list.len(), both.is_foretold(&serial)), (1, None));
    }

    #[test]
    fn garbled_lines() {
        let line = Row::new(Serial::from([0x41; 16]), device("d"), 1_900_000_000).line();
        assert_eq!(line, "V\t300317174640Z\t\t41414141414141414141414141414141\tunknown\t/CN=d\n");
        let row = read_row(&line).unwrap();
        assert_eq!((row.line(), row.revoked), (line.clone(), None));
        let serial = "41".repeat(16);
        let with = |status: &str, end: &str, revocation: &str| {
            read_row(&format!("{status}\t{end}\t{revocation}\t{serial}\tunknown\t/CN=d\n"))
                .map(|row| (row.expires_at, row.revoked))
        };
        assert_eq!(with("E", "700101000000Z", ""), Ok((0, None)));
        assert_eq!(with("V", "20500101000000Z", ""), Ok((2_524_608_000, None)));
        assert_eq!(
            with("R", "491231235959Z", "240101000000Z"),
            Ok((2_524_607_999, Some((1_704_067_200, Reason::Unspecified))))
        );
        let reason = "20240101000000Z,keyCompromise";
        assert_eq!(
            with("R", "491231235959Z", reason),
            Ok((2_524_607_999, Some((1_704_067_200, Reason::KeyCompromise))))
        );
        // A clock that was not set has revoked, which counts all the same.
        for date in ["700101000000Z", "691231235959Z", "19500101000000Z,caCompromise"] {
            let revoked = Some((1, Reason::Unspecified));
            assert_eq!(with("R", "491231235959Z", date), Ok((2_524_607_999, revoked)), "{date}");
        }
        for (status, end, revocation) in [
            ("X", "300101000000Z", ""),
            ("", "300101000000Z", ""),
            ("V", "300101000000Z", "240101000000Z"),
            ("R", "300101000000Z", ""),
            ("R", "300101000000Z", "keyCompromise"),
            ("V", "301301000000Z", ""),
            ("V", "300230000000Z", ""),
            ("V", "300101000060Z", ""),
            ("V", "300101000000", ""),
            ("V", "+30101000000Z", ""),
            ("V", "Z", ""),
            ("V", "é0101000000Z", ""),
        ] {
            assert!(with(status, end, revocation).is_err(), "{status} {end} {revocation}");
        }
        let other = line.replace("41", "42");
        for bad in ["\n", "V\n", &line, &other.replacen("42", "4", 1), &other.replace("42", "424")]
        {
            let after = format!("{line}{bad}{}", line.replace("41", "43"));
            assert_eq!(read_index(after.as_bytes()).unwrap_err().0, 2);
            let last = read_index(format!("{line}{bad}").as_bytes());
            assert!(last.is_err(), "a whole line is not torn");
        }
    }

    #[test]
    fn lines_of_another_program() {
        let lines = [
            "V\t300101000000Z\t\t01\tunknown\t/CN=short\n",
            "V\t300101000000Z\t\t-7FEE\tunknown\t/CN=negative\n",
            "R\t300101000000Z\t240101000000Z\t7fFF\t01.pem\t/C=DE/O=X/CN=no device's name\n",
            "R\t300101000000Z\t240101000000Z\t00\tunknown\t\n",
        ];
        let (mut rows, _) = read_index(lines.concat().as_bytes()).unwrap();
        let now = Now { unix_ms: 1_800_000_000_000, mono_ms: 0 };
        let serial = |hex| Serial::from_hex(hex).unwrap();
        for (name, hex) in [("short", "01"), ("negative", "-7fee")] {
            assert!(rows.has_active(&device(name), now));
            assert_eq!(rows.device(rows.by_serial(&serial(hex)).unwrap()), Some(device(name)));
        }
        assert_eq!(rows.list.iter().filter(|slot| !slot.is_devices()).count(), 2);
        let at = 1_704_067_200;
        let expected = ["7FFF", "00"].map(|hex| Revocation {
            serial: serial(hex),
            at,
            reason: Reason::Unspecified,
        });
        assert!(rows.revocations(now.unix_s()).eq(expected));
        assert!(rows.insert(&Row::new(serial("007fff"), device("d"), 1)).is_none(), "twice");

        let mut copy = Vec::new();
        let revoked = |hex| (serial(hex), Change::Revoked((at, Reason::Unspecified)));
        let mut these = ["-7FEE", "01"].map(revoked).into_iter().collect();
        let missing = copy_changed(lines.concat().as_bytes(), &mut copy, &mut these).unwrap();
        assert_eq!(missing, None);
        let copied = String::from_utf8(copy).unwrap();
        let revoked =
            |n: usize| lines[n].replace("V\t300101000000Z\t", "R\t300101000000Z\t240101000000Z");
        assert_eq!(copied, [&revoked(0), &revoked(1), lines[2], lines[3]].concat());
    }
}
