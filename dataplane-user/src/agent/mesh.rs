//! The mesh part of the agent: what the source tells goes to the directory, what that wants goes to the kernel, and
//! the pods' listeners are opened and let go.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::Metadata,
    future::Future,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use dataplane_ebpf::abi::POD_MESH;
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use super::core::Shared as SharedCore;
use crate::{
    config::MeshSettings,
    identity::Store,
    kernel::{self, Error, Kernel, TunnelMaps},
    mesh::{Directory, Plaintext, Write},
    metrics::mesh::Facts,
    model::Event,
    policy::{self, Enforcement, Mode},
    registry::{
        Problem, Registry,
        change::{Change, Netns, PodId},
    },
    source,
    tunnel::{Bequest, Count, Opened, Shared, Tunnel},
};

/// How often listeners that could not be opened are tried again, and the node's addresses looked at.
const AGAIN: Duration = Duration::from_secs(3);
/// How long the source of pods waits for the policies at the start.
const POLICIES_WITHIN: Duration = Duration::from_secs(10);
/// Of the time to drain: for what begins while peers are told, and for the last bytes.
const LAST: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);
/// Where Istio's node agent has the kubelet's probes come from, if it runs here too.
const PROBES: [&str; 2] = ["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"];

/// Something of the mesh that runs as long as the agent.
pub type Part = (&'static str, Pin<Box<dyn Future<Output = std::io::Result<()>>>>);

/// All of it; none when the agent has no mesh.
#[derive(Default)]
pub struct Mesh(Option<Parts>);

struct Parts {
    directory: Directory,
    tunnel: Tunnel,
    store: Arc<Store>,
    policies: Arc<Enforcement>,
    maps: TunnelMaps,
    /// Pods whose listeners are to be opened.
    unopened: HashMap<PodId, (Arc<str>, PathBuf)>,
    open: BTreeSet<PodId>,
    /// What an agent before had open, by the network namespace's device and inode.
    inherited: HashMap<(u64, u64), Bequest>,
    /// Rung when there is one more to open.
    wanted: Rc<Notify>,
    /// The source has told everything once: what is not wanted can go.
    synced: bool,
    /// `MESH` was compared with what is wanted.
    reconciled: bool,
}

impl Mesh {
    /// Opens the sources of policies and of identities. `reread` is rung by SIGHUP; `api`: where policies may be, too;
    /// `bequests`: what the agent before had open.
    pub fn start(
        settings: &MeshSettings,
        maps: TunnelMaps,
        reread: Rc<Notify>,
        api: Option<kube::Client>,
        bequests: Vec<Bequest>,
    ) -> anyhow::Result<(Self, Vec<Part>)> {
        let policies = Arc::new(Enforcement::new(&settings.root_namespace));
        let mut parts: Vec<Part> = Vec::new();
        if let Some(path) = &settings.policies {
            let watch = source::policies::file::watch(path.clone(), policies.clone(), reread);
            parts.push(("policy files", Box::pin(watch)));
        }
        if let Some(client) = api {
            parts.push(("policies of the API", Box::pin(source::policies::kube::serve(client, policies.clone()))));
        }
        let authority = settings.identity.open(&settings.istio)?;
        let store = Store::new(authority, Default::default());
        let renewing = store.clone();
        parts.push((
            "certificates",
            Box::pin(async move {
                renewing.run().await;
                Ok(())
            }),
        ));
        let rules = policies.clone();
        let directory = Directory::new(settings.trust_domain.clone(), Box::new(move |pod| plaintext(&rules, pod)));
        let cluster = settings.istio.cluster_id.as_str().into();
        let (view, rules) = (directory.view(), policies.clone());
        let shared = Shared::new(cluster, maps.clone(), view, store.clone(), rules, settings.local_tls);
        // Before the first of the tunnel's buffers.
        kernel::keep_heap();
        let tunnel = Tunnel::start(shared, settings.workers).context("the tunnel's threads cannot be started")?;
        let mesh = Parts {
            directory,
            tunnel,
            store,
            policies,
            maps,
            unopened: HashMap::new(),
            open: BTreeSet::new(),
            inherited: bequests
                .into_iter()
                .filter_map(|one| Some((identify(one.netns.metadata().ok()?), one)))
                .collect(),
            wanted: Rc::default(),
            synced: false,
            reconciled: false,
        };
        Ok((Self(Some(mesh)), parts))
    }

    /// No mesh, and what an agent before wrote for one is taken back.
    pub fn none(maps: &TunnelMaps) -> Result<Self, Error> {
        for (addr, _) in maps.addresses()? {
            maps.delete_address(addr)?;
        }
        Ok(Self(None))
    }

    /// Before the registry takes an event in.
    pub fn hear(&mut self, event: &Event) -> Vec<Problem> {
        let Some(mesh) = &mut self.0 else { return Vec::new() };
        if let Event::Upsert { object: crate::model::Object::Pod(pod) } = event
            && pod.terminating
            && let Some(workload) = mesh.directory.get(&pod.name)
        {
            mesh.tunnel.drain(workload.pod);
        }
        mesh.directory.apply(event)
    }

    /// After it: pods here have their numbers now.
    pub fn settle(&mut self, registry: &Registry, kernel: &mut Kernel) -> Vec<Problem> {
        let Some(mesh) = &mut self.0 else { return Vec::new() };
        if mesh.directory.number(|name| registry.pod_id(name)) {
            mesh.store.want(mesh.directory.here().map(|workload| &workload.identity));
        }
        mesh.adopt(kernel);
        mesh.synced = registry.synced();
        mesh.flush()
    }

    /// The listeners of all pods here, for an agent that takes over.
    pub fn bequests(&self) -> Vec<Bequest> {
        self.0.as_ref().map_or(Vec::new(), |mesh| mesh.tunnel.bequests())
    }

    /// Another agent accepts from now on; peers are told to open no more streams to this one.
    pub fn close(&self) {
        if let Some(mesh) = &self.0 {
            mesh.tunnel.close();
            mesh.tunnel.drain_all();
        }
    }

    /// Lets go of listeners of the agent before that belong to no pod of the mesh any more.
    pub fn renounce(&mut self) {
        if let Some(mesh) = &mut self.0 {
            mesh.inherited.clear();
        }
    }

    /// What the kernel is about to be told of pods here.
    pub fn changes(&mut self, changes: &[Change], kernel: &mut Kernel) {
        let Some(mesh) = &mut self.0 else { return };
        for change in changes {
            match change {
                Change::Enroll(pod) if pod.flags & POD_MESH != 0 => {
                    if let (Netns::Path(path), false) = (&pod.netns, mesh.open.contains(&pod.pod)) {
                        mesh.unopened.insert(pod.pod, (pod.name.clone(), path.clone()));
                        mesh.wanted.notify_one();
                    }
                }
                Change::Enroll(pod) => mesh.release(pod.pod, Some(kernel)),
                Change::Release(pod) => mesh.release(*pod, None),
                _ => {}
            }
        }
    }

    /// The pod's init process was told to stop.
    pub fn drain(&self, pod: PodId) {
        if let Some(mesh) = &self.0 {
            mesh.tunnel.drain(pod);
        }
    }

    /// The pod's listeners are open.
    pub fn has_joined(&self, pod: PodId) -> bool {
        self.0.as_ref().is_some_and(|mesh| mesh.open.contains(&pod))
    }

    /// The tunnel's counters by name; none without a mesh.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let counts = |mesh: &Parts| {
            let counts = &mesh.tunnel.shared().counts;
            Count::ALL.iter().map(|count| (count.name().to_owned(), counts.get(*count))).collect()
        };
        self.0.as_ref().map_or_else(BTreeMap::new, counts)
    }

    /// For metrics and the admin API; none without a mesh.
    pub fn facts(&self) -> Option<Facts> {
        let facts = |mesh: &Parts| Facts {
            shared: mesh.tunnel.shared().clone(),
            joined: mesh.open.len(),
            waiting: mesh.unopened.len(),
        };
        self.0.as_ref().map(facts)
    }

    fn opened(&mut self, opened: Opened, kernel: &mut Kernel) -> Result<(), Error> {
        let Some(mesh) = &mut self.0 else { return Ok(()) };
        let pod = opened.pod();
        let Some((name, _)) = mesh.unopened.remove(&pod) else { return Ok(()) };
        mesh.admit(&name, opened, kernel)?;
        mesh.flush();
        Ok(())
    }

    fn policies_changed(&mut self) {
        if let Some(mesh) = &mut self.0 {
            mesh.directory.policies_changed();
            mesh.flush();
        }
    }
}

