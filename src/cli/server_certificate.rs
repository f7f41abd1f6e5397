//! `server-certificate`: a certificate for the broker, or for our own HTTPS, signed by the CA.

use std::process::ExitCode;

use super::args::ServerCertificate;
use super::{BAD_CONFIG, Given, done, fail};
use crate::ca::CaError;
use crate::ca::issuer::Issuer;
use crate::clock;
use crate::config::Ca;
use crate::files;

pub(super) fn run(given: &Given, request: &ServerCertificate) -> ExitCode {
    let ca = given.environment().and_then(|vars| Ca::from_lookup(|name| vars.get(name)));
    match ca {
        Ok(ca) => done(make(&ca, request)),
        Err(e) => fail(BAD_CONFIG, e),
    }
}

/// Takes no lock and leaves nothing in the record.
fn make(ca: &Ca, request: &ServerCertificate) -> Result<(), CaError> {
    let now = clock::now();
    let issuer = Issuer::load(&ca.dir, ca.device_validity_days)?;
    let issuer = issuer.ok_or_else(|| CaError::Missing(ca.dir.clone()))?;
    if !now.is_plausible() {
        return Err(CaError::ClockNotSet);
    }
    let made = issuer.server_certificate(&request.names, request.days, now)?;
    files::make_dir(&request.out, 0o755)?;
    let write = |name: &str, text: &str, mode| {
        files::write_atomic(&request.out.join(name), text.as_bytes(), mode)
    };
    write("server.key", &made.key_pem, 0o600)?;
    write("server.crt", &made.chain_pem, 0o644)?;
    Ok(write("ca.crt", &issuer.chain_pem(), 0o644)?)
}
