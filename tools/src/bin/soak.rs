//! For measuring: a steady load of all that services are asked, good and bad, for `scripts/soak.sh`.
//!
//! `soak [--outage] RATE SECONDS CA ONBOARDING_KEY ADMIN_KEY SERVER…` sends RATE requests a second in
//! all to the servers, `http://IP:PORT` or `https://IP:PORT`, which share Redis and the CA whose
//! certificate is the file CA. Devices are ever new ones, each from an address of its own (the
//! servers have to trust 127.0.0.1 as a proxy), and most never redeem their tokens: what a token
//! leaves behind is to be seen, and certificates stay on record by design. It prints what was
//! answered how often, and exits 1 if an answer was another than it had to be or the rate was not
//! held. With `--outage` a 503 is as good.

#![allow(clippy::indexing_slicing, reason = "a measurement that goes wrong may end with a panic")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::KeyPair;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tools::http::{self, Answer, Identity};
use tools::{Failure, quantile_ms};

/// Each drives one connection to every server, and has its share of the rate.
const CLIENTS: usize = 12;
/// Requests after which a connection is opened anew.
const PER_CONNECTION: usize = 100;
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Failures that are shown.
const SHOWN: usize = 20;
/// Turns in which each kind comes as often as the mix says.
const MIXED: usize = 400;
/// So many of them are this.
const MIX: &[(usize, Turn)] = &[
    (268, Client::onboard),
    (24, Client::onboard_twice),
    (12, Client::replace),
    (1, Client::enroll),
    (40, Client::look),
    (45, Client::be_refused),
    (10, Client::hang_up),
];

/// Requests that belong together; the number is the turn's own.
type Turn = fn(&mut Client, usize) -> Result<(), Failure>;

fn main() -> Result<ExitCode, Failure> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let outage = words.first().is_some_and(|word| word == "--outage");
    words.drain(..usize::from(outage));
    let [rate, seconds, ca, onboarding_key, admin_key, servers @ ..] = &words[..] else {
        return Err(
            "usage: soak [--outage] RATE SECONDS CA ONBOARDING_KEY ADMIN_KEY SERVER…".into()
        );
    };
    let load = Arc::new(Load {
        servers: servers.iter().map(|url| Server::new(url)).collect::<Result<_, _>>()?,
        roots: roots(ca)?,
        onboarding_key: onboarding_key.clone(),
        admin_key: admin_key.clone(),
        pause: Duration::from_secs_f64(CLIENTS as f64 / rate.parse::<f64>()?),
        begin: Instant::now(),
        length: Duration::from_secs(seconds.parse()?),
        outage,
        turns: AtomicUsize::new(0),
    });
    let seen = run(&load)?;
    seen.print(load.begin.elapsed());
    let wanted = rate.parse::<f64>()? * load.length.as_secs_f64();
    if (seen.times.len() as f64) < wanted * 0.98 {
        eprintln!("soak: the load was not held: {} of {wanted} requests", seen.times.len());
        return Ok(ExitCode::from(1));
    }
    Ok(ExitCode::from(u8::from(!seen.failures.is_empty())))
}

/// What all clients share.
struct Load {
    servers: Vec<Server>,
    roots: Arc<RootCertStore>,
    onboarding_key: String,
    admin_key: String,
    /// Between two requests of one client.
    pause: Duration,
    begin: Instant,
    length: Duration,
    outage: bool,
    turns: AtomicUsize,
}

struct Server {
    address: SocketAddr,
    tls: bool,
}

impl Server {
    fn new(url: &str) -> Result<Self, Failure> {
        let (scheme, address) = url.split_once("://").ok_or("a server is a URL")?;
        let address: SocketAddr = address.parse()?;
        if !address.ip().is_loopback() {
            return Err("only servers on loopback are loaded".into());
        }
        Ok(Server { address, tls: scheme == "https" })
    }
}

fn roots(ca: &str) -> Result<Arc<RootCertStore>, Failure> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca)?)?;
    Ok(Arc::new(roots))
}

