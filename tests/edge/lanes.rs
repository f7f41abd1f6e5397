//! Lanes that fail: nobody reads another's answer, and the lane comes back.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::{one_response, statuses, to_end, until};
use mqtt_publisher_lite::edge::{Counters, Edge, Handle, LaneAddress, Settings};
use mqtt_publisher_lite::http::LaneKind;

/// An edge with one lane, whose other end is played by `answer`: given a request's number and the
/// connection, false to close it.
struct Staged {
    addr: SocketAddr,
    handle: Handle,
    counters: Arc<Counters>,
}

/// Whatever a worker answers a request with this number; false closes the lane.
type Worker = Box<dyn Fn(u64, &mut UnixStream) -> bool + Send>;

fn stage(answer: impl Fn(u64, &mut UnixStream) -> bool + Send + 'static) -> Staged {
    stage_all(vec![Box::new(answer)])
}

/// A lane for each worker.
fn stage_all(workers: Vec<Worker>) -> Staged {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let lane = |answer: Worker| {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("edge-lane-{}-{n}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                play(stream.unwrap(), &answer);
            }
        });
        LaneAddress { kind: LaneKind::Plain, path }
    };
    let mut settings = Settings::new((Ipv4Addr::LOCALHOST, 0).into());
    settings.deadlines.work = Duration::from_millis(500);
    let edge = Edge::open(settings, workers.into_iter().map(lane).collect()).unwrap();
    let staged =
        Staged { addr: edge.local_addr(), handle: edge.handle(), counters: edge.counters() };
    thread::spawn(move || edge.run());
    until("the lane is open", || staged.handle.is_ready());
    staged
}

/// Answers proofs as it should, and leaves the rest to `answer`.
fn play(mut stream: UnixStream, answer: &dyn Fn(u64, &mut UnixStream) -> bool) {
    let (mut text, mut byte) = (String::new(), [0]);
    while stream.read(&mut byte).is_ok_and(|n| n == 1) {
        text.push(byte[0].into());
        if !text.ends_with("\r\n\r\n") {
            continue;
        }
        let private = text.split("X-Edge: ").nth(1).unwrap();
        let number = private.split(' ').next().unwrap().parse().unwrap();
        let is_proof = text.starts_with("OPTIONS *");
        text.clear();
        if is_proof {
            write!(stream, "HTTP/1.1 204 No Content\r\nX-Edge: {number}\r\n\r\n").unwrap();
        } else if !answer(number, &mut stream) {
            return;
        }
    }
}

fn well(number: u64, stream: &mut UnixStream) -> bool {
    write!(stream, "HTTP/1.1 200 OK\r\nX-Edge: {number}\r\nContent-Length: 2\r\n\r\nok").is_ok()
}

const ASK: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

fn ask(staged: &Staged) -> String {
    let mut stream = TcpStream::connect(staged.addr).unwrap();
    stream.write_all(ASK).unwrap();
    to_end(&mut stream)
}

/// The first request is answered by `badly`, the others well. The first asker gets `expected`;
/// then the lane is lost, opened again and used.
fn check(expected: &[u16], badly: impl Fn(u64, &mut UnixStream) -> bool + Send + 'static) {
    let count = AtomicU32::new(0);
    let staged = stage(move |number, stream| match count.fetch_add(1, Ordering::Relaxed) {
        0 => badly(number, stream),
        _ => well(number, stream),
    });
    let text = ask(&staged);
    assert_eq!(statuses(&text), expected, "{text}");
    assert!(!text.contains("secret"), "{text}");
    until("the loss is noticed", || staged.counters.lanes_lost.value() == 1);
    until("the lane is back", || statuses(&ask(&staged)) == [200]);
    assert_eq!(staged.counters.lanes_lost.value(), 1);
    staged.handle.shutdown();
}

#[test]
fn a_lane_that_closes() {
    check(&[503], |_, _| false);
}

#[test]
fn a_lane_that_closes_within_an_answer() {
    check(&[200], |number, stream| {
        write!(stream, "HTTP/1.1 200 OK\r\nX-Edge: {number}\r\nContent-Length: 9\r\n\r\nok")
            .unwrap();
        false
    });
    check(&[503], |number, stream| {
        write!(stream, "HTTP/1.1 200 OK\r\nX-Edge: {number}\r\nConte").unwrap();
        false
    });
}

#[test]
fn a_lane_that_answers_another() {
    check(&[503], |number, stream| {
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nX-Edge: {}\r\nContent-Length: 6\r\n\r\nsecret",
            number + 1
        )
        .is_ok()
    });
}

#[test]
fn a_lane_that_answers_without_a_number() {
    check(&[503], |_, stream| {
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret").is_ok()
    });
}

#[test]
fn a_lane_that_answers_twice() {
    check(&[200], |number, stream| {
        let answer = format!("HTTP/1.1 200 OK\r\nX-Edge: {number}\r\nContent-Length: 0\r\n\r\n");
        let second = answer.replace(": 0", ": 6") + "secret";
        stream.write_all((answer + &second).as_bytes()).is_ok()
    });
}

#[test]
fn a_lane_that_does_not_speak_http() {
    check(&[503], |_, stream| stream.write_all(b"secret\r\n\r\n").is_ok());
    check(&[503], |number, stream| {
        write!(stream, "HTTP/1.1 200 OK\r\nX-Edge: {number}\r\nTransfer-Encoding: chunked\r\n\r\n")
            .is_ok()
    });
    check(&[503], |number, stream| {
        let _ = write!(stream, "HTTP/1.1 200 OK\r\nX-Edge: {number}\r\nX: ");
        let _ = stream.write_all(&[b'x'; 100_000]);
        true
    });
}

