//! Readiness of sockets, level-triggered: a socket stays armed until its interest changes.
//!
//! The one module with `unsafe`: `polling` trusts its caller to take a source out of the queue
//! before closing it. [`Watched`] owns the source and does so in `Drop`; it lends the source by
//! shared reference only, so that nobody can swap it for another.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use polling::{Event, Events, PollMode, Poller};

/// What a socket waits for. Errors and a full hang-up are reported whatever it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Wake up when there is something to read.
    pub read: bool,
    /// Wake up when there is room to write.
    pub write: bool,
}

impl Interest {
    /// Reading only.
    pub const READ: Interest = Interest { read: true, write: false };
    /// Nothing.
    pub const NONE: Interest = Interest { read: false, write: false };

    fn event(self, key: usize) -> Event {
        Event::new(key, self.read, self.write)
    }
}

/// What happened to the socket with this key.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// The key given to [`Poll::watch`].
    pub key: usize,
    /// There is something to read, be it the end or an error.
    pub readable: bool,
    /// There is room to write, or an error.
    pub writable: bool,
    /// The connection is gone in both directions.
    pub broken: bool,
}

/// The queue that the edge's thread waits on.
pub struct Poll {
    poller: Arc<Poller>,
    events: Events,
}

impl Poll {
    /// A queue that reports at most `batch` sockets a wait.
    pub fn new(batch: NonZeroUsize) -> io::Result<Self> {
        Ok(Poll { poller: Arc::new(Poller::new()?), events: Events::with_capacity(batch) })
    }

    /// Puts `source` under watch until the result is dropped.
    #[allow(unsafe_code)] // See the module's head.
    pub fn watch<S>(&self, source: S, key: usize, interest: Interest) -> io::Result<Watched<S>>
    where
        S: AsFd + AsRawFd,
    {
        // SAFETY: `source` moves into a `Watched`, which takes it out of the queue before it is
        // closed and never gives it away.
        unsafe {
            self.poller.add_with_mode(&source, interest.event(key), PollMode::Level)?;
        }
        Ok(Watched { source, key, interest, poller: Arc::clone(&self.poller) })
    }

    /// Waits until something is ready, someone calls [`Waker::wake`] or `limit` has passed.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.events.clear();
        match self.poller.wait(&mut self.events, limit) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(e),
            _ => Ok(()),
        }
    }

    /// What the last wait found.
    pub fn ready(&self) -> impl Iterator<Item = Ready> + '_ {
        self.events.iter().map(|e| Ready {
            key: e.key,
            readable: e.readable,
            writable: e.writable,
            broken: e.is_interrupt() || e.is_err() == Some(true),
        })
    }

    /// A handle by which other threads end a wait.
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.poller))
    }
}

/// Ends a wait from another thread.
#[derive(Clone)]
pub struct Waker(Arc<Poller>);

impl Waker {
    /// Ends the present wait, or the next one.
    pub fn wake(&self) {
        if let Err(e) = self.0.notify() {
            log::error!("cannot wake the edge: {e}");
        }
    }
}

/// A source under watch.
pub struct Watched<S: AsFd> {
    source: S,
    key: usize,
    interest: Interest,
    poller: Arc<Poller>,
}

impl<S: AsFd> Watched<S> {
    /// What is waited for.
    pub fn interest(&self) -> Interest {
        self.interest
    }

    /// Changes what is waited for; costs a system call only if it differs.
    pub fn set(&mut self, interest: Interest) -> io::Result<()> {
        if interest != self.interest {
            let event = interest.event(self.key);
            self.poller.modify_with_mode(&self.source, event, PollMode::Level)?;
            self.interest = interest;
        }
        Ok(())
    }
}

impl<S: AsFd> Deref for Watched<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.source
    }
}

impl<S: AsFd> Drop for Watched<S> {
    fn drop(&mut self) {
        if let Err(e) = self.poller.delete(&self.source) {
            log::error!("cannot take a socket out of the queue: {e}");
        }
    }
}
