//! The sharing thread: tells what is new here, reads what is new elsewhere, and compares everything
//! where the stream of names cannot be trusted.
//!
//! It looks for work twice a second, and at once when it is woken: a connection that is blocked in a
//! read could not tell what is signed here before the read ends. What it reads is on disk before the
//! place in the stream is passed. What could not be sent is sent again; names are taken off the list
//! before their values are looked up, so that what changes meanwhile is noted anew (`docs/model`, rows
//! r5 and r5b).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::PoisonError;
use std::time::Duration;

use super::codec::{Keys, SERIAL_BUCKETS, Value};
use super::{Asked, Exchange, Fault, Name, News, Place, Sharing, Swap};
use crate::ca::publisher::Publisher;
use crate::ca::record::merge::{Judge, Merged, Shared, Twice};
use crate::ca::record::{Record, Revocation, Spent, Untold};
use crate::clock::{self, DAY_S, Now};
use crate::device::DeviceId;
use crate::devices::table::Devices;
use crate::devices::{Row, codec as rows};
use crate::jwt::{Claims, Token};
use crate::serial::Serial;
use crate::store::ledger::Ledger;
use crate::store::{Op, TokenStore};

/// Longest pause between two looks for work.
const TURN: Duration = Duration::from_millis(500);
/// Pause after a failure, doubled up to the second; and where the server refuses.
const RETRY_MS: (u64, u64) = (100, 5_000);
const REFUSED_RETRY_MS: u64 = 60_000;
/// Names told or read at once: some 100 KB.
const BATCH: usize = 128;
/// Hashes read at once when everything is compared.
const BUCKETS: usize = 16;
/// How often a value is read again because others change it at the same time.
const TRIES: usize = 4;
/// So often, at most, values that are not ours are told of in the log.
const HOUR_MS: u64 = 3_600_000;
/// A token that has ended by our clock may be alive by another's, in seconds.
const CLOCKS_APART_S: u64 = 120;
/// So often, at most, the server is asked how full it is.
const FULLNESS_MS: u64 = 1_000;

/// What the thread works with.
pub struct Parts<E> {
    /// The way to the other instances.
    pub exchange: E,
    /// Where the rest of the program asks how it is.
    pub sharing: Arc<Sharing>,
    /// Has the record, and publishes what is revoked.
    pub publisher: Arc<Publisher>,
    /// The rows.
    pub devices: Arc<Devices>,
    /// Frees the leases of tokens that are used up.
    pub store: Arc<dyn TokenStore>,
    /// Is told of tokens that others have redeemed.
    pub ledger: Arc<Ledger>,
    /// Certificates and revocations are exchanged; otherwise the rows of devices only.
    pub shares_record: bool,
}

/// The thread.
pub struct Thread<E> {
    parts: Parts<E>,
    keys: Option<Arc<Keys>>,
    progress: Progress,
}

/// How far it has come.
#[derive(Default)]
struct Progress {
    connected: bool,
    /// The server run with which everything was compared.
    run_id: Option<String>,
    /// Everything is to be compared; at the start, too.
    compared: bool,
    /// When it is next, by [`Now::mono_ms`].
    compare_ms: u64,
    /// The place in the stream up to which everything was read.
    cursor: String,
    /// What is still to be told.
    unsent: BTreeSet<Name>,
    /// What was told and not read again yet: our own words need not be looked up.
    told: BTreeSet<Name>,
    /// Where something stood that none of our instances has written. Each is told of once, so that who
    /// knows better puts it right, and not for ever where nobody does.
    doubted: BTreeSet<Name>,
    /// Certificates that were found and have ended too long ago to be kept.
    passed: BTreeSet<Serial>,
    /// Something was revoked that the published list does not name yet.
    crl_is_due: bool,
    /// Nothing is tried before, by [`Now::mono_ms`].
    retry_ms: u64,
    failures: u32,
    /// When values that are not ours were last told of.
    warned_ms: Option<u64>,
    /// Whether the server was filling, and when it was asked.
    filling: bool,
    filling_ms: Option<u64>,
}