impl Parts {
    fn admit(&mut self, name: &str, opened: Opened, kernel: &mut Kernel) -> Result<(), Error> {
        let (pod, port) = (opened.pod(), opened.port());
        let addresses = self.directory.get(name).map_or(Vec::new(), |workload| workload.addresses.clone());
        self.tunnel.admit(opened, &addresses)?;
        kernel.set_outbound(pod, port)?;
        self.open.insert(pod);
        self.directory.set_listening(name, pod, true);
        info!(pod = %name, port, "pod joined the mesh");
        Ok(())
    }

    /// Pods whose listeners an agent before handed over join at once: nothing is to come between.
    fn adopt(&mut self, kernel: &mut Kernel) {
        if self.inherited.is_empty() {
            return;
        }
        let unopened: Vec<_> = self.unopened.iter().map(|(pod, at)| (*pod, at.clone())).collect();
        for (pod, (name, netns)) in unopened {
            let found = std::fs::metadata(&netns).ok().and_then(|netns| self.inherited.remove(&identify(netns)));
            let Some(bequest) = found else { continue };
            let adopted = self.tunnel.adopt(pod, name.clone(), bequest).map_err(|error| error.to_string());
            let admitted =
                adopted.and_then(|opened| self.admit(&name, opened, kernel).map_err(|error| error.to_string()));
            match admitted {
                Ok(()) => drop(self.unopened.remove(&pod)),
                // Opened anew, then.
                Err(error) => warn!(pod = %name, error, "the listeners of the agent before cannot be used"),
            }
        }
    }

