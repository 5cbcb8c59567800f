//! Pods of this node: their namespaces' cookies in `PODS`, tc programs on their interfaces, their
//! listeners counted.
//!
//! [`Enroller`] lives on the agent's thread and is the writer of `PODS`. What enters a namespace is
//! a [`Job`] for one worker thread, so jobs of a pod stay in order; each ends in an [`Outcome`].

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use dataplane_ebpf::abi::{POD_MESH, Pod};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{
    Tcx,
    error::Error,
    interfaces::{Attachment, Interfaces},
    load::Programs,
    maps::Maps,
    netns, snapshot,
};
use crate::registry::change::{Enrollment, Netns, PodId};

/// How many pods one [`Enroller::check`] looks after.
const PER_CHECK: usize = 32;

/// What the worker did, for [`Kernel::complete`](super::Kernel::complete).
#[derive(Debug)]
pub struct Outcome(Done);

#[derive(Debug)]
enum Done {
    Attached {
        pod: PodId,
        round: u64,
        result: Result<Attachment, Error>,
    },
    /// Everything that was asked for before was done.
    Reached,
    /// The node's interfaces changed.
    LinksChanged,
    Detached {
        cookie: u64,
        result: Result<(), Error>,
    },
    Recounted {
        pod: PodId,
    },
}

/// What the agent may want to tell about a pod.
#[derive(Debug)]
pub enum Notice {
    Enrolled {
        pod: PodId,
        name: Arc<str>,
        cookie: u64,
        interfaces: Vec<String>,
        tcx: bool,
        listeners: usize,
    },
    /// It is not (fully) enrolled; tried again by the next check.
    Failed {
        pod: PodId,
        name: Arc<str>,
        error: Error,
    },
    /// Something that others had removed is back.
    Repaired {
        pod: PodId,
        name: Arc<str>,
        interfaces: Vec<String>,
    },
    /// Detaching from a namespace that is no longer wanted failed.
    DetachFailed {
        cookie: u64,
        error: Error,
    },
}

/// Work in a network namespace.
enum Job {
    Attach { enrollment: Arc<Enrollment>, round: u64 },
    Detach { cookie: u64, path: Option<PathBuf> },
    Recount { enrollment: Arc<Enrollment>, cookie: u64 },
    Reach,
}

/// A pod's [`Job::Recount`]: one at a time, however many events ask for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recount {
    Idle,
    UnderWay,
    /// Asked for while one is under way, which may have looked already.
    Again,
}

struct PodState {
    enrollment: Arc<Enrollment>,
    /// Counts enrollments: an older job's result is of no interest.
    round: u64,
    cookie: Option<u64>,
    /// Where the agent listens on the pod's loopback for what goes to the mesh; 0: it does not.
    outbound_port: u16,
    /// The worker has attached to its interfaces at least once.
    attached: bool,
    failing: bool,
    recount: Recount,
}

/// The agent's side.
pub struct Enroller {
    maps: Arc<Maps>,
    links: PathBuf,
    pods: BTreeMap<PodId, PodState>,
    rounds: u64,
    /// Before activation jobs wait here.
    waiting: Option<Vec<Job>>,
    /// `None` only while it is dropped.
    jobs: Option<Sender<Job>>,
    worker: Option<JoinHandle<()>>,
    /// The worker leaves the rest of its queue.
    stop: Arc<AtomicBool>,
    outcomes: UnboundedSender<Outcome>,
    watching_links: bool,
    /// Where the next check goes on.
    next_check: PodId,
    /// Jobs of checks that are still under way.
    checking: usize,
    /// Namespaces that an agent before was attached to and that no pod has claimed yet.
    inherited: BTreeSet<u64>,
    /// Everything from before activation was tried: what nobody claimed may go.
    prune: bool,
    /// How many [`Job::Detach`] of a namespace are under way.
    detaching: BTreeMap<u64, usize>,
}

