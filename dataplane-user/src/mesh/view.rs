//! Workloads by address, for the tunnel's threads: one writer, readers that hold a lock for one look.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
};

use super::Workload;
use crate::registry::change::PodId;

#[derive(Debug, Default)]
pub struct View {
    by_address: RwLock<HashMap<IpAddr, Arc<Workload>>>,
    /// Those of this node.
    by_pod: RwLock<HashMap<PodId, Arc<Workload>>>,
    /// Names of services, for logs and metrics.
    services: RwLock<HashMap<IpAddr, Arc<str>>>,
}

impl View {
    pub fn at(&self, addr: &IpAddr) -> Option<Arc<Workload>> {
        self.by_address.read().unwrap_or_else(PoisonError::into_inner).get(&addr.to_canonical()).cloned()
    }

    pub fn pod(&self, pod: PodId) -> Option<Arc<Workload>> {
        self.by_pod.read().unwrap_or_else(PoisonError::into_inner).get(&pod).cloned()
    }

    /// A pod of this node by its name (namespace/name), or of another node.
    pub fn named(&self, name: &str) -> Option<Arc<Workload>> {
        let is = |one: &&Arc<Workload>| &*one.name == name;
        let here = self.by_pod.read().unwrap_or_else(PoisonError::into_inner).values().find(is).cloned();
        here.or_else(|| self.by_address.read().unwrap_or_else(PoisonError::into_inner).values().find(is).cloned())
    }

    /// Everybody, once, by name.
    pub fn all(&self) -> BTreeMap<Arc<str>, Arc<Workload>> {
        let by_address = self.by_address.read().unwrap_or_else(PoisonError::into_inner);
        let by_pod = self.by_pod.read().unwrap_or_else(PoisonError::into_inner);
        by_address.values().chain(by_pod.values()).map(|one| (one.name.clone(), one.clone())).collect()
    }

    /// The service of an address, as namespace/name.
    pub fn service(&self, addr: &IpAddr) -> Option<Arc<str>> {
        self.services.read().unwrap_or_else(PoisonError::into_inner).get(&addr.to_canonical()).cloned()
    }

    pub(super) fn put_service(&self, addr: IpAddr, name: Arc<str>) {
        self.services.write().unwrap_or_else(PoisonError::into_inner).insert(addr.to_canonical(), name);
    }

    /// These services are no more, or have other addresses now.
    pub(super) fn forget_services(&self, is_gone: impl Fn(&str) -> bool) {
        self.services.write().unwrap_or_else(PoisonError::into_inner).retain(|_, name| !is_gone(name));
    }

    pub(super) fn put_pod(&self, workload: &Arc<Workload>) {
        if workload.pod != 0 {
            let mut pods = self.by_pod.write().unwrap_or_else(PoisonError::into_inner);
            pods.insert(workload.pod, workload.clone());
        }
    }

    pub(super) fn forget_pod(&self, pod: PodId) {
        if pod != 0 {
            self.by_pod.write().unwrap_or_else(PoisonError::into_inner).remove(&pod);
        }
    }

    pub(super) fn put(&self, addr: IpAddr, workload: Arc<Workload>) {
        self.by_address.write().unwrap_or_else(PoisonError::into_inner).insert(addr, workload);
    }

    pub(super) fn remove(&self, addr: &IpAddr) {
        self.by_address.write().unwrap_or_else(PoisonError::into_inner).remove(addr);
    }
}
