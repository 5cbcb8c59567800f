//! The desired state as it is held, in the words of a source: told again, it changes nothing.
//!
//! What the registry has no use for it does not keep: addresses, labels and service accounts of pods are not
//! told again here; who has a mesh adds them. A pod's process is told as the network namespace it was found by, a label that makes a
//! gateway as `gateway`, stop signals by number.

use std::net::IpAddr;

use dataplane_ebpf::abi::{POD_ENROLLED, POD_GATEWAY};
use nix::sys::signal::Signal;

use super::{Registry, address, problem::Name};
use crate::model::{Backend, Node, Object, Pod, Service, ServicePort};

/// What can be told at a time; by kind and name in their order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A service and the backends that name it, whether it is declared or not.
    Service(Name),
    Pod(Name),
    Node(Name),
}

impl Registry {
    /// All there is to tell: services, pods and nodes, in no order.
    pub fn parts(&self) -> Vec<Part> {
        let services = self.service_index.keys().cloned().map(Part::Service);
        let pods = self.pods.iter().filter(|(_, pod)| pod.declared).map(|(_, pod)| Part::Pod(pod.name.clone()));
        services.chain(pods).chain(self.nodes.keys().cloned().map(Part::Node)).collect()
    }

    /// The objects of a part as they are now; none when it has gone.
    pub fn told(&self, part: &Part) -> Vec<Object> {
        match part {
            Part::Service(name) => self.service_told(name),
            Part::Pod(name) => self.pod_told(name).into_iter().map(Object::Pod).collect(),
            Part::Node(name) => {
                let node = self
                    .nodes
                    .get(name)
                    .map(|(addresses, _)| Node { name: name.clone(), addresses: addresses.clone() });
                node.into_iter().map(Object::Node).collect()
            }
        }
    }

    fn service_told(&self, name: &Name) -> Vec<Object> {
        let Some(&index) = self.service_index.get(name) else { return Vec::new() };
        let record = &self.services[index];
        let ports = || record.ports.iter().map(|&port| &self.ports[port]);
        let mut objects = Vec::new();
        if record.declared {
            let declared = ports().filter_map(|port| {
                let (number, protocol) = port.declared?;
                Some(ServicePort { name: port.name.clone(), port: number, protocol, node_port: port.node_port })
            });
            objects.push(Object::Service(Service {
                name: name.clone(),
                addresses: record.addresses.clone(),
                ports: declared.collect(),
                affinity_seconds: record.affinity_s,
                headless: record.headless,
                node_addresses: record.node_addresses.clone(),
            }));
        }
        let mut backends: Vec<_> = ports()
            .flat_map(|port| port.objects.iter().map(move |(key, object)| (port, key, object)))
            .map(|(port, (addr, target_port), object)| Backend {
                service: name.clone(),
                port: port.name.clone(),
                address: address::ip(addr),
                target_port: *target_port,
                pod: self.pods.get(object.pod).map(|pod| pod.name.clone()),
                ready: object.ready,
                serving: object.serving,
                terminating: object.terminating,
                weight: object.weight,
            })
            .collect();
        let key =
            |backend: &Backend| -> (Name, IpAddr, u16) { (backend.port.clone(), backend.address, backend.target_port) };
        backends.sort_by_key(key);
        objects.extend(backends.into_iter().map(Object::Backend));
        objects
    }

    fn pod_told(&self, name: &Name) -> Option<Pod> {
        let pod = self.pod_at(name).map(|index| &self.pods[index]).filter(|pod| pod.declared)?;
        let has = |flag| pod.local.as_ref().is_some_and(|local| local.flags & flag != 0);
        Some(Pod {
            name: name.clone(),
            addresses: Vec::new(),
            netns: pod.local.as_ref().map(|local| local.netns.clone()),
            pid: None,
            // Of a pod that runs elsewhere nothing more is kept, and it does not matter.
            enrolled: pod.local.is_none() || has(POD_ENROLLED),
            gateway: has(POD_GATEWAY),
            labels: Default::default(),
            stop_signals: pod.local.as_ref().map_or_else(Vec::new, |local| numbers(local.stop_signals)),
            service_account: None,
            terminating: pod.terminating,
        })
    }
}

/// A set of signals; the default one is left out, as a person would.
fn numbers(signals: u64) -> Vec<String> {
    if signals == 1 << Signal::SIGTERM as u64 {
        return Vec::new();
    }
    (1..64).filter(|number| signals & 1 << number != 0).map(|number: u32| number.to_string()).collect()
}
