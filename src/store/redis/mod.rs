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
//! What else instances exchange, `share::redis` has; of that `holder:<id>` is read here.
//!
//! Decisions are read from values, never from the reply of `NX`: a reply may be lost, a value stays.
//! What changes a key that another instance may have changed is compare-and-set, one `EVAL` with one
//! key. No command names two keys, so clustered servers take them too. Nothing is ever sent twice.
//! Each operation is a chain of [`Flow`]s, one a round trip; the flows of a batch share their trips.

mod cause;
mod command;
mod connection;
mod flow;
mod greeting;
mod layout;
mod line;
mod locate;
mod name;
mod pool;
mod reply;
mod rows;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::clock::{self, Now};
use crate::config;
use crate::devices::identity::Identity;
use crate::jwt::Signer;
use crate::metrics::Metrics;
use crate::store::failover::{Hello, OurCa, Remote};
use crate::store::{Answer, Down, Op, Rows, Status, StoreError};

pub(crate) use command::{Command, Commands};
use connection::Connection;
use flow::{Context, Flow, Next};
use layout::Layout;
pub(crate) use line::Line;
use name::{CLAIM, Name};
use pool::Pool;
pub(crate) use reply::{Info, Replies, Reply};

/// The set of live tokens is pruned with every so many additions, of twice as many entries at most …
const PRUNE_EVERY: u64 = 64;
/// … and when so much time has passed.
const PRUNE_EVERY_MS: u64 = 60_000;

/// The store of tokens in Redis.
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
    /// A store without a connection yet; see [`Remote::connect`]. Without an instance it sets no marks.
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
    fn prune(&self, ops: &[Op], now: Now) -> Option<flow::Prune> {
        let adds =
            ops.iter().filter(|op| matches!(op, Op::Issue(_) | Op::Carry(..))).count() as u64;
        let added = self.added.fetch_add(adds, Ordering::Relaxed) + adds;
        let is_time = now.mono_ms >= self.prune_at_ms.load(Ordering::Relaxed);
        if added < PRUNE_EVERY && !(is_time && added > 0) {
            return None;
        }
        self.prune_at_ms.store(now.mono_ms + PRUNE_EVERY_MS, Ordering::Relaxed);
        self.added.store(0, Ordering::Relaxed);
        Some(flow::Prune::new(&self.context, added.max(PRUNE_EVERY) * 2, now))
    }
}

impl RedisStore {
    fn run(&self, line: u64, ops: &[Op], now: Now) -> Vec<Answer> {
        let mut flows: Vec<Running> =
            ops.iter().map(|op| Running::new(flow::of(op, &self.context, now))).collect();
        flows.extend(self.prune(ops, now).map(|flow| Running::new(Box::new(flow))));
        let deadline = Instant::now() + self.timeout;
        if let Err(broken) = self.run_flows(&mut flows, line, deadline, now) {
            self.metrics.redis_failures.add(1);
            flows.iter_mut().for_each(|flow| flow.fail(&broken));
        }
        flows.truncate(ops.len());
        flows.into_iter().map(Running::into_answer).collect()
    }
}

impl RedisStore {
    /// The latest counts for an eighth. When two workers do this at once, one figure may be lost,
    /// which an average can bear.
    fn note_round_trip(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let average = self.round_trip_us.load(Ordering::Relaxed);
        let average = average - average / 8 + took / 8;
        self.round_trip_us.store(average, Ordering::Relaxed);
    }

    /// Round trip after round trip until every flow has its answer. A connection that failed is
    /// closed, and its flows are not run again.
    fn run_flows(
        &self,
        flows: &mut [Running],
        line: u64,
        deadline: Instant,
        now: Now,
    ) -> Result<(), Down> {
        let mut connection = self.pool.take(line, deadline)?;
        while flows.iter().any(Running::is_waiting) {
            let mut commands = Commands::default();
            let counts: Vec<usize> = flows
                .iter()
                .map(|flow| flow.send(&self.context.layout, now, &mut commands))
                .collect();
            let layout = &self.context.layout;
            let waits = layout.wait_replicas > 0 && flows.iter().any(Running::awaits_replicas);
            if waits {
                // Once for the batch; the other half of the time is for what follows.
                commands.push(&layout.wait_for(layout.wait_replicas, self.context.patience_ms / 2));
            }
            let sent = Instant::now();
            let mut replies = connection.round_trip(&commands, deadline)?;
            let waited = if waits { replies.pop() } else { None };
            self.metrics.redis_trips.observe(sent.elapsed());
            self.note_round_trip(sent.elapsed());
            let mut replies = replies.into_iter();
            for (flow, count) in flows.iter_mut().zip(counts) {
                let waited = waited.clone().filter(|_| flow.awaits_replicas());
                flow.receive(&self.context, replies.by_ref().take(count).chain(waited).collect());
            }
        }
        self.pool.put_back(connection, now);
        Ok(())
    }
}

