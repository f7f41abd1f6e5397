//! What is done once, at start: a line that a power cut has torn is cut off, certificates without a
//! line are removed or put back, and the tokens that may still be shown are loaded.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use x509_parser::asn1_rs::FromDer as _;
use x509_parser::certificate::X509Certificate;

use super::index::{self, Index, Torn};
use super::rows::{Row, Rows};
use super::{CERTS, CLOCK_SLACK_S, INDEX, Redeemed, Registry, RegistryError, read_stored};
use crate::ca::crl;
use crate::device::DeviceId;
use crate::files;
use crate::jwt;
use crate::pem;
use crate::serial::Serial;

/// Certificates without a line that a power cut can leave: a batch of each worker, generously. More
/// mean that the record was lost or is an older copy, and removing them would make it worse.
const MOST_STRAYS: usize = 64;

/// Reads `index.txt`. If the last line is torn, it is cut off: it was never
/// synced, so its certificate was never answered.
pub(super) fn load_index(path: &Path) -> Result<(Rows, Torn), RegistryError> {
    let Some(bytes) = files::read(path)? else {
        return Ok((Rows::default(), Torn::Missing));
    };
    let garbled = |(line, why)| RegistryError::Garbled { path: path.to_owned(), line, why };
    let Index { rows, torn, whole } = index::read_index(&bytes).map_err(garbled)?;
    if torn != Torn::Nothing {
        cut(path, whole, rows.len() + 1)?;
    }
    Ok((rows, torn))
}

fn cut(path: &Path, length: usize, line: usize) -> Result<(), RegistryError> {
    log::warn!("{} line {line} is torn, by a power cut perhaps: cut off", path.display());
    let cut = || {
        let file = OpenOptions::new().write(true).open(path)?;
        file.set_len(length as u64)?;
        file.sync_all()
    };
    cut().map_err(|e| RegistryError::not_written(format!("cannot write {}: {e}", path.display())))
}

impl Registry {
    /// Sees to certificates that have no line. Most likely the power went before they were answered,
    /// and they are removed. But one that `crl.pem` lists, or that the torn line says was revoked,
    /// had been answered: without its line the next list would let it in again.
    pub(super) fn settle_strays(&self, torn: Torn) -> Result<(), RegistryError> {
        let strays = self.strays()?;
        if strays.is_empty() {
            return Ok(());
        }
        if torn == Torn::Missing || strays.len() > MOST_STRAYS {
            return Err(RegistryError::Unreadable(format!(
                "{} has lost the lines of {} certificates in {CERTS}/: restore it, or move them away",
                self.dir.join(INDEX).display(),
                strays.len()
            )));
        }
        let listed = crl::listed(&self.dir);
        for serial in strays {
            let path = self.pem_path(&serial);
            match (listed.get(&serial), torn) {
                (Some(revoked_at), _) => self.put_back(&serial, Some(*revoked_at))?,
                (None, Torn::Revoked) => self.put_back(&serial, None)?,
                (None, _) => {
                    log::warn!(
                        "{} has no line in {INDEX}, so it was never answered: removed",
                        path.display()
                    );
                    files::remove_if_there(&path)?;
                }
            }
        }
        Ok(files::sync_dir(&self.dir.join(CERTS))?)
    }

    fn strays(&self) -> Result<Vec<Serial>, RegistryError> {
        let certs = self.dir.join(CERTS);
        let unreadable = |e: io::Error| {
            RegistryError::Unreadable(format!("cannot read {}: {e}", certs.display()))
        };
        let rows = self.read();
        let mut strays = Vec::new();
        for entry in certs.read_dir().map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            let serial = name.to_str().and_then(|n| n.strip_suffix(".pem"));
            let serial = serial.and_then(Serial::from_hex);
            strays.extend(serial.filter(|s| rows.by_serial(s).is_none()));
        }
        Ok(strays)
    }

    /// Enters a certificate once more as revoked, then or, if that is not known, when it was signed.
    fn put_back(&self, serial: &Serial, revoked_at: Option<u64>) -> Result<(), RegistryError> {
        let path = self.pem_path(serial);
        let text = files::read(&path)?.and_then(|bytes| String::from_utf8(bytes).ok());
        let row = text.and_then(|text| read_row(&text, *serial, revoked_at));
        let Some(row) = row else {
            log::error!("{} lost its line in {INDEX} and cannot be read", path.display());
            return Ok(());
        };
        log::warn!("{} is revoked but had no line in {INDEX}: put back", path.display());
        self.append(&mut self.lock_writer(), row.line())?;
        self.write().insert(row);
        Ok(())
    }

    /// Loads the hashes of tokens that have not ended, from the newest record backwards until one is
    /// older than any token can be.
    pub(super) fn load_tokens(&self, now_s: Option<u64>) {
        let mut rows = self.write();
        let mut newest = now_s;
        let mut lost: Option<(usize, RegistryError)> = None;
        for at in (0..rows.len()).rev() {
            let Some(serial) = rows.at(at).map(|row| row.serial) else { break };
            let stored = match self.stored(&serial) {
                Ok(stored) => stored,
                Err(e) => {
                    lost = Some((lost.map_or(1, |(count, _)| count + 1), e));
                    continue;
                }
            };
            let reference = *newest.get_or_insert(stored.created_at);
            if stored.created_at + jwt::MAX_LIFETIME_S + CLOCK_SLACK_S < reference {
                break;
            }
            let ended = |token: &Redeemed| now_s.is_some_and(|now| token.exp <= now);
            if let Some(token) = stored.token.filter(|t| !ended(t)) {
                rows.add_token(&token, at as u32);
            }
        }
        if let Some((count, e)) = lost {
            log::warn!("{count} certificates cannot be read, the oldest of them: {e}");
        }
    }
}

