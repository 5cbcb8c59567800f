//! L3: a connect that meets a dead backend ends up on a live one, and the application never learns.

use std::{
    collections::BTreeSet,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hitless_tests::lab::{
    Topology,
    control::Terms,
    net::{self, Family},
    scene::{PORT, SERVICE, Scene, SceneSpec, Web, connect_from, serves, service, start_server, who},
};
use hitless_tests::workload::sockets::Kind;
use nix::sys::socket::{SockaddrStorage, sockopt::ReuseAddr};

/// Only L3: nothing warns of the dead backend, so that connects do meet it.
fn only_rebind(topology: Topology, webs: &[usize]) -> Scene {
    Scene::new(&SceneSpec { topology, layers: "l3".into(), webs: webs.to_vec(), ..SceneSpec::default() })
        .expect("a scene")
}

fn kill(web: &Web) {
    web.server.sigkill().expect("kill");
    web.server.wait().expect("wait");
}

/// Connect and ask, so often that both of two backends are picked for sure (1 - 2^-40).
const OFTEN: usize = 40;

fn all_reach(scene: &Scene, family: Family, alive: &str) {
    for n in 0..OFTEN {
        let mut stream = scene.connect(family).unwrap_or_else(|error| panic!("connect {n}: {error}"));
        assert_eq!(who(&mut stream).unwrap_or_else(|error| panic!("ask {n}: {error}")), alive);
    }
}

fn a_refused_connect_is_rebound(topology: Topology) {
    let scene = only_rebind(topology, &[1, 2]);
    let mut restarted = None;
    for family in Family::BOTH {
        let before = scene.rebound().expect("counters");
        // Both directions across the nodes: the dead one is local for one family, remote for the other.
        let (dead, alive) = match family {
            Family::V4 => (&scene.webs[0], &scene.webs[1]),
            Family::V6 => (&scene.webs[1], &scene.webs[0]),
        };
        kill(dead);
        all_reach(&scene, family, &alive.name);
        assert!(scene.rebound().expect("counters") > before, "no connect was rebound");
        drop(restarted.take());
        if family == Family::V4 {
            let dead = &scene.webs[0];
            restarted = Some(start_server(&dead.pod, &dead.name).expect("restart"));
        }
    }
}

#[test]
fn a_refused_connect_is_rebound_across_a_bridge() {
    a_refused_connect_is_rebound(Topology::Bridge);
}

#[test]
fn a_refused_connect_is_rebound_across_routed_veth() {
    a_refused_connect_is_rebound(Topology::Routed);
}

#[test]
fn a_refused_connect_is_rebound_across_vxlan() {
    a_refused_connect_is_rebound(Topology::Vxlan);
}

#[test]
fn a_silent_backend_is_left_for_another() {
    let scene = only_rebind(Topology::Bridge, &[1, 2]);
    scene.webs[1].pod.cut_cable().expect("cut");
    let mut slowest = Duration::ZERO;
    for family in Family::BOTH {
        for _ in 0..OFTEN / 2 {
            let start = Instant::now();
            let mut stream = scene.connect(family).expect("connect");
            slowest = slowest.max(start.elapsed());
            assert_eq!(who(&mut stream).expect("an answer"), scene.webs[0].name);
        }
    }
    assert!(slowest > Duration::from_millis(50), "nobody met the silent backend");
    // Without hitless the first retransmission is after a second, and the connect fails after two minutes.
    assert!(slowest < Duration::from_millis(900), "{slowest:?}");
    assert!(scene.counter("rebinds_silent").expect("counters") > 0);
}

/// Connect from a port of the client's own choice.
fn connect_from_port(scene: &Scene, port: u16, to: SocketAddr) -> Result<TcpStream> {
    let socket = scene.client.place.socket(Kind::Tcp4)?;
    let from = SockaddrStorage::from(SocketAddr::new(scene.client.v4(), port));
    nix::sys::socket::setsockopt(&socket, ReuseAddr, &true)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &from)?;
    Ok(net::connect(socket, to)?)
}

/// Who closes first keeps the connection in TIME-WAIT, with the clock that the client shows this very peer
/// (RFC 7323 section 5.5: an offset of its own for each). A SYN that was made for another one and moved here may
/// look old, and is answered by the acknowledgement of back then; the client resets that and sends the SYN again
/// at once. Of two peers, the clock of one is behind the other's.
#[test]
fn a_peer_that_remembers_the_port_is_not_taken_for_silent() -> Result<()> {
    let scene = only_rebind(Topology::Bridge, &[2, 2]);
    let mut next = 20_000;
    let mut restarted = Vec::new();
    for (dead, alive) in [(0, 1), (1, 0)] {
        let (dead, alive) = (&scene.webs[dead], &scene.webs[alive]);
        let ports = next..next + OFTEN as u16;
        next = ports.end;
        for port in ports.clone() {
            let mut stream = connect_from_port(&scene, port, (alive.pod.v4(), PORT).into())?;
            stream.write_all(b"bye\n")?;
            stream.read_to_end(&mut Vec::new())?;
        }
        kill(dead);
        for port in ports {
            let mut stream = connect_from_port(&scene, port, scene.vip(Family::V4))?;
            assert_eq!(who(&mut stream)?, alive.name);
        }
        restarted.push(start_server(&dead.pod, &dead.name)?);
    }
    assert!(scene.counter("rebinds_rst")? > 0, "nobody met a dead backend");
    assert_eq!(scene.counter("rebinds_silent")?, 0);
    Ok(())
}

