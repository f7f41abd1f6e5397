//! What is done once, at start: what a power cut or a copy that was taken while certificates were
//! written has left is put in order, and the tokens that may still be shown are loaded.
//!
//! A certificate is written before its line, so one without a line may have been answered by the time
//! that the rest of the folder was copied: it is entered. Nothing is deleted: what is no certificate
//! of this CA is moved aside, and so is what is cut off from `index.txt`.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use super::index::{self, Change, Tail};
use super::merge::Incoming;
use super::rows::{Place, Rows, Slot};
use super::{
    CERTS, CLOCK_SLACK_S, Certificate, INDEX, Origin, Reason, Record, RecordError, Revocation,
    Stored, Untold, others,
};
use crate::ca::crl;
use crate::ca::issuer::{BACKDATE_S, Issuer};
use crate::clock::{DAY_S, Now};
use crate::files::{self, FilesError};
use crate::jwt;
use crate::locks::locked;
use crate::serial::Serial;

/// Where in the CA's folder goes what is no certificate of this CA.
const ASIDE: &str = "aside";
/// What is cut off from a file is kept under its name and this.
const TORN: &str = ".torn";
/// The search for recent certificates ends after so many in a row that are not: clocks are set, so
/// the order of the lines is not quite that of the dates.
const PATIENCE: usize = 64;
/// Serial numbers that one line of the log names.
const NAMED: usize = 8;

/// Reads `index.txt`; `None` if it is missing.
pub(super) fn read_index(path: &Path) -> Result<Option<(Rows, Tail)>, RecordError> {
    let Some(bytes) = files::read(path)? else { return Ok(None) };
    let garbled =
        |(line, why)| RecordError::Unreadable(format!("{} line {line}: {why}", path.display()));
    index::read_index(&bytes).map(Some).map_err(garbled)
}

impl Record {
    /// Puts the record in order: cuts off a torn line, ends one that an editor has left without an
    /// end, enters certificates without a line, and revokes what `crl.pem` lists. Fails if
    /// `index.txt` is missing while there are certificates: what it knew of revocations would be
    /// lost.
    pub(super) fn put_in_order(
        &self,
        tail: Tail,
        is_missing: bool,
        ca: Option<&Issuer>,
    ) -> Result<(), RecordError> {
        if is_missing {
            self.begin_index(ca)?;
        }
        let torn = index::torn_revocation(&tail.bytes);
        self.mend_tail(tail, ca)?;
        // Without a CA nobody can tell whose certificates these are.
        let Some(ca) = ca else { return Ok(()) };
        self.begin_servers(ca);
        let (mut revoked, mut servers) = (crl::listed(&self.dir, ca), Vec::new());
        let mut strays = self.strays_of_others(ca)?;
        for serial in self.strays()? {
            if let Some(server) = self.server_at(&serial, ca) {
                servers.push(server);
                continue;
            }
            let Some(stray) = self.device_certificate(&serial, ca)? else {
                self.move_aside(&serial)?;
                continue;
            };
            if torn.as_ref().is_some_and(|torn| format!("{serial:X}").starts_with(torn)) {
                let (at, reason) = (stray.created_at, Reason::Unspecified);
                revoked.push(Revocation { serial, at, reason });
            }
            strays.push(stray);
        }
        self.enter_strays(strays, &revoked, ca)?;
        self.enter_these_servers(servers, ca)
    }

    fn begin_index(&self, ca: Option<&Issuer>) -> Result<(), RecordError> {
        let (index, mut strays) = (self.dir.join(INDEX), self.strays()?);
        // A command may have signed them before the service was first started.
        let is_servers = |serial: &_| ca.is_some_and(|ca| self.server_at(serial, ca).is_some());
        strays.retain(|serial| !is_servers(serial));
        if strays.is_empty() {
            files::create_new(&index, b"", 0o644, false)?;
            return Ok(files::sync_dir(&self.dir)?);
        }
        Err(RecordError::Unreadable(format!(
            "{} is missing, but not the certificates in {CERTS}/ ({}): restore it, or make an empty one \
             to have them entered again, revoked if crl.pem lists them",
            index.display(),
            strays.len()
        )))
    }

