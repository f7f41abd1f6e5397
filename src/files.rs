//! Files that survive a power cut, and folders that one process owns.
//!
//! A file is either absent, old or new, never half: it is written beside its name, synced, renamed,
//! and the folder is synced too (a rename is not on disk before that).

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::digits::{from_hex, hex};

/// The file that carries a folder's lock.
const LOCK_NAME: &str = ".lock";

/// Random bytes of a secret that is made here.
const SECRET_BYTES: usize = 32;

/// What [`try_writing`] writes: more than a certificate, so that a disk which takes it takes one too.
const TRIAL_BYTES: usize = 4096;

/// What went wrong with which file, for the operator.
#[derive(Debug)]
pub struct FilesError {
    /// As the operating system has it.
    pub kind: io::ErrorKind,
    text: String,
}

impl FilesError {
    /// The operating system refused `what`: `cannot write`, `cannot read` …
    pub fn io(what: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| FilesError {
            kind: source.kind(),
            text: format!("{what} {}: {source}", path.display()),
        }
    }

    /// A file does not hold the digits that were once written into it.
    pub fn garbled(path: &Path, digits: usize) -> Self {
        let path = path.display();
        let text = format!(
            "{path} should hold {digits} lower-case hexadecimal digits; remove it to have a new one made"
        );
        FilesError { kind: io::ErrorKind::InvalidData, text }
    }
}

impl fmt::Display for FilesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for FilesError {}

/// Reads a whole file, or `None` if there is none.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, FilesError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(FilesError::io("cannot read", path)(e)),
    }
}

/// Makes a folder, and those above it, unless it is there; an existing one is left as it is.
pub fn make_dir(path: &Path, mode: u32) -> Result<(), FilesError> {
    if path.is_dir() {
        return Ok(());
    }
    let made = DirBuilder::new().recursive(true).mode(mode).create(path);
    // The umask may have taken bits that others (the broker) need.
    made.and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)))
        .map_err(FilesError::io("cannot make folder", path))
}

/// Replaces a file as a whole; after `Ok` the new one is on disk.
/// After an error the old file is still there, unless the last step failed, the sync of the folder:
/// then either may be.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FilesError> {
    write_atomic_by(path, mode, &mut |file| file.write_all(bytes))
}

/// As [`write_atomic`], for what is too large to be held whole: `write` writes it, bit by bit.
pub fn write_atomic_by(
    path: &Path,
    mode: u32,
    write: &mut dyn FnMut(&mut File) -> io::Result<()>,
) -> Result<(), FilesError> {
    let dir = folder_of(path);
    let mut beside = std::ffi::OsString::from(".");
    beside.push(path.file_name().unwrap_or_default());
    beside.push(".new");
    let beside = dir.join(beside);
    remove_if_there(&beside)?; // left by a crash, perhaps with another mode
    let mut create = || {
        let mut file = create(&beside, mode)?;
        write(&mut file)?;
        file.sync_all()
    };
    let written = create().map_err(FilesError::io("cannot write", path));
    let written = written.and_then(|()| rename_synced(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside); // the error that counts is the first
    }
    written
}

/// Gives a file that is on disk another name in its folder, which is on disk then, too. After an error
/// either name may be there.
pub fn rename_synced(from: &Path, to: &Path) -> Result<(), FilesError> {
    fs::rename(from, to).map_err(FilesError::io("cannot write", to))?;
    sync_dir(folder_of(to))
}

/// Writes a file that must not exist yet. If it is synced, its name is on disk after [`sync_dir`]; else
/// neither it nor its name is before [`Synced::sync`]. After an error part of it may stay.
pub fn create_new(path: &Path, bytes: &[u8], mode: u32, synced: bool) -> Result<(), FilesError> {
    let create = || {
        let mut file = create(path, mode)?;
        file.write_all(bytes)?;
        if synced { file.sync_all() } else { Ok(()) }
    };
    create().map_err(FilesError::io("cannot write", path))
}

