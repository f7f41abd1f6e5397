//! Keys: which public keys are certified, and how a CA's private key is read.
//!
//! One rule for both: ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits.

use std::fmt;

use rcgen::{KeyPair, SignatureAlgorithm};
use x509_parser::asn1_rs::{Any, FromDer as _, Oid, Tag};
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION,
    OID_SIG_ED25519,
};
use x509_parser::x509::SubjectPublicKeyInfo;

use super::pem;

/// Why a key is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyError {
    /// Not the encoding of a key.
    Malformed,
    /// A key of another kind or size.
    Unsupported,
    /// A private key under a pass phrase.
    Encrypted,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KeyError::Malformed => "not exactly one readable PEM key (PKCS#8, PKCS#1 or SEC1)",
            KeyError::Unsupported => {
                "the key must be ECDSA P-256 or P-384, Ed25519 or RSA 2048 to 4096"
            }
            KeyError::Encrypted => {
                "the key is encrypted; a server that starts alone cannot ask for its pass phrase"
            }
        })
    }
}

impl std::error::Error for KeyError {}

/// A family of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
    /// Ed25519.
    Ed25519,
    /// RSA, 2048 to 4096 bits.
    Rsa,
}

/// A public key of a supported kind, as a certificate carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    /// Its family.
    pub kind: Kind,
    bytes: Vec<u8>,
}

impl PublicKey {
    /// Checks kind and size. That an elliptic point lies on its curve, and that a modulus can be
    /// used, is seen when a signature is verified with the key.
    pub fn from_spki(spki: &SubjectPublicKeyInfo<'_>) -> Result<Self, KeyError> {
        let bytes = spki.subject_public_key.data.to_vec();
        let kind = kind_of(spki)?;
        let fits = spki.subject_public_key.unused_bits == 0
            && match (kind, bytes.first()) {
                (Kind::P256, Some(4)) => bytes.len() == 65,
                (Kind::P384, Some(4)) => bytes.len() == 97,
                // A compressed point: legal, but hardly any TLS stack takes it.
                (Kind::P256 | Kind::P384, _) => return Err(KeyError::Unsupported),
                (Kind::Ed25519, _) => bytes.len() == 32,
                (Kind::Rsa, _) => return rsa_fits(&bytes).map(|()| PublicKey { kind, bytes }),
            };
        if fits { Ok(PublicKey { kind, bytes }) } else { Err(KeyError::Malformed) }
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
        return Err(KeyError::Unsupported);
    }
    // Explicit curve parameters are no name, hence no supported curve.
    let curve = spki.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
    named_curve(curve.as_ref()).ok_or(KeyError::Unsupported)
}

fn named_curve(oid: Option<&Oid<'_>>) -> Option<Kind> {
    match oid {
        Some(oid) if *oid == OID_EC_P256 => Some(Kind::P256),
        Some(oid) if *oid == OID_NIST_EC_P384 => Some(Kind::P384),
        _ => None,
    }
}

/// RSAPublicKey (RFC 8017, A.1.1): 2048 to 4096 bits, an odd exponent from 3 to 33 bits.
fn rsa_fits(der: &[u8]) -> Result<(), KeyError> {
    let key = whole(der, Tag::Sequence).ok_or(KeyError::Malformed)?;
    let (rest, modulus) = integer(key).ok_or(KeyError::Malformed)?;
    let (rest, exponent) = integer(rest).ok_or(KeyError::Malformed)?;
    if !rest.is_empty() {
        return Err(KeyError::Malformed);
    }
    let odd = exponent.last().is_some_and(|b| b & 1 == 1);
    let sane = odd && exponent != [1] && bits(exponent) <= 33;
    let sized = (2048..=4096).contains(&bits(modulus));
    if sane && sized { Ok(()) } else { Err(KeyError::Unsupported) }
}

/// The bytes of a positive INTEGER without leading zeros, and what follows it.
fn integer(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (rest, any) = Any::from_der(der).ok()?;
    let positive = any.tag() == Tag::Integer && any.data.first().is_some_and(|b| b & 0x80 == 0);
    let zeros = any.data.iter().take_while(|b| **b == 0).count();
    positive.then_some(())?;
    Some((rest, any.data.get(zeros..)?))
}

fn bits(bytes: &[u8]) -> usize {
    let spare = bytes.first().map_or(0, |b| b.leading_zeros() as usize);
    (bytes.len() * 8).saturating_sub(spare)
}

/// The content of the one element that `der` is.
fn whole(der: &[u8], tag: Tag) -> Option<&[u8]> {
    let (rest, any) = Any::from_der(der).ok()?;
    (rest.is_empty() && any.tag() == tag).then_some(any.data)
}

