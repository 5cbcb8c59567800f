//! `kubectl rollout restart` on a real Kubernetes, under load that fortio makes and counts.

use std::collections::BTreeMap;

use anyhow::Result;
use hitless_tests::cluster::{
    Cni, KubeProxy, Spec,
    gateway::Gateway,
    image,
    load::Outcome,
    long,
    scene::{NAMESPACE, PATH, Scene, Server},
};

const REPLICAS: usize = 3;

/// How often to roll.
fn rollouts() -> usize {
    if long() { 5 } else { 2 }
}

/// What hitless is for: kube-proxy and a gateway with endpoints of its own lose requests.
#[test]
fn a_rollout_without_hitless_loses_requests() -> Result<()> {
    let scene = Scene::new(&Spec::default(), REPLICAS, Server::Nginx)?;
    scene.cluster.load(&image::envoy()?)?;
    let gateway = Gateway::start(&scene.cluster, NAMESPACE, "web", 1)?;
    let times = rollouts();
    let direct = scene.roll_under_load("classic-direct", &scene.url(), 1000, times)?;
    let through = scene.roll_under_load("classic-gateway", &gateway.url(PATH), 1000, times)?;
    assert!(direct.requests > 1000 && through.requests > 1000, "hardly any load: {direct:?} {through:?}");
    assert!(direct.failed > 0 && through.failed > 0, "nothing was lost without hitless: {direct:?} {through:?}");
    Ok(())
}

/// What both ways lost, and what the kernel says of the client's and the gateway's connects.
struct Rolled {
    direct: Outcome,
    through: Outcome,
    counters: BTreeMap<String, u64>,
    gateway: String,
}

fn roll_with_hitless(spec: &Spec, server: Server, qps: u32) -> Result<Rolled> {
    let scene = Scene::with_hitless(spec, REPLICAS, server)?;
    scene.cluster.load(&image::envoy()?)?;
    let gateway = Gateway::start(&scene.cluster, NAMESPACE, "web", 1)?;
    scene.wait_enrolled("gateway")?;
    let times = rollouts();
    let direct = scene.roll_under_load(&format!("direct-{qps}"), &scene.url(), qps, times)?;
    let through = scene.roll_under_load(&format!("gateway-{qps}"), &gateway.url(PATH), qps, times)?;
    let counters = scene.agents[0].counters()?;
    assert!(counters["stop_signals"] > 0, "no pod's end was seen: {counters:?}");
    for outcome in [&direct, &through] {
        assert!(outcome.requests > u64::from(qps) * 10, "hardly any load: {outcome:?}");
    }
    let gateway = gateway.failures(&scene.cluster);
    Ok(Rolled { direct, through, counters, gateway })
}

impl Rolled {
    /// Every connection is made, by the service's address and by a gateway that picks pods itself. A request may still
    /// be lost with the server that had accepted it: on two cores that also run the cluster it may wait 100 ms for its
    /// turn, and a server that ends meanwhile takes it along, which is no connect's failure.
    fn assert_only_accepted_requests_lost(&self, most: u64) {
        let Self { direct, through, counters, gateway } = self;
        let context = format!("{direct:?}\n{through:?}\n{counters:?}\n{gateway}");
        for counter in ["connects_refused", "connects_timed_out", "connects_unreachable", "connects_no_backend"] {
            assert_eq!(counters[counter], 0, "{counter}: {context}");
        }
        // Envoy's flag of a connect that failed.
        let failed_connect = |line: &str| line.split(' ').nth(2).is_some_and(|flags| flags.contains("UF"));
        assert!(!gateway.lines().any(failed_connect), "{context}");
        let failed = direct.failed + through.failed;
        assert!(failed <= most, "{failed} requests failed, more than {most}: {context}");
    }
}

#[test]
fn rollouts_of_nginx_under_50_requests_a_second_fail_no_connect() -> Result<()> {
    let rolled = roll_with_hitless(&Spec::default(), Server::Nginx, 50)?;
    // At most one in the hands of each server that was told to stop; none where the machine has time for them.
    rolled.assert_only_accepted_requests_lost((2 * rollouts() * REPLICAS) as u64);
    Ok(())
}

#[test]
fn rollouts_of_httpbin_under_1000_requests_a_second_fail_no_connect() -> Result<()> {
    let rolled = roll_with_hitless(&Spec::default(), Server::Httpbin, 1000)?;
    rolled.assert_only_accepted_requests_lost((rolled.direct.requests + rolled.through.requests) / 1000);
    Ok(())
}

#[test]
#[ignore = "part of the long form"]
fn rollouts_beside_kube_proxy_with_nftables_fail_no_connect() -> Result<()> {
    let rolled =
        roll_with_hitless(&Spec { kube_proxy: KubeProxy::Nftables, ..Spec::default() }, Server::Httpbin, 1000)?;
    rolled.assert_only_accepted_requests_lost((rolled.direct.requests + rolled.through.requests) / 1000);
    Ok(())
}

#[test]
#[ignore = "part of the long form"]
fn rollouts_of_pods_behind_routes_fail_no_connect() -> Result<()> {
    let rolled = roll_with_hitless(&Spec { cni: Cni::Ptp, ..Spec::default() }, Server::Httpbin, 1000)?;
    rolled.assert_only_accepted_requests_lost((rolled.direct.requests + rolled.through.requests) / 1000);
    Ok(())
}
