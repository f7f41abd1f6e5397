//! The process's own table of redemption attempts: what was begun, used or killed here.
//!
//! Every attempt enters its token here before it asks any store, so two attempts of one process
//! never race each other through two stores (`docs/model`, row 7). What is known here as used or
//! killed is refused whatever Redis says, and is written to Redis again whenever Redis returns.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::Mutex;

use crate::clock::Now;
use crate::device::DeviceId;
use crate::jwt::{Claims, Token, TokenHash};
use crate::serial::Serial;
use crate::store::{Mark, locked};

/// How long a mark outlives its token, in milliseconds: clocks differ.
const MARGIN_MS: u64 = 60_000;

/// How long a mark lasts that is made now, here and in Redis: the token's whole lifetime and a
/// minute. Were it what the wall clock says is left, one that is ahead for a while would end it
/// early (`docs/model`, row 8). A token that is dated later than now lives for so much longer (row 8b).
pub fn lasts_ms(claims: &Claims, now: Now) -> u64 {
    let ahead_s = claims.iat.saturating_sub(now.unix_s());
    claims.lifetime_s().saturating_add(ahead_s).saturating_mul(1000).saturating_add(MARGIN_MS)
}

/// What became of the latest attempt to redeem a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// An attempt is asking a store.
    Running(Serial),
    /// The attempt got no answer: its mark may stand in Redis, or arrive there yet.
    Unknown(Serial),
    /// The attempt was granted: a certificate is being made or recorded.
    Used(Serial),
    /// Replaced or revoked.
    Killed,
    /// Somebody has deleted it from Redis. Elsewhere it counts as killed.
    Deleted,
}

#[derive(Clone, Debug)]
struct Entry {
    state: State,
    claims: Claims,
    /// When nobody needs to know any more, by [`Now::mono_ms`].
    ends_ms: u64,
}

/// What [`Ledger::begin`] says to a new attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// The token is this attempt's until it ends with `grant`, `release` or `lose`.
    Begun,
    /// Another attempt has it or had it, or the token was killed.
    Spent,
    /// Another attempt's outcome is not known.
    Unknown,
    /// The token was deleted.
    Deleted,
}

/// The table. Bounded; when it is full, the entries that end first go first.
#[derive(Debug)]
pub struct Ledger {
    entries: Mutex<HashMap<TokenHash, Entry>>,
    max: usize,
}

impl Ledger {
    /// A table of at most `max` entries.
    pub fn new(max: usize) -> Self {
        Ledger { entries: Mutex::new(HashMap::new()), max }
    }

    /// Enters a token that a certificate on disk was issued for.
    pub fn load(&self, hash: TokenHash, serial: Serial, claims: Claims, now: Now) {
        self.put(hash, State::Used(serial), claims, now);
    }

    /// Takes the token for an attempt. `over_unknown` takes it also from one whose outcome is not
    /// known: only for who is sure that no other store will grant that one.
    pub fn begin(&self, token: &Token, serial: Serial, over_unknown: bool, now: Now) -> Begin {
        let mut entries = locked(&self.entries);
        match entries.get(&token.hash).map(|entry| entry.state) {
            Some(State::Unknown(_)) if !over_unknown => return Begin::Unknown,
            Some(State::Deleted) => return Begin::Deleted,
            Some(State::Running(_) | State::Used(_) | State::Killed) => return Begin::Spent,
            Some(State::Unknown(_)) | None => {}
        }
        make_room(&mut entries, self.max);
        let claims = token.claims.clone();
        entries.insert(token.hash, entry(State::Running(serial), claims, now));
        Begin::Begun
    }

    /// The attempt was granted. Returns whether it still holds the token: a kill goes first.
    pub fn grant(&self, hash: &TokenHash, serial: Serial) -> bool {
        self.turn(hash, State::Running(serial), State::Used(serial))
    }

    /// The attempt got no answer.
    pub fn lose(&self, hash: &TokenHash, serial: Serial) {
        self.turn(hash, State::Running(serial), State::Unknown(serial));
    }

    /// The attempt ended without a certificate: the token is free again, unless it was killed.
    pub fn release(&self, hash: &TokenHash, serial: Serial) {
        self.remove_if(hash, &[State::Running(serial), State::Used(serial)]);
    }

    /// The mark of the attempt without an answer was withdrawn: the token is free again, unless
    /// another attempt has it by now.
    pub fn release_unknown(&self, hash: &TokenHash, serial: Serial) {
        self.remove_if(hash, &[State::Unknown(serial)]);
    }

    /// The token was replaced or revoked; final.
    pub fn kill(&self, hash: TokenHash, claims: Claims, now: Now) {
        self.put(hash, State::Killed, claims, now);
    }

    /// Whether a token of the device is or was used or killed here. Looks at every entry: for what is
    /// seldom asked.
    pub fn knows_device(&self, device: &DeviceId) -> bool {
        locked(&self.entries).values().any(|entry| entry.claims.device_id == *device)
    }

