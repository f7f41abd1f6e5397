//! The edge, the lanes behind it with their workers, and the orderly stop.
//!
//! A worker takes the request that waits in its lane and those behind it, has the API answer them as
//! one batch, and does what could wait after the replies. A request that is alone is a batch of one and
//! waits for no other.

mod lane;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustls::sign::CertifiedKey;

use crate::api::{self, Api};
use crate::config::Config;
use crate::edge::{self, Edge, Outbox};
use crate::http::LaneKind;
use crate::metrics::EdgeCounters;
use crate::stderr;

pub use lane::{Batch, LaneError, LaneServer, Stopper, open_lanes};

/// Most requests in one batch while the store is near. More would answer all clients at once
/// and make their next requests arrive at once.
const BATCH: usize = 16;
/// Most requests in one batch however far the store is.
const BATCH_MOST: usize = 256;
/// A store that takes this long is far.
const FAR: Duration = Duration::from_millis(2);
/// Enough for signing with RSA 4096 and for the deepest JSON, several times over.
const STACK_BYTES: usize = 512 * 1024;

/// Why the server cannot serve.
#[derive(Debug)]
pub enum ServerError {
    /// A lane cannot be opened.
    Lane(LaneError),
    /// The address cannot be listened on, or the TLS files cannot be used.
    Edge(SocketAddr, edge::OpenError),
    /// A thread cannot be started.
    Thread(io::Error),
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerError::Lane(error) => write!(f, "cannot open a lane: {error}"),
            ServerError::Edge(address, error) => write!(f, "cannot serve on {address}: {error}"),
            ServerError::Thread(error) => write!(f, "cannot start a thread: {error}"),
        }
    }
}

impl std::error::Error for ServerError {}

/// A listening server and its workers.
pub struct Server {
    edge: JoinHandle<()>,
    handle: edge::Handle,
    workers: Vec<(Stopper, JoinHandle<()>)>,
}

impl Server {
    /// Listens, and answers with `api`. If the edge ever fails, `ended` is called with the reason.
    ///
    /// # Errors
    /// When the address is taken, the TLS files cannot be used, or a lane or thread cannot be made.
    pub fn start(
        config: &Config,
        api: &Arc<Api>,
        counters: &Arc<EdgeCounters>,
        ended: impl FnOnce(io::Error) + Send + 'static,
    ) -> Result<Self, ServerError> {
        let address = SocketAddr::new(config.http.host, config.http.port);
        let lanes = open_lanes(&config.run_dir, &kinds(config.http.workers));
        let lanes = lanes.map_err(ServerError::Lane)?;
        let addresses = lanes.iter().map(|lane| lane.address().clone()).collect();
        let edge = Edge::open(edge_settings(config, address, counters), addresses);
        let edge = edge.map_err(|error| ServerError::Edge(address, error))?;
        let handle = edge.handle();
        let mut workers = Vec::new();
        for lane in lanes {
            let (stopper, api, outbox) = (lane.stopper(), Arc::clone(api), edge.outbox());
            workers.push((stopper, spawn("worker", move || work(&lane, &api, &outbox))?));
        }
        let edge = spawn("edge", move || {
            let run = catch_unwind(AssertUnwindSafe(|| edge.run()));
            if let Err(error) = run.unwrap_or_else(|_| Err(io::Error::other("it panicked"))) {
                ended(error);
            }
        })?;
        Ok(Server { edge, handle, workers })
    }

    /// Shows another TLS certificate to new connections; those that are open go on.
    ///
    /// # Errors
    /// When TLS cannot be set up with it; the old one stays.
    pub fn replace_certificate(&self, shown: &Arc<CertifiedKey>) -> Result<(), rustls::Error> {
        self.handle.replace_certificate(Arc::clone(shown))
    }

    /// Calls `answered` when every worker has answered a request that took the way of all requests.
    pub fn prove(&self, answered: impl FnOnce() + Send + 'static) {
        self.handle.prove(answered);
    }

    /// Stops listening, answers what is in progress, and ends all threads.
    pub fn stop(self) {
        self.handle.shutdown();
        // How a thread ended does not matter any more.
        let _ = self.edge.join();
        for (stopper, worker) in self.workers {
            stopper.stop();
            let _ = worker.join();
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, ServerError> {
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    builder.spawn(work).map_err(ServerError::Thread)
}

/// One lane a worker. Certificates wait for the disk and have lanes of their own; half, so that
/// neither kind can starve the other. One more is for what is large.
fn kinds(workers: usize) -> Vec<LaneKind> {
    let certificates = (workers / 2).max(1);
    let plain = workers.saturating_sub(certificates).max(1);
    let plain = std::iter::repeat_n(LaneKind::Plain, plain);
    let certificates = std::iter::repeat_n(LaneKind::Certificate, certificates);
    plain.chain(certificates).chain([LaneKind::Bulk]).collect()
}

fn edge_settings(
    config: &Config,
    address: SocketAddr,
    counters: &Arc<EdgeCounters>,
) -> edge::Settings {
    let http = &config.http;
    let defaults = edge::Settings::new(address);
    edge::Settings {
        tls: config.tls.clone(),
        classify: api::classify,
        counters: Arc::clone(counters),
        max_connections: http.max_connections,
        max_connections_per_ip: http.max_connections_per_ip,
        max_buffer_bytes: http.max_buffer_bytes,
        trusted_proxies: http.trusted_proxies.clone(),
        deadlines: edge::Deadlines {
            handshake: http.tls_handshake,
            keep_alive: http.keep_alive,
            ..defaults.deadlines
        },
        ..defaults
    }
}

fn work(lane: &LaneServer, api: &Api, outbox: &Outbox) {
    let is_bulk = lane.address().kind == LaneKind::Bulk;
    let mut last = 0;
    loop {
        let (bound, pause) = pace(api.store_round_trip(), last);
        // The replies to a batch are held until all are made: large ones are made one by one.
        let bound = if is_bulk { 1 } else { bound };
        let Some(batch) = lane.next_batch(bound, pause, outbox) else { return };
        last = batch.requests.len();
        // What panics outside a handler costs its batch, which answers 500 as it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(|| serve(api, batch)));
    }
}

fn serve(api: &Api, batch: Batch) {
    let answers = stderr::together(|| api.answer(&batch.requests));
    batch.answer(answers.replies);
    api.clean_up(&answers.after);
}

/// How many requests a batch takes, and for how long a pause in their coming it waits.
///
/// A store that is far answers a batch in about the time of one request, so throughput is the batch
/// over the round trip. And clients that were answered together ask again together: a worker that
/// went on at once would find the first of them only, and the others would wait for that trip to
/// end. A request that comes alone waits for no other.
fn pace(round_trip: Duration, last: usize) -> (usize, Duration) {
    if round_trip < FAR {
        return (BATCH, Duration::ZERO);
    }
    let pause = if last > 1 { round_trip / 20 } else { Duration::ZERO };
    (BATCH_MOST, pause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_far_store_is_waited_for_and_only_in_company() {
        let ms = Duration::from_millis;
        assert_eq!(pace(Duration::ZERO, 9), (BATCH, Duration::ZERO));
        assert_eq!(pace(ms(1), 16), (BATCH, Duration::ZERO));
        assert_eq!(pace(ms(20), 1), (BATCH_MOST, Duration::ZERO));
        assert_eq!(pace(ms(20), 2), (BATCH_MOST, ms(1)));
    }
}
