//! All connections: who is let in, who has to go, and what they may hold. What happens on one of them
//! is done in [`super::serve`].

use std::cmp::Reverse;
use std::io;
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;

use super::client::{Client, Tls};
use super::lane::Lanes;
use super::limits::{Budget, Held, PerAddress, counted_as};
use super::listen::Arrival;
use super::poll::{Interest, Poll, Watched};
use super::proxies::Networks;
use super::render::Date;
use super::session::Session;
use super::settings::{Settings, Wait};
use super::timers::{Lists, Timers};
use super::tls::{Acceptor, Handshakes};
use crate::clock::Now;
use crate::http::Classify;
use crate::metrics::EdgeCounters;

/// What TLS takes.
pub struct Secure {
    /// Makes the server's side of a connection.
    pub acceptor: Arc<Acceptor>,
    /// Computes its handshake.
    pub handshakes: Handshakes,
}

/// One connection.
pub struct Connection {
    /// What it is about to do.
    pub session: Session,
    /// Its socket.
    pub client: Client,
    /// The peer, which may be a proxy.
    pub peer: IpAddr,
    /// The peer is a trusted proxy.
    pub is_proxy: bool,
    /// No other connection has had this number.
    pub serial: u64,
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

/// All connections, each in a place of its own.
pub struct Connections {
    pub(super) places: Vec<Option<Connection>>,
    free: Vec<usize>,
    pub(super) timers: Timers,
    /// One list: the connection whose last request came longest ago (or that was accepted then) stands
    /// in front.
    pub(super) ages: Lists<1>,
    per_address: PerAddress,
    budget: Budget,
    /// With TLS.
    pub(super) secure: Option<Secure>,
    pub(super) proxies: Networks,
    pub(super) classify: Classify,
    pub(super) counters: Arc<EdgeCounters>,
    /// The number of the latest request or connection.
    number: u64,
    pub(super) date: Date,
    /// What was just decrypted.
    pub(super) plain: Vec<u8>,
    /// The request that is being read, and the reply that is being written.
    pub(super) request_bytes: Vec<u8>,
    pub(super) reply_bytes: Vec<u8>,
    max_per_address: usize,
}

impl Connections {
    /// An empty table.
    pub fn new(settings: Settings, secure: Option<Secure>) -> Self {
        let size = settings.max_connections;
        Connections {
            places: std::iter::repeat_with(|| None).take(size).collect(),
            free: (0..size).rev().collect(),
            timers: Timers::new(size, &settings.deadlines),
            ages: Lists::new(size),
            per_address: PerAddress::default(),
            budget: Budget::new(settings.max_buffer_bytes),
            secure,
            proxies: Networks::new(settings.trusted_proxies),
            classify: settings.classify,
            counters: settings.counters,
            number: 0,
            date: Date::default(),
            plain: Vec::new(),
            request_bytes: Vec::new(),
            reply_bytes: Vec::new(),
            max_per_address: settings.max_connections_per_ip,
        }
    }

    /// Whether no connection is open.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.places.len()
    }

    /// When the next client is late.
    pub fn next_due(&self) -> Option<u64> {
        self.timers.next_due()
    }

    /// A number for one more request or connection.
    pub fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    /// Brings the counters of what is there at this moment up to date.
    pub fn count(&self, lanes: &Lanes) {
        self.counters.lanes_lost.set(lanes.losses());
        self.counters.lanes_down.set(lanes.down());
        self.counters.open.set((self.places.len() - self.free.len()) as u64);
        self.counters.held_bytes.set(self.budget.held() as u64);
    }

    /// Lets a new client in, and closes another connection for it if it must be.
    pub fn arrived(&mut self, arrival: Arrival, poll: &Poll, first_key: usize, now: Now) {
        let Arrival::Client(stream, peer) = arrival else {
            self.counters.accept_pauses.add(1);
            // What this frees is there for the rest of the process first.
            let inside = self.places.len() - self.free.len();
            for _ in 0..(inside / 8).max(1) {
                self.give_way(|_| true);
            }
            return;
        };
        self.counters.accepted.add(1);
        let is_proxy = self.proxies.contains(peer);
        let Some(at) = self.place_for(peer, is_proxy) else {
            self.counters.turned_away.add(1);
            return;
        };
        let tls = match &self.secure {
            Some(secure) => secure.acceptor.accept().map(|tls| Tls::Here(Box::new(tls))),
            None => Ok(Tls::None),
        };
        match (watch(stream, poll, at + first_key), tls) {
            (Ok(stream), Ok(tls)) => {
                self.enter(at, Client::new(stream, tls), peer, is_proxy, now);
            }
            (_, Err(e)) => log::error!("no TLS for client {peer}: {e}"),
            (Err(e), _) => log::debug!("client {peer} was gone at once: {e}"),
        }
    }

