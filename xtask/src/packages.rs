//! Installs Debian packages, saying so; with a remedy where it cannot.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Result, bail};

use crate::{step, workspace::Workspace};

/// Can packages be installed with apt-get here?
pub fn debian() -> bool {
    Path::new("/usr/bin/apt-get").is_file()
}

/// Is there such a package in the archives this machine knows?
pub fn available(package: &str) -> bool {
    Command::new("apt-cache")
        .args(["show", "--no-all-versions", package])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// `apt-get install`, as root or by `sudo`.
pub fn install(workspace: &Workspace, why: &str, packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if !debian() {
        bail!("missing: {list} ({why}); this is not a Debian, so install them by hand");
    }
    let root = nix::unistd::geteuid().is_root();
    if !root && crate::workspace::in_path("sudo").is_none() {
        bail!("missing: {list} ({why}). As root run: apt-get install {list}");
    }
    eprintln!("Installing with apt-get: {list} ({why})");
    if !root {
        // sudo may ask for a password: it needs the terminal.
        let status = Command::new("sudo").args(["apt-get", "install", "--yes"]).args(packages).status()?;
        if !status.success() {
            bail!("`sudo apt-get install {list}` failed ({status}): run `sudo apt-get update` and try again");
        }
        return Ok(());
    }
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command.args(["install", "--yes", "--no-install-recommends"]).args(packages);
    step::run(&format!("apt-get install {list}"), &mut command, &workspace.log("apt-get"))
}

/// `apt-get update`. A source that cannot be reached is no reason to stop: installing will tell.
pub fn refresh(workspace: &Workspace) {
    if debian() && nix::unistd::geteuid().is_root() {
        let mut command = Command::new("apt-get");
        command.arg("update");
        if let Err(error) = step::run("apt-get update", &mut command, &workspace.log("apt-get-update")) {
            eprintln!("warning: {error}");
        }
    }
}
