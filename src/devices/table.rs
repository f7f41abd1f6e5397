//! The rows that this instance knows, each change on disk before anybody sees it.
//!
//! Whoever changes something puts it on a list and waits for the file. The first to get the file
//! writes all that is on the list, with one `fsync`, and enters it; the others find theirs done. The
//! rows have a lock of their own, which is never held while something is written that others wait
//! for: reading never waits for the disk.
//!
//! A row is kept as bytes, its device's name before it, in one piece of memory: 10,000 registered
//! devices take 1.4 MB, where a row as a structure would take three times that.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::ops;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use super::codec;
use super::file::{self, DevicesFile};
use super::{Block, Bound, Instance, Row};
use crate::clock::{Now, Steady};
use crate::device::DeviceId;
use crate::files::FilesError;
use crate::locks::{locked, reading, writing};
use crate::trial::Trial;

/// How far two clocks may drift apart without one having been set, in milliseconds.
const DRIFT_MS: u64 = 3_600_000;

/// So many bounds are kept in mind until their rows come; when there are more, all are forgotten. Of so
/// many devices is noted that their rows are not ours.
const HEARD_MOST: usize = 4096;

/// So many rows are looked at for one page of a list, while nobody can change any.
pub const ROWS_LOOKED_AT: usize = 10_000;

/// Whether a change is on disk; else it was not made.
pub type Written = Result<(), Arc<FilesError>>;

/// The rows of all devices.
#[derive(Debug)]
pub struct Devices {
    own: Instance,
    rows: RwLock<BTreeSet<Packed>>,
    /// Changes that wait for the file.
    waiting: Mutex<Vec<Arc<Change>>>,
    writer: Mutex<Writer>,
    trial: Arc<Trial>,
    /// Devices whose rows were changed here since they were last asked for.
    changed: Mutex<BTreeSet<DeviceId>>,
    /// Devices of which others have killed certificates: the record is still to revoke them.
    killed: Mutex<BTreeSet<DeviceId>>,
    /// Bounds that were read with a token and did not come by the way on which rows are shared yet. Not
    /// on disk: a token writes nothing.
    heard: Mutex<BTreeMap<DeviceId, Bound>>,
    /// Devices of which a token met a row in Redis that is not ours.
    doubted: Mutex<BTreeSet<DeviceId>>,
}

/// What only who writes needs.
#[derive(Debug)]
struct Writer {
    file: DevicesFile,
    /// Rows are dropped by a clock that has gone evenly for long.
    steady: Steady,
}

/// Changes that are made together, or not at all.
#[derive(Debug)]
struct Change {
    /// The registers that are to be merged into each row.
    news: Vec<(DeviceId, Row)>,
    /// They were made here.
    ours: bool,
    outcome: OnceLock<Written>,
}

/// Whether the file can be read, if there is one.
pub fn check(path: &Path) -> Result<(), FilesError> {
    file::load(path, |_, _, _| ()).map(drop)
}

impl Devices {
    /// Reads the file, or makes one.
    pub fn open(path: &Path, own: Instance, now: Now) -> Result<Self, FilesError> {
        let mut rows = BTreeSet::new();
        let file = DevicesFile::open(path, |device, news, writer| {
            merge_into(&mut rows, &device, news, writer == Some(own));
        })?;
        let writer = Mutex::new(Writer { file, steady: Steady::from(now, DRIFT_MS) });
        let folders = path.parent().map(Path::to_owned).into_iter().collect();
        let trial = Arc::new(Trial::new("the list of devices", folders, path.to_owned()));
        let (rows, waiting, changed) = (RwLock::new(rows), Mutex::default(), Mutex::default());
        let (killed, heard, doubted) = (Mutex::default(), Mutex::default(), Mutex::default());
        Ok(Devices { own, rows, waiting, writer, trial, changed, killed, heard, doubted })
    }

    /// Whether the rows can be written.
    pub fn trial(&self) -> &Arc<Trial> {
        &self.trial
    }

    /// The instance whose rows these are.
    pub fn own(&self) -> Instance {
        self.own
    }