    /// Somebody has deleted the token from Redis; final.
    pub fn delete(&self, hash: TokenHash, claims: Claims, now: Now) {
        self.put(hash, State::Deleted, claims, now);
    }

    /// Used or killed here, or about to be.
    pub fn knows_as_spent(&self, hash: &TokenHash) -> bool {
        matches!(self.state(hash), Some(State::Running(_) | State::Used(_) | State::Killed))
    }

    /// Killed here.
    pub fn knows_as_killed(&self, hash: &TokenHash) -> bool {
        self.state(hash) == Some(State::Killed)
    }

    /// Deleted from Redis by somebody, as was seen here.
    pub fn knows_as_deleted(&self, hash: &TokenHash) -> bool {
        self.state(hash) == Some(State::Deleted)
    }

    fn state(&self, hash: &TokenHash) -> Option<State> {
        locked(&self.entries).get(hash).map(|entry| entry.state)
    }

    /// The tokens that need a mark in Redis.
    pub fn marked(&self) -> Vec<TokenHash> {
        let entries = locked(&self.entries);
        entries.iter().filter(|(_, e)| mark(e.state).is_some()).map(|(hash, _)| *hash).collect()
    }

    /// The mark that the token should have in Redis, and its claims.
    pub fn mark_of(&self, hash: &TokenHash) -> Option<(Mark, Claims)> {
        let entries = locked(&self.entries);
        let entry = entries.get(hash)?;
        Some((mark(entry.state)?, entry.claims.clone()))
    }

    /// Drops what has ended; returns when the next entry ends, if there is one.
    pub fn reap(&self, now: Now) -> Option<u64> {
        let mut entries = locked(&self.entries);
        let ended = |e: &Entry| e.ends_ms <= now.mono_ms && !matches!(e.state, State::Running(_));
        entries.retain(|_, e| !ended(e));
        if entries.capacity() > 1024 && entries.len() < entries.capacity() / 8 {
            entries.shrink_to_fit();
        }
        entries.values().map(|e| e.ends_ms).filter(|&ends| ends > now.mono_ms).min()
    }

    fn put(&self, hash: TokenHash, state: State, claims: Claims, now: Now) {
        let mut entries = locked(&self.entries);
        make_room(&mut entries, self.max);
        entries.insert(hash, entry(state, claims, now));
    }

    fn remove_if(&self, hash: &TokenHash, states: &[State]) {
        let mut entries = locked(&self.entries);
        if let Slot::Occupied(slot) = entries.entry(*hash)
            && states.contains(&slot.get().state)
        {
            slot.remove();
        }
    }

    fn turn(&self, hash: &TokenHash, from: State, to: State) -> bool {
        let mut entries = locked(&self.entries);
        let entry = entries.get_mut(hash).filter(|entry| entry.state == from);
        entry.map(|entry| entry.state = to).is_some()
    }
}

fn entry(state: State, claims: Claims, now: Now) -> Entry {
    let ends_ms = now.mono_ms.saturating_add(lasts_ms(&claims, now));
    Entry { state, claims, ends_ms }
}

fn mark(state: State) -> Option<Mark> {
    match state {
        State::Used(serial) => Some(Mark::Serial(serial)),
        State::Killed | State::Deleted => Some(Mark::Killed),
        State::Running(_) | State::Unknown(_) => None,
    }
}

/// Drops the sixteenth that ends first.
fn make_room(entries: &mut HashMap<TokenHash, Entry>, max: usize) {
    if entries.len() < max.max(16) {
        return;
    }
    let over = |e: &Entry| !matches!(e.state, State::Running(_));
    let ends = entries.values().filter(|e| over(e)).map(|e| e.ends_ms);
    if let Some(last) = first_sixteenth(ends) {
        entries.retain(|_, e| e.ends_ms > last || !over(e));
    }
}

