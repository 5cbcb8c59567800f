//! `hitless policy`: what policy files say, and why a connection would be let in or refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;

use super::{LookArgs, Output, json, print};
use crate::{
    admin::{
        client::Client,
        protocol::{ExplainPolicyRequest, Setting},
    },
    identity::SpiffeId,
    policy::{
        Explanation, Origin, Policies, ROOT_NAMESPACE, Request, Workload,
        file::{self, Contents},
        object::{Body, Key, Kind},
    },
    source::parse,
};

/// Where no agent says another one.
const TRUST_DOMAIN: &str = "cluster.local";

#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Files (YAML of several documents, or JSON), or directories of such
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    root: Root,
    #[arg(
        short,
        long,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        help = "table for people, json for programs"
    )]
    pub(super) output: Output,
}

#[derive(Args, Debug)]
pub struct ExplainArgs {
    /// Files or directories of policies, as for `check`; without it the running agent is asked
    #[arg(long = "file", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Who connects: spiffe://<trust domain>/ns/<namespace>/sa/<service account>, namespace/service-account, or an IP
    /// address (then it is plaintext)
    #[arg(long, value_name = "WHO")]
    from: From,
    /// Where to: namespace/label=value,…:port, or namespace/pod:port (of this node, or with --state)
    #[arg(long, value_name = "WHERE")]
    to: To,
    /// The client's address, for rules that look at it
    #[arg(long, value_name = "ADDRESS")]
    source_ip: Option<IpAddr>,
    /// The pod's address, for rules that look at it
    #[arg(long, value_name = "ADDRESS")]
    destination_ip: Option<IpAddr>,
    /// Of a client that is given as namespace/service-account [default: the agent's; with --file cluster.local]
    #[arg(long, value_name = "DOMAIN")]
    trust_domain: Option<String>,
    /// A file of desired state (`hitless config dump --state`), which knows pods by name
    #[arg(long, requires = "files", value_name = "FILE")]
    state: Option<PathBuf>,
    #[command(flatten)]
    root: Root,
    #[command(flatten)]
    pub(super) look: LookArgs,
}

#[derive(Args, Debug)]
struct Root {
    /// The namespace whose policies count for the whole mesh
    #[arg(long, default_value = ROOT_NAMESPACE, value_name = "NAMESPACE")]
    root_namespace: String,
}

/// The client, as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum From {
    Identity(SpiffeId),
    Account { namespace: String, name: String },
    Plaintext(IpAddr),
}

impl FromStr for From {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        if text.starts_with("spiffe://") {
            return Ok(Self::Identity(text.parse()?));
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Plaintext(address));
        }
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self::Account { namespace: namespace.into(), name: name.into() })
            }
            _ => bail!("neither spiffe://…, nor namespace/service-account, nor an IP address"),
        }
    }
}

/// The server, as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct To {
    namespace: String,
    pod: Pod,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pod {
    Named(String),
    Labelled(BTreeMap<Arc<str>, Arc<str>>),
}

impl FromStr for To {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (pod, port) = text.rsplit_once(':').context("no :port at its end")?;
        let port = port.parse().ok().filter(|port| *port != 0).context("its port is not 1..=65535")?;
        let (namespace, pod) = pod.split_once('/').context("no namespace/ before the pod or its labels")?;
        if namespace.is_empty() {
            bail!("the namespace is empty");
        }
        let pod = if pod.is_empty() || pod.contains('=') {
            let labels = pod.split(',').filter(|label| !label.is_empty()).map(|label| {
                let (key, value) = label.split_once('=').with_context(|| format!("label {label:?} has no value"))?;
                Ok((key.into(), value.into()))
            });
            Pod::Labelled(labels.collect::<anyhow::Result<_>>()?)
        } else {
            Pod::Named(pod.into())
        };
        Ok(Self { namespace: namespace.into(), pod, port })
    }
}

