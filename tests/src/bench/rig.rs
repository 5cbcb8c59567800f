//! Where the figures are measured: a node with a real agent, a bare node beside it, pods on both.
//!
//! ```text
//! node-1 (agent)   client ──┐           node-2 (nothing)   bare-client ─┐
//!                  stranger ┼ br0                          bare-server ─┴ br0
//!                  server ──┘
//! ```
//!
//! The server pod of either node answers for whole prefixes (`ip route add local`), so that a service
//! can have ten thousand backends that all accept, refuse or say nothing.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use dataplane_ebpf::abi::{self, Endpoint, PROTO_TCP};
use dataplane_user::model::{self, Backend, Event, Object, Service, Snapshot};

use super::{
    bpf::{Pins, Words},
    feed::{self, Feed},
    wire::{Connected, Target, Word, Worker},
};
use crate::lab::{
    Agent, AgentOptions, Lab, LabSpec, Node, Pod, Topology,
    net::{Family, ip, service_address},
};

/// A listener that takes connections and leaves them alone.
pub const CONNECT_PORT: u16 = 8080;
/// A listener that answers pings and swallows blocks.
pub const FLOW_PORT: u16 = 8081;
/// Nobody listens: RST.
pub const CLOSED_PORT: u16 = 9;
/// The port of every service.
pub const SERVICE_PORT: u16 = 80;

pub struct Rig {
    /// Service and backends of each figure, as the agent was told them.
    pub client: Worker,
    pub bare_client: Worker,
    pub stranger: Worker,
    _servers: [Worker; 2],
    pub server_address: IpAddr,
    pub bare_server_address: IpAddr,
    pub pins: Pins,
    pub feed: Feed,
    pub agent: Agent,
    pub pods: Vec<Pod>,
    // The last to go.
    pub lab: Lab,
}

/// The n-th address that the server pod answers for.
pub fn live(n: u32) -> IpAddr {
    let [_, b, c, d] = n.to_be_bytes();
    assert_eq!(b, 0, "65,536 addresses");
    Ipv4Addr::new(10, 99, c, d).into()
}

pub fn live6(n: u16) -> IpAddr {
    Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, n).into()
}

/// Routed to the server pod, which drops them without a word.
pub fn silent(n: u8) -> IpAddr {
    Ipv4Addr::new(10, 98, 0, n).into()
}

/// Without a route in the client's pod: its `connect()` ends right after the hook.
pub fn nowhere(n: u8) -> IpAddr {
    Ipv4Addr::new(10, 97, 0, n).into()
}

/// The first address of the figure's service; each figure has numbers of its own.
pub fn vip(n: u16) -> SocketAddr {
    (service_address(Family::V4, n), SERVICE_PORT).into()
}

pub fn vip6(n: u16) -> SocketAddr {
    (service_address(Family::V6, n), SERVICE_PORT).into()
}

impl Rig {
    pub fn new() -> Result<Self> {
        let lab = Lab::new(LabSpec { nodes: 3, topology: Topology::Bridge })?;
        let (node, bare) = (lab.node(1), lab.node(2));
        let agent = node.start_agent(AgentOptions::default())?;
        let pins = pins(&lab, node);
        let [client, stranger, server] = ["client", "stranger", "server"].map(|name| node.add_pod(name));
        let [bare_client, bare_server] = ["bare-client", "bare-server"].map(|name| bare.add_pod(name));
        let (client, stranger, server) = (client?, stranger?, server?);
        let (bare_client, bare_server) = (bare_client?, bare_server?);
        for (server, clients) in [(&server, &[&client, &stranger][..]), (&bare_server, &[&bare_client][..])] {
            answer_for_prefixes(server)?;
            for client in clients {
                route_to(server, client)?;
            }
        }
        let mut feed = Feed::connect(agent.stream_path())?;
        let pods = vec![model_pod(&client, true), model_pod(&server, true), model_pod(&stranger, false)];
        feed.send(&Event::Sync { state: Snapshot { pods, ..Snapshot::default() } })?;
        agent.wait_ready()?;
        let mut servers = [Worker::start(&server.place, None, false)?, Worker::start(&bare_server.place, None, false)?];
        for server in &mut servers {
            server.serve(&[CONNECT_PORT, FLOW_PORT])?;
        }
        let mut rig = Self {
            client: Worker::start(&client.place, Some(&pins), true)?,
            stranger: Worker::start(&stranger.place, Some(&pins), true)?,
            bare_client: Worker::start(&bare_client.place, None, true)?,
            _servers: servers,
            server_address: server.v4(),
            bare_server_address: bare_server.v4(),
            pins,
            feed,
            agent,
            pods: vec![client, stranger, server, bare_client, bare_server],
            lab,
        };
        rig.wait_enrolled()?;
        Ok(rig)
    }

