//! Where an agent keeps what is its own: told to `hitless run`, and to every other command that is to find it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use serde_json::Value;

use crate::workload::agent_binary;

/// The flags that say it.
#[derive(Clone, Debug)]
pub struct Place(Vec<String>);

impl Place {
    /// In a cluster's directory, whose BPF file system the agents of all nodes share; so each has a name.
    pub fn new(site: &Path, name: &str, state_dir: PathBuf, cgroup: &Path) -> Result<Self> {
        let bpffs = site.join("bpf");
        if !bpffs.exists() {
            fs::create_dir_all(&bpffs)?;
            mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).context("mount a bpffs")?;
        }
        let Self(mut flags) = Self::of_state_dir(&state_dir);
        let text = |path: &Path| path.to_string_lossy().into_owned();
        flags.extend(["--cgroup".into(), text(cgroup), "--bpffs".into(), text(&bpffs), "--name".into(), name.into()]);
        Ok(Self(flags))
    }

    /// Enough to ask an agent that runs.
    pub fn of_state_dir(state_dir: &Path) -> Self {
        Self(vec!["--state-dir".into(), state_dir.to_string_lossy().into_owned()])
    }

    /// `hitless run` there, told by an API server.
    pub fn run(&self, node: &str, kubeconfig: &Path) -> Result<Vec<String>> {
        let mut args = vec![agent_binary()?.to_string_lossy().into_owned(), "run".into()];
        args.extend(self.0.iter().cloned());
        args.extend(["--source", "kube", "--node-name", node, "--kubeconfig"].map(str::to_owned));
        args.push(kubeconfig.to_string_lossy().into_owned());
        Ok(args)
    }

    /// `hitless … --output json`. Its exit status may say more: an agent that is not ready answers all the same.
    pub fn ask(&self, command: &[&str]) -> Result<Value> {
        let mut answers = self.rows(command)?;
        match answers.len() {
            1 => Ok(answers.remove(0)),
            n => bail!("hitless {} prints {n} values of JSON", command.join(" ")),
        }
    }

    /// The same of a command that prints a line for each.
    pub fn rows(&self, command: &[&str]) -> Result<Vec<Value>> {
        let asked = || format!("hitless {}", command.join(" "));
        let output = Command::new(agent_binary()?).args(command).args(["--output", "json"]).args(&self.0).output()?;
        let rows = serde_json::Deserializer::from_slice(&output.stdout).into_iter().collect::<Result<Vec<Value>, _>>();
        let rows =
            rows.with_context(|| format!("{} prints no JSON: {}", asked(), String::from_utf8_lossy(&output.stderr)))?;
        if let Some(error) = rows.iter().find_map(|row| row["error"].as_str()) {
            bail!("{} failed: {error}", asked());
        }
        Ok(rows)
    }
}
