//! `index.txt` as bytes: its lines and their times, as OpenSSL's `ca` writes them, read as a whole
//! and copied line by line. Pure: whose bytes they are, the caller knows.

use std::collections::HashMap;
use std::io::{self, BufRead};

use time::{Date, Month, Time};

use super::rows::{Row, Rows};
use crate::ca::der::time_text;
use crate::device::DeviceId;
use crate::serial::Serial;

/// What the bytes say.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) rows: Rows,
    /// The last line, if it has no end but reads as a line: an editor has left it so, or it was torn
    /// in its last field, the subject.
    pub(super) unended: Option<Row>,
    /// The length of the whole lines; what follows is the unended one, or torn.
    pub(super) whole: usize,
}

/// Reads the database, whose last line may be torn. `Err` is the number of a line, counted from 1,
/// and what is wrong with it.
pub(super) fn read_index(bytes: &[u8]) -> Result<Index, (usize, &'static str)> {
    let count = bytes.iter().filter(|b| **b == b'\n').count();
    let mut index = Index { rows: Rows::with_room(count), unended: None, whole: 0 };
    for (number, line) in (1..).zip(bytes.split_inclusive(|b| *b == b'\n')) {
        let row = read_line(line);
        if index.whole + line.len() == bytes.len() && is_torn(line) {
            index.unended = row.ok().filter(|row| index.rows.by_serial(&row.serial).is_none());
            break;
        }
        row.and_then(|row| index.rows.accept(row)).map_err(|why| (number, why))?;
        index.whole += line.len();
    }
    Ok(index)
}

/// A write that was cut short ends without its line end; a file system may also have made room for
/// it and then lost the bytes.
fn is_torn(line: &[u8]) -> bool {
    !line.ends_with(b"\n") || line.contains(&0)
}

impl Row {
    /// Status, end, revocation, serial, file and subject, as OpenSSL's `ca` writes them.
    pub(super) fn line(&self) -> String {
        let (status, revocation) = match self.revoked() {
            Some(at) => ('R', time_text(at)),
            None => ('V', String::new()),
        };
        let (end, serial) = (time_text(self.expires_at), self.serial);
        let device = self.device.as_ref().map_or("", DeviceId::as_str);
        format!("{status}\t{end}\t{revocation}\t{serial:X}\tunknown\t/CN={device}\n")
    }
}

fn read_line(line: &[u8]) -> Result<Row, &'static str> {
    let line = std::str::from_utf8(line).ok().filter(|line| !line.contains('\0'));
    let line = line.ok_or("not a line of text")?;
    let line = line.strip_suffix('\n').unwrap_or(line);
    let fields: Vec<&str> = line.strip_suffix('\r').unwrap_or(line).split('\t').collect();
    let [status, end, revocation, serial, _file, subject] = fields.as_slice() else {
        return Err("not six fields between tabs");
    };
    let revoked_at = match (*status, *revocation) {
        ("V" | "E", "") => None,
        // The reason, if one follows, is for OpenSSL only.
        ("R", date) => {
            let date = date.split(',').next().unwrap_or_default();
            Some(read_time(date).ok_or("the date of revocation is none")?)
        }
        _ => return Err("the status is none of V, R with a date, and E"),
    };
    let expires_at = read_time(end).ok_or("the date of expiry is none")?;
    let serial = Serial::from_hex(serial)
        .ok_or("the serial number is not 1 to 20 bytes in hexadecimal digits")?;
    let device = subject.strip_prefix("/CN=").and_then(DeviceId::parse);
    Ok(Row::new(serial, device, expires_at, revoked_at))
}

/// The serial number in a torn line that says revoked, as far as it goes; this program appends no such
/// lines, so something else has torn the file.
pub(super) fn torn_revocation(line: &[u8]) -> Option<String> {
    let line = String::from_utf8_lossy(line);
    let mut fields = line.split('\t');
    (fields.next()? == "R").then(|| fields.nth(2).unwrap_or_default().replace('\0', ""))
}

/// Copies the database with these certificates revoked, each at its time; all else stays as it is to the letter, also
/// what `openssl ca` has done meanwhile. Returns a serial that has no
/// line, if there is one.
pub(super) fn copy_revoked(
    mut old: impl BufRead,
    mut new: impl io::Write,
    mut serials: HashMap<Serial, u64>,
) -> io::Result<Option<Serial>> {
    let mut line = Vec::new();
    while old.read_until(b'\n', &mut line)? > 0 {
        match revoked_line(&line, &mut serials) {
            Some(revoked) => new.write_all(revoked.as_bytes())?,
            None => new.write_all(&line)?,
        }
        line.clear();
    }
    new.flush()?;
    Ok(serials.into_keys().next())
}