impl Enroller {
    pub fn start(
        tcx: Tcx,
        links: PathBuf,
        programs: Programs,
        maps: Arc<Maps>,
    ) -> Result<(Self, UnboundedReceiver<Outcome>), Error> {
        let (jobs, queue) = channel();
        let (outcomes, results) = unbounded_channel();
        let interfaces = Interfaces::new(tcx, links.clone(), programs, maps.clone());
        let sender = outcomes.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let worker = std::thread::Builder::new()
            .name("enroll".to_owned())
            .spawn(move || work(&interfaces, &queue, &sender, &stopped))
            .map_err(|source| Error::Thread { what: "the thread that enters network namespaces", source })?;
        let enroller = Self {
            maps,
            links,
            pods: BTreeMap::new(),
            rounds: 0,
            waiting: Some(Vec::new()),
            jobs: Some(jobs),
            worker: Some(worker),
            stop,
            outcomes,
            watching_links: false,
            next_check: 0,
            checking: 0,
            inherited: BTreeSet::new(),
            prune: false,
            detaching: BTreeMap::new(),
        };
        Ok((enroller, results))
    }

    pub fn enroll(&mut self, enrollment: &Arc<Enrollment>) -> Result<(), Error> {
        self.rounds += 1;
        let round = self.rounds;
        let before = self.pods.remove(&enrollment.pod);
        let moved = before.as_ref().is_none_or(|before| before.enrollment.netns != enrollment.netns);
        let cookie = before.as_ref().and_then(|before| before.cookie);
        let mesh = |enrollment: &Enrollment| enrollment.flags & POD_MESH;
        let guard = before.as_ref().is_some_and(|before| mesh(&before.enrollment) != mesh(enrollment));
        let state = match before {
            // Only its terms changed: no need to enter the namespace, unless for what is attached there.
            Some(before) if !moved => PodState { enrollment: enrollment.clone(), ..before },
            _ => PodState {
                enrollment: enrollment.clone(),
                round,
                cookie: None,
                outbound_port: 0,
                attached: false,
                failing: false,
                recount: Recount::Idle,
            },
        };
        self.pods.insert(enrollment.pod, state);
        if moved {
            if let Some(cookie) = cookie {
                self.forget(cookie, None)?;
            }
            self.send(Job::Attach { enrollment: enrollment.clone(), round });
            if enrollment.netns == Netns::Host {
                self.watch_links();
            }
            Ok(())
        } else {
            if guard {
                self.recheck(enrollment.pod);
            }
            cookie.map_or(Ok(()), |cookie| self.publish(cookie))
        }
    }

    /// The agent listens on that port of the pod's loopback (0: no more) for what goes to the mesh.
    pub fn set_outbound(&mut self, pod: PodId, port: u16) -> Result<(), Error> {
        let Some(state) = self.pods.get_mut(&pod) else { return Ok(()) };
        state.outbound_port = port;
        state.cookie.map_or(Ok(()), |cookie| self.publish(cookie))
    }

    pub fn release(&mut self, pod: PodId) -> Result<(), Error> {
        let Some(state) = self.pods.remove(&pod) else { return Ok(()) };
        let path = match &state.enrollment.netns {
            Netns::Path(path) => Some(path.clone()),
            Netns::Host => None,
        };
        match state.cookie {
            Some(cookie) => self.forget(cookie, path),
            None => Ok(()),
        }
    }

    /// Learns the cookies of the pods that wait and writes them, so that the programs find every pod
    /// from their first packet on; attaching to interfaces may take its time after that.
    pub fn prepare(&mut self) {
        let Some(waiting) = &self.waiting else { return };
        let enrollments: Vec<_> = waiting
            .iter()
            .filter_map(|job| match job {
                Job::Attach { enrollment, .. } => Some(enrollment.clone()),
                _ => None,
            })
            .collect();
        for enrollment in enrollments {
            let cookie = match &enrollment.netns {
                Netns::Path(path) => netns::within(path, netns::cookie),
                Netns::Host => netns::cookie(),
            };
            // What fails here fails again in the job, which tells.
            let Ok(cookie) = cookie else { continue };
            if let Some(state) = self.pods.get_mut(&enrollment.pod) {
                state.cookie = Some(cookie);
                let _ = self.publish(cookie);
            }
        }
    }

    pub fn activate(&mut self) {
        let pods = self.maps.pods.entries::<u64, Pod>().unwrap_or_default();
        self.inherited = pods.into_iter().map(|(cookie, _)| cookie).collect();
        let pins = snapshot::pinned(&self.links).unwrap_or_default();
        self.inherited.extend(pins.iter().filter_map(|pin| super::interfaces::cookie_of(pin)));
        for job in self.waiting.take().unwrap_or_default() {
            self.send(job);
        }
        self.send(Job::Reach);
    }

