//! Forgetting what has ended long ago: in one rewrite it leaves the disk and memory.
//!
//! Certificates go before their lines: whatever is interrupted leaves lines without a certificate, which
//! go the next time, and no certificate that a start would enter again. Where others' certificates lie
//! afterwards is put right by the next start if this one does not come to that.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write as _};

use super::index::Change;
use super::rows::{Place, Rows, Slot};
use super::{INDEX, Record, RecordError, others, repair};
use crate::files::{self, FilesError};
use crate::serial::Serial;

impl Record {
    /// Forgets what ended before this second, and says what that was.
    ///
    /// The caller vouches for the clock: one that is ahead would forget what is valid. What is left
    /// after a failure goes the next time.
    pub fn prune(&self, ended_before: u64) -> Result<Vec<Serial>, RecordError> {
        let mut writer = self.lock_writer();
        let is_gone = |slot: &&Slot| slot.expires_at < ended_before;
        let gone: Vec<Slot> = self.read().list.iter().filter(is_gone).copied().collect();
        if gone.is_empty() {
            return Ok(Vec::new());
        }
        for slot in gone.iter().filter(|slot| !matches!(slot.place, Place::Others(_))) {
            files::remove_if_there(&self.pem_path(&slot.serial))?;
        }
        let places = self.rewrite_others(ended_before)?;
        let mut changes: HashMap<Serial, Change> = self.read().placed(ended_before, &places);
        changes.extend(gone.iter().map(|slot| (slot.serial, Change::Gone)));
        self.write_index(&mut writer, String::new(), changes)?;
        let (mut kept, _) = repair::read_index(&self.dir.join(INDEX))?.unwrap_or_default();
        for spent in self.read().spent() {
            kept.add_token_of(&spent);
        }
        *self.write() = kept;
        Ok(gone.into_iter().map(|slot| slot.serial).collect())
    }

    /// Writes the file of others' certificates anew, without those that go. Returns where each begins.
    fn rewrite_others(&self, ended_before: u64) -> Result<HashMap<Serial, u32>, RecordError> {
        let all = self.read().others().count();
        let stays = |(_, slot): &(u32, &Slot)| slot.expires_at >= ended_before;
        let mut kept: Vec<(u32, Serial)> =
            self.read().others().filter(stays).map(|(at, slot)| (at, slot.serial)).collect();
        kept.sort_unstable();
        let mut places = kept.iter().map(|(at, serial)| (*serial, *at)).collect();
        if kept.len() == all {
            return Ok(places);
        }
        let path = self.others_path();
        let old = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(places),
            old => old.map_err(FilesError::io("cannot read", &path))?,
        };
        let mut copy = |new: &mut File| {
            let (mut new, mut length) = (BufWriter::new(new), 0_u64);
            for (at, serial) in &kept {
                // A text that cannot be read is not copied; reading by its line then finds nothing.
                let Some(text) = others::read(&old, u64::from(*at))? else { continue };
                places.insert(*serial, u32::try_from(length).map_err(io::Error::other)?);
                new.write_all(text.as_bytes())?;
                length += text.len() as u64;
            }
            new.flush()
        };
        files::write_atomic_by(&path, 0o644, &mut copy).map_err(RecordError::not_written)?;
        Ok(places)
    }
}

impl Rows {
    /// How the lines of others' certificates change that stay.
    fn placed(&self, ended_before: u64, places: &HashMap<Serial, u32>) -> HashMap<Serial, Change> {
        let mut changes = HashMap::new();
        for (before, slot) in self.list.iter().enumerate() {
            let stays = slot.expires_at >= ended_before;
            let Some(at) = places.get(&slot.serial).filter(|_| stays) else { continue };
            let newer = self.newer_before(slot, before, ended_before);
            changes.insert(slot.serial, Change::Moved(Place::Others(*at), Some(newer)));
        }
        changes
    }

    /// How many of the device's rows that stay and stand before this one are newer.
    fn newer_before(&self, slot: &Slot, before: usize, ended_before: u64) -> u32 {
        let Some(device) = self.device(slot) else { return 0 };
        let newer = self.of_device(&device).take_while(|newer| newer.serial != slot.serial);
        let counts = |newer: &&Slot| {
            newer.expires_at >= ended_before
                && self.place_of(&newer.serial).is_some_and(|at| at < before)
        };
        newer.filter(counts).count() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::issuer::Leaf;
    use crate::ca::record::tests::{Fixture, device, enter, token};
    use crate::ca::record::{Reason, Revocation};
    use crate::clock;
    use crate::files::test_dir::TestDir;
    use std::fs;

    #[test]
    fn what_has_ended_long_ago_goes() {
        let (fixture, dir) = (Fixture::new(), TestDir::new());
        let (one, now) = (fixture.open(), clock::now());
        let other = fixture.open_other(&dir);
        let long = |name: &str| fixture.leaf_of(name, 90);
        let short = |name: &str| fixture.leaf_of(name, 30);
        let theirs = [long("a"), short("a"), long("b"), short("c"), long("d")];
        let ours = [short("a"), long("c")];
        let spent = token("t", now.unix_s() + 100);
        for leaf in &theirs {
            enter(&one, leaf, Some(token(&leaf.serial.to_string(), now.unix_s() + 100))).unwrap();
            let shared = one.shared(&leaf.serial).unwrap().unwrap();
            other.merge(vec![shared], &[], &fixture.judge()).unwrap();
        }
        enter(&other, &ours[0], None).unwrap();
        enter(&other, &ours[1], Some(spent)).unwrap();
        other.revoke(&device("d"), Reason::Superseded, now).unwrap();
        let foretold =
            Revocation { serial: Serial::from([0x41; 16]), at: 5, reason: Reason::Superseded };
        other.merge(vec![], &[foretold], &fixture.judge()).unwrap();
        let before = fs::metadata(dir.join("certs/others.pem")).unwrap().len();
        assert_eq!(other.prune(now.unix_s() + 20 * 86_400), Ok(vec![]));

        let limit = now.unix_s() + 60 * 86_400;
        let mut gone = other.prune(limit).unwrap();
        gone.sort();
        let mut expected = [&theirs[1], &theirs[3], &ours[0]].map(|leaf: &Leaf| leaf.serial);
        expected.sort();
        assert_eq!(gone, expected);
        assert_eq!(other.prune(limit), Ok(vec![]));
        assert!(fs::metadata(dir.join("certs/others.pem")).unwrap().len() < before);
        assert_eq!(fs::read_dir(dir.join("certs")).unwrap().count(), 2);
        for other in [&other, &fixture.open_other(&dir)] {
            for leaf in [&theirs[0], &theirs[2], &theirs[4], &ours[1]] {
                assert_eq!(other.stored(&leaf.serial).unwrap().pem, leaf.pem);
                assert_eq!(other.newest(&leaf.device).unwrap().serial, leaf.serial);
            }
            assert_eq!(other.unknown(&gone), gone);
            assert_eq!(other.revoked(now).len(), 2, "a revocation of what is to come stays");
            assert!(other.knows_token(&spent.hash));
            let redeemed = other.spent_tokens().into_iter().find(|found| found.token == spent);
            assert_eq!(redeemed.map(|found| found.serial), Some(ours[1].serial));
        }
    }
}
