//! What the registry knows, for people: names instead of numbers.

use std::net::SocketAddr;

use dataplane_ebpf::abi::{Endpoint, POD_ENROLLED, ServiceId};
use serde::Serialize;

use super::{
    Registry, Section, address,
    address::Family,
    change::PodId,
    problem::{Name, backend_name},
};
use crate::{metrics::drains::About, model::Protocol};

/// How much there is of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    pub services: usize,
    pub frontends: usize,
    pub backends: usize,
    pub slots: usize,
    pub pods: usize,
    pub local_pods: usize,
    pub nodes: usize,
    /// Backend objects whose service port is not known (yet).
    pub waiting: usize,
}

/// A backend in one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    pub service: Name,
    pub port: Name,
    pub protocol: Protocol,
    pub frontends: Vec<SocketAddr>,
    /// None: the service has no backend of this family.
    pub backend: Option<BackendRow>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackendRow {
    pub id: u32,
    pub generation: u32,
    pub address: SocketAddr,
    /// None: in none, such as a backend that is not ready.
    pub section: Option<&'static str>,
    pub weight: u16,
    /// What the control plane says.
    pub control: &'static str,
    pub pod: Option<Name>,
    pub local: bool,
}

impl Registry {
    pub fn counts(&self) -> Counts {
        let waiting = self.ports.iter().flat_map(|(_, port)| port.objects.values());
        Counts {
            services: self.services.iter().filter(|(_, service)| service.declared).count(),
            frontends: self.frontends.total(),
            backends: self.backends.len(),
            slots: self.slots.total(),
            pods: self.pods.iter().filter(|(_, pod)| pod.declared).count(),
            local_pods: self.pods_by_id.len(),
            nodes: self.nodes.len(),
            waiting: waiting.filter(|object| object.backend == 0).count(),
        }
    }

    /// The services, by name.
    pub fn service_names(&self) -> Vec<Name> {
        let declared = self.services.iter().filter(|(_, record)| record.declared);
        let mut names: Vec<_> = declared.map(|(_, record)| record.name.clone()).collect();
        names.sort_unstable();
        names
    }

    /// Every backend of a service, by port and address.
    pub fn rows(&self, service: &str) -> Vec<Row> {
        let mut found = Vec::new();
        let Some(&service) = self.service_index.get(service) else { return found };
        let record = &self.services[service];
        let all_frontends = self.frontends_of(service);
        for &index in &record.ports {
            let port = &self.ports[index];
            let Some((_, protocol)) = port.declared else { continue };
            for family in Family::BOTH {
                let id = port.ids[family as usize];
                if id == 0 {
                    continue;
                }
                let frontends = all_frontends.iter().filter(|(of, at)| *of == index && Family::of(&at.addr) == family);
                let row = Row {
                    service: record.name.clone(),
                    port: port.name.clone(),
                    protocol,
                    frontends: frontends.map(|(_, at)| address::socket(at)).collect(),
                    backend: None,
                };
                let before = found.len();
                for object in port.objects.values() {
                    let of_family =
                        |physical: &super::backends::Physical| Family::of(&physical.value.at.addr) == family;
                    if object.backend != 0 && self.backends.get(object.backend).is_some_and(of_family) {
                        let backend = Some(self.backend_row(id, object));
                        found.push(Row { backend, ..row.clone() });
                    }
                }
                if found.len() == before {
                    found.push(row);
                }
            }
        }
        found.sort_by(|a, b| {
            let key = |row: &Row| (row.port.clone(), row.backend.as_ref().map(|b| b.address));
            key(a).cmp(&key(b))
        });
        found
    }

    fn backend_row(&self, service: ServiceId, object: &super::backends::Object) -> BackendRow {
        let physical = self.backends.get(object.backend).expect("an attached object's backend lives");
        let pod = self.pods.get(object.pod);
        let ends = object.terminating || pod.is_some_and(|pod| pod.terminating);
        BackendRow {
            id: object.backend,
            generation: physical.value.generation,
            address: address::socket(&physical.value.at),
            section: self.slots.place(service, object.backend).map(|section| match section {
                Section::Ready => "ready",
                Section::Terminating => "terminating",
            }),
            weight: object.weight,
            control: match (ends, object.ready, object.serving) {
                (true, _, true) => "terminating, serving",
                (true, _, false) => "terminating",
                (false, true, _) => "ready",
                (false, false, _) => "not ready",
            },
            pod: pod.map(|pod| pod.name.clone()),
            local: physical.value.pod != 0,
        }
    }

