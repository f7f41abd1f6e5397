//! The name of a device: checked once, where it comes in, and trusted from there on.
//!
//! The alphabet is what an MQTT user name, an MQTT topic level, a file name and an X.509 common
//! name have in common, so that no layer needs to escape it.

use std::fmt;
use std::sync::Arc;

/// 1 to 64 characters of `A-Z a-z 0-9 . _ : -`, but neither `.` nor `..`.
///
/// Cheap to clone. 64 is what an X.509 common name holds (RFC 5280, appendix A: `ub-common-name`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(Arc<str>);

impl DeviceId {
    /// Takes the name as it stands, or `None` if it breaks the rule above.
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
        let fits = (1..=64).contains(&text.len()) && text.bytes().all(allowed);
        (fits && text != "." && text != "..").then(|| DeviceId(text.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_and_the_length() {
        let longest = "x".repeat(64);
        for good in ["a", "device-001", "AA:BB:cc.9_", "...", &longest] {
            assert_eq!(DeviceId::parse(good).as_ref().map(DeviceId::as_str), Some(good));
        }
        let long = "x".repeat(65);
        for bad in ["", ".", "..", " a", "a b", "a/b", "a+", "#", "ä", "a\0", "a\n", "a,b=c", &long]
        {
            assert_eq!(DeviceId::parse(bad), None, "{bad:?}");
        }
    }
}
