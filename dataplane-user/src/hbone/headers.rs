//! What a CONNECT says in its headers: `:authority`, `baggage`, `forwarded`, `traceparent`. Read and written without
//! any I/O, bounded, and never a panic whatever the bytes.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use http::HeaderMap;

/// Longer values are refused before they are looked at. W3C Baggage section 3.3.2 names 8,192 bytes and 64 members.
const MAX_VALUE: usize = 8192;
const MAX_MEMBERS: usize = 64;
/// RFC 1035 section 2.3.4.
const MAX_HOST: usize = 253;

/// A header that says nothing usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad {header}: {reason}")]
pub struct HeaderError {
    pub header: &'static str,
    pub reason: &'static str,
}

/// Where a CONNECT wants to go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    Address(SocketAddr),
    /// A name, for waypoints and gateways; lower case.
    Host(Box<str>, u16),
}

impl FromStr for Authority {
    type Err = HeaderError;

    fn from_str(text: &str) -> Result<Self, HeaderError> {
        let bad = |reason| HeaderError { header: ":authority", reason };
        // The longest is a host name, its colon and its port.
        if text.len() > MAX_HOST + 6 {
            return Err(bad("longer than a host name and a port"));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| bad("no port"))?;
        let port = port_of(port).ok_or_else(|| bad("its port is not 1 to 65535"))?;
        if let Some(inside) = host.strip_prefix('[') {
            let inside = inside.strip_suffix(']').ok_or_else(|| bad("an unclosed bracket"))?;
            let ip = inside.parse().map_err(|_| bad("no IPv6 address in its brackets"))?;
            return Ok(Self::Address(SocketAddr::new(IpAddr::V6(ip), port)));
        }
        if let Ok(ip) = host.parse() {
            return Ok(Self::Address(SocketAddr::new(IpAddr::V4(ip), port)));
        }
        let label = |l: &str| {
            !l.is_empty() && l.len() < 64 && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if host.len() > MAX_HOST || !host.split('.').all(label) {
            return Err(bad("neither an address nor a host name"));
        }
        // Such a host is an address that is written wrongly (10.0.0.256): nothing to ask a resolver for.
        if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Err(bad("neither an address nor a host name"));
        }
        Ok(Self::Host(host.to_ascii_lowercase().into(), port))
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// What a peer says about its workload (W3C Baggage with Istio's keys). A claim for metrics and logs, never a proof.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    pub cluster: Option<Box<str>>,
    pub namespace: Option<Box<str>>,
    /// What made the pod: `deployment`, `statefulset`, `job`, `pod` …
    pub workload_type: Option<Box<str>>,
    pub workload: Option<Box<str>>,
    pub service: Option<Box<str>>,
    pub version: Option<Box<str>>,
    pub region: Option<Box<str>>,
    pub zone: Option<Box<str>>,
}

impl FromStr for Baggage {
    type Err = HeaderError;

