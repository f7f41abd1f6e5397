//! Lanes, the workers' side: `tiny_http` on private sockets, one connection and one worker each.
//!
//! A worker takes what waits as a [`Batch`] and answers it once, through the edge's inbox. Nothing is
//! ever written to the socket: each request's writer is taken and dropped unwritten as soon as the
//! request is read, and what is left of it are its own words. So there is no second way out, on which
//! an answer could meet those of others. Requests of a batch that is dropped, by a panic for instance,
//! are answered with 500: every request has its answer.

use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tiny_http::Server;

use crate::api::{Request, classify};
use crate::clock;
use crate::edge::{self, LaneAddress, Outbox, Sender};
use crate::http::{LaneKind, LaneRules, Method, Reply};
use crate::locks::locked;
use crate::problem::Code;

/// A batch whose bodies have this many bytes takes no more: they are ours to hold, not the edge's.
const BATCH_BYTES: usize = 256 * 1024;
/// However steadily requests come, a batch waits no longer than so many pauses.
const PAUSES: u32 = 5;

/// The pause between attempts to replace a server.
const RETRY: Duration = Duration::from_secs(1);

/// Opens the lanes of these kinds in the folder `dir`, which is made with mode 0700.
///
/// # Errors
/// When a socket cannot be made there.
pub fn open_lanes(
    dir: &Path,
    kinds: &[LaneKind],
    workers: usize,
) -> io::Result<Vec<Arc<LaneServer>>> {
    make_private(dir)?;
    let each = kinds.iter().map(|kind| (*kind, kind.rules(workers)));
    let lanes = each.flat_map(|(kind, rules)| std::iter::repeat_n((kind, rules), rules.lanes));
    let open = |(i, (kind, rules)): (usize, (LaneKind, LaneRules))| {
        let path = dir.join(format!("lane-{i}.sock"));
        let address = LaneAddress { kind, path, max_waiting: rules.max_waiting };
        LaneServer::open(address, rules.max_batch)
    };
    lanes.enumerate().map(open).collect()
}

fn make_private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // SECURITY: a process that can connect to a lane can speak for any client.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

/// The worker's end of a lane.
pub struct LaneServer {
    /// What the edge has to know.
    pub address: LaneAddress,
    max_batch: usize,
    /// `None` while a server that failed is replaced.
    server: Mutex<Option<Arc<Server>>>,
    stopped: AtomicBool,
}

impl LaneServer {
    fn open(address: LaneAddress, max_batch: usize) -> io::Result<Arc<Self>> {
        let (server, stopped) = (Mutex::default(), AtomicBool::new(false));
        let lane = LaneServer { address, max_batch, server, stopped };
        lane.listen()?;
        Ok(Arc::new(lane))
    }

