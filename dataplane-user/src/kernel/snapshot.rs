//! Looks at what is pinned, with or without an agent: the seed of a restart, `hitless status`, and
//! `hitless uninstall`.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use dataplane_ebpf::{
    abi::{Backend, Pod, Settings, Stat},
    health::{self, Health},
};
use serde::Serialize;

use super::{Config, Occupancy, canary, error::Error, interfaces, links, maps::Maps, pins, sys};
use crate::registry::Seed;

/// All that is in the state maps, as far as the registry needs it: without what a canary left.
pub fn seed(maps: &Maps) -> Result<Seed, Error> {
    let (services, backends) = (maps.services.entries(), maps.backends.entries());
    let (first_service, first_backend) = canary::World::new(services, backends)
        .map_or((services, backends), |world| (world.first_service, world.first_backend));
    let mut seed = Seed {
        frontends: maps.frontends.entries()?,
        services: maps.services.iter().map(|(_, one)| one).filter(|one| (1..first_service).contains(&one.id)).collect(),
        slots: maps.slots.entries()?,
        ..Seed::default()
    };
    seed.frontends.retain(|(_, frontend)| frontend.service < first_service);
    seed.slots.retain(|(key, _)| key.service < first_service);
    for (id, word) in maps.health.iter().take(first_backend as usize).skip(1) {
        let health = Health(word);
        if health.state() != health::State::Gone {
            seed.backends.push((id, maps.backends.get(id).unwrap_or_default(), health));
        } else if health.0 != 0 {
            seed.retired.push((id, health.generation()));
        }
    }
    let pods = maps.pods.entries::<u64, Pod>()?.into_iter().map(|(_, pod)| pod.pod);
    seed.last_pod = pods.filter(|pod| *pod < canary::SERVER_POD).max().unwrap_or(0);
    Ok(seed)
}

pub fn occupancy(maps: &Maps) -> Result<Vec<Occupancy>, Error> {
    use dataplane_ebpf::abi;
    fn count<K: aya::Pod + Default, V: aya::Pod + Default>(map: &super::maps::HashMap) -> Result<Occupancy, Error> {
        let mut cursor = sys::Cursor::default();
        let mut used = 0;
        loop {
            let entries = sys::map_lookup_batch::<K, V>(map.fd(), &mut cursor, 4096)
                .map_err(|source| map.failed("reading it", source))?;
            used += entries.len() as u32;
            if cursor.is_start() {
                return Ok(Occupancy { map: map.name, used, size: map.size });
            }
        }
    }
    let backends = maps.backends.iter().skip(1).filter(|(_, backend)| *backend != Backend::default());
    let services = maps.services.iter().skip(1).filter(|(_, service)| service.id != 0);
    Ok(vec![
        count::<abi::Endpoint, abi::Frontend>(&maps.frontends)?,
        Occupancy { map: "SERVICES", used: services.count() as u32, size: maps.services.entries() },
        count::<abi::SlotKey, abi::Slot>(&maps.slots)?,
        Occupancy { map: "BACKENDS", used: backends.count() as u32, size: maps.backends.entries() },
        count::<abi::Endpoint, u32>(&maps.backend_index)?,
        count::<u64, abi::Pod>(&maps.pods)?,
        count::<abi::ListenerKey, i32>(&maps.listeners)?,
        count::<abi::AffinityKey, abi::Affinity>(&maps.affinity)?,
        count::<abi::SuspectKey, abi::Suspects>(&maps.suspects)?,
        count::<abi::FlowKey, abi::Rebind>(&maps.rebinds)?,
        count::<abi::Addr, abi::MeshAddress>(&maps.mesh)?,
    ])
}

/// A pinned link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LinkState {
    pub name: String,
    /// It hangs on something that still exists.
    pub attached: bool,
    pub program_id: u32,
}

/// What is pinned.
pub struct Snapshot {
    /// The layout that is in force, by its directory's name.
    pub layout: String,
    pub links: Vec<LinkState>,
    /// `None`: the pins are of another layout than this binary's and sizes'.
    pub state: Option<State>,
}

/// What the pinned maps say.
pub struct State {
    pub seed: Seed,
    /// By network namespace cookie.
    pub pods: Vec<(u64, Pod)>,
    pub settings: Settings,
    pub stats: Vec<(Stat, u64)>,
    pub occupancy: Vec<Occupancy>,
}

/// Reads the pins, changes nothing, needs no agent. `None`: nothing is installed.
pub fn snapshot(config: &Config) -> Result<Option<Snapshot>, Error> {
    let Some(directories) = pins::look(config)? else { return Ok(None) };
    let (state, flows) = pins::layout(config, &pins::definitions(config)?);
    let root = config.root();
    let links = link_states(&root.join("links"))?;
    let ours = directories.contains(&state) && directories.contains(&flows);
    let layout = if ours {
        state.clone()
    } else {
        let other = directories.iter().find(|name| name.len() == 16 && name.bytes().all(|b| b.is_ascii_hexdigit()));
        other.cloned().unwrap_or_else(|| "none".to_owned())
    };
    let state = if ours {
        let pin = |name: &str| root.join(if pins::FLOW_MAPS.contains(&name) { &flows } else { &state }).join(name);
        let maps = Maps::open(pin, &config.sizes, false)?;
        Some(State {
            seed: seed(&maps)?,
            pods: maps.pods.entries()?,
            settings: maps.settings.get(0).unwrap_or_default(),
            stats: maps.stats(),
            occupancy: occupancy(&maps)?,
        })
    } else {
        None
    };
    Ok(Some(Snapshot { layout, links, state }))
}

fn link_states(directory: &Path) -> Result<Vec<LinkState>, Error> {
    let mut states = Vec::new();
    for path in pinned(directory)? {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let Ok(link) = sys::open_pin(&path) else { continue };
        // A pinned program (the marker of a tc filter) has no link info.
        let Ok(info) = sys::link_info(link.as_fd()) else { continue };
        let attached = info.kind == sys::LINK_RAW_TRACEPOINT || info.target() != 0;
        states.push(LinkState { name, attached, program_id: info.program_id });
    }
    Ok(states)
}

/// Every pin in a directory; none when there is no directory.
pub fn pinned(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Pin { path: directory.to_owned(), doing: "reading", source };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    paths.sort();
    Ok(paths)
}

/// What [`uninstall`] removed; nothing when nothing was installed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Removed {
    /// Cgroup and tracepoint links.
    pub links: usize,
    /// Links, filters and queueing disciplines on interfaces.
    pub interface_hooks: usize,
    /// The directory of pins, with the maps in it.
    pub directory: Option<PathBuf>,
}

/// Removes all that agents of this name made: links, pins, tc filters; nothing else. Refused while
/// an agent runs.
pub fn uninstall(config: &Config) -> Result<Removed, Error> {
    if pins::look(config)?.is_none() {
        return Ok(Removed::default());
    }
    let root = config.root();
    let _lock = pins::lock(&root)?;
    let directory = root.join("links");
    let interfaces = interfaces::remove_all(&directory)?;
    let links = pinned(&directory)?;
    for pin in &links {
        links::detach(pin);
        links::unpin(pin).map_err(|source| Error::Pin { path: pin.clone(), doing: "unpinning", source })?;
    }
    pins::remove(config)?;
    Ok(Removed { links: links.len(), interface_hooks: interfaces, directory: Some(root) })
}
