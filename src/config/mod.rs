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
pub use self::environment::Environment;
pub use self::redis::{HostPort, Login, Place, Redis, RedisTls, Sentinels};
pub use self::secret::Secret;
pub use self::supervision::Supervision;
pub use self::tls::{TlsFault, certificates, certified_key, is_dns_name};
pub use self::vars::ConfigError;

use self::variables as var;
use self::variables::Variable;
use self::vars::Vars;

/// Longest path of the folder for private sockets: `sun_path` holds 107 bytes, and we need 17 of
/// them for a slash and a name.
pub const MAX_RUN_DIR_BYTES: usize = 90;

/// The secret that the older service used when it was given none: anyone can look it up.
const PUBLISHED_SECRET: &[u8] = b"mqtt-publisher-lite-secret-key-change-in-production";

/// Everything that can be configured.
#[derive(Clone, Debug)]
pub struct Config {
    /// The door to the network.
    pub http: Http,
    /// What we show over HTTPS, from the files that [`Http::tls`] names; nothing yet with `TLS=auto`.
    pub tls: Option<Arc<CertifiedKey>>,
    /// What is logged, and how.
    pub log: Log,
    /// Folder of everything that is kept.
    pub data_dir: PathBuf,
    /// Folder for the private sockets; at most [`MAX_RUN_DIR_BYTES`] long.
    pub run_dir: PathBuf,
    /// The certificate authority.
    pub ca: Ca,
    /// Lifetime of a token, in seconds.
    pub token_ttl_s: u64,
    /// Signs tokens; `None`: the one in the data folder, made if there is none.
    pub jwt_secret: Option<Secret<Vec<u8>>>,
    /// What onboarding asks for; `None`: it is open.
    pub onboarding_api_key: Option<Secret>,
    /// What the admin endpoints ask for; if there is none, they are disabled.
    pub admin_keys: Vec<AdminKey>,
    /// Who may onboard, if that was said.
    pub enrolment: Option<Enrolment>,
    /// May a device that has an active certificate onboard again?
    pub reenroll: Reenroll,
    /// Whether there is a page for browsers.
    pub page: bool,
    /// Where tokens are kept; `None`: in memory only.
    pub redis: Option<Redis>,
    /// Which tokens are redeemed while Redis is away.
    pub outage_redeem: OutageRedeem,
    /// Most tokens held in memory.
    pub memory_max_tokens: usize,
    /// Program to run after each new CRL.
    pub crl_hook: Option<PathBuf>,
    /// Renewal revokes the certificate that it replaces.
    pub renew_revokes: bool,
    /// For how many days after its expiry a certificate can be renewed.
    pub renew_after_expiry_days: u32,
    /// For how many days after its end a certificate stays in the record; 0: for good.
    pub record_keep_days: u32,
    /// Who started us and wants to hear from us.
    pub supervision: Supervision,
    /// What the operator should know although it does not stop the start: one line each.
    pub warnings: Vec<String>,
    /// What counts, for `check-config`: a line `NAME=value` for each setting, of a secret only
    /// whether it is set. Without Redis `REDIS_ENABLED=false` is the only line about it.
    pub shown: Vec<String>,
}

