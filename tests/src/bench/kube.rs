//! The agent on a real API server: 10,000 services, 100,000 endpoints and as many pods listed, pods deleted, pods coming
//! and going.
//!
//! Objects are written straight to the API, the many pods straight to etcd, where that would take minutes; there are no
//! controllers and no kubelets whose time would be measured too.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, TcpStream},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dataplane_ebpf::health::{Health, State};
use dataplane_user::{
    model::Protocol,
    registry::address,
    source::kube::{Settings, client, cri},
};
use futures_util::{StreamExt, TryStreamExt, stream};
use http_body_util::{BodyExt, Full};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use k8s_openapi::ByteString;
use kube::Client;
use serde_json::{Value, json};

use super::{
    Plan,
    bpf::Pins,
    figure::{Figure, Goal},
    rig::Rig,
    sample::quantile,
    scale::{BACKENDS as ENDPOINTS, BIG, SERVICES, Usage},
    worker::now_ns,
};
use crate::cluster::{ControlPlane, ControlSpec, api::ApiAgent};

const PER_SLICE: u32 = 100;
/// Requests to the API server at a time.
const AT_ONCE: usize = 16;
const PORT: u16 = 8080;

pub fn measure(_rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    // In a cluster etcd and the API server are on another machine: here the agent does not wait for them.
    let control = ControlPlane::api_only_with(ControlSpec { nicer: 20, ..ControlSpec::default() })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let settings =
        Settings { kubeconfig: Some(control.kubeconfig()), node: "node-1".into(), cri: cri::Socket::Off, mesh: false };
    let api = runtime.block_on(async { client(&settings).await.map(Api) })?;
    let filling = Instant::now();
    runtime.block_on(fill(&api)).context("fill the API server")?;
    runtime.block_on(fill_pods(control.etcd_address())).context("fill etcd")?;
    eprintln!(
        "bench: {SERVICES} services, {ENDPOINTS} endpoints and their pods written in {:.0} s",
        filling.elapsed().as_secs_f64()
    );

    let metrics = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let started = Instant::now();
    let agent = ApiAgent::start_with(&control, "admin", &metrics.to_string())?;
    agent.wait_within(Duration::from_secs(120), &["status"], "all endpoints", |status| {
        status["objects"]["backends"].as_u64() >= Some(u64::from(ENDPOINTS))
    })?;
    let first = started.elapsed();
    let filled = Usage::of_process(agent.process())?;
    let mut figures = vec![
        Figure::new("kube_first_sync", first.as_secs_f64(), "s").against(filled.cpu.as_secs_f64()).note(format!(
            "agent started to {SERVICES} services, {ENDPOINTS} endpoints and a pod for each of a real API server in force, its \
             lists included; baseline: the agent's CPU time for it"
        )),
    ];
    figures.extend(deletions(&runtime, &api, &agent, &control, metrics, plan)?);
    figures.extend(churn(&runtime, &api, &agent, &control, metrics, plan)?);
    let usage = Usage::of_process(agent.process())?;
    figures.push(
        Figure::new("kube_rss", usage.rss_mb, "MB")
            .goal(Goal::ValueAtMost(100.0))
            .note(format!(
                "VmRSS of the agent with {SERVICES} services, {ENDPOINTS} endpoints and as many pods, after the changes (peak {:.0} \
                 MB, {:.0} MB at first)",
                usage.peak_mb, filled.rss_mb
            )),
    );
    agent.kill()?;
    Ok(figures)
}

