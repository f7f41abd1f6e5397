//! The service as a whole: makes its parts, connects them, and waits for signals until it is to stop.
//! Only here are concrete stores named.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::api::{self, Api};
use crate::ca::publisher::Publisher;
use crate::ca::retention::Retention;
use crate::ca::{self, Ca};
use crate::clock::{self, Now};
use crate::config::{self, Config, ConfigError};
use crate::device::DeviceId;
use crate::devices::identity::{self, Identity};
use crate::devices::table::Devices;
use crate::devices::{self, Bound, Row};
use crate::files;
use crate::https::{self, Https};
use crate::jwt::{Claims, Signer};
use crate::metrics::Metrics;
use crate::notify::Manager;
use crate::provisioner::{CLOCK_IS_FAR_OFF_MS, Provisioner};
use crate::server::Server;
use crate::share::redis::RedisExchange;
use crate::share::thread::{Parts, Thread};
use crate::share::{self, Sharing};
use crate::store::failover::{Failover, Rules};
use crate::store::ledger::Ledger;
use crate::store::memory::Memory;
use crate::store::redis::{OurCa, RedisStore, RunFile};
use crate::store::{Rows, TokenStore};

/// The file below `DATA_DIR` that holds the secret by which tokens are signed.
const TOKEN_SECRET: &str = "jwt-secret";
/// The file below `DATA_DIR` that holds the run id of the Redis that served last.
const REDIS_RUN: &str = "redis-run-id";
/// The file below `DATA_DIR` that holds the name of this instance in Redis.
const INSTANCE_ID: &str = "instance-id";
/// The file below `DATA_DIR` that holds the rows of devices.
const DEVICES: &str = "devices.txt";
/// Enough for the threads that wait most of the time.
const SMALL_STACK_BYTES: usize = 256 * 1024;
/// How often certificates are looked at: ours, and those that commands leave for the record.
const LOOK: Duration = Duration::from_secs(60);
/// Longest time to finish what was begun, after the signal to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// Why the server stopped: one line for the operator.
fn failed(error: impl fmt::Display) -> String {
    error.to_string()
}

/// Serves until SIGTERM or SIGINT, which are caught already. `reread` reads the configuration again, for
/// SIGHUP.
pub fn run(
    config: &Config,
    (starting, signals): (Arc<AtomicBool>, Signals),
    reread: impl Fn() -> Result<Config, ConfigError>,
) -> Result<(), String> {
    std::panic::set_hook(Box::new(|info| log::error!("{info}")));
    let (kept, identity) = Kept::open(config)?;
    let store = kept.open_store(identity)?;
    kept.revoke_dead()?;
    let provisioner = Arc::new(kept.provisioner(&store)?);
    provisioner.make_up(clock::now());
    kept.seek_redis(&store)?;
    let (events, happened) = mpsc::channel();
    watch_clock(Arc::clone(&provisioner.publisher), store.failover.clone(), events.clone())?;
    let mut service = Running::start(kept, store, provisioner, events.clone())?;
    starting.store(false, Ordering::SeqCst);
    forward_signals(signals, events)?;
    let mut manager = Manager::new(&config.supervision, clock::now());
    let ended = service.until_told(&happened, &mut manager, reread);
    manager.stopping();
    service.stop();
    ended
}

/// Tries what [`run`] would do with this configuration and makes or changes nothing, so that it may be
/// done while a service runs. Redis is asked, unless it is `offline`.
///
/// Returns what a start would stumble over, each under the variable that is concerned, and what it
/// would merely warn of.
pub fn rehearse(config: &Config, offline: bool) -> Rehearsal {
    let mut rehearsal = Rehearsal::default();
    let folder = |dir| files::try_folder(dir).map_err(failed);
    rehearsal.check("DATA_DIR", folder(&config.data_dir).and_then(|()| try_files(config)));
    let ca = || ca::check(&config.ca, clock::now()).map_err(failed);
    rehearsal.check("CA_STORAGE_PATH", folder(&config.ca.dir).and_then(|()| ca()));
    rehearsal.check("RUNTIME_DIRECTORY", folder(&config.run_dir));
    if let (Some(files), Some(_)) = (&config.http.tls, &config.http.tls_auto) {
        rehearsal.check("TLS", https::load(files).map(drop));
    }
    if !clock::now().is_plausible() {
        let why = "the clock is not set: nothing is issued or signed until it is";
        rehearsal.warnings.push(why.to_owned());
    }
    if let Some(hook) = &config.crl_hook {
        rehearsal
            .check(&format!("CRL_HOOK={hook:?}"), ca::hook::find(hook).map(drop).map_err(failed));
    }
    if let Some(redis) = config.redis.as_ref().filter(|_| !offline) {
        rehearsal.ask(redis);
    }
    rehearsal
}

