//! Picks a backend of a service in the kernel: unbiased draws, then one bounded scan. The laws are `choose`'s.

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use dataplane_ebpf::{
    abi::{Addr, Backend, Endpoint, MAX_BACKENDS, MAX_TRIES, ServiceId, Settings, SlotKey, Stat},
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
    /// What it was taken as. [`Class::Probe`]: this connect is the one that probes it.
    pub class: Class,
    pub slot: u32,
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
        backend: 0,
        generation: 0,
        class: Class::Stale as u32,
        slot: 0,
        at: Endpoint::default(),
    };
    if hitless_choose(&raw mut choice) == 0 {
        return None;
    }
    let Choice { backend, generation, class, slot, at, .. } = choice;
    Some(Picked { backend, generation, class: Class::from_u32(class), slot, at })
}

/// Question and answer of [`hitless_choose`], on the caller's stack: a subprogram takes few arguments.
#[repr(C)]
pub struct Choice {
    service: ServiceId,
    layers: u32,
    suspect_ticks: u32,
    fail_open: u32,
    tried: [u32; MAX_TRIES],
    avoid: Addr,
    backend: u32,
    generation: u32,
    /// A [`Class`].
    class: u32,
    slot: u32,
    at: Endpoint,
}

// Before 6.3 a function may not be passed memory that was never written: no padding.
const _: () = assert!(size_of::<Choice>() == 84);

/// Fills in the answer and returns 1, or 0.
///
/// A global function (of BTF linkage): the verifier checks it once by itself, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_choose(choice: *mut Choice) -> u32 {
    // SAFETY: the verifier checks that callers pass a `Choice`, and asks for the comparison with null.
    let Some(choice) = (unsafe { choice.as_mut() }) else { return 0 };
    let Some(service) = SERVICES.get_ptr(choice.service) else { return 0 };
    // SAFETY: checked by the verifier; a torn read is harmless, each slot is checked by itself.
    let service = unsafe { cell::read(service) };
    if service.id != choice.service {
        return 0;
    }
    // SAFETY: a helper without arguments.
    let now = ticks(unsafe { bpf_ktime_get_ns() });
    let mask = random();
    let mut chosen = Seen::NONE;
    if service.ready > 0 {
        let mut skipped = 0;
        for _ in 0..DRAWS {
            skipped = cell::hide(skipped, mask);
            let index = choose::pick(random(), service.ready);
            let seen = Seen(hitless_look(choice, index, now, 0));
            // A slot that weighs the most needs no second draw.
            if seen.class() == STALE
                || (seen.weight() < service.max_weight && !choose::accept(random(), seen.weight(), service.max_weight))
            {
                continue;
            }
            if seen.class() == LIVE || (seen.class() == PROBE && win_probe(seen, now, choice.suspect_ticks)) {
                chosen = seen;
                choice.slot = index;
                break;
            }
            skipped = 1;
        }
        if skipped != 0 {
            count(Stat::Skipped);
        }
    }
    if chosen.backend() == 0 {
        chosen = scan(choice, service.ready, service.ready + service.terminating, now);
        // Number 0 is no backend, although all of its (zero) fields agree.
        if chosen.backend() == 0 {
            return 0;
        }
        match chosen.class() {
            LIVE => {}
            // Whoever loses the race for a probe here goes along with it: there is nothing better.
            PROBE => _ = win_probe(chosen, now, choice.suspect_ticks),
            DRAINING => count(Stat::ServingTerminating),
            _ => count(Stat::FailedOpen),
        }
    }
    let Some(backend) = backend(chosen.backend(), chosen.generation()) else { return 0 };
    choice.backend = chosen.backend();
    choice.generation = chosen.generation();
    choice.class = chosen.class();
    choice.at = backend.at;
    1
}

/// The best of up to [`SCAN`] slots from a random one on.
#[inline(always)]
fn scan(choice: &mut Choice, ready: u32, total: u32, now: u32) -> Seen {
    let start = choose::pick(random(), total);
    let mut best = 0;
    let mut chosen = Seen::NONE;
    for step in 0..SCAN {
        if step >= total {
            break;
        }
        let mut index = start + step;
        if index >= total {
            index -= total;
        }
        let seen = hitless_look(choice, index, now, (index >= ready) as u32);
        best = hitless_offer(best, seen);
        if best & TAKEN != 0 {
            chosen = Seen(seen);
            choice.slot = index;
        }
    }
    chosen
}

/// In the number that a scan keeps of [`Best`]: the slot just offered is the best one.
/// The total weight is in the lower 32 bits, and above it 5 - class, so that 0 is [`Best::NONE`].
const TAKEN: u64 = 1 << 63;

/// [`Best::offer`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_offer(best: u64, seen: u64) -> u64 {
    let seen = Seen(seen);
    let worst = Class::Stale as u32;
    let mut best = Best { class: Class::from_u32(worst - (((best >> 32) as u32) & 0x7)), total_weight: best as u32 };
    let taken = best.offer(Class::from_u32(seen.class()), seen.weight(), random());
    let known = (u64::from(worst - best.class as u32) << 32) | u64::from(best.total_weight);
    if taken { known | TAKEN } else { known }
}

