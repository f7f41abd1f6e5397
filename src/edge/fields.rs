//! How fields are written, and what the edge tells a worker of a request beside what the client has
//! sent, to those who write it and who read it.
//!
//! That is the private part, and stands before the target in the request line that goes down a lane:
//! `POST <request number>[j],<client address>,[<certificate>],<target> HTTP/1.1`. The `j` stands for
//! `Content-Type: application/json`, and a field of its own would be longer: `tiny_http` reads a head
//! byte by byte, at 150 instructions each. The certificate is DER in base64. A client cannot write any
//! of it: what it has sent begins behind the third comma.

use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::digits;

/// Stands behind the number for [`JSON`].
const IS_JSON: char = 'j';
/// The media type that most bodies have.
pub const JSON: &str = "application/json";
/// Stands there in place of a client's address when the edge itself asks whether the lane works.
const NOBODY: &str = "-";

/// Who sent a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender<C> {
    /// The client's address.
    pub address: IpAddr,
    /// The request's body is [`JSON`].
    pub is_json: bool,
    /// The certificate whose key it holds, in DER, where that is wanted.
    pub certificate: Option<C>,
}

/// Writes a request line; without a sender the edge itself asks.
pub fn push_request_line(
    method: &str,
    number: u64,
    sender: Option<Sender<&[u8]>>,
    target: &str,
    out: &mut Vec<u8>,
) {
    out.extend_from_slice(method.as_bytes());
    out.push(b' ');
    push_number(number, out);
    if sender.is_some_and(|sender| sender.is_json) {
        out.push(IS_JSON as u8);
    }
    out.push(b',');
    match sender.map(|sender| sender.address) {
        None => out.extend_from_slice(NOBODY.as_bytes()),
        Some(address) => out.extend_from_slice(digits::address(address).as_bytes()),
    }
    out.push(b',');
    if let Some(der) = sender.and_then(|sender| sender.certificate) {
        out.extend_from_slice(STANDARD.encode(der).as_bytes());
    }
    out.push(b',');
    out.extend_from_slice(target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
}

/// Reads what [`push_request_line`] has made of the target: the request's number, who sent it, and the
/// target. Only the edge can connect to a lane, so it is always well formed; an answer to number 0
/// would have no effect.
pub fn read_private(written: &str) -> (u64, Option<Sender<Vec<u8>>>, &str) {
    let mut parts = written.splitn(4, ',');
    let mut part = || parts.next().unwrap_or_default();
    let (number, address, certificate, target) = (part(), part(), part(), part());
    let (number, is_json) = match number.strip_suffix(IS_JSON) {
        Some(number) => (number, true),
        None => (number, false),
    };
    let number = number.parse().unwrap_or(0);
    let certificate = Some(certificate).filter(|text| !text.is_empty());
    let certificate = certificate.and_then(|text| STANDARD.decode(text).ok());
    let sender = address.parse().ok().map(|address| Sender { address, is_json, certificate });
    (number, sender, target)
}

pub fn push_field(name: &str, value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

pub fn push_length(length: usize, out: &mut Vec<u8>) {
    out.extend_from_slice(b"Content-Length: ");
    push_number(length as u64, out);
    out.extend_from_slice(b"\r\n");
}

/// Appends the number in decimal.
pub fn push_number(number: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(digits::decimal_bytes(number, &mut [0; 20]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for (number, sender, target, written) in [
            (7, None, "*", "7,-,,*"),
            (
                u64::MAX,
                Some(("10.0.255.1", true, None)),
                "/",
                "18446744073709551615j,10.0.255.1,,/",
            ),
            (
                10,
                Some(("2001:db8::9", false, Some([1, 2, 3, 4]))),
                "/x,1?a=b,c",
                "10,2001:db8::9,AQIDBA==,/x,1?a=b,c",
            ),
        ] {
            let sender = sender.map(|(address, is_json, certificate)| Sender {
                address: address.parse().unwrap(),
                is_json,
                certificate,
            });
            let lent = sender.as_ref().map(|sender| Sender {
                address: sender.address,
                is_json: sender.is_json,
                certificate: sender.certificate.as_ref().map(<[u8; 4]>::as_slice),
            });
            let mut out = Vec::new();
            push_request_line("PUT", number, lent, target, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), format!("PUT {written} HTTP/1.1\r\n"));
            let owned = sender.map(|sender| Sender {
                address: sender.address,
                is_json: sender.is_json,
                certificate: sender.certificate.map(Vec::from),
            });
            assert_eq!(read_private(written), (number, owned, target));
        }
        assert_eq!(read_private(""), (0, None, ""));
    }
}
