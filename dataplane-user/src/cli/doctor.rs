//! `hitless doctor`: the checks, for reading.

use std::process::ExitCode;

use super::{LookArgs, Output, json, print};
use crate::{
    config::{Cluster, Options, Source},
    doctor::{self, Check, Status},
};

/// The agent that is checked for, told as it would be.
#[derive(clap::Args, Debug)]
pub struct DoctorArgs {
    /// Where the agent is to be told from; with kube, the API server and the container runtime are tried
    #[arg(long, env = "HITLESS_SOURCE", value_name = "SOURCE")]
    source: Option<Source>,
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    pub look: LookArgs,
}

pub fn run(args: DoctorArgs) -> anyhow::Result<ExitCode> {
    let DoctorArgs { source, cluster, look } = args;
    let file = look.agent.config.as_deref().map(Options::read).transpose()?.unwrap_or_default();
    let mut checks = doctor::run(&look.kernel()?);
    match source.or(file.source) {
        Some(Source::Kube) => checks.extend(doctor::kube(&cluster.over(file.cluster).settings())),
        Some(_) => {}
        None => checks.push(doctor::no_source()),
    }
    match look.output {
        Output::Json => json(&checks)?,
        Output::Table => print(&text(&checks))?,
    }
    Ok(if doctor::worst(&checks) == Status::Fail { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for check in checks {
        let mark = match check.status {
            Status::Ok => "ok  ",
            Status::Warn => "WARN",
            Status::Fail => "FAIL",
        };
        out += &format!("{mark}  {:<width$}  {}\n", check.name, check.found);
        if let Some(remedy) = &check.remedy {
            out += &format!("      {:<width$}  → {remedy}\n", "");
        }
    }
    out
}
