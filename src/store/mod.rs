//! Where provisioning tokens live: one trait, three stores.
//!
//! A store is given a list of operations and answers each on its own, in as few round trips as the
//! list allows: `memory` in none, `redis` in one unless something odd is found, `failover` by
//! whichever of the two serves. The protocol behind each operation, and why its steps come in this
//! order, is told in `redis`.

pub mod failover;
pub mod ledger;
pub mod memory;
pub mod redis;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Now;
use crate::device::DeviceId;
use crate::devices::{Bound, Row};
use crate::jwt::{Claims, Signer, Token, TokenHash};
pub(crate) use crate::locks::locked;
use crate::serial::Serial;
use crate::subscriber::Subscriber;

/// One thing to do with one token or device.
#[derive(Clone, Debug)]
pub enum Op {
    /// Store a new token and lease its device to it.
    Issue(New),
    /// Say what there is of this device, before something of it is changed or decided.
    Look(DeviceId),
    /// Take the token for the attempt that would sign under this serial: once, by one attempt.
    Consume(Token, Serial),
    /// The attempt failed and left nothing behind: the token may be used again.
    GiveBack(Token, Serial),
    /// Its certificate is recorded, or it was not handed out: remove the token and its lease.
    Remove(Token),
    /// Merge the device's row, kill the past that it says is dead, and free its lease.
    Kill(Box<Kill>),
    /// Count the live tokens.
    Count,
    /// Merge a device's row that was changed here, and kill the leased token if the row says that it
    /// is dead.
    Tell(DeviceId, Row),
    /// Carry-over: enter what is known here as used or killed, over whatever stands there.
    Mark(TokenHash, Mark, Claims),
    /// Carry-over: enter a live token for what is left of its time, and its lease if that is free.
    Carry(Token, u64),
}

/// A token to be issued.
#[derive(Clone, Debug)]
pub struct New {
    /// The token.
    pub token: Token,
    /// The device's past is killed first; otherwise another token that holds the lease stays, and
    /// this one is not issued.
    pub replaces: Option<Box<Kill>>,
    /// Whose share of the memory it counts against: none may fill it for all.
    pub subscriber: Subscriber,
}

/// What a store has of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its row in Redis.
    pub row: Row,
    /// That row as it stands there, whoever wrote it; empty if there is none.
    pub value: Vec<u8>,
    /// The token that holds its lease in Redis.
    pub leased: Option<Token>,
    /// The latest `iat` of the tokens that are known, in seconds since 1970.
    pub latest_iat: Option<u64>,
    /// Redis has said so, not this instance by itself.
    pub by_redis: bool,
}

/// A device whose past is to die: every token up to the bound in its row, which is on this
/// instance's disk already.
#[derive(Clone, Debug)]
pub struct Kill {
    /// The device.
    pub device: DeviceId,
    /// Its row.
    pub row: Row,
    /// What the store had of the device just before.
    pub seen: Seen,
}

/// Why a token is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Redeemed, for the certificate with this serial.
    Serial(Serial),
    /// Replaced or revoked.
    Killed,
}

/// A token that was killed: enough of it to enter the kill elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dead {
    /// SHA-256 of the token.
    pub hash: TokenHash,
    /// Its claims.
    pub claims: Claims,
}

impl Dead {
    /// What is to be known of the token once it is dead.
    pub fn of(token: &Token) -> Self {
        Dead { hash: token.hash, claims: token.claims.clone() }
    }
}

/// The same token, issued at another second.
fn dated(token: &Token, iat: u64, signer: &Signer) -> Token {
    let claims = token.claims.clone();
    let exp = iat.saturating_add(claims.lifetime_s());
    signer.sign(Claims { iat, exp, ..claims })
}

/// What Redis has of a device beside its token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Its row.
    pub row: Row,
    /// Its newest certificate, whoever has signed it, if that was lately.
    pub holder: Option<Serial>,
}

/// What became of an [`Op`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `Issue`: the token is live and the device's only one.
    Issued {
        /// The token; another than was asked for if that one would have been born dead, or if it is
        /// not known what became of it.
        token: Token,
        /// The token that was replaced, if there was one.
        killed: Option<Dead>,
        /// What Redis had of the device in the same trip.
        found: Box<Found>,
    },
    /// `Look`.
    Seen(Box<Seen>),
    /// `Issue`: another token holds the lease.
    AlreadyActive {
        /// When that token ends, in milliseconds since 1970.
        expires_at_ms: u64,
    },
    /// `Consume`: this attempt, and no other, may sign. With the device's row as Redis had it.
    Granted(Box<Row>),
    /// `Issue`, `Consume`: not done, for the device is blocked.
    Blocked,
    /// `Consume`: another attempt took the token, or it was killed.
    AlreadyUsed,
    /// `Consume`: no such token.
    Unknown {
        /// The run id of the server that says so, if it drops nothing by itself: what it was given
        /// and lacks, somebody has deleted.
        lossless_run: Option<String>,
    },
    /// `Kill`: done.
    Killed {
        /// The token that was live, if there was one.
        dead: Option<Dead>,
        /// Every instance can know of it: the row stands in Redis, or there is no Redis.
        told: bool,
    },
    /// `Tell`.
    Told(Box<Told>),
    /// `Mark`: done.
    Marked {
        /// The token lives, and there was no mark of it: as far as this instance knows, Redis has
        /// lost one.
        was_lost: bool,
    },
    /// `Count`: live tokens, which is also the number of devices that have one.
    Counted(u64),
    /// The others: done, or noted to be done when Redis is back.
    Done,
}

