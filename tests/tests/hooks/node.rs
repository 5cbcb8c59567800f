//! One network namespace with the hooks attached to one cgroup: everything on the loopback interface, so that no
//! packet is rebound and only the hooks themselves are seen at work.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dataplane_ebpf::{
    abi::{
        Addr, Backend, Endpoint, Event, Frontend, LAYER_CHOOSE, LAYER_KNOW, POD_ENROLLED, PROTO_TCP, Service,
        ServiceId, Settings, Slot, SlotKey, Stat,
    },
    health::{Class, Health, State, ticks, ticks_of_ms},
};
use dataplane_user::{
    kernel::{self, Config, Events, Kernel, Notice, Sizes, default_settings, monotonic_ns},
    registry::change::{Change, Enrollment, Netns},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::signal::Signal,
};

/// The process is in one cgroup at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub const POD: u32 = 7;

/// The namespace is the client's and every backend's.
pub struct Node {
    pub kernel: Kernel,
    pub events: Events,
    netns: OwnedFd,
    cgroup: Cgroup,
    services: u32,
    backends: u32,
    generation: u32,
    _bpffs: Bpffs,
    _turn: MutexGuard<'static, ()>,
}

/// A service and its backends, in the order they were given.
#[derive(Clone)]
pub struct Served {
    pub at: SocketAddr,
    pub service: Service,
    pub backends: Vec<(u32, Backend)>,
}

impl Node {
    /// A node whose only pod is enrolled with these `abi::POD_*` besides, without rebind: what a hook does
    /// is not to be mended by another layer.
    pub fn new(flags: u32, settings: impl FnOnce(&mut Settings)) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let netns = scratch_netns();
        let cgroup = Cgroup::enter();
        let bpffs = Bpffs::mount();
        let mut config = Config {
            cgroup: Some(cgroup.path.clone()),
            bpffs: bpffs.0.path().to_owned(),
            settings: Settings {
                layers: LAYER_KNOW | LAYER_CHOOSE,
                suspect_ticks: ticks_of_ms(300),
                ..default_settings()
            },
            sizes: Sizes {
                frontends: 64,
                services: 64,
                slots: 1024,
                backends: 1024,
                pods: 16,
                listeners: 256,
                affinity: 256,
                suspects: 256,
                rebinds: 256,
                mesh: 64,
                events_bytes: 1 << 16,
            },
            ..Config::default()
        };
        settings(&mut config.settings);
        let opened = Kernel::open(config).expect("load the object");
        let mut kernel = opened.kernel;
        kernel.activate().expect("attach the hooks");
        let mut outcomes = opened.outcomes;
        let enrollment = Enrollment {
            pod: POD,
            name: "test/all".into(),
            netns: Netns::Path(fd_path(&netns)),
            flags: POD_ENROLLED | flags,
            stop_signals: 1 << Signal::SIGTERM as u64,
            first_backend: 1,
        };
        let rejected = kernel.write(&[Change::Enroll(Arc::new(enrollment))]);
        assert!(rejected.is_empty(), "{rejected:?}");
        let deadline = Instant::now() + Duration::from_secs(10);
        while kernel.enrolled().is_empty() {
            assert!(Instant::now() < deadline, "the pod was not enrolled");
            if let Ok(outcome) = outcomes.try_recv() {
                for notice in kernel.complete(outcome) {
                    assert!(!matches!(notice, Notice::Failed { .. }), "{notice:?}");
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Self {
            kernel,
            events: opened.events,
            netns,
            cgroup,
            services: 0,
            backends: 0,
            generation: 0,
            _bpffs: bpffs,
            _turn: turn,
        }
    }

    /// A service at `at` with a backend of weight 1 at each address, all of them of the node's pod.
    pub fn serve(&mut self, at: &str, proto: u8, backends: &[&str]) -> Served {
        self.serve_with(at, proto, backends, |_, _| {})
    }

    /// As [`Node::serve`]; `adjust` may change the service and the slots.
    pub fn serve_with(
        &mut self,
        at: &str,
        proto: u8,
        backends: &[&str],
        adjust: impl FnOnce(&mut Service, &mut [Slot]),
    ) -> Served {
        let id = self.next_service();
        let at: SocketAddr = at.parse().expect("a service's address");
        let backends: Vec<(u32, Backend)> =
            backends.iter().map(|at| self.backend(at.parse().expect("a backend's address"), proto)).collect();
        let mut service =
            Service { id, ready: backends.len() as u32, terminating: 0, flags: 0, affinity_s: 0, max_weight: 1 };
        let mut slots: Vec<Slot> = backends
            .iter()
            .map(|(backend, entry)| Slot { backend: *backend, generation: entry.generation, service: id, weight: 1 })
            .collect();
        adjust(&mut service, &mut slots);
        let mut changes = vec![Change::PutService(service)];
        for (index, slot) in slots.iter().enumerate() {
            changes.push(Change::PutSlot(SlotKey { service: id, index: index as u32 }, *slot));
        }
        let key = endpoint(at, proto);
        changes.push(Change::PutFrontend(key, Frontend { service: id, check: key.check() }));
        self.write(&changes);
        Served { at, service, backends }
    }

    pub fn next_service(&mut self) -> ServiceId {
        self.services += 1;
        self.services
    }

    /// A backend, first in its pod's chain behind those made before.
    fn backend(&mut self, at: SocketAddr, proto: u8) -> (u32, Backend) {
        self.backends += 1;
        self.generation += 1;
        let id = self.backends;
        let backend = Backend {
            at: endpoint(at, proto),
            pod: POD,
            generation: self.generation,
            next_in_pod: id + 1,
            ..Backend::default()
        };
        self.write(&[Change::AddBackend { id, backend, state: State::Ready }]);
        (id, backend)
    }

    pub fn write(&mut self, changes: &[Change]) {
        let rejected = self.kernel.write(changes);
        assert!(rejected.is_empty(), "{rejected:?}");
    }

    /// Runs `work` in the namespace.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.netns, work)
    }

    pub fn health(&self, backend: u32) -> Health {
        self.kernel.health(backend)
    }

    pub fn class(&self, backend: &(u32, Backend)) -> Class {
        self.health(backend.0).class(backend.1.generation, ticks(monotonic_ns()))
    }

    pub fn counters(&self) -> BTreeMap<&'static str, u64> {
        self.kernel.stats().into_iter().map(|(stat, n)| (stat.name(), n)).collect()
    }

