//! Blocking connections: one for each worker, pipelines with one deadline, closed at the first doubt.
//!
//! The `redis` crate encodes commands, parses replies, does TLS and logs in. What it does not do is
//! done here: its time-outs count per reply and are cleared after set-up, its pipeline hides all
//! replies behind the first error, and a reply that came too late would be read as the next one's.

use std::fmt;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use redis::{
    Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo, RedisConnectionInfo,
    RedisError, ServerError, ServerErrorKind, TlsCertificates, Value,
};

use super::command::Commands;
use super::reply::Reply;
use crate::config;
use crate::store::{Down, DownKind, StoreError, locked};

/// The time-out of a socket is set anew when this much of it has passed; setting it for every reply
/// would cost a system call each.
const TIMEOUT_GRAIN: Duration = Duration::from_millis(5);
/// A peer that a dead NAT path hides is noticed after about a minute of silence.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
/// What is said of an answer that did not come.
const LATE: &str = "no answer in time";
/// However long connecting took, the greeting has this much time.
const LEAST_GREETING: Duration = Duration::from_millis(20);

/// One connection to Redis.
pub(super) struct Connection {
    inner: redis::Connection,
    /// The pool's generation that it belongs to.
    generation: u64,
    /// The time-outs that the socket has now.
    timeout: Duration,
    write_timeout: Duration,
}

impl Connection {
    /// Sends the commands in one write and reads one reply for each, all before `deadline`.
    pub fn round_trip(
        &mut self,
        commands: &Commands,
        deadline: Instant,
    ) -> Result<Vec<Reply>, Down> {
        let sent = |error| failure(&error);
        let left = time_left(deadline).ok_or_else(|| late(false))?;
        self.limit_writing(left).map_err(sent)?;
        // Writing also reads while TLS shakes hands.
        self.limit_reading(left).map_err(sent)?;
        self.inner.send_packed_command(commands.bytes()).map_err(sent)?;
        (0..commands.count()).map(|_| self.receive(deadline)).collect()
    }

    /// One reply; an error of the server is a reply like any other.
    fn receive(&mut self, deadline: Instant) -> Result<Reply, Down> {
        let left = time_left(deadline).ok_or_else(|| late(true))?;
        self.limit_reading(left).map_err(|error| failure(&error))?;
        match self.inner.recv_response() {
            Ok(Value::ServerError(error)) => Ok(Err(refusal(&error))),
            Ok(value) => Ok(Ok(value)),
            Err(error) => Err(failure(&error)),
        }
    }

    fn limit_writing(&mut self, left: Duration) -> Result<(), RedisError> {
        if self.write_timeout.abs_diff(left) > TIMEOUT_GRAIN {
            self.inner.set_write_timeout(Some(left))?;
            self.write_timeout = left;
        }
        Ok(())
    }

    fn limit_reading(&mut self, left: Duration) -> Result<(), RedisError> {
        if self.timeout.abs_diff(left) > TIMEOUT_GRAIN {
            self.inner.set_read_timeout(Some(left))?;
            self.timeout = left;
        }
        Ok(())
    }
}

/// The connection failed; nothing more is read from it.
fn lost(why: String, maybe_done: bool) -> Down {
    Down { why, kind: DownKind::Lost, maybe_done, dying: None }
}

/// What was sent may have arrived.
fn failure(error: &RedisError) -> Down {
    if error.is_timeout() { late(true) } else { lost(reason(error), true) }
}

fn late(maybe_done: bool) -> Down {
    lost(LATE.to_owned(), maybe_done)
}

fn time_left(deadline: Instant) -> Option<Duration> {
    deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}

/// The connections that are not in use. Only [`Pool::reopen`] makes any, on the caller's thread.
pub(super) struct Pool {
    client: Client,
    tls: bool,
    /// For connecting and greeting. An eighth of what was configured is left for the look-up of the
    /// name and for saying why it failed before the start stops waiting.
    connect_timeout: Duration,
    size: usize,
    state: Mutex<State>,
    put_back: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<Connection>,
    /// Connections of this generation, idle or in use; 0 while there is no server.
    open: usize,
    /// Counts up at every reopening; a connection of an older one is closed when it comes back.
    generation: u64,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({})", self.size)
    }
}

impl Pool {
    pub fn new(config: &config::Redis) -> Result<Self, StoreError> {
        let client =
            client(config).map_err(|error| StoreError::Down(lost(reason(&error), false)))?;
        Ok(Pool {
            client,
            tls: config.tls,
            connect_timeout: config.connect_timeout * 7 / 8,
            size: config.pool_size.max(1),
            state: Mutex::default(),
            put_back: Condvar::new(),
        })
    }

    pub fn is_open(&self) -> bool {
        locked(&self.state).open > 0
    }

