//! `cargo xtask cluster`: a cluster that stays until it is told to go, owned by a process of its own.

use std::{
    fs,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Cluster, Cni, ControlPlane, KubeProxy, Spec, image, parts};
use crate::lab::cleanup::{self, start_time};

#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Build and install what a cluster is made of, and start nothing
    Build,
    /// Start a cluster and return when its nodes are ready
    Up(Options),
    /// Remove the cluster, also one whose owner crashed
    Down,
    /// Say what runs where
    Status,
    /// kubectl, in the cluster's network
    #[command(disable_help_flag = true)]
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Own a cluster until a signal (`up` starts this)
    #[command(hide = true)]
    Hold(Options),
}

#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    #[arg(long, default_value_t = 2)]
    nodes: usize,
    #[arg(long, value_enum, default_value_t)]
    kube_proxy: KubeProxy,
    #[arg(long, value_enum, default_value_t)]
    cni: Cni,
    /// etcd and the API server alone, on this machine's loopback
    #[arg(long)]
    api_only: bool,
}

/// What other processes must know of a running cluster.
#[derive(Debug, Deserialize, Serialize)]
struct State {
    pid: i32,
    /// Since boot, in clock ticks: a pid may come again, its start does not.
    started: u64,
    dir: PathBuf,
    netns: PathBuf,
    kubeconfig: PathBuf,
    kubernetes: PathBuf,
    url: String,
    nodes: Vec<(String, PathBuf)>,
}

const STATE: &str = "/run/hitless-cluster.json";
const LOG: &str = "/run/hitless-cluster.log";
const UP_WITHIN: Duration = Duration::from_secs(180);

pub fn main(command: Command) -> Result<()> {
    match command {
        Command::Build => build(),
        Command::Up(options) => up(&options),
        Command::Down => down(),
        Command::Status => status(),
        Command::Kubectl { args } => kubectl(&args),
        Command::Hold(options) => hold(&options),
    }
}

fn build() -> Result<()> {
    parts::node_packages()?;
    for part in [parts::kubernetes()?, parts::fortio()?, parts::httpbin()?, parts::envoy()?] {
        println!("{}", part.display());
    }
    Ok(())
}

fn up(options: &Options) -> Result<()> {
    if let Ok(state) = State::running() {
        bail!("a cluster is up already (pid {}): `cargo xtask cluster down` removes it", state.pid);
    }
    build()?;
    let started = Instant::now();
    let out = fs::File::create(LOG)?;
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["cluster", "hold", "--nodes", &options.nodes.to_string()]);
    let [proxy, cni] = [format!("{:?}", options.kube_proxy), format!("{:?}", options.cni)].map(|n| n.to_lowercase());
    command.args(["--kube-proxy", &proxy, "--cni", &cni]).args(options.api_only.then_some("--api-only"));
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    // Not of this terminal: Ctrl-C here is not for it.
    command.process_group(0);
    let mut owner = command.spawn()?;
    let state = loop {
        if let Ok(state) = State::running() {
            break state;
        }
        if let Some(exit) = owner.try_wait()? {
            bail!("the cluster did not come up ({exit}):\n{}", fs::read_to_string(LOG).unwrap_or_default());
        }
        if started.elapsed() > UP_WITHIN {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(owner.id().cast_signed()), nix::sys::signal::SIGTERM);
            bail!("the cluster was not up within {UP_WITHIN:?}; its log is {LOG}");
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    println!("up after {:.1} s", started.elapsed().as_secs_f64());
    state.print()
}

fn hold(options: &Options) -> Result<()> {
    if options.api_only {
        let control = ControlPlane::api_only()?;
        State::of(&control, Vec::new())?.write()?;
        return cleanup::wait_for_signal();
    }
    let Options { nodes, kube_proxy, cni, .. } = *options;
    let cluster = Cluster::start(&Spec { nodes, kube_proxy, cni, ..Spec::default() })?;
    for image in [image::httpbin()?, image::fortio()?] {
        cluster.load(&image)?;
    }
    let nodes = cluster.nodes().iter().map(|node| (node.name.clone(), node.netns.path.clone())).collect();
    State::of(&cluster.control, nodes)?.write()?;
    cleanup::wait_for_signal()
}

fn down() -> Result<()> {
    if let Ok(state) = State::running() {
        let pid = nix::unistd::Pid::from_raw(state.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while State::running().is_ok() {
            if Instant::now() > deadline {
                bail!("the cluster's owner (pid {}) does not end", state.pid);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    // What a crashed owner left.
    for id in cleanup::sweep()? {
        println!("removed {id}");
    }
    for file in [STATE, LOG] {
        let _ = fs::remove_file(file);
    }
    Ok(())
}

fn status() -> Result<()> {
    let state = State::running()?;
    state.print()?;
    state.kubectl(&["get".into(), "nodes,pods".into(), "-A".into(), "-o".into(), "wide".into()]).status()?;
    Ok(())
}

fn kubectl(args: &[String]) -> Result<()> {
    Err(State::running()?.kubectl(args).exec()).context("start nsenter")
}

impl State {
    fn of(control: &ControlPlane, nodes: Vec<(String, PathBuf)>) -> Result<Self> {
        let pid = std::process::id().cast_signed();
        Ok(Self {
            pid,
            started: start_time(pid).context("no start time of this process")?,
            dir: control.site.dir.clone(),
            netns: if nodes.is_empty() { "/proc/self/ns/net".into() } else { control.netns.path.clone() },
            kubeconfig: control.kubeconfig(),
            kubernetes: control.site.kubernetes.clone(),
            url: control.url(),
            nodes,
        })
    }

    fn write(&self) -> Result<()> {
        let new = format!("{STATE}.new");
        fs::write(&new, serde_json::to_string_pretty(self)?)?;
        Ok(fs::rename(new, STATE)?)
    }

    fn running() -> Result<Self> {
        let text = fs::read_to_string(STATE).context("no cluster is up: `cargo xtask cluster up` starts one")?;
        let state: Self = serde_json::from_str(&text).with_context(|| format!("read {STATE}"))?;
        if start_time(state.pid) != Some(state.started) {
            bail!("the cluster's owner is gone: `cargo xtask cluster down` removes what it left");
        }
        Ok(state)
    }

    fn kubectl(&self, args: &[String]) -> std::process::Command {
        let mut command = std::process::Command::new("nsenter");
        command.arg(format!("--net={}", self.netns.display())).arg(&self.kubernetes).arg("kubectl");
        command.arg(format!("--kubeconfig={}", self.kubeconfig.display()));
        command.arg(format!("--cache-dir={}", self.dir.join("kubectl").display())).args(args);
        command
    }

    fn print(&self) -> Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "API server   {}  (owner: pid {})", self.url, self.pid)?;
        writeln!(out, "kubeconfig   {}", self.kubeconfig.display())?;
        writeln!(out, "logs         {}", self.dir.join("logs").display())?;
        for (name, netns) in &self.nodes {
            writeln!(out, "{name:<12} nsenter --net={}", netns.display())?;
        }
        writeln!(out, "try          cargo xtask cluster kubectl get nodes")?;
        Ok(())
    }
}
