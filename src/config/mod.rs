//! The configuration: read from the environment once, at start, and checked there.
//!
//! [`Config::from_lookup`] is pure: it is handed the environment and the means to read a file, and
//! gives either a configuration that holds together or the one line that says what is wrong. No raw
//! text leaves this module, and no later code has a range to check. The defaults and limits stand in
//! [`variables`].

mod cidr;
mod environment;
mod names;
mod redis;
mod secret;
mod supervision;
#[cfg(test)]
mod tests;
mod tls;
pub mod variables;
mod vars;

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use log::LevelFilter;
use rustls::sign::CertifiedKey;

pub use self::cidr::Cidr;
pub(crate) use self::environment::Environment;
pub(crate) use self::redis::{HostPort, Login, Place, Redis, RedisTls, Sentinels};
pub(crate) use self::secret::Secret;
pub(crate) use self::supervision::Supervision;
pub use self::tls::certified_key;
pub(crate) use self::tls::{TlsFault, certificates, is_dns_name, private_key, server_name};
pub(crate) use self::vars::ConfigError;

use self::variables as var;
use self::variables::Variable;
use self::vars::{Vars, settings};

/// Longest path of the folder for private sockets: `sun_path` holds 107 bytes, and we need 17 of
/// them for a slash and a name.
pub const MAX_RUN_DIR_BYTES: usize = 90;

/// The secret that the older service used when it was given none: anyone can look it up.
const PUBLISHED_SECRET: &[u8] = b"mqtt-publisher-lite-secret-key-change-in-production";

settings! {
    /// Everything that can be configured.
    Config, vars:
    /// Folder of everything that is kept.
    data_dir: PathBuf = vars.path(&var::DATA_DIR)?;
    /// The door to the network.
    http: Http = Http::from_vars(vars)?;
    /// What we show over HTTPS, from the files that [`Http::tls`] names; nothing yet with `TLS=auto`.
    tls: Option<Arc<CertifiedKey>> = shown(vars, &http)?;
    /// What is logged, and how.
    log: Log = Log::from_vars(vars)?;
    /// Folder for the private sockets; at most [`MAX_RUN_DIR_BYTES`] long.
    run_dir: PathBuf = run_dir(vars, &data_dir)?;
    /// The certificate authority.
    ca: Ca = Ca::from_vars(vars)?;
    /// Who gets tokens and certificates, and for how long.
    rules: Rules = Rules::from_vars(vars)?;
    /// Signs tokens; `None`: the one in the data folder, made if there is none.
    jwt_secret: Option<Secret<Vec<u8>>> = jwt_secret(vars)?;
    /// What onboarding asks for; `None`: it is open.
    onboarding_api_key: Option<Secret> = api_key(vars, &var::ONBOARDING_API_KEY)?;
    /// What the admin endpoints ask for; if there is none, they are disabled.
    admin_keys: Vec<AdminKey> = admin_keys(vars)?;
    /// Whether there is a page for browsers.
    page: bool = vars.choice(&var::PAGE, &[true, false])?;
    /// Where tokens are kept; `None`: in memory only.
    redis: Option<Redis> = Redis::from_vars(vars)?;
    /// Which tokens are redeemed while Redis is away.
    outage_redeem: OutageRedeem =
        vars.choice(&var::OUTAGE_REDEEM, &[OutageRedeem::Own, OutageRedeem::None])?;
    /// Most tokens held in memory.
    memory_max_tokens: usize = vars.number(&var::MEMORY_MAX_TOKENS)?;
    /// Program to run after each new CRL.
    crl_hook: Option<PathBuf> = vars.optional_path(&var::CRL_HOOK)?;
    /// For how many days after its end a certificate stays in the record; 0: for good.
    record_keep_days: u32 = record_keep_days(vars)?;
    /// Who started us and wants to hear from us.
    supervision: Supervision = Supervision::from_vars(vars)?;
    /// What the operator should know although it does not stop the start: one line each.
    warnings: Vec<String> = vars.warnings();
    /// What counts, for `check-config`: a line `NAME=value` for each setting, of a secret only
    /// whether it is set. Without Redis `REDIS_ENABLED=false` is the only line about it.
    shown: Vec<String> = Vec::new();
}

