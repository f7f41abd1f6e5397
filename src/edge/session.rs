//! One connection as a state machine: an event in, what is to be done and the next deadline out.
//!
//! Pure: it knows no socket, no clock and no other connection, so every transition can be tried, by
//! the million. A request is read, handed on, answered, and then the next one is read, or the
//! connection is ended: from our side first, so that the client can read the reply to its end even if
//! it still sends (RFC 9112, 9.6).

use super::head::{Context, Head};
use super::reader::{Phase, Progress, Reader, Ticket};
use super::settings::Wait;
use crate::http::{Classify, Reply};
use crate::problem::Code;

/// What is read after the last reply, so that a client that still sends can read that reply first.
/// More than the rest of any request that we would take; a client that goes on is closed.
const LINGER_BYTES: usize = 1024 * 1024;

pub struct Session {
    reader: Reader,
    state: State,
    wait: Wait,
    /// No request after the present one.
    is_last: bool,
}

enum State {
    Handshake,
    /// A request is awaited, or read.
    Reading,
    /// This request waits for its lane.
    Working(Ticket),
    /// A reply is on its way.
    Replying,
    /// Our side is closed; so many bytes were thrown away since.
    Lingering(usize),
    Closed,
}

pub enum Event<'a> {
    Secured,
    /// TLS failed; the alert is written.
    TlsFailed,
    /// Bytes came in. Empty: what is buffered already is to be parsed.
    Bytes(&'a [u8]),
    End,
    Answered(Reply),
    /// All that was to be sent is sent.
    Flushed,
    /// The request cannot be served.
    Refused(Code),
    /// Nothing more than what has begun is to be done.
    Drain,
    Late,
}

#[derive(Debug)]
pub enum Action {
    Wait,
    /// Tell the client to send the body.
    Continue,
    /// Hand the request on to its lane.
    Dispatch(Ticket),
    /// Send the reply to this request, and say what becomes of the connection.
    Reply {
        reply: Reply,
        head: Head,
        keep_alive: bool,
    },
    /// Send this error, in the form of the endpoint if the request line is known, with
    /// `Connection: close`.
    Refuse(Code, Option<Head>),
    /// Read on; there may be something already.
    ReadOn {
        pending: bool,
    },
    Linger,
    Close,
}

#[derive(Debug)]
pub struct Step {
    pub action: Action,
    /// The deadline that begins now. `None`: the one that runs is kept.
    pub begins: Option<Wait>,
}

impl Session {
    /// A connection that was just accepted, and what it is waited for.
    pub fn new(with_tls: bool) -> (Self, Wait) {
        let (state, wait) = match with_tls {
            true => (State::Handshake, Wait::Handshake),
            false => (State::Reading, Wait::Head),
        };
        (Session { reader: Reader::default(), state, wait, is_last: false }, wait)
    }

    /// What `event` means. A request that is to be dispatched is written to `out`; `context` says who
    /// sends it.
    pub fn on(&mut self, event: Event<'_>, context: Context<'_>, out: &mut Vec<u8>) -> Step {
        let classify = context.classify;
        let action = match event {
            Event::Secured => self.secured(),
            Event::TlsFailed => self.linger(),
            Event::Bytes(bytes) => self.bytes(bytes, context, out),
            Event::End => self.end(classify),
            Event::Answered(reply) => self.answered(reply),
            Event::Flushed => self.flushed(),
            Event::Refused(code) => self.refuse(code, classify),
            Event::Drain => self.drain(),
            Event::Late => self.late(classify),
        };
        let wait = self.awaited();
        let begins = (wait != self.wait).then_some(wait);
        self.wait = wait;
        Step { action, begins }
    }

    /// Whether what the client sends is read now.
    pub fn reads(&self) -> bool {
        matches!(self.state, State::Handshake | State::Reading | State::Lingering(_))
    }

    /// Whether a request is in work, or its reply on its way.
    pub fn is_at_work(&self) -> bool {
        matches!(self.state, State::Working(_) | State::Replying)
    }

    /// The number of the request that waits for its lane.
    pub fn works_on(&self) -> Option<u64> {
        match self.state {
            State::Working(ticket) => Some(ticket.number),
            _ => None,
        }
    }

    pub fn held(&self) -> usize {
        self.reader.held()
    }

    /// Of these, what came of a request that is not whole.
    pub fn unfinished(&self) -> usize {
        if matches!(self.state, State::Reading) { self.reader.held() } else { 0 }
    }

