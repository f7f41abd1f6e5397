//! The head of a request: found, held against RFC 9112 and RFC 9110, and written anew.
//!
//! `httparse` splits the lines; what it forgives (bare LF, any byte above ASCII) is refused here,
//! and so is everything that two servers may frame differently. What goes on to the lane is not
//! the client's text but ours: request line, an allow-list of fields, one `Content-Length`.

use std::mem::MaybeUninit;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use httparse::{Header, Request};

use super::chunked::is_token;
use super::proxies::Networks;
use super::settings::{BODY_MAX, FIELDS_MAX, HEAD_MAX};
use crate::http::{Class, Classify};
use crate::problem::Code;

/// What the connection needs to know about a request whose head is well formed.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Where the body ends.
    pub framing: Framing,
    /// Where the request goes.
    pub class: Class,
    /// The answer has no body (RFC 9110, 9.3.2).
    pub is_head: bool,
    /// The client speaks HTTP/1.0.
    pub is_1_0: bool,
    /// The client wants to use the connection again.
    pub keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
}

/// How the length of the body is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// By `Content-Length`; without a body, 0.
    Length(usize),
    /// By the chunked transfer coding.
    Chunked,
}

/// Who sends the request, for the private field.
#[derive(Clone, Copy)]
pub struct Origin<'a> {
    /// The number by which the lane's answer is known again.
    pub number: u64,
    /// The address of the peer.
    pub peer: IpAddr,
    /// The trusted proxies, if the peer is one of them.
    pub proxies: Option<&'a Networks>,
    /// The certificate whose key the peer holds, in DER.
    pub certificate: Option<&'a [u8]>,
    /// Tells where its requests go.
    pub classify: Classify,
}

/// Looks for the end of the head in `buf`, of which `seen` bytes were looked at before.
///
/// Returns the length of the head with its empty line, or `None` if that is still to come.
///
/// # Errors
/// `BadRequest` as soon as a byte is there that no head may hold; `HeadersTooLarge`.
pub fn find_end(buf: &[u8], seen: usize) -> Result<Option<usize>, Code> {
    let window = buf.get(..buf.len().min(HEAD_MAX)).unwrap_or(buf);
    // Three bytes back, so that an end that was cut in two is seen whole.
    let from = seen.saturating_sub(3);
    let mut last = [0; 4];
    for (at, &byte) in window.iter().enumerate().skip(from) {
        let [_, b, c, d] = last;
        last = [b, c, d, byte];
        if byte >= b' ' && byte != 0x7f && d != b'\r' {
            continue;
        }
        let fine = match byte {
            // What stands before the first byte looked at was judged with it, last time.
            b'\n' => d == b'\r' || (at == from && from > 0),
            b'\r' | b'\t' => d != b'\r',
            _ => false,
        };
        if !fine {
            return Err(Code::BadRequest);
        }
        if last == *b"\r\n\r\n" {
            return Ok(Some(at + 1));
        }
    }
    if window.len() == HEAD_MAX { Err(Code::HeadersTooLarge) } else { Ok(None) }
}

/// Reads the whole head `buf` and appends to `out` what goes on to the lane.
///
/// With chunked framing `Content-Length: 00000` is written last but for the empty line, to be
/// filled in when the length is known, see [`fill_length`].
///
/// # Errors
/// The code of the first rule that is broken.
pub fn read(buf: &[u8], origin: Origin<'_>, out: &mut Vec<u8>) -> Result<Head, Code> {
    let mut space = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut request = Request::new(&mut []);
    match request.parse_with_uninit_headers(buf, &mut space) {
        Ok(httparse::Status::Complete(n)) if n == buf.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err(Code::HeadersTooLarge),
        Err(httparse::Error::Version) => {
            return read(&as_1_1(buf).ok_or(Code::BadRequest)?, origin, out);
        }
        _ => return Err(Code::BadRequest),
    }
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(Code::BadRequest);
    };
    let fields = Fields::read(request.headers, version == 0)?;
    let path = origin_form(method, target)?;
    let framing = fields.framing()?;
    write_request_line(method, path, out);
    fields.write(request.headers, out)?;
    let (path_only, _) = path.text().split_once('?').unwrap_or((path.text(), ""));
    let class = (origin.classify)(method, path_only);
    let certificate = origin.certificate.filter(|_| class.client_certificate);
    write_private(origin, certificate, request.headers, out);
    write_length(framing, out);
    Ok(Head {
        framing,
        class,
        is_head: method == "HEAD",
        is_1_0: version == 0,
        keep_alive: !fields.close && (version == 1 || fields.keep_alive),
        expects_continue: fields.expects_continue && version == 1,
    })
}

