//! What a workload proves itself with, checked as its peers will check it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{RootCertStore, crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::{prelude::*, public_key::PublicKey};

use super::{SpiffeId, authority::Issued};

/// A workload's certificate chain and key, and whom it trusts. Replaced as a whole when any part is renewed.
#[derive(Clone)]
pub struct Credential {
    pub id: SpiffeId,
    /// Leaf first; the key never leaves memory.
    pub key: Arc<CertifiedKey>,
    pub trust: Arc<TrustBundle>,
    /// When the whole chain has become valid, and until when all of it is.
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Of the leaf, hexadecimal.
    pub serial: String,
}

/// The roots of a trust domain.
pub struct TrustBundle {
    pub trust_domain: Arc<str>,
    pub roots: Arc<RootCertStore>,
    /// What the roots were made from.
    certificates: Vec<CertificateDer<'static>>,
}

/// Why an issued certificate is not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    #[error("the chain is empty")]
    EmptyChain,
    #[error("the chain has more than {MAX_CHAIN} certificates")]
    LongChain,
    #[error("{0} is not an X.509 certificate")]
    Malformed(String),
    #[error("its certificate has no URI; a SPIFFE certificate has exactly one")]
    NoUri,
    #[error("its certificate has {0} URIs; a SPIFFE certificate has exactly one")]
    ManyUris(usize),
    #[error("its certificate is for {0:?}")]
    WrongUri(String),
    #[error("its certificate is an authority's, not a workload's")]
    IsAuthority,
    #[error("its certificate may not be used for signatures (key usage)")]
    Usage,
    #[error("its key is {0}; taken are ECDSA P-256 and P-384, and RSA of 2,048 to 8,192 bits")]
    KeyKind(String),
    #[error("the private key cannot be read")]
    UnreadableKey,
    #[error("the private key is not the certificate's")]
    KeyMismatch,
    #[error("it will be valid only in {0} s: is this node's clock right?")]
    NotYetValid(u64),
    #[error("it expired {0} s ago")]
    Expired(u64),
    #[error("no root to trust came with it")]
    NoRoots,
    #[error("root {0} is no certificate of an authority")]
    BadRoot(usize),
    #[error("its chain does not lead to a trusted root: {0}")]
    Untrusted(String),
}

/// Longer ones are somebody's mistake, and every handshake would carry them.
const MAX_CHAIN: usize = 10;
const EC: &str = "1.2.840.10045.2.1";
const RSA: &str = "1.2.840.113549.1.1.1";
const P256: &str = "1.2.840.10045.3.1.7";
const P384: &str = "1.3.132.0.34";

impl Credential {
    /// Takes what an authority issued for `id` if its peers would: chain, names, key and times are right at `now`.
    pub fn check(id: &SpiffeId, issued: Issued, trust: Arc<TrustBundle>, now: SystemTime) -> Result<Self, Flaw> {
        let Issued { chain, key, .. } = issued;
        if chain.len() > MAX_CHAIN {
            return Err(Flaw::LongChain);
        }
        let leaf = parse(chain.first().ok_or(Flaw::EmptyChain)?, "the leaf")?;
        check_leaf(&leaf, id)?;
        let serial = leaf.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect();
        let (mut not_before, mut not_after) = validity(&leaf);
        for (place, certificate) in chain.iter().enumerate().skip(1) {
            let (from, to) = validity(&parse(certificate, &format!("certificate {} of the chain", place + 1))?);
            (not_before, not_after) = (not_before.max(from), not_after.min(to));
        }
        if let Ok(wait) = not_before.duration_since(now)
            && !wait.is_zero()
        {
            return Err(Flaw::NotYetValid(wait.as_secs().max(1)));
        }
        if let Ok(age) = now.duration_since(not_after) {
            return Err(Flaw::Expired(age.as_secs()));
        }
        leads_to(&chain, &trust, now)?;
        // By reference: the provider's own loader would leave a copy behind.
        let key = aws_lc_rs::sign::any_supported_type(key.der()).map_err(|_| Flaw::UnreadableKey)?;
        let key = CertifiedKey::new(chain, key);
        key.keys_match().map_err(|_| Flaw::KeyMismatch)?;
        Ok(Self { id: id.clone(), key: Arc::new(key), trust, not_before, not_after, serial })
    }

    pub fn valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }

    /// Would a peer with the same roots take it?
    pub fn trusted_by(&self, trust: &TrustBundle, now: SystemTime) -> bool {
        leads_to(&self.key.cert, trust, now).is_ok()
    }
}

