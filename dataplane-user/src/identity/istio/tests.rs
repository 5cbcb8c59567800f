//! Against a server that speaks Istio's protocol over TLS: what is sent, what is taken, and what each failure is called.

use std::{fs, sync::Arc};

use rcgen::{CertificateParams, KeyPair};
use tokio::sync::mpsc;
use tonic::transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming};

use super::{
    protocol::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
    *,
};
use crate::identity::{
    IssueErrorKind, Store, Timing,
    authority::Task,
    testing::{Root, id},
};

/// What the server saw of a request.
struct Seen {
    authorization: String,
    cluster: String,
    impersonated: String,
    request: IstioCertificateRequest,
}

type Answer = dyn Fn(&IstioCertificateRequest) -> Result<Vec<String>, Status> + Send + Sync;

struct Istiod {
    answer: Box<Answer>,
    seen: mpsc::UnboundedSender<Seen>,
}

#[tonic::async_trait]
impl IstioCertificateService for Istiod {
    async fn create_certificate(
        &self,
        request: tonic::Request<IstioCertificateRequest>,
    ) -> Result<tonic::Response<protocol::IstioCertificateResponse>, Status> {
        let header = |name: &str| request.metadata().get(name).unwrap().to_str().unwrap().to_owned();
        let (authorization, cluster) = (header("authorization"), header("clusterid"));
        let request = request.into_inner();
        let value = request.metadata.as_ref().unwrap().fields[IMPERSONATED].kind.clone().unwrap();
        let Kind::StringValue(impersonated) = value else { panic!("{value:?}") };
        let answer = (self.answer)(&request);
        self.seen.send(Seen { authorization, cluster, impersonated, request }).unwrap();
        answer.map(|cert_chain| tonic::Response::new(protocol::IstioCertificateResponse { cert_chain }))
    }
}

struct Scene {
    istio: Istio,
    seen: mpsc::UnboundedReceiver<Seen>,
    directory: tempfile::TempDir,
    _server: Task,
}

fn scene(answer: impl Fn(&IstioCertificateRequest) -> Result<Vec<String>, Status> + Send + Sync + 'static) -> Scene {
    let key = KeyPair::generate().unwrap();
    let tls = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = incoming.local_addr().unwrap().port();
    let config = IstioConfig {
        root: directory.path().join("root-cert.pem"),
        token: directory.path().join("token"),
        cluster_id: "c1".into(),
        ..IstioConfig::new(&format!("https://localhost:{port}"), &IstioPlaces::default())
    };
    fs::write(&config.root, tls.pem()).unwrap();
    fs::write(&config.token, "first\n").unwrap();
    let (send, seen) = mpsc::unbounded_channel();
    let identity = Identity::from_pem(tls.pem(), key.serialize_pem());
    let server = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))
        .unwrap()
        .add_service(IstioCertificateServiceServer::new(Istiod { answer: Box::new(answer), seen: send }))
        .serve_with_incoming(incoming);
    let server = Task::spawn(async move { server.await.unwrap() });
    Scene { istio: Istio::new(config), seen, directory, _server: server }
}

async fn refused(
    answer: impl Fn(&IstioCertificateRequest) -> Result<Vec<String>, Status> + Send + Sync + 'static,
) -> IssueError {
    scene(answer).istio.issue(&id("web")).await.map(drop).unwrap_err()
}

