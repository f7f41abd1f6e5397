//! What comes before the store is asked for tokens. Where a job depends on what others know of a
//! device, that is looked up; and what is to change of a device's row is on this instance's disk
//! before any store hears of it.
//!
//! How far a device's past is dead is a time, and it is never taken back. So a clock that is hours away
//! from that of Redis, which all instances can read, kills nothing: one that is ahead would kill what
//! is yet to come, and one that is behind would not reach what is there.

use super::batch::{Planned, unexpected};
use super::{Change, Changed, Grant, Issue, Onboarding, Provisioner, Work, not_issued};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::devices::enrol::Maker;
use crate::devices::{self, Bound, Row, Text};
use crate::jwt::Token;
use crate::problem::{Code, Problem};
use crate::store::{Answer, Kill, New, Op, Outcome, Seen};

/// A clock that is further from that of Redis is warned of: the next kill may miss a token of an
/// instance that is as far off the other way.
const CLOCK_IS_OFF_MS: u64 = 2000;
/// By one that is further off nothing is killed, nor forgotten.
pub const CLOCK_IS_FAR_OFF_MS: u64 = 3_600_000;

pub(super) struct Prepared {
    work: Work,
    /// The rows that it changes.
    kills: Vec<Kill>,
}

impl Prepared {
    /// The work, and what the store is asked for it. A token is dated here, when all that the batch
    /// kills is dead.
    pub(super) fn into_ops(self, by: &Provisioner, now: Now, ops: &mut Vec<Op>) -> Planned {
        let mut kills = self.kills.into_iter().map(Box::new);
        match &self.work {
            Work::Issue(issue) => {
                let Onboarding { device, client, .. } = &issue.asked;
                let token = by.token(device.clone(), now)?;
                let (replaces, subscriber) = (kills.next(), (*client).into());
                ops.push(Op::Issue(New { token, replaces, subscriber }));
            }
            Work::Sign(sign) => {
                if let Grant::Token(redeem) = &sign.grant {
                    ops.push(Op::Consume(redeem.token.clone(), sign.serial));
                }
            }
            Work::RevokeOne(_) => {}
            Work::Revoke(_) | Work::Rewrite(_) => ops.extend(kills.map(Op::Kill)),
            Work::Count => ops.push(Op::Count),
        }
        Ok(self.work)
    }
}

impl Work {
    /// The devices of which others are to know before it is answered.
    pub(super) fn tells_of(&self) -> Vec<&DeviceId> {
        match self {
            Work::Issue(issue) if !issue.asked.replace => Vec::new(),
            work => work.looks_at(),
        }
    }

    /// The devices that are looked up first.
    fn looks_at(&self) -> Vec<&DeviceId> {
        match self {
            Work::Issue(issue) if issue.look || issue.asked.replace => vec![&issue.asked.device],
            Work::Revoke(revoke) => vec![&revoke.device],
            Work::Rewrite(rewrite) => rewrite.changes.iter().map(|change| &change.device).collect(),
            _ => Vec::new(),
        }
    }
}

impl Provisioner {
    /// Whether the device may have a token, by what is known of it.
    pub(super) fn judge(&self, asked: &Onboarding, row: &Row, now: Now) -> Result<(), Code> {
        row.may_enrol(asked.rule, &asked.shown, now.unix_s())?;
        let excused = self.rules.reenroll || row.living(now.unix_s()).is_some();
        if !excused && self.ca().record().has_active(&asked.device, now) {
            return Err(Code::DeviceHasActiveCertificate);
        }
        Ok(())
    }

    /// The device's past was killed after the token was issued, as far as is known here.
    pub(super) fn is_dead(&self, token: &Token) -> bool {
        token.claims.iat <= self.devices.bound(&token.claims.device_id).0.t
    }

