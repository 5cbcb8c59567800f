//! A pod: a network namespace on a node, and processes that are each the init of a container.

use std::{
    fs,
    net::IpAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result};

use super::{
    Site, Topology, cleanup,
    net::{self, Family, Netns, ip},
    node::{Node, nodad},
    process::{Process, Spawn},
};
use crate::workload::sockets::{self, Maker};

/// Somewhere processes run: a network namespace with a cgroup.
pub struct Place {
    pub(super) site: Arc<Site>,
    pub netns: Netns,
    pub cgroup: PathBuf,
    pub name: String,
    processes: AtomicU32,
    sockets: Mutex<Option<(Process, Maker)>>,
}

impl Place {
    pub(super) fn new(site: Arc<Site>, netns: Netns, cgroup: PathBuf, name: &str) -> Result<Self> {
        fs::create_dir_all(&cgroup).with_context(|| format!("create cgroup {}", cgroup.display()))?;
        Ok(Self { site, netns, cgroup, name: name.to_owned(), processes: AtomicU32::new(0), sockets: Mutex::default() })
    }

    /// Start a program as the init of its own PID namespace, like a container's.
    pub fn spawn<S: AsRef<str>>(&self, args: &[S]) -> Result<Process> {
        self.start(args, true, &self.cgroup)
    }

    /// Start the node's agent: in the machine's PID namespace, and below the cgroup that it attaches to, as it is where
    /// that is the root.
    pub(super) fn start_agent(&self, args: &[String]) -> Result<Process> {
        let cgroup = self.cgroup.with_file_name("agent");
        std::fs::create_dir_all(&cgroup)?;
        self.start(args, false, &cgroup)
    }

    fn start<S: AsRef<str>>(&self, args: &[S], container: bool, cgroup: &Path) -> Result<Process> {
        let number = self.processes.fetch_add(1, Ordering::Relaxed);
        let args: Vec<String> = args.iter().map(|arg| arg.as_ref().to_owned()).collect();
        let log = self.site.dir.join(format!("logs/{}-{number}.log", self.name));
        Spawn { args: &args, netns: &self.netns, cgroup, container, log: &log }.start()
    }

    /// Start one of this crate's own workloads and wait until it says that it is ready.
    pub fn workload<S: AsRef<str>>(&self, args: &[S]) -> Result<Process> {
        let number = self.processes.load(Ordering::Relaxed);
        let ready = self.site.dir.join(format!("{}-{number}.ready", self.name));
        let binary = crate::workload::binary()?;
        let mut all = vec![binary.to_string_lossy().into_owned()];
        all.extend(args.iter().map(|arg| arg.as_ref().to_owned()));
        all.extend(["--ready-file".to_owned(), ready.to_string_lossy().into_owned()]);
        let process = self.spawn(&all)?;
        process.wait_for_file(&ready)?;
        Ok(process)
    }

    /// A socket of this place, to be used here: its connects meet this place's programs.
    pub fn socket(&self, kind: sockets::Kind) -> Result<OwnedFd> {
        let mut made = self.sockets.lock().expect("no panic while locked");
        if made.is_none() {
            let path = self.file("sockets.sock");
            let process = self.workload(&["sockets", "--listen", &path.to_string_lossy()])?;
            *made = Some((process, Maker::connect(&path)?));
        }
        let (_, maker) = made.as_mut().expect("just made");
        maker.make(kind).with_context(|| format!("make a socket in {}", self.name))
    }

