//! Against a server that speaks the Workload API on a Unix socket. The real SPIRE is asked in tests/tests/identity.rs.

use std::{collections::VecDeque, sync::Mutex};

use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use super::{
    protocol::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer},
    *,
};
use crate::identity::{
    Credential, IssueErrorKind, Store, Timing, TrustBundle,
    testing::{DOMAIN, Leaf, Root, id},
};

type Answers = mpsc::Receiver<Result<X509svidResponse, Status>>;

/// Each call gets the next of the prepared streams.
struct Agent(Mutex<VecDeque<Answers>>);

#[tonic::async_trait]
impl SpiffeWorkloadApi for Agent {
    type FetchX509SVIDStream = ReceiverStream<Result<X509svidResponse, Status>>;

    async fn fetch_x509svid(
        &self,
        request: tonic::Request<X509svidRequest>,
    ) -> Result<tonic::Response<Self::FetchX509SVIDStream>, Status> {
        assert_eq!(request.metadata().get(HEADER).unwrap(), "true");
        let stream = self.0.lock().unwrap().pop_front().ok_or_else(|| Status::unavailable("no more"))?;
        Ok(tonic::Response::new(ReceiverStream::new(stream)))
    }
}

fn serve(socket: &Path, streams: Vec<Answers>) -> Task {
    let listener = UnixListener::bind(socket).unwrap();
    let (let_in, clients) = mpsc::channel(1);
    let served = Server::builder()
        .add_service(SpiffeWorkloadApiServer::new(Agent(Mutex::new(streams.into()))))
        .serve_with_incoming(ReceiverStream::new(clients));
    Task::spawn(async move {
        let accept = async {
            loop {
                let client = listener.accept().await.map(|(client, _)| client);
                let_in.send(client).await.unwrap();
            }
        };
        tokio::select! {
            served = served => served.unwrap(),
            () = accept => {}
        }
    })
}

fn svid(root: &Root, name: &str, bundle: &[&Root]) -> X509svid {
    let leaf = Leaf::new(&id(name));
    X509svid {
        spiffe_id: id(name).to_string(),
        x509_svid: root.sign(&leaf).to_vec(),
        x509_svid_key: leaf.key.serialize_der(),
        bundle: bundle.iter().flat_map(|root| root.der().to_vec()).collect(),
    }
}

fn answer(svids: Vec<X509svid>) -> Result<X509svidResponse, Status> {
    Ok(X509svidResponse { svids })
}

#[tokio::test]
async fn what_the_stream_brings_is_in_force_until_it_brings_something_else() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let (old, new) = (Root::new("old"), Root::new("new"));
    // The agent comes after hitless.
    let store = Store::new(
        Arc::new(WorkloadApi::open(&socket)),
        Timing { fetch_wait: Duration::from_secs(20), ..Timing::default() },
    );
    let runner = store.clone();
    let running = tokio::spawn(async move { runner.run().await });
    let (send, stream) = mpsc::channel(4);
    send.send(answer(vec![svid(&old, "web", &[&old]), svid(&old, "db", &[&old])])).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (again, second_stream) = mpsc::channel(4);
    let _server = serve(&socket, vec![stream, second_stream]);
    let (web, db) = (store.fetch(&id("web")).await.unwrap(), store.fetch(&id("db")).await.unwrap());
    assert_ne!(web.serial, db.serial);

    // A bundle that rotates, with the same certificates or others.
    let changed = async |roots: usize, serial: &str| {
        let until = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            let now = store.get(&id("web")).expect("there is always one");
            if now.trust.roots.len() == roots && now.serial != serial {
                return now;
            }
            assert!(tokio::time::Instant::now() < until, "the stream's news were not taken");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    send.send(answer(vec![svid(&old, "web", &[&old, &new])])).await.unwrap();
    let both = changed(2, &web.serial).await;
    send.send(answer(vec![svid(&new, "web", &[&old, &new])])).await.unwrap();
    let renewed = changed(2, &both.serial).await;
    assert!(renewed.trusted_by(&new.trust(), std::time::SystemTime::now()));

    // A stream that ends takes nothing away, and is opened again.
    drop(send);
    again.send(answer(vec![svid(&new, "web", &[&new])])).await.unwrap();
    changed(1, &renewed.serial).await;
    let error = store.report().into_iter().find(|line| line.identity.ends_with("/db")).unwrap().last_error.unwrap();
    assert!(error.contains("has 1 others, but not it") && error.contains("register an entry"), "{error}");
    running.abort();
}

#[tokio::test]
async fn what_is_wrong_with_the_agent_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let api = WorkloadApi::open(&socket);
    let told = async |words: &str| {
        let until = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            let error = api.issue(&id("web")).await.map(drop).unwrap_err();
            if error.to_string().contains(words) {
                return error;
            }
            assert!(tokio::time::Instant::now() < until, "{error}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let nobody = told("cannot be asked: Unavailable").await;
    assert!(nobody.kind == IssueErrorKind::Temporary && nobody.to_string().contains("agent.sock"), "{nobody}");
    let (send, stream) = mpsc::channel(1);
    send.send(Err(Status::permission_denied("no identity issued"))).await.unwrap();
    let _server = serve(&socket, vec![stream]);
    let nothing = told("no identity issued").await;
    assert!(nothing.kind == IssueErrorKind::Refused && nothing.remedy.contains("selects the hitless agent"));
}

#[test]
fn what_cannot_be_used_is_named_and_hinders_no_other() {
    let root = Root::new("root");
    let spoiled = |change: &dyn Fn(&mut X509svid)| {
        let mut svid = svid(&root, "bad", &[&root]);
        change(&mut svid);
        svid
    };
    let state = State::read(X509svidResponse {
        svids: vec![
            spoiled(&|svid| svid.spiffe_id = "spiffe://cluster.local/spire/agent/x".into()),
            spoiled(&|svid| svid.x509_svid.truncate(20)),
            spoiled(&|svid| svid.x509_svid.clear()),
            spoiled(&|svid| svid.bundle.push(0)),
            svid(&root, "web", &[&root]),
        ],
    });
    assert_eq!(state.skipped.len(), 4, "{:?}", state.skipped);
    assert!(state.skipped[0].starts_with("spiffe://cluster.local/spire/agent/x: "), "{:?}", state.skipped);
    let issued = state.issue(&id("web"), "it").unwrap();
    let trust = Arc::new(TrustBundle::new(DOMAIN, issued.roots.clone()).unwrap());
    Credential::check(&id("web"), issued, trust, std::time::SystemTime::now()).unwrap();
    let error = state.issue(&id("bad"), "it").map(drop).unwrap_err().to_string();
    assert!(error.contains("has 1 others") && error.contains("not taken: spiffe://"), "{error}");
}

#[test]
fn chains_of_several_certificates_are_taken_apart() {
    let root = Root::new("root");
    let middle = root.intermediate("middle");
    let leaf = Leaf::new(&id("web"));
    let ders = [middle.sign(&leaf), middle.der()];
    assert_eq!(certificates(&[ders[0].to_vec(), ders[1].to_vec()].concat()).unwrap(), ders);
    assert!(certificates(b"").is_none());
}
