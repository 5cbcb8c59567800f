//! Why a connection is let in or not: every policy that was considered, and of each rule what held and what did not.

use std::fmt::{self, Write};

use serde::Serialize;

use super::{
    Action, Decision, Mode, Policy, PolicyName, Reason, Request, Scope, Snapshot, Subject, Workload,
    rule::{Clause, CompiledClause, CompiledMatch, Field, Match},
    set::selects,
};

/// The answer to `hitless policy explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub allow: bool,
    pub reason: Reason,
    /// The decision as a sentence.
    pub decision: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<PolicyName>,
    /// What the dry runs would have changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<String>,
    pub mode: Mode,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode_by: Option<PolicyName>,
    pub policies: Vec<Considered>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Considered {
    pub name: PolicyName,
    pub action: Action,
    pub dry_run: bool,
    /// Which workloads it is for.
    pub scope: String,
    /// Is it for this one?
    pub selected: bool,
    pub matched: bool,
    /// Of a policy that is for this workload.
    pub rules: Vec<RuleTrace>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleTrace {
    pub matched: bool,
    /// What of it cannot be enforced at L4.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unseen: Vec<String>,
    /// All of them must hold.
    pub clauses: Vec<ClauseTrace>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClauseTrace {
    /// `from`, `to`, `when[0] …`.
    pub of: String,
    pub matched: bool,
    /// Any of them must match.
    pub matches: Vec<MatchTrace>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MatchTrace {
    pub matched: bool,
    /// All of them must hold.
    pub fields: Vec<FieldTrace>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FieldTrace {
    pub subject: Subject,
    /// It holds when no value matches.
    pub negated: bool,
    pub matched: bool,
    /// What the connection has.
    pub actual: String,
    pub values: Vec<String>,
}

impl Snapshot {
    /// Decides as [`super::Selected::decide`] does, and says why. Counts nothing.
    pub fn explain(&self, workload: &Workload, request: &Request<'_>) -> Explanation {
        let selected = self.select(workload);
        let decision: Decision = selected.decide(request);
        let (mode, mode_by) = selected.mode_by(request.destination_port);
        Explanation {
            allow: decision.allow,
            reason: decision.reason,
            decision: decision.to_string(),
            dry_run: decision.dry_run.as_ref().map(ToString::to_string),
            by: decision.by,
            mode,
            mode_by: mode_by.cloned(),
            policies: self.candidates(workload).map(|policy| considered(policy, workload, request)).collect(),
        }
    }
}

fn considered(policy: &Policy, workload: &Workload, request: &Request<'_>) -> Considered {
    let source = &policy.source;
    let selected = selects(source, workload);
    let rules = policy.rules().iter().zip(&source.rules).map(|(compiled, written)| RuleTrace {
        matched: compiled.matches(request),
        unseen: written.unseen.clone(),
        clauses: compiled.clauses.iter().zip(&written.clauses).map(|(c, w)| clause(c, w, request)).collect(),
    });
    Considered {
        name: policy.name.clone(),
        action: source.action,
        dry_run: source.dry_run,
        scope: scope(&source.scope),
        selected,
        matched: selected && policy.matches(request),
        rules: if selected { rules.collect() } else { Vec::new() },
    }
}

fn scope(scope: &Scope) -> String {
    match scope {
        Scope::Global => "all workloads".into(),
        Scope::Namespace => "all workloads of its namespace".into(),
        Scope::Attached => "workloads that it is attached to".into(),
        Scope::Labels(labels) => {
            let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("workloads with {}", labels.join(","))
        }
    }
}

fn clause(compiled: &CompiledClause, written: &Clause, request: &Request<'_>) -> ClauseTrace {
    let trace = |(compiled, written): (&CompiledMatch, &Match)| MatchTrace {
        matched: compiled.holds(request),
        fields: compiled.fields.iter().map(|one| field(one, written, request)).collect(),
    };
    ClauseTrace {
        of: written.of.to_string(),
        matched: compiled.holds(request),
        matches: compiled.matches.iter().zip(&written.matches).map(trace).collect(),
    }
}

fn field(field: &Field, written: &Match, request: &Request<'_>) -> FieldTrace {
    let nobody = || "none (plaintext)".to_owned();
    let actual = match field.subject {
        Subject::Namespace => request.source.map_or_else(nobody, |id| id.namespace().to_owned()),
        Subject::Principal => request.source.map_or_else(nobody, |id| id.principal().to_owned()),
        Subject::ServiceAccount => {
            request.source.map_or_else(nobody, |id| format!("{}/{}", id.namespace(), id.service_account()))
        }
        Subject::SourceIp => request.source_ip.to_canonical().to_string(),
        Subject::DestinationIp => request.destination_ip.to_canonical().to_string(),
        Subject::DestinationPort => request.destination_port.to_string(),
    };
    FieldTrace {
        subject: field.subject,
        negated: field.negated,
        matched: field.holds(request),
        actual,
        values: written.written(field.subject, field.negated),
    }
}

impl Subject {
    const fn words(self) -> &'static str {
        match self {
            Self::Namespace => "namespace",
            Self::Principal => "principal",
            Self::ServiceAccount => "service account",
            Self::SourceIp => "source address",
            Self::DestinationIp => "destination address",
            Self::DestinationPort => "port",
        }
    }
}

/// Values that a person is shown of a long list.
const SHOWN: usize = 6;

impl fmt::Display for FieldTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is = match (self.negated, self.matched) {
            (false, true) => "is one of",
            (false, false) => "is none of",
            (true, true) => "is none of those excluded:",
            (true, false) => "is excluded by",
        };
        write!(f, "{} {} {is} ", self.subject.words(), self.actual)?;
        f.write_str(&self.values.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", "))?;
        match self.values.len().checked_sub(SHOWN) {
            None | Some(0) => Ok(()),
            Some(more) => write!(f, " and {more} more"),
        }
    }
}