/// Pods of another node are deleted one by one; each is an endpoint of one service.
fn deletions(
    runtime: &tokio::runtime::Runtime,
    api: &Api,
    agent: &ApiAgent,
    control: &ControlPlane,
    metrics: std::net::SocketAddr,
    plan: &Plan,
) -> Result<Vec<Figure>> {
    let pods = plan.kube_deletions;
    let at = |n: u32| IpAddr::from([13, 0, (n / 250) as u8, 1 + (n % 250) as u8]);
    runtime.block_on(async {
        api.create("api/v1/namespaces/default/services", service("deleted")).await?;
        let uids: Vec<String> = stream::iter(0..pods)
            .map(|n| api.create_pod(format!("deleted-{n}")))
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        for from in (0..pods).step_by(PER_SLICE as usize) {
            let endpoints = (from..pods.min(from + PER_SLICE)).map(|n| {
                json!({"addresses": [at(n)], "targetRef": {
                    "kind": "Pod", "name": format!("deleted-{n}"), "namespace": "default", "uid": uids[n as usize]}})
            });
            api.create_slice(&format!("deleted-{from}"), "deleted", endpoints.collect()).await?;
        }
        anyhow::Ok(())
    })?;
    let pins = Pins::new(control.site.file("bpf").join("api"));
    let health = pins.health()?;
    let endpoint = |n| address::endpoint(at(n), PORT, Protocol::Tcp);
    let deadline = Instant::now() + Duration::from_secs(20);
    while (0..pods).any(|n| pins.backend(&endpoint(n)).is_err()) {
        if Instant::now() > deadline {
            bail!("the pods' endpoints are not in force after 20 s: {}", agent.log());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let before = Lags::read(metrics)?;
    let (mut from_request, mut from_answer) = (Vec::new(), Vec::new());
    for n in 0..pods {
        std::thread::sleep(Duration::from_millis(5));
        let word = health.word(pins.backend(&endpoint(n))?);
        let [sent, answered, changed] = std::thread::scope(|scope| -> Result<[u64; 3]> {
            let watcher = scope.spawn(|| {
                let until = now_ns() + 5_000_000_000;
                while Health(word.load(Ordering::SeqCst)).state() == State::Ready && now_ns() < until {
                    // Not spinning: the API server needs the CPU.
                    std::thread::sleep(Duration::from_micros(20));
                }
                now_ns()
            });
            let sent = now_ns();
            runtime.block_on(api.delete_pod(&format!("deleted-{n}"), 30))?;
            Ok([sent, now_ns(), watcher.join().expect("it only looks")])
        })?;
        from_request.push(changed.saturating_sub(sent));
        from_answer.push(changed.saturating_sub(answered));
    }
    let lags = Lags::read(metrics)?.since(&before);
    let us = |samples: &[u64], q| quantile(samples, q) / 1000.0;
    Ok(vec![
        Figure::new("kube_event_to_map_p50", lags.quantile_us(0.5), "us").goal(Goal::ValueAtMost(20.0)).note(
            "a pod's deletion: last byte of the watch event read to the health word changed, as the agent times it (interpolated in its histogram)",
        ),
        Figure::new("kube_event_to_map_p99", lags.quantile_us(0.99), "us").goal(Goal::ValueAtMost(100.0)).note("the same, p99"),
        Figure::new("kube_delete_to_map_p50", us(&from_request, 0.5), "us")
            .note("DELETE sent to the API server to the health word changed, seen from outside"),
        Figure::new("kube_delete_to_map_p99", us(&from_request, 0.99), "us").note("the same, p99"),
        Figure::new("kube_deleted_to_map_p50", us(&from_answer, 0.5), "us")
            .note("DELETE answered to the health word changed; 0: the map was changed before the answer was read"),
    ])
}

/// Pods come and go as fast as the API server takes it.
fn churn(
    runtime: &tokio::runtime::Runtime,
    api: &Api,
    agent: &ApiAgent,
    control: &ControlPlane,
    metrics: std::net::SocketAddr,
    plan: &Plan,
) -> Result<Vec<Figure>> {
    let others = || -> Result<Vec<_>> {
        let all = control.processes().map(|(name, process)| (name, process.pid()));
        all.chain([("this bench", std::process::id().cast_signed())])
            .map(|(name, pid)| Ok((name, Usage::of_pid(pid)?.cpu)))
            .collect()
    };
    let (before, start) = (others()?, Instant::now());
    let (lags, usage) = (Lags::read(metrics)?, Usage::of_process(agent.process())?);
    let changes = runtime.block_on(async {
        let ends = start + plan.churn;
        let workers = (0..AT_ONCE).map(|worker| async move {
            let mut changes = 0_u64;
            for n in 0.. {
                if Instant::now() > ends {
                    break;
                }
                let name = format!("churn-{worker}-{n}");
                api.create_pod(name.clone()).await?;
                api.delete_pod(&name, 0).await?;
                changes += 2;
            }
            anyhow::Ok(changes)
        });
        futures_util::future::try_join_all(workers).await
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let rate = changes.iter().sum::<u64>() as f64 / seconds;
    let lags = Lags::read(metrics)?.since(&lags);
    let cpu = (Usage::of_process(agent.process())?.cpu - usage.cpu).as_secs_f64() / seconds;
    let others = others()?.into_iter().zip(before).map(|((name, now), (_, then))| {
        let percent = (now - then).as_secs_f64() / seconds * 100.0;
        format!("{name} {percent:.0} %")
    });
    let others = others.collect::<Vec<_>>().join(", ");
    Ok(vec![
        Figure::new("kube_churn_lag_p99", lags.quantile_us(0.99), "us").note(format!(
            "event read to map changed at {rate:.0} pod changes/s, what this machine's API server takes"
        )),
        Figure::new("kube_churn_cpu", cpu * 100.0, "%")
            .note(format!("of one CPU, the agent's during that; beside it {others}")),
    ])
}

async fn fill(api: &Api) -> Result<()> {
    let services = stream::iter(0..SERVICES)
        .map(|n| api.create("api/v1/namespaces/default/services", service(&format!("s{n}"))))
        .buffer_unordered(AT_ONCE);
    services.try_for_each(|_| async { Ok(()) }).await?;
    let big = (0..BIG / PER_SLICE).map(|n| (n * PER_SLICE, PER_SLICE, 0));
    let rest = (ENDPOINTS - BIG) / (SERVICES - 1);
    let small = (1..SERVICES).map(|n| {
        let from = BIG + (n - 1) * rest;
        // The last one has what is left over.
        let count = if n == SERVICES - 1 { ENDPOINTS - from } else { rest };
        (from, count, n)
    });
    let slices = stream::iter(big.chain(small)).map(|(from, count, service)| {
        let endpoints = (from..from + count).map(|n| {
            json!({"addresses": [endpoint_address(n)], "nodeName": "node-2", "targetRef": {
                "kind": "Pod", "name": pod_name(n), "namespace": "default", "uid": pod_uid(n)}})
        });
        let endpoints = endpoints.collect();
        async move { api.create_slice(&format!("s{service}-{from}"), &format!("s{service}"), endpoints).await }
    });
    slices.buffer_unordered(AT_ONCE).try_for_each(|_| async { Ok(()) }).await
}

/// The pods of the endpoints, as a kubelet would have left them; by etcd's JSON gateway.
async fn fill_pods(etcd: (Ipv4Addr, u16)) -> Result<()> {
    let stream = tokio::net::TcpStream::connect(etcd).await.context("connect etcd")?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let base64 = |text: String| ByteString(text.into_bytes());
    for from in (0..ENDPOINTS).step_by(PER_TRANSACTION as usize) {
        let puts = (from..ENDPOINTS.min(from + PER_TRANSACTION)).map(|n| {
            let key = base64(format!("/registry/pods/default/{}", pod_name(n)));
            json!({"requestPut": {"key": key, "value": base64(running_pod(n).to_string())}})
        });
        let transaction = json!({"success": puts.collect::<Vec<_>>()}).to_string();
        let request =
            http::Request::post("/v3/kv/txn").header("host", "etcd").body(Full::<Bytes>::from(transaction))?;
        sender.ready().await?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let text = answer.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "etcd: {status}: {}", String::from_utf8_lossy(&text));
    }
    Ok(())
}

/// etcd takes up to 128 operations at once.
const PER_TRANSACTION: u32 = 100;

fn running_pod(n: u32) -> Value {
    let (name, address, since) = (pod_name(n), endpoint_address(n), "2026-01-01T00:00:00Z");
    let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "s-6d4cf56db6", "uid": pod_uid(0),
        "controller": true, "blockOwnerDeletion": true});
    let container = json!({"name": "a", "image": "a", "imagePullPolicy": "IfNotPresent", "resources": {},
        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
        "ports": [{"containerPort": PORT, "protocol": "TCP"}]});
    let status = json!({"name": "a", "ready": true, "restartCount": 0, "image": "a", "imageID": "sha256:a", "started": true,
        "state": {"running": {"startedAt": since}}});
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": pod_uid(n), "creationTimestamp": since,
            "labels": {"app": "s", "pod-template-hash": "6d4cf56db6"}, "ownerReferences": [owner]},
        "spec": {"nodeName": "node-2", "restartPolicy": "Always", "terminationGracePeriodSeconds": 30,
            "dnsPolicy": "ClusterFirst", "serviceAccountName": "default", "securityContext": {},
            "schedulerName": "default-scheduler", "enableServiceLinks": true, "containers": [container]},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "qosClass": "BestEffort",
            "containerStatuses": [status]}})
}