    /// Puts a new server in the place of the present one, if any.
    fn listen(&self) -> io::Result<Arc<Server>> {
        // The old one goes first: as it goes, it removes the socket's file.
        drop(locked(&self.server).take());
        let path = &self.address.path;
        let failed =
            |why: &dyn fmt::Display| io::Error::other(format!("{}: {why}", path.display()));
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(&e)),
            _ => {}
        }
        let server = Arc::new(Server::http_unix(path).map_err(|e| failed(&e))?);
        *locked(&self.server) = Some(Arc::clone(&server));
        Ok(server)
    }

    /// Ends the present [`LaneServer::next_batch`], or the next one.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        if let Some(server) = &*locked(&self.server) {
            server.unblock();
        }
    }

    /// Waits for a request, then takes up to `bound` with those that wait behind it, or come before
    /// nothing has come for `pause`. `None` when [`LaneServer::stop`] was called.
    pub fn next_batch(&self, bound: usize, pause: Duration, outbox: &Outbox) -> Option<Batch> {
        let mut batch = Batch::new(Arc::clone(outbox));
        while let Some(server) = self.server() {
            // `try_recv` may have swallowed what ends `recv`.
            let first = match self.is_stopped() {
                true => server.try_recv(),
                false => server.recv().map(Some),
            };
            let filled = match first {
                Ok(None) => return None,
                Ok(Some(request)) => {
                    batch.add(request);
                    gather(&server, bound.min(self.max_batch), pause, &mut batch)
                }
                Err(e) => Err(e),
            };
            match filled {
                Ok(()) => return Some(batch),
                Err(_) if self.is_stopped() => return None,
                // After an error in `accept`, of which it tells once, `tiny_http` never accepts again.
                Err(e) => log::warn!("lane {}: {e}", self.address.path.display()),
            }
            drop(server);
            locked(&self.server).take();
            if !batch.requests.is_empty() {
                return Some(batch);
            }
        }
        None
    }

    /// The present server, or another in its place; `None` when stopped.
    fn server(&self) -> Option<Arc<Server>> {
        loop {
            let present = locked(&self.server).clone();
            match present.map_or_else(|| self.listen(), Ok) {
                Ok(server) => return Some(server),
                Err(_) if self.is_stopped() => return None,
                Err(e) => log::error!("lane {e}"),
            }
            thread::sleep(RETRY);
        }
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

fn gather(server: &Server, bound: usize, pause: Duration, batch: &mut Batch) -> io::Result<()> {
    let longest = (pause * PAUSES).as_millis();
    let began = clock::now().mono_ms;
    let waits = || u128::from(clock::now().mono_ms.saturating_sub(began)) < longest;
    while batch.requests.len() < bound && batch.bytes() < BATCH_BYTES {
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
    outbox: Outbox,
}

impl Batch {
    fn new(outbox: Outbox) -> Self {
        Batch { requests: Vec::new(), numbers: Vec::new(), outbox }
    }

    fn bytes(&self) -> usize {
        self.requests.iter().map(|request| request.body.len()).sum()
    }

    /// Takes a request, or answers at once what the API need not be asked for.
    fn add(&mut self, mut request: tiny_http::Request) {
        // A body must be read to its end, or what is behind it in the lane is never seen.
        let body = read_body(&mut request);
        let private = field(&request, edge::PRIVATE_FIELD).unwrap_or_default();
        match (edge::read_private(private), body) {
            ((number, None), _) => (self.outbox)(vec![(number, Reply::empty(204))]),
            ((number, Some(sender)), Some(body)) => {
                self.requests.push(taken(&request, sender, body));
                self.numbers.push(number);
            }
            // The lane broke: half a request is not acted on.
            ((number, Some(_)), None) => (self.outbox)(vec![(number, unanswered(request.url()))]),
        }
        drop(request.into_writer());
    }

    /// Answers the requests with these, in order.
    pub fn answer(mut self, replies: Vec<Reply>) {
        self.send(replies);
    }

    fn send(&mut self, replies: Vec<Reply>) {
        let mut replies = replies.into_iter();
        let numbered = std::mem::take(&mut self.numbers).into_iter().zip(&self.requests);
        let answer = |(number, request): (u64, &Request)| {
            (number, replies.next().unwrap_or_else(|| unanswered(&request.path)))
        };
        let answers: Vec<_> = numbered.map(answer).collect();
        if !answers.is_empty() {
            (self.outbox)(answers);
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.send(Vec::new());
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
fn taken(request: &tiny_http::Request, sender: Sender<Vec<u8>>, body: Vec<u8>) -> Request {
    let (path, query) = request.url().split_once('?').unwrap_or((request.url(), ""));
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
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;
    use std::sync::mpsc;

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
            let lane = open_lanes(&dir, &[LaneKind::Plain], 1).unwrap().remove(0);
            let (sender, answered) = mpsc::channel();
            let outbox: Outbox = Arc::new(move |answers| {
                answers.into_iter().for_each(|answer| sender.send(answer).unwrap());
            });
            Staged { lane, dir, outbox, answered }
        }

        fn connect(&self) -> UnixStream {
            UnixStream::connect(&self.lane.address.path).unwrap()
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
            locked(&self.lane.server).take();
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
        let proof = "OPTIONS * HTTP/1.1\r\nX-Edge: 2 -\r\n\r\n";
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
        locked(&staged.lane.server).take();
        fs::write(&staged.lane.address.path, "").unwrap();
        drop(open_lanes(&staged.dir, &[LaneKind::Plain], 1).unwrap());
    }

    #[test]
    fn a_path_that_does_not_fit_is_named() {
        let long = folder(&"x".repeat(100));
        let error = open_lanes(&long, &[LaneKind::Plain], 1).map(drop).unwrap_err();
        assert!(error.to_string().contains("/lane-0.sock: "), "{error}");
        fs::remove_dir(long).unwrap();
    }
}
