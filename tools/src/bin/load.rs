//! For measuring: a load of whole onboardings, token and certificate, and of clients that are slow.
//!
//! `load flow ADDRESS CONNECTIONS DEVICES [PREFIX]` takes as many new devices from onboarding to
//! their certificates, with requests for P-256 certificates that are prepared before the clock
//! starts, and prints flows per second and the percentiles of a flow's time.
//!
//! `load rate ADDRESS CONNECTIONS RATE SECONDS PREFIX` sends so many onboardings a second, each at its
//! time, and prints the percentiles of the time from then to the answer: one that waits because the
//! answer before it was late has waited.
//!
//! `load slow ADDRESS CONNECTIONS` sends half a request on each connection, prints `ready`, and
//! holds them until standard input ends.
//!
//! `load start ADDRESS TIMES PROGRAM [ARGUMENT …]` starts the program again and again, kills it at
//! its first answer to `GET /health`, and prints the milliseconds that each start took.

#![allow(clippy::indexing_slicing, reason = "a measurement that goes wrong may end with a panic")]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::KeyPair;
use tools::http::{self, Connection, get};
use tools::{Failure, csr, quantile_ms};

/// Threads that drive the connections, each its share in turn.
const THREADS: usize = 4;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["flow", address, connections, devices] => {
            flow(address.parse()?, connections.parse()?, devices.parse()?, "load")
        }
        ["flow", address, connections, devices, prefix] => {
            flow(address.parse()?, connections.parse()?, devices.parse()?, prefix)
        }
        ["rate", address, connections, rate, seconds, prefix] => {
            let rate = Rate { connections: connections.parse()?, per_second: rate.parse()? };
            at_rate(address.parse()?, rate, seconds.parse()?, prefix)
        }
        ["slow", address, connections] => slow(address.parse()?, connections.parse()?),
        ["start", address, times, program, ref rest @ ..] => {
            (0..times.parse()?).try_for_each(|_: u32| start(address.parse()?, program, rest))
        }
        _ => Err("usage: load flow|rate|slow|start ADDRESS …".into()),
    }
}

fn start(address: SocketAddr, program: &str, arguments: &[&str]) -> Result<(), Failure> {
    const PAUSE: Duration = Duration::from_micros(50);
    let began = Instant::now();
    let mut child = Command::new(program).args(arguments).stderr(Stdio::null()).spawn()?;
    let mut answered = Err("no answer".into());
    while answered.is_err() && began.elapsed() < Duration::from_secs(5) {
        thread::sleep(PAUSE);
        answered = is_healthy(address);
    }
    println!("{:.3}", began.elapsed().as_secs_f64() * 1000.0);
    child.kill()?;
    child.wait()?;
    answered
}

fn is_healthy(address: SocketAddr) -> Result<(), Failure> {
    Connection::over(TcpStream::connect(address)?).exchange(&get("/health", "")).map(drop)
}

fn slow(address: SocketAddr, connections: usize) -> Result<(), Failure> {
    let mut held = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"POST /api/v1/onboarding HTTP/1.1\r\nHost: bench\r\nX-Half: ")?;
        held.push(stream);
    }
    println!("ready");
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// So many requests a second, over so many connections in turn.
#[derive(Clone, Copy)]
struct Rate {
    connections: u32,
    per_second: u32,
}

fn at_rate(address: SocketAddr, rate: Rate, seconds: u32, prefix: &str) -> Result<(), Failure> {
    let start = Instant::now() + Duration::from_millis(50);
    let drivers: Vec<_> = (0..rate.connections)
        .map(|first| {
            let names = format!("{prefix}-{first}-");
            let numbers = (first..seconds * rate.per_second).step_by(rate.connections as usize);
            let due = move |n: u32| start + Duration::from_secs(1) * n / rate.per_second;
            thread::spawn(move || onboard_at(address, numbers.map(due), &names))
        })
        .collect();
    let mut times = Vec::new();
    for driver in drivers {
        times.extend(driver.join().map_err(|_| "a driver panicked")??);
    }
    times.sort_unstable();
    let (p50, p99) = (quantile_ms(&times, 0.5), quantile_ms(&times, 0.99));
    println!("requests {} p50_ms {p50:.3} p99_ms {p99:.3}", times.len());
    Ok(())
}

