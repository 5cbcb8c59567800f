//! Rolling updates, deaths and restarts of the agents under load, with the mesh on: nobody notices, and nobody reads
//! along.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    thread,
    time::Duration,
};

use anyhow::Result;
use hitless_tests::{
    lab::{
        AgentOptions,
        control::Terms,
        mesh::Mesh,
        net::Family,
        packets::Sniffer,
        scene::{KUBELET, PORT, Scene, SceneSpec, Storm, Web, connect_from, eventually},
    },
    workload::storm::Outcome,
};

/// Set: 20 rollouts and 100,000 connections instead of 3 and what comes of them.
const LONG: &str = "HITLESS_TUNNEL_LONG";
const PODS: usize = 3;
/// Of a storm: so many connections are under way at once.
const THREADS: usize = 4;
/// Of an agent's tunnel, each with a listener in each pod.
const WORKERS: usize = 2;
/// How late the control plane tells of a death.
const LATE: Duration = Duration::from_secs(5);
/// Long enough for a thousand connections.
const A_WHILE: Duration = Duration::from_millis(700);

/// A mesh whose agents have that many workers.
fn mesh(webs: &[usize]) -> Result<(Scene, Mesh)> {
    Mesh::scene(webs, &workers().each_ref().map(String::as_str))
}

fn workers() -> [String; 2] {
    ["--tunnel-workers".into(), WORKERS.to_string()]
}

fn tell(scene: &Scene, what: &str, outcome: &Outcome) -> Result<()> {
    let Outcome { connections, failed, reasons, seconds, .. } = outcome;
    let [tunnelled, local, repicked] = ["outbound_tunnelled", "outbound_local", "outbound_repicked"];
    eprintln!(
        "{what}: {connections} connections in {seconds:.1} s, {failed} failed {reasons:?}; {} tunnelled, {} local, {} re-picked",
        scene.tunnel(tunnelled)?,
        scene.tunnel(local)?,
        scene.tunnel(repicked)?
    );
    Ok(())
}

/// Every pod is replaced again and again at full speed, the control plane 5 s late.
fn a_rolling_update_loses_nothing(family: Family) -> Result<()> {
    let (rollouts, connections) = if std::env::var_os(LONG).is_some() { (20, 100_000) } else { (3, 0) };
    let (mut scene, _mesh) = mesh(&[])?;
    let mut webs: VecDeque<Web> = (0..PODS).map(|i| scene.add_web(1 + i % 2)).collect::<Result<_>>()?;
    let storm = Storm::start(&scene.client, scene.vip(family), THREADS)?;
    let mut late = Vec::new();
    for turn in 0..rollouts * PODS {
        let old = webs.pop_front().expect("never empty");
        let (new, ended) = scene.replace(old, 1 + turn % 2, LATE)?;
        webs.push_back(new);
        late.push(ended);
    }
    for late in late {
        late.join().expect("no panic")?;
    }
    while scene.tunnel("outbound_tunnelled")? + scene.tunnel("outbound_local")? < connections {
        thread::sleep(Duration::from_millis(100));
    }
    let outcome = storm.end()?;
    tell(&scene, &format!("rolling update, {family:?}"), &outcome)?;
    assert_eq!((outcome.failed, &outcome.reasons), (0, &Default::default()), "of {}", outcome.connections);
    assert_eq!(scene.tunnel("outbound_failed")?, 0);
    assert!(scene.tunnel("outbound_tunnelled")? > 100 && scene.tunnel("outbound_local")? > 100);
    assert!(outcome.servers.len() > PODS, "only {:?} answered", outcome.servers);
    Ok(())
}

#[test]
fn a_rolling_update_over_ipv4_loses_nothing() -> Result<()> {
    a_rolling_update_loses_nothing(Family::V4)
}

#[test]
fn a_rolling_update_over_ipv6_loses_nothing() -> Result<()> {
    a_rolling_update_loses_nothing(Family::V6)
}

/// A gateway names a pod, hears late that it went, and is answered by another of its service.
#[test]
fn a_gateway_that_names_a_stopped_pod_loses_nothing() -> Result<()> {
    let (scene, _mesh) = mesh(&[2, 2])?;
    let gateway = scene.lab.node(1).add_pod("gateway")?;
    scene.announce(&gateway, &Terms { gateway: true, ..Terms::default() })?;
    scene.agent(1).wait_joined(&gateway.name)?;
    let stopped = &scene.webs[0];
    let start = |addr| Storm::start(&gateway, (addr, PORT).into(), THREADS);
    let storms = stopped.pod.addresses().map(start);
    thread::sleep(A_WHILE);
    scene.control.terminating(&stopped.pod.name)?;
    thread::sleep(KUBELET);
    stopped.server.sigterm()?;
    stopped.server.wait()?;
    thread::sleep(A_WHILE);
    for storm in storms {
        let outcome = storm?.end()?;
        tell(&scene, "gateway", &outcome)?;
        assert_eq!((outcome.failed, &outcome.reasons), (0, &Default::default()), "of {}", outcome.connections);
        assert_eq!(outcome.servers.len(), 2, "{:?}", outcome.servers);
    }
    assert_eq!(scene.tunnel("outbound_failed")?, 0);
    Ok(())
}

