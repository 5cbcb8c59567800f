//! Finds a rustc that compiles for BPF: rustup's nightly with rust-src, or Debian's with a prebuilt core.

use std::{env, fmt, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    packages, step,
    workspace::{Workspace, in_path},
};

const PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// One of the two routes to a BPF object.
#[derive(Debug)]
pub struct Toolchain {
    route: Route,
    /// rustc's version, for people.
    version: String,
    /// Major version of the LLVM in rustc; the linker's must be the same or newer.
    pub llvm: u32,
}

#[derive(Debug)]
enum Route {
    /// A toolchain of rustup with `rust-src`: core is built from source.
    Rustup(String),
    /// `/usr/bin/rustc` with core for the BPF target already compiled.
    Debian,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.route {
            Route::Rustup(name) => write!(f, "rustup {name}, rustc {}", self.version),
            Route::Debian => write!(f, "Debian's rustc {}", self.version),
        }
    }
}

impl Toolchain {
    /// The toolchain that is there; else installs one, saying so.
    pub fn find_or_install(workspace: &Workspace) -> Result<Self> {
        if let Some(found) = Self::find()? {
            return Ok(found);
        }
        if packages::debian() {
            packages::refresh(workspace);
            if PACKAGES.iter().all(|package| packages::available(package)) {
                packages::install(workspace, "rustc with core for BPF", &PACKAGES)?;
            }
        }
        if let Some(found) = Self::find()? {
            return Ok(found);
        }
        if in_path("rustup").is_some() {
            let mut command = Command::new("rustup");
            command.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]);
            step::run("rustup toolchain install nightly", &mut command, &workspace.log("rustup")).context(REMEDY)?;
        }
        Self::find()?.context(REMEDY)
    }

    fn find() -> Result<Option<Self>> {
        if in_path("rustup").is_some() {
            let name = env::var("HITLESS_BPF_TOOLCHAIN").unwrap_or_else(|_| "nightly".into());
            let route = Route::Rustup(name);
            if let Ok(found) = Self::describe(route)
                && found.sysroot()?.join("lib/rustlib/src/rust/library/core").is_dir()
            {
                return Ok(Some(found));
            }
        }
        if Path::new("/usr/bin/rustc").is_file() && Path::new("/usr/bin/cargo").is_file() {
            let found = Self::describe(Route::Debian)?;
            if found.sysroot()?.join("lib/rustlib/bpfel-unknown-none/lib").is_dir() {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn describe(route: Route) -> Result<Self> {
        let text = output(rustc(&route).arg("-vV"))?;
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let version = field("release:").context("rustc names no release")?.to_owned();
        let llvm = field("LLVM version:")
            .and_then(|version| version.split('.').next()?.parse().ok())
            .context("rustc names no LLVM version")?;
        Ok(Self { route, version, llvm })
    }

    fn sysroot(&self) -> Result<std::path::PathBuf> {
        Ok(output(rustc(&self.route).args(["--print", "sysroot"]))?.trim().into())
    }

    /// The cargo of this toolchain.
    pub fn cargo(&self) -> Command {
        match &self.route {
            Route::Rustup(name) => {
                let mut command = Command::new("rustup");
                command.args(["run", name, "cargo"]);
                command
            }
            Route::Debian => Command::new("/usr/bin/cargo"),
        }
    }

    /// What a build for the BPF target needs beyond the flags common to both routes.
    pub fn configure(&self, command: &mut Command) {
        match &self.route {
            Route::Rustup(_) => command.args(["-Z", "build-std=core"]),
            // A rustup in PATH must not answer for rustc.
            Route::Debian => command.env("RUSTC", "/usr/bin/rustc"),
        };
    }
}

fn rustc(route: &Route) -> Command {
    let mut command = match route {
        Route::Rustup(name) => {
            let mut command = Command::new("rustup");
            command.args(["run", name, "rustc"]);
            command
        }
        Route::Debian => Command::new("/usr/bin/rustc"),
    };
    command.env_remove("RUSTUP_TOOLCHAIN").env_remove("LD_LIBRARY_PATH");
    command
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

const REMEDY: &str = "no rustc for BPF. Either
  rustup toolchain install nightly --component rust-src   (any distribution; HITLESS_BPF_TOOLCHAIN names another toolchain), or
  apt-get install rustc-web cargo-web libstd-rust-web-dev-bpf   (Debian 12 or newer, with its security archive)";