    /// Looks after some pods: new interfaces, filters that others flushed, a namespace made anew.
    pub fn check(&mut self) {
        if self.checking > 0 {
            return;
        }
        let later = self.pods.range(self.next_check..).map(|(pod, _)| *pod);
        let pods: Vec<_> =
            later.chain(self.pods.range(..self.next_check).map(|(pod, _)| *pod)).take(PER_CHECK).collect();
        self.next_check = pods.last().map_or(0, |pod| pod.wrapping_add(1));
        for pod in pods {
            self.recheck(pod);
        }
    }

    /// Has the worker count a pod's listeners again.
    pub fn recount(&mut self, pod: PodId) {
        let Some(state) = self.pods.get_mut(&pod) else { return };
        let Some(cookie) = state.cookie else { return };
        if state.recount != Recount::Idle {
            state.recount = Recount::Again;
            return;
        }
        state.recount = Recount::UnderWay;
        let job = Job::Recount { enrollment: state.enrollment.clone(), cookie };
        self.send(job);
    }

    fn recheck(&mut self, pod: PodId) {
        if let Some(state) = self.pods.get(&pod) {
            let job = Job::Attach { enrollment: state.enrollment.clone(), round: state.round };
            self.checking += 1;
            self.send(job);
        }
    }

    pub fn complete(&mut self, outcome: Outcome) -> Vec<Notice> {
        match outcome.0 {
            Done::Attached { pod, round, result } => {
                self.checking = self.checking.saturating_sub(1);
                let mut notices: Vec<_> = self.attached(pod, round, result).into_iter().collect();
                notices.extend(self.prune());
                notices
            }
            Done::Reached => {
                self.prune = true;
                self.prune()
            }
            Done::Recounted { pod } => {
                let again = self.pods.get_mut(&pod).map(|state| std::mem::replace(&mut state.recount, Recount::Idle));
                if again == Some(Recount::Again) {
                    self.recount(pod);
                }
                Vec::new()
            }
            Done::LinksChanged => {
                let host = self.pods.values().find(|state| state.enrollment.netns == Netns::Host);
                if let Some(pod) = host.map(|state| state.enrollment.pod) {
                    self.recheck(pod);
                }
                Vec::new()
            }
            Done::Detached { cookie, result } => {
                if let Some(under_way) = self.detaching.get_mut(&cookie) {
                    *under_way -= 1;
                    if *under_way == 0 {
                        self.detaching.remove(&cookie);
                    }
                }
                match result {
                    Ok(()) => Vec::new(),
                    Err(error) => vec![Notice::DetachFailed { cookie, error }],
                }
            }
        }
    }

    fn attached(&mut self, pod: PodId, round: u64, result: Result<Attachment, Error>) -> Option<Notice> {
        let state = self.pods.get_mut(&pod)?;
        let name = state.enrollment.name.clone();
        if state.round != round {
            // Released and enrolled elsewhere meanwhile: that job is on its way. What this one
            // attached to is found and let go when it was another namespace.
            if let Ok(attachment) = result
                && self.pods.values().all(|state| state.cookie != Some(attachment.cookie))
            {
                self.detach(attachment.cookie, None);
            }
            return None;
        }
        let attachment = match result {
            Ok(attachment) => attachment,
            Err(error) => {
                let told = std::mem::replace(&mut state.failing, true);
                return (!told).then_some(Notice::Failed { pod, name, error });
            }
        };
        let mut again = None;
        // A job that detaches from this very namespace came after this one: attach once more.
        if self.detaching.contains_key(&attachment.cookie) {
            let job = Job::Attach { enrollment: state.enrollment.clone(), round };
            self.checking += 1;
            again = Some(job);
        }
        let first = !std::mem::replace(&mut state.attached, true) || std::mem::take(&mut state.failing);
        let before = state.cookie.replace(attachment.cookie);
        let moved = before.is_some_and(|before| before != attachment.cookie);
        if let Some(job) = again {
            self.send(job);
        }
        let written = self.publish(attachment.cookie);
        if let Some(before) = before
            && moved
        {
            // The same path, another namespace: the pod was made anew.
            let _ = self.forget(before, None);
        }
        if let Err(error) = written {
            return Some(Notice::Failed { pod, name, error });
        }
        if first || moved {
            let Attachment { cookie, interfaces, tcx, listeners, .. } = attachment;
            return Some(Notice::Enrolled { pod, name, cookie, interfaces, tcx, listeners });
        }
        (!attachment.repaired.is_empty()).then_some(Notice::Repaired { pod, name, interfaces: attachment.repaired })
    }

