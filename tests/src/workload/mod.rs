//! What runs in the lab's pods: real programs that know nothing of hitless.

pub mod client;
pub mod echo;
pub mod gateway;
pub mod server;
pub mod sockets;
pub mod storm;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The executable with these workloads: `hitless-lab`, beside whatever runs now, or `$HITLESS_LAB_BIN`.
pub fn binary() -> Result<PathBuf> {
    sibling("hitless-lab", "HITLESS_LAB_BIN", "cargo build -p hitless-tests")
}

/// The agent: `hitless`, beside whatever runs now, or `$HITLESS_BIN`.
pub fn agent_binary() -> Result<PathBuf> {
    sibling("hitless", "HITLESS_BIN", "cargo build -p dataplane-user")
}

fn sibling(name: &str, variable: &str, remedy: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("find the running executable")?;
    // Tests run from target/<profile>/deps, binaries from target/<profile>.
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
        .with_context(|| format!("no `{name}` beside {}: build it ({remedy}) or set {variable}", own.display()))
}

/// `CLOCK_MONOTONIC` in µs: one time scale for every process of a lab.
pub fn now_us() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists");
    now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1_000
}

/// Tell whoever waits that this process is in service.
pub(crate) fn say_ready(file: Option<&Path>) -> Result<()> {
    if let Some(file) = file {
        std::fs::write(file, "ready\n").with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

pub(crate) fn run<F: Future<Output = Result<()>>>(main: F) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(main)
}

/// Why a connect or a request failed, in a word that can be counted.
pub(crate) fn reason(error: &std::io::Error) -> String {
    use std::io::ErrorKind as Kind;
    match error.kind() {
        Kind::ConnectionRefused => "refused".into(),
        Kind::ConnectionReset => "reset".into(),
        Kind::TimedOut => "timed out".into(),
        Kind::HostUnreachable | Kind::NetworkUnreachable => "unreachable".into(),
        Kind::UnexpectedEof => "closed early".into(),
        other => other.to_string(),
    }
}
