//! Requests and replies as the handlers see them, whatever server carries them.

use std::fmt;
use std::net::IpAddr;

use serde_json::{Map, Value};

use crate::clock::{self, Now};
use crate::config::Secret;
use crate::json;
use crate::problem::{Code, Problem};

/// The methods that any endpoint has, and the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `GET`
    Get,
    /// `HEAD`
    Head,
    /// `POST`
    Post,
    /// `DELETE`
    Delete,
    /// `OPTIONS`
    Options,
    /// One that no endpoint has.
    Other,
}

impl Method {
    /// Reads a method name; they are case-sensitive (RFC 9110, 9.1).
    pub fn parse(name: &str) -> Self {
        match name {
            "GET" => Method::Get,
            "HEAD" => Method::Head,
            "POST" => Method::Post,
            "DELETE" => Method::Delete,
            "OPTIONS" => Method::Options,
            _ => Method::Other,
        }
    }

    /// The method whose handler answers: `HEAD` works wherever `GET` does.
    pub fn or_get(self) -> Self {
        if self == Method::Head { Method::Get } else { self }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Method::Get => "GET",
            Method::Head => "HEAD",
            Method::Post => "POST",
            Method::Delete => "DELETE",
            Method::Options => "OPTIONS",
            Method::Other => "another method",
        })
    }
}

/// A request that arrived whole.
#[derive(Clone)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The path, as sent, without the query.
    pub path: String,
    /// What follows the `?`; empty without one.
    pub query: String,
    /// `Authorization`
    pub authorization: Option<String>,
    /// `Content-Type`
    pub content_type: Option<String>,
    /// `Accept`
    pub accept: Option<String>,
    /// The body; empty if there is none.
    pub body: Vec<u8>,
    /// Who sent it.
    pub client: IpAddr,
    /// The certificate (DER) whose key the client has shown to hold; who issued it is not judged yet.
    pub client_certificate: Option<Vec<u8>>,
}

impl Request {
    /// The body as a JSON object with these fields; no body is an empty one.
    ///
    /// # Errors
    /// 415 or 400. A form that a browser could be made to post is a 415.
    pub fn json(&self, names: &[&str]) -> Result<Map<String, Value>, Problem> {
        if self.body.is_empty() {
            return Ok(Map::new());
        }
        let media_type = self.content_type.as_deref().unwrap_or_default();
        let media_type = media_type.split(';').next().unwrap_or_default().trim();
        if !media_type.eq_ignore_ascii_case("application/json") {
            return Err(Code::UnsupportedMediaType.into());
        }
        json::object(&self.body, names).map_err(|error| {
            Problem::from(Code::InvalidJson).log(format!("{:?} in the body", error.classify()))
        })
    }

    /// The credential of `Authorization: Bearer <credential>` (RFC 6750, 2.1).
    pub fn bearer(&self) -> Option<&str> {
        let (scheme, credential) = self.authorization.as_deref()?.split_once(' ')?;
        let credential = credential.trim();
        (scheme.eq_ignore_ascii_case("bearer") && !credential.is_empty()).then_some(credential)
    }

    /// Whether the bearer credential is `key`, compared in constant time.
    pub fn bears(&self, key: &Secret) -> bool {
        self.bearer().is_some_and(|given| key.matches(given.as_bytes()))
    }

    /// Whether the query says `format=<name>`.
    pub fn asks_for_format(&self, name: &str) -> bool {
        self.query.split('&').filter_map(|pair| pair.strip_prefix("format=")).any(|v| v == name)
    }

    /// Whether `Accept` names the media type (RFC 9110, 12.5.1; a weight is not looked at).
    pub fn accepts(&self, media_type: &str) -> bool {
        let ranges = self.accept.as_deref().unwrap_or_default().split(',');
        ranges
            .filter_map(|range| range.split(';').next())
            .any(|range| range.trim().eq_ignore_ascii_case(media_type))
    }
}

/// A reply on its way to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Fields beside `Content-Length`, `Date` and `Server`.
    pub fields: Vec<(&'static str, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Reply {
    /// 200 with a JSON body, which is written by the caller to keep the order of its fields.
    pub fn json(body: String) -> Self {
        Self::with(200, "application/json; charset=utf-8", body.into_bytes())
    }

    /// 200 with a body of another type.
    pub fn of_type(media_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::with(200, media_type, body.into())
    }

    /// 204 for `OPTIONS`.
    pub fn no_content(allow: &str) -> Self {
        Reply { status: 204, fields: vec![("Allow", allow.to_owned())], body: Vec::new() }
    }

    /// An error.
    pub fn problem(problem: &Problem, now: Now) -> Self {
        let (status, code, _) = problem.code.row();
        let mut json = Json::new();
        json.field("success", false).field("error", problem.message()).field("code", code);
        for (name, value) in &problem.fields {
            json.field(name, value.clone());
        }
        let body = json.timestamp(now);
        let mut reply = Self::with(status, "application/json; charset=utf-8", body.into_bytes());
        reply.fields.push(("X-Error-Code", code.to_owned()));
        if status == 401 {
            reply.fields.push(("WWW-Authenticate", "Bearer".to_owned()));
        }
        if let Some(seconds) = problem.retry_after_s {
            reply.fields.push(("Retry-After", seconds.to_string()));
        }
        if let Some(allow) = &problem.allow {
            reply.fields.push(("Allow", allow.clone()));
        }
        reply
    }

    fn with(status: u16, media_type: &str, body: Vec<u8>) -> Self {
        Reply { status, fields: vec![("Content-Type", media_type.to_owned())], body }
    }
}

