//! The tasks that are cargo with the right arguments in the right order.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use crate::{
    deps, ebpf, gate, root,
    section::{section, status},
    verify,
    workspace::{Workspace, cargo},
};

/// The package of the lab and its suites: everything else is tested without a lab.
const LAB: &str = "hitless-tests";

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
    /// Cargo profile to build with
    #[arg(long, value_enum, default_value = "release")]
    profile: Profile,
    /// Arguments passed on
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// Which tests.
#[derive(Args, Clone, Copy, Debug)]
#[group(multiple = false)]
pub struct Tests {
    /// Only what needs no root: pure logic, the 5.15 gate
    #[arg(long)]
    host: bool,
    /// Only what needs root: the verifier, packets, the lab suites
    #[arg(long)]
    lab: bool,
}

/// Formatting, lints, dependencies.
pub fn check(workspace: &Workspace) -> Result<()> {
    section("formatting", || status(here(workspace).args(["fmt", "--all", "--check"])))?;
    section("dependencies", || deps::check(workspace))?;
    section("BPF object", || ebpf::build(workspace, false))?;
    section("clippy", || {
        status(here(workspace).args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))
    })
}

/// Every test, from the quickest to the slowest.
pub fn test(workspace: &Workspace, tests: Tests) -> Result<()> {
    let object = section("BPF object", || ebpf::build(workspace, false))?;
    if !tests.lab {
        section("5.15 gate", || gate::run(&object))?;
        section("host tests", || status(here(workspace).args(["test", "--workspace", "--locked", "--exclude", LAB])))?;
    }
    if !tests.host {
        section("verified instructions", || verify::run(workspace, false))?;
        section("packet tests and lab suites", || {
            let mut command = here(workspace);
            command.args(["test", "--package", LAB, "--locked"]);
            // Suites share the node's cgroup root, pins and addresses: one at a time.
            command.args(["--", "--test-threads=1"]);
            if let Some(runner) = root::runner()? {
                command.args(["--config", &format!("target.'cfg(all())'.runner = '{runner}'")]);
            }
            status(&mut command)
        })?;
    }
    Ok(())
}

/// Builds the agent and the lab's programs, then becomes `program`, as root.
pub fn run(workspace: &Workspace, program: &str, first: &[&str], passed: Passed) -> Result<()> {
    ebpf::build(workspace, false)?;
    let directory = build(workspace, passed.profile)?;
    let first = first.iter().map(OsString::from);
    root::exec(&directory.join(program), first.chain(passed.args))
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
    status(here(workspace).args(["build", "--locked", "--profile", name, "--bins"]).args([
        "--package",
        "dataplane-user",
        "--package",
        LAB,
    ]))?;
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
