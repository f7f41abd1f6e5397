//! Lanes, the workers' side: `tiny_http` on private sockets, one connection and one worker each.
//!
//! A worker takes what waits as a batch and answers each [`Call`] once. A call that is dropped
//! unanswered, by a panic for instance, answers 500 by itself: every request has its answer, in
//! order, or the edge would have to give the lane up.

use std::error::Error;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io::{self, BufWriter, Write};
use std::mem;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tiny_http::{Method, Request, Server, StatusCode};

use crate::clock;
use crate::edge::{self, LaneAddress};
use crate::http::{LaneKind, Reply};
use crate::problem::Code;

/// What a Unix socket's path may have, its final zero not counted (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// A batch whose bodies have this many bytes takes no more: they are ours to hold, not the edge's.
const BATCH_BYTES: usize = 256 * 1024;
/// Bytes of answers that are written together.
const WRITTEN: usize = 16 * 1024;
/// Room for the head of an answer.
const HEAD: usize = 256;
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
pub fn open_lanes(dir: &Path, kinds: &[LaneKind]) -> Result<Vec<Lane>, LaneError> {
    make_private(dir).map_err(|e| LaneError::Open(dir.to_path_buf(), e.into()))?;
    let lane =
        |(i, kind): (usize, &LaneKind)| Lane::open(dir.join(format!("lane-{i}.sock")), *kind);
    kinds.iter().enumerate().map(lane).collect()
}

fn make_private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // SECURITY: whoever can connect to a lane speaks for any client.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

/// The worker's end of a lane.
pub struct Lane {
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

/// Ends a lane's [`Lane::next_batch`] from another thread.
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

impl Lane {
    fn open(path: PathBuf, kind: LaneKind) -> Result<Self, LaneError> {
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(LaneError::PathTooLong(path));
        }
        let address = LaneAddress { kind, path: path.clone() };
        let lane = Lane { shared: Arc::default(), address };
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
    /// nothing has come for `pause`; all are for [`answer`]. False when [`Stopper::stop`] was called.
    pub fn next_batch(&self, bound: usize, pause: Duration, batch: &mut Vec<Call>) -> bool {
        let present = self.shared.server().clone();
        let Some(server) = present else { return self.replace_server() };
        let gathered = match self.next(&server) {
            Ok(Some(request)) => {
                batch.push(Call::new(request));
                gather(&server, bound, pause, batch)
            }
            Ok(None) => return false,
            Err(_) if self.is_stopped() => return false,
            Err(e) => Err(e),
        };
        let Err(e) = gathered else { return true };
        // After an error in `accept`, of which it tells once, `tiny_http` never accepts again.
        log::warn!("lane {}: {e}", self.address.path.display());
        drop(server);
        self.replace_server() || !batch.is_empty()
    }

    /// `None` when stopped and nothing waits: `try_recv` may have swallowed what ends `recv`.
    fn next(&self, server: &Server) -> io::Result<Option<Request>> {
        if self.is_stopped() { server.try_recv() } else { server.recv().map(Some) }
    }

    fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }

    /// What was taken from the old one can still be answered.
    fn replace_server(&self) -> bool {
        if let Err(e) = self.listen() {
            log::error!("lane {}: {e}", self.address.path.display());
            thread::sleep(RETRY);
        }
        !self.is_stopped()
    }
}

fn gather(server: &Server, bound: usize, pause: Duration, batch: &mut Vec<Call>) -> io::Result<()> {
    let mut bytes: usize = batch.iter().map(|call| call.body.len()).sum();
    let longest = (pause * PAUSES).as_millis();
    let began = clock::now().mono_ms;
    let waits = || u128::from(clock::now().mono_ms.saturating_sub(began)) < longest;
    while (1..bound).contains(&batch.len()) && bytes < BATCH_BYTES {
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
        let call = Call::new(request);
        bytes += call.body.len();
        batch.push(call);
    }
    Ok(())
}

/// One request, to be answered once.
pub struct Call {
    request: Option<Request>,
    body: Vec<u8>,
    /// The answer, if nobody needs to be asked for it.
    known: Option<Reply>,
}

impl Call {
    /// The edge's own requests, and what stops short, are not answered here but in their turn: an
    /// answer that overtakes others of its batch would wait for them, and they for its worker.
    fn new(request: Request) -> Self {
        let mut call = Call { request: Some(request), body: Vec::new(), known: None };
        if call.client() == edge::NOBODY {
            call.known = Some(Reply::empty(204));
        } else if !call.read_body() {
            // A lane that broke: nobody acts on half a request.
            call.known = Some(unanswered());
        }
        call
    }

    /// There is somebody who asks, and nothing is answered yet.
    pub fn is_open(&self) -> bool {
        self.known.is_none()
    }

    /// The method.
    pub fn method(&self) -> &Method {
        self.request.as_ref().map_or(&Method::Get, Request::method)
    }

    /// The target: path and query, or `*`.
    pub fn target(&self) -> &str {
        self.request.as_ref().map_or("", Request::url)
    }

