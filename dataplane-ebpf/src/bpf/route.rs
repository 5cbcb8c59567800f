//! Where a connect or a datagram goes: service or gateway group, affinity, then a choice.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_ktime_get_coarse_ns};
use dataplane_ebpf::{
    abi::{
        Addr, Affinity, AffinityKey, Endpoint, MAX_TRIES, POD_GATEWAY, Pod, SERVICE_PINNED, SOCKET_DIRECT,
        SOCKET_PROBE, Service, ServiceId, Settings, Socket, Stat,
    },
    health::{Class, ticks},
};

use crate::{
    cell,
    maps::{AFFINITY, BACKEND_INDEX, FRONTENDS, SERVICES, count},
    pick::{NO_SLOT, backend, health, hitless_slot_of, pick, probe},
};

/// Where it goes.
#[derive(Clone, Copy)]
pub struct Route {
    /// 0: translated, but never moved (a pinned service).
    pub service: ServiceId,
    pub backend: u32,
    pub generation: u32,
    pub slot: u32,
    /// `SOCKET_*`.
    pub flags: u32,
    pub at: Endpoint,
}

impl Route {
    /// To no backend.
    pub const NONE: Self =
        Self { service: 0, backend: 0, generation: 0, slot: NO_SLOT, flags: 0, at: Endpoint::new(Addr([0; 4]), 0, 0) };
}

/// Whoever asks.
pub struct Client<'a> {
    pub settings: &'a Settings,
    pub netns_cookie: u64,
    pub pod: Pod,
}

/// A backend that is used unless there is a better one.
#[derive(Clone, Copy, Default)]
pub struct Present {
    pub backend: u32,
    pub generation: u32,
    /// The service's slot that named it.
    pub slot: u32,
}

/// The service that `to` is a frontend of.
#[inline(always)]
pub fn frontend(to: &Endpoint) -> Option<Service> {
    let found = FRONTENDS.get_ptr(to)?;
    // SAFETY: checked by the verifier; `check` tells a torn read.
    let found = unsafe { cell::read(found) };
    if found.check != to.check() {
        return None;
    }
    service(found.service)
}

/// For a gateway's client: the group that the pod's address `to` is in, and the pod itself.
#[inline(always)]
pub fn gateway_target(client: &Client<'_>, to: &Endpoint) -> Option<(Service, Present)> {
    if client.pod.flags & POD_GATEWAY == 0 {
        return None;
    }
    let id = BACKEND_INDEX.get_ptr(to)?;
    // SAFETY: checked by the verifier.
    let id = unsafe { cell::read(id) };
    let generation = health(id)?.generation();
    let backend = backend(id, generation)?;
    if backend.at != *to || backend.group == 0 {
        return None;
    }
    let group = service(backend.group)?;
    (group.flags & SERVICE_PINNED == 0).then_some((group, Present { backend: id, generation, slot: 0 }))
}

/// The backend at `at`.
#[inline(always)]
pub fn present_at(at: &Endpoint) -> Present {
    let found = BACKEND_INDEX.get_ptr(at).and_then(|id| {
        // SAFETY: checked by the verifier.
        let id = unsafe { cell::read(id) };
        let generation = health(id)?.generation();
        (backend(id, generation)?.at == *at).then_some(Present { backend: id, generation, slot: 0 })
    });
    found.unwrap_or_default()
}

/// Gives a connect that began under other maps its numbers in these: an upgrade moves the programs one by one.
/// Returns 1, or 0: its service is not here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_adopt(socket: *mut Socket, maps: u32) -> u32 {
    // SAFETY: the verifier checks what callers pass.
    let Some(socket) = (unsafe { socket.as_mut() }) else { return 0 };
    // Before 6.2 a key must be on the stack.
    let mut at = socket.peer;
    let Present { backend: id, generation, .. } = present_at(&at);
    at = socket.original;
    let service = if socket.flags & SOCKET_DIRECT == 0 {
        frontend(&at).map_or(0, |service| service.id)
    } else {
        let Present { backend: id, generation, .. } = present_at(&at);
        backend(id, generation).map_or(0, |backend| backend.group)
    };
    socket.service = service;
    socket.backend = id;
    socket.generation = generation;
    socket.tried = [id, 0, 0, 0];
    socket.maps = maps;
    (service != 0) as u32
}

