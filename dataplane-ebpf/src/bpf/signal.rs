//! What happens to this node's own pods: a stop signal, a listener that closes or opens. The health words of their
//! backends change in the sender's own system call, before the pod itself can react.

use aya_ebpf::{helpers::bpf_probe_read_kernel, programs::RawTracePointContext};
use dataplane_ebpf::abi::{
    Addr, Backend, EVENT_LISTENER_CLOSED, EVENT_LISTENER_OPENED, EVENT_STOP_SIGNAL, Event, LAYER_KNOW, ListenerKey,
    MAX_BACKENDS_PER_POD, POD_ENROLLED, PROTO_TCP, Pod, Stat,
};

use crate::{
    cell,
    events::emit,
    maps::{BACKENDS, LISTENERS, PODS, count, settings},
    offsets::{
        OFF_NET_COOKIE, OFF_NSPROXY_NET_NS, OFF_PID_LEVEL, OFF_PID_NUMBERS, OFF_SK_FAMILY, OFF_SK_NET, OFF_SK_NUM,
        OFF_SK_PROTOCOL, OFF_SK_RCV_SADDR, OFF_SK_V6_RCV_SADDR, OFF_SK_V6ONLY_BYTE, OFF_SK_V6ONLY_MASK,
        OFF_TASK_GROUP_LEADER, OFF_TASK_NSPROXY, OFF_TASK_THREAD_PID, OFF_UPID_NR, SIZE_UPID, get,
    },
    suspect::{News, health_apply},
};

/// A kernel object, of which only an address and BTF offsets are known.
#[derive(Clone, Copy)]
struct Object(u64);

impl Object {
    /// The member at that offset; `None` when the memory cannot be read (a null pointer on the way).
    #[inline(always)]
    fn read<T>(self, offset: usize) -> Option<T> {
        // SAFETY: a fault is caught by the helper.
        unsafe { bpf_probe_read_kernel((self.0 as *const u8).wrapping_add(offset).cast::<T>()) }.ok()
    }

    #[inline(always)]
    fn follow(self, global: &'static u32) -> Option<Self> {
        self.read::<u64>(get(global)).filter(|&at| at != 0).map(Self)
    }
}

/// `TRACE_SIGNAL_IGNORED` and `TRACE_SIGNAL_OVERFLOW_FAIL` (include/trace/events/signal.h): the process will not see it.
const SIGNAL_IGNORED: u32 = 1;
const SIGNAL_OVERFLOW_FAIL: u32 = 3;

/// signal_generate(int sig, struct kernel_siginfo *info, struct task_struct *task, int group, int result)
#[inline(always)]
pub fn signal(ctx: &RawTracePointContext) -> Option<()> {
    let signal = ctx.arg::<u64>(0) as u32;
    let result = ctx.arg::<u64>(4) as u32;
    if signal >= 64 || result == SIGNAL_IGNORED || result == SIGNAL_OVERFLOW_FAIL {
        return None;
    }
    if settings()?.layers & LAYER_KNOW == 0 {
        return None;
    }
    let task = Object(ctx.arg::<u64>(2));
    if !is_container_init(task)? {
        return None;
    }
    let net = task.follow(&OFF_TASK_NSPROXY)?.follow(&OFF_NSPROXY_NET_NS)?;
    let netns_cookie = net.read::<u64>(get(&OFF_NET_COOKIE))?;
    let pod = enrolled(netns_cookie)?;
    if (pod.stop_signals >> signal) & 1 == 0 {
        return None;
    }
    let mut next = pod.first_backend;
    for _ in 0..MAX_BACKENDS_PER_POD {
        let Some(backend) = chained(next, pod.pod) else { break };
        health_apply(next, backend.generation, News::StopSignal);
        next = backend.next_in_pod;
    }
    count(Stat::StopSignal);
    emit(Event { kind: EVENT_STOP_SIGNAL, pod: pod.pod, netns_cookie, detail: signal, ..Event::default() });
    Some(())
}

