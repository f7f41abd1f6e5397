//! How what another instance knows becomes part of this record: a union, in which nothing is ever taken
//! back.
//!
//! What is to change is worked out first ([`Rows::plan`]), by what is known and what comes and nothing
//! else; then it is written; then it is seen ([`Rows::apply`]). Certificates are added, of two
//! revocations the earlier one counts, and a revocation whose certificate is not here is kept until it
//! comes. So no order of messages, loss or repetition makes instances disagree for good.

use std::collections::{BTreeMap, HashMap};

use super::index::{self, Change};
use super::rows::{Place, Revoked, Row, Rows, Slot};
use super::{
    Origin, Reason, Record, RecordError, Redeemed, Revocation, Spent, Stored, Untold, others,
};
use crate::ca::issuer::{BACKDATE_S, Issuer, certificate_pem};
use crate::ca::validity_of;
use crate::clock::Now;
use crate::device::DeviceId;
use crate::devices::CLOCKS_APART_S;
use crate::files::FilesError;
use crate::jwt::TokenHash;
use crate::serial::Serial;

/// A certificate as instances exchange it. Times are in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    pub serial: Serial,
    pub paid: u64,
    /// The hash of the token that it was signed for, and when that ends.
    pub token: Option<(TokenHash, u64)>,
    pub der: Vec<u8>,
}

impl Shared {
    /// One that was signed at this time for this.
    pub(super) fn new(serial: Serial, origin: Option<Origin>, at: u64, der: Vec<u8>) -> Self {
        let token = origin.and_then(Origin::token).map(|token| (token.hash, token.exp));
        let paid = origin.and_then(Origin::paid).unwrap_or(at);
        Shared { serial, paid, token, der }
    }
}

/// By what is judged what comes from elsewhere.
pub struct Judge<'a> {
    pub ca: &'a Issuer,
    /// The `c` of a device's row: what was paid for at that time or before is revoked. 0 if there is
    /// none. It is asked under the record's lock, so that a bound that is raised meanwhile finds the
    /// certificate.
    pub bound: &'a dyn Fn(&DeviceId) -> u64,
    /// What has ended before this second is not entered; 0 enters all.
    pub ended_before: u64,
    pub now: Now,
}

/// What has become of what came.
#[derive(Debug, Default)]
pub struct Merged {
    /// Certificates that are revoked now, or earlier than was known, also those that are not here yet.
    /// The caller publishes a new list.
    pub revoked: Vec<Serial>,
    /// What this CA has not signed for a device, or is not what its serial number says.
    pub ignored: Vec<Serial>,
    /// What ended too long ago to be entered.
    pub passed: Vec<Serial>,
    /// The tokens of the new certificates, which count as used.
    pub spent: Vec<Spent>,
    /// Tokens that paid for two certificates, the one that was known first.
    pub twice: Vec<(TokenHash, [Serial; 2])>,
    /// Devices with more than one active certificate of which none renews another, with the news that a
    /// token has paid for one of them; and whether each was signed here.
    pub both_active: Vec<(DeviceId, Vec<(Serial, bool)>)>,
}

/// A certificate that is to be entered.
#[derive(Clone, Debug)]
pub(super) struct Incoming {
    pub(super) row: Row,
    pub(super) created_at: u64,
    pub(super) origin: Option<Origin>,
    /// What is to be written: a file of its own, or into that of others' certificates. Nothing if it is
    /// there already.
    pub(super) text: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) added: Vec<Incoming>,
    /// Also what is not here yet.
    pub(super) revoked: BTreeMap<Serial, Revoked>,
    pub(super) twice: Vec<(TokenHash, [Serial; 2])>,
}

impl Plan {
    pub(super) fn is_empty(&self) -> bool {
        self.added.is_empty() && self.revoked.is_empty()
    }
}

impl Incoming {
    /// What a certificate is entered as, if it is a device's, by this CA, and of this serial number.
    pub(super) fn read(
        serial: &Serial,
        der: &[u8],
        origin: Option<Origin>,
        ca: &Issuer,
    ) -> Option<Self> {
        let certificate = ca.read_signed(der)?;
        let is_devices = certificate.extended_key_usage().ok()??.value.client_auth
            && Serial::from_der(certificate.raw_serial()) == Some(*serial);
        is_devices.then_some(())?;
        let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
        let (not_before, expires_at) = validity_of(&certificate);
        let row = Row::new(*serial, DeviceId::parse(name)?, expires_at);
        let created_at = not_before.saturating_add(BACKDATE_S);
        Some(Incoming { row, created_at, origin, text: None })
    }

    pub(super) fn token(&self) -> Option<Redeemed> {
        self.origin.and_then(Origin::token)
    }

    pub(super) fn renews(&self) -> Option<Serial> {
        self.origin.and_then(Origin::renews)
    }

