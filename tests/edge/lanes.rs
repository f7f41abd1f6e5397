//! Lanes that fail: nobody reads another's answer, and the lane comes back.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::common::{one_response, settings, statuses, to_end, until, until_open};
use mqtt_publisher_lite::EdgeCounters;
use mqtt_publisher_lite::edge::{Edge, Handle, LaneAddress, Outbox, Wait};
use mqtt_publisher_lite::http::{Reply, lanes};

/// An edge whose lanes' other ends are played.
struct Staged {
    addr: SocketAddr,
    handle: Handle,
    counters: Arc<EdgeCounters>,
}

/// A request on its way through a lane.
struct Asked<'a> {
    number: u64,
    stream: &'a mut UnixStream,
    outbox: &'a Outbox,
}

impl Asked<'_> {
    fn answer(&self, number: u64, body: &str) {
        (self.outbox)(vec![(number, Reply::of_type("text/plain", body))]);
    }

    fn well(&self) -> bool {
        self.answer(self.number, "ok");
        true
    }
}

/// What a worker does with a request; false closes the lane.
type Worker = Box<dyn Fn(Asked<'_>) -> bool + Send>;

fn stage(worker: impl Fn(Asked<'_>) -> bool + Send + 'static) -> Staged {
    stage_all(vec![Box::new(worker)])
}

/// A lane for each worker.
fn stage_all(workers: Vec<Worker>) -> Staged {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let listen = |_: &Worker| {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("edge-lane-{}-{n}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        (UnixListener::bind(&path).unwrap(), path)
    };
    let (listeners, paths): (Vec<_>, Vec<_>) = workers.iter().map(listen).unzip();
    let address = |path| LaneAddress {
        kind: lanes::PLAIN,
        connect: Box::new(move || UnixStream::connect(&path)),
        max_waiting: 1024,
    };
    let mut settings = settings();
    settings.deadlines.set(Wait::Work, Duration::from_millis(500));
    let counters = Arc::clone(&settings.counters);
    let edge = Edge::open(settings, paths.into_iter().map(address).collect()).unwrap();
    for (worker, listener) in workers.into_iter().zip(listeners) {
        let outbox = edge.outbox();
        thread::spawn(move || {
            for stream in listener.incoming() {
                play(stream.unwrap(), &outbox, &worker);
            }
        });
    }
    let staged = Staged { addr: edge.local_addr(), handle: edge.handle(), counters };
    thread::spawn(move || edge.run());
    until_open(&staged.handle);
    staged
}

/// Answers proofs as it should, and leaves the rest to `worker`.
fn play(mut stream: UnixStream, outbox: &Outbox, worker: &Worker) {
    let (mut text, mut byte) = (String::new(), [0]);
    while stream.read(&mut byte).is_ok_and(|n| n == 1) {
        text.push(byte[0].into());
        if !text.ends_with("\r\n\r\n") {
            continue;
        }
        let target = text.split(' ').nth(1).unwrap();
        let number = target.split(',').next().unwrap().parse().unwrap();
        let is_proof = target.ends_with(",*");
        text.clear();
        if is_proof {
            outbox(vec![(number, Reply::empty(204))]);
        } else if !worker(Asked { number, stream: &mut stream, outbox }) {
            return;
        }
    }
}

const ASK: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

fn ask(staged: &Staged) -> String {
    let mut stream = TcpStream::connect(staged.addr).unwrap();
    stream.write_all(ASK).unwrap();
    to_end(&mut stream)
}

/// The first request is answered by `badly`, the others well. The first asker gets `expected`;
/// then the lane is lost, opened again and used.
fn check(expected: &[u16], badly: impl Fn(Asked<'_>) -> bool + Send + 'static) {
    let count = AtomicU32::new(0);
    let staged = stage(move |asked| match count.fetch_add(1, Ordering::Relaxed) {
        0 => badly(asked),
        _ => asked.well(),
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
    check(&[503], |_| false);
}

/// There is one way back only, and it is not the socket.
#[test]
fn a_lane_that_is_written_to() {
    check(&[503], |asked| {
        let number = asked.number;
        let head = format!("HTTP/1.1 200 OK\r\nX-Number: {number}\r\nContent-Length: 6\r\n\r\n");
        asked.stream.write_all((head + "secret").as_bytes()).is_ok()
    });
    check(&[503], |asked| asked.stream.write_all(b"x").is_ok());
}

#[test]
fn a_lane_that_answers_another() {
    check(&[503], |asked| {
        asked.answer(asked.number + 1, "secret");
        asked.answer(0, "secret");
        let _ = asked.stream.read_to_end(&mut Vec::new()); // until the edge gives it up
        false
    });
}

#[test]
fn a_lane_that_does_not_answer() {
    check(&[503], |asked| {
        let _ = asked.stream.read_to_end(&mut Vec::new()); // until the edge gives it up
        asked.answer(asked.number, "secret");
        false
    });
}

#[test]
fn a_second_answer_reaches_nobody() {
    let staged = stage(|asked| {
        asked.answer(asked.number, "first");
        asked.answer(asked.number, "secret");
        true
    });
    let mut stream = TcpStream::connect(staged.addr).unwrap();
    for _ in 0..20 {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        assert_eq!(one_response(&mut stream, false).2, "first");
    }
    assert_eq!(staged.counters.lanes_lost.value(), 0);
}

/// Whatever the order, each client gets its own.
#[test]
fn answers_come_in_any_order() {
    let waiting = Mutex::new(Vec::new());
    let staged = stage(move |asked| {
        let mut waiting = waiting.lock().unwrap();
        waiting.push(asked.number);
        if waiting.len() == 8 {
            let numbers = waiting.drain(..).rev();
            let text = |number: u64| Reply::of_type("text/plain", number.to_string());
            (asked.outbox)(numbers.map(|number| (number, text(number))).collect());
        }
        true
    });
    let mut streams: Vec<_> = (0..8).map(|_| TcpStream::connect(staged.addr).unwrap()).collect();
    for round in 0..10 {
        let before = staged.counters.requests.value();
        for (sent, stream) in (1..).zip(&mut streams) {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            until("it is handed on", || staged.counters.requests.value() == before + sent);
        }
        let read = |stream| one_response(stream, false).2.parse::<u64>().unwrap();
        let numbers: Vec<u64> = streams.iter_mut().map(read).collect();
        assert!(numbers.is_sorted(), "{round}: {numbers:?}");
    }
}

#[test]
fn the_first_lane_is_used_while_it_is_quick_and_the_next_when_it_waits() {
    let counts = [(); 2].map(|()| Arc::new(AtomicU32::new(0)));
    // A slow one answers when the other has been asked.
    let worker = |own: usize, is_slow: bool| -> Worker {
        let counts = counts.clone();
        Box::new(move |asked| {
            counts[own].fetch_add(1, Ordering::Relaxed);
            until("the other is asked", || !is_slow || counts[1 - own].load(Ordering::Relaxed) > 0);
            asked.well()
        })
    };
    let counted = || counts.each_ref().map(|count| count.swap(0, Ordering::Relaxed));
    let staged = stage_all(vec![worker(0, false), worker(1, false)]);
    for _ in 0..20 {
        assert_eq!(statuses(&ask(&staged)), [200]);
    }
    assert_eq!(counted(), [20, 0]);
    staged.handle.shutdown();
    let staged = stage_all(vec![worker(0, true), worker(1, false)]);
    let mut slow = TcpStream::connect(staged.addr).unwrap();
    slow.write_all(ASK).unwrap();
    until("the first is at work", || counts[0].load(Ordering::Relaxed) == 1);
    thread::sleep(Duration::from_millis(20)); // longer than what counts as quick
    assert_eq!(statuses(&ask(&staged)), [200]);
    assert_eq!(statuses(&to_end(&mut slow)), [200]);
    assert_eq!(counted(), [1, 1]);
    staged.handle.shutdown();
}

#[test]
fn a_lane_that_stays_away_is_counted() {
    let staged = stage(|_| std::panic::panic_any("the listener goes with this thread"));
    assert_eq!(staged.counters.lanes_down.value(), 0);
    assert_eq!(statuses(&ask(&staged)), [503]);
    until("it is counted", || staged.counters.lanes_down.value() == 1);
    assert_eq!(statuses(&ask(&staged)), [503]);
    staged.handle.shutdown();
}

#[test]
fn a_client_that_leaves_does_not_shift_the_answers() {
    let staged = stage(|asked| {
        thread::sleep(Duration::from_millis(3));
        asked.answer(asked.number, &asked.number.to_string());
        true
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
    served.probe(); // another lane answers meanwhile
    assert_eq!(first.load(Ordering::SeqCst) + second.load(Ordering::SeqCst), 0);
    until("it is done", || second.load(Ordering::SeqCst) == 1);
    assert_eq!(first.load(Ordering::SeqCst), 0, "who asked again takes the place");
    served.shutdown();
}

/// A lane that is lost meanwhile proves itself by what opens it again.
#[test]
fn a_proof_outlives_the_loss_of_its_lane() {
    let asked_before = AtomicU32::new(0);
    let staged = stage(move |asked| {
        asked_before.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) && asked.well()
    });
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
