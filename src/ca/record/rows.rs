//! The record in memory: what of each certificate must be known without asking the disk, and the
//! tokens that were redeemed for them. Pure: it reads no file and takes no lock.

use std::collections::HashMap;

use super::{CLOCK_SLACK_S, Certificate, Redeemed, Spent};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::TokenHash;
use crate::serial::Serial;

/// The record in memory.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// In the order of `index.txt`.
    list: Vec<Row>,
    by_serial: HashMap<Serial, u32>,
    /// The newest of each device.
    by_device: HashMap<DeviceId, u32>,
    tokens: HashMap<TokenHash, TokenRow>,
    /// The number of tokens at which those that have ended are dropped next.
    crowded: usize,
}

#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) serial: Serial,
    /// `None` for what another program signed for somebody else: it counts for the list only.
    pub(super) device: Option<DeviceId>,
    pub(super) expires_at: u64,
    /// 0 if it was not; an `Option` would take eight bytes more.
    revoked_at: u64,
    /// The device's next older row, or [`NONE`].
    older: u32,
}

#[derive(Clone, Copy, Debug)]
struct TokenRow {
    iat: u64,
    exp: u64,
    row: u32,
}

const NONE: u32 = u32::MAX;

impl Row {
    pub(super) fn new(
        serial: Serial,
        device: impl Into<Option<DeviceId>>,
        expires_at: u64,
        revoked_at: Option<u64>,
    ) -> Self {
        let mut row = Row { serial, device: device.into(), expires_at, revoked_at: 0, older: NONE };
        row.set_revoked(revoked_at);
        row
    }

    /// Revoked then, or not at all.
    pub(super) fn set_revoked(&mut self, revoked_at: Option<u64>) {
        // A clock that was not set may have revoked at 0.
        self.revoked_at = revoked_at.map_or(0, |at| at.max(1));
    }

    pub(super) fn is_of(&self, device: &DeviceId) -> bool {
        self.device.as_ref() == Some(device)
    }

    pub(super) fn revoked(&self) -> Option<u64> {
        (self.revoked_at != 0).then_some(self.revoked_at)
    }

    pub(super) fn is_active(&self, now: Now) -> bool {
        self.revoked_at == 0 && now.unix_s() <= self.expires_at
    }

    /// What is known of a device's certificate.
    pub(super) fn certificate(&self) -> Option<Certificate> {
        let Row { serial, device, expires_at, .. } = self.clone();
        Some(Certificate { serial, device: device?, expires_at, revoked_at: self.revoked() })
    }
}

impl Rows {
    /// None yet, with room for so many.
    pub(super) fn with_room(count: usize) -> Self {
        Rows { list: Vec::with_capacity(count), ..Rows::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many rows are no device's.
    pub(super) fn foreign(&self) -> usize {
        self.list.iter().filter(|row| row.device.is_none()).count()
    }

    /// The row at this place in the order of `index.txt`.
    pub(super) fn at(&self, place: usize) -> Option<&Row> {
        self.list.get(place)
    }

    pub(super) fn by_serial(&self, serial: &Serial) -> Option<&Row> {
        self.list.get(*self.by_serial.get(serial)? as usize)
    }

    /// The device's rows, the newest first.
    pub(super) fn of_device(&self, device: &DeviceId) -> impl Iterator<Item = &Row> {
        let row = |at: u32| self.list.get(at as usize);
        let newest = self.by_device.get(device).and_then(|at| row(*at));
        std::iter::successors(newest, move |r| row(r.older))
    }

    pub(super) fn has_active(&self, device: &DeviceId, now: Now) -> bool {
        self.of_device(device).any(|row| row.is_active(now))
    }

    /// Serial number and time of revocation of what is revoked and not expired.
    pub(super) fn revoked(&self, now: Now) -> Vec<(Serial, u64)> {
        let live = self.list.iter().filter(|r| r.expires_at >= now.unix_s());
        live.filter_map(|r| Some((r.serial, r.revoked()?))).collect()
    }

    pub(super) fn knows_token(&self, token: &TokenHash) -> bool {
        self.tokens.contains_key(token)
    }

    /// The tokens, each with its certificate.
    pub(super) fn spent(&self) -> Vec<Spent> {
        let spent = |(hash, token): (&TokenHash, &TokenRow)| {
            let row = self.list.get(token.row as usize)?;
            let token = Redeemed { hash: *hash, iat: token.iat, exp: token.exp };
            Some(Spent { token, serial: row.serial, device: row.device.clone()? })
        };
        self.tokens.iter().filter_map(spent).collect()
    }

    /// Adds a row that is read, unless there is one of its serial number.
    pub(super) fn accept(&mut self, row: Row) -> Result<(), &'static str> {
        if self.by_serial.contains_key(&row.serial) {
            return Err("the serial number stands twice");
        }
        self.insert(row);
        Ok(())
    }

    /// Adds a row as the newest of all. A device's name is held once, however many rows it has.
    pub(super) fn insert(&mut self, mut row: Row) -> u32 {
        let at = self.list.len() as u32;
        if let Some(device) = row.device.take() {
            let known = self.by_device.get_key_value(&device);
            let (device, older) = known.map_or((device, NONE), |(name, at)| (name.clone(), *at));
            self.by_device.insert(device.clone(), at);
            (row.device, row.older) = (Some(device), older);
        }
        self.by_serial.insert(row.serial, at);
        self.list.push(row);
        at
    }

    pub(super) fn set_revoked(&mut self, serial: &Serial, now_s: u64) {
        let at = self.by_serial.get(serial).copied().unwrap_or(NONE);
        if let Some(row) = self.list.get_mut(at as usize) {
            row.set_revoked(Some(now_s));
        }
    }

    pub(super) fn add_token(&mut self, token: &Redeemed, row: u32) {
        self.tokens.insert(token.hash, TokenRow { iat: token.iat, exp: token.exp, row });
    }

    pub(super) fn drop_ended_tokens(&mut self, now_s: u64) {
        if self.tokens.len() >= self.crowded.max(1024) {
            self.tokens.retain(|_, token| token.exp.saturating_add(CLOCK_SLACK_S) > now_s);
            self.crowded = self.tokens.len() * 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::record::fixture::{device, token};

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

    #[test]
    fn a_hundred_thousand_records_fit() {
        let mut rows = Rows::default();
        for n in 0..100_000_u32 {
            let mut serial = [0x40; 16];
            serial[12..].copy_from_slice(&n.to_be_bytes());
            rows.insert(Row::new(Serial::from(serial), device(&format!("device-{n:06}")), 1, None));
        }
        // Each table has a byte of its own per slot; a name has two counters and malloc's head.
        let slots = |capacity: usize| (capacity * 8 / 7).next_power_of_two();
        let list = rows.list.capacity() * size_of::<Row>();
        let by_serial = slots(rows.by_serial.capacity()) * (size_of::<(Serial, u32)>() + 1);
        let by_device = slots(rows.by_device.capacity()) * (size_of::<(DeviceId, u32)>() + 1);
        let names = 100_000 * 48;
        let total = list + by_serial + by_device + names;
        assert!(total < 25_000_000, "{total}");
    }
}
