//! A cluster with one deployment, its service and its clients: what a rollout needs.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{
    Cluster, Spec,
    agent::{self, Agent},
    image::{self, HTTPBIN, NGINX},
    load::{Amount, Load, LoadSpec, Outcome},
};

pub const NAMESPACE: &str = "shop";
/// Every server answers here.
pub const PATH: &str = "/status/200";
/// Of a light load: as many requests can be under way.
pub const CLIENTS: u32 = 8;
pub const WEB: &str = "deployment/web";
/// A load of rollouts that were quicker goes on for so long, or it would hardly be one.
const LEAST: Duration = Duration::from_secs(12);

/// What serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// Closes everything at SIGTERM, also what it has accepted and not answered
    Nginx,
    /// Closes its listener at SIGTERM, and answers what it has accepted
    Httpbin,
}

/// No preStop hook, no readiness trick, no sleep: what people write first.
fn web(replicas: usize, server: Server) -> String {
    let (image, path) = match server {
        Server::Nginx => (NGINX, "/"),
        Server::Httpbin => (HTTPBIN, "/status/200"),
    };
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}, labels: {{istio.io/dataplane-mode: ambient}}}}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {NAMESPACE}}}\n\
         spec: {{selector: {{app: web}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\n\
         apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, namespace: {NAMESPACE}}}\n\
         spec:\n  replicas: {replicas}\n  selector: {{matchLabels: {{app: web}}}}\n  template:\n    metadata: {{labels: {{app: web}}}}\n\
         \x20   spec:\n      containers:\n      - name: nginx\n        image: {image}\n        imagePullPolicy: Never\n\
         \x20       ports: [{{containerPort: 8080}}]\n        readinessProbe: {{httpGet: {{path: {path}, port: 8080}}, periodSeconds: 1}}\n"
    )
}

pub struct Scene {
    // Before the cluster they look at.
    pub agents: Vec<Agent>,
    pub cluster: Cluster,
    pub vip: String,
}

impl Scene {
    pub fn new(spec: &Spec, replicas: usize, server: Server) -> Result<Self> {
        let cluster = Cluster::start(spec)?;
        let image = match server {
            Server::Nginx => image::nginx()?,
            Server::Httpbin => image::httpbin()?,
        };
        for image in [image, image::fortio()?] {
            cluster.load(&image)?;
        }
        cluster.apply(&web(replicas, server))?;
        let mut scene = Self { agents: Vec::new(), cluster, vip: String::new() };
        scene.wait_rollout(WEB)?;
        let service = scene.get(&["service", "web"])?;
        scene.vip = service["spec"]["clusterIP"].as_str().context("a service without an address")?.to_owned();
        Ok(scene)
    }

    /// hitless on every node.
    pub fn with_hitless(spec: &Spec, replicas: usize, server: Server) -> Result<Self> {
        let mut scene = Self::new(spec, replicas, server)?;
        scene.start_agents(&[])?;
        Ok(scene)
    }

    /// The same, later; with further arguments.
    pub fn start_agents(&mut self, args: &[&str]) -> Result<()> {
        agent::permit(&self.cluster)?;
        for node in self.cluster.nodes() {
            self.agents.push(Agent::start(node, args)?);
        }
        Ok(())
    }

    /// Waits until hitless serves the connections of a pod of the first node.
    pub fn wait_enrolled(&self, pod: &str) -> Result<()> {
        match self.agents.first() {
            Some(agent) => agent.wait_enrolled(&format!("{NAMESPACE}/{pod}")),
            None => Ok(()),
        }
    }

    /// In the namespace of the scene.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.cluster.kubectl(&[&["-n", NAMESPACE], args].concat())
    }

    pub fn get(&self, args: &[&str]) -> Result<Value> {
        self.cluster.get(&[&["-n", NAMESPACE], args].concat())
    }

    /// Requests from a pod of the first node; each makes a connection of its own.
    pub fn load(&self, name: &str, url: &str, qps: u32) -> Result<Load> {
        self.ask(name, url, Amount::Rate { qps, clients: if qps > 200 { 32 } else { CLIENTS } })
    }

    /// From a pod of the first node, in any amount.
    pub fn ask(&self, name: &str, url: &str, amount: Amount) -> Result<Load> {
        let spec = LoadSpec { name: name.into(), url: url.into(), amount, node: 1 };
        Load::start(&self.cluster, NAMESPACE, spec, || self.wait_enrolled(name))
    }

    /// By the service's address.
    pub fn url(&self) -> String {
        format!("http://{}{PATH}", self.vip)
    }

    /// Replaces every pod, a number of times.
    pub fn roll(&self, times: usize) -> Result<()> {
        for _ in 0..times {
            self.kubectl(&["rollout", "restart", WEB])?;
            self.wait_rollout(WEB)?;
        }
        Ok(())
    }

    /// With patience: the controllers come back up to a minute after an API server that was away for long.
    pub fn wait_rollout(&self, what: &str) -> Result<()> {
        self.kubectl(&["rollout", "status", what, "--timeout=180s"]).map(drop)
    }

    /// Rolls under load, which began before and ends after.
    pub fn roll_under_load(&self, name: &str, url: &str, qps: u32, times: usize) -> Result<Outcome> {
        let load = self.load(name, url, qps)?;
        self.roll(times)?;
        let took = load.elapsed();
        sleep(LEAST.saturating_sub(took).max(Duration::from_secs(1)));
        let outcome = load.stop(&self.cluster)?;
        eprintln!("{name}: {times} rollouts in {took:.1?}: {outcome:?}");
        Ok(outcome)
    }

    /// The names of the deployment's pods.
    pub fn pods(&self) -> Result<Vec<String>> {
        let list = self.get(&["pods", "-l", "app=web"])?;
        let items = list["items"].as_array().into_iter().flatten();
        Ok(items.filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect())
    }

    /// Waits until as many pods are left and ready; those that end are gone.
    pub fn wait_pods(&self, count: usize) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let list = self.get(&["pods", "-l", "app=web"])?;
            let items: Vec<_> = list["items"].as_array().into_iter().flatten().collect();
            if items.len() == count && items.iter().all(|pod| super::is_ready(pod)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{} pods after 60 s, not {count} ready ones", items.len());
            }
            sleep(Duration::from_millis(100));
        }
    }

    /// How often containers of the deployment were started again.
    pub fn restarts(&self) -> Result<u64> {
        let list = self.get(&["pods", "-l", "app=web"])?;
        let items = list["items"].as_array().into_iter().flatten();
        Ok(items.filter_map(|pod| pod["status"]["containerStatuses"][0]["restartCount"].as_u64()).sum())
    }
}
