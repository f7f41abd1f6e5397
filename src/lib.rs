//! Device onboarding server for MQTT fleets: one-time tokens for X.509 certificates.
//!
//! A device asks for a provisioning token, presents it with a certificate signing request, and gets
//! the certificate with which it connects to the MQTT broker. Tokens live in Redis; while Redis is
//! away the service goes on from memory and loses nothing that it can keep.
//!
//! ```text
//!  device ──TCP/TLS──▶ edge ──whole, bounded requests──▶ lanes: tiny_http and a worker each (server)
//!                                                                   │
//!                      store (Redis ⇄ memory) ◀── provisioner ◀── api (routes, handlers)
//!                                                     └──▶ ca (CSR, sign, record, CRL)
//! ```
//!
//! Each lane is for one kind of work, so that what signs and waits for the disk delays nothing else.
//! What is large, the CRL, has a lane of its own too, where at most 16 wait: a reply of half a
//! megabyte would hold up whatever came down the lane behind it.
//!
//! The modules below stand in reading order, and each imports only what stands in its row or above:
//!
//! | layer | modules | may import |
//! |---|---|---|
//! | 0 | [`clock`] [`device`] [`serial`] [`subscriber`] [`pem`] [`json`] [`jwt`] [`problem`] [`http`] [`metrics`] [`config`] [`files`] [`stderr`] | layer 0 |
//! | 1 | [`store`], [`ca`] | layer 0; back ends also what `store` itself defines |
//! | 2 | [`provisioner`] | layers 0 and 1, but no concrete store |
//! | 3 | [`api`] | layers 0 to 2 |
//! | 3 | [`edge`] | layer 0 |
//! | 4 | [`server`] | layer 0, [`api`], [`edge`] |
//! | 5 | [`cli`] [`logging`] [`healthcheck`] [`notify`], this file, `main` | everything |
//!
//! Invariants:
//! - [`provisioner`] knows no HTTP, no Redis, no environment. Only `main` reads the environment;
//!   only [`clock`] reads the time, everyone else is given `now`.
//! - No lock is held across network I/O; only the record's writer lock is held across its own append
//!   and `fsync`. No secret type has a revealing `Debug`.
//! - A token consumed while degraded never becomes redeemable again. A certificate is on disk before
//!   it is answered.
//! - Nothing that a client sends can grow memory, threads, file descriptors or waiting time without
//!   a bound, but the record of certificates, which is meant to grow.

pub mod clock;
pub mod device;
pub mod pem;
pub mod serial;
pub mod subscriber;

pub mod json;
pub mod jwt;
pub mod problem;

pub mod http;

pub mod metrics;

pub mod config;
pub mod files;
pub mod stderr;

pub mod store;

pub mod ca;

pub mod provisioner;

pub mod api;
pub mod edge;

pub mod server;

pub mod cli;
pub mod healthcheck;
pub mod logging;
pub mod notify;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::api::Api;
use crate::ca::publisher::Publisher;
use crate::ca::{Ca, CaSettings};
use crate::config::{Config, ConfigError};
use crate::files::FolderLock;
use crate::jwt::{Claims, Signer};
use crate::metrics::Metrics;
use crate::notify::Manager;
use crate::provisioner::{Provisioner, Rules};
use crate::server::Server;
use crate::store::TokenStore;
use crate::store::failover::Failover;
use crate::store::ledger::Ledger;
use crate::store::memory::Memory;
use crate::store::redis::RedisStore;

/// Enough for the threads that wait most of the time.
const SMALL_STACK_BYTES: usize = 256 * 1024;
/// How often a clock that is not set is looked at.
const CLOCK_WATCH: Duration = Duration::from_millis(500);
/// How often what ends is said again.
const DAY: Duration = Duration::from_secs(clock::DAY_S);
/// Longest time to finish what was begun, after the signal to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// Why the server stopped, or a command failed: one line for the operator.
#[derive(Debug)]
pub struct RunError(String);

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for RunError {}

fn failed(error: impl fmt::Display) -> RunError {
    RunError(error.to_string())
}