    fn release(&mut self, pod: PodId, kernel: Option<&mut Kernel>) {
        self.unopened.remove(&pod);
        if !self.open.remove(&pod) {
            return;
        }
        if let Some(kernel) = kernel
            && let Err(error) = kernel.set_outbound(pod, 0)
        {
            warn!(pod, %error, "its connections are led to the tunnel still");
        }
        self.tunnel.release(pod);
        self.directory.forget_listening(pod);
        let here: BTreeSet<_> = self.directory.here().map(|workload| workload.identity.clone()).collect();
        self.store.retain(|identity| here.contains(identity));
    }

    /// Writes what the directory wants.
    fn flush(&mut self) -> Vec<Problem> {
        let mut writes = newest(self.directory.take_writes());
        if self.synced && !std::mem::replace(&mut self.reconciled, true) {
            let wanted = self.directory.wanted();
            match self.maps.addresses() {
                Ok(there) => {
                    let stale = there.into_iter().filter(|(addr, _)| !wanted.contains_key(addr));
                    writes.extend(stale.map(|(addr, _)| Write { addr, value: None }));
                }
                Err(error) => warn!(%error, "what an agent before wrote of the mesh stays"),
            }
        }
        let mut problems = Vec::new();
        for Write { addr, value } in writes {
            let written = match value {
                Some(value) => self.maps.put_address(addr, value),
                None => self.maps.delete_address(addr).map(drop),
            };
            if let Err(error) = written {
                problems.push(Problem::new(format!("address {addr}"), error.to_string()));
            }
        }
        problems
    }
}

/// A network namespace, as long as it lives.
fn identify(netns: Metadata) -> (u64, u64) {
    (netns.dev(), netns.ino())
}

/// The last word on each address: nobody is to see what was meant only for a moment.
fn newest(writes: Vec<Write>) -> Vec<Write> {
    let last: HashMap<IpAddr, usize> = writes.iter().enumerate().map(|(at, write)| (write.addr, at)).collect();
    writes.into_iter().enumerate().filter(|(at, write)| last[&write.addr] == *at).map(|(_, write)| write).collect()
}

/// What may enter a pod here beside HBONE.
fn plaintext(policies: &Enforcement, pod: &policy::Workload) -> Plaintext {
    if !policies.known() {
        return Plaintext::Refused;
    }
    let selected = policies.of(pod);
    if selected.is_open() {
        Plaintext::Open
    } else if selected.only_mode() == Some(Mode::Strict) {
        Plaintext::Refused
    } else {
        Plaintext::Asked
    }
}

/// Until the policies are known, or it takes too long: then pods here are closed to all until they are.
pub async fn policies_known(core: &SharedCore) {
    let policies = core.borrow().mesh.0.as_ref().map(|mesh| mesh.policies.clone());
    let Some(policies) = policies else { return };
    if tokio::time::timeout(POLICIES_WITHIN, policies.settled()).await.is_err() {
        warn!("the policies are not known yet: nothing enters the pods of the mesh here until they are");
    }
    core.borrow_mut().mesh.policies_changed();
}

