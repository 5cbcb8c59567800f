//! What signals and listeners said of backends, carried from maps of another layout into new ones.
//!
//! The control plane may learn of it seconds later; until then the word in the maps is all there is.

use std::{collections::HashMap, path::Path};

use dataplane_ebpf::{
    abi::{Addr, Backend, Endpoint},
    health::{Health, Input, State},
};

use super::{
    error::Error,
    mapped::MappedArray,
    maps::{Maps, checked},
    sys, writer,
};

/// The backends of an agent before, in maps that this agent does not adopt.
#[derive(Debug)]
pub struct Before {
    backends: MappedArray<Backend>,
    health: MappedArray<u64>,
}

impl Before {
    /// `None`: there are none, or a backend is laid out otherwise there.
    pub fn open(directory: &Path) -> Option<Self> {
        Some(Self { backends: open(directory, "BACKENDS")?, health: open(directory, "HEALTH")? })
    }

    /// Tells this agent's health words what those say beyond the control plane's word.
    pub fn carry_over(&self, maps: &Maps) -> Result<u32, Error> {
        let mut said: HashMap<(Addr, u16, u8), Input> = HashMap::new();
        for (id, word) in self.health.iter().skip(1) {
            let health = Health(word);
            let input = match health.state() {
                State::Draining if !health.terminating() => Input::StopSignal,
                State::Refusing if !health.terminating() => Input::ListenerClosed,
                _ => continue,
            };
            if let Some(backend) = self.backends.get(id) {
                said.insert(key(&backend.at), input);
            }
        }
        if said.is_empty() {
            return Ok(0);
        }
        let mut told = 0;
        for (id, backend) in maps.backends.iter().skip(1).filter(|(_, backend)| backend.generation != 0) {
            if let Some(input) = said.get(&key(&backend.at)) {
                writer::apply(maps, id, Some(backend.generation), *input)?;
                told += 1;
            }
        }
        Ok(told)
    }
}

const fn key(at: &Endpoint) -> (Addr, u16, u8) {
    (at.addr, at.port_be, at.proto)
}

fn open<T: aya::Pod>(directory: &Path, name: &'static str) -> Option<MappedArray<T>> {
    let map = sys::open_pin(&directory.join(name)).ok()?;
    let info = checked::<u32, T>(name, &map).ok()?;
    MappedArray::new(map, info.max_entries, false).ok()
}
