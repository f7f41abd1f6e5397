//! The edge, the lanes behind it with their workers, and the orderly stop.
//!
//! A worker takes the request that waits in its lane and those behind it, has the API answer them as
//! one batch, and does what could wait after the replies. A request that is alone is a batch of one and
//! waits for no other.

mod lane;

use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::api::{self, Api};
use crate::config::Config;
use crate::edge::{self, Edge, Outbox};
use crate::metrics::EdgeCounters;
use crate::stderr;

pub use lane::{Batch, LaneServer, open_lanes};

/// Most requests in one batch while the store is near. More would answer all clients at once
/// and make their next requests arrive at once.
const BATCH: usize = 16;
/// Most requests in one batch however far the store is.
const BATCH_MOST: usize = 256;
/// A store that takes this long is far.
const FAR: Duration = Duration::from_millis(2);
/// Enough for signing with RSA 4096 and for the deepest JSON, several times over.
const STACK_BYTES: usize = 512 * 1024;

/// A listening server and its workers.
pub struct Server {
    /// What may be asked of the edge.
    pub edge: edge::Handle,
    running: JoinHandle<()>,
    workers: Vec<(Arc<LaneServer>, JoinHandle<()>)>,
}

impl Server {
    /// Listens, and answers with `api`. If the edge ever fails, `ended` is called with the reason. While
    /// the lanes' threads start, `meanwhile` is done, and nobody is let in before its end.
    ///
    /// # Errors
    /// When the address is taken, the TLS files cannot be used, or a lane or thread cannot be made.
    pub fn start(
        config: &Config,
        api: &Arc<Api>,
        counters: &Arc<EdgeCounters>,
        meanwhile: impl FnOnce(),
        ended: impl FnOnce(io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let lanes = open_lanes(&config.run_dir, &api::lane_kinds(), config.http.workers);
        let lanes = lanes.map_err(said("cannot open a lane"))?;
        let addresses = lanes.iter().map(LaneServer::address).collect();
        let settings = edge::Settings {
            tls: config.tls.clone(),
            classify: api::classify,
            counters: Arc::clone(counters),
            ..edge::Settings::new(config.http.clone())
        };
        let address = SocketAddr::new(config.http.host, config.http.port);
        let edge = Edge::open(settings, addresses);
        let edge = edge.map_err(said(&format!("cannot serve on {address}")))?;
        let handle = edge.handle();
        let mut workers = Vec::new();
        for lane in lanes {
            let (own, api, outbox) = (Arc::clone(&lane), Arc::clone(api), edge.outbox());
            workers.push((lane, spawn("worker", move || work(&own, &api, &outbox))?));
        }
        meanwhile();
        let running = spawn("edge", move || {
            let run = catch_unwind(AssertUnwindSafe(|| edge.run()));
            if let Err(error) = run.unwrap_or_else(|_| Err(io::Error::other("it panicked"))) {
                ended(error);
            }
        })?;
        Ok(Server { edge: handle, running, workers })
    }

    /// Stops listening, answers what is in progress, and ends all threads.
    pub fn stop(self) {
        self.edge.shutdown();
        // How a thread ended does not matter any more.
        let _ = self.running.join();
        for (lane, worker) in self.workers {
            lane.stop();
            let _ = worker.join();
        }
    }
}

/// The error, and what cannot be done for it.
fn said(what: &str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    builder.spawn(work).map_err(said("cannot start a thread"))
}

fn work(lane: &LaneServer, api: &Api, outbox: &Outbox) {
    let mut last = 0;
    loop {
        let (bound, pause) = pace(api.store_round_trip(), last);
        let Some(batch) = lane.next_batch(bound, pause, outbox) else { return };
        last = batch.requests.len();
        // What panics outside a handler costs its batch, which answers 500 as it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(|| serve(api, batch)));
    }
}

fn serve(api: &Api, batch: Batch) {
    let answers = stderr::together(|| api.answer(&batch.requests));
    batch.answer(answers.replies);
    api.clean_up(answers.after);
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