    fn paid(&self) -> u64 {
        self.origin.and_then(Origin::paid).unwrap_or(self.created_at)
    }

    fn age(&self) -> (u64, Serial) {
        (self.created_at, self.row.serial)
    }
}

/// A certificate that was paid for at `paid` is revoked by a bound.
pub(super) fn killed_by(bound: u64, paid: u64) -> Option<Revoked> {
    // No bound is 0, and a bound reaches past the time at which it was raised.
    let is_dead = bound > 0 && paid <= bound;
    is_dead.then(|| (bound.saturating_sub(CLOCKS_APART_S).max(1), Reason::Unspecified))
}

fn earlier(one: Option<Revoked>, other: Option<Revoked>) -> Option<Revoked> {
    one.into_iter().chain(other).min()
}

impl Rows {
    /// Works out what is new. `signed_at` tells when a certificate that is here was signed, if that can
    /// be known.
    pub(super) fn plan(
        &self,
        mut incoming: Vec<Incoming>,
        revocations: &[Revocation],
        bound: &dyn Fn(&DeviceId) -> u64,
        signed_at: &dyn Fn(&Slot) -> Option<u64>,
    ) -> Plan {
        let mut named = BTreeMap::<Serial, Revoked>::new();
        for Revocation { serial, at, reason } in revocations {
            let told = ((*at).max(1), *reason);
            named.entry(*serial).and_modify(|known| *known = told.min(*known)).or_insert(told);
        }
        incoming.retain(|new| self.by_serial(&new.row.serial).is_none());
        incoming.sort_by_key(Incoming::age);
        incoming.dedup_by_key(|new| new.row.serial);
        let mut plan = Plan::default();
        for mut new in incoming {
            let serial = new.row.serial;
            let told = earlier(named.remove(&serial), self.is_foretold(&serial));
            let bound = new.row.device.as_ref().map_or(0, bound);
            new.row.revoked = earlier(told, killed_by(bound, new.paid()));
            new.row.newer = self.newer_than(&new, signed_at);
            plan.twice.extend(self.other_of_token(&new, &plan));
            plan.added.push(new);
        }
        named.retain(|serial, told| self.revoked(serial).is_none_or(|known| *told < known));
        plan.revoked = named;
        plan
    }

    fn newer_than(&self, new: &Incoming, signed_at: &dyn Fn(&Slot) -> Option<u64>) -> u32 {
        let Some(device) = &new.row.device else { return 0 };
        let is_newer =
            |slot: &&Slot| signed_at(slot).is_some_and(|at| (at, slot.serial) > new.age());
        self.of_device(device).take_while(is_newer).count() as u32
    }

    fn other_of_token(&self, new: &Incoming, plan: &Plan) -> Option<(TokenHash, [Serial; 2])> {
        let token = new.token()?.hash;
        let same = |other: &&Incoming| other.token().is_some_and(|other| other.hash == token);
        let known = self.redeemed_for(&token).map(|slot| slot.serial);
        let other = known.or_else(|| Some(plan.added.iter().find(same)?.row.serial))?;
        Some((token, [other, new.row.serial]))
    }

    pub(super) fn apply(&mut self, plan: &Plan) {
        for new in &plan.added {
            let at = self.insert(&new.row);
            at.zip(new.token()).iter().for_each(|(at, token)| self.add_token(token, *at));
        }
        plan.revoked.iter().for_each(|(serial, revoked)| self.revoke(*serial, *revoked));
    }
}

impl Record {
    /// The serial numbers of these that are not in the record.
    pub fn unknown(&self, serials: &[Serial]) -> Vec<Serial> {
        let rows = self.read();
        serials.iter().filter(|serial| rows.by_serial(serial).is_none()).copied().collect()
    }

    /// A device's certificate as other instances are told of it; `None` if it is not in the record or
    /// its bytes are not here.
    pub fn shared(&self, serial: &Serial) -> Result<Option<Shared>, RecordError> {
        if self.by_serial(serial).is_none() {
            return Ok(None);
        }
        if let Some(fresh) = self.news.take_fresh(serial) {
            return Ok(Some(fresh));
        }
        match self.stored(serial) {
            Err(RecordError::Absent(_)) => Ok(None),
            stored => {
                let Stored { origin, created_at, der, .. } = stored?;
                Ok(Some(Shared::new(*serial, origin, created_at, der)))
            }
        }
    }

    /// The revocation of this certificate, which need not be here.
    pub fn revocation(&self, serial: &Serial) -> Option<Revocation> {
        let (at, reason) = self.read().revoked(serial)?;
        Some(Revocation { serial: *serial, at, reason })
    }

    /// The devices' certificates in a bucket (see [`bucket`]), but for those that have ended before.
    pub fn serials_of(&self, of: u8, ended_before: u64) -> Vec<Serial> {
        let rows = self.read();
        let counts = |slot: &&Slot| slot.is_devices() && slot.expires_at >= ended_before;
        let devices = rows.list.iter().filter(counts);
        devices.map(|slot| slot.serial).filter(|serial| bucket(serial) == of).collect()
    }

