//! What fuzzers feed: each target takes any bytes, and panics where a promise is broken.
//!
//! `fuzz/` has an entry point per target; `tests/fuzz.rs` feeds the kept corpora to the same functions in every test run.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::Value;

use crate::{
    identity::SpiffeId,
    policy::{
        Action, Authorization, Origin, Policies, ROOT_NAMESPACE, Request, Scope, Workload,
        file::contents,
        object::{Body, Kind, Parsed, Read, read, read_as},
    },
};

/// A target by its name, which is also that of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// All targets. A new one needs its function here, an entry point and a `[[bin]]` in `fuzz/`, and a corpus.
pub const TARGETS: &[Target] = &[("policy_file", policy_file), ("policy_object", policy_object)];

/// A file of policies: YAML or JSON.
pub fn policy_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(contents) = contents(text) {
        in_force(&contents.objects);
    }
}

/// One object, as the API server sends it.
pub fn policy_object(bytes: &[u8]) {
    let Ok(object) = serde_json::from_slice::<Value>(bytes) else { return };
    let kinds = [Kind::AuthorizationPolicy, Kind::PeerAuthentication];
    let all = std::iter::once(read(&object)).chain(kinds.map(|kind| read_as(kind, &object)));
    for read in all {
        if let Read::Policy(parsed) = read {
            in_force(&[*parsed]);
        }
    }
}

/// Whatever was read can be put in force, decided by and explained.
fn in_force(objects: &[Parsed]) {
    let kinds = [Kind::AuthorizationPolicy, Kind::PeerAuthentication];
    let mut policies = Policies::new(ROOT_NAMESPACE);
    policies.sync(Origin::File, &kinds, objects.to_vec());
    let again = policies.sync(Origin::File, &kinds, objects.to_vec());
    assert!(!again.changed, "the same again is no change");
    let standing = policies.standing();
    assert!(
        standing.iter().all(|one| one.in_force || one.refused.is_some() || !one.warnings.is_empty()),
        "silently not in force"
    );

    let id = SpiffeId::new("cluster.local", "shop", "web").expect("it is one");
    let addresses: [IpAddr; 2] = [[10, 0, 0, 1].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 1].into()];
    let snapshot = policies.snapshot();
    for (index, object) in objects.iter().enumerate().take(4) {
        if objects[..index].iter().any(|earlier| earlier.key == object.key) {
            // Given twice: the first counts.
            continue;
        }
        let workload = workload(object);
        let selected = snapshot.select(&workload);
        for (source, port) in [(Some(&id), 80), (None, 80), (Some(&id), 65535), (None, 1)] {
            for address in addresses {
                let request = Request { source_ip: address, source, destination_ip: address, destination_port: port };
                let decision = selected.decide(&request);
                let explained = snapshot.explain(&workload, &request);
                assert_eq!(
                    (explained.allow, explained.reason, &explained.by),
                    (decision.allow, decision.reason, &decision.by)
                );
                assert_eq!(selected.admit(&request), decision, "counting changes nothing");
                assert!(!explained.to_string().is_empty());
                if refuses_all(object) {
                    assert!(!decision.allow, "a policy that nobody can read lets {request:?} in");
                }
            }
        }
    }
}

/// A workload that the policy is for.
fn workload(object: &Parsed) -> Workload {
    let namespace = object.key.name.split('/').next().unwrap_or_default();
    let labels = match enforced(object).map(|policy| &policy.scope) {
        Some(Scope::Labels(labels)) => labels.clone(),
        _ => BTreeMap::new(),
    };
    Workload { name: format!("{namespace}/pod").into(), namespace: namespace.into(), labels, policies: Vec::new() }
}

/// The authorization that is put in force for an object without an earlier version.
fn enforced(object: &Parsed) -> Option<&Authorization> {
    match &object.body {
        Body::Authorization(policy) => Some(policy),
        Body::Malformed { closed: Some(closed), .. } => match &**closed {
            Body::Authorization(policy) => Some(policy),
            _ => None,
        },
        _ => None,
    }
}

/// An ALLOW policy of which no rule can be understood whole.
fn refuses_all(object: &Parsed) -> bool {
    enforced(object).is_some_and(|policy| {
        let understood = policy.rules.iter().any(|rule| rule.unseen.is_empty());
        policy.action == Action::Allow && !policy.dry_run && !understood
    })
}
