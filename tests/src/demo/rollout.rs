//! One run: a rolling update of every pod under load, in one mode.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};

use super::{Mode, Options};
use crate::{
    lab::{
        Agent, AgentOptions, ControlPlane, Lab, LabSpec, Pod, Process,
        control::{Serves, Terms, tcp_service},
        mesh::Mesh,
        net::{Family, service_address},
    },
    workload::{client, gateway, now_us},
};

const SERVICE: &str = "lab/web";
const SERVICE_PORT: u16 = 80;
const POD_PORT: u16 = 8080;
/// From the pod's deletion to SIGTERM: the kubelet hears of it by the same watch as an agent, and
/// has the runtime send the signal.
const KUBELET: Duration = Duration::from_millis(5);
/// How long the network namespace outlives the application.
const NETNS_OUTLIVES: Duration = Duration::from_secs(2);
const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_secs(2);
const BETWEEN_DEATHS: Duration = Duration::from_secs(2);

/// What one run showed.
pub(super) struct Run {
    pub mode: Mode,
    pub requests: u64,
    pub failed: u64,
    pub rebound: u64,
    /// What the tunnel did; `None`: no mutual TLS in this run.
    pub carried: Option<Carried>,
    /// The first request's due time, µs; other times are relative to it.
    pub start_us: u64,
    pub end_us: u64,
    pub deaths_us: Vec<u64>,
    pub failures_us: Vec<u64>,
    /// Why requests failed, and how many for each reason.
    pub reasons: Vec<(String, usize)>,
    /// Upstream connects of the gateway that succeeded.
    pub connect: Percentiles,
    /// Latency of the requests that succeeded.
    pub latency: Percentiles,
}

