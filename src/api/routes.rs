//! The endpoints, a row each: all that is to be known of a request before its handler runs.
//!
//! The edge asks [`classify`] for its share, the lane and the client's certificate, and knows no path
//! itself; the rest is done here in one order for all: what the caller must show, then the body, then
//! the handler.

use serde_json::{Map, Value};

use super::{
    Api, Plan, Request, certificates, devices, est, onboarding, operations, page, sign_csr,
};
use crate::ca::record::Certificate;
use crate::clock::Now;
use crate::config::Enrolment;
use crate::device::DeviceId;
use crate::devices::enrol::Shown;
use crate::devices::{SecretHash, Text};
use crate::http::lanes::{BULK, CERTIFICATE, PLAIN};
use crate::http::{Class, LaneKind, Method, Reply};
use crate::jwt::Token;
use crate::problem::{Code, Problem};
use crate::provisioner::By;
use crate::serial::Serial;

pub(super) struct Route {
    pub method: Method,
    pub path: &'static str,
    /// For people.
    pub what: &'static str,
    pub lane: LaneKind,
    pub credentials: Credentials,
    /// The fields of the JSON body; without any the body is not looked at.
    pub fields: &'static [&'static str],
    pub plan: Handler,
}

/// A handler's first half.
pub(super) type Handler = fn(&Api, &Asked<'_>, Now) -> Result<Plan, Problem>;

/// What a caller must show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Credentials {
    None,
    /// What `ENROLMENT` asks for; and not more often than the limits allow.
    Onboarding,
    /// A provisioning token, which may be in the body: the handler looks.
    Token,
    /// One of `ADMIN_API_KEY` and `ADMIN_API_KEYS`.
    AdminKey,
    /// A certificate of ours, with its key.
    ClientCertificate,
    /// A secret or a provisioning token; where there is no `Authorization`, a certificate.
    Login,
}

/// What a caller has shown.
pub(super) enum Caller {
    Anyone,
    /// This, where this is the rule. Whether it fits the device is not judged yet.
    Onboarding(Enrolment, Shown),
    /// The admin key of this name.
    Admin(Text),
    Certified(Certificate),
    /// A device's name, which may be empty, and this.
    Login(String, Pass),
}

/// What proves that somebody may have a certificate.
pub(super) enum Pass {
    /// The secret of a registration. Whether it fits the device is not judged yet.
    Secret(SecretHash),
    /// A token that was signed here. It may have ended, or be used.
    Token(Token),
}

/// A request with what its route says of it.
pub(super) struct Asked<'a> {
    pub request: &'a Request,
    /// What stands in the path's `{…}`.
    pub name: &'a str,
    /// What stands in a second one.
    pub serial: &'a str,
    /// The route's fields, as far as they are there.
    pub body: Map<String, Value>,
    pub caller: Caller,
}

macro_rules! routes {
    ($($method:ident $path:literal $plan:path, $lane:path, $asks:ident, $fields:expr, $what:literal;)*) => {
        &[$(Route {
            method: Method::$method,
            path: $path,
            what: $what,
            lane: $lane,
            credentials: Credentials::$asks,
            fields: $fields,
            plan: $plan,
        }),*]
    };
}

