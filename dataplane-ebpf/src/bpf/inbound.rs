//! What comes into a pod of the mesh: HBONE goes to the agent, plaintext to the application, to the agent, or nowhere.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    programs::SkLookupContext,
};
use dataplane_ebpf::abi::{
    Addr, HBONE_PORT, MESH_CAPTURE, MESH_HBONE, MESH_NODE, MESH_STRICT, MeshAddress, PROTO_TCP, Stat,
};

use crate::{
    cell,
    maps::{INBOUND, MESH, count},
};

const AF_INET: u32 = 2;

/// One field of the context. The verifier wants each read to be of exactly one field.
macro_rules! field {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: the verifier allows reads of these fields of the context.
        unsafe { core::ptr::read_volatile(&raw const (*$ctx.lookup).$($field)+) }
    };
}

/// Which socket takes a packet that opens a connection. `SK_DROP`: none, and the sender is told so.
#[inline(always)]
pub fn lookup(ctx: &SkLookupContext) -> u32 {
    if field!(ctx, protocol) != u32::from(PROTO_TCP) {
        return SK_PASS;
    }
    // All of them, whatever the family: of two branches the compiler would make one read at an offset that it
    // computes, which the verifier forbids.
    let (remote4, local4) = (field!(ctx, remote_ip4), field!(ctx, local_ip4));
    let remote6 = [
        field!(ctx, remote_ip6[0]),
        field!(ctx, remote_ip6[1]),
        field!(ctx, remote_ip6[2]),
        field!(ctx, remote_ip6[3]),
    ];
    let local6 =
        [field!(ctx, local_ip6[0]), field!(ctx, local_ip6[1]), field!(ctx, local_ip6[2]), field!(ctx, local_ip6[3])];
    let v4 = field!(ctx, family) == AF_INET;
    let remote = if v4 { Addr::v4(remote4) } else { Addr(remote6) };
    let local = if v4 { Addr::v4(local4) } else { Addr(local6) };
    // The pod itself, or the agent in it. From outside the kernel takes neither (RFC 1122 section 3.2.1.3, RFC 4291
    // section 2.5.3; a packet with the pod's own source address is answered to the pod itself).
    if remote == local || is_loopback(&remote) {
        return SK_PASS;
    }
    let Some(here) = about(local) else { return SK_PASS };
    if field!(ctx, local_port) == u32::from(HBONE_PORT) {
        if here.flags & MESH_HBONE != 0 {
            // Without the agent nobody is there to take it, and the usual lookup says so.
            hand(ctx, local);
        }
        return SK_PASS;
    }
    if here.flags & (MESH_STRICT | MESH_CAPTURE) == 0 {
        return SK_PASS;
    }
    if about(remote).is_some_and(|from| from.flags & MESH_NODE != 0) {
        return SK_PASS;
    }
    if here.flags & MESH_CAPTURE != 0 && here.flags & MESH_STRICT == 0 && hand(ctx, local) {
        count(Stat::PlaintextCaptured);
        return SK_PASS;
    }
    count(Stat::PlaintextRefused);
    SK_DROP
}

/// What the agent wrote about an address.
#[inline(always)]
fn about(addr: Addr) -> Option<MeshAddress> {
    let found = MESH.get_ptr(addr)?;
    // SAFETY: checked by the verifier; 8 bytes, never torn.
    Some(unsafe { cell::read(found) })
}

/// Gives the connection to the agent's listener, if there is one.
#[inline(always)]
fn hand(ctx: &SkLookupContext, local: Addr) -> bool {
    INBOUND.redirect_sk_lookup(SkLookupContext::new(ctx.lookup), local, 0).is_ok()
}

#[inline(always)]
fn is_loopback(addr: &Addr) -> bool {
    let [a, b, c, d] = addr.0;
    if addr.is_v4() {
        return u32::from_be(d) >> 24 == 127;
    }
    a == 0 && b == 0 && c == 0 && d == 1_u32.to_be()
}