/// Is the task's process number 1 of a pid namespace below the first one? A signal may name any of
/// its threads.
#[inline(always)]
fn is_container_init(task: Object) -> Option<bool> {
    let pid = task.follow(&OFF_TASK_GROUP_LEADER)?.follow(&OFF_TASK_THREAD_PID)?;
    let level = pid.read::<u32>(get(&OFF_PID_LEVEL))? as usize;
    // MAX_PID_NS_LEVEL (include/linux/pid_namespace.h).
    if level == 0 || level > 32 {
        return Some(false);
    }
    let number = pid.read::<u32>(get(&OFF_PID_NUMBERS) + level * get(&SIZE_UPID) + get(&OFF_UPID_NR))?;
    Some(number == 1)
}

const LISTEN: u32 = aya_ebpf::bindings::BPF_TCP_LISTEN;
const CLOSE: u32 = aya_ebpf::bindings::BPF_TCP_CLOSE;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate)
#[inline(always)]
pub fn socket_state(ctx: &RawTracePointContext) -> Option<()> {
    let old = ctx.arg::<u64>(1) as u32;
    let new = ctx.arg::<u64>(2) as u32;
    let opened = new == LISTEN;
    // An accepted connection is a clone of its listener and goes from LISTEN to SYN_RECV: no close.
    if !opened && (old != LISTEN || new != CLOSE) {
        return None;
    }
    let sk = Object(ctx.arg::<u64>(0));
    if sk.read::<u16>(get(&OFF_SK_PROTOCOL))? != u16::from(PROTO_TCP) {
        return None;
    }
    let netns_cookie = sk.follow(&OFF_SK_NET)?.read::<u64>(get(&OFF_NET_COOKIE))?;
    let pod = enrolled(netns_cookie)?;
    let listener = Listener::of(sk)?;
    if is_loopback(&listener.addr) {
        return None;
    }
    let key = |addr| ListenerKey { netns_cookie, addr, port_be: listener.port_be, _pad: [0; 6] };
    recount(&key(listener.addr), opened);
    if listener.serves_v4_too != 0 {
        recount(&key(Addr::v4(0)), opened);
    }
    count(if opened { Stat::ListenerOpened } else { Stat::ListenerClosed });
    if settings()?.layers & LAYER_KNOW != 0 {
        tell_backends(&pod, listener, netns_cookie, opened);
    }
    emit(Event {
        kind: if opened { EVENT_LISTENER_OPENED } else { EVENT_LISTENER_CLOSED },
        pod: pod.pod,
        netns_cookie,
        port_be: listener.port_be,
        addr: listener.addr,
        ..Event::default()
    });
    Some(())
}

/// Where a socket listens.
#[derive(Clone, Copy)]
#[repr(C)]
struct Listener {
    /// Unspecified of its family for a wildcard.
    addr: Addr,
    port_be: u16,
    /// `[::]` without `IPV6_V6ONLY`.
    serves_v4_too: u8,
    _pad: u8,
}

impl Listener {
    #[inline(always)]
    fn of(sk: Object) -> Option<Self> {
        let port_be = sk.read::<u16>(get(&OFF_SK_NUM))?.to_be();
        match sk.read::<u16>(get(&OFF_SK_FAMILY))? {
            AF_INET => {
                let addr = Addr::v4(sk.read::<u32>(get(&OFF_SK_RCV_SADDR))?);
                Some(Self { addr, port_be, serves_v4_too: 0, _pad: 0 })
            }
            AF_INET6 => {
                let addr = Addr(sk.read::<[u32; 4]>(get(&OFF_SK_V6_RCV_SADDR))?);
                let v6only = sk.read::<u8>(get(&OFF_SK_V6ONLY_BYTE))? & get(&OFF_SK_V6ONLY_MASK) as u8;
                let serves_v4_too = (addr == Addr([0; 4]) && v6only == 0) as u8;
                Some(Self { addr, port_be, serves_v4_too, _pad: 0 })
            }
            _ => None,
        }
    }

    /// Would it take a connection to `addr`?
    #[inline(always)]
    fn serves(&self, addr: &Addr) -> bool {
        if addr.is_v4() {
            self.addr == *addr || self.addr == Addr::v4(0) || self.serves_v4_too != 0
        } else {
            self.addr == *addr || self.addr == Addr([0; 4])
        }
    }
}

