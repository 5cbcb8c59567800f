//! The gateway: a real Envoy in a pod, which picks pod addresses itself, told of them by EndpointSlices as any
//! proxy's control plane tells it.

use std::{
    collections::BTreeMap,
    fs,
    io::BufReader,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde::Deserialize as _;
use serde_json::{Value, json};

use super::{Cluster, image::ENVOY};

pub const PORT: u16 = 8080;

/// Ends its watch when dropped.
pub struct Gateway {
    pub address: String,
    node: usize,
    watch: Child,
    thread: Option<JoinHandle<()>>,
}

impl Gateway {
    /// In front of a service, on a node.
    pub fn start(cluster: &Cluster, namespace: &str, service: &str, node: usize) -> Result<Self> {
        let dir = cluster.node(node).dir.join(format!("gateway-{service}"));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("envoy.json"), bootstrap().to_string())?;
        let label = format!("kubernetes.io/service-name={service}");
        let mut watch = cluster
            .control
            .command()
            .args([
                "-n",
                namespace,
                "get",
                "endpointslices",
                "-l",
                &label,
                "--watch",
                "--output-watch-events",
                "-o",
                "json",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .context("watch EndpointSlices")?;
        let events = BufReader::new(watch.stdout.take().context("a piped stdout")?);
        write(&dir, &BTreeMap::new())?;
        let target = dir.clone();
        let thread = std::thread::spawn(move || {
            if let Err(error) = follow(events, &target) {
                eprintln!("the gateway's endpoints are no longer followed: {error:#}");
            }
        });
        let mut gateway = Self { address: String::new(), node, watch, thread: Some(thread) };
        cluster.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: gateway, namespace: {namespace}, labels: {{app: gateway, gateway.networking.k8s.io/gateway-name: shop}}}}\n\
             spec:\n  nodeName: node-{node}\n  terminationGracePeriodSeconds: 1\n  containers:\n\
             \x20 - name: envoy\n    image: {ENVOY}\n    imagePullPolicy: Never\n\
             \x20   args: [-c, /config/envoy.json, --concurrency, \"1\", --disable-hot-restart, -l, warn]\n\
             \x20   readinessProbe: {{tcpSocket: {{port: {PORT}}}, periodSeconds: 1}}\n\
             \x20   volumeMounts: [{{name: config, mountPath: /config}}]\n\
             \x20 volumes: [{{name: config, hostPath: {{path: {}}}}}]\n",
            dir.display()
        ))?;
        let ready =
            cluster.kubectl(&["-n", namespace, "wait", "--for=condition=Ready", "pod/gateway", "--timeout=60s"]);
        if let Err(error) = ready {
            bail!("{error:#}\n{}", cluster.node(node).container_log("gateway").unwrap_or_default());
        }
        gateway.address = cluster.get(&["-n", namespace, "pod", "gateway"])?["status"]["podIP"]
            .as_str()
            .context("the gateway has no address")?
            .to_owned();
        std::thread::sleep(Duration::from_secs(1));
        Ok(gateway)
    }

    /// The requests that failed, and why, as Envoy says.
    pub fn failures(&self, cluster: &Cluster) -> String {
        cluster.node(self.node).container_log("gateway").unwrap_or_else(|error| format!("{error:#}"))
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}:{PORT}{path}", self.address)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.watch.kill();
        let _ = self.watch.wait();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn follow(events: impl std::io::Read, dir: &Path) -> Result<()> {
    let mut slices = BTreeMap::new();
    let mut events = serde_json::Deserializer::from_reader(events);
    // The end of the stream is the end of the watch.
    while let Ok(event) = Value::deserialize(&mut events) {
        let object = &event["object"];
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if event["type"] == "DELETED" {
            slices.remove(&name);
        } else {
            slices.insert(name, addresses(object));
        }
        write(dir, &slices)?;
    }
    Ok(())
}

/// What is ready, as a proxy's control plane takes it.
fn addresses(slice: &Value) -> Vec<(String, u64)> {
    let Some(port) = slice["ports"][0]["port"].as_u64() else { return Vec::new() };
    let endpoints = slice["endpoints"].as_array().into_iter().flatten();
    let ready = endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true);
    ready.filter_map(|endpoint| Some((endpoint["addresses"][0].as_str()?.to_owned(), port))).collect()
}

/// Replaced by rename: Envoy watches for that.
fn write(dir: &Path, slices: &BTreeMap<String, Vec<(String, u64)>>) -> Result<()> {
    let endpoints = slices.values().flatten().map(|(address, port)| {
        json!({"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}})
    });
    let text = json!({"version_info": "1", "resources": [{
        "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": "web", "endpoints": [{"lb_endpoints": endpoints.collect::<Vec<_>>()}],
    }]});
    let (new, path): (PathBuf, PathBuf) = (dir.join("eds.json.new"), dir.join("eds.json"));
    fs::write(&new, text.to_string())?;
    Ok(fs::rename(new, path)?)
}

/// Each request that failed, and why.
fn failures() -> Value {
    let line = "%START_TIME% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %UPSTREAM_HOST% %UPSTREAM_TRANSPORT_FAILURE_REASON% after %DURATION% ms\n";
    json!({
        "name": "failures",
        "filter": {"status_code_filter": {"comparison": {"op": "GE", "value": {"default_value": 500, "runtime_key": "failures"}}}},
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {"text_format_source": {"inline_string": line}},
        },
    })
}

/// No retries: what the network loses is to be seen. A connection per request, as most requests meet during a rollout.
fn bootstrap() -> Value {
    let many =
        json!({"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}]});
    json!({"static_resources": {
        "listeners": [{
            "address": {"socket_address": {"address": "::", "port_value": PORT, "ipv4_compat": true}},
            "filter_chains": [{"filters": [{
                "name": "http",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                    "stat_prefix": "gateway",
                    "access_log": [failures()],
                    "route_config": {"virtual_hosts": [{"name": "web", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "web"}}]}]},
                    "http_filters": [{"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
                },
            }]}],
        }],
        "clusters": [{
            "name": "web", "type": "EDS", "connect_timeout": "5s", "circuit_breakers": many,
            "eds_cluster_config": {"eds_config": {"resource_api_version": "V3", "path_config_source": {"path": "/config/eds.json"}}},
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "common_http_protocol_options": {"max_requests_per_connection": 1},
                "explicit_http_config": {"http_protocol_options": {}},
            }},
        }],
    }, "node": {"id": "gateway", "cluster": "gateway"}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ready_endpoints_are_told() {
        let slice = json!({"ports": [{"port": 8080}], "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": true}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
        ]});
        assert_eq!(addresses(&slice), [("10.0.0.1".to_owned(), 8080)]);
    }
}