    /// A pod's services and the numbers of its backends.
    pub fn about_pod(&self, pod: &str) -> About {
        let mut about = About::default();
        let Some(index) = self.pod_at(pod) else { return about };
        for (port, key) in self.pods[index].objects.iter() {
            let Some(object) = self.ports[*port].objects.get(key) else { continue };
            if object.backend != 0 && !about.backends.contains(&object.backend) {
                about.backends.push(object.backend);
            }
            let service = self.services[self.ports[*port].service].name.to_string();
            if !about.services.contains(&service) {
                about.services.push(service);
            }
        }
        about
    }

    /// Does the control plane still call a backend of this pod ready?
    pub fn declared_ready(&self, pod: &str) -> bool {
        let Some(index) = self.pod_at(pod) else { return false };
        let mut objects = self.pods[index].objects.iter();
        objects.any(|(port, key)| {
            self.ports[*port].objects.get(key).is_some_and(|object| object.ready && !object.terminating)
        })
    }

    /// The pod that a backend object names.
    pub fn pod_of(&self, service: &str, port: &str, address: std::net::IpAddr, target_port: u16) -> Option<Name> {
        let port = self.port_index(service, port)?;
        let object = self.ports[port].objects.get(&(address::addr(address), target_port))?;
        self.pods.get(object.pod).map(|pod| pod.name.clone())
    }

    /// The name of a service of the kernel; a gateway group goes by its services.
    pub fn service_label(&self, id: ServiceId) -> Option<String> {
        if let Some(&(port, _)) = self.service_ports.get(&id) {
            let port = &self.ports[port];
            let colon = if port.name.is_empty() { "" } else { ":" };
            return Some(format!("{}{colon}{}", self.services[port.service].name, port.name));
        }
        let set = self.group_set(id)?;
        let names: Vec<_> = set.iter().filter_map(|&id| self.service_label(id)).collect();
        Some(names.join(" & "))
    }

    pub fn backend_label(&self, id: u32) -> Option<SocketAddr> {
        self.backends.get(id).map(|physical| address::socket(&physical.value.at))
    }

    pub fn pod_label(&self, id: PodId) -> Option<Name> {
        if let Some(host) = &self.host
            && host.pod == id
        {
            return Some(host.name.clone());
        }
        self.pods_by_id.get(&id).map(|&index| self.pods[index].name.clone())
    }

    /// The name of whatever a change is about, for a message that it was refused.
    pub fn object_at(&self, at: &Endpoint) -> String {
        let socket = address::socket(at);
        match self.frontends.claims(at).first() {
            Some(claim) => format!("service {} at {socket}", claim.by.0),
            None => backend_name("any service", "", socket.ip(), socket.port()),
        }
    }

    /// Are these the numbers of somebody else, at the end of the maps?
    pub fn is_foreign(&self, service: ServiceId, backend: u32) -> bool {
        service >= self.limits.services || backend >= self.limits.backends
    }

    /// The pods of this node, and the node itself when it is enrolled.
    pub fn local_pods(&self) -> impl Iterator<Item = PodId> {
        self.pods_by_id.keys().copied().chain(self.host.iter().map(|host| host.pod))
    }

    /// Are a pod's connections to be ours? One that no longer is stays local for those that it made before.
    pub fn enrolls(&self, id: PodId) -> bool {
        let pod = self.pods_by_id.get(&id).and_then(|&index| self.pods[index].local.as_ref());
        let flags =
            pod.map(|pod| pod.flags).or(self.host.as_ref().filter(|host| host.pod == id).map(|host| host.flags));
        flags.is_some_and(|flags| flags & POD_ENROLLED != 0)
    }

    /// A pod's backends beyond the first `skip` of its chain, which the kernel reached itself.
    pub fn chain(&self, pod: PodId, skip: usize) -> Vec<(u32, u32)> {
        let mut found = Vec::new();
        let head = self.pods_by_id.get(&pod).map_or(0, |&index| self.pods[index].first_backend);
        let mut next = head;
        while let Some(physical) = self.backends.get(next) {
            found.push((next, physical.value.generation));
            next = physical.value.next_in_pod;
        }
        found.split_off(skip.min(found.len()))
    }
}
