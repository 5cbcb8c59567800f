//! The first sync: desired state is compared with what an earlier agent left, and only the
//! difference is written. Numbers and generations of what stays are kept, so that no connection
//! and no health word notices a restart.

use std::collections::HashSet;

use dataplane_ebpf::{
    abi::{Endpoint, ServiceId, Slot, SlotKey},
    health::{Input, State},
};

use super::{Registry, Seed, backends::Physical, change::Change, hash::HashMap};

/// The adopted state, by what identifies it.
#[derive(Debug)]
pub(super) struct Boot {
    seed: Seed,
    backends: HashMap<Endpoint, u32>,
    generations: HashMap<u32, u16>,
    services: HashMap<Endpoint, ServiceId>,
    taken: HashSet<ServiceId>,
}

impl Boot {
    pub(super) fn new(seed: Seed) -> Self {
        let known: HashSet<_> = seed.services.iter().map(|service| service.id).collect();
        Self {
            backends: seed.backends.iter().map(|(id, backend, _)| (backend.at, *id)).collect(),
            generations: seed.backends.iter().map(|(id, backend, _)| (*id, backend.generation as u16)).collect(),
            services: seed
                .frontends
                .iter()
                .filter(|(_, frontend)| known.contains(&frontend.service))
                .map(|(at, frontend)| (*at, frontend.service))
                .collect(),
            taken: HashSet::new(),
            seed,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.seed.is_empty()
    }

    /// The number that the kernel has for a backend.
    pub(super) fn take_backend(&mut self, at: &Endpoint) -> Option<u32> {
        self.backends.get(at).copied()
    }

    /// The generation of an adopted number: it goes on living.
    pub(super) fn generation(&self, number: u32) -> Option<u16> {
        self.generations.get(&number).copied()
    }

    /// The number that the kernel has for the service behind an address; each is given once.
    pub(super) fn take_service(&mut self, at: &Endpoint) -> Option<ServiceId> {
        let id = *self.services.get(at)?;
        self.taken.insert(id).then_some(id)
    }
}

impl Registry {
    /// Writes the difference between the adopted state and the desired one, and goes live.
    pub(super) fn reconcile(&mut self) {
        let Some(boot) = self.boot.take() else { return };
        let Seed { frontends, services, slots, backends, .. } = boot.seed;

        // What is no longer wanted is avoided first, and removed last.
        let left: Vec<_> = backends.iter().filter(|(id, old, _)| self.backends.at(&old.at) != Some(*id)).collect();
        for (id, old, _) in &left {
            let input = Input::Terminating { serving: false };
            self.out.push(Change::Health { id: *id, generation: old.generation, input });
        }
        let old: HashMap<_, _> = backends.iter().map(|(id, backend, health)| (*id, (backend, *health))).collect();
        for (id, physical) in self.backends.iter() {
            match old.get(&id) {
                None => {
                    add(id, physical, &mut self.out);
                }
                Some(&(before, health)) => {
                    if *before != physical.value {
                        self.out.push(Change::UpdateBackend { id, backend: physical.value });
                    }
                    let generation = physical.value.generation;
                    let input = match physical.terminating {
                        Some(serving) => Input::Terminating { serving },
                        None => Input::NotTerminating,
                    };
                    if health.after(input) != health {
                        self.out.push(Change::Health { id, generation, input });
                    }
                }
            }
        }

        let mut slots: HashMap<SlotKey, Slot> = slots.into_iter().collect();
        let services: HashMap<_, _> = services.into_iter().map(|service| (service.id, service)).collect();
        for (service, wanted) in self.slots.iter() {
            let mut shrunk = Vec::new();
            for (index, slot) in wanted.enumerate() {
                let key = SlotKey { service: service.id, index: index as u32 };
                if slots.remove(&key) != Some(slot) {
                    self.out.push(Change::PutSlot(key, slot));
                }
            }
            let before = services.get(&service.id);
            if before != Some(&service) {
                self.out.push(Change::PutService(service));
            }
            let had = before.map_or(0, |old| old.ready + old.terminating);
            for index in service.ready + service.terminating..had {
                let key = SlotKey { service: service.id, index };
                if slots.remove(&key).is_some() {
                    shrunk.push(Change::DeleteSlot(key));
                }
            }
            self.out.append(&mut shrunk);
        }

        let before: HashMap<_, _> = frontends.into_iter().collect();
        for (at, frontend) in self.frontends.iter() {
            if before.get(&at) != Some(&frontend) {
                self.out.push(Change::PutFrontend(at, frontend));
            }
        }
        for at in before.into_keys() {
            if self.frontends.claims(&at).is_empty() {
                self.out.push(Change::DeleteFrontend(at));
            }
        }
        for id in services.into_keys() {
            if !self.slots.exists(id) {
                self.out.push(Change::DeleteService(id));
                // One that was taken and given up during the sync is free already.
                if !boot.taken.contains(&id) {
                    self.slots.forget(id);
                }
            }
        }
        self.out.extend(slots.into_keys().map(Change::DeleteSlot));
        for (id, old, _) in left {
            self.out.push(Change::Health { id: *id, generation: old.generation, input: Input::Removed });
            self.out.push(Change::RemoveBackend { id: *id, at: old.at });
            self.backends.forget(*id);
        }
        for index in self.pods.indexes() {
            self.enroll(index);
        }
    }
}

fn add(id: u32, physical: &Physical, out: &mut Vec<Change>) {
    let state = match physical.terminating {
        None => State::Ready,
        Some(true) => State::Draining,
        Some(false) => State::Refusing,
    };
    let backend = physical.value;
    out.push(Change::AddBackend { id, backend, state });
    if let Some(serving) = physical.terminating {
        let input = Input::Terminating { serving };
        out.push(Change::Health { id, generation: backend.generation, input });
    }
}
