//! `hitless status`: of the agent, or of what is pinned when there is none.

use std::{fmt::Write, process::ExitCode};

use dataplane_ebpf::abi::POD_ENROLLED;

use super::{LookArgs, Output, json, print, table::table};
use crate::{
    admin::{
        client::{Client, NoAgent},
        protocol::{KernelSide, Mesh, PodRow, Status, counters, layer_names},
    },
    kernel,
};

const NOT_READY: u8 = 1;
const NOT_INSTALLED: u8 = 2;
const NO_AGENT: u8 = 3;

pub fn run(look: &LookArgs) -> anyhow::Result<ExitCode> {
    let status = match Client::connect(&look.socket()?).and_then(|mut client| client.status()) {
        Ok(status) => Some(status),
        Err(error) if error.is::<NoAgent>() => pinned(&look.kernel()?)?,
        Err(error) => return Err(error),
    };
    let Some(status) = status else {
        match look.output {
            Output::Json => json(&serde_json::json!({ "agent": null, "installed": false }))?,
            Output::Table => print(&format!(
                "hitless is not installed here: no agent at {}, no pins at {}\n",
                look.socket()?.display(),
                look.kernel()?.root().display()
            ))?,
        }
        return Ok(ExitCode::from(NOT_INSTALLED));
    };
    match look.output {
        Output::Json => json(&status)?,
        Output::Table => print(&text(&status))?,
    }
    Ok(match (&status.agent, status.ready) {
        (Some(_), true) => ExitCode::SUCCESS,
        (Some(_), false) => ExitCode::from(NOT_READY),
        (None, _) => ExitCode::from(NO_AGENT),
    })
}

/// The status of a kernel path without an agent.
fn pinned(config: &kernel::Config) -> anyhow::Result<Option<Status>> {
    let Some(snapshot) = kernel::snapshot(config)? else { return Ok(None) };
    let mut status = Status::default();
    let mut kernel = KernelSide {
        layout: snapshot.layout.clone(),
        links: snapshot.links.iter().map(Into::into).collect(),
        ..KernelSide::default()
    };
    if let Some(state) = snapshot.state {
        kernel.layers = layer_names(state.settings.layers);
        kernel.maps = state.occupancy.into_iter().map(Into::into).collect();
        status.counters = counters(&state.stats);
        status.pods = state
            .pods
            .iter()
            .map(|(cookie, pod)| PodRow {
                name: format!("#{}", pod.pod),
                enrolled: pod.flags & POD_ENROLLED != 0,
                attached: true,
                netns_cookie: Some(*cookie),
                error: None,
                in_mesh: pod.outbound_port_be != 0,
            })
            .collect();
    }
    status.kernel = Some(kernel);
    Ok(Some(status))
}

fn text(status: &Status) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, status);
    out
}

fn write(out: &mut String, status: &Status) -> std::fmt::Result {
    let kernel = status.kernel.clone().unwrap_or_default();
    match &status.agent {
        Some(agent) => {
            let ready = match (&status.waiting_for, status.ready) {
                (_, true) => "ready".to_owned(),
                (Some(what), false) => format!("NOT READY: {what}"),
                (None, false) => "NOT READY".to_owned(),
            };
            let adopted = if agent.adopted { ", took over the kernel path of an agent before it" } else { "" };
            writeln!(
                out,
                "agent     {ready}; pid {}, {}, up {} s{adopted}",
                agent.pid, agent.version, agent.up_seconds
            )?;
        }
        None => {
            let attached = kernel.links.iter().filter(|link| link.attached).count();
            writeln!(out, "agent     not running; {attached} programs go on with the state it left")?;
        }
    }
    if let Some(source) = &status.source {
        let age = source.age_seconds.map_or("nothing heard yet".to_owned(), |age| format!("{age} s old"));
        writeln!(out, "source    {}, {age}", source.name)?;
        if let Some(error) = &source.error {
            writeln!(out, "          REFUSED, the state before is in force: {error}")?;
        }
        for problem in &source.problems {
            writeln!(out, "          skipped: {problem}")?;
        }
    }
    let layers = if kernel.layers.is_empty() { "none".to_owned() } else { kernel.layers.join(" ") };
    writeln!(out, "kernel    layers {layers}; layout {}", kernel.layout)?;
    if !kernel.cgroup.is_empty() {
        writeln!(out, "          cgroup {}", kernel.cgroup)?;
    }
    for link in kernel.links.iter().filter(|link| !link.attached) {
        writeln!(out, "          DETACHED: {}", link.name)?;
    }
    if let Some(objects) = &status.objects {
        writeln!(
            out,
            "state     {} services, {} backends, {} pods ({} here), {} nodes",
            objects.services, objects.backends, objects.pods, objects.local_pods, objects.nodes
        )?;
        if objects.waiting > 0 {
            writeln!(out, "          {} backends wait for a service that is not known", objects.waiting)?;
        }
    }
    if let Some(mesh) = &status.mesh {
        write_mesh(out, mesh)?;
    }
    let let_go = status.pods.iter().filter(|pod| pod.attached && !pod.enrolled).count();
    if let_go > 0 {
        writeln!(
            out,
            "          {let_go} pods here are attached and not enrolled: only what was moved goes on being so"
        )?;
    }
    for pod in status.pods.iter().filter(|pod| pod.error.is_some()) {
        writeln!(out, "          NOT ENROLLED: pod {}: {}", pod.name, pod.error.as_deref().unwrap_or_default())?;
    }
    for hook in status.hooks.iter().filter(|hook| !hook.ok) {
        writeln!(out, "          NOT PROVED: {}: {}", hook.hook, hook.seen)?;
    }
    let maps: Vec<_> =
        kernel.maps.iter().map(|map| [map.name.clone(), map.used.to_string(), map.size.to_string()]).collect();
    if !maps.is_empty() {
        writeln!(out, "\n{}", table(["MAP", "USED", "SIZE"], &maps).trim_end())?;
    }
    let counted: Vec<_> = status
        .counters
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(name, count)| [name.clone(), count.to_string()])
        .collect();
    if !counted.is_empty() {
        writeln!(out, "\n{}", table(["COUNTER", "SINCE INSTALLED"], &counted).trim_end())?;
    }
    let carried = status.tunnel.iter().filter(|(_, count)| **count > 0);
    let carried: Vec<_> = carried.map(|(name, count)| [name.clone(), count.to_string()]).collect();
    if !carried.is_empty() {
        writeln!(out, "\n{}", table(["TUNNEL", "SINCE THE AGENT STARTED"], &carried).trim_end())?;
    }
    Ok(())
}