fn onboard_at(
    address: SocketAddr,
    due: impl Iterator<Item = Instant>,
    names: &str,
) -> Result<Vec<Duration>, Failure> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut connection = Connection::over(stream);
    let mut times = Vec::new();
    for (n, due) in due.enumerate() {
        let request = post("onboarding", "", &format!(r#"{{"device_id":"{names}{n}"}}"#));
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let answer = connection.exchange(&request)?;
        if answer.status != 200 {
            return Err(answer.body.into());
        }
        times.push(due.elapsed());
    }
    Ok(times)
}

/// What one device sends: its onboarding, and the body with which it presents its token.
struct Device {
    onboarding: String,
    signing: String,
}

fn flow(
    address: SocketAddr,
    connections: usize,
    devices: usize,
    prefix: &str,
) -> Result<(), Failure> {
    let threads = THREADS.min(connections);
    let prepared: Vec<Vec<Device>> = (0..threads)
        .map(|thread| {
            let key = KeyPair::generate()?;
            (thread..devices).step_by(threads).map(|n| device(prefix, n, &key)).collect()
        })
        .collect::<Result<_, Failure>>()?;
    let start = Instant::now();
    let drivers: Vec<_> = prepared
        .into_iter()
        .enumerate()
        .map(|(thread, devices)| {
            let share = (thread..connections).step_by(threads).count();
            thread::spawn(move || drive(address, share, &devices))
        })
        .collect();
    let mut times = Vec::with_capacity(devices);
    for driver in drivers {
        times.extend(driver.join().map_err(|_| "a driver panicked")??);
    }
    let took = start.elapsed();
    times.sort_unstable();
    println!(
        "flows {} per_second {:.0} p50_ms {:.2} p99_ms {:.2}",
        times.len(),
        times.len() as f64 / took.as_secs_f64(),
        quantile_ms(&times, 0.5),
        quantile_ms(&times, 0.99)
    );
    Ok(())
}

fn device(prefix: &str, n: usize, key: &KeyPair) -> Result<Device, Failure> {
    let name = format!("{prefix}-{n}");
    let csr = BASE64.encode(csr(&name, key)?);
    let body = format!(r#"{{"device_id":"{name}"}}"#);
    let onboarding = post("onboarding", "", &body);
    Ok(Device { onboarding, signing: format!(r#"{{"csr":"{csr}","device_id":"{name}"}}"#) })
}

fn post(endpoint: &str, fields: &str, body: &str) -> String {
    http::post(&format!("/api/v1/{endpoint}"), fields, body)
}

/// One connection and the device that is under way on it.
struct Client {
    connection: Connection<TcpStream>,
    device: usize,
    began: Instant,
    /// Its token was asked for, and its certificate not yet.
    onboarding: bool,
}

/// Takes all devices through, each connection one at a time. The connections are read in turn: while
/// the one in front is waited for, the others' answers wait for us, which costs them little, as all
/// are served alike.
fn drive(
    address: SocketAddr,
    connections: usize,
    devices: &[Device],
) -> Result<Vec<Duration>, Failure> {
    let mut clients = Vec::new();
    let mut times = Vec::with_capacity(devices.len());
    let mut next = 0..devices.len();
    for device in next.by_ref().take(connections) {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        let began = Instant::now();
        let connection = Connection::over(stream);
        clients.push(Client { connection, device, began, onboarding: true });
    }
    for client in &mut clients {
        client.connection.send(&devices[client.device].onboarding)?;
    }
    while !clients.is_empty() {
        let mut at = 0;
        while at < clients.len() {
            if turn(&mut clients[at], devices, &mut next, &mut times)? {
                at += 1;
            } else {
                clients.swap_remove(at);
            }
        }
    }
    Ok(times)
}

/// Reads an answer and sends what comes next; false when there is nothing left to do.
fn turn(
    client: &mut Client,
    devices: &[Device],
    next: &mut impl Iterator<Item = usize>,
    times: &mut Vec<Duration>,
) -> Result<bool, Failure> {
    let answer = client.connection.receive()?.body;
    if client.onboarding {
        let (_, rest) = answer.split_once("\"provisioning_token\":\"").ok_or(answer.as_str())?;
        let (token, _) = rest.split_once('"').ok_or("half a token")?;
        let bearer = format!("Authorization: Bearer {token}\r\n");
        let request = post("sign-csr", &bearer, &devices[client.device].signing);
        client.connection.send(&request)?;
        client.onboarding = false;
        return Ok(true);
    }
    if !answer.contains("BEGIN CERTIFICATE") {
        return Err(answer.into());
    }
    times.push(client.began.elapsed());
    let Some(device) = next.next() else { return Ok(false) };
    (client.device, client.began, client.onboarding) = (device, Instant::now(), true);
    client.connection.send(&devices[device].onboarding)?;
    Ok(true)
}
