//! Tokens in memory: a bounded map, the leases of the devices, and the reaper.
//!
//! Alone it is the store of a service without Redis. Behind `failover` it holds the copies of what
//! this instance issued. It keeps the claims of a token, not the token: signing them again gives
//! the same token, at half the memory. Tokens age by the monotonic clock.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::clock::{self, Now};
use crate::device::DeviceId;
use crate::jwt::{Claims, Signer, Token, TokenHash};
use crate::serial::Serial;
use crate::store::ledger::{Begin, Ledger, first_sixteenth};
use crate::store::{
    Answer, Dead, Kill, New, Op, Outcome, Rows, Seen, Status, StoreError, TokenStore, dated, locked,
};
use crate::subscriber::{Counts, Subscriber};

/// A subscriber may hold so many times as many tokens that no other place has as are free. Alone it gets three quarters of
/// all, ten that ask for all they can get leave one in 31, and who holds few is never refused
/// before all is full.
const SHARE: usize = 3;

/// The tokens that this process issued and that are neither used, nor killed, nor expired.
pub struct Memory {
    table: Mutex<Table>,
    /// Wakes the reaper when something ends earlier than it expects.
    sooner: Condvar,
    pub(super) ledger: Arc<Ledger>,
    pub(super) rows: Arc<dyn Rows>,
    pub(super) signer: Signer,
    max: usize,
}

#[derive(Debug, Default)]
struct Table {
    tokens: HashMap<TokenHash, Entry>,
    /// Which token holds the device: its only one, or its latest.
    leases: HashMap<DeviceId, TokenHash>,
    only_here: OnlyHere,
    /// When the reaper means to look again, by [`Now::mono_ms`].
    next_reap_ms: Option<u64>,
}

#[derive(Clone, Debug)]
struct Entry {
    claims: Claims,
    /// By [`Now::mono_ms`].
    ends_ms: u64,
    in_redis: InRedis,
    subscriber: Subscriber,
}

/// What Redis has of a token, as far as is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InRedis {
    /// No command that carries it was sent.
    No,
    /// One is carried over, or was without an answer, to the run of the server that is there now.
    Entering,
    /// One was sent, answered or not.
    Maybe,
    /// Redis has confirmed it, and was not away since.
    Confirmed,
}

/// How many tokens no other place has, and of which subscribers.
#[derive(Debug, Default)]
struct OnlyHere {
    all: usize,
    by_subscriber: Counts,
}

impl OnlyHere {
    fn add(&mut self, entry: &Entry) {
        if entry.in_redis == InRedis::No {
            self.all += 1;
            self.by_subscriber.add(entry.subscriber);
        }
    }

    fn subtract(&mut self, entry: &Entry) {
        if entry.in_redis == InRedis::No {
            self.all -= 1;
            self.by_subscriber.remove(entry.subscriber);
        }
    }
}

/// What memory knows of a live token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Its claims.
    pub claims: Claims,
    /// What is left of its time, in milliseconds.
    pub left_ms: u64,
    /// What Redis has of it.
    pub in_redis: InRedis,
}

impl Memory {
    /// Room for `max` live tokens; attempts are entered in `ledger`.
    pub fn new(max: usize, ledger: Arc<Ledger>, rows: Arc<dyn Rows>, signer: Signer) -> Self {
        Memory { table: Mutex::default(), sooner: Condvar::new(), ledger, rows, signer, max }
    }

    /// Stores the token unless the device has a live one, after its past is dead if it is to die. A
    /// token that would be born dead is dated just after the device's past: whoever raises the bound
    /// later kills what he finds here.
    /// `Full` at the bound, `ShareFull` before it; nothing is evicted.
    pub fn issue(&self, new: &New, now: Now) -> Answer {
        let kill = |kill: &Kill| self.kill(&kill.device, kill.row.bound.t, now).into_iter().next();
        let killed = new.replaces.as_deref().and_then(kill);
        let dead_until = || self.rows.row(&new.token.claims.device_id).bound.t;
        // Of a kill by another instance it may have been read since the copy was made.
        if let t @ 1.. = dead_until() {
            self.kill(&new.token.claims.device_id, t, now);
        }
        let mut table = locked(&self.table);
        if let Some(expires_at_ms) = self.lease(&table, &new.token.claims.device_id, now) {
            return Ok(Outcome::AlreadyActive { expires_at_ms });
        }
        let mut token = new.token.clone();
        let t = dead_until();
        if token.claims.iat <= t {
            token = dated(&token, t.saturating_add(1), &self.signer);
        }
        self.insert(&mut table, &New { token: token.clone(), ..new.clone() }, InRedis::No, now)?;
        Ok(Outcome::Issued { token, killed, found: Box::default() })
    }

