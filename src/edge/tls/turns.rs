//! A queue that serves subscribers in turn.
//!
//! Those without a recent turn go first, and of these the latest arrival: a crowd that asks again and
//! again delays no newcomer, and where more want a turn than can have one, a client that still waits
//! is served.

use std::collections::HashMap;

use crate::subscriber::Subscriber;

/// So many newcomers go before one of the others, so that an attacker with an address for every
/// connection cannot shut out those who are known.
const NEWCOMERS_FIRST: u64 = 4;
/// A subscriber is no newcomer for so many turns after its own.
const KNOWN: u64 = 1024;

/// What waits. Finding whose turn it is takes a look at all of it, which is little beside a signature.
pub struct Turns<T> {
    /// In the order in which it came.
    waiting: Vec<(Subscriber, T)>,
    turns: u64,
    /// Which turn was the latest of a subscriber.
    latest: HashMap<Subscriber, u64>,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Turns { waiting: Vec::new(), turns: 0, latest: HashMap::new() }
    }
}

impl<T> Turns<T> {
    pub fn push(&mut self, subscriber: Subscriber, item: T) {
        self.waiting.push((subscriber, item));
    }

    /// Takes what is next: of newcomers the latest, of others the one whose last turn is longest ago.
    pub fn pop(&mut self) -> Option<T> {
        let is_recent = |turn: &u64| *turn + KNOWN > self.turns;
        let turn = |(who, _): &(Subscriber, T)| self.latest.get(who).copied().filter(is_recent);
        let newcomer = self.waiting.iter().rposition(|waiting| turn(waiting).is_none());
        let known = self.waiting.iter().enumerate();
        let known = known.filter_map(|(at, waiting)| Some((turn(waiting)?, at))).min();
        let known = known.map(|(_, at)| at);
        let at = match self.turns % (NEWCOMERS_FIRST + 1) {
            NEWCOMERS_FIRST => known.or(newcomer),
            _ => newcomer.or(known),
        };
        let (subscriber, item) = self.waiting.remove(at?);
        self.turns += 1;
        self.latest.insert(subscriber, self.turns);
        if self.latest.len() as u64 > 2 * KNOWN {
            self.latest.retain(|_, turn| *turn + KNOWN > self.turns);
        }
        Some(item)
    }

    pub fn remove(&mut self, is_it: impl Fn(&T) -> bool) {
        self.waiting.retain(|(_, item)| !is_it(item));
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn address(n: u8) -> Subscriber {
        IpAddr::from([192, 0, 2, n]).into()
    }

    fn all(turns: &mut Turns<u32>) -> Vec<u32> {
        std::iter::from_fn(|| turns.pop()).collect()
    }

    #[test]
    fn a_crowd_at_one_address_delays_no_other() {
        let mut turns = Turns::default();
        for n in 0..100 {
            turns.push(address(1), n);
        }
        assert_eq!(turns.pop(), Some(99));
        turns.push(address(2), 1000);
        turns.push(address(2), 1001);
        turns.push(address(3), 2000);
        let got: Vec<_> = (0..6).filter_map(|_| turns.pop()).collect();
        assert_eq!(got, [2000, 1001, 0, 1000, 1, 2]);
    }

    /// Who comes back at once has not become a newcomer; who comes back later has.
    #[test]
    fn newcomers_go_before_many_that_ask_again_and_again() {
        let mut turns = Turns::default();
        for n in 0..50 {
            turns.push(address(n), u32::from(n));
        }
        let mut last = Vec::new();
        for _ in 0..200 {
            let n = turns.pop().unwrap();
            turns.push(address(n as u8), n);
            last.push(n);
        }
        last[150..].sort();
        assert_eq!(last[150..], (0..50).collect::<Vec<_>>(), "in turn");
        turns.push(address(200), 200);
        assert_eq!(turns.pop(), Some(200));
        all(&mut turns);
        for _ in 0..KNOWN {
            turns.push(address(1), 1);
            turns.push(address(2), 2);
            turns.remove(|n| *n == 2);
            turns.pop();
        }
        turns.push(address(2), 2);
        turns.push(address(1), 1);
        assert_eq!(turns.pop(), Some(2));
    }

    #[test]
    fn ever_new_addresses_shut_out_nobody_who_is_known() {
        let mut turns = Turns::default();
        turns.push(address(0), 0);
        assert_eq!(turns.pop(), Some(0));
        turns.push(address(0), 1);
        for n in 1..200 {
            turns.push(address(n), 1000);
        }
        let before = (0..200).position(|_| turns.pop() == Some(1)).unwrap();
        assert!(before as u64 <= NEWCOMERS_FIRST, "{before}");
        for n in 0..10_000_u32 {
            turns.push(IpAddr::from(n.to_be_bytes()).into(), n);
            turns.pop().unwrap();
        }
        assert_eq!(all(&mut turns).len(), 199 - before);
        assert!(turns.latest.len() as u64 <= 2 * KNOWN);
    }

    #[test]
    fn what_is_removed_is_not_taken() {
        let mut turns = Turns::default();
        for n in 0..4 {
            turns.push(address(n as u8 % 2), n);
        }
        turns.remove(|n| *n == 2);
        assert_eq!(all(&mut turns), [3, 0, 1]);
    }
}
