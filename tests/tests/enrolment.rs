//! Pods enrolled, watched over and let go of: cookies, tc programs, listeners.
//!
//! Each test has a BPF file system, a cgroup and network namespaces of its own.

use std::{
    net::{Ipv4Addr, TcpListener},
    os::{fd::AsFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use dataplane_ebpf::{
    abi::{self, Addr, Backend, Endpoint, Frontend, PROTO_TCP, Service, Slot, SlotKey},
    health::{Input, State},
};
use dataplane_user::{
    kernel::{self, Config, Error, Kernel, Notice, Opened, Tcx},
    registry::change::{Change, Enrollment, Netns},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
};

/// A BPF file system and a cgroup that go with the test.
struct Scratch {
    bpffs: tempfile::TempDir,
    cgroup: PathBuf,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

fn unique(prefix: &str) -> String {
    format!("{prefix}{}x{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

impl Scratch {
    fn new() -> Self {
        let bpffs = tempfile::Builder::new().prefix("hitless-test-bpf").tempdir().expect("a directory");
        mount(Some("bpf"), bpffs.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .expect("mounting bpffs needs root");
        let cgroup = kernel::cgroup2_root().expect("a cgroup2 hierarchy").join(unique("hitless-test-"));
        std::fs::create_dir(&cgroup).expect("a cgroup");
        Self { bpffs, cgroup }
    }

    fn config(&self, tcx: Tcx) -> Config {
        Config { cgroup: Some(self.cgroup.clone()), bpffs: self.bpffs.path().to_owned(), tcx, ..Config::default() }
    }

    fn pins(&self, kind: &str) -> usize {
        let links = std::fs::read_dir(self.config(Tcx::Auto).root().join("links")).expect("installed");
        let name = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("listed").file_name();
        links.map(name).filter(|name| name.to_string_lossy().starts_with(kind)).count()
    }

    /// The enrolled pods, by `hitless status`'s way of looking.
    fn pods(&self) -> Vec<abi::Pod> {
        let seen = kernel::snapshot(&self.config(Tcx::Auto)).expect("readable").expect("installed");
        seen.state.expect("our layout").pods.into_iter().map(|(_, pod)| pod).collect()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = umount2(self.bpffs.path(), MntFlags::MNT_DETACH);
        // Processes that the test ended leave the cgroup when they are reaped.
        for _ in 0..50 {
            if std::fs::remove_dir(&self.cgroup).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A network namespace with 10.0.0.1/24 on a veth pair's one end.
struct Pod {
    name: String,
    path: PathBuf,
}

impl Pod {
    fn new() -> Self {
        let name = unique("hlk");
        run(&["ip", "netns", "add", &name]);
        let pod = Self { path: PathBuf::from("/run/netns").join(&name), name };
        pod.run("ip link set lo up");
        pod.run("ip link add eth0 type veth peer name eth1");
        pod.run("ip address add 10.0.0.1/24 dev eth0");
        pod.run("ip link set eth0 up");
        pod.run("ip link set eth1 up");
        pod
    }

    /// A command in the namespace; what it printed.
    fn run(&self, command: &str) -> String {
        let words: Vec<_> = command.split(' ').collect();
        run(&[&[words[0], "-n", &self.name][..], &words[1..]].concat())
    }

    fn listen(&self, port: u16) -> TcpListener {
        let netns = std::fs::File::open(&self.path).expect("the namespace");
        let listen = move || {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).expect("entered");
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("bound")
        };
        std::thread::spawn(listen).join().expect("listening")
    }

    /// A bash in the namespace and the cgroup.
    fn bash(&self, scratch: &Scratch, script: &str) -> Child {
        let netns = std::fs::File::open(&self.path).expect("the namespace");
        let procs =
            std::fs::OpenOptions::new().write(true).open(scratch.cgroup.join("cgroup.procs")).expect("a cgroup");
        let enter = move || {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            nix::unistd::write(&procs, b"0")?;
            Ok(())
        };
        let mut command = Command::new("bash");
        command.args(["-c", script]).stdout(Stdio::piped());
        // SAFETY: two system calls, no allocation, between fork and exec.
        unsafe { command.pre_exec(enter) };
        command.spawn().expect("bash")
    }

    /// Whether the pod's application reaches 10.96.0.1:80.
    fn reaches_the_service(&self, scratch: &Scratch) -> bool {
        self.bash(scratch, "exec 3<>/dev/tcp/10.96.0.1/80").wait().expect("ended").success()
    }

    fn enrollment(&self, pod: u32, first_backend: u32) -> Change {
        Change::Enroll(Arc::new(Enrollment {
            pod,
            name: format!("test/{}", self.name).into(),
            netns: Netns::Path(self.path.clone()),
            flags: abi::POD_ENROLLED,
            stop_signals: 1 << libc::SIGTERM,
            first_backend,
        }))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        run(&["ip", "netns", "del", &self.name]);
    }
}

fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().expect(words[0]);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// 10.96.0.1:80 with one backend, number 1 of pod 1, at 10.0.0.1:8080.
fn service() -> Vec<Change> {
    let v4 = |address: [u8; 4]| Addr::v4(u32::from_ne_bytes(address));
    let frontend = Endpoint::new(v4([10, 96, 0, 1]), 80_u16.to_be(), PROTO_TCP);
    let at = Endpoint::new(v4([10, 0, 0, 1]), 8080_u16.to_be(), PROTO_TCP);
    let backend = Backend { at, generation: 1, pod: 1, ..Backend::default() };
    vec![
        Change::AddBackend { id: 1, backend, state: State::Ready },
        Change::PutSlot(SlotKey { service: 1, index: 0 }, Slot { backend: 1, generation: 1, service: 1, weight: 1 }),
        Change::PutService(Service { id: 1, ready: 1, max_weight: 1, ..Service::default() }),
        Change::PutFrontend(frontend, Frontend { service: 1, check: frontend.check() }),
    ]
}

fn write_all(opened: &mut Opened, changes: &[Change]) {
    let rejected = opened.kernel.write(changes);
    assert!(rejected.is_empty(), "{rejected:?}");
}

/// Completes outcomes until a notice comes, or nothing is left to come for a while.
fn notice(opened: &mut Opened) -> Option<Notice> {
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        match opened.outcomes.try_recv() {
            Ok(outcome) => {
                if let Some(notice) = opened.kernel.complete(outcome).pop() {
                    return Some(notice);
                }
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    None
}

/// Completes outcomes until it is so.
fn until(opened: &mut Opened, what: &str, mut so: impl FnMut(&Kernel) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !so(&opened.kernel) {
        assert!(Instant::now() < deadline, "never: {what}");
        if let Ok(outcome) = opened.outcomes.try_recv() {
            opened.kernel.complete(outcome);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn open(config: Config) -> Opened {
    let mut opened = Kernel::open(config).expect("opens");
    write_all(&mut opened, &service());
    opened
}

#[test]
fn a_pod_is_attached_to_its_listeners_are_known_and_nothing_stays_when_it_leaves() {
    let (scratch, pod) = (Scratch::new(), Pod::new());
    let older = pod.listen(8080);
    let mut opened = open(scratch.config(Tcx::Auto));
    opened.kernel.activate().expect("attaches");
    write_all(&mut opened, &[pod.enrollment(1, 1)]);
    match notice(&mut opened) {
        Some(Notice::Enrolled { pod: 1, interfaces, listeners, .. }) => {
            assert_eq!(interfaces.len(), 2, "{interfaces:?}");
            assert_eq!(listeners, 1);
        }
        other => panic!("{other:?}"),
    }
    assert!(notice(&mut opened).is_none());
    assert_eq!(opened.kernel.enrolled().len(), 1);
    assert!(scratch.pins("tc") > 0, "what was attached stays attached");
    assert!(pod.reaches_the_service(&scratch));
    // Two listeners on one port are possible (SO_REUSEPORT); here the count must tell that the one
    // older than the agent is the last.
    drop(older);
    assert_eq!(opened.kernel.health(1).state(), State::Refusing, "set before close() returned");
    let again = pod.listen(8080);
    assert_eq!(opened.kernel.health(1).state(), State::Ready);
    // As after a miscount of several sockets at once: refusing, though one listens.
    write_all(&mut opened, &[Change::Health { id: 1, generation: 1, input: Input::ListenerClosed }]);
    opened.kernel.recount(1);
    until(&mut opened, "it serves again", |kernel| kernel.health(1).state() == State::Ready);
    write_all(&mut opened, &[Change::Health { id: 1, generation: 1, input: Input::Terminating { serving: false } }]);
    opened.kernel.recount(1);
    assert!(notice(&mut opened).is_none());
    assert_eq!(opened.kernel.health(1).state(), State::Refusing, "the control plane said so");
    write_all(&mut opened, &[Change::Health { id: 1, generation: 1, input: Input::NotTerminating }]);
    write_all(&mut opened, &[Change::Release(1)]);
    assert!(scratch.pods().is_empty(), "forgotten at once");
    drop(again);
    assert_eq!(opened.kernel.health(1).state(), State::Ready, "no longer hitless's business");
    until(&mut opened, "its links are unpinned", |_| scratch.pins("tc") == 0);
}

#[test]
fn clsact_does_where_there_is_no_tcx_and_leaves_other_peoples_filters() {
    let (scratch, pod) = (Scratch::new(), Pod::new());
    pod.run("tc qdisc add dev eth1 clsact");
    pod.run("tc filter add dev eth1 ingress prio 7 u32 match u32 0 0");
    let mut opened = open(scratch.config(Tcx::Off));
    opened.kernel.activate().expect("attaches");
    write_all(&mut opened, &[pod.enrollment(1, 1)]);
    assert!(matches!(notice(&mut opened), Some(Notice::Enrolled { tcx: false, .. })));
    let filters = |device: &str, way: &str| pod.run(&format!("tc filter show dev {device} {way}"));
    for device in ["eth0", "eth1"] {
        assert!(filters(device, "ingress").contains("hitless_tc_ingress"), "{}", filters(device, "ingress"));
        assert!(filters(device, "egress").contains("hitless_tc_egress"));
    }
    // Somebody flushes it all.
    pod.run("tc qdisc del dev eth0 clsact");
    assert_eq!(filters("eth0", "ingress"), "");
    opened.kernel.check().expect("nothing of the cgroup's");
    match notice(&mut opened) {
        Some(Notice::Repaired { interfaces, .. }) => assert_eq!(interfaces, ["eth0"]),
        other => panic!("{other:?}"),
    }
    assert_eq!(filters("eth0", "ingress").matches("hitless_tc_ingress").count(), 1);
    // Another agent (a new version) puts its program in the place of the first one's.
    drop(opened);
    let mut opened = open(scratch.config(Tcx::Off));
    opened.kernel.activate().expect("attaches");
    write_all(&mut opened, &[pod.enrollment(1, 1)]);
    assert!(matches!(notice(&mut opened), Some(Notice::Enrolled { .. })));
    assert_eq!(filters("eth0", "ingress").matches("hitless_tc_ingress").count(), 1);
    drop(opened);
    kernel::uninstall(&scratch.config(Tcx::Off)).expect("removes");
    assert_eq!(filters("eth0", "ingress"), "");
    assert!(!pod.run("tc qdisc show dev eth0").contains("clsact"), "the qdisc was ours");
    let left = filters("eth1", "ingress");
    assert!(left.contains("u32") && !left.contains("hitless"), "{left}");
    assert!(pod.run("tc qdisc show dev eth1").contains("clsact"), "the qdisc was not ours");
}

#[test]
fn a_restarted_agent_keeps_the_links_of_its_pods_and_drops_those_of_pods_that_left() {
    let (scratch, stays, leaves) = (Scratch::new(), Pod::new(), Pod::new());
    let mut opened = open(scratch.config(Tcx::Auto));
    opened.kernel.activate().expect("attaches");
    write_all(&mut opened, &[stays.enrollment(1, 1), leaves.enrollment(2, 0)]);
    until(&mut opened, "both are enrolled", |kernel| kernel.enrolled().len() == 2);
    let pins = (scratch.pins("tc"), scratch.pods().len());
    assert_eq!(pins.1, 2);
    drop(opened);
    assert_eq!((scratch.pins("tc"), scratch.pods().len()), pins, "they serve without an agent");
    let mut opened = open(scratch.config(Tcx::Auto));
    assert_eq!(opened.seed.last_pod, 2);
    // The registry numbers pods anew.
    write_all(&mut opened, &[stays.enrollment(3, 1)]);
    opened.kernel.activate().expect("attaches");
    assert!(scratch.pods().iter().any(|pod| pod.pod == 3), "known before the first packet");
    until(&mut opened, "half of the links went", |_| scratch.pins("tc") == pins.0 / 2);
    assert_eq!(scratch.pods().iter().map(|pod| pod.pod).collect::<Vec<_>>(), [3]);
}

#[test]
fn a_namespace_that_is_not_there_is_named_with_its_pod_and_the_others_go_on() {
    let (scratch, pod) = (Scratch::new(), Pod::new());
    let mut opened = open(scratch.config(Tcx::Auto));
    opened.kernel.activate().expect("attaches");
    let gone = Change::Enroll(Arc::new(Enrollment {
        pod: 9,
        name: "shop/gone".into(),
        netns: Netns::Path("/run/netns/hlk-nowhere".into()),
        flags: abi::POD_ENROLLED,
        stop_signals: 0,
        first_backend: 0,
    }));
    write_all(&mut opened, &[gone, pod.enrollment(1, 1)]);
    match notice(&mut opened) {
        Some(Notice::Failed { pod: 9, error: error @ Error::Netns { .. }, .. }) => {
            let text = error.to_string();
            assert!(text.contains("shop/gone") && text.contains("/run/netns/hlk-nowhere"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(notice(&mut opened), Some(Notice::Enrolled { pod: 1, .. })));
    opened.kernel.check().expect("nothing of the cgroup's");
    assert!(notice(&mut opened).is_none(), "told once");
}

#[test]
fn an_interface_that_comes_later_is_attached_to_and_one_that_left_is_forgotten() {
    let (scratch, pod) = (Scratch::new(), Pod::new());
    let mut opened = open(scratch.config(Tcx::Auto));
    opened.kernel.activate().expect("attaches");
    write_all(&mut opened, &[pod.enrollment(1, 1)]);
    assert!(matches!(notice(&mut opened), Some(Notice::Enrolled { .. })));
    let pins = scratch.pins("tc");
    pod.run("ip link add late0 type veth peer name late1");
    opened.kernel.check().expect("nothing of the cgroup's");
    match notice(&mut opened) {
        Some(Notice::Repaired { interfaces, .. }) => assert_eq!(interfaces.len(), 2, "{interfaces:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(scratch.pins("tc"), pins * 2);
    pod.run("ip link del late0");
    opened.kernel.check().expect("nothing of the cgroup's");
    until(&mut opened, "its pins went", |_| scratch.pins("tc") == pins);
}

#[test]
fn connections_to_a_service_go_on_through_restarts_and_a_change_of_the_layout() {
    let (scratch, pod) = (Scratch::new(), Pod::new());
    let listener = pod.listen(8080);
    // Accepts until the test's process ends.
    drop(std::thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(drop)));
    let mut opened = open(scratch.config(Tcx::Auto));
    write_all(&mut opened, &[pod.enrollment(1, 1)]);
    opened.kernel.activate().expect("attaches");
    assert!(pod.reaches_the_service(&scratch));
    let connecting = pod.bash(
        &scratch,
        "end=$((SECONDS + 8)); while [ $SECONDS -lt $end ]; do \
         if (exec 3<>/dev/tcp/10.96.0.1/80) 2>/dev/null; then ok=$((ok + 1)); else failed=$((failed + 1)); fi; \
         done; echo ${ok:-0} ${failed:-0}",
    );
    let started = Instant::now();
    for round in 0.. {
        if started.elapsed() > Duration::from_secs(6) {
            assert!(round > 2, "too slow a machine: nothing was restarted");
            break;
        }
        drop(opened);
        let salt = if round % 2 == 0 { "next" } else { "" };
        opened = open(Config { layout_salt: salt.into(), ..scratch.config(Tcx::Auto) });
        write_all(&mut opened, &[pod.enrollment(1, 1)]);
        opened.kernel.activate().expect("moves");
        assert!(matches!(notice(&mut opened), Some(Notice::Enrolled { .. })));
    }
    let said = connecting.wait_with_output().expect("ended").stdout;
    let said = String::from_utf8(said).expect("two numbers");
    let numbers: Vec<u32> = said.split_whitespace().map(|n| n.parse().expect("a number")).collect();
    assert!(numbers[0] > 100 && numbers[1] == 0, "connected, failed: {said}");
}

#[test]
fn the_nodes_own_interfaces_are_attached_to_but_not_a_bridges_ports_and_new_ones_at_once() {
    let (scratch, node) = (Scratch::new(), Pod::new());
    node.run("ip link add br0 type bridge");
    node.run("ip link set br0 up");
    node.run("ip link set eth1 master br0");
    node.run("ip link add down0 type veth peer name down1");
    let netns = std::fs::File::open(&node.path).expect("the namespace");
    // An agent whose own namespace this is: its threads are started from here.
    let agent = || {
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).expect("entered");
        let mut opened = open(scratch.config(Tcx::Auto));
        opened.kernel.activate().expect("attaches");
        let host = Enrollment {
            pod: 1,
            name: "node".into(),
            netns: Netns::Host,
            flags: abi::POD_ENROLLED | abi::POD_HOST,
            stop_signals: 0,
            first_backend: 0,
        };
        write_all(&mut opened, &[Change::Enroll(Arc::new(host))]);
        match notice(&mut opened) {
            Some(Notice::Enrolled { mut interfaces, .. }) => {
                interfaces.sort();
                assert_eq!(interfaces, ["br0", "eth0"]);
            }
            other => panic!("{other:?}"),
        }
        node.run("ip link set down0 up");
        match notice(&mut opened) {
            Some(Notice::Repaired { interfaces, .. }) => assert_eq!(interfaces, ["down0"]),
            other => panic!("{other:?}"),
        }
    };
    std::thread::scope(|scope| scope.spawn(agent).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}
