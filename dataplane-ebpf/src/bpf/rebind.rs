//! Moving a connect to another backend of the same service, and what is known of moved flows.

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock, bpf_sock_tuple},
    helpers::{bpf_ktime_get_coarse_ns, bpf_sk_fullsock, bpf_sk_release, bpf_skc_lookup_tcp},
};
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};
use dataplane_ebpf::{
    abi::{
        CAUSE_COLLISION, CAUSE_ICMP, CAUSE_RST, CAUSE_SILENT, EVENT_EXHAUSTED, EVENT_REBOUND, Endpoint, Event, FlowKey,
        LAYER_REBIND, MAX_TRIES, REBIND_NODE, REBIND_RST, ROLE_FORWARD, ROLE_REVERSE, ROLE_STALE, Rebind,
        SERVICE_PINNED, SOCKET_ESTABLISHED, SOCKET_PROBE, SOCKET_REBOUND, Settings, Socket, Stat,
    },
    flow::{Way, closing},
    health::Class,
};

use crate::{
    cell,
    events::emit,
    maps::{REBINDS, REBOUND, SERVICES, SOCKETS, count, settings, stored},
    pick::pick,
    route::hitless_adopt,
    skb::Segment,
    suspect,
};

const TCP_SYN_SENT: u32 = 2;
const TCP_TIME_WAIT: u32 = 6;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
const BPF_F_CURRENT_NETNS: u64 = u64::MAX;

const ECONNREFUSED: u32 = 111;
const EHOSTUNREACH: u32 = 113;
const ETIMEDOUT: u32 = 110;

/// An entry's `last_seen_ns` is as exact as this: fewer writes to a line that other CPUs read.
const TOUCH_NS: u64 = 1_000_000_000;

/// How a move went.
pub mod moved {
    /// To `to`.
    pub const YES: u32 = 1;
    /// Another CPU is moving it right now.
    pub const BUSY: u32 = 2;
    /// It stays: the layer is off, or nothing is left.
    pub const NO: u32 = 0;
}

/// Is any flow moved at all?
#[inline(always)]
pub fn any_rebound() -> bool {
    match REBOUND.get_ptr(0) {
        // SAFETY: checked by the verifier.
        Some(n) => unsafe { cell::read(n) != 0 },
        None => false,
    }
}

/// The entry of a key, if any flow is moved at all; the node's, or the pods'.
#[inline(always)]
pub fn entry(key: &FlowKey, node: bool) -> Option<*mut Rebind> {
    let found = if any_rebound() { REBINDS.get_ptr_mut(key)? } else { return None };
    // SAFETY: checked by the verifier.
    let nodes = unsafe { cell::read(&raw const (*found).closing) } & REBIND_NODE != 0;
    if nodes == node { Some(found) } else { None }
}

/// Reads an entry into `to`, its other half; returns its role and ISN. No entry is role 0.
#[inline(always)]
pub fn describe(entry: Option<*mut Rebind>, to: &mut Endpoint) -> (u8, u32) {
    let Some(entry) = entry else { return (0, 0) };
    // SAFETY: checked by the verifier; entries are replaced as a whole, so this is one entry's.
    unsafe {
        to.addr = (*entry).to;
        to.port_be = (*entry).to_port_be;
        (cell::read(&raw const (*entry).role), (*entry).isn)
    }
}

/// The same client and another peer.
#[inline(always)]
pub fn with_peer(flow: &FlowKey, peer: &Endpoint) -> FlowKey {
    FlowKey { client: flow.client, peer: peer.addr, client_port_be: flow.client_port_be, peer_port_be: peer.port_be }
}

/// Writes down that a packet of the flow passed. `to` is the other half of the entry.
#[inline(always)]
pub fn touch(entry: *mut Rebind, way: Way, segment: &Segment, to: &Endpoint) {
    touch_time(entry);
    // SAFETY: checked by the verifier; a lost race costs a flag, which the next packet repeats.
    unsafe {
        let before = cell::read(&raw const (*entry).closing);
        let after = closing(before, way, segment.flags, segment.payload != 0);
        if after != before {
            (&raw mut (*entry).closing).write_volatile(after);
            hitless_mirror(&raw const segment.flow, to, u32::from(matches!(way, Way::In)), u32::from(after));
        }
    }
}

