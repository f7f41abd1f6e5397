//! The record of certificates: OpenSSL's CA database (`index.txt`), one `certs/<SERIAL>.pem` for each
//! that was signed here, and `certs/others.pem` for those that other instances have signed.
//!
//! The line in `index.txt` makes a certificate a record. It is written after the certificate is on
//! disk, so a certificate without a line was never answered. But in a copy that was taken meanwhile
//! its file may be newer than `index.txt`, so it is entered at start. Of a line without a certificate
//! only the download is missing. All but the certificates themselves is held in memory ([`rows`]), in
//! at most 100 bytes each.
//!
//! What is recorded here is told to other instances ([`news`]), and what they tell is merged
//! ([`merge`]): each instance holds the whole record of the CA. How they reach each other is not known
//! here.
//!
//! Who reads what is in memory never waits for a disk: the lock that is held while files are written is
//! the writers' own, and whoever has nothing to write must not wait until another's certificates are
//! synced. (Who revokes looks for what there is under that lock: what is just being written must be
//! revoked too.)

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

use x509_parser::asn1_rs::FromDer as _;
use x509_parser::certificate::X509Certificate;

use super::issuer::{BACKDATE_S, Issuer, Leaf};
use super::validity_of;
use crate::clock::Now;
use crate::device::DeviceId;
use crate::files::{self, FilesError};
use crate::jwt::TokenHash;
use crate::locks::{locked, reading, writing};
use crate::pem;
use crate::problem::{Code, Problem};
use crate::serial::Serial;
use crate::trial::Trial;

mod entries;
mod index;
pub mod merge;
mod news;
mod others;
mod prune;
mod renewals;
mod repair;
mod rows;
mod servers;

pub use entries::Entries;
use index::Change;
use merge::Incoming;
use news::News;
pub use news::Untold;
use renewals::Renewals;
use rows::{Place, Rows, Slot};
use servers::Servers;
pub use servers::deposit_server;

const INDEX: &str = "index.txt";
/// Its attributes: renewals are several valid certificates of one subject.
const ATTRIBUTES: (&str, &str) = ("index.txt.attr", "unique_subject = no\n");
const CERTS: &str = "certs";
/// What the line before the PEM begins with, if a token was redeemed for the certificate …
const TOKEN_LINE: &str = "Provisioning-Token: ";
/// … and how that line ends if a registration was used up by it …
const REGISTERED: &str = " registered";
/// … and if it renews another.
const RENEWAL_LINE: &str = "Renews: ";
/// … and if only the time is known at which something paid for it.
const PAID_LINE: &str = "Paid: ";
/// Bytes read and written at once when the database is copied.
const COPIED: usize = 64 * 1024;
/// How far two records of the same moment may disagree about the time, for clocks are set.
const CLOCK_SLACK_S: u64 = 3600;

/// Why a certificate is revoked (RFC 5280, 5.3.1). Another program may say more; that counts as
/// unspecified here, and stays in `index.txt` as it is. Of two revocations of one second the lesser
/// reason in this order counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Somebody else may have the key.
    KeyCompromise,
    /// Another certificate has taken its place.
    Superseded,
    /// The device is out of service.
    CessationOfOperation,
    /// Nobody has said why.
    Unspecified,
}

impl Reason {
    const ALL: [(Reason, &str, u8); 4] = [
        (Reason::KeyCompromise, "keyCompromise", 1),
        (Reason::Superseded, "superseded", 4),
        (Reason::CessationOfOperation, "cessationOfOperation", 5),
        (Reason::Unspecified, "unspecified", 0),
    ];

    /// Reads what `Display` writes, in any case, as OpenSSL does.
    pub fn parse(text: &str) -> Option<Self> {
        let mut all = Reason::ALL.iter();
        all.find(|(_, name, _)| name.eq_ignore_ascii_case(text)).map(|(reason, ..)| *reason)
    }

