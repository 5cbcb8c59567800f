//! The SPIFFE Workload API: an agent on this node, such as SPIRE's, hands out certificates and keys.
//!
//! It hands out what its registration entries allow to the process that asks, which is the node's agent and not a pod: each
//! service account needs an entry that selects hitless. The stream stays open, and what it brings replaces what it brought
//! before, bundles too.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;
use tonic::{Code, Status, transport::Endpoint};
use tracing::{info, warn};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Authority, IssueError, Issued, Issuing, SecretKey, SpiffeId, authority::Task};

/// Generated from `proto/spiffe/workload/workload.proto`.
#[allow(clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
pub mod protocol {
    tonic::include_proto!("_");
}

use protocol::{
    X509svid, X509svidRequest, X509svidResponse, spiffe_workload_api_client::SpiffeWorkloadApiClient as Client,
};

/// SPIFFE Workload API section 3.1: without it a request may be a browser's that was tricked.
const HEADER: &str = "workload.spiffe.io";
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// Certificates from the stream of a SPIFFE agent.
pub struct WorkloadApi {
    name: String,
    state: Arc<RwLock<State>>,
    news: watch::Receiver<u64>,
    _follow: Task,
}

/// What the stream brought last.
#[derive(Default)]
struct State {
    held: HashMap<SpiffeId, Held>,
    /// By trust domain.
    roots: BTreeMap<String, Vec<CertificateDer<'static>>>,
    /// What was wrong with others of the same message.
    skipped: Vec<String>,
    /// Why nothing comes at the moment.
    trouble: Option<Trouble>,
}

struct Held {
    chain: Vec<CertificateDer<'static>>,
    key: SecretKey,
}

#[derive(Clone)]
enum Trouble {
    /// The agent's word: nothing is registered for us.
    Nothing(String),
    Unreachable(String),
}

impl WorkloadApi {
    /// Within a runtime of tokio, as it follows the socket from then on. The agent behind it may come later.
    pub fn open(socket: &Path) -> Self {
        let trouble = Some(Trouble::Unreachable("it has not answered yet".into()));
        let state = Arc::new(RwLock::new(State { trouble, ..State::default() }));
        let (tell, news) = watch::channel(0);
        let follow = Task::spawn(follow(socket.to_owned(), state.clone(), tell));
        Self { name: format!("SPIFFE agent at {}", socket.display()), state, news, _follow: follow }
    }
}

