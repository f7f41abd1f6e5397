//! The servers that have our keys: one, or the masters of a cluster, with one connection to each.
//!
//! The commands of a batch are grouped by node, sent to all nodes and then read, under one deadline. A
//! node that points elsewhere (`MOVED`, `ASK`) has not carried the command out: it goes to the other
//! node, and what only looks and stood behind it is asked again, so that it is still the last to look.
//! What has to wait for the replies before it (see [`Commands::then`]) is a stage of its own where there
//! are several nodes, which have no order among each other.
//!
//! A node that is lost is an outage of its keys alone ([`DownKind::Part`]): it is not asked again before
//! all connections are made anew. Nodes that others point to and that are not connected yet are so, too.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use redis::{ServerError, Value};

use super::cause::Server;
use super::command::{Asked, Command, Commands};
use super::connection::{Connection, Target};
use super::reply::{Replies, Reply, unexpected};
use super::runs;
use crate::clock::Now;
use crate::config::HostPort;
use crate::device::DeviceId;
use crate::socket::{deadline_in, time_left};
use crate::store::{Down, DownKind, StoreError, locked};

const SLOTS: u16 = 16_384;
/// More nodes than a cluster has, so that one that lies cannot fill the memory.
pub(super) const NODES_MOST: usize = 1024;
/// So often a command is sent where a node points.
const REDIRECTIONS: usize = 5;
/// Replies of one node may be there already when another one has used up the time.
const READ_AT_LEAST: Duration = Duration::from_millis(20);

/// The slot of a key: by its hash tag, what stands between the first braces, if it has one.
pub(super) fn slot_of(key: &[u8]) -> u16 {
    let after = |key: &[u8], brace| key.iter().position(|byte| *byte == brace);
    let tag = after(key, b'{').and_then(|open| {
        let rest = key.get(open + 1..)?;
        rest.get(..after(rest, b'}')?).filter(|tag| !tag.is_empty())
    });
    // CRC-16/XMODEM.
    let shift = |crc: u16| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 };
    let step = |crc: u16, byte: &u8| (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| shift(crc));
    tag.unwrap_or(key).iter().fold(0, step) % SLOTS
}

/// Which node has which keys.
pub(super) struct Map {
    nodes: Vec<Arc<Server>>,
    /// Sent to a node once, after those of a batch that await replicas.
    wait: Option<Command>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    slots: Slots,
    /// Why they are not to be asked, of those that are not.
    lost: BTreeMap<usize, Down>,
    /// Where nodes have pointed to and nobody is connected.
    unknown: Vec<HostPort>,
}

impl State {
    fn learn(&mut self, at: &HostPort) {
        if !self.unknown.contains(at) && self.unknown.len() < NODES_MOST {
            self.unknown.push(at.clone());
        }
    }
}

/// The node of each slot, by its number; none where there is one server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Slots(Vec<usize>);

/// What a node says of the cluster: its masters, and which of them each slot has.
pub(super) struct Read {
    pub at: Vec<HostPort>,
    pub slots: Slots,
}

impl Slots {
    /// None is anybody's.
    pub fn of_nobody() -> Self {
        Slots(vec![usize::MAX; SLOTS.into()])
    }

    pub fn set(&mut self, first: u16, last: u16, node: usize) {
        let range = self.0.get_mut(first.into()..=last.into());
        range.into_iter().flatten().for_each(|slot| *slot = node);
    }

    /// A device whose keys are on this node. Any will do where there is one server, or a node has no
    /// keys.
    pub fn device_at(&self, node: usize) -> Option<DeviceId> {
        let is_there = |id: &String| self.0.get(usize::from(slot_of(id.as_bytes()))) == Some(&node);
        let any = "0".to_owned();
        let id = match self.0.contains(&node) {
            true => (0..).map(|n: u32| n.to_string()).find(is_there).unwrap_or(any),
            false => any,
        };
        DeviceId::parse(&id)
    }
}

