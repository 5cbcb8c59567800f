//! Istio's own parts: a real istiod signs for the pods of each node, and a real istioctl reads what the agents print.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use dataplane_user::identity::{
    Authority as _, SpiffeId,
    istio::{Istio as Authority, IstioConfig, IstioPlaces},
};
use hitless_tests::{
    cluster::{
        Spec,
        agent::{self, Agent},
        istio::{self, AUDIENCE, CLUSTER_ID, Istio},
        load::{Amount, Outcome},
        node::PAUSE,
        parts,
        rolled::REPLICAS,
        scene::{CLIENTS, NAMESPACE, Scene, Server},
        trouble::wait_for,
    },
    lab::mesh::TRUST_DOMAIN,
};
use k8s_openapi::ByteString;
use serde_json::Value;

/// Of istiod's certificates: renewed at half of it.
const LIFE: Duration = Duration::from_secs(90);
/// Answers late enough that connections are open whenever one looks.
const SLOW: &str = "/delay/0.3";
/// The account of every pod but one.
const WEB: &str = "default";
/// Of the pod that is on node-2.
const VAULT: &str = "vault";

fn id(account: &str) -> SpiffeId {
    SpiffeId::new(TRUST_DOMAIN, NAMESPACE, account).expect("an identity")
}

/// What `hitless certificates` says of an identity.
fn certificate(agent: &Agent, account: &str) -> Result<Value> {
    let rows = agent.admin(&["certificates"])?;
    let row = rows.as_array().into_iter().flatten().find(|row| row["identity"] == id(account).as_str());
    row.cloned().with_context(|| format!("no certificate of {account} in {rows}"))
}

/// Waits until it is as wanted. All the while it must be a valid one.
fn until(agent: &Agent, account: &str, what: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    let found = wait_for(what, || {
        last = certificate(agent, account)?;
        assert!(["valid", "failing"].contains(&last["state"].as_str().unwrap_or_default()), "{what}: {last}");
        Ok(is(&last).then(|| last.clone()))
    });
    found.with_context(|| format!("the certificate of {account} on node-{}", agent.node))
}

fn error(row: &Value) -> &str {
    row["lastError"].as_str().unwrap_or_default()
}

/// Pods on both nodes, an istiod, and agents that have their certificates from it.
fn scene() -> Result<(Scene, Istio, BTreeMap<usize, IstioPlaces>)> {
    let mut scene = Scene::new(&Spec::default(), REPLICAS, Server::Httpbin)?;
    scene.spread()?;
    scene.cluster.apply(&format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {VAULT}, namespace: {NAMESPACE}}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: {VAULT}, namespace: {NAMESPACE}}}\n\
         spec: {{nodeName: node-2, serviceAccountName: {VAULT}, terminationGracePeriodSeconds: 1, \
         containers: [{{name: vault, image: {PAUSE}, imagePullPolicy: Never}}]}}\n"
    ))?;
    scene.kubectl(&["wait", "--for=condition=Ready", "pod", VAULT, "--timeout=60s"])?;
    let istio = Istio::install(&scene.cluster, LIFE)?;
    agent::permit(&scene.cluster)?;
    let mut places = BTreeMap::new();
    let identity = format!("istio:{}", istio.address());
    for node in scene.cluster.nodes() {
        let of_node = istio.places(&scene.cluster, &node.name)?;
        let (root, token) = (of_node.root.display().to_string(), of_node.token.display().to_string());
        let mesh =
            ["--mtls", "on", "--trust-domain", TRUST_DOMAIN, "--identity", &identity, "--cluster-id", CLUSTER_ID];
        let files = ["--istio-ca-root", &root, "--istio-token", &token];
        scene.agents.push(Agent::start(node, &[&mesh[..], &files].concat()).with_context(|| istio.log())?);
        places.insert(node.index, of_node);
    }
    for server in scene.servers()? {
        scene.agents[server.node - 1].wait_enrolled(&format!("{NAMESPACE}/{}", server.name))?;
    }
    Ok((scene, istio, places))
}

