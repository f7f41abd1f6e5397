//! `/api/v1/devices`: who may enrol, who is blocked, and what there is.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::certificates::device as device_of;
use super::csv::{self, CSV};
use super::request::{bad_value as bad, optional};
use super::{Api, Asked, Plan};
use crate::ca::record::Certificate;
use crate::clock::{self, DAY_S, Now};
use crate::device::DeviceId;
use crate::devices::enrol::{Edit, Stage};
use crate::devices::secret::NewSecret;
use crate::devices::table::ROWS_LOOKED_AT;
use crate::devices::{LONGEST_REGISTRATION_S, Row, SecretHash, Text};
use crate::http::{Json, Reply};
use crate::json;
use crate::problem::{Code, Problem};
use crate::provisioner::{Change, Changed, Done, Job};

/// The fields of a device in a `PUT`.
pub(super) const FIELDS: &[&str] =
    &["register", "secret", "expires_in", "cert_days", "note", "blocked"];
/// The columns of a table of devices to be registered.
const COLUMNS: &[&str] =
    &["device_id", "secret", "secret_sha256", "expires_in", "cert_days", "note"];
/// The longest lifetime of a certificate, in days.
const MOST_CERT_DAYS: u64 = 36_500;
/// The most devices of one page.
const LARGEST_PAGE: u64 = 1_000;

/// `PUT /api/v1/devices/{id}`
pub(super) fn change(_: &Api, asked: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    let device = device_of(asked.name).ok_or(Code::DeviceIdInvalid)?;
    let register = flag(&asked.body, "register")?.unwrap_or(false);
    let changed = changed(device, &asked.body, register, false)?;
    let job = Job::rewrite(vec![changed], asked.by());
    Ok(Plan::Job(job, render_changed))
}

/// `DELETE /api/v1/devices/{id}`
pub(super) fn forget(_: &Api, asked: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    let device = device_of(asked.name).ok_or(Code::DeviceNotFound)?;
    let changed = Changed::new(device, Change::Forget, None);
    let job = Job::rewrite(vec![changed], asked.by());
    Ok(Plan::Job(job, render_forgotten))
}

fn render_changed(api: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let (changed, shared) = the_only(done)?;
    let json = write(Json::success(), &registration(api, &changed, now)).field("shared", shared);
    Ok(Reply::json(json.timestamp(now)))
}

fn render_forgotten(api: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let (Changed { device, row, .. }, shared) = the_only(done)?;
    let newest = api.provisioner.ca().record().newest(&device);
    let [id, state, ..] = described(&device, &row, newest.as_ref(), now);
    let json = write(Json::success(), &[id, state]).field("shared", shared);
    Ok(Reply::json(json.timestamp(now)))
}

fn the_only(done: Done) -> Result<(Changed, bool), Problem> {
    let Done::Rewritten { changes, shared } = done else { return Err(Code::InternalError.into()) };
    let changed = changes.into_iter().next().ok_or(Code::InternalError)?;
    Ok((changed, shared))
}

/// `POST /api/v1/devices`: all that the table names are registered, or none.
pub(super) fn register(_: &Api, asked: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    let request = asked.request;
    let replace = request.flag("replace")?;
    let entries = match request.media_type().as_str() {
        CSV => read_table(&request.body)?,
        "application/json" => read_list(&request.body)?,
        _ => {
            let text = "Content-Type must be application/json or text/csv";
            return Err(Problem::from(Code::UnsupportedMediaType).text(text));
        }
    };
    let mut changes: Vec<Changed> = Vec::new();
    for (place, fields) in entries {
        let at = |problem: Problem| {
            let text = format!("{place}: {}", problem.message());
            problem.text(text)
        };
        let id = fields.get("device_id").and_then(Value::as_str).unwrap_or_default();
        let device = DeviceId::parse(id.trim()).ok_or_else(|| at(Code::DeviceIdInvalid.into()))?;
        changes.push(changed(device, &fields, true, !replace).map_err(at)?);
    }
    let mut ids: Vec<&str> = changes.iter().map(|change| change.device.as_str()).collect();
    ids.sort_unstable();
    if let Some((id, _)) = ids.iter().zip(ids.iter().skip(1)).find(|(a, b)| a == b) {
        return Err(bad(format!("{id} stands twice")));
    }
    let job = Job::rewrite(changes, asked.by());
    let as_table = request.accepts(CSV)
        || (request.media_type() == CSV && !request.accepts("application/json"));
    Ok(Plan::Job(job, if as_table { render_table } else { render_list }))
}