#[cfg(test)]
impl Run {
    /// A run that never was.
    pub(super) fn of(mode: Mode, requests: u64, failed: u64) -> Self {
        Self {
            mode,
            requests,
            failed,
            rebound: 0,
            carried: None,
            start_us: 0,
            end_us: 0,
            deaths_us: Vec::new(),
            failures_us: Vec::new(),
            reasons: Vec::new(),
            connect: Percentiles::default(),
            latency: Percentiles::default(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Percentiles {
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
}

/// Connections of the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Carried {
    /// In mutual TLS, to a pod of the other node.
    pub tunnelled: u64,
    /// To a pod of the same node, without a second TLS.
    pub local: u64,
    /// Tried on another pod before their first byte.
    pub repicked: u64,
}

struct Web {
    pod: Pod,
    server: Process,
}

struct Stage<'a> {
    mode: Mode,
    options: &'a Options,
    lab: Lab,
    control: ControlPlane,
    agents: Vec<Agent>,
    /// `None`: no mutual TLS in this run.
    mesh: Option<Mesh>,
    /// Connections that the agents had rebound to prove their hooks.
    canaries: u64,
    created: usize,
    deaths_us: Vec<u64>,
    late: Vec<JoinHandle<Result<()>>>,
}

pub(super) fn run(mode: Mode, options: &Options) -> Result<Run> {
    eprintln!("{}: making the lab", mode.name());
    let lab = Lab::new(LabSpec { nodes: 2, topology: options.topology })?;
    let mut stage = Stage {
        mode,
        options,
        lab,
        control: ControlPlane::default(),
        agents: Vec::new(),
        mesh: if options.mtls && mode.layers().is_some() { Some(Mesh::new()?) } else { None },
        canaries: 0,
        created: 0,
        deaths_us: Vec::new(),
        late: Vec::new(),
    };
    let result = stage.play();
    if result.is_err() {
        stage.lab.print_logs();
    }
    result
}

impl Stage<'_> {
    fn play(&mut self) -> Result<Run> {
        self.start_control_plane()?;
        let gateway = self.start_gateway()?;
        let mut webs = (0..self.options.pods).map(|i| self.start_web(i)).collect::<Result<Vec<_>>>()?;
        let (client, requests) = self.start_client(&gateway)?;

        let deaths = self.options.pods * self.options.rounds;
        let between = self.options.duration.map_or(BETWEEN_DEATHS, |seconds| {
            let rolling = Duration::from_secs_f64(seconds.max(0.0)).saturating_sub(BEFORE + AFTER);
            rolling / deaths.max(1) as u32
        });
        let mut next = Instant::now() + BEFORE;
        for round in 0..self.options.rounds {
            for (index, web) in webs.iter_mut().enumerate() {
                thread::sleep(next.saturating_duration_since(Instant::now()));
                next += between;
                // Surge by one: the new pod serves before the old one is told to go.
                let new = self.start_web(index + round + 1)?;
                let old = std::mem::replace(web, new);
                let name = old.pod.name.clone();
                self.end(old)?;
                eprintln!("{}: {name} ended ({} of {deaths})", self.mode.name(), self.deaths_us.len());
            }
        }
        thread::sleep(next.saturating_duration_since(Instant::now()).min(between) + AFTER);
        client.sigterm()?;
        client.wait()?;
        gateway.process.sigterm()?;
        gateway.process.wait()?;
        for late in self.late.drain(..) {
            late.join().map_err(|_| anyhow!("a step of the rollout panicked"))??;
        }
        self.conclude(&requests, &gateway.records)
    }

    fn start_control_plane(&mut self) -> Result<()> {
        for node in self.lab.nodes() {
            self.control.add_node(node)?;
        }
        let addresses: Vec<IpAddr> = Family::BOTH.map(|family| service_address(family, 1)).into();
        self.control.add_service(tcp_service(SERVICE, &addresses, SERVICE_PORT))?;
        if let Some(layers) = self.mode.layers() {
            for node in self.lab.nodes() {
                let args = self.mesh.as_ref().map_or_else(Vec::new, Mesh::args);
                let agent = node.start_agent(AgentOptions { layers: layers.into(), args })?;
                self.control.connect_agent(&agent)?;
                self.agents.push(agent);
            }
        }
        self.canaries = self.rebound()?;
        Ok(())
    }

    fn rebound(&self) -> Result<u64> {
        self.agents.iter().map(Agent::rebound).sum()
    }

    fn carried(&self) -> Result<Option<Carried>> {
        if self.mesh.is_none() {
            return Ok(None);
        }
        let mut carried = Carried::default();
        for agent in &self.agents {
            let counts = agent.tunnel()?;
            let of = |name: &str| counts.get(name).copied().with_context(|| format!("no {name} in hitless status"));
            carried.tunnelled += of("outbound_tunnelled")?;
            carried.local += of("outbound_local")?;
            carried.repicked += of("outbound_repicked")?;
        }
        Ok(Some(carried))
    }

    fn start_gateway(&self) -> Result<Gateway> {
        let pod = self.lab.node(1).add_pod("gateway")?;
        self.control.add_pod(&pod, &Terms { gateway: true, ..Terms::default() })?;
        if let Some(agent) = self.agents.first() {
            agent.wait_enrolled(&pod.name)?;
            if self.mesh.is_some() {
                agent.wait_joined(&pod.name)?;
            }
        }
        let (control, records) = (pod.place.file("control.sock"), pod.place.file("records"));
        let listen = SocketAddr::new(pod.v4(), POD_PORT).to_string();
        let mut args = vec!["gateway", "--listen", &listen, "--control", text(&control)?, "--records", text(&records)?];
        if self.options.keep_alive {
            args.push("--keep-alive");
        }
        let process = pod.workload(&args)?;
        self.control.connect_gateway(SERVICE, &control)?;
        Ok(Gateway { process, address: SocketAddr::new(pod.v4(), POD_PORT), records, _pod: pod })
    }

    fn start_client(&self, gateway: &Gateway) -> Result<(Process, PathBuf)> {
        let outside = self.lab.outside();
        let records = outside.file("requests");
        let (target, rate) = (gateway.address.to_string(), self.options.rate.to_string());
        let mut args = vec!["client", "--target", &target, "--rate", &rate, "--records", text(&records)?];
        if self.options.keep_alive {
            args.push("--keep-alive");
        }
        Ok((outside.workload(&args)?, records))
    }

    /// A new pod of the service, on the nodes in turn, ready and announced.
    fn start_web(&mut self, turn: usize) -> Result<Web> {
        self.created += 1;
        let name = format!("web-{}", self.created);
        let pod = self.lab.node(1 + turn % 2).add_pod(&name)?;
        let listen = format!("[::]:{POD_PORT}");
        let server = pod.workload(&["server", "--name", &name, "--listen", &listen])?;
        let serves = vec![Serves::new(SERVICE, POD_PORT)];
        self.control.add_pod(&pod, &Terms { serves, ..Terms::default() })?;
        Ok(Web { pod, server })
    }

    /// A pod's death as Kubernetes has it: the order is deletion, SIGTERM, the application's exit,
    /// (late) the endpoints, and the end of the network namespace.
    fn end(&mut self, web: Web) -> Result<()> {
        let name = web.pod.name.clone();
        let delay = self.options.control_plane_delay.nth(self.deaths_us.len());
        if self.mode.watches_pods() && delay.is_some() {
            self.control.terminating(&name)?;
        }
        thread::sleep(KUBELET);
        self.deaths_us.push(now_us());
        web.server.sigterm()?;
        let died = Instant::now();
        if let Some(delay) = delay {
            let (control, name) = (self.control.clone(), name.clone());
            self.late.push(thread::spawn(move || {
                thread::sleep(delay.saturating_sub(died.elapsed()));
                control.endpoint_gone(&name)
            }));
        }
        let control = self.control.clone();
        self.late.push(thread::spawn(move || {
            web.server.wait()?;
            thread::sleep(NETNS_OUTLIVES);
            web.pod.delete()?;
            if delay.is_some_and(|delay| delay <= NETNS_OUTLIVES) { control.pod_deleted(&name) } else { Ok(()) }
        }));
        Ok(())
    }

    fn conclude(&mut self, requests: &Path, connects: &Path) -> Result<Run> {
        let (records, summary) = client::read(requests)?;
        let start_us = records.iter().map(|record| record.due_us).min().context("the client made no request")?;
        let end_us = records.iter().map(|record| record.due_us).max().unwrap_or(start_us);
        let mut failures_us: Vec<u64> =
            records.iter().filter(|record| record.failed()).map(|record| record.due_us).collect();
        failures_us.sort_unstable();
        let mut reasons = std::collections::BTreeMap::<String, usize>::new();
        for record in records.iter().filter(|record| record.failed()) {
            *reasons.entry(without_addresses(&record.outcome)).or_default() += 1;
        }
        let latency = percentiles(records.iter().filter(|record| !record.failed()).map(|record| record.latency_us))?;
        let text = fs::read_to_string(connects).with_context(|| format!("read {}", connects.display()))?;
        let connects =
            text.lines().map(serde_json::from_str).collect::<Result<Vec<gateway::Record>, _>>().context("a connect")?;
        let connect = percentiles(connects.iter().filter(|c| c.outcome == "ok").map(|c| c.connect_us))?;
        let rebound = self.rebound()? - self.canaries;
        Ok(Run {
            mode: self.mode,
            requests: summary.requests,
            failed: summary.failed,
            rebound,
            carried: self.carried()?,
            start_us,
            end_us,
            deaths_us: self.deaths_us.clone(),
            failures_us,
            reasons: reasons.into_iter().collect(),
            connect,
            latency,
        })
    }
}

struct Gateway {
    process: Process,
    address: SocketAddr,
    records: PathBuf,
    _pod: Pod,
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// "503: upstream 10.244.1.11:8080: connect: refused" without the address, to count what is alike.
fn without_addresses(outcome: &str) -> String {
    outcome
        .split(' ')
        .filter(|word| word.trim_end_matches(':').parse::<SocketAddr>().is_err())
        .collect::<Vec<_>>()
        .join(" ")
}

fn percentiles(values: impl Iterator<Item = u64>) -> Result<Percentiles> {
    let mut histogram = hdrhistogram::Histogram::<u64>::new(3)?;
    for value in values {
        histogram.record(value)?;
    }
    Ok(Percentiles {
        p50: histogram.value_at_quantile(0.5),
        p99: histogram.value_at_quantile(0.99),
        max: histogram.max(),
    })
}
