//! Keys: which public keys are certified, and how a CA's private key is read.
//!
//! One rule for both: ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits.

use std::fmt;

use rcgen::{KeyPair, SignatureAlgorithm};
use rustls::SignatureScheme;
use rustls::crypto::ring::sign::any_supported_type;
use rustls::sign::Signer;
use x509_parser::asn1_rs::{Any, FromDer as _, Tag};
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION,
    OID_SIG_ED25519,
};
use x509_parser::x509::SubjectPublicKeyInfo;

use super::der::{Reader, whole};
use crate::config;
use crate::pem;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyError {
    Malformed,
    OtherKind,
    /// An elliptic key that is not on P-256 or P-384.
    OtherCurve,
    /// An elliptic key whose point is compressed: legal, but hardly any TLS stack takes it.
    Compressed,
    /// An RSA key with so many bits.
    Size(usize),
    /// An RSA key whose exponent is even, 1, or over 33 bits.
    Exponent,
    /// An Ed25519 key for which anyone can sign.
    ProvesNothing,
    /// A private key that ring does not load.
    NotLoaded,
    Encrypted,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KeyError::Malformed => {
                "key is not exactly one readable PEM key (PKCS#8, PKCS#1 or SEC1)"
            }
            KeyError::OtherKind => "key is of another kind",
            KeyError::OtherCurve => "key is on another curve",
            KeyError::Compressed => "key is a compressed point",
            KeyError::Size(bits) => return write!(f, "RSA key has {bits} bits"),
            KeyError::Exponent => "RSA key has an unsafe exponent",
            KeyError::ProvesNothing => "Ed25519 key proves nothing",
            KeyError::NotLoaded => "key cannot be loaded",
            KeyError::Encrypted => {
                "key is encrypted; a server that starts alone cannot ask for its pass phrase"
            }
        })
    }
}

impl std::error::Error for KeyError {}

