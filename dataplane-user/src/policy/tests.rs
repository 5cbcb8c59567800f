//! What Istio's rules mean: by tables, and against a reading of them as naive as possible.

use std::net::IpAddr;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    object::{self, Body, Key, Kind, Parsed, Read},
    *,
};

fn parse(object: &Value) -> Parsed {
    match object::read(object) {
        Read::Policy(parsed) => *parsed,
        other => panic!("{other:?}"),
    }
}

fn authorization(namespace: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": namespace, "name": name}, "spec": spec})
}

fn peer(namespace: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"namespace": namespace, "name": name}, "spec": spec})
}

fn in_force(objects: &[Value]) -> Policies {
    let mut policies = Policies::new(ROOT_NAMESPACE);
    let outcome = policies.sync(
        Origin::File,
        &[Kind::AuthorizationPolicy, Kind::PeerAuthentication],
        objects.iter().map(parse).collect(),
    );
    assert_eq!(outcome.problems, [], "{objects:?}");
    policies
}

fn workload(namespace: &str, labels: &[(&str, &str)]) -> Workload {
    Workload {
        name: format!("{namespace}/pod").into(),
        namespace: namespace.into(),
        labels: labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
        policies: Vec::new(),
    }
}

/// From `d/ns/a/sa/b@10.0.0.1`, or an address alone, to a port.
fn ask(policies: &Policies, to: &Workload, from: &str, port: u16) -> Decision {
    let (id, address) = match from.split_once('@') {
        Some((id, address)) => (Some(format!("spiffe://{id}").parse::<SpiffeId>().unwrap()), address),
        None => (None, from),
    };
    let request = Request {
        source_ip: address.parse().unwrap(),
        source: id.as_ref(),
        destination_ip: "10.9.0.1".parse().unwrap(),
        destination_port: port,
    };
    let explained = policies.snapshot().explain(to, &request);
    let decision = policies.snapshot().select(to).decide(&request);
    assert_eq!((explained.allow, explained.reason, &explained.by), (decision.allow, decision.reason, &decision.by));
    decision
}

const WEB: &str = "cluster.local/ns/shop/sa/web@10.0.0.1";
const JOB: &str = "cluster.local/ns/batch/sa/job@10.0.1.1";

#[test]
fn deny_goes_before_allow_and_allow_policies_shut_the_rest_out() {
    let to = workload("shop", &[("app", "db")]);
    assert_eq!(ask(&in_force(&[]), &to, WEB, 80).reason, Reason::Default);

    let allow = authorization(
        "shop",
        "allow",
        json!({"rules": [{"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/web"]}}]}]}),
    );
    let deny = authorization(
        "shop",
        "deny",
        json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["9000"]}}]}]}),
    );
    let one = in_force(std::slice::from_ref(&allow));
    let decision = ask(&one, &to, WEB, 80);
    assert_eq!((decision.reason, decision.by.as_deref()), (Reason::Allowed, Some("shop/allow")));
    assert_eq!(ask(&one, &to, JOB, 80).to_string(), "allow policies exist, but none allowed");
    assert_eq!(ask(&one, &to, "10.0.0.1", 80).reason, Reason::NotAllowed, "plaintext has no principal");
    assert_eq!(ask(&one, &workload("other", &[]), JOB, 80).reason, Reason::Default);

    let both = in_force(&[allow, deny.clone()]);
    assert_eq!(ask(&both, &to, WEB, 9000).to_string(), "explicitly denied by: shop/deny");
    assert!(ask(&both, &to, WEB, 80).allow);
    assert_eq!(ask(&in_force(&[deny]), &to, JOB, 80).reason, Reason::Default, "a DENY policy shuts nobody else out");

    let nothing = in_force(&[authorization("shop", "nothing", json!({}))]);
    assert_eq!(ask(&nothing, &to, WEB, 80).reason, Reason::NotAllowed, "no rules allow nothing");
    let all = in_force(&[authorization("shop", "all", json!({"rules": [{}]}))]);
    assert_eq!(ask(&all, &to, "10.0.0.1", 80).reason, Reason::Allowed, "an empty rule allows everything");
}

#[test]
fn a_policy_is_for_the_mesh_a_namespace_or_a_selection() {
    let deny = |namespace: &str, selector: Value| {
        authorization(namespace, "deny", json!({"action": "DENY", "selector": selector, "rules": [{}]}))
    };
    let labels = json!({"matchLabels": {"app": "db", "tier": "1"}});
    for (policy, refused) in [
        (deny("istio-system", Value::Null), [true, true, true]),
        (deny("shop", Value::Null), [true, true, false]),
        (deny("shop", labels.clone()), [true, false, false]),
        (deny("istio-system", labels), [true, false, true]),
        (deny("shop", json!({"matchLabels": {}})), [true, true, false]),
    ] {
        let policies = in_force(std::slice::from_ref(&policy));
        let workloads = [
            workload("shop", &[("app", "db"), ("tier", "1"), ("more", "x")]),
            workload("shop", &[("app", "db")]),
            workload("other", &[("app", "db"), ("tier", "1")]),
        ];
        assert_eq!(workloads.map(|to| !ask(&policies, &to, WEB, 80).allow), refused, "{policy}");
    }
    let mut elsewhere = Policies::new("mesh-root");
    elsewhere.upsert(Origin::File, parse(&deny("mesh-root", Value::Null)));
    assert!(!ask(&elsewhere, &workload("shop", &[]), WEB, 80).allow);
}

