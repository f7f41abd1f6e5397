//! One client's bytes, turned into requests one at a time. No I/O: bytes in, steps out.
//!
//! A request that arrives in one piece is read where it lies and costs no memory; only what is
//! incomplete is copied. What a client sends behind a request waits, unread, until that request is
//! answered.

use super::BODY_MAX;
use super::chunked::Decoder;
use super::head::{self, Framing, Head, Origin};
use crate::problem::Code;

/// Empty lines before a request line that are read past (RFC 9112, 2.2, asks for one).
const BLANK_LINES_MAX: u8 = 4;

/// Where a client stands with its present request.
#[derive(Default)]
pub struct Reader {
    state: State,
    /// Bytes that came in and are not read yet: part of a head, or what waits behind a request.
    pending: Vec<u8>,
    /// How much of `pending` was searched for the end of the head.
    seen: usize,
    blank_lines: u8,
    /// The request as the lane will get it, as far as it has come.
    whole: Vec<u8>,
}

#[derive(Default)]
enum State {
    #[default]
    Head,
    Length(Request, usize),
    Chunked(Request, usize, Decoder),
    /// A request is being answered.
    Busy,
}

/// What is known of a whole request besides the bytes for the lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The number in the private field.
    pub number: u64,
    /// What the head said.
    pub head: Head,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Wait for more bytes.
    More,
    /// Tell the client to go on, then wait for more bytes.
    Continue,
    /// A request is whole.
    Whole(Request),
}

/// What a client that sends nothing more would be late with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing has come yet.
    Idle,
    /// Part of a head has come.
    Head,
    /// Part of a body is missing.
    Body,
    /// Nothing: it is our turn.
    Busy,
}

impl Reader {
    /// Where the client stands.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Head if self.pending.is_empty() => Phase::Idle,
            State::Head => Phase::Head,
            State::Length(..) | State::Chunked(..) => Phase::Body,
            State::Busy => Phase::Busy,
        }
    }

    /// Bytes of memory held.
    pub fn held(&self) -> usize {
        self.pending.capacity() + self.whole.capacity()
    }

    /// The request is answered: the next one's turn.
    pub fn answered(&mut self) {
        self.state = State::Head;
        self.blank_lines = 0;
    }

    /// Whether something waits behind the request in work.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Throws away what waits behind the request in work.
    pub fn drop_pending(&mut self) {
        self.pending = Vec::new();
    }

    /// Forgets everything that is held; nothing more will be read from this client.
    pub fn stop(&mut self) {
        *self = Reader { state: State::Busy, ..Reader::default() };
    }

    /// Takes `input`; a request that it makes whole is written to `out`.
    ///
    /// # Errors
    /// Why the request is refused. The connection cannot be read any further.
    pub fn take(
        &mut self,
        input: &[u8],
        origin: Origin<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Step, Code> {
        out.clear();
        if self.pending.is_empty() {
            let (used, step) = self.read(input, origin, out)?;
            self.pending.extend_from_slice(input.get(used..).unwrap_or_default());
            return Ok(step);
        }
        let mut all = std::mem::take(&mut self.pending);
        all.extend_from_slice(input);
        let (used, step) = self.read(&all, origin, out)?;
        all.drain(..used);
        // Nothing is kept for a client that has nothing outstanding.
        self.pending = if all.is_empty() { Vec::new() } else { all };
        Ok(step)
    }

    fn read(
        &mut self,
        input: &[u8],
        origin: Origin<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Step), Code> {
        let mut used = 0;
        if matches!(self.state, State::Head) {
            used = self.skip_blank_lines(input)?;
            let rest = input.get(used..).unwrap_or_default();
            let Some(length) = head::find_end(rest, self.seen)? else {
                self.seen = rest.len();
                return Ok((used, Step::More));
            };
            self.seen = 0;
            self.begin(rest.get(..length).unwrap_or_default(), origin, out)?;
            used += length;
        }
        let rest = input.get(used..).unwrap_or_default();
        let (more, step) = self.body(rest, out)?;
        Ok((used + more, step))
    }

    fn skip_blank_lines(&mut self, input: &[u8]) -> Result<usize, Code> {
        let mut rest = input;
        while let Some(tail) = rest.strip_prefix(b"\r\n") {
            self.blank_lines += 1;
            if self.blank_lines > BLANK_LINES_MAX {
                return Err(Code::BadRequest);
            }
            self.seen = 0;
            rest = tail;
        }
        Ok(input.len() - rest.len())
    }

    /// Writes the head for the lane at the start of `out`.
    fn begin(&mut self, buf: &[u8], origin: Origin<'_>, out: &mut Vec<u8>) -> Result<(), Code> {
        let head = head::read(buf, origin, out)?;
        let request = Request { number: origin.number, head };
        self.state = match head.framing {
            Framing::Length(length) => State::Length(request, length),
            Framing::Chunked => State::Chunked(request, out.len(), Decoder::default()),
        };
        Ok(())
    }

    /// Takes what there is of the body. `out` holds the head, or nothing if `whole` does.
    fn body(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(usize, Step), Code> {
        let stored = out.is_empty();
        let target = if stored { &mut self.whole } else { &mut *out };
        let (used, request, done) = match &mut self.state {
            State::Length(request, left) => {
                let part = input.get(..*left).unwrap_or(input);
                target.extend_from_slice(part);
                *left -= part.len();
                (part.len(), *request, *left == 0)
            }
            State::Chunked(request, head_length, decoder) => {
                let (used, done) = decoder.feed(input, target, BODY_MAX)?;
                let length = target.len() - *head_length;
                head::fill_length(target, *head_length, length)?;
                (used, *request, done)
            }
            State::Head | State::Busy => return Ok((0, Step::More)),
        };
        if done {
            self.state = State::Busy;
            out.extend_from_slice(&std::mem::take(&mut self.whole));
            return Ok((used, Step::Whole(request)));
        }
        if !stored {
            self.whole = out.to_vec();
            out.clear();
        }
        let waits = request.head.expects_continue && !stored && input.is_empty();
        Ok((used, if waits { Step::Continue } else { Step::More }))
    }
}
