//! The mesh in the shape of ztunnel's `/config_dump`, as tools such as `istioctl ztunnel-config` read it: keys and words are
//! Istio's, the rest is what this agent knows. No private key is in it.

use std::sync::Arc;

use k8s_openapi::ByteString;
use pem::{EncodeConfig, LineEnding, Pem};
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::protocol::MeshObject;
use crate::{
    identity::{Credential, SpiffeId},
    mesh::Workload,
    model::short_name,
    policy::{Action, Authorization, Match, Policies, Rule, Scope, StringMatch},
    tunnel::{
        Access, Shared,
        carried::Carried,
        host_of,
        traffic::{Reporter, workload_of},
    },
};

/// Its lists but for the services, which the mesh does not hold. `carried`: the connections that are carried now.
pub fn dump(shared: &Shared, carried: &[Carried]) -> Vec<MeshObject> {
    let object = |list: &str, value: Value| MeshObject { list: list.into(), json: value.to_string() };
    let workloads = shared.view.all();
    let policies = shared.policies.read(Policies::authorizations);
    let held = shared.store.held();
    let here = workloads.values().filter(|one| one.pod != 0);
    let states = here.map(|one| object("workloadState", workload_state(one, carried, &shared.cluster)));
    let workloads = workloads.values().map(|one| object("workloads", workload(one, &shared.cluster)));
    let policies = policies.iter().map(|one| object("policies", policy(&one.source)));
    let certificates = held
        .iter()
        .map(|(id, held, error)| object("certificates", certificates(id, held.as_deref(), error.as_deref())));
    workloads.chain(policies).chain(certificates).chain(states).collect()
}

/// How Istio names a pod.
pub fn uid(cluster: &str, name: &str) -> String {
    format!("{cluster}//Pod/{name}")
}

fn workload(workload: &Workload, cluster: &str) -> Value {
    let name = short_name(&workload.name);
    let labels = workload.selected_by.as_ref().map(|selected_by| &selected_by.labels);
    let label = |names: &[&str]| labels.and_then(|labels| names.iter().find_map(|name| labels.get(*name)));
    let of = workload_of(name);
    let canonical = label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let revision = label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    let attached = workload.selected_by.as_ref().map(|selected_by| &selected_by.policies[..]).unwrap_or_default();
    json!({
        "uid": uid(cluster, &workload.name),
        "workloadIps": workload.addresses,
        "protocol": "HBONE",
        "name": name,
        "namespace": workload.namespace(),
        "trustDomain": workload.identity.trust_domain(),
        "serviceAccount": workload.identity.service_account(),
        "workloadName": of,
        "workloadType": "pod",
        "canonicalName": canonical.map_or(of, |name| name),
        "canonicalRevision": revision.map_or("latest", |revision| revision),
        "clusterId": cluster,
        // Of a pod of this node it is filled in by whoever knows the node's name.
        "node": "",
        "local": workload.pod != 0,
        "nativeTunnel": false,
        "status": "Healthy",
        "authorizationPolicies": attached,
    })
}

/// A pod here with what is carried for it; ztunnel has these by another name of the pod, and tools by none.
fn workload_state(workload: &Workload, carried: &[Carried], cluster: &str) -> Value {
    let is = |end: &Option<Arc<Workload>>| end.as_ref().is_some_and(|end| end.name == workload.name);
    let of = |reporter: Reporter| -> Vec<Value> {
        let own = carried.iter().map(|row| &row.access).filter(|access| {
            let end = match reporter {
                Reporter::Source => &access.source_workload,
                Reporter::Destination => &access.destination_workload,
            };
            access.reporter == reporter && is(end)
        });
        own.map(connection).collect()
    };
    json!({
        "uid": uid(cluster, &workload.name),
        "state": "Up",
        "connections": { "inbound": of(Reporter::Destination), "outbound": of(Reporter::Source) },
        "info": {
            "name": short_name(&workload.name),
            "namespace": workload.namespace(),
            "trustDomain": workload.identity.trust_domain(),
            "serviceAccount": workload.identity.service_account(),
        },
    })
}

