//! What is counted, and how `GET /metrics` shows it: Prometheus text format 0.0.4.
//!
//! To count is one atomic addition: no lock, no allocation. The number of series is bounded, since a
//! label is one of our own words: an endpoint's pattern, never the path that a client chose. Nothing here is about a single device or token.

use std::fmt::{self, Display, Write as _};
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::clock::Now;
use crate::problem::Code;
use crate::stderr;

/// `Content-Type` of the page.
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The statuses that are told apart; any other is counted under [`OTHER`].
const STATUSES: [u16; 16] =
    [200, 204, 400, 401, 403, 404, 405, 408, 409, 413, 415, 429, 431, 500, 501, 503];
const OTHER: &str = "other";

/// Upper bounds of the buckets for round trips to Redis: loopback takes 50 µs, a managed service 1
/// to 50 ms, and what takes longer than `REDIS_TIMEOUT_MS` (1 s by default) is cut off.
const TRIP_BUCKETS_US: [u64; 12] =
    [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 500_000, 1_000_000];

/// Everything that is counted.
#[derive(Default)]
pub struct Metrics {
    endpoints: Vec<Endpoint>,
    problems: Vec<Counter>,
    /// Provisioning tokens issued.
    pub tokens_issued: Counter,
    /// Tokens for which a certificate was signed and recorded.
    pub tokens_consumed: Counter,
    /// Tokens replaced or revoked.
    pub tokens_killed: Counter,
    /// Certificates signed for a token.
    pub certificates_issued: Counter,
    /// Certificates signed for a present certificate.
    pub certificates_renewed: Counter,
    /// Certificates revoked.
    pub certificates_revoked: Counter,
    /// Round trips to Redis, each of which carries the commands of a batch.
    pub redis_trips: Histogram,
    /// Batches that lost their connection to Redis, or got no answer in time.
    pub redis_failures: Counter,
    /// What the edge counts.
    pub edge: Arc<EdgeCounters>,
    /// Seconds since 1970, once the clock was right.
    started_s: OnceLock<u64>,
}

/// A counter for each row: its field, its kind, the name of its family, and what it is.
macro_rules! edge_counters {
    ($($field:ident: $kind:ident $name:literal, $help:literal;)*) => {
        /// What the edge counts.
        #[derive(Debug, Default)]
        pub struct EdgeCounters {
            $(#[doc = $help] pub $field: Counter,)*
        }

        impl EdgeCounters {
            fn show(&self, page: &mut Page) {
                $(page.$kind(concat!("mqtt_lite_edge_", $name), $help, self.$field.value());)*
            }
        }
    };
}

edge_counters! {
    open: gauge "connections", "Connections open.";
    held_bytes: gauge "held_bytes", "Bytes held for clients.";
    lanes_down: gauge "lanes_down", "Lanes to a worker that cannot be used.";
    accepted: counter "connections_total", "Connections accepted.";
    gave_way: counter "gave_way_total", "Connections closed to make room.";
    turned_away: counter "turned_away_total", "New connections for which nobody gave way.";
    timed_out: counter "timed_out_total", "Connections closed because a deadline passed.";
    requests: counter "requests_total", "Requests handed to a worker.";
    refused: counter "refused_total", "Requests refused before a worker saw them.";
    lanes_lost: counter "lanes_lost_total", "Lanes to a worker lost and opened again.";
    handshakes_failed: counter "handshakes_failed_total", "TLS handshakes that failed.";
    accept_pauses: counter "accept_pauses_total", "Pauses for want of files or memory.";
}

/// The answers of one endpoint.
struct Endpoint {
    labels: String,
    by_status: [Counter; STATUSES.len() + 1],
}

impl Endpoint {
    fn new(method: &str, pattern: &str) -> Self {
        let labels = labels(&[("method", method), ("endpoint", pattern)]);
        Endpoint { labels, by_status: Default::default() }
    }
}

/// A number that goes up; or up and down, if it is of what is there at this moment.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub const fn new() -> Self {
        Counter(AtomicU64::new(0))
    }

    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
