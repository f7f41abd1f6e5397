//! Attacks a server on loopback and asks meanwhile how the others are served.
//!
//! ```text
//! attack HOST:PORT idle  N SECONDS          N connections that say nothing
//! attack HOST:PORT body  N SECONDS          N that send 63 of 64 KiB of a body, and stop
//! attack HOST:PORT read  N SECONDS [PATH]   N that ask for PATH again and again and never read
//! attack HOST:PORT flood N SECONDS          N that ask for what is refused, and send on and on
//! attack HOST:PORT refuse N SECONDS         N that show a bad token as fast as they are answered
//! attack HOST:PORT hoard N SECONDS          N that send 60 of 64 KiB of a TLS ClientHello, and stop
//! attack HOST:PORT hello N SECONDS [PER]    N that replay one TLS ClientHello, PER from one address
//! attack HOST:PORT burst N TIMES   [PATH]   N opened at once, each asks once, so many times
//! attack HOST:PORT probe   SECONDS [FROM]   /health every 100 ms from the address FROM
//! attack HOST:PORT probe-tls SECONDS CERT   the same over TLS, on a new connection and on a kept one
//! ```
//!
//! Connections come from many addresses of 127.0.0.0/8, so that neither ports nor the limit per
//! address hold them back. One that the server ends is opened again, once a second. Everything is
//! bounded, and nothing but 127.0.0.0/8 is ever asked. `burst` and `probe` exit 1 if an answer is
//! missing.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_recv_buffer_size, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tools::http::{Answer, Connection, Tls, get, tls, tls_session};
use tools::{Failure, quantile_ms};

const CONNECTIONS_MAX: u32 = 16_000;
const TIMES_MAX: u32 = 1_000;
const SECONDS_MAX: u32 = 600;
/// How many connections come from one address.
const PER_ADDRESS: u32 = 50;
/// Longest wait for anything, after which it counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);
const PROBE_EVERY: Duration = Duration::from_millis(100);
/// As little as the system allows of a reply waits on the side of whoever does not read it.
const SMALL_BUFFER: usize = 2_048;
/// Requests that one reader sends at most.
const PIPELINED_MAX: usize = 10_000;

/// What is done with a connection that was just opened.
type Act = Box<dyn Fn(&mut TcpStream) -> io::Result<()>>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        [server, "probe", seconds, from @ ..] => probe(server, seconds, from.first().copied()),
        [server, "probe-tls", seconds, cert] => probe_tls(server, seconds, cert),
        [server, "flood", n, seconds] => flood(server, n, seconds),
        [server, "refuse", n, seconds] => refuse(server, n, seconds),
        [server, "hello", n, seconds, per @ ..] => replay(server, n, seconds, per.first()),
        [server, "burst", n, times, path @ ..] => burst(server, n, times, path.first().copied()),
        [server, mode, n, seconds, path @ ..] => hold(server, mode, n, seconds, path.first()),
        _ => {
            Err("usage: attack HOST:PORT idle|body|read|burst|probe …, see its first lines".into())
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            eprintln!("attack: {e}");
            ExitCode::from(2)
        }
    }
}

/// `idle`, `body`, `hoard` and `read`: opens all, and opens again what the server ends.
fn hold(
    server: &str,
    mode: &str,
    n: &str,
    seconds: &str,
    path: Option<&&str>,
) -> Result<bool, Failure> {
    let (server, n) = (target(server)?, number(n, CONNECTIONS_MAX)?);
    let end = Instant::now() + Duration::from_secs(number(seconds, SECONDS_MAX)?.into());
    let act: Act = match mode {
        "idle" => Box::new(|_| Ok(())),
        "body" => Box::new(|stream| send(stream, &most_of_a_body())),
        "hoard" => Box::new(|stream| send(stream, &most_of_a_hello())),
        "read" => {
            let requests = get(path.unwrap_or(&"/api"), "").repeat(PIPELINED_MAX);
            Box::new(move |stream| send(stream, requests.as_bytes()))
        }
        _ => return Err(format!("unknown mode {mode}").into()),
    };
    let reads_not = mode == "read";
    raise_open_files(n + 100)?;
    let mut places: Vec<Option<TcpStream>> = (0..n).map(|_| None).collect();
    let mut seen = Seen::default();
    while Instant::now() < end {
        let round = Instant::now();
        for (i, place) in (0..).zip(&mut places) {
            if Instant::now() >= end {
                break;
            }
            if place.as_ref().is_none_or(|stream| seen.is_ended(stream, reads_not)) {
                *place = seen.open(server, i, reads_not.then_some(SMALL_BUFFER), &act);
            }
        }
        thread::sleep(Duration::from_secs(1).saturating_sub(round.elapsed()));
    }
    println!("{mode}: {seen:?}");
    Ok(true)
}