/// Serves until SIGTERM or SIGINT. `reread` reads the configuration again, for SIGHUP.
///
/// # Errors
/// What kept the server from starting.
pub fn run(
    config: &Config,
    reread: impl Fn() -> Result<Config, ConfigError>,
) -> Result<(), RunError> {
    std::panic::set_hook(Box::new(|info| log::error!("{info}")));
    // Until it serves there is nothing to finish: whoever stops it is not made to wait for Redis.
    let starting = Arc::new(AtomicBool::new(true));
    for signal in [SIGTERM, SIGINT] {
        flag::register_conditional_shutdown(signal, 0, Arc::clone(&starting)).map_err(failed)?;
    }
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(failed)?;
    files::make_dir(&config.data_dir, 0o755).map_err(failed)?;
    files::make_dir(&config.ca.dir, 0o755).map_err(failed)?;
    let _locks = lock_folders(config)?;
    let ca = Arc::new(open_ca(config)?);
    let signer = Signer::new(&token_secret(config)?);
    let ledger = Arc::new(load_ledger(config, &ca));
    let metrics = Arc::new(Metrics::new(api::endpoints()));
    let store = open_store(config, &signer, &ledger, &metrics)?;
    let publisher = publish(config, &ca)?;
    let provisioner = Arc::new(Provisioner::new(
        Arc::clone(&store.tokens),
        ledger,
        Arc::clone(&publisher),
        signer,
        rules(config),
        Arc::clone(&metrics),
    ));
    seek_redis(config, &ca, &store)?;
    watch_clock(publisher, store.failover.clone())?;
    let api = Arc::new(Api::new(provisioner, config, Arc::clone(&metrics)));
    let (events, happened) = mpsc::channel();
    let (edge_ended, answering) = (events.clone(), events.clone());
    let server = Server::start(config, &api, &metrics, move |error| {
        // Nobody listens any more only if the process is ending.
        let _ = edge_ended.send(Event::EdgeEnded(error));
    });
    let server = server.map_err(failed)?;
    announce(config, store.tokens.status().redis_serves);
    starting.store(false, Ordering::SeqCst);
    forward_signals(signals, events)?;
    let service = Running { config, api, server, store, answering };
    let mut manager = Manager::new(&config.supervision, clock::now());
    let ended = service.until_told(&happened, &mut manager, reread);
    manager.stopping();
    service.stop();
    ended
}

/// Signs a server's certificate with the CA, for the broker or for our own HTTPS. Takes no lock and
/// leaves nothing in the record.
///
/// # Errors
/// What kept it from being signed or written.
pub fn server_certificate(
    ca: &config::Ca,
    request: &cli::ServerCertificate,
) -> Result<(), RunError> {
    let now = clock::now();
    let issuer = ca::issuer::Issuer::load(&ca.dir, ca.device_validity_days)
        .map_err(failed)?
        .ok_or_else(|| failed(format!("there is no CA in {}", ca.dir.display())))?;
    if !now.is_plausible() {
        return Err(failed(ca::CaError::ClockNotSet));
    }
    let made = issuer.server_certificate(&request.names, request.days, now).map_err(failed)?;
    files::make_dir(&request.out, 0o755).map_err(failed)?;
    let write = |name: &str, text: &str, mode| {
        let path = request.out.join(name);
        files::write_atomic(&path, text.as_bytes(), mode).map_err(failed)
    };
    write("server.key", &made.key_pem, 0o600)?;
    write("server.crt", &made.chain_pem, 0o644)?;
    write("ca.crt", &issuer.chain_pem(), 0o644)
}

fn lock_folders(config: &Config) -> Result<Vec<FolderLock>, RunError> {
    let same =
        std::fs::canonicalize(&config.data_dir).ok() == std::fs::canonicalize(&config.ca.dir).ok();
    let mut locks = vec![FolderLock::take(&config.data_dir).map_err(failed)?];
    if !same {
        locks.push(FolderLock::take(&config.ca.dir).map_err(failed)?);
    }
    Ok(locks)
}