pub struct Histogram {
    /// Each counts its own bucket only; the last is of what was longer than all bounds.
    buckets: [Counter; TRIP_BUCKETS_US.len() + 1],
    sum_us: Counter,
}

impl Histogram {
    /// Counts something that took so long.
    pub fn observe(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let at = TRIP_BUCKETS_US.iter().position(|bound| us <= *bound);
        if let Some(bucket) = self.buckets.get(at.unwrap_or(TRIP_BUCKETS_US.len())) {
            bucket.add(1);
        }
        self.sum_us.add(us);
    }
}

impl Metrics {
    /// Counters for these endpoints, each with its method and its pattern.
    pub fn new(endpoints: impl IntoIterator<Item = (String, &'static str)>) -> Self {
        let endpoints = endpoints.into_iter().map(|(method, path)| Endpoint::new(&method, path));
        let none = Endpoint::new(OTHER, OTHER);
        Metrics {
            endpoints: endpoints.chain([none]).collect(),
            problems: Code::ALL.iter().map(|_| Counter::default()).collect(),
            ..Metrics::default()
        }
    }

    /// Counts an answer of the endpoint with this number, in the order given to [`Metrics::new`];
    /// `None` if the request fitted none.
    pub fn answered(&self, endpoint: Option<usize>, status: u16) {
        let endpoint = endpoint.and_then(|at| self.endpoints.get(at)).or(self.endpoints.last());
        let at = STATUSES.iter().position(|known| *known == status).unwrap_or(STATUSES.len());
        if let Some(counter) = endpoint.and_then(|endpoint| endpoint.by_status.get(at)) {
            counter.add(1);
        }
    }

    /// Counts an error that was answered.
    pub fn problem(&self, code: Code) {
        if let Some(counter) = self.problems.get(code as usize) {
            counter.add(1);
        }
    }

    /// The page, to which the caller adds what only the caller knows.
    pub fn page(&self, now: Now) -> Page {
        let mut page = Page(String::with_capacity(8 * 1024));
        self.show_requests(&mut page);
        self.show_events(&mut page);
        self.show_redis(&mut page);
        self.edge.show(&mut page);
        self.show_process(&mut page, now);
        page
    }

    /// An endpoint that was not asked yet shows one zero, so that a rate can be made of it.
    fn show_requests(&self, page: &mut Page) {
        let name = "mqtt_lite_http_requests_total";
        page.family(name, "counter", "Answers, by endpoint and status.");
        for Endpoint { labels, by_status } in &self.endpoints {
            for (at, count) in by_status.iter().map(Counter::value).enumerate() {
                let status = STATUSES.get(at).map_or(OTHER.to_owned(), ToString::to_string);
                if count > 0 || at == 0 {
                    page.line(name, &format!("{labels},status=\"{status}\""), count);
                }
            }
        }
        let name = "mqtt_lite_errors_total";
        page.family(name, "counter", "Answers that were errors, by their code.");
        for (code, count) in Code::ALL.iter().zip(&self.problems) {
            page.sample(name, &[("code", code.row().1)], count.value());
        }
    }

    fn show_events(&self, page: &mut Page) {
        let name = "mqtt_lite_tokens_total";
        page.family(name, "counter", "What happened to provisioning tokens.");
        let events = [
            ("issued", self.tokens_issued.value()),
            ("consumed", self.tokens_consumed.value()),
            ("refused", self.tokens_refused()),
            ("killed", self.tokens_killed.value()),
        ];
        for (event, count) in events {
            page.sample(name, &[("event", event)], count);
        }
        let name = "mqtt_lite_certificates_total";
        page.family(name, "counter", "What happened to certificates.");
        let events = [
            ("issued", &self.certificates_issued),
            ("renewed", &self.certificates_renewed),
            ("revoked", &self.certificates_revoked),
        ];
        for (event, count) in events {
            page.sample(name, &[("event", event)], count.value());
        }
    }

    /// A token was presented, and was not good.
    fn tokens_refused(&self) -> u64 {
        let is_refusal = |code: &Code| {
            let (status, name, _) = code.row();
            status == 401 && name.starts_with("TOKEN_") && *code != Code::TokenMissing
        };
        let counted = Code::ALL.iter().zip(&self.problems);
        counted.filter(|(code, _)| is_refusal(code)).map(|(_, count)| count.value()).sum()
    }

    fn show_redis(&self, page: &mut Page) {
        let help = "Round trips to Redis, each with the commands of one batch.";
        page.histogram("mqtt_lite_redis_round_trip_seconds", help, &self.redis_trips);
        let help = "Batches that lost Redis, or got no answer in time.";
        page.counter("mqtt_lite_redis_failures_total", help, self.redis_failures.value());
    }

    fn show_process(&self, page: &mut Page, now: Now) {
        let help = "Lines of the log that nobody took in time.";
        page.counter("mqtt_lite_log_lines_lost_total", help, stderr::lost());
        page.family("mqtt_lite_build_info", "gauge", "The program; always 1.");
        page.sample("mqtt_lite_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        page.gauge("mqtt_lite_uptime_seconds", "Time since the start.", now.mono_ms / 1000);
        if now.is_plausible() {
            let started = self.started_s.get_or_init(|| (now.unix_ms - now.mono_ms) / 1000);
            page.gauge("process_start_time_seconds", "Start, in seconds since 1970.", started);
        }
        show_proc(page);
    }
}

/// What the kernel says of this process; nothing where there is no `/proc`.
fn show_proc(page: &mut Page) {
    let read = |name| fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    let behind =
        |text: &str, name| text.lines().find_map(|line| line.strip_prefix(name)).and_then(number);
    let (status, limits) = (read("status"), read("limits"));
    let memory = behind(&status, "VmRSS:").map(|kib| kib.saturating_mul(1024));
    // One of them is the folder that is being read.
    let files = fs::read_dir("/proc/self/fd").map(|files| files.count().saturating_sub(1) as u64);
    for (name, help, value) in [
        ("process_resident_memory_bytes", "Resident memory.", memory),
        ("process_threads", "Threads.", behind(&status, "Threads:")),
        ("process_open_fds", "Open files and sockets.", files.ok()),
        ("process_max_fds", "Most open files and sockets.", behind(&limits, "Max open files")),
    ] {
        value.iter().for_each(|value| page.gauge(name, help, value));
    }
    if let Some(ticks) = cpu_ticks(&read("stat")) {
        let help = "Processor time used, by user and system.";
        // 100 a second in everything that Linux tells programs.
        page.counter("process_cpu_seconds_total", help, Decimal::<2>(ticks));
    }
}

/// The first word, if it is a number.
fn number(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// The name of the program, in parentheses, may hold spaces: the fields count from behind it.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

/// A number of units of which 10 to the `PLACES` make one.
struct Decimal<const PLACES: usize>(u64);

impl<const PLACES: usize> Display for Decimal<PLACES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one = (0..PLACES).fold(1, |one, _| one * 10);
        write!(f, "{}.{:0PLACES$}", self.0 / one, self.0 % one)
    }
}

/// The page that Prometheus reads, while it is written.
pub struct Page(String);

impl Page {
    /// Begins a family: its samples follow.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.push(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    /// One sample of the family that was begun last.
    pub fn sample(&mut self, name: &str, of: &[(&str, &str)], value: impl Display) {
        self.line(name, &labels(of), value);
    }

