//! What all modules of the edge use: its settings, its limits, and what a client may be late with.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::sign::CertifiedKey;

use crate::config::Http;
use crate::http::{Class, Classify, LaneKind};
use crate::metrics::EdgeCounters;

/// A request's head, its request line included. Ours are 300 bytes; a token is at most 4 KiB.
pub const HEAD_MAX: usize = 8 * 1024;
/// Fields in a head. Browsers send 20.
pub const FIELDS_MAX: usize = 64;
/// A request's body. The largest we know, a CSR for RSA 4096 in base64 of PEM, has 3 KiB.
pub const BODY_MAX: usize = 64 * 1024;

/// Where a lane's worker is reached, and for which kind of work.
pub struct LaneAddress {
    /// The kind of requests that go there.
    pub kind: LaneKind,
    /// Makes the lane's connection, at the start and when one was lost. It does not wait.
    pub connect: Box<dyn Fn() -> io::Result<UnixStream> + Send>,
    /// Requests waiting in it.
    pub max_waiting: usize,
}

/// How the edge is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is configured: address, limits, proxies.
    pub http: Http,
    /// Serve HTTPS, and show this; without, nobody is let in where HTTPS is configured.
    pub tls: Option<Arc<CertifiedKey>>,
    /// Tells where a request goes.
    pub classify: Classify,
    /// How long a client may take.
    pub deadlines: Deadlines,
    /// Where everything is counted.
    pub counters: Arc<EdgeCounters>,
}

impl Settings {
    /// Without TLS; every request is [`Class::PLAIN`].
    pub fn new(http: Http) -> Self {
        let deadlines = Deadlines::new(&http);
        let classify = |_: &str, _: &str| Class::PLAIN;
        Settings { http, tls: None, classify, deadlines, counters: Arc::default() }
    }
}

/// What a deadline is for: what the client, or its lane, has to do until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Finish the TLS handshake.
    Handshake,
    /// Send the rest of the head, from its first byte or from its connection on.
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

/// How long a client may take for each, in milliseconds.
#[derive(Clone, Debug)]
pub struct Deadlines([(Wait, u64); 7]);

impl Deadlines {
    fn new(http: &Http) -> Self {
        Deadlines([
            (Wait::Handshake, ms(http.tls_handshake)),
            (Wait::Head, 10_000),
            // With the head's this makes 30 s for a whole request.
            (Wait::Body, 20_000),
            (Wait::Work, 30_000),
            (Wait::Write, 30_000),
            (Wait::KeepAlive, ms(http.keep_alive)),
            (Wait::Linger, 2_000),
        ])
    }

    /// Sets another length.
    pub fn set(&mut self, wait: Wait, length: Duration) {
        self.0.iter_mut().filter(|(of, _)| *of == wait).for_each(|(_, is)| *is = ms(length));
    }

    /// How long a client may take for this.
    pub fn length_ms(&self, wait: Wait) -> u64 {
        self.0.iter().find(|(of, _)| *of == wait).map_or(0, |(_, is)| *is)
    }
}

fn ms(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}
