//! Readiness of sockets by `epoll(7)`, level-triggered: a socket stays armed until its interest
//! changes.
//!
//! [`Watched`] owns its source, lends it by shared reference only, and takes it out of the queue
//! before it is closed: a copy of the descriptor in a child that is just being started would keep
//! it there, under a key that has another owner by then.

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

pub use rustix::event::epoll::EventFlags as Interest;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

/// What a socket waits for: something to read, the end and errors included.
pub const READ: Interest = EventFlags::IN.union(EventFlags::RDHUP).union(BROKEN);
/// What a socket waits for: room to write, errors included.
pub const WRITE: Interest = EventFlags::OUT.union(BROKEN);
/// Reported whether or not it is asked for.
const BROKEN: EventFlags = EventFlags::HUP.union(EventFlags::ERR);
/// Sockets reported by one wait; more are reported by the next.
const BATCH: usize = 256;
/// The key of what ends a wait.
const WAKE: u64 = u64::MAX;

/// What happened to the socket with this key.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
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
    queue: Arc<OwnedFd>,
    wake: Arc<OwnedFd>,
    ready: Vec<Ready>,
}

impl Poll {
    pub fn new() -> io::Result<Self> {
        let queue = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // Edge-triggered: each write is reported once, so that its count need not be read.
        epoll::add(&queue, &wake, EventData::new_u64(WAKE), EventFlags::IN | EventFlags::ET)?;
        Ok(Poll { queue: Arc::new(queue), wake: Arc::new(wake), ready: Vec::new() })
    }

    /// Puts `source` under watch until the result is dropped.
    pub fn watch<S: AsFd>(
        &self,
        source: S,
        key: usize,
        interest: Interest,
    ) -> io::Result<Watched<S>> {
        epoll::add(&self.queue, &source, data(key), interest)?;
        Ok(Watched { source, key, interest, queue: Arc::clone(&self.queue) })
    }

    /// Waits until something is ready, someone calls [`Waker::wake`] or `limit` has passed.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.ready.clear();
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut space = [const { MaybeUninit::uninit() }; BATCH];
        let events = match epoll::wait(&self.queue, &mut space, limit.as_ref()) {
            Ok((events, _)) => events,
            Err(e) if e.kind() == ErrorKind::Interrupted => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        for event in events {
            let key = event.data.u64();
            if key != WAKE {
                self.ready.push(ready(key, event));
            }
        }
        Ok(())
    }

    pub fn ready(&self) -> impl Iterator<Item = Ready> + '_ {
        self.ready.iter().copied()
    }

    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.wake))
    }
}

/// An error that says "later", not "never".
pub fn is_transient(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn ready(key: u64, event: &Event) -> Ready {
    let flags = event.flags;
    Ready {
        // It was an `usize` when it was given to `watch`.
        key: key as usize,
        readable: flags.intersects(READ),
        writable: flags.intersects(WRITE),
        broken: flags.intersects(BROKEN),
    }
}

fn data(key: usize) -> EventData {
    EventData::new_u64(key as u64)
}

/// Ends a wait from another thread.
#[derive(Clone)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Ends the present wait, or the next one.
    pub fn wake(&self) {
        // The count would be full after 600 years.
        if let Err(e) = rustix::io::write(&self.0, &1_u64.to_ne_bytes()) {
            log::error!("cannot wake the edge: {e}");
        }
    }
}

pub struct Watched<S: AsFd> {
    source: S,
    key: usize,
    interest: Interest,
    queue: Arc<OwnedFd>,
}

impl<S: AsFd> Watched<S> {
    pub fn interest(&self) -> Interest {
        self.interest
    }

    /// Changes what is waited for; costs a system call only if it differs.
    pub fn set(&mut self, interest: Interest) -> io::Result<()> {
        if interest != self.interest {
            epoll::modify(&self.queue, &self.source, data(self.key), interest)?;
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
        if let Err(e) = epoll::delete(&self.queue, &self.source) {
            log::error!("cannot take a socket out of the queue: {e}");
        }
    }
}