    /// Its number in a CRL (RFC 5280, 5.3.1).
    pub fn number(self) -> u8 {
        Reason::ALL.iter().find(|(reason, ..)| *reason == self).map_or(0, |(.., number)| *number)
    }

    pub fn numbered(number: u8) -> Self {
        let found = Reason::ALL.iter().find(|(.., of)| *of == number);
        found.map_or(Reason::Unspecified, |(reason, ..)| *reason)
    }
}

/// As `index.txt` and the API have it.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = Reason::ALL.iter().find(|(reason, ..)| reason == self);
        f.write_str(found.map_or("", |(_, name, _)| name))
    }
}

/// That a certificate is revoked. Of two revocations of one certificate the earlier counts, and none is
/// ever taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revocation {
    pub serial: Serial,
    /// Since when, in seconds since 1970.
    pub at: u64,
    pub reason: Reason,
}

/// Why the record could not be read or written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordError {
    /// A file cannot be read, or `index.txt` has a line that is none of a CA database; which and why.
    Unreadable(String),
    /// A certificate's own file is not there, or is no certificate; why.
    Absent(String),
    /// A file cannot be written.
    NotWritten {
        why: String,
        /// Something of what was to be recorded may be on disk.
        left_behind: bool,
    },
}

impl RecordError {
    /// Whether something of what was to be recorded may be on disk. If not, the token that paid for
    /// the certificate may be given back.
    pub fn left_behind(&self) -> bool {
        matches!(self, RecordError::NotWritten { left_behind: true, .. })
    }

    fn not_written(why: impl fmt::Display) -> Self {
        RecordError::NotWritten { why: why.to_string(), left_behind: false }
    }
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecordError::Unreadable(why) | RecordError::Absent(why) => f.write_str(why),
            RecordError::NotWritten { why, left_behind: false } => f.write_str(why),
            RecordError::NotWritten { why, left_behind: true } => {
                write!(f, "{why}; part of it may be on disk")
            }
        }
    }
}

impl std::error::Error for RecordError {}

impl From<FilesError> for RecordError {
    fn from(error: FilesError) -> Self {
        RecordError::Unreadable(error.to_string())
    }
}

impl From<RecordError> for Problem {
    fn from(error: RecordError) -> Self {
        // What cannot be read now will not be readable in a second.
        let code = match &error {
            RecordError::Unreadable(_) => Code::InternalError,
            RecordError::NotWritten { .. } => Code::ServiceUnavailable,
            RecordError::Absent(_) => Code::CertificateNotFound,
        };
        Problem::from(code).log(error)
    }
}

/// What memory holds of a certificate. Times are in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub serial: Serial,
    pub device: DeviceId,
    pub expires_at: u64,
    pub revoked_at: Option<u64>,
}

impl Certificate {
    /// Of what use it is, as answers say it. What is revoked is that also when its time is over.
    pub fn status(&self, now: Now) -> &'static str {
        match self.revoked_at {
            Some(_) => "revoked",
            None if now.unix_s() > self.expires_at => "expired",
            None => "active",
        }
    }
}

/// What the certificate's own file says. Times are in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub pem: String,
    pub der: Vec<u8>,
    /// When it was signed, which is a little after its `notBefore`.
    pub created_at: u64,
    /// What it was signed for, if that was written down.
    pub origin: Option<Origin>,
}

impl Stored {
    /// When what paid for it came to be. Older files do not tell, and it was then paid for when it was
    /// signed.
    pub fn paid(&self) -> u64 {
        self.origin.and_then(Origin::paid).unwrap_or(self.created_at)
    }

    /// What it is entered as, if it is a device's by this CA.
    fn incoming(&self, serial: &Serial, ca: &Issuer) -> Option<Incoming> {
        Incoming::read(serial, &self.der, self.origin, ca)
    }

    /// The same as it was when it was signed.
    fn leaf(self, device: DeviceId, slot: &Slot) -> Leaf {
        Leaf {
            pem: self.pem,
            der: self.der,
            serial: slot.serial,
            device,
            not_after: slot.expires_at,
        }
    }
}

