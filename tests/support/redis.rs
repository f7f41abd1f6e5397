//! A real `redis-server` as a child process, in a folder and on a port of its own.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use super::csr::{new_key, openssl};
use super::port::Port;
use super::service::send_signal;
use super::temp::TempDir;
use super::wait;

/// The user that the page names.
pub const USER: &str = "mqtt-lite";
pub const PASSWORD: &str = "PASSWORD";

/// The ways to a server that are all to behave alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Tcp,
    /// A Unix socket.
    Socket,
    /// TLS, where the server wants to see a certificate of ours.
    MutualTls,
}

/// A running Redis. `Drop` kills it, by its process id, and removes its folder.
#[derive(Debug)]
pub struct Redis {
    child: Option<Child>,
    dir: TempDir,
    args: Vec<String>,
    /// How `redis-cli` gets in.
    cli_args: Vec<String>,
    password: Option<String>,
    port: Port,
    tls: bool,
    /// How the service gets in.
    way: Way,
}

impl Redis {
    /// Starts a Redis that keeps nothing on disk unless `args` (`--appendonly yes`) say so, and
    /// waits until it answers.
    #[track_caller]
    pub fn start(args: &[&str]) -> Redis {
        Redis::build(args, |_| {})
    }

    /// One that is reached in this way; see [`Redis::env`].
    #[track_caller]
    pub fn by(way: Way) -> Redis {
        let mut redis = match way {
            Way::Tcp | Way::Socket => Redis::start(&[]),
            Way::MutualTls => Redis::with_tls(),
        };
        redis.way = way;
        match way {
            Way::Tcp => {}
            Way::Socket => redis.args.extend(["--unixsocket".to_owned(), redis.file("redis.sock")]),
            Way::MutualTls => redis.demand_certificates(&redis.file("")),
        }
        redis.restart(false);
        redis
    }

    /// A node of a cluster over TLS, with files that others have, too. It wants to see a certificate, and
    /// has a user who may do no more than `docs/redis.md` says.
    #[track_caller]
    pub fn secured(args: &[&str], files: &TempDir) -> Redis {
        let own = ["--tls-cluster", "yes", "--tls-replication", "yes", "--masterauth", "root"];
        Redis::build(&[args, &own].concat(), |redis| {
            let files = files.path().join("").display().to_string();
            redis.speak_tls(&files);
            redis.demand_certificates(&files);
            redis.allow(USER, PASSWORD, &format!("{} +cluster|slots +asking", rights().join(" ")));
        })
    }