impl Map {
    pub fn new(
        nodes: Vec<Arc<Server>>,
        slots: Slots,
        lost: BTreeMap<usize, Down>,
        wait: Option<Command>,
    ) -> Self {
        let unknown = Vec::new();
        Map { nodes, wait, state: Mutex::new(State { slots, lost, unknown }) }
    }

    /// Its nodes point to each other.
    fn is_cluster(&self) -> bool {
        !locked(&self.state).slots.0.is_empty()
    }

    fn is_one(&self) -> bool {
        self.nodes.len() == 1
    }

    /// Why keys are out of reach that may be in reach by other connections.
    pub fn missing(&self) -> Option<String> {
        let state = locked(&self.state);
        let lost = state.lost.values().map(|down| down.why.to_string());
        let unknown = state.unknown.iter().map(|at| format!("{at}: a new node"));
        let all: Vec<String> = lost.chain(unknown).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Why none of the nodes serves.
    pub fn lost(&self) -> StoreError {
        let lost = locked(&self.state).lost.values().next().cloned();
        lost.map_or(StoreError::Undecided, |down| {
            StoreError::Down(Down { kind: DownKind::Lost, ..down })
        })
    }

    /// Whether any of the nodes serves.
    pub fn serves(&self) -> bool {
        locked(&self.state).lost.len() < self.nodes.len()
    }

    /// Whether this node is connected and serves.
    pub fn has(&self, at: &HostPort) -> bool {
        self.place(at).is_some_and(|node| !locked(&self.state).lost.contains_key(&node))
    }

    /// Whether one that is lost is not among these any more.
    pub fn has_lost_another_than(&self, at: &[HostPort]) -> bool {
        let known: Vec<Option<usize>> = at.iter().map(|at| self.place(at)).collect();
        locked(&self.state).lost.keys().any(|node| !known.contains(&Some(*node)))
    }

    pub fn unknown(&self) -> Vec<HostPort> {
        locked(&self.state).unknown.clone()
    }

    /// Takes over what was read just now, if all its nodes are known.
    pub fn update(&self, read: &Read) {
        let mut state = locked(&self.state);
        let place = |at: &HostPort| self.place(at);
        read.at.iter().filter(|at| place(at).is_none()).for_each(|at| state.learn(at));
        if let Some(places) = read.at.iter().map(place).collect::<Option<Vec<usize>>>() {
            let of_ours = |node: &usize| places.get(*node).copied().unwrap_or(usize::MAX);
            state.slots = Slots(read.slots.0.iter().map(of_ours).collect());
        }
    }

    fn place(&self, at: &HostPort) -> Option<usize> {
        let name = at.to_string();
        self.nodes.iter().position(|server| server.name == name)
    }

    pub fn device_at(&self, node: usize) -> Option<DeviceId> {
        locked(&self.state).slots.device_at(node)
    }

    /// Whether the node that has this key is not known to be lost.
    pub fn has_key(&self, key: &[u8]) -> bool {
        let State { slots, lost, .. } = &*locked(&self.state);
        let node = slots.0.get(usize::from(slot_of(key)));
        node.is_none_or(|node| !lost.contains_key(node))
    }

    /// The node to which a command goes.
    fn node_of(&self, item: &Item<'_>) -> Result<usize, Down> {
        if self.is_one() {
            return Ok(0);
        }
        let state = locked(&self.state);
        let place = |slot: u16| state.slots.0.get(usize::from(slot)).copied();
        let node = match item.route {
            Route::Node(node) | Route::Asking(node) => Some(node),
            Route::Slot(slot) => place(slot),
            Route::Key => match item.asked.command.key() {
                Some(key) => place(slot_of(key)),
                None => (0..self.nodes.len()).find(|node| !state.lost.contains_key(node)),
            },
        };
        match node.filter(|node| *node < self.nodes.len()).map(|node| (node, state.lost.get(&node)))
        {
            Some((node, None)) => Ok(node),
            Some((_, Some(down))) => {
                Err(Down { kind: DownKind::Part, maybe_done: false, ..down.clone() })
            }
            None => Err(part("no node of the cluster has the slot of this key")),
        }
    }

    /// Where a node points to.
    fn point(&self, from: usize, to: &Redirection) -> Result<Route, Down> {
        let server = self.nodes.get(from);
        let host = server.filter(|_| to.at.host.is_empty()).map(|server| server.host.clone());
        let at = HostPort { host: host.unwrap_or_else(|| to.at.host.clone()), port: to.at.port };
        let mut state = locked(&self.state);
        let Some(node) = self.place(&at) else {
            let why = format!("{at}: it has become a node of the cluster just now");
            state.learn(&at);
            return Err(Down { kind: self.part(), ..part(why) });
        };
        if to.asking {
            return Ok(Route::Asking(node));
        }
        state.slots.set(to.slot, to.slot, node);
        Ok(Route::Node(node))
    }

    fn lose(&self, node: usize, down: &Down) {
        let mut state = locked(&self.state);
        if !self.is_one() {
            state.lost.entry(node).or_insert_with(|| down.clone());
        }
    }

    /// What one of several does not do, the others may.
    fn part(&self) -> DownKind {
        if self.is_one() { DownKind::Lost } else { DownKind::Part }
    }
}

/// Why a part of the keys is out of reach, where nothing was sent.
fn part(why: impl Into<Arc<str>>) -> Down {
    Down { why: why.into(), kind: DownKind::Part, lasting: false, maybe_done: false }
}

/// What one node says that is busy with itself, full, a replica by now, or that has just started and does
/// not see the others yet, for which it calls the whole cluster down. What is not allowed is not so on the
/// others either.
fn is_of_one_node(down: &Down) -> bool {
    down.kind == DownKind::ReadOnly || !down.lasting
}

/// A slot that nobody serves or that is just moving says nothing of the others.
fn is_of_one_slot(down: &Down) -> bool {
    ["Hash slot not served", "TRYAGAIN"].iter().any(|said| down.why.contains(said))
}

/// Where a command is to go.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Route {
    /// To the node that has its key, or to any if it has none.
    #[default]
    Key,
    Slot(u16),
    Node(usize),
    /// There, although the slot is still another node's.
    Asking(usize),
}