    /// A family of one sample that only goes up.
    pub fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "counter", help);
        self.sample(name, &[], value);
    }

    /// A family of one sample that goes up and down.
    pub fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    pub fn into_text(self) -> String {
        self.0
    }

    /// A bucket counts everything up to its bound. The count is read off the buckets, so that the
    /// two agree although others go on counting.
    fn histogram(&mut self, name: &str, help: &str, of: &Histogram) {
        self.family(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        let mut count = 0;
        for (at, own) in of.buckets.iter().enumerate() {
            count += own.value();
            match TRIP_BUCKETS_US.get(at) {
                Some(us) => {
                    self.sample(&bucket, &[("le", &Decimal::<6>(*us).to_string())], count);
                }
                None => self.sample(&bucket, &[("le", "+Inf")], count),
            }
        }
        self.sample(&format!("{name}_sum"), &[], Decimal::<6>(of.sum_us.value()));
        self.sample(&format!("{name}_count"), &[], count);
    }

    fn line(&mut self, name: &str, labels: &str, value: impl Display) {
        match labels {
            "" => self.push(format_args!("{name} {value}\n")),
            _ => self.push(format_args!("{name}{{{labels}}} {value}\n")),
        }
    }

    fn push(&mut self, text: fmt::Arguments<'_>) {
        // Writing into a String does not fail.
        let _ = self.0.write_fmt(text);
    }
}

