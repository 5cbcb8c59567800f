//! `hitless events`: the kernel's records, by name.

use std::{fmt::Write, process::ExitCode};

use super::{LookArgs, Output, print};
use crate::admin::{client::Client, protocol::EventRow};

pub fn run(follow: bool, look: &LookArgs) -> anyhow::Result<ExitCode> {
    Client::connect(&look.socket()?)?.events(follow, |row| {
        match look.output {
            // One line each, so that a stream can be read as it comes.
            Output::Json => print(&(serde_json::to_string(&row)? + "\n"))?,
            Output::Table => print(&text(&row))?,
        }
        Ok(true)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn text(row: &EventRow) -> String {
    let mut line = format!("{:>14.6}  {:<15}", row.at_ns as f64 / 1e9, row.event);
    // Writing to a String cannot fail.
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            let _ = write!(line, " {name} {value}");
        }
    };
    add("pod", row.pod.clone());
    add("service", row.service.clone());
    add(if row.to.is_some() { "from" } else { "backend" }, row.backend.clone());
    add("to", row.to.clone());
    add("because of", row.cause.clone());
    add("signal", row.signal.map(|signal| signal.to_string()));
    add("port", row.port.map(|port| port.to_string()));
    add("errno", row.errno.map(|errno| errno.to_string()));
    add("after", row.after_ns.map(|ns| format!("{} µs", ns / 1000)));
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rebind_reads_as_a_sentence() {
        let row = EventRow {
            at_ns: 1_500_000_000,
            event: "rebound".into(),
            service: Some("shop/web".into()),
            backend: Some("10.0.0.1:80".into()),
            to: Some("10.0.0.2:80".into()),
            cause: Some("rst".into()),
            ..EventRow::default()
        };
        assert_eq!(
            text(&row),
            "      1.500000  rebound         service shop/web from 10.0.0.1:80 to 10.0.0.2:80 because of rst\n"
        );
    }
}
