//! How fields are written, and what the private field means, to those who write it and who read it.
//!
//! `X-Edge: <request number>[j] <client address>[ <certificate>]` goes down a lane with each request: the
//! `j` stands for `Content-Type: application/json`, since `tiny_http` reads a head byte by byte, at 250
//! instructions each; the certificate is DER in base64. A client cannot set it, since no field of this
//! name is let through.

use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// The name of the private field.
pub const PRIVATE: &str = "X-Edge";
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

/// Writes the private field; without a sender the edge itself asks.
pub fn push_private(number: u64, sender: Option<Sender<&[u8]>>, out: &mut Vec<u8>) {
    out.extend_from_slice(PRIVATE.as_bytes());
    out.extend_from_slice(b": ");
    push_number(number, out);
    if sender.is_some_and(|sender| sender.is_json) {
        out.push(IS_JSON as u8);
    }
    out.push(b' ');
    match sender.map(|sender| sender.address) {
        None => out.extend_from_slice(NOBODY.as_bytes()),
        Some(IpAddr::V4(v4)) => push_ipv4(v4.octets(), out),
        Some(IpAddr::V6(v6)) => out.extend_from_slice(v6.to_string().as_bytes()),
    }
    if let Some(der) = sender.and_then(|sender| sender.certificate) {
        out.push(b' ');
        out.extend_from_slice(STANDARD.encode(der).as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

/// Reads the private field's value: the request's number, and who sent it. Only the edge can connect to
/// a lane, so it is always well formed; an answer to number 0 would have no effect.
pub fn read_private(value: &str) -> (u64, Option<Sender<Vec<u8>>>) {
    let mut parts = value.split(' ');
    let number = parts.next().unwrap_or_default();
    let (number, is_json) = match number.strip_suffix(IS_JSON) {
        Some(number) => (number, true),
        None => (number, false),
    };
    let number = number.parse().unwrap_or(0);
    let address = parts.next().and_then(|address| address.parse().ok());
    let certificate = parts.next().and_then(|text| STANDARD.decode(text).ok());
    (number, address.map(|address| Sender { address, is_json, certificate }))
}

/// Appends a field.
pub fn push_field(name: &str, value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Appends `Content-Length`.
pub fn push_length(length: usize, out: &mut Vec<u8>) {
    out.extend_from_slice(b"Content-Length: ");
    push_number(length as u64, out);
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

fn push_ipv4(octets: [u8; 4], out: &mut Vec<u8>) {
    for (i, octet) in octets.into_iter().enumerate() {
        if i > 0 {
            out.push(b'.');
        }
        push_number(octet.into(), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for (number, sender, written) in [
            (7, None, "7 -"),
            (u64::MAX, Some(("10.0.255.1", true, None)), "18446744073709551615j 10.0.255.1"),
            (10, Some(("2001:db8::9", false, Some([1, 2, 3, 4]))), "10 2001:db8::9 AQIDBA=="),
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
            push_private(number, lent, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), format!("X-Edge: {written}\r\n"));
            let owned = sender.map(|sender| Sender {
                address: sender.address,
                is_json: sender.is_json,
                certificate: sender.certificate.map(Vec::from),
            });
            assert_eq!(read_private(written), (number, owned));
        }
        assert_eq!(read_private(""), (0, None));
    }
}