fn endpoint_address(n: u32) -> Ipv4Addr {
    let [_, b, c, d] = n.to_be_bytes();
    Ipv4Addr::new(12, b, c, d)
}

fn pod_name(n: u32) -> String {
    format!("s{n}-6d4cf56db6-x7k2p")
}

fn pod_uid(n: u32) -> String {
    format!("0f6a4a3c-7e0d-4c55-9d8e-{n:012x}")
}

fn service(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"ports": [{"port": 80, "targetPort": PORT}]}})
}

/// Objects written by JSON.
pub(super) struct Api(pub Client);

impl Api {
    pub async fn send(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let request = http::Request::builder()
            .method(method)
            .uri(format!("/{path}"))
            .header("content-type", "application/json")
            .body(serde_json::to_vec(body)?)?;
        self.0.request(request).await.with_context(|| format!("{method} {path}"))
    }

    async fn create(&self, path: &str, object: Value) -> Result<Value> {
        self.send("POST", path, &object).await
    }

    async fn create_slice(&self, name: &str, service: &str, endpoints: Vec<Value>) -> Result<Value> {
        let object = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
            "ports": [{"name": "", "port": PORT}], "endpoints": endpoints});
        self.create("apis/discovery.k8s.io/v1/namespaces/default/endpointslices", object).await
    }

    /// A pod of another node; its uid.
    async fn create_pod(&self, name: String) -> Result<String> {
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {"nodeName": "node-2", "containers": [{"name": "a", "image": "a"}]}});
        let made = self.create("api/v1/namespaces/default/pods", object).await?;
        Ok(made["metadata"]["uid"].as_str().context("a pod has a uid")?.to_owned())
    }

    /// With a grace period it gets its deletionTimestamp, and stays until a kubelet says that it has ended.
    async fn delete_pod(&self, name: &str, grace_s: u32) -> Result<Value> {
        let options = json!({"gracePeriodSeconds": grace_s});
        self.send("DELETE", &format!("api/v1/namespaces/default/pods/{name}"), &options).await
    }
}

