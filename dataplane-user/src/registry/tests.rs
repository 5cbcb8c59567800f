//! The registry's laws, checked against a model of the kernel's maps.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use dataplane_ebpf::{
    abi::{Backend, Endpoint, Frontend, Service, ServiceId, Slot, SlotKey},
    health::{Health, Input, State},
};
use proptest::prelude::*;

use super::{
    change::{Change, Enrollment},
    *,
};
use crate::model::{self, Event, Key, Object, Protocol, ServicePort, Snapshot};

/// The maps, with what must hold after every single write.
#[derive(Clone, Default)]
struct Kernel {
    frontends: HashMap<Endpoint, Frontend>,
    services: HashMap<ServiceId, Service>,
    slots: HashMap<SlotKey, Slot>,
    backends: HashMap<u32, Backend>,
    index: HashMap<Endpoint, u32>,
    health: HashMap<u32, Health>,
    pods: HashMap<u32, Arc<Enrollment>>,
}

impl Kernel {
    fn write(&mut self, changes: &[Change]) {
        for change in changes {
            self.one(change);
            self.check(change);
        }
        self.check_settled();
    }

    fn one(&mut self, change: &Change) {
        match change.clone() {
            Change::PutFrontend(at, frontend) => {
                assert_eq!(frontend.check, at.check());
                assert!(self.services.contains_key(&frontend.service), "a frontend of nothing");
                self.frontends.insert(at, frontend);
            }
            Change::DeleteFrontend(at) => assert!(self.frontends.remove(&at).is_some(), "deleted twice: {at:?}"),
            Change::PutService(service) => drop(self.services.insert(service.id, service)),
            Change::DeleteService(id) => {
                assert!(self.services.remove(&id).is_some());
                assert!(self.frontends.values().all(|frontend| frontend.service != id), "still has a frontend");
            }
            Change::PutSlot(key, slot) => {
                assert_eq!(key.service, slot.service);
                self.slots.insert(key, slot);
            }
            Change::DeleteSlot(key) => assert!(self.slots.remove(&key).is_some(), "deleted twice: {key:?}"),
            Change::AddBackend { id, backend, state } => {
                assert!(id != 0 && !self.backends.contains_key(&id), "{id} lives");
                assert!(self.slots.values().all(|slot| slot.backend != id), "{id} is still referred to");
                let last = self.health.get(&id).map_or(0, |health| health.generation());
                assert_ne!(backend.generation, last, "a new life has a new generation");
                assert!(backend.generation != 0 && backend.generation <= 0xffff);
                assert_eq!(self.index.insert(backend.at, id), None, "one number per endpoint");
                self.backends.insert(id, backend);
                self.health.insert(id, Health::new(state, backend.generation));
            }
            Change::UpdateBackend { id, backend } => {
                let old = self.backends.insert(id, backend).expect("an update is of something that lives");
                assert_eq!((old.at, old.generation), (backend.at, backend.generation));
            }
            Change::RemoveBackend { id, at } => {
                assert_eq!(self.health[&id].state(), State::Gone, "health goes first");
                assert!(self.slots.values().all(|slot| slot.backend != id), "{id} is still referred to");
                assert_eq!(self.backends.remove(&id).map(|backend| backend.at), Some(at));
                self.index.remove(&at);
            }
            Change::Health { id, generation, input } => {
                let health = self.health.get_mut(&id).expect("health of something that lives");
                assert_eq!(health.generation(), generation);
                *health = health.after(input);
            }
            Change::Enroll(pod) => drop(self.pods.insert(pod.pod, pod)),
            Change::Release(id) => assert!(self.pods.remove(&id).is_some(), "released twice"),
        }
    }

    fn check(&self, change: &Change) {
        for service in self.services.values() {
            for index in 0..service.ready + service.terminating {
                let slot = self.slots.get(&SlotKey { service: service.id, index });
                let slot = slot.unwrap_or_else(|| panic!("{change:?} left {service:?} without slot {index}"));
                let backend = self.backends.get(&slot.backend).expect("a slot names a backend that lives");
                assert_eq!(slot.generation, backend.generation);
            }
        }
    }

