//! Services: their ports, the numbers these have in the kernel, and their frontends.

use std::{collections::HashSet, net::IpAddr};

use dataplane_ebpf::abi::{Endpoint, SERVICE_PINNED, ServiceId};

use super::{
    Index, Registry,
    address::{self, Family},
    backends::{Object, ObjectKey},
    frontends::{Claim, Claimed},
    hash::HashMap,
    problem::{Name, service_name},
};
use crate::model::{self, Protocol};

/// A service that was declared, or that a backend names.
#[derive(Debug)]
pub(super) struct Service {
    pub name: Name,
    pub declared: bool,
    pub addresses: Vec<IpAddr>,
    pub node_addresses: Vec<IpAddr>,
    pub affinity_s: u32,
    pub headless: bool,
    pub ports: Vec<Index>,
    pub seen: u32,
}

/// A service's port, declared or named by a backend. Each address family of it that has a
/// frontend or a backend is a service in the kernel.
#[derive(Debug)]
pub(super) struct Port {
    pub service: Index,
    pub name: Name,
    pub declared: Option<(u16, Protocol)>,
    pub node_port: Option<u16>,
    /// By [`Family`]; 0 is none.
    pub ids: [ServiceId; 2],
    /// How many objects are in force, by family.
    pub attached: [u32; 2],
    pub objects: HashMap<ObjectKey, Object>,
}

impl Service {
    fn flags(&self) -> u32 {
        if self.headless { SERVICE_PINNED } else { 0 }
    }

    pub(super) fn serves(&self, family: Family) -> bool {
        self.addresses.is_empty() || self.headless || self.has_address(family)
    }

    fn has_address(&self, family: Family) -> bool {
        self.addresses.iter().any(|&ip| Family::of(&address::addr(ip)) == family)
    }
}

impl Registry {
    pub(super) fn declare_service(&mut self, index: Index, new: model::Service) {
        let before: HashSet<_> = self.frontends_of(index).into_iter().collect();

        let record = &mut self.services[index];
        record.declared = true;
        record.seen = self.epoch;
        record.addresses = new.addresses.iter().map(IpAddr::to_canonical).collect();
        record.node_addresses = new.node_addresses.iter().map(IpAddr::to_canonical).collect();
        record.affinity_s = new.affinity_seconds;
        let pinning = std::mem::replace(&mut record.headless, new.headless) != new.headless;

        // Ports that go, or are another protocol's now.
        for port in self.services[index].ports.clone() {
            let wanted = new.ports.iter().find(|wanted| wanted.name == self.ports[port].name);
            if let Some((_, protocol)) = self.ports[port].declared
                && wanted.is_none_or(|wanted| wanted.protocol != protocol)
            {
                let gone = before.iter().filter(|(of, _)| *of == port);
                for (_, at) in gone {
                    self.release_frontend(port, *at);
                }
                self.detach_all(port, |_| true);
                self.ports[port].declared = None;
                self.release_port(port);
            }
        }
        for wanted in &new.ports {
            let port = self.port_of(index, &wanted.name);
            self.ports[port].declared = Some((wanted.port, wanted.protocol));
            self.ports[port].node_port = wanted.node_port;
        }

        let after: HashSet<_> = self.frontends_of(index).into_iter().collect();
        for (port, at) in before.difference(&after) {
            self.release_frontend(*port, *at);
        }
        for port in self.services[index].ports.clone() {
            if self.ports[port].declared.is_none() {
                continue;
            }
            let unserved: Vec<_> =
                Family::BOTH.into_iter().filter(|&family| !self.services[index].serves(family)).collect();
            self.detach_all(port, |key| unserved.contains(&Family::of(&key.0)));
            let mut waiting = self.ports[port].objects.iter().filter(|(_, object)| object.backend == 0);
            if waiting.next().is_some() {
                let mut keys: Vec<_> = self.ports[port].objects.keys().copied().collect();
                keys.retain(|key| self.ports[port].objects[key].backend == 0 && self.wanted(port, key));
                for key in keys {
                    self.attach(port, key);
                }
            }
            let (flags, affinity_s) = (self.services[index].flags(), self.services[index].affinity_s);
            for id in self.ports[port].ids {
                if id != 0 {
                    self.slots.set_terms(id, flags, affinity_s, &mut self.out);
                }
            }
            if pinning {
                self.unsettle_port(port);
            }
        }
        // Frontends last: whoever finds the service finds its backends.
        let mut added: Vec<_> = after.iter().filter(|claim| !self.claimed(claim)).copied().collect();
        added.sort_unstable();
        for (port, at) in added {
            self.claim_frontend(port, at);
        }
        for port in self.services[index].ports.clone() {
            self.release_port(port);
            self.collect_port(port);
        }
    }

