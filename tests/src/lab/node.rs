//! A node: a network namespace that forwards between its pods and the segment that joins nodes.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use anyhow::Result;

use super::{
    Site, Topology,
    agent::{Agent, AgentOptions},
    net::{self, Family, Netns, ip},
    pod::{Place, Pod, PodOptions},
};

pub struct Node {
    pub(super) site: Arc<Site>,
    pub name: String,
    pub index: usize,
    /// The node itself: where its host-network processes run.
    pub host: Place,
    next_pod: AtomicU16,
}

/// The device of VXLAN number 1 on every node.
const VXLAN_DEVICE: &str = "vxlan1";
/// What VXLAN's outer headers take (RFC 7348: 50 bytes over IPv4).
const VXLAN_MTU: u32 = 1450;

impl Node {
    pub(super) fn new(site: Arc<Site>, index: usize) -> Result<Self> {
        let name = format!("node-{index}");
        let netns = Netns::create(&site.id, &name)?;
        net::join_segment(&site.fabric, &netns, &name, index)?;
        netns.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;

        let mut batch = String::new();
        if site.spec.topology != Topology::Routed {
            let mac = bridge_mac(index);
            batch.push_str(&format!(
                "link add br0 address {mac} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n"
            ));
            for family in Family::BOTH {
                let gateway = net::pod_address(family, index, 1);
                batch.push_str(&format!("addr add {gateway}/{} dev br0{}\n", net::pod_prefix(family), nodad(family)));
            }
            batch.push_str("link set br0 up\n");
        }
        if site.spec.topology == Topology::Vxlan {
            batch.push_str(&vxlan_device(index));
        }
        for other in (1..=site.spec.nodes).filter(|other| *other != index) {
            batch.push_str(&route_to_node(site.spec.topology, other));
        }
        ip(Some(&netns), &batch)?;
        if site.spec.topology == Topology::Vxlan {
            net::bridge(&netns, &vxlan_peers(site.spec.nodes, index))?;
        }
        let cgroup = site.cgroup.join(&name);
        let host = Place::new(site.clone(), netns, cgroup.join("host"), &name)?;
        Ok(Self { site, name, index, host, next_pod: AtomicU16::new(10) })
    }

    /// Addresses of the node on the segment, IPv4 first.
    pub fn addresses(&self) -> [IpAddr; 2] {
        Family::BOTH.map(|family| net::underlay(family, self.index))
    }

    pub fn cgroup(&self) -> std::path::PathBuf {
        self.site.cgroup.join(&self.name)
    }

    pub fn add_pod(&self, name: &str) -> Result<Pod> {
        self.add_pod_with(name, PodOptions::default())
    }

    pub fn add_pod_with(&self, name: &str, options: PodOptions) -> Result<Pod> {
        let number = options.number.unwrap_or_else(|| self.next_pod.fetch_add(1, Ordering::Relaxed));
        Pod::new(self, name, number)
    }

    /// The real `hitless run`, ready.
    pub fn start_agent(&self, options: AgentOptions) -> Result<Agent> {
        Agent::start(self, options)
    }

    /// Pull the node's plug: whatever is sent to it from now on is lost in silence.
    pub fn cut_cable(&self) -> Result<()> {
        ip(Some(&self.site.fabric), &format!("link set {} down\n", self.name))
    }

    pub fn restore_cable(&self) -> Result<()> {
        ip(Some(&self.site.fabric), &format!("link set {} up\n", self.name))
    }

    pub(super) fn pod_mtu(&self) -> u32 {
        if self.site.spec.topology == Topology::Vxlan { VXLAN_MTU } else { 1500 }
    }
}

pub(super) fn nodad(family: Family) -> &'static str {
    match family {
        Family::V4 => "",
        Family::V6 => " nodad",
    }
}

/// A bridge without an address of its own takes the lowest of its ports': pods would lose their gateway whenever
/// the pod that lent it is deleted (the CNI's bridge plugin fixes it too).
fn bridge_mac(node: usize) -> String {
    format!("02:00:0a:f4:{node:02x}:01")
}

/// The device's addresses are made from the node's number, so that no node must ask another.
fn vxlan_mac(node: usize) -> String {
    format!("02:00:0a:f4:{node:02x}:00")
}

fn vxlan_device(index: usize) -> String {
    let local = net::underlay(Family::V4, index);
    let mac = vxlan_mac(index);
    let mut batch = format!(
        "link add {VXLAN_DEVICE} address {mac} mtu {VXLAN_MTU} type vxlan id 1 dstport 4789 local {local} dev eth0 nolearning\n"
    );
    for family in Family::BOTH {
        let own = net::pod_address(family, index, 0);
        batch.push_str(&format!("addr add {own}/{} dev {VXLAN_DEVICE}{}\n", family.host_prefix(), nodad(family)));
    }
    batch.push_str(&format!("link set {VXLAN_DEVICE} up\n"));
    batch
}

/// Which node is behind which of the devices' addresses.
fn vxlan_peers(nodes: usize, index: usize) -> String {
    let others = (1..=nodes).filter(|other| *other != index);
    others
        .map(|other| {
            let (mac, node) = (vxlan_mac(other), net::underlay(Family::V4, other));
            format!("fdb append {mac} dev {VXLAN_DEVICE} dst {node} self permanent\n")
        })
        .collect()
}

fn route_to_node(topology: Topology, other: usize) -> String {
    let mut batch = String::new();
    for family in Family::BOTH {
        let (subnet, via) = (net::pod_subnet(family, other), net::underlay(family, other));
        if topology == Topology::Vxlan {
            let peer = net::pod_address(family, other, 0);
            let mac = vxlan_mac(other);
            batch.push_str(&format!("neigh add {peer} lladdr {mac} dev {VXLAN_DEVICE} nud permanent\n"));
            batch.push_str(&format!("route add {subnet} via {peer} dev {VXLAN_DEVICE} onlink\n"));
        } else {
            batch.push_str(&format!("route add {subnet} via {via} dev eth0\n"));
        }
    }
    batch
}
