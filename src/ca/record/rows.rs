//! The record in memory: what of each certificate must be known without asking the disk, and the
//! tokens that were redeemed for them. Pure: it reads no file and takes no lock.
//!
//! A certificate takes 56 bytes, its name (held once for each device, however many certificates it
//! has) as many as it has characters and one more, and two indexes of four bytes a place each.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher as _, Hash, RandomState};

use super::{CLOCK_SLACK_S, Certificate, Reason, Redeemed, Revocation, Spent};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::TokenHash;
use crate::serial::Serial;

#[derive(Debug, Default)]
pub(super) struct Rows {
    /// In the order of `index.txt`.
    pub(super) list: Vec<Slot>,
    /// Names of devices one after the other, the length before each.
    names: Vec<u8>,
    by_serial: Places,
    /// The newest of each device.
    by_device: Places,
    hasher: RandomState,
    /// Revocations of certificates that are not here yet.
    foretold: BTreeMap<Serial, Revoked>,
    tokens: HashMap<TokenHash, TokenRow>,
    /// The number of tokens at which those that have ended are dropped next.
    crowded: usize,
}

/// When a certificate was revoked (never 0), and why. The earlier of two counts.
pub(super) type Revoked = (u64, Reason);

/// Where a certificate's bytes are; in `index.txt` its fifth field, which OpenSSL does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In a file of its own, or elsewhere if another program has signed it.
    Own,
    /// The same, and it is a server's, which never counts as a device's.
    Server,
    /// In the file of those that other instances have signed, from this byte on.
    Others(u32),
}

/// A certificate as a line of `index.txt` tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) serial: Serial,
    /// `None` for what is no device's: it counts for the list only.
    pub(super) device: Option<DeviceId>,
    /// The name of a server that is entered just now.
    pub(super) server: Option<String>,
    pub(super) expires_at: u64,
    pub(super) revoked: Option<Revoked>,
    pub(super) place: Place,
    /// How many of the device's rows that stand before this one are newer nevertheless: what other
    /// instances have signed comes in any order.
    pub(super) newer: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) expires_at: u64,
    /// 0 if it was not revoked.
    revoked_at: u64,
    pub(super) place: Place,
    /// Where the device's name begins, or [`NONE`].
    name: u32,
    /// The device's next older row, or [`NONE`].
    older: u32,
    pub(super) serial: Serial,
    reason: Reason,
}

#[derive(Clone, Copy, Debug)]
struct TokenRow {
    iat: u64,
    exp: u64,
    row: u32,
}

const NONE: u32 = u32::MAX;

impl Row {
    /// One that is signed here and valid.
    pub(super) fn new(
        serial: Serial,
        device: impl Into<Option<DeviceId>>,
        expires_at: u64,
    ) -> Self {
        let device = device.into();
        Row { serial, device, server: None, expires_at, revoked: None, place: Place::Own, newer: 0 }
    }

    pub(super) fn is_of(&self, device: &DeviceId) -> bool {
        self.device.as_ref() == Some(device)
    }

    pub(super) fn is_active(&self, now: Now) -> bool {
        self.revoked.is_none() && now.unix_s() <= self.expires_at
    }
}

impl Slot {
    pub(super) fn revoked(&self) -> Option<Revoked> {
        (self.revoked_at != 0).then_some((self.revoked_at, self.reason))
    }

    pub(super) fn is_active(&self, now: Now) -> bool {
        self.revoked_at == 0 && now.unix_s() <= self.expires_at
    }

    pub(super) fn is_devices(&self) -> bool {
        self.name != NONE
    }

    /// What `names` holds for it.
    fn name<'a>(&self, names: &'a [u8]) -> Option<&'a [u8]> {
        let [length, rest @ ..] = names.get(self.name as usize..)? else { return None };
        rest.get(..usize::from(*length))
    }
}

impl Rows {
    pub(super) fn with_room(count: usize) -> Self {
        let mut rows = Rows { list: Vec::with_capacity(count), ..Rows::default() };
        rows.by_serial.make_room(count, |_| 0);
        rows.by_device.make_room(count, |_| 0);
        rows
    }

