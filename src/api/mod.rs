//! The HTTP API: the table of [`routes`], and a handler for each row.
//!
//! A handler has two halves beside each other. `plan` reads, parses, authorises and answers at once
//! or names the job that is to be done; `render` makes the answer of what became of the job. In
//! between the jobs of all requests that wait are run together.

mod certificates;
mod csv;
mod devices;
mod est;
mod onboarding;
mod operations;
mod page;
mod rate_limit;
mod refusals;
mod request;
mod routes;
mod sign_csr;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use log::Level;
use rustls::sign::CertifiedKey;

use crate::ca::{self, issuer::Issuer};
use crate::clock::{self, Now};
use crate::config::{Config, Enrolment};
use crate::device::DeviceId;
use crate::http::Reply;
use crate::locks::{reading, writing};
use crate::metrics::Metrics;
use crate::problem::{Code, Problem};
use crate::provisioner::{Done, Job, Provisioner};
use crate::store::Op;

use rate_limit::RateLimit;
use refusals::{Refusals, Sum};
pub use request::Request;
use routes::{Asked, Caller, Endpoint, endpoint, manner};
pub use routes::{classify, endpoints, lane_kinds};

/// The API over a provisioner.
pub struct Api {
    provisioner: Arc<Provisioner>,
    settings: RwLock<Arc<Settings>>,
    /// Onboardings of those who show the key, and of those who do not: whoever shares an address with a
    /// client that has no key must not be kept out by it.
    with_key: RateLimit,
    without_key: RateLimit,
    /// Counts failed authentications.
    auth_failures: RateLimit,
    refusals: Refusals,
    metrics: Arc<Metrics>,
}

/// What may change while the service runs.
struct Settings {
    /// `ENROLMENT` is as it was said at the start.
    config: Config,
    /// First and last second of the certificate that we show, since 1970.
    certificate: Option<(u64, u64)>,
}

impl Settings {
    fn of(config: &Config, enrolment: Option<Enrolment>) -> Arc<Self> {
        let certificate = config.tls.as_deref().and_then(validity);
        let mut config = config.clone();
        config.rules.enrolment = enrolment;
        Arc::new(Settings { config, certificate })
    }
}

/// The answers to a batch of requests.
pub struct Answers {
    /// One for each request, in their order.
    pub replies: Vec<Reply>,
    /// For [`Api::clean_up`], after the replies were sent.
    pub after: Vec<Op>,
}

/// The outcome of a handler's first half.
enum Plan {
    Reply(Reply),
    Job(Job, Render),
}

/// A handler's second half.
type Render = fn(&Api, Done, Now) -> Result<Reply, Problem>;

impl Api {
    /// The API as `config` wants it. `metrics` counts what is answered, by [`endpoints`].
    pub fn new(provisioner: Arc<Provisioner>, config: &Config, metrics: Arc<Metrics>) -> Self {
        Api {
            provisioner,
            settings: RwLock::new(Settings::of(config, config.rules.enrolment)),
            with_key: RateLimit::new(config.http.onboarding_rate_limit),
            without_key: RateLimit::new(config.http.onboarding_rate_limit),
            auth_failures: RateLimit::new(config.http.auth_failures),
            refusals: Refusals::new(),
            metrics,
        }
    }

    /// From the next request on, the keys are those of `config`, and its certificate is watched.
    pub fn reload(&self, config: &Config) {
        let before = self.settings();
        let settings = Settings::of(config, before.config.rules.enrolment);
        if settings.config.enrolment() == Enrolment::Open
            && before.config.enrolment() != Enrolment::Open
        {
            log::warn!("ONBOARDING_API_KEY is gone: whoever reaches the port can onboard");
        }
        *writing(&self.settings) = settings;
    }

    /// Another certificate is shown from now on.
    pub fn shows(&self, shown: &CertifiedKey) {
        let mut settings = writing(&self.settings);
        let config = settings.config.clone();
        *settings = Arc::new(Settings { config, certificate: validity(shown) });
    }

    /// What is to be said daily: that the certificate which we show over HTTPS does not count now, or
    /// not much longer, and that our clock is not that of Redis.
    pub fn daily_notes(&self, now: Now) -> Vec<String> {
        let notes = operations::certificate_notes(self, now);
        let clock = self.provisioner.clock_is_off().into_iter().collect();
        [notes.reasons, notes.warnings, clock].concat()
    }

    /// The settings as they are now; a request looks once, so that it sees all old or all new ones.
    fn settings(&self) -> Arc<Settings> {
        Arc::clone(&reading(&self.settings))
    }

    /// The CA, once there is one.
    fn issuer(&self) -> Result<Arc<Issuer>, Code> {
        self.provisioner.ca().issuer().ok_or(Code::ClockNotSet)
    }

