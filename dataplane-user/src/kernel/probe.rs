//! Tries what the kernel side needs, with programs that do nothing: for `hitless doctor`.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use aya::programs::loaded_programs;
use nix::sched::{CloneFlags, setns, unshare};

use super::{
    Config, links,
    links::Hook,
    pins, snapshot,
    sys::{self, Attach, ProgramKind},
};

/// Raw tracepoints that do not exist, or may not be attached to, with the reason.
pub fn missing_tracepoints() -> io::Result<Vec<(&'static str, io::Error)>> {
    let program = sys::load_nothing(ProgramKind::RawTracepoint)?;
    let try_open = |name: &'static str| {
        // Detached at once: the descriptor is dropped.
        sys::raw_tracepoint_open(program.as_fd(), name).err().map(|error| (name, error))
    };
    Ok(["signal_generate", "inet_sock_set_state"].into_iter().filter_map(try_open).collect())
}

/// What a thread that made itself a network namespace found there.
#[derive(Debug)]
pub struct Namespaces {
    /// Leaving it again by setns, as the agent enters the pods'.
    pub entered: io::Result<()>,
    /// A tcx link on its loopback interface (6.6).
    pub tcx: io::Result<()>,
}

/// Makes a network namespace, tries what is done in the pods', and lets it vanish.
pub fn namespaces() -> Namespaces {
    let try_out = || -> Namespaces {
        let entered = fs::File::open("/proc/thread-self/ns/net").and_then(|own| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let made = fs::File::open("/proc/thread-self/ns/net")?;
            setns(own.as_fd(), CloneFlags::CLONE_NEWNET)?;
            Ok(setns(made.as_fd(), CloneFlags::CLONE_NEWNET)?)
        });
        // Never on an interface of the host's: only in the namespace just made.
        let tcx = match &entered {
            Ok(()) => sys::load_nothing(ProgramKind::SchedClassifier)
                .and_then(|program| sys::link_create(program.as_fd(), LOOPBACK, Attach::TcxIngress))
                .map(drop),
            Err(_) => Err(io::ErrorKind::Unsupported.into()),
        };
        Namespaces { entered, tcx }
    };
    let died = || Namespaces {
        entered: Err(io::Error::other("the thread that tried it died")),
        tcx: Err(io::ErrorKind::Unsupported.into()),
    };
    std::thread::scope(|scope| scope.spawn(try_out).join().unwrap_or_else(|_| died()))
}

/// The loopback interface's index in any network namespace.
const LOOPBACK: u32 = 1;

/// What is pinned and who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pinned {
    Nothing,
    /// Kept by the agent that is named.
    Held {
        by: String,
        layout: String,
        links: usize,
        detached: Vec<String>,
    },
    /// No agent runs; the programs go on serving from these maps.
    Orphaned {
        layout: String,
        links: usize,
        detached: Vec<String>,
        known: bool,
    },
}

pub fn pinned(config: &Config) -> Result<Pinned, super::Error> {
    let Some(found) = snapshot::snapshot(config)? else { return Ok(Pinned::Nothing) };
    let links = found.links.len();
    let detached = found.links.iter().filter(|link| !link.attached).map(|link| link.name.clone()).collect();
    Ok(match pins::holder(&config.root()) {
        Some(by) => Pinned::Held { by, layout: found.layout, links, detached },
        None if links == 0 && found.layout == "none" => Pinned::Nothing,
        None => Pinned::Orphaned { layout: found.layout, links, detached, known: found.state.is_some() },
    })
}

/// Programs of others that run at the hooks of the cgroup: hook → their names.
pub fn neighbours(config: &Config) -> Result<BTreeMap<&'static str, Vec<String>>, super::Error> {
    let path = match &config.cgroup {
        Some(path) => path.clone(),
        None => pins::cgroup2_root()?,
    };
    let failed = |source| super::Error::Cgroup { path: path.clone(), source };
    let cgroup: OwnedFd = fs::File::open(&path).map_err(failed)?.into();
    let ours = ours(&config.root().join("links"));
    let names: BTreeMap<u32, String> = loaded_programs()
        .flatten()
        .map(|program| (program.id(), program.name_as_str().unwrap_or("unnamed").to_owned()))
        .collect();
    let mut found = BTreeMap::new();
    for (hook, kind) in links::HOOKS {
        let Hook::Cgroup(attach) = kind else { continue };
        let programs = sys::cgroup_programs(cgroup.as_fd(), *attach).map_err(failed)?;
        let foreign: Vec<_> = programs
            .into_iter()
            .filter(|id| !ours.contains(id))
            .map(|id| names.get(&id).cloned().unwrap_or_else(|| format!("program {id}")))
            .collect();
        if !foreign.is_empty() {
            found.insert(*hook, foreign);
        }
    }
    Ok(found)
}

/// The programs behind the pinned links of this installation.
fn ours(links: &Path) -> Vec<u32> {
    let pins = snapshot::pinned(links).unwrap_or_default();
    pins.iter()
        .filter_map(|pin| sys::link_info(sys::open_pin(pin).ok()?.as_fd()).ok())
        .map(|info| info.program_id)
        .collect()
}
