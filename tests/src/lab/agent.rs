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
    pub node: usize,
    place: Vec<String>,
    source: PathBuf,
    ready: PathBuf,
}

impl Agent {
    /// Its source accepts connections; it is ready once it has been told the state.
    pub(super) fn start(node: &Node, options: AgentOptions) -> Result<Self> {
        let host = &node.host;
        let (source, ready) = (host.file("source.sock"), host.file("agent.ready"));
        for stale in [&source, &ready] {
            // An agent that was killed could not tidy up.
            let _ = std::fs::remove_file(stale);
        }
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let place = [
            ("--state-dir", path(&host.file("agent"))),
            ("--cgroup", path(&node.cgroup())),
            ("--bpffs", path(&node.site.dir.join("bpf"))),
            ("--name", node.name.clone()),
        ];
        let place: Vec<String> = place.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
        let mut args = vec![path(&crate::workload::agent_binary()?), "run".into()];
        args.extend(place.clone());
        args.extend(["--source".to_owned(), format!("stream:{}", path(&source))]);
        args.extend(["--ready-file".to_owned(), path(&ready)]);
        if !options.layers.is_empty() {
            args.extend(["--layers".to_owned(), options.layers]);
        }
        args.extend(options.args);
        let process = host.start_agent(&args)?;
        process.wait_for_file(&source)?;
        Ok(Self { process, node: node.index, place, source, ready })
    }

    /// Each hook is proved and the state is in force.
    pub fn wait_ready(&self) -> Result<()> {
        self.process.wait_for_file(&self.ready).with_context(|| format!("the agent of node {}", self.node))
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its stream source.
    pub fn stream_path(&self) -> &Path {
        &self.source
    }

    /// A connection to its stream source.
    pub fn connect(&self) -> Result<Stream> {
        Stream::connect(&self.source)
    }

    /// `hitless status --output json`.
    pub fn status(&self) -> Result<Value> {
        self.admin(&["status"])
    }

    /// Any command's JSON.
    pub fn admin(&self, command: &[&str]) -> Result<Value> {
        let output = self.run(&[command, &["--output", "json"]].concat())?;
        serde_json::from_str(&output).with_context(|| format!("JSON of hitless {}", command.join(" ")))
    }

    /// What `hitless` prints, told which agent is meant.
    pub fn run(&self, command: &[&str]) -> Result<String> {
        let output = Command::new(crate::workload::agent_binary()?).args(command).args(&self.place).output()?;
        if !output.status.success() {
            bail!("hitless {} failed: {}", command.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
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

    /// Wait until a pod of this node is the programs' business. (An acknowledged event says that the
    /// maps know of it; entering the pod's network namespace takes a moment more.)
    pub fn wait_enrolled(&self, pod: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.status()?;
            let pods = status.get("pods").and_then(Value::as_array).context("no pods in hitless status")?;
            let row = pods.iter().find(|row| row["name"] == pod);
            // Not `enrolled`: a pod may be attached for other reasons.
            if row.is_some_and(|row| row["attached"] == true) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("pod {pod} was not attached within 20 s: {row:?}\n{}", self.process.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Wait until a pod of this node is in the mesh: its listeners are open.
    pub fn wait_joined(&self, pod: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.status()?;
            let pods = status.get("pods").and_then(Value::as_array).context("no pods in hitless status")?;
            if pods.iter().any(|row| row["name"] == pod && row["inMesh"] == true) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("pod {pod} did not join the mesh within 20 s\n{}", self.process.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The tunnel's counters by name; none without a mesh.
    pub fn tunnel(&self) -> Result<BTreeMap<String, u64>> {
        let status = self.status()?;
        Ok(serde_json::from_value(status.get("tunnel").context("no tunnel in hitless status")?.clone())?)
    }

    pub fn kill9(&self) -> Result<()> {
        self.process.sigkill()?;
        self.process.wait().map(drop)
    }
}

pub(super) const REBOUND: [&str; 3] = ["rebinds_rst", "rebinds_icmp", "rebinds_silent"];

/// Newline-delimited JSON events, each acknowledged when it is in force.
pub struct Stream(Mutex<BufReader<UnixStream>>);

impl Stream {
    pub fn connect(path: &Path) -> Result<Self> {
        // Between bind() and listen() the socket is there and refuses.
        let patient = || (0..100).find_map(|_| UnixStream::connect(path).ok().or_else(pause));
        let stream = UnixStream::connect(path).or_else(|error| patient().ok_or(error));
        let stream = stream.with_context(|| format!("connect {}", path.display()))?;
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
        let problem = answer.get("error").or_else(|| answer.get("problems"));
        match problem {
            None => Ok(()),
            Some(problem) => bail!("the agent refused {}: {problem}", String::from_utf8_lossy(&line).trim()),
        }
    }
}

fn pause() -> Option<UnixStream> {
    std::thread::sleep(Duration::from_millis(10));
    None
}
