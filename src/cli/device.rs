//! `device …`: what the admin endpoints do, asked of the service on this machine or of another.
//!
//! The key comes from the environment or a file, never from the arguments, which every process of the
//! machine can read.

use std::fmt;
use std::net::ToSocketAddrs as _;
use std::path::Path;
use std::time::Duration;

use rustls::pki_types::ServerName;
use serde_json::{Value, json};

use super::args::{Device, MAX_DAYS, Options};
use super::client::{Client, by_ca, field};
use super::{Failure, Given, failed, print, read_file, usage};
use crate::clock::DAY_S;
use crate::config::{AdminKey, Http, Secret};
use crate::device::DeviceId;
use crate::devices::LONGEST_REGISTRATION_S;

/// How long one request may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// Devices on one page of the list.
const PAGE: usize = 1_000;

/// Does it, and gives what is to be printed.
pub(super) fn run(given: &Given, request: &Device) -> Result<String, Failure> {
    let server = &Server::new(given, request)?;
    let (ids, options) = (&request.options.rest, &request.options);
    for id in ids {
        let invalid = || usage(format!("{id:?} is no device id"));
        DeviceId::parse(id).ok_or_else(invalid)?;
    }
    let path = |id: &str| format!("/devices/{id}");
    let block = |blocked: bool| {
        each(ids, |id| server.ask("PUT", &path(id), Some(json!({"blocked": blocked}))))
    };
    match request.action {
        "add" => add(server, options),
        "list" => list(server, options),
        "show" => each(ids, |id| server.ask("GET", &path(id), None)),
        "block" => block(true),
        "unblock" => block(false),
        "remove" => each(ids, |id| server.ask("DELETE", &path(id), None)),
        "revoke" => each(ids, |id| {
            let query = if options.has("--block") { "?block=true" } else { "" };
            server.ask("DELETE", &format!("/certificates/{id}{query}"), None)
        }),
        other => Err(usage(format!("device {other} is not known"))),
    }
}

fn add(server: &Server, options: &Options) -> Result<String, Failure> {
    let expires = options.days("--expires", (LONGEST_REGISTRATION_S / DAY_S) as u32)?;
    let cert_days = options.days("--days", MAX_DAYS)?;
    let expires_in = expires.map(|days| u64::from(days) * DAY_S);
    let device = |id: &String| {
        json!({
            "device_id": id,
            "secret": true,
            "expires_in": expires_in,
            "cert_days": cert_days,
            "note": options.text("--note"),
        })
    };
    let body: Value = options.rest.iter().map(device).collect();
    if options.has("--csv") {
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
fn list(server: &Server, options: &Options) -> Result<String, Failure> {
    let mut query = format!("/devices?limit={PAGE}");
    for (name, option) in [("state", "--state"), ("expires_within", "--expires-within")] {
        if let Some(value) = options.text(option) {
            let plain = value.bytes().all(|b| b.is_ascii_alphanumeric());
            let wrong = || usage(format!("{value:?} is no value of {name}"));
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
    Ok(if options.has("--csv") { table } else { columns(&table) })
}

/// A table for people: its first columns, one below the other.
fn columns(table: &str) -> String {
    const SHOWN: [usize; 4] = [0, 1, 2, 7];
    let rows = table.lines().map(|line| {
        let cells: Vec<&str> = line.split(',').collect();
        // A note may hold commas, so what stands behind it is counted from the end.
        let end = cells.len().saturating_sub(1);
        let cell = |n| cells.get(if n == 7 { end } else { n }).copied().unwrap_or_default();
        // The table has an apostrophe before an id that a spreadsheet would run.
        SHOWN.map(|n| cell(n).trim_start_matches('\''))
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

/// The same for each device; what was done before a failure stays done, and is printed. The failure names
/// its device, from which on nothing is done.
fn each(ids: &[String], ask: impl Fn(&str) -> Result<Value, Failure>) -> Result<String, Failure> {
    let mut text = String::new();
    for id in ids {
        match ask(id) {
            Ok(answer) => text += &(shown(&answer) + not_shared(&answer)),
            Err(Failure(code, why)) => {
                print(&text)?;
                return Err(Failure(code, format!("{id}: {why}")));
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
        Some(false) => "Redis could not be told yet: other instances know of it when it is\n",
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
    fn new(given: &Given, request: &Device) -> Result<Self, Failure> {
        let environment = given.environment().map_err(usage)?;
        let key = AdminKey::from_lookup(|name| environment.get(name), read_file);
        let key = key.map_err(usage)?;
        let key = key.ok_or_else(|| usage("ADMIN_API_KEY or ADMIN_API_KEY_FILE must be set"))?;
        let ca = request.options.text("--ca").map(Path::new);
        let client = match request.options.text("--url") {
            Some(url) => elsewhere(url, ca)?,
            None => {
                let http = Http::from_lookup(|name| environment.get(name));
                Client::local(&http.map_err(usage)?, ca, DEADLINE)?
            }
        };
        if client.tls.is_none() && !client.address.ip().is_loopback() {
            return Err(usage(
                "plain HTTP off loopback would show the key to the network: use https:// and --ca",
            ));
        }
        Ok(Server { client, key })
    }

    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value, Failure> {
        let (_, body) = self.answer(method, path, body, "application/json")?;
        serde_json::from_str(&body)
            .map_err(|_| failed(format!("{} answers no JSON", self.client.address)))
    }

    /// The head and the body of a good answer.
    fn answer(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
        accept: &str,
    ) -> Result<(String, String), Failure> {
        let address = self.client.address;
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let exchanged = self.client.exchange(&format!(
            "{method} /api/v1{path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {}\r\n\
             Accept: {accept}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            self.key.reveal(),
            body.len()
        ));
        let (head, body) = exchanged?;
        let status = head.split(' ').nth(1).unwrap_or_default();
        if status == "200" {
            return Ok((head, body));
        }
        let error: Value = serde_json::from_str(&body).unwrap_or_default();
        let (text, code) = (text_of(&error, "error"), text_of(&error, "code"));
        Err(failed(match code {
            "" => format!("{address} answers {status}, and nothing of ours"),
            code => format!("{text} ({code})"),
        }))
    }
}

/// The server at `http://…` or `https://…`.
fn elsewhere(url: &str, ca: Option<&Path>) -> Result<Client, Failure> {
    let wrong = || usage("--url must be https://host[:port]");
    let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| wrong())?),
        _ => (authority, if scheme == "https" { 443 } else { 80 }),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let not_found = |why: &dyn fmt::Display| failed(format!("{host}: {why}"));
    let tls = match (scheme, ca) {
        ("http", _) => None,
        ("https", Some(ca)) => {
            let name = ServerName::try_from(host.clone()).map_err(|e| not_found(&e))?;
            Some((by_ca(ca).map_err(|Failure(_, why)| usage(format!("--ca {why}")))?, name))
        }
        ("https", None) => {
            let why = "--url https://… needs --ca FILE, the CA of that server's certificate";
            return Err(usage(why));
        }
        _ => return Err(wrong()),
    };
    let mut found = (host.as_str(), port).to_socket_addrs().map_err(|e| not_found(&e))?;
    let address = found.next().ok_or_else(|| not_found(&"no such host"))?;
    Ok(Client { address, tls, deadline: DEADLINE })
}
