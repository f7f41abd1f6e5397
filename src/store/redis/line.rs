//! A connection of its own, for what is exchanged beside tokens.

use std::time::{Duration, Instant};

use super::command::{Command, Commands};
use super::layout::Layout;
use super::pool::Pool;
use super::reply::{Info, Replies};
use crate::clock;
use crate::config;
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
    ///
    /// # Errors
    /// Why the server cannot be used.
    pub fn connect(&self) -> Result<Option<String>, StoreError> {
        let mut commands = Commands::default();
        let info = Info::ask(&mut commands);
        let greet = |connection: &mut super::connection::Connection, deadline| {
            let replies = connection.round_trip(&commands, deadline);
            Ok(info(&mut replies.map_err(StoreError::Down)?).run_id)
        };
        self.pool.reopen(greet, clock::now())
    }

    /// A command whose first word is a key.
    pub fn on(&self, command: &str, key: &str) -> Command {
        self.layout.on(command, key, "")
    }

    /// A command with a key among its words.
    pub fn key(&self, command: Command, key: &str) -> Command {
        command.joined(&[&self.layout.prefix, key])
    }

    /// Sets a field if it holds what was seen; one that is not there holds the empty value.
    pub fn swap(&self, key: &str, field: &str, seen: &[u8], value: &[u8]) -> Command {
        self.layout.compare_and_set_field(key, field, seen, value)
    }

    /// Sends the commands and reads one reply for each.
    ///
    /// # Errors
    /// When the connection is lost, and is closed then, or when one fails that must not.
    pub fn ask(&self, commands: &Commands) -> Result<Replies, StoreError> {
        if commands.is_empty() {
            return Ok(Replies::default());
        }
        let deadline = Instant::now() + self.timeout;
        let mut connection =
            self.pool.take(self.pool.generation(), deadline).map_err(StoreError::Down)?;
        match connection.round_trip(commands, deadline) {
            Ok(replies) => {
                self.pool.put_back(connection, clock::now());
                commands.judge(replies)
            }
            Err(down) => {
                self.pool.close();
                Err(StoreError::Down(down))
            }
        }
    }
}
