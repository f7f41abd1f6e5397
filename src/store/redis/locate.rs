//! Where the server is: at an address that is configured, where the sentinels say, or where the nodes of
//! a cluster say that its masters are.
//!
//! Looking a name up blocks for as long as the system's resolver likes, so it runs on a thread of
//! its own. An answer that comes too late for one attempt is there for the next.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use super::cause::{Server, Stage};
use super::cluster::{Map, NODES_MOST, Nodes, Read, Slots};
use super::command::{Command, Commands};
use super::connection::{Connection, Target};
use super::layout::Layout;
use super::reply::{Reply, is_denied, unexpected};
use super::stream::{Stream, Tls};
use crate::config::{self, HostPort, Login, Place, Sentinels};
use crate::device::DeviceId;
use crate::socket::{SockAddr, TimedSocket, deadline_in, time_left};
use crate::store::StoreError;

/// A resolver needs little more than its own buffers.
const LOOKUP_STACK_BYTES: usize = 256 * 1024;
/// More sentinels than anybody has, and as many nodes of a cluster as have to be known, so that one
/// that lies cannot fill the memory.
const KNOWN_MOST: usize = 32;

/// How a connection is opened: with the files as they are now, and until when.
#[derive(Clone)]
pub(super) struct Opener<'a> {
    config: &'a config::Redis,
    tls: Option<Tls>,
    /// Which of several servers or addresses is tried first: another one after each failure.
    turn: usize,
    deadline: Instant,
}

impl Opener<'_> {
    pub fn until(&self, deadline: Instant) -> Self {
        Opener { deadline, ..self.clone() }
    }

    /// The first of so many has to be done early enough for the others to have as much time each.
    fn share(&self, of: usize) -> Self {
        let left = time_left(self.deadline).unwrap_or_default();
        self.until(deadline_in(left / u32::try_from(of).unwrap_or(u32::MAX)))
    }

    /// Half of the time is for what follows.
    fn wait(&self) -> Option<Command> {
        let most_ms = u64::try_from(self.config.timeout.as_millis() / 2).unwrap_or(u64::MAX);
        let replicas = self.config.wait_replicas;
        (replicas > 0).then(|| Command::new("WAIT").number(replicas).number(most_ms))
    }

    /// Another connection to each of these.
    pub fn open_again(&self, nodes: &Nodes) -> Result<Nodes, StoreError> {
        let open =
            |target: Option<&Target>| target.map(|target| self.open_at(target.clone())).transpose();
        let connections = nodes.targets().map(open).collect::<Result<_, _>>()?;
        Ok(Nodes::new(connections, Arc::clone(&nodes.map)))
    }

    /// A connection, TLS and login included.
    fn open(&self, name: &mut Name) -> Result<Connection, StoreError> {
        let (socket, target) = name.connect(self)?;
        self.enter(socket, target, &self.config.login, self.config.db)
    }

    fn open_at(&self, target: Target) -> Result<Connection, StoreError> {
        let socket = self.connect(&target)?;
        self.enter(socket, target, &self.config.login, self.config.db)
    }

    fn connect(&self, target: &Target) -> Result<TimedSocket, StoreError> {
        let socket = TimedSocket::connect(&target.address, self.deadline);
        socket.map_err(|error| target.server.failed(&error, Stage::Connect).into())
    }

    fn enter(
        &self,
        mut socket: TimedSocket,
        target: Target,
        login: &Login,
        db: i64,
    ) -> Result<Connection, StoreError> {
        socket.set_deadline(self.deadline);
        let stream = Stream::open(socket, self.tls.as_ref(), &target.server.host);
        let stream = stream.map_err(|error| target.server.failed(&error, Stage::Handshake))?;
        let mut connection = Connection::new(stream, target);
        connection.log_in(login, db, self.deadline)?;
        Ok(connection)
    }
}

/// Finds the server anew for each set of connections.
pub(super) struct Locator {
    way: Way,
    turn: usize,
}