    /// All revocations in a bucket, but for those of certificates that have ended before.
    pub fn revocations_of(&self, of: u8, ended_before: u64) -> Vec<Revocation> {
        let rows = self.read();
        rows.revocations(ended_before).filter(|revoked| bucket(&revoked.serial) == of).collect()
    }

    /// Merges what comes from elsewhere; on disk when it returns. Merging again changes nothing.
    /// After a failure nothing was merged, and merging again is safe.
    pub fn merge(
        &self,
        certificates: Vec<Shared>,
        revocations: &[Revocation],
        judge: &Judge<'_>,
    ) -> Result<Merged, RecordError> {
        let mut merged = Merged::default();
        let mut incoming = Vec::new();
        for shared in certificates {
            if self.by_serial(&shared.serial).is_some() {
                continue;
            }
            let Shared { serial, paid, token, der } = shared;
            let token = token.map(|(hash, exp)| Redeemed { hash, iat: paid, exp });
            let origin = token.map_or(Origin::Paid(paid), Origin::Token);
            match Incoming::read(&serial, &der, Some(origin), judge.ca) {
                None => merged.ignored.push(serial),
                Some(new) if new.row.expires_at < judge.ended_before => merged.passed.push(serial),
                Some(new) => {
                    let text = Some(format!("{origin}\n{}", certificate_pem(&der)));
                    incoming.push(Incoming { text, ..new });
                }
            }
        }
        let revocations: Vec<Revocation> =
            revocations.iter().filter(|r| !merged.passed.contains(&r.serial)).copied().collect();
        let mut writer = self.lock_writer();
        let mut plan = self.plan(incoming, &revocations, judge.bound);
        self.enter(&mut writer, &mut plan, judge.ca)?;
        drop(writer);
        self.tell(plan, &mut merged, judge.now);
        Ok(merged)
    }

    pub(super) fn plan(
        &self,
        incoming: Vec<Incoming>,
        revocations: &[Revocation],
        bound: &dyn Fn(&DeviceId) -> u64,
    ) -> Plan {
        let signed_at = |slot: &Slot| self.stored_at(slot).ok().map(|stored| stored.created_at);
        self.read().plan(incoming, revocations, bound, &signed_at)
    }

    /// Writes what was worked out, then shows it.
    pub(super) fn enter(
        &self,
        writer: &mut super::Writer,
        plan: &mut Plan,
        ca: &Issuer,
    ) -> Result<(), RecordError> {
        if plan.is_empty() {
            return Ok(());
        }
        self.trial.note(self.write_plan(writer, plan, ca))?;
        self.write().apply(plan);
        Ok(())
    }

    /// First the certificates, then the lines that make them a record.
    fn write_plan(
        &self,
        writer: &mut super::Writer,
        plan: &mut Plan,
        ca: &Issuer,
    ) -> Result<(), RecordError> {
        self.append_others(plan)?;
        let mut lines: String = plan.added.iter().map(|new| new.row.line()).collect();
        let rows = self.read();
        let added = plan.added.iter().map(|new| new.row.serial);
        let come = added.filter(|serial| rows.is_foretold(serial).is_some());
        let mut changes: HashMap<Serial, Change> = come.map(|s| (s, Change::Gone)).collect();
        for (serial, revoked) in &plan.revoked {
            match rows.by_serial(serial).is_some() || rows.is_foretold(serial).is_some() {
                true => drop(changes.insert(*serial, Change::Revoked(*revoked))),
                false => lines += &index::foretold_line(serial, *revoked, ca.not_after),
            }
        }
        drop(rows);
        self.write_index(writer, lines, changes)
    }

    fn append_others(&self, plan: &mut Plan) -> Result<(), RecordError> {
        let new: Vec<&mut Incoming> = plan.added.iter_mut().filter(|n| n.text.is_some()).collect();
        if new.is_empty() {
            return Ok(());
        }
        let path = self.others_path();
        let places = others::append(&path, new.iter().filter_map(|new| new.text.as_deref()))
            .map_err(|e| RecordError::not_written(FilesError::io("cannot write", &path)(e)))?;
        new.into_iter().zip(places).for_each(|(new, at)| new.row.place = Place::Others(at));
        Ok(())
    }

