//! The record of certificates: OpenSSL's CA database (`index.txt`) and one `certs/<SERIAL>.pem` each.
//!
//! The line in `index.txt` makes a certificate a record. It is written after the `.pem` is on disk,
//! so a line without a certificate cannot come about, and a certificate without a line was never
//! answered to anybody and is removed at start. The whole record but for the certificates
//! themselves is held in memory, in about 200 bytes each. Readers never wait for a disk: the lock
//! that is held while files are written is the writers' own.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use time::{Date, Month, OffsetDateTime, Time};
use x509_parser::asn1_rs::FromDer as _;
use x509_parser::certificate::X509Certificate;

use super::issuer::{self, BACKDATE_S, Leaf};
use super::{crl, pem};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::files::{self, FilesError, Synced};
use crate::jwt::{self, TokenHash};
use crate::problem::{Code, Problem};
use crate::serial::Serial;

/// The database.
const INDEX: &str = "index.txt";
/// Its attributes: renewals are several valid certificates of one subject.
const ATTRIBUTES: (&str, &str) = ("index.txt.attr", "unique_subject = no\n");
/// The folder of the certificates.
const CERTS: &str = "certs";
/// What the line before the PEM begins with.
const TOKEN_LINE: &str = "Provisioning-Token: ";
/// Bytes read and written at once when the database is copied.
const COPIED: usize = 64 * 1024;
/// From so many certificates on, a batch syncs the file system once instead of each file.
const SYNCED_TOGETHER: usize = 4;
/// Certificates without a line that a power cut can leave: a batch of each worker, generously. More
/// mean that the record was lost or is an older copy, and removing them would make it worse.
const MOST_STRAYS: usize = 64;
/// How far two records of the same moment may disagree about the time, for clocks are set.
const CLOCK_SLACK_S: u64 = 3600;

/// Why the record could not be read or written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegistryError {
    /// A file cannot be read.
    Unreadable(String),
    /// A line of `index.txt` is no line of a CA database.
    Garbled {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A file cannot be written.
    NotWritten {
        /// Which and why.
        why: String,
        /// Something of what was to be recorded may be on disk.
        left_behind: bool,
    },
}

impl RegistryError {
    /// Whether something of what was to be recorded may be on disk. If not, the token that paid for
    /// the certificate may be given back.
    pub fn left_behind(&self) -> bool {
        matches!(self, RegistryError::NotWritten { left_behind: true, .. })
    }

    fn not_written(why: impl fmt::Display) -> Self {
        RegistryError::NotWritten { why: why.to_string(), left_behind: false }
    }
}

impl fmt::Display for RegistryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegistryError::Unreadable(why) => f.write_str(why),
            RegistryError::Garbled { path, line, why } => {
                write!(f, "{} line {line}: {why}", path.display())
            }
            RegistryError::NotWritten { why, left_behind: false } => f.write_str(why),
            RegistryError::NotWritten { why, left_behind: true } => {
                write!(f, "{why}; part of it may be on disk")
            }
        }
    }
}

impl std::error::Error for RegistryError {}

impl From<FilesError> for RegistryError {
    fn from(error: FilesError) -> Self {
        RegistryError::Unreadable(error.to_string())
    }
}

impl From<RegistryError> for Problem {
    fn from(error: RegistryError) -> Self {
        // What cannot be read now will not be readable in a second.
        let code = match &error {
            RegistryError::Unreadable(_) | RegistryError::Garbled { .. } => Code::InternalError,
            RegistryError::NotWritten { .. } => Code::ServiceUnavailable,
        };
        Problem::from(code).log(error)
    }
}

/// Of what use a certificate is at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Neither of the others.
    Active,
    /// Its time is over.
    Expired,
    /// It was revoked, whether or not its time is over too.
    Revoked,
}

impl Status {
    /// As the API says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Active => "active",
            Status::Expired => "expired",
            Status::Revoked => "revoked",
        }
    }
}

/// What memory holds of a certificate. Times are in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its serial number.
    pub serial: Serial,
    /// Whose it is.
    pub device: DeviceId,
    /// Its last second.
    pub expires_at: u64,
    /// When it was revoked.
    pub revoked_at: Option<u64>,
}

impl Record {
    /// Of what use the certificate is now.
    pub fn status(&self, now: Now) -> Status {
        match self.revoked_at {
            Some(_) => Status::Revoked,
            None if now.unix_s() > self.expires_at => Status::Expired,
            None => Status::Active,
        }
    }
}

/// What the certificate's own file says. Times are in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The certificate in PEM.
    pub pem: String,
    /// SHA-256 of the DER, lower-case hexadecimal.
    pub fingerprint: String,
    /// When it was signed, which is a little after its `notBefore`.
    pub created_at: u64,
    /// The token that was redeemed for it.
    pub token: Option<Redeemed>,
}

/// A token that was redeemed for a certificate; its times are in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redeemed {
    /// Its hash.
    pub hash: TokenHash,
    /// When it was issued.
    pub iat: u64,
    /// When it ends.
    pub exp: u64,
}

/// A redeemed token and the certificate that it was redeemed for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spent {
    /// The token.
    pub token: Redeemed,
    /// The certificate.
    pub serial: Serial,
    /// The device.
    pub device: DeviceId,
}

/// What [`Registry::look`] saw, all at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// A certificate is recorded for the token.
    pub recorded_token: bool,
    /// The device has a certificate that is neither expired nor revoked.
    pub active_certificate: bool,
}

/// The record of one CA. Every method may be called from any thread.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    rows: RwLock<Rows>,
    writer: Mutex<Writer>,
}

/// What the writers know beside the rows.
#[derive(Debug, Default)]
struct Writer {
    /// An append that failed and could not be taken back: what was the length, and what was added.
    undo: Option<(u64, String)>,
}

impl Registry {
    /// Reads the record in `dir`, repairs what a power cut may have left, and loads the tokens that
    /// have not ended `now`; all of the last day's that is recorded if the clock is not set (`None`).
    ///
    /// # Errors
    /// When a file cannot be read, or `index.txt` has a line that is none.
    pub fn open(dir: &Path, now: Option<Now>) -> Result<Self, RegistryError> {
        files::make_dir(&dir.join(CERTS), 0o755)?;
        let attributes = dir.join(ATTRIBUTES.0);
        if files::read(&attributes)?.as_deref() != Some(ATTRIBUTES.1.as_bytes()) {
            files::write_atomic(&attributes, ATTRIBUTES.1.as_bytes(), 0o644)?;
        }
        let (rows, torn) = read_index(&dir.join(INDEX))?;
        let registry =
            Registry { dir: dir.to_owned(), rows: RwLock::new(rows), writer: Mutex::default() };
        registry.settle_strays(torn)?;
        if torn == Torn::Missing {
            files::write_atomic(&dir.join(INDEX), b"", 0o644)?;
        }
        registry.load_tokens(now.map(|n| n.unix_s()));
        Ok(registry)
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.read().list.is_empty()
    }