    /// Unknown keys and properties are skipped; of a key that comes twice, the first counts.
    fn from_str(text: &str) -> Result<Self, HeaderError> {
        let bad = |reason| HeaderError { header: "baggage", reason };
        if text.len() > MAX_VALUE {
            return Err(bad("longer than 8,192 bytes"));
        }
        let mut baggage = Self::default();
        for (i, member) in text.split(',').enumerate() {
            if i == MAX_MEMBERS {
                return Err(bad("more than 64 members"));
            }
            let member = member.split(';').next().unwrap_or_default().trim_matches(OWS);
            if member.is_empty() {
                continue;
            }
            let (key, value) = member.split_once('=').ok_or_else(|| bad("a member without '='"))?;
            let (key, value) = (key.trim_end_matches(OWS), value.trim_start_matches(OWS));
            if key.is_empty() || !key.bytes().all(is_token) {
                return Err(bad("a key that is no token"));
            }
            if !value.bytes().all(is_baggage_octet) {
                return Err(bad("a value with characters that must be percent-encoded"));
            }
            let slot = match key {
                "k8s.cluster.name" => &mut baggage.cluster,
                "k8s.namespace.name" => &mut baggage.namespace,
                "service.name" => &mut baggage.service,
                "service.version" => &mut baggage.version,
                "cloud.region" => &mut baggage.region,
                "cloud.availability_zone" => &mut baggage.zone,
                _ => {
                    let kind = key.strip_prefix("k8s.").and_then(|k| k.strip_suffix(".name"));
                    if let (Some(kind), None) = (kind.filter(|k| WORKLOAD_TYPES.contains(k)), &baggage.workload_type)
                        && let Some(workload) = decoded(value)
                    {
                        baggage.workload_type = Some(kind.into());
                        baggage.workload = Some(workload);
                    }
                    continue;
                }
            };
            if slot.is_none() {
                *slot = decoded(value);
            }
        }
        Ok(baggage)
    }
}

const WORKLOAD_TYPES: &[&str] =
    &["deployment", "statefulset", "daemonset", "replicaset", "job", "cronjob", "pod", "replicationcontroller"];

impl fmt::Display for Baggage {
    /// Istio's order.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        let mut member = |key: fmt::Arguments<'_>, value: &Option<Box<str>>| {
            let Some(value) = value else { return Ok(()) };
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            write!(f, "{comma}{key}={}", Encoded(value))
        };
        member(format_args!("k8s.cluster.name"), &self.cluster)?;
        member(format_args!("k8s.namespace.name"), &self.namespace)?;
        let kind = self.workload_type.as_deref().unwrap_or("pod");
        member(format_args!("k8s.{kind}.name"), &self.workload)?;
        member(format_args!("service.name"), &self.service)?;
        member(format_args!("service.version"), &self.version)?;
        member(format_args!("cloud.region"), &self.region)?;
        member(format_args!("cloud.availability_zone"), &self.zone)
    }
}

/// Who asked the peer, and for which host (RFC 7239).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Nothing for `unknown` and for obfuscated names.
    pub client: Option<IpAddr>,
    pub client_port: Option<u16>,
    pub host: Option<Box<str>>,
}

impl Forwarded {
    pub fn new(client: SocketAddr, host: Option<&str>) -> Self {
        Self { client: Some(client.ip()), client_port: Some(client.port()), host: host.map(Into::into) }
    }

    /// When both parts are known.
    pub fn client_address(&self) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.client?, self.client_port?))
    }
}

impl FromStr for Forwarded {
    type Err = HeaderError;

    /// Of several hops the first counts: it is nearest to the client. The others must be well formed.
    fn from_str(text: &str) -> Result<Self, HeaderError> {
        let bad = |reason| HeaderError { header: "forwarded", reason };
        if text.len() > MAX_VALUE {
            return Err(bad("longer than 8,192 bytes"));
        }
        let mut forwarded = Self::default();
        let (mut hops, mut pairs) = (0, 0);
        let mut seen = (false, false);
        let mut rest = text.trim_matches(OWS);
        while !rest.is_empty() {
            pairs += 1;
            if pairs > MAX_MEMBERS {
                return Err(bad("more than 64 pairs"));
            }
            let (key, value) = rest.split_once('=').ok_or_else(|| bad("a pair without '='"))?;
            if key.is_empty() || !key.bytes().all(is_token) {
                return Err(bad("a key that is no token"));
            }
            let value = if let Some(quoted) = value.strip_prefix('"') {
                let (value, after) = unquoted(quoted).ok_or_else(|| bad("an unclosed or wrong quoted string"))?;
                rest = after;
                value
            } else {
                let end = value.bytes().position(|b| !is_token(b)).unwrap_or(value.len());
                rest = &value[end..];
                value[..end].to_owned()
            };
            if value.is_empty() {
                return Err(bad("an empty value"));
            }
            if hops == 0 && key.eq_ignore_ascii_case("for") {
                if std::mem::replace(&mut seen.0, true) {
                    return Err(bad("for= twice in one hop"));
                }
                (forwarded.client, forwarded.client_port) = node(&value).ok_or_else(|| bad("for= is no node"))?;
            } else if hops == 0 && key.eq_ignore_ascii_case("host") {
                if std::mem::replace(&mut seen.1, true) {
                    return Err(bad("host= twice in one hop"));
                }
                if value.len() > MAX_HOST + 6 || !value.bytes().all(is_host_octet) {
                    return Err(bad("host= is no host"));
                }
                forwarded.host = Some(value.into());
            }
            rest = match rest.as_bytes().first() {
                None => rest,
                Some(b';') => &rest[1..],
                Some(_) => {
                    let after = rest.trim_start_matches(OWS).strip_prefix(',');
                    hops += 1;
                    after.ok_or_else(|| bad("neither ';' nor ',' after a pair"))?.trim_start_matches(OWS)
                }
            };
        }
        if pairs == 0 { Err(bad("it is empty")) } else { Ok(forwarded) }
    }
}

