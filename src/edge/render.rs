//! What a client gets to read: a reply's head, in one place for all of them.

use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use super::fields::{push_field, push_length, push_number};
use super::head::Head;
use crate::clock::{self, Now};
use crate::http::{Class, Method, Reply};
use crate::problem::{Code, Problem};

/// Writes the head of `reply` to a request with this head; `None`, if that could not be read.
pub fn write_head(
    reply: &Reply,
    request: Option<&Head>,
    keep_alive: bool,
    date: &str,
    out: &mut Vec<u8>,
) {
    out.extend_from_slice(b"HTTP/1.1 ");
    push_number(reply.status.into(), out);
    out.push(b' ');
    out.extend_from_slice(reply.reason().as_bytes());
    out.extend_from_slice(b"\r\n");
    for (name, value) in reply.fields() {
        push_field(name, value.as_bytes(), out);
    }
    if has_body(reply.status) {
        push_length(reply.body.len(), out);
    }
    push_field("Date", date.as_bytes(), out);
    out.extend_from_slice(match (keep_alive, request.is_some_and(|head| head.is_1_0)) {
        (false, _) => b"Connection: close\r\n\r\n".as_slice(),
        (true, true) => b"Connection: keep-alive\r\n\r\n",
        (true, false) => b"\r\n",
    });
}

pub fn body<'a>(reply: &'a Reply, request: Option<&Head>) -> &'a [u8] {
    let is_head = request.is_some_and(|head| head.is_method_head);
    if is_head || !has_body(reply.status) { &[] } else { &reply.body }
}

/// RFC 9112, 6.3.
fn has_body(status: u16) -> bool {
    !matches!(status, 204 | 304)
}

pub fn refusal(code: Code, request: Option<&Head>, now: Now) -> Reply {
    let mut problem = Problem::from(code);
    if code == Code::MethodNotAllowed {
        problem.allow = Some(Method::ALLOW.into());
    }
    // The edge itself answers `NotFound` only where a path of HTTPS is asked for over plain HTTP.
    if code == Code::NotFound {
        problem = problem.text("Not found: this is served over HTTPS only");
    }
    let class = request.map_or(Class::PLAIN, |head| head.class);
    (class.refuse)(&problem, now)
}

/// The current date as HTTP writes it, made once a second.
#[derive(Default)]
pub struct Date {
    second: u64,
    text: String,
}

impl Date {
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
    clock::utc(now.unix_s()).format(FORMAT).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::head::Framing;

    const NOW: Now = Now { unix_ms: 784_111_777_123, mono_ms: 0 };

    fn rendered(reply: &Reply, request: Option<&Head>, keep_alive: bool) -> String {
        let mut out = Vec::new();
        write_head(reply, request, keep_alive, Date::default().at(NOW), &mut out);
        out.extend_from_slice(body(reply, request));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_refusal_is_a_whole_response() {
        assert_eq!(
            rendered(&refusal(Code::BodyTooLarge, None, NOW), None, false),
            "HTTP/1.1 413 Content Too Large\r\n\
             Content-Type: application/json; charset=utf-8\r\n\
             X-Error-Code: BODY_TOO_LARGE\r\n\
             Content-Length: 136\r\n\
             Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n\
             Connection: close\r\n\r\n\
             {\"success\":false,\"error\":\"The request body must be at most 65536 bytes\",\
             \"code\":\"BODY_TOO_LARGE\",\"timestamp\":\"1994-11-06T08:49:37.123Z\"}\n"
        );
        let text = rendered(&refusal(Code::MethodNotAllowed, None, NOW), None, false);
        assert!(text.contains("\r\nAllow: GET, HEAD, POST,"), "{text}");
    }

    #[test]
    fn what_a_body_and_the_connection_depend_on() {
        let mut head = Head {
            framing: Framing::Length(0),
            class: Class::PLAIN,
            is_method_head: true,
            is_1_0: false,
            keep_alive: true,
            expects_continue: false,
        };
        let reply = Reply::of_type("text/plain", "abc");
        let text = rendered(&reply, Some(&head), true);
        assert!(
            text.ends_with("Length: 3\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n"),
            "{text}"
        );
        (head.is_method_head, head.is_1_0) = (false, true);
        let text = rendered(&reply, Some(&head), true);
        assert!(text.ends_with("\r\nConnection: keep-alive\r\n\r\nabc"), "{text}");
        let mut nothing = reply;
        nothing.status = 204;
        let text = rendered(&nothing, Some(&head), false);
        assert!(
            text.ends_with("\r\nConnection: close\r\n\r\n") && !text.contains("Length"),
            "{text}"
        );
    }
}
