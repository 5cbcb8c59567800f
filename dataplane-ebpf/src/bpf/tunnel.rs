//! The way into the tunnel: a connect to the mesh becomes one to the agent's listener on the pod's loopback, and the
//! agent's connections to applications bear the name of the client that they are for.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_ANY, BPF_F_CURRENT_NETNS, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Tuple4, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Tuple6,
    },
    helpers::{bpf_sk_lookup_tcp, bpf_sk_release, generated::bpf_get_netns_cookie},
    programs::{SockAddrContext, SockOpsContext},
};
use dataplane_ebpf::abi::{
    Addr, Endpoint, LocalConnection, MESH_HBONE, MESH_STRICT, PROTO_TCP, SOCKET_DELIVERY, SOCKET_TUNNELLED, Socket,
    Stat, Tunnelled,
};

use crate::{
    address::{Family, set_endpoint, socket},
    cell,
    maps::{DELIVERIES, MESH, SOCKETS, TUNNELLED, count, stored, stored_or_new},
    route::Client,
};

/// 127.0.0.1 and ::1.
const LOOPBACK4: u32 = 0x7f00_0001_u32.to_be();
const LOOPBACK6: [u32; 4] = [0, 0, 0, 1_u32.to_be()];

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// One field of the context. The verifier wants each read to be of exactly one field, at an offset that it knows.
macro_rules! field {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: the verifier allows reads of these fields of the context.
        unsafe { core::ptr::read_volatile(&raw const (*$ctx.ops).$($field)+) }
    };
}

/// One end's address. `None`: neither IPv4 nor IPv6. Both are read, whatever the family: of two branches the compiler
/// would make one read at an offset that it computes.
macro_rules! address {
    ($ctx:expr, $ip4:ident, $ip6:ident) => {{
        let v4 = field!($ctx, $ip4);
        let v6 = [field!($ctx, $ip6[0]), field!($ctx, $ip6[1]), field!($ctx, $ip6[2]), field!($ctx, $ip6[3])];
        match field!($ctx, family) {
            AF_INET => Some(Addr::v4(v4)),
            // A socket of both families says so and has a mapped address.
            AF_INET6 => Some(Addr(v6)),
            _ => None,
        }
    }};
}

/// Is the connect the agent's own? Its sockets in pods bear its mark, which takes privilege to set.
#[inline(always)]
pub fn is_agents(ctx: &SockAddrContext, client: &Client<'_>) -> bool {
    let sk = socket(ctx);
    // SAFETY: the context's own socket; the verifier allows reads of this field.
    let mark = unsafe { core::ptr::read_volatile(&raw const (*sk).mark) };
    mark & client.settings.mark == client.settings.mark
}

/// The agent's listener for a connect to `at`. `None`: it is not for the tunnel, or nobody listens and it may go
/// without.
#[inline(always)]
pub fn entrance(ctx: &SockAddrContext, client: &Client<'_>, at: &Endpoint) -> Option<Endpoint> {
    let port_be = client.pod.outbound_port_be;
    if port_be == 0 || at.proto != PROTO_TCP {
        return None;
    }
    // Before 6.2 a key must be on the stack.
    let addr = at.addr;
    let found = MESH.get_ptr(addr)?;
    // SAFETY: checked by the verifier; 8 bytes, never torn.
    let found = unsafe { cell::read(found) };
    if found.flags & MESH_HBONE == 0 || found.pod == client.pod.pod {
        return None;
    }
    let listener =
        Endpoint::new(if at.addr.is_v4() { Addr::v4(LOOPBACK4) } else { Addr(LOOPBACK6) }, port_be, PROTO_TCP);
    // To a strict pod nothing goes without the tunnel, and a refusal here says so at once.
    if found.flags & MESH_STRICT == 0 && !somebody_listens(ctx, &listener) {
        count(Stat::TunnelAbsent);
        return None;
    }
    Some(listener)
}

