//! A real Redis Cluster: three masters with a replica each.

use std::process::Stdio;
use std::time::Duration;

use super::port::Port;
use super::redis::{PASSWORD, Redis, USER, make_tls_files};
use super::temp::TempDir;
use super::wait;

/// Nodes that get too little processor time take a while to agree.
const LIMIT: Duration = Duration::from_secs(60);

/// Six servers. The first three begin as masters.
#[derive(Debug)]
pub struct Cluster {
    pub servers: Vec<Redis>,
    /// Of the ports by which nodes speak with each other.
    bus: Vec<Port>,
    /// What they need for TLS.
    files: Option<TempDir>,
}

impl Cluster {
    /// Starts them, and waits until all know each other.
    #[track_caller]
    pub fn start() -> Cluster {
        Cluster::with(&[])
    }

    /// One whose nodes have these settings, too.
    #[track_caller]
    pub fn with(settings: &[&str]) -> Cluster {
        Cluster::of(1, settings)
    }

    /// One whose masters have so many replicas each.
    #[track_caller]
    pub fn of(replicas: usize, settings: &[&str]) -> Cluster {
        Cluster::build(replicas, settings, None)
    }

    /// One over TLS, which wants to see certificates, for a user of least rights.
    #[track_caller]
    pub fn secured() -> Cluster {
        let files = TempDir::new();
        make_tls_files(&files);
        Cluster::build(1, &[], Some(files))
    }

    #[track_caller]
    fn build(replicas: usize, settings: &[&str], files: Option<TempDir>) -> Cluster {
        let mut cluster = Cluster { servers: vec![], bus: vec![], files };
        (0..3 * (1 + replicas)).for_each(|_| cluster.add_server(settings));
        let addresses: Vec<String> = cluster.servers.iter().map(address).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        let replicas = replicas.to_string();
        let how = ["--cluster-replicas", &replicas, "--cluster-yes"];
        cluster.manage(&[&["create"], &addresses[..], &how].concat()).unwrap();
        cluster.wait_until_whole();
        cluster
    }

    /// Runs `redis-cli --cluster`; what it says, if it fails.
    fn manage(&self, args: &[&str]) -> Result<(), String> {
        let mut command = self.any().cli_command();
        let output = command.arg("--cluster").args(args).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    }

    /// One more, which knows nobody yet.
    pub fn add_server(&mut self, settings: &[&str]) {
        let bus = Port::any();
        let number = bus.number().to_string();
        let own = [
            ["--cluster-enabled", "yes"],
            ["--cluster-port", &number],
            ["--cluster-node-timeout", "600"],
            // A replica is promoted however long it was cut off.
            ["--cluster-replica-validity-factor", "0"],
            ["--repl-diskless-sync-delay", "0"],
        ];
        let args = [&own.concat()[..], settings].concat();
        self.servers.push(match &self.files {
            Some(files) => Redis::secured(&args, files),
            None => Redis::start(&args),
        });
        self.bus.push(bus);
    }

    /// Adds a master without slots.
    #[track_caller]
    pub fn add_master(&mut self) {
        self.add_server(&[]);
        let new = self.servers.len() - 1;
        let port = self.servers[0].port().to_string();
        let bus = self.bus[0].number().to_string();
        let meet = ["CLUSTER", "MEET", "127.0.0.1", &port, &bus];
        assert_eq!(self.servers[new].cli(&meet), "OK");
        let id = self.id(new);
        wait::for_true("all know it", || {
            self.servers.iter().all(|server| server.cli(&["CLUSTER", "NODES"]).contains(&id))
        });
        self.wait_until_whole();
    }

    /// Moves slots with their keys from one master to another, as an operator does.
    #[track_caller]
    pub fn reshard(&self, from: usize, to: usize, slots: usize) {
        let at = address(self.any());
        wait::for_true("the nodes agree", || self.manage(&["check", &at]).is_ok());
        let (from, to, slots) = (self.id(from), self.id(to), slots.to_string());
        let which = ["--cluster-from", &from, "--cluster-to", &to, "--cluster-slots", &slots];
        self.manage(&[&["reshard", &*at], &which[..], &["--cluster-yes"]].concat()).unwrap();
    }