/// Writes down when a packet passed.
#[inline(always)]
pub fn touch_time(entry: *mut Rebind) {
    // SAFETY: a helper without arguments; the pointer is checked by the verifier.
    unsafe {
        let now = bpf_ktime_get_coarse_ns();
        if now.wrapping_sub(cell::read(&raw const (*entry).last_seen_ns)) > TOUCH_NS {
            (&raw mut (*entry).last_seen_ns).write_volatile(now);
        }
    }
}

/// Writes `closing` into the other half of an entry, so that either tells whether the flow has ended.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hitless_mirror(flow: *const FlowKey, to: *const Endpoint, incoming: u32, closing: u32) -> u32 {
    // SAFETY: the verifier checks what callers pass.
    let (Some(flow), Some(to)) = (unsafe { (flow.as_ref(), to.as_ref()) }) else { return 0 };
    let mut key = with_peer(flow, to);
    if incoming == 0 {
        key = key.reversed();
    }
    let Some(other) = REBINDS.get_ptr_mut(key) else { return 0 };
    // SAFETY: checked by the verifier; one byte.
    unsafe { (&raw mut (*other).closing).write_volatile(closing as u8) };
    1
}

/// Forgets an entry of `flow`, on the way out or, with `incoming`, on the way in, together with its other half.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_forget(flow: *const FlowKey, incoming: u32) -> u32 {
    // SAFETY: the verifier checks what callers pass.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return 0 };
    // Before 6.2 a key must be on the stack.
    let mut key = if incoming != 0 { flow.reversed() } else { *flow };
    let mut to = Endpoint::default();
    let (role, isn) = describe(REBINDS.get_ptr_mut(key), &mut to);
    if role == 0 {
        return 0;
    }
    // Gone already is as good.
    let _ = REBINDS.remove(key);
    key = with_peer(flow, &to);
    if incoming == 0 {
        key = key.reversed();
    }
    let (other_role, other_isn) = describe(REBINDS.get_ptr_mut(key), &mut to);
    if other_role != 0 && other_isn == isn && to.addr == flow.peer && to.port_be == flow.peer_port_be {
        let _ = REBINDS.remove(key);
    }
    1
}

/// What the socket of a tuple is.
pub struct Found {
    /// TCP state; 0 is no socket.
    pub state: u32,
    /// Its storage, if it is connecting; or null.
    pub storage: *mut Socket,
}

/// The socket of this network namespace that is connected, or connecting, from `flow.client` to `flow.peer`.
#[inline(always)]
pub fn socket_of(skb: *mut __sk_buff, flow: &FlowKey) -> Found {
    let mut found = Found { state: 0, storage: core::ptr::null_mut() };
    // The remote end is the source, as of a packet that comes in.
    let sk = if flow.client.is_v4() {
        let mut tuple = [flow.peer.0[3], flow.client.0[3], ports(flow)];
        lookup(skb, &mut tuple)
    } else {
        let ([p0, p1, p2, p3], [c0, c1, c2, c3]) = (flow.peer.0, flow.client.0);
        let mut tuple = [p0, p1, p2, p3, c0, c1, c2, c3, ports(flow)];
        lookup(skb, &mut tuple)
    };
    if sk.is_null() {
        return found;
    }
    // SAFETY: not null; the reference is released below, the storage outlives it (RCU).
    unsafe {
        found.state = (*sk).state;
        if found.state == TCP_SYN_SENT {
            found.storage = storage(sk);
        }
        bpf_sk_release(sk.cast());
    }
    found
}

