//! Certificates and keys in PEM files, and what is wrong with those that cannot be used.
//!
//! TLS libraries skip what they do not understand, such as a certificate behind a byte order mark,
//! and refuse the rest in words of their own (`UnsupportedCertVersion`). Whoever made a file is told
//! here what is wrong with it and what makes it right.

use std::net::IpAddr;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer,
};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{Error, InconsistentKeys, SignatureAlgorithm};

use super::TlsFiles;
use super::variables::{self as var, Variable};
use super::vars::{ConfigError, Vars};
use crate::pem::{self, Block};

/// Which of the two files is at fault, and why.
#[derive(Debug, PartialEq, Eq)]
pub enum TlsFault {
    Certificate(String),
    Key(String),
}

/// The names with which `TLS=auto` has a certificate made.
pub(super) fn auto_names(vars: &Vars<'_>) -> Result<Option<Vec<String>>, ConfigError> {
    let is_auto =
        vars.optional(&var::TLS, |text| text.eq_ignore_ascii_case("auto").then_some(()))?;
    match (is_auto, vars.optional(&var::TLS_NAMES, names)?) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(ConfigError::bare(var::TLS_NAMES.name, "needs TLS=auto")),
        (Some(()), names) => Ok(Some(names.unwrap_or_default())),
    }
}

/// The files of what we show over HTTPS, if we serve that.
pub(super) fn served(vars: &Vars<'_>, is_auto: bool) -> Result<Option<TlsFiles>, ConfigError> {
    let files = files(vars, &var::TLS_CERT, &var::TLS_KEY)?;
    if !is_auto {
        return Ok(files);
    }
    if files.is_some() {
        return Err(ConfigError::new(&var::TLS, "auto", "must be unset when TLS_CERT is set"));
    }
    let dir = vars.path(&var::DATA_DIR)?.join("tls");
    Ok(Some(TlsFiles { cert: dir.join("server.crt"), key: dir.join("server.key") }))
}

fn names(text: &str) -> Option<Vec<String>> {
    text.split(',').map(|name| server_name(name.trim())).collect()
}

/// A DNS name as it stands there, or an IP address as it is always written; of all else nothing.
pub fn server_name(text: &str) -> Option<String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Some(address.to_string()),
        Err(_) => is_dns_name(text).then(|| text.to_owned()),
    }
}

/// The files of a certificate and its key, which are named by these variables or not at all.
pub(super) fn files(
    vars: &Vars<'_>,
    cert: &Variable,
    key: &Variable,
) -> Result<Option<TlsFiles>, ConfigError> {
    let missing = |lacks: &Variable, has: &Variable| {
        Err(ConfigError::bare(lacks.name, format!("must be set when {} is set", has.name)))
    };
    match (vars.optional_path(cert)?, vars.optional_path(key)?) {
        (Some(cert), Some(key)) => Ok(Some(TlsFiles { cert, key })),
        (None, None) => Ok(None),
        (Some(_), None) => missing(key, cert),
        (None, Some(_)) => missing(cert, key),
    }
}

pub(super) fn read(
    vars: &Vars<'_>,
    cert: &Variable,
    key: &Variable,
    files: &TlsFiles,
) -> Result<Arc<CertifiedKey>, ConfigError> {
    let (pem, key_pem) = (vars.contents(cert, &files.cert)?, vars.contents(key, &files.key)?);
    certified_key(&pem, &key_pem).map_err(|fault| match fault {
        TlsFault::Certificate(why) => ConfigError::file(cert, &files.cert, why),
        TlsFault::Key(why) => ConfigError::file(key, &files.key, why),
    })
}

/// What a server shows, from the contents of two PEM files; or the first fault of the certificates, else
/// of the key, else of the two together.
pub fn certified_key(cert: &[u8], key: &[u8]) -> Result<Arc<CertifiedKey>, TlsFault> {
    let chain = certificates(cert).map_err(TlsFault::Certificate)?;
    let key = signing_key(key).map_err(TlsFault::Key)?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        // That the two cannot be compared is no sign that they do not match.
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(Arc::new(certified)),
        Err(error) => Err(why_unusable(&certified, &error)),
    }
}

/// All certificates of a PEM file, at least one.
pub fn certificates(file: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = pem::text(file).ok_or_else(|| not_pem(file, "openssl x509 -inform DER"))?;
    let blocks = pem::blocks(&text).ok_or(NOT_WHOLE)?;
    let is_certificate = |block: &&Block<'_>| block.label == "CERTIFICATE";
    let found: Vec<_> =
        blocks.iter().filter(is_certificate).map(|b| CertificateDer::from(b.der.clone())).collect();
    if found.is_empty() {
        return Err(format!("holds no CERTIFICATE in PEM, {}", labels(&blocks)));
    }
    Ok(found)
}

