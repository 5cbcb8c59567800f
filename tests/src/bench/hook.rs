//! What the connect hook costs, as the kernel counts it (`BPF_ENABLE_STATS`), and what a connect costs.

use std::net::SocketAddr;

use anyhow::{Result, bail};

use super::{
    Plan,
    bpf::{self, Program},
    figure::{Figure, Goal},
    rig::{CONNECT_PORT, Rig, live, live6, nowhere, vip, vip6},
    sample::{Rounds, median, quantile},
    wire::{Request, Target, Worker},
};

const HOOK_NS: Goal = Goal::ValueAtMost(300.0);

/// Services of these figures.
const THREE: u16 = 20;
const HUNDRED: u16 = 21;
const TEN_THOUSAND: u16 = 22;
const THREE_V6: u16 = 23;
const NOWHERE: u16 = 24;

pub fn measure(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let addresses = |count: u32| (0..count).map(|n| (live(n), CONNECT_PORT)).collect::<Vec<_>>();
    rig.service(THREE, &addresses(3))?;
    rig.service(HUNDRED, &addresses(100))?;
    rig.service(TEN_THOUSAND, &addresses(10_000))?;
    rig.service(NOWHERE, &[3, 4, 5].map(|n| (nowhere(n), CONNECT_PORT)))?;
    rig.service(THREE_V6, &[1, 2, 3].map(|n| (live6(n), CONNECT_PORT)))?;

    let mut figures = hook_runs(rig, plan)?;
    figures.extend(connects(rig, plan)?);
    Ok(figures)
}

fn hook_runs(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let (hook4, hook6) = (rig.pins.linked("hitless_connect4")?, rig.pins.linked("hitless_connect6")?);
    let server: SocketAddr = (rig.server_address, CONNECT_PORT).into();
    let _counting = bpf::count_runs()?;
    let bounce = |fresh| Request::Bounce { to: vip(NOWHERE), count: BATCH, fresh };
    let [mut three, mut hundred, mut many, mut six, mut other, mut not_enrolled] = [const { Vec::new() }; 6];
    let [mut hot, mut fresh] = [const { Vec::new() }; 2];
    for _ in 0..plan.rounds * (plan.connects / BATCH) {
        three.push(mean(&hook4, &mut rig.client, vip(THREE))?);
        hundred.push(mean(&hook4, &mut rig.client, vip(HUNDRED))?);
        many.push(mean(&hook4, &mut rig.client, vip(TEN_THOUSAND))?);
        six.push(mean(&hook6, &mut rig.client, vip6(THREE_V6))?);
        other.push(mean(&hook4, &mut rig.client, server)?);
        not_enrolled.push(mean(&hook4, &mut rig.stranger, server)?);
        // The first few warm the caches up.
        rig.client.ask::<()>(&bounce(false))?;
        hot.push(hook4.during(|| rig.client.ask::<()>(&bounce(false)))?.0.mean_ns());
        fresh.push(hook4.during(|| rig.client.ask::<()>(&bounce(true)))?.0.mean_ns());
    }
    let (small, idle, hot) = (median(&three), median(&not_enrolled), median(&hot));
    let figure = |name, value: f64, baseline: f64, note| {
        Figure::new(name, value, "ns").against(baseline).goal(HOOK_NS).note(note)
    };
    Ok(vec![
        figure(
            "connect_hook_hot",
            hot,
            idle,
            "service of 3, one socket connecting without pause, no packet; baseline: a process of no enrolled pod",
        ),
        figure(
            "connect_hook_new_socket",
            median(&fresh),
            hot,
            "the same with a new socket each: storage is made and freed; baseline: one socket",
        ),
        figure(
            "connect_hook_3",
            small,
            hot,
            "service of 3, whole TCP connects (cold caches); baseline: connect_hook_hot",
        ),
        figure("connect_hook_100", median(&hundred), small, "service of 100, whole connects; baseline: of 3"),
        figure("connect_hook_10000", median(&many), small, "service of 10,000, whole connects; baseline: of 3"),
        figure("connect_hook_v6", median(&six), small, "service of 3, IPv6, whole connects; baseline: IPv4"),
        figure(
            "connect_hook_other",
            median(&other),
            small,
            "enrolled pod, no service's address; baseline: service of 3",
        ),
        figure("connect_hook_stranger", idle, small, "process of no enrolled pod; baseline: enrolled, service of 3"),
    ])
}

/// Connects per reading of the counters: few, so that most readings hold no interrupt and no other process.
const BATCH: u32 = 20;

/// Mean run time of the hook over a batch of real connects.
fn mean(hook: &Program, client: &mut Worker, to: SocketAddr) -> Result<f64> {
    let (runs, _) = hook.during(|| client.connect_all(Target::new(to), BATCH))?;
    if runs.count < u64::from(BATCH) {
        bail!("{} ran {} times in {BATCH} connects to {to}", hook.name, runs.count);
    }
    Ok(runs.mean_ns())
}

/// The whole of a connect through a service, against the bare node's.
fn connects(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let bare_server = Target::new((rig.bare_server_address, CONNECT_PORT));
    let [mut service, mut direct] = [const { Vec::new() }; 2];
    let mut rounds = Rounds::default();
    for _ in 0..plan.rounds {
        let through = rig.client.connect_all(Target::new(vip(THREE)), plan.connects)?.direct_ns;
        let without = rig.bare_client.connect_all(bare_server.clone(), plan.connects)?.direct_ns;
        rounds.push(quantile(&through, 0.5), quantile(&without, 0.5));
        service.extend(through);
        direct.extend(without);
    }
    let us = |ns: f64| ns / 1000.0;
    Ok(vec![
        Figure::new("connect_p50", us(rounds.value()), "us")
            .against_with_ratio(us(rounds.baseline()), rounds.ratio())
            .note("TCP connect through a service, p50; baseline: to the address, no hitless"),
        Figure::new("connect_p99", us(quantile(&service, 0.99)), "us")
            .against(us(quantile(&direct, 0.99)))
            .note("the same, p99"),
    ])
}
