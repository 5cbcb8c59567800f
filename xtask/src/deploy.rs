//! `cargo xtask deploy`: what the Helm chart renders, as plain YAML beside it; `--check`: that all of it agrees.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{helm, workspace::Workspace};

const CHART: &str = "deploy/chart/hitless";
const RENDERED: &str = "deploy/hitless.yaml";
/// The Kubernetes that is rendered for: the tests' own.
const KUBERNETES: &str = "1.34.0";
/// The oldest that the chart wants to be installed on, where a security context is written in another way.
const OLDEST: &str = "1.25.0";
const HEADER: &str = "\
# What the chart in deploy/chart/hitless renders at its defaults, for `kubectl apply --filename`.
# Written by `cargo xtask deploy` and compared by `cargo xtask check`: change the chart, not this.
";

#[derive(Args, Debug)]
pub struct Options {
    /// Write nothing: fail if the chart has a mistake, or the plain YAML is not what it renders
    #[arg(long)]
    pub check: bool,
}

pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let chart = workspace.root.join(CHART);
    versions(&read(&chart.join("Chart.yaml"))?)?;
    let silent = uncommented(&read(&chart.join("values.yaml"))?);
    if !silent.is_empty() {
        bail!("{CHART}/values.yaml: no comment says what these are: {}", silent.join(", "));
    }
    let helm = helm::helm(workspace)?;
    lint(&helm, &chart, None)?;
    for values in variants(workspace, &chart)? {
        lint(&helm, &chart, Some(&values))?;
        render(&helm, &chart, KUBERNETES, Some(&values))?;
        render(&helm, &chart, OLDEST, Some(&values))?;
    }
    let rendered = format!("{HEADER}{}", render(&helm, &chart, KUBERNETES, None)?);
    let path = workspace.root.join(RENDERED);
    if options.check {
        if fs::read_to_string(&path).unwrap_or_default() != rendered {
            bail!("{RENDERED} is not what the chart renders: run `cargo xtask deploy`");
        }
        println!("{CHART}: lints, and {RENDERED} is what it renders");
        return Ok(());
    }
    fs::write(&path, rendered).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The chart is this version's.
fn versions(chart: &str) -> Result<()> {
    for key in ["version", "appVersion"] {
        let found = chart.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
        if found != Some(env!("CARGO_PKG_VERSION")) {
            bail!("{CHART}/Chart.yaml: {key} is {found:?}, and hitless is {}", env!("CARGO_PKG_VERSION"));
        }
    }
    Ok(())
}

/// Keys that have no comment above them nor behind them. A mapping's keys speak for it, or it for the first of them.
fn uncommented(values: &str) -> Vec<String> {
    let mut silent = Vec::new();
    // Whether the line before explains the one that follows.
    let mut told = false;
    for text in values.lines().map(str::trim).filter(|text| !text.is_empty()) {
        let key = text.split_once(':').map(|(key, _)| key).filter(|key| !key.contains([' ', '#']));
        let Some(key) = key else {
            told = text.starts_with('#');
            continue;
        };
        told |= text.contains(" # ");
        let mapping = text.ends_with(':');
        if !told && !mapping && !KUBERNETES_S.contains(&key) {
            silent.push(key.to_owned());
        }
        told &= mapping;
    }
    silent
}

/// Fields that are Kubernetes' own, inside of a value that is explained.
const KUBERNETES_S: [&str; 6] =
    ["initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold", "cpu", "memory"];

/// Values besides the defaults.
fn variants(workspace: &Workspace, chart: &Path) -> Result<Vec<PathBuf>> {
    let dir = chart.join("ci");
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    if files.is_empty() {
        bail!("{} has no values to try", dir.display());
    }
    files.push(workspace.root.join("tests/kind/values.yaml"));
    Ok(files)
}

fn lint(helm: &Path, chart: &Path, values: Option<&Path>) -> Result<()> {
    let mut command = Command::new(helm);
    command.args(["lint", "--strict", "--quiet", "--kube-version", KUBERNETES]).arg(chart);
    with(&mut command, values);
    helm::output(&mut command).map(drop)
}

fn render(helm: &Path, chart: &Path, kubernetes: &str, values: Option<&Path>) -> Result<String> {
    let mut command = Command::new(helm);
    // Whoever applies plain YAML has nobody else to make the namespace.
    command.args(["template", "hitless"]).arg(chart).args([
        "--namespace",
        "hitless-system",
        "--set",
        "namespace.create=true",
        "--kube-version",
        kubernetes,
    ]);
    with(&mut command, values);
    helm::output(&mut command)
}

