//! Connections of the mesh, carried: out of the pods here into HBONE, and out of HBONE into them.
//!
//! The kernel leads connections to a listener of the agent in the pod's own network namespace (`hitless_connect*`,
//! `hitless_inbound`). Workers share nothing on the way of a byte: each has a thread, a listener of its own in every
//! pod (`SO_REUSEPORT`) and a pool of its own. What they look up together is [`Shared`].

mod access;
mod counts;
mod inbound;
mod outbound;
mod sockets;
pub mod traffic;
mod worker;

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io,
    path::PathBuf,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU16, AtomicU64, Ordering::Relaxed},
    },
};

use tokio::sync::{mpsc::UnboundedSender, watch};

pub use access::host_of;
pub use counts::{Count, Counts, Pooled};

use self::{
    sockets::Listeners,
    traffic::Traffic,
    worker::{Order, Worker},
};
use crate::{
    hbone::server::Phase,
    identity::Store,
    kernel::TunnelMaps,
    mesh::{View, Workload},
    policy::{self, Enforcement},
    registry::change::PodId,
};

/// What all workers look up.
pub struct Shared {
    pub maps: TunnelMaps,
    pub view: Arc<View>,
    pub store: Arc<Store>,
    pub policies: Arc<Enforcement>,
    pub counts: Counts,
    pub pooled: Pooled,
    pub traffic: Traffic,
    /// Connections and streams that are carried now.
    active: AtomicU64,
    /// Connections between two pods of this node go through TLS too.
    pub local_tls: bool,
    pods: RwLock<HashMap<PodId, Arc<LocalPod>>>,
}

impl Shared {
    pub fn new(
        maps: TunnelMaps,
        view: Arc<View>,
        store: Arc<Store>,
        policies: Arc<Enforcement>,
        local_tls: bool,
    ) -> Self {
        let (counts, pooled, traffic, active, pods) = Default::default();
        Self { maps, view, store, policies, counts, pooled, traffic, active, local_tls, pods }
    }

    /// Connections and streams that are carried now.
    pub fn active(&self) -> u64 {
        self.active.load(Relaxed)
    }

    /// One more, until it is dropped.
    fn carrying(self: &Arc<Self>) -> Carrying {
        self.active.fetch_add(1, Relaxed);
        Carrying(self.clone())
    }

    /// May it come in? Counted. `None`: that cannot be said yet.
    fn admit(&self, workload: &policy::Workload, request: &policy::Request<'_>) -> Option<policy::Decision> {
        self.policies.known().then(|| self.policies.admit(workload, request))
    }

    fn pod(&self, pod: PodId) -> Option<Arc<LocalPod>> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner).get(&pod).cloned()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("counts", &self.counts).finish_non_exhaustive()
    }
}

impl Shared {
    /// Relays until the end, or until the policies forbid what they had allowed.
    async fn until_revoked<E: fmt::Display>(
        &self,
        workload: &Workload,
        request: &policy::Request<'_>,
        relayed: impl Future<Output = Result<(), E>>,
    ) -> Result<(), String> {
        tokio::select! {
            ended = relayed => ended.map_err(|error| error.to_string()),
            () = self.revoked(workload.selected_by.as_deref(), request) => {
                self.counts.one(Count::Revoked);
                Err("cut: the policies forbid it now".into())
            }
        }
    }