/// What a certificate was signed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Token(Redeemed),
    /// A token by which a registration was used up: the device needs its older certificates no more.
    Registration(Redeemed),
    /// An earlier certificate of the device.
    Renewal {
        old: Serial,
        /// When what paid for that came to be, which this inherits. Older files do not tell.
        paid: Option<u64>,
    },
    Paid(u64),
}

impl Origin {
    fn paid(self) -> Option<u64> {
        match self {
            Origin::Token(token) | Origin::Registration(token) => Some(token.iat),
            Origin::Renewal { paid, .. } => paid,
            Origin::Paid(paid) => Some(paid),
        }
    }

    /// The token that paid for it.
    pub fn token(self) -> Option<Redeemed> {
        match self {
            Origin::Token(token) | Origin::Registration(token) => Some(token),
            Origin::Renewal { .. } | Origin::Paid(_) => None,
        }
    }

    fn renews(self) -> Option<Serial> {
        match self {
            Origin::Renewal { old, .. } => Some(old),
            Origin::Token(_) | Origin::Registration(_) | Origin::Paid(_) => None,
        }
    }

    /// Reads a line as `Display` writes it.
    fn read(line: &str) -> Option<Self> {
        if let Some(renewed) = line.strip_prefix(RENEWAL_LINE) {
            let (old, paid) = match renewed.split_once(" paid=") {
                Some((old, paid)) => (old, Some(paid.parse().ok()?)),
                None => (renewed, None),
            };
            return Serial::from_hex(old).map(|old| Origin::Renewal { old, paid });
        }
        if let Some(paid) = line.strip_prefix(PAID_LINE) {
            return paid.parse().ok().map(Origin::Paid);
        }
        let token = line.strip_prefix(TOKEN_LINE)?;
        let kind = if token.ends_with(REGISTERED) { Origin::Registration } else { Origin::Token };
        read_redeemed(token).map(kind)
    }
}

/// The line before the PEM.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Token(Redeemed { hash, iat, exp }) => {
                write!(f, "{TOKEN_LINE}{hash} iat={iat} exp={exp}")
            }
            Origin::Registration(token) => write!(f, "{}{REGISTERED}", Origin::Token(*token)),
            Origin::Renewal { old, paid: None } => write!(f, "{RENEWAL_LINE}{old:X}"),
            Origin::Renewal { old, paid: Some(paid) } => {
                write!(f, "{RENEWAL_LINE}{old:X} paid={paid}")
            }
            Origin::Paid(paid) => write!(f, "{PAID_LINE}{paid}"),
        }
    }
}

/// A token that was redeemed for a certificate; its times are in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redeemed {
    pub hash: TokenHash,
    pub iat: u64,
    pub exp: u64,
}

/// A redeemed token and the certificate that it was redeemed for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spent {
    pub token: Redeemed,
    pub serial: Serial,
    pub device: DeviceId,
}

/// The record of one CA. Every method may be called from any thread.
#[derive(Debug)]
pub struct Record {
    dir: PathBuf,
    rows: RwLock<Rows>,
    writer: Mutex<Writer>,
    trial: Arc<Trial>,
    news: News,
    servers: Servers,
    /// Certificates of the last day before the start that have taken others' places, what they were
    /// signed for and when.
    successors: Mutex<Vec<(Origin, Serial, u64)>>,
}

/// What the writers know beside the rows.
#[derive(Debug, Default)]
struct Writer {
    /// An append that failed and could not be taken back: what was the length, and what was added.
    undo: Option<(u64, String)>,
    renewals: Renewals,
}