    /// Throws away what waits behind the request in work. That one is the last then: what follows
    /// would begin in the middle of what was thrown away. True if there was something.
    pub fn drop_pending(&mut self) -> bool {
        if !self.is_at_work() || !self.reader.has_pending() {
            return false;
        }
        self.reader = Reader::default();
        self.is_last = true;
        true
    }

    /// The deadline that applies now. More bytes of the same part do not restart it.
    fn awaited(&self) -> Wait {
        match (&self.state, self.reader.phase()) {
            (State::Handshake, _) => Wait::Handshake,
            (State::Reading, Phase::Head) => Wait::Head,
            (State::Reading, Phase::Body) => Wait::Body,
            // Nothing came before, or no more than empty lines.
            (State::Reading, Phase::Idle) => match self.wait {
                Wait::Handshake | Wait::Head => Wait::Head,
                _ => Wait::KeepAlive,
            },
            (State::Working(_), _) => Wait::Work,
            (State::Replying, _) => Wait::Write,
            (State::Lingering(_), _) => Wait::Linger,
            (State::Closed, _) => self.wait,
        }
    }

    fn secured(&mut self) -> Action {
        if matches!(self.state, State::Handshake) {
            self.state = State::Reading;
        }
        Action::Wait
    }

    fn bytes(&mut self, bytes: &[u8], context: Context<'_>, out: &mut Vec<u8>) -> Action {
        match &mut self.state {
            State::Reading => match self.reader.take(bytes, context, out) {
                Ok(Progress::Part) => Action::Wait,
                Ok(Progress::Expecting) => Action::Continue,
                Ok(Progress::Whole(ticket)) => {
                    self.state = State::Working(ticket);
                    Action::Dispatch(ticket)
                }
                Err(code) => self.refuse(code, context.classify),
            },
            State::Lingering(thrown) => {
                *thrown += bytes.len();
                if *thrown > LINGER_BYTES { self.close() } else { Action::Wait }
            }
            State::Handshake | State::Working(_) | State::Replying | State::Closed => Action::Wait,
        }
    }

    fn end(&mut self, classify: Classify) -> Action {
        match (&self.state, self.reader.phase()) {
            (State::Reading, Phase::Head | Phase::Body) => self.refuse(Code::BadRequest, classify),
            _ => self.close(),
        }
    }

    fn answered(&mut self, reply: Reply) -> Action {
        let State::Working(Ticket { head, .. }) = self.state else { return Action::Wait };
        self.is_last |= !head.keep_alive;
        self.state = State::Replying;
        Action::Reply { reply, head, keep_alive: !self.is_last }
    }

    fn flushed(&mut self) -> Action {
        match self.state {
            State::Replying if !self.is_last => {
                self.state = State::Reading;
                Action::ReadOn { pending: self.reader.has_pending() }
            }
            State::Replying => self.linger(),
            _ => Action::Wait,
        }
    }

    fn refuse(&mut self, code: Code, classify: Classify) -> Action {
        let head = match self.state {
            State::Working(ticket) => Some(ticket.head),
            State::Reading => self.reader.head(classify),
            // A reply is under way already, or the client cannot read one.
            _ => return self.close(),
        };
        self.reader = Reader::default();
        (self.state, self.is_last) = (State::Replying, true);
        Action::Refuse(code, head)
    }

    fn drain(&mut self) -> Action {
        self.is_last = true;
        match (&self.state, self.reader.phase()) {
            (State::Handshake, _) | (State::Reading, Phase::Idle) => self.close(),
            _ => Action::Wait,
        }
    }

    fn late(&mut self, classify: Classify) -> Action {
        match (self.wait, self.reader.phase()) {
            // A client that has sent nothing gets no answer.
            (Wait::Head, Phase::Idle) => self.close(),
            (Wait::Head | Wait::Body, _) => self.refuse(Code::RequestTimeout, classify),
            (Wait::Work, _) => self.refuse(Code::ServiceUnavailable, classify),
            (Wait::Handshake | Wait::Write | Wait::KeepAlive | Wait::Linger, _) => self.close(),
        }
    }

    fn linger(&mut self) -> Action {
        self.reader = Reader::default();
        self.state = State::Lingering(0);
        Action::Linger
    }

