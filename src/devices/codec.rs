//! A row as bytes: as it is held in memory, and, sealed, as it stands in Redis.
//!
//! Numbers are written seven bits a byte, lowest first, so that a register of which nothing is known
//! takes one byte. The bound and the block come first: they are asked for with every token.

use std::collections::BTreeSet;

use sha2::{Digest as _, Sha256};

use super::{Block, Bound, Instance, Registration, Row, SecretHash, Terms, Text};
use crate::device::DeviceId;
use crate::mac::MacKey;

/// The first byte of a value in Redis. A value of another format counts as absent.
const FORMAT: u8 = 2;

/// What stands before a registration.
const NONE: u8 = 0;
const FORGOTTEN: u8 = 1;
const WITHOUT_SECRET: u8 = 2;
const WITH_SECRET: u8 = 3;

/// The key of the hash that holds the device's row in Redis, without prefix: one of 256.
pub fn bucket(device: &DeviceId) -> String {
    let [first, ..] = <[u8; 32]>::from(Sha256::digest(device.as_str().as_bytes()));
    bucket_key(first)
}

pub fn bucket_key(of: u8) -> String {
    format!("devices:{of:02x}")
}

/// The row as a value in Redis.
pub fn seal(key: &MacKey, device: &DeviceId, row: &Row) -> Vec<u8> {
    let mut value = vec![FORMAT];
    encode(row, &mut value);
    key.seal(&bucket(device), device.as_str().as_bytes(), value)
}

/// The row of a value in Redis, or `None` if no instance of our CA has written it for this device.
pub fn open(key: &MacKey, device: &DeviceId, sealed: &[u8]) -> Option<Row> {
    match key.open(&bucket(device), device.as_str().as_bytes(), sealed)?.split_first()? {
        (&FORMAT, row) => decode(row),
        _ => None,
    }
}

pub(super) fn encode(row: &Row, out: &mut Vec<u8>) {
    let Row { bound, block, registration, spent } = row;
    for number in [bound.t, bound.c, block.blocked, block.lifted, block.changed] {
        push_number(number, out);
    }
    match registration {
        None => out.push(NONE),
        Some(registration) => push_registration(registration, out),
    }
    push_number(spent.len() as u64, out);
    spent.iter().for_each(|secret| out.extend(secret.0));
}

pub(super) fn decode(bytes: &[u8]) -> Option<Row> {
    let mut bytes = Bytes(bytes);
    let (bound, block) = bytes.bound_and_block()?;
    let registration = match bytes.byte()? {
        NONE => None,
        kind => Some(bytes.registration(kind)?),
    };
    let spent = (0..bytes.number()?).map(|_| bytes.secret()).collect::<Option<BTreeSet<_>>>()?;
    bytes.0.is_empty().then_some(Row { bound, block, registration, spent })
}

/// As much of a row as is asked for with every token.
pub(super) fn decode_bound(bytes: &[u8]) -> Option<(Bound, Block)> {
    Bytes(bytes).bound_and_block()
}

fn push_registration(registration: &Registration, out: &mut Vec<u8>) {
    let Registration { version, instance, made_at, made_by, terms } = registration;
    out.push(match terms {
        None => FORGOTTEN,
        Some(Terms { secret: None, .. }) => WITHOUT_SECRET,
        Some(_) => WITH_SECRET,
    });
    push_number(*version, out);
    out.extend(instance.0);
    push_number(*made_at, out);
    push_text(made_by.as_ref(), out);
    let Some(Terms { secret, end, cert_days, note }) = terms else { return };
    secret.iter().for_each(|secret| out.extend(secret.0));
    push_number(*end, out);
    // One more than the number, so that none is zero.
    push_number(cert_days.map_or(0, |days| u64::from(days) + 1), out);
    push_text(note.as_ref(), out);
}

/// No text is written as an empty one, which no text is.
fn push_text(text: Option<&Text>, out: &mut Vec<u8>) {
    let text = text.map_or("", Text::as_str);
    push_number(text.len() as u64, out);
    out.extend(text.as_bytes());
}