fn with(command: &mut Command, values: Option<&Path>) {
    if let Some(values) = values {
        command.arg("--values").arg(values);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde::Deserialize;
    use serde_json::{Value, json};

    use super::*;

    fn rendered() -> Vec<Value> {
        serde_saphyr::from_multiple(include_str!("../../deploy/hitless.yaml")).unwrap()
    }

    fn object(kind: &str) -> Value {
        let mut found: Vec<_> = rendered().into_iter().filter(|object| object["kind"] == kind).collect();
        assert_eq!(found.len(), 1, "{kind}");
        found.remove(0)
    }

    fn words(value: &Value) -> BTreeSet<String> {
        value.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_agent_may_list_and_watch_seven_resources_and_nothing_else() {
        let mut rules = BTreeSet::new();
        for rule in object("ClusterRole")["rules"].as_array().unwrap() {
            assert_eq!(words(&rule["verbs"]), ["list", "watch"].map(String::from).into(), "{rule}");
            assert_eq!(rule.as_object().unwrap().len(), 3, "{rule}");
            for group in words(&rule["apiGroups"]) {
                rules.extend(words(&rule["resources"]).into_iter().map(|resource| format!("{group}/{resource}")));
            }
        }
        let wanted = [
            "/namespaces",
            "/nodes",
            "/pods",
            "/services",
            "discovery.k8s.io/endpointslices",
            "security.istio.io/authorizationpolicies",
            "security.istio.io/peerauthentications",
        ];
        assert_eq!(rules, wanted.map(String::from).into());
        assert_eq!(
            object("ClusterRoleBinding")["subjects"][0]["name"],
            object("DaemonSet")["spec"]["template"]["spec"]["serviceAccountName"]
        );
    }

    #[test]
    fn in_an_update_one_agent_takes_over_from_another() {
        let spec = &object("DaemonSet")["spec"];
        assert_eq!(spec["updateStrategy"]["rollingUpdate"], json!({"maxUnavailable": 0, "maxSurge": 1}));
        let configuration = object("ConfigMap")["data"]["config.yaml"].as_str().unwrap().to_owned();
        assert!(configuration.contains("on-exit: keep\n"), "the kernel path must outlive the agent:\n{configuration}");
        assert!(configuration.contains("take-over: true\nwhen-replaced: stand-by\n"), "{configuration}");
        let pod = &spec["template"]["spec"];
        let container = &pod["containers"][0];
        // What the configuration names is mounted.
        for (key, mount) in [("cgroup", "/host/cgroup"), ("bpffs", "/sys/fs/bpf"), ("state-dir", "/run/hitless")] {
            assert!(configuration.contains(&format!("{key}: {mount}\n")), "{configuration}");
            let mounts = container["volumeMounts"].as_array().unwrap();
            assert!(mounts.iter().any(|found| found["mountPath"] == mount), "{mount} is not mounted");
        }
        assert_eq!((&pod["hostPID"], &pod["hostNetwork"]), (&json!(true), &json!(true)));
        // In the node's network a declared port is the node's: the scheduler would give it to one agent only.
        assert_eq!(container["ports"], Value::Null);
    }

    #[test]
    fn a_value_without_a_comment_is_found() {
        let values = "# said\na: 1\nb: 2\nc: 3 # said\n# said\nd:\n  e: 1\n  f: 2\n  # said\n  g: 3\nh:\n  i: 4\n";
        assert_eq!(uncommented(values), ["b", "f", "i"]);
    }

    /// kind.x-k8s.io/v1alpha4, as much of it as is used.
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "camelCase")]
    struct KindCluster {
        kind: String,
        api_version: String,
        name: String,
        #[serde(default, rename = "networking")]
        _networking: KindNetworking,
        nodes: Vec<KindNode>,
    }

    #[derive(Default, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
    struct KindNetworking {
        #[serde(rename = "ipFamily")]
        _ip_family: Option<KindFamily>,
        #[serde(rename = "kubeProxyMode")]
        _kube_proxy_mode: Option<KindProxy>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum KindFamily {
        Dual,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum KindProxy {
        Ipvs,
        Nftables,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct KindNode {
        role: KindRole,
    }

    #[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
    #[serde(rename_all = "kebab-case")]
    enum KindRole {
        ControlPlane,
        Worker,
    }

    /// No Docker where the tests run: kind itself never reads these here.
    #[test]
    fn kinds_clusters_are_such_and_have_two_workers() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/kind");
        for name in ["cluster.yaml", "dual-stack.yaml", "ipvs.yaml", "nftables.yaml"] {
            let text = fs::read_to_string(dir.join(name)).unwrap();
            let cluster: KindCluster = serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!((&*cluster.kind, &*cluster.api_version), ("Cluster", "kind.x-k8s.io/v1alpha4"), "{name}");
            assert_eq!(cluster.name, "hitless", "{name}: tests/kind/run names it so");
            let workers = cluster.nodes.iter().filter(|node| node.role == KindRole::Worker).count();
            assert_eq!((workers, cluster.nodes.len()), (2, 3), "{name}");
        }
    }
}