impl<E: Exchange> Thread<E> {
    /// Before anything was exchanged.
    pub fn new(parts: Parts<E>) -> Self {
        Thread { parts, keys: None, progress: Progress::default() }
    }

    /// Shares for as long as the process lives.
    pub fn run(mut self) {
        loop {
            let hurry = self.parts.sharing.wait(TURN);
            let now = clock::now();
            if hurry || now.mono_ms >= self.progress.retry_ms {
                self.parts.sharing.begin();
                self.attempt(now);
                self.parts.sharing.end();
            }
        }
    }

    /// One look for work.
    fn attempt(&mut self, now: Now) {
        let Some(keys) = self.keys(now) else { return };
        let turn = self.turn(&keys, now);
        if std::mem::take(&mut self.progress.crl_is_due) {
            // What went wrong is logged and kept there, and tried again.
            let _ = self.parts.publisher.publish(clock::now());
        }
        match turn {
            Ok(()) => self.succeeded(),
            Err(fault) => self.failed(fault),
        }
    }

    /// Nothing is exchanged before there is a CA and a clock by which what comes in can be judged.
    fn keys(&mut self, now: Now) -> Option<Arc<Keys>> {
        let ca = self.parts.publisher.ca();
        if !ca.clock_is_plausible(now) {
            return None;
        }
        if self.keys.is_none() {
            let issuer = ca.issuer()?;
            let fp = issuer.fingerprint().chars().take(8).collect();
            self.keys = Some(Arc::new(Keys { mac: issuer.mac_key.clone(), fp }));
        }
        self.keys.clone()
    }

    fn record(&self) -> &Record {
        self.parts.publisher.ca().record()
    }

    fn turn(&mut self, keys: &Keys, now: Now) -> Result<(), Fault> {
        if !self.progress.connected {
            self.connect(keys)?;
        }
        if !self.progress.compared || now.mono_ms >= self.progress.compare_ms {
            self.compare_all(keys, now)?;
        }
        self.send(keys)?;
        self.answer(keys)?;
        self.read(keys)
    }

    fn connect(&mut self, keys: &Keys) -> Result<(), Fault> {
        let hello = self.parts.exchange.connect(&keys.fp, self.parts.shares_record)?;
        let contradicts =
            hello.shares_record.is_some_and(|shares| shares != self.parts.shares_record);
        self.parts.sharing.lock().contradicts = contradicts;
        self.progress.connected = true;
        // Another run may have come back with older data (`docs/model`, row r6).
        let same = hello.run_id.is_some() && hello.run_id == self.progress.run_id;
        self.progress.compared &= same;
        self.progress.run_id = hello.run_id;
        Ok(())
    }

    fn succeeded(&mut self) {
        self.progress.failures = 0;
        if self.parts.sharing.lock().trouble.take().is_some_and(|t| matches!(t, Fault::Refused(_)))
        {
            log::info!("the record is shared through Redis again");
        }
    }

    /// What is still to be told stays noted. Nobody is kept waiting for it.
    fn failed(&mut self, fault: Fault) {
        let progress = &mut self.progress;
        let pause_ms = match &fault {
            Fault::Lost(why) => {
                log::debug!("the record is not shared now: {why}");
                progress.connected = false;
                (RETRY_MS.0 << progress.failures.min(6)).min(RETRY_MS.1)
            }
            Fault::Refused(why) => {
                let known = matches!(self.parts.sharing.lock().trouble, Some(Fault::Refused(_)));
                if !known {
                    log::warn!("the record is not shared through Redis, tokens are: {why}");
                }
                REFUSED_RETRY_MS
            }
        };
        progress.failures += 1;
        progress.retry_ms = clock::now().mono_ms + pause_ms;
        // A connection that was cut may be made again at once; until then leases stay.
        let lasts = progress.failures > 1 || matches!(fault, Fault::Refused(_));
        let mut state = self.parts.sharing.lock();
        state.asked.clear();
        if !lasts {
            return;
        }
        state.trouble = Some(fault);
        let leases = std::mem::take(&mut state.leases);
        drop(state);
        self.free(leases);
    }

