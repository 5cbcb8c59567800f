//! The usual scene of a suite: two nodes with agents, a service with its pods, and a client's pod.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::PathBuf,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;
use dataplane_user::model::{Protocol, Service, ServicePort};

use super::{
    Agent, AgentOptions, ControlPlane, Lab, LabSpec, Pod, Process, Topology, agent,
    control::{Serves, Terms},
    net::{self, Family},
    pod::Place,
};
use crate::workload::{sockets::Kind, storm::Outcome};

/// The service, and the port it and its pods answer on, TCP and UDP.
pub const SERVICE: &str = "lab/echo";
pub const PORT: u16 = 7;
/// From a pod's deletion to its SIGTERM.
pub const KUBELET: Duration = Duration::from_millis(5);

#[derive(Clone, Debug)]
pub struct SceneSpec {
    pub topology: Topology,
    /// The agents' `--layers`; all when empty.
    pub layers: String,
    pub agent_args: Vec<String>,
    /// The node of each pod of the service.
    pub webs: Vec<usize>,
}

impl Default for SceneSpec {
    fn default() -> Self {
        Self { topology: Topology::Bridge, layers: String::new(), agent_args: Vec::new(), webs: vec![1, 2] }
    }
}

pub struct Scene {
    pub agents: Vec<Agent>,
    pub control: ControlPlane,
    pub webs: Vec<Web>,
    /// On node 1.
    pub client: Pod,
    created: usize,
    /// By agent, what its counters said when it was ready: its canaries count too.
    before: BTreeMap<i32, BTreeMap<String, u64>>,
    pub lab: Lab,
}

/// A pod of the service and its server, called by the pod's name without the namespace.
pub struct Web {
    pub name: String,
    pub server: Process,
    pub pod: Pod,
}

impl Scene {
    pub fn new(spec: &SceneSpec) -> Result<Self> {
        let lab = Lab::new(LabSpec { nodes: 2, topology: spec.topology })?;
        let control = ControlPlane::default();
        for node in lab.nodes() {
            control.add_node(node)?;
        }
        control.add_service(service(SERVICE, 1))?;
        let client = lab.node(1).add_pod("client")?;
        control.add_pod(&client, &Terms::default())?;
        let mut scene =
            Self { agents: Vec::new(), control, webs: Vec::new(), client, created: 0, before: BTreeMap::new(), lab };
        for index in 1..=scene.lab.nodes().len() {
            let options = AgentOptions { layers: spec.layers.clone(), args: spec.agent_args.clone() };
            scene.start_agent(index, options)?;
        }
        for &node in &spec.webs {
            let web = scene.add_web(node)?;
            scene.webs.push(web);
        }
        Ok(scene)
    }

    /// Start the node's agent, or another in its place.
    pub fn start_agent(&mut self, node: usize, options: AgentOptions) -> Result<()> {
        let agent = self.lab.node(node).start_agent(options)?;
        self.control.connect_agent(&agent)?;
        self.before.insert(agent.process().pid(), agent.counters()?);
        self.agents.retain(|other| other.node != node);
        self.agents.push(agent);
        self.agents.sort_by_key(|agent| agent.node);
        Ok(())
    }

    /// Start an agent that takes over from the node's, and wait until it serves. Returns the one before, which goes on
    /// with what it carries.
    pub fn replace_agent(&mut self, node: usize, options: AgentOptions) -> Result<Agent> {
        let before = self.agents.remove(node - 1);
        self.start_agent(node, taking_over(options))?;
        Ok(before)
    }

    pub fn agent(&self, node: usize) -> &Agent {
        &self.agents[node - 1]
    }

    /// kill -9 to the node's agent. What it had pinned goes on.
    pub fn kill_agent(&self, node: usize) -> Result<()> {
        self.control.disconnect_agent(node);
        self.agent(node).kill9()
    }

    /// Another pod of the service, serving and announced.
    pub fn add_web(&mut self, node: usize) -> Result<Web> {
        self.created += 1;
        let name = format!("web-{}", self.created);
        let web = self.add_unannounced(node, &name)?;
        self.announce(&web.pod, &Terms { serves: serves(SERVICE), ..Terms::default() })?;
        Ok(web)
    }

    /// A pod of the service goes for a new one on `node`, as in a rolling update: its deletion and SIGTERM are told at
    /// once, the endpoints hear of it `late` after its end. Returns the new one, and what waits for that.
    pub fn replace(&mut self, old: Web, node: usize, late: Duration) -> Result<(Web, JoinHandle<Result<()>>)> {
        let new = self.add_web(node)?;
        self.control.terminating(&old.pod.name)?;
        thread::sleep(KUBELET);
        old.server.sigterm()?;
        let control = self.control.clone();
        let ended = thread::spawn(move || -> Result<()> {
            old.server.wait()?;
            thread::sleep(late);
            control.endpoint_gone(&old.pod.name)?;
            control.pod_deleted(&old.pod.name)?;
            old.pod.delete()
        });
        Ok((new, ended))
    }

    /// A counter of the tunnel, over the agents.
    pub fn tunnel(&self, name: &str) -> Result<u64> {
        self.agents.iter().map(|agent| Ok(agent.tunnel()?[name])).sum()
    }

