//! What a client gets to read: a lane's answer in our own words, or the edge's own refusal.

use std::fmt::Write as _;

use httparse::{EMPTY_HEADER, Response};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use super::PRIVATE_FIELD;
use super::head::push_number;
use crate::clock::{self, Now};
use crate::problem::{Code, Problem};

/// The methods that some endpoint knows; a 405 has to name them (RFC 9110, 15.5.6).
const METHODS: &str = "GET, HEAD, POST, DELETE, OPTIONS";

/// The fields of a lane's answer that a client gets.
const FORWARDED: [&str; 7] = [
    "Content-Type",
    "X-Error-Code",
    "Retry-After",
    "WWW-Authenticate",
    "Allow",
    "Cache-Control",
    "Content-Disposition",
];

/// Fields in a lane's answer; the worker writes six or seven.
const FIELDS_MAX: usize = 32;

/// What the edge needs to know of a lane's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Bytes of the head as the lane sent it.
    pub used: usize,
    /// The request that the answer is for.
    pub number: u64,
    /// Bytes of the body that follow, for a request that is not `HEAD`.
    pub length: usize,
}

/// Reads the head of a lane's answer and writes it anew, all but the fields that depend on the
/// client, see [`end_head`]. `None` if it is not complete.
///
/// # Errors
/// What does not belong there; the lane cannot be read any further.
pub fn read(buf: &[u8], out: &mut Vec<u8>) -> Result<Option<Answer>, &'static str> {
    let mut headers = [EMPTY_HEADER; FIELDS_MAX];
    let mut response = Response::new(&mut headers);
    let used = match response.parse(buf) {
        Ok(httparse::Status::Complete(used)) => used,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err("the head is malformed"),
    };
    let status = response.code.filter(|code| *code >= 200).ok_or("the status is not final")?;
    out.clear();
    out.extend_from_slice(b"HTTP/1.1 ");
    push_number(status.into(), out);
    out.push(b' ');
    out.extend_from_slice(response.reason.unwrap_or_default().as_bytes());
    out.extend_from_slice(b"\r\n");
    let (mut number, mut length) = (None, None);
    for header in response.headers.iter() {
        match header.name {
            PRIVATE_FIELD => number = decimal(header.value),
            "Content-Length" => length = decimal(header.value),
            "Transfer-Encoding" => return Err("the body is chunked"),
            name if FORWARDED.contains(&name) => push_field(name, header.value, out),
            _ => {}
        }
    }
    let number = number.ok_or("the request number is missing")?;
    let length = match (status, length) {
        (204 | 304, _) => 0,
        (_, Some(length)) => usize::try_from(length).map_err(|_| "the length is absurd")?,
        _ => return Err("the length is missing"),
    };
    if status != 204 {
        out.extend_from_slice(b"Content-Length: ");
        push_number(length as u64, out);
        out.extend_from_slice(b"\r\n");
    }
    Ok(Some(Answer { used, number, length }))
}

/// Ends the head: date, and what becomes of the connection.
pub fn end_head(date: &str, keep_alive: bool, is_1_0: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(b"Date: ");
    out.extend_from_slice(date.as_bytes());
    out.extend_from_slice(match (keep_alive, is_1_0) {
        (false, _) => b"\r\nConnection: close\r\n\r\n".as_slice(),
        (true, true) => b"\r\nConnection: keep-alive\r\n\r\n",
        (true, false) => b"\r\n\r\n",
    });
}

/// A whole HTTP/1.1 response that refuses a request and closes the connection.
///
/// `now` must be the time of the refusal; `with_body` is false for `HEAD`.
pub fn problem_response(code: Code, now: Now, with_body: bool) -> Vec<u8> {
    let problem = Problem::from(code);
    let (status, name, text) = code.row();
    let body = problem_body(name, text, now);
    let mut head = format!(
        "HTTP/1.1 {status} {}\r\nContent-Type: application/json; charset=utf-8\r\n\
         X-Error-Code: {name}\r\n",
        reason(status)
    );
    // Writing to a `String` cannot fail.
    let _ = match status {
        401 => write!(head, "WWW-Authenticate: Bearer\r\n"),
        405 => write!(head, "Allow: {METHODS}\r\n"),
        _ => Ok(()),
    };
    if let Some(seconds) = problem.retry_after_s {
        let _ = write!(head, "Retry-After: {seconds}\r\n");
    }
    let _ = write!(head, "Content-Length: {}\r\n", body.len());
    let mut out = head.into_bytes();
    end_head(&http_date(now), false, false, &mut out);
    if with_body {
        out.extend_from_slice(body.as_bytes());
    }
    out
}

