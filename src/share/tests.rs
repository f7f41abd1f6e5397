//! Instances that share through an exchange in memory, which loses, repeats, forgets and lies.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard};

use super::codec::{Keys, SERIAL_BUCKETS, Value};
use super::exchange::{Changes, Exchange, Name, News, Place, Swap};
use super::thread::{Comparison, Parts, Thread};
use super::{Asked, Mode, Sharing};
use crate::ca::Ca;
use crate::ca::csr::Csr;
use crate::ca::publisher::Publisher;
use crate::ca::record::{Origin, Reason, Record, Redeemed};
use crate::ca::retention::Retention;
use crate::clock::{self, Now};
use crate::config;
use crate::device::DeviceId;
use crate::devices::table::Devices;
use crate::devices::{Bound, Instance as Id, Row};
use crate::files::test_dir::TestDir;
use crate::jwt::{Claims, Signer, Token, TokenHash};
use crate::metrics::Metrics;
use crate::serial::Serial;
use crate::store::ledger::Ledger;
use crate::store::{Answer, Down, DownKind, Op, Outcome, Rows, Status, StoreError, TokenStore};

/// How many steps an instance may still take on its line.
type Steps = Arc<Mutex<usize>>;

/// What the world must know of the exchange between its instances, whichever that is.
trait Medium {
    type Line: Exchange;

    /// A line of one instance, of which each step may be the last.
    fn line(this: &Arc<Mutex<Self>>, steps: &Steps) -> Self::Line;

    /// One of its misfortunes, by two numbers below seven and eight.
    fn suffer(&mut self, what: usize, at: usize);

    /// It has room again, and all of it is in reach.
    fn recover(&mut self);

    /// Somebody who has no key puts a value there, or a copy of the one with this number, and
    /// announces it.
    fn forge(&mut self, place: Place, name: Name, copied: usize);
}

/// What stands in the server.
#[derive(Clone, Default)]
struct Data {
    values: BTreeMap<Place, Vec<u8>>,
    stream: Vec<(u64, Vec<Name>)>,
    holders: BTreeMap<DeviceId, Serial>,
}

#[derive(Default)]
struct Server {
    data: Data,
    /// With this, or with nothing, it starts again.
    saved: Data,
    /// Of the stream; never goes back, as time does not.
    last_id: u64,
    run: u64,
    is_full: bool,
    is_filling: bool,
    /// The part of it that has the odd ones of the hashes and of the devices.
    is_part_away: bool,
    /// So many get through in time; all if that is 0.
    most_values: usize,
}

impl Server {
    fn in_time<T>(&self, values: Vec<T>) -> Result<Vec<T>, StoreError> {
        match self.most_values {
            0 => Ok(values),
            most if values.len() <= most => Ok(values),
            _ => Err(down(DownKind::Lost, "timed out")),
        }
    }

    fn reaches(&self, key: &str) -> bool {
        !self.is_part_away || key.bytes().last().is_none_or(|last| last % 2 == 0)
    }

    fn append(&mut self, names: Vec<Name>) -> u64 {
        self.last_id += 1;
        self.data.stream.push((self.last_id, names));
        self.last_id
    }
}

impl Medium for Server {
    type Line = Line;

    fn line(this: &Arc<Mutex<Self>>, steps: &Steps) -> Line {
        Line { server: Arc::clone(this), run: 0, steps: Arc::clone(steps) }
    }

    fn suffer(&mut self, what: usize, at: usize) {
        match what {
            // A part of the stream is lost, or told again.
            0 => {
                let most = self.data.stream.len();
                self.data.stream.drain(..at.min(most));
            }
            1 => {
                let entry = self.data.stream.get(at).map(|(_, names)| names.clone());
                self.append(entry.unwrap_or_default());
            }
            2 => self.saved = self.data.clone(),
            // It starts again with older data or none, or is emptied.
            3 => {
                self.data = self.saved.clone();
                self.run += 1;
            }
            4 => self.data = Data::default(),
            5 => self.is_part_away = !self.is_part_away,
            _ => self.is_full = !self.is_full,
        }
    }

    fn recover(&mut self) {
        (self.is_full, self.is_part_away) = (false, false);
    }

