//! The command line: what is asked for, and the text of `--help`.
//!
//! Written by hand, because there are few commands and options. All settings are environment variables;
//! the command line has none, so that no secret can get into a process list.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use super::{Failure, usage};
use crate::ca::server::DAYS;
use crate::config::variables::{self, Allowed, Variable};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Serve,
    Help,
    Version,
    CheckConfig { offline: bool },
    Healthcheck,
    ServerCertificate(ServerCertificate),
    Device(Device),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// What is to be done: a name of [`ACTIONS`].
    pub action: &'static str,
    /// With what; the rest are the devices.
    pub options: Options,
}

/// What can be done with devices, each with the options that it has beside `--url` and `--ca`.
const ACTIONS: [(&str, &[&str]); 7] = [
    ("add", &["--expires", "--days", "--note", "--csv"]),
    ("list", &["--state", "--expires-within", "--csv"]),
    ("show", &[]),
    ("block", &[]),
    ("unblock", &[]),
    ("remove", &[]),
    ("revoke", &["--block"]),
];

/// Options that have no value.
const FLAGS: [&str; 3] = ["--csv", "--block", "--force"];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The last value of each option; of a flag an empty one.
    given: BTreeMap<String, String>,
    /// What is no option.
    pub rest: Vec<String>,
}

impl Options {
    fn read(
        mut args: impl Iterator<Item = String>,
        known: impl Fn(&str) -> bool,
    ) -> Result<Self, Failure> {
        let mut options = Options::default();
        while let Some(arg) = args.next() {
            let (option, value) = match arg.split_once('=') {
                Some((option, value)) => (option, Some(value.to_owned())),
                None => (arg.as_str(), None),
            };
            let is_flag = FLAGS.contains(&option);
            if !arg.starts_with("--") {
                options.rest.push(arg);
            } else if !known(option) || (is_flag && value.is_some()) {
                return Err(refused(format_args!("unknown option {arg:?}")));
            } else {
                let value =
                    if is_flag { String::new() } else { value_of(option, value, &mut args)? };
                options.given.insert(option.to_owned(), value);
            }
        }
        Ok(options)
    }

    pub fn has(&self, option: &str) -> bool {
        self.given.contains_key(option)
    }

    pub fn text(&self, option: &str) -> Option<&str> {
        self.given.get(option).map(String::as_str)
    }

    pub fn days(&self, option: &str, most: u32) -> Result<Option<u32>, Failure> {
        let read = |text: &str| {
            text.parse().ok().filter(|days| (1..=most).contains(days)).ok_or_else(|| {
                refused(format_args!(
                    "{option} must be a whole number from 1 to {most}, not {text:?}"
                ))
            })
        };
        self.text(option).map(read).transpose()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerCertificate {
    /// DNS names and IP addresses of the server, not checked yet; none if it is to be renewed.
    pub names: Vec<String>,
    /// Lifetime of the certificate, if it is not to be the usual one, or that of the old one.
    pub days: Option<u32>,
    pub out: PathBuf,
    /// Renew what is there, if it is time.
    pub renew: bool,
    /// Whatever is there, and however long that still lasts: a new key and certificate.
    pub force: bool,
}

fn refused(why: impl fmt::Display) -> Failure {
    usage(format_args!("{why} (see --help)"))
}

const ENV_FILE: &str = "--env-file";
/// The longest life of a certificate.
pub const MAX_DAYS: u32 = 36_500;

/// Reads the arguments, the program's own name left out: the command, and files of variables, of which of
/// two that name the same one the later counts.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<(Command, Vec<PathBuf>), Failure> {
    let args: Result<Vec<String>, _> = args.into_iter().map(OsString::into_string).collect();
    let args = args.map_err(|arg| refused(format_args!("{arg:?} is not UTF-8")))?;
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        return Ok((Command::Help, Vec::new()));
    }
    let (env_files, rest) = take_env_files(args)?;
    Ok((command(rest)?, env_files))
}

/// Takes out `--env-file`, which every command has, wherever it stands.
fn take_env_files(args: Vec<String>) -> Result<(Vec<PathBuf>, Vec<String>), Failure> {
    let (mut files, mut rest) = (Vec::new(), Vec::new());
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        match arg.split_once('=') {
            None if arg == ENV_FILE => files.push(value_of(ENV_FILE, None, &mut args)?.into()),
            Some((ENV_FILE, path)) => {
                files.push(value_of(ENV_FILE, Some(path.to_owned()), &mut args)?.into());
            }
            _ => rest.push(arg),
        }
    }
    Ok((files, rest))
}