#[test]
fn each_field_matches_as_istio_says() {
    let to = workload("shop", &[]);
    for (rule, from, port, matched) in [
        (json!({"from": [{"source": {"principals": ["*"]}}]}), WEB, 80, true),
        (json!({"from": [{"source": {"principals": ["*"]}}]}), "10.0.0.1", 80, false),
        (json!({"from": [{"source": {"principals": ["*/sa/web"]}}]}), WEB, 80, true),
        (json!({"from": [{"source": {"principals": ["cluster.local/ns/sh*"]}}]}), WEB, 80, true),
        (json!({"from": [{"source": {"principals": ["other.local/ns/shop/sa/web"]}}]}), WEB, 80, false),
        // How STRICT reads as a policy: denied is who has no principal at all.
        (json!({"from": [{"source": {"notPrincipals": ["*"]}}]}), "10.0.0.1", 80, true),
        (json!({"from": [{"source": {"notPrincipals": ["*"]}}]}), WEB, 80, false),
        (json!({"from": [{"source": {"namespaces": ["shop"]}}]}), WEB, 80, true),
        (json!({"from": [{"source": {"namespaces": ["sho*"], "notPrincipals": ["*/sa/web"]}}]}), WEB, 80, false),
        (json!({"from": [{"source": {"notNamespaces": ["shop"]}}]}), "10.0.0.1", 80, true),
        (json!({"from": [{"source": {"serviceAccounts": ["web"]}}]}), WEB, 80, true),
        (json!({"from": [{"source": {"serviceAccounts": ["batch/job"]}}]}), JOB, 80, true),
        (json!({"from": [{"source": {"serviceAccounts": ["batch/job"]}}]}), WEB, 80, false),
        (json!({"from": [{"source": {"notServiceAccounts": ["batch/job"]}}]}), "10.0.0.1", 80, true),
        (json!({"from": [{"source": {"ipBlocks": ["10.0.0.0/24"]}}]}), WEB, 80, true),
        (json!({"from": [{"source": {"ipBlocks": ["10.0.0.0/24"], "notIpBlocks": ["10.0.0.1"]}}]}), WEB, 80, false),
        (json!({"from": [{"source": {"ipBlocks": ["fd00::/8"]}}]}), "fd00::7", 80, true),
        (json!({"from": [{"source": {"ipBlocks": ["10.0.0.0/24"]}}]}), "::ffff:10.0.0.9", 80, true),
        // Sources are alternatives; from, to and when must all hold.
        (json!({"from": [{"source": {"namespaces": ["x"]}}, {"source": {"namespaces": ["shop"]}}]}), WEB, 80, true),
        (
            json!({"from": [{"source": {"namespaces": ["shop"]}}], "to": [{"operation": {"ports": ["81"]}}]}),
            WEB,
            80,
            false,
        ),
        (json!({"to": [{"operation": {"ports": ["81", "80"]}}]}), WEB, 80, true),
        (json!({"to": [{"operation": {"notPorts": ["80"]}}]}), WEB, 80, false),
        (json!({"when": [{"key": "source.ip", "values": ["10.0.0.1"]}]}), WEB, 80, true),
        (json!({"when": [{"key": "source.namespace", "notValues": ["shop"]}]}), WEB, 80, false),
        (json!({"when": [{"key": "source.principal", "values": ["*"]}]}), WEB, 80, true),
        (json!({"when": [{"key": "source.serviceAccount", "values": ["shop/web"]}]}), WEB, 80, true),
        (json!({"when": [{"key": "destination.ip", "values": ["10.9.0.0/16"]}]}), WEB, 80, true),
        (json!({"when": [{"key": "destination.ip", "notValues": ["10.9.0.0/16"]}]}), WEB, 80, false),
        (
            json!({"when": [{"key": "destination.port", "values": ["80"]}, {"key": "source.ip", "values": ["::1"]}]}),
            WEB,
            80,
            false,
        ),
    ] {
        for (action, allowed) in [("ALLOW", matched), ("DENY", !matched)] {
            let policies = in_force(&[authorization("shop", "p", json!({"action": action, "rules": [rule]}))]);
            assert_eq!(ask(&policies, &to, from, port).allow, allowed, "{action} {rule} {from}");
        }
    }
}

#[test]
fn what_l4_cannot_see_never_allows_and_always_denies_and_is_named() {
    let to = workload("shop", &[]);
    for (rule, name) in [
        (json!({"to": [{"operation": {"methods": ["GET"]}}]}), "to[0].operation.methods"),
        (json!({"to": [{"operation": {"notPaths": ["/x"], "ports": ["80"]}}]}), "to[0].operation.notPaths"),
        (json!({"to": [{"operation": {"ports": ["80"]}}, {"operation": {"hosts": ["x"]}}]}), "to[1].operation.hosts"),
        (json!({"from": [{"source": {"requestPrincipals": ["*"]}}]}), "from[0].source.requestPrincipals"),
        (
            json!({"from": [{"source": {"remoteIpBlocks": ["1.2.3.4"], "namespaces": ["shop"]}}]}),
            "from[0].source.remoteIpBlocks",
        ),
        (json!({"when": [{"key": "request.headers[x]", "values": ["y"]}]}), "when[0].request.headers[x]"),
        (json!({"from": [{"source": {"fromTheFuture": ["x"]}}]}), "from[0].source.fromTheFuture"),
        (json!({"unless": []}), "unless"),
    ] {
        for action in ["ALLOW", "DENY"] {
            let object = authorization("shop", "p", json!({"action": action, "rules": [rule]}));
            let warnings = parse(&object).warnings;
            assert!(warnings.iter().any(|warning| warning.contains(name)), "{name} is not in {warnings:?}");
            let decision = ask(&in_force(&[object]), &to, WEB, 80);
            assert!(!decision.allow, "{action} {rule}");
        }
    }
    // A DENY rule goes on with what is left of it, and an ALLOW rule beside it goes on.
    let deny = json!({"action": "DENY", "rules": [{"to": [{"operation": {"methods": ["GET"], "ports": ["81"]}}]}]});
    assert!(ask(&in_force(&[authorization("shop", "p", deny)]), &to, WEB, 80).allow);
    let allow =
        json!({"rules": [{"to": [{"operation": {"paths": ["/"]}}]}, {"to": [{"operation": {"ports": ["80"]}}]}]});
    assert!(ask(&in_force(&[authorization("shop", "p", allow)]), &to, WEB, 80).allow);
    // Empty lists are nothing said.
    let empty = json!({"rules": [{"to": [{"operation": {"methods": [], "ports": ["80"]}}]}]});
    assert!(ask(&in_force(&[authorization("shop", "p", empty)]), &to, WEB, 80).allow);
}

