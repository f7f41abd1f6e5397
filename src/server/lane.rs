//! Lanes, the workers' side: `tiny_http` on private sockets, one connection and one worker each.
//!
//! A worker takes what waits as a batch and answers each [`Call`] once. A call that is dropped
//! unanswered, by a panic for instance, answers 500 by itself: every request has its answer, in
//! order, or the edge would have to give the lane up.

use std::error::Error;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io::{self, Cursor};
use std::mem;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tiny_http::{Header, Method, Request, Response, Server, StatusCode};

use crate::clock;
use crate::edge::{self, Kind, LaneAddress};
use crate::problem::Code;

/// What a Unix socket's path may have, its final zero not counted (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// A batch whose bodies have this many bytes takes no more: they are ours to hold, not the edge's.
const BATCH_BYTES: usize = 256 * 1024;
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
pub fn open_lanes(dir: &Path, kinds: &[Kind]) -> Result<Vec<Lane>, LaneError> {
    make_private(dir).map_err(|e| LaneError::Open(dir.to_path_buf(), e.into()))?;
    let lane = |(i, kind): (usize, &Kind)| Lane::open(dir.join(format!("lane-{i}.sock")), *kind);
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
    fixed: [Header; 2],
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
    fn open(path: PathBuf, kind: Kind) -> Result<Self, LaneError> {
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(LaneError::PathTooLong(path));
        }
        let constant = |name| {
            header(name, "-").ok_or_else(|| LaneError::Open(path.clone(), "a bad constant".into()))
        };
        // Ready-made, or `tiny_http` makes its own for each answer; the edge drops both.
        let fixed = [constant("Date")?, constant("Server")?];
        let lane = Lane {
            shared: Arc::default(),
            address: LaneAddress { kind, path: path.clone() },
            fixed,
        };
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
    /// nothing has come for `pause`. The requests by which the edge proves the lane are answered
    /// here. False when [`Stopper::stop`] was called.
    pub fn next_batch(&self, bound: usize, pause: Duration, batch: &mut Vec<Call>) -> bool {
        let present = self.shared.server().clone();
        let Some(server) = present else { return self.replace_server() };
        while batch.is_empty() {
            match self.next(&server) {
                Ok(Some(request)) => self.admit(request, batch),
                Ok(None) => return false,
                Err(_) if self.is_stopped() => return false,
                Err(e) => {
                    // After an error in `accept`, `tiny_http` never accepts again.
                    log::warn!("lane {}: {e}", self.address.path.display());
                    drop(server);
                    return self.replace_server();
                }
            }
            self.gather(&server, bound, pause, batch);
        }
        true
    }

    fn gather(&self, server: &Server, bound: usize, pause: Duration, batch: &mut Vec<Call>) {
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
            let Ok(Some(request)) = next else { return };
            let before = batch.len();
            self.admit(request, batch);
            bytes += batch.get(before).map_or(0, |call| call.body.len());
        }
    }

    /// `None` when stopped and nothing waits: `try_recv` may have swallowed what ends `recv`.
    fn next(&self, server: &Server) -> io::Result<Option<Request>> {
        if self.is_stopped() { server.try_recv() } else { server.recv().map(Some) }
    }

    fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }

    /// Returns with an empty batch, so that the caller comes back to the new server.
    fn replace_server(&self) -> bool {
        if let Err(e) = self.listen() {
            log::error!("lane {}: {e}", self.address.path.display());
            thread::sleep(RETRY);
        }
        !self.is_stopped()
    }

    fn admit(&self, request: Request, batch: &mut Vec<Call>) {
        let named = |h: &&Header| h.field.equiv(edge::PRIVATE_FIELD);
        let private = request.headers().iter().find(named).map_or("", |h| h.value.as_str());
        // Nobody but the edge can connect; without a number the edge closes the lane.
        let mut words = private.split(' ').map(str::to_owned);
        let number = words.next().unwrap_or_default();
        let client = words.next().unwrap_or_default();
        let certificate = words.next();
        let is_proof = client == "-";
        let fixed = self.fixed.clone();
        let body = Vec::new();
        let mut call = Call { request: Some(request), number, client, certificate, body, fixed };
        if is_proof {
            call.respond(Reply { status: 204, headers: Vec::new(), body: Vec::new() });
        } else {
            // A body that stops short is a lane that broke: nobody acts on half a request, and
            // dropping the call is its answer.
            if call.read_body() {
                batch.push(call);
            }
        }
    }
}

/// One request, to be answered once.
pub struct Call {
    request: Option<Request>,
    number: String,
    client: String,
    certificate: Option<String>,
    body: Vec<u8>,
    fixed: [Header; 2],
}

