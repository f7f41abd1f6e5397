//! The key layout, compare-and-set, and the first words on a new connection.

use std::time::Instant;

use super::command::{Command, Commands, decimal};
use super::connection::Connection;
use super::flow::Replies;
use crate::device::DeviceId;
use crate::jwt::{Claims, MAX_LIFETIME_S, Signer, Token, TokenHash};
use crate::store::failover::Hello;
use crate::store::ledger::MARGIN_MS;
use crate::store::{Down, Mark, StoreError};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;

/// Compare-and-set: 1 if the key held the expected value and now holds the new one.
const COMPARE_AND_SET: &str = "if redis.call('GET',KEYS[1])==ARGV[1] then \
    redis.call('SET',KEYS[1],ARGV[2],'PX',ARGV[3]) return 1 else return 0 end";
/// Compare-and-delete: 1 if the key held the expected value and is gone.
const COMPARE_AND_DELETE: &str =
    "if redis.call('GET',KEYS[1])==ARGV[1] then return redis.call('DEL',KEYS[1]) else return 0 end";

/// The `maxmemory-policy` of a server that drops nothing by itself.
pub(super) const KEEPS_ALL: &str = "noeviction";

/// Names, values and times of the keys.
#[derive(Debug)]
pub(super) struct Layout {
    pub prefix: String,
    pub instance: String,
    pub signer: Signer,
    /// `REDIS_TIMEOUT_MS`: an issue that is still under way is not older than twice this.
    pub patience_ms: u64,
}

impl Layout {
    /// A command whose first word is a key.
    fn on(&self, command: &str, kind: &str, name: &str) -> Command {
        Command::new(command).joined(&[&self.prefix, kind, name])
    }

