//! What the runs showed, as a table, as a timeline and as JSON.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{
    Mode, Options,
    rollout::{Carried, Run},
};

pub(super) fn print(options: &Options, runs: &[Run]) {
    let each = if options.keep_alive { "kept connections" } else { "a new connection each" };
    println!(
        "\n{} requests/s, {each}; {} pods, each replaced {} times; the control plane is late by {}\n",
        options.rate, options.pods, options.rounds, options.control_plane_delay
    );
    if options.mtls {
        println!("mTLS is on wherever there are agents: what the gateway says to pods is carried by them\n");
    }
    // In the mesh a connect ends at the agent in the gateway's own pod, and says nothing of the way to the other.
    let timed = if options.mtls { "request p50/p99/max" } else { "connect p50/p99/max" };
    print!("{:<8} {:>9} {:>7} {:>10} {timed:>22} {:>9}", "mode", "requests", "failed", "per death", "rebound");
    println!(
        "{}",
        if options.mtls { format!(" {:>9} {:>7} {:>9}", "tunnelled", "local", "re-picked") } else { String::new() }
    );
    for run in runs {
        let times = if options.mtls { run.latency } else { run.connect };
        let times = format!("{}/{}/{}", time(times.p50), time(times.p99), time(times.max));
        print!(
            "{:<8} {:>9} {:>7} {:>10.1} {times:>22} {:>9}",
            run.mode.name(),
            run.requests,
            run.failed,
            run.failed as f64 / run.deaths_us.len().max(1) as f64,
            run.rebound,
        );
        println!("{}", run.carried.map_or_else(String::new, carried));
    }
    println!("\n{}", if options.mtls { ABOUT_MTLS } else { ABOUT });
    for run in runs {
        for (reason, count) in &run.reasons {
            println!("  {:<8} {count:>6} x {reason}", run.mode.name());
        }
    }
    timeline(runs);
}

const ABOUT: &str = "Failures are the client's count; connect is the gateway's, to pods, where it succeeded.";
const ABOUT_MTLS: &str =
    "Failures and times are the client's, times where it succeeded. Tunnelled connections went to the other node in
mutual TLS, local ones to a pod of the gateway's node; re-picked ones found a pod dead and were given another.";

fn carried(carried: Carried) -> String {
    format!(" {:>9} {:>7} {:>9}", carried.tunnelled, carried.local, carried.repicked)
}

fn time(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}µs"),
        1_000..10_000 => format!("{:.1}ms", us as f64 / 1e3),
        10_000..1_000_000 => format!("{}ms", us / 1_000),
        _ => format!("{:.1}s", us as f64 / 1e6),
    }
}

/// Width of a column: as fine as 100 ms when that fits.
const COLUMNS: u64 = 100;
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

fn timeline(runs: &[Run]) {
    let longest = runs.iter().map(|run| run.end_us - run.start_us).max().unwrap_or(0);
    let column_us = longest.div_ceil(COLUMNS).div_ceil(100_000).max(1) * 100_000;
    let columns = (longest / column_us + 1) as usize;
    let bars: Vec<Vec<usize>> =
        runs.iter().map(|run| count(&run.failures_us, run.start_us, column_us, columns)).collect();
    let most = bars.iter().flatten().copied().max().unwrap_or(0).max(1);
    let mtls = if runs.iter().any(|run| run.carried.is_some()) { ", mTLS on where there are agents" } else { "" };
    println!("\nfailures per {} ms (█ = {most}), ▼ = a pod dies{mtls}", column_us / 1000);
    for (run, bars) in runs.iter().zip(&bars) {
        let deaths = count(&run.deaths_us, run.start_us, column_us, columns);
        let marks: String = deaths.iter().map(|&n| if n > 0 { '▼' } else { ' ' }).collect();
        let line: String = bars
            .iter()
            .map(|&n| if n == 0 { '·' } else { BLOCKS[(n * BLOCKS.len()).div_ceil(most).min(BLOCKS.len()) - 1] })
            .collect();
        println!("{:<8} {}\n{:<8} {line}", "", marks.trim_end(), run.mode.name());
    }
}

/// How many of `times` fall into each column.
pub(super) fn count(times: &[u64], start_us: u64, column_us: u64, columns: usize) -> Vec<usize> {
    let mut counts = vec![0; columns];
    for time in times {
        let column = (time.saturating_sub(start_us) / column_us) as usize;
        if let Some(count) = counts.get_mut(column) {
            *count += 1;
        }
    }
    counts
}