    fn tell(&self, plan: Plan, merged: &mut Merged, now: Now) {
        let rows = self.read();
        for new in &plan.added {
            let (Some(slot), Some(device)) = (rows.by_serial(&new.row.serial), &new.row.device)
            else {
                continue;
            };
            let Some(token) = new.token() else { continue };
            merged.spent.push(Spent { token, serial: slot.serial, device: device.clone() });
            let active = rows.of_device(device).filter(|slot| slot.is_active(now));
            let active: Vec<Slot> = active.copied().collect();
            let is_told = merged.both_active.iter().any(|(told, _)| told == device);
            if slot.is_active(now) && !is_told && self.are_apart(&active) {
                let whose = |slot: &Slot| (slot.serial, slot.place == Place::Own);
                merged.both_active.push((device.clone(), active.iter().map(whose).collect()));
            }
        }
        let revoked = plan.added.iter().filter(|new| new.row.revoked.is_some());
        merged.revoked = revoked.map(|new| new.row.serial).collect();
        merged.revoked.extend(plan.revoked.into_keys());
        merged.twice = plan.twice;
    }

    /// Whether these are several, where a renewal, which inherits when it was paid for, and what it renews
    /// count as one.
    fn are_apart(&self, active: &[Slot]) -> bool {
        if active.len() < 2 {
            return false;
        }
        let stored = active.iter().filter_map(|slot| self.stored_at(slot).ok());
        let paid_by = |stored: Stored| (stored.paid(), stored.origin.and_then(Origin::token));
        let paid_by: Vec<(u64, Option<Redeemed>)> = stored.map(paid_by).collect();
        let is_first = |(paid, token): &&(u64, Option<Redeemed>)| {
            token.is_some() || paid_by.iter().filter(|(other, _)| other == paid).count() < 2
        };
        paid_by.iter().filter(is_first).count() > 1
    }

    /// Revokes what the bounds of these devices kill: each with the `c` of its row. To be called when a
    /// row has changed, and with all rows at start. Returns what is revoked since, on disk. What was
    /// paid for at a time that cannot be known any more counts as dead.
    pub fn apply_bounds(&self, bounds: &[(DeviceId, u64)]) -> Result<Vec<Serial>, RecordError> {
        let mut writer = self.lock_writer();
        let mut dead = BTreeMap::new();
        for (device, bound) in bounds.iter().filter(|(_, bound)| *bound > 0) {
            let valid: Vec<Slot> =
                self.read().of_device(device).filter(|s| s.revoked().is_none()).copied().collect();
            for slot in valid {
                let paid = match self.stored_at(&slot) {
                    Err(RecordError::Absent(_)) => 0,
                    stored => stored?.paid(),
                };
                dead.extend(killed_by(*bound, paid).map(|revoked| (slot.serial, revoked)));
            }
        }
        self.enter_revoked(&mut writer, dead)
    }

    /// Revokes these, each at its time; on disk when it returns, and to be told.
    pub(super) fn enter_revoked(
        &self,
        writer: &mut super::Writer,
        revoked: BTreeMap<Serial, Revoked>,
    ) -> Result<Vec<Serial>, RecordError> {
        let serials: Vec<Serial> = revoked.keys().copied().collect();
        if serials.is_empty() {
            return Ok(serials);
        }
        let changes = revoked.iter().map(|(serial, at)| (*serial, Change::Revoked(*at))).collect();
        self.trial.note(self.write_index(writer, String::new(), changes))?;
        self.write().apply(&Plan { revoked, ..Plan::default() });
        self.news.add(serials.iter().copied().map(Untold::Revocation));
        Ok(serials)
    }
}

