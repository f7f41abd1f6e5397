//! For measuring: a constant answer behind the edge, and the same from bare `tiny_http`. A target
//! that ends in `?n` has n bytes, and `/api/v1/crl?n` comes from the lane for what is large.
//!
//! `cargo run --release -p tools --bin edge -- [lanes [port]]` serves through the edge on port 19102 (HTTPS
//! if `TLS_CERT` and `TLS_KEY` are set), and bare on the port after it.

use std::error::Error;
use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use log::LevelFilter;
use mqtt_publisher_lite::api::{self, Request};
use mqtt_publisher_lite::config::{Http, Log, LogFormat, certified_key};
use mqtt_publisher_lite::edge::{Edge, Outbox, Settings};
use mqtt_publisher_lite::http::Reply;
use mqtt_publisher_lite::logging;
use mqtt_publisher_lite::server::{LaneServer, open_lanes};

const BODY: &str = r#"{"status":"ok","timestamp":"2025-11-27T10:00:00.000Z","version":"1.0.0"}"#;

fn main() -> Result<(), Box<dyn Error>> {
    let log = Log {
        level: LevelFilter::Error,
        filter: std::env::var("RUST_LOG").ok(),
        format: LogFormat::Text,
    };
    logging::init(&log, std::env::var_os("JOURNAL_STREAM").as_deref())?;
    let lanes: usize = std::env::args().nth(1).map_or(Ok(1), |n| n.parse())?;
    let port: u16 = std::env::args().nth(2).map_or(Ok(19102), |n| n.parse())?;
    thread::spawn(move || bare(port + 1));
    let dir = std::env::temp_dir().join(format!("edge-tool-{}", std::process::id()));
    // Half of the workers sign.
    let lanes = open_lanes(&dir, &api::lane_kinds(), 2 * lanes)?;
    let addresses = lanes.iter().map(LaneServer::address).collect();
    let mut http = Http::from_lookup(|name| std::env::var_os(name))?;
    http.port = port;
    let mut settings = Settings::new(http);
    settings.classify = api::classify;
    if let (Ok(certificate), Ok(key)) = (std::env::var("TLS_CERT"), std::env::var("TLS_KEY")) {
        let shown = certified_key(&std::fs::read(certificate)?, &std::fs::read(key)?);
        settings.tls = Some(shown.map_err(|fault| format!("{fault:?}"))?);
    }
    let edge = Edge::open(settings, addresses)?;
    for lane in lanes {
        let outbox = edge.outbox();
        thread::spawn(move || work(&lane, &outbox));
    }
    Ok(edge.run()?)
}

fn work(lane: &LaneServer, outbox: &Outbox) {
    while let Some(batch) = lane.next_batch(16, Duration::ZERO, outbox) {
        let replies = batch.requests.iter().map(reply).collect();
        batch.answer(replies);
    }
}

fn reply(request: &Request) -> Reply {
    let body = match request.query.parse() {
        Ok(n) => vec![b'x'; n],
        Err(_) => BODY.as_bytes().to_vec(),
    };
    Reply::of_type("application/json", body)
}

fn bare(port: u16) {
    let Ok(server) = tiny_http::Server::http((Ipv4Addr::UNSPECIFIED, port)) else { return };
    for request in server.incoming_requests() {
        let content_type = tiny_http::Header::from_bytes("Content-Type", "application/json");
        let mut response = tiny_http::Response::from_string(BODY);
        if let Ok(field) = content_type {
            response = response.with_header(field);
        }
        let _ = request.respond(response);
    }
}
