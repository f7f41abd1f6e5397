//! The table of environment variables: name, default, what is allowed, and what it means.
//!
//! Parsing, error messages, `--help` and `check-config` all read this one table, so a default or a
//! limit stands in one place. The comments say what each one costs and why the bounds are there.

use std::fmt;

/// One environment variable.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// What it is called.
    pub name: &'static str,
    /// What counts when it is unset or empty; itself empty if there is no default.
    pub default: &'static str,
    /// The values it may have.
    pub allowed: Allowed,
    /// One line for `--help`.
    pub help: &'static str,
}

/// What a value must be.
#[derive(Clone, Copy, Debug)]
pub enum Allowed {
    /// A whole number from the first to the second, both included.
    Number(u64, u64),
    /// `true` or `false`; also 1, yes, on, 0, no, off, in lower or upper case.
    Flag,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// Text of this description.
    Text(&'static str),
    /// The same, but the value is never shown, and `<NAME>_FILE` may name a file that holds it.
    Secret(&'static str),
}

impl Variable {
    /// True if the value is never shown and may come from `<NAME>_FILE`.
    pub fn is_secret(&self) -> bool {
        matches!(self.allowed, Allowed::Secret(_))
    }

    /// Its name, and of a secret that of the variable which names a file.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let file = self.is_secret().then(|| format!("{}_FILE", self.name));
        [Some(self.name.to_owned()), file].into_iter().flatten()
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Allowed::Number(min, max) => write!(f, "must be a whole number from {min} to {max}"),
            Allowed::Flag => f.write_str("must be true or false"),
            Allowed::OneOf(words) => write!(f, "must be one of {}", words.join(", ")),
            Allowed::Text(what) | Allowed::Secret(what) => write!(f, "must be {what}"),
        }
    }
}

