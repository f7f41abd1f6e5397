//! `server-certificate`: a certificate for the broker, or for our own HTTPS, signed by the CA; and the
//! next one in its place.

use std::path::Path;
use std::process::ExitCode;

use super::args::ServerCertificate;
use super::{Failure, Given, failed, print, usage};
use crate::ca::CaError;
use crate::ca::issuer::Issuer;
use crate::ca::server::{self, Server};
use crate::clock::{self, DAY_S};
use crate::config::{Ca, TlsFiles, certificates};
use crate::files;

pub(super) fn run(given: &Given, request: &ServerCertificate) -> Result<ExitCode, Failure> {
    let ca = given.environment().and_then(|vars| Ca::from_lookup(|name| vars.get(name)));
    make_or_renew(&ca.map_err(usage)?, request).map_err(failed)?;
    Ok(ExitCode::SUCCESS)
}

/// Takes no lock: the service finds what is signed here, and enters it into the record.
fn make_or_renew(ca: &Ca, request: &ServerCertificate) -> Result<(), CaError> {
    let issuer = Issuer::load(&ca.dir, ca.device_validity_days)?;
    let missing =
        || format!("there is no CA in {}; is DATA_DIR that of the service?", ca.dir.display());
    let issuer = issuer.ok_or_else(|| CaError::Failed(missing()))?;
    if !clock::now().is_plausible() {
        return Err(CaError::ClockNotSet);
    }
    let file = |name| request.out.join(name);
    let to = TlsFiles { cert: file("server.crt"), key: file("server.key") };
    let is_done = if request.renew {
        renew(&issuer, request, &to)?
    } else {
        make(&issuer, request, &to)?;
        true
    };
    if is_done {
        let chain = issuer.chain_pem();
        files::write_atomic(&file("ca.crt"), chain.as_bytes(), 0o644)?;
    }
    Ok(())
}

fn make(ca: &Issuer, request: &ServerCertificate, to: &TlsFiles) -> Result<(), CaError> {
    files::make_dir(&request.out, 0o755)?;
    let there = [&to.cert, &to.key].into_iter().find(|path| path.exists());
    if let Some(there) = there.filter(|_| !request.force) {
        let why = "exists: --renew DIR renews it, --force overwrites it";
        return Err(CaError::refused(there, why));
    }
    let life_s = life_s(request).unwrap_or(server::LIFE_S);
    server::write(ca, None, &request.names, life_s, to, clock::now())
}

/// Returns whether there is a new one, of which whoever reloads the server is told in a line.
fn renew(ca: &Issuer, request: &ServerCertificate, to: &TlsFiles) -> Result<bool, CaError> {
    let (old, now) = (present(ca, &to.cert)?, clock::now());
    let life_s = life_s(request).unwrap_or_else(|| old.life_s());
    if !request.force && !old.is_due(ca, now) {
        return Ok(false);
    }
    let keeps_key = (!request.force).then_some(&old);
    server::write(ca, keeps_key, &old.names, life_s, to, now)?;
    let end = clock::rfc3339(present(ca, &to.cert)?.not_after.saturating_mul(1000));
    let _ = print(&format!("{} is renewed until {end}\n", to.cert.display()));
    Ok(true)
}

fn present(ca: &Issuer, path: &Path) -> Result<Server, CaError> {
    let refused = |why: &str| CaError::refused(path, why);
    let file = files::read(path)?.ok_or_else(|| refused("missing"))?;
    let chain = certificates(&file).map_err(|why| refused(&why))?;
    let server = chain.first().and_then(|der| Server::read(der, ca));
    server.ok_or_else(|| refused("not a server's certificate by this CA: only such can be renewed"))
}

fn life_s(request: &ServerCertificate) -> Option<u64> {
    Some(u64::from(request.days?) * DAY_S)
}
