//! The cluster as this node sees it: Kubernetes objects in, model events out. No I/O, no clock.
//!
//! Watches of different kinds run apart, so objects come in any order: an endpoint waits for the pod it names, and
//! leaves with it. Whatever the order, what is told ends as [`World::snapshot`] says. One changed endpoint costs its
//! slice, not its service; a pod's end is told before anything else is looked at.

mod pods;
mod services;
mod slices;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use self::{
    pods::Known,
    services::Service,
    slices::{Fleet, Slice},
};
use super::{
    names::Names,
    object::{self, Object as _},
};
use crate::{
    model::{Event, Key, Node, Object, Snapshot},
    registry::Problem,
};

/// namespace/name.
pub type Name = Arc<str>;

/// Which of the two watches of pods speaks: each pod is in one at a time, and moves when it is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    ThisNode,
    Others,
}

/// What follows from one word of the API server.
#[derive(Debug, Default)]
pub struct Taken {
    pub events: Vec<Event>,
    pub problems: Vec<Problem>,
}

#[derive(Debug)]
pub struct World {
    node: Name,
    zone: Option<String>,
    node_addresses: Vec<IpAddr>,
    /// Namespaces that are enrolled.
    ambient: HashSet<Name>,
    /// There is a mesh: who the pods of other nodes are counts too.
    mesh: bool,
    /// The one copy of each service account's name.
    accounts: HashSet<Name>,
    services: HashMap<Name, Service>,
    fleets: HashMap<Name, Fleet>,
    slices: HashMap<Name, Slice>,
    pods: HashMap<Name, Known>,
    /// Pods of this node.
    local: BTreeSet<Name>,
    /// The STOPSIGNAL of images that pods of this node run, where it has one; as they are asked for.
    images: HashMap<Name, Option<String>>,
    taken: Taken,
}

impl World {
    pub fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            zone: None,
            node_addresses: Vec::new(),
            ambient: HashSet::new(),
            mesh: false,
            accounts: HashSet::new(),
            services: HashMap::new(),
            fleets: HashMap::new(),
            slices: HashMap::new(),
            pods: HashMap::new(),
            local: BTreeSet::new(),
            images: HashMap::new(),
            taken: Taken::default(),
        }
    }

    pub fn with_mesh(self, mesh: bool) -> Self {
        Self { mesh, ..self }
    }

    /// What followed since this was last asked.
    pub fn take(&mut self) -> Taken {
        std::mem::take(&mut self.taken)
    }

    /// All that is told, at once.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            services: self.services.values().map(|service| self.declared(service)).collect(),
            pods: self.pods.keys().filter_map(|name| self.told(name)).collect(),
            ..Snapshot::default()
        };
        snapshot.services.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        snapshot.pods.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut names: Vec<_> = self.fleets.keys().collect();
        names.sort_unstable();
        for name in names {
            self.backends_of(name, &mut snapshot.backends);
        }
        snapshot.nodes.extend(self.own_node());
        snapshot
    }

    pub fn namespace(&mut self, object: &object::Namespace) {
        let name = object.meta().full_name();
        self.set_ambient(&name, object.metadata.labels.mode.as_deref() == Some(AMBIENT));
    }

    pub fn namespace_gone(&mut self, name: &str) {
        self.set_ambient(name, false);
    }

    fn set_ambient(&mut self, name: &str, ambient: bool) {
        if ambient == self.ambient.contains(name) {
            return;
        }
        let within = |pod: &&Name| pod.split_once('/').is_some_and(|(namespace, _)| namespace == name);
        let here = self.local.iter().filter(within);
        let others = self.mesh.then(|| self.pods.keys().filter(within).filter(|pod| !self.local.contains(*pod)));
        let pods = here.chain(others.into_iter().flatten());
        let before: Vec<_> = pods.map(|pod| (pod.clone(), self.told(pod))).collect();
        if ambient {
            self.ambient.insert(name.into());
        } else {
            self.ambient.remove(name);
        }
        for (pod, told) in before {
            self.tell_pod(&pod, told);
        }
    }

    /// This node; the watch is of no other.
    pub fn own(&mut self, object: &object::Node) {
        let zone = object.metadata.labels.zone.clone();
        if zone != self.zone {
            self.zone = zone;
            for name in self.fleets.keys().cloned().collect::<Vec<_>>() {
                if !self.retopologise(&name) {
                    self.retell_hinted(&name);
                }
            }
        }
        let addresses = object.addresses();
        if addresses != self.node_addresses {
            self.node_addresses = addresses;
            self.node_addresses_changed();
            if let Some(node) = self.own_node() {
                self.tell(Event::Upsert { object: Object::Node(node) });
            }
        }
    }

    fn own_node(&self) -> Option<Node> {
        let addresses = self.node_addresses.clone();
        (!addresses.is_empty()).then(|| Node { name: self.node.clone(), addresses })
    }

    /// What a list of pods does not name is gone. `named` has all names of the list, malformed objects' too.
    pub fn retain_pods(&mut self, named: &Names, scope: Scope) {
        let gone =
            |(name, known): (&Name, &Known)| (known.in_scope(scope) && !named.contains(name)).then(|| name.clone());
        for name in self.pods.iter().filter_map(gone).collect::<Vec<_>>() {
            self.pod_gone(&name, scope);
        }
    }

    pub fn retain_services(&mut self, named: &Names) {
        for name in missing(self.services.keys(), named) {
            self.service_gone(&name);
        }
    }

    pub fn retain_slices(&mut self, named: &Names) {
        for name in missing(self.slices.keys(), named) {
            self.slice_gone(&name);
        }
    }

    pub fn retain_namespaces(&mut self, named: &Names) {
        for name in missing(self.ambient.iter(), named) {
            self.namespace_gone(&name);
        }
    }

    fn tell(&mut self, event: Event) {
        self.taken.events.push(event);
    }

    fn forget(&mut self, object: Key) {
        self.tell(Event::Delete { object });
    }

    fn problem(&mut self, kind: &str, name: &str, reason: impl Into<String>) {
        self.taken.problems.push(Problem::new(format_args!("{kind} {name}"), reason));
    }
}

/// `istio.io/dataplane-mode`.
const AMBIENT: &str = "ambient";
const NONE: &str = "none";

fn missing<'a>(known: impl Iterator<Item = &'a Name>, named: &Names) -> Vec<Name> {
    known.filter(|name| !named.contains(name)).cloned().collect()
}

/// A port number that may be anything, as it was written by hand.
fn port_number(number: i64) -> Option<u16> {
    u16::try_from(number).ok().filter(|&number| number != 0)
}