fn create(path: &Path, mode: u32) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(Permissions::from_mode(mode))?; // the umask may have taken bits
    Ok(file)
}

/// Proves that files can be made in a folder, or that it can be made: then by another beside it, or above,
/// that is removed at once.
pub fn try_folder(dir: &Path) -> Result<(), FilesError> {
    match fs::metadata(dir) {
        Ok(_) => return try_writing(dir, true),
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(FilesError::io("cannot open folder", dir)(e));
        }
        Err(_) => {}
    }
    let there = dir.ancestors().skip(1).map(or_here).find(|above| above.exists());
    let trial = trial_in(there.unwrap_or(Path::new("/")));
    let made = fs::create_dir(&trial).and_then(|()| fs::remove_dir(&trial));
    made.map_err(FilesError::io("cannot make folder", dir))
}

/// Another process may try the same folder at the same time.
fn trial_in(dir: &Path) -> PathBuf {
    dir.join(format!(".trial-{}", std::process::id()))
}

/// A relative path ends in nothing, which means here.
fn or_here(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

/// Proves that files can be made in a folder: writes a small one, syncs it if need be, and removes it.
pub fn try_writing(dir: &Path, synced: bool) -> Result<(), FilesError> {
    let path = trial_in(dir);
    remove_if_there(&path)?; // left by a crash
    let written = create_new(&path, &[0; TRIAL_BYTES], 0o600, synced);
    let removed = remove_if_there(&path);
    written.and(removed)
}

pub fn remove_if_there(path: &Path) -> Result<(), FilesError> {
    match fs::remove_file(path) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(FilesError::io("cannot remove", path)(e))
        }
        _ => Ok(()),
    }
}

/// Moves a file into another folder of the same file system, under a name that is free there, which it
/// returns.
pub fn move_into(path: &Path, dir: &Path) -> Result<PathBuf, FilesError> {
    make_dir(dir, 0o755)?;
    let name = path.file_name().unwrap_or_default();
    let numbered = |n: u32| {
        let mut name = name.to_owned();
        if n > 0 {
            name.push(format!(".{n}"));
        }
        dir.join(name)
    };
    let free = (0..).map(numbered).find(|to| !to.exists()).unwrap_or_else(|| dir.join(name));
    fs::rename(path, &free).map_err(FilesError::io("cannot move", path))?;
    sync_dir(dir)?;
    sync_dir(folder_of(path))?;
    Ok(free)
}

/// Puts the names in a folder on disk.
pub fn sync_dir(dir: &Path) -> Result<(), FilesError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(FilesError::io("cannot sync folder", dir))
}

/// A file system that is synced at once: one wait for many files, where each would be one of its own.
/// What others have written there is waited for too.
#[derive(Debug)]
pub struct Synced<'a> {
    dir: &'a Path,
    /// Opened before anything is written: syncfs(2) tells of errors since then.
    opened: File,
}

impl<'a> Synced<'a> {
    /// The file system of the folder, if its word can be taken: from Linux 5.17 on, and not where one
    /// stands for another (overlayfs) or nobody knows.
    pub fn of(dir: &'a Path) -> Option<Self> {
        let opened = File::open(dir).ok()?;
        let is_told = is_from_5_17(&rustix::system::uname().release().to_string_lossy());
        let kind = rustix::fs::fstatfs(&opened).ok()?.f_type;
        // The type of `f_type` and its sign are another's on each platform.
        (is_told && TELL_OF_ERRORS.contains(&(kind as u32))).then_some(Synced { dir, opened })
    }

    pub fn sync(&self) -> Result<(), FilesError> {
        let sync = || Ok(rustix::fs::syncfs(&self.opened)?);
        sync().map_err(FilesError::io("cannot sync the file system of", self.dir))
    }
}

/// ext4, XFS, btrfs, tmpfs (statfs(2)).
const TELL_OF_ERRORS: [u32; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994];

fn is_from_5_17(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (5_u32, 17_u32),
        _ => false,
    }
}

