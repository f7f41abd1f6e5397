//! EST (RFC 7030) as curl and openssl speak it: the four operations, what real clients send, what is
//! refused, and what becomes of answers that are lost.

use std::fs;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::ca::Chain;
use crate::support::clock::{FakeClock, now_s};
use crate::support::csr::{self, Csr, P256, key_file, openssl};
use crate::support::http::Response;
use crate::support::https::{self, Identity};
use crate::support::instance::setup as on_redis;
use crate::support::proxy::{Mode, Proxy, Stop};
use crate::support::redis::Redis;
use crate::support::service::{ADMIN_KEY, Service, Setup};
use crate::support::temp::TempDir;
use crate::support::token;
use crate::support::wait;

const REGISTERED: &[(&str, &str)] = &[("ENROLMENT", "registered"), ("AUTH_FAILURES", "0")];
const ENROLL: &str = "/.well-known/est/simpleenroll";
const REENROLL: &str = "/.well-known/est/simplereenroll";
const TYPE: &str = "Content-Type: application/pkcs10";
const CERTS_ONLY: &str = "application/pkcs7-mime; smime-type=certs-only";

/// A service over HTTPS, and a folder for what clients have.
struct Stage {
    service: Service,
    dir: TempDir,
}

fn over_https(setup: Setup, env: &[(&str, &str)]) -> Setup {
    let base = [("TLS", "auto"), ("TLS_NAMES", "localhost"), ("ADMIN_API_KEY", ADMIN_KEY)];
    setup.envs(&base).envs(env)
}

impl Stage {
    #[track_caller]
    fn set(env: &[(&str, &str)]) -> Self {
        Self::of(over_https(Setup::new(), env))
    }

    #[track_caller]
    fn of(setup: Setup) -> Self {
        Stage { service: setup.start(), dir: TempDir::new() }
    }

    fn ask(&self, path: &str, who: Option<&Identity>, more: &[&str]) -> Response {
        https::ask(&self.service, path, who, more)
    }

    /// Posts this body as PKCS#10.
    fn post(&self, path: &str, who: Option<&Identity>, body: &str, more: &[&str]) -> Response {
        let file = format!("@{}", self.dir.file("body", body).display());
        self.ask(path, who, &[&["-H", TYPE, "--data-binary", &file], more].concat())
    }

    /// Enrols by HTTP Basic.
    fn enroll(&self, login: &str, body: &str) -> Response {
        self.post(ENROLL, None, body, &["-u", login])
    }

    #[track_caller]
    fn admin(&self, method: &str, path: &str, body: &Value) -> Response {
        let bearer = format!("Authorization: Bearer {ADMIN_KEY}");
        let answer = https::post(&self.service, path, None, body, &["-X", method, "-H", &bearer]);
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), self.service.log());
        answer
    }

    #[track_caller]
    fn register(&self, device: &str) -> String {
        let path = format!("/api/v1/devices/{device}");
        self.admin("PUT", &path, &json!({"secret": true})).field("enrolment_secret")
    }

    #[track_caller]
    fn token(&self, device: &str, credential: &str) -> String {
        let bearer = format!("Authorization: Bearer {credential}");
        let body = json!({"device_id": device});
        let answer =
            https::post(&self.service, "/api/v1/onboarding", None, &body, &["-H", &bearer]);
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), self.service.log());
        answer.field("provisioning_token")
    }

    /// The certificate of a good answer, as a file.
    #[track_caller]
    fn keep(&self, answer: &Response, key: &str) -> Identity {
        let pem = self.leaf(answer);
        let name = format!("{}.crt", csr::x509_field(&pem, &["-serial"]));
        Identity { certificate: self.dir.file(&name, &pem), key: key_file(key) }
    }

    /// The one certificate of a good answer.
    #[track_caller]
    fn leaf(&self, answer: &Response) -> String {
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), self.service.log());
        assert_eq!(answer.header("Content-Type"), Some(CERTS_ONLY));
        let mut certificates = printed(answer);
        assert_eq!(certificates.len(), 1, "the leaf only");
        certificates.remove(0)
    }

    fn signed(&self) -> usize {
        self.service.serials().len()
    }
}

/// The certificates of an answer, in the order in which they stand there, by openssl; as every client
/// can read them.
#[track_caller]
fn printed(answer: &Response) -> Vec<String> {
    assert_eq!(answer.header("Content-Transfer-Encoding"), Some("base64"));
    let body = answer.text();
    assert!(body.ends_with('\n') && body.lines().all(|line| (1..=64).contains(&line.len())));
    let framed = format!("-----BEGIN PKCS7-----\n{body}-----END PKCS7-----\n");
    let printed = openssl(&["pkcs7", "-print_certs"], &framed);
    let begin = "-----BEGIN CERTIFICATE-----";
    let blocks = printed.split(begin).skip(1);
    blocks
        .map(|block| format!("{begin}{}-----\n", block.split("-----\n").next().unwrap()))
        .collect()
}