    /// A path for a file or socket of this place.
    pub fn file(&self, name: &str) -> PathBuf {
        self.site.dir.join(format!("{}-{name}", self.name))
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct PodOptions {
    /// Its number on the node, which makes its addresses; two pods may have the same one after another.
    pub number: Option<u16>,
}

pub struct Pod {
    /// namespace/name
    pub name: String,
    pub node: usize,
    pub place: Place,
    pub cookie: u64,
    number: u16,
    host: Netns,
    /// The node's end of its cable.
    port: String,
    topology: Topology,
    deleted: bool,
}

/// What a routed pod believes to be its gateway: the same on every node (as Calico does).
const ROUTED_GATEWAY: [&str; 2] = ["169.254.1.1", "fe80::1"];

static PORTS: AtomicU32 = AtomicU32::new(0);

impl Pod {
    pub(super) fn new(node: &Node, name: &str, number: u16) -> Result<Self> {
        let site = node.site.clone();
        let netns = Netns::create(&site.id, &format!("{}-{name}", node.name))?;
        let cgroup = node.cgroup().join(name);
        let place = Place::new(site.clone(), netns, cgroup, name)?;
        let pod = Self {
            name: format!("lab/{name}"),
            node: node.index,
            cookie: place.netns.cookie()?,
            place,
            number,
            host: node.host.netns.clone(),
            port: format!("veth{}", PORTS.fetch_add(1, Ordering::Relaxed)),
            topology: site.spec.topology,
            deleted: false,
        };
        let (port, mtu, netns) = (&pod.port, node.pod_mtu(), &pod.place.netns.name);
        let mut batch = format!("link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {netns}\n");
        match pod.topology {
            Topology::Bridge | Topology::Vxlan => batch.push_str(&format!("link set {port} master br0 up\n")),
            Topology::Routed => {
                let [v4, v6] = ROUTED_GATEWAY;
                batch.push_str(&format!(
                    "addr add {v4}/32 dev {port}\naddr add {v6}/64 dev {port} nodad\nlink set {port} up\n"
                ));
            }
        }
        ip(Some(&pod.host), &batch)?;
        ip(Some(&pod.place.netns), "link set lo up\nlink set eth0 up\n")?;
        pod.address(number)?;
        Ok(pod)
    }

    /// Its addresses, IPv4 first.
    pub fn addresses(&self) -> [IpAddr; 2] {
        Family::BOTH.map(|family| net::pod_address(family, self.node, self.number))
    }

    pub fn v4(&self) -> IpAddr {
        self.addresses()[0]
    }

    pub fn v6(&self) -> IpAddr {
        self.addresses()[1]
    }

    pub fn netns_path(&self) -> &Path {
        &self.place.netns.path
    }

    pub fn spawn<S: AsRef<str>>(&self, args: &[S]) -> Result<Process> {
        self.place.spawn(args)
    }

    pub fn workload<S: AsRef<str>>(&self, args: &[S]) -> Result<Process> {
        self.place.workload(args)
    }

    fn address(&self, number: u16) -> Result<()> {
        let (mut inside, mut outside) = (String::new(), String::new());
        for (family, routed) in Family::BOTH.into_iter().zip(ROUTED_GATEWAY) {
            let own = net::pod_address(family, self.node, number);
            let (prefix, gateway) = match self.topology {
                Topology::Routed => (family.host_prefix(), routed.to_owned()),
                _ => (net::pod_prefix(family), net::pod_address(family, self.node, 1).to_string()),
            };
            inside.push_str(&format!("addr add {own}/{prefix} dev eth0{}\n", nodad(family)));
            inside.push_str(&format!("route replace default via {gateway} dev eth0 onlink\n"));
            if self.topology == Topology::Routed {
                outside.push_str(&format!("route replace {own}/{} dev {}\n", family.host_prefix(), self.port));
            }
        }
        ip(Some(&self.place.netns), &inside)?;
        ip(Some(&self.host), &outside)
    }

    /// Other addresses for the same pod.
    pub fn readdress(&mut self, number: u16) -> Result<()> {
        let (mut inside, mut outside) = (String::new(), String::new());
        for family in Family::BOTH {
            let own = net::pod_address(family, self.node, self.number);
            let routed = self.topology == Topology::Routed;
            let prefix = if routed { family.host_prefix() } else { net::pod_prefix(family) };
            inside.push_str(&format!("addr del {own}/{prefix} dev eth0\n"));
            if routed {
                outside.push_str(&format!("route del {own}/{} dev {}\n", family.host_prefix(), self.port));
            }
        }
        ip(Some(&self.place.netns), &inside)?;
        ip(Some(&self.host), &outside)?;
        self.number = number;
        self.address(number)
    }

    /// Pull the pod's plug: nothing gets to it, and nobody says so.
    pub fn cut_cable(&self) -> Result<()> {
        match self.topology {
            // The node's end going down would take the pod's route along, and the node would say
            // "unreachable": cut a routed pod at its own end.
            Topology::Routed => ip(Some(&self.place.netns), "link set eth0 down\n"),
            _ => ip(Some(&self.host), &format!("link set {} down\n", self.port)),
        }
    }

    pub fn restore_cable(&self) -> Result<()> {
        match self.topology {
            Topology::Routed => {
                // Going down took the IPv6 address and the routes along.
                ip(Some(&self.place.netns), "addr flush dev eth0 scope global\nlink set eth0 up\n")?;
                self.address(self.number)
            }
            _ => ip(Some(&self.host), &format!("link set {} up\n", self.port)),
        }
    }

    /// The pod is gone: processes, interface, addresses, namespace.
    pub fn delete(mut self) -> Result<()> {
        self.deleted = true;
        self.take_down()
    }

    fn take_down(&self) -> Result<()> {
        cleanup::kill_cgroup(&self.place.cgroup);
        ip(Some(&self.host), &format!("link del {}\n", self.port))?;
        net::delete_netns(&self.place.netns.name)?;
        cleanup::remove_cgroup(&self.place.cgroup).with_context(|| format!("remove cgroup of {}", self.name))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // With its lab gone there is nothing left to take down.
        if !self.deleted
            && self.place.netns.path.exists()
            && let Err(error) = self.take_down()
        {
            eprintln!("could not take down pod {}: {error:#}", self.name);
        }
    }
}
