//! The figures: how fast each promise is kept, beside what the same thing costs without hitless.
//!
//! Both sides of a ratio are measured in turn within the same seconds, and reported as medians: on a
//! machine that others use too, only that says anything. Everything runs in network namespaces that
//! the lab made, with the real agent.

pub mod bpf;
mod deaths;
mod events;
mod feed;
pub mod figure;
mod flip;
mod flows;
mod hook;
mod kube;
pub mod load;
mod race;
mod replay;
pub mod rig;
mod sample;
mod scale;
mod tunnel;
mod wire;
pub mod worker;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::{figure::Figure, figure::Report, rig::Rig};

/// How much of each.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Of connects, medians over them.
    pub rounds: u32,
    /// Connects per round.
    pub connects: u32,
    pub flips: u32,
    pub signals: u32,
    pub events: u32,
    /// Connects per round that are replayed until nothing is left.
    pub replays: u32,
    /// Connects that meet a silent backend.
    pub silent: u32,
    pub flow_rounds: u32,
    /// Milliseconds of bulk transfer per round.
    pub bulk_ms: u64,
    /// Round trips per round.
    pub pings: u32,
    pub deletions: u32,
    pub churn: Duration,
    pub tunnel_rounds: u32,
    /// Milliseconds of each thing per round.
    pub tunnel_ms: u64,
    /// A node that goes silent.
    pub silences: u32,
    /// Pods deleted at a real API server.
    pub kube_deletions: u32,
    /// Pods deleted on a real cluster.
    pub deaths: u32,
}

impl Plan {
    pub fn full() -> Self {
        Self {
            rounds: 15,
            connects: 300,
            flips: 5_000,
            signals: 2_000,
            events: 2_000,
            replays: 100,
            silent: 20,
            flow_rounds: 40,
            bulk_ms: 100,
            pings: 500,
            deletions: 500,
            churn: Duration::from_secs(10),
            tunnel_rounds: 16,
            tunnel_ms: 100,
            silences: 5,
            kube_deletions: 500,
            deaths: 30,
        }
    }

    pub fn quick() -> Self {
        Self {
            rounds: 5,
            connects: 100,
            flips: 500,
            signals: 200,
            events: 200,
            replays: 30,
            silent: 3,
            flow_rounds: 8,
            bulk_ms: 100,
            pings: 500,
            deletions: 50,
            churn: Duration::from_secs(2),
            tunnel_rounds: 4,
            tunnel_ms: 80,
            silences: 1,
            kube_deletions: 50,
            deaths: 5,
        }
    }
}

type Measure = fn(&mut Rig, &Plan) -> Result<Vec<Figure>>;

/// The groups of figures, in order: flows before anything is rebound.
const GROUPS: &[(&str, Measure)] = &[
    ("hook", hook::measure),
    ("flip", flip::measure),
    ("events", events::measure),
    ("flows", flows::measure),
    ("replay", replay::measure),
    ("scale", scale::measure),
    ("tunnel", tunnel::measure),
    ("kube", kube::measure),
    ("deaths", deaths::measure),
];

pub fn groups() -> impl Iterator<Item = &'static str> {
    GROUPS.iter().map(|(name, _)| *name)
}

/// Measures the groups that are named, or all.
pub fn run(only: &[String], plan: &Plan) -> Result<Report> {
    let mut report = Report::default();
    let wanted: Vec<_> =
        GROUPS.iter().filter(|(name, _)| only.is_empty() || only.iter().any(|only| only == name)).collect();
    let start = Instant::now();
    prefer_ourselves();
    eprintln!("bench: building the lab (load average {})", load());
    let mut rig = Rig::new().context("build the lab")?;
    for (number, (name, measure)) in wanted.iter().enumerate() {
        eprintln!("bench: [{}/{}] {name} ({:.0} s so far)", number + 1, wanted.len(), start.elapsed().as_secs_f64());
        report.figures.extend(measure(&mut rig, plan).with_context(|| format!("measure {name}"))?);
    }
    eprintln!("bench: done in {:.0} s (load average {})", start.elapsed().as_secs_f64(), load());
    Ok(report)
}

/// What else runs on the machine is to count less: everything started from here on inherits this, the
/// agent too. Without the right to it the figures are noisier, no more.
fn prefer_ourselves() {
    // SAFETY: setpriority takes no pointer; 0 is this process.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) } != 0 {
        eprintln!("bench: could not raise the priority: {}", std::io::Error::last_os_error());
    }
}

fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or("unknown").to_owned()
}