    /// What the service is to be told, to reach it in its way.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        let url = |way: Way| match way {
            Way::Socket => format!("unix://{}", self.file("redis.sock")),
            Way::Tcp | Way::MutualTls => self.url(),
        };
        let mut env = vec![("REDIS_URL", url(self.way))];
        if self.way == Way::MutualTls {
            env.push(("REDIS_TLS_CA", self.tls_ca()));
            env.push(("REDIS_TLS_CERT", self.file("server.crt")));
            env.push(("REDIS_TLS_KEY", self.file("server.key")));
        }
        env
    }

    /// The path of a file in its folder.
    pub fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// One that wants this password (of the user `default`).
    #[track_caller]
    pub fn with_password(password: &str) -> Redis {
        Redis::build(&["--requirepass", password], |redis| {
            redis.password = Some(password.to_owned())
        })
    }

    /// One with this user (`device ~mqtt-lite:* +@all` …, the rules after the password), beside
    /// `default`, who may do all from `redis-cli` with the password `root`.
    #[track_caller]
    pub fn with_acl(user: &str, password: &str, rules: &str) -> Redis {
        Redis::build(&[], |redis| redis.allow(user, password, rules))
    }

    fn allow(&mut self, user: &str, password: &str, rules: &str) {
        let acl =
            format!("user default on >root ~* &* +@all\nuser {user} on >{password} {rules}\n");
        let file = self.dir.file("users.acl", &acl);
        self.args.extend(["--aclfile".to_owned(), file.display().to_string()]);
        self.password = Some("root".to_owned());
    }

    /// One that speaks TLS only, with a certificate for 127.0.0.1 and localhost from a CA of its own
    /// ([`Redis::tls_ca`]).
    #[track_caller]
    pub fn with_tls() -> Redis {
        Redis::build(&[], |redis| {
            make_tls_files(&redis.dir);
            redis.speak_tls(&redis.file(""));
        })
    }

    /// By the files in this folder.
    fn speak_tls(&mut self, folder: &str) {
        self.tls = true;
        for (name, value) in [
            ("--tls-cert-file", format!("{folder}server.crt")),
            ("--tls-key-file", format!("{folder}server.key")),
            ("--tls-ca-cert-file", format!("{folder}ca.crt")),
            ("--tls-auth-clients", "no".to_owned()),
        ] {
            self.args.extend([name.to_owned(), value]);
        }
        self.cli_args = vec!["--tls".to_owned(), "--cacert".to_owned(), format!("{folder}ca.crt")];
    }

    fn demand_certificates(&mut self, folder: &str) {
        for (name, file) in [("--cert", "server.crt"), ("--key", "server.key")] {
            self.cli_args.extend([name.to_owned(), format!("{folder}{file}")]);
        }
        self.args.extend(["--tls-auth-clients".to_owned(), "yes".to_owned()]);
    }

    #[track_caller]
    fn build(args: &[&str], change: impl FnOnce(&mut Redis)) -> Redis {
        let mut redis = Redis {
            child: None,
            dir: TempDir::new(),
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            cli_args: vec![],
            password: None,
            port: Port::any(),
            tls: false,
            way: Way::Tcp,
        };
        change(&mut redis);
        redis.start_again();
        redis
    }

    /// Starts it after an end, on the same port, from the snapshot in its folder, if there is one.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.launch();
        let up = wait::until(Duration::from_secs(20), || {
            (self.try_cli(&["PING"]) == "PONG").then_some(())
        });
        assert!(up.is_some(), "Redis does not start:\n{}", self.log());
    }

    /// The same, without waiting for it.
    pub fn launch(&mut self) {
        let log = self.dir.path().join("redis.log");
        let log = OpenOptions::new().create(true).append(true).open(log).unwrap();
        let (plain, tls) = if self.tls { (0, self.port()) } else { (self.port(), 0) };
        let (plain, tls) = (plain.to_string(), tls.to_string());
        let folder = self.dir.path().to_str().unwrap();
        let mut command = Command::new("redis-server");
        command.args(["--port", &plain, "--bind", "127.0.0.1", "--dir", folder, "--save", ""]);
        if self.tls {
            command.args(["--tls-port", &tls]);
        }
        command.args(["--appendonly", "no", "--daemonize", "no"]).args(&self.args);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap_or_else(|e| {
            panic!("redis-server is not installed (scripts/test.sh installs it): {e}");
        }));
    }

    /// Ends it (SIGKILL) and starts it again on the same port: with the data of this moment, or
    /// empty.
    #[track_caller]
    pub fn restart(&mut self, keep_data: bool) {
        if keep_data {
            self.save();
        }
        self.kill9();
        if !keep_data {
            self.forget();
        }
        self.start_again();
    }

    /// Writes a snapshot; [`Redis::start_again`] will start from it.
    #[track_caller]
    pub fn save(&self) {
        assert_eq!(self.cli(&["SAVE"]), "OK");
    }

    /// Removes what it has on disk.
    pub fn forget(&self) {
        let _ = fs::remove_file(self.dir.path().join("dump.rdb"));
        let _ = fs::remove_dir_all(self.dir.path().join("appendonlydir"));
    }

    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// SIGKILL, and waits for the end.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGSTOP: it accepts connections (the kernel does) and never answers. SIGCONT by dropping.
    #[must_use]
    pub fn stop(&self) -> Stopped {
        let pid = self.child.as_ref().unwrap().id();
        send_signal(pid, "STOP");
        Stopped { pid }
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// `redis://` (or `rediss://`) and 127.0.0.1, with the password if it has one.
    pub fn url(&self) -> String {
        let scheme = if self.tls { "rediss" } else { "redis" };
        let password = self.password.as_ref().map(|p| format!(":{p}@")).unwrap_or_default();
        format!("{scheme}://{password}127.0.0.1:{}", self.port())
    }

    /// The CA of its TLS certificate, PEM file.
    pub fn tls_ca(&self) -> String {
        self.file("ca.crt")
    }

    /// Runs one command through `redis-cli` and gives its answer, raw; an error reply fails.
    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> String {
        let answer = self.try_cli(args);
        let error =
            ["ERR ", "WRONGTYPE", "NOAUTH", "NOPERM", "OOM ", "READONLY", "Could not connect"]
                .iter()
                .any(|e| answer.starts_with(e));
        assert!(!error, "redis-cli {args:?}: {answer}");
        answer
    }

    /// As [`Redis::cli`]; errors are given as they are shown.
    pub fn try_cli(&self, args: &[&str]) -> String {
        let output = self.cli_command().args(args).output().unwrap();
        let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        String::from_utf8_lossy(&text).trim_end_matches('\n').to_owned()
    }

    /// Streams commands in the protocol's own form (see [`resp`]) through `redis-cli --pipe`.
    #[track_caller]
    pub fn pipe(&self, write: impl FnOnce(&mut dyn std::io::Write)) {
        let mut child = self
            .cli_command()
            .args(["--pipe", "--pipe-timeout", "120"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = std::io::BufWriter::with_capacity(1 << 20, child.stdin.take().unwrap());
        write(&mut stdin);
        stdin.flush().unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("errors: 0"), "redis-cli --pipe: {text}");
    }

    pub fn cli_command(&self) -> Command {
        let mut command = Command::new("redis-cli");
        command.args(["-h", "127.0.0.1", "-p", &self.port().to_string()]).args(&self.cli_args);
        if let Some(password) = &self.password {
            command.env("REDISCLI_AUTH", password);
        }
        command
    }

    /// All keys of database 0, sorted.
    #[track_caller]
    pub fn keys(&self) -> Vec<String> {
        self.keys_of("0")
    }

    /// All keys of a database, sorted.
    #[track_caller]
    pub fn keys_of(&self, database: &str) -> Vec<String> {
        let mut keys: Vec<String> =
            self.cli(&["-n", database, "KEYS", "*"]).lines().map(str::to_owned).collect();
        keys.retain(|key| !key.is_empty());
        keys.sort();
        keys
    }

    pub fn exists(&self, key: &str) -> bool {
        self.cli(&["EXISTS", key]) == "1"
    }

    /// Milliseconds that a key has left; negative: none, or for good.
    pub fn pttl(&self, key: &str) -> i64 {
        self.cli(&["PTTL", key]).parse().unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("redis.log")).unwrap_or_default()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill9();
        if thread::panicking() {
            eprintln!("--- log of Redis on port {}\n{}---", self.port(), self.log());
        }
    }
}