impl KeyError {
    /// For whoever can only choose another key.
    pub fn and_what_is_needed(self) -> String {
        match self {
            KeyError::Malformed | KeyError::Encrypted => format!("the {self}"),
            _ => {
                format!("the {self}; it must be ECDSA P-256 or P-384, Ed25519 or RSA 2048 to 4096")
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    P256,
    P384,
    Ed25519,
    Rsa,
}

/// A public key of a supported kind, as a certificate carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    pub kind: Kind,
    bytes: Vec<u8>,
}

impl PublicKey {
    /// That of a key that [`KeyPair::generate`] has made.
    pub fn of(key: &KeyPair) -> Self {
        PublicKey { kind: Kind::P256, bytes: rcgen::PublicKeyData::der_bytes(key).to_vec() }
    }

    /// Checks kind and size. That an elliptic point lies on its curve, and that a modulus can be
    /// used, is seen when a signature is verified with the key.
    pub fn from_spki(spki: &SubjectPublicKeyInfo<'_>) -> Result<Self, KeyError> {
        let bytes = spki.subject_public_key.data.to_vec();
        let kind = kind_of(spki)?;
        let fits = spki.subject_public_key.unused_bits == 0
            && match (kind, bytes.first()) {
                (Kind::P256, Some(4)) => bytes.len() == 65,
                (Kind::P384, Some(4)) => bytes.len() == 97,
                (Kind::P256 | Kind::P384, _) => return Err(KeyError::Compressed),
                (Kind::Ed25519, _) => proves_possession(&bytes)?,
                (Kind::Rsa, _) => return rsa_fits(&bytes).map(|()| PublicKey { kind, bytes }),
            };
        if fits { Ok(PublicKey { kind, bytes }) } else { Err(KeyError::Malformed) }
    }
}

/// Whether the bytes are an Ed25519 key at all.
///
/// SECURITY: under a key of small order anyone can sign, so whoever has the certificate would pass
/// for the device. The prime is 2^255 - 19 and a point is written as its y and the sign of x; y is
/// one of the few of small order, or it is not reduced, which no honest key is.
fn proves_possession(bytes: &[u8]) -> Result<bool, KeyError> {
    let Ok(mut y) = <[u8; 32]>::try_from(bytes) else { return Ok(false) };
    y[31] &= 0x7f;
    let is_small = SMALL_ORDER.contains(&y);
    let is_reduced = y.iter().rev().cmp(PRIME.iter().rev()).is_lt();
    if is_small || !is_reduced { Err(KeyError::ProvesNothing) } else { Ok(true) }
}

/// 2^255 - 19, little-endian.
const PRIME: [u8; 32] = ends(0xed, 0x7f, 0xff);
/// The y of the points of order 4, 1, 2 and, twice, 8.
const SMALL_ORDER: [[u8; 32]; 5] = [
    ends(0, 0, 0),
    ends(1, 0, 0),
    ends(0xec, 0x7f, 0xff),
    *b"\x26\xe8\x95\x8f\xc2\xb2\x27\xb0\x45\xc3\xf4\x89\xf2\xef\x98\xf0\
        \xd5\xdf\xac\x05\xd3\xc6\x33\x39\xb1\x38\x02\x88\x6d\x53\xfc\x05",
    *b"\xc7\x17\x6a\x70\x3d\x4d\xd8\x4f\xba\x3c\x0b\x76\x0d\x10\x67\x0f\
        \x2a\x20\x53\xfa\x2c\x39\xcc\xc6\x4e\xc7\xfd\x77\x92\xac\x03\x7a",
];

/// 32 bytes of which only the first and the last differ from the others.
const fn ends(first: u8, last: u8, others: u8) -> [u8; 32] {
    let mut bytes = [others; 32];
    bytes[0] = first;
    bytes[31] = last;
    bytes
}

/// Signs nothing: a private key does, when rcgen has laid out what is to be signed.
impl rcgen::SigningKey for PublicKey {
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Ok(Vec::new())
    }
}

impl rcgen::PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Of this rcgen writes only the key's own algorithm, the same for every hash.
    fn algorithm(&self) -> &'static SignatureAlgorithm {
        match self.kind {
            Kind::P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            Kind::P384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            Kind::Ed25519 => &rcgen::PKCS_ED25519,
            Kind::Rsa => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

fn kind_of(spki: &SubjectPublicKeyInfo<'_>) -> Result<Kind, KeyError> {
    let algorithm = &spki.algorithm.algorithm;
    if *algorithm == OID_PKCS1_RSAENCRYPTION {
        return Ok(Kind::Rsa);
    }
    if *algorithm == OID_SIG_ED25519 {
        return Ok(Kind::Ed25519);
    }
    if *algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY {
        return Err(KeyError::OtherKind);
    }
    // Explicit curve parameters are no name, hence no supported curve.
    let curve = spki.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
    match curve {
        Some(curve) if curve == OID_EC_P256 => Ok(Kind::P256),
        Some(curve) if curve == OID_NIST_EC_P384 => Ok(Kind::P384),
        _ => Err(KeyError::OtherCurve),
    }
}

/// RSAPublicKey (RFC 8017, A.1.1): 2048 to 4096 bits, an odd exponent from 3 to 33 bits.
fn rsa_fits(der: &[u8]) -> Result<(), KeyError> {
    let numbers = whole(der, Tag::Sequence).and_then(|key| Reader(key).elements());
    let numbers: Option<Vec<&[u8]>> =
        numbers.and_then(|all| all.into_iter().map(positive).collect());
    let Some([modulus, exponent]) = numbers.as_deref() else { return Err(KeyError::Malformed) };
    let odd = exponent.last().is_some_and(|b| b & 1 == 1);
    if !(2048..=4096).contains(&bits(modulus)) {
        return Err(KeyError::Size(bits(modulus)));
    }
    if odd && **exponent != [1] && bits(exponent) <= 33 { Ok(()) } else { Err(KeyError::Exponent) }
}

/// The bytes of a positive INTEGER without leading zeros.
fn positive(element: &[u8]) -> Option<&[u8]> {
    let number = whole(element, Tag::Integer)?;
    let zeros = number.iter().take_while(|b| **b == 0).count();
    number.first().is_some_and(|b| b & 0x80 == 0).then(|| number.split_at(zeros).1)
}

fn bits(bytes: &[u8]) -> usize {
    let spare = bytes.first().map_or(0, |b| b.leading_zeros() as usize);
    (bytes.len() * 8).saturating_sub(spare)
}

/// A CA's private key.
pub struct PrivateKey {
    signer: Box<dyn Signer>,
    pub public: PublicKey,
    /// The number that only who has the key knows: the scalar of an elliptic curve, the seed of Ed25519,
    /// the exponent `d` of RSA. Without leading zeros, so that it is the same number however the key's
    /// file was written.
    pub number: Vec<u8>,
}

impl PrivateKey {
    /// Reads the one private key of a PEM text.
    pub fn read(text: &str) -> Result<Self, KeyError> {
        if text.contains("ENCRYPTED") {
            return Err(KeyError::Encrypted);
        }
        let blocks = pem::blocks(text).ok_or(KeyError::Malformed)?;
        let mut keys = blocks.iter().filter(|b| b.label.ends_with("PRIVATE KEY"));
        let (Some(key), None) = (keys.next(), keys.next()) else { return Err(KeyError::Malformed) };
        whole(&key.der, Tag::Sequence).ok_or(KeyError::Malformed)?;
        let der = config::private_key(key).ok_or(KeyError::Malformed)?;
        let loaded = any_supported_type(&der).map_err(|_| KeyError::NotLoaded)?;
        let public = loaded.public_key().ok_or(KeyError::NotLoaded)?;
        let (_, public) =
            SubjectPublicKeyInfo::from_der(&public).map_err(|_| KeyError::NotLoaded)?;
        let number = private_number(key).ok_or(KeyError::Malformed)?;
        let signer = loaded.choose_scheme(&SCHEMES).ok_or(KeyError::NotLoaded)?;
        Ok(PrivateKey { signer, public: PublicKey::from_spki(&public)?, number })
    }

    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        self.signer.sign(message)
    }
}

/// As [`rcgen::PublicKeyData::algorithm`] of [`PublicKey`] names them.
const SCHEMES: [SignatureScheme; 4] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
    SignatureScheme::RSA_PKCS1_SHA256,
];

