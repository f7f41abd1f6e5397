//! Killing a device's past: how far it is dead is on this instance's disk before any store hears of it.
//!
//! How far is a time, and it is never taken back. So a clock that is hours away from that of Redis,
//! which all instances can read, kills nothing: one that is ahead would kill what is yet to come, and
//! one that is behind would not reach what is there.

use super::batch::unexpected;
use super::{Job, Provisioner, not_issued};
use crate::clock::Now;
use crate::devices::{self, Bound, Row};
use crate::jwt::Token;
use crate::problem::{Code, Problem};
use crate::store::{Answer, Kill, Op, Outcome};

/// A clock that is further from that of Redis is warned of: the next kill may miss a token of an
/// instance that is as far off the other way.
const CLOCK_IS_OFF_MS: u64 = 2000;
/// By one that is further off nothing is killed, nor forgotten.
pub const CLOCK_IS_FAR_OFF_MS: u64 = 3_600_000;

impl Provisioner {
    /// The device's past was killed after the token was issued, as far as is known here.
    pub(super) fn is_dead(&self, token: &Token) -> bool {
        token.claims.iat <= self.devices.bound(&token.claims.device_id).0.t
    }

    /// Raises the bounds of the devices whose past is to die, on disk, with one sync for all. One
    /// result for each job that kills, in their order.
    pub(super) fn raise_bounds(&self, jobs: &[Job], now: Now) -> Vec<Result<Kill, Problem>> {
        if let Some(why) = self.clock_is_far_off() {
            let problem = Problem::from(Code::ServiceUnavailable).log(why);
            return jobs.iter().filter_map(Job::kills).map(|_| Err(problem.clone())).collect();
        }
        let looks: Vec<Op> = jobs.iter().filter_map(Job::kills).cloned().map(Op::Look).collect();
        if looks.is_empty() {
            return Vec::new();
        }
        let killing = jobs.iter().filter(|job| job.kills().is_some());
        let seen = self.store.run(&looks, now);
        let kills: Vec<_> =
            killing.zip(seen).map(|(job, seen)| self.kill(job, seen, now)).collect();
        let rows = kills.iter().flatten().map(|kill| (kill.device.clone(), kill.row.clone()));
        match self.devices.enter(rows.collect(), true, now) {
            Ok(()) => kills,
            Err(error) => {
                log::error!("nothing was killed: {error}");
                let problem = Problem::from(Code::ServiceUnavailable).log(error);
                kills.into_iter().map(|kill| kill.and(Err(problem.clone()))).collect()
            }
        }
    }

    /// Why nothing can be killed by our clock.
    pub(super) fn clock_is_far_off(&self) -> Option<String> {
        clock_off(self.store.status().clock_is_ahead_ms, CLOCK_IS_FAR_OFF_MS)
    }

    /// Why a kill may not reach what it should.
    pub(super) fn clock_is_off(&self) -> Option<String> {
        let said = self.clock_is_far_off().is_some();
        clock_off(self.store.status().clock_is_ahead_ms, CLOCK_IS_OFF_MS).filter(|_| !said)
    }

    /// How far the past of a job's device is to die, by what the store has of it.
    fn kill(&self, job: &Job, seen: Answer, now: Now) -> Result<Kill, Problem> {
        let device = job.kills().ok_or(Code::InternalError)?.clone();
        let seen = match seen {
            Ok(Outcome::Seen(seen)) => *seen,
            other => return Err(unexpected(other).log_more(format!("device {device}"))),
        };
        let known = self.devices.row(&device).merge(seen.row.clone());
        // Past the tokens that the last bound may have caused, too: they are dated just after it
        // (`docs/model`, row 27).
        let t = devices::kill_time(now, seen.latest_iat).max(known.bound.t.saturating_add(1));
        let revokes = matches!(job, Job::Revoke(_));
        if let Some(wait_s) = devices::too_far_ahead(t, now).filter(|_| !revokes) {
            let problem = not_issued(Code::RateLimited, &device);
            return Err(Problem { retry_after_s: Some(wait_s), ..problem });
        }
        let bound = Bound { t, c: if revokes { t } else { 0 } };
        let row = known.merge(Row { bound, ..Row::default() });
        Ok(Kill { device, row, seen })
    }
}

fn clock_off(ahead_ms: i64, most_ms: u64) -> Option<String> {
    let off_ms = ahead_ms.unsigned_abs();
    let seconds = off_ms / 1000;
    let said = match ahead_ms > 0 {
        true => format!("the clock is {seconds} s ahead of that of Redis"),
        false => format!("the clock is {seconds} s behind that of Redis"),
    };
    Some(said).filter(|_| off_ms > most_ms)
}