/// The door to the network.
#[derive(Clone, Debug)]
pub struct Http {
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on.
    pub port: u16,
    /// Serve HTTPS with these.
    pub tls: Option<TlsFiles>,
    /// `TLS=auto`: they are ours to make, for these names; without any, for the machine's.
    pub tls_auto: Option<Vec<String>>,
    /// Threads that answer requests.
    pub workers: usize,
    /// Most connections.
    pub max_connections: usize,
    /// Most connections of one address.
    pub max_connections_per_ip: usize,
    /// Most bytes held for all clients together.
    pub max_buffer_bytes: usize,
    /// Longest pause between two requests of a connection.
    pub keep_alive: Duration,
    /// Longest time for a TLS handshake.
    pub tls_handshake: Duration,
    /// Whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<Cidr>,
    /// Onboardings a minute and client address; 0: no limit.
    pub onboarding_rate_limit: u32,
    /// Failed authentications a minute and client address; 0: no limit.
    pub auth_failures: u32,
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

/// What is logged, and how.
#[derive(Clone, Debug)]
pub struct Log {
    /// How much.
    pub level: LevelFilter,
    /// `RUST_LOG`, which wins over the level; it could be parsed.
    pub filter: Option<String>,
    /// In which form.
    pub format: LogFormat,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The certificate authority.
#[derive(Clone, Debug)]
pub struct Ca {
    /// Folder of its key, its certificate and the certificates it signed.
    pub dir: PathBuf,
    /// Lifetime of a CA that we make.
    pub root_validity_years: u32,
    /// Lifetime of a device's certificate.
    pub device_validity_days: u32,
}

/// May a device that has an active certificate onboard again?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reenroll {
    /// No: 409.
    Deny,
    /// Yes.
    Allow,
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
    /// Reads the configuration: `lookup` gives a variable, `read` the contents of a file.
    ///
    /// # Errors
    /// The first value that is not allowed, or that does not go with another.
    pub fn from_lookup(
        lookup: impl Fn(&str) -> Option<OsString>,
        read: impl Fn(&Path) -> io::Result<Vec<u8>>,
    ) -> Result<Config, ConfigError> {
        let vars = Vars::new(&lookup, &read);
        let mut warnings = Vec::new();
        let data_dir = vars.path(&var::DATA_DIR)?;
        let http = Http::from_vars(&vars)?;
        let read = |files| tls::read(&vars, &var::TLS_CERT, &var::TLS_KEY, files);
        let mut config = Config {
            tls: http.tls.as_ref().filter(|_| http.tls_auto.is_none()).map(read).transpose()?,
            http,
            log: Log::from_vars(&vars)?,
            run_dir: run_dir(&vars, &data_dir)?,
            ca: Ca::from_vars(&vars, &data_dir)?,
            data_dir,
            token_ttl_s: vars.number(&var::PROVISIONING_TOKEN_TTL)?,
            jwt_secret: jwt_secret(&vars, &mut warnings)?,
            onboarding_api_key: api_key(&vars, &var::ONBOARDING_API_KEY)?,
            admin_keys: admin_keys(&vars)?,
            enrolment: enrolment(&vars)?,
            reenroll: vars.choice(&var::REENROLL, &[Reenroll::Deny, Reenroll::Allow])?,
            page: vars.choice(&var::PAGE, &[true, false])?,
            redis: Redis::from_vars(&vars, &mut warnings)?,
            outage_redeem: vars
                .choice(&var::OUTAGE_REDEEM, &[OutageRedeem::Own, OutageRedeem::None])?,
            memory_max_tokens: vars.number(&var::MEMORY_MAX_TOKENS)?,
            crl_hook: vars.optional_path(&var::CRL_HOOK)?,
            renew_revokes: vars.flag(&var::RENEW_REVOKES)?,
            renew_after_expiry_days: vars.number(&var::RENEW_AFTER_EXPIRY_DAYS)?,
            record_keep_days: record_keep_days(&vars)?,
            supervision: Supervision::from_vars(&vars)?,
            warnings,
            shown: Vec::new(),
        };
        if config.enrolment == Some(Enrolment::Key) && config.onboarding_api_key.is_none() {
            let reason = "ENROLMENT=key needs it";
            return Err(ConfigError::bare(var::ONBOARDING_API_KEY.name, reason));
        }
        config.show(&vars);
        config.warnings.extend(config.unwise().into_iter().flatten());
        Ok(config)
    }

    /// As [`Config::from_lookup`], with the notes on variables that count for nothing.
    ///
    /// # Errors
    /// As there.
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
        self.enrolment.unwrap_or(if by_key { Enrolment::Key } else { Enrolment::Open })
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
        let keys =
            [key.map(|_| &var::ONBOARDING_API_KEY), has_admin.then_some(&var::ADMIN_API_KEY)];
        let keys: Vec<&str> = keys.into_iter().flatten().map(|variable| variable.name).collect();
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
                is_open && self.reenroll == Reenroll::Allow,
                "REENROLL=allow without ONBOARDING_API_KEY: whoever reaches the port gets a \
                 certificate in the name of any device; set the key",
            ),
            if_so(
                is_closed,
                "ENROLMENT=registered without ADMIN_API_KEY: no device can be registered here",
            ),
            if_so(
                key.is_some_and(is_admins),
                "ONBOARDING_API_KEY and ADMIN_API_KEY are the same: whoever may onboard may revoke",
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
    ///
    /// # Errors
    /// When it is not allowed, or its file cannot be read.
    pub fn from_lookup(
        lookup: impl Fn(&str) -> Option<OsString>,
        read: impl Fn(&Path) -> io::Result<Vec<u8>>,
    ) -> Result<Option<Secret>, ConfigError> {
        api_key(&Vars::new(&lookup, &read), &var::ADMIN_API_KEY)
    }
}

impl Http {
    /// Reads the door's own variables only, which is all that a health check needs.
    ///
    /// # Errors
    /// The first value that is not allowed.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Http, ConfigError> {
        Http::from_vars(&Vars::new(&lookup, &no_files))
    }

