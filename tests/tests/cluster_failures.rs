//! What befalls a real Kubernetes besides rollouts, under load that fortio makes and counts. One cluster for all.
//!
//! `HITLESS_CLUSTER_LAYERS=none` shows those fail whose deaths nobody announces; announced ones the pod watch alone saves.

use std::{
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hitless_tests::cluster::{
    image::HTTPBIN,
    load::Amount,
    scene::{NAMESPACE, WEB},
    shared::{GRPC, REPLICAS, STREAMS, on_shared_scene, rounds},
    trouble::{Server, wait_for},
};
use nix::sys::signal::Signal;
use serde_json::json;

/// Requests a second.
const QPS: u32 = 100;

#[test]
fn scaling_to_one_and_back_fails_no_connect() -> Result<()> {
    on_shared_scene(|scene| {
        let suffered = scene.under_load(QPS, |scene, _| {
            for _ in 0..rounds() {
                scene.scale(1)?;
                scene.scale(REPLICAS)?;
            }
            Ok(())
        })?;
        suffered.assert_nothing_lost_but_accepted((rounds() * (REPLICAS - 1)) as u32);
        Ok(())
    })
}

#[test]
fn draining_a_node_and_evicting_a_pod_fail_no_connect() -> Result<()> {
    on_shared_scene(|scene| {
        scene.spread()?;
        let suffered = scene.under_load(QPS, |scene, _| {
            for _ in 0..rounds() {
                let evicted =
                    scene.servers()?.into_iter().find(|server| server.node == 1).context("a pod on node-1")?;
                scene.evict(&evicted.name)?;
                wait_for("the evicted pod's end", || Ok((!scene.pods()?.contains(&evicted.name)).then_some(())))?;
                scene.wait_pods(REPLICAS)?;
                scene.spread()?;
                let drain =
                    ["drain", "node-2", "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=90s"];
                scene.cluster.kubectl(&drain)?;
                scene.wait_pods(REPLICAS)?;
                assert!(scene.servers()?.iter().all(|server| server.node == 1), "node-2 was drained");
                scene.cluster.kubectl(&["uncordon", "node-2"])?;
                scene.spread()?;
            }
            Ok(())
        })?;
        suffered.assert_nothing_lost_but_accepted((rounds() * REPLICAS) as u32);
        Ok(())
    })
}

/// As a crash does it: no event of the API comes before.
#[test]
fn a_killed_server_fails_no_connect() -> Result<()> {
    on_shared_scene(|scene| {
        scene.spread()?;
        let servers = scene.servers()?;
        let suffered = scene.under_load(QPS, |scene, _| {
            for server in &servers {
                scene.node_of(server).kill(&server.container, "SIGKILL")?;
                scene.wait_restarted(server)?;
            }
            Ok(())
        })?;
        assert!(suffered.counted["listeners_closed"] > 0, "no death was seen: {suffered:?}");
        suffered.assert_only_accepted_requests_lost(servers.len() as u32);
        // Their next restart would be delayed.
        scene.roll(1)
    })
}

/// The kernel's own choice, by the memory limit of the container.
#[test]
fn a_server_that_the_oom_killer_takes_fails_no_connect() -> Result<()> {
    on_shared_scene(|scene| {
        // A single process, as most servers are: nginx's first one would outlive the one that serves.
        let one_process = json!(["-g", "master_process off;"]);
        scene.change_server(&json!({"args": one_process, "resources": {"limits": {"memory": "64Mi"}}}))?;
        scene.spread()?;
        let servers = scene.servers()?;
        let suffered = scene.under_load(QPS, |scene, _| {
            for server in &servers {
                scene.overfeed(server)?;
                assert_eq!(scene.wait_restarted(server)?, "OOMKilled", "{server:?}");
            }
            Ok(())
        })?;
        assert!(suffered.counted["listeners_closed"] > 0, "no death was seen: {suffered:?}");
        suffered.assert_only_accepted_requests_lost(servers.len() as u32);
        scene.change_server(&json!({"args": null, "resources": null}))
    })
}

/// The pod stays, and so does its address: only the node sees the stop signal.
#[test]
fn a_liveness_restart_in_place_fails_no_connect() -> Result<()> {
    on_shared_scene(|scene| {
        let probe = json!({"httpGet": {"path": "/alive", "port": 8080}, "periodSeconds": 1, "failureThreshold": 2,
            "timeoutSeconds": 5});
        scene.change_server(&json!({"livenessProbe": probe}))?;
        scene.spread()?;
        let mut sick = scene.servers()?;
        sick.sort_by_key(|server| server.node);
        // One of each node, and at least one other stays.
        sick.dedup_by_key(|server| server.node);
        let suffered = scene.under_load(QPS, |scene, _| {
            for server in &sick {
                let pid = scene.node_of(server).pid(&server.container)?;
                fs::write(format!("/proc/{pid}/root/tmp/sick"), "").context("make a server sick")?;
            }
            sick.iter().try_for_each(|server| scene.wait_restarted(server).map(drop))
        })?;
        assert!(suffered.counted["stop_signals"] > 0, "no stop signal was seen: {suffered:?}");
        suffered.assert_only_accepted_requests_lost(sick.len() as u32);
        scene.change_server(&json!({"livenessProbe": null}))
    })
}

/// The control plane is late for good: its EndpointSlice goes on naming the address that another service's pod has now.
#[test]
fn a_reused_address_gets_no_request_of_the_service_that_had_it() -> Result<()> {
    on_shared_scene(|scene| {
        scene.spread()?;
        let gone = scene.servers()?.into_iter().find(|server| server.node == 2).context("a pod on node-2")?;
        scene.cluster.control.stop_controllers()?;
        // nginx answers everything with 200, and go-httpbin with what is asked for.
        let suffered = scene.under_load_of("/status/418", QPS, |scene, _| {
            scene.kubectl(&["delete", "pod", &gone.name])?;
            scene.cluster.node(2).next_address(gone.address)?;
            scene.cluster.apply(&format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: other, namespace: {NAMESPACE}, labels: {{app: other}}}}\n\
                 spec:\n  nodeName: node-2\n  containers:\n  - name: httpbin\n    image: {HTTPBIN}\n    imagePullPolicy: Never\n\
                 \x20   readinessProbe: {{httpGet: {{path: /status/200, port: 8080}}, periodSeconds: 1}}\n"
            ))?;
            scene.kubectl(&["wait", "--for=condition=Ready", "pod/other", "--timeout=30s"])?;
            let other = scene.servers_of("other")?.pop().context("the other service's pod")?;
            assert_eq!(other.address, gone.address, "the address was not reused");
            sleep(Duration::from_secs(3));
            assert!(scene.slices()?.contains(&gone.address), "the EndpointSlice is not late");
            Ok(())
        })?;
        assert!(!suffered.outcome.codes.contains_key("418"), "requests landed on the other service: {suffered:?}");
        suffered.assert_nothing_lost_but_accepted(1);
        scene.kubectl(&["delete", "pod", "other"])?;
        scene.cluster.control.restart_controllers("*")
    })
}