    /// How far the device's past is dead, and whether it is blocked.
    pub fn bound(&self, device: &DeviceId) -> (Bound, Block) {
        let heard = locked(&self.heard).get(device).copied().unwrap_or_default();
        let rows = reading(&self.rows);
        let known = rows.get(device.as_str().as_bytes()).map(Packed::bound);
        let (bound, block) = known.unwrap_or_default();
        (Bound { t: bound.t.max(heard.t), ..bound }, block)
    }

    /// The devices whose bound reaches certificates, each with its `c`.
    pub fn bounds(&self) -> Vec<(DeviceId, u64)> {
        let rows = reading(&self.rows);
        let reaching = rows.iter().map(|row| (row, row.bound().0.c)).filter(|(_, c)| *c > 0);
        reaching.filter_map(|(row, c)| Some((row.device()?, c))).collect()
    }

    /// All that is known of the device.
    pub fn row(&self, device: &DeviceId) -> Row {
        let rows = reading(&self.rows);
        rows.get(device.as_str().as_bytes()).map(Packed::row).unwrap_or_default()
    }

    /// Keeps a bound in mind that was read with a token: an instance that is cut off a moment later is to
    /// redeem nothing that is dead, and to issue nothing that is.
    pub fn hear(&self, device: &DeviceId, bound: Bound) {
        if bound.t <= self.bound(device).0.t {
            return;
        }
        let mut heard = locked(&self.heard);
        if heard.len() >= HEARD_MOST {
            heard.clear();
        }
        let known = heard.entry(device.clone()).or_default();
        known.t = known.t.max(bound.t);
    }

    /// Notes a device whose row in Redis none of our instances has written.
    pub fn doubt(&self, device: &DeviceId) {
        let mut doubted = locked(&self.doubted);
        // Who is left out comes again.
        if doubted.len() < HEARD_MOST {
            doubted.insert(device.clone());
        }
    }

    /// The devices that were noted so since this was last asked: their rows are to be put right.
    pub fn take_doubted(&self) -> BTreeSet<DeviceId> {
        std::mem::take(&mut *locked(&self.doubted))
    }

    /// As [`Devices::row`], with the bound that was heard.
    pub fn row_as_heard(&self, device: &DeviceId) -> Row {
        let (bound, _) = self.bound(device);
        self.row(device).merge(Row { bound, ..Row::default() })
    }

    /// The devices behind `after` whose names begin with `prefix` and that are listed: the first
    /// `most`, by name. At most [`ROWS_LOOKED_AT`] rows are looked at: if there are more, the last of
    /// these comes with them.
    pub fn listed_after(
        &self,
        after: &str,
        prefix: &str,
        most: usize,
    ) -> (Vec<(DeviceId, Row)>, Option<DeviceId>) {
        let rows = reading(&self.rows);
        let begin = match after < prefix {
            true => ops::Bound::Included(prefix.as_bytes()),
            false => ops::Bound::Excluded(after.as_bytes()),
        };
        let behind = rows.range::<[u8], _>((begin, ops::Bound::Unbounded));
        let wanted = behind.take_while(|row| row.parts().0.starts_with(prefix.as_bytes()));
        let (mut listed, mut last) = (Vec::new(), None);
        for (looked_at, packed) in wanted.enumerate() {
            if listed.len() == most {
                break;
            }
            if looked_at == ROWS_LOOKED_AT {
                return (listed, last.and_then(Packed::device));
            }
            let row = packed.row();
            if row.is_listed() {
                listed.extend(packed.device().map(|device| (device, row)));
            }
            last = Some(packed);
        }
        (listed, None)
    }

    /// Raises the bound of a device by itself.
    #[cfg(test)]
    pub fn raise(&self, device: &DeviceId, bound: Bound, now: Now) -> Written {
        self.enter(vec![(device.clone(), Row { bound, ..Row::default() })], true, now)
    }

