//! For how long the record keeps what has ended.
//!
//! What is forgotten does not come back, and by a clock that is ahead what is valid would have ended
//! long ago. So nothing is forgotten within a day of a start or of a step of the clock, nor by a clock
//! that others do not agree with.

use std::sync::Mutex;

use crate::clock::{DAY_S, Now, Steady};
use crate::locks::locked;

/// Smaller steps than this are what keeping a clock right takes.
const STEP_MS: u64 = 60_000;

/// For how long what has ended is kept, and whether the clock may be believed.
pub struct Retention {
    /// For good if there is no number.
    keep_s: Option<u64>,
    /// Others do not agree with our clock.
    is_disputed: Box<dyn Fn() -> bool + Send + Sync>,
    steady: Mutex<Steady>,
}

impl Retention {
    /// Keeps what has ended for so many days, or for good if that is 0. `is_disputed` says whether
    /// others do not agree with our clock.
    pub fn new(
        days: u32,
        is_disputed: impl Fn() -> bool + Send + Sync + 'static,
        now: Now,
    ) -> Self {
        let keep_s = (days > 0).then_some(u64::from(days) * DAY_S);
        let steady = Mutex::new(Steady::from(now, STEP_MS));
        Retention { keep_s, is_disputed: Box::new(is_disputed), steady }
    }

    /// What ended before this second is to be forgotten, and does not come in again. Nothing (0) as
    /// long as the clock is not believed.
    pub fn ended_before(&self, now: Now) -> u64 {
        let keep_s = self.keep_s.filter(|_| self.is_steady(now) && !(self.is_disputed)());
        keep_s.map_or(0, |keep_s| now.unix_s().saturating_sub(keep_s))
    }

    /// Whether the clock was not set of late. To be called whenever it may have been.
    pub fn is_steady(&self, now: Now) -> bool {
        locked(&self.steady).for_a_day(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn only_a_steady_clock_that_nobody_disputes_forgets() {
        const BEGIN_MS: u64 = 1_800_000_000_000;
        let hours = |hours: u64, ahead_ms: u64| {
            let mono_ms = hours * 3_600_000;
            Now { unix_ms: BEGIN_MS + mono_ms + ahead_ms, mono_ms }
        };
        let limit = |now: Now| now.unix_s() - 90 * DAY_S;
        let disputed = Arc::new(AtomicBool::new(false));
        let is_disputed = Arc::clone(&disputed);
        let asked = move || is_disputed.load(Ordering::SeqCst);
        let retention = Retention::new(90, asked, hours(0, 0));
        assert_eq!(retention.ended_before(hours(23, 0)), 0, "within a day of the start");
        assert_eq!(retention.ended_before(hours(24, 0)), limit(hours(24, 0)));
        disputed.store(true, Ordering::SeqCst);
        assert_eq!(retention.ended_before(hours(24, 0)), 0, "others see another time");
        disputed.store(false, Ordering::SeqCst);
        assert_ne!(retention.ended_before(hours(25, STEP_MS)), 0, "the clock was put right");
        let year_ms = 365 * DAY_S * 1000;
        for (at, ahead_ms) in [(26, year_ms), (50, 0)] {
            assert_eq!(retention.ended_before(hours(at, ahead_ms)), 0, "the clock was set");
            assert_eq!(retention.ended_before(hours(at + 23, ahead_ms)), 0);
        }
        assert_eq!(retention.ended_before(hours(74, 0)), limit(hours(74, 0)));
        let forever = Retention::new(0, || false, hours(0, 0));
        assert_eq!(forever.ended_before(hours(99, 0)), 0);
    }
}
