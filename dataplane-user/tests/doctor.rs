//! `hitless doctor` against the running kernel. Needs root.

use std::{path::PathBuf, process::Command};

use dataplane_user::{
    doctor::{self, Check, Status},
    kernel::{Config, Kernel, cgroup2_root},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;

/// A BPF file system of its own, gone with the test.
struct BpfFs(tempfile::TempDir);

impl BpfFs {
    fn mount() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .expect("mounting a BPF file system needs root");
        Self(directory)
    }

    fn config(&self) -> Config {
        Config { bpffs: self.0.path().to_owned(), ..Config::default() }
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn find<'a>(checks: &'a [Check], name: &str) -> &'a Check {
    checks.iter().find(|check| check.name == name).expect("the check is made")
}

#[test]
fn a_machine_that_can_run_hitless_fails_no_check() {
    let bpffs = BpfFs::mount();
    let checks = doctor::run(&bpffs.config());
    let failed: Vec<_> = checks.iter().filter(|check| check.status == Status::Fail).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    for name in ["kernel", "BTF", "cgroup2", "bpffs", "map types", "program types", "helpers", "raw tracepoints"] {
        assert_eq!(find(&checks, name).status, Status::Ok, "{checks:#?}");
    }
    assert!(find(&checks, "installation").found.contains("nothing"));
    let names = std::fs::read_dir(bpffs.0.path()).expect("readable").flatten().map(|entry| entry.file_name());
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().contains("hitless")).collect();
    assert!(left.is_empty(), "the doctor left something behind: {left:?}");
}

#[test]
fn what_is_missing_fails_with_its_remedy() {
    let config = Config { bpffs: PathBuf::from("/proc"), cgroup: Some(PathBuf::from("/proc")), ..Config::default() };
    let checks = doctor::run(&config);
    let bpffs = find(&checks, "bpffs");
    assert_eq!(bpffs.status, Status::Fail);
    assert!(bpffs.remedy.as_ref().is_some_and(|remedy| remedy.contains("mount -t bpf bpf /proc")));
    let cgroup = find(&checks, "cgroup2");
    assert_eq!(cgroup.status, Status::Fail);
    assert!(cgroup.remedy.as_ref().is_some_and(|remedy| remedy.contains("--cgroup")));
    assert_eq!(doctor::worst(&checks), Status::Fail);
}

#[test]
fn a_cgroup_below_the_root_is_warned_of() {
    let root = cgroup2_root().expect("cgroup2 is mounted");
    let cgroup = root.join(format!("hl-doctor-{}", std::process::id()));
    std::fs::create_dir(&cgroup).expect("a cgroup needs root");
    let bpffs = BpfFs::mount();
    let checks = doctor::run(&Config { cgroup: Some(cgroup.clone()), ..bpffs.config() });
    std::fs::remove_dir(&cgroup).expect("it is empty");
    assert_eq!(find(&checks, "cgroup2").status, Status::Warn);
}

#[test]
fn an_installation_is_told_by_its_agent_and_one_of_another_name_is_a_neighbour() {
    let cgroup = cgroup2_root().expect("cgroup2 is mounted").join(format!("hl-doctor-pins-{}", std::process::id()));
    std::fs::create_dir(&cgroup).expect("a cgroup needs root");
    let bpffs = BpfFs::mount();
    let config = Config { cgroup: Some(cgroup.clone()), ..bpffs.config() };
    let other = Config { name: "another".to_owned(), ..config.clone() };

    let mut opened = Kernel::open(config.clone()).expect("the programs load");
    opened.kernel.activate().expect("the programs attach");
    let held = doctor::run(&config);
    let beside = doctor::run(&other);
    drop(opened);
    let orphaned = doctor::run(&config);
    dataplane_user::kernel::uninstall(&config).expect("no agent runs");
    std::fs::remove_dir(&cgroup).expect("it is empty");

    let installation = find(&held, "installation");
    assert_eq!(installation.status, Status::Ok, "{installation:?}");
    assert!(installation.found.contains(&format!("held by process {}", std::process::id())), "{installation:?}");
    let neighbours = find(&held, "other programs");
    assert!(!neighbours.found.contains("hitless_connect"), "its own programs are no others: {neighbours:?}");

    let neighbours = find(&beside, "other programs");
    assert_eq!(neighbours.status, Status::Warn);
    assert!(neighbours.found.contains("connect4 (hitless_connect"), "{neighbours:?}");

    let installation = find(&orphaned, "installation");
    assert_eq!(installation.status, Status::Warn);
    assert!(installation.found.contains("without an agent"), "{installation:?}");
    assert!(installation.remedy.as_ref().is_some_and(|remedy| remedy.contains("hitless uninstall")));
}