    /// Those that other instances have signed, with where each begins in their file.
    pub(super) fn others(&self) -> impl Iterator<Item = (u32, &Slot)> {
        self.list.iter().filter_map(|slot| match slot.place {
            Place::Others(at) => Some((at, slot)),
            Place::Own | Place::Server => None,
        })
    }

    pub(super) fn by_serial(&self, serial: &Serial) -> Option<&Slot> {
        self.list.get(self.place_of(serial)?)
    }

    /// Whether these are just the certificates that have a file of their own. Their sums are compared:
    /// to look up each of many takes a fifth of a start.
    pub(super) fn have_files(&self, named: &[Serial]) -> bool {
        let sum = |count_and_sum: (u32, u64), serial: &Serial| {
            (count_and_sum.0 + 1, count_and_sum.1.wrapping_add(self.hash(serial)))
        };
        let own = self.list.iter().filter(|slot| !matches!(slot.place, Place::Others(_)));
        named.iter().fold((0, 0), sum) == own.map(|slot| &slot.serial).fold((0, 0), sum)
    }

    /// Where a row stands in the order of `index.txt`.
    pub(super) fn place_of(&self, serial: &Serial) -> Option<usize> {
        let is = |at: u32| self.slot(at).is_some_and(|slot| slot.serial == *serial);
        self.by_serial.find(self.hash(serial), is).map(|at| at as usize)
    }

    pub(super) fn of_device(&self, device: &DeviceId) -> impl Iterator<Item = &Slot> {
        let newest = self.newest(device.as_str().as_bytes()).and_then(|at| self.slot(at));
        std::iter::successors(newest, |found| self.slot(found.older))
    }

    /// As [`Record::newest_after`](super::Record::newest_after). All are gone through: names have no
    /// order here, which would cost memory, and a list is asked for by people.
    pub(super) fn newest_after(&self, after: &[u8], prefix: &[u8], most: usize) -> Vec<&Slot> {
        let newest = self.by_device.rows().filter_map(|at| self.slot(at));
        let named = newest.filter_map(|slot| Some((slot.name(&self.names)?, slot)));
        let wanted = named.filter(|(name, _)| *name > after && name.starts_with(prefix));
        let mut found: Vec<(&[u8], &Slot)> = wanted.collect();
        if found.len() > most {
            found.select_nth_unstable_by_key(most, |(name, _)| *name);
            found.truncate(most);
        }
        found.sort_unstable_by_key(|(name, _)| *name);
        found.into_iter().map(|(_, slot)| slot).collect()
    }

    fn newest(&self, name: &[u8]) -> Option<u32> {
        let is = |at: u32| self.slot(at).and_then(|slot| slot.name(&self.names)) == Some(name);
        self.by_device.find(self.hash(name), is)
    }

    pub(super) fn device(&self, slot: &Slot) -> Option<DeviceId> {
        DeviceId::parse(std::str::from_utf8(slot.name(&self.names)?).ok()?)
    }

    /// What is known of a device's certificate.
    pub(super) fn certificate(&self, slot: &Slot) -> Option<Certificate> {
        let Slot { serial, expires_at, .. } = *slot;
        let revoked_at = slot.revoked().map(|(at, _)| at);
        Some(Certificate { serial, device: self.device(slot)?, expires_at, revoked_at })
    }

    pub(super) fn has_active(&self, device: &DeviceId, now: Now) -> bool {
        self.of_device(device).any(|slot| slot.is_active(now))
    }

    /// What is revoked and has not ended before this second, and what is foretold.
    pub(super) fn revocations(&self, ended_before: u64) -> impl Iterator<Item = Revocation> {
        let live = self.list.iter().filter(move |slot| slot.expires_at >= ended_before);
        let live = live.filter_map(|slot| Some((slot.serial, slot.revoked()?)));
        let foretold = self.foretold.iter().map(|(serial, revoked)| (*serial, *revoked));
        live.chain(foretold).map(|(serial, (at, reason))| Revocation { serial, at, reason })
    }