    /// What the service is to be told: some of the nodes.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        let mut env = vec![("REDIS_CLUSTER", "true".to_owned())];
        let Some(files) = &self.files else {
            env.push(("REDIS_URL", self.url()));
            return env;
        };
        let file = |name: &str| files.path().join(name).display().to_string();
        env.extend([
            ("REDIS_HOST", self.seeds()),
            ("REDIS_USERNAME", USER.to_owned()),
            ("REDIS_PASSWORD", PASSWORD.to_owned()),
            ("REDIS_TLS", "true".to_owned()),
            ("REDIS_TLS_CA", file("ca.crt")),
            ("REDIS_TLS_CERT", file("server.crt")),
            ("REDIS_TLS_KEY", file("server.key")),
        ]);
        env
    }

    /// The first two nodes; the others are learnt.
    fn seeds(&self) -> String {
        let seeds: Vec<String> = self.servers.iter().take(2).map(address).collect();
        seeds.join(",")
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.seeds())
    }

    /// A server that runs.
    fn any(&self) -> &Redis {
        self.servers.iter().find(|server| server.is_running()).expect("a server that runs")
    }

    /// The id that its nodes know a server by.
    pub fn id(&self, server: usize) -> String {
        self.servers[server].cli(&["CLUSTER", "MYID"])
    }

    /// Runs a command on the master that has its key, its second word.
    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> String {
        self.servers[self.master_of(args[1])].cli(args)
    }

    /// All keys of all masters, sorted.
    pub fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> =
            self.masters().into_iter().flat_map(|master| self.servers[master].keys()).collect();
        keys.sort();
        keys
    }

    /// The master that has this key.
    #[track_caller]
    pub fn master_of(&self, key: &str) -> usize {
        let slot = self.slot_of(key);
        let found = wait::until(LIMIT, || {
            let nodes = self.any().cli(&["CLUSTER", "NODES"]);
            let has = |range: &str| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let bounds = first.parse::<u16>().ok().zip(last.parse::<u16>().ok());
                bounds.is_some_and(|(first, last)| (first..=last).contains(&slot))
            };
            let line = nodes.lines().find(|line| line.split(' ').skip(8).any(has))?;
            self.servers.iter().position(|server| line.contains(&format!(":{}@", server.port())))
        });
        found.unwrap_or_else(|| panic!("no node has slot {slot}"))
    }

    pub fn slot_of(&self, key: &str) -> u16 {
        self.any().cli(&["CLUSTER", "KEYSLOT", key]).parse().unwrap()
    }

    /// The masters, by what a node says that runs.
    pub fn masters(&self) -> Vec<usize> {
        let nodes = self.any().cli(&["CLUSTER", "NODES"]);
        let is_master = |server: &Redis| {
            let at = format!(":{}@", server.port());
            let line = nodes.lines().find(|line| line.contains(&at)).unwrap_or_default();
            let flags = line.split(' ').nth(2).unwrap_or_default();
            flags.contains("master") && !flags.contains("fail")
        };
        (0..self.servers.len()).filter(|at| is_master(&self.servers[*at])).collect()
    }

    /// A server that follows this master.
    pub fn replica_of(&self, master: usize) -> usize {
        let id = self.id(master);
        let follows = |server: &Redis| {
            let nodes = server.cli(&["CLUSTER", "NODES"]);
            nodes.lines().any(|line| line.contains("myself,slave") && line.contains(&id))
        };
        self.servers.iter().position(follows).expect("a replica")
    }

    /// Waits until every node that runs takes the cluster for whole, and each replica follows.
    #[track_caller]
    pub fn wait_until_whole(&self) {
        let is_whole = |server: &Redis| {
            let info = server.cli(&["CLUSTER", "INFO"]);
            let replication = server.cli(&["INFO", "replication"]);
            info.contains("cluster_state:ok")
                && (replication.contains("role:master")
                    || replication.contains("master_link_status:up"))
        };
        let running = || self.servers.iter().filter(|server| server.is_running());
        let whole = wait::until(LIMIT, || running().all(is_whole).then_some(()));
        assert!(whole.is_some(), "{}", self.any().cli(&["CLUSTER", "NODES"]));
    }

    /// Kills a master, and waits until its replica has taken its place.
    #[track_caller]
    pub fn kill(&mut self, master: usize) {
        self.servers[master].kill9();
        let replaced = wait::until(LIMIT, || {
            let masters = self.masters();
            (masters.len() == 3 && !masters.contains(&master)).then_some(())
        });
        assert!(replaced.is_some(), "{}", self.any().cli(&["CLUSTER", "NODES"]));
        self.wait_until_whole();
    }

    /// Starts a dead server again, and waits until it follows whoever has its place.
    #[track_caller]
    pub fn revive(&mut self, dead: usize) {
        self.servers[dead].start_again();
        self.wait_until_whole();
    }

    /// Makes a slot move from its master to another, key by key; `meanwhile` is told when half of it
    /// has moved.
    #[track_caller]
    pub fn move_slot(&self, slot: u16, to: usize, meanwhile: impl FnOnce()) {
        let from = self.master_of_slot(slot);
        let (slot, ids) = (slot.to_string(), [self.id(from), self.id(to)]);
        let set = |server: usize, how: &[&str]| {
            let args = [&["CLUSTER", "SETSLOT", &*slot], how].concat();
            assert_eq!(self.servers[server].cli(&args), "OK");
        };
        set(to, &["IMPORTING", &ids[0]]);
        set(from, &["MIGRATING", &ids[1]]);
        let keys = |most: &str| self.servers[from].cli(&["CLUSTER", "GETKEYSINSLOT", &*slot, most]);
        let move_keys = |keys: String| {
            let port = self.servers[to].port().to_string();
            for key in keys.lines().filter(|key| !key.is_empty()) {
                let moved =
                    self.servers[from].cli(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]);
                assert!(["OK", "NOKEY"].contains(&&*moved), "{moved}");
            }
        };
        let half = keys("10000").lines().count() / 2;
        move_keys(keys(&half.max(1).to_string()));
        meanwhile();
        loop {
            let rest = keys("100");
            if rest.is_empty() {
                break;
            }
            move_keys(rest);
        }
        for server in [to, from] {
            set(server, &["NODE", &ids[1]]);
        }
    }

    fn master_of_slot(&self, slot: u16) -> usize {
        let key = (0..).map(|n: u32| n.to_string()).find(|key| slot_of(key) == slot).unwrap();
        self.master_of(&key)
    }
}

fn address(server: &Redis) -> String {
    format!("127.0.0.1:{}", server.port())
}

/// The slot of a key without a hash tag.
pub fn slot_of(key: &str) -> u16 {
    let shift = |crc: u16| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 };
    let step = |crc: u16, byte: u8| (0..8).fold(crc ^ u16::from(byte) << 8, |crc, _| shift(crc));
    key.bytes().fold(0, step) % 16_384
}
