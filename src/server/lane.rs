//! Lanes, the workers' side: `tiny_http` on private sockets, one connection and one worker each.
//!
//! A worker takes what waits as a [`Batch`] and answers it once, through the edge's inbox. Nothing is
//! ever written to the socket: each request's writer is taken and dropped unwritten as soon as the
//! request is read, and what is left of it are its own words. So there is no second way out, on which
//! an answer could meet those of others. Requests of a batch that is dropped, by a panic for instance,
//! are answered with 500: every request has its answer.

use std::error::Error;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tiny_http::Server;

use crate::api::Request;
use crate::clock;
use crate::edge::{self, LaneAddress, Outbox};
use crate::http::{LaneKind, Method, Reply};
use crate::problem::Code;

/// What a Unix socket's path may have, its final zero not counted (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// A batch whose bodies have this many bytes takes no more: they are ours to hold, not the edge's.
const BATCH_BYTES: usize = 256 * 1024;
/// Requests waiting in one lane; at 15 µs each, 1,024 are a wait of 15 ms.
const MAX_WAITING: usize = 1024;
/// A connection with a request in work never gives way, and large replies take long: the clients that
/// wait for one must not take all the places.
const MAX_WAITING_BULK: usize = 16;
/// However steadily requests come, a batch waits no longer than so many pauses.
const PAUSES: u32 = 5;

/// The pause between attempts to replace a server.
const RETRY: Duration = Duration::from_secs(1);

/// Why there are no lanes.
#[derive(Debug)]
pub enum LaneError {
    /// The path does not fit into a socket's address.
    PathTooLong(PathBuf),
    /// The folder or the socket cannot be made.
    Open(PathBuf, Box<dyn Error + Send + Sync>),
}

impl fmt::Display for LaneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LaneError::PathTooLong(path) => write!(
                f,
                "{}: a socket's path may have {SOCKET_PATH_MAX} bytes at most",
                path.display()
            ),
            LaneError::Open(path, why) => write!(f, "{}: {why}", path.display()),
        }
    }
}

impl Error for LaneError {}

/// Opens one lane for each entry of `kinds` in the folder `dir`, which is made with mode 0700.
///
/// # Errors
/// When a socket cannot be made there.
pub fn open_lanes(dir: &Path, kinds: &[LaneKind]) -> Result<Vec<LaneServer>, LaneError> {
    make_private(dir).map_err(|e| LaneError::Open(dir.to_path_buf(), e.into()))?;
    let lane =
        |(i, kind): (usize, &LaneKind)| LaneServer::open(dir.join(format!("lane-{i}.sock")), *kind);
    kinds.iter().enumerate().map(lane).collect()
}

fn make_private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // SECURITY: a process that can connect to a lane can speak for any client.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

/// The worker's end of a lane.
pub struct LaneServer {
    shared: Arc<Shared>,
    address: LaneAddress,
}

#[derive(Default)]
struct Shared {
    /// `None` while a server that failed is replaced.
    server: Mutex<Option<Arc<Server>>>,
    stopped: AtomicBool,
}

impl Shared {
    fn server(&self) -> MutexGuard<'_, Option<Arc<Server>>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a lane's [`LaneServer::next_batch`] from another thread.
#[derive(Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Ends the present wait, or the next one.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::Release);
        if let Some(server) = &*self.0.server() {
            server.unblock();
        }
    }
}