    /// Wait until the service's pods and the client's are in the mesh.
    pub fn wait_joined(&self) -> Result<()> {
        let mut pods = self.webs.iter().map(|web| &web.pod).chain([&self.client]);
        pods.try_for_each(|pod| self.agent(pod.node).wait_joined(&pod.name))
    }

    /// Tell all of the pod, and wait until it is enrolled.
    pub fn announce(&self, pod: &Pod, terms: &Terms) -> Result<()> {
        self.control.add_pod(pod, terms)?;
        match self.agents.iter().find(|agent| agent.node == pod.node) {
            Some(agent) if !terms.not_enrolled && agent.process().running() => agent.wait_enrolled(&pod.name),
            _ => Ok(()),
        }
    }

    /// A pod with a server that no service has.
    pub fn add_unannounced(&self, node: usize, name: &str) -> Result<Web> {
        let pod = self.lab.node(node).add_pod(name)?;
        let server = start_server(&pod, name)?;
        Ok(Web { name: name.to_owned(), server, pod })
    }

    /// The service's address.
    pub fn vip(&self, family: Family) -> SocketAddr {
        SocketAddr::new(net::service_address(family, 1), PORT)
    }

    /// Connect from the client's pod to the service.
    pub fn connect(&self, family: Family) -> io::Result<TcpStream> {
        connect_from(&self.client.place, self.vip(family))
    }

    /// Sum of a kernel counter over the agents, since they were ready.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let mut sum = 0;
        for agent in &self.agents {
            let of = |counters: &BTreeMap<String, u64>| counters.get(name).copied().unwrap_or(0);
            sum += of(&agent.counters()?) - self.before.get(&agent.process().pid()).map_or(0, of);
        }
        Ok(sum)
    }

    /// Connections that were moved to another backend.
    pub fn rebound(&self) -> Result<u64> {
        agent::REBOUND.iter().map(|name| self.counter(name)).sum()
    }
}

/// Options of an agent that takes over from another one.
pub fn taking_over(mut options: AgentOptions) -> AgentOptions {
    options.args.push("--take-over".into());
    options
}

/// Connections as fast as they go, until it is ended.
pub struct Storm {
    process: Process,
    result: PathBuf,
}

impl Storm {
    /// Of that many threads in `pod`, each with one connection at a time.
    pub fn start(pod: &Pod, to: SocketAddr, threads: usize) -> Result<Self> {
        let result = pod.place.file(&format!("storm-{}.json", if to.is_ipv4() { 4 } else { 6 }));
        let (target, threads, path) = (to.to_string(), threads.to_string(), result.to_string_lossy());
        let endless = "1000000000";
        let args = ["--target", &target, "--connections", endless, "--threads", &threads, "--result", &path];
        let process = pod.workload(&[&["storm"], &args[..]].concat())?;
        Ok(Self { process, result })
    }

    pub fn running(&self) -> bool {
        self.process.running()
    }

    pub fn end(self) -> Result<Outcome> {
        self.process.sigterm()?;
        self.process.wait()?;
        Ok(serde_json::from_str(&std::fs::read_to_string(self.result)?)?)
    }
}

pub fn start_server(pod: &Pod, name: &str) -> Result<Process> {
    pod.workload(&["server", "--name", name, "--echo-tcp", "[::]:7", "--echo-udp", "[::]:7"])
}

/// The n-th service of the lab: port 7, TCP and UDP, on an address of either family.
pub fn service(name: &str, n: u16) -> Service {
    let port = |name: &str, protocol| ServicePort { name: name.into(), port: PORT, protocol, node_port: None };
    let addresses: Vec<IpAddr> = Family::BOTH.map(|family| net::service_address(family, n)).into();
    Service {
        name: name.into(),
        addresses,
        ports: vec![port("tcp", Protocol::Tcp), port("udp", Protocol::Udp)],
        affinity_seconds: 0,
        headless: false,
        ..Service::default()
    }
}

/// What a pod of such a service serves.
pub fn serves(service: &str) -> Vec<Serves> {
    ["tcp", "udp"].map(|port| Serves { service: service.into(), port_name: port.into(), target_port: PORT }).into()
}

/// Connect a socket of `place`.
pub fn connect_from(place: &Place, to: SocketAddr) -> io::Result<TcpStream> {
    let kind = if to.is_ipv4() { Kind::Tcp4 } else { Kind::Tcp6 };
    let socket = place.socket(kind).map_err(io::Error::other)?;
    let stream = net::connect(socket, to)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Who is at the other end: its name, after it has echoed something.
pub fn who(stream: &mut TcpStream) -> io::Result<String> {
    stream.write_all(b"who\n")?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\n") {
        if stream.read(&mut byte)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        answer.push(byte[0]);
    }
    let answer = String::from_utf8(answer).map_err(io::Error::other)?;
    answer.split_once(' ').map(|(name, _)| name.to_owned()).ok_or_else(|| io::Error::other(format!("{answer:?}")))
}

/// Poll until it holds; a busy machine gets time.
pub fn eventually(mut holds: impl FnMut() -> bool, what: &str) {
    let deadline = std::time::Instant::now() + Duration::from_secs(15);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "not within 15 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
