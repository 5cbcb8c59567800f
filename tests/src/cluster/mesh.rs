//! The mesh on a real cluster: an authority as its users make it, Istio's objects, and a look at what the nodes send
//! each other.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};

use super::{
    Cluster, ControlPlane, Spec, parts,
    scene::{NAMESPACE, Scene, Server},
    trouble::wait_for,
};
use crate::{
    lab::{mesh::TRUST_DOMAIN, packets::Sniffer},
    workload::agent_binary,
};

/// Istio's kinds that hitless reads, and their plurals.
const KINDS: [(&str, &str); 2] =
    [("authorizationpolicies", "AuthorizationPolicy"), ("peerauthentications", "PeerAuthentication")];
/// In every request and every answer of the servers here; in nothing else that leaves a node in clear.
const MARKERS: [&[u8]; 2] = [b"/status/200", b"HTTP/1.1 "];
const HBONE: u16 = dataplane_ebpf::abi::HBONE_PORT;

/// Their CRDs, which take everything: what Istio's schema would refuse is to be met as well.
pub fn crds() -> String {
    let crd = |(plural, kind): (&str, &str)| {
        format!(
            "---\napiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata: {{name: {plural}.security.istio.io}}\n\
             spec:\n  group: security.istio.io\n  scope: Namespaced\n  names: {{plural: {plural}, singular: {}, kind: {kind}}}\n\
             \x20 versions: [{{name: v1, served: true, storage: true, schema: {{openAPIV3Schema: {{type: object, \
             x-kubernetes-preserve-unknown-fields: true}}}}}}]\n",
            kind.to_lowercase()
        )
    };
    KINDS.map(crd).concat()
}

/// Waits until objects of these kinds can be made.
pub fn wait_crds(control: &ControlPlane) -> Result<()> {
    for (plural, _) in KINDS {
        let crd = format!("crd/{plural}.security.istio.io");
        control.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", &crd])?;
    }
    Ok(())
}

/// Makes an authority and says what agents are to be told of it.
fn args(cluster: &Cluster) -> Result<Vec<String>> {
    let directory = cluster.dir().join("mesh-ca").display().to_string();
    parts::run(Command::new(agent_binary()?).args([
        "ca",
        "init",
        "--trust-domain",
        TRUST_DOMAIN,
        "--directory",
        &directory,
    ]))?;
    let identity = format!("ca:{directory}");
    Ok(["--mtls", "on", "--trust-domain", TRUST_DOMAIN, "--identity", &identity].map(str::to_owned).into())
}

impl Scene {
    /// hitless with a mesh on every node, in which the deployment's pods are, with Istio's CRDs and no object of theirs.
    pub fn with_mesh(spec: &Spec, replicas: usize, server: Server) -> Result<Self> {
        let mut scene = Self::new(spec, replicas, server)?;
        scene.cluster.apply(&crds())?;
        wait_crds(&scene.cluster.control)?;
        let args = args(&scene.cluster)?;
        scene.start_agents(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
        for server in scene.servers()? {
            let agent = scene.agents.iter().find(|agent| agent.node == server.node);
            let agent = agent.with_context(|| format!("{} is on node {}", server.name, server.node))?;
            agent.wait_enrolled(&format!("{NAMESPACE}/{}", server.name))?;
        }
        Ok(scene)
    }

    /// A counter of the tunnel, over the agents.
    pub fn tunnel(&self, name: &str) -> Result<u64> {
        let count = |agent: &super::agent::Agent| -> Result<u64> {
            agent.admin(&["status"])?["tunnel"][name].as_u64().with_context(|| format!("no counter {name}"))
        };
        self.agents.iter().map(count).sum()
    }

    /// No plaintext enters the pods of the scene from outside any more: a `PeerAuthentication` in force on every node.
    pub fn make_strict(&self) -> Result<()> {
        self.cluster.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {NAMESPACE}}}\n\
             spec: {{mtls: {{mode: STRICT}}}}\n"
        ))?;
        let name = format!("{NAMESPACE}/default");
        self.agents.iter().try_for_each(|agent| {
            wait_for(&format!("{name} on node {}", agent.node), || {
                let policies = agent.admin(&["policies"])?;
                Ok(policies.as_array().into_iter().flatten().any(|row| row["name"] == name.as_str()).then_some(()))
            })
        })
    }
}

/// What nodes send each other, read as it passes, until it is ended.
pub struct Wire {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Result<Overheard>>,
}

/// Packets, each as often as it passed a device between the nodes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overheard {
    pub packets: usize,
    /// … from and to the tunnels' port
    pub hbone: usize,
    /// … with something that only the application says
    pub in_clear: usize,
}

impl Wire {
    pub fn listen(cluster: &Cluster) -> Result<Self> {
        let sniffer = Sniffer::new(&cluster.fabric)?;
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let thread = thread::spawn(move || {
            let mut heard = Overheard::default();
            loop {
                // What has passed when it is ended is read all the same.
                let last = ended.load(Ordering::Relaxed);
                sniffer.seen()?.iter().for_each(|packet| heard.add(packet));
                if last {
                    return Ok(heard);
                }
            }
        });
        Ok(Self { end, thread })
    }

    pub fn end(self) -> Result<Overheard> {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic while it listens")
    }
}

impl Overheard {
    fn add(&mut self, packet: &[u8]) {
        self.packets += 1;
        self.hbone += usize::from(ports(packet).is_some_and(|ports| ports.contains(&HBONE)));
        let says = |marker: &&[u8]| packet.windows(marker.len()).any(|bytes| bytes == *marker);
        self.in_clear += usize::from(MARKERS.iter().any(says));
    }
}

/// Of a TCP segment without extension headers.
fn ports(packet: &[u8]) -> Option<[u16; 2]> {
    const TCP: u8 = 6;
    let tcp = match packet.first()? >> 4 {
        4 if packet.get(9) == Some(&TCP) => packet.get(usize::from(packet[0] & 0xf) * 4..)?,
        6 if packet.get(6) == Some(&TCP) => packet.get(40..)?,
        _ => return None,
    };
    Some([u16::from_be_bytes([*tcp.first()?, *tcp.get(1)?]), u16::from_be_bytes([*tcp.get(2)?, *tcp.get(3)?])])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::packets::{ACK, Segment};

    #[test]
    fn what_is_said_in_clear_is_told_from_the_tunnel() {
        let segment = |to: &str| {
            let (from, to) = ("10.0.0.1:40000".parse().unwrap(), to.parse().unwrap());
            Segment { from, to, flags: ACK, seq: 1, ack: 1 }.packet()
        };
        let mut heard = Overheard::default();
        heard.add(&[segment("10.0.0.2:8080"), b"GET /status/200 HTTP/1.1\r\n".to_vec()].concat());
        heard.add(&[segment("10.0.0.2:15008"), vec![0x17, 3, 3, 0, 1, 9]].concat());
        assert_eq!((heard.packets, heard.hbone, heard.in_clear), (2, 1, 1));
    }
}
