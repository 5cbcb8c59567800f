//! Services: under which addresses they are reached, and by whom.

use std::net::IpAddr;

use super::{Name, World, port_number};
use crate::{
    model::{self, Event, Key, Protocol, ServicePort},
    source::kube::object::{self, Object as _},
};

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Service {
    /// Without this node's addresses.
    model: model::Service,
    /// `internalTrafficPolicy: Local`: only endpoints of this node.
    pub local_only: bool,
}

/// The API's default of `sessionAffinityConfig.clientIP.timeoutSeconds`: three hours.
const AFFINITY_SECONDS: i64 = 10_800;
/// Its maximum: a day.
const MOST_AFFINITY_SECONDS: i64 = 86_400;

impl World {
    pub fn service(&mut self, object: &object::Service) {
        let name = object.meta().full_name();
        let Some(new) = self.read_service(object, &name) else { return self.service_gone(&name) };
        let told = self.declared(&new);
        let known = self.services.get(&name);
        if known == Some(&new) {
            return;
        }
        let reselects = known.is_none_or(|known| known.local_only != new.local_only);
        self.services.insert(name.clone(), new);
        self.tell(Event::Upsert { object: model::Object::Service(told) });
        if reselects {
            self.retell_service(&name);
        }
    }

    pub fn service_gone(&mut self, name: &str) {
        if let Some((name, _)) = self.services.remove_entry(name) {
            self.forget(Key::Service { name: name.clone() });
            self.retell_service(&name);
        }
    }

    /// What the registry is told of it.
    pub(super) fn declared(&self, service: &Service) -> model::Service {
        let mut told = service.model.clone();
        if told.ports.iter().any(|port| port.node_port.is_some()) {
            told.node_addresses = self.node_addresses.clone();
        }
        told
    }

    pub(super) fn node_addresses_changed(&mut self) {
        let with_ports =
            self.services.values().filter(|service| service.model.ports.iter().any(|port| port.node_port.is_some()));
        let told: Vec<_> = with_ports.map(|service| self.declared(service)).collect();
        for service in told {
            self.tell(Event::Upsert { object: model::Object::Service(service) });
        }
    }

    /// None: nothing that a connection could be translated for.
    fn read_service(&mut self, object: &object::Service, name: &Name) -> Option<Service> {
        let spec = &object.spec;
        if spec.kind.as_deref() == Some("ExternalName") {
            return None;
        }
        let mut cluster_ips: Vec<&str> = spec.cluster_ips.iter().map(String::as_str).collect();
        if cluster_ips.is_empty() {
            cluster_ips.extend(spec.cluster_ip.as_deref());
        }
        let headless = cluster_ips.contains(&"None");
        // The balancer of `ipMode: Proxy` wants to see the connections (KEP-1860).
        let balancers = object.status.load_balancer.ingress.iter();
        let balancers =
            balancers.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_deref());
        let mut addresses: Vec<IpAddr> = Vec::new();
        if !headless {
            for text in cluster_ips.into_iter().chain(spec.external_ips.iter().map(String::as_str)).chain(balancers) {
                if text.is_empty() {
                    continue;
                }
                match text.parse::<IpAddr>() {
                    Ok(address) if !addresses.contains(&address) => addresses.push(address),
                    Ok(_) => {}
                    Err(_) => self.problem("service", name, format!("{text:?} is no address: not served there")),
                }
            }
        }
        let ports = self.read_ports(spec, name);
        if ports.is_empty() {
            return None;
        }
        let affinity = match spec.session_affinity.as_deref() {
            Some("ClientIP") => spec.session_affinity_config.client_ip.timeout_seconds.unwrap_or(AFFINITY_SECONDS),
            _ => 0,
        };
        let model = model::Service {
            name: name.clone(),
            addresses,
            ports,
            affinity_seconds: affinity.clamp(0, MOST_AFFINITY_SECONDS) as u32,
            headless,
            node_addresses: Vec::new(),
        };
        let local_only = spec.internal_traffic_policy.as_deref() == Some("Local");
        Some(Service { model, local_only })
    }

    fn read_ports(&mut self, spec: &object::ServiceSpec, name: &Name) -> Vec<ServicePort> {
        let mut ports: Vec<ServicePort> = Vec::new();
        for port in &spec.ports {
            // SCTP is left to others.
            let Some(protocol) = protocol(port.protocol.as_deref()) else { continue };
            let Some(number) = port_number(port.port) else {
                self.problem("service", name, format!("port {:?} is {}; ports are 1..=65535", port.name, port.port));
                continue;
            };
            if ports.iter().any(|known| *known.name == *port.name) {
                self.problem("service", name, format!("two ports are named {:?}: the first is served", port.name));
                continue;
            }
            let node_port = port.node_port.and_then(port_number);
            ports.push(ServicePort { name: port.name.as_str().into(), port: number, protocol, node_port });
        }
        ports
    }
}

/// None: a protocol that is not translated. TCP is the API's default.
pub(super) fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("TCP" | "") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some(_) => None,
    }
}