    /// A free place, if need be that of a connection that gives way.
    fn place_for(&mut self, peer: IpAddr, is_proxy: bool) -> Option<usize> {
        if !is_proxy && self.per_address.count(peer) >= self.max_per_address {
            let site = counted_as(peer);
            if !self.give_way(|other| !other.is_proxy && counted_as(other.peer) == site) {
                return None;
            }
        }
        if self.free.is_empty() {
            self.give_way(|_| true);
        }
        self.free.last().copied()
    }

    fn enter(&mut self, at: usize, client: Client, peer: IpAddr, is_proxy: bool, now: Now) {
        self.free.pop();
        if !is_proxy {
            self.per_address.add(peer);
        }
        let (session, wait) = Session::new(self.secure.is_some());
        let (serial, counted) = (self.next_number(), Held::default());
        if let Some(place) = self.places.get_mut(at) {
            *place = Some(Connection { session, client, peer, is_proxy, serial, counted });
        }
        self.ages.push_back(0, at);
        self.timers.start(at, wait, now.mono_ms);
        self.count_held(at);
    }

    /// Closes one of the connections that may go and have no request in work: of those whose address
    /// has the most, the one whose last request came (or that was accepted) longest ago. False if there
    /// is none.
    fn give_way(&mut self, may_go: impl Fn(&Connection) -> bool) -> bool {
        let Some(at) = self.first_to_go(may_go) else { return false };
        self.counters.gave_way.add(1);
        self.close(at);
        true
    }

    fn first_to_go(&self, may_go: impl Fn(&Connection) -> bool) -> Option<usize> {
        let idle = |at: usize| {
            let connection = self.places.get(at)?.as_ref()?;
            let is_idle = connection.session.works_on().is_none() && may_go(connection);
            is_idle.then(|| (at, self.share(connection)))
        };
        // The longest idle first, so that the search ends early as a rule.
        let most = self.per_address.most().max(1);
        let of_most = self.ages.iter(0).filter_map(idle).find(|(_, share)| *share == most);
        let all = || self.ages.iter(0).filter_map(idle);
        let (at, _) = of_most.or_else(|| all().min_by_key(|(_, share)| Reverse(*share)))?;
        Some(at)
    }

    /// How many connections this one's address has. Behind a proxy are many clients: each of its
    /// connections counts for itself.
    fn share(&self, connection: &Connection) -> usize {
        if connection.is_proxy { 1 } else { self.per_address.count(connection.peer) }
    }

    /// Closes a connection.
    pub(super) fn close(&mut self, at: usize) {
        let Some(connection) = self.places.get_mut(at).and_then(Option::take) else { return };
        if !connection.is_proxy {
            self.per_address.remove(connection.peer);
        }
        if let Some(secure) = self.secure.as_ref().filter(|_| connection.client.is_tls_away()) {
            secure.handshakes.cancel(counted_as(connection.peer), at);
        }
        self.budget.change(connection.counted, Held::default());
        self.timers.remove(at);
        self.ages.remove(at);
        self.free.push(at);
    }

    /// Brings the budget up to date with what the connection holds. True if that has grown.
    pub(super) fn count_held(&mut self, at: usize) -> bool {
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
    pub(super) fn may_hold(&mut self, at: usize) -> bool {
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
            self.count_held(at);
        }
        self.make_room(0);
        true
    }

    /// Makes room for so many bytes more: the client that has been slowest to read its reply is closed.
    /// False if there is none left.
    pub(super) fn make_room(&mut self, more: usize) -> bool {
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
    poll.watch(stream, key, Interest::READ)
}
