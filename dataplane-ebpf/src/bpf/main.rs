//! The BPF object: entry points only. Decisions are in the library, maps in `maps`.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(
    internal_features,
    reason = "the BPF target has no AtomicU64::compare_exchange, the instruction it has (5.12)"
)]

mod cell;
mod events;
mod maps;
mod pick;
mod suspect;

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
    use aya_ebpf::{EbpfContext, helpers::*, macros::*, programs::*};
    use dataplane_ebpf::abi::*;
    #[cgroup_sock_addr(connect4)]
    fn hitless_connect4(ctx: SockAddrContext) -> i32 {
        let Some(settings) = settings() else { return 1 };
        let k = Endpoint::new(Addr::v4(unsafe { (*ctx.sock_addr).user_ip4 }), 1, 6);
        if let Some(f) = unsafe { FRONTENDS.get(k) } {
            if let Some(p) = crate::pick::pick(settings, f.service, &[0; MAX_TRIES], &Addr::default(), true) {
                unsafe { (*ctx.sock_addr).user_ip4 = p.at.addr.0[3] };
                crate::suspect::answered(p.backend, p.generation);
                crate::suspect::failed(settings, p.backend, p.generation, f.service, 1, 111);
            }
        }
        1
    }
}
