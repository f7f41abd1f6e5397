//! For measuring: a way to a server as long as one likes.
//!
//! `delay PORT ADDRESS MILLISECONDS` listens on the port of loopback and passes everything on, each
//! direction half of the time later, whatever comes behind it: a distance, not a narrow road.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::TcpStreamExt as _;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [port, address, round_trip] = &arguments[..] else {
        return Err("usage: delay PORT ADDRESS MILLISECONDS".into());
    };
    let address: SocketAddr = address.parse()?;
    let one_way = Duration::from_millis(round_trip.parse()?) / 2;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port.parse()?))?;
    for near in listener.incoming() {
        let near = near?;
        let far = TcpStream::connect(address)?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        carry(near.try_clone()?, far.try_clone()?, one_way);
        carry(far, near, one_way);
    }
    Ok(())
}

/// Reads at once and writes when it is time, so that what is on its way never waits for itself.
fn carry(mut from: TcpStream, mut to: TcpStream, one_way: Duration) {
    let (sender, on_its_way) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || -> io::Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let n = from.read(&mut buffer)?;
            // At a real distance the kernel there acknowledges at once; here, after 40 ms, and a
            // sender that counts its packets (BBR on loopback allows four) would wait for that.
            from.set_quickack(true)?;
            let arrives = Instant::now() + one_way;
            let Some(bytes) = buffer.get(..n).filter(|bytes| !bytes.is_empty()) else {
                return Ok(());
            };
            if sender.send((arrives, bytes.to_vec())).is_err() {
                return Ok(());
            }
        }
    });
    thread::spawn(move || -> io::Result<()> {
        for (arrives, bytes) in on_its_way {
            thread::sleep(arrives.saturating_duration_since(Instant::now()));
            to.write_all(&bytes)?;
        }
        to.shutdown(Shutdown::Write)
    });
}
