//! Where Redis is and how it is used: from a URL, or from its parts.

use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use rustls::RootCertStore;
use rustls::sign::CertifiedKey;

use super::secret::{self, Secret};
use super::tls::{self, certificates, certified_key};
use super::variables as var;
use super::variables::Variable;
use super::vars::{ConfigError, Vars, text_of};
use super::{TlsFault, TlsFiles};

const NEEDS_TLS: &str = "needs REDIS_TLS=true or a rediss:// URL";
const REDIS_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;
/// Longest path of a Unix socket: `sun_path` holds 107 bytes and an end.
const MAX_SOCKET_BYTES: usize = 107;

#[derive(Clone, Debug)]
pub struct Redis {
    pub at: Place,
    /// Who we are there.
    pub login: Login,
    pub db: i64,
    pub tls: Option<RedisTls>,
    /// No memory: while Redis is away nothing is issued or redeemed.
    pub required: bool,
    /// So many replicas must have the mark of a redemption before it is granted.
    pub wait_replicas: u64,
    /// What all our keys start with.
    pub key_prefix: String,
    pub timeout: Duration,
    /// Longest wait for a connection, name resolution included.
    pub connect_timeout: Duration,
    /// Connections held, one of them for what instances share.
    pub pool_size: usize,
    /// Certificates and revocations are shared, too.
    pub share_record: bool,
}

#[derive(Clone, Debug)]
pub enum Place {
    Host(HostPort),
    Socket(PathBuf),
    Sentinels(Sentinels),
    /// Where the nodes of a cluster say that its masters are; these are asked first.
    Cluster(Vec<HostPort>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// Name or IP address, without brackets.
    pub host: String,
    pub port: u16,
}

/// Who knows where Redis is.
#[derive(Clone, Debug)]
pub struct Sentinels {
    /// At least one; the others are learnt from it.
    pub known: Vec<HostPort>,
    /// What they call the servers that they watch for us.
    pub master: String,
    pub login: Login,
}

/// Who we are to a server; nobody by default.
#[derive(Clone, Debug, Default)]
pub struct Login {
    /// ACL user; `None` with a password: `AUTH <password>`, as servers without ACLs need it.
    pub username: Option<String>,
    /// Password, as it was at the start.
    pub password: Option<Secret>,
    /// Where it stands, to be read again for each connection: passwords are changed.
    pub password_file: Option<PathBuf>,
}

/// How TLS is spoken. The files are read again for new connections: certificates are replaced.
#[derive(Clone, Debug)]
pub struct RedisTls {
    /// The only roots to trust; `None`: the built-in public ones.
    pub ca: Option<PathBuf>,
    pub own: Option<TlsFiles>,
    /// The name that the server's certificate must bear, if it is not the host.
    pub server_name: Option<String>,
}

impl Redis {
    /// Reads all `REDIS_…` variables; `None` if Redis is not to be used. Each is read also when it is
    /// not needed, so that a bad value shows at once.
    pub(super) fn from_vars(vars: &Vars<'_>) -> Result<Option<Redis>, ConfigError> {
        let enabled = vars.flag(&var::REDIS_ENABLED)?;
        let Server { at, login, db, tls: by_url } = Server::from_vars(vars)?;
        let is_a_redis = enabled && at.is_some();
        // The URL may only add TLS: whoever asks for it must not be sent into the clear.
        let spoken = vars.flag(&var::REDIS_TLS)? || by_url;
        let redis = Redis {
            // Nowhere, if none is named: it is not used then.
            at: at.unwrap_or(Place::Cluster(Vec::new())),
            login,
            db,
            tls: tls(vars, spoken, is_a_redis)?,
            required: vars.flag(&var::REDIS_REQUIRED)?,
            wait_replicas: vars.number(&var::REDIS_WAIT_REPLICAS)?,
            key_prefix: key_prefix(vars)?,
            timeout: Duration::from_millis(vars.number(&var::REDIS_TIMEOUT_MS)?),
            connect_timeout: Duration::from_millis(vars.number(&var::REDIS_CONNECT_TIMEOUT_MS)?),
            pool_size: vars.number(&var::REDIS_POOL_SIZE)?,
            share_record: vars.flag(&var::SHARE_RECORD)?,
        };
        let is_cluster = vars.flag(&var::REDIS_CLUSTER)?;
        match () {
            () if is_a_redis => redis.check(is_cluster)?,
            () if enabled => redis.check_without_place(is_cluster, vars)?,
            () => {}
        }
        Ok(is_a_redis.then_some(redis))
    }