/// Runs all clients until the time is over.
fn run(load: &Arc<Load>) -> Result<Seen, Failure> {
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let load = Arc::clone(load);
            thread::spawn(move || Client::new(load, number)?.run())
        })
        .collect();
    let mut all = Seen::default();
    for client in clients {
        all.add(client.join().map_err(|_| "a client panicked")??);
    }
    Ok(all)
}

/// What was answered.
#[derive(Default)]
struct Seen {
    answers: BTreeMap<(&'static str, String), usize>,
    times: Vec<Duration>,
    failures: Vec<String>,
}

impl Seen {
    fn add(&mut self, other: Seen) {
        for (answer, count) in other.answers {
            *self.answers.entry(answer).or_default() += count;
        }
        self.times.extend(other.times);
        self.failures.extend(other.failures);
    }

    fn print(&self, took: Duration) {
        let mut times = self.times.clone();
        times.sort_unstable();
        let at = |share| quantile_ms(&times, share);
        println!(
            "{} requests in {:.1} s, {:.0} a second; answered after p50 {:.1} ms, p99 {:.1} ms, \
             max {:.0} ms",
            times.len(),
            took.as_secs_f64(),
            times.len() as f64 / took.as_secs_f64(),
            at(0.5),
            at(0.99),
            at(1.0)
        );
        for ((what, answer), count) in &self.answers {
            println!("{count:>8}  {what}: {answer}");
        }
        for failure in self.failures.iter().take(SHOWN) {
            eprintln!("soak: {failure}");
        }
        if !self.failures.is_empty() {
            eprintln!("soak: {} answers were not as they had to be", self.failures.len());
        }
    }
}

/// One connection to each server.
struct Client {
    load: Arc<Load>,
    connections: Vec<Option<Connection>>,
    /// When the next request is due.
    due: Instant,
    key: KeyPair,
    seen: Seen,
}

impl Client {
    fn new(load: Arc<Load>, number: usize) -> Result<Self, Failure> {
        let due = load.begin + load.pause * number as u32 / CLIENTS as u32;
        let connections = load.servers.iter().map(|_| None).collect();
        Ok(Client { load, connections, due, key: KeyPair::generate()?, seen: Seen::default() })
    }

    fn run(mut self) -> Result<Seen, Failure> {
        let plan: Vec<Turn> = MIX.iter().flat_map(|(share, turn)| vec![*turn; *share]).collect();
        while self.due < self.load.begin + self.load.length {
            let n = self.load.turns.fetch_add(1, Ordering::Relaxed);
            // 37 and 400 have no common divisor: each kind comes evenly.
            let turn = plan[n * 37 % plan.len()];
            if let Err(failure) = turn(&mut self, n) {
                self.seen.failures.push(failure.to_string());
            }
        }
        Ok(self.seen)
    }

    fn onboard(&mut self, n: usize) -> Result<(), Failure> {
        self.token(n, self.home(n)).map(drop)
    }

    /// The first token may have ended: the shortest last a second.
    fn onboard_twice(&mut self, n: usize) -> Result<(), Failure> {
        let other = self.home(n + 1);
        self.token(n, self.home(n))?;
        let again = self.onboarding(n, false);
        self.ask("onboarding again", other, &again, &["409 TOKEN_ALREADY_ACTIVE", "200"]).map(drop)
    }

    fn replace(&mut self, n: usize) -> Result<(), Failure> {
        let other = self.home(n + 1);
        self.token(n, self.home(n))?;
        let again = self.onboarding(n, true);
        self.ask("replacing", other, &again, &["200"]).map(drop)
    }

