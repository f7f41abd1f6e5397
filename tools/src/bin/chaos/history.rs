//! Every answer, and what is promised of them.
//!
//! With `OUTAGE_REDEEM=none`: no token has two certificates; what was killed before is not redeemed; what
//! was answered with 200 and never killed can be redeemed. Where `docs/redis.md` names what stays open, a
//! breach is explained by that sentence and counted apart. An explanation asks for what the sentence
//! asks for (which instance was away, and when), not merely for trouble somewhere.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::time::Duration;

use mqtt_publisher_lite::jwt::TokenHash;

use crate::stage::{Disturbance, INSTANCES, Kind};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    Onboard,
    Replace,
    Redeem,
    Kill,
    /// A redemption when all is over.
    Last,
}

#[derive(Clone, Debug)]
pub struct Event {
    pub op: Op,
    pub device: usize,
    /// What was answered, or presented.
    pub token: String,
    pub instance: usize,
    pub from: Duration,
    pub to: Duration,
    /// 0: no answer came.
    pub status: u16,
    pub code: String,
}

impl Event {
    pub fn is_granted(&self) -> bool {
        matches!(self.op, Op::Redeem | Op::Last) && self.status == 200
    }

    fn is_issue(&self) -> bool {
        matches!(self.op, Op::Onboard | Op::Replace) && self.status == 200
    }

    /// It may have killed the device's past.
    fn may_kill(&self) -> bool {
        matches!(self.op, Op::Replace | Op::Kill)
    }
}

/// Whether an instance served from Redis, by its `/health`.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub instance: usize,
    pub from: Duration,
    pub to: Duration,
    pub on_redis: bool,
}

/// Which instance has signed which certificates for a token.
type Signed = HashMap<String, BTreeSet<(usize, String)>>;

/// What the folders of the instances say: of each token, by the hash in hexadecimal digits.
pub fn signed<'a>(folders: impl Iterator<Item = &'a Path>) -> Signed {
    let mut signed = Signed::new();
    for (instance, folder) in folders.enumerate() {
        for entry in fs::read_dir(folder.join("ca/certs")).into_iter().flatten().flatten() {
            // What others have signed is in their folders.
            if entry.file_name() == "others.pem" {
                continue;
            }
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let hash = text.lines().find_map(|line| line.strip_prefix("Provisioning-Token: "));
            if let Some(hash) = hash.and_then(|rest| rest.split(' ').next()) {
                let serial = entry.file_name().to_string_lossy().into_owned();
                signed.entry(hash.to_owned()).or_default().insert((instance, serial));
            }
        }
    }
    signed
}

/// A promise that was not kept.
pub struct Breach {
    pub promise: &'static str,
    /// The sentence of the pages that allows it.
    pub explained: Option<&'static str>,
    pub story: String,
}

const DOUBLE: &str = "no token has two certificates";
const MISSED: &str = "no kill that was answered with 200 misses";
const BURNT: &str = "what was answered with 200 can be redeemed";

const REDEEMER_AWAY: &str =
    "when a Redis forgets, another redeems what an instance that is away has used";
const CLOCKS: &str = "a kill reaches 5 s past the clock of whoever kills";
const CUT_OFF: &str = "an instance that is cut off cannot know of a kill";
const TOLD_LATER: &str = "Redis is told of a kill that was made without it when it is back";
const BORN_DEAD: &str = "a token that is issued without Redis just after a kill elsewhere is dead";
const LOST: &str = "none carries nothing into a Redis that lacks it: those tokens are lost";
const MEMORY: &str = "what memory alone holds is gone when the service ends";

/// What was seen of an instance holds for so long before and after.
const SAMPLED: Duration = Duration::from_millis(200);
/// A kill reaches so far past its own time, and a little more.
const REACH: Duration = Duration::from_secs(6);
/// And no further than this.
const MINUTE: Duration = Duration::from_secs(60);
/// Of what was done so long before a token came to be, its story tells.
const BEFORE: Duration = Duration::from_secs(6);

pub struct Judge<'a> {
    pub events: &'a [Event],
    pub disturbances: &'a [Disturbance],
    pub samples: &'a [Sample],
    pub signed: &'a Signed,
}

