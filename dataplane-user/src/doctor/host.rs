//! Checks that read what the kernel says of itself: versions, mounts, capabilities, limits.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    sys::{
        resource::{Resource, getrlimit},
        statfs::statfs,
    },
    unistd::{AccessFlags, access},
};

use super::Check;

/// The oldest kernel that has all that is used (docs/architecture.md).
const FLOOR: (u32, u32) = (5, 15);
/// From here on BPF memory is charged to the memory cgroup, not to RLIMIT_MEMLOCK.
const NO_MEMLOCK: (u32, u32) = (5, 11);

const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// `CAP_*` of include/uapi/linux/capability.h, and what hitless needs it for.
const CAPABILITIES: &[(u32, &str, &str)] = &[
    (39, "CAP_BPF", "loading programs and making maps"),
    (38, "CAP_PERFMON", "programs that read kernel memory (tracepoints)"),
    (12, "CAP_NET_ADMIN", "programs on sockets and interfaces"),
    (21, "CAP_SYS_ADMIN", "entering the pods' network namespaces"),
    (19, "CAP_SYS_PTRACE", "finding the pods' network namespaces in /proc"),
];
const SYS_ADMIN: u32 = 21;

pub fn kernel() -> Check {
    let release = release();
    match version(&release) {
        Some(version) if version >= FLOOR => Check::ok("kernel", release),
        Some(_) => Check::fail("kernel", release, "use a kernel of version 5.15 or newer"),
        None => Check::warn("kernel", release, "this release has no version that can be read; 5.15 is needed"),
    }
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|error| error.to_string(), |text| text.trim().to_owned())
}

/// `6.1.0-18-cloud-amd64` → (6, 1).
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// In confidentiality mode programs may not read kernel memory: the tracepoint programs do.
pub fn lockdown() -> Check {
    let text = match fs::read_to_string("/sys/kernel/security/lockdown") {
        Ok(text) => text,
        Err(_) => return Check::ok("lockdown", "none (the kernel has no lockdown, or securityfs is not mounted)"),
    };
    match chosen(&text) {
        Some("confidentiality") => Check::fail(
            "lockdown",
            "confidentiality",
            "boot with lockdown=integrity or without: BPF may not read kernel memory in this mode",
        ),
        Some(mode) => Check::ok("lockdown", mode),
        None => {
            Check::warn("lockdown", text.trim(), "which mode is on can't be told from /sys/kernel/security/lockdown")
        }
    }
}

/// `none [integrity] confidentiality` → `integrity`.
fn chosen(text: &str) -> Option<&str> {
    text.split_once('[')?.1.split_once(']').map(|(mode, _)| mode)
}

pub fn capabilities() -> Check {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let Some(effective) = effective(&status) else {
        return Check::warn("capabilities", "unknown", "/proc/self/status can't be read: mount /proc");
    };
    let missing = missing(effective);
    if missing.is_empty() {
        return Check::ok("capabilities", format!("all that are needed ({effective:#x})"));
    }
    let names: Vec<_> = missing.iter().map(|(name, why)| format!("{name} ({why})")).collect();
    Check::fail(
        "capabilities",
        format!("missing: {}", names.join(", ")),
        "run as root, or add them to securityContext.capabilities.add (AmbientCapabilities in a systemd unit)",
    )
}

/// The `CapEff` line of /proc/<pid>/status.
fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON, as it did before they were (5.8).
fn missing(effective: u64) -> Vec<(&'static str, &'static str)> {
    let has = |bit: u32| effective & (1 << bit) != 0;
    let stands_for = |name| has(SYS_ADMIN) && matches!(name, "CAP_BPF" | "CAP_PERFMON");
    CAPABILITIES
        .iter()
        .filter(|(bit, name, _)| !has(*bit) && !stands_for(*name))
        .map(|(_, name, why)| (*name, *why))
        .collect()
}

pub fn memory_lock() -> Check {
    const NAME: &str = "locked memory";
    if version(&release()).is_none_or(|version| version >= NO_MEMLOCK) {
        return Check::ok(NAME, "not limited: maps count as memory of the cgroup (since 5.11)");
    }
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft == nix::libc::RLIM_INFINITY => Check::ok(NAME, "unlimited"),
        Ok((soft, _)) => Check::fail(
            NAME,
            format!("{} KiB", soft / 1024),
            "raise it: `ulimit -l unlimited`, or LimitMEMLOCK=infinity in the systemd unit",
        ),
        Err(error) => Check::warn(NAME, error.to_string(), "see that RLIMIT_MEMLOCK is unlimited"),
    }
}

/// A mount of the cgroup2 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct CgroupMount {
    /// Which directory of the hierarchy is mounted, as the cgroup namespace shows it.
    root: String,
    point: PathBuf,
}

/// proc_pid_mountinfo(5): id parent dev root mount-point options … - type source options.
fn cgroup_mounts(mountinfo: &str) -> Vec<CgroupMount> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            if kind.split(' ').next() != Some("cgroup2") {
                return None;
            }
            let mut fields = mount.split(' ').skip(3);
            Some(CgroupMount { root: unescape(fields.next()?), point: unescape(fields.next()?).into() })
        })
        .collect()
}

/// Space, tab, newline and backslash are octal in mountinfo.
fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