/// Out of a pod: what it asked for, and the peer that it was led to. Into one: the application's address.
fn connection(access: &Access) -> Value {
    let protocol = if access.hbone.is_some() { "HBONE" } else { "TCP" };
    let (original, actual) = match access.reporter {
        Reporter::Source => (json!(access.asked), access.destination),
        Reporter::Destination => {
            (json!(access.service.as_deref().map(host_of)), access.hbone.unwrap_or(access.destination))
        }
    };
    json!({ "src": access.source, "originalDst": original, "actualDst": actual, "protocol": protocol })
}

fn policy(policy: &Authorization) -> Value {
    let action = match policy.action {
        Action::Allow => "Allow",
        Action::Deny => "Deny",
    };
    let scope = match policy.scope {
        Scope::Global => "Global",
        Scope::Namespace => "Namespace",
        Scope::Labels(_) | Scope::Attached => "WorkloadSelector",
    };
    json!({
        "name": policy.name,
        "namespace": policy.namespace,
        "scope": scope,
        "action": action,
        "dryRun": policy.dry_run,
        "rules": policy.rules.iter().map(rule).collect::<Vec<_>>(),
    })
}

/// A rule is clauses, each of which is alternatives.
fn rule(rule: &Rule) -> Vec<Vec<Value>> {
    rule.clauses.iter().map(|clause| clause.matches.iter().map(one_match).collect()).collect()
}

fn one_match(one: &Match) -> Value {
    let strings = |values: &[StringMatch]| -> Value {
        let one = |value: &StringMatch| match value {
            StringMatch::Exact(text) => json!({ "Exact": text }),
            StringMatch::Prefix(text) => json!({ "Prefix": text }),
            StringMatch::Suffix(text) => json!({ "Suffix": text }),
            StringMatch::Presence => json!({ "Presence": {} }),
        };
        values.iter().map(one).collect()
    };
    let texts = |values: &[crate::policy::Cidr]| -> Value { values.iter().map(ToString::to_string).collect() };
    let accounts = |values: &[crate::policy::ServiceAccount]| -> Value {
        let one = |account: &crate::policy::ServiceAccount| json!({ "namespace": account.namespace, "serviceAccount": account.name });
        values.iter().map(one).collect()
    };
    let fields = [
        ("namespaces", strings(&one.namespaces)),
        ("notNamespaces", strings(&one.not_namespaces)),
        ("principals", strings(&one.principals)),
        ("notPrincipals", strings(&one.not_principals)),
        ("serviceAccounts", accounts(&one.service_accounts)),
        ("notServiceAccounts", accounts(&one.not_service_accounts)),
        ("sourceIps", texts(&one.source_ips)),
        ("notSourceIps", texts(&one.not_source_ips)),
        ("destinationIps", texts(&one.destination_ips)),
        ("notDestinationIps", texts(&one.not_destination_ips)),
        ("destinationPorts", json!(one.destination_ports)),
        ("notDestinationPorts", json!(one.not_destination_ports)),
    ];
    let said = fields.into_iter().filter(|(_, value)| value.as_array().is_some_and(|values| !values.is_empty()));
    Value::Object(said.map(|(name, value)| (name.to_owned(), value)).collect())
}

fn certificates(id: &SpiffeId, held: Option<&Credential>, error: Option<&str>) -> Value {
    let state = match (held, error) {
        (Some(_), _) => "Available".to_owned(),
        (None, None) => "Initializing".to_owned(),
        (None, Some(error)) => format!("Unavailable: {error}"),
    };
    let all = |certificates: &[CertificateDer<'static>]| -> Vec<Value> {
        certificates.iter().filter_map(|certificate| one_certificate(certificate)).collect()
    };
    json!({
        "identity": id.as_str(),
        "state": state,
        "certChain": held.map_or(Vec::new(), |held| all(&held.key.cert)),
        "rootCerts": held.map_or(Vec::new(), |held| all(held.trust.certificates())),
    })
}

