//! What the documents quote of the program is what the program says.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use mqtt_publisher_lite::config::variables;
use mqtt_publisher_lite::problem::Code;

/// Variables that are not in the table, and words in capitals that are none.
const OTHERS: &[&str] =
    &["CRL", "NOPERM", "RUNTIME_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "READONLY", "OOM"];

#[test]
fn every_log_line_of_the_failure_table_is_in_the_source() {
    let source = squeezed(&read_all(&root().join("src"), "rs"));
    let mut lines = 0;
    for row in read("docs/failures.md").lines().filter(|line| line.starts_with("| ")) {
        for quoted in row.split('`').skip(1).step_by(2).filter(|q| is_log_line(q)) {
            lines += 1;
            for piece in quoted.split('…').map(str::trim).filter(|p| p.len() > 3) {
                assert!(source.contains(&squeezed(piece)), "{piece:?} of {quoted:?}");
            }
        }
    }
    assert!(lines > 25, "{lines}");
}

/// Others are names: of variables, codes, paths and commands.
fn is_log_line(quoted: &str) -> bool {
    quoted.contains(' ') && quoted.len() > 12 && !quoted.starts_with("ulimit")
}

#[test]
fn every_name_in_the_documents_exists() {
    let mut names: Vec<String> = variables::ALL.iter().map(|v| v.name.to_owned()).collect();
    names.extend(names.clone().into_iter().map(|name| format!("{name}_FILE")));
    names.extend(Code::ALL.iter().map(|code| code.row().1.to_owned()));
    names.extend(OTHERS.iter().map(|other| (*other).to_owned()));
    for document in ["security", "failures", "upgrade", "managed-redis"] {
        let text = read(&format!("docs/{document}.md"));
        for quoted in text.split('`').skip(1).step_by(2) {
            for name in quoted.split(|c: char| !c.is_ascii_uppercase() && c != '_') {
                let is_name = name.len() > 3 && name.contains('_') && !name.starts_with('_');
                assert!(!is_name || names.iter().any(|n| n == name), "{document}: {name}");
            }
        }
    }
}

/// Without what a line break in a string literal adds, and with what stands in braces left out.
fn squeezed(text: &str) -> String {
    let joined = text.replace("\\\n", " ");
    joined.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn read_all(dir: &Path, extension: &str) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text.push_str(&read_all(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            text.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
    text
}