    /// The whole way, the token from one server and all else of another: what is known of
    /// certificates is known there only.
    fn enroll(&mut self, n: usize) -> Result<(), Failure> {
        let home = self.home(n);
        let Some(token) = self.token(n, self.home(n + 1))? else { return Ok(()) };
        let bearer = format!("Authorization: Bearer {token}\r\n");
        let garbage = post("sign-csr", &bearer, &json!({"csr": "garbage"}));
        self.ask("garbage", home, &garbage, &["400 INVALID_CSR", "401 TOKEN_EXPIRED"])?;
        let csr = json!({ "csr": tools::csr(&name(n), &self.key)? });
        let signing = post("sign-csr", &bearer, &csr);
        let signed = self.ask("signing", home, &signing, &["200", "401 TOKEN_EXPIRED"])?;
        let Some(certificate) = signed["certificate"].as_str() else { return Ok(()) };
        let used = ["401 TOKEN_ALREADY_USED", "401 TOKEN_EXPIRED"];
        self.ask("signing again", home, &signing, &used)?;
        let path = format!("/api/v1/certificates/{}", name(n));
        self.ask("download", home, &get(&format!("{path}/download")), &["200"])?;
        if self.load.servers[home].tls {
            self.renew(home, certificate, &csr)?;
        }
        if (n / MIXED).is_multiple_of(10) {
            let bearer = format!("Authorization: Bearer {}\r\n", self.load.admin_key);
            let request = format!("DELETE {path} HTTP/1.1\r\nHost: localhost\r\n{bearer}\r\n");
            self.ask("revoking", home, &request, &["200"])?;
        }
        self.ask("status", home, &get(&format!("{path}/status")), &["200"]).map(drop)
    }

    fn renew(&mut self, at: usize, certificate: &str, csr: &Value) -> Result<(), Failure> {
        let chain =
            CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(self.key.serialize_pem().as_bytes())?;
        self.wait();
        let (server, roots) = (&self.load.servers[at], &self.load.roots);
        let mut connection = Connection::open(server, roots, Some((chain, key)))?;
        let answer = self.exchange("renewal", &mut connection, &post("renew", "", csr))?;
        self.judge("renewal", &answer, &["200"])
    }

    fn look(&mut self, n: usize) -> Result<(), Failure> {
        const PATHS: [&str; 6] =
            ["/health", "/ready", "/metrics", "/api", "/api/v1/ca", "/api/v1/crl"];
        let path = PATHS[n % PATHS.len()];
        self.ask(path, self.home(n), &get(path), &["200"]).map(drop)
    }

    /// What is refused, some of it with the connection.
    fn be_refused(&mut self, n: usize) -> Result<(), Failure> {
        const JSON: &str = "Content-Type: application/json\r\n";
        let head = "POST /api/v1/onboarding HTTP/1.1\r\nHost: localhost\r\n".to_owned();
        let fields = self.fields(n);
        let forged = "Authorization: Bearer e30.e30.e30\r\n";
        let (request, answer) = match n % 10 {
            0 => (head + "no field\r\n\r\n", "400 BAD_REQUEST"),
            1 => (head + &fields + JSON + "Content-Length: 2\r\n\r\n{]", "400 INVALID_JSON"),
            2 => (head + JSON + "Content-Length: 65537\r\n\r\n", "413 BODY_TOO_LARGE"),
            3 => (
                post("onboarding", &address(n), &json!({"device_id": "a"})),
                "401 API_KEY_REQUIRED",
            ),
            4 => (post("sign-csr", forged, &json!({"csr": "a"})), "401 TOKEN_INVALID_SIGNATURE"),
            5 => (get("/api/v1/onboarding"), "405 METHOD_NOT_ALLOWED"),
            6 => (get("/api/v2/onboarding"), "404 NOT_FOUND"),
            7 => (get("/api/v1/certificates/nobody/status"), "404 CERTIFICATE_NOT_FOUND"),
            8 => (post("renew", "", &json!({"csr": "a"})), "401 CLIENT_CERTIFICATE_REQUIRED"),
            _ => (head + &fields + "Content-Length: 2\r\n\r\n{}", "415 UNSUPPORTED_MEDIA_TYPE"),
        };
        self.ask("refused", self.home(n), &request, &[answer]).map(drop)
    }

    /// Half a request on a connection of its own, which then ends.
    fn hang_up(&mut self, n: usize) -> Result<(), Failure> {
        self.wait();
        let server = &self.load.servers[self.home(n)];
        let mut stream = TcpStream::connect(server.address)?;
        stream.write_all(b"POST /api/v1/onboarding HTTP/1.1\r\nHost: localhost\r\nX-Half: ")?;
        self.seen.times.push(Duration::ZERO);
        *self.seen.answers.entry(("half a request", "none".to_owned())).or_default() += 1;
        Ok(())
    }