/// The agent's own histogram of event to map: upper bounds in seconds, and how many were at most that.
#[derive(Debug)]
struct Lags(Vec<(f64, u64)>);

impl Lags {
    fn read(metrics: std::net::SocketAddr) -> Result<Self> {
        let mut stream = TcpStream::connect(metrics).context("the agent's metrics")?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let buckets = Self::parse(&text);
        if buckets.0.is_empty() {
            bail!("no hitless_endpoint_lag_seconds in the agent's metrics: {text}");
        }
        Ok(buckets)
    }

    fn parse(text: &str) -> Self {
        let lines = text.lines().filter_map(|line| {
            let rest = line.strip_prefix("hitless_endpoint_lag_seconds_bucket{signal=\"api\",le=\"")?;
            let (bound, count) = rest.split_once("\"} ")?;
            Some((bound.replace("+Inf", "inf").parse().ok()?, count.parse().ok()?))
        });
        Self(lines.collect())
    }

    fn since(self, before: &Self) -> Self {
        Self(self.0.into_iter().zip(&before.0).map(|((bound, now), (_, then))| (bound, now - then)).collect())
    }

    /// As Prometheus' histogram_quantile does: evenly spread within a bucket.
    fn quantile_us(&self, q: f64) -> f64 {
        let total = self.0.last().map_or(0, |(_, count)| *count) as f64;
        let rank = q * total;
        let (mut lower, mut below) = (0.0, 0.0);
        for &(bound, count) in &self.0 {
            let count = count as f64;
            if count >= rank && count > below {
                let upper = if bound.is_finite() { bound } else { lower };
                return (lower + (upper - lower) * (rank - below) / (count - below)) * 1e6;
            }
            (lower, below) = (bound, count);
        }
        f64::NAN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated_in_what_came_since() {
        let text = |counts: [u64; 3]| {
            let [a, b, c] = counts;
            let name = "hitless_endpoint_lag_seconds_bucket{signal=\"api\",le=";
            format!("{name}\"0.00001\"}} {a}\n{name}\"0.00002\"}} {b}\n{name}\"+Inf\"}} {c}\nother 1\n")
        };
        let lags = Lags::parse(&text([11, 21, 21])).since(&Lags::parse(&text([1, 1, 1])));
        assert!((lags.quantile_us(0.5) - 10.0).abs() < 1e-6);
        assert!((lags.quantile_us(0.75) - 15.0).abs() < 1e-6);
    }
}
