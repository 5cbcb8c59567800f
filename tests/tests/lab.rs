//! The lab itself: what the other suites stand on.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hitless_tests::{
    lab::{
        Lab, LabSpec, Pod, PodOptions, Process, Topology, cleanup,
        net::{Netns, connect},
        process::Exit,
    },
    workload::{self, sockets::Kind, storm::Outcome},
};

const PORT: u16 = 8080;

fn lab(topology: Topology) -> Lab {
    Lab::new(LabSpec { nodes: 2, topology }).expect("a lab")
}

fn server(pod: &Pod) -> Process {
    pod.workload(&["server", "--name", &pod.name, "--listen", "[::]:8080"]).expect("a server")
}

/// Ask for "/" from inside a namespace.
fn get(from: &Netns, to: IpAddr) -> std::io::Result<String> {
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, PORT), Duration::from_millis(700))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    from.enter(ask).expect("enter the namespace")
}

fn everybody_reaches_everybody(topology: Topology) {
    let lab = lab(topology);
    let pods: Vec<Pod> =
        [(1, "a"), (1, "b"), (2, "c")].map(|(node, name)| lab.node(node).add_pod(name).expect("a pod")).into();
    let _servers: Vec<Process> = pods.iter().map(server).collect();
    let froms: Vec<&Netns> = pods
        .iter()
        .map(|pod| &pod.place.netns)
        .chain([&lab.node(1).host.netns, &lab.node(2).host.netns, &lab.outside().netns])
        .collect();
    for from in froms {
        for pod in &pods {
            for address in pod.addresses() {
                let answer = get(from, address).unwrap_or_else(|error| panic!("{} to {address}: {error}", from.name));
                assert!(answer.contains(&pod.name), "{address} answered {answer}");
            }
        }
    }
}

#[test]
fn pods_reach_each_other_across_bridges() {
    everybody_reaches_everybody(Topology::Bridge);
}

#[test]
fn pods_reach_each_other_across_routed_veth() {
    everybody_reaches_everybody(Topology::Routed);
}

#[test]
fn pods_reach_each_other_across_vxlan() {
    everybody_reaches_everybody(Topology::Vxlan);
}

#[test]
fn a_server_told_to_stop_refuses_at_once_and_exits() {
    let lab = lab(Topology::Bridge);
    let pod = lab.node(1).add_pod("web").expect("a pod");
    let server = server(&pod);
    let from = &lab.node(2).host.netns;
    assert!(get(from, pod.v4()).is_ok());
    server.sigterm().expect("SIGTERM");
    assert_eq!(server.wait_for(Duration::from_secs(5)).expect("wait"), Some(Exit::Code(0)));
    assert_eq!(get(from, pod.v4()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_request_under_way_outlives_sigterm() {
    let lab = lab(Topology::Bridge);
    let pod = lab.node(1).add_pod("web").expect("a pod");
    let server =
        pod.workload(&["server", "--name", "slow", "--listen", "[::]:8080", "--delay", "400"]).expect("a server");
    let from = &lab.outside().netns;
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| get(from, pod.v4()));
        std::thread::sleep(Duration::from_millis(150));
        server.sigterm().expect("SIGTERM");
        let answer = asked.join().expect("no panic").expect("an answer");
        assert!(answer.contains("slow"), "{answer}");
    });
    assert_eq!(server.wait_for(Duration::from_secs(5)).expect("wait"), Some(Exit::Code(0)));
}

fn a_cut_cable_is_silent(topology: Topology) {
    let lab = lab(topology);
    let pod = lab.node(1).add_pod("web").expect("a pod");
    let _server = server(&pod);
    let from = &lab.outside().netns;
    for address in pod.addresses() {
        assert!(get(from, address).is_ok());
        pod.cut_cable().expect("cut");
        let error = get(from, address).expect_err("nobody answers");
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{address}: {error}");
        pod.restore_cable().expect("restore");
        eventually(|| get(from, address).is_ok(), "the pod answers again");
    }
}

#[test]
fn a_cut_cable_is_silent_on_a_bridge() {
    a_cut_cable_is_silent(Topology::Bridge);
}

#[test]
fn a_cut_cable_is_silent_with_routed_veth() {
    a_cut_cable_is_silent(Topology::Routed);
}

#[test]
fn a_node_cut_off_is_silent_and_comes_back() {
    let lab = lab(Topology::Bridge);
    let pod = lab.node(2).add_pod("web").expect("a pod");
    let _server = server(&pod);
    let from = &lab.outside().netns;
    for address in pod.addresses() {
        assert!(get(from, address).is_ok());
        lab.node(2).cut_cable().expect("cut");
        assert_eq!(get(from, address).expect_err("nobody answers").kind(), ErrorKind::TimedOut);
        lab.node(2).restore_cable().expect("restore");
        eventually(|| get(from, address).is_ok(), "the node answers again");
    }
}

#[test]
fn a_deleted_pods_address_can_be_given_to_another() {
    let lab = lab(Topology::Bridge);
    let first = lab.node(1).add_pod_with("first", PodOptions { number: Some(77) }).expect("a pod");
    let (address, cookie) = (first.v4(), first.cookie);
    let _one = server(&first);
    assert!(get(&lab.outside().netns, address).expect("an answer").contains("lab/first"));
    first.delete().expect("delete");
    let second = lab.node(1).add_pod_with("second", PodOptions { number: Some(77) }).expect("a pod");
    let _two = server(&second);
    assert_eq!(second.v4(), address);
    assert_ne!(second.cookie, cookie);
    eventually(|| get(&lab.outside().netns, address).is_ok_and(|a| a.contains("lab/second")), "the new pod answers");
}