#[test]
fn policies_that_are_not_for_this_node_are_named_and_decide_nothing() {
    let to = workload("shop", &[]);
    for (spec, word) in [
        (json!({"action": "AUDIT", "rules": [{}]}), "AUDIT is not supported"),
        (json!({"action": "CUSTOM", "provider": {"name": "x"}, "rules": [{}]}), "CUSTOM is not supported"),
        (json!({"action": "DENY", "targetRefs": [{"kind": "Gateway", "name": "w"}], "rules": [{}]}), "waypoint"),
        (json!({"action": "DENY", "targetRef": {"kind": "Service", "name": "w"}, "rules": [{}]}), "waypoint"),
    ] {
        let mut policies = Policies::new(ROOT_NAMESPACE);
        let outcome = policies.upsert(Origin::Kube, parse(&authorization("shop", "p", spec.clone())));
        assert!(outcome.warnings[0].reason.contains(word) && !outcome.changed, "{outcome:?}");
        assert!(ask(&policies, &to, WEB, 80).allow, "{spec}");
        assert!(!policies.standing()[0].in_force);
        // Told once.
        assert_eq!(policies.upsert(Origin::Kube, parse(&authorization("shop", "p", spec))), Outcome::default());
    }
}

#[test]
fn a_malformed_version_leaves_the_good_one_in_force_and_is_told_once() {
    let to = workload("shop", &[]);
    let good = authorization("shop", "p", json!({"rules": [{"from": [{"source": {"ipBlocks": ["10.0.0.0/24"]}}]}]}));
    let bad = |cidr: &str| authorization("shop", "p", json!({"rules": [{"from": [{"source": {"ipBlocks": [cidr]}}]}]}));
    let mut policies = Policies::new(ROOT_NAMESPACE);
    assert!(policies.upsert(Origin::File, parse(&good)).changed);
    let outcome = policies.upsert(Origin::File, parse(&bad("10.0.0.0/99")));
    assert_eq!(
        outcome.problems[0].to_string(),
        "AuthorizationPolicy shop/p: spec.rules[0].from[0].source.ipBlocks[0]: \"10.0.0.0/99\" is no address and no network \
         such as 10.0.0.0/8 or fd00::/8; the version before stays in force"
    );
    assert!(!outcome.changed && policies.malformed() == 1);
    assert_eq!(policies.upsert(Origin::File, parse(&bad("10.0.0.0/99"))), Outcome::default(), "told once");
    assert_eq!(policies.upsert(Origin::File, parse(&bad("10.0.0.0/98"))).problems.len(), 1, "another mistake");
    assert_eq!(policies.malformed(), 3);
    assert!(ask(&policies, &to, WEB, 80).allow && !ask(&policies, &to, JOB, 80).allow);
    assert!(policies.standing()[0].refused.is_some() && policies.standing()[0].in_force);
    assert_eq!(policies.upsert(Origin::File, parse(&good)), Outcome::default(), "mended, and what is in force was it");
    assert_eq!(policies.standing()[0].refused, None);
    policies.delete(Origin::File, &Key { kind: Kind::AuthorizationPolicy, name: "shop/p".into() });
    assert_eq!(ask(&policies, &to, JOB, 80).reason, Reason::Default);
}

