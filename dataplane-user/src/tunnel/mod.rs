//! Connections of the mesh, carried: out of the pods here into HBONE, and out of HBONE into them.
//!
//! The kernel leads connections to a listener of the agent in the pod's own network namespace (`hitless_connect*`,
//! `hitless_inbound`). Workers share nothing on the way of a byte: each has a thread, a listener of its own in every
//! pod (`SO_REUSEPORT`) and a pool of its own. What they look up together is [`Shared`].

mod access;
pub mod carried;
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
    os::fd::AsFd as _,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed},
    },
};

use tokio::sync::{
    mpsc::{UnboundedSender, WeakUnboundedSender},
    oneshot, watch,
};

pub use access::{Access, host_of};
pub use counts::{Count, Counts, Pooled};
pub use sockets::Listeners;

use self::{
    carried::Carried,
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
    /// Istio's name of this cluster.
    pub cluster: Arc<str>,
    pub maps: TunnelMaps,
    pub view: Arc<View>,
    pub store: Arc<Store>,
    pub policies: Arc<Enforcement>,
    pub counts: Counts,
    pub pooled: Pooled,
    pub traffic: Traffic,
    /// By [`Tally`].
    tallies: [AtomicU64; 3],
    stopping: AtomicBool,
    /// Connections between two pods of this node go through TLS too.
    pub local_tls: bool,
    pods: RwLock<HashMap<PodId, Arc<LocalPod>>>,
    /// Who is asked what is carried.
    workers: OnceLock<Vec<WeakUnboundedSender<Order>>>,
}

impl Shared {
    pub fn new(
        cluster: Arc<str>,
        maps: TunnelMaps,
        view: Arc<View>,
        store: Arc<Store>,
        policies: Arc<Enforcement>,
        local_tls: bool,
    ) -> Self {
        let (counts, pooled, traffic, tallies, stopping, pods, workers) = Default::default();
        Self {
            cluster,
            maps,
            view,
            store,
            policies,
            counts,
            pooled,
            traffic,
            tallies,
            stopping,
            local_tls,
            pods,
            workers,
        }
    }

    /// Connections and streams that are carried now.
    pub fn active(&self) -> u64 {
        self.before_stop() + self.tallies[Tally::Late as usize].load(Relaxed)
    }

    /// Of them, those that began before the agent was about to stop.
    pub fn before_stop(&self) -> u64 {
        self.tallies[Tally::Before as usize].load(Relaxed)
    }

    /// Accepted connections that have not ended; the last bytes of a stream may be on one that carries no more.
    pub fn open(&self) -> u64 {
        self.tallies[Tally::Socket as usize].load(Relaxed)
    }

    /// Each connection that is carried now; of very many the oldest.
    pub async fn carried(&self) -> Vec<Carried> {
        let ask = |worker: &WeakUnboundedSender<Order>| {
            let (to, answer) = oneshot::channel();
            worker.upgrade()?.send(Order::Tell(to)).ok()?;
            Some(answer)
        };
        let asked: Vec<_> = self.workers.get().into_iter().flatten().filter_map(ask).collect();
        let mut all = Vec::new();
        for answer in asked {
            // A worker that ends carries nothing.
            all.extend(answer.await.into_iter().flatten());
        }
        all
    }

    /// One more, until it is dropped.
    fn carrying(self: &Arc<Self>) -> Carrying {
        self.count(if self.stopping.load(Relaxed) { Tally::Late } else { Tally::Before })
    }

    fn accepted(self: &Arc<Self>) -> Carrying {
        self.count(Tally::Socket)
    }

