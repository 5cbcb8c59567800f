//! The Kubernetes API: pods, services, EndpointSlices, namespaces and this node, watched.
//!
//! Pods of this node are a watch of their own beside that of all others: a short one, whose words do not queue behind
//! the cluster's. Everything runs on the agent's thread, from the socket to the map.

pub mod cri;
mod ending;
pub mod find;
pub mod names;
pub mod object;
pub mod reach;
pub mod watch;
pub mod world;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{sync::Notify, task::JoinSet};
use tracing::{debug, info, warn};

use self::{
    find::Process,
    names::Names,
    object::{EndpointSlice, Namespace, Node, Object, OtherPod, Pod, Service},
    watch::{Failure, Word, follow},
    world::{Name, Scope, World},
};
use crate::{agent::core::Shared, kernel::monotonic_ns, model::Event};

/// How often a pod is looked for that was just told of: its network is to be served before its containers run.
const FIND_SOON: Duration = Duration::from_millis(10);
/// For how long.
const SOON: Duration = Duration::from_secs(5);
/// How soon one that was not found by then is looked for again, doubling between these.
const FIND_AGAIN: [Duration; 2] = [Duration::from_millis(25), Duration::from_secs(2)];
/// How soon a container runtime that did not answer is asked again, doubling between these.
const ASK_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// How often it is seen to that the processes by which pods were found still live.
const LOOK: Duration = Duration::from_secs(1);

/// What the source needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// None: as a pod of the cluster, else `KUBECONFIG`, else `~/.kube/config`.
    pub kubeconfig: Option<PathBuf>,
    /// This node's name in the API.
    pub node: String,
    /// Where the node's container runtime is asked.
    pub cri: cri::Socket,
    /// Who the pods of other nodes are counts too.
    pub mesh: bool,
}

/// Reads the credentials; nothing is asked yet.
pub async fn client(settings: &Settings) -> anyhow::Result<Client> {
    let config = configuration(settings).await?;
    let url = config.cluster_url.clone();
    let client = Client::try_from(config).with_context(|| format!("no client for the API server {url}"))?;
    info!(%url, node = settings.node, "following the Kubernetes API");
    Ok(client)
}

async fn configuration(settings: &Settings) -> anyhow::Result<Config> {
    match &settings.kubeconfig {
        Some(path) => from_file(path).await,
        None => Config::infer().await.context(
            "no way to the Kubernetes API: neither a pod's service account nor a kubeconfig was found; give --kubeconfig",
        ),
    }
}

async fn from_file(path: &Path) -> anyhow::Result<Config> {
    let read = Kubeconfig::read_from(path).with_context(|| format!("kubeconfig {}: cannot be read", path.display()))?;
    Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("kubeconfig {}: has no usable context", path.display()))
}