    fn close(&mut self) -> Action {
        self.state = State::Closed;
        Action::Close
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::http::Class;

    const ORIGIN: Context<'static> = Context {
        number: 7,
        peer: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        proxies: None,
        is_encrypted: false,
        certificate: None,
        classify: |_, _| Class::PLAIN,
    };

    const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    const LAST: &str = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    const BODY: &str = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n";
    const EXPECTING: &str =
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n";

    /// An action and the deadline that begins with it, in short.
    type Told = (&'static str, Option<Wait>);

    fn in_short(step: &Step) -> Told {
        let action = match &step.action {
            Action::Wait => "wait",
            Action::Continue => "continue",
            Action::Dispatch(_) => "dispatch",
            Action::Reply { keep_alive: true, .. } => "reply",
            Action::Reply { keep_alive: false, .. } => "last reply",
            Action::Refuse(code, _) => code.row().1,
            Action::ReadOn { pending: false } => "read on",
            Action::ReadOn { pending: true } => "read what is there",
            Action::Linger => "linger",
            Action::Close => "close",
        };
        (action, step.begins)
    }

    impl Session {
        fn told(&mut self, event: Event<'_>) -> Told {
            in_short(&self.on(event, ORIGIN, &mut Vec::new()))
        }

        fn sent(&mut self, text: &str) -> Told {
            self.told(Event::Bytes(text.as_bytes()))
        }
    }

    fn answer() -> Event<'static> {
        Event::Answered(Reply::empty(200))
    }

    /// A session in each of its states, by name.
    fn session(state: &str) -> Session {
        let (mut session, _) = Session::new(state == "handshake");
        let text = match state {
            "handshake" | "new" | "lingering" | "closed" => "",
            "head" => "GET /",
            "body" => BODY,
            "working" | "replying" | "idle" => GET,
            "working with more behind" => &[GET, GET].concat(),
            "working on the last" | "replying for the last time" => LAST,
            other => panic!("{other}"),
        };
        session.sent(text);
        if state.starts_with("replying") || state == "idle" {
            session.told(answer());
        }
        match state {
            "idle" => session.told(Event::Flushed),
            "lingering" => session.told(Event::TlsFailed),
            "closed" => session.told(Event::End),
            _ => ("", None),
        };
        session
    }

    const STATES: [&str; 12] = [
        "handshake",
        "new",
        "head",
        "body",
        "working",
        "working with more behind",
        "working on the last",
        "replying",
        "replying for the last time",
        "idle",
        "lingering",
        "closed",
    ];

    /// What an event means in each state: those that are listed, and in all others the last.
    fn check(event: impl Fn() -> Event<'static>, listed: &[(&str, Told)], others: Told) {
        for state in STATES {
            let expected = listed.iter().find(|(name, _)| *name == state).map_or(others, |l| l.1);
            assert_eq!(session(state).told(event()), expected, "{state}");
        }
    }

    const WAIT: Told = ("wait", None);
    const CLOSE: Told = ("close", None);
    const UNAVAILABLE: Told = ("SERVICE_UNAVAILABLE", Some(Wait::Write));
    const LINGER: Told = ("linger", Some(Wait::Linger));

    #[test]
    fn a_request_is_dispatched_where_one_is_awaited() {
        let dispatch = ("dispatch", Some(Wait::Work));
        check(
            || Event::Bytes(GET.as_bytes()),
            &[
                ("new", dispatch),
                ("idle", dispatch),
                ("head", ("BAD_REQUEST", Some(Wait::Write))),
                ("body", dispatch),
            ],
            WAIT,
        );
        let head = Some(Wait::Head);
        check(|| Event::Bytes(b"G"), &[("idle", ("wait", head)), ("body", ("wait", None))], WAIT);
        let body = Some(Wait::Body);
        let listed = [("new", ("wait", body)), ("idle", ("wait", body))];
        check(
            || Event::Bytes(BODY.as_bytes()),
            &[
                listed.as_slice(),
                &[("head", ("BAD_REQUEST", Some(Wait::Write))), ("body", dispatch)],
            ]
            .concat(),
            WAIT,
        );
    }

    #[test]
    fn what_the_lane_answers_is_replied_to_who_still_waits() {
        let reply = ("reply", Some(Wait::Write));
        check(
            answer,
            &[
                ("working", reply),
                ("working with more behind", reply),
                ("working on the last", ("last reply", Some(Wait::Write))),
            ],
            WAIT,
        );
        let read_on = ("read on", Some(Wait::KeepAlive));
        let flushed = [("replying", read_on), ("replying for the last time", LINGER)];
        check(|| Event::Flushed, &flushed, WAIT);
    }

