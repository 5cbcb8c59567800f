//! The mesh as this node sees it: whose address is whose, with what identity, and what may enter the pods here.
//!
//! A pure state machine beside the registry, fed with the same events: no I/O, no clock. What it wants written goes
//! to `MESH`; what the tunnel's threads ask for is in [`View`].

mod view;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use dataplane_ebpf::abi::{MESH_CAPTURE, MESH_HBONE, MESH_NODE, MESH_STRICT, MeshAddress};

pub use view::View;

use crate::{
    identity::SpiffeId,
    model::{Event, Key, Object, Pod, Service},
    policy,
    registry::{Problem, change::PodId, problem::pod_name},
};

/// The service account of a pod that names none (Kubernetes' own default).
const DEFAULT_ACCOUNT: &str = "default";

/// A pod in the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// namespace/name
    pub name: Arc<str>,
    pub identity: SpiffeId,
    pub addresses: Vec<IpAddr>,
    /// Of this node's pods; 0 elsewhere.
    pub pod: PodId,
    /// Of this node's pods: what policies select them by.
    pub selected_by: Option<Box<policy::Workload>>,
}

impl Workload {
    pub fn namespace(&self) -> &str {
        self.identity.namespace()
    }
}

/// What may enter a pod beside HBONE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Plaintext {
    /// Anything, as without a mesh.
    #[default]
    Open,
    /// What the policies allow.
    Asked,
    /// Nothing.
    Refused,
}

/// One write to `MESH`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    pub addr: IpAddr,
    /// `None`: delete it.
    pub value: Option<MeshAddress>,
}

/// What the policies say of a pod here.
pub type Rules = Box<dyn Fn(&policy::Workload) -> Plaintext>;

/// Everything that is known of the mesh.
pub struct Directory {
    trust_domain: Arc<str>,
    workloads: HashMap<Arc<str>, Arc<Workload>>,
    view: Arc<View>,
    /// Addresses of this node itself.
    node: BTreeSet<IpAddr>,
    /// Pods here whose listeners are open.
    listening: BTreeSet<PodId>,
    rules: Rules,
    /// What may enter pods here, where that is not [`Plaintext::Open`].
    plaintext: HashMap<Arc<str>, Plaintext>,
    /// The one copy of each identity: a thousand pods of a service account have one.
    identities: HashSet<SpiffeId>,
    /// Pods of this node.
    here: BTreeSet<Arc<str>>,
    /// Pods here that were told and have no number yet.
    unnumbered: Vec<Workload>,
    out: Vec<Write>,
}

impl Directory {
    pub fn new(trust_domain: Arc<str>, rules: Rules) -> Self {
        Self {
            trust_domain,
            rules,
            workloads: HashMap::new(),
            view: Arc::default(),
            node: BTreeSet::new(),
            listening: BTreeSet::new(),
            plaintext: HashMap::new(),
            identities: HashSet::new(),
            here: BTreeSet::new(),
            unnumbered: Vec::new(),
            out: Vec::new(),
        }
    }

