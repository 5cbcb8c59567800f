//! A certificate authority, pods with identities, and a server to talk to, all on loopback.
#![allow(dead_code, reason = "each suite uses its part")]

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use dataplane_user::{
    hbone::{
        Timeouts,
        client::{Connect, ConnectError, Tunnel},
        headers::{Authority, Metadata},
        pool::{Key, Pool},
        relay::{self, Counts},
        server::{self, Answer, Phase, Refusal, Request, ServeError},
        tls::Context,
    },
    identity::{Credential, SpiffeId, TrustBundle},
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::LocalSet,
};

pub const DOMAIN: &str = "cluster.local";

/// Runs a test as a worker of the tunnel runs: one thread, tasks that never leave it.
pub fn worker<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(120), test).await.expect("the test takes longer than two minutes")
    })
}

pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: rcgen::Certificate,
    pub trust: Arc<TrustBundle>,
}

/// What a certificate is to say; by default, what is right.
#[derive(Clone)]
pub struct Leaf {
    pub names: Vec<String>,
    /// Relative to now, in seconds.
    pub valid: (i64, i64),
    pub usages: Vec<ExtendedKeyUsagePurpose>,
    pub self_signed: bool,
}

impl Leaf {
    pub fn of(id: &SpiffeId) -> Self {
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Self { names: vec![id.to_string()], valid: (-60, 3600), usages, self_signed: false }
    }
}

impl Ca {
    pub fn new(trust_domain: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let cert = params.self_signed(&key).unwrap();
        let trust = Arc::new(TrustBundle::new(trust_domain, vec![cert.der().clone()]).unwrap());
        Self { issuer: Issuer::new(params, key), root: cert, trust }
    }

    pub fn credential(&self, id: &SpiffeId) -> Credential {
        self.credential_like(id, &Leaf::of(id))
    }

    pub fn credential_like(&self, id: &SpiffeId, leaf: &Leaf) -> Credential {
        let (cert, key, not_before, not_after) = self.certificate(leaf);
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).unwrap();
        Credential {
            id: id.clone(),
            key: Arc::new(CertifiedKey::new(vec![cert.der().clone()], signer)),
            trust: self.trust.clone(),
            not_before,
            not_after,
            serial: String::new(),
        }
    }

    /// For programs that read files: chain and key.
    pub fn pem(&self, id: &SpiffeId) -> (String, String) {
        let (cert, key, ..) = self.certificate(&Leaf::of(id));
        (cert.pem(), key.serialize_pem())
    }

    pub fn root_pem(&self) -> String {
        self.root.pem()
    }

    fn certificate(&self, leaf: &Leaf) -> (rcgen::Certificate, KeyPair, SystemTime, SystemTime) {
        let mut params = CertificateParams::default();
        // As Istio's: no subject, so the name that counts is critical (RFC 5280 section 4.2.1.6).
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = leaf.names.iter().map(|n| SanType::URI(n.as_str().try_into().unwrap())).collect();
        let now = SystemTime::now();
        let at = |s: i64| match u64::try_from(s) {
            Ok(s) => now + Duration::from_secs(s),
            Err(_) => now - Duration::from_secs(s.unsigned_abs()),
        };
        let (not_before, not_after) = (at(leaf.valid.0), at(leaf.valid.1));
        (params.not_before, params.not_after) = (not_before.into(), not_after.into());
        params.extended_key_usages = leaf.usages.clone();
        let key = KeyPair::generate().unwrap();
        let cert = if leaf.self_signed {
            params.self_signed(&key).unwrap()
        } else {
            params.signed_by(&key, &self.issuer).unwrap()
        };
        (cert, key, not_before, not_after)
    }

    pub fn context(&self, id: &SpiffeId) -> Rc<Context> {
        Rc::new(Context::new(&self.credential(id)).unwrap())
    }
}

pub fn id(account: &str) -> SpiffeId {
    SpiffeId::new(DOMAIN, "shop", account).unwrap()
}