enum Way {
    Name(Name),
    Socket(PathBuf, Arc<Server>),
    Sentinels(Watched),
    Cluster(Masters),
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
            Place::Cluster(seeds) => Way::Cluster(Masters::new(seeds, tls)),
        };
        Locator { way, turn: 0 }
    }

    /// What it is called as long as nothing was found.
    pub fn server(&self) -> Arc<Server> {
        Arc::clone(match &self.way {
            Way::Name(Name { server, .. }) | Way::Socket(_, server) => server,
            Way::Sentinels(watched) => &watched.sentinels.server,
            Way::Cluster(masters) => &masters.seeds.server,
        })
    }

    pub fn opener<'a>(
        &self,
        config: &'a config::Redis,
        deadline: Instant,
    ) -> Result<Opener<'a>, StoreError> {
        let tls = config.tls.as_ref().map(Tls::new).transpose();
        let tls = tls.map_err(|why| self.server().unusable(why))?;
        Ok(Opener { config, tls, turn: self.turn, deadline })
    }

    /// Connections to the servers that are to be used.
    pub fn open(&mut self, opener: &Opener<'_>) -> Result<Nodes, StoreError> {
        let one = |connection: Connection| {
            let servers = vec![Arc::clone(&connection.target.server)];
            let map = Map::new(servers, Slots::default(), BTreeMap::new(), opener.wait());
            Nodes::new(vec![Some(connection)], Arc::new(map))
        };
        let opened = match &mut self.way {
            Way::Name(name) => opener.open(name).map(one),
            Way::Socket(path, server) => {
                let address =
                    SockAddr::unix(path).map_err(|e| server.failed(&e, Stage::Connect))?;
                opener.open_at(Target { address, server: Arc::clone(server) }).map(one)
            }
            Way::Sentinels(watched) => watched.open(opener).map(one),
            Way::Cluster(masters) => masters.open(opener),
        };
        if opened.is_err() {
            self.try_another();
        }
        opened
    }

    /// Whether nodes of the cluster are in reach that were not.
    pub fn can_reach_more(
        &mut self,
        map: &Map,
        layout: &Layout,
        opener: &Opener<'_>,
    ) -> Result<bool, StoreError> {
        let Way::Cluster(masters) = &mut self.way else { return Ok(false) };
        self.turn = self.turn.wrapping_add(1);
        masters.can_reach_more(map, layout, opener)
    }

    /// What was found is not what is wanted: the next attempt begins with another address.
    pub fn try_another(&mut self) {
        self.turn = self.turn.wrapping_add(1);
    }
}

/// Servers that are asked where others are: those that are configured, and those that they told us of.
struct Known {
    names: Vec<Name>,
    /// All of them.
    server: Arc<Server>,
    /// What stands before the address of each.
    what: &'static str,
}

impl Known {
    fn new(configured: &[HostPort], name: String, what: &'static str, tls: bool) -> Self {
        let server = Arc::new(Server { name, host: String::new(), tls });
        let mut known = Known { names: Vec::new(), server, what };
        configured.iter().for_each(|at| known.learn(at));
        known
    }

    fn learn(&mut self, at: &HostPort) {
        let is_known = self.names.iter().any(|name| name.at == *at);
        if !is_known && self.names.len() < KNOWN_MOST {
            self.names.push(Name::new(at.clone(), self.what, self.server.tls));
        }
    }

    /// The first of whom this can be had.
    fn ask<T>(
        &mut self,
        opener: &Opener<'_>,
        mut ask: impl FnMut(&mut Name, &Opener<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let none = self.server.lost("nobody is known to ask", false);
        first_of(self.names.len(), opener, none.into(), |index, opener| {
            ask(self.names.get_mut(index).ok_or(StoreError::Undecided)?, opener)
        })
    }
}

/// Servers that sentinels watch. They are asked for each set of connections, since another server
/// may be the master by then, and what they say is proven by asking that server itself: a sentinel
/// that was cut off names the old one.
struct Watched {
    settings: Sentinels,
    sentinels: Known,
}

impl Watched {
    fn new(settings: Sentinels, tls: bool) -> Self {
        let name = format!("{} of the sentinels", settings.master);
        let sentinels = Known::new(&settings.known, name, "sentinel ", tls);
        Watched { settings, sentinels }
    }