    /// The serial numbers by which files in `certs/` are named that have no line.
    pub(super) fn strays(&self) -> Result<Vec<Serial>, RecordError> {
        let certs = self.dir.join(CERTS);
        let unreadable = FilesError::io("cannot read", &certs);
        let mut named = Vec::new();
        for entry in certs.read_dir().map_err(&unreadable)? {
            let name = entry.map_err(&unreadable)?.file_name();
            named.extend(name.to_str().and_then(|n| Serial::from_hex(n.strip_suffix(".pem")?)));
        }
        let rows = self.read();
        if rows.have_files(&named) {
            return Ok(Vec::new());
        }
        // A file whose name spells the serial number differently is not ours and is left alone.
        named.retain(|s| rows.by_serial(s).is_none() && self.pem_path(s).exists());
        Ok(named)
    }

    /// What the file of this serial number holds, if that is a device's certificate by this CA.
    fn device_certificate(
        &self,
        serial: &Serial,
        ca: &Issuer,
    ) -> Result<Option<Incoming>, RecordError> {
        match self.stored_alone(serial) {
            Err(RecordError::Absent(_)) => Ok(None),
            stored => Ok(stored?.incoming(serial, ca)),
        }
    }

    /// Sees to the last line if it has no end. Either an editor has taken that, or the power went while
    /// the line was written; then the certificate is there, which tells all that the line would.
    fn mend_tail(&self, tail: Tail, ca: Option<&Issuer>) -> Result<(), RecordError> {
        let index = self.dir.join(INDEX);
        let cut_off = || self.cut_off(&index, &tail.bytes, tail.at as u64);
        let Some(row) = &tail.row else { return cut_off() };
        let told = match ca {
            Some(ca) => self.device_certificate(&row.serial, ca)?,
            None => None,
        };
        if told.is_some_and(|told| told.row.device != row.device) {
            return cut_off();
        }
        log::warn!("the last line of {} had no end, which is put there", index.display());
        let end = || {
            let mut file = OpenOptions::new().append(true).open(&index)?;
            file.write_all(b"\n")?;
            file.sync_all()
        };
        end().map_err(FilesError::io("cannot write", &index)).map_err(RecordError::not_written)?;
        self.write().insert(row);
        Ok(())
    }

