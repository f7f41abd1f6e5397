//! A device: `scripts/enroll.sh`, in whatever surroundings a test gives it.

use std::fs;
use std::os::unix::fs::symlink;
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
    surroundings: Surroundings,
    env: Vec<(String, String)>,
}

/// Which programs the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surroundings {
    /// Those of this machine; `/bin/sh`, curl.
    Full,
    /// busybox and openssl, nothing else.
    Busybox,
}

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
            surroundings: Surroundings::Full,
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

    /// Where it keeps its files; not made before `enroll.sh` makes it.
    pub fn folder(&self) -> PathBuf {
        self.dir.path().join("mqtt")
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
        let mut command = match self.surroundings {
            Surroundings::Full => {
                let mut command = Command::new("sh");
                command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
                command
            }
            Surroundings::Busybox => busybox(self.dir.path()),
        };
        let own = self.env.iter().map(|(name, value)| (name, value));
        command.arg(script()).args(["--url", &self.url, "--device-id", &self.name, "--dir"]);
        command.arg(self.folder()).args(more).envs(own).stdin(Stdio::null());
        command
    }
}

pub fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/enroll.sh")
}

/// busybox' shell, with a path that holds its applets and openssl only.
fn busybox(dir: &Path) -> Command {
    let bin = dir.join("bin");
    if !bin.exists() {
        fs::create_dir(&bin).unwrap();
        let list = Command::new("busybox").arg("--list").output().unwrap_or_else(|e| {
            panic!("busybox is not installed (scripts/test.sh installs it): {e}");
        });
        let real = |name: &str| {
            let found = Command::new("sh").args(["-c", &format!("command -v {name}")]).output();
            PathBuf::from(String::from_utf8(found.unwrap().stdout).unwrap().trim())
        };
        for applet in String::from_utf8(list.stdout).unwrap().lines() {
            symlink(real("busybox"), bin.join(applet)).unwrap();
        }
        symlink(real("openssl"), bin.join("openssl")).unwrap();
    }
    let mut command = Command::new(bin.join("sh"));
    command.env_clear().env("PATH", bin);
    command
}
