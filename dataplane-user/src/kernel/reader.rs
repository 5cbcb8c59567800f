//! The maps, for whoever only looks: counters, occupancy and flows, read beside the agent's thread.

use std::sync::Arc;

use dataplane_ebpf::{
    abi::{FlowKey, ROLE_FORWARD, Rebind, Stat},
    health::Health,
};

use super::{Occupancy, error::Error, maps::Maps, snapshot};

/// Reads the maps of a running agent from any thread; a copy is a reference.
#[derive(Clone, Debug)]
pub struct Reader(Arc<Maps>);

impl Reader {
    pub(super) fn new(maps: Arc<Maps>) -> Self {
        Self(maps)
    }

    /// Since the maps were made, over all CPUs.
    pub fn stats(&self) -> Vec<(Stat, u64)> {
        self.0.stats()
    }

    /// How full each map is. It walks them: not for hot paths.
    pub fn occupancy(&self) -> Result<Vec<Occupancy>, Error> {
        snapshot::occupancy(&self.0)
    }

    /// The connections that live on another backend than they began with: what their socket says, and where they are.
    pub fn flows(&self) -> Result<Vec<(FlowKey, Rebind)>, Error> {
        let mut flows = self.0.rebinds.entries::<FlowKey, Rebind>()?;
        flows.retain(|(_, flow)| flow.role == ROLE_FORWARD);
        Ok(flows)
    }

    /// Every backend's health word; unused numbers are Gone.
    pub fn healths(&self) -> impl Iterator<Item = Health> {
        self.0.health.iter().skip(1).map(|(_, word)| Health(word))
    }
}
