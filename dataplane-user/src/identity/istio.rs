//! Istio's certificate authority: istiod signs for the pods of this node.

use std::{
    collections::BTreeMap,
    error::Error as _,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use prost_types::{Struct, Value, value::Kind};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use zeroize::Zeroizing;

use super::{
    Authority, IssueError, Issued, Issuing, Request, SpiffeId,
    credential::{parse, validity},
    pem,
};

/// Generated from `proto/istio/v1/auth/ca.proto`.
#[allow(clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
pub mod protocol {
    tonic::include_proto!("istio.v1.auth");
}

use protocol::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient};

/// The key that a node's proxy names one of its pods with.
const IMPERSONATED: &str = "ImpersonatedIdentity";
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_WITHIN: Duration = Duration::from_secs(8);
/// A connection that is dead without a word is noticed by then.
const PING: Duration = Duration::from_secs(10);

/// Where istiod is and what it wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IstioConfig {
    /// `https://<host>:<port>`; the host is the name that istiod's certificate must have.
    pub address: String,
    /// Whom to believe to be istiod: PEM, read again for each certificate.
    pub root: PathBuf,
    /// A projected service account token of the audience `istio-ca`, read again for each certificate.
    pub token: PathBuf,
    pub cluster_id: String,
    /// Asked for. An istiod whose longest is shorter refuses that, and is then asked for what it gives by itself.
    pub life: Duration,
}

/// What Istio calls a cluster that nobody named.
pub const CLUSTER: &str = "Kubernetes";

/// What the agent shows istiod, and by what it knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IstioPlaces {
    pub root: PathBuf,
    pub token: PathBuf,
    pub cluster_id: String,
}

impl Default for IstioPlaces {
    /// Where Istio's own node proxy has these things.
    fn default() -> Self {
        Self {
            root: "/var/run/secrets/istio/root-cert.pem".into(),
            token: "/var/run/secrets/tokens/istio-token".into(),
            cluster_id: CLUSTER.into(),
        }
    }
}

impl IstioConfig {
    pub fn new(address: &str, places: &IstioPlaces) -> Self {
        let IstioPlaces { root, token, cluster_id } = places.clone();
        Self { address: address.to_owned(), root, token, cluster_id, life: Duration::from_secs(24 * 3_600) }
    }
}

/// Asks istiod for each certificate.
pub struct Istio {
    name: String,
    config: IstioConfig,
    /// And the root file's content that it was made with.
    channel: Mutex<Option<(Zeroizing<Vec<u8>>, Channel)>>,
    roots: Mutex<Roots>,
    /// It refused the life that is asked for.
    own_life: AtomicBool,
}

/// An answer names the roots of the istiod that gave it, and of two that are being moved to a new root one may name the
/// old one alone. Peers have certificates as old as our own, so a root is trusted as long as one that came with it lives.
#[derive(Default)]
struct Roots(BTreeMap<Vec<u8>, SystemTime>);

impl Istio {
    pub fn new(config: IstioConfig) -> Self {
        let name = format!("istiod at {}", config.address);
        let (channel, roots, own_life) = Default::default();
        Self { name, config, channel, roots, own_life }
    }