#[test]
fn what_was_malformed_from_the_start_is_enforced_at_its_most_careful() {
    let to = workload("shop", &[("app", "db")]);
    let labels = json!({"matchLabels": {"app": "db"}});
    for (spec, allow) in [
        // ALLOW: the rule that can't be read allows nobody, the others go on.
        (json!({"rules": [{"from": [{"source": {"ipBlocks": ["nonsense"]}}]}]}), false),
        (
            json!({"rules": [{"from": [{"source": {"ipBlocks": ["nonsense"]}}]}, {"to": [{"operation": {"ports": ["80"]}}]}]}),
            true,
        ),
        (json!({"rules": [{"from": [{"source": {"principals": [""]}}]}]}), false),
        (json!({"rules": [{"from": [{"source": {"principals": ["spiffe://cluster.local/ns/shop/sa/web"]}}]}]}), false),
        (json!({"rules": [{"to": [{"operation": {"ports": ["0"]}}]}]}), false),
        (json!({"rules": [{"to": [{"operation": {"ports": ["65536"]}}]}]}), false),
        (json!({"rules": [{"to": [{"operation": {"ports": ["-80"]}}]}]}), false),
        (json!({"rules": [{"to": [{"operation": {"ports": "80"}}]}]}), false),
        (json!({"rules": [{"from": [{}]}]}), false),
        (json!({"rules": [{"from": [null]}]}), false),
        (json!({"rules": [null]}), false),
        (json!({"rules": {}}), false),
        (json!({"rules": [{"when": [{"key": "source.ip"}]}]}), false),
        (json!({"rules": [{"when": [{"values": ["x"]}]}]}), false),
        (json!({"rules": [{"from": [{"source": {"serviceAccounts": ["a/b/c"]}}]}]}), false),
        // DENY: what can't be read denies.
        (json!({"action": "DENY", "rules": [{"from": [{"source": {"ipBlocks": ["nonsense"]}}]}]}), false),
        (
            json!({"action": "DENY", "rules": [{"from": [{"source": {"notPrincipals": [7.5, ""]}}], "to": [{"operation": {"ports": ["81"]}}]}]}),
            true,
        ),
        (json!({"action": "DENY", "rules": 5}), false),
        (json!({"action": "DENY", "selector": labels, "rules": [[]]}), false),
        // An action nobody knows: nobody is let in.
        (json!({"action": "ALLOWW", "rules": [{}]}), false),
        (json!({"action": 5, "rules": [{}]}), false),
        // Whom it is for can't be told: it is not in force.
        (json!({"selector": {"matchExpressions": []}, "action": "DENY", "rules": [{}]}), true),
        (json!({"selector": {"matchLabels": {"app": 5}}, "action": "DENY", "rules": [{}]}), true),
        (json!("text"), true),
    ] {
        let mut policies = Policies::new(ROOT_NAMESPACE);
        let outcome = policies.upsert(Origin::File, parse(&authorization("shop", "p", spec.clone())));
        assert_eq!(outcome.problems.len(), 1, "{spec}: {outcome:?}");
        assert_eq!(ask(&policies, &to, WEB, 80).allow, allow, "{spec}");
        assert!(ask(&policies, &workload("other", &[]), WEB, 80).allow, "{spec}");
    }
    for (spec, mode) in [
        (json!({"mtls": {"mode": "STRICTT"}}), Mode::Strict),
        (json!({"mtls": "STRICT"}), Mode::Strict),
        (json!({"selector": 5, "mtls": {"mode": "STRICT"}}), Mode::Permissive),
        (json!({"selector": labels, "portLevelMtls": {"80": 5}}), Mode::Strict),
        (json!({"selector": labels, "mtls": {"mode": "DISABLE"}, "portLevelMtls": []}), Mode::Strict),
        (json!({"selector": labels, "portLevelMtls": {"65536": {"mode": "STRICT"}}}), Mode::Permissive),
    ] {
        let mut policies = Policies::new(ROOT_NAMESPACE);
        let outcome = policies.upsert(Origin::File, parse(&peer("shop", "p", spec.clone())));
        assert_eq!(outcome.problems.len(), 1, "{spec}: {outcome:?}");
        assert_eq!(policies.snapshot().select(&to).mode(80), mode, "{spec}");
    }
}

#[test]
fn an_object_without_a_usable_name_is_refused() {
    for metadata in [
        json!({}),
        json!({"name": "a"}),
        json!({"name": "a/b", "namespace": "c"}),
        json!({"name": "", "namespace": "c"}),
        json!({"name": "x".repeat(254), "namespace": "c"}),
        json!({"name": 5, "namespace": "c"}),
        json!("x"),
    ] {
        let object = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata});
        assert!(matches!(object::read(&object), Read::Unnamed(_)), "{metadata}");
    }
}

#[test]
fn huge_policies_are_taken_or_refused_but_never_slow() {
    let to = workload("shop", &[]);
    let principals = |n: usize| (0..n).map(|i| format!("cluster.local/ns/n{i}/sa/x")).collect::<Vec<_>>();
    let rule = |n: usize| json!({"rules": [{"from": [{"source": {"principals": principals(n)}}]}]});
    let policies = in_force(&[authorization("shop", "p", rule(50_000))]);
    let snapshot = policies.snapshot();
    let selected = snapshot.select(&to);
    let id: SpiffeId = "spiffe://cluster.local/ns/n49999/sa/x".parse().unwrap();
    let request = Request {
        source_ip: "10.0.0.1".parse().unwrap(),
        source: Some(&id),
        destination_ip: "10.9.0.1".parse().unwrap(),
        destination_port: 80,
    };
    // A scan of all values would take minutes.
    for _ in 0..200_000 {
        assert!(selected.decide(&request).allow);
    }
    assert!(matches!(parse(&authorization("shop", "p", rule(70_000))).body, Body::Malformed { .. }));
    let text = snapshot.explain(&to, &request).to_string();
    assert!(text.len() < 2_000 && text.contains("and 49994 more"), "{text}");
}