    pub(super) fn undeclare_service(&mut self, index: Index) {
        for (port, at) in self.frontends_of(index) {
            self.release_frontend(port, at);
        }
        let record = &mut self.services[index];
        record.declared = false;
        record.addresses.clear();
        record.node_addresses.clear();
        for port in self.services[index].ports.clone() {
            self.detach_all(port, |_| true);
            self.ports[port].declared = None;
            self.release_port(port);
        }
        for port in self.services[index].ports.clone() {
            self.collect_port(port);
        }
        self.collect_service(index);
    }

    /// May this object of the port be in force?
    pub(super) fn wanted(&self, port: Index, key: &ObjectKey) -> bool {
        let port = &self.ports[port];
        let service = &self.services[port.service];
        service.declared && port.declared.is_some() && service.serves(Family::of(&key.0))
    }

    /// Gives a port its number for a family. False: `SERVICES` is full.
    pub(super) fn ensure_service(&mut self, port: Index, family: Family) -> bool {
        let record = &self.ports[port];
        if record.ids[family as usize] != 0 {
            return true;
        }
        let service = &self.services[record.service];
        let (flags, affinity_s) = (service.flags(), service.affinity_s);
        let adopted = self.boot.is_some().then(|| self.frontends_of(record.service)).and_then(|frontends| {
            let mut mine = frontends.iter().filter(|(of, at)| *of == port && Family::of(&at.addr) == family);
            let boot = self.boot.as_mut()?;
            mine.find_map(|(_, at)| boot.take_service(at))
        });
        let id = match adopted {
            Some(id) => {
                self.slots.create_as(id, flags, affinity_s, &mut self.out);
                id
            }
            None => match self.slots.create(flags, affinity_s, &mut self.out) {
                Some(id) => id,
                None => {
                    let name = service_name(&self.services[self.ports[port].service].name);
                    self.full("SERVICES", "sizes.services", &name);
                    return false;
                }
            },
        };
        self.ports[port].ids[family as usize] = id;
        self.service_ports.insert(id, (port, family));
        true
    }

    /// Gives a port's number back once it has neither frontend nor backend.
    pub(super) fn release_service(&mut self, port: Index, family: Family) {
        let record = &self.ports[port];
        let id = record.ids[family as usize];
        let service = &self.services[record.service];
        let fronted = service.declared && record.declared.is_some() && service.has_address(family);
        if id != 0 && record.attached[family as usize] == 0 && !fronted {
            self.drop_groups_of(id);
            self.slots.delete(id, &mut self.out);
            self.service_ports.remove(&id);
            self.ports[port].ids[family as usize] = 0;
        }
    }

    fn release_port(&mut self, port: Index) {
        for family in Family::BOTH {
            self.release_service(port, family);
        }
    }

    fn detach_all(&mut self, port: Index, which: impl Fn(&ObjectKey) -> bool) {
        let objects = self.ports[port].objects.iter();
        let numbers: Vec<_> = objects
            .filter(|(key, object)| object.backend != 0 && which(key))
            .map(|(_, object)| object.backend)
            .collect();
        for number in numbers {
            self.detach(number, &[port]);
        }
    }

    fn unsettle_port(&mut self, port: Index) {
        for object in self.ports[port].objects.values() {
            if object.backend != 0 {
                self.groups.unsettle(object.backend);
            }
        }
    }

    /// The backends in a service of the kernel that is no group.
    pub(super) fn backends_in(&self, id: ServiceId) -> Vec<u32> {
        let Some(&(port, family)) = self.service_ports.get(&id) else { return Vec::new() };
        let objects = self.ports[port].objects.iter();
        objects
            .filter(|(key, object)| object.backend != 0 && Family::of(&key.0) == family)
            .map(|(_, object)| object.backend)
            .collect()
    }

    pub(super) fn frontends_of(&self, index: Index) -> Vec<(Index, Endpoint)> {
        let service = &self.services[index];
        if !service.declared {
            return Vec::new();
        }
        // A family that the service itself has not is not served at the node either.
        let at_node: Vec<_> =
            service.node_addresses.iter().filter(|&&ip| service.has_address(Family::of(&address::addr(ip)))).collect();
        let mut found = Vec::new();
        for &port in &service.ports {
            let Some((number, protocol)) = self.ports[port].declared else { continue };
            found.extend(service.addresses.iter().map(|&ip| (port, address::endpoint(ip, number, protocol))));
            if let Some(number) = self.ports[port].node_port {
                found.extend(at_node.iter().map(|&&ip| (port, address::endpoint(ip, number, protocol))));
            }
        }
        found
    }

    fn claimed(&self, (port, at): &(Index, Endpoint)) -> bool {
        let id = self.ports[*port].ids[Family::of(&at.addr) as usize];
        id != 0 && self.frontends.claims(at).iter().any(|claim| claim.service == id)
    }

