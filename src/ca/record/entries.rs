//! A batch of entries on its way to the disk: first each `.pem`, then all lines at once, then the rows
//! in memory. What fails half-way is taken back, and if even that fails, it is said and made up for
//! by whoever writes next.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::sync::MutexGuard;

use super::merge::{Incoming, Plan, Shared};
use super::rows::Row;
use super::{CERTS, INDEX, Origin, Record, RecordError, Untold, Writer};
use crate::ca::issuer::Leaf;
use crate::clock::Now;
use crate::device::DeviceId;
use crate::files::{self, FilesError, Synced};
use crate::jwt::TokenHash;

/// From so many certificates on, a batch syncs the file system once instead of each file.
const SYNCED_TOGETHER: usize = 4;

/// A batch of entries that are recorded together, or not at all if dropped.
#[derive(Debug)]
pub struct Entries<'a> {
    pub(super) record: &'a Record,
    pub(super) writer: MutexGuard<'a, Writer>,
    pub(super) added: Vec<Incoming>,
    /// The same as others are told of them.
    fresh: Vec<Shared>,
    /// When the last one was added.
    now: Option<Now>,
}

impl<'a> Entries<'a> {
    /// Waits until no other writer is in.
    pub(super) fn begin(record: &'a Record) -> Self {
        Entries {
            record,
            writer: record.lock_writer(),
            added: Vec::new(),
            fresh: Vec::new(),
            now: None,
        }
    }

    pub fn knows_token(&self, token: &TokenHash) -> bool {
        let same = |new: &Incoming| new.token().is_some_and(|used| used.hash == *token);
        self.added.iter().any(same) || self.record.knows_token(token)
    }

    pub fn has_active(&self, device: &DeviceId, now: Now) -> bool {
        self.count_active(device, now) > 0
    }

    /// How many certificates the device has that are neither expired nor revoked, with those of this
    /// batch.
    pub(super) fn count_active(&self, device: &DeviceId, now: Now) -> usize {
        let active = |new: &&Incoming| new.row.is_of(device) && new.row.is_active(now);
        let rows = self.record.read();
        let recorded = rows.of_device(device).filter(|slot| slot.is_active(now)).count();
        self.added.iter().filter(active).count() + recorded
    }

    /// Adds a certificate and what it was signed for. A renewal was paid for when what it renews was.
    pub fn add(&mut self, leaf: &Leaf, origin: Option<Origin>, now: Now) {
        let origin = origin.map(|origin| match origin.renews() {
            Some(old) => Origin::Renewal { old, paid: Some(self.record.paid(&old)) },
            None => origin,
        });
        let text = origin.map(|origin| format!("{origin}\n")).unwrap_or_default() + &leaf.pem;
        self.fresh.push(Shared::new(leaf.serial, origin, now.unix_s(), leaf.der.clone()));
        self.added.push(Incoming {
            row: Row::new(leaf.serial, leaf.device.clone(), leaf.not_after),
            created_at: now.unix_s(),
            origin,
            text: Some(text),
        });
        self.now = Some(now);
    }

    /// Writes all that was added and answers for each, in the order of adding. What is `Ok` is on
    /// disk and seen by the readers; of what is not, [`RecordError::left_behind`] tells.
    pub fn commit(mut self) -> Vec<Result<(), RecordError>> {
        let results = self.write();
        let failed = results.iter().find(|result| result.is_err());
        if !results.is_empty() {
            let _ = self.record.trial.note(failed.cloned().unwrap_or(Ok(())));
        }
        let added = std::mem::take(&mut self.added).into_iter().zip(&results);
        let added = added.filter_map(|(new, result)| result.is_ok().then_some(new)).collect();
        let entered = Plan { added, ..Plan::default() };
        let mut rows = self.record.write();
        if let Some(now) = self.now {
            rows.drop_ended_tokens(now.unix_s());
            let renewed = entered.added.iter().filter(|new| new.renews().is_some());
            let devices = renewed.filter_map(|new| new.row.device.clone());
            devices.for_each(|device| self.writer.renewals.note(device, now));
        }
        rows.apply(&entered);
        drop(rows);
        let fresh = std::mem::take(&mut self.fresh).into_iter().zip(&results);
        self.record.news.keep(fresh.filter_map(|(fresh, result)| result.is_ok().then_some(fresh)));
        self.record.news.add(entered.added.iter().map(|new| Untold::Certificate(new.row.serial)));
        results
    }