    /// Prepares all work: one trip to the store, then one sync of the disk.
    pub(super) fn prepare(&self, works: Vec<Work>, now: Now) -> Vec<Result<Prepared, Problem>> {
        let looks: Vec<Op> = works.iter().flat_map(Work::looks_at).cloned().map(Op::Look).collect();
        let mut seen = self.run_ops(&looks, || now).into_iter();
        let prepare = |work: Work| {
            let answers: Vec<Answer> = seen.by_ref().take(work.looks_at().len()).collect();
            let seen = work.looks_at().into_iter().zip(answers).map(seen_of);
            let seen = seen.collect::<Result<Vec<_>, _>>()?;
            self.prepare_one(work, seen, now)
        };
        let mut prepared: Vec<_> = works.into_iter().map(prepare).collect();
        let kills = prepared.iter().flatten().flat_map(|prepared| &prepared.kills);
        let rows = kills.map(|kill| (kill.device.clone(), kill.row.clone())).collect();
        if let Err(error) = self.devices.enter(rows, true, now) {
            log::error!("nothing was changed: {error}");
            let problem = Problem::from(Code::ServiceUnavailable).log(error);
            let changes =
                |p: &&mut Result<Prepared, _>| p.as_ref().is_ok_and(|p| !p.kills.is_empty());
            prepared.iter_mut().filter(changes).for_each(|p| *p = Err(problem.clone()));
        }
        // What others have killed, and this instance hears of now; what a job kills it revokes itself.
        let learning = prepared.iter().flatten().filter(|p| !matches!(p.work, Work::Revoke(_)));
        let learnt = learning.flat_map(|p| &p.kills).filter(|kill| kill.seen.row.bound.c > 0);
        self.devices.note_killed(learnt.map(|kill| kill.device.clone()));
        prepared
    }

    fn prepare_one(&self, work: Work, seen: Vec<Seen>, now: Now) -> Result<Prepared, Problem> {
        match work {
            Work::Issue(issue) => self.prepare_issue(issue, first(seen), now),
            Work::Revoke(revoke) => {
                let (seen, maker) = (first(seen), self.maker(revoke.by.name.clone(), now));
                let (known, t) = self.past_of(&revoke.device, &seen, now)?;
                // Blocking alone changes no registration, so that none is missed.
                let news = revoke.edit.as_ref().and_then(|edit| known.edited(edit, &maker));
                let news = news.unwrap_or_default();
                let bound = Row { bound: Bound { t, c: t }, ..Row::default() };
                let row = known.merge(news).merge(bound);
                let kills = vec![Kill { device: revoke.device.clone(), row, seen }];
                Ok(Prepared { work: Work::Revoke(revoke), kills })
            }
            Work::Rewrite(mut rewrite) => {
                let maker = self.maker(rewrite.by.name.clone(), now);
                let mut kills = Vec::new();
                for (change, seen) in rewrite.changes.iter_mut().zip(seen) {
                    change.row = self.changed(change, &seen, &maker)?;
                    let (device, row) = (change.device.clone(), change.row.clone());
                    kills.push(Kill { device, row, seen });
                }
                Ok(Prepared { work: Work::Rewrite(rewrite), kills })
            }
            work => Ok(Prepared { work, kills: Vec::new() }),
        }
    }

    fn prepare_issue(
        &self,
        mut issue: Box<Issue>,
        seen: Seen,
        now: Now,
    ) -> Result<Prepared, Problem> {
        let Issue { asked, row, look } = &mut *issue;
        // What is known here was judged as it was planned, and is judged again when it is issued.
        if !*look && !asked.replace {
            return Ok(Prepared { work: Work::Issue(issue), kills: Vec::new() });
        }
        *row = self.devices.row(&asked.device).merge(seen.row.clone());
        let judged = self.judge(asked, row, now);
        let is_spent = row.spent_by(&asked.shown).is_some();
        if is_spent {
            self.learn(&asked.device, seen.row.clone(), now);
        }
        let is_unknown = *look && !seen.by_redis && !self.sharing.is_alone() && !is_spent;
        let judged = match judged {
            // Elsewhere it may be registered, with the secret that was shown, and nobody can be asked.
            Ok(()) | Err(Code::SecretInvalid | Code::DeviceNotRegistered) if is_unknown => {
                Err(Code::ServiceUnavailable)
            }
            judged => judged,
        };
        judged.map_err(|code| not_issued(code, &asked.device))?;
        if !asked.replace {
            return Ok(Prepared { work: Work::Issue(issue), kills: Vec::new() });
        }
        let device = asked.device.clone();
        let (known, t) = self.past_of(&device, &seen, now)?;
        if let Some(wait_s) = devices::too_far_ahead(t, now) {
            let problem = not_issued(Code::RateLimited, &device);
            return Err(Problem { retry_after_s: Some(wait_s), ..problem });
        }
        let row = known.merge(Row { bound: Bound { t, c: 0 }, ..Row::default() });
        Ok(Prepared { work: Work::Issue(issue), kills: vec![Kill { device, row, seen }] })
    }

