//! A device: `scripts/enroll.sh`, in whatever surroundings a test gives it.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::https::Identity;
use super::temp::TempDir;

/// A device's folder and what is around it.
#[derive(Debug)]
pub struct Device {
    pub name: String,
    url: String,
    dir: TempDir,
    folder: String,
    surroundings: Surroundings,
    wrapper: Vec<String>,
    env: Vec<(String, String)>,
}

/// Which programs the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surroundings {
    /// Those of this machine; `/bin/sh`, curl.
    Full,
    /// busybox and openssl, nothing else.
    Busybox,
    /// Those of a small Debian: no curl, GNU's wget, and no lock by `flock`.
    Wget,
}

/// What `scripts/enroll.sh` calls, and a service's commands need.
const USUAL: &[&str] = &[
    "awk", "cat", "chmod", "cmp", "cp", "cut", "date", "grep", "head", "mkdir", "mktemp", "mv",
    "openssl", "rm", "sed", "sh", "sleep", "sync", "tail", "tr", "wc", "wget",
];

/// What `enroll.sh` ended with and said.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub said: String,
}

impl Device {
    pub fn new(name: &str, url: &str) -> Self {
        let dir = TempDir::new();
        Device {
            name: name.to_owned(),
            url: url.to_owned(),
            dir,
            folder: "mqtt".to_owned(),
            surroundings: Surroundings::Full,
            wrapper: vec![],
            env: vec![],
        }
    }

    pub fn surroundings(mut self, surroundings: Surroundings) -> Self {
        self.surroundings = surroundings;
        self
    }

    pub fn env(mut self, env: &[(&str, String)]) -> Self {
        self.env = env.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        self
    }

    /// Another name for the folder of its files.
    pub fn in_folder(mut self, name: &str) -> Self {
        name.clone_into(&mut self.folder);
        self
    }

    /// A command that executes the shell with the script.
    pub fn wrapper(mut self, command: &[&str]) -> Self {
        self.wrapper = command.iter().map(|a| (*a).to_owned()).collect();
        self
    }

    /// Puts a program of its own before all others: a shell script, where `REAL` is the path of the one
    /// of this machine.
    pub fn program(self, name: &str, script: &str) -> Self {
        let own = self.dir.path().join("own");
        fs::create_dir_all(&own).unwrap();
        let real = on_path(name).display().to_string();
        fs::write(own.join(name), format!("#!/bin/sh\n{}\n", script.replace("REAL", &real)))
            .unwrap();
        fs::set_permissions(own.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    /// A folder that only this device has.
    pub fn outside(&self) -> &Path {
        self.dir.path()
    }

    /// Where it keeps its files; not made before `enroll.sh` makes it.
    pub fn folder(&self) -> PathBuf {
        self.dir.path().join(&self.folder)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    #[track_caller]
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The names of its files, sorted.
    pub fn files(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.folder()) else { return vec![] };
        let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }

    pub fn identity(&self) -> Identity {
        Identity { certificate: self.file("device.crt"), key: self.file("device.key") }
    }

    /// Runs `enroll.sh` with the service's address and these further arguments.
    pub fn enroll(&self, more: &[&str]) -> Outcome {
        let output = self.command(more).output().unwrap();
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        Outcome { code: output.status.code(), said }
    }

    /// Starts it and does not wait.
    pub fn begin(&self, more: &[&str]) -> Child {
        self.command(more).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Runs it; it must succeed.
    #[track_caller]
    pub fn must_enroll(&self, more: &[&str]) -> String {
        let Outcome { code, said } = self.enroll(more);
        assert_eq!(code, Some(0), "enroll.sh of {}: {said}", self.name);
        said
    }

    fn command(&self, more: &[&str]) -> Command {
        let (shell, path) = self.shell();
        let words: Vec<&str> = self.wrapper.iter().map(String::as_str).chain([&*shell]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        if self.surroundings != Surroundings::Full {
            command.env_clear();
        }
        let own = self.env.iter().map(|(name, value)| (name, value));
        command.env("PATH", format!("{}:{path}", self.dir.path().join("own").display()));
        command.arg(script()).args(["--url", &self.url, "--device-id", &self.name, "--dir"]);
        command.arg(self.folder()).args(more).envs(own).stdin(Stdio::null());
        command
    }

    /// The shell, and where its programs are.
    fn shell(&self) -> (String, String) {
        let bin = self.dir.path().join("bin");
        let programs = match self.surroundings {
            Surroundings::Full => return ("sh".to_owned(), std::env::var("PATH").unwrap()),
            Surroundings::Busybox => applets(),
            Surroundings::Wget => {
                USUAL.iter().map(|name| ((*name).to_owned(), on_path(name))).collect()
            }
        };
        if !bin.exists() {
            fs::create_dir(&bin).unwrap();
            programs.iter().for_each(|(name, real)| symlink(real, bin.join(name)).unwrap());
        }
        (bin.join("sh").display().to_string(), bin.display().to_string())
    }
}

pub fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/enroll.sh")
}

/// The applets of busybox, and openssl.
fn applets() -> Vec<(String, PathBuf)> {
    let list = Command::new("busybox").arg("--list").output().unwrap_or_else(|e| {
        panic!("busybox is not installed (scripts/test.sh installs it): {e}");
    });
    let (list, busybox) = (String::from_utf8(list.stdout).unwrap(), on_path("busybox"));
    let applets = list.lines().map(|name| (name.to_owned(), busybox.clone()));
    applets.chain([("openssl".to_owned(), on_path("openssl"))]).collect()
}

/// Where a program of this machine is.
fn on_path(name: &str) -> PathBuf {
    let found = Command::new("sh").args(["-c", &format!("command -v {name}")]).output().unwrap();
    assert!(found.status.success(), "{name} is not installed (scripts/test.sh installs it)");
    PathBuf::from(String::from_utf8(found.stdout).unwrap().trim())
}
