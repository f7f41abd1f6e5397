//! What stands in Redis of the record: where, and as which bytes.
//!
//! | hash | field | value |
//! |---|---|---|
//! | `certs:<fp>:<bb>` | serial | version, `paid`, token's hash and `exp` or none, seal, DER |
//! | `revoked:<fp>:<bb>` | serial | version, time, reason, seal |
//! | `devices:<hh>` | device | its row, sealed (`devices::codec`) |
//!
//! `fp` is the beginning of the CA's fingerprint, so that another CA begins clean. The seal says that
//! an instance of our CA has written the value, for this very place; what is not sealed so counts as
//! absent.

use std::fmt;

use super::exchange::{Name, Place};
use crate::ca::record::merge::{Shared, bucket};
use crate::ca::record::{Reason, Revocation};
use crate::device::DeviceId;
use crate::devices::{Row, codec};
use crate::jwt::TokenHash;
use crate::mac::MacKey;
use crate::serial::Serial;

/// The first byte of a value. A value of another format counts as absent.
const FORMAT: u8 = 1;
/// The buckets of serials: what is drawn here begins with one of these bytes.
pub const SERIAL_BUCKETS: std::ops::RangeInclusive<u8> = 0x40..=0x7f;
/// Length of a seal.
const SEAL: usize = 16;

/// By what values are sealed, and what keeps the keys of one CA apart.
pub struct Keys {
    pub mac: MacKey,
    /// First 8 digits of the CA's fingerprint.
    pub fp: String,
}

/// A value as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Certificate(Shared),
    Revocation(Revocation),
    Row(DeviceId, Row),
}

impl Keys {
    pub fn certificates(&self, bucket: u8) -> String {
        format!("certs:{}:{bucket:02x}", self.fp)
    }

    pub fn revocations(&self, bucket: u8) -> String {
        format!("revoked:{}:{bucket:02x}", self.fp)
    }

    /// Where the value of a name stands.
    pub fn place(&self, name: &Name) -> Place {
        match name {
            Name::Certificate(serial) => {
                Place { key: self.certificates(bucket(serial)), field: serial.to_string() }
            }
            Name::Revocation(serial) => {
                Place { key: self.revocations(bucket(serial)), field: serial.to_string() }
            }
            Name::Row(device) => Place { key: codec::bucket(device), field: device.to_string() },
        }
    }

    /// The bytes of a value, for its place.
    pub fn seal(&self, value: &Value) -> Vec<u8> {
        let Place { key, field } = self.place(&value.name());
        let seal = |bytes| self.mac.seal(&key, field.as_bytes(), bytes);
        match value {
            Value::Certificate(shared) => {
                let mut bytes = head(shared);
                let length = bytes.len();
                bytes.extend(&shared.der);
                let mut sealed = seal(bytes);
                // The seal stands before the DER, which has no fixed length.
                sealed.get_mut(length..).unwrap_or_default().rotate_right(SEAL);
                sealed
            }
            Value::Revocation(Revocation { at, reason, .. }) => {
                seal([&[FORMAT], &at.to_be_bytes()[..], &[reason.number()]].concat())
            }
            Value::Row(device, row) => codec::seal(&self.mac, device, row),
        }
    }

    /// What stands there, or `None` if no instance of our CA has written it for this name.
    pub fn open(&self, name: &Name, value: &[u8]) -> Option<Value> {
        match name {
            Name::Certificate(serial) => self.open_certificate(*serial, value),
            Name::Revocation(serial) => self.open_revocation(*serial, value),
            Name::Row(device) => {
                let row = codec::open(&self.mac, device, value)?;
                Some(Value::Row(device.clone(), row))
            }
        }
    }

    fn open_certificate(&self, serial: Serial, value: &[u8]) -> Option<Value> {
        let length = if *value.get(9)? == 0 { 10 } else { 10 + 32 + 8 };
        let mut value = value.to_vec();
        value.get_mut(length..).filter(|rest| rest.len() >= SEAL)?.rotate_left(SEAL);
        let Place { key, field } = self.place(&Name::Certificate(serial));
        let (head, der) =
            self.mac.open(&key, field.as_bytes(), &value)?.split_at_checked(length)?;
        let (&[FORMAT, ref paid @ ..], rest) = head.split_first_chunk::<9>()? else { return None };
        let token = match rest {
            [0] => None,
            [1, token @ ..] => {
                let (hash, exp) = token.split_first_chunk::<32>()?;
                Some((TokenHash(*hash), u64::from_be_bytes(exp.try_into().ok()?)))
            }
            _ => return None,
        };
        let paid = u64::from_be_bytes(*paid);
        Some(Value::Certificate(Shared { serial, paid, token, der: der.to_vec() }))
    }

    fn open_revocation(&self, serial: Serial, value: &[u8]) -> Option<Value> {
        let Place { key, field } = self.place(&Name::Revocation(serial));
        let [FORMAT, at @ .., reason] = self.mac.open(&key, field.as_bytes(), value)? else {
            return None;
        };
        let at = u64::from_be_bytes(at.try_into().ok()?);
        Some(Value::Revocation(Revocation { serial, at, reason: Reason::numbered(*reason) }))
    }
}