#[test]
fn a_node_cut_off_is_left_for_another() {
    let scene = only_rebind(Topology::Bridge, &[1, 2]);
    scene.lab.node(2).cut_cable().expect("cut");
    for family in Family::BOTH {
        all_reach(&scene, family, &scene.webs[0].name);
    }
    assert!(scene.counter("rebinds_silent").expect("counters") > 0);
}

#[test]
fn an_unreachable_backend_is_left_for_another() {
    let mut scene = only_rebind(Topology::Routed, &[1, 2]);
    let gone = scene.webs.pop().expect("two");
    gone.server.sigkill().expect("kill");
    gone.pod.delete().expect("delete");
    for family in Family::BOTH {
        all_reach(&scene, family, "web-1");
    }
    assert!(scene.counter("rebinds_icmp").expect("counters") > 0);
}

#[test]
fn a_rebound_connection_carries_any_amount_both_ways() -> Result<()> {
    for topology in [Topology::Bridge, Topology::Routed, Topology::Vxlan] {
        let scene = only_rebind(topology, &[2, 2]);
        kill(&scene.webs[0]);
        for family in Family::BOTH {
            let (before, mut tries) = (scene.rebound()?, 0);
            // Until one was rebound: at most a few.
            while scene.rebound()? == before {
                tries += 1;
                assert!(tries < OFTEN, "no connect was rebound");
                exchange(scene.connect(family)?, 8 << 20)?;
            }
        }
    }
    Ok(())
}

/// Send lines worth `bytes`, check that each comes back, in order and whole.
fn exchange(stream: TcpStream, bytes: usize) -> Result<()> {
    let line = |n: usize| format!("{n} {}\n", "x".repeat(997));
    let lines = bytes / 1000;
    let mut writer = stream.try_clone()?;
    let sender = std::thread::spawn(move || -> io::Result<()> {
        for n in 0..lines {
            writer.write_all(line(n).as_bytes())?;
        }
        writer.shutdown(std::net::Shutdown::Write)
    });
    let mut reader = io::BufReader::new(stream);
    let mut answer = String::new();
    for n in 0..lines {
        answer.clear();
        io::BufRead::read_line(&mut reader, &mut answer)?;
        assert_eq!(answer.split_once(' ').map(|(_, said)| said), Some(line(n).as_str()), "line {n}");
    }
    assert_eq!(reader.read(&mut [0])?, 0);
    sender.join().expect("no panic")?;
    Ok(())
}

#[test]
fn when_nobody_is_left_the_refusal_is_honest() {
    let scene = only_rebind(Topology::Bridge, &[1, 2]);
    scene.webs.iter().for_each(kill);
    for family in Family::BOTH {
        let error = scene.connect(family).expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    }
    assert!(scene.counter("rebinds_exhausted").expect("counters") > 0);
}

#[test]
fn a_connect_never_crosses_to_another_service() -> Result<()> {
    let scene = only_rebind(Topology::Bridge, &[1]);
    scene.control.add_service(service("lab/other", 2))?;
    let other = scene.add_unannounced(2, "other")?;
    scene.announce(&other.pod, &Terms { serves: serves("lab/other"), ..Terms::default() })?;
    kill(&scene.webs[0]);
    for _ in 0..OFTEN {
        assert_eq!(scene.connect(Family::V4).expect_err("dead").kind(), ErrorKind::ConnectionRefused);
    }
    Ok(())
}