/// The folder that holds `path`.
fn folder_of(path: &Path) -> &Path {
    path.parent().map_or(Path::new("."), or_here)
}

/// The hexadecimal text of random bytes, made once and kept in a file of mode 0600.
///
/// The text itself is the secret, so that another instance may be given the same file to read.
pub fn read_or_create_secret(path: &Path) -> Result<String, FilesError> {
    if let Some(text) = read_secret(path)? {
        warn_if_others_may_read(path);
        return Ok(text);
    }
    let mut random = [0; SECRET_BYTES];
    getrandom::fill(&mut random)
        .map_err(|e| FilesError::io("no random bytes for", path)(io::Error::other(e)))?;
    let text = hex(&random);
    write_atomic(path, format!("{text}\n").as_bytes(), 0o600)?;
    Ok(text)
}

/// What [`read_or_create_secret`] has made; `None` if it has not.
pub fn read_secret(path: &Path) -> Result<Option<String>, FilesError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let text = std::str::from_utf8(&bytes).ok().map(|text| text.trim_end_matches(['\r', '\n']));
    let text = text.filter(|text| from_hex::<SECRET_BYTES>(text).is_some());
    let garbled = || FilesError::garbled(path, 2 * SECRET_BYTES);
    text.map(|text| Some(text.to_owned())).ok_or_else(garbled)
}

/// Warns of a secret that more than its owner may read or change.
pub fn warn_if_others_may_read(path: &Path) {
    if let Ok(meta) = fs::metadata(path)
        && meta.mode() & 0o077 != 0
    {
        log::warn!("{} holds a secret and others may open it: chmod 600", path.display());
    }
}

/// The sign that this process owns an existing folder; given up when it is dropped, or when the process
/// ends in whatever way. A process cannot take the same folder twice either.
pub fn lock_folder(dir: &Path) -> Result<File, FilesError> {
    let path = dir.join(LOCK_NAME);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(FilesError::io("cannot open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let text = format!("folder {} is owned by another running process", dir.display());
            Err(FilesError { kind: io::ErrorKind::WouldBlock, text })
        }
        Err(TryLockError::Error(e)) => Err(FilesError::io("cannot lock", &path)(e)),
    }
}

/// A folder for one test, removed when dropped.
#[cfg(test)]
pub mod test_dir {
    use super::{Path, PathBuf, fs};
    use std::sync::atomic::{AtomicU32, Ordering};

    /// See the module.
    pub struct TestDir(PathBuf);

    #[allow(clippy::new_without_default, reason = "a folder on disk is no default value")]
    impl TestDir {
        /// A new empty folder.
        pub fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name =
                format!("mpl-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            TestDir(path)
        }
    }

    impl std::ops::Deref for TestDir {
        type Target = Path;
        fn deref(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for TestDir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::test_dir::TestDir;
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let dir = TestDir::new();
        let path = dir.join("f");
        fs::write(dir.join(".f.new"), "left by a crash").unwrap();
        write_atomic(&path, b"one", 0o600).unwrap();
        assert_eq!((fs::read(&path).unwrap(), mode(&path)), (b"one".to_vec(), 0o600));
        write_atomic(&path, b"two", 0o644).unwrap();
        assert_eq!((fs::read(&path).unwrap(), mode(&path)), (b"two".to_vec(), 0o644));
        assert_eq!(fs::read_dir(&*dir).unwrap().count(), 1);
        let error = write_atomic(&dir.join("no/such"), b"", 0o600).unwrap_err();
        assert!(error.to_string().contains("no/such: No such file"), "{error}");
    }

    #[test]
    fn a_new_file_never_replaces_another() {
        let dir = TestDir::new();
        create_new(&dir.join("f"), b"one", 0o640, true).unwrap();
        let error = create_new(&dir.join("f"), b"two", 0o640, true).unwrap_err();
        assert_eq!(error.kind, io::ErrorKind::AlreadyExists);
        assert_eq!(read(&dir.join("f")).unwrap(), Some(b"one".to_vec()));
        assert_eq!(read(&dir.join("g")).unwrap(), None);
        sync_dir(&dir).unwrap();
    }

