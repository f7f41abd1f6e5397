//! The variables that the program is given: its own environment, and files of them (`--env-file`).
//!
//! A file is read as systemd reads an `EnvironmentFile=`, so that a command sees what the service
//! sees: quotes and continued lines, but no `$`. What systemd passes over without a word, a line that
//! is no assignment, is noted.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::str::Chars;

use super::names;
use super::vars::{BYTE_ORDER_MARK, ConfigError};

/// Variables by their names. There is no `Debug`: some are secrets.
#[derive(Clone, Default)]
pub struct Environment {
    own: BTreeMap<String, OsString>,
    files: BTreeMap<String, OsString>,
    ignored: Vec<String>,
}

impl Environment {
    pub fn new(own: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        // None of our names is anything else than UTF-8.
        let named = |(name, value): (OsString, _)| Some((name.into_string().ok()?, value));
        Environment { own: own.into_iter().filter_map(named).collect(), ..Self::default() }
    }

    /// Adds the variables of a file: those of an earlier file give way to them, the environment does
    /// not.
    pub fn add_file(&mut self, path: &Path, contents: &[u8]) -> Result<(), ConfigError> {
        if contents.starts_with(BYTE_ORDER_MARK) {
            let why = "begins with a byte order mark, for which systemd passes over its first line: \
                       save it as UTF-8 without";
            return Err(ConfigError::env_file(path, why));
        }
        let text = std::str::from_utf8(contents).ok().filter(|text| !text.contains('\0'));
        let text = text.ok_or_else(|| ConfigError::env_file(path, "is no text in UTF-8"))?;
        for Line { number, name, value } in lines(text) {
            match value.filter(|_| is_name(&name)) {
                Some(value) => drop(self.files.insert(name, value.into())),
                // Not what stands there, which may be the rest of a key.
                None => self.ignored.push(format!(
                    "line {number} of {} is no NAME=value and is ignored",
                    path.display()
                )),
            }
        }
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<OsString> {
        self.own.get(name).or_else(|| self.files.get(name)).cloned()
    }

    /// What looks like a setting and counts for nothing: a line each, which says what to do.
    pub fn notes(&self) -> Vec<String> {
        let mut all = self.files.clone();
        all.extend(self.own.clone());
        let set = all.iter().filter(|(_, value)| !value.is_empty());
        let unknown = set.filter_map(|(name, value)| names::note(name, value));
        self.ignored.iter().cloned().chain(unknown).collect()
    }
}

/// As systemd's `env_name_is_valid`.
fn is_name(name: &str) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    name.bytes().all(fine) && !name.starts_with(|c: char| c.is_ascii_digit()) && !name.is_empty()
}

/// An assignment, or without a value a line that is none.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    /// Counted from 1.
    number: usize,
    name: String,
    value: Option<String>,
}

/// The lines of a file but for empty ones and comments, by systemd's `parse_env_file_internal`.
fn lines(text: &str) -> Vec<Line> {
    let mut chars = text.chars();
    let mut found = Vec::new();
    loop {
        let rest = chars.as_str().trim_start_matches(is_space);
        let number = text.matches('\n').count() + 1 - rest.matches('\n').count();
        chars = rest.chars();
        match rest.chars().next() {
            None => return found,
            // A backslash at its end continues no comment.
            Some('#' | ';') => drop(chars.find(is_end)),
            Some(_) => {
                let end = rest.find(|c| c == '=' || is_end(&c)).unwrap_or(rest.len());
                let (name, behind) = rest.split_at(end);
                chars = behind.chars();
                let value = (chars.next() == Some('=')).then(|| value(&mut chars));
                found.push(Line {
                    number,
                    name: name.trim_end_matches(is_space).to_owned(),
                    value,
                });
            }
        }
    }
}