impl Record {
    /// Reads the record of `ca` in `dir`, puts in order what a power cut or a copy may have left, and
    /// loads the tokens of the last day; by its own dates if the clock is not set (`None`).
    pub fn open(dir: &Path, ca: Option<&Issuer>, now: Option<Now>) -> Result<Self, RecordError> {
        files::make_dir(&dir.join(CERTS), 0o755)?;
        let attributes = dir.join(ATTRIBUTES.0);
        if files::read(&attributes)?.as_deref() != Some(ATTRIBUTES.1.as_bytes()) {
            files::remove_if_there(&attributes)?;
            // Where a power cut takes it, it is written again.
            files::create_new(&attributes, ATTRIBUTES.1.as_bytes(), 0o644, false)?;
        }
        let found = repair::read_index(&dir.join(INDEX))?;
        let is_missing = found.is_none();
        let (rows, tail) = found.unwrap_or_default();
        let is_foreign = |slot: &&Slot| !slot.is_devices() && slot.place != Place::Server;
        let foreign = rows.list.iter().filter(is_foreign).count();
        if foreign > 0 {
            let index = dir.join(INDEX);
            log::info!(
                "lines of {} are no device's and no server's, and count for the CRL only: {foreign}",
                index.display()
            );
        }
        let folders = vec![dir.join(CERTS), dir.to_owned()];
        let record = Record {
            dir: dir.to_owned(),
            rows: RwLock::new(rows),
            writer: Mutex::default(),
            trial: Arc::new(Trial::new("the record", folders, dir.join(INDEX))),
            news: News::default(),
            servers: Servers::default(),
            successors: Mutex::default(),
        };
        record.put_in_order(tail, is_missing, ca)?;
        record.load_last_day(now.map(|n| n.unix_s()));
        Ok(record)
    }

    /// Checks that the record in `dir` can be read and written, and changes nothing. Returns whether
    /// nothing is recorded there.
    pub fn check(dir: &Path) -> Result<bool, RecordError> {
        files::try_folder(&dir.join(CERTS)).map_err(RecordError::not_written)?;
        let index = repair::read_index(&dir.join(INDEX))?;
        Ok(index.is_none_or(|(rows, _)| rows.list.is_empty()))
    }

    /// Whether the record can be written.
    pub fn trial(&self) -> &Arc<Trial> {
        &self.trial
    }

    pub fn is_empty(&self) -> bool {
        self.read().list.is_empty()
    }

    pub fn newest(&self, device: &DeviceId) -> Option<Certificate> {
        let rows = self.read();
        rows.of_device(device).next().and_then(|slot| rows.certificate(slot))
    }

    /// The device's certificates, the newest first.
    pub fn of_device(&self, device: &DeviceId) -> Vec<Certificate> {
        let rows = self.read();
        rows.of_device(device).filter_map(|slot| rows.certificate(slot)).collect()
    }

    /// The certificates of its device that are older than this one and not revoked.
    pub fn older(&self, new: &Serial) -> Vec<Serial> {
        let Some(new) = self.by_serial(new) else { return Vec::new() };
        let all = self.of_device(&new.device).into_iter();
        let older = all.skip_while(|newer| newer.serial != new.serial).skip(1);
        older.filter(|old| old.revoked_at.is_none()).map(|old| old.serial).collect()
    }

    /// The newest certificate of each device whose name comes behind `after` and begins with `prefix`:
    /// the first `most`, by name.
    pub fn newest_after(&self, after: &str, prefix: &str, most: usize) -> Vec<Certificate> {
        let rows = self.read();
        let found = rows.newest_after(after.as_bytes(), prefix.as_bytes(), most);
        found.into_iter().filter_map(|slot| rows.certificate(slot)).collect()
    }

    pub fn by_serial(&self, serial: &Serial) -> Option<Certificate> {
        let rows = self.read();
        rows.by_serial(serial).and_then(|slot| rows.certificate(slot))
    }

    /// Whether the device has a certificate that is neither expired nor revoked.
    pub fn has_active(&self, device: &DeviceId, now: Now) -> bool {
        self.read().has_active(device, now)
    }

    /// Whether a certificate is recorded for the token. Known until the token has ended.
    pub fn knows_token(&self, token: &TokenHash) -> bool {
        self.read().knows_token(token)
    }

