//! Connections that are kept for the next stream: one worker's, keyed by who talks to whom.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    rc::Rc,
    sync::Arc,
};

use futures_util::future::{FutureExt, Shared};
use tokio::{
    net::TcpStream,
    task::spawn_local,
    time::{Instant, timeout, timeout_at},
};

use super::{
    Timeouts,
    client::{Connect, ConnectError, Connection, Tunnel},
    keepalive::Place,
    tls::{Context, HandshakeError, TlsError},
};
use crate::identity::SpiffeId;

/// Streams share a connection only when all of this is the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub source: SpiffeId,
    /// Whoever may answer; the peer must be one of them.
    pub expected: Arc<[SpiffeId]>,
    /// The peer's HBONE port.
    pub destination: SocketAddr,
    /// The address that the peer sees.
    pub source_ip: IpAddr,
}

/// How many waiters one dial is good for: what the new connection can carry.
const PER_DIAL: usize = 100;

type Dial = Shared<Pin<Box<dyn Future<Output = Result<Rc<Connection>, ConnectError>>>>>;

type Reached = Rc<Cell<Option<Instant>>>;

#[derive(Default)]
struct Entry {
    connections: Vec<Rc<Connection>>,
    dials: Vec<Pending>,
}

/// A dial that has not ended.
struct Pending {
    number: u64,
    dial: Dial,
    /// When its socket was connected.
    reached: Reached,
    waiters: usize,
}

/// What a pool holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolSize {
    pub connections: usize,
    pub streams: usize,
    pub dials: usize,
}

/// One worker's connections.
#[derive(Clone)]
pub struct Pool {
    entries: Rc<RefCell<HashMap<Key, Entry>>>,
    dials_begun: Rc<Cell<u64>>,
    timeouts: Timeouts,
}

impl Pool {
    pub fn new(timeouts: Timeouts) -> Self {
        Self { entries: Rc::default(), dials_begun: Rc::default(), timeouts }
    }

    /// Opens a stream on a pooled connection, or on a new one that `dial` gives a socket for. `context` must be of
    /// `key.source`. Many callers share one dial; when it fails it fails for all of them. Call where tasks may be `spawn_local`.
    pub async fn connect<F, Fut>(
        &self,
        key: &Key,
        context: &Rc<Context>,
        connect: &Connect,
        dial: F,
    ) -> Result<Tunnel, ConnectError>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = io::Result<TcpStream>> + 'static,
    {
        let begun = Instant::now();
        loop {
            let (connection, place) = match self.pooled(key, context) {
                Some(found) => found,
                None => {
                    let connection = self.dialled(key, context, connect, &dial, begun).await?;
                    match connection.place() {
                        Some(place) => (connection, place),
                        // Others were quicker.
                        None if connection.streams() > 0 => continue,
                        None => {
                            let reason = "it allows no streams at all".into();
                            return Err(ConnectError::Unprocessed { peer: key.destination, reason });
                        }
                    }
                }
            };
            let result = connection.connect(place, connect).await;
            if matches!(result, Err(ConnectError::Silent { .. })) {
                self.evict(key, &connection);
            }
            return result;
        }
    }

    /// Waits for a dial, its own or one that is under way. When that takes too long it goes on: whoever comes next may
    /// find it done.
    async fn dialled<F, Fut>(
        &self,
        key: &Key,
        context: &Rc<Context>,
        connect: &Connect,
        dial: &F,
        begun: Instant,
    ) -> Result<Rc<Connection>, ConnectError>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = io::Result<TcpStream>> + 'static,
    {
        let (dial, reached) = self.join_dial(key, context, dial);
        loop {
            // A peer whose kernel has answered lives; its agent gets as long again for the handshake.
            let patient_until = reached.get().unwrap_or(begun).max(begun) + connect.patience;
            match timeout_at(patient_until.min(begun + connect.within), dial.clone()).await {
                Ok(connection) => return connection,
                Err(_) if reached.get().is_some_and(|at| at + connect.patience > patient_until) => {}
                Err(_) => return Err(ConnectError::Silent { peer: key.destination, after: connect.patience }),
            }
        }
    }

