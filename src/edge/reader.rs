//! One client's bytes, turned into requests one at a time. No I/O: bytes in, requests out.
//!
//! A request that arrives in one piece is read where it lies and costs no memory; only what is
//! incomplete is copied. What a client sends behind a request waits, unread, until that request is
//! answered.

use super::chunked::Decoder;
use super::head::{self, Context, Framing, Head};
use super::settings::BODY_MAX;
use crate::http::Classify;
use crate::problem::Code;

/// Empty lines before a request line that are read past (RFC 9112, 2.2, asks for one).
const BLANK_LINES_MAX: u8 = 4;

/// Where a client stands with its present request.
#[derive(Default)]
pub struct Reader {
    next: Next,
    /// Bytes that came in and are not read yet: part of a head, or what waits behind a request.
    pending: Vec<u8>,
    /// How much of `pending` was searched for the end of the head.
    seen: usize,
    blank_lines: u8,
    /// The request as the lane will get it, as far as it has come: whole when it is handed on.
    forwarded: Vec<u8>,
}

#[derive(Default)]
enum Next {
    #[default]
    Head,
    /// So many bytes of a body.
    Length(Ticket, usize),
    /// A chunked body, behind a head of so many bytes.
    Chunked(Ticket, usize, Decoder),
}

/// Number and head of a request, from when its head is read until its reply is sent.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    /// Its number in the lane.
    pub number: u64,
    pub head: Head,
}

#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// Part of a request, or nothing.
    Part,
    /// The same, and the client waits to be told to send the body.
    Expecting,
    /// The rest of a request.
    Whole(Ticket),
}

/// What a client that sends nothing more would be late with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Idle,
    Head,
    /// Part of a body is missing.
    Body,
}

impl Reader {
    pub fn phase(&self) -> Phase {
        match self.next {
            Next::Head if self.pending.is_empty() => Phase::Idle,
            Next::Head => Phase::Head,
            Next::Length(..) | Next::Chunked(..) => Phase::Body,
        }
    }

    /// What is known of the request that is being read, or was refused.
    pub fn head(&self, classify: Classify) -> Option<Head> {
        match &self.next {
            Next::Length(request, _) | Next::Chunked(request, ..) => Some(request.head),
            Next::Head => head::begun(&self.pending, classify),
        }
    }

    pub fn held(&self) -> usize {
        self.pending.capacity() + self.forwarded.capacity()
    }

    /// Whether something waits behind the request that was whole last.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Takes `input`; a request that it makes whole is written to `out`, and what is behind it is read
    /// by the next call.
    /// After an error the connection cannot be read any further; what came of the head is kept for
    /// [`Reader::head`].
    pub fn take(
        &mut self,
        input: &[u8],
        context: Context<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Progress, Code> {
        out.clear();
        if self.pending.is_empty() {
            let read = self.read(input, context, out);
            let used = read.map_or(0, |(used, _)| used);
            self.pending.extend_from_slice(input.get(used..).unwrap_or_default());
            return read.map(|(_, taken)| taken);
        }
        let mut all = std::mem::take(&mut self.pending);
        all.extend_from_slice(input);
        let read = self.read(&all, context, out);
        let (used, taken) = read.inspect_err(|_| self.pending = std::mem::take(&mut all))?;
        all.drain(..used);
        // Nothing is kept for a client that has nothing outstanding.
        self.pending = if all.is_empty() { Vec::new() } else { all };
        Ok(taken)
    }

    fn read(
        &mut self,
        input: &[u8],
        context: Context<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Progress), Code> {
        let mut used = 0;
        if matches!(self.next, Next::Head) {
            used = self.skip_blank_lines(input)?;
            let rest = input.get(used..).unwrap_or_default();
            let Some(length) = head::find_end(rest, self.seen)? else {
                self.seen = rest.len();
                return Ok((used, Progress::Part));
            };
            self.seen = 0;
            self.begin(rest.get(..length).unwrap_or_default(), context, out)?;
            used += length;
        }
        let rest = input.get(used..).unwrap_or_default();
        let (more, taken) = self.body(rest, out)?;
        Ok((used + more, taken))
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
    fn begin(&mut self, buf: &[u8], context: Context<'_>, out: &mut Vec<u8>) -> Result<(), Code> {
        let head = head::read(buf, context, out)?;
        let request = Ticket { number: context.number, head };
        self.next = match head.framing {
            Framing::Length(length) => Next::Length(request, length),
            Framing::Chunked => Next::Chunked(request, out.len(), Decoder::default()),
        };
        Ok(())
    }

    /// Takes what there is of the body. `out` holds the head, or nothing if `forwarded` does.
    fn body(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(usize, Progress), Code> {
        let stored = out.is_empty();
        let target = if stored { &mut self.forwarded } else { &mut *out };
        let (used, request, done) = match &mut self.next {
            Next::Length(request, left) => {
                let part = input.get(..*left).unwrap_or(input);
                target.extend_from_slice(part);
                *left -= part.len();
                (part.len(), *request, *left == 0)
            }
            Next::Chunked(request, head_length, decoder) => {
                let (used, done) = decoder.feed(input, target, BODY_MAX)?;
                if done {
                    end_head(target, *head_length);
                }
                (used, *request, done)
            }
            Next::Head => return Ok((0, Progress::Part)),
        };
        if done {
            out.extend_from_slice(&self.forwarded);
            (self.next, self.blank_lines, self.forwarded) = (Next::Head, 0, Vec::new());
            return Ok((used, Progress::Whole(request)));
        }
        if !stored {
            self.forwarded = out.to_vec();
            out.clear();
        }
        let waits = request.head.expects_continue && !stored && input.is_empty();
        Ok((used, if waits { Progress::Expecting } else { Progress::Part }))
    }
}

/// Puts the end of a head before the body, whose length is known now.
fn end_head(request: &mut Vec<u8>, head_length: usize) {
    let mut end = Vec::new();
    head::finish(request.len() - head_length, &mut end);
    request.splice(head_length..head_length, end);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::settings::FIELDS_MAX;
    use std::net::{IpAddr, Ipv4Addr};

    const ORIGIN: Context<'static> = Context {
        number: 1,
        peer: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        proxies: None,
        is_encrypted: false,
        certificate: None,
        classify: |_, _| crate::http::Class::PLAIN,
    };

    /// Seeded, so that a failure repeats.
    struct Xorshift(u64);

    impl Xorshift {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % bound as u64) as usize
        }
    }

