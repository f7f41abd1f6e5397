//! The serial number of a certificate (RFC 5280, 4.1.2.2), which is also how a token's mark names the
//! attempt that took it.

use std::fmt;

/// A certificate's serial number as the certificate will carry it: 16 bytes, the first 0x40 to 0x7f
/// (positive and never padded in DER). Drawn before the token is taken, so that the mark names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Serial(pub [u8; 16]);

impl Serial {
    /// Draws 126 random bits.
    ///
    /// # Errors
    /// When the operating system has no random bytes to give.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        bytes[0] = 0x40 | (bytes[0] & 0x3f);
        Ok(Serial(bytes))
    }

    /// Reads 32 hexadecimal digits of either case.
    pub fn from_hex(text: &str) -> Option<Self> {
        let plain = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let value = plain.then(|| u128::from_str_radix(text, 16).ok()).flatten()?;
        Some(Serial(value.to_be_bytes()))
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::UpperHex for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032X}", u128::from_be_bytes(self.0))
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
            assert!((0x40..=0x7f).contains(&serial.0[0]));
            assert_eq!(Serial::from_hex(&format!("{serial:X}")), Some(serial));
        }
        for bad in ["", "+1234567890123456789012345678901", "1", &"f".repeat(33), &"g".repeat(32)] {
            assert_eq!(Serial::from_hex(bad), None);
        }
    }
}