/// What stands before seal and DER of a certificate.
fn head(shared: &Shared) -> Vec<u8> {
    let mut head = vec![FORMAT];
    head.extend(shared.paid.to_be_bytes());
    head.push(u8::from(shared.token.is_some()));
    if let Some((hash, exp)) = &shared.token {
        head.extend(hash.0);
        head.extend(exp.to_be_bytes());
    }
    head
}

impl Value {
    pub fn name(&self) -> Name {
        match self {
            Value::Certificate(shared) => Name::Certificate(shared.serial),
            Value::Revocation(revocation) => Name::Revocation(revocation.serial),
            Value::Row(device, _) => Name::Row(device.clone()),
        }
    }

    /// What two instances know of the same name. A certificate never changes.
    pub fn merge(self, other: Value) -> Value {
        match (self, other) {
            (Value::Revocation(one), Value::Revocation(other)) => {
                Value::Revocation(std::cmp::min_by_key(one, other, |r| (r.at, r.reason)))
            }
            (Value::Row(device, one), Value::Row(_, other)) => Value::Row(device, one.merge(other)),
            (_, other) => other,
        }
    }
}

/// As it stands in an entry of the stream.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Certificate(serial) | Name::Revocation(serial) => serial.fmt(f),
            Name::Row(device) => device.fmt(f),
        }
    }
}

impl Name {
    /// The field of an entry of the stream under which it stands.
    pub fn kind(&self) -> &'static str {
        match self {
            Name::Certificate(_) => "cert",
            Name::Revocation(_) => "revoked",
            Name::Row(_) => "device",
        }
    }

    /// Reads field and value of an entry.
    pub fn read(kind: &str, name: &str) -> Option<Self> {
        match kind {
            "cert" => Serial::from_hex(name).map(Name::Certificate),
            "revoked" => Serial::from_hex(name).map(Name::Revocation),
            "device" => DeviceId::parse(name).map(Name::Row),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Bound;

    fn keys(secret: &[u8]) -> Keys {
        Keys { mac: MacKey::derive(secret), fp: "0a1b2c3d".to_owned() }
    }

    fn serial(byte: u8) -> Serial {
        Serial::from([byte; 16])
    }

    /// Each value with its bytes and the name under which they stand.
    fn sealed(keys: &Keys) -> Vec<(Name, Value, Vec<u8>)> {
        let token = Some((TokenHash([7; 32]), 1_800_000_300));
        let certificate =
            |token| Shared { serial: serial(0x41), paid: 9, token, der: vec![1; 400] };
        let revocation = Revocation { serial: serial(0x41), at: 5, reason: Reason::KeyCompromise };
        let device = DeviceId::parse("d").unwrap();
        let row = Row { bound: Bound { t: 3, c: 2 }, ..Row::default() };
        let mut values = Vec::new();
        for value in [
            Value::Certificate(certificate(token)),
            Value::Certificate(certificate(None)),
            Value::Revocation(revocation),
            Value::Row(device, row),
        ] {
            values.push((value.name(), value.clone(), keys.seal(&value)));
        }
        values
    }

    #[test]
    fn a_value_opens_in_its_own_place_and_by_its_own_ca_only() {
        let keys_here = keys(b"ours");
        let elsewhere = Keys { fp: "00000000".to_owned(), ..keys(b"ours") };
        let names = [
            Name::Certificate(serial(0x42)),
            Name::Revocation(serial(0x42)),
            Name::Row(DeviceId::parse("e").unwrap()),
        ];
        for (name, value, bytes) in sealed(&keys_here) {
            assert_eq!(keys_here.open(&name, &bytes), Some(value));
            assert_eq!(keys(b"another").open(&name, &bytes), None);
            assert!(names.iter().all(|name| keys_here.open(name, &bytes).is_none()), "{name}");
            if !matches!(name, Name::Row(_)) {
                assert_eq!(elsewhere.open(&name, &bytes), None, "of another CA");
            }
            for at in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 1;
                assert_eq!(keys_here.open(&name, &changed), None, "{name}, byte {at}");
                assert_eq!(keys_here.open(&name, &bytes[..at]), None, "{name}, cut at {at}");
            }
        }
    }

    #[test]
    fn where_values_stand_and_what_an_entry_names() {
        let keys = keys(b"ours");
        let place = |name: &Name| (keys.place(name).key, keys.place(name).field);
        let hex = "c1".to_owned() + &"00".repeat(15);
        let old = Serial::from_hex(&format!("-{}", "3f".repeat(16))).unwrap();
        let certificate = Name::Certificate(serial(0x7f));
        assert_eq!(place(&certificate), ("certs:0a1b2c3d:7f".to_owned(), "7f".repeat(16)));
        // The older service drew negative ones, too.
        assert_eq!(place(&Name::Revocation(old)).0, "revoked:0a1b2c3d:40");
        assert!(Serial::from_hex(&hex).is_none_or(|s| SERIAL_BUCKETS.contains(&bucket(&s))));
        let row = Name::Row(DeviceId::parse("d").unwrap());
        assert_eq!(place(&row), ("devices:18".to_owned(), "d".to_owned()));
        for name in [certificate, Name::Revocation(serial(0x41)), row] {
            assert_eq!(Name::read(name.kind(), &name.to_string()), Some(name));
        }
        for (kind, name) in [("begin", ""), ("cert", "xyz"), ("device", "a/b"), ("revoked", "")] {
            assert_eq!(Name::read(kind, name), None, "{kind} {name}");
        }
    }
}
