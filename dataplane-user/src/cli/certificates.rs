//! `hitless certificates`: what the pods here prove who they are with, and how long still.

use std::{
    fmt::Write,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{LookArgs, Output, json, print, table::table};
use crate::admin::{client::Client, protocol::Certificate};

pub fn run(look: &LookArgs) -> anyhow::Result<ExitCode> {
    let rows = Client::connect(&look.socket()?)?.certificates()?;
    match look.output {
        Output::Json => json(&rows)?,
        Output::Table => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            print(&text(&rows, now))?;
        }
    }
    let bad = rows.iter().any(|row| matches!(&*row.state, "expired" | "waiting"));
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(rows: &[Certificate], now: u64) -> String {
    if rows.is_empty() {
        return "no pod here is in the mesh\n".into();
    }
    let cells: Vec<_> = rows
        .iter()
        .map(|row| {
            [
                row.identity.clone(),
                row.state.clone(),
                row.not_after.map_or("-".into(), |at| until(at, now)),
                until(row.next, now),
                row.roots.to_string(),
                row.serial.clone().unwrap_or_else(|| "-".into()),
            ]
        })
        .collect();
    let mut out = table(["IDENTITY", "STATE", "EXPIRES IN", "ASKED NEXT IN", "ROOTS", "SERIAL"], &cells);
    for row in rows {
        if let Some(error) = &row.last_error {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{}: {error}", row.identity);
        }
    }
    out
}

fn until(at: u64, now: u64) -> String {
    let Some(left) = at.checked_sub(now) else { return format!("{} ago", span(now - at)) };
    span(left)
}

/// In two units at most.
fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_expired_and_why_it_was_not_renewed_is_told() {
        let row = Certificate {
            identity: "spiffe://d/ns/shop/sa/web".into(),
            state: "expired".into(),
            not_after: Some(1000),
            next: 90_100,
            roots: 1,
            last_error: Some("istiod does not answer".into()),
            ..Certificate::default()
        };
        let text = text(&[row], 1060);
        let cells: Vec<_> =
            text.lines().nth(1).unwrap().split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        assert_eq!(cells, ["spiffe://d/ns/shop/sa/web", "expired", "1 min ago", "1 d 0 h", "1", "-"]);
        assert!(text.ends_with("spiffe://d/ns/shop/sa/web: istiod does not answer\n"), "{text}");
    }
}
