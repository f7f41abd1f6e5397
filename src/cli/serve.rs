//! Without a command: serves until it is told to stop.

use std::process::ExitCode;

use super::{BAD_CONFIG, FAILED, Given, fail};
use crate::logging;
use crate::service;

pub(super) fn run(given: &Given) -> ExitCode {
    let loaded = given.environment().and_then(|environment| Ok((given.config()?, environment)));
    let (config, environment) = match loaded {
        Ok(loaded) => loaded,
        Err(e) => return fail(BAD_CONFIG, e),
    };
    if let Err(e) = logging::init(&config.log, environment.get("JOURNAL_STREAM").as_deref()) {
        return fail(FAILED, e);
    }
    config.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    match service::run(&config, || given.config()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if log::log_enabled!(log::Level::Error) => {
            log::error!("{e}");
            ExitCode::from(FAILED)
        }
        // Nobody should have to look for the reason with another log level.
        Err(e) => fail(FAILED, e),
    }
}
