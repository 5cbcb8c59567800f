//! `kubectl rollout restart` on a real Kubernetes, under load that fortio makes and counts.

use anyhow::Result;
use hitless_tests::cluster::{
    Cni, KubeProxy, Spec,
    gateway::Gateway,
    image,
    rolled::{REPLICAS, Rolled, rollouts},
    scene::{NAMESPACE, PATH, Scene, Server},
};

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

fn roll_with_hitless(spec: &Spec, server: Server, qps: u32) -> Result<Rolled> {
    Rolled::of(&Scene::with_hitless(spec, REPLICAS, server)?, qps)
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
    rolled.assert_only_accepted_requests_lost(rolled.requests() / 1000);
    Ok(())
}

#[test]
#[ignore = "part of the long form"]
fn rollouts_beside_kube_proxy_with_nftables_fail_no_connect() -> Result<()> {
    let rolled =
        roll_with_hitless(&Spec { kube_proxy: KubeProxy::Nftables, ..Spec::default() }, Server::Httpbin, 1000)?;
    rolled.assert_only_accepted_requests_lost(rolled.requests() / 1000);
    Ok(())
}

#[test]
#[ignore = "part of the long form"]
fn rollouts_of_pods_behind_routes_fail_no_connect() -> Result<()> {
    let rolled = roll_with_hitless(&Spec { cni: Cni::Ptp, ..Spec::default() }, Server::Httpbin, 1000)?;
    rolled.assert_only_accepted_requests_lost(rolled.requests() / 1000);
    Ok(())
}
