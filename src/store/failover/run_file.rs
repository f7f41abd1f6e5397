//! The run id of the server that served last, on this instance's disk: a process that is started must
//! know whether Redis was started again meanwhile (`docs/model`, row 30d).

use std::path::PathBuf;

use crate::files::{self, FilesError};

/// The file.
#[derive(Clone, Debug)]
pub struct RunFile(pub PathBuf);

impl RunFile {
    /// The run id, if one was kept.
    pub(super) fn read(&self) -> Option<String> {
        let read = files::read(&self.0).inspect_err(|error| log::warn!("{error}"));
        let text = String::from_utf8(read.ok()??).ok()?;
        Some(text.trim().to_owned()).filter(|run_id| !run_id.is_empty())
    }

    pub(super) fn write(&self, run_id: &str) -> Result<(), FilesError> {
        files::write_atomic(&self.0, format!("{run_id}\n").as_bytes(), 0o600)
    }
}
