//! What the programs take, as the kernel itself counts it (`bpf_stats_enabled`). Not a test that asserts: run
//! with `--ignored --nocapture`.

use std::time::Duration;

use aya::{
    TestRun as _, TestRunOptions,
    programs::{ProgramInfo, SchedClassifier},
    sys::{Stats, enable_stats},
};
use dataplane_ebpf::abi::Stat;
use hitless_tests::lab::net::Family;

use crate::{
    bench::{Server, exchange, hear},
    forged::{Stage, ip, tcp},
};

/// Time and number of runs.
#[derive(Clone, Copy)]
struct Runs(Duration, u64);

impl Runs {
    fn of(program: &SchedClassifier) -> Self {
        let info: ProgramInfo = program.info().expect("loaded");
        Self(info.run_time(), info.run_count())
    }

    fn since(self, before: Self) -> Self {
        Self(self.0 - before.0, self.1 - before.1)
    }

    /// What is left for `n` of the runs, the others taking `idle_ns` each.
    fn ns_of(self, n: u64, idle_ns: f64) -> f64 {
        (self.0.as_nanos() as f64 - (self.1 - n) as f64 * idle_ns) / n as f64
    }
}

#[test]
#[ignore = "prints figures"]
fn costs() {
    let _stats = enable_stats(Stats::RunTime).expect("statistics");
    let mut stage = Stage::with(false);
    // A choice like any other: half of the connects meet the dead backend.
    for family in Family::BOTH {
        stage.bench.weigh_alike(family);
    }
    let bench = &stage.bench;
    let _live = Server::start(&bench.backends[1], b'b');
    for family in Family::BOTH {
        let c = stage.known_flow(family);
        let frame = ip(&c, 6, &tcp(&c, 0x10, 1, 1, 0, &[], &[7; 1000]));
        let idle = |program: &SchedClassifier| {
            let mut options = TestRunOptions::new();
            options.data_in = Some(&frame);
            options.repeat = 1_000_000;
            program.test_run(options).expect("runs").duration.as_nanos() as f64
        };
        let (out, back) = (idle(&stage.egress), idle(&stage.ingress));
        println!("{family:?}: a packet while nothing is moved: {out} ns out, {back} ns in");
    }
    for family in Family::BOTH {
        let before = (Runs::of(&stage.egress), Runs::of(&stage.ingress), bench.stat(Stat::ReboundRst));
        for _ in 0..2000 {
            hear(&mut bench.connect(family).expect("connects"));
        }
        let moved = bench.stat(Stat::ReboundRst) - before.2;
        let (egress, ingress) = (Runs::of(&stage.egress).since(before.0), Runs::of(&stage.ingress).since(before.1));
        println!(
            "{family:?}: 2000 connects, {moved} moved: {} runs out, {} in; {:?} out, {:?} in",
            egress.1, ingress.1, egress.0, ingress.0
        );
        let stream = loop {
            let before = bench.stat(Stat::ReboundRst);
            let mut stream = bench.connect(family).expect("connects");
            hear(&mut stream);
            if bench.stat(Stat::ReboundRst) > before {
                break stream;
            }
        };
        let before = (Runs::of(&stage.egress), Runs::of(&stage.ingress));
        exchange(&stream, 64);
        let data = (Runs::of(&stage.egress).since(before.0), Runs::of(&stage.ingress).since(before.1));
        let (out, back) = (data.0.ns_of(data.0.1, 0.0), data.1.ns_of(data.1.1, 0.0));
        println!(
            "{family:?}: a translated packet: {out:.0} ns out ({} of them), {back:.0} ns in ({})",
            data.0.1, data.1.1
        );
        println!(
            "{family:?}: a SYN {:.0} ns out; a replay {:.0} ns in, the others taken as translated ones",
            egress.ns_of(2000, out),
            ingress.ns_of(moved, back)
        );
    }
}
