//! `kubectl rollout restart` on a real Kubernetes, under load that fortio makes and counts.

use std::time::Duration;

use anyhow::Result;
use hitless_tests::cluster::{
    Spec,
    gateway::Gateway,
    image,
    scene::{NAMESPACE, Scene},
};

const REPLICAS: usize = 3;

/// What hitless is for: kube-proxy and a gateway with endpoints of its own lose requests.
#[test]
fn a_rollout_without_hitless_loses_requests() -> Result<()> {
    let scene = Scene::new(&Spec::default(), REPLICAS)?;
    scene.cluster.load(&image::envoy()?)?;
    let gateway = Gateway::start(&scene.cluster, NAMESPACE, "web", 1)?;
    let url = format!("http://{}/", scene.vip);
    let direct = scene.roll_under_load("classic-direct", &url, 1000, 2, Duration::from_secs(16))?;
    let through = scene.roll_under_load("classic-gateway", &gateway.url("/"), 1000, 2, Duration::from_secs(16))?;
    assert!(direct.requests > 1000 && through.requests > 1000, "hardly any load: {direct:?} {through:?}");
    assert!(direct.failed > 0 && through.failed > 0, "nothing was lost without hitless: {direct:?} {through:?}");
    Ok(())
}
