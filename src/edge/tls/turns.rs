//! What waits, taken by client address in turn.
//!
//! An address that has had no turn lately goes first, and of several such the latest: a crowd of
//! those who ask again and again delays a newcomer by nothing, and where more want a turn than can
//! have one, those get it who have not given up yet.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;

/// So many newcomers go before one of the others, so that an attacker with an address for every
/// connection cannot shut out addresses that are known.
const NEWCOMERS_FIRST: usize = 4;
/// For how long an address that has had a turn is no newcomer.
const KNOWN_MS: u64 = 10_000;
/// How many such addresses are remembered.
const KNOWN_MAX: usize = 1024;

/// What waits, by address.
pub struct Turns<T> {
    /// None of these is empty.
    lines: HashMap<IpAddr, VecDeque<T>>,
    /// Addresses with a line: those that have had no turn lately, the latest last.
    newcomers: Vec<IpAddr>,
    /// And the others, in the order of their turns.
    others: VecDeque<IpAddr>,
    known: Known,
    /// How many newcomers were taken since the last of the others.
    in_a_row: usize,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Turns {
            lines: HashMap::new(),
            newcomers: Vec::new(),
            others: VecDeque::new(),
            known: Known::default(),
            in_a_row: 0,
        }
    }
}

impl<T> Turns<T> {
    /// Adds what waits for a turn of this address.
    pub fn push(&mut self, address: IpAddr, item: T, now_ms: u64) {
        self.known.forget(now_ms);
        let line = self.lines.entry(address).or_insert_with(|| {
            if self.known.addresses.contains(&address) {
                self.others.push_back(address);
            } else {
                self.newcomers.push(address);
            }
            VecDeque::new()
        });
        line.push_back(item);
    }

    /// Takes what is next.
    pub fn pop(&mut self, now_ms: u64) -> Option<T> {
        let address = self.next_address()?;
        let line = self.lines.get_mut(&address)?;
        let item = line.pop_front();
        if line.is_empty() {
            self.lines.remove(&address);
        } else {
            self.others.push_back(address);
        }
        self.known.add(address, now_ms);
        item
    }

    fn next_address(&mut self) -> Option<IpAddr> {
        let their_turn = self.in_a_row >= NEWCOMERS_FIRST && !self.others.is_empty();
        match self.newcomers.pop_if(|_| !their_turn) {
            Some(newcomer) => {
                self.in_a_row += 1;
                Some(newcomer)
            }
            None => {
                self.in_a_row = 0;
                self.others.pop_front()
            }
        }
    }

    /// Forgets what waits, where `is_it`.
    pub fn remove(&mut self, address: IpAddr, is_it: impl Fn(&T) -> bool) {
        let Some(line) = self.lines.get_mut(&address) else { return };
        line.retain(|item| !is_it(item));
        if line.is_empty() {
            self.lines.remove(&address);
            self.newcomers.retain(|other| *other != address);
            self.others.retain(|other| *other != address);
        }
    }
}

/// The addresses that have had a turn lately.
#[derive(Default)]
struct Known {
    addresses: HashSet<IpAddr>,
    /// The same with the time until which they are known, the next to be forgotten first.
    until_ms: VecDeque<(u64, IpAddr)>,
}

impl Known {
    fn add(&mut self, address: IpAddr, now_ms: u64) {
        if self.addresses.insert(address) {
            self.until_ms.push_back((now_ms.saturating_add(KNOWN_MS), address));
        }
    }

    fn forget(&mut self, now_ms: u64) {
        while let Some((until_ms, address)) = self.until_ms.front()
            && (*until_ms <= now_ms || self.until_ms.len() > KNOWN_MAX)
        {
            self.addresses.remove(address);
            self.until_ms.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, n])
    }

    fn all(turns: &mut Turns<u32>) -> Vec<u32> {
        std::iter::from_fn(|| turns.pop(0)).collect()
    }

    #[test]
    fn a_crowd_at_one_address_delays_no_other() {
        let mut turns = Turns::default();
        for n in 0..100 {
            turns.push(address(1), n, 0);
        }
        assert_eq!(turns.pop(0), Some(0));
        turns.push(address(2), 1000, 0);
        turns.push(address(2), 1001, 0);
        turns.push(address(3), 2000, 0);
        let got: Vec<_> = (0..6).filter_map(|_| turns.pop(0)).collect();
        assert_eq!(got, [2000, 1000, 1, 1001, 2, 3]);
    }

    /// Who comes back at once has not become a newcomer; who comes back later has.
    #[test]
    fn newcomers_go_before_many_that_ask_again_and_again() {
        let mut turns = Turns::default();
        for n in 0..50 {
            turns.push(address(n), u32::from(n), 0);
        }
        let mut last = Vec::new();
        for _ in 0..200 {
            let n = turns.pop(0).unwrap();
            turns.push(address(n as u8), n, 0);
            last.push(n);
        }
        last[150..].sort();
        assert_eq!(last[150..], (0..50).collect::<Vec<_>>(), "in turn");
        turns.push(address(200), 200, 0);
        assert_eq!(turns.pop(0), Some(200));
        all(&mut turns);
        turns.push(address(1), 1, KNOWN_MS - 1);
        turns.push(address(2), 2, KNOWN_MS);
        assert_eq!(turns.pop(KNOWN_MS), Some(2));
    }

    #[test]
    fn ever_new_addresses_shut_out_nobody_who_is_known() {
        let mut turns = Turns::default();
        turns.push(address(0), 0, 0);
        assert_eq!(turns.pop(0), Some(0));
        turns.push(address(0), 1, 0);
        for n in 1..200 {
            turns.push(address(n), 1000, 0);
        }
        let before = (0..200).position(|_| turns.pop(0) == Some(1)).unwrap();
        assert!(before <= NEWCOMERS_FIRST, "{before}");
        for n in 0..10_000_u32 {
            turns.push(IpAddr::from(n.to_be_bytes()), n, 0);
            turns.pop(0).unwrap();
        }
        assert_eq!(all(&mut turns).len(), 199 - before);
        assert!(turns.known.addresses.len() <= KNOWN_MAX + 200);
        assert_eq!(turns.known.addresses.len(), turns.known.until_ms.len());
    }

    #[test]
    fn what_is_removed_is_not_taken() {
        let mut turns = Turns::default();
        for n in 0..4 {
            turns.push(address(n as u8 % 2), n, 0);
        }
        turns.remove(address(0), |n| *n == 2);
        turns.remove(address(7), |_| true);
        for _ in 0..100 {
            turns.push(address(9), 9, 0);
            turns.remove(address(9), |n| *n == 9);
        }
        assert_eq!(turns.newcomers.len(), 2, "nothing is left of it");
        assert_eq!(all(&mut turns), [1, 0, 3]);
    }
}
