//! Where provisioning tokens live: one trait, three stores.
//!
//! A store is given a list of operations and answers each on its own, in as few round trips as the
//! list allows: `memory` in none, `redis` in one unless something odd is found, `failover` by
//! whichever of the two serves. The protocol behind each operation, and why its steps come in this
//! order, is told in `redis`.

use std::fmt;

use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::{Token, TokenHash};
use crate::serial::Serial;

/// One thing to do with one token or device.
#[derive(Clone, Debug)]
pub enum Op {
    /// Store a new token and claim its device, unless another token holds the claim.
    Issue(Token),
    /// Store a new token, take the claim over from whichever token holds it and kill that one.
    Replace(Token),
    /// Take a new token back that was issued but must not be handed out.
    TakeBack(Token),
    /// Take the token for the attempt that would sign under this serial: once, by one attempt.
    Consume(Token, Serial),
    /// The attempt failed and left nothing behind: the token may be used again.
    GiveBack(Token, Serial),
    /// The certificate is recorded: remove the token and its claim.
    Finish(Token, Serial),
    /// Revocation: kill the live token of the device and free its claim.
    Kill(DeviceId),
    /// Count the live tokens.
    Count,
}

/// What became of an [`Op`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `Issue`, `Replace`: the token is live and the device's only one.
    Issued,
    /// `Issue`, `Replace`: another token holds the claim until then.
    AlreadyActive {
        /// When that token ends, in milliseconds since 1970.
        expires_at_ms: u64,
    },
    /// `Consume`: this attempt, and no other, may sign.
    Granted,
    /// `Consume`: another attempt took the token, or it was killed.
    AlreadyUsed,
    /// `Consume`: no such token.
    Unknown,
    /// `Kill`: whether there was a live token.
    Killed(bool),
    /// `Count`: live tokens, which is also the number of devices that have one.
    Counted(u64),
    /// `TakeBack`, `GiveBack`, `Finish`: done, or noted to be done when Redis is back.
    Done,
}

/// Why an [`Op`] has no outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// The store cannot decide now; the caller may ask again later.
    Unavailable(String),
    /// No room for another token.
    Full,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Unavailable(why) => f.write_str(why),
            StoreError::Full => f.write_str("the token store is full"),
        }
    }
}

impl std::error::Error for StoreError {}

/// Which store answers at this moment, for `/health`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// Redis is configured.
    pub redis_enabled: bool,
    /// Redis is configured and serves.
    pub redis_connected: bool,
    /// Another CA than ours is entered in Redis.
    pub foreign_ca: bool,
}

/// A store of tokens. Every method may be called from any thread.
pub trait TokenStore: Send + Sync {
    /// Runs the operations and gives one outcome for each, in their order. An error of one is
    /// never an error of another.
    fn run(&self, ops: &[Op], now: Now) -> Vec<Result<Outcome, StoreError>>;

    /// Whether this process knows the token as used or killed; asks nobody else.
    fn knows_as_spent(&self, token: &TokenHash) -> bool;

    /// Which store answers.
    fn health(&self) -> Health;

    /// Whether a token issued now would find room.
    fn has_room(&self) -> bool;
}
