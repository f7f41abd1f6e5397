//! Reads single variables: from the environment or, for secrets, from the file that one names.
//!
//! Nothing here knows what a variable is for. Every failure becomes a [`ConfigError`], which is one
//! line that names the variable, what it was unless that is secret, and what it may be.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::{self, Display};
use std::io;
use std::path::{Path, PathBuf};

use super::variables::{self, Allowed, Variable};
use super::{Secret, names, secret};

/// U+FEFF in UTF-8.
pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Why the configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    name: String,
    value: Option<String>,
    reason: String,
}

impl ConfigError {
    /// `variable` is set to `value`, and that is wrong for `reason`.
    pub(super) fn new(variable: &Variable, value: &str, reason: impl fmt::Display) -> Self {
        let value = (!variable.is_secret()).then(|| value.to_owned());
        ConfigError { name: variable.name.to_owned(), value, reason: reason.to_string() }
    }

    /// The file that `variable` names cannot be used for `reason`.
    pub(super) fn file(variable: &Variable, path: &Path, reason: impl fmt::Display) -> Self {
        ConfigError::new(variable, &path.to_string_lossy(), reason)
    }

    /// A file of variables cannot be used for `reason`.
    pub fn env_file(path: &Path, reason: impl fmt::Display) -> Self {
        let value = Some(path.to_string_lossy().into_owned());
        ConfigError { name: "--env-file".to_owned(), value, reason: reason.to_string() }
    }

