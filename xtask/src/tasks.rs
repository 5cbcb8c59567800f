//! The tasks that are cargo with the right arguments in the right order.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use crate::{
    deploy, deps, ebpf, packages, root,
    section::{section, status},
    workspace::{Workspace, cargo, in_path},
};

/// Everything that a shell runs.
const SCRIPTS: [&str; 4] = ["x", ".ci/run", "tests/kind/run", "tests/kind/rollout"];

/// How to build what is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// As it is measured and shipped
    Release,
    /// As it is tested: quicker to build
    Dev,
}

/// A program of the lab package and what is passed on to it.
#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub struct Passed {
    /// Cargo profile to build with: release, but for a cluster dev
    #[arg(long, value_enum)]
    profile: Option<Profile>,
    /// Arguments passed on
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// Formatting, dependencies, scripts, the chart, lints.
pub fn check(workspace: &Workspace) -> Result<()> {
    section("formatting", || status(here(workspace).args(["fmt", "--all", "--check"])))?;
    section("dependencies", || deps::check(workspace))?;
    section("scripts", || scripts(workspace))?;
    section("chart", || deploy::run(workspace, &deploy::Options { check: true }))?;
    section("BPF object", || ebpf::build(workspace, false))?;
    section("clippy", || {
        status(here(workspace).args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))
    })
}

/// What only a reader of shell finds; some of it can't be run here.
fn scripts(workspace: &Workspace) -> Result<()> {
    if in_path("shellcheck").is_none() {
        packages::install(workspace, "to check the scripts", &["shellcheck"])?;
    }
    status(Command::new("shellcheck").args(SCRIPTS).current_dir(&workspace.root))
}

/// Builds the agent and the lab's programs, then becomes `program`, as root.
pub fn run(workspace: &Workspace, program: &str, first: &[&str], passed: Passed) -> Result<()> {
    ebpf::build(workspace, false)?;
    let directory = build(workspace, passed.profile.unwrap_or(Profile::Release))?;
    let first = first.iter().map(OsString::from);
    root::exec(&directory.join(program), first.chain(passed.args))
}

/// A real Kubernetes, by the programs that were built for its suites.
pub fn cluster(workspace: &Workspace, mut passed: Passed) -> Result<()> {
    passed.profile.get_or_insert(Profile::Dev);
    run(workspace, "hitless-lab", &["cluster"], passed)
}

/// An interactive lab; other commands of the lab's program when they are named.
pub fn lab(workspace: &Workspace, passed: Passed) -> Result<()> {
    let named = passed.args.first().is_some_and(|arg| !arg.to_string_lossy().starts_with('-'));
    run(workspace, "hitless-lab", if named { &[] } else { &["up"] }, passed)
}

fn build(workspace: &Workspace, profile: Profile) -> Result<PathBuf> {
    let (name, directory) = match profile {
        Profile::Release => ("release", "release"),
        Profile::Dev => ("dev", "debug"),
    };
    // The whole workspace, as for the tests: for chosen packages their dependencies are built again, with other features.
    status(here(workspace).args(["build", "--workspace", "--locked", "--profile", name, "--bins"]))?;
    Ok(workspace.target.join(directory))
}

/// What continuous integration runs, here.
pub fn ci(workspace: &Workspace) -> Result<()> {
    let script: &Path = &workspace.root.join(".ci/run");
    status(Command::new(script).current_dir(&workspace.root)).with_context(|| script.display().to_string())
}

fn here(workspace: &Workspace) -> Command {
    let mut command = Command::new(cargo());
    command.current_dir(&workspace.root);
    command
}