/// The JSON of an error; no text of the table needs escaping, which a test of the table sees to.
pub fn problem_body(name: &str, text: &str, now: Now) -> String {
    let at = clock::rfc3339(now.unix_ms);
    format!(r#"{{"success":false,"error":"{text}","code":"{name}","timestamp":"{at}"}}"#)
}

/// The current date as HTTP writes it, made once a second.
#[derive(Default)]
pub struct Date {
    second: u64,
    text: String,
}

impl Date {
    /// The date of `now`.
    pub fn at(&mut self, now: Now) -> &str {
        if self.second != now.unix_s() || self.text.is_empty() {
            self.second = now.unix_s();
            self.text = http_date(now);
        }
        &self.text
    }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7).
fn http_date(now: Now) -> String {
    const FORMAT: &[BorrowedFormatItem<'_>] = format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    i64::try_from(now.unix_s())
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|at| at.format(FORMAT).ok())
        .unwrap_or_default()
}

fn push_field(name: &str, value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// The number at the start of a field's value.
fn decimal(value: &[u8]) -> Option<u64> {
    let digits = value.split(|b| *b == b' ').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The reason phrases of the statuses in the table of errors.
fn reason(status: u16) -> &'static str {
    match status {
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

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Now = Now { unix_ms: 784_111_777_123, mono_ms: 0 };

    #[test]
    fn a_refusal_is_a_whole_response() {
        let text = String::from_utf8(problem_response(Code::BodyTooLarge, NOW, true)).unwrap();
        assert_eq!(
            text,
            "HTTP/1.1 413 Content Too Large\r\n\
             Content-Type: application/json; charset=utf-8\r\n\
             X-Error-Code: BODY_TOO_LARGE\r\n\
             Content-Length: 135\r\n\
             Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n\
             Connection: close\r\n\r\n\
             {\"success\":false,\"error\":\"The request body must be at most 65536 bytes\",\
             \"code\":\"BODY_TOO_LARGE\",\"timestamp\":\"1994-11-06T08:49:37.123Z\"}"
        );
    }

    #[test]
    fn every_problem_has_what_its_status_asks_for() {
        for code in Code::ALL {
            let (status, ..) = code.row();
            let text = String::from_utf8(problem_response(*code, NOW, false)).unwrap();
            let has = |field: &str| text.contains(&format!("\r\n{field}: "));
            assert!(text.ends_with("\r\n\r\n"), "{text}");
            assert_eq!(has("Allow"), status == 405);
            assert_eq!(has("WWW-Authenticate"), status == 401);
            assert_eq!(has("Retry-After"), matches!(status, 429 | 503));
            let generic = text.contains("Internal Server Error");
            assert_eq!(generic, status == 500, "{status} has no reason phrase");
        }
    }

    #[test]
    fn an_answer_is_cut_to_what_a_client_may_see() {
        let head = b"HTTP/1.1 200 OK\r\nServer: tiny\r\nDate: -\r\nX-Edge: 12\r\nX-Secret: s\r\n\
                     Content-Type: text/plain\r\nContent-Length: 3\r\n\r\nabc";
        let mut out = Vec::new();
        let answer = read(head, &mut out).unwrap().unwrap();
        assert_eq!((answer.used, answer.number, answer.length), (head.len() - 3, 12, 3));
        end_head("now", true, true, &mut out);
        let expected = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\
                        Date: now\r\nConnection: keep-alive\r\n\r\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        for cut in 0..answer.used {
            assert_eq!(read(&head[..cut], &mut Vec::new()), Ok(None), "{cut}");
        }
    }

    #[test]
    fn an_answer_that_cannot_be_told_apart_is_an_error() {
        let answer = |fields: &str| {
            read(format!("HTTP/1.1 200 OK\r\n{fields}\r\n").as_bytes(), &mut Vec::new())
        };
        assert!(answer("X-Edge: 1\r\nContent-Length: 0\r\n").is_ok());
        for bad in [
            "Content-Length: 0\r\n",
            "X-Edge: 1\r\n",
            "X-Edge: x\r\nContent-Length: 0\r\n",
            "X-Edge: 1\r\nContent-Length: -1\r\n",
            "X-Edge: 1\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n",
        ] {
            assert!(answer(bad).is_err(), "{bad:?}");
        }
        assert!(read(b"HTTP/1.1 100 Continue\r\n\r\n", &mut Vec::new()).is_err());
    }
}
