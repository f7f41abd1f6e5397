//! Chaos: three instances on one Redis under a load, and everything that can break breaks, for minutes.
//!
//! `chaos MINUTES PROGRAM [SEED]`, by `scripts/chaos.sh`, which says what is done and judged. It prints
//! how often what was answered and done, and each promise that was not kept with its history; it exits 1
//! if there is one that no sentence of `docs/redis.md` explains.

#![allow(clippy::indexing_slicing, reason = "a measurement that goes wrong may end with a panic")]

mod history;
mod stage;

/// What the integration tests share, and a tool may use: the proxy, clocks, ports and folders.
#[path = "../../../../tests/support"]
#[allow(dead_code, clippy::unwrap_used, clippy::panic, reason = "a fixture fails by panicking")]
mod support {
    pub mod clock;
    pub mod port;
    pub mod proxy;
    pub mod random;
    pub mod temp;
    pub mod wait;
}

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::KeyPair;
use serde_json::{Value, json};
use tools::Failure;
use tools::http::{self, Answer};

use history::{Event, Judge, Op, Sample, signed};
use stage::{INSTANCES, KEY, Stage};
use support::random::Xorshift;

/// Devices; each is asked for by whoever comes, so that what is asked of one meets.
const DEVICES: usize = 300;
const CLIENTS: usize = 6;
/// Between two turns of a client.
const PAUSE: Duration = Duration::from_millis(300);
/// Between two looks at an instance.
const WATCH: Duration = Duration::from_millis(100);
/// Longest wait for an answer: some instances are stopped.
const PATIENCE: Duration = Duration::from_secs(4);
/// Longest wait for what must be at the end.
const AT_LAST: Duration = Duration::from_secs(40);
/// So much of its log is printed of an instance that does not come back.
const LOG_LINES: usize = 200;
const COMES_BACK: &str = "every instance serves from Redis again when all is over";

fn main() -> Result<ExitCode, Failure> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [minutes, program, seed @ ..] = &words[..] else {
        return Err("usage: chaos MINUTES PROGRAM [SEED]".into());
    };
    let begin = Instant::now();
    let length = Duration::from_secs_f64(minutes.parse::<f64>()? * 60.0);
    let now = || support::clock::now_ms() | 1;
    let seed = seed.first().map_or(Ok(now()), |seed| seed.parse())?;
    println!("seed {seed}");
    let mut stage = Stage::set(program, seed, begin)?;
    let load = Load::new(stage.ports(), begin)?;
    thread::scope(|scope| {
        for number in 0..CLIENTS {
            let load = &load;
            scope.spawn(move || load.run(Xorshift(seed.rotate_left(7 * number as u32 + 1) | 1)));
        }
        for instance in 0..INSTANCES {
            let load = &load;
            scope.spawn(move || load.watch(instance));
        }
        let mut disturbed = Ok(());
        while begin.elapsed() < length && disturbed.is_ok() {
            disturbed = stage.disturb();
        }
        load.stop.store(true, Ordering::Relaxed);
        disturbed
    })?;
    load.present_the_rest();
    let away = load.still_in_memory();
    let events = load.events.into_inner().unwrap_or_else(PoisonError::into_inner);
    let samples = load.samples.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (disturbances, signed) = (&stage.disturbances[..], signed(stage.folders()));
    let judge = Judge { events: &events, disturbances, samples: &samples, signed: &signed };
    for instance in &away {
        let log = stage.logs().nth(*instance).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        println!("VIOLATION: {COMES_BACK}: instance {instance} serves from memory\n{tail}");
    }
    Ok(report(&stage, &judge, away.len()))
}

fn report(stage: &Stage, judge: &Judge<'_>, away: usize) -> ExitCode {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for event in judge.events {
        *counts.entry(format!("{:?}: {} {}", event.op, event.status, event.code)).or_default() += 1;
    }
    for disturbance in judge.disturbances {
        *counts.entry(format!("{:?}", disturbance.what)).or_default() += 1;
    }
    for (what, count) in counts {
        println!("{count:>8}  {what}");
    }
    let panics = stage.logs().map(|log| log.matches("panicked at").count()).sum::<usize>();
    println!("{panics:>8}  panics");
    let (explained, violations): (Vec<_>, Vec<_>) =
        judge.breaches().into_iter().partition(|breach| breach.explained.is_some());
    let mut reasons: BTreeMap<_, (usize, &str)> = BTreeMap::new();
    for breach in &explained {
        let reason = reasons.entry((breach.promise, breach.explained)).or_insert((0, ""));
        *reason = (reason.0 + 1, &breach.story);
    }
    for ((promise, reason), (count, story)) in reasons {
        println!("{count} × not kept: {promise}; explained: {}", reason.unwrap_or_default());
        print!("  as {story}");
    }
    for breach in &violations {
        print!("VIOLATION: {}: {}", breach.promise, breach.story);
    }
    let violations = violations.len() + away;
    println!("{violations} violations");
    ExitCode::from(u8::from(violations > 0 || panics > 0))
}

/// Asks the server on this port of this machine, once, on a connection of its own.
fn ask(port: u16, request: &str) -> Result<Answer, Failure> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    http::Connection::over(stream).exchange(request)
}

/// What all clients share.
struct Load {
    begin: Instant,
    ports: Vec<u16>,
    requests: Vec<String>,
    events: Mutex<Vec<Event>>,
    samples: Mutex<Vec<Sample>>,
    turns: AtomicUsize,
    stop: AtomicBool,
}

