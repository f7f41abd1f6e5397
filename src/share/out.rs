//! Out: what is new here is put where others find it, and announced.
//!
//! What could not be sent is sent again. Names are taken off the list before their values are looked
//! up, so that what changes meanwhile is noted anew (`docs/model`, rows r5 and r5b).

use std::collections::BTreeSet;

use super::codec::Value;
use super::exchange::{Exchange, Name, News, Place, Swap};
use super::thread::{BATCH, Progress, Turn};
use crate::ca::record::Untold;
use crate::clock;
use crate::device::DeviceId;
use crate::serial::Serial;
use crate::store::StoreError;

/// How often a value is read again because others change it at the same time.
const TRIES: usize = 4;
/// With more than this waiting for a part that is away, nothing is taken off the lists of news.
const ASIDE_MOST: usize = 100_000;
/// The server is asked how full it is at most this often.
const FULLNESS_MS: u64 = 1_000;
/// When the server has room again, a full comparison puts there what was left out, but not before this
/// pause is over.
const ROOM_AGAIN_MS: u64 = 60_000;

impl<E: Exchange> Turn<'_, E> {
    /// Tells what is new here: certificate, holder, stream; then the lease goes (`docs/model`, row
    /// r18).
    pub(super) fn send(&mut self) -> Result<(), StoreError> {
        // The leases first: the certificate of each was noted before its lease was.
        let leases = std::mem::take(&mut self.parts.sharing.lock().leases);
        let most = self.progress.at_once(BATCH);
        while self.progress.aside.len() < ASIDE_MOST && self.note_news() {
            let names = std::iter::from_fn(|| self.progress.unsent.pop_first());
            let names: Vec<Name> = names.take(most).collect();
            let (batch, away): (Vec<Name>, Vec<Name>) =
                names.into_iter().partition(|name| self.reaches(name));
            self.progress.aside.extend(away);
            if let Err(error) = self.tell(batch.clone()) {
                self.progress.unsent.extend(batch);
                self.parts.sharing.lock().leases.extend(leases);
                return Err(error);
            }
        }
        self.free(leases);
        Ok(())
    }

    /// Whether there is anything to tell. While the server is away the lists stay where they are,
    /// which is where they are bounded.
    fn note_news(&mut self) -> bool {
        let doubted = self.parts.devices.take_doubted();
        self.ignore(doubted.len());
        let Progress { unsent, .. } = &mut self.progress;
        unsent.extend(doubted.into_iter().map(Name::Row));
        unsent.extend(self.parts.devices.take_changed().into_iter().map(Name::Row));
        if self.shares_record {
            let record = self.parts.publisher.ca().record();
            let untold = record.untold(BATCH);
            record.told(untold.len());
            unsent.extend(untold.into_iter().map(|untold| match untold {
                Untold::Certificate(serial) => Name::Certificate(serial),
                Untold::Revocation(serial) => Name::Revocation(serial),
            }));
            if record.news_overflowed() {
                self.progress.begin_anew();
            }
        }
        !self.progress.unsent.is_empty()
    }

    /// Puts these values and announces them. What others may change is read, merged, and set if it
    /// still stands as it was read. A certificate is set where there is nothing, and read only if there
    /// is something, which may be forged.
    fn tell(&mut self, mut names: Vec<Name>) -> Result<(), StoreError> {
        if self.is_filling()? {
            names.retain(|name| !matches!(name, Name::Certificate(_)));
        }
        for attempt in 0..TRIES {
            if names.is_empty() {
                return Ok(());
            }
            let is_read = |name: &Name| attempt > 0 || !matches!(name, Name::Certificate(_));
            let places =
                names.iter().filter(|name| is_read(name)).map(|name| self.keys.place(name));
            let mut values = self.parts.exchange.values(&places.collect::<Vec<_>>())?.into_iter();
            let seen = names.iter().map(|name| is_read(name).then(|| values.next()).flatten());
            let seen = seen.collect();
            let news = self.news(&names, seen)?;
            let stands = self.parts.exchange.tell(&news)?;
            self.progress.told.extend(news.names);
            let swaps = news.swaps.into_iter().zip(stands);
            let open = swaps.filter(|(_, stands)| !stands).map(|(swap, _)| swap.place);
            let open: BTreeSet<Place> = open.collect();
            names.retain(|name| open.contains(&self.keys.place(name)));
        }
        Err(StoreError::Undecided)
    }

    /// What is to be told under these names, where this was seen. What others have told meanwhile is
    /// taken in: it is not read again when it comes with our own words.
    fn news(&mut self, names: &[Name], seen: Vec<Option<Vec<u8>>>) -> Result<News, StoreError> {
        let mut news = News { names: names.to_vec(), ..News::default() };
        let mut learnt = Vec::new();
        for (name, seen) in names.iter().zip(seen) {
            let theirs = seen.as_ref().and_then(|seen| self.open(name, seen));
            if let Some(value) = to_put(self.known(name), theirs.as_ref()) {
                news.holders.extend(self.holder(name));
                let (place, value) = (self.keys.place(name), self.keys.seal(&value));
                news.swaps.push(Swap { place, seen, value });
            }
            learnt.extend(theirs);
        }
        self.enter(learnt)?;
        Ok(news)
    }

    /// What is known here under a name.
    pub(super) fn known(&self, name: &Name) -> Option<Value> {
        match name {
            Name::Certificate(serial) => {
                let shared = self.record().shared(serial);
                let shared =
                    shared.inspect_err(|e| log::error!(serial:%; "{serial} is not shared: {e}"));
                shared.ok().flatten().map(Value::Certificate)
            }
            Name::Revocation(serial) => self.record().revocation(serial).map(Value::Revocation),
            Name::Row(device) => {
                let row = self.parts.devices.row(device);
                (row != Default::default()).then(|| Value::Row(device.clone(), row))
            }
        }
    }

    /// The certificate's device, if it is its newest one.
    fn holder(&self, name: &Name) -> Option<(DeviceId, Serial)> {
        let Name::Certificate(serial) = name else { return None };
        let device = self.record().by_serial(serial)?.device;
        let newest = self.record().newest(&device)?;
        (newest.serial == *serial).then_some((device, *serial))
    }

    /// So much is used that no certificate is put any more; everything else is.
    pub(super) fn is_filling(&mut self) -> Result<bool, StoreError> {
        let now_ms = clock::now().mono_ms;
        let progress = &mut self.progress;
        let is_fresh = |asked: u64| now_ms.saturating_sub(asked) < FULLNESS_MS;
        if progress.filling_ms.is_some_and(is_fresh) {
            return Ok(progress.filling);
        }
        let filling = self.parts.exchange.is_filling()?;
        if filling && !progress.filling {
            log::warn!(
                "{} is filling up: certificates are not shared any more, revocations are",
                E::NAME
            );
        }
        if progress.filling && !filling {
            progress.compare_ms = progress.compare_ms.min(now_ms + ROOM_AGAIN_MS);
        }
        (progress.filling, progress.filling_ms) = (filling, Some(now_ms));
        self.parts.sharing.lock().is_filling = filling;
        Ok(filling)
    }
}

/// What is to stand where `theirs` stands, if that says less than what is known.
pub(super) fn to_put(ours: Option<Value>, theirs: Option<&Value>) -> Option<Value> {
    let merged = match theirs {
        Some(theirs) => ours?.merge(theirs.clone()),
        None => ours?,
    };
    (Some(&merged) != theirs).then_some(merged)
}
