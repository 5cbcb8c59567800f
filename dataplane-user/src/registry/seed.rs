//! What an earlier agent left in the maps, as the kernel side reads it back.

use dataplane_ebpf::{
    abi::{Backend, Endpoint, Frontend, Service, Slot, SlotKey},
    health::Health,
};

use super::{Limits, change::PodId};

/// The adopted state; empty on a node that hitless never ran on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seed {
    pub frontends: Vec<(Endpoint, Frontend)>,
    /// The used elements of `SERVICES`.
    pub services: Vec<Service>,
    pub slots: Vec<(SlotKey, Slot)>,
    /// Living backends (health word not `Gone`) with their number.
    pub backends: Vec<(u32, Backend, Health)>,
    /// Number and last generation of backends that are gone: a number's next life must differ.
    pub retired: Vec<(u32, u32)>,
    /// The largest identifier in `PODS`.
    pub last_pod: PodId,
}

impl Seed {
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.services.is_empty() && self.slots.is_empty() && self.backends.is_empty()
    }

    /// What is within the registry's numbers; the rest (the canary's) is none of its business.
    pub(super) fn within(mut self, limits: &Limits) -> Self {
        let service = |id: u32| id < limits.services;
        self.frontends.retain(|(_, frontend)| service(frontend.service));
        self.services.retain(|value| service(value.id));
        self.slots.retain(|(key, _)| service(key.service));
        self.backends.retain(|(id, ..)| *id < limits.backends);
        self.retired.retain(|(id, _)| *id < limits.backends);
        self
    }
}
