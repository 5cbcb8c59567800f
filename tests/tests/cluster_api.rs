//! What the agent makes of the Kubernetes API: the real etcd and kube-apiserver, objects as users write them.

use std::time::{Duration, Instant};

use anyhow::Result;
use hitless_tests::cluster::{ControlPlane, api::ApiAgent};

const NAMESPACE: &str =
    "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}\n";

fn pod(name: &str, node: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  nodeName: {node}\n\
         \x20 automountServiceAccountToken: false\n  containers: [{{name: a, image: a}}]\n"
    )
}

fn service(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{ports: [{{name: http, port: 80, targetPort: web}}], {spec}}}\n"
    )
}

/// `endpoints` in YAML's flow style.
fn slice(name: &str, service: &str, endpoints: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: shop, \
         labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\n\
         endpoints: [{endpoints}]\n"
    )
}

fn endpoint(control: &ControlPlane, pod: &str, address: &str, rest: &str) -> Result<String> {
    let uid = control.kubectl(&["-n", "shop", "get", "pod", pod, "-o", "jsonpath={.metadata.uid}"])?;
    Ok(format!("{{addresses: [{address}], targetRef: {{kind: Pod, name: {pod}, namespace: shop, uid: {uid}}}{rest}}}"))
}

const A: &str = "10.1.0.1:8080 ready ready";
const B: &str = "10.1.0.2:8080 ready ready";

/// Service shop/web of pods a and b, and an agent that knows it.
fn web(control: &ControlPlane) -> Result<ApiAgent> {
    control.apply(&[NAMESPACE.to_owned(), pod("a", "node-1"), pod("b", "node-2"), service("web", "")].concat())?;
    let (a, b) = (endpoint(control, "a", "10.1.0.1", "")?, endpoint(control, "b", "10.1.0.2", "")?);
    control.apply(&slice("web-1", "web", &format!("{a}, {b}")))?;
    let agent = ApiAgent::start(control, "admin")?;
    agent.wait_backends("shop/web", &[A, B])?;
    Ok(agent)
}

/// No kubelet takes the pods away and no controller the endpoints: what is seen is the pod's own word.
#[test]
fn a_deleted_pod_leaves_at_its_deletion_and_no_late_slice_brings_it_back() -> Result<()> {
    let control = ControlPlane::api_only()?;
    let agent = web(&control)?;
    let b = endpoint(&control, "b", "10.1.0.2", "")?;
    let a = endpoint(&control, "a", "10.1.0.1", "")?;
    control.kubectl(&["-n", "shop", "delete", "pod", "b", "--wait=false"])?;
    // The slice calls it ready and serving still: a last resort, and not chosen while there is another.
    agent.wait_backends("shop/web", &[A, "10.1.0.2:8080 terminating draining"])?;
    control.kubectl(&["-n", "shop", "delete", "pod", "b", "--grace-period=0", "--force"])?;
    agent.wait_backends("shop/web", &[A])?;
    let other = "{addresses: [10.1.0.3]}";
    control.apply(&slice("web-1", "web", &format!("{a}, {b}, {other}")))?;
    agent.wait_backends("shop/web", &[A, "10.1.0.3:8080 ready ready"])?;
    // A new life of the name is not the pod that the slice speaks of.
    control.apply(&pod("b", "node-2"))?;
    control.kubectl(&["-n", "shop", "annotate", "endpointslice", "web-1", "said=again"])?;
    control.apply(&service("other", ""))?;
    agent.wait(&["status"], "service other is known", |status| status["objects"]["services"] == 3)?;
    assert_eq!(agent.backends("shop/web")?, [A, "10.1.0.3:8080 ready ready"]);
    Ok(())
}