#[inline(always)]
fn ports(flow: &FlowKey) -> u32 {
    let ([a, b], [c, d]) = (flow.peer_port_be.to_ne_bytes(), flow.client_port_be.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

#[inline(always)]
fn lookup<const N: usize>(skb: *mut __sk_buff, tuple: &mut [u32; N]) -> *mut bpf_sock {
    // SAFETY: a helper on the context; the tuple is laid out as the kernel's of that size.
    unsafe {
        bpf_skc_lookup_tcp(
            skb.cast(),
            tuple.as_mut_ptr().cast::<bpf_sock_tuple>(),
            size_of::<[u32; N]>() as u32,
            BPF_F_CURRENT_NETNS,
            0,
        )
    }
}

/// The storage of a full socket, or null.
///
/// # Safety
/// `sk` must be a socket that the verifier knows as not null.
#[inline(always)]
unsafe fn storage(sk: *mut bpf_sock) -> *mut Socket {
    // SAFETY: the caller's promise.
    unsafe {
        let full = bpf_sk_fullsock(sk);
        if full.is_null() {
            return core::ptr::null_mut();
        }
        stored(&SOCKETS, full).map_or(core::ptr::null_mut(), core::ptr::from_mut)
    }
}

/// The socket that sends this packet, as far as it is connecting.
#[inline(always)]
pub fn sender(sk: *mut bpf_sock) -> Found {
    let mut found = Found { state: 0, storage: core::ptr::null_mut() };
    if sk.is_null() {
        return found;
    }
    // SAFETY: not null.
    unsafe {
        found.state = (*sk).state;
        if found.state == TCP_SYN_SENT {
            found.storage = storage(sk);
        }
    }
    found
}

impl Found {
    #[inline(always)]
    pub const fn connecting(&self) -> bool {
        self.state == TCP_SYN_SENT
    }

    /// Is it a connection that packets may come for?
    #[inline(always)]
    const fn alive(&self) -> bool {
        !matches!(self.state, 0 | TCP_TIME_WAIT | TCP_CLOSE | TCP_LISTEN)
    }
}

/// Is it a connect of ours, not yet answered?
#[inline(always)]
pub fn is_ours(settings: &Settings, socket: *mut Socket) -> bool {
    // SAFETY: the caller has checked that it is not null.
    unsafe {
        cell::read(&raw const (*socket).service) != 0
            && cell::read(&raw const (*socket).flags) & SOCKET_ESTABLISHED == 0
            && (cell::read(&raw const (*socket).maps) == settings.maps || hitless_adopt(socket, settings.maps) != 0)
    }
}

/// Does this network namespace have a connection from `flow.client` to `flow.peer`? Returns 1, or 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_alive(skb: *mut __sk_buff, flow: *const FlowKey) -> u32 {
    // SAFETY: the verifier checks what callers pass.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return 0 };
    u32::from(socket_of(skb, flow).alive())
}

/// Where a connect is moved to.
#[repr(C)]
pub struct Target {
    /// The flow there.
    pub flow: FlowKey,
    pub backend: u32,
    pub generation: u32,
    /// This connect probes a suspect backend.
    pub probe: u32,
    /// A backend passed over in this move, because the tuple is not free.
    passed: u32,
    /// What the flow's entries are marked with: [`REBIND_NODE`] or nothing.
    pub mark: u32,
}

/// Moves the connect of `socket` to another backend. `flow` is what the socket believes; `target` gets the
/// new one. Returns [`moved`].
#[inline(always)]
pub fn move_flow<const NODE: bool>(
    skb: *mut __sk_buff,
    socket: *mut Socket,
    flow: &FlowKey,
    cause: u32,
    target: &mut Target,
) -> u32 {
    // SAFETY: the verifier checks the storage.
    let replays = unsafe { cell::read(&raw const (*socket).replays) };
    match hitless_claim(socket, replays, cause) {
        moved::YES => {}
        other => return other,
    }
    target.passed = 0;
    target.mark = if NODE { u32::from(REBIND_NODE) } else { 0 };
    // First without the leftovers of finished flows, whose backend may still hold the connection in TIME-WAIT;
    // then over them.
    for attempt in 0..3 {
        if attempt == 2 {
            target.passed = 0;
        }
        if hitless_choose_again(socket, flow, target) == 0 {
            continue;
        }
        if hitless_free(skb, &raw const target.flow, u32::from(attempt == 2)) != 0 {
            return hitless_bind(socket, flow, target, cause);
        }
        target.passed = target.backend;
    }
    // SAFETY: the verifier checks the storage; the claim is ours.
    unsafe { (&raw mut (*socket).replays).write_volatile(replays) };
    hitless_exhausted(socket, cause);
    moved::NO
}

/// Says that the present backend failed, and takes the one right to move the connect: two answers at once on two
/// CPUs must not make two moves. Returns [`moved`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hitless_claim(socket: *mut Socket, replays: u32, cause: u32) -> u32 {
    // SAFETY: the verifier checks what callers pass.
    let Some(known) = (unsafe { socket.as_ref() }) else { return moved::NO };
    let Some(settings) = settings() else { return moved::NO };
    let Some(service) = SERVICES.get_ptr(known.service) else { return moved::NO };
    // SAFETY: checked by the verifier.
    let pinned = unsafe { cell::read(&raw const (*service).flags) } & SERVICE_PINNED != 0;
    if pinned || settings.layers & LAYER_REBIND == 0 {
        return moved::NO;
    }
    if cause != CAUSE_COLLISION {
        let errno = match cause {
            CAUSE_RST => ECONNREFUSED,
            CAUSE_ICMP => EHOSTUNREACH,
            _ => ETIMEDOUT,
        };
        suspect::failed(settings, known.backend, known.generation, known.service, known.netns_cookie, errno);
    }
    if replays >= settings.max_replays || replays as usize + 1 >= MAX_TRIES {
        hitless_exhausted(socket, cause);
        return moved::NO;
    }
    // SAFETY: not null; BPF_CMPXCHG exists since 5.12.
    let ours = unsafe {
        let word = &raw mut (*socket).replays;
        atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, replays, replays + 1).1
    };
    if ours { moved::YES } else { moved::BUSY }
}