    /// Merges rows into those known here, `ours` if the changes were made by this instance; on disk
    /// when it returns. What no longer matters is not taken from elsewhere. If they could not be written,
    /// nothing was changed.
    pub fn enter(&self, rows: Vec<(DeviceId, Row)>, ours: bool, now: Now) -> Written {
        let news = rows.into_iter().filter(|(_, row)| ours || row.matters(now.unix_s()));
        let news = news.map(|(device, row)| {
            let news = row.news_for(&self.row(&device));
            (device, news)
        });
        let news: Vec<_> = news.filter(|(_, row)| *row != Row::default()).collect();
        if news.is_empty() {
            return Ok(());
        }
        let change = Arc::new(Change { news, ours, outcome: OnceLock::new() });
        locked(&self.waiting).push(Arc::clone(&change));
        let mut writer = locked(&self.writer);
        match change.outcome.get() {
            Some(outcome) => outcome.clone(),
            None => self.write(&mut writer, std::mem::take(&mut *locked(&self.waiting)), now),
        }
    }

    /// The devices whose rows Redis is to be told when it returns: those that this instance has
    /// changed, and those whose bound may still meet a token.
    pub fn to_be_told(&self, now: Now) -> Vec<DeviceId> {
        let now_s = now.unix_s();
        let recent = |row: &Packed| row.bound().0.is_recent(now_s);
        let ours = |row: &Packed| row.ours() && row.row().matters(now_s);
        let rows = reading(&self.rows);
        rows.iter().filter(|row| recent(row) || ours(row)).filter_map(Packed::device).collect()
    }

    /// The devices whose rows were changed here since this was last asked: others are to be told.
    pub fn take_changed(&self) -> BTreeSet<DeviceId> {
        std::mem::take(&mut *locked(&self.changed))
    }

    /// Notes devices of whose rows others are to be told, who may have looked before these stood in Redis.
    pub fn note_changed(&self, devices: impl IntoIterator<Item = DeviceId>) {
        locked(&self.changed).extend(devices);
    }

    /// Notes devices whose bound may kill certificates that the record still counts as valid. A bound
    /// that is learnt from others is noted by itself.
    pub fn note_killed(&self, devices: impl IntoIterator<Item = DeviceId>) {
        locked(&self.killed).extend(devices);
    }

    /// The devices that were noted since this was last asked, each with the `c` of its bound: whoever asks
    /// applies them to the record, or notes them again.
    pub fn take_killed(&self) -> Vec<(DeviceId, u64)> {
        let killed = std::mem::take(&mut *locked(&self.killed));
        let bounds: Vec<u64> = killed.iter().map(|device| self.bound(device).0.c).collect();
        killed.into_iter().zip(bounds).collect()
    }

    /// The devices of which something matters.
    pub fn all(&self, now: Now) -> Vec<DeviceId> {
        let rows = reading(&self.rows);
        let matters = |row: &&Packed| row.row().matters(now.unix_s());
        rows.iter().filter(matters).filter_map(Packed::device).collect()
    }

    /// Writes all changes with one sync, and only then lets anybody see them.
    fn write(&self, writer: &mut Writer, changes: Vec<Arc<Change>>, now: Now) -> Written {
        let lines: String = changes.iter().map(|change| change.lines(self.own, now)).collect();
        let outcome = self.trial.note(writer.file.append(&lines)).map_err(Arc::new);
        if outcome.is_ok() {
            let mut rows = writing(&self.rows);
            for change in &changes {
                for (device, news) in &change.news {
                    merge_into(&mut rows, device, news.clone(), change.ours);
                }
            }
        }
        for change in changes {
            if outcome.is_ok() {
                let noted = |(_, news): &&(DeviceId, Row)| change.ours || news.bound.c > 0;
                let list = if change.ours { &self.changed } else { &self.killed };
                let devices = change.news.iter().filter(noted).map(|(device, _)| device.clone());
                locked(list).extend(devices);
            }
            let _ = change.outcome.set(outcome.clone()); // it is set here only
        }
        if writer.file.has_doubled() {
            self.rewrite(writer, now);
        }
        outcome
    }

    /// Drops what no longer matters, and writes the rest anew. Only who holds the writer changes the
    /// rows, so the lock under which they are read here makes nobody wait.
    fn rewrite(&self, writer: &mut Writer, now: Now) {
        if writer.steady.for_a_day(now) {
            let mut rows = writing(&self.rows);
            rows.retain(|row| row.row().matters(now.unix_s()));
        }
        let rows = reading(&self.rows);
        let lines = rows.iter().filter_map(|packed| {
            let writer = packed.ours().then_some(self.own);
            Some(file::lines(&packed.device()?, &packed.row(), writer, now.unix_ms))
        });
        if let Err(error) = writer.file.rewrite(lines) {
            log::warn!("{error}; it grows on until it can be rewritten");
        }
    }
}