    /// What does not go together. A cluster has no numbered databases; and braces in the prefix would be
    /// taken for a hash tag, which is to be the device's.
    fn check(&self, is_cluster: bool) -> Result<(), ConfigError> {
        let db = self.db.to_string();
        let (variable, value, reason) = match &self.at {
            Place::Socket(_) if self.tls.is_some() => (
                &var::REDIS_TLS,
                "true",
                "must be false for a Unix socket, over which Redis speaks no TLS",
            ),
            Place::Socket(_) if is_cluster => (
                &var::REDIS_CLUSTER,
                "true",
                "must be false for a Unix socket, since its nodes are at TCP ports",
            ),
            Place::Cluster(_) if self.db != 0 => {
                (&var::REDIS_DB, &*db, "must be 0 when REDIS_CLUSTER is set")
            }
            Place::Cluster(_) if self.key_prefix.contains(['{', '}']) => {
                let reason = "must have no braces when REDIS_CLUSTER is set";
                (&var::REDIS_KEY_PREFIX, &*self.key_prefix, reason)
            }
            // Another kind of place has to say what these mean for it.
            Place::Host(_) | Place::Socket(_) | Place::Sentinels(_) | Place::Cluster(_) => {
                return Ok(());
            }
        };
        Err(ConfigError::new(variable, value, reason))
    }