    /// The value of the first field of that name; only fields that the edge lets through are here.
    pub fn header(&self, name: &'static str) -> Option<&str> {
        let headers = self.request.as_ref()?.headers();
        headers.iter().find(|h| h.field.equiv(name)).map(|h| h.value.as_str())
    }

    /// The client's address as text.
    pub fn client(&self) -> &str {
        self.private().nth(1).unwrap_or_default()
    }

    /// The certificate whose key the client holds, DER in base64; only where it is asked for.
    pub fn certificate(&self) -> Option<&str> {
        self.private().nth(2)
    }

    /// Takes the body out.
    pub fn take_body(&mut self) -> Vec<u8> {
        mem::take(&mut self.body)
    }

    /// Number, client and certificate. Nobody but the edge can connect; without a number it closes
    /// the lane.
    fn private(&self) -> impl Iterator<Item = &str> {
        self.header(edge::PRIVATE_FIELD).unwrap_or_default().split(' ')
    }

    /// A body must be read to its end, or what is behind it in the lane is never seen.
    fn read_body(&mut self) -> bool {
        let Some(request) = &mut self.request else { return false };
        let length = request.body_length().unwrap_or(0).min(edge::BODY_MAX);
        if length == 0 {
            return true;
        }
        self.body.reserve_exact(length);
        let read = request.as_reader().read_to_end(&mut self.body);
        read.is_ok_and(|n| n == length)
    }

    /// Writes the head of the answer, which is the edge's to read: the client gets another.
    fn write_head(&self, reply: &Reply, out: &mut impl Write) -> io::Result<()> {
        let reason = StatusCode(reply.status).default_reason_phrase();
        write!(out, "HTTP/1.1 {} {reason}\r\n", reply.status)?;
        let number = self.private().next().unwrap_or_default();
        write!(out, "{}: {number}\r\n", edge::PRIVATE_FIELD)?;
        for (name, value) in reply.fields() {
            write!(out, "{name}: {value}\r\n")?;
        }
        write!(out, "Content-Length: {}\r\n\r\n", reply.body.len())
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(request) = self.request.take() {
            let known = Some(unanswered());
            answer(vec![Call { request: Some(request), body: Vec::new(), known }], Vec::new());
        }
    }
}

/// Answers the calls of a batch in their order, those that are open with the next of `replies`.
pub fn answer(calls: Vec<Call>, replies: Vec<Reply>) {
    let mut replies = replies.into_iter();
    let mut answers = Answers::default();
    for mut call in calls {
        // With a request of the edge's own begins each connection; what came before it may be of one
        // that is lost.
        if call.client() == edge::NOBODY {
            mem::take(&mut answers).flush();
        }
        let reply = call.known.take().or_else(|| replies.next()).unwrap_or_else(unanswered);
        if let Err(e) = answers.add(call, &reply) {
            log::debug!("an answer was lost with its lane: {e}");
        }
    }
    answers.flush();
}

/// Answers on their way. All go through the writer of the first, together, because each write wakes
/// the edge up, which is why they are not responses of `tiny_http`. The writers of the others are
/// only ended, and after the last of them the next batch may write.
#[derive(Default)]
struct Answers {
    out: Option<BufWriter<Box<dyn Write + Send>>>,
    others: Vec<Box<dyn Write + Send>>,
}

impl Answers {
    fn add(&mut self, mut call: Call, reply: &Reply) -> io::Result<()> {
        let mut head = Vec::with_capacity(HEAD);
        call.write_head(reply, &mut head)?;
        let bare = *call.method() == Method::Head || matches!(reply.status, 204 | 304);
        let body = if bare { &[] } else { reply.body.as_slice() };
        let Some(request) = call.request.take() else { return Ok(()) };
        let writer = request.into_writer();
        let out = match &mut self.out {
            Some(out) => {
                self.others.push(writer);
                out
            }
            None => self.out.insert(BufWriter::with_capacity(WRITTEN, writer)),
        };
        out.write_all(&head)?;
        out.write_all(body)
    }

    fn flush(self) {
        if let Some(Err(e)) = self.out.map(|mut out| out.flush()) {
            log::debug!("answers were lost with their lane: {e}");
        }
    }
}

