//! The policies in force: a pure state machine from objects to snapshots. No I/O, no clock.
//!
//! Sources own what they told: the same name from a file and from the API is two policies, and both are in force. An
//! object that is malformed leaves its last good version in force; without one it is enforced at its most careful
//! (see [`super::object`]), because a policy that silently is not there lets everybody in.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use serde::Serialize;

use super::{
    Authorization, PeerAuthentication, Policy, PolicyName, Scope, Selected, Workload,
    counters::{Counters, Counts},
    mtls::Modes,
    object::{Body, Key, Kind, Parsed},
    rule::Action,
};
use crate::registry::Problem;

/// Who told a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    File,
    Kube,
    /// istiod, already in its own form.
    Istiod,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Kube => "kube",
            Self::Istiod => "istiod",
        })
    }
}

type Id = (Origin, Key);

/// What a change comes to. Each problem is told once, until it is another one or mended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Objects that are not in force as they were written.
    pub problems: Vec<Problem>,
    /// In force, but not in all they say; or not for this node.
    pub warnings: Vec<Problem>,
    /// There is a new snapshot.
    pub changed: bool,
}

/// All policies, from all sources.
#[derive(Debug)]
pub struct Policies {
    root: Arc<str>,
    objects: BTreeMap<Id, Held>,
    counters: HashMap<Id, Arc<Counters>>,
    /// Objects that were refused, ever.
    malformed: u64,
    /// What sources are still to tell for the first time.
    awaited: BTreeSet<(Origin, Kind)>,
    /// What was told of each, so that it is told once.
    told: BTreeMap<Id, Vec<String>>,
    dirty: bool,
    snapshot: Arc<Snapshot>,
}

#[derive(Debug)]
struct Held {
    state: State,
    /// What is in force was written so.
    good: bool,
    /// Why the newest version is not in force.
    refused: Option<String>,
    warnings: Vec<String>,
}

#[derive(Clone, Debug)]
enum State {
    Authorization(Arc<Policy>),
    Peer(Arc<PeerAuthentication>),
    Nothing,
}

/// One object for `hitless policies` and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Standing {
    pub kind: &'static str,
    pub name: PolicyName,
    pub origin: Origin,
    /// None: a PeerAuthentication, or nothing is in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<Action>,
    pub dry_run: bool,
    pub in_force: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    pub counts: Counts,
}

impl Policies {
    pub fn new(root_namespace: &str) -> Self {
        let root: Arc<str> = root_namespace.into();
        let snapshot = Arc::new(Snapshot { root: root.clone(), settled: true, ..Snapshot::default() });
        Self {
            root,
            objects: BTreeMap::new(),
            counters: HashMap::new(),
            malformed: 0,
            awaited: BTreeSet::new(),
            told: BTreeMap::new(),
            dirty: false,
            snapshot,
        }
    }

    /// Says that a source will tell all it has of these kinds: until then [`Snapshot::settled`] is false, because a
    /// policy that is not known yet lets everybody in.
    pub fn await_source(&mut self, origin: Origin, kinds: &[Kind]) -> Outcome {
        self.awaited.extend(kinds.iter().map(|kind| (origin, *kind)));
        self.dirty = true;
        self.finish(Outcome::default())
    }

    /// Takes one object in, new or changed.
    pub fn upsert(&mut self, origin: Origin, object: Parsed) -> Outcome {
        self.apply(origin, [object], &[])
    }

    pub fn delete(&mut self, origin: Origin, key: &Key) -> Outcome {
        self.apply(origin, [], std::slice::from_ref(key))
    }

    /// Takes several changes in at once: one snapshot for all of them.
    pub fn apply(&mut self, origin: Origin, changed: impl IntoIterator<Item = Parsed>, gone: &[Key]) -> Outcome {
        let mut outcome = Outcome::default();
        for object in changed {
            self.take(origin, object, &mut outcome);
        }
        for key in gone {
            self.remove(&(origin, key.clone()));
        }
        self.finish(outcome)
    }

    /// Takes all that a source has of these kinds: what it does not name is gone.
    pub fn sync(&mut self, origin: Origin, kinds: &[Kind], objects: Vec<Parsed>) -> Outcome {
        let mut outcome = Outcome::default();
        let mut named: BTreeSet<Key> = BTreeSet::new();
        for object in objects {
            if named.contains(&object.key) {
                let reason = "is given twice: the first counts";
                outcome.problems.push(Problem::new(&object.key, reason));
                self.malformed += 1;
                continue;
            }
            named.insert(object.key.clone());
            self.take(origin, object, &mut outcome);
        }
        let of_it = |id: &Id| id.0 == origin && kinds.contains(&id.1.kind);
        let gone: Vec<_> = self.objects.keys().filter(|id| of_it(id) && !named.contains(&id.1)).cloned().collect();
        for id in gone {
            self.remove(&id);
        }
        for kind in kinds {
            self.dirty |= self.awaited.remove(&(origin, *kind));
        }
        self.finish(outcome)
    }

