//! Helm, for the chart: a pinned Go module (`xtask/helm`), built on first use, cached outside the tree.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    packages, step,
    workspace::{Workspace, cache, in_path},
};

/// Changes with `xtask/helm/go.mod`: a test compares them.
const HELM: &str = "3.22.0";
/// What is fetched where the machine has no Go that is new enough; the cluster's parts are built with the same.
const GO: &str = "1.26.0";

/// `helm`, built if it is not there yet. Of several processes one builds it, and the others wait.
pub fn helm(workspace: &Workspace) -> Result<PathBuf> {
    let path = cache()?.join("tools").join(format!("helm-{HELM}"));
    once(&path, || {
        let go = go(workspace)?;
        let new = path.with_extension("new");
        let mut build = Command::new("nice");
        build
            .arg(go)
            .args(["build", "-mod=readonly", "-trimpath", "-ldflags=-s -w", "-o"])
            .arg(&new)
            .arg("helm.sh/helm/v3/cmd/helm")
            .current_dir(workspace.root.join("xtask/helm"))
            .env("CGO_ENABLED", "0");
        step::run(&format!("helm {HELM} (three minutes, once)"), &mut build, &workspace.log("helm"))?;
        Ok(fs::rename(new, &path)?)
    })?;
    Ok(path)
}

/// A Go that builds the module: the machine's, or one from the module proxy, where every release of Go is a module.
fn go(workspace: &Workspace) -> Result<PathBuf> {
    let wanted = parse_version(GO).context("GO is a version")?;
    let installed = in_path("go").or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|go| go.is_file()));
    if let Some(go) = installed.filter(|go| version(go).is_some_and(|version| version >= wanted)) {
        return Ok(go);
    }
    // Where the cluster's parts look too: whoever comes second finds it.
    let dir = cache()?.join("cluster").join(format!("go-{GO}"));
    once(&dir, || fetch_go(workspace, &dir))?;
    Ok(dir.join("bin/go"))
}

fn fetch_go(workspace: &Workspace, dir: &Path) -> Result<()> {
    let missing: Vec<_> = ["curl", "unzip"].into_iter().filter(|program| in_path(program).is_none()).collect();
    if !missing.is_empty() {
        packages::install(workspace, "to fetch Go", &missing)?;
    }
    let module = format!("v0.0.1-go{GO}.linux-{}", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" });
    let proxy = env::var("GOPROXY").ok().and_then(|list| list.split([',', '|']).next().map(str::to_owned));
    let proxy = proxy.filter(|url| url.starts_with("http")).unwrap_or_else(|| "https://proxy.golang.org".into());
    let (zip, new) = (dir.with_extension("zip"), dir.with_extension("unpacked"));
    let mut fetch = Command::new("curl");
    fetch.args(["-fsSL", "-o"]).arg(&zip).arg(format!("{proxy}/golang.org/toolchain/@v/{module}.zip"));
    step::run(&format!("Go {GO} from {proxy} (once)"), &mut fetch, &workspace.log("go"))?;
    let mut unpack = Command::new("unzip");
    unpack.args(["-q", "-o", "-d"]).arg(&new).arg(&zip);
    step::run("unpacking Go", &mut unpack, &workspace.log("go-unzip"))?;
    let root = new.join(format!("golang.org/toolchain@{module}"));
    // A module's files are not executable.
    let mut chmod = Command::new("chmod");
    chmod.args(["-R", "a+x"]).arg(root.join("bin")).arg(root.join("pkg/tool"));
    step::run("making Go executable", &mut chmod, &workspace.log("go-chmod"))?;
    fs::rename(root, dir)?;
    fs::remove_dir_all(new)?;
    Ok(fs::remove_file(zip)?)
}

fn version(go: &Path) -> Option<Vec<u32>> {
    let output = Command::new(go).arg("version").env("GOTOOLCHAIN", "local").output().ok()?;
    parse_version(String::from_utf8_lossy(&output.stdout).split_whitespace().nth(2)?.strip_prefix("go")?)
}

/// `1.26.8` → [1, 26, 8].
fn parse_version(text: &str) -> Option<Vec<u32>> {
    text.split('.').map(|number| number.parse().ok()).collect()
}

/// Runs `make` unless `path` is there.
fn once(path: &Path, make: impl FnOnce() -> Result<()>) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    fs::create_dir_all(path.parent().context("it has a directory")?)?;
    // As the tests' own cache does it, so that both may want the same thing.
    let lock = File::create(path.with_extension("lock"))?;
    lock.lock()?;
    if path.exists() {
        return Ok(());
    }
    make().with_context(|| format!("cannot make {}", path.display()))
}

/// Runs `helm` and returns what it prints.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot start helm")?;
    if !output.status.success() {
        bail!(
            "`{}` failed ({}):\n{}{}",
            crate::section::describe(command),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_are_compared_as_numbers() {
        assert!(parse_version("1.26.8") > parse_version(GO));
        assert!(parse_version("1.9.7") < parse_version(GO));
        assert_eq!(parse_version("1.27rc1"), None);
    }

    #[test]
    fn the_cache_is_named_for_what_the_module_pins() {
        let module = include_str!("../helm/go.mod");
        assert!(module.contains(&format!("helm.sh/helm/v3 v{HELM} ")), "HELM is not what xtask/helm/go.mod says");
    }
}
