//! The BPF object: entry points only. Decisions are in the library, maps in `maps`.

#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(
    internal_features,
    reason = "the BPF target has no AtomicU64::compare_exchange, the instruction it has (5.12)"
)]

mod maps;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

mod hello {
    use crate::maps::*;
    use aya_ebpf::{macros::*, programs::*};
    use dataplane_ebpf::abi::*;
    #[cgroup_sock_addr(connect4)]
    fn hitless_connect4(ctx: SockAddrContext) -> i32 {
        let k = Endpoint::new(Addr::v4(unsafe { (*ctx.sock_addr).user_ip4 }), 1, 6);
        if let Some(f) = unsafe { FRONTENDS.get(k) } {
            if let Some(s) = SERVICES.get(f.service) {
                if s.id != 0 {
                    count(Stat::Refused);
                }
            }
        }
        if let Some(h) = HEALTH.get_ptr_mut(7) {
            let v = unsafe { core::ptr::read_volatile(h) };
            let (_o, ok) = unsafe {
                core::intrinsics::atomic_cxchg::<
                    u64,
                    { core::intrinsics::AtomicOrdering::SeqCst },
                    { core::intrinsics::AtomicOrdering::SeqCst },
                >(h, v, v + 1)
            };
            if !ok {
                count(Stat::Refused);
            }
        }
        let s = unsafe { SOCKETS.get_or_insert_ptr_mut(&ctx, None) };
        if !s.is_null() {
            unsafe {
                (*s).service = 0;
            }
        }
        1
    }
}