/// The request as base64 in one line.
fn one_line(pem: &str) -> String {
    token::base64_of(&token::pem_to_der(pem))
}

/// Asserts an error as EST clients read it.
#[track_caller]
fn refused(answer: &Response, status: u16, code: &str, what: &str) {
    let (found, text) = (answer.header("X-Error-Code"), answer.text());
    assert_eq!((answer.status, found), (status, Some(code)), "{what}: {text}");
    assert_eq!(answer.header("Content-Type"), Some("text/plain; charset=utf-8"), "{what}");
    assert!(text.trim().len() > 5 && !text.contains('{'), "{what}: {text}");
    let challenge = (status == 401).then_some("Basic realm=\"est\"");
    assert_eq!(answer.header("WWW-Authenticate"), challenge, "{what}");
    let waits = answer.header("Retry-After").is_some();
    assert_eq!(waits, matches!(status, 429 | 503), "{what}");
}

/// Two keys, and requests with them.
fn requests(device: &str) -> (String, String) {
    (Csr::new(device).make(), Csr::new(device).key("ed25519").digest("-").make())
}

#[test]
fn the_whole_chain_over_both_versions_of_tls() {
    let chain = Chain::new(3);
    let setup = over_https(Setup::new(), &[]);
    chain.put(&setup);
    let stage = Stage::of(setup);
    for version in [&["--tls-max", "1.2"][..], &["--tlsv1.3"]] {
        for path in ["/.well-known/est/cacerts", "/.well-known/est/cacerts/"] {
            let answer = stage.ask(path, None, version);
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_eq!(answer.header("Content-Type"), Some("application/pkcs7-mime"));
            let mut expected = chain.certificates.clone();
            expected.sort_by_key(|pem| token::pem_to_der(pem));
            assert_eq!(printed(&answer), expected, "in the order of DER");
        }
        let attributes = stage.ask("/.well-known/est/csrattrs", None, version);
        assert_eq!((attributes.status, attributes.body.len()), (204, 0));
        let (device, secret) = (version[0].trim_matches('-'), stage.register(version[0]));
        let answer = stage.post(
            ENROLL,
            None,
            &Csr::new(version[0]).make(),
            &[&["-u", &format!("{}:{secret}", version[0])], version].concat(),
        );
        let own = stage.keep(&answer, P256);
        let again = stage.post(REENROLL, Some(&own), &Csr::new(version[0]).make(), version);
        let new = stage.leaf(&again);
        assert_ne!(fs::read_to_string(&own.certificate).unwrap(), new, "{device}");
        let root = stage.dir.file("root", chain.certificates.last().unwrap());
        let upper = stage.dir.file("upper", &chain.certificates[..2].concat());
        let leaf = stage.dir.file("leaf", &new);
        let [root, upper, leaf] = [root, upper, leaf].map(|path| path.display().to_string());
        let verify = ["verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", &root];
        openssl(&[&verify[..], &["-untrusted", &upper, &leaf]].concat(), "");
    }
    let head = stage.ask("/.well-known/est/cacerts", None, &["-I"]);
    assert_eq!((head.status, head.body.len()), (200, 0));
}