impl Authority for WorkloadApi {
    fn name(&self) -> &str {
        &self.name
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a> {
        let issued = self.state.read().unwrap_or_else(PoisonError::into_inner).issue(id, &self.name);
        Box::pin(std::future::ready(issued))
    }

    fn news(&self) -> Option<watch::Receiver<u64>> {
        Some(self.news.clone())
    }
}

async fn follow(socket: PathBuf, state: Arc<RwLock<State>>, tell: watch::Sender<u64>) {
    let mut wait = RETRY;
    loop {
        let trouble = match stream(&socket, &state, &tell, &mut wait).await {
            Ok(()) => Trouble::Unreachable("it closed the stream".into()),
            Err(status) if status.code() == Code::PermissionDenied => Trouble::Nothing(status.message().to_owned()),
            Err(status) => Trouble::Unreachable(format!("{:?}: {}", status.code(), status.message())),
        };
        {
            let mut state = state.write().unwrap_or_else(PoisonError::into_inner);
            if state.trouble.is_none() {
                warn!(socket = %socket.display(), reason = trouble.words(), "no certificates from the SPIFFE agent");
            }
            if matches!(trouble, Trouble::Nothing(_)) {
                state.held.clear();
            }
            state.trouble = Some(trouble);
        }
        tokio::time::sleep(wait.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
        wait = (wait * 2).min(LONGEST_RETRY);
    }
}

/// One stream, until it ends.
async fn stream(
    socket: &Path,
    state: &RwLock<State>,
    tell: &watch::Sender<u64>,
    wait: &mut Duration,
) -> Result<(), Status> {
    let unreachable = |error: tonic::transport::Error| Status::unavailable(format!("{error}: {error:?}"));
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).map_err(unreachable)?;
    let mut client = Client::new(endpoint.connect().await.map_err(unreachable)?);
    let mut request = tonic::Request::new(X509svidRequest {});
    request.metadata_mut().insert(HEADER, tonic::metadata::MetadataValue::from_static("true"));
    let mut answers = client.fetch_x509svid(request).await?.into_inner();
    while let Some(answer) = answers.message().await? {
        let new = State::read(answer);
        info!(identities = new.held.len(), skipped = new.skipped.len(), "certificates from the SPIFFE agent");
        for skipped in &new.skipped {
            warn!(reason = skipped, "certificate of the SPIFFE agent not taken");
        }
        *state.write().unwrap_or_else(PoisonError::into_inner) = new;
        *wait = RETRY;
        tell.send_modify(|count| *count += 1);
    }
    Ok(())
}

/// What a message of the stream gives, by identity.
pub(crate) fn given(answer: X509svidResponse) -> Vec<(SpiffeId, Result<Issued, IssueError>)> {
    let state = State::read(answer);
    state.held.keys().map(|id| (id.clone(), state.issue(id, "the agent"))).collect()
}

impl State {
    fn read(answer: X509svidResponse) -> Self {
        let mut state = Self::default();
        for svid in answer.svids {
            let name = svid.spiffe_id.chars().take(300).collect::<String>();
            if let Err(reason) = state.take(svid) {
                state.skipped.push(format!("{name}: {reason}"));
            }
        }
        state
    }

    fn take(&mut self, svid: X509svid) -> Result<(), String> {
        // Wiped when it is dropped, whatever else is wrong.
        let key = SecretKey::from(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(svid.x509_svid_key)));
        let id: SpiffeId = svid.spiffe_id.parse().map_err(|bad: super::BadSpiffeId| bad.to_string())?;
        let chain = certificates(&svid.x509_svid).ok_or("its chain is not DER certificates")?;
        let bundle = certificates(&svid.bundle).ok_or("its bundle is not DER certificates")?;
        let roots = self.roots.entry(id.trust_domain().to_owned()).or_default();
        roots.extend(bundle);
        // Entries with a hint may repeat an identity; the first is the one to use (X.509-SVID profile, section 5.2.1).
        self.held.entry(id).or_insert(Held { chain, key });
        Ok(())
    }

    fn issue(&self, id: &SpiffeId, name: &str) -> Result<Issued, IssueError> {
        if let (Some(held), Some(roots)) = (self.held.get(id), self.roots.get(id.trust_domain())) {
            return Ok(Issued { chain: held.chain.clone(), key: held.key.clone(), roots: roots.clone() });
        }
        let remedy = "register an entry of that SPIFFE ID which selects the hitless agent";
        match &self.trouble {
            Some(Trouble::Unreachable(words)) => {
                let reason = format!("{name} cannot be asked: {words}");
                Err(IssueError::temporary(id, reason, "is it running, and is its socket mounted?"))
            }
            Some(Trouble::Nothing(words)) => {
                Err(IssueError::refused(id, format!("{name} has nothing for this process: {words}"), remedy))
            }
            None => {
                let mut reason = format!("{name} has {} others, but not it", self.held.len());
                for skipped in self.skipped.iter().take(3) {
                    reason += &format!("; not taken: {skipped}");
                }
                Err(IssueError::refused(id, reason, remedy))
            }
        }
    }
}

impl Trouble {
    fn words(&self) -> &str {
        match self {
            Self::Nothing(words) | Self::Unreachable(words) => words,
        }
    }
}

/// Certificates one after the other.
fn certificates(mut der: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let mut all = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).ok()?;
        all.push(der[..der.len() - rest.len()].to_vec().into());
        der = rest;
    }
    (!all.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests;
