//! All connections: who is let in, who has to go, what they may hold, and what their sessions are told.

use std::cmp::Reverse;
use std::io;
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;

use super::client::{Client, Tls};
use super::head::Context;
use super::limits::{Budget, Held};
use super::poll::{Poll, READ, Watched};
use super::proxies::is_trusted;
use super::session::{Event, Session, Step};
use super::settings::{Settings, Wait};
use super::timers::Timers;
use super::tls::{HandshakeStep, Handshakes};
use crate::clock::Now;
use crate::config::Http;
use crate::http::Classify;
use crate::metrics::EdgeCounters;
use crate::subscriber::{Counts, Subscriber};

pub struct Connection {
    /// What it is about to do.
    pub session: Session,
    pub client: Client,
    /// The peer, which may be a proxy.
    peer: IpAddr,
    is_proxy: bool,
    /// No other connection has had this number.
    pub generation: u64,
    /// Bytes that the budget counts for it.
    counted: Held,
}

impl Connection {
    fn held(&self) -> Held {
        let (tls, replies) = self.client.held();
        let behind = self.session.held() - self.session.unfinished();
        Held { all: tls + replies + self.session.held(), replies: replies + behind }
    }

    /// What the client has sent of something that is not whole.
    fn unfinished(&self) -> usize {
        self.session.unfinished() + self.client.unfinished()
    }
}

pub struct Connections {
    /// Boxed, so that places for 1,024 connections take 8 kB where there are none yet.
    places: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    pub timers: Timers,
    /// When each connection was last used, by the number of uses: its last request, or its beginning.
    used: Vec<u64>,
    uses: u64,
    per_address: Counts,
    pub budget: Budget,
    handshakes: Option<Handshakes>,
    http: Http,
    classify: Classify,
    counters: Arc<EdgeCounters>,
    generation: u64,
}

impl Connections {
    pub fn new(settings: Settings, handshakes: Option<Handshakes>) -> Self {
        let size = settings.http.max_connections;
        Connections {
            places: std::iter::repeat_with(|| None).take(size).collect(),
            free: (0..size).rev().collect(),
            timers: Timers::new(size, settings.deadlines),
            used: vec![0; size],
            uses: 0,
            per_address: Counts::default(),
            budget: Budget::new(settings.http.max_buffer_bytes),
            handshakes,
            http: settings.http,
            classify: settings.classify,
            counters: settings.counters,
            generation: 0,
        }
    }

    pub fn places(&self) -> usize {
        self.places.len()
    }

