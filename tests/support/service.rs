//! The real program as a child process, in a folder of its own and with nothing else in its
//! environment than the test says.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::http::{Client, Response};
use super::https;
use super::port::Port;
use super::temp::TempDir;
use super::wait;

/// A value for `ADMIN_API_KEY`.
pub const ADMIN_KEY: &str = "admin-key-of-the-tests";

/// How a process ended, and all it said.
#[derive(Debug)]
pub struct Exit {
    /// `None`: by a signal.
    pub code: Option<i32>,
    pub log: String,
}

/// How to start the program. Defaults: 127.0.0.1, a free port, `DATA_DIR` in a new folder.
#[derive(Debug)]
pub struct Setup {
    env: Vec<(String, String)>,
    wrapper: Vec<String>,
    args: Vec<String>,
    dir: TempDir,
    running_in: Option<PathBuf>,
    data_dir: bool,
    port_variable: bool,
    log_pipe: bool,
    log_file: Option<File>,
    port: Port,
}

impl Setup {
    pub fn new() -> Self {
        Setup {
            env: vec![],
            wrapper: vec![],
            args: vec![],
            dir: TempDir::new(),
            running_in: None,
            data_dir: true,
            port_variable: true,
            log_pipe: false,
            log_file: None,
            port: Port::any(),
        }
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn envs(self, env: &[(&str, &str)]) -> Self {
        env.iter().fold(self, |setup, (name, value)| setup.env(name, value))
    }

    /// As [`Setup::envs`], of what a server says of itself (`Redis::env`).
    pub fn env_of(self, env: &[(&str, String)]) -> Self {
        env.iter().fold(self, |setup, (name, value)| setup.env(name, value))
    }

    /// Arguments for the program, as `check-config`.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args = args.iter().map(|a| (*a).to_owned()).collect();
        self
    }

    /// A command that executes the program in its place (`exec`, as `prlimit` and `nice` do; one
    /// that forks would be the process that is measured and killed).
    pub fn wrapper(mut self, command: &[&str]) -> Self {
        self.wrapper = command.iter().map(|a| (*a).to_owned()).collect();
        self
    }

    /// Runs the program in this folder instead of a new one.
    pub fn running_in(mut self, dir: &Path) -> Self {
        self.running_in = Some(dir.to_owned());
        self
    }

    /// Leaves `DATA_DIR` unset; the program runs in the folder, so `./data` is in it.
    pub fn without_data_dir(mut self) -> Self {
        self.data_dir = false;
        self
    }

    /// Leaves `PORT` unset.
    pub fn without_port(mut self) -> Self {
        self.port_variable = false;
        self
    }

    /// Gives the program a pipe for its log, as a service manager does; the test writes the file.
    pub fn log_to_pipe(mut self) -> Self {
        self.log_pipe = true;
        self
    }

    /// Gives the program this for its log: the writing end of a pipe, say, that the test reads or not.
    pub fn log_to(mut self, file: impl Into<OwnedFd>) -> Self {
        self.log_file = Some(File::from(file.into()));
        self
    }

    /// Looks for the server on this port; does not tell the program.
    pub fn on_port(mut self, port: Port) -> Self {
        self.port = port;
        self
    }

    /// A copy of the CA of `other`, as a second instance has it.
    pub fn share_ca(self, other: &Service) -> Self {
        let ca = self.data("ca");
        fs::create_dir_all(&ca).unwrap();
        for file in ["root-ca.crt", "root-ca.key"] {
            fs::copy(other.data("ca").join(file), ca.join(file)).unwrap();
        }
        self
    }

    /// A copy of all that `other` keeps in `DATA_DIR`, as a machine has it that was cloned.
    pub fn copy_data(self, other: &Service) -> Self {
        let data = self.data("");
        let copied = Command::new("cp").arg("-a").arg(other.data("")).arg(&data).status();
        assert!(copied.unwrap().success());
        self
    }

    /// The folder in which the program will run; `data/` is in it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path below `DATA_DIR`.
    pub fn data(&self, name: &str) -> PathBuf {
        self.dir.path().join("data").join(name)
    }

    /// Starts the server and waits until it answers.
    #[track_caller]
    pub fn start(self) -> Service {
        match self.try_start() {
            Ok(service) => service,
            Err(exit) => {
                panic!("the server ended with {:?} at its start:\n{}", exit.code, exit.log)
            }
        }
    }

    /// Starts the server; an [`Exit`] if it ends instead of answering.
    pub fn try_start(self) -> Result<Service, Exit> {
        let mut service = Service::new(self);
        service.spawn();
        service.wait_ready()?;
        Ok(service)
    }

    /// Runs the program until it ends by itself, at most 20 s.
    #[track_caller]
    pub fn run(self) -> Exit {
        self.run_and_keep().0
    }

    /// As [`Setup::run`]; what it left in its folder stays until the second is dropped.
    #[track_caller]
    pub fn run_and_keep(self) -> (Exit, Service) {
        let mut service = Service::new(self);
        service.spawn();
        (service.wait_exit(), service)
    }

