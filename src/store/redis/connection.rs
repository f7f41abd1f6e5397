//! One blocking connection: pipelines with one deadline, closed at the first doubt.
//!
//! The `redis` crate parses the replies; its own connection is not used: its time-outs count per
//! reply and are cleared after set-up, its pipeline hides all replies behind the first error, a
//! reply that came too late would be read as the next one's, a name's second address is never
//! reached if the first one swallows packets, and nothing tells whether the other side has closed.

use std::io::{self, Read, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::{Parser, Value};

use super::cause::{Server, Stage};
use super::command::{Command, Commands};
use super::reply::Reply;
use super::stream::{Stream, time_left};
use crate::clock::Now;
use crate::config;
use crate::store::{Down, StoreError};

/// The time-out of a socket is set anew when this much of it has passed; setting it for every reply
/// would cost a system call each.
const TIMEOUT_GRAIN: Duration = Duration::from_millis(5);

/// One connection to Redis.
pub(super) struct Connection {
    stream: Stream,
    parser: Parser,
    server: Arc<Server>,
    stage: Stage,
    /// The time-outs that the socket has now.
    read_timeout: Duration,
    write_timeout: Duration,
    /// The pool's generation that it belongs to.
    pub generation: u64,
    /// When it was put back into the pool, by [`Now::mono_ms`].
    pub idle_since_ms: u64,
}

impl Connection {
    pub fn new(stream: Stream, server: Arc<Server>) -> Self {
        Connection {
            stream,
            parser: Parser::new(),
            server,
            stage: Stage::Login,
            read_timeout: Duration::ZERO,
            write_timeout: Duration::ZERO,
            generation: 0,
            idle_since_ms: 0,
        }
    }

    /// Says who we are, or at least something, so that the server answers: one that allows no more
    /// clients, or speaks another protocol, is found out here.
    pub fn log_in(&mut self, config: &config::Redis, deadline: Instant) -> Result<(), StoreError> {
        let mut commands = Commands::default();
        let password = config.current_password().map_err(|why| {
            StoreError::Down(Down { lasting: true, ..self.server.lost(why, false) })
        })?;
        if let Some(password) = password {
            let auth = Command::new("AUTH");
            let auth = config.username.iter().fold(auth, |auth, name| auth.arg(name));
            commands.push(&auth.arg(password.reveal()));
        }
        if config.db != 0 {
            commands.push(&Command::new("SELECT").arg(&config.db.to_string()));
        }
        let anonymous = commands.count() == 0;
        if anonymous {
            commands.push(&Command::new("PING"));
        }
        let replies = self.round_trip(&commands, deadline).map_err(StoreError::Down)?;
        self.stage = Stage::Greeting;
        // A user who may do only what is needed may not be allowed to.
        let needless = |error: &StoreError| anonymous && error.to_string().contains("NOPERM");
        replies.into_iter().filter_map(Result::err).find(|e| !needless(e)).map_or(Ok(()), Err)
    }

    /// From now on what is sent may be carried out although no answer comes.
    pub fn serve(mut self, generation: u64, now: Now) -> Self {
        self.stage = Stage::Service;
        self.generation = generation;
        self.idle_since_ms = now.mono_ms;
        self
    }

    /// The other side has closed it while nobody used it.
    pub fn has_ended(&mut self) -> bool {
        self.stream.has_ended()
    }

    /// Sends the commands in one write and reads one reply for each, all before `deadline`.
    pub fn round_trip(
        &mut self,
        commands: &Commands,
        deadline: Instant,
    ) -> Result<Vec<Reply>, Down> {
        let left = time_left(deadline)
            .map_err(|late| Down { maybe_done: false, ..self.server.failed(&late, self.stage) })?;
        self.send(commands, left).map_err(|error| self.server.failed(&error, self.stage))?;
        (0..commands.count()).map(|index| self.receive(commands, index, deadline)).collect()
    }

    fn send(&mut self, commands: &Commands, left: Duration) -> io::Result<()> {
        self.limit_writing(left)?;
        // Writing also reads while TLS renews its keys.
        self.limit_reading(left)?;
        self.stream.write_all(commands.bytes())?;
        self.stream.flush()
    }

    /// One reply; an error of the server is a reply like any other.
    fn receive(
        &mut self,
        commands: &Commands,
        index: usize,
        deadline: Instant,
    ) -> Result<Reply, Down> {
        let limited = time_left(deadline).and_then(|left| self.limit_reading(left));
        limited.map_err(|error| self.server.failed(&error, self.stage))?;
        let mut reader = Reader { stream: &mut self.stream, failure: None };
        match (self.parser.parse_value(&mut reader), reader.failure) {
            (Ok(Value::ServerError(error)), _) => {
                Ok(Err(self.server.refused(&error, commands.name(index))))
            }
            (Ok(value), _) => Ok(Ok(value)),
            (Err(_), Some(error)) => Err(self.server.failed(&error, self.stage)),
            (Err(_), None) => Err(self.server.misspoke(self.stage)),
        }
    }

    fn limit_writing(&mut self, left: Duration) -> io::Result<()> {
        if self.write_timeout.abs_diff(left) > TIMEOUT_GRAIN {
            self.stream.socket().set_write_timeout(Some(left))?;
            self.write_timeout = left;
        }
        Ok(())
    }

    fn limit_reading(&mut self, left: Duration) -> io::Result<()> {
        if self.read_timeout.abs_diff(left) > TIMEOUT_GRAIN {
            self.stream.socket().set_read_timeout(Some(left))?;
            self.read_timeout = left;
        }
        Ok(())
    }
}

/// Keeps the error of a read, which the crate's parser gives back as a text only.
struct Reader<'a> {
    stream: &'a mut Stream,
    failure: Option<io::Error>,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.stream.read(buffer) {
            Ok(0) => {
                self.failure = Some(io::ErrorKind::UnexpectedEof.into());
                Ok(0)
            }
            Ok(read) => Ok(read),
            Err(error) => {
                let kind = error.kind();
                self.failure = Some(error);
                Err(kind.into())
            }
        }
    }
}
