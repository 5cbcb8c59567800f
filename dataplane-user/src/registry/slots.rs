//! `SERVICES` and `SLOTS` as the kernel has them: sections, swaps, the exact largest weight.

use std::collections::HashSet;

use dataplane_ebpf::abi::{Service, ServiceId, Slot, SlotKey};

use super::{change::Change, hash::HashMap, ids::Ids};
use crate::few::Few;

/// Which part of a service's slots a backend is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    Ready,
    /// Serves and terminates (KEP-1669).
    Terminating,
}

/// All services with their slots.
#[derive(Debug)]
pub struct Slots {
    rows: Vec<Row>,
    /// Where a backend is in a service.
    places: HashMap<(ServiceId, u32), u32>,
    ids: Ids,
    max_slots: usize,
}

#[derive(Clone, Debug, Default)]
struct Row {
    value: Service,
    entries: Vec<Entry>,
    /// How many slots have each weight, of which there are few: the largest must be known exactly when one goes.
    weights: Few<(u16, u32)>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    backend: u32,
    generation: u16,
    weight: u16,
}

/// `SLOTS` has no room for another one.
#[derive(Debug)]
pub struct Full;

impl Slots {
    /// `used`: numbers of an adopted kernel state, only to be had by [`Slots::create_as`].
    pub fn new(max_services: u32, max_slots: u32, used: &HashSet<u32>) -> Self {
        Self {
            rows: Vec::new(),
            places: HashMap::default(),
            ids: Ids::new(max_services, used),
            max_slots: max_slots as usize,
        }
    }

    /// A new service without backends; None when `SERVICES` is full.
    pub fn create(&mut self, flags: u32, affinity_s: u32, out: &mut Vec<Change>) -> Option<ServiceId> {
        let id = self.ids.take()?;
        self.create_as(id, flags, affinity_s, out);
        Some(id)
    }

    /// The same with a number that the kernel already has.
    pub fn create_as(&mut self, id: ServiceId, flags: u32, affinity_s: u32, out: &mut Vec<Change>) {
        if self.rows.len() <= id as usize {
            self.rows.resize_with(id as usize + 1, Row::default);
        }
        let value = Service { id, flags, affinity_s, ..Service::default() };
        self.rows[id as usize] = Row { value, ..Row::default() };
        out.push(Change::PutService(value));
    }

    pub fn set_terms(&mut self, id: ServiceId, flags: u32, affinity_s: u32, out: &mut Vec<Change>) {
        let value = &mut self.rows[id as usize].value;
        if (value.flags, value.affinity_s) != (flags, affinity_s) {
            (value.flags, value.affinity_s) = (flags, affinity_s);
            out.push(Change::PutService(*value));
        }
    }

    /// Deletes a service with whatever slots it has. Its frontends must be gone.
    pub fn delete(&mut self, id: ServiceId, out: &mut Vec<Change>) {
        out.push(Change::DeleteService(id));
        let row = std::mem::take(&mut self.rows[id as usize]);
        for (index, entry) in row.entries.iter().enumerate() {
            self.places.remove(&(id, entry.backend));
            out.push(Change::DeleteSlot(SlotKey { service: id, index: index as u32 }));
        }
        self.ids.give_back(id);
    }

    /// Takes back a number that an earlier agent used and nobody wants any more.
    pub fn forget(&mut self, id: ServiceId) {
        self.ids.give_back(id);
    }

    pub fn exists(&self, id: ServiceId) -> bool {
        id != 0 && self.rows.get(id as usize).is_some_and(|row| row.value.id == id)
    }

    pub fn place(&self, service: ServiceId, backend: u32) -> Option<Section> {
        let index = *self.places.get(&(service, backend))?;
        Some(if index < self.rows[service as usize].value.ready { Section::Ready } else { Section::Terminating })
    }

    /// Every service with its slots, as they are to be in the kernel.
    pub fn iter(&self) -> impl Iterator<Item = (Service, impl Iterator<Item = Slot>)> {
        self.rows.iter().filter(|row| row.value.id != 0).map(|row| {
            let service = row.value.id;
            (row.value, row.entries.iter().map(move |entry| entry.slot(service)))
        })
    }

    pub fn total(&self) -> usize {
        self.places.len()
    }

