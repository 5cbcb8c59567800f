//! The mesh on a real Kubernetes: `kubectl rollout restart` of pods whose connections go in mutual TLS, and what the
//! wire between the nodes and a stranger see of it. Without hitless: `cluster_rollout`.

use std::{net::Ipv4Addr, thread::sleep, time::Duration};

use anyhow::{Context, Result};
use hitless_tests::{
    cluster::{
        Spec,
        image::NGINX,
        load::{Amount, Load, LoadSpec, Outcome},
        mesh::Wire,
        rolled::{REPLICAS, Rolled, rollouts},
        scene::{CLIENTS, NAMESPACE, Scene, Server},
    },
    workload::{binary, storm::Outcome as Tried},
};

/// Not enrolled, and not in an enrolled namespace.
const ELSEWHERE: &str = "default";
/// Long enough for some dozens of requests.
const A_WHILE: Duration = Duration::from_secs(3);

/// What comes of the requests of a pod that is not in the mesh.
fn stranger(scene: &Scene, name: &str) -> Result<Outcome> {
    let amount = Amount::Rate { qps: 40, clients: CLIENTS };
    let spec = LoadSpec { name: name.into(), url: scene.url(), amount, node: 1 };
    let load = Load::start(&scene.cluster, ELSEWHERE, spec, || Ok(()))?;
    sleep(A_WHILE);
    let outcome = load.stop(&scene.cluster)?;
    eprintln!("{name}: {} of {} requests failed", outcome.failed, outcome.requests);
    assert!(outcome.requests > u64::from(CLIENTS), "hardly any load: {outcome:?}");
    Ok(outcome)
}

/// Plaintext is sent to a pod's address from before there is one until it serves, as often as it can be: no connection
/// is made, although nothing holds the containers back until the agent knows of the pod.
fn nothing_enters_a_pod_that_starts(scene: &Scene) -> Result<()> {
    let neighbour: Ipv4Addr =
        scene.servers()?.into_iter().find(|server| server.node == 2).context("a pod on node-2")?.address;
    let [a, b, c, _] = neighbour.octets();
    let address = Ipv4Addr::new(a, b, c, 200);
    let (from, to) = (scene.cluster.node(1), scene.cluster.node(2));
    to.next_address(address)?;
    let result = scene.cluster.dir().join("early.json");
    let target = format!("{address}:8080");
    let args = ["storm", "--target", &target, "--threads", "16", "--timeout", "20", "--connections", "1000000000"];
    let binary = binary()?.to_string_lossy().into_owned();
    let args = std::iter::once(binary).chain(args.map(str::to_owned));
    let early = from.host_process("early", args.chain(["--result".into(), result.display().to_string()]).collect())?;
    scene.cluster.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: early, namespace: {NAMESPACE}}}\n\
         spec:\n  nodeName: node-2\n  containers:\n  - name: nginx\n    image: {NGINX}\n    imagePullPolicy: Never\n\
         \x20   readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}\n"
    ))?;
    scene.kubectl(&["wait", "--for=condition=Ready", "pod/early", "--timeout=60s"])?;
    let pod = scene.get(&["pod", "early"])?;
    assert_eq!(pod["status"]["podIP"], address.to_string().as_str(), "another address than the one that is tried");
    sleep(A_WHILE);
    early.sigterm()?;
    early.wait()?;
    let outcome: Tried = serde_json::from_str(&std::fs::read_to_string(result)?)?;
    eprintln!("to a pod that starts: {} of {} failed {:?}", outcome.failed, outcome.connections, outcome.reasons);
    // The kernel's refusal, once it is there.
    assert!(outcome.reasons.get("connect: refused").is_some_and(|refused| *refused > 100), "{outcome:?}");
    let made: Vec<_> = outcome.reasons.keys().filter(|reason| !reason.starts_with("connect: ")).collect();
    assert!(outcome.failed == outcome.connections && made.is_empty(), "plaintext entered a strict pod: {outcome:?}");
    scene.kubectl(&["delete", "pod", "early", "--now"]).map(drop)
}

/// First as the mesh is without policies, whose plaintext shows that the capture sees any; then strict.
fn roll_in_the_mesh(server: Server, qps: u32, most: impl Fn(&Rolled) -> u64) -> Result<()> {
    let scene = Scene::with_mesh(&Spec::default(), REPLICAS, server)?;
    let wire = Wire::listen(&scene.cluster)?;
    let welcome = stranger(&scene, "stranger")?;
    let heard = wire.end()?;
    assert_eq!(welcome.failed, 0, "a permissive pod takes plaintext: {welcome:?}");
    assert!(heard.in_clear >= 10, "the capture sees plaintext: {heard:?}");

    scene.make_strict()?;
    let refused = stranger(&scene, "stranger-refused")?;
    assert_eq!(refused.failed, refused.requests, "plaintext entered a strict pod: {refused:?}");

    if server == Server::Nginx {
        nothing_enters_a_pod_that_starts(&scene)?;
    }

    // A rollout goes on only as the kubelet's probes of each new pod pass: plain HTTP, from the node.
    let restarts = scene.restarts()?;
    let wire = Wire::listen(&scene.cluster)?;
    let rolled = Rolled::of(&scene, qps)?;
    let heard = wire.end()?;
    let count = |name| scene.tunnel(name);
    let [tunnelled, local] = [count("outbound_tunnelled")?, count("outbound_local")?];
    let [failed, plaintext, arrived] =
        [count("outbound_failed")?, count("outbound_plaintext")?, count("inbound_tunnelled")?];
    let repicked = count("outbound_repicked")?;
    eprintln!(
        "{} requests; {tunnelled} tunnelled, {local} local, {repicked} re-picked, {arrived} arrived; {heard:?}",
        rolled.requests()
    );
    rolled.assert_only_accepted_requests_lost(most(&rolled));
    let told = (failed, plaintext, rolled.counters["connects_tunnel_absent"]);
    assert_eq!(told, (0, 0, 0), "found no backend, left the mesh, went past the tunnel");
    assert!(tunnelled + local >= rolled.requests(), "{tunnelled} tunnelled and {local} local are not all");
    assert!(tunnelled > rolled.requests() / 10 && arrived >= tunnelled, "{tunnelled} left, {arrived} arrived");
    assert!(heard.hbone > 100, "the capture sees the tunnels: {heard:?}");
    assert_eq!(heard.in_clear, 0, "plaintext between the nodes: {heard:?}");
    assert_eq!(scene.restarts()?, restarts);
    Ok(())
}

#[test]
fn rollouts_of_nginx_in_a_strict_mesh_fail_no_connect_and_say_nothing_in_clear() -> Result<()> {
    // At most one in the hands of each server that was told to stop; none where the machine has time for them.
    roll_in_the_mesh(Server::Nginx, 50, |_| (2 * rollouts() * REPLICAS) as u64)
}

#[test]
#[ignore = "part of the long form"]
fn rollouts_of_httpbin_in_a_strict_mesh_fail_no_connect_and_say_nothing_in_clear() -> Result<()> {
    roll_in_the_mesh(Server::Httpbin, 300, |rolled| rolled.requests() / 1000)
}
