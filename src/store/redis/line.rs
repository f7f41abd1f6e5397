//! A connection of its own, for what is exchanged beside tokens.

use std::time::{Duration, Instant};

use super::cluster::{Nodes, Route};
use super::command::{Command, Commands};
use super::layout::{Key, Layout};
use super::pool::Pool;
use super::reply::{Info, Replies};
use crate::clock;
use crate::config;
use crate::device::DeviceId;
use crate::store::StoreError;

/// Longest wait for the replies of a round trip, if `REDIS_TIMEOUT_MS` is not longer: nobody waits for
/// them, and on a slow line many values take their time.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection that one thread uses.
#[derive(Debug)]
pub(crate) struct Line {
    pool: Pool,
    layout: Layout,
    timeout: Duration,
}

impl Line {
    /// A line without a connection yet.
    pub fn new(config: &config::Redis) -> Self {
        let layout = Layout::of(config, None);
        Line { pool: Pool::new(config, 1), layout, timeout: config.timeout.max(PATIENCE) }
    }

    /// Connects anew; returns the server's run id, if it may be asked.
    pub fn connect(&self) -> Result<Option<String>, StoreError> {
        let greet = |nodes: &mut Nodes, deadline| {
            let runs = ask_each(nodes, deadline).into_iter().map(|info| info.run_id).collect();
            nodes.check().map(|()| nodes.run_id(runs))
        };
        self.pool.reopen(greet, clock::now())
    }

    /// A command whose first word is a key.
    pub fn on(&self, command: &str, key: &str) -> Command {
        self.layout.on(command, Key::Named(key))
    }

    /// A command on the newest certificate of a device.
    pub fn on_holder(&self, command: &str, device: &DeviceId) -> Command {
        self.layout.on(command, Key::Holder(device))
    }

    /// A command with a key among its words.
    pub fn key(&self, command: Command, key: &str) -> Command {
        self.layout.key(command, Key::Named(key))
    }

    /// Sets a field if it holds what was seen; one that is not there holds the empty value.
    pub fn swap(&self, key: &str, field: &str, seen: &[u8], value: &[u8]) -> Command {
        self.layout.compare_and_set_field(key, field, seen, value)
    }

    /// Whether the server that has the key of this command is in reach, as far as is known.
    pub fn reaches(&self, command: &Command) -> bool {
        self.pool.map().zip(command.key()).is_none_or(|(map, key)| map.has_key(key))
    }

    /// Whether more is in reach than by the present connections.
    pub fn can_reach_more(&self) -> Result<bool, StoreError> {
        let is_whole = self.pool.missing().is_none();
        if is_whole { Ok(false) } else { self.pool.can_reach_more(&self.layout) }
    }

    /// Sends the commands and reads one reply for each. Where no server is in reach any more, all
    /// connections are closed.
    pub fn ask(&self, commands: &Commands) -> Result<Replies, StoreError> {
        if commands.is_empty() {
            return Ok(Replies::default());
        }
        self.with(|nodes, deadline| commands.judge(nodes.ask(commands, deadline)))
    }

    /// What the servers say of themselves.
    pub fn info(&self) -> Result<Vec<Info>, StoreError> {
        self.with(|nodes, deadline| Ok(ask_each(nodes, deadline)))
    }

    fn with<T>(
        &self,
        ask: impl FnOnce(&mut Nodes, Instant) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + self.timeout;
        let mut nodes = self.pool.take(self.pool.generation(), deadline)?;
        let asked = ask(&mut nodes, deadline);
        match nodes.is_connected() {
            true => self.pool.put_back(nodes, clock::now()),
            false => self.pool.close(),
        }
        asked
    }
}

fn ask_each(nodes: &mut Nodes, deadline: Instant) -> Vec<Info> {
    let mut commands = Commands::default();
    let mut asked = Vec::new();
    for node in nodes.connected() {
        commands.route = Route::Node(node);
        asked.push(Info::ask(&mut commands));
    }
    let mut replies = nodes.ask(&commands, deadline);
    asked.into_iter().map(|info| info(&mut replies)).collect()
}
