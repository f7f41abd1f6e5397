//! Tokens made and taken apart apart from the program: what it signs must be what others read, and
//! what others forge it must refuse.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::clock::now_s;
use super::redis::Redis;

/// A secret of 32 bytes, for `JWT_SECRET`.
pub const SECRET: &str = "an-example-secret-of-32-bytes-ok";
/// The header that the program writes.
pub const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

/// Unpadded base64url.
pub fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64URL.encode(bytes)
}

/// Signs any header and claims, well-formed or not, with HMAC-SHA256.
pub fn sign(secret: &str, header: &str, claims: &str) -> String {
    let signed = format!("{}.{}", encode(header), encode(claims));
    let tag = hmac_sha256(secret, &signed);
    format!("{signed}.{}", encode(tag))
}

/// The HMAC-SHA256 of `signed`.
pub fn hmac_sha256(secret: &str, signed: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(signed.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

/// Good claims for `device`, from now, without `jti`.
pub fn claims(device: &str, ttl_s: u64) -> Value {
    let now = now_s();
    json!({"device_id": device, "type": "provisioning", "iat": now, "exp": now + ttl_s})
}

/// A token as the older service issued it, put into Redis as the older service did.
pub fn plant(redis: &Redis, device: &str, ttl_s: u64) -> String {
    let claims = claims(device, ttl_s);
    let token = sign(SECRET, HEADER, &claims.to_string());
    plant_token(redis, device, &token, claims["exp"].as_u64().unwrap());
    token
}

/// Puts a token into Redis, with its claim.
pub fn plant_token(redis: &Redis, device: &str, token: &str, exp_s: u64) {
    let left = exp_s.saturating_sub(now_s()).max(1).to_string();
    let value = json!({"deviceId": device, "token": token, "expiresAt": exp_s * 1000}).to_string();
    redis.cli(&["SET", &format!("mqtt-lite:token:{token}"), &value, "EX", &left]);
    redis.cli(&["SET", &format!("mqtt-lite:device:{device}"), token, "EX", &left]);
}

/// Header and claims of a token, as text; the signature must be right under `secret`.
#[track_caller]
pub fn open(secret: &str, token: &str) -> (String, String) {
    let (signed, tag) = token.rsplit_once('.').unwrap();
    assert_eq!(encode(hmac_sha256(secret, signed)), tag, "the signature of {token}");
    let (header, payload) = signed.split_once('.').unwrap();
    let text = |part| String::from_utf8(BASE64URL.decode(part).unwrap()).unwrap();
    (text(header), text(payload))
}

/// The claims of a token, unverified.
pub fn claims_of(token: &str) -> Value {
    claims_in(token).unwrap()
}

/// The claims of what may be a token.
pub fn claims_in(word: &str) -> Option<Value> {
    let payload = word.split('.').nth(1)?;
    serde_json::from_slice(&BASE64URL.decode(payload).ok()?).ok()
}

/// The name of its mark in Redis, without the prefix.
pub fn mark_of(token: &str) -> String {
    format!("used:{}", sha256_hex(token.as_bytes()))
}

/// Its member of the sorted set `live`.
pub fn live_member(token: &str) -> String {
    encode(&Sha256::digest(token.as_bytes())[..16])
}

/// SHA-256 in lower-case hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// The bytes between the lines of a PEM block.
pub fn pem_to_der(pem: &str) -> Vec<u8> {
    let inner: String = pem
        .lines()
        .skip_while(|line| !line.starts_with("-----BEGIN"))
        .skip(1)
        .take_while(|line| !line.starts_with("-----END"))
        .collect();
    base64::engine::general_purpose::STANDARD.decode(inner).unwrap()
}

/// A PEM block with this label.
pub fn der_to_pem(label: &str, der: &[u8]) -> String {
    let text = base64_of(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|l| str::from_utf8(l).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Standard base64, with padding.
pub fn base64_of(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
