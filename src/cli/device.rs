//! `device …`: what the admin endpoints do, asked of the service on this machine or of another.
//!
//! The key comes from the environment or a file, never from the arguments, which every process of the
//! machine can read.

use std::fmt;
use std::net::ToSocketAddrs as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rustls::pki_types::ServerName;
use serde_json::{Value, json};

use super::args::{Action, Device};
use super::client::{Client, ClientError, by_ca, field};
use super::{BAD_CONFIG, Given, fail, print, read_file};
use crate::config::{AdminKey, Http, Secret};
use crate::device::DeviceId;

/// How long one request may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// Devices on one page of the list.
const PAGE: usize = 1_000;

/// Why it was not done.
#[derive(Debug)]
enum DeviceError {
    /// It was asked for wrongly.
    Usage(String),
    /// The server was not reached, is not the right one, or refuses.
    Server(String),
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::Usage(why) | DeviceError::Server(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for DeviceError {}

impl From<ClientError> for DeviceError {
    fn from(error: ClientError) -> Self {
        DeviceError::Server(error.to_string())
    }
}

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
    let expires_in = request.expires_days.map(|days| days.saturating_mul(86_400));
    let device = |id: &String| {
        json!({
            "device_id": id,
            "secret": true,
            "expires_in": expires_in,
            "cert_days": request.cert_days,
            "note": request.note,
        })
    };
    let body: Value = request.ids.iter().map(device).collect();
    if request.csv {
        return Ok(server.answer("POST", "/devices", Some(body), "text/csv")?.1);
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
        let path = format!("{query}&after={after}");
        let (head, page) = server.answer("GET", &path, None, "text/csv")?;
        let rows = page.split_once('\n').map_or("", |(_, rows)| rows);
        table += if table.is_empty() { &page } else { rows };
        match field(&head, "X-Next") {
            Some(next) => after = next.to_owned(),
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
            _ if ["success", "timestamp", "shared"].contains(&name.as_str()) => {}
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

/// The service, and the key that it asks for.
struct Server {
    client: Client,
    key: Secret,
}

impl Server {
    fn new(given: &Given, request: &Device) -> Result<Self, DeviceError> {
        let usage = |why: &dyn fmt::Display| DeviceError::Usage(why.to_string());
        let environment = given.environment().map_err(|e| usage(&e))?;
        let key = AdminKey::from_lookup(|name| environment.get(name), read_file);
        let key = key.map_err(|e| usage(&e))?;
        let key = key.ok_or_else(|| usage(&"ADMIN_API_KEY or ADMIN_API_KEY_FILE must be set"))?;
        let ca = request.ca.as_deref();
        let client = match &request.url {
            Some(url) => elsewhere(url, ca)?,
            None => {
                let http = Http::from_lookup(|name| environment.get(name));
                Client::local(&http.map_err(|e| usage(&e))?, ca, DEADLINE)?
            }
        };
        if client.tls.is_none() && !client.address.ip().is_loopback() {
            return Err(usage(
                &"plain HTTP off loopback would show the key to the network: use https:// and --ca",
            ));
        }
        Ok(Server { client, key })
    }

    fn put(&self, id: &str, body: Value) -> Result<Value, DeviceError> {
        self.ask("PUT", &format!("/devices/{id}"), Some(body))
    }

    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value, DeviceError> {
        let (_, body) = self.answer(method, path, body, "application/json")?;
        serde_json::from_str(&body)
            .map_err(|_| DeviceError::Server(format!("{} answers no JSON", self.client.address)))
    }

    /// The head and the body of a good answer.
    fn answer(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
        accept: &str,
    ) -> Result<(String, String), DeviceError> {
        let address = self.client.address;
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let (head, body) = self.client.exchange(&format!(
            "{method} /api/v1{path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {}\r\n\
             Accept: {accept}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            self.key.reveal(),
            body.len()
        ))?;
        let status = head.split(' ').nth(1).unwrap_or_default();
        if status == "200" {
            return Ok((head, body));
        }
        let error: Value = serde_json::from_str(&body).unwrap_or_default();
        let (text, code) = (text_of(&error, "error"), text_of(&error, "code"));
        Err(DeviceError::Server(match code {
            "" => format!("{address} answers {status}, and nothing of ours"),
            code => format!("{text} ({code})"),
        }))
    }
}

/// The server at `http://…` or `https://…`.
fn elsewhere(url: &str, ca: Option<&Path>) -> Result<Client, DeviceError> {
    let wrong = || DeviceError::Usage("--url must be https://host[:port]".to_owned());
    let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| wrong())?),
        _ => (authority, if scheme == "https" { 443 } else { 80 }),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let not_found = |why: &dyn fmt::Display| DeviceError::Server(format!("{host}: {why}"));
    let tls = match (scheme, ca) {
        ("http", _) => None,
        ("https", Some(ca)) => {
            let name = ServerName::try_from(host.clone()).map_err(|e| not_found(&e))?;
            Some((by_ca(ca).map_err(|e| DeviceError::Usage(format!("--ca {e}")))?, name))
        }
        ("https", None) => {
            let why = "--url https://… needs --ca FILE, the CA of that server's certificate";
            return Err(DeviceError::Usage(why.to_owned()));
        }
        _ => return Err(wrong()),
    };
    let mut found = (host.as_str(), port).to_socket_addrs().map_err(|e| not_found(&e))?;
    let address = found.next().ok_or_else(|| not_found(&"no such host"))?;
    Ok(Client { address, tls, deadline: DEADLINE })
}