    /// Stores a copy of what Redis has, over whatever lease there is. Without room it is left out:
    /// only Redis has it then.
    ///
    /// An older token that Redis had confirmed is forgotten, if it was not away since: since the device's
    /// lease was free, it is used, killed or deleted, and Redis knows which.
    pub fn copy(&self, new: &New, in_redis: InRedis, now: Now) {
        let mut table = locked(&self.table);
        let old = table.leases.get(&new.token.claims.device_id).copied();
        if let (Some(old), InRedis::Confirmed) = (old, in_redis)
            && table.tokens.get(&old).is_some_and(|entry| entry.in_redis == in_redis)
        {
            table.remove(&old);
        }
        let _no_room_is_fine = self.insert(&mut table, new, in_redis, now);
    }

    /// The live tokens of the device, also one that is being redeemed: its certificate may not be
    /// signed yet.
    fn tokens_of(&self, device: &DeviceId, now: Now) -> Vec<Dead> {
        let table = locked(&self.table);
        let meant = |(hash, entry): &(&TokenHash, &Entry)| {
            entry.claims.device_id == *device
                && entry.ends_ms > now.mono_ms
                && !self.ledger.knows_as_killed(hash)
        };
        let copy = |(hash, entry): (&TokenHash, &Entry)| Dead {
            hash: *hash,
            claims: entry.claims.clone(),
        };
        table.tokens.iter().filter(meant).map(copy).collect()
    }

    /// What is here of the device.
    pub fn look(&self, device: &DeviceId, now: Now) -> Seen {
        let iats = self.tokens_of(device, now).into_iter().map(|token| token.claims.iat);
        Seen { latest_iat: iats.max(), ..Seen::default() }
    }

    /// Kills the device's tokens that were issued at `until_s` or before; returns which those were.
    pub fn kill(&self, device: &DeviceId, until_s: u64, now: Now) -> Vec<Dead> {
        let mut killed = self.tokens_of(device, now);
        killed.retain(|dead| dead.claims.iat <= until_s);
        for dead in &killed {
            self.ledger.kill(dead.hash, dead.claims.clone(), now);
            self.remove(&dead.hash);
        }
        killed
    }

    /// The live token, if it was issued here.
    pub fn live(&self, hash: &TokenHash, now: Now) -> Option<Copy> {
        let table = locked(&self.table);
        let entry = table.live(hash, now)?;
        let left_ms = entry.ends_ms.saturating_sub(now.mono_ms);
        Some(Copy { claims: entry.claims.clone(), left_ms, in_redis: entry.in_redis })
    }

    /// What Redis has of the live token, if it was issued here.
    pub(super) fn in_redis(&self, hash: &TokenHash, now: Now) -> Option<InRedis> {
        locked(&self.table).live(hash, now).map(|entry| entry.in_redis)
    }

    /// The tokens issued here that have not expired, used or not.
    pub fn hashes(&self, now: Now) -> Vec<TokenHash> {
        let table = locked(&self.table);
        table.tokens.iter().filter(|(_, e)| e.ends_ms > now.mono_ms).map(|(h, _)| *h).collect()
    }

    /// Notes what Redis has of the token.
    pub fn note_in_redis(&self, hash: &TokenHash, in_redis: InRedis) {
        let mut table = locked(&self.table);
        let Table { tokens, only_here, .. } = &mut *table;
        if let Some(entry) = tokens.get_mut(hash) {
            only_here.subtract(entry);
            entry.in_redis = in_redis;
            only_here.add(entry);
        }
    }

    /// Redis was away, and may have lost what it had confirmed; if it is another run, it never had what
    /// was about to be entered into the one before.
    pub fn doubt_copies(&self, same_run: bool) {
        for entry in locked(&self.table).tokens.values_mut() {
            match entry.in_redis {
                InRedis::Entering if same_run => {}
                InRedis::Entering | InRedis::Confirmed => entry.in_redis = InRedis::Maybe,
                InRedis::No | InRedis::Maybe => {}
            }
        }
    }

