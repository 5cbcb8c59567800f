//! Where things are: the checkout, cargo's target directory, the cache outside the tree.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

/// The checkout xtask was started in and the directory cargo builds into.
#[derive(Debug)]
pub struct Workspace {
    pub root: PathBuf,
    pub target: PathBuf,
}

#[derive(Deserialize)]
struct Metadata {
    workspace_root: PathBuf,
    target_directory: PathBuf,
}

impl Workspace {
    /// Asks the cargo that runs xtask, so that `CARGO_TARGET_DIR` and `build.target-dir` count.
    pub fn find() -> Result<Self> {
        let manifest = env::var_os("CARGO_MANIFEST_DIR")
            .map(|dir| PathBuf::from(dir).join("Cargo.toml"))
            .filter(|path| path.is_file())
            .unwrap_or_else(|| Path::new("Cargo.toml").into());
        let output = Command::new(cargo())
            .args(["metadata", "--format-version=1", "--no-deps", "--manifest-path"])
            .arg(&manifest)
            .output()
            .context("cannot run `cargo metadata`: start this as `cargo xtask …`")?;
        if !output.status.success() {
            bail!("`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let Metadata { workspace_root, target_directory } =
            serde_json::from_slice(&output.stdout).context("`cargo metadata` printed no JSON")?;
        Ok(Self { root: workspace_root, target: target_directory })
    }

    /// The BPF object; `dataplane-user/build.rs` looks for it here.
    pub fn object(&self) -> PathBuf {
        self.target.join("bpf/hitless-bpf.o")
    }

    /// Logs of the steps of xtask.
    pub fn log(&self, step: &str) -> PathBuf {
        self.target.join("xtask-logs").join(format!("{step}.log"))
    }
}

/// The cargo that runs xtask: rustup's or the distribution's, whichever the user called.
pub fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// `$HITLESS_CACHE`, else `$XDG_CACHE_HOME/hitless`, else `~/.cache/hitless`: tools that xtask built.
pub fn cache() -> Result<PathBuf> {
    let dir = env::var_os("HITLESS_CACHE")
        .map(PathBuf::from)
        .or_else(|| env::var_os("XDG_CACHE_HOME").map(|dir| PathBuf::from(dir).join("hitless")))
        .or_else(|| env::var_os("HOME").map(|dir| PathBuf::from(dir).join(".cache/hitless")))
        .context("no place for the cache: set HITLESS_CACHE or HOME")?;
    fs::create_dir_all(&dir)
        .with_context(|| format!("cannot create the cache {}: set HITLESS_CACHE to a writable place", dir.display()))?;
    Ok(dir)
}

/// The first executable called `name` in `PATH`.
pub fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}
