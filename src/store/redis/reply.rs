//! Replies, and what can be read in one.

use redis::{FromRedisValue, Value};

use super::command::{Ask, Command, Commands};
use crate::store::{Down, StoreError};

/// The replies to [`Commands`].
#[derive(Debug, Default)]
pub(crate) struct Replies {
    replies: Vec<Reply>,
    /// So many replicas have what they must have, of this master.
    pub replicas: u64,
    pub master: usize,
}

impl Replies {
    pub fn new(replies: Vec<Reply>) -> Self {
        Replies { replies, ..Replies::default() }
    }

    pub fn add(&mut self, reply: Reply) {
        self.replies.push(reply);
    }

    /// The reply to this command. It is there once.
    pub fn take(&mut self, ask: Ask) -> Reply {
        let none = || Reply(Err(StoreError::Undecided));
        self.replies.get_mut(ask.0).map_or_else(none, |reply| std::mem::replace(reply, none()))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Reply> {
        self.replies.iter()
    }
}

/// The reply to one command: a value, or why this command was refused.
#[derive(Clone, Debug)]
pub(crate) struct Reply(pub Result<Value, StoreError>);

impl Reply {
    pub fn error(&self) -> Option<&StoreError> {
        self.0.as_ref().err()
    }

    /// The value, as what it should be.
    ///
    /// SECURITY: the crate's own error has the value in it.
    pub fn read<T: FromRedisValue>(self) -> Result<T, StoreError> {
        redis::from_redis_value(self.0?).map_err(|_| unexpected("of another type"))
    }

    /// A text, or nothing where the key is not there.
    pub fn text(self) -> Result<Option<String>, StoreError> {
        self.read()
    }

    /// The items of a list; none where the key is not there.
    pub fn list(self) -> Result<Vec<Reply>, StoreError> {
        let items: Vec<Value> = self.read()?;
        Ok(items.into_iter().map(|item| Reply(Ok(item))).collect())
    }

    pub fn number(self) -> Result<i64, StoreError> {
        self.read()
    }

    /// What `TIME` says, in milliseconds since 1970.
    pub fn time_ms(self) -> Result<u64, StoreError> {
        let (seconds, micros): (u64, u64) = self.read()?;
        Ok(seconds.saturating_mul(1000).saturating_add(micros / 1000))
    }
}

/// The `maxmemory-policy` of a server that drops nothing by itself.
const KEEPS_ALL: &str = "noeviction";

/// What a server says of itself.
pub(crate) struct Info {
    /// Changes with every start of the server.
    pub run_id: Option<String>,
    /// `standalone`, `sentinel` or `cluster`.
    pub mode: Option<String>,
    /// What it does when its memory is full.
    pub policy: Option<String>,
    /// The memory that it uses, in bytes.
    pub used: Option<u64>,
    /// The most that it may use; 0 if there is no limit.
    pub most: Option<u64>,
}

impl Info {
    /// One that may not be asked says nothing.
    pub fn ask(commands: &mut Commands) -> impl FnOnce(&mut Replies) -> Info + use<> {
        let [server, memory] =
            ["server", "memory"].map(|part| commands.try_ask(Command::new("INFO").arg(part)));
        move |replies| {
            let mut text = |ask| replies.take(ask).text().ok().flatten().unwrap_or_default();
            let (server, memory) = (text(server), text(memory));
            Info {
                run_id: info(&server, "run_id"),
                mode: info(&server, "redis_mode"),
                policy: info(&memory, "maxmemory_policy"),
                used: info(&memory, "used_memory").and_then(|bytes| bytes.parse().ok()),
                most: info(&memory, "maxmemory").and_then(|bytes| bytes.parse().ok()),
            }
        }
    }

    /// The server drops nothing by itself, and says so.
    pub fn keeps_all(&self) -> bool {
        self.policy.as_deref() == Some(KEEPS_ALL)
    }
}

/// The value of `name:` in an `INFO` reply.
fn info(text: &str, name: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

/// The user lacks a right, for a command, a key, or within a script.
pub(crate) fn is_denied(error: &StoreError) -> bool {
    let why = error.to_string();
    ["NOPERM", "ACL failure in script", "can't run this command"].iter().any(|s| why.contains(s))
}

/// The same error, of a trip of which a command may have been carried out all the same.
pub(super) fn maybe_done(error: StoreError, maybe_done: bool) -> StoreError {
    match error {
        StoreError::Down(down) => {
            StoreError::Down(Down { maybe_done: maybe_done || down.maybe_done, ..down })
        }
        other => other,
    }
}

pub(super) fn unexpected(what: &str) -> StoreError {
    StoreError::Failed(format!("unexpected reply from Redis: {what}"))
}
