//! A server that answers what the test says: lies, floods, commands for a terminal. Ours never would,
//! and no other that is at hand.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What is answered to a request.
#[derive(Clone, Debug)]
pub enum Reply {
    Bytes(Vec<u8>),
    /// The first bytes, then the others over and over, until the client closes or this many MiB are sent.
    Flood(Vec<u8>, Vec<u8>, u64),
    /// Nothing, and the connection stays open.
    Silence,
}

impl Reply {
    /// A whole answer in HTTP.
    pub fn http(status: &str, fields: &str, body: &str) -> Self {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{fields}");
        Reply::Bytes(format!("{head}Connection: close\r\n\r\n{body}").into_bytes())
    }
}

/// A running one. `Drop` ends it.
#[derive(Debug)]
pub struct Hostile {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    is_over: AtomicBool,
    sent: AtomicU64,
    hung_up: AtomicU64,
    requests: Mutex<Vec<String>>,
}

impl Hostile {
    /// Listens on 127.0.0.1; `answer` sees each request, head and body.
    pub fn start(answer: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared::default());
        let (theirs, answer) = (Arc::clone(&shared), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if theirs.is_over.load(Ordering::SeqCst) {
                    return;
                }
                let (shared, answer) = (Arc::clone(&theirs), Arc::clone(&answer));
                thread::spawn(move || serve(stream, &shared, &*answer));
            }
        });
        Hostile { port, shared }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// How many bytes it could send.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }

    /// How many clients did not wait for an answer that never came.
    pub fn hung_up(&self) -> u64 {
        self.shared.hung_up.load(Ordering::SeqCst)
    }

    /// What it was asked, in order.
    pub fn requests(&self) -> Vec<String> {
        self.shared.requests.lock().unwrap().clone()
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(mut stream: TcpStream, shared: &Shared, answer: &dyn Fn(&str) -> Reply) {
    let limit = Some(Duration::from_secs(20));
    stream.set_read_timeout(limit).unwrap();
    stream.set_write_timeout(limit).unwrap();
    let Some(request) = read(&mut stream) else { return };
    shared.requests.lock().unwrap().push(request.clone());
    let mut send = |bytes: &[u8]| {
        let is_sent = stream.write_all(bytes).is_ok();
        shared.sent.fetch_add(if is_sent { bytes.len() as u64 } else { 0 }, Ordering::SeqCst);
        is_sent
    };
    match answer(&request) {
        Reply::Bytes(bytes) => drop(send(&bytes)),
        Reply::Flood(first, others, mib) => {
            let times = (mib << 20) / others.len() as u64;
            let _ = send(&first) && (0..times).all(|_| send(&others));
        }
        Reply::Silence => {
            let is_over = stream.read(&mut [0]).is_ok();
            shared.hung_up.fetch_add(u64::from(is_over), Ordering::SeqCst);
        }
    }
}

/// A request with a body of the length that its head says; `None` if it does not come.
fn read(stream: &mut TcpStream) -> Option<String> {
    let (mut request, mut buffer) = (String::new(), [0; 4096]);
    loop {
        let n = stream.read(&mut buffer).ok().filter(|n| *n > 0)?;
        request.push_str(&String::from_utf8_lossy(&buffer[..n]));
        let Some((head, body)) = request.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        if body.len() >= length.map_or(0, |n| n.parse().unwrap()) {
            return Some(request);
        }
    }
}