settings! {
    /// The door to the network.
    Http, vars:
    /// Address to listen on.
    host: IpAddr = listen_address(vars)?;
    /// Port to listen on.
    port: u16 = port(vars)?;
    /// `TLS=auto`: the files are ours to make, for these names; without any, for the machine's.
    tls_auto: Option<Vec<String>> = tls::auto_names(vars)?;
    /// Serve HTTPS with these.
    tls: Option<TlsFiles> = tls::served(vars, tls_auto.is_some())?;
    /// Threads that answer requests.
    workers: usize = vars.number(&var::WORKERS)?;
    /// Most connections.
    max_connections: usize = vars.number(&var::MAX_CONNECTIONS)?;
    /// Most connections of one address.
    max_connections_per_ip: usize = vars.number(&var::MAX_CONNECTIONS_PER_IP)?;
    /// Most bytes held for all clients together.
    max_buffer_bytes: usize = vars.number(&var::MAX_BUFFER_BYTES)?;
    /// Longest pause between two requests of a connection.
    keep_alive: Duration = Duration::from_secs(vars.number(&var::KEEP_ALIVE_SECONDS)?);
    /// Longest time for a TLS handshake.
    tls_handshake: Duration = Duration::from_secs(vars.number(&var::TLS_HANDSHAKE_SECONDS)?);
    /// Whose `X-Forwarded-For` is believed.
    trusted_proxies: Vec<Cidr> = vars.optional(&var::TRUSTED_PROXIES, cidrs)?.unwrap_or_default();
    /// Onboardings a minute and client address; 0: no limit.
    onboarding_rate_limit: u32 = vars.number(&var::ONBOARDING_RATE_LIMIT)?;
    /// Failed authentications a minute and client address; 0: no limit.
    auth_failures: u32 = vars.number(&var::AUTH_FAILURES)?;
}

settings! {
    /// What is logged, and how.
    Log, vars:
    /// How much.
    level: LevelFilter = log_level(vars)?;
    /// `RUST_LOG`, which wins over the level; it could be parsed.
    filter: Option<String> = vars.optional(&var::RUST_LOG, |text| {
        env_filter::Builder::new().try_parse(text).is_ok().then(|| text.to_owned())
    })?;
    /// In which form.
    format: LogFormat = vars.choice(&var::LOG_FORMAT, &[LogFormat::Text, LogFormat::Json])?;
}

settings! {
    /// The certificate authority.
    Ca, vars:
    /// Folder of its key, its certificate and the certificates it signed.
    dir: PathBuf = ca_dir(vars)?;
    /// Lifetime of a CA that we make.
    root_validity_years: u32 = vars.number(&var::ROOT_CA_VALIDITY_YEARS)?;
    /// Lifetime of a device's certificate.
    device_validity_days: u32 = vars.number(&var::DEVICE_CERT_VALIDITY_DAYS)?;
}

settings! {
    /// Who gets tokens and certificates, and for how long.
    Rules, vars:
    /// Lifetime of a token, in seconds.
    token_ttl_s: u64 = vars.number(&var::PROVISIONING_TOKEN_TTL)?;
    /// Who may onboard, if that was said.
    enrolment: Option<Enrolment> = enrolment(vars)?;
    /// May a device that has an active certificate onboard again?
    reenroll: bool = vars.choice(&var::REENROLL, &[false, true])?;
    /// Renewal revokes the certificate that it replaces.
    renew_revokes: bool = vars.flag(&var::RENEW_REVOKES)?;
    /// For how many days after its expiry a certificate can be renewed.
    renew_after_expiry_days: u32 = vars.number(&var::RENEW_AFTER_EXPIRY_DAYS)?;
}

