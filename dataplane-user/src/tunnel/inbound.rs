//! What comes into a pod here: HBONE from other nodes, and plaintext that the policies are asked about.

use std::{
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::net::TcpStream;
use tracing::debug;

use super::{
    Count, LocalPod,
    access::Access,
    outbound::about,
    sockets,
    traffic::{Flags, Reporter},
    worker::{Worker, reset},
};
use crate::{
    hbone::{
        Stream,
        headers::Authority,
        local,
        relay::{self, Counts as Bytes},
        server::{self, Answer, Refusal},
    },
    identity::SpiffeId,
    mesh::Workload,
    policy::{self, log::Record},
};

/// For an application of this node: it listens or it does not.
const DIAL_WITHIN: Duration = Duration::from_secs(10);

/// A connection to port 15008.
pub async fn tunnelled(
    worker: &Rc<Worker>,
    pod: &Arc<LocalPod>,
    socket: TcpStream,
    peer: SocketAddr,
    here: SocketAddr,
) {
    let Some(workload) = worker.shared.view.pod(pod.id) else { return reset(socket) };
    let context = match worker.shared.store.fetch(&workload.identity).await {
        Ok(credential) => worker.contexts.of(&credential).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let context = match context {
        Ok(context) => context,
        Err(error) => {
            worker.counts().one(Count::InboundRejected);
            debug!(pod = %pod.name, %peer, error, "HBONE refused: no certificate for the pod");
            return reset(socket);
        }
    };
    let (to, of) = (pod.clone(), worker.clone());
    let service =
        move |request, answer| Inbound { worker: of.clone(), pod: to.clone(), peer, here }.serve(request, answer);
    let phase = pod.phase.subscribe();
    let served = server::serve(socket, peer, context.server(), worker.timeouts, phase, Rc::new(service)).await;
    if let Err(error) = served {
        worker.counts().one(Count::InboundRejected);
        debug!(pod = %pod.name, %error, "an HBONE connection ended badly");
    }
}

/// A connection to any other port: led here because there are policies.
pub async fn plaintext(
    worker: &Rc<Worker>,
    pod: &Arc<LocalPod>,
    socket: TcpStream,
    peer: SocketAddr,
    here: SocketAddr,
) {
    let Some(workload) = worker.shared.view.pod(pod.id) else { return reset(socket) };
    let inbound = Inbound { worker: worker.clone(), pod: pod.clone(), peer, here };
    if !inbound.admitted(&workload, None, here) {
        return reset(socket);
    }
    let shared = &worker.shared;
    match sockets::connect_within(shared, pod, here, Some(peer), DIAL_WITHIN).await {
        Ok(application) => {
            worker.counts().one(Count::InboundPlain);
            inbound.relay(&workload, None, here, async |bytes| local::relay(application, socket, bytes).await).await;
        }
        Err(error) => {
            worker.counts().one(Count::InboundFailed);
            let access = inbound.access(&workload, None, here);
            access.failed(shared, Flags::NotConnected, &format!("the application did not take it: {error}"));
            reset(socket);
        }
    }
}

/// Backends that a stream for a dead application is tried on.
const BOUNCES: usize = 8;

/// One stream, or one connection of plaintext, into a pod.
struct Inbound {
    worker: Rc<Worker>,
    pod: Arc<LocalPod>,
    peer: SocketAddr,
    here: SocketAddr,
}

/// An application that took a stream.
struct Way {
    inbound: Inbound,
    workload: Arc<Workload>,
    to: SocketAddr,
    application: TcpStream,
}

impl Inbound {
    fn serve(self, request: server::Request, answer: Answer) -> impl Future<Output = ()> {
        // Boxed: what it takes to begin is not kept while the stream is relayed.
        let begun = Box::pin(self.begin(request, answer));
        async move {
            let Some((way, client, stream)) = begun.await else { return };
            let Way { inbound, workload, to, application } = way;
            let relayed = async |bytes: &Bytes| relay::tunnel(application, stream, bytes).await;
            inbound.relay(&workload, Some(&client), to, relayed).await;
        }
    }

    /// The application that takes the stream, who the client is, and the stream; or the refusal is told.
    async fn begin(self, request: server::Request, answer: Answer) -> Option<(Way, SpiffeId, Stream)> {
        let counts = self.worker.counts();
        let refuse = |answer: Answer, refusal| {
            answer.refuse(refusal);
            None
        };
        let Some(workload) = self.worker.shared.view.pod(self.pod.id) else {
            return refuse(answer, Refusal::Unavailable);
        };
        let to = match request.authority {
            // Of the pod that the connection is to: a peer proved itself for no other, and HBONE in HBONE is a loop.
            Authority::Address(to)
                if workload.addresses.contains(&to.ip().to_canonical()) && to.port() != crate::hbone::PORT =>
            {
                to
            }
            ref other => {
                counts.one(Count::InboundBad);
                debug!(pod = %self.pod.name, peer = %self.peer, authority = %other, "CONNECT to something else");
                return refuse(answer, Refusal::BadRequest);
            }
        };
        if !self.admitted(&workload, Some(&request.client), to) {
            return refuse(answer, Refusal::Denied);
        }
        // The application sees the client: the address that the packets come from, and its port when it is told.
        let forwarded = request.metadata.forwarded.as_ref().and_then(|forwarded| forwarded.client_address());
        let client = forwarded.filter(|client| client.ip() == self.peer.ip()).unwrap_or(self.peer);
        let dialled = sockets::connect_within(&self.worker.shared, &self.pod, to, Some(client), DIAL_WITHIN).await;
        let (way, count) = match dialled {
            Ok(application) => (Way { inbound: self, workload, to, application }, Count::InboundTunnelled),
            Err(error) => match self.elsewhere(&request, to, client).await {
                Some(way) => {
                    debug!(pod = %self.pod.name, to = %way.workload.name, "a stream for a dead application goes to another");
                    (way, Count::InboundBounced)
                }
                None => {
                    counts.one(Count::InboundFailed);
                    let access = self.access(&workload, Some(&request.client), to);
                    let error = format!("the application could not be reached: {error}");
                    access.failed(&self.worker.shared, Flags::NotConnected, &error);
                    return refuse(answer, Refusal::Unavailable);
                }
            },
        };
        match answer.accept(Some(&about(&way.workload, &way.inbound.worker.shared.cluster))) {
            Ok(stream) => {
                way.inbound.worker.counts().one(count);
                Some((way, request.client, stream))
            }
            Err(error) => {
                debug!(pod = %way.inbound.pod.name, %error, "the peer gave up before the answer");
                None
            }
        }
    }

    fn access(&self, workload: &Arc<Workload>, client: Option<&SpiffeId>, to: SocketAddr) -> Box<Access> {
        let source_workload = self.worker.shared.view.at(&self.peer.ip());
        Box::new(Access {
            reporter: Reporter::Destination,
            source: self.peer,
            // A name is told of whoever proved it, or of plaintext that nobody proves.
            source_workload: source_workload.filter(|one| client.is_none_or(|client| one.identity == *client)),
            source_identity: client.cloned(),
            asked: self.here,
            destination: self.here,
            hbone: client.map(|_| to),
            service: None,
            destination_workload: Some(workload.clone()),
            destination_identity: Some(workload.identity.clone()),
            began: Instant::now(),
        })
    }

    /// The application is gone while its pod's network lives: another backend of the same services takes the stream, if
    /// one runs here. Only for peers that would not try another one themselves. What was proved of the client holds
    /// there too, because this node saw the proof; to another node it could not be passed on. And as it goes to an
    /// application, not to an agent, it goes no further.
    async fn elsewhere(&self, request: &server::Request, to: SocketAddr, client: SocketAddr) -> Option<Way> {
        let shared = &self.worker.shared;
        if request.metadata.tries_elsewhere {
            return None;
        }
        let (dead, service) = shared.maps.group_of(to).ok()??;
        let mut tried = vec![dead.backend];
        for _ in 0..BOUNCES {
            let other = shared.maps.pick(service, &tried, &mut || self.worker.random()).ok()??;
            tried.push(other.backend);
            let Some(workload) = shared.view.at(&other.at.ip()) else { continue };
            let Some(pod) = shared.pod(workload.pod) else { continue };
            let inbound = Inbound { worker: self.worker.clone(), pod, peer: self.peer, here: self.here };
            if !inbound.admitted(&workload, Some(&request.client), other.at) {
                continue;
            }
            let dialled = sockets::connect_within(shared, &inbound.pod, other.at, Some(client), DIAL_WITHIN).await;
            if let Ok(application) = dialled {
                return Some(Way { inbound, workload, to: other.at, application });
            }
        }
        None
    }

    /// What the policies say, told and counted.
    fn admitted(&self, workload: &Arc<Workload>, client: Option<&SpiffeId>, to: SocketAddr) -> bool {
        let Some(selected_by) = &workload.selected_by else { return true };
        let Some(decision) = self.worker.shared.admit(selected_by, &self.request(client, to)) else {
            debug!(pod = %self.pod.name, peer = %self.peer, "refused: the policies are not known yet");
            return false;
        };
        if !decision.allow {
            self.worker.counts().one(Count::InboundDenied);
            self.access(workload, client, to).denied(&self.worker.shared);
        }
        Record {
            source: self.peer,
            source_workload: None,
            source_namespace: None,
            source_identity: client,
            destination: self.here,
            destination_hbone: client.map(|_| to),
            destination_service: None,
            destination_workload: selected_by,
            destination_identity: Some(&workload.identity),
            decision: &decision,
        }
        .log();
        decision.allow
    }

    fn request<'a>(&self, client: Option<&'a SpiffeId>, to: SocketAddr) -> policy::Request<'a> {
        policy::Request {
            source_ip: self.peer.ip(),
            source: client,
            destination_ip: to.ip(),
            destination_port: to.port(),
        }
    }

    /// Relays to the end, counted and told.
    async fn relay<E: std::fmt::Display>(
        &self,
        workload: &Arc<Workload>,
        client: Option<&SpiffeId>,
        to: SocketAddr,
        relayed: impl AsyncFnOnce(&Bytes) -> Result<(), E>,
    ) {
        let shared = &self.worker.shared;
        let _carrying = shared.carrying();
        let bytes = Rc::new(Bytes::default());
        let open = self.access(workload, client, to).open(&self.worker, &bytes);
        // Pinned here: given away, it would be in the task twice.
        let relayed = pin!(relayed(&bytes));
        let ended = shared.until_revoked(workload, &self.request(client, to), relayed).await;
        shared.counts.add(Count::BytesReceived, bytes.received.get());
        shared.counts.add(Count::BytesSent, bytes.sent.get());
        open.end(&bytes, ended.err().as_deref());
    }
}
