//! `GET /metrics`: a page that a strict reader of Prometheus' text format 0.0.4 accepts, numbers
//! that follow what happened, and as many series after an attack as before.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Command, Stdio};

use crate::support::clock::now_s;
use crate::support::csr;
use crate::support::http::Response;
use crate::support::https;
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use serde_json::json;

const ADMIN: &str = "admin-key-0123456789";

#[test]
fn what_happens_is_counted() {
    let service = Setup::new().env("ADMIN_API_KEY", ADMIN).start();
    let token = service.token("device-1");
    assert_eq!(service.onboard("device-1").status, 409);
    let csr = csr::Csr::new("device-1").make();
    assert_eq!(service.sign(&token, &csr).status, 200);
    assert_eq!(service.sign(&token, &csr).status, 401);
    let revoked = service.http.request(
        "DELETE",
        "/api/v1/certificates/device-1",
        &[("Authorization", &format!("Bearer {ADMIN}"))],
        b"",
    );
    assert_eq!(revoked.status, 200, "{}", revoked.text());
    let _ = service.token("device-2");
    let page = Page::of(&service);
    let answered = |method: &str, endpoint: &str, status: &str| {
        let labels = [("method", method), ("endpoint", endpoint), ("status", status)];
        page.value("mqtt_lite_http_requests_total", &labels)
    };
    assert_eq!(answered("POST", "/api/v1/onboarding", "200"), 2.0);
    assert_eq!(answered("POST", "/api/v1/onboarding", "409"), 1.0);
    assert_eq!(answered("POST", "/api/v1/sign-csr", "200"), 1.0);
    assert_eq!(answered("POST", "/api/v1/sign-csr", "401"), 1.0);
    assert_eq!(answered("DELETE", "/api/v1/certificates/{device_id}", "200"), 1.0);
    for (event, count) in [("issued", 2.0), ("consumed", 1.0), ("refused", 1.0), ("killed", 0.0)] {
        assert_eq!(page.value("mqtt_lite_tokens_total", &[("event", event)]), count, "{event}");
    }
    for (event, count) in [("issued", 1.0), ("renewed", 0.0), ("revoked", 1.0)] {
        let name = "mqtt_lite_certificates_total";
        assert_eq!(page.value(name, &[("event", event)]), count, "{event}");
    }
    let code = [("code", "TOKEN_ALREADY_USED")];
    assert_eq!(page.value("mqtt_lite_errors_total", &code), 1.0);
    assert_eq!(page.value("mqtt_lite_tokens_live", &[]), 1.0);
    assert_eq!(page.value("mqtt_lite_store_mode", &[("mode", "memory")]), 1.0);
    assert_eq!(page.value("mqtt_lite_store_mode", &[("mode", "redis")]), 0.0);
    assert!(page.value("mqtt_lite_edge_connections_total", &[]) >= 7.0);
    assert!(page.value("mqtt_lite_edge_connections", &[]) >= 1.0);
    let left = |what: &str| {
        let end = page.value(&format!("mqtt_lite_{what}_expiry_timestamp_seconds"), &[]);
        (end - now_s() as f64) / 86_400.0
    };
    assert!((3640.0..=3653.0).contains(&left("ca")), "ten years: {}", left("ca"));
    assert!((6.9..=7.0).contains(&left("crl")), "a week: {}", left("crl"));
    let age = page.value("mqtt_lite_crl_age_seconds", &[]);
    assert!((0.0..60.0).contains(&age), "published with the revocation: {age}");
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    assert_eq!(page.value("mqtt_lite_build_info", &version), 1.0);
    let rss = page.value("process_resident_memory_bytes", &[]) / 1024.0;
    assert!((rss - service.rss_kib() as f64).abs() < 4096.0, "{rss} KiB");
    assert!(page.value("process_open_fds", &[]) >= 10.0);
}

