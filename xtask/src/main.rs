//! `cargo xtask`: build, test, measure, show.

mod ebpf;
mod gate;
mod packages;
mod step;
mod workspace;

use anyhow::Result;
use clap::{Parser, Subcommand};

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
    /// Refuse anything in the BPF object that Linux 5.15 lacks
    Gate,
}

fn main() -> Result<()> {
    let workspace = Workspace::find()?;
    match Cli::parse().task {
        Task::BuildEbpf { log } => {
            let object = ebpf::build(&workspace, log)?;
            println!("{}", object.display());
        }
        Task::Gate => gate::run(&workspace.object())?,
    }
    Ok(())
}