/// In which of 64 parts of the record a certificate is: the first byte of its serial number, with the
/// top bits as all have that are drawn here. From 0x40 to 0x7f.
pub fn bucket(serial: &Serial) -> u8 {
    0x40 | (serial.der().first().copied().unwrap_or(0) & 0x3f)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::issuer::Leaf;
    use crate::ca::record::tests::{Fixture, device, enter, token};
    use crate::ca::tests::{must, run};
    use crate::clock;
    use crate::files::test_dir::TestDir;
    use std::collections::BTreeSet;
    use std::fs;

    /// What an instance knows, and what its disk would tell of each certificate.
    #[derive(Clone, Default)]
    struct State {
        certificates: BTreeMap<Serial, Incoming>,
        revocations: BTreeMap<Serial, Revoked>,
        bounds: BTreeMap<DeviceId, u64>,
    }

    /// What can be seen of it: the certificates of each device, the newest first, and what is revoked.
    type Seen = (Vec<Vec<Serial>>, BTreeMap<Serial, Revoked>);

    const DEVICES: [&str; 2] = ["a", "b"];

    impl State {
        /// Merges by the code that merges records.
        fn merge(&self, other: &State) -> State {
            let mut bounds = self.bounds.clone();
            for (device, bound) in &other.bounds {
                let known = bounds.entry(device.clone()).or_default();
                *known = (*known).max(*bound);
            }
            let mut rows = Rows::default();
            let mut certificates = BTreeMap::new();
            for state in [self, other] {
                let signed_at = |slot: &Slot| {
                    let known: &BTreeMap<Serial, Incoming> = &certificates;
                    known.get(&slot.serial).map(|known| known.created_at)
                };
                let bound = |device: &DeviceId| bounds.get(device).copied().unwrap_or(0);
                let incoming = state.certificates.values().cloned().collect();
                let revocation = |(serial, (at, reason)): (&Serial, &Revoked)| Revocation {
                    serial: *serial,
                    at: *at,
                    reason: *reason,
                };
                let revocations: Vec<_> = state.revocations.iter().map(revocation).collect();
                let plan = rows.plan(incoming, &revocations, &bound, &signed_at);
                rows.apply(&plan);
                certificates.extend(state.certificates.clone());
            }
            let revocations = rows.revocations(0).map(|r| (r.serial, (r.at, r.reason))).collect();
            State { certificates, revocations, bounds }
        }

        fn seen(&self) -> Seen {
            let mut rows = Rows::default();
            let signed_at = |slot: &Slot| Some(self.certificates.get(&slot.serial)?.created_at);
            let incoming = self.certificates.values().cloned().collect();
            rows.apply(&rows.plan(incoming, &[], &|_| 0, &signed_at));
            let serials = |name| rows.of_device(&device(name)).map(|slot| slot.serial).collect();
            (DEVICES.map(serials).to_vec(), self.revocations.clone())
        }

        fn revoked(&self) -> BTreeSet<Serial> {
            self.revocations.keys().copied().collect()
        }
    }

    /// Numbers that are the same in every run.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 33) % end
        }

        /// Part of a world of six certificates.
        fn state(&mut self, with_bounds: bool) -> State {
            let mut state = State::default();
            for n in 0..6_u8 {
                let serial = Serial::from([0x40 + n; 16]);
                if self.below(2) == 0 {
                    let name = DEVICES[usize::from(n % 2)];
                    let row = Row::new(serial, device(name), 1_000);
                    let paid = 10 + u64::from(n / 2);
                    let (created_at, origin) = (paid + u64::from(n % 3), Some(Origin::Paid(paid)));
                    let new = Incoming { row, created_at, origin, text: None };
                    state.certificates.insert(serial, new);
                }
                if self.below(4) == 0 {
                    let reason = Reason::numbered(self.below(2) as u8);
                    state.revocations.insert(serial, (20 + self.below(3), reason));
                }
            }
            for name in DEVICES.iter().filter(|_| with_bounds) {
                state.bounds.insert(device(name), self.below(2) * (10 + self.below(3)));
            }
            // Nobody holds a certificate that its bound kills and has it valid.
            State::default().merge(&state)
        }
    }

    /// As one that was revoked at two other instances is told of before its certificate is.
    #[test]
    fn of_two_revocations_of_what_is_not_here_the_earlier_one_is_kept() {
        let fixture = Fixture::new();
        let record = fixture.open();
        let serial = Serial::from([0x42; 16]);
        for at in [9, 5, 7] {
            let revocation = Revocation { serial, at, reason: Reason::KeyCompromise };
            record.merge(vec![], &[revocation], &fixture.judge()).unwrap();
            assert_eq!(fixture.index().lines().count(), 1);
        }
        for record in [record, fixture.open()] {
            assert_eq!(record.revocation(&serial).map(|known| known.at), Some(5));
        }
    }

    #[test]
    fn no_order_and_no_repetition_makes_a_difference() {
        let mut numbers = Numbers(1);
        for _ in 0..500 {
            let [a, b, c] = [(); 3].map(|()| numbers.state(false));
            let (ab, bc) = (a.merge(&b), b.merge(&c));
            assert_eq!(ab.seen(), b.merge(&a).seen(), "commutative");
            assert_eq!(ab.merge(&c).seen(), a.merge(&bc).seen(), "associative");
            assert_eq!(a.merge(&a).seen(), a.seen(), "idempotent");
            assert_eq!(ab.merge(&b).seen(), ab.seen(), "absorbs what it knows");
            for (serial, revoked) in a.revocations.iter().chain(&b.revocations) {
                assert!(ab.revocations.get(serial).is_some_and(|is| is <= revoked), "{serial}");
            }
        }
    }

    /// When a bound killed a certificate, instances may see differently until they have exchanged that.
    #[test]
    fn with_bounds_all_agree_on_who_is_revoked() {
        let mut numbers = Numbers(2);
        for _ in 0..500 {
            let [a, b, c] = [(); 3].map(|()| numbers.state(true));
            let (ab, bc) = (a.merge(&b), b.merge(&c));
            assert_eq!(ab.revoked(), b.merge(&a).revoked(), "commutative");
            assert_eq!(ab.merge(&c).revoked(), a.merge(&bc).revoked(), "associative");
            assert_eq!(a.merge(&a).seen(), a.seen(), "idempotent");
            assert!(ab.revoked().is_superset(&a.revoked()), "nothing is taken back");
        }
    }

    fn shared(record: &Record, leaf: &Leaf) -> Shared {
        record.shared(&leaf.serial).unwrap().unwrap()
    }

    #[test]
    fn what_one_instance_signs_the_other_has_after_merging() {
        let (fixture, dir) = (Fixture::new(), TestDir::new());
        let (one, now) = (fixture.open(), clock::now());
        let other = fixture.open_other(&dir);
        let leaves = ["device-1", "device-2"].map(|name| fixture.leaf(name));
        let spent = token("t", now.unix_s() + 100);
        one.on_news(|| ());
        enter(&one, &leaves[0], Some(spent)).unwrap();
        let kept = shared(&one, &leaves[0]);
        assert_eq!(kept, shared(&one, &leaves[0]), "as it is read from the disk");
        enter(&one, &leaves[1], None).unwrap();
        one.revoke(&device("device-2"), Reason::KeyCompromise, now).unwrap();
        let untold = leaves.each_ref().map(|leaf| Untold::Certificate(leaf.serial));
        let told = [untold[0], untold[1], Untold::Revocation(leaves[1].serial)];
        assert_eq!(one.untold(9), told);
        one.told(2);
        assert_eq!(one.untold(9), told[2..]);

        let serials = leaves.each_ref().map(|leaf| leaf.serial);
        assert_eq!(other.unknown(&serials), serials);
        let buckets = || 0x40..=0x7f;
        let of_one: Vec<Serial> = buckets().flat_map(|bucket| one.serials_of(bucket, 0)).collect();
        assert_eq!(of_one.len(), 2);
        let revoked: Vec<_> = buckets().flat_map(|bucket| one.revocations_of(bucket, 0)).collect();
        let news = || leaves.iter().map(|leaf| shared(&one, leaf)).collect::<Vec<_>>();
        assert_eq!(news()[0].token, Some((spent.hash, spent.exp)));
        assert_eq!(news()[0].paid, spent.iat);
        let merged = other.merge(news(), &revoked, &fixture.judge()).unwrap();
        assert_eq!(merged.revoked, serials[1..]);
        assert_eq!(merged.spent.len(), 1);
        let again = other.merge(news(), &revoked, &fixture.judge()).unwrap();
        assert!(again.spent.is_empty() && again.revoked.is_empty());
        for other in [&other, &fixture.open_other(&dir)] {
            assert_eq!(other.unknown(&serials), []);
            assert!(other.knows_token(&spent.hash) && other.has_active(&device("device-1"), now));
            assert_eq!(other.revoked(now), one.revoked(now));
            for leaf in &leaves {
                assert_eq!(shared(other, leaf), shared(&one, leaf));
                assert_eq!(other.stored(&leaf.serial).unwrap().pem, leaf.pem);
                assert_eq!(other.by_serial(&leaf.serial), one.by_serial(&leaf.serial));
            }
        }
        assert_eq!(fs::read_dir(dir.join("certs")).unwrap().count(), 1, "one file for all");
        for name in ["root-ca.crt", "root-ca.key"] {
            fs::copy(fixture.dir.join(name), dir.join(name)).unwrap();
        }
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/openssl-ca.cnf");
        let ca = |line: &str| run(&dir, &format!("ca -config {config} {line}"));
        let status = |leaf: &Leaf| ca(&format!("-status {:X}", leaf.serial)).unwrap_or_else(|e| e);
        assert!(status(&leaves[0]).contains("=Valid (V)"), "{}", status(&leaves[0]));
        assert!(status(&leaves[1]).contains("=Revoked (R)"), "{}", status(&leaves[1]));
        ca("-gencrl -out by-openssl.pem").unwrap();
        let crl = must(&dir, "crl -in by-openssl.pem -CAfile root-ca.crt -noout -text");
        assert!(crl.contains(&format!("{:X}", serials[1])) && crl.contains("Key Compromise"));
    }

    #[test]
    fn a_revocation_waits_for_its_certificate() {
        let (fixture, dir) = (Fixture::new(), TestDir::new());
        let (one, now) = (fixture.open(), clock::now());
        let other = fixture.open_other(&dir);
        let leaf = fixture.leaf("device-1");
        enter(&one, &leaf, None).unwrap();
        let at = |at| Revocation { serial: leaf.serial, at, reason: Reason::Superseded };
        for (told, counts) in [
            (1_700_000_009, 1_700_000_009),
            (1_700_000_005, 1_700_000_005),
            (1_700_000_007, 1_700_000_005),
        ] {
            let merged = other.merge(vec![], &[at(told)], &fixture.judge()).unwrap();
            assert_eq!(merged.revoked.len(), usize::from(told == counts));
            for other in [&other, &fixture.open_other(&dir)] {
                assert_eq!(other.revocation(&leaf.serial), Some(at(counts)));
                assert_eq!(other.revoked(now), [at(counts)], "the list names it already");
                assert_eq!(other.by_serial(&leaf.serial), None);
            }
        }
        let merged = other.merge(vec![shared(&one, &leaf)], &[], &fixture.judge()).unwrap();
        assert_eq!(merged.revoked, [leaf.serial]);
        for other in [&other, &fixture.open_other(&dir)] {
            assert_eq!(other.revoked(now), [at(1_700_000_005)]);
            assert!(other.by_serial(&leaf.serial).unwrap().revoked_at.is_some());
        }
        // An earlier one counts also of what is here.
        other.merge(vec![], &[at(1_600_000_000)], &fixture.judge()).unwrap();
        assert_eq!(fixture.open_other(&dir).revoked(now), [at(1_600_000_000)]);
        let index = fs::read_to_string(dir.join("index.txt")).unwrap();
        assert_eq!(index.lines().count(), 1, "{index}");
    }

    #[test]
    fn a_bound_kills_what_was_paid_for_before() {
        let (fixture, dir) = (Fixture::new(), TestDir::new());
        let (one, now) = (fixture.open(), clock::now());
        let other = fixture.open_other(&dir);
        let [before, after] = [(); 2].map(|()| fixture.leaf("device-1"));
        let [early, late] = [1_000, 2_000].map(|iat| token(&format!("{iat}"), iat + 300));
        enter(&one, &before, Some(early)).unwrap();
        enter(&one, &after, Some(late)).unwrap();
        let mut entries = one.begin();
        let renewed = fixture.leaf("device-1");
        entries.add(&renewed, Some(Origin::Renewal { old: before.serial, paid: None }), now);
        assert_eq!(entries.commit(), [Ok(())]);
        assert_eq!(one.paid(&renewed.serial), 1_000, "it is inherited");
        let all = [&before, &after, &renewed].map(|leaf| shared(&one, leaf)).to_vec();
        let judge = Judge { bound: &|_| 1_500, ..fixture.judge() };
        let mut revoked = other.merge(all, &[], &judge).unwrap().revoked;
        revoked.sort();
        let mut expected = vec![before.serial, renewed.serial];
        expected.sort();
        assert_eq!(revoked, expected);
        // When it was paid for another instance knows after a start, too.
        let third_dir = TestDir::new();
        let third = fixture.open_other(&third_dir);
        third.merge(vec![shared(&one, &renewed)], &[], &fixture.judge()).unwrap();
        for third in [third, fixture.open_other(&third_dir)] {
            assert_eq!(third.paid(&renewed.serial), 1_000);
        }
        assert_eq!(one.apply_bounds(&[(device("device-1"), 0)]), Ok(vec![]));
        assert_eq!(one.apply_bounds(&[(device("device-1"), 1_500)]), Ok(expected));
        assert_eq!(one.apply_bounds(&[(device("device-1"), 1_500)]), Ok(vec![]));
        assert_eq!(one.begin().count_active(&device("device-1"), now), 1);
        assert_eq!(fixture.open().revoked(now).len(), 2);
        let newest = one.newest(&device("device-1")).map(|newest| newest.serial);
        assert_eq!(newest, Some(renewed.serial));
    }

    /// In whichever order they are learnt of, be it at once.
    #[test]
    fn a_renewal_and_what_it_renews_are_no_two_certificates() {
        let (fixture, now) = (Fixture::new(), clock::now());
        let one = fixture.open();
        let [first, renewed, another] = [(); 3].map(|()| fixture.leaf("device-1"));
        let [early, late] = [1_000, 2_000].map(|iat| token(&format!("{iat}"), iat + 300));
        enter(&one, &first, Some(early)).unwrap();
        let mut entries = one.begin();
        entries.add(&renewed, Some(Origin::Renewal { old: first.serial, paid: None }), now);
        assert_eq!(entries.commit(), [Ok(())]);
        enter(&one, &another, Some(late)).unwrap();
        for turns in [vec![vec![&first, &renewed]], vec![vec![&renewed], vec![&first]]] {
            let dir = TestDir::new();
            let other = fixture.open_other(&dir);
            let merge = |leaves: &[&Leaf]| {
                let all = leaves.iter().map(|leaf| shared(&one, leaf)).collect();
                other.merge(all, &[], &fixture.judge()).unwrap().both_active.len()
            };
            turns.iter().for_each(|leaves| assert_eq!(merge(leaves), 0));
            assert_eq!(merge(&[&another]), 1);
        }
    }

    #[test]
    fn what_is_not_ours_is_ignored_and_what_is_odd_is_told() {
        let (fixture, stranger, dir) = (Fixture::new(), Fixture::new(), TestDir::new());
        let (one, now) = (fixture.open(), clock::now());
        let other = fixture.open_other(&dir);
        let strange = stranger.open();
        let leaves = [(); 3].map(|()| fixture.leaf("device-1"));
        let foreign = stranger.leaf("device-1");
        enter(&strange, &foreign, None).unwrap();
        let spent = token("t", now.unix_s() + 100);
        leaves.iter().take(2).for_each(|leaf| enter(&one, leaf, Some(spent)).unwrap());
        enter(&one, &leaves[2], None).unwrap();
        let misnamed = Shared { serial: leaves[1].serial, ..shared(&one, &leaves[0]) };
        let mut torn = shared(&one, &leaves[0]);
        torn.der.pop();
        let wrong = vec![shared(&strange, &foreign), misnamed, torn];
        let merged = other.merge(wrong, &[], &fixture.judge()).unwrap();
        assert_eq!(merged.ignored, [foreign.serial, leaves[1].serial, leaves[0].serial]);
        assert!(other.is_empty());

        let merge =
            |leaf: &Leaf| other.merge(vec![shared(&one, leaf)], &[], &fixture.judge()).unwrap();
        let first = merge(&leaves[0]);
        assert!(first.twice.is_empty() && first.both_active.is_empty());
        let second = merge(&leaves[1]);
        let serials = [leaves[0].serial, leaves[1].serial];
        assert_eq!(second.twice, [(spent.hash, serials)]);
        let [(device, mut active)] = <[_; 1]>::try_from(second.both_active).unwrap();
        active.sort();
        let mut expected = serials.map(|serial| (serial, false));
        expected.sort();
        assert_eq!((device.as_str(), active), ("device-1", expected.to_vec()));
        assert!(merge(&leaves[2]).both_active.is_empty(), "a renewal may stand beside its old one");
        let old = Judge { ended_before: u64::MAX, ..fixture.judge() };
        let late = fixture.leaf("device-2");
        enter(&one, &late, None).unwrap();
        let revoked = Revocation { serial: late.serial, at: 5, reason: Reason::Unspecified };
        let merged = other.merge(vec![shared(&one, &late)], &[revoked], &old).unwrap();
        assert!(merged.revoked.is_empty() && other.by_serial(&late.serial).is_none());
        assert_eq!(merged.passed, [late.serial]);
    }

    /// Any two of the files may be of different moments in a copy.
    #[test]
    fn the_file_and_the_lines_of_different_moments() {
        let (fixture, dir) = (Fixture::new(), TestDir::new());
        let (one, now) = (fixture.open(), clock::now());
        let names = ["device-1", "device-2", "device-3"];
        let leaves = names.map(|name| fixture.leaf(name));
        let spent = names.map(|name| token(name, now.unix_s() + 100));
        let (file, index) = (dir.join("certs/others.pem"), dir.join("index.txt"));
        let mut moments = Vec::new();
        for (leaf, spent) in leaves.iter().zip(spent) {
            enter(&one, leaf, Some(spent)).unwrap();
            let other = fixture.open_other(&dir);
            other.merge(vec![shared(&one, leaf)], &[], &fixture.judge()).unwrap();
            drop(other);
            moments.push([&file, &index].map(|path| fs::read(path).unwrap()));
        }
        let put = |at: [usize; 2], torn: &[u8]| {
            fs::write(&file, [&moments[at[0]][0], torn].concat()).unwrap();
            fs::write(&index, &moments[at[1]][1]).unwrap();
        };
        for (at, torn) in [([2, 0], &b""[..]), ([2, 0], b"Paid: 7\n-----BEG"), ([2, 2], b"torn")] {
            put(at, torn);
            for _ in 0..2 {
                let other = fixture.open_other(&dir);
                for (leaf, spent) in leaves.iter().zip(spent) {
                    assert_eq!(other.stored(&leaf.serial).unwrap().pem, leaf.pem);
                    assert!(other.knows_token(&spent.hash));
                }
            }
            assert_eq!(fs::read(&file).unwrap(), moments[2][0], "what is torn is cut off");
        }
        assert!(fs::read_to_string(dir.join("others.pem.torn")).unwrap().ends_with("torn\n"));
        // The file is older: the lines stay, and what comes next is found.
        put([0, 2], b"");
        let other = fixture.open_other(&dir);
        let next = fixture.leaf("device-4");
        enter(&one, &next, None).unwrap();
        other.merge(vec![shared(&one, &next)], &[], &fixture.judge()).unwrap();
        for other in [other, fixture.open_other(&dir)] {
            assert!(names.iter().all(|name| other.has_active(&device(name), now)));
            assert_eq!(other.stored(&next.serial).unwrap().pem, next.pem);
            assert_eq!(other.stored(&leaves[0].serial).unwrap().pem, leaves[0].pem);
            assert!(matches!(other.stored(&leaves[2].serial), Err(RecordError::Absent(_))));
            assert_eq!(other.shared(&leaves[2].serial), Ok(None));
        }
        fs::remove_file(&file).unwrap();
        let other = fixture.open_other(&dir);
        assert!(
            other.has_active(&device("device-4"), now) && other.shared(&next.serial) == Ok(None)
        );
    }
}
