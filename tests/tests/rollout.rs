//! Rolling updates under load: nobody notices.

use std::{collections::VecDeque, thread, time::Duration};

use anyhow::Result;
use hitless_tests::lab::{
    Topology,
    net::Family,
    scene::{Scene, SceneSpec, Storm, Web},
};

const ROLLOUTS: usize = 20;
const CONNECTIONS: usize = 100_000;
const PODS: usize = 3;
/// How late the control plane tells of a death.
const LATE: Duration = Duration::from_secs(5);

/// How many the kernel has seen established.
fn connections(scene: &Scene) -> Result<u64> {
    scene.counter("connects_established")
}

/// 100,000 connections at full speed while every pod is replaced 20 times, the control plane 5 s late.
fn a_storm_loses_nothing(family: Family, topology: Topology) -> Result<()> {
    let mut scene = Scene::new(&SceneSpec { topology, webs: vec![], ..SceneSpec::default() })?;
    let mut webs: VecDeque<Web> = (0..PODS).map(|i| scene.add_web(1 + i % 2)).collect::<Result<_>>()?;
    let storm = Storm::start(&scene.client, scene.vip(family), 4)?;
    let mut late = Vec::new();
    let mut rollouts = 0;
    while rollouts < ROLLOUTS {
        for turn in 0..PODS {
            let old = webs.pop_front().expect("never empty");
            // The pod watch is quick (L1); what is late are the endpoints.
            let (new, ended) = scene.replace(old, 1 + (rollouts + turn) % 2, LATE)?;
            webs.push_back(new);
            late.push(ended);
        }
        rollouts += 1;
    }
    // A quick machine has made its 100,000 long ago and goes on; a slow one has to.
    while storm.running() && connections(&scene)? < CONNECTIONS as u64 {
        thread::sleep(Duration::from_millis(100));
    }
    let outcome = storm.end()?;
    eprintln!(
        "{} connections in {:.1} s, {} rebound, connect p50 {} µs, p99 {} µs, max {} µs",
        outcome.connections,
        outcome.seconds,
        scene.rebound()?,
        outcome.connect_p50_us,
        outcome.connect_p99_us,
        outcome.connect_max_us
    );
    assert_eq!((outcome.failed, &outcome.reasons), (0, &Default::default()), "of {}", outcome.connections);
    assert!(outcome.connections >= CONNECTIONS as u64, "{} connections", outcome.connections);
    for late in late {
        late.join().expect("no panic")?;
    }
    Ok(())
}

#[test]
fn a_storm_over_ipv4_loses_nothing() -> Result<()> {
    a_storm_loses_nothing(Family::V4, Topology::Bridge)
}

#[test]
fn a_storm_over_ipv6_loses_nothing() -> Result<()> {
    a_storm_loses_nothing(Family::V6, Topology::Routed)
}
