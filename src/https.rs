//! The certificate that we show over HTTPS: made and renewed with `TLS=auto`, renewed in its place if
//! this CA has signed what `TLS_CERT` names, and else somebody else's to renew.
//!
//! One that exists is shown whatever the clock says; by a clock that is not set none is made. When a
//! new one is taken up, connections go on with the one that they began with.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use rustls::sign::CertifiedKey;

use crate::ca::issuer::Issuer;
use crate::ca::server::{self, Server};
use crate::ca::{Ca, CaError};
use crate::clock::{self, DAY_S, Now};
use crate::config::{Config, TlsFault, TlsFiles, certified_key};
use crate::files;

/// Most names in a certificate: addresses that come and go stay in it until it is renewed.
const NAMES_MAX: usize = 64;

/// What we show, and where it is from.
pub struct Https {
    files: Option<TlsFiles>,
    /// As in [`Http`](crate::config::Http).
    auto: Option<Vec<String>>,
    shown: Option<Arc<CertifiedKey>>,
    trouble: Option<Trouble>,
}

/// It could not be renewed when that was last tried.
struct Trouble {
    why: String,
    /// Since when, and when it is to be tried again, by [`Now::mono_ms`].
    since_ms: u64,
    again_ms: u64,
}

/// What is to be done: another certificate for the key of this one, or for a new key, with these names,
/// for so many seconds.
type Work = (Option<Server>, Vec<String>, u64);

impl Https {
    pub fn of(config: &Config) -> Self {
        let mut https = Https { files: None, auto: None, shown: None, trouble: None };
        https.take_up(config);
        https
    }

    /// From now on what `config` says.
    pub fn take_up(&mut self, config: &Config) {
        (self.files, self.auto) = (config.http.tls.clone(), config.http.tls_auto.clone());
        self.shown.clone_from(&config.tls);
        self.trouble = None;
        if let (Some(files), Some(_)) = (&self.files, &self.auto) {
            self.shown = load(files).unwrap_or_else(|why| {
                log::warn!("what TLS=auto had made cannot be used, and is made anew: {why}");
                None
            });
        }
    }

    pub fn shown(&self) -> Option<Arc<CertifiedKey>> {
        self.shown.clone()
    }

    /// Makes or renews it, if that is due. Returns whether there is a new one.
    pub fn tend(&mut self, ca: &Ca, now: Now) -> bool {
        let Some(files) = self.files.clone() else { return false };
        let issuer = ca.issuer().filter(|_| ca.clock_is_plausible(now));
        let Some(issuer) = issuer else { return false };
        if self.trouble.as_ref().is_some_and(|trouble| now.mono_ms < trouble.again_ms) {
            return false;
        }
        let Some((old, names, life_s)) = self.due(&files, ca, &issuer, now) else { return false };
        let folder = files.cert.parent().filter(|_| old.is_none());
        let done = folder.map_or(Ok(()), |folder| Ok(files::make_dir(folder, 0o755)?));
        let write = || server::write(&issuer, old.as_ref(), &names, life_s, &files, now);
        let done = done.and_then(|()| write()).map_err(|e: CaError| e.to_string());
        match done.and_then(|()| load(&files)) {
            Ok(shown) => {
                (self.shown, self.trouble) = (shown, None);
                self.say(&issuer);
                true
            }
            Err(why) => {
                if self.trouble.as_ref().is_none_or(|trouble| trouble.why != why) {
                    log::error!("our TLS certificate cannot be renewed: {why}");
                }
                // Each try may leave a certificate in the record: after as long as it has failed for.
                let since_ms = self.trouble.as_ref().map_or(now.mono_ms, |t| t.since_ms);
                let pause_ms = now.mono_ms.saturating_sub(since_ms).min(DAY_S * 1000);
                self.trouble = Some(Trouble { why, since_ms, again_ms: now.mono_ms + pause_ms });
                false
            }
        }
    }

    fn due(&self, files: &TlsFiles, ca: &Ca, issuer: &Issuer, now: Now) -> Option<Work> {
        let der = self.shown.as_ref().and_then(|shown| shown.cert.first());
        let old = self.ours(issuer);
        let Some(given) = &self.auto else {
            // Whoever has put another one there has not told us of it yet.
            let is_there =
                |der| load(files).ok().flatten().is_some_and(|there| there.cert.first() == der);
            let old = old.filter(|old| old.is_due(issuer, now)).filter(|_| is_there(der))?;
            let (names, life_s) = (old.names.clone(), old.life_s());
            return Some((Some(old), names, life_s));
        };
        let wanted = if given.is_empty() { machine_names() } else { given.clone() };
        let Some(old) = old.filter(|old| !ca.record().is_revoked(&old.serial)) else {
            return Some((None, wanted, server::LIFE_S));
        };
        if old.is_due(issuer, now) {
            return Some((Some(old), wanted, server::LIFE_S));
        }
        let gone: Vec<&String> = old.names.iter().filter(|name| !wanted.contains(name)).collect();
        let is_complete = wanted.iter().all(|name| old.names.contains(name));
        if is_complete && (gone.is_empty() || given.is_empty()) {
            return None;
        }
        let kept = gone.into_iter().filter(|_| given.is_empty());
        let most = NAMES_MAX.max(wanted.len());
        let names = wanted.iter().chain(kept).take(most).cloned().collect();
        Some((Some(old), names, server::LIFE_S))
    }

    /// What is shown, if this CA has signed it.
    fn ours(&self, issuer: &Issuer) -> Option<Server> {
        Server::read(self.shown.as_ref()?.cert.first()?, issuer)
    }

