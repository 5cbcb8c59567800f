//! Fuzzes what strangers write, each target for a while, from its kept corpus; by cargo-fuzz and the compiler that is there.
//!
//! Without a sanitizer: the code under test is safe Rust, and so any stable compiler does. What is found on the way goes to
//! `target/fuzz`, not into the repository: an input that broke a promise is kept by hand, in `fuzz/corpus`.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{
    packages,
    section::{section, status},
    step,
    workspace::{Workspace, cache, cargo, in_path},
};

/// Of cargo-fuzz.
const VERSION: &str = "0.13.2";

#[derive(Args, Debug)]
pub struct Options {
    /// Only these targets; all without any
    targets: Vec<String>,
    /// How long each target runs, after it was built
    #[arg(long, default_value_t = 30)]
    seconds: u64,
}

pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let known = targets(workspace)?;
    if let Some(unknown) = options.targets.iter().find(|target| !known.contains(target)) {
        bail!("no fuzz target {unknown}; there are {}", known.join(", "));
    }
    let object = workspace.object();
    if !object.is_file() {
        bail!("no BPF object at {}: run `cargo xtask build-ebpf` first", object.display());
    }
    let tool = find_or_install(workspace)?;
    for target in if options.targets.is_empty() { &known } else { &options.targets } {
        section(&format!("fuzz {target}"), || fuzz(workspace, &tool, target, options.seconds))?;
    }
    Ok(())
}

/// The entry points in `fuzz/`.
fn targets(workspace: &Workspace) -> Result<Vec<String>> {
    let directory = workspace.root.join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&directory).with_context(|| format!("no fuzz targets at {}", directory.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        found.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    found.sort();
    Ok(found)
}

fn fuzz(workspace: &Workspace, tool: &PathBuf, target: &str, seconds: u64) -> Result<()> {
    let fuzz = workspace.root.join("fuzz");
    let scratch = workspace.target.join("fuzz");
    let found = scratch.join("corpus").join(target);
    fs::create_dir_all(&found).with_context(|| format!("cannot create {}", found.display()))?;
    let mut command = Command::new(tool);
    command
        .current_dir(&fuzz)
        .env("HITLESS_BPF_OBJECT", workspace.object())
        .args(["fuzz", "run", "--dev", "--sanitizer", "none", "--fuzz-dir"])
        .arg(&fuzz)
        .arg("--target-dir")
        .arg(scratch.join("target"))
        .arg(target)
        // libFuzzer writes what it finds into the first.
        .args([&found, &fuzz.join("corpus").join(target)])
        .args(["--", &format!("-max_total_time={seconds}"), "-timeout=10", "-rss_limit_mb=2048", "-max_len=65536"]);
    // Words that its inputs are made of; targets of one area share them.
    let area = target.split('_').next().unwrap_or(target);
    let dictionary = fuzz.join(format!("dictionaries/{area}.dict"));
    if dictionary.is_file() {
        command.arg(format!("-dict={}", dictionary.display()));
    }
    status(&mut command).with_context(|| {
        let place = fuzz.join("artifacts").join(target);
        format!("the input that did it is in {}; mend the code and keep it in fuzz/corpus/{target}", place.display())
    })
}

fn find_or_install(workspace: &Workspace) -> Result<PathBuf> {
    let root = cache()?.join(format!("tools/cargo-fuzz-{VERSION}"));
    let tool = root.join("bin/cargo-fuzz");
    if tool.is_file() {
        return Ok(tool);
    }
    if in_path("c++").is_none() {
        packages::install(workspace, "to build libFuzzer", &["g++"])?;
    }
    eprintln!("Building cargo-fuzz {VERSION} into {} (a minute or two, once)", root.display());
    let mut command = Command::new(cargo());
    command.args(["install", "cargo-fuzz", "--locked", "--version", VERSION, "--root"]).arg(&root);
    command.arg("--target-dir").arg(workspace.target.join("cargo-fuzz"));
    step::run(&format!("cargo-fuzz {VERSION}"), &mut command, &workspace.log("cargo-fuzz"))?;
    Ok(tool)
}
