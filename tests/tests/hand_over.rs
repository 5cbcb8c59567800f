//! One agent takes over from another amid the load: no connection fails, not even to pods that take nothing but mutual
//! TLS, and what the old one carries has its time.

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::Result;
use hitless_tests::{
    lab::{
        Agent, AgentOptions, Exit,
        mesh::{Mesh, STRICT},
        net::Family,
        scene::{PORT, Scene, Storm, connect_from, eventually, taking_over, who},
    },
    workload::storm::Outcome,
};

/// Of a storm: so many connections are under way at once.
const THREADS: usize = 4;
/// Long enough for some hundred connections.
const A_WHILE: Duration = Duration::from_millis(500);
/// Of every agent here; the drain is as long as an agent has to let go of what it carries.
const ARGS: [&str; 4] = ["--tunnel-workers", "2", "--tunnel-drain", "3s"];

/// Two nodes, a pod of the service on each, all closed to plaintext.
fn strict(more: &[&str]) -> Result<(Scene, Mesh)> {
    let args = [&ARGS, more].concat();
    let (scene, mesh) = Mesh::scene(&[1, 2], &args)?;
    mesh.set_policies(STRICT)?;
    eventually(|| [1, 2].iter().all(|node| closed(&scene, *node)), "pods are closed to plaintext");
    Ok((scene, mesh))
}

/// Is the node's pod of the service? To the other node, that is: its own may probe it.
fn closed(scene: &Scene, node: usize) -> bool {
    let pod = SocketAddr::from((scene.webs[node - 1].pod.v4(), PORT));
    connect_from(&scene.lab.node(3 - node).host, pod).is_err()
}

fn options(mesh: &Mesh, more: &[&str]) -> AgentOptions {
    let args = mesh.args().into_iter().chain(ARGS.iter().chain(more).map(|arg| (*arg).to_owned()));
    AgentOptions { args: args.collect(), ..AgentOptions::default() }
}

/// To the service over both families, and to a pod of the other node by its address.
fn storms(scene: &Scene) -> Result<Vec<Storm>> {
    let services = Family::BOTH.map(|family| Storm::start(&scene.client, scene.vip(family), THREADS));
    services.into_iter().collect()
}

fn nothing_failed(storms: Vec<Storm>, what: &str) -> Result<()> {
    for storm in storms {
        let Outcome { connections, failed, reasons, servers, connect_max_us, .. } = storm.end()?;
        eprintln!("{what}: {failed} of {connections} failed {reasons:?}; the longest connect took {connect_max_us} us");
        assert_eq!((failed, &reasons), (0, &Default::default()), "{what}: of {connections}");
        assert_eq!(servers.len(), 2, "{what}: {servers:?}");
        assert!(connections > 100, "{what}: {connections}");
    }
    Ok(())
}

fn ended_well(agent: &Agent) -> Result<String> {
    let exit = agent.process().wait()?;
    let log = agent.process().log();
    assert_eq!(exit, Exit::Code(0), "{log}");
    assert!(log.contains("another agent serves"), "{log}");
    Ok(log)
}

/// Either node's agent is followed by one with the same maps, and by one that makes its own.
#[test]
fn an_agent_is_followed_by_another_and_no_connection_fails() -> Result<()> {
    let (mut scene, mesh) = strict(&[])?;
    let storms = storms(&scene)?;
    let mut befores = Vec::new();
    for (turn, salt) in [&[][..], &["--layout-salt", "next"], &["--layout-salt", "next"], &[]].iter().enumerate() {
        let node = 1 + turn % 2;
        let mut stream = connect_from(&scene.client.place, scene.vip(Family::V4))?;
        let name = who(&mut stream)?;
        thread::sleep(A_WHILE);
        let layout = scene.agent(node).status()?["kernel"]["layout"].clone();
        let before = scene.replace_agent(node, options(&mesh, salt))?;
        let moved = scene.agent(node).status()?["kernel"]["layout"] != layout;
        assert_eq!(moved, turn > 0, "turn {turn}");
        assert_eq!(who(&mut stream)?, name, "turn {turn}: what was open before goes on");
        befores.push(before);
        thread::sleep(A_WHILE);
    }
    nothing_failed(storms, "followed")?;
    for before in befores {
        let log = ended_well(&before)?;
        assert!(!log.contains("connections are cut"), "{log}");
    }
    Ok(())
}

