//! Registry and kernel in one step: an event in, its changes written, the answer out.
//!
//! Everything here runs on the agent's one thread, so that nothing comes between an event and the
//! map, and there is one writer.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
    time::Instant,
};

use dataplane_ebpf::{abi, health::Input};
use tokio::sync::{Notify, broadcast, watch};
use tracing::{debug, error, info, warn};

use super::{handover::Holder, mesh::Mesh};
use crate::{
    admin::protocol::{EventRow, Hook, Names},
    kernel::{Attached, Kernel, Notice, Outcome, canary::SERVER_POD, monotonic_ns, trim_heap},
    metrics::{Counted, drains::Drains, lag::Lags},
    model::{Event, Key, Object},
    registry::{
        Problem, Registry,
        change::{Change, PodId},
        problem::{backend_name, pod_name, service_name},
    },
};

/// How far the agent has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No full state was told yet: what an earlier agent left is in force, if it left anything.
    Waiting,
    /// The programs of this agent serve from its maps; not all hooks and pods are proved yet.
    Active,
    Ready,
}

/// What the source last said of itself.
#[derive(Clone, Debug, Default)]
pub struct SourceState {
    pub error: Option<String>,
    pub last_event: Option<Instant>,
}

/// What became of one event.
#[derive(Debug, Default)]
pub struct Applied {
    pub changes: usize,
    pub problems: Vec<Problem>,
    /// `CLOCK_MONOTONIC` when the urgent changes were in the maps.
    pub at_ns: u64,
}

/// Shared by the tasks of the agent's thread; never borrowed across an await.
pub type Shared = Rc<RefCell<Core>>;

pub struct Core {
    pub mesh: Mesh,
    pub registry: Registry,
    pub kernel: Kernel,
    pub source: SourceState,
    /// The agent that this one follows, while it goes on accepting connections of the mesh.
    pub holder: Option<Holder>,
    pub adopted: bool,
    pub phase: watch::Sender<Phase>,
    /// Rung when a pod's enrolment ended, either way.
    pub enrolled: Rc<Notify>,
    pub failing_pods: BTreeMap<PodId, String>,
    /// By object; the newest word on each.
    pub problems: BTreeMap<String, String>,
    /// The programs that are attached, by name.
    pub attached: BTreeSet<&'static str>,
    /// What the canary proved.
    pub hooks: Vec<Hook>,
    pub history: VecDeque<EventRow>,
    pub followers: broadcast::Sender<EventRow>,
    pub lags: Lags,
    pub drains: Drains,
    pub counted: Counted,
    changes: Vec<Change>,
    /// When the event that comes next was in the maps, as far as it is urgent.
    early_ns: Option<u64>,
    /// Why the hooks are not proved, when that was tried.
    pub unproved: Option<String>,
    /// Why the programs are not attached yet, when that was tried.
    pub activation_error: Option<String>,
}

/// How many records `hitless events` can look back.
const HISTORY: usize = 1024;
/// From this many backends on a relist leaves megabytes behind.
const LARGE: usize = 10_000;
/// How many problems are kept word for word.
const PROBLEMS: usize = 1000;

impl Core {
    pub fn new(registry: Registry, kernel: Kernel, adopted: bool, mesh: Mesh) -> Self {
        Self {
            mesh,
            registry,
            kernel,
            source: SourceState::default(),
            holder: None,
            adopted,
            phase: watch::Sender::new(Phase::Waiting),
            enrolled: Rc::default(),
            failing_pods: BTreeMap::new(),
            problems: BTreeMap::new(),
            attached: BTreeSet::new(),
            hooks: Vec::new(),
            history: VecDeque::new(),
            followers: broadcast::Sender::new(HISTORY),
            lags: Lags::default(),
            drains: Drains::default(),
            counted: Counted::default(),
            changes: Vec::new(),
            early_ns: None,
            unproved: None,
            activation_error: None,
        }
    }

    /// Takes an event in that was read at `read_ns`, and writes what follows from it.
    pub fn apply(&mut self, event: Event, read_ns: u64) -> Applied {
        let sync = matches!(event, Event::Sync { .. });
        let name = if self.problems.is_empty() || sync { None } else { name_of(&event) };

        let word = self.listen(&event);
        let in_mesh = self.mesh.hear(&event);
        let mut problems = self.registry.apply(event, &mut self.changes);
        let mut written = self.write(&mut problems);
        let early_ns = self.early_ns.take().filter(|early_ns| *early_ns >= read_ns);
        let at_ns = early_ns.unwrap_or_else(monotonic_ns);
        problems.extend(in_mesh);
        problems.extend(self.mesh.settle(&self.registry, &mut self.kernel));
        problems.extend(self.registry.settle(&mut self.changes));
        written += self.write(&mut problems);

        self.heard(word, read_ns, at_ns);
        self.counted.skipped += problems.len() as u64;
        self.source.last_event = Some(Instant::now());
        if sync {
            self.source.error = None;
        }
        self.note(&problems, sync, name);
        if sync {
            let counts = self.registry.counts();
            info!(
                services = counts.services,
                backends = counts.backends,
                pods = counts.pods,
                changes = written,
                problems = problems.len(),
                ms = at_ns.saturating_sub(read_ns) / 1_000_000,
                "state taken over"
            );
            // Boot and relists are rare and large; what they needed is not needed again.
            self.changes = Vec::new();
            if counts.backends >= LARGE {
                trim_heap();
            }
        }
        self.activate();
        Applied { changes: written, problems, at_ns }
    }