/// A key of the admin endpoints.
#[derive(Clone, Debug)]
pub struct AdminKey {
    /// Who has it, for the log.
    pub name: String,
    /// The key.
    pub key: Secret,
}

/// PEM files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Our certificate, then its chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Who may onboard a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enrolment {
    /// Anyone who reaches the port.
    Open,
    /// Who has the API key.
    Key,
    /// Devices that were registered, each by its own secret.
    Registered,
}

/// Which tokens are redeemed while Redis is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutageRedeem {
    /// Those that this instance issued.
    Own,
    /// Only those that never reached Redis.
    None,
}

impl Config {
    /// Reads the configuration: `lookup` gives a variable, `read` the contents of a file. It is refused
    /// for the first value that is not allowed, or that does not go with another.
    pub fn from_lookup(
        lookup: impl Fn(&str) -> Option<OsString>,
        read: impl Fn(&Path) -> io::Result<Vec<u8>>,
    ) -> Result<Config, ConfigError> {
        let vars = Vars::new(&lookup, &read);
        let mut config = Config::from_vars(&vars)?;
        if config.rules.enrolment == Some(Enrolment::Key) && config.onboarding_api_key.is_none() {
            let reason = "ENROLMENT=key needs it";
            return Err(ConfigError::bare(var::ONBOARDING_API_KEY.name, reason));
        }
        config.show(&vars);
        config.warnings.extend(config.unwise().into_iter().flatten());
        Ok(config)
    }

    /// As [`Config::from_lookup`], with the notes on variables that count for nothing.
    pub fn from_environment(
        environment: &Environment,
        read: impl Fn(&Path) -> io::Result<Vec<u8>>,
    ) -> Result<Config, ConfigError> {
        let mut config = Config::from_lookup(|name| environment.get(name), read)?;
        config.warnings.extend(environment.notes());
        Ok(config)
    }

    /// The variables that are otherwise in `later`, which was read anew, and that a running server
    /// cannot change.
    pub fn fixed_changes(&self, later: &Config) -> Vec<String> {
        let (before, after) = (&self.shown, &later.shown);
        let differs = |line: &&String| !before.contains(line) || !after.contains(line);
        let shown = before.iter().chain(after).filter(differs);
        let mut names: Vec<String> =
            shown.filter_map(|line| Some(line.split_once('=')?.0.to_owned())).collect();
        names.retain(|name| !self.is_taken_up(name, later));
        names.extend(self.changed_contents(later).map(ToOwned::to_owned));
        names.sort();
        names.dedup();
        names
    }

    /// Who may onboard: if it was not said, whoever has the key where there is one.
    pub fn enrolment(&self) -> Enrolment {
        let by_key = self.onboarding_api_key.is_some();
        self.rules.enrolment.unwrap_or(if by_key { Enrolment::Key } else { Enrolment::Open })
    }

    /// Keys and the page are, and another certificate; that there is one at all is fixed.
    fn is_taken_up(&self, name: &str, later: &Config) -> bool {
        let always =
            [&var::ONBOARDING_API_KEY, &var::ADMIN_API_KEY, &var::ADMIN_API_KEYS, &var::PAGE];
        let is_always = always.iter().any(|v| v.name == name);
        let tls = [&var::TLS, &var::TLS_NAMES, &var::TLS_CERT, &var::TLS_KEY];
        let is_tls = tls.iter().any(|v| v.name == name);
        is_always || (is_tls && self.http.tls.is_some() == later.http.tls.is_some())
    }

