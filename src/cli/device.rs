//! `device …`: what the admin endpoints do, asked of the service on this machine or of another.
//!
//! The key comes from the environment or a file, never from the arguments, which every process of the
//! machine can read.

use std::fmt;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, Stream};
use serde_json::{Map, Value, json};

use super::args::{Action, Device};
use super::healthcheck::{reachable, tls_session};
use super::{BAD_CONFIG, Given, fail, print, read_file};
use crate::config::{AdminKey, Http, Secret, certificates};
use crate::device::DeviceId;
use crate::socket::{TimedSocket, deadline_in};

/// How long one request may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// The largest answer: a page of the list is a quarter of it.
const MAX_ANSWER_BYTES: u64 = 4 << 20;
/// Devices on one page of the list.
const PAGE: usize = 1_000;

/// Why it was not done.
#[derive(Debug)]
enum DeviceError {
    /// It was asked for wrongly.
    Usage(String),
    /// The server was not reached, or is not the right one.
    Server(String),
    /// The server refuses.
    Refused(String),
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::Usage(why) | DeviceError::Server(why) | DeviceError::Refused(why) => {
                f.write_str(why)
            }
        }
    }
}

impl std::error::Error for DeviceError {}

pub(super) fn run(given: &Given, request: &Device) -> ExitCode {
    match Server::new(given, request).and_then(|server| act(&server, request)) {
        Ok(text) => print(&text),
        Err(error @ DeviceError::Usage(_)) => fail(BAD_CONFIG, error),
        Err(error) => fail(super::FAILED, error),
    }
}

/// Does it, and gives what is to be printed.
fn act(server: &Server, request: &Device) -> Result<String, DeviceError> {
    for id in &request.ids {
        let invalid = || DeviceError::Usage(format!("{id:?} is no device id"));
        DeviceId::parse(id).ok_or_else(invalid)?;
    }
    match request.action {
        Action::Add => add(server, request),
        Action::List => list(server, request),
        Action::Show => each(request, |id| server.ask("GET", &format!("/devices/{id}"), None)),
        Action::Block => each(request, |id| server.put(id, json!({"blocked": true}))),
        Action::Unblock => each(request, |id| server.put(id, json!({"blocked": false}))),
        Action::Remove => each(request, |id| server.ask("DELETE", &format!("/devices/{id}"), None)),
        Action::Revoke => each(request, |id| {
            let query = if request.block { "?block=true" } else { "" };
            server.ask("DELETE", &format!("/certificates/{id}{query}"), None)
        }),
    }
}

fn add(server: &Server, request: &Device) -> Result<String, DeviceError> {
    let device = |id: &String| {
        let mut fields = Map::new();
        fields.insert("device_id".to_owned(), json!(id));
        fields.insert("secret".to_owned(), json!(true));
        let numbers = [
            ("expires_in", request.expires_days.map(|days| days.saturating_mul(86_400))),
            ("cert_days", request.cert_days),
        ];
        for (name, value) in numbers {
            fields.extend(value.map(|value| (name.to_owned(), json!(value))));
        }
        fields.extend(request.note.as_ref().map(|note| ("note".to_owned(), json!(note))));
        Value::Object(fields)
    };
    let body: Value = request.ids.iter().map(device).collect();
    if request.csv {
        return Ok(server.answer("POST", "/devices", Some(body), "text/csv")?.body);
    }
    let answer = server.ask("POST", "/devices", Some(body))?;
    let mut text = String::new();
    for device in answer.get("devices").and_then(Value::as_array).into_iter().flatten() {
        let of = |name| text_of(device, name);
        let (id, end) = (of("device_id"), of("enrolment_expires_at"));
        text += &match of("enrolment_secret") {
            "" => format!("{id}  has a registration already, until {end}\n"),
            secret => format!("{id}  {secret}  until {end}\n"),
        };
    }
    Ok(text + not_shared(&answer))
}

/// All pages of the list as one.
fn list(server: &Server, request: &Device) -> Result<String, DeviceError> {
    let mut query = format!("/devices?limit={PAGE}");
    for (name, value) in [("state", &request.state), ("expires_within", &request.expires_within)] {
        if let Some(value) = value {
            let plain = value.bytes().all(|b| b.is_ascii_alphanumeric());
            let wrong = || DeviceError::Usage(format!("{value:?} is no value of {name}"));
            query += &format!("&{name}={}", plain.then_some(value).ok_or_else(wrong)?);
        }
    }
    let mut table = String::new();
    let mut after = String::new();
    loop {
        let page = server.answer("GET", &format!("{query}&after={after}"), None, "text/csv")?;
        let rows = if table.is_empty() {
            Some(&*page.body)
        } else {
            page.body.split_once('\n').map(|(_, rows)| rows)
        };
        table += rows.unwrap_or_default();
        match page.next {
            Some(next) => after = next,
            None => break,
        }
    }
    Ok(if request.csv { table } else { columns(&table) })
}

