//! `cargo xtask deps`: licences, bans and sources of every dependency, by the rules of `deny.toml`.
//!
//! The same file is cargo-deny's, which also looks for advisories but takes minutes to build and needs the network.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use spdx::{Expression, ParseMode};

use crate::workspace::{Workspace, cargo};

/// The part of `deny.toml` that is checked here. What is not known is an error: a rule must not be passed over.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    graph: Graph,
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
    /// cargo-deny's.
    #[serde(rename = "advisories")]
    _advisories: toml::Table,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Graph {
    targets: Vec<String>,
    all_features: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Licenses {
    allow: Vec<String>,
    exceptions: Vec<Exception>,
}

/// Licences that are allowed for one package.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Bans {
    multiple_versions: Deny,
    wildcards: Deny,
    allow_wildcard_paths: bool,
    deny: Vec<Banned>,
    skip: Vec<Skipped>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Sources {
    #[serde(rename = "unknown-registry")]
    _unknown_registry: Deny,
    #[serde(rename = "unknown-git")]
    _unknown_git: Deny,
    allow_registry: Vec<String>,
}

/// The only level used: a warning nobody reads is none.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Deny {
    Deny,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Banned {
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

/// A second version that is tolerated.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Skipped {
    /// `name@version`, or `name`.
    #[serde(rename = "crate")]
    name: String,
    #[serde(rename = "reason")]
    _reason: String,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
    id: String,
    dependencies: Vec<Dependency>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
struct Dependency {
    name: String,
    req: String,
    path: Option<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
}

/// Checks what `Cargo.lock` says would be built.
pub fn check(workspace: &Workspace) -> Result<()> {
    let path = workspace.root.join("deny.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let rules: Rules = toml::from_str(&text).with_context(|| format!("{} does not parse", path.display()))?;
    let mut packages = BTreeSet::new();
    for target in &rules.graph.targets {
        packages.extend(resolve(workspace, &rules, target)?);
    }
    let findings = findings(&rules, &packages)?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} findings above; the rules are in {}", findings.len(), path.display());
    }
    println!(
        "{} packages: licences, bans and sources as deny.toml wants (advisories: cargo deny check)",
        packages.len()
    );
    Ok(())
}

fn resolve(workspace: &Workspace, rules: &Rules, target: &str) -> Result<Vec<Package>> {
    let mut command = Command::new(cargo());
    command.current_dir(&workspace.root);
    command.args(["metadata", "--format-version=1", "--locked", "--filter-platform", target]);
    if rules.graph.all_features {
        command.arg("--all-features");
    }
    let output = command.output().context("cannot run `cargo metadata`")?;
    if !output.status.success() {
        bail!("`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout)?;
    let built: BTreeSet<_> = metadata.resolve.nodes.into_iter().map(|node| node.id).collect();
    Ok(metadata.packages.into_iter().filter(|package| built.contains(&package.id)).collect())
}

fn findings(rules: &Rules, packages: &BTreeSet<Package>) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    let mut versions = BTreeMap::<&str, BTreeSet<&str>>::new();
    for package in packages {
        let at = format!("{} {}", package.name, package.version);
        if let Some(why) = license(rules, package) {
            findings.push(format!("{at}: {why}"));
        }
        if let Some(source) = &package.source {
            let registry = source.strip_prefix("registry+").unwrap_or(source);
            if !rules.sources.allow_registry.iter().any(|allowed| allowed == registry) {
                findings.push(format!("{at}: comes from {source}, which is not in [sources] allow-registry"));
            }
        }
        if let Some(banned) = rules.bans.deny.iter().find(|banned| banned.name == package.name) {
            findings.push(format!("{at}: banned: {}", banned.reason));
        }
        // Wildcards are only ours to write; a path dependency of the workspace has no version to name.
        if package.source.is_none() {
            for dependency in package.dependencies.iter().filter(|dependency| dependency.req == "*") {
                if !(rules.bans.allow_wildcard_paths && dependency.path.is_some()) {
                    findings.push(format!("{at}: any version of {} would do: name one", dependency.name));
                }
            }
        }
        versions.entry(&package.name).or_default().insert(&package.version);
    }
    let Deny::Deny = rules.bans.multiple_versions;
    let Deny::Deny = rules.bans.wildcards;
    for (name, versions) in &versions {
        let kept: Vec<_> = versions.iter().filter(|version| !skipped(rules, name, version)).collect();
        if kept.len() > 1 {
            findings.push(format!(
                "{name}: {} versions: {kept:?}; unite them, or [bans] skip one with a reason",
                kept.len()
            ));
        }
    }
    for skip in &rules.bans.skip {
        let (name, version) = skip.name.split_once('@').unwrap_or((&skip.name, ""));
        let present = versions
            .get(name)
            .is_some_and(|versions| versions.len() > 1 && (version.is_empty() || versions.contains(version)));
        if !present {
            findings.push(format!("{}: [bans] skip is out of date: there is no second version of it", skip.name));
        }
    }
    Ok(findings)
}

fn skipped(rules: &Rules, name: &str, version: &str) -> bool {
    rules.bans.skip.iter().any(|skip| match skip.name.split_once('@') {
        Some((skipped, at)) => skipped == name && at == version,
        None => skip.name == name,
    })
}

/// Why the licence won't do.
fn license(rules: &Rules, package: &Package) -> Option<String> {
    let Some(text) = &package.license else { return Some("names no licence".into()) };
    match Expression::parse_mode(text, ParseMode::LAX) {
        Err(error) => Some(format!("licence {text} does not parse: {}", error.reason)),
        Ok(expression) => {
            let allowed = expression.evaluate(|requirement| {
                let wanted = requirement.to_string();
                let excepted = rules.licenses.exceptions.iter().filter(|exception| exception.name == package.name);
                rules.licenses.allow.contains(&wanted) || excepted.flat_map(|e| &e.allow).any(|name| *name == wanted)
            });
            (!allowed).then(|| format!("licence {text}: [licenses] allow has no way to satisfy it"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        toml::from_str(
            r#"
            [graph]
            targets = []
            all-features = true
            [advisories]
            [licenses]
            allow = ["MIT", "Apache-2.0 WITH LLVM-exception"]
            exceptions = [{ crate = "lesser", allow = ["LGPL-2.1-or-later"] }]
            [bans]
            multiple-versions = "deny"
            wildcards = "deny"
            allow-wildcard-paths = true
            deny = [{ crate = "openssl", reason = "rustls does it" }]
            skip = [{ crate = "syn@1.0.0", reason = "old macros" }]
            [sources]
            unknown-registry = "deny"
            unknown-git = "deny"
            allow-registry = ["https://index"]
            "#,
        )
        .unwrap()
    }

    fn package(name: &str, version: &str) -> Package {
        Package {
            name: name.into(),
            version: version.into(),
            license: Some("MIT".into()),
            source: Some("registry+https://index".into()),
            id: format!("{name}@{version}"),
            dependencies: Vec::new(),
        }
    }

    fn check(packages: &[Package]) -> Vec<String> {
        // The tolerated second version, so that its rule is in use.
        let syn = [package("syn", "1.0.0"), package("syn", "2.0.0")];
        findings(&rules(), &packages.iter().chain(&syn).cloned().collect()).unwrap()
    }

    #[test]
    fn licences_are_read_as_expressions() {
        let with = |license: &str| Package { license: Some(license.into()), ..package("a", "1.0.0") };
        assert_eq!(check(&[with("GPL-2.0-only OR MIT")]), Vec::<String>::new());
        assert_eq!(check(&[with("MIT/Apache-2.0")]), Vec::<String>::new());
        assert_eq!(check(&[with("Apache-2.0 WITH LLVM-exception")]), Vec::<String>::new());
        assert_eq!(check(&[with("GPL-2.0-only AND MIT")]).len(), 1);
        assert_eq!(check(&[Package { license: None, ..package("a", "1.0.0") }]).len(), 1);
    }

    #[test]
    fn an_exception_holds_for_its_package_only() {
        let with = |name: &str| Package { license: Some("LGPL-2.1-or-later".into()), ..package(name, "1.0.0") };
        assert_eq!(check(&[with("lesser")]), Vec::<String>::new());
        assert_eq!(check(&[with("a")]).len(), 1);
    }

    #[test]
    fn another_source_a_banned_crate_and_a_wildcard_are_refused() {
        let git = Package { source: Some("git+https://host/a".into()), ..package("a", "1.0.0") };
        assert!(check(&[git])[0].contains("allow-registry"));
        assert!(check(&[package("openssl", "0.10.0")])[0].contains("rustls does it"));
        let any = Dependency { name: "b".into(), req: "*".into(), path: None };
        let ours = Package { source: None, dependencies: vec![any], ..package("a", "1.0.0") };
        assert!(check(&[ours])[0].contains("name one"));
    }

    #[test]
    fn a_second_version_is_refused_unless_skipped_and_a_skip_must_be_of_use() {
        assert!(check(&[package("a", "1.0.0"), package("a", "2.0.0")])[0].contains("2 versions"));
        let only_new: BTreeSet<_> = [package("syn", "2.0.0")].into();
        assert!(findings(&rules(), &only_new).unwrap()[0].contains("out of date"));
    }
}
