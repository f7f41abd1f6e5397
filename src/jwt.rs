//! Compact HS256 tokens (RFC 7515, RFC 7519): sign and verify, by hand and strictly.
//!
//! Order matters in [`Signer::verify`]: shape, header, HMAC, and only then the claims. Nothing that
//! a stranger wrote is parsed beyond the header before the HMAC has shown that it is ours.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, Mac as _};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::device::DeviceId;
use crate::digits::{self, decimal, hex};
use crate::json;
use crate::mac;
use crate::problem::Code;

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 4096;
/// Longest lifetime (`exp` − `iat`) of a token, in seconds; the upper bound of the configuration.
pub const MAX_LIFETIME_S: u64 = 86_400;
/// The value of the claim `type`.
const TYPE: &str = "provisioning";
/// `{"alg":"HS256","typ":"JWT"}`
const HEADER: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9";

/// The claims of a provisioning token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// The device that may redeem the token.
    pub device_id: DeviceId,
    /// When it was issued, in seconds since 1970.
    pub iat: u64,
    /// When it ends, in seconds since 1970; at least `iat`, at most [`MAX_LIFETIME_S`] later.
    pub exp: u64,
    /// 128 random bits; `None` in tokens of the older service, which had none.
    pub jti: Option<[u8; 16]>,
}

impl Claims {
    /// `exp` − `iat`, in seconds.
    pub fn lifetime_s(&self) -> u64 {
        self.exp.saturating_sub(self.iat)
    }
}

/// SHA-256 of a compact token: what logs, records and Redis marks name it by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenHash(pub [u8; 32]);

impl TokenHash {
    /// The hash of a compact token.
    pub fn of(compact: &str) -> Self {
        TokenHash(Sha256::digest(compact.as_bytes()).into())
    }

    /// Reads 64 lower-case hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        digits::from_hex(text).map(TokenHash)
    }

    /// The first 8 hexadecimal digits: enough to find a token in a log, useless to redeem it.
    pub fn short(&self) -> String {
        let [a, b, c, d, ..] = self.0;
        hex(&[a, b, c, d])
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

/// A token of ours with what it says; cheap to clone. The compact form is a bearer secret: `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// `header.claims.signature`
    pub compact: Arc<str>,
    /// SHA-256 of `compact`.
    pub hash: TokenHash,
    /// The verified claims.
    pub claims: Claims,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("hash", &self.hash).field("claims", &self.claims).finish()
    }
}

/// Signs and verifies tokens under one secret.
#[derive(Clone)]
pub struct Signer {
    keyed: Hmac<Sha256>,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signer")
    }
}

impl Signer {
    /// A signer under `secret`, of any length (RFC 2104 hashes what is longer than a block).
    pub fn new(secret: &[u8]) -> Self {
        Signer { keyed: mac::keyed(secret) }
    }

