//! Instances of the program as the tests of the token protocol need them, and what is asked of them:
//! one CA, one secret, both keys set, devices that may enrol again.

use std::collections::BTreeSet;
use std::io;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use rcgen::{CertificateParams, DnType, KeyPair};
use serde_json::json;

use super::http::{Client, Response};
use super::proxy::{Mode, Proxy};
use super::service::{Service, Setup};
use super::{check_error, token, wait};

pub const ONBOARDING_KEY: &str = "onboarding-key-0001";
pub const ADMIN_KEY: &str = "admin-key-0000000001";

/// A device: its name and its request for a certificate.
#[derive(Clone, Debug)]
pub struct Device {
    pub name: String,
    pub csr: String,
}

impl Device {
    /// By `rcgen`, since hundreds are needed; what other makers' requests look like is the topic of
    /// `csr_policy`.
    pub fn new(name: &str) -> Self {
        static KEY: LazyLock<KeyPair> = LazyLock::new(|| KeyPair::generate().unwrap());
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.remove(DnType::CommonName);
        parameters.distinguished_name.push(DnType::CommonName, name);
        let csr = parameters.serialize_request(&*KEY).and_then(|csr| csr.pem()).unwrap();
        Device { name: name.to_owned(), csr }
    }
}

/// The first instance, on the Redis at `url`, which must be there.
#[track_caller]
pub fn first(url: &str, env: &[(&str, &str)]) -> Service {
    serving(setup(url, env).start())
}

/// Another instance with the same CA and a folder of its own.
#[track_caller]
pub fn another(first: &Service, url: &str, env: &[(&str, &str)]) -> Service {
    serving(setup(url, env).share_ca(first).start())
}

/// What both are started with; `env` comes last and wins.
pub fn setup(url: &str, env: &[(&str, &str)]) -> Setup {
    let setup = Setup::new().envs(&[
        ("REDIS_URL", url),
        ("JWT_SECRET", token::SECRET),
        ("ONBOARDING_API_KEY", ONBOARDING_KEY),
        ("ADMIN_API_KEY", ADMIN_KEY),
        ("REENROLL", "allow"),
        ("REDIS_TIMEOUT_MS", "400"),
        ("REDIS_CONNECT_TIMEOUT_MS", "1000"),
        ("LOG_LEVEL", "debug"),
    ]);
    setup.envs(env)
}

fn serving(service: Service) -> Service {
    service.wait_for_storage("redis");
    service
}

/// Onboards the device.
pub fn onboard(service: &Service, device: &Device) -> Response {
    ask_for_token(service, device, false)
}

/// Onboards the device in place of the token that it may have.
pub fn replace(service: &Service, device: &Device) -> Response {
    ask_for_token(service, device, true)
}

#[track_caller]
fn ask_for_token(service: &Service, device: &Device, replace: bool) -> Response {
    try_ask_for_token(&service.http, device, replace).unwrap()
}

/// As [`replace`]; an error is no answer within the time-out.
pub fn try_replace(server: &Client, device: &Device) -> io::Result<Response> {
    try_ask_for_token(server, device, true)
}

fn try_ask_for_token(server: &Client, device: &Device, replace: bool) -> io::Result<Response> {
    let bearer = format!("Bearer {ONBOARDING_KEY}");
    let headers = [("Content-Type", "application/json"), ("Authorization", &*bearer)];
    let body = json!({"device_id": device.name, "replace": replace}).to_string();
    server.try_request("POST", "/api/v1/onboarding", &headers, body.as_bytes())
}

/// The token of an onboarding that must succeed.
#[track_caller]
pub fn token(service: &Service, device: &Device) -> String {
    issued(service, &onboard(service, device))
}

/// The token in an answer that must be a 200.
#[track_caller]
pub fn issued(service: &Service, answer: &Response) -> String {
    assert_eq!(answer.status, 200, "{}\n{}", answer.text(), service.log());
    answer.field("provisioning_token")
}

/// Presents the token once.
pub fn redeem(service: &Service, token: &str, device: &Device) -> Response {
    service.sign(token, &device.csr)
}

/// Presents the token until the answer is not 503: as a device does.
#[track_caller]
pub fn redeem_patiently(service: &Service, token: &str, device: &Device) -> Response {
    let answer = wait::until(Duration::from_secs(15), || {
        let answer = redeem(service, token, device);
        if answer.status == 503 {
            thread::sleep(Duration::from_millis(20));
        }
        (answer.status != 503).then_some(answer)
    });
    answer.unwrap_or_else(|| panic!("503 for 15 s\n{}", service.log()))
}

/// Redeems the token, which must succeed, and gives the serial.
#[track_caller]
pub fn certificate(service: &Service, token: &str, device: &Device) -> String {
    let answer = redeem_patiently(service, token, device);
    assert_eq!(answer.status, 200, "{}\n{}", answer.text(), service.log());
    answer.field("serial_number")
}

/// Revokes the device's certificates and kills its token.
pub fn revoke(service: &Service, device: &Device) -> Response {
    let path = format!("/api/v1/certificates/{}", device.name);
    let bearer = format!("Bearer {ADMIN_KEY}");
    service.http.request("DELETE", &path, &[("Authorization", &bearer)], b"")
}

/// The key of the token's mark.
pub fn mark_key(token: &str) -> String {
    format!("mqtt-lite:{}", token::mark_of(token))
}

/// The key of the token.
pub fn token_key(token: &str) -> String {
    format!("mqtt-lite:token:{token}")
}

/// The key of the device's claim.
pub fn claim_key(device: &Device) -> String {
    format!("mqtt-lite:device:{}", device.name)
}

/// The mark that this instance makes for a certificate with `serial`, or `killed`.
pub fn mark(service: &Service, what: &str) -> String {
    format!("{} {what}", id(service))
}

/// The id of this instance.
pub fn id(service: &Service) -> String {
    service.read("instance-id").lines().next().unwrap().to_owned()
}

/// Certificates in the records of all these instances, each counted once.
pub fn certificates(services: &[&Service]) -> usize {
    services.iter().flat_map(|service| service.serials()).collect::<BTreeSet<_>>().len()
}

/// Cuts the instance off from Redis, and waits until it has noticed.
#[track_caller]
pub fn cut_off(service: &Service, proxy: &Proxy) {
    proxy.set(Mode::Refuse);
    notice_loss(service);
}

/// Makes the instance look at its Redis, which is gone, and waits until it has decided that it is:
/// before that it answers redemptions with 503.
#[track_caller]
pub fn notice_loss(service: &Service) {
    service.health();
    wait::for_true("it is an outage", || {
        let log = service.log();
        log.rfind("Redis is lost") > log.rfind("Redis is back")
    });
    service.wait_for_storage("memory");
}

/// Ends that, and waits until the instance is back.
#[track_caller]
pub fn reconnect(service: &Service, proxy: &Proxy) {
    proxy.set(Mode::Pass);
    service.wait_for_storage("redis");
}

/// Asserts that none of these instances grants the token, and that each says that it is used.
#[track_caller]
pub fn refused_as_used(services: &[&Service], token: &str, device: &Device) {
    for service in services {
        let answer = redeem_patiently(service, token, device);
        check_error(&answer, 401, "TOKEN_ALREADY_USED", &device.name);
    }
}