    fn key(&self, kind: &str, name: &str) -> String {
        [&self.prefix, kind, name].concat()
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

    pub fn claim_if_free(&self, token: &Token, left_ms: u64) -> Command {
        self.on("SET", "device:", token.claims.device_id.as_str())
            .arg(&token.compact)
            .arg("NX")
            .arg("PX")
            .number(left_ms)
    }

    pub fn get_claim(&self, device: &DeviceId) -> Command {
        self.on("GET", "device:", device.as_str())
    }

    pub fn claim_left(&self, device: &DeviceId) -> Command {
        self.on("PTTL", "device:", device.as_str())
    }

    pub fn take_claim_over(&self, from: &str, token: &Token, left_ms: u64) -> Command {
        let key = self.key("device:", token.claims.device_id.as_str());
        compare_and_set(&key, from, &token.compact, left_ms)
    }

    pub fn free_claim(&self, device: &DeviceId, compact: &str) -> Command {
        compare_and_delete(&self.key("device:", device.as_str()), compact)
    }

    pub fn mark_if_free(&self, hash: &TokenHash, mark: &str, claims: &Claims) -> Command {
        self.set_mark(hash, mark, mark_ms(claims)).arg("NX")
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

    pub fn take_mark_over(
        &self,
        hash: &TokenHash,
        from: &str,
        to: &str,
        claims: &Claims,
    ) -> Command {
        compare_and_set(&self.mark_key(hash), from, to, mark_ms(claims))
    }

    pub fn withdraw_mark(&self, hash: &TokenHash, mark: &str) -> Command {
        compare_and_delete(&self.mark_key(hash), mark)
    }

    fn mark_key(&self, hash: &TokenHash) -> String {
        self.key("used:", &hash.to_string())
    }

    pub fn add_live(&self, token: &Token) -> Command {
        self.on("ZADD", "live", "").number(token.claims.exp * 1000).arg(&member(&token.hash))
    }

    pub fn remove_live(&self, hash: &TokenHash) -> Command {
        self.on("ZREM", "live", "").arg(&member(hash))
    }

    /// Seconds since 1970 and microseconds, by the clock that all instances share.
    pub fn time(&self) -> Command {
        Command::new("TIME")
    }

    pub fn remove_live_members(&self, members: &[String]) -> Command {
        members.iter().fold(self.on("ZREM", "live", ""), |command, member| command.arg(member))
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

    /// `<instance> <serial>` or `<instance> killed`.
    pub fn mark(&self, mark: Mark) -> String {
        match mark {
            Mark::Serial(serial) => format!("{} {serial}", self.instance),
            Mark::Killed => format!("{} killed", self.instance),
        }
    }

    /// A mark of this instance that names a serial. It is dead if no certificate came of it.
    pub fn is_own_attempt(&self, mark: &str) -> bool {
        mark.split_once(' ')
            .is_some_and(|(instance, what)| instance == self.instance && what != "killed")
    }

    /// The claims of a token found in Redis; of one that is not ours, the little that is known.
    pub fn claims_of(&self, compact: &str, device: &DeviceId) -> Claims {
        self.signer.verify_signature(compact).unwrap_or_else(|_| Claims {
            device_id: device.clone(),
            iat: 0,
            exp: MAX_LIFETIME_S,
            jti: None,
        })
    }

    /// Who are you, can I write, may I do all that I will have to do, and whose CA do you know? In one
    /// round trip, and the writing is real: a server that is full or a replica refuses only writes.
    pub fn greet(
        &self,
        connection: &mut Connection,
        ca: Option<&str>,
        deadline: Instant,
    ) -> Result<Hello, StoreError> {
        let mut commands = Commands::default();
        Layout::push_info(&mut commands);
        let rights = self.push_every_kind(&mut commands);
        if let Some(ca) = ca {
            commands.push(&self.on("SET", "ca", "").arg(ca).arg("NX"));
        }
        commands.push(&self.on("GET", "ca", ""));
        let mut replies =
            connection.round_trip(&commands, deadline).map_err(StoreError::Down)?.into_iter();
        let server = Replies::new(replies.by_ref().take(2).collect()).info();
        replies.by_ref().take(rights).find_map(Result::err).map_or(Ok(()), |e| Err(for_acl(e)))?;
        let mut replies = Replies::new(replies.collect());
        if ca.is_some() {
            replies.text().map_err(for_acl)?;
        }
        let entered = replies.text().map_err(for_acl)?;
        Ok(Hello {
            run_id: server.run_id,
            eviction: server.policy.filter(|policy| policy != KEEPS_ALL),
            foreign_ca: entered.filter(|entered| ca.is_some_and(|ca| ca != entered)),
        })
    }

    /// Asks which run of the server this is, and what it does when its memory is full.
    pub fn push_info(commands: &mut Commands) {
        commands.push(&Command::new("INFO").arg("server"));
        commands.push(&Command::new("INFO").arg("memory"));
    }

    /// Every command that is used, on every kind of key, in a form that changes nothing: a right
    /// that the user lacks is to be found before it is needed. Answers how many these are.
    fn push_every_kind(&self, commands: &mut Commands) -> usize {
        let before = commands.count();
        let (device, used) = (self.key("device:", ""), self.key("used:", ""));
        commands.push(&self.on("DEL", "token:", ""));
        commands.push(&self.on("EXISTS", "token:", ""));
        commands.push(&self.on("GET", "device:", ""));
        commands.push(&self.on("PTTL", "device:", ""));
        commands.push(&compare_and_delete(&device, ""));
        commands.push(&self.on("GET", "used:", ""));
        commands.push(&compare_and_delete(&used, ""));
        commands.push(&self.on("ZADD", "live", "").arg("XX").number(0).arg(""));
        commands.push(&self.on("ZREM", "live", "").arg(""));
        commands.push(&self.count_live(u64::MAX / 1000));
        commands.push(&self.oldest_live(0, 1));
        commands.push(&self.time());
        commands.count() - before
    }
}

/// An error in the greeting, with what to do about it.
fn for_acl(error: StoreError) -> StoreError {
    match error {
        StoreError::Down(down) if down.why.starts_with("NOPERM") => {
            let why = format!("{} (README: the rights that the ACL user needs)", down.why);
            StoreError::Down(Down { why, ..down })
        }
        other => other,
    }
}

/// How long a mark stands: the token's whole lifetime and a minute, whatever our clock says.
pub(super) fn mark_ms(claims: &Claims) -> u64 {
    claims.lifetime_s() * 1000 + MARGIN_MS
}

/// The token's name in the set of live tokens: half its hash.
fn member(hash: &TokenHash) -> String {
    let (half, _) = hash.0.split_at(16);
    BASE64URL.encode(half)
}

fn compare_and_set(key: &str, from: &str, to: &str, lasts_ms: u64) -> Command {
    eval(COMPARE_AND_SET, key).arg(from).arg(to).number(lasts_ms)
}

fn compare_and_delete(key: &str, value: &str) -> Command {
    eval(COMPARE_AND_DELETE, key).arg(value)
}

fn eval(script: &str, key: &str) -> Command {
    Command::new("EVAL").arg(script).number(1).arg(key)
}