    /// Takes the connections of these keys out of use, for instance when a pod has gone; their streams go on.
    pub fn forget(&self, gone: impl Fn(&Key) -> bool) {
        self.entries.borrow_mut().retain(|key, _| !gone(key));
    }

    /// Drops connections that ended. Call now and then; a lookup of their key does it too.
    pub fn sweep(&self) {
        self.entries.borrow_mut().retain(|_, entry| {
            entry.connections.retain(|c| c.is_open());
            !entry.connections.is_empty() || !entry.dials.is_empty()
        });
    }

    pub fn size(&self) -> PoolSize {
        let mut size = PoolSize::default();
        for entry in self.entries.borrow().values() {
            size.connections += entry.connections.len();
            size.streams += entry.connections.iter().map(|c| c.streams()).sum::<usize>();
            size.dials += entry.dials.len();
        }
        size
    }

    fn pooled(&self, key: &Key, context: &Context) -> Option<(Rc<Connection>, Place)> {
        let mut entries = self.entries.borrow_mut();
        let entry = entries.get_mut(key)?;
        let trust = &context.credential().trust;
        entry.connections.retain(|c| c.is_usable(trust));
        entry.connections.iter().find_map(|c| c.place().map(|place| (c.clone(), place)))
    }

    fn evict(&self, key: &Key, connection: &Rc<Connection>) {
        if let Some(entry) = self.entries.borrow_mut().get_mut(key) {
            entry.connections.retain(|c| !Rc::ptr_eq(c, connection));
        }
    }

    /// A dial that is under way and not yet spoken for by all its future streams, or a new one.
    fn join_dial<F, Fut>(&self, key: &Key, context: &Rc<Context>, dial: &F) -> (Dial, Reached)
    where
        F: Fn() -> Fut,
        Fut: Future<Output = io::Result<TcpStream>> + 'static,
    {
        let mut entries = self.entries.borrow_mut();
        let entry = entries.entry(key.clone()).or_default();
        if let Some(pending) = entry.dials.iter_mut().find(|pending| pending.waiters < PER_DIAL) {
            pending.waiters += 1;
            return (pending.dial.clone(), pending.reached.clone());
        }
        let dialled = dial();
        let number = self.dials_begun.get();
        self.dials_begun.set(number + 1);
        let reached = Reached::default();
        let (pool, key, context, connected) = (self.clone(), key.clone(), context.clone(), reached.clone());
        let work: Pin<Box<dyn Future<Output = _>>> = Box::pin(async move {
            let result = pool.open(&key, &context, dialled, &connected).await;
            pool.finish(&key, number, &result);
            result
        });
        let work = work.shared();
        entry.dials.push(Pending { number, dial: work.clone(), reached: reached.clone(), waiters: 1 });
        // On its own, so that it survives the caller who began it.
        spawn_local(work.clone());
        (work, reached)
    }

    async fn open(
        &self,
        key: &Key,
        context: &Context,
        dialled: impl Future<Output = io::Result<TcpStream>>,
        reached: &Reached,
    ) -> Result<Rc<Connection>, ConnectError> {
        let peer = key.destination;
        let within = self.timeouts.handshake;
        let both = async {
            let tcp = dialled.await.map_err(|e| ConnectError::Dial {
                peer,
                kind: e.kind(),
                message: e.to_string().into(),
            })?;
            reached.set(Some(Instant::now()));
            Ok(Connection::open(tcp, peer, context, &key.expected, self.timeouts).await?)
        };
        let timed_out = |_| HandshakeError { peer, reason: TlsError::TimedOut(within) };
        timeout(within, both).await.map_err(timed_out)?.map(Rc::new)
    }

    fn finish(&self, key: &Key, number: u64, result: &Result<Rc<Connection>, ConnectError>) {
        let mut entries = self.entries.borrow_mut();
        // Forgotten meanwhile: the connection serves those who waited for it and nobody else.
        let Some(entry) = entries.get_mut(key) else { return };
        let Some(at) = entry.dials.iter().position(|pending| pending.number == number) else { return };
        entry.dials.swap_remove(at);
        if let Ok(connection) = result {
            entry.connections.push(connection.clone());
        }
        if entry.connections.is_empty() && entry.dials.is_empty() {
            entries.remove(key);
        }
    }
}