/// A table for people: its first columns, one below the other.
fn columns(table: &str) -> String {
    const SHOWN: [usize; 4] = [0, 1, 2, 7];
    let rows = table.lines().map(|line| {
        let cells: Vec<&str> = line.split(',').collect();
        // A note may hold commas, so what stands behind it is counted from the end.
        let end = cells.len().saturating_sub(1);
        SHOWN.map(|n| cells.get(if n == 7 { end } else { n }).copied().unwrap_or_default())
    });
    let rows: Vec<[&str; 4]> = rows.collect();
    let width = |n: usize| rows.iter().filter_map(|row| row.get(n)).map(|c| c.len()).max();
    let widths = [0, 1, 2].map(|n| width(n).unwrap_or(0));
    let line = |[a, b, c, d]: &[&str; 4]| {
        let [wa, wb, wc] = widths;
        format!("{a:wa$}  {b:wb$}  {c:wc$}  {d}").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// The same for each device; what was done before a failure stays done, and is printed.
fn each(
    request: &Device,
    ask: impl Fn(&str) -> Result<Value, DeviceError>,
) -> Result<String, DeviceError> {
    let mut text = String::new();
    for id in &request.ids {
        match ask(id) {
            Ok(answer) => text += &(shown(&answer) + not_shared(&answer)),
            Err(error) => {
                print(&text);
                return Err(error);
            }
        }
    }
    Ok(text)
}

/// The fields of an answer, a line each.
fn shown(answer: &Value) -> String {
    let mut text = String::new();
    for (name, value) in answer.as_object().into_iter().flatten() {
        match value {
            _ if ["success", "timestamp", "shared", "message"].contains(&name.as_str()) => {}
            Value::String(value) => text += &format!("{name}: {value}\n"),
            Value::Array(certificates) => {
                for certificate in certificates {
                    let of = |name| text_of(certificate, name);
                    let (serial, status) = (of("serial_number"), of("status"));
                    text +=
                        &format!("certificate: {serial} {status}, until {}\n", of("expires_at"));
                }
            }
            other => text += &format!("{name}: {other}\n"),
        }
    }
    text
}

fn not_shared(answer: &Value) -> &'static str {
    match answer.get("shared").and_then(Value::as_bool) {
        Some(false) => "Redis is away: other instances know of it when it is back\n",
        _ => "",
    }
}

/// A text field; empty if there is none.
fn text_of<'v>(value: &'v Value, name: &str) -> &'v str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// An answer of the server.
struct Answer {
    body: String,
    /// What the next page is asked for with.
    next: Option<String>,
}

/// Who is asked.
struct Server {
    address: SocketAddr,
    host: String,
    tls: Option<Tls>,
    key: Secret,
}

enum Tls {
    /// Our own certificate, and none else.
    Own(Http),
    /// By this CA.
    Ca(Arc<ClientConfig>),
}

impl Server {
    fn new(given: &Given, request: &Device) -> Result<Self, DeviceError> {
        let usage = |why: &dyn fmt::Display| DeviceError::Usage(why.to_string());
        let environment = given.environment().map_err(|e| usage(&e))?;
        let key = AdminKey::from_lookup(|name| environment.get(name), read_file);
        let key = key.map_err(|e| usage(&e))?;
        let key = key.ok_or_else(|| usage(&"ADMIN_API_KEY or ADMIN_API_KEY_FILE must be set"))?;
        if let Some(url) = &request.url {
            return Server::elsewhere(url, request.ca.as_deref(), key);
        }
        let http = Http::from_lookup(|name| environment.get(name)).map_err(|e| usage(&e))?;
        let address = SocketAddr::new(reachable(http.host), http.port);
        let tls = match (&request.ca, http.tls.is_some()) {
            (_, false) => None,
            (Some(ca), true) => Some(Tls::Ca(trusting(ca)?)),
            (None, true) => Some(Tls::Own(http)),
        };
        if tls.is_none() && !address.ip().is_loopback() {
            return Err(plain_http());
        }
        Ok(Server { address, host: address.ip().to_string(), tls, key })
    }

