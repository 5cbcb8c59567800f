//! Messages of the admin API (`proto/hitless/admin/v1/admin.proto`), which are also what `--output json` prints.

use std::collections::BTreeMap;

use crate::{
    config::in_force,
    kernel::{LinkState, Occupancy},
    metrics::drains::{self, Signal},
    registry::address,
    registry::view::{Counts, Row},
};
use dataplane_ebpf::{
    abi::{
        self, CAUSE_COLLISION, CAUSE_ICMP, CAUSE_RST, CAUSE_SILENT, EVENT_EXHAUSTED, EVENT_LISTENER_CLOSED,
        EVENT_LISTENER_OPENED, EVENT_REBOUND, EVENT_RECOVERED, EVENT_REFUSED, EVENT_STOP_SIGNAL, EVENT_SUSPECTED,
        EVENT_TIMED_OUT, EVENT_UNREACHABLE, Event, FlowKey, LAYER_CHOOSE, LAYER_KNOW, LAYER_REBIND, Rebind, Stat,
    },
    health::{Health, State, TICK_SHIFT, ticks},
};

#[allow(clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
mod generated {
    tonic::include_proto!("hitless.admin.v1");
}

pub use generated::{
    Agent, Backend as BackendRow, Carried, Certificate, Config, Connection, Drain, DumpMeshRequest, DumpStateRequest,
    Endpoint as EndpointRow, Event as EventRow, ExplainPolicyRequest, GetConfigRequest, GetStatusRequest, Hook,
    KernelSide, Link, ListCertificatesRequest, ListConnectionsRequest, ListDrainsRequest, ListEndpointsRequest,
    ListPoliciesRequest, Map, Mesh, MeshObject, Objects, Pod as PodRow, Policy, PolicyCounts, PolicyExplanation,
    Setting, Source, StateObject, Status, WatchEventsRequest, admin_client, admin_server,
};

/// Names for the numbers in an event.
pub trait Names {
    fn pod(&self, id: u32) -> Option<String>;
    fn service(&self, id: u32) -> Option<String>;
    fn backend(&self, id: u32) -> Option<String>;
}

impl EventRow {
    pub fn new(event: &Event, names: &impl Names) -> Self {
        let known = |id: u32, name: Option<String>| (id != 0).then(|| name.unwrap_or_else(|| format!("#{id}")));
        let mut row = Self {
            at_ns: event.at_ns,
            event: event_name(event.kind).into(),
            pod: known(event.pod, names.pod(event.pod)),
            service: known(event.service, names.service(event.service)),
            backend: known(event.backend, names.backend(event.backend)),
            ..Self::default()
        };
        match event.kind {
            EVENT_REBOUND => {
                row.to = known(event.detail, names.backend(event.detail));
                row.cause = Some(cause_name(event.extra).into());
            }
            EVENT_STOP_SIGNAL => row.signal = Some(event.detail),
            EVENT_LISTENER_OPENED | EVENT_LISTENER_CLOSED => row.port = Some(u16::from_be(event.port_be).into()),
            EVENT_REFUSED | EVENT_TIMED_OUT | EVENT_UNREACHABLE => {
                row.errno = Some(event.detail);
                row.after_ns = Some(event.extra);
            }
            _ => {}
        }
        row
    }
}

fn event_name(kind: u32) -> &'static str {
    match kind {
        EVENT_REFUSED => "refused",
        EVENT_TIMED_OUT => "timedOut",
        EVENT_UNREACHABLE => "unreachable",
        EVENT_REBOUND => "rebound",
        EVENT_EXHAUSTED => "exhausted",
        EVENT_LISTENER_OPENED => "listenerOpened",
        EVENT_LISTENER_CLOSED => "listenerClosed",
        EVENT_STOP_SIGNAL => "stopSignal",
        EVENT_SUSPECTED => "suspected",
        EVENT_RECOVERED => "recovered",
        _ => "unknown",
    }
}

fn cause_name(cause: u32) -> &'static str {
    match cause {
        CAUSE_RST => "rst",
        CAUSE_ICMP => "icmp",
        CAUSE_SILENT => "silent",
        CAUSE_COLLISION => "collision",
        _ => "unknown",
    }
}

/// The layers' names, in order.
pub fn layer_names(layers: u32) -> Vec<String> {
    let all = [("l1", LAYER_KNOW), ("l2", LAYER_CHOOSE), ("l3", LAYER_REBIND)];
    all.iter().filter(|(_, bit)| layers & bit != 0).map(|(name, _)| (*name).to_owned()).collect()
}

/// Counters by their names.
pub fn counters(stats: &[(Stat, u64)]) -> BTreeMap<String, u64> {
    stats.iter().map(|(stat, count)| (stat.name().to_owned(), *count)).collect()
}

