//! Three instances, each behind a proxy and with a clock of its own, on one Redis; and what is done to
//! them.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tools::Failure;

use crate::support::clock::{FakeClock, now_s};
use crate::support::port::Port;
use crate::support::proxy::{Mode, Proxy};
use crate::support::random::Xorshift;
use crate::support::temp::TempDir;

pub const INSTANCES: usize = 3;
pub const KEY: &str = "key-of-the-chaos-0001";
/// Longer than a run, and than any jump of a clock: no token ends.
const LIFETIME_S: &str = "7200";
const JUMP_S: u64 = 600;

/// What was done, to an instance or to Redis, and from when to when.
#[derive(Clone, Debug)]
pub struct Disturbance {
    pub what: Kind,
    /// None: Redis.
    pub instance: Option<usize>,
    pub from: Duration,
    pub to: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `kill -9`, and a start some time later.
    Killed,
    /// Killed, and started under a clock that is wrong.
    KilledAndClock,
    /// SIGSTOP, SIGCONT.
    Stopped,
    /// Connections to Redis are refused.
    Cut,
    /// Nothing goes through.
    Blackhole,
    /// Commands reach Redis, its replies are lost.
    Swallowed,
    /// Commands arrive when it is over.
    Late,
    /// Connections are reset, once.
    Reset,
    /// The clock is ten minutes ahead.
    Ahead,
    /// The clock is ten minutes behind.
    Behind,
    RedisStopped,
    /// Killed, and started with the data of the moment before.
    RedisKilled,
    /// Started empty.
    RedisEmptied,
    /// Started from a file that is some time old.
    RedisOlder,
}

impl Kind {
    /// As often as it stands here.
    pub const MIX: [Kind; 20] = [
        Kind::Killed,
        Kind::Killed,
        Kind::KilledAndClock,
        Kind::Stopped,
        Kind::Stopped,
        Kind::Cut,
        Kind::Cut,
        Kind::Cut,
        Kind::Blackhole,
        Kind::Swallowed,
        Kind::Swallowed,
        Kind::Late,
        Kind::Late,
        Kind::Reset,
        Kind::Ahead,
        Kind::Behind,
        Kind::RedisStopped,
        Kind::RedisKilled,
        Kind::RedisEmptied,
        Kind::RedisOlder,
    ];

    pub fn is_of_redis(self) -> bool {
        self >= Kind::RedisStopped
    }

    /// Redis may lack afterwards what it had confirmed.
    pub fn forgets(self) -> bool {
        self > Kind::RedisStopped
    }

    pub fn is_of_clock(self) -> bool {
        matches!(self, Kind::Ahead | Kind::Behind | Kind::KilledAndClock)
    }
}

pub struct Stage {
    begin: Instant,
    redis: Redis,
    instances: Vec<Instance>,
    random: Xorshift,
    pub disturbances: Vec<Disturbance>,
}

impl Stage {
    pub fn set(program: &str, seed: u64, begin: Instant) -> Result<Self, Failure> {
        let redis = Redis::start()?;
        let mut instances: Vec<Instance> = vec![];
        for _ in 0..INSTANCES {
            let instance = Instance::new(program, &redis);
            if let Some(first) = instances.first() {
                fs::create_dir_all(instance.dir.path().join("ca"))?;
                for file in ["ca/root-ca.crt", "ca/root-ca.key"] {
                    fs::copy(first.dir.path().join(file), instance.dir.path().join(file))?;
                }
            }
            instances.push(instance.started()?);
        }
        Ok(Stage { begin, redis, instances, random: Xorshift(seed), disturbances: vec![] })
    }

    pub fn ports(&self) -> Vec<u16> {
        self.instances.iter().map(|instance| instance.port.number()).collect()
    }

    pub fn folders(&self) -> impl Iterator<Item = &Path> {
        self.instances.iter().map(|instance| instance.dir.path())
    }

    /// One disturbance, now and then two, and a time of peace.
    pub fn disturb(&mut self) -> Result<(), Failure> {
        let count = 1 + usize::from(self.random.below(3) == 0);
        let first = self.random.below(INSTANCES);
        let kinds: Vec<Kind> = (0..count).map(|_| Kind::MIX[self.random.below(20)]).collect();
        if kinds.iter().filter(|kind| kind.is_of_redis()).count() > 1 {
            return Ok(());
        }
        let mut under_way = vec![];
        for (n, kind) in kinds.into_iter().enumerate() {
            let instance = (first + n) % INSTANCES;
            let from = self.begin.elapsed();
            self.begin_one(kind, instance)?;
            under_way.push((kind, instance, from));
        }
        self.wait(500, 6000);
        for (what, at, from) in under_way {
            self.end_one(what, at)?;
            let instance = (!what.is_of_redis()).then_some(at);
            let to = self.begin.elapsed();
            self.disturbances.push(Disturbance { what, instance, from, to });
        }
        self.wait(500, 4000);
        if self.random.below(4) == 0 {
            self.redis.keep_a_copy();
        }
        Ok(())
    }

    fn wait(&mut self, least_ms: u64, most_ms: usize) {
        let more = self.random.below(most_ms) as u64;
        thread::sleep(Duration::from_millis(least_ms + more));
    }

