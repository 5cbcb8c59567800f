//! Whether plaintext may enter a workload: `PeerAuthentication`, with Istio's precedence.
//!
//! A port of the workload's policy before its mode, that before the namespace's, that before the mesh's; `UNSET` asks the
//! next. Of several at one level the oldest counts. Nobody says anything: permissive.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::Serialize;

use super::rule::PolicyName;

/// What may enter a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mode {
    /// Nobody has to tunnel. HBONE is taken all the same, as ambient does it.
    Disable,
    /// Both.
    #[default]
    Permissive,
    /// Mutual TLS or nothing.
    Strict,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disable => "DISABLE",
            Self::Permissive => "PERMISSIVE",
            Self::Strict => "STRICT",
        })
    }
}

/// A policy of modes; None is `UNSET`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerAuthentication {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// RFC 3339, in UTC, as the API writes it: compares as text. Objects from files have none, and are the oldest.
    pub created: Arc<str>,
    /// None or empty: for the whole namespace, or for the mesh when that is the root namespace.
    pub selector: Option<BTreeMap<Arc<str>, Arc<str>>>,
    pub mode: Option<Mode>,
    /// Counts only in a workload's policy.
    pub ports: BTreeMap<u16, Option<Mode>>,
}

impl PeerAuthentication {
    pub fn full_name(&self) -> PolicyName {
        format!("{}/{}", self.namespace, self.name).into()
    }

    pub(super) fn selector(&self) -> Option<&BTreeMap<Arc<str>, Arc<str>>> {
        self.selector.as_ref().filter(|labels| !labels.is_empty())
    }

    /// Oldest first.
    pub(super) fn age(&self) -> (&str, &str) {
        (&self.created, &self.name)
    }
}

/// The modes of one workload, and who set each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Modes {
    all: (Mode, Option<PolicyName>),
    /// Sorted by port; those that differ or are set themselves.
    ports: Box<[(u16, Mode, PolicyName)]>,
}

impl Modes {
    /// Of the policies in force at each level.
    pub(super) fn new(
        mesh: Option<&PeerAuthentication>,
        namespace: Option<&PeerAuthentication>,
        workload: Option<&PeerAuthentication>,
    ) -> Self {
        let levels = [workload, namespace, mesh].into_iter().flatten();
        let set = levels.filter_map(|policy| Some((policy.mode?, Some(policy.full_name()))));
        let ports = workload.into_iter().flat_map(|policy| {
            let name = policy.full_name();
            policy.ports.iter().filter_map(move |(port, mode)| Some((*port, (*mode)?, name.clone())))
        });
        Self { ports: ports.collect(), all: set.into_iter().next().unwrap_or_default() }
    }

    pub(super) fn of(&self, port: u16) -> (Mode, Option<&PolicyName>) {
        match self.ports.binary_search_by_key(&port, |entry| entry.0) {
            Ok(at) => (self.ports[at].1, Some(&self.ports[at].2)),
            Err(_) => (self.all.0, self.all.1.as_ref()),
        }
    }

    /// The mode of every port, when they have one in common.
    pub(super) fn common(&self) -> Option<Mode> {
        self.ports.iter().all(|entry| entry.1 == self.all.0).then_some(self.all.0)
    }

    /// Is there a port that takes no plaintext?
    pub(super) fn any_strict(&self) -> bool {
        self.all.0 == Mode::Strict || self.ports.iter().any(|entry| entry.1 == Mode::Strict)
    }
}