    /// The server at `http://…` or `https://…`.
    fn elsewhere(url: &str, ca: Option<&Path>, key: Secret) -> Result<Self, DeviceError> {
        let wrong = || DeviceError::Usage("--url must be https://host[:port]".to_owned());
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| wrong())?)
            }
            _ => (authority, if scheme == "https" { 443 } else { 80 }),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = match (scheme, ca) {
            ("http", _) => None,
            ("https", Some(ca)) => Some(Tls::Ca(trusting(ca)?)),
            ("https", None) => {
                let why = "--url https://… needs --ca FILE, the CA of that server's certificate";
                return Err(DeviceError::Usage(why.to_owned()));
            }
            _ => return Err(wrong()),
        };
        let not_found = |why: &dyn fmt::Display| DeviceError::Server(format!("{host}: {why}"));
        let mut found = (host.as_str(), port).to_socket_addrs().map_err(|e| not_found(&e))?;
        let address = found.next().ok_or_else(|| not_found(&"no such host"))?;
        if tls.is_none() && !address.ip().is_loopback() {
            return Err(plain_http());
        }
        Ok(Server { address, host, tls, key })
    }

    fn put(&self, id: &str, body: Value) -> Result<Value, DeviceError> {
        self.ask("PUT", &format!("/devices/{id}"), Some(body))
    }

    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value, DeviceError> {
        let answer = self.answer(method, path, body, "application/json")?;
        serde_json::from_str(&answer.body)
            .map_err(|_| DeviceError::Server(format!("{} answers no JSON", self.address)))
    }

    fn answer(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
        accept: &str,
    ) -> Result<Answer, DeviceError> {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let request = format!(
            "{method} /api/v1{path} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\n\
             Accept: {accept}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            self.address,
            self.key.reveal(),
            body.len()
        );
        let (head, body) = self.exchange(request.as_bytes())?;
        let status = head.split(' ').nth(1).unwrap_or_default();
        if status != "200" {
            let error: Value = serde_json::from_str(&body).unwrap_or_default();
            let (text, code) = (text_of(&error, "error"), text_of(&error, "code"));
            return Err(DeviceError::Refused(match code {
                "" => format!("{} answers {status}, and nothing of ours", self.address),
                code => format!("{text} ({code})"),
            }));
        }
        let next = |line: &str| Some(line.strip_prefix("X-Next: ")?.trim().to_owned());
        Ok(Answer { body, next: head.lines().find_map(next) })
    }

    fn exchange(&self, request: &[u8]) -> Result<(String, String), DeviceError> {
        let failed = |e: &dyn fmt::Display| DeviceError::Server(format!("{}: {e}", self.address));
        let socket = TimedSocket::connect(&self.address.into(), deadline_in(DEADLINE));
        let mut socket = socket.map_err(|e| failed(&e))?;
        let session = match &self.tls {
            None => None,
            Some(Tls::Own(http)) => match &http.tls {
                Some(own) => {
                    Some(tls_session(&own.cert, self.address.ip()).map_err(|e| failed(&e))?)
                }
                None => None,
            },
            Some(Tls::Ca(config)) => {
                let name = ServerName::try_from(self.host.clone()).map_err(|e| failed(&e))?;
                let session = ClientConnection::new(Arc::clone(config), name);
                Some(session.map_err(|e| failed(&e))?)
            }
        };
        let answer = match session {
            Some(mut session) => talk(&mut Stream::new(&mut session, &mut socket), request),
            None => talk(&mut socket, request),
        };
        answer.map_err(|e| failed(&e))
    }
}

fn plain_http() -> DeviceError {
    let why = "plain HTTP off loopback would show the key to the network: use https:// and --ca";
    DeviceError::Usage(why.to_owned())
}

fn trusting(ca: &Path) -> Result<Arc<ClientConfig>, DeviceError> {
    let failed =
        |why: &dyn fmt::Display| DeviceError::Usage(format!("--ca {}: {why}", ca.display()));
    let pem = read_file(ca).map_err(|e| failed(&e))?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&pem).map_err(|e| failed(&e))? {
        roots.add(certificate).map_err(|e| failed(&e))?;
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| failed(&e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Sends the request; gives the head and the body of the answer.
fn talk(stream: &mut (impl Read + Write), request: &[u8]) -> io::Result<(String, String)> {
    stream.write_all(request)?;
    stream.flush()?;
    let mut reader = BufReader::new(stream.take(MAX_ANSWER_BYTES));
    let mut head = String::new();
    while reader.read_line(&mut head)? > 2 {}
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    let mut body =
        vec![0; usize::try_from(length.unwrap_or(0_u64).min(MAX_ANSWER_BYTES)).unwrap_or(0)];
    reader.read_exact(&mut body)?;
    Ok((head, String::from_utf8_lossy(&body).into_owned()))
}