#[test]
fn pods_deleted_while_no_endpointslice_follows_fail_no_connect() -> Result<()> {
    on_shared_scene(|scene| {
        scene.spread()?;
        scene.cluster.control.restart_controllers("*,-endpointslice-controller")?;
        let servers = scene.servers()?;
        // The last one has to carry everything: of those that come, no EndpointSlice tells.
        let (_, deleted) = servers.split_first().context("pods")?;
        let suffered = scene.under_load(QPS, |scene, _| {
            for server in deleted {
                scene.kubectl(&["delete", "pod", &server.name])?;
            }
            scene.wait_pods(REPLICAS)?;
            let slices = scene.slices()?;
            assert!(deleted.iter().all(|server| slices.contains(&server.address)), "not late: {slices:?}");
            Ok(())
        })?;
        suffered.assert_nothing_lost_but_accepted(REPLICAS as u32 - 1);
        scene.cluster.control.restart_controllers("*")
    })
}

#[test]
fn a_rollout_without_the_api_server_goes_on_and_the_state_is_exact_afterwards() -> Result<()> {
    on_shared_scene(|scene| {
        scene.spread()?;
        let old = scene.pods()?;
        let suffered = scene.under_load(QPS, |scene, _| {
            scene.kubectl(&["rollout", "restart", WEB])?;
            // A new one stays through the rollout: it is the one to die while nobody hears of it.
            let new = wait_for("a new pod", || {
                let slices = scene.slices()?;
                let new = |server: &Server| !old.contains(&server.name) && slices.contains(&server.address);
                Ok(scene.servers()?.into_iter().find(new))
            })?;
            scene.cluster.control.kill_apiserver()?;
            sleep(Duration::from_secs(1));
            scene.node_of(&new).kill(&new.container, "SIGKILL")?;
            sleep(Duration::from_secs(4));
            scene.cluster.control.start_apiserver()?;
            scene.wait_rollout(WEB)?;
            scene.wait_pods(REPLICAS)?;
            scene.wait_exact()
        })?;
        // The one that was killed, and old ones of whose end the kubelet alone may have heard.
        suffered.assert_only_accepted_requests_lost(1 + REPLICAS as u32);
        Ok(())
    })
}