    /// When a certificate was revoked, which need not be here.
    pub(super) fn revoked(&self, serial: &Serial) -> Option<Revoked> {
        self.by_serial(serial).map_or_else(|| self.is_foretold(serial), Slot::revoked)
    }

    /// When a certificate that is not here was revoked.
    pub(super) fn is_foretold(&self, serial: &Serial) -> Option<Revoked> {
        self.foretold.get(serial).copied()
    }

    pub(super) fn knows_token(&self, token: &TokenHash) -> bool {
        self.tokens.contains_key(token)
    }

    pub(super) fn redeemed_for(&self, token: &TokenHash) -> Option<&Slot> {
        self.slot(self.tokens.get(token)?.row)
    }

    /// The tokens, each with its certificate.
    pub(super) fn spent(&self) -> Vec<Spent> {
        let spent = |(hash, token): (&TokenHash, &TokenRow)| {
            let slot = self.slot(token.row)?;
            let token = Redeemed { hash: *hash, iat: token.iat, exp: token.exp };
            Some(Spent { token, serial: slot.serial, device: self.device(slot)? })
        };
        self.tokens.iter().filter_map(spent).collect()
    }

    /// Adds a row, and returns where it is; nothing where one of the same serial number was there.
    pub(super) fn insert(&mut self, row: &Row) -> Option<u32> {
        let at = self.list.len() as u32;
        let (revoked_at, reason) = row.revoked.unwrap_or((0, Reason::Unspecified));
        self.foretold.remove(&row.serial);
        if self.list.len() == self.list.capacity() {
            self.list.reserve_exact(self.list.len() / 16 + 64); // a doubled list is half empty
        }
        self.make_room();
        let Row { serial, expires_at, place, .. } = *row;
        let (list, hash) = (&self.list, self.hash(&serial));
        let is = |at: u32| list.get(at as usize).is_some_and(|slot| slot.serial == serial);
        if let Some(twin) = self.by_serial.put(hash, at, is) {
            self.by_serial.put(hash, twin, |found| found == at);
            return None;
        }
        let mut slot =
            Slot { serial, expires_at, revoked_at, reason, place, name: NONE, older: NONE };
        if let Some(device) = &row.device {
            (slot.name, slot.older) = self.chain(device.as_str().as_bytes(), at, row.newer);
        }
        self.list.push(slot);
        Some(at)
    }

    /// Puts the row at `at` below `newer` of the device's rows. Returns where its name is, and the
    /// next older.
    fn chain(&mut self, name: &[u8], at: u32, newer: u32) -> (u32, u32) {
        let (list, names, hash) = (&self.list, &self.names, self.hash(name));
        let is = |at: u32| list.get(at as usize).and_then(|slot| slot.name(names)) == Some(name);
        let Some(newest) = self.by_device.put(hash, at, is) else {
            return (self.add_name(name), NONE);
        };
        let name_at = self.slot(newest).map_or(NONE, |slot| slot.name);
        let (mut above, mut below) = (NONE, newest);
        for _ in 0..newer {
            let Some(slot) = self.slot(below) else { break };
            (above, below) = (below, slot.older);
        }
        if let Some(above) = self.list.get_mut(above as usize) {
            above.older = at;
            self.by_device.put(hash, newest, |found| found == at);
        }
        (name_at, below)
    }

    fn add_name(&mut self, name: &[u8]) -> u32 {
        let name_at = self.names.len() as u32;
        if self.names.capacity() - self.names.len() <= name.len() {
            self.names.reserve_exact(self.names.len() / 16 + 1024);
        }
        self.names.push(name.len() as u8);
        self.names.extend(name);
        name_at
    }

    /// For one row more, in both indexes: a place holds any row's number.
    fn make_room(&mut self) {
        let mut indexes =
            (std::mem::take(&mut self.by_serial), std::mem::take(&mut self.by_device));
        let count = self.list.len() + 1;
        let name = |at| self.slot(at).and_then(|slot| slot.name(&self.names));
        indexes.0.make_room(count, |at| self.slot(at).map_or(0, |slot| self.hash(&slot.serial)));
        indexes.1.make_room(count, |at| name(at).map_or(0, |name| self.hash(name)));
        (self.by_serial, self.by_device) = indexes;
    }