/// Where a node points to.
struct Redirection {
    asking: bool,
    slot: u16,
    at: HostPort,
}

impl Redirection {
    fn of(error: &ServerError) -> Option<Self> {
        let asking = match error.code() {
            "MOVED" => false,
            "ASK" => true,
            _ => return None,
        };
        let (slot, at) = error.details()?.split_once(' ')?;
        let (host, port) = at.rsplit_once(':')?;
        let at = HostPort { host: host.to_owned(), port: port.parse().ok()? };
        Some(Redirection { asking, slot: slot.parse().ok()?, at })
    }
}

struct Item<'a> {
    /// Whose it is in the batch.
    owner: usize,
    asked: &'a Asked,
    route: Route,
    /// None while it is to be sent, for the first time or to where a node has pointed.
    reply: Option<Result<Value, StoreError>>,
    /// The node that has carried it out, and how many replicas of it have what it wrote.
    replicas: (usize, u64),
}

impl<'a> Item<'a> {
    fn new(owner: usize, asked: &'a Asked) -> Self {
        Item { owner, asked, route: asked.route, reply: None, replicas: (0, 0) }
    }

    fn is_asking(&self) -> bool {
        matches!(self.route, Route::Asking(_))
    }

    fn fail(&mut self, down: &Down) {
        self.reply = Some(Err(down.clone().into()));
    }
}

