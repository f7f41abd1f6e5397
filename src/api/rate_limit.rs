//! `ONBOARDING_RATE_LIMIT` and `AUTH_FAILURES`: a token bucket for each client address.
//!
//! A client may use a minute's worth at once and gets it back evenly. An IPv6 client is its /64,
//! which is what one subscriber has (RFC 6177). Memory is bounded: beyond the bound the clients that
//! have used least are forgotten, which costs them nothing they would notice.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;

use crate::clock::Now;
use crate::locks::locked;
use crate::subscriber::Subscriber;

/// Addresses remembered; 64 bytes each.
const MOST_CLIENTS: usize = 8192;
const MINUTE_MS: u64 = 60_000;

#[derive(Debug)]
pub struct RateLimit {
    per_minute: u64,
    buckets: Mutex<HashMap<Subscriber, Bucket>>,
}

/// What a client has used, in units of 1/60,000 of a request, and when that was counted.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    used: u64,
    at_ms: u64,
}

impl RateLimit {
    /// So many requests a minute and address; 0 is no limit.
    pub fn new(per_minute: u32) -> Self {
        RateLimit { per_minute: per_minute.into(), buckets: Mutex::default() }
    }

    /// Counts a request of `client`, or gives the seconds after which it may try again; the request is not
    /// counted then.
    pub fn admit(&self, client: IpAddr, now: Now) -> Result<(), u64> {
        if self.per_minute == 0 {
            return Ok(());
        }
        let mut buckets = locked(&self.buckets);
        let client: Subscriber = client.into();
        if buckets.len() >= MOST_CLIENTS && !buckets.contains_key(&client) {
            self.forget_some(&mut buckets, now);
        }
        let used = self.would_use(buckets.get(&client), now)?;
        buckets.insert(client, Bucket { used, at_ms: now.mono_ms });
        Ok(())
    }

    /// As [`RateLimit::admit`], but nothing is counted.
    pub fn look(&self, client: IpAddr, now: Now) -> Result<(), u64> {
        if self.per_minute == 0 {
            return Ok(());
        }
        let buckets = locked(&self.buckets);
        self.would_use(buckets.get(&client.into()), now).map(drop)
    }

    /// What the client has used with one request more.
    fn would_use(&self, bucket: Option<&Bucket>, now: Now) -> Result<u64, u64> {
        let used = bucket.map_or(0, |bucket| self.still_used(bucket, now)) + MINUTE_MS;
        match used.saturating_sub(self.per_minute * MINUTE_MS) {
            0 => Ok(used),
            over => Err(over.div_ceil(self.per_minute * 1000)),
        }
    }

    /// A minute gives back a minute's worth.
    fn still_used(&self, bucket: &Bucket, now: Now) -> u64 {
        let given_back = now.mono_ms.saturating_sub(bucket.at_ms).saturating_mul(self.per_minute);
        bucket.used.saturating_sub(given_back)
    }

    /// The half that has used least goes, so that the search is paid once for many clients.
    fn forget_some(&self, buckets: &mut HashMap<Subscriber, Bucket>, now: Now) {
        let mut used: Vec<u64> = buckets.values().map(|b| self.still_used(b, now)).collect();
        used.sort_unstable();
        let median = used.get(used.len() / 2).copied().unwrap_or(0);
        let mut spare = MOST_CLIENTS / 2;
        buckets.retain(|_, bucket| {
            let goes = spare > 0 && self.still_used(bucket, now) <= median;
            spare -= usize::from(goes);
            !goes
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now { unix_ms: 0, mono_ms: ms }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_minutes_worth_at_once_and_then_evenly() {
        let limit = RateLimit::new(3);
        let client = ip("192.0.2.1");
        for _ in 0..3 {
            assert_eq!(limit.admit(client, at(0)), Ok(()));
        }
        assert_eq!(limit.admit(client, at(0)), Err(20));
        assert_eq!(limit.look(client, at(0)), Err(20));
        assert_eq!(limit.look(client, at(20_000)), limit.look(client, at(20_000)), "not counted");
        assert_eq!(limit.admit(client, at(19_999)), Err(1));
        assert_eq!(limit.admit(client, at(20_000)), Ok(()));
        assert_eq!(limit.admit(client, at(20_000)), Err(20));
        assert_eq!(limit.admit(ip("192.0.2.2"), at(0)), Ok(()));
        assert_eq!(limit.admit(client, at(10_000_000)), Ok(()));
    }

    #[test]
    fn zero_is_no_limit() {
        let limit = RateLimit::new(0);
        assert!((0..1000).all(|_| limit.admit(ip("::1"), at(0)).is_ok()));
    }

    #[test]
    fn a_subscriber_is_one_client() {
        let limit = RateLimit::new(1);
        assert_eq!(limit.admit(ip("2001:db8::1"), at(0)), Ok(()));
        assert_eq!(limit.admit(ip("2001:db8::2"), at(0)), Err(60));
        assert_eq!(limit.admit(ip("2001:db8:0:1::1"), at(0)), Ok(()));
        assert_eq!(limit.admit(ip("192.0.2.1"), at(0)), Ok(()));
        assert_eq!(limit.admit(ip("::ffff:192.0.2.1"), at(0)), Err(60));
    }

    #[test]
    fn memory_is_bounded_and_heavy_users_are_remembered() {
        let limit = RateLimit::new(2);
        let heavy = ip("203.0.113.1");
        assert!((0..2).all(|_| limit.admit(heavy, at(0)).is_ok()));
        for n in 0..5 * MOST_CLIENTS as u32 {
            limit.admit(IpAddr::from(n.to_be_bytes()), at(1)).unwrap();
        }
        assert!(limit.buckets.lock().unwrap().len() <= MOST_CLIENTS);
        assert_eq!(limit.admit(heavy, at(1)), Err(30));
    }
}