macro_rules! variables {
    ($($(#[$cost:meta])* $name:ident = $default:literal, $allowed:expr, $help:literal;)*) => {
        $(
            #[doc = $help]
            #[doc = ""]
            $(#[$cost])*
            pub const $name: Variable = Variable {
                name: stringify!($name),
                default: $default,
                allowed: $allowed,
                help: $help,
            };
        )*
        /// Every variable, in the order of the table.
        pub const ALL: &[Variable] = &[$($name),*];
    };
}

use Allowed::{Flag, Number, OneOf, Secret, Text};

const API_KEY: Allowed = Secret("16 to 1024 visible ASCII characters, not beginning with mpl-");
const PEM_CERT: Allowed = Text("a readable PEM file with at least one certificate");
const REDIS_ADDRESS: Allowed = Secret(
    "redis:// or rediss://[[user]:password@]host[:port][/database] (or valkey://, valkeys://) without \
     ? and #, or unix:///path[?db=number&user=name&pass=password], special characters percent-encoded",
);

variables! {
    HTTP_HOST = "0.0.0.0", Text("an IP address or localhost"), "address to listen on";
    /// 0 (any free port) is refused: devices must know it.
    PORT = "3002", Number(1, 65_535), "port to listen on; HTTP_PORT is read if PORT is unset";
    HTTP_PORT = "3002", Number(1, 65_535), "the same, by its older name";
    TLS_CERT = "", PEM_CERT, "PEM file with our certificate chain: serve HTTPS";
    TLS_KEY = "", Text("a readable PEM file with the private key of TLS_CERT"), "PEM file with its private key";
    TLS = "", Text("auto"), "auto: serve HTTPS with a certificate of our own CA, made and renewed";
    TLS_NAMES = "", Text("DNS names and IP addresses, separated by commas"),
        "what it is for; unset: the machine's names and addresses";
    /// Each worker costs a lane: its own thread, one of a tiny_http server, one Redis connection.
    /// Two for all else and one that signs: on two processors a whole flow takes 230 µs of CPU so,
    /// and 270 with four, where a second that signs only splits the batches. One more, besides
    /// these, serves the CRL and lists of devices.
    WORKERS = "3", Number(1, 64), "threads that answer requests";
    /// A connection costs a descriptor and a few hundred bytes while it is idle.
    MAX_CONNECTIONS = "1024", Number(1, 65_536), "most connections of clients";
    /// Room for one address cannot starve the others of it.
    MAX_CONNECTIONS_PER_IP = "256", Number(1, 65_536), "most connections of one address";
    /// Must hold at least one largest request with its answer and TLS records; at most 1 GiB, which
    /// a 32-bit gateway can still count.
    MAX_BUFFER_BYTES = "8388608", Number(262_144, 1_073_741_824),
        "most bytes held for all clients, half for replies";
    /// A balancer that keeps a connection for 60 s must not find it closed when it uses it again; an
    /// idle connection costs its descriptor all that time.
    KEEP_ALIVE_SECONDS = "75", Number(1, 3_600), "longest pause between two requests of a connection";
    /// Small devices need 8 to 15 s for their part of it; whoever stalls holds a place as long.
    TLS_HANDSHAKE_SECONDS = "15", Number(1, 300), "longest time for a TLS handshake";
    TRUSTED_PROXIES = "", Text("IP addresses or CIDRs, separated by commas"),
        "proxies whose X-Forwarded-For is believed";
    PAGE = "on", OneOf(&["on", "off"]), "the page for browsers at /";
    ONBOARDING_RATE_LIMIT = "0", Number(0, 1_000_000), "onboardings a minute and client; 0: no limit";

    LOG_LEVEL = "info", OneOf(&["error", "warn", "info", "debug", "trace"]), "how much is logged";
    RUST_LOG = "", Text("a list of [target=]level"), "the same for each module; wins over LOG_LEVEL";
    LOG_FORMAT = "text", OneOf(&["text", "json"]), "text, or one JSON object a line";

    DATA_DIR = "./data", Text("a folder"), "folder of everything that is kept";
    CA_STORAGE_PATH = "$DATA_DIR/ca", Text("a folder"), "folder of the CA and the certificates";
    /// Beyond 100 years dates leave what some devices can read.
    ROOT_CA_VALIDITY_YEARS = "10", Number(1, 100), "lifetime of a CA that we make";
    /// A certificate never outlives the CA, whatever stands here.
    DEVICE_CERT_VALIDITY_DAYS = "90", Number(1, 36_500), "lifetime of a device's certificate";
    CRL_HOOK = "", Text("a program"), "program to run after each new CRL";

    /// A token costs memory here and in Redis for its whole lifetime, and its mark a minute more.
    PROVISIONING_TOKEN_TTL = "300", Number(1, 86_400), "lifetime of a token, in seconds";
    JWT_SECRET = "", Secret("at least 1 byte"), "secret that signs tokens; unset: made once";
    PROVISIONING_JWT_SECRET = "", Secret("at least 1 byte"), "read if JWT_SECRET is unset";
    /// A shorter key can be guessed; a longer one leaves no room in a request's head.
    ONBOARDING_API_KEY = "", API_KEY, "bearer key that onboarding asks for; unset: open";
    ADMIN_API_KEY = "", API_KEY, "bearer key of the admin endpoints; unset: disabled";
    ADMIN_API_KEYS = "", Secret("name:key lines, each name once, each key 16 to 1024 visible ASCII characters"),
        "further ones, one name:key a line";
    ENROLMENT = "", OneOf(&["open", "key", "registered"]),
        "who may onboard; unset: key if one is set, else open";
    /// Whoever shares an address with somebody who guesses waits with them, for two seconds a guess.
    AUTH_FAILURES = "30", Number(0, 1_000_000),
        "failed authentications a minute and client; 0: no limit";
    REENROLL = "deny", OneOf(&["deny", "allow"]), "onboard a device that has a certificate?";
    RENEW_REVOKES = "false", Flag, "revoke the old certificate on renewal?";
    RENEW_AFTER_EXPIRY_DAYS = "0", Number(0, 365), "days after its expiry that a certificate renews";
    /// What has ended costs its hundred bytes of memory here and six hundred in Redis, until it goes.
    RECORD_KEEP_DAYS = "90", Number(0, 36_500),
        "days that the record keeps what has ended";
    OUTAGE_REDEEM = "own", OneOf(&["own", "none"]), "tokens to redeem while Redis is away";
    /// Each costs its text, some 300 bytes, its hash and its place in the tables.
    MEMORY_MAX_TOKENS = "100000", Number(1, 10_000_000), "most tokens held in memory";

    REDIS_ENABLED = "true", Flag, "false: keep tokens in memory only";
    REDIS_URL = "", REDIS_ADDRESS, "where Redis is; wins over host, port, user, password, database";
    REDIS_URI = "", REDIS_ADDRESS, "read if REDIS_URL is unset";
    REDIS_HOST = "", Text("a host name or an IP address, without scheme and port, or a Unix socket's path"),
        "host of Redis, or its Unix socket";
    REDIS_PORT = "6379", Number(1, 65_535), "port of Redis";
    REDIS_USERNAME = "default", Text("a user name that has a REDIS_PASSWORD"), "ACL user";
    REDIS_PASSWORD = "", Secret("text"), "password, taken as it is";
    /// Redis counts databases in a C int.
    REDIS_DB = "0", Number(0, 2_147_483_647), "number of the database";
    REDIS_TLS = "false", Flag, "TLS also without rediss://";
    REDIS_TLS_CA = "", PEM_CERT, "PEM file of the only CAs to trust for Redis; unset: public ones";
    REDIS_TLS_CERT = "", PEM_CERT, "PEM file with our certificate, for a Redis that asks for one";
    REDIS_TLS_KEY = "", Text("a readable PEM file with the private key of REDIS_TLS_CERT"),
        "PEM file with its private key";
    REDIS_TLS_SERVER_NAME = "", Text("a host name or an IP address"),
        "name in the certificate of Redis, if it is not the host";
    REDIS_SENTINELS = "", Text("host[:port] of sentinels, separated by commas"),
        "who says where Redis is, in place of REDIS_URL or REDIS_HOST";
    REDIS_SENTINEL_MASTER = "mymaster", Text("a name without white space"), "what they call it";
    REDIS_SENTINEL_USERNAME = "default", Text("a user name that has a REDIS_SENTINEL_PASSWORD"),
        "ACL user at the sentinels";
    REDIS_SENTINEL_PASSWORD = "", Secret("text"), "password at the sentinels";
    /// With a connection of each worker to each master.
    REDIS_CLUSTER = "false", Flag,
        "Redis is a cluster, of which REDIS_URL or REDIS_HOST names nodes";
    /// Costs every onboarding and redemption while Redis is away.
    REDIS_REQUIRED = "false", Flag, "true: no answer rather than one from memory; the start waits";
    /// Each redemption waits for the slowest of them.
    REDIS_WAIT_REPLICAS = "0", Number(0, 16), "replicas that must have a redemption's mark";
    /// Stands in every key of every token, so each byte costs about three a token in Redis.
    REDIS_KEY_PREFIX = "mqtt-lite:", Text("at most 128 bytes without control characters"),
        "start of all our keys; set but empty: none";
    /// How long a request may hang on a dead Redis, until the first failure is noticed.
    REDIS_TIMEOUT_MS = "1000", Number(10, 60_000), "longest wait for an answer of Redis";
    /// How long a start may take when Redis is away.
    REDIS_CONNECT_TIMEOUT_MS = "2000", Number(10, 60_000), "longest wait for a connection to Redis";
    /// Managed free tiers allow 30 connections, and all our instances share them. A worker never
    /// uses two at once, and one is for sharing the record, so more than WORKERS and one are of no use.
    REDIS_POOL_SIZE = "4", Number(1, 64), "connections to Redis, one of them for the record";
    /// A certificate takes some 700 bytes in Redis, and on the disk of each instance.
    SHARE_RECORD = "true", Flag, "share certificates with the other instances on this Redis?";
}