    /// The master of the first sentinel that knows a true one. None may use more than half of its share
    /// of the time for its own answer.
    fn open(&mut self, opener: &Opener<'_>) -> Result<Connection, StoreError> {
        let (settings, mut others) = (&self.settings, Vec::new());
        let opened = self.sentinels.ask(opener, |sentinel, opener| {
            let master = ask_sentinel(settings, sentinel, &opener.share(2), &mut others)?;
            open_master(master, opener)
        });
        others.iter().for_each(|other| self.sentinels.learn(other));
        opened
    }
}

/// Asks a sentinel where the master is, and for the other sentinels.
fn ask_sentinel(
    settings: &Sentinels,
    sentinel: &mut Name,
    opener: &Opener<'_>,
    learnt: &mut Vec<HostPort>,
) -> Result<HostPort, StoreError> {
    let (socket, target) = sentinel.connect(opener)?;
    let mut connection = opener.enter(socket, target, &settings.login, 0)?;
    let (server, name) = (&sentinel.server, &settings.master);
    let mut commands = Commands::default();
    let about = |what| Command::new("SENTINEL").arg(what).arg(name);
    let address = commands.ask(about("get-master-addr-by-name"));
    let others = commands.ask(about("sentinels"));
    let mut replies = connection.round_trip(&commands, opener.deadline)?;
    let master: Option<(String, u16)> = replies.take(address).read().map_err(|error| {
        let is_none = error.to_string().contains("unknown command");
        let why = "it is no sentinel, see REDIS_SENTINELS";
        if is_none { server.unusable(why).into() } else { error }
    })?;
    let others: Vec<HashMap<String, String>> = replies.take(others).read().unwrap_or_default();
    learnt.extend(others.iter().filter_map(host_port_of));
    let (host, port) = master.ok_or_else(|| {
        let why = "it watches no servers that it calls";
        server.unusable(format!("{why} {name:?}, see REDIS_SENTINEL_MASTER"))
    })?;
    Ok(HostPort { host, port })
}

fn open_master(master: HostPort, opener: &Opener<'_>) -> Result<Connection, StoreError> {
    let mut name = Name::new(master, "", opener.tls.is_some());
    let mut connection = opener.open(&mut name)?;
    let mut commands = Commands::default();
    let role = commands.ask(Command::new("ROLE"));
    let mut replies = connection.round_trip(&commands, opener.deadline)?;
    let role = replies.take(role).list().map(|role| role.into_iter().next());
    match role.and_then(|first| first.map_or(Ok(None), Reply::text)) {
        Ok(Some(role)) if role == "master" => Ok(connection),
        Ok(role) => {
            let role = role.unwrap_or_default();
            let why = format!("a sentinel calls it the master, but its role is {role:?}");
            Err(name.server.lost(why, false).into())
        }
        // The greeting writes, which no replica takes.
        Err(error) if is_denied(&error) => Ok(connection),
        Err(error) => Err(error),
    }
}

/// The first attempt that succeeds, beginning with another one each turn. None may use more than its
/// share of the time.
fn first_of<T>(
    count: usize,
    opener: &Opener<'_>,
    none: StoreError,
    mut attempt: impl FnMut(usize, &Opener<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut failure = none;
    for tried in 0..count {
        match attempt(opener.turn.wrapping_add(tried) % count, &opener.share(count - tried)) {
            Ok(found) => return Ok(found),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// The masters of a cluster. A node is asked for each set of connections where they are, and all that
/// are in reach are connected with.
struct Masters {
    seeds: Known,
    /// Where nodes have pointed to. They are masters, be it that they have no slot yet.
    wanted: Vec<HostPort>,
    /// What was not in reach a moment ago: it is left out, for nobody is to wait for it.
    unreachable: Vec<HostPort>,
}

impl Masters {
    fn new(seeds: &[HostPort], tls: bool) -> Self {
        let list: Vec<String> = seeds.iter().map(HostPort::to_string).collect();
        let name = format!("the cluster at {}", list.join(","));
        let seeds = Known::new(seeds, name, "", tls);
        Masters { seeds, wanted: Vec::new(), unreachable: Vec::new() }
    }

    /// What the first node says that can be asked.
    fn read(&mut self, opener: &Opener<'_>) -> Result<Read, StoreError> {
        let read = self.seeds.ask(opener, |seed, opener| {
            let mut connection = opener.open(seed)?;
            let server = &seed.server;
            let mut commands = Commands::default();
            let slots = commands.try_ask(ask_slots());
            let slots = connection.round_trip(&commands, opener.deadline)?.take(slots);
            let read = read_slots(slots, &server.host).map_err(|error| {
                let said = error.to_string();
                let is_none = ["cluster support disabled", "unknown command"];
                let why = "it is no node of a cluster, see REDIS_CLUSTER";
                match is_none.iter().any(|none| said.contains(none)) {
                    true => server.unusable(why).into(),
                    false => error,
                }
            })?;
            match read.at.is_empty() {
                true => Err(server.lost("no slot has a node", false).into()),
                false => Ok(read),
            }
        })?;
        read.at.iter().for_each(|at| self.seeds.learn(at));
        Ok(read)
    }

    fn open(&mut self, opener: &Opener<'_>) -> Result<Nodes, StoreError> {
        let Read { mut at, slots } = self.read(&opener.share(2))?;
        at.extend(std::mem::take(&mut self.wanted));
        let unreachable = std::mem::take(&mut self.unreachable);
        let (mut servers, mut connections) = (Vec::new(), Vec::new());
        let mut lost = BTreeMap::new();
        let count = at.len();
        for (node, at) in at.into_iter().enumerate() {
            let mut name = Name::new(at, "", opener.tls.is_some());
            servers.push(Arc::clone(&name.server));
            let opened = match unreachable.contains(&name.at) {
                true => Err(name.server.lost("still not in reach", false).into()),
                false => opener.share(count - node).open(&mut name),
            };
            connections.push(opened.map_err(|error| lost.insert(node, error.into_down())).ok());
        }
        let map = Map::new(servers, slots, lost, opener.wait());
        let nodes = Nodes::new(connections, Arc::new(map));
        nodes.check().map(|()| nodes)
    }

    /// One may be in reach and yet take no writes.
    fn can_reach_more(
        &mut self,
        map: &Map,
        layout: &Layout,
        opener: &Opener<'_>,
    ) -> Result<bool, StoreError> {
        let Read { mut at, slots } = self.read(&opener.share(2))?;
        let mut is_more = map.has_lost_another_than(&at);
        self.wanted = map.unknown().into_iter().filter(|wanted| !at.contains(wanted)).collect();
        at.extend(self.wanted.iter().cloned());
        self.unreachable.clear();
        let count = at.len();
        for (node, at) in at.into_iter().enumerate().filter(|(_, at)| !map.has(at)) {
            let device = slots.device_at(node);
            match takes_writes(&at, device, layout, &opener.share(count - node)) {
                Ok(()) => is_more = true,
                Err(error) => {
                    log::debug!("{error}");
                    self.unreachable.push(at);
                }
            }
        }
        if is_more || map.serves() { Ok(is_more) } else { Err(map.lost()) }
    }
}

fn takes_writes(
    at: &HostPort,
    device: Option<DeviceId>,
    layout: &Layout,
    opener: &Opener<'_>,
) -> Result<(), StoreError> {
    let mut connection = opener.open(&mut Name::new(at.clone(), "", opener.tls.is_some()))?;
    let mut commands = Commands::default();
    commands.ask(layout.write_nothing(&device.ok_or(StoreError::Undecided)?));
    match commands.judge(connection.round_trip(&commands, opener.deadline)?) {
        // A node without slots says where they are.
        Err(error) if !error.to_string().contains("MOVED") => Err(error),
        _ => Ok(()),
    }
}

pub(super) fn ask_slots() -> Command {
    Command::new("CLUSTER").arg("SLOTS")
}

/// For each range of slots its first, its last and who has it: the master, then its replicas. One without
/// a name of its own is meant by `host`, the name of who was asked.
pub(super) fn read_slots(reply: Reply, host: &str) -> Result<Read, StoreError> {
    let mut read = Read { at: Vec::new(), slots: Slots::of_nobody() };
    for range in reply.list()? {
        let mut parts = range.list()?.into_iter();
        let mut next = || parts.next().ok_or_else(|| unexpected("a short range of slots"));
        let (first, last, master) = (next()?.number()?, next()?.number()?, next()?.list()?);
        let mut parts = master.into_iter();
        let own = parts.next().and_then(|own| own.text().ok().flatten());
        let host = own.filter(|own| !own.is_empty()).unwrap_or_else(|| host.to_owned());
        let port = parts.next().and_then(|port| port.number().ok()).and_then(|n| n.try_into().ok());
        let (first, last) = (u16::try_from(first), u16::try_from(last));
        let (Ok(first), Ok(last), Some(port)) = (first, last, port) else {
            return Err(unexpected("no range of slots"));
        };
        let at = HostPort { host, port };
        let known = read.at.iter().position(|other| *other == at);
        let node = known.unwrap_or(read.at.len());
        if node >= NODES_MOST {
            return Err(unexpected("too many nodes"));
        }
        if known.is_none() {
            read.at.push(at);
        }
        read.slots.set(first, last, node);
    }
    Ok(read)
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

    /// The first address that takes a connection: the first of two may be one that swallows everything.
    fn connect(&mut self, opener: &Opener<'_>) -> Result<(TimedSocket, Target), StoreError> {
        let found = self.look_up(opener.deadline);
        let unknown = |error: io::Error| self.server.failed(&error, Stage::LookUp).into();
        let addresses = found.map_err(unknown)?;
        let none = || unknown(io::ErrorKind::NotFound.into());
        first_of(addresses.len(), opener, none(), |index, opener| {
            let address = *addresses.get(index).ok_or_else(none)?;
            let target = Target { address: address.into(), server: Arc::clone(&self.server) };
            Ok((opener.connect(&target)?, target))
        })
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
