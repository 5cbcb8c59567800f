//! The life of a TCP connect to a service: its SYN timeout, and how it ended.

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TIMEOUT_INIT, BPF_TCP_CLOSE,
        BPF_TCP_ESTABLISHED, BPF_TCP_SYN_SENT, bpf_sock,
    },
    helpers::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_probe_read_kernel, generated::bpf_skc_to_tcp_sock},
    programs::SockOpsContext,
};
use dataplane_ebpf::abi::{
    Affinity, AffinityKey, EVENT_REFUSED, EVENT_TIMED_OUT, EVENT_UNREACHABLE, Event, SOCKET_DELIVERY,
    SOCKET_ESTABLISHED, SOCKET_REBOUND, SOCKET_TUNNELLED, Socket, Stat,
};

use crate::{
    cell,
    events::emit,
    maps::{AFFINITY, SERVICES, SOCKETS, count, settings, stored},
    offsets::{OFF_SK_ERR, get},
    route::hitless_adopt,
    suspect::{answered, failed},
    tunnel,
};

/// Errors of connect(), as errno(3) numbers them on every architecture that has BPF in CI.
const ENETUNREACH: u32 = 101;
const ECONNRESET: u32 = 104;
const ETIMEDOUT: u32 = 110;
const ECONNREFUSED: u32 = 111;
const EHOSTUNREACH: u32 = 113;

/// A callback for a socket. Sockets without storage are not of an enrolled pod, or name no service.
#[inline(always)]
pub fn call_back(ctx: &SockOpsContext) {
    let op = ctx.op();
    if op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        tunnel::delivered(ctx);
        return;
    }
    if op != BPF_SOCK_OPS_TIMEOUT_INIT
        && op != BPF_SOCK_OPS_TCP_CONNECT_CB
        && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_STATE_CB
    {
        return;
    }
    // SAFETY: a read of one field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    // SAFETY: the context's own socket.
    let Some(stored) = (unsafe { stored(&SOCKETS, sk) }) else { return };
    if stored.flags & (SOCKET_TUNNELLED | SOCKET_DELIVERY) != 0 {
        if op == BPF_SOCK_OPS_TCP_CONNECT_CB {
            tunnel::connecting(ctx, stored);
        }
        return;
    }
    if stored.service == 0 {
        return;
    }
    let maps = settings().map_or(0, |settings| settings.maps);
    if stored.maps != maps && hitless_adopt(stored, maps) == 0 {
        return;
    }
    match op {
        // tcp_connect() calls this one first, then TIMEOUT_INIT.
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            // A kernel that refuses the flag leaves the outcome untold, nothing worse.
            let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
        }
        BPF_SOCK_OPS_TIMEOUT_INIT => {
            // No reply for anybody else: other programs on the node may have given one.
            if let Some(settings) = settings()
                && settings.syn_timeout_jiffies != 0
            {
                ctx.set_reply(settings.syn_timeout_jiffies);
            }
        }
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            stored.flags |= SOCKET_ESTABLISHED;
            if stored.flags & SOCKET_REBOUND != 0 {
                stay(stored);
            }
            answered(stored.backend, stored.generation);
            count(Stat::Established);
        }
        _ => closed(ctx, sk, stored),
    }
}

/// Session affinity follows a connect that was moved: the client's next one goes where this one went.
#[inline(always)]
fn stay(stored: &Socket) {
    let Some(service) = SERVICES.get_ptr(stored.service) else { return };
    // SAFETY: checked by the verifier; the identifier is checked below.
    let service = unsafe { cell::read(service) };
    if service.id != stored.service || service.affinity_s == 0 {
        return;
    }
    let key = AffinityKey { netns_cookie: stored.netns_cookie, service: stored.service, _pad: 0 };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let Socket { backend, generation, .. } = *stored;
    // The next connect looks for the slot itself.
    let entry = Affinity { backend, generation, slot: 0, _pad: 0, last_used_ns: now };
    if AFFINITY.insert(key, entry, u64::from(BPF_ANY)).is_err() {
        count(Stat::MapFull);
    }
}

/// The connection ended before or after it was established.
#[inline(always)]
fn closed(ctx: &SockOpsContext, sk: *mut bpf_sock, stored: &mut Socket) {
    let (old, new) = (ctx.arg(0), ctx.arg(1));
    if new != BPF_TCP_CLOSE || (old != BPF_TCP_SYN_SENT && old != BPF_TCP_ESTABLISHED) {
        return;
    }
    let Some(error) = socket_error(sk) else { return };
    if old == BPF_TCP_ESTABLISHED {
        if error == ECONNRESET {
            count(Stat::Reset);
        }
        return;
    }
    let (kind, stat) = match error {
        0 => {
            count(Stat::Abandoned);
            return;
        }
        ECONNREFUSED => (EVENT_REFUSED, Stat::Refused),
        ETIMEDOUT => (EVENT_TIMED_OUT, Stat::TimedOut),
        EHOSTUNREACH | ENETUNREACH => (EVENT_UNREACHABLE, Stat::Unreachable),
        _ => return,
    };
    count(stat);
    // SAFETY: a helper without arguments.
    let took_ns = unsafe { bpf_ktime_get_ns() }.wrapping_sub(stored.connect_ns);
    let Socket { netns_cookie, service, backend, generation, .. } = *stored;
    emit(Event {
        kind,
        netns_cookie,
        service,
        backend,
        generation,
        detail: error,
        extra: if took_ns > u64::from(u32::MAX) { u32::MAX } else { took_ns as u32 },
        ..Event::default()
    });
    if let Some(settings) = settings() {
        failed(settings, backend, generation, service, netns_cookie, error);
    }
}

/// `sk->sk_err`: why the socket was closed; 0 when the application did it.
#[inline(always)]
fn socket_error(sk: *mut bpf_sock) -> Option<u32> {
    // SAFETY: the context's own socket, not null; the helper returns it as a kernel pointer or null.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast()) };
    if tcp.is_null() {
        return None;
    }
    // SAFETY: a fault is caught by the helper.
    unsafe { bpf_probe_read_kernel(tcp.cast::<u8>().add(get(&OFF_SK_ERR)).cast::<u32>()) }.ok()
}
