//! What both yardsticks do for an onboarding: the token, the commands to Redis that the service sends for
//! it, in one pipeline, and the line in the log.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use time::macros::format_description;

/// `{"alg":"HS256","typ":"JWT"}`
const HEADER: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9";
const SECRET: &[u8] = b"bench-secret-bench-secret-bench-secret";
const TTL_S: u64 = 300;
const PREFIX: &str = "mqtt-lite:";

/// What is asked for.
#[derive(Deserialize)]
pub struct Onboarding {
    device_id: String,
}

/// A token that is to be stored.
pub struct Token {
    device: String,
    compact: String,
    hash: [u8; 32],
    until_ms: u64,
}

/// What is answered.
#[derive(Serialize)]
pub struct Issued {
    success: bool,
    provisioning_token: String,
    expires_in: u64,
    timestamp: String,
}

/// That the server answers.
#[derive(Serialize)]
pub struct Health {
    status: &'static str,
    timestamp: String,
}

impl Health {
    /// It does.
    pub fn now() -> Self {
        Health { status: "ok", timestamp: timestamp() }
    }
}

impl Onboarding {
    /// A token for the device, if its name is one.
    pub fn sign(&self) -> Option<Token> {
        let device = self.device_id.trim();
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
        if !(1..=64).contains(&device.len()) || !device.bytes().all(fits) {
            return None;
        }
        let iat = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut jti = [0; 16];
        getrandom::fill(&mut jti).ok()?;
        let json = format!(
            r#"{{"device_id":"{device}","type":"provisioning","iat":{iat},"exp":{},"jti":"{}"}}"#,
            iat + TTL_S,
            BASE64URL.encode(jti)
        );
        let mut compact = format!("{HEADER}.{}", BASE64URL.encode(json));
        let key: Hmac<Sha256> = Hmac::new_from_slice(SECRET).ok()?;
        let tag = key.chain_update(compact.as_bytes()).finalize().into_bytes();
        compact.push('.');
        BASE64URL.encode_string(tag, &mut compact);
        let hash = Sha256::digest(compact.as_bytes()).into();
        let until_ms = (iat + TTL_S) * 1000;
        Some(Token { device: device.to_owned(), compact, hash, until_ms })
    }
}

impl Token {
    /// What is sent to Redis, and what holds the device's lease comes back.
    pub fn commands(&self) -> redis::Pipeline {
        let Token { device, compact, hash, until_ms } = self;
        let ms = TTL_S * 1000;
        let json =
            format!(r#"{{"deviceId":"{device}","token":"{compact}","expiresAt":{until_ms}}}"#);
        let lease = format!("{PREFIX}device:{device}");
        let member = BASE64URL.encode(hash.get(..16).unwrap_or_default());
        let bucket = hash.first().copied().unwrap_or_default();
        let mut pipeline = redis::pipe();
        pipeline.cmd("SET").arg(format!("{PREFIX}token:{compact}")).arg(json);
        pipeline.arg("PX").arg(ms).ignore();
        pipeline.cmd("SET").arg(&lease).arg(compact).arg("NX").arg("PX").arg(ms).ignore();
        pipeline.cmd("GET").arg(&lease);
        pipeline.cmd("ZADD").arg(format!("{PREFIX}live")).arg(until_ms).arg(member).ignore();
        pipeline.cmd("HGET").arg(format!("{PREFIX}devices:{bucket:02x}")).arg(device).ignore();
        pipeline.cmd("GET").arg(format!("{PREFIX}holder:{device}")).ignore();
        pipeline
    }

    /// The answer, and its line in the log, if this token holds the lease.
    pub fn issued(self, (holder,): (String,), client: IpAddr) -> Option<Issued> {
        if holder != self.compact {
            return None;
        }
        let short: String = self.hash.iter().take(4).map(|b| format!("{b:02x}")).collect();
        log::info!("token {short} issued for {}, to {client}", self.device);
        let (success, timestamp) = (true, timestamp());
        Some(Issued { success, provisioning_token: self.compact, expires_in: TTL_S, timestamp })
    }
}

fn timestamp() -> String {
    let format =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::now_utc().format(format).unwrap_or_default()
}
