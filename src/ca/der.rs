//! DER (X.690, 10): elements read one after the other, and written.

use time::{Date, Month, Time};
use x509_parser::asn1_rs::{Any, FromDer as _, Tag};

use crate::clock;

/// DER elements, one after the other.
#[derive(Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn any(&mut self) -> Option<Any<'a>> {
        let (rest, any) = Any::from_der(self.0).ok()?;
        self.0 = rest;
        Some(any)
    }

    /// The content of the next element.
    pub fn next(&mut self, tag: Tag) -> Option<&'a [u8]> {
        self.any().filter(|any| any.tag() == tag).map(|any| any.data)
    }

    /// The next element with its head.
    pub fn element(&mut self, tag: Tag) -> Option<&'a [u8]> {
        self.element_of(|found| found == tag)
    }

    /// The rest, each element with its head.
    pub fn elements(mut self) -> Option<Vec<&'a [u8]>> {
        let mut elements = Vec::new();
        while !self.is_empty() {
            elements.push(self.element_of(|_| true)?);
        }
        Some(elements)
    }

    fn element_of(&mut self, fits: impl Fn(Tag) -> bool) -> Option<&'a [u8]> {
        let before = self.0;
        self.any().filter(|any| fits(any.tag()))?;
        before.get(..before.len() - self.0.len())
    }
}

/// The content of the one element that `der` is.
pub fn whole(der: &[u8], tag: Tag) -> Option<&[u8]> {
    let mut reader = Reader(der);
    reader.next(tag).filter(|_| reader.is_empty())
}

/// Tag, length (X.690, 8.1.3) and content.
pub fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut der = vec![tag];
    match u8::try_from(content.len()) {
        Ok(short @ 0..=127) => der.push(short),
        _ => {
            let be = content.len().to_be_bytes();
            let len: Vec<u8> = be.into_iter().skip_while(|b| *b == 0).collect();
            der.push(0x80 | len.len() as u8);
            der.extend(len);
        }
    }
    der.extend(content);
    der
}

/// A Time: UTCTime until 2049, GeneralizedTime from 2050 on (RFC 5280, 4.1.2.5).
pub fn time(unix_s: u64) -> Vec<u8> {
    let text = time_text(unix_s);
    tlv(if text.len() == "YYMMDDhhmmssZ".len() { 0x17 } else { 0x18 }, text.as_bytes())
}

/// The text of [`time()`].
pub fn time_text(unix_s: u64) -> String {
    let at = clock::utc(unix_s);
    let year = match at.year() {
        year @ 1950..2050 => format!("{:02}", year % 100),
        year => format!("{year:04}"),
    };
    let (month, day) = (u8::from(at.month()), at.day());
    let (hour, minute, second) = at.to_hms();
    format!("{year}{month:02}{day:02}{hour:02}{minute:02}{second:02}Z")
}

/// Reads what [`time_text`] writes, and four digits of any year; a date before 1970 is 1970.
pub fn read_time(text: &str) -> Option<u64> {
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

    #[test]
    fn lengths() {
        for (len, head) in [
            (0, vec![4, 0]),
            (127, vec![4, 127]),
            (128, vec![4, 0x81, 128]),
            (256, vec![4, 0x82, 1, 0]),
        ] {
            let der = tlv(4, &vec![7; len]);
            assert_eq!(der[..der.len() - len], head);
            assert_eq!(whole(&der, Tag::OctetString).map(<[u8]>::len), Some(len));
        }
    }

    #[test]
    fn elements_keep_their_heads() {
        let der = [tlv(2, &[5]), tlv(0x30, &[]), tlv(0xa0, &[1, 2])].concat();
        let expected: [&[u8]; 3] = [&[2, 1, 5], &[0x30, 0], &[0xa0, 2, 1, 2]];
        assert_eq!(
            Reader(&der).elements(),
            Some(expected.map(<[u8]>::to_vec).iter().map(Vec::as_slice).collect())
        );
        assert_eq!(Reader(&der[..7]).elements(), None);
        assert_eq!(whole(&der, Tag::Integer), None, "more follows");
    }
}
