//! A cluster on one machine: nodes and pods are network namespaces joined by real veth.
//!
//! Everything a [`Lab`] makes carries its identifier in the name, so that one function,
//! [`cleanup::remove`], takes all of it down again: when the lab is dropped (also by a panic), on
//! Ctrl-C, and from another process by [`cleanup::sweep`] once the lab's process is gone.

pub mod agent;
pub mod cleanup;
pub mod control;
pub mod mesh;
pub mod net;
pub mod node;
pub mod packets;
pub mod pod;
pub mod process;
pub mod scene;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};

pub use self::{
    agent::{Agent, AgentOptions},
    control::ControlPlane,
    node::Node,
    pod::{Pod, PodOptions},
    process::{Exit, Process},
};
use self::{
    cleanup::LabId,
    net::{Family, Netns, ip},
    pod::Place,
};

/// How packets get from a pod to its node, and from node to node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Topology {
    /// Pods on a bridge that holds the gateway address (the CNI bridge plugin); nodes route to each other.
    #[default]
    Bridge,
    /// Each pod behind its own veth with a /32 route (Calico); nodes route to each other.
    Routed,
    /// Pods on a bridge; between nodes packets travel in VXLAN (Flannel).
    Vxlan,
}

#[derive(Clone, Copy, Debug)]
pub struct LabSpec {
    /// At most 200.
    pub nodes: usize,
    pub topology: Topology,
}

impl Default for LabSpec {
    fn default() -> Self {
        Self { nodes: 2, topology: Topology::default() }
    }
}

/// Names and places that all parts of one lab share.
#[derive(Debug)]
pub(crate) struct Site {
    pub id: LabId,
    pub spec: LabSpec,
    /// Logs, sockets and the private bpffs.
    pub dir: PathBuf,
    pub cgroup: PathBuf,
    /// The segment that joins the nodes: a bridge in a namespace of its own.
    pub fabric: Netns,
}

pub struct Lab {
    site: Arc<Site>,
    nodes: Vec<Node>,
    outside: Place,
}

impl Lab {
    pub fn new(spec: LabSpec) -> Result<Self> {
        cleanup::sweep()?;
        let id = cleanup::claim()?;
        let built = Self::build(id, spec);
        if built.is_err() {
            cleanup::remove(id);
        }
        built
    }

    fn build(id: LabId, spec: LabSpec) -> Result<Self> {
        let dir = id.dir();
        fs::create_dir_all(dir.join("logs")).with_context(|| format!("create {}", dir.display()))?;
        let bpffs = dir.join("bpf");
        fs::create_dir_all(&bpffs)?;
        nix::mount::mount(Some("bpf"), &bpffs, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount a bpffs at {} (root is needed)", bpffs.display()))?;
        let cgroup = id.cgroup()?;
        fs::create_dir_all(&cgroup).with_context(|| format!("create cgroup {}", cgroup.display()))?;

        let fabric = Netns::create(&id, "fabric")?;
        ip(
            Some(&fabric),
            "link set lo up\nlink add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\nlink set br0 up\n",
        )?;
        let site = Arc::new(Site { id, spec, dir, cgroup, fabric });
        let nodes = (1..=spec.nodes).map(|index| Node::new(site.clone(), index)).collect::<Result<Vec<_>>>()?;
        let outside = Self::outside_place(&site)?;
        Ok(Self { site, nodes, outside })
    }

    /// A machine on the nodes' segment that is no node: where a client of the cluster runs.
    fn outside_place(site: &Arc<Site>) -> Result<Place> {
        let netns = Netns::create(&site.id, "outside")?;
        net::join_segment(&site.fabric, &netns, "outside", 254)?;
        let mut routes = String::new();
        for index in 1..=site.spec.nodes {
            for family in Family::BOTH {
                let (pods, via) = (net::pod_subnet(family, index), net::underlay(family, index));
                routes.push_str(&format!("route add {pods} via {via} dev eth0\n"));
            }
        }
        ip(Some(&netns), &routes)?;
        Place::new(site.clone(), netns, site.cgroup.join("outside"), "outside")
    }

    pub fn id(&self) -> LabId {
        self.site.id
    }

    pub fn dir(&self) -> &Path {
        &self.site.dir
    }

    /// Nodes count from 1, like their addresses.
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index - 1]
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Sees whatever the nodes send each other.
    pub fn sniff_between_nodes(&self) -> Result<packets::Sniffer> {
        packets::Sniffer::new(&self.site.fabric)
    }

    pub fn outside(&self) -> &Place {
        &self.outside
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::env::var_os("HITLESS_LAB_KEEP").is_some() {
            eprintln!(
                "lab {} is kept (HITLESS_LAB_KEEP): remove it with `hitless-lab sweep` when this process is gone",
                self.site.id
            );
            return;
        }
        if std::thread::panicking() {
            self.print_logs();
        }
        cleanup::remove(self.site.id);
    }
}

impl Lab {
    /// The end of every process's log on stderr: what one wants to see when a test failed.
    pub fn print_logs(&self) {
        let mut logs: Vec<_> = fs::read_dir(self.site.dir.join("logs"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        logs.sort();
        for log in logs {
            let text = process::tail(&log, 30);
            if !text.is_empty() {
                eprintln!("--- {}\n{text}", log.file_name().unwrap_or_default().to_string_lossy());
            }
        }
    }
}