fn command(args: Vec<String>) -> Result<Command, Failure> {
    let mut args = args.into_iter();
    let Some(first) = args.next() else { return Ok(Command::Serve) };
    let command = match first.as_str() {
        "--version" | "-V" => Command::Version,
        "check-config" => {
            let offline = args.as_slice().first().is_some_and(|arg| arg == "--offline");
            let _ = offline.then(|| args.next());
            Command::CheckConfig { offline }
        }
        "healthcheck" => Command::Healthcheck,
        "server-certificate" => return server_certificate(args).map(Command::ServerCertificate),
        "device" => return device(args).map(Command::Device),
        _ => return Err(refused(format_args!("unknown argument {first:?}"))),
    };
    match args.next() {
        Some(more) => Err(refused(format_args!("{first} takes no argument, not {more:?}"))),
        None => Ok(command),
    }
}

fn server_certificate(args: impl Iterator<Item = String>) -> Result<ServerCertificate, Failure> {
    let known = ["--days", "--out", "--renew", "--force"];
    let options = Options::read(args, |option| known.contains(&option))?;
    let (renew, out) = (options.text("--renew"), options.text("--out"));
    let out = match (renew, options.rest.is_empty(), out) {
        (None, false, out) => Ok(out.unwrap_or(".")),
        (Some(dir), true, None) => Ok(dir),
        (Some(_), _, _) => Err("--renew DIR keeps the names and the folder: it takes neither"),
        (None, true, _) => {
            Err("server-certificate needs a DNS name or an IP address of the server")
        }
    };
    Ok(ServerCertificate {
        out: out.map_err(refused)?.into(),
        days: options.days("--days", MAX_DAYS)?,
        renew: renew.is_some(),
        force: options.has("--force"),
        names: options.rest,
    })
}

fn device(mut args: impl Iterator<Item = String>) -> Result<Device, Failure> {
    let given = args.next().unwrap_or_default();
    let known = ACTIONS.iter().find(|(name, _)| *name == given);
    let (action, own) = known.ok_or_else(|| {
        let names = ACTIONS.map(|(name, _)| name).join(", ");
        refused(format_args!("device needs one of {names}, not {given:?}"))
    })?;
    let known = |option: &str| ["--url", "--ca"].contains(&option) || own.contains(&option);
    let options = Options::read(args, known)?;
    match (*action, options.rest.is_empty()) {
        ("list", false) => Err(refused("device list takes no device id")),
        ("list", true) | (_, false) => Ok(Device { action, options }),
        _ => Err(refused(format_args!("device {given} needs a device id"))),
    }
}

/// What stands behind the `=`, else the next argument.
fn value_of(
    option: &str,
    value: Option<String>,
    args: &mut impl Iterator<Item = String>,
) -> Result<String, Failure> {
    value
        .or_else(|| args.next())
        .filter(|value| !value.is_empty())
        .ok_or_else(|| refused(format_args!("{option} needs a value")))
}

/// `mqtt-publisher-lite 0.1.0`
pub fn version() -> &'static str {
    concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"))
}

pub fn help() -> String {
    let (version, description) = (version(), env!("CARGO_PKG_DESCRIPTION"));
    let usage = USAGE.replace("{DAYS}", &DAYS.to_string());
    let variables: String = variables::ALL.iter().map(help_line).collect();
    format!("{version}\n{description}\n\n{usage}{variables}{NOTES}")
}

const USAGE: &str = "\
Usage: mqtt-publisher-lite [--env-file FILE]... [COMMAND]

Commands:
  (none)              serve until SIGTERM or SIGINT
  check-config [--offline]
                      check the environment, try what the start would need (as this user; Redis not with
                      --offline), and print what counts, without secrets
  healthcheck         ask the local server for /health, 3 seconds at most
  server-certificate NAME... [--days N] [--out DIR] [--force]
                      sign a certificate for a server (the broker, say) with these DNS names and
                      IP addresses; {DAYS} days, into the current folder; --force: over what is there
  server-certificate --renew DIR [--days N] [--force]
                      the next one for the same key, names and time, once a third of that is left, and
                      a line if so; --force: now, and with a new key
  device add ID... [--expires DAYS] [--days N] [--note TEXT] [--csv]
                      register devices, each with a secret of its own, which is shown once; it ends in
                      DAYS (90, at most 3653), and the certificate is valid for N days
  device list [--state STATE] [--expires-within DAYS] [--csv]
                      all devices, or those of a state, or whose certificate ends soon
  device show|block|unblock|remove ID...
                      what is known of a device; shut it out; let it in; forget its registration
  device revoke ID... [--block]
                      revoke its certificates
                      (all of these ask the local service, or that of --url https://HOST[:PORT] with
                      --ca FILE, and need ADMIN_API_KEY or ADMIN_API_KEY_FILE)
  --help, -h          print this
  --version, -V       print the version

  --env-file FILE     for every command: read variables from this file too, NAME=value lines as systemd
                      reads them; the environment wins, then the last file

Environment (variable, default, meaning):
";

const NOTES: &str = "
Of what is marked with * the value may also be read from a file that <NAME>_FILE names.

