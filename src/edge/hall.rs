//! All clients that are in: who is let in, who has to go, and when. What they ask is served by
//! [`super::serve`].

use std::cmp::Reverse;
use std::io;
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use super::answer::Date;
use super::client::{Client, Tls};
use super::conn::Phase;
use super::lane::Lanes;
use super::limits::{Budget, Held, PerAddress, counted_as};
use super::listen::Arrival;
use super::poll::{Interest, Poll, Watched};
use super::proxies::Networks;
use super::timers::{Lists, Timers, Wait};
use super::tls::{Acceptor, Handshakes};
use super::{Counters, Deadlines, Settings};
use crate::clock::Now;
use crate::http::Classify;
use crate::problem::Code;

/// What TLS takes.
pub struct Secure {
    /// Makes the server's side of a connection.
    pub acceptor: Arc<Acceptor>,
    /// Computes its handshake.
    pub handshakes: Handshakes,
}

/// Everyone who is in.
pub struct Hall {
    pub(super) clients: Vec<Option<Client>>,
    free: Vec<usize>,
    pub(super) timers: Timers,
    /// One list: whoever had a request answered last stands last, so the front gives way.
    pub(super) ages: Lists<1>,
    per_address: PerAddress,
    pub(super) budget: Budget,
    /// With TLS.
    pub(super) secure: Option<Secure>,
    pub(super) proxies: Networks,
    pub(super) classify: Classify,
    pub(super) counters: Arc<Counters>,
    /// Clients that were answered and have sent more already.
    pub(super) waiting: Vec<usize>,
    /// The number of the latest request.
    number: u64,
    pub(super) date: Date,
    /// What was just decrypted.
    pub(super) plain: Vec<u8>,
    /// The request that is being read, and the reply that is being written.
    pub(super) request_bytes: Vec<u8>,
    pub(super) reply_bytes: Vec<u8>,
    /// The head of an answer as the lane's end wrote it.
    pub(super) answer_head: Vec<u8>,
    max_per_address: usize,
    pub(super) max_waiting: usize,
    pub(super) is_draining: bool,
}

impl Hall {
    /// An empty hall.
    pub fn new(settings: Settings, secure: Option<Secure>) -> Self {
        let size = settings.max_connections;
        let deadlines = settings.deadlines;
        Hall {
            clients: std::iter::repeat_with(|| None).take(size).collect(),
            free: (0..size).rev().collect(),
            timers: Timers::new(size, |wait| length(&deadlines, wait)),
            ages: Lists::new(size),
            per_address: PerAddress::default(),
            budget: Budget::new(settings.max_buffer_bytes),
            secure,
            proxies: Networks::new(settings.trusted_proxies),
            classify: settings.classify,
            counters: Arc::default(),
            waiting: Vec::new(),
            number: 0,
            date: Date::default(),
            plain: Vec::new(),
            request_bytes: Vec::new(),
            reply_bytes: Vec::new(),
            answer_head: Vec::new(),
            max_per_address: settings.max_connections_per_ip,
            max_waiting: settings.max_waiting,
            is_draining: false,
        }
    }

