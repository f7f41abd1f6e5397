//! What was recorded here and other instances have not been told of yet.
//!
//! Whoever tells them looks at the first few, tells, and confirms them; what is recorded meanwhile
//! comes behind. So nothing passes for told that was not, and what could not be told stays. The list
//! is bounded: where it overflows, whoever tells compares the whole record instead.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Mutex, OnceLock};

use super::Record;
use super::merge::Shared;
use crate::locks::locked;
use crate::serial::Serial;

/// The most that the list holds: one serial number takes 21 bytes.
const MOST: usize = 20_000;
/// So many certificates, of some 700 bytes each, wait for whoever tells of them at once and would
/// have to read them from the disk again.
const FRESH: usize = 256;

/// Something that other instances have to be told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untold {
    Certificate(Serial),
    /// A certificate was revoked, or revoked earlier than was known.
    Revocation(Serial),
}

#[derive(Default)]
pub(super) struct News {
    list: Mutex<List>,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct List {
    untold: VecDeque<Untold>,
    overflowed: bool,
    fresh: BTreeMap<Serial, Shared>,
}

impl fmt::Debug for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "News({})", locked(&self.list).untold.len())
    }
}

impl News {
    pub(super) fn add(&self, news: impl IntoIterator<Item = Untold>) {
        let mut list = locked(&self.list);
        let before = list.untold.len();
        for untold in news {
            if list.untold.len() < MOST {
                list.untold.push_back(untold);
            } else {
                list.overflowed = true;
            }
        }
        let is_news = list.untold.len() > before || list.overflowed;
        drop(list);
        if let Some(wake) = self.wake.get().filter(|_| is_news) {
            wake();
        }
    }

    /// Keeps what was signed just now, if there is anybody who tells.
    pub(super) fn keep(&self, signed: impl Iterator<Item = Shared>) {
        if self.wake.get().is_some() {
            let mut list = locked(&self.list);
            let room = FRESH.saturating_sub(list.fresh.len());
            list.fresh.extend(signed.take(room).map(|signed| (signed.serial, signed)));
        }
    }

    pub(super) fn take_fresh(&self, serial: &Serial) -> Option<Shared> {
        locked(&self.list).fresh.remove(serial)
    }
}

impl Record {
    /// The first of what is to be told, at most so many, in the order in which it was recorded. After
    /// a start that is what was recorded in the last day.
    pub fn untold(&self, most: usize) -> Vec<Untold> {
        locked(&self.news.list).untold.iter().take(most).copied().collect()
    }

    /// The first so many of them were told.
    pub fn told(&self, count: usize) {
        let mut list = locked(&self.news.list);
        let count = count.min(list.untold.len());
        list.untold.drain(..count);
    }

    /// Returns once whether something is missing in the list, because it was full: then the whole record
    /// has to be compared.
    pub fn news_overflowed(&self) -> bool {
        std::mem::take(&mut locked(&self.news.list).overflowed)
    }

    /// Has `wake` called whenever there is something to tell. It is called by whoever records, so it
    /// must not wait. Only the first one counts.
    pub fn on_news(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.news.wake.set(Box::new(wake));
    }
}