    /// Others' certificates that have no line: a batch of them is written before its lines. Where the
    /// file and the lines are not of one moment, where each certificate lies is looked up anew.
    fn strays_of_others(&self, ca: &Issuer) -> Result<Vec<Incoming>, RecordError> {
        let path = self.others_path();
        let unreadable = FilesError::io("cannot read", &path);
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return self.place_others(&HashMap::new()).map(|()| Vec::new());
            }
            file => file.map_err(&unreadable)?,
        };
        let last = self.read().others().max_by_key(|(at, _)| *at).map(|(at, slot)| (at, *slot));
        let is_of_one_moment = last.is_none_or(|(_, last)| self.stored_at(&last).is_ok());
        let from = last.filter(|_| is_of_one_moment).map_or(0, |(at, _)| u64::from(at));
        let (mut strays, mut places) = (Vec::new(), HashMap::new());
        let end = others::scan(&file, from, |at, text| {
            let Some(stored) = super::read_stored(&text) else { return };
            let (Some(serial), Ok(at)) = (super::serial_of(&stored.der), u32::try_from(at)) else {
                return;
            };
            places.insert(serial, Place::Others(at));
            if self.read().by_serial(&serial).is_some() {
                return;
            }
            if let Some(mut stray) = stored.incoming(&serial, ca) {
                stray.row.place = Place::Others(at);
                strays.push(stray);
            }
        });
        let end = end.map_err(&unreadable)?;
        let mut torn = Vec::new();
        let mut rest = &file;
        let read = rest.seek(SeekFrom::Start(end)).and_then(|_| rest.read_to_end(&mut torn));
        read.map_err(unreadable)?;
        self.cut_off(&path, &torn, end)?;
        if !is_of_one_moment {
            self.place_others(&places)?;
        }
        Ok(strays)
    }

    /// Writes into the lines where others' certificates lie; one that is in no file has none.
    fn place_others(&self, places: &HashMap<Serial, Place>) -> Result<(), RecordError> {
        let place = |slot: &Slot| places.get(&slot.serial).copied().unwrap_or(Place::Own);
        let placed: Vec<(Serial, Place)> =
            self.read().others().map(|(_, slot)| (slot.serial, place(slot))).collect();
        if placed.is_empty() {
            return Ok(());
        }
        let path = self.others_path();
        log::warn!("{} is of another moment than {INDEX}: looked through", path.display());
        let change = |(serial, place): &(Serial, Place)| (*serial, Change::Moved(*place, None));
        let changes = placed.iter().map(change).collect();
        self.write_index(&mut self.lock_writer(), String::new(), changes)?;
        let mut rows = self.write();
        placed.iter().for_each(|(serial, place)| rows.set_place(serial, *place));
        Ok(())
    }

    /// Keeps what is cut off from the end of a file beside `index.txt`.
    fn cut_off(&self, path: &Path, torn: &[u8], at: u64) -> Result<(), RecordError> {
        if torn.is_empty() {
            return Ok(());
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(TORN);
        let kept = self.dir.join(name);
        log::warn!(
            "the end of {} is torn, by a power cut perhaps: cut off, and kept in {}",
            path.display(),
            kept.display()
        );
        let cut = || {
            let mut file = OpenOptions::new().append(true).create(true).open(&kept)?;
            file.write_all(&[torn, b"\n"].concat())?;
            file.sync_all()?;
            let file = OpenOptions::new().write(true).open(path)?;
            file.set_len(at)?;
            file.sync_all()
        };
        cut().map_err(FilesError::io("cannot write", path)).map_err(RecordError::not_written)
    }

    /// Moved, not deleted: somebody may need the file.
    fn move_aside(&self, serial: &Serial) -> Result<(), RecordError> {
        let path = self.pem_path(serial);
        let aside = files::move_into(&path, &self.dir.join(ASIDE))?;
        log::warn!(
            "{} is no certificate of a device by this CA: moved to {}",
            path.display(),
            aside.display()
        );
        Ok(())
    }

    /// Enters certificates that have no line, and revokes what is listed.
    fn enter_strays(
        &self,
        strays: Vec<Incoming>,
        listed: &[Revocation],
        ca: &Issuer,
    ) -> Result<(), RecordError> {
        let mut plan = self.plan(strays, listed, &|_| 0);
        // A revocation is never taken back, but dated as the record has it.
        let rows = self.read();
        plan.revoked.retain(|serial, _| rows.revoked(serial).is_none());
        let count = plan.revoked.keys().filter(|serial| rows.by_serial(serial).is_some()).count();
        drop(rows);
        if !plan.added.is_empty() {
            let names: Vec<String> =
                plan.added.iter().take(NAMED).map(|new| new.row.serial.to_string()).collect();
            log::warn!(
                serial = names.join(",");
                "certificates had no line in {} and are entered, their tokens as used, {} of them: {}{}",
                self.dir.join(INDEX).display(),
                plan.added.len(),
                names.join(", "),
                if plan.added.len() > NAMED { " …" } else { "" }
            );
        }
        if count > 0 {
            log::warn!("certificates that crl.pem lists were not revoked in {INDEX}: {count}");
        }
        self.enter(&mut self.lock_writer(), &mut plan, ca)
    }

    /// Loads what the newest certificates tell: the hashes of the tokens that they were signed for, as
    /// far back as a token can live (which of them have ended is judged when they are used, for the
    /// clock may be wrong), and what was recorded here, which other instances may not know yet.
    pub(super) fn load_last_day(&self, now_s: Option<u64>) {
        let (mut tokens, mut news, mut successors) = (Vec::new(), Vec::new(), Vec::new());
        let unread = self.read_newest(is_recent(now_s, |at, slot, stored| {
            tokens.extend(stored.origin.and_then(Origin::token).map(|token| (token, at)));
            news.extend((slot.place == Place::Own).then_some(Untold::Certificate(slot.serial)));
            let takes =
                |origin: &_| matches!(origin, Origin::Registration(_) | Origin::Renewal { .. });
            let origin = stored.origin.filter(takes);
            successors.extend(origin.map(|origin| (origin, slot.serial, stored.created_at)));
        }));
        if let Some((count, why)) = unread {
            log::warn!("certificates that cannot be read: {count}, the oldest of them: {why}");
        }
        *locked(&self.successors) = successors;
        let since = now_s.unwrap_or(u64::MAX).saturating_sub(DAY_S);
        let mut rows = self.write();
        tokens.iter().for_each(|(token, at)| rows.add_token(token, *at as u32));
        let revoked = rows.revocations(0).filter(|revocation| revocation.at >= since);
        news.extend(revoked.map(|revocation| Untold::Revocation(revocation.serial)));
        drop(rows);
        self.news.add(news.into_iter().rev());
    }

    /// Whose place certificates of the last day before the start have taken: the old one, the new one,
    /// and when. Renewals have if `renewals`. Only the first who asks is told.
    pub fn take_successors(&self, renewals: bool) -> Vec<(Serial, Serial, u64)> {
        let mut taken = Vec::new();
        for (origin, new, since) in std::mem::take(&mut *locked(&self.successors)) {
            let old = match origin {
                Origin::Registration(_) => self.older(&new),
                Origin::Renewal { old, .. } if renewals => vec![old],
                _ => Vec::new(),
            };
            taken.extend(old.into_iter().map(|old| (old, new, since)));
        }
        taken
    }

    /// The certificates that begin in the future: a clock that was ahead has dated them, and nobody
    /// takes them yet. The newest first.
    pub fn begin_later(&self, now: Now) -> Vec<Certificate> {
        let mut later = Vec::new();
        self.read_newest(|_, slot, stored| {
            let is_later = stored.created_at > now.unix_s().saturating_add(BACKDATE_S);
            later.extend(self.read().certificate(slot).filter(|_| is_later));
            is_later
        });
        later
    }

    /// Reads the newest certificates, from the last line backwards, until [`PATIENCE`] in a row are
    /// not what is looked for; those that were signed here and others each for themselves, for others
    /// may have come all at once. Returns how many could not be read, and why not the oldest of them.
    fn read_newest(
        &self,
        mut is_wanted: impl FnMut(usize, &Slot, &Stored) -> bool,
    ) -> Option<(usize, RecordError)> {
        let (mut unwanted, mut unread) = ([0; 2], None);
        for at in (0..self.read().list.len()).rev() {
            let Some(slot) = self.read().list.get(at).copied() else { break };
            let unwanted_like_it = match slot.place {
                Place::Others(_) => &mut unwanted[1],
                Place::Own | Place::Server => &mut unwanted[0],
            };
            if *unwanted_like_it == PATIENCE {
                continue;
            }
            match self.stored_at(&slot) {
                Ok(stored) if is_wanted(at, &slot, &stored) => *unwanted_like_it = 0,
                Ok(_) => *unwanted_like_it += 1,
                // A copy may lack the files of any number of lines at its end.
                Err(e) => unread = Some((unread.map_or(1, |(count, _)| count + 1), e)),
            }
        }
        unread
    }
}

