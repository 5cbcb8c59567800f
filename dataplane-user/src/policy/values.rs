//! The values that a rule compares with: names with a wildcard, networks, ports, service accounts.
//!
//! Each kind is read once, into a form in which thousands of values cost a binary search.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

/// One value of `principals` or `namespaces`: Istio's StringMatch.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    /// There is a name at all.
    Presence,
}

impl StringMatch {
    /// As policies are written: `a`, `a*`, `*a`, `*`. A second `*` is a character like any other.
    pub fn parse(text: &str) -> Self {
        if text == "*" {
            Self::Presence
        } else if let Some(suffix) = text.strip_prefix('*') {
            Self::Suffix(suffix.into())
        } else if let Some(prefix) = text.strip_suffix('*') {
            Self::Prefix(prefix.into())
        } else {
            Self::Exact(text.into())
        }
    }
}

impl fmt::Display for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Presence => f.write_str("*"),
        }
    }
}

/// Values of which any may match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Strings {
    /// Sorted.
    exact: Box<[Arc<str>]>,
    prefixes: Box<[Arc<str>]>,
    suffixes: Box<[Arc<str>]>,
    presence: bool,
}

impl Strings {
    pub(super) fn new(values: &[StringMatch]) -> Self {
        let of = |pick: fn(&StringMatch) -> Option<&Arc<str>>| {
            let mut found: Vec<_> = values.iter().filter_map(pick).cloned().collect();
            found.sort_unstable();
            found.dedup();
            found.into_boxed_slice()
        };
        Self {
            exact: of(|value| if let StringMatch::Exact(text) = value { Some(text) } else { None }),
            prefixes: of(|value| if let StringMatch::Prefix(text) = value { Some(text) } else { None }),
            suffixes: of(|value| if let StringMatch::Suffix(text) = value { Some(text) } else { None }),
            presence: values.contains(&StringMatch::Presence),
        }
    }

    /// `name` is empty when there is none, and then nothing matches.
    pub(super) fn contain(&self, name: &str) -> bool {
        !name.is_empty()
            && (self.presence
                || self.exact.binary_search_by(|value| (**value).cmp(name)).is_ok()
                || self.prefixes.iter().any(|prefix| name.starts_with(&**prefix))
                || self.suffixes.iter().any(|suffix| name.ends_with(&**suffix)))
    }
}

/// A network, or one address of it: `10.0.0.0/8`, `fd00::/8`, `10.0.0.1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    /// Host bits are zero; never an IPv4-mapped IPv6 address.
    address: IpAddr,
    length: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address and no network such as 10.0.0.0/8 or fd00::/8")]
pub struct BadCidr(String);

impl Cidr {
    /// None: longer than the address.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let (address, length) = match address {
            // An IPv4-mapped network of IPv6 is the IPv4 network: that is how its clients are seen.
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() && length >= 96 => (address.to_canonical(), length - 96),
            _ => (address, length),
        };
        let masked = match address {
            IpAddr::V4(v4) if length <= 32 => {
                IpAddr::V4((v4.to_bits() & u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)).into())
            }
            IpAddr::V6(v6) if length <= 128 => {
                IpAddr::V6((v6.to_bits() & u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)).into())
            }
            _ => return None,
        };
        Some(Self { address: masked, length })
    }

    /// First and last address of it, as numbers of its family.
    fn range(&self) -> (u128, u128) {
        let (first, bits) = match self.address {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
            IpAddr::V6(v6) => (v6.to_bits(), 128),
        };
        let hosts = u128::MAX.checked_shr(128 - (bits - u32::from(self.length))).unwrap_or(0);
        (first, first | hosts)
    }
}

impl FromStr for Cidr {
    type Err = BadCidr;