    /// For the tunnel's threads.
    pub fn view(&self) -> Arc<View> {
        self.view.clone()
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Those of this node.
    pub fn here(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.here.iter().filter_map(|name| self.workloads.get(name))
    }

    pub fn get(&self, name: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(name)
    }

    /// Takes in what a source told; [`Directory::number`] follows.
    pub fn apply(&mut self, event: &Event) -> Vec<Problem> {
        let mut problems = Vec::new();
        match event {
            Event::Upsert { object: Object::Pod(pod) } => problems.extend(self.declare(pod).err()),
            Event::Delete { object: Key::Pod { name } } => self.remove(name),
            Event::Upsert { object: Object::Service(service) } => {
                self.view.forget_services(|name| *name == *service.name);
                self.declare_service(service);
            }
            Event::Delete { object: Key::Service { name } } => self.view.forget_services(|known| *known == **name),
            Event::Sync { state } => {
                let told: BTreeSet<_> = state.pods.iter().map(|pod| &*pod.name).collect();
                let gone = self.workloads.keys().filter(|name| !told.contains(&***name));
                for name in gone.cloned().collect::<Vec<_>>() {
                    self.remove(&name);
                }
                self.view.forget_services(|_| true);
                state.services.iter().for_each(|service| self.declare_service(service));
                problems.extend(state.pods.iter().filter_map(|pod| self.declare(pod).err()));
            }
            _ => {}
        }
        problems
    }

    /// Once the registry has taken the same event in: the numbers of the pods here. Whether there were any.
    pub fn number(&mut self, number: impl Fn(&str) -> Option<PodId>) -> bool {
        let unnumbered = std::mem::take(&mut self.unnumbered);
        let any = !unnumbered.is_empty();
        for workload in unnumbered {
            let pod = number(&workload.name).unwrap_or(0);
            self.put(Workload { pod, ..workload });
        }
        any
    }

    /// What is to be written, in order.
    pub fn take_writes(&mut self) -> Vec<Write> {
        std::mem::take(&mut self.out)
    }

    /// Every address that should be in `MESH`, to be compared with what is there.
    pub fn wanted(&self) -> BTreeMap<IpAddr, MeshAddress> {
        let mut wanted: BTreeMap<_, _> = self
            .workloads
            .values()
            .flat_map(|workload| workload.addresses.iter().map(move |addr| (*addr, workload)))
            .filter(|(addr, workload)| self.holds(workload, addr))
            .map(|(addr, workload)| (addr, self.value(workload)))
            .collect();
        wanted.extend(self.node.iter().map(|addr| (*addr, NODE)));
        wanted
    }

    /// The addresses that this node has now.
    pub fn set_node(&mut self, addresses: BTreeSet<IpAddr>) {
        let before = std::mem::replace(&mut self.node, addresses);
        for addr in before.difference(&self.node) {
            self.out.push(Write { addr: *addr, value: None });
        }
        for addr in self.node.difference(&before) {
            self.out.push(Write { addr: *addr, value: Some(NODE) });
        }
    }

    /// The agent's listeners in a pod are open, or no more.
    pub fn set_listening(&mut self, name: &str, pod: PodId, listening: bool) {
        let changed = if listening { self.listening.insert(pod) } else { self.listening.remove(&pod) };
        if let (true, Some(workload)) = (changed, self.workloads.get(name).cloned())
            && workload.pod == pod
        {
            self.write(&workload);
        }
    }

    /// The pod is no more, or not the agent's business.
    pub fn forget_listening(&mut self, pod: PodId) {
        let workload = self.view.pod(pod);
        match workload {
            Some(workload) => self.set_listening(&workload.name, pod, false),
            None => drop(self.listening.remove(&pod)),
        }
    }

    /// The policies are others: what may enter the pods here?
    pub fn policies_changed(&mut self) {
        for workload in self.here().cloned().collect::<Vec<_>>() {
            if self.ask(&workload) {
                self.write(&workload);
            }
        }
    }

    /// Asks the policies about a pod here; whether they say something else than before.
    fn ask(&mut self, workload: &Workload) -> bool {
        let now = workload.selected_by.as_ref().map_or(Plaintext::Open, |selected_by| (self.rules)(selected_by));
        let before = match now {
            Plaintext::Open => self.plaintext.remove(&workload.name),
            now => self.plaintext.insert(workload.name.clone(), now),
        };
        before.unwrap_or_default() != now
    }

    fn declare_service(&self, service: &Service) {
        for addr in &service.addresses {
            self.view.put_service(*addr, service.name.clone());
        }
    }

    fn declare(&mut self, pod: &Pod) -> Result<(), Problem> {
        if !pod.enrolled || pod.addresses.is_empty() {
            self.remove(&pod.name);
            return Ok(());
        }
        let (namespace, _) = pod.name.split_once('/').unwrap_or(("default", &pod.name));
        let account = pod.service_account.as_deref().unwrap_or(DEFAULT_ACCOUNT);
        let identity = SpiffeId::new(&self.trust_domain, namespace, account).map_err(|bad| {
            self.remove(&pod.name);
            Problem::new(pod_name(&pod.name), format!("{bad}; it is not in the mesh"))
        })?;
        let here = pod.netns.is_some() || pod.pid.is_some();
        let selected_by = here.then(|| {
            Box::new(policy::Workload {
                name: pod.name.clone(),
                namespace: namespace.into(),
                labels: pod.labels.clone(),
                policies: Vec::new(),
            })
        });
        let workload = Workload {
            name: pod.name.clone(),
            identity: self.shared(identity),
            addresses: pod.addresses.iter().map(IpAddr::to_canonical).collect(),
            pod: 0,
            selected_by,
        };
        if here {
            self.unnumbered.push(workload);
        } else {
            self.put(workload);
        }
        Ok(())
    }

    fn put(&mut self, workload: Workload) {
        let workload = Arc::new(workload);
        let before = self.workloads.insert(workload.name.clone(), workload.clone());
        if before.as_ref() == Some(&workload) {
            return;
        }
        if let Some(before) = &before {
            self.view.forget_pod(before.pod);
        }
        for addr in before.iter().flat_map(|before| &before.addresses) {
            if !workload.addresses.contains(addr) {
                self.release(*addr, &workload.name);
            }
        }
        for addr in &workload.addresses {
            // A pod that goes on talking after its address was given to another one does not get it back.
            let had = before.as_ref().is_some_and(|before| before.addresses.contains(addr));
            let taken = self.view.at(addr).is_some_and(|holder| holder.name != workload.name);
            if !(had && taken) {
                self.view.put(*addr, workload.clone());
            }
        }
        if workload.pod == 0 {
            self.here.remove(&workload.name);
        } else {
            self.here.insert(workload.name.clone());
        }
        self.view.put_pod(&workload);
        self.ask(&workload);
        self.write(&workload);
    }

    fn remove(&mut self, name: &str) {
        let Some(workload) = self.workloads.remove(name) else { return };
        self.plaintext.remove(name);
        self.here.remove(name);
        self.view.forget_pod(workload.pod);
        for addr in &workload.addresses {
            self.release(*addr, name);
        }
    }

    /// The address is that workload's no more.
    fn release(&mut self, addr: IpAddr, name: &str) {
        if self.view.at(&addr).is_some_and(|holder| &*holder.name == name) {
            self.view.remove(&addr);
            self.out.push(Write { addr, value: self.node.contains(&addr).then_some(NODE) });
        }
    }

    fn write(&mut self, workload: &Workload) {
        let value = Some(self.value(workload));
        for addr in &workload.addresses {
            if self.holds(workload, addr) {
                self.out.push(Write { addr: *addr, value });
            }
        }
    }

    fn holds(&self, workload: &Workload, addr: &IpAddr) -> bool {
        self.view.at(addr).is_some_and(|holder| holder.name == workload.name)
    }

    fn value(&self, workload: &Workload) -> MeshAddress {
        let mut flags = match self.plaintext.get(&workload.name).copied().unwrap_or_default() {
            Plaintext::Open => 0,
            Plaintext::Asked => MESH_CAPTURE,
            Plaintext::Refused => MESH_STRICT,
        };
        // Elsewhere the agent of that node listens.
        if workload.pod == 0 || self.listening.contains(&workload.pod) {
            flags |= MESH_HBONE;
        }
        MeshAddress { flags, pod: workload.pod }
    }

    fn shared(&mut self, identity: SpiffeId) -> SpiffeId {
        if let Some(known) = self.identities.get(&identity) {
            return known.clone();
        }
        self.identities.insert(identity.clone());
        identity
    }
}

const NODE: MeshAddress = MeshAddress { flags: MESH_NODE, pod: 0 };