/// What lasts longer than the drain is cut, and said so.
#[test]
fn what_was_cut_is_told() -> Result<()> {
    let (mut scene, mesh) = strict(&[])?;
    let mut streams: Vec<_> =
        (0..3).map(|_| connect_from(&scene.client.place, scene.vip(Family::V4))).collect::<Result<_, _>>()?;
    streams.iter_mut().try_for_each(|stream| who(stream).map(drop))?;
    let before = scene.replace_agent(1, options(&mesh, &[]))?;
    let log = ended_well(&before)?;
    assert!(log.contains("connections are cut") && log.contains("cut=3 of=3"), "{log}");
    assert!(streams.iter_mut().all(|stream| who(stream).is_err()), "they were carried by the agent that has gone");
    Ok(())
}

/// The heir has the listeners and is killed before it serves: whoever held them before goes on.
#[test]
fn an_heir_that_dies_has_taken_nothing_away() -> Result<()> {
    let (scene, mesh) = strict(&[])?;
    let storms = storms(&scene)?;
    thread::sleep(A_WHILE);
    for node in [1, 2] {
        // Nobody tells it a state, so it never serves.
        let heir = scene.lab.node(node).start_agent(taking_over(options(&mesh, &[])))?;
        scene.control.disconnect_agent(node);
        assert!(heir.process().log().contains("took over from another agent"), "{}", heir.process().log());
        thread::sleep(A_WHILE);
        heir.kill9()?;
        let agent = scene.agent(node);
        eventually(|| agent.process().log().contains("serving again"), "the agent before serves again");
        eventually(|| agent.connect().is_ok(), "its source is there again");
        thread::sleep(A_WHILE);
        assert!(closed(&scene, node), "strict means strict, also before the state is told again");
        scene.control.connect_agent(agent)?;
        thread::sleep(A_WHILE);
    }
    nothing_failed(storms, "heirs that die")?;
    for web in &scene.webs {
        scene.agent(web.pod.node).wait_joined(&web.pod.name)?;
    }
    Ok(())
}

/// For those who start whatever exits: an agent in reserve.
#[test]
fn an_agent_in_reserve_serves_when_its_heir_has_gone() -> Result<()> {
    let (mut scene, mesh) = strict(&["--when-replaced", "stand-by"])?;
    let storms = storms(&scene)?;
    let before = scene.replace_agent(2, options(&mesh, &[]))?;
    nothing_failed(storms, "stand-by")?;
    eventually(|| before.process().log().contains("another agent serves"), "it knows");
    thread::sleep(A_WHILE);
    assert!(before.process().running(), "{}", before.process().log());
    scene.kill_agent(2)?;
    eventually(|| before.connect().is_ok(), "it serves again");
    scene.control.connect_agent(&before)?;
    before.wait_joined(&scene.webs[1].pod.name)?;
    let pod = SocketAddr::from((scene.webs[1].pod.v4(), PORT));
    let answers = || connect_from(&scene.client.place, pod).and_then(|mut stream| who(&mut stream)).is_ok();
    eventually(answers, "a strict pod answers");
    before.process().sigterm()?;
    assert_eq!(before.process().wait()?, Exit::Code(0), "{}", before.process().log());
    Ok(())
}

/// A third agent takes from the second what that one took from the first.
#[test]
fn agents_follow_one_another() -> Result<()> {
    let (mut scene, mesh) = strict(&[])?;
    let storms = storms(&scene)?;
    let mut before = Vec::new();
    for _ in 0..3 {
        before.push(scene.replace_agent(2, options(&mesh, &[]))?);
    }
    nothing_failed(storms, "one after another")?;
    before.iter().try_for_each(|agent| ended_well(agent).map(drop))
}
