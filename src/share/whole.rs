//! The whole: where the stream of names cannot be trusted, everything is compared.

use std::collections::{BTreeMap, BTreeSet};

use super::codec::SERIAL_BUCKETS;
use super::exchange::{Exchange, Name};
use super::thread::{BATCH, Comparison, Turn};
use crate::clock::DAY_S;
use crate::devices::codec as rows;
use crate::serial::Serial;
use crate::store::StoreError;

/// Hashes read at once.
const BUCKETS: usize = 16;

impl<E: Exchange> Turn<'_, E> {
    /// Compares some more hashes: reads what is not known here, and tells what is not known there. Where
    /// the stream ends is read first: what is announced meanwhile is read after that (`docs/model`,
    /// row r3). What is put is announced, for others may have compared before (row r6c). What was
    /// compared when the line is cut is not compared again.
    pub(super) fn compare(&mut self, comparison: Comparison) -> Result<(), StoreError> {
        let Comparison { cursor: Some(cursor), done } = comparison else {
            let cursor = Some(self.parts.exchange.end()?);
            let progress = &mut self.progress;
            progress.told.clear();
            progress.doubted.clear();
            progress.rows.clear();
            for device in self.parts.devices.all(self.now) {
                let of = progress.rows.entry(rows::bucket(&device)).or_default();
                of.push(Name::Row(device));
            }
            let done = if self.shares_record { 0 } else { SERIAL_BUCKETS.len() };
            self.progress.comparison = Some(Comparison { cursor, done });
            return Ok(());
        };
        let at_once = self.progress.at_once(BUCKETS);
        let buckets: Vec<u8> = SERIAL_BUCKETS.skip(done).take(at_once).collect();
        let rows = done.saturating_sub(SERIAL_BUCKETS.len());
        let rows: Vec<u8> = (0..=u8::MAX).skip(rows).take(at_once).collect();
        let asked = self.asked();
        let compared = match (&buckets[..], &rows[..]) {
            ([], []) => {
                let progress = &mut self.progress;
                (progress.cursor, progress.comparison) = (cursor, None);
                progress.rows.clear();
                progress.compare_ms = self.now.mono_ms + DAY_S * 1000;
                // Who is answered below may have changed something since the last step.
                self.send()?;
                0
            }
            ([], rows) => {
                self.compare_rows(rows)?;
                rows.len()
            }
            (buckets, _) => {
                self.compare_certificates(buckets)?;
                self.compare_revocations(buckets)?;
                buckets.len()
            }
        };
        // News that overflow meanwhile have it begun anew.
        if let Some(Comparison { cursor: Some(_), done }) = &mut self.progress.comparison {
            *done += compared;
        }
        self.answer(asked)
    }

    fn compare_certificates(&mut self, buckets: &[u8]) -> Result<(), StoreError> {
        let in_reach =
            buckets.iter().copied().filter(|of| self.reaches_hash(&self.keys.certificates(*of)));
        let buckets: Vec<u8> = in_reach.collect();
        let hashes: Vec<String> = buckets.iter().map(|of| self.keys.certificates(*of)).collect();
        let fields = self.parts.exchange.fields(&hashes)?;
        let theirs: Vec<Serial> = fields.iter().filter_map(|f| Serial::from_hex(f)).collect();
        self.take_in_unknown(&theirs)?;
        self.remove_passed()?;
        let theirs: BTreeSet<Serial> = theirs.into_iter().collect();
        let ended_before = self.parts.publisher.ended_before(self.now);
        let ours = buckets.iter().flat_map(|of| self.record().serials_of(*of, ended_before));
        let lacking = ours.filter(|serial| !theirs.contains(serial)).map(Name::Certificate);
        let lacking: Vec<Name> = lacking.collect();
        self.progress.unsent.extend(lacking);
        self.send()
    }

    /// Removes what ended too long ago to be kept. Revocations go first: one whose certificate is not
    /// there is kept until that comes.
    fn remove_passed(&mut self) -> Result<(), StoreError> {
        let passed: Vec<Serial> = std::mem::take(&mut self.progress.passed).into_iter().collect();
        for passed in passed.chunks(BATCH) {
            for name in [Name::Revocation, Name::Certificate] {
                let places = passed.iter().map(|serial| self.keys.place(&name(*serial)));
                let places = places.filter(|place| self.parts.exchange.reaches(&place.key));
                self.parts.exchange.remove(&places.collect::<Vec<_>>())?;
            }
        }
        Ok(())
    }

    fn compare_revocations(&mut self, buckets: &[u8]) -> Result<(), StoreError> {
        let hashes: Vec<String> = buckets.iter().map(|of| self.keys.revocations(*of)).collect();
        let ended_before = self.parts.publisher.ended_before(self.now);
        let ours = buckets.iter().flat_map(|of| self.record().revocations_of(*of, ended_before));
        let ours = ours.map(|known| Name::Revocation(known.serial)).collect();
        self.compare_values("revoked", &hashes, ours)
    }

    fn compare_rows(&mut self, of: &[u8]) -> Result<(), StoreError> {
        let hashes: Vec<String> = of.iter().map(|of| rows::bucket_key(*of)).collect();
        let ours = hashes.iter().filter_map(|key| self.progress.rows.get(key)).flatten();
        let ours = ours.cloned().collect();
        self.compare_values("device", &hashes, ours)
    }

    /// Compares names of one kind, in these hashes, with what is known here.
    fn compare_values(
        &mut self,
        kind: &str,
        hashes: &[String],
        ours: Vec<Name>,
    ) -> Result<(), StoreError> {
        let mut theirs = BTreeMap::new();
        let in_reach = |key: &&String| self.reaches_hash(key);
        let hashes: Vec<String> = hashes.iter().filter(in_reach).cloned().collect();
        for (field, value) in self.parts.exchange.all(&hashes)? {
            let Some(name) = Name::read(kind, &field) else { continue };
            theirs.extend(self.open(&name, &value).map(|value| (name, value)));
        }
        self.enter(theirs.values().cloned().collect())?;
        let lacks = |name: &Name| {
            hashes.contains(&self.keys.place(name).key)
                && theirs.get(name) != self.known(name).as_ref()
        };
        let lacking: Vec<Name> = ours.into_iter().filter(lacks).collect();
        self.progress.unsent.extend(lacking);
        self.send()
    }
}
