//! A cluster with one deployment, its service and its clients: what a rollout needs.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{
    Cluster, Spec,
    image::{self, NGINX},
    load::{Load, LoadSpec, Outcome},
};

pub const NAMESPACE: &str = "shop";
pub const WEB: &str = "deployment/web";

/// No preStop hook, no readiness trick, no sleep: what people write first.
fn web(replicas: usize) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}, labels: {{istio.io/dataplane-mode: ambient}}}}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {NAMESPACE}}}\n\
         spec: {{selector: {{app: web}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\n\
         apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, namespace: {NAMESPACE}}}\n\
         spec:\n  replicas: {replicas}\n  selector: {{matchLabels: {{app: web}}}}\n  template:\n    metadata: {{labels: {{app: web}}}}\n\
         \x20   spec:\n      containers:\n      - name: nginx\n        image: {NGINX}\n        imagePullPolicy: Never\n\
         \x20       ports: [{{containerPort: 8080}}]\n        readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}\n"
    )
}

pub struct Scene {
    pub cluster: Cluster,
    pub vip: String,
}

impl Scene {
    pub fn new(spec: &Spec, replicas: usize) -> Result<Self> {
        let cluster = Cluster::start(spec)?;
        for image in [image::nginx()?, image::fortio()?] {
            cluster.load(&image)?;
        }
        cluster.apply(&web(replicas))?;
        let mut scene = Self { cluster, vip: String::new() };
        scene.kubectl(&["rollout", "status", WEB, "--timeout=60s"])?;
        let service = scene.get(&["service", "web"])?;
        scene.vip = service["spec"]["clusterIP"].as_str().context("a service without an address")?.to_owned();
        Ok(scene)
    }

    /// In the namespace of the scene.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.cluster.kubectl(&[&["-n", NAMESPACE], args].concat())
    }

    pub fn get(&self, args: &[&str]) -> Result<Value> {
        self.cluster.get(&[&["-n", NAMESPACE], args].concat())
    }

    /// Requests from a pod of the first node; each makes a connection of its own.
    pub fn load(&self, name: &str, url: &str, qps: u32, time: Duration) -> Result<Load> {
        let connections = if qps > 200 { 32 } else { 8 };
        let spec = LoadSpec { name: name.into(), url: url.into(), qps, connections, time, node: 1 };
        Load::start(&self.cluster, NAMESPACE, spec)
    }

    /// Replaces every pod, a number of times, and returns when the last is gone.
    pub fn roll(&self, times: usize) -> Result<()> {
        for _ in 0..times {
            self.kubectl(&["rollout", "restart", WEB])?;
            self.kubectl(&["rollout", "status", WEB, "--timeout=60s"])?;
        }
        Ok(())
    }

    /// Rolls under load. The load must outlast it, or the last rollout met none of it.
    pub fn roll_under_load(&self, name: &str, url: &str, qps: u32, times: usize, time: Duration) -> Result<Outcome> {
        let load = self.load(name, url, qps, time)?;
        self.roll(times)?;
        let took = load.elapsed();
        if took > time {
            bail!("{times} rollouts took {took:?}: longer than the load of {time:?}");
        }
        let outcome = load.finish(&self.cluster)?;
        eprintln!("{name}: {times} rollouts in {took:.1?}: {outcome:?}");
        Ok(outcome)
    }
}
