//! Pods: which of them run here, what they are enrolled with, and what their end means.

use std::{path::PathBuf, sync::Arc};

use dataplane_ebpf::{
    abi::{POD_ENROLLED, POD_GATEWAY, POD_HOST, POD_MESH},
    health::Input,
};

use super::{
    Index, NONE, Registry,
    backends::ObjectKey,
    change::{Change, Enrollment, Netns, PodId},
    hash::hash_of,
    problem::{Name, stop_signals},
};
use crate::{
    few::Few,
    model::{self, GATEWAY_LABEL},
};

/// A pod that was declared, or that a backend names.
#[derive(Debug)]
pub(super) struct Pod {
    pub name: Name,
    pub declared: bool,
    pub terminating: bool,
    /// Of the few that run here.
    pub local: Option<Box<Local>>,
    /// Head of the chain of its backends in the kernel; only of a local pod.
    pub first_backend: u32,
    /// The backends that name it.
    pub objects: Few<(Index, ObjectKey)>,
    pub seen: u32,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Local {
    pub id: PodId,
    pub netns: PathBuf,
    pub flags: u32,
    pub stop_signals: u64,
}

impl Registry {
    /// Enrols the node's own network namespace.
    pub fn enroll_host(&mut self, out: &mut Vec<Change>) {
        self.last_pod += 1;
        let enrollment = Arc::new(Enrollment {
            pod: self.last_pod,
            name: "the node".into(),
            netns: Netns::Host,
            flags: POD_ENROLLED | POD_HOST,
            stop_signals: 0,
            first_backend: 0,
        });
        self.host = Some(enrollment.clone());
        out.push(Change::Enroll(enrollment));
    }

    pub(super) fn declare_pod(&mut self, pod: model::Pod) {
        let index = self.pod_named(&pod.name);
        let local = self.local(&pod, index);
        let record = &mut self.pods[index];
        record.declared = true;
        record.seen = self.epoch;
        let ended = std::mem::replace(&mut record.terminating, pod.terminating) != pod.terminating;
        let old = std::mem::replace(&mut record.local, local.clone());
        if let Some(local) = &local {
            self.pods_by_id.insert(local.id, index);
        }
        let moved = old.as_ref().map(|local| local.id) != local.as_ref().map(|local| local.id);
        self.muted = index;
        if ended || moved {
            self.refresh_pod(index, moved);
        }
        self.muted = NONE;
        if let (true, Some(old)) = (moved, &old) {
            self.pods_by_id.remove(&old.id);
            self.out.push(Change::Release(old.id));
        }
        if local.is_some() && local != old {
            self.enroll(index);
        }
    }

    /// The most urgent of what follows from a pod's end, before its declaration says so: the health of its backends.
    pub fn pod_ends(&self, name: &str, out: &mut Vec<Change>) {
        let Some(index) = self.pod_at(name).filter(|_| self.boot.is_none()) else { return };
        for (port, key) in self.pods[index].objects.iter() {
            let id = self.ports[*port].objects.get(key).map_or(0, |object| object.backend);
            let (Some(backend), Some(serving)) = (self.backends.get(id), self.terminating_with(id, index)) else {
                continue;
            };
            let generation = backend.value.generation;
            out.push(Change::Health { id, generation, input: Input::Terminating { serving } });
        }
    }

    /// A pod is gone: so is, at once, every backend that names it.
    pub(super) fn delete_pod(&mut self, index: Index) {
        // Stays until the last that names it is gone.
        self.pods[index].declared = true;
        self.muted = index;
        let mut objects = self.pods[index].objects.to_vec();
        objects.sort_unstable_by_key(|(port, key)| (*key, *port));
        // Whoever has several services leaves all of them in one step.
        for same in objects.chunk_by(|(_, a), (_, b)| a == b) {
            let mut ports: Vec<(u32, Index)> = Vec::new();
            for &(port, ref key) in same {
                if let Some(number) = self.ports[port].objects.get(key).map(|object| object.backend)
                    && number != 0
                {
                    ports.push((number, port));
                }
            }
            // TCP and UDP on the same port are two backends.
            ports.sort_unstable();
            for of_one in ports.chunk_by(|a, b| a.0 == b.0) {
                let ports: Vec<_> = of_one.iter().map(|&(_, port)| port).collect();
                self.detach(of_one[0].0, &ports);
            }
        }
        for (port, key) in objects {
            self.delete_object(port, key);
        }
        self.undeclare_pod(index);
    }