/// What a call is answered with.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// Fields besides `Date`, `Content-Length` and those about the connection.
    pub headers: Vec<Header>,
    /// The body.
    pub body: Vec<u8>,
}

impl Call {
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
        &self.client
    }

    /// The certificate whose key the client holds, DER in base64; only where it is asked for.
    pub fn certificate(&self) -> Option<&str> {
        self.certificate.as_deref()
    }

    /// The body, whole.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Takes the body out.
    pub fn take_body(&mut self) -> Vec<u8> {
        mem::take(&mut self.body)
    }

    /// Answers.
    pub fn answer(mut self, reply: Reply) {
        self.respond(reply);
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

    fn respond(&mut self, reply: Reply) {
        let Some(request) = self.request.take() else { return };
        let mut headers = reply.headers;
        headers.extend(self.fixed.iter().cloned());
        headers.extend(header(edge::PRIVATE_FIELD, &self.number));
        let length = Some(reply.body.len());
        let status = StatusCode(reply.status);
        let response = Response::new(status, headers, Cursor::new(reply.body), length, None)
            .with_chunked_threshold(usize::MAX);
        if let Err(e) = request.respond(response) {
            log::debug!("the answer was lost with its lane: {e}");
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.request.is_some() {
            self.respond(unanswered());
        }
    }
}

fn unanswered() -> Reply {
    let (status, code, text) = Code::InternalError.row();
    let headers =
        [header("Content-Type", "application/json; charset=utf-8"), header("X-Error-Code", code)];
    let body = edge::problem_body(code, text, clock::now()).into_bytes();
    Reply { status, headers: headers.into_iter().flatten().collect(), body }
}

/// A field, or `None` if it would not be ASCII.
///
/// SECURITY: `tiny_http` writes CR and LF in a value as they are (CVE-2026-66753).
pub fn header(name: &str, value: &str) -> Option<Header> {
    let fine = value.bytes().all(|b| matches!(b, b' '..=b'~'));
    fine.then(|| Header::from_bytes(name, value).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn folder(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("server-{}-{name}", std::process::id()))
    }

    /// What the edge would read for this request.
    fn exchange(lane: &Lane, request: &str) -> String {
        let mut stream = UnixStream::connect(&lane.address().path).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut batch = Vec::new();
        assert!(lane.next_batch(16, Duration::ZERO, &mut batch));
        assert_eq!((batch[0].target(), batch[0].client()), ("/x", "192.0.2.1"));
        drop(batch);
        let mut text = String::new();
        while !text.contains("\r\n\r\n") {
            let mut buf = [0; 4096];
            let n = stream.read(&mut buf).unwrap();
            text.push_str(std::str::from_utf8(&buf[..n]).unwrap());
        }
        text
    }

    #[test]
    fn a_call_that_is_dropped_answers_500_with_its_number() {
        let dir = folder("drop");
        let lane = open_lanes(&dir, &[Kind::Plain]).unwrap().remove(0);
        let mode = fs::metadata(&dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let text = exchange(&lane, "GET /x HTTP/1.1\r\nX-Edge: 42 192.0.2.1\r\n\r\n");
        assert!(text.starts_with("HTTP/1.1 500 ") && text.contains("X-Edge: 42\r\n"), "{text}");
        drop(lane);
        fs::remove_dir(dir).unwrap();
    }

    #[test]
    fn a_server_is_replaced_in_its_place() {
        let dir = folder("replace");
        let lane = open_lanes(&dir, &[Kind::Plain]).unwrap().remove(0);
        lane.listen().unwrap();
        let text = exchange(&lane, "GET /x HTTP/1.1\r\nX-Edge: 7 192.0.2.1\r\n\r\n");
        assert!(text.contains("X-Edge: 7\r\n"), "{text}");
        // A stale file, as after a crash, is in nobody's way.
        drop(lane);
        fs::write(dir.join("lane-0.sock"), "").unwrap();
        drop(open_lanes(&dir, &[Kind::Plain]).unwrap());
        fs::remove_dir(dir).unwrap();
    }

    #[test]
    fn a_path_that_does_not_fit_is_named() {
        let long = folder(&"x".repeat(100));
        let error = open_lanes(&long, &[Kind::Plain]).map(|_| ()).unwrap_err();
        assert!(matches!(&error, LaneError::PathTooLong(_)), "{error}");
        fs::remove_dir(long).unwrap();
    }

    #[test]
    fn fields_cannot_break_the_line() {
        assert!(header("X-A", "fine").is_some());
        for bad in ["a\r\nX-B: c", "a\nb", "\0", "\u{e4}"] {
            assert!(header("X-A", bad).is_none(), "{bad:?}");
        }
    }
}
