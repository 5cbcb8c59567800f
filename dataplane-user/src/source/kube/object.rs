//! Kubernetes objects, as much of them as hitless looks at; the rest of their JSON is passed over unread.
//!
//! Field names and meanings are those of the API (core/v1, discovery.k8s.io/v1). What the API server would have
//! refused may come all the same: numbers are read wide and judged by [`super::world`].

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde::{Deserialize, Deserializer};

/// Which kind of object a type is.
pub trait Object: for<'de> Deserialize<'de> + Send + 'static {
    /// As `kubectl` names it.
    const KIND: &'static str;
    /// Of the collection, without a leading slash.
    const PATH: &'static str;

    /// What its end means cannot wait until all of it is read.
    const ENDS: bool = false;

    /// What is read of its labels.
    type Labels;

    fn meta(&self) -> &Meta<Self::Labels>;
}

/// Who an object is; all that a malformed one may have.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase", bound = "L: Deserialize<'de> + Default")]
pub struct Meta<L = Labels> {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub resource_version: String,
    /// RFC 3339; only whether it is there counts.
    pub deletion_timestamp: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub labels: L,
    #[serde(deserialize_with = "or_default")]
    pub annotations: Annotations,
}

/// The labels that mean something here.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct Labels {
    #[serde(rename = "istio.io/dataplane-mode")]
    pub mode: Option<String>,
    #[serde(rename = "kubernetes.io/service-name")]
    pub service: Option<String>,
    #[serde(rename = "topology.kubernetes.io/zone")]
    pub zone: Option<String>,
}

/// `istio.io/dataplane-mode`
pub const MODE_LABEL: &str = "istio.io/dataplane-mode";

/// All labels of a pod of this node: what policies select by.
pub type AllLabels = BTreeMap<Arc<str>, Arc<str>>;

/// The annotations that mean something here.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct Annotations {
    /// `"true"`: the pod picks pod addresses itself.
    #[serde(rename = "hitless.io/gateway")]
    pub gateway: Option<String>,
    /// Names or numbers, joined by commas: instead of what its images call STOPSIGNAL.
    #[serde(rename = "hitless.io/stop-signals")]
    pub stop_signals: Option<String>,
    /// Of a static pod's mirror: the uid that the kubelet knows it by.
    #[serde(rename = "kubernetes.io/config.hash")]
    pub config_hash: Option<String>,
}

impl<L> Meta<L> {
    /// namespace/name, or the name of what is in no namespace.
    pub fn full_name(&self) -> Arc<str> {
        if self.namespace.is_empty() {
            return self.name.as_str().into();
        }
        format!("{}/{}", self.namespace, self.name).into()
    }
}

/// `null` is what the API means by "not set".
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

macro_rules! object {
    ($ty:ident, $kind:literal, $path:literal) => {
        object!($ty, $kind, $path, Labels, false);
    };
    ($ty:ident, $kind:literal, $path:literal, $labels:ty, $ends:literal) => {
        impl Object for $ty {
            const KIND: &'static str = $kind;
            const PATH: &'static str = $path;
            const ENDS: bool = $ends;
            type Labels = $labels;

            fn meta(&self) -> &Meta<$labels> {
                &self.metadata
            }
        }
    };
}

object!(Pod, "pod", "api/v1/pods", AllLabels, true);
object!(OtherPod, "pod", "api/v1/pods", Labels, true);
object!(Service, "service", "api/v1/services");
object!(Namespace, "namespace", "api/v1/namespaces");
object!(Node, "node", "api/v1/nodes");
object!(EndpointSlice, "endpointslice", "apis/discovery.k8s.io/v1/endpointslices");

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Pod {
    pub metadata: Meta<AllLabels>,
    #[serde(deserialize_with = "or_default")]
    pub spec: PodSpec,
    #[serde(deserialize_with = "or_default")]
    pub status: PodStatus,
}

