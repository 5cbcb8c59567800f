//! A client pod with the real programs around it, and backends to move its connections between.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use dataplane_ebpf::{
    abi::{
        Addr, Backend, Endpoint, Frontend, LAYER_REBIND, POD_ENROLLED, POD_HOST, PROTO_TCP, Service, Settings, Slot,
        SlotKey, Stat,
    },
    health::State,
};
use dataplane_user::{
    kernel::{Config, Kernel, Notice, Opened, Tcx, default_settings},
    registry::change::{Change, Enrollment, Netns},
};
use hitless_tests::{
    lab::{
        Lab, LabSpec, Pod, Topology,
        net::{Family, connect, service_address},
        pod::Place,
    },
    workload::sockets::Kind,
};
use nix::sys::socket::{Backlog, SockaddrStorage, bind, listen, setsockopt, sockopt};

pub const PORT: u16 = 8080;

/// Backends' numbers differ by family: a service has one family.
const V6: u32 = 100;

pub struct Bench {
    // First, so that links go before the namespaces that they are in.
    pub opened: Opened,
    pub client: Pod,
    pub backends: Vec<Pod>,
    pub lab: Lab,
    pods: u32,
}

impl Bench {
    /// A client on node 1 and backends on the given nodes. Only L3 is on.
    pub fn new(topology: Topology, backends: &[usize]) -> Self {
        Self::with(topology, backends, Tcx::Auto)
    }

    pub fn with(topology: Topology, backends: &[usize], tcx: Tcx) -> Self {
        let lab = Lab::new(LabSpec { nodes: 2, topology }).expect("a lab");
        let client = lab.node(1).add_pod("client").expect("a pod");
        let backends: Vec<Pod> = backends
            .iter()
            .enumerate()
            .map(|(n, node)| lab.node(*node).add_pod(&format!("backend-{n}")).expect("a pod"))
            .collect();
        let config = Config {
            cgroup: Some(lab.node(1).cgroup()),
            bpffs: lab.dir().join("bpf"),
            tcx,
            settings: Settings { layers: LAYER_REBIND, ..default_settings() },
            ..Config::default()
        };
        let opened = Kernel::open(config).expect("the programs load");
        let mut bench = Self { opened, client, backends, lab, pods: 0 };
        for family in Family::BOTH {
            bench.write_service(family);
        }
        bench.opened.kernel.activate().expect("attaches");
        let netns = Netns::Path(bench.client.netns_path().to_owned());
        bench.enroll(netns, 0);
        bench
    }

    pub fn enroll(&mut self, netns: Netns, flags: u32) {
        self.pods += 1;
        let enrollment = Enrollment {
            pod: self.pods,
            name: format!("pod-{}", self.pods).into(),
            netns,
            flags: POD_ENROLLED | flags,
            stop_signals: 0,
            first_backend: 0,
        };
        self.write(&[Change::Enroll(Arc::new(enrollment))]);
        loop {
            let outcome = self.opened.outcomes.blocking_recv().expect("the enroller lives");
            for notice in self.opened.kernel.complete(outcome) {
                match notice {
                    Notice::Enrolled { pod, .. } if pod == self.pods => return,
                    Notice::Failed { error, .. } => panic!("enrolling failed: {error}"),
                    _ => {}
                }
            }
        }
    }

    pub fn write(&mut self, changes: &[Change]) {
        let rejected = self.opened.kernel.write(changes);
        assert!(rejected.is_empty(), "{rejected:?}");
    }

    /// One service per family whose backends are all of the lab's, the first by far the likeliest choice.
    fn write_service(&mut self, family: Family) {
        let service = service_id(family);
        let mut changes = Vec::new();
        for (n, pod) in self.backends.iter().enumerate() {
            let id = backend_id(family, n);
            let at = endpoint(pod.addresses()[family as usize], PORT);
            changes.push(Change::AddBackend {
                id,
                backend: Backend { at, generation: 1, ..Backend::default() },
                state: State::Ready,
            });
            let weight = if n == 0 { 65535 } else { 1 };
            changes.push(Change::PutSlot(
                SlotKey { service, index: n as u32 },
                Slot { backend: id, generation: 1, service, weight },
            ));
        }
        let ready = self.backends.len() as u32;
        changes.push(Change::PutService(Service { id: service, ready, max_weight: 65535, ..Service::default() }));
        let at = endpoint(service_address(family, 1), 80);
        changes.push(Change::PutFrontend(at, Frontend { service, check: at.check() }));
        self.write(&changes);
    }

    /// Makes all backends equally likely.
    pub fn weigh_alike(&mut self, family: Family) {
        let service = service_id(family);
        let ready = self.backends.len() as u32;
        let mut changes: Vec<Change> = (0..ready)
            .map(|index| {
                let backend = backend_id(family, index as usize);
                Change::PutSlot(SlotKey { service, index }, Slot { backend, generation: 1, service, weight: 1 })
            })
            .collect();
        changes.push(Change::PutService(Service { id: service, ready, max_weight: 1, ..Service::default() }));
        self.write(&changes);
    }

