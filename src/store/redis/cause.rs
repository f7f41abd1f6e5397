//! Why a server cannot be used, in words for the log: where it is, what is wrong, which setting
//! mends it; never a password or a token.

use std::fmt;
use std::io;

use redis::{ServerError, ServerErrorKind};
use rustls::{AlertDescription, CertificateError};

use crate::socket::is_late;
use crate::store::{Down, DownKind, StoreError};

/// How far a connection had come when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    LookUp,
    Connect,
    Handshake,
    /// The first answer.
    Login,
    Greeting,
    Service,
}

/// A server, as the configuration names it.
#[derive(Debug)]
pub(super) struct Server {
    /// Host and port, or the path of a socket.
    pub name: String,
    /// The host alone, by which TLS knows it.
    pub host: String,
    pub tls: bool,
}

impl Server {
    /// It cannot be used, or not any more; nothing more is read from the connection.
    pub fn lost(&self, why: impl fmt::Display, maybe_done: bool) -> Down {
        let why = format!("{}: {why}", self.name).replace(['\n', '\r'], " ");
        Down { why: why.into(), kind: DownKind::Lost, lasting: false, maybe_done }
    }

    /// Reading, writing, or what comes before them, has failed.
    pub fn failed(&self, error: &io::Error, stage: Stage) -> Down {
        let (why, lasting) = io_cause(error, stage, self.tls);
        Down { lasting, ..self.lost(why, stage == Stage::Service) }
    }

    /// It cannot be used until somebody changes something.
    pub fn unusable(&self, why: impl fmt::Display) -> Down {
        Down { lasting: true, ..self.lost(why, false) }
    }

    /// What came is no answer of Redis.
    pub fn misspoke(&self, stage: Stage) -> Down {
        let hint = if self.tls { "" } else { ", does the server want TLS?" };
        let down = self.lost(format!("no answer of Redis{hint}"), stage == Stage::Service);
        Down { lasting: true, ..down }
    }

    /// What the server's error to `command` means. `WRONGTYPE` is the fault of one key; with any
    /// other the server says that it does not serve, or not us.
    pub fn refused(&self, error: &ServerError, command: &str) -> StoreError {
        // SECURITY: what is cut off are words of the command, a token perhaps.
        let detail = error.details().unwrap_or_default();
        let detail = detail.split(", with args beginning").next().unwrap_or_default();
        let said = format!("{} {detail}", error.code()).trim_end().to_owned();
        let down = self.lost(refusal_cause(&said, command), false);
        if said.contains("WRONGTYPE") {
            return StoreError::Failed(down.why.to_string());
        }
        let read_only =
            error.kind() == Some(ServerErrorKind::ReadOnly) || said.contains("READONLY");
        let kind = if read_only { DownKind::ReadOnly } else { DownKind::Refused };
        let lasting = !PASSING.iter().any(|passing| said.contains(passing));
        StoreError::Down(Down { kind, lasting, ..down })
    }
}

/// Refusals that end by themselves. Of the others (a wrong password, a missing right, a replica, a
/// server of another kind) somebody has to know.
const PASSING: [&str; 9] = [
    "LOADING",
    "OOM",
    "BUSY",
    "MISCONF",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "TRYAGAIN",
    "NOREPLICAS",
    "max number of clients",
];

fn refusal_cause(said: &str, command: &str) -> String {
    if said.starts_with("WRONGPASS") || said.contains("invalid password") {
        format!("wrong user name or password? {said}")
    } else if said.starts_with("NOAUTH") {
        format!("it wants a password: {said}")
    } else if said.starts_with("NOPERM") {
        format!(
            "{command} is not allowed, docs/redis.md has the rights that its user needs: {said}"
        )
    } else {
        said.to_owned()
    }
}

/// The cause, and whether it lasts.
fn io_cause(error: &io::Error, stage: Stage, tls: bool) -> (String, bool) {
    if let Some(error) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        return (tls_cause(error), true);
    }
    let late = is_late(error);
    let said = if late { "no answer in time".to_owned() } else { error.to_string() };
    let ended = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    );
    let refused = error.kind() == io::ErrorKind::ConnectionRefused;
    let why = match stage {
        Stage::LookUp if late => "its name is still being looked up".to_owned(),
        Stage::LookUp => format!("the name was not found: {said}"),
        Stage::Connect if refused => "connection refused".to_owned(),
        Stage::Connect if error.kind() == io::ErrorKind::NotFound => {
            "there is no such socket, is Redis running, with its unixsocket there?".to_owned()
        }
        Stage::Connect if error.kind() == io::ErrorKind::PermissionDenied => {
            "not allowed to open its socket, see its unixsocketperm".to_owned()
        }
        Stage::Handshake => format!("TLS failed, is this a plain port? {said}"),
        Stage::Login if ended && !tls => {
            "no answer of Redis, does the server want TLS? It has closed the connection".to_owned()
        }
        Stage::Greeting if ended => {
            "connection closed at the greeting, by a proxy that knows no INFO?".to_owned()
        }
        _ if ended => "connection closed".to_owned(),
        _ => said,
    };
    (why, false)
}

fn tls_cause(error: &rustls::Error) -> String {
    let cause = match error {
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "it wants a client certificate, see REDIS_TLS_CERT"
        }
        rustls::Error::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRevoked
            | AlertDescription::UnsupportedCertificate,
        ) => "it does not take our certificate, see REDIS_TLS_CERT",
        // The second where the trusted CA has the name of its issuer, but another key.
        rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "its certificate is of a CA that is not trusted, see REDIS_TLS_CA",
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "its certificate is for another name",
        rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "its certificate has expired, or the clock is wrong",
        rustls::Error::InvalidCertificate(other) => return certificate_cause(other),
        rustls::Error::InvalidMessage(_) => "TLS failed, is this a plain port?",
        _ => "TLS failed",
    };
    let separator = if cause.ends_with('?') { " " } else { ": " };
    format!("{cause}{separator}{error}")
}

/// What rustls passes on from webpki by its names alone.
fn certificate_cause(error: &CertificateError) -> String {
    let said = format!("{error:?}");
    let plain = [
        (
            "CaUsedAsEndEntity",
            "its certificate is one of a CA (CA:TRUE), which no server may show: have that CA sign one \
             for it, or make it with CA:FALSE",
        ),
        (
            "UnsupportedCertVersion",
            "its certificate is of X.509 version 1: make it anew with a subjectAltName, which makes it \
             version 3",
        ),
    ];
    let known = plain.iter().find(|(name, _)| said.contains(name));
    known.map_or_else(
        || format!("its certificate is refused: {error}"),
        |(_, why)| (*why).to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use redis::Value;

    #[test]
    fn words_of_a_command_stay_out_of_the_log() {
        let reply = "-ERR unknown command 'SET', with args beginning with: 'token:eyJh' 'x'\r\n";
        let Ok(Value::ServerError(error)) = redis::parse_redis_value(reply.as_bytes()) else {
            panic!("an error reply");
        };
        let server = Server { name: "h:1".to_owned(), host: "h".to_owned(), tls: false };
        let said = server.refused(&error, "SET").to_string();
        assert_eq!(said, "h:1: ERR unknown command 'SET'");
    }
}
