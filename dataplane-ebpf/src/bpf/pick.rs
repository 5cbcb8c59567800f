//! Picks a backend of a service in the kernel: unbiased draws, then one bounded scan. The laws are `choose`'s.

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use dataplane_ebpf::{
    abi::{Addr, Backend, Endpoint, MAX_TRIES, ServiceId, Settings, Slot, SlotKey, Stat},
    choose::{self, Best, DRAWS, SCAN},
    health::{Class, Health, ticks},
};

use crate::{
    cell,
    maps::{BACKENDS, HEALTH, SERVICES, SLOTS, count},
};

/// The backend to use.
pub struct Picked {
    pub backend: u32,
    pub generation: u32,
    /// This connect is the one that probes a suspect backend.
    pub probe: bool,
    pub at: Endpoint,
}

/// A backend of `service` that is not among `tried` (0: none) and not at the address `avoid`
/// (zero: none). Of refusing ones only if `fail_open`.
#[inline(always)]
pub fn pick(
    settings: &Settings,
    service: ServiceId,
    tried: &[u32; MAX_TRIES],
    avoid: &Addr,
    fail_open: bool,
) -> Option<Picked> {
    let mut choice = Choice {
        service,
        layers: settings.layers,
        suspect_ticks: settings.suspect_ticks,
        fail_open: fail_open as u32,
        tried: *tried,
        avoid: *avoid,
        picked: Seen { backend: 0, generation: 0, class: Class::Stale as u32, weight: 0, at: Endpoint::default() },
    };
    if choose_backend(&mut choice) == 0 {
        return None;
    }
    let Seen { backend, generation, class, at, .. } = choice.picked;
    Some(Picked { backend, generation, probe: class == Class::Probe as u32, at })
}

/// Question and answer of [`choose_backend`], on the caller's stack: a subprogram takes few arguments.
#[repr(C)]
struct Choice {
    service: ServiceId,
    layers: u32,
    suspect_ticks: u32,
    fail_open: u32,
    tried: [u32; MAX_TRIES],
    avoid: Addr,
    picked: Seen,
}

/// A slot whose backend exists, in the slot's own generation.
#[derive(Clone, Copy)]
#[repr(C)]
struct Seen {
    backend: u32,
    generation: u32,
    weight: u32,
    /// A [`Class`].
    class: u32,
    at: Endpoint,
}

/// Fills `choice.picked` and returns 1, or 0. One subprogram, so that each program carries it once.
#[inline(never)]
fn choose_backend(choice: &mut Choice) -> u32 {
    let Some(service) = SERVICES.get_ptr(choice.service) else { return 0 };
    // SAFETY: checked by the verifier; a torn read is harmless, each slot is checked by itself.
    let service = unsafe { cell::read(service) };
    if service.id != choice.service {
        return 0;
    }
    // SAFETY: a helper without arguments.
    let now = ticks(unsafe { bpf_ktime_get_ns() });
    let mask = random();
    let mut skipped = 0;
    if service.ready > 0 {
        for _ in 0..DRAWS {
            skipped = cell::hide(skipped, mask);
            let index = choose::pick(random(), service.ready);
            let Some(seen) = look(choice, index, now, false, mask) else { continue };
            // A slot that weighs the most needs no second draw.
            if seen.weight < service.max_weight && !choose::accept(random(), seen.weight, service.max_weight) {
                continue;
            }
            if seen.class == Class::Live as u32
                || (seen.class == Class::Probe as u32 && win_probe(&seen, now, choice.suspect_ticks))
            {
                if skipped != 0 {
                    count(Stat::Skipped);
                }
                choice.picked = seen;
                return 1;
            }
            skipped = 1;
        }
    }
    let total = service.ready + service.terminating;
    let start = choose::pick(random(), total);
    let mut best = Best::NONE;
    for step in 0..SCAN {
        if step >= total {
            break;
        }
        let mut index = start + step;
        if index >= total {
            index -= total;
        }
        let Some(mut seen) = look(choice, index, now, index >= service.ready, mask) else { continue };
        if seen.class == Class::Probe as u32 {
            if win_probe(&seen, now, choice.suspect_ticks) {
                choice.picked = seen;
                return 1;
            }
            seen.class = Class::Suspect as u32;
        }
        if seen.class == Class::Refusing as u32 && choice.fail_open == 0 {
            continue;
        }
        best.offer(seen.class, seen.backend, seen.generation, seen.weight, random());
        best.class = cell::hide(best.class, mask);
    }
    if !best.is_some() {
        return 0;
    }
    if best.class == Class::Draining as u32 {
        count(Stat::ServingTerminating);
    } else if best.class != Class::Live as u32 {
        count(Stat::FailedOpen);
    }
    let Some(backend) = backend(best.backend, best.generation) else { return 0 };
    choice.picked =
        Seen { backend: best.backend, generation: best.generation, weight: 0, class: best.class, at: backend.at };
    1
}

/// What is in the slot, unless it is stale or ruled out.
#[inline(always)]
fn look(choice: &Choice, index: u32, now: u32, terminating: bool, mask: u32) -> Option<Seen> {
    let key = SlotKey { service: choice.service, index };
    let Some(slot) = SLOTS.get_ptr(key) else {
        count(Stat::StaleSlot);
        return None;
    };
    // SAFETY: checked by the verifier; the service and the generation tell a torn read.
    let Slot { backend: id, generation, service, weight } = unsafe { cell::read(slot) };
    if service != choice.service {
        count(Stat::StaleSlot);
        return None;
    }
    let [a, b, c, d] = choice.tried;
    if id == a || id == b || id == c || id == d {
        return None;
    }
    let class = health(id)?.seen(generation, now, choice.layers, terminating) as u32;
    let class = cell::hide(class, mask);
    let Some(backend) = backend(id, generation) else {
        count(Stat::StaleSlot);
        return None;
    };
    if class == Class::Stale as u32 {
        count(Stat::StaleSlot);
        return None;
    }
    if backend.at.addr == choice.avoid {
        return None;
    }
    Some(Seen { backend: id, generation, weight, class, at: backend.at })
}

/// The one connect among many that may probe a suspect backend whose term is over.
#[inline(always)]
fn win_probe(seen: &Seen, now: u32, suspect_ticks: u32) -> bool {
    let Some(word) = HEALTH.get_ptr_mut(seen.backend) else { return false };
    // SAFETY: checked by the verifier.
    let old = Health(unsafe { cell::read(word) });
    if !matches!(old.class(seen.generation, now), Class::Probe) {
        return false;
    }
    // SAFETY: checked by the verifier.
    unsafe { cell::exchange(word, old.0, old.probed(now, suspect_ticks).0) }
}

/// A backend's health word.
#[inline(always)]
pub fn health(backend: u32) -> Option<Health> {
    let word = HEALTH.get_ptr(backend)?;
    // SAFETY: checked by the verifier.
    Some(Health(unsafe { cell::read(word) }))
}

/// The backend of that number, if it is of that generation and was not rewritten while it was read.
#[inline(always)]
pub fn backend(id: u32, generation: u32) -> Option<Backend> {
    let found = BACKENDS.get_ptr(id)?;
    // SAFETY: checked by the verifier; whether it is torn is checked below.
    let found = unsafe { cell::read(found) };
    let same = (found.generation ^ generation) & 0xffff == 0;
    // The writer takes the word's generation away before it touches the backend.
    (same && health(id)?.generation() == generation & 0xffff).then_some(found)
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_prandom_u32() }
}
