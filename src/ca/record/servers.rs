//! Servers' certificates in the record.
//!
//! Whoever signs one (a command, perhaps, that knows nothing of the running service) leaves it in
//! `certs/`, marked as a server's. It is entered at start, and when the service looks there. Nothing
//! that is asked of a device finds it, whatever its common name.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::Path;
use std::sync::Mutex;

use super::merge::Incoming;
use super::rows::{Place, Row};
use super::{CERTS, Record, RecordError};
use crate::ca::issuer::{Issuer, ServerCertificate};
use crate::ca::server::Server;
use crate::clock::Now;
use crate::files;
use crate::locks::locked;
use crate::serial::Serial;

/// What the file of a server's certificate begins with.
const SERVER_LINE: &str = "Use: server\n";

/// What is known of them beside their rows.
#[derive(Debug, Default)]
pub(super) struct Servers {
    list: Mutex<Vec<Server>>,
    /// When `certs/` was changed, as the last two looks have seen it. A file that comes in the same tick
    /// as a look may not change that time, so only two looks that agree count.
    seen: Mutex<[Option<(i64, i64)>; 2]>,
}

/// Leaves a server's certificate for the record in the CA's folder.
pub fn deposit_server(dir: &Path, made: &ServerCertificate) -> Result<(), RecordError> {
    let certs = dir.join(CERTS);
    let is_new = !certs.exists();
    files::make_dir(&certs, 0o755).map_err(RecordError::not_written)?;
    let path = certs.join(format!("{:X}.pem", made.serial));
    let text = format!("{SERVER_LINE}{}", made.pem);
    files::write_atomic(&path, text.as_bytes(), 0o644).map_err(RecordError::not_written)?;
    // The service must own what root leaves in its folder.
    if let Ok(owner) = fs::metadata(dir) {
        for path in [Some(path), is_new.then_some(certs)].into_iter().flatten() {
            let _ = chown(path, Some(owner.uid()), Some(owner.gid())); // it is ours already
        }
    }
    Ok(())
}

impl Record {
    /// Enters the servers' certificates that lie in `certs/` and have no line. Cheap if nothing has
    /// come there. After a failure trying again is safe.
    pub fn enter_servers(&self, ca: &Issuer) -> Result<(), RecordError> {
        if !self.servers.may_have_come(&self.dir.join(CERTS)) {
            return Ok(());
        }
        let at =
            |strays: Vec<Serial>| strays.iter().filter_map(|s| self.server_at(s, ca)).collect();
        let entered = self.strays().map(at).and_then(|found| self.enter_these_servers(found, ca));
        // Only a failure is noted: where nothing had to be written, success proves nothing.
        entered.or_else(|error| {
            self.servers.look_again();
            self.trial.note(Err(error))
        })
    }

    /// Enters those that have no line yet.
    pub(super) fn enter_these_servers(
        &self,
        mut found: Vec<Server>,
        ca: &Issuer,
    ) -> Result<(), RecordError> {
        if found.is_empty() {
            return Ok(());
        }
        let mut writer = self.lock_writer();
        found.retain(|server| self.read().by_serial(&server.serial).is_none());
        let mut plan = self.plan(found.iter().map(Incoming::of_server).collect(), &[], &|_| 0);
        self.enter(&mut writer, &mut plan, ca)?;
        for server in &found {
            let (serial, server) = (server.serial, name(server));
            log::info!(serial:%; "certificate {serial} of the server {server} is entered");
        }
        locked(&self.servers.list).extend(found);
        Ok(())
    }

    /// Reads what is known of those that have a line, at start, before `certs/` is looked through.
    pub(super) fn begin_servers(&self, ca: &Issuer) {
        self.servers.may_have_come(&self.dir.join(CERTS));
        let rows = self.read();
        let servers = rows.list.iter().filter(|slot| slot.place == Place::Server).map(|s| s.serial);
        let serials: Vec<Serial> = servers.collect();
        drop(rows);
        locked(&self.servers.list)
            .extend(serials.iter().filter_map(|serial| self.server_at(serial, ca)));
    }