    fn check_settled(&self) {
        let slots: u32 = self.services.values().map(|service| service.ready + service.terminating).sum();
        assert_eq!(slots as usize, self.slots.len(), "no slot beyond the counts");
        for service in self.services.values() {
            let weights = (0..service.ready + service.terminating)
                .map(|index| self.slots[&SlotKey { service: service.id, index }].weight);
            assert_eq!(service.max_weight, weights.max().unwrap_or(0));
        }
        for backend in self.backends.values() {
            assert!(backend.group == 0 || self.services.contains_key(&backend.group), "a group of nothing");
        }
        for pod in self.pods.values() {
            let members = self.backends.values().filter(|backend| backend.pod == pod.pod).count();
            assert_eq!(self.chain(pod.first_backend).len(), members, "the chain of {} is whole", pod.name);
        }
    }

    fn chain(&self, head: u32) -> BTreeSet<Endpoint> {
        let mut found = BTreeSet::new();
        let mut next = head;
        while next != 0 {
            assert!(found.insert(self.backends[&next].at), "the chain has a loop");
            next = self.backends[&next].next_in_pod;
        }
        found
    }

    fn seed(&self) -> Seed {
        let (living, gone): (Vec<_>, Vec<_>) = self.health.iter().partition(|(id, _)| self.backends.contains_key(id));
        Seed {
            frontends: self.frontends.iter().map(|(k, v)| (*k, *v)).collect(),
            services: self.services.values().copied().collect(),
            slots: self.slots.iter().map(|(k, v)| (*k, *v)).collect(),
            backends: living.iter().map(|(id, health)| (**id, self.backends[id], **health)).collect(),
            retired: gone.iter().map(|(id, health)| (**id, health.generation())).collect(),
            last_pod: self.pods.keys().copied().max().unwrap_or(0),
        }
    }
}

type Terms = (u32, u32, u32, Vec<(Endpoint, u32)>, Vec<(Endpoint, u32)>);

/// The kernel's state without numbers and orders.
#[derive(Debug, PartialEq)]
struct Canonical {
    services: BTreeMap<String, Terms>,
    frontends: BTreeMap<Endpoint, String>,
    backends: BTreeMap<Endpoint, (u32, Option<String>, String, bool)>,
    pods: BTreeMap<String, (String, u32, u64, BTreeSet<Endpoint>)>,
}

fn label(registry: &Registry, id: ServiceId) -> String {
    let name = |id| {
        let (port, family) = registry.service_ports[&id];
        let port = &registry.ports[port];
        format!("{}:{}/{family:?}", registry.services[port.service].name, port.name)
    };
    match registry.group_set(id) {
        _ if id == 0 => String::new(),
        None => name(id),
        Some(set) => {
            let mut names: Vec<_> = set.iter().map(|&id| name(id)).collect();
            names.sort();
            names.join("&")
        }
    }
}

fn canonical(kernel: &Kernel, registry: &Registry) -> Canonical {
    let slots = |service: &Service, range: std::ops::Range<u32>| {
        let mut found: Vec<_> = range
            .map(|index| kernel.slots[&SlotKey { service: service.id, index }])
            .map(|slot| (kernel.backends[&slot.backend].at, slot.weight))
            .collect();
        found.sort();
        found
    };
    let pod_name = |id: u32| kernel.pods.get(&id).map(|pod| pod.name.to_string());
    Canonical {
        services: kernel
            .services
            .values()
            .map(|service| {
                let ready = slots(service, 0..service.ready);
                let terminating = slots(service, service.ready..service.ready + service.terminating);
                let terms = (service.flags, service.affinity_s, service.max_weight, ready, terminating);
                (label(registry, service.id), terms)
            })
            .collect(),
        frontends: kernel.frontends.iter().map(|(at, front)| (*at, label(registry, front.service))).collect(),
        backends: kernel
            .backends
            .iter()
            .map(|(id, backend)| {
                let pod = (backend.pod != 0).then(|| pod_name(backend.pod).expect("a backend's pod is enrolled"));
                let terms = (backend.flags, pod, label(registry, backend.group), kernel.health[id].terminating());
                (backend.at, terms)
            })
            .collect(),
        pods: kernel
            .pods
            .values()
            .map(|pod| {
                let terms = (format!("{:?}", pod.netns), pod.flags, pod.stop_signals, kernel.chain(pod.first_backend));
                (pod.name.to_string(), terms)
            })
            .collect(),
    }
}