/// What [`rehearse`] has found.
#[derive(Debug, Default)]
pub struct Rehearsal {
    pub faults: Vec<String>,
    pub warnings: Vec<String>,
}

impl Rehearsal {
    fn check(&mut self, name: &str, outcome: Result<(), String>) {
        self.faults.extend(outcome.err().map(|why| format!("{name}: {why}")));
    }

    /// Connects to Redis and logs in as a start does, and asks for every right that is needed.
    fn ask(&mut self, redis: &config::Redis) {
        let metrics = Arc::new(Metrics::new(api::endpoints()));
        let store = RedisStore::new(redis, None, Signer::new(b"none"), metrics);
        let hello = match store.connect(None) {
            Ok(hello) => hello,
            Err(why) => return self.check("Redis", Err(failed(why))),
        };
        self.warnings.extend(hello.warnings);
    }
}

/// The files that a first start makes, if they are there.
fn try_files(config: &Config) -> Result<(), String> {
    if config.jwt_secret.is_none() {
        files::read_secret(&config.data_dir.join(TOKEN_SECRET)).map_err(failed)?;
    }
    identity::check(&config.data_dir.join(INSTANCE_ID)).map_err(failed)?;
    devices::table::check(&config.data_dir.join(DEVICES)).map_err(failed)
}

/// What is kept on disk and counted, of which the other parts are made.
struct Kept<'c> {
    config: &'c Config,
    ca: Arc<Ca>,
    signer: Signer,
    ledger: Arc<Ledger>,
    devices: Arc<Devices>,
    metrics: Arc<Metrics>,
    _locks: Vec<File>,
}

impl<'c> Kept<'c> {
    fn open(config: &'c Config) -> Result<(Self, Identity), String> {
        files::make_dir(&config.data_dir, 0o755).map_err(failed)?;
        files::make_dir(&config.ca.dir, 0o755).map_err(failed)?;
        let _locks = lock_folders(config)?;
        let (ca, data) = thread::scope(|scope| {
            // The files of each are synced one after the other when they are made.
            let data = thread::Builder::new().spawn_scoped(scope, || open_data(config));
            let ca = open_ca(config);
            let data =
                data.map(|thread| thread.join().unwrap_or_else(|fault| resume_unwind(fault)));
            (ca, data.map_err(failed).flatten())
        });
        let (ca, (secret, identity, devices)) = (Arc::new(ca?), data?);
        let (signer, devices) = (Signer::new(&secret), Arc::new(devices));
        let ledger = Arc::new(load_ledger(config, &ca));
        let metrics = Arc::new(Metrics::new(api::endpoints()));
        Ok((Kept { config, ca, signer, ledger, devices, metrics, _locks }, identity))
    }

    fn open_store(&self, identity: Identity) -> Result<Stores, String> {
        let config = self.config;
        let memory = Arc::new(Memory::new(
            config.memory_max_tokens,
            Arc::clone(&self.ledger),
            Arc::clone(&self.devices) as _,
            self.signer.clone(),
        ));
        let reaper = Arc::clone(&memory);
        spawn("reaper", move || reaper.reap_forever())?;
        let Some(redis) = &config.redis else {
            log::warn!("⚠️  Provisioning tokens will not be persistent");
            return Ok(Stores { tokens: memory, failover: None });
        };
        log::info!("💾 Initializing Redis (Token Persistence)...");
        let us = Some((identity, Arc::clone(&self.devices) as _));
        let remote = RedisStore::new(redis, us, self.signer.clone(), Arc::clone(&self.metrics));
        let rules = Rules {
            run_file: RunFile(config.data_dir.join(REDIS_RUN)),
            redeem: config.outage_redeem,
            required: redis.required,
            is_spread: matches!(redis.at, config::Place::Cluster(_)),
            timeout: redis.timeout,
        };
        let failover = Arc::new(Failover::new(remote, memory, rules));
        Ok(Stores { tokens: Arc::clone(&failover) as _, failover: Some(failover) })
    }

