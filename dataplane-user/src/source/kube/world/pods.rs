//! Pods: which end, which run here, and which of those are enrolled.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use super::{AMBIENT, NONE, Name, Scope, World, slices::Uid};
use crate::{
    few::Few,
    model::{self, Event, Key},
    registry::problem::stop_signals,
    source::kube::{
        ending::Ending,
        find::Process,
        object::{self, Object as _},
    },
};

/// What is known of a name: the pod itself, and who speaks of it.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub pod: Option<Pod>,
    /// Slices with an endpoint of it.
    pub slices: Few<Name>,
}

#[derive(Clone, Debug)]
pub(super) struct Pod {
    pub uid: Uid,
    /// Deleted (deletionTimestamp), or over for good (phase Succeeded or Failed, as after an eviction).
    pub ends: bool,
    pub scope: Scope,
    more: Option<Box<More>>,
}

/// More of a pod that runs in a network of its own.
#[derive(Clone, Debug)]
enum More {
    /// It runs here.
    Here(Box<Here>),
    /// It runs elsewhere: who it is in the mesh.
    Member(Member),
}

impl Pod {
    fn here(&self) -> Option<&Here> {
        match self.more.as_deref() {
            Some(More::Here(here)) => Some(here),
            _ => None,
        }
    }

    fn here_mut(&mut self) -> Option<&mut Here> {
        match self.more.as_deref_mut() {
            Some(More::Here(here)) => Some(here),
            _ => None,
        }
    }

    fn member(&self) -> Option<&Member> {
        match self.more.as_deref() {
            Some(More::Member(member)) => Some(member),
            _ => None,
        }
    }
}

/// A pod of another node, as far as the mesh is concerned.
#[derive(Clone, Debug, PartialEq)]
struct Member {
    mode: Mode,
    account: Name,
    addresses: Box<[IpAddr]>,
}

/// What the pod itself says of its enrolment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Ambient,
    None,
    /// As its namespace says.
    Unsaid,
}