    /// Runs the program; none if it has not ended after `limit`.
    pub fn run_within(self, limit: Duration) -> Option<Exit> {
        let mut service = Service::new(self);
        service.spawn();
        service.exit_within(limit)
    }
}

/// A running server. `Drop` kills it, by its process id, and removes its folder.
#[derive(Debug)]
pub struct Service {
    setup: Setup,
    child: Option<Child>,
    log: PathBuf,
    /// A client with a connection per request.
    pub http: Client,
}

impl Service {
    /// Starts a server with `env` and waits until it answers.
    #[track_caller]
    pub fn start(env: &[(&str, &str)]) -> Service {
        Setup::new().envs(env).start()
    }

    fn new(setup: Setup) -> Self {
        let (log, http) = (setup.dir().join("service.log"), Client::new(setup.port.number()));
        Service { setup, child: None, log, http }
    }

    fn spawn(&mut self) {
        let log = OpenOptions::new().create(true).append(true).open(&self.log).unwrap();
        let log = match &self.setup.log_file {
            Some(file) => file.try_clone().unwrap(),
            None if self.setup.log_pipe => piped_to(log),
            None => log,
        };
        self.child = Some(self.command(log).spawn().unwrap_or_else(|e| {
            panic!(
                "cannot run {:?} {}: {e}",
                self.setup.wrapper,
                env!("CARGO_BIN_EXE_mqtt-publisher-lite")
            )
        }));
    }

