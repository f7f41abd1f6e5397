//! Ports that stay one fixture's own, however often its server stops and starts.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with};

/// A port that nobody else is given until this is dropped.
///
/// A socket is bound to it, at every address, that never listens. The kernel gives the port to nobody who asks for any
/// port, in whatever process, nor to a connection that goes out; whoever asks for this very port
/// with `SO_REUSEADDR`, as servers do, gets it; and while no server is there, connections are refused.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _held: OwnedFd,
}

impl Port {
    /// Any port that is free.
    pub fn any() -> Port {
        let tcp = (AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC);
        let held = socket_with(tcp.0, tcp.1, tcp.2, None).unwrap();
        set_socket_reuseaddr(&held, true).unwrap();
        bind(&held, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
        let number = SocketAddr::try_from(getsockname(&held).unwrap()).unwrap().port();
        Port { number, _held: held }
    }

    pub fn number(&self) -> u16 {
        self.number
    }
}
