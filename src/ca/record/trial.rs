//! Whether the record can be written: known from the last attempt, and tried without being asked.
//!
//! A request that could not be recorded is answered 503, and whoever watches the service must learn
//! of it (`/ready`). Nobody else may come for hours, so after a failure the record is tried by a
//! small file that is written as certificates are, until that works.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Mutex;

use super::{CERTS, INDEX, Record, RecordError, repair};
use crate::files::{self, FilesError};
use crate::locks::locked;

/// Why the record cannot be written; nothing if the last attempt worked.
#[derive(Debug, Default)]
pub(super) struct Trial(Mutex<Option<String>>);

impl Trial {
    /// Remembers the outcome of an attempt to write, and passes it on.
    pub(super) fn note(&self, outcome: Result<(), RecordError>) -> Result<(), RecordError> {
        let mut trouble = locked(&self.0);
        match (&outcome, trouble.is_some()) {
            (Ok(()), true) => log::info!("the record of certificates can be written again"),
            (Err(error), false) => {
                log::error!("the record of certificates cannot be written: {error}")
            }
            _ => {}
        }
        *trouble = outcome.as_ref().err().map(ToString::to_string);
        outcome
    }
}

impl Record {
    /// Checks that the record in `dir` can be read and written, and changes nothing. Returns whether
    /// nothing is recorded there.
    pub fn check(dir: &Path) -> Result<bool, RecordError> {
        files::try_folder(&dir.join(CERTS)).map_err(RecordError::not_written)?;
        let index = repair::read_index(&dir.join(INDEX))?;
        Ok(index.is_none_or(|(rows, _)| rows.list.is_empty()))
    }

    /// Why the record cannot be written, as far as the last attempt tells.
    pub fn trouble(&self) -> Option<String> {
        locked(&self.trial.0).clone()
    }

    /// Finds out whether the record can be written: tries a file where certificates go and one beside
    /// `index.txt`, and opens that for a line.
    pub fn try_out(&self) -> Result<(), RecordError> {
        let index = self.dir.join(INDEX);
        let certs = self.dir.join(CERTS);
        let device = |dir: &Path| fs::metadata(dir).ok().map(|found| found.dev());
        // A disk that syncs one file syncs the other, too.
        let is_apart = device(&certs) != device(&self.dir);
        let attempt = files::try_writing(&certs, true)
            .and_then(|()| files::try_writing(&self.dir, is_apart))
            .and_then(|()| {
                let opened = OpenOptions::new().append(true).open(&index);
                opened.map(drop).map_err(FilesError::io("cannot write", &index))
            })
            .map_err(RecordError::not_written);
        self.trial.note(attempt)
    }
}
