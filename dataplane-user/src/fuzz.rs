//! What fuzzers feed: each target takes any bytes, and panics where a promise is broken.
//!
//! `fuzz/` has an entry point per target; `tests/fuzz.rs` feeds the kept corpora to the same functions in every test run.

use std::{
    collections::BTreeMap,
    fmt::{Debug, Display},
    net::IpAddr,
    str::FromStr,
};

use serde_json::Value;

use crate::{
    hbone::headers::{Authority, Baggage, Forwarded, TraceParent},
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
pub const TARGETS: &[Target] = &[
    ("authority", authority),
    ("baggage", baggage),
    ("forwarded", forwarded),
    ("policy_file", policy_file),
    ("policy_object", policy_object),
    ("traceparent", traceparent),
];

/// Where a CONNECT wants to go.
pub fn authority(bytes: &[u8]) {
    header::<Authority>(bytes);
}

/// What a peer says about its workload.
pub fn baggage(bytes: &[u8]) {
    header::<Baggage>(bytes);
}

/// Who asked the peer.
pub fn forwarded(bytes: &[u8]) {
    header::<Forwarded>(bytes);
}

pub fn traceparent(bytes: &[u8]) {
    header::<TraceParent>(bytes);
}

/// What was read is read again when it is written, and is the same then.
fn header<T: FromStr + Display + PartialEq + Debug>(bytes: &[u8]) {
    let Ok(Ok(read)) = std::str::from_utf8(bytes).map(T::from_str) else { return };
    let written = read.to_string();
    // A header that says nothing is not sent.
    if !written.is_empty() {
        assert_eq!(T::from_str(&written).ok(), Some(read), "{written:?}");
    }
}

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
