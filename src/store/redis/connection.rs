//! One blocking connection: pipelines with one deadline, closed at the first doubt.
//!
//! The `redis` crate parses the replies; its own connection is not used: its time-outs count per
//! reply and are cleared after set-up, its pipeline hides all replies behind the first error, a
//! reply that came too late would be read as the next one's, a name's second address is never
//! reached if the first one swallows packets, and nothing tells whether the other side has closed.

use std::io::{self, Read, Write as _};
use std::sync::Arc;
use std::time::Instant;

use redis::{Parser, ServerError, Value};

use super::cause::{Server, Stage};
use super::command::{Command, Commands};
use super::reply::{Replies, Reply};
use super::stream::Stream;
use crate::config::Login;
use crate::socket::{SockAddr, time_left};
use crate::store::{Down, StoreError};

/// A server that can be connected to.
#[derive(Clone)]
pub(super) struct Target {
    pub address: SockAddr,
    pub server: Arc<Server>,
}

pub(super) struct Connection {
    stream: Stream,
    parser: Parser,
    pub target: Target,
    stage: Stage,
}

impl Connection {
    pub fn new(stream: Stream, target: Target) -> Self {
        Connection { stream, parser: Parser::new(), target, stage: Stage::Login }
    }

    /// Says who we are, or at least something, so that the server answers: one that allows no more
    /// clients, or speaks another protocol, is found out here.
    pub fn log_in(&mut self, login: &Login, db: i64, deadline: Instant) -> Result<(), StoreError> {
        let mut commands = Commands::default();
        let password = login.current_password();
        let password =
            password.map_err(|why| StoreError::Down(self.target.server.unusable(why)))?;
        if let Some(password) = password {
            let auth = Command::new("AUTH");
            let auth = login.username.iter().fold(auth, |auth, name| auth.arg(name));
            commands.ask(auth.arg(password.reveal()));
        }
        if db != 0 {
            commands.ask(Command::new("SELECT").arg(&db.to_string()));
        }
        let anonymous = commands.is_empty();
        if anonymous {
            commands.ask(Command::new("PING"));
        }
        let replies = self.round_trip(&commands, deadline)?;
        self.stage = Stage::Greeting;
        // A user who may do only what is needed may not be allowed to.
        let needless = |error: &&StoreError| anonymous && error.to_string().contains("NOPERM");
        let refused = replies.iter().filter_map(Reply::error).find(|error| !needless(error));
        refused.cloned().map_or(Ok(()), Err)
    }

    /// From now on what is sent may be carried out although no answer comes.
    pub fn serve(&mut self) {
        self.stage = Stage::Service;
    }

    /// The other side has closed it while nobody used it.
    pub fn has_ended(&mut self) -> bool {
        self.stream.has_ended()
    }

    /// Sends the commands in one write and reads one reply for each, all before `deadline`.
    pub fn round_trip(&mut self, commands: &Commands, deadline: Instant) -> Result<Replies, Down> {
        let commands: Vec<&Command> = commands.iter().collect();
        self.send(&commands, deadline)?;
        let mut replies = Vec::with_capacity(commands.len());
        for command in commands {
            let reply = self.receive()?;
            replies.push(Reply(
                reply.map_err(|error| self.target.server.refused(&error, command.name())),
            ));
        }
        Ok(Replies::new(replies))
    }

    /// Until the deadline, replies to these can be received.
    pub fn send(&mut self, commands: &[&Command], deadline: Instant) -> Result<(), Down> {
        time_left(deadline).map_err(|late| Down {
            maybe_done: false,
            ..self.target.server.failed(&late, self.stage)
        })?;
        self.stream.set_deadline(deadline);
        let mut packed = Vec::with_capacity(commands.len() * 256);
        commands.iter().for_each(|command| command.pack(&mut packed));
        let sent = self.stream.write_all(&packed).and_then(|()| self.stream.flush());
        sent.map_err(|error| self.target.server.failed(&error, self.stage))
    }

    /// What is received from now on has to come before the deadline.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.stream.set_deadline(deadline);
    }

    /// The next reply, or the error that is in its place.
    pub fn receive(&mut self) -> Result<Result<Value, ServerError>, Down> {
        let mut reader = Reader { stream: &mut self.stream, failure: None };
        match (self.parser.parse_value(&mut reader), reader.failure) {
            (Ok(Value::ServerError(error)), _) => Ok(Err(error)),
            (Ok(value), _) => Ok(Ok(value)),
            (Err(_), Some(error)) => Err(self.target.server.failed(&error, self.stage)),
            (Err(_), None) => Err(self.target.server.misspoke(self.stage)),
        }
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
