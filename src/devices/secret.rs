//! The secret that a device shows to enrol, once: `mpl-` and 26 characters of base32 (RFC 4648), which
//! are 130 bits. Only its hash is kept.
//!
//! People read secrets from labels and type them, so case and hyphens do not count. What is hashed is
//! the secret in lower case with the one hyphen behind `mpl`; a factory that makes secrets itself
//! hashes the same: `printf %s mpl-… | sha256sum`.

use std::fmt;

use sha2::{Digest as _, Sha256};

use super::SecretHash;
use crate::jwt::TokenHash;

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const CHARACTERS: usize = 26;
/// Enough random bytes for that many characters of five bits each.
const BYTES: usize = 17;

/// A new secret, to be shown to who registers the device, and then forgotten.
pub struct NewSecret(String);

impl NewSecret {
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut random = [0; BYTES];
        getrandom::fill(&mut random)?;
        Ok(NewSecret(written(random)))
    }

    /// As it is shown, once.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    pub fn hash(&self) -> SecretHash {
        hash_of(&self.0)
    }
}

impl fmt::Debug for NewSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(set)")
    }
}

impl SecretHash {
    /// The hash of a secret as somebody has typed it, or `None` if it has not the shape of one.
    pub fn of_typed(text: &str) -> Option<Self> {
        if text.len() > 4 * CHARACTERS {
            return None;
        }
        let plain: String = text.chars().filter(|c| *c != '-').collect();
        let plain = plain.to_ascii_lowercase();
        let rest = plain.strip_prefix("mpl")?;
        let fits = rest.len() == CHARACTERS && rest.bytes().all(|b| ALPHABET.contains(&b));
        fits.then(|| hash_of(&format!("mpl-{rest}")))
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        TokenHash::from_hex(&text.to_ascii_lowercase()).map(|hash| SecretHash(hash.0))
    }

    /// Whether the two are equal; how long that takes does not depend on where they differ.
    pub fn matches(&self, other: &SecretHash) -> bool {
        let pairs = self.0.iter().zip(&other.0);
        // SECURITY: no early end
        std::hint::black_box(pairs.fold(0, |differing, (a, b)| differing | (a ^ b))) == 0
    }
}

fn hash_of(canonical: &str) -> SecretHash {
    SecretHash(Sha256::digest(canonical.as_bytes()).into())
}

/// The first 130 bits in base32.
fn written(random: [u8; BYTES]) -> String {
    let bit = |at: usize| random.get(at / 8).is_some_and(|byte| byte >> (7 - at % 8) & 1 == 1);
    let character = |n: usize| {
        let five = (0..5).fold(0, |value, i| value << 1 | usize::from(bit(5 * n + i)));
        ALPHABET.get(five).copied().map_or('a', char::from)
    };
    ["mpl-".to_owned(), (0..CHARACTERS).map(character).collect()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `head -c 17 random | base32` gives the same.
    #[test]
    fn a_secret_as_it_is_written() {
        assert_eq!(written([0; BYTES]), "mpl-aaaaaaaaaaaaaaaaaaaaaaaaaa");
        assert_eq!(written([0xff; BYTES]), "mpl-77777777777777777777777777");
        let counting = std::array::from_fn(|n| n as u8);
        assert_eq!(written(counting), "mpl-aaaqeayeaudaocajbifqydiob4");
        let (a, b) = (NewSecret::random().unwrap(), NewSecret::random().unwrap());
        assert_ne!(a.reveal(), b.reveal());
        assert_eq!(SecretHash::of_typed(a.reveal()), Some(a.hash()));
        assert_eq!(format!("{a:?}"), "(set)");
    }

    #[test]
    fn case_and_hyphens_do_not_count() {
        let text = "mpl-abcdefghijklmnopqrstuvwx23";
        let hash = SecretHash::of_typed(text);
        assert!(hash.is_some());
        for same in [
            "MPL-ABCDEFGHIJKLMNOPQRSTUVWX23",
            "mplabcdefghijklmnopqrstuvwx23",
            "Mpl-abcde-fghij-klmno-pqrst-uvwx2-3",
        ] {
            assert_eq!(SecretHash::of_typed(same), hash, "{same}");
        }
        let long = format!("{text}{}", "-".repeat(200));
        for none in ["", "mpl-", "mpl", &text[1..], &text[..29], &format!("{text}a"), &long] {
            assert_eq!(SecretHash::of_typed(none), None, "{none}");
        }
        assert_eq!(SecretHash::of_typed("mpl-abcdefghijklmnopqrstuvwx21"), None, "1 is none of it");
        // `printf %s mpl-abcdefghijklmnopqrstuvwx23 | sha256sum | cut -c -8`
        assert_eq!(format!("{:?}", hash.unwrap()), "2d0e4f34");
    }

    #[test]
    fn hashes_are_equal_or_not() {
        let a = SecretHash([7; 32]);
        assert!(a.matches(&a));
        for at in 0..32 {
            let mut other = a;
            other.0[at] ^= 0x80;
            assert!(!a.matches(&other), "{at}");
        }
    }
}