/// When the sixteenth of these has ended that ends first: the search is paid once for so many.
pub fn first_sixteenth(ends: impl Iterator<Item = u64>) -> Option<u64> {
    let mut ends: Vec<u64> = ends.collect();
    let last = ends.len() / 16;
    (last < ends.len()).then(|| *ends.select_nth_unstable(last).1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jwt::Signer;

    fn at(s: u64) -> Now {
        Now { unix_ms: 1_800_000_000_000 + s * 1000, mono_ms: s * 1000 }
    }

    fn token(name: &str, ttl: u64) -> Token {
        let device_id = DeviceId::parse(name).unwrap();
        let iat = at(0).unix_s();
        Signer::new(b"secret").sign(Claims { device_id, iat, exp: iat + ttl, jti: None })
    }

    fn serial(n: u8) -> Serial {
        Serial::from([n; 16])
    }

    #[test]
    fn one_attempt_at_a_time() {
        let ledger = Ledger::new(100);
        let t = token("d", 300);
        assert_eq!(ledger.begin(&t, serial(1), false, at(0)), Begin::Begun);
        assert_eq!(ledger.begin(&t, serial(2), true, at(0)), Begin::Spent);
        ledger.release(&t.hash, serial(2));
        assert!(ledger.knows_as_spent(&t.hash), "only its own attempt releases it");
        ledger.release(&t.hash, serial(1));
        assert_eq!(ledger.begin(&t, serial(2), false, at(0)), Begin::Begun);
        assert!(ledger.grant(&t.hash, serial(2)));
        assert_eq!(ledger.begin(&t, serial(3), true, at(0)), Begin::Spent);
        assert_eq!(ledger.marked(), [t.hash]);
    }

    #[test]
    fn a_lost_attempt_is_unknown_until_it_is_released_or_taken_over() {
        let ledger = Ledger::new(100);
        let t = token("d", 300);
        ledger.begin(&t, serial(1), false, at(0));
        ledger.lose(&t.hash, serial(1));
        assert_eq!(ledger.begin(&t, serial(2), false, at(0)), Begin::Unknown);
        assert!(!ledger.knows_as_spent(&t.hash));
        assert!(ledger.marked().is_empty());
        assert_eq!(ledger.begin(&t, serial(2), true, at(0)), Begin::Begun);
        ledger.release_unknown(&t.hash, serial(1));
        assert!(ledger.knows_as_spent(&t.hash), "the late end of the lost attempt changes nothing");
    }

    #[test]
    fn a_kill_is_final() {
        let ledger = Ledger::new(100);
        let t = token("d", 300);
        ledger.begin(&t, serial(1), false, at(0));
        ledger.kill(t.hash, t.claims.clone(), at(0));
        assert!(!ledger.grant(&t.hash, serial(1)));
        ledger.release(&t.hash, serial(1));
        assert!(ledger.knows_as_killed(&t.hash));
        assert_eq!(ledger.mark_of(&t.hash), Some((Mark::Killed, t.claims)));
    }

    #[test]
    fn a_deleted_token_is_refused_as_such_and_killed_elsewhere() {
        let ledger = Ledger::new(100);
        let t = token("d", 300);
        ledger.delete(t.hash, t.claims.clone(), at(0));
        assert_eq!(ledger.begin(&t, serial(1), true, at(0)), Begin::Deleted);
        assert!(!ledger.knows_as_spent(&t.hash), "nobody used it");
        assert_eq!(ledger.mark_of(&t.hash), Some((Mark::Killed, t.claims)));
    }

    #[test]
    fn a_device_is_known_until_its_tokens_are_forgotten() {
        let ledger = Ledger::new(100);
        let [one, two] = ["d", "e"].map(|name| token(name, 300));
        let known = |name| ledger.knows_device(&DeviceId::parse(name).unwrap());
        assert!(!known("d"));
        ledger.kill(one.hash, one.claims.clone(), at(0));
        ledger.begin(&two, serial(1), false, at(0));
        assert_eq!(["d", "e", "f"].map(known), [true, true, false]);
        ledger.reap(at(1000));
        assert!(!known("d"));
    }

    #[test]
    fn entries_last_a_lifetime_and_a_minute() {
        let ledger = Ledger::new(100);
        let t = token("d", 300);
        ledger.kill(t.hash, t.claims.clone(), at(10));
        assert_eq!(ledger.reap(at(11)), Some(370_000));
        assert_eq!(ledger.reap(at(369)), Some(370_000));
        assert_eq!(ledger.reap(at(370)), None);
        assert!(!ledger.knows_as_spent(&t.hash));
    }

    #[test]
    fn an_entry_lasts_until_a_token_of_the_future_has_ended() {
        let t = token("d", 300);
        assert_eq!(lasts_ms(&t.claims, at(200)), 360_000, "counted from now on");
        let early = Now { unix_ms: at(0).unix_ms - 600_000, mono_ms: 0 };
        assert_eq!(lasts_ms(&t.claims, early), 960_000);
    }

    #[test]
    fn a_wall_clock_that_is_ahead_ends_no_entry() {
        let ledger = Ledger::new(100);
        let t = token("d", 300);
        let ahead = Now { unix_ms: at(86_400).unix_ms, mono_ms: at(10).mono_ms };
        ledger.kill(t.hash, t.claims.clone(), ahead);
        ledger.reap(at(290));
        assert!(ledger.knows_as_killed(&t.hash), "the clock was set right, the token is live");
    }

    #[test]
    fn a_full_table_drops_what_ends_first() {
        let ledger = Ledger::new(64);
        let tokens: Vec<_> = (0..200).map(|n| token(&format!("d{n}"), 100 + n)).collect();
        for t in &tokens {
            ledger.kill(t.hash, t.claims.clone(), at(0));
        }
        assert!(ledger.marked().len() <= 64);
        assert!(tokens.iter().rev().take(56).all(|t| ledger.knows_as_killed(&t.hash)));
        assert!(!ledger.knows_as_killed(&tokens[0].hash));
    }
}
