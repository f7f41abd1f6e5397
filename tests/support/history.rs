//! What many clients saw, and the judge of it.
//!
//! Every answer is recorded with its time; the whole history is judged at the end, against the
//! contract: only statuses that it allows, every token that was answered with 200 redeemed exactly
//! once, none twice, no two certificates for one token.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::http::Response;
use super::wait;

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    Onboard,
    Redeem,
}

/// One request and what came of it.
#[derive(Clone, Debug)]
pub struct Event {
    pub op: Op,
    pub device: String,
    /// The token that was answered (`Onboard`) or presented (`Redeem`).
    pub token: String,
    pub start: Instant,
    pub end: Instant,
    /// 0: no answer came (the connection broke, or the time-out passed).
    pub status: u16,
    /// The error code, empty in a 200.
    pub code: String,
    /// Serial of the certificate that was answered.
    pub serial: String,
}

/// What a history may contain.
#[derive(Clone, Debug)]
pub struct Rules<'a> {
    /// Allowed answers to onboardings, as `200`, `409 TOKEN_ALREADY_ACTIVE`.
    pub onboard: &'a [&'a str],
    /// Allowed answers to redemptions.
    pub redeem: &'a [&'a str],
    /// Whether requests may stay unanswered (the program itself is killed).
    pub unanswered: bool,
}

impl Rules<'_> {
    /// What the contract allows while Redis comes and goes and nothing else happens.
    pub const OUTAGE: Rules<'static> = Rules {
        onboard: &["200", "409 TOKEN_ALREADY_ACTIVE"],
        redeem: &["200", "401 TOKEN_ALREADY_USED", "503 SERVICE_UNAVAILABLE"],
        unanswered: false,
    };
}

/// Collects events from many threads.
#[derive(Debug, Default)]
pub struct History(Mutex<Vec<Event>>);

impl History {
    pub fn new() -> Self {
        History::default()
    }

    /// Does `request` and records it: for `Redeem`, `token` is what is presented.
    pub fn observe(
        &self,
        op: Op,
        device: &str,
        token: &str,
        request: impl FnOnce() -> io::Result<Response>,
    ) -> Event {
        let start = Instant::now();
        let answer = request();
        let mut event = Event {
            op,
            device: device.to_owned(),
            token: token.to_owned(),
            start,
            end: Instant::now(),
            status: 0,
            code: String::new(),
            serial: String::new(),
        };
        if let Ok(response) = answer {
            event.status = response.status;
            event.code = response.code();
            event.serial = response.field("serial_number");
            if op == Op::Onboard {
                event.token = response.field("provisioning_token");
            }
        }
        self.0.lock().unwrap().push(event.clone());
        event
    }

    /// Waits until so many more requests have been answered or given up: a stretch of time that is
    /// as long on a slow machine as on a quick one.
    #[track_caller]
    pub fn wait_for(&self, requests: usize) {
        let len = || self.0.lock().unwrap().len();
        let goal = len() + requests;
        let came = wait::until(Duration::from_secs(60), || (len() >= goal).then_some(()));
        assert!(came.is_some(), "the load stands still at {} requests", len());
    }

    /// All events until now.
    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().clone()
    }

    /// Tokens that were answered and of which no redemption was answered with 200.
    pub fn outstanding(&self) -> Vec<(String, String)> {
        let events = self.events();
        let is_done = |e: &Event| e.op == Op::Redeem && e.status == 200;
        let done: HashSet<&str> =
            events.iter().filter(|e| is_done(e)).map(|e| &e.token[..]).collect();
        let issued = events.iter().filter(|e| e.op == Op::Onboard && e.status == 200);
        issued
            .filter(|e| !done.contains(&e.token[..]))
            .map(|e| (e.device.clone(), e.token.clone()))
            .collect()
    }

    /// Judges the whole history; `recorded` are the serials in the records of all instances, or
    /// empty if they are not to be compared. Prints the counts.
    #[track_caller]
    pub fn judge(&self, rules: &Rules<'_>, recorded: &[String]) {
        let events = self.events();
        print_counts(&events);
        let mut faults = unexpected(&events, rules);
        faults.extend(bad_tokens(&events, rules));
        faults.extend(bad_serials(&events, rules, recorded));
        let shown: Vec<&String> = faults.iter().take(20).collect();
        assert!(faults.is_empty(), "{} faults in the history, as: {shown:#?}", faults.len());
    }

    /// The time under which `share` of the onboardings that began between the two were answered.
    pub fn quantile(&self, op: Op, share: f64, from: Instant, to: Instant) -> Duration {
        let events = self.events();
        let chosen = events.iter().filter(|e| e.op == op && from <= e.start && e.start < to);
        quantile(chosen.map(|e| e.end - e.start).collect(), share)
    }
}

