//! Backends: one number per address and port, shared by all services that list it.

use std::collections::HashSet;

use dataplane_ebpf::{
    abi::{self, Addr, BACKEND_LOCAL, Endpoint, ServiceId},
    health::{Input, State},
};

use super::{
    Index, NONE, Registry, Seed,
    address::{self, Family},
    change::Change,
    hash::{Numbers, hash_of},
    ids::Ids,
    problem::backend_name,
    slots::Section,
};
use crate::{few::Few, model};

/// What names a backend object within its service port: address and target port.
pub(super) type ObjectKey = (Addr, u16);

/// A backend as a source declares it, in one service port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Object {
    pub pod: Index,
    /// Its number while it is in force; 0 while its service port is unknown.
    pub backend: u32,
    pub seen: u32,
    pub weight: u16,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

/// A backend in the kernel.
#[derive(Clone, Debug)]
pub(super) struct Physical {
    pub value: abi::Backend,
    /// The service ports that list it.
    pub members: Few<Index>,
    pub pod: Index,
    pub prev_in_pod: u32,
    /// The control plane says that it terminates, and whether it serves.
    pub terminating: Option<bool>,
}

#[derive(Debug)]
pub(super) struct Backends {
    items: Vec<Option<Physical>>,
    by_endpoint: Numbers,
    /// The last generation of every number, living or not.
    generations: Vec<u16>,
    ids: Ids,
}

impl Backends {
    pub(super) fn new(max: u32, seed: &Seed) -> Self {
        let used: HashSet<_> = seed.backends.iter().map(|(id, ..)| *id).collect();
        let mut this = Self {
            items: Vec::new(),
            by_endpoint: Numbers::default(),
            generations: Vec::new(),
            ids: Ids::new(max, &used),
        };
        for &(id, generation) in &seed.retired {
            this.set_generation(id, generation as u16);
        }
        for &(id, ref backend, _) in &seed.backends {
            this.set_generation(id, backend.generation as u16);
        }
        this
    }

    pub(super) fn get(&self, id: u32) -> Option<&Physical> {
        self.items.get(id as usize)?.as_ref()
    }

    fn get_mut(&mut self, id: u32) -> &mut Physical {
        self.items[id as usize].as_mut().expect("a backend that is referred to lives")
    }

    pub(super) fn at(&self, at: &Endpoint) -> Option<u32> {
        let is = |&id: &u32| self.get(id).is_some_and(|physical| physical.value.at == *at);
        self.by_endpoint.find(hash_of(at), is).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Physical)> {
        self.items.iter().enumerate().filter_map(|(id, item)| Some((id as u32, item.as_ref()?)))
    }

    pub(super) fn len(&self) -> usize {
        self.by_endpoint.len()
    }

    pub(super) fn set_terminating(&mut self, id: u32, terminating: Option<bool>) {
        self.get_mut(id).terminating = terminating;
    }

    /// Takes back a number that an earlier agent used and nobody wants any more.
    pub(super) fn forget(&mut self, id: u32) {
        self.ids.give_back(id);
    }

    /// Takes a backend out of a chain that is dissolved as a whole; with it, the next in it.
    pub(super) fn unchain(&mut self, id: u32) -> (abi::Backend, u32) {
        let physical = self.get_mut(id);
        physical.pod = NONE;
        physical.prev_in_pod = 0;
        physical.value.pod = 0;
        physical.value.flags &= !BACKEND_LOCAL;
        let next = std::mem::take(&mut physical.value.next_in_pod);
        (physical.value, next)
    }

    fn set_generation(&mut self, id: u32, generation: u16) {
        if self.generations.len() <= id as usize {
            self.generations.resize(id as usize + 1, 0);
        }
        self.generations[id as usize] = generation;
    }

    /// The next life of a number: never 0, so that zeroed memory is nobody's.
    fn next_generation(&mut self, id: u32) -> u16 {
        let last = self.generations.get(id as usize).copied().unwrap_or(0);
        let next = if last == u16::MAX { 1 } else { last + 1 };
        self.set_generation(id, next);
        next
    }