/// What is special in it, how it is made of PEM, and what else curl is told.
type Form = (&'static str, fn(&str) -> String, &'static [&'static str]);

/// Each as some client sends it.
#[test]
fn requests_in_every_form() {
    let stage = Stage::set(REGISTERED);
    let forms: &[Form] = &[
        ("one line", one_line, &[]),
        (
            "lines of 64",
            |pem| pem.lines().filter(|l| !l.starts_with('-')).map(|l| format!("{l}\n")).collect(),
            &[],
        ),
        (
            "CRLF",
            |pem| pem.lines().filter(|l| !l.starts_with('-')).map(|l| format!("{l}\r\n")).collect(),
            &[],
        ),
        ("PEM", str::to_owned, &[]),
        ("PEM with CRLF", |pem| pem.replace('\n', "\r\n"), &[]),
        ("an older label", |pem| pem.replace("CERTIFICATE REQ", "NEW CERTIFICATE REQ"), &[]),
        ("with an encoding", one_line, &["-H", "Content-Transfer-Encoding: base64"]),
        ("with a wrong encoding", one_line, &["-H", "Content-Transfer-Encoding: binary"]),
        ("with parameters", one_line, &["-H", "Content-Type: Application/PKCS10; charset=utf-8"]),
        ("chunked", one_line, &["-H", "Transfer-Encoding: chunked"]),
        ("expecting", one_line, &["-H", "Expect: 100-continue"]),
        ("HTTP/1.0", one_line, &["--http1.0", "--no-alpn"]),
    ];
    for (n, (what, form, more)) in forms.iter().enumerate() {
        let device = format!("form:{n}:of-many");
        let secret = stage.register(&device);
        let body = form(&Csr::new(&device).make());
        let file = format!("@{}", stage.dir.file("body", &body).display());
        let media: &[&str] =
            if more.iter().any(|h| h.starts_with("Content-Type")) { &[] } else { &["-H", TYPE] };
        let login = format!("{device}:{secret}");
        let args = [media, &["--data-binary", &file, "-u", &login], more].concat();
        let slash = if n % 2 == 0 { "" } else { "/" };
        let answer = stage.ask(&format!("{ENROLL}{slash}"), None, &args);
        // curl shows the interim answer, too.
        let answer = match answer.status {
            100 => https::parse(&answer.body),
            _ => answer,
        };
        let subject = csr::x509_field(&stage.leaf(&answer), &["-subject"]);
        assert_eq!(subject, format!("CN = {device}"), "{what}");
    }
    // What a request asks for beside its name and key is not looked at, nor is a password in it.
    let secret = stage.register("attributes");
    let asks = Csr::new("attributes").attributes("challengePassword = of-the-tls-session");
    let leaf = stage.leaf(&stage.enroll(&format!(":{secret}"), &asks.make()));
    csr::verify_with_openssl(&stage.service.read("ca/root-ca.crt"), &leaf).unwrap();
}

#[test]
fn by_secret_by_token_and_by_certificate() {
    let stage = Stage::set(REGISTERED);
    let shown = |login: &str| stage.enroll(login, &Csr::new("a:b").make());
    let bearer = |credential: &str| {
        let bearer = format!("Authorization: Bearer {credential}");
        stage.post(ENROLL, None, &Csr::new("a:b").make(), &["-H", &bearer])
    };
    let secret = || stage.register("a:b");
    let token = || stage.token("a:b", &stage.register("a:b"));
    let by_name = stage.keep(&shown(&format!("a:b:{}", secret())), P256);
    let without_name = stage.keep(&shown(&format!(":{}", secret().to_uppercase())), P256);
    stage.leaf(&bearer(&secret()));
    stage.leaf(&shown(&format!("a:b:{}", token())));
    stage.leaf(&shown(&format!(":{}", token())));
    let last = stage.keep(&bearer(&token()), P256);
    assert_eq!(stage.signed(), 6);

    let (request, another) = requests("a:b");
    let by_certificate = stage.post(ENROLL, Some(&last), &another, &[]);
    let renewed = stage.keep(&by_certificate, "ed25519");
    stage.leaf(&stage.post(REENROLL, Some(&renewed), &one_line(&request), &[]));
    // A password counts before a certificate.
    let answer = stage.post(ENROLL, Some(&renewed), &request, &["-u", "a:b:mpl-x"]);
    refused(&answer, 401, "SECRET_INVALID", "a wrong password beside a certificate");
    assert_eq!(stage.signed(), 8);
    for old in [&by_name, &without_name] {
        wait::for_true("an older one is revoked", || {
            stage.post(REENROLL, Some(old), &request, &[]).status == 401
        });
    }
    let log = stage.service.log();
    assert!(log.contains("in renewal of") && log.contains("consumed"), "{log}");
    assert!(!log.replace("/mpl-", "/").contains("mpl-") && !log.contains("eyJ"), "{log}");
}

#[test]
fn who_is_refused_and_why() {
    let stage = Stage::set(REGISTERED);
    let request = Csr::new("d").make();
    let secret = stage.register("d");
    let others = stage.register("e");
    let wrong = "mpl-aaaaaaaaaaaaaaaaaaaaaaaaaa";
    let plain = |answer: &Response| (answer.status, answer.text());
    let first = stage.enroll(&format!("d:{wrong}"), &request);
    refused(&first, 401, "SECRET_INVALID", "a wrong secret");
    for login in [format!("d:{others}"), format!("nobody:{wrong}"), format!(":{wrong}")] {
        let name = if login.starts_with('n') { "nobody" } else { "d" };
        let answer = stage.enroll(&login, &Csr::new(name).make());
        assert_eq!(plain(&answer), plain(&first), "{login}");
    }
    let basic = |text: &str| {
        let field = format!("Authorization: {text}");
        stage.post(ENROLL, None, &request, &["-H", &field])
    };
    for login in ["Basic", "Basic !", "Basic ZA==", "Digest x", "Bearer", "Basic ZDpndXN0YXY="] {
        refused(&basic(login), 401, "SECRET_INVALID", login);
    }
    // Bouncy Castle gives up where this has a body.
    let answer = stage.post(ENROLL, None, &request, &[]);
    assert_eq!((answer.status, answer.header("Content-Length")), (401, Some("0")));
    assert_eq!(answer.header("WWW-Authenticate"), Some("Basic realm=\"est\""));
    assert_eq!(answer.header("X-Error-Code"), Some("SECRET_INVALID"));
    refused(&stage.enroll(&format!("d:{ADMIN_KEY}"), &request), 401, "SECRET_INVALID", "a key");
    let answer = stage.enroll("d:e.y.J", &request);
    refused(&answer, 401, "TOKEN_INVALID_FORMAT", "no token");
    let forged = token::sign("other", r#"{"alg":"HS256"}"#, &token::claims("d", 9).to_string());
    let answer = stage.enroll(&format!(":{forged}"), &request);
    refused(&answer, 401, "TOKEN_INVALID_SIGNATURE", "a foreign token");
    let live = stage.token("d", &secret);
    let answer = stage.enroll(&format!("e:{live}"), &request);
    refused(&answer, 401, "TOKEN_DEVICE_MISMATCH", "another's name");
    let login = format!("d:{secret}");
    for (login, name, code) in [
        (format!("d:{secret}"), "e", "CSR_DEVICE_MISMATCH"),
        (format!("d:{live}"), "e", "CSR_DEVICE_MISMATCH"),
        (format!(":{secret}"), "a b", "CSR_DEVICE_MISMATCH"),
        (format!("a b:{secret}"), "d", "DEVICE_ID_INVALID"),
    ] {
        refused(&stage.enroll(&login, &Csr::new(name).make()), 400, code, name);
    }
    let two = Csr::new("").names("0.CN = d\n1.CN = e").make();
    refused(&stage.enroll(&format!(":{secret}"), &two), 400, "CSR_DEVICE_MISMATCH", "two names");
    for garbage in ["", "garbage", "MIIB", "{\"csr\":\"x\"}"] {
        refused(&stage.enroll(&login, garbage), 400, "INVALID_CSR", garbage);
    }
    let weak = Csr::new("d").key("rsa:1024").make();
    refused(&stage.enroll(&login, &weak), 400, "UNSUPPORTED_CSR_KEY_TYPE", "a weak key");
    let body = format!("@{}", stage.dir.file("body", &request).display());
    for media in
        ["application/x-www-form-urlencoded", "application/json", "application/pkcs7-mime", ""]
    {
        let media = format!("Content-Type: {media}");
        let args = ["-u", &login, "--data-binary", &body, "-H", media.trim_end()];
        refused(&stage.ask(ENROLL, None, &args), 415, "UNSUPPORTED_MEDIA_TYPE", &media);
    }
    let answer = stage.post(REENROLL, None, &request, &["-u", &login]);
    refused(&answer, 401, "CLIENT_CERTIFICATE_REQUIRED", "a secret does not renew");
    let (key, certificate) = (key_file(P256), stage.dir.path().join("maker.crt"));
    let files = [&key, &certificate].map(|file| file.display().to_string());
    let args = ["req", "-x509", "-key", &files[0], "-subj", "/CN=d", "-out", &files[1]];
    openssl(&args, "");
    let answer = stage.post(ENROLL, Some(&Identity { certificate, key }), &request, &[]);
    let found = (answer.status, answer.header("X-Error-Code"), &*answer.text());
    assert_eq!(found, (401, Some("CLIENT_CERTIFICATE_INVALID"), ""), "a maker's certificate");
    assert_eq!(stage.signed(), 0);

    let own = stage.keep(&stage.enroll(&login, &request), P256);
    let answer = stage.post(REENROLL, Some(&own), &Csr::new("e").make(), &[]);
    refused(&answer, 400, "CSR_DEVICE_MISMATCH", "another's request");
    stage.admin("PUT", "/api/v1/devices/d", &json!({"blocked": true, "secret": true}));
    for path in [ENROLL, REENROLL] {
        let answer = stage.post(path, Some(&own), &request, &[]);
        refused(&answer, 403, "DEVICE_BLOCKED", path);
    }
    refused(&stage.enroll(&login, &request), 401, "SECRET_INVALID", "an older secret");
    let new = stage.admin("PUT", "/api/v1/devices/d", &json!({"secret": true}));
    let login = format!("d:{}", new.field("enrolment_secret"));
    refused(&stage.enroll(&login, &request), 403, "DEVICE_BLOCKED", "the right secret");
    stage.admin("PUT", "/api/v1/devices/d", &json!({"blocked": false}));
    stage.admin("DELETE", "/api/v1/certificates/d", &json!({}));
    for path in [ENROLL, REENROLL] {
        let answer = stage.post(path, Some(&own), &request, &[]);
        refused(&answer, 401, "CLIENT_CERTIFICATE_REVOKED", path);
    }
}

#[test]
fn what_is_not_there_and_what_the_edge_refuses() {
    let stage = Stage::set(REGISTERED);
    for path in ["fullcmc", "serverkeygen", "label/cacerts", "", "cacerts//", "Cacerts"] {
        let answer = stage.ask(&format!("/.well-known/est/{path}"), None, &[]);
        refused(&answer, 404, "NOT_FOUND", path);
    }
    let answer = stage.ask(ENROLL, None, &[]);
    refused(&answer, 405, "METHOD_NOT_ALLOWED", "GET simpleenroll");
    assert_eq!(answer.header("Allow"), Some("POST, OPTIONS"));
    let options = stage.ask("/.well-known/est/cacerts/", None, &["-X", "OPTIONS"]);
    assert_eq!(options.header("Allow"), Some("GET, HEAD, OPTIONS"));
    let answer = stage.post(ENROLL, None, &"x".repeat(70_000), &["-H", "Expect:"]);
    refused(&answer, 413, "BODY_TOO_LARGE", "announced");
    let chunked = ["-H", "Expect:", "-H", "Transfer-Encoding: chunked"];
    let answer = stage.post(ENROLL, None, &"x".repeat(70_000), &chunked);
    refused(&answer, 413, "BODY_TOO_LARGE", "in chunks");
    let answer = stage.post(ENROLL, None, "x", &["-H", &format!("X: {}", "y".repeat(9000))]);
    refused(&answer, 431, "HEADERS_TOO_LARGE", "a long head");
    let answer = stage.ask(ENROLL, None, &["-H", "Transfer-Encoding: gzip"]);
    refused(&answer, 501, "NOT_IMPLEMENTED", "another coding");
    let json = stage.ask("/.well-known/estimate", None, &[]);
    assert_eq!(json.code(), "NOT_FOUND", "everything else speaks JSON");
}

/// Not a byte of a body, and no credential, where others could read it too.
#[test]
fn nothing_is_read_over_plain_http() {
    let service = Setup::new().env("ADMIN_API_KEY", ADMIN_KEY).start();
    let request = Csr::new("d").make();
    let compact = service.token("d");
    for (method, path) in [
        ("POST", ENROLL),
        ("POST", REENROLL),
        ("GET", "/.well-known/est/cacerts"),
        ("GET", "/.well-known/est/csrattrs/"),
        ("PUT", "/.well-known/est/unknown"),
    ] {
        let fields = [
            ("Content-Type", "application/pkcs10"),
            ("Authorization", &*format!("Bearer {compact}")),
            ("X-Forwarded-Proto", "https"),
        ];
        let answer = service.http.request(method, path, &fields, request.as_bytes());
        refused(&answer, 404, "NOT_FOUND", path);
        assert!(answer.text().contains("HTTPS"), "{}", answer.text());
    }
    let expecting = format!(
        "POST {ENROLL} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    );
    let answer = String::from_utf8(service.http.raw(expecting.as_bytes())).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("Connection: close"), "{answer}");
    for framing in ["Content-Length: 99999999", "Transfer-Encoding: gzip", "Content-Length: x"] {
        let head = format!("POST {ENROLL} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n");
        let answer = String::from_utf8(service.http.raw(head.as_bytes())).unwrap();
        assert!(answer.starts_with("HTTP/1.1 404"), "{framing}: {answer}");
    }
    assert_eq!(service.serials().len(), 0);
    let metrics = service.http.get("/metrics").text();
    let mut seen = metrics.lines().filter(|line| line.contains("well-known/est"));
    assert!(seen.all(|line| line.ends_with(" 0")), "no worker has seen one: {metrics}");
}

#[test]
fn rules_and_limits_are_those_of_onboarding() {
    let key = "onboarding-key-0001";
    let stage = Stage::set(&[("ONBOARDING_API_KEY", key), ("AUTH_FAILURES", "0")]);
    let secret = stage.register("d");
    let request = Csr::new("d").make();
    for password in [&*secret, key] {
        let answer = stage.enroll(&format!("d:{password}"), &request);
        let code = if password == key { "SECRET_INVALID" } else { "API_KEY_REQUIRED" };
        refused(&answer, 401, code, "under `key`");
    }
    let live = stage.token("d", key);
    stage.leaf(&stage.enroll(&format!("d:{live}"), &request));

    let stage = Stage::set(&[("AUTH_FAILURES", "3")]);
    let secret = "mpl-aaaaaaaaaaaaaaaaaaaaaaaaaa";
    let answer = stage.enroll(&format!("d:{secret}"), &request);
    refused(&answer, 401, "SECRET_INVALID", "`open`, but this is worth nothing");
    let secret = stage.register("d");
    stage.leaf(&stage.enroll(&format!("d:{secret}"), &request));
    let failed = wait::until(Duration::from_secs(60), || {
        let answer = stage.enroll("d:x", &request);
        (answer.header("X-Error-Code") != Some("SECRET_INVALID")).then_some(answer)
    });
    refused(&failed.unwrap(), 429, "RATE_LIMITED", "too many failures");
}

#[test]
fn an_answer_that_was_lost_is_given_again() {
    let clock = FakeClock::at(now_s());
    let stage = Stage::of(over_https(Setup::new(), REGISTERED).env_of(&clock.env()));
    let (request, another) = requests("d");
    let secret = stage.register("d");
    let login = format!("d:{secret}");
    let own = stage.keep(&stage.enroll(&login, &request), P256);
    let first = fs::read_to_string(&own.certificate).unwrap();
    for login in [&login, &format!(":{secret}")] {
        assert_eq!(stage.leaf(&stage.enroll(login, &one_line(&request))), first);
    }
    refused(&stage.enroll(&login, &another), 401, "SECRET_INVALID", "another key");
    let renewed = stage.leaf(&stage.post(REENROLL, Some(&own), &request, &[]));
    assert_eq!(stage.leaf(&stage.post(REENROLL, Some(&own), &request, &[])), renewed);
    assert_eq!(stage.leaf(&stage.enroll(&login, &request)), first, "that very certificate");

    let live = stage.token("e", &stage.register("e"));
    let (request, another) = requests("e");
    let login = format!("e:{live}");
    let second = stage.leaf(&stage.enroll(&login, &request));
    assert_eq!(stage.leaf(&stage.enroll(&login, &request)), second);
    refused(&stage.enroll(&login, &another), 401, "TOKEN_ALREADY_USED", "another key");
    let unused = stage.token("f", &stage.register("f"));
    clock.set(now_s() + 1000);
    assert_eq!(stage.leaf(&stage.enroll(&login, &request)), second, "the token has ended");
    let answer = stage.enroll(&format!(":{unused}"), &Csr::new("f").make());
    refused(&answer, 401, "TOKEN_EXPIRED", "and was never used");
    clock.set(now_s());
    assert_eq!(stage.signed(), 3);

    let log = stage.service.log();
    assert_eq!(log.matches("given again, by").count(), 5, "{log}");
    stage.admin("PUT", "/api/v1/devices/e", &json!({"blocked": true}));
    refused(&stage.enroll(&login, &request), 403, "DEVICE_BLOCKED", "blocked");
    stage.admin("PUT", "/api/v1/devices/e", &json!({"blocked": false}));
    stage.admin("DELETE", "/api/v1/certificates/e", &json!({}));
    refused(&stage.enroll(&login, &request), 401, "TOKEN_ALREADY_USED", "it counts no more");
    let newer = stage.register("d");
    let request = Csr::new("d").make();
    refused(&stage.enroll(&format!("d:{secret}"), &request), 401, "SECRET_INVALID", "replaced");
    assert_ne!(stage.leaf(&stage.enroll(&format!("d:{newer}"), &request)), first);
}

/// Asks until the answer is neither 409 nor 503: as a client does when an attempt for its device may be
/// under way elsewhere.
fn patiently(stage: &Stage, login: &str, request: &str) -> Response {
    let answer = wait::until(Duration::from_secs(60), || {
        let answer = stage.enroll(login, request);
        if matches!(answer.status, 409 | 503) {
            thread::sleep(Duration::from_secs(1));
        }
        (!matches!(answer.status, 409 | 503)).then_some(answer)
    });
    answer.unwrap_or_else(|| panic!("no answer for a minute\n{}", stage.service.log()))
}

/// Wherever the program is killed, the same secret and key lead to one certificate.
#[test]
fn the_program_is_killed_at_each_step() {
    let redis = Redis::start(&[]);
    for (n, (pattern, stop)) in [
        ("live", Stop::Before),
        ("live", Stop::After),
        ("used:", Stop::Before),
        ("used:", Stop::After),
        ("\r\nDEL\r\n", Stop::Before),
    ]
    .into_iter()
    .enumerate()
    {
        let proxy = Proxy::start(redis.port());
        let setup = on_redis(&proxy.url(), REGISTERED).env("REDIS_KEY_PREFIX", &format!("{n}:"));
        let mut stage = Stage::of(over_https(setup, &[("REENROLL", "deny")]));
        wait::for_true("Redis serves", || {
            stage.ask("/health", None, &[]).field("storage") == "redis"
        });
        let secret = stage.register("d");
        let (request, another) = requests("d");
        let login = format!("d:{secret}");
        let trap = proxy.trap(pattern, stop);
        let args = ["-sk", "-u", &login, "-H", TYPE, "--data-binary", &*request];
        let url = format!("https://localhost:{}{ENROLL}", stage.service.port());
        let mut client = std::process::Command::new("curl").args(args).arg(url).spawn().unwrap();
        trap.wait();
        stage.service.kill9();
        trap.throw_away();
        client.wait().unwrap();
        stage.service.restart();
        let first = stage.leaf(&patiently(&stage, &login, &request));
        assert_eq!(stage.leaf(&stage.enroll(&login, &request)), first, "{pattern} {stop:?}");
        assert_eq!(stage.enroll(&login, &another).status, 401, "{pattern} {stop:?}");
        assert_eq!(stage.signed(), 1, "{pattern} {stop:?}");
    }
}

/// On one instance and on two, whatever key they have.
#[test]
fn two_at_once_with_one_secret_get_one_certificate() {
    let redis = Redis::start(&[]);
    let env = [REGISTERED, &[("REENROLL", "deny")]].concat();
    let a = Stage::of(over_https(on_redis(&redis.url(), &[]), &env));
    let b = Stage::of(over_https(on_redis(&redis.url(), &[]), &env).share_ca(&a.service));
    for stage in [&a, &b] {
        wait::for_true("Redis serves", || {
            stage.ask("/health", None, &[]).field("storage") == "redis"
        });
    }
    for round in 0..4 {
        let device = format!("d-{round}");
        let secret = a.register(&device);
        let login = format!("{device}:{secret}");
        let (request, another) = requests(&device);
        let attempt = |n: usize| {
            let stage = if round % 2 == 0 { &a } else { [&a, &b][n % 2] };
            let body = if n < 4 { &request } else { &another };
            let file = stage.dir.file(&format!("body-{n}"), body);
            let file = format!("@{}", file.display());
            let args = ["-H", TYPE, "--data-binary", &file, "-u", &login];
            stage.ask(ENROLL, None, &args)
        };
        let attempt = &attempt;
        let answers: Vec<Response> = thread::scope(|scope| {
            let tries: Vec<_> = (0..8).map(|n| scope.spawn(move || attempt(n))).collect();
            tries.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let granted = answers.iter().filter(|answer| answer.status == 200);
        let mut leaves: Vec<String> = granted.map(|answer| a.leaf(answer)).collect();
        // Those who stood in each other's way try again.
        let settled = wait::until(Duration::from_secs(45), || {
            let answers = [&request, &another].map(|body| a.enroll(&login, body));
            leaves.extend(answers.iter().filter(|a| a.status == 200).map(|answer| a.leaf(answer)));
            let mut statuses = answers.map(|answer| answer.status);
            statuses.sort_unstable();
            (statuses == [200, 401]).then_some(())
        });
        assert!(settled.is_some(), "{}", a.service.log());
        leaves.sort();
        leaves.dedup();
        assert_eq!(leaves.len(), 1, "round {round}");
    }
}

#[test]
fn a_lost_answer_is_given_by_another_instance() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let a = Stage::of(over_https(on_redis(&redis.url(), REGISTERED), &[]));
    let b = over_https(on_redis(&proxy.url(), REGISTERED), &[]);
    let b = Stage::of(b.share_ca(&a.service));
    for stage in [&a, &b] {
        wait::for_true("Redis serves", || {
            stage.ask("/health", None, &[]).field("storage") == "redis"
        });
    }
    let (request, another) = requests("d");
    let login = format!("d:{}", a.register("d"));
    let first = a.leaf(&a.enroll(&login, &request));
    assert_eq!(b.leaf(&patiently(&b, &login, &request)), first);
    refused(&b.enroll(&login, &another), 401, "SECRET_INVALID", "another key");
    let live = b.token("e", &b.register("e"));
    let request = Csr::new("e").make();
    let second = b.leaf(&b.enroll(&format!("e:{live}"), &request));
    assert_eq!(a.leaf(&a.enroll(&format!(":{live}"), &request)), second);
    // Whoever knows the certificate needs nobody to ask.
    proxy.set(Mode::Refuse);
    wait::for_true("it is noticed", || {
        let answer = b.enroll(&login, &Csr::new("d").make());
        answer.status == 200
            && b.leaf(&answer) == first
            && b.ask("/health", None, &[]).field("status") == "degraded"
    });
}

impl Stage {
    /// Sends these bytes by OpenSSL, as a client that prefers HTTP/2 and keeps its connection open.
    #[track_caller]
    fn replay(&self, who: Option<&Identity>, request: &str) -> Response {
        let server = format!("localhost:{}", self.service.port());
        let ca = self.service.data("ca/root-ca.crt").display().to_string();
        let mut client = std::process::Command::new("openssl");
        client.args(["s_client", "-quiet", "-verify_return_error", "-alpn", "h2,http/1.1"]);
        client.args(["-connect", &server, "-servername", "localhost", "-CAfile", &ca]);
        if let Some(Identity { certificate, key }) = who {
            client.arg("-cert").arg(certificate).arg("-key").arg(key);
        }
        let dir = TempDir::new();
        let stdin = fs::File::open(dir.file("request", request)).unwrap();
        let output = client.stdin(stdin).output().unwrap();
        https::parse(&output.stdout)
    }
}

/// As when a client gives up and asks again while the first attempt is under way.
#[test]
fn many_at_once_with_one_key_get_the_same_certificate() {
    let stage = Stage::set(REGISTERED);
    let (secret, live) = (stage.register("d"), stage.token("e", &stage.register("e")));
    for (device, password) in [("d", secret), ("e", live)] {
        let login = format!("{device}:{password}");
        let body = format!("@{}", stage.dir.file(device, &Csr::new(device).make()).display());
        let args = ["-H", TYPE, "--data-binary", &body, "-u", &login];
        let ask = || stage.ask(ENROLL, None, &args);
        let mut leaves: Vec<String> = thread::scope(|scope| {
            let tries: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
            tries.into_iter().map(|t| stage.leaf(&t.join().unwrap())).collect()
        });
        leaves.dedup();
        assert_eq!(leaves.len(), 1, "{device}");
    }
    assert_eq!(stage.signed(), 2);
}

/// A token that is issued inside costs what it costs a device that asks for it, and no trip more.
#[test]
fn an_enrolment_takes_no_trip_more_than_onboarding_and_redemption() {
    const DEVICES: usize = 10;
    let redis = Redis::start(&[]);
    let stage = Stage::of(over_https(on_redis(&redis.url(), REGISTERED), &[]));
    wait::for_true("Redis serves", || stage.ask("/health", None, &[]).field("storage") == "redis");
    let trips = || -> i64 {
        let page = stage.ask("/metrics", None, &[]).text();
        let count = page.lines().find_map(|line| {
            line.strip_prefix("mqtt_lite_redis_round_trip_seconds_count ")?.trim().parse().ok()
        });
        count.expect(&page)
    };
    let devices = |prefix: &str| -> Vec<(String, String)> {
        let names = (0..DEVICES).map(|n| format!("{prefix}-{n}"));
        names.map(|name| (name.clone(), stage.register(&name))).collect()
    };
    let (first, second) = (devices("by-hand"), devices("est"));
    let begun = trips();
    for (device, secret) in &first {
        let body = json!({
            "csr": Csr::new(device).make(),
            "provisioning_token": stage.token(device, secret),
        });
        let answer = https::post(&stage.service, "/api/v1/sign-csr", None, &body, &[]);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let between = trips();
    for (device, secret) in &second {
        stage.leaf(&stage.enroll(&format!("{device}:{secret}"), &Csr::new(device).make()));
    }
    let (by_hand, by_est) = (between - begun, trips() - between);
    // What follows the last answer may be counted with the others.
    assert!(by_hand >= 2 * DEVICES as i64 && by_est <= by_hand + 3, "{by_hand} {by_est}");
}

/// What the sources of two gateways' agents say that they send and take: `est.rs` of Azure's
/// `aziot-certd` (iot-identity-service, a6b1d162), and `c8y/{mod,download,renew}.rs` of thin-edge.io
/// (c6cc23d6), below hyper and reqwest.
#[test]
fn as_certd_and_thin_edge_do_it() {
    let env = [REGISTERED, &[("KEEP_ALIVE_SECONDS", "1")]].concat();
    let stage = &Stage::set(&env);
    let host = format!("host: localhost:{}\r\n", stage.service.port());
    let basic = |device: &str, secret: &str| {
        let login = token::base64_of(format!("{device}:{secret}").as_bytes());
        format!("authorization: Basic {login}\r\n")
    };
    let lines = |pem: &str| -> String {
        pem.lines().filter(|line| !line.starts_with('-')).map(|line| format!("{line}\n")).collect()
    };
    let post = |path: &str, fields: &str, body: &str| {
        let length = body.len();
        let media = "content-type: application/pkcs10\r\n";
        let fields = format!("{fields}{host}content-length: {length}\r\n");
        format!("POST {path} HTTP/1.1\r\n{media}{fields}\r\n{body}")
    };

    // certd asks for both at once and takes neither without the other.
    let secret = stage.register("edge-1");
    let encoding = "content-transfer-encoding: base64\r\n";
    let client_auth = "extendedKeyUsage = clientAuth";
    let body = lines(&Csr::new("edge-1").extensions(client_auth).make());
    let fields = format!("{}{encoding}", basic("edge-1", &secret));
    let ask =
        format!("GET /.well-known/est/cacerts HTTP/1.1\r\n{}{host}\r\n", basic("edge-1", &secret));
    let [enrolled, cas] = thread::scope(|scope| {
        let requests = [post(ENROLL, &fields, &body), ask];
        let tries = requests.map(|request| scope.spawn(move || stage.replay(None, &request)));
        tries.map(|t| t.join().unwrap())
    });
    let identity = stage.keep(&enrolled, P256);
    assert_eq!(printed(&cas), [stage.service.read("ca/root-ca.crt")]);
    // Its bootstrap certificate is what it shows for the next, at simpleenroll.
    stage.leaf(&stage.replay(Some(&identity), &post(ENROLL, encoding, &body)));

    // thin-edge asks again until there is a 200: it may be earlier than who registers the device.
    let accept = "accept: */*\r\n";
    let body = lines(&Csr::new("tedge:1").make());
    let early = basic("tedge:1", "one-time-password");
    let early = stage.replay(None, &post(ENROLL, &format!("{early}{accept}"), &body));
    refused(&early, 401, "SECRET_INVALID", "not registered yet");
    let fields = format!("{}{accept}", basic("tedge:1", &stage.register("tedge:1")));
    let enrolled = stage.replay(None, &post(ENROLL, &fields, &body));
    // It takes the answer for base64 of one block, once the line ends are out.
    let text = enrolled.text().replace(['\n', '\r'], "");
    assert!(text.len().is_multiple_of(4) && text.starts_with("MII"), "{text}");
    let identity = stage.keep(&enrolled, P256);
    stage.leaf(&stage.replay(Some(&identity), &post(REENROLL, accept, &body)));
    assert_eq!(stage.signed(), 4);
}
