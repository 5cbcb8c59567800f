//! Container images without a container engine: a docker-archive of one layer, which `ctr images import` takes.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::json;

use super::{node::PAUSE, parts};

pub const HTTPBIN: &str = "hitless.test/go-httpbin:1";
pub const FORTIO: &str = "hitless.test/fortio:1";
pub const NGINX: &str = "hitless.test/nginx:1";
pub const ENVOY: &str = "hitless.test/envoy:1";

/// Files of the machine under the names they have in the image.
#[derive(Debug)]
pub struct Image {
    pub name: String,
    files: Vec<(PathBuf, String)>,
    texts: Vec<(String, String)>,
    dirs: Vec<String>,
    entrypoint: Vec<String>,
    stop_signal: Option<String>,
}

impl Image {
    pub fn new(name: &str, entrypoint: &[&str]) -> Self {
        Self {
            name: name.into(),
            files: Vec::new(),
            texts: Vec::new(),
            dirs: vec!["tmp".into()],
            entrypoint: entrypoint.iter().map(|word| (*word).to_owned()).collect(),
            stop_signal: None,
        }
    }

    pub fn file(mut self, from: &Path, to: &str) -> Self {
        self.files.push((from.into(), to.into()));
        self
    }

    pub fn text(mut self, to: &str, text: &str) -> Self {
        self.texts.push((to.into(), text.into()));
        self
    }

    pub fn dir(mut self, dir: &str) -> Self {
        self.dirs.push(dir.into());
        self
    }

    pub fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// Another than TERM.
    pub fn stopped_by(mut self, signal: &str) -> Self {
        self.stop_signal = Some(signal.into());
        self
    }

    /// With the libraries it is linked with and its loader.
    pub fn program(mut self, from: &Path, to: &str) -> Result<Self> {
        // A static program has none, and ldd says so by failing.
        let listed = Command::new("ldd").arg(from).output().context("run ldd")?;
        let libraries = String::from_utf8_lossy(&listed.stdout).into_owned();
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            if !self.files.iter().any(|(_, to)| to == library) {
                self.files.push((library.into(), library.into()));
            }
        }
        Ok(self.file(from, to))
    }

    /// Writes the archive into a directory.
    pub fn build(&self, dir: &Path) -> Result<PathBuf> {
        let stage = tempfile::tempdir_in(dir)?;
        let (root, layout) = (stage.path().join("root"), stage.path().join("layout"));
        fs::create_dir_all(&root)?;
        fs::create_dir_all(&layout)?;
        for dir in &self.dirs {
            fs::create_dir_all(root.join(dir.trim_start_matches('/')))?;
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        for (from, to) in &self.files {
            let to = root.join(to.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a file has a directory")?)?;
            fs::copy(from, &to).with_context(|| format!("copy {} into image {}", from.display(), self.name))?;
        }
        for (to, text) in &self.texts {
            let to = root.join(to.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a file has a directory")?)?;
            fs::write(to, text)?;
        }
        let layer = layout.join("layer.tar");
        parts::run(tar(&root, &layer).arg("."))?;
        let sum = parts::output(Command::new("sha256sum").arg(&layer))?;
        let digest = sum.split(' ').next().context("sha256sum printed nothing")?;
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({
            "architecture": arch, "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Env": ["PATH=/bin:/usr/sbin"], "StopSignal": self.stop_signal},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        });
        fs::write(layout.join("config.json"), config.to_string())?;
        let manifest = json!([{"Config": "config.json", "RepoTags": [self.name], "Layers": ["layer.tar"]}]);
        fs::write(layout.join("manifest.json"), manifest.to_string())?;
        let archive = dir.join(format!("{}.tar", self.name.replace(['/', ':'], "_")));
        parts::run(tar(&layout, &archive).args(["manifest.json", "config.json", "layer.tar"]))?;
        Ok(archive)
    }
}

fn tar(dir: &Path, archive: &Path) -> Command {
    let mut command = Command::new("tar");
    command.args(["--owner=0", "--group=0", "--numeric-owner", "--sort=name", "-C"]).arg(dir).arg("-cf").arg(archive);
    command
}

/// Holds a pod's namespaces.
pub(super) fn pause() -> Result<Image> {
    Ok(Image::new(PAUSE, &["/bin/pause"]).file(&parts::pause()?, "/bin/pause"))
}

pub fn httpbin() -> Result<Image> {
    Ok(Image::new(HTTPBIN, &["/bin/go-httpbin"]).file(&parts::httpbin()?, "/bin/go-httpbin"))
}

pub fn fortio() -> Result<Image> {
    Ok(Image::new(FORTIO, &["/bin/fortio"]).file(&parts::fortio()?, "/bin/fortio"))
}

pub fn envoy() -> Result<Image> {
    Image::new(ENVOY, &["/bin/envoy"]).program(&parts::envoy()?, "/bin/envoy")
}

const NGINX_CONF: &str = "daemon off; worker_processes 1; error_log /dev/stderr; pid /tmp/nginx.pid;\n\
    events { worker_connections 4096; }\n\
    http { access_log off; client_body_temp_path /tmp/a; proxy_temp_path /tmp/b; fastcgi_temp_path /tmp/c; uwsgi_temp_path /tmp/d;\n\
    scgi_temp_path /tmp/e; server { listen 8080 backlog=4096; listen [::]:8080 backlog=4096; location / { return 200 \"$hostname\\n\"; }\n\
    location = /alive { if (-f /tmp/sick) { return 500; } return 200 \"alive\\n\"; }\n\
    location = /swallow { client_max_body_size 0; client_body_buffer_size 1024m; proxy_pass http://127.0.0.1:1; } } }\n";

/// Closes at once on SIGTERM: connections that it has not answered are lost. `/alive` fails once there is a `/tmp/sick`;
/// what is posted to `/swallow` is held in memory.
pub fn nginx() -> Result<Image> {
    parts::needs(&["nginx"], "nginx-light")?;
    let program = parts::which("nginx").context("nginx was just installed")?;
    let image = Image::new(NGINX, &["/usr/sbin/nginx", "-c", "/etc/nginx.conf"]);
    let image =
        image.text("/etc/nginx.conf", NGINX_CONF).text("/etc/passwd", "root:x:0:0::/:/\nnobody:x:65534:65534::/:/\n");
    let image = image.text("/etc/group", "root:x:0:\nnogroup:x:65534:\n");
    image.dir("/var/log/nginx").dir("/var/lib/nginx").program(&program, "/usr/sbin/nginx")
}