/// Until every pod here has its listeners, and a certificate to answer with.
pub async fn joined(core: &SharedCore) {
    let waiting = |mesh: &Parts| !mesh.unopened.is_empty() || mesh.store.numbers().waiting > 0;
    until(|| !core.borrow().mesh.0.as_ref().is_some_and(waiting)).await;
}

async fn until(reached: impl Fn() -> bool) {
    while !reached() {
        tokio::time::sleep(POLL).await;
    }
}

/// Opens listeners as they are wanted, follows the policies and the node's addresses.
pub async fn tend(core: SharedCore) -> std::io::Result<()> {
    let parts = core.borrow().mesh.0.as_ref().map(|mesh| (mesh.wanted.clone(), mesh.policies.subscribe()));
    let Some((wanted, mut policies)) = parts else { return Ok(()) };
    let mut again = tokio::time::interval(AGAIN);
    let mut failing: HashMap<PodId, String> = HashMap::new();
    loop {
        tokio::select! {
            () = wanted.notified() => {}
            _ = again.tick() => learn_node(&core),
            changed = policies.changed() => {
                if changed.is_ok() {
                    core.borrow_mut().mesh.policies_changed();
                }
                continue;
            }
        }
        let unopened: Vec<_> = core.borrow().mesh.0.iter().flat_map(|mesh| mesh.unopened.clone()).collect();
        failing.retain(|pod, _| unopened.iter().any(|(unopened, _)| unopened == pod));
        for (pod, (name, netns)) in unopened {
            let Some(opening) = core.borrow().mesh.0.as_ref().map(|mesh| mesh.tunnel.open(pod, name.clone(), netns))
            else {
                continue;
            };
            let opened = opening.await;
            let core = &mut *core.borrow_mut();
            let joined = match opened {
                Ok(opened) => core.mesh.opened(opened, &mut core.kernel).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match joined {
                Ok(()) => drop(failing.remove(&pod)),
                Err(error) => {
                    if failing.insert(pod, error.clone()).as_ref() != Some(&error) {
                        warn!(pod = %name, error, "pod is not in the mesh; trying again every few seconds");
                    }
                }
            }
        }
    }
}

/// The agent is about to stop: new connections go without the tunnel, those that are carried get their time.
pub async fn drain(core: &SharedCore, within: Duration) {
    let shared = {
        let core = &mut *core.borrow_mut();
        let Some(mesh) = &mut core.mesh.0 else { return };
        for pod in &mesh.open {
            if let Err(error) = core.kernel.set_outbound(*pod, 0) {
                warn!(pod, %error, "its connections are led to the tunnel still");
            }
        }
        mesh.tunnel.drain_all();
        mesh.tunnel.shared().clone()
    };
    // Peers that have no other backend begin new ones all the while. They have what is left when the listeners close:
    // ended amid them the agent would cut some.
    let last = LAST.min(within / 2);
    let began = tokio::time::Instant::now();
    let _ = tokio::time::timeout(within - last, until(|| shared.before_stop() == 0)).await;
    if let Some(mesh) = &core.borrow().mesh.0 {
        mesh.tunnel.close();
    }
    wait_for(&shared, within.saturating_sub(began.elapsed())).await;
}

/// Lets what an agent carries end that accepts no more.
pub async fn wait_for_carried(mesh: &Mesh, within: Duration) {
    if let Some(mesh) = &mesh.0 {
        wait_for(mesh.tunnel.shared(), within).await;
    }
}

async fn wait_for(shared: &Shared, within: Duration) {
    let carried = shared.active();
    if carried > 0 {
        info!(connections = carried, within = ?within, "waiting for the connections that are carried");
    }
    if tokio::time::timeout(within, until(|| shared.active() == 0)).await.is_err() {
        warn!(cut = shared.active(), of = carried, "connections are cut: they took longer than --tunnel-drain");
    }
    // The peers were told; a connection that has nothing more to carry ends when its last bytes are out.
    if tokio::time::timeout(LAST, until(|| shared.open() == 0)).await.is_err() {
        debug!(connections = shared.open(), "peers that were told to end have not");
    }
}

/// The kubelet's probes come from this node's addresses.
fn learn_node(core: &SharedCore) {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return };
    let own = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|at| IpAddr::V4(at.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|at| IpAddr::V6(at.ip())))
    });
    let own = own.filter(|addr| !addr.is_loopback()).chain(PROBES.iter().filter_map(|addr| addr.parse().ok()));
    if let Some(mesh) = &mut core.borrow_mut().mesh.0 {
        mesh.directory.set_node(own.collect());
        mesh.flush();
    }
}