/// The line as revoked, if it is one of these, which it is then taken from.
fn revoked_line(line: &[u8], serials: &mut HashMap<Serial, u64>) -> Option<String> {
    let line = std::str::from_utf8(line).ok()?;
    let revoked_at = serials.remove(&Serial::from_hex(line.split('\t').nth(3)?)?)?;
    let fields: Vec<&str> = line.split('\t').collect();
    let ["V" | "E", end, _, rest @ ..] = fields.as_slice() else { return None };
    Some(format!("R\t{end}\t{}\t{}", time_text(revoked_at), rest.join("\t")))
}

/// Reads either form; a date before 1970 is 1970.
fn read_time(text: &str) -> Option<u64> {
    let digits = text.strip_suffix('Z').filter(|d| d.bytes().all(|b| b.is_ascii_digit()))?;
    let (year, rest) = digits.split_at_checked(digits.len().checked_sub(10)?)?;
    let year = match (year.len(), year.parse::<i32>().ok()?) {
        (2, year @ 0..50) => 2000 + year,
        (2, year) => 1900 + year,
        (4, year) => year,
        _ => return None,
    };
    let pair = |at: usize| rest.get(at..at + 2)?.parse::<u8>().ok();
    let date = Date::from_calendar_date(year, Month::try_from(pair(0)?).ok()?, pair(2)?).ok()?;
    let time = Time::from_hms(pair(4)?, pair(6)?, pair(8)?).ok()?;
    Some(u64::try_from(date.with_time(time).assume_utc().unix_timestamp()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::record::fixture::device;
    use crate::clock::Now;

    #[test]
    fn garbled_lines() {
        let line = Row::new(Serial::from([0x41; 16]), device("d"), 1_900_000_000, None).line();
        assert_eq!(line, "V\t300317174640Z\t\t41414141414141414141414141414141\tunknown\t/CN=d\n");
        let row = read_line(line.as_bytes()).unwrap();
        assert_eq!((row.line(), row.revoked()), (line.clone(), None));
        let serial = "41".repeat(16);
        let with = |status: &str, end: &str, revocation: &str| {
            read_line(
                format!("{status}\t{end}\t{revocation}\t{serial}\tunknown\t/CN=d\n").as_bytes(),
            )
            .map(|row| (row.expires_at, row.revoked()))
        };
        assert_eq!(with("E", "700101000000Z", ""), Ok((0, None)));
        assert_eq!(with("V", "20500101000000Z", ""), Ok((2_524_608_000, None)));
        assert_eq!(
            with("R", "491231235959Z", "240101000000Z"),
            Ok((2_524_607_999, Some(1_704_067_200)))
        );
        let reason = "20240101000000Z,keyCompromise";
        assert_eq!(with("R", "491231235959Z", reason), Ok((2_524_607_999, Some(1_704_067_200))));
        // A clock that was not set has revoked, which counts all the same.
        for date in ["700101000000Z", "691231235959Z", "19500101000000Z,superseded"] {
            assert_eq!(with("R", "491231235959Z", date), Ok((2_524_607_999, Some(1))), "{date}");
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
        let Index { mut rows, .. } = read_index(lines.concat().as_bytes()).unwrap();
        let now = Now { unix_ms: 1_800_000_000_000, mono_ms: 0 };
        let serial = |hex| Serial::from_hex(hex).unwrap();
        for (name, hex) in [("short", "01"), ("negative", "-7fee")] {
            assert!(rows.has_active(&device(name), now));
            assert_eq!(
                rows.by_serial(&serial(hex)).unwrap().certificate().unwrap().device,
                device(name)
            );
        }
        assert_eq!(rows.foreign(), 2);
        let at = 1_704_067_200;
        assert_eq!(rows.revoked(now), [(serial("7FFF"), at), (serial("00"), at)]);
        assert!(rows.accept(Row::new(serial("007fff"), device("d"), 1, None)).is_err(), "twice");

        let mut copy = Vec::new();
        let these = [(serial("-7FEE"), at), (serial("01"), at)].into_iter().collect();
        let missing = copy_revoked(lines.concat().as_bytes(), &mut copy, these).unwrap();
        assert_eq!(missing, None);
        let copied = String::from_utf8(copy).unwrap();
        let revoked =
            |n: usize| lines[n].replace("V\t300101000000Z\t", "R\t300101000000Z\t240101000000Z");
        assert_eq!(copied, [&revoked(0), &revoked(1), lines[2], lines[3]].concat());
    }
}
