//! L1 and L2: what a node knows of its pods decides where the next connect goes.

use std::{
    collections::BTreeMap,
    net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::Result;
use dataplane_user::model::{Event, Object};
use hitless_tests::{
    lab::{
        control::Terms,
        net::Family,
        scene::{Scene, SceneSpec, connect_from, eventually, serves, service, start_server, who},
    },
    workload::sockets::Kind,
};

fn scene(layers: &str, webs: &[usize]) -> Scene {
    Scene::new(&SceneSpec { layers: layers.into(), webs: webs.to_vec(), ..SceneSpec::default() }).expect("a scene")
}

/// Who answers how often.
fn answers(scene: &Scene, to: SocketAddr, connects: usize) -> BTreeMap<String, usize> {
    let mut servers = BTreeMap::new();
    for n in 0..connects {
        let mut stream = connect_from(&scene.client.place, to).unwrap_or_else(|error| panic!("connect {n}: {error}"));
        *servers.entry(who(&mut stream).expect("an answer")).or_default() += 1;
    }
    servers
}

#[test]
fn a_service_spreads_connects_over_its_backends() {
    let scene = scene("", &[1, 2, 2]);
    for family in Family::BOTH {
        let servers = answers(&scene, scene.vip(family), 300);
        assert_eq!(servers.len(), 3, "{servers:?}");
        // 100 expected, standard deviation 8.2: this is six of them.
        assert!(servers.values().all(|count| (50..=150).contains(count)), "{servers:?}");
    }
}

#[test]
fn the_application_sees_the_services_address() -> Result<()> {
    let scene = scene("", &[1, 2]);
    for family in Family::BOTH {
        let stream = scene.connect(family)?;
        assert_eq!(stream.peer_addr()?, scene.vip(family));
    }
    Ok(())
}

#[test]
fn a_v4_mapped_destination_reaches_the_service() -> Result<()> {
    let scene = scene("", &[1, 2]);
    let SocketAddr::V4(vip) = scene.vip(Family::V4) else { unreachable!("the IPv4 address") };
    let mapped: Ipv6Addr = vip.ip().to_ipv6_mapped();
    let to = SocketAddr::new(mapped.into(), vip.port());
    let mut stream = connect_from(&scene.client.place, to)?;
    assert!(who(&mut stream)?.starts_with("web-"));
    assert_eq!(stream.peer_addr()?, to);
    Ok(())
}

#[test]
fn after_sigterm_no_connect_goes_to_a_pod_that_still_listens() -> Result<()> {
    let scene = scene("l1,l2", &[2]);
    // On the client's node, and slow to close its listener: only the signal tells.
    let pod = scene.lab.node(1).add_pod("slow")?;
    let args = ["server", "--name", "slow", "--echo-tcp", "[::]:7", "--echo-udp", "[::]:7", "--linger", "60000"];
    let slow = pod.workload(&args)?;
    scene.announce(&pod, &Terms { serves: serves("lab/echo"), ..Terms::default() })?;
    assert_eq!(answers(&scene, scene.vip(Family::V4), 60).len(), 2);
    slow.sigterm()?;
    for family in Family::BOTH {
        let servers = answers(&scene, scene.vip(family), 60);
        assert_eq!(servers.keys().collect::<Vec<_>>(), ["web-1"]);
    }
    Ok(())
}

#[test]
fn only_the_stop_signal_to_the_init_process_counts() -> Result<()> {
    let scene = scene("l1,l2", &[2]);
    let pod = scene.lab.node(1).add_pod("quit")?;
    let args = ["server", "--name", "quit", "--echo-tcp", "[::]:7", "--linger", "60000"];
    let server = pod.workload(&args)?;
    let terms = Terms { serves: serves("lab/echo"), stop_signals: vec!["QUIT".into()], ..Terms::default() };
    scene.announce(&pod, &terms)?;
    server.signal(nix::sys::signal::Signal::SIGCHLD)?;
    server.signal(nix::sys::signal::Signal::SIGTERM)?;
    assert_eq!(answers(&scene, scene.vip(Family::V4), 60).len(), 2, "SIGTERM is not this pod's stop signal");
    Ok(())
}

#[test]
fn a_closed_listener_is_avoided_and_a_new_one_is_used_again() -> Result<()> {
    let scene = scene("l1,l2", &[1, 2]);
    let web = &scene.webs[0];
    web.server.sigkill()?;
    web.server.wait()?;
    for family in Family::BOTH {
        assert_eq!(answers(&scene, scene.vip(family), 60).keys().collect::<Vec<_>>(), ["web-2"]);
    }
    let _again = start_server(&web.pod, &web.name)?;
    for family in Family::BOTH {
        eventually(|| answers(&scene, scene.vip(family), 30).len() == 2, "the pod that listens again is used");
    }
    Ok(())
}

#[test]
fn one_of_several_listeners_closing_is_no_death() -> Result<()> {
    let scene = scene("l1,l2", &[2]);
    let pod = scene.lab.node(1).add_pod("many")?;
    // Two processes share the port, as a server that is being replaced in place.
    let args = ["server", "--name", "many", "--echo-tcp", "[::]:7", "--listeners", "3"];
    let first = pod.workload(&args)?;
    let _second = pod.workload(&args)?;
    scene.announce(&pod, &Terms { serves: serves("lab/echo"), ..Terms::default() })?;
    first.sigkill()?;
    first.wait()?;
    assert_eq!(answers(&scene, scene.vip(Family::V4), 60).len(), 2);
    Ok(())
}

#[test]
fn a_deleted_pod_on_another_node_is_avoided_before_it_has_died() -> Result<()> {
    let scene = scene("", &[1, 2]);
    scene.control.terminating(&scene.webs[1].pod.name)?;
    for family in Family::BOTH {
        assert_eq!(answers(&scene, scene.vip(family), 60).keys().collect::<Vec<_>>(), ["web-1"]);
    }
    Ok(())
}

#[test]
fn serving_but_terminating_backends_are_better_than_none() -> Result<()> {
    let scene = scene("", &[1, 2]);
    for web in &scene.webs {
        scene.control.terminating(&web.pod.name)?;
    }
    for family in Family::BOTH {
        assert_eq!(answers(&scene, scene.vip(family), 40).len(), 2);
    }
    Ok(())
}

#[test]
fn with_nothing_live_the_choice_fails_open() -> Result<()> {
    let scene = scene("l1,l2", &[1]);
    let web = &scene.webs[0];
    web.server.sigkill()?;
    web.server.wait()?;
    // The connect goes to the dead pod and is refused there: an honest answer, not an invented one.
    let error = scene.connect(Family::V4).expect_err("nobody listens");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(scene.counter("choices_failed_open")? > 0);
    Ok(())
}

#[test]
fn a_suspect_backend_is_avoided_then_probed_and_trusted_again() -> Result<()> {
    // Without L1 only the refusals themselves tell; with L3 nobody sees them.
    let scene = scene("l2,l3", &[2, 2]);
    let web = &scene.webs[0];
    web.server.sigkill()?;
    web.server.wait()?;
    assert_eq!(answers(&scene, scene.vip(Family::V4), 60).keys().collect::<Vec<_>>(), ["web-2"]);
    assert!(scene.counter("suspected")? > 0);
    // Far fewer than the half of the connects that met it without suspicion.
    assert!(scene.rebound()? < 15, "{} rebinds", scene.rebound()?);
    let _again = start_server(&web.pod, &web.name)?;
    eventually(|| answers(&scene, scene.vip(Family::V4), 20).len() == 2, "the backend is trusted again");
    assert!(scene.counter("recovered")? > 0);
    Ok(())
}

#[test]
fn a_client_comes_back_to_its_backend_as_long_as_it_lives() -> Result<()> {
    let mut scene = scene("", &[1, 2, 2]);
    let mut sticky = service("lab/echo", 1);
    sticky.affinity_seconds = 600;
    scene.control.add_service(sticky)?;
    let servers = answers(&scene, scene.vip(Family::V4), 30);
    assert_eq!(servers.len(), 1, "{servers:?}");
    let name = servers.into_keys().next().expect("one");
    let at = scene.webs.iter().position(|web| web.name == name).expect("one of them");
    let web = scene.webs.remove(at);
    web.server.sigkill()?;
    web.server.wait()?;
    let servers = answers(&scene, scene.vip(Family::V4), 30);
    assert_eq!(servers.len(), 1, "another one, and that one again: {servers:?}");
    assert!(!servers.contains_key(&name));
    Ok(())
}

#[test]
fn weights_hold_also_when_a_backend_is_skipped() -> Result<()> {
    let scene = scene("l1,l2", &[]);
    let mut webs = Vec::new();
    for (name, weight) in [("light", 1), ("heavy", 3), ("dead", 4)] {
        let web = scene.add_unannounced(1, name)?;
        scene.announce(&web.pod, &Terms { serves: serves("lab/echo"), ..Terms::default() })?;
        let state = scene.control.snapshot(1);
        for mut backend in state.backends.into_iter().filter(|b| b.pod.as_deref() == Some(web.pod.name.as_str())) {
            backend.weight = weight;
            scene.control.send(1, &Event::Upsert { object: Object::Backend(backend) })?;
        }
        webs.push(web);
    }
    webs[2].server.sigkill()?;
    webs[2].server.wait()?;
    let servers = answers(&scene, scene.vip(Family::V4), 600);
    assert!(!servers.contains_key("dead"));
    // 450 of 600 expected, standard deviation 10.6: this is six of them.
    assert!((386..=514).contains(&servers["heavy"]), "{servers:?}");
    Ok(())
}

fn udp(scene: &Scene, family: Family) -> Result<UdpSocket> {
    let kind = if family == Family::V4 { Kind::Udp4 } else { Kind::Udp6 };
    let socket = UdpSocket::from(scene.client.place.socket(kind)?);
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(socket)
}

fn heard(socket: &UdpSocket) -> Result<(String, SocketAddr)> {
    let mut answer = [0; 100];
    let (len, from) = socket.recv_from(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..len]).into_owned();
    Ok((answer.split(' ').next().unwrap_or_default().to_owned(), from))
}