/// Reads the one private key of a PEM text. The RSA signature algorithm is SHA-256's.
pub fn private_key(text: &str) -> Result<KeyPair, KeyError> {
    if text.contains("ENCRYPTED") {
        return Err(KeyError::Encrypted);
    }
    let blocks = pem::blocks(text).ok_or(KeyError::Malformed)?;
    let mut keys = blocks.iter().filter(|b| b.label.ends_with("PRIVATE KEY"));
    let (Some(key), None) = (keys.next(), keys.next()) else { return Err(KeyError::Malformed) };
    let pkcs8 = match key.label {
        "PRIVATE KEY" => key.der.clone(),
        "RSA PRIVATE KEY" => wrap(RSA, &key.der),
        "EC PRIVATE KEY" => wrap(sec1_algorithm(&key.der)?, &key.der),
        _ => return Err(KeyError::Malformed),
    };
    whole(&pkcs8, Tag::Sequence).ok_or(KeyError::Malformed)?;
    KeyPair::try_from(pkcs8.as_slice()).map_err(|_| KeyError::Unsupported)
}

/// AlgorithmIdentifier of rsaEncryption, with its NULL.
const RSA: &[u8] = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
/// AlgorithmIdentifier of id-ecPublicKey on prime256v1.
const EC_P256: &[u8] =
    b"\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
/// AlgorithmIdentifier of id-ecPublicKey on secp384r1.
const EC_P384: &[u8] = b"\x30\x10\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22";

/// The curve of an ECPrivateKey (RFC 5915, 3): named in `[0]`, else told by the key's length.
fn sec1_algorithm(der: &[u8]) -> Result<&'static [u8], KeyError> {
    let read = || {
        let (rest, _version) = Any::from_der(whole(der, Tag::Sequence)?).ok()?;
        let (rest, secret) = Any::from_der(rest).ok()?;
        let parameters = Any::from_der(rest).ok().map(|(_, p)| p).filter(|p| p.tag() == Tag(0));
        Some((secret.data.len(), parameters.map(|p| p.data)))
    };
    let kind = match read().ok_or(KeyError::Malformed)? {
        (_, Some(named)) => named_curve(Oid::from_der(named).ok().map(|(_, oid)| oid).as_ref()),
        (32, None) => Some(Kind::P256),
        (48, None) => Some(Kind::P384),
        _ => None,
    };
    match kind {
        Some(Kind::P256) => Ok(EC_P256),
        Some(Kind::P384) => Ok(EC_P384),
        _ => Err(KeyError::Unsupported),
    }
}

/// Makes a PKCS#1 or SEC1 key a PKCS#8 one, the only form that ring reads:
/// `PrivateKeyInfo ::= SEQUENCE { INTEGER 0, AlgorithmIdentifier, OCTET STRING key }` (RFC 5208, 5).
fn wrap(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
    const VERSION_0: &[u8] = &[0x02, 0x01, 0x00];
    tlv(0x30, &[VERSION_0, algorithm, &tlv(0x04, key)].concat())
}

/// Tag, DER length (X.690, 8.1.3) and content.
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut der = vec![tag];
    match u8::try_from(content.len()) {
        Ok(short @ 0..=127) => der.push(short),
        _ => {
            let be = content.len().to_be_bytes();
            let len: Vec<u8> = be.into_iter().skip_while(|b| *b == 0).collect();
            der.push(0x80 | len.len() as u8);
            der.extend(len);
        }
    }
    der.extend(content);
    der
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_in_der() {
        for (len, head) in [
            (0, vec![4, 0]),
            (127, vec![4, 127]),
            (128, vec![4, 0x81, 128]),
            (256, vec![4, 0x82, 1, 0]),
        ] {
            let der = tlv(4, &vec![7; len]);
            assert_eq!(der[..der.len() - len], head);
            assert_eq!(whole(&der, Tag::OctetString).map(<[u8]>::len), Some(len));
        }
    }

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
            (2047, Err(KeyError::Unsupported)),
            (4097, Err(KeyError::Unsupported)),
            (1024, Err(KeyError::Unsupported)),
        ] {
            assert_eq!(key(&modulus(bits), &[1, 0, 1]), expected, "{bits}");
        }
        for exponent in [&[1][..], &[2], &[0], &[1, 0, 0], &[2, 0, 0, 0, 1]] {
            assert_eq!(key(&modulus(2048), exponent), Err(KeyError::Unsupported));
        }
        for exponent in [&[3][..], &[17], &[1, 0, 0, 0, 1]] {
            assert_eq!(key(&modulus(2048), exponent), Ok(()));
        }
        for exponent in [&[][..], &[0x81]] {
            assert_eq!(key(&modulus(2048), exponent), Err(KeyError::Malformed));
        }
    }

    #[test]
    fn what_is_no_private_key() {
        for (text, expected) in [
            ("", KeyError::Malformed),
            ("-----BEGIN PRIVATE KEY-----\nAQI=\n-----END PRIVATE KEY-----", KeyError::Malformed),
            (
                "-----BEGIN EC PRIVATE KEY-----\nMAA=\n-----END EC PRIVATE KEY-----",
                KeyError::Malformed,
            ),
            ("-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----", KeyError::Unsupported),
            ("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n", KeyError::Encrypted),
            ("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n", KeyError::Encrypted),
        ] {
            assert_eq!(private_key(text).map(|_| ()), Err(expected), "{text}");
        }
    }
}
