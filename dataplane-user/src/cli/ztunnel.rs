//! `hitless config dump --ztunnel`: the mesh and the services as one document of ztunnel's shape.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value, json};

use crate::{
    admin::{protocol::MeshObject, ztunnel},
    model::{Backend, Service, Snapshot},
    tunnel::host_of,
};

/// `node`: this one's name; `cluster`: Istio's name of the cluster.
pub fn dump(mesh: &[MeshObject], state: &Snapshot, node: &str, cluster: &str) -> anyhow::Result<Value> {
    let ending: HashSet<_> =
        state.pods.iter().filter(|pod| pod.terminating).map(|pod| ztunnel::uid(cluster, &pod.name)).collect();
    let mut lists: BTreeMap<&str, Vec<Value>> =
        ["workloads", "policies", "certificates"].map(|list| (list, Vec::new())).into();
    let mut states = Map::new();
    for object in mesh {
        let mut value: Value = serde_json::from_str(&object.json)?;
        if object.list == "workloadState" {
            let uid = value.as_object_mut().and_then(|state| state.remove("uid"));
            let uid = uid.as_ref().and_then(Value::as_str).unwrap_or_default().to_owned();
            if ending.contains(&uid) {
                value["state"] = "Draining".into();
            }
            states.insert(uid, value);
            continue;
        }
        if object.list == "workloads" {
            if value["local"] == true {
                value["node"] = node.into();
            }
            if value["uid"].as_str().is_some_and(|uid| ending.contains(uid)) {
                value["status"] = "Unhealthy".into();
            }
        }
        lists.entry(&object.list).or_default().push(value);
    }
    let mut backends: BTreeMap<&str, Vec<&Backend>> = BTreeMap::new();
    for backend in &state.backends {
        backends.entry(&backend.service).or_default().push(backend);
    }
    let none = Vec::new();
    let services = state.services.iter().map(|one| service(one, backends.get(&*one.name).unwrap_or(&none), cluster));
    lists.insert("services", services.collect());
    let mut dump = json!(lists);
    dump["workloadState"] = states.into();
    Ok(dump)
}

fn service(service: &Service, backends: &[&Backend], cluster: &str) -> Value {
    let (namespace, name) = service.name.split_once('/').unwrap_or(("", &service.name));
    let host = host_of(&service.name);
    // A named target port may be another number on each pod: then it is 0, as in ztunnel.
    let ports = service.ports.iter().map(|port| {
        let of_port = backends.iter().filter(|backend| backend.port == port.name);
        let targets: HashSet<u16> = of_port.map(|backend| backend.target_port).collect();
        let target = if targets.len() == 1 { targets.into_iter().next().unwrap_or(0) } else { 0 };
        (port.port.to_string(), json!(target))
    });
    let mut endpoints: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for backend in backends {
        let Some(port) = service.ports.iter().find(|port| port.name == backend.port) else { continue };
        let who = match &backend.pod {
            Some(pod) => ztunnel::uid(cluster, pod),
            None => format!("{cluster}//Address/{}", backend.address),
        };
        endpoints.entry(who).or_default().insert(port.port.to_string(), backend.target_port.into());
    }
    let endpoints = endpoints.into_iter().map(|(who, port)| {
        let endpoint = json!({ "workloadUid": who, "service": format!("{namespace}/{host}"), "port": port });
        (who, endpoint)
    });
    let (v4, v6) = (service.addresses.iter().any(|ip| ip.is_ipv4()), service.addresses.iter().any(|ip| ip.is_ipv6()));
    json!({
        "name": name,
        "namespace": namespace,
        "hostname": host,
        // After the network's name, which is empty here.
        "vips": service.addresses.iter().map(|ip| format!("/{ip}")).collect::<Vec<_>>(),
        "ports": ports.collect::<Map<_, _>>(),
        "endpoints": endpoints.collect::<Map<_, _>>(),
        "subjectAltNames": [],
        "ipFamilies": match (v4, v6) {
            (true, true) => "Dual",
            (false, true) => "IPv6",
            _ => "IPv4",
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_have_their_endpoints_and_ending_workloads_are_unhealthy() {
        let state: Snapshot = serde_json::from_value(json!({
            "services": [{"name": "shop/web", "addresses": ["10.96.0.1"], "ports": [{"name": "http", "port": 80}]}],
            "backends": [{"service": "shop/web", "port": "http", "address": "10.0.0.1", "targetPort": 8080, "pod": "shop/web-1"}],
            "pods": [{"name": "shop/web-1", "terminating": true}],
        }))
        .unwrap();
        let uid = "west//Pod/shop/web-1";
        let workload = json!({"uid": uid, "local": true, "node": "", "status": "Healthy"});
        let carried = json!({"uid": uid, "state": "Up", "connections": {"inbound": [], "outbound": []}});
        let mesh = [("workloads", workload), ("workloadState", carried)]
            .map(|(list, object)| MeshObject { list: list.into(), json: object.to_string() });
        let dumped = dump(&mesh, &state, "node-1", "west").unwrap();
        assert_eq!(dumped["workloads"][0]["node"], "node-1");
        assert_eq!(dumped["workloads"][0]["status"], "Unhealthy");
        assert_eq!(dumped["certificates"], json!([]));
        let carried = json!({uid: {"state": "Draining", "connections": {"inbound": [], "outbound": []}}});
        assert_eq!(dumped["workloadState"], carried);
        let service = &dumped["services"][0];
        assert_eq!(service["hostname"], "web.shop.svc.cluster.local");
        assert_eq!(service["vips"], json!(["/10.96.0.1"]));
        assert_eq!(service["ports"], json!({"80": 8080}));
        let wanted =
            json!({uid: {"workloadUid": uid, "service": "shop/web.shop.svc.cluster.local", "port": {"80": 8080}}});
        assert_eq!(service["endpoints"], wanted);
    }
}