fn unexpected(events: &[Event], rules: &Rules<'_>) -> Vec<String> {
    let allowed = |event: &Event| {
        let answers = if event.op == Op::Onboard { rules.onboard } else { rules.redeem };
        let answer = format!("{} {}", event.status, event.code);
        if event.status == 0 { rules.unanswered } else { answers.contains(&answer.trim()) }
    };
    let bad = events.iter().filter(|e| !allowed(e));
    bad.map(|e| format!("{:?} {}: answered {} {}", e.op, e.device, e.status, e.code)).collect()
}

/// Every token once issued, once redeemed.
fn bad_tokens(events: &[Event], rules: &Rules<'_>) -> Vec<String> {
    let mut faults = vec![];
    let mut issued: HashMap<&str, &Event> = HashMap::new();
    for event in events.iter().filter(|e| e.op == Op::Onboard && e.status == 200) {
        if let Some(other) = issued.insert(&event.token, event) {
            faults.push(format!("one token for {} and {}", other.device, event.device));
        }
    }
    let mut redeemed: HashMap<&str, usize> = HashMap::new();
    let mut lost: HashMap<&str, usize> = HashMap::new();
    for event in events.iter().filter(|e| e.op == Op::Redeem) {
        match event.status {
            200 => *redeemed.entry(&event.token).or_default() += 1,
            0 => *lost.entry(&event.token).or_default() += 1,
            _ => {}
        }
    }
    for (token, event) in &issued {
        let times = redeemed.get(token).copied().unwrap_or(0);
        // Where the answer may have been lost with the program, the certificate may exist.
        let may_be_lost = rules.unanswered && lost.contains_key(token);
        if times > 1 || (times == 0 && !may_be_lost) {
            let story = story(events, token);
            faults.push(format!("{}: redeemed {times} times: {story}", event.device));
        }
    }
    faults
}

/// No two answers with one serial, and every answered certificate is in a record.
fn bad_serials(events: &[Event], rules: &Rules<'_>, recorded: &[String]) -> Vec<String> {
    let mut faults = vec![];
    let mut answered: HashMap<String, &str> = HashMap::new();
    for event in events.iter().filter(|e| e.op == Op::Redeem && e.status == 200) {
        let serial = event.serial.to_lowercase();
        if let Some(other) = answered.insert(serial, &event.device) {
            faults.push(format!("{} and {other}: one serial {}", event.device, event.serial));
        }
    }
    if recorded.is_empty() {
        return faults;
    }
    let recorded: Vec<String> = recorded.iter().map(|s| s.to_lowercase()).collect();
    for (serial, device) in &answered {
        if !recorded.contains(serial) {
            faults.push(format!("{device}: {serial} was answered and is not in the record"));
        }
    }
    // Certificates whose answer was lost with the program: one for each token that was never
    // answered with one. More were signed twice, fewer were burnt.
    let unanswered = recorded.iter().filter(|s| !answered.contains_key(*s)).count();
    let expected = if rules.unanswered { issued_without_certificate(events) } else { 0 };
    if unanswered != expected {
        faults.push(format!(
            "{unanswered} certificates are in the record and were never answered, not {expected}"
        ));
    }
    faults
}

fn issued_without_certificate(events: &[Event]) -> usize {
    let signed: HashSet<&str> = events
        .iter()
        .filter(|e| e.op == Op::Redeem && e.status == 200)
        .map(|e| &*e.token)
        .collect();
    let issued = events.iter().filter(|e| e.op == Op::Onboard && e.status == 200);
    issued.filter(|e| !signed.contains(&*e.token)).count()
}

fn story(events: &[Event], token: &str) -> String {
    let begin = events.iter().map(|e| e.start).min().unwrap();
    let mut of_token: Vec<&Event> = events.iter().filter(|e| e.token == token).collect();
    of_token.sort_by_key(|e| e.start);
    let line = |e: &&Event| {
        let at = (e.start - begin).as_millis();
        let took = (e.end - e.start).as_millis();
        format!("{at} ms +{took} {:?} {} {}", e.op, e.status, e.code)
    };
    of_token.iter().map(line).collect::<Vec<_>>().join("; ")
}

fn print_counts(events: &[Event]) {
    let mut counts: BTreeMap<(Op, u16, &str), Vec<Duration>> = BTreeMap::new();
    for event in events {
        let row = counts.entry((event.op, event.status, &event.code)).or_default();
        row.push(event.end - event.start);
    }
    for ((op, status, code), times) in counts {
        println!(
            "{op:?} {status} {code}: {}, p50 {:?}, p99 {:?}, max {:?}",
            times.len(),
            quantile(times.clone(), 0.5),
            quantile(times.clone(), 0.99),
            quantile(times, 1.0),
        );
    }
}

fn quantile(mut times: Vec<Duration>, share: f64) -> Duration {
    times.sort();
    let at = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
    times.get(at).copied().unwrap_or_default()
}