    fn free(&self, leases: Vec<(Serial, Token)>) {
        if !leases.is_empty() {
            let ops: Vec<Op> = leases.into_iter().map(|(_, token)| Op::Finish(token)).collect();
            self.parts.store.run(&ops, clock::now());
        }
    }
}

// Out.
impl<E: Exchange> Thread<E> {
    /// Tells what is new here: certificate, holder, stream; then the lease goes (`docs/model`, row
    /// r18).
    fn send(&mut self, keys: &Keys) -> Result<(), Fault> {
        // The leases first: the certificate of each was noted before its lease was.
        let leases = std::mem::take(&mut self.parts.sharing.lock().leases);
        while self.note_news() {
            let batch: BTreeSet<Name> =
                std::iter::from_fn(|| self.progress.unsent.pop_first()).take(BATCH).collect();
            if let Err(fault) = self.tell(keys, &batch) {
                self.progress.unsent.extend(batch);
                self.parts.sharing.lock().leases.extend(leases);
                return Err(fault);
            }
        }
        self.free(leases);
        Ok(())
    }

    /// Whether there is anything to tell. While the server is away the lists stay where they are,
    /// which is where they are bounded.
    fn note_news(&mut self) -> bool {
        let Progress { unsent, compared, .. } = &mut self.progress;
        unsent.extend(self.parts.devices.take_changed().into_iter().map(Name::Row));
        if self.parts.shares_record {
            let record = self.parts.publisher.ca().record();
            *compared &= !record.news_overflowed();
            let untold = record.untold(BATCH);
            record.told(untold.len());
            unsent.extend(untold.into_iter().map(|untold| match untold {
                Untold::Certificate(serial) => Name::Certificate(serial),
                Untold::Revocation(serial) => Name::Revocation(serial),
            }));
        }
        !unsent.is_empty()
    }

    /// Puts these values and announces them. What others may change is read, merged, and set if it
    /// still stands as it was read; so is a forged value in the place of a certificate.
    fn tell(&mut self, keys: &Keys, names: &BTreeSet<Name>) -> Result<(), Fault> {
        let is_certificate = |name: &&Name| matches!(name, Name::Certificate(_));
        let (new, mut changing): (Vec<&Name>, Vec<&Name>) = names.iter().partition(is_certificate);
        let mut new = if self.is_filling()? { Vec::new() } else { new };
        for _ in 0..TRIES {
            let mut news = self.merged(keys, &changing)?;
            for name in &new {
                self.add_certificate(keys, name, &mut news);
            }
            news.names.extend(new.iter().chain(&changing).map(|name| (*name).clone()));
            if news.names.is_empty() {
                return Ok(());
            }
            let told = self.parts.exchange.tell(&keys.fp, &news)?;
            self.progress.told.extend(news.names.iter().cloned());
            let others = |stands: Vec<bool>, places: Vec<&Place>| -> BTreeSet<Place> {
                let open = stands.iter().zip(places).filter(|(stands, _)| !**stands);
                open.map(|(_, place)| place.clone()).collect()
            };
            let mut open = others(told.new, news.new.iter().map(|(place, _)| place).collect());
            open.extend(others(told.swaps, news.swaps.iter().map(|swap| &swap.place).collect()));
            if open.is_empty() {
                return Ok(());
            }
            changing = names.iter().filter(|name| open.contains(&keys.place(name))).collect();
            new.clear();
        }
        Err(Fault::Lost("others change the same values all the time".to_owned()))
    }

    /// A certificate that is still known here, and the device's holder if it is the newest.
    fn add_certificate(&self, keys: &Keys, name: &Name, news: &mut News) {
        let Name::Certificate(serial) = name else { return };
        let Some(shared) = self.shared(serial) else { return };
        news.new.push((keys.place(name), keys.seal_certificate(&shared)));
        let device = self.record().by_serial(serial).map(|known| known.device);
        let newest = device.and_then(|device| self.record().newest(&device));
        let newest = newest.filter(|newest| newest.serial == *serial);
        news.holders.extend(newest.map(|newest| (newest.device, newest.serial)));
    }