    async fn ask(&self, id: &SpiffeId) -> Result<Issued, IssueError> {
        let made = |error: rcgen::Error| IssueError::temporary(id, error.to_string(), "it is tried again");
        let Request { key, csr, .. } = Request::new(id).map_err(made)?;
        let mut client = IstioCertificateServiceClient::new(self.channel(id)?);
        let answer = loop {
            let own_life = self.own_life.load(Relaxed);
            match client.create_certificate(self.request(id, csr.clone(), own_life)?).await {
                Ok(answer) => break answer,
                Err(status) if !own_life && too_long(&status) => self.own_life.store(true, Relaxed),
                Err(status) => return Err(self.explain(id, &status)),
            }
        };
        let (chain, roots) = split(&answer.into_inner().cert_chain)
            .map_err(|flaw| IssueError::refused(id, format!("{} gave {flaw}", self.name), "see istiod's log"))?;
        let until = parse(&chain[0], "the leaf").map(|leaf| validity(&leaf).1).unwrap_or(SystemTime::UNIX_EPOCH);
        let roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner).add(roots, until, SystemTime::now());
        Ok(Issued { chain, key, roots })
    }

    /// `own_life`: the certificate is to live as long as istiod's do by themselves.
    fn request(
        &self,
        id: &SpiffeId,
        csr: String,
        own_life: bool,
    ) -> Result<tonic::Request<IstioCertificateRequest>, IssueError> {
        let impersonated = Value { kind: Some(Kind::StringValue(id.to_string())) };
        let mut request = tonic::Request::new(IstioCertificateRequest {
            csr,
            validity_duration: if own_life { 0 } else { self.config.life.as_secs() as i64 },
            metadata: Some(Struct { fields: [(IMPERSONATED.to_owned(), impersonated)].into() }),
        });
        request.metadata_mut().insert("authorization", self.token(id)?);
        let cluster = self.config.cluster_id.parse().map_err(|_| {
            IssueError::refused(
                id,
                format!("{:?} is no cluster id", self.config.cluster_id),
                "correct the configuration",
            )
        })?;
        request.metadata_mut().insert("clusterid", cluster);
        Ok(request)
    }

    /// The connection is kept; a root file that changed makes a new one.
    fn channel(&self, id: &SpiffeId) -> Result<Channel, IssueError> {
        let pem = read(id, &self.config.root, "mount the ConfigMap istio-ca-root-cert")?;
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        match &*channel {
            Some((made_with, channel)) if *made_with == pem => Ok(channel.clone()),
            _ => {
                let new = self.connect(&pem).map_err(|error| {
                    let reason = format!("{} cannot be asked: {error}", self.name);
                    IssueError::refused(id, reason, "its address must be https://<host>:<port>, its root file PEM")
                })?;
                Ok(channel.insert((pem, new)).1.clone())
            }
        }
    }

    fn connect(&self, root: &[u8]) -> anyhow::Result<Channel> {
        // A file of nonsense would only show as a peer that is not trusted.
        pem::certificates(root, &self.config.root.display()).map_err(anyhow::Error::msg)?;
        anyhow::ensure!(self.config.address.starts_with("https://"), "{:?} is not https", self.config.address);
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root));
        let endpoint = Endpoint::from_shared(self.config.address.clone())?;
        Ok(endpoint
            .tls_config(tls)?
            .connect_timeout(CONNECT_WITHIN)
            .timeout(ANSWER_WITHIN)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .connect_lazy())
    }

    fn token(&self, id: &SpiffeId) -> Result<MetadataValue<Ascii>, IssueError> {
        let path = &self.config.token;
        let remedy = "mount a projected service account token of the audience istio-ca";
        let token = read(id, path, remedy)?;
        let bad = || IssueError::temporary(id, format!("{} holds no token", path.display()), remedy);
        let text = std::str::from_utf8(&token).map_err(|_| bad())?.trim();
        if text.is_empty() {
            return Err(bad());
        }
        let mut value: MetadataValue<Ascii> = Zeroizing::new(format!("Bearer {text}")).parse().map_err(|_| bad())?;
        value.set_sensitive(true);
        Ok(value)
    }

    fn explain(&self, id: &SpiffeId, status: &Status) -> IssueError {
        let mut reason = format!("{} says {:?}: {}", self.name, status.code(), status.message());
        let mut source = status.source();
        while let Some(error) = source {
            let words = error.to_string();
            if !reason.contains(&words) {
                reason += &format!(": {words}");
            }
            source = error.source();
        }
        match status.code() {
            // By the same code as a token that it does not take: only the words tell them apart.
            Code::Unauthenticated if !status.message().contains("impersonation") => {
                let remedy = "it does not take the token: is its audience istio-ca, and is --cluster-id istiod's name of this \
                              cluster?";
                IssueError::refused(id, reason, remedy)
            }
            Code::Unauthenticated | Code::PermissionDenied => {
                let remedy = "istiod gives a node the identities of its own pods, to accounts in CA_TRUSTED_NODE_ACCOUNTS: \
                              is hitless' account one, is the token this node's, and does a pod of that identity run here? \
                              istiod's log says which";
                IssueError::refused(id, reason, remedy)
            }
            Code::InvalidArgument | Code::Unimplemented | Code::NotFound | Code::FailedPrecondition => {
                IssueError::refused(id, reason, "see istiod's log: is it an Istio with the CA enabled?")
            }
            _ => IssueError::temporary(id, reason, "is istiod running, and can this node reach it?"),
        }
    }
}

impl Authority for Istio {
    fn name(&self) -> &str {
        &self.name
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a> {
        Box::pin(self.ask(id))
    }

    fn news(&self) -> Option<watch::Receiver<u64>> {
        None
    }
}

impl Roots {
    /// All that are trusted, with these.
    fn add(
        &mut self,
        roots: Vec<CertificateDer<'static>>,
        until: SystemTime,
        now: SystemTime,
    ) -> Vec<CertificateDer<'static>> {
        for root in roots {
            let known = self.0.entry(root.to_vec()).or_insert(until);
            *known = until.max(*known);
        }
        self.0.retain(|_, until| *until > now);
        self.0.keys().map(|root| root.clone().into()).collect()
    }
}

/// `MAX_WORKLOAD_CERT_TTL` is less than what was asked for.
fn too_long(status: &Status) -> bool {
    status.code() == Code::InvalidArgument && status.message().contains("TTL")
}

/// Chain and roots. The last text of the answer holds the roots, one or several.
pub(crate) fn split(answer: &[String]) -> Result<(Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>), String> {
    let [chain @ .., roots] = answer else { return Err("an empty answer".into()) };
    if chain.is_empty() {
        return Err("a chain without a root".into());
    }
    let mut certificates = Vec::new();
    for (place, text) in chain.iter().enumerate() {
        certificates.extend(pem::certificates(text.as_bytes(), &format!("certificate {} of its answer", place + 1))?);
    }
    Ok((certificates, pem::certificates(roots.as_bytes(), &"the root of its answer")?))
}

fn read(id: &SpiffeId, path: &Path, remedy: &'static str) -> Result<Zeroizing<Vec<u8>>, IssueError> {
    pem::read(path).map_err(|reason| IssueError::temporary(id, reason, remedy))
}

#[cfg(test)]
mod tests;