/// Follows the API for as long as the agent runs.
pub async fn serve(client: Client, settings: Settings, core: Shared) -> io::Result<()> {
    let here = format!("spec.nodeName={}", settings.node);
    let others = format!("spec.nodeName!={}", settings.node);
    let this_node = format!("metadata.name={}", settings.node);
    let source = Rc::new(Source {
        world: RefCell::new(World::new(&settings.node).with_mesh(settings.mesh)),
        core,
        failures: RefCell::default(),
        listed: RefCell::default(),
        live: Cell::new(false),
        pods_changed: Notify::new(),
        images_changed: Notify::new(),
        settings,
    });

    let mut tasks = JoinSet::new();
    let heard = source.clone();
    tasks.spawn_local(follow::<Pod>(client.clone(), here, move |word, at| {
        let gone = |world: &mut World, name: &str| world.pod_gone(name, Scope::ThisNode);
        let retain = |world: &mut World, named: &Names| world.retain_pods(named, Scope::ThisNode);
        heard.hear("pods of this node", word, at, World::pod, gone, retain);
        heard.look_again();
    }));
    let heard = source.clone();
    tasks.spawn_local(follow::<OtherPod>(client.clone(), others, move |word, at| {
        let gone = |world: &mut World, name: &str| world.pod_gone(name, Scope::Others);
        let retain = |world: &mut World, named: &Names| world.retain_pods(named, Scope::Others);
        heard.hear("pods", word, at, World::other_pod, gone, retain);
    }));
    let heard = source.clone();
    tasks.spawn_local(follow::<EndpointSlice>(client.clone(), String::new(), move |word, at| {
        heard.hear("endpointslices", word, at, World::slice, World::slice_gone, World::retain_slices);
    }));
    let heard = source.clone();
    tasks.spawn_local(follow::<Service>(client.clone(), String::new(), move |word, at| {
        heard.hear("services", word, at, World::service, World::service_gone, World::retain_services);
    }));
    let heard = source.clone();
    tasks.spawn_local(follow::<Namespace>(client.clone(), String::new(), move |word, at| {
        heard.hear("namespaces", word, at, World::namespace, World::namespace_gone, World::retain_namespaces);
        heard.look_again();
    }));
    let heard = source.clone();
    tasks.spawn_local(follow::<Node>(client, this_node, move |word, at| {
        heard.hear("nodes", word, at, World::own, |_, _| {}, |_, _| {});
    }));
    let finder = source.clone();
    tasks.spawn_local(async move { finder.find_pods().await });
    if source.settings.cri != cri::Socket::Off {
        tasks.spawn_local(async move { source.ask_runtime().await });
    }
    tasks.join_all().await;
    Ok(())
}

/// The collections; all of them have to be listed before anything is told, but those that only add to it.
const COLLECTIONS: [(&str, bool); 6] = [
    ("pods of this node", true),
    ("pods", true),
    ("services", true),
    ("endpointslices", true),
    ("namespaces", false),
    ("nodes", false),
];

struct Source {
    world: RefCell<World>,
    core: Shared,
    /// By collection: why it is not followed right now.
    failures: RefCell<BTreeMap<&'static str, Failure>>,
    /// Collections that were listed once.
    listed: RefCell<BTreeSet<&'static str>>,
    /// The first whole state was told.
    live: Cell<bool>,
    pods_changed: Notify,
    images_changed: Notify,
    settings: Settings,
}

impl Source {
    /// Pods of this node are others now, or are others' business.
    fn look_again(&self) {
        self.pods_changed.notify_one();
        self.images_changed.notify_one();
    }

    /// One word of a collection, to the world and what follows from it on to the kernel.
    fn hear<T: Object>(
        &self,
        collection: &'static str,
        word: Word<'_, T>,
        at_ns: u64,
        take: impl Fn(&mut World, &T),
        gone: impl Fn(&mut World, &str),
        retain: impl Fn(&mut World, &Names),
    ) {
        let bad = |name: &Name, reason: &str| (format!("{} {name}", T::KIND), reason.to_owned());
        let mut malformed = Vec::new();
        {
            let mut world = self.world.borrow_mut();
            match word {
                Word::Ends(pod) => {
                    if self.live.get()
                        && let Some(name) = world.living(&pod)
                    {
                        self.core.borrow_mut().ends(&name);
                    }
                    return;
                }
                Word::Changed(object) => {
                    self.core.borrow_mut().mended(|| format!("{} {}", T::KIND, object.meta().full_name()));
                    take(&mut world, &object);
                }
                Word::Gone(object) => {
                    let name = object.meta().full_name();
                    self.core.borrow_mut().mended(|| format!("{} {name}", T::KIND));
                    gone(&mut world, &name);
                }
                Word::Malformed(object) => malformed.push(bad(&object.name, &object.reason)),
                Word::Page(objects) => {
                    for object in &objects {
                        match object {
                            Ok(object) => take(&mut world, object),
                            Err(object) => malformed.push(bad(&object.name, &object.reason)),
                        }
                    }
                    drop(world);
                    // Only the whole list says that the collection is followed.
                    return self.pass_on(malformed, at_ns);
                }
                Word::Listed(named) => {
                    retain(&mut world, &named);
                    debug!(collection, objects = named.len(), "listed");
                    self.listed.borrow_mut().insert(collection);
                    // The pods of this node are to be known by their networks before the first state is told.
                    self.look_again();
                }
                Word::Confirmed => {}
                Word::Failed(failure) => {
                    drop(world);
                    return self.failed(collection, failure);
                }
            }
        }
        self.failures.borrow_mut().remove(collection);
        self.pass_on(malformed, at_ns);
    }