    /// A bound is on disk before the record is changed; an older copy of the record may lack it, too.
    fn revoke_dead(&self) -> Result<(), String> {
        let dead = self.ca.record().apply_bounds(&self.devices.bounds()).map_err(failed)?;
        if !dead.is_empty() {
            let count = dead.len();
            log::warn!(
                "certificates were not revoked yet and are now, for their time was over: {count}"
            );
        }
        Ok(())
    }

    fn provisioner(&self, stores: &Stores) -> Result<Provisioner, String> {
        let config = self.config;
        let publisher = self.publish(&stores.tokens)?;
        Ok(Provisioner {
            store: Arc::clone(&stores.tokens),
            ledger: Arc::clone(&self.ledger),
            devices: Arc::clone(&self.devices),
            sharing: self.share_record(stores, &publisher)?,
            publisher,
            signer: self.signer.clone(),
            rules: config.rules.clone(),
            metrics: Arc::clone(&self.metrics),
            spending: Default::default(),
        })
    }

    /// Publishes the list of revoked certificates, now if the clock allows, and from then on.
    fn publish(&self, tokens: &Arc<dyn TokenStore>) -> Result<Arc<Publisher>, String> {
        let (config, tokens) = (self.config, Arc::clone(tokens));
        let is_disputed =
            move || tokens.status().clock_is_ahead_ms.unsigned_abs() > CLOCK_IS_FAR_OFF_MS;
        let retention = Retention::new(config.record_keep_days, is_disputed, clock::now());
        let (ca, metrics) = (Arc::clone(&self.ca), Arc::clone(&self.metrics));
        let (hook, trial) = (config.crl_hook.clone(), Some(Arc::clone(self.devices.trial())));
        let publisher = Arc::new(Publisher::new(ca, hook, Some(retention), trial, metrics));
        publisher.keep_fresh(clock::now());
        publisher.load_superseded(config.rules.renew_revokes, clock::now());
        let worker = Arc::clone(&publisher);
        spawn("crl", move || worker.work_forever())?;
        Ok(publisher)
    }

    /// Starts sharing what is recorded here and elsewhere, if there is a Redis by which that can be
    /// done.
    fn share_record(
        &self,
        stores: &Stores,
        publisher: &Arc<Publisher>,
    ) -> Result<Arc<Sharing>, String> {
        let (Some(failover), Some(redis)) = (&stores.failover, &self.config.redis) else {
            return Ok(Arc::new(Sharing::new(share::Mode::Alone)));
        };
        let mode = if redis.share_record { share::Mode::Record } else { share::Mode::Rows };
        let sharing = Arc::new(Sharing::new(mode));
        let (news, caught_up) = (Arc::clone(&sharing), Arc::clone(&sharing));
        self.ca.record().on_news(move || news.wake());
        let thread = Thread::new(Parts {
            exchange: RedisExchange::new(redis),
            sharing: Arc::clone(&sharing),
            publisher: Arc::clone(publisher),
            devices: Arc::clone(&self.devices),
            store: Arc::clone(&stores.tokens),
            ledger: Arc::clone(&self.ledger),
            reenroll: self.config.rules.reenroll,
        });
        spawn("sharing", move || thread.run())?;
        failover.first(move || caught_up.catch_up(clock::now()));
        Ok(sharing)
    }

    /// Starts looking for Redis, with our CA's fingerprint in hand if there is a CA.
    fn seek_redis(&self, stores: &Stores) -> Result<(), String> {
        let (Some(failover), Some(redis)) = (&stores.failover, &self.config.redis) else {
            return Ok(());
        };
        enter_ca(&self.ca, Some(failover));
        let supervised = Arc::clone(failover);
        spawn("redis", move || supervised.supervise())?;
        failover.wait_for_first_attempt(redis.connect_timeout);
        Ok(())
    }
}

