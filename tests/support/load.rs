//! Load: devices that onboard and redeem, again and again, at a steady rate, every answer recorded.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::csr::Csr;
use super::history::{Event, History, Op};
use super::http::{Client, Response};

/// Devices with their requests for a certificate, made once. The server needs `REENROLL=allow`.
#[derive(Debug)]
pub struct Fleet {
    devices: Vec<(String, String)>,
    next: AtomicUsize,
}

impl Fleet {
    /// A fleet of `count` devices; each does one thing at a time.
    pub fn new(count: usize) -> Self {
        let device = |n| (format!("load-{n}"), Csr::new(&format!("load-{n}")).make());
        Fleet { devices: (0..count).map(device).collect(), next: AtomicUsize::new(0) }
    }

    /// Onboards and redeems at `rate` requests a second, spread over `servers`, until `stop`.
    ///
    /// A redemption that is answered 503 or not at all is tried again, up to `tries` times.
    pub fn run(
        &self,
        servers: &[Client],
        history: &History,
        rate: f64,
        tries: usize,
        stop: impl Fn() -> bool + Sync,
    ) {
        const THREADS: usize = 8;
        let begin = Instant::now();
        let turns = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    while !stop() {
                        let turn = turns.fetch_add(1, Ordering::Relaxed);
                        // One turn is two requests.
                        let due = begin + Duration::from_secs_f64(turn as f64 * 2.0 / rate);
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        self.turn(&servers[turn % servers.len()], history, tries);
                    }
                });
            }
        });
    }

    fn turn(&self, server: &Client, history: &History, tries: usize) {
        let n = self.next.fetch_add(1, Ordering::Relaxed) % self.devices.len();
        let (device, csr) = &self.devices[n];
        let issued = history.observe(Op::Onboard, device, "", || onboard(server, device));
        if issued.status == 200 {
            redeem_until(server, history, device, &issued.token, csr, tries);
        }
    }

    /// Redeems every token that is still outstanding: the end of a run.
    pub fn redeem_rest(&self, servers: &[Client], history: &History) {
        for (n, (device, token)) in history.outstanding().iter().enumerate() {
            let csr = &self.devices.iter().find(|(d, _)| d == device).unwrap().1;
            redeem_until(&servers[n % servers.len()], history, device, token, csr, 50);
        }
    }
}

/// Presents every token that was redeemed once more: none may be granted again.
pub fn replay_all(servers: &[Client], history: &History, fleet: &Fleet) {
    for (n, event) in history.events().iter().enumerate() {
        if event.op == Op::Redeem && event.status == 200 {
            let csr = &fleet.devices.iter().find(|(d, _)| *d == event.device).unwrap().1;
            redeem_until(
                &servers[n % servers.len()],
                history,
                &event.device,
                &event.token,
                csr,
                50,
            );
        }
    }
}

fn redeem_until(
    server: &Client,
    history: &History,
    device: &str,
    token: &str,
    csr: &str,
    tries: usize,
) -> Option<Event> {
    for turn in 0..tries {
        let event = history.observe(Op::Redeem, device, token, || sign(server, token, csr));
        if !matches!(event.status, 0 | 503) {
            return Some(event);
        }
        thread::sleep(Duration::from_millis(20 << turn.min(4)));
    }
    None
}

/// One onboarding.
pub fn onboard(server: &Client, device: &str) -> io::Result<Response> {
    post(server, "/api/v1/onboarding", &[], &json!({"device_id": device}))
}

/// One redemption.
pub fn sign(server: &Client, token: &str, csr: &str) -> io::Result<Response> {
    let bearer = format!("Bearer {token}");
    post(server, "/api/v1/sign-csr", &[("Authorization", &bearer)], &json!({"csr": csr}))
}

fn post(
    server: &Client,
    path: &str,
    headers: &[(&str, &str)],
    body: &Value,
) -> io::Result<Response> {
    let headers = [&[("Content-Type", "application/json")], headers].concat();
    server.try_request("POST", path, &headers, body.to_string().as_bytes())
}