    /// The device's newest certificate.
    pub fn newest(&self, device: &DeviceId) -> Option<Record> {
        let rows = self.read();
        rows.of_device(device).next().map(Row::record)
    }

    /// The certificate with this serial number.
    pub fn by_serial(&self, serial: &Serial) -> Option<Record> {
        self.read().by_serial(serial).map(Row::record)
    }

    /// Whether the device has a certificate that is neither expired nor revoked.
    pub fn has_active(&self, device: &DeviceId, now: Now) -> bool {
        self.read().has_active(device, now)
    }

    /// How many certificates the device has that are neither expired nor revoked.
    pub fn count_active(&self, device: &DeviceId, now: Now) -> usize {
        self.read().of_device(device).filter(|row| row.is_active(now)).count()
    }

    /// Whether a certificate is recorded for the token. Known until the token has ended.
    pub fn knows_token(&self, token: &TokenHash) -> bool {
        self.read().tokens.contains_key(token)
    }

    /// [`Registry::knows_token`] and [`Registry::has_active`] of one moment.
    pub fn look(&self, token: &TokenHash, device: &DeviceId, now: Now) -> Look {
        let rows = self.read();
        Look {
            recorded_token: rows.tokens.contains_key(token),
            active_certificate: rows.has_active(device, now),
        }
    }

    /// The tokens that certificates are recorded for and that may not have ended.
    pub fn spent_tokens(&self) -> Vec<Spent> {
        let rows = self.read();
        let spent = |(hash, token): (&TokenHash, &TokenRow)| {
            let row = rows.list.get(token.row as usize)?;
            let token = Redeemed { hash: *hash, iat: token.iat, exp: token.exp };
            Some(Spent { token, serial: row.serial, device: row.device.clone() })
        };
        rows.tokens.iter().filter_map(spent).collect()
    }

    /// Serial number and time of revocation of what is revoked and not expired, for a CRL.
    pub fn revoked(&self, now: Now) -> Vec<(Serial, u64)> {
        let rows = self.read();
        let live = rows.list.iter().filter(|r| r.expires_at >= now.unix_s());
        live.filter_map(|r| Some((r.serial, r.revoked()?))).collect()
    }

    /// Reads a certificate's own file.
    ///
    /// # Errors
    /// When it is not there, or is no certificate.
    pub fn stored(&self, serial: &Serial) -> Result<Stored, RegistryError> {
        let path = self.pem_path(serial);
        let unreadable =
            |why: &str| RegistryError::Unreadable(format!("{}: {why}", path.display()));
        let bytes = files::read(&path)?.ok_or_else(|| unreadable("missing"))?;
        let text = String::from_utf8(bytes).map_err(|_| unreadable("not a text"))?;
        read_stored(&text).ok_or_else(|| unreadable("not a PEM certificate"))
    }

    /// Begins a batch of entries. Until they are committed or dropped no other writer gets in.
    pub fn begin(&self) -> Entries<'_> {
        Entries { registry: self, writer: self.lock_writer(), added: Vec::new() }
    }

    /// Revokes all unexpired certificates of a device, and says which. On disk when it returns.
    ///
    /// # Errors
    /// When `index.txt` cannot be read or written; memory then still has them unrevoked, and trying
    /// again is safe.
    pub fn revoke(&self, device: &DeviceId, now: Now) -> Result<Vec<Serial>, RegistryError> {
        let mut writer = self.lock_writer();
        let unexpired = |row: &&Row| row.is_active(now);
        let serials: Vec<Serial> =
            self.read().of_device(device).filter(unexpired).map(|r| r.serial).collect();
        self.enter_revoked(&mut writer, &serials, now)?;
        Ok(serials)
    }

    /// Revokes these of the certificates that are neither expired nor revoked, and says which. On
    /// disk when it returns.
    ///
    /// # Errors
    /// As [`Registry::revoke`].
    pub fn revoke_these(&self, these: &[Serial], now: Now) -> Result<Vec<Serial>, RegistryError> {
        // Every batch comes by here, and nearly all have nothing to wait for the disk for.
        if these.is_empty() {
            return Ok(Vec::new());
        }
        let mut writer = self.lock_writer();
        let rows = self.read();
        let active = |s: &&Serial| rows.by_serial(s).is_some_and(|row| row.is_active(now));
        let serials: Vec<Serial> = these.iter().filter(active).copied().collect();
        drop(rows);
        self.enter_revoked(&mut writer, &serials, now)?;
        Ok(serials)
    }

    fn enter_revoked(
        &self,
        writer: &mut Writer,
        serials: &[Serial],
        now: Now,
    ) -> Result<(), RegistryError> {
        if serials.is_empty() {
            return Ok(());
        }
        self.take_back(writer)?;
        // Line by line: a record of 100,000 certificates has 8 MB, which a gateway cannot spare twice.
        let path = self.dir.join(INDEX);
        let missing = serials.iter().copied().collect();
        let lost = |serial: Serial| {
            let whose = self.by_serial(&serial).map(|r| r.device.to_string()).unwrap_or_default();
            io::Error::other(format!("{} has lost a line of {whose}", path.display()))
        };
        let copy = |new: &mut File| {
            let old = BufReader::with_capacity(COPIED, File::open(&path)?);
            let new = BufWriter::with_capacity(COPIED, new);
            copy_revoked(old, new, missing, now.unix_s())?
                .map_or(Ok(()), |serial| Err(lost(serial)))
        };
        files::write_atomic_by(&path, 0o644, copy)
            .map_err(|e| RegistryError::NotWritten { why: e.to_string(), left_behind: true })?;
        let mut rows = self.write();
        serials.iter().for_each(|s| rows.set_revoked(s, now.unix_s()));
        Ok(())
    }

    fn pem_path(&self, serial: &Serial) -> PathBuf {
        self.dir.join(CERTS).join(format!("{serial:X}.pem"))
    }

    // A panic cannot leave the rows half changed in a way that matters, so poison is ignored.
    fn read(&self) -> RwLockReadGuard<'_, Rows> {
        self.rows.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Rows> {
        self.rows.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// What is done once, at start.
impl Registry {
    /// Sees to certificates that have no line. Most likely the power went before they were answered,
    /// and they are removed. But one that `crl.pem` lists, or that the torn line says was revoked,
    /// had been answered: without its line the next list would let it in again.
    fn settle_strays(&self, torn: Torn) -> Result<(), RegistryError> {
        let strays = self.strays()?;
        if strays.is_empty() {
            return Ok(());
        }
        if torn == Torn::Missing || strays.len() > MOST_STRAYS {
            return Err(RegistryError::Unreadable(format!(
                "{} has lost the lines of {} certificates in {CERTS}/: restore it, or move them away",
                self.dir.join(INDEX).display(),
                strays.len()
            )));
        }
        let listed = crl::listed(&self.dir);
        for serial in strays {
            let path = self.pem_path(&serial);
            match (listed.get(&serial), torn) {
                (Some(revoked_at), _) => self.put_back(&serial, Some(*revoked_at))?,
                (None, Torn::Revoked) => self.put_back(&serial, None)?,
                (None, _) => {
                    log::warn!(
                        "{} has no line in {INDEX}, so it was never answered: removed",
                        path.display()
                    );
                    files::remove_if_there(&path)?;
                }
            }
        }
        Ok(files::sync_dir(&self.dir.join(CERTS))?)
    }

    fn strays(&self) -> Result<Vec<Serial>, RegistryError> {
        let certs = self.dir.join(CERTS);
        let unreadable = |e: io::Error| {
            RegistryError::Unreadable(format!("cannot read {}: {e}", certs.display()))
        };
        let rows = self.read();
        let mut strays = Vec::new();
        for entry in certs.read_dir().map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            let serial = name.to_str().and_then(|n| n.strip_suffix(".pem"));
            let serial = serial.and_then(Serial::from_hex);
            strays.extend(serial.filter(|s| rows.by_serial(s).is_none()));
        }
        Ok(strays)
    }

    /// Enters a certificate once more as revoked, then or, if that is not known, when it was signed.
    fn put_back(&self, serial: &Serial, revoked_at: Option<u64>) -> Result<(), RegistryError> {
        let path = self.pem_path(serial);
        let text = files::read(&path)?.and_then(|bytes| String::from_utf8(bytes).ok());
        let Some(mut row) = text.and_then(|text| read_row(&text, *serial)) else {
            log::error!("{} lost its line in {INDEX} and cannot be read", path.display());
            return Ok(());
        };
        row.revoked_at = revoked_at.unwrap_or(row.revoked_at);
        log::warn!("{} is revoked but had no line in {INDEX}: put back", path.display());
        self.append(&mut self.lock_writer(), row.line())?;
        self.write().insert(row);
        Ok(())
    }

    /// Loads the hashes of tokens that have not ended, from the newest record backwards until one is
    /// older than any token can be.
    fn load_tokens(&self, now_s: Option<u64>) {
        let mut rows = self.write();
        let mut newest = now_s;
        let mut lost: Option<(usize, RegistryError)> = None;
        for at in (0..rows.list.len()).rev() {
            let Some(serial) = rows.list.get(at).map(|row| row.serial) else { break };
            let stored = match self.stored(&serial) {
                Ok(stored) => stored,
                Err(e) => {
                    lost = Some((lost.map_or(1, |(count, _)| count + 1), e));
                    continue;
                }
            };
            let reference = *newest.get_or_insert(stored.created_at);
            if stored.created_at + jwt::MAX_LIFETIME_S + CLOCK_SLACK_S < reference {
                break;
            }
            let ended = |token: &Redeemed| now_s.is_some_and(|now| token.exp <= now);
            if let Some(token) = stored.token.filter(|t| !ended(t)) {
                rows.add_token(&token, at as u32);
            }
        }
        if let Some((count, e)) = lost {
            log::warn!("{count} certificates cannot be read, the oldest of them: {e}");
        }
    }
}