/// A JSON object whose fields come in the order in which they are written.
pub struct Json(String);

impl Json {
    /// `{`
    pub fn new() -> Self {
        let mut text = String::with_capacity(512);
        text.push('{');
        Json(text)
    }

    /// Adds a field.
    pub fn field(&mut self, name: &str, value: impl Into<Value>) -> &mut Self {
        match value.into() {
            Value::String(text) => self.text(name, &text),
            value => self.written(name, &value.to_string()),
        }
    }

    /// Adds a text.
    pub fn text(&mut self, name: &str, text: &str) -> &mut Self {
        // Tokens, dates and PEM but for its line breaks: most of what there is.
        if text.bytes().all(|b| b >= b' ' && b != b'"' && b != b'\\') {
            self.name(name).push('"');
            self.0.push_str(text);
            self.0.push('"');
            return self;
        }
        self.written(name, &Value::from(text).to_string())
    }

    /// Adds an object.
    pub fn object(&mut self, name: &str, fields: &mut Json) -> &mut Self {
        self.written(name, &fields.end())
    }

    /// Adds a list of values that are JSON already.
    pub fn array(&mut self, name: &str, values: &[String]) -> &mut Self {
        self.written(name, &format!("[{}]", values.join(",")))
    }

    fn written(&mut self, name: &str, json: &str) -> &mut Self {
        self.name(name).push_str(json);
        self
    }

    fn name(&mut self, name: &str) -> &mut String {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        self.0.push('"');
        self.0.push_str(name);
        self.0.push_str("\":");
        &mut self.0
    }

    /// Adds the field that closes every answer, and `}`.
    pub fn timestamp(&mut self, now: Now) -> String {
        self.text("timestamp", &clock::rfc3339(now.unix_ms));
        self.end()
    }

    /// `}`
    pub fn end(&mut self) -> String {
        self.0.push('}');
        std::mem::take(&mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(content_type: Option<&str>, body: &str) -> Request {
        Request {
            method: Method::Post,
            path: "/".into(),
            query: String::new(),
            authorization: None,
            content_type: content_type.map(Into::into),
            accept: None,
            body: body.into(),
            client: [127, 0, 0, 1].into(),
            client_certificate: None,
        }
    }

    #[test]
    fn only_json_is_read() {
        let code =
            |content_type, body| request(content_type, body).json(&["a"]).map_err(|p| p.code);
        for good in ["application/json", "Application/JSON; charset=utf-8", "application/json;"] {
            assert!(code(Some(good), "{}").is_ok(), "{good}");
        }
        assert!(code(None, "").is_ok());
        for bad in [None, Some(""), Some("text/plain"), Some("application/json-seq")] {
            assert_eq!(code(bad, "{}"), Err(Code::UnsupportedMediaType), "{bad:?}");
        }
        for bad in ["[]", "null", "{", "{\"a\":1,\"a\":2}", "\u{feff}{}"] {
            assert_eq!(code(Some("application/json"), bad), Err(Code::InvalidJson), "{bad}");
        }
    }

    #[test]
    fn bearer_credentials() {
        let with =
            |value: &str| Request { authorization: Some(value.to_owned()), ..request(None, "") };
        assert_eq!(with("Bearer abc").bearer(), Some("abc"));
        assert_eq!(with("bearer  abc ").bearer(), Some("abc"));
        for none in ["", "Bearer", "Bearer ", "Basic abc", "abc"] {
            assert_eq!(with(none).bearer(), None, "{none:?}");
        }
        let key = Secret::new("0123456789abcdef".to_owned());
        assert!(with("Bearer 0123456789abcdef").bears(&key));
        assert!(!with("Bearer 0123456789abcdeF").bears(&key));
        assert!(!request(None, "").bears(&key));
    }

    #[test]
    fn errors_have_their_fields_in_order() {
        let now = Now { unix_ms: 0, mono_ms: 0 };
        let problem = Problem::from(Code::TokenAlreadyActive).field("expiresInSeconds", 5);
        let reply = Reply::problem(&problem, now);
        assert_eq!(reply.status, 409);
        assert_eq!(
            String::from_utf8(reply.body).unwrap(),
            r#"{"success":false,"error":"A provisioning token for this device is already active.","code":"TOKEN_ALREADY_ACTIVE","expiresInSeconds":5,"timestamp":"1970-01-01T00:00:00.000Z"}"#
        );
        let has = |code: Code, name: &str| {
            Reply::problem(&code.into(), now).fields.iter().any(|(field, _)| *field == name)
        };
        assert!(has(Code::TokenMissing, "WWW-Authenticate"));
        assert!(has(Code::StoreFull, "Retry-After") && has(Code::RateLimited, "Retry-After"));
        assert!(!has(Code::NotFound, "Retry-After") && has(Code::NotFound, "X-Error-Code"));
    }
}