/// The same head in HTTP/1.1, if its version is a later minor one, which is to be read as the latest
/// that we know (RFC 9110, 2.5). `httparse` knows 1.0 and 1.1 only.
fn as_1_1(buf: &[u8]) -> Option<Vec<u8>> {
    let end = buf.iter().position(|b| *b == b'\r')?;
    let (line, rest) = buf.split_at(end);
    match line.split_last()? {
        (b'2'..=b'9', before) if before.ends_with(b" HTTP/1.") => {
            Some([before, b"1", rest].concat())
        }
        _ => None,
    }
}

/// Writes the length of a chunked body into the head that `whole` begins with.
///
/// # Errors
/// `InternalError` if `head` is not the length of a head with that field, which [`read`] rules out.
pub fn fill_length(whole: &mut [u8], head: usize, length: usize) -> Result<(), Code> {
    let place = head.checked_sub(4 + LENGTH_DIGITS).and_then(|at| whole.get_mut(at..head - 4));
    let mut left = length;
    for digit in place.ok_or(Code::InternalError)?.iter_mut().rev() {
        *digit = b'0' + (left % 10) as u8;
        left /= 10;
    }
    Ok(())
}

/// As many as `BODY_MAX` has.
const LENGTH_DIGITS: usize = 5;

/// The fields that decide about framing and connection, and those that go on.
#[derive(Default)]
struct Fields<'b> {
    host: Option<&'b [u8]>,
    length: Option<&'b [u8]>,
    codings: Option<&'b [u8]>,
    is_1_0: bool,
    close: bool,
    keep_alive: bool,
    expects_continue: bool,
    authorization: Option<&'b [u8]>,
    content_type: Option<&'b [u8]>,
}

impl<'b> Fields<'b> {
    fn read(headers: &[Header<'b>], is_1_0: bool) -> Result<Self, Code> {
        let mut fields = Fields { is_1_0, ..Fields::default() };
        for header in headers {
            fields.add(header.name, header.value)?;
        }
        match fields.host {
            Some(host) if !is_host(host) => Err(Code::BadRequest),
            None if !is_1_0 => Err(Code::BadRequest),
            _ => Ok(fields),
        }
    }

    fn add(&mut self, name: &str, value: &'b [u8]) -> Result<(), Code> {
        let is = |known: &str| name.eq_ignore_ascii_case(known);
        match name.len() {
            4 if is("Host") => once(&mut self.host, value),
            6 if is("Expect") => {
                self.expects_continue |= value.eq_ignore_ascii_case(b"100-continue");
                Ok(())
            }
            10 if is("Connection") => {
                self.close |= has_member(value, b"close");
                self.keep_alive |= has_member(value, b"keep-alive");
                Ok(())
            }
            12 if is("Content-Type") => once(&mut self.content_type, value),
            13 if is("Authorization") => once(&mut self.authorization, value),
            14 if is("Content-Length") => once(&mut self.length, value),
            17 if is("Transfer-Encoding") => once(&mut self.codings, value),
            _ => Ok(()),
        }
    }

    /// RFC 9112, 6.3, without the cases in which it lets a server guess.
    fn framing(&self) -> Result<Framing, Code> {
        match (self.length, self.codings) {
            (Some(_), Some(_)) => Err(Code::BadRequest),
            (None, Some(_)) if self.is_1_0 => Err(Code::BadRequest),
            (None, Some(codings)) => chunked_only(codings),
            (Some(length), None) => content_length(length).map(Framing::Length),
            (None, None) => Ok(Framing::Length(0)),
        }
    }

    fn write(&self, headers: &[Header<'b>], out: &mut Vec<u8>) -> Result<(), Code> {
        if let Some(value) = self.authorization {
            write_field(b"Authorization: ", value, out)?;
        }
        if let Some(value) = self.content_type {
            write_field(b"Content-Type: ", value, out)?;
        }
        let mut name: &[u8] = b"Accept: ";
        for value in values(headers, "Accept") {
            // The lines of a list are one list (RFC 9110, 5.2).
            write_field(name, value, out)?;
            out.truncate(out.len() - 2);
            name = b", ";
        }
        if name == b", " {
            out.extend_from_slice(b"\r\n");
        }
        Ok(())
    }
}

fn write_field(name: &[u8], value: &[u8], out: &mut Vec<u8>) -> Result<(), Code> {
    if !value.is_ascii() {
        return Err(Code::BadRequest);
    }
    out.extend_from_slice(name);
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
    Ok(())
}

/// The values of all fields of this name.
fn values<'h, 'b>(headers: &'h [Header<'b>], name: &'h str) -> impl Iterator<Item = &'b [u8]> + 'h {
    headers.iter().filter(move |h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value)
}

/// A second value would leave open which of the two counts, here and behind us.
fn once<'b>(place: &mut Option<&'b [u8]>, value: &'b [u8]) -> Result<(), Code> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Code::BadRequest),
    }
}

