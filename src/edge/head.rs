//! The head of a request: found, held against RFC 9112 and RFC 9110, and written anew.
//!
//! `httparse` splits the lines; what it forgives (bare LF, any byte above ASCII) is refused here,
//! and so is everything that two servers may frame differently. What goes on to the lane is not
//! the client's text but ours: request line, an allow-list of fields, one `Content-Length`.

use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::net::IpAddr;

use httparse::{Header, Request};

use super::chunked::is_token;
use super::fields::{JSON, Sender, push_field, push_length, push_request_line};
use super::proxies;
use super::settings::{BODY_MAX, FIELDS_MAX, HEAD_MAX};
use crate::config::Cidr;
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
    pub is_method_head: bool,
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

/// What the edge knows of a request before its head is read, most of it for the private part.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The number by which the lane's answer is known again.
    pub number: u64,
    /// The address of the peer.
    pub peer: IpAddr,
    /// The trusted proxies, if the peer is one of them.
    pub proxies: Option<&'a [Cidr]>,
    /// It comes over TLS.
    pub is_encrypted: bool,
    /// The certificate whose key the peer holds, in DER.
    pub certificate: Option<&'a [u8]>,
    /// Tells where its requests go.
    pub classify: Classify,
}

/// Looks for the end of the head in `buf`, of which `seen` bytes were looked at before.
///
/// Returns the length of the head with its empty line, or `None` if that is still to come.
/// `BadRequest` as soon as a byte is there that no head may hold.
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
            // The byte before the first one searched is not known here; the last call has judged the pair.
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
/// With chunked framing the end of the head is left out, see [`finish`]: the length is not known yet.
pub fn read(buf: &[u8], context: Context<'_>, out: &mut Vec<u8>) -> Result<Head, Code> {
    let mut space = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut request = Request::new(&mut []);
    match request.parse_with_uninit_headers(buf, &mut space) {
        Ok(httparse::Status::Complete(n)) if n == buf.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err(Code::HeadersTooLarge),
        _ => return Err(Code::BadRequest),
    }
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(Code::BadRequest);
    };
    let (headers, is_1_0) = (&*request.headers, version == 0);
    check_host(headers, is_1_0)?;
    let target = origin_form(method, target)?;
    let class = (context.classify)(method, path_of(&target));
    if class.https_only && !context.is_encrypted {
        return Err(Code::NotFound);
    }
    let framing = framing(headers, is_1_0)?;
    let media_type = single(headers, "Content-Type")?;
    let is_json = media_type.is_some_and(|value| value.eq_ignore_ascii_case(JSON.as_bytes()));
    let sender = sender(context, class, is_json, headers);
    push_request_line(method, context.number, Some(sender), &target, out);
    write_allowed(headers, media_type.filter(|_| !is_json), out)?;
    if let Framing::Length(length) = framing {
        finish(length, out);
    }
    let says = |name, member| values(headers, name).any(|value| has_member(value, member));
    Ok(Head {
        framing,
        class,
        is_method_head: method == "HEAD",
        is_1_0,
        keep_alive: !says("Connection", "close") && (!is_1_0 || says("Connection", "keep-alive")),
        expects_continue: !is_1_0 && expects_continue(headers),
    })
}

/// What the request line alone tells of an incomplete or malformed head: enough to refuse it in the
/// right form. `None` where there is no whole request line.
pub fn begun(buf: &[u8], classify: Classify) -> Option<Head> {
    let line = buf.trim_ascii_start().split(|b| *b == b'\r').next()?;
    let (method, rest) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    let target = origin_form(method, rest.split(' ').next()?).ok()?;
    Some(Head {
        framing: Framing::Length(0),
        class: classify(method, path_of(&target)),
        is_method_head: method == "HEAD",
        is_1_0: false,
        keep_alive: false,
        expects_continue: false,
    })
}

fn path_of(target: &str) -> &str {
    target.split_once('?').map_or(target, |(path, _)| path)
}

/// Writes the end of a head, with the length of the body.
pub fn finish(length: usize, out: &mut Vec<u8>) {
    if length > 0 {
        push_length(length, out);
    }
    out.extend_from_slice(b"\r\n");
}

/// The values of all fields of this name.
fn values<'h, 'b>(headers: &'h [Header<'b>], name: &'h str) -> impl Iterator<Item = &'b [u8]> + 'h {
    headers.iter().filter(move |h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value)
}

/// The value of the only field of this name. A second would leave open which of the two counts, here
/// and behind us.
fn single<'b>(headers: &[Header<'b>], name: &str) -> Result<Option<&'b [u8]>, Code> {
    let mut values = values(headers, name);
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        (_, Some(_)) => Err(Code::BadRequest),
    }
}

