//! What a connection costs whose first backend is gone: it refuses, or its node went without a word.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::rig::TunnelRig;
use crate::bench::{
    Plan,
    figure::{Figure, Goal},
    sample::{Rounds, quantile},
    wire::Target,
};

/// Connects per round.
const DIALS: u32 = 40;
/// A connect that took so long met the silent node.
const SILENCE: Duration = Duration::from_millis(100);
/// Of two backends, so often in a row only the one that lives is met once in a million times.
const TRIES: u32 = 20;
const BACK_WITHIN: Duration = Duration::from_secs(20);

pub fn measure(rig: &mut TunnelRig, plan: &Plan) -> Result<Vec<Figure>> {
    Ok(vec![repick(rig, plan)?, silence(rig, plan)?])
}

/// Which of them were tried twice, the agent's counter says: the slowest so many.
fn repick(rig: &mut TunnelRig, plan: &Plan) -> Result<Figure> {
    let (mut rounds, mut all) = (Rounds::default(), 0);
    for _ in 0..plan.tunnel_rounds.max(2) {
        let repicked = |rig: &TunnelRig| rig.agents[0].tunnel().map(|counts| counts["outbound_repicked"]);
        let before = repicked(rig)?;
        let mixed = rig.mesh.client.dials(rig.half_dead.clone(), DIALS)?;
        let tried_twice = repicked(rig)? - before;
        let straight = rig.mesh.client.dials(Target::new(rig.mesh.far), DIALS)?;
        if tried_twice == 0 {
            continue;
        }
        all += tried_twice;
        let median_of_slowest = quantile(&mixed, 1.0 - tried_twice as f64 / f64::from(DIALS) / 2.0);
        rounds.push(median_of_slowest / 1000.0, quantile(&straight, 0.5) / 1000.0);
    }
    Ok(Figure::new("tunnel_repick_p50", rounds.value(), "us")
        .against_with_ratio(rounds.baseline(), rounds.ratio())
        .note(format!(
            "new connection and a byte whose first backend refuses, done on another ({all}); baseline: not refused"
        )))
}

fn silence(rig: &mut TunnelRig, plan: &Plan) -> Result<Figure> {
    let mut worst = Duration::ZERO;
    for _ in 0..plan.silences.max(1) {
        // Both have a connection to the node that dies.
        rig.mesh.client.dials(Target::new(rig.mesh.far), 20)?;
        rig.lab.node(2).cut_cable()?;
        let met = (0..TRIES).find_map(|_| match rig.mesh.client.dials(rig.both.clone(), 1) {
            Ok(ns) => Some(Ok(Duration::from_nanos(ns[0]))).filter(|ns| !matches!(ns, Ok(ns) if *ns < SILENCE)),
            Err(error) => Some(Err(error)),
        });
        rig.lab.node(2).restore_cable()?;
        let Some(met) = met else { bail!("{TRIES} connects in a row did not meet the silent node") };
        worst = worst.max(met?);
        let deadline = Instant::now() + BACK_WITHIN;
        while let Err(error) = rig.mesh.client.dials(Target::new(rig.mesh.far), 1) {
            if Instant::now() > deadline {
                return Err(error.context("the node is back and was not reached"));
            }
        }
    }
    Ok(Figure::new("tunnel_silent_node_worst", worst.as_secs_f64() * 1000.0, "ms").goal(Goal::ValueAtMost(300.0)).note(
        format!(
            "first byte from another node's backend when the first one's node is silent, worst of {}",
            plan.silences
        ),
    ))
}
