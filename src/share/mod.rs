//! One record over all instances: what one of them signs, revokes or changes, all others know.
//!
//! Every instance keeps the whole record on its own disk and answers from there, also while Redis is
//! away. Redis is how instances exchange it, never where it is kept: values stand in hashes, and a
//! stream names what has changed. Merging takes nothing back, so no order of messages, no loss and no
//! older Redis makes instances disagree for good. What each rule is good for is shown by
//! `docs/model/record.py`.
//!
//! One thread ([`thread`]) does all of it, over an [`Exchange`] of its own; nobody else waits for it,
//! but who must know what another instance has of a device ([`Sharing::look_up`]).

mod codec;
pub mod redis;
pub mod thread;

use std::fmt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::Token;
use crate::serial::Serial;

/// An instance that has read nothing for so long may have missed a holder, which lives for twice as
/// long.
const STALE_MS: u64 = 300_000;
/// Longest that somebody waits for an answer to what was asked; as `REDIS_TIMEOUT_MS` is.
const PATIENCE: Duration = Duration::from_secs(1);

/// What stands in Redis under a place of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// A certificate.
    Certificate(Serial),
    /// That a certificate is revoked.
    Revocation(Serial),
    /// What is kept of a device by itself.
    Row(DeviceId),
}

/// A field of a hash, without the prefix of all keys.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The hash.
    pub key: String,
    /// The field.
    pub field: String,
}

/// A value that is set if the place still holds what was seen there; nothing is the empty value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    /// Where.
    pub place: Place,
    /// What was seen.
    pub seen: Vec<u8>,
    /// What is to stand there.
    pub value: Vec<u8>,
}

/// What is told in one go: the values stand when they are announced.
#[derive(Clone, Debug, Default)]
pub struct News {
    /// Values that never change, set where there is none.
    pub new: Vec<(Place, Vec<u8>)>,
    /// Values that do.
    pub swaps: Vec<Swap>,
    /// The newest certificate of each of these devices.
    pub holders: Vec<(DeviceId, Serial)>,
    /// What is announced.
    pub names: Vec<Name>,
}

/// What became of it: whether each value stands there now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// One for each of [`News::new`].
    pub new: Vec<bool>,
    /// One for each of [`News::swaps`].
    pub swaps: Vec<bool>,
}

/// What was announced after a place in the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The names, by whoever announced them.
    pub names: Vec<Name>,
    /// The place after them.
    pub cursor: String,
    /// Entries are gone that were not read, or the stream is an older one.
    pub gap: bool,
    /// There may be more.
    pub more: bool,
}

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Changes with every start of the server; `None` if it may not be asked.
    pub run_id: Option<String>,
    /// Whether the record is shared, as the first instance has entered it.
    pub shares_record: Option<bool>,
}

/// Why something could not be exchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection is lost.
    Lost(String),
    /// The server refuses: a right is missing, or it is full.
    Refused(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Lost(why) | Fault::Refused(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Fault {}

/// Where instances exchange what they know. Only the sharing thread uses it; each call is one round
/// trip.
pub trait Exchange: Send {
    /// Connects anew.
    ///
    /// # Errors
    /// Why the server cannot be used.
    fn connect(&mut self, fp: &str, shares_record: bool) -> Result<Hello, Fault>;

    /// Where the stream ends.
    ///
    /// # Errors
    /// As all of these: when the server does not answer, or not what was asked.
    fn end(&mut self, fp: &str) -> Result<String, Fault>;

    /// What was announced after `cursor`.
    ///
    /// # Errors
    /// As above.
    fn changes(&mut self, fp: &str, cursor: &str) -> Result<Changes, Fault>;

    /// The fields of these hashes.
    ///
    /// # Errors
    /// As above.
    fn fields(&mut self, keys: &[String]) -> Result<Vec<String>, Fault>;

    /// The fields of these hashes and their values.
    ///
    /// # Errors
    /// As above.
    fn all(&mut self, keys: &[String]) -> Result<Vec<(String, Vec<u8>)>, Fault>;

    /// What stands in these places; nothing is the empty value.
    ///
    /// # Errors
    /// As above.
    fn values(&mut self, places: &[Place]) -> Result<Vec<Vec<u8>>, Fault>;

    /// Sets values, then the holders, then announces the names.
    ///
    /// # Errors
    /// As above. Part of it may have been done.
    fn tell(&mut self, fp: &str, news: &News) -> Result<Told, Fault>;

    /// The newest certificates of these devices, if they were signed lately.
    ///
    /// # Errors
    /// As above.
    fn holders(&mut self, devices: &[DeviceId]) -> Result<Vec<Option<Serial>>, Fault>;

    /// Removes these values.
    ///
    /// # Errors
    /// As above.
    fn remove(&mut self, places: &[Place]) -> Result<(), Fault>;

    /// So much of its memory is used that certificates are not put there any more.
    ///
    /// # Errors
    /// As above.
    fn is_filling(&mut self) -> Result<bool, Fault>;
}

/// What is exchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: there is no Redis.
    #[default]
    Alone,
    /// The rows of devices (`SHARE_RECORD=false`).
    Rows,
    /// These, and certificates with their revocations.
    Record,
}

/// How it is with sharing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Everything known here is in Redis, and the other way round, or will be in a moment.
    pub shared: bool,
    /// For how long nothing was read.
    pub behind_ms: u64,
    /// Values that none of our instances has written, since the start.
    pub ignored: u64,
    /// Other instances on this Redis have another `SHARE_RECORD`.
    pub contradicts: bool,
}

