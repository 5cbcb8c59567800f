//! What the agent is told about the mesh: whether it tunnels, by which identities, under which policies.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::bail;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::{Span, Switch};
use crate::{
    identity::{Source as IdentitySource, istio::IstioPlaces},
    policy::ROOT_NAMESPACE,
};

/// As `Options`, for the mesh.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MeshOptions {
    /// Carry connections between enrolled pods in mutual TLS (HBONE, as Istio ambient does) [default: off]
    #[arg(long, env = "HITLESS_MTLS", value_name = "WHEN", num_args = 0..=1, default_missing_value = "on")]
    pub mtls: Option<Switch>,

    /// The mesh's trust domain, the first part of every identity [default: cluster.local]
    #[arg(long, env = "HITLESS_TRUST_DOMAIN", value_name = "DOMAIN")]
    pub trust_domain: Option<String>,

    /// Where the pods' certificates come from: ca:DIR (a certificate authority of your own, as `hitless ca init` makes
    /// one), files:DIR (certificates that somebody else writes), spiffe:SOCKET (a SPIFFE agent) or
    /// istio:https://HOST:PORT (istiod)
    #[arg(long, env = "HITLESS_IDENTITY", value_name = "SOURCE")]
    pub identity: Option<IdentitySource>,

    /// With istio: whom to believe to be istiod, PEM; read again for each certificate
    /// [default: /var/run/secrets/istio/root-cert.pem]
    #[arg(long, env = "HITLESS_ISTIO_CA_ROOT", value_name = "FILE")]
    pub istio_ca_root: Option<PathBuf>,

    /// With istio: a service account token of the audience istio-ca; read again for each certificate
    /// [default: /var/run/secrets/tokens/istio-token]
    #[arg(long, env = "HITLESS_ISTIO_TOKEN", value_name = "FILE")]
    pub istio_token: Option<PathBuf>,

    /// Istio's name of this cluster, as istiod, metrics, dumps and peers are told it [default: Kubernetes]
    #[arg(long, env = "HITLESS_CLUSTER_ID", value_name = "NAME")]
    pub cluster_id: Option<String>,

    /// Istio's AuthorizationPolicy and PeerAuthentication objects as YAML: a file or a directory, watched
    #[arg(long, env = "HITLESS_POLICIES", value_name = "PATH")]
    pub policies: Option<PathBuf>,

    /// The namespace whose policies count for the whole mesh [default: istio-system]
    #[arg(long, env = "HITLESS_ROOT_NAMESPACE", value_name = "NAMESPACE")]
    pub root_namespace: Option<String>,

    /// Connections between pods of one node go through TLS too, instead of being carried under the node's own proof
    /// [default: off]
    #[arg(long, env = "HITLESS_LOCAL_TLS", value_name = "WHEN")]
    pub local_tls: Option<Switch>,

    /// How long a stopping agent waits for the connections that it carries to end [default: 10s]
    #[arg(long, env = "HITLESS_TUNNEL_DRAIN", value_name = "DURATION")]
    pub tunnel_drain: Option<Span>,

    /// Threads that carry connections; 0: one per CPU [default: 0]
    #[arg(long, env = "HITLESS_TUNNEL_WORKERS", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub tunnel_workers: Option<u32>,
}

const DRAIN: Duration = Duration::from_secs(10);

/// Everything filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshSettings {
    pub trust_domain: Arc<str>,
    pub identity: IdentitySource,
    pub istio: IstioPlaces,
    pub policies: Option<PathBuf>,
    pub root_namespace: String,
    pub local_tls: bool,
    pub drain: Duration,
    pub workers: usize,
}

impl MeshOptions {
    /// `self` wins, field by field.
    pub fn over(self, under: Self) -> Self {
        prefer!(
            self,
            under,
            mtls,
            trust_domain,
            identity,
            istio_ca_root,
            istio_token,
            cluster_id,
            policies,
            root_namespace,
            local_tls,
            tunnel_drain,
            tunnel_workers
        )
    }

    /// None: no mesh.
    pub fn resolve(self) -> anyhow::Result<Option<MeshSettings>> {
        if self.mtls.unwrap_or(Switch::Off) == Switch::Off {
            return Ok(None);
        }
        let Some(identity) = self.identity else {
            bail!(
                "mtls is on and identity is not set: give --identity ca:DIR (`hitless ca init` makes one), \
                 files:DIR, spiffe:SOCKET or istio:https://HOST:PORT"
            )
        };
        let trust_domain = self.trust_domain.unwrap_or_else(|| "cluster.local".into());
        if let Err(bad) = crate::identity::SpiffeId::new(&trust_domain, "a", "a") {
            bail!("trust-domain is {trust_domain:?}: {bad}");
        }
        let istios = IstioPlaces::default();
        let istio = IstioPlaces {
            root: self.istio_ca_root.unwrap_or(istios.root),
            token: self.istio_token.unwrap_or(istios.token),
            cluster_id: self.cluster_id.unwrap_or(istios.cluster_id),
        };
        if istio.cluster_id.is_empty() || !istio.cluster_id.bytes().all(|byte| byte.is_ascii_graphic()) {
            bail!("cluster-id is {:?}: it is letters, digits and signs, as istiod's CLUSTER_ID is", istio.cluster_id);
        }
        let workers = self.tunnel_workers.unwrap_or(0) as usize;
        Ok(Some(MeshSettings {
            trust_domain: trust_domain.into(),
            identity,
            istio,
            policies: self.policies,
            root_namespace: self.root_namespace.unwrap_or_else(|| ROOT_NAMESPACE.into()),
            local_tls: self.local_tls.unwrap_or(Switch::Off) == Switch::On,
            drain: self.tunnel_drain.map_or(DRAIN, |span| span.0),
            workers: if workers == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { workers },
        }))
    }
}