    /// What is in force now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.clone()
    }

    /// Versions that were refused, since the start.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Every object that was told, by name.
    pub fn standing(&self) -> Vec<Standing> {
        let of = |((origin, key), held): (&Id, &Held)| {
            let policy = match &held.state {
                State::Authorization(policy) => Some(policy),
                _ => None,
            };
            Standing {
                kind: key.kind.name(),
                name: key.name.clone(),
                origin: *origin,
                action: policy.map(|policy| policy.source.action),
                dry_run: policy.is_some_and(|policy| policy.source.dry_run),
                in_force: !matches!(held.state, State::Nothing),
                refused: held.refused.clone(),
                warnings: held.warnings.clone(),
                counts: policy.map(|policy| policy.counters.read()).unwrap_or_default(),
            }
        };
        self.objects.iter().map(of).collect()
    }

    /// The authorizations in force, by name.
    pub fn authorizations(&self) -> Vec<Arc<Policy>> {
        let states = self.objects.values().map(|held| &held.state);
        states
            .filter_map(|state| if let State::Authorization(policy) = state { Some(policy.clone()) } else { None })
            .collect()
    }

    fn take(&mut self, origin: Origin, object: Parsed, outcome: &mut Outcome) {
        let id = (origin, object.key);
        let mut warnings = object.warnings;
        let (state, refused) = match object.body {
            Body::Malformed { reason, closed } => {
                self.malformed += 1;
                match self.objects.get(&id).filter(|held| held.good) {
                    Some(held) => {
                        // What is in force is the version before, of which other things were said.
                        warnings.clone_from(&held.warnings);
                        (None, Some(format!("{reason}; the version before stays in force")))
                    }
                    None => match closed {
                        Some(body) => {
                            let state = self.state(&id, *body, &mut warnings);
                            (
                                Some(state),
                                Some(format!("{reason}; until it is mended its most careful reading is in force")),
                            )
                        }
                        None => (Some(State::Nothing), Some(format!("{reason}; it is not in force"))),
                    },
                }
            }
            body => (Some(self.state(&id, body, &mut warnings)), None),
        };
        self.tell(&id, refused.as_deref(), &warnings, outcome);
        let before = self.objects.get(&id).map(|held| &held.state);
        let good = state.is_none() || refused.is_none();
        let state = match state {
            None => before.cloned().unwrap_or(State::Nothing),
            Some(state) => {
                let same = before.is_some_and(|before| before.same(&state));
                self.dirty |= !(same || before.is_none() && matches!(state, State::Nothing));
                // An equal version keeps its place in memory, and what was selected of it.
                if same { before.cloned().unwrap_or(state) } else { state }
            }
        };
        self.objects.insert(id, Held { state, good, refused, warnings });
    }

    fn state(&mut self, id: &Id, body: Body, warnings: &mut Vec<String>) -> State {
        match body {
            Body::Authorization(mut policy) => {
                if policy.scope == Scope::Namespace && policy.namespace == self.root {
                    policy.scope = Scope::Global;
                }
                let counters = self.counters.entry(id.clone()).or_default();
                State::Authorization(Arc::new(Policy::new(policy, counters.clone())))
            }
            Body::Peer(policy) => {
                if policy.namespace == self.root && policy.selector().is_some() {
                    warnings.push("a selector in the root namespace selects nothing: it is not enforced".into());
                    return State::Nothing;
                }
                State::Peer(Arc::new(policy))
            }
            Body::Skipped(reason) => {
                warnings.push(reason);
                State::Nothing
            }
            Body::Malformed { reason, .. } => {
                warnings.push(reason);
                State::Nothing
            }
        }
    }

    fn tell(&mut self, id: &Id, refused: Option<&str>, warnings: &[String], outcome: &mut Outcome) {
        let now: Vec<String> = refused.into_iter().map(str::to_owned).chain(warnings.iter().cloned()).collect();
        let before = self.told.get(id).map_or(&[][..], Vec::as_slice);
        let new = |text: &str| !before.iter().any(|told| told == text);
        outcome.problems.extend(refused.filter(|text| new(text)).map(|text| Problem::new(&id.1, text)));
        outcome
            .warnings
            .extend(warnings.iter().filter(|text| new(text)).map(|text| Problem::new(&id.1, text.as_str())));
        if now.is_empty() {
            self.told.remove(id);
        } else {
            self.told.insert(id.clone(), now);
        }
    }

    fn remove(&mut self, id: &Id) {
        self.told.remove(id);
        self.counters.remove(id);
        if let Some(held) = self.objects.remove(id) {
            self.dirty |= !matches!(held.state, State::Nothing);
        }
    }

    fn finish(&mut self, mut outcome: Outcome) -> Outcome {
        if std::mem::take(&mut self.dirty) {
            let states = self.objects.values().map(|held| &held.state);
            let fresh = Snapshot {
                generation: self.snapshot.generation + 1,
                root: self.root.clone(),
                settled: self.awaited.is_empty(),
                ..Snapshot::default()
            };
            self.snapshot = Arc::new(fresh.with(states));
            outcome.changed = true;
        }
        outcome
    }
}