/// What was found of one object.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Checked {
    /// None: not an object, but the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<String>,
    file: String,
    status: Status,
    notes: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum Status {
    Ok,
    /// In force, but not in all it says.
    Warning,
    /// Nothing of it is enforced here, and that is no mistake.
    PassedOver,
    Malformed,
}

pub fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let mut checked = Vec::new();
    let mut seen = BTreeSet::new();
    for path in &args.files {
        for path in file::files(path)? {
            let name = path.display().to_string();
            match file::read_file(&path) {
                Ok(contents) => checked.extend(check_contents(&name, contents, &args.root.root_namespace, &mut seen)),
                Err(error) => {
                    checked.push(Checked {
                        object: None,
                        file: name,
                        status: Status::Malformed,
                        notes: vec![error.to_string()],
                    });
                }
            }
        }
    }
    match args.output {
        Output::Json => json(&checked)?,
        Output::Table => print(&text(&checked))?,
    }
    let bad = checked.iter().any(|one| one.status == Status::Malformed);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// `seen`: what the files before had.
fn check_contents(file: &str, contents: Contents, root: &str, seen: &mut BTreeSet<Key>) -> Vec<Checked> {
    let mut found = Vec::new();
    let mut add = |object: Option<String>, status, notes| {
        found.push(Checked { object, file: file.to_owned(), status, notes });
    };
    for object in contents.objects {
        let name = object.key.to_string();
        if !seen.insert(object.key.clone()) {
            add(Some(name), Status::Malformed, vec!["is given twice: the first counts".into()]);
            continue;
        }
        let skipped = matches!(object.body, Body::Skipped(_));
        let outcome = Policies::new(root).upsert(Origin::File, object);
        let status = match (outcome.problems.is_empty(), outcome.warnings.is_empty()) {
            (false, _) => Status::Malformed,
            (true, _) if skipped => Status::PassedOver,
            (true, false) => Status::Warning,
            (true, true) => Status::Ok,
        };
        let notes = outcome.problems.into_iter().chain(outcome.warnings).map(|problem| problem.reason);
        add(Some(name), status, notes.collect());
    }
    for reason in contents.unnamed {
        add(None, Status::Malformed, vec![reason]);
    }
    for kind in contents.passed_over {
        add(Some(kind), Status::PassedOver, vec!["is no policy".into()]);
    }
    found
}

fn text(checked: &[Checked]) -> String {
    let mut out = String::new();
    for one in checked {
        let mark = match one.status {
            Status::Ok => "ok  ",
            Status::Warning => "WARN",
            Status::PassedOver => "-   ",
            Status::Malformed => "FAIL",
        };
        // Writing to a String cannot fail.
        let _ = match &one.object {
            Some(object) => writeln!(out, "{mark}  {object}  ({})", one.file),
            None => writeln!(out, "{mark}  {}", one.file),
        };
        for note in &one.notes {
            let _ = writeln!(out, "      {note}");
        }
    }
    if checked.is_empty() {
        out.push_str("no policies\n");
    }
    out
}

