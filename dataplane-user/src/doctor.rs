//! `hitless doctor`: what this machine has of what hitless needs, each lack with its remedy.
//!
//! Every check is made by trying: a version number only explains why something is missing. What is
//! made for a trial (a directory in the BPF file system, a network namespace, programs that do
//! nothing) is gone when the check is over.

mod cluster;
mod host;
mod kube;
mod probe;

use serde::Serialize;

use crate::{kernel::Config, source::kube::Settings};

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Status {
    Ok,
    /// hitless works, with less than it could have.
    Warn,
    /// hitless does not work here.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    pub name: &'static str,
    pub status: Status,
    /// What is there.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), remedy: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Fail, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Makes every check, in the order in which a remedy for one may mend the next. Some 20 ms.
pub fn run(config: &Config) -> Vec<Check> {
    let mut checks = vec![host::kernel(), host::lockdown(), host::capabilities(), host::memory_lock()];
    checks.push(probe::offsets());
    checks.push(host::cgroup(config.cgroup.as_deref()));
    checks.push(cluster::cgroup_paths());
    checks.push(host::bpffs(&config.bpffs));
    checks.push(probe::maps());
    checks.push(probe::programs());
    checks.push(probe::helpers());
    checks.push(probe::tracepoints());
    checks.push(cluster::processes());
    checks.extend(probe::network_namespaces(config.tcx));
    checks.push(host::unprivileged());
    checks.push(probe::pins(config));
    checks.push(probe::neighbours(config));
    checks.extend([cluster::kube_proxy(), cluster::cni()]);
    checks
}

/// What the kube source asks: the API server and the container runtime. Seconds, where one of them does not answer.
pub fn kube(settings: &Settings) -> Vec<Check> {
    vec![kube::api_server(settings), kube::runtime(&settings.cri)]
}

/// Instead of these, where nobody says what the source is.
pub fn no_source() -> Check {
    Check::ok("source", "not given: for a cluster's node add --source kube, and the API server is tried too")
}

/// The worst of them.
pub fn worst(checks: &[Check]) -> Status {
    checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok)
}