/// A batch of entries that are recorded together, or not at all if dropped.
#[derive(Debug)]
pub struct Entries<'a> {
    registry: &'a Registry,
    writer: MutexGuard<'a, Writer>,
    added: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    row: Row,
    token: Option<Redeemed>,
    created_at: u64,
    file: String,
}

impl Entries<'_> {
    /// As [`Registry::knows_token`], in this batch too.
    pub fn knows_token(&self, token: &TokenHash) -> bool {
        let same = |e: &Entry| e.token.is_some_and(|t| t.hash == *token);
        self.added.iter().any(same) || self.registry.knows_token(token)
    }

    /// As [`Registry::has_active`], in this batch too.
    pub fn has_active(&self, device: &DeviceId, now: Now) -> bool {
        let active = |e: &Entry| e.row.device == *device && e.row.is_active(now);
        self.added.iter().any(active) || self.registry.has_active(device, now)
    }

    /// Adds a certificate and the token that was redeemed for it, if it is not a renewal.
    pub fn add(&mut self, leaf: &Leaf, token: Option<Redeemed>) {
        let line = token.map(|t| format!("{TOKEN_LINE}{} iat={} exp={}\n", t.hash, t.iat, t.exp));
        self.added.push(Entry {
            row: Row::new(leaf.serial, leaf.device.clone(), leaf.not_after, None),
            token,
            created_at: leaf.not_before.saturating_add(BACKDATE_S),
            file: line.unwrap_or_default() + &leaf.pem,
        });
    }

    /// Writes all that was added and answers for each, in the order of adding. What is `Ok` is on
    /// disk and seen by the readers; of what is not, [`RegistryError::left_behind`] tells.
    pub fn commit(mut self) -> Vec<Result<(), RegistryError>> {
        let results = self.write();
        let mut rows = self.registry.write();
        for (entry, result) in self.added.into_iter().zip(&results) {
            if result.is_ok() {
                rows.drop_ended_tokens(entry.created_at);
                let at = rows.insert(entry.row);
                entry.token.iter().for_each(|token| rows.add_token(token, at));
            }
        }
        results
    }

    fn write(&mut self) -> Vec<Result<(), RegistryError>> {
        let certs = self.registry.dir.join(CERTS);
        let many = self.added.len() >= SYNCED_TOGETHER;
        let together = many.then(|| Synced::of(&certs)).flatten();
        let write = |e| self.write_pem(e, together.is_some());
        let mut results: Vec<_> = self.added.iter().map(write).collect();
        let written = self.added.iter().zip(&results).filter(|(_, r)| r.is_ok());
        let written: Vec<&Entry> = written.map(|(entry, _)| entry).collect();
        if written.is_empty() {
            return results;
        }
        let lines: String = written.iter().map(|e| e.row.line()).collect();
        let outcome = together
            .map_or_else(|| files::sync_dir(&certs), |all| all.sync())
            .map_err(RegistryError::not_written)
            .and_then(|()| self.registry.append(&mut self.writer, lines));
        let Err(mut error) = outcome else { return results };
        // A line that may have stayed needs its certificate; without one the latter must go.
        if let RegistryError::NotWritten { left_behind: left @ false, .. } = &mut error {
            let removed: Vec<bool> = written.iter().map(|e| self.remove_pem(e)).collect();
            *left = removed.contains(&false);
        }
        results.iter_mut().filter(|r| r.is_ok()).for_each(|r| *r = Err(error.clone()));
        results
    }

    /// `together`: it is synced later, with others.
    fn write_pem(&self, entry: &Entry, together: bool) -> Result<(), RegistryError> {
        let path = self.registry.pem_path(&entry.row.serial);
        let create = if together { files::create_new } else { files::create_new_synced };
        create(&path, entry.file.as_bytes(), 0o644).map_err(|e| {
            let taken = e.kind() == Some(io::ErrorKind::AlreadyExists); // another's, let it be
            let left_behind = !taken && !self.remove_pem(entry);
            RegistryError::NotWritten { why: e.to_string(), left_behind }
        })
    }

    /// Whether the certificate's file is gone.
    fn remove_pem(&self, entry: &Entry) -> bool {
        files::remove_if_there(&self.registry.pem_path(&entry.row.serial)).is_ok()
    }
}

