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
    for (name, _) in env::vars_os() {
        if leaks(&name.to_string_lossy()) {
            command.env_remove(&name);
        }
    }
}

/// Is it of a host build? What says where crates and toolchains are is not.
fn leaks(name: &str) -> bool {
    const KEEP: [&str; 6] = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "RUSTUP_HOME", "RUSTUP_AUTO"];
    let host = name.starts_with("CARGO") || name.starts_with("RUST") || name == "LD_LIBRARY_PATH";
    host && !KEEP.iter().any(|keep| name.starts_with(keep))
}

/// An unchanged object keeps its time stamp: nothing that embeds it is built again.
fn replace_if_different(built: &Path, object: &Path) -> Result<()> {
    let new = fs::read(built).with_context(|| format!("cargo left no object at {}", built.display()))?;
    if fs::read(object).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let dir = object.parent().context("the object has a directory")?;
    fs::create_dir_all(dir)?;
    // By rename: a build that is reading the old one reads it to its end.
    let partial = object.with_extension("partial");
    fs::write(&partial, &new)
        .and_then(|()| fs::rename(&partial, object))
        .with_context(|| format!("cannot write {}", object.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_host_builds_stay_out_and_places_stay_in() {
        for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_TARGET_DIR", "RUSTC_WRAPPER", "RUSTUP_TOOLCHAIN"] {
            assert!(leaks(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_HTTP_PROXY", "CARGO_REGISTRIES_CRATES_IO_PROTOCOL", "PATH", "HOME"] {
            assert!(!leaks(name), "{name}");
        }
    }

    #[test]
    fn an_unchanged_object_keeps_its_time_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let (built, object) = (dir.path().join("built"), dir.path().join("bpf/object"));
        fs::write(&built, "one").unwrap();
        replace_if_different(&built, &object).unwrap();
        let old = fs::metadata(&object).unwrap().modified().unwrap();
        replace_if_different(&built, &object).unwrap();
        assert_eq!(fs::metadata(&object).unwrap().modified().unwrap(), old);
        fs::write(&built, "two").unwrap();
        replace_if_different(&built, &object).unwrap();
        assert_eq!(fs::read_to_string(&object).unwrap(), "two");
    }
}
