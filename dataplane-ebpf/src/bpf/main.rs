//! The BPF object: entry points only. Decisions are in the library, maps in `maps`.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(
    internal_features,
    reason = "the BPF target has no AtomicU64::compare_exchange, the instruction it has (5.12)"
)]

use aya_ebpf::{
    macros::{cgroup_sock_addr, classifier, raw_tracepoint, sk_lookup, sock_ops},
    programs::{RawTracePointContext, SkLookupContext, SockAddrContext, SockOpsContext, TcContext},
};

use crate::address::Family::{V4, V6};

mod address;
mod cell;
mod connect;
mod events;
mod inbound;
mod maps;
mod offsets;
mod pick;
mod rebind;
mod route;
mod signal;
mod skb;
mod sockops;
mod suspect;
mod tc;
mod tunnel;
mod udp;

/// Entry points of one kind: the hook's logic returns nothing, and the hook lets the call proceed.
macro_rules! proceed {
    ($($attach:ident $name:ident => $logic:path, $family:expr;)*) => { $(
        #[cgroup_sock_addr($attach)]
        fn $name(ctx: SockAddrContext) -> i32 {
            $logic(&ctx, $family);
            1
        }
    )* };
}

proceed! {
    connect4 hitless_connect4 => connect::connect, V4;
    connect6 hitless_connect6 => connect::connect, V6;
    getpeername4 hitless_getpeername4 => connect::peer_name, V4;
    getpeername6 hitless_getpeername6 => connect::peer_name, V6;
    sendmsg4 hitless_sendmsg4 => udp::send, V4;
    sendmsg6 hitless_sendmsg6 => udp::send, V6;
    recvmsg4 hitless_recvmsg4 => udp::receive, V4;
    recvmsg6 hitless_recvmsg6 => udp::receive, V6;
}

#[sock_ops]
fn hitless_sockops(ctx: SockOpsContext) -> u32 {
    sockops::call_back(&ctx);
    1
}

#[sk_lookup]
fn hitless_inbound(ctx: SkLookupContext) -> u32 {
    inbound::lookup(&ctx)
}

#[raw_tracepoint(tracepoint = "signal_generate")]
fn hitless_signal(ctx: RawTracePointContext) -> i32 {
    signal::signal(&ctx);
    0
}

#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
fn hitless_sock_state(ctx: RawTracePointContext) -> i32 {
    signal::socket_state(&ctx);
    0
}

/// Entry points on interfaces.
macro_rules! on_interface {
    ($($name:ident => $logic:expr;)*) => { $(
        #[classifier]
        fn $name(ctx: TcContext) -> i32 {
            $logic(skb::Skb(ctx.skb.skb))
        }
    )* };
}

on_interface! {
    hitless_tc_egress => tc::egress::<false>;
    hitless_tc_ingress => tc::ingress::<false>;
    // The same for interfaces of the node itself, when it is a client.
    hitless_tc_node_egress => tc::egress::<true>;
    hitless_tc_node_ingress => tc::ingress::<true>;
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
