//! The HTTP API: one match on (method, path), and a handler for each row.
//!
//! A handler has two halves beside each other. `plan` reads, parses, authorises and answers at once
//! or names the job that is to be done; `render` makes the answer of what became of the job. In
//! between the jobs of all requests that wait are run together.

mod certificates;
mod message;
mod onboarding;
mod operations;
mod rate_limit;
mod refusals;
mod renew;
mod sign_csr;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use log::Level;

use crate::ca;
use crate::clock::{self, Now};
use crate::config::{Config, Secret};
use crate::metrics::Metrics;
use crate::problem::{Code, Problem};
use crate::provisioner::{Done, Job, Provisioner};
use crate::store::Op;

pub use message::{Method, Reply, Request};
use rate_limit::OnboardingLimits;
use refusals::{Refusals, Sum};

/// The API over a provisioner.
pub struct Api {
    provisioner: Arc<Provisioner>,
    settings: RwLock<Arc<Settings>>,
    onboarding_limits: OnboardingLimits,
    refusals: Refusals,
    metrics: Arc<Metrics>,
    /// How many lanes to workers cannot be used now; put here by whoever knows the edge.
    lanes_down: OnceLock<Box<dyn Fn() -> u64 + Send + Sync>>,
}

/// What may change while the service runs.
struct Settings {
    /// What callers must bear; `None` as in [`Config`].
    onboarding_key: Option<Secret>,
    /// The same for the admin endpoints.
    admin_key: Option<Secret>,
    /// First and last second of the certificate that we show, since 1970.
    certificate: Option<(u64, u64)>,
    /// What the configuration has that is allowed, but unwise.
    warnings: Vec<String>,
}

