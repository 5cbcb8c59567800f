use std::{cell::Cell, collections::BTreeMap};

use super::*;
use crate::model::Snapshot;

fn pod(name: &str, addresses: &[&str]) -> Pod {
    let addresses: Vec<_> = addresses.iter().map(|addr| format!("\"{addr}\"")).collect();
    let pid = if name.starts_with("here/") { "1" } else { "null" };
    serde_json::from_str(&format!(r#"{{"name":"{name}","addresses":[{}],"pid":{pid}}}"#, addresses.join(","))).unwrap()
}

fn upsert(pod: Pod) -> Event {
    Event::Upsert { object: Object::Pod(pod) }
}

fn delete(name: &str) -> Event {
    Event::Delete { object: Key::Pod { name: name.into() } }
}

fn sync(pods: Vec<Pod>) -> Event {
    Event::Sync { state: Snapshot { pods, ..Snapshot::default() } }
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

thread_local! {
    static RULES: Cell<fn(&str) -> Plaintext> = const { Cell::new(|_| Plaintext::Open) };
}

fn rules(workload: &policy::Workload) -> Plaintext {
    RULES.get()(&workload.name)
}

/// A directory and what `MESH` would hold.
struct Node {
    directory: Directory,
    map: BTreeMap<IpAddr, MeshAddress>,
}

impl Node {
    fn new() -> Self {
        Self { directory: Directory::new("cluster.local".into(), Box::new(rules)), map: BTreeMap::new() }
    }

    /// Pods of namespace `here` run on this node.
    fn apply(&mut self, event: Event) -> Vec<Problem> {
        let problems = self.directory.apply(&event);
        self.directory.number(|name| name.strip_prefix("here/")?.parse().ok());
        self.write();
        problems
    }

    fn write(&mut self) {
        for Write { addr, value } in self.directory.take_writes() {
            match value {
                Some(value) => drop(self.map.insert(addr, value)),
                None => drop(self.map.remove(&addr)),
            }
        }
        assert_eq!(self.map, self.directory.wanted(), "what was written is not what is wanted");
    }

    fn flags(&self, at: &str) -> Option<u32> {
        self.map.get(&addr(at)).map(|value| value.flags)
    }
}

#[test]
fn a_pod_elsewhere_takes_hbone_and_one_here_when_its_listeners_are_open() {
    let mut node = Node::new();
    node.apply(upsert(pod("there/1", &["10.0.1.1", "fd00::1"])));
    node.apply(upsert(pod("here/7", &["10.0.0.7"])));
    assert_eq!((node.flags("10.0.1.1"), node.flags("fd00::1")), (Some(MESH_HBONE), Some(MESH_HBONE)));
    assert_eq!(node.flags("10.0.0.7"), Some(0));
    node.directory.set_listening("here/7", 7, true);
    node.write();
    assert_eq!(node.flags("10.0.0.7"), Some(MESH_HBONE));
    node.directory.set_listening("here/7", 7, false);
    node.write();
    assert_eq!(node.flags("10.0.0.7"), Some(0));
}

#[test]
fn the_identity_is_namespace_and_service_account() {
    let mut node = Node::new();
    node.apply(upsert(Pod { service_account: Some("web".into()), ..pod("there/1", &["10.0.1.1"]) }));
    node.apply(upsert(pod("there/2", &["10.0.1.2"])));
    let view = node.directory.view();
    let identity = |at: &str| view.at(&addr(at)).unwrap().identity.to_string();
    assert_eq!(identity("10.0.1.1"), "spiffe://cluster.local/ns/there/sa/web");
    assert_eq!(identity("::ffff:10.0.1.2"), "spiffe://cluster.local/ns/there/sa/default");
}

#[test]
fn a_pod_that_is_not_enrolled_or_gone_is_not_in_the_mesh() {
    let mut node = Node::new();
    node.apply(upsert(pod("there/1", &["10.0.1.1"])));
    node.apply(upsert(Pod { enrolled: false, ..pod("there/1", &["10.0.1.1"]) }));
    assert_eq!(node.flags("10.0.1.1"), None);
    node.apply(upsert(pod("there/1", &["10.0.1.1"])));
    node.apply(delete("there/1"));
    assert_eq!((node.flags("10.0.1.1"), node.directory.view().at(&addr("10.0.1.1"))), (None, None));
}

#[test]
fn an_address_that_was_given_to_another_pod_stays_with_that_one() {
    let mut node = Node::new();
    node.apply(upsert(pod("there/old", &["10.0.1.1"])));
    node.apply(upsert(pod("there/new", &["10.0.1.1"])));
    // The old one's last words, and its end.
    node.apply(upsert(Pod { terminating: true, service_account: Some("x".into()), ..pod("there/old", &["10.0.1.1"]) }));
    assert_eq!(&*node.directory.view().at(&addr("10.0.1.1")).unwrap().name, "there/new");
    node.apply(delete("there/old"));
    assert_eq!(&*node.directory.view().at(&addr("10.0.1.1")).unwrap().name, "there/new");
    assert_eq!(node.flags("10.0.1.1"), Some(MESH_HBONE));
}

#[test]
fn a_relist_drops_what_it_does_not_name() {
    let mut node = Node::new();
    node.apply(sync(vec![pod("there/1", &["10.0.1.1"]), pod("there/2", &["10.0.1.2"])]));
    node.apply(sync(vec![pod("there/2", &["10.0.1.3"])]));
    assert_eq!(node.map.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.1.3"]);
}

#[test]
fn policies_close_pods_here_only_and_open_them_again() {
    let mut node = Node::new();
    node.apply(upsert(pod("here/1", &["10.0.0.1"])));
    node.apply(upsert(pod("here/2", &["10.0.0.2"])));
    node.apply(upsert(pod("there/1", &["10.0.1.1"])));
    RULES.set(|name| if name == "here/1" { Plaintext::Refused } else { Plaintext::Asked });
    node.directory.policies_changed();
    node.write();
    assert_eq!((node.flags("10.0.0.1"), node.flags("10.0.0.2")), (Some(MESH_STRICT), Some(MESH_CAPTURE)));
    assert_eq!(node.flags("10.0.1.1"), Some(MESH_HBONE));
    // One that comes later is closed from its first packet on.
    node.apply(upsert(pod("here/3", &["10.0.0.3"])));
    assert_eq!(node.flags("10.0.0.3"), Some(MESH_CAPTURE));
    RULES.set(|_| Plaintext::Open);
    node.directory.policies_changed();
    node.write();
    assert_eq!((node.flags("10.0.0.1"), node.flags("10.0.0.2")), (Some(0), Some(0)));
}

#[test]
fn this_nodes_addresses_are_known_and_forgotten() {
    let mut node = Node::new();
    node.directory.set_node([addr("10.0.0.254"), addr("192.0.2.1")].into());
    node.write();
    node.directory.set_node([addr("192.0.2.1")].into());
    node.write();
    assert_eq!((node.flags("192.0.2.1"), node.flags("10.0.0.254")), (Some(MESH_NODE), None));
}

#[test]
fn a_pod_whose_name_makes_no_identity_is_named_and_left_out() {
    let mut node = Node::new();
    node.apply(upsert(pod("there/1", &["10.0.1.1"])));
    let problems = node.apply(upsert(Pod { service_account: Some("a b".into()), ..pod("there/1", &["10.0.1.1"]) }));
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].object.contains("there/1"), "{problems:?}");
    assert_eq!(node.flags("10.0.1.1"), None);
}
