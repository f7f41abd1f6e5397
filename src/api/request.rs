//! Requests as the handlers see them, whatever server carries them.

use std::net::IpAddr;

use serde_json::{Map, Value};

use crate::config::Secret;
use crate::http::Method;
use crate::json;
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
}
