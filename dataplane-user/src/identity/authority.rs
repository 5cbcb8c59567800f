//! Who vouches for workloads: the one question that every source of certificates answers.

use std::{borrow::Cow, future::Future, pin::Pin, time::SystemTime};

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::{sync::watch, task::JoinHandle};
use zeroize::Zeroize as _;

use super::SpiffeId;

/// A source of certificates. It hands out what it was given; the store checks every answer before it is used.
pub trait Authority: Send + Sync + 'static {
    /// What messages call it, with the place where it is configured.
    fn name(&self) -> &str;

    /// A new certificate, its key, and the roots that are trusted from now on in the identity's trust domain.
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a>;

    /// Counts the times when the source had news of its own accord (a rotated bundle, a file that changed): what was
    /// issued before is to be asked for again. None: it only answers.
    fn news(&self) -> Option<watch::Receiver<u64>>;

    /// When what it signs with expires, and with it all that it signed. None: that is not for us to know.
    fn not_after(&self) -> Option<SystemTime> {
        None
    }
}

pub type Issuing<'a> = Pin<Box<dyn Future<Output = Result<Issued, IssueError>> + Send + 'a>>;

/// What an authority answered, unchecked.
pub struct Issued {
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    pub key: SecretKey,
    /// All that are trusted; those that are not named are not trusted any more.
    pub roots: Vec<CertificateDer<'static>>,
}

/// A private key that is overwritten when it is dropped and has no way into a log.
pub struct SecretKey(PrivateKeyDer<'static>);

impl SecretKey {
    pub fn der(&self) -> &PrivateKeyDer<'static> {
        &self.0
    }
}

impl Clone for SecretKey {
    fn clone(&self) -> Self {
        Self(self.0.clone_key())
    }
}

impl PartialEq for SecretKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.secret_der() == other.0.secret_der()
    }
}

impl From<PrivateKeyDer<'static>> for SecretKey {
    fn from(key: PrivateKeyDer<'static>) -> Self {
        Self(key)
    }
}

impl Drop for SecretKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret key)")
    }
}

/// Why there is no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no certificate for {id}: {reason}; {remedy}")]
pub struct IssueError {
    pub id: SpiffeId,
    pub kind: IssueErrorKind,
    pub reason: String,
    /// What a person can do.
    pub remedy: Cow<'static, str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IssueErrorKind {
    /// The authority could not be asked, or could not answer: asked again soon.
    Temporary,
    /// It said no, or what it gave was no good: asked again seldom.
    Refused,
}

impl IssueError {
    pub fn temporary(id: &SpiffeId, reason: impl Into<String>, remedy: impl Into<Cow<'static, str>>) -> Self {
        Self { id: id.clone(), kind: IssueErrorKind::Temporary, reason: reason.into(), remedy: remedy.into() }
    }

    pub fn refused(id: &SpiffeId, reason: impl Into<String>, remedy: impl Into<Cow<'static, str>>) -> Self {
        Self { id: id.clone(), kind: IssueErrorKind::Refused, reason: reason.into(), remedy: remedy.into() }
    }
}

/// A task that ends with its owner.
pub(super) struct Task(JoinHandle<()>);

impl Task {
    /// Must be called within a runtime of tokio.
    pub(super) fn spawn(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
