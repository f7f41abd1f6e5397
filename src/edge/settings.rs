//! What all rooms of the edge use: its settings, its limits, and what a client may be late with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::sign::CertifiedKey;

use crate::config::Cidr;
use crate::http::{Class, Classify, LaneKind};
use crate::metrics::EdgeCounters;

/// A request's head, its request line included. Ours are 300 bytes; a token is at most 4 KiB.
pub const HEAD_MAX: usize = 8 * 1024;
/// Fields in a head. Browsers send 20.
pub const FIELDS_MAX: usize = 64;
/// A request's body. The largest we know, a CSR for RSA 4096 in base64 of PEM, has 3 KiB.
pub const BODY_MAX: usize = 64 * 1024;

/// The field that carries `<request number> <client address>` to the worker; where it is wanted, also
/// the client's certificate, DER in base64.
pub const PRIVATE_FIELD: &str = "X-Edge";
/// Stands there in place of a client's address when the edge itself asks whether the lane works.
pub const NOBODY: &str = "-";

/// Where a lane's worker listens, and for which kind of work.
#[derive(Clone, Debug)]
pub struct LaneAddress {
    /// The kind of requests that go there.
    pub kind: LaneKind,
    /// The private socket.
    pub path: PathBuf,
    /// Requests waiting in it.
    pub max_waiting: usize,
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
    /// Tells where a request goes; by default everything is [`Class::PLAIN`].
    pub classify: Classify,
    /// Proxies whose `X-Forwarded-For` is believed; exempt from the limit per address.
    pub trusted_proxies: Vec<Cidr>,
    /// How long anyone may take for anything.
    pub deadlines: Deadlines,
    /// Where everything is counted.
    pub counters: Arc<EdgeCounters>,
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
    /// From the signal to stop to the end.
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
            counters: Arc::default(),
        }
    }
}

/// What a client has to do by its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Finish the TLS handshake.
    Handshake,
    /// Send the rest of the head.
    Head,
    /// Send the rest of the body.
    Body,
    /// Be answered by its lane.
    Work,
    /// Take the whole reply.
    Write,
    /// Send the next request.
    KeepAlive,
    /// Close its side after our last reply.
    Linger,
}

impl Wait {
    /// All of them, in this order.
    pub const ALL: [Wait; 7] = [
        Wait::Handshake,
        Wait::Head,
        Wait::Body,
        Wait::Work,
        Wait::Write,
        Wait::KeepAlive,
        Wait::Linger,
    ];
}

impl Deadlines {
    /// How long a client may take for this.
    pub fn length(&self, wait: Wait) -> Duration {
        match wait {
            Wait::Handshake => self.handshake,
            Wait::Head => self.head,
            // The head's part is over when this one starts, so both together are the whole request.
            Wait::Body => self.request.saturating_sub(self.head),
            Wait::Work => self.work,
            Wait::Write => self.write,
            Wait::KeepAlive => self.keep_alive,
            Wait::Linger => self.linger,
        }
    }
}
