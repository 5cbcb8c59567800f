//! `cargo xtask image`: the agent as a container image from scratch, one static binary and its licence.
//!
//! The archive depends on the binaries, the name, the commit and `SOURCE_DATE_EPOCH`, and on nothing else.

mod oci;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use object::{Architecture, Object as _, elf::PT_INTERP, read::elf::ProgramHeader as _};

use crate::{
    ebpf, step,
    workspace::{Workspace, cargo},
};

/// `localhost/…` is nobody's registry: an image that was not imported is an error, not a stranger's image.
const REPOSITORY: &str = "localhost/hitless";

#[derive(Args, Debug)]
pub struct Options {
    /// The archive to write [default: hitless-image.tar in cargo's target directory]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The image's full name [default: localhost/hitless:VERSION]
    #[arg(long, value_name = "NAME")]
    tag: Option<String>,
    /// Package this static binary instead of building one; several, one per architecture, make a multi-platform image
    #[arg(long, value_name = "FILE")]
    binary: Vec<PathBuf>,
}

pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let built = if options.binary.is_empty() { vec![build(workspace)?] } else { options.binary.clone() };
    let name = options.tag.clone().unwrap_or_else(|| format!("{REPOSITORY}:{}", env!("CARGO_PKG_VERSION")));
    let output = options.output.clone().unwrap_or_else(|| workspace.target.join("hitless-image.tar"));
    let epoch = env::var("SOURCE_DATE_EPOCH").ok();
    let archive = package(&built, &workspace.root.join("LICENSE"), &name, epoch.as_deref(), revision(workspace))?;
    // Whoever reads it meanwhile sees the old one or the new one.
    let partial = output.with_extension("partial");
    fs::write(&partial, &archive.bytes).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::rename(&partial, &output).with_context(|| format!("cannot write {}", output.display()))?;
    println!("{name}\n{}", archive.digest);
    println!("{} ({:.1} MiB)", output.display(), archive.bytes.len() as f64 / f64::from(1 << 20));
    Ok(())
}

/// The static release binary for this machine's architecture, without symbols and without this machine's paths.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    let object = ebpf::build(workspace, false)?;
    // glibc can be linked statically as it is: no toolchain beyond the one that is there.
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let mut flags = vec!["-C".to_owned(), "target-feature=+crt-static".to_owned()];
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    let places = [(Some(workspace.root.clone()), "/hitless"), (home, "/cargo")];
    for (place, name) in places {
        if let Some(place) = place {
            flags.push(format!("--remap-path-prefix={}={name}", place.display()));
        }
    }
    let mut command = Command::new(cargo());
    command
        .current_dir(&workspace.root)
        // With an explicit target the build script would look below that target's directory.
        .env("HITLESS_BPF_OBJECT", object)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
        .args(["build", "--release", "--locked", "--package", "dataplane-user", "--bin", "hitless", "--target"])
        .arg(&target);
    step::run(&format!("static hitless for {target}"), &mut command, &workspace.log("image"))?;
    Ok(workspace.target.join(target).join("release/hitless"))
}

fn package(
    binaries: &[PathBuf],
    license: &Path,
    name: &str,
    epoch: Option<&str>,
    revision: Option<String>,
) -> Result<oci::Archive> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let license = read(license)?;
    let mut contents = BTreeMap::new();
    for path in binaries {
        let content = read(path)?;
        let architecture = architecture(&content).with_context(|| format!("{} won't do", path.display()))?;
        if contents.insert(architecture, content).is_some() {
            bail!("{} is the second binary for {architecture}: one per architecture", path.display());
        }
    }
    let platforms: Vec<_> = contents
        .iter()
        .map(|(architecture, content)| oci::Platform {
            architecture,
            files: vec![
                oci::File { path: "bin/hitless", mode: 0o755, content },
                oci::File { path: "licenses/LICENSE", mode: 0o644, content: &license },
            ],
        })
        .collect();
    let seconds = match epoch {
        None => 0,
        Some(text) => text
            .parse::<u32>()
            .ok()
            .with_context(|| format!("SOURCE_DATE_EPOCH is {text:?}: give seconds since 1970"))?,
    };
    let mut labels = BTreeMap::from([
        ("org.opencontainers.image.title", "hitless".to_owned()),
        ("org.opencontainers.image.description", "Rolling updates that lose no connection: the node agent".to_owned()),
        ("org.opencontainers.image.licenses", env!("CARGO_PKG_LICENSE").to_owned()),
        ("org.opencontainers.image.version", env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    labels.extend(revision.map(|revision| ("org.opencontainers.image.revision", revision)));
    let image = oci::Image {
        name,
        mtime: seconds.into(),
        created: epoch.and(jiff::Timestamp::from_second(seconds.into()).ok()).map(|time| time.to_string()),
        entrypoint: &["/bin/hitless"],
        command: &["run"],
        labels,
    };
    oci::archive(&image, &platforms)
}

/// As images name it. An image from scratch has no loader: what needs one is refused.
fn architecture(binary: &[u8]) -> Result<&'static str> {
    let parsed = object::File::parse(binary).context("it is no ELF program")?;
    let architecture = match parsed.architecture() {
        Architecture::X86_64 => "amd64",
        Architecture::Aarch64 => "arm64",
        other => bail!("hitless knows x86_64 and aarch64, and this is for {other:?}"),
    };
    let object::File::Elf64(elf) = &parsed else { bail!("it is no 64-bit ELF program") };
    if elf.elf_program_headers().iter().any(|header| header.p_type(elf.endian()) == PT_INTERP) {
        bail!(
            "it is linked dynamically, and the image has no libraries: build it with \
             RUSTFLAGS='-C target-feature=+crt-static' and an explicit --target"
        );
    }
    Ok(architecture)
}

/// The commit that is checked out; none outside of a repository.
fn revision(workspace: &Workspace) -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).current_dir(&workspace.root).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() { commit } else { format!("{commit}-dirty") })
}