fn open_ca(config: &Config) -> Result<Ca, RunError> {
    let settings = CaSettings {
        dir: config.ca.dir.clone(),
        root_validity_years: config.ca.root_validity_years,
        device_validity_days: config.ca.device_validity_days,
    };
    let ca = Ca::open(&settings, clock::now()).map_err(failed)?;
    if let Some(issuer) = ca.issuer() {
        log::info!("CA SHA-256 fingerprint {}", issuer.fingerprint());
    }
    if !ca.clock_is_plausible(clock::now()) {
        log::warn!("the clock is not set: nothing is issued or signed until it is");
    }
    Ok(ca)
}

fn token_secret(config: &Config) -> Result<Vec<u8>, RunError> {
    match &config.jwt_secret {
        Some(secret) => Ok(secret.reveal().clone()),
        None => {
            let path = config.data_dir.join("jwt-secret");
            let text = files::read_or_create_secret(&path, 32).map_err(failed)?;
            Ok(text.into_bytes())
        }
    }
}

/// The tokens for which a certificate is on disk are refused whatever Redis says.
fn load_ledger(config: &Config, ca: &Ca) -> Ledger {
    let ledger = Ledger::new(config.memory_max_tokens);
    let now = clock::now();
    for spent in ca.registry().spent_tokens() {
        let (iat, exp) = (spent.token.iat, spent.token.exp);
        let claims = Claims { device_id: spent.device, iat, exp, jti: None };
        ledger.load(spent.token.hash, spent.serial, claims, now);
    }
    ledger
}

fn rules(config: &Config) -> Rules {
    Rules {
        token_ttl_s: config.token_ttl_s,
        reenroll: config.reenroll,
        renew_revokes: config.renew_revokes,
        renew_after_expiry_days: config.renew_after_expiry_days,
    }
}

/// Publishes the list of revoked certificates, now if the clock allows, and from then on.
fn publish(config: &Config, ca: &Arc<Ca>) -> Result<Arc<Publisher>, RunError> {
    let publisher = Arc::new(Publisher::new(Arc::clone(ca), config.crl_hook.clone()));
    publisher.keep_fresh(clock::now());
    publisher.try_record(clock::now());
    let worker = Arc::clone(&publisher);
    spawn("crl", move || worker.work_forever())?;
    Ok(publisher)
}

/// The stores and what has to be told to stop.
struct Stores {
    tokens: Arc<dyn TokenStore>,
    memory: Arc<Memory>,
    failover: Option<Arc<Failover>>,
}

fn open_store(
    config: &Config,
    signer: &Signer,
    ledger: &Arc<Ledger>,
    metrics: &Arc<Metrics>,
) -> Result<Stores, RunError> {
    let memory = Arc::new(Memory::new(config.memory_max_tokens, Arc::clone(ledger)));
    let reaper = Arc::clone(&memory);
    spawn("reaper", move || reaper.reap_forever())?;
    let Some(redis) = &config.redis else {
        log::warn!("⚠️  Provisioning tokens will not be persistent");
        let tokens: Arc<dyn TokenStore> = Arc::clone(&memory) as _;
        return Ok(Stores { tokens, memory, failover: None });
    };
    log::info!("💾 Initializing Redis (Token Persistence)...");
    let instance = files::read_or_create_secret(&config.data_dir.join("instance-id"), 16);
    let remote =
        RedisStore::new(redis, instance.map_err(failed)?, signer.clone(), Arc::clone(metrics));
    let failover = Arc::new(Failover::new(
        Box::new(remote.map_err(failed)?),
        Arc::clone(&memory),
        Arc::clone(ledger),
        signer.clone(),
        config.outage_redeem,
        redis.timeout,
    ));
    Ok(Stores { tokens: Arc::clone(&failover) as _, memory, failover: Some(failover) })
}

/// Starts looking for Redis, with our CA's fingerprint in hand if there is a CA.
fn seek_redis(config: &Config, ca: &Ca, stores: &Stores) -> Result<(), RunError> {
    let (Some(failover), Some(redis)) = (&stores.failover, &config.redis) else { return Ok(()) };
    enter_ca(ca, Some(failover));
    let supervised = Arc::clone(failover);
    spawn("redis", move || supervised.supervise())?;
    failover.wait_for_first_attempt(redis.connect_timeout);
    Ok(())
}