impl State {
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Authorization(a), Self::Authorization(b)) => a.source == b.source,
            (Self::Peer(a), Self::Peer(b)) => a == b,
            (Self::Nothing, Self::Nothing) => true,
            _ => false,
        }
    }
}

/// What is in force at one moment; never changes.
#[derive(Debug, Default)]
pub struct Snapshot {
    generation: u64,
    settled: bool,
    root: Arc<str>,
    namespaces: HashMap<Arc<str>, OfNamespace>,
    /// For every workload, or for those of every namespace with certain labels.
    everywhere: Vec<Arc<Policy>>,
    attached: HashMap<PolicyName, Vec<Arc<Policy>>>,
    mesh: Option<Arc<PeerAuthentication>>,
}

#[derive(Debug, Default)]
struct OfNamespace {
    policies: Vec<Arc<Policy>>,
    /// Oldest first.
    peers: Vec<Arc<PeerAuthentication>>,
}

impl Snapshot {
    fn with<'a>(self, states: impl Iterator<Item = &'a State>) -> Self {
        let mut this = self;
        for state in states {
            match state {
                State::Authorization(policy) => this.add(policy.clone()),
                State::Peer(peer) if peer.namespace == this.root => {
                    if this.mesh.as_ref().is_none_or(|mesh| peer.age() < mesh.age()) {
                        this.mesh = Some(peer.clone());
                    }
                }
                State::Peer(peer) => {
                    this.namespaces.entry(peer.namespace.clone()).or_default().peers.push(peer.clone());
                }
                State::Nothing => {}
            }
        }
        for namespace in this.namespaces.values_mut() {
            namespace.peers.sort_by(|a, b| a.age().cmp(&b.age()));
        }
        this
    }

    fn add(&mut self, policy: Arc<Policy>) {
        let source = &policy.source;
        match source.scope {
            Scope::Global => self.everywhere.push(policy),
            Scope::Labels(_) if source.namespace == self.root => self.everywhere.push(policy),
            Scope::Labels(_) | Scope::Namespace => {
                self.namespaces.entry(source.namespace.clone()).or_default().policies.push(policy);
            }
            Scope::Attached => self.attached.entry(policy.name.clone()).or_default().push(policy),
        }
    }

    /// Grows with every change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Has every source told all it has once?
    pub fn settled(&self) -> bool {
        self.settled
    }

    pub fn root_namespace(&self) -> &str {
        &self.root
    }

    /// The policies of a workload. Costs as much as its namespace has policies: to be kept, see [`super::Enforcement`].
    pub fn select(&self, workload: &Workload) -> Selected {
        let selected: Vec<_> =
            self.candidates(workload).filter(|policy| selects(&policy.source, workload)).cloned().collect();
        let [mesh, namespace, own] = self.peers(workload);
        Selected::new(&selected, Modes::new(mesh, namespace, own))
    }

    /// Policies that could be for the workload, by their place.
    pub(super) fn candidates<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = &'a Arc<Policy>> {
        let here = self.namespaces.get(&workload.namespace).map_or(&[][..], |namespace| &namespace.policies);
        let attached = workload.policies.iter().filter_map(|name| self.attached.get(name)).flatten();
        self.everywhere.iter().chain(here).chain(attached)
    }

    /// Of the mesh, the namespace and the workload.
    pub(super) fn peers(&self, workload: &Workload) -> [Option<&PeerAuthentication>; 3] {
        let here = self.namespaces.get(&workload.namespace).map_or(&[][..], |namespace| &namespace.peers);
        let for_all = here.iter().find(|peer| peer.selector().is_none());
        let own = here.iter().find(|peer| peer.selector().is_some_and(|labels| carries(workload, labels)));
        [self.mesh.as_deref(), for_all.map(Arc::as_ref), own.map(Arc::as_ref)]
    }
}

/// Is a policy that could be for the workload for it?
pub(super) fn selects(policy: &Authorization, workload: &Workload) -> bool {
    match &policy.scope {
        Scope::Labels(labels) => carries(workload, labels),
        Scope::Global | Scope::Namespace | Scope::Attached => true,
    }
}

fn carries(workload: &Workload, labels: &BTreeMap<Arc<str>, Arc<str>>) -> bool {
    labels.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
}
