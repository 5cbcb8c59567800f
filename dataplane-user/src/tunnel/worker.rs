//! One thread of the tunnel: accepts in every pod, and carries what it accepted to the end.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    runtime::LocalOptions,
    sync::{
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
        oneshot,
    },
    task::{JoinHandle, spawn_local},
};
use tracing::{debug, warn};

use super::{
    Counts, LocalPod, Shared,
    carried::{Carried, Table},
    inbound, outbound,
    sockets::Listeners,
};
use crate::{
    hbone::{
        self, Timeouts,
        pool::{Pool, PoolSize},
        tls::Contexts,
    },
    registry::change::PodId,
};

/// How often ended connections are dropped from the pool, and what is left is counted.
const SWEEP: Duration = Duration::from_secs(10);
/// After accept() failed for want of descriptors or memory.
const BREATH: Duration = Duration::from_millis(20);

/// What the agent's thread tells a worker.
pub enum Order {
    Serve {
        pod: Arc<LocalPod>,
        listeners: Vec<Listeners>,
    },
    Release(PodId),
    /// Accept no more anywhere; what is carried goes on.
    Close,
    /// What is carried here now.
    Tell(oneshot::Sender<Vec<Carried>>),
}

/// A worker's own: shared with no other thread.
pub struct Worker {
    pub shared: Arc<Shared>,
    pub pool: Pool,
    pub contexts: Contexts,
    pub timeouts: Timeouts,
    pub carried: Rc<Table>,
    random: Cell<u32>,
    accepting: RefCell<HashMap<PodId, Vec<JoinHandle<()>>>>,
}

impl Worker {
    pub fn start(number: usize, shared: Arc<Shared>) -> io::Result<UnboundedSender<Order>> {
        let (sender, orders) = unbounded_channel();
        // A local runtime stays on the thread that made it.
        let (made, making) = std::sync::mpsc::sync_channel(1);
        let run = move || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_all().build_local(LocalOptions::default());
            // Whoever starts it waits for this.
            let told = |result| drop(made.send(result));
            match runtime {
                Ok(runtime) => {
                    told(Ok(()));
                    runtime.block_on(Rc::new(Self::new(number, shared)).serve(orders));
                }
                Err(error) => told(Err(error)),
            }
        };
        std::thread::Builder::new().name(format!("tunnel-{number}")).spawn(run)?;
        making.recv().unwrap_or_else(|_| Err(io::Error::other("its thread ended at once")))?;
        Ok(sender)
    }

    fn new(number: usize, shared: Arc<Shared>) -> Self {
        let timeouts = Timeouts::default();
        // The standard library's hash keys are random: one per worker.
        let seed = RandomState::new().hash_one(number) as u32;
        Self {
            shared,
            pool: Pool::new(timeouts),
            contexts: Contexts::default(),
            timeouts,
            carried: Rc::default(),
            random: Cell::new(seed | 1),
            accepting: RefCell::default(),
        }
    }

    async fn serve(self: Rc<Self>, mut orders: UnboundedReceiver<Order>) {
        let mut sweep = tokio::time::interval(SWEEP);
        let mut counted = PoolSize::default();
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Serve { pod, listeners }) => self.accept_in(&pod, listeners),
                    Some(Order::Release(pod)) => self.release(pod),
                    Some(Order::Close) => self.close(),
                    // Nobody waits for it any more, or somebody does.
                    Some(Order::Tell(to)) => drop(to.send(self.carried.rows())),
                    None => return,
                },
                _ = sweep.tick() => {
                    self.pool.sweep();
                    let size = self.pool.size();
                    self.shared.pooled.change(std::mem::replace(&mut counted, size), size);
                }
            }
        }
    }

    fn accept_in(self: &Rc<Self>, pod: &Arc<LocalPod>, listeners: Vec<Listeners>) {
        let mut accepting = Vec::new();
        for listener in listeners.into_iter().flat_map(|Listeners { v4, v6 }| [Some(v4), v6]).flatten() {
            match TcpListener::from_std(listener) {
                Ok(listener) => accepting.push(spawn_local(accept(self.clone(), pod.clone(), listener))),
                Err(error) => warn!(pod = %pod.name, %error, "its listener cannot be waited for"),
            }
        }
        if let Some(before) = self.accepting.borrow_mut().insert(pod.id, accepting) {
            before.iter().for_each(JoinHandle::abort);
        }
    }

    fn release(&self, pod: PodId) {
        for accepting in self.accepting.borrow_mut().remove(&pod).into_iter().flatten() {
            accepting.abort();
        }
        let living: Vec<_> = {
            let pods = self.accepting.borrow();
            pods.keys().filter_map(|pod| Some(self.shared.view.pod(*pod)?.identity.clone())).collect()
        };
        self.contexts.retain(|id| living.contains(id));
        self.pool.forget(|key| !living.contains(&key.source));
    }

    fn close(&self) {
        self.accepting.borrow().values().flatten().for_each(JoinHandle::abort);
    }

    /// xorshift32 (Marsaglia 2003): spreads, guards nothing.
    pub fn random(&self) -> u32 {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.random.set(x);
        x
    }

    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }
}

async fn accept(worker: Rc<Worker>, pod: Arc<LocalPod>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => carry(&worker, &pod, socket, peer),
            Err(error) => {
                warn!(pod = %pod.name, %error, "a connection could not be accepted");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

/// Which way it goes is told by the address that it came to. Each way is a task of its own size: the longest lived, and
/// the most of them, are small.
fn carry(worker: &Rc<Worker>, pod: &Arc<LocalPod>, socket: TcpStream, peer: SocketAddr) {
    let here = match socket.set_nodelay(true).and_then(|()| socket.local_addr()) {
        Ok(here) => canonical(here),
        Err(error) => return debug!(pod = %pod.name, %error, "a connection ended before it was looked at"),
    };
    let peer = canonical(peer);
    if here.port() != hbone::PORT {
        hbone::relay::unfinished(&socket);
    }
    let (accepted, worker, pod) = (worker.shared.accepted(), worker.clone(), pod.clone());
    if here.ip().is_loopback() {
        spawn_local(async move {
            outbound::carry(&worker, &pod, socket, peer).await;
            drop(accepted);
        });
    } else if here.port() == hbone::PORT {
        spawn_local(async move {
            inbound::tunnelled(&worker, &pod, socket, peer, here).await;
            drop(accepted);
        });
    } else {
        spawn_local(async move {
            inbound::plaintext(&worker, &pod, socket, peer, here).await;
            drop(accepted);
        });
    }
}

fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip().to_canonical(), at.port())
}

/// Ends a connection so that the other side sees it was not finished.
pub fn reset(socket: TcpStream) {
    hbone::relay::unfinished(&socket);
}
