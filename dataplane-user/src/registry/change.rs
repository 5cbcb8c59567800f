//! What the registry wants written: one variant per kind of map write, in the order to be written.

use std::{path::PathBuf, sync::Arc};

use dataplane_ebpf::{
    abi::{Backend, Endpoint, Frontend, Service, Slot, SlotKey},
    health::{Input, State},
};

/// Identifies a pod of this node in the maps; never 0.
pub type PodId = u32;

/// One write. The kernel writer performs them in order; each is idempotent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    PutFrontend(Endpoint, Frontend),
    DeleteFrontend(Endpoint),
    /// `id` is in the value.
    PutService(Service),
    DeleteService(u32),
    PutSlot(SlotKey, Slot),
    DeleteSlot(SlotKey),
    /// A new backend, or a new life (generation) of its number: also sets the health word to
    /// `state` and indexes the address.
    AddBackend {
        id: u32,
        backend: Backend,
        state: State,
    },
    /// Fields of a living backend change; its health stays.
    UpdateBackend {
        id: u32,
        backend: Backend,
    },
    RemoveBackend {
        id: u32,
        at: Endpoint,
    },
    /// Something was learned of a backend of this generation.
    Health {
        id: u32,
        generation: u32,
        input: Input,
    },
    /// A pod of this node is to be hitless's business (or its terms change).
    Enroll(Arc<Enrollment>),
    /// It no longer is: detach, forget its cookie.
    Release(PodId),
}

/// What the kernel side needs to know of a pod on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrollment {
    pub pod: PodId,
    pub name: Arc<str>,
    pub netns: Netns,
    /// `abi::POD_*`.
    pub flags: u32,
    pub stop_signals: u64,
    /// Head of the pod's chain of backends.
    pub first_backend: u32,
}

/// Where a pod's network namespace is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Netns {
    /// A path such as `/run/netns/x` or `/proc/123/ns/net`.
    Path(PathBuf),
    /// The agent's own: the node's.
    Host,
}
