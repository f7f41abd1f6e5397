//! Renewals under the record's lock: how many a device may have, and which certificate answers one that
//! is asked for again.
//!
//! A device that renews in a loop must fill neither disk nor memory, and the rate holds whatever
//! becomes of the certificates that were renewed. A device whose answer was lost asks again, and is
//! given what was signed for it.

use std::collections::HashMap;

use super::merge::Incoming;
use super::rows::Slot;
use super::{Certificate, Entries, Origin, Record};
use crate::ca::issuer::Leaf;
use crate::ca::key::PublicKey;
use crate::clock::Now;
use crate::device::DeviceId;
use crate::problem::{Code, Problem};

/// Certificates of one device that are neither expired nor revoked, at which it gets no further one.
const MOST_ACTIVE: usize = 16;
/// How many renewals a device may have in how many milliseconds: what a device needs, and what a
/// person needs who tries it out.
const RATES: [(usize, u64); 2] = [(4, HOUR_MS), (16, 24 * HOUR_MS)];
const HOUR_MS: u64 = 3_600_000;
/// With so many devices, those that have not renewed of late are forgotten.
const CROWDED: usize = 1024;

impl Entries<'_> {
    /// Whether a device may have a renewal; or the one that was signed for the same key when it last
    /// asked. While one for it is being recorded there is none yet.
    pub fn judge_renewal(
        &self,
        old: &Certificate,
        key: &PublicKey,
        now: Now,
    ) -> Result<Option<Leaf>, Problem> {
        if self.added.iter().any(|new| new.renews() == Some(old.serial)) {
            return Err(Code::ServiceUnavailable.into());
        }
        let renews = |origin: Origin| origin.renews() == Some(old.serial);
        if let Some(leaf) = self.record.signed_for(&old.device, key, renews, now) {
            return Ok(Some(leaf));
        }
        let of_device = |new: &&Incoming| new.renews().is_some() && new.row.is_of(&old.device);
        let here = self.added.iter().filter(of_device).count();
        let wait_ms = match self.count_active(&old.device, now) >= MOST_ACTIVE {
            true => HOUR_MS,
            false => self.writer.renewals.wait_ms(&old.device, here, now),
        };
        let retry_after_s = Some(wait_ms.div_ceil(1000));
        let too_many = Problem { retry_after_s, ..Code::RateLimited.into() };
        if wait_ms == 0 { Ok(None) } else { Err(too_many) }
    }
}

impl Record {
    /// The device's newest certificate for this key that still counts and `was_for` what it asks, of the
    /// newest that it may have by renewal: each is read from the disk.
    pub fn signed_for(
        &self,
        device: &DeviceId,
        key: &PublicKey,
        was_for: impl Fn(Origin) -> bool,
        now: Now,
    ) -> Option<Leaf> {
        let rows = self.read();
        let active = rows.of_device(device).filter(|slot| slot.is_active(now));
        let active: Vec<Slot> = active.take(MOST_ACTIVE).copied().collect();
        drop(rows);
        active.iter().find_map(|slot| {
            let stored = self.stored_at(slot).ok()?;
            stored.origin.filter(|origin| was_for(*origin))?;
            Some(stored.leaf(device.clone(), slot)).filter(|leaf| leaf.is_for(key))
        })
    }
}

/// When devices have renewed, by [`Now::mono_ms`].
#[derive(Debug, Default)]
pub(super) struct Renewals(HashMap<DeviceId, Vec<u64>>);

impl Renewals {
    /// How long the device has to wait, with so many more renewals that are under way.
    fn wait_ms(&self, device: &DeviceId, more: usize, now: Now) -> u64 {
        let times = self.0.get(device).map_or(&[][..], Vec::as_slice);
        let wait_ms = |(most, window_ms): (usize, u64)| {
            let mut recent = times.iter().filter(|at| now.mono_ms.saturating_sub(**at) < window_ms);
            let count = recent.clone().count() + more;
            let first = recent.next().copied().unwrap_or(now.mono_ms);
            if count < most { 0 } else { first + window_ms - now.mono_ms }
        };
        RATES.into_iter().map(wait_ms).max().unwrap_or(0)
    }

