//! The choice: fair among the live ones, then terminating ones, then open; affinity; gateways.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use dataplane_ebpf::{
    abi::{Backend, POD_GATEWAY, SERVICE_PINNED, Service, Slot, SlotKey, Stat},
    health::Input,
};
use dataplane_user::registry::change::Change;

use crate::{
    node::{Node, Served, TCP},
    translate::{greeter, greeting},
};

const FOUR: [&str; 4] = ["10.99.0.1:8080", "10.99.0.2:8080", "10.99.0.3:8080", "10.99.0.4:8080"];

fn mark(node: &mut Node, backend: &(u32, Backend), input: Input) {
    node.write(&[Change::Health { id: backend.0, generation: backend.1.generation, input }]);
}

/// How many of `connects` each backend got.
fn shares(node: &Node, service: &Served, connects: u32) -> BTreeMap<String, u32> {
    node.inside(|| {
        let mut got = BTreeMap::new();
        for _ in 0..connects {
            *got.entry(greeting(service.at).expect("connect")).or_insert(0) += 1;
        }
        got
    })
}

/// Pearson's chi-square against `expected` shares (which need not sum to anything). 21.1 is its
/// 99.99th percentile with three degrees of freedom.
fn assert_fair(got: &BTreeMap<String, u32>, expected: &[(&str, f64)]) {
    let all: f64 = got.values().map(|&n| f64::from(n)).sum();
    let weights: f64 = expected.iter().map(|(_, weight)| weight).sum();
    assert!(got.keys().all(|at| expected.iter().any(|(expected, _)| at == expected)), "{got:?}");
    let chi_square: f64 = expected
        .iter()
        .map(|(at, weight)| {
            let wanted = all * weight / weights;
            (f64::from(*got.get(*at).unwrap_or(&0)) - wanted).powi(2) / wanted
        })
        .sum();
    assert!(chi_square < 21.1, "chi-square {chi_square:.1} for {got:?}");
}

#[test]
fn a_skipped_backends_share_goes_to_all_others_by_weight() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve_with("10.96.0.1:80", TCP, &FOUR, |service, slots| {
        service.max_weight = 4;
        for (slot, weight) in slots.iter_mut().zip([1, 2, 4, 4]) {
            slot.weight = weight;
        }
    });
    node.inside(|| FOUR.into_iter().for_each(greeter));
    let all = shares(&node, &service, 2000);
    assert_fair(&all, &[(FOUR[0], 1.0), (FOUR[1], 2.0), (FOUR[2], 4.0), (FOUR[3], 4.0)]);
    mark(&mut node, &service.backends[2], Input::StopSignal);
    let rest = shares(&node, &service, 2000);
    assert_fair(&rest, &[(FOUR[0], 1.0), (FOUR[1], 2.0), (FOUR[3], 4.0)]);
    assert!(node.counter(Stat::Skipped) > 0);
}

#[test]
fn the_only_live_backend_of_many_is_found() {
    let mut node = Node::new(0, |_| {});
    let ats: Vec<String> = (0..48).map(|n| format!("10.99.0.{}:{}", n % 8 + 1, 7000 + n)).collect();
    let service = node.serve("10.96.0.1:80", TCP, &ats.iter().map(String::as_str).collect::<Vec<_>>());
    node.inside(|| greeter(&ats[31]));
    for (index, backend) in service.backends.clone().iter().enumerate() {
        if index != 31 {
            mark(&mut node, backend, Input::ListenerClosed);
        }
    }
    assert_eq!(shares(&node, &service, 200), BTreeMap::from([(ats[31].clone(), 200)]));
}

/// KEP-1669: terminating backends that serve are better than none.
#[test]
fn terminating_backends_serve_only_when_no_other_is_live() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve_with("10.96.0.1:80", TCP, &FOUR, |service, _| {
        (service.ready, service.terminating) = (2, 2);
    });
    node.inside(|| FOUR.into_iter().for_each(greeter));
    assert_fair(&shares(&node, &service, 500), &[(FOUR[0], 1.0), (FOUR[1], 1.0)]);
    for backend in &service.backends[..2] {
        mark(&mut node, backend, Input::ListenerClosed);
    }
    assert_fair(&shares(&node, &service, 500), &[(FOUR[2], 1.0), (FOUR[3], 1.0)]);
    assert_eq!(node.counter(Stat::ServingTerminating), 500);
}

#[test]
fn with_nothing_live_the_choice_fails_open() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &FOUR[..1]);
    node.inside(|| greeter(FOUR[0]));
    mark(&mut node, &service.backends[0], Input::ListenerClosed);
    // The health word was wrong (the listener is there): an attempt is worth more than an error.
    assert_eq!(shares(&node, &service, 3), BTreeMap::from([(FOUR[0].to_owned(), 3)]));
    assert_eq!(node.counter(Stat::FailedOpen), 3);
}

#[test]
fn without_layers_the_choice_is_the_classic_one() {
    let mut node = Node::new(0, |settings| settings.layers = 0);
    let service = node.serve("10.96.0.1:80", TCP, &FOUR[..2]);
    node.inside(|| FOUR[..2].iter().copied().for_each(greeter));
    mark(&mut node, &service.backends[0], Input::ListenerClosed);
    assert_fair(&shares(&node, &service, 500), &[(FOUR[0], 1.0), (FOUR[1], 1.0)]);
}

