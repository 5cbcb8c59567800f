//! `hitless-bench`: measures hitless on a lab of network namespaces; `cargo xtask bench` runs it.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, builder::PossibleValuesParser};
use hitless_tests::bench::{self, Plan, worker};

#[derive(Parser)]
#[command(
    name = "hitless-bench",
    about = "Measure hitless against the same thing without it, on a lab of network namespaces",
    after_help = "Progress is told on stderr, the table on stdout. Nothing outside the namespaces it makes is touched.",
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(subcommand)]
    inside: Option<Inside>,
    /// Also write the figures to FILE: {"figures":[{"name","value","unit","baseline","ratio","goal"}]}
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure just this group of figures (may be repeated)
    #[arg(long, value_name = "GROUP", value_parser = PossibleValuesParser::new(bench::groups()))]
    only: Vec<String>,
    /// Fewer rounds: seconds instead of minutes, and noisier
    #[arg(long)]
    quick: bool,
    /// Exit with 1 when a goal is missed
    #[arg(long)]
    strict: bool,
}

/// What the bench starts inside its pods.
#[derive(Subcommand)]
enum Inside {
    #[command(hide = true)]
    Worker(worker::Args),
    #[command(hide = true)]
    Pause,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    match &cli.inside {
        Some(Inside::Worker(args)) => worker::main(args)?,
        Some(Inside::Pause) => worker::pause()?,
        None => return figures(cli),
    }
    Ok(ExitCode::SUCCESS)
}

fn figures(cli: &Cli) -> Result<ExitCode> {
    let plan = if cli.quick { Plan::quick() } else { Plan::full() };
    let report = bench::run(&cli.only, &plan)?;
    print!("{}", report.table());
    println!("\n{} figures, {} of the goals missed", report.figures.len(), report.missed());
    if let Some(path) = &cli.json {
        let json = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, json).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(if cli.strict && report.missed() > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
