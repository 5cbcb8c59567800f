//! Finds bpf-linker, or builds the pinned version against the LLVM that rustc speaks.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::toolchain::Toolchain;
use crate::{
    packages, step,
    workspace::{Workspace, cache, cargo, in_path},
};

const VERSION: &str = "0.13.0";

/// `$HITLESS_BPF_LINKER`, else the cached one, else one in `PATH` of the pinned version, else builds it.
pub fn find_or_install(workspace: &Workspace, toolchain: &Toolchain) -> Result<PathBuf> {
    if let Some(path) = env::var_os("HITLESS_BPF_LINKER").map(PathBuf::from) {
        if !path.is_file() {
            bail!("HITLESS_BPF_LINKER names {}, which is no file", path.display());
        }
        return Ok(path);
    }
    let root = cache()?.join(format!("tools/bpf-linker-{VERSION}-llvm-{}", toolchain.llvm));
    let cached = root.join("bin/bpf-linker");
    if cached.is_file() {
        return Ok(cached);
    }
    if let Some(path) = in_path("bpf-linker").filter(|path| version_of(path).as_deref() == Some(VERSION)) {
        return Ok(path);
    }
    install(workspace, toolchain, &root)?;
    Ok(cached)
}

fn install(workspace: &Workspace, toolchain: &Toolchain, root: &Path) -> Result<()> {
    let prefix = llvm(workspace, toolchain.llvm)?;
    if in_path("cc").is_none() {
        packages::install(workspace, "a C linker", &["gcc", "libc6-dev"])?;
    }
    eprintln!("Building bpf-linker {VERSION} into {} (about a minute, once)", root.display());
    let mut command = Command::new(cargo());
    super::isolate(&mut command);
    command
        .env("LLVM_PREFIX", &prefix)
        .args(["install", "bpf-linker", "--locked", "--version", VERSION, "--no-default-features"])
        .arg(format!("--features=llvm-{}", toolchain.llvm))
        .arg("--root")
        .arg(root)
        // Beside the other products of this checkout: cargo's default is a temporary directory that is lost on failure.
        .arg("--target-dir")
        .arg(workspace.target.join("bpf-linker"));
    step::run(&format!("bpf-linker {VERSION}"), &mut command, &workspace.log("bpf-linker")).with_context(|| {
        format!("no bpf-linker: install one for LLVM {} and name it in HITLESS_BPF_LINKER", toolchain.llvm)
    })
}

/// Where libLLVM of that major version is.
fn llvm(workspace: &Workspace, major: u32) -> Result<PathBuf> {
    let prefix = env::var_os("LLVM_PREFIX").map_or_else(|| format!("/usr/lib/llvm-{major}").into(), PathBuf::from);
    if prefix.join("lib/libLLVM.so").exists() {
        return Ok(prefix);
    }
    let package = format!("llvm-{major}-dev");
    if packages::debian() {
        packages::refresh(workspace);
        if packages::available(&package) {
            packages::install(workspace, "libLLVM, for bpf-linker", &[&package])?;
            return Ok(prefix);
        }
    }
    bail!(
        "no libLLVM {major} at {}: install {package} (apt.llvm.org has every version) or set LLVM_PREFIX, \
         or install bpf-linker another way (`cargo binstall bpf-linker@{VERSION}`)",
        prefix.display()
    )
}

fn version_of(linker: &Path) -> Option<String> {
    let output = Command::new(linker).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.split_whitespace().nth(1)?.to_owned())
}