    /// Lets go of the namespaces that an agent before left and that nobody claimed; but not while a
    /// pod's namespace is still being looked at: it may be one of them.
    fn prune(&mut self) -> Vec<Notice> {
        if !self.prune || self.pods.values().any(|state| !state.attached && !state.failing) {
            return Vec::new();
        }
        self.prune = false;
        let claimed: BTreeSet<u64> = self.pods.values().filter_map(|state| state.cookie).collect();
        let mut notices = Vec::new();
        for cookie in std::mem::take(&mut self.inherited).difference(&claimed) {
            if let Err(error) = self.forget(*cookie, None) {
                notices.push(Notice::DetachFailed { cookie: *cookie, error });
            }
        }
        notices
    }

    pub fn enrolled(&self) -> BTreeMap<PodId, u64> {
        let attached = self.pods.iter().filter(|(_, state)| state.attached);
        attached.filter_map(|(pod, state)| Some((*pod, state.cookie?))).collect()
    }

    /// Writes `PODS[cookie]`. Pods that share a namespace (the host's) share the entry: the lowest
    /// number's.
    fn publish(&self, cookie: u64) -> Result<(), Error> {
        let Some(state) = self.pods.values().find(|state| state.cookie == Some(cookie)) else {
            return self.maps.pods.delete(&cookie).map(drop);
        };
        let Enrollment { pod, flags, stop_signals, first_backend, .. } = *state.enrollment;
        let outbound_port_be = state.outbound_port.to_be();
        let value = Pod { pod, flags, stop_signals, first_backend, outbound_port_be, _pad: 0 };
        self.maps.pods.put(&cookie, &value)
    }

    /// A pod left that namespace: the programs let go of it at once, its interfaces follow.
    fn forget(&mut self, cookie: u64, path: Option<PathBuf>) -> Result<(), Error> {
        let written = self.publish(cookie);
        if self.pods.values().all(|state| state.cookie != Some(cookie)) {
            // Before activation there is nothing of ours to detach; what was inherited goes by `prune`.
            if self.waiting.is_none() {
                self.detach(cookie, path);
            }
        }
        written
    }

    fn detach(&mut self, cookie: u64, path: Option<PathBuf>) {
        *self.detaching.entry(cookie).or_default() += 1;
        self.send(Job::Detach { cookie, path });
    }

    fn send(&mut self, job: Job) {
        match &mut self.waiting {
            Some(waiting) => waiting.push(job),
            // The worker ends with this sender: it cannot be gone before.
            None => drop(self.jobs.as_ref().map(|jobs| jobs.send(job))),
        }
    }

    /// From now on a change of the node's interfaces is told by the kernel.
    fn watch_links(&mut self) {
        if std::mem::replace(&mut self.watching_links, true) {
            return;
        }
        let outcomes = self.outcomes.clone();
        let watch = move || {
            let Ok(mut socket) = netns::link_monitor() else { return };
            while !outcomes.is_closed() {
                if netns::wait_for_links(&mut socket, Duration::from_secs(1)) {
                    // New interfaces come in bursts of messages.
                    std::thread::sleep(Duration::from_millis(20));
                    netns::drain(&mut socket);
                    let _ = outcomes.send(Outcome(Done::LinksChanged));
                }
            }
        };
        // Without the thread, the periodic check finds new interfaces.
        drop(std::thread::Builder::new().name("links".to_owned()).spawn(watch));
    }
}

impl Drop for Enroller {
    /// Waits for the job under way: nothing is pinned after the agent let go of its lock.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(worker) = self.worker.take() {
            drop(worker.join());
        }
    }
}

fn work(interfaces: &Interfaces, jobs: &Receiver<Job>, outcomes: &UnboundedSender<Outcome>, stop: &AtomicBool) {
    for job in jobs {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let done = match job {
            Job::Attach { enrollment, round } => {
                Done::Attached { pod: enrollment.pod, round, result: interfaces.attach(&enrollment) }
            }
            Job::Detach { cookie, path } => {
                Done::Detached { cookie, result: interfaces.detach(cookie, path.as_deref()) }
            }
            Job::Recount { enrollment, cookie } => {
                interfaces.recount_again(&enrollment, cookie);
                Done::Recounted { pod: enrollment.pod }
            }
            Job::Reach => Done::Reached,
        };
        if outcomes.send(Outcome(done)).is_err() {
            return;
        }
    }
}