    /// An idle connection, or one that another worker puts back before the deadline.
    pub fn take(&self, deadline: Instant) -> Result<Connection, Down> {
        let mut state = locked(&self.state);
        loop {
            if let Some(connection) = state.idle.pop() {
                return Ok(connection);
            }
            if state.open == 0 {
                return Err(lost("not connected".to_owned(), false));
            }
            let busy = || Down {
                kind: DownKind::Busy,
                ..lost("REDIS_POOL_SIZE connections are too few".to_owned(), false)
            };
            let left = time_left(deadline).ok_or_else(busy)?;
            let waited = self.put_back.wait_timeout(state, left);
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    /// Only a connection that has answered everything comes back; the others are dropped.
    pub fn put_back(&self, connection: Connection) {
        let mut state = locked(&self.state);
        if connection.generation == state.generation {
            state.idle.push(connection);
            self.put_back.notify_one();
        }
    }

    /// Closes what is idle, and what is in use when it comes back.
    pub fn close(&self) {
        let mut state = locked(&self.state);
        state.generation += 1;
        state.open = 0;
        state.idle.clear();
        self.put_back.notify_all();
    }

    /// Connects anew, name resolution included, greets on the last connection, and replaces all
    /// connections. One is enough to serve; a server may allow no more.
    ///
    /// On the last, because the server may start again in between: then the others fail when they
    /// are used, which is noticed. Were the last one not the one that was asked who it is talking
    /// to, it would serve another server, empty perhaps, as if it were the one that was greeted.
    pub fn reopen<T>(
        &self,
        greet: impl FnOnce(&mut Connection, Instant) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.close();
        let deadline = Instant::now() + self.connect_timeout;
        let mut last = self.connect()?;
        let mut fresh = Vec::with_capacity(self.size);
        let mut refused = None;
        while refused.is_none() && fresh.len() + 1 < self.size {
            match self.connect() {
                Ok(connection) => fresh.push(std::mem::replace(&mut last, connection)),
                Err(error) => refused = Some(error),
            }
        }
        let deadline = deadline.max(Instant::now() + LEAST_GREETING);
        let hello = greet(&mut last, deadline).map_err(|error| self.explained(error))?;
        fresh.push(last);
        if let Some(error) = refused {
            log::warn!("Redis gives {} of {} connections: {error}", fresh.len(), self.size);
        }
        let mut state = locked(&self.state);
        state.generation += 1;
        state.open = fresh.len();
        let generation = state.generation;
        state.idle = fresh.into_iter().map(|c| Connection { generation, ..c }).collect();
        self.put_back.notify_all();
        Ok(hello)
    }

    fn connect(&self) -> Result<Connection, StoreError> {
        match self.client.get_connection_with_timeout(self.connect_timeout) {
            Ok(inner) => Ok(Connection {
                inner,
                generation: 0,
                timeout: Duration::ZERO,
                write_timeout: Duration::ZERO,
            }),
            Err(error) => Err(self.connect_error(&error)),
        }
    }

    fn connect_error(&self, error: &RedisError) -> StoreError {
        let server = error.clone().into_server_errors();
        if let Some((_, server)) = server.as_deref().and_then(<[_]>::first) {
            return refusal(server);
        }
        match error.kind() {
            ErrorKind::AuthenticationFailed => {
                let why = format!("wrong user name or password? {}", reason(error));
                StoreError::Down(Down { kind: DownKind::Refused, ..lost(why, false) })
            }
            _ if error.is_timeout() => self.explained(StoreError::Down(late(false))),
            _ if error.is_connection_refusal() => StoreError::Down(lost(reason(error), false)),
            _ => self.explained(StoreError::Down(lost(reason(error), false))),
        }
    }

    /// A server that speaks TLS, asked in plain, hangs up; a plain one, asked in TLS, waits for the
    /// end of what it takes for a command, or answers with an error that is no TLS.
    fn explained(&self, error: StoreError) -> StoreError {
        let StoreError::Down(down) = error else { return error };
        let is_late = down.why == LATE;
        let why = match down.kind {
            DownKind::Lost if self.tls && (is_late || down.why.contains("corrupt message")) => {
                format!("TLS failed, is this a plain port? {}", down.why)
            }
            DownKind::Lost if !self.tls && !is_late && down.why.contains("end of file") => {
                format!("connection closed, does the server want TLS? {}", down.why)
            }
            _ => down.why,
        };
        StoreError::Down(Down { why, ..down })
    }
}

fn client(config: &config::Redis) -> Result<Client, RedisError> {
    let tcp = TcpSettings::default().set_nodelay(true).set_keepalive(
        TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_EVERY)
            .with_retries(KEEPALIVE_PROBES),
    );
    let mut login = RedisConnectionInfo::default().set_db(config.db).set_skip_set_lib_name();
    if let Some(username) = &config.username {
        login = login.set_username(username);
    }
    if let Some(password) = &config.password {
        login = login.set_password(password.reveal());
    }
    let info = |addr: ConnectionAddr| -> Result<ConnectionInfo, RedisError> {
        Ok(addr.into_connection_info()?.set_redis_settings(login).set_tcp_settings(tcp))
    };
    let (host, port) = (config.host.clone(), config.port);
    if !config.tls {
        return Client::open(info(ConnectionAddr::Tcp(host, port))?);
    }
    let info = info(ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None })?;
    match &config.tls_ca {
        None => Client::open(info),
        Some(ca) => {
            let root_cert = Some(ca.pem.clone());
            Client::build_with_tls(info, TlsCertificates { client_tls: None, root_cert })
        }
    }
}

/// What a server's error means. `WRONGTYPE` is the fault of one key; with any other the server says
/// that it does not serve, or not us.
fn refusal(error: &ServerError) -> StoreError {
    let detail = error.details().unwrap_or_default();
    let why = format!("{} {detail}", error.code()).trim_end().to_owned();
    if error.code() == "WRONGTYPE" || detail.contains("WRONGTYPE") {
        return StoreError::Failed(why);
    }
    let read_only = error.kind() == Some(ServerErrorKind::ReadOnly) || detail.contains("READONLY");
    let kind = if read_only { DownKind::ReadOnly } else { DownKind::Refused };
    StoreError::Down(Down { kind, ..lost(why, false) })
}

/// The text of an error on one line. The crate's errors name neither address nor password.
fn reason(error: &RedisError) -> String {
    error.to_string().replace(['\n', '\r'], " ")
}