    fn insert(&mut self, id: u32, physical: Physical) {
        if self.items.len() <= id as usize {
            self.items.resize_with(id as usize + 1, || None);
        }
        let items = &self.items;
        let of = |&id: &u32| items[id as usize].as_ref().map_or(0, |physical| hash_of(&physical.value.at));
        self.by_endpoint.insert_unique(hash_of(&physical.value.at), id, of);
        self.items[id as usize] = Some(physical);
    }
}

impl Registry {
    pub(super) fn upsert_backend(&mut self, backend: model::Backend) {
        let port = self.port_named(&backend.service, &backend.port);
        let pod = backend.pod.as_ref().map_or(NONE, |name| self.pod_named(name));
        let key = (address::addr(backend.address), backend.target_port);
        let object = Object {
            pod,
            backend: 0,
            seen: self.epoch,
            weight: backend.weight,
            ready: backend.ready,
            serving: backend.serving,
            terminating: backend.terminating,
        };
        match self.ports[port].objects.get_mut(&key) {
            Some(old) => {
                let former = old.pod;
                let number = old.backend;
                *old = Object { backend: number, ..object };
                if former != pod {
                    self.unname_in_pod(former, port, key);
                    self.name_in_pod(pod, port, key);
                }
                if number != 0 {
                    self.refresh(number);
                    return;
                }
            }
            None => {
                self.ports[port].objects.insert(key, object);
                self.name_in_pod(pod, port, key);
            }
        }
        if self.wanted(port, &key) {
            self.attach(port, key);
        }
    }

    pub(super) fn delete_object(&mut self, port: Index, key: ObjectKey) {
        let Some(object) = self.ports[port].objects.get(&key).copied() else { return };
        if object.backend != 0 {
            self.detach(object.backend, &[port]);
        }
        self.ports[port].objects.remove(&key);
        self.unname_in_pod(object.pod, port, key);
        self.collect_port(port);
    }

    /// Puts an object whose service port is known into force.
    pub(super) fn attach(&mut self, port: Index, key: ObjectKey) {
        let family = Family::of(&key.0);
        let Some((_, protocol)) = self.ports[port].declared else { return };
        let at = address::endpoint(address::ip(&key.0), key.1, protocol);
        let known = self.backends.at(&at);
        let number = known.or_else(|| {
            let adopted = self.boot.as_mut().and_then(|boot| boot.take_backend(&at));
            adopted.or_else(|| self.backends.ids.take())
        });
        let Some(number) = number else {
            let name = self.object_name(port, &key);
            return self.full("BACKENDS", "sizes.backends", &name);
        };
        if !self.ensure_service(port, family) {
            if known.is_none() {
                self.backends.ids.give_back(number);
            }
            return;
        }
        let record = &mut self.ports[port];
        record.attached[family as usize] += 1;
        record.objects.get_mut(&key).expect("the caller attaches an object it has").backend = number;
        if known.is_some() {
            self.backends.get_mut(number).members.push(port);
            self.refresh(number);
        } else {
            self.admit(number, at, port);
        }
    }

    /// Takes a backend out of some service ports; out of the last one it is no more.
    pub(super) fn detach(&mut self, number: u32, ports: &[Index]) {
        let physical = self.backends.get_mut(number);
        let key = (physical.value.at.addr, u16::from_be(physical.value.at.port_be));
        let family = Family::of(&key.0);
        physical.members.retain(|port| !ports.contains(port));
        let last = physical.members.is_empty();
        let mut former = Vec::with_capacity(ports.len());
        for &port in ports {
            let port = &mut self.ports[port];
            former.push(port.ids[family as usize]);
            port.attached[family as usize] -= 1;
            if let Some(object) = port.objects.get_mut(&key) {
                object.backend = 0;
            }
        }
        if last {
            self.remove(number, &former);
        } else {
            for &service in &former {
                self.set_slot(service, number, None);
            }
            let (set, _) = self.services_of(number);
            self.regroup(number, &set, &former);
            self.refresh(number);
        }
        for &port in ports {
            self.release_service(port, family);
        }
    }