    pub fn open(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub fn get(&mut self, at: usize) -> Option<&mut Connection> {
        self.places.get_mut(at)?.as_deref_mut()
    }

    /// Tells a connection's session what has happened. A request that is to be dispatched has this
    /// `number` and is written to `out`.
    pub fn on_event(
        &mut self,
        at: usize,
        event: Event<'_>,
        number: u64,
        out: &mut Vec<u8>,
        now: Now,
    ) -> Option<Step> {
        let connection = self.places.get_mut(at)?.as_mut()?;
        let context = Context {
            number,
            peer: connection.peer,
            proxies: connection.is_proxy.then_some(&self.http.trusted_proxies),
            is_encrypted: connection.client.is_encrypted(),
            certificate: connection.client.certificate(),
            classify: self.classify,
        };
        let step = connection.session.on(event, context, out);
        if let Some(wait) = step.begins {
            self.timers.start(at, wait, now.mono_ms);
        }
        Some(step)
    }

    /// The connection has a request in work.
    pub fn note_use(&mut self, at: usize) {
        self.uses += 1;
        if let Some(used) = self.used.get_mut(at) {
            *used = self.uses;
        }
    }

    /// Lets a new client in, and closes another connection for it if it must be.
    pub fn enter(&mut self, stream: TcpStream, peer: IpAddr, poll: &Poll, keys: usize, now: Now) {
        self.counters.accepted.add(1);
        let is_proxy = is_trusted(&self.http.trusted_proxies, peer);
        let Some(at) = self.place_for(peer, is_proxy) else {
            self.counters.turned_away.add(1);
            return;
        };
        let tls = match &self.handshakes {
            Some(handshakes) => handshakes.acceptor.accept().map(|tls| Tls::Here(Box::new(tls))),
            None => Ok(Tls::None),
        };
        let client = match (watch(stream, poll, at + keys), tls) {
            (Ok(stream), Ok(tls)) => Client::new(stream, tls),
            (_, Err(e)) => return log::debug!(client:% = peer; "no TLS for client {peer}: {e}"),
            (Err(e), _) => {
                return log::debug!(client:% = peer; "client {peer} was gone at once: {e}");
            }
        };
        self.free.pop();
        if !is_proxy {
            self.per_address.add(peer.into());
        }
        self.generation += 1;
        let (session, wait) = Session::new(self.handshakes.is_some());
        let (generation, counted) = (self.generation, Held::default());
        if let Some(place) = self.places.get_mut(at) {
            let new = Connection { session, client, peer, is_proxy, generation, counted };
            *place = Some(Box::new(new));
        }
        self.note_use(at);
        self.timers.start(at, wait, now.mono_ms);
        self.update_held(at);
    }

    /// A free place, if need be that of a connection that gives way.
    fn place_for(&mut self, peer: IpAddr, is_proxy: bool) -> Option<usize> {
        if !is_proxy && self.per_address.of(peer.into()) >= self.http.max_connections_per_ip {
            let subscriber = Subscriber::from(peer);
            let is_theirs = |other: &Connection| Subscriber::from(other.peer) == subscriber;
            if !self.give_way(|other| !other.is_proxy && is_theirs(other)) {
                return None;
            }
        }
        if self.free.is_empty() {
            self.give_way(|_| true);
        }
        self.free.last().copied()
    }

    /// Closes some connections: descriptors or memory are short, and what this frees is there for the
    /// rest of the process first.
    pub fn shrink(&mut self) {
        for _ in 0..(self.open() / 8).max(1) {
            self.give_way(|_| true);
        }
    }

    /// Closes one of the connections that may go and have no request in work, nor its reply on the way:
    /// of those whose address has the most, the one whose last request came (or that was accepted)
    /// longest ago. False if there is none.
    fn give_way(&mut self, may_go: impl Fn(&Connection) -> bool) -> bool {
        let Some(at) = self.first_to_go(may_go) else { return false };
        self.counters.gave_way.add(1);
        self.close(at);
        true
    }

    fn first_to_go(&self, may_go: impl Fn(&Connection) -> bool) -> Option<usize> {
        let share_of = |at: usize| {
            let connection = self.places.get(at)?.as_ref()?;
            let is_idle = !connection.session.is_at_work() && may_go(connection);
            is_idle.then(|| self.connections_of_address(connection))
        };
        // As a rule one of those is idle whose address has the most. Only what is older than what was
        // found before is looked at, since there may be very many.
        let most = self.per_address.most().max(1);
        let mut oldest = None;
        for (at, used) in self.used.iter().enumerate() {
            let is_older = oldest.is_none_or(|(before, _)| *used < before);
            if is_older && share_of(at) == Some(most) {
                oldest = Some((*used, at));
            }
        }
        let all =
            || (0..).zip(&self.used).filter_map(|(at, u)| Some((Reverse(share_of(at)?), *u, at)));
        oldest.map(|(_, at)| at).or_else(|| all().min().map(|(.., at)| at))
    }

    /// How many connections this one's address has. Behind a proxy are many clients: each of its
    /// connections counts for itself.
    fn connections_of_address(&self, connection: &Connection) -> usize {
        if connection.is_proxy { 1 } else { self.per_address.of(connection.peer.into()) }
    }

    pub fn close(&mut self, at: usize) {
        let Some(connection) = self.places.get_mut(at).and_then(Option::take) else { return };
        if !connection.is_proxy {
            self.per_address.remove(connection.peer.into());
        }
        if let Some(handshakes) =
            self.handshakes.as_ref().filter(|_| connection.client.is_tls_away())
        {
            handshakes.cancel(at);
        }
        self.budget.change(connection.counted, Held::default());
        self.timers.remove(at);
        self.free.push(at);
    }

    /// Has the next step of a TLS handshake computed.
    pub fn lend_tls(&mut self, at: usize) {
        let (Some(Some(connection)), Some(handshakes)) =
            (self.places.get_mut(at), &self.handshakes)
        else {
            return;
        };
        if let Some(tls) = connection.client.lend_tls() {
            let step = HandshakeStep { at, generation: connection.generation, tls };
            handshakes.submit(connection.peer.into(), step);
        }
    }

    /// Brings the budget up to date with what the connection holds. True if that has grown.
    pub fn update_held(&mut self, at: usize) -> bool {
        let Some(connection) = self.places.get_mut(at).and_then(Option::as_mut) else {
            return false;
        };
        let (before, held) = (connection.counted, connection.held());
        connection.counted = held;
        self.budget.change(before, held);
        held.all > before.all || held.replies > before.replies
    }

    /// Whether the connection, which holds more than before, may keep it; if need be, others are closed
    /// for it.
    pub fn keep_or_make_room(&mut self, at: usize) -> bool {
        let Some(connection) = self.places.get_mut(at).and_then(Option::as_mut) else {
            return true;
        };
        let unfinished = connection.unfinished();
        if unfinished > 0 {
            // What is small gets in as long as a reply can give way.
            return self.budget.has_room(unfinished)
                || (Budget::is_small(unfinished) && self.make_room(0));
        }
        let is_over = self.budget.is_over() || self.budget.replies_are_over();
        if is_over && connection.session.drop_pending() {
            self.update_held(at);
        }
        self.make_room(0);
        true
    }

    /// Makes room for so many bytes more: the client that has been slowest to read its reply is closed.
    /// False if there is none left.
    pub fn make_room(&mut self, more: usize) -> bool {
        while !self.budget.fits(more) || (self.budget.replies_are_over() && self.several_write()) {
            let Some(slowest) = self.timers.longest(Wait::Write) else { return false };
            self.close(slowest);
        }
        true
    }

    /// One reply alone may be larger than the share of all.
    fn several_write(&self) -> bool {
        self.timers.all(Wait::Write).nth(1).is_some()
    }
}

fn watch(stream: TcpStream, poll: &Poll, key: usize) -> io::Result<Watched<TcpStream>> {
    stream.set_nonblocking(true)?;
    // A reply is written whole; there is nothing to wait for.
    stream.set_nodelay(true)?;
    poll.watch(stream, key, READ)
}
