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
mod renew;
mod sign_csr;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError, RwLock};

use log::Level;

use crate::clock::{self, Now};
use crate::config::{Config, Secret};
use crate::metrics::Metrics;
use crate::problem::{Code, Problem};
use crate::provisioner::{Done, Job, Provisioner};
use crate::store::Op;

pub use message::{Method, Reply, Request};
use rate_limit::RateLimit;

/// The API over a provisioner.
pub struct Api {
    provisioner: Arc<Provisioner>,
    keys: RwLock<Arc<Keys>>,
    onboarding_limit: RateLimit,
    metrics: Arc<Metrics>,
}

/// What callers must bear; `None` as in [`Config`].
struct Keys {
    onboarding: Option<Secret>,
    admin: Option<Secret>,
}

impl Keys {
    fn of(config: &Config) -> Arc<Self> {
        Arc::new(Keys {
            onboarding: config.onboarding_api_key.clone(),
            admin: config.admin_api_key.clone(),
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
            keys: RwLock::new(Keys::of(config)),
            onboarding_limit: RateLimit::new(config.http.onboarding_rate_limit),
            metrics,
        }
    }

    /// From the next request on, both keys are those of `config`.
    pub fn set_keys(&self, config: &Config) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Keys::of(config);
    }

    /// The keys as they are now; a request looks once, so that it sees both old or both new.
    fn keys(&self) -> Arc<Keys> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Answers the requests of one batch, each for itself: one that panics answers 500.
    pub fn answer(&self, requests: &[Request]) -> Answers {
        let now = clock::now();
        let mut jobs = Vec::new();
        let planned: Vec<Result<Option<Render>, Reply>> = requests
            .iter()
            .map(|request| match guarded(|| self.plan(request, now)) {
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
        for (request, reply) in requests.iter().zip(&replies) {
            self.metrics.answered(endpoint(request), reply.status);
        }
        Answers { replies, after: batch.after }
    }

    /// Does what could wait until after the replies.
    pub fn clean_up(&self, after: &[Op]) {
        self.provisioner.clean_up(after);
    }

    fn plan(&self, request: &Request, now: Now) -> Result<Plan, Problem> {
        if request.path == "*" && request.method == Method::Options {
            return Ok(Plan::Reply(Reply::no_content("GET, HEAD, POST, DELETE, OPTIONS")));
        }
        let matching: Vec<(&Route, &str)> = ROUTES
            .iter()
            .filter_map(|route| Some((route, captured(route.path, &request.path)?)))
            .collect();
        if matching.is_empty() {
            return Err(Code::NotFound.into());
        }
        let wanted = request.method.or_get();
        if let Some((route, name)) = matching.iter().find(|(route, _)| route.method == wanted) {
            return (route.plan)(self, request, name, now);
        }
        let allow = allowed(&matching);
        if request.method == Method::Options {
            return Ok(Plan::Reply(Reply::no_content(&allow)));
        }
        Err(Problem::from(Code::MethodNotAllowed).field("allow", allow))
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
        // A path may be 8 KiB, and anyone can send one.
        let path: String = path.chars().take(80).collect();
        log::log!(level, "{method} {path} refused: {problem}, from {client}");
        Reply::problem(problem, now)
    }
}

/// The row of the routing table that a request is for. Looked up once more for the count alone: it
/// is cheap, and nothing else has to carry it along.
fn endpoint(request: &Request) -> Option<usize> {
    let wanted = request.method.or_get();
    let fits = |row: &Route| row.method == wanted && captured(row.path, &request.path).is_some();
    ROUTES.iter().position(fits)
}

/// What stands in the place of `{…}`, if the path fits the pattern; empty for one without.
fn captured<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    let mut name = "";
    let mut pattern = pattern.split('/');
    for segment in path.split('/') {
        match pattern.next()? {
            wild if wild.starts_with('{') && !segment.is_empty() => name = segment,
            literal if literal == segment => {}
            _ => return None,
        }
    }
    pattern.next().is_none().then_some(name)
}

/// The value of `Allow` for a path (RFC 9110, 10.2.1).
fn allowed(matching: &[(&Route, &str)]) -> String {
    let mut methods: Vec<String> = Vec::new();
    for (route, _) in matching {
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
