//! `hitless policies`: what is in force, who told it, what it decided, and what is wrong with it.

use std::{fmt::Write, process::ExitCode};

use super::{LookArgs, Output, json, print, table::table};
use crate::admin::{client::Client, protocol::Policy};

pub fn run(look: &LookArgs) -> anyhow::Result<ExitCode> {
    let rows = Client::connect(&look.socket()?)?.policies()?;
    match look.output {
        Output::Json => json(&rows)?,
        Output::Table => print(&text(&rows))?,
    }
    let refused = rows.iter().any(|row| row.refused.is_some());
    Ok(if refused { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(rows: &[Policy]) -> String {
    if rows.is_empty() {
        return "no policies: everything may talk to everything, in the clear too\n".into();
    }
    let cells: Vec<_> = rows
        .iter()
        .map(|row| {
            let counts = row.counts.unwrap_or_default();
            let (allowed, denied) = if row.dry_run {
                (format!("would {}", counts.would_allow), format!("would {}", counts.would_deny))
            } else {
                (counts.allowed.to_string(), counts.denied.to_string())
            };
            let decides = row.action.is_some();
            let shown = |count: String| if decides { count } else { "-".into() };
            [
                format!("{} {}", row.kind, row.name),
                row.origin.clone(),
                row.action.clone().unwrap_or_else(|| "-".into()),
                force(row).into(),
                shown(allowed),
                shown(denied),
            ]
        })
        .collect();
    let mut out = table(["POLICY", "FROM", "ACTION", "IN FORCE", "ALLOWED", "DENIED"], &cells);
    for row in rows {
        let refused = row.refused.iter().map(|reason| format!("MALFORMED: {reason}"));
        for note in refused.chain(row.warnings.iter().cloned()) {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{} {}: {note}", row.kind, row.name);
        }
    }
    out
}

fn force(row: &Policy) -> &'static str {
    match (row.in_force, row.dry_run) {
        (true, true) => "dry run",
        (true, false) => "yes",
        (false, _) => "no",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::protocol::PolicyCounts;

    #[test]
    fn decisions_dry_runs_and_mistakes_are_told_apart() {
        let counts = Some(PolicyCounts { allowed: 3, denied: 1, would_allow: 0, would_deny: 7 });
        let policy = |name: &str, dry_run| Policy {
            kind: "AuthorizationPolicy".into(),
            name: name.into(),
            origin: "file".into(),
            action: Some("ALLOW".into()),
            dry_run,
            in_force: true,
            counts,
            ..Policy::default()
        };
        let mut bad = policy("shop/bad", false);
        bad.refused = Some("spec.action is MAYBE".into());
        let peer = Policy {
            kind: "PeerAuthentication".into(),
            name: "shop/default".into(),
            origin: "kube".into(),
            in_force: true,
            ..Policy::default()
        };
        let text = text(&[policy("shop/db", false), policy("shop/try", true), bad, peer]);
        let line = |name: &str| text.lines().find(|line| line.contains(name)).unwrap().split_whitespace();
        assert!(line("shop/db").eq(["AuthorizationPolicy", "shop/db", "file", "ALLOW", "yes", "3", "1"]), "{text}");
        assert!(line("shop/try").skip(4).eq(["dry", "run", "would", "0", "would", "7"]), "{text}");
        assert!(line("shop/default").skip(3).eq(["-", "yes", "-", "-"]), "{text}");
        assert!(text.ends_with("AuthorizationPolicy shop/bad: MALFORMED: spec.action is MAYBE\n"), "{text}");
    }
}