    fn command(&self, log: File) -> Command {
        let setup = &self.setup;
        let mut words = setup.wrapper.clone();
        words.push(env!("CARGO_BIN_EXE_mqtt-publisher-lite").to_owned());
        words.extend_from_slice(&setup.args);
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .current_dir(setup.running_in.as_deref().unwrap_or(setup.dir()))
            .env_clear();
        if !setup.wrapper.is_empty() {
            command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        }
        command.env("HTTP_HOST", "127.0.0.1");
        if setup.port_variable {
            command.env("PORT", setup.port.number().to_string());
        }
        if setup.data_dir {
            command.env("DATA_DIR", setup.data(""));
        }
        for (name, value) in &setup.env {
            command.env(name, value);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command
    }

    fn wait_ready(&mut self) -> Result<(), Exit> {
        let probe = Client { timeout: Duration::from_secs(2), ..self.http };
        let ready = wait::until(Duration::from_secs(30), || {
            if let Some(status) = self.child().try_wait().unwrap() {
                return Some(Err(status.code()));
            }
            if self.is_tls() {
                // By a clock that is not set, the very first start has nothing to show.
                let waits = self.log().contains("HTTPS opens when there is a certificate");
                return (waits || https::is_served(self.port())).then_some(Ok(()));
            }
            probe.try_request("GET", "/health", &[], b"").ok().map(|_| Ok(()))
        });
        match ready {
            Some(Ok(())) => Ok(()),
            Some(Err(code)) => Err(Exit { code, log: self.log() }),
            None => panic!("the server does not answer:\n{}", self.log()),
        }
    }

    /// Waits until the process ends by itself, at most 20 s.
    #[track_caller]
    pub fn wait_exit(&mut self) -> Exit {
        match self.exit_within(Duration::from_secs(20)) {
            Some(exit) => exit,
            None => panic!("the process does not end:\n{}", self.log()),
        }
    }

    fn exit_within(&mut self, limit: Duration) -> Option<Exit> {
        let status = wait::until(limit, || self.child().try_wait().unwrap())?;
        Some(Exit { code: status.code(), log: self.log() })
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub fn port(&self) -> u16 {
        self.setup.port.number()
    }

    fn is_tls(&self) -> bool {
        self.setup.env.iter().any(|(name, _)| ["TLS", "TLS_CERT"].contains(&&**name))
    }

    /// The folder in which it runs.
    pub fn dir(&self) -> &Path {
        self.setup.dir()
    }

    /// A path below `DATA_DIR`.
    pub fn data(&self, name: &str) -> PathBuf {
        self.setup.data(name)
    }

    /// The content of a file below `DATA_DIR`.
    #[track_caller]
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.data(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The lines of `index.txt` but those of servers, each cut at its tabs; none if there is no file.
    pub fn index(&self) -> Vec<Vec<String>> {
        self.lines_of(false)
    }

    /// The same of servers.
    pub fn index_of_servers(&self) -> Vec<Vec<String>> {
        self.lines_of(true)
    }

    fn lines_of(&self, servers: bool) -> Vec<Vec<String>> {
        let text = fs::read_to_string(self.data("ca/index.txt")).unwrap_or_default();
        let lines = text.lines().map(|line| line.split('\t').map(str::to_owned).collect());
        lines.filter(|line: &Vec<String>| (line[4] == "server") == servers).collect()
    }

    /// The serial numbers in `index.txt`.
    pub fn serials(&self) -> Vec<String> {
        self.index().into_iter().map(|row| row[3].clone()).collect()
    }

    /// All that the process, and those before a restart, wrote to stdout and stderr.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until the log contains `text` and gives the log.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) -> String {
        self.wait_for_log_after(0, text)
    }

    /// As [`Service::wait_for_log`], looking only at what follows the first `from` bytes.
    #[track_caller]
    pub fn wait_for_log_after(&self, from: usize, text: &str) -> String {
        let found = wait::until(Duration::from_secs(10), || {
            let log = self.log();
            log.get(from..).is_some_and(|tail| tail.contains(text)).then_some(log)
        });
        found.unwrap_or_else(|| panic!("{text:?} is not in the log:\n{}", self.log()))
    }

    /// Changes a variable for the next [`Service::restart`].
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.setup.env.push((name.to_owned(), value.to_owned()));
    }

    /// SIGKILL, and waits for the end.
    pub fn kill9(&mut self) {
        let child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }

    /// SIGTERM, and waits for the end.
    #[track_caller]
    pub fn terminate(&mut self) -> Exit {
        self.signal("TERM");
        self.wait_exit()
    }

    /// Sends a signal by its name.
    #[track_caller]
    pub fn signal(&self, name: &str) {
        send_signal(self.pid(), name);
    }

    /// Starts it again after an end, with the same folder and port, and waits until it answers.
    #[track_caller]
    pub fn restart(&mut self) {
        self.spawn();
        if let Err(exit) = self.wait_ready() {
            panic!("the server ended with {:?} at its restart:\n{}", exit.code, exit.log);
        }
    }

    /// Resident memory in KiB.
    pub fn rss_kib(&self) -> u64 {
        self.proc_status("VmRSS:")
    }

    /// The most resident memory that there was, in KiB.
    pub fn peak_rss_kib(&self) -> u64 {
        self.proc_status("VmHWM:")
    }

    /// CPU time used until now, user and system, in clock ticks (100 a second).
    pub fn cpu_ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        // The name of the program, in parentheses, may hold spaces: count from behind it.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    fn proc_status(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

/// What devices and operators ask it.
impl Service {
    pub fn onboard(&self, device: &str) -> Response {
        self.http.post("/api/v1/onboarding", &json!({"device_id": device}))
    }

    /// Onboards `device`, which must succeed, and gives the token.
    #[track_caller]
    pub fn token(&self, device: &str) -> String {
        let answer = self.onboard(device);
        assert_eq!(answer.status, 200, "onboarding {device}: {}\n{}", answer.text(), self.log());
        answer.field("provisioning_token")
    }

    pub fn sign(&self, token: &str, csr: &str) -> Response {
        self.sign_with(token, &json!({"csr": csr}))
    }

    pub fn sign_with(&self, token: &str, body: &Value) -> Response {
        let bearer = format!("Bearer {token}");
        self.http.post_with("/api/v1/sign-csr", &[("Authorization", &bearer)], body)
    }

    /// Onboards `device` and has `csr` signed, which must succeed.
    #[track_caller]
    pub fn enroll(&self, device: &str, csr: &str) -> Response {
        let answer = self.sign(&self.token(device), csr);
        assert_eq!(answer.status, 200, "signing {device}: {}\n{}", answer.text(), self.log());
        answer
    }

    /// Revokes `device` with [`ADMIN_KEY`].
    pub fn revoke(&self, device: &str) -> Response {
        let bearer = format!("Bearer {ADMIN_KEY}");
        let path = format!("/api/v1/certificates/{device}");
        self.http.request("DELETE", &path, &[("Authorization", &bearer)], b"")
    }

    pub fn health(&self) -> Value {
        self.http.get("/health").json()
    }

    /// Live tokens by `/health`.
    pub fn token_count(&self) -> u64 {
        self.health()["redis"]["tokenCount"].as_u64().unwrap_or(u64::MAX)
    }

    /// Waits until `/health` shows this: `redis` or `memory` serves.
    #[track_caller]
    pub fn wait_for_storage(&self, storage: &str) {
        let what = format!("storage is {storage}\n{}", self.log());
        wait::for_true(&what, || self.health()["storage"] == storage);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            eprintln!("--- log of the server on port {}\n{}---", self.port(), self.log());
        }
    }
}

/// A wrapper by which root, who may read and write anything, is bound by modes as any user is.
pub fn as_any_user() -> &'static [&'static str] {
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if is_root { &["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] } else { &[] }
}

/// The writing end of a pipe from which a thread copies to `file` until the other side closes it.
fn piped_to(mut file: File) -> File {
    let (mut reader, writer) = io::pipe().unwrap();
    thread::spawn(move || io::copy(&mut reader, &mut file));
    File::from(OwnedFd::from(writer))
}

/// Sends a signal through the shell's own `kill`, which is there on every system.
#[track_caller]
pub fn send_signal(pid: u32, name: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}
