//! The DaemonSet of deploy/, installed on a real cluster, restarted, killed and upgraded under load.

use anyhow::Result;
use hitless_tests::cluster::{
    Cni, Spec, daemonset,
    scene::{NAMESPACE, Scene, Server},
};

const REPLICAS: usize = 3;
const QPS: u32 = 50;

#[test]
fn the_daemonset_of_deploy_fails_no_connect_whatever_becomes_of_its_agents() -> Result<()> {
    // Another way to join pods to their node than the other suites have.
    let scene = Scene::new(&Spec { cni: Cni::Ptp, ..Spec::default() }, REPLICAS, Server::Nginx)?;
    let cluster = &scene.cluster;
    daemonset::install(cluster)?;
    for node in cluster.nodes() {
        let status = daemonset::admin(node, &["status"])?;
        assert_eq!(
            (&status["ready"], &status["source"]["error"]),
            (&true.into(), &serde_json::Value::Null),
            "{status:#}"
        );
    }

    let load = scene.load("load", &scene.url(), QPS)?;
    daemonset::wait_enrolled(cluster.node(1), &format!("{NAMESPACE}/load"))?;
    scene.roll(1)?;
    // A new version of the agent, then one that keeps its maps in another layout, each in the middle of a rollout.
    for change in [["rollout", "restart", daemonset::DAEMON_SET], ["set", "env", daemonset::DAEMON_SET]] {
        let other_layout = if change[0] == "set" { &["HITLESS_LAYOUT_SALT=other"][..] } else { &[] };
        daemonset::kubectl(cluster, &[&change[..], other_layout].concat())?;
        scene.roll(1)?;
        daemonset::wait(cluster)?;
        for node in cluster.nodes() {
            let log = daemonset::log(cluster, node)?;
            assert!(log.contains("took over from another agent"), "{change:?}: {}\n{log}", node.name);
        }
    }
    // As when the node's OOM killer takes it.
    let victim = daemonset::pod(cluster, cluster.node(1))?;
    daemonset::kubectl(cluster, &["delete", "pod", &victim, "--grace-period=0", "--force"])?;
    scene.roll(1)?;
    daemonset::wait(cluster)?;
    let took = load.elapsed();
    let outcome = load.stop(cluster)?;
    eprintln!("four rollouts, three changes of agents in {took:.1?}: {outcome:?}");
    // At most one in the hands of each server that was told to stop, and no connect: fortio says which it was.
    let log = daemonset::log(cluster, cluster.node(1))?;
    assert!(outcome.failed <= 4 * REPLICAS as u64, "{outcome:?}\n{log}");
    assert!(!outcome.said.iter().any(|line| line.contains("dial tcp")), "{outcome:?}\n{log}");
    let counters = daemonset::admin(cluster.node(1), &["status"])?["counters"].clone();
    assert!(counters["connects_translated"].as_u64() > Some(0), "the load went past hitless: {counters:#}");
    Ok(())
}
