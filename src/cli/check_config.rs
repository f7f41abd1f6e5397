//! `check-config`: reads the configuration as a start does, tries what that would need, and prints
//! what counts.
//!
//! To see what the service may do it must be run as the same user.

use std::process::ExitCode;

use super::{BAD_CONFIG, Given, fail, print, tell};
use crate::service;

pub(super) fn run(given: &Given, offline: bool) -> ExitCode {
    let config = match given.config() {
        Ok(config) => config,
        Err(e) => return fail(BAD_CONFIG, e),
    };
    let rehearsal = service::rehearse(&config, offline);
    let warnings = config.warnings.iter().chain(&rehearsal.warnings);
    warnings.for_each(|warning| tell(format_args!("warning: {warning}")));
    rehearsal.faults.iter().for_each(tell);
    let printed = print(&(config.shown.join("\n") + "\n"));
    if rehearsal.faults.is_empty() { printed } else { ExitCode::from(BAD_CONFIG) }
}
