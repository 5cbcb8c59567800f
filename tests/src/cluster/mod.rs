//! A real Kubernetes on one machine, without Docker: each node is a network and a mount namespace with its own
//! containerd and kubelet, joined to the control plane by veth, and everything is removed with the lab's means.

pub mod agent;
pub mod api;
pub mod command;
pub mod control;
pub mod daemonset;
pub mod gateway;
pub mod image;
pub mod istio;
pub mod load;
pub mod mesh;
pub mod node;
pub mod parts;
pub mod place;
pub mod rolled;
pub mod scene;
pub mod shared;
pub mod trouble;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

pub use self::{
    control::{ControlPlane, ControlSpec, Site},
    image::Image,
    node::Node,
};
use crate::lab::net::{self, Family, Netns, ip};

pub const MAX_NODES: usize = 9;
/// The control plane's place on the segment.
const CONTROL_HOST: usize = 250;

/// What does the services' addresses where hitless does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum KubeProxy {
    Off,
    #[default]
    Iptables,
    Nftables,
}

/// The network plugin, of those that Debian packages: how pods are joined to their node. Nodes route to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Cni {
    /// A bridge per node, which has the gateway's address
    #[default]
    Bridge,
    /// A veth per pod, and a route to its address: as Calico does it
    Ptp,
}

#[derive(Clone, Debug)]
pub struct Spec {
    pub nodes: usize,
    pub kube_proxy: KubeProxy,
    pub cni: Cni,
    pub control: ControlSpec,
}

impl Default for Spec {
    fn default() -> Self {
        Self { nodes: 2, kube_proxy: KubeProxy::default(), cni: Cni::default(), control: ControlSpec::default() }
    }
}

/// The suites in full, for people who have the time: more rounds, and those that are ignored otherwise.
pub fn long() -> bool {
    std::env::var_os("HITLESS_CLUSTER_LONG").is_some()
}

/// Dropping it removes everything.
pub struct Cluster {
    // The nodes' processes end before the control plane's drop takes the places away.
    nodes: Vec<Node>,
    pub control: ControlPlane,
    /// What nodes and control plane send each other passes here
    fabric: Netns,
}

impl Cluster {
    pub fn start(spec: &Spec) -> Result<Self> {
        if spec.nodes == 0 || spec.nodes > MAX_NODES {
            bail!("a cluster has 1 to {MAX_NODES} nodes, not {}", spec.nodes);
        }
        parts::node_packages()?;
        if spec.kube_proxy == KubeProxy::Nftables {
            parts::needs(&["nft"], "nftables")?;
        }
        let site = Site::new()?;
        let id = site.id;
        let built = Self::build(site, spec);
        if built.is_err() {
            crate::lab::cleanup::remove(id);
        }
        built
    }

    fn build(site: Site, spec: &Spec) -> Result<Self> {
        let fabric = Netns::create(&site.id, "fabric")?;
        let bridge = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";
        ip(Some(&fabric), &format!("link set lo up\nlink add br0 {bridge}\nlink set br0 up\n"))?;
        let netns = Netns::create(&site.id, "control")?;
        net::join_segment(&fabric, &netns, "control", CONTROL_HOST)?;
        let address = net::underlay(Family::V4, CONTROL_HOST);
        let control = ControlPlane::start(site.clone(), netns, address, [6443, 2379], spec.control.clone())?;
        let mut nodes = Vec::new();
        for index in 1..=spec.nodes {
            nodes.push(Node::start(&control, &fabric, index, spec)?);
        }
        let cluster = Self { nodes, control, fabric };
        cluster.wait_nodes()?;
        Ok(cluster)
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index - 1]
    }

    pub fn node_mut(&mut self, index: usize) -> &mut Node {
        &mut self.nodes[index - 1]
    }

    pub fn dir(&self) -> &Path {
        &self.control.site.dir
    }

    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.control.kubectl(args)
    }

    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.control.apply(yaml)
    }

    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o", "json"], args].concat())?;
        serde_json::from_str(&text).context("kubectl's JSON")
    }

    /// On every node, so that any may run it.
    pub fn load(&self, image: &Image) -> Result<()> {
        let tar = image.build(self.dir())?;
        for node in &self.nodes {
            node.import(&tar)?;
        }
        Ok(std::fs::remove_file(tar)?)
    }

    fn wait_nodes(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            let nodes = self.get(&["nodes"])?;
            let ready = nodes["items"].as_array().into_iter().flatten().filter(|node| is_ready(node)).count();
            if ready == self.nodes.len() {
                break;
            }
            if Instant::now() > deadline {
                let logs: Vec<_> = self.nodes.iter().map(Node::logs).collect();
                bail!("{ready} of {} nodes are ready after 90 s\n{}", self.nodes.len(), logs.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        // Pods are refused until their namespace has its account.
        while self.kubectl(&["get", "serviceaccount", "default"]).is_err() {
            if Instant::now() > deadline {
                bail!("no default service account after 90 s");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }
}

fn is_ready(object: &Value) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}