/// What is in the slot, as a [`Seen`]; [`Seen::NONE`] when it is stale or ruled out. A global function too, so that its
/// result is just a number to the verifier, and the loops around it have one path each.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_look(choice: *const Choice, index: u32, now: u32, terminating: u32) -> u64 {
    // SAFETY: as in `hitless_choose`.
    let Some(choice) = (unsafe { choice.as_ref() }) else { return Seen::NONE.0 };
    let key = SlotKey { service: choice.service, index };
    let seen = SLOTS.get_ptr(key).and_then(|slot| {
        // SAFETY: checked by the verifier; the service and the generation tell a torn read.
        let slot = unsafe { cell::read(slot) };
        let class = health(slot.backend)?.seen(slot.generation, now, choice.layers, terminating != 0) as u32;
        let backend = backend(slot.backend, slot.generation)?;
        (slot.service == choice.service && class != Class::Stale as u32).then_some((slot, class, backend))
    });
    let Some((slot, class, backend)) = seen else {
        count(Stat::StaleSlot);
        return Seen::NONE.0;
    };
    let [a, b, c, d] = choice.tried;
    let id = slot.backend;
    let ruled_out = id == a || id == b || id == c || id == d || backend.at.addr == choice.avoid;
    if ruled_out || (class == REFUSING && choice.fail_open == 0) {
        return Seen::NONE.0;
    }
    Seen::new(id, slot.generation, slot.weight, class).0
}

/// A slot whose backend exists, in the slot's own generation, in one number: backend (24 bits),
/// class (8), weight (16), generation (16).
#[derive(Clone, Copy)]
struct Seen(u64);

impl Seen {
    const NONE: Self = Self((STALE as u64) << 32);

    #[inline(always)]
    fn new(backend: u32, generation: u32, weight: u32, class: u32) -> Self {
        let high = (backend << 8) | (class & 0xff);
        let low = (weight << 16) | (generation & 0xffff);
        Self((u64::from(high) << 32) | u64::from(low))
    }

    #[inline(always)]
    fn backend(self) -> u32 {
        (self.0 >> 40) as u32
    }

    #[inline(always)]
    fn class(self) -> u32 {
        (self.0 >> 32) as u32 & 0xff
    }

    #[inline(always)]
    fn weight(self) -> u32 {
        self.0 as u32 >> 16
    }

    #[inline(always)]
    fn generation(self) -> u32 {
        self.0 as u32 & 0xffff
    }
}

const _: () = assert!(MAX_BACKENDS <= 1 << 24, "a backend's number must fit into Seen");
const LIVE: u32 = Class::Live as u32;
const PROBE: u32 = Class::Probe as u32;
const DRAINING: u32 = Class::Draining as u32;
const REFUSING: u32 = Class::Refusing as u32;
const STALE: u32 = Class::Stale as u32;

/// Lets one connect among many probe a suspect backend whose term is over: 1 for that one.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_win_probe(backend: u32, generation: u32, now: u32, suspect_ticks: u32) -> u32 {
    let Some(word) = HEALTH.get_ptr_mut(backend) else { return 0 };
    // SAFETY: checked by the verifier.
    let old = Health(unsafe { cell::read(word) });
    if !matches!(old.class(generation, now), Class::Probe) {
        return 0;
    }
    // SAFETY: checked by the verifier.
    unsafe { cell::exchange(word, old.0, old.probed(now, suspect_ticks).0) as u32 }
}

/// Lets one connect among many probe a backend that somebody holds on to.
#[inline(always)]
pub fn probe(settings: &Settings, backend: u32, generation: u32, now: u32) -> bool {
    hitless_win_probe(backend, generation, now, settings.suspect_ticks) != 0
}

#[inline(always)]
fn win_probe(seen: Seen, now: u32, suspect_ticks: u32) -> bool {
    hitless_win_probe(seen.backend(), seen.generation(), now, suspect_ticks) != 0
}

/// No slot.
pub const NO_SLOT: u32 = u32::MAX;

/// The slot of `service` that names the backend: `likely`, or else one of the first [`SCAN`].
/// [`NO_SLOT`]: the service has it no more, as far as that tells.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_slot_of(service: ServiceId, backend: u32, likely: u32) -> u32 {
    let Some(entry) = SERVICES.get_ptr(service) else { return NO_SLOT };
    // SAFETY: checked by the verifier.
    let entry = unsafe { cell::read(entry) };
    let total = entry.ready + entry.terminating;
    if likely < total && names(service, likely, backend) {
        return likely;
    }
    for index in 0..SCAN {
        if index >= total {
            break;
        }
        if names(service, index, backend) {
            return index;
        }
    }
    NO_SLOT
}

#[inline(always)]
fn names(service: ServiceId, index: u32, backend: u32) -> bool {
    let Some(slot) = SLOTS.get_ptr(SlotKey { service, index }) else { return false };
    // SAFETY: checked by the verifier.
    let slot = unsafe { cell::read(slot) };
    slot.service == service && slot.backend == backend
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
