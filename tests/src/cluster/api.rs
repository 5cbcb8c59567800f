//! An API server alone, and an agent that follows it from this machine: objects are what `kubectl` writes, and no
//! kubelet or controller changes them.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

use super::{ControlPlane, place::Place};
use crate::lab::Process;

/// How long the agent may take to show what the API server says.
const SHOWN_WITHIN: Duration = Duration::from_secs(10);

/// Ends, with its pins, before its API server does.
pub struct ApiAgent {
    process: Process,
    place: Place,
}

impl ApiAgent {
    /// An agent of `node-1`; it need not get ready.
    pub fn start(control: &ControlPlane, kubeconfig: &str) -> Result<Self> {
        Self::start_with(control, kubeconfig, "off")
    }

    pub fn start_with(control: &ControlPlane, kubeconfig: &str, metrics: &str) -> Result<Self> {
        let site = &control.site;
        let place = Place::new(&site.dir, "api", site.file("hitless"), &site.cgroup.join("system"))?;
        let mut args = place.run("node-1", &site.file(&format!("{kubeconfig}.kubeconfig")))?;
        args.extend(["--metrics-address", metrics, "--cri-socket", "off"].map(str::to_owned));
        Ok(Self { process: site.start("hitless", &control.netns, args)?, place })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn log(&self) -> String {
        self.process.log()
    }

    pub fn kill(&self) -> Result<()> {
        self.process.sigkill()?;
        self.process.wait().map(drop)
    }

    /// `hitless … --output json`.
    pub fn admin(&self, command: &[&str]) -> Result<Value> {
        self.place.ask(command)
    }

    /// Waits until an answer is as wanted.
    pub fn wait(&self, command: &[&str], what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        self.wait_within(SHOWN_WITHIN, command, what, wanted)
    }

    pub fn wait_within(
        &self,
        time: Duration,
        command: &[&str],
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + time;
        loop {
            let answer = self.admin(command);
            if let Ok(answer) = &answer
                && wanted(answer)
            {
                return Ok(answer.clone());
            }
            if Instant::now() > deadline {
                bail!("not within {time:?}: {what}; hitless {}: {answer:#?}\n{}", command.join(" "), self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Address and what is said of it, of every backend of a service: `10.1.0.1:8080 ready ready`.
    pub fn backends(&self, service: &str) -> Result<Vec<String>> {
        let rows = self.admin(&["endpoints", service])?;
        Ok(said(&rows))
    }

    /// Waits until a service has just these backends.
    pub fn wait_backends(&self, service: &str, wanted: &[&str]) -> Result<()> {
        self.wait(&["endpoints", service], &format!("{service} has {wanted:?}"), |rows| said(rows) == wanted).map(drop)
    }
}

fn said(rows: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let backends =
        rows.as_array().into_iter().flatten().map(|row| &row["backend"]).filter(|backend| backend.is_object());
    let mut all: Vec<_> = backends
        .map(|backend| {
            format!("{} {} {}", text(&backend["address"]), text(&backend["section"]), text(&backend["kernel"]))
        })
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}
