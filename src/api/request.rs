//! Requests as the handlers see them, whatever server carries them.

use std::net::IpAddr;

use percent_encoding::percent_decode_str;
use serde_json::{Map, Value};

use crate::config::Secret;
use crate::http::Method;
use crate::json;
use crate::pem;
use crate::problem::{Code, Problem};

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
    /// The body as a JSON object with these fields; no body is an empty one. A form that a browser could
    /// be made to post is a 415.
    pub fn json(&self, names: &[&str]) -> Result<Map<String, Value>, Problem> {
        if self.body.is_empty() {
            return Ok(Map::new());
        }
        if self.media_type() != "application/json" {
            return Err(Code::UnsupportedMediaType.into());
        }
        json::object(&self.body, names).map_err(|error| {
            Problem::from(Code::InvalidJson).log(format!("{:?} in the body", error.classify()))
        })
    }

    /// The media type of the body, in lower case and without parameters.
    pub fn media_type(&self) -> String {
        let media_type = self.content_type.as_deref().unwrap_or_default();
        media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
    }

    /// The credential of `Authorization: Bearer <credential>` (RFC 6750, 2.1).
    pub fn bearer(&self) -> Option<&str> {
        let (scheme, credential) = self.authorization.as_deref()?.split_once(' ')?;
        let credential = credential.trim();
        (scheme.eq_ignore_ascii_case("bearer") && !credential.is_empty()).then_some(credential)
    }

    /// Name and password of `Authorization: Basic` (RFC 7617), or a bearer credential without a name. A
    /// device's name may hold colons, so the last one counts.
    pub fn login(&self) -> Option<(String, String)> {
        if let Some(credential) = self.bearer() {
            return Some((String::new(), credential.to_owned()));
        }
        let (scheme, credential) = self.authorization.as_deref()?.split_once(' ')?;
        let decoded = pem::decode(credential).filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
        let text = String::from_utf8(decoded).ok()?;
        text.rsplit_once(':').map(|(name, password)| (name.to_owned(), password.to_owned()))
    }

    /// Whether the bearer credential is `key`, compared in constant time.
    pub fn bears(&self, key: &Secret) -> bool {
        self.bearer().is_some_and(|given| key.matches(given.as_bytes()))
    }

    /// What the query says of `name`. A second time would leave open which of the two counts.
    pub fn query(&self, name: &str) -> Result<Option<String>, Problem> {
        let mut pairs = form_urlencoded(&self.query).filter(|(key, _)| key == name);
        match (pairs.next(), pairs.next()) {
            (pair, None) => Ok(pair.map(|(_, value)| value)),
            (_, Some(_)) => Err(bad_value(format!("{name} stands twice"))),
        }
    }

    /// Whether the query says `<name>=true`; it may say `false`.
    pub fn flag(&self, name: &str) -> Result<bool, Problem> {
        self.says(name, "true", "false")
    }

    /// Whether the query says `<name>=<value>`; it may say what `usual` is.
    pub fn says(&self, name: &str, value: &str, usual: &str) -> Result<bool, Problem> {
        match self.query(name)? {
            Some(given) if given == value => Ok(true),
            Some(given) if given != usual => {
                Err(bad_value(format!("{name} must be {value} or {usual}")))
            }
            _ => Ok(false),
        }
    }

    /// Whether `Accept` names the media type (RFC 9110, 12.5.1; of weights only 0 counts: not at all).
    pub fn accepts(&self, media_type: &str) -> bool {
        let is_named = |range: &str| {
            let mut parts = range.split(';').map(str::trim);
            parts.next().is_some_and(|range| range.eq_ignore_ascii_case(media_type))
                && !parts.any(is_weightless)
        };
        self.accept.as_deref().unwrap_or_default().split(',').any(is_named)
    }
}

/// Whether a parameter is the weight 0 (RFC 9110, 12.4.2).
fn is_weightless(parameter: &str) -> bool {
    let weight = parameter.strip_prefix(['q', 'Q']).and_then(|rest| rest.strip_prefix("=0"));
    weight.is_some_and(|rest| rest.trim_matches(['.', '0']).is_empty())
}

/// The value in a query, or in a body, that is not allowed.
pub(super) fn bad_value(what: String) -> Problem {
    Problem::from(Code::BadRequest).text(what)
}

/// A field of a body as `read` understands it, unless it is left out or null; what it `must` be.
pub(super) fn optional<T>(
    fields: &Map<String, Value>,
    name: &str,
    must: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, Problem> {
    let given = fields.get(name).filter(|value| !value.is_null());
    given.map(|v| read(v).ok_or_else(|| bad_value(format!("{name} must be {must}")))).transpose()
}

/// The pairs of a query, decoded. What is not UTF-8 then stays as what no value may hold: left out, it
/// would count as not asked for.
fn form_urlencoded(query: &str) -> impl Iterator<Item = (String, String)> {
    let decode =
        |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    query.split('&').map(move |pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(name), decode(value))
    })
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
    fn a_value_that_cannot_be_read_is_there_all_the_same() {
        let asked = |query: &str| Request { query: query.to_owned(), ..request(None, "") };
        assert_eq!(asked("block=%ff").flag("block").map_err(|p| p.code), Err(Code::BadRequest));
        assert_eq!(asked("q=%ff&block=t%72ue").flag("block"), Ok(true));
        assert!(asked("q=%ff").query("q").unwrap().is_some_and(|q| !q.is_empty()), "it filters");
        assert_eq!(asked("q=a+b").query("q"), Ok(Some("a b".to_owned())));
    }

    #[test]
    fn a_name_that_stands_twice_in_a_query() {
        let flag = |query: &str| {
            let request = Request { query: query.to_owned(), ..request(None, "") };
            request.flag("block").map_err(|problem| (problem.code, problem.message().to_owned()))
        };
        let twice = (Code::BadRequest, "block stands twice".to_owned());
        for query in ["block=true&block=false", "block=true&a=b&bl%6fck=true", "block&block"] {
            assert_eq!(flag(query), Err(twice.clone()), "{query}");
        }
        assert_eq!(flag("a=1&block=true&a=2"), Ok(true), "as in a body, what nobody reads may");
    }

    #[test]
    fn what_is_accepted() {
        let accepts = |accept: &str| {
            let accept = Some(accept.to_owned());
            Request { accept, ..request(None, "") }.accepts("text/html")
        };
        for html in
            ["text/html", "a/b, Text/HTML ;q=0.001", "text/html;level=0;q=1", "text/html; q=0.5"]
        {
            assert!(accepts(html), "{html}");
        }
        for other in ["*/*", "text/html;q=0", "text/html; level=1 ;Q=0.000", "text/html2", ""] {
            assert!(!accepts(other), "{other}");
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
}