fn content_length(value: &[u8]) -> Result<usize, Code> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(Code::BadRequest);
    }
    let add = |sum: usize, d: &u8| sum.saturating_mul(10).saturating_add(usize::from(d - b'0'));
    let length = value.iter().fold(0, add);
    if length > BODY_MAX { Err(Code::BodyTooLarge) } else { Ok(length) }
}

/// `chunked` alone; another coding that is at least a name is a 501 (RFC 9112, 6.1).
fn chunked_only(codings: &[u8]) -> Result<Framing, Code> {
    if codings.eq_ignore_ascii_case(b"chunked") {
        return Ok(Framing::Chunked);
    }
    let names = || codings.split(|b| *b == b',').map(<[u8]>::trim_ascii);
    let well_formed = names().all(|n| !n.is_empty() && n.iter().all(|b| is_token(*b)));
    let before_last = names().count().saturating_sub(1);
    let chunked_early = names().take(before_last).any(|n| n.eq_ignore_ascii_case(b"chunked"));
    Err(if well_formed && !chunked_early { Code::NotImplemented } else { Code::BadRequest })
}

fn has_member(list: &[u8], member: &[u8]) -> bool {
    list.split(|b| *b == b',').any(|m| m.trim_ascii().eq_ignore_ascii_case(member))
}

/// A request target in origin form, or `*`.
#[derive(Clone, Copy)]
struct Path<'a> {
    /// An absolute form may lack the slash.
    slash: bool,
    rest: &'a str,
}

impl<'a> Path<'a> {
    fn text(self) -> &'a str {
        if self.slash { "/" } else { self.rest }
    }
}

/// RFC 9112, 3.2. The authority of an absolute form is checked and dropped: we serve one site.
fn origin_form<'a>(method: &str, target: &'a str) -> Result<Path<'a>, Code> {
    if method == "CONNECT" {
        return Err(Code::MethodNotAllowed);
    }
    if target.starts_with('/') {
        let fine = is_made_of(target.as_bytes(), is_target);
        return if fine { Ok(Path { slash: false, rest: target }) } else { Err(Code::BadRequest) };
    }
    if target == "*" && method == "OPTIONS" {
        return Ok(Path { slash: false, rest: target });
    }
    absolute_form(method, target).ok_or(Code::BadRequest)
}