/// A flow under way, or its answer.
enum Running {
    Waiting(Box<dyn Flow>),
    Done(Answer),
}

impl Running {
    const UNDECIDED: Running = Running::Done(Err(StoreError::Undecided));

    fn new(flow: Box<dyn Flow>) -> Self {
        Running::Waiting(flow)
    }

    fn is_waiting(&self) -> bool {
        matches!(self, Running::Waiting(_))
    }

    fn awaits_replicas(&self) -> bool {
        matches!(self, Running::Waiting(flow) if flow.awaits_replicas())
    }

    /// Adds the commands of this trip; returns how many.
    fn send(&self, layout: &Layout, now: Now, commands: &mut Commands) -> usize {
        let before = commands.count();
        if let Running::Waiting(flow) = self {
            flow.send(layout, now, commands);
        }
        commands.count() - before
    }

    fn receive(&mut self, context: &Context, replies: Vec<Reply>) {
        if !self.is_waiting() {
            return;
        }
        let Running::Waiting(flow) = std::mem::replace(self, Running::UNDECIDED) else { return };
        *self = match flow.receive(context, replies) {
            Next::Trip(flow) => Running::Waiting(flow),
            Next::Done(answer) => Running::Done(answer),
        };
    }

    fn fail(&mut self, broken: &Down) {
        if self.is_waiting() {
            *self = Running::Done(Err(StoreError::Down(broken.clone())));
        }
    }

    fn into_answer(self) -> Answer {
        match self {
            Running::Done(answer) => answer,
            Running::Waiting(_) => Err(StoreError::Undecided),
        }
    }
}

impl Remote for RedisStore {
    fn line(&self) -> u64 {
        self.pool.generation()
    }

    fn run_on(&self, line: u64, ops: &[Op], now: Now) -> Vec<Answer> {
        self.run(line, ops, now)
    }

    fn status(&self) -> Status {
        Status {
            redis_enabled: true,
            redis_serves: self.pool.is_open(),
            lacks_replicas: self.context.replicas.are_lacking(clock::now()),
            round_trip: Duration::from_micros(self.round_trip_us.load(Ordering::Relaxed)),
            clock_is_ahead_ms: self.context.clock.ours_is_ahead_ms(clock::now()),
            ..Status::default()
        }
    }
    fn connect(&self, ca: Option<&OurCa>) -> Result<Hello, StoreError> {
        if let Some(ca) = ca {
            self.context.mac_key.get_or_init(|| ca.mac_key.clone());
        }
        let fingerprint = ca.map(|ca| &*ca.fingerprint);
        let greet = |connection: &mut Connection, deadline| {
            greeting::greet(&self.context, connection, fingerprint, deadline)
        };
        self.pool.reopen(greet, clock::now())
    }

    fn disconnect(&self) {
        self.pool.close();
    }

    fn was_cut(&self, now: Now) -> bool {
        self.pool.was_cut(now)
    }

    fn look(&self, run_id: Option<&str>, now: Now) -> Result<(), StoreError> {
        let layout = &self.context.layout;
        let mut commands = Commands::default();
        if let Some(name) = &layout.name {
            name.push_claim(layout, &mut commands);
        }
        match run_id {
            Some(_) => Info::ask(&mut commands),
            // It may not be asked who it is; an answer is all there is to have.
            None => commands.push(&layout.time()),
        }
        let deadline = || Instant::now() + self.timeout;
        let any = self.pool.take(self.pool.generation(), deadline()).map_err(StoreError::Down)?;
        let mut next = Some(any);
        while let Some(mut connection) = next {
            let replies = connection.round_trip(&commands, deadline()).map_err(StoreError::Down)?;
            let mut replies = replies.into_iter();
            if let Some(name) = &layout.name {
                name.claimed(replies.by_ref().take(CLAIM).collect(), now)?;
            }
            let info = Replies::new(replies.collect()).info();
            if run_id.is_some() && info.run_id.as_deref() != run_id {
                let why = "it is another server, or was started again";
                return Err(StoreError::Down(self.pool.lost(why)));
            }
            self.pool.put_back(connection, clock::now());
            next = self.pool.take_idle(now);
        }
        Ok(())
    }
}
