//! A rolling update under load, without hitless, with each of its layers, and with all of them.
//!
//! Two nodes, a client outside, a gateway that picks pod addresses from a list which learns of a
//! pod's death late, and servers that close their listener at SIGTERM.

mod delay;
mod plot;
mod report;
mod rollout;

use std::path::PathBuf;

use anyhow::{Context, Result};

pub use self::delay::Delay;
use crate::lab::Topology;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Requests per second
    #[arg(long, default_value_t = 50.0)]
    pub rate: f64,
    /// Pods of the service
    #[arg(long, default_value_t = 3)]
    pub pods: usize,
    /// How often each pod is replaced
    #[arg(long, default_value_t = 2)]
    pub rounds: usize,
    /// Client and gateway use their connections again, instead of a new one per request
    #[arg(long)]
    pub keep_alive: bool,
    /// How long after a pod's death the control plane says so: 350ms, 200..500ms, 5s or never
    #[arg(long, default_value = "200..500ms")]
    pub control_plane_delay: Delay,
    /// Which runs: none (classic), l1, l2, l3, all (hitless)
    #[arg(long, alias = "modes", value_delimiter = ',', default_values = ["none", "l1", "l2", "l3", "all"])]
    pub layers: Vec<Mode>,
    /// Seconds that each run lasts [default: 2 for each death, and 3]
    #[arg(long)]
    pub duration: Option<f64>,
    /// Carry what pods say to pods in mutual TLS, wherever there are agents
    #[arg(long)]
    pub mtls: bool,
    /// How packets travel between pods
    #[arg(long, value_enum, default_value_t)]
    pub topology: Topology,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the timeline, as SVG or PNG by the file's extension; may be repeated
    #[arg(long, value_name = "FILE")]
    pub plot: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// No hitless at all
    #[value(name = "none", alias = "classic")]
    Classic,
    /// Know early
    L1,
    /// Choose well
    L2,
    /// Rebind in the kernel
    L3,
    /// Everything
    #[value(name = "all", alias = "hitless")]
    Hitless,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::L1 => "l1",
            Self::L2 => "l2",
            Self::L3 => "l3",
            Self::Hitless => "hitless",
        }
    }

    /// Of `hitless run --layers`; `None` when there is no agent.
    fn layers(self) -> Option<&'static str> {
        match self {
            Self::Classic => None,
            Self::L1 => Some("l1"),
            Self::L2 => Some("l2"),
            Self::L3 => Some("l3"),
            Self::Hitless => Some("l1,l2,l3"),
        }
    }

    /// Hears of a pod's deletion when the API server does.
    fn watches_pods(self) -> bool {
        matches!(self, Self::L1 | Self::Hitless)
    }
}

/// Run it all. False when classic lost nothing, or hitless lost something, or nothing was in mutual TLS that was to be.
pub fn main(options: &Options) -> Result<bool> {
    for path in &options.plot {
        plot::check(path)?;
    }
    let mut runs = Vec::new();
    for &mode in &options.layers {
        runs.push(rollout::run(mode, options).with_context(|| format!("the {} run", mode.name()))?);
    }
    report::print(options, &runs);
    if let Some(path) = &options.json {
        report::write_json(path, &runs)?;
    }
    for path in &options.plot {
        plot::draw(path, options, &runs)?;
        eprintln!("drew {}", path.display());
    }
    Ok(report::verdict(&runs))
}
