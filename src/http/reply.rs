//! A reply: status, fields, body. Here, and nowhere else, an error becomes one.

use super::json::Json;
use crate::clock::Now;
use crate::problem::Problem;

const JSON: &str = "application/json; charset=utf-8";

/// A reply on its way to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Fields beside `Content-Length`, `Date` and `Connection`, which the edge adds.
    fields: Vec<(&'static str, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Reply {
    /// 200 with a JSON body. A newline at its end keeps the prompt of who asks by hand on a line of its
    /// own.
    pub(crate) fn json(body: Json) -> Self {
        Self::of_type(JSON, body.end() + "\n")
    }

    /// 200 with a body of another type.
    pub fn of_type(media_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Reply { body: body.into(), ..Self::empty(200) }.field("Content-Type", media_type)
    }

    /// 204 for `OPTIONS`.
    pub fn no_content(allow: &str) -> Self {
        Self::empty(204).field("Allow", allow)
    }

    /// Neither fields nor a body.
    pub fn empty(status: u16) -> Self {
        Reply { status, fields: Vec::new(), body: Vec::new() }
    }

    /// An error, to a program.
    pub fn problem(problem: &Problem, now: Now) -> Self {
        let code = problem.code.row().1;
        let json = Json::new().field("success", false).field("error", problem.message());
        let fields = problem.fields.iter();
        let json = fields
            .fold(json.field("code", code), |json, (name, value)| json.field(name, value.clone()));
        Self::json(json.timestamp(now)).refusing(problem, "Bearer")
    }

    /// An error, to a client that shows it to a person (RFC 7030, 4.2.3); one without a text has no body.
    pub fn plain_problem(problem: &Problem, _: Now) -> Self {
        let text: String = problem.message().lines().map(|line| format!("{line}\n")).collect();
        Self::of_type("text/plain; charset=utf-8", text).refusing(problem, r#"Basic realm="est""#)
    }

    fn refusing(self, problem: &Problem, challenge: &str) -> Self {
        let (status, code, _) = problem.code.row();
        let mut reply = Reply { status, ..self }.field("X-Error-Code", code);
        if status == 401 {
            reply = reply.field("WWW-Authenticate", challenge);
        }
        if let Some(seconds) = problem.retry_after_s {
            reply = reply.field("Retry-After", seconds.to_string());
        }
        if let Some(allow) = &problem.allow {
            reply = reply.field("Allow", &**allow);
        }
        reply
    }

    /// Adds a field.
    ///
    /// SECURITY: a CR or LF in a value would begin a field or an answer of its own, so a value that is
    /// not printable ASCII is left out.
    pub fn field(mut self, name: &'static str, value: impl Into<String>) -> Self {
        let value = value.into();
        if value.bytes().all(|b| matches!(b, b' '..=b'~')) {
            self.fields.push((name, value));
        } else {
            log::error!("a reply's {name} is left out: it is not printable");
        }
        self
    }

    /// The fields, in the order in which they were added.
    pub fn fields(&self) -> &[(&'static str, String)] {
        &self.fields
    }

    /// The phrase that stands behind the status.
    pub fn reason(&self) -> &'static str {
        match self.status {
            200 => "OK",
            204 => "No Content",
            400 => "Bad Request",
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            408 => "Request Timeout",
            409 => "Conflict",
            413 => "Content Too Large",
            415 => "Unsupported Media Type",
            429 => "Too Many Requests",
            431 => "Request Header Fields Too Large",
            501 => "Not Implemented",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Code;

    const NOW: Now = Now { unix_ms: 0, mono_ms: 0 };

    #[test]
    fn errors_have_their_fields_in_order() {
        let problem = Problem::from(Code::TokenAlreadyActive).field("expiresInSeconds", 5);
        let reply = Reply::problem(&problem, NOW);
        assert_eq!(reply.status, 409);
        assert_eq!(
            String::from_utf8(reply.body).unwrap().trim_end(),
            r#"{"success":false,"error":"A provisioning token for this device is already active.","code":"TOKEN_ALREADY_ACTIVE","expiresInSeconds":5,"timestamp":"1970-01-01T00:00:00.000Z"}"#
        );
    }

    #[test]
    fn every_error_has_what_its_status_asks_for() {
        let manners = [Reply::problem, Reply::plain_problem];
        for (code, refuse) in Code::ALL.iter().flat_map(|code| manners.map(|refuse| (code, refuse)))
        {
            let reply = refuse(&(*code).into(), NOW);
            let has = |name| reply.fields().iter().any(|(field, _)| *field == name);
            assert!(has("Content-Type") && has("X-Error-Code"));
            assert_eq!(has("WWW-Authenticate"), reply.status == 401);
            assert_eq!(has("Retry-After"), matches!(reply.status, 429 | 503));
            let generic = reply.reason() == "Internal Server Error";
            assert_eq!(generic, reply.status == 500, "{} has no reason phrase", reply.status);
        }
    }

    #[test]
    fn values_cannot_break_the_line() {
        let mut reply = Reply::empty(200).field("X-Is", "fine");
        for value in ["a\r\nX-B: c", "a\nb", "\0", "\u{e4}"] {
            reply = reply.field("X-A", value);
        }
        assert_eq!(reply.fields(), [("X-Is", "fine".to_owned())]);
    }
}