fn lock_folders(config: &Config) -> Result<Vec<File>, String> {
    let (data, ca) = (&config.data_dir, &config.ca.dir);
    let same = std::fs::canonicalize(data).ok() == std::fs::canonicalize(ca).ok();
    let folders = [Some(data), (!same).then_some(ca)];
    folders.into_iter().flatten().map(|dir| files::lock_folder(dir).map_err(failed)).collect()
}

fn open_ca(config: &Config) -> Result<Ca, String> {
    let ca = Ca::open(&config.ca, clock::now()).map_err(failed)?;
    if let Some(issuer) = ca.issuer() {
        log::info!("CA SHA-256 fingerprint {}", issuer.fingerprint());
    }
    if let Err(why) = ca.check_clock(clock::now()) {
        log::warn!("{why}: nothing is issued or signed until it is");
    }
    Ok(ca)
}

/// What is kept beside the CA.
fn open_data(config: &Config) -> Result<(Vec<u8>, Identity, Devices), String> {
    let secret = token_secret(config)?;
    let identity = Identity::open(&config.data_dir.join(INSTANCE_ID)).map_err(failed)?;
    let devices = Devices::open(&config.data_dir.join(DEVICES), identity.id, clock::now());
    Ok((secret, identity, devices.map_err(failed)?))
}

fn token_secret(config: &Config) -> Result<Vec<u8>, String> {
    if let Some(secret) = &config.jwt_secret {
        return Ok(secret.reveal().clone());
    }
    let text = files::read_or_create_secret(&config.data_dir.join(TOKEN_SECRET));
    Ok(text.map_err(failed)?.into_bytes())
}

/// The tokens for which a certificate is on disk are refused whatever Redis says.
fn load_ledger(config: &Config, ca: &Ca) -> Ledger {
    let ledger = Ledger::new(config.memory_max_tokens);
    let now = clock::now();
    for spent in ca.record().spent_tokens() {
        let (iat, exp) = (spent.token.iat, spent.token.exp);
        let claims = Claims { device_id: spent.device, iat, exp, jti: None };
        ledger.load(spent.token.hash, spent.serial, claims, now);
    }
    ledger
}

/// The stores and what has to be told to stop.
struct Stores {
    tokens: Arc<dyn TokenStore>,
    failover: Option<Arc<Failover>>,
}

impl Rows for Devices {
    fn to_be_told(&self, now: Now) -> Vec<DeviceId> {
        Devices::to_be_told(self, now)
    }

    fn row(&self, device: &DeviceId) -> Row {
        self.row_as_heard(device)
    }

    fn hear(&self, device: &DeviceId, bound: Bound) {
        Devices::hear(self, device, bound);
    }

    fn doubt(&self, device: &DeviceId) {
        Devices::doubt(self, device);
    }

    fn learn(&self, rows: Vec<(DeviceId, Row)>, now: Now) {
        self.note_changed(rows.iter().map(|(device, _)| device.clone()));
        if let Err(error) = self.enter(rows, false, now) {
            log::error!("what Redis says of devices was not kept: {error}");
        }
    }
}

/// Enters servers' certificates that were left for the record.
fn enter_servers(ca: &Ca) {
    if let Some(issuer) = ca.issuer() {
        // What went wrong is logged and kept there.
        let _ = ca.record().enter_servers(&issuer);
    }
}

fn enter_ca(ca: &Ca, failover: Option<&Arc<Failover>>) {
    if let (Some(failover), Some(issuer)) = (failover, ca.issuer()) {
        let (fingerprint, mac_key) = (issuer.fingerprint().to_owned(), issuer.mac_key.clone());
        failover.set_ca(OurCa { fingerprint, mac_key });
    }
}

/// Watches the clock. While it is not set, the CA is made or judged as soon as it is; and when it was
/// ahead, so that the list is one of the future by which brokers refuse everybody, a new one is made.
/// Whoever else goes by the date is told when it was set.
fn watch_clock(
    publisher: Arc<Publisher>,
    failover: Option<Arc<Failover>>,
    events: mpsc::Sender<Event>,
) -> Result<(), String> {
    let steps = clock::Steps::from_now();
    let offset = |now: Now| now.unix_ms.wrapping_sub(now.mono_ms);
    spawn("clock", move || {
        let ca = publisher.ca();
        let mut before = clock::now();
        let mut was_set = ca.clock_is_plausible(before);
        loop {
            steps.wait(!was_set);
            let now = clock::now();
            let is_set = ca.clock_is_plausible(now);
            if is_set && !was_set {
                clock_is_set(ca, now);
                enter_ca(ca, failover.as_ref());
            }
            publisher.check_clock(now);
            let step_ms = offset(now).wrapping_sub(offset(before)).cast_signed().unsigned_abs();
            if (is_set && !was_set) || step_ms > 1000 {
                publisher.keep_fresh(now); // a list may have ended, if the clock went on
                let _ = events.send(Event::ClockSet); // nobody listens any more at the end only
            }
            (was_set, before) = (is_set, now);
        }
    })
}

