//! Mutual TLS 1.3 between workloads: who the peer is, is decided here and inside the handshake.
//!
//! Sessions are never resumed, on either side: a resumed session would carry an identity that was proved under an
//! older trust bundle or by a certificate that has expired since. Connections are pooled, so handshakes are rare.

use std::{
    cell::RefCell,
    collections::HashMap,
    fmt, io,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    ServerConfig, SignatureScheme, SupportedProtocolVersion,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature},
    server::{
        NoServerSessionStorage, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::identity::{Credential, SpiffeId, TrustBundle};

const ALPN: &[u8] = b"h2";
const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
/// Leaf and two intermediates are usual; webpki bounds the work of a longer chain, this bounds its bytes.
const MAX_CHAIN: usize = 8;

/// Why a peer was not accepted, or did not accept us.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    #[error("it showed no certificate")]
    NoCertificate,
    #[error("its certificate expired at {0} (seconds since 1970)")]
    Expired(u64),
    #[error("its certificate is valid only from {0} (seconds since 1970): compare the clocks of both nodes")]
    NotYetValid(u64),
    #[error("its certificate is not signed by a root of trust domain {0}")]
    UnknownRoot(Arc<str>),
    #[error("its certificate has {0} URI names; an identity is exactly one")]
    NotOneIdentity(usize),
    #[error("{0}")]
    BadIdentity(#[from] crate::identity::BadSpiffeId),
    #[error("it is {presented}, expected {}", List(.expected))]
    WrongIdentity { presented: SpiffeId, expected: Arc<[SpiffeId]> },
    #[error("it is {presented}, of another trust domain than {ours}")]
    WrongTrustDomain { presented: SpiffeId, ours: Arc<str> },
    #[error("its certificate may not be used for this side of a connection (extended key usage)")]
    WrongPurpose,
    #[error("its certificate is refused: {0}")]
    BadCertificate(String),
    #[error("it does not speak HTTP/2 (no ALPN h2)")]
    WrongAlpn,
    #[error("it does not speak TLS 1.3 with AES-GCM: {0}")]
    Incompatible(String),
    #[error("it refused our certificate or handshake ({0})")]
    RefusedUs(&'static str),
    #[error("it broke the protocol: {0}")]
    Protocol(String),
    #[error("no handshake within {0:?}")]
    TimedOut(Duration),
    #[error("the connection failed during the handshake: {0}")]
    Io(io::ErrorKind),
}

/// A failed handshake, with its peer.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{peer} is no peer to talk to: {reason}")]
pub struct HandshakeError {
    pub peer: SocketAddr,
    pub reason: TlsError,
}

/// Who is at the other end, proved.
#[derive(Clone, Debug)]
pub struct Peer {
    pub id: SpiffeId,
    /// When the proof ends: of its leaf certificate.
    pub not_after: SystemTime,
}

/// What one credential needs for handshakes, built once and used for all of them.
pub struct Context {
    credential: Credential,
    server: Arc<ServerConfig>,
    client: ClientConfig,
}

impl Context {
    /// Errors when the credential's key can't sign TLS 1.3.
    pub fn new(credential: &Credential) -> Result<Self, rustls::Error> {
        let key = Arc::new(OneKey(credential.key.clone()));
        let mut server = ServerConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(VERSIONS)?
            .with_client_cert_verifier(Arc::new(Verifier::of(credential, None)))
            .with_cert_resolver(key.clone());
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;
        let mut client = ClientConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(VERSIONS)?
            .dangerous()
            // Nobody is expected yet: `client_for` says whom.
            .with_custom_certificate_verifier(Arc::new(Verifier::of(credential, Some(Arc::new([])))))
            .with_client_cert_resolver(key);
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.enable_sni = false;
        client.resumption = Resumption::disabled();
        client.enable_early_data = false;
        Ok(Self { credential: credential.clone(), server: Arc::new(server), client })
    }

    pub fn credential(&self) -> &Credential {
        &self.credential
    }

    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For connections to peers that are one of `expected`. Costs a copy of pointers, so it is made per connection.
    pub fn client_for(&self, expected: &Arc<[SpiffeId]>) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        let verifier = Verifier::of(&self.credential, Some(expected.clone()));
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }

    fn is_of(&self, credential: &Credential) -> bool {
        Arc::ptr_eq(&self.credential.key, &credential.key) && Arc::ptr_eq(&self.credential.trust, &credential.trust)
    }
}

/// One worker's contexts: the newest of each identity.
#[derive(Default)]
pub struct Contexts(RefCell<HashMap<SpiffeId, Rc<Context>>>);

impl Contexts {
    /// Built again only when the identity's key or trust bundle is another.
    pub fn of(&self, credential: &Credential) -> Result<Rc<Context>, rustls::Error> {
        if let Some(context) = self.0.borrow().get(&credential.id).filter(|c| c.is_of(credential)) {
            return Ok(context.clone());
        }
        let context = Rc::new(Context::new(credential)?);
        self.0.borrow_mut().insert(credential.id.clone(), context.clone());
        Ok(context)
    }

    /// Forgets identities that left the node.
    pub fn retain(&self, keep: impl Fn(&SpiffeId) -> bool) {
        self.0.borrow_mut().retain(|id, _| keep(id));
    }
}

/// The peer of a finished handshake: its identity again, and that HTTP/2 was agreed on.
pub(super) fn peer_of(connection: &rustls::CommonState) -> Result<Peer, TlsError> {
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(TlsError::WrongAlpn);
    }
    let leaf = connection.peer_certificates().and_then(|chain| chain.first()).ok_or(TlsError::NoCertificate)?;
    let (_, parsed) = x509_parser::parse_x509_certificate(leaf).map_err(|e| TlsError::BadCertificate(e.to_string()))?;
    let not_after = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    Ok(Peer { id: identity_of(leaf)?, not_after: UNIX_EPOCH + Duration::from_secs(not_after) })
}

