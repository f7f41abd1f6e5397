//! The one place that reads the time.
//!
//! Everyone else is given a [`Now`]. It carries two clocks: the wall clock, which dates tokens and
//! certificates but may jump or be unset on a gateway without a battery, and a monotonic clock,
//! by which whatever is held in memory ages.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::read;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use time::OffsetDateTime;

/// A day in seconds.
pub const DAY_S: u64 = 86_400;
/// From how many days on the end of a certificate is warned of.
const WARNING_DAYS: u64 = 30;

/// One reading of both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds since 1970-01-01T00:00:00Z; 0 if the clock stands before that.
    pub unix_ms: u64,
    /// Milliseconds since this process first asked for the time; never goes back.
    pub mono_ms: u64,
}

/// Reads both clocks.
pub fn now() -> Now {
    static START: OnceLock<Instant> = OnceLock::new();
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { unix_ms: millis(unix), mono_ms: millis(START.get_or_init(Instant::now).elapsed()) }
}

/// Microseconds on the machine's own monotonic clock, for others on this machine who read it too.
pub fn machine_us() -> u64 {
    let at = clock_gettime(ClockId::Monotonic);
    let parts = (u64::try_from(at.tv_sec), u64::try_from(at.tv_nsec));
    parts.0.unwrap_or(0) * 1_000_000 + parts.1.unwrap_or(0) / 1_000
}

impl Now {
    /// Whole seconds since 1970, as JWTs and certificates count them.
    pub fn unix_s(&self) -> u64 {
        self.unix_ms / 1000
    }

    /// `ends in 3 days, at 2025-…`, if this second since 1970 is less than 30 days ahead; nothing if
    /// it is later or past.
    pub fn ends_soon(&self, end_s: u64) -> Option<String> {
        let left = end_s.checked_sub(self.unix_s()).filter(|left| *left < WARNING_DAYS * DAY_S)?;
        let (days, end) = (left / DAY_S, rfc3339(end_s.saturating_mul(1000)));
        let days = if days == 1 { "1 day".to_owned() } else { format!("{days} days") };
        Some(format!("ends in {days}, at {end}"))
    }

    /// A clock that shows a time before this program was built has not been set.
    pub fn is_plausible(&self) -> bool {
        self.unix_s() >= build_date()
    }
}

/// How long after its start the program looks at the clock every second. That is when a clock is set;
/// and whoever fakes one, or forbids timers, is noticed then.
const WATCHED_MS: u64 = 3_600_000;
/// How often.
const WATCH: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// Tells when the wall clock was set.
#[derive(Debug)]
pub struct Steps {
    /// Never goes off by itself: the kernel ends it when the clock is set (timerfd_create(2)).
    timer: Option<OwnedFd>,
}

impl Steps {
    /// Those that are still to come.
    pub fn from_now() -> Self {
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        let never = Timespec { tv_sec: i64::MAX / 2_000_000_000, tv_nsec: 0 };
        let at = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
        let kind = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Realtime, kind)
            .and_then(|timer| timerfd_settime(&timer, flags, &at).map(|_| timer));
        Steps { timer: timer.ok() }
    }

    /// Sleeps until the clock was set, or may have been. `closely`: it is wrong, so it will be.
    pub fn wait(&self, closely: bool) {
        let closely = closely || self.timer.is_none() || now().mono_ms < WATCHED_MS;
        let timer = self.timer.as_ref().map(|timer| PollFd::new(timer, PollFlags::IN));
        let mut waits: Vec<PollFd<'_>> = timer.into_iter().collect();
        // A signal may end it early, which does no harm.
        let _ = poll(&mut waits, closely.then_some(&WATCH));
        // What is read is that the clock was set; without that the next look would not wait.
        let _ = self.timer.as_ref().map(|timer| read(timer, &mut [0; 8]));
    }
}

/// Since when the wall clock goes as the monotonic one does.
#[derive(Clone, Copy, Debug)]
pub struct Steady {
    since_ms: u64,
    /// What the wall clock shows when the monotonic one shows nothing.
    base_ms: u64,
    /// Smaller steps than this are what keeping a clock right takes.
    step_ms: u64,
}

impl Steady {
    /// From now on, but for smaller steps than this.
    pub fn from(now: Now, step_ms: u64) -> Self {
        Steady { since_ms: now.mono_ms, base_ms: now.unix_ms.saturating_sub(now.mono_ms), step_ms }
    }

    /// Whether it has for a day. By a clock that was set wrong meanwhile what still matters would be
    /// forgotten. A step that is taken back before anybody looks is not seen.
    pub fn for_a_day(&mut self, now: Now) -> bool {
        let seen = Steady::from(now, self.step_ms);
        let is_step = seen.base_ms.abs_diff(self.base_ms) > self.step_ms;
        let since_ms = if is_step { now.mono_ms } else { self.since_ms };
        *self = Steady { since_ms, ..seen };
        now.mono_ms.saturating_sub(since_ms) >= DAY_S * 1000
    }
}

/// When this program was built, in seconds since 1970 (`SOURCE_DATE_EPOCH` if that was set).
pub fn build_date() -> u64 {
    // The build script always writes digits; were it ever not to, every clock would be plausible.
    env!("BUILD_DATE").parse().unwrap_or(0)
}

/// A second since 1970 as a date; the end of the year 9999 at most.
pub fn utc(unix_s: u64) -> OffsetDateTime {
    const LAST_S: i64 = 253_402_300_799;
    let second = i64::try_from(unix_s).unwrap_or(LAST_S).min(LAST_S);
    OffsetDateTime::from_unix_timestamp(second).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// `2025-11-27T10:00:00.000Z` (RFC 3339, UTC, milliseconds); the end of the year 9999 at most.
pub fn rfc3339(unix_ms: u64) -> String {
    let at = utc(unix_ms / 1000);
    // By hand, as it stands in every answer and every line of the log.
    let mut text = String::with_capacity(24);
    let mut put = |number: u32, mut unit: u32, end: char| {
        while unit > 0 {
            text.push(char::from(b'0' + (number / unit % 10) as u8));
            unit /= 10;
        }
        text.push(end);
    };
    put(at.year().unsigned_abs(), 1000, '-');
    put(u8::from(at.month()).into(), 10, '-');
    put(at.day().into(), 10, 'T');
    put(at.hour().into(), 10, ':');
    put(at.minute().into(), 10, ':');
    put(at.second().into(), 10, '.');
    put((unix_ms % 1000) as u32, 100, 'Z');
    text
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc3339_has_milliseconds_and_z() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(1_764_237_600_007), "2025-11-27T10:00:00.007Z");
        assert!(rfc3339(u64::MAX).starts_with("9999-12-31T23:59:59."));
    }

    #[test]
    fn a_clock_before_the_build_is_not_plausible() {
        let at = |s: u64| Now { unix_ms: s * 1000, mono_ms: 0 };
        assert!(!at(0).is_plausible());
        assert!(!at(build_date() - 1).is_plausible());
        assert!(at(build_date()).is_plausible());
        assert!(now().is_plausible());
    }

    #[test]
    fn a_step_is_waited_for() {
        let steps = Steps::from_now();
        let timer = steps.timer.as_ref().unwrap();
        let mut waits = [PollFd::new(timer, PollFlags::IN)];
        let soon = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        assert_eq!(poll(&mut waits, Some(&soon)), Ok(0), "it does not go off by itself");
        let begin = now().mono_ms;
        steps.wait(true);
        assert!((400..5000).contains(&(now().mono_ms - begin)));
    }
}