    fn write(&mut self) -> Vec<Result<(), RecordError>> {
        let certs = self.record.dir.join(CERTS);
        let many = self.added.len() >= SYNCED_TOGETHER;
        let together = many.then(|| Synced::of(&certs)).flatten();
        let write = |new| self.write_pem(new, together.is_some());
        let mut results: Vec<_> = self.added.iter().map(write).collect();
        let written = self.added.iter().zip(&results).filter(|(_, r)| r.is_ok());
        let written: Vec<&Incoming> = written.map(|(new, _)| new).collect();
        if written.is_empty() {
            return results;
        }
        let lines: String = written.iter().map(|new| new.row.line()).collect();
        let outcome = together
            .map_or_else(|| files::sync_dir(&certs), |all| all.sync())
            .map_err(RecordError::not_written)
            .and_then(|()| self.record.append(&mut self.writer, lines));
        let Err(mut error) = outcome else { return results };
        // If lines may have stayed, their files must stay, too; if none has, the files are removed.
        if let RecordError::NotWritten { left_behind: left @ false, .. } = &mut error {
            let removed: Vec<bool> = written.iter().map(|new| self.remove_pem(new)).collect();
            *left = removed.contains(&false);
        }
        results.iter_mut().filter(|r| r.is_ok()).for_each(|r| *r = Err(error.clone()));
        results
    }

    /// `together`: it is synced later, with others.
    fn write_pem(&self, new: &Incoming, together: bool) -> Result<(), RecordError> {
        let path = self.record.pem_path(&new.row.serial);
        let text = new.text.as_deref().unwrap_or_default();
        files::create_new(&path, text.as_bytes(), 0o644, !together).map_err(|e| {
            let taken = e.kind == io::ErrorKind::AlreadyExists; // another's, let it be
            let left_behind = !taken && !self.remove_pem(new);
            RecordError::NotWritten { why: e.to_string(), left_behind }
        })
    }

    /// Whether the certificate's file is gone.
    fn remove_pem(&self, new: &Incoming) -> bool {
        let path = self.record.pem_path(&new.row.serial);
        // Where all is read-only nothing can be removed, and perhaps nothing was made.
        files::remove_if_there(&path).is_ok() || path.try_exists().is_ok_and(|there| !there)
    }
}

// How lines come into `index.txt`.
impl Record {
    /// Appends lines and syncs them, or cuts the file back to what it was.
    pub(super) fn append(&self, writer: &mut Writer, lines: String) -> Result<(), RecordError> {
        self.take_back(writer)?;
        let (mut file, before) = self.open_index()?;
        let added = file.write_all(lines.as_bytes()).and_then(|()| file.sync_all());
        let Err(e) = added else { return Ok(()) };
        let why = self.index_not_written(e).to_string();
        let cut = file.set_len(before).and_then(|()| file.sync_all());
        if cut.is_err() {
            writer.undo = Some((before, lines));
        }
        Err(RecordError::NotWritten { why, left_behind: cut.is_err() })
    }

    /// Cuts off what an earlier append left and could not take back. Only that: if something else
    /// stands there, somebody else has written the file since.
    pub(super) fn take_back(&self, writer: &mut Writer) -> Result<(), RecordError> {
        let Some((before, lines)) = &writer.undo else { return Ok(()) };
        let (mut file, length) = self.open_index()?;
        let mut undo = || {
            if length > *before && is_rest(&mut file, *before, lines)? {
                file.set_len(*before)?;
                file.sync_all()?;
            }
            Ok(())
        };
        undo().map_err(|e| self.index_not_written(e))?;
        writer.undo = None;
        Ok(())
    }