#[test]
fn a_stale_slot_is_passed_over() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &FOUR[..2]);
    node.inside(|| FOUR[..2].iter().copied().for_each(greeter));
    let (backend, entry) = service.backends[0];
    let slot = Slot { backend, generation: entry.generation + 1, service: service.service.id, weight: 1 };
    node.write(&[Change::PutSlot(SlotKey { service: service.service.id, index: 0 }, slot)]);
    assert_eq!(shares(&node, &service, 50), BTreeMap::from([(FOUR[1].to_owned(), 50)]));
    assert!(node.counter(Stat::StaleSlot) > 0);
}

#[test]
fn affinity_holds_while_the_backend_lives_and_until_its_time_is_over() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve_with("10.96.0.1:80", TCP, &FOUR, |service, _| service.affinity_s = 1);
    node.inside(|| FOUR.into_iter().for_each(greeter));
    let sticks = |node: &Node| {
        let got = shares(node, &service, 50);
        assert_eq!(got.len(), 1, "{got:?}");
        got.into_keys().next().expect("one backend")
    };
    let first = sticks(&node);
    let index = FOUR.iter().position(|at| *at == first).expect("its index");
    mark(&mut node, &service.backends[index], Input::StopSignal);
    let second = sticks(&node);
    assert_ne!(second, first, "a draining backend is left");
    assert!(node.counter(Stat::AffinityHit) >= 90);
    // After its second each choice is free again: 40 times the same one would be a chance of 3^-39.
    let free = (0..40).any(|_| {
        std::thread::sleep(Duration::from_millis(1_050));
        sticks(&node) != second
    });
    assert!(free, "affinity never ended");
}

#[test]
fn affinity_ends_when_the_backend_leaves_the_service_alive() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve_with("10.96.0.1:80", TCP, &FOUR, |service, _| service.affinity_s = 600);
    node.inside(|| FOUR.into_iter().for_each(greeter));
    let first = shares(&node, &service, 1).into_keys().next().expect("one backend");
    let index = FOUR.iter().position(|at| *at == first).expect("its index");
    // Swapped with the last slot, as the registry takes one out. What moves to its place stays known.
    let Service { id, ready, .. } = service.service;
    let last = service.backends[3];
    let slot = Slot { backend: last.0, generation: last.1.generation, service: id, weight: 1 };
    node.write(&[
        Change::PutSlot(SlotKey { service: id, index: index as u32 }, slot),
        Change::PutService(Service { ready: ready - 1, ..service.service }),
        Change::DeleteSlot(SlotKey { service: id, index: ready - 1 }),
    ]);
    let got = shares(&node, &service, 50);
    assert_eq!(got.len(), 1, "{got:?}");
    assert!(!got.contains_key(&first), "it is not ready any more");
}

/// The backends are one group, as the registry makes it for backends that share all services.
fn group(node: &mut Node, service: &Served, flags: u32) {
    let id = node.next_service();
    let mut changes = vec![Change::PutService(Service { id, flags, ..service.service })];
    for (index, (backend, entry)) in service.backends.iter().enumerate() {
        let slot = Slot { backend: *backend, generation: entry.generation, service: id, weight: 1 };
        changes.push(Change::PutSlot(SlotKey { service: id, index: index as u32 }, slot));
        changes.push(Change::UpdateBackend { id: *backend, backend: Backend { group: id, ..*entry } });
    }
    node.write(&changes);
}

#[test]
fn a_gateways_connect_to_a_dying_pod_reaches_its_sibling() {
    let mut node = Node::new(POD_GATEWAY, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &FOUR[..2]);
    group(&mut node, &service, 0);
    node.inside(|| FOUR[..2].iter().copied().for_each(greeter));
    let pod: SocketAddr = FOUR[0].parse().expect("an address");
    let ask = |node: &Node| node.inside(|| greeting(pod).expect("connect"));
    assert_eq!(ask(&node), FOUR[0], "a live pod is the one that was named");
    mark(&mut node, &service.backends[0], Input::StopSignal);
    assert_eq!(ask(&node), FOUR[1]);
    let named = node.inside(|| TcpStream::connect(pod).expect("connect").peer_addr().expect("a peer"));
    assert_eq!(named, pod, "the gateway is told what it asked for");
    mark(&mut node, &service.backends[1], Input::StopSignal);
    assert_eq!(ask(&node), FOUR[0], "a sibling that is no better is no reason to move");
    assert_eq!(node.counter(Stat::Direct), 4);
}

#[test]
fn what_is_named_by_pod_address_is_never_moved_for_anybody_but_a_gateway() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &FOUR[..2]);
    group(&mut node, &service, 0);
    node.inside(|| FOUR[..2].iter().copied().for_each(greeter));
    mark(&mut node, &service.backends[0], Input::ListenerClosed);
    let pod: SocketAddr = FOUR[0].parse().expect("an address");
    assert_eq!(node.inside(|| greeting(pod).expect("connect")), FOUR[0]);
    assert_eq!(node.counter(Stat::Direct), 0);
}

#[test]
fn a_gateways_connect_to_a_headless_pod_is_never_moved() {
    let mut node = Node::new(POD_GATEWAY, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &FOUR[..2]);
    group(&mut node, &service, SERVICE_PINNED);
    node.inside(|| FOUR[..2].iter().copied().for_each(greeter));
    mark(&mut node, &service.backends[0], Input::ListenerClosed);
    let pod: SocketAddr = FOUR[0].parse().expect("an address");
    assert_eq!(node.inside(|| greeting(pod).expect("connect")), FOUR[0]);
    assert_eq!(node.counter(Stat::Direct), 0);
}