#[test]
fn a_lane_that_does_not_answer() {
    check(&[503], |_, stream| {
        let _ = stream.read_to_end(&mut Vec::new()); // until the edge gives it up
        stream.write_all(b"too late").is_err()
    });
}

#[test]
fn the_first_lane_is_used_while_it_is_quick_and_the_next_when_it_waits() {
    let counts = [(); 2].map(|()| Arc::new(AtomicU32::new(0)));
    let worker = |count: &Arc<AtomicU32>, wait: Duration| -> Worker {
        let count = Arc::clone(count);
        Box::new(move |number, stream| {
            count.fetch_add(1, Ordering::Relaxed);
            thread::sleep(wait);
            well(number, stream)
        })
    };
    let counted = || counts.each_ref().map(|count| count.swap(0, Ordering::Relaxed));
    let wait = |ms| Duration::from_millis(ms);
    let staged = stage_all(vec![worker(&counts[0], wait(0)), worker(&counts[1], wait(0))]);
    for _ in 0..20 {
        assert_eq!(statuses(&ask(&staged)), [200]);
    }
    assert_eq!(counted(), [20, 0]);
    staged.handle.shutdown();
    let staged = stage_all(vec![worker(&counts[0], wait(400)), worker(&counts[1], wait(0))]);
    let mut slow = TcpStream::connect(staged.addr).unwrap();
    slow.write_all(ASK).unwrap();
    until("the first is at work", || counts[0].load(Ordering::Relaxed) == 1);
    thread::sleep(wait(20));
    assert_eq!(statuses(&ask(&staged)), [200]);
    assert_eq!(counted(), [1, 1]);
    assert_eq!(statuses(&to_end(&mut slow)), [200]);
    staged.handle.shutdown();
}

#[test]
fn a_lane_that_stays_away_is_counted() {
    let staged = stage(|_, _| std::panic::panic_any("the listener goes with this thread"));
    assert_eq!(staged.counters.lanes_down.value(), 0);
    assert_eq!(statuses(&ask(&staged)), [503]);
    until("it is counted", || staged.counters.lanes_down.value() == 1);
    assert_eq!(statuses(&ask(&staged)), [503]);
    staged.handle.shutdown();
}

#[test]
fn answers_in_pieces_of_every_size() {
    let staged = stage(|number, stream| {
        let answer =
            format!("HTTP/1.1 200 OK\r\nX-Edge: {number}\r\nContent-Length: 10\r\n\r\n0123456789");
        for piece in answer.as_bytes().chunks(1 + number as usize % 17) {
            stream.write_all(piece).unwrap();
            thread::sleep(Duration::from_micros(200));
        }
        true
    });
    let mut stream = TcpStream::connect(staged.addr).unwrap();
    for _ in 0..40 {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let (status, _, body) = one_response(&mut stream, false);
        assert_eq!((status, body.as_str()), (200, "0123456789"));
    }
    assert_eq!(staged.counters.lanes_lost.value(), 0);
}

#[test]
fn a_client_that_leaves_does_not_shift_the_answers() {
    let staged = stage(|number, stream| {
        thread::sleep(Duration::from_millis(3));
        let body = format!("{number:020}");
        write!(stream, "HTTP/1.1 200 OK\r\nX-Edge: {number}\r\nContent-Length: 20\r\n\r\n{body}")
            .is_ok()
    });
    let mut last = 0;
    for round in 0..60 {
        let mut stream = TcpStream::connect(staged.addr).unwrap();
        stream.write_all(ASK).unwrap();
        if round % 3 != 0 {
            continue;
        }
        let (_, _, body) = one_response(&mut stream, false);
        let number: u64 = body.parse().unwrap();
        assert!(number > last);
        last = number;
    }
    assert_eq!(staged.counters.lanes_lost.value(), 0);
}

/// A proof on request is answered behind what waits, by every lane, and not while one hangs.
#[test]
fn the_lanes_prove_that_they_answer() {
    let proven = |handle: &Handle| {
        let answered = Arc::new(AtomicU32::new(0));
        let told = Arc::clone(&answered);
        handle.prove(move || {
            told.fetch_add(1, Ordering::SeqCst);
        });
        answered
    };
    let served = crate::common::serve(|_| ());
    for _ in 0..100 {
        let answered = proven(&served.handle);
        until("the lanes answer", || answered.load(Ordering::SeqCst) == 1);
    }
    // A worker that is at work on something else.
    let mut slow = served.connect();
    slow.write_all(b"POST /api/v1/renew?600 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    until("it is at work", || served.handled.load(Ordering::Relaxed) == 1);
    let (first, second) = (proven(&served.handle), proven(&served.handle));
    thread::sleep(Duration::from_millis(200));
    assert_eq!(first.load(Ordering::SeqCst) + second.load(Ordering::SeqCst), 0);
    until("it is done", || second.load(Ordering::SeqCst) == 1);
    assert_eq!(first.load(Ordering::SeqCst), 0, "who asked again takes the place");
    served.shutdown();
}

/// A lane that is lost meanwhile proves itself by what opens it again.
#[test]
fn a_proof_outlives_the_loss_of_its_lane() {
    let staged = stage(|number, stream| number % 2 == 0 && well(number, stream));
    for _ in 0..20 {
        let told = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&told);
        let mut stream = TcpStream::connect(staged.addr).unwrap();
        stream.write_all(ASK).unwrap();
        staged.handle.prove(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        until("the lane answers", || told.load(Ordering::SeqCst) == 1);
        let _ = to_end(&mut stream);
    }
}
