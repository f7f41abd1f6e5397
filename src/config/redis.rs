//! Where Redis is and how it is used: from a URL, or from its parts.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use rustls::RootCertStore;

use super::secret::{self, Secret};
use super::tls::certificates;
use super::variables as var;
use super::variables::Variable;
use super::vars::{ConfigError, Vars};

const NEEDS_TLS: &str = "needs REDIS_TLS=true or a rediss:// URL";

/// Where Redis is and how it is used.
#[derive(Clone, Debug)]
pub struct Redis {
    /// Host name or IP address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// ACL user; `None` with a password: `AUTH <password>`, as servers without ACLs need it.
    pub username: Option<String>,
    /// Password, as it was at the start.
    pub password: Option<Secret>,
    /// Where it stands, to be read again for each connection: passwords are changed.
    pub password_file: Option<PathBuf>,
    /// Number of the database.
    pub db: i64,
    /// Speak TLS.
    pub tls: bool,
    /// The only roots to trust; `None`: the built-in public ones.
    pub tls_ca: Option<PemFile>,
    /// The name that the server's certificate must bear, if it is not the host.
    pub tls_server_name: Option<String>,
    /// No memory: while Redis is away nothing is issued or redeemed.
    pub required: bool,
    /// What all our keys start with.
    pub key_prefix: String,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Longest wait for a connection, name resolution included.
    pub connect_timeout: Duration,
    /// Connections held.
    pub pool_size: usize,
}

/// A PEM file as it was read at start.
#[derive(Clone, Debug)]
pub struct PemFile {
    /// Where it lies.
    pub path: PathBuf,
    /// What it held.
    pub pem: Vec<u8>,
}

impl Redis {
    /// Reads all `REDIS_…` variables; `None` if Redis is not to be used.
    pub(super) fn from_vars(
        vars: &Vars<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Redis>, ConfigError> {
        let enabled = vars.flag(&var::REDIS_ENABLED)?;
        let mut server = match url(vars)? {
            Some((variable, url)) => {
                warnings.extend(ignored_parts(vars, variable)?);
                Some(Server::from_url(variable, url.reveal())?)
            }
            None => Server::from_parts(vars)?,
        };
        // The URL may only add TLS: whoever asks for it must not be sent into the clear.
        let tls = vars.flag(&var::REDIS_TLS)?;
        if let Some(server) = &mut server {
            server.tls |= tls;
        }
        let settings = Settings::from_vars(vars)?;
        if !enabled {
            return Ok(None);
        }
        let Some(server) = server else {
            if settings.required {
                let reason = "needs REDIS_URL or REDIS_HOST";
                return Err(ConfigError::new(&var::REDIS_REQUIRED, "true", reason));
            }
            warnings.extend(parts_without_host(vars)?);
            return Ok(None);
        };
        settings.with(server).map(Some)
    }

    /// The password as it is now.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn current_password(&self) -> Result<Option<Secret>, String> {
        let Some(path) = &self.password_file else { return Ok(self.password.clone()) };
        let failed = |why: String| format!("REDIS_PASSWORD_FILE {}: {why}", path.display());
        let bytes = fs::read(path).map_err(|error| failed(error.to_string()))?;
        let password = String::from_utf8(secret::of_file(bytes));
        Ok(Some(Secret::new(password.map_err(|_| failed("not UTF-8".to_owned()))?)))
    }
}

/// What a URL can say: where Redis is and who we are there.
struct Server {
    host: String,
    port: u16,
    username: Option<String>,
    password: Option<Secret>,
    password_file: Option<PathBuf>,
    db: i64,
    tls: bool,
}

/// Everything that no URL says, read also when it is not needed, so that a bad value shows at once.
struct Settings {
    tls_ca: Option<PemFile>,
    tls_server_name: Option<String>,
    required: bool,
    key_prefix: String,
    timeout_ms: u64,
    connect_timeout_ms: u64,
    pool_size: usize,
}

