//! Performs changes: the one writer of the desired-state maps.
//!
//! Changes act in their order. Runs of writes to one hash map go in batches; before activation
//! (nobody reads the maps yet) writes to different maps need no order among them, so everything does.

use dataplane_ebpf::{
    abi::{Backend, Endpoint, Frontend, Slot, SlotKey},
    health::{Health, Input, State},
};

use aya::Pod;

use super::{
    error::Error,
    maps::{HashMap, Maps, size_key},
    sys,
};
use crate::registry::change::Change;

/// From this many on a batch costs less than single writes; also the most that go in one.
const BATCH_FROM: usize = 16;
const BATCH: usize = 1024;

/// A change that could not be made; all others were.
#[derive(Debug)]
pub struct Rejected {
    /// Its index in what was written.
    pub index: usize,
    pub error: Error,
}

/// Writes to one hash map that wait to go together.
struct Pending<K, V> {
    keys: Vec<K>,
    values: Vec<V>,
    indices: Vec<usize>,
}

impl<K: Pod, V: Pod> Pending<K, V> {
    const fn new() -> Self {
        Self { keys: Vec::new(), values: Vec::new(), indices: Vec::new() }
    }

    fn push(&mut self, index: usize, key: K, value: V) {
        self.indices.push(index);
        self.keys.push(key);
        self.values.push(value);
    }

    fn flush(&mut self, map: &HashMap, rejected: &mut Vec<Rejected>) {
        let mut at = 0;
        while at < self.keys.len() {
            let to = self.keys.len().min(at + BATCH);
            let written = if to - at < BATCH_FROM {
                sys::map_update(map.fd(), &self.keys[at], &self.values[at]).map_or_else(|e| Err((0, e)), |()| Ok(1))
            } else {
                sys::map_update_batch(map.fd(), &self.keys[at..to], &self.values[at..to]).map(|()| to - at)
            };
            match written {
                Ok(count) => at += count,
                Err((count, source)) => {
                    at += count;
                    if at < to {
                        let error = map.failed("an update", source);
                        rejected.push(Rejected { index: self.indices[at], error });
                        at += 1;
                    }
                }
            }
        }
        self.keys.clear();
        self.values.clear();
        self.indices.clear();
    }
}

/// One call of [`write`]: what is pending and what failed.
struct Writing<'a> {
    maps: &'a Maps,
    frontends: Pending<Endpoint, Frontend>,
    slots: Pending<SlotKey, Slot>,
    index: Pending<Endpoint, u32>,
    /// Health words to be set once the index entries are written.
    born: Vec<(u32, Health)>,
    rejected: Vec<Rejected>,
}

/// Which pending writes a change may join.
#[derive(PartialEq, Eq, Clone, Copy)]
enum Run {
    Frontends,
    Slots,
    Backends,
    None,
}

/// Performs every change but `Enroll` and `Release`.
pub fn write(maps: &Maps, live: bool, changes: &[Change]) -> Vec<Rejected> {
    let mut writing = Writing {
        maps,
        frontends: Pending::new(),
        slots: Pending::new(),
        index: Pending::new(),
        born: Vec::new(),
        rejected: Vec::new(),
    };
    let mut run = Run::None;
    for (index, change) in changes.iter().enumerate() {
        let next = match change {
            Change::PutFrontend(..) => Run::Frontends,
            Change::PutSlot(..) => Run::Slots,
            Change::AddBackend { .. } => Run::Backends,
            _ => Run::None,
        };
        let deletes = matches!(
            change,
            Change::DeleteFrontend(_) | Change::DeleteSlot(_) | Change::RemoveBackend { .. } | Change::Health { .. }
        );
        if (live && next != run) || deletes {
            writing.flush();
        }
        run = next;
        if let Err(error) = writing.perform(index, change) {
            writing.rejected.push(Rejected { index, error });
        }
    }
    writing.flush();
    let mut rejected = writing.rejected;
    rejected.sort_by_key(|rejected| rejected.index);
    rejected
}

