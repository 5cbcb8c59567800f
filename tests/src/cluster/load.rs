//! Load from fortio, in a pod, counted there and read from the node's disk.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::{Cluster, image::FORTIO};

/// What to ask for, and how often.
#[derive(Clone, Debug)]
pub struct LoadSpec {
    pub name: String,
    pub url: String,
    pub qps: u32,
    pub connections: u32,
    pub time: Duration,
    /// Name of the node it runs on
    pub node: usize,
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    spec: LoadSpec,
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
    /// HTTP status, or -1 where there was no answer, and how often
    pub codes: BTreeMap<String, u64>,
}

impl Load {
    /// Starts asking; every request makes a connection of its own.
    pub fn start(cluster: &Cluster, namespace: &str, spec: LoadSpec) -> Result<Self> {
        let seconds = spec.time.as_secs();
        let LoadSpec { name, url, qps, connections, node, .. } = &spec;
        let labels = "app: load";
        cluster.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n\
             spec:\n  nodeName: node-{node}\n  restartPolicy: Never\n  terminationGracePeriodSeconds: 1\n  containers:\n\
             \x20 - name: fortio\n    image: {FORTIO}\n    imagePullPolicy: Never\n\
             \x20   args: [load, -quiet, -keepalive=false, -allow-initial-errors, -abort-on=-2, \"-qps={qps}\", \"-c={connections}\", \
             \"-t={seconds}s\", -timeout=3s, -nocatchup, -json=-, \"{url}\"]\n"
        ))?;
        let pod = format!("pod/{name}");
        cluster
            .kubectl(&["-n", namespace, "wait", "--for=jsonpath={.status.phase}=Running", &pod, "--timeout=30s"])
            .context("the load does not start")?;
        Ok(Self { spec, started: Instant::now() })
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits until its time is over.
    pub fn finish(self, cluster: &Cluster) -> Result<Outcome> {
        let deadline = self.started + self.spec.time + Duration::from_secs(30);
        let node = cluster.node(self.spec.node);
        loop {
            let log = node.container_log(&self.spec.name).unwrap_or_default();
            if let Some(report) = report(&log) {
                let requests: u64 = report.codes.values().sum();
                let good = report.codes.get("200").copied().unwrap_or_default();
                return Ok(Outcome { requests, failed: requests - good, qps: report.qps, codes: report.codes });
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