#[test]
fn a_datagram_to_a_service_is_answered_from_the_services_address() -> Result<()> {
    let scene = scene("", &[1, 2]);
    for family in Family::BOTH {
        let unconnected = udp(&scene, family)?;
        unconnected.send_to(b"who", scene.vip(family))?;
        let (name, from) = heard(&unconnected)?;
        assert!(name.starts_with("web-"), "{name}");
        assert_eq!(from, scene.vip(family));

        let connected = udp(&scene, family)?;
        connected.connect(scene.vip(family))?;
        connected.send(b"who")?;
        assert!(heard(&connected)?.0.starts_with("web-"));
        assert_eq!(connected.peer_addr()?, scene.vip(family));
    }
    Ok(())
}

#[test]
fn a_udp_socket_that_stays_leaves_a_dead_backend() -> Result<()> {
    let scene = scene("", &[1, 2]);
    for family in Family::BOTH {
        let socket = udp(&scene, family)?;
        socket.send_to(b"who", scene.vip(family))?;
        heard(&socket)?;
    }
    let sockets = Family::BOTH.map(|family| (family, udp(&scene, family).expect("a socket")));
    for (family, socket) in &sockets {
        socket.send_to(b"who", scene.vip(*family))?;
        heard(socket)?;
    }
    scene.control.terminating(&scene.webs[0].pod.name)?;
    scene.webs[0].server.sigterm()?;
    for (family, socket) in &sockets {
        for _ in 0..20 {
            socket.send_to(b"who", scene.vip(*family))?;
            let (name, from) = heard(socket)?;
            assert_eq!((name.as_str(), from), ("web-2", scene.vip(*family)));
        }
    }
    Ok(())
}

#[test]
fn a_client_in_the_nodes_own_network_is_served_too() -> Result<()> {
    let agent_args = vec!["--host".to_owned()];
    let scene = Scene::new(&SceneSpec { agent_args, ..SceneSpec::default() })?;
    for family in Family::BOTH {
        let mut stream: TcpStream = connect_from(&scene.lab.node(1).host, scene.vip(family))?;
        assert!(who(&mut stream)?.starts_with("web-"));
    }
    Ok(())
}
