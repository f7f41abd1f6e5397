//! Lanes, the workers' side: `tiny_http` on private sockets, one connection and one worker each.
//!
//! A worker takes what waits as a [`Batch`] and answers it once, through the edge's inbox. Nothing is
//! ever written to the socket: each request's `tiny_http` writer is dropped unused as soon as the
//! request is read. So no answer can reach the wrong client by the socket. Requests of a batch that is dropped, by a panic for instance,
//! are answered with 500: every request has its answer.
//!
//! A server has the one connection for which it was made: its socket is shut when that waits to be
//! accepted. So `tiny_http` ends the thread that accepts, and, when nothing has come for five seconds,
//! the four that it keeps for more connections. A connection that was lost takes its server with it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use tiny_http::Server;

use crate::api::{Request, classify};
use crate::clock;
use crate::edge::{self, LaneAddress, Outbox, Sender};
use crate::http::{LaneKind, Method, Reply};
use crate::locks::locked;
use crate::problem::Code;

/// A batch whose bodies have this many bytes takes no more: they are ours to hold, not the edge's.
const BATCH_BYTES: usize = 256 * 1024;
/// However steadily requests come, a batch waits no longer than so many pauses.
const PAUSES: u32 = 5;
/// When nothing has come for so long from a connection that was closed, all of it has.
const SILENCE: Duration = Duration::from_millis(50);

/// The lanes of these kinds. Their sockets come into the folder `dir`, which is made with mode 0700.
///
/// # Errors
/// When it cannot be made.
pub fn open_lanes(
    dir: &Path,
    kinds: &[LaneKind],
    workers: usize,
) -> io::Result<Vec<Arc<LaneServer>>> {
    make_private(dir)?;
    let lanes = kinds.iter().flat_map(|kind| std::iter::repeat_n(*kind, kind.lanes.of(workers)));
    let lane = |(i, kind)| {
        let (path, servers) = (dir.join(format!("lane-{i}.sock")), Mutex::default());
        Arc::new(LaneServer { kind, path, servers, stopped: AtomicBool::new(false) })
    };
    Ok(lanes.enumerate().map(lane).collect())
}

fn make_private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // SECURITY: a process that can connect to a lane can speak for any client.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

/// The worker's end of a lane.
pub struct LaneServer {
    kind: LaneKind,
    /// The private socket, which is there while it is connected to.
    path: PathBuf,
    /// The present server, and before it the one that the worker has not left yet.
    servers: Mutex<Vec<Arc<Server>>>,
    stopped: AtomicBool,
}

impl LaneServer {
    /// What the edge has to know.
    pub fn address(self: &Arc<Self>) -> LaneAddress {
        let lane = Arc::clone(self);
        let connect = Box::new(move || lane.connect());
        LaneAddress { kind: self.kind, connect, max_waiting: self.kind.max_waiting }
    }

    /// Puts a new server in the place of the present one, if any, and connects to it.
    fn connect(&self) -> io::Result<UnixStream> {
        let says = |e| io::Error::other(format!("{}: {e}", self.path.display()));
        let (server, stream) = open(&self.path).map_err(says)?;
        let mut servers = locked(&self.servers);
        match servers.as_slice() {
            [present] => present.unblock(),
            // The worker has not seen the latest yet, in which there is a proof at most.
            _ => servers.truncate(1),
        }
        servers.push(Arc::new(server));
        Ok(stream)
    }

    /// Ends the present [`LaneServer::next_batch`], or the next one.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        locked(&self.servers).iter().for_each(|server| server.unblock());
    }

    /// Waits for a request, then adds those behind it and those that follow with gaps shorter than
    /// `pause`, up to `bound` in all. `None` when [`LaneServer::stop`] was called, or before the edge has
    /// connected.
    pub fn next_batch(&self, bound: usize, pause: Duration, outbox: &Outbox) -> Option<Batch> {
        let mut batch = Batch::new(Arc::clone(outbox));
        loop {
            let server = self.server()?;
            // `stop` ends one `recv`; a `try_recv` may have used that up, so this must not wait again.
            let first = match self.stopped.load(Ordering::Acquire) {
                true => server.try_recv(),
                false => server.recv().map(Some),
            };
            match first {
                Ok(first) => batch.add(first?),
                // There is another server; or this one tells that it accepts no more.
                Err(_) => continue,
            }
            gather(&server, bound.min(self.kind.max_batch), pause, &mut batch);
            return Some(batch);
        }
    }

    /// The present server. The edge has refused what is left in the one before it.
    fn server(&self) -> Option<Arc<Server>> {
        let mut servers = locked(&self.servers);
        let present = Arc::clone(servers.last()?);
        let left = servers.len().saturating_sub(1);
        let left: Vec<_> = servers.drain(..left).collect();
        drop(servers);
        for server in left {
            // As long as a body is unread, the connection's thread waits. What ends `recv` looks like
            // silence, too.
            let mut silences = 0;
            while silences < 2 {
                silences += u32::from(matches!(server.recv_timeout(SILENCE), Ok(None)));
            }
        }
        Some(present)
    }
}

