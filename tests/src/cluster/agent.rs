//! hitless on a node of the cluster: the real `hitless run` in the node's network, over the groups of the node's pods,
//! told by the API.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Cluster, Node, daemonset, place::Place};
use crate::lab::Process;

/// A user that may look at what hitless needs, and do nothing.
const USER: &str = "hitless";

pub struct Agent {
    process: Process,
    place: Place,
    /// Pods are served once they are in it
    mesh: bool,
    pub node: usize,
}

impl Agent {
    /// Returns when every hook is proved and the state of the cluster is in force. Needs [`permit`].
    pub fn start(node: &Node, args: &[&str]) -> Result<Self> {
        let ready = node.dir.join("agent.ready");
        // An agent that was killed could not tidy up.
        let _ = std::fs::remove_file(&ready);
        let site = node.dir.parent().context("a node's directory is in the cluster's")?;
        let place = Place::new(site, &node.name, node.dir.join("hitless"), &node.cgroup)?;
        let mut all = place.run(&node.name, &site.join(format!("{USER}.kubeconfig")))?;
        all.extend(["--ready-file".into(), ready.to_string_lossy().into_owned()]);
        if !args.contains(&"--cri-socket") {
            all.extend(["--cri-socket".into(), node.containerd_socket().to_string_lossy().into_owned()]);
        }
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        // What the suites lose without some or all of them.
        if let Ok(layers) = std::env::var("HITLESS_CLUSTER_LAYERS") {
            all.extend(["--layers".into(), layers]);
        }
        let process = node.host_process("hitless", all)?;
        process.wait_for_file(&ready)?;
        Ok(Self { process, place, mesh: args.contains(&"--mtls"), node: node.index })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// `hitless … --output json`, of an agent that must be alive.
    pub fn admin(&self, command: &[&str]) -> Result<Value> {
        if !self.process.running() {
            bail!("the agent of node-{} ended:\n{}", self.node, self.process.log());
        }
        self.place.ask(command)
    }

    /// The same of a command that prints a line for each.
    pub fn rows(&self, command: &[&str]) -> Result<Vec<Value>> {
        self.place.rows(command)
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
            let said = |what: &str| row.is_some_and(|row| row[what] == true);
            if said("enrolled") && said("attached") && (!self.mesh || said("inMesh")) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{pod} was not enrolled within 20 s: {row:?}\n{}", self.process.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Lets agents look at what they need: what the role in deploy/ lets them.
pub fn permit(cluster: &Cluster) -> Result<()> {
    cluster.control.write_kubeconfig(USER)?;
    let role = daemonset::shipped("ClusterRole")?;
    let group = "rbac.authorization.k8s.io";
    cluster.apply(&format!(
        "{role}\n---\napiVersion: {group}/v1\nkind: ClusterRoleBinding\nmetadata: {{name: {USER}}}\n\
         roleRef: {{apiGroup: {group}, kind: ClusterRole, name: hitless}}\n\
         subjects: [{{apiGroup: {group}, kind: User, name: {USER}}}]\n"
    ))
}
