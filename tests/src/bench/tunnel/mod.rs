//! The tunnel beside the same connections without it. The goals are the measured peer's ratios to direct connections
//! (two of Istio's ztunnel, August 2026, both on the same two CPUs), bettered by half in rates and throughput and to
//! seven tenths of them in latency, CPU and memory.

mod lost;
mod memory;
mod rig;

use anyhow::{Context, Result};

use self::rig::{Side, TunnelRig};
use super::{
    Plan,
    figure::{Figure, Goal},
    load::{Load, Size, Timed},
    rig::Rig,
    sample::{Rounds, quantile},
    wire::Moved,
};

/// The peer's ratio, and by how much it is to be bettered.
const fn faster_than(peer: f64) -> Option<Goal> {
    Some(Goal::RatioAtLeast(peer * 1.5))
}

const fn cheaper_than(peer: f64) -> Option<Goal> {
    Some(Goal::RatioAtMost(peer * 0.7))
}

pub fn measure(_: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let mut rig = TunnelRig::new().context("build the mesh")?;
    // First: later the agents' memory is that of what they have carried.
    let memory = memory::measure(&mut rig)?;
    let mut figures = compare(&mut rig, plan)?;
    figures.extend(memory);
    figures.extend(lost::measure(&mut rig, plan)?);
    Ok(figures)
}

/// What is done on either side in turn.
#[derive(Clone, Copy, Debug)]
enum Work {
    Dial { near: bool, clients: usize },
    Exchange { connections: usize, size: Size },
    Send { near: bool, connections: usize },
}

struct Line {
    name: &'static str,
    unit: &'static str,
    goal: Option<Goal>,
    note: &'static str,
}

const fn line(name: &'static str, unit: &'static str, goal: Option<Goal>, note: &'static str) -> Line {
    Line { name, unit, goal, note }
}

const ONE: Work = Work::Dial { near: false, clients: 1 };
const EIGHT: Work = Work::Dial { near: false, clients: 8 };
const MANY: Work = Work::Dial { near: false, clients: 64 };
const PING: Work = Work::Exchange { connections: 1, size: Size::Byte };
const KEEP_ALIVE: Work = Work::Exchange { connections: 16, size: Size::Http };
const BULK: Work = Work::Send { near: false, connections: 1 };
const BULK_4: Work = Work::Send { near: false, connections: 4 };
const NEAR: Work = Work::Dial { near: true, clients: 1 };
const NEAR_BULK: Work = Work::Send { near: true, connections: 1 };
const NEAR_BULK_4: Work = Work::Send { near: true, connections: 4 };

/// Each work, and the figures of what [`Side::work`] says of it. The peer's CPU is told per new connection, 0.45 ms of
/// each of two; beside a direct one's 0.24 ms, as both CPUs are busy with 8,200 of them a second. For bulk it is the
/// throughput's ratio turned round: there too both CPUs are busy on either side.
const WORKS: &[(Work, &[Line])] = &[
    (
        ONE,
        &[
            line(
                "tunnel_connect_p50",
                "us",
                cheaper_than(4.8),
                "new connection and a byte there and back, 1 client, p50",
            ),
            line("tunnel_connect_p99", "us", cheaper_than(2.5), "the same, p99"),
        ],
    ),
    (
        EIGHT,
        &[
            line("tunnel_connects_8", "1/s", faster_than(0.22), "the same by 8 clients, per second"),
            line(
                "tunnel_connect_cpu",
                "us",
                cheaper_than(3.69),
                "CPU of both agents for one of these; baseline: of client and server without them",
            ),
            line("tunnel_connect_cpu_all", "us", None, "CPU of all processes for one of these"),
        ],
    ),
    (MANY, &[line("tunnel_connects_64", "1/s", None, "the same by 64 clients, per second")]),
    (
        PING,
        &[
            line("tunnel_rtt_p50", "us", cheaper_than(2.46), "a byte there and back, p50"),
            line("tunnel_rtt_p99", "us", cheaper_than(1.67), "the same, p99"),
        ],
    ),
    (
        KEEP_ALIVE,
        &[line(
            "tunnel_requests_16",
            "1/s",
            faster_than(0.174),
            "128 bytes there, 256 back, on 16 connections at once, per second",
        )],
    ),
    (
        BULK,
        &[
            line("tunnel_gbit_1", "Gbit/s", faster_than(0.28), "one stream of 1 MiB blocks"),
            line("tunnel_cpu_per_gb_1", "ms", cheaper_than(1.0 / 0.28), "CPU of all processes for one GB of that"),
        ],
    ),
    (
        BULK_4,
        &[
            line("tunnel_gbit_4", "Gbit/s", faster_than(0.20), "four streams"),
            line("tunnel_cpu_per_gb_4", "ms", cheaper_than(1.0 / 0.20), "CPU of all processes for one GB of that"),
        ],
    ),
    (
        NEAR,
        &[
            line(
                "tunnel_near_connect_p50",
                "us",
                cheaper_than(0.70 / 0.18),
                "new connection and a byte there and back to a pod of the same node, p50",
            ),
            line("tunnel_near_connect_p99", "us", cheaper_than(2.1 / 0.73), "the same, p99"),
        ],
    ),
    (
        NEAR_BULK,
        &[
            line("tunnel_near_gbit_1", "Gbit/s", faster_than(0.27), "one stream to a pod of the same node"),
            line("tunnel_near_cpu_per_gb_1", "ms", None, "CPU of all processes for one GB of that"),
        ],
    ),
    (
        NEAR_BULK_4,
        &[
            line("tunnel_near_gbit_4", "Gbit/s", None, "four streams to a pod of the same node"),
            line("tunnel_near_cpu_per_gb_4", "ms", None, "CPU of all processes for one GB of that"),
        ],
    ),
];