    fn shared(&self, serial: &Serial) -> Option<Shared> {
        let shared = self.record().shared(serial);
        shared.inspect_err(|error| log::error!("{serial} is not shared: {error}")).ok().flatten()
    }

    /// For each name what is to stand there instead of what does, if that says less.
    fn merged(&mut self, keys: &Keys, names: &[&Name]) -> Result<News, Fault> {
        let places: Vec<Place> = names.iter().map(|name| keys.place(name)).collect();
        let stand = self.parts.exchange.values(&places)?;
        let mut learnt = Learnt::default();
        let mut news = News::default();
        for ((name, place), seen) in names.iter().zip(places).zip(stand) {
            let known = self.open(keys, name, &seen);
            let value = match name {
                Name::Certificate(serial) if known.is_none() => {
                    self.shared(serial).map(|shared| keys.seal_certificate(&shared))
                }
                Name::Certificate(_) => None,
                Name::Revocation(serial) => {
                    let ours = self.record().revocation(serial);
                    let theirs = known.clone().and_then(Value::revocation);
                    let merged = ours.into_iter().chain(theirs).min_by_key(|r| (r.at, r.reason));
                    merged.filter(|m| Some(*m) != theirs).map(|m| keys.seal_revocation(&m))
                }
                Name::Row(device) => {
                    let theirs = known.clone().and_then(Value::row).unwrap_or_default();
                    let merged = self.parts.devices.row(device).merge(theirs.clone());
                    (merged != theirs).then(|| keys.seal_row(device, &merged))
                }
            };
            news.swaps.extend(value.map(|value| Swap { place, seen, value }));
            learnt.add(known.filter(|_| !matches!(name, Name::Certificate(_))));
        }
        self.enter(learnt)?;
        Ok(news)
    }

    /// So much is used that no certificate is put any more; everything else is.
    fn is_filling(&mut self) -> Result<bool, Fault> {
        let now_ms = clock::now().mono_ms;
        let fresh = |asked: u64| now_ms.saturating_sub(asked) < FULLNESS_MS;
        if !self.progress.filling_ms.is_some_and(fresh) {
            let filling = self.parts.exchange.is_filling()?;
            if filling && !self.progress.filling {
                log::warn!(
                    "Redis is filling up: certificates are not shared any more, revocations are"
                );
            }
            self.progress.filling = filling;
            self.progress.filling_ms = Some(now_ms);
        }
        Ok(self.progress.filling)
    }
}

// In.
impl<E: Exchange> Thread<E> {
    /// Reads what was announced, until there is nothing more.
    fn read(&mut self, keys: &Keys) -> Result<(), Fault> {
        loop {
            let begun = clock::now();
            let changes = self.parts.exchange.changes(&keys.fp, &self.progress.cursor)?;
            if changes.gap {
                self.progress.compared = false;
                self.parts.sharing.wake();
                return Ok(());
            }
            let names: BTreeSet<Name> = changes.names.into_iter().collect();
            self.take_in(keys, &names.into_iter().collect::<Vec<_>>())?;
            self.progress.cursor = changes.cursor;
            if !changes.more {
                self.parts.sharing.lock().read_ms = Some(begun.mono_ms);
                return Ok(());
            }
        }
    }

    /// Reads the values of these names and enters them. Where none of our instances has written what
    /// stands there, and it is known here, it is put right.
    fn take_in(&mut self, keys: &Keys, names: &[Name]) -> Result<(), Fault> {
        let Progress { told, .. } = &mut self.progress;
        let counts = |name: &&Name| self.parts.shares_record || matches!(name, Name::Row(_));
        let names = names.iter().filter(|name| !told.remove(name)).filter(counts);
        let names: Vec<&Name> = names.collect();
        for names in names.chunks(BATCH) {
            let places: Vec<Place> = names.iter().map(|name| keys.place(name)).collect();
            let values = self.parts.exchange.values(&places)?;
            let mut learnt = Learnt::default();
            for (name, value) in names.iter().zip(values) {
                let opened = self.open(keys, name, &value);
                let Progress { unsent, doubted, .. } = &mut self.progress;
                if opened.is_none() && !value.is_empty() && doubted.insert((*name).clone()) {
                    unsent.insert((*name).clone());
                }
                learnt.add(opened);
            }
            self.enter(learnt)?;
        }
        Ok(())
    }