    fn forge(&mut self, place: Place, name: Name, copied: usize) {
        let copied = self.data.values.values().nth(copied).cloned();
        self.data.values.insert(place, copied.unwrap_or_else(|| b"forged".to_vec()));
        self.append(vec![name]);
    }
}

/// The exchange of one instance. Each step on the server may be the last one before the line is cut,
/// and a server that starts again cuts all.
struct Line {
    server: Arc<Mutex<Server>>,
    /// The run of the server to which it is connected.
    run: u64,
    steps: Steps,
}

/// How long what has ended is kept.
const KEEP_DAYS: u32 = 100;
const FOR_EVER: usize = usize::MAX;
/// Entries read at once: few, so that reading takes several turns.
const READ_ENTRIES: usize = 3;

fn down(kind: DownKind, why: &str) -> StoreError {
    StoreError::Down(Down { why: why.into(), kind, lasting: false, maybe_done: true })
}

impl Line {
    fn step(&self) -> Result<MutexGuard<'_, Server>, StoreError> {
        let mut steps = self.steps.lock().unwrap();
        let server = self.server.lock().unwrap();
        let left = steps.checked_sub(1).filter(|_| server.run == self.run);
        *steps = left.ok_or_else(|| down(DownKind::Lost, "cut"))?;
        Ok(server)
    }

    /// Nobody asks for what is known to be away.
    fn step_at<'k>(
        &self,
        keys: impl IntoIterator<Item = &'k String>,
    ) -> Result<MutexGuard<'_, Server>, StoreError> {
        let server = self.step()?;
        match keys.into_iter().all(|key| server.reaches(key)) {
            true => Ok(server),
            false => panic!("it is away"),
        }
    }

    fn write(&self) -> Result<MutexGuard<'_, Server>, StoreError> {
        let server = self.step()?;
        match server.is_full {
            true => Err(down(DownKind::Refused, "OOM command not allowed")),
            false => Ok(server),
        }
    }
}

impl Exchange for Line {
    const NAME: &'static str = "the server";

    fn connect(&mut self, _: &str, shares: bool) -> Result<(Option<String>, bool), StoreError> {
        self.run = self.server.lock().unwrap().run;
        Ok((Some(self.step()?.run.to_string()), shares))
    }

    fn reaches(&self, key: &str) -> bool {
        self.server.lock().unwrap().reaches(key)
    }

    fn can_reach_more(&mut self) -> Result<bool, StoreError> {
        Ok(!self.server.lock().unwrap().is_part_away)
    }

    fn end(&mut self) -> Result<String, StoreError> {
        Ok(self.write()?.append(Vec::new()).to_string())
    }

    fn changes(&mut self, cursor: &str) -> Result<Changes, StoreError> {
        let from: u64 = cursor.parse().unwrap();
        let server = self.step()?;
        let stream = &server.data.stream;
        let new: Vec<_> = stream.iter().filter(|(id, _)| *id > from).take(READ_ENTRIES).collect();
        let gap = stream.first().is_none_or(|(id, _)| *id > from)
            || stream.last().is_none_or(|(id, _)| *id < from);
        Ok(Changes {
            names: new.iter().flat_map(|(_, names)| names.clone()).collect(),
            cursor: new.last().map_or(from, |(id, _)| *id).to_string(),
            gap,
            more: new.len() == READ_ENTRIES,
        })
    }

    fn fields(&mut self, keys: &[String]) -> Result<Vec<String>, StoreError> {
        Ok(self.all(keys)?.into_iter().map(|(field, _)| field).collect())
    }