fn compare(rig: &mut TunnelRig, plan: &Plan) -> Result<Vec<Figure>> {
    let mut rounds: Vec<Vec<Rounds>> = WORKS.iter().map(|(_, lines)| vec![Rounds::default(); lines.len()]).collect();
    for round in 0..=plan.tunnel_rounds {
        for ((work, _), rounds_of_work) in WORKS.iter().zip(&mut rounds) {
            let mut of = |mesh: bool| {
                let side = if mesh { &mut rig.mesh } else { &mut rig.bare };
                side.work(*work, plan.tunnel_ms).with_context(|| format!("{work:?}, mesh: {mesh}"))
            };
            // None is always the one after the other.
            let (mesh, bare) = if round % 2 == 0 {
                let mesh = of(true)?;
                (mesh, of(false)?)
            } else {
                let bare = of(false)?;
                (of(true)?, bare)
            };
            // The first round opens what is kept.
            if round > 0 {
                for (rounds, (value, baseline)) in rounds_of_work.iter_mut().zip(mesh.into_iter().zip(bare)) {
                    rounds.push(value, baseline);
                }
            }
        }
    }
    let figures = WORKS.iter().zip(&rounds).flat_map(|((_, lines), rounds)| {
        lines.iter().zip(rounds).map(|(line, rounds)| {
            let figure = Figure::new(line.name, rounds.value(), line.unit)
                .against_with_ratio(rounds.baseline(), rounds.ratio())
                .note(format!("{}; baseline: without hitless", line.note));
            Figure { goal: line.goal, ..figure }
        })
    });
    Ok(figures.collect())
}

impl Side {
    /// Does it for so long, and says what its lines of [`WORKS`] are about.
    fn work(&mut self, work: Work, ms: u64) -> Result<Vec<f64>> {
        let before = self.cpu()?;
        let us = |ns: &[u64], q| quantile(ns, q) / 1000.0;
        match work {
            Work::Dial { near, clients } => {
                let to = self.to(near);
                let done: Timed = self.client.load(Load::Dial { to, clients, ms })?;
                if clients == 1 {
                    return Ok(vec![us(&done.ns, 0.5), us(&done.ns, 0.99)]);
                }
                let [agents, all] = self.cpu()?;
                let each = |cpu: std::time::Duration| cpu.as_secs_f64() * 1e6 / done.ns.len() as f64;
                // Without agents everything is what theirs is compared with.
                let (agents, all) = (each(agents - before[0]), each(all - before[1]));
                Ok(vec![done.per_second(), if agents == 0.0 { all } else { agents }, all])
            }
            Work::Exchange { connections, size } => {
                let set = self.set(false, connections)?;
                let done: Timed = self.client.load(Load::Exchange { set, size, ms })?;
                Ok(match size {
                    Size::Byte => vec![us(&done.ns, 0.5), us(&done.ns, 0.99)],
                    Size::Http => vec![done.per_second()],
                })
            }
            Work::Send { near, connections } => {
                let set = self.set(near, connections)?;
                let before = self.cpu()?;
                let moved: Moved = self.client.load(Load::Send { set, ms })?;
                let cpu = self.cpu()?[1] - before[1];
                Ok(vec![moved.gbit_per_s(), cpu.as_secs_f64() * 1e3 / (moved.bytes as f64 / 1e9)])
            }
        }
    }
}
