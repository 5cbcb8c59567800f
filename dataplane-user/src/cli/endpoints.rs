//! `hitless endpoints`: the backends, as the control plane and as the kernel see them.

use std::process::ExitCode;

use super::{LookArgs, Output, json, print, table::table};
use crate::admin::{
    client::Client,
    protocol::{BackendRow, EndpointRow},
};

pub fn run(service: Option<String>, look: &LookArgs) -> anyhow::Result<ExitCode> {
    let rows = Client::connect(&look.socket()?)?.endpoints(service.clone())?;
    match look.output {
        Output::Json => json(&rows)?,
        Output::Table => print(&text(&rows))?,
    }
    if let (Some(service), true) = (service, rows.is_empty()) {
        anyhow::bail!("service {service} is not known; `hitless endpoints` lists those that are");
    }
    Ok(ExitCode::SUCCESS)
}

fn text(rows: &[EndpointRow]) -> String {
    let cells: Vec<_> = rows
        .iter()
        .map(|row| {
            let service = format!("{} {}", row.service, row.protocol);
            let Some(backend) = &row.backend else {
                let nothing = "-".to_owned();
                let empty = "no backend".to_owned();
                return [
                    service,
                    row.frontends.join(","),
                    empty,
                    nothing.clone(),
                    nothing.clone(),
                    nothing.clone(),
                    nothing,
                ];
            };
            [
                service,
                row.frontends.join(","),
                backend.address.clone(),
                backend.control.clone(),
                kernel(backend),
                if backend.weight == 1 {
                    backend.section.clone()
                } else {
                    format!("{} ×{}", backend.section, backend.weight)
                },
                backend.pod.clone().unwrap_or_else(|| "-".into()) + if backend.local { " (here)" } else { "" },
            ]
        })
        .collect();
    table(["SERVICE", "FRONTENDS", "BACKEND", "CONTROL PLANE", "KERNEL", "SLOTS", "POD"], &cells)
}

fn kernel(backend: &BackendRow) -> String {
    match backend.suspect_ms {
        None => backend.kernel.clone(),
        Some(0) => format!("{}, suspect until probed", backend.kernel),
        Some(left) => format!("{}, suspect for {left} ms", backend.kernel),
    }
}
