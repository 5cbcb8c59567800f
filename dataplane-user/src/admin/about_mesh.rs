//! What the agent answers of its mesh: certificates, policies, and why a connection is let in.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use super::protocol::{
    Carried, Certificate, Connection, ExplainPolicyRequest, Mesh, Policy, PolicyCounts, PolicyExplanation,
};
use crate::{
    identity,
    metrics::mesh::Facts,
    policy::{self, Standing, Workload},
    tunnel::{Shared, carried, traffic::Reporter},
};

/// In a few numbers, for `hitless status`.
pub fn summary(facts: &Facts) -> Mesh {
    let policies = facts.shared.policies.read(policy::Policies::standing);
    let mut mesh = Mesh {
        joined: facts.joined as u32,
        waiting: facts.waiting as u32,
        policies: policies.iter().filter(|policy| policy.in_force).count() as u32,
        policies_malformed: policies.iter().filter(|policy| policy.refused.is_some()).count() as u32,
        policies_known: facts.shared.policies.snapshot().settled(),
        ..Mesh::default()
    };
    for report in facts.shared.store.report() {
        *mesh.certificates.entry(report.state.as_str().into()).or_default() += 1;
    }
    mesh
}

impl From<identity::Report> for Certificate {
    fn from(report: identity::Report) -> Self {
        let identity::Report { identity, state, serial, not_before, not_after, next, roots, last_error } = report;
        let (state, roots) = (state.as_str().into(), roots as u64);
        Self { identity, state, serial, not_before, not_after, next, roots, last_error }
    }
}

impl From<carried::Carried> for Connection {
    fn from(row: carried::Carried) -> Self {
        let carried::Carried { access, age, sent, received } = row;
        let state = match (access.hbone, access.reporter, &access.destination_identity) {
            (Some(_), ..) => "hbone",
            // Both ends are here, and the node proves them.
            (None, Reporter::Source, Some(_)) => "sameNode",
            _ => "plaintext",
        };
        let pod = |workload: &Option<Arc<crate::mesh::Workload>>| workload.as_ref().map(|one| one.name.to_string());
        let identity = |id: &Option<identity::SpiffeId>| id.as_ref().map(ToString::to_string);
        let carried = Carried {
            direction: match access.reporter {
                Reporter::Source => "outbound".into(),
                Reporter::Destination => "inbound".into(),
            },
            service: access.service.as_deref().map(str::to_owned),
            source: pod(&access.source_workload),
            destination: pod(&access.destination_workload),
            source_identity: identity(&access.source_identity),
            destination_identity: identity(&access.destination_identity),
            age_ms: age.as_millis() as u64,
            bytes_sent: sent,
            bytes_received: received,
        };
        Self {
            client: access.source.to_string(),
            peer: access.destination.to_string(),
            backend: access.hbone.unwrap_or(access.destination).to_string(),
            state: state.into(),
            idle_ms: None,
            carried: Some(carried),
        }
    }
}

impl From<Standing> for Policy {
    fn from(standing: Standing) -> Self {
        let policy::Counts { allowed, denied, would_allow, would_deny } = standing.counts;
        Self {
            kind: standing.kind.into(),
            name: standing.name.to_string(),
            origin: standing.origin.to_string(),
            action: standing.action.map(|action| action.as_str().into()),
            dry_run: standing.dry_run,
            in_force: standing.in_force,
            refused: standing.refused,
            warnings: standing.warnings,
            counts: Some(PolicyCounts { allowed, denied, would_allow, would_deny }),
        }
    }
}

/// By the policies in force; counts nothing.
pub fn explain(shared: &Shared, asked: &ExplainPolicyRequest) -> Result<PolicyExplanation, tonic::Status> {
    let bad = |what: String| tonic::Status::invalid_argument(what);
    let address = |text: &Option<String>| {
        let parse = |text: &String| text.parse::<IpAddr>().map_err(|_| bad(format!("{text:?} is no IP address")));
        text.as_ref().map(parse).transpose()
    };
    let client = asked.identity.as_ref().map(|text| text.parse::<identity::SpiffeId>());
    let client = client.transpose().map_err(|error| bad(error.to_string()))?;
    let port = u16::try_from(asked.port).map_err(|_| bad(format!("{} is no port", asked.port)))?;
    let (workload, own) = match &asked.pod {
        Some(pod) => {
            let name = format!("{}/{pod}", asked.namespace);
            let Some(found) = shared.view.named(&name) else {
                let why =
                    format!("pod {name} is not in the mesh of this node: ask the agent of its node, or give labels");
                return Err(tonic::Status::not_found(why));
            };
            let Some(selected_by) = &found.selected_by else {
                return Err(tonic::Status::not_found(format!("pod {name} runs on another node: ask its agent")));
            };
            (Workload::clone(selected_by), found.addresses.first().copied())
        }
        None => {
            let labels = asked.labels.iter().map(|(key, value)| (Arc::from(&**key), Arc::from(&**value)));
            let workload = Workload {
                name: format!("{}/(by labels)", asked.namespace).into(),
                namespace: asked.namespace.as_str().into(),
                labels: labels.collect(),
                policies: Vec::new(),
            };
            (workload, None)
        }
    };
    let unknown = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let request = policy::Request {
        source_ip: address(&asked.source_ip)?.unwrap_or(unknown),
        source: client.as_ref(),
        destination_ip: address(&asked.destination_ip)?.or(own).unwrap_or(unknown),
        destination_port: port,
    };
    let explanation = shared.policies.snapshot().explain(&workload, &request);
    let json = serde_json::to_string(&explanation).map_err(|error| tonic::Status::internal(error.to_string()))?;
    Ok(PolicyExplanation { json, text: explanation.to_string() })
}
