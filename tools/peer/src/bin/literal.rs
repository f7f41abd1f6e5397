//! The other yardstick: the literal design, `tiny_http` on the network and four workers that block, each
//! with a connection to Redis of its own, for one request at a time. `literal PORT REDIS_URL`.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::thread;

use peer::{Health, Onboarding};
use tiny_http::{Header, Request, Response, Server};

const WORKERS: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).init();
    let mut arguments = std::env::args().skip(1);
    let (Some(port), Some(url)) = (arguments.next(), arguments.next()) else {
        return Err("usage: literal PORT REDIS_URL".into());
    };
    let client = redis::Client::open(url)?;
    let server = Server::http((Ipv4Addr::LOCALHOST, port.parse::<u16>()?));
    let server = Arc::new(server.map_err(|error| error.to_string())?);
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        let (server, mut redis) = (Arc::clone(&server), client.get_connection()?);
        workers.push(thread::spawn(move || {
            while let Ok(request) = server.recv() {
                answer(request, &mut redis);
            }
        }));
    }
    workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a worker panicked".into()))
}

fn answer(mut request: Request, redis: &mut redis::Connection) {
    let json = match request.url() {
        "/health" => serde_json::to_string(&Health::now()).ok(),
        _ => onboarding(&mut request, redis),
    };
    let status = if json.is_some() { 200 } else { 503 };
    let mut response = Response::from_string(json.unwrap_or_default()).with_status_code(status);
    if let Ok(field) = Header::from_bytes("Content-Type", "application/json") {
        response.add_header(field);
    }
    // A client that is gone needs no answer.
    let _ = request.respond(response);
}

fn onboarding(request: &mut Request, redis: &mut redis::Connection) -> Option<String> {
    let mut body = String::new();
    request.as_reader().read_to_string(&mut body).ok()?;
    let client = request.remote_addr().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |a| a.ip());
    let token = serde_json::from_str::<Onboarding>(&body).ok()?.sign()?;
    let holder = token.commands().query(redis).ok()?;
    serde_json::to_string(&token.issued(holder, client)?).ok()
}
