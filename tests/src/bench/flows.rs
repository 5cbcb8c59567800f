//! What a connection costs once it is there: bulk and ping-pong, plain and moved, against bare veth.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use super::{
    Plan, bpf,
    figure::{Figure, Goal},
    rig::{CLOSED_PORT, FLOW_PORT, Rig, live, vip},
    sample::{Rounds, quantile},
    wire::Target,
};

const PLAIN: u16 = 60;
const MOVED: u16 = 61;

const THROUGHPUT: Goal = Goal::RatioAtLeast(0.97);
const LATENCY: Goal = Goal::RatioAtMost(1.05);

pub fn measure(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let server = (rig.server_address, FLOW_PORT);
    rig.service(PLAIN, &[server])?;
    let bare_flow = rig.bare_client.open(Target::new((rig.bare_server_address, FLOW_PORT)), false)?;
    let plain_flow = rig.client.open(Target::new(vip(PLAIN)), false)?;

    // Flows that ended linger for 10 s; the agent's own proof made some.
    let rebound = rig.pins.rebound()?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while rebound.word(0).load(Ordering::SeqCst) != 0 {
        if Instant::now() > deadline {
            bail!("rebound flows are left after 30 s: plain flows are to be measured first without any");
        }
        std::thread::sleep(Duration::from_millis(100));
    }

    let mut figures = Vec::new();
    let plain = compare(rig, &[plain_flow], bare_flow, plan)?.remove(0);
    figures.extend(
        plain.figures(
            ["flow_gbit", "flow_rtt_p50"],
            "un-rebound flow, nothing rebound on the node; baseline: bare veth",
        ),
    );

    // The dead backend's and the live one's address differ, the pod behind them is the same.
    let words = rig.service(MOVED, &[(live(4_000), CLOSED_PORT), server])?;
    let moved_flow = rig.client.open(Target::new(vip(MOVED)).after_setting(&words), true)?;
    let compared = compare(rig, &[plain_flow, moved_flow], bare_flow, plan)?;
    figures.extend(compared[0].figures(
        ["flow_beside_rebound_gbit", "flow_beside_rebound_rtt_p50"],
        "un-rebound flow while another is rebound; baseline: bare veth",
    ));
    figures.extend(
        compared[1].figures(["rebound_flow_gbit", "rebound_flow_rtt_p50"], "rebound flow; baseline: bare veth"),
    );
    figures.push(program_time(rig, plain_flow, moved_flow, plan)?);
    Ok(figures)
}

/// What the tc programs of both pods take for one byte there and back.
fn program_time(rig: &mut Rig, plain_flow: usize, moved_flow: usize, plan: &Plan) -> Result<Figure> {
    let programs = ["hitless_tc_egress", "hitless_tc_ingress"].map(|name| rig.pins.using_our_maps(name));
    let [egress, ingress] = programs;
    let (egress, ingress) = (egress?, ingress?);
    let _counting = bpf::count_runs()?;
    let mut rounds = Rounds::default();
    for _ in 0..plan.flow_rounds {
        let mut per_ping = |flow| -> Result<f64> {
            let (out, (back, _)) = egress.during(|| ingress.during(|| rig.client.ping(flow, plan.pings)))?;
            Ok((out.ns + back.ns) as f64 / f64::from(plan.pings))
        };
        rounds.push(per_ping(moved_flow)?, per_ping(plain_flow)?);
    }
    Ok(Figure::new("rebound_flow_cpu", rounds.value(), "ns")
        .against_with_ratio(rounds.baseline(), rounds.ratio())
        .note("all runs of the tc programs of both pods for one byte there and back, rebound flow; baseline: un-rebound flow"))
}

#[derive(Default)]
struct Compared {
    gbit: Rounds,
    rtt: Rounds,
}

impl Compared {
    fn figures(&self, [gbit, rtt]: [&'static str; 2], what: &str) -> [Figure; 2] {
        let us = |ns: f64| ns / 1000.0;
        [
            Figure::new(gbit, self.gbit.value(), "Gbit/s")
                .against_with_ratio(self.gbit.baseline(), self.gbit.ratio())
                .goal(THROUGHPUT)
                .note(format!("one TCP stream, {what}")),
            Figure::new(rtt, us(self.rtt.value()), "us")
                .against_with_ratio(us(self.rtt.baseline()), self.rtt.ratio())
                .goal(LATENCY)
                .note(format!("one byte there and back, p50, {what}")),
        ]
    }
}

/// Every flow and the bare one in turn, each a little at a time.
fn compare(rig: &mut Rig, flows: &[usize], bare_flow: usize, plan: &Plan) -> Result<Vec<Compared>> {
    let mut compared: Vec<_> = flows.iter().map(|_| Compared::default()).collect();
    // What the first bytes of a connection learn (windows, buffers) is none of the figure.
    for flow in flows {
        rig.client.bulk(*flow, plan.bulk_ms)?;
    }
    rig.bare_client.bulk(bare_flow, plan.bulk_ms)?;
    for round in 0..plan.flow_rounds {
        for (flow, compared) in flows.iter().zip(&mut compared) {
            // None is always the one after the other.
            let order = if round % 2 == 0 { [false, true] } else { [true, false] };
            let (mut gbit, mut rtt) = ([0.0; 2], [0.0; 2]);
            for bare in order {
                let (worker, flow) = if bare { (&mut rig.bare_client, bare_flow) } else { (&mut rig.client, *flow) };
                gbit[usize::from(bare)] = worker.bulk(flow, plan.bulk_ms)?.gbit_per_s();
                rtt[usize::from(bare)] = quantile(&worker.ping(flow, plan.pings)?, 0.5);
            }
            compared.gbit.push(gbit[0], gbit[1]);
            compared.rtt.push(rtt[0], rtt[1]);
        }
    }
    Ok(compared)
}
