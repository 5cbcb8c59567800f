//! The real `hitless run` on a node, and the stream it is told the state by.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use dataplane_user::model::Event;
use serde_json::Value;

use super::{node::Node, process::Process};

#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// `--layers`; all when empty
    pub layers: String,
    /// Further arguments of `hitless run`
    pub args: Vec<String>,
}

pub struct Agent {
    process: Process,
    node: usize,
    admin: PathBuf,
    stream: PathBuf,
}

const READY_WITHIN: Duration = Duration::from_secs(30);

impl Agent {
    pub(super) fn start(node: &Node, options: AgentOptions) -> Result<Self> {
        let host = &node.host;
        let (admin, stream) = (host.file("admin.sock"), host.file("stream.sock"));
        let bpffs = node.site.dir.join("bpf").join(&node.name);
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut args = vec![path(&crate::workload::agent_binary()?), "run".into()];
        for (flag, value) in [
            ("--stream", path(&stream)),
            ("--admin", path(&admin)),
            ("--cgroup", path(&node.cgroup())),
            ("--bpffs", path(&bpffs)),
            ("--node", node.name.clone()),
        ] {
            args.extend([flag.to_owned(), value]);
        }
        if !options.layers.is_empty() {
            args.extend(["--layers".to_owned(), options.layers]);
        }
        args.extend(options.args);
        let process = host.spawn_on_host(&args)?;
        let agent = Self { process, node: node.index, admin, stream };
        agent.wait_ready()?;
        Ok(agent)
    }

    fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        while !self.stream.exists() {
            if let Some(exit) = self.process.wait_for(Duration::from_millis(5))? {
                bail!("the agent of node {} ended before it was ready ({exit:?}):\n{}", self.node, self.process.log());
            }
            if Instant::now() > deadline {
                bail!("the agent of node {} was not ready within {READY_WITHIN:?}:\n{}", self.node, self.process.log());
            }
        }
        Ok(())
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// A connection to its stream source.
    pub fn connect(&self) -> Result<Stream> {
        Stream::connect(&self.stream)
    }

    /// `hitless status --output json`.
    pub fn status(&self) -> Result<Value> {
        self.admin(&["status"])
    }

    /// Any admin command's JSON.
    pub fn admin(&self, command: &[&str]) -> Result<Value> {
        let output = Command::new(crate::workload::agent_binary()?)
            .args(command)
            .arg("--admin")
            .arg(&self.admin)
            .args(["--output", "json"])
            .output()?;
        if !output.status.success() {
            bail!("hitless {} failed: {}", command.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_slice(&output.stdout).with_context(|| format!("JSON of hitless {}", command.join(" ")))
    }

    /// The kernel's counters by name.
    pub fn counters(&self) -> Result<BTreeMap<String, u64>> {
        let status = self.status()?;
        let counters = status.get("counters").context("no counters in hitless status")?;
        Ok(serde_json::from_value(counters.clone())?)
    }

    /// Connections that were moved to another backend.
    pub fn rebound(&self) -> Result<u64> {
        Ok(self.counters()?.iter().filter(|(name, _)| REBOUND.contains(&name.as_str())).map(|(_, count)| count).sum())
    }

    pub fn kill9(&self) -> Result<()> {
        self.process.sigkill()?;
        self.process.wait().map(drop)
    }
}

const REBOUND: [&str; 3] = ["rebinds_rst", "rebinds_icmp", "rebinds_silent"];

/// Newline-delimited JSON events, each acknowledged when it is in force.
pub struct Stream(Mutex<BufReader<UnixStream>>);

impl Stream {
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("connect {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self(Mutex::new(BufReader::new(stream))))
    }

    pub fn send(&self, event: &Event) -> Result<()> {
        let mut stream = self.0.lock().expect("no panic while locked");
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        stream.get_mut().write_all(&line).context("write an event")?;
        let mut answer = String::new();
        stream.read_line(&mut answer).context("read the acknowledgement")?;
        let answer: Value = serde_json::from_str(&answer).with_context(|| format!("acknowledgement {answer:?}"))?;
        match answer.get("error") {
            None | Some(Value::Null) => Ok(()),
            Some(error) => bail!("the agent refused {}: {error}", String::from_utf8_lossy(&line).trim()),
        }
    }
}
