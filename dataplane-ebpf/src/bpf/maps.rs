//! Every map of the object, in one place. `SETTINGS` and the read-only globals below are the
//! agent's; `docs/architecture.md` says who writes what.

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage, SockHash};
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::macros::btf_map;
use dataplane_ebpf::abi::{
    Addr, Affinity, AffinityKey, Backend, EVENTS_BYTES, Endpoint, FlowKey, Frontend, ListenerKey, LocalConnection,
    MAX_AFFINITY, MAX_BACKENDS, MAX_FRONTENDS, MAX_INBOUND, MAX_LISTENERS, MAX_LOCAL_CONNECTIONS, MAX_MESH, MAX_PODS,
    MAX_REBINDS, MAX_SERVICES, MAX_SLOTS, MAX_SUSPECTS, MeshAddress, Pod, Rebind, Service, Settings, Slot, SlotKey,
    Socket, Stat, SuspectKey, Suspects, Tunnelled, UdpSocket,
};

const NO_PREALLOC: usize = aya_ebpf::bindings::BPF_F_NO_PREALLOC as usize;
const MMAPABLE: usize = aya_ebpf::bindings::BPF_F_MMAPABLE as usize;

#[btf_map]
pub static FRONTENDS: HashMap<Endpoint, Frontend, { MAX_FRONTENDS as usize }, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static SERVICES: Array<Service, { MAX_SERVICES as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static SLOTS: HashMap<SlotKey, Slot, { MAX_SLOTS as usize }, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static BACKENDS: Array<Backend, { MAX_BACKENDS as usize }, MMAPABLE> = Array::new();
/// backend id → `health::Health`.
#[btf_map]
pub static HEALTH: Array<u64, { MAX_BACKENDS as usize }, MMAPABLE> = Array::new();
/// Preallocated, as 5.15 wants of a hash that a tracepoint reads (`cargo xtask gate`).
#[btf_map]
pub static BACKEND_INDEX: HashMap<Endpoint, u32, { MAX_BACKENDS as usize }> = HashMap::new();
/// network namespace cookie → pod. Preallocated like `BACKEND_INDEX`.
#[btf_map]
pub static PODS: HashMap<u64, Pod, { MAX_PODS as usize }> = HashMap::new();
/// listener → how many sockets.
#[btf_map]
pub static LISTENERS: LruHashMap<ListenerKey, i32, { MAX_LISTENERS as usize }> = LruHashMap::new();
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { MAX_AFFINITY as usize }> = LruHashMap::new();
#[btf_map]
pub static SUSPECTS: LruHashMap<SuspectKey, Suspects, { MAX_SUSPECTS as usize }> = LruHashMap::new();
#[btf_map]
pub static SOCKETS: SkStorage<Socket> = SkStorage::new();
#[btf_map]
pub static UDP_SOCKETS: SkStorage<UdpSocket> = SkStorage::new();
#[btf_map]
pub static REBINDS: LruHashMap<FlowKey, Rebind, { MAX_REBINDS as usize }> = LruHashMap::new();
/// How many entries `REBINDS` holds, or more (evictions are not seen here; the agent corrects it):
/// 0 spares every packet the lookup.
#[btf_map]
pub static REBOUND: Array<u64, 1, MMAPABLE> = Array::new();
/// Address → what is known of it: the tunnel's.
#[btf_map]
pub static MESH: HashMap<Addr, MeshAddress, { MAX_MESH as usize }, NO_PREALLOC> = HashMap::new();
/// A connection to the agent's listener in a pod → where it was meant to go. The agent takes it out.
#[btf_map]
pub static TUNNELLED: LruHashMap<LocalConnection, Tunnelled, { MAX_LOCAL_CONNECTIONS as usize }> = LruHashMap::new();
/// The agent's connection to an application → the client that it is for.
#[btf_map]
pub static DELIVERIES: LruHashMap<LocalConnection, Endpoint, { MAX_LOCAL_CONNECTIONS as usize }> = LruHashMap::new();
/// A pod's address → the agent's listener for it.
#[btf_map]
pub static INBOUND: SockHash<Addr, { MAX_INBOUND as usize }> = SockHash::new();
#[btf_map]
pub static SETTINGS: Array<Settings, 1, MMAPABLE> = Array::new();
/// `abi::Event` records. Not said in the type: libbpf's tools refuse a ring buffer with a value size.
#[btf_map]
pub static EVENTS: RingBuf<(), { EVENTS_BYTES as usize }> = RingBuf::new();
#[btf_map]
pub static STATS: PerCpuArray<u64, { Stat::COUNT as usize }> = PerCpuArray::new();

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(stat: Stat) {
    if let Some(n) = STATS.get_ptr_mut(stat as u32) {
        // SAFETY: the verifier checked the pointer; a per-CPU element is not written by another CPU.
        unsafe { *n += 1 };
    }
}

/// The agent's settings. `None` never happens, but the verifier asks.
#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// The storage that `map` keeps with a socket, if it has any.
///
/// # Safety
/// `sk` must be the socket pointer of the program's context.
#[inline(always)]
pub unsafe fn stored<T>(map: &'static SkStorage<T>, sk: *mut bpf_sock) -> Option<&'static mut T> {
    // SAFETY: the caller's promise; the verifier checks both pointers.
    unsafe { storage(map, sk, 0) }
}

/// The storage that `map` keeps with a socket, zeroed when it is new.
///
/// # Safety
/// As [`stored`].
#[inline(always)]
pub unsafe fn stored_or_new<T>(map: &'static SkStorage<T>, sk: *mut bpf_sock) -> Option<&'static mut T> {
    // SAFETY: the caller's promise.
    let found = unsafe { storage(map, sk, u64::from(BPF_SK_STORAGE_GET_F_CREATE)) };
    if found.is_none() {
        count(Stat::MapFull);
    }
    found
}

/// aya's own accessor takes a context of one program type only.
#[inline(always)]
unsafe fn storage<T>(map: &'static SkStorage<T>, sk: *mut bpf_sock, flags: u64) -> Option<&'static mut T> {
    let map = core::ptr::from_ref(map).cast_mut().cast();
    // SAFETY: the caller's promise; the verifier knows the result's size and asks for the null check.
    unsafe { bpf_sk_storage_get(map, sk.cast(), core::ptr::null_mut(), flags).cast::<T>().as_mut() }
}