    #[test]
    fn many_files_are_synced_together_where_that_can_be_believed() {
        let dir = TestDir::new();
        create_new(&dir.join("f"), b"one", 0o640, false).unwrap();
        assert_eq!(
            (read(&dir.join("f")).unwrap(), mode(&dir.join("f"))),
            (Some(b"one".to_vec()), 0o640)
        );
        let error = create_new(&dir.join("f"), b"two", 0o640, false).unwrap_err();
        assert_eq!(error.kind, io::ErrorKind::AlreadyExists);
        if let Some(synced) = Synced::of(&dir) {
            synced.sync().unwrap();
        }
        assert!(Synced::of(&dir.join("no")).is_none());
        assert!(Synced::of(Path::new("/proc")).is_none(), "procfs is not in the list");
        for new in ["5.17.0", "5.19.0-28-arm64", "6.1", "10.0.1"] {
            assert!(is_from_5_17(new), "{new}");
        }
        for old in ["5.16.19", "5.8", "4.19.0", "3.18", "5", "", "x.y"] {
            assert!(!is_from_5_17(old), "{old}");
        }
    }

    #[test]
    fn a_trial_leaves_nothing_and_names_the_folder() {
        let dir = TestDir::new();
        fs::write(dir.join(format!(".trial-{}", std::process::id())), "left by a crash").unwrap();
        try_writing(&dir, true).unwrap();
        assert_eq!(fs::read_dir(&*dir).unwrap().count(), 0);
        let error = try_writing(&dir.join("no"), true).unwrap_err().to_string();
        assert!(error.starts_with("cannot write ") && error.contains("/no/.trial-"), "{error}");
    }

    #[test]
    fn what_is_moved_replaces_nothing() {
        let dir = TestDir::new();
        let moved = [(); 3].map(|()| {
            fs::write(dir.join("f"), "one").unwrap();
            move_into(&dir.join("f"), &dir.join("aside")).unwrap()
        });
        let names = ["aside/f", "aside/f.1", "aside/f.2"].map(|name| dir.join(name));
        assert_eq!(moved, names);
        assert!(names.iter().all(|name| name.exists()) && !dir.join("f").exists());
        assert!(move_into(&dir.join("f"), &dir.join("aside")).is_err());
    }

    #[test]
    fn folders_are_made_with_their_mode() {
        let dir = TestDir::new();
        make_dir(&dir.join("a/b"), 0o755).unwrap();
        assert_eq!(mode(&dir.join("a/b")), 0o755);
        make_dir(&dir.join("a/b"), 0o700).unwrap();
        assert_eq!(mode(&dir.join("a/b")), 0o755, "an existing folder is left as it is");
    }

    #[test]
    fn one_owner_a_folder() {
        let dir = TestDir::new();
        let lock = lock_folder(&dir).unwrap();
        let error = lock_folder(&dir).unwrap_err().to_string();
        assert!(error.contains(dir.to_str().unwrap()) && error.contains("another"), "{error}");
        drop(lock);
        lock_folder(&dir).unwrap();
    }

    #[test]
    fn a_secret_is_made_once() {
        let dir = TestDir::new();
        let path = dir.join("instance-id");
        let made = read_or_create_secret(&path).unwrap();
        assert_eq!((made.len(), mode(&path)), (64, 0o600));
        assert_eq!(read_or_create_secret(&path).unwrap(), made);
        for bad in ["", "\n", "abc", &"g".repeat(64), &"A".repeat(64), &format!("{made}0")] {
            fs::write(&path, bad).unwrap();
            let error = read_or_create_secret(&path).unwrap_err().to_string();
            assert!(error.contains("instance-id") && error.contains("64"), "{error}");
        }
        fs::write(&path, [0xff; 64]).unwrap();
        assert!(read_or_create_secret(&path).is_err());
    }
}
