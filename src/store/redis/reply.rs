//! Replies of a round trip, read in the order of their commands.

use std::collections::HashMap;
use std::vec::IntoIter;

use redis::Value;

use super::command::{Command, Commands};
use crate::store::{Down, StoreError};

/// The reply to one command: a value, or why this command was refused.
pub(crate) type Reply = Result<Value, StoreError>;

/// Replies in the order of their commands.
pub(crate) struct Replies {
    rest: IntoIter<Reply>,
}

impl Replies {
    pub fn new(replies: Vec<Reply>) -> Self {
        Replies { rest: replies.into_iter() }
    }

    /// The replies, if none is an error; else that error, and whether others were carried out.
    pub fn all_or_error(replies: Vec<Reply>) -> Result<Self, StoreError> {
        let answered = replies.iter().any(Result::is_ok);
        match replies.iter().find_map(|reply| reply.as_ref().err()) {
            None => Ok(Self::new(replies)),
            Some(error) => Err(maybe_done(error.clone(), answered)),
        }
    }

    fn next(&mut self) -> Reply {
        self.rest.next().unwrap_or_else(|| Err(unexpected("no reply")))
    }

    /// Passes over a reply that decides nothing.
    pub fn skip(&mut self) {
        let _decides_nothing = self.next();
    }

    /// A text, or nothing where the key is not there.
    pub fn text(&mut self) -> Result<Option<String>, StoreError> {
        match self.next()? {
            Value::Nil => Ok(None),
            Value::Okay => Ok(Some("OK".to_owned())),
            Value::SimpleString(text) => Ok(Some(text)),
            // Read otherwise, a value could never be compared with what stands there.
            Value::BulkString(bytes) => {
                String::from_utf8(bytes).map(Some).map_err(|_| unexpected("not UTF-8"))
            }
            Value::VerbatimString { text, .. } => Ok(Some(text)),
            _ => Err(unexpected("not a text")),
        }
    }

    /// Any bytes; none where the key is not there.
    pub fn bytes(&mut self) -> Result<Vec<u8>, StoreError> {
        match self.next()? {
            Value::Nil => Ok(Vec::new()),
            Value::BulkString(bytes) => Ok(bytes),
            _ => Err(unexpected("not a value")),
        }
    }

    /// The items of a list; none where the key is not there.
    pub fn list(&mut self) -> Result<Replies, StoreError> {
        match self.next()? {
            Value::Nil => Ok(Replies::new(Vec::new())),
            Value::Array(items) => Ok(Replies::new(items.into_iter().map(Ok).collect())),
            _ => Err(unexpected("not a list")),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.rest.len() == 0
    }

    pub fn number(&mut self) -> Result<i64, StoreError> {
        match self.next()? {
            Value::Int(number) => Ok(number),
            _ => Err(unexpected("not a number")),
        }
    }

    /// What a server answers to [`Info::ask`]. One that may not be asked says nothing.
    pub fn info(&mut self) -> Info {
        let mut text = || self.text().ok().flatten().unwrap_or_default();
        let (server, memory) = (text(), text());
        Info {
            run_id: info(&server, "run_id"),
            mode: info(&server, "redis_mode"),
            policy: info(&memory, "maxmemory_policy"),
            used: info(&memory, "used_memory").and_then(|bytes| bytes.parse().ok()),
            most: info(&memory, "maxmemory").and_then(|bytes| bytes.parse().ok()),
        }
    }

    /// What `TIME` says, in milliseconds since 1970.
    pub fn time_ms(&mut self) -> Result<u64, StoreError> {
        let time = self.texts()?;
        let number = |at: usize| time.get(at).and_then(|text| text.parse::<u64>().ok());
        let (seconds, micros) = number(0).zip(number(1)).ok_or_else(|| unexpected("not a time"))?;
        Ok(seconds.saturating_mul(1000).saturating_add(micros / 1000))
    }

    pub fn texts(&mut self) -> Result<Vec<String>, StoreError> {
        let mut items = self.list()?;
        std::iter::from_fn(|| (!items.is_empty()).then(|| items.text()))
            .map(|text| text.map(Option::unwrap_or_default))
            .collect()
    }

    /// Lists of texts, in each of which names and values alternate.
    pub fn maps(&mut self) -> Result<Vec<HashMap<String, String>>, StoreError> {
        let mut items = self.list()?;
        let mut maps = Vec::new();
        while !items.is_empty() {
            let mut words = items.texts()?.into_iter();
            maps.push(std::iter::from_fn(|| Some((words.next()?, words.next()?))).collect());
        }
        Ok(maps)
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
    pub fn ask(commands: &mut Commands) {
        commands.push(&Command::new("INFO").arg("server"));
        commands.push(&Command::new("INFO").arg("memory"));
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
pub(super) fn is_denied(error: &StoreError) -> bool {
    let why = error.to_string();
    ["NOPERM", "ACL failure in script", "can't run this command"].iter().any(|s| why.contains(s))
}

/// The same error, with whether a command of the trip may have been carried out all the same.
pub(super) fn maybe_done(error: StoreError, maybe_done: bool) -> StoreError {
    match error {
        StoreError::Down(down) => StoreError::Down(Down { maybe_done, ..down }),
        other => other,
    }
}

pub(super) fn unexpected(what: &str) -> StoreError {
    StoreError::Failed(format!("unexpected reply from Redis: {what}"))
}