/// What became of the connections.
#[derive(Debug, Default)]
struct Seen {
    opened: u32,
    not_opened: u32,
    ended_by_server: u32,
    ended_with_an_answer: u32,
}

impl Seen {
    fn open(
        &mut self,
        server: SocketAddrV4,
        i: u32,
        buffer: Option<usize>,
        act: &Act,
    ) -> Option<TcpStream> {
        let opened = open(server, address(i), buffer).and_then(|mut stream| {
            stream.set_nonblocking(true)?;
            act(&mut stream)?;
            Ok(stream)
        });
        match &opened {
            Ok(_) => self.opened += 1,
            Err(_) => self.not_opened += 1,
        }
        opened.ok()
    }

    /// Whether the server has ended the connection; one that must not read only peeks.
    fn is_ended(&mut self, stream: &TcpStream, peeks: bool) -> bool {
        let mut answer = [0; 4096];
        let came = if peeks { stream.peek(&mut answer) } else { (&*stream).read(&mut answer) };
        match came {
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Ok(n) if n > 0 && peeks => return false,
            Ok(n) if n > 0 => self.ended_with_an_answer += 1,
            _ => {}
        }
        self.ended_by_server += 1;
        true
    }
}

/// Opens `n` connections, then asks on all, then reads all.
fn burst(server: &str, n: &str, times: &str, path: Option<&str>) -> Result<bool, Failure> {
    let (server, n) = (target(server)?, number(n, CONNECTIONS_MAX)?);
    let times = number(times, TIMES_MAX)?;
    let request = get(path.unwrap_or("/health"), "Connection: close\r\n");
    raise_open_files(n + 100)?;
    let (mut answered, mut unopened, mut longest) = (0, 0, Duration::ZERO);
    for time in 0..times {
        let start = Instant::now();
        let crowd: Vec<_> = (0..n).map(|i| open(server, address(time * n + i), None)).collect();
        let mut crowd: Vec<_> =
            crowd.into_iter().filter_map(Result::ok).map(Connection::over).collect();
        unopened += n - u32::try_from(crowd.len())?;
        for client in &mut crowd {
            // Whoever cannot write will read no answer either.
            let _ = client.send(&request);
        }
        let good = crowd.iter_mut().filter_map(|client| client.receive().and_then(is_good).ok());
        answered += good.count();
        longest = longest.max(start.elapsed());
    }
    let wanted = n as usize * times as usize;
    println!(
        "burst: {n} at once, {times} times: {answered} of {wanted} answered, {unopened} not opened, \
         longest round {} ms",
        longest.as_millis()
    );
    Ok(answered == wanted)
}