impl fmt::Display for Forwarded {
    /// Istio's form: `for="10.0.0.1:4711";host=web.shop.svc.cluster.local`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.client, self.client_port) {
            (Some(ip), Some(port)) => write!(f, "for=\"{}\"", SocketAddr::new(ip, port))?,
            (Some(IpAddr::V6(ip)), None) => write!(f, "for=\"[{ip}]\"")?,
            (Some(IpAddr::V4(ip)), None) => write!(f, "for={ip}")?,
            (None, _) => f.write_str("for=unknown")?,
        }
        match self.host.as_deref() {
            None => Ok(()),
            Some(host) if host.bytes().all(is_token) => write!(f, ";host={host}"),
            Some(host) => write!(f, ";host=\"{host}\""),
        }
    }
}

/// The trace that a connection belongs to (W3C Trace Context section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    pub trace: u128,
    pub parent: u64,
    pub flags: u8,
}

impl FromStr for TraceParent {
    type Err = HeaderError;

    fn from_str(text: &str) -> Result<Self, HeaderError> {
        let bad = |reason| HeaderError { header: "traceparent", reason };
        let bytes = text.as_bytes();
        // A later version may be longer, after another dash.
        let fits = bytes.len() == 55 || (bytes.len() > 55 && bytes[55] == b'-' && !text.starts_with("00"));
        if !fits || !text.is_ascii() || bytes.len() > 512 || [2, 35, 52].iter().any(|&i| bytes[i] != b'-') {
            return Err(bad("it is not version-trace-parent-flags"));
        }
        let hex = |part: &str| {
            let lower = part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            if lower { u128::from_str_radix(part, 16).ok() } else { None }
        };
        let part = |range| hex(&text[range]).ok_or_else(|| bad("other characters than 0-9 and a-f"));
        let (version, trace, parent, flags) = (part(0..2)?, part(3..35)?, part(36..52)?, part(53..55)?);
        if version == 0xff || trace == 0 || parent == 0 {
            return Err(bad("an id of zeros, or version ff"));
        }
        // 16 and 2 digits each.
        Ok(Self { trace, parent: parent as u64, flags: flags as u8 })
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.parent, self.flags)
    }
}

/// Everything that a CONNECT says besides its destination. What is malformed is left out: it decides nothing, except
/// that a caller who needs `forwarded` finds none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    pub baggage: Option<Baggage>,
    pub forwarded: Option<Forwarded>,
    pub traceparent: Option<TraceParent>,
    /// The peer knows the destination's service, or knows that it may be no other: when it is refused it decides itself.
    pub tries_elsewhere: bool,
}