/// What was known stays in force and says its age, and what happens on a node is still seen there.
#[test]
#[ignore = "takes eleven minutes: part of the long form"]
fn ten_minutes_without_an_api_server_fail_no_connect() -> Result<()> {
    on_shared_scene(|scene| {
        scene.spread()?;
        let told = scene.servers()?.into_iter().find(|server| server.node == 1).context("a pod on node-1")?;
        let suffered = scene.under_load(QPS, |scene, _| {
            let known = scene.offered(0)?;
            scene.cluster.control.kill_apiserver()?;
            let gone = Instant::now();
            for minutes in [3, 6, 9] {
                sleep((gone + Duration::from_secs(60 * minutes)).saturating_duration_since(Instant::now()));
                let status = scene.client_agent()?.admin(&["status"])?;
                let age = status["source"]["ageSeconds"].as_u64().context("the age of the state")?;
                assert!(age + 30 > 60 * minutes && age < gone.elapsed().as_secs() + 30, "after {minutes} min: {age} s");
                assert!(status["source"]["error"].is_string(), "no word of the API server: {:#}", status["source"]);
                assert_eq!(scene.offered(0)?, known, "after {minutes} min");
                // Its kubelet starts it again; what the node knows in between comes from the node.
                let container = scene.node_of(&told).container(&told.name, "nginx")?;
                scene.node_of(&told).kill(&container, "SIGTERM")?;
                wait_for("its end", || Ok((!scene.offered(0)?.contains(&told.address)).then_some(())))?;
                wait_for("its return", || Ok(scene.offered(0)?.contains(&told.address).then_some(())))?;
            }
            sleep((gone + Duration::from_secs(600)).saturating_duration_since(Instant::now()));
            scene.cluster.control.start_apiserver()?;
            scene.wait_pods(REPLICAS)?;
            scene.wait_exact()?;
            wait_for("word from the API server", || {
                let status = scene.client_agent()?.admin(&["status"])?;
                Ok((!status["source"]["error"].is_string()).then_some(()))
            })
        })?;
        assert!(suffered.counted["stop_signals"] >= 3, "not every stop signal was seen: {suffered:?}");
        suffered.assert_only_accepted_requests_lost(3);
        scene.roll(1)
    })
}

/// While its agent is away a node hears of other nodes' pods only by their refusals: those deaths are unannounced.
#[test]
fn an_agent_restarted_killed_or_upgraded_amid_a_rollout_fails_no_connect() -> Result<()> {
    on_shared_scene(|scene| {
        let ways = [
            ("restarted", Signal::SIGTERM, &[][..]),
            ("killed", Signal::SIGKILL, &[][..]),
            ("upgraded", Signal::SIGTERM, &["--layout-salt", "other"][..]),
            ("rolled back", Signal::SIGTERM, &[][..]),
        ];
        for (way, signal, args) in ways.iter().cycle().take(ways.len() * rounds()) {
            eprintln!("{way}:");
            let suffered = scene.under_load(QPS, |scene, _| {
                scene.kubectl(&["rollout", "restart", WEB])?;
                sleep(Duration::from_secs(1));
                scene.end_agent(1, *signal)?;
                sleep(Duration::from_secs(1));
                scene.start_agent(1, args)?;
                scene.wait_rollout(WEB)?;
                scene.wait_pods(REPLICAS)
            })?;
            suffered.assert_only_accepted_requests_lost(REPLICAS as u32);
        }
        Ok(())
    })
}