fn render_list(api: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let Done::Rewritten { changes, shared } = done else { return Err(Code::InternalError.into()) };
    let entry = |changed| write(Json::new(), &entry(api, changed, now));
    let json = Json::success().array("devices", changes.iter().map(entry)).field("shared", shared);
    Ok(Reply::json(json.timestamp(now)))
}

fn render_table(api: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let Done::Rewritten { changes, shared } = done else { return Err(Code::InternalError.into()) };
    let shared = ("shared", Some(shared.to_string()));
    let line = |changed| [entry(api, changed, now), vec![shared.clone()]].concat();
    let head = "device_id,state,enrolment,enrolment_secret,enrolment_expires_at,result,shared";
    Ok(table(head, changes.iter().map(line)))
}

/// Names and values: the fields of an object, or cells of a table. What is not there is left out of the
/// one, and empty in the other.
type Cell = (&'static str, Option<String>);

fn write(json: Json, cells: &[Cell]) -> Json {
    cells.iter().fold(json, |json, (name, value)| json.some(name, value.as_deref()))
}

/// A table with these columns, as a file.
fn table(head: &str, lines: impl Iterator<Item = Vec<Cell>>) -> Reply {
    let mut text = format!("{head}\r\n");
    for cells in lines {
        let value = |name| cells.iter().find(|(of, _)| *of == name)?.1.as_deref();
        let line = head.split(',').map(|name| value(name).unwrap_or_default());
        text += &csv::line(&line.collect::<Vec<_>>());
    }
    Reply::of_type("text/csv; charset=utf-8", text)
        .field("Content-Disposition", "attachment; filename=\"devices.csv\"")
}

/// What is said of a device wherever it is named.
fn described(device: &DeviceId, row: &Row, newest: Option<&Certificate>, now: Now) -> [Cell; 4] {
    [
        ("device_id", Some(device.to_string())),
        ("state", Some(state(row, newest, now).to_owned())),
        ("enrolment", Some(row.stage(now.unix_s()).as_str().to_owned())),
        ("enrolment_expires_at", enrolment_end(row, now)),
    ]
}

/// What a change has made of a device, with its secret if it has a new one: that is shown here and
/// never again.
fn registration(api: &Api, changed: &Changed, now: Now) -> Vec<Cell> {
    let Changed { device, row, secret, .. } = changed;
    let newest = api.provisioner.ca().record().newest(device);
    let mut cells = described(device, row, newest.as_ref(), now).to_vec();
    let secret = secret.as_ref().map(|secret| secret.reveal().to_owned());
    cells.insert(3, ("enrolment_secret", secret));
    cells
}

fn entry(api: &Api, changed: &Changed, now: Now) -> Vec<Cell> {
    let result = match changed.change {
        Change::Keep => "unchanged",
        _ => "registered",
    };
    let mut cells = registration(api, changed, now);
    cells.push(("result", Some(result.to_owned())));
    cells
}

/// What a device is, in one word.
fn state(row: &Row, newest: Option<&Certificate>, now: Now) -> &'static str {
    match newest {
        _ if row.block.stands() => "blocked",
        _ if row.living(now.unix_s()).is_some() => "registered",
        Some(certificate) => certificate.status(now),
        None => "unknown",
    }
}

/// When the registration ends, or has ended, unless it was used before.
fn enrolment_end(row: &Row, now: Now) -> Option<String> {
    let end = row.terms()?.end.saturating_mul(1000);
    (row.stage(now.unix_s()) != Stage::Spent).then(|| clock::rfc3339(end))
}