    /// [`Record::knows_token`] and [`Record::has_active`] of one moment.
    pub fn look(&self, token: &TokenHash, device: &DeviceId, now: Now) -> (bool, bool) {
        let rows = self.read();
        (rows.knows_token(token), rows.has_active(device, now))
    }

    /// The tokens that certificates are recorded for and that may not have ended.
    pub fn spent_tokens(&self) -> Vec<Spent> {
        self.read().spent()
    }

    /// What is revoked and has not ended, for a CRL.
    pub fn revoked(&self, now: Now) -> Vec<Revocation> {
        self.read().revocations(now.unix_s()).collect()
    }

    /// Reads a certificate and what was written down with it. A record without one is a record all the
    /// same: a copy that was taken while certificates were written may lack it, and another program's
    /// may lie elsewhere.
    pub fn stored(&self, serial: &Serial) -> Result<Stored, RecordError> {
        let look = || self.read().by_serial(serial).copied();
        let Some(slot) = look() else { return self.stored_alone(serial) };
        match (self.stored_at(&slot), slot.place) {
            // Certificates may just be moved.
            (Err(RecordError::Absent(_)), Place::Others(_)) => {
                drop(self.lock_writer());
                self.stored_at(&look().unwrap_or(slot))
            }
            (stored, _) => stored,
        }
    }

    /// When what paid for a certificate came to be; 0 if that cannot be known any more. Takes no lock
    /// that a batch of entries holds, as [`Record::stored`] may.
    pub fn paid(&self, serial: &Serial) -> u64 {
        let slot = self.read().by_serial(serial).copied();
        let stored = slot.and_then(|slot| self.stored_at(&slot).ok());
        stored.map_or(0, |stored| stored.paid())
    }

