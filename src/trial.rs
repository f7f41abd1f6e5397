//! Whether what is kept can be written: known from the last attempt, and tried without being asked.
//!
//! A request for which something could not be written is answered 503, and whoever watches the service
//! must learn of it (`/ready`). Nobody else may come for hours, so after a failure it is tried by
//! small files that are written where the real ones are, until that works.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Mutex;

use crate::files::{self, FilesError};
use crate::locks::locked;

/// Something that is kept on disk, and whether that can be written.
#[derive(Debug)]
pub struct Trial {
    what: &'static str,
    /// Where files are made for it.
    folders: Vec<PathBuf>,
    /// To this lines are appended.
    file: PathBuf,
    /// That it cannot be written, and why; nothing if the last attempt worked.
    trouble: Mutex<Option<String>>,
}

impl Trial {
    /// `what` is kept in `file`, beside which and in these folders files are made.
    pub fn new(what: &'static str, folders: Vec<PathBuf>, file: PathBuf) -> Self {
        Trial { what, folders, file, trouble: Mutex::default() }
    }

    /// Remembers the outcome of an attempt to write, and passes it on.
    pub fn note<E: fmt::Display>(&self, outcome: Result<(), E>) -> Result<(), E> {
        let what = self.what;
        let failure = outcome.as_ref().err().map(|why| format!("{what} cannot be written: {why}"));
        let mut trouble = locked(&self.trouble);
        match (&failure, trouble.is_some()) {
            (None, true) => log::info!("{what} can be written again"),
            (Some(failure), false) => log::error!("{failure}"),
            _ => {}
        }
        *trouble = failure;
        outcome
    }

    /// Why it cannot be written, as far as the last attempt tells.
    pub fn trouble(&self) -> Option<String> {
        locked(&self.trouble).clone()
    }

    /// Finds out whether it can be written.
    pub fn try_out(&self) {
        let mut disks = BTreeSet::new();
        // A disk that syncs one file syncs the others, too.
        let try_folder = |folder: &PathBuf| {
            let disk = fs::metadata(folder).ok().map(|found| found.dev());
            files::try_writing(folder, disks.insert(disk))
        };
        let attempt = self.folders.iter().try_for_each(try_folder).and_then(|()| {
            let opened = OpenOptions::new().append(true).open(&self.file);
            opened.map(drop).map_err(FilesError::io("cannot write", &self.file))
        });
        let _ = self.note(attempt); // what went wrong is logged and kept there
    }
}