impl Settings {
    fn from_vars(vars: &Vars<'_>) -> Result<Self, ConfigError> {
        Ok(Settings {
            tls_ca: tls_ca(vars)?,
            tls_server_name: vars.optional(&var::REDIS_TLS_SERVER_NAME, host)?,
            required: vars.flag(&var::REDIS_REQUIRED)?,
            key_prefix: key_prefix(vars)?,
            timeout_ms: vars.number(&var::REDIS_TIMEOUT_MS)?,
            connect_timeout_ms: vars.number(&var::REDIS_CONNECT_TIMEOUT_MS)?,
            pool_size: vars.number(&var::REDIS_POOL_SIZE)?,
        })
    }

    fn with(self, server: Server) -> Result<Redis, ConfigError> {
        if let Some(ca) = self.tls_ca.as_ref().filter(|_| !server.tls) {
            return Err(ConfigError::new(
                &var::REDIS_TLS_CA,
                &ca.path.to_string_lossy(),
                NEEDS_TLS,
            ));
        }
        if let Some(name) = self.tls_server_name.as_ref().filter(|_| !server.tls) {
            return Err(ConfigError::new(&var::REDIS_TLS_SERVER_NAME, name, NEEDS_TLS));
        }
        Ok(Redis {
            host: server.host,
            port: server.port,
            username: server.username,
            password: server.password,
            password_file: server.password_file,
            db: server.db,
            tls: server.tls,
            tls_ca: self.tls_ca,
            tls_server_name: self.tls_server_name,
            required: self.required,
            key_prefix: self.key_prefix,
            timeout: Duration::from_millis(self.timeout_ms),
            connect_timeout: Duration::from_millis(self.connect_timeout_ms),
            pool_size: self.pool_size,
        })
    }
}

impl Server {
    /// Nothing of `text` goes into an error: a password may stand anywhere in a URL that is wrong.
    fn from_url(variable: &Variable, text: &str) -> Result<Self, ConfigError> {
        let url = Url::read(text);
        let url = url.ok_or_else(|| ConfigError::new(variable, text, variable.allowed))?;
        let password = Some(url.password).filter(|password| !password.is_empty());
        let username = user(&url.username, password.is_some());
        // Mostly it is a password in the wrong place; it must not be shown as a user's name.
        let alone = "names a user without a password; a password alone is redis://:password@host";
        let username = username.ok_or_else(|| ConfigError::new(variable, text, alone))?;
        let password = password.map(Secret::new);
        let Url { host, port, db, tls, .. } = url;
        Ok(Server { host, port, username, password, password_file: None, db, tls })
    }

    fn from_parts(vars: &Vars<'_>) -> Result<Option<Self>, ConfigError> {
        let host = vars.optional(&var::REDIS_HOST, host)?;
        let port = vars.number(&var::REDIS_PORT)?;
        let password = vars.secret_text(&var::REDIS_PASSWORD)?;
        let username =
            vars.optional(&var::REDIS_USERNAME, |name| user(name, password.is_some()))?.flatten();
        let db = vars.number::<u32>(&var::REDIS_DB)?.into();
        let file = format!("{}_FILE", var::REDIS_PASSWORD.name);
        let password_file = vars.given(&file)?.map(PathBuf::from);
        let server =
            |host| Server { host, port, username, password, password_file, db, tls: false };
        Ok(host.map(server))
    }
}

/// The URL and the variable that holds it.
fn url(vars: &Vars<'_>) -> Result<Option<(&'static Variable, Secret)>, ConfigError> {
    for variable in [&var::REDIS_URL, &var::REDIS_URI] {
        if let Some(url) = vars.secret_text(variable)? {
            return Ok(Some((variable, url)));
        }
    }
    Ok(None)
}

/// The parts are not even looked into: Kubernetes puts a `REDIS_PORT=tcp://…` of its own beside a
/// service that is called redis.
fn ignored_parts(vars: &Vars<'_>, url: &Variable) -> Result<Option<String>, ConfigError> {
    let parts =
        [var::REDIS_HOST, var::REDIS_PORT, var::REDIS_USERNAME, var::REDIS_PASSWORD, var::REDIS_DB];
    let list = given_of(vars, &parts)?;
    Ok((!list.is_empty()).then(|| format!("{} is set, so these are ignored: {list}", url.name)))
}