/// A pod of another node: what counts of it is whether it ends, and who it is in the mesh.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct OtherPod {
    pub metadata: Meta,
    #[serde(deserialize_with = "or_default")]
    pub spec: OtherSpec,
    #[serde(deserialize_with = "or_default")]
    pub status: OtherStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct OtherSpec {
    pub service_account_name: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub host_network: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct OtherStatus {
    pub phase: Option<String>,
    #[serde(rename = "podIPs", deserialize_with = "or_default")]
    pub pod_ips: Vec<PodIp>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodSpec {
    pub node_name: Option<String>,
    pub service_account_name: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub host_network: bool,
    #[serde(deserialize_with = "or_default")]
    pub containers: Vec<Container>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Container {
    pub name: String,
    #[serde(deserialize_with = "or_default")]
    pub lifecycle: Lifecycle,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Lifecycle {
    /// Since Kubernetes 1.33 (KEP-4960).
    pub stop_signal: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodStatus {
    pub phase: Option<String>,
    #[serde(rename = "podIPs", deserialize_with = "or_default")]
    pub pod_ips: Vec<PodIp>,
    #[serde(deserialize_with = "or_default")]
    pub container_statuses: Vec<ContainerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ContainerStatus {
    pub name: String,
    /// As the container runtime knows it; empty until it runs.
    #[serde(rename = "imageID")]
    pub image_id: String,
    /// The one in force, whoever named it (KEP-4960).
    pub stop_signal: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodIp {
    pub ip: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    pub metadata: Meta,
    #[serde(deserialize_with = "or_default")]
    pub spec: ServiceSpec,
    #[serde(deserialize_with = "or_default")]
    pub status: ServiceStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceSpec {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs", deserialize_with = "or_default")]
    pub cluster_ips: Vec<String>,
    #[serde(rename = "externalIPs", deserialize_with = "or_default")]
    pub external_ips: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub ports: Vec<ServicePort>,
    pub session_affinity: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub session_affinity_config: AffinityConfig,
    pub internal_traffic_policy: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServicePort {
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    pub port: i64,
    pub protocol: Option<String>,
    pub node_port: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct AffinityConfig {
    #[serde(rename = "clientIP", deserialize_with = "or_default")]
    pub client_ip: ClientIp,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClientIp {
    pub timeout_seconds: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceStatus {
    #[serde(deserialize_with = "or_default")]
    pub load_balancer: LoadBalancer,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct LoadBalancer {
    #[serde(deserialize_with = "or_default")]
    pub ingress: Vec<Ingress>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Ingress {
    pub ip: Option<String>,
    /// `Proxy`: the balancer wants to see the connections itself (KEP-1860).
    pub ip_mode: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndpointSlice {
    pub metadata: Meta,
    /// `IPv4`, `IPv6`, `FQDN`.
    pub address_type: String,
    #[serde(deserialize_with = "or_default")]
    pub endpoints: Vec<Endpoint>,
    #[serde(deserialize_with = "or_default")]
    pub ports: Vec<EndpointPort>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Endpoint {
    #[serde(deserialize_with = "or_default")]
    pub addresses: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub conditions: Conditions,
    pub target_ref: Option<TargetRef>,
    pub node_name: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub hints: Hints,
}

/// Unset means: ready, serving as it is ready, not terminating.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Conditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    pub kind: String,
    pub name: String,
    pub namespace: String,
    pub uid: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hints {
    #[serde(deserialize_with = "or_default")]
    pub for_zones: Vec<Hint>,
    #[serde(deserialize_with = "or_default")]
    pub for_nodes: Vec<Hint>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Hint {
    pub name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointPort {
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    /// Unset: all ports; nothing to translate to.
    pub port: Option<i64>,
    pub protocol: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    pub metadata: Meta,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Node {
    pub metadata: Meta,
    #[serde(deserialize_with = "or_default")]
    pub status: NodeStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    #[serde(deserialize_with = "or_default")]
    pub addresses: Vec<NodeAddress>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    #[serde(rename = "type")]
    pub kind: String,
    pub address: String,
}

impl Node {
    /// Addresses that processes connect to.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let internal = self.status.addresses.iter().filter(|address| address.kind != "Hostname");
        let mut found: Vec<IpAddr> = internal.filter_map(|address| address.address.parse().ok()).collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}