/// All endpoints; `HEAD` and `OPTIONS` come with them.
pub(super) const ROUTES: &[Route] = routes! {
    Post "/api/v1/onboarding" onboarding::plan, PLAIN, Onboarding, &["device_id", "replace"],
        "issue a provisioning token";
    Post "/api/v1/sign-csr" sign_csr::plan, CERTIFICATE, Token,
        &["csr", "device_id", "provisioning_token", "user_id"], "redeem a token for a certificate";
    Get "/api/v1/certificates/{device_id}/status" certificates::status, PLAIN, None, &[],
        "a device's newest certificate";
    Get "/api/v1/certificates/{id}/download" certificates::download, PLAIN, None, &[],
        "a certificate and its CA";
    Delete "/api/v1/certificates/{device_id}" certificates::revoke, PLAIN, AdminKey, &["reason"],
        "revoke a device (admin)";
    Delete "/api/v1/devices/{device_id}/certificates/{serial}" certificates::revoke_one,
        CERTIFICATE, AdminKey, &["reason"], "revoke one certificate (admin)";
    Post "/api/v1/renew" sign_csr::renew, CERTIFICATE, ClientCertificate, &["csr"],
        "another certificate, by the present one";
    Get "/api/v1/ca" certificates::ca, PLAIN, None, &[], "the CA certificate";
    Get "/api/v1/devices/{device_id}" devices::show, PLAIN, AdminKey, &[],
        "a device and its certificates (admin)";
    Put "/api/v1/devices/{device_id}" devices::change, PLAIN, AdminKey, devices::FIELDS,
        "register, block or unblock a device (admin)";
    Delete "/api/v1/devices/{device_id}" devices::forget, PLAIN, AdminKey, &[],
        "forget a device's registration (admin)";
    Post "/api/v1/devices" devices::register, BULK, AdminKey, &[], "register devices (admin)";
    Get "/api/v1/devices" devices::list, BULK, AdminKey, &[], "all devices (admin)";
    Get "/api/v1/crl" certificates::crl, BULK, None, &[], "the list of revoked certificates";
    Get "/.well-known/est/cacerts" est::cacerts, PLAIN, None, &[],
        "EST, over HTTPS: the CA certificates";
    Get "/.well-known/est/csrattrs" est::csrattrs, PLAIN, None, &[],
        "EST, over HTTPS: nothing is asked of a CSR";
    Post "/.well-known/est/simpleenroll" est::enrol, CERTIFICATE, Login, &[],
        "EST, over HTTPS: a certificate";
    Post "/.well-known/est/simplereenroll" est::enrol, CERTIFICATE, ClientCertificate, &[],
        "EST, over HTTPS: another certificate, by the present one";
    Get "/" page::page, PLAIN, None, &[], "the page for a browser";
    Get "/health" operations::health, PLAIN, None, &[], "how the service is";
    Get "/ready" operations::ready, PLAIN, None, &[], "whether it can issue and sign";
    Get "/metrics" operations::metrics, PLAIN, None, &[], "what was counted, for Prometheus";
    Get "/api" operations::list, PLAIN, None, &[], "this list";
};

/// The kinds of lanes that the endpoints need.
pub fn lane_kinds() -> Vec<LaneKind> {
    let mut kinds = Vec::new();
    for route in ROUTES {
        if !kinds.contains(&route.lane) {
            kinds.push(route.lane);
        }
    }
    kinds
}

/// Method and pattern of each endpoint, for [`Metrics::new`](crate::metrics::Metrics::new).
pub fn endpoints() -> impl Iterator<Item = (String, &'static str)> {
    ROUTES.iter().map(|route| (route.method.name().to_owned(), route.path))
}

/// What the edge has to know of a request; its path is without the query.
pub fn classify(method: &str, path: &str) -> Class {
    let Some(Endpoint { route, .. }) = endpoint(Method::parse(method), path) else {
        return manner(path);
    };
    let client_certificate =
        matches!(route.credentials, Credentials::ClientCertificate | Credentials::Login);
    Class { lane: route.lane, client_certificate, ..manner(path) }
}

/// What is true of all that is asked for at a path, whether there is something or not.
pub(super) fn manner(path: &str) -> Class {
    match path.starts_with(est::PREFIX) {
        true => Class { https_only: true, refuse: Reply::plain_problem, ..Class::PLAIN },
        false => Class::PLAIN,
    }
}

#[derive(Clone, Copy)]
pub(super) struct Endpoint<'a> {
    /// Of [`ROUTES`].
    pub row: usize,
    route: &'static Route,
    /// What stands in the path's `{…}`.
    names: [&'a str; 2],
}

/// The first row that fits; `None` if nobody answers this method there.
pub(super) fn endpoint(method: Method, path: &str) -> Option<Endpoint<'_>> {
    let wanted = method.or_get();
    ROUTES
        .iter()
        .enumerate()
        .filter(|(_, route)| route.method == wanted)
        .find_map(|(row, route)| Some(Endpoint { row, route, names: captured(route.path, path)? }))
}

impl Endpoint<'_> {
    /// The device and the serial number that the path names. Where either may stand, what could be a
    /// serial number is taken for one.
    pub fn named(&self) -> (Option<DeviceId>, Option<Serial>) {
        let [name, serial] = self.names;
        let either = Serial::from_hex(name).filter(|_| self.route.path.contains("{id}"));
        let device = certificates::device(name).filter(|_| either.is_none());
        (device, either.or_else(|| Serial::from_hex(serial)))
    }
}