/// `name="value",…`. The values are our own words, in which nothing has to be escaped.
fn labels(of: &[(&str, &str)]) -> String {
    of.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(metrics: &Metrics) -> String {
        metrics.page(Now { unix_ms: 0, mono_ms: 61_000 }).into_text()
    }

    fn metrics() -> Metrics {
        Metrics::new([("GET".to_owned(), "/a"), ("POST".to_owned(), "/a/{id}")])
    }

    #[track_caller]
    fn has(page: &str, line: &str) {
        assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
    }

    #[test]
    fn answers_are_counted_by_endpoint_and_status() {
        let metrics = metrics();
        metrics.answered(Some(1), 409);
        metrics.answered(Some(1), 409);
        metrics.answered(None, 404);
        metrics.answered(Some(7), 418);
        let page = page(&metrics);
        let name = "mqtt_lite_http_requests_total";
        has(&page, &format!(r#"{name}{{method="GET",endpoint="/a",status="200"}} 0"#));
        has(&page, &format!(r#"{name}{{method="POST",endpoint="/a/{{id}}",status="409"}} 2"#));
        has(&page, &format!(r#"{name}{{method="other",endpoint="other",status="404"}} 1"#));
        has(&page, &format!(r#"{name}{{method="other",endpoint="other",status="other"}} 1"#));
    }

    #[test]
    fn every_status_of_the_table_of_errors_is_told_apart() {
        let mut statuses = Code::ALL.iter().map(|code| code.row().0);
        assert_eq!(statuses.find(|status| !STATUSES.contains(status)), None);
    }

    #[test]
    fn errors_are_counted_by_code_and_refused_tokens_from_them() {
        let metrics = metrics();
        for code in Code::ALL {
            metrics.problem(*code);
        }
        let page = page(&metrics);
        for code in Code::ALL {
            has(&page, &format!("mqtt_lite_errors_total{{code=\"{}\"}} 1", code.row().1));
        }
        // Format, signature, type, expiry, not found, used, another device's.
        has(&page, "mqtt_lite_tokens_total{event=\"refused\"} 7");
    }

    #[test]
    fn buckets_add_up() {
        let metrics = metrics();
        for us in [1, 100, 101, 2_000_000, 3_000_000] {
            metrics.redis_trips.observe(Duration::from_micros(us));
        }
        let page = page(&metrics);
        let name = "mqtt_lite_redis_round_trip_seconds";
        has(&page, &format!("{name}_bucket{{le=\"0.000100\"}} 2"));
        has(&page, &format!("{name}_bucket{{le=\"0.000250\"}} 3"));
        has(&page, &format!("{name}_bucket{{le=\"1.000000\"}} 3"));
        has(&page, &format!("{name}_bucket{{le=\"+Inf\"}} 5"));
        has(&page, &format!("{name}_sum 5.000202"));
        has(&page, &format!("{name}_count 5"));
    }

    #[test]
    fn the_process_is_described_and_an_unset_clock_gives_no_date() {
        let page = page(&metrics());
        has(&page, "mqtt_lite_uptime_seconds 61");
        assert!(!page.contains("process_start_time_seconds"), "{page}");
        for name in ["resident_memory_bytes", "open_fds", "max_fds", "threads"] {
            assert!(page.contains(&format!("\nprocess_{name} ")), "{name}: {page}");
        }
    }

    #[test]
    fn ticks_are_found_behind_any_name() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 250 31 0 0";
        assert_eq!(cpu_ticks(stat), Some(281));
        assert_eq!(cpu_ticks(""), None);
        assert_eq!(Decimal::<2>(281).to_string(), "2.81");
    }
}