pub fn explain(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    if args.files.is_empty() {
        return ask(args);
    }
    let explanation = answer(args)?;
    match args.look.output {
        Output::Json => json(&explanation)?,
        Output::Table => print(&explanation.to_string())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// By the policies that a running agent has in force.
fn ask(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let mut client = Client::connect(&args.look.socket()?)?;
    let (identity, plaintext) = match &args.from {
        From::Identity(id) => (Some(id.to_string()), None),
        From::Account { namespace, name } => {
            let trust_domain = match &args.trust_domain {
                Some(domain) => domain.clone(),
                None => trust_domain(&client.config()?)?,
            };
            (Some(SpiffeId::new(&trust_domain, namespace, name)?.to_string()), None)
        }
        From::Plaintext(address) => (None, Some(*address)),
    };
    let (pod, labels) = match &args.to.pod {
        Pod::Named(name) => (Some(name.clone()), BTreeMap::new()),
        Pod::Labelled(labels) => {
            (None, labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect())
        }
    };
    let explanation = client.explain(ExplainPolicyRequest {
        identity,
        source_ip: args.source_ip.or(plaintext).map(|address| address.to_string()),
        namespace: args.to.namespace.clone(),
        pod,
        labels,
        destination_ip: args.destination_ip.map(|address| address.to_string()),
        port: args.to.port.into(),
    })?;
    match args.look.output {
        Output::Json => json(&serde_json::from_str::<serde_json::Value>(&explanation.json)?)?,
        Output::Table => print(&explanation.text)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn trust_domain(settings: &[Setting]) -> anyhow::Result<String> {
    let setting = settings.iter().find(|setting| setting.key == "trust-domain");
    let value = setting.and_then(|setting| serde_json::from_str::<Option<String>>(&setting.value).ok()?);
    value.context("the agent does not say its trust domain: give --trust-domain")
}

fn answer(args: &ExplainArgs) -> anyhow::Result<Explanation> {
    let policies = read(&args.files, &args.root.root_namespace)?;
    let (workload, address) = workload(&args.to, args.state.as_deref())?;
    let (source, plaintext) = match &args.from {
        From::Identity(id) => (Some(id.clone()), None),
        From::Account { namespace, name } => {
            (Some(SpiffeId::new(args.trust_domain.as_deref().unwrap_or(TRUST_DOMAIN), namespace, name)?), None)
        }
        From::Plaintext(address) => (None, Some(*address)),
    };
    let unknown = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let request = Request {
        source_ip: args.source_ip.or(plaintext).unwrap_or(unknown),
        source: source.as_ref(),
        destination_ip: args.destination_ip.or(address).unwrap_or(unknown),
        destination_port: args.to.port,
    };
    Ok(policies.snapshot().explain(&workload, &request))
}

/// The policies of files; what is malformed is told on stderr and enforced as the agent would.
fn read(files: &[PathBuf], root_namespace: &str) -> anyhow::Result<Policies> {
    let mut policies = Policies::new(root_namespace);
    let mut objects = Vec::new();
    for path in files {
        for path in file::files(path)? {
            let contents = file::read_file(&path)?;
            contents.unnamed.iter().for_each(|reason| eprintln!("hitless: {}: {reason}", path.display()));
            objects.extend(contents.objects);
        }
    }
    let outcome = policies.sync(Origin::File, &[Kind::AuthorizationPolicy, Kind::PeerAuthentication], objects);
    outcome.problems.iter().chain(&outcome.warnings).for_each(|problem| eprintln!("hitless: {problem}"));
    Ok(policies)
}

/// The workload that is meant, and its address when it is known.
fn workload(to: &To, state: Option<&std::path::Path>) -> anyhow::Result<(Workload, Option<IpAddr>)> {
    let of = |name: String, labels| Workload {
        name: name.into(),
        namespace: to.namespace.as_str().into(),
        labels,
        policies: Vec::new(),
    };
    let name = match &to.pod {
        Pod::Labelled(labels) => return Ok((of(format!("{}/(by labels)", to.namespace), labels.clone()), None)),
        Pod::Named(pod) => format!("{}/{pod}", to.namespace),
    };
    let Some(path) = state else {
        bail!(
            "pod {name}: pods are known by name with --state FILE only; or give its labels: {}/app=web:{}",
            to.namespace,
            to.port
        );
    };
    let text = std::fs::read_to_string(path).with_context(|| format!("file {}", path.display()))?;
    let state = parse::snapshot(path, &text).with_context(|| format!("file {}", path.display()))?;
    let pod = state.pods.into_iter().find(|pod| *pod.name == *name);
    let pod = pod.with_context(|| format!("pod {name} is not in {}", path.display()))?;
    Ok((of(name, pod.labels), pod.addresses.first().copied()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::policy::Reason;

    #[test]
    fn clients_and_servers_are_read_as_people_write_them() {
        let from = |text: &str| text.parse::<From>();
        assert!(matches!(from("spiffe://d/ns/a/sa/b"), Ok(From::Identity(_))));
        assert!(matches!(from("shop/web"), Ok(From::Account { .. })));
        assert!(matches!(from("fd00::1"), Ok(From::Plaintext(_))));
        for bad in ["web", "a/b/c", "/b", "spiffe://d", ""] {
            assert!(from(bad).is_err(), "{bad:?}");
        }
        let to = |text: &str| text.parse::<To>();
        let labels = BTreeMap::from([("app.kubernetes.io/name".into(), "db".into()), ("v".into(), "1".into())]);
        assert_eq!(to("shop/app.kubernetes.io/name=db,v=1:80").unwrap().pod, Pod::Labelled(labels));
        assert_eq!(to("shop/:80").unwrap().pod, Pod::Labelled(BTreeMap::new()));
        assert_eq!(
            to("shop/db-0:80").unwrap(),
            To { namespace: "shop".into(), pod: Pod::Named("db-0".into()), port: 80 }
        );
        for bad in ["shop/db-0", "shop/db-0:0", "shop/db-0:65536", "db-0:80", "/db-0:80", ""] {
            assert!(to(bad).is_err(), "{bad:?}");
        }
    }

    const POLICIES: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: db, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  rules: [{from: [{source: {serviceAccounts: [web]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: http, namespace: shop}
spec: {action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['9000']}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bad, namespace: elsewhere}
spec: {rules: [{from: [{source: {ipBlocks: [10.0.0.0/40]}}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: db}
";

    #[test]
    fn files_are_checked_object_by_object() {
        let contents = file::contents(POLICIES).unwrap();
        let checked = check_contents("p.yaml", contents, ROOT_NAMESPACE, &mut BTreeSet::new());
        let status: Vec<_> = checked.iter().map(|one| one.status).collect();
        assert_eq!(status, [Status::Ok, Status::Warning, Status::Malformed, Status::PassedOver], "{checked:?}");
        let text = text(&checked);
        for line in ["ok    AuthorizationPolicy shop/db  (p.yaml)", "FAIL  AuthorizationPolicy elsewhere/bad  (p.yaml)"]
        {
            assert!(text.lines().any(|found| found == line), "{line:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_connection_is_explained_from_files_alone() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: ExplainArgs,
        }
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("p.yaml"), POLICIES).unwrap();
        let state = directory.path().join("state.json");
        fs::write(&state, r#"{"pods": [{"name": "shop/db-0", "labels": {"app": "db"}, "addresses": ["10.9.0.1"]}]}"#)
            .unwrap();
        let policies = directory.path().join("p.yaml");
        let ask = |more: &[&str]| {
            let base = ["x", "--file", policies.to_str().unwrap()];
            let line = <Line as clap::Parser>::try_parse_from(base.iter().chain(more)).unwrap();
            answer(&line.args)
        };
        let reason = |from: &str, to: &str| ask(&["--from", from, "--to", to]).unwrap().reason;
        assert_eq!(reason("shop/web", "shop/app=db:5432"), Reason::Allowed);
        assert_eq!(reason("spiffe://cluster.local/ns/shop/sa/web", "shop/app=db:9000"), Reason::Denied);
        assert_eq!(reason("shop/job", "shop/app=db:5432"), Reason::NotAllowed);
        assert_eq!(reason("10.0.0.1", "shop/:5432"), Reason::Default);
        let state = state.to_str().unwrap();
        let named = ask(&["--from", "shop/job", "--to", "shop/db-0:5432", "--state", state]).unwrap();
        assert_eq!(named.reason, Reason::NotAllowed);
        let error = ask(&["--from", "shop/job", "--to", "shop/db-0:5432"]).unwrap_err();
        assert!(error.to_string().contains("--state"), "{error}");
    }
}