    /// Answers the requests of one batch, each for itself: one that panics answers 500.
    pub fn answer(&self, requests: &[Request]) -> Answers {
        let now = clock::now();
        let mut jobs = Vec::new();
        let endpoints: Vec<Option<Endpoint>> =
            requests.iter().map(|request| endpoint(request.method, &request.path)).collect();
        let planned: Vec<Result<Option<Render>, Reply>> = requests
            .iter()
            .zip(&endpoints)
            .map(|(request, endpoint)| match guarded(|| self.plan(request, *endpoint, now)) {
                Ok(Plan::Reply(reply)) => Err(reply),
                Ok(Plan::Job(job, render)) => {
                    jobs.push(job);
                    Ok(Some(render))
                }
                Err(problem) => Err(self.problem(request, &problem, now)),
            })
            .collect();
        let batch = self.provisioner.run(jobs, now);
        let (mut done, end) = (batch.done.into_iter(), clock::now());
        let replies: Vec<Reply> = planned
            .into_iter()
            .zip(requests)
            .map(|(planned, request)| match planned {
                Err(reply) => reply,
                Ok(render) => {
                    let rendered = guarded(|| {
                        let (render, done) = render.zip(done.next()).ok_or(Code::InternalError)?;
                        render(self, done?, end)
                    });
                    rendered.unwrap_or_else(|problem| self.problem(request, &problem, now))
                }
            })
            .collect();
        for (endpoint, reply) in endpoints.iter().zip(&replies) {
            self.metrics.answered(endpoint.map(|endpoint| endpoint.row), reply.status);
        }
        say(&self.refusals.sums(now));
        Answers { replies, after: batch.after }
    }

    /// At the end: says in the log what was not said yet.
    pub fn stop(&self) {
        say(&self.refusals.rest(clock::now()));
    }

    /// How long the store's answers take at present.
    pub fn store_round_trip(&self) -> Duration {
        self.provisioner.store.status().round_trip
    }

    /// Does what could wait until after the replies.
    pub fn clean_up(&self, after: Vec<Op>) {
        self.provisioner.clean_up(after);
    }

    /// An error as a reply, and its one line in the log. Who was refused, and what could not be
    /// served, is of interest; what was merely asked wrongly is noise that anyone can make.
    fn problem(&self, request: &Request, problem: &Problem, now: Now) -> Reply {
        let level = match problem.status() {
            500 => Level::Error,
            401 | 403 | 409 | 429 => Level::Info,
            503 if problem.log.is_some() => Level::Info,
            // A CSR was refused, and the log may say whose.
            400 if problem.log.is_some() && problem.code != Code::InvalidJson => Level::Info,
            _ => Level::Debug,
        };
        self.metrics.problem(problem.code);
        let failed = [Code::ApiKeyRequired, Code::SecretInvalid, Code::AdminForbidden];
        if request.authorization.is_some() && failed.contains(&problem.code) {
            // At the limit it is refused before it can fail.
            let _ = self.auth_failures.admit(request.client, now);
        }
        let Request { path, client, .. } = request;
        if log::log_enabled!(level) && self.refusals.is_shown(problem.code, level, now) {
            // A path may be 8 KiB, and anyone can send one.
            let path: String = path.chars().take(80).collect();
            let named = endpoint(request.method, &request.path).map(|endpoint| endpoint.named());
            let (device, serial) = named.unwrap_or_default();
            let device = problem.device.as_deref().or(device.as_ref()).map_or("", DeviceId::as_str);
            let serial = serial.map(|serial| serial.to_string()).unwrap_or_default();
            let method = request.method.name();
            log::log!(
                level, event = "refused", device, serial, client:%;
                "{method} {path} refused: {problem}, from {client}"
            );
        }
        (manner(&request.path).refuse)(problem, now)
    }
}

/// First and last second of what is shown.
fn validity(shown: &CertifiedKey) -> Option<(u64, u64)> {
    ca::validity(shown.cert.first()?)
}

/// The numbers of refusals that had no line.
fn say(sums: &[Sum]) {
    for Sum { code, count, seconds, level } in sums {
        let code = code.row().1;
        log::log!(*level, "more requests were refused within {seconds} s, {code}: {count}");
    }
}

/// Runs a half of a handler; a panic in it costs its own request only.
fn guarded<T>(half: impl FnOnce() -> Result<T, Problem>) -> Result<T, Problem> {
    catch_unwind(AssertUnwindSafe(half))
        .unwrap_or_else(|_| Err(Problem::from(Code::InternalError).log("the handler panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_500() {
        let result: Result<(), Problem> = guarded(|| panic!("poisoned input"));
        assert_eq!(result.map_err(|problem| problem.status()), Err(500));
    }
}
