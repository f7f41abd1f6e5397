//! The yardstick: the same token, the same commands to Redis in one pipeline, the same line in the log,
//! as a user would write them with axum, tokio and a multiplexed connection.
//!
//! It checks less than the service (no limits, no deadlines, no certificates, no way through an
//! outage), so it is a hard yardstick. `peer PORT REDIS_URL`.

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};

use axum::extract::{ConnectInfo, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use peer::{Health, Issued, Onboarding};
use redis::aio::MultiplexedConnection;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).init();
    let mut arguments = std::env::args().skip(1);
    let (Some(port), Some(url)) = (arguments.next(), arguments.next()) else {
        return Err("usage: peer PORT REDIS_URL".into());
    };
    let redis = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    let app = Router::new()
        .route("/api/v1/onboarding", post(onboarding))
        .route("/health", get(async || Json(Health::now())))
        .with_state(redis)
        .into_make_service_with_connect_info::<SocketAddr>();
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port.parse()?)).await?;
    Ok(axum::serve(listener, app).await?)
}

async fn onboarding(
    State(mut redis): State<MultiplexedConnection>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    Json(body): Json<Onboarding>,
) -> Result<Json<Issued>, StatusCode> {
    let token = body.sign().ok_or(StatusCode::BAD_REQUEST)?;
    let holder = token.commands().query_async(&mut redis).await;
    let holder = holder.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    token.issued(holder, client.ip()).map(Json).ok_or(StatusCode::CONFLICT)
}
