//! `certs/others.pem`: the certificates that other instances have signed, one behind the other, each
//! as its signer's own file has it. It only grows, and is synced once for a batch: flash wears by
//! bytes, and 100,000 small files would take four times as many.
//!
//! Where a certificate begins stands in its line in `index.txt`, so that nobody reads the file as a
//! whole, but for what stands behind the last of them.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

pub(super) const OTHERS: &str = "others.pem";
const END: &str = "-----END CERTIFICATE-----\n";
/// The most bytes that one takes: those of devices have about 1,100.
const LONGEST: usize = 64 * 1024;
/// What is read at first: most certificates are in it whole.
const READ_FIRST: usize = 2048;

/// Appends texts and syncs them. Returns where each begins; if that fails, nothing of them counts.
pub(super) fn append<'a>(
    path: &Path,
    texts: impl Iterator<Item = &'a str>,
) -> io::Result<Vec<u32>> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    let before = file.metadata()?.len();
    if before == 0 {
        file.set_permissions(Permissions::from_mode(0o644))?; // whatever the umask is
    }
    let (mut places, mut bytes) = (Vec::new(), Vec::new());
    for text in texts {
        let full = || io::Error::new(io::ErrorKind::FileTooLarge, "it has grown to 4 GiB");
        places.push(u32::try_from(before + bytes.len() as u64).map_err(|_| full())?);
        bytes.extend(text.as_bytes());
    }
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = file.set_len(before); // the error that counts is the first
    }
    written.map(|()| places)
}

/// The text that begins there, if one does: whose it is, the certificate in it tells.
pub(super) fn read(file: &File, at: u64) -> io::Result<Option<String>> {
    let mut size = READ_FIRST;
    loop {
        let mut bytes = vec![0; size];
        let length = read_up_to(file, &mut bytes, at)?;
        let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default());
        if let Some((text, _)) = text.split_once(END) {
            return Ok(Some(format!("{text}{END}")));
        }
        if length < size || size >= LONGEST {
            return Ok(None);
        }
        size *= 4;
    }
}

fn read_up_to(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + length as u64)? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

/// Shows each text from a place on to `each`, with its place. Returns where the last one ends.
pub(super) fn scan(file: &File, from: u64, mut each: impl FnMut(u64, String)) -> io::Result<u64> {
    let mut at = from;
    while let Some(text) = read(file, at)? {
        let length = text.len() as u64;
        each(at, text);
        at += length;
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::test_dir::TestDir;

    #[test]
    fn what_is_appended_is_found_again() {
        let dir = TestDir::new();
        let path = dir.join(OTHERS);
        let text = |n: usize| format!("Paid: {n}\n{}{END}", "x".repeat(n));
        let texts = [10, 5000, 0, 60_000].map(text);
        let mut places = append(&path, texts[..1].iter().map(String::as_str)).unwrap();
        places.extend(append(&path, texts[1..].iter().map(String::as_str)).unwrap());
        let file = File::open(&path).unwrap();
        for (text, at) in texts.iter().zip(&places) {
            assert_eq!(read(&file, u64::from(*at)).unwrap().as_ref(), Some(text));
        }
        assert_eq!(read(&file, 1 << 40).unwrap(), None);
        let mut seen = Vec::new();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"torn").unwrap();
        let end = scan(&file, u64::from(places[1]), |at, text| seen.push((at, text))).unwrap();
        assert_eq!(end + 4, file.metadata().unwrap().len());
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[2], (u64::from(places[3]), texts[3].clone()));
    }
}
