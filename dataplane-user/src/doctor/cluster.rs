//! Checks of a cluster's node: whether its processes and cgroups are seen from here, and who else routes for its pods.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::Check;

/// The inode numbers of the first namespaces (include/linux/proc_ns.h): part of the kernel's interface.
const FIRST_PID_NS: &str = "pid:[4026531836]";
const FIRST_CGROUP_NS: &str = "cgroup:[4026531835]";

/// Where a runtime is told of its networks; the first file by name is in force (containernetworking's libcni).
const CNI_DIRECTORY: &str = "/etc/cni/net.d";

/// More than any configuration of kube-proxy.
const MOST_OF_A_FILE: u64 = 64 << 10;

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
        let configuration = option(&arguments, "--config").map(|path| read_of(pid, path)).unwrap_or_default();
        is_kube_proxy(&arguments, &configuration).then_some((pid, arguments, configuration))
    });
    let Some((pid, arguments, configuration)) = running else {
        return Check::ok(
            NAME,
            "none is seen here: services that hitless does not know are left to whatever else there is",
        );
    };
    let ipvs = Path::new("/sys/class/net/kube-ipvs0").exists();
    let mode = match proxy_mode(&arguments, &configuration) {
        Some(mode) => mode,
        None if ipvs => "ipvs",
        None => "iptables, the default",
    };
    Check::ok(NAME, format!("process {pid}, mode {mode}; it goes on serving what hitless does not"))
}

/// By its name, or by what it was given (of a program that is many: k3s, hyperkube).
fn is_kube_proxy(arguments: &[String], configuration: &str) -> bool {
    arguments.iter().take(2).any(|argument| argument.rsplit('/').next() == Some("kube-proxy"))
        || configuration.lines().any(|line| line.trim_end() == "kind: KubeProxyConfiguration")
}

/// The configuration, when there is one, wins over flags (k8s.io/kubernetes, cmd/kube-proxy).
fn proxy_mode<'a>(arguments: &'a [String], configuration: &'a str) -> Option<&'a str> {
    let told = if configuration.is_empty() {
        option(arguments, "--proxy-mode")
    } else {
        configuration.lines().find_map(|line| line.strip_prefix("mode:"))
    };
    let mode = told?.split('#').next()?.trim().trim_matches(['"', '\'']);
    // It is another's word, to be printed.
    (!mode.is_empty() && mode.chars().all(|c| c.is_ascii_alphanumeric())).then_some(mode)
}

/// `--name=value` or `--name value`.
fn option<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    arguments.iter().enumerate().find_map(|(nth, argument)| match argument.strip_prefix(name)? {
        "" => arguments.get(nth + 1).map(String::as_str),
        rest => rest.strip_prefix('='),
    })
}

/// The beginning of another process's file. It may be anybody's: nothing that blocks is waited for.
fn read_of(pid: u32, path: &str) -> String {
    let path = format!("/proc/{pid}/root/{path}");
    let read = || -> io::Result<String> {
        let file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
        let mut text = Vec::new();
        if file.metadata()?.is_file() {
            file.take(MOST_OF_A_FILE).read_to_end(&mut text)?;
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    read().unwrap_or_default()
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

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    const CONFIGURATION: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ";

    #[test]
    fn kube_proxy_is_known_by_its_name_or_by_its_configuration() {
        let is = |arguments: &[&str]| is_kube_proxy(&words(arguments), "");
        assert!(is(&["/usr/local/bin/kube-proxy", "--config=/var/lib/kube-proxy/config.conf"]));
        assert!(is(&["/cache/kubernetes", "kube-proxy", "--proxy-mode=nftables"]));
        assert!(!is(&["kubectl", "logs", "kube-proxy"]));
        assert!(!is(&["/bin/sh"]));
        assert!(is_kube_proxy(&words(&["kubernetes", "proxy"]), CONFIGURATION));
        assert!(!is_kube_proxy(&words(&["kubelet"]), "kind: KubeletConfiguration\n"));
    }

    #[test]
    fn the_mode_is_the_configuration_s_or_else_the_flag_s() {
        let flags = words(&["kube-proxy", "--v=2", "--proxy-mode", "ipvs"]);
        assert_eq!(proxy_mode(&flags, ""), Some("ipvs"));
        assert_eq!(proxy_mode(&flags, &format!("{CONFIGURATION}nftables\n")), Some("nftables"));
        assert_eq!(proxy_mode(&flags, &format!("{CONFIGURATION}\"\"\n")), None);
        assert_eq!(proxy_mode(&words(&["kube-proxy"]), ""), None);
        assert_eq!(proxy_mode(&words(&["kube-proxy", "--proxy-mode=\u{1b}[2J"]), ""), None);
    }
}