fn one_certificate(der: &CertificateDer<'_>) -> Option<Value> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let validity = certificate.validity();
    Some(json!({
        // PEM, and that in Base64.
        "pem": ByteString(text(der).into_bytes()),
        "serialNumber": certificate.tbs_certificate.serial.to_string(),
        "validFrom": moment(validity.not_before.timestamp()),
        "expirationTime": moment(validity.not_after.timestamp()),
    }))
}

/// As PEM (RFC 7468 section 5).
fn text(der: &[u8]) -> String {
    let lf = EncodeConfig::new().set_line_ending(LineEnding::LF);
    pem::encode_config(&Pem::new("CERTIFICATE", der), lf)
}

/// RFC 3339.
fn moment(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{identity::pem as pem_files, policy::Clause};

    #[test]
    fn a_workload_has_the_fields_that_istioctl_reads() {
        let one = Workload {
            name: "shop/web-5d4f8c7b9c-x2x7q".into(),
            identity: SpiffeId::new("cluster.local", "shop", "front").unwrap(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            pod: 0,
            selected_by: None,
        };
        let dumped = workload(&one, "west");
        for (key, value) in [
            ("uid", json!("west//Pod/shop/web-5d4f8c7b9c-x2x7q")),
            ("workloadIps", json!(["10.0.0.1"])),
            ("protocol", json!("HBONE")),
            ("clusterId", json!("west")),
            ("name", json!("web-5d4f8c7b9c-x2x7q")),
            ("namespace", json!("shop")),
            ("serviceAccount", json!("front")),
            ("trustDomain", json!("cluster.local")),
            ("workloadName", json!("web")),
            ("canonicalName", json!("web")),
            ("status", json!("Healthy")),
        ] {
            assert_eq!(dumped[key], value, "{key}");
        }
    }

    #[test]
    fn a_policy_is_rules_of_clauses_of_alternatives() {
        let one = Match {
            principals: vec![StringMatch::parse("cluster.local/ns/shop/*")],
            destination_ports: vec![80],
            ..Match::default()
        };
        let clause = Clause { of: "from".into(), matches: vec![one] };
        let one = Authorization {
            namespace: "shop".into(),
            name: "front".into(),
            scope: Scope::Namespace,
            action: Action::Allow,
            dry_run: false,
            rules: vec![Rule { clauses: vec![clause], unseen: Vec::new() }],
        };
        let wanted = json!({"name": "front", "namespace": "shop", "scope": "Namespace", "action": "Allow", "dryRun": false,
            "rules": [[[{"principals": [{"Prefix": "cluster.local/ns/shop/"}], "destinationPorts": [80]}]]]});
        assert_eq!(policy(&one), wanted);
    }

    #[test]
    fn certificates_are_told_without_their_keys() {
        let issued = rcgen::generate_simple_self_signed(["web".to_owned()]).unwrap();
        let der = issued.cert.der().clone();
        let again = pem_files::certificates(text(&der).as_bytes(), &"it").unwrap();
        assert_eq!(again, std::slice::from_ref(&der), "its PEM is read again");
        let told = one_certificate(&der).unwrap();
        assert!(told["serialNumber"].as_str().unwrap().bytes().all(|byte| byte.is_ascii_digit()), "{told}");
        assert_eq!(told["validFrom"], "1975-01-01T00:00:00Z");
        let id = SpiffeId::new("cluster.local", "shop", "web").unwrap();
        let none = certificates(&id, None, Some("nobody answers"));
        assert_eq!(none["state"], "Unavailable: nobody answers");
        assert_eq!(none["certChain"], json!([]));
        let names: Vec<Arc<str>> = told.as_object().unwrap().keys().map(|key| key.as_str().into()).collect();
        assert_eq!(
            names.iter().map(|name| &**name).collect::<Vec<_>>(),
            ["expirationTime", "pem", "serialNumber", "validFrom"]
        );
    }
}
