//! The command line's end of the admin API: calls that block.

use std::{future::Future, io::ErrorKind, path::Path, time::Duration};

use anyhow::{Context, anyhow};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Code, Response, Streaming,
    transport::{Channel, Endpoint},
};

use super::protocol::{
    Certificate, Connection, Drain, DumpMeshRequest, DumpStateRequest, EndpointRow, EventRow, ExplainPolicyRequest,
    GetConfigRequest, GetStatusRequest, ListCertificatesRequest, ListConnectionsRequest, ListDrainsRequest,
    ListEndpointsRequest, ListPoliciesRequest, MeshObject, Policy, PolicyExplanation, Setting, Status,
    WatchEventsRequest, admin_client::AdminClient,
};
use crate::model::{Object, Snapshot};

/// No agent answers at the socket.
#[derive(Debug, thiserror::Error)]
#[error("no agent answers at {0}: is `hitless run` running, with this --state-dir?")]
pub struct NoAgent(String);

/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a running agent.
pub struct Client {
    runtime: tokio::runtime::Runtime,
    admin: AdminClient<Channel>,
}

impl Client {
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(patiently(async {
            // By hand: only here is it told why it failed.
            let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                    anyhow::Error::new(NoAgent(socket.display().to_string()))
                }
                ErrorKind::PermissionDenied => {
                    anyhow!("{}: permission denied: the agent talks to root only", socket.display())
                }
                _ => anyhow::Error::new(error).context(format!("connect {}", socket.display())),
            })?;
            let mut stream = Some(TokioIo::new(stream));
            let connector = tower::service_fn(move |_| {
                let stream = stream.take().ok_or(ErrorKind::NotConnected);
                async { stream.map_err(std::io::Error::from) }
            });
            // The name is not looked up; HTTP/2 wants one.
            let endpoint = Endpoint::from_static("http://hitless");
            endpoint.connect_with_connector(connector).await.with_context(|| no_grpc(socket))
        }))?;
        Ok(Self { runtime, admin: AdminClient::new(channel) })
    }

    pub fn status(&mut self) -> anyhow::Result<Status> {
        one(&self.runtime, self.admin.get_status(GetStatusRequest {}))
    }

    /// Of one service, or all.
    pub fn endpoints(&mut self, service: Option<String>) -> anyhow::Result<Vec<EndpointRow>> {
        all(&self.runtime, self.admin.list_endpoints(ListEndpointsRequest { service }))
    }

    /// The drains that the agent remembers, oldest first.
    pub fn drains(&mut self) -> anyhow::Result<Vec<Drain>> {
        all(&self.runtime, self.admin.list_drains(ListDrainsRequest {}))
    }

    /// The connections that were moved, and those that are carried.
    pub fn connections(&mut self) -> anyhow::Result<Vec<Connection>> {
        all(&self.runtime, self.admin.list_connections(ListConnectionsRequest {}))
    }

    /// Of the identities of the pods here.
    pub fn certificates(&mut self) -> anyhow::Result<Vec<Certificate>> {
        all(&self.runtime, self.admin.list_certificates(ListCertificatesRequest {}))
    }

    /// The mesh's part of what ztunnel's /config_dump has.
    pub fn mesh(&mut self) -> anyhow::Result<Vec<MeshObject>> {
        all(&self.runtime, self.admin.dump_mesh(DumpMeshRequest {}))
    }

    /// Every policy that the agent was told.
    pub fn policies(&mut self) -> anyhow::Result<Vec<Policy>> {
        all(&self.runtime, self.admin.list_policies(ListPoliciesRequest {}))
    }

    /// Why a connection would be let in or refused.
    pub fn explain(&mut self, asked: ExplainPolicyRequest) -> anyhow::Result<PolicyExplanation> {
        one(&self.runtime, self.admin.explain_policy(asked))
    }

    /// Every option in force.
    pub fn config(&mut self) -> anyhow::Result<Vec<Setting>> {
        Ok(one(&self.runtime, self.admin.get_config(GetConfigRequest {}))?.settings)
    }

    /// The desired state as the agent holds it.
    pub fn state(&mut self) -> anyhow::Result<Snapshot> {
        let mut objects = Vec::new();
        each(&self.runtime, self.admin.dump_state(DumpStateRequest {}), |object| {
            let parsed = serde_json::from_str::<Object>(&object.json);
            objects.push(parsed.with_context(|| format!("the agent told of {}: another version?", object.json))?);
            Ok(true)
        })?;
        Ok(objects.into_iter().collect())
    }

    /// Reads events until the agent or `take` ends it (by `Ok(false)`).
    pub fn events(&mut self, follow: bool, take: impl FnMut(EventRow) -> anyhow::Result<bool>) -> anyhow::Result<()> {
        each(&self.runtime, self.admin.watch_events(WatchEventsRequest { follow }), take)
    }
}

fn one<T>(
    runtime: &tokio::runtime::Runtime,
    call: impl Future<Output = Result<Response<T>, tonic::Status>>,
) -> anyhow::Result<T> {
    runtime.block_on(patiently(async { Ok(call.await.map_err(explain)?.into_inner()) }))
}

/// Every piece of an answer that ends.
fn all<T>(
    runtime: &tokio::runtime::Runtime,
    call: impl Future<Output = Result<Response<Streaming<T>>, tonic::Status>>,
) -> anyhow::Result<Vec<T>> {
    let mut pieces = Vec::new();
    each(runtime, call, |piece| {
        pieces.push(piece);
        Ok(true)
    })?;
    Ok(pieces)
}

fn each<T>(
    runtime: &tokio::runtime::Runtime,
    call: impl Future<Output = Result<Response<Streaming<T>>, tonic::Status>>,
    mut take: impl FnMut(T) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    runtime.block_on(async {
        let mut pieces = patiently(async { Ok(call.await.map_err(explain)?.into_inner()) }).await?;
        while let Some(piece) = pieces.message().await.map_err(explain)? {
            if !take(piece)? {
                break;
            }
        }
        Ok(())
    })
}

async fn patiently<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let late = || anyhow!("the agent did not answer within {} s: look at its log", PATIENCE.as_secs());
    tokio::time::timeout(PATIENCE, work).await.map_err(|_| late())?
}

fn explain(status: tonic::Status) -> anyhow::Error {
    match status.code() {
        Code::Unimplemented => anyhow!("the agent is of another version and does not know this request: upgrade it"),
        // What the transport says of itself ("transport error") helps nobody.
        // "Not connected", when it left before the request was on its way.
        Code::Unknown | Code::Cancelled | Code::Internal | Code::Unavailable => {
            anyhow!("the agent left while it answered ({})", status.message())
        }
        _ => anyhow!("the agent says: {}", status.message()),
    }
}

fn no_grpc(socket: &Path) -> String {
    format!(
        "what listens at {} does not take this client: another program, or an agent of another version",
        socket.display()
    )
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixListener};

    use super::*;

    #[test]
    fn who_is_not_there_and_who_speaks_something_else_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let error = Client::connect(&path).err().unwrap();
        assert!(error.is::<NoAgent>(), "{error}");

        let listener = UnixListener::bind(&path).unwrap();
        let other = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"error\":\"not a request\"}\n").unwrap();
        });
        let error = Client::connect(&path).and_then(|mut client| client.status()).unwrap_err();
        assert!(!error.is::<NoAgent>());
        let said = format!("{error:#}");
        assert!(said.contains("another version") || said.contains("left while it answered"), "{said}");
        other.join().unwrap();
    }
}