    fn failed(&self, collection: &'static str, failure: Failure) {
        self.failures.borrow_mut().insert(collection, failure);
        self.tell_failures();
        if self.waits_for().is_empty() {
            self.pods_changed.notify_one();
        }
    }

    /// One server that is gone is one failure to tell, not six.
    fn tell_failures(&self) {
        let failures = self.failures.borrow();
        let said: BTreeSet<_> = failures.values().map(|failure| failure.reason.as_str()).collect();
        let Some(first) = said.first() else { return };
        let more = if said.len() > 1 { format!(" (and {} more)", said.len() - 1) } else { String::new() };
        self.core.borrow_mut().source_failed(format!("{first}{more}"));
    }

    /// The collections without which nothing can be told yet.
    fn waits_for(&self) -> Vec<&'static str> {
        let listed = self.listed.borrow();
        let failures = self.failures.borrow();
        let waits = |(collection, needed): &(&'static str, bool)| {
            let refused = failures.get(collection).is_some_and(|failure| failure.forbidden);
            (!listed.contains(collection) && (*needed || !refused)).then_some(*collection)
        };
        COLLECTIONS.iter().filter_map(waits).collect()
    }

    /// What the world says of the words it heard goes to the registry and the kernel.
    fn pass_on(&self, malformed: Vec<(String, String)>, at_ns: u64) {
        let taken = self.world.borrow_mut().take();
        let mut core = self.core.borrow_mut();
        // Until the first whole state is told, that will tell all of it but the problems.
        let live = self.live.get();
        for event in taken.events.into_iter().filter(|_| live) {
            core.apply(event, at_ns);
        }
        let problems = taken.problems.into_iter().map(|problem| (problem.object, problem.reason));
        core.skipped(problems.chain(malformed));
        if live {
            core.source_confirmed(self.failures.borrow().is_empty());
        }
    }

    /// Finds the processes of this node's pods, and tells the first whole state once the pods of it were tried.
    async fn find_pods(&self) {
        let [first, longest] = FIND_AGAIN;
        let mut again = first;
        let mut soon = Instant::now();
        let mut missing: Vec<(Name, String)> = Vec::new();
        let mut search = find::Search::default();
        loop {
            let found = self.find(&mut search).await;
            if found {
                again = first;
            }
            self.start();
            let unfound = self.world.borrow().unfound();
            if unfound.iter().any(|pod| !missing.contains(pod)) {
                soon = Instant::now() + SOON;
            }
            missing = unfound;
            let sleep = if missing.is_empty() {
                // By the next look numbers of processes may have been given anew.
                search = find::Search::default();
                LOOK
            } else if Instant::now() < soon {
                FIND_SOON
            } else {
                search = find::Search::default();
                again
            };
            tokio::select! {
                () = tokio::time::sleep(sleep) => again = (again * 2).min(longest),
                () = self.pods_changed.notified() => again = first,
            }
        }
    }

    /// One look; true when it changed anything.
    async fn find(&self, search: &mut find::Search) -> bool {
        let (known, unfound) = {
            let world = self.world.borrow();
            (world.processes(), world.unfound())
        };
        // Reading /proc takes its time: beside the agent's thread.
        let mut searching = std::mem::take(search);
        let looked = tokio::task::spawn_blocking(move || (look(&mut searching, known, unfound), searching));
        let Ok((found, searched)) = looked.await else { return false };
        *search = searched;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                warn!(%error, "/proc cannot be read: are the node's processes visible (hostPID)?");
                return false;
            }
        };
        if found.is_empty() {
            return false;
        }
        for (name, uid, process, addresses) in found {
            self.world.borrow_mut().found(&name, &uid, process, addresses);
        }
        let heard = self.core.borrow().source.last_event;
        self.pass_on(Vec::new(), monotonic_ns());
        // The node itself said this: what the API server said gets no younger by it.
        self.core.borrow_mut().source.last_event = heard;
        true
    }

    /// Asks the container runtime of images that nobody has spoken of yet.
    async fn ask_runtime(&self) {
        let [first, longest] = ASK_AGAIN;
        let mut again = first;
        let mut told = String::new();
        loop {
            let mut images = self.world.borrow().unasked();
            if images.is_empty() {
                self.images_changed.notified().await;
                continue;
            }
            images.truncate(cri::AT_ONCE);
            let socket = self.settings.cri.clone();
            match tokio::task::spawn_blocking(move || cri::stop_signals(&socket, &images)).await {
                Ok(Ok(answers)) => {
                    for (image, signal) in answers {
                        debug!(%image, signal, "image");
                        self.world.borrow_mut().image(&image, signal);
                    }
                    self.pass_on(Vec::new(), monotonic_ns());
                    (again, told) = (first, String::new());
                    continue;
                }
                Ok(Err(error)) => {
                    let said = error.to_string();
                    if said != told {
                        warn!(
                            error = said,
                            "no STOPSIGNAL of images is known: where one is not TERM, annotate the pod with \
                             hitless.io/stop-signals, or name the runtime's socket with --cri-socket"
                        );
                        told = said;
                    }
                }
                Err(error) => warn!(%error, "asking the container runtime"),
            }
            tokio::time::sleep(again).await;
            again = (again * 2).min(longest);
        }
    }

    /// Tells the first whole state.
    fn start(&self) {
        if self.live.get() {
            return;
        }
        let waits_for = self.waits_for();
        if !waits_for.is_empty() {
            debug!(waits_for = waits_for.join(", "), "not everything is listed yet");
            return;
        }
        let state = self.world.borrow().snapshot();
        self.world.borrow_mut().take();
        let node_known = !state.nodes.is_empty();
        let refused = self.failures.borrow().contains_key("nodes");
        if !node_known && !refused {
            warn!(
                node = self.settings.node,
                "the cluster has no node of this name: no pod is this node's; give its name with --node-name"
            );
        }
        self.core.borrow_mut().apply(Event::Sync { state }, monotonic_ns());
        self.live.set(true);
        // The whole state is in force, and yet not everything is followed.
        self.tell_failures();
    }
}