    /// Signs `claims`. The same claims always give the same token, so whoever keeps the claims can
    /// make the token again.
    pub fn sign(&self, claims: Claims) -> Token {
        let (mut iat, mut exp) = ([0; 20], [0; 20]);
        let mut json = String::with_capacity(192);
        json.extend([r#"{"device_id":""#, claims.device_id.as_str(), r#"","type":""#, TYPE]);
        json.extend([r#"","iat":"#, decimal(claims.iat, &mut iat)]);
        json.extend([r#","exp":"#, decimal(claims.exp, &mut exp)]);
        if let Some(jti) = claims.jti {
            json.push_str(",\"jti\":\"");
            BASE64URL.encode_string(jti, &mut json);
            json.push('"');
        }
        json.push('}');
        let mut compact = String::with_capacity(96 + json.len() * 4 / 3);
        compact.push_str(HEADER);
        compact.push('.');
        BASE64URL.encode_string(&json, &mut compact);
        let tag = self.keyed.clone().chain_update(compact.as_bytes()).finalize().into_bytes();
        compact.push('.');
        BASE64URL.encode_string(tag, &mut compact);
        Token { hash: TokenHash::of(&compact), compact: compact.into(), claims }
    }

    /// Checks shape, header, signature, type and expiry, in this order, and reads the claims.
    pub fn verify(&self, compact: &str, now_s: u64) -> Result<Token, Code> {
        let claims = self.verify_signature(compact)?;
        if claims.exp <= now_s {
            return Err(Code::TokenExpired);
        }
        Ok(Token { compact: compact.into(), hash: TokenHash::of(compact), claims })
    }

    /// As [`Signer::verify`], but whenever the token ends: for tokens found in our own store.
    pub fn verify_signature(&self, compact: &str) -> Result<Claims, Code> {
        let (signed, header, payload, tag) = split(compact)?;
        check_header(header)?;
        let (payload, tag) = (decode(payload)?, decode(tag)?);
        self.keyed
            .clone()
            .chain_update(signed.as_bytes())
            // SECURITY: constant-time; claims are parsed only after it
            .verify_slice(&tag)
            .map_err(|_| Code::TokenInvalidSignature)?;
        read_claims(&object(&payload, &CLAIMS)?)
    }
}

/// Cuts `header.claims.signature` into (what is signed, header, claims, signature).
fn split(compact: &str) -> Result<(&str, &str, &str, &str), Code> {
    if compact.len() > MAX_TOKEN_BYTES {
        return Err(Code::TokenInvalidFormat);
    }
    let (signed, tag) = compact.rsplit_once('.').ok_or(Code::TokenInvalidFormat)?;
    let (header, payload) = signed.split_once('.').ok_or(Code::TokenInvalidFormat)?;
    if payload.contains('.') {
        return Err(Code::TokenInvalidFormat);
    }
    Ok((signed, header, payload, tag))
}

fn check_header(header: &str) -> Result<(), Code> {
    if header == HEADER {
        return Ok(());
    }
    let header = object(&decode(header)?, &["alg", "crit"])?;
    if header.contains_key("crit") {
        return Err(Code::TokenInvalidFormat); // RFC 7515, 4.1.11: we understand no extension
    }
    match header.get("alg") {
        Some(Value::String(alg)) if alg == "HS256" => Ok(()),
        _ => Err(Code::TokenInvalidSignature),
    }
}

/// The claims that are read.
const CLAIMS: [&str; 5] = ["device_id", "type", "iat", "exp", "jti"];

fn read_claims(claims: &Map<String, Value>) -> Result<Claims, Code> {
    if claims.get("type").and_then(Value::as_str) != Some(TYPE) {
        return Err(Code::TokenInvalidType);
    }
    let text = |name| claims.get(name).and_then(Value::as_str);
    let device_id = text("device_id").and_then(DeviceId::parse).ok_or(Code::TokenInvalidFormat)?;
    let seconds = |name| claims.get(name).and_then(numeric_date).ok_or(Code::TokenInvalidFormat);
    let (iat, exp) = (seconds("iat")?, seconds("exp")?);
    match exp.checked_sub(iat) {
        None => return Err(Code::TokenExpired), // before it began
        Some(lifetime) if lifetime > MAX_LIFETIME_S => return Err(Code::TokenInvalidFormat),
        Some(_) => {}
    }
    let jti = text("jti").and_then(|t| BASE64URL.decode(t).ok()?.try_into().ok());
    Ok(Claims { device_id, iat, exp, jti })
}

/// NumericDate (RFC 7519, section 2): seconds since 1970, possibly with a fraction, which is cut.
fn numeric_date(value: &Value) -> Option<u64> {
    const YEAR_9999: f64 = 253_402_300_799.0;
    let seconds = value.as_f64().filter(|s| (0.0..=YEAR_9999).contains(s))?;
    Some(seconds as u64)
}

fn object(bytes: &[u8], names: &[&str]) -> Result<Map<String, Value>, Code> {
    json::object(bytes, names).map_err(|_| Code::TokenInvalidFormat)
}

/// Unpadded, canonical base64url (RFC 7515, section 2): stray bits at the end are refused.
fn decode(part: &str) -> Result<Vec<u8>, Code> {
    BASE64URL.decode(part).map_err(|_| Code::TokenInvalidFormat)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn signer() -> Signer {
        Signer::new(b"0123456789abcdef0123456789abcdef")
    }

    fn claims() -> Claims {
        let device_id = DeviceId::parse("device-001").unwrap();
        Claims { device_id, iat: NOW - 10, exp: NOW + 290, jti: Some([0xfb; 16]) }
    }

    /// Signs any header and claims with the right key.
    fn forge(header: &str, payload: &str) -> String {
        let signed = format!("{}.{}", BASE64URL.encode(header), BASE64URL.encode(payload));
        let tag = signer().keyed.chain_update(signed.as_bytes()).finalize().into_bytes();
        format!("{signed}.{}", BASE64URL.encode(tag))
    }

    fn check(token: &str, expected: Result<(), Code>) {
        let shown: String = token.chars().take(80).collect();
        assert_eq!(signer().verify(token, NOW).map(|_| ()), expected, "{shown}");
    }

    #[test]
    fn hmac_sha256_by_rfc_7515_a1_and_rfc_4231() {
        let key = BASE64URL
            .decode("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow")
            .unwrap();
        let signed = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
        let a1 = format!("{signed}.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
        // The signature holds, so the refusal comes from the claims, which are not ours.
        assert_eq!(Signer::new(&key).verify(&a1, 0), Err(Code::TokenInvalidType));
        assert_eq!(signer().verify(&a1, 0), Err(Code::TokenInvalidSignature));

        let long_key = [0xaa; 131];
        let vectors: [(&[u8], &[u8], &str); 3] = [
            (
                &[0x0b; 20],
                b"Hi There",
                "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
            ),
            (
                b"Jefe",
                b"what do ya want for nothing?",
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                &long_key,
                b"Test Using Larger Than Block-Size Key - Hash Key First",
                "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
            ),
        ];
        for (key, data, expected) in vectors {
            let tag = Signer::new(key).keyed.chain_update(data).finalize().into_bytes();
            assert_eq!(TokenHash(tag.into()).to_string(), expected);
        }
    }

    #[test]
    fn what_is_signed_verifies_and_says_the_same() {
        let token = signer().sign(claims());
        assert_eq!(signer().verify(&token.compact, NOW), Ok(token.clone()));
        let payload = token.compact.split('.').nth(1).unwrap();
        assert_eq!(
            String::from_utf8(BASE64URL.decode(payload).unwrap()).unwrap(),
            format!(
                r#"{{"device_id":"device-001","type":"provisioning","iat":{},"exp":{},"jti":"-_v7-_v7-_v7-_v7-_v7-w"}}"#,
                NOW - 10,
                NOW + 290
            )
        );
        assert_eq!(signer().verify(&token.compact, NOW + 290), Err(Code::TokenExpired));
        let other = Signer::new(b"another secret of at least 32 bytes");
        assert_eq!(other.verify(&token.compact, NOW), Err(Code::TokenInvalidSignature));
    }

    #[test]
    fn every_bit_of_a_token_counts() {
        let token = signer().sign(claims()).compact;
        for at in 0..token.len() {
            for bit in 0..7 {
                let mut bytes = token.as_bytes().to_vec();
                bytes[at] ^= 1 << bit;
                let flipped = String::from_utf8(bytes).unwrap();
                assert!(signer().verify(&flipped, NOW).is_err(), "byte {at} bit {bit}");
            }
            assert!(signer().verify(&token[..at], NOW).is_err());
        }
    }

    #[test]
    fn forged_headers() {
        let good =
            format!(r#"{{"device_id":"d","type":"provisioning","iat":{NOW},"exp":{}}}"#, NOW + 1);
        let header = |h: &str| forge(h, &good);
        check(&header(r#"{"alg":"HS256","typ":"JWT"}"#), Ok(()));
        check(&header(r#"{"typ":"JWT","alg":"HS256","kid":"1"}"#), Ok(()));
        for alg in ["none", "None", "NONE", "HS384", "HS512", "RS256", "hs256", ""] {
            check(&header(&format!(r#"{{"alg":"{alg}"}}"#)), Err(Code::TokenInvalidSignature));
        }
        for bad in [r#"{"alg":["HS256"]}"#, "{}"] {
            check(&header(bad), Err(Code::TokenInvalidSignature));
        }
        for bad in [r#"{"alg":"HS256","crit":["x"]}"#, r#"{"alg":"none","alg":"HS256"}"#, "[]", ""]
        {
            check(&header(bad), Err(Code::TokenInvalidFormat));
        }
        let none = BASE64URL.encode(r#"{"alg":"none"}"#);
        check(&format!("{none}.{}.", BASE64URL.encode(&good)), Err(Code::TokenInvalidSignature));
    }

    #[test]
    fn forged_claims() {
        let with = |payload: &str| forge(r#"{"alg":"HS256","typ":"JWT"}"#, payload);
        let exp = NOW + 1;
        for (payload, expected) in [
            (
                format!(r#"{{"device_id":"d","type":"provisioning","iat":{NOW},"exp":{exp}}}"#),
                Ok(()),
            ),
            (
                format!(r#"{{"device_id":"d","type":"provisioning","iat":{NOW}.5,"exp":{exp}.5}}"#),
                Ok(()),
            ),
            (
                format!(r#"{{"device_id":"d","type":"access","iat":{NOW},"exp":{exp}}}"#),
                Err(Code::TokenInvalidType),
            ),
            (
                format!(r#"{{"device_id":"d","iat":{NOW},"exp":{exp}}}"#),
                Err(Code::TokenInvalidType),
            ),
            (
                format!(r#"{{"device_id":"a/b","type":"provisioning","iat":{NOW},"exp":{exp}}}"#),
                Err(Code::TokenInvalidFormat),
            ),
            (
                format!(r#"{{"device_id":7,"type":"provisioning","iat":{NOW},"exp":{exp}}}"#),
                Err(Code::TokenInvalidFormat),
            ),
            (
                format!(r#"{{"device_id":"d","type":"provisioning","iat":{NOW},"exp":"{exp}"}}"#),
                Err(Code::TokenInvalidFormat),
            ),
            (
                format!(r#"{{"device_id":"d","type":"provisioning","iat":{NOW}}}"#),
                Err(Code::TokenInvalidFormat),
            ),
            (
                format!(r#"{{"device_id":"d","type":"provisioning","iat":{NOW},"exp":1e300}}"#),
                Err(Code::TokenInvalidFormat),
            ),
            (
                format!(r#"{{"device_id":"d","type":"provisioning","iat":0,"exp":{exp}}}"#),
                Err(Code::TokenInvalidFormat),
            ),
            (
                format!(r#"{{"device_id":"d","type":"provisioning","iat":{exp},"exp":{NOW}}}"#),
                Err(Code::TokenExpired),
            ),
            (
                format!(
                    r#"{{"device_id":"d","type":"provisioning","iat":1,"exp":{NOW},"exp":{exp}}}"#
                ),
                Err(Code::TokenInvalidFormat),
            ),
            (
                format!(
                    r#"{{"device_id":"d","type":"provisioning","iat":{},"exp":{NOW}}}"#,
                    NOW - 9
                ),
                Err(Code::TokenExpired),
            ),
            ("not json".to_owned(), Err(Code::TokenInvalidFormat)),
        ] {
            check(&with(&payload), expected);
        }
        check(
            &with(&format!(r#"{{"x":"{}"}}"#, "x".repeat(100_000))),
            Err(Code::TokenInvalidFormat),
        );
    }

    #[test]
    fn other_shapes_are_refused() {
        let token = signer().sign(claims()).compact;
        let (signed, tag) = token.rsplit_once('.').unwrap();
        check(&format!("{signed}."), Err(Code::TokenInvalidSignature));
        check(&format!("{signed}.{tag}="), Err(Code::TokenInvalidFormat));
        check(signed, Err(Code::TokenInvalidFormat));
        for bad in
            [format!("{token}.{tag}"), format!(".{token}"), format!("{token} "), String::new()]
        {
            assert!(signer().verify(&bad, NOW).is_err());
        }
        // 32 bytes end in a sextet with two unused bits: with one of them set it is not canonical.
        let last = tag.chars().last().unwrap();
        let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let next = alphabet.chars().nth(alphabet.find(last).unwrap() + 1).unwrap();
        let stray = format!("{signed}.{}{next}", &tag[..tag.len() - 1]);
        check(&stray, Err(Code::TokenInvalidFormat));
    }

    #[test]
    fn a_hash_reads_back_from_hex() {
        let hash = TokenHash::of("abc");
        assert_eq!(
            hash.to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(TokenHash::from_hex(&hash.to_string()), Some(hash));
        assert_eq!(hash.short(), "ba7816bf");
        for bad in ["", "ba", &hash.to_string().to_uppercase(), &"+f".repeat(32), &"é".repeat(32)]
        {
            assert_eq!(TokenHash::from_hex(bad), None);
        }
    }
}