/// Whether it is a host's name as certificates have it, its first label perhaps `*`.
pub fn is_dns_name(name: &str) -> bool {
    let label = |l: &str| {
        let inner = l.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        (1..=63).contains(&l.len()) && inner && !l.starts_with('-') && !l.ends_with('-')
    };
    let host = name.strip_prefix("*.").unwrap_or(name);
    // What ends in a number is an address, mistyped here (RFC 1123, 2.1).
    let is_number = |l: &str| l.bytes().all(|b| b.is_ascii_digit());
    host.len() <= 253
        && host.split('.').all(label)
        && !host.rsplit('.').next().is_some_and(is_number)
}

fn signing_key(file: &[u8]) -> Result<Arc<dyn SigningKey>, String> {
    let text = pem::text(file).ok_or_else(|| not_pem(file, "openssl pkey -inform DER"))?;
    if text.contains("ENCRYPTED") {
        return Err(
            "is encrypted, and nobody is there to type its pass phrase when a server starts: \
                    openssl pkey -in FILE -out NEW makes a copy without"
                .to_owned(),
        );
    }
    let blocks = pem::blocks(&text).ok_or(NOT_WHOLE)?;
    let key = blocks.iter().find_map(private_key);
    let key = key.ok_or_else(|| format!("holds no PRIVATE KEY in PEM, {}", labels(&blocks)))?;
    ring::sign::any_supported_type(&key).map_err(|_| {
        "holds a key that TLS cannot use here: make one of ECDSA P-256 or P-384, Ed25519, or RSA \
         2048 to 4096"
            .to_owned()
    })
}

/// The private key of a block, if its label says so.
pub fn private_key(block: &Block<'_>) -> Option<PrivateKeyDer<'static>> {
    let der = block.der.clone();
    match block.label {
        "PRIVATE KEY" => Some(PrivatePkcs8KeyDer::from(der).into()),
        "RSA PRIVATE KEY" => Some(PrivatePkcs1KeyDer::from(der).into()),
        "EC PRIVATE KEY" => Some(PrivateSec1KeyDer::from(der).into()),
        _ => None,
    }
}

/// What the operator should know of a key that works.
pub(super) fn warning(shown: &CertifiedKey) -> Option<String> {
    let bits = rsa_bits(shown).filter(|bits| *bits > 2048)?;
    Some(format!(
        "TLS_KEY is an RSA key of {bits} bits, with which each TLS handshake takes 5 ms of a fast \
         processor and 100 of a slow one: ECDSA P-256 takes a fiftieth, RSA 2048 a fifth"
    ))
}

/// About how many bits an RSA key has; `None` for another kind.
fn rsa_bits(shown: &CertifiedKey) -> Option<usize> {
    // In DER the public key is the modulus and 38 bytes around it.
    let modulus = shown.key.public_key()?.len().checked_sub(38)?;
    (shown.key.algorithm() == SignatureAlgorithm::RSA).then_some(modulus / 32 * 256)
}

const NOT_WHOLE: &str = "holds a PEM block that is not whole: base64 between its lines -----BEGIN \
                         and -----END";

fn not_pem(file: &[u8], convert: &str) -> String {
    if pem::is_der(file) {
        return format!("is DER, not PEM: {convert} -in FILE -out NEW converts it");
    }
    "is no PEM text: save it as UTF-8, not as UTF-16".to_owned()
}

fn labels(blocks: &[Block<'_>]) -> String {
    match blocks.iter().map(|block| block.label).collect::<Vec<_>>() {
        labels if labels.is_empty() => "nor anything else".to_owned(),
        labels => format!("only: {}", labels.join(", ")),
    }
}

fn why_unusable(certified: &CertifiedKey, error: &Error) -> TlsFault {
    if matches!(error, Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) {
        let own = |der: &CertificateDer<'static>| {
            CertifiedKey::new(vec![der.clone()], Arc::clone(&certified.key)).keys_match().is_ok()
        };
        return match certified.cert.iter().position(own) {
            Some(at) => TlsFault::Certificate(format!(
                "must begin with the server's own certificate, which is number {} in it; then its chain",
                at + 1
            )),
            None => {
                let why = "is not the key of the first certificate beside it: take the pair that was \
                           made together";
                TlsFault::Key(why.to_owned())
            }
        };
    }
    // webpki's own name for it, which rustls passes on as it is.
    if error.to_string().contains("UnsupportedCertVersion") {
        let why = "begins with a certificate of X.509 version 1, which clients refuse: make it anew \
                   with a subjectAltName, which makes it version 3";
        return TlsFault::Certificate(why.to_owned());
    }
    let why = format!("begins with a certificate that TLS cannot use, make it anew: {error}");
    TlsFault::Certificate(why)
}
