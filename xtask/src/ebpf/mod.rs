//! `cargo xtask build-ebpf`: the BPF object, by whichever toolchain is there.

mod linker;
mod toolchain;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{step, workspace::Workspace};
use toolchain::Toolchain;

const TARGET: &str = "bpfel-unknown-none";
const BINARY: &str = "hitless-bpf";

/// `debuginfo` and `--btf`: BTF for the maps, socket storage and timers. `v3`: atomics that return a value (Linux 5.12).
const RUSTFLAGS: &str = "-C debuginfo=2 -C link-arg=--btf -C target-cpu=v3";

/// Builds the object and returns where it is. `log` compiles the aya-log statements in.
pub fn build(workspace: &Workspace, log: bool) -> Result<PathBuf> {
    let toolchain = Toolchain::find_or_install(workspace)?;
    let linker = linker::find_or_install(workspace, &toolchain)?;
    let target = workspace.target.join("bpf-build");

    let mut command = toolchain.cargo();
    isolate(&mut command);
    command
        .current_dir(workspace.root.join("dataplane-ebpf"))
        .env("RUSTFLAGS", RUSTFLAGS)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker)
        .env("CARGO_TARGET_DIR", &target)
        .args(["build", "--release", "--locked", "--target", TARGET, "--bin", BINARY])
        .args(["--features", if log { "log" } else { "object" }]);
    toolchain.configure(&mut command);
    step::run(&format!("BPF object ({toolchain})"), &mut command, &workspace.log("build-ebpf")).with_context(|| {
        format!(
            "if the linker could not read the bitcode: {} was built for another LLVM than rustc's; \
             name another one in HITLESS_BPF_LINKER",
            linker.display()
        )
    })?;

    let object = workspace.object();
    replace_if_different(&target.join(TARGET).join("release").join(BINARY), &object)?;
    Ok(object)
}

/// What the outer cargo, rustup or the user set for host builds must not reach the build for the BPF target.
fn isolate(command: &mut Command) {
    const KEEP: [&str; 6] = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "RUSTUP_HOME", "RUSTUP_AUTO"];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let cargo = text.starts_with("CARGO") || text.starts_with("RUST") || text == "LD_LIBRARY_PATH";
        if cargo && !KEEP.iter().any(|keep| text.starts_with(keep)) {
            command.env_remove(&name);
        }
    }
}

/// An unchanged object keeps its time stamp: nothing that embeds it is built again.
fn replace_if_different(built: &Path, object: &Path) -> Result<()> {
    let new = fs::read(built).with_context(|| format!("cargo left no object at {}", built.display()))?;
    if fs::read(object).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let dir = object.parent().context("the object has a directory")?;
    fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    std::io::Write::write_all(&mut file, &new)?;
    file.persist(object).with_context(|| format!("cannot write {}", object.display()))?;
    Ok(())
}
