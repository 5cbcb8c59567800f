//! The mesh's own authority: a root in a mounted Secret, with which each node signs for its pods.
//!
//! What that means when a node is taken over: docs/decisions/0011-own-ca-signs-on-the-node.md.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tracing::{info, warn};
use zeroize::{Zeroize as _, Zeroizing};

use super::{
    Authority, Credential, IssueError, Issued, Issuing, Request, SpiffeId, TrustBundle,
    authority::Task,
    credential::{parse, validity},
    pem,
    request::params,
    watch::{follow, places},
};

/// Short, as nothing revokes them; renewed at half of it.
pub const LIFE: Duration = Duration::from_secs(2 * 3_600);
/// Clocks of nodes differ; a certificate that was just made must be valid everywhere.
const SKEW: Duration = Duration::from_secs(5 * 60);

/// Signs certificates with the key in a directory, which is read again when it changes.
pub struct OwnCa {
    name: String,
    life: Duration,
    signer: Arc<RwLock<Arc<Signer>>>,
    news: watch::Receiver<u64>,
    _follow: Task,
}

/// The directory does not hold an authority.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no authority in {directory}: {reason}; `hitless ca init` makes one (tls.crt, tls.key, ca.crt)")]
pub struct BadCa {
    directory: String,
    reason: String,
}

impl OwnCa {
    /// Within a runtime of tokio, as it follows the directory from then on.
    pub fn open(directory: &Path, life: Duration) -> Result<Self, BadCa> {
        let first = Signer::read(directory)?;
        let signer = Arc::new(RwLock::new(Arc::new(first)));
        let (tell, news) = watch::channel(0);
        let (path, current) = (directory.to_owned(), signer.clone());
        let follow = Task::spawn(async move { follow_directory(path, current, tell).await });
        Ok(Self { name: format!("own CA in {}", directory.display()), life, signer, news, _follow: follow })
    }

