//! The seal on what instances leave for each other in Redis: HMAC-SHA256, cut to 16 bytes.
//!
//! Whoever can write to Redis must not be able to unblock, enrol or revoke a device. So each value
//! carries a code over the names under which it stands and all that it says, under a key that only
//! instances of one CA can derive. A value whose code is wrong counts as absent.

use std::fmt;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// 128 bits: nobody can try out that many, and a row stays short (RFC 2104, section 5).
const CODE_BYTES: usize = 16;
/// Keeps this key apart from any other that may be derived from the same secret.
const PURPOSE: &[u8] = b"mqtt-publisher-lite: values shared through Redis, 1";

#[derive(Clone)]
pub struct MacKey(Hmac<Sha256>);

impl fmt::Debug for MacKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MacKey")
    }
}

impl MacKey {
    /// Derives the key from a secret that all instances share.
    pub fn derive(secret: &[u8]) -> Self {
        MacKey(keyed(&hkdf(&[], secret, PURPOSE)))
    }

    /// `value` as it may stand under `field` of the hash `key`.
    pub fn seal(&self, key: &str, field: &[u8], mut value: Vec<u8>) -> Vec<u8> {
        let code = self.over(key, field, &value).finalize().into_bytes();
        value.extend(code.iter().take(CODE_BYTES));
        value
    }

    /// What was sealed under these names, or `None` if the code is wrong.
    pub fn open<'a>(&self, key: &str, field: &[u8], sealed: &'a [u8]) -> Option<&'a [u8]> {
        let (value, code) = sealed.split_at_checked(sealed.len().checked_sub(CODE_BYTES)?)?;
        // SECURITY: constant-time
        self.over(key, field, value).verify_truncated_left(code).ok()?;
        Some(value)
    }

    /// Each name goes in behind its length, so that no two triples give the same bytes.
    fn over(&self, key: &str, field: &[u8], value: &[u8]) -> Hmac<Sha256> {
        let names = [key.as_bytes(), field];
        names.into_iter().chain([value]).fold(self.0.clone(), |mac, part| {
            mac.chain_update((part.len() as u64).to_be_bytes()).chain_update(part)
        })
    }
}

/// HKDF-SHA256 (RFC 5869) for a key of one hash length, which is all that is needed here: extract,
/// then the first block of expand.
fn hkdf(salt: &[u8], secret: &[u8], info: &[u8]) -> [u8; 32] {
    let extracted = keyed(salt).chain_update(secret).finalize().into_bytes();
    keyed(&extracted).chain_update(info).chain_update([1]).finalize().into_bytes().into()
}

#[allow(clippy::unwrap_used, reason = "HMAC takes keys of every length (RFC 2104, section 3)")]
/// HMAC under a key of any length.
pub fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each key of the vectors is longer than one block, whose bytes do not depend on the length.
    #[test]
    fn hkdf_by_rfc_5869_appendix_a() {
        let bytes = |from: u8, to: u8| (from..=to).collect::<Vec<u8>>();
        let check = |salt: &[u8], secret: &[u8], info: &[u8], first: &str| {
            let hex: String = hkdf(salt, secret, info).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, first);
        };
        check(
            &bytes(0, 0x0c),
            &[0x0b; 22],
            &bytes(0xf0, 0xf9),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
        );
        check(
            &bytes(0x60, 0xaf),
            &bytes(0, 0x4f),
            &bytes(0xb0, 0xff),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c",
        );
        check(
            &[],
            &[0x0b; 22],
            &[],
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d",
        );
    }

    #[test]
    fn a_value_opens_under_its_own_names_and_key_only() {
        let key = MacKey::derive(b"secret");
        let sealed = key.seal("devices:00", b"d", b"value".to_vec());
        assert_eq!(sealed.len(), 5 + CODE_BYTES);
        assert_eq!(key.open("devices:00", b"d", &sealed), Some(&b"value"[..]));
        assert_eq!(MacKey::derive(b"secret2").open("devices:00", b"d", &sealed), None);
        for (hash, field) in [("devices:01", "d"), ("devices:00", "e"), ("devices:00d", "")] {
            assert_eq!(key.open(hash, field.as_bytes(), &sealed), None, "{hash} {field}");
        }
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(key.open("devices:00", b"d", &changed), None, "byte {at}");
            assert_eq!(key.open("devices:00", b"d", &sealed[..at]), None, "cut at {at}");
        }
        let empty = key.seal("k", b"f", Vec::new());
        assert_eq!(key.open("k", b"f", &empty), Some(&[][..]));
        assert_eq!(format!("{key:?}"), "MacKey");
    }
}
