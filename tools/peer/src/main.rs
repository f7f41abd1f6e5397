//! The yardstick: the same token, the same four commands to Redis in one pipeline, the same line in
//! the log, as a user would write them with axum, tokio and a multiplexed connection.
//!
//! It checks less than the service (no limits, no deadlines, no certificates, no way through an
//! outage), so it is a hard yardstick. `peer PORT [REDIS_URL]`; without Redis it only answers
//! `/health`.

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{ConnectInfo, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use redis::aio::MultiplexedConnection;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use time::macros::format_description;

/// `{"alg":"HS256","typ":"JWT"}`
const HEADER: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9";
const TTL_S: u64 = 300;
const PREFIX: &str = "mqtt-lite:";

struct Peer {
    key: Hmac<Sha256>,
    redis: Option<MultiplexedConnection>,
}

#[derive(Deserialize)]
struct Onboarding {
    device_id: String,
}

#[derive(Serialize)]
struct Issued {
    success: bool,
    provisioning_token: String,
    expires_in: u64,
    timestamp: String,
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
    timestamp: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).init();
    let mut arguments = std::env::args().skip(1);
    let port: u16 = arguments.next().ok_or("usage: peer PORT [REDIS_URL]")?.parse()?;
    let redis = match arguments.next() {
        Some(url) => Some(redis::Client::open(url)?.get_multiplexed_async_connection().await?),
        None => None,
    };
    let key = Hmac::new_from_slice(b"bench-secret-bench-secret-bench-secret")?;
    let app = Router::new()
        .route("/api/v1/onboarding", post(onboarding))
        .route("/health", get(health))
        .with_state(Arc::new(Peer { key, redis }))
        .into_make_service_with_connect_info::<SocketAddr>();
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    Ok(axum::serve(listener, app).await?)
}

async fn health() -> Json<Health> {
    Json(Health { status: "ok", timestamp: timestamp() })
}

async fn onboarding(
    State(peer): State<Arc<Peer>>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    Json(body): Json<Onboarding>,
) -> Result<Json<Issued>, StatusCode> {
    let device = body.device_id.trim();
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
    if !(1..=64).contains(&device.len()) || !device.bytes().all(fits) {
        return Err(StatusCode::BAD_REQUEST);
    }
    let iat = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let token = peer.sign(device, iat).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
    match peer.store(device, &token, &hash, iat + TTL_S).await {
        Ok(holder) if holder == token => {}
        Ok(_) => return Err(StatusCode::CONFLICT),
        Err(_) => return Err(StatusCode::SERVICE_UNAVAILABLE),
    }
    let short: String = hash.iter().take(4).map(|b| format!("{b:02x}")).collect();
    log::info!("token {short} issued for {device}, to {}", client.ip());
    let timestamp = timestamp();
    Ok(Json(Issued { success: true, provisioning_token: token, expires_in: TTL_S, timestamp }))
}

impl Peer {
    fn sign(&self, device: &str, iat: u64) -> Result<String, getrandom::Error> {
        let mut jti = [0; 16];
        getrandom::fill(&mut jti)?;
        let json = format!(
            r#"{{"device_id":"{device}","type":"provisioning","iat":{iat},"exp":{},"jti":"{}"}}"#,
            iat + TTL_S,
            BASE64URL.encode(jti)
        );
        let mut token = format!("{HEADER}.{}", BASE64URL.encode(json));
        let tag = self.key.clone().chain_update(token.as_bytes()).finalize().into_bytes();
        token.push('.');
        BASE64URL.encode_string(tag, &mut token);
        Ok(token)
    }

    /// Which token holds the claim.
    async fn store(
        &self,
        device: &str,
        token: &str,
        hash: &[u8],
        exp: u64,
    ) -> redis::RedisResult<String> {
        let Some(mut redis) = self.redis.clone() else { return Ok(token.to_owned()) };
        let (ms, until) = (TTL_S * 1000, exp * 1000);
        let json = format!(r#"{{"deviceId":"{device}","token":"{token}","expiresAt":{until}}}"#);
        let claim = format!("{PREFIX}device:{device}");
        let member = BASE64URL.encode(hash.get(..16).unwrap_or_default());
        let mut pipeline = redis::pipe();
        pipeline
            .cmd("SET")
            .arg(format!("{PREFIX}token:{token}"))
            .arg(json)
            .arg("PX")
            .arg(ms)
            .ignore()
            .cmd("SET")
            .arg(&claim)
            .arg(token)
            .arg("NX")
            .arg("PX")
            .arg(ms)
            .ignore()
            .cmd("GET")
            .arg(&claim)
            .cmd("ZADD")
            .arg(format!("{PREFIX}live"))
            .arg(until)
            .arg(member)
            .ignore();
        let (holder,): (String,) = pipeline.query_async(&mut redis).await?;
        Ok(holder)
    }
}

fn timestamp() -> String {
    let format =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::now_utc().format(format).unwrap_or_default()
}