    fn admit(&mut self, number: u32, at: Endpoint, port: Index) {
        let generation = match self.boot.as_ref().and_then(|boot| boot.generation(number)) {
            Some(generation) => generation,
            None => self.backends.next_generation(number),
        };
        let value = abi::Backend { at, generation: generation.into(), ..abi::Backend::default() };
        let physical = Physical { value, members: Few::One(port), pod: NONE, prev_in_pod: 0, terminating: None };
        self.backends.insert(number, physical);

        let terminating = self.terminating(number);
        let (set, pinned) = self.services_of(number);
        let group = self.group_for(number, &set, pinned);
        let linked = self.link(number, self.local_pod_of(number));
        let physical = self.backends.get_mut(number);
        physical.terminating = terminating;
        physical.value.group = group;
        self.groups.moved(0, group);
        let backend = self.backends.get_mut(number).value;
        let state = match terminating {
            None => State::Ready,
            Some(true) => State::Draining,
            Some(false) => State::Refusing,
        };
        self.out.push(Change::AddBackend { id: number, backend, state });
        if let Some(serving) = terminating {
            self.tell(number, Input::Terminating { serving });
        }
        if let Some(pod) = linked {
            self.enroll(pod);
        }
        for (service, want) in self.wants(number) {
            self.set_slot(service, number, want);
        }
        self.regroup(number, &set, &[]);
    }

    fn remove(&mut self, number: u32, former: &[ServiceId]) {
        // This alone takes it out of every service.
        self.tell(number, Input::Removed);
        for &service in former {
            self.set_slot(service, number, None);
        }
        self.regroup(number, &[], former);
        self.unlink(number);
        let Some(physical) = self.backends.items[number as usize].take() else { return };
        self.groups.moved(physical.value.group, 0);
        let by_endpoint = &mut self.backends.by_endpoint;
        if let Ok(entry) = by_endpoint.find_entry(hash_of(&physical.value.at), |&other| other == number) {
            entry.remove();
        }
        // An adopted number stays reserved until the first sync is through.
        if self.boot.as_ref().is_none_or(|boot| boot.generation(number).is_none()) {
            self.backends.ids.give_back(number);
        }
        self.out.push(Change::RemoveBackend { id: number, at: physical.value.at });
    }

    /// Brings a backend up to date after any of its objects, its pod or its services changed.
    pub(super) fn refresh(&mut self, number: u32) {
        let terminating = self.terminating(number);
        let physical = self.backends.get_mut(number);
        let before = physical.value;
        if physical.terminating != terminating {
            physical.terminating = terminating;
            self.tell(
                number,
                match terminating {
                    Some(serving) => Input::Terminating { serving },
                    None => Input::NotTerminating,
                },
            );
        }
        for (service, want) in self.wants(number) {
            self.set_slot(service, number, want);
        }
        let (set, pinned) = self.services_of(number);
        self.regroup(number, &set, &[]);

        let group = self.group_for(number, &set, pinned);
        if group != before.group {
            self.backends.get_mut(number).value.group = group;
            self.groups.moved(before.group, group);
        }
        let pod = self.local_pod_of(number);
        let mut linked = None;
        if pod != self.backends.get_mut(number).pod {
            self.unlink(number);
            linked = self.link(number, pod);
        }
        let backend = self.backends.get_mut(number).value;
        if backend != before {
            self.out.push(Change::UpdateBackend { id: number, backend });
        }
        if let Some(pod) = linked {
            self.enroll(pod);
        }
    }

    pub(super) fn set_slot(&mut self, service: ServiceId, number: u32, want: Option<(Section, u16)>) {
        let Some(physical) = self.backends.get(number) else { return };
        let generation = physical.value.generation as u16;
        if self.slots.set(service, number, generation, want, &mut self.out).is_err() {
            let name = format!("backend {}", address::socket(&physical.value.at));
            self.full("SLOTS", "sizes.slots", &name);
        }
    }

    pub(super) fn tell(&mut self, number: u32, input: Input) {
        if let Some(physical) = self.backends.get(number) {
            self.out.push(Change::Health { id: number, generation: physical.value.generation, input });
        }
    }