    /// A service of the second and third backend, of which `first` is by far the likeliest choice.
    pub fn second_service(&mut self, family: Family, first: usize) -> SocketAddr {
        let service = service_id(family) + 2;
        let mut changes = Vec::new();
        for n in [1, 2] {
            let weight = if n == first { 65535 } else { 1 };
            let slot = Slot { backend: backend_id(family, n), generation: 1, service, weight };
            changes.push(Change::PutSlot(SlotKey { service, index: n as u32 - 1 }, slot));
        }
        changes.push(Change::PutService(Service { id: service, ready: 2, max_weight: 65535, ..Service::default() }));
        let to = SocketAddr::new(service_address(family, 2), 80);
        let at = endpoint(to.ip(), to.port());
        changes.push(Change::PutFrontend(at, Frontend { service, check: at.check() }));
        self.write(&changes);
        to
    }

    pub fn service(family: Family) -> SocketAddr {
        SocketAddr::new(service_address(family, 1), 80)
    }

    pub fn stat(&self, stat: Stat) -> u64 {
        self.opened.kernel.stats().into_iter().find(|(s, _)| *s == stat).expect("every counter is told").1
    }

    /// All counters that are not 0, to be shown when a test fails.
    pub fn counted(&self) -> Vec<(Stat, u64)> {
        self.opened.kernel.stats().into_iter().filter(|(_, n)| *n != 0).collect()
    }

    pub fn settings(&mut self, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.opened.kernel.settings();
        change(&mut settings);
        self.opened.kernel.set_settings(settings);
    }

    pub fn connect(&self, family: Family) -> std::io::Result<TcpStream> {
        connect_from(&self.client.place, Self::service(family))
    }
}

pub fn service_id(family: Family) -> u32 {
    1 + family as u32
}

pub fn backend_id(family: Family, n: usize) -> u32 {
    1 + n as u32 + family as u32 * V6
}

pub fn endpoint(ip: std::net::IpAddr, port: u16) -> Endpoint {
    let addr = match ip {
        std::net::IpAddr::V4(ip) => Addr::v4(u32::from(ip).to_be()),
        std::net::IpAddr::V6(ip) => {
            let mut addr = Addr::default();
            for (word, bytes) in addr.0.iter_mut().zip(ip.octets().chunks(4)) {
                *word = u32::from_ne_bytes(bytes.try_into().expect("four bytes"));
            }
            addr
        }
    };
    Endpoint::new(addr, port.to_be(), PROTO_TCP)
}

pub fn kind(to: SocketAddr) -> Kind {
    if to.is_ipv4() { Kind::Tcp4 } else { Kind::Tcp6 }
}

pub fn connect_from(place: &Place, to: SocketAddr) -> std::io::Result<TcpStream> {
    connect(place.socket(kind(to)).expect("a socket"), to)
}

/// Serves in a pod from a thread of the test: says its name, then echoes until the client is done.
pub struct Server {
    /// Keeps the listener open.
    _listener: Arc<OwnedFd>,
    stop: Arc<std::sync::atomic::AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(pod: &Pod, name: u8) -> Self {
        let listener = Arc::new(listening(pod));
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (accepting, stopping) = (listener.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let listener = std::net::TcpListener::from(accepting.try_clone().expect("a descriptor"));
            listener.set_nonblocking(true).expect("a listener");
            while !stopping.load(std::sync::atomic::Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => drop(std::thread::spawn(move || echo(stream, name))),
                    Err(_) => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        });
        Self { _listener: listener, stop, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A socket that listens on [`PORT`] of both families.
fn listening(pod: &Pod) -> OwnedFd {
    let socket = pod.place.socket(Kind::Tcp6).expect("a socket");
    setsockopt(&socket, sockopt::ReuseAddr, &true).expect("an option");
    let any: SocketAddr = format!("[::]:{PORT}").parse().expect("an address");
    bind(socket.as_raw_fd(), &SockaddrStorage::from(any)).expect("bind");
    listen(&socket, Backlog::new(4096).expect("a backlog")).expect("listen");
    socket
}

fn echo(mut stream: TcpStream, name: u8) {
    stream.set_nonblocking(false).expect("a stream");
    let _ = stream.set_nodelay(true);
    if stream.write_all(&[name]).is_err() {
        return;
    }
    let mut buffer = vec![0; 256 * 1024];
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..len]).is_err() {
            return;
        }
    }
}

/// Who answers.
pub fn hear(stream: &mut TcpStream) -> u8 {
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a stream");
    let mut name = [0];
    stream.read_exact(&mut name).expect("the server says its name");
    name[0]
}

/// Sends `megabytes` that can be told apart and reads them back.
pub fn exchange(stream: &TcpStream, megabytes: usize) {
    let data: Vec<u8> = (0..megabytes * 1024 * 1024 / 8).flat_map(|n| (n as u64 ^ 0x5bd1_e995).to_le_bytes()).collect();
    let mut writer = stream.try_clone().expect("a stream");
    let sent = data.clone();
    let sending = std::thread::spawn(move || {
        writer.write_all(&sent).expect("sent");
        writer.shutdown(std::net::Shutdown::Write).expect("half closed");
    });
    let mut back = Vec::with_capacity(data.len());
    let mut reader = stream;
    reader.read_to_end(&mut back).expect("echoed");
    sending.join().expect("sent");
    assert!(back == data, "{} of {} bytes came back, or not the same", back.len(), data.len());
}

/// How long something takes.
pub fn timed<T>(what: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = what();
    (result, start.elapsed())
}

/// The node's own network namespace is a client, too.
pub const HOST: u32 = POD_HOST;
