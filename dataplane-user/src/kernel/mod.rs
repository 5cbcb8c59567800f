//! The kernel side of the agent: the only module that makes BPF system calls.
//!
//! ```text
//! Kernel::open ─▶ (first sync: write) ─▶ activate ─▶ write, complete, sweep, check …
//! ```
//!
//! [`Kernel`] lives on the agent's thread. What must enter a pod's network namespace runs on a
//! thread of its own; its [`Outcome`]s come back through the channel in [`Opened`] and are handed
//! to [`Kernel::complete`].

pub mod object;

pub(crate) mod btf;
pub mod canary;
mod carry;
mod enroll;
mod error;
mod events;
mod interfaces;
mod links;
mod listeners;
mod load;
mod mapped;
mod maps;
mod netns;
mod pins;
pub(crate) mod probe;
mod reader;
mod snapshot;
mod sweep;
mod sys;
mod tunnel;
mod writer;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use dataplane_ebpf::{
    abi::{self, Settings, Stat},
    health::Health,
};
use tokio::sync::mpsc::UnboundedReceiver;

pub use enroll::{Notice, Outcome};
pub use error::Error;
pub use events::Events;
pub use links::Attached;
pub use maps::Sizes;
pub use netns::{cookie as netns_cookie, cookie_of as socket_netns_cookie};
pub use pins::cgroup2_root;
pub use reader::Reader;
pub use snapshot::{LinkState, Removed, Snapshot, State, snapshot, uninstall};
pub use sweep::Swept;
pub use sys::{keep_heap, trim_heap};
pub use tunnel::{Target, TunnelMaps};
pub use writer::Rejected;

use crate::registry::{
    Seed,
    change::{Change, PodId},
};

/// Where and how the kernel side is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the cgroup programs are attached; `None`: the root of the cgroup2 hierarchy.
    pub cgroup: Option<PathBuf>,
    /// A mounted BPF file system.
    pub bpffs: PathBuf,
    /// The directory of pins below it: one per agent on a machine.
    pub name: String,
    /// Makes the layout another one, for tests of upgrades.
    pub layout_salt: String,
    pub sizes: Sizes,
    pub tcx: Tcx,
    pub settings: Settings,
}

/// Whether the pods' interfaces are attached to by tcx links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tcx {
    /// When the kernel has them (6.6).
    #[default]
    Auto,
    /// Never: clsact.
    Off,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cgroup: None,
            bpffs: PathBuf::from("/sys/fs/bpf"),
            name: "hitless".to_owned(),
            layout_salt: String::new(),
            sizes: Sizes::default(),
            tcx: Tcx::Auto,
            settings: default_settings(),
        }
    }
}

impl Config {
    /// `<bpffs>/<name>`.
    pub fn root(&self) -> PathBuf {
        self.bpffs.join(&self.name)
    }
}

/// All layers, the first SYN answered within 200 ms, three replays, suspicion of one second and up.
pub fn default_settings() -> Settings {
    Settings {
        layers: abi::LAYER_KNOW | abi::LAYER_CHOOSE | abi::LAYER_REBIND,
        syn_timeout_jiffies: jiffies_of_ms(200),
        syn_limit: 2,
        max_replays: abi::MAX_TRIES as u32 - 1,
        suspect_ticks: dataplane_ebpf::health::ticks_of_ms(1000),
        suspect_max_level: 6,
        suspect_percent: 50,
        mark: 0x0048_0000,
        maps: 0,
        syn_spacing_ns: syn_spacing_ns(200),
    }
}

/// [`Settings::syn_spacing_ns`] for a SYN timeout; 0 is the system's, one second (RFC 6298 section 2.1).
pub fn syn_spacing_ns(timeout_ms: u32) -> u32 {
    let timeout_ms = if timeout_ms == 0 { 1000 } else { timeout_ms };
    timeout_ms.saturating_mul(1_000_000 / 2)
}

