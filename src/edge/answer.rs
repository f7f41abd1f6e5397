//! What a client gets to read: a lane's answer in our own words, or the edge's own refusal.

use httparse::{EMPTY_HEADER, Response};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use super::PRIVATE_FIELD;
use super::head::{Head, push_number};
use crate::clock::Now;
use crate::http::{Class, Method, Reply};
use crate::problem::{Code, Problem};

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

/// A whole response that refuses a request and closes the connection; `head` is what is known of the
/// request.
pub fn refusal(code: Code, head: Option<Head>, now: Now) -> Vec<u8> {
    let mut problem = Problem::from(code);
    if code == Code::MethodNotAllowed {
        problem.allow = Some(Method::ALLOW.to_owned());
    }
    let refuse = head.map_or(Class::PLAIN.refuse, |head| head.class.refuse);
    let reply = refuse(&problem, now);
    let mut out = Vec::with_capacity(512);
    begin_head(&reply, &mut out);
    end_head(&http_date(now), false, false, &mut out);
    if !head.is_some_and(|head| head.is_head) {
        out.extend_from_slice(&reply.body);
    }
    out
}

/// Begins the head: all but the fields that depend on the client, see [`end_head`].
fn begin_head(reply: &Reply, out: &mut Vec<u8>) {
    out.extend_from_slice(b"HTTP/1.1 ");
    push_number(reply.status.into(), out);
    out.push(b' ');
    out.extend_from_slice(reply.reason().as_bytes());
    out.extend_from_slice(b"\r\n");
    for (name, value) in reply.fields() {
        push_field(name, value.as_bytes(), out);
    }
    out.extend_from_slice(b"Content-Length: ");
    push_number(reply.body.len() as u64, out);
    out.extend_from_slice(b"\r\n");
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

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Now = Now { unix_ms: 784_111_777_123, mono_ms: 0 };

    #[test]
    fn a_refusal_is_a_whole_response() {
        let text = String::from_utf8(refusal(Code::BodyTooLarge, None, NOW)).unwrap();
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
