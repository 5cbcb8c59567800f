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