impl Change {
    fn lines(&self, own: Instance, now: Now) -> String {
        let writer = self.ours.then_some(own);
        self.news
            .iter()
            .map(|(device, row)| file::lines(device, row, writer, now.unix_ms))
            .collect()
    }
}

fn merge_into(rows: &mut BTreeSet<Packed>, device: &DeviceId, news: Row, ours: bool) {
    let known = rows.get(device.as_str().as_bytes());
    let ours = ours || known.is_some_and(Packed::ours);
    let row = known.map(Packed::row).unwrap_or_default().merge(news);
    rows.replace(Packed::new(device, &row, ours));
}

/// A device and its row in one piece: whether this instance has changed it, the length of the name, the
/// name, the row.
/// Two are equal if they are of one device.
#[derive(Debug)]
struct Packed(Box<[u8]>);

impl Packed {
    fn new(device: &DeviceId, row: &Row, ours: bool) -> Self {
        let name = device.as_str().as_bytes();
        let mut bytes = vec![u8::from(ours), name.len() as u8];
        bytes.extend(name);
        codec::encode(row, &mut bytes);
        Packed(bytes.into())
    }

    fn ours(&self) -> bool {
        self.0.first() == Some(&1)
    }

    /// The name and the row. They are there: nobody else makes or changes a piece.
    fn parts(&self) -> (&[u8], &[u8]) {
        let [_, length, rest @ ..] = &*self.0 else { return (&[], &[]) };
        rest.split_at_checked(usize::from(*length)).unwrap_or_default()
    }

    fn device(&self) -> Option<DeviceId> {
        DeviceId::parse(std::str::from_utf8(self.parts().0).ok()?)
    }

    fn bound(&self) -> (Bound, Block) {
        codec::decode_bound(self.parts().1).unwrap_or_default()
    }

    fn row(&self) -> Row {
        codec::decode(self.parts().1).unwrap_or_default()
    }
}

impl Borrow<[u8]> for Packed {
    fn borrow(&self) -> &[u8] {
        self.parts().0
    }
}

impl Ord for Packed {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().0.cmp(other.parts().0)
    }
}

impl PartialOrd for Packed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Packed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Packed {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::SecretHash;
    use crate::devices::fixture::{block, bound, full, registered, spent};
    use crate::files::test_dir::TestDir;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Barrier;
    use std::thread;

    const OWN: Instance = Instance([1; 16]);
    const T: u64 = 1_800_000_000;

    fn at(s: u64) -> Now {
        Now { unix_ms: (T + s) * 1000, mono_ms: s * 1000 }
    }

    fn device(n: u64) -> DeviceId {
        DeviceId::parse(&format!("device-{n:05}")).unwrap()
    }

    fn open(dir: &Path) -> Devices {
        Devices::open(&dir.join("devices.txt"), OWN, at(0)).unwrap()
    }

    fn lines(dir: &Path) -> usize {
        fs::read_to_string(dir.join("devices.txt")).unwrap().lines().count() - 1
    }

    fn raise(devices: &Devices, n: u64, t: u64) {
        devices.raise(&device(n), Bound { t, c: 0 }, at(0)).unwrap();
    }

