//! Device onboarding server for MQTT fleets: one-time tokens for X.509 certificates.

pub mod cli;
pub mod ca;
pub mod clock;
pub mod config;
pub mod device;
pub mod healthcheck;
pub mod files;
pub mod json;
pub mod jwt;
pub mod logging;
pub mod problem;
pub mod serial;
pub mod store;

use std::fmt;

/// Why the server stopped, or a command failed: one line for the operator.
#[derive(Debug)]
pub struct RunError(String);

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for RunError {}

/// Serves until asked to stop.
///
/// # Errors
/// What kept the server from starting, or stopped it.
pub fn run(_: &config::Config) -> Result<(), RunError> {
    Err(RunError("this build has no server yet".to_owned()))
}

/// Signs a server's certificate.
///
/// # Errors
/// What kept it from being signed.
pub fn server_certificate(_: &config::Ca, _: &cli::ServerCertificate) -> Result<(), RunError> {
    Err(RunError("this build has no CA yet".to_owned()))
}
