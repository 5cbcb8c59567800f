//! One authorization policy, compiled: does it match a connection?
//!
//! Rules are alternatives; all clauses of a rule must hold, of each any match, of that every field, and of a field any
//! value (a negated field: none). That is Istio's `istio.security.Authorization`, for policies of either origin.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use serde::Serialize;

use super::{
    Request,
    counters::Counters,
    values::{Cidr, Nets, ServiceAccount, StringMatch, Strings},
};

/// What names a policy: namespace/name.
pub type PolicyName = Arc<str>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    Allow,
    Deny,
}

impl Action {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
        }
    }
}

/// Which workloads a policy is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of the mesh.
    Global,
    /// All of its namespace.
    Namespace,
    /// Those of its namespace with these labels; those of every namespace when it is in the root namespace.
    Labels(BTreeMap<Arc<str>, Arc<str>>),
    /// Those that name it in [`super::Workload::policies`]: how istiod attaches policies.
    Attached,
}

/// A policy before it is compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub scope: Scope,
    pub action: Action,
    /// It decides nothing; what it would have decided is counted and logged.
    pub dry_run: bool,
    pub rules: Vec<Rule>,
}

/// One rule; without clauses it matches every connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pub clauses: Vec<Clause>,
    /// What it says that L4 cannot see, such as `to[0].operation.methods`: an ALLOW rule then never matches, a DENY rule
    /// matches on the rest.
    pub unseen: Vec<String>,
}

/// Alternatives; without any it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    /// Where it stands: `from`, `to`, `when[0]`.
    pub of: Arc<str>,
    pub matches: Vec<Match>,
}

/// Fields that must all hold; an empty list says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    /// Without `spiffe://`.
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub service_accounts: Vec<ServiceAccount>,
    pub not_service_accounts: Vec<ServiceAccount>,
    pub source_ips: Vec<Cidr>,
    pub not_source_ips: Vec<Cidr>,
    pub destination_ips: Vec<Cidr>,
    pub not_destination_ips: Vec<Cidr>,
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
}

/// A policy in force.
#[derive(Debug)]
pub struct Policy {
    pub name: PolicyName,
    pub source: Authorization,
    pub counters: Arc<Counters>,
    rules: Box<[CompiledRule]>,
}

#[derive(Debug)]
pub(super) struct CompiledRule {
    pub clauses: Box<[CompiledClause]>,
    /// It says what cannot be seen here, and so it must not allow.
    pub never: bool,
}

#[derive(Debug)]
pub(super) struct CompiledClause {
    pub matches: Box<[CompiledMatch]>,
}

#[derive(Debug)]
pub(super) struct CompiledMatch {
    pub fields: Box<[Field]>,
    /// What it says when it has no field. istiod writes such matches where it left out what L4 cannot see: they deny
    /// rather than let pass, and never allow.
    pub bare: bool,
}

/// What of a connection a field looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Subject {
    Namespace,
    Principal,
    ServiceAccount,
    SourceIp,
    DestinationIp,
    DestinationPort,
}

#[derive(Debug)]
pub(super) struct Field {
    pub subject: Subject,
    pub negated: bool,
    values: Values,
}

#[derive(Debug)]
enum Values {
    Strings(Strings),
    /// Sorted.
    Accounts(Box<[ServiceAccount]>),
    Nets(Nets),
    /// Sorted.
    Ports(Box<[u16]>),
}

impl Policy {
    pub(super) fn new(source: Authorization, counters: Arc<Counters>) -> Self {
        let rules = source.rules.iter().map(|rule| CompiledRule::new(rule, source.action)).collect();
        Self { name: format!("{}/{}", source.namespace, source.name).into(), source, counters, rules }
    }

    /// Does any rule match?
    pub fn matches(&self, request: &Request<'_>) -> bool {
        self.rules.iter().any(|rule| rule.matches(request))
    }

    pub(super) fn rules(&self) -> &[CompiledRule] {
        &self.rules
    }
}

impl CompiledRule {
    fn new(rule: &Rule, action: Action) -> Self {
        let bare = action == Action::Deny;
        let compile = |clause: &Clause| CompiledClause {
            matches: clause.matches.iter().map(|one| CompiledMatch { fields: one.compile(), bare }).collect(),
        };
        Self {
            clauses: rule.clauses.iter().map(compile).collect(),
            never: action == Action::Allow && !rule.unseen.is_empty(),
        }
    }

