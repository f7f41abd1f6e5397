//! Where the server is: at an address that is configured, or where the sentinels say.
//!
//! Looking a name up blocks for as long as the system's resolver likes, so it runs on a thread of
//! its own. An answer that comes too late for one attempt is there for the next.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use super::cause::{Server, Stage};
use super::command::{Command, Commands};
use super::connection::Connection;
use super::reply::{Reply, is_denied};
use super::stream::{Stream, Tls};
use crate::config::{self, HostPort, Login, Place, Sentinels};
use crate::socket::{SockAddr, TimedSocket, deadline_in, time_left};
use crate::store::StoreError;

/// A resolver needs little more than its own buffers.
const LOOKUP_STACK_BYTES: usize = 256 * 1024;
/// More sentinels than anybody has, so that one that lies cannot fill the memory.
const SENTINELS_MOST: usize = 32;

/// A server that can be connected to.
#[derive(Clone)]
pub(super) struct Target {
    address: SockAddr,
    server: Arc<Server>,
}

/// How connections are opened, with the files as they are now.
pub(super) struct Opener<'a> {
    config: &'a config::Redis,
    tls: Option<Tls>,
}

impl<'a> Opener<'a> {
    pub fn new(config: &'a config::Redis) -> Result<Self, String> {
        Ok(Opener { config, tls: config.tls.as_ref().map(Tls::new).transpose()? })
    }

    /// A connection, TLS and login included.
    pub fn open(&self, target: &Target, deadline: Instant) -> Result<Connection, StoreError> {
        let socket = connect(target, deadline)?;
        self.enter(socket, target, &self.config.login, self.config.db, deadline)
    }

    fn enter(
        &self,
        mut socket: TimedSocket,
        target: &Target,
        login: &Login,
        db: i64,
        deadline: Instant,
    ) -> Result<Connection, StoreError> {
        socket.set_deadline(deadline);
        let stream = match &self.tls {
            None => Ok(Stream::Plain(socket)),
            Some(tls) => Stream::secured(socket, tls, &target.server.host),
        };
        let stream = stream.map_err(|error| target.server.down(&error, Stage::Handshake))?;
        let mut connection = Connection::new(stream, Arc::clone(&target.server));
        connection.log_in(login, db, deadline)?;
        Ok(connection)
    }
}

fn connect(target: &Target, deadline: Instant) -> Result<TimedSocket, StoreError> {
    let socket = TimedSocket::connect(&target.address, deadline);
    socket.map_err(|error| target.server.down(&error, Stage::Connect))
}

/// Finds the server anew for each set of connections.
pub(super) struct Locator {
    way: Way,
    /// Which of several addresses or sentinels is tried first: another one after each failure.
    turn: usize,
}

enum Way {
    Name(Name),
    Socket(PathBuf, Arc<Server>),
    Sentinels(Watched),
}

impl Locator {
    pub fn new(config: &config::Redis) -> Self {
        let tls = config.tls.is_some();
        let way = match &config.at {
            Place::Host(at) => Way::Name(Name::new(at.clone(), "", tls)),
            Place::Socket(path) => {
                let (name, host) = (path.display().to_string(), String::new());
                Way::Socket(path.clone(), Arc::new(Server { name, host, tls }))
            }
            Place::Sentinels(settings) => Way::Sentinels(Watched::new(settings.clone(), tls)),
        };
        Locator { way, turn: 0 }
    }

    /// What it is called as long as nothing was found.
    pub fn server(&self) -> Arc<Server> {
        match &self.way {
            Way::Name(name) => Arc::clone(&name.server),
            Way::Socket(_, server) => Arc::clone(server),
            Way::Sentinels(watched) => Arc::clone(&watched.server),
        }
    }

    /// A connection to the server that is to be used, and where it leads.
    pub fn open(
        &mut self,
        opener: &Opener<'_>,
        deadline: Instant,
    ) -> Result<(Connection, Target), StoreError> {
        let opened = match &mut self.way {
            Way::Name(name) => opener.open_by_name(name, self.turn, deadline),
            Way::Socket(path, server) => opener.open_socket(path, server, deadline),
            Way::Sentinels(watched) => watched.open(self.turn, opener, deadline),
        };
        if opened.is_err() {
            self.try_another();
        }
        opened
    }