/// What the rest of the program knows of the sharing thread.
#[derive(Debug)]
pub struct Sharing {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// There is something to do.
    woken: bool,
    /// It cannot wait for the end of a pause.
    hurry: bool,
    /// Devices of which somebody must know now.
    asked: Vec<Asked>,
    /// Tokens that are used up, with their certificates: their leases go when these are shared.
    leases: Vec<(Serial, Token)>,
    mode: Mode,
    contradicts: bool,
    /// Why nothing is exchanged.
    trouble: Option<Fault>,
    ignored: u64,
    /// When all was read that had been announced, by [`Now::mono_ms`].
    read_ms: Option<u64>,
    /// Attempts to connect that have been begun, and that have ended.
    begun: u64,
    ended: u64,
}

/// Somebody waits for what others have of a device.
#[derive(Debug)]
struct Asked {
    devices: Vec<DeviceId>,
    answer: SyncSender<()>,
}

impl Sharing {
    /// Before anything was exchanged.
    pub fn new(mode: Mode) -> Self {
        let state = Mutex::new(State { mode, woken: true, ..State::default() });
        Sharing { state, changed: Condvar::new() }
    }

    /// There is something to tell.
    pub fn wake(&self) {
        self.lock().woken = true;
        self.changed.notify_all();
    }

    /// The token is used up, and its certificate recorded: its lease is to go as soon as this is
    /// shared. Gives the token back where the record is not shared: it may go at once.
    pub fn free_when_shared(&self, serial: Serial, token: Token) -> Option<Token> {
        let mut state = self.lock();
        if state.mode != Mode::Record || state.trouble.is_some() || state.read_ms.is_none() {
            return Some(token);
        }
        state.leases.push((serial, token));
        state.woken = true;
        self.changed.notify_all();
        None
    }

    /// Waits until all that was changed here is told, and the record knows the newest certificate of
    /// each of these devices, whoever has signed it. `false` if there is nobody to ask.
    pub fn look_up(&self, devices: &[DeviceId]) -> bool {
        let (answer, answered) = sync_channel(1);
        {
            let mut state = self.lock();
            if state.mode == Mode::Alone || state.trouble.is_some() {
                return false;
            }
            state.asked.push(Asked { devices: devices.to_vec(), answer });
            state.woken = true;
            self.changed.notify_all();
        }
        answered.recv_timeout(PATIENCE).is_ok()
    }

    /// Waits until whatever was announced in a long absence is known here, or cannot be had: before
    /// that, an onboarding would not see what others have signed meanwhile (`docs/model`, row r19).
    pub fn catch_up(&self, now: Now) {
        let mut state = self.lock();
        let fresh = |read| now.mono_ms.saturating_sub(read) <= STALE_MS;
        if state.mode != Mode::Record || state.read_ms.is_some_and(fresh) {
            return;
        }
        let next = state.begun + 1;
        (state.woken, state.hurry) = (true, true);
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| state.ended < next));
    }

    /// How it is.
    pub fn status(&self, now: Now) -> Status {
        let state = self.lock();
        Status {
            shared: state.mode == Mode::Record
                && state.trouble.is_none()
                && state.read_ms.is_some(),
            behind_ms: match state.mode {
                Mode::Alone => 0,
                _ => now.mono_ms.saturating_sub(state.read_ms.unwrap_or(0)),
            },
            ignored: state.ignored,
            contradicts: state.contradicts,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
