//! The connections that are not in use, for each worker one to each node. Only [`Pool::reopen`] makes
//! any, on its caller's thread.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::cause::Server;
use super::cluster::{Map, Nodes};
use super::layout::Layout;
use super::locate::Locator;
use crate::clock::Now;
use crate::config;
use crate::socket::time_left;
use crate::store::{Down, DownKind, StoreError, locked};

/// A connection that was neither used nor looked at for longer may have been closed by the other side;
/// looking costs a system call.
const IDLE_MS: u64 = 20;
/// One that was idle for longer is asked whether it still leads to the same server.
const LONG_IDLE_MS: u64 = 4000;

/// All connections to one server, or to the nodes of a cluster.
pub(super) struct Pool {
    config: config::Redis,
    server: Arc<Server>,
    /// For connecting, and a quarter of it for the greeting. An eighth of what was configured is
    /// left for saying why it failed before the start stops waiting.
    connect_timeout: Duration,
    size: usize,
    /// Held while connecting; only the supervisor does.
    locator: Mutex<Locator>,
    state: Mutex<State>,
    put_back: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<Nodes>,
    /// What they share of the nodes.
    map: Option<Arc<Map>>,
    /// Connections of this generation, idle or in use; 0 while there is no server.
    open: usize,
    /// Counts up at every reopening; a connection of an older one is closed when it comes back.
    generation: u64,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({})", self.size)
    }
}

impl Pool {
    pub fn new(config: &config::Redis, size: usize) -> Self {
        let locator = Locator::new(config);
        Pool {
            config: config.clone(),
            server: locator.server(),
            connect_timeout: config.connect_timeout * 7 / 8,
            size: size.max(1),
            locator: Mutex::new(locator),
            state: Mutex::default(),
            put_back: Condvar::new(),
        }
    }

    /// The other side has closed a connection that was idle. Waits for nothing.
    pub fn was_cut(&self, now: Now) -> bool {
        let mut state = locked(&self.state);
        state.idle.iter_mut().any(|nodes| {
            let is_due = now.mono_ms.saturating_sub(nodes.seen_ms) > IDLE_MS;
            nodes.seen_ms = if is_due { now.mono_ms } else { nodes.seen_ms };
            is_due && nodes.has_ended()
        })
    }

    /// Counts up whenever connections are closed or made.
    pub fn generation(&self) -> u64 {
        locked(&self.state).generation
    }

    /// An idle connection of this generation, or one that another worker puts back before the deadline.
    pub fn take(&self, generation: u64, deadline: Instant) -> Result<Nodes, Down> {
        let mut state = locked(&self.state);
        loop {
            if state.generation != generation {
                return Err(self.server.lost("connected anew meanwhile", false));
            }
            if let Some(nodes) = state.idle.pop() {
                return Ok(nodes);
            }
            if state.open == 0 {
                return Err(self.server.lost("not connected", false));
            }
            let busy = |_| Down {
                kind: DownKind::Busy,
                ..self.server.lost("REDIS_POOL_SIZE connections are too few", false)
            };
            let left = time_left(deadline).map_err(busy)?;
            let waited = self.put_back.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// One that nobody has used for a while.
    pub fn take_idle(&self, now: Now) -> Option<Nodes> {
        let mut state = locked(&self.state);
        let is_idle = |c: &Nodes| now.mono_ms.saturating_sub(c.idle_since_ms) > LONG_IDLE_MS;
        let at = state.idle.iter().position(is_idle)?;
        Some(state.idle.swap_remove(at))
    }

    pub fn lost(&self, why: &str) -> Down {
        self.server.lost(why, false)
    }

    /// Only connections that have answered everything come back; the others are dropped.
    pub fn put_back(&self, mut nodes: Nodes, now: Now) {
        let mut state = locked(&self.state);
        if nodes.generation == state.generation && nodes.is_connected() {
            (nodes.idle_since_ms, nodes.seen_ms) = (now.mono_ms, now.mono_ms);
            state.idle.push(nodes);
            self.put_back.notify_one();
        }
    }

    /// Why a part of the keys is out of reach, if one is.
    pub fn missing(&self) -> Option<String> {
        self.map()?.missing()
    }

    pub fn map(&self) -> Option<Arc<Map>> {
        locked(&self.state).map.clone()
    }

    /// Where the nodes are by now, and whether some are in reach that were not. Connects, but keeps no
    /// connection.
    pub fn can_reach_more(&self, layout: &Layout) -> Result<bool, StoreError> {
        let Some(map) = self.map() else { return Ok(false) };
        let mut locator = locked(&self.locator);
        let opener = locator.opener(&self.config, Instant::now() + self.connect_timeout)?;
        locator.can_reach_more(&map, layout, &opener)
    }

    /// Closes what is idle, and what is in use when it comes back.
    pub fn close(&self) {
        let mut state = locked(&self.state);
        state.generation += 1;
        state.open = 0;
        state.idle.clear();
        state.map = None;
        self.put_back.notify_all();
    }

    /// Looks the name up again, connects, greets on the last connection, and replaces all
    /// connections. One is enough to serve; a server may allow no more, or be too slow for more.
    ///
    /// On the last, because the server may start again in between: then the others fail when they
    /// are used, which is noticed. Were the last one not the one that was asked who it is talking
    /// to, it would serve another server, empty perhaps, as if it were the one that was greeted.
    pub fn reopen<T>(
        &self,
        greet: impl FnOnce(&mut Nodes, Instant) -> Result<T, StoreError>,
        now: Now,
    ) -> Result<T, StoreError> {
        self.close();
        let (fresh, hello) = self.open_all(&mut locked(&self.locator), greet)?;
        let mut state = locked(&self.state);
        state.generation += 1;
        state.open = fresh.len();
        state.map = fresh.first().map(|nodes| Arc::clone(&nodes.map));
        let generation = state.generation;
        state.idle = fresh.into_iter().map(|c| c.serve(generation, now)).collect();
        self.put_back.notify_all();
        Ok(hello)
    }

    fn open_all<T>(
        &self,
        locator: &mut Locator,
        greet: impl FnOnce(&mut Nodes, Instant) -> Result<T, StoreError>,
    ) -> Result<(Vec<Nodes>, T), StoreError> {
        let begun = Instant::now();
        let deadline = begun + self.connect_timeout;
        let opener = locator.opener(&self.config, deadline)?;
        let mut last = locator.open(&opener)?;
        let early = opener.until(deadline - self.connect_timeout / 2);
        let mut fresh = Vec::with_capacity(self.size);
        let mut refused = None;
        while refused.is_none() && fresh.len() + 1 < self.size {
            match early.open_again(&last) {
                Ok(nodes) => fresh.push(std::mem::replace(&mut last, nodes)),
                Err(error) => refused = Some(error),
            }
        }
        let deadline = deadline.max(Instant::now() + self.connect_timeout / 4);
        let hello = greet(&mut last, deadline);
        if hello.is_err() {
            locator.try_another();
        }
        let hello = hello?;
        fresh.push(last);
        if let Some(error) = refused {
            log::warn!("Redis gives {} of {} connections: {error}", fresh.len(), self.size);
        }
        Ok((fresh, hello))
    }
}
