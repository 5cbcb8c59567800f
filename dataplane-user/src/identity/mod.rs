//! Who the workloads are: their identities, and the certificates that prove them.
//!
//! An [`Authority`] issues, the [`Store`] asks it, checks what came, keeps it and renews it in time.

mod authority;
pub mod ca;
mod credential;
pub mod files;
pub mod istio;
pub(crate) mod pem;
mod request;
mod schedule;
mod source;
mod spiffe;
mod store;
#[cfg(test)]
mod testing;
mod watch;
pub mod workload_api;

pub use authority::{Authority, IssueError, IssueErrorKind, Issued, Issuing, SecretKey};
pub use credential::{Credential, Flaw, TrustBundle};
pub use request::Request;
pub use schedule::{Schedule, Timing};
pub use source::{BadSource, Source};
pub use spiffe::{BadSpiffeId, SpiffeId};
pub use store::{Numbers, Report, State, Store};