fn check_host(headers: &[Header<'_>], is_1_0: bool) -> Result<(), Code> {
    let is_fine = single(headers, "Host")?.map_or(is_1_0, is_host);
    if is_fine { Ok(()) } else { Err(Code::BadRequest) }
}

/// RFC 9112, 6.3, without the cases in which it lets a server guess.
fn framing(headers: &[Header<'_>], is_1_0: bool) -> Result<Framing, Code> {
    match (single(headers, "Content-Length")?, single(headers, "Transfer-Encoding")?) {
        (Some(_), Some(_)) => Err(Code::BadRequest),
        (None, Some(_)) if is_1_0 => Err(Code::BadRequest),
        (None, Some(codings)) => chunked_only(codings),
        (Some(length), None) => content_length(length).map(Framing::Length),
        (None, None) => Ok(Framing::Length(0)),
    }
}

fn expects_continue(headers: &[Header<'_>]) -> bool {
    values(headers, "Expect").any(|value| value.eq_ignore_ascii_case(b"100-continue"))
}

/// Writes the fields of the client that go on.
fn write_allowed(
    headers: &[Header<'_>],
    media_type: Option<&[u8]>,
    out: &mut Vec<u8>,
) -> Result<(), Code> {
    for (name, value) in
        [("Authorization", single(headers, "Authorization")?), ("Content-Type", media_type)]
    {
        if let Some(value) = value {
            push_field(name, ascii(value)?, out);
        }
    }
    // Several `Accept` fields are one list (RFC 9110, 5.2). `*/*` is left out: it accepts everything.
    let accept = values(headers, "Accept").filter(|value| *value != b"*/*").map(ascii);
    let accept: Vec<&[u8]> = accept.collect::<Result<_, _>>()?;
    if !accept.is_empty() {
        push_field("Accept", &accept.join(b", ".as_slice()), out);
    }
    Ok(())
}

/// Refuses what is not ASCII: `tiny_http` would close the lane's connection without a word.
fn ascii(value: &[u8]) -> Result<&[u8], Code> {
    if value.is_ascii() { Ok(value) } else { Err(Code::BadRequest) }
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

fn has_member(list: &[u8], member: &str) -> bool {
    list.split(|b| *b == b',').any(|m| m.trim_ascii().eq_ignore_ascii_case(member.as_bytes()))
}

/// The request target in context form, or `*` (RFC 9112, 3.2).
fn origin_form<'a>(method: &str, target: &'a str) -> Result<Cow<'a, str>, Code> {
    if method == "CONNECT" {
        return Err(Code::MethodNotAllowed);
    }
    if target == "*" && method == "OPTIONS" {
        return Ok(target.into());
    }
    let (is_bare, rest) = match target.starts_with('/') {
        true => (false, target),
        false => without_authority(target).ok_or(Code::BadRequest)?,
    };
    match (method, rest) {
        _ if !is_made_of(rest.as_bytes(), is_target) => Err(Code::BadRequest),
        ("OPTIONS", "") => Ok("*".into()),
        _ if is_bare => Ok(format!("/{rest}").into()),
        _ => Ok(rest.into()),
    }
}

/// What follows the authority in an absolute form, and whether it lacks the slash. The authority is
/// checked and dropped: we serve one site.
fn without_authority(target: &str) -> Option<(bool, &str)> {
    let (scheme, rest) = target.split_once("://")?;
    let is_known = scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https");
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    (is_known && is_host(authority.as_bytes())).then_some((!rest.starts_with('/'), rest))
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

/// `uri-host [ ":" port ]` (RFC 9110, 7.2). An empty host is no context that we could be asked for
/// (RFC 9110, 4.2.1).
fn is_host(value: &[u8]) -> bool {
    let colon = value.iter().rposition(|b| *b == b':').filter(|_| !value.ends_with(b"]"));
    let (host, port) = value.split_at(colon.unwrap_or(value.len()));
    let literal = host.strip_prefix(b"[").and_then(|host| host.strip_suffix(b"]"));
    let is_host = match literal {
        Some(literal) => !literal.is_empty() && is_made_of(literal, is_literal),
        None => !host.is_empty() && is_made_of(host, is_name),
    };
    is_host && port.iter().skip(1).all(u8::is_ascii_digit)
}

fn sender<'a>(
    context: Context<'a>,
    class: Class,
    is_json: bool,
    headers: &[Header<'_>],
) -> Sender<&'a [u8]> {
    let address = match context.proxies {
        Some(proxies) => proxies::client(proxies, context.peer, values(headers, "X-Forwarded-For")),
        None => context.peer,
    };
    let certificate = context.certificate.filter(|_| class.client_certificate);
    Sender { address, is_json, certificate }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::lanes::{CERTIFICATE, PLAIN};

    fn classify(method: &str, path: &str) -> Class {
        let (lane, client_certificate) = match (method, path) {
            ("POST", "/sign") => (CERTIFICATE, false),
            ("POST", "/renew") => (CERTIFICATE, true),
            _ => (PLAIN, false),
        };
        let https_only = path.starts_with("/secure/");
        Class { lane, client_certificate, https_only, ..Class::PLAIN }
    }

    const ORIGIN: Context<'static> = Context {
        number: 7,
        peer: IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)),
        proxies: None,
        is_encrypted: false,
        certificate: None,
        classify,
    };

    fn parse(head: &str) -> Result<(Head, String), Code> {
        let bytes = head.as_bytes();
        assert_eq!(find_end(bytes, 0)?, Some(bytes.len()), "{head:?}");
        let mut out = Vec::new();
        let head = read(bytes, ORIGIN, &mut out)?;
        Ok((head, String::from_utf8(out).unwrap()))
    }

    #[test]
    fn what_goes_on_is_ours() {
        let (head, out) = parse(
            "POST /sign?x=1 HTTP/1.1\r\nhOsT: a:80\r\nX-Edge: 9\r\nCookie: x\r\n\
             authorization:  Bearer t \r\nContent-Length: 0005\r\nAccept: a\r\n\
             Content-Type: Application/json\r\nAccept: b\r\nAccept: */*\r\nX-Forwarded-For: 1.1.1.1\r\n\r\n",
        )
        .unwrap();
        assert_eq!(
            out,
            "POST 7j,192.0.2.1,,/sign?x=1 HTTP/1.1\r\nAuthorization: Bearer t\r\n\
             Accept: a, b\r\nContent-Length: 5\r\n\r\n"
        );
        assert_eq!(head.framing, Framing::Length(5));
        assert_eq!(head.class.lane, CERTIFICATE);
        assert!(head.keep_alive && !head.is_1_0 && !head.is_method_head);
    }

    #[test]
    fn a_trusted_proxy_names_the_client() {
        let networks = [Cidr::parse("192.0.2.0/24").unwrap()];
        let head = b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.1.1.1, 2001:db8::9\r\n\r\n";
        let mut out = Vec::new();
        let proxies = Some(networks.as_slice());
        let context = Context { proxies, ..ORIGIN };
        read(head, context, &mut out).unwrap();
        assert_eq!(out, b"GET 7,2001:db8::9,,/ HTTP/1.1\r\n\r\n");
    }

    #[test]
    fn a_certificate_goes_on_where_it_is_wanted_only() {
        let private = |target: &str| {
            let head = format!("POST {target} HTTP/1.1\r\nHost: a\r\n\r\n");
            let mut out = Vec::new();
            let certificate = Some([1, 2, 3, 4].as_slice());
            let context = Context { certificate, ..ORIGIN };
            read(head.as_bytes(), context, &mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            text.split(' ').nth(1).unwrap().to_owned()
        };
        assert_eq!(private("/renew"), "7,192.0.2.1,AQIDBA==,/renew");
        assert_eq!(private("http://a/renew?x"), "7,192.0.2.1,AQIDBA==,/renew?x");
        assert_eq!(private("/sign?9,::1,AAAA,"), "7,192.0.2.1,,/sign?9,::1,AAAA,");
        assert_eq!(private("/renew/"), "7,192.0.2.1,,/renew/");
    }

    #[test]
    fn what_is_for_https_only_is_not_read_without() {
        for (framing, encrypted) in [
            ("Content-Length: 3", Ok(Framing::Length(3))),
            ("Content-Length: 65537", Err(Code::BodyTooLarge)),
            ("Transfer-Encoding: gzip", Err(Code::NotImplemented)),
            ("Content-Length: x", Err(Code::BadRequest)),
        ] {
            let head = format!("POST /secure/x HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n");
            let read = |is_encrypted| {
                let context = Context { is_encrypted, ..ORIGIN };
                read(head.as_bytes(), context, &mut Vec::new()).map(|head| head.framing)
            };
            assert_eq!((read(false), read(true)), (Err(Code::NotFound), encrypted), "{framing}");
        }
    }

    #[test]
    fn a_request_line_says_how_to_refuse_the_rest() {
        let manner = |buf: &[u8]| {
            begun(buf, classify).map(|head| (head.class.https_only, head.is_method_head))
        };
        for (line, expected) in [
            ("GET /secure/x HTTP/1.1\r\nHost", Some((true, false))),
            ("\r\nHEAD https://a/secure/x?y HTTP/1.1", Some((true, true))),
            ("POST /secure/", Some((true, false))),
            ("POST /secur", Some((false, false))),
            ("POST", None),
            ("\r\n", None),
            ("", None),
            ("CONNECT a:1 HTTP/1.1", None),
        ] {
            assert_eq!(manner(line.as_bytes()), expected, "{line:?}");
        }
    }

    #[test]
    fn targets_become_origin_form() {
        let target = |method: &str, target: &str| {
            let head = format!("{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n");
            let private =
                |line: String| line.split(' ').nth(1)?.splitn(4, ',').nth(3).map(str::to_owned);
            parse(&head).map(|(_, out)| private(out).unwrap())
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
}
