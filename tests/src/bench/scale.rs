//! The agent at the promised scale: 10,000 services, 100,000 backends, 1,000 pod changes a second.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use dataplane_user::model::{Backend, Event, Object, Service, Snapshot};

use super::{
    Plan,
    feed::{self, Feed, line},
    figure::{Figure, Goal},
    rig::{Rig, SERVICE_PORT},
    sample::{Rounds, quantile},
    worker::now_ns,
};
use crate::lab::{Agent, AgentOptions, Process};

pub(super) const SERVICES: u32 = 10_000;
pub(super) const BACKENDS: u32 = 100_000;
const PORT: u16 = 8080;
/// One service has a tenth of all backends, the others share the rest.
pub(super) const BIG: u32 = 10_000;
const CHANGES_PER_S: u64 = 1_000;

pub fn measure(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    // An agent of its own: nothing that was done before is in its memory.
    let agent = rig.lab.node(3).start_agent(AgentOptions::default())?;
    let mut feed = Feed::connect(agent.stream_path())?;
    let idle = Usage::of(&agent)?;
    let state = state();
    let big: Vec<_> = state.backends[..BIG as usize].to_vec();
    let small: Vec<_> = state.backends[BIG as usize..].to_vec();
    let sync = line(&Event::Sync { state })?;
    let megabytes = sync.len() as f64 / 1e6;
    let first = feed.send_line(&sync)?;
    let filled = Usage::of(&agent)?;
    let again = feed.send_line(&sync)?;
    drop(sync);
    let s = |ns: u64| ns as f64 / 1e9;
    let mut figures = vec![
        Figure::new("first_sync", s(first.round_trip_ns), "s")
            .against(s(first.lag_ns))
            .goal(Goal::ValueAtMost(1.0))
            .note(format!("{SERVICES} services, {BACKENDS} backends: {megabytes:.0} MB of JSON written to acknowledged; baseline: lag_ns of that event")),
        Figure::new("relist", s(again.round_trip_ns), "s").against(s(first.round_trip_ns)).note("the same again, nothing changed; baseline: the first"),
        Figure::new("first_sync_cpu", (filled.cpu - idle.cpu).as_secs_f64(), "s").note("CPU time of the agent for it"),
    ];
    figures.push(deletion(&mut feed, &big, &small, plan)?);
    figures.extend(churn(&agent, &mut feed, &small, plan)?);
    let usage = Usage::of(&agent)?;
    figures.push(Figure::new("rss", usage.rss_mb, "MB").against(idle.rss_mb).goal(Goal::ValueAtMost(100.0)).note(
        format!(
            "VmRSS of the agent with all that, after the changes (peak {:.0} MB); baseline: without any state",
            usage.peak_mb
        ),
    ));
    agent.process().sigterm()?;
    agent.process().wait_for(Duration::from_secs(10))?.context("the agent did not end within 10 s of SIGTERM")?;
    Ok(figures)
}

fn name(service: u32) -> String {
    format!("scale/s{service}")
}

/// Backends of service 0 first.
fn state() -> Snapshot {
    let address = |n: u32, prefix: u8| -> IpAddr {
        let [_, b, c, d] = n.to_be_bytes();
        Ipv4Addr::new(prefix, b, c, d).into()
    };
    let services: Vec<Service> = (0..SERVICES).map(|n| feed::service(&name(n), address(n, 11), SERVICE_PORT)).collect();
    let service_of = |n: u32| if n < BIG { 0 } else { 1 + n % (SERVICES - 1) };
    let backends: Vec<Backend> = (0..BACKENDS)
        .map(|n| Backend {
            service: services[service_of(n) as usize].name.clone(),
            ..feed::backend("", address(n, 12), PORT)
        })
        .collect();
    Snapshot { services, backends, ..Snapshot::default() }
}