    /// A relist does not name it any more. Backends that do stay.
    pub(super) fn undeclare_pod(&mut self, index: Index) {
        let record = &mut self.pods[index];
        record.declared = false;
        let ended = std::mem::take(&mut record.terminating);
        let old = record.local.take();
        self.muted = index;
        if ended || old.is_some() {
            self.refresh_pod(index, old.is_some());
        }
        self.muted = NONE;
        if let Some(old) = old {
            self.pods_by_id.remove(&old.id);
            self.out.push(Change::Release(old.id));
        }
        self.collect_pod(index);
    }

    /// `moved`: it got another identifier, or none.
    fn refresh_pod(&mut self, index: Index, moved: bool) {
        if moved {
            self.unchain(index);
        }
        let objects = self.pods[index].objects.to_vec();
        for (port, key) in objects {
            if let Some(number) = self.ports[port].objects.get(&key).map(|object| object.backend)
                && number != 0
            {
                self.refresh(number);
            }
        }
    }

    /// Dissolves a pod's chain of backends.
    fn unchain(&mut self, index: Index) {
        let mut number = std::mem::take(&mut self.pods[index].first_backend);
        while number != 0 {
            let backend = self.backends.unchain(number);
            self.out.push(Change::UpdateBackend { id: number, backend: backend.0 });
            number = backend.1;
        }
    }

    /// Tells the kernel side of a pod's terms as they are now.
    pub(super) fn enroll(&mut self, index: Index) {
        if self.muted == index {
            return;
        }
        let pod = &self.pods[index];
        if let Some(local) = &pod.local {
            self.out.push(Change::Enroll(Arc::new(Enrollment {
                pod: local.id,
                name: pod.name.clone(),
                netns: Netns::Path(local.netns.clone()),
                flags: local.flags,
                stop_signals: local.stop_signals,
                first_backend: pod.first_backend,
            })));
        }
    }

    /// What a pod's declaration makes it on this node. Another network namespace is another pod.
    fn local(&mut self, pod: &model::Pod, index: Index) -> Option<Box<Local>> {
        let netns = match (&pod.netns, pod.pid) {
            (Some(path), _) => path.clone(),
            (None, Some(pid)) => format!("/proc/{pid}/ns/net").into(),
            (None, None) => return None,
        };
        let id = match &self.pods[index].local {
            Some(old) if old.netns == netns => old.id,
            _ => {
                self.last_pod += 1;
                self.last_pod
            }
        };
        let gateway = pod.gateway || pod.labels.contains_key(GATEWAY_LABEL);
        let mut flags = 0;
        if pod.enrolled {
            flags |= if self.mesh { POD_ENROLLED | POD_MESH } else { POD_ENROLLED };
        }
        if gateway {
            flags |= POD_GATEWAY;
        }
        let stop_signals = stop_signals(&pod.stop_signals).expect("check_pod has seen the stop signals");
        Some(Box::new(Local { id, netns, flags, stop_signals }))
    }

    pub(super) fn pod_at(&self, name: &str) -> Option<Index> {
        self.pod_index.find(hash_of(name), |&index| *self.pods[index].name == *name).copied()
    }

    pub(super) fn pod_named(&mut self, name: &Name) -> Index {
        if let Some(index) = self.pod_at(name) {
            return index;
        }
        let index = self.pods.insert(Pod {
            name: name.clone(),
            declared: false,
            terminating: false,
            local: None,
            first_backend: 0,
            objects: Few::None,
            seen: self.epoch,
        });
        let pods = &self.pods;
        self.pod_index.insert_unique(hash_of(&**name), index, |&other| hash_of(&*pods[other].name));
        index
    }

    pub(super) fn name_in_pod(&mut self, pod: Index, port: Index, key: ObjectKey) {
        if pod != NONE {
            self.pods[pod].objects.push((port, key));
        }
    }

    pub(super) fn unname_in_pod(&mut self, pod: Index, port: Index, key: ObjectKey) {
        if pod == NONE {
            return;
        }
        self.pods[pod].objects.retain(|object| *object != (port, key));
        self.collect_pod(pod);
    }

    fn collect_pod(&mut self, index: Index) {
        let pod = &self.pods[index];
        if !pod.declared && pod.objects.is_empty() {
            if let Ok(entry) = self.pod_index.find_entry(hash_of(&*pod.name), |&other| other == index) {
                entry.remove();
            }
            self.pods.remove(index);
        }
    }
}