    /// The value, if one of our instances has written it.
    fn open(&mut self, keys: &Keys, name: &Name, value: &[u8]) -> Option<Value> {
        let opened = keys.open(name, value);
        if opened.is_none() && !value.is_empty() {
            self.ignore(1);
        }
        opened
    }

    fn ignore(&mut self, values: usize) {
        if values == 0 {
            return;
        }
        self.parts.sharing.lock().ignored += values as u64;
        let now_ms = clock::now().mono_ms;
        let lately = |warned: u64| now_ms.saturating_sub(warned) < HOUR_MS;
        if !self.progress.warned_ms.is_some_and(lately) {
            log::warn!("Redis holds values of the record that none of our instances has written");
            self.progress.warned_ms = Some(now_ms);
        }
    }

    /// Makes durable what was read. A bound that was not known here revokes what is, and what comes
    /// later.
    fn enter(&mut self, learnt: Learnt) -> Result<(), Fault> {
        let Learnt { certificates, revocations, rows } = learnt;
        let now = clock::now();
        let not_kept =
            |error: String| Fault::Refused(format!("what was read is not kept: {error}"));
        let bounds = rows.iter().map(|(device, row)| (device.clone(), row.bound.c));
        let is_news = |(device, c): &(DeviceId, u64)| *c > self.parts.devices.bound(device).0.c;
        let bounds: Vec<(DeviceId, u64)> = bounds.filter(is_news).collect();
        self.parts.devices.enter(rows, false, now).map_err(|error| not_kept(error.to_string()))?;
        self.apply(&bounds)?;
        let Some(issuer) = self.parts.publisher.ca().issuer() else { return Ok(()) };
        if !certificates.is_empty() || !revocations.is_empty() {
            let bound = |device: &DeviceId| self.parts.devices.bound(device).0.c;
            let ended_before = self.parts.publisher.ended_before(now);
            let judge = Judge { ca: &issuer, bound: &bound, ended_before, now };
            let merged = self.record().merge(certificates, &revocations, &judge);
            self.merged_in(merged.map_err(|error| not_kept(error.to_string()))?, now);
        }
        Ok(())
    }

    fn apply(&mut self, bounds: &[(DeviceId, u64)]) -> Result<(), Fault> {
        let revoked = self.record().apply_bounds(bounds);
        let not_kept = |error| Fault::Refused(format!("a revocation is not kept: {error}"));
        self.note_revoked(&revoked.map_err(not_kept)?);
        Ok(())
    }

    fn note_revoked(&mut self, serials: &[Serial]) {
        for serial in serials {
            log::info!("certificate {serial} revoked, at another instance");
        }
        self.progress.crl_is_due |= !serials.is_empty();
    }

    /// What the record has found when it took certificates in. Their tokens are used, whatever Redis
    /// says of them after a return.
    fn merged_in(&mut self, merged: Merged, now: Now) {
        let Merged { revoked, ignored, passed, spent, twice, both_active, .. } = merged;
        self.progress.passed.extend(passed);
        self.note_revoked(&revoked);
        self.ignore(ignored.len());
        let lasts = |spent: &Spent| spent.token.exp.saturating_add(CLOCKS_APART_S) > now.unix_s();
        for Spent { token, serial, device } in spent.into_iter().filter(lasts) {
            let claims = Claims { device_id: device, iat: token.iat, exp: token.exp, jti: None };
            self.parts.ledger.load(token.hash, serial, claims, now);
        }
        for Twice { token, serials: [one, other] } in twice {
            let token = token.short();
            log::error!("token {token} was redeemed twice: for certificates {one} and {other}");
        }
        for (device, serials) in both_active {
            let serials: Vec<String> = serials.iter().map(Serial::to_string).collect();
            let serials = serials.join(", ");
            log::warn!("device {device} has several active certificates: {serials}");
        }
    }