/// What the agents hold leads to this root, by the word of openssl, and is for the accounts of their own pods alone.
fn certificates_lead_to(scene: &Scene, root: &Path) -> Result<()> {
    for (agent, accounts) in scene.agents.iter().zip([vec![WEB], vec![WEB, VAULT]]) {
        let dump = agent.admin(&["config", "dump", "--ztunnel"])?;
        let held = dump["certificates"].as_array().context("no certificates in the dump")?;
        let wanted: Vec<_> = accounts.iter().map(|account| id(account).to_string()).collect();
        assert_eq!(held.iter().map(|one| one["identity"].as_str().unwrap_or_default()).collect::<Vec<_>>(), wanted);
        for (one, identity) in held.iter().zip(&wanted) {
            let mut chain = Vec::new();
            for certificate in one["certChain"].as_array().context("no chain in the dump")? {
                let pem: ByteString = serde_json::from_value(certificate["pem"].clone())?;
                chain.extend(pem.0);
            }
            // The first one is what is verified; all are intermediates that may be used for it.
            let file = scene.cluster.dir().join("chain.pem");
            fs::write(&file, chain)?;
            let (ca, intermediates) = (root.display().to_string(), file.display().to_string());
            let openssl = |args: &[&str]| parts::output(std::process::Command::new("openssl").args(args).arg(&file));
            assert!(openssl(&["verify", "-x509_strict", "-CAfile", &ca, "-untrusted", &intermediates])?.contains("OK"));
            let text = openssl(&["x509", "-noout", "-text", "-in"])?;
            assert!(text.contains(&format!("URI:{identity}\n")), "{text}");
        }
    }
    Ok(())
}

/// What istiod says to a request, as the agent tells it.
fn ask(scene: &Scene, istio: &Istio, places: &IstioPlaces, account: &str) -> Result<Result<(), String>> {
    let authority = Authority::new(IstioConfig::new(&istio.address(), places));
    scene.cluster.control.netns.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(authority.issue(&id(account))).map(drop).map_err(|error| error.to_string()))
    })?
}

fn refusals_name_the_remedy(scene: &Scene, istio: &Istio, places: &BTreeMap<usize, IstioPlaces>) -> Result<()> {
    let file = scene.cluster.dir().join("another.istio-token");
    let with = |token: String| -> Result<IstioPlaces> {
        fs::write(&file, token)?;
        Ok(IstioPlaces { token: file.clone(), ..places[&1].clone() })
    };
    let refused = |places: &IstioPlaces, account: &str, remedy: &str| -> Result<()> {
        let error = ask(scene, istio, places, account)?.expect_err("istiod signs what it must not");
        eprintln!("{error}");
        assert!(error.contains(id(account).as_str()) && error.contains(remedy), "{error}");
        Ok(())
    };
    assert_eq!(ask(scene, istio, &places[&2], VAULT)?, Ok(()));
    let not_here = "does a pod of that identity run here?";
    refused(&places[&1], VAULT, not_here)?;
    assert!(istio.said(&format!("impersonation failed for identity {}, error: no instances of", id(VAULT)))?);
    refused(&places[&2], "nobody", not_here)?;
    let stranger = with(istio::token(&scene.cluster, NAMESPACE, VAULT, VAULT, AUDIENCE)?)?;
    refused(&stranger, WEB, "CA_TRUSTED_NODE_ACCOUNTS")?;
    let elsewhere = IstioPlaces { cluster_id: "east".into(), ..places[&1].clone() };
    refused(&elsewhere, WEB, "is --cluster-id istiod's name of this cluster?")?;
    let other = with(istio.agent_token(&scene.cluster, "node-1", "somebody-else")?)?;
    refused(&other, WEB, "is its audience istio-ca")
}

