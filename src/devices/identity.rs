//! Under which id this process runs, and how it notices that its folder was copied.
//!
//! `instance-id` holds three lines: the id; its own inode and the id of the machine; and the process
//! that runs, with where and since which start of the machine. In a copy the second line is wrong, and
//! another id is drawn. A copy of a whole disk may have it right: that is noticed in Redis.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::Instance;
use crate::files::{self, FilesError};

/// Where a machine's id stands, if it has one.
const MACHINE: &str = "/etc/machine-id";
/// Another one with every start of the machine.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// Who this process is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The id by which this instance knows its own marks.
    pub id: Instance,
    /// Tells two processes apart that run under one id; no two processes have the same.
    pub process: Instance,
    /// The process before, which has ended for certain: it held the lock of this very folder.
    pub before: Option<Instance>,
    path: PathBuf,
}

impl Identity {
    /// Reads the file and completes it, or makes one. Whoever calls it holds the folder's lock.
    pub fn open(path: &Path) -> Result<Self, FilesError> {
        let process = draw(path)?;
        let kept = read(path)?;
        let is_new = kept.is_none();
        let (id, before) = match kept {
            Some(Kept { id, is_copy: false, before }) => (id, before),
            Some(Kept { is_copy: true, .. }) => {
                log::info!("{} is a copy: another id is drawn", path.display());
                (draw(path)?, None)
            }
            None => (draw(path)?, None),
        };
        let identity = Identity { id, process, before, path: path.to_owned() };
        match identity.keep(id) {
            Err(error) if is_new => return Err(error),
            Err(error) => log::warn!("{error}"),
            Ok(()) => {}
        }
        Ok(identity)
    }

    /// Runs under this id from the next start on.
    pub fn keep(&self, id: Instance) -> Result<(), FilesError> {
        if self.note_process(id).is_ok_and(|is_noted| is_noted) {
            return Ok(());
        }
        files::write_atomic_by(&self.path, 0o600, &mut |file| {
            let (head, process) = self.text(id, file)?;
            write!(file, "{head}{process}")
        })
    }

    /// Where nothing else changes the disk is not waited for: the process counts only until the machine
    /// is started again. Returns false where something does.
    fn note_process(&self, id: Instance) -> io::Result<bool> {
        let file = File::options().write(true).open(&self.path)?;
        let (head, process) = self.text(id, &file)?;
        let kept = fs::read_to_string(&self.path)?;
        let is_same = kept.starts_with(&head) && kept.len() == head.len() + process.len();
        if is_same {
            file.write_all_at(process.as_bytes(), head.len() as u64)?;
        }
        Ok(is_same)
    }

    /// What stays, and the process.
    fn text(&self, id: Instance, file: &File) -> io::Result<(String, String)> {
        let (place, run) = signs_of(file)?;
        Ok((format!("{id}\n{place}\n"), format!("{} {run}\n", self.process)))
    }
}

/// What the file says.
struct Kept {
    id: Instance,
    is_copy: bool,
    before: Option<Instance>,
}

/// Whether the file can be read, if there is one.
pub fn check(path: &Path) -> Result<(), FilesError> {
    read(path).map(drop)
}

/// One that holds an id alone is of an older version, and taken over as it is.
fn read(path: &Path) -> Result<Option<Kept>, FilesError> {
    let Some(bytes) = files::read(path)? else { return Ok(None) };
    files::warn_if_others_may_read(path);
    let signs = File::open(path).and_then(|file| signs_of(&file));
    let (place, run) = signs.map_err(FilesError::io("cannot read", path))?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines();
    let id = lines.next().and_then(Instance::from_hex);
    let id = id.ok_or_else(|| FilesError::garbled(path, 32))?;
    let is_copy = lines.next().is_some_and(|kept| kept != place);
    let process = lines.next().and_then(|line| line.split_once(' '));
    let before = process.filter(|(_, kept)| *kept == run).and_then(|(p, _)| Instance::from_hex(p));
    Ok(Some(Kept { id, is_copy, before }))
}

/// By what a copy of this file is known: always, and while the machine runs.
fn signs_of(file: &File) -> io::Result<(String, String)> {
    let meta = file.metadata()?;
    let read = |path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    Ok((format!("{} {}", meta.ino(), read(MACHINE)), format!("{} {}", meta.dev(), read(BOOT))))
}

fn draw(path: &Path) -> Result<Instance, FilesError> {
    let mut random = [0; 16];
    let drawn = getrandom::fill(&mut random).map(|()| Instance(random));
    drawn.map_err(|error| FilesError::io("no random bytes for", path)(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::test_dir::TestDir;

    #[test]
    fn an_id_stays_until_it_is_copied() {
        let dir = TestDir::new();
        let path = dir.join("instance-id");
        let first = Identity::open(&path).unwrap();
        assert_eq!((fs::metadata(&path).unwrap().mode() & 0o777, first.before), (0o600, None));
        let inode = || fs::metadata(&path).unwrap().ino();
        let before = inode();
        let again = Identity::open(&path).unwrap();
        assert_eq!((again.id, again.before), (first.id, Some(first.process)));
        assert_eq!(inode(), before, "written in its place, which waits for no disk");
        assert_ne!(again.process, first.process);
        let copy = dir.join("copy");
        fs::copy(&path, &copy).unwrap();
        let copied = Identity::open(&copy).unwrap();
        assert_ne!(copied.id, first.id);
        assert_eq!(copied.before, None);
        assert_eq!(Identity::open(&copy).unwrap().id, copied.id, "it is its own now");
        assert_eq!(Identity::open(&path).unwrap().id, first.id);
    }

    #[test]
    fn another_machine_or_another_start_of_it() {
        let dir = TestDir::new();
        let path = dir.join("instance-id");
        let first = Identity::open(&path).unwrap();
        let change = |line: usize, to: &str| {
            let text = fs::read_to_string(&path).unwrap();
            let mut lines: Vec<&str> = text.lines().collect();
            lines[line] = to;
            fs::write(&path, lines.join("\n")).unwrap();
            Identity::open(&path).unwrap()
        };
        let booted = change(2, &format!("{} 1 another-start", first.process));
        assert_eq!((booted.id, booted.before), (first.id, None));
        let inode = fs::metadata(&path).unwrap().ino();
        assert_ne!(change(1, &format!("{inode} another-machine")).id, first.id);
    }

    #[test]
    fn a_file_of_an_older_version_is_taken_over() {
        let dir = TestDir::new();
        let path = dir.join("instance-id");
        let old = "0123456789abcdef0123456789abcdef";
        fs::write(&path, format!("{old}\n")).unwrap();
        assert_eq!(Identity::open(&path).unwrap().id.to_string(), old);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
        for bad in ["", "\n", "abc", &"g".repeat(32), &"A".repeat(32), &format!("{old}0")] {
            fs::write(&path, bad).unwrap();
            let error = Identity::open(&path).unwrap_err().to_string();
            assert!(error.contains("instance-id") && error.contains("32"), "{error}");
        }
    }
}