    /// What was found is not what is wanted: the next attempt begins with another address.
    pub fn try_another(&mut self) {
        self.turn = self.turn.wrapping_add(1);
    }
}

impl Opener<'_> {
    fn open_by_name(
        &self,
        name: &mut Name,
        turn: usize,
        deadline: Instant,
    ) -> Result<(Connection, Target), StoreError> {
        let (socket, target) = name.connect(turn, deadline)?;
        Ok((self.enter(socket, &target, &self.config.login, self.config.db, deadline)?, target))
    }

    fn open_socket(
        &self,
        path: &Path,
        server: &Arc<Server>,
        deadline: Instant,
    ) -> Result<(Connection, Target), StoreError> {
        let address = SockAddr::unix(path).map_err(|error| server.down(&error, Stage::Connect))?;
        let target = Target { address, server: Arc::clone(server) };
        Ok((self.open(&target, deadline)?, target))
    }
}

/// Servers that sentinels watch. They are asked for each set of connections, since another server
/// may be the master by then, and what they say is proven by asking that server itself: a sentinel
/// that was cut off names the old one.
struct Watched {
    settings: Sentinels,
    /// Those that we were told of, and those that they told us of.
    sentinels: Vec<Name>,
    server: Arc<Server>,
    tls: bool,
}

impl Watched {
    fn new(settings: Sentinels, tls: bool) -> Self {
        let name = format!("{} of the sentinels", settings.master);
        let server = Arc::new(Server { name, host: String::new(), tls });
        let mut watched = Watched { sentinels: Vec::new(), server, tls, settings };
        let known = watched.settings.known.clone();
        known.into_iter().for_each(|at| watched.learn(at));
        watched
    }

    fn learn(&mut self, at: HostPort) {
        let is_known = self.sentinels.iter().any(|sentinel| sentinel.at == at);
        if !is_known && self.sentinels.len() < SENTINELS_MOST {
            self.sentinels.push(Name::new(at, "sentinel ", self.tls));
        }
    }

