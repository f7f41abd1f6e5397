//! Real sentinels, and what they watch: a master with two replicas.

use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::port::Port;
use super::redis::Redis;
use super::temp::TempDir;
use super::wait;

/// What the sentinels of a [`Trio`] call it.
pub const MASTER: &str = "fleet";
/// Sentinels that get too little processor time take a minute to agree.
const LIMIT: Duration = Duration::from_secs(90);

/// A running sentinel. `Drop` kills it, by its process id.
#[derive(Debug)]
pub struct Sentinel {
    child: Child,
    dir: TempDir,
    port: Port,
}

impl Sentinel {
    /// One that watches the server at this port, which it calls `name`, and believes in its death
    /// when so many sentinels see it.
    pub fn start(name: &str, port: u16, quorum: usize) -> Sentinel {
        let (dir, own) = (TempDir::new(), Port::any());
        let settings = format!(
            "port {}\nbind 127.0.0.1\ndir {}\nsentinel monitor {name} 127.0.0.1 {port} {quorum}\n\
             sentinel down-after-milliseconds {name} 600\nsentinel failover-timeout {name} 1000\n",
            own.number(),
            dir.path().display()
        );
        let file = dir.file("sentinel.conf", &settings);
        let log = File::create(dir.path().join("sentinel.log")).unwrap();
        let child = Command::new("redis-server")
            .arg(file)
            .arg("--sentinel")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let sentinel = Sentinel { child, dir, port: own };
        wait::for_true("the sentinel answers", || sentinel.cli(&["PING"]) == "PONG");
        sentinel
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// As the service is told of it.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port())
    }

    /// Runs one command through `redis-cli`.
    pub fn cli(&self, args: &[&str]) -> String {
        let port = self.port().to_string();
        let output = Command::new("redis-cli").args(["-p", &port]).args(args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// The port of the master, by what it says.
    pub fn master(&self, name: &str) -> Option<u16> {
        let address = self.cli(&["SENTINEL", "get-master-addr-by-name", name]);
        address.lines().nth(1)?.parse().ok()
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Three servers, one of them the master, and three sentinels.
#[derive(Debug)]
pub struct Trio {
    pub servers: Vec<Redis>,
    pub sentinels: Vec<Sentinel>,
}

impl Trio {
    /// Starts them, and waits until all know each other.
    #[track_caller]
    pub fn start() -> Trio {
        // Without this a replica waits five seconds for others that may come.
        let soon = ["--repl-diskless-sync-delay", "0"];
        let master = Redis::start(&soon);
        let port = master.port().to_string();
        let of_master = ["--replicaof", "127.0.0.1", &port];
        let replica = || Redis::start(&[&soon[..], &of_master].concat());
        let servers = vec![master, replica(), replica()];
        let sentinels = (0..3).map(|_| Sentinel::start(MASTER, servers[0].port(), 2)).collect();
        let trio = Trio { servers, sentinels };
        trio.wait_until_whole();
        trio
    }

    /// What the service is to be told.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        let addresses: Vec<String> = self.sentinels.iter().map(Sentinel::address).collect();
        let name = MASTER.to_owned();
        vec![("REDIS_SENTINELS", addresses.join(",")), ("REDIS_SENTINEL_MASTER", name)]
    }

    /// The master, by what all sentinels say.
    #[track_caller]
    pub fn master(&self) -> usize {
        let agreed = wait::until(LIMIT, || {
            let first = self.sentinels[0].master(MASTER);
            let all = self.sentinels.iter().all(|sentinel| sentinel.master(MASTER) == first);
            self.servers.iter().position(|server| all && Some(server.port()) == first)
        });
        agreed.expect("the sentinels do not agree")
    }

    /// Waits until every sentinel sees two others and two replicas that are in step.
    #[track_caller]
    pub fn wait_until_whole(&self) {
        let whole = wait::until(LIMIT, || {
            let is_whole = |sentinel: &Sentinel| {
                let others = sentinel.cli(&["SENTINEL", "sentinels", MASTER]);
                let replicas = sentinel.cli(&["SENTINEL", "replicas", MASTER]);
                let in_step = replicas.matches("master-link-status\nok").count() == 2;
                let alive = ["s_down", "o_down", "disconnected"]
                    .iter()
                    .all(|bad| !others.contains(bad) && !replicas.contains(bad));
                in_step && alive && others.matches("runid\n").count() == 2
            };
            self.sentinels.iter().all(is_whole).then_some(())
        });
        assert!(whole.is_some(), "{}", self.sentinels[0].cli(&["SENTINEL", "replicas", MASTER]));
    }

    /// Kills the master, and waits until the sentinels have made another. Returns the dead one.
    #[track_caller]
    pub fn kill_master(&mut self) -> usize {
        let dead = self.master();
        self.servers[dead].kill9();
        wait::until(LIMIT, || (self.master() != dead).then_some(())).expect("no other master");
        dead
    }

    /// Starts a dead server again, as a replica, and waits until both replicas are in step.
    #[track_caller]
    pub fn revive(&mut self, dead: usize) {
        self.servers[dead].start_again();
        let mut told = None;
        let in_step = wait::until(LIMIT, || {
            // On a busy machine the sentinels may have made yet another one meanwhile.
            let master = self.master();
            let port = self.servers[master].port().to_string();
            let replicas = || (0..self.servers.len()).filter(|at| *at != master);
            if told.replace(master) != Some(master) {
                // The sentinels would come to it, in ten seconds or more.
                for at in replicas() {
                    self.servers[at].try_cli(&["REPLICAOF", "127.0.0.1", &port]);
                }
            }
            let said = |at: usize| self.servers[at].cli(&["INFO", "replication"]);
            let follows = [format!("master_port:{port}"), "master_link_status:up".to_owned()];
            let in_step = |at| follows.iter().all(|word| said(at).contains(word));
            replicas().all(in_step).then_some(())
        });
        in_step.expect("the replicas do not follow");
    }
}
