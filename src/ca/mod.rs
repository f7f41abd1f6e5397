//! The certificate authority: who signs ([`issuer`]), what may be signed ([`csr`]), what has been
//! signed ([`record`]), who shows it ([`identity`]) and what of it no longer counts ([`crl`], which
//! [`publisher`] keeps fresh and [`hook`] tells the broker of). What ended long ago is forgotten
//! ([`retention`]). [`pkcs7`] is how some clients want certificates.
//!
//! A clock that is not set decides nothing. So a CA is loaded at start, but made or judged by its
//! dates only once the clock is plausible: [`Ca::settle`] is asked again until then.

pub(crate) mod crl;
pub mod csr;
mod der;
pub(crate) mod hook;
pub(crate) mod identity;
pub mod issuer;
mod key;
pub mod pkcs7;
pub mod publisher;
pub(crate) mod record;
pub(crate) mod retention;
pub(crate) mod server;

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use x509_parser::asn1_rs::FromDer as _;
use x509_parser::certificate::X509Certificate;
use x509_parser::time::ASN1Time;

use crate::clock::Now;
use crate::config;
use crate::files::{self, FilesError};
use crate::locks::{locked, reading, writing};
use crate::problem::{Code, Problem};
use crl::Crl;
use issuer::Issuer;
use record::{Record, RecordError};

/// Why the CA cannot start or sign.
#[derive(Debug)]
pub enum CaError {
    /// The clock of this machine is not set.
    ClockNotSet,
    /// The clock is not set, or the one that made the CA was ahead; which CA that is.
    ClockBeforeCa(String),
    /// All else, for the operator.
    Failed(String),
}

impl CaError {
    pub(crate) fn refused(path: &Path, why: impl fmt::Display) -> Self {
        CaError::Failed(format!("{}: {why}", path.display()))
    }

    fn signing(why: impl fmt::Display) -> Self {
        CaError::Failed(format!("cannot sign: {why}"))
    }
}

impl fmt::Display for CaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CaError::ClockNotSet => f.write_str("the clock is not set"),
            CaError::ClockBeforeCa(ca) => {
                write!(f, "the clock is not set, or the one that made {ca}, was ahead")
            }
            CaError::Failed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for CaError {}

impl From<FilesError> for CaError {
    fn from(error: FilesError) -> Self {
        CaError::Failed(error.to_string())
    }
}

impl From<RecordError> for CaError {
    fn from(error: RecordError) -> Self {
        CaError::Failed(error.to_string())
    }
}

impl From<CaError> for Problem {
    fn from(error: CaError) -> Self {
        match error {
            CaError::ClockNotSet => Code::ClockNotSet.into(),
            CaError::ClockBeforeCa(_) => Problem::from(Code::ClockNotSet).log(error),
            other => Problem::from(Code::ServiceUnavailable).log(other),
        }
    }
}

/// The CA of one folder, which this process owns: the caller holds its
/// [lock](files::lock_folder) for as long as this lives.
#[derive(Debug)]
pub struct Ca {
    settings: config::Ca,
    issuer: OnceLock<Arc<Issuer>>,
    crl: RwLock<Option<Arc<Crl>>>,
    /// Held while the CA or its CRL is made: one at a time.
    making: Mutex<()>,
    record: Record,
}

impl Ca {
    /// Loads the CA and its record. If there is no CA yet, one is made, if the clock is plausible.
    pub fn open(settings: &config::Ca, now: Now) -> Result<Self, CaError> {
        let dir = &settings.dir;
        files::make_dir(dir, 0o755)?; // the broker reads root-ca.crt and crl.pem
        Issuer::finish(dir)?;
        let issuer = Issuer::load(dir, settings.device_validity_days)?.map(Arc::new);
        let plausible = check_clock(issuer.as_deref(), now).is_ok();
        let record = Record::open(dir, issuer.as_deref(), plausible.then_some(now))?;
        if issuer.is_none() && !record.is_empty() {
            return Err(lost(dir));
        }
        let ca = Ca {
            settings: settings.clone(),
            issuer: issuer.map_or_else(OnceLock::new, OnceLock::from),
            crl: RwLock::default(),
            making: Mutex::default(),
            record,
        };
        ca.settle(now)?;
        Ok(ca)
    }

