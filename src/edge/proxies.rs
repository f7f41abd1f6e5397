//! Who the client is when it comes through a reverse proxy.
//!
//! `X-Forwarded-For` is believed only from a trusted proxy, and only as far as trusted proxies
//! wrote it: the rightmost address that is not itself a trusted proxy is the client. Whatever
//! stands further left was sent by the client and may say anything.

use std::net::IpAddr;

/// Networks in CIDR notation.
#[derive(Clone, Debug, Default)]
pub struct Networks(Vec<(IpAddr, u8)>);

impl Networks {
    /// The networks given as address and prefix length.
    pub fn new(networks: Vec<(IpAddr, u8)>) -> Self {
        Networks(networks)
    }

    /// Whether the address lies in one of them. An IPv4 address written as IPv6 counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|(network, prefix)| matches(*network, *prefix, address))
    }

    /// The client behind the trusted proxy `peer`, by the values of its `X-Forwarded-For` fields.
    ///
    /// What cannot be read ends the search: the last address that a trusted proxy vouched for
    /// counts.
    pub fn client<'a>(&self, peer: IpAddr, forwarded: impl Iterator<Item = &'a [u8]>) -> IpAddr {
        let fields: Vec<&[u8]> = forwarded.collect();
        let hops = fields.iter().rev().flat_map(|field| field.rsplit(|b| *b == b','));
        let mut client = peer;
        for hop in hops {
            let Some(address) = address(hop) else { break };
            client = address;
            if !self.contains(client) {
                break;
            }
        }
        client
    }
}

/// `192.0.2.0/24`, `2001:db8::/32` or a bare address; `None` if it is neither.
pub fn parse(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        None => longest,
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok()?,
        Some(_) => return None,
    };
    (prefix <= longest).then_some((address, prefix))
}

fn matches(network: IpAddr, prefix: u8, address: IpAddr) -> bool {
    let shift = |bits: u8| u32::from(bits.saturating_sub(prefix));
    match (network, address) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            (a.to_bits() ^ b.to_bits()).checked_shr(shift(32)).unwrap_or(0) == 0
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            (a.to_bits() ^ b.to_bits()).checked_shr(shift(128)).unwrap_or(0) == 0
        }
        _ => false,
    }
}

/// An address as proxies write it: bare, with a port, or in brackets.
fn address(hop: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(hop).ok()?.trim_matches([' ', '\t']);
    let bare = text.strip_prefix('[').and_then(|t| t.split_once(']')).map(|(inner, _)| inner);
    let bare = bare.or_else(|| text.split_once(':').filter(|(_, p)| !p.contains(':')).map(|p| p.0));
    Some(bare.unwrap_or(text).parse::<IpAddr>().ok()?.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn networks(list: &[&str]) -> Networks {
        Networks::new(list.iter().map(|text| parse(text).unwrap()).collect())
    }

    #[test]
    fn networks_hold_their_addresses_only() {
        let n = networks(&["10.0.0.0/8", "192.0.2.7", "2001:db8::/32"]);
        for inside in ["10.0.0.0", "10.255.255.255", "192.0.2.7", "::ffff:10.1.2.3", "2001:db8::1"]
        {
            assert!(n.contains(ip(inside)), "{inside}");
        }
        for outside in ["11.0.0.0", "192.0.2.8", "2001:db9::", "::1", "::10.0.0.1"] {
            assert!(!n.contains(ip(outside)), "{outside}");
        }
        assert!(networks(&["0.0.0.0/0"]).contains(ip("203.0.113.9")));
        assert!(networks(&["::/0"]).contains(ip("2001::")));
        for bad in ["", "/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0.0/", "::/129", "10.0.0/8", "x"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_rightmost_untrusted_address_is_the_client() {
        let n = networks(&["10.0.0.0/8"]);
        let check = |fields: &[&str], client: &str| {
            let fields = fields.iter().map(|f| f.as_bytes());
            assert_eq!(n.client(ip("10.0.0.1"), fields), ip(client));
        };
        check(&[], "10.0.0.1");
        check(&["203.0.113.9"], "203.0.113.9");
        check(&["1.2.3.4, 203.0.113.9"], "203.0.113.9");
        check(&["1.2.3.4, 203.0.113.9 , 10.0.0.7"], "203.0.113.9");
        check(&["1.2.3.4", "203.0.113.9", "10.0.0.7"], "203.0.113.9");
        check(&["10.9.9.9, 10.0.0.7"], "10.9.9.9");
        check(&["203.0.113.9:4711"], "203.0.113.9");
        check(&["[2001:db8::1]:4711"], "2001:db8::1");
        check(&["2001:db8::1"], "2001:db8::1");
        check(&["::ffff:203.0.113.9"], "203.0.113.9");
        check(&["203.0.113.9, unknown"], "10.0.0.1");
        check(&["203.0.113.9, unknown, 10.0.0.7"], "10.0.0.7");
        check(&["203.0.113.9,"], "10.0.0.1");
        check(&["\u{fe0f}"], "10.0.0.1");
    }
}