/// What a handshake's or a connection's `io::Error` says about TLS; other failures of the socket are [`TlsError::Io`].
pub(super) fn reason_of(error: &io::Error) -> TlsError {
    let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) else {
        return TlsError::Io(error.kind());
    };
    match tls {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
            other.0.downcast_ref::<TlsError>().cloned().unwrap_or_else(|| TlsError::BadCertificate(other.to_string()))
        }
        rustls::Error::InvalidCertificate(e) => TlsError::BadCertificate(e.to_string()),
        rustls::Error::NoCertificatesPresented => TlsError::NoCertificate,
        rustls::Error::NoApplicationProtocol => TlsError::WrongAlpn,
        rustls::Error::PeerIncompatible(e) => TlsError::Incompatible(format!("{e:?}")),
        rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol) => TlsError::WrongAlpn,
        rustls::Error::AlertReceived(alert) => TlsError::RefusedUs(alert.as_str().unwrap_or("unknown alert")),
        e => TlsError::Protocol(e.to_string()),
    }
}

/// The suites that Istio's peers offer; its order of preference.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let suites =
        vec![aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384, aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(CryptoProvider { cipher_suites: suites, ..aws_lc_rs::default_provider() })
});

/// Shows the same certificate whatever name the client asked for: the pod's address has already said who is meant.
#[derive(Debug)]
struct OneKey(Arc<CertifiedKey>);

impl ResolvesServerCert for OneKey {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl rustls::client::ResolvesClientCert for OneKey {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Chain, validity, and identity of the other side.
struct Verifier {
    trust: Arc<TrustBundle>,
    /// Who a server must be; a client may be anybody of the trust domain.
    expected: Option<Arc<[SpiffeId]>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn of(credential: &Credential, expected: Option<Arc<[SpiffeId]>>) -> Self {
        let algorithms = PROVIDER.signature_verification_algorithms;
        Self { trust: credential.trust.clone(), expected, algorithms }
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), TlsError> {
        if intermediates.len() > MAX_CHAIN {
            return Err(TlsError::BadCertificate(format!("{} intermediates", intermediates.len())));
        }
        let cert = EndEntityCert::try_from(leaf).map_err(|e| self.reason(e))?;
        let roots = &self.trust.roots.roots;
        cert.verify_for_usage(self.algorithms.all, roots, intermediates, now, usage, None, None)
            .map_err(|e| self.reason(e))?;
        let presented = identity_of(leaf)?;
        match &self.expected {
            Some(expected) if !expected.contains(&presented) => {
                Err(TlsError::WrongIdentity { presented, expected: expected.clone() })
            }
            None if *presented.trust_domain() != *self.trust.trust_domain => {
                Err(TlsError::WrongTrustDomain { presented, ours: self.trust.trust_domain.clone() })
            }
            _ => Ok(()),
        }
    }

    fn reason(&self, error: webpki::Error) -> TlsError {
        match error {
            webpki::Error::CertExpired { not_after, .. } => TlsError::Expired(not_after.as_secs()),
            webpki::Error::CertNotValidYet { not_before, .. } => TlsError::NotYetValid(not_before.as_secs()),
            // A root may have the name of one of ours and another key.
            webpki::Error::UnknownIssuer
            | webpki::Error::CaUsedAsEndEntity
            | webpki::Error::InvalidSignatureForPublicKey => TlsError::UnknownRoot(self.trust.trust_domain.clone()),
            webpki::Error::RequiredEkuNotFoundContext(_) => TlsError::WrongPurpose,
            e => TlsError::BadCertificate(format!("{e:?}")),
        }
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verifier of {}", self.trust.trust_domain)
    }
}

/// A certificate has one URI and it is an identity (X509-SVID section 2); other kinds of names do not matter.
fn identity_of(leaf: &CertificateDer<'_>) -> Result<SpiffeId, TlsError> {
    let cert = EndEntityCert::try_from(leaf).map_err(|e| TlsError::BadCertificate(format!("{e:?}")))?;
    let mut names = cert.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(one), None) => Ok(one.parse()?),
        _ => Err(TlsError::NotOneIdentity(cert.valid_uri_names().count())),
    }
}

fn other(error: TlsError) -> rustls::Error {
    match error {
        // These have an alert of their own that tells the peer what to mend.
        TlsError::NoCertificate => rustls::Error::NoCertificatesPresented,
        e => rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(e)))),
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, KeyUsage::server_auth()).map_err(other)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    /// No hints: a workload has one certificate.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, KeyUsage::client_auth()).map_err(other)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

struct List<'a>(&'a [SpiffeId]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, id) in self.0.iter().enumerate() {
            write!(f, "{}{id}", if i == 0 { "" } else { " or " })?;
        }
        if self.0.is_empty() { f.write_str("nobody") } else { Ok(()) }
    }
}