/// A connection to each node.
pub(super) struct Nodes {
    connections: Vec<Option<Connection>>,
    pub map: Arc<Map>,
    /// The pool's generation that they belong to.
    pub generation: u64,
    /// When they were put back into the pool, by [`Now::mono_ms`].
    pub idle_since_ms: u64,
    /// When they were put back, or found open since.
    pub seen_ms: u64,
}

impl Nodes {
    pub fn new(connections: Vec<Option<Connection>>, map: Arc<Map>) -> Self {
        Nodes { connections, map, generation: 0, idle_since_ms: 0, seen_ms: 0 }
    }

    /// From now on what is sent may be carried out although no answer comes.
    pub fn serve(mut self, generation: u64, now: Now) -> Self {
        self.connections.iter_mut().flatten().for_each(Connection::serve);
        Nodes { generation, idle_since_ms: now.mono_ms, seen_ms: now.mono_ms, ..self }
    }

    /// The numbers of those that are connected and serve.
    pub fn connected(&self) -> impl Iterator<Item = usize> {
        (0..self.connections.len()).filter(|node| self.has(*node))
    }

    pub fn has(&self, node: usize) -> bool {
        let is_connected = self.connections.get(node).is_some_and(Option::is_some);
        is_connected && !locked(&self.map.state).lost.contains_key(&node)
    }

    /// The name by which a node was asked.
    pub fn host(&self, node: usize) -> String {
        self.map.nodes.get(node).map(|server| server.host.clone()).unwrap_or_default()
    }

    pub fn is_connected(&self) -> bool {
        self.connected().next().is_some()
    }

    /// Fails if none of them serves.
    pub fn check(&self) -> Result<(), StoreError> {
        if self.is_connected() { Ok(()) } else { Err(self.map.lost()) }
    }

    /// Where they lead.
    pub fn targets(&self) -> impl Iterator<Item = Option<&Target>> {
        self.connections.iter().map(|connection| Some(&connection.as_ref()?.target))
    }

    /// These runs, and that of a node that is away, as one id, if each may be asked.
    pub fn run_id(&self, of_nodes: Vec<Option<String>>) -> Option<String> {
        let is_whole = of_nodes.len() == self.connections.len();
        let of_nodes = of_nodes.into_iter().collect::<Option<Vec<String>>>()?;
        Some(runs::joined(of_nodes, is_whole))
    }

    /// The other side of one has closed it while nobody used it.
    pub fn has_ended(&mut self) -> bool {
        self.connections.iter_mut().flatten().any(Connection::has_ended)
    }

    /// The server is not one that can be used.
    pub fn unusable(&self, node: usize, why: &str) -> StoreError {
        let server = self.map.nodes.get(node);
        server.map_or(StoreError::Undecided, |server| StoreError::Down(server.unusable(why)))
    }

    pub fn ask(&mut self, commands: &Commands, deadline: Instant) -> Replies {
        self.run(&[commands], deadline).pop().unwrap_or_default()
    }

