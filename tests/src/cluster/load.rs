//! Load from fortio, in a pod, counted there and read from the node's disk.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use serde::Deserialize;

use super::{Cluster, image::FORTIO, node::PAUSE, trouble::wait_for};

/// The container that goes before the one that asks.
const GATE: &str = "gate";

/// How much to ask for.
#[derive(Clone, Copy, Debug)]
pub enum Amount {
    /// Requests a second, by so many clients
    Rate { qps: u32, clients: u32 },
    /// gRPC over so many connections that stay; on each a call is always under way, which fails when it is cut
    Streams(u32),
}

/// What to ask for, and from where.
#[derive(Clone, Debug)]
pub struct LoadSpec {
    pub name: String,
    pub url: String,
    pub amount: Amount,
    /// Name of the node it runs on
    pub node: usize,
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    spec: LoadSpec,
    container: String,
    started: Instant,
}

#[derive(Debug, Deserialize)]
struct Report {
    #[serde(rename = "RetCodes")]
    codes: BTreeMap<String, u64>,
    #[serde(rename = "ActualQPS")]
    qps: f64,
}

/// How it went.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub requests: u64,
    pub failed: u64,
    pub qps: f64,
    /// HTTP status, or -1 where there was no answer, and how often; of gRPC, SERVING or ERROR
    pub codes: BTreeMap<String, u64>,
    /// What it complained of, the first lines
    pub said: Vec<String>,
}

impl Load {
    /// Starts asking once its pod is `ready` for that, which is another's word: its first connects would else find
    /// whatever serves pods that hitless does not know yet. Every request makes a connection of its own.
    pub fn start(
        cluster: &Cluster,
        namespace: &str,
        spec: LoadSpec,
        ready: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        let LoadSpec { name, url, amount, node } = &spec;
        let amount = match amount {
            Amount::Rate { qps, clients } => {
                format!("-keepalive=false, -uniform, \"-qps={qps}\", \"-c={clients}\", -timeout=3s")
            }
            Amount::Streams(count) => format!("-grpc, -ping, -grpc-ping-delay=300ms, -qps=0, \"-c={count}\""),
        };
        let labels = "app: load";
        cluster.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n\
             spec:\n  nodeName: node-{node}\n  restartPolicy: Never\n  terminationGracePeriodSeconds: 1\n\
             \x20 initContainers: [{{name: {GATE}, image: {PAUSE}, imagePullPolicy: Never}}]\n  containers:\n\
             \x20 - name: fortio\n    image: {FORTIO}\n    imagePullPolicy: Never\n\
             \x20   args: [load, -quiet, -t=0, -allow-initial-errors, -abort-on=-2, {amount}, -nocatchup, -json=-, \"{url}\"]\n"
        ))?;
        let node = cluster.node(*node);
        let gate = wait_for("the load's pod", || Ok(node.container(name, GATE).ok()))?;
        ready()?;
        let container = wait_for("the load's start", || {
            // Its first moments hear no signal.
            let _ = node.kill(&gate, "SIGTERM");
            Ok(node.container(name, "fortio").ok())
        })?;
        Ok(Self { spec, container, started: Instant::now() })
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Ends it: a trouble takes as long as it takes, and the load outlasts it.
    pub fn stop(self, cluster: &Cluster) -> Result<Outcome> {
        let node = cluster.node(self.spec.node);
        node.kill(&self.container, "SIGINT")?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let log = node.container_log(&self.spec.name).unwrap_or_default();
            if let Some(report) = report(&log) {
                let requests: u64 = report.codes.values().sum();
                let good = ["200", "SERVING"].iter().filter_map(|code| report.codes.get(*code)).sum::<u64>();
                let complaints = log.lines().filter(|line| line.starts_with("{\"ts\"")).take(10);
                let said = complaints.map(str::to_owned).collect();
                return Ok(Outcome { requests, failed: requests - good, qps: report.qps, codes: report.codes, said });
            }
            if Instant::now() > deadline {
                bail!("the load {} printed no report in time:\n{log}", self.spec.name);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// fortio's JSON is somewhere among its lines.
fn report(log: &str) -> Option<Report> {
    let start = log.lines().position(|line| line == "{")?;
    let text: Vec<_> = log.lines().skip(start).collect();
    let text = text.join("\n");
    let mut reports = serde_json::Deserializer::from_str(&text).into_iter::<Report>();
    reports.next()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_found_among_other_lines_and_only_when_it_is_whole() {
        let log = "starting\n{\n \"RetCodes\": {\"200\": 3, \"-1\": 1},\n \"ActualQPS\": 2.5\n}\nend\n";
        assert_eq!(report(log).unwrap().codes["-1"], 1);
        assert!(report(&log[..30]).is_none());
    }
}