    fn claim_frontend(&mut self, port: Index, at: Endpoint) {
        let family = Family::of(&at.addr);
        if !self.ensure_service(port, family) {
            return;
        }
        let record = &self.ports[port];
        let by = (self.services[record.service].name.clone(), record.name.clone());
        let claim = Claim { by, service: record.ids[family as usize] };
        if self.frontends.claim(at, claim, &mut self.out) == Claimed::Full {
            let name = service_name(&self.services[self.ports[port].service].name);
            self.full("FRONTENDS", "sizes.frontends", &name);
        }
    }

    fn release_frontend(&mut self, port: Index, at: Endpoint) {
        let id = self.ports[port].ids[Family::of(&at.addr) as usize];
        self.frontends.release(at, id, &mut self.out);
    }

    /// Names the losers of conflicts that a service has part in.
    pub(super) fn report_contested(&mut self, index: Index) {
        let Some(name) = self.services.get(index).map(|service| service.name.clone()) else { return };
        let contested = self.contested();
        let mine = contested.into_iter().filter(|(winner, loser, _)| *winner == name || *loser == name);
        for (winner, loser, at) in mine.collect::<Vec<_>>() {
            self.report_loser(&winner, &loser, &at);
        }
    }

    pub(super) fn report_all_contested(&mut self) {
        for (winner, loser, at) in self.contested() {
            self.report_loser(&winner, &loser, &at);
        }
    }

    fn report_loser(&mut self, winner: &Name, loser: &Name, at: &Endpoint) {
        let at = address::socket(at);
        self.problem(service_name(loser), format!("{at} belongs to service {winner} already: not served here"));
    }

    /// Winner, loser and address of every conflict.
    fn contested(&self) -> Vec<(Name, Name, Endpoint)> {
        let mut found = Vec::new();
        for at in self.frontends.contested() {
            if let [winner, losers @ ..] = self.frontends.claims(at) {
                found.extend(losers.iter().map(|loser| (winner.by.0.clone(), loser.by.0.clone(), *at)));
            }
        }
        found.sort_unstable();
        found
    }

    pub(super) fn service_named(&mut self, name: &Name) -> Index {
        if let Some(&index) = self.service_index.get(name) {
            return index;
        }
        let index = self.services.insert(Service {
            name: name.clone(),
            declared: false,
            addresses: Vec::new(),
            node_addresses: Vec::new(),
            affinity_s: 0,
            headless: false,
            ports: Vec::new(),
            seen: self.epoch,
        });
        self.service_index.insert(name.clone(), index);
        index
    }

    pub(super) fn port_named(&mut self, service: &Name, port: &Name) -> Index {
        let service = self.service_named(service);
        self.port_of(service, port)
    }

    fn port_of(&mut self, service: Index, name: &Name) -> Index {
        if let Some(&port) = self.services[service].ports.iter().find(|&&port| self.ports[port].name == *name) {
            return port;
        }
        let port = self.ports.insert(Port {
            service,
            name: name.clone(),
            declared: None,
            node_port: None,
            ids: [0; 2],
            attached: [0; 2],
            objects: HashMap::default(),
        });
        self.services[service].ports.push(port);
        port
    }

    pub(super) fn port_index(&self, service: &str, port: &str) -> Option<Index> {
        let service = &self.services[*self.service_index.get(service)?];
        service.ports.iter().copied().find(|&index| &*self.ports[index].name == port)
    }

    /// Forgets a port, and its service, that nobody speaks of any more.
    pub(super) fn collect_port(&mut self, index: Index) {
        let port = &self.ports[index];
        if port.declared.is_none() && port.objects.is_empty() {
            let service = port.service;
            self.services[service].ports.retain(|&other| other != index);
            self.ports.remove(index);
            self.collect_service(service);
        }
    }

    fn collect_service(&mut self, index: Index) {
        let Some(service) = self.services.get(index) else { return };
        if !service.declared && service.ports.is_empty() {
            self.service_index.remove(&service.name);
            self.services.remove(index);
        }
    }

    /// Why an object is not in force, if it is not.
    pub(super) fn unresolved(&self, port: Index, key: &ObjectKey) -> Option<String> {
        let record = &self.ports[port];
        let service = &self.services[record.service];
        if !service.declared {
            return Some(format!("there is no service {}", service.name));
        }
        if record.declared.is_none() {
            let known = service.ports.iter().filter(|&&port| self.ports[port].declared.is_some());
            let names: Vec<_> = known.map(|&port| format!("{:?}", self.ports[port].name)).collect();
            return Some(format!(
                "service {} has no port {:?}; its ports are {}",
                service.name,
                record.name,
                names.join(", ")
            ));
        }
        let family = Family::of(&key.0);
        if !service.serves(family) {
            let family = if family == Family::V4 { "IPv4" } else { "IPv6" };
            return Some(format!("service {} has no {family} address", service.name));
        }
        None
    }
}
