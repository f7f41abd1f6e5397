//! Servers' certificates: the broker's, and our own for HTTPS.
//!
//! One is renewed for the key that it has. So a single file changes, in one step, and no power cut
//! leaves a key beside another's certificate. Whoever wants a new key makes a new certificate.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rcgen::KeyPair;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use super::CaError;
use super::issuer::{Issuer, ServerCertificate};
use super::key::PublicKey;
use super::record;
use crate::clock::{DAY_S, Now};
use crate::config::TlsFiles;
use crate::files;
use crate::serial::Serial;

/// Lifetime: a year and a month, so that a yearly renewal may be late.
pub const DAYS: u32 = 396;
pub const LIFE_S: u64 = DAYS as u64 * DAY_S;

/// What is to be known of a server's certificate by this CA.
#[derive(Clone, Debug)]
pub struct Server {
    pub serial: Serial,
    /// DNS names and IP addresses, its common name first.
    pub names: Vec<String>,
    pub not_before: u64,
    pub not_after: u64,
    key: PublicKey,
}

impl Server {
    /// Reads a certificate in DER; `None` if it is no server's, or this CA has not signed it.
    pub fn read(der: &[u8], ca: &Issuer) -> Option<Self> {
        let certificate = ca.read_signed(der)?;
        certificate.extended_key_usage().ok()??.value.server_auth.then_some(())?;
        let (not_before, not_after) = super::validity_of(&certificate);
        Some(Server {
            serial: Serial::from_der(certificate.raw_serial())?,
            names: names(&certificate)?,
            not_before,
            not_after,
            key: PublicKey::from_spki(certificate.public_key()).ok()?,
        })
    }

    /// Whether it is to be renewed: a third of its life is left, or less, and a new one would last
    /// longer.
    pub fn is_due(&self, ca: &Issuer, now: Now) -> bool {
        let third = self.life_s() / 3;
        now.unix_s() >= self.not_after.saturating_sub(third) && self.not_after < ca.not_after
    }

    pub fn life_s(&self) -> u64 {
        self.not_after.saturating_sub(self.not_before)
    }
}

/// Another certificate for the key of `old`, which lies in this file; or a new key (ECDSA P-256) and a
/// certificate for it.
pub fn write(
    ca: &Issuer,
    old: Option<&Server>,
    names: &[String],
    life_s: u64,
    to: &TlsFiles,
    now: Now,
) -> Result<(), CaError> {
    let Some(old) = old else {
        try_folder(&to.key)?;
        let key = KeyPair::generate().map_err(CaError::signing)?;
        let made = sign(ca, names, &PublicKey::of(&key), life_s, now)?;
        files::write_atomic(&to.key, key.serialize_pem().as_bytes(), 0o600)?;
        return Ok(files::write_atomic(&to.cert, made.chain_pem.as_bytes(), 0o644)?);
    };
    // What a link leads to is renewed, and who may read it may go on to.
    let path = fs::canonicalize(&to.cert).unwrap_or_else(|_| to.cert.clone());
    let mode = fs::metadata(&path).map_or(0o644, |file| file.permissions().mode() & 0o777);
    try_folder(&path)?;
    let made = sign(ca, names, &old.key, life_s, now)?;
    Ok(files::write_atomic(&path, made.chain_pem.as_bytes(), mode)?)
}

/// Before there is a certificate that nobody will show.
fn try_folder(file: &Path) -> Result<(), CaError> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    Ok(files::try_writing(folder.unwrap_or(Path::new(".")), true)?)
}

/// Signs, and leaves the certificate where the service finds it for the record.
fn sign(
    ca: &Issuer,
    names: &[String],
    key: &PublicKey,
    life_s: u64,
    now: Now,
) -> Result<ServerCertificate, CaError> {
    let made = ca.server_certificate(names, key, life_s, now)?;
    record::deposit_server(ca.dir(), &made)?;
    Ok(made)
}

fn names(certificate: &X509Certificate<'_>) -> Option<Vec<String>> {
    let sans = certificate.subject_alternative_name().ok()??;
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let address = v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
            address.ok().map(|address| address.to_string())
        }
        _ => None,
    };
    let mut names: Vec<String> = sans.value.general_names.iter().filter_map(name).collect();
    let common = certificate.subject().iter_common_name().next().and_then(|n| n.as_str().ok());
    names.sort_by_key(|name| Some(&**name) != common);
    Some(names).filter(|names| !names.is_empty())
}