    fn open_index(&self) -> Result<(File, u64), RecordError> {
        let open = || {
            let file = OpenOptions::new().read(true).append(true).open(self.dir.join(INDEX))?;
            let length = file.metadata()?.len();
            Ok((file, length))
        };
        open().map_err(|e| self.index_not_written(e))
    }

    fn index_not_written(&self, e: io::Error) -> RecordError {
        RecordError::not_written(FilesError::io("cannot write", &self.dir.join(INDEX))(e))
    }
}

/// Whether what stands from `at` to the end of the file is a beginning of `lines`.
fn is_rest(file: &mut File, at: u64, lines: &str) -> io::Result<bool> {
    file.seek(SeekFrom::Start(at))?;
    let mut rest = Vec::new();
    file.take(lines.len() as u64 + 1).read_to_end(&mut rest)?;
    Ok(lines.as_bytes().starts_with(&rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::record::Reason;
    use crate::ca::record::tests::{Fixture, device, enter, token};
    use crate::ca::tests::run_program;
    use crate::clock;
    use crate::files::test_dir::TestDir;
    use crate::serial::Serial;
    use std::fs;
    use std::path::Path;

    #[test]
    fn a_serial_number_is_never_written_twice() {
        let fixture = Fixture::new();
        let record = fixture.open();
        let leaf = fixture.leaf("device-1");
        enter(&record, &leaf, None).unwrap();
        let before = (fixture.index(), fs::read(record.pem_path(&leaf.serial)).unwrap());
        let mut entries = record.begin();
        entries.add(&leaf, None, clock::now());
        entries.add(&fixture.leaf("device-2"), None, clock::now());
        let results = entries.commit();
        assert!(!results[0].as_ref().unwrap_err().left_behind());
        assert_eq!(results[1], Ok(()), "one's failure is not another's");
        assert!(fixture.index().starts_with(&before.0));
        assert_eq!(fs::read(record.pem_path(&leaf.serial)).unwrap(), before.1);
        drop(record.begin());
    }

    #[test]
    fn a_failed_append_leaves_nothing_or_says_so() {
        let fixture = Fixture::new();
        let record = fixture.open();
        enter(&record, &fixture.leaf("device-1"), None).unwrap();
        let index = fixture.dir.join(INDEX);
        let (before, aside) = (fixture.index(), fixture.dir.join("aside"));

        // No folder for certificates.
        let certs = fixture.dir.join(CERTS);
        fs::rename(&certs, &aside).unwrap();
        fs::write(&certs, "").unwrap();
        let error = enter(&record, &fixture.leaf("device-2"), None).unwrap_err();
        assert!(!error.left_behind() && error.to_string().contains("Not a dir"), "{error}");
        fs::remove_file(&certs).unwrap();
        fs::rename(&aside, &certs).unwrap();

        // No file: nothing could be written.
        fs::rename(&index, &aside).unwrap();
        let leaf = fixture.leaf("device-2");
        let error = enter(&record, &leaf, Some(token("t", u64::MAX))).unwrap_err();
        assert!(
            !error.left_behind() && error.to_string().contains("index.txt: No such"),
            "{error}"
        );
        assert_eq!(fixture.pems(), 1);

        // A file that takes nothing and cannot be cut either.
        std::os::unix::fs::symlink("/dev/full", &index).unwrap();
        let error = enter(&record, &leaf, Some(token("t", u64::MAX))).unwrap_err();
        assert!(error.left_behind() && error.to_string().contains("No space left"), "{error}");
        assert_eq!(fixture.pems(), 2, "a line that may have stayed needs its certificate");
        assert!(!record.knows_token(&TokenHash::of("t")));
        let error = enter(&record, &fixture.leaf("device-3"), None).unwrap_err();
        assert!(error.to_string().contains("index.txt"), "{error}");

        // The true file is back: what stands there is not what failed, so it is left alone.
        fs::remove_file(&index).unwrap();
        fs::rename(&aside, &index).unwrap();
        enter(&record, &fixture.leaf("device-4"), None).unwrap();
        assert!(fixture.index().starts_with(&before) && fixture.index().lines().count() == 2);
    }

    #[test]
    fn what_could_not_be_taken_back_is_taken_back_later() {
        let fixture = Fixture::new();
        let record = fixture.open();
        enter(&record, &fixture.leaf("device-1"), None).unwrap();
        let before = fixture.index();
        let lines = Row::new(Serial::from([0x41; 16]), device("d"), 1).line();
        for (stays, expected) in [("", &before), (&lines[..20], &before), (&lines, &before)] {
            fs::write(fixture.dir.join(INDEX), format!("{before}{stays}")).unwrap();
            let undo = Some((before.len() as u64, lines.clone()));
            let mut writer = record.lock_writer();
            writer.undo = undo;
            record.take_back(&mut writer).unwrap();
            assert_eq!((&fixture.index(), &writer.undo), (expected, &None));
        }
    }

    /// Unmounted when dropped, also by a failing test.
    struct Mounted<'a>(&'a Path);

    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = run_program(Path::new("/"), "umount", &self.0.display().to_string());
        }
    }

    /// A full disk, as real as it gets without one: 64 KiB in pages of 4, where mounting is allowed.
    #[test]
    fn a_full_disk() {
        let fixture = Fixture::new();
        let dir = TestDir::new();
        let mount = format!("-t tmpfs -o size=64k none {}", dir.display());
        if let Err(e) = run_program(&dir, "mount", &mount) {
            eprintln!("not tried: {e}");
            return;
        }
        let _mounted = Mounted(&dir);
        // The index nearly fills its page, so that a line needs another and is torn without one.
        let line = |n: u8| Row::new(Serial::from([n; 16]), device("d"), 1).line();
        let seed: String = (1..=(4096 / line(1).len()) as u8).map(line).collect();
        fs::write(dir.join(INDEX), &seed).unwrap();
        let record = Record::open(&dir, None, Some(clock::now())).unwrap();
        let index = || fs::read_to_string(dir.join(INDEX)).unwrap();
        let fill = |room: u64| {
            let mut file = File::create(dir.join("filler")).unwrap();
            while file.write_all(&[0; 4096]).is_ok() {}
            let full = file.metadata().unwrap().len();
            file.set_len(full - room * 4096).unwrap();
        };
        let remount = |how: &str| {
            run_program(&dir, "mount", &format!("-o remount,{how} {}", dir.display())).unwrap()
        };
        remount("ro");
        let error = enter(&record, &fixture.leaf("device-2"), None).unwrap_err();
        assert!(!error.left_behind() && error.to_string().contains("Read-only"), "{error}");
        remount("rw");
        let leaves = [(); 3].map(|()| fixture.leaf("device-2"));
        for room in 0..4 {
            fill(room);
            let mut entries = record.begin();
            leaves.iter().for_each(|leaf| {
                entries.add(leaf, Some(Origin::Token(token("t", u64::MAX))), clock::now())
            });
            for result in entries.commit() {
                let error = result.unwrap_err();
                assert!(!error.left_behind() && error.to_string().contains("No space"), "{error}");
            }
            assert_eq!(
                (index(), fs::read_dir(dir.join(CERTS)).unwrap().count()),
                (seed.clone(), 0)
            );
            assert!(!record.look(&TokenHash::of("t"), &device("device-2"), clock::now()).0);
            fs::remove_file(dir.join("filler")).unwrap();
        }
        // Room again: the same process goes on. With room for the lines and two of them, two are.
        enter(&record, &fixture.leaf("device-2"), None).unwrap();
        fill(2);
        let mut entries = record.begin();
        leaves.iter().for_each(|leaf| entries.add(leaf, None, clock::now()));
        assert_eq!(entries.commit().iter().filter(|r| r.is_ok()).count(), 2);
        let before = index();
        assert!(record.revoke(&device("device-2"), Reason::Unspecified, clock::now()).is_err());
        assert!(record.has_active(&device("device-2"), clock::now()) && index() == before);
        fs::remove_file(dir.join("filler")).unwrap();
        assert_eq!(
            record.revoke(&device("device-2"), Reason::Unspecified, clock::now()).map(|s| s.len()),
            Ok(3)
        );
        assert_eq!(Record::open(&dir, None, None).unwrap().revoked(clock::now()).len(), 3);
    }
}