fn unanswered() -> Reply {
    Reply::problem(&Code::InternalError.into(), clock::now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn folder(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("server-{}-{name}", std::process::id()))
    }

    /// With a lane in a folder of its own.
    fn with_lane(name: &str, check: impl FnOnce(&Lane)) {
        let dir = folder(name);
        let lane = open_lanes(&dir, &[LaneKind::Plain]).unwrap().remove(0);
        check(&lane);
        drop(lane);
        fs::remove_dir(dir).unwrap();
    }

    /// What the edge would read for these requests, of which the first is for `/x`: all of it up to
    /// the answer with the number `last`.
    fn exchange(lane: &Lane, requests: &str, replies: &[Reply], last: u64) -> String {
        let mut stream = UnixStream::connect(&lane.address().path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(requests.as_bytes()).unwrap();
        let mut batch = Vec::new();
        while batch.len() < requests.matches(" HTTP/1.1").count() {
            let mut more = Vec::new();
            assert!(lane.next_batch(16, Duration::from_millis(200), &mut more));
            batch.append(&mut more);
        }
        assert_eq!((batch[0].target(), batch[0].client()), ("/x", "192.0.2.1"));
        if replies.is_empty() {
            drop(batch);
        } else {
            answer(batch, replies.to_vec());
        }
        let mut text = String::new();
        while !text
            .split_once(&format!("{}: {last}\r\n", edge::PRIVATE_FIELD))
            .is_some_and(|(_, rest)| rest.contains("\r\n\r\n"))
        {
            let mut buf = [0; 4096];
            let n = stream.read(&mut buf).unwrap();
            text.push_str(std::str::from_utf8(&buf[..n]).unwrap());
        }
        text
    }

    fn reply(body: &str) -> Reply {
        Reply::of_type("text/plain", body)
    }

    #[test]
    fn a_call_that_is_dropped_answers_500_with_its_number() {
        with_lane("drop", |lane| {
            let folder = lane.address().path.parent().unwrap();
            assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700);
            let text = exchange(lane, "GET /x HTTP/1.1\r\nX-Edge: 42 192.0.2.1\r\n\r\n", &[], 42);
            assert!(text.starts_with("HTTP/1.1 500 ") && text.contains("X-Edge: 42\r\n"), "{text}");
        });
    }

    #[test]
    fn a_batch_is_answered_in_order_the_proof_in_its_midst_too() {
        with_lane("order", |lane| {
            let requests = "GET /x HTTP/1.1\r\nX-Edge: 1 192.0.2.1\r\n\r\n\
                            OPTIONS * HTTP/1.1\r\nX-Edge: 2 -\r\n\r\n\
                            HEAD /y HTTP/1.1\r\nX-Edge: 3 192.0.2.2\r\n\r\n\
                            GET /z HTTP/1.1\r\nX-Edge: 4 192.0.2.1\r\n\r\n";
            let text = exchange(lane, requests, &[reply("one"), reply("three")], 4);
            let (got, last) = text.split_at(text.find("HTTP/1.1 500").unwrap());
            assert_eq!(
                got,
                "HTTP/1.1 200 OK\r\nX-Edge: 1\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\none\
                 HTTP/1.1 204 No Content\r\nX-Edge: 2\r\nContent-Length: 0\r\n\r\n\
                 HTTP/1.1 200 OK\r\nX-Edge: 3\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\n"
            );
            // For whom there is no reply.
            assert!(last.contains("X-Edge: 4\r\n"), "{last}");
        });
    }

    #[test]
    fn what_is_left_of_a_lost_connection_takes_no_answer_of_the_next() {
        with_lane("lost", |lane| {
            let mut batch = Vec::new();
            let mut lost = UnixStream::connect(&lane.address().path).unwrap();
            lost.write_all(b"GET /x HTTP/1.1\r\nX-Edge: 1 192.0.2.1\r\n\r\n").unwrap();
            assert!(lane.next_batch(1, Duration::ZERO, &mut batch));
            drop(lost);
            let mut next = UnixStream::connect(&lane.address().path).unwrap();
            next.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            next.write_all(b"OPTIONS * HTTP/1.1\r\nX-Edge: 2 -\r\n\r\n").unwrap();
            assert!(lane.next_batch(1, Duration::ZERO, &mut batch));
            answer(batch, vec![reply("one")]);
            let mut buf = [0; 4096];
            let n = next.read(&mut buf).unwrap();
            let text = std::str::from_utf8(&buf[..n]).unwrap();
            assert!(text.starts_with("HTTP/1.1 204 No Content\r\nX-Edge: 2\r\n"), "{text}");
        });
    }

    #[test]
    fn a_server_is_replaced_in_its_place() {
        let dir = folder("replace");
        let lane = open_lanes(&dir, &[LaneKind::Plain]).unwrap().remove(0);
        lane.listen().unwrap();
        let text = exchange(&lane, "GET /x HTTP/1.1\r\nX-Edge: 7 192.0.2.1\r\n\r\n", &[], 7);
        assert!(text.contains("X-Edge: 7\r\n"), "{text}");
        // A stale file, as after a crash, is in nobody's way.
        drop(lane);
        fs::write(dir.join("lane-0.sock"), "").unwrap();
        drop(open_lanes(&dir, &[LaneKind::Plain]).unwrap());
        fs::remove_dir(dir).unwrap();
    }

    #[test]
    fn a_path_that_does_not_fit_is_named() {
        let long = folder(&"x".repeat(100));
        let error = open_lanes(&long, &[LaneKind::Plain]).map(|_| ()).unwrap_err();
        assert!(matches!(&error, LaneError::PathTooLong(_)), "{error}");
        fs::remove_dir(long).unwrap();
    }
}
