//! The layout of the keys: their names, their values, how long they live, and the commands on them.

use super::command::{Command, decimal};
use super::name::{Name, Whose};
use crate::config;
use crate::device::DeviceId;
use crate::devices::codec;
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
}

impl Layout {
    pub fn of(config: &config::Redis, name: Option<Name>) -> Self {
        let config::Redis { key_prefix, wait_replicas, share_record, .. } = config;
        let (wait_replicas, share_record) = (*wait_replicas, *share_record);
        Layout { prefix: key_prefix.clone(), name, wait_replicas, share_record }
    }

    /// A command whose first word is a key.
    pub fn on(&self, command: &str, kind: &str, name: &str) -> Command {
        Command::new(command).joined(&[&self.prefix, kind, name])
    }

    /// Does not change anything that another instance might have changed before.
    pub fn set_token(&self, token: &Token, left_ms: u64) -> Command {
        let (device, compact) = (token.claims.device_id.as_str(), &token.compact);
        let mut digits = [0; 20];
        let expires_ms = decimal(token.claims.exp * 1000, &mut digits);
        self.on("SET", "token:", compact)
            // Neither name nor token needs escaping.
            .joined(&[
                r#"{"deviceId":""#,
                device,
                r#"","token":""#,
                compact,
                r#"","expiresAt":"#,
                expires_ms,
                "}",
            ])
            .arg("PX")
            .number(left_ms)
    }

    pub fn delete_token(&self, compact: &str) -> Command {
        self.on("DEL", "token:", compact)
    }

    pub fn exists_token(&self, compact: &str) -> Command {
        self.on("EXISTS", "token:", compact)
    }

    pub fn lease_if_free(&self, token: &Token, left_ms: u64) -> Command {
        self.on("SET", "device:", token.claims.device_id.as_str())
            .arg(&token.compact)
            .arg("NX")
            .arg("PX")
            .number(left_ms)
    }

    pub fn get_lease(&self, device: &DeviceId) -> Command {
        self.on("GET", "device:", device.as_str())
    }

    pub fn lease_left(&self, device: &DeviceId) -> Command {
        self.on("PTTL", "device:", device.as_str())
    }

    pub fn take_lease_over(&self, from: &str, token: &Token, left_ms: u64) -> Command {
        let key = ("device:", token.claims.device_id.as_str());
        self.compare_and_set(key, from, &token.compact, left_ms)
    }

    pub fn free_lease(&self, device: &DeviceId, compact: &str) -> Command {
        self.compare_and_delete("device:", device.as_str(), compact)
    }

    pub fn mark_if_free(&self, hash: &TokenHash, mark: &str, lasts_ms: u64) -> Command {
        self.set_mark(hash, mark, lasts_ms).arg("NX")
    }

    /// Over whatever stands there.
    pub fn set_mark(&self, hash: &TokenHash, mark: &str, lasts_ms: u64) -> Command {
        self.on("SET", "used:", &hash.to_string()).arg(mark).arg("PX").number(lasts_ms)
    }

    pub fn get_mark(&self, hash: &TokenHash) -> Command {
        self.on("GET", "used:", &hash.to_string())
    }

    pub fn mark_left(&self, hash: &TokenHash) -> Command {
        self.on("PTTL", "used:", &hash.to_string())
    }

    pub fn take_mark_over(&self, hash: &TokenHash, from: &str, to: &str, lasts_ms: u64) -> Command {
        self.compare_and_set(("used:", &hash.to_string()), from, to, lasts_ms)
    }

    pub fn withdraw_mark(&self, hash: &TokenHash, mark: &str) -> Command {
        self.compare_and_delete("used:", &hash.to_string(), mark)
    }

    /// `ends_ms` is by the clock of Redis, which all instances share.
    pub fn add_live(&self, hash: &TokenHash, ends_ms: u64) -> Command {
        self.on("ZADD", "live", "").number(ends_ms).arg(&member(hash))
    }

    pub fn remove_live(&self, hash: &TokenHash) -> Command {
        self.on("ZREM", "live", "").arg(&member(hash))
    }

    /// How many replicas have what this connection has written, waiting for enough at most so long.
    pub fn wait_for(&self, most_ms: u64) -> Command {
        Command::new("WAIT").number(self.wait_replicas).number(most_ms)
    }

    /// Seconds since 1970 and microseconds, by the clock that all instances share.
    pub fn time(&self) -> Command {
        Command::new("TIME")
    }

    /// With none of them it removes nothing: no token has an empty name.
    pub fn remove_live_members(&self, members: &[String]) -> Command {
        let command = self.on("ZREM", "live", "").arg("");
        members.iter().fold(command, |command, member| command.arg(member))
    }

    pub fn count_live(&self, after_ms: u64) -> Command {
        self.on("ZCOUNT", "live", "").arg(&format!("({after_ms}")).arg("+inf")
    }

    pub fn oldest_live(&self, until_ms: u64, most: u64) -> Command {
        self.on("ZRANGEBYSCORE", "live", "")
            .arg("-inf")
            .number(until_ms)
            .arg("LIMIT")
            .number(0)
            .number(most)
    }

    pub fn get_row(&self, device: &DeviceId) -> Command {
        self.on("HGET", &codec::bucket(device), "").arg(device.as_str())
    }

    /// The serial of the device's newest certificate, if that was signed lately.
    pub fn get_holder(&self, device: &DeviceId) -> Command {
        self.on("GET", "holder:", device.as_str())
    }

    /// Sets the row of a device if it still stands as it was seen.
    pub fn merge_row(&self, device: &DeviceId, seen: &[u8], row: &[u8]) -> Command {
        self.compare_and_set_field(&codec::bucket(device), device.as_str(), seen, row)
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
        self.on("SET", "ca", "").arg(fingerprint).arg("NX")
    }

    pub fn get_ca(&self) -> Command {
        self.on("GET", "ca", "")
    }

    pub fn compare_and_set(
        &self,
        (kind, name): (&str, &str),
        from: &str,
        to: &str,
        lasts_ms: u64,
    ) -> Command {
        self.eval(COMPARE_AND_SET, kind, name).arg(from).arg(to).number(lasts_ms)
    }

    pub fn compare_and_delete(&self, kind: &str, name: &str, value: &str) -> Command {
        self.eval(COMPARE_AND_DELETE, kind, name).arg(value)
    }

    pub fn compare_and_set_field(
        &self,
        hash: &str,
        field: &str,
        from: &[u8],
        to: &[u8],
    ) -> Command {
        self.eval(COMPARE_AND_SET_FIELD, hash, "").arg(field).bytes(from).bytes(to)
    }

    /// A script with one key.
    fn eval(&self, script: &str, kind: &str, name: &str) -> Command {
        Command::new("EVAL").arg(script).number(1).joined(&[&self.prefix, kind, name])
    }
}

/// The token's name in the set of live tokens: half its hash.
fn member(hash: &TokenHash) -> String {
    let (half, _) = hash.0.split_at(16);
    BASE64URL.encode(half)
}