    fn all(&mut self, keys: &[String]) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let server = self.step_at(keys)?;
        let of = server.data.values.iter().filter(|(place, _)| keys.contains(&place.key));
        server.in_time(of.map(|(place, value)| (place.field.clone(), value.clone())).collect())
    }

    fn values(&mut self, places: &[Place]) -> Result<Vec<Vec<u8>>, StoreError> {
        let server = self.step_at(places.iter().map(|place| &place.key))?;
        let value = |place| server.data.values.get(place).cloned().unwrap_or_default();
        server.in_time(places.iter().map(value).collect())
    }

    fn tell(&mut self, news: &News) -> Result<Vec<bool>, StoreError> {
        let mut stand = Vec::new();
        for Swap { place, seen, value } in &news.swaps {
            assert!(self.reaches(&place.key), "it is away");
            let mut server = self.write()?;
            let there = server.data.values.get(place).cloned().unwrap_or_default();
            let is_as_seen = there == seen.clone().unwrap_or_default();
            stand.push(is_as_seen);
            if is_as_seen {
                server.data.values.insert(place.clone(), value.clone());
            }
        }
        for (device, serial) in &news.holders {
            self.write()?.data.holders.insert(device.clone(), *serial);
        }
        self.write()?.append(news.names.clone());
        // The reply may be lost, too.
        self.step().map(|_| stand)
    }

    fn holders(&mut self, devices: &[DeviceId]) -> Result<Vec<Serial>, StoreError> {
        let server = self.step()?;
        Ok(devices.iter().filter_map(|device| server.data.holders.get(device).copied()).collect())
    }

    fn remove(&mut self, places: &[Place]) -> Result<(), StoreError> {
        let mut server = self.step_at(places.iter().map(|place| &place.key))?;
        places.iter().for_each(|place| drop(server.data.values.remove(place)));
        Ok(())
    }

    fn is_filling(&mut self) -> Result<bool, StoreError> {
        Ok(self.step()?.is_filling)
    }
}

