//! The mesh in metrics: what the tunnel did, certificates, policies.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use super::text::{Exposition, Kind};
use crate::{
    policy::Standing,
    tunnel::{
        Count, Shared, host_of,
        traffic::{End, Series, Tally, Traffic, UNKNOWN},
    },
};

/// What the agent's thread tells of the mesh; the rest is looked up by whoever wants it.
#[derive(Clone, Debug)]
pub struct Facts {
    pub shared: Arc<Shared>,
    /// Pods here whose connections are carried, and those whose listeners are still to be opened.
    pub joined: usize,
    pub waiting: usize,
}

pub fn expose(out: &mut Exposition, facts: &Facts) {
    let help = "Pods of this node in the mesh: joined, or waiting for their listeners.";
    out.family("hitless_mesh_pods", Kind::Gauge, help);
    for (state, count) in [("joined", facts.joined), ("waiting", facts.waiting)] {
        out.sample(&[("state", state)], count as f64);
    }
    tunnel(out, &facts.shared);
    traffic(out, &facts.shared.traffic, &facts.shared.cluster);
    certificates(out, &facts.shared);
    policies(out, &facts.shared);
}

fn tunnel(out: &mut Exposition, shared: &Shared) {
    let count = |count| shared.counts.get(count) as f64;
    let help = "Connections (outbound) and streams (inbound) of the mesh, by what became of them.";
    out.family("hitless_tunnel_connections_total", Kind::Counter, help);
    for (direction, outcome, which) in [
        ("outbound", "tunnelled", Count::OutboundTunnelled),
        ("outbound", "local", Count::OutboundLocal),
        ("outbound", "plaintext", Count::OutboundPlain),
        ("outbound", "failed", Count::OutboundFailed),
        ("outbound", "denied", Count::OutboundDenied),
        ("outbound", "stray", Count::OutboundStray),
        ("inbound", "tunnelled", Count::InboundTunnelled),
        ("inbound", "plaintext", Count::InboundPlain),
        ("inbound", "bounced", Count::InboundBounced),
        ("inbound", "failed", Count::InboundFailed),
        ("inbound", "denied", Count::InboundDenied),
        ("inbound", "bad_request", Count::InboundBad),
        ("inbound", "rejected", Count::InboundRejected),
    ] {
        out.sample(&[("direction", direction), ("outcome", outcome)], count(which));
    }
    let help = "Backends that were passed over before a connection's first byte.";
    out.one("hitless_tunnel_repicks_total", Kind::Counter, help, count(Count::OutboundRepicked));
    let help = "Connections that were cut because the policies changed.";
    out.one("hitless_tunnel_revoked_total", Kind::Counter, help, count(Count::Revoked));
    let help = "Bytes of ended connections that the pods here sent and received.";
    out.family("hitless_tunnel_bytes_total", Kind::Counter, help);
    out.sample(&[("direction", "sent")], count(Count::BytesSent));
    out.sample(&[("direction", "received")], count(Count::BytesReceived));
    let (connections, streams) = shared.pooled.read();
    let help = "HBONE connections to other nodes that are kept open.";
    out.one("hitless_tunnel_pool_connections", Kind::Gauge, help, connections as f64);
    out.one("hitless_tunnel_pool_streams", Kind::Gauge, "Streams that run on them.", streams as f64);
}

/// One of a tally's numbers.
type Number = fn(&Tally) -> &AtomicU64;

/// By the names and labels that Istio's dashboards expect.
fn traffic(out: &mut Exposition, traffic: &Traffic, cluster: &str) {
    let all: Vec<_> = traffic.all().into_iter().map(|(series, tally)| (labels(&series, cluster), tally)).collect();
    let families: [(&str, &str, Number); 5] = [
        ("istio_tcp_connections_opened_total", "Connections that were opened.", |tally| &tally.opened),
        ("istio_tcp_connections_closed_total", "Connections that were closed.", |tally| &tally.closed),
        ("istio_tcp_connections_failed_total", "Connections that could not be opened.", |tally| &tally.failed),
        ("istio_tcp_sent_bytes_total", "Bytes of responses, of ended connections.", |tally| &tally.response_bytes),
        ("istio_tcp_received_bytes_total", "Bytes of requests, of ended connections.", |tally| &tally.request_bytes),
    ];
    for (name, help, of) in families {
        out.family(name, Kind::Counter, help);
        for (labels, tally) in &all {
            let labels: Vec<_> = labels.iter().map(|(label, value)| (*label, value.as_str())).collect();
            out.sample(&labels, of(tally).load(Relaxed) as f64);
        }
    }
}

/// Both ends are in this cluster: the mesh of a node knows no other.
fn labels(series: &Series, cluster: &str) -> Vec<(&'static str, String)> {
    let known = |text: &str| if text.is_empty() { UNKNOWN.to_owned() } else { text.to_owned() };
    let principal = |end: &End| end.principal.as_ref().map_or_else(|| UNKNOWN.to_owned(), ToString::to_string);
    let Series { reporter, source, destination, service, flags, mutual_tls } = series;
    let (service_namespace, service_name) = service.split_once('/').unwrap_or_default();
    vec![
        ("reporter", reporter.as_str().into()),
        ("source_workload", known(&source.workload)),
        ("source_workload_namespace", known(&source.namespace)),
        ("source_canonical_service", known(canonical(source))),
        ("source_principal", principal(source)),
        ("source_app", known(&source.app)),
        ("source_version", known(&source.version)),
        ("source_cluster", cluster.into()),
        ("destination_service", if service.is_empty() { UNKNOWN.into() } else { host_of(service) }),
        ("destination_service_name", known(service_name)),
        ("destination_service_namespace", known(service_namespace)),
        ("destination_workload", known(&destination.workload)),
        ("destination_workload_namespace", known(&destination.namespace)),
        ("destination_canonical_service", known(canonical(destination))),
        ("destination_principal", principal(destination)),
        ("destination_app", known(&destination.app)),
        ("destination_version", known(&destination.version)),
        ("destination_cluster", cluster.into()),
        ("request_protocol", "tcp".into()),
        ("response_flags", flags.as_str().into()),
        ("connection_security_policy", if *mutual_tls { "mutual_tls".into() } else { UNKNOWN.into() }),
    ]
}

