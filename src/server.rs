//! Workers between tiny_http and the API, and the orderly stop.
//!
//! A worker takes the request that waits and whatever waits behind it, answers them as one batch,
//! and does what could wait after the replies. Alone, a request is a batch of one and waits for
//! nobody.

use std::fmt;
use std::io::{self, Cursor, Read as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use tiny_http::{Header, Response, StatusCode};

use crate::api::{Api, MAX_BODY_BYTES, Method, Reply, Request};

/// Most requests in one batch. More would move all clients in one lump.
const BATCH: usize = 16;
/// Enough for signing with RSA 4096 and for the deepest JSON, several times over.
const WORKER_STACK_BYTES: usize = 512 * 1024;

/// Why the server cannot serve.
#[derive(Debug)]
pub enum ServerError {
    /// The address cannot be listened on.
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        why: String,
    },
    /// A thread cannot be started.
    Thread(io::Error),
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerError::Listen { address, why } => write!(f, "cannot listen on {address}: {why}"),
            ServerError::Thread(error) => write!(f, "cannot start a worker: {error}"),
        }
    }
}

impl std::error::Error for ServerError {}

/// A listening server and its workers.
pub struct Server {
    http: Arc<tiny_http::Server>,
    stopping: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens on `address` and answers with `api`, on so many `workers`.
    ///
    /// # Errors
    /// When the address is taken, or a worker cannot be started.
    pub fn start(address: SocketAddr, workers: usize, api: Arc<Api>) -> Result<Self, ServerError> {
        let http = tiny_http::Server::http(address)
            .map_err(|error| ServerError::Listen { address, why: error.to_string() })?;
        let mut server = Server {
            http: Arc::new(http),
            stopping: Arc::new(AtomicBool::new(false)),
            workers: Vec::new(),
        };
        for number in 1..=workers {
            let (http, api) = (Arc::clone(&server.http), Arc::clone(&api));
            let stopping = Arc::clone(&server.stopping);
            let worker = thread::Builder::new()
                .name(format!("worker-{number}"))
                .stack_size(WORKER_STACK_BYTES)
                .spawn(move || work(&http, &api, &stopping))
                .map_err(ServerError::Thread)?;
            server.workers.push(worker);
        }
        Ok(server)
    }

    /// Lets the workers finish what has arrived, and ends them.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.workers.iter().for_each(|_| self.http.unblock());
        for worker in self.workers {
            // A worker does not panic: each request of a batch is guarded.
            let _ = worker.join();
        }
    }
}

fn work(http: &tiny_http::Server, api: &Api, stopping: &AtomicBool) {
    loop {
        let first = if stopping.load(Ordering::SeqCst) {
            http.try_recv().ok().flatten()
        } else {
            http.recv().ok()
        };
        match first {
            Some(first) => answer(http, api, first),
            None if stopping.load(Ordering::SeqCst) => return,
            None => {}
        }
    }
}

/// Answers the request and those that wait behind it.
fn answer(http: &tiny_http::Server, api: &Api, first: tiny_http::Request) {
    let mut batch = vec![first];
    while batch.len() < BATCH
        && let Ok(Some(next)) = http.try_recv()
    {
        batch.push(next);
    }
    let requests: Vec<Request> = batch.iter_mut().map(read).collect();
    let answers = api.answer(&requests);
    for (request, reply) in batch.into_iter().zip(answers.replies) {
        // The client may be gone; the others of the batch are not.
        let _ = request.respond(response(reply));
    }
    api.clean_up(&answers.after);
}

fn read(request: &mut tiny_http::Request) -> Request {
    let mut body = Vec::new();
    let limit = MAX_BODY_BYTES as u64 + 1;
    let whole = request.as_reader().take(limit).read_to_end(&mut body).is_ok();
    let body = (whole && body.len() <= MAX_BODY_BYTES).then_some(body);
    let url = request.url();
    let (path, query) = url.split_once('?').unwrap_or((url, ""));
    let field = |name: &'static str| {
        let found = request.headers().iter().find(|header| header.field.equiv(name));
        found.map(|header| header.value.to_string())
    };
    Request {
        method: Method::parse(&request.method().to_string()),
        path: path.to_owned(),
        query: query.to_owned(),
        authorization: field("Authorization"),
        content_type: field("Content-Type"),
        accept: field("Accept"),
        body,
        client: request.remote_addr().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), SocketAddr::ip),
    }
}

fn response(reply: Reply) -> Response<Cursor<Vec<u8>>> {
    let fields = reply.fields.iter();
    let headers = fields.filter_map(|(name, value)| Header::from_bytes(*name, value.as_str()).ok());
    let length = reply.body.len();
    let (status, headers) = (StatusCode(reply.status), headers.collect());
    Response::new(status, headers, Cursor::new(reply.body), Some(length), None)
        .with_chunked_threshold(usize::MAX)
}
