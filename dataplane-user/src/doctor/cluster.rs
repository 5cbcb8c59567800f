//! Checks of a cluster's node: whether its processes and cgroups are seen from here, and who else routes for its pods.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::Check;

/// The inode numbers of the first namespaces (include/linux/proc_ns.h): part of the kernel's interface.
const FIRST_PID_NS: &str = "pid:[4026531836]";
const FIRST_CGROUP_NS: &str = "cgroup:[4026531835]";

/// Where a runtime is told of its networks; the first file by name is in force (containernetworking's libcni).
const CNI_DIRECTORY: &str = "/etc/cni/net.d";

/// What tells whose processes are in /proc.
#[derive(Debug)]
struct Processes {
    pid_namespace: String,
    mount_namespace: String,
    /// Of process 1; an error: it may not be looked into.
    first_mount_namespace: Result<String, String>,
    first_name: String,
    all: usize,
    network_namespaces: usize,
}

/// Does /proc hold the node's processes, or only this container's?
pub fn processes() -> Check {
    let link = |path: &str| fs::read_link(path).map(|target| target.to_string_lossy().into_owned());
    let pids: Vec<_> = pids().collect();
    let namespaces = pids.iter().filter_map(|pid| link(&format!("/proc/{pid}/ns/net")).ok());
    judge_processes(&Processes {
        pid_namespace: link("/proc/self/ns/pid").unwrap_or_default(),
        mount_namespace: link("/proc/self/ns/mnt").unwrap_or_default(),
        first_mount_namespace: link("/proc/1/ns/mnt").map_err(|error: io::Error| error.to_string()),
        first_name: name_of(1),
        network_namespaces: namespaces.collect::<BTreeSet<_>>().len(),
        all: pids.len(),
    })
}

fn judge_processes(seen: &Processes) -> Check {
    const NAME: &str = "processes";
    let there = format!("{} in {} network namespaces", seen.all, seen.network_namespaces);
    if seen.pid_namespace == FIRST_PID_NS {
        return Check::ok(NAME, format!("all of the machine: {there}"));
    }
    let first = match &seen.first_mount_namespace {
        Ok(first) => first,
        Err(error) => {
            return Check::warn(
                NAME,
                format!("whose they are can't be told (/proc/1/ns/mnt: {error}): {there}"),
                "run as root with CAP_SYS_PTRACE (privileged: true): pods' namespaces are found through /proc",
            );
        }
    };
    // In a container of one's own process 1 is of that container, with its mounts; with hostPID it is the node's.
    if *first != seen.mount_namespace {
        return Check::ok(
            NAME,
            format!("those of process 1, {}, which is outside of this container: {there}", seen.first_name),
        );
    }
    Check::warn(
        NAME,
        format!("only this container's: process 1 is {}, with the same mounts as this one; {there}", seen.first_name),
        "set hostPID: true, or pods of this node must be named by their network namespace; on a node that is a \
         container itself, outside of any pod, there is nothing to do",
    )
}

/// Do paths of cgroups, as /proc tells them, begin at the true root?
pub fn cgroup_paths() -> Check {
    let namespace = fs::read_link("/proc/self/ns/cgroup").map(|link| link.to_string_lossy().into_owned());
    let first = fs::read_to_string("/proc/1/cgroup").unwrap_or_default();
    judge_cgroup_paths(&namespace.unwrap_or_default(), &first)
}

/// `first` is /proc/1/cgroup: the node's init is above whatever a cgroup namespace begins at (cgroup_namespaces(7)).
fn judge_cgroup_paths(namespace: &str, first: &str) -> Check {
    const NAME: &str = "cgroup paths";
    if namespace == FIRST_CGROUP_NS {
        return Check::ok(NAME, "from the true root");
    }
    let path = first.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    if path.is_empty() {
        return Check::warn(NAME, "/proc/1/cgroup names no cgroup2 path", "mount /proc, and a cgroup2 hierarchy");
    }
    let found = if path.starts_with("/..") {
        format!("process 1 is at {path}: told from the root of a cgroup namespace below it")
    } else {
        "told from the root of a cgroup namespace; whether that is the true one can't be seen from here".to_owned()
    };
    Check::warn(
        NAME,
        found,
        "run with the host's cgroup namespace (privileged: true makes containerd and CRI-O leave it), so that a \
         process's cgroup is the path below --cgroup",
    )
}

/// Who does the services' addresses besides hitless. For information: hitless lives beside each of them.
pub fn kube_proxy() -> Check {
    const NAME: &str = "kube-proxy";
    let running = pids().find_map(|pid| {
        let arguments = arguments(pid);
        is_kube_proxy(&arguments).then_some((pid, arguments))
    });
    let Some((pid, arguments)) = running else {
        return Check::ok(
            NAME,
            "none is seen here: services that hitless does not know are left to whatever else there is",
        );
    };
    let told = arguments.iter().enumerate().find_map(|(nth, argument)| match argument.strip_prefix("--proxy-mode") {
        Some("") => arguments.get(nth + 1).cloned(),
        Some(rest) => rest.strip_prefix('=').map(str::to_owned),
        None => None,
    });
    let ipvs = Path::new("/sys/class/net/kube-ipvs0").exists();
    let mode = match (told.filter(|mode| !mode.is_empty()), ipvs) {
        (Some(mode), _) => format!("mode {mode}"),
        (None, true) => "mode ipvs (by its interface)".into(),
        (None, false) => "its configuration names the mode, or it is the default, iptables".into(),
    };
    Check::ok(NAME, format!("process {pid}, {mode}; it goes on serving what hitless does not"))
}