#[cfg(test)]
mod tests {
    use std::{
        fs::FileTimes,
        os::unix::fs::PermissionsExt as _,
        time::{Duration, SystemTime},
    };

    use super::*;

    const X86_64: u16 = 62;
    const AARCH64: u16 = 183;

    /// The smallest static program that says what it is for.
    fn program(machine: u16) -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16] = 2;
        elf[18..20].copy_from_slice(&machine.to_le_bytes());
        elf[20] = 1;
        elf[52] = 64;
        elf
    }

    fn written(dir: &Path, name: &str, content: &[u8]) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn packed(binaries: &[PathBuf], dir: &Path, epoch: Option<&str>) -> Result<oci::Archive> {
        let license = written(dir, "LICENSE", b"a licence");
        package(binaries, &license, "localhost/hitless:1", epoch, Some("abc".into()))
    }

    #[test]
    fn the_same_program_is_the_same_archive_wherever_and_whenever_it_was_built() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let one = written(here.path(), "hitless", &program(X86_64));
        let other = written(there.path(), "renamed", &program(X86_64));
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(86_400);
        fs::File::options()
            .write(true)
            .open(&other)
            .unwrap()
            .set_times(FileTimes::new().set_modified(long_ago))
            .unwrap();
        fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).unwrap();
        let one = packed(&[one], here.path(), None).unwrap();
        let other = packed(&[other], there.path(), None).unwrap();
        assert_eq!(one.digest, other.digest);
        assert!(one.bytes == other.bytes, "equal digests, different archives");
        let changed = written(here.path(), "hitless", &[program(X86_64), vec![1]].concat());
        assert_ne!(packed(&[changed], here.path(), None).unwrap().digest, one.digest);
    }

    #[test]
    fn source_date_epoch_dates_the_image_and_nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let binary = [written(dir.path(), "hitless", &program(AARCH64))];
        let dated = packed(&binary, dir.path(), Some("1700000000")).unwrap();
        let text = String::from_utf8_lossy(&dated.bytes).into_owned();
        assert!(text.contains(r#""created":"2023-11-14T22:13:20Z""#));
        assert_ne!(dated.digest, packed(&binary, dir.path(), None).unwrap().digest);
        let error = packed(&binary, dir.path(), Some("yesterday")).unwrap_err();
        assert!(error.to_string().contains("SOURCE_DATE_EPOCH"), "{error}");
    }

    #[test]
    fn a_program_that_needs_a_loader_is_refused_and_so_is_anything_else() {
        let own = fs::read(env::current_exe().unwrap()).unwrap();
        let error = architecture(&own).unwrap_err().to_string();
        assert!(error.contains("dynamically"), "{error}");
        assert_eq!(architecture(b"#!/bin/sh\n").unwrap_err().to_string(), "it is no ELF program");
        assert_eq!(architecture(&program(X86_64)).unwrap(), "amd64");
        assert_eq!(architecture(&program(AARCH64)).unwrap(), "arm64");
    }

    #[test]
    fn two_binaries_of_one_architecture_are_a_mistake() {
        let dir = tempfile::tempdir().unwrap();
        let one = written(dir.path(), "one", &program(X86_64));
        let two = written(dir.path(), "two", &program(X86_64));
        let error = packed(&[one, two], dir.path(), None).unwrap_err();
        assert!(error.to_string().contains("the second binary for amd64"), "{error}");
    }
}