    /// Until the client's SYNs are seen by the programs on its interface: the last to be attached.
    fn wait_enrolled(&mut self) -> Result<()> {
        let number = 9;
        self.service(number, &[(live(20_000), CONNECT_PORT)])?;
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let done = self.client.connects(vec![Target::new(vip(number))], 1)?.remove(0);
            if done.failed == 0 && done.watched > 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the client's pod was not enrolled within 20 s: {done:?}\n{}", self.agent.process().log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Tells the agent of service `number` with these backends. Returns their words: ready.
    pub fn service(&mut self, number: u16, backends: &[(IpAddr, u16)]) -> Result<Vec<Word>> {
        let address = if backends.iter().all(|(address, _)| address.is_ipv6()) { vip6(number) } else { vip(number) };
        let name = format!("bench/{number}");
        self.upsert(feed::service(&name, address.ip(), SERVICE_PORT), backends)
    }

    pub fn upsert(&mut self, service: Service, backends: &[(IpAddr, u16)]) -> Result<Vec<Word>> {
        let name = service.name.clone();
        self.feed.send(&feed::upsert(Object::Service(service)))?;
        for (address, port) in backends {
            self.feed.send(&feed::upsert(Object::Backend(feed::backend(&name, *address, *port))))?;
        }
        // A word of each, as it is now: fresh and ready.
        let health = self.pins.health()?;
        backends
            .iter()
            .map(|(address, port)| {
                let id = self.backend(*address, *port)?;
                Ok((id, health.word(id).load(Ordering::SeqCst)))
            })
            .collect()
    }

    pub fn backend(&self, address: IpAddr, port: u16) -> Result<u32> {
        self.pins.backend(&endpoint(address, port))
    }

    /// Until dropped, one client's word makes any number of backends suspect.
    pub fn trust_one_client(&self) -> Result<Changed> {
        let settings = self.pins.settings()?;
        let before = std::array::from_fn(|index| settings.word(index as u32).load(Ordering::SeqCst));
        let mut changed = Changed { settings, before };
        changed.set(std::mem::offset_of!(abi::Settings, suspect_percent), 1_000_000);
        Ok(changed)
    }

    /// On the bare node: a connect whose first SYN gets no answer and whose second one does. ns.
    pub fn first_syn_lost(&mut self) -> Result<u64> {
        let netns = &self.pods[4].place.netns;
        let address = silent(1);
        let request = Target::new((address, CONNECT_PORT));
        let client = &mut self.bare_client;
        let connected = std::thread::scope(|scope| {
            let connected = scope.spawn(move || client.connect_all(request, 1));
            std::thread::sleep(Duration::from_millis(300));
            let listen = ip(Some(netns), &format!("route add local {address}/32 dev lo\n"));
            let connected = connected.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            listen.and(connected)
        })?;
        ip(Some(netns), &format!("route del local {address}/32 dev lo\n"))?;
        connected.direct_ns.first().copied().context("no connect was timed")
    }

    /// Connects of the enrolled client, all of which must succeed.
    pub fn connects(&mut self, target: Target, rounds: u32) -> Result<Connected> {
        self.client.connect_all(target, rounds)
    }

    pub fn agent_pid(&self) -> i32 {
        self.agent.process().pid()
    }

    pub fn server_pod(&self) -> &Pod {
        &self.pods[2]
    }

    pub fn bare_server_pod(&self) -> &Pod {
        &self.pods[4]
    }
}

/// Settings that are not the agent's; they are again when this is dropped.
pub struct Changed {
    settings: Words,
    before: [u64; size_of::<abi::Settings>() / 8],
}

impl Changed {
    pub fn set_max_replays(&mut self, replays: u32) {
        self.set(std::mem::offset_of!(abi::Settings, max_replays), replays);
    }

    fn set(&mut self, offset: usize, value: u32) {
        let word = self.settings.word((offset / 8) as u32);
        let shift = (offset % 8) * 8;
        let others = word.load(Ordering::SeqCst) & !(0xffff_ffff << shift);
        word.store(others | (u64::from(value) << shift), Ordering::SeqCst);
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        for (index, before) in (0..).zip(self.before) {
            self.settings.word(index).store(before, Ordering::SeqCst);
        }
    }
}

/// The pins of a node's agent.
pub fn pins(lab: &Lab, node: &Node) -> Pins {
    Pins::new(lab.dir().join("bpf").join(&node.name))
}

pub fn endpoint(address: IpAddr, port: u16) -> Endpoint {
    let addr = match address {
        IpAddr::V4(v4) => abi::Addr::v4(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            let word = |n: usize| u32::from_ne_bytes([octets[n], octets[n + 1], octets[n + 2], octets[n + 3]]);
            abi::Addr([word(0), word(4), word(8), word(12)])
        }
    };
    Endpoint::new(addr, port.to_be(), PROTO_TCP)
}

fn answer_for_prefixes(server: &Pod) -> Result<()> {
    // What is not its own it must neither forward nor answer by ICMP.
    server.place.netns.sysctl(&[("ipv4/ip_forward", "0"), ("ipv4/conf/all/forwarding", "0")])?;
    ip(Some(&server.place.netns), "route add local 10.99.0.0/16 dev lo\nroute add local fd00:99::/64 dev lo\n")
        .context("have the server pod answer for the backends' addresses")
}

fn route_to(server: &Pod, client: &Pod) -> Result<()> {
    let (v4, v6) = (server.v4(), server.v6());
    let routes = format!(
        "route add 10.99.0.0/16 via {v4}\nroute add 10.98.0.0/16 via {v4}\nroute add unreachable 10.97.0.0/16\n\
         route add fd00:99::/64 via {v6}\n"
    );
    ip(Some(&client.place.netns), &routes).context("route to the backends' addresses")
}

pub fn model_pod(pod: &Pod, enrolled: bool) -> model::Pod {
    model::Pod {
        name: pod.name.as_str().into(),
        addresses: pod.addresses().into(),
        netns: Some(pod.netns_path().to_owned()),
        pid: None,
        enrolled,
        gateway: false,
        labels: Default::default(),
        stop_signals: Vec::new(),
        service_account: None,
        terminating: false,
    }
}

/// A backend that is a pod of the node.
pub fn backend_of(pod: &Pod, service: &str, port: u16) -> Backend {
    Backend { pod: Some(pod.name.as_str().into()), ..feed::backend(service, pod.v4(), port) }
}