fn clock_is_set(ca: &Ca, now: Now) {
    match (ca.settle(now), ca.issuer()) {
        (Err(error), _) => log::error!("the clock is set, but: {error}"),
        (Ok(_), Some(issuer)) => {
            log::info!("the clock is set, CA SHA-256 fingerprint {}", issuer.fingerprint());
        }
        (Ok(_), None) => {}
    }
}

fn announce(config: &Config, redis_serves: bool) {
    let scheme = if config.http.tls.is_some() { "https" } else { "http" };
    let address = SocketAddr::new(config.http.host, config.http.port);
    let store = if redis_serves { "Redis" } else { "In-Memory" };
    log::info!("🔐 Provisioning API: {scheme}://{address}/api/v1/onboarding ({store})");
}

/// What the main thread waits for.
enum Event {
    Signal(i32),
    EdgeEnded(io::Error),
    ClockSet,
    /// Every worker has answered.
    Answering,
}

/// Catches signals from now on. Until it serves there is nothing to finish: whoever stops it while the
/// first is true is not made to wait for Redis.
pub fn catch_signals() -> io::Result<(Arc<AtomicBool>, Signals)> {
    let starting = Arc::new(AtomicBool::new(true));
    for signal in [SIGTERM, SIGINT] {
        flag::register_conditional_shutdown(signal, 0, Arc::clone(&starting))?;
    }
    Ok((starting, Signals::new([SIGTERM, SIGINT, SIGHUP])?))
}

fn forward_signals(mut signals: Signals, events: mpsc::Sender<Event>) -> Result<(), String> {
    spawn("signals", move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })
}

/// The service while it serves.
struct Running {
    config: Config,
    api: Arc<Api>,
    server: Server,
    store: Stores,
    answering: mpsc::Sender<Event>,
    ca: Arc<Ca>,
    https: Https,
    _locks: Vec<File>,
}

impl Running {
    /// Opens the door, when all is there that answers.
    fn start(
        kept: Kept<'_>,
        store: Stores,
        provisioner: Arc<Provisioner>,
        answering: mpsc::Sender<Event>,
    ) -> Result<Self, String> {
        let Kept { config, ca, metrics, _locks, .. } = kept;
        let mut https = Https::of(config);
        if https.tend(&ca, clock::now()) {
            enter_servers(&ca);
        }
        let config = Config { tls: https.shown(), ..config.clone() };
        if config.http.tls.is_some() && config.tls.is_none() {
            log::warn!("HTTPS opens when there is a certificate, which takes a clock that is set");
        }
        let publisher = Arc::clone(&provisioner.publisher);
        let api = Arc::new(Api::new(provisioner, &config, Arc::clone(&metrics)));
        let edge_ended = answering.clone();
        let try_record = || publisher.try_record(clock::now());
        let server = Server::start(&config, &api, &metrics.edge, try_record, move |error| {
            // Nobody listens any more only if the process is ending.
            let _ = edge_ended.send(Event::EdgeEnded(error));
        });
        let server = server.map_err(failed)?;
        announce(&config, store.tokens.status().redis_serves);
        Ok(Running { config, api, server, store, answering, ca, https, _locks })
    }