    fn slot(&self, at: u32) -> Option<&Slot> {
        self.list.get(at as usize)
    }

    fn hash(&self, value: &(impl Hash + ?Sized)) -> u64 {
        self.hasher.hash_one(value)
    }

    /// Revokes a certificate, which may be yet to come; of two revocations the caller knows the earlier.
    pub(super) fn revoke(&mut self, serial: Serial, revoked: Revoked) {
        match self.slot_mut(&serial) {
            Some(slot) => (slot.revoked_at, slot.reason) = revoked,
            None => drop(self.foretold.insert(serial, revoked)),
        }
    }

    pub(super) fn set_place(&mut self, serial: &Serial, place: Place) {
        if let Some(slot) = self.slot_mut(serial) {
            slot.place = place;
        }
    }

    fn slot_mut(&mut self, serial: &Serial) -> Option<&mut Slot> {
        let at = self.place_of(serial)?;
        self.list.get_mut(at)
    }

    pub(super) fn add_token(&mut self, token: &Redeemed, row: u32) {
        let row = TokenRow { iat: token.iat, exp: token.exp, row };
        self.tokens.entry(token.hash).or_insert(row);
    }

    /// As [`Rows::add_token`], if its certificate is here.
    pub(super) fn add_token_of(&mut self, spent: &Spent) {
        if let Some(at) = self.place_of(&spent.serial) {
            self.add_token(&spent.token, at as u32);
        }
    }

    pub(super) fn drop_ended_tokens(&mut self, now_s: u64) {
        if self.tokens.len() >= self.crowded.max(1024) {
            self.tokens.retain(|_, token| token.exp.saturating_add(CLOCK_SLACK_S) > now_s);
            self.crowded = self.tokens.len() * 2;
        }
    }
}

/// An index: where rows are, found by a hash of what they are looked up by. Four bytes a place, at
/// most seven of eight of which are taken (`HashMap` would hold the keys again). The bits of a place
/// that no row's number needs hold some of the hash, so that hardly any row but the right one is looked
/// at.
#[derive(Debug, Default)]
struct Places {
    /// A power of two of them, or none.
    table: Vec<u32>,
}

impl Places {
    /// The row with this hash that `is` it.
    fn find(&self, hash: u64, is: impl Fn(u32) -> bool) -> Option<u32> {
        self.look(hash, is).1
    }

    /// Puts a row in the place of the one with this hash that `is` it, which is returned; else in a free
    /// place. There is room.
    fn put(&mut self, hash: u64, at: u32, is: impl Fn(u32) -> bool) -> Option<u32> {
        let (place, found) = self.look(hash, is);
        let tag = self.tag(hash);
        if let Some(place) = self.table.get_mut(place) {
            *place = tag | at;
        }
        found
    }

    /// The place of the row with this hash that `is` it, and the row; or a free place.
    fn look(&self, hash: u64, is: impl Fn(u32) -> bool) -> (usize, Option<u32>) {
        let (mask, tag) = (self.mask(), self.tag(hash));
        let mut place = hash as usize;
        for _ in 0..self.table.len() {
            place &= mask as usize;
            match self.table.get(place) {
                None | Some(&NONE) => break,
                Some(found) if found & !mask == tag && is(found & mask) => {
                    return (place, Some(found & mask));
                }
                Some(_) => place += 1,
            }
        }
        (place, None)
    }

    fn rows(&self) -> impl Iterator<Item = u32> {
        let mask = self.mask();
        self.table.iter().filter(|found| **found != NONE).map(move |found| found & mask)
    }

    /// Makes room for so many rows. `hash` tells the hash of each that is here.
    fn make_room(&mut self, count: usize, hash: impl Fn(u32) -> u64) {
        if count * 8 <= self.table.len() * 7 {
            return;
        }
        let rows: Vec<u32> = self.rows().collect();
        self.table = vec![NONE; (count * 8 / 7 + 1).next_power_of_two().max(16)];
        for at in rows {
            self.put(hash(at), at, |_| false);
        }
    }

