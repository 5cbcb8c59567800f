//! hitless on a node of the cluster: the real `hitless run` in the node's network, over the groups of the node's pods,
//! told by the API.

use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use serde_json::Value;

use super::{Cluster, Node};
use crate::lab::Process;

/// A user that may look at what hitless needs, and do nothing.
const USER: &str = "hitless";

pub struct Agent {
    process: Process,
    place: Vec<String>,
    pub node: usize,
}

impl Agent {
    /// Returns when every hook is proved and the state of the cluster is in force. Needs [`permit`].
    pub fn start(node: &Node, args: &[&str]) -> Result<Self> {
        let ready = node.dir.join("agent.ready");
        // An agent that was killed could not tidy up.
        let _ = std::fs::remove_file(&ready);
        let site = node.dir.parent().context("a node's directory is in the cluster's")?;
        let (bpffs, kubeconfig) = (site.join("bpf"), site.join(format!("{USER}.kubeconfig")));
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
        let api =
            [("--source", "kube".into()), ("--node-name", node.name.clone()), ("--kubeconfig", text(&kubeconfig))];
        all.extend(api.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        all.extend(["--ready-file".into(), text(&ready)]);
        if !args.contains(&"--cri-socket") {
            all.extend(["--cri-socket".into(), text(&node.containerd_socket())]);
        }
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        // What the suites lose without some or all of them.
        if let Ok(layers) = std::env::var("HITLESS_CLUSTER_LAYERS") {
            all.extend(["--layers".into(), layers]);
        }
        let process = node.host_process("hitless", all)?;
        process.wait_for_file(&ready)?;
        Ok(Self { process, place, node: node.index })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// `hitless … --output json`.
    pub fn admin(&self, command: &[&str]) -> Result<Value> {
        serde_json::from_slice(&self.ask(command)?).context("hitless prints JSON")
    }

    /// The same of a command that prints a line for each.
    pub fn rows(&self, command: &[&str]) -> Result<Vec<Value>> {
        let rows = serde_json::Deserializer::from_slice(&self.ask(command)?).into_iter().collect::<Result<_, _>>();
        rows.context("hitless prints lines of JSON")
    }

    fn ask(&self, command: &[&str]) -> Result<Vec<u8>> {
        let output = Command::new(crate::workload::agent_binary()?)
            .args(command)
            .args(["--output", "json"])
            .args(&self.place)
            .output()?;
        if !output.status.success() {
            // With JSON, the reason is where the answer would have been.
            let [printed, errors] =
                [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
            let log = if self.process.running() { String::new() } else { format!("it ended:\n{}", self.process.log()) };
            bail!("hitless {} failed: {printed}{errors}{log}", command.join(" "));
        }
        Ok(output.stdout)
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
            if row.is_some_and(|row| row["enrolled"] == true && row["attached"] == true) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{pod} was not enrolled within 20 s: {row:?}\n{}", self.process.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Lets agents look at what they need.
pub fn permit(cluster: &Cluster) -> Result<()> {
    cluster.control.write_kubeconfig(USER)?;
    let (role, group) = ("rbac.authorization.k8s.io/v1", "rbac.authorization.k8s.io");
    cluster.apply(&format!(
        "apiVersion: {role}\nkind: ClusterRole\nmetadata: {{name: {USER}}}\nrules:\n\
         - {{apiGroups: [\"\"], resources: [pods, services, namespaces, nodes], verbs: [list, watch]}}\n\
         - {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}\n---\n\
         apiVersion: {role}\nkind: ClusterRoleBinding\nmetadata: {{name: {USER}}}\n\
         roleRef: {{apiGroup: {group}, kind: ClusterRole, name: {USER}}}\n\
         subjects: [{{apiGroup: {group}, kind: User, name: {USER}}}]\n"
    ))
}
