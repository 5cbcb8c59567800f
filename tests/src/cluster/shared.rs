//! One cluster for many tests: each takes it, and gives it back as it was, or it is made anew for the next.

use std::sync::Mutex;

use anyhow::Result;

use super::{
    KubeProxy, Spec,
    image::{self, FORTIO},
    long,
    scene::{NAMESPACE, Scene, Server},
};

pub const REPLICAS: usize = 3;
/// Serves gRPC.
pub const STREAMS: &str = "streams";
pub const GRPC: u16 = 8079;

/// Waits for its turn, runs and, unless the test failed, leaves the cluster to the next. The last one's goes with the
/// process.
pub fn on_shared_scene(test: impl FnOnce(&mut Scene) -> Result<()>) -> Result<()> {
    static TURN: Mutex<()> = Mutex::new(());
    static SCENE: Mutex<Option<Scene>> = Mutex::new(None);
    // A test that failed has taken the scene with it: nothing is left half-done.
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let left = SCENE.lock().expect("no panic while locked").take();
    let mut scene = left.map_or_else(start, Ok)?;
    test(&mut scene)?;
    scene.wait_pods(REPLICAS)?;
    scene.wait_exact()?;
    *SCENE.lock().expect("no panic while locked") = Some(scene);
    Ok(())
}

/// Repeats what is repeated: once in CI.
pub fn rounds() -> usize {
    if long() { 3 } else { 1 }
}

fn start() -> Result<Scene> {
    let kube_proxy = if long() { KubeProxy::Nftables } else { KubeProxy::Iptables };
    let scene = Scene::with_hitless(&Spec { kube_proxy, ..Spec::default() }, REPLICAS, Server::Nginx)?;
    scene.cluster.load(&image::httpbin()?)?;
    scene.cluster.apply(&streams())?;
    scene.wait_rollout(&format!("deployment/{STREAMS}"))?;
    Ok(scene)
}

fn streams() -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {STREAMS}, namespace: {NAMESPACE}}}\n\
         spec: {{selector: {{app: {STREAMS}}}, ports: [{{name: grpc, port: {GRPC}}}]}}\n---\n\
         apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {STREAMS}, namespace: {NAMESPACE}}}\n\
         spec:\n  replicas: 2\n  selector: {{matchLabels: {{app: {STREAMS}}}}}\n  template:\n    metadata: {{labels: {{app: {STREAMS}}}}}\n\
         \x20   spec:\n      containers:\n      - name: fortio\n        image: {FORTIO}\n        imagePullPolicy: Never\n\
         \x20       args: [server]\n        ports: [{{containerPort: {GRPC}}}]\n\
         \x20       readinessProbe: {{tcpSocket: {{port: {GRPC}}}, periodSeconds: 1}}\n"
    )
}
