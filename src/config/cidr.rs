//! Ranges of addresses, for the proxies that are trusted.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// All addresses that share the first bits with one: `10.0.0.0/8`, `fd00::/8`, or a single address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    network: IpAddr,
    bits: u8,
}

impl Cidr {
    /// Reads `address` or `address/bits`. What stands behind the bits is ignored, as `10.1.2.3/8`
    /// can only mean one thing; IPv4 written as IPv6 (`::ffff:10.0.0.0/104`) is read as IPv4.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let width = width(address);
        let bits = match bits {
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok()?,
            Some(_) => return None,
            None => width,
        };
        if bits > width {
            return None;
        }
        let (address, bits) = match address.to_canonical() {
            v4 @ IpAddr::V4(_) if width == 128 && bits >= 96 => (v4, bits - 96),
            _ => (address, bits),
        };
        Some(Cidr { network: masked(address, bits), bits })
    }

    /// True if `address` is one of the range; an IPv4 address may come as IPv6.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.network.is_ipv4() && masked(address, self.bits) == self.network
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.bits)
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn masked(address: IpAddr, bits: u8) -> IpAddr {
    let dropped = u32::from(width(address).saturating_sub(bits));
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(dropped).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(dropped).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cidr: &str, shown: &str, inside: &[&str], outside: &[&str]) {
        let range = Cidr::parse(cidr).unwrap();
        assert_eq!(range.to_string(), shown);
        for address in inside {
            assert!(range.contains(address.parse().unwrap()), "{address} in {cidr}");
        }
        for address in outside {
            assert!(!range.contains(address.parse().unwrap()), "{address} in {cidr}");
        }
    }

    #[test]
    fn ranges_hold_what_shares_their_bits() {
        check("10.0.0.1", "10.0.0.1/32", &["10.0.0.1", "::ffff:10.0.0.1"], &["10.0.0.2", "::1"]);
        check("10.1.2.3/8", "10.0.0.0/8", &["10.255.0.0"], &["11.0.0.0", "::"]);
        check("0.0.0.0/0", "0.0.0.0/0", &["1.2.3.4", "255.255.255.255"], &["::1"]);
        check("fd00::/8", "fd00::/8", &["fdff::1"], &["fe80::1", "10.0.0.1"]);
        check("::/0", "::/0", &["::1", "ff::"], &["10.0.0.1"]);
        check("::ffff:10.0.0.0/104", "10.0.0.0/8", &["10.9.9.9"], &["11.0.0.0"]);
    }

    #[test]
    fn what_is_no_range() {
        for bad in ["", "/", "10.0.0.1/", "10.0.0.1/33", "::/129", "10.0.0.1/+8", "10.0.0/8", "x/8"]
        {
            assert_eq!(Cidr::parse(bad), None, "{bad}");
        }
    }
}