/// For people, a policy a paragraph.
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", if self.allow { "ALLOWED" } else { "REFUSED" }, self.decision)?;
        if let Some(dry_run) = &self.dry_run {
            writeln!(f, "with the dry runs in force: {dry_run}")?;
        }
        match &self.mode_by {
            Some(by) => writeln!(f, "mode {} by PeerAuthentication {by}", self.mode)?,
            None => writeln!(f, "mode {}, as nobody says otherwise", self.mode)?,
        }
        if self.policies.is_empty() {
            writeln!(f, "no AuthorizationPolicy is for this namespace or for all")?;
        }
        for policy in &self.policies {
            policy.write(f)?;
        }
        Ok(())
    }
}

const fn mark(matched: bool) -> char {
    if matched { '✓' } else { '✗' }
}

impl Considered {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = if self.action == Action::Allow { "ALLOW" } else { "DENY" };
        let dry_run = if self.dry_run { ", a dry run" } else { "" };
        let verdict = match (self.selected, self.matched) {
            (false, _) => "not for this workload",
            (true, true) => "matches",
            (true, false) if self.rules.is_empty() => "has no rules, and so matches nothing",
            (true, false) => "does not match",
        };
        writeln!(f, "\n{action} {} ({}{dry_run}): {verdict}", self.name, self.scope)?;
        for (index, rule) in self.rules.iter().enumerate() {
            writeln!(f, "  {} rule {}{}", mark(rule.matched), index + 1, rule.aside(self.action))?;
            for clause in &rule.clauses {
                for (index, one) in clause.matches.iter().enumerate() {
                    let mut at = clause.of.clone();
                    if clause.matches.len() > 1 {
                        // Writing to a String cannot fail.
                        let _ = write!(at, "[{index}]");
                    }
                    if one.fields.is_empty() {
                        writeln!(f, "      {} {at}: says nothing that L4 sees", mark(one.matched))?;
                    }
                    for field in &one.fields {
                        writeln!(f, "      {} {at}: {field}", mark(field.matched))?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl RuleTrace {
    fn aside(&self, action: Action) -> String {
        match (self.unseen.is_empty(), action) {
            (true, _) if self.clauses.is_empty() => ": matches everything".into(),
            (true, _) => String::new(),
            (false, Action::Allow) => format!(": never allows, as {} cannot be enforced at L4", self.unseen.join(", ")),
            (false, Action::Deny) => format!(": without {}, which cannot be enforced at L4", self.unseen.join(", ")),
        }
    }
}
