//! The real `openssl`, for tests: whoever checks our certificates is not us.

use std::path::Path;
use std::process::Command;

/// Runs `openssl` in a folder, by the words of `line`, and gives what it says on both channels.
/// `Err` if it fails.
pub fn run(dir: &Path, line: &str) -> Result<String, String> {
    run_program(dir, "openssl", line)
}

/// The same for any program.
pub fn run_program(dir: &Path, program: &str, line: &str) -> Result<String, String> {
    let words = line.split_whitespace().map(|w| w.replace('~', " "));
    let words: Vec<String> = words.collect();
    let run = || Command::new(program).args(&words).current_dir(dir).output().unwrap();
    let mut out = run();
    // faketime names what it shares by its process id, and one that was killed left it behind.
    for _ in 0..5 {
        if String::from_utf8_lossy(&out.stderr).contains("sem_open") {
            out = run();
        }
    }
    let mut said = String::from_utf8_lossy(&out.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&out.stderr));
    if out.status.success() { Ok(said) } else { Err(said) }
}

/// Runs what must succeed.
pub fn must(dir: &Path, line: &str) -> String {
    run(dir, line).unwrap_or_else(|e| panic!("openssl {line}: {e}"))
}
