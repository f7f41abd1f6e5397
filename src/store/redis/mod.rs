//! Tokens in Redis: connections, pipelines with one deadline, and the protocol of the keys.
//!
//! | key under the prefix | value | lives |
//! |---|---|---|
//! | `token:<jwt>` | JSON: device, token, expiry | until the token's expiry |
//! | `device:<id>`, the lease | the token | the same |
//! | `used:<sha256 of the token>`, the mark | `<instance> <serial>` or `<instance> killed` | the token's whole lifetime and a minute |
//! | `live` | sorted set: hash, expiry in ms | entries pruned |
//! | `devices:<hh>`, by the id's SHA-256 | hash: device id, its row | for good |
//! | `ca` | SHA-256 of the CA certificate | for good |
//! | `instance:<id>` | the process that runs under this id | 30 s, renewed |
//!
//! The keys of the shared record are those of `share::redis`; of them `holder:<id>` is read here.
//!
//! Decisions are read from values, never from the reply of `NX`: a reply may be lost, a value stays.
//! What changes a key that another instance may have changed is compare-and-set, one `EVAL` with one
//! key. No command names two keys, so clustered servers take them too. Nothing is ever sent twice.
//! Each operation is a chain of round trips ([`Next`]), which the operations of a batch share.

mod cause;
mod cluster;
mod command;
mod connection;
mod flow;
mod greeting;
mod issue;
mod layout;
mod line;
mod locate;
mod name;
mod pool;
mod redeem;
mod reply;
mod rows;
pub(super) mod runs;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::clock::{self, Now};
use crate::config;
use crate::devices::identity::Identity;
use crate::jwt::Signer;
use crate::mac::MacKey;
use crate::metrics::Metrics;
use crate::store::{Answer, Down, Op, Rows, Status, StoreError};
pub(crate) use redis::FromRedisValue;

use cluster::{Nodes, Route};
pub(crate) use command::{Ask, Command, Commands};
use flow::{Context, Next};
pub use greeting::Hello;
use layout::Layout;
pub(crate) use line::Line;
use name::Name;
use pool::Pool;
pub(crate) use reply::{Info, Reply, is_denied};
pub use runs::RunFile;

/// The set of live tokens is pruned with every so many additions, of twice as many entries at most …
const PRUNE_EVERY: u64 = 64;
/// … and when so much time has passed.
const PRUNE_EVERY_MS: u64 = 60_000;

/// What instances of one CA know each other by.
#[derive(Clone, Debug)]
pub struct OurCa {
    /// SHA-256 of the CA's certificate.
    pub fingerprint: String,
    /// Seals the rows of devices.
    pub mac_key: MacKey,
}

/// The store of tokens in Redis, which can be lost and found again.
pub struct RedisStore {
    pool: Pool,
    context: Context,
    timeout: Duration,
    /// What a round trip takes at present, in microseconds: a moving average.
    round_trip_us: AtomicU64,
    /// Entries added to the set of live tokens since it was pruned.
    added: AtomicU64,
    /// When it is to be pruned next, however few were added, by [`Now::mono_ms`].
    prune_at_ms: AtomicU64,
    metrics: Arc<Metrics>,
}

impl RedisStore {
    /// A store without a connection yet; see [`RedisStore::connect`]. Without an instance it sets no marks.
    pub fn new(
        config: &config::Redis,
        instance: Option<(Identity, Arc<dyn Rows>)>,
        signer: Signer,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (identity, rows) = instance.unzip();
        RedisStore {
            // One is a line of its own.
            pool: Pool::new(config, config.pool_size.saturating_sub(1)),
            context: Context::new(
                Layout::of(config, identity.map(Name::new)),
                signer,
                rows,
                u64::try_from(config.timeout.as_millis()).unwrap_or(u64::MAX),
            ),
            timeout: config.timeout,
            round_trip_us: AtomicU64::new(0),
            added: AtomicU64::new(0),
            prune_at_ms: AtomicU64::new(0),
            metrics,
        }
    }

    /// What prunes the set of live tokens along with these operations, when it is due.
    fn prune(&self, ops: &[Op], now: Now) -> Option<Next> {
        let adds =
            ops.iter().filter(|op| matches!(op, Op::Issue(_) | Op::Carry(..))).count() as u64;
        let added = self.added.fetch_add(adds, Ordering::Relaxed) + adds;
        let is_time = now.mono_ms >= self.prune_at_ms.load(Ordering::Relaxed);
        if added < PRUNE_EVERY && !(is_time && added > 0) {
            return None;
        }
        self.prune_at_ms.store(now.mono_ms + PRUNE_EVERY_MS, Ordering::Relaxed);
        self.added.store(0, Ordering::Relaxed);
        Some(flow::prune(&self.context, added.max(PRUNE_EVERY) * 2, now))
    }

    /// The latest counts for an eighth. When two workers do this at once, one figure may be lost,
    /// which an average can bear.
    fn note_round_trip(&self, took: Duration) {
        self.metrics.redis_trips.observe(took);
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let average = self.round_trip_us.load(Ordering::Relaxed);
        let average = average - average / 8 + took / 8;
        self.round_trip_us.store(average, Ordering::Relaxed);
    }