    /// Returns when the process is to end, with an error if it failed.
    fn until_told(
        &mut self,
        happened: &mpsc::Receiver<Event>,
        manager: &mut Manager,
        reread: impl Fn() -> Result<Config, ConfigError>,
    ) -> Result<(), String> {
        let mut note_at_ms = 0;
        loop {
            self.report(manager);
            let now = clock::now();
            if now.mono_ms >= note_at_ms {
                self.note_daily(now);
                note_at_ms = now.mono_ms + clock::DAY_S * 1000;
            }
            let event = happened.recv_timeout(manager.due_in(now).unwrap_or(LOOK).min(LOOK));
            match event {
                Ok(Event::Signal(SIGHUP)) => {
                    manager.reloading();
                    self.reload(reread());
                    manager.reloaded();
                }
                Ok(Event::Signal(signal)) => {
                    let name = signal_hook::low_level::signal_name(signal).unwrap_or("signal");
                    log::info!("{name}: finishing what was begun");
                    return Ok(());
                }
                Ok(Event::EdgeEnded(error)) => {
                    return Err(failed(format!("the edge failed: {error}")));
                }
                Ok(Event::Answering) => manager.alive(),
                // What a start does, too.
                Ok(Event::ClockSet) | Err(RecvTimeoutError::Timeout) => self.tend(clock::now()),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(failed("no thread is left that could report a signal"));
                }
            }
        }
    }

    /// When it is time to: has the service prove that it lives, and says how it is.
    fn report(&self, manager: &mut Manager) {
        if !manager.is_due(clock::now()) {
            return;
        }
        let answering = self.answering.clone();
        // Nobody listens any more only if the process is ending.
        self.server.edge.prove(move || drop(answering.send(Event::Answering)));
        let status = self.store.tokens.status();
        manager.status(match (status.redis_enabled, status.redis_serves) {
            (_, true) => "Tokens are in Redis",
            (true, false) => "Redis is away, tokens are in memory until it is back",
            (false, false) => "Tokens are in memory",
        });
    }

    /// Sees to our own certificate, and enters it, and what commands have left, into the record.
    fn tend(&mut self, now: Now) {
        if self.https.tend(&self.ca, now) {
            self.show();
        }
        enter_servers(&self.ca);
    }

    /// Shows new connections what there is to show.
    fn show(&self) {
        let Some(shown) = self.https.shown() else { return };
        match self.server.edge.replace_certificate(Arc::clone(&shown)) {
            Ok(()) => self.api.shows(&shown),
            Err(error) => log::error!("our TLS certificate cannot be shown: {error}"),
        }
    }

    fn note_daily(&self, now: clock::Now) {
        self.api.daily_notes(now).iter().for_each(|note| log::warn!("{note}"));
    }

    /// TLS files and API keys are read again. What cannot be used changes nothing at all.
    fn reload(&mut self, later: Result<Config, ConfigError>) {
        let mut later = match later {
            Ok(later) => later,
            Err(error) => return log::error!("SIGHUP: everything stays as it was: {error}"),
        };
        // Whether there is HTTPS at all is settled by the start.
        let goes_on = later.http.tls.is_some() == self.config.http.tls.is_some();
        later.tls = later.tls.filter(|_| goes_on);
        let shown = later.tls.clone();
        if let Some(Err(error)) = shown.map(|shown| self.server.edge.replace_certificate(shown)) {
            return log::error!("SIGHUP: everything stays as it was: {error}");
        }
        self.api.reload(&later);
        if goes_on {
            self.https.take_up(&later);
        }
        self.tend(clock::now());
        self.show();
        log::info!("SIGHUP: TLS certificate and key and the API keys were read again");
        for name in self.config.fixed_changes(&later) {
            log::warn!("SIGHUP: {name} has changed, which takes effect at the next start only");
        }
        self.note_daily(clock::now());
        let new = |warning: &&String| !self.config.warnings.contains(warning);
        later.warnings.iter().filter(new).for_each(|warning| log::warn!("{warning}"));
    }

    /// Ends the process after the longest time, whatever still hangs.
    fn stop(self) {
        let watchdog = spawn("drain", || {
            thread::sleep(DRAIN);
            log::warn!("not all requests were finished in time");
            process::exit(0);
        });
        self.server.stop();
        self.api.stop();
        if let Some(failover) = &self.store.failover {
            failover.stop();
        }
        drop(watchdog);
        log::info!("stopped");
    }
}

/// A thread that has work for as long as the process lives. If it panics nobody does that work, and
/// whoever starts the process again is to notice.
fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let work = move || {
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            log::error!("the thread {name} panicked");
            process::exit(1);
        }
    };
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(SMALL_STACK_BYTES);
    builder.spawn(work).map(drop).map_err(failed)
}