impl Metadata {
    pub fn of(headers: &HeaderMap) -> Self {
        let trace = headers.get(TRACEPARENT).and_then(|v| v.to_str().ok());
        Self {
            baggage: joined(headers, BAGGAGE).and_then(|v| v.parse().ok()),
            forwarded: joined(headers, FORWARDED).and_then(|v| v.parse().ok()),
            traceparent: trace.and_then(|v| v.parse().ok()),
            tries_elsewhere: headers.contains_key(TRIES_ELSEWHERE),
        }
    }

    /// Errors when a value holds bytes that no header may have.
    pub fn write(&self, headers: &mut HeaderMap) -> Result<(), HeaderError> {
        let mut set = |header: &'static str, text: Option<String>| {
            let Some(text) = text.filter(|t| !t.is_empty()) else { return Ok(()) };
            let reason = "it holds characters that no header may have";
            let value = text.parse().map_err(|_| HeaderError { header, reason })?;
            headers.insert(header, value);
            Ok(())
        };
        set(BAGGAGE, self.baggage.as_ref().map(ToString::to_string))?;
        set(FORWARDED, self.forwarded.as_ref().map(ToString::to_string))?;
        set(TRACEPARENT, self.traceparent.as_ref().map(ToString::to_string))?;
        set(TRIES_ELSEWHERE, self.tries_elsewhere.then(|| "1".to_owned()))
    }
}

pub const BAGGAGE: &str = "baggage";
pub const FORWARDED: &str = "forwarded";
pub const TRACEPARENT: &str = "traceparent";
/// hitless's own; other peers pass over it.
pub const TRIES_ELSEWHERE: &str = "x-hitless-tries-elsewhere";

/// RFC 9110 section 5.6.3.
const OWS: [char; 2] = [' ', '\t'];

/// Several lines of a list header are one list (RFC 9110 section 5.3).
fn joined(headers: &HeaderMap, name: &str) -> Option<String> {
    let mut text = String::new();
    for value in headers.get_all(name) {
        let value = value.to_str().ok()?;
        if !text.is_empty() {
            text.push(',');
        }
        if text.len() + value.len() > MAX_VALUE {
            return None;
        }
        text.push_str(value);
    }
    if text.is_empty() { None } else { Some(text) }
}

fn port_of(text: &str) -> Option<u16> {
    // `parse` would take a sign.
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten().filter(|&p| p != 0)
}

/// RFC 9110 section 5.6.2.
fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// W3C Baggage section 3.3.1.
fn is_baggage_octet(b: u8) -> bool {
    matches!(b, 0x21 | 0x23..=0x2b | 0x2d..=0x3a | 0x3c..=0x5b | 0x5d..=0x7e)
}

fn is_host_octet(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"-._:[]".contains(&b)
}

/// A quoted string's content and what follows its end (RFC 9110 section 5.6.4).
fn unquoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[i + 1..])),
            '\\' => value.push(chars.next()?.1),
            c if c.is_control() && c != '\t' => return None,
            c => value.push(c),
        }
    }
    None
}

/// A node (RFC 7239 section 6). Outer nothing: no node; inner nothings: not known.
fn node(text: &str) -> Option<(Option<IpAddr>, Option<u16>)> {
    let (name, port) = match text.strip_prefix('[') {
        Some(inside) => {
            let (ip, after) = inside.split_once(']')?;
            let ip = IpAddr::V6(ip.parse().ok()?);
            return match after.strip_prefix(':') {
                None if after.is_empty() => Some((Some(ip), None)),
                None => None,
                Some(port) => Some((Some(ip), node_port(port)?)),
            };
        }
        None => text.split_once(':').map_or((text, None), |(name, port)| (name, Some(port))),
    };
    let port = match port {
        None => None,
        Some(port) => node_port(port)?,
    };
    let obfuscated = |n: &str| n.strip_prefix('_').is_some_and(|r| !r.is_empty() && r.bytes().all(is_obfuscated));
    match name.parse() {
        Ok(ip) => Some((Some(IpAddr::V4(ip)), port)),
        Err(_) if name.eq_ignore_ascii_case("unknown") || obfuscated(name) => Some((None, None)),
        Err(_) => None,
    }
}