    /// All requests in `input`, cut as `next` says, each as the lane gets it; then the refusal.
    fn requests(
        input: &[u8],
        mut next: impl FnMut() -> usize,
    ) -> (Vec<Vec<u8>>, Option<Code>, usize) {
        let (mut reader, mut out, mut whole) = (Reader::default(), Vec::new(), Vec::new());
        let (mut rest, mut most) = (input, 0);
        while !rest.is_empty() {
            let (mut piece, tail) = rest.split_at(next().clamp(1, rest.len()));
            rest = tail;
            loop {
                match reader.take(piece, ORIGIN, &mut out) {
                    Ok(Progress::Whole(_)) => {
                        whole.push(out.clone());
                        piece = &[];
                        if reader.has_pending() {
                            continue;
                        }
                    }
                    Ok(Progress::Part | Progress::Expecting) => {}
                    Err(code) => return (whole, Some(code), most),
                }
                most = most.max(reader.held());
                break;
            }
        }
        (whole, None, most)
    }

    fn sample() -> Vec<u8> {
        let body = "b".repeat(3000);
        [
            "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n",
            "\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
            "POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\nT: u\r\n\r\n",
            &format!("POST /4 HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len()),
            "POST /5 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "GET /6 HTTP/1.1\r\n\r\nGET /7 HTTP/1.1\r\nHost: a\r\n\r\n",
        ]
        .concat()
        .into_bytes()
    }

    #[test]
    fn the_same_requests_however_the_bytes_are_split() {
        let input = sample();
        let (whole, refused, _) = requests(&input, || input.len());
        assert_eq!((whole.len(), refused), (5, Some(Code::BadRequest)));
        assert!(whole[2].ends_with(b"Content-Length: 3\r\n\r\nabc"));
        let expected = (&whole, refused);
        let (bytewise, code, _) = requests(&input, || 1);
        assert_eq!((&bytewise, code), expected);
        for seed in 1..500 {
            let mut random = Xorshift(seed);
            let bound = 1 + random.below(300);
            let (split, code, _) = requests(&input, || random.below(bound));
            assert_eq!((&split, code), expected, "seed {seed}");
        }
    }

    /// The outcome does not depend on how the bytes are split, and memory is bounded, for any input.
    #[test]
    fn damaged_bytes_are_read_alike_however_they_are_split() {
        let (clean, mut refusals) = (sample(), 0);
        for seed in 1..4000 {
            let mut random = Xorshift(seed * 0x9e37_79b9);
            let mut input = clean.clone();
            for _ in 0..1 + random.below(4) {
                let at = random.below(input.len());
                match random.below(4) {
                    0 => input[at] = random.below(256) as u8,
                    1 => drop(input.remove(at)),
                    2 => input.insert(at, b"\r\n :;,0\x00\x80\t"[random.below(10)]),
                    _ => input.truncate(at.max(1)),
                }
            }
            let at_once = requests(&input, || input.len());
            let bytewise = requests(&input, || 1);
            assert_eq!((&at_once.0, at_once.1), (&bytewise.0, bytewise.1), "seed {seed}");
            assert!(bytewise.2 <= 4 * (clean.len() + FIELDS_MAX), "seed {seed}: {}", bytewise.2);
            refusals += usize::from(at_once.1.is_some());
        }
        assert!(refusals > 1000, "{refusals}");
    }

    #[test]
    fn endless_input_is_refused_before_it_costs_much() {
        let check = |start: &str, endless: &str, expected: Code| {
            let mut input = start.as_bytes().to_vec();
            input.extend(endless.bytes().cycle().take(400_000));
            for step in [1, 100, 65_536] {
                let (whole, code, most) = requests(&input, || step);
                assert_eq!((whole.len(), code), (0, Some(expected)), "{start:?} {endless:?}");
                assert!(most <= 160 * 1024, "{most} bytes held for {start:?} {endless:?}");
            }
        };
        check("GET /", "a", Code::HeadersTooLarge);
        check("GET / HTTP/1.1\r\nHost: ", "a", Code::HeadersTooLarge);
        check("GET / HTTP/1.1\r\nHost: a\r\n", "X: y\r\n", Code::HeadersTooLarge);
        check("", "\r\n", Code::BadRequest);
        let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        check(&format!("{chunked}1;"), "x", Code::BadRequest);
        check(&format!("{chunked}0"), "0", Code::BadRequest);
        check(&format!("{chunked}0\r\n"), "X: y\r\n", Code::HeadersTooLarge);
        check(chunked, "1\r\nx\r\n", Code::BodyTooLarge);
        check(chunked, "fff\r\n", Code::BadRequest);
    }

    #[test]
    fn an_idle_client_holds_nothing() {
        let (mut reader, mut out) = (Reader::default(), Vec::new());
        for piece in sample().chunks(7) {
            if reader.take(piece, ORIGIN, &mut out).is_err() {
                break;
            }
            if reader.phase() == Phase::Idle {
                assert_eq!(reader.held(), 0);
            }
        }
    }
}