    fn from_str(text: &str) -> Result<Self, BadCidr> {
        let bad = || BadCidr(text.chars().take(100).collect());
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let length = match length {
            None if address.is_ipv4() => 32,
            None => 128,
            // Go's ParsePrefix, which Istio reads them with, takes neither a sign nor leading zeros.
            Some(length) if length.len() > 1 && !length.starts_with(|c: char| matches!(c, '1'..='9')) => {
                return Err(bad());
            }
            Some(length) if length.starts_with('+') => return Err(bad()),
            Some(length) => length.parse().map_err(|_| bad())?,
        };
        Self::new(address, length).ok_or_else(bad)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// Networks of which any may contain an address; `0.0.0.0/0` holds no IPv6 address and `::/0` no IPv4 one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Nets {
    v4: Ranges,
    v6: Ranges,
}

impl Nets {
    pub(super) fn new(cidrs: &[Cidr]) -> Self {
        let of = |v4: bool| Ranges::new(cidrs.iter().filter(|c| c.address.is_ipv4() == v4).map(Cidr::range).collect());
        Self { v4: of(true), v6: of(false) }
    }

    pub(super) fn contain(&self, address: IpAddr) -> bool {
        match address.to_canonical() {
            IpAddr::V4(v4) => self.v4.contain(v4.to_bits().into()),
            IpAddr::V6(v6) => self.v6.contain(v6.to_bits()),
        }
    }
}

/// Disjoint, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ranges(Box<[(u128, u128)]>);

impl Ranges {
    fn new(mut ranges: Vec<(u128, u128)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1 => before.1 = before.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        Self(merged.into())
    }

    fn contain(&self, address: u128) -> bool {
        let after = self.0.partition_point(|range| range.0 <= address);
        after.checked_sub(1).is_some_and(|at| address <= self.0[at].1)
    }
}

/// A service account by its namespace and name, in whichever trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceAccount {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(cidrs: &[&str]) -> Nets {
        Nets::new(&cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect::<Vec<_>>())
    }

    #[test]
    fn networks_of_both_families_hold_what_they_should() {
        let some = nets(&["10.1.2.3/8", "192.168.1.7", "fd00::/8", "2001:db8::1", "10.64.0.0/10"]);
        for (address, held) in [
            ("10.0.0.0", true),
            ("10.255.255.255", true),
            ("::ffff:10.9.9.9", true),
            ("11.0.0.0", false),
            ("9.255.255.255", false),
            ("192.168.1.7", true),
            ("192.168.1.8", false),
            ("fd12::1", true),
            ("fe00::", false),
            ("2001:db8::1", true),
            ("2001:db8::2", false),
        ] {
            assert_eq!(some.contain(address.parse().unwrap()), held, "{address}");
        }
        let (all4, all6) = (nets(&["0.0.0.0/0"]), nets(&["::/0"]));
        let (v4, v6): (IpAddr, IpAddr) = ("255.255.255.255".parse().unwrap(), "ffff::".parse().unwrap());
        assert!(all4.contain(v4) && !all4.contain(v6) && all6.contain(v6) && !all6.contain(v4));
        assert!(!nets(&[]).contain(v4));
        assert!(nets(&["::ffff:10.0.0.0/104"]).contain("10.7.7.7".parse().unwrap()));
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "10.0.0.0/08", "10.0.0.0/+8", "10.0.0.0/", "10.0.0.0/8/8", "::/129"]
        {
            assert!(bad.parse::<Cidr>().is_err(), "{bad:?}");
        }
        assert!("fe80::1%eth0/64".parse::<Cidr>().is_err());
        assert_eq!("10.1.2.3/8".parse::<Cidr>().unwrap().to_string(), "10.0.0.0/8");
        assert_eq!("0.0.0.0/0".parse::<Cidr>().unwrap().to_string(), "0.0.0.0/0");
    }

    #[test]
    fn names_match_whole_or_by_one_wildcard_at_an_end() {
        let parse = |values: &[&str]| Strings::new(&values.iter().map(|v| StringMatch::parse(v)).collect::<Vec<_>>());
        let some = parse(&["a/b", "pre*", "*post", "x*y"]);
        for (name, held) in
            [("a/b", true), ("a/bc", false), ("prefix", true), ("at-post", true), ("xzy", false), ("x*y", true)]
        {
            assert_eq!(some.contain(name), held, "{name}");
        }
        assert!(!some.contain("") && !parse(&["*"]).contain("") && parse(&["*"]).contain("z"));
    }
}