    fn from_vars(vars: &Vars<'_>) -> Result<Http, ConfigError> {
        let host = vars.parsed(&var::HTTP_HOST, listen_address)?;
        vars.show(&var::HTTP_HOST, host);
        let (tls, tls_auto) = tls::served(vars)?;
        Ok(Http {
            host,
            port: port(vars)?,
            tls,
            tls_auto,
            workers: vars.number(&var::WORKERS)?,
            max_connections: vars.number(&var::MAX_CONNECTIONS)?,
            max_connections_per_ip: vars.number(&var::MAX_CONNECTIONS_PER_IP)?,
            max_buffer_bytes: vars.number(&var::MAX_BUFFER_BYTES)?,
            keep_alive: Duration::from_secs(vars.number(&var::KEEP_ALIVE_SECONDS)?),
            tls_handshake: Duration::from_secs(vars.number(&var::TLS_HANDSHAKE_SECONDS)?),
            trusted_proxies: vars.optional(&var::TRUSTED_PROXIES, cidrs)?.unwrap_or_default(),
            onboarding_rate_limit: vars.number(&var::ONBOARDING_RATE_LIMIT)?,
            auth_failures: vars.number(&var::AUTH_FAILURES)?,
        })
    }
}

impl Log {
    fn from_vars(vars: &Vars<'_>) -> Result<Log, ConfigError> {
        use LevelFilter::{Debug, Error, Info, Trace, Warn};
        let is_filter = |text: &str| env_filter::Builder::new().try_parse(text).is_ok();
        Ok(Log {
            level: vars.choice(&var::LOG_LEVEL, &[Error, Warn, Info, Debug, Trace])?,
            filter: vars
                .optional(&var::RUST_LOG, |text| is_filter(text).then(|| text.to_owned()))?,
            format: vars.choice(&var::LOG_FORMAT, &[LogFormat::Text, LogFormat::Json])?,
        })
    }
}

impl Ca {
    /// Reads what concerns the CA only, which is all that signing a server's certificate needs.
    ///
    /// # Errors
    /// The first value that is not allowed.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Ca, ConfigError> {
        let vars = Vars::new(&lookup, &no_files);
        Ca::from_vars(&vars, &vars.path(&var::DATA_DIR)?)
    }

    fn from_vars(vars: &Vars<'_>, data_dir: &Path) -> Result<Ca, ConfigError> {
        let dir = vars.optional_path(&var::CA_STORAGE_PATH)?;
        let dir = dir.unwrap_or_else(|| data_dir.join("ca"));
        vars.show(&var::CA_STORAGE_PATH, dir.display());
        Ok(Ca {
            dir,
            root_validity_years: vars.number(&var::ROOT_CA_VALIDITY_YEARS)?,
            device_validity_days: vars.number(&var::DEVICE_CERT_VALIDITY_DAYS)?,
        })
    }
}

/// For the parts that name no file whose contents would be needed.
fn no_files(_: &Path) -> io::Result<Vec<u8>> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Names other than localhost are refused: to what they resolve may change under a running server.
fn listen_address(text: &str) -> Option<IpAddr> {
    if text.eq_ignore_ascii_case("localhost") {
        return Some(Ipv4Addr::LOCALHOST.into());
    }
    text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text).parse().ok()
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

fn jwt_secret(
    vars: &Vars<'_>,
    warnings: &mut Vec<String>,
) -> Result<Option<Secret<Vec<u8>>>, ConfigError> {
    for variable in [&var::JWT_SECRET, &var::PROVISIONING_JWT_SECRET] {
        if let Some(secret) = vars.secret(variable)? {
            return checked_jwt_secret(variable, secret, warnings).map(Some);
        }
    }
    Ok(None)
}

fn checked_jwt_secret(
    variable: &Variable,
    secret: Secret<Vec<u8>>,
    warnings: &mut Vec<String>,
) -> Result<Secret<Vec<u8>>, ConfigError> {
    if secret.matches(PUBLISHED_SECRET) {
        let reason =
            "must not be the published default of the older service: anyone can sign with it";
        return Err(ConfigError::bare(variable.name, reason));
    }
    if secret.reveal().len() < 32 {
        let name = variable.name;
        warnings.push(format!("{name} is shorter than 32 bytes: it may be guessed from a token"));
    }
    Ok(secret)
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
