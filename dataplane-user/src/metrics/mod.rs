//! What Prometheus reads: the kernel's counters as they are, and what the agent knows, put into text at scrape time.

pub mod drains;
pub mod http;
pub mod lag;
pub mod mesh;
mod text;

use std::path::Path;

use dataplane_ebpf::{abi::Stat, health::State};

use self::{
    lag::Histogram,
    text::{Exposition, Kind},
};
use crate::{kernel::Reader, registry::view::Counts};

/// What the agent's thread tells for a scrape.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub ready: bool,
    pub waiting_for: Option<String>,
    /// `file`, `stream`, `kube`.
    pub source: &'static str,
    pub connected: bool,
    pub age_seconds: Option<f64>,
    pub layers: u32,
    pub objects: Counts,
    pub skipped: usize,
    pub enrolled: usize,
    pub failing: usize,
    /// Hook, and whether it was proved.
    pub hooks: Vec<(String, bool)>,
    pub lags: lag::Lags,
    pub counted: Counted,
    /// None: no mesh.
    pub mesh: Option<mesh::Facts>,
}

/// What the agent itself counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    pub syncs: u64,
    pub upserts: u64,
    pub deletes: u64,
    pub refused: u64,
    pub skipped: u64,
}

/// The whole exposition, text format 0.0.4.
pub fn expose(facts: &Facts, reader: &Reader) -> String {
    let mut out = Exposition::default();
    agent(&mut out, facts);
    lags(&mut out, &facts.lags);
    kernel(&mut out, reader);
    if let Some(facts) = &facts.mesh {
        mesh::expose(&mut out, facts);
    }
    process(&mut out);
    out.finish()
}

fn agent(out: &mut Exposition, facts: &Facts) {
    let flag = |yes: bool| if yes { 1.0 } else { 0.0 };
    out.family("hitless_build_info", Kind::Gauge, "The agent that answers; always 1.");
    out.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    out.one("hitless_ready", Kind::Gauge, "1: every hook is proved and the state is in force.", flag(facts.ready));
    out.family("hitless_layer_enabled", Kind::Gauge, "Whether a layer acts (--layers).");
    let on = crate::admin::protocol::layer_names(facts.layers);
    for layer in ["l1", "l2", "l3"] {
        out.sample(&[("layer", layer)], flag(on.iter().any(|name| name == layer)));
    }
    let source = ("source", facts.source);
    out.family("hitless_source_connected", Kind::Gauge, "1: the source is read without error.");
    out.sample(&[source], flag(facts.connected));
    if let Some(age) = facts.age_seconds {
        let help = "Seconds since the source last confirmed or changed the state.";
        out.family("hitless_source_age_seconds", Kind::Gauge, help);
        out.sample(&[source], age);
    }
    out.family("hitless_source_events_total", Kind::Counter, "Events taken from the source.");
    let Counted { syncs, upserts, deletes, refused, skipped } = facts.counted;
    for (op, count) in [("sync", syncs), ("upsert", upserts), ("delete", deletes)] {
        out.sample(&[source, ("op", op)], count as f64);
    }
    out.family("hitless_source_refused_total", Kind::Counter, "Words of the source that were refused as a whole.");
    out.sample(&[source], refused as f64);
    out.one("hitless_skipped_objects", Kind::Gauge, "Objects of the source skipped right now.", facts.skipped as f64);
    out.one("hitless_skipped_objects_total", Kind::Counter, "Objects of the source skipped so far.", skipped as f64);
    out.family("hitless_objects", Kind::Gauge, "Objects that the agent knows.");
    let counts = facts.objects;
    for (kind, count) in [
        ("service", counts.services),
        ("frontend", counts.frontends),
        ("backend", counts.backends),
        ("slot", counts.slots),
        ("pod", counts.pods),
        ("local_pod", counts.local_pods),
        ("node", counts.nodes),
        ("waiting_backend", counts.waiting),
    ] {
        out.sample(&[("kind", kind)], count as f64);
    }
    out.one("hitless_enrolled_pods", Kind::Gauge, "Pods of this node that are enrolled.", facts.enrolled as f64);
    out.one("hitless_failing_pods", Kind::Gauge, "Pods of this node that could not be enrolled.", facts.failing as f64);
    out.family("hitless_hook_proved", Kind::Gauge, "Whether a connect of the agent's own passed through the hook.");
    for (hook, proved) in &facts.hooks {
        out.sample(&[("hook", hook)], flag(*proved));
    }
}