/// A server that dials whatever address a CONNECT names.
pub struct Server {
    pub address: SocketAddr,
    pub phase: watch::Sender<Phase>,
    pub accepted: Rc<Cell<usize>>,
    pub requests: Rc<RefCell<Vec<Request>>>,
    pub ended: Rc<RefCell<Vec<Result<(), ServeError>>>>,
}

impl Server {
    pub async fn start(context: &Context, timeouts: Timeouts) -> Self {
        Self::with(context, timeouts, |request, answer| async move { dial_and_relay(request, answer).await }).await
    }

    pub async fn with<S, Fut>(context: &Context, timeouts: Timeouts, service: S) -> Self
    where
        S: Fn(Request, Answer) -> Fut + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            phase: watch::channel(Phase::Serving).0,
            accepted: Rc::default(),
            requests: Rc::default(),
            ended: Rc::default(),
        };
        let (config, phase) = (context.server(), server.phase.clone());
        let (accepted, requests, ended) = (server.accepted.clone(), server.requests.clone(), server.ended.clone());
        let service = Rc::new(move |request: Request, answer| {
            requests.borrow_mut().push(request.clone());
            service(request, answer)
        });
        tokio::task::spawn_local(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                accepted.set(accepted.get() + 1);
                let served = server::serve(tcp, peer, config.clone(), timeouts, phase.subscribe(), service.clone());
                let ended = ended.clone();
                tokio::task::spawn_local(async move {
                    let result = served.await;
                    ended.borrow_mut().push(result);
                });
            }
        });
        server
    }
}

pub async fn dial_and_relay(request: Request, answer: Answer) {
    let Authority::Address(address) = request.authority else { return answer.refuse(Refusal::BadRequest) };
    let Ok(tcp) = TcpStream::connect(address).await else { return answer.refuse(Refusal::Unavailable) };
    let Ok(stream) = answer.accept(None) else { return };
    let _ = relay::tunnel(tcp, stream, &Counts::default()).await;
}

/// A worker's client side for one identity.
pub struct Client {
    pub pool: Pool,
    pub context: Rc<Context>,
    pub expected: Arc<[SpiffeId]>,
}

impl Client {
    pub fn new(context: Rc<Context>, expected: &[SpiffeId], timeouts: Timeouts) -> Self {
        Self { pool: Pool::new(timeouts), context, expected: expected.into() }
    }

    pub fn key(&self, destination: SocketAddr) -> Key {
        Key {
            source: self.context.credential().id.clone(),
            expected: self.expected.clone(),
            destination,
            source_ip: "127.0.0.1".parse().unwrap(),
        }
    }

    pub async fn open(&self, server: SocketAddr, to: SocketAddr) -> Result<Tunnel, ConnectError> {
        self.connect(server, &Connect::new(Authority::Address(to), Metadata::default())).await
    }

    pub async fn connect(&self, server: SocketAddr, connect: &Connect) -> Result<Tunnel, ConnectError> {
        self.pool.connect(&self.key(server), &self.context, connect, move || TcpStream::connect(server)).await
    }

    /// Listens as a captured application's proxy would: each connection is tunnelled to `to`.
    pub async fn listen(self: &Rc<Self>, server: SocketAddr, to: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = self.clone();
        tokio::task::spawn_local(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let client = client.clone();
                tokio::task::spawn_local(async move {
                    tcp.set_nodelay(true).unwrap();
                    let Ok(tunnel) = client.open(server, to).await else { return };
                    let _ = relay::tunnel(tcp, tunnel.stream, &Counts::default()).await;
                });
            }
        });
        address
    }
}

/// An application that sends back what it gets, and closes when its client has.
pub async fn echo() -> SocketAddr {
    application(|tcp| async move {
        let (mut read, mut write) = tcp.into_split();
        tokio::io::copy(&mut read, &mut write).await?;
        Ok(())
    })
    .await
}

pub async fn application<F, Fut>(run: F) -> SocketAddr
where
    F: Fn(TcpStream) -> Fut + 'static,
    Fut: Future<Output = io::Result<()>> + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::task::spawn_local(run(tcp));
        }
    });
    address
}

/// Waits for what another task brings about.
pub async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