/// What is desired, kept the plain way.
#[derive(Clone, Debug, Default)]
struct Desired {
    services: BTreeMap<String, model::Service>,
    backends: BTreeMap<(String, String, IpAddr, u16), model::Backend>,
    pods: BTreeMap<String, model::Pod>,
}

impl Desired {
    fn apply(&mut self, event: &Event) {
        match event.clone() {
            Event::Upsert { object } => self.upsert(object),
            Event::Delete { object: Key::Service { name } } => drop(self.services.remove(&*name)),
            Event::Delete { object: Key::Pod { name } } => {
                self.pods.remove(&*name);
                self.backends.retain(|_, backend| backend.pod.as_ref() != Some(&name));
            }
            Event::Delete { object: Key::Backend { service, port, address, target_port } } => {
                self.backends.remove(&(service.to_string(), port.to_string(), address, target_port));
            }
            Event::Delete { object: Key::Node { .. } } => {}
            Event::Sync { state } => {
                *self = Self::default();
                state.services.into_iter().map(Object::Service).for_each(|object| self.upsert(object));
                state.backends.into_iter().map(Object::Backend).for_each(|object| self.upsert(object));
                state.pods.into_iter().map(Object::Pod).for_each(|object| self.upsert(object));
            }
        }
    }

    fn upsert(&mut self, object: Object) {
        match object {
            Object::Service(service) => drop(self.services.insert(service.name.to_string(), service)),
            Object::Backend(backend) => {
                let key = (backend.service.to_string(), backend.port.to_string(), backend.address, backend.target_port);
                self.backends.insert(key, backend);
            }
            Object::Pod(pod) => drop(self.pods.insert(pod.name.to_string(), pod)),
            Object::Node(_) => {}
        }
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            services: self.services.values().cloned().collect(),
            backends: self.backends.values().cloned().collect(),
            pods: self.pods.values().cloned().collect(),
            nodes: Vec::new(),
        }
    }
}

/// A registry with its kernel.
struct Node {
    registry: Registry,
    kernel: Kernel,
}

impl Node {
    fn new(kernel: Kernel) -> Self {
        Self { registry: Registry::new(kernel.seed()), kernel }
    }

    /// The urgent changes, which are also written; then the rest.
    fn apply(&mut self, event: Event) -> (Vec<Change>, Vec<Problem>) {
        self.foretell(&event);
        let mut urgent = Vec::new();
        let mut problems = self.registry.apply(event, &mut urgent);
        self.kernel.write(&urgent);
        let mut rest = Vec::new();
        problems.extend(self.registry.settle(&mut rest));
        self.kernel.write(&rest);
        (urgent, problems)
    }

    /// A pod's end is told twice: what comes early is what the event itself will say.
    fn foretell(&mut self, event: &Event) {
        let Event::Upsert { object: Object::Pod(pod) } = event else { return };
        let mut early = Vec::new();
        if pod.terminating {
            self.registry.pod_ends(&pod.name, &mut early);
        }
        assert!(early.iter().all(|change| matches!(change, Change::Health { input: Input::Terminating { .. }, .. })));
        self.kernel.write(&early);
    }

    fn canonical(&self) -> Canonical {
        canonical(&self.kernel, &self.registry)
    }
}

/// All that the registry tells.
fn dump(registry: &Registry) -> Snapshot {
    let mut parts = registry.parts();
    parts.sort_unstable();
    parts.iter().flat_map(|part| registry.told(part)).collect()
}

