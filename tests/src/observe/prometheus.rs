//! A real Prometheus. Debian's package is unpacked, not installed: no service starts, no user is made, and nothing of
//! it is on the machine but in the cache.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    cluster::parts,
    lab::{Process, net, pod::Place},
    workload::sockets::Kind,
};

const PORT: u16 = 9090;
/// How long it may take to start.
const PATIENCE: Duration = Duration::from_secs(20);

/// The directory with `prometheus` and `promtool`.
pub fn programs() -> Result<PathBuf> {
    if let (Some(prometheus), Some(_)) = (parts::which("prometheus"), parts::which("promtool")) {
        return Ok(prometheus.parent().unwrap_or(Path::new("/")).to_owned());
    }
    let dir = parts::cache()?.join("prometheus");
    parts::once(&dir, || {
        if parts::which("apt-get").is_none() {
            bail!("no prometheus and promtool in PATH, and this is not a Debian: install them by hand");
        }
        eprintln!("Fetching Prometheus with apt-get (once)");
        let packages = tempfile::tempdir_in(parts::cache()?)?;
        let apt = |args: &[&str]| {
            // As root, in a directory of root's.
            let mut apt = Command::new("apt-get");
            parts::run(apt.current_dir(&packages).args(["--quiet=2", "-o", "APT::Sandbox::User=root"]).args(args))
        };
        // Package lists may be absent or old.
        if apt(&["download", "prometheus"]).is_err() {
            let _ = apt(&["update"]);
            apt(&["download", "prometheus"])?;
        }
        let mut files = fs::read_dir(&packages)?.flatten().map(|entry| entry.path());
        let package = files.next().context("apt-get download left no package")?;
        let unpacked = packages.path().join("unpacked");
        parts::run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&unpacked))?;
        Ok(fs::rename(unpacked.join("usr/bin"), &dir)?)
    })?;
    Ok(dir)
}

/// `promtool` with this on its standard input; an error is what it complains of.
pub fn promtool(args: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(programs()?.join("promtool"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start promtool")?;
    // It may end before it has read all.
    let _ = child.stdin.take().context("the input is piped")?.write_all(input.as_bytes());
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "promtool {}: {said}", args.join(" "));
    Ok(())
}

/// A Prometheus that runs somewhere in the lab and is reached on that place's loopback only.
pub struct Prometheus<'a> {
    place: &'a Place,
    process: Process,
}

impl<'a> Prometheus<'a> {
    /// Scrapes `targets` as job `hitless`, and evaluates the rules, every second.
    pub fn start(place: &'a Place, targets: &[SocketAddr], rules: &Path) -> Result<Self> {
        let (config, data) = (place.file("prometheus.yaml"), place.file("prometheus"));
        let targets: Vec<_> = targets.iter().map(ToString::to_string).collect();
        // JSON is YAML.
        let text = serde_json::json!({
            "global": { "scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s" },
            "rule_files": [rules],
            "scrape_configs": [{ "job_name": "hitless", "static_configs": [{ "targets": targets }] }],
        });
        fs::write(&config, text.to_string())?;
        let program = programs()?.join("prometheus");
        let process = place.spawn(&[
            program.to_string_lossy().into_owned(),
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", data.display()),
            format!("--web.listen-address=127.0.0.1:{PORT}"),
        ])?;
        let this = Self { place, process };
        let began = Instant::now();
        while !this.get("/-/ready").is_ok_and(|(status, _)| status == 200) {
            ensure!(began.elapsed() < PATIENCE && this.process.running(), "not ready:\n{}", this.process.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(this)
    }

    /// The series that an expression has right now.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let data = self.api(&format!("/api/v1/query?query={}", escaped(expression)))?;
        Ok(data["result"].as_array().cloned().unwrap_or_default())
    }

    /// The first rule group's rules, as Prometheus has loaded and last evaluated them.
    pub fn rules(&self) -> Result<Vec<Value>> {
        let data = self.api("/api/v1/rules")?;
        Ok(data["groups"][0]["rules"].as_array().cloned().unwrap_or_default())
    }

    /// The alerts that are pending or firing.
    pub fn alerts(&self) -> Result<Vec<Value>> {
        Ok(self.api("/api/v1/alerts")?["alerts"].as_array().cloned().unwrap_or_default())
    }

    pub fn targets(&self) -> Result<Vec<Value>> {
        Ok(self.api("/api/v1/targets")?["activeTargets"].as_array().cloned().unwrap_or_default())
    }

    fn api(&self, path: &str) -> Result<Value> {
        let (status, body) = self.get(path)?;
        let answer: Value = serde_json::from_str(&body).with_context(|| format!("GET {path}: {status} {body}"))?;
        ensure!(answer["status"] == "success", "GET {path}: {}", answer["error"]);
        Ok(answer["data"].clone())
    }

    fn get(&self, path: &str) -> Result<(u16, String)> {
        get(self.place, (Ipv4Addr::LOCALHOST, PORT).into(), path)
    }
}

/// GET from a place of the lab: status and body.
pub fn get(place: &Place, from: SocketAddr, path: &str) -> Result<(u16, String)> {
    let kind = if from.is_ipv4() { Kind::Tcp4 } else { Kind::Tcp6 };
    let mut stream = net::connect(place.socket(kind)?, from).with_context(|| format!("connect to {from}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // HTTP/1.0: the body ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {from}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no HTTP status")?;
    Ok((status, body.to_owned()))
}

fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        if byte.is_ascii_alphanumeric() {
            escaped.push(byte.into());
        } else {
            escaped += &format!("%{byte:02X}");
        }
        escaped
    })
}
