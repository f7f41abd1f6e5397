//! Lanes, the workers' side: `tiny_http` on private sockets, one connection and one worker each.
//!
//! A worker takes what waits as a batch and answers each [`Call`] once. A call that is dropped
//! unanswered, by a panic for instance, answers 500 by itself: every request has its answer, in
//! order, or the edge would have to give the lane up.

use std::error::Error;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io::{self, Cursor};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tiny_http::{Header, Method, Request, Response, Server, StatusCode};

use crate::clock;
use crate::edge::{self, Kind, LaneAddress};
use crate::problem::Code;

/// What a Unix socket's path may have, its final zero not counted (unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;

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
    server: Arc<Server>,
    address: LaneAddress,
    fixed: [Header; 2],
}

/// Ends a lane's [`Lane::next_batch`] from another thread.
#[derive(Clone)]
pub struct Stopper(Arc<Server>);

impl Stopper {
    /// Ends the present wait, or the next one.
    pub fn stop(&self) {
        self.0.unblock();
    }
}

impl Lane {
    fn open(path: PathBuf, kind: Kind) -> Result<Self, LaneError> {
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(LaneError::PathTooLong(path));
        }
        let failed = |why: Box<dyn Error + Send + Sync>| LaneError::Open(path.clone(), why);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e.into())),
            _ => {}
        }
        let server = Server::http_unix(&path).map_err(failed)?;
        let fixed = [header("Date", "-"), header("Server", "-")];
        let fixed = fixed.map(|h| h.ok_or("a constant field is malformed"));
        let [date, name] = fixed;
        let fixed = [date.map_err(|e| failed(e.into()))?, name.map_err(|e| failed(e.into()))?];
        Ok(Lane { server: Arc::new(server), address: LaneAddress { kind, path }, fixed })
    }

    /// What the edge has to know.
    pub fn address(&self) -> &LaneAddress {
        &self.address
    }

    /// For the thread that ends the worker.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.server))
    }

    /// Waits for a request, then takes up to `bound` with those that wait behind it. The requests
    /// by which the edge proves the lane are answered here. False when [`Stopper::stop`] was
    /// called or the server has failed.
    pub fn next_batch(&self, bound: usize, batch: &mut Vec<Call>) -> bool {
        while batch.is_empty() {
            let Ok(request) = self.server.recv() else { return false };
            self.admit(request, batch);
            while batch.len() < bound {
                let Ok(Some(request)) = self.server.try_recv() else { break };
                self.admit(request, batch);
            }
        }
        true
    }

    fn admit(&self, request: Request, batch: &mut Vec<Call>) {
        let named = |h: &&Header| h.field.equiv(edge::PRIVATE_FIELD);
        let private = request.headers().iter().find(named).map(|h| h.value.as_str().to_owned());
        let (number, client) = match private.as_deref().and_then(|v| v.split_once(' ')) {
            Some((number, client)) => (number.to_owned(), client.to_owned()),
            // Nobody but the edge can connect; without a number the edge closes the lane.
            None => (String::new(), String::new()),
        };
        let is_proof = client == "-";
        let fixed = self.fixed.clone();
        let mut call = Call { request: Some(request), number, client, body: Vec::new(), fixed };
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

    /// The body, whole.
    pub fn body(&self) -> &[u8] {
        &self.body
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