    /// Those of which [`Config::shown`] says no more than that they are set.
    fn changed_contents(&self, later: &Config) -> impl Iterator<Item = &'static str> {
        let password = |config: &Config| {
            // What stands in a file is read again for each connection.
            let login = &config.redis.as_ref()?.login;
            let password = login.password.as_ref().filter(|_| login.password_file.is_none());
            password.map(|password| password.reveal().clone())
        };
        let secret = |config: &Config| config.jwt_secret.as_ref().map(|s| s.reveal().clone());
        let changed = [
            (var::JWT_SECRET.name, secret(self) != secret(later)),
            (var::REDIS_PASSWORD.name, password(self) != password(later)),
        ];
        changed.into_iter().filter(|(_, changed)| *changed).map(|(name, _)| name)
    }

    /// Keeps what counts of all that was read.
    fn show(&mut self, vars: &Vars<'_>) {
        vars.hide(&var::PROVISIONING_JWT_SECRET);
        vars.show(&var::JWT_SECRET, if self.jwt_secret.is_some() { "(set)" } else { "(unset)" });
        match &self.redis {
            Some(redis) => redis.show(vars),
            None => {
                let of_redis = |variable: &&Variable| variable.name.starts_with("REDIS_");
                var::ALL.iter().filter(of_redis).for_each(|variable| vars.hide(variable));
                vars.show(&var::REDIS_ENABLED, false);
            }
        }
        self.shown = vars.shown();
    }

    /// What is allowed but unwise in combination.
    fn unwise(&self) -> [Option<String>; 8] {
        let Http { host, workers, .. } = self.http;
        let (rule, is_reached) = (self.enrolment(), !host.is_loopback());
        let (key, has_admin) = (self.onboarding_api_key.as_ref(), !self.admin_keys.is_empty());
        let keys = [&var::ONBOARDING_API_KEY, &var::ADMIN_API_KEY, &var::ADMIN_API_KEYS];
        let is_set = |name: &&str| self.shown.contains(&format!("{name}=(set)"));
        let keys: Vec<&str> =
            keys.map(|variable| variable.name).into_iter().filter(is_set).collect();
        let in_the_clear = is_reached && self.http.tls.is_none() && !keys.is_empty();
        let (why, mend) = match key {
            Some(_) => ("ENROLMENT=open", "set ENROLMENT=key"),
            None => ("ONBOARDING_API_KEY is unset", "set it"),
        };
        let is_admins =
            |key: &Secret| self.admin_keys.iter().any(|a| a.key.matches(key.reveal().as_bytes()));
        let is_open = rule == Enrolment::Open;
        let is_closed = rule == Enrolment::Registered && !has_admin;
        let pool = self.redis.as_ref().map(|redis| redis.pool_size);
        let has_own_secret = self.redis.is_some() && self.jwt_secret.is_none();
        let if_so = |is_so: bool, text: &str| is_so.then(|| text.to_owned());
        [
            in_the_clear.then(|| {
                let keys = keys.join(" and ");
                format!("{keys} used without TLS on {host}: whoever sees the traffic can read it")
            }),
            (is_open && is_reached).then(|| {
                format!(
                    "{why}: whoever reaches {host} can onboard any device that has no certificate; \
                     {mend}, or HTTP_HOST=127.0.0.1"
                )
            }),
            if_so(
                is_open && self.rules.reenroll,
                "REENROLL=allow without ONBOARDING_API_KEY: whoever reaches the port gets a \
                 certificate in the name of any device; set the key",
            ),
            if_so(
                is_closed,
                "ENROLMENT=registered without ADMIN_API_KEY: no device can be registered here",
            ),
            if_so(
                key.is_some_and(is_admins),
                "ONBOARDING_API_KEY is an admin key, too: whoever may onboard may revoke",
            ),
            pool.filter(|pool| *pool <= workers).map(|pool| {
                format!(
                    "REDIS_POOL_SIZE={pool} is not more than WORKERS={workers}: workers will wait \
                     for a connection"
                )
            }),
            self.tls.as_deref().and_then(tls::warning),
            if_so(
                has_own_secret,
                "JWT_SECRET is unset: other instances on this Redis cannot verify our tokens",
            ),
        ]
    }
}

