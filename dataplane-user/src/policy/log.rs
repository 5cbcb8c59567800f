//! The decision log: one record per connection, with the field names of Istio's access logs.

use std::net::SocketAddr;

use super::{Decision, Workload};
use crate::{identity::SpiffeId, model::short_name};

/// A connection that was decided. What is not known is None and left out.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    pub source: SocketAddr,
    pub source_workload: Option<&'a str>,
    pub source_namespace: Option<&'a str>,
    pub source_identity: Option<&'a SpiffeId>,
    /// Where the connection came in: port 15008 when it was tunnelled.
    pub destination: SocketAddr,
    /// The application's address when it was tunnelled.
    pub destination_hbone: Option<SocketAddr>,
    pub destination_service: Option<&'a str>,
    pub destination_workload: &'a Workload,
    pub destination_identity: Option<&'a SpiffeId>,
    pub decision: &'a Decision,
}

impl Record<'_> {
    /// Writes it to target `access`: refusals at warn, what a dry run would change at info, the rest at debug.
    pub fn log(&self) {
        let decision = self.decision;
        macro_rules! record {
            ($level:ident, $message:literal, $($more:tt)*) => {
                tracing::$level!(
                    target: "access",
                    direction = "inbound",
                    src.addr = %self.source,
                    src.workload = self.source_workload,
                    src.namespace = self.source_namespace.or(self.source_identity.map(SpiffeId::namespace)),
                    src.identity = self.source_identity.map(SpiffeId::as_str),
                    dst.addr = %self.destination,
                    dst.hbone_addr = self.destination_hbone.map(tracing::field::display),
                    dst.service = self.destination_service,
                    dst.workload = short_name(&self.destination_workload.name),
                    dst.namespace = &*self.destination_workload.namespace,
                    dst.identity = self.destination_identity.map(SpiffeId::as_str),
                    policy = decision.by.as_deref(),
                    $($more)*
                    $message
                )
            };
        }
        if !decision.allow {
            record!(
                warn,
                "connection refused",
                error = format_args!("connection closed due to policy rejection: {decision}"),
            );
        } else if decision.dry_run.is_none() {
            record!(debug, "connection allowed",);
        }
        if let Some(dry_run) = &decision.dry_run {
            record!(
                info,
                "a dry run would decide otherwise",
                dry_run.allow = dry_run.allow,
                dry_run.policy = dry_run.by.as_deref(),
                dry_run.reason = %dry_run,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        policy::{DryRun, Reason},
        testing::logged,
    };

    #[test]
    fn a_refusal_is_one_line_with_the_fields_of_istios_access_log() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        let workload = Workload { name: "shop/db-0".into(), namespace: "shop".into(), ..Workload::default() };
        let decision = Decision {
            allow: false,
            reason: Reason::Denied,
            by: Some("shop/no-web".into()),
            dry_run: Some(DryRun { allow: true, reason: Reason::Allowed, by: Some("shop/try".into()) }),
        };
        let record = Record {
            source: "10.0.0.1:40000".parse().unwrap(),
            source_workload: None,
            source_namespace: None,
            source_identity: Some(&id),
            destination: "10.0.0.2:15008".parse().unwrap(),
            destination_hbone: Some("10.0.0.2:5432".parse().unwrap()),
            destination_service: None,
            destination_workload: &workload,
            destination_identity: None,
            decision: &decision,
        };
        let lines = logged(|| record.log());
        assert_eq!(lines.len(), 2, "{lines:?}");
        let fields = &lines[0]["fields"];
        for (name, value) in [
            ("src.addr", "10.0.0.1:40000"),
            ("src.identity", "spiffe://cluster.local/ns/shop/sa/web"),
            ("src.namespace", "shop"),
            ("dst.hbone_addr", "10.0.0.2:5432"),
            ("dst.workload", "db-0"),
            ("direction", "inbound"),
            ("error", "connection closed due to policy rejection: explicitly denied by: shop/no-web"),
        ] {
            assert_eq!(fields[name], value, "{name} in {lines:?}");
        }
        assert!(fields.get("dst.service").is_none() && lines[0]["target"] == "access");
        assert_eq!(lines[1]["fields"]["dry_run.policy"], "shop/try");
    }
}