#[inline(always)]
fn is_loopback(addr: &Addr) -> bool {
    if addr.is_v4() { addr.0[3].to_ne_bytes()[0] == 127 } else { *addr == Addr([0, 0, 0, 1u32.to_be()]) }
}

#[inline(always)]
fn recount(key: &ListenerKey, opened: bool) {
    match LISTENERS.get_ptr_mut(key) {
        Some(count) => {
            // SAFETY: checked by the verifier. Listeners of one pod seldom come and go at once; the
            // agent counts again after each event.
            unsafe {
                let now = cell::read(count) + if opened { 1 } else { -1 };
                core::ptr::write_volatile(count, if now < 0 { 0 } else { now });
            }
        }
        None if opened => {
            if LISTENERS.insert(key, 1, u64::from(aya_ebpf::bindings::BPF_ANY)).is_err() {
                count(Stat::MapFull);
            }
        }
        // Older than the agent and unknown to it: counts as the last one.
        None => {}
    }
}

/// How many sockets listen there.
#[inline(always)]
fn listeners(netns_cookie: u64, addr: Addr, port_be: u16) -> i32 {
    let key = ListenerKey { netns_cookie, addr, port_be, _pad: [0; 6] };
    // SAFETY: checked by the verifier.
    LISTENERS.get_ptr(key).map_or(0, |count| unsafe { cell::read(count) })
}

/// What a backend is told of a listener.
#[repr(C)]
pub struct Told {
    netns_cookie: u64,
    listener: Listener,
    pod: u32,
    opened: u32,
    /// Before 6.3 a function may not be passed memory that was never written, padding included.
    _pad: u32,
}

const _: () = assert!(size_of::<Told>() == 40);

/// Tells the pod's TCP backends that the listener serves.
#[inline(always)]
fn tell_backends(pod: &Pod, listener: Listener, netns_cookie: u64, opened: bool) {
    let told = Told { netns_cookie, listener, pod: pod.pod, opened: opened as u32, _pad: 0 };
    let mut next = pod.first_backend;
    for _ in 0..MAX_BACKENDS_PER_POD {
        if next == 0 {
            break;
        }
        next = hitless_tell_backend(&raw const told, next);
    }
}

/// Tells one backend of the chain. Returns the next one's number, 0 at the end. A global function:
/// the verifier checks it once by itself, not once per turn of the loop.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_tell_backend(told: *const Told, id: u32) -> u32 {
    // SAFETY: the verifier checks that callers pass a `Told`, and asks for the comparison with null.
    let Some(told) = (unsafe { told.as_ref() }) else { return 0 };
    let Some(backend) = chained(id, told.pod) else { return 0 };
    let (at, listener) = (backend.at, &told.listener);
    if at.proto == PROTO_TCP && at.port_be == listener.port_be && listener.serves(&at.addr) {
        let wildcard = if at.addr.is_v4() { Addr::v4(0) } else { Addr([0; 4]) };
        if told.opened != 0 {
            health_apply(id, backend.generation, News::ListenerOpened);
        } else if listeners(told.netns_cookie, at.addr, at.port_be) <= 0
            && listeners(told.netns_cookie, wildcard, at.port_be) <= 0
        {
            health_apply(id, backend.generation, News::ListenerClosed);
        }
    }
    backend.next_in_pod
}

/// The pod in that network namespace, if it is enrolled.
#[inline(always)]
fn enrolled(netns_cookie: u64) -> Option<Pod> {
    let pod = PODS.get_ptr(netns_cookie)?;
    // SAFETY: checked by the verifier.
    let pod = unsafe { cell::read(pod) };
    (pod.flags & POD_ENROLLED != 0).then_some(pod)
}

/// The backend of that number, if it still is one of the pod's.
#[inline(always)]
fn chained(id: u32, pod: u32) -> Option<Backend> {
    let backend = BACKENDS.get_ptr(id)?;
    // SAFETY: checked by the verifier; the generation tells a torn read when the word is changed.
    let backend = unsafe { cell::read(backend) };
    (id != 0 && backend.pod == pod).then_some(backend)
}
