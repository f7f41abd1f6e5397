//! Numbers as digits, by hand: they are written several times a request, and `fmt` shows there.

use std::net::IpAddr;

/// The digits of `number`, written at the end of `buffer`, which holds those of any.
pub fn decimal(number: u64, buffer: &mut [u8; 20]) -> &str {
    std::str::from_utf8(decimal_bytes(number, buffer)).unwrap_or_default()
}

/// The same as bytes.
pub fn decimal_bytes(mut number: u64, buffer: &mut [u8; 20]) -> &[u8] {
    let mut first = buffer.len();
    for digit in buffer.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        first -= 1;
        if number == 0 {
            break;
        }
    }
    buffer.get(first..).unwrap_or_default()
}

/// An address as `Display` writes it.
pub fn address(address: IpAddr) -> String {
    let IpAddr::V4(v4) = address else { return address.to_string() };
    let mut text = String::with_capacity(15);
    for (at, octet) in v4.octets().into_iter().enumerate() {
        text.push_str(if at > 0 { "." } else { "" });
        text.push_str(decimal(octet.into(), &mut [0; 20]));
    }
    text
}

/// Two lower-case hexadecimal digits for each byte.
pub fn hex(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from(half + if half < 10 { b'0' } else { b'a' - 10 });
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        text.push(digit(byte >> 4));
        text.push(digit(byte & 15));
    }
    text
}

/// Reads what [`hex`] writes of so many bytes.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let is_lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let fits = text.len() == 2 * N && text.bytes().all(is_lower);
    let digit = |b: &u8| (b & 15) + 9 * (b >> 6);
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = pair.iter().fold(0, |byte, b| byte << 4 | digit(b));
    }
    fits.then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_by_the_standard_library() {
        for number in [0, 9, 10, 1_234_567_890, u64::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string());
        }
        for written in ["0.0.0.0", "10.0.255.1", "::", "2001:db8::9", "::ffff:1.2.3.4"] {
            assert_eq!(address(written.parse().unwrap()), written);
        }
        assert_eq!(hex(&[0x00, 0x9a, 0xbc, 0xff]), "009abcff");
        assert_eq!(hex(&[]), "");
        assert_eq!(from_hex("009abcff"), Some([0x00, 0x9a, 0xbc, 0xff]));
        for bad in ["009abcf", "009abcff0", "009aBcff", "009abcfg", "009abc\u{e4}"] {
            assert_eq!(from_hex::<4>(bad), None, "{bad}");
        }
    }
}
