//! From the real API server to agents that are fed by a stream: watches of pods, services and EndpointSlices become
//! the state of each node. What is tested this way is the kernel path on a real cluster, not the agent's own watches.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::BufReader,
    path::PathBuf,
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use anyhow::{Context, Result};
use dataplane_user::model::{self, Event, Snapshot};
use serde::Deserialize as _;
use serde_json::Value;

use super::{Cluster, agent::pid_of};
use crate::lab::agent::Stream;

const KINDS: [&str; 4] = ["namespaces", "services", "pods", "endpointslices"];

/// Ends its watches when dropped.
pub struct Bridge {
    state: Arc<Mutex<State>>,
    watches: Vec<Child>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// By kind and namespace/name.
    objects: BTreeMap<(String, String), Value>,
    /// By index: its name, and the groups of its pods.
    nodes: BTreeMap<usize, (String, PathBuf)>,
    agents: BTreeMap<usize, (Stream, Option<Snapshot>)>,
    pids: BTreeMap<String, i32>,
}

impl Bridge {
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let nodes = cluster.nodes().iter().map(|node| (node.index, (node.name.clone(), node.cgroup.clone())));
        let state = State { nodes: nodes.collect(), ..State::default() };
        let mut bridge = Self { state: Arc::new(Mutex::new(state)), watches: Vec::new(), threads: Vec::new() };
        for kind in KINDS {
            bridge.watch(cluster, kind)?;
        }
        Ok(bridge)
    }

    fn watch(&mut self, cluster: &Cluster, kind: &str) -> Result<()> {
        let list = cluster.get(&[kind, "-A"])?;
        for object in list["items"].as_array().into_iter().flatten() {
            self.state.lock().expect("no panic while locked").take("ADDED", object.clone());
        }
        let args = ["get", kind, "-A", "--watch", "--output-watch-events", "-o", "json"];
        let mut child = cluster.control.command().args(args).stdout(Stdio::piped()).spawn().context("watch")?;
        // An agent has a priority class, and so has what stands for its watches.
        // SAFETY: a system call on numbers.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, child.id(), -10) };
        let output = BufReader::new(child.stdout.take().context("a piped stdout")?);
        let state = self.state.clone();
        self.watches.push(child);
        self.threads.push(std::thread::spawn(move || {
            let mut events = serde_json::Deserializer::from_reader(output);
            while let Ok(event) = Value::deserialize(&mut events) {
                let mut state = state.lock().expect("no panic while locked");
                state.tell_end(&event["object"]);
                state.take(event["type"].as_str().unwrap_or_default(), event["object"].clone());
                state.tell();
            }
        }));
        Ok(())
    }

    /// From now on the agent of this node hears everything; returns when it has heard all there is.
    pub fn connect(&self, node: usize, stream: Stream) -> Result<()> {
        let mut state = self.state.lock().expect("no panic while locked");
        let snapshot = state.snapshot(node);
        stream.send(&Event::Sync { state: snapshot.clone() })?;
        state.agents.insert(node, (stream, Some(snapshot)));
        Ok(())
    }

    /// The agent of this node is gone.
    pub fn disconnect(&self, node: usize) {
        self.state.lock().expect("no panic while locked").agents.remove(&node);
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for watch in &mut self.watches {
            let _ = watch.kill();
            let _ = watch.wait();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn name_of(object: &Value) -> String {
    let meta = &object["metadata"];
    format!("{}/{}", text(&meta["namespace"]), text(&meta["name"]))
}

impl State {
    fn take(&mut self, event: &str, object: Value) {
        let key = (text(&object["kind"]).to_owned(), name_of(&object));
        if event == "DELETED" {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key, object);
        }
    }

    /// A pod's end goes before everything else: the kubelet hears of it at the same moment.
    fn tell_end(&mut self, object: &Value) {
        if object["kind"] != "Pod" || !object["metadata"]["deletionTimestamp"].is_string() {
            return;
        }
        for node in self.agents.keys().copied().collect::<Vec<_>>() {
            let Some(pod) = self.pod(object, node) else { continue };
            let event = Event::Upsert { object: model::Object::Pod(pod) };
            if let Some((stream, _)) = self.agents.get(&node) {
                let _ = stream.send(&event);
            }
        }
    }

    fn tell(&mut self) {
        for node in self.agents.keys().copied().collect::<Vec<_>>() {
            let snapshot = self.snapshot(node);
            let Some((stream, last)) = self.agents.get_mut(&node) else { continue };
            if last.as_ref() == Some(&snapshot) {
                continue;
            }
            match stream.send(&Event::Sync { state: snapshot.clone() }) {
                Ok(()) => *last = Some(snapshot),
                // An agent that was killed is connected again when it is back.
                Err(error) => eprintln!("the agent of node-{node} was not told: {error:#}"),
            }
        }
    }

    fn of(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(move |((other, _), _)| other == kind).map(|(_, object)| object)
    }

    fn snapshot(&mut self, node: usize) -> Snapshot {
        let services: Vec<_> = self.of("Service").map(service).collect();
        let known: BTreeSet<_> = services.iter().map(|service| service.name.to_string()).collect();
        // A slice may tell of a pod long after it is gone, or for ever if nobody changes it.
        let there: BTreeSet<_> = self.of("Pod").map(name_of).collect();
        let backends = self.of("EndpointSlice").flat_map(backends).filter(|backend| known.contains(&*backend.service));
        let backends =
            backends.filter(|backend| backend.pod.as_ref().is_none_or(|pod| there.contains(&**pod))).collect();
        let pods: Vec<_> = self.of("Pod").cloned().collect();
        let pods = pods.iter().filter_map(|pod| self.pod(pod, node)).collect();
        Snapshot { services, backends, pods, nodes: Vec::new() }
    }

    fn pod(&mut self, pod: &Value, node: usize) -> Option<model::Pod> {
        let addresses: Vec<_> = list(&pod["status"]["podIPs"]).filter_map(|ip| text(&ip["ip"]).parse().ok()).collect();
        let over = matches!(text(&pod["status"]["phase"]), "Succeeded" | "Failed");
        if addresses.is_empty() || over || pod["spec"]["hostNetwork"] == true {
            return None;
        }
        let (name, cgroup) = &self.nodes[&node];
        let uid = text(&pod["metadata"]["uid"]);
        let pid = if text(&pod["spec"]["nodeName"]) == name {
            let found =
                self.pids.get(uid).copied().filter(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists());
            let found = found.or_else(|| pid_of(cgroup, uid));
            if let Some(pid) = found {
                self.pids.insert(uid.to_owned(), pid);
            }
            found
        } else {
            None
        };
        let namespace = self.objects.get(&("Namespace".into(), format!("/{}", text(&pod["metadata"]["namespace"]))));
        let mode = |object: &Value| object["metadata"]["labels"]["istio.io/dataplane-mode"].as_str().map(str::to_owned);
        let mode = mode(pod).or_else(|| namespace.and_then(mode));
        let labels = pod["metadata"]["labels"].as_object().into_iter().flatten();
        Some(model::Pod {
            name: name_of(pod).into(),
            addresses,
            netns: None,
            pid,
            enrolled: mode.as_deref() == Some("ambient"),
            gateway: false,
            labels: labels.map(|(key, value)| (key.as_str().into(), text(value).into())).collect(),
            stop_signals: Vec::new(),
            terminating: pod["metadata"]["deletionTimestamp"].is_string(),
        })
    }
}

fn service(object: &Value) -> model::Service {
    let addresses: Vec<_> = list(&object["spec"]["clusterIPs"]).filter_map(|ip| text(ip).parse().ok()).collect();
    let ports = list(&object["spec"]["ports"]).map(|port| model::ServicePort {
        name: text(&port["name"]).into(),
        port: port["port"].as_u64().and_then(|port| port.try_into().ok()).unwrap_or_default(),
        protocol: if port["protocol"] == "UDP" { model::Protocol::Udp } else { model::Protocol::Tcp },
        node_port: None,
    });
    model::Service {
        name: name_of(object).into(),
        ports: ports.collect(),
        affinity_seconds: 0,
        headless: addresses.is_empty(),
        addresses,
        ..model::Service::default()
    }
}

fn backends(slice: &Value) -> Vec<model::Backend> {
    let meta = &slice["metadata"];
    let Some(service) = meta["labels"]["kubernetes.io/service-name"].as_str() else { return Vec::new() };
    let service = format!("{}/{service}", text(&meta["namespace"]));
    let mut backends = Vec::new();
    for endpoint in list(&slice["endpoints"]) {
        let conditions = &endpoint["conditions"];
        let pod =
            endpoint["targetRef"]["name"].as_str().map(|name| format!("{}/{name}", text(&meta["namespace"])).into());
        for port in list(&slice["ports"]) {
            let (Some(target), Some(address)) = (port["port"].as_u64(), endpoint["addresses"][0].as_str()) else {
                continue;
            };
            let (Ok(target_port), Ok(address)) = (target.try_into(), address.parse()) else { continue };
            backends.push(model::Backend {
                service: service.as_str().into(),
                port: text(&port["name"]).into(),
                address,
                target_port,
                pod: pod.clone(),
                ready: conditions["ready"] != false,
                serving: conditions["serving"] != false,
                terminating: conditions["terminating"] == true,
                weight: 1,
            });
        }
    }
    backends
}
