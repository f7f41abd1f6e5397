//! `CRL_HOOK`: the program that tells the broker of a new list.
//!
//! It is run without a shell, with the list's path as its one argument, and knows nothing of us: an
//! environment with `PATH` only, no input, its own process group. It may write to stderr, which goes
//! where our log goes. Whoever does not end in time is killed with all it has started.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use std::os::unix::process::CommandExt as _;

use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::clock;

pub const LIMIT: Duration = Duration::from_secs(10);
/// How often a program that runs is looked at: at first, and at most.
const LOOK: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));
/// Where the program finds others; its own name may be looked for there too.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds the program as [`run`] would, and checks that this user may run it.
pub fn find(program: &Path) -> io::Result<PathBuf> {
    let path = match program.components().count() {
        1 if program.is_relative() => PATH
            .split(':')
            .map(|dir| Path::new(dir).join(program))
            .find(|path| path.is_file())
            .ok_or_else(|| io::Error::other(format!("no such program in {PATH}")))?,
        _ => program.to_owned(),
    };
    if !std::fs::metadata(&path)?.is_file() {
        return Err(io::Error::other("is no file"));
    }
    accessat(CWD, &path, Access::EXEC_OK, AtFlags::EACCESS)
        .map_err(|_| io::Error::other("this user may not execute it: chmod +x"))?;
    check_format(&path)?;
    Ok(path)
}

/// Without a shell nobody runs a script that does not say by what.
fn check_format(path: &Path) -> io::Result<()> {
    let mut head = Vec::new();
    // One may be executed that may not be read.
    let Ok(file) = File::open(path) else { return Ok(()) };
    file.take(256).read_to_end(&mut head)?;
    let Some(line) = head.strip_prefix(b"#!") else {
        let is_script = head.is_ascii() && !head.contains(&0);
        let why = "a script must begin with the line #!/bin/sh, or name another interpreter there";
        return if is_script { Err(io::Error::other(why)) } else { Ok(()) };
    };
    let line = line.split(|b| *b == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line).into_owned();
    let interpreter =
        line.trim_start_matches([' ', '\t']).split([' ', '\t']).next().unwrap_or_default();
    if !Path::new(interpreter).exists() {
        return Err(io::Error::other(format!("its interpreter {interpreter:?} is not there")));
    }
    Ok(())
}

/// Runs `program` with the path of the list, and waits for its end.
pub fn run(program: &Path, list: &Path, limit: Duration) -> io::Result<()> {
    let program = find(program)?;
    // SECURITY: our environment holds keys and passwords; nothing of it goes on.
    let mut child = Command::new(program)
        .arg(list)
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()?;
    match end_of(&mut child, limit)? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(io::Error::other(status.to_string())),
        None => {
            let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            let _ = group.map(|group| kill_process_group(group, Signal::KILL));
            child.wait()?;
            Err(io::Error::other(format!("killed after {} s", limit.as_secs())))
        }
    }
}

/// Looks at the child more and more seldom, so that a quick one is not waited for and a slow one
/// costs little.
fn end_of(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let (begin, mut pause) = (clock::now().mono_ms, LOOK.0);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if u128::from(clock::now().mono_ms - begin) >= limit.as_millis() {
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LOOK.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::test_dir::TestDir;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::Instant;

    fn script(dir: &TestDir, text: &str) -> std::path::PathBuf {
        let path = dir.join("hook");
        // Written by another name: a file that is open for writing cannot be executed (ETXTBSY),
        // and another test may fork while we write.
        let text = format!("#!/bin/sh\n{text}\n");
        crate::files::write_atomic(&path, text.as_bytes(), 0o755).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn it_gets_the_path_and_no_environment() {
        let dir = TestDir::new();
        let out = dir.join("out");
        let hook = script(&dir, &format!("{{ echo \"$#:$1\"; env; }} >{}", out.display()));
        run(&hook, Path::new("/a b/crl.pem"), LIMIT).unwrap();
        let said = fs::read_to_string(out).unwrap();
        let ours = |l: &&str| !["PWD", "SHLVL", "_", "OLDPWD"].iter().any(|n| l.starts_with(n));
        let lines: Vec<&str> = said.lines().filter(ours).collect();
        assert_eq!(lines, ["1:/a b/crl.pem".to_owned(), format!("PATH={PATH}")]);
    }

    #[test]
    fn nothing_that_is_open_here_goes_on() {
        let (dir, _open) = (TestDir::new(), clock::Steps::from_now());
        let out = dir.join("out");
        let hook = script(&dir, &format!("ls -l /proc/self/fd >{}", out.display()));
        run(&hook, &out, LIMIT).unwrap();
        let open = fs::read_to_string(out).unwrap();
        assert!(open.contains("/dev/null") && !open.contains("anon_inode"), "{open}");
    }

    #[test]
    fn failures_have_a_reason() {
        let dir = TestDir::new();
        let check = |text: &str, expected: &str| {
            let hook = script(&dir, text);
            let error = run(&hook, Path::new("x"), Duration::from_millis(300)).unwrap_err();
            assert_eq!(error.to_string(), expected);
        };
        check("exit 3", "exit status: 3");
        let begin = Instant::now();
        check("sleep 20 & echo $! >\"${0%/*}/pid\"; wait", "killed after 0 s");
        assert!(begin.elapsed() < Duration::from_secs(5));
        let pid = fs::read_to_string(dir.join("pid")).unwrap();
        let gone = || !Path::new(&format!("/proc/{}/exe", pid.trim())).exists();
        assert!(
            (0..200).any(|_| gone() || {
                thread::sleep(LOOK.0);
                false
            }),
            "its child lives on"
        );
        let error = run(&dir.join("no-such"), Path::new("x"), LIMIT).unwrap_err();
        assert!(error.to_string().contains("No such file"), "{error}");
    }
}