    /// What is counted here.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Nobody is in.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.clients.len()
    }

    /// When the next client is late.
    pub fn next_due(&self) -> Option<u64> {
        self.timers.next_due()
    }

    /// A number for one more request.
    pub fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    /// Whatever the sockets did, what it means for the counters.
    pub fn count(&self, lanes: &Lanes) {
        self.counters.lanes_lost.set(lanes.lost());
        self.counters.lanes_down.set(lanes.down());
        self.counters.open.set((self.clients.len() - self.free.len()) as u64);
        self.counters.held_bytes.set(self.budget.held() as u64);
    }

    /// Lets a new client in, and somebody else out if it must be.
    pub fn arrived(&mut self, arrival: Arrival, poll: &Poll, first_key: usize, now: Now) {
        let Arrival::Client(stream, peer) = arrival else {
            self.counters.accept_pauses.add(1);
            // What this frees is there for the rest of the process first.
            let inside = self.clients.len() - self.free.len();
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
                let serial = self.next_number();
                self.enter(at, Client::new(stream, tls, peer, is_proxy, serial), now);
            }
            (_, Err(e)) => log::error!("no TLS for client {peer}: {e}"),
            (Err(e), _) => log::debug!("client {peer} was gone at once: {e}"),
        }
    }

    /// A free place, if need be that of somebody who gives way.
    fn place_for(&mut self, peer: IpAddr, is_proxy: bool) -> Option<usize> {
        if !is_proxy && self.per_address.count(peer) >= self.max_per_address {
            let site = counted_as(peer);
            if !self.give_way(|client| !client.is_proxy && counted_as(client.peer) == site) {
                return None;
            }
        }
        if self.free.is_empty() {
            self.give_way(|_| true);
        }
        self.free.last().copied()
    }

    fn enter(&mut self, at: usize, client: Client, now: Now) {
        self.free.pop();
        if !client.is_proxy {
            self.per_address.add(client.peer);
        }
        if let Some(place) = self.clients.get_mut(at) {
            *place = Some(client);
        }
        self.ages.push_back(0, at);
        let wait = if self.secure.is_some() { Wait::Handshake } else { Wait::Head };
        self.timers.restart(at, wait, now.mono_ms);
        self.settle(at, now);
    }

    /// Closes one of the clients that may go and have no request in work: of those whose address has
    /// the most connections, the one that had a request answered (or arrived) longest ago. False if
    /// there is none.
    fn give_way(&mut self, may_go: impl Fn(&Client) -> bool) -> bool {
        let Some(at) = self.first_to_go(may_go) else { return false };
        self.counters.gave_way.add(1);
        self.close(at);
        true
    }

    fn first_to_go(&self, may_go: impl Fn(&Client) -> bool) -> Option<usize> {
        let idle = |at: usize| {
            let client = self.clients.get(at)?.as_ref()?;
            (client.request.is_none() && may_go(client)).then(|| (at, self.share(client)))
        };
        // The longest idle first, so that the search ends early as a rule.
        let most = self.per_address.most().max(1);
        let mut candidates = self.ages.iter(0).filter_map(idle);
        let of_most = candidates.find(|(_, share)| *share == most);
        let all = || self.ages.iter(0).filter_map(idle);
        let (at, _) = of_most.or_else(|| all().min_by_key(|(_, share)| Reverse(*share)))?;
        Some(at)
    }

    /// How many connections the client's address has. Behind a proxy are many clients: each of its
    /// connections counts for itself.
    fn share(&self, client: &Client) -> usize {
        if client.is_proxy { 1 } else { self.per_address.count(client.peer) }
    }

    /// Lets a client out.
    pub(super) fn close(&mut self, at: usize) {
        let Some(client) = self.clients.get_mut(at).and_then(Option::take) else { return };
        if !client.is_proxy {
            self.per_address.remove(client.peer);
        }
        if let Some(secure) = self.secure.as_ref().filter(|_| client.is_tls_away()) {
            secure.handshakes.cancel(counted_as(client.peer), at);
        }
        self.budget.change(client.counted, Held::default());
        self.timers.remove(at);
        self.ages.remove(at);
        self.free.push(at);
    }

    /// Lets out or refuses whoever is past a deadline.
    pub fn expire(&mut self, now: Now) {
        while let Some((at, wait)) = self.timers.expired(now.mono_ms) {
            if !matches!(wait, Wait::KeepAlive | Wait::Linger) {
                self.counters.timed_out.add(1);
            }
            match wait {
                // Whoever said nothing is told nothing.
                Wait::Head if self.phase(at) == Some(Phase::Idle) => self.close(at),
                Wait::Head | Wait::Body => self.refuse(at, Code::RequestTimeout, now),
                Wait::Work => self.refuse(at, Code::ServiceUnavailable, now),
                Wait::Handshake | Wait::Write | Wait::KeepAlive | Wait::Linger => self.close(at),
            }
        }
    }

    /// From now on every reply is the last on its connection.
    pub fn begin_drain(&mut self) {
        self.is_draining = true;
    }

    /// Closes whoever has nothing in progress; a request that has just come in is taken first.
    pub fn close_idle(&mut self, lanes: &mut Lanes, buf: &mut [u8], now: Now) {
        let kinds = [Wait::Handshake, Wait::Head, Wait::KeepAlive];
        let quiet: Vec<usize> = kinds.into_iter().flat_map(|w| self.timers.all(w)).collect();
        for at in quiet {
            self.read(at, lanes, buf, now);
            if self.phase(at) == Some(Phase::Idle) {
                self.close(at);
            }
        }
    }

    fn phase(&self, at: usize) -> Option<Phase> {
        self.clients.get(at)?.as_ref().map(|client| client.reader.phase())
    }
}

fn watch(stream: TcpStream, poll: &Poll, key: usize) -> io::Result<Watched<TcpStream>> {
    stream.set_nonblocking(true)?;
    // A reply is written whole; there is nothing to wait for.
    stream.set_nodelay(true)?;
    poll.watch(stream, key, Interest::READ)
}

fn length(deadlines: &Deadlines, wait: Wait) -> Duration {
    match wait {
        Wait::Handshake => deadlines.handshake,
        Wait::Head => deadlines.head,
        // The head's part is over when this one starts, so both together are the whole request.
        Wait::Body => deadlines.request.saturating_sub(deadlines.head),
        Wait::Work => deadlines.work,
        Wait::Write => deadlines.write,
        Wait::KeepAlive => deadlines.keep_alive,
        Wait::Linger => deadlines.linger,
    }
}
