//! Where the tunnel is measured: a mesh of two nodes, and two bare nodes of the same make beside it.
//!
//! ```text
//! node-1 (mesh)    client, near        node-3 (nothing)   bare-client, bare-near
//! node-2 (mesh)    far                 node-4 (nothing)   bare-far
//! node-5 (mesh)    the agent that is told of 50,000 workloads
//! ```
//!
//! As nodes are machines, each has a CPU of its own: the first, third and fifth one CPU, the others the other. Left to the
//! scheduler, client and server of a direct connection would share a CPU, which no two machines do.

use std::{net::SocketAddr, sync::atomic::Ordering, time::Duration};

use anyhow::{Context, Result, bail};
use nix::{
    time::{ClockId, clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

use crate::{
    bench::{
        bpf::Pins,
        load::Load,
        race::{on, two_cpus},
        rig::{endpoint, pins},
        wire::{Target, Worker},
    },
    lab::{
        Agent, AgentOptions, ControlPlane, Lab, LabSpec, Pod, Topology,
        control::{Serves, Terms, tcp_service},
        mesh::Mesh,
        net::{Family, service_address},
    },
};

const PORT: u16 = 8082;
/// Nobody listens.
const CLOSED_PORT: u16 = 9;

/// The service that a pod of another node answers …
const FAR: (&str, u16) = ("lab/far", 1);
/// … one of the client's node …
const NEAR: (&str, u16) = ("lab/near", 2);
/// … one whose other backend refuses …
const HALF_DEAD: (&str, u16) = ("lab/half-dead", 3);
/// … and one with a backend on either node.
const BOTH: (&str, u16) = ("lab/both", 4);

/// Clients and servers: those of the mesh, or those without.
pub struct Side {
    pub client: Worker,
    servers: [Worker; 2],
    pub far: SocketAddr,
    pub near: SocketAddr,
    agents: Vec<i32>,
    /// What is kept open: near or far, how many, and their set's number.
    sets: Vec<(bool, usize, usize)>,
}

impl Side {
    fn new(client: &Pod, [far, near]: [&Pod; 2], pins: Option<&Pins>) -> Result<Self> {
        // Connections that a client closes are remembered for a minute, and its ports with them: what the bench opens in a
        // minute is more than that.
        let settings = [("ipv4/tcp_tw_reuse", "1"), ("ipv4/ip_local_port_range", "10000 65000")];
        client.place.netns.sysctl(&settings)?;
        let start = |pod: &Pod, pins| on(cpu_of_node(pod.node)?, || Worker::start(&pod.place, pins, false));
        let mut servers = [start(far, None)?, start(near, None)?];
        for server in &mut servers {
            server.load::<()>(Load::Echo { port: PORT })?;
        }
        let client = start(client, pins)?;
        let [far, near] = [far, near].map(|pod| SocketAddr::new(pod.v4(), PORT));
        Ok(Self { client, servers, far, near, agents: Vec::new(), sets: Vec::new() })
    }

    pub fn to(&self, near: bool) -> SocketAddr {
        if near { self.near } else { self.far }
    }

    /// So many connections that stay: what the first bytes of one learn (windows, buffers) is none of the figures.
    pub fn set(&mut self, near: bool, connections: usize) -> Result<usize> {
        if let Some((.., set)) = self.sets.iter().find(|set| (set.0, set.1) == (near, connections)) {
            return Ok(*set);
        }
        let set = self.client.load(Load::Hold { to: self.to(near), connections })?;
        self.sets.push((near, connections, set));
        Ok(set)
    }

    /// CPU time of its agents so far, and of all of its processes. The kernel's work for their packets is in it: on
    /// veth that is done by whoever sends.
    pub fn cpu(&self) -> Result<[Duration; 2]> {
        let sum = |pids: &[i32]| pids.iter().map(|pid| cpu_of(*pid)).sum::<Result<Duration>>();
        let agents = sum(&self.agents)?;
        let workers = sum(&[self.client.pid(), self.servers[0].pid(), self.servers[1].pid()])?;
        Ok([agents, agents + workers])
    }
}

fn cpu_of_node(node: usize) -> Result<usize> {
    Ok(two_cpus()?[(node - 1) % 2])
}

fn cpu_of(pid: i32) -> Result<Duration> {
    let clock: ClockId = clock_getcpuclockid(Pid::from_raw(pid)).with_context(|| format!("CPU clock of {pid}"))?;
    Ok(clock_gettime(clock)?.into())
}

pub struct TunnelRig {
    pub mesh: Side,
    pub bare: Side,
    pub agents: [Agent; 2],
    pub half_dead: Target,
    pub both: Target,
    _control: ControlPlane,
    authority: Mesh,
    _pods: Vec<Pod>,
    // The last to go.
    pub lab: Lab,
}

impl TunnelRig {
    pub fn new() -> Result<Self> {
        let lab = Lab::new(LabSpec { nodes: 5, topology: Topology::Bridge })?;
        let authority = Mesh::new()?;
        let control = ControlPlane::default();
        for (service, number) in [FAR, NEAR, HALF_DEAD, BOTH] {
            control.add_service(tcp_service(service, &[service_address(Family::V4, number)], PORT))?;
        }
        let mut agents = Vec::new();
        for node in &lab.nodes()[..2] {
            control.add_node(node)?;
            let options = AgentOptions { args: authority.args(), ..AgentOptions::default() };
            let agent = on(cpu_of_node(node.index)?, || node.start_agent(options))?;
            control.connect_agent(&agent)?;
            agents.push(agent);
        }
        let pods = [(1, "client"), (2, "far"), (1, "near"), (3, "bare-client"), (4, "bare-far"), (3, "bare-near")];
        let pods = pods.map(|(node, name)| lab.node(node).add_pod(name));
        let pods: Vec<_> = pods.into_iter().collect::<Result<_>>()?;
        let [client, far, near, bare_client, bare_far, bare_near] = pods.as_slice() else { unreachable!("six pods") };

        let pins = pins(&lab, lab.node(1));
        let mut mesh = Side::new(client, [far, near], Some(&pins))?;
        let bare = Side::new(bare_client, [bare_far, bare_near], None)?;
        let serves = |services: &[(&str, u16)]| Terms {
            serves: services.iter().map(|(service, port)| Serves::new(service, *port)).collect(),
            ..Terms::default()
        };
        control.add_pod(client, &serves(&[]))?;
        let (half_dead, refusing) = ((HALF_DEAD.0, PORT), (HALF_DEAD.0, CLOSED_PORT));
        control.add_pod(far, &serves(&[(FAR.0, PORT), half_dead, refusing, (BOTH.0, PORT)]))?;
        control.add_pod(near, &serves(&[(NEAR.0, PORT), (BOTH.0, PORT)]))?;
        for (agent, pod) in [(0, client), (1, far), (0, near)] {
            agents[agent].wait_enrolled(&pod.name)?;
            agents[agent].wait_joined(&pod.name)?;
        }
        mesh.agents = agents.iter().map(|agent| agent.process().pid()).collect();
        let at = |(_, number)| SocketAddr::new(service_address(Family::V4, number), PORT);
        // Told at each connect that all of its backends are ready, whatever was seen of them before.
        let health = pins.health()?;
        let afresh = |service, backends: &[SocketAddr]| -> Result<Target> {
            let words = backends.iter().map(|at| {
                let id = pins.backend(&endpoint(at.ip(), at.port()))?;
                Ok((id, health.word(id).load(Ordering::SeqCst)))
            });
            Ok(Target::new(at(service)).after_setting(&words.collect::<Result<Vec<_>>>()?))
        };
        let half_dead = afresh(HALF_DEAD, &[mesh.far, SocketAddr::new(mesh.far.ip(), CLOSED_PORT)])?;
        let both = afresh(BOTH, &[mesh.far, mesh.near])?;
        (mesh.far, mesh.near) = (at(FAR), at(NEAR));
        mesh.client.dials(Target::new(mesh.far), 1)?;
        mesh.client.dials(Target::new(mesh.near), 1)?;
        let carried = agents[0].tunnel()?;
        if (carried["outbound_tunnelled"], carried["outbound_local"]) != (1, 1) {
            bail!("the first connections did not go through the tunnel: {carried:?}");
        }
        let agents = <[Agent; 2]>::try_from(agents).ok().context("two agents were started")?;
        Ok(Self { mesh, bare, agents, half_dead, both, _control: control, authority, _pods: pods, lab })
    }

    /// Another agent of the mesh, on a node where nothing else is.
    pub fn another_agent(&self) -> Result<Agent> {
        self.lab.node(5).start_agent(AgentOptions { args: self.authority.args(), ..AgentOptions::default() })
    }
}