    /// As [`ConfigError::new`], where there is no value or none that may be shown.
    pub(super) fn bare(name: impl Into<String>, reason: impl fmt::Display) -> Self {
        ConfigError { name: name.into(), value: None, reason: reason.to_string() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(value) = &self.value {
            // Quoted, so that it stays one line whatever it holds, and cut, so that it stays short.
            let shown: String = value.chars().take(100).collect();
            let more = if shown.len() < value.len() { "…" } else { "" };
            write!(f, "={shown:?}{more}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

impl std::error::Error for ConfigError {}

/// Settings, each with what it is and how it is read, by what those before it say, too: they become a
/// structure that reads itself.
macro_rules! settings {
    (
        $(#[$about:meta])* $name:ident, $vars:ident:
        $($(#[$what:meta])* $field:ident: $type:ty = $read:expr;)*
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug)]
        pub struct $name {
            $($(#[$what])* pub $field: $type,)*
        }

        impl $name {
            fn from_vars($vars: &Vars<'_>) -> Result<Self, ConfigError> {
                $(let $field = $read;)*
                Ok($name { $($field),* })
            }
        }
    };
}
pub(super) use settings;

/// A secret, and the variable that has it.
type Found = (&'static Variable, Secret<Vec<u8>>);

/// The environment and the files that it names.
pub(super) struct Vars<'a> {
    lookup: &'a dyn Fn(&str) -> Option<OsString>,
    read: &'a dyn Fn(&Path) -> io::Result<Vec<u8>>,
    /// What counts, as `check-config` shows it.
    shown: RefCell<BTreeMap<&'static str, String>>,
    warnings: RefCell<Vec<String>>,
}

impl<'a> Vars<'a> {
    pub fn new(
        lookup: &'a dyn Fn(&str) -> Option<OsString>,
        read: &'a dyn Fn(&Path) -> io::Result<Vec<u8>>,
    ) -> Self {
        Vars { lookup, read, shown: RefCell::default(), warnings: RefCell::default() }
    }

    /// What counts of a variable is this, not what was typed. Control characters are escaped: a
    /// value cannot pass for a line of its own.
    pub fn show(&self, variable: &Variable, value: impl Display) {
        let mut shown = String::new();
        for c in value.to_string().chars() {
            match c.is_control() {
                true => shown.extend(c.escape_default()),
                false => shown.push(c),
            }
        }
        let shown = if shown.is_empty() { "(unset)".to_owned() } else { shown };
        self.shown.borrow_mut().insert(variable.name, shown);
    }

    /// The operator should know of this, although it does not stop the start.
    pub fn warn(&self, warning: String) {
        self.warnings.borrow_mut().push(warning);
    }

    pub fn warnings(&self) -> Vec<String> {
        self.warnings.take()
    }

    /// Another variable says more.
    pub fn hide(&self, variable: &Variable) {
        self.shown.borrow_mut().remove(variable.name);
    }

    /// A line `NAME=value` for each variable that was read, in the order of the table; of a secret
    /// only whether it is set.
    pub fn shown(&self) -> Vec<String> {
        let shown = self.shown.borrow();
        let line = |v: &Variable| Some(format!("{}={}", v.name, shown.get(v.name)?));
        variables::ALL.iter().filter_map(line).collect()
    }

    /// The variable if it is set, even to nothing. What Kubernetes sets under one of our names for a
    /// service of its own is none of ours.
    pub fn set(&self, name: &str) -> Result<Option<String>, ConfigError> {
        (self.lookup)(name)
            .filter(|value| !names::is_of_kubernetes(name, value))
            .map(|value| value.into_string().map_err(|_| ConfigError::bare(name, "must be UTF-8")))
            .transpose()
    }

    /// The variable if it is set to something.
    pub fn given(&self, name: &str) -> Result<Option<String>, ConfigError> {
        Ok(self.set(name)?.filter(|value| !value.is_empty()))
    }

    /// The variable, or its default, as `parse` understands it.
    pub fn parsed<T>(
        &self,
        variable: &Variable,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let given = self.given(variable.name)?;
        let text = given.as_deref().unwrap_or(variable.default);
        self.show(variable, text);
        parse(text).ok_or_else(|| ConfigError::new(variable, text, variable.allowed))
    }

    /// The variable as `parse` understands it, if it is set.
    pub fn optional<T>(
        &self,
        variable: &Variable,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        if self.given(variable.name)?.is_none() {
            self.show(variable, variable.default);
            return Ok(None);
        }
        self.parsed(variable, parse).map(Some)
    }

    pub fn number<T: TryFrom<u64>>(&self, variable: &Variable) -> Result<T, ConfigError> {
        self.parsed(variable, |text| {
            let digits = text.bytes().all(|b| b.is_ascii_digit());
            let number: u64 = digits.then(|| text.parse().ok()).flatten()?;
            let Allowed::Number(min, max) = variable.allowed else { return None };
            (min..=max).contains(&number).then(|| T::try_from(number).ok()).flatten()
        })
    }

    pub fn flag(&self, variable: &Variable) -> Result<bool, ConfigError> {
        let flag = self.parsed(variable, |text| match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(true),
            "false" | "0" | "no" | "off" => Some(false),
            _ => None,
        })?;
        self.show(variable, flag);
        Ok(flag)
    }

    /// One of the variable's words, in lower or upper case; `meanings` stand in the order of the words.
    pub fn choice<T: Copy>(&self, variable: &Variable, meanings: &[T]) -> Result<T, ConfigError> {
        let (word, meaning) = self.parsed(variable, |text| {
            let Allowed::OneOf(words) = variable.allowed else { return None };
            let mut known = words.iter().zip(meanings);
            known.find(|(word, _)| text.eq_ignore_ascii_case(word))
        })?;
        self.show(variable, word);
        Ok(*meaning)
    }

    pub fn path(&self, variable: &Variable) -> Result<PathBuf, ConfigError> {
        self.parsed(variable, |text| Some(PathBuf::from(text)))
    }

    pub fn optional_path(&self, variable: &Variable) -> Result<Option<PathBuf>, ConfigError> {
        self.optional(variable, |text| Some(PathBuf::from(text)))
    }

    /// A secret: the variable itself, or what the file holds that `<NAME>_FILE` names.
    pub fn secret(&self, variable: &Variable) -> Result<Option<Secret<Vec<u8>>>, ConfigError> {
        let file_name = format!("{}_FILE", variable.name);
        let found = match (self.given(variable.name)?, self.given(&file_name)?) {
            (None, None) => Ok(None),
            (Some(value), None) => Ok(Some(Secret::new(value.into_bytes()))),
            (None, Some(path)) => self.secret_file(file_name, &path).map(Some),
            (Some(_), Some(_)) => {
                let reason = format!("must be unset when {file_name} is set");
                Err(ConfigError::bare(variable.name, reason))
            }
        }?;
        self.show(variable, if found.is_some() { "(set)" } else { "(unset)" });
        Ok(found)
    }

    pub fn first_secret<const N: usize>(
        &self,
        variables: [&'static Variable; N],
    ) -> Result<Option<Found>, ConfigError> {
        for variable in variables {
            if let Some(secret) = self.secret(variable)? {
                return Ok(Some((variable, secret)));
            }
        }
        Ok(None)
    }

    pub fn secret_text(&self, variable: &Variable) -> Result<Option<Secret>, ConfigError> {
        self.secret(variable)?.map(|secret| text_of(variable, secret)).transpose()
    }

    /// What the file holds that `variable` names.
    pub fn contents(&self, variable: &Variable, path: &Path) -> Result<Vec<u8>, ConfigError> {
        (self.read)(path).map_err(|e| {
            ConfigError::file(variable, path, format!("{}, but it gives: {e}", variable.allowed))
        })
    }

    fn secret_file(&self, name: String, path: &str) -> Result<Secret<Vec<u8>>, ConfigError> {
        let refuse = |reason: String| ConfigError { name, value: Some(path.to_owned()), reason };
        let bytes = match (self.read)(Path::new(path)) {
            Ok(bytes) => bytes,
            Err(e) => return Err(refuse(format!("must be a readable file, but it gives: {e}"))),
        };
        let bytes = secret::of_file(bytes);
        if bytes.is_empty() {
            return Err(refuse("must be a file that is not empty".to_owned()));
        }
        Ok(Secret::new(bytes))
    }
}

pub(super) fn text_of(variable: &Variable, secret: Secret<Vec<u8>>) -> Result<Secret, ConfigError> {
    let text = String::from_utf8(secret.reveal().clone());
    text.map(Secret::new).map_err(|_| ConfigError::bare(variable.name, "must be UTF-8"))
}
