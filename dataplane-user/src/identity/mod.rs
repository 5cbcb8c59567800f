//! Who the workloads are: their identities, and the certificates that prove them.

mod spiffe;

use std::{sync::Arc, time::SystemTime};

use rustls::{RootCertStore, sign::CertifiedKey};

pub use spiffe::{BadSpiffeId, SpiffeId};

/// A workload's certificate chain and key, and whom it trusts. Replaced as a whole when any part is renewed.
#[derive(Clone)]
pub struct Credential {
    pub id: SpiffeId,
    /// Leaf first; the key never leaves memory.
    pub key: Arc<CertifiedKey>,
    pub trust: Arc<TrustBundle>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Of the leaf, hexadecimal.
    pub serial: String,
}

/// The roots of a trust domain.
pub struct TrustBundle {
    pub trust_domain: Arc<str>,
    pub roots: Arc<RootCertStore>,
}
