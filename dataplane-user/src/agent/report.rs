//! What the agent tells of itself at its admin socket.

use std::{collections::BTreeMap, time::Instant};

use tokio::sync::mpsc;

use super::core::{Core, Phase, Shared};
use crate::{
    admin::{
        Query,
        protocol::{Agent, EndpointRow, KernelSide, Link, PodRow, Source, Status, layer_names},
    },
    config::{self, Config},
    kernel::monotonic_ns,
    metrics::Facts,
    model::Object,
};

/// How many services are told of before others of the agent's thread have their turn.
const SERVICES_AT_A_TIME: usize = 64;

/// Answers one query. Whoever asked may have left: then nobody takes the answer.
pub fn answer(query: Query, core: &Shared, config: &Config, started: Instant) {
    match query {
        Query::Status(to) => drop(to.send(status(&core.borrow(), config, started))),
        Query::Endpoints(service, to) => drop(tokio::task::spawn_local(endpoints(core.clone(), service, to))),
        Query::Facts(to) => drop(to.send(Box::new(facts(&core.borrow(), config)))),
        Query::Config(to) => drop(to.send(config.settings(core.borrow().kernel.cgroup()))),
        Query::State(to) => drop(tokio::task::spawn_local(state(core.clone(), to))),
        Query::Drains(to) => drop(to.send(core.borrow().drains.iter().map(Into::into).collect())),
        Query::Mesh(to) => drop(to.send(core.borrow().mesh.facts())),
        Query::Events(to) => {
            let core = core.borrow();
            drop(to.send((core.history.iter().cloned().collect(), core.followers.subscribe())));
        }
    }
}

fn status(core: &Core, config: &Config, started: Instant) -> Status {
    let ready = *core.phase.borrow() == Phase::Ready;
    Status {
        agent: Some(Agent {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            up_seconds: started.elapsed().as_secs(),
            adopted: core.adopted,
        }),
        ready,
        waiting_for: (!ready).then(|| waiting_for(core)),
        source: Some(Source {
            name: config.source.to_string(),
            age_seconds: core.source.last_event.map(|then| then.elapsed().as_secs()),
            error: core.source.error.clone(),
            problems: core.problems.iter().map(|(object, reason)| format!("{object}: {reason}")).collect(),
        }),
        kernel: Some(KernelSide {
            cgroup: core.kernel.cgroup().display().to_string(),
            layout: core.kernel.layout().into(),
            layers: layer_names(core.kernel.settings().layers),
            links: core.attached.iter().map(|name| Link { name: (*name).into(), attached: true }).collect(),
            maps: Vec::new(),
        }),
        objects: Some(core.registry.counts().into()),
        pods: pods(core),
        counters: BTreeMap::new(),
        tunnel: core.mesh.counts(),
        mesh: None,
        hooks: core.hooks.clone(),
    }
}

fn facts(core: &Core, config: &Config) -> Facts {
    let ready = *core.phase.borrow() == Phase::Ready;
    Facts {
        ready,
        waiting_for: (!ready).then(|| waiting_for(core)),
        source: match config.source {
            config::Source::File(_) => "file",
            config::Source::Stream(_) => "stream",
            config::Source::Kube => "kube",
        },
        connected: core.source.error.is_none() && core.source.last_event.is_some(),
        age_seconds: core.source.last_event.map(|then| then.elapsed().as_secs_f64()),
        layers: core.kernel.settings().layers,
        objects: core.registry.counts(),
        skipped: core.problems.len(),
        enrolled: core.kernel.enrolled().keys().filter(|pod| core.registry.enrolls(**pod)).count(),
        failing: core.failing_pods.len(),
        hooks: core.hooks.iter().map(|hook| (hook.hook.clone(), hook.ok)).collect(),
        lags: core.lags.clone(),
        counted: core.counted,
        mesh: core.mesh.facts(),
    }
}

fn waiting_for(core: &Core) -> String {
    if let Some(error) = &core.activation_error {
        return format!("programs to be attached: {error}");
    }
    if !core.registry.synced() {
        return "the first full state of the source".into();
    }
    match pods(core).iter().find(|pod| !pod.attached && pod.error.is_none()) {
        Some(pod) => format!("pod {} to be enrolled", pod.name),
        None if core.unproved.is_some() => core.unproved.clone().unwrap_or_default(),
        None => "the hooks to be proved by a connect of the agent's own".into(),
    }
}

fn pods(core: &Core) -> Vec<PodRow> {
    let attached = core.kernel.enrolled();
    let rows = core.registry.local_pods().map(|id| PodRow {
        name: core.registry.pod_label(id).map(|name| name.to_string()).unwrap_or_default(),
        enrolled: core.registry.enrolls(id),
        attached: attached.contains_key(&id),
        netns_cookie: attached.get(&id).copied(),
        error: core.failing_pods.get(&id).cloned(),
        in_mesh: core.mesh.has_joined(id),
    });
    let mut rows: Vec<_> = rows.collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    rows
}

/// Told piece by piece, no faster than they are taken.
async fn endpoints(core: Shared, service: Option<String>, to: mpsc::Sender<Vec<EndpointRow>>) {
    let names = service.map_or_else(|| core.borrow().registry.service_names(), |name| vec![name.into()]);
    for names in names.chunks(SERVICES_AT_A_TIME) {
        let Ok(place) = to.reserve().await else { return };
        let core = core.borrow();
        let now = monotonic_ns();
        let rows = names.iter().flat_map(|name| core.registry.rows(name));
        place.send(rows.map(|row| EndpointRow::new(row, |id| core.kernel.health(id), now)).collect());
    }
}

/// Likewise: an object that changes meanwhile is told as it is when its turn comes.
async fn state(core: Shared, to: mpsc::Sender<Vec<Object>>) {
    let (mut parts, mesh) = {
        let core = core.borrow();
        (core.registry.parts(), core.mesh.facts())
    };
    // Of 100,000 pods this takes longer than an event may wait.
    let sorted = tokio::task::spawn_blocking(move || {
        parts.sort_unstable();
        (parts, mesh.map(|mesh| mesh.shared.view.all()).unwrap_or_default())
    });
    let Ok((parts, workloads)) = sorted.await else { return };
    for parts in parts.chunks(SERVICES_AT_A_TIME) {
        let Ok(place) = to.reserve().await else { return };
        let core = core.borrow();
        let mut objects: Vec<_> = parts.iter().flat_map(|part| core.registry.told(part)).collect();
        for object in &mut objects {
            // Who pods are is the mesh's knowledge, not the registry's.
            if let Object::Pod(pod) = object
                && let Some(workload) = workloads.get(&pod.name)
            {
                pod.service_account = Some(workload.identity.service_account().into());
                pod.addresses.clone_from(&workload.addresses);
                if let Some(selected_by) = &workload.selected_by {
                    pod.labels.clone_from(&selected_by.labels);
                }
            }
        }
        place.send(objects);
    }
}