    fn say(&self, issuer: &Issuer) {
        if let Some(server) = self.ours(issuer) {
            let end = clock::rfc3339(server.not_after.saturating_mul(1000));
            log::info!("our TLS certificate is new, until {end}, for {}", server.names.join(", "));
        }
    }
}

/// Tries what `TLS=auto` has made, if anything.
pub fn load(files: &TlsFiles) -> Result<Option<Arc<CertifiedKey>>, String> {
    let read = |path| files::read(path).map_err(|e| e.to_string());
    let (Some(cert), Some(key)) = (read(&files.cert)?, read(&files.key)?) else { return Ok(None) };
    certified_key(&cert, &key).map(Some).map_err(|fault| match fault {
        TlsFault::Certificate(why) => format!("{}: {why}", files.cert.display()),
        TlsFault::Key(why) => format!("{}: {why}", files.key.display()),
    })
}

/// Under what this machine may be known: its name, also as multicast DNS has it, and its addresses.
fn machine_names() -> Vec<String> {
    let text = |path| fs::read_to_string(path).unwrap_or_default();
    let name = Some(text("/proc/sys/kernel/hostname").trim().to_owned());
    let name = name.filter(|name| crate::config::is_dns_name(name));
    let local = name.iter().filter(|name| !name.contains('.')).map(|name| format!("{name}.local"));
    let mut names: Vec<String> = name.iter().cloned().chain(local).collect();
    names.push("localhost".to_owned());
    names.dedup();
    let (v4, v6) = (text("/proc/net/fib_trie"), text("/proc/net/if_inet6"));
    let addresses: BTreeSet<IpAddr> = ipv4_addresses(&v4).chain(ipv6_addresses(&v6)).collect();
    names.extend(addresses.iter().map(ToString::to_string));
    names.truncate(NAMES_MAX);
    names
}

/// The kernel's table of routes has a line for each address, and below it what that is.
fn ipv4_addresses(fib_trie: &str) -> impl Iterator<Item = IpAddr> {
    let lines = fib_trie.lines().zip(fib_trie.lines().skip(1));
    let ours = lines.filter(|(_, below)| below.trim() == "/32 host LOCAL");
    ours.filter_map(|(address, _)| address.trim().strip_prefix("|-- ")?.parse().ok())
}

/// Address, interface, prefix, scope, flags and name, in hexadecimal: all but those of one link, and
/// those that are temporary, deprecated or not yet sure.
fn ipv6_addresses(if_inet6: &str) -> impl Iterator<Item = IpAddr> {
    const LINK: u8 = 0x20;
    const FLEETING: u8 = 0x01 | 0x08 | 0x20 | 0x40;
    if_inet6.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [address, _, _, scope, flags, _] = fields.as_slice() else { return None };
        let byte = |text| u8::from_str_radix(text, 16).ok();
        let lasts = byte(scope)? != LINK && byte(flags)? & FLEETING == 0;
        let bits = u128::from_str_radix(address, 16).ok().filter(|_| lasts)?;
        Some(IpAddr::from(Ipv6Addr::from_bits(bits)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::files::test_dir::TestDir;

    #[test]
    fn addresses_as_the_kernel_tells_them() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     \
             +-- 127.0.0.0/8 2 0 2\n           |-- 127.0.0.1\n              /32 host LOCAL\n           \
             |-- 127.255.255.255\n              /32 link BROADCAST\n     |-- 192.168.1.5\n        \
             /32 host LOCAL\n";
        let found: Vec<String> = ipv4_addresses(trie).map(|a| a.to_string()).collect();
        assert_eq!(found, ["127.0.0.1", "192.168.1.5"]);
        let table = "00000000000000000000000000000001 01 80 10 80       lo\n\
             fe80000000000000021122fffe334455 02 40 20 80     eth0\n\
             fd000000000000000000000000000005 02 40 00 80     eth0\n\
             20010db8000000000000000000000007 02 40 00 01     eth0\n\
             20010db8000000000000000000000008 02 40 00 00     eth0\nrubbish\n";
        let found: Vec<String> = ipv6_addresses(table).map(|a| a.to_string()).collect();
        assert_eq!(found, ["::1", "fd00::5", "2001:db8::8"]);
    }

    #[test]
    fn what_cannot_be_written_is_signed_ever_more_rarely() {
        let (dir, now) = (TestDir::new(), clock::now());
        let settings =
            config::Ca { dir: dir.join("ca"), root_validity_years: 10, device_validity_days: 90 };
        let ca = Ca::open(&settings, now).unwrap();
        let files = TlsFiles { cert: dir.join("cert.pem"), key: dir.join("key.pem") };
        fs::create_dir_all(files.cert.join("in the way")).unwrap();
        let cert = files.cert.clone();
        let auto = Some(vec!["localhost".to_owned()]);
        let mut https = Https { files: Some(files), auto, shown: None, trouble: None };
        let at = |minute: u64| Now { mono_ms: now.mono_ms + minute * 60_000, ..now };
        assert!((0..=2880).all(|minute| !https.tend(&ca, at(minute))));
        // After 0, 1, 2, 4, … 2048 minutes.
        assert_eq!(fs::read_dir(dir.join("ca/certs")).unwrap().count(), 13);
        fs::remove_dir_all(cert).unwrap();
        assert!(!https.tend(&ca, at(2048 + 1439)) && https.tend(&ca, at(2048 + 1440)));
    }

    #[test]
    fn this_machine_has_names() {
        let names = machine_names();
        assert!(names.contains(&"localhost".to_owned()) && names.contains(&"127.0.0.1".to_owned()));
    }
}