impl Writing<'_> {
    fn flush(&mut self) {
        self.index.flush(&self.maps.backend_index, &mut self.rejected);
        for (id, health) in self.born.drain(..) {
            set_health(self.maps, id, health);
        }
        self.slots.flush(&self.maps.slots, &mut self.rejected);
        self.frontends.flush(&self.maps.frontends, &mut self.rejected);
    }

    fn perform(&mut self, index: usize, change: &Change) -> Result<(), Error> {
        let maps = self.maps;
        match change {
            Change::PutFrontend(at, frontend) => self.frontends.push(index, *at, *frontend),
            Change::DeleteFrontend(at) => drop(maps.frontends.delete(at)?),
            Change::PutService(service) => {
                if !maps.services.set(service.id, *service) {
                    return Err(out_of_range("SERVICES", service.id, maps.services.entries()));
                }
            }
            Change::DeleteService(id) => {
                if !maps.services.set(*id, Default::default()) {
                    return Err(out_of_range("SERVICES", *id, maps.services.entries()));
                }
            }
            Change::PutSlot(key, slot) => self.slots.push(index, *key, *slot),
            Change::DeleteSlot(key) => drop(maps.slots.delete(key)?),
            Change::AddBackend { id, backend, state } => self.add(index, *id, backend, *state)?,
            Change::UpdateBackend { id, backend } => {
                if !maps.backends.set(*id, *backend) {
                    return Err(out_of_range("BACKENDS", *id, maps.backends.entries()));
                }
            }
            Change::RemoveBackend { id, at } => {
                // The word stays, as Gone: its generation must not come again with the next life.
                apply(maps, *id, None, Input::Removed)?;
                // The address may belong to another backend already.
                if maps.backend_index.get::<_, u32>(at)? == Some(*id) {
                    maps.backend_index.delete(at)?;
                }
                maps.backends.set(*id, Backend::default());
            }
            Change::Health { id, generation, input } => drop(apply(maps, *id, Some(*generation), *input)?),
            Change::Enroll(_) | Change::Release(_) => {}
        }
        Ok(())
    }

    fn add(&mut self, index: usize, id: u32, backend: &Backend, state: State) -> Result<(), Error> {
        let maps = self.maps;
        if id >= maps.backends.entries() {
            return Err(out_of_range("BACKENDS", id, maps.backends.entries()));
        }
        set_health(maps, id, Health::new(State::Gone, backend.generation));
        maps.backends.set(id, *backend);
        self.index.push(index, backend.at, id);
        self.born.push((id, Health::new(state, backend.generation)));
        Ok(())
    }
}

fn set_health(maps: &Maps, id: u32, health: Health) {
    if let Some(word) = maps.health.word(id) {
        word.store(health.0, std::sync::atomic::Ordering::SeqCst);
    }
}

/// Applies what was learned to a health word against programs that do the same. The word before and
/// after; `None` if it is of another generation.
pub fn apply(maps: &Maps, id: u32, generation: Option<u32>, input: Input) -> Result<Option<(Health, Health)>, Error> {
    use std::sync::atomic::Ordering::SeqCst;
    let Some(word) = maps.health.word(id) else { return Err(out_of_range("HEALTH", id, maps.health.entries())) };
    let mut seen = word.load(SeqCst);
    loop {
        let before = Health(seen);
        if generation.is_some_and(|generation| before.generation() != generation & 0xffff) {
            return Ok(None);
        }
        let after = before.after(input);
        match word.compare_exchange(seen, after.0, SeqCst, SeqCst) {
            Ok(_) => return Ok(Some((before, after))),
            Err(now) => seen = now,
        }
    }
}

fn out_of_range(map: &'static str, id: u32, size: u32) -> Error {
    Error::OutOfRange { map, id, size, key: size_key(map) }
}