Exit codes:
  0  stopped as asked, or all is well
  1  failed while running, or the server is not well
  2  bad configuration or command line
";

fn help_line(variable: &Variable) -> String {
    let star = if variable.is_secret() { "*" } else { "" };
    let name = format!("{}{star}", variable.name);
    let default = if variable.default.is_empty() { "-" } else { variable.default };
    let values = match variable.allowed {
        Allowed::Number(min, max) => format!(" ({min} to {max})"),
        Allowed::OneOf(words) => format!(" ({})", words.join(", ")),
        _ => String::new(),
    };
    format!("  {name:<25} {default:<12} {}{values}\n", variable.help)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &str) -> Result<Command, String> {
        let parsed = parse(args.split_whitespace().map(OsString::from));
        parsed.map(|(command, _)| command).map_err(|Failure(_, why)| why)
    }

    #[test]
    fn commands() {
        let rows = [
            ("", Command::Serve),
            ("--help", Command::Help),
            ("-h", Command::Help),
            ("server-certificate --help", Command::Help),
            ("--version", Command::Version),
            ("-V", Command::Version),
            ("check-config", Command::CheckConfig { offline: false }),
            ("check-config --offline", Command::CheckConfig { offline: true }),
            ("healthcheck", Command::Healthcheck),
        ];
        for (args, expected) in rows {
            assert_eq!(parsed(args), Ok(expected), "{args}");
        }
    }

    #[test]
    fn files_of_variables_stand_anywhere() {
        let check = |args: &str, command: Command, files: &[&str]| {
            let env_files = files.iter().map(PathBuf::from).collect();
            let parsed = parse(args.split_whitespace().map(OsString::from));
            assert_eq!(parsed, Ok((command, env_files)), "{args}");
        };
        check("--env-file /a", Command::Serve, &["/a"]);
        check("--env-file=/a healthcheck --env-file /b", Command::Healthcheck, &["/a", "/b"]);
        let offline = Command::CheckConfig { offline: true };
        check("check-config --env-file x=y --offline", offline, &["x=y"]);
    }

    #[test]
    fn server_certificates() {
        let check = |args: &str, names: &[&str], days, out: &str, renew, force| {
            let names = names.iter().map(ToString::to_string).collect();
            let expected = ServerCertificate { names, days, out: out.into(), renew, force };
            assert_eq!(parsed(args), Ok(Command::ServerCertificate(expected)), "{args}");
        };
        check("server-certificate broker.lan", &["broker.lan"], None, ".", false, false);
        let args = "server-certificate a --days 7 ::1 --out /x";
        check(args, &["a", "::1"], Some(7), "/x", false, false);
        let args = "server-certificate --out=/x --days=1 a --force";
        check(args, &["a"], Some(1), "/x", false, true);
        check("server-certificate --renew /x", &[], None, "/x", true, false);
        let args = "server-certificate --renew=/x --days 9 --force";
        check(args, &[], Some(9), "/x", true, true);
    }

    #[test]
    fn what_is_not_understood() {
        let rows = [
            ("serve", "unknown argument \"serve\""),
            ("--port 1", "unknown argument \"--port\""),
            ("--env-file", "--env-file needs a value"),
            ("healthcheck --env-file=", "--env-file needs a value"),
            ("healthcheck --offline", "healthcheck takes no argument, not \"--offline\""),
            ("check-config x", "check-config takes no argument, not \"x\""),
            ("--version x", "--version takes no argument, not \"x\""),
            ("server-certificate a --key k", "unknown option \"--key\""),
            ("server-certificate a --days", "--days needs a value"),
            ("server-certificate --renew", "--renew needs a value"),
            ("server-certificate a --force=no", "unknown option \"--force=no\""),
            (
                "server-certificate a --renew b",
                "--renew DIR keeps the names and the folder: it takes neither",
            ),
            (
                "server-certificate --renew b --out c",
                "--renew DIR keeps the names and the folder: it takes neither",
            ),
            ("server-certificate a --out=", "--out needs a value"),
            (
                "server-certificate a --days 0",
                "--days must be a whole number from 1 to 36500, not \"0\"",
            ),
            (
                "server-certificate a --days=x",
                "--days must be a whole number from 1 to 36500, not \"x\"",
            ),
            (
                "server-certificate",
                "server-certificate needs a DNS name or an IP address of the server",
            ),
        ];
        for (args, reason) in rows {
            assert_eq!(parsed(args), Err(format!("{reason} (see --help)")), "{args}");
        }
    }

    #[test]
    fn help_names_every_variable_and_fits_a_terminal() {
        let help = help();
        for variable in variables::ALL {
            assert!(help.contains(&format!("\n  {}", variable.name)), "{}", variable.name);
        }
        assert!(help.lines().all(|line| line.chars().count() <= 120), "{help}");
    }
}
