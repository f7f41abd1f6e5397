//! Keys, certificate signing requests and certificates by real `openssl`, as a device makes them
//! and as a broker reads them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::Mutex;

use super::temp::TempDir;

/// A P-256 key: what a device should have.
pub const P256: &str = "ec:prime256v1";

/// What to ask for. `Csr::new("device").make()` is what a well-behaved device sends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Csr {
    key: String,
    digest: String,
    names: String,
    extensions: String,
    attributes: String,
    args: Vec<String>,
}

impl Csr {
    /// P-256, SHA-256, subject `CN=<name>`, nothing else.
    pub fn new(common_name: &str) -> Self {
        Csr {
            key: P256.to_owned(),
            digest: "sha256".to_owned(),
            names: format!("CN = {common_name}\n"),
            extensions: String::new(),
            attributes: String::new(),
            args: vec![],
        }
    }

    /// `ec:<curve>`, `ed25519` or `rsa:<bits>`.
    pub fn key(mut self, key: &str) -> Self {
        self.key = key.to_owned();
        self
    }

    /// `-` leaves it to the key (Ed25519 has its own).
    pub fn digest(mut self, digest: &str) -> Self {
        self.digest = digest.to_owned();
        self
    }

    /// The whole subject, as lines of an `openssl` configuration (`0.CN = a\n1.CN = b`).
    pub fn names(mut self, lines: &str) -> Self {
        self.names = format!("{lines}\n");
        self
    }

    /// Extensions to ask for, as lines of an `openssl` configuration.
    pub fn extensions(mut self, lines: &str) -> Self {
        self.extensions = format!("{lines}\n");
        self
    }

    /// Attributes, as lines of an `openssl` configuration.
    pub fn attributes(mut self, lines: &str) -> Self {
        self.attributes = format!("{lines}\n");
        self
    }

    /// Further arguments for `openssl req`.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|a| (*a).to_owned()));
        self
    }

    /// The request, PEM. What was made once is given again: thousands are needed, and `openssl` costs
    /// more than all else that a device does.
    #[track_caller]
    pub fn make(&self) -> String {
        static MADE: Mutex<BTreeMap<Csr, String>> = Mutex::new(BTreeMap::new());
        let made = || MADE.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(request) = made().get(self) {
            return request.clone();
        }
        let request = self.ask_openssl();
        made().insert(self.clone(), request.clone());
        request
    }

    #[track_caller]
    fn ask_openssl(&self) -> String {
        let mut config =
            "oid_section = oids\n[oids]\n[req]\nprompt = no\nutf8 = yes\ndistinguished_name = dn\n"
                .to_owned();
        for (line, section) in [
            ("req_extensions = ext\n", &self.extensions),
            ("attributes = attr\n", &self.attributes),
        ] {
            config.push_str(if section.is_empty() { "" } else { line });
        }
        config.push_str(&format!(
            "[dn]\n{}[ext]\n{}[attr]\n{}",
            self.names, self.extensions, self.attributes
        ));
        let dir = TempDir::new();
        let config = dir.file("req.cnf", &config);
        let (key, config) = (key_file(&self.key), config.display().to_string());
        let digest = format!("-{}", self.digest);
        let mut args = vec!["req", "-new", "-config", &config, "-key", key.to_str().unwrap()];
        if self.digest != "-" {
            args.push(&digest);
        }
        args.extend(self.args.iter().map(String::as_str));
        openssl(&args, "")
    }
}

/// The file of a key of this kind, made once a build folder: RSA keys take seconds.
pub fn key_file(kind: &str) -> PathBuf {
    static MAKING: Mutex<()> = Mutex::new(());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("keys");
    let path = folder.join(format!("{}.pem", kind.replace(':', "-")));
    let _making = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    if !path.exists() {
        fs::create_dir_all(&folder).unwrap();
        let new = folder.join(format!("{}.{}", process::id(), kind.replace(':', "-")));
        fs::write(&new, new_key(kind)).unwrap();
        fs::rename(&new, &path).unwrap();
    }
    path
}

/// A fresh private key, PEM (PKCS#8): `ec:<curve>`, `ed25519` or `rsa:<bits>`.
pub fn new_key(kind: &str) -> String {
    match kind.split_once(':') {
        Some(("ec", curve)) => {
            let curve = format!("ec_paramgen_curve:{curve}");
            openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", &curve], "")
        }
        Some(("rsa", bits)) => {
            let bits = format!("rsa_keygen_bits:{bits}");
            openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", &bits], "")
        }
        _ => openssl(&["genpkey", "-algorithm", kind], ""),
    }
}

/// Checks with OpenSSL that `certificate` is a TLS client certificate under `ca`.
pub fn verify_with_openssl(ca: &str, certificate: &str) -> Result<(), String> {
    let dir = TempDir::new();
    let (ca, leaf) = (dir.file("ca.pem", ca), dir.file("leaf.pem", certificate));
    let args = ["verify", "-x509_strict", "-purpose", "sslclient", "-CAfile"];
    try_openssl(&[&args[..], &[ca.to_str().unwrap(), leaf.to_str().unwrap()]].concat(), "")
        .map(drop)
}

/// The certificate as `openssl x509 -text` shows it.
#[track_caller]
pub fn x509_text(certificate: &str) -> String {
    openssl(&["x509", "-noout", "-text"], certificate)
}

/// One answer of `openssl x509`, as `-serial`, without the name before the `=`.
#[track_caller]
pub fn x509_field(certificate: &str, args: &[&str]) -> String {
    let answer = openssl(&[&["x509", "-noout"], args].concat(), certificate);
    answer.trim().split_once('=').map_or(answer.clone(), |(_, value)| value.to_owned())
}

/// Runs `openssl` with `input` on its standard input.
#[track_caller]
pub fn openssl(args: &[&str], input: &str) -> String {
    try_openssl(args, input).unwrap_or_else(|e| panic!("openssl {args:?}: {e}"))
}

/// As [`openssl`]; an error is what it said when it failed.
pub fn try_openssl(args: &[&str], input: &str) -> Result<String, String> {
    let dir = TempDir::new();
    let stdin = fs::File::open(dir.file("in", input)).unwrap();
    let output = Command::new("openssl").args(args).stdin(stdin).output().unwrap_or_else(|e| {
        panic!("openssl is not installed (scripts/test.sh installs it): {e}");
    });
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr) + &text(&output.stdout))
    }
}