/// Tells that a connect stays with its last backend, which does not answer.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hitless_exhausted(socket: *const Socket, cause: u32) -> u32 {
    // SAFETY: the verifier checks what callers pass.
    let Some(socket) = (unsafe { socket.as_ref() }) else { return 0 };
    count(Stat::Exhausted);
    emit(Event {
        kind: EVENT_EXHAUSTED,
        netns_cookie: socket.netns_cookie,
        service: socket.service,
        backend: socket.backend,
        generation: socket.generation,
        extra: cause,
        ..Event::default()
    });
    0
}

/// Picks a backend not tried before. Returns 1, or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hitless_choose_again(socket: *const Socket, flow: *const FlowKey, target: *mut Target) -> u32 {
    // SAFETY: the verifier checks what callers pass.
    let (Some(socket), Some(flow), Some(target)) = (unsafe { (socket.as_ref(), flow.as_ref(), target.as_mut()) })
    else {
        return 0;
    };
    let Some(settings) = settings() else { return 0 };
    let mut tried = socket.tried;
    if tried[0] == 0 {
        tried[0] = socket.backend;
    }
    // At most three were tried when there is one more to find: the last place is free.
    tried[MAX_TRIES - 1] = target.passed;
    let Some(picked) = pick(settings, socket.service, &tried, &flow.client, false) else { return 0 };
    if picked.at.addr.is_v4() != flow.client.is_v4() {
        return 0;
    }
    target.flow.client = flow.client;
    target.flow.client_port_be = flow.client_port_be;
    target.flow.peer = picked.at.addr;
    target.flow.peer_port_be = picked.at.port_be;
    target.backend = picked.backend;
    target.generation = picked.generation;
    target.probe = u32::from(picked.class == Class::Probe);
    1
}

/// Has nobody a connection from this client's port to this peer, or an entry for one? Returns 1, or 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_free(skb: *mut __sk_buff, flow: *const FlowKey, take_over: u32) -> u32 {
    // SAFETY: the verifier checks what callers pass.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return 0 };
    if hitless_alive(skb, flow) != 0 {
        return 0;
    }
    let key = flow.reversed();
    let mut to = Endpoint::default();
    if describe(REBINDS.get_ptr_mut(key), &mut to).0 == 0 {
        return 1;
    }
    if take_over == 0 {
        return 0;
    }
    let owner = with_peer(flow, &to);
    if hitless_alive(skb, &raw const owner) != 0 {
        return 0;
    }
    hitless_forget(flow, 1);
    1
}

