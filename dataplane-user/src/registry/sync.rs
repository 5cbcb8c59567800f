//! A relist: the whole desired state at once. What it does not name is deleted.

use dataplane_ebpf::health::Input;

use super::{
    Registry, address,
    problem::{backend_name, check_backend, check_pod, check_service, pod_name, service_name},
};
use crate::model::Snapshot;

impl Registry {
    pub(super) fn sync(&mut self, state: Snapshot) {
        // Two marks: first what is named at all, then what was taken over.
        let named = self.epoch + 1;
        self.epoch += 2;
        if !self.service_index.is_empty() || !self.pod_index.is_empty() {
            self.mark(&state, named);
            self.turn_away_from_unnamed(named);
        }

        for service in state.services {
            let old = self.service_index.get(&service.name).copied();
            if old.is_some_and(|old| self.services[old].declared && self.services[old].seen == self.epoch) {
                self.problem(service_name(&service.name), "declared twice: the first is in force");
                continue;
            }
            match check_service(&service) {
                Ok(()) => {
                    let index = self.service_named(&service.name);
                    self.declare_service(index, service);
                }
                Err(reason) => {
                    // The last good declaration stays.
                    if let Some(old) = old {
                        self.services[old].seen = self.epoch;
                    }
                    self.problem(service_name(&service.name), reason);
                }
            }
            self.written();
        }
        for pod in state.pods {
            let old = self.pod_at(&pod.name);
            if old.is_some_and(|old| self.pods[old].declared && self.pods[old].seen == self.epoch) {
                self.problem(pod_name(&pod.name), "declared twice: the first is in force");
                continue;
            }
            match check_pod(&pod) {
                Ok(()) => self.declare_pod(pod),
                Err(reason) => {
                    if let Some(old) = old {
                        self.pods[old].seen = self.epoch;
                    }
                    self.problem(pod_name(&pod.name), reason);
                }
            }
            self.written();
        }
        for backend in state.backends {
            let name = || backend_name(&backend.service, &backend.port, backend.address, backend.target_port);
            let key = (address::addr(backend.address), backend.target_port);
            let old = self
                .port_index(&backend.service, &backend.port)
                .and_then(|port| self.ports[port].objects.get_mut(&key));
            if old.as_ref().is_some_and(|old| old.seen == self.epoch) {
                let name = name();
                self.problem(name, "declared twice: the first is in force");
                continue;
            }
            match check_backend(&backend) {
                Ok(()) => self.upsert_backend(backend),
                Err(reason) => {
                    if let Some(old) = old {
                        old.seen = self.epoch;
                    }
                    let name = name();
                    self.problem(name, reason);
                }
            }
            self.written();
        }
        for node in state.nodes {
            self.declare_node(node);
        }
        self.delete_unseen();
        self.synced = true;
        self.report_all_contested();
        self.report_unresolved();
    }

    /// Before the first sync is through nothing is written: no need to keep it.
    fn written(&mut self) {
        if self.boot.is_some() {
            self.out.clear();
        }
    }

    fn mark(&mut self, state: &Snapshot, named: u32) {
        for service in &state.services {
            if let Some(&index) = self.service_index.get(&service.name) {
                self.services[index].seen = named;
            }
        }
        for backend in &state.backends {
            let key = (address::addr(backend.address), backend.target_port);
            if let Some(port) = self.port_index(&backend.service, &backend.port)
                && let Some(object) = self.ports[port].objects.get_mut(&key)
            {
                object.seen = named;
            }
        }
        for pod in &state.pods {
            if let Some(index) = self.pod_at(&pod.name) {
                self.pods[index].seen = named;
            }
        }
    }

    /// The deletions are what cannot wait: their backends are avoided from the first write on.
    /// They still are in their services, so that none is empty before its new backends came.
    fn turn_away_from_unnamed(&mut self, named: u32) {
        if self.boot.is_some() {
            return;
        }
        let leaving: Vec<_> = self.backends.iter().map(|(number, _)| number).collect();
        for number in leaving {
            let leaves = self
                .objects_of(number)
                .all(|(port, _, object)| object.seen != named || self.services[self.ports[port].service].seen != named);
            if leaves {
                self.tell(number, Input::Terminating { serving: false });
                self.backends.set_terminating(number, Some(false));
            }
        }
    }

    fn delete_unseen(&mut self) {
        for port in self.ports.indexes() {
            let unseen: Vec<_> = self.ports[port]
                .objects
                .iter()
                .filter(|(_, object)| object.seen != self.epoch)
                .map(|(key, _)| *key)
                .collect();
            for key in unseen {
                self.delete_object(port, key);
            }
        }
        for index in self.pods.indexes() {
            if self.pods[index].declared && self.pods[index].seen != self.epoch {
                self.undeclare_pod(index);
            }
        }
        for index in self.services.indexes() {
            if self.services[index].declared && self.services[index].seen != self.epoch {
                self.undeclare_service(index);
            }
        }
        self.nodes.retain(|_, (_, seen)| *seen == self.epoch);
    }

    fn report_unresolved(&mut self) {
        let mut found = Vec::new();
        for (index, port) in self.ports.iter() {
            for (key, object) in &port.objects {
                if object.backend == 0
                    && let Some(reason) = self.unresolved(index, key)
                {
                    found.push((self.object_name(index, key), reason));
                }
            }
        }
        found.sort_unstable();
        for (name, reason) in found {
            self.problem(name, reason);
        }
    }
}
