//! Which servers were told everything: the run id of one, or of all masters of a cluster, joined. By a run
//! id that is another one, or not known, a server may have lost what it was told (`docs/model`, row 30).
//! It is kept on this instance's disk, for a process that is started must know this, too (row 30d).

use std::path::PathBuf;

use crate::files::{self, FilesError};

const JOIN: char = '+';
/// Stands for masters that are away.
const AWAY: &str = "?";

/// One id of these, which are all masters, or all that are in reach.
pub fn joined(mut runs: Vec<String>, are_all: bool) -> String {
    runs.sort();
    runs.extend((!are_all).then(|| AWAY.to_owned()));
    runs.join(&JOIN.to_string())
}

/// Whether this run of one server is among those that are known.
pub fn has(known: &str, run: &str) -> bool {
    known.split(JOIN).any(|known| known == run)
}

/// Whether none of the masters that are in reach is another one than is known. When one that was away is
/// back, or its place is another's, all are doubted: it may have lost what it was told, and others may have
/// got its keys.
pub fn are_known(known: &str, runs: &str) -> bool {
    known == runs || !is_whole(runs) && runs.split(JOIN).all(|run| run == AWAY || has(known, run))
}

/// None is away.
pub fn is_whole(runs: &str) -> bool {
    !has(runs, AWAY)
}

/// Where the run id of the server that served last is kept.
#[derive(Clone, Debug)]
pub struct RunFile(pub PathBuf);

impl RunFile {
    /// The run id, if one was kept.
    pub(in crate::store) fn read(&self) -> Option<String> {
        let read = files::read(&self.0).inspect_err(|error| log::warn!("{error}"));
        let text = String::from_utf8(read.ok()??).ok()?;
        Some(text.trim().to_owned()).filter(|run_id| !run_id.is_empty())
    }

    pub(in crate::store) fn write(&self, run_id: &str) -> Result<(), FilesError> {
        files::write_atomic(&self.0, format!("{run_id}\n").as_bytes(), 0o600)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_told_everything() {
        let run = |runs: &str, are_all| joined(runs.chars().map(String::from).collect(), are_all);
        let rows = [
            ("cab", true, true, "in any order"),
            ("ab", false, true, "c is away"),
            ("ab", true, false, "another has the keys of c"),
            ("abd", true, false, "c has failed over"),
            ("ad", false, false, "the same, and b is away"),
        ];
        for (runs, are_all, expected, what) in rows {
            assert_eq!(are_known(&run("abc", true), &run(runs, are_all)), expected, "{what}");
        }
        let partly = run("ab", false);
        let then =
            [("a", false, true), ("ab", false, true), ("ab", true, false), ("abc", true, false)];
        for (runs, are_all, expected) in then {
            assert_eq!(are_known(&partly, &run(runs, are_all)), expected, "then {runs}");
        }
    }
}