/// Its tables, of the agents' dumps.
fn istioctl_reads_the_dumps(scene: &Scene, istio: &Istio, client: &str) -> Result<()> {
    scene.cluster.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: nobody, namespace: {NAMESPACE}}}\n\
         spec: {{action: DENY, rules: [{{from: [{{source: {{principals: [\"{TRUST_DOMAIN}/ns/nowhere/sa/nobody\"]}}}}]}}]}}\n"
    ))?;
    for agent in &scene.agents {
        wait_for("the policy", || Ok((agent.admin(&["policies"])?[0]["inForce"] == true).then_some(())))?;
    }
    let dump = |agent: &Agent| -> Result<String> {
        let file = scene.cluster.dir().join(format!("node-{}.dump.json", agent.node));
        fs::write(&file, agent.admin(&["config", "dump", "--ztunnel"])?.to_string())?;
        Ok(file.display().to_string())
    };
    let ctl = |of: &str, file: &str, more: &[&str]| {
        istio.ctl(&scene.cluster, &[&["ztunnel-config", of, "--file", file], more].concat())
    };
    // The words of a line, one after the other.
    let has = |table: &str, row: &[&str]| {
        let found = table.lines().any(|line| line.split_whitespace().collect::<Vec<_>>().starts_with(row));
        assert!(found, "no row {row:?} in\n{table}");
    };
    let agent = scene.client_agent()?;
    let file = dump(agent)?;
    let all = ctl("all", &file, &["--with-headers"])?;
    eprintln!("{all}");
    for server in scene.servers()? {
        // Where pods of other nodes run an agent need not know.
        let place: &[&str] = if server.node == 1 { &["node-1", "None", "HBONE"] } else { &["None", "HBONE"] };
        let address = scene.kubectl(&["get", "pod", &server.name, "-o", "jsonpath={.status.podIPs[*].ip}"])?;
        let address = address.replace(' ', ",");
        let row = [&[NAMESPACE, &server.name, &address], place].concat();
        has(&ctl("workload", &file, &["--workload-namespace", NAMESPACE])?, &row);
        has(&all, &row);
    }
    has(&ctl("service", &file, &[])?, &[NAMESPACE, "web", &scene.vip, "None", &format!("{REPLICAS}/{REPLICAS}")]);
    has(&ctl("policy", &file, &[])?, &[NAMESPACE, "nobody", "Deny", "Namespace"]);
    let certificates = ctl("certificate", &file, &[])?;
    for kind in ["Leaf", "Root"] {
        has(&certificates, &[id(WEB).as_str(), kind, "Available", "true"]);
    }
    let workloads: Vec<Value> = serde_json::from_str(&ctl("workload", &file, &["-o", "json"])?)?;
    assert!(workloads.len() > REPLICAS && workloads.iter().all(|one| one["clusterId"] == CLUSTER_ID), "{workloads:?}");
    for of in ["service", "policy", "certificate", "connections", "all"] {
        serde_json::from_str::<Value>(&ctl(of, &file, &["-o", "json"])?).with_context(|| format!("{of} as JSON"))?;
    }

    // Connections come and go.
    let row = |table: &str, direction: &str, with: &[&str]| {
        let is = |line: &&str| line.contains(direction) && with.iter().all(|word| line.contains(word));
        table.lines().find(is).map(str::to_owned)
    };
    let (from, web) = (format!("{client}.{NAMESPACE}"), format!("web.{NAMESPACE}.svc.cluster.local:80"));
    let outbound = wait_for("a connection out of the client's pod", || {
        Ok(row(&ctl("connections", &dump(agent)?, &[])?, "Outbound", &[&from, &web, "HBONE"]))
    })?;
    let inbound = wait_for("a connection into a server's pod", || {
        Ok(row(&ctl("connections", &dump(&scene.agents[1])?, &[])?, "Inbound", &[&from, ":8080", "HBONE"]))
    })?;
    eprintln!("{outbound}\n{inbound}");
    Ok(())
}

/// A token of another node is not taken for what does not run there; the right one is again.
fn another_nodes_token(scene: &Scene, istio: &Istio, places: &BTreeMap<usize, IstioPlaces>) -> Result<()> {
    let agent = &scene.agents[1];
    let before = certificate(agent, VAULT)?;
    let own = fs::read_to_string(&places[&2].token)?;
    fs::write(&places[&2].token, istio.agent_token(&scene.cluster, "node-1", AUDIENCE)?)?;
    let failing = until(agent, VAULT, "istiod refuses the token of another node", |row| row["state"] == "failing")?;
    eprintln!("{}", error(&failing));
    assert_eq!(failing["serial"], before["serial"], "the last good one stays");
    assert!(error(&failing).contains("is the token this node's"), "{failing}");
    fs::write(&places[&2].token, own)?;
    until(agent, VAULT, "it is renewed again", |row| row["state"] == "valid" && row["serial"] != before["serial"])?;
    Ok(())
}

fn an_absence(scene: &Scene, istio: &mut Istio) -> Result<()> {
    istio.stop()?;
    let mut kept = Vec::new();
    for agent in &scene.agents {
        let failing = until(agent, WEB, "istiod is missed", |row| row["state"] == "failing")?;
        eprintln!("{}", error(&failing));
        assert!(error(&failing).contains("is istiod running"), "{failing}");
        kept.push(failing);
    }
    for (agent, before) in scene.agents.iter().zip(&kept) {
        assert_eq!(certificate(agent, WEB)?["serial"], before["serial"], "the last good one stays");
    }
    istio.start(&scene.cluster)?;
    for (agent, before) in scene.agents.iter().zip(&kept) {
        until(agent, WEB, "it is renewed again", |row| row["state"] == "valid" && row["serial"] != before["serial"])?;
    }
    Ok(())
}

/// As Istio's documentation has it: first everybody is told the new root too, then an authority under it signs.
fn another_root(scene: &Scene, istio: &mut Istio, places: &IstioPlaces) -> Result<()> {
    let (old, new) = (istio.own_authority(&scene.cluster)?, istio.new_authority(&scene.cluster)?);
    let root = new.chain.strip_prefix(&*new.certificate).context("a chain begins with its certificate")?;
    let roots = format!("{}{root}", old.certificate);
    let held = [(&scene.agents[0], WEB), (&scene.agents[1], WEB), (&scene.agents[1], VAULT)];
    for authority in [&old, &new] {
        let serial = |(agent, account)| Ok(certificate(agent, account)?["serial"].clone());
        let before: Vec<_> = held.into_iter().map(serial).collect::<Result<_>>()?;
        istio.plug(&scene.cluster, authority, &roots)?;
        istio.project_root(&scene.cluster, places, root.trim())?;
        for ((agent, account), before) in held.into_iter().zip(&before) {
            let row = until(agent, account, "the authority signs", |row| row["serial"] != *before)?;
            assert_eq!((&row["roots"], &row["state"]), (&2.into(), &"valid".into()), "{row}");
        }
    }
    let file = scene.cluster.dir().join("new-root.pem");
    fs::write(&file, root)?;
    certificates_lead_to(scene, &file)
}

#[test]
fn istiod_signs_for_each_nodes_pods_and_nothing_is_lost_while_it_rotates_refuses_and_is_gone() -> Result<()> {
    let (scene, mut istio, places) = scene()?;
    certificates_lead_to(&scene, &places[&1].root)?;
    // The day that agents ask for is more than it gives.
    assert!(istio.said("is greater than the max allowed TTL")?, "{}", istio.log());
    let first = certificate(&scene.agents[0], WEB)?;
    let url = format!("http://{}{SLOW}", scene.vip);
    let load = scene.ask("load", &url, Amount::Rate { qps: 20, clients: CLIENTS })?;
    refusals_name_the_remedy(&scene, &istio, &places)?;
    istioctl_reads_the_dumps(&scene, &istio, "load")?;
    until(&scene.agents[0], WEB, "it is renewed at half of its life", |row| row["serial"] != first["serial"])?;
    another_nodes_token(&scene, &istio, &places)?;
    an_absence(&scene, &mut istio)?;
    another_root(&scene, &mut istio, &places[&1])?;
    let took = load.elapsed();
    let outcome: Outcome = load.stop(&scene.cluster)?;
    let [tunnelled, failed, plaintext] =
        ["outbound_tunnelled", "outbound_failed", "outbound_plaintext"].map(|name| scene.tunnel(name));
    let (tunnelled, failed, plaintext) = (tunnelled?, failed?, plaintext?);
    eprintln!("{took:.1?}: {tunnelled} tunnelled, {failed} failed, {plaintext} in the clear: {outcome:?}");
    assert_eq!((outcome.failed, failed, plaintext), (0, 0, 0), "{outcome:?}");
    assert!(tunnelled > 100, "hardly anything went between the nodes");
    Ok(())
}