    /// Somebody waits for what others have of a device.
    fn answer(&mut self, keys: &Keys) -> Result<(), Fault> {
        let asked = std::mem::take(&mut self.parts.sharing.lock().asked);
        if asked.is_empty() {
            return Ok(());
        }
        let devices: Vec<DeviceId> = asked.iter().flat_map(|asked| asked.devices.clone()).collect();
        let holders = match self.parts.shares_record {
            true => self.parts.exchange.holders(&devices)?.into_iter().flatten().collect(),
            false => Vec::new(),
        };
        let unknown = self.record().unknown(&holders).into_iter().map(Name::Certificate);
        self.take_in(keys, &unknown.collect::<Vec<_>>())?;
        for Asked { answer, .. } in asked {
            // Who has waited too long does not listen any more.
            let _ = answer.try_send(());
        }
        Ok(())
    }
}

// The whole.
impl<E: Exchange> Thread<E> {
    /// Reads everything that is not known here, and tells everything that is not known there. Where
    /// the stream ends is read first: what is announced meanwhile is read after that (`docs/model`,
    /// row r3). What is put is announced, for others may have compared before (row r6c).
    fn compare_all(&mut self, keys: &Keys, now: Now) -> Result<(), Fault> {
        self.progress.told.clear();
        self.progress.doubted.clear();
        let cursor = self.parts.exchange.end(&keys.fp)?;
        if self.parts.shares_record {
            let buckets: Vec<u8> = SERIAL_BUCKETS.collect();
            for buckets in buckets.chunks(BUCKETS) {
                self.compare_certificates(keys, buckets)?;
                self.compare_revocations(keys, buckets)?;
                self.answer(keys)?;
            }
        }
        let mut ours: BTreeMap<String, Vec<DeviceId>> = BTreeMap::new();
        for device in self.parts.devices.all(now) {
            ours.entry(rows::bucket(&device)).or_default().push(device);
        }
        let buckets: Vec<String> = (0..=u8::MAX).map(rows::bucket_key).collect();
        for buckets in buckets.chunks(BUCKETS) {
            let ours = buckets.iter().filter_map(|key| ours.remove(key)).flatten().collect();
            self.compare_rows(keys, buckets, ours)?;
        }
        self.announce_recent(now);
        let progress = &mut self.progress;
        progress.cursor = cursor;
        progress.compared = true;
        progress.compare_ms = now.mono_ms + DAY_S * 1000;
        Ok(())
    }

    fn compare_certificates(&mut self, keys: &Keys, buckets: &[u8]) -> Result<(), Fault> {
        let hashes: Vec<String> = buckets.iter().map(|of| keys.certificates(*of)).collect();
        let fields = self.parts.exchange.fields(&hashes)?;
        let theirs: Vec<Serial> = fields.iter().filter_map(|f| Serial::from_hex(f)).collect();
        let unknown = self.record().unknown(&theirs).into_iter().map(Name::Certificate);
        self.take_in(keys, &unknown.collect::<Vec<_>>())?;
        self.remove_passed(keys)?;
        let theirs: BTreeSet<Serial> = theirs.into_iter().collect();
        let ended_before = self.parts.publisher.ended_before(clock::now());
        let ours = buckets.iter().flat_map(|of| self.record().serials_of(*of, ended_before));
        let lacking = ours.filter(|serial| !theirs.contains(serial)).map(Name::Certificate);
        let lacking: Vec<Name> = lacking.collect();
        self.progress.unsent.extend(lacking);
        self.send(keys)
    }

    /// Removes what ended too long ago to be kept. Revocations go first: one whose certificate is not
    /// there is kept until that comes.
    fn remove_passed(&mut self, keys: &Keys) -> Result<(), Fault> {
        let passed: Vec<Serial> = std::mem::take(&mut self.progress.passed).into_iter().collect();
        for passed in passed.chunks(BATCH) {
            for name in [Name::Revocation, Name::Certificate] {
                let places = passed.iter().map(|serial| keys.place(&name(*serial)));
                self.parts.exchange.remove(&places.collect::<Vec<_>>())?;
            }
        }
        Ok(())
    }