/// One check of `hitless doctor`, run at the end of a shell script (as `doctor`) in namespaces of its own.
fn doctor_in(unshare: &[&str], script: &str, check: &str) -> Value {
    let doctor = format!("doctor() {{ '{}' doctor --output json || true; }}\n", env!("CARGO_BIN_EXE_hitless"));
    let output = Command::new("unshare").args(unshare).args(["bash", "-ec", &(doctor + script)]).output();
    let output = output.expect("unshare runs");
    let checks: Vec<Value> = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    checks.into_iter().find(|found| found["name"] == check).unwrap_or_else(|| panic!("no check {check}"))
}

const CONTAINER: [&str; 4] = ["--pid", "--fork", "--mount", "--mount-proc"];

#[test]
fn a_container_that_sees_only_its_own_processes_is_told_to_take_the_host_s() {
    let own = doctor_in(&CONTAINER, "doctor", "processes");
    assert_eq!(own["status"], "warn", "{own}");
    assert!(own["found"].as_str().is_some_and(|found| found.contains("process 1 is bash")), "{own}");
    assert!(own["remedy"].as_str().is_some_and(|remedy| remedy.contains("hostPID: true")), "{own}");
    // A pod with hostPID on a node that is itself a container: other mounts than the node's process 1.
    let nested = doctor_in(&CONTAINER, "export -f doctor; unshare --mount bash -c doctor; true", "processes");
    assert_eq!(nested["status"], "ok", "{nested}");
}

/// A pod has its own file system; the runtime's socket is in the node's, which process 1 is in.
#[test]
fn a_runtime_is_found_in_the_file_system_of_process_1() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = std::os::unix::net::UnixListener::bind(directory.path().join("containerd.sock")).expect("a socket");
    // No runtime, and it need not be one: whoever is found there is asked.
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            drop(stream)
        }
    });
    let ask = "HITLESS_SOURCE=kube doctor";
    let node = format!(
        "mount -t tmpfs tmpfs /run; mkdir /run/containerd; mount --bind {} /run/containerd; export -f doctor",
        directory.path().display()
    );
    let pod = format!("{node}; unshare --mount bash -c 'umount /run/containerd; {ask}'; true");
    let found = doctor_in(&CONTAINER, &pod, "container runtime");
    assert_eq!(found["status"], "warn", "{found}");
    let path = "/proc/1/root/run/containerd/containerd.sock: ";
    assert!(found["found"].as_str().is_some_and(|found| found.starts_with(path)), "{found}");
    let absent = doctor_in(&CONTAINER, &format!("mount -t tmpfs tmpfs /run; {ask}"), "container runtime");
    assert!(absent["found"].as_str().is_some_and(|found| found.starts_with("no container runtime")), "{absent}");
}

#[test]
fn a_cgroup_namespace_that_begins_below_the_root_is_told() {
    let cgroup = cgroup2_root().expect("cgroup2 is mounted").join(format!("hl-doctor-ns-{}", std::process::id()));
    std::fs::create_dir(&cgroup).expect("a cgroup needs root");
    let script =
        format!("echo $$ > {}/cgroup.procs; export -f doctor; unshare --cgroup bash -c doctor; true", cgroup.display());
    let check = doctor_in(&[], &script, "cgroup paths");
    std::fs::remove_dir(&cgroup).expect("it is empty");
    assert_eq!(check["status"], "warn", "{check}");
    assert!(check["found"].as_str().is_some_and(|found| found.contains("/..")), "{check}");
}

#[test]
fn who_else_routes_on_a_node_is_told_and_nothing_wrong_is_seen_in_it() {
    // The node's files and processes are those of process 1: this shell.
    let node = "mount -t tmpfs tmpfs /etc; mkdir -p /etc/cni/net.d
        echo '{\"name\": \"n\", \"plugins\": [{\"type\": \"calico\"}, {\"type\": \"portmap\"}]}' > /etc/cni/net.d/10-calico.conflist
        echo 'mode: nftables' > /etc/proxy.conf
        (exec -a kube-proxy bash -c 'sleep 60; :' x --config=/etc/proxy.conf) > /dev/null &
        until grep -q proxy.conf /proc/$!/cmdline; do sleep 0.01; done
        doctor";
    let cni = doctor_in(&CONTAINER, node, "CNI");
    assert_eq!((&cni["status"], &cni["found"]), (&"ok".into(), &"calico, portmap (10-calico.conflist)".into()));
    let proxy = doctor_in(&CONTAINER, node, "kube-proxy");
    assert_eq!(proxy["status"], "ok");
    assert!(proxy["found"].as_str().is_some_and(|found| found.contains("mode nftables")), "{proxy}");
    let none = doctor_in(&CONTAINER, "mount -t tmpfs tmpfs /etc; doctor", "CNI");
    assert_eq!(none["found"], "no configuration in /etc/cni/net.d");
}
