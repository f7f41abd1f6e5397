//! Without a command: serves until it is told to stop. `check-config` reads the configuration as that
//! does, tries what it would need, and prints what counts.

use std::process::ExitCode;

use super::{BAD_CONFIG, FAILED, Failure, Given, failed, print, tell, usage};
use crate::logging;
use crate::service;

pub(super) fn run(given: &Given) -> Result<ExitCode, Failure> {
    // First of all: a SIGHUP that is not caught ends the process.
    let signals = service::catch_signals().map_err(failed)?;
    let config = given.config().map_err(usage)?;
    let journal = given.environment().map_err(usage)?.get("JOURNAL_STREAM");
    logging::init(&config.log, journal.as_deref()).map_err(failed)?;
    config.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    match service::run(&config, signals, || given.config()) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(e) if log::log_enabled!(log::Level::Error) => {
            log::error!("{e}");
            Ok(ExitCode::from(FAILED))
        }
        // Nobody should have to look for the reason with another log level.
        Err(e) => Err(failed(e)),
    }
}

/// To see what the service may do this must be run as the same user.
pub(super) fn check(given: &Given, offline: bool) -> Result<ExitCode, Failure> {
    let config = given.config().map_err(usage)?;
    let rehearsal = service::rehearse(&config, offline);
    let warnings = config.warnings.iter().chain(&rehearsal.warnings);
    warnings.for_each(|warning| tell(format_args!("warning: {warning}")));
    rehearsal.faults.iter().for_each(tell);
    let printed = print(&(config.shown.join("\n") + "\n"))?;
    Ok(if rehearsal.faults.is_empty() { printed } else { ExitCode::from(BAD_CONFIG) })
}