    fn compare_revocations(&mut self, keys: &Keys, buckets: &[u8]) -> Result<(), Fault> {
        let hashes: Vec<String> = buckets.iter().map(|of| keys.revocations(*of)).collect();
        let mut theirs = BTreeMap::new();
        for (field, value) in self.parts.exchange.all(&hashes)? {
            let Some(serial) = Serial::from_hex(&field) else { continue };
            let opened = self.open(keys, &Name::Revocation(serial), &value);
            theirs.extend(opened.and_then(Value::revocation).map(|known| (serial, known)));
        }
        let revocations = theirs.values().copied().collect();
        self.enter(Learnt { revocations, ..Learnt::default() })?;
        let ended_before = self.parts.publisher.ended_before(clock::now());
        let ours = buckets.iter().flat_map(|of| self.record().revocations_of(*of, ended_before));
        let lacking = ours.filter(|known| theirs.get(&known.serial) != Some(known));
        let lacking: Vec<Name> = lacking.map(|known| Name::Revocation(known.serial)).collect();
        self.progress.unsent.extend(lacking);
        self.send(keys)
    }

    fn compare_rows(
        &mut self,
        keys: &Keys,
        buckets: &[String],
        ours: Vec<DeviceId>,
    ) -> Result<(), Fault> {
        let mut theirs = BTreeMap::new();
        for (field, value) in self.parts.exchange.all(buckets)? {
            let Some(device) = DeviceId::parse(&field) else { continue };
            let opened = self.open(keys, &Name::Row(device.clone()), &value);
            theirs.extend(opened.and_then(Value::row).map(|row| (device, row)));
        }
        let rows = theirs.iter().map(|(device, row)| (device.clone(), row.clone())).collect();
        self.enter(Learnt { rows, ..Learnt::default() })?;
        let lacks = |device: &DeviceId| theirs.get(device) != Some(&self.parts.devices.row(device));
        let lacking: Vec<Name> = ours.into_iter().filter(lacks).map(Name::Row).collect();
        self.progress.unsent.extend(lacking);
        self.send(keys)
    }

    /// What this instance has changed it may have put and not announced before it ended (`docs/model`,
    /// row r10b). What it has recorded lately is news to the record after a start (row r1).
    fn announce_recent(&mut self, now: Now) {
        if self.parts.sharing.lock().read_ms.is_some() {
            return;
        }
        let changed = self.parts.devices.to_be_told(now);
        self.progress.unsent.extend(changed.into_iter().map(Name::Row));
    }
}

/// What was read and is to be kept.
#[derive(Default)]
struct Learnt {
    certificates: Vec<Shared>,
    revocations: Vec<Revocation>,
    rows: Vec<(DeviceId, Row)>,
}

impl Learnt {
    fn add(&mut self, value: Option<Value>) {
        match value {
            Some(Value::Certificate(shared)) => self.certificates.push(shared),
            Some(Value::Revocation(revocation)) => self.revocations.push(revocation),
            Some(Value::Row(device, row)) => self.rows.push((device, row)),
            None => {}
        }
    }
}

impl Value {
    fn revocation(self) -> Option<Revocation> {
        match self {
            Value::Revocation(revocation) => Some(revocation),
            _ => None,
        }
    }

    fn row(self) -> Option<Row> {
        match self {
            Value::Row(_, row) => Some(row),
            _ => None,
        }
    }
}

// The other side of the thread.
impl Sharing {
    /// Waits until there is something to do, at most so long; whether that cannot wait for the end of
    /// a pause.
    fn wait(&self, longest: Duration) -> bool {
        let idle = |state: &mut super::State| !state.woken;
        let waited = self.changed.wait_timeout_while(self.lock(), longest, idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.woken = false;
        std::mem::take(&mut state.hurry)
    }

    fn begin(&self) {
        self.lock().begun += 1;
    }

    fn end(&self) {
        let mut state = self.lock();
        state.ended = state.begun;
        drop(state);
        self.changed.notify_all();
    }
}