#[tokio::test]
async fn a_certificate_is_asked_for_as_istios_node_proxy_does() {
    let root = Arc::new(Root::new("root"));
    let middle = Arc::new(root.intermediate("middle"));
    let (signer, top) = (middle.clone(), root.pem());
    let mut scene =
        scene(move |request| Ok(vec![signer.sign_request(&request.csr).unwrap(), signer.pem(), top.clone()]));
    let issued = scene.istio.issue(&id("web")).await.unwrap();
    assert_eq!((issued.chain.len(), &issued.roots), (2, &vec![root.der()]));
    super::super::Credential::check(&id("web"), issued, root.trust(), SystemTime::now()).unwrap();

    let seen = scene.seen.recv().await.unwrap();
    assert_eq!((seen.authorization.as_str(), seen.cluster.as_str()), ("Bearer first", "c1"));
    assert_eq!(seen.impersonated, "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(seen.request.validity_duration, 86_400);

    // The kubelet renews the token in its place.
    fs::write(scene.directory.path().join("token"), "second").unwrap();
    scene.istio.issue(&id("db")).await.unwrap();
    assert_eq!(scene.seen.recv().await.unwrap().authorization, "Bearer second");
}

#[tokio::test]
async fn an_istiod_that_gives_less_than_is_asked_for_decides_itself_from_then_on() {
    let root = Root::new("root");
    let mut scene = scene(move |request| match request.validity_duration {
        0 => Ok(vec![root.sign_request(&request.csr).unwrap(), root.pem()]),
        _ => Err(Status::invalid_argument(
            "CSR signing error (requested TTL 24h0m0s is greater than the max allowed TTL 1h0m0s)",
        )),
    });
    for name in ["web", "db"] {
        scene.istio.issue(&id(name)).await.unwrap();
    }
    let mut asked = Vec::new();
    while let Ok(seen) = scene.seen.try_recv() {
        asked.push(seen.request.validity_duration);
    }
    assert_eq!(asked, [86_400, 0, 0]);
}

#[tokio::test]
async fn an_istiod_that_moves_to_another_root_leaves_nobody_out() {
    let (old, new) = (Root::new("old"), Root::new("new"));
    let (old_der, new_der) = (old.der(), new.der());
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let scene = scene(move |request| {
        let first = asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0;
        let signer = if first { &old } else { &new };
        Ok(vec![signer.sign_request(&request.csr).unwrap(), signer.pem()])
    });
    assert_eq!(scene.istio.issue(&id("web")).await.unwrap().roots, std::slice::from_ref(&old_der));
    let roots = scene.istio.issue(&id("db")).await.unwrap().roots;
    assert!(roots.len() == 2 && roots.contains(&old_der) && roots.contains(&new_der), "peers still have old ones");
    let mut known = scene.istio.roots.lock().unwrap();
    let in_two_hours = SystemTime::now() + Duration::from_secs(7_200);
    let later = known.add(vec![new_der.clone()], in_two_hours + Duration::from_secs(60), in_two_hours);
    assert_eq!(later, [new_der], "until the last one of them has expired");
}

#[tokio::test]
async fn several_roots_in_one_answer_are_all_trusted() {
    let (root, other) = (Root::new("root"), Root::new("other"));
    let both = [root.der(), other.der()];
    let scene = scene(move |request| Ok(vec![root.sign_request(&request.csr).unwrap(), root.pem() + &other.pem()]));
    let roots = scene.istio.issue(&id("web")).await.unwrap().roots;
    assert!(roots.len() == 2 && both.iter().all(|root| roots.contains(root)));
}

#[tokio::test]
async fn refusals_say_what_to_do_and_failures_are_tried_again() {
    for (status, kind, words) in [
        (Status::unauthenticated("bad token"), IssueErrorKind::Refused, "audience istio-ca"),
        (
            Status::unauthenticated("request impersonation authentication failure"),
            IssueErrorKind::Refused,
            "CA_TRUSTED_NODE_ACCOUNTS",
        ),
        (Status::permission_denied("not on this node"), IssueErrorKind::Refused, "CA_TRUSTED_NODE_ACCOUNTS"),
        (Status::invalid_argument("csr"), IssueErrorKind::Refused, "istiod's log"),
        (Status::unimplemented("no CA"), IssueErrorKind::Refused, "CA enabled"),
        (Status::unavailable("starting"), IssueErrorKind::Temporary, "is istiod running"),
        (Status::internal("oops"), IssueErrorKind::Temporary, "is istiod running"),
        (Status::resource_exhausted("slow down"), IssueErrorKind::Temporary, "is istiod running"),
    ] {
        let message = status.message().to_owned();
        let error = refused(move |_| Err(status.clone())).await;
        let text = error.to_string();
        assert_eq!(error.kind, kind, "{text}");
        assert!(text.contains(words) && text.contains(&message) && text.contains("sa/web"), "{text}");
    }
}

#[tokio::test]
async fn answers_of_nonsense_are_refused() {
    let root = Root::new("root").pem();
    for (answer, words) in [
        (vec![], "an empty answer"),
        (vec![root.clone()], "a chain without a root"),
        (vec!["x".to_owned(), root.clone()], "certificate 1 of its answer: no certificate in PEM"),
        (vec![root.clone(), String::new()], "the root of its answer: no certificate in PEM"),
        (vec![format!("{}\n-----BEGIN CERTIFICATE-----\n!", root), root], "certificate 1 of its answer"),
    ] {
        let error = refused(move |_| Ok(answer.clone())).await;
        assert_eq!(error.kind, IssueErrorKind::Refused);
        assert!(error.reason.contains(words), "{error}");
    }
}

#[tokio::test]
async fn missing_files_and_a_stranger_at_the_address_are_named() {
    let scene = scene(|_| Err(Status::internal("not reached")));
    let file = |name: &str| scene.directory.path().join(name);
    let ask = async || scene.istio.issue(&id("web")).await.map(drop).unwrap_err().to_string();

    fs::write(file("token"), " \n").unwrap();
    assert!(ask().await.contains("token holds no token; mount a projected"), "{}", ask().await);
    fs::write(file("token"), "a\nb").unwrap();
    assert!(ask().await.contains("token holds no token"), "{}", ask().await);
    fs::remove_file(file("token")).unwrap();
    assert!(ask().await.contains("token: No such file"), "{}", ask().await);
    fs::write(file("token"), "good").unwrap();
    assert!(ask().await.contains("not reached"), "{}", ask().await);

    fs::write(file("root-cert.pem"), "nothing").unwrap();
    assert!(ask().await.contains("root-cert.pem: no certificate in PEM"), "{}", ask().await);
    fs::write(file("root-cert.pem"), Root::new("stranger").pem()).unwrap();
    let words = ask().await;
    assert!(words.contains("UnknownIssuer") && !words.contains("good"), "{words}");
    fs::remove_file(file("root-cert.pem")).unwrap();
    assert!(ask().await.contains("istio-ca-root-cert"), "{}", ask().await);
}

#[tokio::test]
async fn the_store_takes_what_it_is_given_only_when_it_is_right() {
    // A CA that signs what it likes and not what it was asked for.
    let root = Root::new("root");
    let scene = scene(move |_| {
        let other = Request::new(&id("other")).unwrap();
        Ok(vec![root.sign_request(&other.csr).unwrap(), root.pem()])
    });
    let store = Store::new(Arc::new(scene.istio), Timing::default());
    let runner = store.clone();
    let running = tokio::spawn(async move { runner.run().await });
    let error = store.fetch(&id("web")).await.unwrap_err().to_string();
    assert!(error.contains("its certificate is for") && error.contains("sa/other"), "{error}");
    running.abort();
}