/// A pod of this node, the uid that cgroups name it by, the process that was found of it, and the addresses of its
/// network.
type Sighting = (Name, String, Option<Process>, Vec<IpAddr>);

/// Of the pods that were found before those whose process has ended, with another one if there is; of the others those
/// that can be found now.
fn look(
    search: &mut find::Search,
    known: Vec<(Name, String, Process)>,
    unfound: Vec<(Name, String)>,
) -> io::Result<Vec<Sighting>> {
    let ended = known.into_iter().filter(|(_, _, process)| !process.lives()).map(|(name, uid, _)| (name, uid, true));
    let mut looked_for: Vec<_> = ended.collect();
    if !looked_for.is_empty() {
        // Another process of such a pod was a stranger as long as nobody looked for it.
        *search = find::Search::default();
    }
    looked_for.extend(unfound.into_iter().map(|(name, uid)| (name, uid, false)));
    if looked_for.is_empty() {
        return Ok(Vec::new());
    }
    let found = search.look(&looked_for.iter().map(|(_, uid, _)| uid.clone()).collect())?;
    let sightings = looked_for.into_iter().map(|(name, uid, ended)| {
        let process = found.get(&uid).copied();
        let addresses = process.map_or(Vec::new(), |process| process.addresses());
        (ended || process.is_some()).then_some((name, uid, process, addresses))
    });
    Ok(sightings.flatten().collect())
}