#[test]
fn modes_follow_istios_precedence() {
    let mesh = |mode: &str| peer("istio-system", "default", json!({"mtls": {"mode": mode}}));
    let namespace = |mode: &str| peer("shop", "default", json!({"mtls": {"mode": mode}}));
    let own = |mode: &str, ports: Value| {
        let selector = json!({"matchLabels": {"app": "db"}});
        peer("shop", "own", json!({"selector": selector, "mtls": {"mode": mode}, "portLevelMtls": ports}))
    };
    use Mode::{Disable, Permissive, Strict};
    for (objects, at_80, at_81) in [
        (vec![], Permissive, Permissive),
        (vec![mesh("STRICT")], Strict, Strict),
        (vec![mesh("STRICT"), namespace("UNSET")], Strict, Strict),
        (vec![mesh("STRICT"), namespace("PERMISSIVE")], Permissive, Permissive),
        (vec![mesh("PERMISSIVE"), namespace("STRICT")], Strict, Strict),
        (vec![namespace("STRICT"), own("DISABLE", json!({}))], Disable, Disable),
        (vec![mesh("STRICT"), own("UNSET", json!({}))], Strict, Strict),
        (vec![mesh("STRICT"), own("UNSET", json!({"80": {"mode": "PERMISSIVE"}}))], Permissive, Strict),
        (vec![own("PERMISSIVE", json!({"80": {"mode": "STRICT"}}))], Strict, Permissive),
        (vec![own("STRICT", json!({"80": {"mode": "DISABLE"}, "81": {"mode": "UNSET"}}))], Disable, Strict),
    ] {
        let policies = in_force(&objects);
        let selected = policies.snapshot().select(&workload("shop", &[("app", "db")]));
        assert_eq!((selected.mode(80), selected.mode(81)), (at_80, at_81), "{objects:?}");
    }
    let strict = in_force(&[own("STRICT", Value::Null)]);
    assert_eq!(strict.snapshot().select(&workload("shop", &[])).mode(80), Permissive, "not selected");
}

#[test]
fn of_several_at_one_level_the_oldest_counts() {
    let at = |name: &str, created: &str, mode: &str| {
        let mut object = peer("shop", name, json!({"mtls": {"mode": mode}}));
        object["metadata"]["creationTimestamp"] = created.into();
        object
    };
    let younger = at("a", "2026-01-02T00:00:00Z", "STRICT");
    let older = at("b", "2026-01-01T00:00:00Z", "DISABLE");
    let policies = in_force(&[younger, older]);
    assert_eq!(policies.snapshot().select(&workload("shop", &[])).mode(80), Mode::Disable);
}

#[test]
fn a_selector_in_the_root_namespace_and_ports_without_a_selector_are_named() {
    let root = peer("istio-system", "p", json!({"selector": {"matchLabels": {"a": "b"}}, "mtls": {"mode": "STRICT"}}));
    let ports = peer("shop", "p", json!({"mtls": {"mode": "PERMISSIVE"}, "portLevelMtls": {"80": {"mode": "STRICT"}}}));
    for (object, word) in [(root, "selects nothing"), (ports, "counts only beside a selector")] {
        let mut policies = Policies::new(ROOT_NAMESPACE);
        let outcome = policies.upsert(Origin::Kube, parse(&object));
        assert!(outcome.warnings[0].reason.contains(word), "{outcome:?}");
        assert_eq!(policies.snapshot().select(&workload("shop", &[("a", "b")])).mode(80), Mode::Permissive);
    }
}

#[test]
fn strict_ports_refuse_plaintext_whatever_policies_allow() {
    let objects =
        [peer("shop", "p", json!({"mtls": {"mode": "STRICT"}})), authorization("shop", "all", json!({"rules": [{}]}))];
    let policies = in_force(&objects);
    let to = workload("shop", &[]);
    let decision = ask(&policies, &to, "10.0.0.1", 80);
    assert_eq!((decision.reason, decision.by.as_deref()), (Reason::Plaintext, Some("shop/p")));
    assert!(ask(&policies, &to, WEB, 80).allow);
}

#[test]
fn dry_runs_decide_nothing_and_say_what_they_would_have_changed() {
    let dry = |name: &str, spec: Value| {
        let mut object = authorization("shop", name, spec);
        object["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
        object
    };
    let to = workload("shop", &[]);
    let objects = [
        dry("try-deny", json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["81"]}}]}]})),
        dry("try-allow", json!({"rules": [{"from": [{"source": {"namespaces": ["shop"]}}]}]})),
    ];
    let policies = in_force(&objects);
    let snapshot = policies.snapshot();
    let selected = snapshot.select(&to);
    let web: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let job: SpiffeId = "spiffe://cluster.local/ns/batch/sa/job".parse().unwrap();
    let request = |id, port| Request {
        source_ip: "10.0.0.1".parse().unwrap(),
        source: Some(id),
        destination_ip: "10.9.0.1".parse().unwrap(),
        destination_port: port,
    };
    for (id, port, would) in [(&web, 80, true), (&web, 81, false), (&job, 80, false)] {
        let decision = selected.admit(&request(id, port));
        assert_eq!((decision.allow, decision.reason), (true, Reason::Default));
        assert_eq!(decision.dry_run.map(|dry| dry.allow), Some(would), "{id} {port}");
    }
    let counts: Vec<_> = policies.standing().iter().map(|one| (one.name.to_string(), one.counts)).collect();
    let counted = |would_allow, would_deny| Counts { would_allow, would_deny, ..Counts::default() };
    assert_eq!(counts, [("shop/try-allow".into(), counted(1, 1)), ("shop/try-deny".into(), counted(0, 1))]);
}

#[test]
fn counters_live_through_versions_of_their_policy() {
    let to = workload("shop", &[]);
    let version =
        |port: &str| authorization("shop", "p", json!({"rules": [{"to": [{"operation": {"ports": [port]}}]}]}));
    let mut policies = in_force(&[version("80")]);
    let request = |port| Request {
        source_ip: "10.0.0.1".parse().unwrap(),
        source: None,
        destination_ip: "10.9.0.1".parse().unwrap(),
        destination_port: port,
    };
    let before = policies.snapshot();
    assert!(before.select(&to).admit(&request(80)).allow);
    assert!(policies.upsert(Origin::File, parse(&version("81"))).changed);
    assert!(!policies.snapshot().select(&to).admit(&request(80)).allow);
    assert!(before.select(&to).decide(&request(80)).allow, "a snapshot never changes");
    assert_eq!(policies.standing()[0].counts, Counts { allowed: 1, denied: 1, ..Counts::default() });
}

