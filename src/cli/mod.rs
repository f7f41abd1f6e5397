//! The commands: from arguments and environment to an exit code.

mod args;
mod client;
mod device;
mod healthcheck;
mod serve;
mod server_certificate;

use std::ffi::OsString;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::config::{Config, ConfigError, Environment};

use args::Command;

/// Failed while running.
const FAILED: u8 = 1;
/// Bad configuration or command line.
const BAD_CONFIG: u8 = 2;

/// Largest file that a variable may name: all public CAs together are a quarter of it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a command failed, and with which exit code.
#[derive(Debug, PartialEq, Eq)]
struct Failure(u8, String);

fn failed(why: impl Display) -> Failure {
    Failure(FAILED, why.to_string())
}

fn usage(why: impl Display) -> Failure {
    Failure(BAD_CONFIG, why.to_string())
}

/// Runs the program with these arguments, its own name left out, and in this environment.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> ExitCode {
    let done = args::parse(args).and_then(|(command, env_files)| {
        run_command(command, &Given { environment: environment.into_iter().collect(), env_files })
    });
    done.unwrap_or_else(|Failure(code, why)| {
        tell(why);
        ExitCode::from(code)
    })
}

fn run_command(command: Command, given: &Given) -> Result<ExitCode, Failure> {
    match command {
        Command::Serve => serve::run(given),
        Command::Help => print(&args::help()),
        Command::Version => print(&format!("{}\n", args::version())),
        Command::CheckConfig { offline } => serve::check(given, offline),
        Command::Healthcheck => healthcheck::run(given),
        Command::Device(request) => print(&device::run(given, &request)?),
        Command::ServerCertificate(request) => server_certificate::run(given, &request),
    }
}

/// What the configuration is read from. Files are read anew each time, since they may have changed.
struct Given {
    environment: Vec<(OsString, OsString)>,
    env_files: Vec<PathBuf>,
}

impl Given {
    fn environment(&self) -> Result<Environment, ConfigError> {
        let mut environment = Environment::new(self.environment.iter().cloned());
        for path in &self.env_files {
            let contents = read_file(path).map_err(|e| ConfigError::env_file(path, e))?;
            environment.add_file(path, &contents)?;
        }
        Ok(environment)
    }

    fn config(&self) -> Result<Config, ConfigError> {
        Config::from_environment(&self.environment()?, read_file)
    }
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Unlike `eprintln!`, this does not panic when nobody reads.
fn tell(line: impl Display) {
    let _ = writeln!(io::stderr(), "{}: {line}", env!("CARGO_PKG_NAME"));
}

/// A reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> Result<ExitCode, Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(failed(e)),
        _ => Ok(ExitCode::SUCCESS),
    }
}
