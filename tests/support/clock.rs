//! A clock for the program that the test sets: Debian's `faketime` library, told by a file.
//!
//! Only the wall clock is faked; what the program measures by the monotonic clock stays real.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use super::temp::TempDir;

/// Where Debian and others have the library; `$LIB` is the linker's word for `lib/<machine>`, `lib64`
/// or `lib`. The `faketime` command, which knows it, is not asked: it fails where a process that was
/// killed once had its id.
const LIBRARY: &str = "/usr/$LIB/faketime/libfaketimeMT.so.1";

/// A wall clock that programs started with [`FakeClock::env`] see; it runs on from what is set.
#[derive(Debug)]
pub struct FakeClock {
    dir: TempDir,
}

impl FakeClock {
    /// A clock that shows, now, `unix_s` seconds since 1970.
    pub fn at(unix_s: u64) -> Self {
        let clock = FakeClock { dir: TempDir::new() };
        clock.set(unix_s);
        clock
    }

    /// Sets the clock.
    pub fn set(&self, unix_s: u64) {
        let real = i128::from(now_s());
        self.write(&format!("{:+}", i128::from(unix_s) - real));
    }

    /// Sets the clock to the real time.
    pub fn set_right(&self) {
        self.write("+0");
    }

    /// What a program needs in its environment to see this clock.
    pub fn env(&self) -> Vec<(&str, String)> {
        vec![
            ("LD_PRELOAD", LIBRARY.to_owned()),
            ("FAKETIME_TIMESTAMP_FILE", self.file().display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("offset")
    }

    fn write(&self, offset: &str) {
        // By renaming: the library reads the file at every call and must never see half of it.
        let new = self.dir.file("offset.new", offset);
        std::fs::rename(new, self.file()).unwrap();
    }
}

/// Seconds since 1970 by the real clock.
pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Milliseconds since 1970 by the real clock.
pub fn now_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// Seconds since 1970 of `2025-11-27T10:00:00…` or `2025-11-27 10:00:00Z`, UTC.
pub fn parse_utc(text: &str) -> u64 {
    let number = |range: std::ops::Range<usize>| -> i64 {
        let digits = text.get(range).and_then(|t| t.parse().ok());
        digits.unwrap_or_else(|| panic!("not a date: {text:?}"))
    };
    let (year, month, day) = (number(0..4), number(5..7), number(8..10));
    let (hour, minute, second) = (number(11..13), number(14..16), number(17..19));
    // Days since 1970 by H. Hinnant's days_from_civil, for years that begin in March.
    let y = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = y * 365 + y / 4 - y / 100 + y / 400 + day_of_year - 719_468;
    u64::try_from(days * 86_400 + hour * 3600 + minute * 60 + second).unwrap()
}

/// `2025-11-27T10:00:00.000Z`, by `date`, which shares no code with [`parse_utc`].
pub fn rfc3339(unix_s: u64) -> String {
    let args = ["-u", "-d", &format!("@{unix_s}"), "+%Y-%m-%dT%H:%M:%S.000Z"];
    String::from_utf8(Command::new("date").args(args).output().unwrap().stdout)
        .unwrap()
        .trim()
        .to_owned()
}

impl Drop for FakeClock {
    /// The library keeps a semaphore and a piece of shared memory for each process, named after its
    /// id. One that is killed, or ends as shells do, leaves both behind, and whoever is given the
    /// same id later fails to make his own: the `faketime` command does not start then.
    fn drop(&mut self) {
        for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            let pid =
                ["sem.faketime_sem_", "faketime_shm_"].iter().find_map(|p| name.strip_prefix(p));
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}
