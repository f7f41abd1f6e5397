//! What a service manager says of itself: systemd's `sd_notify(3)` and `sd_watchdog_enabled(3)`.
//!
//! These variables are set by who starts us, never by the operator, and so are not in the table.

use std::time::Duration;

use super::ConfigError;
use super::vars::Vars;

/// Who started us and wants to hear from us; nobody by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Supervision {
    /// The datagram socket to report to: a path, or `@` and an abstract name.
    pub notify_socket: Option<String>,
    /// Without a sign of life for so long we are ended.
    pub watchdog: Option<Duration>,
    /// The process from which signs of life are expected; `None`: whoever reads this.
    pub watchdog_pid: Option<u32>,
}

impl Supervision {
    pub(super) fn from_vars(vars: &Vars<'_>) -> Result<Self, ConfigError> {
        let watchdog_us: u64 =
            number(vars, "WATCHDOG_USEC", "a whole number of microseconds")?.unwrap_or(0);
        Ok(Supervision {
            notify_socket: vars.given("NOTIFY_SOCKET")?,
            watchdog: (watchdog_us > 0).then(|| Duration::from_micros(watchdog_us)),
            watchdog_pid: number(vars, "WATCHDOG_PID", "the id of a process")?,
        })
    }

    /// The time without a sign of life, if the process with this id is meant.
    pub fn watchdog_of(&self, pid: u32) -> Option<Duration> {
        self.watchdog.filter(|_| self.watchdog_pid.is_none_or(|meant| meant == pid))
    }
}

fn number<T: std::str::FromStr>(
    vars: &Vars<'_>,
    name: &str,
    what: &str,
) -> Result<Option<T>, ConfigError> {
    let wrong = |_| ConfigError::bare(name, format!("must be {what}"));
    vars.given(name)?.map(|text| text.parse().map_err(wrong)).transpose()
}