    /// Forgets the token and its lease.
    pub fn remove(&self, hash: &TokenHash) {
        locked(&self.table).remove(hash);
    }

    /// How many tokens are live, exact to a second: what has ended is counted until it is reaped.
    pub fn count(&self) -> u64 {
        locked(&self.table).tokens.len() as u64
    }

    /// Whether the bound is reached by tokens that have no other place, expired ones counted out by
    /// the reaper only.
    pub fn is_full(&self) -> bool {
        locked(&self.table).only_here.all >= self.max
    }

    /// Removes what has ended; returns when to come back, by [`Now::mono_ms`].
    pub fn reap(&self, now: Now) -> Option<u64> {
        let by_ledger = self.ledger.reap(now);
        let mut table = locked(&self.table);
        let Table { tokens, leases, only_here, .. } = &mut *table;
        tokens.retain(|_, entry| {
            let lives = entry.ends_ms > now.mono_ms;
            if !lives {
                only_here.subtract(entry);
            }
            lives
        });
        leases.retain(|_, hash| tokens.contains_key(hash));
        if tokens.capacity() > 1024 && tokens.len() < tokens.capacity() / 8 {
            tokens.shrink_to_fit();
            leases.shrink_to_fit();
        }
        let by_tokens = table.tokens.values().map(|entry| entry.ends_ms).min();
        table.next_reap_ms = by_tokens.into_iter().chain(by_ledger).min();
        table.next_reap_ms
    }

    /// The reaper thread: removes what has ended, also when nobody asks; sleeps while there is
    /// nothing to wait for.
    pub fn reap_forever(&self) {
        /// Removing in batches of a second keeps a busy store from being scanned all the time.
        const LEAST_MS: u64 = 1000;
        loop {
            let now = clock::now();
            let next = self.reap(now);
            let table = locked(&self.table);
            let wait = next.map_or(u64::MAX, |at| at.saturating_sub(now.mono_ms).max(LEAST_MS));
            let woken = self.sooner.wait_timeout_while(
                table,
                Duration::from_millis(wait.min(3_600_000)),
                |table| table.next_reap_ms == next,
            );
            drop(woken);
        }
    }

    /// When the device's live token ends, in milliseconds since 1970.
    fn lease(&self, table: &Table, device: &DeviceId, now: Now) -> Option<u64> {
        let hash = table.leases.get(device)?;
        let entry = table.live(hash, now)?;
        let free = self.ledger.knows_as_spent(hash);
        (!free).then(|| entry.claims.exp.saturating_mul(1000))
    }

    fn insert(
        &self,
        table: &mut Table,
        new: &New,
        in_redis: InRedis,
        now: Now,
    ) -> Result<(), StoreError> {
        let New { token, subscriber, .. } = new;
        match in_redis {
            InRedis::No => self.make_room(table, *subscriber)?,
            _ if table.tokens.len() >= self.max => return Err(StoreError::Full),
            _ => {}
        }
        let left = token.claims.exp.saturating_mul(1000).saturating_sub(now.unix_ms);
        let ends_ms = now.mono_ms.saturating_add(left.min(token.claims.lifetime_s() * 1000));
        let claims = token.claims.clone();
        table.put(token.hash, Entry { claims, ends_ms, in_redis, subscriber: *subscriber });
        if table.next_reap_ms.is_none_or(|next| ends_ms < next) {
            table.next_reap_ms = Some(ends_ms);
            self.sooner.notify_all();
        }
        Ok(())
    }

    /// For a token that has no other place: copies of what Redis has give way to it.
    fn make_room(&self, table: &mut Table, subscriber: Subscriber) -> Result<(), StoreError> {
        let free = self.max.saturating_sub(table.only_here.all);
        if free == 0 {
            return Err(StoreError::Full);
        }
        if table.only_here.by_subscriber.of(subscriber) >= free.saturating_mul(SHARE) {
            return Err(StoreError::ShareFull);
        }
        if table.tokens.len() >= self.max {
            table.drop_copies();
        }
        Ok(())
    }
}

impl Table {
    /// Drops the sixteenth of the copies that ends first.
    fn drop_copies(&mut self) {
        let copies = self.tokens.values().filter(|entry| entry.in_redis != InRedis::No);
        if let Some(last) = first_sixteenth(copies.map(|entry| entry.ends_ms)) {
            self.tokens.retain(|_, entry| entry.in_redis == InRedis::No || entry.ends_ms > last);
        }
    }

