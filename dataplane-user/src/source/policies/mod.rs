//! Where policies come from: files, and Istio's objects in the Kubernetes API. Both feed one [`Enforcement`].

pub mod file;
pub mod kube;

use tracing::{info, warn};

use crate::policy::{Enforcement, Origin, Outcome, Policies};

/// Changes the policies and tells, once, what is wrong with them.
fn change(enforcement: &Enforcement, origin: Origin, change: impl FnOnce(&mut Policies) -> Outcome) {
    let outcome = enforcement.change(change);
    for problem in &outcome.problems {
        warn!(%origin, policy = problem.object, reason = problem.reason, "policy refused");
    }
    for warning in &outcome.warnings {
        warn!(%origin, policy = warning.object, reason = warning.reason, "policy not enforced as it reads");
    }
    if outcome.changed {
        info!(%origin, generation = enforcement.snapshot().generation(), "policies changed");
    }
}