/// A server, and the only connection that it will ever have.
fn open(path: &Path) -> io::Result<(Server, UnixStream)> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let stream = UnixStream::connect(path)?;
    shutdown(&listener, Shutdown::Read)?;
    fs::remove_file(path)?;
    // It panics if no thread can be had.
    let started = catch_unwind(AssertUnwindSafe(|| Server::from_listener(listener, None)));
    let started = started.map_err(|_| io::Error::other("no thread can be had"))?;
    Ok((started.map_err(io::Error::other)?, stream))
}

fn gather(server: &Server, bound: usize, pause: Duration, batch: &mut Batch) {
    let longest = u64::try_from((pause * PAUSES).as_millis()).unwrap_or(u64::MAX);
    let until_ms = (longest > 0).then(|| clock::now().mono_ms.saturating_add(longest));
    let waits = || until_ms.is_some_and(|until_ms| clock::now().mono_ms < until_ms);
    while batch.requests.len() < bound && batch.bytes() < BATCH_BYTES {
        let next = match server.try_recv() {
            Ok(None) if waits() => {
                // Woken with less than a millisecond left, it leaves the request where it is.
                server.recv_timeout(pause).and_then(|next| match next {
                    None => server.try_recv(),
                    next => Ok(next),
                })
            }
            next => next,
        };
        let Ok(Some(request)) = next else { return };
        batch.add(request);
    }
}

/// Requests that are answered together, once.
pub struct Batch {
    /// What is to be answered.
    pub requests: Vec<Request>,
    /// The number of each.
    numbers: Vec<u64>,
    replies: Vec<Reply>,
    outbox: Outbox,
}

impl Batch {
    fn new(outbox: Outbox) -> Self {
        Batch { requests: Vec::new(), numbers: Vec::new(), replies: Vec::new(), outbox }
    }

    fn bytes(&self) -> usize {
        self.requests.iter().map(|request| request.body.len()).sum()
    }

    /// Takes a request, or answers at once what the API need not be asked for.
    fn add(&mut self, mut request: tiny_http::Request) {
        // A body must be read to its end, or what is behind it in the lane is never seen.
        let body = read_body(&mut request);
        let (number, sender, target) = edge::read_private(request.url());
        match (sender, body) {
            (None, _) => (self.outbox)(vec![(number, Reply::empty(204))]),
            (Some(sender), Some(body)) => {
                self.requests.push(taken(&request, target, sender, body));
                self.numbers.push(number);
            }
            // The lane broke: half a request is not acted on.
            (Some(_), None) => (self.outbox)(vec![(number, unanswered(target))]),
        }
        drop(request.into_writer());
    }

    /// Answers the requests with these, in order.
    pub fn answer(mut self, replies: Vec<Reply>) {
        self.replies = replies;
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        let mut replies = std::mem::take(&mut self.replies).into_iter();
        let answer = |(number, request): (u64, &Request)| {
            (number, replies.next().unwrap_or_else(|| unanswered(&request.path)))
        };
        let answers: Vec<_> = self.numbers.drain(..).zip(&self.requests).map(answer).collect();
        if !answers.is_empty() {
            (self.outbox)(answers);
        }
    }
}

fn unanswered(path: &str) -> Reply {
    (classify("", path).refuse)(&Code::InternalError.into(), clock::now())
}

fn read_body(request: &mut tiny_http::Request) -> Option<Vec<u8>> {
    let length = request.body_length().unwrap_or(0).min(edge::BODY_MAX);
    let mut body = Vec::with_capacity(length);
    if length > 0 {
        request.as_reader().read_to_end(&mut body).ok()?;
    }
    (body.len() == length).then_some(body)
}

fn field<'r>(request: &'r tiny_http::Request, name: &'static str) -> Option<&'r str> {
    let field = request.headers().iter().find(|header| header.field.equiv(name))?;
    Some(field.value.as_str())
}

