//! What signals and listeners said of backends, carried from maps of another layout into new ones.
//!
//! The control plane may learn of it seconds later; until then the word in the maps is all there is.

use std::{collections::HashMap, os::fd::AsFd, path::Path, sync::atomic::Ordering};

use dataplane_ebpf::{
    abi::{Addr, Backend, Endpoint},
    health::{Health, Input, State},
};

use super::{error::Error, mapped::MappedArray, maps::Maps, sys, writer};

/// The backends of an agent before, in maps that this agent does not adopt.
#[derive(Debug)]
pub struct Before {
    backends: MappedArray<Backend>,
    health: MappedArray<u64>,
}

impl Before {
    /// `None`: there are none, or a backend is laid out otherwise there.
    pub fn open(directory: &Path) -> Option<Self> {
        Some(Self { backends: open(&directory.join("BACKENDS"))?, health: open(&directory.join("HEALTH"))? })
    }

    /// Tells this agent's health words what those say beyond the control plane's word.
    pub fn carry_over(&self, maps: &Maps) -> Result<u32, Error> {
        let mut said: HashMap<(Addr, u16, u8), Input> = HashMap::new();
        for id in 1..self.backends.entries().min(self.health.entries()) {
            let Some(word) = self.health.word(id) else { break };
            let health = Health(word.load(Ordering::SeqCst));
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
        for id in 1..maps.backends.entries() {
            let Some(backend) = maps.backends.get(id).filter(|backend| backend.generation != 0) else { continue };
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

fn open<T: aya::Pod>(pin: &Path) -> Option<MappedArray<T>> {
    let map = sys::open_pin(pin).ok()?;
    let info = sys::map_info(map.as_fd()).ok()?;
    if info.value_size as usize != size_of::<T>() {
        return None;
    }
    MappedArray::new(map, info.max_entries, false).ok()
}