/// What a killed server had accepted is lost with it, one connection per thread at the most. No other.
#[test]
fn killed_servers_take_no_more_along_than_they_had_accepted() -> Result<()> {
    let (mut scene, _mesh) = mesh(&[1, 2, 2])?;
    let storms = Family::BOTH.map(|family| Storm::start(&scene.client, scene.vip(family), THREADS));
    thread::sleep(A_WHILE);
    let kills = 4;
    for turn in 0..kills {
        let new = scene.add_web(1 + turn % 2)?;
        scene.webs.push(new);
        let killed = scene.webs.remove(0);
        killed.server.sigkill()?;
        killed.server.wait()?;
        thread::sleep(A_WHILE);
    }
    for storm in storms {
        let outcome = storm?.end()?;
        tell(&scene, "killed servers", &outcome)?;
        assert!(outcome.failed <= (kills * THREADS) as u64, "{} failed: {:?}", outcome.failed, outcome.reasons);
    }
    assert_eq!(scene.tunnel("outbound_failed")?, 0, "connections that found no server");
    Ok(())
}

#[derive(Clone, Copy, Debug)]
enum How {
    Sigterm,
    Kill9,
}

/// The agent of `node` goes amid the load and comes back. The client is on node 1, pods of the service on both.
/// What it carried is cut when it is killed; told to stop, it lets that end. Nothing else fails until it is back, nor
/// then.
fn an_agent_restarts(node: usize, how: How) -> Result<()> {
    let (mut scene, mesh) = mesh(&[1, 2])?;
    let start = |scene: &Scene| Family::BOTH.map(|family| Storm::start(&scene.client, scene.vip(family), THREADS));
    let storms = start(&scene);
    thread::sleep(A_WHILE);
    match how {
        How::Sigterm => {
            scene.control.disconnect_agent(node);
            scene.agent(node).process().sigterm()?;
            scene.agent(node).process().wait()?;
        }
        How::Kill9 => scene.kill_agent(node)?,
    }
    thread::sleep(A_WHILE);
    for storm in storms {
        let Outcome { connections, failed, reasons, servers, .. } = storm?.end()?;
        eprintln!("agent of node {node} goes, {how:?}: {failed} of {connections} failed {reasons:?}");
        // Its listeners close one after another: who was cut off may meet each that is still there.
        let most = if matches!(how, How::Kill9) { (1 + WORKERS) * THREADS } else { 0 };
        assert!(failed <= most as u64, "{failed} failed: {reasons:?}");
        let cut_short = |reason: &String| reason.starts_with("wrong answer");
        assert!(!reasons.keys().any(cut_short), "a cut connection looks finished: {reasons:?}");
        assert_eq!(servers.len(), 2, "{servers:?}");
    }

    let storms = start(&scene);
    thread::sleep(A_WHILE);
    let args = mesh.args().into_iter().chain(workers()).collect();
    scene.start_agent(node, AgentOptions { args, ..AgentOptions::default() })?;
    scene.wait_joined()?;
    // Clients that found nobody there may pass over it for some seconds more.
    let tunnelled = || scene.tunnel("outbound_tunnelled").expect("counters");
    let before = tunnelled();
    eventually(|| tunnelled() > before + 100, "the tunnel is used again");
    for storm in storms {
        let outcome = storm?.end()?;
        tell(&scene, &format!("agent of node {node} is back, {how:?}"), &outcome)?;
        assert_eq!((outcome.failed, &outcome.reasons), (0, &Default::default()), "of {}", outcome.connections);
    }
    Ok(())
}

#[test]
fn an_agent_that_is_told_to_stop_cuts_nothing() -> Result<()> {
    an_agent_restarts(1, How::Sigterm)?;
    an_agent_restarts(2, How::Sigterm)
}

#[test]
fn an_agent_that_is_killed_cuts_only_what_it_carries() -> Result<()> {
    an_agent_restarts(1, How::Kill9)?;
    an_agent_restarts(2, How::Kill9)
}

const MARKER: &str = "what-nobody-on-the-wire-may-read";

/// Packets between the nodes that bear the marker, and all, while it is said to the service and to its pod.
fn overheard(scene: &Scene, sniffer: &Sniffer) -> Result<(usize, usize)> {
    drop(sniffer.seen()?);
    let pods = scene.webs[0].pod.addresses().map(|addr| (addr, PORT).into());
    for to in Family::BOTH.map(|family| scene.vip(family)).into_iter().chain(pods) {
        let mut stream = connect_from(&scene.client.place, to)?;
        stream.write_all(format!("bye {MARKER}\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        assert_eq!(answer, format!("{} bye {MARKER}\n", scene.webs[0].name));
    }
    let packets = sniffer.seen()?;
    let bears = |packet: &&Vec<u8>| packet.windows(MARKER.len()).any(|bytes| bytes == MARKER.as_bytes());
    Ok((packets.iter().filter(bears).count(), packets.len()))
}

#[test]
fn nothing_is_in_clear_between_the_nodes() -> Result<()> {
    let plain = Scene::new(&SceneSpec { webs: vec![2], ..SceneSpec::default() })?;
    let (in_clear, _) = overheard(&plain, &plain.lab.sniff_between_nodes()?)?;
    assert!(in_clear >= 8, "the capture sees a question and an answer of each connection without the mesh: {in_clear}");
    drop(plain);
    let (scene, _mesh) = mesh(&[2])?;
    let (in_clear, packets) = overheard(&scene, &scene.lab.sniff_between_nodes()?)?;
    assert!(packets >= 8, "{packets} packets for four connections");
    assert_eq!(in_clear, 0, "of {packets}");
    assert_eq!(scene.tunnel("outbound_tunnelled")?, 4);
    Ok(())
}