/// A Redis that is stopped until this is dropped.
#[derive(Debug)]
pub struct Stopped {
    pid: u32,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        send_signal(self.pid, "CONT");
    }
}

/// One command in the protocol's own form.
pub fn resp(out: &mut dyn std::io::Write, words: &[&str]) {
    write!(out, "*{}\r\n", words.len()).unwrap();
    for word in words {
        write!(out, "${}\r\n{word}\r\n", word.len()).unwrap();
    }
}

/// The rights that the page names.
pub fn rights() -> Vec<String> {
    let page = include_str!("../../docs/redis.md").replace("\\\n", " ").replace('\'', "");
    let line = page.lines().find_map(|l| l.strip_prefix("redis-cli ACL SETUSER ")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let [USER, "on", ">PASSWORD", rules @ ..] = &words[..] else { panic!("{line}") };
    rules.iter().map(|rule| (*rule).to_owned()).collect()
}

pub fn make_tls_files(dir: &TempDir) {
    let path = |name: &str| dir.path().join(name).display().to_string();
    dir.file("ca.key", &new_key("ec:prime256v1"));
    dir.file("server.key", &new_key("ec:prime256v1"));
    let (ca_key, ca) = (path("ca.key"), path("ca.crt"));
    let ca_args =
        ["req", "-x509", "-new", "-days", "30", "-subj", "/CN=Redis test CA", "-key", &ca_key];
    openssl(
        &[&ca_args[..], &["-addext", "keyUsage=critical,keyCertSign,cRLSign", "-out", &ca]]
            .concat(),
        "",
    );
    let (key, csr, leaf) = (path("server.key"), path("server.csr"), path("server.crt"));
    openssl(&["req", "-new", "-subj", "/CN=localhost", "-key", &key, "-out", &csr], "");
    let ext = dir.file(
        "ext",
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n",
    );
    let ext = ext.to_str().unwrap();
    let sign = ["x509", "-req", "-days", "30", "-in", &csr, "-CA", &ca, "-CAkey", &ca_key];
    openssl(&[&sign[..], &["-CAcreateserial", "-extfile", ext, "-out", &leaf]].concat(), "");
    assert!(Path::new(&leaf).exists());
}
