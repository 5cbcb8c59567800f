//! What needs root: network namespaces and BPF. Built as the user, run through sudo.

use std::{ffi::OsStr, os::unix::process::CommandExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{section::describe, workspace::in_path};

/// Replaces this process by `program`, as root.
pub fn exec(program: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<()> {
    let mut command = command(program)?;
    if !is_root() {
        eprintln!("{} makes network namespaces and loads BPF programs: running it with sudo", program.display());
    }
    command.args(args);
    // Ctrl-C reaches the program itself, which cleans up; nothing of xtask is left to do.
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", describe(&command)))
}

/// `program`, to be run as root.
pub fn command(program: &Path) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if in_path("sudo").is_none() {
        bail!("this needs root, for network namespaces and BPF programs, and there is no sudo: run it as root");
    }
    let mut command = Command::new("sudo");
    command.arg("--preserve-env").arg(program);
    Ok(command)
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