    /// The bits of a place that hold the row's number.
    fn mask(&self) -> u32 {
        self.table.len().saturating_sub(1) as u32
    }

    fn tag(&self, hash: u64) -> u32 {
        (hash >> 32) as u32 & !self.mask()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::record::tests::{device, token};

    #[test]
    fn tokens_that_have_ended_are_dropped() {
        let mut rows = Rows::default();
        for n in 0..5000_u64 {
            rows.drop_ended_tokens(10_000 + n);
            rows.add_token(&token(&n.to_string(), 10_000 + n), 0);
        }
        let live = rows.tokens.values().filter(|t| t.exp > 14_999).count();
        assert!(rows.tokens.len() < 5000 && live == 0, "{}", rows.tokens.len());
        assert!(rows.tokens.len() > CLOCK_SLACK_S as usize, "those of the last hour stay");
    }

    fn serial(n: u32) -> Serial {
        let mut serial = [0x40; 16];
        serial[12..].copy_from_slice(&n.to_be_bytes());
        Serial::from(serial)
    }

    #[test]
    fn a_certificate_takes_a_hundred_bytes_at_most() {
        let mut rows = Rows::default();
        for n in 0..120_000_u32 {
            rows.insert(&Row::new(serial(n), device(&format!("device-{n:06}")), 1));
            if n < 56_000 {
                continue;
            }
            let bytes = rows.list.capacity() * size_of::<Slot>()
                + rows.names.capacity()
                + (rows.by_serial.table.capacity() + rows.by_device.table.capacity()) * 4;
            assert!(bytes <= 100 * rows.list.len(), "{bytes} bytes for {}", rows.list.len());
        }
        for n in (0..120_000).step_by(777) {
            let found = rows.by_serial(&serial(n)).and_then(|slot| rows.device(slot));
            assert_eq!(found, Some(device(&format!("device-{n:06}"))));
        }
        assert!(rows.by_serial(&serial(120_000)).is_none());
    }

    #[test]
    fn the_rows_of_a_device_stand_in_their_order() {
        let mut rows = Rows::with_room(3);
        for (n, newer) in [(1, 0), (2, 0), (3, 1), (4, 3), (5, 9), (6, 0)] {
            for name in ["a", "b"] {
                let serial = serial(if name == "a" { n } else { n + 100 });
                rows.insert(&Row { newer, ..Row::new(serial, device(name), 1) });
            }
        }
        let order: Vec<Serial> = rows.of_device(&device("a")).map(|slot| slot.serial).collect();
        assert_eq!(order, [6, 2, 3, 1, 4, 5].map(serial));
        assert_eq!(rows.of_device(&device("b")).count(), 6);
        assert_eq!(rows.of_device(&device("c")).count(), 0);
    }

    #[test]
    fn devices_are_listed_by_name_and_in_pages() {
        let mut rows = Rows::default();
        for n in [7_u8, 3, 9, 1, 5, 3] {
            let serial = Serial::from([0x40 + rows.list.len() as u8; 16]);
            rows.insert(&Row::new(serial, device(&format!("d-{n}")), 100));
        }
        rows.insert(&Row::new(Serial::from([0x50; 16]), device("e"), 100));
        let names = |after: &str, prefix: &str, most| -> Vec<String> {
            let found = rows.newest_after(after.as_bytes(), prefix.as_bytes(), most);
            found.into_iter().filter_map(|slot| rows.device(slot)).map(|d| d.to_string()).collect()
        };
        assert_eq!(names("", "", 10), ["d-1", "d-3", "d-5", "d-7", "d-9", "e"]);
        assert_eq!(names("", "d", 2), ["d-1", "d-3"]);
        assert_eq!(names("d-3", "d", 2), ["d-5", "d-7"]);
        assert_eq!(names("d-9", "d", 2), [""; 0]);
        let newest = rows.newest_after(b"d-1", b"", 1);
        assert_eq!(newest.first().map(|slot| slot.serial), Some(Serial::from([0x45; 16])));
    }
}