    /// Puts `backend` where it belongs in `service`, or takes it out. At most five changes,
    /// however large the service is.
    pub fn set(
        &mut self,
        service: ServiceId,
        backend: u32,
        generation: u16,
        want: Option<(Section, u16)>,
        out: &mut Vec<Change>,
    ) -> Result<(), Full> {
        let place = self.places.get(&(service, backend)).copied();
        match (place, want) {
            (None, None) => {}
            (None, Some((section, weight))) => {
                if self.places.len() >= self.max_slots {
                    return Err(Full);
                }
                self.insert(service, Entry { backend, generation, weight }, section, out);
            }
            (Some(index), None) => self.remove(service, index, out),
            (Some(index), Some((section, weight))) => {
                let row = &mut self.rows[service as usize];
                let before = row.value;
                let at = &mut row.entries[index as usize];
                if at.weight != weight {
                    let old = std::mem::replace(&mut at.weight, weight);
                    row.reweigh(Some(old), Some(weight));
                    out.push(row.put(index));
                }
                let now = if index < row.value.ready { Section::Ready } else { Section::Terminating };
                if now != section {
                    self.cross(service, index, section, out);
                }
                let row = &self.rows[service as usize];
                if row.value != before {
                    out.push(Change::PutService(row.value));
                }
            }
        }
        Ok(())
    }

    fn insert(&mut self, service: ServiceId, entry: Entry, section: Section, out: &mut Vec<Change>) {
        let row = &mut self.rows[service as usize];
        let end = row.entries.len() as u32;
        row.entries.push(entry);
        row.reweigh(None, Some(entry.weight));
        self.places.insert((service, entry.backend), end);
        match section {
            Section::Ready => {
                let border = row.value.ready;
                if border != end {
                    // The first terminating slot makes room.
                    self.swap(service, border, end);
                    let row = &self.rows[service as usize];
                    out.extend([row.put(end), row.put(border)]);
                } else {
                    out.push(row.put(end));
                }
                self.rows[service as usize].value.ready += 1;
            }
            Section::Terminating => {
                out.push(row.put(end));
                row.value.terminating += 1;
            }
        }
        out.push(Change::PutService(self.rows[service as usize].value));
    }

    fn remove(&mut self, service: ServiceId, index: u32, out: &mut Vec<Change>) {
        let value = self.rows[service as usize].value;
        let mut hole = index;
        if hole < value.ready {
            let last_ready = value.ready - 1;
            if hole != last_ready {
                self.swap(service, hole, last_ready);
                out.push(self.rows[service as usize].put(hole));
                hole = last_ready;
            }
            self.rows[service as usize].value.ready -= 1;
        } else {
            self.rows[service as usize].value.terminating -= 1;
        }
        let end = self.rows[service as usize].entries.len() as u32 - 1;
        if hole != end {
            self.swap(service, hole, end);
            out.push(self.rows[service as usize].put(hole));
        }
        let row = &mut self.rows[service as usize];
        let gone = row.entries.pop().expect("the slot being removed is in the service");
        row.reweigh(Some(gone.weight), None);
        self.places.remove(&(service, gone.backend));
        // The count first: nobody draws the last index when its slot goes.
        out.push(Change::PutService(row.value));
        out.push(Change::DeleteSlot(SlotKey { service, index: end }));
    }

    /// Moves a slot to the other section: a swap over the border.
    fn cross(&mut self, service: ServiceId, index: u32, to: Section, out: &mut Vec<Change>) {
        let value = &mut self.rows[service as usize].value;
        let border = match to {
            Section::Ready => {
                value.ready += 1;
                value.terminating -= 1;
                value.ready - 1
            }
            Section::Terminating => {
                value.ready -= 1;
                value.terminating += 1;
                value.ready
            }
        };
        if border != index {
            self.swap(service, index, border);
            let row = &self.rows[service as usize];
            out.extend([row.put(index), row.put(border)]);
        }
    }

    fn swap(&mut self, service: ServiceId, a: u32, b: u32) {
        let row = &mut self.rows[service as usize];
        row.entries.swap(a as usize, b as usize);
        for index in [a, b] {
            self.places.insert((service, row.entries[index as usize].backend), index);
        }
    }
}

impl Row {
    fn put(&self, index: u32) -> Change {
        let service = self.value.id;
        Change::PutSlot(SlotKey { service, index }, self.entries[index as usize].slot(service))
    }

    fn reweigh(&mut self, old: Option<u16>, new: Option<u16>) {
        if let Some(weight) = new {
            match self.weights.iter_mut().find(|(known, _)| *known == weight) {
                Some((_, count)) => *count += 1,
                None => self.weights.push((weight, 1)),
            }
        }
        if let Some(weight) = old
            && let Some((_, count)) = self.weights.iter_mut().find(|(known, _)| *known == weight)
        {
            *count -= 1;
            if *count == 0 {
                self.weights.retain(|(known, _)| *known != weight);
            }
        }
        self.value.max_weight = self.weights.iter().map(|(weight, _)| *weight).max().unwrap_or(0).into();
    }
}

impl Entry {
    fn slot(&self, service: ServiceId) -> Slot {
        Slot { backend: self.backend, generation: self.generation.into(), service, weight: self.weight.into() }
    }
}