impl LaneServer {
    fn open(path: PathBuf, kind: LaneKind) -> Result<Self, LaneError> {
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(LaneError::PathTooLong(path));
        }
        let max_waiting = if kind == LaneKind::Bulk { MAX_WAITING_BULK } else { MAX_WAITING };
        let address = LaneAddress { kind, path: path.clone(), max_waiting };
        let lane = LaneServer { shared: Arc::default(), address };
        lane.listen().map_err(|e| LaneError::Open(path, e))?;
        Ok(lane)
    }

    /// Puts a new server in the place of the present one, if any.
    fn listen(&self) -> Result<Arc<Server>, Box<dyn Error + Send + Sync>> {
        // The old one goes first: as it goes, it removes the socket's file.
        drop(self.shared.server().take());
        match fs::remove_file(&self.address.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let server = Arc::new(Server::http_unix(&self.address.path)?);
        *self.shared.server() = Some(Arc::clone(&server));
        Ok(server)
    }

    /// What the edge has to know.
    pub fn address(&self) -> &LaneAddress {
        &self.address
    }

    /// For the thread that ends the worker.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Waits for a request, then takes up to `bound` with those that wait behind it, or come before
    /// nothing has come for `pause`. `None` when [`Stopper::stop`] was called.
    pub fn next_batch(&self, bound: usize, pause: Duration, outbox: &Outbox) -> Option<Batch> {
        let mut batch = Batch::new(outbox.clone());
        while let Some(server) = self.server() {
            match self.fill(&server, bound, pause, &mut batch) {
                Ok(false) => return None,
                Ok(true) => return Some(batch),
                Err(_) if self.is_stopped() => return None,
                // After an error in `accept`, of which it tells once, `tiny_http` never accepts again.
                Err(e) => log::warn!("lane {}: {e}", self.address.path.display()),
            }
            drop(server);
            self.shared.server().take();
            if !batch.is_empty() {
                return Some(batch);
            }
        }
        None
    }

    /// The present server, or another in its place; `None` when stopped.
    fn server(&self) -> Option<Arc<Server>> {
        loop {
            let present = self.shared.server().clone();
            match present.map_or_else(|| self.listen(), Ok) {
                Ok(server) => return Some(server),
                Err(_) if self.is_stopped() => return None,
                Err(e) => log::error!("lane {}: {e}", self.address.path.display()),
            }
            thread::sleep(RETRY);
        }
    }

    /// False when stopped and nothing waits.
    fn fill(
        &self,
        server: &Server,
        bound: usize,
        pause: Duration,
        batch: &mut Batch,
    ) -> io::Result<bool> {
        // `try_recv` may have swallowed what ends `recv`.
        let next = if self.is_stopped() { server.try_recv() } else { server.recv().map(Some) };
        let Some(request) = next? else { return Ok(false) };
        batch.add(request);
        gather(server, bound, pause, batch)?;
        Ok(true)
    }

    fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }
}

fn gather(server: &Server, bound: usize, pause: Duration, batch: &mut Batch) -> io::Result<()> {
    let longest = (pause * PAUSES).as_millis();
    let began = clock::now().mono_ms;
    let waits = || u128::from(clock::now().mono_ms.saturating_sub(began)) < longest;
    while batch.len() < bound && batch.bytes() < BATCH_BYTES {
        let next = match server.try_recv() {
            Ok(None) if !pause.is_zero() && waits() => {
                // Woken with less than a millisecond left, it leaves the request where it is.
                server.recv_timeout(pause).and_then(|next| match next {
                    None => server.try_recv(),
                    next => Ok(next),
                })
            }
            next => next,
        };
        let Some(request) = next? else { break };
        batch.add(request);
    }
    Ok(())
}

/// Requests that are answered together, once.
pub struct Batch {
    /// What is to be answered.
    pub requests: Vec<Request>,
    /// The number of each.
    numbers: Vec<u64>,
    /// Answers that are known without asking the API.
    known: Vec<(u64, Reply)>,
    outbox: Outbox,
}

impl Batch {
    fn new(outbox: Outbox) -> Self {
        Batch { requests: Vec::new(), numbers: Vec::new(), known: Vec::new(), outbox }
    }