/// Without a label for it: the app, and without one the workload, as in Istio.
fn canonical(end: &End) -> &str {
    if end.app.is_empty() { &end.workload } else { &end.app }
}

fn certificates(out: &mut Exposition, shared: &Shared) {
    let numbers = shared.store.numbers();
    let help = "Seconds until the certificate of an identity expires; negative: it has.";
    out.family("hitless_certificate_expiry_seconds", Kind::Gauge, help);
    for (identity, seconds) in &numbers.expiry {
        out.sample(&[("identity", identity.as_str())], *seconds as f64);
    }
    let help = "Seconds until what certificates are signed with expires (signing: known of the mesh's own authority), and the \
                last root of the trust domain.";
    out.family("hitless_authority_expiry_seconds", Kind::Gauge, help);
    if let Some(seconds) = numbers.authority_expiry {
        out.sample(&[("certificate", "signing"), ("trust_domain", "")], seconds as f64);
    }
    for (domain, seconds) in &numbers.roots_expiry {
        out.sample(&[("certificate", "root"), ("trust_domain", domain)], *seconds as f64);
    }
    let help = "Identities that have no certificate yet.";
    out.one("hitless_certificates_waiting", Kind::Gauge, help, numbers.waiting as f64);
    let help = "Certificates taken into use, and questions to the authority without a usable answer.";
    out.family("hitless_certificate_renewals_total", Kind::Counter, help);
    out.sample(&[("outcome", "ok")], numbers.renewed as f64);
    out.sample(&[("outcome", "failed")], numbers.failed as f64);
}

fn policies(out: &mut Exposition, shared: &Shared) {
    let (standing, malformed) = shared.policies.read(|policies| (policies.standing(), policies.malformed()));
    let known = shared.policies.snapshot().settled();
    let help = "1: every source of policies has told all it has. Until it has, nothing enters the pods of the mesh.";
    out.one("hitless_policies_known", Kind::Gauge, help, if known { 1.0 } else { 0.0 });
    let number = |is: fn(&Standing) -> bool| standing.iter().filter(|one| is(one)).count() as f64;
    out.family("hitless_policies", Kind::Gauge, "Policies: in force, or malformed in their newest version.");
    out.sample(&[("state", "in_force")], number(|one| one.in_force));
    out.sample(&[("state", "malformed")], number(|one| one.refused.is_some()));
    let help = "Versions of policies that were malformed.";
    out.one("hitless_policies_malformed_total", Kind::Counter, help, malformed as f64);
    let help = "Connections that a policy decided, or would have were it not a dry run.";
    out.family("hitless_policy_decisions_total", Kind::Counter, help);
    for one in standing.iter().filter(|one| one.action.is_some()) {
        let origin = one.origin.to_string();
        let counts = one.counts;
        let decided = [("allowed", counts.allowed), ("denied", counts.denied)];
        let tried = [("would_allow", counts.would_allow), ("would_deny", counts.would_deny)];
        for (decision, count) in if one.dry_run { tried } else { decided } {
            out.sample(&[("policy", &one.name), ("origin", &origin), ("decision", decision)], count as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::traffic::{Flags, Reporter};

    #[test]
    fn connections_are_told_by_the_labels_of_istios_dashboards() {
        let traffic = Traffic::default();
        let source = End { workload: "web".into(), namespace: "shop".into(), app: "front".into(), ..End::default() };
        let series = Series {
            reporter: Reporter::Source,
            source,
            destination: End::default(),
            service: "data/db".into(),
            flags: Flags::None,
            mutual_tls: true,
        };
        traffic.opened(series.clone()).response_bytes.fetch_add(9, Relaxed);
        traffic.failed(Series { flags: Flags::Denied, mutual_tls: false, ..series });
        let mut out = Exposition::default();
        super::traffic(&mut out, &traffic, "west");
        let text = out.finish();
        let line = |name: &str, label: &str| {
            let found = text.lines().find(|line| line.starts_with(&format!("{name}{{")) && line.contains(label));
            found.unwrap_or_else(|| panic!("no {name} with {label} in\n{text}")).to_owned()
        };
        let opened = line("istio_tcp_connections_opened_total", "connection_security_policy=\"mutual_tls\"");
        for label in [
            "reporter=\"source\"",
            "source_cluster=\"west\"",
            "destination_cluster=\"west\"",
            "source_workload=\"web\"",
            "source_canonical_service=\"front\"",
            "destination_service=\"db.data.svc.cluster.local\"",
            "destination_service_name=\"db\"",
            "destination_workload=\"unknown\"",
            "request_protocol=\"tcp\"",
        ] {
            assert!(opened.contains(label), "{label} is not in {opened}");
        }
        assert!(opened.ends_with("} 1"), "{opened}");
        assert!(line("istio_tcp_connections_failed_total", "response_flags=\"DENY\"").ends_with("} 1"));
        assert!(line("istio_tcp_sent_bytes_total", "response_flags=\"-\"").ends_with("} 9"));
    }
}
