//! What moving a connect to another backend costs: CPU of the replay, time of the connect.

use anyhow::{Result, bail};
use dataplane_ebpf::abi::Stat;

use super::{
    Plan, bpf,
    figure::{Figure, Goal},
    rig::{CLOSED_PORT, CONNECT_PORT, Rig, live, silent, vip},
    sample::{Rounds, median, quantile},
    wire::Target,
};

const ALL_DEAD: u16 = 50;
const HALF_DEAD: u16 = 52;
const HALF_SILENT: u16 = 53;

pub fn measure(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let mut figures = replay_cpu(rig, plan)?.to_vec();
    figures.extend(rebound_connect(rig, plan)?);
    figures.push(silent_backend(rig, plan)?);
    Ok(figures)
}

/// A client whose every try is refused receives nothing but RSTs: as many as it has tries, and the
/// last is let through. What one more try costs is a replay, with the change to the RST that is let
/// through: of a moved flow, it is rewritten.
fn replay_cpu(rig: &mut Rig, plan: &Plan) -> Result<[Figure; 2]> {
    let dead: Vec<_> = (0..8).map(|n| (live(23_000 + n), CLOSED_PORT)).collect();
    let words = rig.service(ALL_DEAD, &dead)?;
    let ingress = rig.pins.using_our_maps("hitless_tc_ingress")?;
    // One client's word would soon count no more, and suspecting is part of the cost.
    let mut settings = rig.trust_one_client()?;
    let _counting = bpf::count_runs()?;
    let [mut through, mut first, mut later] = [const { Vec::new() }; 3];
    for _ in 0..plan.rounds * plan.replays / BATCH {
        let mut ns = [0.0; 3];
        for (replays, ns) in [0, 1, 3].into_iter().zip(&mut ns) {
            settings.set_max_replays(replays);
            let before = rig.pins.stat(Stat::ReboundRst)?;
            let target = Target::new(vip(ALL_DEAD)).after_setting(&words);
            let (took, refused) = ingress.during(|| rig.client.connects(vec![target], BATCH))?;
            let replayed = rig.pins.stat(Stat::ReboundRst)? - before;
            if refused[0].failed != BATCH || replayed != u64::from(replays * BATCH) {
                bail!("{replayed} replays in {BATCH} connects of {} tries: {refused:?}", replays + 1);
            }
            *ns = took.ns as f64 / f64::from(BATCH);
        }
        through.push(ns[0]);
        first.push(ns[1] - ns[0]);
        later.push((ns[2] - ns[1]) / 2.0);
    }
    let (first, through) = (median(&first), median(&through));
    Ok([
        Figure::new("syn_replay_cpu", first, "ns")
            .against(through)
            .goal(Goal::ValueAtMost(2000.0))
            .note("hitless_tc_ingress on a RST that it turns into the SYN to another backend; baseline: on a RST that it lets through"),
        Figure::new("syn_replay_again_cpu", median(&later), "ns")
            .against(first)
            .goal(Goal::ValueAtMost(2000.0))
            .note("the same, second and third replay of a connect; baseline: the first"),
    ])
}

/// Connects per reading of the counters: few, so that most readings hold no other process.
const BATCH: u32 = 10;

/// Of two backends one refuses: the choice itself makes half of the connects direct, half rebound.
fn rebound_connect(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let words = rig.service(HALF_DEAD, &[(live(23_500), CLOSED_PORT), (live(23_501), CONNECT_PORT)])?;
    let _trusting = rig.trust_one_client()?;
    let mut rounds = Rounds::default();
    let [mut rebound, mut direct] = [const { Vec::new() }; 2];
    for _ in 0..plan.rounds {
        let done = rig.connects(Target::new(vip(HALF_DEAD)).after_setting(&words), plan.connects)?;
        if done.rebound_ns.len() * 10 < done.count() {
            bail!("only {} of {} connects were rebound", done.rebound_ns.len(), done.count());
        }
        rounds.push(quantile(&done.rebound_ns, 0.5), quantile(&done.direct_ns, 0.5));
        rebound.extend(done.rebound_ns);
        direct.extend(done.direct_ns);
    }
    let us = |ns: f64| ns / 1000.0;
    Ok(vec![
        Figure::new("rebound_connect_p50", us(rounds.value()), "us")
            .against_with_ratio(us(rounds.baseline()), rounds.ratio())
            .note(format!(
                "connect refused by one backend, done on another ({}); baseline: not refused ({})",
                rebound.len(),
                direct.len()
            )),
        Figure::new("rebound_connect_p99", us(quantile(&rebound, 0.99)), "us")
            .against(us(quantile(&direct, 0.99)))
            .note("the same, p99"),
    ])
}

/// A backend that says nothing, against what TCP does by itself when its first SYN is lost.
fn silent_backend(rig: &mut Rig, plan: &Plan) -> Result<Figure> {
    let words = rig.service(HALF_SILENT, &[(silent(1), CONNECT_PORT), (live(23_600), CONNECT_PORT)])?;
    let _trusting = rig.trust_one_client()?;
    let mut rebound = Vec::new();
    let tries = plan.silent * 8;
    for _ in 0..tries {
        rebound.extend(rig.connects(Target::new(vip(HALF_SILENT)).after_setting(&words), 1)?.rebound_ns);
        if rebound.len() >= plan.silent as usize {
            break;
        }
    }
    if rebound.is_empty() {
        bail!("none of {tries} connects met the silent backend");
    }
    let without = rig.first_syn_lost()?;
    let ms = |ns: f64| ns / 1e6;
    Ok(Figure::new("silent_backend_connect_worst", ms(quantile(&rebound, 1.0)), "ms")
        .against(ms(without as f64))
        .goal(Goal::ValueAtMost(300.0))
        .note(format!(
            "connect whose first backend never answers, worst of {}; baseline: no hitless, a backend that misses the first SYN only",
            rebound.len()
        )))
}
