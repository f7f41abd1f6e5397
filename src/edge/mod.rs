//! The only door to the network: limits, deadlines, strict HTTP/1.1 framing, TLS.
//!
//! One thread waits for all sockets. What a client sends is read whole and found well formed here
//! before anything behind sees it; then it goes down a *lane*, a private Unix connection to a
//! `tiny_http` server with one worker, written anew in our own words. So a client that is slow,
//! huge, malformed or many costs a descriptor and a few hundred bytes, never a thread.
//!
//! In reading order:
//! - [`head`] and [`chunked`] say what is well formed; [`conn`] is one client's bytes turned into
//!   requests. No I/O in these three.
//! - [`lane`] is our end of a lane: requests written together, answers cut and told apart;
//!   [`answer`] is what a client gets to read.
//! - [`client`] is a client's socket, plain or [`tls`], and [`unsent`] what it did not take yet;
//!   [`poll`] and [`timers`] are what it waits on; [`limits`] says who gives way; [`proxies`] says
//!   who the client is behind a proxy.
//! - [`listen`] lets clients in, [`hall`] keeps them and lets them out, [`serve`] does what they
//!   ask; [`run`] is the loop.

mod answer;
mod chunked;
mod client;
mod conn;
mod hall;
pub mod head;
mod lane;
mod limits;
mod listen;
mod poll;
mod proxies;
mod run;
mod serve;
mod timers;
mod tls;
mod unsent;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustls::sign::CertifiedKey;

use crate::config::Cidr;
use crate::http::{Class, Classify, LaneKind};

pub use run::{Edge, Handle, OpenError};

/// A request's head, its request line included. Ours are 300 bytes; a token is at most 4 KiB.
pub const HEAD_MAX: usize = 8 * 1024;
/// Fields in a head. Browsers send 20.
pub const FIELDS_MAX: usize = 64;
/// A request's body. The largest we know, a CSR for RSA 4096 in base64 of PEM, has 3 KiB.
pub const BODY_MAX: usize = 64 * 1024;

/// The field that carries `<request number> <client address>` to the worker and the number back;
/// for a renewal also the client's certificate, DER in base64.
pub const PRIVATE_FIELD: &str = "X-Edge";
/// Stands there for the client where the edge itself asks; a 204 is the answer.
pub const NOBODY: &str = "-";

/// Where a lane's worker listens, and for which kind of work.
#[derive(Clone, Debug)]
pub struct LaneAddress {
    /// The kind of requests that go there.
    pub kind: LaneKind,
    /// The private socket.
    pub path: PathBuf,
}

/// How the edge is set up. [`Settings::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Serve HTTPS, and show this.
    pub tls: Option<Arc<CertifiedKey>>,
    /// Connections at once; each costs a descriptor and about half a KiB. With TLS each holds
    /// 4 KiB more, and there are never more than half of `max_buffer_bytes` pays for: 1,024 by
    /// default.
    pub max_connections: usize,
    /// Connections at once of one IPv4 address or one IPv6 /64, so that one host cannot take all.
    pub max_connections_per_ip: usize,
    /// All bytes held for clients: parts of requests, replies not yet taken, TLS buffers. Replies
    /// have half, unless one alone is larger: they are what a client gets us to hold most cheaply.
    pub max_buffer_bytes: usize,
    /// Requests waiting in one lane; at 15 µs each, 1,024 are a wait of 15 ms.
    pub max_waiting: usize,
    /// Tells where a request goes; by default everything is [`Class::PLAIN`].
    pub classify: Classify,
    /// Proxies whose `X-Forwarded-For` is believed; exempt from the limit per address.
    pub trusted_proxies: Vec<Cidr>,
    /// How long anyone may take for anything.
    pub deadlines: Deadlines,
}

/// How long anyone may take for anything.
#[derive(Clone, Debug)]
pub struct Deadlines {
    /// The TLS handshake.
    pub handshake: Duration,
    /// From the first byte of a request (or the connection) to the end of its head.
    pub head: Duration,
    /// From the first byte of a request to its last.
    pub request: Duration,
    /// From there to the answer of the worker.
    pub work: Duration,
    /// Until the client has taken the whole reply.
    pub write: Duration,
    /// Between two requests on a connection.
    pub keep_alive: Duration,
    /// Between our last reply and the client's end of the connection.
    pub linger: Duration,
    /// From [`Handle::shutdown`] to the end.
    pub drain: Duration,
}

impl Settings {
    /// The defaults, listening on `listen`.
    pub fn new(listen: SocketAddr) -> Self {
        Settings {
            listen,
            tls: None,
            max_connections: 1024,
            max_connections_per_ip: 256,
            max_buffer_bytes: 8 * 1024 * 1024,
            max_waiting: 1024,
            classify: |_, _| Class::PLAIN,
            trusted_proxies: Vec::new(),
            deadlines: Deadlines {
                handshake: Duration::from_secs(15),
                head: Duration::from_secs(10),
                request: Duration::from_secs(30),
                work: Duration::from_secs(30),
                write: Duration::from_secs(30),
                keep_alive: Duration::from_secs(75),
                linger: Duration::from_secs(2),
                drain: Duration::from_secs(10),
            },
        }
    }
}

/// What the edge counts, for `/metrics`. Written by the edge's thread only.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections open at this moment.
    pub open: Counter,
    /// Connections closed to make room for others.
    pub gave_way: Counter,
    /// New connections closed because there was nobody to give way.
    pub turned_away: Counter,
    /// Connections closed because a deadline had passed.
    pub timed_out: Counter,
    /// Requests handed to a lane.
    pub requests: Counter,
    /// Requests refused by the edge itself.
    pub refused: Counter,
    /// Bytes held for clients at this moment.
    pub held_bytes: Counter,
    /// Lanes lost and opened again.
    pub lanes_lost: Counter,
    /// Lanes that no request can take at this moment.
    pub lanes_down: Counter,
    /// TLS handshakes that failed.
    pub handshakes_failed: Counter,
    /// Pauses in accepting, for want of descriptors or memory.
    pub accept_pauses: Counter,
}

/// One number that goes up, or up and down.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The number now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// One writer only: a plain load and store is cheaper than an atomic addition.
    fn add(&self, n: u64) {
        self.set(self.value().wrapping_add(n));
    }

    fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }
}