    pub(super) fn matches(&self, request: &Request<'_>) -> bool {
        !self.never && self.clauses.iter().all(|clause| clause.holds(request))
    }
}

impl CompiledClause {
    pub(super) fn holds(&self, request: &Request<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|one| one.holds(request))
    }
}

impl CompiledMatch {
    pub(super) fn holds(&self, request: &Request<'_>) -> bool {
        if self.fields.is_empty() { self.bare } else { self.fields.iter().all(|field| field.holds(request)) }
    }
}

impl Match {
    /// The fields that say something; the cheapest to look at first.
    fn compile(&self) -> Box<[Field]> {
        let mut fields = Vec::new();
        let mut add = |subject, negated, empty: bool, values: &dyn Fn() -> Values| {
            if !empty {
                fields.push(Field { subject, negated, values: values() });
            }
        };
        for (negated, ports) in [(false, &self.destination_ports), (true, &self.not_destination_ports)] {
            add(Subject::DestinationPort, negated, ports.is_empty(), &|| Values::Ports(sorted(ports)));
        }
        for (negated, nets) in [(false, &self.source_ips), (true, &self.not_source_ips)] {
            add(Subject::SourceIp, negated, nets.is_empty(), &|| Values::Nets(Nets::new(nets)));
        }
        for (negated, nets) in [(false, &self.destination_ips), (true, &self.not_destination_ips)] {
            add(Subject::DestinationIp, negated, nets.is_empty(), &|| Values::Nets(Nets::new(nets)));
        }
        for (negated, accounts) in [(false, &self.service_accounts), (true, &self.not_service_accounts)] {
            add(Subject::ServiceAccount, negated, accounts.is_empty(), &|| Values::Accounts(sorted(accounts)));
        }
        for (negated, names) in [(false, &self.namespaces), (true, &self.not_namespaces)] {
            add(Subject::Namespace, negated, names.is_empty(), &|| Values::Strings(Strings::new(names)));
        }
        for (negated, names) in [(false, &self.principals), (true, &self.not_principals)] {
            add(Subject::Principal, negated, names.is_empty(), &|| Values::Strings(Strings::new(names)));
        }
        fields.into()
    }

    /// The values of a field as they were written.
    pub(super) fn written(&self, subject: Subject, negated: bool) -> Vec<String> {
        fn all<T: fmt::Display>(values: &[T]) -> Vec<String> {
            values.iter().map(T::to_string).collect()
        }
        match (subject, negated) {
            (Subject::Namespace, false) => all(&self.namespaces),
            (Subject::Namespace, true) => all(&self.not_namespaces),
            (Subject::Principal, false) => all(&self.principals),
            (Subject::Principal, true) => all(&self.not_principals),
            (Subject::ServiceAccount, false) => all(&self.service_accounts),
            (Subject::ServiceAccount, true) => all(&self.not_service_accounts),
            (Subject::SourceIp, false) => all(&self.source_ips),
            (Subject::SourceIp, true) => all(&self.not_source_ips),
            (Subject::DestinationIp, false) => all(&self.destination_ips),
            (Subject::DestinationIp, true) => all(&self.not_destination_ips),
            (Subject::DestinationPort, false) => all(&self.destination_ports),
            (Subject::DestinationPort, true) => all(&self.not_destination_ports),
        }
    }
}

fn sorted<T: Clone + Ord>(values: &[T]) -> Box<[T]> {
    let mut values = values.to_vec();
    values.sort_unstable();
    values.dedup();
    values.into()
}

impl Field {
    pub(super) fn holds(&self, request: &Request<'_>) -> bool {
        self.contains(request) != self.negated
    }

    fn contains(&self, request: &Request<'_>) -> bool {
        let address = |subject| -> IpAddr {
            if subject == Subject::SourceIp { request.source_ip } else { request.destination_ip }
        };
        match &self.values {
            Values::Ports(ports) => ports.binary_search(&request.destination_port).is_ok(),
            Values::Nets(nets) => nets.contain(address(self.subject)),
            // Who has no identity is nobody: nothing positive matches, everything negated does.
            Values::Accounts(accounts) => request.source.is_some_and(|id| {
                let wanted = (id.namespace(), id.service_account());
                accounts.binary_search_by(|account| (&*account.namespace, &*account.name).cmp(&wanted)).is_ok()
            }),
            Values::Strings(strings) => request.source.is_some_and(|id| {
                strings.contain(if self.subject == Subject::Principal { id.principal() } else { id.namespace() })
            }),
        }
    }
}
