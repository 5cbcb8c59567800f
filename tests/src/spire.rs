//! A real SPIRE on this machine: server and agent, on loopback and in a temporary directory.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::parts;

pub const TRUST_DOMAIN: &str = "cluster.local";
/// How long each of the two may take to start, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Its workloads are this process' user.
const SELECTOR: &str = "unix:uid:0";

pub struct Spire {
    programs: PathBuf,
    dir: TempDir,
    server: Child,
    agent: Child,
}

impl Spire {
    pub fn start() -> Result<Self> {
        let programs = parts::spire()?;
        let dir = tempfile::tempdir()?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        fs::write(dir.path().join("server.conf"), server_config(dir.path(), port))?;
        fs::write(dir.path().join("agent.conf"), agent_config(dir.path(), port))?;
        let server = spawn(&programs.join("spire-server"), dir.path(), "server", &[])?;
        let mut starting = Starting { server: Some(server), agent: None };
        let admin = Admin { programs: &programs, dir: dir.path() };
        wait_for("the server", dir.path(), "server", || admin.run(&["healthcheck"]).is_ok())?;
        fs::write(dir.path().join("bundle.pem"), admin.run(&["bundle", "show"])?)?;
        let token = admin.json(&["token", "generate", "-spiffeID", &node()])?;
        let token = token["value"].as_str().context("no token in the answer")?.to_owned();
        let agent = spawn(&programs.join("spire-agent"), dir.path(), "agent", &["-joinToken", &token])?;
        starting.agent = Some(agent);
        wait_for("the agent", dir.path(), "agent", || dir.path().join("agent.sock").exists())?;
        let (Some(server), Some(agent)) = (starting.server.take(), starting.agent.take()) else { bail!("not started") };
        Ok(Self { programs, dir, server, agent })
    }

    /// Of the Workload API.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    /// Lets this process be `id`; the entry's name is for [`Spire::unregister`].
    pub fn register(&self, id: &str, life: Duration) -> Result<String> {
        let life = life.as_secs().to_string();
        let args = ["entry", "create", "-parentID", &node(), "-spiffeID", id, "-selector", SELECTOR];
        let answer = self.admin().json(&[&args[..], &["-x509SVIDTTL", &life]].concat())?;
        let entry = answer["results"][0]["entry"]["id"].as_str();
        Ok(entry.with_context(|| format!("no entry in {answer}"))?.to_owned())
    }

    pub fn unregister(&self, entry: &str) -> Result<()> {
        self.admin().run(&["entry", "delete", "-entryID", entry]).map(drop)
    }

    /// A second root beside the first; both are in the bundle from then on. Its name is for [`Spire::activate`].
    pub fn prepare(&self) -> Result<String> {
        self.authority("prepare", None, "prepared_authority")
    }

    /// The prepared root signs from now on. Returns the name of the one before, for [`Spire::revoke`].
    pub fn activate(&self, prepared: &str) -> Result<String> {
        self.authority("activate", Some(prepared), "activated_authority")?;
        let shown = self.admin().json(&["localauthority", "x509", "show"])?;
        Ok(shown["old"]["authority_id"].as_str().with_context(|| format!("no old one in {shown}"))?.to_owned())
    }

    /// What it signed is to be renewed at once.
    pub fn taint(&self, old: &str) -> Result<()> {
        self.authority("taint", Some(old), "tainted_authority").map(drop)
    }

    /// Out of the bundle.
    pub fn revoke(&self, old: &str) -> Result<()> {
        self.authority("revoke", Some(old), "revoked_authority").map(drop)
    }

    pub fn stop_agent(&mut self) -> Result<()> {
        self.agent.kill()?;
        self.agent.wait()?;
        Ok(())
    }

    fn authority(&self, what: &str, id: Option<&str>, field: &str) -> Result<String> {
        let args = ["localauthority", "x509", what];
        let id = id.map(|id| vec!["-authorityID", id]).unwrap_or_default();
        let answer = self.admin().json(&[&args[..], &id].concat())?;
        Ok(answer[field]["authority_id"].as_str().with_context(|| format!("no {field} in {answer}"))?.to_owned())
    }

    fn admin(&self) -> Admin<'_> {
        Admin { programs: &self.programs, dir: self.dir.path() }
    }
}

impl Drop for Spire {
    fn drop(&mut self) {
        stop(&mut self.agent);
        stop(&mut self.server);
    }
}

/// What is running when a later step of the start fails.
struct Starting {
    server: Option<Child>,
    agent: Option<Child>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.agent.iter_mut().chain(&mut self.server).for_each(stop);
    }
}

fn stop(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// The server's command line.
struct Admin<'a> {
    programs: &'a Path,
    dir: &'a Path,
}

impl Admin<'_> {
    fn run(&self, args: &[&str]) -> Result<String> {
        let socket = self.dir.join("server.sock");
        parts::output(Command::new(self.programs.join("spire-server")).args(args).arg("-socketPath").arg(socket))
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.run(&[args, &["-output", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("spire-server {} said {text:?}", args.join(" ")))
    }
}

fn node() -> String {
    format!("spiffe://{TRUST_DOMAIN}/node")
}

fn spawn(program: &Path, dir: &Path, name: &str, args: &[&str]) -> Result<Child> {
    let log = File::create(dir.join(format!("{name}.log")))?;
    Command::new(program)
        .arg("run")
        .arg("-config")
        .arg(dir.join(format!("{name}.conf")))
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("start {}", program.display()))
}

fn wait_for(what: &str, dir: &Path, name: &str, mut ready: impl FnMut() -> bool) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !ready() {
        if Instant::now() > until {
            let log = fs::read_to_string(dir.join(format!("{name}.log"))).unwrap_or_default();
            bail!("{what} of SPIRE is not ready after {} s:\n{log}", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn server_config(dir: &Path, port: u16) -> String {
    let dir = dir.display();
    format!(
        r#"server {{
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{dir}/server.sock"
    trust_domain = "{TRUST_DOMAIN}"
    data_dir = "{dir}/server"
    log_level = "INFO"
}}
plugins {{
    DataStore "sql" {{ plugin_data {{
        database_type = "sqlite3"
        connection_string = "{dir}/datastore.sqlite3"
    }} }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "memory" {{ plugin_data {{}} }}
}}
"#
    )
}

fn agent_config(dir: &Path, port: u16) -> String {
    let dir = dir.display();
    format!(
        r#"agent {{
    data_dir = "{dir}/agent"
    log_level = "INFO"
    server_address = "127.0.0.1"
    server_port = "{port}"
    socket_path = "{dir}/agent.sock"
    trust_bundle_path = "{dir}/bundle.pem"
    trust_domain = "{TRUST_DOMAIN}"
}}
plugins {{
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "memory" {{ plugin_data {{}} }}
    WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"#
    )
}
