//! What `hitless doctor` says of an API server, before an agent is started there.

use std::process::Command;

use anyhow::{Context, Result};
use hitless_tests::{cluster::ControlPlane, workload::agent_binary};
use serde_json::Value;

/// Its check of the API server, by a user's credentials.
fn doctor(control: &ControlPlane, user: &str) -> Result<Value> {
    let output = Command::new(agent_binary()?)
        .args(["doctor", "--output", "json", "--source", "kube", "--node-name", "node-1", "--kubeconfig"])
        .arg(control.site.file(&format!("{user}.kubeconfig")))
        .output()?;
    let checks: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    checks.into_iter().find(|check| check["name"] == "API server").context("the check is made")
}

#[test]
fn the_doctor_tells_an_api_server_that_is_away_from_one_that_refuses() -> Result<()> {
    let mut control = ControlPlane::api_only()?;
    let remedy = |check: &Value| check["remedy"].as_str().unwrap_or_default().to_owned();

    let check = doctor(&control, "admin")?;
    assert_eq!(check["status"], "warn", "{check}");
    assert!(remedy(&check).contains("--node-name"), "the API has no such node yet: {check}");
    control.apply("apiVersion: v1\nkind: Node\nmetadata: {name: node-1}\n")?;
    let check = doctor(&control, "admin")?;
    assert_eq!(check["status"], "ok", "{check}");
    assert!(check["found"].to_string().contains(&control.url()), "{check}");

    // It may read pods, services and nodes, but no EndpointSlices.
    let check = doctor(&control, "scheduler")?;
    assert_eq!(check["status"], "fail", "{check}");
    assert!(check["found"].to_string().contains("endpointslices"), "{check}");
    assert!(remedy(&check).contains("ClusterRole"), "{check}");

    control.kill_apiserver()?;
    let check = doctor(&control, "admin")?;
    assert_eq!(check["status"], "fail", "{check}");
    assert!(check["found"].to_string().contains("Connection refused"), "{check}");
    assert!(remedy(&check).contains("firewall"), "{check}");
    Ok(())
}
