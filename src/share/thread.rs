//! The sharing thread: when it looks for work, and what becomes of failures.
//!
//! It looks twice a second, and at once when it is woken: a connection that is blocked in a read could
//! not tell what is signed here before the read ends, and another one for that is one more of the few that
//! a managed server allows. A blocked read would have to end as often, for what is due here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::codec::Keys;
use super::exchange::{Exchange, Name};
use super::{Mode, Sharing};
use crate::ca::publisher::Publisher;
use crate::ca::record::Record;
use crate::clock::{self, Now};
use crate::devices::table::Devices;
use crate::jwt::Token;
use crate::serial::Serial;
use crate::store::ledger::Ledger;
use crate::store::{DownKind, Op, StoreError, TokenStore};

/// Longest pause between two looks for work.
const TURN: Duration = Duration::from_millis(500);
/// Pause after a failure, doubled up to the second, which is also that where the server refuses.
const RETRY_MS: (u64, u64) = (100, 5_000);
/// Names told or read at once: some 100 KB.
pub(super) const BATCH: usize = 128;

/// What the thread works with.
pub struct Parts<E> {
    /// The way to the other instances.
    pub exchange: E,
    /// Where the rest of the program asks how it is.
    pub sharing: Arc<Sharing>,
    /// Has the record, and publishes what is revoked.
    pub publisher: Arc<Publisher>,
    pub devices: Arc<Devices>,
    /// Frees the leases of tokens that are used up.
    pub store: Arc<dyn TokenStore>,
    /// Is told of tokens that others have redeemed.
    pub ledger: Arc<Ledger>,
    /// Whether a device may have two certificates that a token paid for.
    pub reenroll: bool,
}

pub struct Thread<E> {
    pub(super) parts: Parts<E>,
    pub(super) progress: Progress,
}

/// One look for work.
pub(super) struct Turn<'a, E> {
    pub parts: &'a mut Parts<E>,
    pub progress: &'a mut Progress,
    pub keys: Keys,
    /// Certificates and revocations are exchanged; otherwise the rows of devices only.
    pub shares_record: bool,
    /// When it began: by this is judged what is read in it.
    pub now: Now,
}

/// How far it has come.
#[derive(Default)]
pub(super) struct Progress {
    connected: bool,
    /// The server run with which everything is compared.
    run_id: Option<String>,
    /// What is still to be compared; nothing if everything was.
    pub comparison: Option<Comparison>,
    /// The rows that were known here when it was begun, by the hash in which they stand.
    pub rows: BTreeMap<String, Vec<Name>>,
    /// When the next full comparison is due, by [`Now::mono_ms`].
    pub compare_ms: u64,
    /// So often was halved what is told or read at once: over a slow line less gets through in time.
    pub halvings: u32,
    /// The place in the stream up to which everything was read.
    pub cursor: String,
    /// What is still to be told.
    pub unsent: BTreeSet<Name>,
    /// What is to be told where a part of the server is away.
    pub aside: BTreeSet<Name>,
    /// When that is next looked for, by [`Now::mono_ms`].
    pub look_ms: u64,
    /// What was told and not read again yet: our own words need not be looked up.
    pub told: BTreeSet<Name>,
    /// Names with no value that our instances have written. Each is announced once, so that an
    /// instance with the true value writes it again; not for ever, for there may be none.
    pub doubted: BTreeSet<Name>,
    /// Certificates that were found and have ended too long ago to be kept.
    pub passed: BTreeSet<Serial>,
    /// Something was revoked that the published list does not name yet.
    pub crl_is_due: bool,
    /// Nothing is tried before, by [`Now::mono_ms`].
    retry_ms: u64,
    failures: u32,
    /// When values that are not ours were last told of.
    pub warned_ms: Option<u64>,
    /// Whether the server was filling, and when it was asked.
    pub filling: bool,
    pub filling_ms: Option<u64>,
}

/// How far a comparison has come.
#[derive(Clone, Default)]
pub(super) struct Comparison {
    /// Where the stream ended when it was begun; `None` before.
    pub cursor: Option<String>,
    /// So many of the hashes were compared.
    pub done: usize,
}

impl Progress {
    /// All of it is to be compared, from the beginning.
    pub fn begin_anew(&mut self) {
        self.comparison = Some(Comparison::default());
    }

    /// What was entered there when we connected may be gone as well.
    pub fn distrust(&mut self) {
        self.connected = false;
        self.begin_anew();
    }

    /// So many names or hashes at once, where the line is good for `most`.
    pub fn at_once(&self, most: usize) -> usize {
        (most >> self.halvings).max(1)
    }
}

impl<E: Exchange> Thread<E> {
    /// Before anything was exchanged.
    pub fn new(parts: Parts<E>) -> Self {
        let mut progress = Progress::default();
        progress.begin_anew();
        Thread { parts, progress }
    }

    /// Shares for as long as the process lives.
    pub fn run(mut self) {
        loop {
            // They are told of the end of the turn by being dropped.
            let waiting = self.parts.sharing.wait(TURN);
            let now = clock::now();
            if !waiting.is_empty() || now.mono_ms >= self.progress.retry_ms {
                self.attempt(now);
            }
        }
    }

