//! CAs by real `openssl`, as people bring them: a root of another name, or one that another has signed.

use std::fs;

use super::csr;
use super::service::Setup;
use super::temp::TempDir;

/// A CA with its key, both PEM.
#[derive(Clone, Debug)]
pub struct Authority {
    key: String,
    pub certificate: String,
}

impl Authority {
    pub fn root(subject: &str) -> Self {
        let files = Files::new(csr::new_key(csr::P256));
        let args = ["-x509", "-days", "900", "-extensions", "ca"];
        let certificate = files.request(subject, &args);
        Authority { key: files.key, certificate }
    }

    /// One that `self` has signed.
    pub fn intermediate(&self, subject: &str) -> Self {
        let files = Files::new(csr::new_key(csr::P256));
        let request = files.request(subject, &[]);
        let ours = files.dir.file("root", &self.certificate).display().to_string();
        let our_key = files.dir.file("root.key", &self.key).display().to_string();
        let sign = ["x509", "-req", "-days", "800", "-set_serial", "2", "-extensions", "ca"];
        let sign = [&sign[..], &["-extfile", &files.config, "-CA", &ours, "-CAkey", &our_key]];
        Authority { certificate: csr::openssl(&sign.concat(), &request), key: files.key }
    }

    /// Makes it the CA of a service, with `behind` behind it in its file.
    pub fn put(&self, setup: Setup, behind: &str) -> Setup {
        fs::create_dir_all(setup.data("ca")).unwrap();
        fs::write(setup.data("ca/root-ca.key"), &self.key).unwrap();
        let chain = format!("{}{behind}", self.certificate);
        fs::write(setup.data("ca/root-ca.crt"), chain).unwrap();
        setup
    }
}

struct Files {
    dir: TempDir,
    key: String,
    key_file: String,
    config: String,
}

impl Files {
    fn new(key: String) -> Self {
        let dir = TempDir::new();
        let config = "[req]\ndistinguished_name=dn\n[dn]\n[ca]\nbasicConstraints=critical,CA:TRUE\n\
             keyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n";
        let config = dir.file("config", config).display().to_string();
        let key_file = dir.file("key", &key).display().to_string();
        Files { dir, key, key_file, config }
    }

    fn request(&self, subject: &str, more: &[&str]) -> String {
        let args =
            ["req", "-new", "-config", &self.config, "-key", &self.key_file, "-subj", subject];
        csr::openssl(&[&args[..], more].concat(), "")
    }
}
