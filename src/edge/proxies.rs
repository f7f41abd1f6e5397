//! Who the client is when it comes through a reverse proxy.
//!
//! `X-Forwarded-For` is believed only from a trusted proxy, and only as far as trusted proxies
//! wrote it: the rightmost address that is not itself a trusted proxy is the client. What
//! stands further left was sent by the client and proves nothing.

use std::net::IpAddr;

use crate::config::Cidr;

/// Whether the address lies in one of the trusted networks.
pub fn is_trusted(trusted: &[Cidr], address: IpAddr) -> bool {
    trusted.iter().any(|network| network.contains(address))
}

/// The client behind the trusted proxy `peer`, by the values of its `X-Forwarded-For` fields.
///
/// What cannot be read ends the search: the last address that a trusted proxy vouched for counts.
pub fn client<'a>(
    trusted: &[Cidr],
    peer: IpAddr,
    forwarded: impl Iterator<Item = &'a [u8]>,
) -> IpAddr {
    let fields: Vec<&[u8]> = forwarded.collect();
    let hops = fields.iter().rev().flat_map(|field| field.rsplit(|b| *b == b','));
    let mut client = peer;
    for hop in hops {
        let Some(address) = address(hop) else { break };
        client = address;
        if !is_trusted(trusted, client) {
            break;
        }
    }
    client
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

    #[test]
    fn the_rightmost_untrusted_address_is_the_client() {
        let trusted = [Cidr::parse("10.0.0.0/8").unwrap()];
        let check = |fields: &[&str], client: &str| {
            let fields = fields.iter().map(|f| f.as_bytes());
            assert_eq!(super::client(&trusted, ip("10.0.0.1"), fields), ip(client));
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
