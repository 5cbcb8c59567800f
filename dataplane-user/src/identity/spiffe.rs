//! The name of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

use std::{fmt, str::FromStr, sync::Arc};

/// A workload's identity as Istio writes it, in the one URI of its certificate (SPIFFE-ID section 2).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// Where the namespace ends, in bytes of `uri`.
    namespace_end: u16,
    /// Where the trust domain ends.
    domain_end: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{uri:?} is no identity: {reason}; it must be spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
pub struct BadSpiffeId {
    uri: String,
    reason: &'static str,
}

const SCHEME: &str = "spiffe://";
const NAMESPACE: &str = "/ns/";
const ACCOUNT: &str = "/sa/";
/// SPIFFE-ID section 2.3.
const MAX_LEN: usize = 2048;
/// SPIFFE-ID section 2.1.
const MAX_DOMAIN: usize = 255;

impl SpiffeId {
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, BadSpiffeId> {
        format!("{SCHEME}{trust_domain}{NAMESPACE}{namespace}{ACCOUNT}{service_account}").parse()
    }

    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.domain_end)]
    }

    pub fn namespace(&self) -> &str {
        &self.uri[usize::from(self.domain_end) + NAMESPACE.len()..usize::from(self.namespace_end)]
    }

    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.namespace_end) + ACCOUNT.len()..]
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// Without `spiffe://`: a principal in Istio's policies.
    pub fn principal(&self) -> &str {
        &self.uri[SCHEME.len()..]
    }
}

impl FromStr for SpiffeId {
    type Err = BadSpiffeId;

    fn from_str(uri: &str) -> Result<Self, BadSpiffeId> {
        let bad = |reason| BadSpiffeId { uri: uri.chars().take(300).collect(), reason };
        if uri.len() > MAX_LEN {
            return Err(bad("longer than 2,048 bytes"));
        }
        let rest = uri.strip_prefix(SCHEME).ok_or_else(|| bad("no spiffe:// scheme"))?;
        let (domain, path) = rest.split_once('/').ok_or_else(|| bad("no path"))?;
        let domain_char = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
        if domain.is_empty() || domain.len() > MAX_DOMAIN || !domain.chars().all(domain_char) {
            return Err(bad("the trust domain has other characters than a-z, 0-9, '.', '-' and '_', or none"));
        }
        let mut parts = path.split('/');
        let (Some("ns"), Some(namespace), Some("sa"), Some(account), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad("its path is not /ns/…/sa/…"));
        };
        // SPIFFE-ID section 2.2; no dot segments either.
        let path_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let segment = |s: &str| !s.is_empty() && s != "." && s != ".." && s.chars().all(path_char);
        if !segment(namespace) || !segment(account) {
            return Err(bad("a name in its path is empty or has other characters than letters, digits, '.', '-', '_'"));
        }
        let domain_end = SCHEME.len() + domain.len();
        let namespace_end = domain_end + NAMESPACE.len() + namespace.len();
        // At most MAX_LEN, which fits.
        Ok(Self { uri: uri.into(), domain_end: domain_end as u16, namespace_end: namespace_end as u16 })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_into_its_parts_and_written_back() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        assert_eq!((id.trust_domain(), id.namespace(), id.service_account()), ("cluster.local", "shop", "web"));
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/web");
        assert_eq!(id, SpiffeId::new("cluster.local", "shop", "web").unwrap());
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
    }

    #[test]
    fn what_is_no_identity_is_refused_with_the_reason() {
        for uri in [
            "",
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local",
            "spiffe:///ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local:80/ns/a/sa/b",
            "spiffe://user@cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/ns/a/sa/b?x",
            "spiffe://cluster.local/ns/a/sa/%62",
            "spiffe://cluster.local/sa/a/ns/b",
        ] {
            assert!(uri.parse::<SpiffeId>().is_err(), "{uri:?} was taken for an identity");
        }
        assert!(format!("spiffe://{}/ns/a/sa/b", "d".repeat(256)).parse::<SpiffeId>().is_err());
        assert!(format!("spiffe://d/ns/a/sa/{}", "b".repeat(2048)).parse::<SpiffeId>().is_err());
    }
}