    /// Once the clock is plausible, makes the CA if there is none, and judges its dates. `Ok(false)`
    /// as long as the clock is not. Cheap; may be asked for each request.
    pub fn settle(&self, now: Now) -> Result<bool, CaError> {
        if !self.clock_is_plausible(now) {
            return Ok(false);
        }
        match self.issuer.get() {
            Some(issuer) => issuer.check_dates(now)?,
            None => self.make(now)?,
        }
        Ok(true)
    }

    fn make(&self, now: Now) -> Result<(), CaError> {
        let _alone = locked(&self.making);
        if self.issuer.get().is_none() {
            let config::Ca { dir, root_validity_years, device_validity_days } = &self.settings;
            let made = Issuer::make(dir, *root_validity_years, *device_validity_days, now)?;
            log::info!("made a new CA in {}", dir.display());
            let _ = self.issuer.set(Arc::new(made)); // nobody else makes one
        }
        Ok(())
    }

    /// Signs a list of what is revoked now and writes it to `crl.pem`.
    pub fn publish_crl(&self, now: Now) -> Result<Arc<Crl>, CaError> {
        let issuer = self.issuer.get().ok_or(CaError::ClockNotSet)?;
        let _alone = locked(&self.making);
        let dir = &self.settings.dir;
        let last = self.crl().map_or_else(|| crl::last_number(dir, issuer), |c| c.number);
        let made = Arc::new(Crl::sign(issuer, &self.record.revoked(now), last, now)?);
        made.write(dir)?;
        *writing(&self.crl) = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Takes the list in the folder for the one that was published last, if it is still right.
    pub fn find_crl(&self, now: Now) -> Option<Arc<Crl>> {
        let issuer = self.issuer.get()?;
        let _alone = locked(&self.making);
        let found = crl::current(&self.settings.dir, issuer, &self.record.revoked(now), now)?;
        let found = Arc::new(found);
        *writing(&self.crl) = Some(Arc::clone(&found));
        Some(found)
    }

    /// The list that was published last, by this process or, if it was still right when this one
    /// started, before.
    pub fn crl(&self) -> Option<Arc<Crl>> {
        reading(&self.crl).clone()
    }

    /// The CA that signs, if there is one.
    pub fn issuer(&self) -> Option<Arc<Issuer>> {
        self.issuer.get().cloned()
    }

    /// Whether the clock stands neither before the program's build nor before the CA's `notBefore`.
    pub fn clock_is_plausible(&self, now: Now) -> bool {
        self.check_clock(now).is_ok()
    }

    /// As [`Ca::clock_is_plausible`].
    pub fn check_clock(&self, now: Now) -> Result<(), CaError> {
        check_clock(self.issuer.get().map(|i| &**i), now)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.settings.dir
    }

    /// The record of certificates.
    pub fn record(&self) -> &Record {
        &self.record
    }
}

/// Tries what [`Ca::open`] would do, and changes nothing.
pub fn check(settings: &config::Ca, now: Now) -> Result<(), CaError> {
    let issuer = Issuer::load(&settings.dir, settings.device_validity_days)?;
    let is_empty = Record::check(&settings.dir)?;
    match issuer {
        None if is_empty => Ok(()),
        None => Err(lost(&settings.dir)),
        Some(issuer) if check_clock(Some(&issuer), now).is_ok() => issuer.check_dates(now),
        Some(_) => Ok(()),
    }
}

/// There is a record, but nobody who could have signed what is in it.
fn lost(dir: &Path) -> CaError {
    let why = "missing, but index.txt lists certificates that it signed";
    CaError::refused(&dir.join(issuer::CERTIFICATE), why)
}

/// First and last second of a certificate in DER, since 1970; `None` if it is none.
pub fn validity(der: &[u8]) -> Option<(u64, u64)> {
    Some(validity_of(&X509Certificate::from_der(der).ok()?.1))
}

fn validity_of(certificate: &X509Certificate<'_>) -> (u64, u64) {
    let second = |time: ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    (second(certificate.validity().not_before), second(certificate.validity().not_after))
}

fn check_clock(issuer: Option<&Issuer>, now: Now) -> Result<(), CaError> {
    if !now.is_plausible() {
        return Err(CaError::ClockNotSet);
    }
    issuer.map_or(Ok(()), |issuer| issuer.check_begin(now))
}

#[cfg(test)]
mod tests;