    fn begin_one(&mut self, kind: Kind, at: usize) -> Result<(), Failure> {
        let instance = &mut self.instances[at];
        match kind {
            Kind::Killed => instance.process.end(),
            Kind::KilledAndClock => {
                instance.process.end();
                instance.clock.set(now_s() + JUMP_S);
                instance.start()?;
            }
            Kind::Stopped => instance.process.signal(Signal::STOP)?,
            Kind::Cut => instance.proxy.set(Mode::Refuse),
            Kind::Blackhole => instance.proxy.set(Mode::Blackhole),
            Kind::Swallowed => instance.proxy.set(Mode::SwallowReplies),
            Kind::Late => instance.proxy.set(Mode::HoldCommands),
            Kind::Reset => instance.proxy.reset(),
            Kind::Ahead => instance.clock.set(now_s() + JUMP_S),
            Kind::Behind => instance.clock.set(now_s() - JUMP_S),
            Kind::RedisStopped => self.redis.process.signal(Signal::STOP)?,
            Kind::RedisKilled => {
                self.redis.save();
                self.redis.process.end();
            }
            Kind::RedisEmptied | Kind::RedisOlder => self.redis.process.end(),
        }
        Ok(())
    }

    fn end_one(&mut self, kind: Kind, at: usize) -> Result<(), Failure> {
        let instance = &mut self.instances[at];
        match kind {
            Kind::Killed => instance.start()?,
            Kind::KilledAndClock | Kind::Ahead | Kind::Behind => instance.clock.set_right(),
            Kind::Stopped => instance.process.signal(Signal::CONT)?,
            Kind::Cut | Kind::Blackhole | Kind::Swallowed | Kind::Late | Kind::Reset => {
                instance.proxy.set(Mode::Pass);
            }
            Kind::RedisStopped => self.redis.process.signal(Signal::CONT)?,
            Kind::RedisKilled => self.redis.start_again()?,
            Kind::RedisEmptied => {
                self.redis.forget();
                self.redis.start_again()?;
            }
            Kind::RedisOlder => {
                self.redis.take_the_copy();
                self.redis.start_again()?;
            }
        }
        Ok(())
    }

    /// The log of each instance.
    pub fn logs(&self) -> impl Iterator<Item = String> {
        self.folders().map(|folder| fs::read_to_string(folder.join("log")).unwrap_or_default())
    }
}

/// A process that is killed when this is dropped.
struct Process(Option<Child>);

impl Process {
    fn signal(&self, signal: Signal) -> Result<(), Failure> {
        let child = self.0.as_ref().ok_or("no process")?;
        Ok(kill_process(Pid::from_child(child), signal)?)
    }

    fn end(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

struct Instance {
    program: String,
    process: Process,
    port: Port,
    proxy: Proxy,
    clock: FakeClock,
    dir: TempDir,
}

impl Instance {
    fn new(program: &str, redis: &Redis) -> Self {
        Instance {
            program: program.to_owned(),
            process: Process(None),
            port: Port::any(),
            proxy: Proxy::start(redis.port.number()),
            clock: FakeClock::at(now_s()),
            dir: TempDir::new(),
        }
    }

    fn started(mut self) -> Result<Self, Failure> {
        self.clock.set_right();
        self.start()?;
        Ok(self)
    }

    /// Starts it and waits until it answers.
    fn start(&mut self) -> Result<(), Failure> {
        let port = self.port.number();
        let log =
            fs::File::options().create(true).append(true).open(self.dir.path().join("log"))?;
        let child = Command::new(&self.program)
            .env_clear()
            .envs(self.clock.env())
            .env("HTTP_HOST", "127.0.0.1")
            .env("PORT", port.to_string())
            .env("DATA_DIR", self.dir.path())
            .env("REDIS_URL", self.proxy.url())
            .env("JWT_SECRET", "a-secret-of-the-chaos-of-32-bytes")
            .env("ONBOARDING_API_KEY", KEY)
            .env("ADMIN_API_KEY", KEY)
            .env("REENROLL", "allow")
            .env("OUTAGE_REDEEM", "none")
            .env("REDIS_TIMEOUT_MS", "500")
            .env("REDIS_CONNECT_TIMEOUT_MS", "1000")
            .env("PROVISIONING_TOKEN_TTL", LIFETIME_S)
            .env("TRUSTED_PROXIES", "127.0.0.1")
            .env("RUST_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.process = Process(Some(child));
        let answers = || crate::ask(port, &tools::http::get("/health", "")).is_ok();
        await_true("an instance answers", answers)
    }
}

struct Redis {
    process: Process,
    port: Port,
    dir: TempDir,
}

impl Redis {
    fn start() -> Result<Self, Failure> {
        let mut redis = Redis { process: Process(None), port: Port::any(), dir: TempDir::new() };
        redis.start_again()?;
        redis.keep_a_copy();
        Ok(redis)
    }

    fn start_again(&mut self) -> Result<(), Failure> {
        let port = self.port.number().to_string();
        let child = Command::new("redis-server")
            .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .arg("--dir")
            .arg(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        self.process = Process(Some(child));
        await_true("Redis answers", || self.cli("PING") == "PONG\n")
    }

    fn cli(&self, word: &str) -> String {
        let port = self.port.number().to_string();
        let output = Command::new("redis-cli").args(["-p", &port, word]).output();
        output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
    }

    fn save(&self) {
        let _ = self.cli("SAVE");
    }

    /// From which it may be started later.
    fn keep_a_copy(&self) {
        self.save();
        let _ = fs::copy(self.dir.path().join("dump.rdb"), self.dir.path().join("older"));
    }

    fn take_the_copy(&self) {
        let _ = fs::copy(self.dir.path().join("older"), self.dir.path().join("dump.rdb"));
    }

    fn forget(&self) {
        let _ = fs::remove_file(self.dir.path().join("dump.rdb"));
    }
}

fn await_true(what: &str, mut holds: impl FnMut() -> bool) -> Result<(), Failure> {
    for _ in 0..400 {
        if holds() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Err(format!("waited in vain until {what}").into())
}
