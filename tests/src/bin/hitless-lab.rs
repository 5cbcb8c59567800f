//! The lab and its workloads on the command line.

use std::io::Write;

use anyhow::Result;
use clap::{Parser, Subcommand};
use hitless_tests::{
    cluster, demo,
    lab::{Lab, LabSpec, Topology, cleanup},
    workload::{client, gateway, server, sockets, storm},
};

/// A cluster of network namespaces on this machine, and what runs in it
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Roll a deployment under load: first without hitless, then with each of its layers, then with all
    Demo(demo::Options),
    /// Make a lab to play in, say how to get around in it, and keep it until Ctrl-C
    #[command(alias = "shell")]
    Up(Up),
    /// A real Kubernetes on this machine
    #[command(subcommand)]
    Cluster(cluster::command::Command),
    /// Remove what labs left behind whose process is gone
    Sweep,
    /// HTTP server that closes its listener at SIGTERM
    Server(server::Options),
    /// Reverse proxy that picks pod addresses itself
    Gateway(gateway::Options),
    /// Constant-rate HTTP load that counts its failures
    Client(client::Options),
    /// Connections as fast as they go
    Storm(storm::Options),
    /// Make sockets here for the lab
    #[command(hide = true)]
    Sockets(sockets::Options),
}

#[derive(clap::Args)]
struct Up {
    #[arg(long, default_value_t = 2)]
    nodes: usize,
    /// Pods per node, each with an HTTP server on port 8080
    #[arg(long, default_value_t = 2)]
    pods: usize,
    #[arg(long, value_enum, default_value_t)]
    topology: Topology,
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Demo(options) => {
            if !demo::main(&options)? {
                std::process::exit(1);
            }
            Ok(())
        }
        Command::Up(options) => up(&options),
        Command::Cluster(command) => cluster::command::main(command),
        Command::Sweep => {
            for id in cleanup::sweep()? {
                println!("removed lab {id}");
            }
            Ok(())
        }
        Command::Server(options) => server::main(options),
        Command::Gateway(options) => gateway::main(options),
        Command::Client(options) => client::main(options),
        Command::Storm(options) => storm::main(&options),
        Command::Sockets(options) => sockets::main(&options),
    }
}

fn up(options: &Up) -> Result<()> {
    let lab = Lab::new(LabSpec { nodes: options.nodes, topology: options.topology })?;
    let mut running = Vec::new();
    let mut out = std::io::stdout().lock();
    writeln!(out, "lab {} ({:?}), files in {}\n", lab.id(), options.topology, lab.dir().display())?;
    for node in lab.nodes() {
        let [v4, v6] = node.addresses();
        writeln!(out, "{:<14} {v4}  {v6}", node.name)?;
        writeln!(out, "  enter with    nsenter --net={}", node.host.netns.path.display())?;
        for number in 1..=options.pods {
            let name = format!("web-{}-{number}", node.index);
            let pod = node.add_pod(&name)?;
            let server = pod.workload(&["server", "--name", &name, "--listen", "[::]:8080"])?;
            let [v4, v6] = pod.addresses();
            writeln!(out, "  {name:<12} {v4}  {v6}  HTTP on port 8080, pid {}", server.pid())?;
            writeln!(out, "    enter with  nsenter --net={}", pod.netns_path().display())?;
            running.push((pod, server));
        }
    }
    let outside = lab.outside();
    writeln!(out, "outside        nsenter --net={}", outside.netns.path.display())?;
    if let Some((pod, _)) = running.first() {
        let enter = format!("nsenter --net={}", outside.netns.path.display());
        writeln!(out, "\ntry: {enter} curl http://{}:8080/", pod.v4())?;
    }
    writeln!(out, "Ctrl-C takes it all down.")?;
    out.flush()?;
    cleanup::wait_for_signal()
}
