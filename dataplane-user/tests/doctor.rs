//! `hitless doctor` against the running kernel. Needs root.

use std::path::PathBuf;

use dataplane_user::{
    doctor::{self, Check, Status},
    kernel::{Config, Kernel, cgroup2_root},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

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