fn lags(out: &mut Exposition, lags: &lag::Lags) {
    let each = |out: &mut Exposition, name: &str, help: &str, label: &str, all: [(&str, &Histogram); 3]| {
        out.family(name, Kind::Histogram, help);
        for (value, histogram) in all {
            out.histogram(&[(label, value)], histogram);
        }
    };
    let help = "From an event to the kernel's map (api), or to the agent that follows the map (sigterm, listener).";
    let of = [("api", &lags.api), ("sigterm", &lags.sigterm), ("listener", &lags.listener)];
    each(out, "hitless_endpoint_lag_seconds", help, "signal", of);
    let help = "How late the control plane said what was already known, by who said it first.";
    let of = [("api", &lags.late_api), ("sigterm", &lags.late_sigterm), ("listener", &lags.late_listener)];
    each(out, "hitless_control_plane_lag_seconds", help, "first", of);
    out.family("hitless_drains_total", Kind::Counter, "Pods that were taken out, by who said it first.");
    for (first, count) in ["api", "sigterm", "listener", "control_plane"].into_iter().zip(lags.drains) {
        out.sample(&[("first", first)], count as f64);
    }
}

fn kernel(out: &mut Exposition, reader: &Reader) {
    let stats = reader.stats();
    let count = |wanted: Stat| stats.iter().find(|(stat, _)| *stat == wanted).map_or(0, |(_, count)| *count) as f64;
    let by = |out: &mut Exposition, name: &str, help: &str, label: &str, all: &[(&str, Stat)]| {
        out.family(name, Kind::Counter, help);
        for (value, stat) in all {
            out.sample(&[(label, value)], count(*stat));
        }
    };
    let kinds = [("service", Stat::Translated), ("direct", Stat::Direct), ("no_backend", Stat::NoBackend)];
    by(out, "hitless_connects_total", "Connects (and UDP sends) to services, by what became of them.", "kind", &kinds);
    let results = [
        ("established", Stat::Established),
        ("refused", Stat::Refused),
        ("timed_out", Stat::TimedOut),
        ("unreachable", Stat::Unreachable),
        ("abandoned", Stat::Abandoned),
    ];
    by(out, "hitless_connect_results_total", "TCP connects as the application saw them end.", "result", &results);
    let kinds = [
        ("skipped", Stat::Skipped),
        ("serving_terminating", Stat::ServingTerminating),
        ("failed_open", Stat::FailedOpen),
        ("stale_slot", Stat::StaleSlot),
        ("affinity", Stat::AffinityHit),
    ];
    by(out, "hitless_choices_total", "Choices of a backend that were not the plain draw.", "kind", &kinds);
    out.family(
        "hitless_rebinds_total",
        Kind::Counter,
        "SYNs to be replayed to another backend, by reason and outcome.",
    );
    for (reason, outcome, stat) in [
        ("rst", "moved", Stat::ReboundRst),
        ("icmp", "moved", Stat::ReboundIcmp),
        ("silent", "moved", Stat::ReboundSilent),
        ("collision", "moved", Stat::ReboundCollision),
        ("any", "exhausted", Stat::Exhausted),
        ("any", "failed", Stat::RebindFailed),
    ] {
        out.sample(&[("reason", reason), ("outcome", outcome)], count(stat));
    }
    let signals = [
        ("stop", Stat::StopSignal),
        ("listener_opened", Stat::ListenerOpened),
        ("listener_closed", Stat::ListenerClosed),
    ];
    by(out, "hitless_signals_total", "Signals of this node's pods that the kernel saw.", "signal", &signals);
    for (name, stat, help) in [
        ("hitless_connections_reset_total", Stat::Reset, "Established connections that were reset."),
        ("hitless_answers_rejected_total", Stat::Forged, "RSTs and ICMP errors that did not prove they saw the SYN."),
        ("hitless_stale_packets_total", Stat::StalePacket, "Packets of backends that a connection has left."),
        ("hitless_suspects_total", Stat::Suspected, "Backends made suspect by failed connects."),
        ("hitless_suspects_recovered_total", Stat::Recovered, "Suspicions ended by a connect that was answered."),
        (
            "hitless_suspects_withheld_total",
            Stat::SuspectFloor,
            "Suspicions that one client's word was not enough for.",
        ),
        ("hitless_events_lost_total", Stat::EventsLost, "Records that found the ring buffer full."),
        ("hitless_map_refused_total", Stat::MapFull, "Entries that a full map refused."),
    ] {
        out.one(name, Kind::Counter, help, count(stat));
    }

    let maps = reader.occupancy().unwrap_or_default();
    out.family("hitless_map_entries", Kind::Gauge, "Entries in a map.");
    for map in &maps {
        out.sample(&[("map", map.map)], map.used.into());
    }
    out.family("hitless_map_capacity", Kind::Gauge, "Entries that a map has room for.");
    for map in &maps {
        out.sample(&[("map", map.map)], map.size.into());
    }
    let moved = reader.flows().map_or(0, |flows| flows.len());
    out.one(
        "hitless_rebound_connections",
        Kind::Gauge,
        "Connections that live on another backend than they began with.",
        moved as f64,
    );
    let [mut ready, mut draining, mut refusing, mut suspect] = [0_u32; 4];
    for word in reader.healths() {
        match word.state() {
            State::Gone => continue,
            State::Ready => ready += 1,
            State::Draining => draining += 1,
            State::Refusing => refusing += 1,
        }
        suspect += u32::from(word.level() > 0);
    }
    out.family("hitless_backends", Kind::Gauge, "Backends as the kernel knows them; suspect ones are counted besides.");
    for (state, count) in [("ready", ready), ("draining", draining), ("refusing", refusing), ("suspect", suspect)] {
        out.sample(&[("state", state)], count.into());
    }
}