fn node_port(text: &str) -> Option<Option<u16>> {
    if let Some(name) = text.strip_prefix('_') {
        return (!name.is_empty() && name.bytes().all(is_obfuscated)).then_some(None);
    }
    port_of(text).map(Some)
}

fn is_obfuscated(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"._-".contains(&b)
}

/// Nothing when what comes out is not UTF-8 or has control characters, which would only forge log lines.
fn decoded(value: &str) -> Option<Box<str>> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((&b, after)) = rest.split_first() {
        let hex = |b: u8| char::from(b).to_digit(16);
        match after {
            [high, low, tail @ ..] if b == b'%' => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => {
                    // Two hexadecimal digits.
                    bytes.push((high * 16 + low) as u8);
                    rest = tail;
                    continue;
                }
                _ => bytes.push(b),
            },
            _ => bytes.push(b),
        }
        rest = after;
    }
    let text = String::from_utf8(bytes).ok()?;
    (!text.chars().any(char::is_control)).then(|| text.into())
}

struct Encoded<'a>(&'a str);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for b in self.0.bytes() {
            if is_baggage_octet(b) && b != b'%' {
                write!(f, "{}", char::from(b))?;
            } else {
                write!(f, "%{b:02X}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_authority_is_an_address_of_either_family_or_a_name_with_a_port() {
        let address = |a: &str| Authority::Address(a.parse().unwrap());
        assert_eq!("10.0.0.1:8080".parse(), Ok(address("10.0.0.1:8080")));
        assert_eq!("[fd00::1]:80".parse(), Ok(address("[fd00::1]:80")));
        assert_eq!(
            "Web.shop.svc.cluster.local:80".parse(),
            Ok(Authority::Host("web.shop.svc.cluster.local".into(), 80))
        );
        for text in [
            "",
            ":80",
            "10.0.0.1",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:+80",
            "10.0.0.1:65536",
            "fd00::1:80",
            "[fd00::1:80",
            "[10.0.0.1]:80",
            "a..b:80",
            "a b:80",
            "10.0.0.256:80",
            "user@web:80",
            "web:80/x",
        ] {
            assert!(text.parse::<Authority>().is_err(), "{text:?} was taken for an authority");
        }
        assert!(format!("{}:80", "a.".repeat(200)).parse::<Authority>().is_err());
    }

    #[test]
    fn istios_baggage_is_read_and_written_back() {
        let text = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web,\
                    service.version=v1,cloud.region=r,cloud.availability_zone=z";
        let baggage: Baggage = text.parse().unwrap();
        assert_eq!(baggage.workload_type.as_deref(), Some("deployment"));
        assert_eq!(baggage.workload.as_deref(), Some("web"));
        assert_eq!(baggage.zone.as_deref(), Some("z"));
        assert_eq!(baggage.to_string(), text);
    }

    #[test]
    fn unknown_members_properties_and_blanks_are_skipped_and_the_first_of_two_counts() {
        let baggage: Baggage =
            " x=1;p=2 , service.name = we%62%20x ;q, service.name=other,,k8s.pod.name=p".parse().unwrap();
        assert_eq!(baggage.service.as_deref(), Some("web x"));
        assert_eq!((baggage.workload_type.as_deref(), baggage.workload.as_deref()), (Some("pod"), Some("p")));
        assert_eq!("service.name=a%0Ab".parse::<Baggage>().unwrap().service, None);
    }

    #[test]
    fn baggage_is_bounded() {
        assert!("x=1,".repeat(65).parse::<Baggage>().is_err());
        assert!(format!("x={}", "1".repeat(8192)).parse::<Baggage>().is_err());
        for text in ["x", "=1", "x=\"1\"", "x y=1", "x=\u{e9}"] {
            assert!(text.parse::<Baggage>().is_err(), "{text:?} was taken for baggage");
        }
    }

    #[test]
    fn forwarded_names_the_client_and_the_host() {
        let forwarded: Forwarded = "for=\"10.0.0.1:4711\";host=web.shop.svc.cluster.local".parse().unwrap();
        assert_eq!(forwarded, Forwarded::new("10.0.0.1:4711".parse().unwrap(), Some("web.shop.svc.cluster.local")));
        assert_eq!(forwarded.to_string(), "for=\"10.0.0.1:4711\";host=web.shop.svc.cluster.local");
        let six: Forwarded = "For=\"[2001:db8::1]:4711\"".parse().unwrap();
        assert_eq!(six.client_address(), Some("[2001:db8::1]:4711".parse().unwrap()));
        let hops: Forwarded = "for=192.0.2.60;proto=http;by=203.0.113.43, for=\"[::1]\";host=other".parse().unwrap();
        assert_eq!((hops.client, hops.client_port, hops.host), (Some("192.0.2.60".parse().unwrap()), None, None));
        assert_eq!("for=unknown".parse::<Forwarded>().unwrap().client, None);
        assert_eq!("for=_hidden;host=a".parse::<Forwarded>().unwrap().client, None);
    }

    #[test]
    fn what_is_no_forwarded_is_refused() {
        for text in [
            "",
            " ",
            "for",
            "for=",
            "for=\"",
            "for=\"10.0.0.1",
            "for=\"10.0.0.1:99999\"",
            "for=10.0.0.1:80",
            "for=a b",
            "for=\"[::1\"",
            "for=\"[::1]x\"",
            "for=1.2.3.4;for=1.2.3.5",
            "host=a;host=b",
            "host=\"a b\"",
            "=x",
            "for=1.2.3.4 x",
        ] {
            assert!(text.parse::<Forwarded>().is_err(), "{text:?} was taken for forwarded");
        }
        assert!("for=_a;".repeat(65).parse::<Forwarded>().is_err());
    }

    #[test]
    fn a_trace_is_read_and_written_back() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(text.parse::<TraceParent>().unwrap().to_string(), text);
        assert!(format!("01{}-more", &text[2..]).parse::<TraceParent>().is_ok());
        for bad in [format!("{text}-"), text.replace("af", "AF"), format!("ff{}", &text[2..]), text.replace('-', "_")] {
            assert!(bad.parse::<TraceParent>().is_err(), "{bad:?} was taken for a trace");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_reader_panic(text in ".{0,200}") {
            let _ = text.parse::<Authority>();
            let _ = text.parse::<Baggage>();
            let _ = text.parse::<Forwarded>();
            let _ = text.parse::<TraceParent>();
        }

        #[test]
        fn what_is_written_is_read_back(service in "[ -~é]{1,40}", host in "[a-z.]{1,40}", port in 1u16.., ip: [u8; 16]) {
            let baggage = Baggage { service: Some(service.into()), ..Default::default() };
            prop_assert_eq!(baggage.to_string().parse(), Ok(baggage));
            let forwarded = Forwarded::new(SocketAddr::new(IpAddr::from(ip), port), Some(&host));
            prop_assert_eq!(forwarded.to_string().parse(), Ok(forwarded));
        }

        #[test]
        fn what_looks_like_the_header_does_not_make_a_reader_panic(text in "[a-z0-9=\";,:.%_\\[\\]\\\\ -]{0,80}") {
            if let Ok(read) = text.parse::<Forwarded>() {
                prop_assert_eq!(read.to_string().parse(), Ok(read));
            }
            if let Ok(read) = text.parse::<Authority>() {
                prop_assert_eq!(read.to_string().parse(), Ok(read));
            }
            let _ = text.parse::<Baggage>();
        }
    }
}