/// What a row has come to that was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The row that stands in Redis now.
    pub row: Row,
    /// The live token that it has killed there.
    pub dead: Option<Dead>,
    /// Its bound may still meet a token, and was not there.
    pub was_lost: bool,
}

/// Why an [`Op`] has no outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// The store does not serve.
    Down(Down),
    /// This one operation failed (a key of another type, say); the store serves.
    Failed(String),
    /// The store cannot decide now; the caller may ask again later.
    Undecided,
    /// Fewer replicas have a mark than are to have it.
    Unsafe,
    /// No room for another token.
    Full,
    /// No room for another token of this subscriber.
    ShareFull,
}

/// A store that does not serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Down {
    /// Where it is, and the cause.
    pub why: Arc<str>,
    /// What it does instead.
    pub kind: DownKind,
    /// It will not end by itself: somebody has to change something.
    pub lasting: bool,
    /// A command was sent that may have been carried out, or may yet be.
    pub maybe_done: bool,
}

/// How a store does not serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DownKind {
    /// No answer, or no connection. One reset is not an outage yet.
    Lost,
    /// It answers that it does not serve, or not us: `LOADING`, `OOM`, `NOAUTH` …
    Refused,
    /// `READONLY`: another server may be the one to write to.
    ReadOnly,
    /// A part of the keys is out of reach, of which this is one; the others are served.
    Part,
    /// All connections were in use all the time; nothing is wrong with the server.
    Busy,
}

impl StoreError {
    /// What was asked is out of reach, other parts of the keys are not.
    pub fn is_part(&self) -> bool {
        matches!(self, StoreError::Down(down) if down.kind == DownKind::Part)
    }

    /// A server that answers one key wrongly while it is greeted does not serve either.
    fn into_down(self) -> Down {
        let why = self.to_string().into();
        match self {
            StoreError::Down(down) => down,
            _ => Down { why, kind: DownKind::Refused, lasting: true, maybe_done: false },
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Down(Down { why, .. }) => f.write_str(why),
            StoreError::Failed(why) => f.write_str(why),
            StoreError::Undecided => f.write_str("cannot be decided now"),
            StoreError::Unsafe => {
                f.write_str("fewer replicas than REDIS_WAIT_REPLICAS have a redemption's mark")
            }
            StoreError::Full => f.write_str("the token store is full"),
            StoreError::ShareFull => {
                f.write_str("the client's share of MEMORY_MAX_TOKENS is used up")
            }
        }
    }
}

impl std::error::Error for StoreError {}

impl From<Down> for StoreError {
    fn from(down: Down) -> Self {
        StoreError::Down(down)
    }
}

/// The rows on this instance's disk, as far as a store must know them.
pub trait Rows: fmt::Debug + Send + Sync {
    /// The devices whose rows Redis must know before it serves again.
    fn to_be_told(&self, now: Now) -> Vec<DeviceId>;

    /// What is known of a device.
    fn row(&self, device: &DeviceId) -> Row;

    /// Keeps in mind, not on disk, how far Redis says that the device's past is dead.
    fn hear(&self, device: &DeviceId, bound: Bound);

    /// The device's row in Redis is none that one of our instances has written.
    fn doubt(&self, device: &DeviceId);

    /// Keeps what stands in Redis now that it was told; others are to hear of it.
    fn learn(&self, rows: Vec<(DeviceId, Row)>, now: Now);
}

/// Which store answers at this moment.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Status {
    /// Redis is configured.
    pub redis_enabled: bool,
    /// Redis is configured and serves.
    pub redis_serves: bool,
    /// Memory does not serve in its place.
    pub redis_required: bool,
    /// Why Redis does not serve.
    pub away: Option<Down>,
    /// Why a part of Redis is out of reach, while the rest serves.
    pub missing: Option<String>,
    /// Another CA than ours is entered in Redis.
    pub foreign_ca: bool,
    /// What Redis serves with, and should not.
    pub warnings: Arc<[String]>,
    /// The store that serves has no room for another token.
    pub full: bool,
    /// Fewer replicas than are to have it had the mark of the latest redemption.
    pub lacks_replicas: bool,
    /// How often Redis was lost, or its connection doubted.
    pub losses: u64,
    /// Since when the store that serves does, by `Now::mono_ms`; `None` where there is no other.
    pub since_ms: Option<u64>,
    /// How long its answers take at present; nothing for one that is here.
    pub round_trip: Duration,
    /// How far our wall clock is ahead of that of Redis, or was when that was last asked.
    pub clock_is_ahead_ms: i64,
}

/// What an operation ended in.
pub type Answer = Result<Outcome, StoreError>;

/// A store of tokens.
pub trait TokenStore: Send + Sync {
    /// Runs the operations and gives one answer for each, in their order. An error of one is never
    /// an error of another.
    fn run(&self, ops: &[Op], now: Now) -> Vec<Answer>;

    /// Which store answers.
    fn status(&self) -> Status;
}