#[test]
fn a_source_owns_what_it_told() {
    let deny = authorization("shop", "p", json!({"action": "DENY", "rules": [{}]}));
    let to = workload("shop", &[]);
    let kinds = [Kind::AuthorizationPolicy];
    let mut policies = Policies::new(ROOT_NAMESPACE);
    policies.upsert(Origin::Kube, parse(&deny));
    policies.upsert(Origin::File, parse(&deny));
    assert!(policies.sync(Origin::File, &kinds, Vec::new()).changed);
    assert!(!ask(&policies, &to, WEB, 80).allow, "the API's is still there");
    assert!(!policies.sync(Origin::Kube, &[Kind::PeerAuthentication], Vec::new()).changed, "another kind");
    assert!(policies.sync(Origin::Kube, &kinds, Vec::new()).changed);
    assert!(ask(&policies, &to, WEB, 80).allow);
    let twice = policies.sync(Origin::File, &kinds, vec![parse(&deny), parse(&deny)]);
    assert_eq!(twice.problems[0].to_string(), "AuthorizationPolicy shop/p: is given twice: the first counts");
}

#[test]
fn nothing_is_settled_before_every_source_has_told_all_it_has() {
    let mut policies = Policies::new(ROOT_NAMESPACE);
    assert!(policies.snapshot().settled(), "without sources there is nothing to wait for");
    let kinds = [Kind::AuthorizationPolicy, Kind::PeerAuthentication];
    assert!(policies.await_source(Origin::Kube, &kinds).changed);
    policies.upsert(Origin::Kube, parse(&peer("shop", "p", json!({"mtls": {"mode": "STRICT"}}))));
    assert!(!policies.snapshot().settled());
    policies.sync(Origin::Kube, &kinds[..1], Vec::new());
    policies.sync(Origin::File, &kinds, Vec::new());
    assert!(!policies.snapshot().settled());
    assert!(policies.sync(Origin::Kube, &kinds[1..], Vec::new()).changed);
    assert!(policies.snapshot().settled());
}

#[test]
fn policies_in_istiods_form_are_attached_by_name() {
    let attached = Authorization {
        namespace: "istio-system".into(),
        name: "istio_converted_static_strict".into(),
        scope: Scope::Attached,
        action: Action::Deny,
        dry_run: false,
        rules: vec![Rule {
            clauses: vec![Clause {
                of: "from".into(),
                matches: vec![Match { not_principals: vec![StringMatch::Presence], ..Match::default() }],
            }],
            unseen: Vec::new(),
        }],
    };
    let mut policies = Policies::new(ROOT_NAMESPACE);
    policies.upsert(Origin::Istiod, attached.into());
    let mut to = workload("shop", &[]);
    assert!(ask(&policies, &to, "10.0.0.1", 80).allow);
    to.policies.push("istio-system/istio_converted_static_strict".into());
    assert!(!ask(&policies, &to, "10.0.0.1", 80).allow && ask(&policies, &to, WEB, 80).allow);
}

#[test]
fn an_explanation_says_which_field_failed() {
    let objects = [
        authorization(
            "shop",
            "web",
            json!({"selector": {"matchLabels": {"app": "db"}}, "rules": [
            {"from": [{"source": {"namespaces": ["shop"]}}], "to": [{"operation": {"ports": ["5432"]}}]},
            {"to": [{"operation": {"paths": ["/x"]}}]}]}),
        ),
        authorization("shop", "other", json!({"selector": {"matchLabels": {"app": "x"}}, "rules": [{}]})),
    ];
    let policies = in_force(&objects);
    let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let request = Request {
        source_ip: "10.0.0.1".parse().unwrap(),
        source: Some(&id),
        destination_ip: "10.9.0.1".parse().unwrap(),
        destination_port: 80,
    };
    let text = policies.snapshot().explain(&workload("shop", &[("app", "db")]), &request).to_string();
    for line in [
        "REFUSED: allow policies exist, but none allowed",
        "mode PERMISSIVE, as nobody says otherwise",
        "ALLOW shop/web (workloads with app=db): does not match",
        "  ✗ rule 1",
        "      ✓ from: namespace shop is one of shop",
        "      ✗ to: port 80 is none of 5432",
        "  ✗ rule 2: never allows, as to[0].operation.paths cannot be enforced at L4",
        "ALLOW shop/other (workloads with app=x): not for this workload",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} is not in\n{text}");
    }
}

/// The rules of istio.md read straight off the object, value by value.
mod naive {
    use super::*;

    pub fn allows(objects: &[Value], to: &Workload, request: &Request<'_>) -> bool {
        let selected: Vec<_> = objects.iter().filter(|object| selects(object, to)).collect();
        let of = |action: &'static str| selected.iter().filter(move |object| object["spec"]["action"] == action);
        if of("DENY").any(|object| matches(object, request)) {
            return false;
        }
        of("ALLOW").count() == 0 || of("ALLOW").any(|object| matches(object, request))
    }

    fn selects(object: &Value, to: &Workload) -> bool {
        let namespace = &object["metadata"]["namespace"];
        let here = *namespace == *to.namespace || namespace == ROOT_NAMESPACE;
        let labels = object["spec"]["selector"]["matchLabels"].as_object();
        here && labels.is_none_or(|labels| {
            labels.iter().all(|(k, v)| to.labels.get(k.as_str()).is_some_and(|has| **has == *v.as_str().unwrap()))
        })
    }

