//! The agent may die, come back, be upgraded or leave: the kernel path goes on.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf, thread, time::Duration};

use anyhow::Result;
use hitless_tests::{
    lab::{
        AgentOptions, Process,
        control::Terms,
        net::Family,
        scene::{Scene, SceneSpec, Web, connect_from, serves, who},
    },
    workload::storm::Outcome,
};

fn scene(webs: &[usize]) -> Scene {
    Scene::new(&SceneSpec { webs: webs.to_vec(), ..SceneSpec::default() }).expect("a scene")
}

fn kill(web: &Web) {
    web.server.sigkill().expect("kill");
    web.server.wait().expect("wait");
}

/// Everybody who answers, of so many connects that each of three is picked for sure.
fn servers(scene: &Scene, family: Family) -> BTreeSet<String> {
    let connects = (0..60).map(|n| {
        let mut stream = scene.connect(family).unwrap_or_else(|error| panic!("connect {n}: {error}"));
        who(&mut stream).unwrap_or_else(|error| panic!("ask {n}: {error}"))
    });
    connects.collect()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn with_the_agents_dead_the_kernel_chooses_and_rebinds() -> Result<()> {
    let scene = scene(&[1, 2, 2]);
    for node in [1, 2] {
        scene.kill_agent(node)?;
    }
    for family in Family::BOTH {
        assert_eq!(servers(&scene, family), names(&["web-1", "web-2", "web-3"]));
    }
    // One on the client's node (its listener's close is seen), one on the other (a SYN meets the refusal).
    kill(&scene.webs[0]);
    kill(&scene.webs[1]);
    for family in Family::BOTH {
        assert_eq!(servers(&scene, family), names(&["web-3"]));
    }
    Ok(())
}

#[test]
fn an_agent_that_comes_back_knows_what_changed_meanwhile() -> Result<()> {
    let mut scene = scene(&[1, 2, 2]);
    scene.kill_agent(1)?;
    let gone = scene.webs.remove(0);
    scene.control.endpoint_gone(&gone.pod.name)?;
    scene.control.pod_deleted(&gone.pod.name)?;
    gone.pod.delete()?;
    let new = scene.add_web(1)?;
    scene.webs.push(new);
    scene.start_agent(1, AgentOptions::default())?;
    for family in Family::BOTH {
        assert_eq!(servers(&scene, family), names(&["web-2", "web-3", "web-4"]));
    }
    Ok(())
}

#[test]
fn a_listener_that_closed_while_the_agent_was_dead_is_still_known_as_closed() -> Result<()> {
    let mut scene = scene(&[1, 2]);
    scene.kill_agent(1)?;
    kill(&scene.webs[0]);
    scene.start_agent(1, AgentOptions { layers: "l1,l2".into(), ..AgentOptions::default() })?;
    assert_eq!(servers(&scene, Family::V4), names(&["web-2"]));
    Ok(())
}

/// Connections without end.
fn storm(scene: &Scene, family: Family) -> Result<(Process, PathBuf)> {
    let result = scene.client.place.file(&format!("storm-{family:?}.json"));
    let target: SocketAddr = scene.vip(family);
    let process = scene.client.workload(&[
        "storm",
        "--target",
        &target.to_string(),
        "--connections",
        "1000000000",
        "--threads",
        "2",
        "--result",
        &result.to_string_lossy(),
    ])?;
    Ok((process, result))
}

fn assert_nothing_lost(scene: &Scene, storm: &Process, result: &PathBuf) -> Result<()> {
    storm.sigterm()?;
    storm.wait()?;
    let outcome: Outcome = serde_json::from_str(&std::fs::read_to_string(result)?)?;
    assert_eq!(
        (outcome.failed, &outcome.reasons),
        (0, &Default::default()),
        "of {}; the last agent counted {:?}",
        outcome.connections,
        scene.agent(1).counters()?
    );
    assert!(outcome.connections > 1000, "{} connections prove little", outcome.connections);
    Ok(())
}

#[test]
fn kill_9_at_any_moment_fails_no_connection() -> Result<()> {
    let mut scene = scene(&[1, 1, 1]);
    let storms = [storm(&scene, Family::V4)?, storm(&scene, Family::V6)?];
    for round in 0..8 {
        scene.kill_agent(1)?;
        // A pod dies while only the programs in the kernel can tell.
        let old = scene.webs.remove(0);
        old.server.sigterm()?;
        scene.control.endpoint_gone(&old.pod.name)?;
        let new = scene.add_web(1)?;
        scene.webs.push(new);
        // Every other round brings another layout of the maps.
        let salt = if round / 2 % 2 == 0 { "" } else { "next" };
        let options = AgentOptions { args: vec![format!("--layout-salt={salt}")], ..AgentOptions::default() };
        if round % 2 == 0 {
            // Killed again while it starts: at another step each time.
            let starting = scene.lab.node(1).start_agent(options.clone())?;
            thread::sleep(Duration::from_millis(30 * round as u64));
            starting.kill9()?;
        }
        scene.start_agent(1, options)?;
        old.pod.delete()?;
    }
    for (storm, result) in &storms {
        assert_nothing_lost(&scene, storm, result)?;
    }
    Ok(())
}

#[test]
fn an_upgrade_to_another_map_layout_fails_no_connection() -> Result<()> {
    let mut scene = scene(&[1, 2, 2]);
    kill(&scene.webs[1]);
    // An open connection that was rebound must live through it: most of these meet the dead backend.
    let mut open = Vec::new();
    for n in 0..20 {
        open.push(scene.connect(Family::BOTH[n % 2])?);
    }
    let storms = [storm(&scene, Family::V4)?, storm(&scene, Family::V6)?];
    for salt in ["one", "two", "three"] {
        scene.control.disconnect_agent(1);
        scene.agent(1).process().sigterm()?;
        scene.agent(1).process().wait()?;
        let args = vec!["--layout-salt".to_owned(), salt.to_owned()];
        scene.start_agent(1, AgentOptions { args, ..AgentOptions::default() })?;
    }
    for (storm, result) in &storms {
        assert_nothing_lost(&scene, storm, result)?;
    }
    for stream in &mut open {
        who(stream)?;
    }
    Ok(())
}

#[test]
fn a_stopped_agent_leaves_the_kernel_path_and_uninstall_removes_it() -> Result<()> {
    let scene = scene(&[1, 2]);
    let agent = scene.agent(1);
    scene.control.disconnect_agent(1);
    agent.process().sigterm()?;
    agent.process().wait()?;
    assert_eq!(servers(&scene, Family::V4), names(&["web-1", "web-2"]));
    agent.run(&["uninstall"])?;
    scene.connect(Family::V4).expect_err("nothing translates the service's address any more");
    let pins = scene.lab.dir().join("bpf/node-1");
    assert!(!pins.exists(), "{} is left", pins.display());
    Ok(())
}

#[test]
fn a_second_agent_says_that_there_is_one_and_harms_nothing() -> Result<()> {
    let scene = scene(&[1, 2]);
    let error = match scene.lab.node(1).start_agent(AgentOptions::default()) {
        Ok(second) => second.wait_ready().expect_err("there is one already"),
        Err(error) => error,
    };
    assert!(format!("{error:#}").contains("node-1"), "{error:#}");
    assert_eq!(servers(&scene, Family::V4), names(&["web-1", "web-2"]));
    Ok(())
}

#[test]
fn a_pod_whose_namespace_vanished_does_not_disturb_the_others() -> Result<()> {
    let mut scene = scene(&[1, 2, 2]);
    // No word from the control plane, ever.
    let gone = scene.webs.remove(0);
    gone.server.sigkill()?;
    gone.pod.delete()?;
    for family in Family::BOTH {
        assert_eq!(servers(&scene, family), names(&["web-2", "web-3"]));
    }
    let web = scene.add_unannounced(1, "web-9")?;
    scene.announce(&web.pod, &Terms { serves: serves("lab/echo"), ..Terms::default() })?;
    assert_eq!(servers(&scene, Family::V4), names(&["web-2", "web-3", "web-9"]));
    let direct = SocketAddr::new(web.pod.v4(), 7);
    assert_eq!(who(&mut connect_from(&scene.client.place, direct)?)?, "web-9");
    Ok(())
}