    fn signer(&self) -> Arc<Signer> {
        self.signer.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Authority for OwnCa {
    fn name(&self) -> &str {
        &self.name
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a> {
        let issued = self.signer().issue(id, self.life, SystemTime::now());
        Box::pin(std::future::ready(issued))
    }

    fn news(&self) -> Option<watch::Receiver<u64>> {
        Some(self.news.clone())
    }

    fn not_after(&self) -> Option<SystemTime> {
        Some(self.signer().until)
    }
}

async fn follow_directory(path: PathBuf, current: Arc<RwLock<Arc<Signer>>>, tell: watch::Sender<u64>) {
    let mut complaint = None;
    let look = || match Signer::read(&path) {
        Ok(signer) => {
            complaint = None;
            let mut current = current.write().unwrap_or_else(PoisonError::into_inner);
            if !current.same_as(&signer) {
                *current = Arc::new(signer);
                drop(current);
                info!(directory = %path.display(), "the authority has changed; all certificates are made anew");
                tell.send_modify(|count| *count += 1);
            }
        }
        Err(error) => {
            if complaint.as_ref() != Some(&error) {
                warn!(%error, "the authority that was read before stays in force");
                complaint = Some(error);
            }
        }
    };
    follow(|| places(&path, pem::CERTIFICATE), look).await;
}

/// An authority's key and what leads from it to the roots.
struct Signer {
    issuer: Issuer<'static, KeyPair>,
    /// The signing certificate and what is above it, without a root.
    chain: Vec<CertificateDer<'static>>,
    /// What `chain` was read from.
    signing: CertificateDer<'static>,
    roots: Vec<CertificateDer<'static>>,
    not_before: SystemTime,
    not_after: SystemTime,
    /// When the first certificate expires that its peers need: its own, one above it, or the last root.
    until: SystemTime,
}

impl Signer {
    fn read(directory: &Path) -> Result<Self, BadCa> {
        Self::read_files(directory).map_err(|reason| BadCa { directory: directory.display().to_string(), reason })
    }

    fn read_files(directory: &Path) -> Result<Self, String> {
        let file = |name: &str| {
            let path = directory.join(name);
            pem::read(&path).map(|text| (path, text))
        };
        let (path, text) = file(pem::CERTIFICATE)?;
        let chain = pem::certificates(&text, &path.display())?;
        let (path, text) = file(pem::KEY)?;
        let secret = pem::key(&text, &path.display())?;
        let unreadable = |_| format!("{}: the key cannot be used for signing", path.display());
        let key = KeyPair::try_from(secret.der()).map_err(unreadable)?;
        let roots = if directory.join(pem::ROOTS).exists() {
            let (path, text) = file(pem::ROOTS)?;
            pem::certificates(&text, &path.display())?
        } else {
            chain.clone()
        };
        Self::new(chain, key, roots)
    }

    fn new(
        mut chain: Vec<CertificateDer<'static>>,
        mut key: KeyPair,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, String> {
        let signing = chain.first().cloned().ok_or("no certificate")?;
        let certificate = parse(&signing, "the first certificate").map_err(|flaw| flaw.to_string())?;
        if !certificate.is_ca() {
            return Err(format!("the first certificate of {} is not an authority's", pem::CERTIFICATE));
        }
        if certificate.public_key().raw != key.subject_public_key_info() {
            return Err(format!("the key in {} is not the one of {}", pem::KEY, pem::CERTIFICATE));
        }
        let (not_before, not_after) = validity(&certificate);
        // The serialized copy is not needed for signing.
        key.zeroize();
        let issuer = Issuer::from_ca_cert_der(&signing, key).map_err(|error| error.to_string())?;
        if let Some(root) = chain.iter().position(|certificate| roots.contains(certificate)) {
            chain.truncate(root);
        }
        let ends = |certificate: &CertificateDer<'static>| {
            parse(certificate, "a certificate above it").map(|certificate| validity(&certificate).1)
        };
        let above = chain.iter().map(ends).collect::<Result<Vec<_>, _>>().map_err(|flaw| flaw.to_string())?;
        let last_root = roots.iter().filter_map(|root| ends(root).ok()).max();
        let until = above.into_iter().chain(last_root).fold(not_after, SystemTime::min);
        let signer = Self { issuer, chain, signing, roots, not_before, not_after, until };
        signer.prove().map(|()| signer)
    }

    /// Signs something and checks it as every peer will: better now than at the first handshake.
    fn prove(&self) -> Result<(), String> {
        let now = SystemTime::now();
        let id = SpiffeId::new("proof.invalid", "proof", "proof").map_err(|error| error.to_string())?;
        let issued = self.issue(&id, LIFE, now).map_err(|error| error.reason)?;
        let trust = TrustBundle::new(id.trust_domain(), issued.roots.clone()).map_err(|flaw| flaw.to_string())?;
        Credential::check(&id, issued, Arc::new(trust), now).map(drop).map_err(|flaw| {
            format!(
                "what it signs would not be trusted: {flaw} (is {} under a root of {}?)",
                pem::CERTIFICATE,
                pem::ROOTS
            )
        })
    }

    fn issue(&self, id: &SpiffeId, life: Duration, now: SystemTime) -> Result<Issued, IssueError> {
        if self.not_after <= now {
            let remedy = "put one that is valid into the authority's directory: `hitless ca init` makes one";
            return Err(IssueError::refused(id, "the certificate of the own CA has expired", remedy));
        }
        let failed = |error: rcgen::Error| IssueError::refused(id, error.to_string(), "check the own CA's key");
        let request = Request::new(id).map_err(failed)?;
        let leaf = self.sign(id, &request.public_key, life, now).map_err(failed)?;
        let chain = std::iter::once(leaf).chain(self.chain.iter().cloned()).collect();
        Ok(Issued { chain, key: request.key, roots: self.roots.clone() })
    }

    fn sign(
        &self,
        id: &SpiffeId,
        public_key: &[u8],
        life: Duration,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        let mut params = params(id)?;
        params.not_before = (now - SKEW).max(self.not_before).into();
        params.not_after = (now + life).min(self.not_after).into();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(&SubjectPublicKeyInfo::from_der(public_key)?, &self.issuer)?.into())
    }

    fn same_as(&self, other: &Self) -> bool {
        self.signing == other.signing && self.chain == other.chain && self.roots == other.roots
    }
}

/// A new root, for `hitless ca init`.
pub struct Root {
    /// PEM.
    pub certificate: String,
    /// PEM.
    pub key: Zeroizing<String>,
    pub not_after: SystemTime,
}

impl Root {
    pub fn new(trust_domain: &str, life: Duration, now: SystemTime) -> anyhow::Result<Self> {
        // Borrows the rules of what a trust domain is.
        let id = SpiffeId::new(trust_domain, "any", "any")?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, id.trust_domain());
        params.distinguished_name.push(DnType::CommonName, "hitless root");
        // X509-SVID section 4.2: a signing certificate is named after its trust domain.
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{}", id.trust_domain()).try_into()?)];
        // Leaves, or one intermediate and its leaves.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let not_after = now + life;
        params.not_before = (now - SKEW).into();
        params.not_after = not_after.into();
        let mut pair = KeyPair::generate()?;
        let certificate = params.self_signed(&pair)?.pem();
        let key = Zeroizing::new(pair.serialize_pem());
        pair.zeroize();
        Ok(Self { certificate, key, not_after })
    }
}

#[cfg(test)]
mod tests;
