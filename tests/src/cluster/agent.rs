//! hitless on a node of the cluster: the real `hitless run` in the node's network, over the groups of the node's pods.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use serde_json::Value;

use super::{Node, bridge::Bridge};
use crate::lab::{Process, agent::Stream};

pub struct Agent {
    process: Process,
    place: Vec<String>,
    pub node: usize,
}

impl Agent {
    /// Returns when every hook is proved and the state of the cluster is in force.
    pub fn start(node: &Node, bridge: &Bridge, args: &[&str]) -> Result<Self> {
        let (source, ready) = (node.dir.join("source.sock"), node.dir.join("agent.ready"));
        for stale in [&source, &ready] {
            let _ = std::fs::remove_file(stale);
        }
        let bpffs = node.dir.parent().context("a node's directory is in the cluster's")?.join("bpf");
        if !bpffs.exists() {
            std::fs::create_dir_all(&bpffs)?;
            mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).context("mount a bpffs")?;
        }
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let place = [
            ("--state-dir", text(&node.dir.join("hitless"))),
            ("--cgroup", text(&node.cgroup)),
            ("--bpffs", text(&bpffs)),
            ("--name", node.name.clone()),
        ];
        let place: Vec<_> = place.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
        let mut all = vec![text(&crate::workload::agent_binary()?), "run".into()];
        all.extend(place.iter().cloned());
        all.extend(["--source".into(), format!("stream:{}", source.display()), "--ready-file".into(), text(&ready)]);
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        // What the suites lose without some or all of them.
        if let Ok(layers) = std::env::var("HITLESS_CLUSTER_LAYERS") {
            all.extend(["--layers".into(), layers]);
        }
        let process = node.host_process("hitless", all)?;
        process.wait_for_file(&source)?;
        bridge.connect(node.index, Stream::connect(&source)?)?;
        process.wait_for_file(&ready)?;
        Ok(Self { process, place, node: node.index })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// `hitless … --output json`.
    pub fn admin(&self, command: &[&str]) -> Result<Value> {
        let output = Command::new(crate::workload::agent_binary()?)
            .args(command)
            .args(["--output", "json"])
            .args(&self.place)
            .output()?;
        if !output.status.success() {
            bail!("hitless {} failed: {}", command.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_slice(&output.stdout).context("hitless prints JSON")
    }

    /// The kernel's counters by name.
    pub fn counters(&self) -> Result<BTreeMap<String, u64>> {
        Ok(serde_json::from_value(self.admin(&["status"])?["counters"].clone())?)
    }

    pub fn wait_enrolled(&self, pod: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.admin(&["status"])?;
            let row = status["pods"].as_array().into_iter().flatten().find(|row| row["name"] == pod);
            if row.is_some_and(|row| row["enrolled"] == true) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{pod} was not enrolled within 20 s: {row:?}\n{}", self.process.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// As when the node's OOM killer takes it.
    pub fn kill(self) -> Result<()> {
        self.process.sigkill()?;
        self.process.wait().map(drop)
    }
}

/// A process of a pod on this node: the kubelet names groups by the pod's uid.
pub(super) fn pid_of(cgroup: &Path, uid: &str) -> Option<i32> {
    let name = format!("pod{uid}");
    let kubepods = cgroup.join("kubepods");
    let classes = ["", "burstable", "besteffort"].map(|class| kubepods.join(class).join(&name));
    let pod: PathBuf = classes.into_iter().find(|dir| dir.is_dir())?;
    let containers = std::fs::read_dir(pod).ok()?.flatten();
    let mut pids = containers.filter_map(|container| {
        let procs = std::fs::read_to_string(container.path().join("cgroup.procs")).ok()?;
        procs.lines().next()?.parse().ok()
    });
    pids.next()
}