fn names(kind: &'static str, count: u8) -> impl Strategy<Value = Arc<str>> {
    (0..count).prop_map(move |n| Arc::from(format!("{kind}{n}")))
}

fn port_name() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![Just(Arc::from("")), Just(Arc::from("b"))]
}

fn vip() -> impl Strategy<Value = IpAddr> {
    prop::sample::select(vec!["10.96.0.1", "10.96.0.2", "10.96.0.3", "fd00:96::1", "fd00:96::2"])
        .prop_map(|text| text.parse().unwrap())
}

fn pod_ip() -> impl Strategy<Value = IpAddr> {
    prop::sample::select(vec!["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "fd00::1", "fd00::2"])
        .prop_map(|text| text.parse().unwrap())
}

fn service() -> impl Strategy<Value = model::Service> {
    let addresses = prop::collection::btree_set(vip(), 0..3);
    let ports = prop_oneof![Just(vec![0]), Just(vec![1]), Just(vec![0, 1]), Just(vec![2])];
    (names("s", 4), addresses, ports, prop::bool::weighted(0.1), 0_u32..2).prop_map(
        |(name, addresses, ports, headless, affinity)| model::Service {
            name,
            addresses: addresses.into_iter().collect(),
            ports: ports
                .into_iter()
                .map(|n| match n {
                    0 => ServicePort { name: "".into(), port: 80, protocol: Protocol::Tcp, node_port: Some(30_080) },
                    1 => ServicePort { name: "b".into(), port: 81, protocol: Protocol::Tcp, node_port: None },
                    _ => ServicePort { name: "b".into(), port: 81, protocol: Protocol::Udp, node_port: None },
                })
                .collect(),
            affinity_seconds: affinity,
            headless,
            node_addresses: vec!["192.0.2.1".parse().unwrap()],
        },
    )
}

fn backend() -> impl Strategy<Value = model::Backend> {
    let states = (prop::bool::weighted(0.8), prop::bool::weighted(0.8), prop::bool::weighted(0.2));
    (names("s", 4), port_name(), pod_ip(), 8080_u16..8082, prop::option::of(names("p", 3)), states, 1_u16..4).prop_map(
        |(service, port, address, target_port, pod, (ready, serving, terminating), weight)| model::Backend {
            service,
            port,
            address,
            target_port,
            pod,
            ready,
            serving,
            terminating,
            weight,
        },
    )
}

fn pod() -> impl Strategy<Value = model::Pod> {
    let flags = (any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.2));
    (names("p", 3), prop::option::of(1_i32..3), flags).prop_map(|(name, pid, (enrolled, gateway, terminating))| {
        model::Pod {
            name,
            addresses: Vec::new(),
            netns: None,
            pid,
            enrolled,
            gateway,
            labels: BTreeMap::new(),
            stop_signals: Vec::new(),
            service_account: None,
            terminating,
        }
    })
}

fn event() -> impl Strategy<Value = Event> {
    let snapshot = (
        prop::collection::vec(service(), 0..5),
        prop::collection::vec(backend(), 0..12),
        prop::collection::vec(pod(), 0..3),
    );
    let sync = snapshot.prop_map(|(services, backends, pods)| {
        // Declared once each.
        let mut desired = Desired::default();
        desired.apply(&Event::Sync { state: Snapshot { services, backends, pods, nodes: Vec::new() } });
        Event::Sync { state: desired.snapshot() }
    });
    let delete_backend = backend().prop_map(|backend| Key::Backend {
        service: backend.service,
        port: backend.port,
        address: backend.address,
        target_port: backend.target_port,
    });
    prop_oneof![
        4 => service().prop_map(|service| Event::Upsert { object: Object::Service(service) }),
        10 => backend().prop_map(|backend| Event::Upsert { object: Object::Backend(backend) }),
        3 => pod().prop_map(|pod| Event::Upsert { object: Object::Pod(pod) }),
        1 => names("s", 4).prop_map(|name| Event::Delete { object: Key::Service { name } }),
        4 => delete_backend.prop_map(|object| Event::Delete { object }),
        1 => names("p", 3).prop_map(|name| Event::Delete { object: Key::Pod { name } }),
        1 => sync,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_way_the_same_desired_state_is_the_same_kernel_state(
        events in prop::collection::vec(event(), 0..60),
        duplicate in any::<bool>(),
    ) {
        let mut node = Node::new(Kernel::default());
        let mut desired = Desired::default();
        for event in events {
            desired.apply(&event);
            node.apply(event.clone());
            if duplicate {
                node.apply(event);
            }
        }
        let mut fresh = Node::new(Kernel::default());
        fresh.apply(Event::Sync { state: desired.snapshot() });
        prop_assert_eq!(node.canonical(), fresh.canonical());

        // Saying the same again writes nothing.
        let (again, _) = node.apply(Event::Sync { state: desired.snapshot() });
        prop_assert_eq!(again, vec![]);
    }

    #[test]
    fn the_state_that_is_told_makes_the_same_kernel_state_and_is_told_again(
        events in prop::collection::vec(event(), 1..40),
    ) {
        let mut node = Node::new(Kernel::default());
        node.apply(Event::Sync { state: Snapshot::default() });
        for event in events {
            node.apply(event);
        }
        let told = dump(&node.registry);
        let mut again = Node::new(Kernel::default());
        let state = told.clone();
        again.apply(Event::Sync { state });
        prop_assert_eq!(again.canonical(), node.canonical());
        prop_assert_eq!(dump(&again.registry), told);
    }

    #[test]
    fn a_restart_adopts_what_stays_and_removes_what_does_not(
        before in prop::collection::vec(event(), 0..40),
        between in prop::collection::vec(event(), 0..6),
        after in prop::collection::vec(event(), 0..10),
    ) {
        let mut node = Node::new(Kernel::default());
        let mut desired = Desired::default();
        for event in before {
            desired.apply(&event);
            node.apply(event);
        }
        let old = node.kernel;
        for event in &between {
            desired.apply(event);
        }
        // Pods are enrolled anew; the kernel side knows which network namespaces it has.
        let mut node = Node::new(Kernel { pods: HashMap::new(), ..old.clone() });
        node.apply(Event::Sync { state: desired.snapshot() });
        for (at, id) in &old.index {
            if let Some(now) = node.kernel.index.get(at) {
                prop_assert_eq!(now, id, "the same endpoint keeps its number");
                let generation = old.backends[id].generation;
                prop_assert_eq!(node.kernel.backends[id].generation, generation, "and its generation");
            }
        }
        for event in after {
            desired.apply(&event);
            node.apply(event);
        }
        let mut fresh = Node::new(Kernel::default());
        fresh.apply(Event::Sync { state: desired.snapshot() });
        prop_assert_eq!(node.canonical(), fresh.canonical());
    }
}

fn web(addresses: &[&str]) -> model::Service {
    model::Service {
        name: "shop/web".into(),
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        ports: vec![ServicePort { name: "".into(), port: 80, protocol: Protocol::Tcp, node_port: None }],
        affinity_seconds: 0,
        headless: false,
        ..model::Service::default()
    }
}

fn web_backend(n: u32) -> model::Backend {
    let [_, _, c, d] = n.to_be_bytes();
    model::Backend {
        service: "shop/web".into(),
        port: "".into(),
        address: IpAddr::from([10, 1, c, d]),
        target_port: 8080,
        pod: Some(format!("shop/web-{n}").into()),
        ready: true,
        serving: true,
        terminating: false,
        weight: 1,
    }
}

fn storm(backends: u32) -> Node {
    let mut node = Node::new(Kernel::default());
    let state = Snapshot {
        services: vec![web(&["10.96.0.1"])],
        backends: (1..=backends).map(web_backend).collect(),
        ..Snapshot::default()
    };
    node.apply(Event::Sync { state });
    node
}

fn upsert(object: Object) -> Event {
    Event::Upsert { object }
}

#[test]
fn a_deletion_is_a_handful_of_writes_the_first_of_which_does_it() {
    let mut node = storm(500);
    let id = node.kernel.index[&address::endpoint("10.1.0.7".parse().unwrap(), 8080, Protocol::Tcp)];
    let (changes, _) = node.apply(Event::Delete { object: Key::Pod { name: "shop/web-7".into() } });
    assert!(matches!(changes[0], Change::Health { id: first, input: Input::Removed, .. } if first == id));
    assert!(changes.len() <= 6, "{changes:?}");
}

#[test]
fn a_terminating_pod_is_marked_before_its_slot_moves() {
    let mut node = storm(500);
    let mut pod = model::Pod {
        name: "shop/web-7".into(),
        addresses: Vec::new(),
        netns: None,
        pid: None,
        enrolled: true,
        gateway: false,
        labels: BTreeMap::new(),
        stop_signals: Vec::new(),
        service_account: None,
        terminating: true,
    };
    let mut early = Vec::new();
    node.registry.pod_ends(&pod.name, &mut early);
    let (changes, _) = node.apply(upsert(Object::Pod(pod.clone())));
    assert!(matches!(changes[0], Change::Health { input: Input::Terminating { serving: true }, .. }));
    assert_eq!(format!("{early:?}"), format!("{:?}", &changes[..1]), "what is told early is the first of what follows");
    assert!(changes.len() <= 4, "{changes:?}");
    let service = node.kernel.services.values().next().unwrap();
    assert_eq!((service.ready, service.terminating), (499, 1));

    pod.terminating = false;
    let (changes, _) = node.apply(upsert(Object::Pod(pod)));
    assert!(matches!(changes[0], Change::Health { input: Input::NotTerminating, .. }));
    assert_eq!(node.kernel.services.values().next().unwrap().ready, 500);
}

#[test]
fn a_backend_that_is_not_ready_leaves_the_slots_but_lives_on() {
    let mut node = storm(3);
    let unready = model::Backend { ready: false, ..web_backend(2) };
    let (changes, _) = node.apply(upsert(Object::Backend(unready)));
    assert!(!changes.iter().any(|change| matches!(change, Change::RemoveBackend { .. } | Change::Health { .. })));
    let service = node.kernel.services.values().next().unwrap();
    assert_eq!((service.ready, service.terminating, node.kernel.backends.len()), (2, 0, 3));
}

#[test]
fn the_first_sync_of_a_restart_with_nothing_new_writes_nothing() {
    let node = storm(50);
    let mut again = Node::new(node.kernel);
    let state = Snapshot {
        services: vec![web(&["10.96.0.1"])],
        backends: (1..=50).map(web_backend).collect(),
        ..Snapshot::default()
    };
    let (changes, problems) = again.apply(Event::Sync { state });
    assert_eq!((changes, problems), (vec![], vec![]));
}

#[test]
fn a_relist_avoids_the_deleted_at_once_and_never_empties_a_service() {
    let mut node = storm(3);
    let state = Snapshot {
        services: vec![web(&["10.96.0.1"])],
        backends: (11..=13).map(web_backend).collect(),
        ..Snapshot::default()
    };
    let mut changes = Vec::new();
    node.registry.apply(Event::Sync { state }, &mut changes);
    let refusing = |change: &Change| matches!(change, Change::Health { input: Input::Terminating { .. }, .. });
    assert!(changes[..3].iter().all(refusing), "{changes:?}");
    for change in &changes {
        node.kernel.one(change);
        let service = node.kernel.services.values().next().unwrap();
        assert!(service.ready >= 3, "{change:?} left {service:?}");
    }
}

#[test]
fn a_gateway_moves_only_among_those_that_share_all_services() {
    let mut node = storm(3);
    let mut api = web(&["10.96.0.2"]);
    api.name = "shop/api".into();
    node.apply(upsert(Object::Service(api)));
    for n in [1, 2] {
        node.apply(upsert(Object::Backend(model::Backend { service: "shop/api".into(), ..web_backend(n) })));
    }
    let group = |node: &Node, n: u32| {
        let at = address::endpoint(web_backend(n).address, 8080, Protocol::Tcp);
        let id = node.kernel.backends[&node.kernel.index[&at]].group;
        let service = node.kernel.services[&id];
        (0..service.ready)
            .map(|index| node.kernel.slots[&SlotKey { service: id, index }].backend)
            .map(|id| address::socket(&node.kernel.backends[&id].at).to_string())
            .collect::<BTreeSet<_>>()
    };
    let shared = BTreeSet::from(["10.1.0.1:8080".to_owned(), "10.1.0.2:8080".to_owned()]);
    assert_eq!(group(&node, 1), shared);
    assert_eq!(group(&node, 2), shared);
    assert_eq!(group(&node, 3).len(), 3, "who is only in one service may go anywhere in it");
}

#[test]
fn conflicts_and_mistakes_are_named_and_the_rest_goes_on() {
    let mut node = storm(1);
    let mut thief = web(&["10.96.0.1"]);
    thief.name = "shop/zzz".into();
    let (_, problems) = node.apply(upsert(Object::Service(thief.clone())));
    assert_eq!(
        problems[0].to_string(),
        "service shop/zzz: 10.96.0.1:80 belongs to service shop/web already: not served here"
    );

    let state = Snapshot {
        services: vec![web(&["10.96.0.1"]), web(&["10.96.0.9"])],
        backends: vec![
            web_backend(1),
            model::Backend { weight: 0, ..web_backend(2) },
            model::Backend { service: "shop/nobody".into(), ..web_backend(3) },
            model::Backend { port: "grpc".into(), ..web_backend(4) },
            model::Backend { address: "fd00::5".parse().unwrap(), ..web_backend(5) },
            model::Backend { address: "0.0.0.0".parse().unwrap(), ..web_backend(6) },
        ],
        ..Snapshot::default()
    };
    let (_, problems) = node.apply(Event::Sync { state });
    let mut said: Vec<_> = problems.iter().map(ToString::to_string).collect();
    said.sort();
    assert_eq!(
        said,
        [
            "backend 0.0.0.0:8080 of shop/web: address 0.0.0.0 is unspecified: nobody can connect to it",
            "backend 10.1.0.2:8080 of shop/web: weight is 0; weights are 1..=65535 (leave the backend out to give it no connections)",
            "backend 10.1.0.3:8080 of shop/nobody: there is no service shop/nobody",
            "backend 10.1.0.4:8080 of shop/web:grpc: service shop/web has no port \"grpc\"; its ports are \"\"",
            "backend [fd00::5]:8080 of shop/web: service shop/web has no IPv6 address",
            "service shop/web: declared twice: the first is in force",
        ]
    );
    assert_eq!(node.kernel.backends.len(), 1);
}

#[test]
fn full_maps_are_named_and_lose_nothing_that_is_in_force() {
    let limits = Limits { frontends: 8, services: 8, slots: 4, backends: 3 };
    let registry = Registry::with_limits(Seed::default(), limits);
    let mut node = Node { registry, kernel: Kernel::default() };
    node.apply(upsert(Object::Service(web(&["10.96.0.1"]))));
    for n in 1..=2 {
        assert_eq!(node.apply(upsert(Object::Backend(web_backend(n)))).1, vec![]);
    }
    let (changes, problems) = node.apply(upsert(Object::Backend(web_backend(3))));
    assert_eq!(changes, vec![]);
    assert!(problems[0].reason.contains("map BACKENDS is full (3 elements): raise sizes.backends"), "{problems:?}");
    assert_eq!(node.kernel.services.values().next().unwrap().ready, 2);

    node.apply(Event::Delete { object: Key::Pod { name: "shop/web-1".into() } });
    assert_eq!(node.apply(upsert(Object::Backend(web_backend(3)))).1, vec![], "room again");
}
