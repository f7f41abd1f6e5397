//! Whose address it is, for what each client gets a share of.

use std::collections::HashMap;
use std::net::IpAddr;

/// One IPv4 address, or one IPv6 /64, which is what a site gets: its devices can take any address
/// in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Subscriber(u64);

impl From<IpAddr> for Subscriber {
    /// No IPv6 site has an upper half that looks like an IPv4 address: those below 2^32 are reserved.
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Subscriber(v4.to_bits().into()),
            IpAddr::V6(v6) => Subscriber((v6.to_bits() >> 64) as u64),
        }
    }
}

/// How many there are of each; who has none is forgotten.
#[derive(Debug, Default)]
pub(crate) struct Counts(HashMap<Subscriber, usize>);

impl Counts {
    pub fn of(&self, who: Subscriber) -> usize {
        self.0.get(&who).copied().unwrap_or(0)
    }

    pub fn most(&self) -> usize {
        self.0.values().copied().max().unwrap_or(0)
    }

    pub fn add(&mut self, who: Subscriber) {
        *self.0.entry(who).or_insert(0) += 1;
    }

    pub fn remove(&mut self, who: Subscriber) {
        let Some(count) = self.0.get_mut(&who) else { return };
        *count -= 1;
        if *count == 0 {
            self.0.remove(&who);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_site_is_one_subscriber() {
        let of = |text: &str| Subscriber::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1:2:3"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("192.0.2.1"), of("::ffff:192.0.2.1"));
    }

    #[test]
    fn a_site_counts_as_one() {
        let of = |text: &str| Subscriber::from(text.parse::<IpAddr>().unwrap());
        let mut per = Counts::default();
        per.add(of("2001:db8::1"));
        per.add(of("2001:db8::ffff:1"));
        per.add(of("::ffff:10.0.0.1"));
        assert_eq!(per.of(of("2001:db8::2")), 2);
        assert_eq!(per.of(of("2001:db8:0:1::2")), 0);
        assert_eq!((per.of(of("10.0.0.1")), per.most()), (1, 2));
        per.remove(of("10.0.0.1"));
        per.remove(of("10.0.0.1"));
        assert_eq!((per.of(of("10.0.0.1")), per.0.len()), (0, 1));
    }
}
