//! The agent's end of the admin API.

use std::{io, path::Path, pin::Pin, thread::JoinHandle, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream, errors::BroadcastStreamRecvError};
use tonic::{Request, Response};

use super::{
    Query, about_mesh,
    protocol::{
        Certificate, Config, Connection, Drain, DumpMeshRequest, DumpStateRequest, EndpointRow, EventRow,
        ExplainPolicyRequest, GetConfigRequest, GetStatusRequest, ListCertificatesRequest, ListConnectionsRequest,
        ListDrainsRequest, ListEndpointsRequest, ListPoliciesRequest, MeshObject, Policy, PolicyExplanation,
        StateObject, Status, WatchEventsRequest,
        admin_server::{Admin, AdminServer},
        counters,
    },
    socket, ztunnel,
};
use crate::{
    kernel::{Reader, monotonic_ns},
    metrics::{http, mesh::Facts},
    policy::Policies,
};

/// Requests are short.
const MAX_REQUEST: usize = 16 << 10;
/// How long an answer may take to begin.
const PATIENCE: Duration = Duration::from_secs(20);
/// A client that does not answer HTTP/2 pings has gone.
const PING: Duration = Duration::from_secs(20);
/// Pieces of an answer that wait for their reader.
const PIECES: usize = 4;

type Answer<T> = Result<Response<T>, tonic::Status>;
type Pieces<T> = Pin<Box<dyn Stream<Item = Result<T, tonic::Status>> + Send>>;

/// The thread that serves; it ends with this.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Its panic was printed when it happened.
            let _ = thread.join();
        }
    }
}

/// Serves at `path` on a thread of its own.
pub fn serve(
    path: &Path,
    metrics: Option<std::net::TcpListener>,
    queries: mpsc::Sender<Query>,
    reader: Reader,
) -> io::Result<Server> {
    let listener = socket::listen(path)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::Builder::new().name("admin".into()).spawn(move || {
        runtime.block_on(async {
            if let Some(metrics) = metrics {
                tokio::spawn(http::serve(metrics, queries.clone(), reader.clone()));
            }
            tokio::select! {
                () = grpc(listener, Service { queries, reader }) => {}
                _ = stopped => {}
            }
        });
        // Readers of the maps may be under way.
        runtime.shutdown_timeout(Duration::from_secs(1));
    })?;
    Ok(Server { stop: Some(stop), thread: Some(thread) })
}

async fn grpc(listener: std::os::unix::net::UnixListener, service: Service) {
    let listener = match tokio::net::UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "admin socket not served"),
    };
    let (let_in, clients) = mpsc::channel(PIECES);
    let acceptor = tokio::spawn(socket::accept(listener, let_in));
    let served = tonic::transport::Server::builder()
        .timeout(PATIENCE)
        .max_concurrent_streams(16)
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PING))
        .add_service(AdminServer::new(service).max_decoding_message_size(MAX_REQUEST))
        .serve_with_incoming(ReceiverStream::new(clients))
        .await;
    acceptor.abort();
    if let Err(error) = served {
        tracing::error!(%error, "admin socket not served any more");
    }
}

struct Service {
    queries: mpsc::Sender<Query>,
    reader: Reader,
}

#[tonic::async_trait]
impl Admin for Service {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Answer<Status> {
        let mut status = self.ask(Query::Status).await?;
        let (maps, stats) = self.read(|reader| (reader.occupancy(), reader.stats())).await?;
        status.counters = counters(&stats);
        status.mesh = self.ask(Query::Mesh).await?.as_ref().map(about_mesh::summary);
        if let Some(kernel) = &mut status.kernel {
            kernel.maps = maps.unwrap_or_default().into_iter().map(Into::into).collect();
        }
        Ok(Response::new(status))
    }

    type ListEndpointsStream = Pieces<EndpointRow>;

    async fn list_endpoints(&self, request: Request<ListEndpointsRequest>) -> Answer<Self::ListEndpointsStream> {
        let (to, pieces) = mpsc::channel(PIECES);
        self.queries.send(Query::Endpoints(request.into_inner().service, to)).await.map_err(|_| stopping())?;
        Ok(Response::new(Box::pin(ReceiverStream::new(pieces).flat_map(|rows| stream::iter(rows).map(Ok)))))
    }

    type ListDrainsStream = Pieces<Drain>;

    async fn list_drains(&self, _: Request<ListDrainsRequest>) -> Answer<Self::ListDrainsStream> {
        let drains = self.ask(Query::Drains).await?;
        Ok(Response::new(Box::pin(stream::iter(drains).map(Ok))))
    }

    type ListConnectionsStream = Pieces<Connection>;