    /// Onboards the turn's device; no token is in the answer of an outage.
    fn token(&mut self, n: usize, at: usize) -> Result<Option<String>, Failure> {
        let answer = self.ask("onboarding", at, &self.onboarding(n, false), &["200"])?;
        Ok(answer["provisioning_token"].as_str().map(str::to_owned))
    }

    fn onboarding(&self, n: usize, replace: bool) -> String {
        let mut body = json!({ "device_id": name(n) });
        if replace {
            body["replace"] = true.into();
        }
        post("onboarding", &self.fields(n), &body)
    }

    /// What an onboarding of the turn is sent with.
    fn fields(&self, n: usize) -> String {
        format!("Authorization: Bearer {}\r\n{}", self.load.onboarding_key, address(n))
    }

    /// The server of the turn; the rounds, in which the mix repeats, are spread too.
    fn home(&self, n: usize) -> usize {
        (n + n / MIXED) % self.load.servers.len()
    }

    /// Asks over the kept connection, when it is time, and gives the JSON of the answer, if it is any.
    fn ask(
        &mut self,
        what: &'static str,
        at: usize,
        request: &str,
        allowed: &[&str],
    ) -> Result<Value, Failure> {
        self.wait();
        let mut connection = match self.connections[at].take() {
            Some(connection) if connection.used < PER_CONNECTION => connection,
            _ => Connection::open(&self.load.servers[at], &self.load.roots, None)?,
        };
        let answer = self.exchange(what, &mut connection, request)?;
        if !answer.closes() {
            self.connections[at] = Some(connection);
        }
        self.judge(what, &answer, allowed)?;
        Ok(serde_json::from_str(&answer.body).unwrap_or_default())
    }

    fn exchange(
        &mut self,
        what: &str,
        connection: &mut Connection,
        request: &str,
    ) -> Result<Answer, Failure> {
        let began = Instant::now();
        let answer = connection.exchange(request).map_err(|e| format!("{what}: {e}"))?;
        self.seen.times.push(began.elapsed());
        Ok(answer)
    }

    fn judge(
        &mut self,
        what: &'static str,
        answer: &Answer,
        allowed: &[&str],
    ) -> Result<(), Failure> {
        let code = answer.field("X-Error-Code").unwrap_or_default();
        let said = format!("{} {code}", answer.status);
        let said = said.trim();
        *self.seen.answers.entry((what, said.to_owned())).or_default() += 1;
        let is_fine = allowed.contains(&said) || (self.load.outage && answer.status == 503);
        if is_fine { Ok(()) } else { Err(format!("{what}: {said}: {}", answer.body).into()) }
    }

    fn wait(&mut self) {
        thread::sleep(self.due.saturating_duration_since(Instant::now()));
        self.due += self.load.pause;
    }
}

fn name(n: usize) -> String {
    format!("soak-{n}")
}

/// Each turn has a client address of its own.
fn address(n: usize) -> String {
    let [.., b, c, d] = n.to_be_bytes();
    format!("X-Forwarded-For: 10.{b}.{c}.{d}\r\n")
}

fn get(path: &str) -> String {
    http::get(path, "")
}

fn post(endpoint: &str, fields: &str, body: &Value) -> String {
    http::post(&format!("/api/v1/{endpoint}"), fields, &body.to_string())
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

struct Connection {
    http: http::Connection<Box<dyn Stream>>,
    used: usize,
}

impl Connection {
    fn open(
        server: &Server,
        roots: &Arc<RootCertStore>,
        identity: Option<Identity>,
    ) -> Result<Self, Failure> {
        let stream = TcpStream::connect(server.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        if !server.tls {
            return Ok(Connection::over(Box::new(stream)));
        }
        let name = server.address.ip().to_string();
        Ok(Connection::over(Box::new(http::tls(stream, &name, Arc::clone(roots), identity)?)))
    }

    fn over(stream: Box<dyn Stream>) -> Self {
        Connection { http: http::Connection::over(stream), used: 0 }
    }

    fn exchange(&mut self, request: &str) -> Result<Answer, Failure> {
        self.used += 1;
        self.http.exchange(request)
    }
}