fn private_number(key: &pem::Block<'_>) -> Option<Vec<u8>> {
    let key = match key.label {
        "PRIVATE KEY" => element(whole(&key.der, Tag::Sequence)?, 2, Tag::OctetString)?, // PKCS#8
        _ => &key.der,
    };
    let number = match Any::from_der(key).ok()?.1 {
        seed if seed.tag() == Tag::OctetString => seed.data, // RFC 8410, 7
        // RFC 5915, 3 and RFC 8017, A.1.2
        numbers => element(numbers.data, 1, Tag::OctetString)
            .or_else(|| element(numbers.data, 3, Tag::Integer))?,
    };
    Some(number.iter().copied().skip_while(|byte| *byte == 0).collect())
}

/// The content of the element at this place, if it is of this kind.
fn element(der: &[u8], at: usize, tag: Tag) -> Option<&[u8]> {
    whole(Reader(der).elements()?.get(at)?, tag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::der::tlv;
    use crate::ca::tests::must;
    use crate::files::test_dir::TestDir;

    #[test]
    fn rsa_sizes_are_counted_in_bits() {
        let key = |modulus: &[u8], exponent: &[u8]| {
            rsa_fits(&tlv(0x30, &[tlv(2, modulus), tlv(2, exponent)].concat()))
        };
        let modulus = |bits: usize| {
            let mut bytes = vec![0xff; bits.div_ceil(8)];
            bytes[0] >>= bytes.len() * 8 - bits;
            if bits.is_multiple_of(8) {
                bytes.insert(0, 0);
            }
            bytes
        };
        for (bits, expected) in [
            (2048, Ok(())),
            (3072, Ok(())),
            (4096, Ok(())),
            (2047, Err(KeyError::Size(2047))),
            (4097, Err(KeyError::Size(4097))),
            (1024, Err(KeyError::Size(1024))),
        ] {
            assert_eq!(key(&modulus(bits), &[1, 0, 1]), expected, "{bits}");
        }
        for exponent in [&[1][..], &[2], &[0], &[1, 0, 0], &[2, 0, 0, 0, 1]] {
            assert_eq!(key(&modulus(2048), exponent), Err(KeyError::Exponent));
        }
        for exponent in [&[3][..], &[17], &[1, 0, 0, 0, 1]] {
            assert_eq!(key(&modulus(2048), exponent), Ok(()));
        }
        for exponent in [&[][..], &[0x81]] {
            assert_eq!(key(&modulus(2048), exponent), Err(KeyError::Malformed));
        }
    }

    #[test]
    fn the_private_number_is_what_openssl_shows_however_the_key_is_written() {
        let dir = TestDir::new();
        for (make, older) in [
            ("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256", "-traditional"),
            ("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384", "-traditional"),
            ("genpkey -algorithm ED25519", ""), // has no older form
            ("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048", "-traditional"),
        ] {
            must(&dir, &format!("{make} -out key"));
            let text = must(&dir, "pkey -in key -noout -text");
            let shown = text.lines().skip_while(|line| !line.contains("priv")).skip(1);
            let shown: String = shown.take_while(|line| line.starts_with(' ')).collect();
            let hex = shown.replace([':', ' '], "");
            let expected = hex.trim_start_matches("00");
            must(&dir, &format!("pkey -in key {older} -out old"));
            for name in ["key", "old"] {
                let text = std::fs::read_to_string(dir.join(name)).unwrap();
                let number = PrivateKey::read(&text).unwrap().number;
                let number: String = number.iter().map(|b| format!("{b:02x}")).collect();
                assert!(number.len() > 60 && number == expected, "{make}, {name}");
            }
        }
        let made = KeyPair::generate().unwrap();
        let read = PrivateKey::read(&made.serialize_pem());
        assert!(read.is_ok_and(|key| key.number.len() > 28));
    }

    #[test]
    fn what_is_no_private_key() {
        for (text, expected) in [
            ("", KeyError::Malformed),
            ("-----BEGIN PRIVATE KEY-----\nAQI=\n-----END PRIVATE KEY-----", KeyError::Malformed),
            (
                "-----BEGIN EC PRIVATE KEY-----\nMAA=\n-----END EC PRIVATE KEY-----",
                KeyError::NotLoaded,
            ),
            ("-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----", KeyError::NotLoaded),
            ("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n", KeyError::Encrypted),
            ("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n", KeyError::Encrypted),
        ] {
            assert_eq!(PrivateKey::read(text).map(|_| ()), Err(expected), "{text}");
        }
    }
}
