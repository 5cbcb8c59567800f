//! A pod is deleted on a real cluster: when do the node's map, its kube-proxy and a watcher of EndpointSlices know it?
//!
//! All three are told of the same deletions by the same API server, on the same node. The pods run on the other node: no
//! signal and no listener of theirs helps.

use std::{
    cell::RefCell, collections::BTreeMap, net::IpAddr, rc::Rc, sync::atomic::Ordering, thread::sleep, time::Duration,
};

use anyhow::{Context, Result, bail};
use dataplane_ebpf::health::{Health, State};
use dataplane_user::{
    model::Protocol,
    registry::address,
    source::kube::{
        Settings, client, cri,
        object::{EndpointSlice, Object},
        watch::{Word, follow},
    },
};
use tokio::task::LocalSet;

use super::{Plan, bpf::Pins, figure::Figure, kube::Api, rig::Rig, sample::quantile, worker::now_ns};
use crate::cluster::{
    KubeProxy, Node, Spec,
    scene::{NAMESPACE, Scene, Server, WEB},
    trouble::wait_for,
};

const REPLICAS: usize = 3;
const PORT: u16 = 8080;
/// Longer than anything that is waited for.
const PATIENCE_NS: u64 = 30_000_000_000;
/// Between two looks; one at kube-proxy's rules takes some milliseconds more.
const LOOK_AT_MAP: Duration = Duration::from_micros(20);
const LOOK_AT_RULES: Duration = Duration::from_millis(3);

/// How long after the DELETE was sent: it was answered, and each knew. Nanoseconds.
#[derive(Debug, Default)]
struct Times {
    answered: Vec<u64>,
    map: Vec<u64>,
    slice: Vec<u64>,
    proxy: Vec<u64>,
}

/// When an endpoint of the service was first told to take no new connections; none: it takes them.
type Told = Rc<RefCell<BTreeMap<IpAddr, Option<u64>>>>;

