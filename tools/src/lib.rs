//! What the measuring programs in `tools/src/bin` share: one HTTP client, requests for certificates, and
//! how times are summed up.

pub mod http;

use std::error::Error;
use std::time::Duration;

use rcgen::{CertificateParams, DnType, KeyPair};

/// Why a measurement ended early.
pub type Failure = Box<dyn Error + Send + Sync>;

/// A request for a certificate in this name, PEM.
pub fn csr(name: &str, key: &KeyPair) -> Result<String, Failure> {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.remove(DnType::CommonName);
    parameters.distinguished_name.push(DnType::CommonName, name);
    Ok(parameters.serialize_request(key)?.pem()?)
}

/// Under how many milliseconds this share of the sorted times lies; 0 for none.
pub fn quantile_ms(sorted: &[Duration], share: f64) -> f64 {
    let at = (sorted.len().saturating_sub(1) as f64 * share) as usize;
    sorted.get(at).copied().unwrap_or_default().as_secs_f64() * 1000.0
}