/// With everything that has metrics of its own.
#[test]
fn every_family_has_its_row_in_the_page_and_promtool_agrees() {
    let redis = Redis::start(&[]);
    let service = https::start(Setup::new().env("REDIS_URL", &redis.url()));
    let text = https::ask(&service, "/metrics", None, &[]).text();
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let shown: BTreeSet<&str> = names.map(|(name, _)| name).collect();
    let page = include_str!("../../docs/metrics.md");
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.filter_map(|row| row.split('|').nth(1));
    let listed: BTreeSet<&str> = cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .filter_map(|quoted| quoted.split('{').next())
        .collect();
    assert_eq!(shown, listed, "on the page of the program, and in docs/metrics.md");

    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = promtool.spawn().unwrap_or_else(|e| panic!("promtool is not installed: {e}"));
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn redis_and_its_loss_show() {
    let redis = Redis::start(&[]);
    let service = Setup::new().env("REDIS_URL", &redis.url()).start();
    service.wait_for_storage("redis");
    let trips = |page: &Page| page.value("mqtt_lite_redis_round_trip_seconds_count", &[]);
    let before = Page::of(&service);
    for n in 0..20 {
        service.token(&format!("device-{n}"));
    }
    let after = Page::of(&service);
    assert!(trips(&after) >= trips(&before) + 20.0);
    assert_eq!(after.value("mqtt_lite_store_mode", &[("mode", "redis")]), 1.0);
    assert_eq!(after.value("mqtt_lite_tokens_live", &[]), 20.0);
    assert_eq!(after.value("mqtt_lite_redis_losses_total", &[]), 0.0);
    drop(redis);
    service.onboard("device-x");
    service.wait_for_storage("memory");
    let lost = Page::of(&service);
    assert_eq!(lost.value("mqtt_lite_store_mode", &[("mode", "memory")]), 1.0);
    assert_eq!(lost.value("mqtt_lite_redis_enabled", &[]), 1.0);
    assert!(lost.value("mqtt_lite_redis_losses_total", &[]) >= 1.0);
    // Whether a batch was the first to find out, or the connection was seen to be cut, is open.
    let _ = lost.value("mqtt_lite_redis_failures_total", &[]);
}

#[test]
fn what_clients_send_makes_no_series() {
    let service = Setup::new().start();
    for status in [200, 404, 405] {
        // The first of its kind adds its status; no later one adds anything.
        let _ = provoke(&service, status, 0);
    }
    let _ = service.http.raw(b"NONSENSE\r\n\r\n");
    let before = Page::of(&service).series();
    for n in 1..30 {
        for status in [200, 404, 405] {
            assert_eq!(provoke(&service, status, n).status, status);
        }
        let _ = service.http.raw(format!("NONSENSE {n}\r\n\r\n").as_bytes());
    }
    let after = Page::of(&service);
    assert_eq!(after.series(), before);
    assert!(before.len() < 250, "{} series", before.len());
    let other = [("method", "other"), ("endpoint", "other"), ("status", "404")];
    assert_eq!(after.value("mqtt_lite_http_requests_total", &other), 30.0);
}

#[test]
fn head_and_other_methods() {
    let service = Setup::new().start();
    let head = service.http.request("HEAD", "/metrics", &[], b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
    let post = service.http.post("/metrics", &json!({}));
    crate::support::check_error(&post, 405, "METHOD_NOT_ALLOWED", "POST /metrics");
    let labels = [("method", "GET"), ("endpoint", "/metrics"), ("status", "200")];
    assert_eq!(Page::of(&service).value("mqtt_lite_http_requests_total", &labels), 1.0);
}

/// The reader itself refuses what Prometheus refuses, or this file would prove nothing.
#[test]
fn the_reader_is_strict() {
    let good = "# HELP a_total A.\n# TYPE a_total counter\na_total{b=\"\\\"\\\\\\n\"} 1\n";
    assert_eq!(Page::parse(good).unwrap().value("a_total", &[("b", "\"\\\n")]), 1.0);
    for bad in [
        "a 1\n",                                                           // no type
        "# TYPE a gauge\na 1\n",                                           // no help
        "# HELP a A.\n# TYPE a gauge\na 1",                                // no line end
        "# HELP a A.\n# TYPE a gauge\na{} 1\n", // empty braces: legal, not ours
        "# HELP a A.\n# TYPE a gauge\na one\n", // no number
        "# HELP a A.\n# TYPE a gauge\na 1\na 2\n", // twice
        "# HELP a A.\n# TYPE a gauge\na{b=\"c\" 1\n", // no brace
        "# HELP a A.\n# TYPE a gauge\na{1b=\"c\"} 1\n", // label name
        "# HELP a A.\n# TYPE a counter\na 1\n", // a counter without _total
        "# HELP a A.\n# TYPE a gauge\n# HELP a A.\n# TYPE a gauge\na 1\n", // family twice
        "# HELP a A.\n# TYPE a histogram\na_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\na_sum 1\na_count 1\n",
        "# HELP a A.\n# TYPE a histogram\na_bucket{le=\"1\"} 1\na_sum 1\na_count 1\n",
    ] {
        assert!(Page::parse(bad).is_err(), "{bad}");
    }
}

fn provoke(service: &Service, status: u16, n: u32) -> Response {
    match status {
        200 => service.onboard(&format!("d-{n}")),
        404 => service.http.get(&format!("/nowhere/{n}?x={n}")),
        _ => service.http.request("DELETE", "/health", &[("X-Number", &n.to_string())], b""),
    }
}

type Labels = BTreeMap<String, String>;

/// A page that was read to its end without complaint.
struct Page {
    samples: BTreeMap<(String, Labels), f64>,
}

impl Page {
    #[track_caller]
    fn of(service: &Service) -> Self {
        let answer = service.http.get("/metrics");
        assert_eq!(answer.status, 200, "{}", answer.text());
        let media_type = answer.header("Content-Type");
        assert_eq!(media_type, Some("text/plain; version=0.0.4; charset=utf-8"));
        Page::parse(&answer.text()).unwrap_or_else(|e| panic!("{e}\n{}", answer.text()))
    }

    #[track_caller]
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels = labels.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let key = (name.to_owned(), labels);
        *self.samples.get(&key).unwrap_or_else(|| panic!("no {key:?}"))
    }

    fn series(&self) -> BTreeSet<(String, Labels)> {
        self.samples.keys().cloned().collect()
    }

    fn parse(text: &str) -> Result<Self, String> {
        let Some(text) = text.strip_suffix('\n') else { return Err("no end of line".into()) };
        let (mut families, mut family) = (BTreeSet::new(), (String::new(), String::new()));
        let mut help = None;
        let mut samples = BTreeMap::new();
        for line in text.split('\n') {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, words) = rest.split_once(' ').ok_or(line)?;
                let good = is_name(name) && !words.is_empty() && families.insert(name.to_owned());
                help = good.then(|| name.to_owned());
                help.as_ref().ok_or(line)?;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').ok_or(line)?;
                let known = ["counter", "gauge", "histogram"].contains(&kind);
                let total = kind != "counter" || name.ends_with("_total");
                let good = help.take().as_deref() == Some(name) && known && total;
                family = good.then(|| (name.to_owned(), kind.to_owned())).ok_or(line)?;
            } else {
                let (name, labels, value) = sample(line).ok_or(line)?;
                let good = help.is_none() && belongs(&name, &labels, &family);
                let before = samples.insert((name, labels), value);
                (good && before.is_none()).then_some(()).ok_or(line)?;
            }
        }
        check_histograms(&samples)?;
        Ok(Page { samples })
    }
}