fn absolute_form<'a>(method: &str, target: &'a str) -> Option<Path<'a>> {
    let (scheme, rest) = target.split_once("://")?;
    let known = scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https");
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    if !known || !is_host(authority.as_bytes()) || !is_made_of(rest.as_bytes(), is_target) {
        return None;
    }
    Some(match (method, rest.is_empty()) {
        ("OPTIONS", true) => Path { slash: false, rest: "*" },
        _ => Path { slash: !rest.starts_with('/'), rest },
    })
}

/// Whether all of `text` is what `allowed` allows, or a byte in hexadecimal after a percent sign
/// (RFC 3986, 2.1).
fn is_made_of(text: &[u8], allowed: fn(u8) -> bool) -> bool {
    let mut rest = text;
    while let Some((byte, tail)) = rest.split_first() {
        rest = match (byte, tail) {
            (b'%', [a, b, tail @ ..]) if a.is_ascii_hexdigit() && b.is_ascii_hexdigit() => tail,
            _ if allowed(*byte) => tail,
            _ => return false,
        };
    }
    true
}

/// A character of a path or query (RFC 3986, 3.3 and 3.4).
fn is_target(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/?".contains(&byte)
}

/// A character of a registered name or an IPv4 address (RFC 3986, 3.2.2).
fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte)
}

/// A character between the brackets of an IP literal; a zone may follow a percent sign (RFC 6874).
fn is_literal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b".:-_~%".contains(&byte)
}

/// `uri-host [ ":" port ]` (RFC 9110, 7.2). An empty host is no origin that we could be asked for
/// (RFC 9110, 4.2.1).
fn is_host(value: &[u8]) -> bool {
    let (host, port) = match value.strip_prefix(b"[") {
        Some(literal) => match literal.iter().position(|b| *b == b']') {
            Some(end) => literal.split_at(end),
            None => return false,
        },
        None => value.split_at(value.iter().position(|b| *b == b':').unwrap_or(value.len())),
    };
    let in_brackets = port.first() == Some(&b']');
    let port = port.strip_prefix(b"]").unwrap_or(port);
    let port_fine = match port.split_first() {
        None => true,
        Some((colon, digits)) => *colon == b':' && digits.iter().all(u8::is_ascii_digit),
    };
    let allowed = if in_brackets { is_literal } else { is_name };
    port_fine && !host.is_empty() && is_made_of(host, allowed)
}