    /// The master of the first sentinel that knows a true one. None may use more than its share of
    /// the time, and half of that for its own answer.
    fn open(
        &mut self,
        turn: usize,
        opener: &Opener<'_>,
        deadline: Instant,
    ) -> Result<(Connection, Target), StoreError> {
        let count = self.sentinels.len();
        let mut failure = StoreError::Down(self.server.lost("no sentinel is known", false));
        for tried in 0..count {
            let left = time_left(deadline).unwrap_or_default();
            let share = left / u32::try_from(count - tried).unwrap_or(u32::MAX);
            let end = deadline_in(share);
            let master = self.ask(turn.wrapping_add(tried) % count, opener, deadline_in(share / 2));
            match master.and_then(|master| self.open_master(master, opener, end)) {
                Ok(opened) => return Ok(opened),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Asks a sentinel where the master is, and for the other sentinels.
    fn ask(
        &mut self,
        index: usize,
        opener: &Opener<'_>,
        deadline: Instant,
    ) -> Result<HostPort, StoreError> {
        let Some(sentinel) = self.sentinels.get_mut(index) else {
            return Err(StoreError::Undecided);
        };
        let (socket, target) = sentinel.connect(index, deadline)?;
        let login = &self.settings.login;
        let mut connection = opener.enter(socket, &target, login, 0, deadline)?;
        let master = &self.settings.master;
        let mut commands = Commands::default();
        let about = |what| Command::new("SENTINEL").arg(what).arg(master);
        let address = commands.ask(about("get-master-addr-by-name"));
        let others = commands.ask(about("sentinels"));
        let mut replies = connection.round_trip(&commands, deadline).map_err(StoreError::Down)?;
        let address = replies.take(address).texts().map_err(|error| {
            let is_none = error.to_string().contains("unknown command");
            let why = "it is no sentinel, see REDIS_SENTINELS";
            if is_none { StoreError::Down(target.server.unusable(why)) } else { error }
        })?;
        let others = replies.take(others).maps().unwrap_or_default();
        others.iter().filter_map(host_port_of).for_each(|other| self.learn(other));
        let master = match &*address {
            [host, port] => port.parse().ok().map(|port| HostPort { host: host.clone(), port }),
            _ => None,
        };
        master.ok_or_else(|| {
            let why = format!(
                "it watches no servers that it calls {:?}, see REDIS_SENTINEL_MASTER",
                self.settings.master
            );
            StoreError::Down(target.server.unusable(why))
        })
    }

    fn open_master(
        &self,
        master: HostPort,
        opener: &Opener<'_>,
        deadline: Instant,
    ) -> Result<(Connection, Target), StoreError> {
        let mut name = Name::new(master, "", self.tls);
        let (mut connection, target) = opener.open_by_name(&mut name, 0, deadline)?;
        let mut commands = Commands::default();
        let role = commands.ask(Command::new("ROLE"));
        let mut replies = connection.round_trip(&commands, deadline).map_err(StoreError::Down)?;
        let role = replies.take(role).list().map(|role| role.into_iter().next());
        match role.and_then(|first| first.map_or(Ok(None), Reply::text)) {
            Ok(Some(role)) if role == "master" => Ok((connection, target)),
            Ok(role) => {
                let role = role.unwrap_or_default();
                let why = format!("a sentinel calls it the master, but its role is {role:?}");
                Err(StoreError::Down(target.server.lost(why, false)))
            }
            // The greeting writes, which no replica takes.
            Err(error) if is_denied(&error) => Ok((connection, target)),
            Err(error) => Err(error),
        }
    }
}

/// Where a sentinel is that another one describes.
fn host_port_of(description: &HashMap<String, String>) -> Option<HostPort> {
    let port = description.get("port")?.parse().ok()?;
    Some(HostPort { host: description.get("ip")?.clone(), port })
}

type Addresses = io::Result<Vec<SocketAddr>>;

/// A server by its name, and the look-up of it that is under way.
struct Name {
    at: HostPort,
    server: Arc<Server>,
    under_way: Option<Receiver<Addresses>>,
}

impl Name {
    /// `what` it is stands before its address in all that is said of it.
    fn new(at: HostPort, what: &str, tls: bool) -> Self {
        let name = format!("{what}{at}");
        let server = Arc::new(Server { name, host: at.host.clone(), tls });
        Name { at, server, under_way: None }
    }

    /// The first address that takes a connection. None may use more than its share of the time: the
    /// first of two may be one that swallows everything.
    fn connect(
        &mut self,
        turn: usize,
        deadline: Instant,
    ) -> Result<(TimedSocket, Target), StoreError> {
        let unknown = |error: io::Error, server: &Server| server.down(&error, Stage::LookUp);
        let found = self.look_up(deadline);
        let mut addresses = found.map_err(|error| unknown(error, &self.server))?;
        let count = addresses.len();
        addresses.rotate_left(turn % count.max(1));
        let mut failure = unknown(io::ErrorKind::NotFound.into(), &self.server);
        for (tried, address) in addresses.into_iter().enumerate() {
            let target = Target { address: address.into(), server: Arc::clone(&self.server) };
            let left = time_left(deadline).unwrap_or_default();
            let share = left / u32::try_from(count - tried).unwrap_or(u32::MAX);
            match connect(&target, deadline_in(share)) {
                Ok(socket) => return Ok((socket, target)),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// All addresses, in the resolver's order.
    fn look_up(&mut self, deadline: Instant) -> Addresses {
        if let Ok(address) = self.at.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, self.at.port)]);
        }
        let answer = match self.under_way.take() {
            Some(answer) => answer,
            None => self.ask()?,
        };
        match answer.recv_timeout(time_left(deadline)?) {
            Ok(addresses) => addresses,
            Err(RecvTimeoutError::Timeout) => {
                self.under_way = Some(answer);
                Err(io::ErrorKind::TimedOut.into())
            }
            Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the look-up panicked")),
        }
    }

    fn ask(&self) -> io::Result<Receiver<Addresses>> {
        let (answer, answered) = mpsc::sync_channel(1);
        let HostPort { host, port } = self.at.clone();
        let thread = thread::Builder::new().name("look-up".to_owned());
        thread.stack_size(LOOKUP_STACK_BYTES).spawn(move || {
            let addresses = (host, port).to_socket_addrs().map(Iterator::collect);
            // Nobody listens any more only if the process is ending.
            drop(answer.send(addresses));
        })?;
        Ok(answered)
    }
}