/// Shows all to `each`; what is older than a token can be is not looked for.
fn is_recent(
    now_s: Option<u64>,
    mut each: impl FnMut(usize, &Slot, &Stored),
) -> impl FnMut(usize, &Slot, &Stored) -> bool {
    let mut latest = None;
    move |at, slot, stored| {
        each(at, slot, stored);
        // A clock that is ahead now, or was, makes nothing old.
        let latest = latest.get_or_insert(now_s.unwrap_or(u64::MAX).min(stored.created_at));
        stored.created_at.saturating_add(jwt::MAX_LIFETIME_S + CLOCK_SLACK_S) >= *latest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::crl::Crl;
    use crate::ca::issuer::Leaf;
    use crate::ca::record::rows::Row;
    use crate::ca::record::tests::{Fixture, device, enter, token};
    use crate::ca::tests::{must, run_program};
    use crate::clock;
    use crate::files::test_dir::TestDir;
    use crate::jwt::TokenHash;
    use std::fs;

    #[test]
    fn what_a_power_cut_or_an_editor_leaves() {
        let fixture = Fixture::new();
        let record = fixture.open();
        let leaves = [fixture.leaf("device-1"), fixture.leaf("device-2")];
        let spent = token("t", clock::now().unix_s() + 100);
        enter(&record, &leaves[0], None).unwrap();
        let whole = fixture.index();
        enter(&record, &leaves[1], Some(spent)).unwrap();
        let both = fixture.index();
        let zeros = [format!("{whole}V\t\0\0\0\n"), format!("{whole}\0\0"), format!("{both}\0\0")];
        let cuts = (whole.len()..=both.len()).map(|end| both[..end].to_owned());
        for index in cuts.chain(zeros) {
            fs::write(fixture.dir.join(INDEX), &index).unwrap();
            fs::write(fixture.dir.join(CERTS).join("notes.pem"), "not ours to judge").unwrap();
            let again = fixture.open();
            assert_eq!(fixture.index(), both, "{index:?}");
            assert!(again.knows_token(&spent.hash), "its token counts as used");
            for (leaf, name) in leaves.iter().zip(["device-1", "device-2"]) {
                assert_eq!(again.newest(&device(name)).unwrap().serial, leaf.serial);
                assert_eq!(again.stored(&leaf.serial).unwrap().pem, leaf.pem);
            }
            assert_eq!(fixture.pems(), 3);
        }
        let kept = fs::read_to_string(fixture.dir.join("index.txt.torn")).unwrap();
        let torn = both[whole.len()..both.len() - 1].strip_suffix('2').unwrap();
        assert!(kept.contains(&format!("{torn}\n")), "nothing is deleted: {kept}");

        // Another program's last line, whose certificate lies elsewhere.
        let foreign = "V\t401231235959Z\t\t01\tunknown\t/CN=device-3";
        fs::write(fixture.dir.join(INDEX), format!("{both}{foreign}")).unwrap();
        assert!(fixture.open().has_active(&device("device-3"), clock::now()));
        assert_eq!(fixture.index(), format!("{both}{foreign}\n"));

        // A certificate without its file is still a record.
        fs::remove_file(record.pem_path(&leaves[0].serial)).unwrap();
        let again = fixture.open();
        assert!(again.has_active(&device("device-1"), clock::now()));
        let error = again.stored(&leaves[0].serial).unwrap_err();
        assert_eq!(
            error,
            RecordError::Absent(format!(
                "{}: missing",
                again.pem_path(&leaves[0].serial).display()
            ))
        );
    }

    #[test]
    fn certificates_without_a_line() {
        let fixture = Fixture::new();
        let record = fixture.open();
        let names = ["device-1", "device-2", "device-3"];
        let leaves = names.map(|name| fixture.leaf(name));
        let now = clock::now();
        let ends_at = now.unix_s() + 100;
        for (leaf, name) in leaves.iter().zip(names) {
            enter(&record, leaf, Some(token(name, ends_at))).unwrap();
        }
        let index = fixture.index();
        let (serial, at) = (leaves[1].serial, now.unix_s() - 5);
        let listed = [Revocation { serial, at, reason: Reason::KeyCompromise }];
        Crl::sign(fixture.issuer(), &listed, 0, now).unwrap().write(&fixture.dir).unwrap();

        // The database as it was before, or with one of its lines lost.
        let second = index.lines().nth(1).unwrap();
        for older in [String::new(), index.replace(&format!("{second}\n"), "")] {
            fs::write(fixture.dir.join(INDEX), older).unwrap();
            let again = fixture.open();
            let revoked = |n: usize| again.by_serial(&leaves[n].serial).unwrap().revoked_at;
            assert_eq!([0, 1, 2].map(revoked), [None, Some(now.unix_s() - 5), None]);
            assert!(names.iter().all(|name| again.knows_token(&TokenHash::of(name))));
            assert_eq!(fixture.index().lines().count(), 3);
        }
        // Also where the line is there, but the database is older than the list.
        fs::write(fixture.dir.join(INDEX), &index).unwrap();
        assert_eq!(fixture.open().revoked(now), listed);
        assert_eq!(fixture.index().matches("R\t").count(), 1);
        // A list that this CA has not signed revokes nobody.
        let other = Fixture::new();
        Crl::sign(other.issuer(), &listed, 0, now).unwrap().write(&fixture.dir).unwrap();
        fs::write(fixture.dir.join(INDEX), &index).unwrap();
        assert_eq!(fixture.open().revoked(now), []);

        fs::remove_file(fixture.dir.join(INDEX)).unwrap();
        for _ in 0..2 {
            let error = fixture.try_open().unwrap_err().to_string();
            assert!(
                error.contains("index.txt is missing, but not the certificates in certs/ (3)"),
                "{error}"
            );
        }
        assert_eq!(fixture.pems(), 3);
    }

    #[test]
    fn what_is_no_certificate_of_a_device_by_this_ca_is_moved_aside() {
        let (fixture, other) = (Fixture::new(), Fixture::new());
        let record = fixture.open();
        let [ours, wrongly_named] = ["device-1", "device-2"].map(|name| fixture.leaf(name));
        let foreign = other.leaf("device-1");
        enter(&record, &ours, None).unwrap();
        let index = fixture.index();
        let server = fixture.server("broker", 9);
        let ca = fixture.issuer().chain_pem();
        let serial = |n: u8| Serial::from([0x40 + n; 16]);
        let half = &ours.pem[..ours.pem.len() / 2];
        for (serial, text) in [
            (foreign.serial, &*foreign.pem),
            (serial(1), &wrongly_named.pem),
            (serial(2), &server.chain_pem),
            (serial(3), ca),
            (serial(4), half),
            (serial(5), ""),
            (serial(6), "a text"),
        ] {
            let path = record.pem_path(&serial);
            fs::write(&path, text).unwrap();
            fixture.open();
            let aside = fixture.dir.join(ASIDE).join(path.file_name().unwrap());
            assert!(!path.exists(), "{text}");
            assert_eq!(fs::read_to_string(aside).unwrap(), text);
            assert_eq!((fixture.index(), fixture.pems()), (index.clone(), 1));
        }
        // A name that is no serial number as it is written here is nobody's business.
        let note = fixture.dir.join(CERTS).join("cafe.pem");
        fs::write(&note, "a text").unwrap();
        fixture.open();
        assert!(note.exists());
    }

    #[test]
    fn a_garbled_line_is_told_by_its_number() {
        let line = |n: u8| Row::new(Serial::from([n; 16]), device("d"), 1_900_000_000).line();
        let dir = TestDir::new();
        let path = dir.join(INDEX);
        let garbled = [line(0x41), line(0x41), line(0x43)].concat();
        fs::write(&path, &garbled).unwrap();
        let error = Record::open(&dir, None, None).unwrap_err().to_string();
        let twice = format!("{} line 2: the serial number stands twice", path.display());
        assert_eq!((error, fs::read_to_string(&path).unwrap()), (twice, garbled));
    }

    /// Signs as `age_s` ago (ahead, if that is negative) what the issuer would sign now only.
    fn dated(fixture: &Fixture, name: &str, age_s: i64) -> Leaf {
        let leaf = fixture.leaf(name);
        let ca = "-CA root-ca.crt -CAkey root-ca.key -days 900";
        let line =
            format!("x509 -req -in csr.pem {ca} -set_serial 0x{} -out dated.pem", leaf.serial);
        run_program(&fixture.dir, "faketime", &format!("-f {:+}s openssl {line}", -age_s)).unwrap();
        let pem = fs::read_to_string(fixture.dir.join("dated.pem")).unwrap();
        must(&fixture.dir, "x509 -in dated.pem -noout");
        Leaf { pem, ..leaf }
    }

    #[test]
    fn only_the_last_days_tokens_are_read_whatever_the_clock_says() {
        const DAY: i64 = 86_400;
        let fixture = Fixture::new();
        let record = fixture.open();
        let now = clock::now();
        let enter_dated = |name: &str, age_s: i64| {
            let ended = now.unix_s().saturating_add_signed(300 - age_s);
            enter(&record, &dated(&fixture, name, age_s), Some(token(name, ended))).unwrap();
        };
        let known = |now: Option<Now>, name: &str| {
            let again = Record::open(&fixture.dir, Some(fixture.issuer()), now).unwrap();
            again.knows_token(&TokenHash::of(name))
        };
        let at = |days: i64| {
            Some(Now { unix_ms: now.unix_ms.saturating_add_signed(days * DAY * 1000), ..now })
        };
        enter_dated("old", 2 * DAY);
        let between = dated(&fixture, "between", DAY + 7200);
        for _ in 0..PATIENCE {
            let serial = Serial::random().unwrap();
            enter(&record, &Leaf { serial, ..between.clone() }, None).unwrap();
        }
        enter_dated("new", 1000);
        for clock in [at(0), None, at(3)] {
            assert!(known(clock, "new"), "{clock:?}");
            assert!(!known(clock, "old"), "{clock:?}");
        }
        assert!(known(at(-3), "new") && known(at(-3), "old"), "a clock that is behind");
        // One that a clock which was ahead has dated does not make the others old.
        enter_dated("ahead", -9 * DAY);
        for clock in [at(0), None, at(3), at(9)] {
            assert!(known(clock, "new") && known(clock, "ahead"), "{clock:?}");
        }
        let later = fixture.open().begin_later(now);
        assert_eq!(later.iter().map(|r| r.device.as_str()).collect::<Vec<_>>(), ["ahead"]);
        assert_eq!(fixture.open().begin_later(at(10).unwrap()), []);
    }
}