/// The request in words of our own.
fn taken(
    request: &tiny_http::Request,
    target: &str,
    sender: Sender<Vec<u8>>,
    body: Vec<u8>,
) -> Request {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let owned = |name| field(request, name).map(str::to_owned);
    Request {
        method: Method::parse(request.method().as_str()),
        path: path.to_owned(),
        query: query.to_owned(),
        authorization: owned("Authorization"),
        content_type: match sender.is_json {
            true => Some(edge::JSON.to_owned()),
            false => owned("Content-Type"),
        },
        accept: owned("Accept"),
        client: sender.address,
        client_certificate: sender.certificate,
        body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::lanes::PLAIN;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Instant;

    fn folder(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("server-{}-{name}", std::process::id()))
    }

    /// A lane in a folder of its own, and the answers of its worker.
    struct Staged {
        lane: Arc<LaneServer>,
        dir: PathBuf,
        outbox: Outbox,
        answered: mpsc::Receiver<(u64, Reply)>,
    }

    impl Staged {
        fn open(name: &str) -> Self {
            let dir = folder(name);
            let lane = open_lanes(&dir, &[PLAIN], 1).unwrap().remove(0);
            let (sender, answered) = mpsc::channel();
            let outbox: Outbox = Arc::new(move |answers| {
                answers.into_iter().for_each(|answer| sender.send(answer).unwrap());
            });
            Staged { lane, dir, outbox, answered }
        }

        fn connect(&self) -> UnixStream {
            self.lane.connect().unwrap()
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
            fs::remove_dir(&self.dir).unwrap();
        }
    }

    fn get(number: u32, path: &str) -> String {
        format!("GET {number},192.0.2.1,,{path} HTTP/1.1\r\n\r\n")
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
            "POST 7,2001:db8::9,AQIDBA==,/x?y=1 HTTP/1.1\r\nAuthorization: Bearer t\r\nAccept: a\r\n\
             Cookie: c\r\nContent-Length: 5000\r\n\r\n{body}"
        );
        // What follows a large body is seen only when that was read.
        stream.write_all((request + &get(8, "/z")).as_bytes()).unwrap();
        let mut requests = Vec::new();
        while requests.len() < 2 {
            let batch = staged.next_batch();
            requests.extend(batch.requests.iter().cloned());
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
        let proof = "OPTIONS 2,-,,* HTTP/1.1\r\n\r\n";
        let all = [get(1, "/x").as_str(), proof, &get(3, "/y"), &get(4, "/z")].concat();
        staged.connect().write_all(all.as_bytes()).unwrap();
        let mut seen = 0;
        while seen < 3 {
            let batch = staged.next_batch();
            seen += batch.numbers.len();
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
        let head = "POST 1,192.0.2.1,,/x HTTP/1.1\r\nContent-Length: 5000\r\n\r\nhalf";
        staged.connect().write_all(head.as_bytes()).unwrap();
        let batch = staged.next_batch();
        assert!(batch.requests.is_empty());
        drop(batch);
        assert_eq!(staged.answered()[0].1, 500);
    }

    #[test]
    fn a_server_is_replaced_in_its_place() {
        let staged = Staged::open("replace");
        // What comes by a connection that was lost meanwhile is not acted on.
        staged.connect().write_all(get(6, "/w").repeat(3).as_bytes()).unwrap();
        // A stale file, as after a crash, is replaced.
        fs::write(&staged.lane.path, "").unwrap();
        drop(staged.connect());
        staged.connect().write_all(get(7, "/x").as_bytes()).unwrap();
        staged.next_batch().answer(vec![reply("r")]);
        assert_eq!(staged.answered(), [(7, 200, "r".to_owned())]);
    }

    /// Of the five threads of a server one is left, and of one that was replaced none, even if large
    /// bodies waited there.
    #[test]
    fn a_lane_keeps_one_thread_of_its_server() {
        let staged = Staged::open("threads");
        let is_lane = |task: &fs::DirEntry| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "one-lane\n")
        };
        let tasks = || fs::read_dir("/proc/self/task").unwrap().flatten();
        let body = "b".repeat(5_000);
        let large = format!("POST /x HTTP/1.1\r\nContent-Length: 5000\r\n\r\n{body}").repeat(5);
        // Threads without a name have that of the thread which starts them.
        let named = thread::Builder::new().name("one-lane".to_owned());
        let work = move || {
            staged.connect().write_all(large.as_bytes()).unwrap();
            let mut stream = staged.connect();
            stream.write_all(get(1, "/x").as_bytes()).unwrap();
            staged.next_batch().answer(vec![reply("r")]);
            let began = Instant::now();
            // This thread, and the one.
            while tasks().filter(is_lane).count() > 2 && began.elapsed() < Duration::from_secs(20) {
                thread::sleep(Duration::from_millis(50));
            }
            assert_eq!(tasks().filter(is_lane).count(), 2, "after {:?}", began.elapsed());
        };
        named.spawn(work).unwrap().join().unwrap();
    }

    #[test]
    fn a_path_that_does_not_fit_is_named() {
        let long = folder(&"x".repeat(100));
        let lane = open_lanes(&long, &[PLAIN], 1).unwrap().remove(0);
        let error = lane.connect().unwrap_err();
        assert!(error.to_string().contains("/lane-0.sock: "), "{error}");
        fs::remove_dir(long).unwrap();
    }
}