/// The tokens whose leases were freed, and what happens while one is.
#[derive(Default)]
struct Freed(Mutex<Vec<TokenHash>>, Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl TokenStore for Freed {
    fn run(&self, ops: &[Op], _: Now) -> Vec<Answer> {
        let free = |op: &Op| {
            let Op::Remove(token) = op else { return Err(StoreError::Undecided) };
            self.0.lock().unwrap().push(token.hash);
            if let Some(meanwhile) = self.1.lock().unwrap().take() {
                meanwhile();
            }
            Ok(Outcome::Done)
        };
        ops.iter().map(free).collect()
    }

    fn status(&self) -> Status {
        Status::default()
    }
}

struct Instance<E> {
    thread: Thread<E>,
    steps: Steps,
    freed: Arc<Freed>,
    /// What it once knew as revoked.
    revoked: BTreeSet<Serial>,
    dir: TestDir,
}

impl<E: Exchange> Instance<E> {
    fn record(&self) -> &Record {
        self.thread.parts.publisher.ca().record()
    }

    fn attempt(&mut self) {
        self.thread.attempt(clock::now());
    }

    fn cut_after(&self, steps: usize) {
        *self.steps.lock().unwrap() = steps;
    }

    fn serials(&self) -> BTreeSet<Serial> {
        (0x40..=0x7f).flat_map(|of| self.record().serials_of(of, 0)).collect()
    }

    /// What is revoked, when and why.
    fn revocations(&self) -> BTreeMap<Serial, (u64, Reason)> {
        let all = (0x40..=0x7f).flat_map(|of| self.record().revocations_of(of, 0));
        all.map(|revoked| (revoked.serial, (revoked.at, revoked.reason))).collect()
    }

    fn rows(&self) -> Vec<(DeviceId, Row)> {
        let devices = &self.thread.parts.devices;
        devices.all(clock::now()).into_iter().map(|d| (d.clone(), devices.row(&d))).collect()
    }

    fn keys(&self) -> Keys {
        let issuer = self.thread.parts.publisher.ca().issuer().unwrap();
        let fp = issuer.fingerprint()[..8].to_owned();
        Keys { mac: issuer.mac_key.clone(), fp }
    }
}

/// Instances of one CA, and what was done at any of them.
struct World<M: Medium> {
    server: Arc<Mutex<M>>,
    all: Vec<Instance<M::Line>>,
    signed: BTreeMap<Serial, (DeviceId, u64)>,
    revoked: BTreeSet<Serial>,
    bounds: BTreeMap<DeviceId, u64>,
    random: u64,
    /// Counts seconds, so that each event has a time of its own.
    time: u64,
}

impl World<Server> {
    /// Over a server in memory.
    fn new(instances: usize, seed: u64) -> Self {
        World::over(Server::default(), instances, seed)
    }
}

impl<M: Medium> World<M> {
    fn over(server: M, instances: usize, seed: u64) -> Self {
        let mut world = World {
            server: Arc::new(Mutex::new(server)),
            all: Vec::new(),
            signed: BTreeMap::new(),
            revoked: BTreeSet::new(),
            bounds: BTreeMap::new(),
            random: seed,
            time: 1_000,
        };
        (0..instances).for_each(|_| world.add_instance());
        world
    }

    fn add_instance(&mut self) {
        let (dir, now) = (TestDir::new(), clock::now());
        if let Some(first) = self.all.first() {
            for file in ["root-ca.crt", "root-ca.key"] {
                fs::copy(first.dir.join(file), dir.join(file)).unwrap();
            }
        }
        let settings = config::Ca {
            dir: dir.to_path_buf(),
            root_validity_years: 10,
            device_validity_days: 90,
        };
        let metrics = Arc::new(Metrics::new(std::iter::empty()));
        let ca = Arc::new(Ca::open(&settings, now).unwrap());
        let id = Id([self.all.len() as u8; 16]);
        let devices = Devices::open(&dir.join("devices.txt"), id, now).unwrap();
        let (steps, freed) = (Arc::new(Mutex::new(FOR_EVER)), Arc::new(Freed::default()));
        let retention = Retention::new(KEEP_DAYS, || false, now);
        let thread = Thread::new(Parts {
            exchange: M::line(&self.server, &steps),
            sharing: Arc::new(Sharing::new(Mode::Record)),
            publisher: Arc::new(Publisher::new(ca, None, Some(retention), None, metrics)),
            devices: Arc::new(devices),
            store: Arc::clone(&freed) as _,
            ledger: Arc::new(Ledger::new(100)),
            reenroll: false,
        });
        self.all.push(Instance { thread, steps, freed, revoked: BTreeSet::new(), dir });
    }

    /// xorshift64.
    fn below(&mut self, bound: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % bound as u64) as usize
    }

    fn device(&mut self) -> DeviceId {
        DeviceId::parse(&format!("d{}", self.below(4))).unwrap()
    }

    fn pick(&mut self) -> Option<Serial> {
        let at = self.below(self.signed.len().max(1));
        self.signed.keys().nth(at).copied()
    }

    fn tick(&mut self) -> u64 {
        self.time += 10;
        self.time
    }

    fn sign(&mut self, at: usize, device: DeviceId) -> (Serial, Option<Token>) {
        let mut bytes = [0; 16];
        bytes.fill_with(|| self.below(256) as u8);
        bytes[0] = bytes[0] & 0x3f | 0x40;
        let (serial, now, iat) = (Serial::from(bytes), clock::now(), self.tick());
        let claims = Claims { device_id: device.clone(), iat, exp: iat + 300, jti: None };
        let token = Signer::new(b"secret").sign(claims);
        let publisher = &self.all[at].thread.parts.publisher;
        let leaf = publisher
            .ca()
            .issuer()
            .unwrap()
            .sign(&csr(&device), &device, serial, None, now)
            .unwrap();
        let mut entries = publisher.ca().record().begin();
        let redeemed = Redeemed { hash: token.hash, iat, exp: iat + 300 };
        entries.add(&leaf, Some(Origin::Token(redeemed)), now);
        entries.commit().remove(0).unwrap();
        self.signed.insert(serial, (device, iat));
        (serial, self.all[at].thread.parts.sharing.free_when_shared(serial, token))
    }

    fn revoke(&mut self, at: usize, serial: Serial) {
        let record = self.all[at].record();
        if record.by_serial(&serial).is_some() {
            record.revoke_these(&[serial], Reason::KeyCompromise, clock::now()).unwrap();
            self.revoked.insert(serial);
        }
    }

    /// Kills what the device has so far.
    fn kill(&mut self, at: usize, device: DeviceId) {
        let c = self.tick();
        let parts = &self.all[at].thread.parts;
        parts.devices.raise(&device, Bound { t: c, c }, clock::now()).unwrap();
        self.all[at].record().apply_bounds(&[(device.clone(), c)]).unwrap();
        self.bounds.insert(device, c);
    }

    /// A token's trip, or a return, brings the row before the stream does.
    fn learn(&self, at: usize, device: DeviceId) {
        let other = &self.all[(at + 1) % self.all.len()].thread.parts.devices;
        let rows = vec![(device.clone(), other.row(&device))];
        self.all[at].thread.parts.devices.enter(rows, false, clock::now()).unwrap();
    }

    /// Somebody who has no key writes where a value stands, or will.
    fn forge(&mut self) {
        let Some(serial) = self.pick() else { return };
        let (device, _) = self.signed[&serial].clone();
        let names = [Name::Certificate(serial), Name::Revocation(serial), Name::Row(device)];
        let name = names[self.below(3)].clone();
        let (place, copied) = (self.all[0].keys().place(&name), self.below(self.signed.len()));
        self.server.lock().unwrap().forge(place, name, copied);
    }

    fn step(&mut self) {
        let (at, what) = (self.below(self.all.len()), self.below(17));
        match what {
            0..=3 => {
                let device = self.device();
                drop(self.sign(at, device));
            }
            4 | 5 => {
                self.pick().into_iter().for_each(|serial| self.revoke(at, serial));
            }
            6 => {
                let device = self.device();
                self.kill(at, device);
            }
            7 | 8 => {
                let steps = self.below(30);
                self.all[at].cut_after(steps);
            }
            9 => self.forge(),
            10 => {
                let (what, at) = (self.below(7), self.below(8));
                self.server.lock().unwrap().suffer(what, at);
            }
            11 => {
                let device = self.device();
                self.learn(at, device);
            }
            _ => self.all[at].attempt(),
        }
        if self.below(3) == 0 {
            self.all[at].cut_after(FOR_EVER);
        }
        for instance in &mut self.all {
            let revoked: BTreeSet<Serial> = instance.revocations().into_keys().collect();
            assert!(revoked.is_superset(&instance.revoked), "something was un-revoked");
            instance.revoked = revoked;
        }
    }

    /// Everybody reaches the server again, for long enough.
    fn heal(&mut self) {
        self.server.lock().unwrap().recover();
        for instance in &mut self.all {
            instance.thread.progress.look_ms = 0;
        }
        for _ in 0..4 {
            for instance in &mut self.all {
                instance.cut_after(FOR_EVER);
                instance.attempt();
            }
        }
    }

    #[track_caller]
    fn check(&self, what: &str) {
        let dead = |(_, (device, paid)): &(&Serial, &(DeviceId, u64))| {
            self.bounds.get(device).is_some_and(|c| paid <= c)
        };
        let dead = self.signed.iter().filter(dead).map(|(serial, _)| *serial);
        let revoked: BTreeSet<Serial> = self.revoked.iter().copied().chain(dead).collect();
        for (number, instance) in self.all.iter().enumerate() {
            let signed: BTreeSet<Serial> = self.signed.keys().copied().collect();
            assert_eq!(instance.serials(), signed, "{what}: what {number} knows");
            assert_eq!(instance.revocations(), self.all[0].revocations(), "{what}: {number}");
            assert_eq!(instance.rows(), self.all[0].rows(), "{what}: {number}");
        }
        assert_eq!(
            self.all[0].revocations().into_keys().collect::<BTreeSet<_>>(),
            revoked,
            "{what}"
        );
    }
}