    pub fn counter(&self, stat: Stat) -> u64 {
        self.counters()[stat.name()]
    }

    /// The records told since the last call.
    pub fn told(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.events.next_event()).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Links are pinned: they go with the private file system and with the cgroup.
        self.cgroup.leave();
    }
}

/// Waits for what the kernel does in another context.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is_so() {
        assert!(Instant::now() < deadline, "not within 5 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn endpoint(at: SocketAddr, proto: u8) -> Endpoint {
    let addr = match at.ip() {
        IpAddr::V4(ip) => Addr::v4(u32::from_ne_bytes(ip.octets())),
        IpAddr::V6(ip) => {
            let mut words = [0; 4];
            for (word, bytes) in words.iter_mut().zip(ip.octets().chunks_exact(4)) {
                *word = u32::from_ne_bytes(bytes.try_into().expect("four bytes"));
            }
            Addr(words)
        }
    };
    Endpoint::new(addr, at.port().to_be(), proto)
}

pub const TCP: u8 = PROTO_TCP;

fn within<T: Send>(netns: &OwnedFd, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A network namespace with the addresses 10.99.0.1 to .8 and fd99::1 to ::8. It ends with its descriptor.
fn scratch_netns() -> OwnedFd {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (root is needed)");
        fs::File::open("/proc/thread-self/ns/net").expect("its descriptor").into()
    });
    let netns: OwnedFd = made.join().expect("the thread that makes the namespace");
    within(&netns, || {
        ip(&["link", "set", "lo", "up"]);
        for n in 1..=8 {
            ip(&["addr", "add", &format!("10.99.0.{n}/32"), "dev", "lo"]);
            ip(&["addr", "add", &format!("fd99::{n}/128"), "dev", "lo", "nodad"]);
        }
    });
    netns
}

fn ip(args: &[&str]) {
    let done = Command::new("ip").args(args).output().expect("run ip(8)");
    assert!(done.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn fd_path(fd: &OwnedFd) -> PathBuf {
    use std::os::fd::AsRawFd as _;
    PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd()))
}

/// A scratch cgroup that the process is in; where it came from is kept.
struct Cgroup {
    path: PathBuf,
    home: PathBuf,
}

impl Cgroup {
    fn enter() -> Self {
        let root = kernel::cgroup2_root().expect("a cgroup2 hierarchy");
        let own = fs::read_to_string("/proc/self/cgroup").expect("/proc/self/cgroup");
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("a place in cgroup2");
        let home = root.join(own);
        let path = root.join(format!("hitless-hooks-{}", std::process::id()));
        fs::create_dir(&path).expect("a scratch cgroup");
        move_to(&path);
        Self { path, home }
    }

    fn leave(&self) {
        move_to(&self.home);
        // A child that was just waited for leaves a moment later.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("left behind: {}", self.path.display());
    }
}

fn move_to(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
        .unwrap_or_else(|error| panic!("move to {}: {error}", cgroup.display()));
}

/// A private BPF file system.
struct Bpffs(tempfile::TempDir);

impl Bpffs {
    fn mount() -> Self {
        let at = tempfile::tempdir().expect("a directory");
        mount(Some("bpf"), at.path(), Some("bpf"), MsFlags::empty(), None::<&str>).expect("mount a BPF file system");
        Self(at)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.0.path(), MntFlags::MNT_DETACH) {
            eprintln!("unmount {}: {error}", self.0.path().display());
        }
    }
}