/// X509-SVID sections 2, 4 and 5.2.
fn check_leaf(leaf: &X509Certificate<'_>, id: &SpiffeId) -> Result<(), Flaw> {
    let malformed = |_| Flaw::Malformed("the leaf".into());
    let uri = the_uri(leaf)?;
    if uri != id.as_str() {
        return Err(Flaw::WrongUri(uri.chars().take(300).collect()));
    }
    if leaf.is_ca() {
        return Err(Flaw::IsAuthority);
    }
    if let Some(usage) = leaf.key_usage().map_err(malformed)? {
        if usage.value.key_cert_sign() || usage.value.crl_sign() {
            return Err(Flaw::IsAuthority);
        }
        if !usage.value.digital_signature() {
            return Err(Flaw::Usage);
        }
    }
    check_key(leaf.public_key())
}

/// The one URI of a certificate; other names beside it say nothing.
pub fn the_uri<'a>(leaf: &'a X509Certificate<'_>) -> Result<&'a str, Flaw> {
    let names = leaf.subject_alternative_name().map_err(|_| Flaw::Malformed("the leaf".into()))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (None, _) => Err(Flaw::NoUri),
        (Some(uri), 0) => Ok(uri),
        (Some(_), more) => Err(Flaw::ManyUris(more + 1)),
    }
}

/// Istio's and SPIRE's kinds of keys; others would meet peers that cannot verify them.
fn check_key(key: &SubjectPublicKeyInfo<'_>) -> Result<(), Flaw> {
    let algorithm = key.algorithm.algorithm.to_id_string();
    match algorithm.as_str() {
        EC => {
            let curve = key.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
            match curve.map(|oid| oid.to_id_string()).as_deref() {
                Some(P256 | P384) => Ok(()),
                Some(curve) => Err(Flaw::KeyKind(format!("on the curve {curve}"))),
                None => Err(Flaw::KeyKind("on no named curve".into())),
            }
        }
        RSA => match key.parsed() {
            Ok(PublicKey::RSA(rsa)) if (2048..=8192).contains(&rsa.key_size()) => Ok(()),
            Ok(PublicKey::RSA(rsa)) => Err(Flaw::KeyKind(format!("RSA of {} bits", rsa.key_size()))),
            _ => Err(Flaw::KeyKind("unreadable".into())),
        },
        _ => Err(Flaw::KeyKind(format!("of the kind {algorithm}"))),
    }
}

/// As client and as server: a workload is both.
fn leads_to(chain: &[CertificateDer<'static>], trust: &TrustBundle, now: SystemTime) -> Result<(), Flaw> {
    let untrusted = |error: webpki::Error| Flaw::Untrusted(error.to_string());
    let (leaf, intermediates) = chain.split_first().ok_or(Flaw::EmptyChain)?;
    let leaf = EndEntityCert::try_from(leaf).map_err(untrusted)?;
    let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms.all;
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        leaf.verify_for_usage(algorithms, &trust.roots.roots, intermediates, now, usage, None, None)
            .map_err(untrusted)?;
    }
    Ok(())
}

impl TrustBundle {
    pub fn new(trust_domain: &str, mut certificates: Vec<CertificateDer<'static>>) -> Result<Self, Flaw> {
        let mut roots = RootCertStore::empty();
        for (place, certificate) in certificates.iter().enumerate() {
            let bad = || Flaw::BadRoot(place + 1);
            // A leaf among the roots would be trusted for itself.
            if !parse(certificate, "").is_ok_and(|root| root.is_ca()) {
                return Err(bad());
            }
            roots.add(certificate.clone()).map_err(|_| bad())?;
        }
        if roots.is_empty() {
            return Err(Flaw::NoRoots);
        }
        certificates.sort_by(|a, b| a.as_ref().cmp(b));
        certificates.dedup();
        Ok(Self { trust_domain: trust_domain.into(), roots: Arc::new(roots), certificates })
    }

    /// Each once.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// Are these the same roots, in whatever order?
    pub(super) fn is_of(&self, certificates: &[CertificateDer<'static>]) -> bool {
        self.certificates.iter().all(|mine| certificates.contains(mine))
            && certificates.iter().all(|theirs| self.certificates.contains(theirs))
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("id", &self.id).field("serial", &self.serial).finish_non_exhaustive()
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roots = self.certificates.len();
        f.debug_struct("TrustBundle").field("trust_domain", &self.trust_domain).field("roots", &roots).finish()
    }
}

pub(super) fn parse<'a>(der: &'a CertificateDer<'_>, what: &str) -> Result<X509Certificate<'a>, Flaw> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(Flaw::Malformed(what.to_owned())),
    }
}

pub(super) fn validity(certificate: &X509Certificate<'_>) -> (SystemTime, SystemTime) {
    let time = |time: ASN1Time| UNIX_EPOCH + Duration::from_secs(time.timestamp().max(0) as u64);
    let validity = certificate.validity();
    (time(validity.not_before), time(validity.not_after))
}

#[cfg(test)]
mod tests;