// How lines come into `index.txt`.
impl Registry {
    /// Appends lines and syncs them, or cuts the file back to what it was.
    fn append(&self, writer: &mut Writer, lines: String) -> Result<(), RegistryError> {
        self.take_back(writer)?;
        let (mut file, before) = self.open_index()?;
        let added = file.write_all(lines.as_bytes()).and_then(|()| file.sync_all());
        let Err(e) = added else { return Ok(()) };
        let why = self.index_says(e);
        let cut = file.set_len(before).and_then(|()| file.sync_all());
        if cut.is_err() {
            writer.undo = Some((before, lines));
        }
        Err(RegistryError::NotWritten { why, left_behind: cut.is_err() })
    }

    /// Cuts off what an earlier append left and could not take back. Only that: if something else
    /// stands there, somebody else has written the file since.
    fn take_back(&self, writer: &mut Writer) -> Result<(), RegistryError> {
        let Some((before, lines)) = &writer.undo else { return Ok(()) };
        let (mut file, length) = self.open_index()?;
        let io = |e| RegistryError::not_written(self.index_says(e));
        if length > *before && is_rest(&mut file, *before, lines).map_err(io)? {
            file.set_len(*before).and_then(|()| file.sync_all()).map_err(io)?;
        }
        writer.undo = None;
        Ok(())
    }

    fn open_index(&self) -> Result<(File, u64), RegistryError> {
        let open = || {
            let file = OpenOptions::new().read(true).append(true).open(self.dir.join(INDEX))?;
            let length = file.metadata()?.len();
            Ok((file, length))
        };
        open().map_err(|e| RegistryError::not_written(self.index_says(e)))
    }

    fn index_says(&self, e: io::Error) -> String {
        format!("cannot write {}: {e}", self.dir.join(INDEX).display())
    }
}

/// Whether what stands from `at` to the end of the file is a beginning of `lines`.
fn is_rest(file: &mut File, at: u64, lines: &str) -> io::Result<bool> {
    file.seek(SeekFrom::Start(at))?;
    let mut rest = Vec::new();
    file.take(lines.len() as u64 + 1).read_to_end(&mut rest)?;
    Ok(lines.as_bytes().starts_with(&rest))
}

/// The record in memory.
#[derive(Debug, Default)]
struct Rows {
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
struct Row {
    serial: Serial,
    device: DeviceId,
    expires_at: u64,
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
    fn new(serial: Serial, device: DeviceId, expires_at: u64, revoked_at: Option<u64>) -> Self {
        Row { serial, device, expires_at, revoked_at: revoked_at.unwrap_or(0), older: NONE }
    }

    fn revoked(&self) -> Option<u64> {
        (self.revoked_at != 0).then_some(self.revoked_at)
    }

    fn is_active(&self, now: Now) -> bool {
        self.revoked_at == 0 && now.unix_s() <= self.expires_at
    }

    fn record(&self) -> Record {
        let Row { serial, device, expires_at, .. } = self.clone();
        Record { serial, device, expires_at, revoked_at: self.revoked() }
    }

    /// Status, end, revocation, serial, file and subject, as OpenSSL's `ca` writes them.
    fn line(&self) -> String {
        let (status, revocation) = match self.revoked() {
            Some(at) => ('R', asn1_time(at)),
            None => ('V', String::new()),
        };
        let (end, serial, device) = (asn1_time(self.expires_at), self.serial, &self.device);
        format!("{status}\t{end}\t{revocation}\t{serial:X}\tunknown\t/CN={device}\n")
    }
}

impl Rows {
    fn by_serial(&self, serial: &Serial) -> Option<&Row> {
        self.list.get(*self.by_serial.get(serial)? as usize)
    }

    /// The device's rows, the newest first.
    fn of_device(&self, device: &DeviceId) -> impl Iterator<Item = &Row> {
        let row = |at: u32| self.list.get(at as usize);
        let newest = self.by_device.get(device).and_then(|at| row(*at));
        std::iter::successors(newest, move |r| row(r.older))
    }

    fn has_active(&self, device: &DeviceId, now: Now) -> bool {
        self.of_device(device).any(|row| row.is_active(now))
    }

    /// Adds a row as the newest of all. A device's name is held once, however many rows it has.
    fn insert(&mut self, mut row: Row) -> u32 {
        let at = self.list.len() as u32;
        if let Some((device, newest)) = self.by_device.get_key_value(&row.device) {
            (row.device, row.older) = (device.clone(), *newest);
        }
        self.by_device.insert(row.device.clone(), at);
        self.by_serial.insert(row.serial, at);
        self.list.push(row);
        at
    }

    fn set_revoked(&mut self, serial: &Serial, now_s: u64) {
        let at = self.by_serial.get(serial).copied().unwrap_or(NONE);
        if let Some(row) = self.list.get_mut(at as usize) {
            row.revoked_at = now_s;
        }
    }

    fn add_token(&mut self, token: &Redeemed, row: u32) {
        self.tokens.insert(token.hash, TokenRow { iat: token.iat, exp: token.exp, row });
    }

    fn drop_ended_tokens(&mut self, now_s: u64) {
        if self.tokens.len() >= self.crowded.max(1024) {
            self.tokens.retain(|_, token| token.exp.saturating_add(CLOCK_SLACK_S) > now_s);
            self.crowded = self.tokens.len() * 2;
        }
    }
}

/// What the line that was cut off `index.txt` began with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Torn {
    /// No line was torn.
    Nothing,
    /// There is no file.
    Missing,
    /// It was a new one: only those are appended.
    New,
    /// It was a revoked one, which this program never appends; something else has torn the file.
    Revoked,
}

/// Reads `index.txt`. If the last line is torn, it is cut off: it was never
/// synced, so its certificate was never answered.
fn read_index(path: &Path) -> Result<(Rows, Torn), RegistryError> {
    let Some(bytes) = files::read(path)? else {
        return Ok((Rows::default(), Torn::Missing));
    };
    let count = bytes.iter().filter(|b| **b == b'\n').count();
    let mut rows = Rows { list: Vec::with_capacity(count), ..Rows::default() };
    let (mut good, mut torn) = (0, Torn::Nothing);
    for (number, line) in (1..).zip(bytes.split_inclusive(|b| *b == b'\n')) {
        match read_line(line).and_then(|row| rows.accept(row)) {
            Ok(()) => good += line.len(),
            Err(_) if good + line.len() == bytes.len() && is_torn(line) => {
                torn = if line.starts_with(b"R") { Torn::Revoked } else { Torn::New };
                cut(path, good, number)?;
            }
            Err(why) => {
                return Err(RegistryError::Garbled { path: path.to_owned(), line: number, why });
            }
        }
    }
    Ok((rows, torn))
}

impl Rows {
    fn accept(&mut self, row: Row) -> Result<(), &'static str> {
        if self.by_serial.contains_key(&row.serial) {
            return Err("the serial number stands twice");
        }
        self.insert(row);
        Ok(())
    }
}

