//! Redis as people run it: the engines that are all to behave alike. A test that is to hold on each takes
//! one as its parameter.

use super::cluster::Cluster;
use super::redis::{Redis, Way};
use super::sentinel::Trio;

/// A kind of Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A server, and how it is reached.
    One(Way),
    /// A master with two replicas, watched by three sentinels.
    Sentinels,
    /// Three masters with a replica each.
    Cluster,
    /// The same over TLS with a demanded client certificate, for a user of least rights.
    SecuredCluster,
}

impl Engine {
    pub const ALL: [Engine; 6] = [
        Engine::One(Way::Tcp),
        Engine::One(Way::Socket),
        Engine::One(Way::MutualTls),
        Engine::Sentinels,
        Engine::Cluster,
        Engine::SecuredCluster,
    ];

    /// All of them if `TEST_ENGINES=all` asks for it (`scripts/engines.sh`), which takes minutes; else
    /// a single server.
    pub fn asked_for() -> &'static [Engine] {
        let all = std::env::var("TEST_ENGINES").is_ok_and(|engines| engines == "all");
        if all { &Engine::ALL } else { &[Engine::One(Way::Tcp)] }
    }

    #[track_caller]
    pub fn start(self) -> Servers {
        match self {
            Engine::One(way) => Servers::One(Box::new(Redis::by(way))),
            Engine::Sentinels => Servers::Sentinels(Trio::start()),
            Engine::Cluster => Servers::Cluster(Cluster::start()),
            Engine::SecuredCluster => Servers::Cluster(Cluster::secured()),
        }
    }
}

/// A running Redis of one kind.
#[derive(Debug)]
pub enum Servers {
    One(Box<Redis>),
    Sentinels(Trio),
    Cluster(Cluster),
}

impl Servers {
    /// What the service is to be told.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        match self {
            Servers::One(redis) => redis.env(),
            Servers::Sentinels(trio) => trio.env(),
            Servers::Cluster(cluster) => cluster.env(),
        }
    }

    /// Kills a master, of a cluster each time another one, and waits until another server has its
    /// place, where there is one. Returns the dead one.
    #[track_caller]
    pub fn kill(&mut self, round: usize) -> usize {
        match self {
            Servers::One(redis) => {
                redis.kill9();
                0
            }
            Servers::Sentinels(trio) => trio.kill_master(),
            Servers::Cluster(cluster) => {
                let masters = cluster.masters();
                let dead = masters[round % masters.len()];
                cluster.kill(dead);
                dead
            }
        }
    }

    #[track_caller]
    pub fn revive(&mut self, dead: usize) {
        match self {
            Servers::One(redis) => redis.start_again(),
            Servers::Sentinels(trio) => trio.revive(dead),
            Servers::Cluster(cluster) => cluster.revive(dead),
        }
    }
}