    /// One look for work.
    pub(super) fn attempt(&mut self, now: Now) {
        let Some(mut turn) = self.turn(now) else { return };
        let outcome = turn.revoke_killed().and_then(|()| turn.exchange());
        if std::mem::take(&mut turn.progress.crl_is_due) {
            // What went wrong is logged and kept there, and tried again.
            let _ = turn.parts.publisher.publish(clock::now());
        }
        match outcome {
            Ok(()) => turn.succeeded(),
            Err(error) => turn.failed(error),
        }
    }

    /// Nothing is exchanged before there is a CA and a clock by which what comes in can be judged.
    pub(super) fn turn(&mut self, now: Now) -> Option<Turn<'_, E>> {
        let Thread { parts, progress } = self;
        let ca = parts.publisher.ca();
        let issuer = ca.issuer().filter(|_| ca.clock_is_plausible(now))?;
        let fp = issuer.fingerprint().chars().take(8).collect();
        let keys = Keys { mac: issuer.mac_key.clone(), fp };
        let shares_record = parts.sharing.mode == Mode::Record;
        Some(Turn { parts, progress, keys, shares_record, now })
    }
}

impl<E: Exchange> Turn<'_, E> {
    fn exchange(&mut self) -> Result<(), StoreError> {
        self.look_for_more()?;
        if !self.progress.connected {
            self.connect()?;
        }
        if self.progress.comparison.is_none() && self.now.mono_ms >= self.progress.compare_ms {
            self.progress.begin_anew();
        }
        while let Some(comparison) = self.progress.comparison.clone() {
            self.compare(comparison)?;
        }
        let asked = self.asked();
        // First: nothing is told where it cannot be announced.
        self.read()?;
        self.send()?;
        if self.progress.filling {
            self.is_filling()?; // that there is room again is not seen where nothing is to be told
        }
        self.answer(asked)
    }

    pub(super) fn record(&self) -> &Record {
        self.parts.publisher.ca().record()
    }

    /// What is away is looked for, while the rest is shared.
    fn look_for_more(&mut self) -> Result<(), StoreError> {
        let progress = &mut *self.progress;
        if progress.connected && self.now.mono_ms >= progress.look_ms {
            progress.look_ms = self.now.mono_ms + RETRY_MS.1;
            progress.connected = !self.parts.exchange.can_reach_more()?;
        }
        Ok(())
    }

    pub(super) fn reaches(&self, name: &Name) -> bool {
        self.reaches_hash(&self.keys.place(name).key)
    }

    /// Whether what stands in this hash can be asked for; else it is left out for now.
    pub(super) fn reaches_hash(&self, key: &str) -> bool {
        let reaches = self.parts.exchange.reaches(key);
        self.parts.sharing.lock().is_partial |= !reaches;
        reaches
    }

    fn connect(&mut self) -> Result<(), StoreError> {
        let shares_record = self.shares_record;
        let (run_id, shared) = self.parts.exchange.connect(&self.keys.fp, shares_record)?;
        let was_partial = {
            let mut state = self.parts.sharing.lock();
            state.contradicts = shared != shares_record;
            std::mem::take(&mut state.is_partial)
        };
        let progress = &mut *self.progress;
        progress.connected = true;
        progress.unsent.append(&mut progress.aside);
        // Another run may have come back with older data (`docs/model`, row r6).
        if was_partial || run_id.is_none() || run_id != progress.run_id {
            progress.begin_anew();
        }
        progress.run_id = run_id;
        Ok(())
    }

    fn succeeded(&mut self) {
        (self.progress.failures, self.progress.halvings) = (0, 0);
        if self.parts.sharing.lock().trouble.take().is_some_and(|trouble| !is_lost(&trouble)) {
            log::info!("the record is shared through {} again", E::NAME);
        }
    }

    /// What is still to be told stays noted. Nobody is kept waiting for it.
    fn failed(&mut self, error: StoreError) {
        let (progress, lost) = (&mut *self.progress, is_lost(&error));
        let mut state = self.parts.sharing.lock();
        let mut pause_ms = RETRY_MS.1;
        if lost {
            log::debug!("the record is not shared now: {error}");
            // Without the part that was lost just now, the rest goes on.
            progress.connected &= error.is_part();
            progress.look_ms = 0;
            progress.halvings = (progress.halvings + 1).min(BATCH.ilog2());
            pause_ms = (RETRY_MS.0 << progress.failures.min(6)).min(RETRY_MS.1);
        } else if state.trouble.as_ref().is_none_or(is_lost) {
            log::warn!("the record is not shared through {}, tokens are: {error}", E::NAME);
        }
        progress.failures += 1;
        progress.retry_ms = clock::now().mono_ms + pause_ms;
        state.asked.clear();
        // A connection that was cut may be made again at once; until then leases stay.
        if !lost || progress.failures > 1 {
            state.trouble = Some(error);
            let leases = std::mem::take(&mut state.leases);
            drop(state);
            self.free(leases);
        }
    }

    pub(super) fn free(&self, leases: Vec<(Serial, Token)>) {
        if !leases.is_empty() {
            let ops: Vec<Op> = leases.into_iter().map(|(_, token)| Op::Remove(token)).collect();
            self.parts.store.run(&ops, clock::now());
        }
    }
}

/// The connection is lost, or others were faster all the time; else the server refuses.
fn is_lost(error: &StoreError) -> bool {
    match error {
        StoreError::Down(down) => down.kind != DownKind::Refused,
        error => *error == StoreError::Undecided,
    }
}
