//! `hitless doctor`: the checks, for reading.

use std::process::ExitCode;

use super::{LookArgs, Output, json, print};
use crate::doctor::{self, Check, Status};

pub fn run(look: &LookArgs) -> anyhow::Result<ExitCode> {
    let checks = doctor::run(&look.kernel()?);
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
