//! A value that must not be seen: no log, error or debug output can show it by accident.

use std::fmt;

use hmac::Mac as _;

use super::vars::BYTE_ORDER_MARK;
use crate::mac::keyed;

/// A password or key. `Debug` shows that it is there, never what it is.
#[derive(Clone)]
pub struct Secret<T = String>(T);

impl<T: AsRef<[u8]>> Secret<T> {
    pub fn new(value: T) -> Self {
        Secret(value)
    }

    /// The value itself, for the one place that needs it.
    pub fn reveal(&self) -> &T {
        &self.0
    }

    /// Compares with what a client sent. How long it takes depends on the length of `given`, which
    /// the client knows, and not on where the two differ.
    pub fn matches(&self, given: &[u8]) -> bool {
        // SECURITY: `==` of two `CtOutput`s is constant-time; the bytes themselves must not be
        // compared. Keyed with the secret, so that a client cannot choose what is compared.
        let tag = |of| keyed(self.0.as_ref()).chain_update(of).finalize();
        tag(given) == tag(self.0.as_ref())
    }
}

/// What a file holds of a secret. Some editors begin a file with a byte order mark; editors and
/// `echo` end one with a newline. Neither is a part of it.
pub(super) fn of_file(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    if bytes.ends_with(b"\n") {
        bytes.pop();
        if bytes.ends_with(b"\r") {
            bytes.pop();
        }
    }
    bytes
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(set)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_only_itself_and_never_shows() {
        let secret = Secret::new("correct horse battery".to_owned());
        assert!(secret.matches(b"correct horse battery"));
        for other in ["", "correct horse batterx", "correct horse batter", "correct horse battery "]
        {
            assert!(!secret.matches(other.as_bytes()), "{other:?}");
        }
        assert_eq!(format!("{secret:?}"), "(set)");
        assert_eq!(secret.reveal(), "correct horse battery");
    }
}
