//! Dashboard and alert rules of `deploy/`, tried against a real Prometheus that scrapes real agents.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Context, Result};
use hitless_tests::{
    lab::{
        AgentOptions,
        mesh::Mesh,
        net::Family,
        scene::{Scene, SceneSpec, eventually, who},
    },
    observe::{
        self, ALERTS, DASHBOARD,
        dashboard::Dashboard,
        expression,
        prometheus::{self, Prometheus, promtool},
    },
};
use serde_json::Value;

const METRICS: [&str; 2] = ["--metrics-address", "[::]:15084"];

fn scene(more: Vec<String>) -> Result<Scene> {
    let agent_args = METRICS.map(str::to_owned).into_iter().chain(more).collect();
    Scene::new(&SceneSpec { agent_args, ..SceneSpec::default() })
}

/// Where the agent of a node serves its metrics, as node 1 reaches it.
fn at(scene: &Scene, node: usize) -> SocketAddr {
    let address = if node == 1 { IpAddr::from(Ipv4Addr::LOCALHOST) } else { scene.lab.node(node).addresses()[0] };
    (address, 15084).into()
}

fn watch(scene: &Scene) -> Result<Prometheus<'_>> {
    Prometheus::start(&scene.lab.node(1).host, &[at(scene, 1), at(scene, 2)], &shortened(scene)?)
}

/// The committed rules, but that no alert waits for minutes.
fn shortened(scene: &Scene) -> Result<PathBuf> {
    let rules = observe::read(ALERTS)?;
    let lines = rules.lines().map(|line| if line.trim_start().starts_with("for: ") { "    for: 1s" } else { line });
    let path = scene.lab.dir().join("alerts.yaml");
    fs::write(&path, lines.collect::<Vec<_>>().join("\n"))?;
    Ok(path)
}

fn number(series: &[Value]) -> f64 {
    let value = series.first().and_then(|series| series["value"][1].as_str());
    value.and_then(|value| value.parse().ok()).unwrap_or(f64::NAN)
}

/// Of each alert that fires: its name, and whom it is about.
fn firing(prometheus: &Prometheus<'_>) -> Result<BTreeSet<(String, String)>> {
    let alerts = prometheus.alerts()?.into_iter().filter(|alert| alert["state"] == "firing");
    let label = |alert: &Value, name: &str| alert["labels"][name].as_str().unwrap_or_default().to_owned();
    Ok(alerts.map(|alert| (label(&alert, "alertname"), label(&alert, "instance"))).collect())
}

/// There is an answer, and each series of it has the labels that the text is made of.
fn assert_answered(answer: &[Value], text: &str, question: &str) {
    assert!(!answer.is_empty(), "nothing answers {question}");
    for series in answer {
        for label in expression::labels(text) {
            assert!(series["metric"].get(&label).is_some(), "{question}: {text:?} names no label of {series}");
        }
    }
}

