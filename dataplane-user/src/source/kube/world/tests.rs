use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    model::Backend,
    source::kube::{ending::Ending, find::Process},
};

const NODE: &str = "node-1";

/// What was told, as a registry keeps it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    services: BTreeMap<String, crate::model::Service>,
    backends: BTreeMap<(String, String, IpAddr, u16), Backend>,
    pods: BTreeMap<String, crate::model::Pod>,
    nodes: BTreeMap<String, Vec<IpAddr>>,
}

fn key(backend: &Backend) -> (String, String, IpAddr, u16) {
    (backend.service.to_string(), backend.port.to_string(), backend.address, backend.target_port)
}

impl Told {
    fn of(snapshot: Snapshot) -> Self {
        let mut told = Self::default();
        let objects = (snapshot.services.into_iter().map(Object::Service))
            .chain(snapshot.pods.into_iter().map(Object::Pod))
            .chain(snapshot.nodes.into_iter().map(Object::Node))
            .chain(snapshot.backends.into_iter().map(Object::Backend));
        objects.for_each(|object| told.take(Event::Upsert { object }));
        told.settled()
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Upsert { object: Object::Service(service) } => {
                self.services.insert(service.name.to_string(), service);
            }
            Event::Upsert { object: Object::Backend(backend) } => {
                self.backends.insert(key(&backend), backend);
            }
            Event::Upsert { object: Object::Pod(pod) } => {
                self.pods.insert(pod.name.to_string(), pod);
            }
            Event::Upsert { object: Object::Node(node) } => {
                self.nodes.insert(node.name.to_string(), node.addresses);
            }
            Event::Delete { object: Key::Service { name } } => {
                self.services.remove(&*name);
            }
            Event::Delete { object: Key::Backend { service, port, address, target_port } } => {
                self.backends.remove(&(service.to_string(), port.to_string(), address, target_port));
            }
            Event::Delete { object: Key::Pod { name } } => {
                self.pods.remove(&*name);
                self.backends.retain(|_, backend| backend.pod.as_ref() != Some(&name));
            }
            other => panic!("{other:?} is not told"),
        }
    }

    /// Without what makes no difference: pods that are neither enrolled here nor end, and the networks of those that
    /// once were enrolled.
    fn settled(mut self) -> Self {
        self.pods.retain(|_, pod| {
            if !pod.enrolled {
                (pod.pid, pod.gateway) = (None, false);
                pod.addresses.clear();
                pod.labels.clear();
                pod.stop_signals.clear();
            }
            pod.enrolled || pod.terminating
        });
        self
    }
}

fn pod(name: &str, uid: u8, here: bool, mode: &str, end: &str) -> object::Pod {
    let deleted = if end == "deleted" { r#","deletionTimestamp":"2026-01-01T00:00:00Z""# } else { "" };
    let phase = if end == "failed" { "Failed" } else { "Running" };
    let label = if mode.is_empty() { String::new() } else { format!(r#""istio.io/dataplane-mode":"{mode}""#) };
    let node = if here { NODE } else { "node-2" };
    serde_json::from_str(&format!(
        r#"{{"metadata":{{"name":"{name}","namespace":"shop","uid":"{uid:032x}","labels":{{{label}}}{deleted}}},
            "spec":{{"nodeName":"{node}"}},"status":{{"phase":"{phase}","podIPs":[{{"ip":"10.0.0.{uid}"}}]}}}}"#
    ))
    .unwrap()
}

fn service(name: &str, rest: &str) -> object::Service {
    serde_json::from_str(&format!(
        r#"{{"metadata":{{"name":"{name}","namespace":"shop"}},"spec":{{"clusterIPs":["10.96.0.1","fd00::1"],
            "ports":[{{"name":"http","port":80,"nodePort":30080}}]{rest}}}}}"#
    ))
    .unwrap()
}

/// `endpoints`: last byte of the address, pod and uid, conditions, hints.
fn slice(name: &str, service: &str, endpoints: &[String]) -> object::EndpointSlice {
    serde_json::from_str(&format!(
        r#"{{"metadata":{{"name":"{name}","namespace":"shop","labels":{{"kubernetes.io/service-name":"{service}"}}}},
            "addressType":"IPv4","ports":[{{"name":"http","port":8080}}],"endpoints":[{}]}}"#,
        endpoints.join(",")
    ))
    .unwrap()
}

