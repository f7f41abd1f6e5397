//! One record over all instances: what one of them signs, revokes or changes, all others know.
//!
//! Every instance keeps the whole record on its own disk and answers from there, also while Redis is
//! away. Redis is how instances exchange it, never where it is kept: values stand in hashes, and a
//! stream names what has changed. Merging takes nothing back, so no order of messages, no loss and no
//! older Redis makes instances disagree for good. What each rule is good for is shown by
//! `docs/model/record.py`.
//!
//! One thread ([`thread`]) does all of it, over an [`exchange::Exchange`] of its own: it tells what is
//! new here ([`out`]), takes in what is new elsewhere ([`inward`]), and compares everything where the
//! stream of names cannot be trusted ([`whole`]). Nobody else waits for it, but who must know what
//! another instance has of a device ([`Sharing::look_up`]).

mod codec;
mod exchange;
mod inward;
mod out;
pub(crate) mod redis;
pub(crate) mod thread;
mod whole;

use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::exchange::Name;
use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::Token;
use crate::locks::locked;
use crate::serial::Serial;
use crate::store::StoreError;

/// An instance that has read nothing for so long may miss a holder, the name of a device's newest
/// certificate in Redis: it expires after twice this time.
const STALE_MS: u64 = 300_000;
/// How long a caller waits for the sharing thread: as long as the default of `REDIS_TIMEOUT_MS`.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a return to Redis is delayed until what was announced meanwhile is merged; an instance that
/// served from memory instead would not know it either.
const CATCH_UP: Duration = Duration::from_secs(10);

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
    /// Why nothing is exchanged.
    pub trouble: Option<String>,
}

/// What the rest of the program knows of the sharing thread.
#[derive(Debug)]
pub struct Sharing {
    mode: Mode,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// There is something to do.
    woken: bool,
    /// These wait for the end of the turn that is begun next, which cannot wait for the end of a pause.
    waiting: Vec<SyncSender<()>>,
    /// Devices of which somebody must know now.
    asked: Vec<Asked>,
    /// Tokens that are used up, with their certificates: their leases go when these are shared.
    leases: Vec<(Serial, Token)>,
    contradicts: bool,
    /// Why nothing is exchanged.
    trouble: Option<StoreError>,
    /// Something was left out that lies where a part of the server is away. It is made up for when all
    /// of it is in reach.
    is_partial: bool,
    /// The server has no room for certificates.
    is_filling: bool,
    ignored: u64,
    /// When all was read that had been announced, by [`Now::mono_ms`].
    read_ms: Option<u64>,
}

/// Somebody waits for what others have of devices, or for a certificate of theirs.
#[derive(Debug)]
struct Asked {
    names: Vec<Name>,
    answer: SyncSender<()>,
}

impl Sharing {
    /// Returns whether nothing is exchanged, so that nobody else knows more.
    pub fn is_alone(&self) -> bool {
        self.mode == Mode::Alone
    }

    /// Before anything was exchanged.
    pub fn new(mode: Mode) -> Self {
        let state = Mutex::new(State { woken: true, ..State::default() });
        Sharing { mode, state, changed: Condvar::new() }
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
        if self.mode != Mode::Record || state.trouble.is_some() || state.read_ms.is_none() {
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
        self.ask(devices.iter().cloned().map(Name::Row).collect())
    }

    /// The same, for one certificate.
    pub fn look_up_one(&self, serial: Serial) -> bool {
        self.ask(vec![Name::Certificate(serial)])
    }

    fn ask(&self, names: Vec<Name>) -> bool {
        let (answer, answered) = sync_channel(1);
        {
            let mut state = self.lock();
            if self.mode == Mode::Alone || state.trouble.is_some() {
                return false;
            }
            state.asked.push(Asked { names, answer });
            state.woken = true;
            self.changed.notify_all();
        }
        answered.recv_timeout(PATIENCE).is_ok()
    }

    /// Waits until whatever was announced in a long absence is known here, or cannot be had, or takes
    /// longer than ten seconds: before that, an onboarding would not see what others have signed
    /// meanwhile (`docs/model`, row r19).
    pub fn catch_up(&self, now: Now) {
        let (end, ended) = sync_channel(0);
        {
            let mut state = self.lock();
            let fresh = |read| now.mono_ms.saturating_sub(read) <= STALE_MS;
            if self.mode != Mode::Record || state.read_ms.is_some_and(fresh) {
                return;
            }
            state.waiting.push(end);
            state.woken = true;
            self.changed.notify_all();
        }
        // It is never sent anything, but dropped.
        let _ = ended.recv_timeout(CATCH_UP);
    }

    /// How it is.
    pub fn status(&self, now: Now) -> Status {
        let state = self.lock();
        Status {
            shared: self.mode == Mode::Record
                && state.trouble.is_none()
                && !state.is_partial
                && !state.is_filling
                && !state.contradicts
                && state.read_ms.is_some(),
            behind_ms: match self.mode {
                Mode::Alone => 0,
                _ => now.mono_ms.saturating_sub(state.read_ms.unwrap_or(0)),
            },
            ignored: state.ignored,
            contradicts: state.contradicts,
            trouble: state.trouble.as_ref().map(ToString::to_string),
        }
    }

    /// In place of the thread: the devices of which the next one who asks wants to know. He is answered.
    #[cfg(test)]
    pub fn answer_next(&self) -> Vec<DeviceId> {
        let nobody = |state: &mut State| state.asked.is_empty();
        let waited = self.changed.wait_while(self.lock(), nobody);
        let asked = waited.unwrap_or_else(PoisonError::into_inner).asked.remove(0);
        let _ = asked.answer.send(()); // he may have given up
        let of_row = |name| if let Name::Row(device) = name { Some(device) } else { None };
        asked.names.into_iter().filter_map(of_row).collect()
    }

    /// Waits until there is something to do, at most so long. Returns who waits for the end of the turn.
    fn wait(&self, longest: Duration) -> Vec<SyncSender<()>> {
        let idle = |state: &mut State| !state.woken;
        let waited = self.changed.wait_timeout_while(self.lock(), longest, idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.woken = false;
        std::mem::take(&mut state.waiting)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }
}

#[cfg(test)]
mod tests;