#[test]
fn every_question_of_dashboard_and_alerts_has_an_answer_and_a_healthy_lab_raises_no_alert() -> Result<()> {
    promtool(&["check", "rules", &observe::file(ALERTS).to_string_lossy()], "")?;
    // With a mesh there is all that can be asked for.
    let mesh = Mesh::new()?;
    let scene = scene(mesh.args())?;
    let prometheus = watch(&scene)?;
    let joined = r#"sum(hitless_mesh_pods{state="joined"})"#;
    let pods = (scene.webs.len() + 1) as f64;
    eventually(|| prometheus.query(joined).is_ok_and(|sum| number(&sum) == pods), "every pod joins the mesh");

    // A rollout of one pod, the control plane coming last.
    for _ in 0..5 {
        who(&mut scene.connect(Family::V4)?)?;
    }
    let old = &scene.webs[0];
    old.server.sigterm()?;
    old.server.wait()?;
    who(&mut scene.connect(Family::V4)?)?;
    scene.control.endpoint_gone(&old.pod.name)?;

    let up = || prometheus.targets().is_ok_and(|targets| targets.iter().filter(|t| t["health"] == "up").count() == 2);
    eventually(up, "both agents are scraped");
    let told = r#"sum(hitless_drains_total{first="sigterm"})"#;
    eventually(|| prometheus.query(told).is_ok_and(|sum| number(&sum) >= 1.0), "the stop signal is seen as a drain");
    let late = r#"sum(hitless_control_plane_lag_seconds_count{first="sigterm"})"#;
    eventually(|| prometheus.query(late).is_ok_and(|sum| number(&sum) >= 1.0), "the control plane's lag is measured");
    let carried = r#"sum(istio_tcp_connections_closed_total{reporter="source"})"#;
    eventually(|| prometheus.query(carried).is_ok_and(|sum| number(&sum) >= 6.0), "the connections are told of");
    // Rates need two samples, and rules an evaluation after them.
    let scrapes = "min(count_over_time(hitless_ready[1m]))";
    eventually(|| prometheus.query(scrapes).is_ok_and(|least| number(&least) >= 4.0), "four scrapes");

    let (status, exposition) = prometheus::get(&scene.lab.node(1).host, at(&scene, 1), "/metrics")?;
    assert_eq!(status, 200);
    promtool(&["check", "metrics"], &exposition)?;
    let families = exposition.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let families: BTreeSet<_> = families.filter(|name| name.starts_with("hitless_")).map(str::to_owned).collect();
    let documented = observe::documented()?.into_iter().filter(|name| name.starts_with("hitless_")).collect();
    assert_eq!(families, documented, "docs/metrics.md has another list");
    let samples = exposition.lines().filter(|line| !line.starts_with('#'));
    let exposed: BTreeSet<_> = samples.filter_map(|line| line.split(['{', ' ']).next()).collect();

    let dashboard = Dashboard::parse(&observe::read(DASHBOARD)?)?;
    for (panel, target) in dashboard.queries() {
        let query = target.query();
        for name in expression::names(&query) {
            assert!(exposed.contains(&*name), "panel {panel}: the agent exposes no {name}");
        }
        let answer = prometheus.query(&query).with_context(|| format!("panel {panel}: {query}"))?;
        assert_answered(&answer, &target.legend_format, &format!("panel {panel}: {query}"));
    }

    let rules = prometheus.rules()?;
    assert!(rules.len() > 10, "{rules:?}");
    for rule in &rules {
        let (name, query) = (rule["name"].as_str().unwrap_or_default(), rule["query"].as_str().unwrap_or_default());
        assert_eq!((&rule["health"], &rule["lastError"]), (&"ok".into(), &Value::Null), "{name}");
        for name in expression::names(query).iter().filter(|name| *name != "up") {
            assert!(exposed.contains(&**name), "{query}: the agent exposes no {name}");
        }
        // In a healthy lab it is the comparison, and nothing else, that keeps the alert quiet.
        let compared = expression::compared(query).with_context(|| format!("alert {name}: no comparison: {query}"))?;
        let told = &rule["annotations"];
        let texts = format!("{} {}", told["summary"], told["description"]);
        assert_answered(&prometheus.query(compared)?, &texts, &format!("alert {name}: {compared}"));
    }
    let mut raised = firing(&prometheus)?;
    // A matter of the machine: two cores, a debug build.
    raised.retain(|(alert, _)| alert != "HitlessEndpointLagHigh");
    assert_eq!(raised, BTreeSet::new());
    Ok(())
}

#[test]
fn an_agent_that_is_gone_or_not_ready_is_alerted_of_until_it_is_ready_again() -> Result<()> {
    let scene = scene(Vec::new())?;
    let prometheus = watch(&scene)?;
    let (here, there) = (at(&scene, 1).to_string(), at(&scene, 2).to_string());
    let fires = |alert: &str, instance: &str| {
        firing(&prometheus).is_ok_and(|firing| firing.contains(&(alert.to_owned(), instance.to_owned())))
    };
    let ready = || prometheus.query("sum(hitless_ready)").is_ok_and(|sum| number(&sum) == 2.0);
    eventually(ready, "both agents are ready");

    scene.kill_agent(2)?;
    eventually(|| fires("HitlessDown", &there), "the agent that is gone is alerted of");

    // It comes back, and its source says nothing.
    let args = METRICS.map(str::to_owned).to_vec();
    let agent = scene.lab.node(2).start_agent(AgentOptions { args, ..AgentOptions::default() })?;
    eventually(|| fires("HitlessNotReady", &there), "the agent that is not ready is alerted of");
    eventually(|| fires("HitlessSourceDisconnected", &there), "the silent source is alerted of");
    let alert = prometheus.alerts()?.into_iter().find(|alert| alert["labels"]["alertname"] == "HitlessNotReady");
    let summary = alert.context("it fires")?["annotations"]["summary"].clone();
    assert_eq!(summary, format!("hitless on {there} is not ready"));

    scene.control.connect_agent(&agent)?;
    let settled = || !["HitlessDown", "HitlessNotReady", "HitlessSourceDisconnected"].iter().any(|a| fires(a, &there));
    eventually(settled, "nothing is alerted of any more");
    assert!(!fires("HitlessDown", &here) && !fires("HitlessNotReady", &here), "node 1 was never touched");
    Ok(())
}
