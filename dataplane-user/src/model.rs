//! The objects a source speaks of: services, backends, pods, nodes.
//!
//! The same types are the YAML file and the newline-delimited JSON stream.

use std::{cell::RefCell, collections::BTreeMap, fmt, net::IpAddr, path::PathBuf, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, de::Visitor};

/// The whole desired state: the file, or a relist on the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Snapshot {
    pub services: Vec<Service>,
    pub backends: Vec<Backend>,
    pub pods: Vec<Pod>,
    pub nodes: Vec<Node>,
}

impl FromIterator<Object> for Snapshot {
    fn from_iter<T: IntoIterator<Item = Object>>(objects: T) -> Self {
        let mut state = Self::default();
        for object in objects {
            match object {
                Object::Service(service) => state.services.push(service),
                Object::Backend(backend) => state.backends.push(backend),
                Object::Pod(pod) => state.pods.push(pod),
                Object::Node(node) => state.nodes.push(node),
            }
        }
        state
    }
}

/// One event on the stream: `{"op":"upsert","object":{"kind":"backend",…}}`,
/// `{"op":"delete","object":{"kind":"pod","name":"shop/web-1"}}`, `{"op":"sync","state":{…}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "camelCase", deny_unknown_fields)]
pub enum Event {
    Upsert { object: Object },
    Delete { object: Key },
    Sync { state: Snapshot },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase")]
pub enum Object {
    Service(Service),
    Backend(Backend),
    Pod(Pod),
    Node(Node),
}

/// What names an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", deny_unknown_fields)]
pub enum Key {
    Service {
        name: Arc<str>,
    },
    #[serde(rename_all = "camelCase")]
    Backend {
        service: Arc<str>,
        #[serde(default)]
        port: Arc<str>,
        address: IpAddr,
        target_port: u16,
    },
    Pod {
        name: Arc<str>,
    },
    Node {
        name: Arc<str>,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Service {
    /// namespace/name
    pub name: Arc<str>,
    /// Cluster IPs and external addresses of either family. Empty: reached only by gateways.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// ClientIP session affinity, seconds; 0 is none.
    #[serde(default)]
    pub affinity_seconds: u32,
    /// Headless: connections are never moved.
    #[serde(default)]
    pub headless: bool,
    /// This node's addresses, where the ports' `nodePort` are served.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServicePort {
    /// May be empty when the service has one port.
    #[serde(default)]
    pub name: Arc<str>,
    pub port: u16,
    #[serde(default)]
    pub protocol: Protocol,
    /// Its number at the service's `nodeAddresses` (NodePort).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Backend {
    #[serde(deserialize_with = "shared")]
    pub service: Arc<str>,
    /// The service port's name.
    #[serde(default = "empty", deserialize_with = "shared")]
    pub port: Arc<str>,
    pub address: IpAddr,
    pub target_port: u16,
    /// The pod behind it, namespace/name.
    #[serde(default)]
    pub pod: Option<Arc<str>>,
    #[serde(default = "yes")]
    pub ready: bool,
    #[serde(default = "yes")]
    pub serving: bool,
    #[serde(default)]
    pub terminating: bool,
    /// 1..=65535
    #[serde(default = "one")]
    pub weight: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Pod {
    /// namespace/name
    pub name: Arc<str>,
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Its network namespace, when it runs on this node.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// Instead of `netns`: any process of it.
    #[serde(default)]
    pub pid: Option<i32>,
    #[serde(default = "yes")]
    pub enrolled: bool,
    /// Picks pod addresses itself; so does a pod labelled `gateway.networking.k8s.io/gateway-name`.
    #[serde(default)]
    pub gateway: bool,
    #[serde(default)]
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Names or numbers; default TERM.
    #[serde(default)]
    pub stop_signals: Vec<String>,
    /// Part of its identity in the mesh; `None`: `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<Arc<str>>,
    /// It was deleted (deletionTimestamp): its backends leave every service at once.
    #[serde(default)]
    pub terminating: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Node {
    pub name: Arc<str>,
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// What follows the namespace in an object's name.
pub fn short_name(name: &str) -> &str {
    name.split_once('/').map_or(name, |(_, short)| short)
}

/// Label of the pods that implement a Gateway (Gateway API, GEP-1762).
pub const GATEWAY_LABEL: &str = "gateway.networking.k8s.io/gateway-name";

const fn yes() -> bool {
    true
}

const fn one() -> u16 {
    1
}

/// A name that the objects before it have too, more often than not: one allocation for all.
fn shared<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<str>, D::Error> {
    struct Name;

    impl Visitor<'_> for Name {
        type Value = Arc<str>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }

        fn visit_str<E>(self, text: &str) -> Result<Arc<str>, E> {
            Ok(LATEST.with_borrow_mut(|latest| {
                if let Some(known) = latest.iter().find(|known| ***known == *text) {
                    return known.clone();
                }
                latest.rotate_right(1);
                latest[0] = text.into();
                latest[0].clone()
            }))
        }
    }

    deserializer.deserialize_str(Name)
}

fn empty() -> Arc<str> {
    EMPTY.with(Arc::clone)
}

thread_local! {
    /// The last few names that were read.
    static LATEST: RefCell<[Arc<str>; 4]> = RefCell::new(std::array::from_fn(|_| empty()));
    static EMPTY: Arc<str> = Arc::from("");
}
