//! Deadlines without a timer per connection: one list per kind of deadline.
//!
//! All deadlines of a kind are equally long, so the connection that enters a list last is due last: each
//! list is ordered by itself, entering and leaving are a few writes, and only the fronts are looked at.
//! The front of a list is also the one that has waited longest, which is the one to give way.

use std::collections::VecDeque;

use super::settings::{Deadlines, Wait};

/// `N` ordered lists over the same connections; each connection stands in at most one.
///
/// What a connection has left stays where it stood until it comes to the front, or the list grows beyond
/// twice what there can be.
pub struct Lists<const N: usize> {
    lists: [VecDeque<Entry>; N],
    /// The entry of each connection that counts.
    latest: Vec<u64>,
    entries: u64,
}

/// A connection, and the number of the entry.
type Entry = (usize, u64);

impl<const N: usize> Lists<N> {
    /// Empty lists for the connections 0 to `size` - 1.
    pub fn new(size: usize) -> Self {
        let lists = [const { VecDeque::new() }; N];
        Lists { lists, latest: vec![0; size], entries: 0 }
    }

    /// Moves the connection to the end of `list`.
    pub fn push_back(&mut self, list: usize, at: usize) {
        self.entries += 1;
        self.note(at, self.entries);
        if let Some(list) = self.lists.get_mut(list) {
            list.push_back((at, self.entries));
            if list.len() > 2 * self.latest.len() {
                list.retain(|entry| counts(&self.latest, entry));
            }
        }
    }

    /// Takes the connection out of the list it stands in.
    pub fn remove(&mut self, at: usize) {
        self.note(at, 0);
    }

    fn note(&mut self, at: usize, entry: u64) {
        if let Some(latest) = self.latest.get_mut(at) {
            *latest = entry;
        }
        for list in &mut self.lists {
            while list.front().is_some_and(|entry| !counts(&self.latest, entry)) {
                list.pop_front();
            }
        }
    }

    /// The connection that has stood in `list` longest.
    pub fn front(&self, list: usize) -> Option<usize> {
        // What a connection has left never stands here.
        self.lists.get(list)?.front().map(|(at, _)| *at)
    }

    /// From the longest standing in `list` to the latest.
    pub fn iter(&self, list: usize) -> impl Iterator<Item = usize> + '_ {
        let entries = self.lists.get(list).into_iter().flatten();
        entries.filter(|entry| counts(&self.latest, entry)).map(|(at, _)| *at)
    }
}

fn counts(latest: &[u64], (at, entry): &Entry) -> bool {
    latest.get(*at) == Some(entry)
}

/// The deadlines of all connections.
pub struct Timers {
    lists: Lists<{ Wait::ALL.len() }>,
    due: Vec<u64>,
    lengths: Deadlines,
}

impl Timers {
    /// Deadlines of these lengths for the connections 0 to `size` - 1.
    pub fn new(size: usize, lengths: Deadlines) -> Self {
        Timers { lists: Lists::new(size), due: vec![0; size], lengths }
    }

    /// Starts a deadline, in the place of the one that runs.
    pub fn start(&mut self, at: usize, wait: Wait, now_ms: u64) {
        if let Some(due) = self.due.get_mut(at) {
            *due = now_ms.saturating_add(self.lengths.length_ms(wait));
            self.lists.push_back(wait as usize, at);
        }
    }

    /// Ends the connection's deadline.
    pub fn remove(&mut self, at: usize) {
        self.lists.remove(at);
    }

    /// The connection whose deadline of this kind is due first.
    pub fn longest(&self, wait: Wait) -> Option<usize> {
        self.lists.front(wait as usize)
    }

    /// All connections that are waited for in this.
    pub fn all(&self, wait: Wait) -> impl Iterator<Item = usize> + '_ {
        self.lists.iter(wait as usize)
    }

    /// When the next deadline is due.
    pub fn next_due(&self) -> Option<u64> {
        self.fronts().map(|(due, ..)| due).min()
    }

    /// A connection that is past its deadline.
    pub fn expired(&self, now_ms: u64) -> Option<(usize, Wait)> {
        self.fronts().find(|(due, ..)| *due <= now_ms).map(|(_, at, wait)| (at, wait))
    }

    fn fronts(&self) -> impl Iterator<Item = (u64, usize, Wait)> + '_ {
        Wait::ALL.into_iter().filter_map(|wait| {
            let at = self.longest(wait)?;
            Some((self.due.get(at).copied()?, at, wait))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Http;
    use crate::edge::settings::Settings;

    #[test]
    fn lists_keep_their_order_through_moves_and_removals() {
        let mut lists = Lists::<2>::new(5);
        for at in 0..5 {
            lists.push_back(0, at);
        }
        lists.remove(0);
        lists.remove(0);
        lists.push_back(0, 2);
        lists.push_back(1, 4);
        lists.push_back(1, 99);
        assert_eq!(lists.iter(0).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(lists.iter(1).collect::<Vec<_>>(), [4]);
        lists.remove(2);
        lists.remove(1);
        lists.remove(3);
        assert_eq!(lists.front(0), None);
        lists.push_back(0, 3);
        assert_eq!(lists.iter(0).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn who_is_due_first_is_known() {
        let mut deadlines = Settings::new(Http::from_lookup(|_| None).unwrap()).deadlines;
        deadlines.set(Wait::Head, Duration::from_millis(10));
        deadlines.set(Wait::KeepAlive, Duration::from_millis(100));
        let mut timers = Timers::new(2, deadlines);
        timers.start(0, Wait::Head, 0);
        timers.start(1, Wait::KeepAlive, 0);
        assert_eq!(timers.next_due(), Some(10));
        assert_eq!(timers.expired(9), None);
        assert_eq!(timers.expired(10), Some((0, Wait::Head)));
        timers.start(0, Wait::KeepAlive, 10);
        assert_eq!(timers.expired(99), None);
        assert_eq!(timers.expired(100), Some((1, Wait::KeepAlive)));
        timers.remove(1);
        assert_eq!(timers.next_due(), Some(110));
    }
}