/// A request of this device.
fn csr(device: &DeviceId) -> Csr {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, device.as_str());
    let key = rcgen::KeyPair::generate().unwrap();
    Csr::parse(&params.serialize_request(&key).unwrap().pem().unwrap()).unwrap()
}

#[test]
fn records_converge_whatever_happens_between_instances() {
    for seed in [1_u64, 2, 9] {
        let mut world = World::new(2 + seed as usize % 2, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        (0..60).for_each(|_| world.step());
        world.heal();
        world.check(&format!("seed {seed}"));
        // Whoever comes now learns all of it, also where something was forged.
        world.add_instance();
        world.heal();
        world.check(&format!("seed {seed}, one that is new"));
    }
}

/// The entries of both are read at once, by who has told one of them.
#[test]
fn what_two_tell_of_one_device_at_the_same_time_both_know() {
    let mut world = World::new(2, 5);
    world.heal();
    let device = DeviceId::parse("d").unwrap();
    for steps in 0..12 {
        world.all[0].cut_after(steps);
        for at in 0..2 {
            world.kill(at, device.clone());
            world.all[at].attempt();
        }
        world.all[0].cut_after(FOR_EVER);
        world.all[0].attempt();
        assert_eq!(world.all[0].rows()[0].1.bound.c, world.bounds[&device], "cut after {steps}");
    }
}

/// Every step of telling may be the last; the lease goes when the certificate is there, with its
/// holder, and announced.
#[test]
fn what_was_killed_is_revoked_by_whichever_way_that_was_learnt() {
    let mut world = World::new(2, 4);
    let device = DeviceId::parse("d").unwrap();
    let (serial, _) = world.sign(1, device.clone());
    world.kill(0, device.clone());
    // As when it was cut off: a token's trip, or the carry-over, brings the row first.
    world.learn(1, device);
    for at in [0, 1, 0, 1] {
        world.all[at].attempt();
    }
    for instance in &world.all {
        assert!(instance.revocations().contains_key(&serial));
    }
}

/// Redis came back older; another has compared before the carry-over has put a row there, and who had told
/// of it before finds it there.
#[test]
fn what_the_carry_over_has_put_is_announced() {
    let mut world = World::new(2, 11);
    world.heal();
    let device = DeviceId::parse("d").unwrap();
    world.kill(0, device.clone());
    world.all[0].attempt();
    world.server.lock().unwrap().suffer(3, 0);
    (0..2).for_each(|_| world.all[1].attempt());
    let (row, keys) = (world.all[0].thread.parts.devices.row(&device), world.all[0].keys());
    let value = keys.seal(&Value::Row(device.clone(), row.clone()));
    let place = keys.place(&Name::Row(device.clone()));
    world.server.lock().unwrap().data.values.insert(place, value);
    Rows::learn(&*world.all[0].thread.parts.devices, vec![(device, row)], clock::now());
    world.heal();
    world.check("it is announced");
}

/// A server that evicts, say.
#[test]
fn what_is_gone_before_others_have_read_it_is_put_there_again() {
    let mut world = World::new(2, 12);
    world.heal();
    let device = DeviceId::parse("d").unwrap();
    let (serial, _) = world.sign(0, device.clone());
    world.revoke(0, serial);
    world.kill(0, device);
    world.all[0].attempt();
    world.server.lock().unwrap().data.values.clear();
    for at in [1, 0, 1, 0] {
        world.all[at].attempt();
    }
    world.check("it is there again");
}

#[test]
fn a_lease_stays_until_its_certificate_is_shared() {
    let mut world = World::new(1, 1);
    world.all[0].attempt();
    for steps in 0.. {
        let device = DeviceId::parse(&format!("d{steps}")).unwrap();
        let (serial, unshared) = world.sign(0, device.clone());
        assert!(unshared.is_none(), "it is shared");
        let instance = &mut world.all[0];
        instance.cut_after(steps);
        instance.attempt();
        let freed = instance.freed.0.lock().unwrap().len();
        let is_over = match freed {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        };
        if is_over.is_continue() {
            instance.cut_after(FOR_EVER);
            instance.attempt();
        }
        assert_eq!(std::mem::take(&mut *instance.freed.0.lock().unwrap()).len(), 1);
        let keys = instance.keys();
        let server = world.server.lock().unwrap();
        let name = Name::Certificate(serial);
        assert!(server.data.values.contains_key(&keys.place(&name)));
        assert_eq!(server.data.holders.get(&device), Some(&serial));
        assert!(server.data.stream.iter().any(|(_, names)| names.contains(&name)));
        if is_over.is_break() {
            assert!(steps > 3, "it was cut nowhere");
            return;
        }
    }
}

/// Who asks whether all is told is not answered for what was changed after it was told.
#[test]
fn what_is_revoked_while_leases_are_freed_is_told_before_it_is_answered() {
    let mut world = World::new(1, 1);
    world.all[0].attempt();
    let (serial, _) = world.sign(0, DeviceId::parse("d").unwrap());
    let (answer, answered) = sync_channel(1);
    let Parts { publisher, sharing, .. } = &world.all[0].thread.parts;
    let (publisher, sharing) = (publisher.clone(), sharing.clone());
    let revoke = move || {
        let revoked =
            publisher.ca().record().revoke_these(&[serial], Reason::Unspecified, clock::now());
        assert_eq!(revoked.unwrap(), [serial]);
        sharing.lock().asked.push(Asked { names: Vec::new(), answer });
    };
    *world.all[0].freed.1.lock().unwrap() = Some(Box::new(revoke));
    let place = world.all[0].keys().place(&Name::Revocation(serial));
    for is_told in [false, true] {
        world.all[0].attempt();
        assert_eq!(world.server.lock().unwrap().data.values.contains_key(&place), is_told);
        assert_eq!(answered.try_recv().is_ok(), is_told);
    }
}

/// The last step of a comparison has nothing to compare.
#[test]
fn what_is_revoked_before_the_last_step_of_a_comparison_is_told_before_it_is_answered() {
    let mut world = World::new(1, 1);
    world.all[0].attempt();
    let (serial, _) = world.sign(0, DeviceId::parse("d").unwrap());
    world.revoke(0, serial);
    let instance = &mut world.all[0];
    let (keys, (answer, answered)) = (instance.keys(), sync_channel(1));
    let asked = Asked { names: Vec::new(), answer };
    instance.thread.parts.sharing.lock().asked.push(asked);
    let done = SERIAL_BUCKETS.len() + usize::from(u8::MAX) + 1;
    let cursor = Some(instance.thread.progress.cursor.clone());
    instance.thread.turn(clock::now()).unwrap().compare(Comparison { cursor, done }).unwrap();
    let place = keys.place(&Name::Revocation(serial));
    assert!(world.server.lock().unwrap().data.values.contains_key(&place));
    assert!(answered.try_recv().is_ok());
}

/// Also where nothing was read since, and its device has a newer one.
#[test]
fn a_certificate_is_known_when_it_was_asked_for() {
    let mut world = World::new(2, 1);
    world.heal();
    let [(serial, _), _] = [(); 2].map(|()| world.sign(0, DeviceId::parse("d").unwrap()));
    world.all[0].attempt();
    let (answer, answered) = sync_channel(1);
    let other = &mut world.all[1];
    assert_eq!(other.record().by_serial(&serial), None);
    let asked = Asked { names: vec![Name::Certificate(serial)], answer };
    other.thread.turn(clock::now()).unwrap().answer(vec![asked]).unwrap();
    assert!(other.record().by_serial(&serial).is_some() && answered.try_recv().is_ok());
}

/// Tokens go on: nobody waits for a server that takes nothing.
#[test]
fn what_a_full_server_refuses_is_told_when_there_is_room() {
    let mut world = World::new(2, 2);
    world.heal();
    world.server.lock().unwrap().is_full = true;
    let device = DeviceId::parse("d").unwrap();
    let (serial, unshared) = world.sign(0, device.clone());
    assert!(unshared.is_none(), "it was shared until now");
    world.all[0].attempt();
    assert_eq!(world.all[0].freed.0.lock().unwrap().len(), 1, "nobody waits");
    assert!(!world.all[0].thread.parts.sharing.status(clock::now()).shared);
    let (_, unshared) = world.sign(0, device);
    assert!(unshared.is_some(), "its lease may go at once");
    world.revoke(0, serial);
    world.all[0].attempt();
    world.heal();
    world.check("there is room");
    assert!(world.all[0].thread.parts.sharing.status(clock::now()).shared);
}

/// What is announced meanwhile is read, and told, where it is in reach.
#[test]
fn a_part_that_is_away_keeps_nothing_else_from_being_shared() {
    let mut world = World::new(2, 8);
    world.heal();
    world.server.lock().unwrap().is_part_away = true;
    let signed: Vec<Serial> =
        (0..12).map(|n| world.sign(0, DeviceId::parse(&format!("d{n}")).unwrap()).0).collect();
    world.revoke(0, signed[0]);
    let device = DeviceId::parse("d1").unwrap();
    world.kill(1, device);
    for at in [0, 1, 0, 1] {
        world.all[at].attempt();
    }
    let keys = world.all[0].keys();
    let is_there = |name: &Name| world.server.lock().unwrap().reaches(&keys.place(name).key);
    let told: BTreeSet<Serial> =
        signed.iter().copied().filter(|s| is_there(&Name::Certificate(*s))).collect();
    assert!((1..12).contains(&told.len()), "some are away");
    assert_eq!(world.all[1].serials(), told);
    let freed = world.all[0].freed.0.lock().unwrap().len();
    assert_eq!(freed, 12, "nobody waits for what is away");
    assert!(!world.all[0].thread.parts.sharing.status(clock::now()).shared);
    world.heal();
    world.check("all of it is in reach");
    assert!(world.all[0].thread.parts.sharing.status(clock::now()).shared);
}

#[test]
fn a_server_that_fills_gets_revocations_and_later_the_rest() {
    let mut world = World::new(2, 3);
    let [d, e] = ["d", "e"].map(|name| DeviceId::parse(name).unwrap());
    let (serial, _) = world.sign(0, d);
    world.heal();
    world.server.lock().unwrap().is_filling = true;
    world.all[0].thread.progress.filling_ms = None;
    let (later, _) = world.sign(0, e);
    world.revoke(0, serial);
    world.heal();
    assert!(world.all[1].revocations().contains_key(&serial));
    assert!(!world.all[1].serials().contains(&later));
    let sharing = Arc::clone(&world.all[0].thread.parts.sharing);
    assert!(!sharing.status(clock::now()).shared, "a certificate is not");
    world.server.lock().unwrap().is_filling = false;
    world.all[0].thread.progress.filling_ms = None;
    // Nothing else is to be told.
    world.all[0].attempt();
    assert!(sharing.status(clock::now()).shared);
    let now = clock::now();
    world.all[0].thread.attempt(Now { mono_ms: now.mono_ms + 61_000, ..now });
    world.heal();
    world.check("there is room");
}

#[test]
fn what_ended_long_ago_leaves_the_server_with_its_revocation() {
    let mut world = World::new(1, 6);
    let signed = ["d", "e"].map(|name| world.sign(0, DeviceId::parse(name).unwrap()).0);
    world.revoke(0, signed[0]);
    world.heal();
    let instance = &mut world.all[0];
    let names = signed.map(Name::Certificate).into_iter().chain([Name::Revocation(signed[0])]);
    let places: Vec<Place> = names.map(|name| instance.keys().place(&name)).collect();
    let now = clock::now();
    for (days, stays) in [(90 + u64::from(KEEP_DAYS) - 1, true), (90 + u64::from(KEEP_DAYS), false)]
    {
        let ms = days * clock::DAY_S * 1000 + 1000;
        let later = Now { unix_ms: now.unix_ms + ms, mono_ms: now.mono_ms + ms };
        let publisher = &instance.thread.parts.publisher;
        let gone = publisher.ca().record().prune(publisher.ended_before(later)).unwrap();
        assert_eq!(gone.len(), if stays { 0 } else { 2 });
        instance.thread.attempt(later);
        let server = world.server.lock().unwrap();
        assert!(places.iter().all(|place| server.data.values.contains_key(place) == stays));
    }
    assert!(instance.record().is_empty());
}

/// A line that is cut again and again, and over which no more than a few values get through.
#[test]
fn a_comparison_over_a_bad_line_comes_to_an_end() {
    let mut world = World::new(2, 7);
    for n in 0..40 {
        let device = DeviceId::parse(&format!("d{n}")).unwrap();
        world.sign(0, device.clone());
        world.kill(0, device);
    }
    world.all[0].attempt();
    world.server.lock().unwrap().most_values = 4;
    for _ in 0..200 {
        world.all[1].cut_after(9);
        world.all[1].attempt();
    }
    assert!(world.all[1].thread.parts.sharing.status(clock::now()).shared);
    assert_eq!(world.all[1].serials(), world.all[0].serials());
    assert_eq!(world.all[1].rows(), world.all[0].rows());
}

#[test]
fn a_forged_value_changes_nothing_and_is_put_right() {
    let mut world = World::new(2, 4);
    let (serial, _) = world.sign(0, DeviceId::parse("d").unwrap());
    world.heal();
    let (keys, name) = (world.all[0].keys(), Name::Certificate(serial));
    for name in [name.clone(), Name::Revocation(serial)] {
        let mut server = world.server.lock().unwrap();
        server.data.values.insert(keys.place(&name), b"forged".to_vec());
        server.append(vec![name]);
    }
    world.heal();
    world.check("it is put right");
    let server = world.server.lock().unwrap();
    let value = keys.open(&name, &server.data.values[&keys.place(&name)]);
    assert!(matches!(value, Some(Value::Certificate(shared)) if shared.serial == serial));
    for instance in &world.all {
        let ignored = instance.thread.parts.sharing.status(clock::now()).ignored;
        assert!((2..10).contains(&ignored), "{ignored}");
    }
}
