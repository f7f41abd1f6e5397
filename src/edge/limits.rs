//! What all clients together may take: descriptors, connections per address, bytes.

pub struct Budget {
    max: usize,
    held: Held,
}

/// Bytes held, for one client or for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// All bytes, of requests and replies.
    pub all: usize,
    /// Of these, replies that are not taken yet, and what waits behind a request in work.
    pub replies: usize,
}

/// A client that holds at most this, most heads for instance, is refused for what others hold only
/// when the whole budget is taken.
const SMALL: usize = 4 * 1024;

impl Budget {
    pub fn new(max: usize) -> Self {
        Budget { max, held: Held::default() }
    }

    /// Replaces what one client held by what it holds now.
    pub fn change(&mut self, before: Held, after: Held) {
        let change = |held: usize, before, after| held.saturating_sub(before).saturating_add(after);
        self.held.all = change(self.held.all, before.all, after.all);
        self.held.replies = change(self.held.replies, before.replies, after.replies);
    }

    pub fn held(&self) -> usize {
        self.held.all
    }

    /// Returns whether `more` bytes, held outside this budget, would still fit.
    pub fn fits(&self, more: usize) -> bool {
        self.held.all.saturating_add(more) <= self.max
    }

    pub fn is_over(&self) -> bool {
        !self.fits(0)
    }

    /// Replies hold more than half. They are the cheapest to ask for: a client that does not
    /// read them sends a hundred bytes for each megabyte that we hold.
    pub fn replies_are_over(&self) -> bool {
        self.held.replies > self.max / 2
    }

    /// A client that holds `bytes` of a request may keep them. A quarter of the budget is out of
    /// reach of large bodies, so that a flood of them leaves room for replies and small requests.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.held.all <= if Self::is_small(bytes) { self.max } else { self.max - self.max / 4 }
    }

    pub fn is_small(bytes: usize) -> bool {
        bytes <= SMALL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_bodies_leave_room_for_small_requests() {
        let mut budget = Budget::new(1000);
        budget.change(none(), of(800, 0));
        assert!(!budget.has_room(SMALL + 1) && budget.has_room(SMALL) && !budget.is_over());
        budget.change(of(100, 0), of(400, 0));
        assert!(!budget.has_room(1) && budget.is_over());
        budget.change(of(1100, 0), none());
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn replies_have_half() {
        let mut budget = Budget::new(1000);
        budget.change(none(), of(900, 500));
        assert!(!budget.replies_are_over());
        budget.change(of(10, 0), of(10, 1));
        assert!(budget.replies_are_over() && !budget.is_over());
    }

    fn of(all: usize, replies: usize) -> Held {
        Held { all, replies }
    }

    fn none() -> Held {
        Held::default()
    }
}