    fn len(&self) -> usize {
        self.numbers.len() + self.known.len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn bytes(&self) -> usize {
        self.requests.iter().map(|request| request.body.len()).sum()
    }

    fn add(&mut self, mut request: tiny_http::Request) {
        // A body must be read to its end, or what is behind it in the lane is never seen.
        let body = read_body(&mut request);
        let (number, who) = private(&request);
        match (body, who.as_str()) {
            (_, edge::NOBODY) => self.known.push((number, Reply::empty(204))),
            (Some(body), _) => {
                self.requests.push(taken(&request, &who, body));
                self.numbers.push(number);
            }
            // The lane broke: half a request is not acted on.
            (None, _) => self.known.push((number, unanswered())),
        }
        drop(request.into_writer());
    }

    /// Answers the requests with these, in order.
    pub fn answer(mut self, replies: Vec<Reply>) {
        self.send(replies);
    }

    fn send(&mut self, replies: Vec<Reply>) {
        let replies = replies.into_iter().chain(std::iter::repeat_with(unanswered));
        let mut answers = std::mem::take(&mut self.known);
        answers.extend(std::mem::take(&mut self.numbers).into_iter().zip(replies));
        if !answers.is_empty() {
            self.outbox.send(answers);
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.send(Vec::new());
    }
}

fn unanswered() -> Reply {
    Reply::problem(&Code::InternalError.into(), clock::now())
}

fn read_body(request: &mut tiny_http::Request) -> Option<Vec<u8>> {
    let length = request.body_length().unwrap_or(0).min(edge::BODY_MAX);
    let mut body = Vec::with_capacity(length);
    if length > 0 {
        request.as_reader().read_to_end(&mut body).ok()?;
    }
    (body.len() == length).then_some(body)
}

/// The request's number, and the client: its address, and its certificate where that is wanted. Only the
/// edge can connect, and always sends a number; an answer to number 0 has no effect.
fn private(request: &tiny_http::Request) -> (u64, String) {
    let value = field(request, edge::PRIVATE_FIELD).unwrap_or_default();
    let (number, who) = value.split_once(' ').unwrap_or((&value, edge::NOBODY));
    (number.parse().unwrap_or(0), who.to_owned())
}

fn field(request: &tiny_http::Request, name: &'static str) -> Option<String> {
    let field = request.headers().iter().find(|header| header.field.equiv(name))?;
    Some(field.value.as_str().to_owned())
}

/// The request in words of our own.
fn taken(request: &tiny_http::Request, who: &str, body: Vec<u8>) -> Request {
    let (path, query) = request.url().split_once('?').unwrap_or((request.url(), ""));
    let (client, certificate) = who.split_once(' ').unwrap_or((who, ""));
    Request {
        method: Method::parse(request.method().as_str()),
        path: path.to_owned(),
        query: query.to_owned(),
        authorization: field(request, "Authorization"),
        content_type: field(request, "Content-Type"),
        accept: field(request, "Accept"),
        client: client.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        client_certificate: STANDARD.decode(certificate).ok().filter(|der| !der.is_empty()),
        body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    fn folder(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("server-{}-{name}", std::process::id()))
    }

    /// A lane in a folder of its own, and the answers of its worker.
    struct Staged {
        lane: LaneServer,
        dir: PathBuf,
        outbox: Outbox,
        answered: mpsc::Receiver<(u64, Reply)>,
    }

    impl Staged {
        fn open(name: &str) -> Self {
            let dir = folder(name);
            let lane = open_lanes(&dir, &[LaneKind::Plain]).unwrap().remove(0);
            let (sender, answered) = mpsc::channel();
            let outbox = Outbox::to(move |answers| {
                answers.into_iter().for_each(|answer| sender.send(answer).unwrap());
            });
            Staged { lane, dir, outbox, answered }
        }

        fn connect(&self) -> UnixStream {
            UnixStream::connect(&self.lane.address().path).unwrap()
        }

        fn next_batch(&self) -> Batch {
            self.lane.next_batch(16, Duration::from_millis(200), &self.outbox).unwrap()
        }

        /// Status and body of the answers to these requests.
        fn answered(&self) -> Vec<(u64, u16, String)> {
            let text = |reply: Reply| String::from_utf8(reply.body).unwrap();
            self.answered.try_iter().map(|(n, r)| (n, r.status, text(r))).collect()
        }
    }

    impl Drop for Staged {
        fn drop(&mut self) {
            self.lane.shared.server().take();
            fs::remove_dir(&self.dir).unwrap();
        }
    }

    fn get(number: u32, path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nX-Edge: {number} 192.0.2.1\r\n\r\n")
    }

    fn reply(body: &str) -> Reply {
        Reply::of_type("text/plain", body)
    }

    #[test]
    fn requests_become_our_own_and_nothing_is_written_back() {
        let staged = Staged::open("own");
        let mode = fs::metadata(&staged.dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let mut stream = staged.connect();
        let body = "b".repeat(5_000);
        let request = format!(
            "POST /x?y=1 HTTP/1.1\r\nAuthorization: Bearer t\r\nAccept: a\r\nCookie: c\r\n\
             X-Edge: 7 2001:db8::9 AQIDBA==\r\nContent-Length: 5000\r\n\r\n{body}"
        );
        // What follows a large body is seen only when that was read.
        stream.write_all((request + &get(8, "/z")).as_bytes()).unwrap();
        let mut requests = Vec::new();
        while requests.len() < 2 {
            let mut batch = staged.next_batch();
            requests.append(&mut batch.requests);
            let replies = batch.numbers.iter().map(|_| reply("r")).collect();
            batch.answer(replies);
        }
        let (first, second) = (&requests[0], &requests[1]);
        assert_eq!((first.method, first.path.as_str()), (Method::Post, "/x"));
        assert_eq!((first.query.as_str(), first.body.len()), ("y=1", 5_000));
        assert_eq!(first.authorization.as_deref(), Some("Bearer t"));
        assert_eq!((first.accept.as_deref(), &first.content_type), (Some("a"), &None));
        assert_eq!(first.client.to_string(), "2001:db8::9");
        assert_eq!(first.client_certificate.as_deref(), Some([1, 2, 3, 4].as_slice()));
        assert_eq!((second.path.as_str(), &second.client_certificate), ("/z", &None));
        let answered: Vec<_> = staged.answered().into_iter().map(|(number, ..)| number).collect();
        assert_eq!(answered, [7, 8]);
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(stream.read(&mut [0]).is_err(), "nothing comes back on the socket");
    }

    #[test]
    fn every_request_of_a_batch_has_one_answer() {
        let staged = Staged::open("batch");
        let proof = "OPTIONS * HTTP/1.1\r\nX-Edge: 2 -\r\n\r\n";
        let all = [get(1, "/x").as_str(), proof, &get(3, "/y"), &get(4, "/z")].concat();
        staged.connect().write_all(all.as_bytes()).unwrap();
        let mut seen = 0;
        while seen < 4 {
            let batch = staged.next_batch();
            seen += batch.len();
            // Too few replies, and none at all if it is dropped.
            let first = batch.numbers.first() == Some(&1);
            if first { batch.answer(vec![reply("one")]) } else { drop(batch) }
        }
        let mut answered = staged.answered();
        answered.sort();
        let statuses: Vec<_> = answered.iter().map(|(n, status, _)| (*n, *status)).collect();
        assert_eq!(statuses, [(1, 200), (2, 204), (3, 500), (4, 500)]);
        assert!(answered[0].2 == "one" && answered[3].2.contains("INTERNAL_ERROR"));
    }

    #[test]
    fn half_a_request_is_not_acted_on() {
        let staged = Staged::open("half");
        let head = "POST /x HTTP/1.1\r\nX-Edge: 1 192.0.2.1\r\nContent-Length: 5000\r\n\r\nhalf";
        staged.connect().write_all(head.as_bytes()).unwrap();
        let batch = staged.next_batch();
        assert!(batch.requests.is_empty());
        drop(batch);
        assert_eq!(staged.answered()[0].1, 500);
    }

    #[test]
    fn a_server_is_replaced_in_its_place() {
        let staged = Staged::open("replace");
        staged.lane.listen().unwrap();
        staged.connect().write_all(get(7, "/x").as_bytes()).unwrap();
        staged.next_batch().answer(vec![reply("r")]);
        assert_eq!(staged.answered(), [(7, 200, "r".to_owned())]);
        // A stale file, as after a crash, is replaced.
        staged.lane.shared.server().take();
        fs::write(&staged.lane.address().path, "").unwrap();
        drop(open_lanes(&staged.dir, &[LaneKind::Plain]).unwrap());
    }

    #[test]
    fn a_path_that_does_not_fit_is_named() {
        let long = folder(&"x".repeat(100));
        let error = open_lanes(&long, &[LaneKind::Plain]).map(|_| ()).unwrap_err();
        assert!(matches!(&error, LaneError::PathTooLong(_)), "{error}");
        fs::remove_dir(long).unwrap();
    }
}