fn endpoint(last: u8, pod: Option<(&str, u8)>, rest: &str) -> String {
    let target = pod.map_or(String::new(), |(name, uid)| {
        format!(r#","targetRef":{{"kind":"Pod","name":"{name}","namespace":"shop","uid":"{uid:032x}"}}"#)
    });
    format!(r#"{{"addresses":["10.0.0.{last}"]{target}{rest}}}"#)
}

/// Something that a watch may say.
#[derive(Clone, Debug)]
enum Said {
    Pod(String, u8, bool, &'static str, &'static str),
    PodGone(String),
    Service(String, &'static str),
    ServiceGone(String),
    Slice(String, String, Vec<String>),
    SliceGone(String),
    Namespace(bool),
    Zone(&'static str),
    Found(String, bool),
}

const RESTS: [&str; 4] =
    ["", r#","internalTrafficPolicy":"Local""#, r#","sessionAffinity":"ClientIP""#, r#","type":"ExternalName""#];

fn said() -> impl Strategy<Value = Said> {
    let name = |kind: &'static str, count: u8| (0..count).prop_map(move |n| format!("{kind}-{n}"));
    let mode = prop::sample::select(vec!["", "ambient", "none"]);
    let end = prop::sample::select(vec!["", "", "deleted", "failed"]);
    let conditions = prop::sample::select(vec![
        "",
        r#","conditions":{"ready":false,"serving":true,"terminating":true}"#,
        r#","conditions":{"ready":false}"#,
        r#","nodeName":"node-1""#,
        r#","hints":{"forZones":[{"name":"a"}]}"#,
        r#","hints":{"forZones":[{"name":"b"}]}"#,
        r#","hints":{"forZones":[{"name":"a"}],"forNodes":[{"name":"node-1"}]}"#,
    ]);
    let one = (1..6_u8, prop::option::of((0..3_u8, 1..4_u8)), conditions).prop_map(|(last, pod, rest)| {
        let name = pod.map(|(n, uid)| (format!("pod-{n}"), uid));
        endpoint(last, name.as_ref().map(|(name, uid)| (name.as_str(), *uid)), rest)
    });
    prop_oneof![
        4 => (name("pod", 3), 1..4_u8, any::<bool>(), mode, end).prop_map(|(n, u, h, m, e)| Said::Pod(n, u, h, m, e)),
        2 => name("pod", 3).prop_map(Said::PodGone),
        2 => (name("web", 2), prop::sample::select(RESTS.to_vec())).prop_map(|(n, r)| Said::Service(n, r)),
        1 => name("web", 2).prop_map(Said::ServiceGone),
        5 => (name("slice", 3), name("web", 2), prop::collection::vec(one, 0..5)).prop_map(|(n, s, e)| Said::Slice(n, s, e)),
        1 => name("slice", 3).prop_map(Said::SliceGone),
        1 => any::<bool>().prop_map(Said::Namespace),
        1 => prop::sample::select(vec!["a", "b"]).prop_map(Said::Zone),
        2 => (name("pod", 3), any::<bool>()).prop_map(|(n, f)| Said::Found(n, f)),
    ]
}

fn scope(here: bool) -> Scope {
    if here { Scope::ThisNode } else { Scope::Others }
}

/// As its watch tells it.
fn put(world: &mut World, pod: &object::Pod, scope: Scope) {
    match scope {
        Scope::ThisNode => world.pod(pod),
        Scope::Others => {
            let spec = object::OtherSpec {
                service_account_name: pod.spec.service_account_name.clone(),
                host_network: pod.spec.host_network,
            };
            let status = object::OtherStatus { phase: pod.status.phase.clone(), pod_ips: pod.status.pod_ips.clone() };
            let object::Meta { name, namespace, uid, resource_version, deletion_timestamp, labels, annotations } =
                pod.metadata.clone();
            let mode = labels.get(object::MODE_LABEL).map(|mode| mode.to_string());
            let labels = object::Labels { mode, ..object::Labels::default() };
            let metadata =
                object::Meta { name, namespace, uid, resource_version, deletion_timestamp, labels, annotations };
            world.other_pod(&object::OtherPod { metadata, spec, status });
        }
    }
}

fn node(zone: &str) -> object::Node {
    serde_json::from_str(&format!(
        r#"{{"metadata":{{"name":"{NODE}","labels":{{"topology.kubernetes.io/zone":"{zone}"}}}},
            "status":{{"addresses":[{{"type":"InternalIP","address":"192.0.2.1"}}]}}}}"#
    ))
    .unwrap()
}

/// What there is, in the end.
#[derive(Debug, Default)]
struct Objects {
    pods: BTreeMap<String, (u8, bool, &'static str, &'static str)>,
    services: BTreeMap<String, &'static str>,
    slices: BTreeMap<String, (String, Vec<String>)>,
    ambient: bool,
    zone: Option<&'static str>,
    found: BTreeMap<String, u8>,
}

impl Objects {
    fn apply(&mut self, world: &mut World, said: &Said) {
        match said.clone() {
            Said::Pod(name, uid, here, mode, end) => {
                if let Some((former, was_here, ..)) = self.pods.insert(name.clone(), (uid, here, mode, end)) {
                    if was_here != here || former != uid {
                        self.found.remove(&name);
                    }
                    put(world, &pod(&name, uid, here, mode, end), scope(here));
                    if was_here != here {
                        // It left the other watch's selection, which may say so late.
                        world.pod_gone(&format!("shop/{name}"), scope(was_here));
                    }
                } else {
                    put(world, &pod(&name, uid, here, mode, end), scope(here));
                }
            }
            Said::PodGone(name) => {
                if let Some((_, here, ..)) = self.pods.remove(&name) {
                    self.found.remove(&name);
                    world.pod_gone(&format!("shop/{name}"), scope(here));
                }
            }
            Said::Service(name, rest) => {
                world.service(&service(&name, rest));
                self.services.insert(name, rest);
            }
            Said::ServiceGone(name) => {
                world.service_gone(&format!("shop/{name}"));
                self.services.remove(&name);
            }
            Said::Slice(name, of, endpoints) => {
                world.slice(&slice(&name, &of, &endpoints));
                self.slices.insert(name, (of, endpoints));
            }
            Said::SliceGone(name) => {
                world.slice_gone(&format!("shop/{name}"));
                self.slices.remove(&name);
            }
            Said::Namespace(ambient) => {
                self.ambient = ambient;
                world.namespace(&namespace(ambient));
            }
            Said::Zone(zone) => {
                self.zone = Some(zone);
                world.own(&node(zone));
            }
            Said::Found(name, found) => {
                let Some((uid, true, ..)) = self.pods.get(&name) else { return };
                let process = found.then_some(Process { pid: 100 + i32::from(*uid), started: 7 });
                world.found(&format!("shop/{name}").into(), &format!("{uid:032x}"), process, Vec::new());
                if found {
                    self.found.insert(name, *uid)
                } else {
                    self.found.remove(&name)
                };
            }
        }
    }

    /// In an order of its own: what refers before what is referred to.
    fn fresh(&self) -> World {
        let mut world = World::new(NODE);
        for (name, (of, endpoints)) in &self.slices {
            world.slice(&slice(name, of, endpoints));
        }
        if let Some(zone) = self.zone {
            world.own(&node(zone));
        }
        for (name, rest) in &self.services {
            world.service(&service(name, rest));
        }
        for (name, &(uid, here, mode, end)) in &self.pods {
            put(&mut world, &pod(name, uid, here, mode, end), scope(here));
        }
        for (name, uid) in &self.found {
            let process = Process { pid: 100 + i32::from(*uid), started: 7 };
            world.found(&format!("shop/{name}").into(), &format!("{uid:032x}"), Some(process), Vec::new());
        }
        world.namespace(&namespace(self.ambient));
        world
    }
}

fn namespace(ambient: bool) -> object::Namespace {
    let label = if ambient { r#""istio.io/dataplane-mode":"ambient""# } else { "" };
    serde_json::from_str(&format!(r#"{{"metadata":{{"name":"shop","labels":{{{label}}}}}}}"#)).unwrap()
}

proptest! {
    #[test]
    fn whatever_the_order_of_words_what_was_told_is_the_snapshot(words in prop::collection::vec(said(), 1..60)) {
        let (mut world, mut told, mut objects) = (World::new(NODE), Told::default(), Objects::default());
        for word in &words {
            objects.apply(&mut world, word);
            for event in world.take().events {
                told.take(event);
            }
            prop_assert_eq!(told.clone().settled(), Told::of(world.snapshot()), "after {:?}", word);
        }
        prop_assert_eq!(told.settled(), Told::of(objects.fresh().snapshot()));
    }

    #[test]
    fn a_list_says_the_same_as_the_events_that_were_missed(
        words in prop::collection::vec(said(), 1..30), missed in prop::collection::vec(said(), 1..30)
    ) {
        let (mut world, mut told, mut objects) = (World::new(NODE), Told::default(), Objects::default());
        for word in &words {
            objects.apply(&mut world, word);
        }
        world.take().events.into_iter().for_each(|event| told.take(event));
        // Nobody hears what happens now, and then everything is listed.
        let mut elsewhere = objects.fresh();
        for word in &missed {
            objects.apply(&mut elsewhere, word);
        }
        let full = |names: Vec<&String>| -> Names { names.iter().map(|n| format!("shop/{n}")).collect() };
        for here in [true, false] {
            let of = objects.pods.iter().filter(|(_, pod)| pod.1 == here);
            for (name, &(uid, _, mode, end)) in of.clone() {
                put(&mut world, &pod(name, uid, here, mode, end), scope(here));
            }
            world.retain_pods(&full(of.map(|(name, _)| name).collect()), scope(here));
        }
        for (name, (of, endpoints)) in &objects.slices {
            world.slice(&slice(name, of, endpoints));
        }
        world.retain_slices(&full(objects.slices.keys().collect()));
        for (name, rest) in &objects.services {
            world.service(&service(name, rest));
        }
        world.retain_services(&full(objects.services.keys().collect()));
        world.namespace(&namespace(objects.ambient));
        if let Some(zone) = objects.zone {
            world.own(&node(zone));
        }
        for (name, &(uid, here, ..)) in &objects.pods {
            let found = objects.found.get(name).map(|uid| Process { pid: 100 + i32::from(*uid), started: 7 });
            if here {
                world.found(&format!("shop/{name}").into(), &format!("{uid:032x}"), found, Vec::new());
            }
        }
        world.take().events.into_iter().for_each(|event| told.take(event));
        prop_assert_eq!(told.settled(), Told::of(objects.fresh().snapshot()));
    }
}

/// A world with service shop/web, pods and a slice of them.
fn web(pods: &[(&str, u8)]) -> World {
    let mut world = World::new(NODE);
    world.service(&service("web", ""));
    for (name, uid) in pods {
        put(&mut world, &pod(name, *uid, false, "", ""), Scope::Others);
    }
    let endpoints: Vec<_> = pods.iter().map(|(name, uid)| endpoint(*uid, Some((name, *uid)), "")).collect();
    world.slice(&slice("s", "web", &endpoints));
    world.take();
    world
}

#[test]
fn a_deletion_timestamp_is_one_event_and_comes_before_any_slice() {
    let mut world = web(&[("a", 1), ("b", 2)]);
    put(&mut world, &pod("a", 1, false, "", "deleted"), Scope::Others);
    let events = world.take().events;
    assert!(
        matches!(&events[..], [Event::Upsert { object: Object::Pod(pod) }] if &*pod.name == "shop/a" && pod.terminating),
        "{events:?}"
    );
}

#[test]
fn an_end_that_is_told_early_is_of_the_life_that_is_known() {
    let mut world = web(&[("a", 1)]);
    fn living(world: &World, name: &str, uid: u8) -> Option<Name> {
        world.living(&Ending { namespace: "shop", name, uid: &format!("{uid:032x}") })
    }
    assert_eq!(living(&world, "a", 1).as_deref(), Some("shop/a"));
    assert_eq!(living(&world, "a", 2), None, "another life of the name");
    assert_eq!(living(&world, "b", 1), None);
    put(&mut world, &pod("a", 1, false, "", "deleted"), Scope::Others);
    assert_eq!(living(&world, "a", 1), None, "it is known");
}

#[test]
fn a_slice_that_still_speaks_of_a_pod_that_is_gone_brings_nothing_back() {
    let mut world = web(&[("a", 1), ("b", 2)]);
    world.pod_gone("shop/a", Scope::Others);
    world.take();
    // Another of its endpoints changes, and the late controller still lists the dead one.
    let not_ready = endpoint(2, Some(("b", 2)), r#","conditions":{"ready":false}"#);
    world.slice(&slice("s", "web", &[endpoint(1, Some(("a", 1)), ""), not_ready]));
    let events = world.take().events;
    assert!(
        matches!(&events[..], [Event::Upsert { object: Object::Backend(b) }] if b.pod.as_deref() == Some("shop/b") && !b.ready),
        "{events:?}"
    );
    // Its name lives on with another uid, at another address: still not the one of the slice.
    put(&mut world, &pod("a", 3, false, "", ""), Scope::Others);
    assert!(world.snapshot().backends.iter().all(|backend| backend.address.to_string() != "10.0.0.1"));
}

#[test]
fn one_changed_endpoint_is_told_alone() {
    let pods: Vec<(String, u8)> = (1..=100).map(|n| (format!("p{n}"), n)).collect();
    let pods: Vec<(&str, u8)> = pods.iter().map(|(name, uid)| (name.as_str(), *uid)).collect();
    let mut world = web(&pods);
    let mut endpoints: Vec<_> = pods.iter().map(|(name, uid)| endpoint(*uid, Some((name, *uid)), "")).collect();
    endpoints[7] = endpoint(8, Some(("p8", 8)), r#","conditions":{"ready":false,"serving":true,"terminating":true}"#);
    world.slice(&slice("s", "web", &endpoints));
    assert_eq!(world.take().events.len(), 1);
    endpoints.remove(7);
    world.slice(&slice("s", "web", &endpoints));
    let events = world.take().events;
    assert!(matches!(&events[..], [Event::Delete { object: Key::Backend { .. } }]), "{events:?}");
}

#[test]
fn a_node_keeps_to_its_zone_while_every_ready_endpoint_has_a_hint() {
    let mut world = World::new(NODE);
    world.service(&service("web", ""));
    world.own(&node("a"));
    let hinted =
        |last: u8, zone: &str| endpoint(last, None, &format!(r#","hints":{{"forZones":[{{"name":"{zone}"}}]}}"#));
    let addresses = |world: &World| -> Vec<String> {
        world.snapshot().backends.iter().map(|backend| backend.address.to_string()).collect()
    };
    world.slice(&slice("s", "web", &[hinted(1, "a"), hinted(2, "b")]));
    assert_eq!(addresses(&world), ["10.0.0.1"]);
    world.slice(&slice("s", "web", &[hinted(1, "a"), hinted(2, "b"), endpoint(3, None, "")]));
    assert_eq!(addresses(&world).len(), 3, "one without a hint: they mean nothing");
    world.own(&node("b"));
    world.slice(&slice("s", "web", &[hinted(1, "a"), hinted(2, "b")]));
    assert_eq!(addresses(&world), ["10.0.0.2"]);
    world.own(&node("c"));
    assert_eq!(addresses(&world).len(), 2, "none for this zone: better afar than nowhere");
}

#[test]
fn endpoints_of_other_nodes_do_not_serve_a_local_service() {
    let mut world = World::new(NODE);
    world.service(&service("web", r#","internalTrafficPolicy":"Local""#));
    let on = |last: u8, node: &str| endpoint(last, None, &format!(r#","nodeName":"{node}""#));
    world.slice(&slice("s", "web", &[on(1, NODE), on(2, "node-2"), endpoint(3, None, "")]));
    assert_eq!(world.snapshot().backends.len(), 1);
    world.service(&service("web", ""));
    assert_eq!(world.snapshot().backends.len(), 3);
}

#[test]
fn with_a_mesh_it_is_told_who_the_enrolled_pods_of_other_nodes_are() {
    let mut world = World::new(NODE).with_mesh(true);
    put(&mut world, &pod("a", 1, false, "", ""), Scope::Others);
    put(&mut world, &pod("b", 2, false, "ambient", ""), Scope::Others);
    put(&mut world, &pod("c", 3, false, "none", ""), Scope::Others);
    let members = |world: &World| -> Vec<String> {
        let enrolled = world.snapshot().pods.into_iter().filter(|pod| pod.enrolled);
        enrolled.map(|pod| format!("{} {} {:?}", pod.name, pod.addresses[0], pod.service_account)).collect()
    };
    assert_eq!(members(&world), [r#"shop/b 10.0.0.2 Some("default")"#]);
    world.take();
    world.namespace(&namespace(true));
    assert_eq!(members(&world).len(), 2, "the namespace enrols, none wins");
    assert_eq!(world.take().events.len(), 1);
    put(&mut world, &pod("b", 2, false, "ambient", "failed"), Scope::Others);
    assert_eq!(members(&world).len(), 1, "what is over has no address any more");
}

#[test]
fn enrolment_follows_the_labels_and_none_wins() {
    let mut world = World::new(NODE);
    let process = Some(Process { pid: 100, started: 7 });
    let enrolled = |world: &World| world.snapshot().pods.iter().any(|pod| pod.enrolled && pod.pid == Some(100));
    put(&mut world, &pod("a", 1, true, "", ""), Scope::ThisNode);
    assert!(world.unfound().is_empty(), "nobody's business");
    world.namespace(&namespace(true));
    let (name, uid) = world.unfound().pop().unwrap();
    assert!(!enrolled(&world), "its network is not known yet");
    world.found(&name, &uid, process, Vec::new());
    assert!(enrolled(&world));
    put(&mut world, &pod("a", 1, true, "none", ""), Scope::ThisNode);
    assert!(!enrolled(&world));
    let told = world.snapshot().pods;
    assert!(told[0].pid == Some(100) && !told[0].enrolled, "moved connections of it live on: {told:?}");
    world.namespace(&namespace(false));
    put(&mut world, &pod("a", 1, true, "ambient", ""), Scope::ThisNode);
    assert!(enrolled(&world), "by its own label");
}

#[test]
fn a_pods_own_network_says_its_addresses_until_the_api_server_does() {
    let mut world = World::new(NODE);
    let mut object = pod("a", 1, true, "ambient", "");
    object.status.pod_ips.clear();
    put(&mut world, &object, Scope::ThisNode);
    let (name, uid) = world.unfound().pop().unwrap();
    let seen: IpAddr = "10.0.0.7".parse().unwrap();
    world.found(&name, &uid, Some(Process { pid: 100, started: 7 }), vec![seen]);
    put(&mut world, &object, Scope::ThisNode);
    assert_eq!(world.snapshot().pods[0].addresses, [seen]);
    put(&mut world, &pod("a", 1, true, "ambient", ""), Scope::ThisNode);
    assert_eq!(world.snapshot().pods[0].addresses, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
}

#[test]
fn a_pod_keeps_what_it_is_stopped_by_and_a_wrong_signal_costs_only_itself() {
    let mut world = World::new(NODE);
    let mut object = pod("a", 1, true, "ambient", "");
    object.spec.containers = serde_json::from_str(r#"[{"lifecycle":{"stopSignal":"SIGQUIT"}},{}]"#).unwrap();
    object.metadata.annotations.stop_signals = Some("USR3, SIGUSR1".into());
    object.metadata.annotations.gateway = Some("true".into());
    put(&mut world, &object, Scope::ThisNode);
    world.found(&"shop/a".into(), &format!("{:032x}", 1), Some(Process { pid: 9, started: 1 }), Vec::new());
    let told = world.snapshot().pods.pop().unwrap();
    assert_eq!(told.stop_signals, ["SIGQUIT", "SIGUSR1", "TERM"]);
    assert!(told.gateway);
    let problems = world.take().problems;
    assert!(problems[0].object == "pod shop/a" && problems[0].reason.contains("\"USR3\" is unknown"), "{problems:?}");
}

#[test]
fn a_container_is_stopped_as_its_image_says_where_nobody_says_otherwise() {
    let mut world = World::new(NODE);
    let mut object = pod("a", 1, true, "", "");
    object.spec.containers =
        serde_json::from_str(r#"[{"name":"x"},{"name":"y","lifecycle":{"stopSignal":"SIGUSR1"}},{"name":"z"}]"#)
            .unwrap();
    object.status.container_statuses = serde_json::from_str(
        r#"[{"name":"x","imageID":"sha256:1"},{"name":"y","imageID":"sha256:2"},{"name":"z","imageID":""}]"#,
    )
    .unwrap();
    let image: Name = "sha256:1".into();
    put(&mut world, &object, Scope::ThisNode);
    world.found(&"shop/a".into(), &format!("{:032x}", 1), Some(Process { pid: 9, started: 1 }), Vec::new());
    assert!(world.unasked().is_empty(), "the pod is not enrolled");
    world.namespace(&namespace(true));
    assert_eq!(world.unasked(), std::slice::from_ref(&image));
    let signals = |world: &World| world.snapshot().pods.pop().unwrap().stop_signals;
    assert_eq!(signals(&world), ["SIGUSR1", "TERM"]);
    world.take();
    world.image(&image, Some("SIGQUIT".into()));
    let told = world.take().events;
    assert!(matches!(&told[..], [Event::Upsert { object: Object::Pod(_) }]), "{told:?}");
    assert_eq!(signals(&world), ["SIGQUIT", "SIGUSR1", "TERM"]);
    assert!(world.unasked().is_empty());
    // The API's own word on what is in force, then the annotation: the image is not asked for.
    object.status.container_statuses[0].stop_signal = Some("SIGINT".into());
    put(&mut world, &object, Scope::ThisNode);
    assert_eq!(signals(&world), ["SIGINT", "SIGUSR1", "TERM"]);
    object.status.container_statuses[0] =
        object::ContainerStatus { name: "x".into(), image_id: "sha256:3".into(), stop_signal: None };
    object.metadata.annotations.stop_signals = Some("HUP".into());
    put(&mut world, &object, Scope::ThisNode);
    assert_eq!(signals(&world), ["HUP", "SIGUSR1", "TERM"]);
    assert!(world.unasked().is_empty());
    // What an image says may be anything.
    object.metadata.annotations.stop_signals = None;
    put(&mut world, &object, Scope::ThisNode);
    world.take();
    world.image(&"sha256:3".into(), Some("$(reboot)".into()));
    assert_eq!(signals(&world), ["SIGUSR1", "TERM"]);
    let problems = world.take().problems;
    assert!(
        problems[0].to_string().starts_with("image sha256:3: stop signal \"$(reboot)\" is unknown"),
        "{problems:?}"
    );
}

#[test]
fn services_are_reached_at_every_address_that_the_api_gives_them() {
    let mut world = World::new(NODE);
    world.own(&node("a"));
    let mut object = service("web", r#","type":"LoadBalancer","externalIPs":["203.0.113.1"]"#);
    object.status.load_balancer = serde_json::from_str(
        r#"{"ingress":[{"ip":"203.0.113.2","ipMode":"VIP"},{"ip":"203.0.113.3","ipMode":"Proxy"},{"hostname":"x"}]}"#,
    )
    .unwrap();
    world.service(&object);
    let told = world.snapshot().services.pop().unwrap();
    let addresses: Vec<_> = told.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.96.0.1", "fd00::1", "203.0.113.1", "203.0.113.2"]);
    assert_eq!((told.node_addresses.len(), told.ports[0].node_port), (1, Some(30_080)));
    object.spec.cluster_ips = vec!["None".into()];
    world.service(&object);
    let told = world.snapshot().services.pop().unwrap();
    assert!(told.headless && told.addresses.is_empty());
    object.spec.kind = Some("ExternalName".into());
    world.service(&object);
    assert!(world.snapshot().services.is_empty());
}

#[test]
fn what_is_wrong_with_a_slice_is_named_and_the_rest_of_it_serves() {
    let mut world = World::new(NODE);
    world.service(&service("web", ""));
    let object: object::EndpointSlice = serde_json::from_str(
        r#"{"metadata":{"name":"s","namespace":"shop","labels":{"kubernetes.io/service-name":"web"}},"addressType":"IPv4",
            "ports":[{"name":"http","port":8080},{"name":"x","port":65536},{"name":"y","port":0},{"name":"z","protocol":"SCTP","port":1}],
            "endpoints":[{"addresses":["10.0.0.1"]},{"addresses":["fd00::2"]},{"addresses":["10.0.0.999"]},{"addresses":[]}]}"#,
    )
    .unwrap();
    world.slice(&object);
    let Taken { events, problems } = world.take();
    let backends: Vec<_> =
        events.iter().filter(|event| matches!(event, Event::Upsert { object: Object::Backend(_) })).collect();
    assert_eq!(backends.len(), 1, "{events:?}");
    let said: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "endpointslice shop/s: port \"x\" is 65536; ports are 1..=65535",
            "endpointslice shop/s: port \"y\" is 0; ports are 1..=65535",
            "endpointslice shop/s: fd00::2 is no IPv4 address: skipped",
            "endpointslice shop/s: \"10.0.0.999\" is no address: skipped",
            "endpointslice shop/s: \"\" is no address: skipped",
        ]
    );
}