/// Sends the same ClientHello on each connection, and on a new one as soon as it is answered: it
/// costs the server a key exchange and a signature, and the client nothing.
fn replay(server: &str, n: &str, seconds: &str, per: Option<&&str>) -> Result<bool, Failure> {
    let (server, n) = (target(server)?, number(n, CONNECTIONS_MAX)?);
    let end = Instant::now() + Duration::from_secs(number(seconds, SECONDS_MAX)?.into());
    let per = per.map_or(Ok(PER_ADDRESS), |per| number(per, CONNECTIONS_MAX))?;
    let mut hello = Vec::new();
    tls_session("localhost", RootCertStore::empty().into(), None)?.write_tls(&mut hello)?;
    let act: Act = Box::new(move |stream| send(stream, &hello));
    raise_open_files(n + 100)?;
    let mut places: Vec<Option<TcpStream>> = (0..n).map(|_| None).collect();
    let mut seen = Seen::default();
    while Instant::now() < end {
        for (i, place) in (0..).zip(&mut places) {
            if place.as_ref().is_none_or(|stream| seen.is_ended(stream, false)) {
                *place = seen.open(server, i / per * PER_ADDRESS, None, &act);
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    println!("hello: {seen:?}");
    Ok(true)
}

/// Sends as fast as the server takes it, after a request that is refused.
fn flood(server: &str, n: &str, seconds: &str) -> Result<bool, Failure> {
    let (server, n) = (target(server)?, number(n, CONNECTIONS_MAX)?);
    let end = Instant::now() + Duration::from_secs(number(seconds, SECONDS_MAX)?.into());
    let act: Act = Box::new(|stream| send(stream, b"GET / HTTP/1.1\r\n\r\n"));
    raise_open_files(n + 100)?;
    let mut places: Vec<Option<TcpStream>> = (0..n).map(|_| None).collect();
    let (mut seen, mut sent) = (Seen::default(), 0);
    while Instant::now() < end {
        for (i, place) in (0..).zip(&mut places) {
            match place.as_mut().map(|stream| stream.write(&[b'x'; 64 * 1024])) {
                Some(Ok(bytes)) => sent += bytes,
                Some(Err(e)) if e.kind() == ErrorKind::WouldBlock => {}
                Some(Err(_)) | None => *place = seen.open(server, i, None, &act),
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    println!("flood: {} opened, {} MiB sent", seen.opened, sent / (1024 * 1024));
    Ok(true)
}

/// Shows tokens that are none, some at once on each connection, as fast as they are refused.
fn refuse(server: &str, n: &str, seconds: &str) -> Result<bool, Failure> {
    const AT_ONCE: usize = 8;
    let (server, n) = (target(server)?, number(n, CONNECTIONS_MAX)?);
    let end = Instant::now() + Duration::from_secs(number(seconds, SECONDS_MAX)?.into());
    let requests = "POST /api/v1/sign-csr HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\n\
                    Content-Type: application/json\r\nContent-Length: 11\r\n\r\n{\"csr\":\"x\"}";
    let requests = requests.repeat(AT_ONCE);
    raise_open_files(n + 100)?;
    let act: Act = Box::new(|stream| stream.set_nonblocking(false));
    let mut places: Vec<Option<TcpStream>> = (0..n).map(|_| None).collect();
    let (mut seen, mut refused) = (Seen::default(), 0);
    while Instant::now() < end {
        for (i, place) in (0..).zip(&mut places) {
            let open = place.take().or_else(|| seen.open(server, i, None, &act));
            *place = open.filter(|mut stream| stream.write_all(requests.as_bytes()).is_ok());
        }
        for place in &mut places {
            let answered = place.as_mut().map(|stream| read_answers(stream, AT_ONCE));
            match answered {
                Some(Ok(())) => refused += AT_ONCE,
                _ => *place = None,
            }
        }
    }
    println!("refuse: {} opened, {refused} refused", seen.opened);
    Ok(true)
}

/// Reads the heads of so many answers, and what came with them.
fn read_answers(stream: &mut TcpStream, count: usize) -> io::Result<()> {
    let (mut answers, mut piece) = (String::new(), [0; 16 * 1024]);
    while !(answers.ends_with('}') && answers.matches("HTTP/1.1 ").count() == count) {
        match stream.read(&mut piece)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => answers += &String::from_utf8_lossy(piece.get(..n).unwrap_or_default()),
        }
    }
    Ok(())
}

/// Asks for `/health` over TLS: with a handshake of its own each time, and on one that is kept.
fn probe_tls(server: &str, seconds: &str, cert: &str) -> Result<bool, Failure> {
    let server = target(server)?;
    let end = Instant::now() + Duration::from_secs(number(seconds, SECONDS_MAX)?.into());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(cert)?)?;
    let roots = Arc::new(roots);
    // Each time another client, as far as the server can tell.
    let mut from = Ipv4Addr::new(127, 99, 0, 0).to_bits();
    let mut open = || -> Result<Connection<Tls>, Failure> {
        from += 1;
        let stream = open(server, Ipv4Addr::from_bits(from), None)?;
        Ok(Connection::over(tls(stream, "localhost", Arc::clone(&roots), None)?))
    };
    let mut kept = open()?;
    ask(&mut kept)?;
    let (mut new_times, mut kept_times) = (Times::default(), Times::default());
    while Instant::now() < end {
        let start = Instant::now();
        kept_times.take(|| ask(&mut kept));
        new_times.take(|| ask(&mut open()?));
        thread::sleep(PROBE_EVERY.saturating_sub(start.elapsed()));
    }
    kept_times.print("kept");
    new_times.print("probe");
    Ok(kept_times.are_good() && new_times.are_good())
}

/// One request on a connection that stays open.
fn ask<S: Read + Write>(connection: &mut Connection<S>) -> Result<(), Failure> {
    connection.exchange(&get("/health", "")).and_then(is_good)
}

fn is_good(answer: Answer) -> Result<(), Failure> {
    if answer.status == 200 { Ok(()) } else { Err(format!("a {}", answer.status).into()) }
}

/// How long answers took.
#[derive(Default)]
struct Times {
    taken: Vec<Duration>,
    failures: usize,
}

impl Times {
    fn take(&mut self, ask: impl FnOnce() -> Result<(), Failure>) {
        let start = Instant::now();
        match ask() {
            Ok(()) => self.taken.push(start.elapsed()),
            Err(e) => {
                self.failures += 1;
                eprintln!("probe: {e} after {:?}", start.elapsed());
            }
        }
    }

    fn are_good(&self) -> bool {
        self.failures == 0 && !self.taken.is_empty()
    }

    fn print(&mut self, what: &str) {
        self.taken.sort();
        println!(
            "{what}: count {} failures {} p50 {:.2} p99 {:.2} max {:.2} ms",
            self.taken.len(),
            self.failures,
            quantile_ms(&self.taken, 0.5),
            quantile_ms(&self.taken, 0.99),
            quantile_ms(&self.taken, 1.0)
        );
    }
}

/// Asks for `/health` on a new connection each time.
fn probe(server: &str, seconds: &str, from: Option<&str>) -> Result<bool, Failure> {
    let server = target(server)?;
    let from = from.unwrap_or("127.99.99.99").parse()?;
    let end = Instant::now() + Duration::from_secs(number(seconds, SECONDS_MAX)?.into());
    let request = get("/health", "Connection: close\r\n");
    let mut times = Times::default();
    while Instant::now() < end {
        let start = Instant::now();
        times.take(|| {
            Connection::over(open(server, from, None)?).exchange(&request).and_then(is_good)
        });
        thread::sleep(PROBE_EVERY.saturating_sub(start.elapsed()));
    }
    times.print("probe");
    Ok(times.are_good())
}

/// A connection from `from`; `SO_SNDTIMEO` bounds connecting, too (socket(7)).
fn open(server: SocketAddrV4, from: Ipv4Addr, buffer: Option<usize>) -> io::Result<TcpStream> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    if let Some(bytes) = buffer {
        set_socket_recv_buffer_size(&socket, bytes)?;
    }
    bind(&socket, &SocketAddrV4::new(from, 0))?;
    connect(&socket, &server)?;
    Ok(TcpStream::from(socket))
}

/// Sends what the socket takes.
fn send(stream: &mut TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn most_of_a_body() -> Vec<u8> {
    let head = "POST /api/v1/onboarding HTTP/1.1\r\nHost: localhost\r\n\
                Content-Type: application/json\r\nContent-Length: 65536\r\n\r\n";
    let mut bytes = head.as_bytes().to_vec();
    bytes.resize(bytes.len() + 63 * 1024, b'x');
    bytes
}

/// The start of a ClientHello of nearly 64 KiB, in full records.
fn most_of_a_hello() -> Vec<u8> {
    let mut message = vec![1, 0, 0xff, 0xf0];
    message.resize(60 * 1024, 0);
    let records = message.chunks(16 * 1024).flat_map(|part| {
        let length = u16::try_from(part.len()).unwrap_or_default().to_be_bytes();
        [[22, 3, 1].as_slice(), &length, part].concat()
    });
    records.collect()
}

/// The address of the connection with this number, from 127.1.0.1 on.
fn address(i: u32) -> Ipv4Addr {
    let block = i / PER_ADDRESS % 50_000;
    Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + block)
}

fn target(text: &str) -> Result<SocketAddrV4, Failure> {
    match text.parse()? {
        SocketAddr::V4(server) if server.ip().is_loopback() => Ok(server),
        other => Err(format!("{other} is not in 127.0.0.0/8").into()),
    }
}

fn number(text: &str, max: u32) -> Result<u32, Failure> {
    match text.parse()? {
        n if (1..=max).contains(&n) => Ok(n),
        n => Err(format!("{n} is not from 1 to {max}").into()),
    }
}

fn raise_open_files(wanted: u32) -> Result<(), Failure> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted.into()) {
        return Ok(());
    }
    let raised = Rlimit { current: Some(wanted.into()), maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).map_err(|e| format!("{wanted} open files: {e}").into())
}