    fn matches(object: &Value, request: &Request<'_>) -> bool {
        let deny = object["spec"]["action"] == "DENY";
        let namespace = object["metadata"]["namespace"].as_str().unwrap();
        let empty = Vec::new();
        let list = |value: &Value| value.as_array().unwrap_or(&empty).clone();
        list(&object["spec"]["rules"]).iter().any(|rule| {
            let part = |name: &str, inner: &str| {
                let parts = list(&rule[name]);
                parts.is_empty() || parts.iter().any(|part| fields(&part[inner], deny, namespace, request))
            };
            part("from", "source")
                && part("to", "operation")
                && list(&rule["when"]).iter().all(|when| {
                    let key = when["key"].as_str().unwrap();
                    let mut said = serde_json::Map::new();
                    let (yes, no) = match key {
                        "source.ip" => ("ipBlocks", "notIpBlocks"),
                        "source.namespace" => ("namespaces", "notNamespaces"),
                        "source.principal" => ("principals", "notPrincipals"),
                        "source.serviceAccount" => ("serviceAccounts", "notServiceAccounts"),
                        "destination.ip" => ("destinationIps", "notDestinationIps"),
                        "destination.port" => ("ports", "notPorts"),
                        _ => return deny,
                    };
                    said.insert(yes.into(), when["values"].clone());
                    said.insert(no.into(), when["notValues"].clone());
                    fields(&said.into(), deny, namespace, request)
                })
                && (deny || !unseen(rule))
        })
    }

    fn unseen(rule: &Value) -> bool {
        let text = rule.to_string();
        // With values; the condition's key stands for itself.
        [r#""methods":[""#, r#""remoteIpBlocks":[""#, "request.headers"].iter().any(|said| text.contains(said))
    }

    fn fields(said: &Value, deny: bool, namespace: &str, request: &Request<'_>) -> bool {
        let mut any = false;
        let mut all = true;
        for (field, values) in said.as_object().unwrap() {
            let Some(values) = values.as_array().filter(|values| !values.is_empty()) else { continue };
            if field == "methods" || field == "remoteIpBlocks" {
                continue;
            }
            any = true;
            let (plain, negated) = match field.strip_prefix("not") {
                Some(rest) => (rest[..1].to_lowercase() + &rest[1..], true),
                None => (field.clone(), false),
            };
            let hit = values.iter().any(|value| one(&plain, value.as_str().unwrap(), namespace, request));
            all &= hit != negated;
        }
        if any { all } else { deny }
    }

    fn one(field: &str, value: &str, namespace: &str, request: &Request<'_>) -> bool {
        let id = request.source;
        match field {
            "principals" => id.is_some_and(|id| string(value, id.principal())),
            "namespaces" => id.is_some_and(|id| string(value, id.namespace())),
            "serviceAccounts" => id.is_some_and(|id| {
                let full = if value.contains('/') { value.to_owned() } else { format!("{namespace}/{value}") };
                full == format!("{}/{}", id.namespace(), id.service_account())
            }),
            "ipBlocks" => network(value, request.source_ip),
            "destinationIps" => network(value, request.destination_ip),
            "ports" => value == request.destination_port.to_string(),
            other => panic!("{other}"),
        }
    }

    fn string(value: &str, name: &str) -> bool {
        match value {
            "*" => true,
            _ if value.starts_with('*') => name.ends_with(&value[1..]),
            _ if value.ends_with('*') => name.starts_with(&value[..value.len() - 1]),
            _ => value == name,
        }
    }

    /// Bit by bit.
    fn network(value: &str, address: IpAddr) -> bool {
        let (net, length) = value.split_once('/').unwrap_or((value, "128"));
        let bits = |address: IpAddr| -> Vec<bool> {
            match address.to_canonical() {
                IpAddr::V4(v4) => (0..32).map(|i| v4.to_bits() >> (31 - i) & 1 == 1).collect(),
                IpAddr::V6(v6) => (0..128).map(|i| v6.to_bits() >> (127 - i) & 1 == 1).collect(),
            }
        };
        let (net, address) = (bits(net.parse().unwrap()), bits(address));
        let length = length.parse::<usize>().unwrap().min(net.len());
        net.len() == address.len() && net[..length] == address[..length]
    }
}

mod generate {
    use super::*;

    const NAMESPACES: &[&str] = &["istio-system", "shop", "batch"];
    const ADDRESSES: &[&str] =
        &["10.0.0.1", "10.0.1.1", "10.255.0.1", "192.168.0.7", "fd00::1", "fd00::2:1", "::1", "::ffff:10.0.0.1"];
    const NETS: &[&str] = &[
        "10.0.0.1",
        "10.0.0.0/24",
        "10.0.0.0/23",
        "10.7.7.7/8",
        "0.0.0.0/0",
        "192.168.0.6/31",
        "fd00::/112",
        "::/0",
        "fd00::1",
    ];
    const PRINCIPALS: &[&str] = &["*", "d/ns/shop/sa/web", "d/ns/shop/*", "*/sa/job", "*b", "e*", "e/ns/batch/sa/job"];
    const NAMES: &[&str] = &["shop", "batch", "*", "s*", "*h"];
    const ACCOUNTS: &[&str] = &["web", "job", "shop/web", "batch/job", "shop/job"];
    const PORTS: &[&str] = &["80", "81", "65535"];

    fn some(values: &'static [&'static str]) -> impl Strategy<Value = Value> {
        prop::sample::subsequence(values, 0..=values.len().min(3)).prop_map(|values| json!(values))
    }