impl Asked<'_> {
    /// Who asks, for the log.
    pub fn by(&self) -> By {
        let name = match &self.caller {
            Caller::Admin(name) => Some(name.clone()),
            _ => None,
        };
        By { name, client: self.request.client }
    }
}

impl Api {
    pub(super) fn plan(
        &self,
        request: &Request,
        endpoint: Option<Endpoint<'_>>,
        now: Now,
    ) -> Result<Plan, Problem> {
        let Some(Endpoint { route, names: [name, serial], .. }) = endpoint else {
            return unknown(request);
        };
        let caller = self.authorise(route.credentials, request, now)?;
        let body = match route.fields {
            [] => Map::new(),
            _ if route.method == Method::Delete && request.body.is_empty() => Map::new(),
            fields => request.json(fields)?,
        };
        (route.plan)(self, &Asked { request, name, serial, body, caller }, now)
    }

    fn authorise(
        &self,
        credentials: Credentials,
        request: &Request,
        now: Now,
    ) -> Result<Caller, Problem> {
        match credentials {
            Credentials::None | Credentials::Token => Ok(Caller::Anyone),
            Credentials::Onboarding => self.authorise_onboarding(request, now),
            Credentials::AdminKey => {
                let settings = self.settings();
                let keys = &settings.config.admin_keys;
                if keys.is_empty() {
                    return Err(Code::AdminDisabled.into());
                }
                self.check_failures(request, now)?;
                // SECURITY: all are compared, so that the time does not tell which it was
                let found = keys
                    .iter()
                    .fold(None, |found, key| request.bears(&key.key).then_some(key).or(found));
                let name = found.and_then(|admin| Text::parse(&admin.name));
                name.map(Caller::Admin).ok_or(Code::AdminForbidden.into())
            }
            Credentials::ClientCertificate => {
                let der = request.client_certificate.as_deref();
                self.provisioner.check_certificate(der, now).map(Caller::Certified)
            }
            Credentials::Login => self.authorise_login(request, now),
        }
    }

    fn authorise_onboarding(&self, request: &Request, now: Now) -> Result<Caller, Problem> {
        let settings = self.settings();
        let key = settings.config.onboarding_api_key.as_ref();
        let shown = match request.bearer() {
            _ if key.is_some_and(|key| request.bears(key)) => Shown::Key,
            Some(given) => SecretHash::of_typed(given).map_or(Shown::Wrong, Shown::Secret),
            None => Shown::Nothing,
        };
        let limit = if shown == Shown::Key { &self.with_key } else { &self.without_key };
        limit.admit(request.client, now).map_err(wait)?;
        self.check_failures(request, now)?;
        match (settings.config.enrolment(), shown) {
            (rule, Shown::Key) => Ok(Caller::Onboarding(rule, shown)),
            (Enrolment::Key, _) => Err(Code::ApiKeyRequired.into()),
            (Enrolment::Registered, Shown::Nothing | Shown::Wrong) => {
                Err(Code::SecretInvalid.into())
            }
            (rule, _) => Ok(Caller::Onboarding(rule, shown)),
        }
    }

    fn authorise_login(&self, request: &Request, now: Now) -> Result<Caller, Problem> {
        if request.authorization.is_none() {
            return match request.client_certificate {
                // A maker's certificate is no reason not to show something else.
                Some(_) => match self.authorise(Credentials::ClientCertificate, request, now) {
                    Err(problem) if problem.code == Code::ClientCertificateInvalid => {
                        Err(problem.text(""))
                    }
                    certified => certified,
                },
                None => Err(est::challenge()),
            };
        }
        let (name, password) = request.login().unwrap_or_default();
        if password.contains('.') {
            let token = self.provisioner.read_token(&password, now)?;
            return Ok(Caller::Login(name, Pass::Token(token)));
        }
        self.without_key.admit(request.client, now).map_err(wait)?;
        self.check_failures(request, now)?;
        let secret = SecretHash::of_typed(&password).ok_or_else(est::no_login)?;
        match self.settings().config.enrolment() {
            // As at onboarding, a secret is not enough.
            Enrolment::Key => Err(est::no_token()),
            Enrolment::Open | Enrolment::Registered => {
                Ok(Caller::Login(name, Pass::Secret(secret)))
            }
        }
    }