/// What the fields say of a device.
fn changed(
    device: DeviceId,
    fields: &Map<String, Value>,
    register: bool,
    unless_living: bool,
) -> Result<Changed, Problem> {
    let given = secret_hash(fields)?;
    let wants_secret = flag(fields, "secret")?.unwrap_or(false);
    if wants_secret && given.is_some() {
        return Err(bad("secret and secret_sha256 exclude each other".to_owned()));
    }
    let secret = wants_secret.then(NewSecret::random).transpose();
    let secret = secret.map_err(|e| Problem::from(Code::ServiceUnavailable).log(e))?;
    let begins = register || secret.is_some();
    let edit = Edit {
        register: begins.then(|| given.or(secret.as_ref().map(NewSecret::hash))),
        expires_in_s: number(fields, "expires_in", LONGEST_REGISTRATION_S)?,
        cert_days: number(fields, "cert_days", MOST_CERT_DAYS)?.map(|days| days as u32),
        note: note(fields)?,
        blocked: flag(fields, "blocked")?,
    };
    Ok(Changed::new(device, Change::Edit { edit, unless_living }, secret))
}

fn flag(fields: &Map<String, Value>, name: &str) -> Result<Option<bool>, Problem> {
    optional(fields, name, "true or false", Value::as_bool)
}

fn number(fields: &Map<String, Value>, name: &str, most: u64) -> Result<Option<u64>, Problem> {
    let must = format!("a whole number from 1 to {most}");
    optional(fields, name, &must, |v| v.as_u64().filter(|n| (1..=most).contains(n)))
}

fn note(fields: &Map<String, Value>) -> Result<Option<Option<Text>>, Problem> {
    optional(fields, "note", "at most 64 printable characters", |v| match v.as_str()? {
        "" => Some(None),
        text => Text::parse(text).map(Some),
    })
}

fn secret_hash(fields: &Map<String, Value>) -> Result<Option<SecretHash>, Problem> {
    let read = |value: &Value| SecretHash::from_hex(value.as_str()?);
    optional(fields, "secret_sha256", "64 hexadecimal digits", read)
}

/// Devices to be registered, each with its place for who has made a mistake.
type Entries = Vec<(String, Map<String, Value>)>;

fn read_list(body: &[u8]) -> Result<Entries, Problem> {
    let entries = json::list(body, COLUMNS).map_err(|error| {
        let text = "The request body must be a JSON array of objects or device ids";
        let why = format!("{:?} in the body", error.classify());
        Problem::from(Code::InvalidJson).text(text).log(why)
    })?;
    let entry = |(n, entry): (usize, Value)| {
        let fields = match entry {
            Value::Object(fields) => fields,
            id => Map::from_iter([("device_id".to_owned(), id)]),
        };
        (format!("device {n}"), fields)
    };
    Ok((1..).zip(entries).map(entry).collect())
}

fn read_table(body: &[u8]) -> Result<Entries, Problem> {
    let text = std::str::from_utf8(body).map_err(|_| bad("the table is not UTF-8".to_owned()))?;
    let quote = "a quote in the table has no end or stands within a cell";
    let lines = csv::read(text).ok_or_else(|| bad(quote.to_owned()))?;
    let is_empty = |cells: &[String]| cells.iter().all(String::is_empty);
    let mut lines = (1..).zip(lines).filter(|(_, cells)| !is_empty(cells));
    let (_, head) = lines.next().ok_or_else(|| bad("the table has no header".to_owned()))?;
    let head: Vec<&str> = head.iter().map(|name| name.trim()).collect();
    if let Some(unknown) = head.iter().find(|name| !COLUMNS.contains(name)) {
        return Err(bad(format!("no column is called {unknown:?}: {}", COLUMNS.join(", "))));
    }
    if let Some((_, twice)) =
        head.iter().enumerate().find(|(n, a)| head.iter().take(*n).any(|b| b == *a))
    {
        return Err(bad(format!("column {twice} stands twice")));
    }
    let entry = |(n, cells): (usize, Vec<String>)| {
        let place = format!("line {n}");
        if cells.len() > head.len() {
            return Err(bad(format!("{place} has more cells than the header")));
        }
        let cells = head.iter().zip(cells).filter(|(_, cell)| !cell.is_empty());
        let fields = cells.map(|(name, cell)| ((*name).to_owned(), value_of(name, cell)));
        Ok((place, fields.collect()))
    };
    lines.map(entry).collect()
}