#[test]
fn a_pod_named_by_its_address_is_never_exchanged() {
    let scene = only_rebind(Topology::Bridge, &[1, 2]);
    kill(&scene.webs[0]);
    for address in scene.webs[0].pod.addresses() {
        let error = connect_from(&scene.client.place, SocketAddr::new(address, PORT)).expect_err("dead");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn a_gateways_connect_to_a_dead_pod_is_rebound() -> Result<()> {
    let scene = only_rebind(Topology::Bridge, &[1, 2, 2]);
    let gateway = scene.lab.node(1).add_pod("gateway")?;
    scene.announce(&gateway, &Terms { gateway: true, ..Terms::default() })?;
    kill(&scene.webs[1]);
    for address in scene.webs[1].pod.addresses() {
        let to = SocketAddr::new(address, PORT);
        let mut servers = BTreeSet::new();
        for _ in 0..OFTEN {
            let mut stream = connect_from(&gateway.place, to)?;
            assert_eq!(stream.peer_addr()?, to, "the gateway must go on seeing whom it called");
            servers.insert(who(&mut stream)?);
        }
        assert!(servers.iter().all(|name| *name == "web-1" || *name == "web-3"), "{servers:?}");
    }
    Ok(())
}

#[test]
fn a_gateways_connect_moves_only_among_backends_that_share_every_service() -> Result<()> {
    let mut scene = only_rebind(Topology::Bridge, &[1, 2]);
    scene.control.add_service(service("lab/canary", 2))?;
    // web-3 is of both services, as web-4: a connect to one may only go to the other.
    let mut both = Vec::new();
    for name in ["both-1", "both-2"] {
        let web = scene.add_unannounced(2, name)?;
        let serves = [serves(SERVICE), serves("lab/canary")].concat();
        scene.announce(&web.pod, &Terms { serves, ..Terms::default() })?;
        both.push(web);
    }
    let gateway = scene.lab.node(1).add_pod("gateway")?;
    scene.announce(&gateway, &Terms { gateway: true, ..Terms::default() })?;
    kill(&both[0]);
    for _ in 0..OFTEN {
        let mut stream = connect_from(&gateway.place, SocketAddr::new(both[0].pod.v4(), PORT))?;
        assert_eq!(who(&mut stream)?, "both-2");
    }
    kill(&both[1]);
    let error = connect_from(&gateway.place, SocketAddr::new(both[0].pod.v4(), PORT)).expect_err("both are dead");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    scene.webs.clear();
    Ok(())
}

#[test]
fn a_pod_that_is_not_enrolled_is_left_alone_and_takes_no_backend_out() -> Result<()> {
    let spec = SceneSpec { layers: "l2,l3".into(), ..SceneSpec::default() };
    let scene = Scene::new(&spec)?;
    let stranger = scene.lab.node(1).add_pod("stranger")?;
    let terms = Terms { gateway: true, not_enrolled: true, ..Terms::default() };
    scene.announce(&stranger, &terms)?;
    kill(&scene.webs[0]);
    for address in scene.webs[0].pod.addresses() {
        let to = SocketAddr::new(address, PORT);
        for _ in 0..OFTEN {
            let error = connect_from(&stranger.place, to).expect_err("dead");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        }
    }
    assert_eq!((scene.rebound()?, scene.counter("suspected")?), (0, 0));
    let agent = scene.agents.first().context("the node has an agent")?;
    agent.wait_enrolled(&stranger.name)?;
    let enrolled = || -> Result<bool> {
        let status = agent.status()?;
        let row = status["pods"].as_array().into_iter().flatten().find(|row| row["name"] == *stranger.name);
        row.and_then(|row| row["enrolled"].as_bool()).context("the pod is the agent's to look after")
    };
    assert!(!enrolled()?, "attached is not enrolled");
    // The same, once it is enrolled: its word counts.
    scene.announce(&stranger, &Terms { not_enrolled: false, ..terms })?;
    assert!(enrolled()?);
    let mut stream = connect_from(&stranger.place, SocketAddr::new(scene.webs[0].pod.v4(), PORT))?;
    assert_eq!(who(&mut stream)?, "web-2");
    assert_eq!((scene.rebound()?, scene.counter("suspected")?), (1, 1));
    Ok(())
}

#[test]
fn a_client_in_the_nodes_own_network_is_rebound_too() -> Result<()> {
    let (layers, agent_args) = ("l3".into(), vec!["--host".to_owned()]);
    let scene = Scene::new(&SceneSpec { layers, agent_args, ..SceneSpec::default() })?;
    kill(&scene.webs[0]);
    for family in Family::BOTH {
        let before = scene.rebound()?;
        for _ in 0..OFTEN {
            let mut stream = connect_from(&scene.lab.node(1).host, scene.vip(family))?;
            assert_eq!(who(&mut stream)?, "web-2");
        }
        assert!(scene.rebound()? > before, "no connect was rebound");
    }
    Ok(())
}

#[test]
fn pods_that_use_the_same_port_do_not_disturb_each_other() -> Result<()> {
    let scene = only_rebind(Topology::Bridge, &[2, 2]);
    kill(&scene.webs[0]);
    let others = [scene.lab.node(1).add_pod("client-2")?, scene.lab.node(1).add_pod("client-3")?];
    let mut streams = Vec::new();
    for pod in [&scene.client, &others[0], &others[1]] {
        scene.announce(pod, &Terms::default())?;
        for port in 40_000..40_020 {
            let socket = pod.place.socket(hitless_tests::workload::sockets::Kind::Tcp4)?;
            bind(&socket, SocketAddr::new(pod.v4(), port))?;
            streams.push(hitless_tests::lab::net::connect(socket, scene.vip(Family::V4))?);
        }
    }
    for _ in 0..3 {
        for stream in &mut streams {
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            assert_eq!(who(stream)?, "web-2");
        }
    }
    assert!(scene.rebound()? > 0);
    Ok(())
}

fn bind(socket: &std::os::fd::OwnedFd, to: SocketAddr) -> Result<()> {
    use std::os::fd::AsRawFd;
    let to = nix::sys::socket::SockaddrStorage::from(to);
    Ok(nix::sys::socket::bind(socket.as_raw_fd(), &to)?)
}