    /// A pod ends, as an event is about to say: no new connection goes to it from here on.
    pub fn ends(&mut self, pod: &str) {
        self.registry.pod_ends(pod, &mut self.changes);
        if self.write(&mut Vec::new()) > 0 {
            self.early_ns = Some(monotonic_ns());
        }
    }

    /// Enrols the node's own network namespace.
    pub fn enroll_host(&mut self) {
        self.registry.enroll_host(&mut self.changes);
        self.write(&mut Vec::new());
    }

    /// After the first full state: this agent's programs take over.
    pub fn activate(&mut self) {
        if !self.registry.synced() || *self.phase.borrow() != Phase::Waiting {
            return;
        }
        // From here on programs number backends otherwise than it does.
        if let Some(holder) = self.holder.take_if(|holder| holder.layout != self.kernel.layout()) {
            holder.serving();
        }
        match self.kernel.activate() {
            Ok(attached) => {
                let made = attached.iter().filter(|(_, how)| matches!(how, Attached::New)).count();
                info!(
                    programs = attached.len(),
                    new = made,
                    cgroup = %self.kernel.cgroup().display(),
                    layout = self.kernel.layout(),
                    "programs attached"
                );
                self.attached.extend(attached.iter().map(|(name, _)| *name));
                self.activation_error = None;
                self.phase.send_replace(Phase::Active);
            }
            Err(problem) => {
                let told = self.activation_error.replace(problem.to_string());
                if told != self.activation_error {
                    error!(%problem, "cannot attach; trying again every few seconds");
                }
            }
        }
    }

    /// Hands what waits to the kernel; refused writes become problems.
    fn write(&mut self, problems: &mut Vec<Problem>) -> usize {
        if self.changes.is_empty() {
            return 0;
        }
        self.mesh.changes(&self.changes, &mut self.kernel);
        for rejected in self.kernel.write(&self.changes) {
            let change = &self.changes[rejected.index];
            problems.push(Problem::new(self.describe(change), rejected.error.to_string()));
        }
        let written = self.changes.len();
        self.changes.clear();
        written
    }

    fn describe(&self, change: &Change) -> String {
        let backend = |id: u32| match self.registry.backend_label(id) {
            Some(at) => format!("backend {at}"),
            None => format!("backend number {id}"),
        };
        let service = |id: u32| match self.registry.service_label(id) {
            Some(name) => service_name(&name),
            None => format!("service number {id}"),
        };
        match change {
            Change::PutFrontend(at, _) | Change::DeleteFrontend(at) => self.registry.object_at(at),
            Change::PutService(value) => service(value.id),
            Change::DeleteService(id) => service(*id),
            Change::PutSlot(key, _) | Change::DeleteSlot(key) => service(key.service),
            Change::AddBackend { id, .. }
            | Change::UpdateBackend { id, .. }
            | Change::RemoveBackend { id, .. }
            | Change::Health { id, .. } => backend(*id),
            Change::Enroll(pod) => pod_name(&pod.name),
            Change::Release(id) => match self.registry.pod_label(*id) {
                Some(name) => pod_name(&name),
                None => format!("pod number {id}"),
            },
        }
    }

    /// Remembers problems, and logs each once.
    fn note(&mut self, problems: &[Problem], sync: bool, object: Option<String>) {
        if let Some(object) = object {
            self.problems.remove(&object);
        }
        let before = if sync { std::mem::take(&mut self.problems) } else { BTreeMap::new() };
        for problem in problems {
            if self.problems.len() >= PROBLEMS {
                break;
            }
            let old = self.problems.insert(problem.object.clone(), problem.reason.clone());
            if old.or_else(|| before.get(&problem.object).cloned()).as_ref() != Some(&problem.reason) {
                warn!(object = problem.object, reason = problem.reason, "skipped");
            }
        }
        if problems.len() > PROBLEMS {
            warn!(more = problems.len() - PROBLEMS, "further objects were skipped");
        }
    }

    /// The source could not be read: what is in force stays.
    pub fn source_failed(&mut self, problem: String) {
        if self.source.error.as_ref() != Some(&problem) {
            self.counted.refused += 1;
            error!(problem, "source refused; the last good state stays in force");
            self.source.error = Some(problem);
        }
    }