    fn live(&self, hash: &TokenHash, now: Now) -> Option<&Entry> {
        self.tokens.get(hash).filter(|entry| entry.ends_ms > now.mono_ms)
    }

    /// Enters the token and leases its device to it.
    fn put(&mut self, hash: TokenHash, entry: Entry) {
        self.only_here.add(&entry);
        self.leases.insert(entry.claims.device_id.clone(), hash);
        if let Some(old) = self.tokens.insert(hash, entry) {
            self.only_here.subtract(&old);
        }
    }

    /// Takes the token out; its lease stays.
    fn take(&mut self, hash: &TokenHash) -> Option<Entry> {
        let entry = self.tokens.remove(hash)?;
        self.only_here.subtract(&entry);
        Some(entry)
    }

    fn remove(&mut self, hash: &TokenHash) {
        let Some(entry) = self.take(hash) else { return };
        let device = &entry.claims.device_id;
        if self.leases.get(device) == Some(hash) {
            self.leases.remove(device);
        }
    }
}

impl TokenStore for Memory {
    fn run(&self, ops: &[Op], now: Now) -> Vec<Answer> {
        ops.iter().map(|op| self.run_one(op, now)).collect()
    }

    fn status(&self) -> Status {
        Status { full: self.is_full(), ..Status::default() }
    }
}

impl Memory {
    fn run_one(&self, op: &Op, now: Now) -> Answer {
        match op {
            Op::Issue(new) => self.issue(new, now),
            Op::Look(device) => Ok(Outcome::Seen(Box::new(self.look(device, now)))),
            Op::Consume(token, serial) => Ok(self.consume(token, *serial, now)),
            Op::GiveBack(token, serial) => {
                self.ledger.release(&token.hash, *serial);
                Ok(Outcome::Done)
            }
            Op::Remove(token) => {
                self.remove(&token.hash);
                Ok(Outcome::Done)
            }
            Op::Kill(kill) => {
                let killed = self.kill(&kill.device, kill.row.bound.t, now);
                Ok(Outcome::Killed { dead: killed.into_iter().next(), told: true })
            }
            Op::Count => Ok(Outcome::Counted(self.count())),
            // Only what is somewhere else is ever told anything.
            Op::Tell(..) | Op::Mark(..) | Op::Carry(..) => Err(StoreError::Undecided),
        }
    }

