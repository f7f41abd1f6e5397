//! A real edge with real lanes on loopback, and a handler that is simple enough to predict.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mqtt_publisher_lite::EdgeCounters;
use mqtt_publisher_lite::api::{self, Request};
use mqtt_publisher_lite::config::Http;
use mqtt_publisher_lite::edge::{Edge, Handle, LaneAddress, Outbox, Settings};
use mqtt_publisher_lite::http::Reply;
use mqtt_publisher_lite::server::{LaneServer, open_lanes};

use crate::support::temp::TempDir;

pub use crate::support::random::Xorshift;
pub use crate::support::wait::for_true as until;

/// An edge that serves until it is dropped.
pub struct Served {
    pub addr: SocketAddr,
    pub handle: Handle,
    pub counters: Arc<EdgeCounters>,
    /// Requests that reached the handler.
    pub handled: Arc<AtomicU64>,
    edge: Option<JoinHandle<()>>,
    workers: Vec<(Arc<LaneServer>, JoinHandle<()>)>,
    _dir: TempDir,
}

/// Serves with one lane of each kind and the settings as `adjust` leaves them.
pub fn serve(adjust: impl FnOnce(&mut Settings)) -> Served {
    serve_in_lanes(|_| {}, adjust)
}

/// The same, with the lanes as `adjust_lane` leaves them.
pub fn serve_in_lanes(
    adjust_lane: impl Fn(&mut LaneAddress),
    adjust: impl FnOnce(&mut Settings),
) -> Served {
    let dir = TempDir::new();
    let lanes = open_lanes(dir.path(), &api::lane_kinds(), 2).unwrap();
    let mut addresses: Vec<LaneAddress> = lanes.iter().map(LaneServer::address).collect();
    addresses.iter_mut().for_each(adjust_lane);
    let handled = Arc::new(AtomicU64::new(0));
    let mut settings = settings();
    settings.classify = api::classify;
    adjust(&mut settings);
    let counters = Arc::clone(&settings.counters);
    let edge = Edge::open(settings, addresses).unwrap();
    let workers = lanes
        .into_iter()
        .map(|lane| {
            let (handled, outbox) = (Arc::clone(&handled), edge.outbox());
            let own = Arc::clone(&lane);
            (lane, thread::spawn(move || work(&own, &outbox, &handled)))
        })
        .collect();
    let (addr, handle) = (edge.local_addr(), edge.handle());
    let edge = thread::spawn(move || edge.run().unwrap());
    until_open(&handle);
    Served { addr, handle, counters, handled, edge: Some(edge), workers, _dir: dir }
}

/// What is configured by default, on any port of loopback.
pub fn settings() -> Settings {
    let mut http = Http::from_lookup(|_| None).unwrap();
    (http.host, http.port) = ([127, 0, 0, 1].into(), 0);
    Settings::new(http)
}

/// Waits until all lanes have answered and clients are let in.
pub fn until_open(handle: &Handle) {
    let (opened, open) = mpsc::channel();
    handle.prove(move || opened.send(()).unwrap());
    open.recv_timeout(Duration::from_secs(20)).unwrap();
}

fn work(lane: &LaneServer, outbox: &Outbox, handled: &AtomicU64) {
    // One by one, so that one that panics or waits costs itself only.
    while let Some(batch) = lane.next_batch(1, Duration::ZERO, outbox) {
        let run = std::panic::AssertUnwindSafe(|| {
            let replies = batch.requests.iter().map(|request| {
                handled.fetch_add(1, Ordering::Relaxed);
                handle(request)
            });
            let replies = replies.collect();
            batch.answer(replies);
        });
        let _ = std::panic::catch_unwind(run);
    }
}

/// `/bytes?<n>` answers n bytes; `/wait?<ms>`, `/api/v1/renew?<ms>` and `/api/v1/crl?<ms>` wait;
/// `/panic` panics; the rest tells what came.
fn handle(request: &Request) -> Reply {
    let number = request.query.parse().unwrap_or(0);
    let body = match request.path.as_str() {
        "/bytes" => vec![b'x'; number],
        "/panic" => std::panic::panic_any("asked for"),
        _ => echo(request),
    };
    if matches!(request.path.as_str(), "/wait" | "/api/v1/renew" | "/api/v1/crl") {
        thread::sleep(Duration::from_millis(number as u64));
    }
    let mut reply = Reply::of_type("text/plain", body);
    reply.status = if request.path == "/nothing" { 204 } else { 200 };
    reply
}

fn echo(request: &Request) -> Vec<u8> {
    let Request { method, path, query, client, .. } = request;
    let target = if query.is_empty() { path.clone() } else { format!("{path}?{query}") };
    let mut text = format!("{} {target} {client}", method.name());
    for (name, value) in [
        ("Authorization", &request.authorization),
        ("Content-Type", &request.content_type),
        ("Accept", &request.accept),
    ] {
        if let Some(value) = value {
            text.push_str(&format!(" {name}={value}"));
        }
    }
    text.push('\n');
    [text.as_bytes(), &request.body].concat()
}

impl Served {
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends `bytes` and reads to the end of the connection.
    pub fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        to_end(&mut stream)
    }

    /// Sends `bytes`, ends our side, and reads to the end of the connection.
    pub fn exchange_and_end(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        to_end(&mut stream)
    }

    /// A plain request on a connection of its own, and how long its answer took.
    pub fn probe(&self) -> Duration {
        let start = Instant::now();
        let answer = self.exchange(b"GET /probe HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        start.elapsed()
    }

    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.handle.shutdown();
        if let Some(edge) = self.edge.take() {
            edge.join().unwrap();
        }
        for (lane, worker) in self.workers.drain(..) {
            lane.stop();
            worker.join().unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.stop();
        }
    }
}

/// Reads to the end of the connection; a reset counts as an end.
pub fn to_end(stream: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8(bytes).unwrap()
}

/// Reads one response with a `Content-Length`, or none for a status without a body.
pub fn one_response(stream: &mut impl Read, is_head: bool) -> (u16, String, String) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head[9..12].parse().unwrap();
    let length = field(&head, "Content-Length").map_or(0, |v| v.parse().unwrap());
    let mut body = vec![0; if is_head { 0 } else { length }];
    stream.read_exact(&mut body).unwrap();
    (status, head, String::from_utf8(body).unwrap())
}

/// The value of a field in a head.
pub fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let named = |line: &'a str| line.strip_prefix(name)?.strip_prefix(": ");
    head.split("\r\n").find_map(named)
}

/// The statuses of all responses in `text`.
pub fn statuses(text: &str) -> Vec<u16> {
    text.split("HTTP/1.1 ").skip(1).map(|r| r[..3].parse().unwrap()).collect()
}

/// Runs `body` in a process of its own, in which no other test runs: for what counts or limits
/// something of the whole process. `test` is the name of the test that calls this.
pub fn alone(test: &str, body: impl FnOnce()) {
    const MARK: &str = "EDGE_TEST_IS_ALONE";
    if std::env::var_os(MARK).is_some() {
        return body();
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    let output = again.args(["--exact", test]).env(MARK, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{test}: {said}");
}

/// Connects from another loopback address, so that limits per address see many clients.
pub fn connect_from(host: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    // Small, so that what is not read waits on the other side soon.
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 16 * 1024)?;
    bind(&socket, &SocketAddr::new(host, 0))?;
    connect(&socket, &to)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}