/// Whoever sets one of these means to have a Redis; how it is used, the rest may say for the day that
/// there is one.
fn parts_without_host(vars: &Vars<'_>) -> Result<Option<String>, ConfigError> {
    let parts = [
        var::REDIS_PORT,
        var::REDIS_USERNAME,
        var::REDIS_PASSWORD,
        var::REDIS_DB,
        var::REDIS_TLS,
        var::REDIS_TLS_CA,
        var::REDIS_TLS_SERVER_NAME,
    ];
    let list = given_of(vars, &parts)?;
    Ok((!list.is_empty()).then(|| {
        format!(
            "neither REDIS_URL nor REDIS_HOST is set, so tokens are kept in memory and these are \
             ignored: {list}"
        )
    }))
}

/// Names those of the variables that are set, or whose `<NAME>_FILE` is.
fn given_of(vars: &Vars<'_>, variables: &[Variable]) -> Result<String, ConfigError> {
    let mut given = Vec::new();
    for variable in variables {
        let file = variable.is_secret().then(|| format!("{}_FILE", variable.name));
        for name in [Some(variable.name.to_owned()), file].into_iter().flatten() {
            if vars.given(&name)?.is_some() {
                given.push(name);
            }
        }
    }
    Ok(given.join(", "))
}

/// The parts of a URL, decoded; what is not there is empty or the default.
struct Url {
    tls: bool,
    host: String,
    port: u16,
    username: String,
    password: String,
    db: i64,
}

impl Url {
    /// `None` if anything in it is not understood.
    fn read(text: &str) -> Option<Url> {
        let url = redis::parse_redis_url(text)?;
        let tls = match url.scheme() {
            "redis" => false,
            "rediss" => true,
            _ => return None,
        };
        // SECURITY: elsewhere `#insecure` is leave not to check the server's name.
        if url.query().is_some() || url.fragment().is_some() {
            return None;
        }
        let decoded = |text| Some(percent_decode_str(text).decode_utf8().ok()?.into_owned());
        Some(Url {
            tls,
            host: host(url.host_str()?)?,
            port: Some(url.port().unwrap_or(6379)).filter(|port| *port != 0)?,
            username: decoded(url.username())?,
            password: decoded(url.password().unwrap_or_default())?,
            db: match url.path().trim_matches('/') {
                "" => 0,
                number => number.parse::<i32>().ok().filter(|db| *db >= 0)?.into(),
            },
        })
    }
}

/// A host name or an IP address; IPv6 may stand in brackets, which are taken off.
fn host(text: &str) -> Option<String> {
    let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    if let Ok(address) = inner.parse::<std::net::IpAddr>() {
        return (!address.is_unspecified()).then(|| inner.to_owned());
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    let is_name = (1..=253).contains(&text.len()) && text.bytes().all(allowed);
    is_name.then(|| text.to_owned())
}

/// The user to name in `AUTH`; nothing if a password is missing.
///
/// Where none is given, none is named: `AUTH <password>` means the user `default` where there are
/// ACLs, and is all that Redis 5 understands.
fn user(name: &str, has_password: bool) -> Option<Option<String>> {
    match (name, has_password) {
        ("", _) | ("default", false) => Some(None),
        (_, true) => Some(Some(name.to_owned())),
        (_, false) => None,
    }
}

fn key_prefix(vars: &Vars<'_>) -> Result<String, ConfigError> {
    let variable = &var::REDIS_KEY_PREFIX;
    let prefix = vars.set(variable.name)?.unwrap_or_else(|| variable.default.to_owned());
    if prefix.len() > 128 || prefix.chars().any(char::is_control) {
        return Err(ConfigError::new(variable, &prefix, variable.allowed));
    }
    Ok(prefix)
}

fn tls_ca(vars: &Vars<'_>) -> Result<Option<PemFile>, ConfigError> {
    let Some(path) = vars.optional_path(&var::REDIS_TLS_CA)? else { return Ok(None) };
    let pem = vars.contents(&var::REDIS_TLS_CA, &path)?;
    check_roots(&pem).map_err(|why| ConfigError::file(&var::REDIS_TLS_CA, &path, why))?;
    Ok(Some(PemFile { path, pem }))
}

/// Checks that rustls takes every certificate of the file as a root, and that there is one.
fn check_roots(pem: &[u8]) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    for (at, certificate) in certificates(pem)?.into_iter().enumerate() {
        let unreadable = |_| format!("certificate number {} in it cannot be read", at + 1);
        roots.add(certificate).map_err(unreadable)?;
    }
    Ok(())
}