#[test]
fn a_pod_can_be_readdressed() {
    for topology in [Topology::Bridge, Topology::Routed] {
        let lab = lab(topology);
        let mut pod = lab.node(1).add_pod("web").expect("a pod");
        let _server = server(&pod);
        let old = pod.v4();
        pod.readdress(99).expect("readdress");
        assert_ne!(pod.v4(), old);
        for address in pod.addresses() {
            eventually(|| get(&lab.outside().netns, address).is_ok(), "the pod answers at its new address");
        }
    }
}

#[test]
fn a_workload_is_the_init_of_its_own_pid_namespace() -> Result<()> {
    let lab = lab(Topology::Bridge);
    let pod = lab.node(1).add_pod("web")?;
    let server = server(&pod);
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid()))?;
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).context("NSpid")?;
    assert_eq!(pids.split_whitespace().last(), Some("1"));
    Ok(())
}

#[test]
fn a_socket_made_in_a_pod_stays_the_pods() -> Result<()> {
    let lab = lab(Topology::Bridge);
    let web = lab.node(2).add_pod("web")?;
    let _server = web.workload(&["server", "--name", "web", "--echo-tcp", "[::]:7", "--echo-udp", "[::]:7"])?;
    let client = lab.node(1).add_pod("client")?;
    for (kind, to) in [(Kind::Tcp4, web.v4()), (Kind::Tcp6, web.v6())] {
        let mut stream = connect(client.place.socket(kind)?, SocketAddr::new(to, 7))?;
        assert!(client.addresses().contains(&stream.local_addr()?.ip()));
        stream.write_all(b"bye\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        assert_eq!(answer, "web bye\n");
    }
    for (kind, to) in [(Kind::Udp4, web.v4()), (Kind::Udp6, web.v6())] {
        let socket = std::net::UdpSocket::from(client.place.socket(kind)?);
        socket.send_to(b"hello", SocketAddr::new(to, 7))?;
        let mut answer = [0; 64];
        let (len, from) = socket.recv_from(&mut answer)?;
        assert_eq!((&answer[..len], from), (&b"web hello"[..], SocketAddr::new(to, 7)));
    }
    Ok(())
}

#[test]
fn a_storm_counts_what_it_lost() -> Result<()> {
    let lab = lab(Topology::Bridge);
    let web = lab.node(2).add_pod("web")?;
    let server = web.workload(&["server", "--name", "web", "--echo-tcp", "[::]:7"])?;
    let client = lab.node(1).add_pod("client")?;
    let storm = |target: String| -> Result<Outcome> {
        let result = client.place.file("storm.json");
        let args = ["storm", "--target", &target, "--connections", "500", "--result", &result.to_string_lossy()];
        client.workload(&args)?.wait()?;
        Ok(serde_json::from_str(&std::fs::read_to_string(result)?)?)
    };
    let good = storm(format!("{}:7", web.v4()))?;
    assert_eq!((good.connections, good.failed, good.servers["web"]), (500, 0, 500), "{good:?}");
    server.sigterm()?;
    server.wait()?;
    let bad = storm(format!("{}:7", web.v4()))?;
    assert_eq!((bad.failed, bad.reasons["connect: refused"]), (500, 500), "{bad:?}");
    Ok(())
}

/// What a lab of process `pid` has left on the machine.
fn leftovers(pid: u32) -> Vec<String> {
    let mut left = Vec::new();
    let cgroups = cleanup::cgroup2_root().expect("cgroup2");
    for (dir, prefix) in [
        (Path::new("/run/netns").to_owned(), format!("hl{pid}x")),
        (std::env::temp_dir(), format!("hitless-lab-{pid}x")),
        (cgroups, format!("hitless-lab-{pid}x")),
    ] {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) {
                left.push(format!("{}/{name}", dir.display()));
            }
        }
    }
    left
}

/// A lab with pods in another process, once it stands.
fn lab_of_its_own() -> std::process::Child {
    let binary = workload::binary().expect("hitless-lab");
    let mut child = Command::new(binary).arg("up").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("up");
    let mut said = String::new();
    let out = child.stdout.as_mut().expect("piped");
    let mut byte = [0];
    while !said.contains("takes it all down") {
        assert_eq!(out.read(&mut byte).expect("read"), 1, "up ended early: {said}");
        said.push(char::from(byte[0]));
    }
    child
}

fn signal(child: &std::process::Child, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).expect("signal");
}

#[test]
fn ctrl_c_takes_the_lab_down() {
    let mut child = lab_of_its_own();
    assert!(leftovers(child.id()).len() >= 3);
    signal(&child, nix::sys::signal::Signal::SIGINT);
    assert_eq!(child.wait().expect("wait").code(), Some(130));
    assert_eq!(leftovers(child.id()), Vec::<String>::new());
}

#[test]
fn what_a_killed_lab_left_is_swept() {
    let mut child = lab_of_its_own();
    signal(&child, nix::sys::signal::Signal::SIGKILL);
    child.wait().expect("wait");
    // Another test's new lab may sweep first.
    cleanup::sweep().expect("sweep");
    eventually(|| leftovers(child.id()).is_empty(), "everything is swept");
}

#[test]
fn a_panic_takes_the_lab_down() {
    let id = std::sync::Mutex::new(None);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let lab = lab(Topology::Bridge);
        let pod = lab.node(1).add_pod("web").expect("a pod");
        let _server = server(&pod);
        *id.lock().expect("no panic") = Some(lab.id());
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    let id = id.lock().expect("no panic").expect("the lab stood");
    assert!(!id.dir().exists());
    assert!(!id.cgroup().expect("cgroup2").exists());
    assert!(!Path::new("/run/netns").join(id.netns("node-1-web")).exists());
}

fn eventually(mut holds: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 15 s: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
