//! The control plane of a lab: it knows everything, and tells each listener when the test says so.
//!
//! Additions are told at once. A death reaches listeners by the steps that Kubernetes knows: the pod
//! watch ([`ControlPlane::terminating`]), the endpoints ([`ControlPlane::endpoint_gone`], which is
//! what comes late), and the end of the pod ([`ControlPlane::pod_deleted`]).

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use dataplane_user::model::{self, Event, Key, Object, Snapshot};

use super::{
    agent::{Agent, Stream},
    pod::Pod,
};
use crate::workload::gateway::Endpoints;

#[derive(Clone, Default)]
pub struct ControlPlane(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    services: Vec<model::Service>,
    /// By name; `netns` is set, and only told to the pod's own node.
    pods: BTreeMap<Arc<str>, (usize, model::Pod)>,
    backends: Vec<model::Backend>,
    nodes: Vec<model::Node>,
    agents: Vec<(usize, Stream)>,
    gateways: Vec<Gateway>,
}

/// A gateway that asks for the endpoints of one service.
struct Gateway {
    service: Arc<str>,
    lines: BufReader<UnixStream>,
}

/// What a pod is to the control plane besides its addresses.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    pub gateway: bool,
    pub not_enrolled: bool,
    pub stop_signals: Vec<String>,
    /// Services that it is a backend of.
    pub serves: Vec<Serves>,
}

#[derive(Clone, Debug)]
pub struct Serves {
    pub service: String,
    pub port_name: String,
    pub target_port: u16,
}

impl Serves {
    /// The one port of `service`.
    pub fn new(service: &str, target_port: u16) -> Self {
        Self { service: service.into(), port_name: String::new(), target_port }
    }
}

impl ControlPlane {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while locked")
    }

    /// From now on the agent hears everything; first, all there is. Returns when it is ready.
    pub fn connect_agent(&self, agent: &Agent) -> Result<()> {
        let stream = agent.connect()?;
        let mut state = self.state();
        stream.send(&Event::Sync { state: state.snapshot(agent.node) })?;
        agent.wait_ready()?;
        state.agents.retain(|(other, _)| *other != agent.node);
        state.agents.push((agent.node, stream));
        Ok(())
    }

    /// The agent of node `node` is gone: nobody is told anything there.
    pub fn disconnect_agent(&self, node: usize) {
        self.state().agents.retain(|(other, _)| *other != node);
    }

    /// From now on the gateway with this control socket hears the endpoints of `service`.
    pub fn connect_gateway(&self, service: &str, socket: &Path) -> Result<()> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connect {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut state = self.state();
        state.gateways.push(Gateway { service: service.into(), lines: BufReader::new(stream) });
        state.tell_gateways()
    }

    pub fn add_node(&self, node: &super::Node) -> Result<()> {
        let node = model::Node { name: node.name.as_str().into(), addresses: node.addresses().into() };
        let mut state = self.state();
        state.nodes.push(node.clone());
        state.tell_agents(|_| Event::Upsert { object: Object::Node(node.clone()) })
    }

    pub fn add_service(&self, service: model::Service) -> Result<()> {
        let mut state = self.state();
        state.services.retain(|other| other.name != service.name);
        state.services.push(service.clone());
        state.tell_agents(|_| Event::Upsert { object: Object::Service(service.clone()) })
    }

    /// The pod is there and ready: told at once.
    pub fn add_pod(&self, pod: &Pod, terms: &Terms) -> Result<()> {
        let object = model::Pod {
            name: pod.name.as_str().into(),
            addresses: pod.addresses().into(),
            netns: Some(pod.netns_path().to_owned()),
            pid: None,
            enrolled: !terms.not_enrolled,
            gateway: terms.gateway,
            // What policies with a selector go by.
            labels: BTreeMap::from([("lab".into(), "pod".into())]),
            stop_signals: terms.stop_signals.clone(),
            service_account: None,
            terminating: false,
        };
        let mut state = self.state();
        state.pods.insert(object.name.clone(), (pod.node, object.clone()));
        state.tell_pod(&object.name)?;
        for serves in &terms.serves {
            for address in pod.addresses() {
                let backend = model::Backend {
                    service: serves.service.as_str().into(),
                    port: serves.port_name.as_str().into(),
                    address,
                    target_port: serves.target_port,
                    pod: Some(object.name.clone()),
                    ready: true,
                    serving: true,
                    terminating: false,
                    weight: 1,
                };
                state.backends.push(backend.clone());
                state.tell_agents(|_| Event::Upsert { object: Object::Backend(backend.clone()) })?;
            }
        }
        state.tell_gateways()
    }

    /// The pod watch says that the pod was deleted (`deletionTimestamp`).
    pub fn terminating(&self, pod: &str) -> Result<()> {
        let mut state = self.state();
        let Some((_, object)) = state.pods.get_mut(pod) else { bail!("no pod {pod}") };
        object.terminating = true;
        state.tell_pod(pod)
    }

    /// The endpoint controllers have caught up: nobody is to send to this pod any more.
    pub fn endpoint_gone(&self, pod: &str) -> Result<()> {
        let mut state = self.state();
        let (gone, left) =
            std::mem::take(&mut state.backends).into_iter().partition(|backend| backend.pod.as_deref() == Some(pod));
        state.backends = left;
        state.tell_gateways()?;
        let gone: Vec<model::Backend> = gone;
        for backend in gone {
            let key = Key::Backend {
                service: backend.service,
                port: backend.port,
                address: backend.address,
                target_port: backend.target_port,
            };
            state.tell_agents(|_| Event::Delete { object: key.clone() })?;
        }
        Ok(())
    }

    /// The pod object is gone.
    pub fn pod_deleted(&self, pod: &str) -> Result<()> {
        let mut state = self.state();
        state.pods.remove(pod);
        state.tell_agents(|_| Event::Delete { object: Key::Pod { name: pod.into() } })
    }

    /// Any event, to the agent of one node.
    pub fn send(&self, node: usize, event: &Event) -> Result<()> {
        let state = self.state();
        let (_, stream) = state.agents.iter().find(|(other, _)| *other == node).context("no agent on that node")?;
        stream.send(event)
    }

    pub fn snapshot(&self, node: usize) -> Snapshot {
        self.state().snapshot(node)
    }
}