    async fn list_connections(&self, _: Request<ListConnectionsRequest>) -> Answer<Self::ListConnectionsStream> {
        let flows = self.read(Reader::flows).await?.map_err(|error| tonic::Status::internal(error.to_string()))?;
        let now = monotonic_ns();
        let moved = flows.into_iter().map(move |(key, flow)| Ok(Connection::new(&key, &flow, now)));
        let carried = match self.ask(Query::Mesh).await? {
            Some(mesh) => mesh.shared.carried().await,
            None => Vec::new(),
        };
        Ok(Response::new(Box::pin(stream::iter(moved.chain(carried.into_iter().map(|row| Ok(row.into())))))))
    }

    async fn get_config(&self, _: Request<GetConfigRequest>) -> Answer<Config> {
        let settings = self.ask(Query::Config).await?;
        Ok(Response::new(Config { settings: settings.into_iter().map(Into::into).collect() }))
    }

    type DumpStateStream = Pieces<StateObject>;

    async fn dump_state(&self, _: Request<DumpStateRequest>) -> Answer<Self::DumpStateStream> {
        let (to, pieces) = mpsc::channel(PIECES);
        self.queries.send(Query::State(to)).await.map_err(|_| stopping())?;
        let encode = |object| match serde_json::to_string(&object) {
            Ok(json) => Ok(StateObject { json }),
            Err(error) => Err(tonic::Status::internal(error.to_string())),
        };
        let objects = ReceiverStream::new(pieces).flat_map(stream::iter);
        Ok(Response::new(Box::pin(objects.map(encode))))
    }

    type DumpMeshStream = Pieces<MeshObject>;

    async fn dump_mesh(&self, _: Request<DumpMeshRequest>) -> Answer<Self::DumpMeshStream> {
        let mesh = self.mesh().await?.shared;
        let carried = mesh.carried().await;
        // Certificates are read again for it.
        let objects =
            tokio::task::spawn_blocking(move || ztunnel::dump(&mesh, &carried)).await.map_err(|_| stopping())?;
        Ok(Response::new(Box::pin(stream::iter(objects).map(Ok))))
    }

    type ListCertificatesStream = Pieces<Certificate>;

    async fn list_certificates(&self, _: Request<ListCertificatesRequest>) -> Answer<Self::ListCertificatesStream> {
        let reports = self.mesh().await?.shared.store.report();
        Ok(Response::new(Box::pin(stream::iter(reports).map(|report| Ok(report.into())))))
    }

    type ListPoliciesStream = Pieces<Policy>;

    async fn list_policies(&self, _: Request<ListPoliciesRequest>) -> Answer<Self::ListPoliciesStream> {
        let standing = self.mesh().await?.shared.policies.read(Policies::standing);
        Ok(Response::new(Box::pin(stream::iter(standing).map(|one| Ok(one.into())))))
    }

    async fn explain_policy(&self, request: Request<ExplainPolicyRequest>) -> Answer<PolicyExplanation> {
        about_mesh::explain(&self.mesh().await?.shared, request.get_ref()).map(Response::new)
    }

    type WatchEventsStream = Pieces<EventRow>;

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let (past, coming) = self.ask(Query::Events).await?;
        let past = stream::iter(past).map(Ok);
        if !request.into_inner().follow {
            return Ok(Response::new(Box::pin(past)));
        }
        // Said, not hidden: the reader was slower than the kernel.
        let coming = BroadcastStream::new(coming).map(|event| match event {
            Ok(event) => Ok(event),
            Err(BroadcastStreamRecvError::Lagged(lost)) => Ok(lost_events(lost)),
        });
        Ok(Response::new(Box::pin(past.chain(coming))))
    }
}

impl Service {
    async fn ask<T>(&self, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Result<T, tonic::Status> {
        let (to, answer) = oneshot::channel();
        self.queries.send(query(to)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
    }

    async fn mesh(&self) -> Result<Facts, tonic::Status> {
        let none = || tonic::Status::failed_precondition("there is no mesh: mtls is off (`hitless config dump`)");
        self.ask(Query::Mesh).await?.ok_or_else(none)
    }

    /// Reads maps, which takes a while when they are full.
    async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Reader) -> T + Send + 'static,
    ) -> Result<T, tonic::Status> {
        let reader = self.reader.clone();
        tokio::task::spawn_blocking(move || look(&reader)).await.map_err(|_| stopping())
    }
}

fn stopping() -> tonic::Status {
    tonic::Status::unavailable("the agent is stopping")
}

fn lost_events(lost: u64) -> EventRow {
    EventRow { event: format!("{lost} events were not read in time"), ..EventRow::default() }
}