/// A cell as the same field would be in JSON; what it cannot be is left to who reads that.
fn value_of(name: &str, cell: String) -> Value {
    match (name, cell.as_str()) {
        ("secret", "true") => true.into(),
        ("secret", "false") => false.into(),
        ("expires_in" | "cert_days", digits) => match digits.trim().parse::<u64>() {
            Ok(number) => number.into(),
            Err(_) => cell.into(),
        },
        _ => cell.into(),
    }
}

/// `GET /api/v1/devices/{id}`
pub(super) fn show(api: &Api, asked: &Asked<'_>, now: Now) -> Result<Plan, Problem> {
    let device = device_of(asked.name).ok_or(Code::DeviceNotFound)?;
    let record = api.provisioner.ca().record();
    let row = api.provisioner.devices.row(&device);
    let certificates = record.of_device(&device);
    if !row.is_listed() && certificates.is_empty() {
        return Err(Code::DeviceNotFound.into());
    }
    let of_record = |certificate: &Certificate| {
        let stored = record.stored(&certificate.serial).ok();
        let [serial, status, end] = of_certificate(certificate, now);
        let json = write(Json::new(), &[serial, status])
            .field("created_at", stored.map(|s| clock::rfc3339(s.created_at * 1000)));
        let revoked_at = certificate.revoked_at.map(|at| clock::rfc3339(at * 1000));
        write(json, &[end, ("revoked_at", revoked_at)])
    };
    let listed = certificates.iter().take(LARGEST_PAGE as usize).map(of_record);
    let json = write(Json::success(), &described(&device, &row, certificates.first(), now));
    let json = json.some("cert_days", row.terms().and_then(|terms| terms.cert_days));
    let (changed_at, changed_by) = last_change(&row);
    let json = write(json, &[note_of(&row)])
        .array("certificates", listed)
        .some("changed_at", changed_at.map(clock::rfc3339))
        .some("changed_by", changed_by);
    Ok(Plan::Reply(Reply::json(json.timestamp(now))))
}

fn note_of(row: &Row) -> Cell {
    let note = row.terms().and_then(|terms| terms.note.as_ref());
    ("note", note.map(|note| note.as_str().to_owned()))
}

fn of_certificate(certificate: &Certificate, now: Now) -> [Cell; 3] {
    [
        ("serial_number", Some(certificate.serial.to_string())),
        ("status", Some(certificate.status(now).to_owned())),
        ("expires_at", Some(clock::rfc3339(certificate.expires_at * 1000))),
    ]
}

/// When the row was changed last, in milliseconds since 1970, and by whom, which a block does not say.
fn last_change(row: &Row) -> (Option<u64>, Option<String>) {
    let registered = row.registration.as_ref();
    let version = registered.map_or(0, |latest| latest.version);
    let block = row.block.blocked.max(row.block.changed);
    // One request may have changed both.
    let by = registered.filter(|_| version >= block).and_then(|r| r.made_by.as_ref());
    let at = version.max(block);
    ((at > 0).then_some(at), by.map(|by| by.as_str().to_owned()))
}

/// A device of the list.
struct Listed {
    device: DeviceId,
    row: Row,
    newest: Option<Certificate>,
}

/// What the list is asked for.
struct Filter {
    state: Option<String>,
    /// The newest certificate is active and ends before this second.
    ends_before: Option<u64>,
}

impl Filter {
    fn passes(&self, listed: &Listed, now: Now) -> bool {
        let newest = listed.newest.as_ref();
        let is = |wanted: &String| *wanted == state(&listed.row, newest, now);
        let active = newest.filter(|certificate| certificate.status(now) == "active");
        let ends = |before: u64| active.is_some_and(|active| active.expires_at < before);
        self.state.as_ref().is_none_or(is) && self.ends_before.is_none_or(ends)
    }
}