fn push_number(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// What is yet to be read. Every reader gives `None` where the bytes are not what it looks for.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn text(&mut self) -> Option<Option<Text>> {
        let length = usize::try_from(self.number()?).ok()?;
        match std::str::from_utf8(self.take(length)?).ok()? {
            "" => Some(None),
            text => Text::parse(text).map(Some),
        }
    }

    fn secret(&mut self) -> Option<SecretHash> {
        Some(SecretHash(self.take(32)?.try_into().ok()?))
    }

    fn bound_and_block(&mut self) -> Option<(Bound, Block)> {
        let bound = Bound { t: self.number()?, c: self.number()? };
        let (blocked, lifted) = (self.number()?, self.number()?);
        Some((bound, Block { blocked, lifted, changed: self.number()? }))
    }

    fn registration(&mut self, kind: u8) -> Option<Registration> {
        Some(Registration {
            version: self.number()?,
            instance: Instance(self.take(16)?.try_into().ok()?),
            made_at: self.number()?,
            made_by: self.text()?,
            terms: match kind {
                FORGOTTEN => None,
                WITHOUT_SECRET => Some(self.terms(None)?),
                WITH_SECRET => {
                    let secret = self.secret()?;
                    Some(self.terms(Some(secret))?)
                }
                _ => return None,
            },
        })
    }

    fn terms(&mut self, secret: Option<SecretHash>) -> Option<Terms> {
        let end = self.number()?;
        let cert_days = match self.number()? {
            0 => None,
            days => Some(u32::try_from(days - 1).ok()?),
        };
        Some(Terms { secret, end, cert_days, note: self.text()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::fixture::{bound, full, registration};
    use crate::devices::merge::random::Random;

    fn bytes(row: &Row) -> Vec<u8> {
        let mut out = Vec::new();
        encode(row, &mut out);
        out
    }

    fn device(id: &str) -> DeviceId {
        DeviceId::parse(id).unwrap()
    }

    #[test]
    fn a_row_reads_back() {
        let mut random = Random(1);
        let drawn = (0..20_000).map(|_| random.row());
        let most = Row {
            registration: Some(Registration {
                terms: Some(Terms {
                    secret: None,
                    end: u64::MAX,
                    cert_days: Some(u32::MAX),
                    note: Text::parse(&"\u{1f600}".repeat(64)),
                }),
                ..registration(u64::MAX, 0)
            }),
            ..bound(u64::MAX, u64::MAX)
        };
        for row in drawn.chain([Row::default(), full(), most]) {
            let bytes = bytes(&row);
            assert_eq!(decode_bound(&bytes), Some((row.bound, row.block)));
            assert_eq!(decode(&bytes), Some(row));
        }
        assert_eq!(bytes(&Row::default()), [0; 7]);
        assert_eq!(bytes(&bound(1_764_237_600, 0)).len(), 11);
    }

    #[test]
    fn bytes_that_are_no_row() {
        let row = bytes(&full());
        for at in 0..row.len() {
            assert_eq!(decode(&row[..at]), None, "cut at {at}");
        }
        assert_eq!(decode(&[&row[..], &[0]].concat()), None, "something follows");
        let head = [0; 5];
        let after = |rest: &[u8]| decode(&[&head[..], rest].concat());
        let instance = [7; 16];
        let registration = |kind: u8, rest: &[u8]| {
            after(&[&[kind, 1][..], &instance, &[1], rest, &[0]].concat()).is_some()
        };
        assert!(registration(FORGOTTEN, &[1, b'x']), "what the rows below are changed from");
        assert!(!registration(4, &[1, b'x', 0, 0, 0]), "a kind that is none");
        assert!(!registration(FORGOTTEN, &[1, 0xff]), "not UTF-8");
        assert!(!registration(FORGOTTEN, &[1, b'\t']), "a control character");
        assert!(!registration(FORGOTTEN, &[0xff; 10]), "a length beyond 64 bits");
        let days = |days: &[u8]| registration(WITHOUT_SECRET, &[&[0, 1], days, &[0]].concat());
        assert!(days(&[0x80, 0x80, 0x80, 0x80, 0x10]) && !days(&[0x81, 0x80, 0x80, 0x80, 0x10]));
        assert_eq!(after(&[NONE, 0xff, 0xff, 0xff, 0xff, 0x0f]), None, "more secrets than bytes");
        let number = |bytes: &[u8]| Bytes(bytes).number();
        assert_eq!(number(&[0xff; 9]), None);
        assert_eq!(number(&[&[0xff; 9][..], &[1]].concat()), Some(u64::MAX));
        assert_eq!(number(&[&[0xff; 9][..], &[2]].concat()), None, "beyond 64 bits");
    }

    #[test]
    fn a_value_in_redis_is_ours_and_the_devices() {
        let key = MacKey::derive(b"the CA's number");
        let (d, e) = (device("device-001"), device("device-002"));
        let sealed = seal(&key, &d, &full());
        assert_eq!(open(&key, &d, &sealed), Some(full()));
        assert_eq!(open(&key, &e, &sealed), None);
        assert_eq!(open(&MacKey::derive(b"another"), &d, &sealed), None);
        assert_eq!(open(&key, &d, b""), None);
        let names = (bucket(&d), d.as_str().as_bytes());
        for value in [&[][..], &[FORMAT], &[2, 0, 0, 0, 0, 0, 0]] {
            let sealed = key.seal(&names.0, names.1, value.to_vec());
            assert_eq!(open(&key, &d, &sealed), None, "rightly sealed, but no row: {value:?}");
        }
        assert_eq!(bucket(&d), "devices:99", "sha256sum of the id");
    }
}
