//! Tells a service manager how we are: systemd's `sd_notify(3)`, by plain datagrams.
//!
//! Nothing here can stop the service: a manager that does not listen is warned of once. A sign of
//! life is sent only for a proof of life, an answer of every worker; while one is missing the manager
//! hears nothing, which is what makes it act.

use std::fmt;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::clock::{self, Now};
use crate::config::Supervision;

/// How often the status is looked at if no watchdog says how often to be heard.
const STATUS_EVERY: Duration = Duration::from_secs(5);
/// Longest wait for a manager that does not read.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// The service manager, if there is one.
pub struct Manager {
    link: Option<Link>,
    /// Half of the time after which the manager would end us.
    watchdog: Option<Duration>,
    /// When [`Manager::is_due`] next.
    due_ms: u64,
    ready: bool,
    status: String,
}

/// The way to the manager. Not connected: a manager that was started anew is reached too.
struct Link {
    socket: UnixDatagram,
    address: SocketAddr,
    failed: bool,
}

impl Manager {
    pub fn new(supervision: &Supervision, now: Now) -> Self {
        let link = supervision.notify_socket.as_deref().and_then(|name| {
            let opened = Link::open(name);
            opened.map_err(|e| log::warn!("NOTIFY_SOCKET={name:?} cannot be used: {e}")).ok()
        });
        let watchdog = supervision.watchdog_of(std::process::id()).map(|longest| longest / 2);
        let status = String::new();
        Manager { link, watchdog, due_ms: now.mono_ms, ready: false, status }
    }

    /// How long to wait for something else before [`Manager::is_due`]; `None`: nothing ever is.
    pub fn due_in(&self, now: Now) -> Option<Duration> {
        self.link.as_ref()?;
        Some(Duration::from_millis(self.due_ms.saturating_sub(now.mono_ms)))
    }

    /// True at regular intervals: the caller then has the service prove that it lives, and says how
    /// it is.
    pub fn is_due(&mut self, now: Now) -> bool {
        let due = self.link.is_some() && self.due_ms <= now.mono_ms;
        if due {
            let pause = self.watchdog.unwrap_or(STATUS_EVERY);
            let millis = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            self.due_ms = now.mono_ms.saturating_add(millis.max(1));
        }
        due
    }

    /// The service has proven that it answers.
    pub fn alive(&mut self) {
        if !self.ready {
            self.ready = true;
            self.send("READY=1");
        }
        if self.watchdog.is_some() {
            self.send("WATCHDOG=1");
        }
    }

    /// Says in a sentence how the service is, if that has changed.
    pub fn status(&mut self, status: impl fmt::Display) {
        let status = status.to_string();
        if status != self.status {
            self.send(&format!("STATUS={status}"));
            self.status = status;
        }
    }

    /// The configuration is read again, until [`Manager::reloaded`].
    pub fn reloading(&mut self) {
        // With the time at which it began the manager tells it from an earlier one.
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", clock::machine_us()));
    }

    /// The configuration was read again, or stays as it was.
    pub fn reloaded(&mut self) {
        // Before the first proof there is nothing to go back to.
        if self.ready {
            self.send("READY=1");
        }
    }

    pub fn stopping(&mut self) {
        self.send("STOPPING=1\nSTATUS=Finishing what was begun");
    }

    fn send(&mut self, state: &str) {
        let Some(link) = &mut self.link else { return };
        match link.socket.send_to_addr(state.as_bytes(), &link.address) {
            Ok(_) => link.failed = false,
            Err(e) if !link.failed => {
                link.failed = true;
                log::warn!("the service manager cannot be told how we are: {e}");
            }
            Err(_) => {}
        }
    }
}

impl Link {
    fn open(name: &str) -> io::Result<Self> {
        let address = match name.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None if name.starts_with('/') => SocketAddr::from_pathname(name)?,
            None => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Link { socket, address, failed: false })
    }
}