    /// The source is there, and has told all it has to tell; `whole`: every part of it.
    pub fn source_confirmed(&mut self, whole: bool) {
        self.source.last_event = Some(Instant::now());
        if whole && self.source.error.take().is_some() {
            info!("the source answers again");
        }
    }

    /// Objects that the source itself could not use.
    pub fn skipped(&mut self, objects: impl Iterator<Item = (String, String)>) {
        let problems: Vec<_> = objects.map(|(object, reason)| Problem { object, reason }).collect();
        self.counted.skipped += problems.len() as u64;
        self.note(&problems, false, None);
    }

    /// An object of the source is another now: what was wrong with the former is of no interest.
    pub fn mended(&mut self, object: impl FnOnce() -> String) {
        if !self.problems.is_empty() {
            self.problems.remove(&object());
        }
    }

    /// A job in a pod's network namespace ended.
    pub fn complete(&mut self, outcome: Outcome) {
        for notice in self.kernel.complete(outcome) {
            match notice {
                // The canary's, which comes and goes.
                Notice::Enrolled { pod, name, .. } if pod >= SERVER_POD => debug!(pod = %name, "enrolled"),
                Notice::Enrolled { pod, name, cookie, interfaces, tcx, listeners } => {
                    info!(pod = %name, cookie, interfaces = interfaces.join(","), tcx, listeners, "pod enrolled");
                    self.failing_pods.remove(&pod);
                }
                Notice::Failed { pod, name, error } => {
                    warn!(pod = %name, %error, "pod not enrolled; trying again every few seconds");
                    self.failing_pods.insert(pod, error.to_string());
                }
                Notice::Repaired { name, interfaces, .. } => {
                    warn!(pod = %name, interfaces = interfaces.join(","), "programs had been removed; attached again");
                }
                Notice::DetachFailed { cookie, error } => warn!(cookie, %error, "not detached"),
            }
        }
        let living: BTreeSet<_> = self.registry.local_pods().collect();
        self.failing_pods.retain(|pod, _| living.contains(pod));
        self.enrolled.notify_waiters();
    }

    /// Has every pod of this node been tried?
    pub fn pods_settled(&self) -> bool {
        let enrolled = self.kernel.enrolled();
        self.registry.local_pods().all(|pod| enrolled.contains_key(&pod) || self.failing_pods.contains_key(&pod))
    }

    /// A record of the ring: told, and finished where the kernel could not.
    pub fn event(&mut self, event: &abi::Event) {
        if event.kind == abi::EVENT_STOP_SIGNAL {
            self.mesh.drain(event.pod);
            let rest = self.registry.chain(event.pod, abi::MAX_BACKENDS_PER_POD as usize);
            let inputs =
                rest.into_iter().map(|(id, generation)| Change::Health { id, generation, input: Input::StopSignal });
            self.changes.extend(inputs);
            self.write(&mut Vec::new());
        }
        if event.pod >= SERVER_POD || self.registry.is_foreign(event.service, event.backend) {
            // The canary's: `status` tells what it proved.
            return;
        }
        if matches!(event.kind, abi::EVENT_LISTENER_OPENED | abi::EVENT_LISTENER_CLOSED) {
            self.kernel.recount(event.pod);
        }
        self.measure(event);
        let record = EventRow::new(event, &self.registry);
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(record.clone());
        // Nobody follows: nothing to do.
        let _ = self.followers.send(record);
    }

    /// Periodic: repairs what others removed.
    pub fn check(&mut self) {
        self.activate();
        match self.kernel.check() {
            Ok(repaired) if repaired.is_empty() => {}
            Ok(repaired) => {
                let names: Vec<_> = repaired.iter().map(|(name, _)| *name).collect();
                warn!(programs = names.join(","), "had been detached; attached again");
                self.attached.extend(names);
            }
            Err(problem) => warn!(%problem, "cannot attach again; trying every few seconds"),
        }
    }
}

impl Names for Registry {
    fn pod(&self, id: u32) -> Option<String> {
        self.pod_label(id).map(|name| name.to_string())
    }

    fn service(&self, id: u32) -> Option<String> {
        self.service_label(id)
    }

    fn backend(&self, id: u32) -> Option<String> {
        self.backend_label(id).map(|at| at.to_string())
    }
}

/// The name that a problem with the event's object goes by.
fn name_of(event: &Event) -> Option<String> {
    Some(match event {
        Event::Upsert { object: Object::Service(service) } => service_name(&service.name),
        Event::Upsert { object: Object::Pod(pod) } => pod_name(&pod.name),
        Event::Upsert { object: Object::Backend(b) } => backend_name(&b.service, &b.port, b.address, b.target_port),
        Event::Delete { object: Key::Service { name } } => service_name(name),
        Event::Delete { object: Key::Pod { name } } => pod_name(name),
        Event::Delete { object: Key::Backend { service, port, address, target_port } } => {
            backend_name(service, port, *address, *target_port)
        }
        _ => return None,
    })
}