    /// Whoever sets one of these means to have a Redis; how it is used, the rest may say for the day that
    /// there is one.
    fn check_without_place(&self, is_cluster: bool, vars: &Vars<'_>) -> Result<(), ConfigError> {
        let parts = [
            var::REDIS_PORT,
            var::REDIS_USERNAME,
            var::REDIS_PASSWORD,
            var::REDIS_DB,
            var::REDIS_TLS,
            var::REDIS_TLS_CA,
            var::REDIS_TLS_CERT,
            var::REDIS_TLS_SERVER_NAME,
        ];
        let needs = |variable, what| Err(ConfigError::new(variable, "true", what));
        match given_of(vars, &parts)? {
            _ if is_cluster => needs(&var::REDIS_CLUSTER, "needs REDIS_URL or REDIS_HOST"),
            _ if self.required => {
                needs(&var::REDIS_REQUIRED, "needs REDIS_URL, REDIS_HOST or REDIS_SENTINELS")
            }
            list if !list.is_empty() => {
                vars.warn(format!(
                    "neither REDIS_URL nor REDIS_HOST is set, so tokens are kept in memory and these \
                     are ignored: {list}"
                ));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// What counts, where the URL or a default has said it.
    pub(super) fn show(&self, vars: &Vars<'_>) {
        vars.show(&var::REDIS_TLS, self.tls.is_some());
        vars.show(&var::REDIS_DB, self.db);
        let set = if self.login.password.is_some() { "(set)" } else { "(unset)" };
        vars.show(&var::REDIS_PASSWORD, set);
        let username = self.login.username.as_deref();
        vars.show(&var::REDIS_USERNAME, username.unwrap_or(var::REDIS_USERNAME.default));
        match &self.at {
            Place::Host(at) => {
                vars.show(&var::REDIS_HOST, &at.host);
                vars.show(&var::REDIS_PORT, at.port);
            }
            Place::Socket(path) => vars.show(&var::REDIS_HOST, path.display()),
            Place::Sentinels(_) | Place::Cluster(_) => {}
        }
    }
}

impl Login {
    fn from_vars(vars: &Vars<'_>, user: &Variable, word: &Variable) -> Result<Self, ConfigError> {
        let password = vars.secret_text(word)?;
        let username = vars.optional(user, |name| username(name, password.is_some()))?.flatten();
        let password_file = vars.given(&format!("{}_FILE", word.name))?.map(PathBuf::from);
        Ok(Login { username, password, password_file })
    }

    pub fn current_password(&self) -> Result<Option<Secret>, String> {
        let Some(path) = &self.password_file else { return Ok(self.password.clone()) };
        let password = String::from_utf8(secret::of_file(read(path)?));
        let not_text = |_| format!("{}: the password in it is not UTF-8", path.display());
        Ok(Some(Secret::new(password.map_err(not_text)?)))
    }
}

impl RedisTls {
    pub fn read_roots(&self) -> Result<Option<RootCertStore>, String> {
        let Some(path) = &self.ca else { return Ok(None) };
        roots(&read(path)?).map(Some).map_err(|why| format!("REDIS_TLS_CA={path:?}: {why}"))
    }

    pub fn read_certificate(&self) -> Result<Option<Arc<CertifiedKey>>, String> {
        let Some(TlsFiles { cert, key }) = &self.own else { return Ok(None) };
        let own = certified_key(&read(cert)?, &read(key)?).map_err(|fault| match fault {
            TlsFault::Certificate(why) => format!("REDIS_TLS_CERT={cert:?}: {why}"),
            TlsFault::Key(why) => format!("REDIS_TLS_KEY={key:?}: {why}"),
        });
        own.map(Some)
    }
}

impl Sentinels {
    fn from_vars(vars: &Vars<'_>) -> Result<Option<Self>, ConfigError> {
        let known = vars.optional(&var::REDIS_SENTINELS, |text| nodes(text, SENTINEL_PORT))?;
        let is_name = |name: &str| !name.contains(char::is_whitespace);
        let master = vars
            .parsed(&var::REDIS_SENTINEL_MASTER, |name| is_name(name).then(|| name.to_owned()))?;
        let (user, word) = (&var::REDIS_SENTINEL_USERNAME, &var::REDIS_SENTINEL_PASSWORD);
        let login = Login::from_vars(vars, user, word)?;
        Ok(known.map(|known| Sentinels { known, master, login }))
    }
}

impl HostPort {
    /// `host`, `host:port`, or an IPv6 address in brackets with a port or without.
    fn parse(text: &str, default_port: u16) -> Option<Self> {
        let (name, port) = match text.rsplit_once(':') {
            // An IPv6 address without brackets has no port.
            Some((name, port)) if !name.contains(':') || name.ends_with(']') => (name, Some(port)),
            _ => (text, None),
        };
        let port = port.map_or(Some(default_port), |port| port.parse().ok().filter(|p| *p != 0))?;
        Some(HostPort { host: host(name)?, port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// What a URL can say: where Redis is and who we are there.
struct Server {
    at: Option<Place>,
    login: Login,
    db: i64,
    tls: bool,
}

impl Server {
    fn from_vars(vars: &Vars<'_>) -> Result<Self, ConfigError> {
        let sentinels = Sentinels::from_vars(vars)?;
        let is_cluster = vars.flag(&var::REDIS_CLUSTER)?;
        let url = vars.first_secret([&var::REDIS_URL, &var::REDIS_URI])?;
        let (variable, server) = match url {
            Some((variable, url)) => {
                warn_of_ignored_parts(vars, variable)?;
                let url = text_of(variable, url)?;
                (variable, Server::from_url(variable, url.reveal(), is_cluster)?)
            }
            None => (&var::REDIS_HOST, Server::from_parts(vars, is_cluster)?),
        };
        match (&server.at, sentinels) {
            (Some(_), Some(_)) => Err(beside_sentinels(vars, variable)),
            (None, Some(_)) if is_cluster => Err(beside_sentinels(vars, &var::REDIS_CLUSTER)),
            (None, Some(sentinels)) => {
                Ok(Server { at: Some(Place::Sentinels(sentinels)), ..server })
            }
            (_, None) => Ok(server),
        }
    }

    /// Nothing of `text` goes into an error: a password may stand anywhere in a URL that is wrong.
    fn from_url(variable: &Variable, text: &str, is_cluster: bool) -> Result<Self, ConfigError> {
        let read = read_url(text.trim(), is_cluster);
        let (mut server, user) =
            read.ok_or_else(|| ConfigError::new(variable, text, variable.allowed))?;
        // Mostly it is a password in the wrong place; it must not be shown as a user's name.
        let alone = "names a user without a password; a password alone is redis://:password@host";
        let username = username(&user, server.login.password.is_some());
        server.login.username = username.ok_or_else(|| ConfigError::new(variable, text, alone))?;
        Ok(server)
    }

    fn new(at: Place, password: &str) -> Self {
        let password = Some(password).filter(|password| !password.is_empty());
        let password = password.map(|password| Secret::new(password.to_owned()));
        Server { at: Some(at), login: Login { password, ..Login::default() }, db: 0, tls: false }
    }

    fn from_parts(vars: &Vars<'_>, is_cluster: bool) -> Result<Self, ConfigError> {
        let port = vars.number(&var::REDIS_PORT)?;
        let at = vars.optional(&var::REDIS_HOST, |text| match text.starts_with('/') {
            true => socket(text),
            false if is_cluster => nodes(text, port).map(Place::Cluster),
            false => Some(Place::Host(HostPort { host: host(text)?, port })),
        })?;
        let login = Login::from_vars(vars, &var::REDIS_USERNAME, &var::REDIS_PASSWORD)?;
        let db = vars.number::<u32>(&var::REDIS_DB)?.into();
        Ok(Server { at, login, db, tls: false })
    }
}

/// Servers with commas between.
fn nodes(text: &str, default_port: u16) -> Option<Vec<HostPort>> {
    text.split(',').map(|item| HostPort::parse(item.trim(), default_port)).collect()
}

fn beside_sentinels(vars: &Vars<'_>, variable: &Variable) -> ConfigError {
    let given = vars.given(var::REDIS_SENTINELS.name).ok().flatten().unwrap_or_default();
    let reason = format!("must be unset when {} is set", variable.name);
    ConfigError::new(&var::REDIS_SENTINELS, &given, reason)
}

/// The URL wins: the parts are not even looked into.
fn warn_of_ignored_parts(vars: &Vars<'_>, url: &Variable) -> Result<(), ConfigError> {
    let parts =
        [var::REDIS_HOST, var::REDIS_PORT, var::REDIS_USERNAME, var::REDIS_PASSWORD, var::REDIS_DB];
    let list = given_of(vars, &parts)?;
    if !list.is_empty() {
        vars.warn(format!("{} is set, so these are ignored: {list}", url.name));
    }
    Ok(())
}

/// Names those of the variables that are set, or whose `<NAME>_FILE` is.
fn given_of(vars: &Vars<'_>, variables: &[Variable]) -> Result<String, ConfigError> {
    let mut given = Vec::new();
    for name in variables.iter().flat_map(Variable::names) {
        if vars.given(&name)?.is_some() {
            given.push(name);
        }
    }
    Ok(given.join(", "))
}

/// What a URL says, and the user's name, empty if there is none. `None` if anything in it is not
/// understood.
fn read_url(text: &str, is_cluster: bool) -> Option<(Server, String)> {
    let (scheme, rest) = text.split_once("://")?;
    // SECURITY: elsewhere `#insecure` is leave not to check the server's name.
    if rest.contains('#') {
        return None;
    }
    let tls = match scheme.to_ascii_lowercase().as_str() {
        "redis" | "valkey" => false,
        "rediss" | "valkeys" => true,
        "unix" | "redis+unix" => return read_socket_url(rest),
        _ => return None,
    };
    let (login, rest) = rest.rsplit_once('@').unwrap_or(("", rest));
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let (hosts, db) = rest.split_once('/').unwrap_or((rest, ""));
    let at = match is_cluster {
        true => Place::Cluster(nodes(hosts, REDIS_PORT)?),
        false => Place::Host(HostPort::parse(hosts, REDIS_PORT)?),
    };
    let db = if db.is_empty() { 0 } else { database(db)? };
    let is_encoded = !login.contains(['/', '?']);
    let server = Server { db, tls, ..Server::new(at, &decoded(password)?) };
    is_encoded.then_some((server, decoded(user)?))
}

fn read_socket_url(text: &str) -> Option<(Server, String)> {
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    let (mut user, mut password, mut db) = (None, None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=')? {
            ("db", number) if db.is_none() => db = Some(database(number)?),
            ("user", name) if user.is_none() => user = Some(decoded(name)?),
            ("pass", word) if password.is_none() => password = Some(decoded(word)?),
            _ => return None,
        }
    }
    let server = Server::new(socket(&decoded(path)?)?, &password.unwrap_or_default());
    Some((Server { db: db.unwrap_or(0), ..server }, user.unwrap_or_default()))
}

fn decoded(text: &str) -> Option<String> {
    Some(percent_decode_str(text).decode_utf8().ok()?.into_owned())
}

fn database(text: &str) -> Option<i64> {
    text.parse::<i32>().ok().filter(|db| *db >= 0).map(i64::from)
}

/// The path of a Unix socket.
fn socket(path: &str) -> Option<Place> {
    let fits = path.starts_with('/') && path.len() <= MAX_SOCKET_BYTES && !path.contains('\0');
    fits.then(|| Place::Socket(PathBuf::from(path)))
}

/// A host name or an IP address; IPv6 may stand in brackets, which are taken off.
fn host(text: &str) -> Option<String> {
    let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    if let Ok(address) = inner.parse::<IpAddr>() {
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
fn username(name: &str, has_password: bool) -> Option<Option<String>> {
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
    vars.show(variable, &prefix);
    Ok(prefix)
}

/// Checks what the files hold; `None` if TLS is not `spoken`. What is of no use then is refused if
/// there `is_a_redis`.
fn tls(vars: &Vars<'_>, spoken: bool, is_a_redis: bool) -> Result<Option<RedisTls>, ConfigError> {
    let ca = vars.optional_path(&var::REDIS_TLS_CA)?;
    if let Some(path) = &ca {
        let pem = vars.contents(&var::REDIS_TLS_CA, path)?;
        roots(&pem).map_err(|why| ConfigError::file(&var::REDIS_TLS_CA, path, why))?;
    }
    let own = tls::files(vars, &var::REDIS_TLS_CERT, &var::REDIS_TLS_KEY)?;
    if let Some(files) = &own {
        tls::read(vars, &var::REDIS_TLS_CERT, &var::REDIS_TLS_KEY, files)?;
    }
    let server_name = vars.optional(&var::REDIS_TLS_SERVER_NAME, host)?;
    let of_use = [&var::REDIS_TLS_CA, &var::REDIS_TLS_CERT, &var::REDIS_TLS_SERVER_NAME];
    for variable in of_use.into_iter().filter(|_| is_a_redis && !spoken) {
        if let Some(value) = vars.given(variable.name)? {
            return Err(ConfigError::new(variable, &value, NEEDS_TLS));
        }
    }
    Ok(spoken.then_some(RedisTls { ca, own, server_name }))
}

/// Every certificate of the file, of which there is at least one, as a root.
fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for (at, certificate) in certificates(pem)?.into_iter().enumerate() {
        let unreadable = |_| format!("certificate number {} in it cannot be read", at + 1);
        roots.add(certificate).map_err(unreadable)?;
    }
    Ok(roots)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}
