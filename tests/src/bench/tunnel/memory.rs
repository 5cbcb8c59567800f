//! What the agents' memory is, and what a connection and a workload add to it.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context, Result};
use dataplane_user::model::{Event, Pod, Snapshot};

use super::rig::TunnelRig;
use crate::{
    bench::{
        feed::Feed,
        figure::{Figure, Goal},
        load::Load,
        scale::Usage,
    },
    lab::Agent,
};

/// Connections that are opened first: with them what is the same for any number.
const FIRST: usize = 500;
const CONNECTIONS: usize = 2_000;
const WORKLOADS: u32 = 50_000;

/// Of the peer.
const IDLE_MB: f64 = 17.0;
const CONNECTION_KB: f64 = 6.0;
const WORKLOAD_KB: f64 = 2.0;

pub fn measure(rig: &mut TunnelRig) -> Result<Vec<Figure>> {
    let (workloads, idle) = workloads(rig)?;
    let idle = Figure::new("tunnel_rss_idle", idle, "MB")
        .against(IDLE_MB)
        .goal(Goal::RatioAtMost(0.7))
        .note("VmRSS of an agent with the mesh on and without pods; baseline: the peer's");
    Ok([vec![idle, workloads], connections(rig)?].concat())
}

fn rss_kb(agent: &Agent) -> Result<f64> {
    Ok(Usage::of_process(agent.process())?.rss_mb * 1000.0)
}

/// Per open connection, on either side.
fn connections(rig: &mut TunnelRig) -> Result<Vec<Figure>> {
    let to = rig.mesh.far;
    let mut hold = |connections| rig.mesh.client.load::<usize>(Load::Hold { to, connections });
    let sets = [hold(FIRST)?, 0];
    let before = rig.agents.each_ref().map(rss_kb);
    let sets = [sets[0], hold(CONNECTIONS)?];
    let after = rig.agents.each_ref().map(rss_kb);
    for set in sets {
        rig.mesh.client.load::<()>(Load::Release { set })?;
    }
    let names = [("tunnel_connection_rss_out", "client's"), ("tunnel_connection_rss_in", "server's")];
    names
        .into_iter()
        .zip(before.into_iter().zip(after))
        .map(|((name, side), (before, after))| {
            let each = (after? - before?) / CONNECTIONS as f64;
            Ok(Figure::new(name, each, "kB").against(CONNECTION_KB).goal(Goal::RatioAtMost(0.7)).note(format!(
                "VmRSS of the agent on the {side} node for each of {CONNECTIONS} open connections; baseline: the peer's"
            )))
        })
        .collect()
}

/// Per workload of other nodes, and of an agent that knows none.
fn workloads(rig: &TunnelRig) -> Result<(Figure, f64)> {
    let agent = rig.another_agent()?;
    let mut feed = Feed::connect(agent.stream_path())?;
    feed.send(&Event::Sync { state: Snapshot::default() })?;
    agent.wait_ready()?;
    let idle = rss_kb(&agent)?;
    let pods = (0..WORKLOADS).map(|n| {
        let [_, b, c, d] = n.to_be_bytes();
        Pod {
            name: format!("ns-{}/web-{}-5d4f8c7b9c-{n:05}", n % 500, n / 10).into(),
            addresses: vec![Ipv4Addr::new(10, 100 + b, c, d).into()],
            netns: None,
            pid: None,
            enrolled: true,
            gateway: false,
            labels: Default::default(),
            stop_signals: Vec::new(),
            service_account: Some(format!("web-{}", n / 10).into()),
            terminating: false,
        }
    });
    let state = Snapshot { pods: pods.collect(), ..Snapshot::default() };
    feed.send(&Event::Sync { state })?;
    let all = rss_kb(&agent)? - idle;
    agent.process().sigterm()?;
    agent.process().wait_for(Duration::from_secs(10))?.context("the agent did not end within 10 s of SIGTERM")?;
    let figure = Figure::new("tunnel_workload_rss", all / f64::from(WORKLOADS), "kB")
        .against(WORKLOAD_KB)
        .goal(Goal::RatioAtMost(0.7))
        .note(format!(
            "VmRSS of an agent for each of {WORKLOADS} workloads of other nodes, 10 of them with one identity; baseline: the peer's"
        ));
    Ok((figure, idle / 1000.0))
}