impl EndpointRow {
    /// A row of the registry, with what the kernel knows of its backend at `now_ns`.
    pub fn new(row: Row, health: impl Fn(u32) -> Health, now_ns: u64) -> Self {
        let colon = if row.port.is_empty() { "" } else { ":" };
        let backend = row.backend.map(|backend| {
            let word = health(backend.id);
            BackendRow {
                id: backend.id,
                generation: backend.generation,
                address: backend.address.to_string(),
                section: backend.section.unwrap_or("none").into(),
                weight: backend.weight.into(),
                control: backend.control.into(),
                kernel: state_name(word.state()).into(),
                suspect_ms: suspect_ms(word, now_ns),
                pod: backend.pod.map(|name| name.to_string()),
                local: backend.local,
            }
        });
        Self {
            service: format!("{}{colon}{}", row.service, row.port),
            protocol: format!("{:?}", row.protocol).to_uppercase(),
            frontends: row.frontends.iter().map(ToString::to_string).collect(),
            backend,
        }
    }
}

pub fn state_name(state: State) -> &'static str {
    match state {
        State::Gone => "gone",
        State::Ready => "ready",
        State::Draining => "draining",
        State::Refusing => "refusing",
    }
}

/// How long a suspicion still lasts; `None`: there is none.
pub fn suspect_ms(word: Health, now_ns: u64) -> Option<u64> {
    (word.level() > 0).then(|| {
        let left = word.until().wrapping_sub(ticks(now_ns)) as i32;
        ((left.max(0) as u64) << TICK_SHIFT) / 1_000_000
    })
}

impl Connection {
    pub fn new(key: &FlowKey, flow: &Rebind, now_ns: u64) -> Self {
        let at = |addr, port_be| address::socket(&abi::Endpoint::new(addr, port_be, abi::PROTO_TCP)).to_string();
        let state = match flow.closing & !abi::REBIND_NODE {
            0 => "opening",
            abi::REBIND_ESTABLISHED => "established",
            _ => "closing",
        };
        Self {
            client: at(key.client, key.client_port_be),
            peer: at(key.peer, key.peer_port_be),
            backend: at(flow.to, flow.to_port_be),
            state: state.into(),
            idle_ms: Some(now_ns.saturating_sub(flow.last_seen_ns) / 1_000_000),
            carried: None,
        }
    }
}

impl From<&drains::Drain> for Drain {
    fn from(drain: &drains::Drain) -> Self {
        let (first, first_ns) = drain.first();
        let first = match first {
            Signal::Api => "api",
            Signal::Sigterm => "sigterm",
            Signal::Listener => "listener",
            Signal::ControlPlane => "controlPlane",
        };
        let [api_ns, sigterm_ns, listener_ns, control_plane_ns] = drain.at_ns.map(|at| (at != 0).then_some(at));
        Self {
            pod: drain.pod.to_string(),
            services: drain.services.clone(),
            first: first.into(),
            first_ns,
            api_ns,
            sigterm_ns,
            listener_ns,
            control_plane_ns,
            rebound: drain.rebound,
            failed: drain.failed,
            returned: drain.returned,
        }
    }
}

impl From<in_force::Setting> for Setting {
    fn from(setting: in_force::Setting) -> Self {
        Self { key: setting.key, value: setting.value.to_string(), from: setting.from.to_string() }
    }
}

impl From<Counts> for Objects {
    fn from(counts: Counts) -> Self {
        let Counts { services, frontends, backends, slots, pods, local_pods, nodes, waiting } = counts;
        let [services, frontends, backends, slots] = [services, frontends, backends, slots].map(|n| n as u64);
        let [pods, local_pods, nodes, waiting] = [pods, local_pods, nodes, waiting].map(|n| n as u64);
        Self { services, frontends, backends, slots, pods, local_pods, nodes, waiting }
    }
}

impl From<&LinkState> for Link {
    fn from(link: &LinkState) -> Self {
        Self { name: link.name.clone(), attached: link.attached }
    }
}

impl From<Occupancy> for Map {
    fn from(map: Occupancy) -> Self {
        Self { name: map.map.to_owned(), used: map.used, size: map.size }
    }
}

#[cfg(test)]
mod tests {
    use dataplane_ebpf::health::Input;

    use super::*;

    struct Numbers;

    impl Names for Numbers {
        fn pod(&self, _: u32) -> Option<String> {
            None
        }

        fn service(&self, id: u32) -> Option<String> {
            Some(format!("shop/web-{id}"))
        }

        fn backend(&self, id: u32) -> Option<String> {
            (id == 3).then(|| "10.0.0.3:80".into())
        }
    }

    #[test]
    fn an_event_goes_by_names_and_a_removed_object_by_its_number() {
        let event =
            Event { kind: EVENT_REBOUND, service: 1, backend: 2, detail: 3, extra: CAUSE_RST, ..Event::default() };
        let row = EventRow::new(&event, &Numbers);
        assert_eq!(
            serde_json::to_value(&row).unwrap(),
            serde_json::json!({"atNs": 0, "event": "rebound", "service": "shop/web-1", "backend": "#2", "to": "10.0.0.3:80", "cause": "rst"})
        );
    }

    #[test]
    fn a_suspicion_says_how_long_it_lasts_and_then_that_it_waits_for_a_probe() {
        let now = 1000 << TICK_SHIFT;
        let word = Health::new(State::Ready, 1);
        assert_eq!(suspect_ms(word, now), None);
        let word = word.after(Input::Failed { now: 1000, first: 60, max_level: 5 });
        assert_eq!(suspect_ms(word, now), Some(1006));
        assert_eq!(suspect_ms(word, now * 2), Some(0));
    }
}