    /// The objects behind a backend, each with the service it is in.
    pub(super) fn objects_of(&self, number: u32) -> impl Iterator<Item = (Index, ServiceId, &Object)> {
        self.backends.get(number).into_iter().flat_map(move |physical| {
            let at = physical.value.at;
            let family = Family::of(&at.addr) as usize;
            physical.members.iter().filter_map(move |&port| {
                let record = &self.ports[port];
                let object = record.objects.get(&(at.addr, u16::from_be(at.port_be)))?;
                Some((port, record.ids[family], object))
            })
        })
    }

    /// Its services, sorted, and whether any of them must not be moved within.
    pub(super) fn services_of(&self, number: u32) -> (Vec<ServiceId>, bool) {
        let mut pinned = false;
        let mut set = Vec::new();
        for (port, service, _) in self.objects_of(number) {
            pinned |= self.services[self.ports[port].service].headless;
            set.push(service);
        }
        set.sort_unstable();
        (set, pinned)
    }

    /// Where it belongs in each of its services.
    pub(super) fn wants(&self, number: u32) -> Vec<(ServiceId, Option<(Section, u16)>)> {
        self.objects_of(number)
            .map(|(_, service, object)| {
                let section = match (self.ends(object), object.ready, object.serving) {
                    (false, true, _) => Some(Section::Ready),
                    (true, _, true) => Some(Section::Terminating),
                    _ => None,
                };
                (service, section.map(|section| (section, object.weight)))
            })
            .collect()
    }

    /// Terminating if any of its objects says so; serving if any of those says so.
    fn terminating(&self, number: u32) -> Option<bool> {
        self.terminating_with(number, NONE)
    }

    /// The same once that pod ends, too.
    pub(super) fn terminating_with(&self, number: u32, pod: Index) -> Option<bool> {
        self.objects_of(number)
            .filter(|(.., object)| self.ends(object) || (object.pod == pod && pod != NONE))
            .map(|(.., object)| object.serving)
            .reduce(|a, b| a || b)
    }

    fn ends(&self, object: &Object) -> bool {
        object.terminating || (object.pod != NONE && self.pods[object.pod].terminating)
    }

    /// The pod of this node that it belongs to. Should its objects disagree, the least name.
    fn local_pod_of(&self, number: u32) -> Index {
        self.objects_of(number)
            .map(|(.., object)| object.pod)
            .filter(|&pod| pod != NONE && self.pods[pod].local.is_some())
            .min_by(|&a, &b| self.pods[a].name.cmp(&self.pods[b].name))
            .unwrap_or(NONE)
    }

    /// Makes a backend the head of its pod's chain; the answer is the pod to be told.
    fn link(&mut self, number: u32, pod: Index) -> Option<Index> {
        if pod == NONE {
            return None;
        }
        let record = &mut self.pods[pod];
        let id = record.local.as_ref()?.id;
        let head = std::mem::replace(&mut record.first_backend, number);
        if head != 0 {
            self.backends.get_mut(head).prev_in_pod = number;
        }
        let physical = self.backends.get_mut(number);
        physical.pod = pod;
        physical.prev_in_pod = 0;
        physical.value.next_in_pod = head;
        physical.value.pod = id;
        physical.value.flags |= BACKEND_LOCAL;
        Some(pod)
    }

    /// Takes a backend out of its pod's chain.
    fn unlink(&mut self, number: u32) {
        let physical = self.backends.get_mut(number);
        let pod = std::mem::replace(&mut physical.pod, NONE);
        if pod == NONE {
            return;
        }
        let prev = std::mem::take(&mut physical.prev_in_pod);
        let next = std::mem::take(&mut physical.value.next_in_pod);
        physical.value.pod = 0;
        physical.value.flags &= !BACKEND_LOCAL;
        if next != 0 {
            self.backends.get_mut(next).prev_in_pod = prev;
        }
        if prev != 0 {
            let before = self.backends.get_mut(prev);
            before.value.next_in_pod = next;
            let backend = before.value;
            self.out.push(Change::UpdateBackend { id: prev, backend });
        } else {
            self.pods[pod].first_backend = next;
            self.enroll(pod);
        }
    }

    pub(super) fn object_name(&self, port: Index, key: &ObjectKey) -> String {
        let port = &self.ports[port];
        backend_name(&self.services[port.service].name, &port.name, address::ip(&key.0), key.1)
    }
}
