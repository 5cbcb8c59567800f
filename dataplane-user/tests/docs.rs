//! What the documentation shows is what the agent takes.

use std::collections::BTreeSet;

use dataplane_ebpf::abi::Stat;
use dataplane_user::{config::Options, model::Snapshot, source::parse};

const OPERATIONS: &str = include_str!("../../docs/operations.md");

/// The block that starts with this fence.
fn block(fence: &str) -> &'static str {
    let start = OPERATIONS.find(&format!("```{fence}\n")).expect("the page has such a block") + fence.len() + 4;
    &OPERATIONS[start..start + OPERATIONS[start..].find("```").expect("it ends")]
}

#[test]
fn the_source_file_of_the_page_is_taken_whole() {
    let snapshot: Snapshot = parse::snapshot("services.yaml".as_ref(), block("yaml source")).expect("it parses");
    assert_eq!(
        (snapshot.services.len(), snapshot.backends.len(), snapshot.pods.len(), snapshot.nodes.len()),
        (3, 2, 4, 1)
    );
}

#[test]
fn every_line_of_the_stream_on_the_page_is_an_event() {
    for line in block("json stream").lines() {
        parse::event(line.as_bytes()).unwrap_or_else(|mistake| panic!("{line}: {mistake}"));
    }
}

#[test]
fn the_configuration_of_the_page_sets_every_key() {
    let options: Options = serde_saphyr::from_str(block("yaml config")).expect("it parses");
    let json = serde_json::to_value(&options).expect("it is plain data");
    let unset: Vec<_> = json.as_object().expect("an object").iter().filter(|(_, value)| value.is_null()).collect();
    assert!(unset.iter().all(|(key, _)| *key == "layout-salt"), "not on the page: {unset:?}");
    options.resolve().expect("it is valid");
}

#[test]
fn every_counter_is_on_the_page_and_no_other() {
    let table = &OPERATIONS[OPERATIONS.find("## Counters").expect("the page has counters")..];
    let names = table.lines().filter(|line| line.starts_with("| `")).flat_map(|line| {
        let cell = line.split('|').nth(1).unwrap_or_default();
        cell.split('`').skip(1).step_by(2)
    });
    let documented: BTreeSet<_> = names.collect();
    let counted: BTreeSet<_> = Stat::ALL.iter().map(|stat| stat.name()).collect();
    assert_eq!(documented, counted);
}

fn keys(value: &serde_json::Value) -> BTreeSet<String> {
    value.as_object().expect("an object").keys().cloned().collect()
}

/// Every key of the configuration is the chart's own, one that its schema lets through, or none of a cluster's.
#[test]
fn the_chart_takes_the_agents_keys_and_no_other() {
    let schema: serde_json::Value =
        serde_json::from_str(include_str!("../../deploy/chart/hitless/values.schema.json")).expect("a schema");
    let passed = &schema["properties"]["agent"]["properties"]["config"]["properties"];
    let objects: Vec<serde_json::Value> =
        serde_saphyr::from_multiple(include_str!("../../deploy/hitless.yaml")).expect("objects");
    let text = objects.iter().find_map(|object| object["data"]["config.yaml"].as_str()).expect("a configuration");
    let set: serde_json::Value = serde_saphyr::from_str(text).expect("YAML");
    let known = keys(&serde_json::to_value(Options::default()).expect("plain data"));

    let (passed_keys, set_keys) = (keys(passed), keys(&set));
    assert!(passed_keys.is_disjoint(&set_keys), "a key would be there twice: {passed_keys:?} {set_keys:?}");
    let taken: BTreeSet<_> = passed_keys.union(&set_keys).cloned().collect();
    let unknown: Vec<_> = taken.difference(&known).collect();
    assert!(unknown.is_empty(), "the agent has no {unknown:?}");
    // The node's name comes from the API, the credentials from the pod; the salt is for tests.
    // Identity and policies are files, mounted where there is a mesh: `mesh.identity`, `mesh.policies`. What istiod wants to
    // see is mounted where the agent looks for it; `mesh.identity.istio` has the rest.
    let elsewhere = ["layout-salt", "node-name", "kubeconfig", "identity", "policies"];
    let istios = ["istio-ca-root", "istio-token", "cluster-id"];
    let elsewhere = [&elsewhere[..], &istios[..]].concat();
    let left: Vec<_> = known.difference(&taken).filter(|key| !elsewhere.contains(&key.as_str())).collect();
    assert!(left.is_empty(), "the chart's schema refuses {left:?}");

    let sizes = serde_json::to_value(dataplane_user::kernel::Sizes::default()).expect("plain data");
    assert_eq!(keys(&passed["sizes"]["properties"]), keys(&sizes));
}