impl Settings {
    fn of(config: &Config) -> Arc<Self> {
        let shown = config.tls.as_ref().and_then(|shown| shown.cert.first());
        Arc::new(Settings {
            onboarding_key: config.onboarding_api_key.clone(),
            admin_key: config.admin_api_key.clone(),
            certificate: shown.and_then(|der| ca::validity(der)),
            warnings: config.warnings.clone(),
        })
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

/// A handler's first half, for one method of a path. `name` is what stands in the path's `{…}`.
type Handler = fn(&Api, &Request, name: &str, Now) -> Result<Plan, Problem>;

/// One row of the routing table.
struct Route {
    method: Method,
    path: &'static str,
    what: &'static str,
    plan: Handler,
}

const fn route(method: Method, path: &'static str, what: &'static str, plan: Handler) -> Route {
    Route { method, path, what, plan }
}

/// All endpoints; `HEAD` and `OPTIONS` come with them.
const ROUTES: &[Route] = &[
    route(Method::Post, "/api/v1/onboarding", "issue a provisioning token", onboarding::plan),
    route(Method::Post, "/api/v1/sign-csr", "redeem a token for a certificate", sign_csr::plan),
    route(
        Method::Get,
        "/api/v1/certificates/{device_id}/status",
        "a device's newest certificate",
        certificates::status,
    ),
    route(
        Method::Get,
        "/api/v1/certificates/{id}/download",
        "a certificate and its CA",
        certificates::download,
    ),
    route(
        Method::Delete,
        "/api/v1/certificates/{device_id}",
        "revoke a device (admin)",
        certificates::revoke,
    ),
    route(Method::Post, "/api/v1/renew", "another certificate, by the present one", renew::plan),
    route(Method::Get, "/api/v1/ca", "the CA certificate", certificates::ca),
    route(Method::Get, "/api/v1/crl", "the list of revoked certificates", certificates::crl),
    route(Method::Get, "/health", "how the service is", operations::health),
    route(Method::Get, "/ready", "whether it can issue and sign", operations::ready),
    route(Method::Get, "/metrics", "what was counted, for Prometheus", operations::metrics),
    route(Method::Get, "/api", "this list", operations::list),
];

/// Method and pattern of each endpoint, for [`Metrics::new`].
pub fn endpoints() -> impl Iterator<Item = (String, &'static str)> {
    ROUTES.iter().map(|route| (route.method.to_string(), route.path))
}

impl Api {
    /// The API as `config` wants it. `metrics` counts what is answered, by [`endpoints`].
    pub fn new(provisioner: Arc<Provisioner>, config: &Config, metrics: Arc<Metrics>) -> Self {
        Api {
            provisioner,
            settings: RwLock::new(Settings::of(config)),
            onboarding_limits: OnboardingLimits::new(config.http.onboarding_rate_limit),
            refusals: Refusals::new(),
            metrics,
            lanes_down: OnceLock::new(),
        }
    }

    /// From now on `GET /ready` asks `count` how many lanes to workers are down.
    pub fn set_lanes_down(&self, count: impl Fn() -> u64 + Send + Sync + 'static) {
        // The edge is opened once.
        let _ = self.lanes_down.set(Box::new(count));
    }

    /// From the next request on, the keys are those of `config`, and its certificate is watched.
    pub fn reload(&self, config: &Config) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = Settings::of(config);
    }

    /// What is to be said of the certificate that we show over HTTPS: that it does not count now, or
    /// not much longer.
    pub fn certificate_notes(&self, now: Now) -> Vec<String> {
        let notes = operations::certificate_notes(self, now);
        [notes.reasons, notes.warnings].concat()
    }

    /// The settings as they are now; a request looks once, so that it sees all old or all new ones.
    fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Answers the requests of one batch, each for itself: one that panics answers 500.
    pub fn answer(&self, requests: &[Request]) -> Answers {
        let now = clock::now();
        let mut jobs = Vec::new();
        let endpoints: Vec<Option<Endpoint>> = requests.iter().map(endpoint).collect();
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
        let mut done = batch.done.into_iter();
        let replies: Vec<Reply> = planned
            .into_iter()
            .zip(requests)
            .map(|(planned, request)| match planned {
                Err(reply) => reply,
                Ok(render) => {
                    let rendered = guarded(|| {
                        let (render, done) = render.zip(done.next()).ok_or(Code::InternalError)?;
                        render(self, done?, clock::now())
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
        self.provisioner.store_status().round_trip
    }

    /// Does what could wait until after the replies.
    pub fn clean_up(&self, after: &[Op]) {
        self.provisioner.clean_up(after);
    }

    fn plan(
        &self,
        request: &Request,
        endpoint: Option<Endpoint<'_>>,
        now: Now,
    ) -> Result<Plan, Problem> {
        if let Some(Endpoint { route, name, .. }) = endpoint {
            return (route.plan)(self, request, name, now);
        }
        if request.path == "*" && request.method == Method::Options {
            return Ok(Plan::Reply(Reply::no_content("GET, HEAD, POST, DELETE, OPTIONS")));
        }
        let here = |route: &&Route| captured(route.path, &request.path).is_some();
        let matching: Vec<&Route> = ROUTES.iter().filter(here).collect();
        if matching.is_empty() {
            return Err(Code::NotFound.into());
        }
        let allow = allowed(&matching);
        if request.method == Method::Options {
            return Ok(Plan::Reply(Reply::no_content(&allow)));
        }
        Err(Problem { allow: Some(allow), ..Code::MethodNotAllowed.into() })
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
        let Request { method, path, client, .. } = request;
        if log::log_enabled!(level) && self.refusals.is_shown(problem.code, level, now) {
            // A path may be 8 KiB, and anyone can send one.
            let path: String = path.chars().take(80).collect();
            log::log!(level, "{method} {path} refused: {problem}, from {client}");
        }
        Reply::problem(problem, now)
    }
}

/// The numbers of refusals that had no line.
fn say(sums: &[Sum]) {
    for Sum { code, count, seconds, level } in sums {
        let code = code.row().1;
        log::log!(*level, "{count} more requests were refused within {seconds} s: {code}");
    }
}

/// Where a request goes.
#[derive(Clone, Copy)]
struct Endpoint<'a> {
    /// Of [`ROUTES`].
    row: usize,
    route: &'static Route,
    /// What stands in the path's `{…}`.
    name: &'a str,
}

/// The first row that fits; `None` if nobody answers this method there.
fn endpoint(request: &Request) -> Option<Endpoint<'_>> {
    let wanted = request.method.or_get();
    ROUTES.iter().enumerate().filter(|(_, route)| route.method == wanted).find_map(
        |(row, route)| Some(Endpoint { row, route, name: captured(route.path, &request.path)? }),
    )
}

/// What stands in the place of `{…}`, if the path fits the pattern; empty for one without.
fn captured<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    let Some((before, rest)) = pattern.split_once('{') else {
        return (pattern == path).then_some("");
    };
    let after = rest.split_once('}').map_or("", |(_, after)| after);
    let name = path.strip_prefix(before)?.strip_suffix(after)?;
    (!name.is_empty() && !name.contains('/')).then_some(name)
}

/// The value of `Allow` for a path (RFC 9110, 10.2.1).
fn allowed(matching: &[&Route]) -> String {
    let mut methods: Vec<String> = Vec::new();
    for route in matching {
        methods.push(route.method.to_string());
        if route.method == Method::Get {
            methods.push(Method::Head.to_string());
        }
    }
    methods.push(Method::Options.to_string());
    methods.join(", ")
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
    fn paths_match_whole_and_capture_one_segment() {
        assert_eq!(captured("/health", "/health"), Some(""));
        assert_eq!(captured("/a/{id}/status", "/a/d-1/status"), Some("d-1"));
        for (pattern, path) in [
            ("/health", "/health/"),
            ("/health", "//health"),
            ("/health", "/Health"),
            ("/a/{id}/status", "/a//status"),
            ("/a/{id}/status", "/a/b/c/status"),
            ("/a/{id}", "/a"),
        ] {
            assert_eq!(captured(pattern, path), None, "{pattern} {path}");
        }
    }

    #[test]
    fn a_panic_is_a_500() {
        let result: Result<(), Problem> = guarded(|| panic!("poisoned input"));
        assert_eq!(result.map_err(|problem| problem.status()), Err(500));
    }
}