    /// Reads a certificate where its row says that it is. Takes no lock.
    fn stored_at(&self, slot: &Slot) -> Result<Stored, RecordError> {
        let Place::Others(at) = slot.place else { return self.stored_alone(&slot.serial) };
        let path = self.others_path();
        let absent = || {
            let why = format!("{}: certificate {} is missing", path.display(), slot.serial);
            RecordError::Absent(why)
        };
        let read = File::open(&path).and_then(|file| others::read(&file, u64::from(at)));
        let text = read.map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => absent(),
            _ => FilesError::io("cannot read", &path)(e).into(),
        })?;
        let stored = text.and_then(|text| read_stored(&text)).ok_or_else(absent)?;
        // The file may be an older or a newer copy than `index.txt`.
        if serial_of(&stored.der) == Some(slot.serial) { Ok(stored) } else { Err(absent()) }
    }

    /// Reads the file that a certificate has for itself.
    fn stored_alone(&self, serial: &Serial) -> Result<Stored, RecordError> {
        let path = self.pem_path(serial);
        let absent = |why: &str| RecordError::Absent(format!("{}: {why}", path.display()));
        let bytes = files::read(&path)?.ok_or_else(|| absent("missing"))?;
        let text = String::from_utf8(bytes).map_err(|_| absent("not a text"))?;
        read_stored(&text).ok_or_else(|| absent("not a PEM certificate"))
    }

    /// Begins a batch of entries. Until they are committed or dropped no other writer gets in.
    pub fn begin(&self) -> Entries<'_> {
        Entries::begin(self)
    }

    /// Revokes all certificates of a device that are not, and says which; also those that have
    /// ended, which might be renewed all the same. On disk when it returns. After a failure memory
    /// still has them unrevoked, and trying again is safe.
    pub fn revoke(
        &self,
        device: &DeviceId,
        reason: Reason,
        now: Now,
    ) -> Result<Vec<Serial>, RecordError> {
        self.revoke_those(|rows| rows.of_device(device).copied().collect(), reason, now)
    }

    /// Revokes those of the certificates that are not revoked, and says which. On disk when it returns.
    pub fn revoke_these(
        &self,
        these: &[Serial],
        reason: Reason,
        now: Now,
    ) -> Result<Vec<Serial>, RecordError> {
        let those = |rows: &Rows| these.iter().filter_map(|s| rows.by_serial(s)).copied().collect();
        self.revoke_those(those, reason, now)
    }

    fn revoke_those(
        &self,
        those: impl FnOnce(&Rows) -> Vec<Slot>,
        reason: Reason,
        now: Now,
    ) -> Result<Vec<Serial>, RecordError> {
        let mut writer = self.lock_writer();
        let those = those(&self.read());
        let valid = those.iter().filter(|slot| slot.revoked().is_none());
        let revoked = valid.map(|slot| (slot.serial, (now.unix_s().max(1), reason))).collect();
        self.enter_revoked(&mut writer, revoked)
    }

    /// Appends lines to `index.txt`; if something in it changes, by writing it anew.
    fn write_index(
        &self,
        writer: &mut Writer,
        lines: String,
        mut changes: HashMap<Serial, Change>,
    ) -> Result<(), RecordError> {
        if changes.is_empty() {
            return self.append(writer, lines);
        }
        self.take_back(writer)?;
        // Line by line: a record of 100,000 certificates has 8 MB, which a gateway cannot spare twice.
        let path = self.dir.join(INDEX);
        let lost = |serial: Serial| {
            let whose = self.by_serial(&serial).map(|c| c.device.to_string()).unwrap_or_default();
            io::Error::other(format!("{} has lost a line of {whose}", path.display()))
        };
        let mut copy = |new: &mut File| {
            let old = BufReader::with_capacity(COPIED, File::open(&path)?);
            let mut new = BufWriter::with_capacity(COPIED, new);
            if let Some(serial) = index::copy_changed(old, &mut new, &mut changes)? {
                return Err(lost(serial));
            }
            new.write_all(lines.as_bytes())?;
            new.flush()
        };
        files::write_atomic_by(&path, 0o644, &mut copy)
            .map_err(|e| RecordError::NotWritten { why: e.to_string(), left_behind: true })
    }

    fn others_path(&self) -> PathBuf {
        self.dir.join(CERTS).join(others::OTHERS)
    }

    fn pem_path(&self, serial: &Serial) -> PathBuf {
        self.dir.join(CERTS).join(format!("{serial:X}.pem"))
    }

    fn read(&self) -> RwLockReadGuard<'_, Rows> {
        reading(&self.rows)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Rows> {
        writing(&self.rows)
    }

    fn lock_writer(&self) -> MutexGuard<'_, Writer> {
        locked(&self.writer)
    }
}

/// Reads a certificate's file: the line that tells its origin, if there is one, and the PEM.
fn read_stored(text: &str) -> Option<Stored> {
    let (before, _) = text.split_once(pem::BEGIN)?;
    let pem = text.get(before.len()..)?.to_owned();
    let [pem::Block { der, .. }] = <[_; 1]>::try_from(pem::blocks(&pem)?).ok()?;
    let (_, certificate) = X509Certificate::from_der(&der).ok()?;
    let (not_before, _) = validity_of(&certificate);
    let lines = [TOKEN_LINE, RENEWAL_LINE, PAID_LINE];
    let is_origin = |line: &&str| lines.iter().any(|begin| line.starts_with(begin));
    let origin = match before.lines().find(is_origin) {
        Some(line) => Some(Origin::read(line)?),
        None => None,
    };
    let created_at = not_before.saturating_add(BACKDATE_S);
    Some(Stored { created_at, origin, pem, der })
}

fn serial_of(der: &[u8]) -> Option<Serial> {
    Serial::from_der(X509Certificate::from_der(der).ok()?.1.raw_serial())
}

fn read_redeemed(line: &str) -> Option<Redeemed> {
    let mut words = line.split(' ');
    let hash = TokenHash::from_hex(words.next()?)?;
    let iat = words.next()?.strip_prefix("iat=")?.parse().ok()?;
    let exp = words.next()?.strip_prefix("exp=")?.parse().ok()?;
    Some(Redeemed { hash, iat, exp })
}

#[cfg(test)]
mod tests;