/// Is the agent there? Asked of the socket table: an agent that was killed could not have told.
#[inline(always)]
fn somebody_listens(ctx: &SockAddrContext, listener: &Endpoint) -> bool {
    let [a, b, c, d] = listener.addr.0;
    let (mut tuple, size) = if listener.addr.is_v4() {
        let ipv4 = Tuple4 { saddr: d, daddr: d, sport: 0, dport: listener.port_be };
        let tuple = bpf_sock_tuple { __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 { ipv4 } };
        (tuple, size_of::<Tuple4>())
    } else {
        let addr = [a, b, c, d];
        let ipv6 = Tuple6 { saddr: addr, daddr: addr, sport: 0, dport: listener.port_be };
        let tuple = bpf_sock_tuple { __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 { ipv6 } };
        (tuple, size_of::<Tuple6>())
    };
    // The namespace of the socket that connects.
    let netns = i64::from(BPF_F_CURRENT_NETNS) as u64;
    // SAFETY: the tuple lives across the call and its size is passed.
    let found = unsafe { bpf_sk_lookup_tcp(ctx.as_ptr(), &raw mut tuple, size as u32, netns, 0) };
    if found.is_null() {
        return false;
    }
    // SAFETY: the reference that the lookup returned, once.
    unsafe { bpf_sk_release(found.cast()) };
    true
}

/// Leads the connect to the listener. What it was for is in the socket's storage already.
#[inline(always)]
pub fn enter(ctx: &SockAddrContext, family: Family, listener: &Endpoint) {
    // SAFETY: the context's own socket.
    let Some(stored) = (unsafe { stored(&SOCKETS, socket(ctx)) }) else { return };
    stored.flags |= SOCKET_TUNNELLED;
    // For getpeername(): the application goes on seeing what it asked for.
    stored.peer = *listener;
    set_endpoint(ctx, family, listener);
    count(Stat::Tunnelled);
}

/// The SYN of a connect to the listener, or of one of the agent's to an application, is about to leave: its ports are
/// known now, and whoever accepts it can find what it is about.
#[inline(always)]
pub fn connecting(ctx: &SockOpsContext, stored: &Socket) {
    let Some(addr) = address!(ctx, local_ip4, local_ip6) else { return };
    let key = LocalConnection {
        // SAFETY: the helper takes the context.
        netns_cookie: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        addr,
        port_be: (field!(ctx, local_port) as u16).to_be(),
        listener_port_be: remote_port_be(ctx),
        _pad: 0,
    };
    let written = if stored.flags & SOCKET_TUNNELLED != 0 {
        let Socket { original, service, backend, generation, flags, maps, .. } = *stored;
        let value = Tunnelled { original, service, backend, generation, flags, maps };
        TUNNELLED.insert(key, value, u64::from(BPF_ANY))
    } else {
        DELIVERIES.insert(key, stored.original, u64::from(BPF_ANY))
    };
    if written.is_err() {
        count(Stat::MapFull);
    }
}

/// A connection was accepted. If the agent delivers it for a client, the application sees that client's address.
#[inline(always)]
pub fn delivered(ctx: &SockOpsContext) {
    let Some(addr) = address!(ctx, remote_ip4, remote_ip6) else { return };
    // The agent connects from the pod's own address.
    if Some(addr) != address!(ctx, local_ip4, local_ip6) {
        return;
    }
    let key = LocalConnection {
        // SAFETY: the helper takes the context.
        netns_cookie: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        addr,
        port_be: remote_port_be(ctx),
        listener_port_be: (field!(ctx, local_port) as u16).to_be(),
        _pad: 0,
    };
    let Some(client) = DELIVERIES.get_ptr(key) else { return };
    // SAFETY: checked by the verifier; written before the SYN, and not again while the port is in use.
    let client = unsafe { cell::read(client) };
    let _ = DELIVERIES.remove(key);
    // SAFETY: a read of one field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    // SAFETY: the context's own socket.
    let Some(stored) = (unsafe { stored_or_new(&SOCKETS, sk) }) else { return };
    stored.service = 0;
    stored.flags = SOCKET_DELIVERY;
    stored.original = client;
    stored.peer = Endpoint::new(addr, key.port_be, PROTO_TCP);
}

/// The kernel tells it in the upper half of a big-endian word.
#[inline(always)]
fn remote_port_be(ctx: &SockOpsContext) -> u16 {
    let port = field!(ctx, remote_port);
    if cfg!(target_endian = "little") { (port >> 16) as u16 } else { port as u16 }
}