impl AdminKey {
    /// `ADMIN_API_KEY` alone, which is all that a client of the service needs.
    pub fn from_lookup(
        lookup: impl Fn(&str) -> Option<OsString>,
        read: impl Fn(&Path) -> io::Result<Vec<u8>>,
    ) -> Result<Option<Secret>, ConfigError> {
        api_key(&Vars::new(&lookup, &read), &var::ADMIN_API_KEY)
    }
}

impl Http {
    /// Reads the door's own variables only, which is all that a health check needs.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Http, ConfigError> {
        Http::from_vars(&Vars::new(&lookup, &no_files))
    }
}

impl Ca {
    /// Reads what concerns the CA only, which is all that signing a server's certificate needs.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Ca, ConfigError> {
        Ca::from_vars(&Vars::new(&lookup, &no_files))
    }
}

/// For the parts that name no file whose contents would be needed.
fn no_files(_: &Path) -> io::Result<Vec<u8>> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Names other than localhost are refused: to what they resolve may change under a running server.
fn listen_address(vars: &Vars<'_>) -> Result<IpAddr, ConfigError> {
    let host = vars.parsed(&var::HTTP_HOST, |text| match text.to_ascii_lowercase().as_str() {
        "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
        text => {
            text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text).parse().ok()
        }
    })?;
    vars.show(&var::HTTP_HOST, host);
    Ok(host)
}

fn shown(vars: &Vars<'_>, http: &Http) -> Result<Option<Arc<CertifiedKey>>, ConfigError> {
    let files = http.tls.as_ref().filter(|_| http.tls_auto.is_none());
    files.map(|files| tls::read(vars, &var::TLS_CERT, &var::TLS_KEY, files)).transpose()
}

fn log_level(vars: &Vars<'_>) -> Result<LevelFilter, ConfigError> {
    use LevelFilter::{Debug, Error, Info, Trace, Warn};
    vars.choice(&var::LOG_LEVEL, &[Error, Warn, Info, Debug, Trace])
}

fn ca_dir(vars: &Vars<'_>) -> Result<PathBuf, ConfigError> {
    let given = vars.optional_path(&var::CA_STORAGE_PATH)?;
    let dir = given.map_or_else(|| Ok(vars.path(&var::DATA_DIR)?.join("ca")), Ok)?;
    vars.show(&var::CA_STORAGE_PATH, dir.display());
    Ok(dir)
}

fn port(vars: &Vars<'_>) -> Result<u16, ConfigError> {
    let is_given = vars.given(var::PORT.name)?.is_some();
    let port = vars.number(if is_given { &var::PORT } else { &var::HTTP_PORT })?;
    vars.hide(&var::HTTP_PORT);
    vars.show(&var::PORT, port);
    Ok(port)
}

fn cidrs(text: &str) -> Option<Vec<Cidr>> {
    text.split(',').map(|item| Cidr::parse(item.trim())).collect()
}

/// systemd makes and removes `$RUNTIME_DIRECTORY` (the first, if there are several) with us.
fn run_dir(vars: &Vars<'_>, data_dir: &Path) -> Result<PathBuf, ConfigError> {
    let name = "RUNTIME_DIRECTORY";
    let given = vars.given(name)?;
    let (name, dir) =
        match given.as_deref().and_then(|list| list.split(':').find(|p| !p.is_empty())) {
            Some(first) => (name, PathBuf::from(first)),
            None => (var::DATA_DIR.name, data_dir.join("run")),
        };
    if dir.as_os_str().len() <= MAX_RUN_DIR_BYTES {
        return Ok(dir);
    }
    let reason =
        format!("the path {dir:?} for private sockets must be at most {MAX_RUN_DIR_BYTES} bytes");
    Err(ConfigError::bare(name, reason))
}