/// By its name, or by the first argument of a program that is many (k3s, hyperkube).
fn is_kube_proxy(arguments: &[String]) -> bool {
    arguments.iter().take(2).any(|argument| argument.rsplit('/').next() == Some("kube-proxy"))
}

/// Which CNI made the pods' networks, by the node's configuration.
pub fn cni() -> Check {
    const NAME: &str = "CNI";
    // The node's own files, when its processes are seen: a container has no such directory.
    let candidates = [format!("/proc/1/root{CNI_DIRECTORY}"), CNI_DIRECTORY.to_owned()];
    let file = candidates.iter().find_map(|directory| first_configuration(Path::new(directory)));
    let Some(file) = file else {
        return Check::ok(NAME, format!("no configuration in {CNI_DIRECTORY}"));
    };
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match fs::read_to_string(&file).map_err(|error| error.to_string()).and_then(|text| plugins(&text)) {
        Ok(plugins) => Check::ok(NAME, format!("{} ({name})", plugins.join(", "))),
        Err(error) => Check::ok(NAME, format!("{name}, which can't be read: {error}")),
    }
}

fn first_configuration(directory: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path());
    let known = |path: &PathBuf| matches!(path.extension()?.to_str()?, "conf" | "conflist" | "json").then_some(());
    files.filter(|path| known(path).is_some()).min()
}

/// The types of a configuration's plugins, in the order in which they act.
fn plugins(text: &str) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Plugin {
        #[serde(rename = "type")]
        kind: String,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Configuration {
        List { plugins: Vec<Plugin> },
        One(Plugin),
    }
    let parsed = serde_json::from_str(text).map_err(|_| "it names no plugin".to_owned())?;
    Ok(match parsed {
        Configuration::List { plugins } => plugins.into_iter().map(|plugin| plugin.kind).collect(),
        Configuration::One(plugin) => vec![plugin.kind],
    })
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn name_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

fn arguments(pid: u32) -> Vec<String> {
    let text = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    text.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    fn seen(pid: &str, mount: &str, first: &str) -> Processes {
        Processes {
            pid_namespace: pid.into(),
            mount_namespace: mount.into(),
            first_mount_namespace: Ok(first.into()),
            first_name: "systemd".into(),
            all: 90,
            network_namespaces: 7,
        }
    }

    #[test]
    fn the_node_s_processes_are_told_from_a_container_s_own() {
        let judge = |pid: &str, mount: &str, first: &str| judge_processes(&seen(pid, mount, first));
        let host = judge(FIRST_PID_NS, "mnt:[1]", "mnt:[1]");
        assert_eq!(host.status, Status::Ok);
        assert!(host.found.contains("90 in 7 network namespaces"), "{host:?}");
        assert_eq!(judge(FIRST_PID_NS, "mnt:[2]", "mnt:[1]").status, Status::Ok, "hostPID");
        assert_eq!(judge("pid:[5]", "mnt:[2]", "mnt:[1]").status, Status::Ok, "hostPID on a node of kind");
        let own = judge("pid:[5]", "mnt:[2]", "mnt:[2]");
        assert_eq!(own.status, Status::Warn);
        assert!(own.remedy.is_some_and(|remedy| remedy.contains("hostPID: true")));
        let shut = Processes { first_mount_namespace: Err("EACCES".into()), ..seen("pid:[5]", "", "") };
        assert!(judge_processes(&shut).remedy.is_some_and(|remedy| remedy.contains("CAP_SYS_PTRACE")));
    }

    #[test]
    fn a_cgroup_namespace_of_its_own_is_told() {
        assert_eq!(judge_cgroup_paths(FIRST_CGROUP_NS, "0::/init.scope\n").status, Status::Ok);
        let own = judge_cgroup_paths("cgroup:[7]", "1:cpu:/\n0::/../../../init.scope\n");
        assert_eq!(own.status, Status::Warn);
        assert!(own.found.contains("/../../../init.scope"), "{own:?}");
        assert_eq!(judge_cgroup_paths("cgroup:[7]", "0::/\n").status, Status::Warn);
    }

    #[test]
    fn the_first_configuration_by_name_is_the_one_in_force() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        assert_eq!(first_configuration(directory.path()), None);
        write("99-loopback.conf", r#"{"cniVersion":"1.0.0","type":"loopback"}"#);
        write("10-calico.conflist", r#"{"name":"k8s","plugins":[{"type":"calico"},{"type":"portmap","snat":true}]}"#);
        write("00-readme.txt", "not one");
        let file = first_configuration(directory.path()).unwrap();
        assert_eq!(plugins(&fs::read_to_string(&file).unwrap()).unwrap(), ["calico", "portmap"]);
        assert_eq!(plugins(r#"{"cniVersion":"1.0.0","type":"loopback"}"#).unwrap(), ["loopback"]);
        assert!(plugins("{").is_err());
    }

    #[test]
    fn kube_proxy_is_known_by_its_name_or_as_a_part_of_a_program() {
        let is = |words: &[&str]| is_kube_proxy(&words.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert!(is(&["/usr/local/bin/kube-proxy", "--config=/var/lib/kube-proxy/config.conf"]));
        assert!(is(&["/cache/kubernetes", "kube-proxy", "--proxy-mode=nftables"]));
        assert!(!is(&["kubectl", "logs", "kube-proxy"]));
        assert!(!is(&["/bin/sh"]));
    }
}