    /// Grants the attempt if the token is live here and no other attempt has it.
    fn consume(&self, token: &Token, serial: Serial, now: Now) -> Outcome {
        if self.ledger.begin(token, serial, true, now) != Begin::Begun {
            return Outcome::AlreadyUsed;
        }
        if self.live(&token.hash, now).is_none() {
            self.ledger.release(&token.hash, serial);
            return Outcome::Unknown { lossless_run: None };
        }
        match self.ledger.grant(&token.hash, serial) {
            true => Outcome::Granted(Box::default()),
            false => Outcome::AlreadyUsed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{Bound, Row};
    use crate::jwt::Signer;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn at(s: u64) -> Now {
        Now { unix_ms: 1_800_000_000_000 + s * 1000, mono_ms: s * 1000 }
    }

    fn token(device: &str, issued_s: u64) -> Token {
        let device_id = DeviceId::parse(device).unwrap();
        let iat = at(issued_s).unix_s();
        let jti = Some([u8::try_from(issued_s).unwrap(); 16]);
        Signer::new(b"secret").sign(Claims { device_id, iat, exp: iat + 300, jti })
    }

    /// Every device's past is dead up to here, in seconds since 1970.
    #[derive(Debug)]
    struct DeadUntil(AtomicU64);

    impl Rows for DeadUntil {
        fn to_be_told(&self, _: Now) -> Vec<DeviceId> {
            Vec::new()
        }

        fn row(&self, _: &DeviceId) -> Row {
            Row { bound: Bound { t: self.0.load(Ordering::Relaxed), c: 0 }, ..Row::default() }
        }

        fn hear(&self, _: &DeviceId, _: Bound) {}

        fn doubt(&self, _: &DeviceId) {}

        fn learn(&self, _: Vec<(DeviceId, Row)>, _: Now) {}
    }

    fn memory(max: usize) -> Memory {
        memory_after(max, 0)
    }

    fn memory_after(max: usize, dead_until: u64) -> Memory {
        let rows = Arc::new(DeadUntil(dead_until.into()));
        Memory::new(max, Arc::new(Ledger::new(max)), rows, Signer::new(b"secret"))
    }

    fn killed(answer: Answer) -> Option<Dead> {
        let Ok(Outcome::Killed { dead, .. }) = answer else { panic!("{answer:?}") };
        dead
    }

    fn one(memory: &Memory, op: Op, now: Now) -> Answer {
        memory.run(&[op], now).remove(0)
    }

    fn new(token: Token) -> New {
        New { token, replaces: None, subscriber: Subscriber::default() }
    }

    fn issue(token: Token) -> Op {
        Op::Issue(new(token))
    }

    fn replace(token: Token, kill: Kill) -> Op {
        let (replaces, subscriber) = (Some(Box::new(kill)), Subscriber::default());
        Op::Issue(New { token, replaces, subscriber })
    }

    fn issued(token: &Token, killed: Option<&Token>) -> Answer {
        let killed = killed.map(dead);
        Ok(Outcome::Issued { token: token.clone(), killed, found: Box::default() })
    }

    fn dead(token: &Token) -> Dead {
        Dead { hash: token.hash, claims: token.claims.clone() }
    }

    /// What kills the past of the token's device, up to that token and `seconds` more.
    fn kill(token: &Token, seconds: u64) -> Kill {
        let bound = Bound { t: token.claims.iat + seconds, c: 0 };
        let row = Row { bound, ..Row::default() };
        Kill { device: token.claims.device_id.clone(), row, seen: Seen::default() }
    }

    #[test]
    fn one_live_token_a_device_until_it_ends() {
        let memory = memory(10);
        assert_eq!(one(&memory, issue(token("d", 0)), at(0)), issued(&token("d", 0), None));
        let expires_at_ms = at(300).unix_ms;
        let active = Ok(Outcome::AlreadyActive { expires_at_ms });
        assert_eq!(one(&memory, issue(token("d", 1)), at(1)), active);
        assert_eq!(one(&memory, issue(token("e", 1)), at(1)), issued(&token("e", 1), None));
        assert_eq!(one(&memory, issue(token("d", 200)), at(300)), issued(&token("d", 200), None));
        assert_eq!(
            one(&memory, Op::Consume(token("d", 0), Serial::from([1; 16])), at(300)),
            Ok(Outcome::Unknown { lossless_run: None })
        );
    }

    #[test]
    fn a_token_is_granted_once_and_again_after_it_was_given_back() {
        let memory = memory(10);
        let (t, first, second) = (token("d", 0), Serial::from([1; 16]), Serial::from([2; 16]));
        let consume = |serial| one(&memory, Op::Consume(t.clone(), serial), at(1));
        assert_eq!(consume(first), Ok(Outcome::Unknown { lossless_run: None }));
        assert_eq!(one(&memory, issue(t.clone()), at(0)), issued(&t, None));
        assert_eq!(consume(first), Ok(Outcome::Granted(Box::default())));
        assert_eq!(consume(second), Ok(Outcome::AlreadyUsed));
        assert_eq!(one(&memory, Op::GiveBack(t.clone(), first), at(1)), Ok(Outcome::Done));
        assert_eq!(consume(second), Ok(Outcome::Granted(Box::default())));
        assert_eq!(one(&memory, Op::Remove(t.clone()), at(1)), Ok(Outcome::Done));
        assert_eq!(consume(first), Ok(Outcome::AlreadyUsed));
        assert_eq!(one(&memory, issue(token("d", 2)), at(2)), issued(&token("d", 2), None));
    }

    #[test]
    fn a_batch_answers_each_operation_for_itself() {
        let memory = memory(10);
        let t = token("d", 0);
        let attempts = (1..=3).map(|n| Op::Consume(t.clone(), Serial::from([n; 16])));
        let ops: Vec<Op> = [issue(t.clone())].into_iter().chain(attempts).collect();
        let answers = memory.run(&ops, at(0));
        let used = Ok(Outcome::AlreadyUsed);
        assert_eq!(
            answers,
            [issued(&t, None), Ok(Outcome::Granted(Box::default())), used.clone(), used]
        );
    }

    #[test]
    fn replacing_and_revoking_kill_for_good() {
        let memory = memory(10);
        let (old, new) = (token("d", 0), token("d", 6));
        one(&memory, issue(old.clone()), at(0)).unwrap();
        let seen = memory.look(&old.claims.device_id, at(1));
        assert_eq!(seen, Seen { latest_iat: Some(old.claims.iat), ..Seen::default() });
        let replacing = replace(new.clone(), kill(&old, 5));
        assert_eq!(one(&memory, replacing.clone(), at(1)), issued(&new, Some(&old)));
        let expires_at_ms = new.claims.exp * 1000;
        let active = Ok(Outcome::AlreadyActive { expires_at_ms });
        assert_eq!(one(&memory, replacing, at(1)), active, "by another, at the same time");
        let used = Ok(Outcome::AlreadyUsed);
        assert_eq!(one(&memory, Op::Consume(old.clone(), Serial::from([1; 16])), at(1)), used);
        let revoke = |kill| killed(one(&memory, Op::Kill(Box::new(kill)), at(2)));
        assert_eq!(revoke(kill(&old, 5)), None, "issued later");
        assert_eq!(revoke(kill(&new, 0)), Some(dead(&new)));
        assert_eq!(revoke(kill(&new, 0)), None, "already dead");
        let used = Ok(Outcome::AlreadyUsed);
        assert_eq!(one(&memory, Op::Consume(new, Serial::from([1; 16])), at(2)), used);
    }

    /// A bound that was raised between the date and the entry.
    #[test]
    fn no_token_is_born_dead() {
        for late in [0, 7] {
            let t = token("d", 0);
            let memory = memory_after(10, t.claims.iat + late);
            let Ok(Outcome::Issued { token, .. }) = memory.issue(&new(t.clone()), at(0)) else {
                panic!("no token");
            };
            let Claims { iat, exp, .. } = token.claims;
            assert_eq!((iat, exp), (t.claims.iat + late + 1, t.claims.exp + late + 1));
            let granted = one(&memory, Op::Consume(token, Serial::from([1; 16])), at(1));
            assert_eq!(granted, Ok(Outcome::Granted(Box::default())));
        }
    }

    #[test]
    fn a_token_under_redemption_is_killed_too() {
        let memory = memory(10);
        let t = token("d", 0);
        one(&memory, issue(t.clone()), at(0)).unwrap();
        let granted = one(&memory, Op::Consume(t.clone(), Serial::from([1; 16])), at(1));
        assert_eq!(granted, Ok(Outcome::Granted(Box::default())));
        assert_eq!(killed(one(&memory, Op::Kill(Box::new(kill(&t, 5))), at(1))), Some(dead(&t)));
        assert!(memory.ledger.knows_as_killed(&t.hash), "whoever signs looks at this last");
        one(&memory, Op::GiveBack(t.clone(), Serial::from([1; 16])), at(1)).unwrap();
        let again = one(&memory, Op::Consume(t, Serial::from([2; 16])), at(1));
        assert_eq!(again, Ok(Outcome::AlreadyUsed));
    }

    #[test]
    fn full_is_full_and_the_reaper_makes_room() {
        let memory = memory(2);
        one(&memory, issue(token("a", 0)), at(0)).unwrap();
        one(&memory, issue(token("b", 10)), at(10)).unwrap();
        assert!(memory.status().full);
        assert_eq!(one(&memory, issue(token("c", 10)), at(10)), Err(StoreError::Full));
        let replacing = replace(token("c", 10), kill(&token("c", 10), 0));
        assert_eq!(one(&memory, replacing, at(10)), Err(StoreError::Full));
        assert_eq!(one(&memory, Op::Count, at(10)), Ok(Outcome::Counted(2)));
        assert_eq!(memory.reap(at(300)), Some(at(310).mono_ms));
        assert_eq!(one(&memory, Op::Count, at(300)), Ok(Outcome::Counted(1)));
        assert_eq!(one(&memory, issue(token("c", 255)), at(300)), issued(&token("c", 255), None));
        assert_eq!(memory.reap(at(900)), None);
        assert_eq!(one(&memory, Op::Count, at(900)), Ok(Outcome::Counted(0)));
    }

    #[test]
    fn a_wall_clock_that_jumps_ends_no_token() {
        let memory = memory(10);
        let t = token("d", 0);
        one(&memory, issue(t.clone()), at(0)).unwrap();
        let jumped = Now { unix_ms: at(100_000).unix_ms, mono_ms: at(1).mono_ms };
        assert_eq!(memory.live(&t.hash, jumped).map(|copy| copy.left_ms), Some(299_000));
    }
}