fn is_name(name: &str) -> bool {
    let fine = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':');
    fine && !name.starts_with(|c: char| c.is_ascii_digit()) && !name.is_empty()
}

fn belongs(name: &str, labels: &Labels, (family, kind): &(String, String)) -> bool {
    match name.strip_prefix(family.as_str()) {
        Some("") => kind != "histogram",
        Some("_bucket") => kind == "histogram" && labels.contains_key("le"),
        Some("_sum" | "_count") => kind == "histogram",
        _ => false,
    }
}

/// `name{label="value",…} number`, with nothing before, between or behind.
fn sample(line: &str) -> Option<(String, Labels, f64)> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, tail) = rest.split_once("=\"")?;
            let (value, tail) = quoted(tail)?;
            let fine = is_name(label) && !label.contains(':') && !label.starts_with("__");
            (fine && labels.insert(label.to_owned(), value).is_none()).then_some(())?;
            match tail.chars().next()? {
                ',' => rest = &tail[1..],
                '}' => break rest = &tail[1..],
                _ => return None,
            }
        }
    }
    let number = rest.strip_prefix(' ')?;
    let fine = number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let value = fine.then(|| number.parse().ok()).flatten()?;
    is_name(name).then(|| (name.to_owned(), labels, value))
}

/// What stands before the closing quote, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                c @ ('"' | '\\') => c,
                _ => return None,
            }),
            c => value.push(c),
        }
    }
    None
}

/// Buckets never fall, and the last is `+Inf` and equals the count.
fn check_histograms(samples: &BTreeMap<(String, Labels), f64>) -> Result<(), String> {
    for ((name, labels), count) in samples {
        let Some(family) = name.strip_suffix("_count") else { continue };
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for ((bucket, of), value) in samples {
            let mut of = of.clone();
            let le = of.remove("le");
            if *bucket == format!("{family}_bucket") && of == *labels {
                let le = le.ok_or("no le")?.replace("+Inf", "inf");
                buckets.push((le.parse().map_err(|_| le)?, *value));
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let rising = buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1);
        let last = buckets.last().ok_or("no buckets")?;
        if !rising || *last != (f64::INFINITY, *count) {
            return Err(format!("the buckets of {family}: {buckets:?}, count {count}"));
        }
        if !samples.contains_key(&(format!("{family}_sum"), labels.clone())) {
            return Err(format!("{family} has no sum"));
        }
    }
    Ok(())
}
