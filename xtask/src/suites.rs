//! `cargo xtask test`: every test, built once, from the quickest to the slowest; what needs root as root.

use std::{
    io::BufReader,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Deserialize;

use crate::{
    ebpf, gate, root,
    section::{section, status},
    verify,
    workspace::{Workspace, cargo},
};

/// Packages whose integration tests load BPF programs and make network namespaces.
const AS_ROOT: [&str; 2] = ["dataplane-user", "hitless-tests"];

/// Which tests.
#[derive(Args, Debug)]
pub struct Options {
    /// Only what needs no root: pure logic, the 5.15 gate
    #[arg(long, conflicts_with = "lab")]
    host: bool,
    /// Only what needs root: the verifier, packets, the lab suites
    #[arg(long)]
    lab: bool,
    /// Only the suites on a real Kubernetes
    #[arg(long, conflicts_with_all = ["host", "lab"])]
    cluster: bool,
    /// Passed to the test programs: a part of a test's name, --nocapture, …
    #[arg(last = true)]
    args: Vec<String>,
}

/// A built test program.
#[derive(Debug)]
struct Suite {
    package: String,
    directory: PathBuf,
    target: String,
    integration: bool,
    executable: PathBuf,
}

impl Suite {
    fn as_root(&self) -> bool {
        self.integration && AS_ROOT.contains(&self.package.as_str())
    }

    fn on_cluster(&self) -> bool {
        self.as_root() && self.target.starts_with("cluster")
    }

    /// A whole cluster on a small machine has time limits of its own, which what else the machine does may break: once,
    /// and not again.
    fn run_twice_at_most(&self, args: &[String]) -> Result<()> {
        self.run(args).or_else(|error| {
            eprintln!("{error:#}; once more");
            self.run(args)
        })
    }

    fn run(&self, args: &[String]) -> Result<()> {
        let mut command =
            if self.as_root() { root::command(&self.executable)? } else { Command::new(&self.executable) };
        if self.as_root() {
            // Suites share the node's cgroup root, pins and addresses: one test at a time.
            command.arg("--test-threads=1");
        }
        // The long form has tests that take too long otherwise.
        if self.on_cluster() && std::env::var_os("HITLESS_CLUSTER_LONG").is_some() {
            command.arg("--include-ignored");
        }
        status(command.args(args).current_dir(&self.directory).env("CARGO_MANIFEST_DIR", &self.directory))
    }
}

pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let object = section("BPF object", || ebpf::build(workspace, false))?;
    let suites = section("building the tests", || build(workspace))?;
    let mut failed = Vec::new();
    let mut part = |name: String, run: &mut dyn FnMut() -> Result<()>| {
        if let Err(error) = section(&name, run) {
            eprintln!("{error:#}");
            failed.push(name);
        }
    };
    let all = !options.host && !options.lab && !options.cluster;
    if all || options.host {
        part("5.15 gate".into(), &mut || gate::run(&object));
        for suite in suites.iter().filter(|suite| !suite.as_root()) {
            part(format!("{} {}", suite.package, suite.target), &mut || suite.run(&options.args));
        }
        part("documentation".into(), &mut || {
            status(Command::new(cargo()).current_dir(&workspace.root).args([
                "test",
                "--workspace",
                "--locked",
                "--doc",
            ]))
        });
    }
    if all || options.lab {
        part("verified instructions".into(), &mut || verify::run(workspace, false));
        for suite in suites.iter().filter(|suite| suite.as_root() && !suite.on_cluster()) {
            part(format!("{} {} (root)", suite.package, suite.target), &mut || suite.run(&options.args));
        }
    }
    if all || options.cluster {
        // By a program of its own, so that one sees what takes minutes the first time.
        part("parts of the cluster".into(), &mut || {
            let lab = suites.iter().find(|suite| suite.on_cluster()).context("no suite needs a cluster")?;
            let lab = lab.executable.ancestors().nth(2).context("tests are in deps")?.join("hitless-lab");
            status(root::command(&lab)?.args(["cluster", "build"]))
        });
        for suite in suites.iter().filter(|suite| suite.on_cluster()) {
            part(format!("{} {} (root)", suite.package, suite.target), &mut || suite.run_twice_at_most(&options.args));
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// One line of `cargo test --message-format=json`.
#[derive(Deserialize)]
struct Message {
    reason: String,
    package_id: Option<String>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    executable: Option<PathBuf>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds every test of the workspace at once: choosing packages would build their dependencies with other features.
fn build(workspace: &Workspace) -> Result<Vec<Suite>> {
    let mut child = Command::new(cargo())
        .current_dir(&workspace.root)
        .args(["test", "--workspace", "--locked", "--no-run", "--message-format=json-render-diagnostics"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let output = BufReader::new(child.stdout.take().context("the output is piped")?);
    let mut suites = Vec::new();
    for message in serde_json::Deserializer::from_reader(output).into_iter::<Message>() {
        suites.extend(suite(message.context("cargo printed what is no message")?));
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("the tests do not build ({status})");
    }
    // Unit tests first; among the rest, packets before the lab.
    suites.sort_by_key(|suite| (suite.integration, suite.target != "packets", suite.target.clone()));
    Ok(suites)
}

fn suite(message: Message) -> Option<Suite> {
    let Message { reason, package_id, manifest_path, target, executable, profile } = message;
    if reason != "compiler-artifact" || !profile?.test {
        return None;
    }
    let (target, id) = (target?, package_id?);
    let directory = manifest_path?.parent()?.to_owned();
    // `path+file:///…/tests#hitless-tests@0.1.0`, or without the name where the directory has the same.
    let package = match id.rsplit_once('#')?.1.split_once('@') {
        Some((name, _)) => name.to_owned(),
        None => directory.file_name()?.to_string_lossy().into_owned(),
    };
    let integration = target.kind.iter().any(|kind| kind == "test");
    Some(Suite { package, directory, target: target.name, integration, executable: executable? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Option<Suite> {
        suite(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn lab_suites_run_as_root_and_unit_tests_do_not() {
        let artifact = |package: &str, kind: &str| {
            parse(&format!(
                r#"{{"reason":"compiler-artifact","package_id":"path+file:///src/{package}","manifest_path":"/src/tests/Cargo.toml",
                    "target":{{"name":"t","kind":["{kind}"]}},"profile":{{"test":true}},"executable":"/target/t"}}"#
            ))
            .unwrap()
        };
        assert!(artifact("tests#hitless-tests@0.1.0", "test").as_root());
        assert!(!artifact("tests#hitless-tests@0.1.0", "test").on_cluster());
        assert!(!artifact("tests#hitless-tests@0.1.0", "lib").as_root());
        assert!(!artifact("xtask#0.1.0", "test").as_root());
    }

    #[test]
    fn programs_that_are_no_tests_are_passed_over() {
        assert!(parse(r#"{"reason":"build-finished"}"#).is_none());
        assert!(
            parse(
                r#"{"reason":"compiler-artifact","package_id":"a#b@1.0.0","manifest_path":"/a/Cargo.toml",
                   "target":{"name":"t","kind":["bin"]},"profile":{"test":false},"executable":"/target/t"}"#
            )
            .is_none()
        );
    }
}