    #[test]
    fn a_bound_is_raised_never_lowered_and_survives() {
        let dir = TestDir::new();
        let devices = open(&dir);
        assert_eq!(devices.bound(&device(1)), Default::default());
        raise(&devices, 1, T);
        raise(&devices, 1, T - 1);
        raise(&devices, 1, T);
        assert_eq!(lines(&dir), 1, "a kill writes one line, and none where it is known");
        devices.raise(&device(1), Bound { t: T - 1, c: 7 }, at(0)).unwrap();
        let expected = Bound { t: T, c: 7 };
        assert_eq!(devices.bound(&device(1)).0, expected);
        assert_eq!(open(&dir).bound(&device(1)).0, expected);
        assert_eq!(open(&dir).row(&device(1)), bound(T, 7));
        assert_eq!(open(&dir).row(&device(2)), Row::default());
        let mode = fs::metadata(dir.join("devices.txt")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn rows_from_elsewhere_are_merged_and_only_what_is_new_is_written() {
        let dir = TestDir::new();
        let devices = open(&dir);
        let old = bound(T - 90_000, 0);
        devices.enter(vec![(device(1), full()), (device(2), old)], false, at(0)).unwrap();
        assert_eq!((lines(&dir), devices.row(&device(2))), (5, Row::default()));
        let more = full().merge(block(u64::MAX, 0)).merge(spent(7));
        devices
            .enter(vec![(device(1), more.clone()), (device(2), spent(1))], false, at(0))
            .unwrap();
        assert_eq!(lines(&dir), 8);
        devices.enter(vec![(device(1), more.clone())], false, at(0)).unwrap();
        assert_eq!(lines(&dir), 8);
        let again = open(&dir);
        assert_eq!((again.row(&device(1)), again.row(&device(2))), (more, spent(1)));
        assert!(again.bound(&device(1)).1.stands());
    }

    #[test]
    fn what_redis_is_told_when_it_returns() {
        let dir = TestDir::new();
        let devices = open(&dir);
        let rows = |n, row| vec![(device(n), row)];
        devices.enter(rows(1, bound(T - 86_519, 0)), false, at(0)).unwrap();
        devices.enter(rows(2, spent(1)), false, at(0)).unwrap();
        devices.enter(rows(3, spent(1)), true, at(0)).unwrap();
        devices.enter(rows(4, bound(T - 86_520, 0)), true, at(0)).unwrap();
        for devices in [&devices, &open(&dir)] {
            assert_eq!(devices.to_be_told(at(0)), [device(1), device(3)]);
            assert_eq!(devices.to_be_told(at(1)), [device(3)]);
        }
        let clone = Devices::open(&dir.join("devices.txt"), Instance([2; 16]), at(0)).unwrap();
        assert_eq!(clone.to_be_told(at(0)), [device(1)]);
    }

    #[test]
    fn many_that_wait_share_one_sync_and_nobody_who_reads_waits() {
        let dir = TestDir::new();
        let devices = open(&dir);
        raise(&devices, 0, T);
        thread::scope(|scope| {
            let writer = locked(&devices.writer); // somebody's fsync takes its time
            for n in 1..=8 {
                let devices = &devices;
                let kill = move || devices.raise(&device(n), Bound { t: T, c: 0 }, at(n)).unwrap();
                scope.spawn(kill);
            }
            while locked(&devices.waiting).len() < 8 {
                thread::yield_now();
            }
            assert_eq!(devices.bound(&device(0)).0.t, T);
            assert_eq!(devices.bound(&device(8)).0.t, 0, "it is not on disk yet");
            raise(&devices, 0, T - 1); // known, so there is nothing to wait for
            drop(writer);
        });
        let text = fs::read_to_string(dir.join("devices.txt")).unwrap();
        let times: BTreeSet<_> = text.lines().skip(2).map(|line| line.split('\t').nth(2)).collect();
        assert_eq!((lines(&dir), times.len()), (9, 1), "they bear the time of who wrote them all");
        assert!((0..=8).all(|n| open(&dir).bound(&device(n)).0.t == T));
    }

    #[test]
    fn what_cannot_be_written_was_not_done() {
        let dir = TestDir::new();
        let devices = open(&dir);
        raise(&devices, 1, T);
        let (path, away) = (dir.join("devices.txt"), dir.join("away"));
        fs::rename(&path, &away).unwrap();
        let error = devices.raise(&device(1), Bound { t: T + 9, c: 0 }, at(0)).unwrap_err();
        assert!(error.to_string().contains("cannot write"), "{error}");
        assert_eq!(devices.bound(&device(1)).0.t, T);
        fs::rename(&away, &path).unwrap();
        raise(&devices, 1, T + 9);
        assert_eq!(open(&dir).bound(&device(1)).0.t, T + 9);
    }

    #[test]
    fn a_copy_taken_while_it_is_written_knows_all_that_was_said_before() {
        let dir = TestDir::new();
        let devices = open(&dir);
        let begun = Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                begun.wait();
                // Lines enough for several rewritings.
                for t in 0..60 {
                    let rows = (0..50).map(|n| (device(n), bound(T + t, 0))).collect();
                    devices.enter(rows, true, at(0)).unwrap();
                }
            });
            begun.wait();
            for _ in 0..50 {
                let said: Vec<u64> = (0..50).map(|n| devices.bound(&device(n)).0.t).collect();
                let copy = TestDir::new();
                fs::copy(dir.join("devices.txt"), copy.join("devices.txt")).unwrap();
                let copy = open(&copy);
                let kept = (0..50).all(|n| copy.bound(&device(n)).0.t >= said[n as usize]);
                assert!(kept, "{said:?}");
            }
        });
        let length = fs::metadata(dir.join("devices.txt")).unwrap().len();
        assert!(length < 60 * 50 * 80, "{length}: it was never rewritten");
        assert_eq!(open(&dir).bound(&device(49)).0.t, T + 59);
    }

    #[test]
    fn a_list_looks_at_so_many_rows_and_says_where_it_stopped() {
        let dir = TestDir::new();
        let devices = open(&dir);
        let row = |n: u64| if n % 4000 == 1 { spent(1) } else { bound(T + 9, 0) };
        let most = ROWS_LOOKED_AT as u64;
        devices.enter((0..2 * most).map(|n| (device(n), row(n))).collect(), true, at(0)).unwrap();
        let list = |after: &str, most| {
            let (listed, end) = devices.listed_after(after, "device-", most);
            (listed.into_iter().map(|(device, _)| device).collect::<Vec<_>>(), end)
        };
        assert_eq!(list("", 2), (vec![device(1), device(4001)], None));
        let end = device(most - 1);
        let first = vec![device(1), device(4001), device(8001)];
        assert_eq!(list("", 9), (first, Some(end.clone())));
        assert_eq!(list(end.as_str(), 9), (vec![device(12_001), device(16_001)], None));
        assert_eq!(list(device(most).as_str(), 2).0.len(), 2);
    }

    /// Only a clock that has gone evenly for a day drops anything.
    #[test]
    fn rows_that_no_longer_matter_go_when_the_file_is_rewritten() {
        let day = |n: u64| Now { unix_ms: at(n * 86_400).unix_ms, mono_ms: n * 86_400_000 };
        let step = |now: Now, by_ms| Now { unix_ms: now.unix_ms + by_ms, ..now };
        for (now, dropped) in [
            (day(2), true),
            (step(day(2), 3_500_000), true),
            (step(day(2), 3_700_000), false),
            (Now { mono_ms: 86_399_999, ..day(2) }, false),
        ] {
            let dir = TestDir::new();
            let devices = open(&dir);
            raise(&devices, 1, T);
            devices.enter(vec![(device(2), full())], true, at(0)).unwrap();
            let mut writer = locked(&devices.writer);
            devices.rewrite(&mut writer, now);
            drop(writer);
            let gone = devices.row(&device(1)) == Row::default();
            assert_eq!((gone, lines(&dir)), (dropped, if dropped { 5 } else { 6 }), "{now:?}");
            assert_eq!(devices.row(&device(2)), full());
            assert!(open(&dir).to_be_told(at(0)).contains(&device(2)), "still ours");
        }
    }

    #[test]
    fn a_registered_device_takes_150_bytes() {
        let count = 10_000;
        let dir = TestDir::new();
        let devices = open(&dir);
        let row = |n: u64| {
            let mut row = registered(at(n).unix_ms, T + 7_776_000).merge(bound(T + n, 0));
            let terms = row.registration.as_mut().and_then(|latest| latest.terms.as_mut()).unwrap();
            (terms.note, terms.secret) = (None, terms.secret.map(|_| SecretHash([n as u8; 32])));
            row
        };
        let rows = (0..count).map(|n| (device(n), row(n))).collect();
        devices.enter(rows, true, at(0)).unwrap();
        let rows = devices.rows.read().unwrap();
        // Malloc rounds up to 16, with 8 of its own; a node of the tree is half full at worst.
        let pieces: usize =
            rows.iter().map(|packed| (packed.0.len() + 8).next_multiple_of(16)).sum();
        let slots = rows.len() * 2 * size_of::<Packed>();
        let each = (pieces + slots) / rows.len();
        assert!(rows.len() as u64 == count && each <= 150, "{each}");
    }
}