fn enter_ca(ca: &Ca, failover: Option<&Arc<Failover>>) {
    if let (Some(failover), Some(issuer)) = (failover, ca.issuer()) {
        failover.set_ca_fingerprint(issuer.fingerprint().to_owned());
    }
}

/// While the clock is not set, watches it, so that the CA is made or judged within a second.
fn watch_clock(publisher: Arc<Publisher>, failover: Option<Arc<Failover>>) -> Result<(), RunError> {
    let ca = Arc::clone(publisher.ca());
    if ca.clock_is_plausible(clock::now()) {
        return Ok(());
    }
    spawn("clock", move || {
        let settled = loop {
            thread::sleep(CLOCK_WATCH);
            match ca.settle(clock::now()) {
                Ok(false) => {}
                other => break other,
            }
        };
        match (settled, ca.issuer()) {
            (Err(error), _) => log::error!("the clock is set, but: {error}"),
            (Ok(_), Some(issuer)) => {
                log::info!("the clock is set, CA SHA-256 fingerprint {}", issuer.fingerprint());
            }
            (Ok(_), None) => {}
        }
        publisher.keep_fresh(clock::now());
        enter_ca(&ca, failover.as_ref());
    })
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
    /// Every worker has answered.
    Answering,
}

fn forward_signals(mut signals: Signals, events: mpsc::Sender<Event>) -> Result<(), RunError> {
    spawn("signals", move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })
}

/// The service while it serves.
struct Running<'a> {
    config: &'a Config,
    api: Arc<Api>,
    server: Server,
    store: Stores,
    answering: mpsc::Sender<Event>,
}

impl Running<'_> {
    /// Returns when the process is to end, with an error if it failed.
    fn until_told(
        &self,
        happened: &mpsc::Receiver<Event>,
        manager: &mut Manager,
        reread: impl Fn() -> Result<Config, ConfigError>,
    ) -> Result<(), RunError> {
        let mut note_at_ms = 0;
        loop {
            self.report(manager);
            let now = clock::now();
            if now.mono_ms >= note_at_ms {
                self.note_certificate(now);
                note_at_ms = now.mono_ms + clock::DAY_S * 1000;
            }
            let event = happened.recv_timeout(manager.due_in(now).map_or(DAY, |due| due.min(DAY)));
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
                Err(RecvTimeoutError::Timeout) => {}
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
        self.server.prove(move || drop(answering.send(Event::Answering)));
        let status = self.store.tokens.status();
        manager.status(match (status.redis_enabled, status.redis_serves) {
            (_, true) => "Tokens are in Redis",
            (true, false) => "Redis is away, tokens are in memory until it is back",
            (false, false) => "Tokens are in memory",
        });
    }

    /// Says daily that the certificate which we show ends.
    fn note_certificate(&self, now: clock::Now) {
        self.api.certificate_notes(now).iter().for_each(|note| log::warn!("{note}"));
    }

    /// TLS files and API keys are read again. What cannot be used changes nothing at all.
    fn reload(&self, later: Result<Config, ConfigError>) {
        let later = match later {
            Ok(later) => later,
            Err(error) => return log::error!("SIGHUP: everything stays as it was: {error}"),
        };
        let shown = later.tls.as_ref();
        if let Some(Err(error)) = shown.map(|shown| self.server.replace_certificate(shown)) {
            return log::error!("SIGHUP: everything stays as it was: {error}");
        }
        self.api.reload(&later);
        log::info!("SIGHUP: TLS certificate and key and the API keys were read again");
        for name in self.config.fixed_changes(&later) {
            log::warn!("SIGHUP: {name} has changed, which takes effect at the next start only");
        }
        self.note_certificate(clock::now());
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
        self.store.memory.stop();
        drop(watchdog);
        log::info!("stopped");
    }
}

/// A thread that has work for as long as the process lives. If it panics nobody does that work, and
/// whoever starts the process again is to notice.
fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), RunError> {
    let work = move || {
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            log::error!("the thread {name} panicked");
            process::exit(1);
        }
    };
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(SMALL_STACK_BYTES);
    builder.spawn(work).map(drop).map_err(failed)
}
