//! hitless as its users run it: the DaemonSet of deploy/hitless.yaml, from an image, with the role that it brings.
//!
//! Changed is only what the lab's nodes make necessary: they share one machine, so each has a cgroup of its own below
//! the machine's root, and a BPF file system in its own mounts.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Cluster, Node, image::Image, parts, place::Place};
use crate::workload::agent_binary;

pub const IMAGE: &str = "hitless.test/hitless:1";
pub const DAEMON_SET: &str = "daemonset/hitless";
const MANIFEST: &str = "deploy/hitless.yaml";
const NAMESPACE: &str = "hitless-system";
const BPFFS: &str = "/run/bpf";

/// Installs it and waits until every node's agent is ready.
pub fn install(cluster: &Cluster) -> Result<()> {
    cluster.load(&Image::new(IMAGE, &["/hitless"]).program(&agent_binary()?, "/hitless")?)?;
    for node in cluster.nodes() {
        parts::run(node.command("mkdir").args(["-p", BPFFS]))?;
        parts::run(node.command("mount").args(["-t", "bpf", "bpf", BPFFS]))?;
    }
    // The API server of the lab does not announce itself.
    let control = &cluster.control;
    cluster.apply(&format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: kubernetes, namespace: default, \
         labels: {{kubernetes.io/service-name: kubernetes}}}}\naddressType: IPv4\n\
         ports: [{{name: https, port: {}}}]\nendpoints: [{{addresses: [{}]}}]\n",
        control.port, control.address
    ))?;
    cluster.apply(&manifest(cluster)?)?;
    wait(cluster)
}

/// Waits until the newest version of it runs on every node, and is ready.
pub fn wait(cluster: &Cluster) -> Result<()> {
    let status = kubectl(cluster, &["rollout", "status", DAEMON_SET, "--timeout=120s"]);
    status.map(drop).with_context(|| {
        let pods = kubectl(cluster, &["describe", "pods"]).unwrap_or_default();
        let logs = cluster.nodes().iter().map(|node| log(cluster, node).unwrap_or_default());
        format!("{pods}\n{}", logs.collect::<Vec<_>>().join("\n"))
    })
}

pub fn kubectl(cluster: &Cluster, args: &[&str]) -> Result<String> {
    cluster.kubectl(&[&["-n", NAMESPACE], args].concat())
}

/// The name of the node's agent's pod; of two, the newer one's.
pub fn pod(cluster: &Cluster, node: &Node) -> Result<String> {
    let (field, name) = (format!("spec.nodeName={}", node.name), "jsonpath={.items[-1:].metadata.name}");
    let by_age = "--sort-by=.metadata.creationTimestamp";
    let name = kubectl(cluster, &["get", "pods", "--field-selector", &field, by_age, "-o", name]);
    name.with_context(|| format!("no pod of {DAEMON_SET} on {}", node.name))
}

/// What the node's agent printed.
pub fn log(cluster: &Cluster, node: &Node) -> Result<String> {
    node.container_log(&pod(cluster, node)?)
}

/// `hitless … --output json`, of the node's agent: its socket is in the node's /run.
pub fn admin(node: &Node, command: &[&str]) -> Result<Value> {
    Place::of_state_dir(&node.dir.join("run/hitless")).ask(command)
}

/// Waits until a pod's connections are hitless's business.
pub fn wait_enrolled(node: &Node, pod: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = admin(node, &["status"])?;
        let pods = status["pods"].as_array();
        let served = |row: &Value| row["enrolled"] == true && row["attached"] == true;
        if pods.into_iter().flatten().any(|row| row["name"] == pod && served(row)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{pod} was not enrolled within 20 s: {:#}", status["pods"]);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// deploy/hitless.yaml for the lab.
fn manifest(cluster: &Cluster) -> Result<String> {
    let mut text = read()?;
    let cgroup: PathBuf = cluster.node(1).cgroup.parent().context("a node's cgroup has a parent")?.into();
    let image = text.lines().find_map(|line| line.trim().strip_prefix("image: ")).context("no image")?.to_owned();
    for (what, instead) in [
        (format!("image: {image}"), format!("image: {IMAGE}")),
        ("imagePullPolicy: IfNotPresent".into(), "imagePullPolicy: Never".into()),
        (
            "            - run\n".into(),
            "            - run\n            - --cgroup=/host/cgroup/$(HITLESS_NODE_NAME)\n".into(),
        ),
        // Both nodes' agents are on one machine: their maps are told apart by their bpffs alone.
        ("            path: /sys/fs/bpf\n".into(), format!("            path: {BPFFS}\n")),
        ("            path: /sys/fs/cgroup\n".into(), format!("            path: {}\n", cgroup.display())),
    ] {
        ensure!(text.contains(&what), "{MANIFEST}: no {what:?}");
        text = text.replace(&what, &instead);
    }
    Ok(text)
}

/// The first object of a kind in it, as it is.
pub fn shipped(kind: &str) -> Result<String> {
    let text = read()?;
    let mut objects = text.split("\n---\n");
    let object = objects.find(|object| object.lines().any(|line| line.strip_prefix("kind: ") == Some(kind)));
    object.map(str::to_owned).with_context(|| format!("{MANIFEST}: no {kind}"))
}

fn read() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(MANIFEST);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}