pub fn measure(_rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let spec = Spec { nodes: 2, kube_proxy: KubeProxy::Iptables, ..Spec::default() };
    let scene = Scene::with_hitless(&spec, REPLICAS, Server::Httpbin)?;
    scene.kubectl(&["patch", WEB, "-p", r#"{"spec":{"template":{"spec":{"nodeName":"node-2"}}}}"#])?;
    scene.wait_rollout(WEB)?;
    // The API server is reached from the cluster's network alone.
    let times = scene.cluster.node(1).netns.enter(|| deaths(&scene, plan.deaths))??;
    Ok(figures(&times))
}

fn deaths(scene: &Scene, count: u32) -> Result<Times> {
    let (control, node) = (&scene.cluster.control, scene.cluster.node(1));
    let settings = Settings {
        kubeconfig: Some(control.kubeconfig()),
        node: node.name.clone(),
        cri: cri::Socket::Off,
        mesh: false,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (tasks, told) = (LocalSet::new(), Told::default());
    let client = tasks.block_on(&runtime, client(&settings))?;
    let api = Api(client.clone());
    let heard = told.clone();
    tasks.spawn_local(follow::<EndpointSlice>(client, String::new(), move |word, at_ns| hear(&heard, &word, at_ns)));

    let pins = Pins::new(control.site.file("bpf").join(&node.name));
    let health = pins.health()?;
    let mut times = Times::default();
    for _ in 0..count {
        scene.wait_pods(REPLICAS)?;
        scene.wait_exact()?;
        let server = scene.servers()?.pop().context("a pod of the deployment")?;
        let address = IpAddr::V4(server.address);
        let word = health.word(pins.backend(&address::endpoint(address, PORT, Protocol::Tcp))?);
        let rule = format!("-> {address}:{PORT}\"");
        wait_for("kube-proxy's rule", || Ok(has_rule(node, &rule)?.then_some(())))?;
        let path = format!("api/v1/namespaces/{NAMESPACE}/pods/{}", server.name);

        let [sent, answered, slice, map, proxy] = std::thread::scope(|scope| -> Result<_> {
            let until = now_ns() + PATIENCE_NS;
            let map = scope.spawn(move || {
                while Health(word.load(Ordering::SeqCst)).state() == State::Ready && now_ns() < until {
                    sleep(LOOK_AT_MAP);
                }
                now_ns()
            });
            let proxy = scope.spawn(move || {
                while has_rule(node, &rule)? && now_ns() < until {
                    sleep(LOOK_AT_RULES);
                }
                anyhow::Ok(now_ns())
            });
            let [sent, answered, slice] = tasks.block_on(&runtime, async {
                let sent = now_ns();
                api.send("DELETE", &path, &serde_json::json!({})).await?;
                let answered = now_ns();
                loop {
                    if let Some(Some(slice)) = told.borrow().get(&address) {
                        return anyhow::Ok([sent, answered, *slice]);
                    }
                    if now_ns() > until {
                        bail!("no EndpointSlice said that {} ends", server.name);
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })?;
            Ok([sent, answered, slice, map.join().expect("it only looks"), proxy.join().expect("it only looks")?])
        })?;
        if [map, proxy].iter().any(|at| at - sent >= PATIENCE_NS) {
            bail!(
                "{}: {} s after its DELETE the map or kube-proxy has it still",
                server.name,
                PATIENCE_NS / 1_000_000_000
            );
        }
        for (into, at) in [
            (&mut times.answered, answered),
            (&mut times.map, map),
            (&mut times.slice, slice),
            (&mut times.proxy, proxy),
        ] {
            into.push(at.saturating_sub(sent));
        }
    }
    Ok(times)
}

/// Does a node's kube-proxy send anybody there?
fn has_rule(node: &Node, rule: &str) -> Result<bool> {
    let output = node.command("iptables-save").args(["-t", "nat"]).output().context("run iptables-save")?;
    let rules = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() || !rules.contains("KUBE-SERVICES") {
        bail!("iptables-save on {}: {rules}{}", node.name, String::from_utf8_lossy(&output.stderr));
    }
    Ok(rules.lines().any(|line| line.starts_with("-A KUBE-SVC-") && line.contains(rule)))
}

fn hear(told: &Told, word: &Word<'_, EndpointSlice>, at_ns: u64) {
    let slices: Vec<_> = match word {
        Word::Changed(slice) => vec![slice],
        Word::Page(page) => page.iter().flatten().collect(),
        _ => return,
    };
    let mut told = told.borrow_mut();
    let is_ours = |slice: &&&EndpointSlice| {
        let meta = slice.meta();
        meta.namespace == NAMESPACE && meta.labels.service.as_deref() == Some("web")
    };
    for slice in slices.iter().filter(is_ours) {
        let ready = |address: &IpAddr| {
            let of = |endpoint: &&_| -> bool { addresses(endpoint).any(|at| at == *address) };
            slice.endpoints.iter().find(of).is_some_and(|endpoint| endpoint.conditions.ready != Some(false))
        };
        for address in slice.endpoints.iter().flat_map(addresses) {
            told.entry(address).or_default();
        }
        for (address, since) in told.iter_mut() {
            *since = if ready(address) { None } else { since.or(Some(at_ns)) };
        }
    }
}

fn addresses(endpoint: &dataplane_user::source::kube::object::Endpoint) -> impl Iterator<Item = IpAddr> + '_ {
    endpoint.addresses.iter().filter_map(|address| address.parse().ok())
}

fn figures(times: &Times) -> Vec<Figure> {
    let ms = |samples: &[u64], q| quantile(samples, q) / 1e6;
    let count = times.map.len();
    let after: Vec<_> =
        times.map.iter().zip(&times.answered).map(|(map, answered)| map.saturating_sub(*answered)).collect();
    let mut figures = Vec::new();
    for (q, names) in [
        (0.5, ["death_to_map_p50", "death_to_slice_p50", "death_to_proxy_p50"]),
        (0.99, ["death_to_map_p99", "death_to_slice_p99", "death_to_proxy_p99"]),
        (1.0, ["death_to_map_max", "death_to_slice_max", "death_to_proxy_max"]),
    ] {
        let [map, slice, proxy] = [&times.map, &times.slice, &times.proxy].map(|samples| ms(samples, q));
        let [of_map, of_slice, of_proxy] = names;
        let (answered, late) = (ms(&times.answered, q), ms(&after, q));
        figures.extend([
            Figure::new(of_map, map, "ms").against(proxy).note(format!(
                "DELETE of a pod sent to a backend of it avoided, on another node of a real cluster ({count} deletions; answered \
                 after {answered:.1} ms, avoided {late:.1} ms after that); baseline: kube-proxy's rule for it is gone"
            )),
            Figure::new(of_slice, slice, "ms").against(map).note("to an EndpointSlice that says so; baseline: the map"),
            Figure::new(of_proxy, proxy, "ms").against(map).note("to kube-proxy's rule gone (iptables); baseline: the map"),
        ]);
    }
    figures
}