impl State {
    fn snapshot(&self, node: usize) -> Snapshot {
        Snapshot {
            services: self.services.clone(),
            backends: self.backends.clone(),
            pods: self.pods.keys().map(|name| self.pod_for(name, node)).collect(),
            nodes: self.nodes.clone(),
        }
    }

    fn pod_for(&self, name: &str, node: usize) -> model::Pod {
        let (home, object) = &self.pods[name];
        let mut object = object.clone();
        if *home != node {
            object.netns = None;
        }
        object
    }

    fn tell_pod(&self, name: &str) -> Result<()> {
        self.tell_agents(|node| Event::Upsert { object: Object::Pod(self.pod_for(name, node)) })
    }

    fn tell_agents(&self, event: impl Fn(usize) -> Event) -> Result<()> {
        for (node, stream) in &self.agents {
            stream.send(&event(*node)).with_context(|| format!("tell the agent of node {node}"))?;
        }
        Ok(())
    }

    fn tell_gateways(&mut self) -> Result<()> {
        for gateway in &mut self.gateways {
            let endpoints: Vec<SocketAddr> = self
                .backends
                .iter()
                .filter(|backend| backend.service == gateway.service && backend.address.is_ipv4())
                .map(|backend| (backend.address, backend.target_port).into())
                .collect();
            gateway.tell(&Endpoints { endpoints })?;
        }
        Ok(())
    }
}

impl Gateway {
    fn tell(&mut self, endpoints: &Endpoints) -> Result<()> {
        let mut line = serde_json::to_vec(endpoints)?;
        line.push(b'\n');
        self.lines.get_mut().write_all(&line).context("tell the gateway")?;
        let mut answer = String::new();
        self.lines.read_line(&mut answer).context("the gateway's answer")?;
        if answer != "ok\n" {
            bail!("the gateway answered {answer:?}");
        }
        Ok(())
    }
}

/// A service with one TCP port.
pub fn tcp_service(name: &str, addresses: &[IpAddr], port: u16) -> model::Service {
    model::Service {
        name: name.into(),
        addresses: addresses.to_vec(),
        ports: vec![model::ServicePort { name: "".into(), port, protocol: model::Protocol::Tcp, node_port: None }],
        affinity_seconds: 0,
        headless: false,
        ..model::Service::default()
    }
}
