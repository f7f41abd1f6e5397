//! A proxy between the program and Redis that knows commands: it counts them, and strikes at one.
//!
//! Until it has struck, each command is sent when the one before it has been answered, so that a fault
//! at the third of five leaves two that were carried out and answered, and two that were never sent.
//! What a network does to bytes is the other proxy's part (`proxy`).

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use super::port::Port;
use super::proxy::{listen_on, parse_commands};

/// What happens at a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection is reset before Redis has the command.
    ResetBefore,
    /// Redis carries it out, and the connection is reset before its reply.
    ReplyLost,
    /// Redis refuses it with this.
    Error(&'static str),
}

/// A running proxy; its threads end with the connections.
#[derive(Debug)]
pub struct CommandProxy {
    port: Port,
    strike: Arc<Mutex<Strike>>,
}

/// Where it strikes, and where it has.
#[derive(Debug, Default)]
struct Strike {
    /// Commands that pass before it strikes, and how it does.
    armed: Option<(usize, Fault)>,
    /// Once struck, every further command meets the same fault.
    stays: bool,
    /// The name of the command that was struck.
    struck: Option<String>,
    closed: bool,
}

impl CommandProxy {
    /// A proxy in front of 127.0.0.1:`target`.
    pub fn start(target: u16) -> Self {
        let port = Port::any();
        let (listener, strike) = (listen_on(&port), Arc::new(Mutex::new(Strike::default())));
        let shared = Arc::clone(&strike);
        thread::spawn(move || accept(&listener, target, &shared));
        CommandProxy { port, strike }
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// `redis://127.0.0.1:<port>`
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port())
    }

    /// Strikes at the `at`th command from now on, counted from 1; what is asked about the server and
    /// not about tokens is not counted. `stays`: and at all that follow.
    pub fn arm(&self, at: usize, fault: Fault, stays: bool) {
        *self.strike() = Strike { armed: Some((at, fault)), stays, ..Strike::default() };
    }

    /// The name of the command that was struck.
    pub fn struck(&self) -> Option<String> {
        self.strike().struck.clone()
    }

    /// Lets everything pass again, and says what was struck.
    pub fn disarm(&self) -> Option<String> {
        std::mem::take(&mut *self.strike()).struck
    }

    fn strike(&self) -> MutexGuard<'_, Strike> {
        self.strike.lock().unwrap()
    }
}

impl Drop for CommandProxy {
    fn drop(&mut self) {
        self.strike().closed = true;
        let _wakes_the_acceptor = TcpStream::connect(("127.0.0.1", self.port()));
    }
}

impl Strike {
    /// Commands are looked at one by one.
    fn is_set(&self) -> bool {
        self.armed.is_some() && (self.stays || self.struck.is_none())
    }

    /// What happens to this command.
    fn fate(&mut self, command: &[u8]) -> Option<Fault> {
        let (left, fault) = self.armed?;
        let words = parse_commands(command).pop().unwrap_or_default();
        if self.struck.is_some() {
            return self.stays.then_some(fault);
        }
        if !is_about_tokens(&words) {
            return None;
        }
        self.armed = Some((left.saturating_sub(1), fault));
        if left > 1 {
            return None;
        }
        self.struck = Some(words.first().cloned().unwrap_or_default());
        Some(fault)
    }
}

/// Not the greeting, the look at an idle server, nor the count of `/health`.
fn is_about_tokens(words: &[String]) -> bool {
    const SERVER: [&str; 11] = [
        "HELLO",
        "AUTH",
        "CLIENT",
        "SELECT",
        "PING",
        "INFO",
        "TIME",
        "ZCOUNT",
        "ZRANGEBYSCORE",
        "XREAD",
        "ROLE",
    ];
    let is_server = words.first().is_none_or(|name| SERVER.contains(&&**name));
    !is_server && words.get(1).is_none_or(|key| !key.ends_with(":ca"))
}

fn accept(listener: &TcpListener, target: u16, strike: &Arc<Mutex<Strike>>) {
    for service in listener.incoming().flatten() {
        if strike.lock().unwrap().closed {
            return;
        }
        let strike = Arc::clone(strike);
        // It ends when either side has closed, or by a fault; whoever waits sees the connection gone.
        thread::spawn(move || {
            let _ended = serve(service, target, &strike);
        });
    }
}

fn serve(mut service: TcpStream, target: u16, strike: &Mutex<Strike>) -> io::Result<()> {
    let mut redis = TcpStream::connect(("127.0.0.1", target))?;
    service.set_nodelay(true)?;
    redis.set_nodelay(true)?;
    let (mut commands, mut replies) = (Messages::default(), Messages::default());
    loop {
        let mut command = commands.next(&mut service)?;
        let (is_set, fault) = {
            let mut strike = strike.lock().unwrap();
            (strike.is_set(), strike.fate(&command))
        };
        match fault {
            None => {
                let mut count = 1;
                while let Some(more) = if is_set { None } else { commands.take() } {
                    command.extend(more);
                    count += 1;
                }
                redis.write_all(&command)?;
                let answers = (0..count).map(|_| replies.next(&mut redis));
                service.write_all(&answers.collect::<io::Result<Vec<_>>>()?.concat())?;
            }
            Some(Fault::Error(text)) => service.write_all(format!("-{text}\r\n").as_bytes())?,
            Some(Fault::ResetBefore) => return Ok(()),
            Some(Fault::ReplyLost) => {
                redis.write_all(&command)?;
                replies.next(&mut redis)?;
                return Ok(());
            }
        }
    }
}

/// Messages of the protocol, one after the other.
#[derive(Default)]
struct Messages {
    read: Vec<u8>,
}

impl Messages {
    /// One that has been read already.
    fn take(&mut self) -> Option<Vec<u8>> {
        let length = length_of(&self.read)?;
        Some(self.read.drain(..length).collect())
    }

    fn next(&mut self, from: &mut TcpStream) -> io::Result<Vec<u8>> {
        let mut buffer = [0; 16 * 1024];
        loop {
            if let Some(message) = self.take() {
                return Ok(message);
            }
            match from.read(&mut buffer)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => self.read.extend_from_slice(&buffer[..n]),
            }
        }
    }
}

/// How long the first message is, if it is there as a whole.
fn length_of(bytes: &[u8]) -> Option<usize> {
    let line = bytes.windows(2).position(|w| w == b"\r\n")?;
    let (kind, end) = (bytes[0], line + 2);
    if !matches!(kind, b'$' | b'*') {
        return Some(end);
    }
    let count: i64 = str::from_utf8(&bytes[1..line]).unwrap().parse().unwrap();
    let Ok(count) = usize::try_from(count) else { return Some(end) };
    if kind == b'$' {
        return (bytes.len() >= end + count + 2).then_some(end + count + 2);
    }
    (0..count).try_fold(end, |at, _| Some(at + length_of(&bytes[at..])?))
}
