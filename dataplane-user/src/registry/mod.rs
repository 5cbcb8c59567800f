//! The registry: a pure state machine from source events to map changes. No I/O, no clock.
//!
//! Any order of events and relists that ends in the same desired state ends in the same kernel
//! state, up to numbers and the order of slots. Objects may arrive in any order: what refers to
//! something unknown waits for it. One event about one backend costs a bounded number of changes
//! in [`Registry::apply`]; what grows with a service's size waits for [`Registry::settle`].

pub mod address;
mod backends;
mod boot;
pub mod change;
pub mod dump;
mod frontends;
mod groups;
mod hash;
mod ids;
mod pods;
pub mod problem;
pub mod seed;
mod services;
mod slots;
mod sync;
pub mod view;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use dataplane_ebpf::abi;

use self::{
    address::Family,
    backends::Backends,
    boot::Boot,
    change::{Change, PodId},
    frontends::Frontends,
    groups::Groups,
    hash::{HashMap, Numbers},
    ids::Slab,
    pods::Pod,
    problem::{Name, check_backend, check_pod, check_service},
    services::{Port, Service},
    slots::Slots,
};
pub use self::{problem::Problem, seed::Seed, slots::Section};
use crate::model::{Event, Key, Node, Object};

/// Index of a record that other records refer to.
type Index = u32;
const NONE: Index = Index::MAX;

/// How much the maps hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub frontends: u32,
    pub services: u32,
    pub slots: u32,
    pub backends: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frontends: abi::MAX_FRONTENDS,
            services: abi::MAX_SERVICES,
            slots: abi::MAX_SLOTS,
            backends: abi::MAX_BACKENDS,
        }
    }
}

/// Desired state, and what the kernel holds of it.
#[derive(Debug)]
pub struct Registry {
    service_index: HashMap<Name, Index>,
    services: Slab<Service>,
    ports: Slab<Port>,
    /// By name.
    pod_index: Numbers,
    pods: Slab<Pod>,
    pods_by_id: HashMap<PodId, Index>,
    service_ports: HashMap<abi::ServiceId, (Index, Family)>,
    last_pod: PodId,
    nodes: BTreeMap<Name, (Vec<IpAddr>, u32)>,
    host: Option<std::sync::Arc<change::Enrollment>>,

    slots: Slots,
    frontends: Frontends,
    backends: Backends,
    groups: Groups,

    /// Until the first sync: what an earlier agent left, to be compared with.
    boot: Option<Box<Boot>>,
    synced: bool,
    /// Marks what a sync has seen.
    epoch: u32,
    limits: Limits,
    /// Enrolled pods are in the mesh.
    mesh: bool,
    /// A pod whose terms are told once, at the end of its change.
    muted: Index,
    out: Vec<Change>,
    problems: Vec<Problem>,
}

impl Registry {
    pub fn new(seed: Seed) -> Self {
        Self::with_limits(seed, Limits::default())
    }