#[test]
fn services_mean_what_kubernetes_says_they_mean() -> Result<()> {
    let control = ControlPlane::api_only()?;
    let agent = web(&control)?;
    let node =
        "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-1, labels: {topology.kubernetes.io/zone: east}}\n";
    control.apply(node)?;
    let address = r#"{"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.1"},{"type":"Hostname","address":"node-1"}]}}"#;
    control.kubectl(&["patch", "node", "node-1", "--subresource=status", "--type=merge", "-p", address])?;
    control.apply(
        &[
            service("headless", "clusterIP: None"),
            "---\napiVersion: v1\nkind: Service\nmetadata: {name: name, namespace: shop}\nspec: {type: ExternalName, externalName: x.test}\n".into(),
            service("lb", "type: LoadBalancer, clusterIP: 10.96.7.7, externalIPs: [203.0.113.1]"),
            service("sticky", "sessionAffinity: ClientIP"),
            service("local", "internalTrafficPolicy: Local"),
            service("zones", ""),
            slice("lb-1", "lb", "{addresses: [10.1.0.9]}"),
            slice("local-1", "local", "{addresses: [10.1.0.4], nodeName: node-1}, {addresses: [10.1.0.5], nodeName: node-2}"),
            slice(
                "zones-1",
                "zones",
                "{addresses: [10.1.0.6], hints: {forZones: [{name: east}]}}, {addresses: [10.1.0.7], hints: {forZones: [{name: west}]}}",
            ),
            slice("headless-1", "headless", "{addresses: [10.1.0.8]}"),
        ]
        .concat(),
    )?;
    let ingress = r#"{"status":{"loadBalancer":{"ingress":[{"ip":"203.0.113.2"}]}}}"#;
    control.kubectl(&[
        "-n",
        "shop",
        "patch",
        "service",
        "lb",
        "--subresource=status",
        "--type=merge",
        "-p",
        ingress,
    ])?;
    agent.wait_backends("shop/local", &["10.1.0.4:8080 ready ready"])?;
    agent.wait_backends("shop/zones", &["10.1.0.6:8080 ready ready"])?;
    agent.wait_backends("shop/headless", &["10.1.0.8:8080 ready ready"])?;
    let number =
        control.kubectl(&["-n", "shop", "get", "service", "lb", "-o", "jsonpath={.spec.ports[0].nodePort}"])?;
    let mut wanted =
        ["10.96.7.7:80".into(), "203.0.113.1:80".into(), "203.0.113.2:80".into(), format!("192.0.2.1:{number}")];
    wanted.sort_unstable();
    let has = |row: &serde_json::Value, wanted: &[String]| {
        let frontends = row["frontends"].as_array().into_iter().flatten();
        let mut found: Vec<_> = frontends.filter_map(|at| at.as_str().map(str::to_owned)).collect();
        found.sort_unstable();
        found == wanted
    };
    agent.wait(&["endpoints", "shop/lb"], "its four frontends", |rows| has(&rows[0], &wanted))?;
    let rows = agent.admin(&["endpoints"])?;
    let names: Vec<_> = rows.as_array().into_iter().flatten().filter_map(|row| row["service"].as_str()).collect();
    assert!(!names.iter().any(|name| name.starts_with("shop/name")), "ExternalName is DNS's: {names:?}");
    let headless = rows.as_array().into_iter().flatten().find(|row| row["service"] == "shop/headless:http");
    assert!(headless.is_none_or(|row| has(row, &[])), "headless has no address: {headless:?}");
    // Node's zone changes, live.
    control.kubectl(&["label", "node", "node-1", "topology.kubernetes.io/zone=west", "--overwrite"])?;
    agent.wait_backends("shop/zones", &["10.1.0.7:8080 ready ready"])?;
    // Two slices of one service, as the controller makes above a hundred endpoints.
    let many = |from: u16| {
        let each: Vec<_> =
            (from..from + 100).map(|n| format!("{{addresses: [10.2.{}.{}]}}", n / 200, 1 + n % 200)).collect();
        each.join(", ")
    };
    control.apply(
        &[service("many", ""), slice("many-1", "many", &many(0)), slice("many-2", "many", &many(100))].concat(),
    )?;
    agent.wait(&["endpoints", "shop/many"], "200 backends", |rows| {
        rows.as_array().is_some_and(|rows| rows.len() == 200)
    })?;
    Ok(())
}

#[test]
fn the_last_state_outlives_the_api_server_and_is_exact_when_it_is_back() -> Result<()> {
    let mut control = ControlPlane::api_only()?;
    let agent = web(&control)?;
    control.kill_apiserver()?;
    let status = agent.wait(&["status"], "the source's error", |status| status["source"]["error"].is_string())?;
    let error = status["source"]["error"].as_str().unwrap_or_default();
    assert!(error.contains("is the API server reachable"), "{error}");
    assert!(status["source"]["ageSeconds"].is_u64(), "{status:#}");
    assert_eq!(agent.backends("shop/web")?, [A, B]);

    control.start_apiserver()?;
    let started = Instant::now();
    control.kubectl(&["-n", "shop", "delete", "pod", "b", "--grace-period=0", "--force"])?;
    agent.wait_backends("shop/web", &[A])?;
    agent.wait(&["status"], "no error", |status| !status["source"]["error"].is_string())?;
    assert!(started.elapsed() < Duration::from_secs(10), "back after {:?}", started.elapsed());
    // While the agent is dead another pod goes: its successor does not keep it.
    agent.kill()?;
    control.kubectl(&["-n", "shop", "delete", "pod", "a", "--grace-period=0", "--force"])?;
    let agent = ApiAgent::start(&control, "admin")?;
    agent.wait(&["status"], "the state", |status| status["objects"]["services"] == 2)?;
    assert_eq!(agent.backends("shop/web")?, Vec::<String>::new());
    Ok(())
}

#[test]
fn what_may_not_be_read_is_named_with_the_remedy_until_it_is_granted() -> Result<()> {
    let control = ControlPlane::api_only()?;
    control.apply(
        &[NAMESPACE.to_owned(), service("web", ""), slice("web-1", "web", "{addresses: [10.1.0.1]}")].concat(),
    )?;
    // The scheduler may read pods, services and nodes, but no EndpointSlices.
    let agent = ApiAgent::start(&control, "scheduler")?;
    let status = agent.wait(&["status"], "the refusal", |status| status["source"]["error"].is_string())?;
    let error = status["source"]["error"].as_str().unwrap_or_default();
    assert!(error.contains("endpointslices") && error.contains("grant list and watch"), "{error}");
    assert_eq!(status["ready"], false);
    control.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: slices}\nrules: [{apiGroups: [discovery.k8s.io], \
         resources: [endpointslices], verbs: [list, watch]}]\n---\napiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\n\
         metadata: {name: slices}\nroleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: slices}\n\
         subjects: [{kind: User, name: \"system:kube-scheduler\"}]\n",
    )?;
    agent.wait_backends("shop/web", &[A])?;
    Ok(())
}