    /// Round trip after round trip until every operation has its answer. A connection that failed is
    /// closed, and its operations are not run again.
    fn advance(&self, operations: &mut [Next], line: u64, now: Now) -> Result<(), Down> {
        let deadline = Instant::now() + self.timeout;
        let mut nodes = self.pool.take(line, deadline)?;
        let connected = nodes.connected().count();
        loop {
            let commands: Vec<&Commands> = operations.iter().filter_map(Next::commands).collect();
            if commands.is_empty() {
                break;
            }
            let sent = Instant::now();
            let replies = nodes.run(&commands, deadline);
            self.note_round_trip(sent.elapsed());
            let mut replies = replies.into_iter();
            for operation in operations.iter_mut().filter(|next| next.commands().is_some()) {
                let Some(replies) = replies.next() else { continue };
                operation.read(&self.context, Ok(replies));
            }
        }
        if nodes.connected().count() < connected {
            self.metrics.redis_failures.add(1);
        }
        self.pool.put_back(nodes, now);
        Ok(())
    }

    fn look_over(
        &self,
        nodes: &mut Nodes,
        run_id: Option<&str>,
        deadline: Instant,
        now: Now,
    ) -> Result<(), StoreError> {
        let layout = &self.context.layout;
        let mut commands = Commands::default();
        let claim = layout.name.as_ref().map(|name| (name, name.ask(layout, &mut commands)));
        let mut infos = Vec::new();
        let mut slots = None;
        for node in nodes.connected() {
            commands.route = Route::Node(node);
            infos.push(Info::ask(&mut commands));
            if layout.is_spread && slots.is_none() {
                slots = Some((commands.try_ask(locate::ask_slots()), nodes.host(node)));
            }
        }
        let mut replies = nodes.ask(&commands, deadline);
        if !nodes.is_connected() {
            return Err(StoreError::Down(self.pool.lost("it does not answer")));
        }
        if let Some((name, claimed)) = claim {
            claimed(name, &mut replies, now)?;
        }
        if let Some((slots, host)) = slots
            && let Ok(read) = locate::read_slots(replies.take(slots), &host)
        {
            nodes.map.update(&read);
        }
        let mut runs = infos.into_iter().filter_map(|info| info(&mut replies).run_id);
        if run_id.is_some_and(|known| runs.any(|run| !runs::has(known, &run))) {
            let why = "it is another server, or was started again";
            return Err(StoreError::Down(self.pool.lost(why)));
        }
        Ok(())
    }

    /// The connections that there are now; others are made by [`RedisStore::connect`] only.
    pub fn line(&self) -> u64 {
        self.pool.generation()
    }

    /// As [`TokenStore::run`](crate::store::TokenStore::run), over these connections and no others.
    pub fn run_on(&self, line: u64, ops: &[Op], now: Now) -> Vec<Answer> {
        let mut operations: Vec<Next> =
            ops.iter().map(|op| flow::of(op, &self.context, now)).collect();
        operations.extend(self.prune(ops, now));
        if let Err(broken) = self.advance(&mut operations, line, now) {
            self.metrics.redis_failures.add(1);
            let broken = StoreError::Down(broken);
            operations.iter_mut().for_each(|next| next.read(&self.context, Err(broken.clone())));
        }
        operations.truncate(ops.len());
        operations.into_iter().map(Next::into_answer).collect()
    }

    /// How the server is.
    pub(super) fn status(&self) -> Status {
        let now = clock::now();
        Status {
            redis_enabled: true,
            lacks_replicas: self.context.replicas.are_lacking(now),
            round_trip: Duration::from_micros(self.round_trip_us.load(Ordering::Relaxed)),
            clock_is_ahead_ms: self.context.clock.ours_is_ahead_ms(now),
            ..Status::default()
        }
    }

    /// Drops all connections, makes new ones (looking the name up again) and proves that the server
    /// can be written to. Enters the CA's fingerprint unless there is one. Blocks; only the supervisor
    /// calls it.
    pub fn connect(&self, ca: Option<&OurCa>) -> Result<Hello, StoreError> {
        if let Some(ca) = ca {
            self.context.mac_key.get_or_init(|| ca.mac_key.clone());
        }
        let fingerprint = ca.map(|ca| &*ca.fingerprint);
        let greet = |nodes: &mut Nodes, deadline| {
            greeting::greet(&self.context, nodes, fingerprint, deadline)
        };
        self.pool.reopen(greet, clock::now())
    }

    pub(super) fn disconnect(&self) {
        self.pool.close();
    }

    /// The server has closed a connection while nobody used it. Waits for nothing.
    pub(super) fn was_cut(&self, now: Now) -> bool {
        self.pool.was_cut(now)
    }

    /// Asks on each connection that nobody uses whether it still leads to this run of the server,
    /// which also keeps it from being forgotten on the way.
    pub(super) fn look(&self, run_id: Option<&str>, now: Now) -> Result<(), StoreError> {
        let deadline = || Instant::now() + self.timeout;
        let any = self.pool.take(self.pool.generation(), deadline())?;
        let mut next = Some(any);
        while let Some(mut nodes) = next {
            self.look_over(&mut nodes, run_id, deadline(), now)?;
            self.pool.put_back(nodes, clock::now());
            next = self.pool.take_idle(now);
        }
        Ok(())
    }

    /// Why a part of the keys is out of reach ([`DownKind::Part`](crate::store::DownKind::Part)), if one
    /// is.
    pub(super) fn missing(&self) -> Option<String> {
        self.pool.missing()
    }

    /// Whether more is in reach than the present connections reach. Blocks, beside those who are served.
    pub(super) fn can_reach_more(&self) -> Result<bool, StoreError> {
        self.pool.can_reach_more(&self.context.layout)
    }
}