    /// What lies in the file of this serial number, if that is a server's certificate by this CA.
    pub(super) fn server_at(&self, serial: &Serial, ca: &Issuer) -> Option<Server> {
        let text = files::read(&self.pem_path(serial)).ok()??;
        text.starts_with(SERVER_LINE.as_bytes()).then_some(())?;
        let stored = super::read_stored(std::str::from_utf8(&text).ok()?)?;
        Server::read(&stored.der, ca).filter(|server| server.serial == *serial)
    }

    /// Whether this is the certificate of a server of this name.
    pub fn is_of_server(&self, serial: &Serial, of: &str) -> bool {
        let known = locked(&self.servers.list).iter().any(|s| s.serial == *serial && name(s) == of);
        known && self.read().by_serial(serial).is_some()
    }

    /// Whether the certificate, anybody's, is revoked.
    pub fn is_revoked(&self, serial: &Serial) -> bool {
        self.read().by_serial(serial).is_some_and(|slot| slot.revoked().is_some())
    }

    /// What is to be said of servers' certificates that end soon and that no later one replaces.
    pub fn ending_servers(&self, now: Now) -> Vec<String> {
        let servers = locked(&self.servers.list);
        let counts: Vec<&Server> = servers.iter().filter(|s| !self.is_revoked(&s.serial)).collect();
        let is_replaced = |old: &Server| {
            let has_all = |s: &Server| old.names.iter().all(|name| s.names.contains(name));
            counts.iter().any(|s| s.not_after > old.not_after && has_all(s))
        };
        let ending = counts.iter().filter(|server| !is_replaced(server));
        let said = ending.filter_map(|s| {
            let soon = now.ends_soon(s.not_after)?;
            Some(format!("certificate {} of the server {} {soon}", s.serial, name(s)))
        });
        said.collect()
    }
}

impl Incoming {
    fn of_server(server: &Server) -> Self {
        let row = Row::new(server.serial, None, server.not_after);
        let row = Row { server: Some(name(server).to_owned()), place: Place::Server, ..row };
        Incoming { row, created_at: server.not_before, origin: None, text: None }
    }
}

impl Servers {
    fn may_have_come(&self, certs: &Path) -> bool {
        let folder = fs::metadata(certs).ok();
        let changed = folder.map(|folder| (folder.mtime(), folder.mtime_nsec()));
        let mut seen = locked(&self.seen);
        let is_settled = changed.is_some() && *seen == [changed; 2];
        let [_, last] = *seen;
        *seen = [last, changed];
        !is_settled
    }

    fn look_again(&self) {
        *locked(&self.seen) = [None; 2];
    }
}