fn write_mesh(out: &mut String, mesh: &Mesh) -> std::fmt::Result {
    let Mesh { joined, waiting, certificates, policies, policies_malformed, policies_known } = mesh;
    writeln!(out, "mesh      {joined} pods joined, {policies} policies in force")?;
    if *waiting > 0 {
        writeln!(out, "          NOT JOINED YET: {waiting} pods; their listeners are not open")?;
    }
    if !policies_known {
        writeln!(out, "          POLICIES NOT KNOWN YET: nothing enters the pods of the mesh here")?;
    }
    if *policies_malformed > 0 {
        writeln!(out, "          MALFORMED: {policies_malformed} policies; `hitless policies` says why")?;
    }
    let bad: Vec<_> = certificates.iter().filter(|(state, _)| *state != "valid").collect();
    let valid = certificates.get("valid").copied().unwrap_or(0);
    writeln!(out, "          {valid} certificates valid")?;
    for (state, count) in bad {
        writeln!(out, "          CERTIFICATES {}: {count}; `hitless certificates` says whose", state.to_uppercase())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::protocol::{Agent, Source};

    #[test]
    fn a_refused_source_and_a_detached_program_are_told_loudly() {
        let status = Status {
            agent: Some(Agent { pid: 7, version: "1".into(), up_seconds: 5, adopted: true }),
            ready: true,
            source: Some(Source { name: "file:/x".into(), error: Some("3:1: bad".into()), ..Source::default() }),
            kernel: Some(KernelSide {
                links: vec![crate::admin::protocol::Link { name: "connect4".into(), attached: false }],
                ..KernelSide::default()
            }),
            ..Status::default()
        };
        let text = text(&status);
        for want in ["agent     ready; pid 7", "REFUSED, the state before is in force: 3:1: bad", "DETACHED: connect4"]
        {
            assert!(text.contains(want), "{want:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_mesh_says_what_it_lacks_and_what_it_carried() {
        let status = Status {
            agent: Some(Agent::default()),
            mesh: Some(Mesh {
                joined: 2,
                waiting: 1,
                certificates: [("valid".to_owned(), 1), ("failing".to_owned(), 3)].into(),
                policies: 4,
                ..Mesh::default()
            }),
            tunnel: [("outbound_tunnelled".to_owned(), 7), ("inbound_denied".to_owned(), 0)].into(),
            ..Status::default()
        };
        let text = text(&status);
        for want in [
            "mesh      2 pods joined, 4 policies in force",
            "NOT JOINED YET: 1 pods",
            "POLICIES NOT KNOWN YET",
            "1 certificates valid",
            "CERTIFICATES FAILING: 3",
        ] {
            assert!(text.contains(want), "{want:?} is not in\n{text}");
        }
        let carried: Vec<_> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(carried, ["outbound_tunnelled", "7"]);
    }
}