/// Makes the entries of the flow that moves to `target`, and the peer that it leaves stale; writes it
/// down with the socket and tells. Returns [`moved`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hitless_bind(socket: *mut Socket, flow: *const FlowKey, target: *const Target, cause: u32) -> u32 {
    // SAFETY: the verifier checks what callers pass.
    let (Some(known), Some(flow), Some(target)) = (unsafe { (socket.as_ref(), flow.as_ref(), target.as_ref()) }) else {
        return moved::NO;
    };
    let (left_backend, left_generation, service, isn) = (known.backend, known.generation, known.service, known.isn);
    let mut key = *flow;
    let mut left = Endpoint::default();
    let (role, left_isn) = describe(REBINDS.get_ptr_mut(key), &mut left);
    let again = role == ROLE_FORWARD && left_isn == isn;
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let mut half = Rebind {
        last_seen_ns: now,
        to: flow.peer,
        to_port_be: flow.peer_port_be,
        role: ROLE_STALE,
        // It has ended: kept only as long as the peer may still say something.
        closing: target.mark as u8 | REBIND_RST,
        isn,
        service,
        backend: left_backend,
    };
    // Who refused has nothing more to say (see `replay`), and what collided never left for its peer: what
    // comes from there is the other flow's.
    let stale = again || matches!(cause, CAUSE_ICMP | CAUSE_SILENT);
    // Counted before they are there: nobody may believe that there are none.
    add_rebound(if again || !stale { 2 } else { 3 });
    let mut failed = false;
    if stale {
        key = if again { with_peer(flow, &left) } else { *flow }.reversed();
        failed = REBINDS.insert(key, half, 0).is_err();
    }
    half.role = ROLE_REVERSE;
    half.closing = target.mark as u8;
    half.backend = target.backend;
    key = target.flow.reversed();
    failed = failed || REBINDS.insert(key, half, 0).is_err();
    half.to = target.flow.peer;
    half.to_port_be = target.flow.peer_port_be;
    half.role = ROLE_FORWARD;
    key = *flow;
    if failed || REBINDS.insert(key, half, 0).is_err() {
        count(Stat::RebindFailed);
        return moved::NO;
    }
    // SAFETY: not null; the claim is ours.
    unsafe {
        (&raw mut (*socket).backend).write_volatile(target.backend);
        (&raw mut (*socket).generation).write_volatile(target.generation);
        (&raw mut (*socket).syns).write_volatile(1);
        (&raw mut (*socket).syn_ns).write_volatile(now);
        let flags = cell::read(&raw const (*socket).flags) & !SOCKET_PROBE;
        let flags = flags | SOCKET_REBOUND | if target.probe != 0 { SOCKET_PROBE } else { 0 };
        (&raw mut (*socket).flags).write_volatile(flags);
        let index = known.replays as usize & (MAX_TRIES - 1);
        (&raw mut (*socket).tried).cast::<u32>().add(index).write_volatile(target.backend);
    }
    count(match cause {
        CAUSE_RST => Stat::ReboundRst,
        CAUSE_ICMP => Stat::ReboundIcmp,
        CAUSE_COLLISION => Stat::ReboundCollision,
        _ => Stat::ReboundSilent,
    });
    emit(Event {
        kind: EVENT_REBOUND,
        netns_cookie: known.netns_cookie,
        service,
        backend: left_backend,
        generation: left_generation,
        detail: target.backend,
        extra: cause,
        ..Event::default()
    });
    moved::YES
}

#[inline(always)]
fn add_rebound(n: u64) {
    if let Some(total) = REBOUND.get_ptr_mut(0) {
        // SAFETY: checked by the verifier.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(total, n) };
    }
}
