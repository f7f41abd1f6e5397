//! Handshakes are computed on a thread beside the edge: a signature with RSA 4096 takes 5 ms on a PC
//! and 100 ms on a slow ARM, and a client that replays a ClientHello gets one for nothing.
//!
//! The steps that wait are taken by subscriber in turn, see [`Turns`]; a crowd of replayers delays
//! a newcomer by the one step that is being computed. What comes after the signature is cheap and
//! waits for nothing else.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::Acceptor;
use super::stream::Stream;
use super::turns::Turns;
use crate::locks::locked;
use crate::subscriber::Subscriber;

/// Enough for the largest numbers that RSA has.
const STACK_BYTES: usize = 256 * 1024;
/// How much more willing the thread is to leave the processor to others: on a machine with one, those
/// who are connected must not wait for those who want to be.
const NICE: i32 = 5;

/// A step of a connection's handshake, before or after it was computed.
pub struct HandshakeStep {
    pub at: usize,
    /// The connection's: another may have its place by now.
    pub generation: u64,
    /// Its TLS, with what the client has sent.
    pub tls: Box<Stream>,
}

pub struct Computed {
    pub step: HandshakeStep,
    /// What the client sent behind its handshake.
    pub plain: Vec<u8>,
    pub output: Vec<u8>,
    /// Whether the client will send no more.
    pub outcome: Result<bool, rustls::Error>,
}

/// The thread, for the edge.
pub struct Handshakes {
    /// What new connections get.
    pub acceptor: Arc<Acceptor>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    steps: Mutex<Steps>,
    changed: Condvar,
}

#[derive(Default)]
struct Steps {
    /// Steps that may sign, and those after the signature.
    costly: Turns<HandshakeStep>,
    cheap: VecDeque<HandshakeStep>,
    stopped: bool,
}

impl Handshakes {
    /// Starts the thread, which gives each step to `done` when it is computed.
    pub fn start(
        acceptor: Arc<Acceptor>,
        done: impl Fn(Computed) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared { steps: Mutex::default(), changed: Condvar::new() });
        let own = Arc::clone(&shared);
        let builder = thread::Builder::new().name("handshakes".to_owned()).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || own.work(&done))?;
        Ok(Handshakes { acceptor, shared, thread: Some(thread) })
    }

    /// Has a step computed for a client of this subscriber.
    pub fn submit(&self, subscriber: Subscriber, step: HandshakeStep) {
        let mut steps = locked(&self.shared.steps);
        match step.tls.has_signed() {
            true => steps.cheap.push_back(step),
            false => steps.costly.push(subscriber, step),
        }
        drop(steps);
        self.shared.changed.notify_one();
    }

    /// Forgets the step of a connection that is closed, if it still waits.
    pub fn cancel(&self, at: usize) {
        let mut steps = locked(&self.shared.steps);
        steps.costly.remove(|step| step.at == at);
        steps.cheap.retain(|step| step.at != at);
    }
}

impl Drop for Handshakes {
    fn drop(&mut self) {
        locked(&self.shared.steps).stopped = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // If it panicked, that was logged.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self, done: &dyn Fn(Computed)) {
        if let Err(e) = rustix::process::nice(NICE) {
            log::debug!("handshakes have the priority of all else: {e}");
        }
        while let Some(step) = self.next() {
            done(compute(step));
        }
    }

    /// Waits for a step; `None` at the end.
    fn next(&self) -> Option<HandshakeStep> {
        let mut steps = locked(&self.steps);
        while !steps.stopped {
            let cheap = steps.cheap.pop_front();
            if let Some(step) = cheap.or_else(|| steps.costly.pop()) {
                return Some(step);
            }
            steps = self.changed.wait(steps).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }
}

/// What panics costs its own connection only.
fn compute(mut step: HandshakeStep) -> Computed {
    let (mut plain, mut output) = (Vec::new(), Vec::new());
    let advance = AssertUnwindSafe(|| step.tls.advance(&mut plain, &mut output));
    let outcome = catch_unwind(advance)
        .unwrap_or_else(|_| Err(rustls::Error::General("the handshake panicked".into())));
    Computed { step, plain, output, outcome }
}
