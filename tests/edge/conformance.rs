//! RFC 9112 and RFC 9110, rule by rule: what is sent, and the statuses that come back.
//!
//! Each row is sent twice, in one piece and byte by byte, on a connection of its own. The statuses
//! are all that came until the end of the connection: one too many would be a response to smuggled
//! bytes. `/smuggled` must never reach the handler.

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::{Served, serve, statuses, to_end};
use mqtt_publisher_lite::edge::Wait;

/// (section, bytes, statuses). What ends in a request that keeps the connection is ended by the
/// client's end of the stream.
type Row = (&'static str, &'static str, &'static [u16]);

fn check(rows: &[Row]) {
    let served = serve(|s| s.http.max_connections_per_ip = 1024);
    for (section, bytes, expected) in rows {
        let whole = served.exchange_and_end(bytes.as_bytes());
        assert_eq!(statuses(&whole), *expected, "RFC {section}: {bytes:?}\n{whole}");
        let trickled = trickle(&served, bytes.as_bytes());
        assert_eq!(
            statuses(&trickled),
            *expected,
            "RFC {section}, bytewise: {bytes:?}\n{trickled}"
        );
        for text in [whole, trickled] {
            assert!(!text.contains("smuggled"), "RFC {section}: {bytes:?}\n{text}");
            let refused = !expected.is_empty() && expected.iter().all(|s| *s >= 400);
            assert!(!refused || text.contains("\r\nConnection: close\r\n"), "{text}");
            assert!(!refused || text.contains(r#"{"success":false,"error":"#), "{text}");
        }
    }
}

/// One byte per packet, more or less; a refusal may come before the last.
fn trickle(served: &Served, bytes: &[u8]) -> String {
    let mut stream = served.connect();
    stream.set_nodelay(true).unwrap();
    for byte in bytes {
        if stream.write_all(&[*byte]).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
    to_end(&mut stream)
}

#[test]
fn message_format_and_request_line() {
    check(&[
        ("9112 2.1", "GET /x HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("9112 2.2", "\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("9112 2.2", "\r\n\r\n\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("9112 2.2", "\r\n\r\n\r\n\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.2", "\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.2 bare LF", "GET /smuggled HTTP/1.1\nHost: a\n\n", &[400]),
        ("9112 2.2 bare LF", "GET /smuggled HTTP/1.1\r\nHost: a\n\r\n", &[400]),
        ("9112 2.2 bare LF", "GET /smuggled HTTP/1.1\r\nHost: a\r\n\n", &[400]),
        ("9112 2.2 bare CR", "GET /smuggled HTTP/1.1\rHost: a\r\n\r\n", &[400]),
        ("9112 2.2 bare CR", "GET /smuggled HTTP/1.1\r\nHost: a\rX: b\r\n\r\n", &[400]),
        ("9112 2.2 bare CR", "GET /smuggled HTTP/1.1\r\nHost: a\r\r\n\r\n", &[400]),
        ("9112 2.2 white space first", "GET /smuggled HTTP/1.1\r\n Host: a\r\n\r\n", &[400]),
        ("9112 2.2 white space first", " GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 version", "GET /smuggled HTTP/2.0\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 version", "GET /smuggled HTTP/0.9\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 version", "GET /smuggled HTTP/1.2\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 one digit", "GET /smuggled HTTP/1.\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 one digit", "GET /smuggled HTTP/1.x\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 one digit", "GET /smuggled HTTP/1.22\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 version", "GET /smuggled HTTP/1.2 \r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 version", "GET /smuggled HTTP/1.10\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 version", "GET /smuggled HTTP/11\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 case", "GET /smuggled http/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 2.3 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[400]),
        ("9112 3", "GET /smuggled\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3", "GET /smuggled HTTP/1.1 \r\nHost: a\r\n\r\n", &[400]),
        ("9112 3", "GET  /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3", "GET /smuggled  HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3", "GET\t/smuggled\tHTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3", "GET /a /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3", "GET HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3.1 method", "G(T /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3.1 method", "G\u{e4}T /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3.1 any token", "BREW-1 /x HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("9110 9.1 case", "get /x HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("9112 2.2 NUL", "GET /smuggled\0 HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3 garbage", "\x16\x03\x01\x02\0\x01", &[400]),
        ("9112 8 incomplete", "GET /smuggled HTTP/1.1\r\nHost: a\r\n", &[400]),
        ("9112 8 nothing", "", &[]),
    ]);
}

#[test]
fn request_targets() {
    check(&[
        ("9112 3.2.1", "GET /a/b?c=%20/?d HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("9112 3.2.2", "GET http://b/x HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("9112 3.2.2", "GET HTTPS://b:8/x HTTP/1.1\r\nHost: b:8\r\n\r\n", &[200]),
        ("9112 3.2.2", "GET http://b HTTP/1.1\r\nHost: b\r\n\r\n", &[200]),
        ("9112 3.2.2 still Host", "GET http://b/smuggled HTTP/1.1\r\n\r\n", &[400]),
        ("9110 4.2.4 userinfo", "GET http://u@b/smuggled HTTP/1.1\r\nHost: b\r\n\r\n", &[400]),
        ("9110 4.2.1 empty host", "GET http:///smuggled HTTP/1.1\r\nHost: b\r\n\r\n", &[400]),
        ("9112 3.2.2 scheme", "GET ftp://b/smuggled HTTP/1.1\r\nHost: b\r\n\r\n", &[400]),
        ("9112 3.2.3", "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", &[405]),
        ("9112 3.2.3", "GET a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", &[400]),
        ("9112 3.2.4", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("9112 3.2.4", "OPTIONS http://a HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("9112 3.2.4", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9110 7.1 fragment", "GET /smuggled#f HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("3986 2 control", "GET /smuggled\x7f HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("3986 2 not ASCII", "GET /smuggled\u{e4} HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("3986 2 not allowed", "GET /smuggled\"<>^`{|} HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("3986 2.1 percent", "GET /a%2Fb?c=%c3%a4 HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        ("3986 2.1 percent", "GET /smuggled%zz HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("3986 2.1 percent", "GET /smuggled?a=%4 HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("3986 2.1 percent", "GET http://b/smuggled% HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3.2", "GET smuggled HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3.2", "GET ?smuggled HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
    ]);
}

#[test]
fn host() {
    check(&[
        ("9112 3.2", "GET /smuggled HTTP/1.1\r\n\r\n", &[400]),
        ("9112 3.2", "GET /smuggled HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", &[400]),
        ("9112 3.2", "GET /smuggled HTTP/1.1\r\nHost: a\r\nhOST: b\r\n\r\n", &[400]),
        ("9112 3.2", "GET /smuggled HTTP/1.1\r\nHost: a, b/\r\n\r\n", &[400]),
        ("9112 3.2", "GET /smuggled HTTP/1.1\r\nHost: a b\r\n\r\n", &[400]),
        ("9112 3.2", "GET /smuggled HTTP/1.1\r\nHost: a:b\r\n\r\n", &[400]),
        ("9112 3.2", "GET /smuggled HTTP/1.1\r\nHost: http://a\r\n\r\n", &[400]),
        ("9112 3.2", "GET /smuggled HTTP/1.1\r\nHost: u@a\r\n\r\n", &[400]),
        ("9110 7.2 empty", "GET /smuggled HTTP/1.1\r\nHost:\r\n\r\n", &[400]),
        ("9110 7.2 empty", "GET /smuggled HTTP/1.1\r\nHost: \t\r\n\r\n", &[400]),
        ("9110 4.2.1 empty host", "GET /smuggled HTTP/1.1\r\nHost: :3002\r\n\r\n", &[400]),
        ("9110 7.2 empty, 1.0", "GET /smuggled HTTP/1.0\r\nHost:\r\n\r\n", &[400]),
        ("9110 7.2 empty port", "GET /x HTTP/1.1\r\nHost: a:\r\n\r\n", &[200]),
        ("3986 2.1", "GET /x HTTP/1.1\r\nHost: a%2db\r\n\r\n", &[200]),
        ("3986 2.1", "GET /smuggled HTTP/1.1\r\nHost: a%2\r\n\r\n", &[400]),
        ("9110 7.2", "GET /x HTTP/1.1\r\nHost: [2001:db8::1]:3002\r\n\r\n", &[200]),
        ("9112 3.2 HTTP/1.0", "GET /x HTTP/1.0\r\n\r\n", &[200]),
        ("9112 3.2 HTTP/1.0", "GET /smuggled HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", &[400]),
    ]);
}

#[test]
fn fields() {
    check(&[
        ("9112 5", "GET /x HTTP/1.1\r\nHost:a\r\nX:\r\nY: \t b c \t\r\n\r\n", &[200]),
        ("9112 5.1 space before colon", "GET /smuggled HTTP/1.1\r\nHost : a\r\n\r\n", &[400]),
        (
            "9112 5.1 tab before colon",
            "GET /smuggled HTTP/1.1\r\nHost: a\r\nX\t: a\r\n\r\n",
            &[400],
        ),
        ("9112 5.2 obs-fold", "GET /smuggled HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", &[400]),
        ("9112 5.2 obs-fold", "GET /smuggled HTTP/1.1\r\nHost: a\r\nX: a\r\n\tb\r\n\r\n", &[400]),
        ("9110 5.1 no name", "GET /smuggled HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", &[400]),
        ("9110 5.1 no colon", "GET /smuggled HTTP/1.1\r\nHost: a\r\nX\r\n\r\n", &[400]),
        ("9110 5.1 name", "GET /smuggled HTTP/1.1\r\nHost: a\r\nX(y): b\r\n\r\n", &[400]),
        ("9110 5.1 name", "GET /smuggled HTTP/1.1\r\nHost: a\r\nX\u{e4}: b\r\n\r\n", &[400]),
        ("9110 5.5 NUL", "GET /smuggled HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", &[400]),
        ("9110 5.5 control", "GET /smuggled HTTP/1.1\r\nHost: a\r\nX: a\x08b\r\n\r\n", &[400]),
        ("9110 5.5 DEL", "GET /smuggled HTTP/1.1\r\nHost: a\r\nX: a\x7fb\r\n\r\n", &[400]),
        ("9110 5.5 obs-text", "GET /x HTTP/1.1\r\nHost: a\r\nX: \u{e4}\r\n\r\n", &[200]),
        ("ours: goes on", "GET /smuggled HTTP/1.1\r\nHost: a\r\nAccept: \u{e4}\r\n\r\n", &[400]),
        (
            "9110 5.3 singleton",
            "GET /smuggled HTTP/1.1\r\nHost: a\r\nAuthorization: a\r\nAuthorization: b\r\n\r\n",
            &[400],
        ),
        (
            "9110 5.3 singleton",
            "GET /smuggled HTTP/1.1\r\nHost: a\r\nContent-Type: a\r\nContent-Type: a\r\n\r\n",
            &[400],
        ),
        ("9110 5.3 list", "GET /x HTTP/1.1\r\nHost: a\r\nAccept: a\r\nAccept: b\r\n\r\n", &[200]),
        ("9110 5.4 64 fields", fields_of(64), &[200]),
        ("9110 5.4 65 fields", fields_of(65), &[431]),
        ("9110 5.4 8 KiB", head_of(8192), &[200]),
        ("9110 5.4 8 KiB and 1", head_of(8193), &[431]),
    ]);
}

fn fields_of(count: usize) -> &'static str {
    let fields = "X: y\r\n".repeat(count - 1);
    format!("GET /x HTTP/1.1\r\nHost: a\r\n{fields}\r\n").leak()
}

fn head_of(length: usize) -> &'static str {
    let frame = "GET /x HTTP/1.1\r\nHost: a\r\nX: \r\n\r\n";
    frame.replace("X: ", &format!("X: {}", "y".repeat(length - frame.len()))).leak()
}

#[test]
fn content_length() {
    check(&[
        ("9112 6.2", "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", &[200]),
        (
            "9112 6.2 zeros",
            "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0003\r\n\r\nabc",
            &[200],
        ),
        ("9112 6.2 zero", "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", &[200]),
        ("9112 6.3 none", "POST /x HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
        (
            "9112 6.3 on GET",
            "GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 22\r\n\r\nGET /smuggle HTTP/1.1\n",
            &[200],
        ),
        ("9112 6.3", "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc", &[400]),
        ("9112 6.3", "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\nabc", &[400]),
        (
            "9112 6.3",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 0x3\r\n\r\nabc",
            &[400],
        ),
        (
            "9112 6.3",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 3 3\r\n\r\nabc",
            &[400],
        ),
        (
            "9112 6.3",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\nabc",
            &[400],
        ),
        (
            "9112 6.3",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 3;x\r\n\r\nabc",
            &[400],
        ),
        ("9112 6.3", "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\nabc", &[400]),
        (
            "9112 6.3",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 3.0\r\n\r\nabc",
            &[400],
        ),
        (
            "9112 6.3",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: \u{663}\r\n\r\nabc",
            &[400],
        ),
        (
            "9112 6.3 twice",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
            &[400],
        ),
        (
            "9112 6.3 twice",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 9\r\n\r\nabcdefghi",
            &[400],
        ),
        (
            "9112 6.3 overflow",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551615\r\n\r\n",
            &[413],
        ),
        (
            "9112 6.3 overflow",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551617\r\n\r\nx",
            &[413],
        ),
        (
            "9110 15.5.14",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n",
            &[413],
        ),
        (
            "9112 8 short",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nabc",
            &[400],
        ),
    ]);
}

#[test]
fn transfer_encoding() {
    check(&[
        (
            "9112 7.1",
            "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            &[200],
        ),
        (
            "9112 6.1 case",
            "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \tCHUNKED \r\n\r\n0\r\n\r\n",
            &[200],
        ),
        (
            "9112 7.1.1",
            "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;a=\"b\";c\r\nabc\r\n0;d\r\n\r\n",
            &[200],
        ),
        (
            "9112 7.1.2",
            "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 9\r\n\r\n",
            &[200],
        ),
        (
            "9112 6.1 1.0",
            "POST /smuggled HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 6.1 other",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            &[501],
        ),
        (
            "9112 6.1 other",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
            &[501],
        ),
        (
            "9112 6.1 other",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n",
            &[501],
        ),
        (
            "9112 6.1 other",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
            &[501],
        ),
        (
            "9112 6.1 not last",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
            &[400],
        ),
        (
            "9112 6.1 twice",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 6.1 twice",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 6.3 not last",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 6.1 empty",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 6.1",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 6.1",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 6.1",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 6.1 control",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 5.1",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 5.2",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 7.1 size",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            &[400],
        ),
        (
            "9112 7.1 size",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 7.1 size",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
            &[400],
        ),
        (
            "9112 7.1 overflow",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
            &[413],
        ),
        (
            "9112 7.1 overflow",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n",
            &[413],
        ),
        (
            "9112 7.1 bare LF",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 7.1 bare LF",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;\nxx\r\n4c\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 7.1 no CRLF",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
            &[400],
        ),
        (
            "9112 8 short",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
            &[400],
        ),
        (
            "9112 7.1.2 trailer",
            "POST /smuggled HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n X: y\r\n\r\n",
            &[400],
        ),
    ]);
}

/// `chunk-ext = *( BWS ";" BWS chunk-ext-name [ BWS "=" BWS chunk-ext-val ] )`
#[test]
fn chunk_extensions() {
    let row = |extension: &str, status: &'static [u16]| -> Row {
        let path = if status == [200] { "/x" } else { "/smuggled" };
        let text = format!(
            "POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\
             1{extension}\r\nx\r\n0{extension}\r\n\r\n"
        );
        ("9112 7.1.1", text.leak(), status)
    };
    let taken = [
        ";a",
        ";a=b",
        ";a;b=c",
        " \t; a \t= \tb ;c",
        ";a=\"\"",
        ";a=\"b;c=\\\"d\\\\\te\u{e4}\"",
        ";a=\"b\" ;c=\"d\"",
    ];
    // Where the line ends is all that matters, since nothing of it goes on.
    let read_past = [";", ";;a", ";a=", ";a b", ";a=\"b", ";\u{e4}"];
    let refused = [" x", " ", "a", ";a\n", ";a\rb", ";a\0", ";a\x7f"];
    let taken = taken.iter().chain(&read_past).map(|extension| row(extension, &[200]));
    let rows: Vec<Row> = taken.chain(refused.iter().map(|e| row(e, &[400]))).collect();
    check(&rows);
}

#[test]
fn smuggling() {
    const INNER: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    let with = |text: &str| -> &'static str { text.replace("INNER", INNER).leak() };
    check(&[
        // CVE-2026-66752: tiny_http takes any Transfer-Encoding for chunked.
        (
            "9112 6.3 CL.TE",
            with(
                "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 39\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nINNER",
            ),
            &[400],
        ),
        (
            "9112 6.3 TE.CL",
            with(
                "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n22\r\nINNER\r\n0\r\n\r\n",
            ),
            &[400],
        ),
        (
            "9112 6.3 TE.TE",
            with(
                "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\nINNER",
            ),
            &[400],
        ),
        (
            "9112 6.3 TE.TE",
            with(
                "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x\r\nTransfer-encoding: chunked\r\n\r\n0\r\n\r\nINNER",
            ),
            &[400],
        ),
        (
            "9112 6.3 TE.0",
            with(
                "OPTIONS /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n22\r\nINNER\r\n0\r\n\r\n",
            ),
            &[501],
        ),
        (
            "9112 6.3 CL.CL",
            with(
                "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 34\r\n\r\nINNER",
            ),
            &[400],
        ),
        (
            "9112 6.3 CL.0",
            with("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 37\r\n\r\nxx\nINNER")
                .replace("smuggled", "s-------")
                .leak(),
            &[200, 400],
        ),
        (
            "9112 7.1 TERM.EXT",
            with(
                "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;\nxx\r\n22\r\n0\r\n\r\nINNER",
            ),
            &[400],
        ),
        (
            "9112 7.1 EXT.TERM",
            with(
                "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;\rxx\r\n22\r\n0\r\n\r\nINNER",
            ),
            &[400],
        ),
        (
            "9112 9.6 after close",
            with("GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nINNER"),
            &[200],
        ),
        ("9112 9.6 after refusal", with("GET /x HTTP/1.1\r\n\r\nINNER"), &[400]),
        (
            "9110 7.6.1 hop by hop",
            with("GET /x HTTP/1.1\r\nHost: a\r\nConnection: close, Host\r\n\r\nINNER"),
            &[200],
        ),
        // CVE-2026-66753: CR and LF inside a value; here there is no way to send them.
        (
            "9110 5.5 CR in value",
            with("GET /smuggled HTTP/1.1\r\nHost: a\r\nAccept: a\rX-Edge: 1 b\r\n\r\n"),
            &[400],
        ),
    ]);
}

#[test]
fn connections_and_expectations() {
    check(&[
        (
            "9112 9.3 persists",
            "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
            &[200, 200],
        ),
        (
            "9112 9.3.2 pipeline",
            "POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nxHEAD /2 HTTP/1.1\r\nHost: a\r\n\r\nGET /nothing HTTP/1.1\r\nHost: a\r\n\r\nPOST /4 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\nGET /5 HTTP/1.1\r\nHost: a\r\n\r\n",
            &[200, 200, 204, 200, 200],
        ),
        (
            "9112 9.3.2 one is bad",
            "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
            &[200, 400],
        ),
        (
            "9112 9.6",
            "GET /1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
            &[200],
        ),
        ("9112 9.3 1.0", "GET /1 HTTP/1.0\r\n\r\nGET /smuggled HTTP/1.0\r\n\r\n", &[200]),
        (
            "9112 9.3 1.0",
            "GET /1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /2 HTTP/1.0\r\n\r\n",
            &[200, 200],
        ),
        (
            "9112 9.3 both",
            "GET /1 HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, close\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
            &[200],
        ),
        (
            "9110 7.8 upgrade ignored",
            "GET /1 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
            &[200, 200],
        ),
        (
            "9110 10.1.1 early",
            "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 70000\r\nExpect: 100-continue\r\n\r\n",
            &[413],
        ),
        (
            "9110 10.1.1 1.0",
            "POST /x HTTP/1.0\r\nContent-Length: 0\r\nExpect: 100-continue\r\n\r\n",
            &[200],
        ),
        (
            "9110 10.1.1 no body",
            "GET /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n",
            &[200],
        ),
        ("9110 10.1.1 unknown", "GET /x HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n", &[200]),
        ("9110 9.3.2", "HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n", &[200]),
    ]);
}

#[test]
fn nothing_that_was_refused_reaches_the_handler() {
    let served = serve(|s| s.deadlines.set(Wait::KeepAlive, Duration::from_secs(1)));
    for bytes in
        ["GET /smuggled HTTP/1.1\r\n\r\n", "GET /smuggled HTTP/1.1\nHost: a\n\n", "x\r\n\r\n"]
    {
        assert_eq!(statuses(&served.exchange_and_end(bytes.as_bytes())), [400]);
    }
    assert_eq!(served.handled.load(Ordering::Relaxed), 0);
    assert_eq!(served.counters.refused.value(), 3);
}
