//! Messages from other threads to the edge. A sender wakes the edge only if it sleeps, so under load
//! no system call is made for a message.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::poll::Waker;
use crate::locks::locked;

/// Bytes of replies that may wait here. A sender that has more blocks: without this bound a worker could
/// make large replies faster than the edge can count them.
const BYTES_MAX: usize = 256 * 1024;

pub struct Inbox<T>(Arc<InboxState<T>>);

pub struct Sender<T>(Arc<InboxState<T>>);

struct InboxState<T> {
    state: Mutex<Waiting<T>>,
    /// There is room again, or the edge is gone.
    changed: Condvar,
    asleep: AtomicBool,
    waker: Waker,
}

struct Waiting<T> {
    mail: Vec<T>,
    bytes: usize,
    /// Senders that wait for room: to wake them costs a system call, even if there are none.
    blocked: usize,
    closed: bool,
}

impl<T> Inbox<T> {
    /// An empty one; `waker` ends the edge's sleep.
    pub fn new(waker: Waker) -> Self {
        Inbox(Arc::new(InboxState {
            state: Mutex::new(Waiting { mail: Vec::new(), bytes: 0, blocked: 0, closed: false }),
            changed: Condvar::new(),
            asleep: AtomicBool::new(false),
            waker,
        }))
    }

    pub fn sender(&self) -> Sender<T> {
        Sender(Arc::clone(&self.0))
    }

    /// Returns whether the edge may sleep: the inbox is empty, and the next message will wake the edge.
    pub fn may_sleep(&self) -> bool {
        // Set before the inbox is looked at, so that a message sent after the look wakes the edge.
        self.0.asleep.store(true, Ordering::SeqCst);
        locked(&self.0.state).mail.is_empty()
    }

    pub fn awake(&self) {
        self.0.asleep.store(false, Ordering::SeqCst);
    }

    pub fn take(&self) -> Vec<T> {
        let mut state = locked(&self.0.state);
        state.bytes = 0;
        if state.blocked > 0 {
            self.0.changed.notify_all();
        }
        std::mem::take(&mut state.mail)
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        locked(&self.0.state).closed = true;
        self.0.changed.notify_all();
    }
}

impl<T> Sender<T> {
    /// Tells the edge. `bytes` is the memory that the messages take; while more than `BYTES_MAX` waits
    /// for the edge, a sender with bytes waits here.
    pub fn send(&self, mail: impl IntoIterator<Item = T>, bytes: usize) {
        let mut state = locked(&self.0.state);
        while bytes > 0 && state.bytes > BYTES_MAX && !state.closed {
            state.blocked += 1;
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.blocked -= 1;
        }
        state.bytes += bytes;
        state.mail.extend(mail);
        drop(state);
        if self.0.asleep.swap(false, Ordering::SeqCst) {
            self.0.waker.wake();
        }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender(Arc::clone(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::edge::poll::Poll;

    #[test]
    fn nothing_is_overslept() {
        let mut poll = Poll::new().unwrap();
        let inbox = Inbox::new(poll.waker());
        let senders: Vec<_> = (0..2_u64)
            .map(|who| {
                let sender = inbox.sender();
                thread::spawn(move || (0..20_000).for_each(|n| sender.send([(who, n)], 1)))
            })
            .collect();
        let mut next = [0, 0];
        while next != [20_000, 20_000] {
            if inbox.may_sleep() {
                poll.wait(None).unwrap();
            }
            inbox.awake();
            for (who, n) in inbox.take() {
                assert_eq!(next[who as usize], n, "in order");
                next[who as usize] += 1;
            }
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    }

    #[test]
    fn who_has_too_much_to_tell_waits_until_it_is_taken_or_nobody_is_there() {
        let poll = Poll::new().unwrap();
        let inbox = Inbox::new(poll.waker());
        let sender = inbox.sender();
        sender.send([1], BYTES_MAX + 1);
        sender.send([2], 0);
        let waiting = thread::spawn(move || {
            sender.send([3], 1);
            sender.send([4], BYTES_MAX);
            sender.send([5], BYTES_MAX);
            sender.send([6], 1);
        });
        let mut got = inbox.take();
        assert_eq!(got, [1, 2]);
        while got.len() < 4 {
            got.extend(inbox.take());
            thread::yield_now();
        }
        drop(inbox);
        waiting.join().unwrap();
    }
}