    #[test]
    fn the_end_of_what_a_client_sends() {
        let bad = ("BAD_REQUEST", Some(Wait::Write));
        check(|| Event::End, &[("head", bad), ("body", bad)], CLOSE);
    }

    #[test]
    fn what_cannot_be_served_is_refused_while_there_is_somebody_to_tell() {
        check(
            || Event::Refused(Code::ServiceUnavailable),
            &[
                ("new", UNAVAILABLE),
                ("head", UNAVAILABLE),
                ("body", UNAVAILABLE),
                ("working", UNAVAILABLE),
                ("working with more behind", UNAVAILABLE),
                ("working on the last", UNAVAILABLE),
                ("idle", UNAVAILABLE),
            ],
            CLOSE,
        );
    }

    #[test]
    fn who_is_late_is_told_so_if_something_had_come() {
        let late = ("REQUEST_TIMEOUT", Some(Wait::Write));
        check(
            || Event::Late,
            &[
                ("head", late),
                ("body", late),
                ("working", UNAVAILABLE),
                ("working with more behind", UNAVAILABLE),
                ("working on the last", UNAVAILABLE),
            ],
            CLOSE,
        );
    }

    #[test]
    fn at_the_end_what_has_begun_is_finished() {
        let closed = ["handshake", "new", "idle"].map(|state| (state, CLOSE));
        check(|| Event::Drain, &closed, WAIT);
        let mut session = session("working");
        session.told(Event::Drain);
        assert_eq!(session.told(answer()), ("last reply", Some(Wait::Write)));
        // One that was promised more is ended from our side all the same.
        let mut session = tests::session("replying");
        session.told(Event::Drain);
        assert_eq!(session.told(Event::Flushed), LINGER);
    }

    #[test]
    fn tls_comes_first() {
        check(|| Event::Secured, &[("handshake", ("wait", Some(Wait::Head)))], WAIT);
        check(|| Event::TlsFailed, &[("lingering", ("linger", None))], LINGER);
    }

    #[test]
    fn a_deadline_is_not_put_off_by_a_part_more() {
        let mut session = session("idle");
        assert_eq!(session.sent("POST"), ("wait", Some(Wait::Head)));
        assert_eq!(session.sent(" / HTTP/1.1\r\nHost: a\r\n"), WAIT);
        assert_eq!(session.sent("Content-Length: 3\r\n\r\n"), ("wait", Some(Wait::Body)));
        assert_eq!(session.sent("ab"), WAIT);
        assert_eq!(session.sent("c"), ("dispatch", Some(Wait::Work)));
    }

    #[test]
    fn a_client_that_expects_it_is_told_to_go_on() {
        let (mut session, _) = Session::new(false);
        assert_eq!(session.sent(EXPECTING), ("continue", Some(Wait::Body)));
        assert_eq!(session.told(Event::Flushed), WAIT);
        assert_eq!(session.sent("abc"), ("dispatch", Some(Wait::Work)));
    }

    #[test]
    fn what_waits_behind_a_request_is_next_or_thrown_away_with_all_that_follows() {
        let mut session = session("working with more behind");
        assert!(session.held() > 0 && session.unfinished() == 0);
        session.told(answer());
        let next = ("read what is there", Some(Wait::Head));
        assert_eq!(session.told(Event::Flushed), next);
        assert_eq!(session.sent(""), ("dispatch", Some(Wait::Work)));
        for replies_first in [false, true] {
            let mut session = tests::session("working with more behind");
            if replies_first {
                session.told(answer());
                assert!(session.drop_pending());
            } else {
                assert!(session.drop_pending());
                assert_eq!(session.told(answer()), ("last reply", Some(Wait::Write)));
            }
            assert_eq!((session.held(), session.drop_pending()), (0, false));
            assert_eq!(session.told(Event::Flushed), LINGER);
        }
    }

    #[test]
    fn after_the_last_reply_so_many_bytes_are_thrown_away() {
        let mut session = session("lingering");
        let bytes = "x".repeat(LINGER_BYTES / 4);
        for _ in 0..4 {
            assert_eq!(session.sent(&bytes), WAIT);
        }
        assert_eq!(session.sent("x"), CLOSE);
    }