impl Judge<'_> {
    pub fn breaches(&self) -> Vec<Breach> {
        let mut of_device: BTreeMap<usize, Vec<&Event>> = BTreeMap::new();
        for event in self.events {
            of_device.entry(event.device).or_default().push(event);
        }
        let mut breaches = vec![];
        for events in of_device.values() {
            for issue in events.iter().filter(|event| event.is_issue()) {
                self.judge(issue, events, &mut breaches);
            }
        }
        breaches
    }

    /// Judges what became of one token, by all that was asked of its device.
    fn judge(&self, issue: &Event, device: &[&Event], breaches: &mut Vec<Breach>) {
        let presented: Vec<&Event> =
            device.iter().filter(|e| e.token == issue.token && !e.is_issue()).copied().collect();
        let granted: Vec<&Event> = presented.iter().filter(|e| e.is_granted()).copied().collect();
        let hash = TokenHash::of(&issue.token).to_string();
        let signed = self.signed.get(&hash).map(BTreeSet::len).unwrap_or_default();
        let mut breach = |promise, explained| {
            breaches.push(Breach { promise, explained, story: self.story(issue, device) });
        };
        if granted.len() > 1 || signed > 1 {
            breach(DOUBLE, self.explain_double(&hash, &presented));
        }
        let kills = device.iter().filter(|e| e.may_kill() && e.token != issue.token);
        let kills: Vec<&Event> = kills.filter(|kill| kill.to > issue.from).copied().collect();
        for kill in kills.iter().filter(|kill| kill.status == 200 && kill.from > issue.to) {
            if let Some(late) = granted.iter().find(|grant| grant.from > kill.to) {
                breach(MISSED, self.explain_missed(issue, kill, late));
            }
        }
        let was_asked = presented.iter().any(|event| event.op == Op::Last);
        if was_asked && signed == 0 && granted.is_empty() && kills.is_empty() {
            breach(BURNT, self.explain_burnt(issue, device));
        }
    }

    fn explain_double(&self, hash: &str, presented: &[&Event]) -> Option<&'static str> {
        let from = presented.iter().map(|event| event.from).min()?;
        let to = presented.iter().filter(|e| matches!(e.status, 0 | 200)).map(|e| e.from).max()?;
        let redeemers = self.signed.get(hash)?.iter();
        let mut away = redeemers.map(|(n, _)| self.is_forgotten(*n, from, to));
        away.any(|is| is).then_some(REDEEMER_AWAY)
    }

    /// A Redis forgot in this time, and until its end the instance was not there to say what it had
    /// done.
    fn is_forgotten(&self, instance: usize, from: Duration, to: Duration) -> bool {
        let forgets = |d: &&Disturbance| d.what.forgets() && d.to >= from && d.from <= to;
        self.disturbances.iter().filter(forgets).any(|forgot| {
            let serves = |sample: &Sample| {
                sample.instance == instance
                    && sample.on_redis
                    && sample.from > forgot.to
                    && sample.to + SAMPLED < to
            };
            !self.samples.iter().any(serves)
        })
    }

    /// The instance did not serve from Redis then.
    fn is_away(&self, event: &Event) -> bool {
        self.samples.iter().any(|sample| {
            let fits = sample.instance == event.instance && !sample.on_redis;
            fits && sample.from <= event.to + SAMPLED && sample.to + SAMPLED >= event.from
        })
    }

    /// The clock of the instance was wrong, or had been: what was dated ahead stays so.
    fn has_wrong_clock(&self, instance: usize, from: Duration, to: Duration) -> bool {
        self.disturbances.iter().any(|d| {
            d.what.is_of_clock() && d.instance == Some(instance) && d.from <= to && d.to >= from
        })
    }

    fn explain_missed(&self, issue: &Event, kill: &Event, grant: &Event) -> Option<&'static str> {
        let wrong = |event: &Event| self.has_wrong_clock(event.instance, event.from, event.to);
        if wrong(issue) || wrong(kill) {
            return Some(CLOCKS);
        }
        let own = grant.instance == issue.instance && self.is_away(grant);
        if own {
            return Some(CUT_OFF);
        }
        if self.is_away(kill) {
            return Some(TOLD_LATER);
        }
        self.is_forgotten(kill.instance, kill.from, grant.from).then_some(REDEEMER_AWAY)
    }

    fn explain_burnt(&self, issue: &Event, device: &[&Event]) -> Option<&'static str> {
        // Each kill reaches five seconds past the one before it.
        let before = issue.from.saturating_sub(MINUTE);
        let kills =
            device.iter().filter(|e| e.may_kill() && e.to >= before && e.from <= issue.from);
        let (count, last) = kills.fold((0, None), |(n, last), e| (n + 1, last.max(Some(e.to))));
        let reaches = last.is_some_and(|last| issue.from < last + REACH * count);
        if reaches && self.is_away(issue) {
            return Some(BORN_DEAD);
        }
        let later = || self.disturbances.iter().filter(|d| d.to >= issue.from);
        if later().any(|d| d.what.forgets()) {
            return Some(LOST);
        }
        let is_end = |d: &Disturbance| {
            matches!(d.what, Kind::Killed | Kind::KilledAndClock)
                && d.instance == Some(issue.instance)
        };
        (self.is_away(issue) && later().any(is_end)).then_some(MEMORY)
    }

    /// All that was asked of the device, and what was done at that time.
    fn story(&self, issue: &Event, device: &[&Event]) -> String {
        let name = |token: &str| match token {
            "" => "-".to_owned(),
            token => TokenHash::of(token).short(),
        };
        let mut lines: Vec<(Duration, String)> = vec![];
        for event in device {
            let Event { op, instance, status, code, to, token, .. } = event;
            let what = format!("{op:?} at {instance}, token {}: {status} {code}", name(token));
            lines.push((event.from, format!("until {:7.2}  {what}", to.as_secs_f64())));
        }
        let from = issue.from.saturating_sub(BEFORE);
        let to = device.iter().map(|event| event.to).max().unwrap_or_default();
        for d in self.disturbances.iter().filter(|d| d.to >= from && d.from <= to) {
            let at = d.instance.map_or("Redis".to_owned(), |at| at.to_string());
            let what = format!("until {:7.2}    {:?}, {at}", d.to.as_secs_f64(), d.what);
            lines.push((d.from, what));
        }
        let mut last = [true; INSTANCES];
        for sample in self.samples.iter().filter(|s| s.to >= from && s.from <= to) {
            let was = std::mem::replace(&mut last[sample.instance], sample.on_redis);
            if was != sample.on_redis {
                let store = if sample.on_redis { "Redis" } else { "memory" };
                lines.push((
                    sample.to,
                    format!("                  {} is on {store}", sample.instance),
                ));
            }
        }
        lines.sort();
        let told = lines.iter().map(|(at, text)| format!("    {:7.2} {text}\n", at.as_secs_f64()));
        let told: String = told.collect();
        format!("device {}, token {}\n{told}", issue.device, name(&issue.token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asked at the instance in this second, for the same device each time.
    fn event(op: Op, token: &str, instance: usize, at: u64, status: u16) -> Event {
        let (from, to) = (Duration::from_secs(at), Duration::from_millis(at * 1000 + 1));
        let (token, code) = (token.to_owned(), String::new());
        Event { op, device: 0, token, instance, from, to, status, code }
    }

    /// What is not kept by these, if instances do not serve from Redis in these seconds.
    #[track_caller]
    fn check(
        events: &[Event],
        disturbances: &[Disturbance],
        away: &[(usize, u64)],
        expected: &[(&str, Option<&str>)],
    ) {
        let looked = |instance: usize| {
            (0..60).map(move |at| Sample {
                instance,
                from: Duration::from_secs(at),
                to: Duration::from_secs(at),
                on_redis: !away.contains(&(instance, at)),
            })
        };
        let samples: Vec<Sample> = (0..INSTANCES).flat_map(looked).collect();
        let mut signed = Signed::new();
        for event in events.iter().filter(|event| event.is_granted()) {
            let serial = format!("{:?}", event.from);
            let hash = TokenHash::of(&event.token).to_string();
            signed.entry(hash).or_default().insert((event.instance, serial));
        }
        let judge = Judge { events, disturbances, samples: &samples, signed: &signed };
        let breaches = judge.breaches();
        let found: Vec<_> = breaches.iter().map(|b| (b.promise, b.explained)).collect();
        assert_eq!(found, expected, "{}", breaches.iter().map(|b| &*b.story).collect::<String>());
    }

    #[test]
    fn what_is_not_kept_is_found_and_explained_by_what_was_so() {
        let issued = || event(Op::Onboard, "t", 0, 1, 200);
        let older = |from, to| {
            let (from, to) = (Duration::from_secs(from), Duration::from_secs(to));
            [Disturbance { what: Kind::RedisOlder, instance: None, from, to }]
        };

        check(&[issued(), event(Op::Redeem, "t", 1, 2, 200)], &[], &[], &[]);
        let twice =
            [issued(), event(Op::Redeem, "t", 1, 2, 200), event(Op::Redeem, "t", 2, 9, 200)];
        check(&twice, &[], &[], &[(DOUBLE, None)]);
        check(&twice, &older(3, 5), &[], &[(DOUBLE, None)]);
        let away: Vec<_> = (3..9).map(|at| (1, at)).collect();
        check(&twice, &older(3, 5), &away, &[(DOUBLE, Some(REDEEMER_AWAY))]);

        let killed = [issued(), event(Op::Kill, "", 1, 2, 200), event(Op::Redeem, "t", 0, 9, 200)];
        check(&killed, &[], &[], &[(MISSED, None)]);
        check(&killed, &[], &[(0, 9)], &[(MISSED, Some(CUT_OFF))]);
        check(&killed, &[], &[(1, 2)], &[(MISSED, Some(TOLD_LATER))]);
        let under_way =
            [issued(), event(Op::Redeem, "t", 0, 2, 200), event(Op::Kill, "", 1, 2, 200)];
        check(&under_way, &[], &[], &[]);

        let burnt = [issued(), event(Op::Last, "t", 0, 50, 401)];
        check(&burnt, &[], &[], &[(BURNT, None)]);
        check(&burnt, &older(3, 5), &[], &[(BURNT, Some(LOST))]);
        check(&[issued(), event(Op::Kill, "", 0, 2, 503), burnt[1].clone()], &[], &[], &[]);
        let dead = [event(Op::Kill, "", 1, 0, 200), issued(), burnt[1].clone()];
        check(&dead, &[], &[], &[(BURNT, None)]);
        check(&dead, &[], &[(0, 1)], &[(BURNT, Some(BORN_DEAD))]);
    }
}