fn write_request_line(method: &str, path: Path<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(method.as_bytes());
    out.extend_from_slice(if path.slash { b" /" } else { b" " });
    out.extend_from_slice(path.rest.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
}

/// `X-Edge: <request number> <client address>[ <certificate>]`; the client cannot set it, since no
/// field of this name is let through.
fn write_private(
    origin: Origin<'_>,
    certificate: Option<&[u8]>,
    headers: &[Header<'_>],
    out: &mut Vec<u8>,
) {
    let client = match origin.proxies {
        Some(proxies) => proxies.client(origin.peer, values(headers, "X-Forwarded-For")),
        None => origin.peer,
    };
    out.extend_from_slice(b"X-Edge: ");
    push_number(origin.number, out);
    out.push(b' ');
    push_address(client, out);
    if let Some(der) = certificate {
        out.push(b' ');
        out.extend_from_slice(STANDARD.encode(der).as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

fn write_length(framing: Framing, out: &mut Vec<u8>) {
    match framing {
        Framing::Length(0) => {}
        Framing::Length(length) => {
            out.extend_from_slice(b"Content-Length: ");
            push_number(length as u64, out);
            out.extend_from_slice(b"\r\n");
        }
        // `LENGTH_DIGITS` zeros.
        Framing::Chunked => out.extend_from_slice(b"Content-Length: 00000\r\n"),
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends the number in decimal; this runs several times a request, and `fmt` shows there.
pub fn push_number(number: u64, out: &mut Vec<u8>) {
    let start = out.len();
    let mut left = number;
    loop {
        out.push(b'0' + (left % 10) as u8);
        left /= 10;
        if left == 0 {
            break;
        }
    }
    if let Some(digits) = out.get_mut(start..) {
        digits.reverse();
    }
}

fn push_address(address: IpAddr, out: &mut Vec<u8>) {
    match address {
        IpAddr::V4(v4) => {
            for (i, octet) in v4.octets().into_iter().enumerate() {
                if i > 0 {
                    out.push(b'.');
                }
                push_number(octet.into(), out);
            }
        }
        IpAddr::V6(v6) => out.extend_from_slice(v6.to_string().as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Cidr;
    use crate::http::LaneKind;

    fn classify(method: &str, path: &str) -> Class {
        let (lane, client_certificate) = match (method, path) {
            ("POST", "/sign") => (LaneKind::Certificate, false),
            ("POST", "/renew") => (LaneKind::Certificate, true),
            _ => (LaneKind::Plain, false),
        };
        Class { lane, client_certificate, ..Class::PLAIN }
    }

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn parse(head: &str) -> Result<(Head, String), Code> {
        let bytes = head.as_bytes();
        assert_eq!(find_end(bytes, 0)?, Some(bytes.len()), "{head:?}");
        let mut out = Vec::new();
        let origin = Origin { number: 7, peer: PEER, proxies: None, certificate: None, classify };
        let head = read(bytes, origin, &mut out)?;
        Ok((head, String::from_utf8(out).unwrap()))
    }

    #[test]
    fn what_goes_on_is_ours() {
        let (head, out) = parse(
            "POST /sign?x=1 HTTP/1.1\r\nhOsT: a:80\r\nX-Edge: 9 evil\r\nCookie: x\r\n\
             authorization:  Bearer t \r\nContent-Length: 0005\r\nAccept: a\r\n\
             Content-Type: application/json\r\nAccept: b\r\nX-Forwarded-For: 1.1.1.1\r\n\r\n",
        )
        .unwrap();
        assert_eq!(
            out,
            "POST /sign?x=1 HTTP/1.1\r\nAuthorization: Bearer t\r\n\
             Content-Type: application/json\r\nAccept: a, b\r\nX-Edge: 7 192.0.2.1\r\n\
             Content-Length: 5\r\n\r\n"
        );
        assert_eq!(head.framing, Framing::Length(5));
        assert_eq!(head.class.lane, LaneKind::Certificate);
        assert!(head.keep_alive && !head.is_1_0 && !head.is_head);
    }

    #[test]
    fn a_trusted_proxy_names_the_client() {
        let networks = Networks::new(vec![Cidr::parse("192.0.2.0/24").unwrap()]);
        let head = b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.1.1.1, 2001:db8::9\r\n\r\n";
        let mut out = Vec::new();
        let proxies = Some(&networks);
        let origin = Origin { number: 1, peer: PEER, proxies, certificate: None, classify };
        read(head, origin, &mut out).unwrap();
        assert_eq!(out, b"GET / HTTP/1.1\r\nX-Edge: 1 2001:db8::9\r\n\r\n");
    }

    #[test]
    fn a_certificate_goes_on_where_it_is_wanted_only() {
        let private = |target: &str| {
            let head = format!(
                "POST {target} HTTP/1.1\r\nHost: a\r\nX-Edge: 9 ::1 AAAA\r\nX-Edge: x\r\n\r\n"
            );
            let mut out = Vec::new();
            let certificate = Some([1, 2, 3, 4].as_slice());
            let origin = Origin { number: 7, peer: PEER, proxies: None, certificate, classify };
            read(head.as_bytes(), origin, &mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            assert_eq!(text.matches("X-Edge").count(), 1, "{text}");
            text.split_once("X-Edge: ").unwrap().1.trim_end().to_owned()
        };
        assert_eq!(private("/renew"), "7 192.0.2.1 AQIDBA==");
        assert_eq!(private("http://a/renew?x"), "7 192.0.2.1 AQIDBA==");
        assert_eq!(private("/sign"), "7 192.0.2.1");
        assert_eq!(private("/renew/"), "7 192.0.2.1");
    }

    #[test]
    fn targets_become_origin_form() {
        let target = |method: &str, target: &str| {
            let head = format!("{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n");
            parse(&head).map(|(_, out)| out.split(' ').nth(1).unwrap().to_owned())
        };
        for (given, goes_on) in [
            ("/", "/"),
            ("/a?b/c?d", "/a?b/c?d"),
            ("http://h", "/"),
            ("http://h?q", "/?q"),
            ("HTTPS://[::1]:8/x?y", "/x?y"),
        ] {
            assert_eq!(target("GET", given).as_deref(), Ok(goes_on), "{given}");
        }
        assert_eq!(target("OPTIONS", "*").as_deref(), Ok("*"));
        assert_eq!(target("OPTIONS", "http://h:1").as_deref(), Ok("*"));
        assert_eq!(target("CONNECT", "h:1"), Err(Code::MethodNotAllowed));
        for bad in [
            "*",
            "a",
            "h:1",
            "ftp://h/",
            "http://",
            "http:///a",
            "http://:80/",
            "http://u@h/",
            "/a#b",
            "/a|b",
            "/\"",
            "/<",
            "/a\\b",
            "http://h/ä",
            "/ä",
            "/\u{7f}",
            "http://[::1/",
            "http://h:x/",
        ] {
            assert_eq!(target("GET", bad), Err(Code::BadRequest), "{bad}");
        }
    }

    #[test]
    fn hosts_are_checked() {
        let host = |fields: &str| parse(&format!("GET / HTTP/1.1\r\n{fields}\r\n")).map(|_| ());
        for good in ["a", "a:80", "a:", "[::1]", "[::1]:80", "10.0.0.1:3002", "a_b.c-d"] {
            assert_eq!(host(&format!("Host: {good}\r\n")), Ok(()), "{good}");
        }
        for bad in [
            "", ":80", "a%", "a%2", "a%2g", "a b", "a/b", "a:b", "u@a", "a:1:2", "[::1", "[]",
            "[::1]a", "::1", "a?b", "\u{e4}",
        ] {
            assert_eq!(host(&format!("Host: {bad}\r\n")), Err(Code::BadRequest), "{bad}");
        }
        assert_eq!(host(""), Err(Code::BadRequest));
        assert_eq!(host("Host: a\r\nHost: a\r\n"), Err(Code::BadRequest));
        assert!(parse("GET / HTTP/1.0\r\n\r\n").is_ok());
    }

    #[test]
    fn the_end_is_found_however_it_is_cut() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        for seen in 0..head.len() {
            assert_eq!(find_end(&head[..seen], 0), Ok(None));
            assert_eq!(find_end(head, seen), Ok(Some(head.len())), "{seen}");
            assert_eq!(
                find_end(&[head, b"\r\n\r\n\0".as_slice()].concat(), seen),
                Ok(Some(head.len()))
            );
        }
        for bad in ["\n", "a\n", "a\r\r", "a\rb", "a\0", "\x7f", "a\x1b", "\r\n\n"] {
            for seen in 0..bad.len() {
                assert_eq!(find_end(bad.as_bytes(), seen), Err(Code::BadRequest), "{bad:?} {seen}");
            }
        }
        assert_eq!(find_end(&[b'a'; HEAD_MAX - 1], 0), Ok(None));
        assert_eq!(find_end(&[b'a'; HEAD_MAX], 0), Err(Code::HeadersTooLarge));
        let mut longest = vec![b'a'; HEAD_MAX - 4];
        longest.extend_from_slice(b"\r\n\r\n");
        assert_eq!(find_end(&longest, 0), Ok(Some(HEAD_MAX)));
    }

    #[test]
    fn lengths_are_filled_in() {
        let mut whole = Vec::new();
        write_length(Framing::Chunked, &mut whole);
        let head = whole.len();
        whole.extend_from_slice(b"body");
        fill_length(&mut whole, head, BODY_MAX).unwrap();
        assert_eq!(whole, b"Content-Length: 65536\r\n\r\nbody");
        fill_length(&mut whole, head, 4).unwrap();
        assert_eq!(whole, b"Content-Length: 00004\r\n\r\nbody");
    }
}