impl Load {
    fn new(ports: Vec<u16>, begin: Instant) -> Result<Self, Failure> {
        let key = KeyPair::generate()?;
        let requests =
            (0..DEVICES).map(|n| tools::csr(&name(n), &key)).collect::<Result<_, _>>()?;
        let (events, samples, turns, stop) = Default::default();
        Ok(Load { begin, ports, requests, events, samples, turns, stop })
    }

    fn run(&self, mut random: Xorshift) {
        while !self.stop.load(Ordering::Relaxed) {
            self.turn(&mut random);
            thread::sleep(PAUSE);
        }
    }

    /// Looks from where the instance serves.
    fn watch(&self, instance: usize) {
        while !self.stop.load(Ordering::Relaxed) {
            let from = self.begin.elapsed();
            let on_redis = self.is_on_redis(instance);
            let sample = Sample { instance, from, to: self.begin.elapsed(), on_redis };
            self.samples.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
            thread::sleep(WATCH);
        }
    }

    fn is_on_redis(&self, instance: usize) -> bool {
        let health = ask(self.ports[instance], &http::get("/health", ""));
        health.is_ok_and(|answer| answer.body.contains(r#""storage":"redis""#))
    }

    /// The instances that do not serve from Redis, some time after the last disturbance.
    fn still_in_memory(&self) -> Vec<usize> {
        let end = Instant::now() + AT_LAST;
        loop {
            let away = (0..INSTANCES).filter(|instance| !self.is_on_redis(*instance));
            let away: Vec<usize> = away.collect();
            if away.is_empty() || Instant::now() > end {
                return away;
            }
            thread::sleep(WATCH);
        }
    }

    /// A device onboards, its token may be killed, and what there is of tokens is presented.
    fn turn(&self, random: &mut Xorshift) {
        let device = random.below(DEVICES);
        let mut anyone = || random.below(INSTANCES);
        let issued = self.ask(Op::Onboard, device, "", anyone());
        let mut tokens = vec![issued];
        let (kind, here, there) = (anyone(), anyone(), anyone());
        if random.below(5) == 0 {
            tokens.push(match kind {
                0 => self.ask(Op::Kill, device, "", here),
                _ => self.ask(Op::Replace, device, "", here),
            });
        }
        for event in tokens.iter().filter(|event| event.status == 200 && event.op != Op::Kill) {
            // A third of them at two instances at once.
            thread::scope(|scope| {
                if random.below(3) == 0 {
                    scope.spawn(|| self.present(device, &event.token, there));
                }
                self.present(device, &event.token, random.below(INSTANCES));
            });
        }
    }

    /// Presents the token, at another instance each time, until the answer says something of it.
    fn present(&self, device: usize, token: &str, first: usize) {
        for turn in 0..8 {
            let event = self.ask(Op::Redeem, device, token, (first + turn / 2) % INSTANCES);
            if !matches!(event.status, 0 | 503) {
                return;
            }
            thread::sleep(Duration::from_millis(100 << turn.min(4)));
        }
    }

    /// When all is over: what was never granted must be, by one of them.
    fn present_the_rest(&self) {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut left: BTreeMap<&str, usize> = BTreeMap::new();
        for event in events.iter().filter(|e| e.status == 200 && !e.token.is_empty()) {
            left.insert(&event.token, event.device);
        }
        for event in events.iter().filter(|event| event.is_granted()) {
            left.remove(&*event.token);
        }
        let end = Instant::now() + AT_LAST;
        for (token, device) in left {
            for instance in 0..INSTANCES {
                let mut event = self.ask(Op::Last, device, token, instance);
                while matches!(event.status, 0 | 503) && Instant::now() < end {
                    thread::sleep(Duration::from_millis(100));
                    event = self.ask(Op::Last, device, token, instance);
                }
                if event.status == 200 {
                    break;
                }
            }
        }
    }

    fn ask(&self, op: Op, device: usize, token: &str, instance: usize) -> Event {
        let from = self.begin.elapsed();
        let answer = ask(self.ports[instance], &self.request(op, device, token)).ok();
        let to = self.begin.elapsed();
        let body: Value = answer
            .as_ref()
            .map_or(Value::Null, |answer| serde_json::from_str(&answer.body).unwrap_or_default());
        let field = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        let token = if token.is_empty() { field("provisioning_token") } else { token.to_owned() };
        let status = answer.map_or(0, |answer| answer.status);
        let event = Event { op, device, token, instance, from, to, status, code: field("code") };
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event.clone());
        event
    }

    fn request(&self, op: Op, device: usize, token: &str) -> String {
        // Each from an address of its own: what is limited by address is not the topic.
        let [.., b, c, d] = self.turns.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let fields = |bearer: &str| {
            format!("Authorization: Bearer {bearer}\r\nX-Forwarded-For: 10.{b}.{c}.{d}\r\n")
        };
        let body = json!({"device_id": name(device), "replace": op == Op::Replace}).to_string();
        match op {
            Op::Onboard | Op::Replace => http::post("/api/v1/onboarding", &fields(KEY), &body),
            Op::Redeem | Op::Last => {
                let csr = json!({"csr": self.requests[device]}).to_string();
                http::post("/api/v1/sign-csr", &fields(token), &csr)
            }
            Op::Kill => {
                let (path, fields) =
                    (format!("/api/v1/certificates/{}", name(device)), fields(KEY));
                format!("DELETE {path} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n")
            }
        }
    }
}

fn name(device: usize) -> String {
    format!("chaos-{device}")
}