    pub fn with_limits(seed: Seed, limits: Limits) -> Self {
        let seed = seed.within(&limits);
        let services: HashSet<_> = seed.services.iter().map(|service| service.id).collect();
        Self {
            service_index: HashMap::default(),
            services: Slab::default(),
            ports: Slab::default(),
            pod_index: Numbers::default(),
            pods: Slab::default(),
            pods_by_id: HashMap::default(),
            service_ports: HashMap::default(),
            last_pod: seed.last_pod,
            nodes: BTreeMap::new(),
            host: None,
            slots: Slots::new(limits.services, limits.slots, &services),
            frontends: Frontends::new(limits.frontends),
            backends: Backends::new(limits.backends, &seed),
            groups: Groups::default(),
            boot: Some(Box::new(Boot::new(seed))),
            synced: false,
            epoch: 0,
            limits,
            mesh: false,
            muted: NONE,
            out: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// Before the first event: enrolled pods are in the mesh ([`abi::POD_MESH`]).
    pub fn with_mesh(self, mesh: bool) -> Self {
        Self { mesh, ..self }
    }

    /// The number of a pod, if it runs here.
    pub fn pod_id(&self, name: &str) -> Option<PodId> {
        let index = self.pod_at(name)?;
        Some(self.pods[index].local.as_ref()?.id)
    }

    /// Takes an event in and appends what must be written for it, most urgent first. An object
    /// that cannot be is skipped and named in the answer; the rest goes on.
    pub fn apply(&mut self, event: Event, out: &mut Vec<Change>) -> Vec<Problem> {
        let sync = matches!(event, Event::Sync { .. });
        if !sync && self.boot.as_ref().is_some_and(|boot| boot.is_empty()) {
            self.boot = None;
        }
        match event {
            Event::Upsert { object } => self.upsert(object),
            Event::Delete { object } => self.delete(object),
            Event::Sync { state } => self.sync(state),
        }
        if self.boot.is_some() {
            // Nothing is written before the first sync has told all that is still wanted.
            self.out.clear();
            if sync {
                self.settle_groups();
                self.out = Vec::new();
                self.reconcile();
            }
        }
        if out.is_empty() {
            // Not copied: a first sync is hundreds of thousands.
            std::mem::swap(out, &mut self.out);
        } else {
            out.append(&mut self.out);
        }
        std::mem::take(&mut self.problems)
    }

    /// Does what [`Registry::apply`] left over: to be called once its changes were written.
    pub fn settle(&mut self, out: &mut Vec<Change>) -> Vec<Problem> {
        if self.boot.is_none() {
            self.settle_groups();
            out.append(&mut self.out);
        }
        std::mem::take(&mut self.problems)
    }

    /// Was the whole desired state told once?
    pub fn synced(&self) -> bool {
        self.synced
    }

    fn upsert(&mut self, object: Object) {
        match object {
            Object::Service(service) => match check_service(&service) {
                Ok(()) => {
                    let index = self.service_named(&service.name);
                    self.declare_service(index, service);
                    self.report_contested(index);
                }
                Err(reason) => self.problem(problem::service_name(&service.name), reason),
            },
            Object::Backend(backend) => match check_backend(&backend) {
                Ok(()) => self.upsert_backend(backend),
                Err(reason) => {
                    let name =
                        problem::backend_name(&backend.service, &backend.port, backend.address, backend.target_port);
                    self.problem(name, reason);
                }
            },
            Object::Pod(pod) => match check_pod(&pod) {
                Ok(()) => self.declare_pod(pod),
                Err(reason) => self.problem(problem::pod_name(&pod.name), reason),
            },
            Object::Node(node) => self.declare_node(node),
        }
    }

    fn delete(&mut self, key: Key) {
        match key {
            Key::Service { name } => {
                if let Some(&index) = self.service_index.get(&name) {
                    self.undeclare_service(index);
                }
            }
            Key::Backend { service, port, address, target_port } => {
                if let Some(port) = self.port_index(&service, &port) {
                    self.delete_object(port, (address::addr(address), target_port));
                }
            }
            Key::Pod { name } => {
                if let Some(index) = self.pod_at(&name) {
                    self.delete_pod(index);
                }
            }
            Key::Node { name } => {
                self.nodes.remove(&name);
            }
        }
    }

    fn declare_node(&mut self, node: Node) {
        self.nodes.insert(node.name, (node.addresses, self.epoch));
    }

    fn problem(&mut self, object: String, reason: impl Into<String>) {
        self.problems.push(Problem::new(object, reason));
    }

    fn full(&mut self, map: &str, setting: &str, object: &str) {
        let Limits { frontends, services, slots, backends } = self.limits;
        let size = match map {
            "FRONTENDS" => frontends,
            "SERVICES" => services,
            "SLOTS" => slots,
            _ => backends,
        };
        let reason = format!("map {map} is full ({size} elements): raise {setting}; what is in force stays");
        self.problem(object.into(), reason);
    }
}
