//! Workloads by address, for the tunnel's threads: one writer, readers that hold a lock for one look.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
};

use super::Workload;

#[derive(Debug, Default)]
pub struct View {
    by_address: RwLock<HashMap<IpAddr, Arc<Workload>>>,
}

impl View {
    pub fn at(&self, addr: &IpAddr) -> Option<Arc<Workload>> {
        self.by_address.read().unwrap_or_else(PoisonError::into_inner).get(&addr.to_canonical()).cloned()
    }

    pub(super) fn put(&self, addr: IpAddr, workload: Arc<Workload>) {
        self.by_address.write().unwrap_or_else(PoisonError::into_inner).insert(addr, workload);
    }

    pub(super) fn remove(&self, addr: &IpAddr) {
        self.by_address.write().unwrap_or_else(PoisonError::into_inner).remove(addr);
    }
}