/// One backend leaves a service of 10,000, and one a service of about 9.
fn deletion(feed: &mut Feed, big: &[Backend], small: &[Backend], plan: &Plan) -> Result<Figure> {
    let mut one = |backend: &Backend| -> Result<f64> {
        // By itself, as deletions come: what comes at once is churn.
        std::thread::sleep(Duration::from_micros(200));
        let lag = feed.send(&feed::delete(backend))?.lag_ns;
        feed.send(&feed::upsert(Object::Backend(backend.clone())))?;
        Ok(lag as f64 / 1000.0)
    };
    let mut rounds = Rounds::default();
    for n in 0..plan.deletions as usize {
        // Anywhere in the service but its end.
        let value = one(&big[(n * 7919) % big.len()])?;
        rounds.push(value, one(&small[(n * 7919) % small.len()])?);
    }
    Ok(Figure::new("deletion_of_10000", rounds.value(), "us")
        .against_with_ratio(rounds.baseline(), rounds.value() / rounds.baseline())
        .goal(Goal::RatioAtMost(1.5))
        .note("one deletion from a service of 10,000, read to written; baseline: from one of 9"))
}

/// A pod goes or comes every millisecond.
fn churn(agent: &Agent, feed: &mut Feed, backends: &[Backend], plan: &Plan) -> Result<[Figure; 4]> {
    let mut lags = Vec::new();
    let mut round_trips = Vec::new();
    let before = Usage::of(agent)?;
    let start = Instant::now();
    let mut late = 0u64;
    let mut changes = 0;
    'seconds: loop {
        for backend in backends {
            for event in [feed::delete(backend), feed::upsert(Object::Backend(backend.clone()))] {
                let due = start + Duration::from_micros(changes * 1_000_000 / CHANGES_PER_S);
                if due.saturating_duration_since(start) >= plan.churn {
                    break 'seconds;
                }
                match due.checked_duration_since(Instant::now()) {
                    Some(wait) => std::thread::sleep(wait),
                    None => late += 1,
                }
                let due_ns = now_ns();
                let ack = feed.send(&event)?;
                lags.push(ack.lag_ns);
                round_trips.push(now_ns() - due_ns);
                changes += 1;
            }
        }
    }
    let length = start.elapsed().as_secs_f64();
    let cpu = (Usage::of(agent)?.cpu - before.cpu).as_secs_f64() / length;
    let us = |samples: &[u64], q| quantile(samples, q) / 1000.0;
    let rate = changes as f64 / length;
    Ok([
        Figure::new("churn_lag_p50", us(&lags, 0.5), "us")
            .goal(Goal::ValueAtMost(20.0))
            .note(format!("event read to map changed at {rate:.0} pod changes/s for {length:.0} s ({late} sent late)")),
        Figure::new("churn_lag_p99", us(&lags, 0.99), "us").goal(Goal::ValueAtMost(100.0)).note("the same, p99"),
        Figure::new("churn_round_trip_p99", us(&round_trips, 0.99), "us").note("written to acknowledged, p99"),
        Figure::new("churn_cpu", cpu * 100.0, "%").note("of one CPU, the agent's during that"),
    ])
}

/// What the agent's process has used so far.
pub(super) struct Usage {
    pub cpu: Duration,
    pub rss_mb: f64,
    pub peak_mb: f64,
}

impl Usage {
    fn of(agent: &Agent) -> Result<Self> {
        Self::of_process(agent.process())
    }

    pub(super) fn of_process(process: &Process) -> Result<Self> {
        Self::of_pid(process.pid())
    }

    pub(super) fn of_pid(pid: i32) -> Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            std::fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        let status = read("status")?;
        let mb = |key: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no {key}"))?;
            Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1000.0)
        };
        let stat = read("stat")?;
        // The fields after the name, which may hold spaces; the 14th and 15th of all.
        let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 =
            fields.get(11..13).context("short /proc/pid/stat")?.iter().map(|n| n.parse().unwrap_or(0)).sum();
        // SAFETY: sysconf takes no pointer.
        let hz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as f64;
        Ok(Self { cpu: Duration::from_secs_f64(ticks as f64 / hz), rss_mb: mb("VmRSS:")?, peak_mb: mb("VmHWM:")? })
    }
}