    fn count(self: &Arc<Self>, what: Tally) -> Carrying {
        self.tallies[what as usize].fetch_add(1, Relaxed);
        Carrying(self.clone(), what)
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

/// What there may be many of at once.
#[derive(Clone, Copy, Debug)]
enum Tally {
    Before,
    /// Begun while the agent is about to stop.
    Late,
    Socket,
}

/// Counts while it lives.
struct Carrying(Arc<Shared>, Tally);

impl Drop for Carrying {
    fn drop(&mut self) {
        self.0.tallies[self.1 as usize].fetch_sub(1, Relaxed);
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
    /// Those that the workers have, for an agent that takes over.
    listeners: Mutex<Vec<Listeners>>,
    /// Counts the connections to its application: the next one's port.
    deliveries: AtomicU16,
}

/// A pod's listeners on their way from one agent to the next: open all the while, with all who wait in them.
#[derive(Debug)]
pub struct Bequest {
    /// namespace/name
    pub name: Arc<str>,
    pub netns: File,
    pub port: u16,
    pub listeners: Vec<Listeners>,
}

impl LocalPod {
    fn new(id: PodId, name: Arc<str>, netns: File, cookie: u64, port: u16) -> Self {
        let (phase, listeners, deliveries) = Default::default();
        Self { id, name, netns, cookie, port, phase, listeners, deliveries }
    }

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
    /// Per worker.
    listeners: Vec<Vec<Listeners>>,
}

impl Opened {
    fn new(pod: LocalPod, listeners: Vec<Listeners>, workers: usize) -> io::Result<Self> {
        let kept = listeners.iter().map(Listeners::try_clone).collect::<Result<_, _>>()?;
        let mut spread: Vec<_> = (0..workers).map(|_| Vec::new()).collect();
        for (number, listeners) in listeners.into_iter().enumerate() {
            spread[number % workers].push(listeners);
        }
        let pod = Arc::new(LocalPod { listeners: Mutex::new(kept), ..pod });
        Ok(Self { pod, listeners: spread })
    }

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
        let workers: Vec<_> =
            (0..workers.max(1)).map(|number| Worker::start(number, shared.clone())).collect::<Result<_, _>>()?;
        // Without holding them: a worker ends with its last sender.
        let _ = shared.workers.set(workers.iter().map(UnboundedSender::downgrade).collect());
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
                Opened::new(LocalPod::new(id, name, netns, cookie, port), listeners, workers)
            };
            tokio::task::spawn_blocking(open).await.map_err(io::Error::other)?
        }
    }

    /// Takes those on that an agent before had open there.
    pub fn adopt(&self, id: PodId, name: Arc<str>, bequest: Bequest) -> io::Result<Opened> {
        let Bequest { netns, port, mut listeners, .. } = bequest;
        let workers = self.workers.len();
        let Some(first) = listeners.first() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no listener was handed over"));
        };
        let cookie = crate::kernel::socket_netns_cookie(first.v4.as_fd())?;
        if listeners.len() < workers {
            // Some workers without work are better than a pod without listeners.
            match sockets::join(&netns, port, workers - listeners.len()) {
                Ok(more) => listeners.extend(more),
                Err(error) => tracing::warn!(pod = %name, %error, "not every worker listens there"),
            }
        }
        Opened::new(LocalPod::new(id, name, netns, cookie, port), listeners, workers)
    }

    /// For the agent that takes over. Both may accept from them.
    pub fn bequests(&self) -> Vec<Bequest> {
        let pods: Vec<_> = self.shared.pods.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let bequest = |pod: &Arc<LocalPod>| {
            let listeners = pod.listeners.lock().unwrap_or_else(PoisonError::into_inner);
            let listeners = listeners.iter().map(Listeners::try_clone).collect::<Result<_, _>>()?;
            io::Result::Ok(Bequest { name: pod.name.clone(), netns: pod.netns.try_clone()?, port: pod.port, listeners })
        };
        let bequests = pods.iter().filter_map(|pod| match bequest(pod) {
            Ok(bequest) => Some(bequest),
            Err(error) => {
                tracing::warn!(pod = %pod.name, %error, "its listeners are not handed over");
                None
            }
        });
        bequests.collect()
    }

    /// Accepts no more: another agent does. What is carried goes on.
    pub fn close(&self) {
        for worker in &self.workers {
            let _ = worker.send(Order::Close);
        }
        for pod in self.shared.pods.read().unwrap_or_else(PoisonError::into_inner).values() {
            pod.listeners.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    /// Puts them to work. Connections come once the kernel knows of them: the addresses are the pod's.
    pub fn admit(&self, opened: Opened, addresses: &[std::net::IpAddr]) -> Result<(), crate::kernel::Error> {
        let Opened { pod, listeners } = opened;
        for addr in addresses {
            // One of the group; the kernel spreads connections over it.
            if let Some(listener) = listeners.iter().flatten().next().and_then(|listeners| listeners.of(addr)) {
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
        self.shared.stopping.store(true, Relaxed);
        let pods: Vec<_> = self.shared.pods.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        pods.into_iter().for_each(|pod| self.drain(pod));
    }

    /// The pod is the agent's business no more. Its connections end when their ends do.
    pub fn release(&self, pod: PodId) {
        let released = self.shared.pods.write().unwrap_or_else(PoisonError::into_inner).remove(&pod);
        if let Some(pod) = released {
            pod.phase.send_replace(Phase::Draining);
            // What it carries may hold the pod for long; nobody is to wait in its listeners meanwhile.
            pod.listeners.lock().unwrap_or_else(PoisonError::into_inner).clear();
            for worker in &self.workers {
                let _ = worker.send(Order::Release(pod.id));
            }
        }
    }
}