fn is_end(c: &char) -> bool {
    matches!(c, '\n' | '\r')
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

/// What stands behind the `=`, up to the end of the line and that included: quoted pieces first, then
/// words, in which a quote is a character like any other.
fn value(chars: &mut Chars<'_>) -> String {
    let mut value = String::new();
    while let Some(c) = chars.next() {
        match c {
            '\n' | '\r' => break,
            ' ' | '\t' => {}
            '\'' => value.extend(chars.by_ref().take_while(|c| *c != '\'')),
            '"' => double_quoted(chars, &mut value),
            '\\' => {
                escaped(chars, &mut value);
                words(chars, &mut value);
                break;
            }
            _ => {
                value.push(c);
                words(chars, &mut value);
                break;
            }
        }
    }
    value
}

/// The rest of the line, without the white space at its end.
fn words(chars: &mut Chars<'_>, value: &mut String) {
    let mut kept = value.len();
    while let Some(c) = chars.next().filter(|c| !is_end(c)) {
        if c == '\\' {
            escaped(chars, value);
        } else {
            value.push(c);
        }
        if c == '\\' || !is_space(c) {
            kept = value.len();
        }
    }
    value.truncate(kept);
}

/// The character itself, but for the end of a line, which continues on the next.
fn escaped(chars: &mut Chars<'_>, value: &mut String) {
    value.extend(chars.next().filter(|c| !is_end(c)));
}

/// As a shell does it, but for `$`.
fn double_quoted(chars: &mut Chars<'_>, value: &mut String) {
    while let Some(c) = chars.next().filter(|c| *c != '"') {
        if c != '\\' {
            value.push(c);
            continue;
        }
        match chars.next() {
            Some(c @ ('"' | '\\' | '`' | '$')) => value.push(c),
            Some('\n') => {}
            other => value.extend([Some('\\'), other].into_iter().flatten()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<(String, String)> {
        let assigned = |line: Line| Some((line.name, line.value?));
        lines(text).into_iter().filter_map(assigned).collect()
    }

    /// The first eight are systemd's own, from `test-env-file.c`.
    #[test]
    fn files_are_read_as_systemd_reads_them() {
        let check = |text: &str, expected: &[(&str, &str)]| {
            let owned = expected.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
            assert_eq!(read(text), owned.collect::<Vec<_>>(), "{text:?}");
        };
        check("a=a\na=b\nb=b\\\nc\n", &[("a", "a"), ("a", "b"), ("b", "bc")]);
        check("d= d\\\ne  \\\nf  \ng=g\\ \n", &[("d", "de  f"), ("g", "g ")]);
        check("h= ąęół\\ śćńźżμ \ni=i\\", &[("h", "ąęół śćńźżμ"), ("i", "i")]);
        check("a=a\\\n", &[("a", "a")]);
        let comments = "#SPAMD_ARGS=\"-d \\\n#--nouser-config  \\\nnormal1=line\\\n111\n;normal=ignored \\\n\
                        normal2=line222\nnormal ignored \\\n";
        check(comments, &[("normal1", "line111"), ("normal2", "line222")]);
        check(
            "# Generated\n\nHWMON_MODULES=\"coretemp f71882fg\"\n\nMODULE_1=f71882fg",
            &[("HWMON_MODULES", "coretemp f71882fg"), ("MODULE_1", "f71882fg")],
        );
        check("a=\nb=", &[("a", ""), ("b", "")]);
        check(
            "a=\\ \\n \\t \\x \\y \\' \nb= \\$'   \nc= ' \\n\\t\\$\\`\\\\\n'   \nd= \" \\n\\t\\$\\`\\\\\n\"   \n",
            &[
                ("a", " n t x y '"),
                ("b", "$'"),
                ("c", " \\n\\t\\$\\`\\\\\n"),
                ("d", " \\n\\t$`\\\n"),
            ],
        );
        check("a='x' \"y\" z\r\nb=z\"y\"\r\n", &[("a", "xyz"), ("b", "z\"y\"")]);
        check(" a = b # c \n  # d=e\n", &[("a", "b # c")]);
        check("a=$HOME ${X} \"$Y\"\n", &[("a", "$HOME ${X} \"$Y\"")]);
        check("a='open\nb=1", &[("a", "open\nb=1")]);
    }

    fn environment(own: &[(&str, &str)], files: &[&str]) -> Environment {
        let own = own.iter().map(|(name, value)| (name.into(), value.into()));
        let mut environment = Environment::new(own);
        for text in files {
            environment.add_file(Path::new("/etc/x"), text.as_bytes()).unwrap();
        }
        environment
    }

    #[test]
    fn the_environment_wins_then_the_last_file() {
        let environment = environment(&[("A", "env"), ("E", "")], &["A=1\nB=1\nE=1\n", "B=2\nC=2"]);
        let get = |name| environment.get(name).map(|value| value.into_string().unwrap());
        assert_eq!(get("A").as_deref(), Some("env"));
        assert_eq!(get("B").as_deref(), Some("2"));
        assert_eq!((get("C").as_deref(), get("D")), (Some("2"), None));
        assert_eq!(get("E").as_deref(), Some(""), "set to nothing is set");
    }

    #[test]
    fn lines_that_count_for_nothing_are_noted_without_what_they_hold() {
        let text = "PORT=1\n\nhunter2\n# c\n1A=hunter\nexport B=hunter\n=hunter\n";
        let notes = environment(&[], &[text]).notes();
        let expected =
            [3, 5, 6, 7].map(|n| format!("line {n} of /etc/x is no NAME=value and is ignored"));
        assert_eq!(notes, expected);
    }

    #[test]
    fn what_is_no_text() {
        let refused = |bytes: &[u8]| {
            let error = Environment::default().add_file(Path::new("/x"), bytes).unwrap_err();
            error.to_string()
        };
        assert!(
            refused(b"\xef\xbb\xbfPORT=1\n").starts_with("--env-file=\"/x\": begins with a byte")
        );
        for bytes in [b"PORT=\xff".as_slice(), b"P\0O\0"] {
            assert_eq!(refused(bytes), "--env-file=\"/x\": is no text in UTF-8");
        }
    }
}
