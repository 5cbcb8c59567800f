//! What the data path holds: the policies in force now, chosen per workload, and word of every change.
//!
//! A connection costs one look into a table of this node's workloads; choosing happens once per workload and change.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use tokio::sync::watch;

use super::{Decision, Outcome, Policies, ROOT_NAMESPACE, Request, Selected, Snapshot, Workload};

/// Workloads that are remembered; far more than a node runs. Those of pods that went are forgotten with the rest.
const REMEMBERED: usize = 4096;

/// Shared by sources and the data path.
#[derive(Debug)]
pub struct Enforcement {
    policies: Mutex<Policies>,
    current: watch::Sender<Arc<Snapshot>>,
    /// They were settled once: a source that fails later takes that back for nobody.
    known: AtomicBool,
    chosen: RwLock<Chosen>,
}

#[derive(Debug, Default)]
struct Chosen {
    generation: u64,
    by_name: HashMap<Arc<str>, (Workload, Arc<Selected>)>,
}

impl Default for Enforcement {
    fn default() -> Self {
        Self::new(ROOT_NAMESPACE)
    }
}

impl Enforcement {
    pub fn new(root_namespace: &str) -> Self {
        let policies = Policies::new(root_namespace);
        let current = watch::Sender::new(policies.snapshot());
        Self { policies: Mutex::new(policies), current, known: AtomicBool::new(false), chosen: RwLock::default() }
    }

    /// Changes the policies; when it returns they are in force.
    pub fn change(&self, change: impl FnOnce(&mut Policies) -> Outcome) -> Outcome {
        let mut policies = self.policies.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = change(&mut policies);
        if outcome.changed {
            let snapshot = policies.snapshot();
            self.known.fetch_or(snapshot.settled(), Relaxed);
            self.current.send_replace(snapshot);
        }
        outcome
    }

    /// Looks at the policies without changing them.
    pub fn read<T>(&self, look: impl FnOnce(&Policies) -> T) -> T {
        look(&self.policies.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.borrow().clone()
    }

    /// Tells of every change: open connections are then to be decided again.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.current.subscribe()
    }

    /// Waits until every source that is followed has told all it has: before that nothing should be let in where any
    /// policy might forbid it.
    pub async fn settled(&self) {
        // The sender lives as long as `self`.
        let _ = self.subscribe().wait_for(|snapshot| snapshot.settled()).await;
    }

    /// Every source that is followed has told all it has, now or once: before that nothing is to be let in.
    pub fn known(&self) -> bool {
        self.known.load(Relaxed) || self.snapshot().settled()
    }

    /// The policies of a workload that are in force now.
    pub fn of(&self, workload: &Workload) -> Arc<Selected> {
        let snapshot = self.snapshot();
        {
            let chosen = self.chosen.read().unwrap_or_else(PoisonError::into_inner);
            if chosen.generation == snapshot.generation()
                && let Some((known, selected)) = chosen.by_name.get(&workload.name)
                && known == workload
            {
                return selected.clone();
            }
        }
        let selected = Arc::new(snapshot.select(workload));
        let mut chosen = self.chosen.write().unwrap_or_else(PoisonError::into_inner);
        if chosen.generation < snapshot.generation() || chosen.by_name.len() >= REMEMBERED {
            *chosen = Chosen { generation: snapshot.generation().max(chosen.generation), ..Chosen::default() };
        }
        // What was chosen from an older snapshot is of no use to the next.
        if chosen.generation == snapshot.generation() {
            chosen.by_name.insert(workload.name.clone(), (workload.clone(), selected.clone()));
        }
        selected
    }

    /// Decides a connection that came, and counts it.
    pub fn admit(&self, workload: &Workload, request: &Request<'_>) -> Decision {
        self.of(workload).admit(request)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::policy::{
        Mode, Origin,
        object::{self, Key, Kind, Read},
    };

    fn strict(mode: &str) -> object::Parsed {
        let object = json!({"metadata": {"name": "default", "namespace": "shop"}, "spec": {"mtls": {"mode": mode}}});
        match object::read_as(Kind::PeerAuthentication, &object) {
            Read::Policy(parsed) => *parsed,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_change_is_in_force_at_once_and_is_told_to_who_waits() {
        let enforcement = Enforcement::default();
        let mut waits = enforcement.subscribe();
        let workload = Workload { name: "shop/web-1".into(), namespace: "shop".into(), ..Workload::default() };
        assert_eq!(enforcement.of(&workload).mode(80), Mode::Permissive);
        assert!(enforcement.change(|policies| policies.upsert(Origin::File, strict("STRICT"))).changed);
        assert!(waits.has_changed().unwrap());
        assert_eq!(waits.borrow_and_update().generation(), 1);
        assert_eq!(enforcement.of(&workload).mode(80), Mode::Strict);
        assert!(Arc::ptr_eq(&enforcement.of(&workload), &enforcement.of(&workload)), "chosen once");
        // The same again changes nothing, and nobody is woken for it.
        assert!(!enforcement.change(|policies| policies.upsert(Origin::File, strict("STRICT"))).changed);
        assert!(!waits.has_changed().unwrap());
        let key = Key { kind: Kind::PeerAuthentication, name: "shop/default".into() };
        assert!(enforcement.change(|policies| policies.delete(Origin::File, &key)).changed);
        assert_eq!(enforcement.of(&workload).mode(80), Mode::Permissive);
    }

    #[test]
    fn a_pod_whose_labels_change_gets_other_policies_under_the_same_name() {
        let enforcement = Enforcement::default();
        let object = json!({"metadata": {"name": "web", "namespace": "shop"},
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "mtls": {"mode": "STRICT"}}});
        let Read::Policy(parsed) = object::read_as(Kind::PeerAuthentication, &object) else { panic!("it is one") };
        enforcement.change(|policies| policies.upsert(Origin::File, *parsed));
        let mut workload = Workload { name: "shop/web-1".into(), namespace: "shop".into(), ..Workload::default() };
        assert_eq!(enforcement.of(&workload).mode(80), Mode::Permissive);
        workload.labels.insert("app".into(), "web".into());
        assert_eq!(enforcement.of(&workload).mode(80), Mode::Strict);
    }

    #[test]
    fn the_table_of_workloads_stays_bounded() {
        let enforcement = Enforcement::default();
        for n in 0..3 * REMEMBERED {
            let name = format!("shop/web-{n}").into();
            enforcement.of(&Workload { name, namespace: "shop".into(), ..Workload::default() });
        }
        assert!(enforcement.chosen.read().unwrap().by_name.len() <= REMEMBERED);
    }
}