/// The row that a certificate's file stood for, revoked then or when it was signed.
fn read_row(text: &str, serial: Serial, revoked_at: Option<u64>) -> Option<Row> {
    let stored = read_stored(text)?;
    let [block] = <[_; 1]>::try_from(pem::blocks(&stored.pem)?).ok()?;
    let (_, certificate) = X509Certificate::from_der(&block.der).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    let expires_at = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    let revoked_at = revoked_at.unwrap_or(stored.created_at);
    Some(Row::new(serial, DeviceId::parse(name)?, expires_at, Some(revoked_at)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::issuer::Leaf;
    use crate::ca::openssl::run_program;
    use crate::ca::registry::fixture::{Fixture, device, enter, token};
    use crate::clock;
    use crate::files::test_dir::TestDir;
    use crate::jwt::TokenHash;
    use std::fs;

    #[test]
    fn what_a_power_cut_leaves() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        let leaves = [fixture.leaf("device-1"), fixture.leaf("device-2")];
        let spent = token("t", clock::now().unix_s() + 100);
        enter(&registry, &leaves[0], None).unwrap();
        let whole = fixture.index();
        enter(&registry, &leaves[1], Some(spent)).unwrap();
        let both = fixture.index();
        let pem = registry.pem_path(&leaves[1].serial);
        let file = fs::read(&pem).unwrap();
        for end in [whole.len(), whole.len() + 1, whole.len() + 40, both.len() - 1] {
            fs::write(fixture.dir.join(INDEX), &both[..end]).unwrap();
            fs::write(&pem, &file).unwrap();
            fs::write(fixture.dir.join(CERTS).join("notes.pem"), "not ours").unwrap();
            let again = fixture.open();
            assert_eq!(fixture.index(), whole, "cut at {end}");
            assert!(!pem.exists() && !again.knows_token(&spent.hash));
            assert_eq!(fixture.pems(), 2);
            assert!(again.newest(&device("device-1")).is_some());
        }
        fs::write(fixture.dir.join(INDEX), format!("{whole}V\t\0\0\0\n")).unwrap();
        fixture.open();
        assert_eq!(fixture.index(), whole);

        // A certificate without its file is still a record.
        fs::remove_file(registry.pem_path(&leaves[0].serial)).unwrap();
        let again = fixture.open();
        assert!(again.has_active(&device("device-1"), clock::now()));
        let error = again.stored(&leaves[0].serial).unwrap_err().to_string();
        assert!(error.ends_with(".pem: missing"), "{error}");
    }

    #[test]
    fn a_record_that_was_lost_or_is_older_takes_no_certificate_with_it() {
        let fixture = Fixture::new();
        enter(&fixture.open(), &fixture.leaf("device-1"), None).unwrap();
        let (index, pems) = (fixture.dir.join(INDEX), fixture.pems());
        let check = |count: usize| {
            let error = Registry::open(&fixture.dir, None).unwrap_err().to_string();
            assert!(error.contains(&format!("lost the lines of {count} certificates")), "{error}");
        };
        fs::remove_file(&index).unwrap();
        check(1);
        check(1); // also at the next start
        assert_eq!(fixture.pems(), pems);
        fs::write(&index, "").unwrap();
        for n in 1..=MOST_STRAYS as u8 {
            let name = format!(
                "{:X}.pem",
                Serial::from([0x40 + n % 64, n, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
            );
            fs::write(fixture.dir.join(CERTS).join(name), "a certificate").unwrap();
        }
        check(MOST_STRAYS + 1);
        assert_eq!(fixture.pems(), pems + MOST_STRAYS);
    }

    #[test]
    fn a_garbled_line_is_told_by_its_number() {
        let line = |n: u8| Row::new(Serial::from([n; 16]), device("d"), 1_900_000_000, None).line();
        let dir = TestDir::new();
        let path = dir.join(INDEX);
        let garbled = [line(0x41), line(0x41), line(0x43)].concat();
        fs::write(&path, &garbled).unwrap();
        let error = Registry::open(&dir, None).unwrap_err().to_string();
        let twice = format!("{} line 2: the serial number stands twice", path.display());
        assert_eq!((error, fs::read_to_string(&path).unwrap()), (twice, garbled));
    }

    #[test]
    fn only_the_last_days_tokens_are_read() {
        let fixture = Fixture::new();
        let registry = fixture.open();
        let now_s = clock::now().unix_s();
        for (name, age) in [("old", 2 * jwt::MAX_LIFETIME_S), ("new", 1000), ("newest", 0)] {
            // openssl signs in the past what the issuer would sign now only.
            let leaf = fixture.leaf(name);
            let ca = "-CA root-ca.crt -CAkey root-ca.key -days 90";
            let line =
                format!("x509 -req -in csr.pem {ca} -set_serial 0x{} -out old.pem", leaf.serial);
            let back = format!("-f -{age}s openssl {line}");
            run_program(&fixture.dir, "faketime", &back).unwrap();
            let pem = fs::read_to_string(fixture.dir.join("old.pem")).unwrap();
            let spent = token(name, now_s + 86_400 - age.min(80_000));
            enter(&registry, &Leaf { pem, ..leaf }, Some(spent)).unwrap();
        }
        for now in [Some(clock::now()), None] {
            let again = Registry::open(&fixture.dir, now).unwrap();
            let known = ["old", "new", "newest"].map(|n| again.knows_token(&TokenHash::of(n)));
            assert_eq!(known, [false, true, true]);
        }
    }
}
