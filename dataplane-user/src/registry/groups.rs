//! Where a gateway's connection may be moved: the backends that share *all* services of the dead one.
//!
//! A backend of one service has that service as its group. For the backends of several, a
//! pseudo-service holds the intersection. It is made and unmade in [`Registry::settle`], after
//! the urgent changes were written: that work grows with the services' size.

use std::collections::BTreeSet;

use dataplane_ebpf::abi::ServiceId;

use super::{Registry, hash::HashMap, slots::Section};

/// The pseudo-services.
#[derive(Debug, Default)]
pub(super) struct Groups {
    by_set: HashMap<Box<[ServiceId]>, ServiceId>,
    all: HashMap<ServiceId, Group>,
    /// The groups that a service is part of.
    of_service: HashMap<ServiceId, Vec<ServiceId>>,
    /// Backends whose group must be looked at again.
    unsettled: BTreeSet<u32>,
    /// Groups that may have become nobody's.
    doomed: BTreeSet<ServiceId>,
}

#[derive(Debug)]
struct Group {
    set: Box<[ServiceId]>,
    /// Backends whose group this is.
    users: u32,
}

impl Groups {
    pub(super) fn unsettle(&mut self, backend: u32) {
        self.unsettled.insert(backend);
    }

    /// The backend's group goes from `old` to `new`.
    pub(super) fn moved(&mut self, old: ServiceId, new: ServiceId) {
        if let Some(group) = self.all.get_mut(&old) {
            group.users -= 1;
            if group.users == 0 {
                self.doomed.insert(old);
            }
        }
        if let Some(group) = self.all.get_mut(&new) {
            group.users += 1;
        }
    }

    /// The groups that any of these services is part of.
    fn touching(&self, services: &[ServiceId]) -> Vec<ServiceId> {
        if self.all.is_empty() {
            return Vec::new();
        }
        let mut found: Vec<_> = services.iter().filter_map(|id| self.of_service.get(id)).flatten().copied().collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}

impl Registry {
    /// The group that a backend of these services (sorted) ought to have; 0 while it must be made.
    pub(super) fn group_for(&mut self, backend: u32, set: &[ServiceId], pinned: bool) -> ServiceId {
        match set {
            _ if pinned => 0,
            [] => 0,
            [only] => *only,
            several => match self.groups.by_set.get(several) {
                Some(&id) => id,
                None => {
                    self.groups.unsettle(backend);
                    0
                }
            },
        }
    }

    /// Brings a backend's slots in the pseudo-services up to date. `former`: services it just left.
    pub(super) fn regroup(&mut self, backend: u32, set: &[ServiceId], former: &[ServiceId]) {
        let mut all = set.to_vec();
        all.extend(former);
        for group in self.groups.touching(&all) {
            let members = &self.groups.all[&group].set;
            let want = if members.iter().all(|id| set.contains(id)) { self.merged(backend, group) } else { None };
            self.set_slot(group, backend, want);
        }
    }

    /// Ready if ready in all of the group's services, in a section if in one in all of them.
    fn merged(&self, backend: u32, group: ServiceId) -> Option<(Section, u16)> {
        let set = &self.groups.all[&group].set;
        let mut merged: Option<(Section, u16)> = None;
        for (id, want) in self.wants(backend) {
            if set.contains(&id) {
                let (section, weight) = want?;
                let (worst, heaviest) = merged.unwrap_or((section, weight));
                merged = Some((worst.max(section), heaviest.max(weight)));
            }
        }
        merged
    }

    /// Makes and unmakes pseudo-services: what a change left to do that is not urgent.
    pub(super) fn settle_groups(&mut self) {
        while let Some(backend) = self.groups.unsettled.pop_first() {
            if self.backends.get(backend).is_none() {
                continue;
            }
            let (set, pinned) = self.services_of(backend);
            if set.len() > 1 && !pinned && !self.groups.by_set.contains_key(set.as_slice()) {
                self.make_group(set);
            }
            self.refresh(backend);
        }
        while let Some(group) = self.groups.doomed.pop_first() {
            if self.groups.all.get(&group).is_some_and(|group| group.users == 0) {
                self.unmake_group(group);
            }
        }
    }

    fn make_group(&mut self, set: Vec<ServiceId>) {
        let Some(id) = self.slots.create(0, 0, &mut self.out) else {
            self.full("SERVICES", "sizes.services", "a gateway group");
            return;
        };
        for &service in &set {
            self.groups.of_service.entry(service).or_default().push(id);
        }
        let candidates = set.iter().map(|&id| self.backends_in(id)).min_by_key(Vec::len).unwrap_or_default();
        let set: Box<[ServiceId]> = set.into();
        self.groups.by_set.insert(set.clone(), id);
        self.groups.all.insert(id, Group { set, users: 0 });
        // Should the backend it was made for come out of `refresh` with another group.
        self.groups.doomed.insert(id);
        for backend in candidates {
            let (set, _) = self.services_of(backend);
            self.regroup(backend, &set, &[]);
        }
    }

    fn unmake_group(&mut self, id: ServiceId) {
        let Some(group) = self.groups.all.remove(&id) else { return };
        self.groups.by_set.remove(&group.set);
        for service in &group.set {
            if let Some(groups) = self.groups.of_service.get_mut(service) {
                groups.retain(|&other| other != id);
                if groups.is_empty() {
                    self.groups.of_service.remove(service);
                }
            }
        }
        self.slots.delete(id, &mut self.out);
    }

    /// A service goes, and nobody is in it any more: neither is anybody in its groups.
    pub(super) fn drop_groups_of(&mut self, service: ServiceId) {
        for group in self.groups.of_service.get(&service).cloned().unwrap_or_default() {
            debug_assert_eq!(self.groups.all[&group].users, 0);
            self.groups.doomed.remove(&group);
            self.unmake_group(group);
        }
    }

    pub(super) fn group_set(&self, service: ServiceId) -> Option<&[ServiceId]> {
        self.groups.all.get(&service).map(|group| &*group.set)
    }
}