#[inline(always)]
fn service(id: ServiceId) -> Option<Service> {
    let found = SERVICES.get_ptr(id)?;
    // SAFETY: checked by the verifier; every use of the counts is checked by itself.
    let found = unsafe { cell::read(found) };
    (found.id == id && id != 0).then_some(found)
}

/// Chooses a backend of `service`. `present` (backend 0: none) is kept while nothing is better.
#[inline(always)]
pub fn route(client: &Client<'_>, service: &Service, present: Present, direct: bool) -> Option<Route> {
    let settings = client.settings;
    // To the jiffy is fine enough for whom somebody holds on to, and spares reading the hardware's clock (40 ns).
    // SAFETY: a helper without arguments.
    let now_ns = unsafe { bpf_ktime_get_coarse_ns() };
    let now = ticks(now_ns);
    let key = AffinityKey { netns_cookie: client.netns_cookie, service: service.id, _pad: 0 };
    let sticky = present.backend == 0 && service.affinity_s != 0;
    let mut present = if sticky { remembered(&key, service.affinity_s, now_ns) } else { present };
    // A pod that is alive but not ready has left the service. A gateway that names one knows why.
    if present.backend != 0 && !direct {
        present.slot = hitless_slot_of(service.id, present.backend, present.slot);
        if present.slot == NO_SLOT {
            present = Present::default();
        }
    }
    let class = match health(present.backend) {
        Some(word) if present.backend != 0 => word.seen(present.generation, now, settings.layers, false),
        _ => Class::Stale,
    };
    let keep = match class {
        Class::Live => true,
        Class::Probe => probe(settings, present.backend, present.generation, now),
        _ => false,
    };
    let mut chosen = present;
    let mut taken_as = class;
    if keep {
        if sticky {
            count(Stat::AffinityHit);
        }
    } else {
        // A number that was given to another backend meanwhile is as good as any.
        let left = if matches!(class, Class::Stale) { 0 } else { present.backend };
        let tried: [u32; MAX_TRIES] = [left, 0, 0, 0];
        match pick(settings, service.id, &tried, &Addr([0; 4]), true) {
            // An equal is no reason to leave: datagrams would alternate between two draining backends.
            Some(picked) if (picked.class as u8) < class as u8 => {
                chosen = Present { backend: picked.backend, generation: picked.generation, slot: picked.slot };
                taken_as = picked.class;
            }
            _ if !matches!(class, Class::Stale) => {}
            _ => return None,
        }
    }
    let at = backend(chosen.backend, chosen.generation)?.at;
    if service.affinity_s != 0 {
        let Present { backend, generation, slot } = chosen;
        let entry = Affinity { backend, generation, slot, _pad: 0, last_used_ns: now_ns };
        if AFFINITY.insert(key, entry, u64::from(BPF_ANY)).is_err() {
            count(Stat::MapFull);
        }
    }
    let mut flags = 0;
    if direct {
        flags |= SOCKET_DIRECT;
    }
    if matches!(taken_as, Class::Probe) {
        flags |= SOCKET_PROBE;
    }
    let pinned = service.flags & SERVICE_PINNED != 0;
    Some(Route {
        service: if pinned { 0 } else { service.id },
        backend: chosen.backend,
        generation: chosen.generation,
        slot: chosen.slot,
        flags,
        at,
    })
}

/// The backend that this client used last, if that is not too long ago.
#[inline(always)]
fn remembered(key: &AffinityKey, affinity_s: u32, now_ns: u64) -> Present {
    let Some(entry) = AFFINITY.get_ptr(key) else { return Present::default() };
    // SAFETY: checked by the verifier; the generation tells a torn read.
    let entry = unsafe { cell::read(entry) };
    // Another CPU may have used it after this one looked at the clock.
    if now_ns.saturating_sub(entry.last_used_ns) > u64::from(affinity_s) * 1_000_000_000 {
        return Present::default();
    }
    Present { backend: entry.backend, generation: entry.generation, slot: entry.slot }
}
