//! What each policy decided, counted for as long as the agent runs, whatever its versions.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

/// Of one policy.
#[derive(Debug, Default)]
pub struct Counters {
    pub allowed: AtomicU64,
    pub denied: AtomicU64,
    /// Connections that it would have let pass or refused, were it not a dry run.
    pub would_allow: AtomicU64,
    pub would_deny: AtomicU64,
}

/// The counts at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    pub allowed: u64,
    pub denied: u64,
    pub would_allow: u64,
    pub would_deny: u64,
}

impl Counters {
    pub(super) fn count(&self, allow: bool) {
        if allow { &self.allowed } else { &self.denied }.fetch_add(1, Relaxed);
    }

    pub(super) fn count_dry(&self, allow: bool) {
        if allow { &self.would_allow } else { &self.would_deny }.fetch_add(1, Relaxed);
    }

    pub fn read(&self) -> Counts {
        Counts {
            allowed: self.allowed.load(Relaxed),
            denied: self.denied.load(Relaxed),
            would_allow: self.would_allow.load(Relaxed),
            would_deny: self.would_deny.load(Relaxed),
        }
    }
}
