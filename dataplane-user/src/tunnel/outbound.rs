//! A connection of a pod here to the mesh: to the backend that the kernel chose, or before its first byte to another.

use std::{
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use dataplane_ebpf::abi::{HBONE_PORT, Tunnelled};
use tokio::net::TcpStream;
use tracing::debug;

use super::{
    Count, LocalPod,
    access::Access,
    sockets,
    traffic::{Flags, Reporter},
    worker::{Worker, reset},
};
use crate::{
    hbone::{
        Stream,
        client::{Connect, ConnectError},
        headers::{Authority, Baggage, Forwarded, Metadata},
        local,
        pool::Key,
        relay::{self, Counts as Bytes},
    },
    identity::IssueError,
    kernel::Target,
    mesh::Workload,
    model::short_name,
    policy::Request,
    registry::address,
};

/// Backends that one connection is tried on, as in the kernel.
const MAX_TRIES: usize = dataplane_ebpf::abi::MAX_TRIES;
/// How long a backend may be silent while there may be another one: with the other's answer, the client's first byte
/// comes within 300 ms.
const PATIENCE: Duration = Duration::from_millis(250);
/// And when there is none: as Istio's proxy waits for a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// The far side of a connection that can begin.
enum Leg {
    Tunnel(Stream),
    /// With whom the policies are asked about again when they change.
    Local(TcpStream, Arc<Workload>, SocketAddr),
    Plain(TcpStream),
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Tunnel(#[from] ConnectError),
    #[error("cannot reach {at}: {error}")]
    Dial { at: SocketAddr, error: std::io::Error },
    #[error("{0}")]
    Denied(String),
    #[error("no certificate for the client: {0}")]
    Identity(#[from] IssueError),
    #[error("the certificate cannot be used: {0}")]
    Certificate(#[from] rustls::Error),
}

impl Failure {
    /// Another backend of the service may be asked.
    fn elsewhere(&self) -> bool {
        match self {
            Self::Tunnel(error) => error.elsewhere_is_safe(),
            Self::Dial { .. } => true,
            Self::Denied(_) | Self::Identity(_) | Self::Certificate(_) => false,
        }
    }

    fn silent(&self) -> bool {
        match self {
            Self::Tunnel(error) => matches!(error, ConnectError::Silent { .. }),
            Self::Dial { error, .. } => error.kind() == std::io::ErrorKind::TimedOut,
            _ => false,
        }
    }
}

/// Carries it to its end. The client's bytes wait in its socket until there is somebody to take them.
pub async fn carry(worker: &Rc<Worker>, pod: &Arc<LocalPod>, socket: TcpStream, client: SocketAddr) {
    let about = match worker.shared.maps.take(pod.cookie, client, pod.port) {
        Ok(Some(about)) => about,
        // Somebody in the pod found the port by himself.
        Ok(None) => {
            worker.counts().one(Count::OutboundStray);
            return reset(socket);
        }
        Err(error) => {
            debug!(pod = %pod.name, %error, "where a connection was to go cannot be read");
            return reset(socket);
        }
    };
    let original = address::socket(&about.original);
    let Some(source) = worker.shared.view.pod(pod.id) else { return reset(socket) };
    // What the other side sees: the pod's address, of the destination's family, and the client's port.
    let family = |addr: &&std::net::IpAddr| addr.is_ipv4() == original.is_ipv4();
    let Some(source_ip) = source.addresses.iter().find(family).or(source.addresses.first()) else {
        return reset(socket);
    };
    let outbound = Outbound { worker, pod, source: &source, client: SocketAddr::new(*source_ip, client.port()) };
    let service = if about.service == 0 { None } else { worker.shared.view.service(&original.ip()) };
    let access = Box::new(Access {
        reporter: Reporter::Source,
        source: outbound.client,
        source_workload: Some(source.clone()),
        source_identity: Some(source.identity.clone()),
        asked: original,
        destination: original,
        hbone: None,
        service,
        destination_workload: worker.shared.view.at(&original.ip()),
        destination_identity: None,
        began: Instant::now(),
    });
    // Boxed: what it takes to begin is not kept while the connection is relayed.
    match Box::pin(outbound.connect(&about, original)).await {
        Ok((at, leg)) => outbound.relay(socket, at, leg, access).await,
        Err(failure) => {
            let (count, flags) = match &failure {
                Failure::Denied(_) => (Count::OutboundDenied, Flags::Denied),
                Failure::Tunnel(ConnectError::Refused { status, .. }) if *status == http::StatusCode::UNAUTHORIZED => {
                    (Count::OutboundDenied, Flags::Denied)
                }
                _ => (Count::OutboundFailed, Flags::NotConnected),
            };
            worker.counts().one(count);
            access.failed(&worker.shared, flags, &failure.to_string());
            reset(socket);
        }
    }
}

struct Outbound<'a> {
    worker: &'a Rc<Worker>,
    pod: &'a Arc<LocalPod>,
    source: &'a Workload,
    client: SocketAddr,
}

impl Outbound<'_> {
    async fn connect(&self, about: &Tunnelled, original: SocketAddr) -> Result<(SocketAddr, Leg), Failure> {
        let maps = &self.worker.shared.maps;
        let mut random = || self.worker.random();
        let chosen = maps.backend(about.backend, about.generation);
        let mut target = match chosen {
            Some(chosen) => chosen,
            // It went between the kernel's choice and now.
            None if about.service != 0 => maps.pick(about.service, &[], &mut random).ok().flatten().unwrap_or(Target {
                backend: 0,
                generation: 0,
                at: original,
            }),
            None => Target { backend: 0, generation: 0, at: original },
        };
        // A destination that was named by address is never another one.
        let may_move = about.service != 0;
        let mut patience = if may_move { PATIENCE } else { CONNECT_WITHIN };
        let mut tried = Vec::with_capacity(MAX_TRIES);
        let first = target;
        loop {
            let failure = match self.attempt(&target, patience).await {
                Ok(leg) => {
                    let _ = maps.answered(&target);
                    return Ok((target.at, leg));
                }
                Err(failure) => failure,
            };
            if !(may_move && failure.elsewhere()) {
                return Err(failure);
            }
            debug!(pod = %self.pod.name, %failure, "another backend is tried");
            let _ = maps.failed(self.pod.cookie, about.service, &target);
            tried.push(target.backend);
            let next = if tried.len() < MAX_TRIES { maps.pick(about.service, &tried, &mut random) } else { Ok(None) };
            match next {
                Ok(Some(next)) => {
                    self.worker.counts().one(Count::OutboundRepicked);
                    target = next;
                }
                // All were silent: perhaps the network is slow, not they.
                _ if failure.silent() && patience < CONNECT_WITHIN => {
                    patience = CONNECT_WITHIN;
                    target = first;
                }
                _ => return Err(failure),
            }
        }
    }

    async fn attempt(&self, target: &Target, patience: Duration) -> Result<Leg, Failure> {
        let shared = &self.worker.shared;
        let at = target.at;
        let Some(destination) = shared.view.at(&at.ip()) else {
            // It left the mesh: then it takes what it is sent.
            return sockets::connect_within(shared, self.pod, at, None, patience)
                .await
                .map(Leg::Plain)
                .map_err(|error| Failure::Dial { at, error });
        };
        if let Some(pod) = shared.pod(destination.pod).filter(|_| !shared.local_tls) {
            return self.local(&pod, &destination, at, patience).await;
        }
        let credential = shared.store.fetch(&self.source.identity).await?;
        let context = self.worker.contexts.of(&credential)?;
        let key = Key {
            source: self.source.identity.clone(),
            expected: Arc::new([destination.identity.clone()]),
            destination: SocketAddr::new(at.ip(), HBONE_PORT),
            source_ip: self.client.ip(),
        };
        let metadata = Metadata {
            baggage: Some(about(self.source, &shared.cluster)),
            forwarded: Some(Forwarded::new(self.client, None)),
            traceparent: None,
            tries_elsewhere: true,
        };
        let connect = Connect { patience, within: CONNECT_WITHIN, ..Connect::new(Authority::Address(at), metadata) };
        let dial = || {
            let (shared, pod, to) = (shared.clone(), self.pod.clone(), key.destination);
            async move { sockets::connect(&shared, &pod, to, None).await }
        };
        Ok(Leg::Tunnel(self.worker.pool.connect(&key, &context, &connect, dial).await?.stream))
    }

    /// Both ends are here: this node proves who the client is, and asks the policies itself.
    async fn local(
        &self,
        pod: &LocalPod,
        destination: &Arc<Workload>,
        at: SocketAddr,
        patience: Duration,
    ) -> Result<Leg, Failure> {
        let shared = &self.worker.shared;
        if let Some(workload) = &destination.selected_by {
            match shared.admit(workload, &self.request(at)) {
                Some(decision) if decision.allow => {}
                Some(decision) => {
                    shared.counts.one(Count::InboundDenied);
                    return Err(Failure::Denied(decision.to_string()));
                }
                None => return Err(Failure::Denied("the policies are not known yet".into())),
            }
        }
        sockets::connect_within(shared, pod, at, Some(self.client), patience)
            .await
            .map(|far| Leg::Local(far, destination.clone(), at))
            .map_err(|error| Failure::Dial { at, error })
    }

    /// To a pod here, as its policies see it.
    fn request(&self, at: SocketAddr) -> Request<'_> {
        Request {
            source_ip: self.client.ip(),
            source: Some(&self.source.identity),
            destination_ip: at.ip(),
            destination_port: at.port(),
        }
    }

    async fn relay(&self, socket: TcpStream, at: SocketAddr, leg: Leg, mut access: Box<Access>) {
        let shared = &self.worker.shared;
        let _carrying = shared.carrying();
        let (count, tunnelled) = match &leg {
            Leg::Tunnel(_) => (Count::OutboundTunnelled, true),
            Leg::Local(..) => (Count::OutboundLocal, false),
            Leg::Plain(_) => (Count::OutboundPlain, false),
        };
        shared.counts.one(count);
        access.destination_workload = shared.view.at(&at.ip());
        // A peer of the mesh proved it, or this node's own pod has it.
        access.destination_identity = access.destination_workload.as_ref().map(|workload| workload.identity.clone());
        access.destination = if tunnelled { SocketAddr::new(at.ip(), HBONE_PORT) } else { at };
        access.hbone = tunnelled.then_some(at);
        let bytes = Rc::new(Bytes::default());
        let open = access.open(self.worker, &bytes);
        let ended = match leg {
            Leg::Tunnel(stream) => relay::tunnel(socket, stream, &bytes).await.map_err(|error| error.to_string()),
            Leg::Local(far, destination, at) => {
                // Pinned here: given away, it would be in the task twice.
                let relayed = pin!(local::relay(socket, far, &bytes));
                shared.until_revoked(&destination, &self.request(at), relayed).await
            }
            Leg::Plain(far) => local::relay(socket, far, &bytes).await.map_err(|error| error.to_string()),
        };
        shared.counts.add(Count::BytesSent, bytes.sent.get());
        shared.counts.add(Count::BytesReceived, bytes.received.get());
        open.end(&bytes, ended.err().as_deref());
    }
}

/// What is told of a workload.
pub fn about(workload: &Workload, cluster: &str) -> Baggage {
    Baggage {
        cluster: Some(cluster.into()),
        namespace: Some(workload.namespace().into()),
        workload_type: Some("pod".into()),
        workload: Some(short_name(&workload.name).into()),
        ..Baggage::default()
    }
}
