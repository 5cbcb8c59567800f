//! Who may talk to whom: L4 authorization, and whether plaintext may enter.
//!
//! [`Policies`] is a pure state machine, as the registry is: objects in, immutable [`Snapshot`]s out. Of a snapshot the
//! policies of one workload are [`Selected`] once and then asked per connection. [`Enforcement`] is what the data path
//! holds; sources feed it.

mod counters;
pub mod enforce;
pub mod explain;
pub mod file;
pub mod log;
mod mtls;
pub mod object;
mod rule;
mod select;
mod set;
mod values;

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use serde::Serialize;

pub use self::{
    counters::{Counters, Counts},
    enforce::Enforcement,
    explain::Explanation,
    mtls::{Mode, PeerAuthentication},
    rule::{Action, Authorization, Clause, Match, Policy, PolicyName, Rule, Scope, Subject},
    select::Selected,
    set::{Origin, Outcome, Policies, Snapshot, Standing},
    values::{BadCidr, Cidr, ServiceAccount, StringMatch},
};
use crate::identity::SpiffeId;

/// Where Istio keeps what counts for the whole mesh.
pub const ROOT_NAMESPACE: &str = "istio-system";

/// A connection that wants in.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub source_ip: IpAddr,
    /// Proved by mutual TLS (or by this node, when both ends are local); None: plaintext.
    pub source: Option<&'a SpiffeId>,
    pub destination_ip: IpAddr,
    /// The application's port, not 15008.
    pub destination_port: u16,
}

/// A workload that policies are enforced for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// namespace/name of the pod.
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Names of the policies that the control plane attaches to it (istiod's `authorization_policies`); empty when
    /// labels select.
    pub policies: Vec<PolicyName>,
}

/// May it come in, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub allow: bool,
    pub reason: Reason,
    /// The policy that decided; None when none did.
    pub by: Option<PolicyName>,
    /// What the policies that are only tried out would have changed.
    pub dry_run: Option<DryRun>,
}

/// The other decision, were the dry runs in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DryRun {
    pub allow: bool,
    pub reason: Reason,
    pub by: Option<PolicyName>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Reason {
    /// No ALLOW policy is for this workload, and no DENY policy matched.
    Default,
    /// An ALLOW policy matched.
    Allowed,
    /// A DENY policy matched.
    Denied,
    /// There are ALLOW policies, and none matched.
    NotAllowed,
    /// The port takes mutual TLS only.
    Plaintext,
}

impl Reason {
    pub const fn allow(self) -> bool {
        matches!(self, Self::Default | Self::Allowed)
    }
}

/// In the words of ztunnel's access log, which people search for.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_decision(f, self.reason, self.by.as_deref())
    }
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_decision(f, self.reason, self.by.as_deref())
    }
}

fn write_decision(f: &mut fmt::Formatter<'_>, reason: Reason, by: Option<&str>) -> fmt::Result {
    let by = by.unwrap_or("(nobody)");
    match reason {
        Reason::Default => f.write_str("no policy forbids it"),
        Reason::Allowed => write!(f, "allowed by: {by}"),
        Reason::Denied => write!(f, "explicitly denied by: {by}"),
        Reason::NotAllowed => f.write_str("allow policies exist, but none allowed"),
        Reason::Plaintext => write!(f, "plaintext where only mutual TLS is taken, by: {by}"),
    }
}