    /// Sends the commands and reads one reply for each; what may not be asked or has no answer is an
    /// error.
    pub fn run(&mut self, batch: &[&Commands], deadline: Instant) -> Vec<Replies> {
        let count = batch.iter().map(|commands| commands.asked().len()).sum();
        let mut items = Vec::with_capacity(count);
        for (owner, commands) in batch.iter().enumerate() {
            items.extend(commands.asked().iter().map(|asked| Item::new(owner, asked)));
        }
        let is_one = self.map.is_one();
        let last = items.iter().map(|item| item.asked.stage).max().filter(|_| !is_one);
        for stage in 0..=last.unwrap_or(0) {
            stop_failed(&mut items);
            let is_due = |item: &&mut Item<'_>| {
                item.reply.is_none() && (is_one || item.asked.stage == stage)
            };
            self.run_stage(items.iter_mut().filter(is_due).collect(), deadline);
        }
        let mut items = items.into_iter().peekable();
        let replies = |owner| {
            let mut replies = Replies::default();
            while let Some(item) = items.next_if(|item| item.owner == owner) {
                if item.asked.awaits_replicas {
                    (replies.master, replies.replicas) = item.replicas;
                }
                replies.add(Reply(item.reply.unwrap_or(Err(StoreError::Undecided))));
            }
            replies
        };
        (0..batch.len()).map(replies).collect()
    }

    fn run_stage(&mut self, mut items: Vec<&mut Item<'_>>, deadline: Instant) {
        for _ in 0..=REDIRECTIONS {
            self.exchange(&mut items, deadline);
            look_again(&mut items);
            if items.iter().all(|item| item.reply.is_some()) {
                return;
            }
        }
        let down = part("the nodes of the cluster point to each other");
        items.iter_mut().filter(|item| item.reply.is_none()).for_each(|item| item.fail(&down));
    }

    /// Sends to all nodes, then reads. What is to be sent elsewhere has no reply then.
    fn exchange(&mut self, items: &mut [&mut Item<'_>], deadline: Instant) {
        let mut by_node: BTreeMap<usize, Vec<&mut Item<'_>>> = BTreeMap::new();
        for item in items.iter_mut().filter(|item| item.reply.is_none()) {
            match self.map.node_of(item) {
                Ok(node) => by_node.entry(node).or_default().push(item),
                Err(down) => item.fail(&down),
            }
        }
        by_node.retain(|node, items| {
            let sent = self.send(*node, items, deadline);
            sent.map_err(|down| items.iter_mut().for_each(|item| item.fail(&down))).is_ok()
        });
        for (node, mut items) in by_node {
            if !self.map.is_one()
                && let Some(Some(connection)) = self.connections.get_mut(node)
            {
                connection.set_deadline(deadline.max(deadline_in(READ_AT_LEAST)));
            }
            if let Err(down) = self.receive(node, &mut items) {
                let down = self.lose(node, down);
                items.iter_mut().for_each(|item| item.fail(&down));
            }
        }
    }

    fn send(
        &mut self,
        node: usize,
        items: &[&mut Item<'_>],
        deadline: Instant,
    ) -> Result<(), Down> {
        let asking = items.iter().any(|item| item.is_asking()).then(|| Command::new("ASKING"));
        let mut commands = Vec::with_capacity(items.len() + 1);
        for item in items {
            commands.extend(asking.as_ref().filter(|_| item.is_asking()));
            commands.push(&item.asked.command);
        }
        commands.extend(self.map.wait.as_ref().filter(|_| awaits_replicas(items)));
        let is_late = time_left(deadline).is_err();
        let sent = match self.connections.get_mut(node).and_then(Option::as_mut) {
            // What others took too long for says nothing of this node.
            Some(_) if is_late && !self.map.is_one() => return Err(part("no time is left for it")),
            Some(connection) => connection.send(&commands, deadline),
            None => Err(self.map.nodes.get(node).map_or_else(
                || part("no such node"),
                |server| server.lost("not connected", false),
            )),
        };
        sent.map_err(|down| self.lose(node, down))
    }

    /// Reads the replies of a node. If one does not come, none of them counts: who is there now may be
    /// another run of the server, and all that were asked in this trip are to hear of it.
    fn receive(&mut self, node: usize, items: &mut [&mut Item<'_>]) -> Result<(), Down> {
        for item in items.iter_mut() {
            if item.is_asking() {
                let _ok = self.receive_one(node)?;
            }
            let reply = self.receive_one(node)?;
            self.judge(node, item, reply);
        }
        if self.map.wait.is_some() && awaits_replicas(items) {
            let replicas = match self.receive_one(node)? {
                Ok(Value::Int(replicas)) => u64::try_from(replicas).unwrap_or(0),
                _ => 0,
            };
            items.iter_mut().for_each(|item| item.replicas = (node, replicas));
        }
        Ok(())
    }

    fn receive_one(&mut self, node: usize) -> Result<Result<Value, ServerError>, Down> {
        match self.connections.get_mut(node) {
            Some(Some(connection)) => connection.receive(),
            _ => Err(part("not connected")),
        }
    }

    fn judge(&mut self, node: usize, item: &mut Item<'_>, reply: Result<Value, ServerError>) {
        let points_to = reply.as_ref().err().and_then(Redirection::of);
        item.reply = match (reply, points_to.filter(|_| self.map.is_cluster())) {
            (Ok(value), _) => Some(Ok(value)),
            // It is allowed, which is all that was asked.
            (Err(_), Some(_)) if matches!(item.asked.route, Route::Node(_)) => Some(Ok(Value::Nil)),
            (Err(_), Some(to)) => match self.map.point(node, &to) {
                Ok(route) => {
                    item.route = route;
                    None
                }
                Err(down) => Some(Err(down.into())),
            },
            (Err(error), None) => Some(Err(self.refused(node, &error, &item.asked.command))),
        };
    }

    /// The connection is closed, for what comes may be a late reply.
    fn lose(&mut self, node: usize, down: Down) -> Down {
        if let Some(connection) = self.connections.get_mut(node) {
            *connection = None;
        }
        let down = Down { kind: self.map.part(), ..down };
        self.map.lose(node, &down);
        down
    }

    fn refused(&mut self, node: usize, error: &ServerError, command: &Command) -> StoreError {
        let Some(server) = self.map.nodes.get(node) else { return unexpected("of no node") };
        match server.refused(error, command.name()) {
            StoreError::Down(down) if !self.map.is_one() && is_of_one_node(&down) => {
                let down = Down { kind: DownKind::Part, ..down };
                if !is_of_one_slot(&down) {
                    self.map.lose(node, &down);
                }
                StoreError::Down(down)
            }
            refused => refused,
        }
    }
}

/// Behind a command that is sent again, what only looks has looked too soon.
fn look_again(items: &mut [&mut Item<'_>]) {
    let mut again = None;
    for item in items {
        if item.reply.is_none() {
            again = Some(item.owner);
        } else if again == Some(item.owner) && item.asked.command.only_looks() {
            item.reply = None;
        }
    }
}

/// Nothing more is sent for an owner of whom a command has failed that must not.
fn stop_failed(items: &mut [Item<'_>]) {
    let mut failed = None;
    for item in items {
        match (&item.reply, &failed) {
            (Some(Err(error)), _) if item.asked.must_succeed() => {
                failed = Some((item.owner, error.clone()));
            }
            (None, Some((owner, error))) if *owner == item.owner => {
                item.reply = Some(Err(error.clone()));
            }
            _ => {}
        }
    }
}

fn awaits_replicas(items: &[&mut Item<'_>]) -> bool {
    items.iter().any(|item| item.asked.awaits_replicas)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values are those of `CLUSTER KEYSLOT`.
    #[test]
    fn a_key_has_the_slot_that_redis_gives_it() {
        let rows = [
            ("123456789", 12_739),
            ("foo", 12_182),
            ("{foo}:bar", 12_182),
            ("a{foo}{bar}", 12_182),
            ("foo{}bar", slot_of(b"foo{}bar")),
            ("", 0),
        ];
        for (key, slot) in rows {
            assert_eq!(slot_of(key.as_bytes()), slot, "{key}");
        }
        assert_ne!(slot_of(b"foo{}bar"), slot_of(b""), "an empty tag is none");
    }

    #[test]
    fn a_node_has_a_device() {
        let mut slots = Slots::of_nobody();
        slots.set(0, 16_382, 0);
        slots.set(16_383, 16_383, 1);
        for node in [0, 1, 2] {
            let device = slots.device_at(node).unwrap();
            let slot = slot_of(device.as_str().as_bytes());
            assert_eq!(slot == 16_383, node == 1, "{device}");
        }
    }
}