/// `GET /api/v1/devices`
pub(super) fn list(api: &Api, asked: &Asked<'_>, now: Now) -> Result<Plan, Problem> {
    let request = asked.request;
    let within = |name, least, most| {
        let wrong = || bad(format!("{name} must be a whole number from {least} to {most}"));
        let read = |text: String| text.parse().ok().filter(|n| (least..=most).contains(n));
        request.query(name)?.map(|text| read(text).ok_or_else(wrong)).transpose()
    };
    let limit = within("limit", 1, LARGEST_PAGE)?.unwrap_or(100) as usize;
    let days = within("expires_within", 0, MOST_CERT_DAYS)?;
    let known = ["blocked", "registered", "active", "expired", "revoked", "unknown"];
    let state = request.query("state")?;
    if state.as_deref().is_some_and(|state| !known.contains(&state)) {
        return Err(bad(format!("state must be one of {}", known.join(", "))));
    }
    let ends_before = days.map(|days| now.unix_s().saturating_add(days * DAY_S));
    let filter = Filter { state, ends_before };
    let (after, prefix) = (request.query("after")?, request.query("q")?);
    let (after, prefix) = (after.unwrap_or_default(), prefix.unwrap_or_default());
    let (found, next) = page(api, &after, &prefix, limit, &filter, now);
    Ok(Plan::Reply(match request.accepts(CSV) {
        true => list_table(&found, next, now),
        false => list_json(&found, next, now),
    }))
}

/// The devices behind `after` that pass, and the last that was looked at if there may be more.
fn page(
    api: &Api,
    after: &str,
    prefix: &str,
    limit: usize,
    filter: &Filter,
    now: Now,
) -> (Vec<Listed>, Option<DeviceId>) {
    let filtered = filter.state.is_some() || filter.ends_before.is_some();
    // One more than is looked at tells whether there is more.
    let most = if filtered { ROWS_LOOKED_AT } else { limit }.saturating_add(1);
    let (rows, end) = api.provisioner.devices.listed_after(after, prefix, most);
    let mut all: BTreeMap<DeviceId, (Row, Option<Certificate>)> =
        rows.into_iter().map(|(device, row)| (device, (row, None))).collect();
    for newest in api.provisioner.ca().record().newest_after(after, prefix, most) {
        let device = newest.device.clone();
        all.entry(device).or_default().1 = Some(newest);
    }
    let all = all.into_iter().map(|(device, (row, newest))| Listed { device, row, newest });
    let (mut found, mut last) = (Vec::new(), None);
    let is_known = |listed: &Listed| end.as_ref().is_none_or(|end| listed.device <= *end);
    for (looked_at, listed) in all.take_while(is_known).enumerate() {
        if looked_at == ROWS_LOOKED_AT || found.len() == limit {
            return (found, last);
        }
        last = Some(listed.device.clone());
        if filter.passes(&listed, now) {
            found.push(listed);
        }
    }
    (found, end)
}

impl Listed {
    fn cells(&self, now: Now) -> Vec<Cell> {
        let mut cells = described(&self.device, &self.row, self.newest.as_ref(), now).to_vec();
        cells.push(note_of(&self.row));
        cells
    }
}

fn list_json(found: &[Listed], next: Option<DeviceId>, now: Now) -> Reply {
    let entry = |listed: &Listed| {
        let json = write(Json::new(), &listed.cells(now));
        match &listed.newest {
            Some(newest) => {
                json.object("certificate", write(Json::new(), &of_certificate(newest, now)))
            }
            None => json,
        }
    };
    let json = Json::success()
        .array("devices", found.iter().map(entry))
        .some("next", next.map(|next| next.to_string()));
    Reply::json(json.timestamp(now))
}

fn list_table(found: &[Listed], next: Option<DeviceId>, now: Now) -> Reply {
    let line = |listed: &Listed| {
        let newest = listed.newest.iter().flat_map(|newest| of_certificate(newest, now));
        listed.cells(now).into_iter().chain(newest).collect()
    };
    let head =
        "device_id,state,enrolment,enrolment_expires_at,note,serial_number,status,expires_at";
    let reply = table(head, found.iter().map(line));
    match next {
        Some(next) => reply.field("X-Next", next.as_str()),
        None => reply,
    }
}