/// Milliseconds in ticks of the running kernel, at least 1. The coarse clocks advance once per
/// tick, so their resolution is 1/HZ.
pub fn jiffies_of_ms(ms: u32) -> u32 {
    let tick = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE)
        .map_or(4_000_000, |tick| tick.tv_nsec().max(1) as u64);
    u32::try_from((u64::from(ms) * 1_000_000).div_ceil(tick)).unwrap_or(u32::MAX).max(1)
}

/// `CLOCK_MONOTONIC`, as the programs read it.
pub fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// An agent's kernel side, before it serves.
pub struct Opened {
    pub kernel: Kernel,
    pub seed: Seed,
    /// The maps are those of an agent before, and its programs may be serving from them right now.
    pub adopted: bool,
    pub events: Events,
    /// Results of work in network namespaces, for [`Kernel::complete`].
    pub outcomes: UnboundedReceiver<Outcome>,
    /// When the object was built with `--log`.
    pub logger: Option<aya_log::EbpfLogger<&'static dyn log::Log>>,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Occupancy {
    pub map: &'static str,
    pub used: u32,
    pub size: u32,
}

/// The maps, links and pins of a running agent.
pub struct Kernel {
    cgroup: PathBuf,
    pins: pins::Pins,
    maps: Arc<maps::Maps>,
    programs: load::Programs,
    enroll: enroll::Enroller,
    sweep: sweep::Sweep,
    /// Until activation: maps of another layout that programs serve from.
    before: Option<carry::Before>,
    /// Programs read the maps: this agent's, or those of the one before, whose maps it adopted.
    served: bool,
    active: bool,
}

impl Kernel {
    /// Loads the programs, makes or adopts the maps. Nothing is attached yet: write the first full
    /// state, then [`Kernel::activate`].
    pub fn open(config: Config) -> Result<Opened, Error> {
        let cgroup = match &config.cgroup {
            Some(path) => path.clone(),
            None => cgroup2_root()?,
        };
        pins::check_cgroup2(&cgroup)?;
        config.sizes.check()?;
        let definitions = pins::definitions(&config)?;
        let pins = pins::Pins::open(&config, &definitions)?;
        let (mut ebpf, programs) = load::load(&pins, &definitions)?;
        let wanted = links::HOOKS.iter().map(|(name, _)| *name).chain(interfaces::program_names());
        if let Some(name) = wanted.into_iter().find(|name| programs.get(name).is_none()) {
            return Err(Error::Missing { what: format!("program {name}") });
        }
        let maps = Arc::new(maps::Maps::open(|name| pins.map(name), &config.sizes, true)?);
        maps.settings.set(0, Settings { maps: maps.number, ..config.settings });
        let events = Events::open(&pins.map("EVENTS"))?;
        let seed = if pins.adopted() { snapshot::seed(&maps)? } else { Seed::default() };
        let logger = if ebpf.map("AYA_LOGS").is_some() { aya_log::EbpfLogger::init(&mut ebpf).ok() } else { None };
        let (enroll, outcomes) = enroll::Enroller::start(config.tcx, pins.links(), programs.clone(), maps.clone())?;
        let adopted = pins.adopted();
        let before = if adopted { None } else { pins.other_state()?.and_then(|path| carry::Before::open(&path)) };
        let kernel = Self {
            cgroup,
            pins,
            maps,
            programs,
            enroll,
            sweep: sweep::Sweep::default(),
            before,
            served: adopted,
            active: false,
        };
        Ok(Opened { kernel, seed, adopted, events, outcomes, logger })
    }

    /// After the first full sync: from here on the programs of this agent serve from its maps.
    pub fn activate(&mut self) -> Result<Vec<(&'static str, Attached)>, Error> {
        self.enroll.prepare();
        self.pins.publish()?;
        if let Some(before) = &self.before {
            before.carry_over(&self.maps)?;
        }
        let attached = links::attach_all(&self.programs, &self.cgroup, &self.pins.links())?;
        if let Some(before) = self.before.take() {
            // What the programs before learned while the links moved, one after the other.
            before.carry_over(&self.maps)?;
        }
        self.served = true;
        self.active = true;
        links::drop_foreign(&self.pins.links())?;
        self.enroll.activate();
        // The interfaces' links still serve from the maps before until the enroller has moved them;
        // maps live as long as a program holds them, pinned or not.
        self.pins.drop_old()?;
        Ok(attached)
    }

