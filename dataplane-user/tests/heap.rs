//! What a large cluster costs the agent's heap. A process of its own: the allocator's count is the process's.

#![cfg(target_env = "gnu")]

use std::net::Ipv4Addr;

use dataplane_user::{
    kernel::trim_heap,
    model::Event,
    registry::{Registry, Seed},
    source::kube::{
        object::{EndpointSlice, Object, OtherPod, Service},
        world::{Scope, World},
    },
};

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 100_000;
const PER_SLICE: u32 = ENDPOINTS / SERVICES;

/// Bytes that are allocated and not freed, in whatever arena.
fn in_use() -> usize {
    // SAFETY: it takes no arguments, and returns a plain struct of numbers.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

fn read<T: Object>(json: &str) -> T {
    serde_json::from_str(json).unwrap()
}

fn pod(n: u32) -> OtherPod {
    read(&format!(
        r#"{{"metadata":{{"name":"s{n}-6d4cf56db6-x7k2p","namespace":"default","uid":"0f6a4a3c-7e0d-4c55-9d8e-{n:012x}"}},
            "spec":{{"nodeName":"node-2","serviceAccountName":"default"}},
            "status":{{"phase":"Running","podIPs":[{{"ip":"{}"}}]}}}}"#,
        address(n)
    ))
}

fn service(n: u32) -> Service {
    read(&format!(
        r#"{{"metadata":{{"name":"s{n}","namespace":"default"}},
            "spec":{{"clusterIP":"{0}","clusterIPs":["{0}"],"ports":[{{"name":"","port":80,"protocol":"TCP"}}]}}}}"#,
        Ipv4Addr::from(0x0a60_0000 + n)
    ))
}

fn slice(n: u32) -> EndpointSlice {
    let endpoints = (n * PER_SLICE..(n + 1) * PER_SLICE).map(|n| {
        format!(
            r#"{{"addresses":["{}"],"nodeName":"node-2","targetRef":{{"kind":"Pod","namespace":"default",
                "name":"s{n}-6d4cf56db6-x7k2p","uid":"0f6a4a3c-7e0d-4c55-9d8e-{n:012x}"}}}}"#,
            address(n)
        )
    });
    let endpoints = endpoints.collect::<Vec<_>>().join(",");
    read(&format!(
        r#"{{"metadata":{{"name":"s{n}-x","namespace":"default","labels":{{"kubernetes.io/service-name":"s{n}"}}}},
            "addressType":"IPv4","ports":[{{"name":"","port":8080}}],"endpoints":[{endpoints}]}}"#
    ))
}

fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0c00_0000 + n)
}

/// Everything the agent holds of it beside the kernel's maps; the rest of its 100 MB are its code, its threads' stacks and
/// what a list leaves behind.
#[test]
fn ten_thousand_services_and_a_hundred_thousand_pods_fit_into_the_heap() {
    let before = in_use();
    let mut world = World::new("node-1");
    for n in 0..SERVICES {
        world.service(&service(n));
    }
    world.take();
    let services = in_use();
    for n in 0..SERVICES {
        world.slice(&slice(n));
        world.take();
    }
    let slices = in_use();
    for n in 0..ENDPOINTS {
        world.other_pod(&pod(n));
        world.take();
    }
    world.retain_pods(&(0..ENDPOINTS).map(|n| pod(n).metadata.full_name()).collect(), Scope::Others);
    let pods = in_use();
    let mut registry = Registry::new(Seed::default());
    let mut changes = Vec::new();
    let problems = registry.apply(Event::Sync { state: world.snapshot() }, &mut changes);
    assert!(problems.is_empty(), "{problems:?}");
    assert_eq!(registry.counts().backends, ENDPOINTS as usize);
    drop(changes);
    trim_heap();
    let all = in_use();
    let kb = |from: usize, to: usize| to.saturating_sub(from) / 1024;
    let parts = format!(
        "services {} KiB, slices {} KiB, pods {} KiB, registry {} KiB",
        kb(before, services),
        kb(services, slices),
        kb(slices, pods),
        kb(pods, all)
    );
    println!("{parts}");
    assert!(all - before < 70 << 20, "{parts}");
}
