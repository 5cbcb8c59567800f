//! Servers whose image has a STOPSIGNAL of its own: the API does not tell it, the container runtime does.

use std::{fs, process::Command, time::Duration};

use anyhow::{Context, Result};
use hitless_tests::{
    cluster::{
        Spec, image,
        scene::{NAMESPACE, Scene, Server, WEB},
        trouble,
    },
    workload::agent_binary,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const IMAGE: &str = "hitless.test/nginx-quit:1";

/// Restarted in place by the kubelet: of that the API says nothing before it has happened.
fn restart(scene: &Scene, server: &trouble::Server) -> Result<()> {
    let pid = scene.node_of(server).pid(&server.container)?;
    fs::write(format!("/proc/{pid}/root/tmp/sick"), "").context("make a server sick")?;
    scene.wait_restarted(server).map(drop)
}

/// Which signal said that a pod's container was to stop, and who said first that the pod goes.
fn heard(scene: &Scene, pod: &str) -> Result<(Option<u64>, String)> {
    let agent = scene.client_agent()?;
    let name = Value::from(format!("{NAMESPACE}/{pod}"));
    let events = agent.rows(&["events"])?;
    let stopped = events.iter().find(|event| event["event"] == "stopSignal" && event["pod"] == name);
    let drains = agent.rows(&["drain", "watch", "--once"])?;
    let drain = drains.iter().find(|drain| drain["pod"] == name);
    let first = drain.and_then(|drain| drain["first"].as_str()).context("no drain of the pod")?;
    Ok((stopped.and_then(|event| event["signal"].as_u64()), first.to_owned()))
}

/// The doctor's word on the node's container runtime.
fn doctor(scene: &Scene) -> Result<Value> {
    let node = scene.cluster.node(1);
    let socket = node.containerd_socket();
    // With JSON and without an API server that it could ask: of that tells another suite.
    let output = Command::new(agent_binary()?)
        .args(["doctor", "--output", "json", "--source", "kube", "--kubeconfig", "/nowhere", "--cri-socket"])
        .arg(socket)
        .output()?;
    let checks: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    checks.into_iter().find(|check| check["name"] == "container runtime").context("the check is made")
}

#[test]
fn an_image_s_own_stop_signal_takes_its_pod_out_before_its_listener_closes() -> Result<()> {
    let mut scene = Scene::with_hitless(&Spec { nodes: 1, ..Spec::default() }, 2, Server::Nginx)?;
    let quits = image::nginx()?.named(IMAGE).stopped_by("SIGQUIT");
    scene.cluster.load(&quits)?;
    let probe =
        r#"{"httpGet":{"path":"/alive","port":8080},"periodSeconds":1,"failureThreshold":2,"timeoutSeconds":5}"#;
    let container = "/spec/template/spec/containers/0";
    let patch = format!(
        r#"[{{"op":"replace","path":"{container}/image","value":"{IMAGE}"}},{{"op":"add","path":"{container}/livenessProbe","value":{probe}}}]"#
    );
    scene.kubectl(&["patch", WEB, "--type=json", "-p", &patch])?;
    scene.wait_rollout(WEB)?;
    scene.wait_pods(2)?;
    scene.wait_exact()?;
    // The status of a container is told a moment after it runs, and then the runtime is asked.
    std::thread::sleep(Duration::from_secs(2));
    let servers = scene.servers()?;
    let runtime = doctor(&scene)?;
    assert!(runtime["status"] == "ok" && runtime["found"].to_string().contains("containerd"), "{runtime}");
    restart(&scene, &servers[0])?;
    assert_eq!(heard(&scene, &servers[0].name)?, (Some(Signal::SIGQUIT as u64), "sigterm".into()));

    // Nobody says it to an agent that does not ask: the first that is heard is the listener.
    scene.end_agent(1, Signal::SIGTERM)?;
    scene.start_agent(1, &["--cri-socket", "off"])?;
    restart(&scene, &servers[1])?;
    assert_eq!(heard(&scene, &servers[1].name)?, (None, "listener".into()));
    Ok(())
}
