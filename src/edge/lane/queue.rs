//! What waits in a lane: bytes to be written, and requests to be answered. No socket.
//!
//! Requests are appended and written together, once per wake-up, because a wake-up of the worker costs
//! more than a system call. Answers are found by their request's number and may come in any order;
//! an answer to a request that does not wait any more has no effect.

use std::collections::VecDeque;

/// A worker that answers within this time waits for nothing.
const QUICK_MS: u64 = 1;
/// Room for requests that is kept; beyond it, memory is given back when they are written.
const KEPT: usize = 64 * 1024;

#[derive(Default)]
pub struct Queue {
    waiting: VecDeque<Waiting>,
    out: Vec<u8>,
    /// How much of `out` is written.
    written: usize,
}

/// A request that waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub number: u64,
    /// The place of the connection that it came on; `None` if the edge itself asks.
    pub at: Option<usize>,
    since_ms: u64,
}

impl Queue {
    pub fn push(&mut self, number: u64, at: Option<usize>, bytes: &[u8], now_ms: u64) {
        self.waiting.push_back(Waiting { number, at, since_ms: now_ms });
        self.out.extend_from_slice(bytes);
    }

    pub fn answered(&mut self, number: u64) -> Option<Waiting> {
        // A worker answers in order: it is the first, or one of the first.
        let place = self.waiting.iter().position(|waiting| waiting.number == number)?;
        self.waiting.remove(place)
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// When the first has waited for so long.
    pub fn due(&self, work_ms: u64) -> Option<u64> {
        Some(self.waiting.front()?.since_ms.saturating_add(work_ms))
    }

    /// Returns whether no request has waited for long.
    pub fn is_quick(&self, now_ms: u64) -> bool {
        self.waiting.front().is_none_or(|first| now_ms.saturating_sub(first.since_ms) < QUICK_MS)
    }

    pub fn unwritten(&self) -> &[u8] {
        self.out.get(self.written..).unwrap_or_default()
    }

    /// So many bytes of [`Queue::unwritten`] are written.
    pub fn advance(&mut self, n: usize) {
        self.written += n;
        if self.written == self.out.len() {
            self.written = 0;
            self.out.clear();
            self.out.shrink_to(KEPT);
        }
    }

    /// Empties it: the requests that will have no answer.
    pub fn lose(&mut self) -> VecDeque<Waiting> {
        std::mem::take(self).waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_found_in_any_order_and_once() {
        let mut queue = Queue::default();
        for number in 1..=4 {
            queue.push(number, Some(number as usize * 10), b"x", number);
        }
        let at = |waiting: Option<Waiting>| waiting.and_then(|waiting| waiting.at);
        assert_eq!(at(queue.answered(3)), Some(30));
        assert_eq!(at(queue.answered(1)), Some(10));
        assert_eq!(queue.answered(3), None);
        assert_eq!(queue.answered(99), None);
        assert_eq!((queue.len(), queue.due(100)), (2, Some(102)));
        let lost: Vec<_> = queue.lose().into_iter().map(|waiting| waiting.number).collect();
        assert_eq!(lost, [2, 4]);
        assert_eq!((queue.len(), queue.due(100), queue.answered(2)), (0, None, None));
    }

    #[test]
    fn what_is_written_is_given_back() {
        let mut queue = Queue::default();
        queue.push(1, None, &vec![b'a'; 3 * KEPT], 0);
        queue.push(2, None, b"bc", 0);
        queue.advance(3 * KEPT + 1);
        assert_eq!(queue.unwritten(), b"c");
        queue.push(3, None, b"d", 0);
        assert_eq!(queue.unwritten(), b"cd");
        queue.advance(2);
        assert!(queue.unwritten().is_empty() && queue.out.capacity() <= KEPT);
    }

    #[test]
    fn a_lane_is_quick_until_somebody_has_waited() {
        let mut queue = Queue::default();
        assert!(queue.is_quick(1000));
        queue.push(1, None, b"", 1000);
        assert!(queue.is_quick(1000 + QUICK_MS - 1) && !queue.is_quick(1000 + QUICK_MS));
        queue.answered(1);
        assert!(queue.is_quick(5000));
    }
}
