//! Standard error, where the log goes.

use std::cell::RefCell;
use std::io::{self, Write};

thread_local! {
    /// What this thread has logged and is to be written together; `None` if it is written at once.
    static HELD: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// Writes what this thread logs during `work` together when that ends, be it by a panic: a batch of
/// requests is a batch of lines, and a system call for each costs more than making it.
pub fn together<T>(work: impl FnOnce() -> T) -> T {
    let _release = Release;
    HELD.set(Some(Vec::new()));
    work()
}

struct Release;

impl Drop for Release {
    fn drop(&mut self) {
        let lines = HELD.take().unwrap_or_default();
        // If that fails, there is nowhere left to say so.
        let _ = io::stderr().lock().write_all(&lines);
    }
}

/// Standard error, or what is held to be written there.
#[derive(Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        HELD.with_borrow_mut(|held| match held {
            Some(lines) => lines.write(bytes),
            None => io::stderr().lock().write(bytes),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::panic;

    use super::*;

    fn held() -> Option<usize> {
        HELD.with_borrow(|held| held.as_ref().map(Vec::len))
    }

    #[test]
    fn what_is_held_is_let_go_at_the_end_and_at_a_panic() {
        assert_eq!(held(), None);
        let result = together(|| {
            Stderr.write_all(b"a line\n").unwrap();
            held()
        });
        assert_eq!((result, held()), (Some(7), None));
        let panicked = panic::catch_unwind(|| together(|| panic!("on purpose")));
        assert!(panicked.is_err());
        assert_eq!(held(), None);
    }
}
