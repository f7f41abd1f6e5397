//! The program: reads the command line and the environment, and hands over to the library.

use std::env;
use std::ffi::OsString;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

use mqtt_publisher_lite::cli::{self, Command};
use mqtt_publisher_lite::config::{Ca, Config, ConfigError, Http};
use mqtt_publisher_lite::{healthcheck, logging};

/// Failed while running.
const FAILED: u8 = 1;
/// Bad configuration or command line.
const BAD_CONFIG: u8 = 2;

/// Largest file that a variable may name: all public CAs together are a quarter of it.
const MAX_FILE_BYTES: u64 = 1 << 20;

fn main() -> ExitCode {
    let command = match cli::parse(env::args_os().skip(1)) {
        Ok(command) => command,
        Err(e) => return fail(BAD_CONFIG, e),
    };
    match command {
        Command::Serve => serve(),
        Command::Help => print(&cli::help()),
        Command::Version => print(&format!("{}\n", cli::version())),
        Command::CheckConfig => check_config(),
        Command::Healthcheck => healthcheck(),
        Command::ServerCertificate(request) => match Ca::from_lookup(variable) {
            Ok(ca) => done(mqtt_publisher_lite::server_certificate(&ca, &request)),
            Err(e) => fail(BAD_CONFIG, e),
        },
    }
}

fn serve() -> ExitCode {
    let config = match load() {
        Ok(config) => config,
        Err(e) => return fail(BAD_CONFIG, e),
    };
    if let Err(e) = logging::init(&config.log, variable) {
        return fail(FAILED, e);
    }
    config.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    match mqtt_publisher_lite::run(&config, load) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if log::log_enabled!(log::Level::Error) => {
            log::error!("{e}");
            ExitCode::from(FAILED)
        }
        // Nobody should have to look for the reason with another log level.
        Err(e) => fail(FAILED, e),
    }
}

fn check_config() -> ExitCode {
    match load() {
        Ok(config) => {
            config.warnings.iter().for_each(|warning| tell(format_args!("warning: {warning}")));
            print(&(config.describe().join("\n") + "\n"))
        }
        Err(e) => fail(BAD_CONFIG, e),
    }
}

/// Never exits with 2, which container engines reserve for themselves.
fn healthcheck() -> ExitCode {
    match Http::from_lookup(variable) {
        Ok(http) => done(healthcheck::check(&http, healthcheck::DEADLINE)),
        Err(e) => fail(FAILED, e),
    }
}

fn load() -> Result<Config, ConfigError> {
    Config::from_lookup(variable, read_file)
}

fn variable(name: &str) -> Option<OsString> {
    env::var_os(name)
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

fn done(outcome: Result<(), impl Display>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(FAILED, e),
    }
}

fn fail(code: u8, error: impl Display) -> ExitCode {
    tell(error);
    ExitCode::from(code)
}

/// Unlike `eprintln!`, this does not panic when nobody reads.
fn tell(line: impl Display) {
    let _ = writeln!(io::stderr(), "{}: {line}", env!("CARGO_PKG_NAME"));
}

/// A reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => fail(FAILED, e),
        _ => ExitCode::SUCCESS,
    }
}
