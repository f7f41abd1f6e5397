//! The layout of the keys: their names, their values, how long they live, and the commands on them.

use super::command::Command;
use super::name::{Name, Whose};
use crate::config;
use crate::device::DeviceId;
use crate::devices::codec;
use crate::digits::decimal;
use crate::jwt::{Token, TokenHash};
use crate::store::Mark;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;

/// Compare-and-set: 1 if the key held the expected value and now holds the new one.
const COMPARE_AND_SET: &str = "if redis.call('GET',KEYS[1])==ARGV[1] then \
    redis.call('SET',KEYS[1],ARGV[2],'PX',ARGV[3]) return 1 else return 0 end";
/// Compare-and-delete: 1 if the key held the expected value and is gone.
const COMPARE_AND_DELETE: &str =
    "if redis.call('GET',KEYS[1])==ARGV[1] then return redis.call('DEL',KEYS[1]) else return 0 end";

/// The same for one field of a hash; one that is not there holds the empty value.
const COMPARE_AND_SET_FIELD: &str = "if (redis.call('HGET',KEYS[1],ARGV[1]) or '')==ARGV[2] then \
    redis.call('HSET',KEYS[1],ARGV[1],ARGV[3]) return 1 else return 0 end";

/// A key, without the prefix of all.
#[derive(Clone, Copy)]
pub(crate) enum Key<'a> {
    Token(&'a DeviceId, &'a str),
    Lease(&'a DeviceId),
    Mark(&'a DeviceId, &'a TokenHash),
    /// The serial of the device's newest certificate, if that was signed lately.
    Holder(&'a DeviceId),
    /// One that is of no device.
    Named(&'a str),
}

/// Names, values and times of the keys of one instance.
#[derive(Debug)]
pub(super) struct Layout {
    pub prefix: String,
    /// None where no marks are set.
    pub name: Option<Name>,
    /// So many replicas must have the mark of a redemption.
    pub wait_replicas: u64,
    /// Certificates are shared, and with them who holds which.
    pub share_record: bool,
    /// The keys are spread over the nodes of a cluster. Those of a device are on one of them, for they
    /// bear its id as a hash tag.
    pub is_spread: bool,
}

impl Layout {
    pub fn of(config: &config::Redis, name: Option<Name>) -> Self {
        let config::Redis { key_prefix, wait_replicas, share_record, .. } = config;
        let (wait_replicas, share_record) = (*wait_replicas, *share_record);
        let is_spread = matches!(config.at, config::Place::Cluster(_));
        Layout { prefix: key_prefix.clone(), name, wait_replicas, share_record, is_spread }
    }

    /// A command whose first word is a key.
    pub fn on(&self, command: &str, key: Key<'_>) -> Command {
        self.key(Command::new(command), key)
    }

    /// A command with its key among its words.
    pub fn key(&self, command: Command, key: Key<'_>) -> Command {
        let prefix = &*self.prefix;
        let hash = if let Key::Mark(_, hash) = key { hash.to_string() } else { String::new() };
        let (kind, device, name) = match key {
            Key::Token(device, compact) => ("token:", device.as_str(), compact),
            Key::Lease(device) => ("device:", device.as_str(), ""),
            Key::Mark(device, _) => ("used:", device.as_str(), &*hash),
            Key::Holder(device) => ("holder:", device.as_str(), ""),
            Key::Named(name) => return command.on(&[prefix, name]),
        };
        match (self.is_spread, name) {
            (false, "") => command.on(&[prefix, kind, device]),
            (false, name) => command.on(&[prefix, kind, name]),
            (true, "") => command.on(&[prefix, kind, "{", device, "}"]),
            (true, name) => command.on(&[prefix, kind, "{", device, "}:", name]),
        }
    }

    /// Does not change anything that another instance might have changed before.
    pub fn set_token(&self, token: &Token, left_ms: u64) -> Command {
        let (device, compact) = (&token.claims.device_id, &*token.compact);
        let mut digits = [0; 20];
        let expires_ms = decimal(token.claims.exp * 1000, &mut digits);
        let device_id = device.as_str();
        self.on("SET", Key::Token(device, compact))
            // Neither name nor token needs escaping.
            .joined(&[
                r#"{"deviceId":""#,
                device_id,
                r#"","token":""#,
                compact,
                r#"","expiresAt":"#,
                expires_ms,
                "}",
            ])
            .arg("PX")
            .number(left_ms)
    }

    /// A write that changes nothing. What is full, or a replica, refuses it.
    pub fn write_nothing(&self, device: &DeviceId) -> Command {
        self.on("SET", Key::Token(device, "")).arg("").arg("XX")
    }

    pub fn lease_if_free(&self, token: &Token, left_ms: u64) -> Command {
        let set = self.on("SET", Key::Lease(&token.claims.device_id)).arg(&token.compact);
        set.arg("NX").arg("PX").number(left_ms)
    }

    /// Over whatever stands there.
    pub fn set_mark(&self, of: Key<'_>, mark: &str, lasts_ms: u64) -> Command {
        self.on("SET", of).arg(mark).arg("PX").number(lasts_ms)
    }

    /// `ends_ms` is by the clock of Redis, which all instances share.
    pub fn add_live(&self, hash: &TokenHash, ends_ms: u64) -> Command {
        self.on("ZADD", Key::Named(self.live(hash))).number(ends_ms).arg(&member(hash))
    }

    pub fn remove_live(&self, hash: &TokenHash) -> Command {
        self.on("ZREM", Key::Named(self.live(hash))).arg(&member(hash))
    }

    /// The sets of live tokens: so that not one node of a cluster has them all, there are several.
    pub fn all_live(&self) -> &'static [&'static str] {
        const SPREAD: [&str; 16] = [
            "live:0", "live:1", "live:2", "live:3", "live:4", "live:5", "live:6", "live:7",
            "live:8", "live:9", "live:a", "live:b", "live:c", "live:d", "live:e", "live:f",
        ];
        if self.is_spread { &SPREAD } else { &["live"] }
    }

    /// The one of a token, by the first digit of its hash.
    fn live(&self, hash: &TokenHash) -> &'static str {
        let [first, ..] = hash.0;
        let all = self.all_live();
        all.get(usize::from(first >> 4) % all.len()).copied().unwrap_or_default()
    }

    /// With none of them it removes nothing: no token has an empty name.
    pub fn remove_live_members(&self, live: &str, members: &[String]) -> Command {
        let command = self.on("ZREM", Key::Named(live)).arg("");
        members.iter().fold(command, |command, member| command.arg(member))
    }

    pub fn count_live(&self, live: &str, after_ms: u64) -> Command {
        self.on("ZCOUNT", Key::Named(live)).arg(&format!("({after_ms}")).arg("+inf")
    }

    pub fn oldest_live(&self, live: &str, until_ms: u64, most: u64) -> Command {
        let range = self.on("ZRANGEBYSCORE", Key::Named(live)).arg("-inf").number(until_ms);
        range.arg("LIMIT").number(0).number(most)
    }

    pub fn get_row(&self, device: &DeviceId) -> Command {
        self.on("HGET", Key::Named(&codec::bucket(device))).arg(device.as_str())
    }

    /// `<instance> <serial>` or `<instance> killed`.
    pub fn mark(&self, mark: Mark) -> String {
        let instance = self.name.as_ref().map(Name::own).unwrap_or_default();
        match mark {
            Mark::Serial(serial) => format!("{instance} {serial}"),
            Mark::Killed => format!("{instance} killed"),
        }
    }

    /// Whose attempt it was that set this mark. One of this instance is dead if no certificate came of
    /// it.
    pub fn attempt_of(&self, mark: &str) -> Whose {
        match (mark.split_once(' '), &self.name) {
            (Some((name, what)), Some(ours)) if what != "killed" => ours.whose(name),
            _ => Whose::Others,
        }
    }

    /// Enters the fingerprint of our CA unless there is one.
    pub fn enter_ca(&self, fingerprint: &str) -> Command {
        self.on("SET", Key::Named("ca")).arg(fingerprint).arg("NX")
    }

    pub fn compare_and_set(&self, key: Key<'_>, from: &str, to: &str, lasts_ms: u64) -> Command {
        self.eval(COMPARE_AND_SET, key).arg(from).arg(to).number(lasts_ms)
    }

    pub fn compare_and_delete(&self, key: Key<'_>, value: &str) -> Command {
        self.eval(COMPARE_AND_DELETE, key).arg(value)
    }

    pub fn compare_and_set_field(
        &self,
        hash: &str,
        field: &str,
        from: &[u8],
        to: &[u8],
    ) -> Command {
        self.eval(COMPARE_AND_SET_FIELD, Key::Named(hash)).arg(field).bytes(from).bytes(to)
    }

    /// A script with one key.
    fn eval(&self, script: &str, key: Key<'_>) -> Command {
        self.key(Command::new("EVAL").arg(script).number(1), key)
    }
}

/// The token's name in the set of live tokens: half its hash.
fn member(hash: &TokenHash) -> String {
    let (half, _) = hash.0.split_at(16);
    BASE64URL.encode(half)
}
