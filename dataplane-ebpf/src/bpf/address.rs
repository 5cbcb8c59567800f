//! The address in a `bpf_sock_addr` context, as the maps know it, and back.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    programs::SockAddrContext,
};
use dataplane_ebpf::abi::{Addr, Endpoint, PROTO_TCP, PROTO_UDP};

/// What the two families of hooks differ in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// One field of the context. The verifier wants each read to be of exactly one field.
macro_rules! field {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: the verifier allows reads of these fields of the context.
        unsafe { core::ptr::read_volatile(&raw const (*$ctx.sock_addr).$($field)+) }
    };
}

/// Sets one field of the context.
macro_rules! set_field {
    ($ctx:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: the verifier allows writes to these fields of the context.
        unsafe { core::ptr::write_volatile(&raw mut (*$ctx.sock_addr).$($field)+, $value) }
    };
}

/// The socket, as the storage helpers take it.
#[inline(always)]
pub fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    let at: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: a read of one field of the context.
    unsafe { (*at).__bindgen_anon_1.sk }
}

/// The address in the context. `None`: neither TCP nor UDP.
#[inline(always)]
pub fn endpoint(ctx: &SockAddrContext, family: Family) -> Option<Endpoint> {
    let proto = field!(ctx, protocol);
    if proto != u32::from(PROTO_TCP) && proto != u32::from(PROTO_UDP) {
        return None;
    }
    let addr = match family {
        Family::V4 => Addr::v4(field!(ctx, user_ip4)),
        Family::V6 => Addr([
            field!(ctx, user_ip6[0]),
            field!(ctx, user_ip6[1]),
            field!(ctx, user_ip6[2]),
            field!(ctx, user_ip6[3]),
        ]),
    };
    Some(Endpoint::new(addr, field!(ctx, user_port) as u16, proto as u8))
}

/// Can a socket of this family have this address?
#[inline(always)]
pub fn fits(at: &Endpoint, family: Family) -> bool {
    family == Family::V6 || at.addr.is_v4()
}

/// Puts an address that [`fits`] into the context. Others are left out: that would be a 0.0.0.0.
#[inline(always)]
pub fn set_endpoint(ctx: &SockAddrContext, family: Family, at: &Endpoint) {
    let [a, b, c, d] = at.addr.0;
    match family {
        Family::V4 => set_field!(ctx, d, user_ip4),
        Family::V6 => {
            set_field!(ctx, a, user_ip6[0]);
            set_field!(ctx, b, user_ip6[1]);
            set_field!(ctx, c, user_ip6[2]);
            set_field!(ctx, d, user_ip6[3]);
        }
    }
    set_field!(ctx, u32::from(at.port_be), user_port);
}