    /// The device's row as it is to be.
    fn changed(&self, change: &mut Changed, seen: &Seen, maker: &Maker) -> Result<Row, Problem> {
        let known = self.devices.row(&change.device).merge(seen.row.clone());
        let lives = known.living(maker.now.unix_s()).is_some();
        let news = match &change.change {
            Change::Forget
                if !known.is_listed() && self.ca().record().newest(&change.device).is_none() =>
            {
                let may_be_known = !seen.by_redis && !self.sharing.is_alone();
                let code =
                    if may_be_known { Code::ServiceUnavailable } else { Code::DeviceNotFound };
                return Err(not_issued(code, &change.device));
            }
            Change::Forget => known.forgotten(maker),
            Change::Edit { unless_living, .. } if *unless_living && lives => {
                (change.change, change.secret) = (Change::Keep, None);
                return Ok(known);
            }
            Change::Edit { edit, .. } => known.edited(edit, maker).ok_or_else(|| {
                Problem::from(Code::BadRequest).text(
                    "expires_in, cert_days and note are a registration's, and the device has none \
                     that can be changed so: \"register\":true begins one",
                )
            })?,
            Change::Keep => return Ok(known),
        };
        let begins = matches!(&change.change, Change::Edit { edit, .. } if edit.register.is_some());
        let bound = match begins {
            true => Bound { t: self.past_of(&change.device, seen, maker.now)?.1, c: 0 },
            false => Bound::default(),
        };
        Ok(known.merge(news).merge(Row { bound, ..Row::default() }))
    }

    /// The device's row, as far as is known, and how far its past is to die where it is to: past the
    /// tokens that the last bound may have caused, too, which are dated just after it (`docs/model`,
    /// row 27).
    fn past_of(&self, device: &DeviceId, seen: &Seen, now: Now) -> Result<(Row, u64), Problem> {
        if let Some(why) = self.clock_is_far_off() {
            return Err(not_issued(Problem::from(Code::ServiceUnavailable).log(why), device));
        }
        let known = self.devices.row(device).merge(seen.row.clone());
        let t = devices::kill_time(now, seen.latest_iat).max(known.bound.t.saturating_add(1));
        Ok((known, t))
    }

    fn maker(&self, name: Option<Text>, now: Now) -> Maker {
        Maker { name, instance: self.devices.own(), now }
    }

    /// Why nothing can be killed by our clock.
    pub(super) fn clock_is_far_off(&self) -> Option<String> {
        clock_off(self.store.status().clock_is_ahead_ms, CLOCK_IS_FAR_OFF_MS)
    }

    /// Why a kill may not reach what it should, or cannot be made.
    pub fn clock_is_off(&self) -> Option<String> {
        clock_off(self.store.status().clock_is_ahead_ms, CLOCK_IS_OFF_MS)
    }
}

/// What was seen of the only device of a job.
fn first(seen: Vec<Seen>) -> Seen {
    seen.into_iter().next().unwrap_or_default()
}

fn seen_of((device, answer): (&DeviceId, Answer)) -> Result<Seen, Problem> {
    match answer {
        Ok(Outcome::Seen(seen)) => Ok(*seen),
        other => Err(not_issued(unexpected(other), device)),
    }
}

fn clock_off(ahead_ms: i64, most_ms: u64) -> Option<String> {
    let off_ms = ahead_ms.unsigned_abs();
    let seconds = off_ms.saturating_add(500) / 1000;
    let said = match ahead_ms > 0 {
        true => format!("the clock is {seconds} s ahead of that of Redis"),
        false => format!("the clock is {seconds} s behind that of Redis"),
    };
    Some(said).filter(|_| off_ms > most_ms)
}