    /// Whoever has failed too often is not even looked at: also a right guess must not be told.
    fn check_failures(&self, request: &Request, now: Now) -> Result<(), Problem> {
        match request.authorization {
            Some(_) => self.auth_failures.look(request.client, now).map_err(wait),
            None => Ok(()),
        }
    }
}

fn wait(seconds: u64) -> Problem {
    Problem { retry_after_s: Some(seconds), ..Code::RateLimited.into() }
}

/// What is answered where there is no row.
fn unknown(request: &Request) -> Result<Plan, Problem> {
    if request.path == "*" && request.method == Method::Options {
        return Ok(Plan::Reply(Reply::no_content(Method::ALLOW)));
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
    Err(Problem { allow: Some(allow.into()), ..Code::MethodNotAllowed.into() })
}

/// What stands in the places of `{…}`, if the path fits the pattern; empty where it has none.
fn captured<'a>(pattern: &str, path: &'a str) -> Option<[&'a str; 2]> {
    // Some clients end their paths with a slash.
    let bare = path.strip_suffix('/').filter(|_| pattern.starts_with(est::PREFIX));
    let path = bare.unwrap_or(path);
    let mut captured = ["", ""];
    if pattern == path {
        return Some(captured);
    }
    let (mut wanted, mut found) = (pattern.split('/'), path.split('/'));
    let mut places = captured.iter_mut();
    loop {
        match (wanted.next(), found.next()) {
            (None, None) => return Some(captured),
            (Some(name), Some(segment)) if name.starts_with('{') && !segment.is_empty() => {
                *places.next()? = segment;
            }
            (Some(wanted), Some(segment)) if wanted == segment => {}
            _ => return None,
        }
    }
}

/// The value of `Allow` for a path (RFC 9110, 10.2.1).
fn allowed(matching: &[&Route]) -> String {
    let mut methods: Vec<&str> = Vec::new();
    for route in matching {
        methods.push(route.method.name());
        if route.method == Method::Get {
            methods.push(Method::Head.name());
        }
    }
    methods.push(Method::Options.name());
    methods.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_match_whole_and_capture_one_segment() {
        assert_eq!(captured("/health", "/health"), Some(["", ""]));
        assert_eq!(captured("/a/{id}/status", "/a/d-1/status"), Some(["d-1", ""]));
        assert_eq!(captured("/a/{id}/b/{serial}", "/a/1/b/2"), Some(["1", "2"]));
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
    fn what_is_slow_or_large_has_lanes_of_its_own() {
        for (method, path, lane) in [
            ("POST", "/api/v1/sign-csr", CERTIFICATE),
            ("POST", "/api/v1/renew", CERTIFICATE),
            ("GET", "/api/v1/crl", BULK),
            ("HEAD", "/api/v1/crl", BULK),
            ("POST", "/api/v1/crl", PLAIN),
            ("GET", "/api/v1/crl/", PLAIN),
            ("POST", "/.well-known/est/simpleenroll", CERTIFICATE),
            ("POST", "/.well-known/est/simplereenroll/", CERTIFICATE),
            ("GET", "/.well-known/est/cacerts", PLAIN),
            ("DELETE", "/api/v1/certificates/d", PLAIN),
            ("GET", "/health", PLAIN),
        ] {
            assert_eq!(classify(method, path).lane, lane, "{method} {path}");
        }
    }

    #[test]
    fn only_renewal_sees_the_clients_certificate() {
        let asks = |method, path| classify(method, path).client_certificate;
        assert!(asks("POST", "/api/v1/renew"));
        assert!(asks("POST", "/.well-known/est/simplereenroll"));
        assert!(asks("POST", "/.well-known/est/simpleenroll/"), "it may be a renewal");
        for (method, path) in
            [("GET", "/api/v1/renew"), ("POST", "/api/v1/renew/"), ("POST", "/api/v1/sign-csr")]
        {
            assert!(!asks(method, path), "{method} {path}");
        }
    }

    /// What `OPTIONS *` and the edge say of all endpoints together.
    #[test]
    fn every_method_is_allowed_somewhere() {
        let listed: Vec<&str> = Method::ALLOW.split(", ").collect();
        for route in ROUTES {
            assert!(listed.contains(&route.method.name()), "{}", route.path);
        }
    }
}
