//! Which refusals have a line in the log of their own, and which are summed up.
//!
//! Anyone can have requests refused, 30,000 a second, and a line for each would be 4.5 MB a second for
//! whoever keeps the log. So each code has lines for a burst, and from then on for a few a second; the
//! others are counted, and their number is said. The metrics count all of them.

use std::sync::Mutex;

use log::Level;

use crate::clock::Now;
use crate::locks::locked;
use crate::problem::Code;

/// Lines that a code may have at once, and how many a second come back.
const BURST: u64 = 100;
const PER_SECOND: u64 = 10;
/// How long lines are left out until their number is said.
const SUMMED_MS: u64 = 10_000;

/// The lines of all codes.
pub struct Refusals(Mutex<Vec<Kind>>);

/// The lines of one code.
#[derive(Clone, Copy)]
struct Kind {
    /// Lines that it may have, in thousandths.
    allowed: u64,
    at_ms: u64,
    left_out: u64,
    /// When the first of these was left out, and how important the last was.
    since_ms: u64,
    level: Level,
}

/// Lines that were left out.
#[derive(Debug, PartialEq, Eq)]
pub struct Sum {
    pub code: Code,
    pub count: u64,
    pub seconds: u64,
    pub level: Level,
}

impl Refusals {
    pub fn new() -> Self {
        let unused =
            Kind { allowed: BURST * 1000, at_ms: 0, left_out: 0, since_ms: 0, level: Level::Info };
        Refusals(Mutex::new(vec![unused; Code::ALL.len()]))
    }

    /// Whether this refusal has a line of its own.
    pub fn is_shown(&self, code: Code, level: Level, now: Now) -> bool {
        let mut kinds = locked(&self.0);
        let Some(kind) = kinds.get_mut(code as usize) else { return true };
        let returned = now.mono_ms.saturating_sub(kind.at_ms).saturating_mul(PER_SECOND);
        kind.allowed = kind.allowed.saturating_add(returned).min(BURST * 1000);
        kind.at_ms = now.mono_ms;
        if let Some(rest) = kind.allowed.checked_sub(1000) {
            kind.allowed = rest;
            return true;
        }
        if kind.left_out == 0 {
            kind.since_ms = now.mono_ms;
        }
        kind.left_out += 1;
        kind.level = level;
        false
    }

    /// What is to be said now of what was left out; nearly always nothing.
    pub fn sums(&self, now: Now) -> Vec<Sum> {
        self.take(|kind| kind.since_ms + SUMMED_MS <= now.mono_ms, now)
    }

    /// What is still to be said, at the end.
    pub fn rest(&self, now: Now) -> Vec<Sum> {
        self.take(|_| true, now)
    }

    fn take(&self, is_due: impl Fn(&Kind) -> bool, now: Now) -> Vec<Sum> {
        let mut kinds = locked(&self.0);
        let left_out = kinds.iter_mut().zip(Code::ALL).filter(|(kind, _)| kind.left_out > 0);
        let sum = |(kind, code): (&mut Kind, &Code)| Sum {
            code: *code,
            count: std::mem::take(&mut kind.left_out),
            seconds: now.mono_ms.saturating_sub(kind.since_ms).div_ceil(1000),
            level: kind.level,
        };
        left_out.filter(|(kind, _)| is_due(kind)).map(sum).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now { unix_ms: 0, mono_ms: ms }
    }

    #[test]
    fn a_burst_has_its_lines_and_the_rest_a_number() {
        let refusals = Refusals::new();
        let ask = |code, ms| refusals.is_shown(code, Level::Info, at(ms));
        let shown = (0..1000).filter(|_| ask(Code::TokenExpired, 5_000)).count();
        assert_eq!(shown as u64, BURST);
        assert!(ask(Code::RateLimited, 5_000), "each code has its own");
        let shown = (0..1000).filter(|n| ask(Code::TokenExpired, 5_000 + n)).count();
        assert_eq!(shown as u64, PER_SECOND - 1, "the last ms is not over");
        assert_eq!(refusals.sums(at(14_999)), []);
        let sum =
            |count, seconds| Sum { code: Code::TokenExpired, count, seconds, level: Level::Info };
        assert_eq!(refusals.sums(at(15_000)), [sum(1900 - PER_SECOND + 1, 10)]);
        assert_eq!(refusals.sums(at(60_000)), [], "it is said once");
        let shown = (0..1000).filter(|_| ask(Code::TokenExpired, 60_000)).count();
        assert_eq!(shown as u64, BURST);
        assert_eq!(refusals.rest(at(60_500)), [sum(900, 1)]);
    }

    #[test]
    fn each_number_is_said_in_its_time() {
        let refusals = Refusals::new();
        let flood = |code, ms| {
            let asked = |_: &u32| refusals.is_shown(code, Level::Warn, at(ms));
            assert_eq!((0..200).filter(asked).count(), 100);
        };
        flood(Code::TokenExpired, 0);
        flood(Code::RateLimited, 6_000);
        let codes = |ms| refusals.sums(at(ms)).iter().map(|sum| sum.code).collect::<Vec<_>>();
        assert_eq!(codes(10_000), [Code::TokenExpired]);
        assert_eq!(codes(15_999), []);
        assert_eq!(codes(16_000), [Code::RateLimited]);
    }
}