    /// Ends when they do; never without policies.
    async fn revoked(&self, workload: Option<&policy::Workload>, request: &policy::Request<'_>) {
        let Some(workload) = workload else { return std::future::pending().await };
        let mut changes = self.policies.subscribe();
        // What changed between the answer and now counts too.
        while self.policies.of(workload).decide(request).allow {
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

/// Counts while it lives.
struct Carrying(Arc<Shared>);

impl Drop for Carrying {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

/// A pod here whose connections are carried.
pub struct LocalPod {
    pub id: PodId,
    pub name: Arc<str>,
    /// Holds the namespace; let go when the pod is.
    netns: File,
    cookie: u64,
    /// Of the listeners on its loopback.
    port: u16,
    phase: watch::Sender<Phase>,
    /// Counts the connections to its application: the next one's port.
    deliveries: AtomicU16,
}

impl LocalPod {
    fn delivery_port(&self) -> u16 {
        let ports = sockets::DELIVERY_PORTS;
        let count = ports.end() - ports.start() + 1;
        ports.start() + self.deliveries.fetch_add(1, Relaxed) % count
    }
}

/// The agent's side of the tunnel.
pub struct Tunnel {
    shared: Arc<Shared>,
    workers: Vec<UnboundedSender<Order>>,
}

/// A pod's listeners, not yet at work.
pub struct Opened {
    pod: Arc<LocalPod>,
    listeners: Vec<Listeners>,
}

impl Opened {
    /// Where the kernel is to lead connects to.
    pub fn port(&self) -> u16 {
        self.pod.port
    }

    pub fn pod(&self) -> PodId {
        self.pod.id
    }
}

impl Tunnel {
    /// Starts the workers. They end with it.
    pub fn start(shared: Shared, workers: usize) -> io::Result<Self> {
        let shared = Arc::new(shared);
        let workers =
            (0..workers.max(1)).map(|number| Worker::start(number, shared.clone())).collect::<Result<_, _>>()?;
        Ok(Self { shared, workers })
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Opens listeners in the pod's network namespace, on a thread that may block.
    pub fn open(&self, id: PodId, name: Arc<str>, netns: PathBuf) -> impl Future<Output = io::Result<Opened>> + use<> {
        let workers = self.workers.len();
        async move {
            let open = move || {
                let netns = File::open(netns)?;
                let sockets::Listening { cookie, port, listeners } = sockets::listen(&netns, workers)?;
                let phase = watch::Sender::default();
                Ok(Opened {
                    pod: Arc::new(LocalPod { id, name, netns, cookie, port, phase, deliveries: AtomicU16::new(0) }),
                    listeners,
                })
            };
            tokio::task::spawn_blocking(open).await.map_err(io::Error::other)?
        }
    }

    /// Puts them to work. Connections come once the kernel knows of them: the addresses are the pod's.
    pub fn admit(&self, opened: Opened, addresses: &[std::net::IpAddr]) -> Result<(), crate::kernel::Error> {
        let Opened { pod, listeners } = opened;
        for addr in addresses {
            // One of the group; the kernel spreads connections over it.
            if let Some(listener) = listeners.first().and_then(|listeners| listeners.of(addr)) {
                self.shared.maps.take_inbound(*addr, listener)?;
            }
        }
        let mut pods = self.shared.pods.write().unwrap_or_else(PoisonError::into_inner);
        pods.insert(pod.id, pod.clone());
        drop(pods);
        for (worker, listeners) in self.workers.iter().zip(listeners) {
            // A worker ends with this sender.
            let _ = worker.send(Order::Serve { pod: pod.clone(), listeners });
        }
        Ok(())
    }

    /// The pod is stopping: peers are told to open no more streams to it, those that run finish.
    pub fn drain(&self, pod: PodId) {
        if let Some(pod) = self.shared.pod(pod) {
            pod.phase.send_if_modified(|phase| {
                let drains = *phase < Phase::Draining;
                *phase = (*phase).max(Phase::Draining);
                drains
            });
        }
    }

    /// The agent is about to stop: every pod's peers are told.
    pub fn drain_all(&self) {
        let pods: Vec<_> = self.shared.pods.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        pods.into_iter().for_each(|pod| self.drain(pod));
    }

    /// The pod is the agent's business no more. Its connections end when their ends do.
    pub fn release(&self, pod: PodId) {
        let released = self.shared.pods.write().unwrap_or_else(PoisonError::into_inner).remove(&pod);
        if let Some(pod) = released {
            pod.phase.send_replace(Phase::Draining);
            for worker in &self.workers {
                let _ = worker.send(Order::Release(pod.id));
            }
        }
    }
}