/// What can still be renewed must be known, so it stays longer than that.
fn record_keep_days(vars: &Vars<'_>) -> Result<u32, ConfigError> {
    let (variable, renewable) = (&var::RECORD_KEEP_DAYS, &var::RENEW_AFTER_EXPIRY_DAYS);
    let (keep, renewed): (u32, u32) = (vars.number(variable)?, vars.number(renewable)?);
    if keep > renewed || keep == 0 {
        return Ok(keep);
    }
    if let Some(given) = vars.given(variable.name)? {
        let reason = format!("must be 0 or more than {}, which is {renewed}", renewable.name);
        return Err(ConfigError::new(variable, &given, reason));
    }
    vars.show(variable, renewed + 1);
    Ok(renewed + 1)
}

fn jwt_secret(vars: &Vars<'_>) -> Result<Option<Secret<Vec<u8>>>, ConfigError> {
    let Some((Variable { name, .. }, secret)) =
        vars.first_secret([&var::JWT_SECRET, &var::PROVISIONING_JWT_SECRET])?
    else {
        return Ok(None);
    };
    if secret.matches(PUBLISHED_SECRET) {
        let reason =
            "must not be the published default of the older service: anyone can sign with it";
        return Err(ConfigError::bare(*name, reason));
    }
    if secret.reveal().len() < 32 {
        vars.warn(format!("{name} is shorter than 32 bytes: it may be guessed from a token"));
    }
    Ok(Some(secret))
}

fn api_key(vars: &Vars<'_>, variable: &Variable) -> Result<Option<Secret>, ConfigError> {
    let Some(key) = vars.secret_text(variable)? else { return Ok(None) };
    if !is_api_key(key.reveal()) {
        return Err(ConfigError::bare(variable.name, variable.allowed));
    }
    Ok(Some(key))
}

/// Not what a device's secret looks like: who shows one must not be taken for the other.
fn is_api_key(key: &str) -> bool {
    let is_secret = key.get(..4).is_some_and(|head| head.eq_ignore_ascii_case("mpl-"));
    (16..=1024).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic()) && !is_secret
}

fn admin_keys(vars: &Vars<'_>) -> Result<Vec<AdminKey>, ConfigError> {
    let named_admin = |key| AdminKey { name: "admin".to_owned(), key };
    let mut keys: Vec<AdminKey> =
        api_key(vars, &var::ADMIN_API_KEY)?.map(named_admin).into_iter().collect();
    let more = vars.secret_text(&var::ADMIN_API_KEYS)?;
    let lines = more.iter().flat_map(|text| text.reveal().lines()).map(str::trim);
    for (n, line) in (1..).zip(lines).filter(|(_, line)| !line.is_empty()) {
        let fault = |what: &str| {
            let reason = format!("line {n} {what}; {}", var::ADMIN_API_KEYS.allowed);
            ConfigError::bare(var::ADMIN_API_KEYS.name, reason)
        };
        let (name, key) = line.split_once(':').ok_or_else(|| fault("has no colon"))?;
        let (name, key) = (name.trim().to_owned(), Secret::new(key.trim().to_owned()));
        if !(1..=64).contains(&name.len()) || !name.bytes().all(|b| matches!(b, b' '..=b'~')) {
            return Err(fault("has no name of 1 to 64 printable characters"));
        }
        if !is_api_key(key.reveal()) {
            return Err(fault("has no key that is allowed"));
        }
        let taken = |a: &AdminKey| a.name == name || a.key.matches(key.reveal().as_bytes());
        if keys.iter().any(taken) {
            return Err(fault("has a name or a key that stands there already"));
        }
        keys.push(AdminKey { name, key });
    }
    Ok(keys)
}

fn enrolment(vars: &Vars<'_>) -> Result<Option<Enrolment>, ConfigError> {
    if vars.given(var::ENROLMENT.name)?.is_none() {
        vars.show(&var::ENROLMENT, "");
        return Ok(None);
    }
    let meanings = [Enrolment::Open, Enrolment::Key, Enrolment::Registered];
    vars.choice(&var::ENROLMENT, &meanings).map(Some)
}
