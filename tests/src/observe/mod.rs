//! What `deploy/` has for monitoring, and a real Prometheus to try it against.

pub mod dashboard;
pub mod expression;
pub mod prometheus;

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context, Result};

/// A file of the repository.
pub fn file(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}

pub fn read(path: &str) -> Result<String> {
    let path = file(path);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

pub const ALERTS: &str = "deploy/alerts/hitless.yaml";
pub const DASHBOARD: &str = "deploy/dashboards/hitless.json";

/// What the tables of docs/metrics.md are about: metrics, without their labels, and alerts.
pub fn documented() -> Result<BTreeSet<String>> {
    let page = read("docs/metrics.md")?;
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|line| line.split('|').nth(1).unwrap_or_default());
    let names = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    Ok(names.filter_map(|name| name.split('{').next()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct File {
        groups: Vec<Group>,
    }

    #[derive(Deserialize)]
    struct Group {
        rules: Vec<Rule>,
    }

    #[derive(Deserialize)]
    struct Rule {
        alert: String,
        expr: String,
        labels: Labels,
        annotations: Annotations,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Labels {
        severity: String,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Annotations {
        summary: String,
        description: String,
    }

    fn rules() -> Vec<Rule> {
        let file: File = serde_saphyr::from_str(&read(ALERTS).unwrap()).unwrap();
        file.groups.into_iter().flat_map(|group| group.rules).collect()
    }

    #[test]
    fn the_page_names_every_alert_and_every_metric_that_one_looks_at() {
        let documented = documented().unwrap();
        let rules = rules();
        let alerts: BTreeSet<_> = rules.iter().map(|rule| &rule.alert).collect();
        let named: BTreeSet<_> = documented.iter().filter(|name| name.starts_with("Hitless")).collect();
        assert_eq!(named, alerts);
        for rule in &rules {
            for name in expression::names(&rule.expr).iter().filter(|name| name.starts_with("hitless_")) {
                let family = name.strip_suffix("_bucket").unwrap_or(name);
                assert!(documented.contains(family), "{}: {name} is not on the page", rule.alert);
            }
        }
    }

    #[test]
    fn every_alert_says_what_is_wrong_where_and_what_to_do() {
        for Rule { alert, labels, annotations, .. } in rules() {
            assert!(["critical", "warning", "info"].contains(&labels.severity.as_str()), "{alert}");
            let told = annotations.summary.contains("$labels") || annotations.summary.contains("$value");
            assert!(told, "{alert}: the summary does not say where");
            assert!(annotations.description.len() > 80, "{alert}: {}", annotations.description);
        }
    }
}
