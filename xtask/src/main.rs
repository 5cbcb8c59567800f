//! `cargo xtask`: build, test, measure, show.

mod deploy;
mod deps;
mod ebpf;
mod fuzz;
mod gate;
mod helm;
mod image;
mod packages;
mod root;
mod section;
mod step;
mod suites;
mod tasks;
mod verify;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use tasks::Passed;
use workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Build, test, measure and show hitless")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Compile the BPF object that the agent embeds
    BuildEbpf {
        /// Compile the aya-log statements in (for development)
        #[arg(long)]
        log: bool,
    },
    /// Show rolling updates, the classic way and with hitless
    Demo(Passed),
    /// Run all tests: host, 5.15 gate, verifier, packets, lab, real Kubernetes
    Test(suites::Options),
    /// Measure the figures of docs/performance.md
    Bench(Passed),
    /// Open an interactive lab of nodes and pods
    Lab(Passed),
    /// A real Kubernetes on this machine: up, down, status, kubectl, build
    Cluster(Passed),
    /// Build the agent's container image: an OCI archive of one static binary, the same bytes every time
    Image(image::Options),
    /// Render the Helm chart to deploy/hitless.yaml, or check that they agree
    Deploy(deploy::Options),
    /// Fuzz what strangers write (policies), each target for a while
    Fuzz(fuzz::Options),
    /// Check formatting, dependencies, scripts, the chart and lints
    Check,
    /// Check the dependencies by deny.toml
    Deps,
    /// Refuse anything in the BPF object that Linux 5.15 lacks
    Gate,
    /// Compare verified-instruction counts with the table
    Verify {
        /// Write the table instead
        #[arg(long)]
        update: bool,
    },
    /// Run what continuous integration runs
    Ci,
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let workspace = &Workspace::find()?;
    match task {
        Task::BuildEbpf { log } => {
            let object = ebpf::build(workspace, log)?;
            println!("{}", object.display());
            Ok(())
        }
        Task::Demo(passed) => tasks::run(workspace, "hitless-lab", &["demo"], passed),
        Task::Test(options) => suites::run(workspace, &options),
        Task::Bench(passed) => tasks::run(workspace, "hitless-bench", &[], passed),
        Task::Lab(passed) => tasks::lab(workspace, passed),
        Task::Cluster(passed) => tasks::cluster(workspace, passed),
        Task::Image(options) => image::run(workspace, &options),
        Task::Deploy(options) => deploy::run(workspace, &options),
        Task::Fuzz(options) => fuzz::run(workspace, &options),
        Task::Check => tasks::check(workspace),
        Task::Deps => deps::check(workspace),
        Task::Gate => gate::run(&workspace.object()),
        Task::Verify { update } => verify::run(workspace, update),
        Task::Ci => tasks::ci(workspace),
    }
}