/// A write that was cut short ends without its line end; a file system may also have made room for
/// it and then lost the bytes.
fn is_torn(line: &[u8]) -> bool {
    !line.ends_with(b"\n") || line.contains(&0)
}

fn cut(path: &Path, length: usize, line: usize) -> Result<(), RegistryError> {
    log::warn!("{} line {line} is torn, by a power cut perhaps: cut off", path.display());
    let cut = || {
        let file = OpenOptions::new().write(true).open(path)?;
        file.set_len(length as u64)?;
        file.sync_all()
    };
    cut().map_err(|e| RegistryError::not_written(format!("cannot write {}: {e}", path.display())))
}

fn read_line(line: &[u8]) -> Result<Row, &'static str> {
    let line = std::str::from_utf8(line).ok().and_then(|l| l.strip_suffix('\n'));
    let fields: Vec<&str> = line.ok_or("not a line of text")?.split('\t').collect();
    let [status, end, revocation, serial, _file, subject] = fields.as_slice() else {
        return Err("not six fields between tabs");
    };
    let revoked_at = match (*status, *revocation) {
        ("V" | "E", "") => None,
        // The reason, if one follows, is for OpenSSL only.
        ("R", date) => {
            let date = date.split(',').next().unwrap_or_default();
            Some(read_asn1_time(date).ok_or("the date of revocation is none")?)
        }
        _ => return Err("the status is none of V, R with a date, and E"),
    };
    let expires_at = read_asn1_time(end).ok_or("the date of expiry is none")?;
    let serial =
        Serial::from_hex(serial).ok_or("the serial number is not 32 hexadecimal digits")?;
    let device = subject.strip_prefix("/CN=").and_then(DeviceId::parse);
    Ok(Row::new(
        serial,
        device.ok_or("the subject is not /CN= and a device id")?,
        expires_at,
        revoked_at,
    ))
}

/// Copies the database with these certificates revoked; all else stays as it is to the letter, also
/// what `openssl ca` has done meanwhile. Answers one that has no line, if there is one.
fn copy_revoked(
    mut old: impl BufRead,
    mut new: impl io::Write,
    mut serials: HashSet<Serial>,
    now_s: u64,
) -> io::Result<Option<Serial>> {
    let mut line = Vec::new();
    while old.read_until(b'\n', &mut line)? > 0 {
        match revoked_line(&line, &mut serials, now_s) {
            Some(revoked) => new.write_all(revoked.as_bytes())?,
            None => new.write_all(&line)?,
        }
        line.clear();
    }
    new.flush()?;
    Ok(serials.into_iter().next())
}

/// The line as revoked, if it is one of these, which it is then taken from.
fn revoked_line(line: &[u8], serials: &mut HashSet<Serial>, now_s: u64) -> Option<String> {
    let line = std::str::from_utf8(line).ok()?;
    let serial = Serial::from_hex(line.split('\t').nth(3)?).filter(|s| serials.remove(s))?;
    let fields: Vec<&str> = line.split('\t').collect();
    let ["V" | "E", end, _, _, rest @ ..] = fields.as_slice() else { return None };
    let (date, rest) = (asn1_time(now_s), rest.join("\t"));
    Some(format!("R\t{end}\t{date}\t{serial:X}\t{rest}"))
}

/// UTCTime until 2049, GeneralizedTime from 2050 on (RFC 5280, 4.1.2.5).
fn asn1_time(unix_s: u64) -> String {
    let at = i64::try_from(unix_s).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    let at = at.unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let year = match at.year() {
        year @ 1950..2050 => format!("{:02}", year % 100),
        year => format!("{year:04}"),
    };
    let (month, day) = (u8::from(at.month()), at.day());
    let (hour, minute, second) = at.to_hms();
    format!("{year}{month:02}{day:02}{hour:02}{minute:02}{second:02}Z")
}

/// Reads either form; a date before 1970 is 1970.
fn read_asn1_time(text: &str) -> Option<u64> {
    let digits = text.strip_suffix('Z').filter(|d| d.bytes().all(|b| b.is_ascii_digit()))?;
    let (year, rest) = digits.split_at_checked(digits.len().checked_sub(10)?)?;
    let year = match (year.len(), year.parse::<i32>().ok()?) {
        (2, year @ 0..50) => 2000 + year,
        (2, year) => 1900 + year,
        (4, year) => year,
        _ => return None,
    };
    let pair = |at: usize| rest.get(at..at + 2)?.parse::<u8>().ok();
    let date = Date::from_calendar_date(year, Month::try_from(pair(0)?).ok()?, pair(2)?).ok()?;
    let time = Time::from_hms(pair(4)?, pair(6)?, pair(8)?).ok()?;
    Some(u64::try_from(date.with_time(time).assume_utc().unix_timestamp()).unwrap_or(0))
}

/// Reads a certificate's file: the token's line, if there is one, and the PEM.
fn read_stored(text: &str) -> Option<Stored> {
    let (before, _) = text.split_once(pem::BEGIN)?;
    let pem = text.get(before.len()..)?.to_owned();
    let [block] = <[_; 1]>::try_from(pem::blocks(&pem)?).ok()?;
    let (_, certificate) = X509Certificate::from_der(&block.der).ok()?;
    let not_before = u64::try_from(certificate.validity().not_before.timestamp()).unwrap_or(0);
    let token = match before.lines().find_map(|l| l.strip_prefix(TOKEN_LINE)) {
        Some(line) => Some(read_redeemed(line)?),
        None => None,
    };
    let fingerprint = issuer::fingerprint(&block.der);
    Some(Stored { fingerprint, created_at: not_before.saturating_add(BACKDATE_S), token, pem })
}

/// The row that a certificate's file stood for, revoked when it was signed.
fn read_row(text: &str, serial: Serial) -> Option<Row> {
    let stored = read_stored(text)?;
    let [block] = <[_; 1]>::try_from(pem::blocks(&stored.pem)?).ok()?;
    let (_, certificate) = X509Certificate::from_der(&block.der).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    let expires_at = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    Some(Row::new(serial, DeviceId::parse(name)?, expires_at, Some(stored.created_at)))
}