pub(super) fn write_json(path: &Path, runs: &[Run]) -> Result<()> {
    let text = serde_json::to_string_pretty(&figures(runs))?;
    std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
}

fn figures(runs: &[Run]) -> Value {
    let runs: Vec<_> = runs
        .iter()
        .map(|run| {
            let mut figures = json!({
                "mode": run.mode.name(),
                "mtls": run.carried.is_some(),
                "requests": run.requests,
                "failed": run.failed,
                "pod_deaths": run.deaths_us.len(),
                "rebound": run.rebound,
                "connect_us": { "p50": run.connect.p50, "p99": run.connect.p99, "max": run.connect.max },
                "latency_us": { "p50": run.latency.p50, "p99": run.latency.p99, "max": run.latency.max },
            });
            if let Some(Carried { tunnelled, local, repicked }) = run.carried {
                figures["connections"] = json!({ "tunnelled": tunnelled, "local": local, "repicked": repicked });
            }
            figures
        })
        .collect();
    json!({ "runs": runs })
}

/// The demo's promise: classic shows the problem, hitless does not have it, with mutual TLS or without.
pub(super) fn verdict(runs: &[Run]) -> bool {
    let mut good = true;
    for run in runs {
        match run.mode {
            Mode::Classic if run.failed == 0 => {
                eprintln!("classic lost no request: the problem was not reproduced");
                good = false;
            }
            Mode::Hitless if run.failed > 0 => {
                eprintln!("hitless lost {} requests: it should lose none", run.failed);
                good = false;
            }
            _ => {}
        }
        if run.carried.is_some_and(|carried| carried.tunnelled == 0) {
            eprintln!("{}: no connection went in mutual TLS", run.mode.name());
            good = false;
        }
    }
    good
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::rollout::Percentiles;

    #[test]
    fn the_json_has_the_promised_keys() {
        let connect = Percentiles { p50: 90, p99: 400, max: 900 };
        let run = Run { rebound: 7, deaths_us: vec![1, 2, 3], connect, ..Run::of(Mode::L3, 750, 2) };
        let json = figures(&[run]);
        let promised = json!({
            "mode": "l3", "requests": 750, "failed": 2, "pod_deaths": 3, "rebound": 7,
            "connect_us": {"p50": 90, "p99": 400, "max": 900},
        });
        let said = json["runs"][0].as_object().expect("an object");
        for (key, value) in promised.as_object().expect("an object") {
            assert_eq!(said.get(key), Some(value), "{key}");
        }
        let modes = [Mode::Classic, Mode::L1, Mode::L2, Mode::L3, Mode::Hitless].map(Mode::name);
        assert_eq!(modes, ["classic", "l1", "l2", "l3", "hitless"]);
    }

    #[test]
    fn a_demo_fails_when_classic_loses_nothing_or_hitless_something() {
        let good = |runs: &[(Mode, u64)]| {
            verdict(&runs.iter().map(|&(mode, failed)| Run::of(mode, 750, failed)).collect::<Vec<_>>())
        };
        assert!(good(&[(Mode::Classic, 25), (Mode::L2, 16), (Mode::Hitless, 0)]));
        assert!(!good(&[(Mode::Classic, 0), (Mode::Hitless, 0)]));
        assert!(!good(&[(Mode::Classic, 25), (Mode::Hitless, 1)]));
        assert!(good(&[(Mode::L1, 0), (Mode::L3, 0)]), "a layer alone promises nothing");
    }

    #[test]
    fn a_demo_of_mtls_fails_when_nothing_was_tunnelled() {
        let run = |tunnelled| {
            let carried = Some(Carried { tunnelled, local: 375, repicked: 6 });
            Run { carried, ..Run::of(Mode::Hitless, 750, 0) }
        };
        assert!(!verdict(&[run(0)]));
        assert!(verdict(&[run(375)]));
        let json = figures(&[run(375), Run::of(Mode::Classic, 750, 25)]);
        assert_eq!(json["runs"][0]["connections"], json!({"tunnelled": 375, "local": 375, "repicked": 6}));
        assert_eq!((&json["runs"][0]["mtls"], &json["runs"][1]["mtls"]), (&json!(true), &json!(false)));
    }
}