/// The usual metrics of a process.
fn process(out: &mut Exposition) {
    let read = |path: &str| std::fs::read_to_string(Path::new("/proc").join(path)).unwrap_or_default();
    let stat = read("self/stat");
    // After the name, which may hold anything.
    let fields: Vec<f64> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().map(number).collect();
    let field = |nth: usize| fields.get(nth - 3).copied().unwrap_or(0.0);
    // SAFETY: sysconf only reads.
    let (ticks, page) = unsafe { (libc::sysconf(libc::_SC_CLK_TCK) as f64, libc::sysconf(libc::_SC_PAGESIZE) as f64) };
    let booted = read("stat").lines().find_map(|line| line.strip_prefix("btime ").map(number)).unwrap_or(0.0);
    let most = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let cpu = (field(14) + field(15)) / ticks;
    out.one("process_cpu_seconds_total", Kind::Counter, "User and system CPU time spent, in seconds.", cpu);
    out.one("process_resident_memory_bytes", Kind::Gauge, "Resident memory, in bytes.", field(24) * page);
    out.one("process_virtual_memory_bytes", Kind::Gauge, "Virtual memory, in bytes.", field(23));
    let started = booted + field(22) / ticks;
    out.one("process_start_time_seconds", Kind::Gauge, "Start, in seconds since the epoch.", started);
    out.one("process_open_fds", Kind::Gauge, "Open file descriptors.", open as f64);
    out.one("process_max_fds", Kind::Gauge, "Most open file descriptors.", most as f64);
    out.one("process_threads", Kind::Gauge, "Threads.", field(20));
}

fn number(text: &str) -> f64 {
    text.trim().parse().unwrap_or(0.0)
}
