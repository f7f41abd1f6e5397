//! The serial number of a certificate (RFC 5280, 4.1.2.2), which is also how a token's mark names the
//! attempt that took it.

use std::fmt;

use crate::digits::hex;

/// The most octets that a serial number has (RFC 5280, 4.1.2.2).
const OCTETS: usize = 20;

/// A certificate's serial number. Those that are drawn here have 16 bytes, the first 0x40 to 0x7f
/// (positive and never padded in DER); others, of a CA that was another program's before, may have
/// any length up to 20 and be negative.
///
/// Held as a two's complement number of 20 bytes, so that each number has one form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Serial([u8; OCTETS]);

impl Serial {
    /// Draws 126 random bits. To be done before the token is taken, so that the mark names it.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        bytes[0] = 0x40 | (bytes[0] & 0x3f);
        Ok(Serial::from(bytes))
    }

    /// Reads pairs of hexadecimal digits of either case, with a `-` before a negative number, as
    /// OpenSSL writes them.
    pub fn from_hex(text: &str) -> Option<Self> {
        let (digits, negative) = text.strip_prefix('-').map_or((text, false), |t| (t, true));
        let fits = (2..=2 * OCTETS).contains(&digits.len()) && digits.len().is_multiple_of(2);
        fits.then_some(())?;
        let digit = |b: u8| b.is_ascii_hexdigit().then_some((b & 15) + 9 * (b >> 6));
        let mut bytes = [0; OCTETS];
        for (byte, pair) in bytes.iter_mut().rev().zip(digits.as_bytes().rchunks(2)) {
            let [high, low] = pair else { return None };
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        let serial = Serial(if negative { negated(bytes) } else { bytes });
        // Of 160 bits one is the sign.
        let is_zero = bytes == [0; OCTETS];
        (serial.is_negative() == (negative && !is_zero)).then_some(serial)
    }

    /// Reads the content of a DER INTEGER.
    pub fn from_der(content: &[u8]) -> Option<Self> {
        let sign = if *content.first()? & 0x80 == 0 { 0 } else { 0xff };
        let spare = content.len().saturating_sub(OCTETS);
        let (padding, rest) = content.split_at(spare);
        let mut bytes = [sign; OCTETS];
        bytes.get_mut(OCTETS - rest.len()..)?.copy_from_slice(rest);
        let serial = Serial(bytes);
        let fits = padding.iter().all(|b| *b == sign) && serial.is_negative() == (sign != 0);
        fits.then_some(serial)
    }

    /// The content of the DER INTEGER: no more octets than it takes.
    pub fn der(&self) -> &[u8] {
        let sign = if self.is_negative() { 0xff } else { 0 };
        let spare = |pair: &&[u8]| matches!(pair, [a, b] if *a == sign && (a ^ b) & 0x80 == 0);
        let spare = self.0.windows(2).take_while(spare).count();
        self.0.get(spare..).unwrap_or_default()
    }

    fn is_negative(&self) -> bool {
        self.0[0] & 0x80 != 0
    }

    /// Sign, and pairs of hexadecimal digits without leading zeros.
    fn write(&self, f: &mut fmt::Formatter<'_>, upper: bool) -> fmt::Result {
        let magnitude = if self.is_negative() { negated(self.0) } else { self.0 };
        let zeros = magnitude.iter().take(OCTETS - 1).take_while(|b| **b == 0).count();
        if self.is_negative() {
            f.write_str("-")?;
        }
        let mut digits = hex(magnitude.get(zeros..).unwrap_or_default());
        if upper {
            digits.make_ascii_uppercase();
        }
        f.write_str(&digits)
    }
}

/// A positive number: what is drawn here.
impl From<[u8; 16]> for Serial {
    fn from(magnitude: [u8; 16]) -> Self {
        let mut bytes = [0; OCTETS];
        bytes[OCTETS - 16..].copy_from_slice(&magnitude);
        Serial(bytes)
    }
}

fn negated(bytes: [u8; OCTETS]) -> [u8; OCTETS] {
    let mut carry = true;
    let mut negated = bytes.map(|b| !b);
    for byte in negated.iter_mut().rev() {
        (*byte, carry) = byte.overflowing_add(u8::from(carry));
    }
    negated
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, false)
    }
}

impl fmt::UpperHex for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, true)
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_are_positive_and_have_no_padding() {
        for _ in 0..1000 {
            let serial = Serial::random().unwrap();
            assert!(serial.der().len() == 16 && (0x40..=0x7f).contains(&serial.der()[0]));
            assert_eq!(Serial::from_hex(&format!("{serial:X}")), Some(serial));
        }
        for bad in ["", "-", "+1", "1", "123", "--12", "1-", &"f".repeat(33), &"g".repeat(32)] {
            assert_eq!(Serial::from_hex(bad), None, "{bad}");
        }
    }

    #[test]
    fn those_of_others() {
        let long = "7f".repeat(20);
        let least = format!("-80{}", "00".repeat(19));
        for (hex, der) in [
            ("00", &[0][..]),
            ("01", &[1]),
            ("7f", &[0x7f]),
            ("80", &[0, 0x80]),
            ("0100", &[1, 0]),
            ("-01", &[0xff]),
            ("-80", &[0x80]),
            ("-81", &[0xff, 0x7f]),
            ("-0100", &[0xff, 0]),
            (&long, &[0x7f; 20]),
            (&least, &[&[0x80][..], &[0; 19]].concat()),
        ] {
            let serial = Serial::from_hex(hex).unwrap_or_else(|| panic!("{hex}"));
            assert_eq!((serial.der(), &*serial.to_string()), (der, hex));
            assert_eq!(Serial::from_der(der), Some(serial), "{hex}");
            assert_eq!(Serial::from_hex(&hex.to_uppercase()), Some(serial), "{hex}");
        }
        // Padding that DER does not allow, but that some wrote.
        assert_eq!(Serial::from_der(&[0, 0, 1]), Serial::from_hex("01"));
        assert_eq!(Serial::from_der(&[0; 30]), Serial::from_hex("00"));
        assert_eq!(Serial::from_hex("-00"), Serial::from_hex("00"));
        for bad in [&[][..], &[1; 21], &[&[0][..], &[0x80; 20]].concat()] {
            assert_eq!(Serial::from_der(bad), None, "{bad:?}");
        }
        let too_long = ["80".repeat(20), format!("-{}", "81".repeat(20)), "01".repeat(21)];
        too_long.iter().for_each(|hex| assert_eq!(Serial::from_hex(hex), None, "{hex}"));
    }
}
