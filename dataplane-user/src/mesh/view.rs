//! Workloads by address, for the tunnel's threads: one writer, readers that hold a lock for one look.

use std::{
    collections::HashMap,
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
}

impl View {
    pub fn at(&self, addr: &IpAddr) -> Option<Arc<Workload>> {
        self.by_address.read().unwrap_or_else(PoisonError::into_inner).get(&addr.to_canonical()).cloned()
    }

    pub fn pod(&self, pod: PodId) -> Option<Arc<Workload>> {
        self.by_pod.read().unwrap_or_else(PoisonError::into_inner).get(&pod).cloned()
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