pub fn cgroup(configured: Option<&Path>) -> Check {
    const NAME: &str = "cgroup2";
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounts = cgroup_mounts(&mountinfo);
    if mounts.is_empty() {
        return Check::fail(
            NAME,
            "no cgroup2 hierarchy is mounted",
            "mount one: `mkdir -p /sys/fs/cgroup/unified; mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`",
        );
    }
    let path = match configured {
        Some(path) => path.to_owned(),
        None => mounts.iter().find(|mount| mount.root == "/").unwrap_or(&mounts[0]).point.clone(),
    };
    if file_system(&path).ok() != Some(CGROUP2_SUPER_MAGIC) {
        let points: Vec<_> = mounts.iter().map(|mount| mount.point.display().to_string()).collect();
        return Check::fail(
            NAME,
            format!("{} is not in a cgroup2 mount", path.display()),
            format!("name one with --cgroup: {}", points.join(", ")),
        );
    }
    // The root's mode is 0555: there even root's processes need the capability.
    if let Err(error) = access(&path, AccessFlags::W_OK | AccessFlags::X_OK) {
        return Check::fail(
            NAME,
            format!("{} is not writable ({error}): the canary can make no cgroup there", path.display()),
            "mount it read-write and add CAP_DAC_OVERRIDE, or do without the proof of the hooks: --canary off",
        );
    }
    // The true root is the only cgroup without a type. A cgroup namespace shows its own root as `/`.
    if !path.join("cgroup.type").exists() {
        let hybrid = if path == Path::new("/sys/fs/cgroup") { "" } else { " (hybrid or private mount)" };
        return Check::ok(NAME, format!("the root, at {}{hybrid}", path.display()));
    }
    let found = format!("{} is not the root of the hierarchy", path.display());
    if configured.is_some() {
        return Check::warn(NAME, found, "only processes below it are served; leave --cgroup out for all of the node");
    }
    Check::warn(
        NAME,
        format!("{found}: this is a cgroup namespace of its own"),
        "mount the host's /sys/fs/cgroup into the container (hostPath) and name it with --cgroup, or pods are not seen",
    )
}

pub fn bpffs(path: &Path) -> Check {
    const NAME: &str = "bpffs";
    if file_system(path).ok() != Some(BPF_FS_MAGIC) {
        return Check::fail(
            NAME,
            format!("no BPF file system at {}", path.display()),
            format!("mount it: `mount -t bpf bpf {}`; in a container a hostPath with mountPropagation", path.display()),
        );
    }
    let trial = path.join(format!("hitless-doctor-{}", std::process::id()));
    match fs::create_dir(&trial).and_then(|()| fs::remove_dir(&trial)) {
        Ok(()) => Check::ok(NAME, format!("{}, writable", path.display())),
        Err(error) => Check::fail(NAME, format!("{}: {error}", path.display()), "mount it read-write and run as root"),
    }
}

fn file_system(path: &Path) -> io::Result<i64> {
    #[allow(clippy::unnecessary_cast, reason = "f_type's width differs between architectures")]
    Ok(statfs(path)?.filesystem_type().0 as i64)
}

/// Nothing hitless needs; a hint that whoever hardens the node likes.
pub fn unprivileged() -> Check {
    const NAME: &str = "unprivileged BPF";
    match fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled").unwrap_or_default().trim() {
        "0" => Check::warn(
            NAME,
            "allowed",
            "hitless does not need it; `sysctl kernel.unprivileged_bpf_disabled=1` closes a door to kernel bugs",
        ),
        "" => Check::ok(NAME, "the kernel does not say"),
        value => Check::ok(NAME, format!("forbidden ({value})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_every_distribution_s_release() {
        assert_eq!(version("6.1.0-18-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("5.15.0+"), Some((5, 15)));
        assert_eq!(version("7.0-rc3"), Some((7, 0)));
        assert_eq!(version("custom"), None);
        assert!(version("5.4.0-1").is_some_and(|version| version < FLOOR));
        assert!(version("10.2.1").is_some_and(|version| version > FLOOR), "compared as numbers, not as text");
    }

    #[test]
    fn the_lockdown_mode_is_the_one_in_brackets() {
        assert_eq!(chosen("none [integrity] confidentiality\n"), Some("integrity"));
        assert_eq!(chosen("none integrity [confidentiality]\n"), Some("confidentiality"));
        assert_eq!(chosen("garbage"), None);
    }

    #[test]
    fn root_has_every_capability_and_sys_admin_stands_for_the_newer_ones() {
        let status = "Name:\thitless\nCapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\n";
        assert_eq!(effective(status), Some(0x1ff_ffff_ffff));
        assert_eq!(missing(0x1ff_ffff_ffff), []);
        let names = |effective| missing(effective).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(0), ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"]);
        assert_eq!(names(1 << 21), ["CAP_NET_ADMIN", "CAP_SYS_PTRACE"]);
        assert_eq!(names(1 << 39 | 1 << 38 | 1 << 12 | 1 << 19), ["CAP_SYS_ADMIN"]);
        assert_eq!(effective("Name:\tx\n"), None);
    }

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let hybrid = "30 20 0:25 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 20 0:26 /../kube /mnt/a\\040b rw - cgroup2 cgroup2 rw\n\
                      32 20 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw\n";
        let mounts = cgroup_mounts(hybrid);
        assert_eq!(mounts.len(), 2, "version 1 hierarchies are not it");
        assert_eq!(mounts[0], CgroupMount { root: "/../kube".into(), point: "/mnt/a b".into() });
        assert_eq!(mounts[1].point, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(cgroup_mounts("30 20 0:25 / / rw - ext4 /dev/vda rw\nshort\n"), []);
    }

    #[test]
    fn a_path_outside_cgroup2_or_bpffs_fails_with_a_remedy() {
        let check = bpffs(Path::new("/proc"));
        assert_eq!(check.status, super::super::Status::Fail);
        assert!(check.remedy.expect("a remedy").contains("mount -t bpf bpf /proc"));
    }
}