    /// Seeded, so that a failure repeats.
    struct Xorshift(u64);

    impl Xorshift {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }
    }

    /// What a connection looks like from outside, to hold a session against.
    #[derive(Default)]
    struct Outside {
        dispatched: u32,
        replied: u32,
        works: bool,
        sends: bool,
        lingers: bool,
        is_over: bool,
    }

    impl Outside {
        /// Takes note of a step, in which there may be nothing that has no place there.
        fn saw(&mut self, step: &Step, is_answer: bool) {
            assert!(!self.is_over || matches!(step.action, Action::Wait | Action::Close));
            match &step.action {
                Action::Wait => assert!(!is_answer || !self.works),
                Action::Continue => assert!(!self.works && !self.sends),
                Action::Dispatch(_) => {
                    assert!(!self.works && !self.sends && !self.lingers);
                    (self.dispatched, self.works) = (self.dispatched + 1, true);
                }
                Action::Reply { .. } => {
                    assert!(is_answer && self.works);
                    (self.replied, self.works, self.sends) = (self.replied + 1, false, true);
                }
                Action::Refuse(..) => {
                    assert!(!self.sends && !self.lingers);
                    (self.works, self.sends) = (false, true);
                }
                Action::ReadOn { .. } => {
                    assert!(self.sends && !self.lingers);
                    self.sends = false;
                }
                Action::Linger => (self.works, self.sends, self.lingers) = (false, false, true),
                Action::Close => (self.works, self.sends, self.is_over) = (false, false, true),
            }
        }
    }

    /// Whatever happens in whatever order: one request at a time is dispatched, each is replied to or
    /// refused at most once, nothing follows the end, and there is a deadline in every state.
    #[test]
    fn a_million_steps_in_any_order() {
        let (mut steps, mut random) = (0, Xorshift(0x9e37_79b9_7f4a_7c15));
        let (mut whole, mut ended, mut replied) = (Vec::new(), 0_u32, 0);
        while steps < 1_000_000 {
            let with_tls = random.below(4) == 0;
            let (mut session, _) = Session::new(with_tls);
            let mut outside = Outside::default();
            let mut stream =
                [GET, BODY, "abc", "\r\n", EXPECTING, "abc", GET, LAST, "GET"].concat();
            let clean = random.below(3) > 0;
            while !outside.is_over {
                steps += 1;
                let likely = if clean { 7 } else { 12 };
                let was_sending = outside.sends;
                let event = match random.below(likely) {
                    0..3 => {
                        let n = (1 + random.below(60) as usize).min(stream.len());
                        let piece: String = stream.drain(..n).collect();
                        stream.push_str(if stream.len() < 400 { GET } else { "" });
                        // What is not read waits in the socket.
                        if !session.reads() {
                            stream.insert_str(0, &piece);
                            continue;
                        }
                        let step = session.on(Event::Bytes(piece.as_bytes()), ORIGIN, &mut whole);
                        outside.saw(&step, false);
                        continue;
                    }
                    3 | 4 => answer(),
                    5 if was_sending => Event::Flushed,
                    5 => Event::Secured,
                    6 if outside.lingers => Event::End,
                    6 if random.below(200) == 0 => Event::Late,
                    6 => continue,
                    7 => Event::Late,
                    8 => Event::End,
                    9 => Event::Refused(Code::ServiceUnavailable),
                    10 => Event::Drain,
                    _ if random.below(20) == 0 => Event::TlsFailed,
                    _ => {
                        session.drop_pending();
                        continue;
                    }
                };
                let is_answer = matches!(event, Event::Answered(_));
                let step = session.on(event, ORIGIN, &mut whole);
                outside.saw(&step, is_answer);
                assert_eq!(session.works_on().is_some(), outside.works);
                assert!(session.held() < 4096, "{} bytes", session.held());
                if let Action::ReadOn { pending: true } = step.action {
                    let step = session.on(Event::Bytes(&[]), ORIGIN, &mut whole);
                    outside.saw(&step, false);
                }
            }
            assert!(outside.replied <= outside.dispatched);
            replied += outside.replied;
            ended += 1;
            assert!(matches!(session.on(answer(), ORIGIN, &mut whole).action, Action::Wait));
        }
        assert!(ended > 1000 && replied > 50_000, "{ended} connections, {replied} replies");
    }
}
