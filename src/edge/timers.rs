//! Deadlines: when each connection is late, and with what.
//!
//! A deadline starts several times a request and passes seldom. So starting one is a write, and all are
//! looked at only when the earliest that was started may have passed.

use super::settings::{Deadlines, Wait};

pub struct Timers {
    due: Vec<Option<(u64, Wait)>>,
    /// No connection is late before this.
    next_ms: u64,
    lengths: Deadlines,
}

impl Timers {
    /// Deadlines of these lengths for the connections 0 to `size` - 1.
    pub fn new(size: usize, lengths: Deadlines) -> Self {
        Timers { due: vec![None; size], next_ms: u64::MAX, lengths }
    }

    /// Starts a deadline, in the place of the one that runs.
    pub fn start(&mut self, at: usize, wait: Wait, now_ms: u64) {
        let due_ms = now_ms.saturating_add(self.lengths.length_ms(wait));
        if let Some(due) = self.due.get_mut(at) {
            *due = Some((due_ms, wait));
            self.next_ms = self.next_ms.min(due_ms);
        }
    }

    pub fn remove(&mut self, at: usize) {
        if let Some(due) = self.due.get_mut(at) {
            *due = None;
        }
    }

    /// When a deadline may have passed.
    pub fn next_due(&self) -> Option<u64> {
        (self.next_ms < u64::MAX).then_some(self.next_ms)
    }

    /// The connections that are past their deadline. Each is to be given another, or none.
    pub fn expired(&mut self, now_ms: u64) -> Vec<usize> {
        if now_ms < self.next_ms {
            return Vec::new();
        }
        let later = self.due.iter().flatten().map(|(due, _)| *due).filter(|due| *due > now_ms);
        self.next_ms = later.min().unwrap_or(u64::MAX);
        (0..self.due.len()).filter(|at| self.late(*at, now_ms).is_some()).collect()
    }

    /// What the connection is late with.
    pub fn late(&self, at: usize, now_ms: u64) -> Option<Wait> {
        let (due, wait) = (*self.due.get(at)?)?;
        (due <= now_ms).then_some(wait)
    }

    /// The connection whose deadline of this kind is due first: it has been waited for longest.
    pub fn longest(&self, wait: Wait) -> Option<usize> {
        self.all(wait).min().map(|(_, at)| at)
    }

    /// When the connections are late that are waited for in this.
    pub fn all(&self, wait: Wait) -> impl Iterator<Item = (u64, usize)> + '_ {
        let due = self.due.iter().enumerate();
        due.filter_map(move |(at, due)| due.filter(|(_, of)| *of == wait).map(|(due, _)| (due, at)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Http;
    use crate::edge::settings::Settings;

    #[test]
    fn who_is_due_first_is_known() {
        let mut deadlines = Settings::new(Http::from_lookup(|_| None).unwrap()).deadlines;
        deadlines.set(Wait::Head, Duration::from_millis(10));
        deadlines.set(Wait::KeepAlive, Duration::from_millis(100));
        let mut timers = Timers::new(3, deadlines);
        assert_eq!(timers.next_due(), None);
        timers.start(0, Wait::Head, 0);
        timers.start(1, Wait::KeepAlive, 0);
        timers.start(99, Wait::Head, 0);
        assert_eq!(timers.next_due(), Some(10));
        assert_eq!(timers.expired(9), [0; 0]);
        assert_eq!(timers.expired(10), [0]);
        assert_eq!((timers.late(0, 10), timers.late(1, 10)), (Some(Wait::Head), None));
        timers.start(0, Wait::KeepAlive, 10);
        timers.start(2, Wait::KeepAlive, 5);
        assert_eq!(timers.longest(Wait::KeepAlive), Some(1));
        assert_eq!((timers.all(Wait::KeepAlive).count(), timers.all(Wait::Head).count()), (3, 0));
        assert_eq!(timers.expired(99), [0; 0]);
        assert_eq!(timers.expired(105), [1, 2]);
        timers.remove(1);
        assert_eq!((timers.late(1, 105), timers.next_due()), (None, Some(110)));
        assert_eq!(timers.longest(Wait::KeepAlive), Some(2));
    }
}