    /// Performs changes in their order. What could not be done is returned; the rest was done.
    /// `Enroll` and `Release` begin here and end in [`Kernel::complete`].
    pub fn write(&mut self, changes: &[Change]) -> Vec<Rejected> {
        let mut rejected = writer::write(&self.maps, self.served, changes);
        for (index, change) in changes.iter().enumerate() {
            let begun = match change {
                Change::Enroll(enrollment) => self.enroll.enroll(enrollment),
                Change::Release(pod) => self.enroll.release(*pod),
                _ => Ok(()),
            };
            if let Err(error) = begun {
                rejected.push(Rejected { index, error });
            }
        }
        rejected
    }

    /// Takes in what the enroller's thread did. At times there is nothing to tell of it.
    pub fn complete(&mut self, outcome: Outcome) -> Vec<Notice> {
        self.enroll.complete(outcome)
    }

    /// Counts a pod's listeners again. Call it when one came or went: the program may count several
    /// at once wrong, and then take a backend for refusing that another listener still serves.
    pub fn recount(&mut self, pod: PodId) {
        self.enroll.recount(pod);
    }

    /// Looks after what others may have removed: links of the cgroup (it may have been made anew) at
    /// once, interfaces and tc filters on the enroller's thread. Call it every few seconds.
    pub fn check(&mut self) -> Result<Vec<(&'static str, Attached)>, Error> {
        if !self.active {
            return Ok(Vec::new());
        }
        self.enroll.check();
        if links::detached(&self.cgroup, &self.pins.links()).is_empty() {
            return Ok(Vec::new());
        }
        links::attach_all(&self.programs, &self.cgroup, &self.pins.links())
    }

    pub fn set_settings(&mut self, settings: Settings) {
        self.maps.settings.set(0, Settings { maps: self.maps.number, ..settings });
    }

    pub fn settings(&self) -> Settings {
        self.maps.settings.get(0).unwrap_or_default()
    }

    /// A backend's health word; of no backend: Gone.
    pub fn health(&self, id: u32) -> Health {
        self.maps.health.word(id).map_or(Health(0), |word| Health(word.load(std::sync::atomic::Ordering::Relaxed)))
    }

    /// Since the maps were made, over all CPUs.
    pub fn stats(&self) -> Vec<(Stat, u64)> {
        self.maps.stats()
    }

    /// How full each map is. It walks them: not for hot paths.
    pub fn occupancy(&self) -> Result<Vec<Occupancy>, Error> {
        snapshot::occupancy(&self.maps)
    }

    /// The agent listens on that port of the pod's loopback (0: no more) for what goes to the mesh.
    pub fn set_outbound(&mut self, pod: PodId, port: u16) -> Result<(), Error> {
        self.enroll.set_outbound(pod, port)
    }

    /// For the tunnel's threads.
    pub fn tunnel_maps(&self) -> TunnelMaps {
        TunnelMaps::new(self.maps.clone())
    }

    /// For another thread to look at the maps.
    pub fn reader(&self) -> Reader {
        Reader::new(self.maps.clone())
    }

    /// Takes ended flows out of `REBINDS`, a bounded number per call. Call it every second or so.
    pub fn sweep(&mut self, now_ns: u64) -> Result<Swept, Error> {
        self.sweep.run(&self.maps, now_ns)
    }

    /// The pods that are enrolled now, by identifier, with their network namespace's cookie.
    pub fn enrolled(&self) -> BTreeMap<PodId, u64> {
        self.enroll.enrolled()
    }

    /// How many numbers services and backends have.
    pub fn numbers(&self) -> (u32, u32) {
        (self.maps.services.entries(), self.maps.backends.entries())
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The state layout's hash: the directory that the maps are pinned in.
    pub fn layout(&self) -> &str {
        self.pins.layout()
    }
}