    fn fields(fields: Vec<(&'static str, &'static [&'static str])>) -> impl Strategy<Value = Value> {
        let one = prop::sample::select(fields).prop_flat_map(|(name, values)| (Just(name), some(values)));
        prop::collection::vec(one, 0..4)
            .prop_map(|fields| fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Value>())
    }

    fn source() -> impl Strategy<Value = Value> {
        fields(vec![
            ("principals", PRINCIPALS),
            ("notPrincipals", PRINCIPALS),
            ("namespaces", NAMES),
            ("notNamespaces", NAMES),
            ("serviceAccounts", ACCOUNTS),
            ("notServiceAccounts", ACCOUNTS),
            ("ipBlocks", NETS),
            ("notIpBlocks", NETS),
            ("remoteIpBlocks", &["10.0.0.1"]),
        ])
        .prop_map(|source| json!({"source": source}))
    }

    fn operation() -> impl Strategy<Value = Value> {
        fields(vec![("ports", PORTS), ("notPorts", PORTS), ("ports", PORTS), ("methods", &["GET"])])
            .prop_map(|operation| json!({"operation": operation}))
    }

    fn condition() -> impl Strategy<Value = Value> {
        let keys: Vec<(&str, &'static [&'static str])> = vec![
            ("source.ip", NETS),
            ("source.namespace", NAMES),
            ("source.principal", PRINCIPALS),
            ("source.serviceAccount", ACCOUNTS),
            ("destination.ip", NETS),
            ("destination.port", PORTS),
            ("request.headers[x]", NAMES),
        ];
        prop::sample::select(keys)
            .prop_flat_map(|(key, values)| {
                let values = prop::sample::subsequence(values, 1..=2);
                (Just(key), values, any::<bool>())
            })
            .prop_map(
                |(key, values, negated)| json!({"key": key, if negated { "notValues" } else { "values" }: values}),
            )
    }

    fn rule() -> impl Strategy<Value = Value> {
        use prop::collection::vec;
        (vec(source(), 0..3), vec(operation(), 0..3), vec(condition(), 0..2))
            .prop_map(|(from, to, when)| json!({"from": from, "to": to, "when": when}))
    }

    fn labels() -> impl Strategy<Value = Vec<(&'static str, &'static str)>> {
        prop::sample::subsequence(vec![("app", "db"), ("tier", "1")], 0..=2)
    }

    pub fn policies() -> impl Strategy<Value = Vec<Value>> {
        let action = prop::sample::select(vec!["ALLOW", "DENY"]);
        let spec = (action, labels(), prop::collection::vec(rule(), 0..3), prop::sample::select(NAMESPACES));
        prop::collection::vec(spec, 0..5).prop_map(|specs| {
            let object = |(index, (action, labels, rules, namespace)): (usize, (&str, Vec<_>, Vec<Value>, &str))| {
                let mut spec = json!({"action": action, "rules": rules});
                if !labels.is_empty() {
                    let labels: Value =
                        labels.into_iter().map(|(k, v): (&str, &str)| (k.to_owned(), json!(v))).collect();
                    spec["selector"] = json!({"matchLabels": labels});
                }
                authorization(namespace, &format!("p{index}"), spec)
            };
            specs.into_iter().enumerate().map(object).collect()
        })
    }

    pub fn to() -> impl Strategy<Value = Workload> {
        (prop::sample::select(NAMESPACES), labels()).prop_map(|(namespace, labels)| workload(namespace, &labels))
    }

    pub fn from() -> impl Strategy<Value = Option<SpiffeId>> {
        let id = (
            prop::sample::select(vec!["d", "e"]),
            prop::sample::select(vec!["shop", "batch"]),
            prop::sample::select(vec!["web", "job"]),
        );
        prop::option::weighted(0.8, id.prop_map(|(d, n, s)| SpiffeId::new(d, n, s).unwrap()))
    }

    pub fn address() -> impl Strategy<Value = IpAddr> {
        prop::sample::select(ADDRESSES).prop_map(|text| text.parse().unwrap())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    #[test]
    fn compiled_policies_decide_as_the_rules_read_naively(
        objects in generate::policies(),
        to in generate::to(),
        from in generate::from(),
        source_ip in generate::address(),
        destination_ip in generate::address(),
        port in prop::sample::select(vec![80u16, 81, 65535, 7]),
    ) {
        let policies = in_force(&objects);
        let request = Request { source_ip, source: from.as_ref(), destination_ip, destination_port: port };
        let snapshot = policies.snapshot();
        let decision = snapshot.select(&to).decide(&request);
        prop_assert_eq!(decision.allow, naive::allows(&objects, &to, &request), "{:?}", decision);
        let explained = snapshot.explain(&to, &request);
        prop_assert_eq!((explained.allow, explained.by), (decision.allow, decision.by));
    }

    #[test]
    fn the_order_of_events_does_not_matter(objects in generate::policies(), to in generate::to(), from in generate::from()) {
        let request = Request {
            source_ip: "10.0.0.1".parse().unwrap(),
            source: from.as_ref(),
            destination_ip: "10.0.1.1".parse().unwrap(),
            destination_port: 80,
        };
        let synced = in_force(&objects);
        let mut one_by_one = Policies::new(ROOT_NAMESPACE);
        for object in objects.iter().rev() {
            one_by_one.upsert(Origin::File, parse(object));
        }
        let decide = |policies: &Policies| policies.snapshot().select(&to).decide(&request);
        prop_assert_eq!(decide(&synced), decide(&one_by_one));
        for object in &objects {
            one_by_one.delete(Origin::File, &parse(object).key);
        }
        prop_assert_eq!(decide(&one_by_one).reason, Reason::Default);
    }
}