#[test]
fn labels_enrol_and_let_go_under_load_and_none_wins() -> Result<()> {
    on_shared_scene(|scene| {
        let namespace = ["namespace", NAMESPACE];
        let suffered = scene.under_load(QPS, |scene, load| {
            let pod = ["pod", load];
            let steps = [
                ("the pod says none, its namespace ambient", &pod, "none", false),
                ("the pod says nothing, its namespace ambient", &pod, "-", true),
                ("neither says anything", &namespace, "-", false),
                ("the pod says ambient, its namespace nothing", &pod, "ambient", true),
                ("both say ambient", &namespace, "ambient", true),
            ];
            for (state, what, mode, enrolled) in steps {
                scene.label(what, mode)?;
                scene.wait_served(enrolled).context(state)?;
            }
            Ok(())
        })?;
        suffered.assert_nothing_lost_but_accepted(0);
        Ok(())
    })
}

#[test]
fn streams_of_surviving_pods_are_not_cut() -> Result<()> {
    on_shared_scene(|scene| {
        const COUNT: usize = 8;
        let service = scene.get(&["service", STREAMS])?;
        let address = service["spec"]["clusterIP"].as_str().context("a service without an address")?;
        let load = scene.ask("streaming", &format!("{address}:{GRPC}"), Amount::Streams(COUNT as u32))?;
        let client = wait_for("the client's address", || {
            Ok(scene.get(&["pod", "streaming"])?["status"]["podIP"].as_str().and_then(|address| address.parse().ok()))
        })?;
        let servers = scene.servers_of(STREAMS)?;
        let mut streams = wait_for("the streams", || {
            let counts = servers.iter().map(|server| Ok((scene.connections(server, GRPC, client)?, server)));
            let counts = counts.collect::<Result<Vec<_>>>()?;
            Ok((counts.iter().map(|(count, _)| count).sum::<usize>() == COUNT).then_some(counts))
        })?;
        streams.sort_by_key(|(count, _)| *count);
        // Other pods' deaths, agents that come and go, enrolment off and on.
        scene.roll(1)?;
        scene.end_agent(1, Signal::SIGKILL)?;
        scene.start_agent(1, &["--layout-salt", "other"])?;
        scene.end_agent(1, Signal::SIGTERM)?;
        scene.start_agent(1, &[])?;
        for mode in ["none", "-"] {
            scene.label(&["pod", "streaming"], mode)?;
            sleep(Duration::from_secs(1));
        }
        let kept = |streams: &[(usize, &Server)]| -> Result<()> {
            for (before, server) in streams {
                let after = scene.connections(server, GRPC, client)?;
                assert!(after >= *before, "{} had {before} streams, and has {after}", server.name);
            }
            Ok(())
        };
        kept(&streams)?;
        // One of those that serve streams dies: the others' stay. Where its own go on is not counted: a call that fails
        // while its channel waits for the next try is an error each time.
        let dies = streams.remove(0).1;
        scene.node_of(dies).kill(&dies.container, "SIGKILL")?;
        scene.wait_restarted(dies)?;
        kept(&streams)?;
        let outcome = load.stop(&scene.cluster)?;
        eprintln!("{outcome:?}");
        assert!(outcome.codes.get("SERVING") > Some(&(COUNT as u64 * 10)), "hardly any calls: {outcome:?}");
        scene.kubectl(&["delete", "pod", "streaming", "--wait=false"])?;
        scene.wait_rollout(&format!("deployment/{STREAMS}"))
    })
}