fn name(server: &Server) -> &str {
    server.names.first().map_or("", String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::crl::Crl;
    use crate::ca::record::tests::{Fixture, device, enter};
    use crate::ca::record::{INDEX, Reason};
    use crate::ca::tests::run;
    use crate::clock::{self, DAY_S};

    fn later(days: u64) -> Now {
        let now = clock::now();
        Now { unix_ms: now.unix_ms + days * DAY_S * 1000, ..now }
    }

    #[test]
    fn what_a_command_leaves_is_entered_at_start_and_later_and_never_is_a_devices() {
        let fixture = Fixture::new();
        // Before the first start: a CA that was brought along signs for the broker.
        let first = fixture.server("device-1", 9);
        deposit_server(&fixture.dir, &first).unwrap();
        let record = fixture.open();
        let line = format!("\t\t{:X}\tserver\t/CN=device-1\n", first.serial);
        assert!(fixture.index().starts_with('V') && fixture.index().ends_with(&line));
        let leaf = fixture.leaf("device-1");
        enter(&record, &leaf, None).unwrap();
        let second = fixture.server("device-1", 99);
        deposit_server(&fixture.dir, &second).unwrap();
        for _ in 0..3 {
            record.enter_servers(fixture.issuer()).unwrap();
            assert_eq!(fixture.index().lines().count(), 3);
        }
        for record in [record, fixture.open()] {
            let one = device("device-1");
            assert_eq!(record.newest(&one).unwrap().serial, leaf.serial);
            assert_eq!(record.begin().count_active(&one, clock::now()), 1);
            for made in [&first, &second] {
                assert_eq!(record.by_serial(&made.serial), None);
                assert!(record.is_of_server(&made.serial, "device-1"));
                assert!(!record.is_of_server(&made.serial, "device-2"));
            }
            assert!(!record.is_of_server(&leaf.serial, "device-1"));
        }
    }

    #[test]
    fn an_end_is_told_unless_a_later_one_has_all_its_names() {
        let fixture = Fixture::new();
        let record = fixture.open();
        let put = |name: &str, days: u64| {
            let made = fixture.server(name, days);
            deposit_server(&fixture.dir, &made).unwrap();
            record.enter_servers(fixture.issuer()).unwrap();
            made.serial
        };
        let old = put("a.lan", 40);
        assert_eq!(record.ending_servers(later(9)), [""; 0]);
        let told = record.ending_servers(later(20));
        assert!(told[0].starts_with(&format!("certificate {old} of the server a.lan ends in ")));
        put("b.lan", 99);
        assert_eq!(record.ending_servers(later(20)).len(), 1);
        put("a.lan", 99);
        assert_eq!(record.ending_servers(later(20)), [""; 0]);
    }

    #[test]
    fn what_ended_long_ago_goes_and_does_not_come_back() {
        let fixture = Fixture::new();
        let record = fixture.open();
        let made = fixture.server("a.lan", 9);
        deposit_server(&fixture.dir, &made).unwrap();
        record.enter_servers(fixture.issuer()).unwrap();
        assert_eq!(record.prune(later(10).unix_s()), Ok(vec![made.serial]));
        assert!(!record.is_of_server(&made.serial, "a.lan"));
        for record in [record, fixture.open()] {
            record.enter_servers(fixture.issuer()).unwrap();
            assert_eq!((fixture.index(), fixture.pems()), (String::new(), 0));
        }
    }

    #[test]
    fn a_revoked_one_stands_in_the_list() {
        let fixture = Fixture::new();
        let record = fixture.open();
        let made = fixture.server("a.lan", 20);
        deposit_server(&fixture.dir, &made).unwrap();
        record.enter_servers(fixture.issuer()).unwrap();
        let now = clock::now();
        record.revoke(&device("a.lan"), Reason::Unspecified, now).unwrap();
        assert!(!record.is_revoked(&made.serial), "it is no device's");
        record.revoke_these(&[made.serial], Reason::KeyCompromise, now).unwrap();
        let line = format!(",keyCompromise\t{:X}\tserver\t/CN=a.lan\n", made.serial);
        assert!(fixture.index().ends_with(&line), "{}", fixture.index());
        let listed = record.revoked(now);
        for record in [record, fixture.open()] {
            assert_eq!(record.revoked(now), listed);
            assert_eq!(record.ending_servers(now), [""; 0]);
        }
        // A copy whose `index.txt` is older than its list.
        Crl::sign(fixture.issuer(), &listed, 0, now).unwrap().write(&fixture.dir).unwrap();
        fs::write(fixture.dir.join(INDEX), "").unwrap();
        for _ in 0..2 {
            let record = fixture.open();
            assert!(record.is_revoked(&made.serial) && record.revoked(now).len() == 1);
            assert_eq!(fixture.index().lines().count(), 1, "{}", fixture.index());
        }
        // OpenSSL's own look at it.
        let dir = &fixture.dir;
        fs::write(dir.join("c"), "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\n").unwrap();
        let said = run(dir, &format!("ca -config c -status {:X}", made.serial)).unwrap_err();
        assert!(said.contains("Revoked"), "{said} {}", dir.join(INDEX).display());
    }
}
