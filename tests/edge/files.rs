//! When descriptors run out: accepting pauses, somebody goes, and it goes on, where `tiny_http`
//! alone stops for good.

use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use crate::common::{alone, one_response, serve, until};
use rustix::net::{AddressFamily, SocketType, connect, socket};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Allows five files more, and connects 60 clients, whose files are there already.
fn crowd(addr: SocketAddr) -> Vec<TcpStream> {
    let new = |_| socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    let sockets: Vec<OwnedFd> = (0..60).map(new).collect();
    let next = File::open("/dev/null").unwrap().as_raw_fd() as u64;
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(next + 5), maximum }).unwrap();
    let enter = |socket: OwnedFd| connect(&socket, &addr).is_ok().then(|| TcpStream::from(socket));
    sockets.into_iter().filter_map(enter).collect()
}

#[test]
fn accepting_goes_on_when_descriptors_are_back() {
    alone("files::accepting_goes_on_when_descriptors_are_back", run_out_of_descriptors);
}

fn run_out_of_descriptors() {
    let before = getrlimit(Resource::Nofile);

    let bare = tiny_http::Server::http("127.0.0.1:0").unwrap();
    let streams = crowd(bare.server_addr().to_ip().unwrap());
    // Either it reports the error, and its accepting thread ends, or that thread panics.
    while bare.recv_timeout(Duration::from_millis(500)).is_ok_and(|request| request.is_some()) {}
    setrlimit(Resource::Nofile, before).unwrap();
    drop(streams);
    if let Ok(mut late) = TcpStream::connect(bare.server_addr().to_ip().unwrap()) {
        let _ = late.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    let request = bare.recv_timeout(Duration::from_millis(500));
    assert!(!request.is_ok_and(|request| request.is_some()), "tiny_http accepts again");

    let served = serve(|_| {});
    let mut streams = crowd(served.addr);
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
