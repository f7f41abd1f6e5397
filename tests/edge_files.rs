//! When descriptors run out: accepting pauses, somebody goes, and it goes on. (`tiny_http` alone
//! stops accepting for good.) A file of its own, because the limit is the whole process'.
#![allow(clippy::unwrap_used)] // Only `#[test]`s are exempt.

mod edge_common;

use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use edge_common::{one_response, serve, until};
use rustix::net::{AddressFamily, SocketType, connect, socket};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[test]
fn accepting_goes_on_when_descriptors_are_back() {
    let served = serve(|_| {});
    let sockets: Vec<_> =
        (0..60).map(|_| socket(AddressFamily::INET, SocketType::STREAM, None).unwrap()).collect();
    // Room for five more.
    let next = File::open("/dev/null").unwrap().as_raw_fd() as u64;
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(next + 5), maximum: before.maximum })
        .unwrap();
    let mut streams: Vec<TcpStream> = Vec::new();
    for socket in sockets {
        connect(&socket, &served.addr).unwrap();
        streams.push(socket.into());
    }
    until("accepting pauses", || served.counters.accept_pauses.value() > 2);
    // Whoever came last still gets in, because the idle give way.
    let mut last = streams.pop().unwrap();
    last.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(one_response(&mut last, false).0, 200);
    assert!(served.counters.gave_way.value() > 0);
    setrlimit(Resource::Nofile, before).unwrap();
    drop(streams);
    until("the others are gone", || served.counters.open.value() == 1);
    served.probe();
}