    pub(super) fn note(&mut self, device: DeviceId, now: Now) {
        let longest_ms = RATES.iter().map(|(_, window_ms)| *window_ms).max().unwrap_or(0);
        let is_recent = |at: &u64| now.mono_ms.saturating_sub(*at) < longest_ms;
        if self.0.len() >= CROWDED {
            self.0.retain(|_, times| times.iter().any(is_recent));
        }
        let times = self.0.entry(device).or_default();
        times.retain(is_recent);
        times.push(now.mono_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::csr::Csr;
    use crate::ca::record::Reason;
    use crate::ca::record::tests::{Fixture, device, enter};
    use crate::ca::tests::must;
    use crate::clock;
    use std::fs;

    fn at(s: u64) -> Now {
        Now { unix_ms: 1_800_000_000_000, mono_ms: s * 1000 }
    }

    #[test]
    fn four_an_hour_and_sixteen_a_day() {
        let (mut renewals, d) = (Renewals::default(), device("d"));
        let wait_s = |renewals: &Renewals, more, s| renewals.wait_ms(&d, more, at(s)) / 1000;
        for n in 0..4 {
            assert_eq!(wait_s(&renewals, 0, n * 10), 0, "{n}");
            renewals.note(d.clone(), at(n * 10));
        }
        assert_eq!(wait_s(&renewals, 0, 30), 3570);
        assert_eq!(wait_s(&renewals, 0, 3599), 1);
        assert_eq!((wait_s(&renewals, 0, 3600), wait_s(&renewals, 1, 3600)), (0, 10));
        assert_eq!(renewals.wait_ms(&device("e"), 0, at(30)), 0, "each device for itself");
        assert_eq!(renewals.wait_ms(&device("e"), 4, at(30)), HOUR_MS);
        for n in 4..16 {
            assert_eq!(wait_s(&renewals, 0, n * 3600), 0, "{n}");
            renewals.note(d.clone(), at(n * 3600));
        }
        assert_eq!(wait_s(&renewals, 0, 16 * 3600), 8 * 3600);
        assert_eq!(wait_s(&renewals, 0, 24 * 3600), 0);
        (0..CROWDED).for_each(|n| renewals.note(device(&format!("e{n}")), at(48 * 3600)));
        assert!(renewals.0.len() <= CROWDED && !renewals.0.contains_key(&d));
    }

    #[test]
    fn asked_again_with_the_same_key() {
        let fixture = Fixture::new();
        let record = fixture.open();
        let now = clock::now();
        let old = fixture.leaf("d");
        enter(&record, &old, None).unwrap();
        let old = record.by_serial(&old.serial).unwrap();
        let key = |how: &str| {
            must(&fixture.dir, &format!("{how} -out other.pem"));
            must(&fixture.dir, "req -new -key other.pem -subj /CN=d -out other.csr");
            Csr::parse(&fs::read_to_string(fixture.dir.join("other.csr")).unwrap()).unwrap()
        };
        let (same, other) = (fixture.csr("d"), key("genpkey -algorithm ED25519"));
        let judge =
            |entries: &Entries<'_>, csr: &Csr| match entries.judge_renewal(&old, csr.key(), now) {
                Ok(None) => "new".to_owned(),
                Ok(Some(leaf)) => leaf.serial.to_string(),
                Err(problem) if problem.code == Code::RateLimited => "too many".to_owned(),
                Err(problem) if problem.code == Code::ServiceUnavailable => "under way".to_owned(),
                Err(problem) => problem.to_string(),
            };
        let mut entries = record.begin();
        assert_eq!(judge(&entries, &same), "new");
        let new = fixture.leaf("d");
        entries.add(&new, Some(Origin::Renewal { old: old.serial, paid: None }), now);
        assert_eq!(judge(&entries, &same), "under way");
        assert_eq!(entries.commit(), [Ok(())]);
        // It is the renewal of this certificate: of the new one there is none yet.
        let newest = record.by_serial(&new.serial).unwrap();
        for record in [&record, &fixture.open()] {
            let entries = record.begin();
            assert_eq!(judge(&entries, &same), new.serial.to_string());
            assert_eq!(judge(&entries, &other), "new");
            assert_eq!(entries.judge_renewal(&newest, same.key(), now), Ok(None));
        }
        record.revoke_these(&[new.serial], Reason::Superseded, now).unwrap();
        assert_eq!(judge(&record.begin(), &same), "new", "it does not count any more");
        for _ in 0..3 {
            let mut entries = record.begin();
            entries.add(
                &fixture.leaf("d"),
                Some(Origin::Renewal { old: old.serial, paid: None }),
                now,
            );
            assert_eq!(entries.commit(), [Ok(())]);
        }
        assert_eq!(judge(&record.begin(), &other), "too many", "revoked or not");
        assert_ne!(judge(&record.begin(), &same), "too many", "what is there costs nothing");
    }
}