fn read_redeemed(line: &str) -> Option<Redeemed> {
    let mut words = line.split(' ');
    let hash = TokenHash::from_hex(words.next()?)?;
    let iat = words.next()?.strip_prefix("iat=")?.parse().ok()?;
    let exp = words.next()?.strip_prefix("exp=")?.parse().ok()?;
    Some(Redeemed { hash, iat, exp })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::csr::Csr;
    use crate::ca::issuer::Issuer;
    use crate::ca::openssl::{must, run, run_program};
    use crate::clock;
    use crate::files::test_dir::TestDir;
    use std::fs;

    /// A folder with a CA and a request of `device-1`, which signs for any device here.
    struct Fixture {
        dir: TestDir,
        issuer: Issuer,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = TestDir::new();
            let issuer = Issuer::make(&dir, 10, 90, clock::now()).unwrap();
            must(&dir, "genpkey -algorithm ED25519 -out key.pem");
            Fixture { dir, issuer }
        }

        fn open(&self) -> Registry {
            Registry::open(&self.dir, Some(clock::now())).unwrap()
        }

        fn leaf(&self, name: &str) -> Leaf {
            must(&self.dir, &format!("req -new -key key.pem -subj /CN={name} -out csr.pem"));
            let csr = Csr::parse(&fs::read_to_string(self.dir.join("csr.pem")).unwrap()).unwrap();
            let serial = Serial::random().unwrap();
            self.issuer.sign(&csr, &device(name), serial, clock::now()).unwrap()
        }

        fn index(&self) -> String {
            fs::read_to_string(self.dir.join(INDEX)).unwrap()
        }

        fn pems(&self) -> usize {
            fs::read_dir(self.dir.join(CERTS)).unwrap().count()
        }
    }

    fn device(name: &str) -> DeviceId {
        DeviceId::parse(name).unwrap()
    }

    fn token(name: &str, exp: u64) -> Redeemed {
        Redeemed { hash: TokenHash::of(name), iat: exp - 300, exp }
    }

    fn enter(
        registry: &Registry,
        leaf: &Leaf,
        token: Option<Redeemed>,
    ) -> Result<(), RegistryError> {
        let mut entries = registry.begin();
        entries.add(leaf, token);
        entries.commit().remove(0)
    }

    #[test]
    fn what_is_committed_is_read_back_by_the_next_process() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        let now = clock::now();
        let (first, second) = (fixture.leaf("device-1"), fixture.leaf("device-1"));
        let other = fixture.leaf("device-2");
        let (live, ended) = (token("live", now.unix_s() + 100), token("ended", now.unix_s() - 1));

        let mut entries = registry.begin();
        assert!(!entries.has_active(&device("device-1"), now) && !entries.knows_token(&live.hash));
        entries.add(&first, Some(live));
        assert!(entries.has_active(&device("device-1"), now) && entries.knows_token(&live.hash));
        assert!(!registry.knows_token(&live.hash), "not before the commit");
        entries.add(&other, Some(ended));
        entries.add(&second, None);
        assert_eq!(entries.commit(), [Ok(()), Ok(()), Ok(())]);

        let check = |registry: &Registry| {
            assert!(!registry.is_empty());
            let newest = registry.newest(&device("device-1")).unwrap();
            assert_eq!((newest.serial, newest.expires_at), (second.serial, second.not_after));
            assert_eq!(newest.status(now), Status::Active);
            let later = Now { unix_ms: (second.not_after + 1) * 1000, ..now };
            assert_eq!(newest.status(later), Status::Expired);
            assert!(!registry.has_active(&device("device-1"), later));
            assert_eq!(registry.by_serial(&first.serial).unwrap().device, device("device-1"));
            assert_eq!(registry.newest(&device("device-3")), None);
            let look = registry.look(&live.hash, &device("device-3"), now);
            assert_eq!(look, Look { recorded_token: true, active_certificate: false });
            let stored = registry.stored(&first.serial).unwrap();
            assert_eq!(
                (stored.pem, stored.fingerprint),
                (first.pem.clone(), first.fingerprint.clone())
            );
            assert_eq!((stored.created_at, stored.token), (first.not_before + 300, Some(live)));
            assert_eq!(registry.stored(&second.serial).unwrap().token, None);
        };
        check(&registry);
        let again = fixture.open();
        check(&again);
        let spent = Spent { token: live, serial: first.serial, device: device("device-1") };
        assert_eq!(again.spent_tokens(), [spent]);
        let no_clock = Registry::open(&fixture.dir, None).unwrap();
        assert!(no_clock.knows_token(&ended.hash), "without a clock none has ended");
        must(&fixture.dir, &format!("verify -CAfile root-ca.crt certs/{:X}.pem", first.serial));
    }

    #[test]
    fn revoked_and_read_back() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        let leaves =
            [fixture.leaf("device-1"), fixture.leaf("device-1"), fixture.leaf("device-10")];
        leaves.iter().for_each(|leaf| enter(&registry, leaf, None).unwrap());
        let now = clock::now();
        let mut revoked = registry.revoke(&device("device-1"), now).unwrap();
        revoked.sort();
        let mut expected = [leaves[0].serial, leaves[1].serial];
        expected.sort();
        assert_eq!(revoked, expected);
        assert_eq!(registry.revoke(&device("device-1"), now), Ok(vec![]));
        assert_eq!(registry.revoke(&device("nobody"), now), Ok(vec![]));
        for registry in [&registry, &fixture.open()] {
            assert!(!registry.has_active(&device("device-1"), now));
            assert!(registry.has_active(&device("device-10"), now));
            let newest = registry.newest(&device("device-1")).unwrap();
            assert_eq!(newest.revoked_at, Some(now.unix_s()));
            assert_eq!(newest.status(now), Status::Revoked);
            assert_eq!(registry.revoked(now).len(), 2);
            let later = Now { unix_ms: (leaves[1].not_after + 1) * 1000, ..now };
            assert_eq!(registry.revoked(later), []);
        }
        fs::write(fixture.dir.join(INDEX), "").unwrap();
        let error = registry.revoke(&device("device-10"), now).unwrap_err();
        assert!(error.to_string().contains("index.txt has lost a line of device-10"), "{error}");
        assert!(registry.has_active(&device("device-10"), now));
    }

    #[test]
    fn single_certificates_are_revoked() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        let leaves = [(); 3].map(|()| fixture.leaf("device-1"));
        leaves.iter().for_each(|leaf| enter(&registry, leaf, None).unwrap());
        let [first, second, third] = leaves.map(|leaf| leaf.serial);
        let (now, stranger) = (clock::now(), Serial([0x41; 16]));
        assert_eq!(registry.revoke_these(&[second, stranger], now), Ok(vec![second]));
        assert_eq!(registry.revoke_these(&[second], now), Ok(vec![]), "once is enough");
        assert_eq!(registry.revoke_these(&[], now), Ok(vec![]));
        for registry in [&registry, &fixture.open()] {
            let revoked = |s| registry.by_serial(&s).unwrap().revoked_at.is_some();
            assert_eq!([first, second, third].map(revoked), [false, true, false]);
            assert_eq!(registry.count_active(&device("device-1"), now), 2);
        }
    }

    #[test]
    fn openssl_ca_works_on_it() {
        let fixture = Fixture::new();
        let dir = &fixture.dir;
        let registry = fixture.open();
        let leaves = [fixture.leaf("device-1"), fixture.leaf("device-1"), fixture.leaf("device-2")];
        leaves.iter().for_each(|leaf| enter(&registry, leaf, None).unwrap());
        registry.revoke(&device("device-2"), clock::now()).unwrap();
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/openssl-ca.cnf");
        let ca = |line: &str| run(dir, &format!("ca -config {config} {line}"));
        let status = |leaf: &Leaf| ca(&format!("-status {:X}", leaf.serial)).unwrap_or_else(|e| e);
        assert!(status(&leaves[0]).contains("=Valid (V)"), "{}", status(&leaves[0]));
        assert!(status(&leaves[2]).contains("=Revoked (R)"));
        ca("-gencrl -out by-openssl.pem").unwrap();
        let crl = must(dir, "crl -in by-openssl.pem -CAfile root-ca.crt -noout -text");
        assert!(
            crl.contains("verify OK") && crl.contains(&format!("{:X}", leaves[2].serial)),
            "{crl}"
        );

        // What an operator does with it while the service is stopped is read at the next start.
        let pem = format!("certs/{:X}.pem", leaves[0].serial);
        ca(&format!("-revoke {pem} -crl_reason keyCompromise")).unwrap();
        assert!(fixture.index().contains("Z,keyCompromise\t"), "{}", fixture.index());
        let now = clock::now();
        let again = fixture.open();
        assert!(again.by_serial(&leaves[0].serial).unwrap().revoked_at.is_some());
        assert!(again.has_active(&device("device-1"), now), "the other one is");
        assert_eq!(again.revoke(&device("device-1"), now), Ok(vec![leaves[1].serial]));
        assert!(fixture.index().contains("Z,keyCompromise\t"));
        enter(&again, &fixture.leaf("device-3"), None).unwrap();
        run_program(dir, "faketime", &format!("-f +1y openssl ca -config {config} -updatedb"))
            .unwrap();
        assert!(fixture.index().contains("E\t"), "{}", fixture.index());
        assert!(fixture.open().has_active(&device("device-3"), now), "the date decides, not the E");
    }

    #[test]
    fn what_a_power_cut_leaves() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        let leaves = [fixture.leaf("device-1"), fixture.leaf("device-2")];
        let spent = token("t", clock::now().unix_s() + 100);
        enter(&registry, &leaves[0], None).unwrap();
        let whole = fixture.index();
        enter(&registry, &leaves[1], Some(spent)).unwrap();
        let both = fixture.index();
        let pem = registry.pem_path(&leaves[1].serial);
        let file = fs::read(&pem).unwrap();
        for end in [whole.len(), whole.len() + 1, whole.len() + 40, both.len() - 1] {
            fs::write(fixture.dir.join(INDEX), &both[..end]).unwrap();
            fs::write(&pem, &file).unwrap();
            fs::write(fixture.dir.join(CERTS).join("notes.pem"), "not ours").unwrap();
            let again = fixture.open();
            assert_eq!(fixture.index(), whole, "cut at {end}");
            assert!(!pem.exists() && !again.knows_token(&spent.hash));
            assert_eq!(fixture.pems(), 2);
            assert!(again.newest(&device("device-1")).is_some());
        }
        fs::write(fixture.dir.join(INDEX), format!("{whole}V\t\0\0\0\n")).unwrap();
        fixture.open();
        assert_eq!(fixture.index(), whole);

        // A certificate without its file is still a record.
        fs::remove_file(registry.pem_path(&leaves[0].serial)).unwrap();
        let again = fixture.open();
        assert!(again.has_active(&device("device-1"), clock::now()));
        let error = again.stored(&leaves[0].serial).unwrap_err().to_string();
        assert!(error.ends_with(".pem: missing"), "{error}");
    }

    #[test]
    fn a_record_that_was_lost_or_is_older_takes_no_certificate_with_it() {
        let fixture = Fixture::new();
        enter(&fixture.open(), &fixture.leaf("device-1"), None).unwrap();
        let (index, pems) = (fixture.dir.join(INDEX), fixture.pems());
        let check = |count: usize| {
            let error = Registry::open(&fixture.dir, None).unwrap_err().to_string();
            assert!(error.contains(&format!("lost the lines of {count} certificates")), "{error}");
        };
        fs::remove_file(&index).unwrap();
        check(1);
        check(1); // also at the next start
        assert_eq!(fixture.pems(), pems);
        fs::write(&index, "").unwrap();
        for n in 1..=MOST_STRAYS as u8 {
            let name = format!(
                "{:X}.pem",
                Serial([0x40 + n % 64, n, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
            );
            fs::write(fixture.dir.join(CERTS).join(name), "a certificate").unwrap();
        }
        check(MOST_STRAYS + 1);
        assert_eq!(fixture.pems(), pems + MOST_STRAYS);
    }

    #[test]
    fn garbled_lines() {
        let line = Row::new(Serial([0x41; 16]), device("d"), 1_900_000_000, None).line();
        assert_eq!(line, "V\t300317174640Z\t\t41414141414141414141414141414141\tunknown\t/CN=d\n");
        let row = read_line(line.as_bytes()).unwrap();
        assert_eq!((row.line(), row.record().revoked_at), (line.clone(), None));
        let serial = "41".repeat(16);
        let with = |status: &str, end: &str, revocation: &str| {
            read_line(
                format!("{status}\t{end}\t{revocation}\t{serial}\tunknown\t/CN=d\n").as_bytes(),
            )
            .map(|row| (row.expires_at, row.revoked()))
        };
        assert_eq!(with("E", "700101000000Z", ""), Ok((0, None)));
        assert_eq!(with("V", "20500101000000Z", ""), Ok((2_524_608_000, None)));
        assert_eq!(
            with("R", "491231235959Z", "240101000000Z"),
            Ok((2_524_607_999, Some(1_704_067_200)))
        );
        let reason = "20240101000000Z,keyCompromise";
        assert_eq!(with("R", "491231235959Z", reason), Ok((2_524_607_999, Some(1_704_067_200))));
        for (status, end, revocation) in [
            ("X", "300101000000Z", ""),
            ("", "300101000000Z", ""),
            ("V", "300101000000Z", "240101000000Z"),
            ("R", "300101000000Z", ""),
            ("R", "300101000000Z", "keyCompromise"),
            ("V", "301301000000Z", ""),
            ("V", "300230000000Z", ""),
            ("V", "300101000060Z", ""),
            ("V", "300101000000", ""),
            ("V", "+30101000000Z", ""),
            ("V", "Z", ""),
            ("V", "é0101000000Z", ""),
        ] {
            assert!(with(status, end, revocation).is_err(), "{status} {end} {revocation}");
        }
        let dir = TestDir::new();
        let other = line.replace("41", "42");
        for bad in ["\n", "V\n", &line, &other.replace("/CN=", "/O="), &other.replace("42", "4")] {
            fs::write(dir.join(INDEX), format!("{line}{bad}{}", line.replace("41", "43"))).unwrap();
            let error = Registry::open(&dir, None).unwrap_err().to_string();
            let path = dir.join(INDEX);
            assert!(error.starts_with(&format!("{} line 2: ", path.display())), "{error}");
            fs::write(dir.join(INDEX), format!("{line}{bad}")).unwrap();
            assert!(Registry::open(&dir, None).is_err(), "a whole line is not torn");
        }
    }

    #[test]
    fn a_serial_number_is_never_written_twice() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        let leaf = fixture.leaf("device-1");
        enter(&registry, &leaf, None).unwrap();
        let before = (fixture.index(), fs::read(registry.pem_path(&leaf.serial)).unwrap());
        let mut entries = registry.begin();
        entries.add(&leaf, None);
        entries.add(&fixture.leaf("device-2"), None);
        let results = entries.commit();
        assert!(!results[0].as_ref().unwrap_err().left_behind());
        assert_eq!(results[1], Ok(()), "one's failure is not another's");
        assert!(fixture.index().starts_with(&before.0));
        assert_eq!(fs::read(registry.pem_path(&leaf.serial)).unwrap(), before.1);
        drop(registry.begin());
    }

    #[test]
    fn a_failed_append_leaves_nothing_or_says_so() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        enter(&registry, &fixture.leaf("device-1"), None).unwrap();
        let index = fixture.dir.join(INDEX);
        let (before, aside) = (fixture.index(), fixture.dir.join("aside"));

        // No file: nothing could be written.
        fs::rename(&index, &aside).unwrap();
        let leaf = fixture.leaf("device-2");
        let error = enter(&registry, &leaf, Some(token("t", u64::MAX))).unwrap_err();
        assert!(
            !error.left_behind() && error.to_string().contains("index.txt: No such"),
            "{error}"
        );
        assert_eq!(fixture.pems(), 1);

        // A file that takes nothing and cannot be cut either.
        std::os::unix::fs::symlink("/dev/full", &index).unwrap();
        let error = enter(&registry, &leaf, Some(token("t", u64::MAX))).unwrap_err();
        assert!(error.left_behind() && error.to_string().contains("No space left"), "{error}");
        assert_eq!(fixture.pems(), 2, "a line that may have stayed needs its certificate");
        assert!(!registry.knows_token(&TokenHash::of("t")));
        let error = enter(&registry, &fixture.leaf("device-3"), None).unwrap_err();
        assert!(error.to_string().contains("index.txt"), "{error}");

        // The true file is back: what stands there is not what failed, so it is left alone.
        fs::remove_file(&index).unwrap();
        fs::rename(&aside, &index).unwrap();
        enter(&registry, &fixture.leaf("device-4"), None).unwrap();
        assert!(fixture.index().starts_with(&before) && fixture.index().lines().count() == 2);
    }

    #[test]
    fn what_could_not_be_taken_back_is_taken_back_later() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        enter(&registry, &fixture.leaf("device-1"), None).unwrap();
        let before = fixture.index();
        let lines = Row::new(Serial([0x41; 16]), device("d"), 1, None).line();
        for (stays, expected) in [("", &before), (&lines[..20], &before), (&lines, &before)] {
            fs::write(fixture.dir.join(INDEX), format!("{before}{stays}")).unwrap();
            let undo = Some((before.len() as u64, lines.clone()));
            let mut writer = registry.lock_writer();
            writer.undo = undo;
            registry.take_back(&mut writer).unwrap();
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
        let line = |n: u8| Row::new(Serial([n; 16]), device("d"), 1, None).line();
        let seed: String = (0..(4096 / line(0).len()) as u8).map(line).collect();
        fs::write(dir.join(INDEX), &seed).unwrap();
        let registry = Registry::open(&dir, Some(clock::now())).unwrap();
        let index = || fs::read_to_string(dir.join(INDEX)).unwrap();
        let fill = |room: u64| {
            let mut file = File::create(dir.join("filler")).unwrap();
            while file.write_all(&[0; 4096]).is_ok() {}
            let full = file.metadata().unwrap().len();
            file.set_len(full - room * 4096).unwrap();
        };
        let leaves = [(); 3].map(|()| fixture.leaf("device-2"));
        for room in 0..4 {
            fill(room);
            let mut entries = registry.begin();
            leaves.iter().for_each(|leaf| entries.add(leaf, Some(token("t", u64::MAX))));
            for result in entries.commit() {
                let error = result.unwrap_err();
                assert!(!error.left_behind() && error.to_string().contains("No space"), "{error}");
            }
            assert_eq!(
                (index(), fs::read_dir(dir.join(CERTS)).unwrap().count()),
                (seed.clone(), 0)
            );
            assert!(
                !registry
                    .look(&TokenHash::of("t"), &device("device-2"), clock::now())
                    .recorded_token
            );
            fs::remove_file(dir.join("filler")).unwrap();
        }
        // Room again: the same process goes on. With room for the lines and two of them, two are.
        enter(&registry, &fixture.leaf("device-2"), None).unwrap();
        fill(2);
        let mut entries = registry.begin();
        leaves.iter().for_each(|leaf| entries.add(leaf, None));
        assert_eq!(entries.commit().iter().filter(|r| r.is_ok()).count(), 2);
        let before = index();
        assert!(registry.revoke(&device("device-2"), clock::now()).is_err());
        assert!(registry.has_active(&device("device-2"), clock::now()) && index() == before);
        fs::remove_file(dir.join("filler")).unwrap();
        assert_eq!(registry.revoke(&device("device-2"), clock::now()).map(|s| s.len()), Ok(3));
        assert_eq!(Registry::open(&dir, None).unwrap().revoked(clock::now()).len(), 3);
    }

    #[test]
    fn many_threads_write_and_read() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        let leaves: Vec<Leaf> =
            (0..12).map(|n| fixture.leaf(&format!("device-{}", n % 3))).collect();
        std::thread::scope(|scope| {
            for pair in leaves.chunks(2) {
                let registry = &registry;
                scope.spawn(move || {
                    let mut entries = registry.begin();
                    pair.iter().for_each(|leaf| entries.add(leaf, None));
                    assert_eq!(entries.commit(), [Ok(()), Ok(())]);
                    assert!(pair.iter().all(|leaf| registry.by_serial(&leaf.serial).is_some()));
                });
            }
        });
        assert_eq!((fixture.index().lines().count(), fixture.pems()), (12, 12));
        let count = |r: &Registry| r.read().of_device(&device("device-0")).count();
        assert_eq!((count(&registry), count(&fixture.open())), (4, 4));
    }

    #[test]
    fn only_the_last_days_tokens_are_read() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        let now_s = clock::now().unix_s();
        for (name, age) in [("old", 2 * jwt::MAX_LIFETIME_S), ("new", 1000), ("newest", 0)] {
            // openssl signs in the past what the issuer would sign now only.
            let leaf = fixture.leaf(name);
            let ca = "-CA root-ca.crt -CAkey root-ca.key -days 90";
            let line =
                format!("x509 -req -in csr.pem {ca} -set_serial 0x{} -out old.pem", leaf.serial);
            let back = format!("-f -{age}s openssl {line}");
            run_program(&fixture.dir, "faketime", &back).unwrap();
            let pem = fs::read_to_string(fixture.dir.join("old.pem")).unwrap();
            let spent = token(name, now_s + 86_400 - age.min(80_000));
            enter(&registry, &Leaf { pem, ..leaf }, Some(spent)).unwrap();
        }
        for now in [Some(clock::now()), None] {
            let again = Registry::open(&fixture.dir, now).unwrap();
            let known = ["old", "new", "newest"].map(|n| again.knows_token(&TokenHash::of(n)));
            assert_eq!(known, [false, true, true]);
        }
    }

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
            rows.insert(Row::new(Serial(serial), device(&format!("device-{n:06}")), 1, None));
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