impl Mode {
    fn of(label: Option<&str>) -> Self {
        match label {
            Some(AMBIENT) => Self::Ambient,
            Some(NONE) => Self::None,
            _ => Self::Unsaid,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Here {
    /// As cgroups name it.
    uid: String,
    mode: Mode,
    /// Those that mean something to the registry; with a mesh all, by which policies select.
    labels: BTreeMap<Name, Name>,
    account: Option<Name>,
    declared_gateway: bool,
    addresses: Vec<IpAddr>,
    /// Those that its network has: they count until the API server names some.
    seen: Vec<IpAddr>,
    stops: Vec<Stop>,
    /// Nothing of it runs any more.
    over: bool,
    process: Option<Process>,
    /// It was told as enrolled: connections that were moved meanwhile go on being translated.
    was_enrolled: bool,
}

/// By which signal a container is stopped.
#[derive(Clone, Debug, PartialEq)]
enum Stop {
    By(String),
    /// As its image says.
    As(Name),
}

/// What the runtime sends when nothing says otherwise.
const TERM: &str = "TERM";

impl Known {
    pub(super) fn in_scope(&self, scope: Scope) -> bool {
        self.pod.as_ref().is_some_and(|pod| pod.scope == scope)
    }
}

impl World {
    /// A pod of this node.
    pub fn pod(&mut self, object: &object::Pod) {
        let (name, uid) = self.lives(&object.metadata);
        let over = is_over(object.status.phase.as_deref());
        let more = (!object.spec.host_network).then(|| Box::new(More::Here(Box::new(self.here(object, over)))));
        let ends = over || object.metadata.deletion_timestamp.is_some();
        self.put_pod(name, Pod { uid, ends, scope: Scope::ThisNode, more });
    }

    /// A pod of another node, or of none yet.
    pub fn other_pod(&mut self, object: &object::OtherPod) {
        let (name, uid) = self.lives(&object.metadata);
        let ends = object.metadata.deletion_timestamp.is_some() || is_over(object.status.phase.as_deref());
        let over = is_over(object.status.phase.as_deref());
        let addresses: Box<[IpAddr]> = object.status.pod_ips.iter().filter_map(|ip| ip.ip.parse().ok()).collect();
        let in_mesh = self.mesh && !over && !object.spec.host_network && !addresses.is_empty();
        let more = in_mesh.then(|| {
            let mode = Mode::of(object.metadata.labels.mode.as_deref());
            let account = self.account(object.spec.service_account_name.as_deref());
            Box::new(More::Member(Member { mode, account, addresses }))
        });
        self.put_pod(name, Pod { uid, ends, scope: Scope::Others, more });
    }

    /// The pod's name, if this is the life of it that is known, and its end is not.
    pub fn living(&self, pod: &Ending<'_>) -> Option<Name> {
        let (name, known) = self.pods.get_key_value(format!("{}/{}", pod.namespace, pod.name).as_str())?;
        let lives = known.pod.as_ref().is_some_and(|known| !known.ends && known.uid == Uid::of(pod.uid));
        lives.then(|| name.clone())
    }

    /// Who a pod is. A name's next life, such as a StatefulSet's, is another pod: the former one's end was not heard of.
    fn lives<L>(&mut self, meta: &object::Meta<L>) -> (Name, Uid) {
        let (name, uid) = (self.intern(&meta.full_name()), Uid::of(&meta.uid));
        let known = self.pods.get(&name).and_then(|known| known.pod.as_ref());
        if let Some(former) = known.filter(|pod| pod.uid != uid).map(|pod| pod.scope) {
            self.pod_gone(&name, former);
        }
        (name, uid)
    }

    fn put_pod(&mut self, name: Name, pod: Pod) {
        let scope = pod.scope;
        let before = self.told(&name);
        let known = self.pods.entry(name.clone()).or_default();
        let first = known.pod.is_none();
        known.pod = Some(pod);
        if scope == Scope::ThisNode {
            self.local.insert(name.clone());
        } else {
            self.local.remove(&name);
        }
        self.tell_pod(&name, before);
        if first {
            // Its endpoints waited for it.
            self.retell_endpoints_of(&name);
        }
    }

    /// A pod object is no more: so is every backend of it. A watch that a pod has moved out of is not believed.
    pub fn pod_gone(&mut self, name: &str, scope: Scope) {
        let Some((name, known)) = self.pods.get_key_value(name).filter(|(_, known)| known.in_scope(scope)) else {
            return;
        };
        let (name, spoken_of) = (name.clone(), !known.slices.is_empty());
        self.forget(Key::Pod { name: name.clone() });
        self.local.remove(&name);
        if spoken_of {
            if let Some(known) = self.pods.get_mut(&name) {
                known.pod = None;
            }
            self.retell_endpoints_of(&name);
        } else {
            self.pods.remove(&name);
        }
    }

    /// Pods of this node whose network is to be found, with the uids that cgroups name them by.
    pub fn unfound(&self) -> Vec<(Name, String)> {
        let unfound = self.local.iter().filter_map(|name| {
            let here = self.here_of(name)?;
            let wanted = here.process.is_none() && !here.over && self.enrolled(name, here.mode);
            wanted.then(|| (name.clone(), here.uid.clone()))
        });
        unfound.collect()
    }

    /// Images of enrolled pods of which it is not known yet how their containers are stopped.
    pub fn unasked(&self) -> Vec<Name> {
        let mut unasked: Vec<_> = self.images_in_use().filter(|image| !self.images.contains_key(image)).collect();
        unasked.sort_unstable();
        unasked.dedup();
        unasked
    }

    /// The STOPSIGNAL of an image, if it has one.
    pub fn image(&mut self, image: &Name, signal: Option<String>) {
        let known = signal.filter(|signal| match stop_signals(std::slice::from_ref(signal)) {
            Ok(_) => true,
            Err(reason) => {
                self.problem("image", image, format!("{reason}; {TERM} is taken for it"));
                false
            }
        });
        let running =
            |name: &&Name| self.here_of(name).is_some_and(|here| here.stops.contains(&Stop::As(image.clone())));
        let pods = self.local.iter().filter(running);
        let before: Vec<_> = pods.map(|pod| (pod.clone(), self.told(pod))).collect();
        let in_use: HashSet<_> = self.images_in_use().collect();
        self.images.retain(|image, _| in_use.contains(image));
        self.images.insert(image.clone(), known);
        for (pod, told) in before {
            self.tell_pod(&pod, told);
        }
    }

    fn images_in_use(&self) -> impl Iterator<Item = Name> + '_ {
        let local = self.local.iter().filter_map(|name| Some((name, self.here_of(name)?)));
        let enrolled = local.filter(|(name, here)| !here.over && self.enrolled(name, here.mode));
        enrolled.flat_map(|(_, here)| &here.stops).filter_map(|stop| match stop {
            Stop::As(image) => Some(image.clone()),
            Stop::By(_) => None,
        })
    }

    /// The pods of this node that were found, by which process.
    pub fn processes(&self) -> Vec<(Name, String, Process)> {
        let found = self.local.iter().filter_map(|name| {
            let here = self.here_of(name)?;
            Some((name.clone(), here.uid.clone(), here.process?))
        });
        found.collect()
    }

    /// A process of a pod was found, and the addresses of its network; or the one that was known has ended.
    pub fn found(&mut self, name: &Name, uid: &str, process: Option<Process>, addresses: Vec<IpAddr>) {
        self.reconsider(name, |here| {
            if here.uid == uid {
                (here.process, here.seen) = (process, addresses);
            }
        });
    }

    /// Changes what is known of a pod here and tells what follows.
    pub(super) fn reconsider(&mut self, name: &Name, change: impl FnOnce(&mut Here)) {
        let before = self.told(name);
        let known = self.pods.get_mut(name).and_then(|known| known.pod.as_mut());
        if let Some(here) = known.and_then(Pod::here_mut) {
            change(here);
            self.tell_pod(name, before);
        }
    }

    pub(super) fn tell_pod(&mut self, name: &Name, before: Option<model::Pod>) {
        let now = self.told(name);
        let known = self.pods.get_mut(name).and_then(|known| known.pod.as_mut());
        if let (Some(here), Some(told)) = (known.and_then(Pod::here_mut), &now) {
            here.was_enrolled |= told.enrolled && told.pid.is_some();
        }
        if now == before {
            return;
        }
        let pod = now.unwrap_or_else(|| elsewhere(name, false));
        self.tell(Event::Upsert { object: model::Object::Pod(pod) });
    }

    /// What the registry is told of a pod, if it needs to be told anything.
    pub(super) fn told(&self, name: &Name) -> Option<model::Pod> {
        let pod = self.pods.get(name)?.pod.as_ref()?;
        let plain = || pod.ends.then(|| elsewhere(name, true));
        if let Some(member) = pod.member()
            && self.enrolled(name, member.mode)
        {
            return Some(model::Pod {
                addresses: member.addresses.to_vec(),
                enrolled: true,
                service_account: Some(member.account.clone()),
                ..elsewhere(name, pod.ends)
            });
        }
        let Some(here) = pod.here() else { return plain() };
        let enrolled = self.enrolled(name, here.mode);
        let Some(process) = here.process.filter(|_| !here.over && (enrolled || here.was_enrolled)) else {
            return plain();
        };
        Some(model::Pod {
            addresses: if here.addresses.is_empty() { here.seen.clone() } else { here.addresses.clone() },
            pid: Some(process.pid),
            enrolled,
            gateway: here.declared_gateway,
            labels: here.labels.clone(),
            service_account: here.account.clone(),
            stop_signals: self.stop_signals(here),
            ..elsewhere(name, pod.ends)
        })
    }

    /// As Istio's node agent decides: either label enrols, `none` on the pod wins.
    fn enrolled(&self, name: &str, mode: Mode) -> bool {
        match mode {
            Mode::None => false,
            Mode::Ambient => true,
            Mode::Unsaid => name.split_once('/').is_some_and(|(namespace, _)| self.ambient.contains(namespace)),
        }
    }

    fn here_of(&self, name: &str) -> Option<&Here> {
        self.pods.get(name)?.pod.as_ref()?.here()
    }

    fn here(&mut self, object: &object::Pod, over: bool) -> Here {
        let meta = object.meta();
        let name = meta.full_name();
        let addresses = object.status.pod_ips.iter().filter_map(|ip| ip.ip.parse().ok());
        let before = self.here_of(&name);
        let (process, seen, was_enrolled) =
            before.map_or((None, Vec::new(), false), |here| (here.process, here.seen.clone(), here.was_enrolled));
        let (labels, account) = if self.mesh {
            (meta.labels.clone(), Some(self.account(object.spec.service_account_name.as_deref())))
        } else {
            let gateway = meta.labels.get_key_value(model::GATEWAY_LABEL);
            (gateway.map(|(label, name)| (label.clone(), name.clone())).into_iter().collect(), None)
        };
        Here {
            uid: meta.annotations.config_hash.clone().unwrap_or_else(|| meta.uid.clone()),
            mode: Mode::of(meta.labels.get(object::MODE_LABEL).map(AsRef::as_ref)),
            labels,
            account,
            declared_gateway: meta.annotations.gateway.as_deref() == Some("true"),
            addresses: addresses.collect(),
            seen,
            stops: self.stops(object, &name),
            over,
            process,
            was_enrolled,
        }
    }

    /// Of its containers, and what is annotated. What is annotated is said instead of the images.
    fn stops(&mut self, object: &object::Pod, name: &str) -> Vec<Stop> {
        let annotated = object.metadata.annotations.stop_signals.as_deref();
        let of_container = |container: &object::Container| {
            let status = object.status.container_statuses.iter().find(|status| status.name == container.name);
            let named = container.lifecycle.stop_signal.as_deref();
            if let Some(signal) = named.or_else(|| status?.stop_signal.as_deref()) {
                return Stop::By(signal.into());
            }
            match status {
                Some(status) if annotated.is_none() && !status.image_id.is_empty() => {
                    Stop::As(self.image_named(&status.image_id))
                }
                _ => Stop::By(TERM.into()),
            }
        };
        let mut stops: Vec<_> = object.spec.containers.iter().map(of_container).collect();
        stops.extend(annotated.into_iter().flat_map(|all| all.split(',')).map(|signal| Stop::By(signal.trim().into())));
        stops.retain(|stop| match stop {
            Stop::As(_) => true,
            Stop::By(signal) => match stop_signals(std::slice::from_ref(signal)) {
                Ok(_) => true,
                Err(reason) => {
                    self.problem("pod", name, format!("{reason}; it is enrolled without"));
                    false
                }
            },
        });
        stops
    }

    /// As far as it is known. A container of which nobody says otherwise is stopped by TERM.
    fn stop_signals(&self, here: &Here) -> Vec<String> {
        let signals = here.stops.iter().map(|stop| match stop {
            Stop::By(signal) => signal.as_str(),
            Stop::As(image) => self.images.get(image).and_then(Option::as_deref).unwrap_or(TERM),
        });
        let mut signals: Vec<String> = signals.map(str::to_owned).collect();
        signals.sort_unstable();
        signals.dedup();
        if signals == [TERM] {
            // The default.
            signals.clear();
        }
        signals
    }

    /// The one copy of an image's name.
    fn image_named(&self, image: &str) -> Name {
        self.images.get_key_value(image).map_or_else(|| image.into(), |(known, _)| known.clone())
    }

    /// The one copy of a service account's name. Kubernetes fills in `default` where none is named.
    fn account(&mut self, name: Option<&str>) -> Name {
        let name = name.filter(|name| !name.is_empty()).unwrap_or("default");
        if let Some(known) = self.accounts.get(name) {
            return known.clone();
        }
        let account: Name = name.into();
        self.accounts.insert(account.clone());
        account
    }

    /// The one copy of a pod's name.
    pub(super) fn intern(&self, name: &Name) -> Name {
        self.pods.get_key_value(name).map_or_else(|| name.clone(), |(known, _)| known.clone())
    }
}

/// It ended for good, and runs nothing any more.
fn is_over(phase: Option<&str>) -> bool {
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// A pod that does not run here.
fn elsewhere(name: &Name, terminating: bool) -> model::Pod {
    model::Pod {
        name: name.clone(),
        addresses: Vec::new(),
        netns: None,
        pid: None,
        enrolled: false,
        gateway: false,
        labels: Default::default(),
        stop_signals: Vec::new(),
        service_account: None,
        terminating,
    }
}
